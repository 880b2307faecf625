"""
Train one model for some steps and time them: the process that `bench.py train` starts for each
contender, so that memory and torch's switches are the contender's own.

    echo 10 | python bench_step.py --n_layer=6 --n_head=6 --n_embd=384 --block_size=256 \
--vocab_size=65 --batch_size=16

Reads orders from stdin, one a line: a number of steps, or 'profile' for where the time of three
steps goes. Writes a line of JSON to stdout for each order, and before them one about the contender.
Peers train on random tokens in memory, ours on a file of them, read by train.py's loader.
"""
import json
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import lib.early  # noqa: F401  # before NumPy and torch

import torch
from torch import nn

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
bias = False           # biases in linears and norms; transformers always has them
optimizer = 'adamw'    # ours: 'adamw' or 'muon'
seed = 1337            # seed of weights, tokens and dropout
device = 'auto'        # 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'auto'         # 'float32', 'bfloat16', or on a GPU 'float16'; nanoGPT has its own way
compile = 'auto'       # ours: as train.py; nanoGPT compiles on a GPU, as shipped
knobs, _ = configure(globals(), runtime.find_device)

PARTS = ('loader', 'forward', 'backward', 'update')   # parts of a step, in their order
PROFILED_STEPS = 3
ON_GPU = device.startswith('cuda')
# Kinds of operations, each with parts of torch's names for them. The first kind that fits counts:
# attention comes before the products, as 'bmm' contains 'mm'.
KINDS = {
    'attention': ('scaled_dot', 'bmm', 'softmax', 'triu', 'baddbmm', 'flash', 'fmha', 'cudnn'),
    'products': ('mm', 'linear', 'nvjet', 'cutlass'),
    'norms': ('layer_norm', 'rms_norm'),
    'activation': ('gelu', 'relu', 'pow'),
    'dropout': ('bernoulli', 'random_', 'aten::ge', 'dropout'),
    'loss': ('log_softmax', 'nll_loss', 'logsumexp', 'exp_', 'gather', 'scatter'),
    'copies': ('copy', 'cat', 'clone', 'fill', 'zero', 'empty'),
    'sums': ('add', 'mul', 'div', 'sum', 'sub'),
}


def check_knobs():
    """Return the GPTConfig of the model to train; fail for a knob that is not allowed."""
    check(knobs, optimizer=('adamw', 'muon'), batch_size=1, seed=0)
    is_nanogpt = who.startswith('nanogpt:') and who != 'nanogpt:'
    if who not in ('ours', 'transformers') and not is_nanogpt:
        fail(f'who={who!r}: allowed are ours, transformers, nanogpt:PATH; type --who=ours')
    try:
        # GELU in its exact form is nanoGPT's, so that both compute the same
        return GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias,
                         activation='gelu_erf')
    except ValueError as error:
        fail(str(error))


# ---- clocks --------------------------------------------------------------------------------------

def wait():
    """Return the time in seconds, once the device has done all that it was given."""
    return runtime.wait(device)


class Clock:
    """Sums up the seconds that the parts of some steps take."""

    def __init__(self):
        self.reset(time.perf_counter)

    def reset(self, now):
        """Begin again from zero. now: the function that returns the time in seconds."""
        self.now = now
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.start()

    def start(self):
        """Note that a step begins."""
        self.before = self.now()

    def __call__(self, part):
        """Note that a part of the step has ended."""
        after = self.now()
        self.seconds[part] += after - self.before
        self.before = after


# ---- who is measured -----------------------------------------------------------------------------

@dataclass
class Contender:
    """A model in training."""
    model: nn.Module
    loss_of: Any              # (x, y) -> loss; may be compiled
    optimizer_step: Any       # called with [(x, y)], (B, T) each; calls the clock after each part
    batch_of: Any             # step -> x, y (B, T)
    precision: str            # precision of the matrix products
    compiled: bool
    parameters: int = 0       # ours only
    flops_per_token: int = 0  # ours only
    folder: Any = None        # ours only: a temporary folder, deleted together with this object


def make_contender(config, clock):
    """Return the contender that the knob `who` names."""
    random_tokens = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    if who == 'ours':
        return our_contender(config, clock, random_tokens)
    if who == 'transformers':
        return transformers_contender(config, clock, random_tokens)
    return nanogpt_contender(config, clock, random_tokens)


def our_contender(config, clock, random_tokens):
    """Return our GPT with train.py's loader, loss and optimizer step."""
    precision, compiled = runtime.set_up(device, dtype, compile)
    model = GPT(config).to(device)
    if device == 'cpu':
        fast.use_on_processor(model)
    loss_of = fast.TrainingLoss(model)
    if compiled:
        loss_of = torch.compile(loss_of)
    optimizers = Optimizers(model, optimizer, (1e-3, 0.02), 0.1, (0.9, 0.99))
    scaler = torch.amp.GradScaler(device.partition(':')[0], enabled=precision == 'float16')
    step = TrainingStep(model, loss_of, optimizers, scaler, 1.0, device, precision, clock)
    folder = tempfile.TemporaryDirectory()
    write_random_dataset(folder.name, random_tokens)
    windows = TrainingWindows(Dataset('random', folder.name), 'train', block_size, seed)

    def batch_of(step):
        return windows.batch(step * batch_size, batch_size)
    return Contender(model, loss_of, step, batch_of, precision, compiled, model.num_params(),
                     model.flops_per_token(), folder)


def write_random_dataset(data_dir, random_tokens):
    """Write a dataset named `random`: one file of a million tokens, or more for a large batch."""
    count = max(1_000_000, 8 * batch_size * block_size)
    tokens = torch.randint(min(vocab_size, 256), (count,), generator=random_tokens)
    folder = os.path.join(data_dir, 'random')
    os.makedirs(folder)
    tokens.numpy().astype('<u2').tofile(os.path.join(folder, 'train.bin'))
    meta = dict(tokenizer=ByteTokenizer().state(), dtype='uint16', splits={}, source={})
    with open(os.path.join(folder, 'meta.json'), 'w', encoding='utf-8') as f:
        json.dump(meta, f)


def transformers_contender(config, clock, random_tokens):
    """Return transformers' GPT-2, trained as its Trainer does."""
    model = peers.transformers_gpt2(config).to(device).train()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    precision = 'float32'
    if dtype == 'bfloat16':   # autocast, as the Trainer with bf16=True
        precision = 'bfloat16'

    def loss_of(x, y):
        return model(input_ids=x, labels=x, use_cache=False).loss   # the model shifts the labels
    step = peer_step(model, loss_of, adamw, precision, clock)
    return Contender(model, loss_of, step, random_batches(random_tokens), precision, False)


def nanogpt_contender(config, clock, random_tokens):
    """Return nanoGPT's GPT, trained as its train.py does."""
    model = peers.nanogpt(who.removeprefix('nanogpt:'), config).to(device)
    adamw = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), device.partition(':')[0])
    precision = 'float32'
    trained = model
    if ON_GPU:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        precision = 'bfloat16'
        trained = torch.compile(model)

    def loss_of(x, y):
        _, loss = trained(x, y)
        return loss
    step = peer_step(model, loss_of, adamw, precision, clock)
    return Contender(model, loss_of, step, random_batches(random_tokens), precision, ON_GPU)


def peer_step(model, loss_of, adamw, precision, clock):
    """Return an optimizer step as the peers' own training loops make it."""
    def step(batches):
        x, y = batches[0]
        with runtime.autocast(device, precision):
            loss = loss_of(x, y)
        clock('forward')
        loss.backward()
        clock('backward')
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        model.zero_grad(set_to_none=True)
        clock('update')
    return step


def random_batches(random_tokens):
    """Return a function that draws another batch in each call."""
    def batch_of(step):
        idx = torch.randint(vocab_size, (batch_size, block_size + 1), generator=random_tokens)
        return idx[:, :-1].contiguous(), idx[:, 1:].contiguous()          # (B, T) each
    return batch_of


# ---- what is measured ----------------------------------------------------------------------------

def train(contender, step, clock):
    """Load a batch and make one optimizer step."""
    clock.start()
    x, y = contender.batch_of(step)
    clock('loader')
    if ON_GPU:
        x = x.pin_memory().to(device, non_blocking=True)
        y = y.pin_memory().to(device, non_blocking=True)
    torch.manual_seed(seed + step)
    contender.optimizer_step([(x.to(device), y.to(device))])


def describe(contender, clock):
    """Make the first two steps, numbers 0 and 1; return what bench.py needs to know in advance."""
    begun = wait()
    train(contender, 0, clock)   # compiles and allocates
    first = wait() - begun
    begun = wait()
    train(contender, 1, clock)
    second = wait() - begun
    return dict(first_s=first, step_s=second, precision=contender.precision,
                compiled=contender.compiled, parameters=contender.parameters,
                flops_per_token=contender.flops_per_token)


def measure(contender, first, count, clock, profile):
    """Return the figures of `count` steps, from step number `first` on.

    profile: whether to wait for a GPU after each part of a step, and to sort its operations."""
    if ON_GPU:   # after give_way a step first has to allocate its memory again
        train(contender, first, clock)
    clock.reset(wait if profile else time.perf_counter)
    begun = wait()
    for step in range(first, first + count):
        train(contender, step, clock)
    seconds = wait() - begun
    figures = dict(seconds=seconds, steps=count, parts=clock.seconds,
                   memory=runtime.peak_memory(device), gemm=0.0, kinds={})
    if who == 'ours':
        figures['gemm'] = gemm_rate(8192 if ON_GPU else 2048, contender.precision)
    if profile:
        figures['kinds'] = kinds_of_operations(contender)
    return figures


def give_way():
    """Return a GPU's memory that holds nothing, so that another contender can have its turn.

    Weights and optimizer states stay. torch would keep what a step needs besides."""
    if ON_GPU:
        torch.cuda.empty_cache()


def gemm_rate(n, precision):
    """Return the FLOP/s of products of two n x n matrices.

    The fastest of up to eight counts; it takes about half a second."""
    a = torch.randn(n, n, device=device).to(getattr(torch, precision))
    best = 0.0
    begun = wait()
    for _ in range(8):
        started = wait()
        a @ a
        best = max(best, 2 * n**3 / (wait() - started))
        if wait() - begun > 0.5:
            break
    return best


def kinds_of_operations(contender):
    """Return {kind: share} of the time of some forward and backward passes, by torch's profiler."""
    with torch.profiler.profile() as profiler:
        for step in range(PROFILED_STEPS):
            x, y = contender.batch_of(step)
            with runtime.autocast(device, contender.precision):
                loss = contender.loss_of(x.to(device), y.to(device))
            loss.backward()
        wait()
    contender.model.zero_grad(set_to_none=True)
    spent = dict.fromkeys((*KINDS, 'others'), 0.0)
    for event in profiler.key_averages():
        if not ON_GPU:
            spent[kind_of(event.key)] += event.self_cpu_time_total
        elif event.device_type == torch.autograd.DeviceType.CUDA:
            # A kernel. Its time is also the self_device_time of the operation that launched it.
            spent[kind_of(event.key)] += event.self_device_time_total
    total = sum(spent.values())
    return {kind: part / total for kind, part in spent.items()}


def kind_of(operation):
    """Return the kind of an operation, by torch's name for it."""
    for kind, parts in KINDS.items():
        if any(part in operation for part in parts):
            return kind
    return 'others'


# ---- orders and answers --------------------------------------------------------------------------

def steps_in(order):
    """Return the number of steps that a line of stdin asks for."""
    if order == 'profile':
        return PROFILED_STEPS
    if not order.isdecimal() or int(order) == 0:
        fail(f"{order!r} on stdin: allowed are numbers of steps, one a line, and 'profile'; "
             f"type echo 10 | python bench_step.py")
    return int(order)


def answer(figures):
    print(json.dumps(figures), file=answers, flush=True)


# ---- the story -----------------------------------------------------------------------------------

signal.signal(signal.SIGINT, signal.SIG_DFL)   # Ctrl-C ends this process without a traceback
answers = os.fdopen(os.dup(1), 'w', encoding='utf-8')
os.dup2(2, 1)   # stdout holds answers alone: what a peer prints goes to stderr

config = check_knobs()
clock = Clock()
contender = make_contender(config, clock)
facts = describe(contender, clock)
give_way()
answer(facts)
done = 2   # steps made so far
for line in sys.stdin:
    order = line.strip()
    count = steps_in(order)
    figures = measure(contender, done, count, clock, profile=order == 'profile')
    give_way()
    answer(figures)
    done += count
