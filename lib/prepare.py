"""
From text to token files: download, unpack, split, encode, write, and the stand-in text.

lib/data.py says what the files of a dataset are.
"""
import contextlib
import glob
import hashlib
import json
import os
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

from lib.console import fail, tell
from lib.data import PREPARE, find_dataset, missing, shards_of
from lib.tokenizers import token_sizes

HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))   # the scripts' folder
PIECE = 1 << 19   # characters that are tokenized at a time

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
        for path in (path for split in ('train', 'val', 'test') for path in shards_of(folder, split, all_of_them=True)):
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


def prepare_missing(name, data_dir, prepare):
    """Make a dataset that is missing by `prepare`, a script beside this file with its flags; fails where that cannot help.

    Under torchrun one rank of each machine does it, while the others go on to wait for it."""
    folder, ready = find_dataset(name, data_dir)
    if ready:
        return
    makes = next((made for made, command in PREPARE.items() if f'python {prepare}'.startswith(command)), name)
    if not prepare or makes != name:
        fail(missing(name, data_dir, why=f', and prepare={prepare!r} makes {makes}' * bool(prepare)))
    try:
        script, *flags = shlex.split(prepare)
        path = os.path.join(HOME, script)
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
