"""
An existing dataset: how it is found, opened and verified, and how it is cut into batches.

A dataset is a folder, data/<name>/, with train.bin, val.bin (test.bin) and meta.json. The .bin
files, or their shards train_000.bin, train_001.bin, ..., are raw little-endian uint16, uint32 for a
vocabulary above 65,536, and nothing else. meta.json says how to read them and what they must hash
to. Datasets made by nanoGPT are read as well.

A folder with the shards of llm.c or modded-nanogpt is a dataset, too: *_train_*.bin and *_val_*.bin
have a header in front of their tokens, which are those of GPT-2, and need no meta.json.
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
from dataclasses import dataclass

import numpy as np
import torch

from lib.console import fail, tell
from lib.tokenizers import load_tokenizer

# Bytes. Of a larger file, the size is checked when it is opened, and the range of its tokens as
# they are read.
VERIFY_BELOW = 64 << 20
RELEASE_AFTER = 256 << 20   # bytes read from the files before their pages are given back
# the command for other datasets of Tiny Shakespeare, from prepare_shakespeare.py's download
TINY_SHAKESPEARE = 'python prepare_text.py --input=data/shakespeare_char/input.txt'
# The header of a shard by llm.c or modded-nanogpt is 256 int32: MAGIC, VERSION, the number of
# tokens, and zeros.
HEADER = 1024   # bytes
MAGIC = 20240520
VERSION = 1
SPLITS = ('train', 'val', 'test')
DEFAULT = 'openwebtext'   # the dataset of train.py and of nanoGPT where none is named
HOW_TO_MAKE = {
    'shakespeare_char': 'python prepare_shakespeare.py --tokenizer=char',
    'shakespeare_byte': 'python prepare_shakespeare.py --tokenizer=byte',
    'shakespeare': 'python prepare_shakespeare.py --tokenizer=gpt2',
    'shakespeare_bpe': 'python prepare_shakespeare.py --tokenizer=bpe',
    'shakespeare_bpe_512': f'{TINY_SHAKESPEARE} --name=shakespeare_bpe_512 --tokenizer=bpe '
                           f'--vocab_size=512',
    'shakespeare_bpe_4096': f'{TINY_SHAKESPEARE} --name=shakespeare_bpe_4096 --tokenizer=bpe '
                            f'--vocab_size=4096',
    'openwebtext': 'python prepare_text.py --input=FOLDER --name=openwebtext --tokenizer=gpt2',
    'enwik8': 'python prepare_enwik8.py --tokenizer=byte',
    'enwik8_gpt2': 'python prepare_enwik8.py --tokenizer=gpt2',
    'enwik8_bpe': 'python prepare_enwik8.py --tokenizer=bpe',
    'tinystories': 'python prepare_corpus.py --name=tinystories',
    'fineweb': 'python prepare_corpus.py --name=fineweb',
    'fineweb_edu': 'python prepare_corpus.py --name=fineweb_edu'}


# ---- finding a dataset ---------------------------------------------------------------------------

def open_dataset(name, data_dir='data', needs=('train', 'val')):
    """Return the Dataset of that name. Fail where a split it needs is missing."""
    folder, ready = find_dataset(name, data_dir, needs)
    if not ready:
        fail(missing(name, data_dir, needs))
    return Dataset(name, data_dir)


def open_first(name, data_dirs, split, tokenizer):
    """Return the Dataset of that name from the first of data_dirs that has the split.

    Fail where none has it. tokenizer: the model's, which a dataset made anew should have too."""
    data_dir = first_with(name, data_dirs, split)
    if data_dir is None:
        make = how_to_make(name, tokenizer, data_dirs[0])
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


def find_dataset(name, data_dir='data', needs=('train', 'val'), knob='dataset'):
    """Return (the folder of a dataset, whether it has the splits in `needs`).

    Fail for a name that is a path. knob: the name of the knob that named the dataset."""
    if not re.fullmatch(r'[\w][\w.-]*', name):
        example = 'shakespeare_char' if knob == 'dataset' else 'mine'
        fail(f'{knob}={name!r} is not a name: letters, digits, _ - and . are allowed, and its '
             f'folder is in {data_dir}/; type --{knob}={example}')
    folder = os.path.join(data_dir, name)
    return folder, all(shards_of(folder, split) for split in needs)


def first_with(name, data_dirs, split):
    """Return the first of data_dirs in which the dataset of that name has the split, or None."""
    for data_dir in data_dirs:
        _, ready = find_dataset(name, data_dir, needs=(split,))
        if ready:
            return data_dir
    return None


def shards_of(folder, split):
    """Return the files of a split in order: ours or, without any, those with a header."""
    return plain_shards(folder, split) or headed_shards(folder, split)


def plain_shards(folder, split, all_of_them=False):
    """Return train.bin alone, or train_000.bin, train_001.bin, ..., which are tokens alone.

    all_of_them: return the shards that lie beside a train.bin too."""
    shards = _in_order(folder, f'{split}_[0-9]*.bin')
    whole = os.path.join(folder, f'{split}.bin')
    if not os.path.isfile(whole):
        return shards
    if all_of_them:
        return [whole, *shards]
    return [whole]


def headed_shards(folder, split):
    """Return NAME_train_000001.bin, ..., the shards of llm.c and modded-nanogpt with a header."""
    return _in_order(folder, f'*_{split}_*.bin')


def _in_order(folder, pattern):
    """Return the paths in a folder that a pattern stands for, sorted by their numbers."""
    paths = glob.glob(os.path.join(glob.escape(folder), pattern))
    return sorted(paths, key=lambda path: (len(path), path))


def has_headers(folder):
    """Return whether a folder has shards with a header."""
    return any(headed_shards(folder, split) for split in SPLITS)


# ---- what to say where there is no dataset -------------------------------------------------------

def missing(name, data_dir, needs=('train', 'val'), why=''):
    """Return the error for a dataset without some of the splits in `needs`.

    why: more about it, as the end of a clause."""
    folder = os.path.join(data_dir, name)
    absent = [split for split in needs if not shards_of(folder, split)]
    command = how_to_make(name, data_dir=data_dir)
    if has_headers(folder):
        files = ' and '.join(f'*_{split}_*.bin' for split in absent)
        if name not in HOW_TO_MAKE:
            return (f'{folder} has no shards {files} beside the others; fetch them into it, '
                    f'or type --dataset=NAME for another dataset')
        return f'{folder} has no shards {files} beside the others{why}; fetch them: {command}'
    files = ' and '.join(f'{split}.bin' for split in absent)
    if name == DEFAULT:
        return (f'{folder} has no {files}{why}; for a first model type '
                f'python train.py config/train_shakespeare_char.py, which fetches 1 MB; '
                f'for GPT-2 itself type python train.py config/train_gpt2.py, which fetches '
                f'400 MB; for texts of your own type {command}')
    return f'{folder} has no {files}{why}; make it first: {command}'


def not_found(name, data_dirs, split):
    """Return the clause that none of data_dirs has that split of a dataset."""
    folders = [os.path.join(data_dir, name) for data_dir in data_dirs]
    return f'no {split}.bin of {name} in {" or ".join(folders)}'


def how_to_make(name, tokenizer=None, data_dir='data'):
    """Return the command that makes the dataset of that name in data_dir.

    tokenizer: the one that the dataset should have, None where that is not known."""
    kind = tokenizer.state()['kind'] if tokenizer else 'char'
    own_text = 'python prepare_text.py --input=FILE_OR_FOLDER'
    command = HOW_TO_MAKE.get(name, f'{own_text} --name={name} --tokenizer={kind}')
    if kind == 'bpe' and command.endswith('--tokenizer=bpe'):
        command += f' --vocab_size={tokenizer.vocab_size}'
    if data_dir != 'data':
        command += f' --data_dir={shlex.quote(data_dir)}'
    return command


# ---- how much there is ---------------------------------------------------------------------------

@dataclass
class Extent:
    """How much there is to train on, by the sizes of the files and by meta.json."""
    tokens: int = 0    # tokens in the training split
    longest: int = 0   # tokens in the split's longest file: a window must be shorter
    letters: int = 0   # characters of the split's text; bytes, where a token stands for several
    symbols: int = 0   # size of the vocabulary


def extent_of(name, data_dir='data'):
    """Return the Extent of a dataset, of zeros where there is none.

    Nothing is verified: a config that chooses by the Extent runs before the dataset is opened. What
    a damaged meta.json leaves unknown is GPT-2's: two bytes a token, four letters a token."""
    folder = os.path.join(data_dir, name)
    sizes = [os.path.getsize(path) for path in shards_of(folder, 'train') if os.path.isfile(path)]
    if not sizes:
        return Extent()
    kind, symbols, token_size, letters = 'gpt2', 50257, 2, None
    if os.path.exists(os.path.join(folder, 'meta.pkl')):   # nanoGPT's characters
        kind, symbols = 'char', 256
    try:
        with open(os.path.join(folder, 'meta.json'), encoding='utf-8') as f:
            meta = json.load(f)
        kind = meta['tokenizer']['kind']
        symbols = int(meta['vocab_size'])
        token_size = {'uint16': 2, 'uint32': 4}[meta['dtype']]
        letters = int(meta['splits']['train']['bytes'])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        pass
    if headed_shards(folder, 'train'):
        sizes = [size - HEADER for size in sizes]
    tokens = sum(sizes) // token_size
    if kind in ('char', 'byte'):
        letters = tokens
    return Extent(tokens, max(sizes) // token_size, letters or 4 * tokens, symbols)


# ---- an open dataset -----------------------------------------------------------------------------

class Dataset:
    """data/<name>/, opened.

    tokenizer and vocab_size describe its tokens, and split() returns them. meta holds what
    meta.json says."""

    def __init__(self, name, data_dir='data'):
        self.name = name
        self.data_dir = data_dir
        self.folder = os.path.join(data_dir, name)
        self.headed = has_headers(self.folder)
        self.again = self._how_to_mend()
        self._check_kinds()
        try:
            self.meta = read_meta(self.folder)
            self.dtype = {'uint16': '<u2', 'uint32': '<u4'}[self.meta['dtype']]
            self.tokenizer = load_tokenizer(self.meta['tokenizer'])
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError,
                EOFError, MemoryError, pickle.UnpicklingError) as error:   # it can hold anything
            fail(f'{self.folder}: its meta file cannot be used ({type(error).__name__}: {error}); '
                 f'{self.again}')
        self.vocab_size = self.tokenizer.vocab_size
        self.again = self._how_to_mend(self.tokenizer)
        self.opened = {}   # {split: its shards}
        self.maps = []     # the memory maps of all shards

    def _how_to_mend(self, tokenizer=None):
        """Return what to type where a file is damaged. tokenizer: the dataset's, if known."""
        if self.headed and self.name not in HOW_TO_MAKE:
            return 'fetch the file again, or type --dataset=NAME for another dataset'
        return f'type {how_to_make(self.name, tokenizer, self.data_dir)} to make it again'

    def _check_kinds(self):
        """Fail for a folder with token files of both kinds: which ones are meant is not clear."""
        if not self.headed:
            return
        for split in SPLITS:
            plain = plain_shards(self.folder, split)
            if plain:
                headed = [path for each in SPLITS for path in headed_shards(self.folder, each)]
                fail(f'{self.folder} has token files of two kinds, {os.path.basename(plain[0])} '
                     f'without a header and {os.path.basename(headed[0])} with one; allowed is '
                     f'one kind; move the others into another folder of {self.data_dir}/, and '
                     f'type --dataset=NAME for the one to use')

    def split(self, split):
        """Return a split's shards, each a memory-mapped array of tokens.

        They are verified once. Fail where a file is missing or is not what meta.json says."""
        if split not in self.opened:
            self.opened[split] = self._open(split)
        return self.opened[split]

    def _open(self, split):
        """Return a split's shards, opened and verified."""
        paths = shards_of(self.folder, split)
        if not paths:
            fail(f'{self.folder}: no {split}.bin; {self.again}')
        tokens, hashes = self._expected(split)
        sizes = [self._size(path) for path in paths]
        if tokens is not None:
            size = tokens * self._token_size() + len(paths) * self._header_size()
            if sum(sizes) != size or set(hashes) != {os.path.basename(path) for path in paths}:
                fail(f'{self.folder}: {split}.bin disagrees with meta.json: {sum(sizes):,} bytes '
                     f'in {len(paths)} file(s), where {size:,} in {len(hashes)} are expected; '
                     f'{self.again}')
        shards = []
        for path, size in zip(paths, sizes):
            shards.append(self._open_shard(path, size, hashes.get(os.path.basename(path))))
        return shards

    def _expected(self, split):
        """Return (a split's number of tokens, {file: SHA-256}) from meta.json.

        Return (None, {}) where meta.json does not mention the split."""
        try:
            known = self.meta.get('splits', {}).get(split)
            if not known:
                return None, {}
            return int(known['tokens']), dict(known['sha256'])
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            fail(f'{self.folder}/meta.json does not describe {split}.bin; {self.again}')

    def _open_shard(self, path, size, sha256):
        """Return a token file of `size` bytes as an array. sha256: None where it is not known."""
        if size == 0:
            fail(f'{path} is empty; {self.again}')
        try:
            with open(path, 'rb') as f:
                if self.headed:
                    check_header(f.read(HEADER), size)
                elif size % self._token_size():
                    fail(f'{path}: {size} bytes are not a whole number of '
                         f'{self._token_size()}-byte tokens; {self.again}')
                pages = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:   # check_header's
            fail(f'{path} {error}; {self.again}')
        except OSError as error:
            self._unreadable(path, error)
        self.maps.append(pages)
        shard = np.frombuffer(pages, dtype=self.dtype, offset=self._header_size())
        if size <= VERIFY_BELOW:
            if sha256 is not None and hashlib.sha256(pages).hexdigest() != sha256:
                fail(f'{path} disagrees with meta.json: its SHA-256 is another; {self.again}')
            self.check_range(shard, path)
        return shard

    def _header_size(self):
        """Return the bytes in front of a file's tokens."""
        return HEADER if self.headed else 0

    def _token_size(self):
        """Return the bytes of a token."""
        return int(self.dtype[-1])

    def _size(self, path):
        """Return the bytes in a token file. Fail where the system does not tell."""
        try:
            return os.path.getsize(path)
        except OSError as error:
            self._unreadable(path, error)

    def _unreadable(self, path, error):
        """Fail for a token file that the system does not let us read."""
        reason = error.strerror or error
        fail(f'{path} cannot be read ({reason}); make it readable, or {self.again}')

    def check_range(self, tokens, where):
        """Fail for a token outside the vocabulary: it would index past the end of the embedding.

        where: the file or folder that the tokens are from."""
        if tokens.max() >= self.vocab_size:
            fail(f'{where}: token {tokens.max()} is outside the vocabulary, '
                 f'0 to {self.vocab_size - 1}; {self.again}')

    def release(self):
        """Give the pages read so far back to the system.

        Pages that were read count as this process's memory, which would grow to the size of the
        whole dataset (nanoGPT #287)."""
        for pages in self.maps:
            if hasattr(pages, 'madvise'):   # not on Windows
                pages.madvise(mmap.MADV_DONTNEED)

    def fingerprint(self):
        """Return a hash of all token files by meta.json's hashes, '' where it has none."""
        hashes = []
        for split, info in sorted(self.meta.get('splits', {}).items()):
            if isinstance(info, dict) and isinstance(info.get('sha256'), dict):
                hashes += [split, *(str(value) for value in info['sha256'].values())]
        if not hashes:
            return ''
        return hashlib.sha256(' '.join(hashes).encode()).hexdigest()

    def stands_in_for(self):
        """Return the name of the text that a stand-in replaces, '' for a real dataset."""
        source = self.meta.get('source', {})
        if not source.get('stand_in'):
            return ''
        return str(source.get('instead_of', 'THE REAL TEXT'))

    def stand_in_banner(self):
        """Return the lines that every run on the stand-in text prints, '' for a real dataset."""
        real = self.stands_in_for()
        if not real:
            return ''
        source = self.meta['source']
        command = how_to_make(self.name, data_dir=self.data_dir)
        lines = [f'THIS IS NOT {real}: a stand-in, {source.get("name")}',
                 f'Why: {source.get("reason")}',
                 f'With a network, replace it: {command}',
                 f'Without one, by a copy of the real text: {command} --input=input.txt']
        rule = '=' * 80
        return '\n'.join([rule, *(line[:300] for line in lines), rule])


def read_meta(folder):
    """Return what meta.json says, or its counterpart for a dataset made by nanoGPT.

    Raises many kinds of errors for a file that holds something else."""
    path = os.path.join(folder, 'meta.json')
    if not os.path.exists(path):
        if has_headers(folder):
            return dict(tokenizer=dict(kind='gpt2'), dtype='uint16')
        return nanogpt_meta(folder)
    with open(path, encoding='utf-8') as f:
        meta = json.load(f)
    for key in ('splits', 'source'):
        if not isinstance(meta[key], dict):
            raise TypeError(f'{key} is not an object')
    return meta


def nanogpt_meta(folder):
    """Return meta for a dataset made by nanoGPT.

    meta.pkl holds the characters. A dataset without this file is in GPT-2's BPE."""
    path = os.path.join(folder, 'meta.pkl')
    if not os.path.exists(path):
        if os.environ.get('LOCAL_RANK', '0') == '0':
            tell(f"note: {folder} has no meta.json: its tokens are taken for GPT-2's, "
                 f"as nanoGPT's are")
        return dict(tokenizer=dict(kind='gpt2'), dtype='uint16')
    with open(path, 'rb') as f:
        names = _PlainUnpickler(f).load()['itos']   # {id: character}
    chars = ''.join(names[i] for i in range(len(names)))
    if list(chars) != sorted(set(chars)):
        raise ValueError('the characters of meta.pkl are not in order')
    return dict(tokenizer=dict(kind='char', chars=chars), dtype='uint16')


class _PlainUnpickler(pickle.Unpickler):
    """An unpickler of dicts, lists, strings and numbers that never imports or calls anything."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f'it asks for {module}.{name}')


def check_header(header, size):
    """Return how many tokens a shard of `size` bytes holds. header: its first bytes.

    Raises ValueError, with what is wrong, for a file that is not a shard of GPT-2's tokens, and for
    one that is not whole."""
    if len(header) < HEADER:
        raise ValueError(f"has {size:,} bytes, and a shard's header alone has {HEADER:,}")
    magic, version, tokens = np.frombuffer(header[:HEADER], dtype='<i4')[:3].tolist()
    if magic != MAGIC:
        raise ValueError(f"begins with {magic}, and a shard of GPT-2's tokens with {MAGIC}")
    if version != VERSION:
        raise ValueError(f'is a shard of version {version}, and only version {VERSION} is known')
    expected = 2 * tokens   # bytes
    if size - HEADER != expected or tokens < 1:
        raise ValueError(f'is not whole: its header promises {tokens:,} tokens, and '
                         f'{size - HEADER:,} bytes follow, where {max(expected, 2):,} are expected')
    return tokens


# ---- windows and batches -------------------------------------------------------------------------

class TrainingWindows:
    """The endless sequence of training windows, a pure function of (seed, position).

    A window is block_size + 1 tokens. An epoch visits every window once, shuffled, and lays them
    from a new random offset. The number of windows in an epoch is the same for every offset.

    Step i of a run takes the positions i * n to i * n + n - 1, where n is the size of the whole
    global batch. So neither resuming nor the number of ranks changes what a step sees."""

    def __init__(self, dataset, split, block_size, seed):
        self.dataset = dataset
        self.shards = dataset.split(split)
        self.T = block_size
        self.seed = seed
        self.counts = [self._windows_in(len(shard)) for shard in self.shards]   # in an epoch
        self.epoch = None   # the epoch that order and offsets are for
        self.order = None   # the windows of all shards, shuffled
        self.offsets = []   # where each shard's first window starts
        self.read = 0       # bytes read since the pages were given back
        if not sum(self.counts):
            longest = max(map(len, self.shards))
            advice = 'use more text'
            if longest > 1:
                advice = f'type --block_size={longest - 1} or less, or use more text'
            fail(f'{dataset.folder}: the {split} split has {longest:,} tokens, fewer than '
                 f'block_size={block_size} and one; {advice}')

    def _windows_in(self, tokens):
        """Return how many windows an epoch has in a shard of that many tokens.

        Neighbouring windows share one token, so n windows span n * T + 1 tokens. T or more offsets
        are possible. Only a shard that is too short for that has fewer: it has one window."""
        if tokens <= self.T:
            return 0
        return max(1, (tokens - self.T) // self.T)

    def __len__(self):
        """Return the number of windows in an epoch."""
        return sum(self.counts)

    def _shuffle(self, epoch):
        """Draw an epoch's order of windows and each shard's offset."""
        rng = np.random.default_rng((self.seed, epoch))
        self.epoch = epoch
        self.order = rng.permutation(len(self))
        self.offsets = []
        for shard, count in zip(self.shards, self.counts):
            offset = rng.integers(len(shard) - count * self.T) if count else 0
            self.offsets.append(offset)

    def batch(self, first, count):
        """Return the windows first to first + count - 1 as x, y, (count, T) int64 each.

        y is x shifted by one token."""
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
        self.read += rows.nbytes + count * (1 << 16)   # the system also maps pages around these
        if self.read > RELEASE_AFTER:
            self.read = 0
            self.dataset.release()
        x = torch.from_numpy(rows[:, :-1].copy())
        y = torch.from_numpy(rows[:, 1:].copy())
        return x, y


def evaluation_batches(dataset, split, block_size, batch_size, batches=None, rank=0, ranks=1,
                       stride=None):
    """Yield x, y (B, T) int64 over a split, in order; each of its targets counts once.

    Targets of -1 do not count: they pad the last windows. The windows do not depend on the ranks;
    each rank gets its share of them.
    batches: take the windows of that many batches, evenly spread, instead of all.
    stride: tokens from a window to the next one, block_size if None. With a smaller stride, windows
    overlap, and only the new targets count."""
    stride = stride or block_size
    shards = dataset.split(split)
    counts = [_evaluation_windows(len(shard), block_size, stride) for shard in shards]
    ends = np.cumsum(counts)
    total = sum(counts)
    if not total:
        fail(f'{dataset.folder}: the {split} split has no two tokens in a row to predict; '
             f'use more text')
    taken = total
    if batches is not None:
        taken = min(total, batches * batch_size)
    batch_size = min(batch_size, taken)
    # all ranks take the same number of batches, and all batches have the same shape
    for first_of_all in range(0, taken, batch_size * ranks):
        x = np.zeros((batch_size, block_size), dtype=np.int64)
        y = np.full((batch_size, block_size), -1, dtype=np.int64)
        first = first_of_all + rank * batch_size
        for row, i in enumerate(range(first, min(taken, first + batch_size))):
            window = i * total // taken
            shard = int(np.searchsorted(ends, window, side='right'))
            start = (window - (ends[shard] - counts[shard])) * stride
            tokens = np.asarray(shards[shard][start:start + block_size + 1], dtype=np.int64)
            x[row, :len(tokens) - 1] = tokens[:-1]
            y[row, :len(tokens) - 1] = tokens[1:]
            if start:
                y[row, :block_size - stride] = -1   # the window before has predicted these
        dataset.check_range(np.maximum(x, y), dataset.folder)
        yield torch.from_numpy(x), torch.from_numpy(y)


def _evaluation_windows(tokens, block_size, stride):
    """Return how many windows it takes to predict every token of a shard but the first."""
    if tokens < 2:
        return 0
    return 1 + max(0, math.ceil((tokens - 1 - block_size) / stride))
