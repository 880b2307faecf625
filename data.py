"""
Text to tokens and tokens to batches: tokenizers, downloads, token files, windows.

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
import time
import zipfile
import zlib

import numpy as np
import torch

from configurator import fail

VERIFY_BELOW = 64 << 20   # bytes; larger files are checked by size at start-up and by token range as they are read
RELEASE_AFTER = 256 << 20   # bytes read from the files until their pages are given back
PREPARE = {'shakespeare_char': 'python prepare_shakespeare.py --tokenizer=char',
           'shakespeare_byte': 'python prepare_shakespeare.py --tokenizer=byte',
           'shakespeare': 'python prepare_shakespeare.py --tokenizer=gpt2'}


# ---- tokenizers: vocab_size, encode(text) -> ids, decode(ids) -> bytes, state() -> plain data, and opening, the text
# ---- that generation begins with when there is no prompt -----------------------------------------------------------

class CharTokenizer:
    """One token a character, numbered in the order of their code points."""

    def __init__(self, chars):
        self.chars = ''.join(sorted(set(chars)))
        self.codes = np.frombuffer(self.chars.encode('utf-32-le', 'surrogatepass'), dtype='<u4')
        self.vocab_size = len(self.chars)
        self.opening = '\n' if '\n' in self.chars else self.chars[:1]

    def encode(self, text):
        """Token ids, an int array as long as text; fails on a character that the vocabulary lacks, naming it."""
        codes = np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), dtype='<u4')
        ids = np.searchsorted(self.codes, codes).clip(max=self.vocab_size - 1)
        missing = codes[self.codes[ids] != codes]
        if len(missing):
            shown = ', '.join(f'{chr(c)!r}' for c in dict.fromkeys(missing[:1000].tolist()))[:200]
            fail(f'not in the vocabulary of {self.vocab_size} characters: {shown}; allowed are {self.chars!r}; '
                 f'leave them out, or train on a text that has them or with --tokenizer=byte')
        return ids

    def decode(self, ids):
        return ''.join(self.chars[i] for i in ids).encode('utf-8', 'surrogatepass')

    def state(self):
        return dict(kind='char', chars=self.chars)


class ByteTokenizer:
    """One token a byte of UTF-8: any text, 256 symbols."""
    vocab_size, opening = 256, '\n'

    def encode(self, text):
        return np.frombuffer(text.encode('utf-8', 'surrogateescape'), dtype=np.uint8)

    def decode(self, ids):
        return bytes(ids)

    def state(self):
        return dict(kind='byte')


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding, through tiktoken."""
    vocab_size, opening = 50257, '<|endoftext|>'

    def __init__(self):
        import tiktoken  # here, so that characters and bytes need torch and numpy alone
        try:
            self.bpe = tiktoken.get_encoding('gpt2')
        except Exception as error:   # whatever its download met
            fail(f"tiktoken cannot fetch GPT-2's vocabulary ({type(error).__name__}); it needs the network once, or a folder "
                 f"with its two files; type TIKTOKEN_CACHE_DIR=FOLDER before the command")

    def encode(self, text):
        """Token ids; <|endoftext|> in the text becomes that one token."""
        text = text.encode('utf-8', 'replace').decode('utf-8')   # half of a surrogate pair has no bytes
        return np.array(self.bpe.encode(text, allowed_special={self.opening}), dtype=np.int64)

    def decode(self, ids):
        return self.bpe.decode_bytes(list(ids))

    def state(self):
        return dict(kind='gpt2')


def make_tokenizer(kind, text=''):
    """A new tokenizer for a text: 'char', 'byte' or 'gpt2'."""
    makers = dict(char=lambda: CharTokenizer(text), byte=ByteTokenizer, gpt2=GPT2Tokenizer)
    if kind not in makers:
        fail(f'tokenizer={kind}: allowed are {", ".join(makers)}; type --tokenizer=char')
    return makers[kind]()


def load_tokenizer(state):
    """The tokenizer that state() described. Raises ValueError for anything else."""
    if not isinstance(state, dict) or state.get('kind') not in ('char', 'byte', 'gpt2'):
        raise ValueError('it names no tokenizer that is known here')
    if state['kind'] == 'char' and not (isinstance(state.get('chars'), str) and state['chars']):
        raise ValueError("its character tokenizer has no 'chars'")
    return make_tokenizer(state['kind'], state.get('chars', ''))


# ---- getting and writing data --------------------------------------------------------------------------------------

def download(url, path, size, sha256, tries=4):
    """Fetch url to path, which appears only once size (bytes) and SHA-256 are right. Raises OSError with the reason.

    A try that breaks off is taken up where it ended; what an ended process left behind too; a failed call leaves nothing."""
    import requests  # here, so that training on data that exists does without
    part, reason = path + '.part', None
    for attempt in range(tries):
        if attempt:
            time.sleep(2 ** (attempt - 1))
        try:
            have = os.path.getsize(part) if os.path.exists(part) else 0
            headers = {'Range': f'bytes={have}-', 'Accept-Encoding': 'identity'} if 0 < have < size else {}
            with requests.get(url, stream=True, timeout=(10, 30), headers=headers) as reply:
                reply.raise_for_status()
                resumed = reply.status_code == 206 and reply.headers.get('Content-Range', '').startswith(f'bytes {have}-')
                with open(part, 'ab' if resumed else 'wb') as f:
                    for chunk in reply.iter_content(1 << 14):
                        f.write(chunk)
                        if f.tell() > size:
                            break
            got = os.path.getsize(part)
            if got < size:
                raise OSError(f'{url} broke off after {got:,} of {size:,} bytes')
            with open(part, 'rb') as f:
                digest = hashlib.file_digest(f, 'sha256').hexdigest()
            if got != size or digest != sha256:
                os.remove(part)
                raise OSError(f'{url} did not send the file expected: {got:,} bytes (not {size:,}), SHA-256 {digest[:12]}…')
            os.replace(part, path)
            return
        except (OSError, ValueError) as error:   # requests' own errors are OSErrors too, a malformed URL's a ValueError
            reason = error
            if isinstance(error, ValueError):
                break
    if os.path.exists(part):
        os.remove(part)
    raise OSError(f'{type(reason).__name__}: {str(reason)[:300]}')


def unzip(path, member, size):
    """The bytes of one member of a zip file, which must be exactly `size` of them; nothing else in it is looked at and
    nothing is written, so a path that climbs out of the folder has nowhere to go. Raises OSError with the reason."""
    try:
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo(member)
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):   # the others unpack without a bound
                raise ValueError(f'compression method {info.compress_type}')
            with archive.open(info) as f:
                raw = f.read(size + 1)   # so that it meets the end, where the checksum is verified
    except (OSError, KeyError, ValueError, RuntimeError, EOFError, zlib.error,
            zipfile.BadZipFile) as error:
        raise OSError(f'{path} is not the zip file expected: {str(error)[:300] or type(error).__name__}') from error
    if len(raw) != size:
        raise OSError(f'{path} is not the zip file expected: {member} has not {size:,} bytes')
    return raw


def stand_in_text():
    """Some 700 kB of English that every Python ships: the language reference's topics."""
    from pydoc_data.topics import topics
    return '\n\n'.join(topics[name] for name in sorted(topics))


def write_dataset(folder, splits, tokenizer, source):
    """Write {split: (ids, source bytes)} and meta.json into folder, each file whole or not at all, meta.json last.

    source: dict(name, url, sha256, stand_in) of the text. Returns meta."""
    dtype = 'uint16' if tokenizer.vocab_size <= 1 << 16 else 'uint32'
    meta = dict(format=1, tokenizer=tokenizer.state(), vocab_size=tokenizer.vocab_size, dtype=dtype, splits={}, source=source)
    os.makedirs(folder, exist_ok=True)
    for split, (ids, size) in splits.items():
        raw = np.asarray(ids).astype('<u2' if dtype == 'uint16' else '<u4').tobytes()
        meta['splits'][split] = dict(tokens=len(ids), bytes=size, sha256={f'{split}.bin': hashlib.sha256(raw).hexdigest()})
        _write_whole(os.path.join(folder, f'{split}.bin'), raw)
    _write_whole(os.path.join(folder, 'meta.json'), (json.dumps(meta, indent=1, ensure_ascii=True) + '\n').encode())
    return meta


def _write_whole(path, raw):
    part = f'{path}.{os.getpid()}.part'
    try:
        with open(part, 'wb') as f:
            f.write(raw)
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.remove(part)


# ---- reading data --------------------------------------------------------------------------------------------------

class Dataset:
    """data/<name>/ opened: tokenizer, vocab_size, meta, and the splits as lists of token arrays, one a shard."""

    def __init__(self, name, data_dir='data'):
        self.name, self.folder = name, os.path.join(data_dir, name)
        self.again = f'type {PREPARE.get(name, "its prepare command")} to make it again'
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
        self.opened = {}   # split -> its shards, verified once
        self.maps = []     # of all of them

    def split(self, split):
        """[token array a shard], memory-mapped; fails when a file is missing or is not what meta.json says."""
        if split not in self.opened:
            self.opened[split] = self._open(split)
        return self.opened[split]

    def _open(self, split):
        paths = _shards(self.folder, split)
        if not paths:
            fail(f'{self.folder}: no {split}.bin; {self.again}')
        try:
            known = self.meta['splits'].get(split) if 'splits' in self.meta else None
            size, hashes = known and int(known['tokens']) * int(self.dtype[-1]), known and dict(known['sha256'])
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            fail(f'{self.folder}/meta.json does not describe {split}.bin; {self.again}')
        sizes = [os.path.getsize(path) for path in paths]
        if known and (sum(sizes) != size or set(hashes) != set(map(os.path.basename, paths))):
            fail(f'{self.folder}: {split}.bin disagrees with meta.json: {sum(sizes):,} bytes in {len(paths)} file(s), '
                 f'where {size:,} in {len(hashes)} are expected; {self.again}')
        shards = []
        for path, n in zip(paths, sizes):
            if n == 0:
                fail(f'{path} is empty; {self.again}')
            if n % int(self.dtype[-1]):
                fail(f'{path}: {n} bytes are not a whole number of {self.dtype[-1]}-byte tokens; {self.again}')
            with open(path, 'rb') as f:
                self.maps.append(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ))
            shard = np.frombuffer(self.maps[-1], dtype=self.dtype)
            if n <= VERIFY_BELOW:
                if known and hashlib.sha256(shard).hexdigest() != hashes[os.path.basename(path)]:
                    fail(f'{path} disagrees with meta.json: its SHA-256 is another; {self.again}')
                self.check_range(shard, path)
            shards.append(shard)
        return shards

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
                 f'With a network, replace it: {PREPARE.get(self.name, "prepare it again")}')
        return '\n'.join(('=' * 80, *(line[:300] for line in lines), '=' * 80))


def find_dataset(name, data_dir='data', needs=('train', 'val')):
    """The folder of a dataset, and whether its token files are there; fails for a name that is a path."""
    if not re.fullmatch(r'[\w][\w.-]*', name):
        fail(f'dataset={name!r} is not a name: letters, digits, _ - and . are allowed, and it is looked for in {data_dir}/; '
             f'type --dataset=shakespeare_char')
    folder = os.path.join(data_dir, name)
    return folder, all(_shards(folder, split) for split in needs)


def _shards(folder, split):
    """The files of a split: train.bin alone, or train_000.bin, train_001.bin, ... in their order."""
    whole = os.path.join(folder, f'{split}.bin')
    return [whole] if os.path.isfile(whole) else sorted(glob.glob(os.path.join(glob.escape(folder), f'{split}_[0-9]*.bin')))


class _PlainUnpickler(pickle.Unpickler):
    """Reads dicts, lists, strings and numbers; whatever would import or call something is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f'it asks for {module}.{name}')


def _nanogpt_meta(folder):
    """meta for files prepared by nanoGPT: the characters of its meta.pkl, or GPT-2's BPE without one."""
    path = os.path.join(folder, 'meta.pkl')
    if not os.path.exists(path):
        return dict(tokenizer=dict(kind='gpt2'))
    with open(path, 'rb') as f:
        itos = _PlainUnpickler(f).load()['itos']
    chars = ''.join(itos[i] for i in range(len(itos)))
    if list(chars) != sorted(set(chars)):
        raise ValueError('the characters of meta.pkl are not in order')
    return dict(tokenizer=dict(kind='char', chars=chars))


# ---- windows -------------------------------------------------------------------------------------------------------

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


def evaluation_batches(dataset, split, block_size, batch_size, batches=None, rank=0, ranks=1):
    """Yield x, y (B, T) over a split, every target once; padding has target -1. Neither random nor dependent on ranks.

    batches: take that many batches' worth of windows, evenly spread, instead of all. Each rank gets its share."""
    shards = dataset.split(split)
    ends = np.cumsum([max(0, math.ceil((len(shard) - 1) / block_size)) for shard in shards])
    n = taken = int(ends[-1])
    if not n:
        fail(f'{dataset.folder}: the {split} split has no two tokens in a row to predict; use more text')
    if batches is not None:
        taken = min(n, batches * batch_size)
    for first in range(0, taken, batch_size * ranks):   # all ranks take the same number of batches, all of one shape
        x, y = np.zeros((batch_size, block_size), dtype=np.int64), np.full((batch_size, block_size), -1, dtype=np.int64)
        for row, i in enumerate(range(first + rank * batch_size, min(taken, first + (rank + 1) * batch_size))):
            window = i * n // taken
            shard = int(np.searchsorted(ends, window, side='right'))
            start = (window - (ends[shard - 1] if shard else 0)) * block_size
            piece = np.asarray(shards[shard][start:start + block_size + 1], dtype=np.int64)
            x[row, :len(piece) - 1], y[row, :len(piece) - 1] = piece[:-1], piece[1:]
        dataset.check_range(np.maximum(x, y), dataset.folder)
        yield torch.from_numpy(x), torch.from_numpy(y)
