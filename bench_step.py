"""
One training step, again and again: what `bench.py train` measures, each contender in a process of its own, so that its memory
and torch's switches are its own.

    echo 10 | python bench_step.py --n_layer=6 --n_head=6 --n_embd=384 --block_size=256 --vocab_size=65 --batch_size=16

Reads numbers of steps from stdin, one a line ('profile' for where the time of three goes); writes a JSON line to stdout for
each, after a first one that says what is measured. Peers get random tokens, ours a file of them through train.py's loader.
"""
import functools
import json
import os
import signal
import sys
import tempfile
import time

import lib.threads  # noqa: F401  # before torch

import torch

from lib import fast, peers, runtime
from lib.configurator import check, configure
from lib.console import fail
from lib.data import Dataset, TrainingWindows
from lib.optimizers import Optimizers, TrainingStep
from lib.tokenizers import ByteTokenizer
from model import GPT, GPTConfig

who = 'ours'           # 'ours', 'transformers', or 'nanogpt:PATH' with the folder of its model.py
n_layer = 12           # blocks
n_head = 12            # attention heads in a block
n_embd = 768           # width
block_size = 1024      # tokens of a sequence
vocab_size = 50304     # GPT-2's, padded as both train.py and nanoGPT do
batch_size = 1         # sequences in a step
dropout = 0.0          # share of activations dropped
bias = False           # biases in linears and norms, as in nanoGPT's configs; transformers always has them
optimizer = 'adamw'    # ours: 'adamw' or 'muon'
seed = 1337            # of weights, tokens and dropout
device = 'auto'        # 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'auto'         # 'float32', 'bfloat16', or on a GPU 'float16'; nanoGPT has its own way
compile = 'auto'       # ours: as train.py; nanoGPT compiles on a GPU, as shipped
knobs, _ = configure(globals(), runtime.find_device)
signal.signal(signal.SIGINT, signal.SIG_DFL)   # Ctrl-C ends it, and whoever started it says so
wait = functools.partial(runtime.wait, device)
answers = os.fdopen(os.dup(1), 'w', encoding='utf-8')
os.dup2(2, 1)   # whatever a peer prints goes to stderr

check(knobs, optimizer=('adamw', 'muon'), batch_size=1, seed=0)
if who not in ('ours', 'transformers') and not (who[:8] == 'nanogpt:' and who[8:]):
    fail(f'who={who!r}: allowed are ours, transformers, nanogpt:PATH; type --who=ours')
try:
    GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias)
except ValueError as error:
    fail(str(error))

KINDS = dict(attention=('scaled_dot', 'bmm', 'softmax', 'triu', 'baddbmm'), products=('mm', 'linear'),
             norms=('layer_norm', 'rms_norm'), activation=('gelu', 'relu', 'pow'),
             dropout=('bernoulli', 'random_', 'aten::ge', 'dropout'),
             loss=('log_softmax', 'nll_loss', 'logsumexp', 'exp_', 'gather', 'scatter'),
             copies=('copy', 'cat', 'clone', 'fill', 'zero', 'empty'), sums=('add', 'mul', 'div', 'sum', 'sub'))


def gemm_rate(n):
    """Return the FLOP/s of the fastest of up to eight products of n x n matrices in this precision, for half a second."""
    a, best, begun = torch.randn(n, n, device=device).to(getattr(torch, dtype)), 0.0, wait()
    for _ in range(8):
        started = wait()
        a @ a
        best = max(best, 2 * n**3 / (wait() - started))
        if wait() - begun > 0.5:
            break
    return best


# ---- who is measured: the model, loss(x, y), optimizers, and a loader (step) -> x, y (B, T) ------------------------------

parameters = 0
windows = None
random_tokens = torch.Generator().manual_seed(seed)
torch.manual_seed(seed)
if who == 'ours':
    dtype, compile = runtime.set_up(device, dtype, compile)
    # GELU is nanoGPT's, so that both compute the same
    model = GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias, activation='gelu_erf')).to(device)
    parameters, flops_per_token = model.num_params(), model.flops_per_token()
    if device == 'cpu':
        fast.use_on_processor(model)
    loss_of = fast.TrainingLoss(model)
    if compile:
        loss_of = torch.compile(loss_of)
    optimizers = Optimizers(model, optimizer, (1e-3, 0.02), 0.1, (0.9, 0.99))
    folder = tempfile.TemporaryDirectory()
    tokens = torch.randint(min(vocab_size, 256), (max(1_000_000, 8 * batch_size * block_size),), generator=random_tokens)
    os.makedirs(os.path.join(folder.name, 'random'))
    tokens.numpy().astype('<u2').tofile(os.path.join(folder.name, 'random', 'train.bin'))
    with open(os.path.join(folder.name, 'random', 'meta.json'), 'w', encoding='utf-8') as f:
        json.dump(dict(tokenizer=ByteTokenizer().state(), dtype='uint16', splits={}, source={}), f)
    windows = TrainingWindows(Dataset('random', folder.name), 'train', block_size, seed)
elif who == 'transformers':
    model = peers.transformers_gpt2(block_size, vocab_size, n_layer, n_head, n_embd, dropout).to(device).train()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)   # its Trainer's
    dtype, compile = 'bfloat16' if dtype == 'bfloat16' else 'float32', False

    def loss_of(x, y):
        return model(input_ids=x, labels=x, use_cache=False).loss   # shifts the labels itself
else:
    path, dtype, compile = who.partition(':')[2], 'float32', device.startswith('cuda')
    model = peers.nanogpt(path, block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias).to(device)
    adamw = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), device.partition(':')[0])
    if device.startswith('cuda'):   # as its train.py does
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        dtype = 'bfloat16'
    trained = torch.compile(model) if compile else model

    def loss_of(x, y):
        return trained(x, y)[1]


scaler = torch.amp.GradScaler(device.partition(':')[0], enabled=dtype == 'float16')


def load(step):
    if windows:
        return windows.batch(step * batch_size, batch_size)
    idx = torch.randint(vocab_size, (batch_size, block_size + 1), generator=random_tokens)
    return idx[:, :-1].contiguous(), idx[:, 1:].contiguous()


def peers_step(batches):
    """One optimizer step as the peers' own training loops make it, with ours' calls of the clock."""
    x, y = batches[0]
    with runtime.autocast(device, dtype):   # for transformers, as its Trainer with bf16=True
        loss = loss_of(x, y)
    clock('forward')
    scaler.scale(loss).backward()
    clock('backward')
    scaler.unscale_(adamw)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(adamw)
    scaler.update()
    model.zero_grad(set_to_none=True)
    clock('update')


def clock(part):
    """Note that a part of the step has ended."""
    marks.append((part, now()))


def train(step):
    """Load a batch and make one optimizer step; the clock is called after each part."""
    x, y = load(step)
    clock('loader')
    if device.startswith('cuda'):
        x, y = (t.pin_memory().to(device, non_blocking=True) for t in (x, y))
    torch.manual_seed(seed + step)
    step_once([(x.to(device), y.to(device))])


def kinds(steps):
    """{kind of operation: share} of forward and backward passes, by the profiler's own times."""
    with torch.profiler.profile() as profiler:
        for step in range(steps):
            with runtime.autocast(device, dtype):
                loss = loss_of(*(t.to(device) for t in load(step)))
            loss.backward()
        wait()
    model.zero_grad(set_to_none=True)
    spent = dict.fromkeys((*KINDS, 'others'), 0.0)
    for event in profiler.key_averages():
        kind = next((kind for kind, names in KINDS.items() if any(name in event.key for name in names)), 'others')
        spent[kind] += event.self_device_time_total if device.startswith('cuda') else event.self_cpu_time_total
    return {kind: time / sum(spent.values()) for kind, time in spent.items()}


def answer(**figures):
    print(json.dumps(figures), file=answers, flush=True)


step_once = peers_step
if who == 'ours':
    step_once = TrainingStep(model, loss_of, optimizers, scaler, 1.0, device, dtype, clock)
marks = []   # (part, when it ended)
now = time.perf_counter
begun = wait()
train(0)
first = wait() - begun
begun = wait()
train(1)
answer(first_s=first, step_s=wait() - begun, precision=dtype, compiled=compile, parameters=parameters,
       flops_per_token=flops_per_token if who == 'ours' else 0)
done = 2
for line in sys.stdin:
    profiled, spent = line.strip() == 'profile', dict(loader=0.0, forward=0.0, backward=0.0, update=0.0)
    now = wait if profiled else time.perf_counter   # a GPU is waited for after each part only where they are asked for
    if not profiled and not (line.strip().isdecimal() and int(line) > 0):
        fail(f"{line.strip()!r} on stdin: allowed are numbers of steps, one a line, and 'profile'; type echo 10 | "
             f"python bench_step.py")
    steps = 3 if profiled else int(line)
    begun = wait()
    for _ in range(steps):
        marks[:] = [('', now())]
        train(done)
        done += 1
        for (_, before), (part, after) in zip(marks, marks[1:]):
            spent[part] += after - before
    seconds = wait() - begun
    memory = runtime.peak_memory(device)
    gemm = gemm_rate(8192 if device.startswith('cuda') else 2048) if who == 'ours' else 0.0
    answer(seconds=seconds, steps=steps, parts=spent, memory=memory, gemm=gemm, kinds=kinds(3) if profiled else {})
