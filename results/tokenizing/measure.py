"""
Tokenizing speed: our pieces on all cores, in turn with a loop of tiktoken's encode_ordinary.

    TIKTOKEN_CACHE_DIR=... python results/tokenizing/measure.py enwik8_head.gz

Prints a line a round with megabytes of UTF-8 a second, then the median of the ratios with the
smallest and the largest.
"""
import gzip
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import tiktoken

from lib.prepare import encode_all, pieces
from lib.tokenizers import GPT2Tokenizer

ROUNDS = 15
COPIES = 4   # the text is measured so many times in a row


def tokens_of_a_loop():
    """Tokenize with tiktoken alone, a piece after the other; return the number of tokens."""
    return sum(len(tiktoken_gpt2.encode_ordinary(part)) for part in parts)


def tokens_of_all_cores():
    """Tokenize as prepare_text.py does; return the number of tokens."""
    return sum(len(ids) for ids, _ in encode_all(gpt2, pieces([text])))


def timed(tokenize):
    """Return (megabytes a second, number of tokens)."""
    started = time.perf_counter()
    tokens = tokenize()
    return megabytes / (time.perf_counter() - started), tokens


def measure():
    """Measure both in turn; return (the loop's rate, ours), in megabytes a second."""
    loop, loop_tokens = timed(tokens_of_a_loop)
    ours, our_tokens = timed(tokens_of_all_cores)
    assert loop_tokens == our_tokens
    return loop, ours


with gzip.open(sys.argv[1]) as f:
    text = f.read().decode('utf-8', 'ignore') * COPIES
parts = list(pieces([text]))
megabytes = len(text.encode()) / 1e6
tiktoken_gpt2 = tiktoken.get_encoding('gpt2')
gpt2 = GPT2Tokenizer()

print(f'{megabytes:.1f} MB, {len(os.sched_getaffinity(0))} cores, '
      f'tiktoken {tiktoken.__version__}, Python {sys.version.split()[0]}')
measure()   # the first round warms up
ratios = []
for i in range(1, 1 + ROUNDS):
    loop, ours = measure()
    ratios.append(ours / loop)
    print(f'round {i}: encode_ordinary in a loop {loop:.1f} MB/s, ours {ours:.1f} MB/s, '
          f'ratio {ratios[-1]:.2f}')
print(f'ratio: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}')
