"""
Text to tokens and tokens to batches: tokenizers, downloads, token files, windows.

A dataset is a folder, data/<name>/, with train.bin, val.bin (test.bin) and meta.json. The .bin files (or shards
train_000.bin, train_001.bin, ...) are raw little-endian uint16 (uint32 above 65,536 symbols) and nothing else;
meta.json says how to read them and what they must hash to. nanoGPT's files are read as well.
"""
import contextlib
import functools
import glob
import hashlib
import io
import json
import math
import mmap
import os
import pickle
import re
import shlex
import subprocess
import sys
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from console import fail, tell

VERIFY_BELOW = 64 << 20   # bytes; larger files are checked by size at start-up and by token range as they are read
RELEASE_AFTER = 256 << 20   # bytes read from the files until their pages are given back
PIECE = 1 << 19   # characters that are tokenized at a time
END_OF_TEXT = '<|endoftext|>'
PREPARE = {'shakespeare_char': 'python prepare_shakespeare.py --tokenizer=char',
           'shakespeare_byte': 'python prepare_shakespeare.py --tokenizer=byte',
           'shakespeare': 'python prepare_shakespeare.py --tokenizer=gpt2',
           'openwebtext': 'python prepare_text.py --input=FOLDER --name=openwebtext --tokenizer=gpt2',
           'enwik8': 'python prepare_enwik8.py --tokenizer=byte', 'enwik8_gpt2': 'python prepare_enwik8.py --tokenizer=gpt2'}


def how_to_make(name, tokenizer='char', data_dir='data'):
    """Return the command that makes the dataset of that name in data_dir.

    tokenizer: the kind to advise for a dataset of the user's own text."""
    own_text = 'python prepare_text.py --input=FILE_OR_FOLDER'
    command = PREPARE.get(name, f'{own_text} --name={name} --tokenizer={tokenizer}')
    if data_dir != 'data':
        command += f' --data_dir={shlex.quote(data_dir)}'
    return command


# ---- tokenizers: vocab_size, encode(text) -> ids, decode(ids) -> bytes, state() -> plain data, opening, the text
# ---- that generation begins with when there is no prompt, and end, the token that ends one -----------------------------

class CharTokenizer:
    """One token a character, numbered in the order of their code points."""
    end = None   # the token that ends a text

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
    vocab_size, opening, end = 256, '\n', None

    def encode(self, text):
        return np.frombuffer(text.encode('utf-8', 'surrogateescape'), dtype=np.uint8)

    def decode(self, ids):
        return bytes(ids)

    def state(self):
        return dict(kind='byte')


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding, through tiktoken."""
    vocab_size, opening, end = 50257, END_OF_TEXT, 50256

    def __init__(self):
        import tiktoken  # here, so that characters and bytes need torch and numpy alone
        try:
            self.bpe = tiktoken.get_encoding('gpt2')
        except Exception as error:   # whatever its download met
            fail(f"tiktoken cannot fetch GPT-2's vocabulary ({type(error).__name__}); it needs the network once, or a folder "
                 f"with its two files; type TIKTOKEN_CACHE_DIR=FOLDER before the command")

    def encode(self, text):
        """Token ids; <|endoftext|> in the text becomes that one token."""
        try:
            return self.bpe.encode_to_numpy(text, allowed_special={END_OF_TEXT})
        except UnicodeEncodeError:   # half of a surrogate pair has no bytes
            return self.encode(text.encode('utf-8', 'replace').decode('utf-8'))

    def decode(self, ids):
        return self.bpe.decode_bytes(list(ids))

    def state(self):
        return dict(kind='gpt2')


@functools.cache
def token_sizes(tokenizer):
    """Bytes and characters of each token, (V,) each; none for the end of a text, which is in no text."""
    texts = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    texts = [b'' if text == END_OF_TEXT.encode() else text for text in texts]
    later = bytes(range(0x80, 0xC0))   # a character's bytes after its first
    return np.array([len(text) for text in texts]), np.array([len(text.translate(None, later)) for text in texts])


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


# ---- Hugging Face's tokenizer files --------------------------------------------------------------------------------

def _byte_letters():
    """The letter by which GPT-2's files write each byte: its own where that can be seen, else one from 256 on."""
    seen, others = {*range(33, 127), *range(161, 173), *range(174, 256)}, iter(range(256, 512))
    return [chr(byte if byte in seen else next(others)) for byte in range(256)]


def _gpt2_vocab(bpe):
    """{token in those letters: id} of GPT-2's tokens, <|endoftext|> apart."""
    letters = _byte_letters()
    return {''.join(letters[byte] for byte in bpe.decode_single_token_bytes(i)): i for i in range(50256)}


def _merges(vocab):
    """[the two parts of each longer token] in the order of their ids: what the earlier tokens make of it."""
    merges = []
    for token, i in vocab.items():
        parts = list(token)
        while len(parts) > 2:
            ids = [vocab.get(a + b, i) for a, b in zip(parts, parts[1:])]
            at = ids.index(min(ids))
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append(parts)
    return merges


def hf_tokenizer_files(tokenizer, block_size):
    """{name: content} of the files from which transformers' AutoTokenizer makes the same tokenizer."""
    kind, end, added = tokenizer.state()['kind'], None, []
    if kind == 'char':   # BPE without merges would drop an unknown character in silence, WordLevel raises
        model = dict(type='WordLevel', vocab={char: i for i, char in enumerate(tokenizer.chars)}, unk_token='')
        split = dict(type='Split', pattern=dict(Regex=r'[\s\S]'), behavior='Isolated', invert=False)
        decoder = dict(type='Fuse')
    else:
        vocab = _gpt2_vocab(tokenizer.bpe) if kind == 'gpt2' else {letter: i for i, letter in enumerate(_byte_letters())}
        model = dict(type='BPE', vocab=vocab, merges=_merges(vocab) if kind == 'gpt2' else [])
        split = decoder = dict(type='ByteLevel', add_prefix_space=False, trim_offsets=True, use_regex=kind == 'gpt2')
        if kind == 'gpt2':
            end = END_OF_TEXT
            added = [dict(id=50256, content=end, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)]
    files = {'tokenizer.json': dict(version='1.0', truncation=None, padding=None, added_tokens=added, normalizer=None,
                                    pre_tokenizer=split, post_processor=None, decoder=decoder, model=model),
             'tokenizer_config.json': dict(tokenizer_class='PreTrainedTokenizerFast', model_max_length=block_size,
                                           bos_token=end, eos_token=end, clean_up_tokenization_spaces=False)}
    return {name: json.dumps(content, ensure_ascii=False) for name, content in files.items()}


def read_hf_tokenizer(folder):
    """The tokenizer of a folder's tokenizer.json or vocab.json, None where there is neither; ValueError for one not ours."""
    for name in ('tokenizer.json', 'vocab.json'):
        path = os.path.join(folder, name)
        if os.path.exists(path):
            try:
                with open(path, encoding='utf-8') as f:
                    vocab = json.load(f)
                vocab = dict(vocab['model']['vocab'] if name == 'tokenizer.json' else vocab)
                if vocab == {letter: i for i, letter in enumerate(_byte_letters())}:
                    return ByteTokenizer()
                if vocab and vocab == {char: i for i, char in enumerate(sorted(vocab))} and max(map(len, vocab)) == 1:
                    return CharTokenizer(vocab)
                vocab.pop(END_OF_TEXT, None)
                if len(vocab) == 50256 and vocab == _gpt2_vocab((tokenizer := GPT2Tokenizer()).bpe):
                    return tokenizer
            except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                raise ValueError(f'{path} cannot be used ({type(error).__name__}: {str(error)[:200]})') from error
            raise ValueError(f"{path} is neither GPT-2's vocabulary nor one of characters or bytes")
    return None


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
            reason = getattr(error.args[0], 'reason', error) if error.args else error   # urllib3's, without requests' wrapping
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


def pieces(blocks, size=PIECE):
    """Regroup blocks of one text (str) into pieces of about `size` characters whose tokens, put together, are the text's.

    They are cut between a character that is no space and a following blank or line break, where GPT-2's pattern always cuts;
    a run of 16 times the size without such a place is cut anyway."""
    held, place = '', re.compile(r'\S(?=[ \n])')
    for block in blocks:
        held, start = held + block, 0
        while len(held) - start > size:
            found = place.search(held, start + size - 1)
            if not found and len(held) - start <= 16 * size:
                break
            cut = found.end() if found else start + size
            yield held[start:cut]
            start = cut
        held = held[start:]
    if held:
        yield held


def encode_all(tokenizer, texts):
    """(token ids, bytes of the text) of each text, in their order, on all cores, a few texts in memory at a time."""
    sizes = token_sizes(tokenizer)[0].astype(np.uint16)

    def encode(text):
        ids = tokenizer.encode(text)
        return ids, int(sizes.take(ids).sum(dtype=np.int64))
    workers = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:   # threads do: tiktoken works without Python's lock
        waiting = []
        for text in texts:
            waiting.append(pool.submit(encode, text))
            if len(waiting) > 2 * workers:
                yield waiting.pop(0).result()
        yield from (done.result() for done in waiting)


@dataclass
class Chosen:
    """The documents that are for validation; all others are for training."""
    validation: bytearray   # one byte a document: 1 for a whole document that is for validation
    characters: int         # characters for validation
    cut: int | None         # number of the document that is cut, None where all are whole
    at: int                 # characters of the cut document that are for training, its first ones
    whole: int              # characters that whole documents alone would have given to validation


def split_documents(sizes, share):
    """Choose documents for validation that together hold a share of all characters.

    sizes: characters of each document, each 1 or more, together 2 or more. Each split gets at least
    1 character, and at least 2 where there are 4 or more. Documents stay whole where that misses
    the share by no more than the mean document and a quarter of the smaller split. Otherwise the
    largest document is cut, its last characters are for validation, and the share is exact."""
    total = sum(sizes)
    least = 2 if total >= 4 else 1
    target = total - int((1 - share) * total)
    target = min(max(target, least), total - least)
    whole = _whole_documents(sizes, target, total)
    characters = _chosen_characters(sizes, whole)
    missed = abs(characters - target)
    if missed * len(sizes) <= total and 4 * missed <= min(target, total - target):
        return Chosen(whole, characters, None, 0, characters)
    largest = sizes.index(max(sizes))
    validation = _documents_beside(largest, sizes, target, total)
    from_largest = target - _chosen_characters(sizes, validation)
    cut = largest if from_largest else None
    return Chosen(validation, target, cut, sizes[largest] - from_largest, characters)


def _chosen_characters(sizes, validation):
    return sum(size for size, chosen in zip(sizes, validation) if chosen)


def _whole_documents(sizes, target, total):
    """Return a byte for each document, 1 for validation, spread evenly over all (error diffusion).

    A document is taken where that brings validation nearer to its share of the text so far."""
    validation = bytearray(len(sizes))
    owed = 0   # characters that validation still lacks of its share so far, times total
    for number, size in enumerate(sizes):
        owed += target * size
        if 2 * owed >= size * total:
            validation[number] = 1
            owed -= size * total
    return validation


def _documents_beside(largest, sizes, target, total):
    """Return a byte for each document, 1 for validation, where the end of the largest is to follow.

    A document is taken where validation lacks all of it, and where the largest document would not
    be long enough for what validation lacks. So what is lacking at the end is in the largest."""
    validation = bytearray(len(sizes))
    owed = 0   # characters that validation still lacks of its share so far, times total
    for number, size in enumerate(sizes):
        if number == largest:
            continue
        owed += target * size
        if owed >= size * total or owed + target * sizes[largest] >= sizes[largest] * total:
            validation[number] = 1
            owed -= size * total
    return validation


def write_dataset(folder, splits, tokenizer, source, shard_tokens=sys.maxsize):
    """Write {split: iterable of (ids, source bytes)} and meta.json into folder; returns meta.

    source: dict(name, url, sha256, stand_in) of the text. A split of more than shard_tokens becomes several files. No file
    gets its name before all are written, and meta.json with their hashes comes first: interrupted at any instant, the folder
    holds what it held, or something that is noticed.

    Raises ValueError for a split that is too short to train on."""
    dtype = 'uint16' if tokenizer.vocab_size <= 1 << 16 else 'uint32'
    meta = dict(format=1, tokenizer=tokenizer.state(), vocab_size=tokenizer.vocab_size, dtype=dtype, splits={}, source=source)
    os.makedirs(folder, exist_ok=True)
    _remove_stale_parts(folder)
    part = os.path.join(folder, f'{{}}.{os.getpid()}.part')
    try:
        for split, chunks in splits.items():
            meta['splits'][split] = _write_split(part, split, chunks, '<u2' if dtype == 'uint16' else '<u4', shard_tokens)
        for split, info in meta['splits'].items():
            if info['tokens'] < 2:   # a token and the next one, which is its target
                noun = 'token' if info['tokens'] == 1 else 'tokens'
                raise ValueError(f'the {split} split has {info["tokens"]} {noun}, '
                                 f'and a model needs 2 or more')
        with open(part.format('meta.json'), 'w', encoding='utf-8') as f:
            json.dump(meta, f, indent=1)
        names = ['meta.json'] + [name for info in meta['splits'].values() for name in info['sha256']]
        for name in names:
            os.replace(part.format(name), os.path.join(folder, name))
        for path in (path for split in ('train', 'val', 'test') for path in _shards(folder, split, all_of_them=True)):
            if os.path.basename(path) not in names:
                os.remove(path)   # of the dataset that was here before
    finally:
        for path in glob.glob(os.path.join(glob.escape(folder), f'*.{os.getpid()}.part')):
            os.remove(path)
        with contextlib.suppress(OSError):
            os.rmdir(folder)   # if nothing is in it
    return meta


def _remove_stale_parts(folder):
    """Remove the parts of token files that a process left behind when it was killed.

    The name of a part holds the number of its process. A part without one is a download's, which
    is taken up again."""
    for path in glob.glob(os.path.join(glob.escape(folder), '*.part')):
        named = re.search(r'\.(\d+)\.part$', path)
        if named and not _is_running(int(named[1])):
            with contextlib.suppress(OSError):   # on Windows an open file cannot be removed
                os.remove(path)


def _is_running(pid):
    """Return whether there is a process of that number, False where the system cannot tell."""
    if os.name != 'posix':   # on Windows os.kill(pid, 0) would send Ctrl-C
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True   # another user's
    except (ProcessLookupError, OverflowError):
        return False
    return True


def _write_split(part, split, chunks, dtype, shard_tokens):
    """Write the files of a split, each as part.format(name); returns what meta.json says of them."""
    info, digests, room, file = dict(tokens=0, bytes=0), {}, 0, None
    try:
        for ids, size in chunks:
            ids = np.asarray(ids).astype(dtype)
            info['tokens'], info['bytes'] = info['tokens'] + len(ids), info['bytes'] + size
            while len(ids):
                if room == 0:
                    if file:
                        file.close()
                    name, room = f'{split}_{len(digests):03d}.bin', shard_tokens
                    file, digests[name] = open(part.format(name), 'wb'), hashlib.sha256()
                now, ids = ids[:room], ids[room:]
                file.write(now)
                digests[name].update(now)
                room -= len(now)
    finally:
        if file:
            file.close()
    if len(digests) == 1:
        os.replace(part.format(name), part.format(f'{split}.bin'))
        digests = {f'{split}.bin': digests[name]}
    return dict(info, sha256={name: digest.hexdigest() for name, digest in digests.items()})


def _meta_text(folder):
    """Return what a folder's meta.json holds, '' for token files without one, None without any."""
    try:
        with open(os.path.join(folder, 'meta.json'), encoding='utf-8') as f:
            return f.read()
    except (OSError, ValueError):
        return '' if _shards(folder, 'train') or _shards(folder, 'val') else None


def _in_words(meta_text):
    """Return a dataset's tokenizer, size and source, as a note names what was replaced."""
    try:
        meta = json.loads(meta_text)
        tokens = meta['splits']['train']['tokens']
        return (f'dataset that was there: {meta["tokenizer"]["kind"]}, {tokens:,} training tokens, '
                f'from {meta["source"]["name"]}')
    except (ValueError, LookupError, TypeError, RecursionError):
        return 'token files that were there'


def write_prepared(folder, splits, tokenizer, source, shard_tokens=sys.maxsize, more=''):
    """write_dataset for a prepare script, which says what came of it; fails where it cannot be written."""
    before = _meta_text(folder)
    try:
        meta = write_dataset(folder, splits, tokenizer, source, shard_tokens)
    except OSError as error:
        fail(f'{folder} cannot be written: {error.strerror or error}; make room, or type --data_dir=FOLDER for another place')
    except ValueError as error:
        fail(f'{folder} is not written: {error}; type --input=FILE for a longer text')
    if before not in (None, _meta_text(folder)):
        tell(f'note: {folder} replaces the {_in_words(before)}')
    counts = ', '.join(f'{split} {info["tokens"]:,}' + f' in {len(info["sha256"])} files' * (len(info['sha256']) > 1)
                       for split, info in meta['splits'].items())
    tell(f'{folder}: {meta["vocab_size"]:,} symbols, tokens: {counts}{more}')
    return meta


def as_typed(text):
    """Return a word of the command line as the text that was typed.

    In a locale of ASCII, Python hands each byte of a character above 127 on as half of a surrogate
    pair. Text that was not typed in UTF-8 is returned as it is."""
    try:
        return text.encode('utf-8', 'surrogateescape').decode('utf-8', 'surrogateescape')
    except UnicodeEncodeError:   # other halves of pairs, from a config file or from Windows
        return text


def read_prompt(start, longest=1 << 24):
    """Return the text that a knob `start` stands for: itself, FILE:path, or - for standard input.

    Line ends stay as they are. Fails for more than `longest` characters."""
    if start == '-' and sys.stdin is None:
        fail('--start=- reads standard input, and there is none; type --start=TEXT or --start=FILE:path')
    try:
        if start == '-':
            text = _read_stdin(longest + 1)
        elif start.startswith('FILE:'):
            path = os.path.expanduser(start.removeprefix('FILE:'))
            # utf-8-sig skips the mark with which editors on Windows begin a file
            with open(path, encoding='utf-8-sig', newline='') as f:
                text = f.read(longest + 1)
        else:
            text = as_typed(start)
    except (OSError, UnicodeDecodeError) as error:
        fail(f'--start={start}: {error}; FILE: and - take text in UTF-8; type --start=TEXT')
    if len(text) > longest:
        fail(f'--start: a prompt of more than {longest:,} characters, far more than a model sees; type --start=FILE:path for a '
             f'shorter one')
    return text


def _read_stdin(longest):
    """Return at most `longest` characters of standard input, which is UTF-8 in any locale."""
    if not hasattr(sys.stdin, 'buffer'):   # replaced by a stream of text
        return sys.stdin.read(longest).removeprefix('\ufeff')
    decoded = io.TextIOWrapper(sys.stdin.buffer, encoding='utf-8-sig', newline='')
    try:
        return decoded.read(longest)
    finally:
        decoded.detach()   # else collecting `decoded` would close standard input


# ---- reading data --------------------------------------------------------------------------------------------------

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
        paths = _shards(self.folder, split)
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


def find_dataset(name, data_dir='data', needs=('train', 'val'), knob='dataset'):
    """The folder of a dataset, and whether its token files are there; fails for a name that is a path."""
    if not re.fullmatch(r'[\w][\w.-]*', name):
        fail(f'{knob}={name!r} is not a name: letters, digits, _ - and . are allowed, and its folder is in {data_dir}/; '
             f'type --{knob}={"shakespeare_char" if knob == "dataset" else "mine"}')
    folder = os.path.join(data_dir, name)
    return folder, all(_shards(folder, split) for split in needs)


def open_dataset(name, data_dir='data', needs=('train', 'val')):
    """The Dataset of that name; fails where a split that is needed is not there, saying how to make it."""
    folder, ready = find_dataset(name, data_dir, needs)
    if not ready:
        fail(_missing(name, data_dir, needs))
    return Dataset(name, data_dir)


def _missing(name, data_dir, needs=('train', 'val'), why=''):
    folder = os.path.join(data_dir, name)
    missing = [f'{split}.bin' for split in needs if not _shards(folder, split)]
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


def prepare_missing(name, data_dir, prepare):
    """Make a dataset that is missing by `prepare`, a script beside this file with its flags; fails where that cannot help.

    Under torchrun one rank of each machine does it, while the others go on to wait for it."""
    folder, ready = find_dataset(name, data_dir)
    if ready:
        return
    makes = next((made for made, command in PREPARE.items() if f'python {prepare}'.startswith(command)), name)
    if not prepare or makes != name:
        fail(_missing(name, data_dir, why=f', and prepare={prepare!r} makes {makes}' * bool(prepare)))
    try:
        script, *flags = shlex.split(prepare)
        path = os.path.join(os.path.dirname(os.path.abspath(__file__)), script)
        if not os.path.isfile(path):
            raise ValueError(f'no script {script} beside train.py')
    except ValueError as error:
        fail(f'prepare={prepare!r}: {error}; it takes a script and its flags; type --prepare="prepare_shakespeare.py"')
    if os.environ.get('LOCAL_RANK', '0') == '0':
        tell(f'{folder} is missing: running {prepare}')
        status = subprocess.run([sys.executable, path, *flags, f'--data_dir={data_dir}']).returncode
        if status:
            sys.exit(status if status > 0 else 128 - status)
        if not find_dataset(name, data_dir)[1]:
            fail(f'{folder} still has no train.bin and val.bin: prepare={prepare!r} makes another dataset; '
                 f'type its name as --dataset')


def _shards(folder, split, all_of_them=False):
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
