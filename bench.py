"""
How fast it is, beside how fast the memory lets it be and how fast others are, in one run.

    python bench.py sample                                             # GPT-2's shape, random weights
    python bench.py sample --net=10.65M --batch=1 --context=16,200     # nanoGPT's net for characters
    python bench.py sample --batch=1 --peer=transformers,nanogpt:PATH  # theirs and ours in turns; PATH: a clone of nanoGPT
    python bench.py sample --json=-                                    # rows, machine and versions instead of a table

Writes a table, or JSON, to stdout; reads nothing but the peers.
"""
import contextlib
import functools
import importlib.util
import os
import platform
import statistics
import sys
import time

import torch

import decoding
import runtime
from configurator import configure, fail
from model import GPT, GPTConfig, chances
from runtime import say

what = 'sample'          # the benchmark; may be typed first, without --what=
net = '124M'             # '124M', GPT-2's; '10.65M' and '0.8M', nanoGPT's for characters
batch = '1,8,64'         # texts at a time, one or several numbers
context = '16,256,1000'  # tokens before the first one that is timed, one or several numbers
tokens = 40              # tokens to time in a run, each on its own
runs = 3                 # runs of each measurement, in turns: the table has their median, JSON their range too
peer = ''                # 'transformers', 'nanogpt:PATH', or both with a comma; measured at batch 1
json = ''                # write rows, machine and versions into this file, - for stdout instead of the table
seed = 1337              # of weights, prompts and draws
device = 'auto'          # 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'auto'           # of the weights, one or several of float32,bfloat16,int8; 'auto': all of them
compile = 'auto'         # compile the steps of a single text, as sample.py --compile; 'auto': on a processor
if sys.argv[1:2] and not sys.argv[1].startswith('-') and not sys.argv[1].endswith('.py'):
    sys.argv[1] = f'--what={sys.argv[1]}'
configure(globals(), runtime.find_device)

NETS = {'124M': {}, '10.65M': dict(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=65),
        '0.8M': dict(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=65)}


def one_of(name, value, allowed):
    if value not in allowed:
        fail(f'{name}={value!r}: allowed are {", ".join(allowed)}; type --{name}={allowed[0]}')


def numbers(name, value, most=1 << 20):
    """'1,8,64' -> [1, 8, 64]"""
    parts = [part.strip() for part in str(value).split(',')]
    if not all(part.isdecimal() and 1 <= int(part) <= most for part in parts):
        fail(f'{name}={value!r}: allowed are whole numbers from 1 to {most:,}, with commas between; type --{name}=16')
    return [int(part) for part in parts]


one_of('what', what, ('sample',))
one_of('net', net, tuple(NETS))
dtypes = ['float32', 'bfloat16', 'int8'] if dtype == 'auto' else dtype.split(',')
for part in dtypes:
    one_of('dtype', part, ('float32', 'bfloat16', 'int8'))
peers = peer.split(',') if peer else []
for part in peers:
    if part != 'transformers' and not (part.startswith('nanogpt:') and os.path.isfile(os.path.join(part[8:], 'model.py'))
                                       and part[8:]):
        fail(f'peer={part!r}: allowed are transformers, and nanogpt:PATH with the folder of nanoGPT\'s model.py; type '
             f'--peer=transformers')
for name, value, least in (('tokens', tokens, 2), ('runs', runs, 1)):
    if value < least:
        fail(f'{name}={value}: it must be {least} or more; type --{name}={least + 2}')
config, batches, contexts = GPTConfig(**NETS[net]), numbers('batch', batch, 4096), numbers('context', context)
if tokens >= config.block_size:
    fail(f'tokens={tokens}: the {net} net has block_size={config.block_size}; type --tokens={config.block_size // 2}')
if context == '16,256,1000':   # as far as this net sees
    contexts = sorted({min(T, config.block_size - tokens) for T in contexts})
if max(contexts) + tokens > config.block_size:
    fail(f'context={context} and tokens={tokens} do not fit block_size={config.block_size} of the {net} net; type '
         f'--context={config.block_size - tokens}')
runtime.check_json(json)


def wait():
    if device.startswith('cuda'):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def read_rate():
    """What this machine reads from memory now, bytes/s: the sum of 256 MB, best of 5."""
    much, rates = torch.ones(1 << 26, device=device), []
    for _ in range(5):
        started = wait()
        much.sum()
        rates.append(4 * much.numel() / (wait() - started))
    return max(rates)


# ---- who is measured: functions (prompt (1, T), texts, tokens) -> seconds of each token, the prompt's in the first ---------

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
    try:
        from transformers import GPT2Config, GPT2LMHeadModel  # here: only this peer needs it
    except ImportError:
        fail('peer=transformers needs the package transformers; type pip install -r requirements-dev.txt')
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(
        n_positions=config.block_size, vocab_size=config.vocab_size, n_layer=config.n_layer, n_head=config.n_head,
        n_embd=config.n_embd, bos_token_id=None, eos_token_id=None)).eval().to(device, getattr(torch, precision))

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
    try:
        spec = importlib.util.spec_from_file_location('nanogpt', os.path.join(path, 'model.py'))
        theirs = importlib.util.module_from_spec(spec)
        sys.modules['nanogpt'] = theirs   # which its dataclass looks up
        spec.loader.exec_module(theirs)
        torch.manual_seed(seed)
        with contextlib.redirect_stdout(sys.stderr):
            model = theirs.GPT(theirs.GPTConfig(config.block_size, config.vocab_size, config.n_layer, config.n_head,
                                                config.n_embd, 0.0, True)).eval().to(device)
    except Exception as error:   # it is whatever a file holds
        fail(f'peer=nanogpt:{path}: its model.py is not nanoGPT\'s ({type(error).__name__}: {error}); type --peer=nanogpt:PATH')

    def timed(idx, texts, count):
        idx, seconds, begun = idx.expand(texts, -1), [], wait()
        while len(seconds) < count and (len(seconds) < 4 or wait() - begun < 10):   # every token costs it the same
            started = wait()
            idx = model.generate(idx, 1)
            seconds.append(wait() - started)
        return seconds
    return timed


_, compile = runtime.set_up(device, 'float32', compile, pays=device == 'cpu')
others = []
for name in peers:
    if name == 'transformers':
        others += [('transformers', precision, transformers_peer(precision)) for precision in ('float32', 'bfloat16')]
    else:
        others.append(('nanogpt', 'float32', nanogpt_peer(name[8:])))
measured = [('ours', precision, ours(precision)) for precision in dtypes] + others

rows, show = [], functools.partial(print, flush=True) if json != '-' else say
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
                row = dict(what='sample', who=who, net=net, precision=precision, batch=texts, context=T, tok_per_s=texts / step,
                           tok_per_s_min=texts / steps[-1], tok_per_s_max=texts / steps[0], step_ms=1e3 * step,
                           first_token_ms=1e3 * statistics.median(run[0] for run in taken[1:]), compiled=False)
                if who == 'ours':
                    kv = 2 * config.n_layer * config.n_embd * (T + tokens / 2)   # numbers a text keeps, on a processor in fp32
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
               threads=torch.get_num_threads(), bf16=runtime.cpu_has_bf16(),
               read_gb_per_s=max(row.get('read_gb_per_s', 0) for row in rows))
versions = dict(python=platform.python_version(), torch=torch.__version__)
if 'transformers' in peers:
    versions['transformers'] = sys.modules['transformers'].__version__
runtime.write_json(json, dict(rows=rows, machine=machine, versions=versions, command=' '.join(['python', *sys.argv])))
