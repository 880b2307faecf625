"""
From text to token files: download, unpack, choose documents, encode, write, and the stand-in text.

lib/data.py describes the files of a dataset.
"""
import contextlib
import glob
import hashlib
import json
import os
import re
import shlex
import string
import subprocess
import sys
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from lib.console import fail, tell
from lib.data import HOW_TO_MAKE, find_dataset, has_headers, missing, plain_shards, shards_of
from lib.tokenizers import token_sizes

HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))   # the scripts' folder
PIECE = 1 << 19   # characters that are tokenized at a time
# {how a file begins: (what the file is, how to get its text)}
NOT_TEXTS = {
    b'%PDF-': ('a PDF', 'export its text, as pdftotext does'),
    b'PK\x03\x04': ('a zip archive, as .docx, .odt and .epub files are',
                    'unpack it, or save it as plain text in the program that made it'),
    b'\xd0\xcf\x11\xe0': ('a file of an office program, as .doc files are',
                         'save it as plain text in the program that made it'),
    b'{\\rtf': ('rich text (RTF)', 'save it as plain text in the program that made it'),
    b'\x1f\x8b': ('compressed by gzip', 'unpack it by gunzip')}


# ---- where the text is from ----------------------------------------------------------------------

def download(url, path, size, sha256, tries=4):
    """Fetch url to path; the file appears there only once its size and SHA-256 are right.

    size: bytes. When a try breaks off, the bytes received stay in path.part. The next try goes on
    from there, in this process or in a later one. Raises OSError with the reason."""
    part = path + '.part'
    reason = None
    for attempt in range(tries):
        if attempt:
            time.sleep(2 ** (attempt - 1))
        try:
            _fetch(url, part, size)
            _verify(url, part, size, sha256)
            os.replace(part, path)
            return
        except (OSError, ValueError) as error:   # the errors of requests are OSErrors
            reason = _plain_reason(error)
            if isinstance(error, ValueError):   # the URL is malformed, and would be again
                break
    if os.path.exists(part) and os.path.getsize(part) == 0:
        os.remove(part)
    raise OSError(f'{type(reason).__name__}: {str(reason)[:300]}')


def _fetch(url, part, size):
    """Fetch url into the file `part`, from where an earlier try ended.

    Stop soon after `size` bytes if there are more."""
    import requests  # imported here: training on data that exists does without

    have = os.path.getsize(part) if os.path.exists(part) else 0
    headers = {}
    if 0 < have < size:
        headers = {'Range': f'bytes={have}-', 'Accept-Encoding': 'identity'}
    with requests.get(url, stream=True, timeout=(10, 30), headers=headers) as reply:
        reply.raise_for_status()
        sent = reply.headers.get('Content-Range', '')
        resumed = reply.status_code == 206 and sent.startswith(f'bytes {have}-')
        with open(part, 'ab' if resumed else 'wb') as f:
            for chunk in reply.iter_content(1 << 14):
                f.write(chunk)
                if f.tell() > size:
                    break


def _verify(url, part, size, sha256):
    """Remove the file `part` and raise OSError where it is not the file expected from url.

    A reply that broke off raised an error before, if it had named its length. Any other shorter
    file is taken for another one, such as a page."""
    got = os.path.getsize(part)
    with open(part, 'rb') as f:
        digest = hashlib.file_digest(f, 'sha256').hexdigest()
    if got != size or digest != sha256:
        os.remove(part)
        raise OSError(f'{url} did not send the file expected: {got:,} bytes (not {size:,}), '
                      f'SHA-256 {digest[:12]}…')


def _plain_reason(error):
    """Return the error of urllib3 that requests wraps, or the error itself."""
    if not error.args:
        return error
    return getattr(error.args[0], 'reason', error)


def unzip(path, member, size):
    """Return the bytes of one member of a zip file, which must be exactly `size` of them.

    The other members are ignored, and nothing is written, so a path that climbs out of the folder
    does no harm. Raises OSError with the reason."""
    try:
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo(member)
            # the other methods unpack without a bound
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f'compression method {info.compress_type}')
            with archive.open(info) as f:
                raw = f.read(size + 1)   # one more: the checksum is verified at the end
    except (OSError, KeyError, ValueError, RuntimeError, EOFError, zlib.error,
            zipfile.BadZipFile) as error:
        reason = str(error)[:300] or type(error).__name__
        raise OSError(f'{path} is not the zip file expected: {reason}') from error
    if len(raw) != size:
        raise OSError(f'{path} is not the zip file expected: {member} has not {size:,} bytes')
    return raw


def stand_in_text():
    """Return some 700 kB of English that every Python ships: the language reference's topics."""
    from pydoc_data.topics import topics
    return '\n\n'.join(topics[name] for name in sorted(topics))


def not_a_text(first, name):
    """Return what a file is that is not text in UTF-8, and what to type; '' for any other file.

    first: the file's first bytes. name: the file as a shell command names it."""
    for beginning, (what, advice) in NOT_TEXTS.items():
        if first.startswith(beginning):
            return f'{what}, and only text is read; {advice}, and type --input=FILE.txt'
    for order in ('le', 'be'):
        text = first[:4096].decode(f'utf-16-{order}', 'ignore')
        if is_readable(text.removeprefix('\ufeff')):   # without the mark, if there is one
            return (f'UTF-16, and here only UTF-8 is read; '
                    f'convert it first: iconv -f utf-16{order} -t utf-8 {name} > FILE')
    return ''


def is_readable(text):
    """Return whether nine of ten characters are ASCII: letters, digits, marks, blanks.

    Text in UTF-8 that is read as UTF-16 by mistake has almost none of them."""
    known = sum(character in string.printable for character in text)
    return bool(text) and known > 0.9 * len(text)


# ---- choosing the documents for validation -------------------------------------------------------

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


def documents_from(sizes, first):
    """Choose all documents from number `first` on for validation."""
    validation = bytearray(len(sizes))
    validation[first:] = b'\1' * (len(sizes) - first)
    characters = sum(sizes[first:])
    return Chosen(validation, characters, None, 0, characters)


def _chosen_characters(sizes, validation):
    """Return the characters of the documents that are chosen."""
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


# ---- from text to tokens -------------------------------------------------------------------------

def pieces(blocks, size=PIECE):
    """Yield one text, given in blocks, in pieces of about `size` characters.

    The pieces' tokens, put together, are the whole text's: a piece ends between a character that is
    not white space and a blank or line break, where GPT-2's pattern always cuts. After 16 times the
    size without such a place, a piece ends anywhere."""
    boundary = re.compile(r'\S(?=[ \n])')
    held = ''
    for block in blocks:
        held += block
        start = 0
        while len(held) - start > size:
            found = boundary.search(held, start + size - 1)
            if not found and len(held) - start <= 16 * size:
                break
            cut = found.end() if found else start + size
            yield held[start:cut]
            start = cut
        held = held[start:]
    if held:
        yield held


def encode_all(tokenizer, texts):
    """Yield (token ids, bytes of the text) for each text, in order, using all cores.

    Only a few texts are in memory at a time."""
    sizes = token_sizes(tokenizer)[0].astype(np.uint16)

    def encode(text):
        ids = tokenizer.encode(text)
        return ids, int(sizes.take(ids).sum(dtype=np.int64))
    workers = os.cpu_count() or 1
    if hasattr(os, 'sched_getaffinity'):   # the cores that this process may use
        workers = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(workers) as pool:   # threads suffice: tiktoken releases Python's lock
        waiting = []
        for text in texts:
            waiting.append(pool.submit(encode, text))
            if len(waiting) > 2 * workers:
                yield waiting.pop(0).result()
        for done in waiting:
            yield done.result()


# ---- from tokens to files ------------------------------------------------------------------------

def write_prepared(folder, splits, tokenizer, source, shard_tokens=sys.maxsize, more=''):
    """Call write_dataset for a prepare script, and say what it wrote; return meta.

    Fail where it cannot write, and where shards of llm.c would be replaced. more: added to the line
    that says what was written."""
    if has_headers(folder):
        fail(f'{folder} holds shards of llm.c or modded-nanogpt, and is not written to; '
             f'type --name=NAME or --data_dir=FOLDER for another place')
    before = _meta_text(folder)
    try:
        meta = write_dataset(folder, splits, tokenizer, source, shard_tokens)
    except OSError as error:
        fail(f'{folder} cannot be written: {error.strerror or error}; make room, '
             f'or type --data_dir=FOLDER for another place')
    except ValueError as error:
        fail(f'{folder} is not written: {error}; type --input=FILE for a longer text')
    if before not in (None, _meta_text(folder)):
        tell(f'note: {folder} replaces the {_in_words(before)}')
    counts = []
    for split, info in meta['splits'].items():
        count = f'{split} {info["tokens"]:,}'
        if len(info['sha256']) > 1:
            count += f' in {len(info["sha256"])} files'
        counts.append(count)
    tell(f'{folder}: {meta["vocab_size"]:,} symbols, tokens: {", ".join(counts)}{more}')
    return meta


def _meta_text(folder):
    """Return what a folder's meta.json holds, '' for token files without one, None without any."""
    try:
        with open(os.path.join(folder, 'meta.json'), encoding='utf-8') as f:
            return f.read()
    except (OSError, ValueError):
        return '' if shards_of(folder, 'train') or shards_of(folder, 'val') else None


def _in_words(meta_text):
    """Return a dataset's tokenizer, size and source, as a note names what was replaced."""
    try:
        meta = json.loads(meta_text)
        tokens = meta['splits']['train']['tokens']
        return (f'dataset that was there: {meta["tokenizer"]["kind"]}, {tokens:,} training tokens, '
                f'from {meta["source"]["name"]}')
    except (ValueError, LookupError, TypeError, RecursionError):
        return 'token files that were there'


def write_dataset(folder, splits, tokenizer, source, shard_tokens=sys.maxsize):
    """Write the token files and meta.json of a dataset into folder; return meta.

    splits: {split: iterable of (ids, source bytes)}. source: dict(name, url, sha256, stand_in) of
    the text. A split of more than shard_tokens becomes several files.

    No file gets its name before all are written, and meta.json with their hashes comes first. So a
    process that is killed at any instant leaves what was there, or files that do not match
    meta.json, and opening these fails.

    Raises ValueError for a split that is too short to train on."""
    dtype = 'uint16' if tokenizer.vocab_size <= 1 << 16 else 'uint32'
    meta = dict(format=1, tokenizer=tokenizer.state(), vocab_size=tokenizer.vocab_size,
                dtype=dtype, splits={}, source=source)
    os.makedirs(folder, exist_ok=True)
    _remove_stale_parts(folder)
    try:
        little_endian = np.dtype(dtype).newbyteorder('<')
        for split, chunks in splits.items():
            info = _write_split(folder, split, chunks, little_endian, shard_tokens)
            meta['splits'][split] = info
        _check_lengths(meta['splits'])
        with open(_part(folder, 'meta.json'), 'w', encoding='utf-8') as f:
            json.dump(meta, f, indent=1)
        names = ['meta.json']
        for info in meta['splits'].values():
            names += info['sha256']
        for name in names:
            os.replace(_part(folder, name), os.path.join(folder, name))
        for split in ('train', 'val', 'test'):
            for path in plain_shards(folder, split, all_of_them=True):
                if os.path.basename(path) not in names:
                    os.remove(path)   # the dataset that was here before had more files
    finally:
        for path in glob.glob(os.path.join(glob.escape(folder), f'*.{os.getpid()}.part')):
            os.remove(path)
        with contextlib.suppress(OSError):   # the folder is not empty
            os.rmdir(folder)
    return meta


def record(folder, meta):
    """Write meta.json of token files that are there. Raises OSError where it cannot be written."""
    part = _part(folder, 'meta.json')
    try:
        with open(part, 'w', encoding='utf-8') as f:
            json.dump(meta, f, indent=1)
        os.replace(part, os.path.join(folder, 'meta.json'))
    finally:
        if os.path.exists(part):
            os.remove(part)


def _part(folder, name):
    """Return the path at which this process writes a file before the file gets its name."""
    return os.path.join(folder, f'{name}.{os.getpid()}.part')


def _write_split(folder, split, chunks, dtype, shard_tokens):
    """Write the files of a split, each as a part; return what meta.json says about the split."""
    tokens = 0
    source_bytes = 0
    digests = {}   # file -> its hash
    room = 0       # tokens for which the open file has room
    file = None
    try:
        for ids, size in chunks:
            ids = np.asarray(ids).astype(dtype)
            tokens += len(ids)
            source_bytes += size
            while len(ids):
                if room == 0:
                    if file:
                        file.close()
                    name = f'{split}_{len(digests):03d}.bin'
                    file = open(_part(folder, name), 'wb')
                    digests[name] = hashlib.sha256()
                    room = shard_tokens
                fitting = ids[:room]
                file.write(fitting)
                digests[name].update(fitting)
                ids = ids[room:]
                room -= len(fitting)
    finally:
        if file:
            file.close()
    if len(digests) == 1:
        os.replace(_part(folder, name), _part(folder, f'{split}.bin'))
        digests = {f'{split}.bin': digests[name]}
    hashes = {name: digest.hexdigest() for name, digest in digests.items()}
    return dict(tokens=tokens, bytes=source_bytes, sha256=hashes)


def _check_lengths(splits):
    """Raise ValueError for a split too short to hold a token and the next one, its target."""
    for split, info in splits.items():
        if info['tokens'] < 2:
            noun = 'token' if info['tokens'] == 1 else 'tokens'
            raise ValueError(f'the {split} split has {info["tokens"]} {noun}, '
                             f'and a model needs 2 or more')


def _remove_stale_parts(folder):
    """Remove the parts of token files that a process left behind when it was killed.

    The name of such a part holds the number of its process. A part without a number is a
    download's, and download() resumes it."""
    for path in glob.glob(os.path.join(glob.escape(folder), '*.part')):
        numbered = re.search(r'\.(\d+)\.part$', path)
        if numbered and not _is_running(int(numbered[1])):
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


# ---- a dataset that training needs ---------------------------------------------------------------

def prepare_missing(name, data_dir, prepare):
    """Make a dataset where it is missing, by running a prepare script; fail where that cannot help.

    prepare: the script, beside train.py, and its flags. Under torchrun one rank of each machine
    runs it, and the others go on to wait for it."""
    folder, ready = find_dataset(name, data_dir)
    if ready:
        return
    if not prepare:
        fail(missing(name, data_dir))
    makes = dataset_made_by(prepare) or name
    if makes != name:
        fail(missing(name, data_dir, why=f', and prepare={prepare!r} makes {makes}'))
    try:
        script, *flags = shlex.split(prepare)
        path = os.path.join(HOME, script)
        if not os.path.isfile(path):
            raise ValueError(f'no script {script} beside train.py')
    except ValueError as error:
        fail(f'prepare={prepare!r}: {error}; it takes a script and its flags; '
             f'type --prepare="prepare_shakespeare.py"')
    if os.environ.get('LOCAL_RANK', '0') != '0':
        return
    tell(f'{folder} is missing: running {prepare}')
    status = subprocess.run([sys.executable, path, *flags, f'--data_dir={data_dir}']).returncode
    if status:
        sys.exit(status if status > 0 else 128 - status)
    _, ready = find_dataset(name, data_dir)
    if not ready:
        fail(f'{folder} still has no train.bin and val.bin: prepare={prepare!r} makes another '
             f'dataset; type its name as --dataset')


def dataset_made_by(prepare):
    """Return the name of the known dataset that a prepare script with its flags makes, or None."""
    words = ['python', *prepare.split()]
    for name, command in HOW_TO_MAKE.items():
        known = command.split()
        if words[:len(known)] == known:
            return name
    return None
