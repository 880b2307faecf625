"""
Tokenizing speed: our pieces on all cores against a loop of tiktoken's encode_ordinary, in turn.

    TIKTOKEN_CACHE_DIR=... python results/tokenizing/measure.py enwik8_head.gz

Prints a line a round, MB of UTF-8 a second, and the median ratio with the smallest and largest.
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

text = gzip.open(sys.argv[1]).read().decode('utf-8', 'ignore') * 4
parts, size = list(pieces([text])), len(text.encode()) / 1e6
plain, ours = tiktoken.get_encoding('gpt2'), GPT2Tokenizer()


def timed(work):
    started = time.perf_counter()
    tokens = work()
    return size / (time.perf_counter() - started), tokens


print(f'{size:.1f} MB, {len(os.sched_getaffinity(0))} cores, tiktoken {tiktoken.__version__}, Python {sys.version.split()[0]}')
ratios = []
for i in range(16):
    loop, a = timed(lambda: sum(len(plain.encode_ordinary(part)) for part in parts))
    all_cores, b = timed(lambda: sum(len(ids) for ids, _ in encode_all(ours, pieces([text]))))
    assert a == b
    if i:   # the first round warms up
        ratios.append(all_cores / loop)
        print(f'round {i}: encode_ordinary in a loop {loop:.1f} MB/s, ours {all_cores:.1f} MB/s, ratio {ratios[-1]:.2f}')
print(f'ratio: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}')
