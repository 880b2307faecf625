"""
How well a model predicts a split: every token of it once, in nats, bits per byte and per character.
With --task, how well it does a published benchmark.

    python evaluate.py                                     # the validation split of the run in out/
    python evaluate.py --stride=16                         # more context for each token
    python evaluate.py --init_from=gpt2 --dataset=shakespeare --json=-
    python evaluate.py --quantize=int8                     # and what int8 weights cost
    python evaluate.py --init_from=gpt2 --task=hellaswag   # the right one of four endings
    python evaluate.py --init_from=gpt2 --task=lambada     # the last word of a text
    torchrun --standalone --nproc_per_node=2 evaluate.py   # the same number, sooner

Reads a checkpoint, or Hugging Face's weights, and data/<dataset>/ or a benchmark's .jsonl, which is
downloaded unless --input names it; writes a table to stdout, or JSON there or into a file.
"""
import contextlib
import math
import os
import signal
import time

import lib.early  # noqa: F401  # before NumPy and torch

import numpy as np
import torch
from tqdm import tqdm

from lib import decoding, runtime, tasks
from lib.configurator import check, configure
from lib.console import fail, say, write
from lib.data import evaluation_batches, first_with, open_first
from lib.evaluation import mean_loss, perplexity
from lib.starting import Symbols, check_symbols, open_model, was_replaced
from lib.tokenizers import token_sizes

init_from = 'resume'     # 'resume': the run in out_dir; else 'gpt2', a hub name, or a folder
out_dir = 'out'          # folder of the run
checkpoint = ''          # a checkpoint file, instead of the one in out_dir
dataset = ''             # folder in data_dir; empty: the one the run was trained on
data_dir = 'data'        # where datasets live; if not typed, the run's own is tried first
split = 'val'            # 'val', 'train', or 'test' where there is one
stride = None            # tokens from window to window; None: block_size; fewer take longer
batch_size = 16          # windows at a time; changes the speed and not the result
task = ''                # 'hellaswag' or 'lambada': score a benchmark's items instead of a split
input = ''               # the task's items, a .jsonl; empty: the published file, downloaded
limit = 0                # items of the task, its first ones; 0: all
json = ''                # write the figures into this file; -: to stdout instead of the table
backend = 'auto'         # torchrun's: 'nccl' on GPUs, 'gloo' elsewhere
device = 'auto'          # 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'auto'           # 'float32', 'bfloat16', 'float16'; 'auto' is float32 for an exact figure
quantize = ''            # 'int8': the loss with a byte a weight, and in nats_lost what that costs
compile = 'auto'         # torch.compile; a task, with windows of many lengths, does without
knobs, given = configure(globals(), runtime.find_device)
signal.signal(signal.SIGINT, signal.SIG_DFL)   # Ctrl-C just ends it

COUNTED_AT_ONCE = 1 << 24   # tokens of a file that are in memory at a time


def check_task():
    """Fail for knobs that have no meaning together."""
    if task:
        without = [key for key in ('split', 'stride', 'dataset', 'quantize') if key in given]
        if without:
            fail(f'--task={task} and --{without[0]} do not go together: a task has its own items; '
                 f'type --task={task} without --{without[0]}')
    elif input or limit:
        fail(f"input={input!r}, limit={limit}: both are a task's; "
             f'type --task=hellaswag or --task=lambada with them')


def check_stride(block_size):
    """Fail for a stride that would leave tokens out."""
    if stride is None or type(stride) is int and 1 <= stride <= block_size:
        return
    fail(f'stride={stride!r}: allowed are None and whole numbers from 1 to '
         f'block_size={block_size}; type --stride={block_size // 2 or 1}')


def open_data(opened):
    """Return the dataset to evaluate on; fail where it or its split cannot be found."""
    name = dataset or opened.dataset
    if not name:
        fail(f'{opened.where} does not say which dataset it is of; type --dataset=NAME')
    found = {}   # split: the data_dir that has it
    for each in ('val', 'train', 'test'):
        data_dir = first_with(name, opened.data_dirs, each)
        if data_dir is not None:
            found[each] = data_dir
    if found and split not in found:
        other = next(iter(found))
        fail(f'{os.path.join(found[other], name)} has no {split}.bin; it has {", ".join(found)}; '
             f'type --split={other}')
    data = open_first(name, opened.data_dirs, split, opened.tokenizer)
    if data.stand_in_banner():
        say(data.stand_in_banner())
    tokenizer = opened.tokenizer
    trained_on = opened.trained_on
    symbols = Symbols(tokenizer.state(), tokenizer.vocab_size, trained_on=trained_on)
    check_symbols(data, opened.source, symbols)
    if was_replaced(data, trained_on):
        say(f'note: {data.folder} has other token files than when {opened.source} was trained; '
            f'the figures are for the present ones')
    return data


def measure(model, data, dtype):
    """Return (mean nats a token, seconds). dtype: the precision of autocast."""
    started = time.perf_counter()
    pairs = evaluation_batches(data, split, model.config.block_size, batch_size, None, rank, ranks,
                               stride)
    predict = torch.compile(model) if compile else model
    nats = mean_loss(predict, pairs, device, dtype)
    return nats, time.perf_counter() - started


def measure_split():
    """Return the figures of the split."""
    nats, seconds = measure(model, data, dtype)
    lost = {}
    if quantize:
        exact = nats
        decoding.narrow(model, dtype, quantize)
        nats, seconds = measure(model, data, 'float32')   # a narrow model casts by itself
        lost = dict(nats_lost=nats - exact)
    tokens, text_bytes, chars = count(data, opened.tokenizer)
    bits = nats * tokens / math.log(2)
    return dict(split=split, tokens=tokens, bytes=text_bytes, nats_per_token=nats,
                perplexity=perplexity(nats), bits_per_byte=bits / max(text_bytes, 1),
                bits_per_char=bits / max(chars, 1), tokens_per_s=tokens / seconds, **lost)


def count(data, tokenizer):
    """Return how many tokens of the split are predicted, and their bytes and characters.

    The first token of each file is given and not predicted."""
    V = tokenizer.vocab_size
    byte_counts, char_counts = token_sizes(tokenizer)
    sizes = np.stack((np.ones(V, dtype=np.int64), byte_counts, char_counts))               # (3, V)
    totals = np.zeros(3, dtype=np.int64)
    for shard in data.split(split):
        for first in range(1, len(shard), COUNTED_AT_ONCE):
            piece = shard[first:first + COUNTED_AT_ONCE]
            totals += sizes @ np.bincount(piece, minlength=V)
    return totals.tolist()


def measure_task():
    """Return the figures of the task."""
    items = tasks.read_items(task, find_items(), opened.tokenizer, limit)
    block_size = model.config.block_size
    windows, cut = tasks.windows_of(items, block_size)
    if cut:
        say(f'note: {cut:,} of {len(items):,} contexts do not fit into block_size={block_size}: '
            f'their last tokens count, as many as fit')
    batches = tasks.window_batches(windows, batch_size, rank, ranks)
    share = len(range(rank * batch_size, len(windows), ranks * batch_size))   # batches of this rank
    silent = None if rank == 0 else True   # None: silent where stderr is not a terminal
    with tqdm(batches, desc=task, total=share, leave=False, disable=silent) as bar:
        scores = tasks.score(model, items, bar, device, dtype)
    return tasks.figures(task, items, scores)


def find_items():
    """Return the path of the task's items; one process of each machine downloads them."""
    if input:
        return input
    path = ''
    if os.environ.get('LOCAL_RANK', '0') == '0':
        try:
            path = tasks.published_file(task, data_dir)
        except OSError as error:
            with contextlib.suppress(OSError):   # the folder is not empty
                os.rmdir(os.path.join(data_dir, task))
            fail(f'{error}; type --input=FILE for a local copy of {tasks.TASKS[task].url}')
    runtime.agree([0])   # waits for the rank that downloads
    return path or tasks.published_file(task, data_dir)


def show(figures):
    """Write the figures as a table, or as JSON where --json says so."""
    runtime.write_json(json, figures)
    if json == '-':
        return
    for key, value in figures.items():
        if not isinstance(value, str):
            value = f'{value:,.6f}' if isinstance(value, float) else f'{value:,}'
        write(f'{key:15} {value}\n')


# ---- the story -----------------------------------------------------------------------------------

rank, ranks, device = runtime.join_ranks(backend, device)
check(knobs, split=('train', 'val', 'test'), batch_size=1, quantize=('', 'int8'), limit=0,
      task=('', *tasks.TASKS))
check_task()
runtime.check_json(json)
opened = open_model(init_from, out_dir, checkpoint, data_dir, given)
model = opened.model
check_stride(model.config.block_size)
if not task:
    data = open_data(opened)

if dtype == 'auto':
    dtype = 'float32'
dtype, compile = runtime.set_up(device, dtype, compile and not task, exact=True)
model.to(device).eval()
where = f'{opened.where}, {model.num_params():,} parameters'
if task:
    say(f'{where}; {task}, windows of {model.config.block_size} at most')
    results = measure_task()
else:
    say(f'{where}; {split} of {data.folder}, windows of {model.config.block_size}, stride '
        f'{stride or model.config.block_size}')
    results = measure_split()
if rank == 0:
    show(results)
runtime.leave(0)
