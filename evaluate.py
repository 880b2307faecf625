"""
How well a model predicts a split: every token of it once, in nats, bits per byte and bits per character.

    python evaluate.py                                        # the validation split of the run in out/
    python evaluate.py --stride=16                            # each token with at least block_size - 16 before it
    python evaluate.py --init_from=gpt2 --dataset=shakespeare --json=-
    python evaluate.py --quantize=int8                        # and what int8 weights cost
    torchrun --standalone --nproc_per_node=2 evaluate.py      # the same number, sooner

Reads a checkpoint, or Hugging Face's weights, and data/<dataset>/; writes a table to stdout, or JSON there or into a file.
"""
import math
import os
import signal
import time

import numpy as np
import torch

from lib import checkpoint as checkpoints
from lib import decoding, runtime
from lib.configurator import check, configure
from lib.console import fail, say, write
from lib.data import evaluation_batches, first_with, open_first
from lib.evaluation import mean_loss, perplexity
from lib.tokenizers import token_sizes

init_from = 'resume'     # 'resume': the run in out_dir; else 'gpt2', 'gpt2-xl', another hub name, or a folder of Hugging Face's
out_dir = 'out'          # folder of the run
checkpoint = ''          # a checkpoint file, instead of the one in out_dir
dataset = ''             # folder in data_dir; empty: the one the run was trained on
data_dir = 'data'        # where datasets live; if not typed, the run's own data_dir is tried first
split = 'val'            # 'val', 'train', or 'test' where there is one
stride = None            # tokens from window to window; None: block_size, less gives each token more context and takes longer
batch_size = 16          # windows at a time; changes the speed and not the result
json = ''                # write the figures into this file, - for stdout instead of the table
backend = 'auto'         # torchrun's: 'nccl' on GPUs, 'gloo' elsewhere
device = 'auto'          # 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'auto'           # 'float32', 'bfloat16', 'float16'; 'auto' is float32 here, where the figure is what counts
quantize = ''            # 'int8': with a byte a weight, as sample.py --quantize=int8; nats_lost is what it costs
compile = 'auto'         # torch.compile
knobs, given = configure(globals(), runtime.find_device)
signal.signal(signal.SIGINT, signal.SIG_DFL)   # Ctrl-C just ends it
rank, ranks, device = runtime.join_ranks(backend, device)

check(knobs, split=('train', 'val', 'test'), batch_size=1, quantize=('', 'int8'))
runtime.check_json(json)
opened = checkpoints.open_model(init_from, out_dir, checkpoint, data_dir, given)
model = opened.model
tokenizer = opened.tokenizer
block_size = model.config.block_size
if stride is not None and not (type(stride) is int and 1 <= stride <= block_size):
    fail(f'stride={stride!r}: allowed are None and whole numbers from 1 to block_size={block_size}; '
         f'type --stride={block_size // 2 or 1}')
dataset = dataset or opened.dataset
if not dataset:
    fail(f'{opened.where} does not say which dataset it is of; type --dataset=NAME')
there = [name for name in ('val', 'train', 'test')
         if first_with(dataset, opened.data_dirs, name) is not None]
if there and split not in there:
    folder = os.path.join(first_with(dataset, opened.data_dirs, there[0]), dataset)
    fail(f'{folder} has no {split}.bin; it has {", ".join(there)}; type --split={there[0]}')
data = open_first(dataset, opened.data_dirs, split, tokenizer)
if data.stand_in_banner():
    say(data.stand_in_banner())
symbols = checkpoints.Symbols(tokenizer.state(), tokenizer.vocab_size)
checkpoints.check_symbols(data, opened.source, symbols)
dtype, compile = runtime.set_up(device, 'float32' if dtype == 'auto' else dtype, compile)
model.to(device).eval()
say(f'{opened.where}, {model.num_params():,} parameters; {split} of {data.folder}, '
    f'windows of {block_size}, stride {stride or block_size}')


def evaluated():
    """Mean nats a token, and the seconds it took."""
    started = time.perf_counter()
    pairs = evaluation_batches(data, split, block_size, batch_size, None, rank, ranks, stride)
    nats = mean_loss(torch.compile(model) if compile else model, pairs, device, dtype)
    return nats, time.perf_counter() - started


(nats, seconds), lost = evaluated(), {}
if quantize:
    decoding.narrow(model, dtype, quantize)
    exact, (nats, seconds) = nats, evaluated()
    lost = dict(nats_lost=nats - exact)

totals = np.zeros(3, dtype=np.int64)   # tokens, and their bytes and characters
sizes = np.stack((np.ones(tokenizer.vocab_size, dtype=np.int64), *token_sizes(tokenizer)))         # (3, V)
for shard in data.split(split):   # the first token of each is given and not predicted
    for first in range(1, len(shard), 1 << 24):
        totals += sizes @ np.bincount(shard[first:first + (1 << 24)], minlength=tokenizer.vocab_size)
tokens, text_bytes, chars = totals.tolist()
bits = nats * tokens / math.log(2)
figures = dict(split=split, tokens=tokens, bytes=text_bytes, nats_per_token=nats, perplexity=perplexity(nats),
               bits_per_byte=bits / max(text_bytes, 1), bits_per_char=bits / max(chars, 1),
               tokens_per_s=tokens / seconds) | lost
if rank == 0:
    runtime.write_json(json, figures)
if rank == 0 and json != '-':
    for key, value in figures.items():
        if key != 'split':
            value = f'{value:,.6f}' if isinstance(value, float) else f'{value:,}'
        write(f'{key:15} {value}\n')
runtime.leave(0)
