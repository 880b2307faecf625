"""
Measure how fast training and sampling are, beside the machine's limits and beside other projects.

    python bench.py train                                    # a training step of three nets
    python bench.py train --peer=transformers,nanogpt:PATH   # PATH is a clone of nanoGPT
    python bench.py train --net=10.65M --profile             # where a step's time goes
    python bench.py train --net=10.65M --growth --plot=growth.png   # with context, batch and depth
    python bench.py sample                                   # GPT-2's shape, random weights
    python bench.py sample --net=10.65M --batch=1 --context=16,200   # nanoGPT's net for characters
    python bench.py sample --batch=1 --peer=transformers,nanogpt:PATH
    python bench.py train --json=-                           # JSON instead of a table

The speed of a shared machine drifts, so contenders take turns. A training step is compared with
the rate of matrix products (GEMM), a sampled token with the rate at which memory is read. These
rates are measured in the same minute.

Reads nothing but the peers' code. Writes a table or JSON to stdout.
"""
import contextlib
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from json import loads
from typing import Any

import lib.early  # noqa: F401  # before NumPy and torch

import torch
from torch import nn

from lib import decoding, peers, plots, runtime
from lib.configurator import check, configure
from lib.console import fail, say, write
from model import GPT, GPTConfig, Sampling, chances

what = 'sample'          # 'sample' or 'train'; may be typed as a bare word, without --what=
net = 'auto'             # '124M', '10.65M' or '0.8M'; train takes several, with commas between
batch = ''               # texts at a time or sequences in a step, as 8 or 1,8,64; '': usual ones
context = ''             # tokens of a prompt or of a sequence, as 16 or 16,200; '': usual ones
tokens = 40              # sample: tokens to time in a run, each on its own
dropout = 'auto'         # train: a share; 'auto': nanoGPT's 0.2 for the 10.65M net, 0 for others
peer_dropout = 'auto'    # train: the peers' share of dropout; 'auto': the same as ours
optimizer = 'adamw'      # train: our optimizer, 'adamw' as nanoGPT's, or 'muon'
profile = False          # train: show where the time of our step goes
growth = False           # train: our step alone, as the context, the batch and the depth grow
plot = ''                # train --growth: draw it into this .png too
quick = False            # train: two nets and one short run, to see whether it works
runs = 3                 # runs of each measurement; the median counts, JSON has their range too
peer = ''                # 'transformers', 'nanogpt:PATH' or both; sample: for one text at a time
json = ''                # file for rows, machine and versions; - for stdout instead of the table
seed = 1337              # seed of weights, prompts and draws
device = 'auto'          # 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'auto'           # one or several of float32,bfloat16,float16,int8; 'auto': what pays here
compile = 'auto'         # compile our steps, as train.py or sample.py would
knobs, _ = configure(globals(), runtime.find_device, first='what')

NETS = {   # GPT-2's shape, and nanoGPT's two for characters
    '124M': {},
    '10.65M': dict(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=65),
    '0.8M': dict(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=65),
}
ON_GPU = device.startswith('cuda')
CPU_BATCH = {'124M': 1, '10.65M': 16, '0.8M': 12}    # usual sequences in a training step
GPU_BATCH = {'124M': 16, '10.65M': 64, '0.8M': 12}
LARGEST_BATCH = 4096
WARM_UP_TOKENS = 3
RUN_SECONDS = 0.2 if quick else 3.0   # a run has as many training steps as fit into this time
STEP_SCRIPT = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'bench_step.py')


# ---- what both benchmarks take from the knobs ----------------------------------------------------

@dataclass
class Contender:
    """A project's code, and the precision it is measured in."""
    who: str           # 'ours', 'transformers' or 'nanogpt'
    precision: str     # precision of the matrix products; 'auto': the best that works here
    folder: str = ''   # nanogpt: the folder of its model.py


def whole_numbers(name, value, most=1 << 20):
    """Return '1,8,64' as [1, 8, 64]; fail for anything but numbers from 1 to `most`."""
    parts = [part.strip() for part in str(value).split(',')]
    if not all(part.isdecimal() and 1 <= int(part) <= most for part in parts):
        fail(f'{name}={value!r}: allowed are whole numbers from 1 to {most:,}, '
             f'with commas between; type --{name}=16')
    return [int(part) for part in parts]


def typed_precisions():
    """Return the precisions typed as --dtype, an empty list for 'auto'."""
    if dtype == 'auto':
        return []
    own = 'int8' if what == 'sample' else 'float16'   # allowed in this benchmark alone
    precisions = dtype.split(',')
    for precision in precisions:
        check(dict(dtype=precision), dtype=('float32', 'bfloat16', own))
        if precision != 'int8':
            runtime.find_dtype(precision, device)   # fails for fp16 on a processor
    return precisions


def without_emulated(usual):
    """Return the usual precisions that this machine has in hardware; say which are left out."""
    if device != 'cpu' or runtime.cpu_has_bf16():
        return usual
    say('left out: bfloat16, which this processor only emulates, many times slower than '
        'float32; type --dtype=bfloat16 to measure it all the same')
    return [precision for precision in usual if precision != 'bfloat16']


def typed_peers():
    """Return the contenders typed as --peer, all in float32."""
    found = []
    for part in filter(None, peer.split(',')):
        name, _, folder = part.partition(':')
        folder = os.path.expanduser(folder)
        if part == 'transformers':
            found.append(Contender('transformers', 'float32'))
        elif name == 'nanogpt' and folder and os.path.isfile(os.path.join(folder, 'model.py')):
            found.append(Contender('nanogpt', 'float32', folder))
        else:
            fail(f'peer={part!r}: allowed are transformers, and nanogpt:PATH with the folder of '
                 f'nanoGPT\'s model.py; type --peer=transformers')
    return found


def with_precisions(typed, precisions):
    """Return contenders with transformers in each precision. nanoGPT chooses its own."""
    contenders = []
    for contender in typed:
        if contender.who == 'transformers':
            contenders += [Contender('transformers', precision) for precision in precisions]
        else:
            contenders.append(contender)
    return contenders


def wait():
    """Return the time in seconds, once the device has done all that it was given."""
    return runtime.wait(device)


def show(line):
    """Print a line of the table, on stderr where JSON has stdout."""
    if json == '-':
        say(line)
    else:
        write(line + '\n')


# ---- sampling: what is measured ------------------------------------------------------------------

@dataclass
class SamplingPlan:
    net: str           # a key of NETS
    config: GPTConfig  # the shape of this net
    batches: list      # numbers of texts at a time
    contexts: list     # numbers of tokens before the first timed one
    contenders: list
    left_out: list     # precisions that are not measured, as the processor emulates them
    compiled: bool     # whether our steps of a single text are compiled


def plan_sampling():
    """Return what the knobs ask for; fail for a knob that is not allowed."""
    typed = typed_precisions()
    others = typed_peers()
    name = '124M' if net == 'auto' else net
    check(dict(net=name), net=tuple(NETS))
    config = GPTConfig(**NETS[name])
    batches = whole_numbers('batch', batch or '1,8,64', LARGEST_BATCH)
    if tokens >= config.block_size:
        fail(f'tokens={tokens}: the {name} net has block_size={config.block_size}; '
             f'type --tokens={config.block_size // 2}')
    longest = config.block_size - tokens
    if context:
        contexts = whole_numbers('context', context)
    else:
        contexts = sorted({min(T, longest) for T in (16, 256, 1000)})
    if max(contexts) > longest:
        fail(f'context={context} and tokens={tokens} do not fit block_size={config.block_size} '
             f'of the {name} net; type --context={longest}')
    _, compiled = runtime.set_up(device, 'float32', compile, pays=device == 'cpu')
    usual = ['float32', 'bfloat16', 'int8']
    precisions = typed or without_emulated(usual)
    left_out = []
    if not typed:
        left_out = [precision for precision in usual if precision not in precisions]
    contenders = [Contender('ours', precision) for precision in precisions]
    theirs = [precision for precision in precisions if precision != 'int8']
    contenders += with_precisions(others, theirs or ['float32'])
    return SamplingPlan(name, config, batches, contexts, contenders, left_out, compiled)


@dataclass
class Sampler:
    """A contender's model, and the function that times it."""
    who: str
    precision: str
    model: nn.Module
    # (model, prompt (1, T), texts, count) -> seconds of each token. The first token's seconds
    # include reading the prompt, which all texts share.
    time_tokens: Any


def make_sampler(contender, plan):
    """Return a contender's sampler, whose model has random weights."""
    torch.manual_seed(seed)
    if contender.who == 'ours':
        model = our_model(contender.precision, plan)
        time_tokens = time_ours_compiled if plan.compiled else time_ours
    elif contender.who == 'transformers':
        model = peers.transformers_gpt2(plan.config)
        model.eval().to(device, getattr(torch, contender.precision))
        time_tokens = time_transformers
    else:
        model = peers.nanogpt(contender.folder, plan.config).eval().to(device)
        time_tokens = time_nanogpt
    return Sampler(contender.who, contender.precision, model, time_tokens)


def our_model(precision, plan):
    """Return our GPT as sample.py prepares it."""
    model = GPT(plan.config).eval().to(device)
    if precision == 'int8':
        decoding.narrow(model, runtime.find_dtype('auto', device), 'int8')
    else:
        decoding.narrow(model, precision)
    return model


# ---- sampling: measuring it ----------------------------------------------------------------------

def time_ours(model, prompt, texts, count):
    """Time the stream of tokens that sample.py prints."""
    step = decoding.GraphedSampling() if ON_GPU else GPT.next_token
    return time_steps(model, prompt, texts, count, step)


def time_ours_compiled(model, prompt, texts, count):
    """Time the same with the step compiled."""
    step = decoding.GraphedSampling(compiled=True) if ON_GPU else decoding.compiled_step
    return time_steps(model, prompt, texts, count, step)


def time_steps(model, prompt, texts, count, step):
    """Time a stream's tokens, each made by one call of step."""
    chance = chances(range(texts), count).to(device)
    times = [wait()]
    for _ in model.stream(prompt, count, Sampling(), chance, step=step):
        times.append(wait())
    return differences(times)


class Ticks:
    """A streamer for transformers' generate: notes when the prompt and each token came."""

    def __init__(self):
        self.times = []

    def put(self, ids):
        self.times.append(wait())

    def end(self):
        pass


def time_transformers(model, prompt, texts, count):
    """Time generate, drawing from all tokens."""
    idx = prompt.expand(texts, -1)                                        # (B, T)
    ticks = Ticks()
    model.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=count,
                   do_sample=True, top_k=0, pad_token_id=0, streamer=ticks)
    return differences(ticks.times)


def time_nanogpt(model, prompt, texts, count):
    """Time generate(idx, 1): nanoGPT has no cache, so every token costs it the same.

    A slow net makes fewer than `count` tokens: it stops after ten seconds, but not before four."""
    idx = prompt.expand(texts, -1)                                        # (B, T)
    times = [wait()]
    while len(times) <= count:
        if len(times) > 4 and times[-1] - times[0] >= 10:
            break
        idx = model.generate(idx, 1)                                      # (B, T + 1)
        times.append(wait())
    return differences(times)


def differences(times):
    """Return the seconds between each two times in a row."""
    return [after - before for before, after in zip(times, times[1:])]


def read_rate():
    """Return the bytes/s at which memory is read now: the fastest of five sums of 256 MB."""
    numbers = torch.ones(1 << 26, device=device)
    rates = []
    for _ in range(5):
        started = wait()
        numbers.sum()
        rates.append(numbers.nbytes / (wait() - started))
    return max(rates)


@dataclass
class Timings:
    """What some runs of a sampler took, in seconds."""
    sampler: Sampler
    runs: list = field(default_factory=list)       # a list for each run: seconds of each token
    prefills: list = field(default_factory=list)   # ours: reading the prompt alone, for each run

    def add_run(self, prompt, texts, count):
        if self.sampler.who == 'ours':
            started = wait()
            self.sampler.model.next_logits(prompt)
            self.prefills.append(wait() - started)
        self.runs.append(self.sampler.time_tokens(self.sampler.model, prompt, texts, count))


def bench_sampling(plan):
    """Measure all batches and contexts, show each figure when it is there; return the rows."""
    samplers = [make_sampler(contender, plan) for contender in plan.contenders]
    show(f'{"":14} {"":9} batch context prefill ms  first ms  step ms    tok/s   MB/token  '
         f'of the read rate')
    rows = []
    for texts in plan.batches:
        for T in plan.contexts:
            for row in measure_sampling(samplers, texts, T, plan):
                rows.append(row)
                show(sampling_line(row))
    return rows


@torch.inference_mode()
def measure_sampling(samplers, texts, T, plan):
    """Return a row for each sampler. They take turns. Peers sample one text at a time only."""
    if texts > 1:
        samplers = [sampler for sampler in samplers if sampler.who == 'ours']
    rng = torch.Generator().manual_seed(seed)
    prompt = torch.randint(plan.config.vocab_size, (1, T), generator=rng).to(device)
    for sampler in samplers:   # the first run compiles, allocates and fills caches
        Timings(sampler).add_run(prompt, texts, WARM_UP_TOKENS)
    timings = [Timings(sampler) for sampler in samplers]
    rates = []
    for _ in range(runs):
        rates.append(read_rate())
        for timing in timings:
            timing.add_run(prompt, texts, tokens)
    rate = statistics.median(rates)
    return [sampling_row(timing, rate, texts, T, plan) for timing in timings]


# ---- sampling: from times to a row ---------------------------------------------------------------

def sampling_row(timing, rate, texts, T, plan):
    """Return the figures of one measurement. A step makes one token of each text.

    rate: bytes/s at which memory was read meanwhile."""
    sampler = timing.sampler
    steps = sorted(statistics.median(run[1:]) for run in timing.runs)   # seconds, one a run
    step = statistics.median(steps)
    row = dict(what='sample', who=sampler.who, net=plan.net, precision=sampler.precision,
               batch=texts, context=T, tok_per_s=texts / step, tok_per_s_min=texts / steps[-1],
               tok_per_s_max=texts / steps[0], step_ms=1e3 * step,
               first_token_ms=1e3 * statistics.median(run[0] for run in timing.runs),
               compiled=False)
    if sampler.who == 'ours':
        weights = decoding.weight_bytes(sampler.model)
        size = weights + texts * cache_bytes(sampler.precision, T, plan.config)
        row.update(prefill_ms=1e3 * statistics.median(timing.prefills),
                   bytes_per_token=size / texts, share_of_read_rate=size / step / rate,
                   read_gb_per_s=rate / 1e9, compiled=plan.compiled and texts == 1)
    return row


def cache_bytes(precision, T, config):
    """Return the bytes of keys and values that a step reads for one text, midway in a run."""
    numbers = 2 * config.n_layer * config.n_embd * (T + tokens / 2)
    if device == 'cpu' or precision == 'float32':   # a processor caches in fp32
        return 4 * numbers
    return 2 * numbers


def sampling_line(row):
    """Return a row of the table. Columns that peers do not have stay empty."""
    prefill = '-'
    own = ''
    if row['who'] == 'ours':
        prefill = f'{row["prefill_ms"]:.0f}'
        own = (f' {row["bytes_per_token"] / 1e6:10.1f} '
               f'{100 * row["share_of_read_rate"]:10.0f} %')
    return (f'{row["who"]:14} {row["precision"]:9} {row["batch"]:5} {row["context"]:7} '
            f'{prefill:>10} {row["first_token_ms"]:9.0f} {row["step_ms"]:8.2f} '
            f'{row["tok_per_s"]:8.1f}{own}')


# ---- training: what is measured ------------------------------------------------------------------

@dataclass
class Shape:
    """What the contenders train in one measurement."""
    net: str              # a key of NETS
    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int
    batch_size: int       # sequences in a step
    block_size: int       # tokens of a sequence
    dropout: float        # ours
    peer_dropout: float
    growth: str = ''      # the key of JSON's rows that grows from this measurement to the next

    def dropout_of(self, contender):
        return self.dropout if contender.who == 'ours' else self.peer_dropout


@dataclass
class TrainingPlan:
    shapes: list
    contenders: list
    left_out: list   # precisions that are not measured, as the processor emulates them


def plan_training():
    """Return what the knobs ask for; fail for a knob that is not allowed."""
    typed = typed_precisions()
    others = typed_peers()
    names = chosen_nets()
    check(knobs, optimizer=('adamw', 'muon'))
    check_share('dropout', dropout)
    check_share('peer_dropout', peer_dropout)
    check_plot()
    if growth and others:
        fail('growth measures ours alone; type --growth without --peer')
    batches = whole_numbers('batch', batch, LARGEST_BATCH) if batch else []
    contexts = whole_numbers('context', context) if context else []
    shapes = []
    for name in names:
        if growth:
            shapes += growing_shapes(name)
        else:
            shapes += typed_shapes(name, batches, contexts)
    contenders, left_out = training_contenders(typed, others)
    return TrainingPlan(shapes, contenders, left_out)


def training_contenders(typed, others):
    """Return (contenders, precisions left out): ours and the peers in the typed precisions.

    Without --dtype, ours is measured in the best precision, transformers in each that pays."""
    contenders = [Contender('ours', precision) for precision in typed or ['auto']]
    theirs = [precision for precision in typed if precision != 'float16']
    left_out = []
    if not typed and any(contender.who == 'transformers' for contender in others):
        usual = ['float32', 'bfloat16']
        theirs = without_emulated(usual)
        left_out = [precision for precision in usual if precision not in theirs]
    return contenders + with_precisions(others, theirs), left_out


def chosen_nets():
    """Return the names of the nets to measure; fail for one that is not known."""
    if net != 'auto':
        names = [part.strip() for part in net.split(',')]
        for name in names:
            check(dict(net=name), net=tuple(NETS))
        return names
    if growth:
        return ['10.65M']
    if quick:
        return ['0.8M', '10.65M']
    return ['0.8M', '10.65M', '124M']


def check_share(name, value):
    """Fail for a knob that is neither 'auto' nor a share of dropout."""
    is_share = type(value) in (int, float) and 0 <= value < 1
    if value != 'auto' and not is_share:
        fail(f'{name}={value!r}: allowed are auto, and numbers from 0 to below 1; '
             f'type --{name}=auto')


def check_plot():
    """Fail where the picture could not be drawn, before minutes of measuring."""
    if not plot:
        return
    folder = os.path.dirname(os.path.abspath(plot))
    writable = os.access(folder, os.W_OK) and not os.path.isdir(plot)
    if not (growth and plot.endswith('.png') and writable):
        fail(f'plot={plot!r}: allowed is the name of a .png that can be written, with --growth; '
             f'type --growth --plot=growth.png')


def usual_shape(name):
    """Return a net with the batch and the context that it is usually trained on."""
    config = GPTConfig(**NETS[name])
    share = 0.2 if name == '10.65M' else 0.0   # in nanoGPT's configs
    if dropout != 'auto':
        share = float(dropout)
    peer_share = share if peer_dropout == 'auto' else float(peer_dropout)
    vocab_size = config.vocab_size
    if name == '124M':   # padded to a multiple of 64, as train.py and nanoGPT do
        vocab_size = 50304
    batch_size = GPU_BATCH[name] if ON_GPU else CPU_BATCH[name]
    return Shape(net=name, n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd,
                 vocab_size=vocab_size, batch_size=batch_size, block_size=config.block_size,
                 dropout=share, peer_dropout=peer_share)


def typed_shapes(name, batches, contexts):
    """Return a net's shapes with each batch and context; the usual ones for empty lists."""
    usual = usual_shape(name)
    shapes = []
    for B in batches or [usual.batch_size]:
        for T in contexts or [usual.block_size]:
            shapes.append(replace(usual, batch_size=B, block_size=T))
    return shapes


def growing_shapes(name):
    """Return a net's shapes as one thing grows at a time: context, batch, depth.

    As the context grows, the tokens of a step stay 4,096 and only the attention's work grows."""
    usual = usual_shape(name)
    most = 2 if quick else 6   # measurements of each
    shapes = []
    for T in (256, 512, 1024, 2048, 4096)[:most]:
        shapes.append(replace(usual, block_size=T, batch_size=4096 // T, growth='context'))
    for B in (1, 2, 4, 8, 16, 32)[:most]:
        shapes.append(replace(usual, batch_size=B, growth='batch'))
    for n in (1, 2, 4, 8, 12)[:most]:
        shapes.append(replace(usual, n_layer=n, growth='n_layer'))
    return shapes


# ---- training: measuring it ----------------------------------------------------------------------

@dataclass
class StepProcess:
    """A process of bench_step.py, and what it has answered."""
    contender: Contender
    process: subprocess.Popen
    errors: Any                                # a file: the process's stderr
    facts: dict = field(default_factory=dict)  # precision, seconds of the first steps, and more
    runs: list = field(default_factory=list)   # figures, one dict a run
    profile: dict = field(default_factory=dict)


def start(contender, shape):
    """Start a process that trains a contender's model when asked."""
    who = contender.who
    if contender.folder:
        who += ':' + contender.folder
    flags = dict(who=who, n_layer=shape.n_layer, n_head=shape.n_head, n_embd=shape.n_embd,
                 vocab_size=shape.vocab_size, block_size=shape.block_size,
                 batch_size=shape.batch_size, dropout=shape.dropout_of(contender),
                 seed=seed, device=device, dtype=contender.precision)
    if contender.who == 'ours':
        flags.update(optimizer=optimizer, compile=compile)
    command = [sys.executable, STEP_SCRIPT]
    for name, value in flags.items():
        command.append(f'--{name}={value}')
    errors = tempfile.TemporaryFile()
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=errors, text=True)
    return StepProcess(contender, process, errors)


def ask(child, order):
    """Send a process a number of steps, or 'profile'; return its answer."""
    with contextlib.suppress(BrokenPipeError):   # the process has ended: hear says how
        child.process.stdin.write(f'{order}\n')
        child.process.stdin.flush()
    return hear(child)


def hear(child):
    """Return a process's next answer; fail where the process has ended, with its own error."""
    line = child.process.stdout.readline()
    if line:
        return loads(line)
    child.errors.seek(0)
    lines = child.errors.read().decode('utf-8', 'replace').strip().splitlines()
    for line in lines:
        if line.startswith('error: '):
            fail(line.removeprefix('error: '))
    last = lines[-1][:300] if lines else 'it ended without a word'
    fail(f'a measured process ended with exit code {child.process.wait()}: {last}; '
         f'where memory is short, type a smaller --batch, --context or --net')


def end(processes):
    """End processes: one whose stdin is closed has nothing more to do."""
    for child in processes:
        with contextlib.suppress(BrokenPipeError):
            child.process.stdin.close()
    for child in processes:
        try:
            child.process.wait(60)
        except subprocess.TimeoutExpired:
            child.process.kill()
        child.process.stdout.close()
        child.errors.close()


def bench_training(plan):
    """Measure all shapes, show each figure when it is there; return the rows."""
    show(f'{"net":7} {"":12} {"":9} batch context layers dropout   ms/step     tok/s x nano      '
         f'MB    GFLOP/s  of GEMM  loader compile s')
    rows = []
    for shape in plan.shapes:
        for row in measure_training(plan.contenders, shape):
            rows.append(row)
            show(training_line(row))
            show_shares('step', row.get('parts'))
            show_shares('forward and backward', row.get('kinds'))
    return rows


def measure_training(contenders, shape):
    """Return a row for each contender. They take turns, each in a process of its own."""
    processes = []
    try:
        for contender in contenders:
            processes.append(start(contender, shape))
            processes[-1].facts = hear(processes[-1])
        for _ in range(1 if quick else runs):
            for child in processes:
                steps = max(1, round(RUN_SECONDS / child.facts['step_s']))
                child.runs.append(ask(child, steps))
        for child in processes:
            if profile and child.contender.who == 'ours':
                child.profile = ask(child, 'profile')
    finally:
        end(processes)
    rows = [training_row(child, shape) for child in processes]
    theirs = [row for row in rows if row['who'] == 'nanogpt']
    if theirs:
        for row in rows:
            row['times_nanogpt'] = row['tok_per_s'] / theirs[0]['tok_per_s']
    return rows


# ---- training: from times to a row ---------------------------------------------------------------

def training_row(child, shape):
    """Return the figures of one measurement."""
    steps = sorted(run['seconds'] / run['steps'] for run in child.runs)   # seconds, one a run
    step = statistics.median(steps)
    count = shape.batch_size * shape.block_size   # tokens in a step
    row = dict(what='train', who=child.contender.who, precision=child.facts['precision'],
               batch=shape.batch_size, context=shape.block_size,
               dropout=shape.dropout_of(child.contender), n_layer=shape.n_layer,
               tok_per_s=count / step, tok_per_s_min=count / steps[-1],
               tok_per_s_max=count / steps[0], step_ms=1e3 * step,
               compiled=child.facts['compiled'], first_step_s=child.facts['first_s'],
               # of the first run: later peaks include the products that were timed in between
               peak_memory_mb=child.runs[0]['memory'], net=shape.net)
    if shape.growth:
        row['growth'] = shape.growth
    if child.contender.who == 'ours':
        row.update(shares_of_the_machine(child, row['tok_per_s']))
        row.update(shares_of_the_step(child, step))
    return row


def shares_of_the_machine(child, tokens_a_second):
    """Return the FLOP/s of our step beside the machine's. GPUs with a known peak have an MFU."""
    rate = tokens_a_second * child.facts['flops_per_token']
    gemm = statistics.median(run['gemm'] for run in child.runs)
    figures = dict(optimizer=optimizer, parameters=child.facts['parameters'],
                   gflop_per_s=rate / 1e9, gemm_gflop_per_s=gemm / 1e9,
                   share_of_gemm=rate / gemm)
    peak = runtime.peak_flops(device)
    if peak:
        figures['mfu'] = rate / peak
    return figures


def shares_of_the_step(child, step):
    """Return where the time of our step goes. step: seconds of a whole one.

    The time of compiling is the difference between the first step and the second."""
    loader = statistics.median(run['parts']['loader'] / run['seconds'] for run in child.runs)
    figures = dict(loader_ms=1e3 * loader * step, loader_share=loader, compile_s=0.0)
    if child.facts['compiled']:
        figures['compile_s'] = max(0.0, child.facts['first_s'] - child.facts['step_s'])
    if child.profile:
        parts = child.profile['parts'].items()
        figures['parts'] = {part: taken / child.profile['seconds'] for part, taken in parts}
        figures['kinds'] = child.profile['kinds']
    return figures


def training_line(row):
    """Return a row of the table. Columns that peers do not have stay empty."""
    ratio = '-'
    if 'times_nanogpt' in row:
        ratio = f'{row["times_nanogpt"]:.2f}'
    own = ''
    if row['who'] == 'ours':
        own = (f' {row["gflop_per_s"]:9,.0f} {100 * row["share_of_gemm"]:6.0f} % '
               f'{100 * row["loader_share"]:6.2f} % {row["compile_s"]:6.1f}')
    return (f'{row["net"]:7} {row["who"]:12} {row["precision"]:9} {row["batch"]:5} '
            f'{row["context"]:7} {row["n_layer"]:6} {row["dropout"]:7} {row["step_ms"]:9.1f} '
            f'{row["tok_per_s"]:9,.0f} {ratio:>6} {row["peak_memory_mb"]:7,.0f}{own}')


def show_shares(title, shares):
    """Print shares of a step's time, where --profile has measured them."""
    if shares:
        words = ', '.join(f'{part} {100 * share:.1f} %' for part, share in shares.items())
        show(f'        {title}: {words}')


# ---- the report ----------------------------------------------------------------------------------

def machine(rows):
    """Return the machine's facts, and the best rates of memory and of products in the rows."""
    found = dict(device=device, processor=platform.processor() or platform.machine(),
                 system=platform.system(), threads=torch.get_num_threads(),
                 bf16=runtime.cpu_has_bf16())
    for rate in ('read_gb_per_s', 'gemm_gflop_per_s'):
        measured = [row[rate] for row in rows if rate in row]
        if measured:
            found[rate] = max(measured)
    return found


def versions(plan):
    found = dict(python=platform.python_version(), torch=torch.__version__)
    if any(contender.who == 'transformers' for contender in plan.contenders):
        import transformers  # here: only this peer needs it
        found['transformers'] = transformers.__version__
    return found


# ---- the story -----------------------------------------------------------------------------------

signal.signal(signal.SIGINT, signal.SIG_DFL)   # Ctrl-C ends this process and the measured ones
check(knobs, what=('sample', 'train'), tokens=2, runs=1, seed=0)
runtime.check_json(json)
if what == 'train':
    plan = plan_training()
    rows = bench_training(plan)
    if plot:
        plots.growth(rows, plot)
else:
    plan = plan_sampling()
    rows = bench_sampling(plan)
runtime.write_json(json, dict(
    rows=rows, left_out=plan.left_out, machine=machine(rows), versions=versions(plan),
    command=' '.join(['python', *sys.argv])))
