"""
Training and encoding speed of our BPE, beside the trainer of Hugging Face's tokenizers.

    python results/tokenizing/measure_bpe.py enwik8_head.gz [512 1024 4096]

The numbers are vocabulary sizes. Prints a line for each of them, with megabytes of UTF-8 a second.
"""
import gzip
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import tiktoken
import tokenizers as hf

from lib.prepare import encode_all, pieces
from lib.tokenizers import END_OF_TEXT, LEAST, train_bpe


def timed(act):
    """Return (what act() returns, seconds)."""
    started = time.perf_counter()
    result = act()
    return result, time.perf_counter() - started


def train_theirs(vocab_size):
    """Return the merges that Hugging Face's trainer learns, in our form."""
    byte_level = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = hf.trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END_OF_TEXT],
                                     initial_alphabet=byte_level.alphabet(), show_progress=False)
    theirs = hf.Tokenizer(hf.models.BPE())
    theirs.pre_tokenizer = byte_level
    theirs.train_from_iterator([text], trainer)
    return [' '.join(pair) for pair in json.loads(theirs.to_str())['model']['merges']]


def equal_merges(ours, theirs):
    """Return in words how much of two lists of merges is equal."""
    first = next((i for i, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1]), len(ours))
    both = len(set(ours) & set(theirs))
    return f'{both:,} of {len(ours):,} merges are the same, the first {first:,} in the same order'


with gzip.open(sys.argv[1]) as f:
    text = f.read().decode('utf-8', 'ignore')
megabytes = len(text.encode()) / 1e6
load = ', '.join(f'{number:.1f}' for number in os.getloadavg())
print(f'{megabytes:.1f} MB, {len(os.sched_getaffinity(0))} cores, load average {load}, '
      f'tiktoken {tiktoken.__version__}, tokenizers {hf.__version__}, '
      f'Python {sys.version.split()[0]}')
for size in map(int, sys.argv[2:] or ['512', '1024', '4096']):
    bpe, seconds = timed(lambda size=size: train_bpe(pieces([text]), size))
    tokens, encoding = timed(
        lambda bpe=bpe: sum(len(ids) for ids, _ in encode_all(bpe, pieces([text]))))
    merges, their_seconds = timed(lambda size=size: train_theirs(size))
    assert len(bpe.merges) == len(merges) == size - LEAST
    print(f'{size:,} symbols: trained in {seconds:.1f} s, {megabytes / seconds:.2f} MB/s '
          f'(Hugging Face {their_seconds:.1f} s, {megabytes / their_seconds:.2f} MB/s); '
          f'encoded at {megabytes / encoding:.1f} MB/s into tokens of '
          f'{megabytes * 1e6 / tokens:.2f} bytes; {equal_merges(bpe.merges, merges)}')
