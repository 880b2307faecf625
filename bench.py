"""
How fast it is, beside how fast the machine lets it be and how fast others are, in one run.

    python bench.py train                                              # a step of three nets, its share of the GEMM rate
    python bench.py train --peer=transformers,nanogpt:PATH             # theirs and ours in turns; PATH: a clone of nanoGPT
    python bench.py train --net=10.65M --profile                       # where a step's time goes
    python bench.py train --net=10.65M --growth --plot=growth.png      # with context, batch and depth
    python bench.py sample                                             # GPT-2's shape, random weights
    python bench.py sample --net=10.65M --batch=1 --context=16,200     # nanoGPT's net for characters
    python bench.py sample --batch=1 --peer=transformers,nanogpt:PATH
    python bench.py train --json=-                                     # rows, machine and versions instead of a table

Writes a table, or JSON, to stdout; reads nothing but the peers.
"""
import contextlib
import functools
import json as jsons
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile

import lib.threads  # noqa: F401  # before torch

import torch

from lib import decoding, peers, plots, runtime
from lib.configurator import check, configure
from lib.console import fail, say, write
from model import GPT, GPTConfig, chances

what = 'sample'          # the benchmark, 'sample' or 'train'; may be typed first, without --what=
net = 'auto'             # '124M', GPT-2's; '10.65M' and '0.8M', nanoGPT's for characters; train takes several; 'auto': all
batch = ''               # sample: texts at a time; train: sequences a step; one or several numbers; '': usual ones
context = ''             # sample: tokens before the first that is timed; train: of a sequence; '': as far as it sees
tokens = 40              # sample: tokens to time in a run, each on its own
dropout = 'auto'         # train: a share, or 'auto' for nanoGPT's config: 0.2 for the 10.65M net, else 0
peer_dropout = 'auto'    # the same of the peers; 'auto': as ours
optimizer = 'adamw'      # train: ours, 'adamw' as nanoGPT's, or 'muon'
profile = False          # train: show where the time of our step goes
growth = False           # train: our step for contexts of 256 to 4,096, batches of 1 to 32 and 1 to 12 layers of one net
plot = ''                # train --growth: draw it into this .png too
quick = False            # train: two nets, one short run: whether it works, not how fast
runs = 3                 # runs of each measurement, in turns: the table has their median, JSON their range too
peer = ''                # 'transformers', 'nanogpt:PATH', or both with a comma; sample measures them at batch 1
json = ''                # write rows, machine and versions into this file, - for stdout instead of the table
seed = 1337              # of weights, prompts and draws
device = 'auto'          # 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'auto'           # some of float32,bfloat16 and sample's int8 or, on a GPU, train's float16; 'auto': those that pay here
compile = 'auto'         # compile our steps, as train.py or sample.py would
knobs, _ = configure(globals(), runtime.find_device, first='what')
signal.signal(signal.SIGINT, signal.SIG_DFL)   # Ctrl-C ends it; measured processes end with it

NETS = {'124M': {}, '10.65M': dict(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=65),
        '0.8M': dict(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=65)}
AT_ONCE = {'124M': (1, 16), '10.65M': (16, 64), '0.8M': (12, 12)}   # sequences in a step on a processor, and on a GPU


def numbers(name, value, most=1 << 20):
    """'1,8,64' -> [1, 8, 64]"""
    parts = [part.strip() for part in str(value).split(',')]
    if not all(part.isdecimal() and 1 <= int(part) <= most for part in parts):
        fail(f'{name}={value!r}: allowed are whole numbers from 1 to {most:,}, with commas between; type --{name}=16')
    return [int(part) for part in parts]


left_out = []   # precisions that are not measured, since this processor emulates them


def chosen_precisions(usual):
    """Return the precisions typed as --dtype. Without --dtype, return the usual ones but bfloat16 where it is emulated."""
    if dtypes:
        return dtypes
    if device != 'cpu' or runtime.cpu_has_bf16():
        return usual
    left_out.append('bfloat16')
    say('left out: bfloat16, which this processor only emulates, many times slower than float32; '
                'type --dtype=bfloat16 to measure it all the same')
    return [precision for precision in usual if precision != 'bfloat16']


check(knobs, what=('sample', 'train'))
dtypes = [] if dtype == 'auto' else dtype.split(',')
for part in dtypes:
    check(dict(dtype=part), dtype=('float32', 'bfloat16', 'int8' if what == 'sample' else 'float16'))
    if part != 'int8':
        runtime.find_dtype(part, device)   # which refuses fp16 on a processor
others = []   # the peers to measure
for part in filter(None, peer.split(',')):
    name, _, clone = part.partition(':')
    clone = os.path.expanduser(clone)
    known = part == 'transformers' or name == 'nanogpt' and clone and os.path.isfile(os.path.join(clone, 'model.py'))
    if not known:
        fail(f'peer={part!r}: allowed are transformers, and nanogpt:PATH with the folder of nanoGPT\'s model.py; type '
             f'--peer=transformers')
    others.append(f'nanogpt:{clone}' if clone else name)
check(knobs, tokens=2, runs=1, seed=0)
runtime.check_json(json)
wait = functools.partial(runtime.wait, device)


# ---- sampling ------------------------------------------------------------------------------------------------------

def read_rate():
    """What this machine reads from memory now, bytes/s: the sum of 256 MB, best of 5."""
    much, rates = torch.ones(1 << 26, device=device), []
    for _ in range(5):
        started = wait()
        much.sum()
        rates.append(4 * much.numel() / (wait() - started))
    return max(rates)


# who is measured: functions (prompt (1, T), texts, tokens) -> seconds of each token, the prompt's in the first

def ours(precision):
    torch.manual_seed(seed)
    model = GPT(config).eval().to(device)
    if precision == 'int8':   # beside what sample.py would take
        decoding.narrow(model, runtime.find_dtype('auto', device), 'int8')
    else:
        decoding.narrow(model, precision)
    if compile:
        decoding.compile_steps(model)
    stream = functools.partial(decoding.graph_stream, model) if device.startswith('cuda') else model.stream

    def timed(idx, texts, count):
        seconds, last = [], wait()
        for _ in stream(idx, count, chance=chances(range(texts), count).to(device)):
            seconds.append(wait() - last)
            last = wait()
        return seconds
    timed.model = model
    return timed


def transformers_peer(precision):
    torch.manual_seed(seed)
    model = peers.transformers_gpt2(config.block_size, config.vocab_size, config.n_layer, config.n_head, config.n_embd,
                                         0.0).eval().to(device, getattr(torch, precision))

    class Clock:   # what generate calls a streamer: put() gets the prompt, then each token
        def __init__(self):
            self.times = []

        def put(self, _):
            self.times.append(wait())

        def end(self):
            pass

    def timed(idx, texts, count):
        clock = Clock()
        model.generate(idx.expand(texts, -1), attention_mask=torch.ones_like(idx).expand(texts, -1), max_new_tokens=count,
                       do_sample=True, top_k=0, pad_token_id=0, streamer=clock)
        return [after - before for before, after in zip(clock.times, clock.times[1:])]
    return timed


def nanogpt_peer(path):
    torch.manual_seed(seed)
    model = peers.nanogpt(path, config.block_size, config.vocab_size, config.n_layer, config.n_head, config.n_embd, 0.0,
                               True).eval().to(device)

    def timed(idx, texts, count):
        idx, seconds, begun = idx.expand(texts, -1), [], wait()
        while len(seconds) < count and (len(seconds) < 4 or wait() - begun < 10):   # every token costs it the same
            started = wait()
            idx = model.generate(idx, 1)
            seconds.append(wait() - started)
        return seconds
    return timed


# ---- training ------------------------------------------------------------------------------------------------------

def start(who, precision, shape, share):
    """A process that trains steps of this shape when asked, see bench_step.py, and what it says of itself."""
    flags = [f'--{key}={value}' for key, value in shape.items()]
    if who == 'ours':
        flags += [f'--optimizer={optimizer}', f'--compile={compile}']
    errors = tempfile.TemporaryFile()
    process = subprocess.Popen(
        [sys.executable, os.path.join(os.path.dirname(os.path.abspath(__file__)), 'bench_step.py'), f'--who={who}', *flags,
         f'--dropout={share}', f'--seed={seed}', f'--device={device}', f'--dtype={precision}'],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)
    process.errors = errors
    try:
        return process, hear(process)
    except BaseException:
        process.kill()
        raise


def ask(process, order):
    """Send a number of steps, or 'profile', and wait for the answer."""
    with contextlib.suppress(BrokenPipeError):   # it has ended: hear says how
        process.stdin.write(f'{order}\n')
        process.stdin.flush()
    return hear(process)


def hear(process):
    line = process.stdout.readline()
    if line:
        return jsons.loads(line)
    process.errors.seek(0)
    lines = process.errors.read().decode('utf-8', 'replace').strip().splitlines() or ['it ended without a word']
    refused = next((line for line in lines if line.startswith('error: ')), None)
    if refused:
        fail(refused.removeprefix('error: '))
    fail(f'a measured process ended with exit code {process.wait()}: {lines[-1][:300]}; where memory is short, type a smaller '
         f'--batch, --context or --net')


def measure(contenders, shape, share, peer_share, **more):
    """Rows of (who, precision) that train one shape in turns; each in its own process, so only one works at a time."""
    started, runs_of, texts, T = [], [], shape['batch_size'], shape['block_size']
    try:
        for who, precision in contenders:
            started.append(start(who, precision, shape, share if who == 'ours' else peer_share))
            runs_of.append([])
        for _ in range(1 if quick else runs):
            for (process, said), answers in zip(started, runs_of):
                seconds = 0.2 if quick else 3.0
                answers.append(ask(process, max(1, round(seconds / said['step_s']))))
        profiles = [ask(process, 'profile') if profile and who == 'ours' else {}
                    for (process, _), (who, _) in zip(started, contenders)]
    finally:
        for process, _ in started:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        for process, _ in started:
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
            process.stdout.close()
            process.errors.close()
    found = []
    for (who, _), (_, said), answers, profiled in zip(contenders, started, runs_of, profiles):
        steps = sorted(answer['seconds'] / answer['steps'] for answer in answers)
        step = statistics.median(steps)
        row = dict(what='train', who=who.partition(':')[0], precision=said['precision'], batch=texts, context=T,
                   dropout=share if who == 'ours' else peer_share, n_layer=shape['n_layer'], tok_per_s=texts * T / step,
                   tok_per_s_min=texts * T / steps[-1], tok_per_s_max=texts * T / steps[0], step_ms=1e3 * step,
                   compiled=said['compiled'], first_step_s=said['first_s'],
                   peak_memory_mb=answers[-1]['memory'], **more)
        if who == 'ours':
            rate, gemm = row['tok_per_s'] * said['flops_per_token'], statistics.median(a['gemm'] for a in answers)
            loader = statistics.median(a['parts']['loader'] / a['seconds'] for a in answers)
            peak = runtime.peak_flops(device)
            row |= dict(optimizer=optimizer, parameters=said['parameters'], gflop_per_s=rate / 1e9, gemm_gflop_per_s=gemm / 1e9,
                        share_of_gemm=rate / gemm, loader_ms=1e3 * loader * step, loader_share=loader,
                        compile_s=max(0.0, said['first_s'] - said['step_s']) if said['compiled'] else 0.0)
            row |= dict(mfu=rate / peak) if peak else {}
            row |= dict(parts={part: t / profiled['seconds'] for part, t in profiled['parts'].items()},
                        kinds=profiled['kinds']) if profiled else {}
        found.append(row)
    base = next((row['tok_per_s'] for row in found if row['who'] == 'nanogpt'), None)
    for row in found:
        if base:
            row['times_nanogpt'] = row['tok_per_s'] / base
        rows.append(row)
        ratio = f'{row["times_nanogpt"]:.2f}' if base else '-'
        show(f'{row["net"]:7} {row["who"]:12} {row["precision"]:9} {texts:5} {T:7} {row["n_layer"]:6} {row["dropout"]:7} '
             f'{row["step_ms"]:9.1f} {row["tok_per_s"]:9,.0f} {ratio:>6} {row["peak_memory_mb"]:7,.0f}'
             + (f' {row["gflop_per_s"]:9,.0f} {100 * row["share_of_gemm"]:6.0f} % {100 * row["loader_share"]:6.2f} % '
                f'{row["compile_s"]:6.1f}' if row['who'] == 'ours' else ''))
        for title in ('parts', 'kinds'):
            if title in row:
                show(f'        {"step" if title == "parts" else "forward and backward"}: ' + ', '.join(
                    f'{part} {100 * part_share:.1f} %' for part, part_share in row[title].items()))


def bench_train():
    """Each net's step, ours and the peers' in turns; or ours alone as context, batch and depth grow."""
    names = [part.strip() for part in net.split(',')] if net != 'auto' else (
        ['10.65M'] if growth else ['0.8M', '10.65M'] if quick else ['0.8M', '10.65M', '124M'])
    for name in names:
        check(dict(net=name), net=tuple(NETS))
    check(knobs, optimizer=('adamw', 'muon'))
    for name, value in (('dropout', dropout), ('peer_dropout', peer_dropout)):
        if value != 'auto' and not (type(value) in (int, float) and 0 <= value < 1):
            fail(f'{name}={value!r}: allowed are auto, and numbers from 0 to below 1; type --{name}=auto')
    if plot and not (growth and plot.endswith('.png') and not os.path.isdir(plot)
                     and os.access(os.path.dirname(os.path.abspath(plot)), os.W_OK)):
        fail(f'plot={plot!r}: allowed is the name of a .png that can be written, with --growth; type --growth '
             f'--plot=growth.png')
    if growth and others:
        fail('growth measures ours alone; type --growth without --peer')
    contenders = [('ours', precision) for precision in dtypes or ['auto']]
    for part in others:
        precisions = ['float32']   # nanoGPT has its own way
        if part == 'transformers':
            precisions = chosen_precisions(['float32', 'bfloat16'])
        contenders += [(part, precision) for precision in precisions if precision != 'float16']
    batches = None if not batch else numbers('batch', batch, 4096)
    contexts = None if not context else numbers('context', context)
    show(f'{"net":7} {"":12} {"":9} batch context layers dropout   ms/step     tok/s x nano      MB    GFLOP/s  of GEMM  '
         f'loader compile s')
    for name in names:
        config = GPTConfig(**NETS[name])
        texts, lengths = batches or [AT_ONCE[name][device.startswith('cuda')]], contexts or [config.block_size]
        share = (0.2 if name == '10.65M' else 0.0) if dropout == 'auto' else float(dropout)
        peer_share = share if peer_dropout == 'auto' else float(peer_dropout)
        shape = dict(n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd,
                     vocab_size=50304 if name == '124M' else config.vocab_size, bias=False)
        if not growth:
            for B in texts:
                for T in lengths:
                    measure(contenders, dict(shape, block_size=T, batch_size=B), share, peer_share, net=name)
            continue
        T, B = config.block_size, AT_ONCE[name][device.startswith('cuda')]
        for changes in ([dict(block_size=long, batch_size=max(1, 4096 // long)) for long in (256, 512, 1024, 2048, 4096)],
                        [dict(batch_size=many) for many in (1, 2, 4, 8, 16, 32)],
                        [dict(n_layer=deep) for deep in (1, 2, 4, 8, 12)]):
            what_grows = next(iter(changes[0]))
            for change in changes[:2] if quick else changes:
                measure(contenders, dict(shape, block_size=T, batch_size=B) | change, share, peer_share, net=name,
                        growth=dict(block_size='context', batch_size='batch', n_layer='n_layer')[what_grows])
    if plot:
        plots.growth(rows, plot)


rows = []


def show(line):
    """A line of the table, on stderr where JSON has stdout."""
    if json == '-':
        say(line)
    else:
        write(line + '\n')


if what == 'train':
    bench_train()
else:
    net = '124M' if net == 'auto' else net
    check(dict(net=net), net=tuple(NETS))
    config, batches = GPTConfig(**NETS[net]), numbers('batch', batch or '1,8,64', 4096)
    if tokens >= config.block_size:
        fail(f'tokens={tokens}: the {net} net has block_size={config.block_size}; type --tokens={config.block_size // 2}')
    contexts = numbers('context', context) if context else sorted(
        {min(T, config.block_size - tokens) for T in (16, 256, 1000)})
    if max(contexts) + tokens > config.block_size:
        fail(f'context={context} and tokens={tokens} do not fit block_size={config.block_size} of the {net} net; type '
             f'--context={config.block_size - tokens}')
    _, compile = runtime.set_up(device, 'float32', compile, pays=device == 'cpu')
    precisions = chosen_precisions(['float32', 'bfloat16', 'int8'])
    theirs = [precision for precision in precisions if precision != 'int8'] or ['float32']
    beside = []   # (who, precision, function)
    for name in others:
        if name == 'transformers':
            beside += [('transformers', precision, transformers_peer(precision)) for precision in theirs]
        else:
            beside.append(('nanogpt', 'float32', nanogpt_peer(name[8:])))
    measured = [('ours', precision, ours(precision)) for precision in precisions] + beside

    show(f'{"":14} {"":9} batch context prefill ms  first ms  step ms    tok/s   MB/token  of the read rate')
    with torch.inference_mode():
        for texts in batches:
            for T in contexts:
                prompt = torch.randint(config.vocab_size, (1, T), generator=torch.Generator().manual_seed(seed)).to(device)
                found = [entry for entry in measured if texts == 1 or entry[0] == 'ours']
                seconds, prefills, rates = [[] for _ in found], [[] for _ in found], []
                for run in range(-1, runs):   # the first one warms up: it compiles, allocates, fills caches
                    rates.append(read_rate())   # it drifts with the neighbours of a shared machine: the median counts
                    for (who, _, timed), taken, prefill in zip(found, seconds, prefills):
                        if who == 'ours':
                            started = wait()
                            timed.model.next_logits(prompt)
                            prefill.append(wait() - started)
                        taken.append(timed(prompt, texts, 3 if run < 0 else tokens))
                rate = statistics.median(rates)
                for (who, precision, timed), taken, prefill in zip(found, seconds, prefills):
                    steps = sorted(statistics.median(run[1:]) for run in taken[1:])
                    step = statistics.median(steps)
                    row = dict(what='sample', who=who, net=net, precision=precision, batch=texts, context=T,
                               tok_per_s=texts / step, tok_per_s_min=texts / steps[-1], tok_per_s_max=texts / steps[0],
                               step_ms=1e3 * step,
                               first_token_ms=1e3 * statistics.median(run[0] for run in taken[1:]), compiled=False)
                    if who == 'ours':
                        kv = 2 * config.n_layer * config.n_embd * (T + tokens / 2)   # numbers kept, on a processor in fp32
                        kv *= 4 if device == 'cpu' or precision == 'float32' else 2
                        size = decoding.weight_bytes(timed.model) + texts * kv
                        row |= dict(prefill_ms=1e3 * statistics.median(prefill[1:]), bytes_per_token=size / texts,
                                    share_of_read_rate=size / step / rate, read_gb_per_s=rate / 1e9,
                                    compiled=compile and texts == 1)
                    rows.append(row)
                    prefill_ms = f'{row["prefill_ms"]:.0f}' if who == 'ours' else '-'
                    show(f'{who:14} {precision:9} {texts:5} {T:7} {prefill_ms:>10} {row["first_token_ms"]:9.0f} '
                         f'{row["step_ms"]:8.2f} {row["tok_per_s"]:8.1f}' + (f' {row["bytes_per_token"] / 1e6:10.1f} '
                        f'{100 * row["share_of_read_rate"]:10.0f} %' if who == 'ours' else ''))

machine = dict(device=device, processor=platform.processor() or platform.machine(), system=platform.system(),
               threads=torch.get_num_threads(), bf16=runtime.cpu_has_bf16())
for rate in ('read_gb_per_s', 'gemm_gflop_per_s'):
    machine |= {rate: max(row[rate] for row in rows if rate in row)} if any(rate in row for row in rows) else {}
versions = dict(python=platform.python_version(), torch=torch.__version__)
if 'transformers' in others:
    import transformers
    versions['transformers'] = transformers.__version__
runtime.write_json(json, dict(
    rows=rows, left_out=left_out, machine=machine, versions=versions, command=' '.join(['python', *sys.argv])))
