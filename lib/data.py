"""
An existing dataset: opened, verified, and cut into windows and batches.

A dataset is a folder, data/<name>/, with train.bin, val.bin (test.bin) and meta.json. The .bin files (or shards
train_000.bin, train_001.bin, ...) are raw little-endian uint16 (uint32 above 65,536 symbols) and nothing else;
meta.json says how to read them and what they must hash to. nanoGPT's files are read as well.
"""
import glob
import hashlib
import json
import math
import mmap
import os
import pickle
import re
import shlex

import numpy as np
import torch

from lib.console import fail, tell
from lib.tokenizers import load_tokenizer

VERIFY_BELOW = 64 << 20   # bytes; larger files are checked by size at start-up and by token range as they are read
RELEASE_AFTER = 256 << 20   # bytes read from the files until their pages are given back
PREPARE = {'shakespeare_char': 'python prepare_shakespeare.py --tokenizer=char',
           'shakespeare_byte': 'python prepare_shakespeare.py --tokenizer=byte',
           'shakespeare': 'python prepare_shakespeare.py --tokenizer=gpt2',
           'openwebtext': 'python prepare_text.py --input=FOLDER --name=openwebtext --tokenizer=gpt2',
           'enwik8': 'python prepare_enwik8.py --tokenizer=byte', 'enwik8_gpt2': 'python prepare_enwik8.py --tokenizer=gpt2'}


# ---- finding a dataset ---------------------------------------------------------------------------

def how_to_make(name, tokenizer='char', data_dir='data'):
    """Return the command that makes the dataset of that name in data_dir.

    tokenizer: the kind to advise for a dataset of the user's own text."""
    own_text = 'python prepare_text.py --input=FILE_OR_FOLDER'
    command = PREPARE.get(name, f'{own_text} --name={name} --tokenizer={tokenizer}')
    if data_dir != 'data':
        command += f' --data_dir={shlex.quote(data_dir)}'
    return command


def find_dataset(name, data_dir='data', needs=('train', 'val'), knob='dataset'):
    """The folder of a dataset, and whether its token files are there; fails for a name that is a path."""
    if not re.fullmatch(r'[\w][\w.-]*', name):
        fail(f'{knob}={name!r} is not a name: letters, digits, _ - and . are allowed, and its folder is in {data_dir}/; '
             f'type --{knob}={"shakespeare_char" if knob == "dataset" else "mine"}')
    folder = os.path.join(data_dir, name)
    return folder, all(shards_of(folder, split) for split in needs)


def open_dataset(name, data_dir='data', needs=('train', 'val')):
    """The Dataset of that name; fails where a split that is needed is not there, saying how to make it."""
    folder, ready = find_dataset(name, data_dir, needs)
    if not ready:
        fail(missing(name, data_dir, needs))
    return Dataset(name, data_dir)


def missing(name, data_dir, needs=('train', 'val'), why=''):
    folder = os.path.join(data_dir, name)
    missing = [f'{split}.bin' for split in needs if not shards_of(folder, split)]
    return (f'{folder} has no {" and ".join(missing)}{why}; make it first: '
            f'{how_to_make(name, data_dir=data_dir)}')


def first_with(name, data_dirs, split):
    """Return the first of data_dirs in which the dataset of that name has the split, or None."""
    for data_dir in data_dirs:
        if find_dataset(name, data_dir, needs=(split,))[1]:
            return data_dir
    return None


def not_found(name, data_dirs, split):
    """Say that none of data_dirs has that split of a dataset."""
    folders = [os.path.join(data_dir, name) for data_dir in data_dirs]
    return f'no {split}.bin of {name} in {" or ".join(folders)}'


def open_first(name, data_dirs, split, tokenizer):
    """Return the Dataset of that name from the first of data_dirs that has the split.

    Fails where none has it. tokenizer: the model's, whose kind a dataset made anew should have."""
    data_dir = first_with(name, data_dirs, split)
    if data_dir is None:
        make = how_to_make(name, tokenizer.state()['kind'], data_dirs[0])
        fail(f'{not_found(name, data_dirs, split)}; type --data_dir=FOLDER for the folder that '
             f'holds {name}, or make it first: {make}')
    return Dataset(name, data_dir)


def with_split(name, tokenizer, data_dirs, split='val'):
    """Return (the Dataset of that name from the first of data_dirs that has the split, '').

    Return (None, the reason) where none has it, where the dataset's tokenizer is another than
    `tokenizer`, and where the name is empty."""
    if not name:
        return None, 'the dataset it was trained on is not known'
    data_dir = first_with(name, data_dirs, split)
    if data_dir is None:
        return None, not_found(name, data_dirs, split)
    data = Dataset(name, data_dir)
    if data.tokenizer.state() != tokenizer.state():
        return None, f'{data.folder} has another tokenizer than the model'
    return data, ''


# ---- reading it ----------------------------------------------------------------------------------

class Dataset:
    """data/<name>/ opened: tokenizer, vocab_size, meta, and the splits as lists of token arrays, one a shard."""

    def __init__(self, name, data_dir='data'):
        self.name = name
        self.data_dir = data_dir
        self.folder = os.path.join(data_dir, name)
        self.again = f'type {how_to_make(name, data_dir=data_dir)} to make it again'
        try:
            if os.path.exists(os.path.join(self.folder, 'meta.json')):
                with open(os.path.join(self.folder, 'meta.json'), encoding='utf-8') as f:
                    self.meta = json.load(f)
                self.dtype = {'uint16': '<u2', 'uint32': '<u4'}[self.meta['dtype']]
                self.meta['splits'].items(), self.meta['source'].get
            else:
                self.meta, self.dtype = _nanogpt_meta(self.folder), '<u2'
            self.tokenizer = load_tokenizer(self.meta['tokenizer'])
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, EOFError, MemoryError,
                pickle.UnpicklingError) as error:
            fail(f'{self.folder}: its meta file cannot be used ({type(error).__name__}: {error}); {self.again}')
        self.vocab_size = self.tokenizer.vocab_size
        kind = self.tokenizer.state()['kind']
        self.again = f'type {how_to_make(name, kind, data_dir)} to make it again'
        self.opened = {}   # split -> its shards, verified once
        self.maps = []     # of all of them

    def split(self, split):
        """[token array a shard], memory-mapped; fails when a file is missing or is not what meta.json says."""
        if split not in self.opened:
            self.opened[split] = self._open(split)
        return self.opened[split]

    def _open(self, split):
        paths = shards_of(self.folder, split)
        if not paths:
            fail(f'{self.folder}: no {split}.bin; {self.again}')
        try:
            known = self.meta['splits'].get(split) if 'splits' in self.meta else None
            size, hashes = known and int(known['tokens']) * int(self.dtype[-1]), known and dict(known['sha256'])
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            fail(f'{self.folder}/meta.json does not describe {split}.bin; {self.again}')
        sizes = [self._size(path) for path in paths]
        if known and (sum(sizes) != size or set(hashes) != set(map(os.path.basename, paths))):
            fail(f'{self.folder}: {split}.bin disagrees with meta.json: {sum(sizes):,} bytes in {len(paths)} file(s), '
                 f'where {size:,} in {len(hashes)} are expected; {self.again}')
        shards = []
        for path, n in zip(paths, sizes):
            if n == 0:
                fail(f'{path} is empty; {self.again}')
            if n % int(self.dtype[-1]):
                fail(f'{path}: {n} bytes are not a whole number of {self.dtype[-1]}-byte tokens; {self.again}')
            try:
                with open(path, 'rb') as f:
                    self.maps.append(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ))
            except OSError as error:
                self._unreadable(path, error)
            shard = np.frombuffer(self.maps[-1], dtype=self.dtype)
            if n <= VERIFY_BELOW:
                if known and hashlib.sha256(shard).hexdigest() != hashes[os.path.basename(path)]:
                    fail(f'{path} disagrees with meta.json: its SHA-256 is another; {self.again}')
                self.check_range(shard, path)
            shards.append(shard)
        return shards

    def _size(self, path):
        """Return the bytes in a token file; fails for one that cannot be read."""
        try:
            return os.path.getsize(path)
        except OSError as error:
            self._unreadable(path, error)

    def _unreadable(self, path, error):
        """Fail for a token file that the system does not let us read."""
        reason = error.strerror or error
        fail(f'{path} cannot be read ({reason}); make it readable, or {self.again}')

    def release(self):
        """Give back the pages read so far: they count as this process's memory and would grow to all of it (nanoGPT #287)."""
        for pages in self.maps:
            if hasattr(pages, 'madvise'):   # not on Windows
                pages.madvise(mmap.MADV_DONTNEED)

    def check_range(self, tokens, where):
        """Fails where a token is at or above the vocabulary's size, which would index past the embedding."""
        if tokens.max() >= self.vocab_size:
            fail(f'{where}: token {tokens.max()} is outside the vocabulary, 0 to {self.vocab_size - 1}; {self.again}')

    def stand_in_banner(self):
        """Lines to print at every run on the stand-in text, or '' for a real dataset."""
        source = self.meta.get('source', {})
        if not source.get('stand_in'):
            return ''
        lines = (f'THIS IS NOT {source.get("instead_of", "THE REAL TEXT")}: a stand-in, {source.get("name")}',
                 f'Why: {source.get("reason")}',
                 f'With a network, replace it: {how_to_make(self.name, data_dir=self.data_dir)}')
        return '\n'.join(('=' * 80, *(line[:300] for line in lines), '=' * 80))


def shards_of(folder, split, all_of_them=False):
    """The files of a split: train.bin alone, or train_000.bin, train_001.bin, ... in their order."""
    whole = os.path.join(folder, f'{split}.bin')
    shards = sorted(glob.glob(os.path.join(glob.escape(folder), f'{split}_[0-9]*.bin')), key=lambda path: (len(path), path))
    return [whole] * os.path.isfile(whole) + shards if all_of_them or not os.path.isfile(whole) else [whole]


class _PlainUnpickler(pickle.Unpickler):
    """Reads dicts, lists, strings and numbers; whatever would import or call something is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f'it asks for {module}.{name}')


def _nanogpt_meta(folder):
    """meta for files prepared by nanoGPT: the characters of its meta.pkl, or GPT-2's BPE without one."""
    path = os.path.join(folder, 'meta.pkl')
    if not os.path.exists(path):
        if os.environ.get('LOCAL_RANK', '0') == '0':
            tell(f"note: {folder} has no meta.json: its tokens are taken for GPT-2's, as nanoGPT's are")
        return dict(tokenizer=dict(kind='gpt2'))
    with open(path, 'rb') as f:
        itos = _PlainUnpickler(f).load()['itos']
    chars = ''.join(itos[i] for i in range(len(itos)))
    if list(chars) != sorted(set(chars)):
        raise ValueError('the characters of meta.pkl are not in order')
    return dict(tokenizer=dict(kind='char', chars=chars))


# ---- windows -------------------------------------------------------------------------------------

class TrainingWindows:
    """The endless sequence of training windows, a pure function of (seed, position).

    An epoch visits every window of block_size + 1 tokens once, shuffled, the windows laid from a new random offset; the
    number of windows an epoch is the same for every offset. Step i of a run takes positions i·n to i·n + n - 1, n being
    the whole global batch, so neither resuming nor the number of ranks changes what is seen."""

    def __init__(self, dataset, split, block_size, seed):
        self.dataset, self.shards, self.T, self.seed = dataset, dataset.split(split), block_size, seed
        self.epoch, self.read = None, 0
        self.counts = [max((len(s) - self.T) // self.T, len(s) > self.T) for s in self.shards]
        if not sum(self.counts):
            longest = max(map(len, self.shards))
            fail(f'{dataset.folder}: the {split} split has {longest:,} tokens, fewer than block_size={block_size} and one; '
                 + (f'type --block_size={longest - 1} or less, or use more text' if longest > 1 else 'use more text'))

    def __len__(self):
        """Windows in an epoch."""
        return sum(self.counts)

    def _shuffle(self, epoch):
        rng = np.random.default_rng((self.seed, epoch))
        self.epoch, self.order = epoch, rng.permutation(len(self))
        self.offsets = [rng.integers(len(s) - n * self.T) if n else 0 for s, n in zip(self.shards, self.counts)]

    def batch(self, first, count):
        """Windows first to first + count - 1 -> x, y (count, T) int64, y being x shifted by one."""
        rows = np.empty((count, self.T + 1), dtype=np.int64)
        ends = np.cumsum(self.counts)
        for row, position in zip(rows, range(first, first + count)):
            epoch, i = divmod(position, len(self))
            if epoch != self.epoch:
                self._shuffle(epoch)
            shard = int(np.searchsorted(ends, self.order[i], side='right'))
            window = self.order[i] - (ends[shard] - self.counts[shard])
            start = self.offsets[shard] + window * self.T
            row[:] = self.shards[shard][start:start + self.T + 1]
        self.dataset.check_range(rows, self.dataset.folder)
        self.read += rows.nbytes + count * (1 << 16)   # the system maps some pages around the one asked for
        if self.read > RELEASE_AFTER:
            self.read = 0
            self.dataset.release()
        return torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(rows[:, 1:].copy())


def evaluation_batches(dataset, split, block_size, batch_size, batches=None, rank=0, ranks=1, stride=None):
    """Yield x, y (B, T) over a split, every target once; padding has target -1. Neither random nor dependent on ranks.

    batches: take that many batches' worth of windows, evenly spread, instead of all. Each rank gets its share.
    stride: tokens from window to window, block_size if None; with less, windows overlap and only the new targets count."""
    shards, stride = dataset.split(split), stride or block_size
    ends = np.cumsum([1 + max(0, math.ceil((len(shard) - 1 - block_size) / stride)) if len(shard) > 1 else 0
                      for shard in shards])
    n = taken = int(ends[-1])
    if not n:
        fail(f'{dataset.folder}: the {split} split has no two tokens in a row to predict; use more text')
    if batches is not None:
        taken = min(n, batches * batch_size)
    batch_size = min(batch_size, taken)
    for first in range(0, taken, batch_size * ranks):   # all ranks take the same number of batches, all of one shape
        x, y = np.zeros((batch_size, block_size), dtype=np.int64), np.full((batch_size, block_size), -1, dtype=np.int64)
        for row, i in enumerate(range(first + rank * batch_size, min(taken, first + (rank + 1) * batch_size))):
            window = i * n // taken
            shard = int(np.searchsorted(ends, window, side='right'))
            start = (window - (ends[shard - 1] if shard else 0)) * stride
            piece = np.asarray(shards[shard][start:start + block_size + 1], dtype=np.int64)
            x[row, :len(piece) - 1], y[row, :len(piece) - 1] = piece[:-1], piece[1:]
            if start:
                y[row, :block_size - stride] = -1   # the window before has predicted these
        dataset.check_range(np.maximum(x, y), dataset.folder)
        yield torch.from_numpy(x), torch.from_numpy(y)
