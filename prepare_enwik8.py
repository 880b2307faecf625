"""
enwik8, the first 100,000,000 bytes of the English Wikipedia, to token files: 90, 5 and 5 million bytes.

    python prepare_enwik8.py                      # bytes -> data/enwik8/
    python prepare_enwik8.py --tokenizer=gpt2     # GPT-2's BPE -> data/enwik8_gpt2/
    python prepare_enwik8.py --input=enwik8.zip   # a local copy: the zip, a .gz, or the text itself
    python prepare_enwik8.py --input=head.gz --partial   # the beginning of it, split 90/5/5 %

Reads the network or FILE; writes train.bin, val.bin, test.bin and meta.json, and what it downloads as data/enwik8/enwik8.zip.
"""
import gzip
import hashlib
import os
import zlib

import numpy as np

from lib.configurator import check, configure, exit_on_signals
from lib.console import fail
from lib.prepare import download, encode_all, pieces, unzip, write_prepared
from lib.tokenizers import make_tokenizer

tokenizer = 'byte'   # 'byte' or 'gpt2'
input = ''           # a local copy, instead of the download: .zip, .gz or the text itself
partial = False      # take a file that is shorter than enwik8, and mark the dataset as partial
data_dir = 'data'    # the dataset becomes a folder in here
url = 'https://mattmahoney.net/dc/enwik8.zip'   # where it is downloaded from
configure(globals(), first='input', configs=False)

ZIP_SIZE, ZIP_SHA256 = 36_445_475, '547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc'
SIZE, SHA256 = 100_000_000, '2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8'

names = {'byte': 'enwik8', 'gpt2': 'enwik8_gpt2'}
check(dict(tokenizer=tokenizer), tokenizer=tuple(names))
folder = os.path.join(data_dir, names[tokenizer])
exit_on_signals()   # and what is half-written is removed; a download goes on where it stopped
path = input or os.path.join(data_dir, 'enwik8', 'enwik8.zip')
vocabulary = make_tokenizer(tokenizer)   # first, since it may want a download of its own

try:
    if not input and not (os.path.exists(path) and os.path.getsize(path) == ZIP_SIZE):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        download(url, path, ZIP_SIZE, ZIP_SHA256)
    with open(path, 'rb') as f:
        zipped = f.read(2) == b'PK'
    if zipped:
        raw = unzip(path, 'enwik8', SIZE)
    else:
        with gzip.open(path) if path.endswith('.gz') else open(path, 'rb') as f:
            raw = f.read(SIZE + 1)   # never more than that, whatever a .gz unpacks to
except (OSError, EOFError, zlib.error) as error:   # gzip's own errors are OSErrors
    fail(f'{error if path in str(error) else f"{path}: {error}"}; type python prepare_enwik8.py --tokenizer={tokenizer} '
         f'--input=FILE for a local copy of enwik8.zip, enwik8.gz or enwik8, whole; a part of it (--partial) is a .gz or the '
         f'text itself')

digest = hashlib.sha256(raw).hexdigest()
if len(raw) >= SIZE and digest != SHA256:
    fail(f'{path} is not enwik8: {len(raw):,} bytes or more with another SHA-256; for another text type '
         f'python prepare_text.py --input=FILE --name=NAME')
if not raw.startswith(b'<mediawiki xmlns='):
    fail(f'{path} does not begin as enwik8 does; for another text type python prepare_text.py --input=FILE --name=NAME')
if len(raw) < SIZE and not partial:
    fail(f'{path} has {len(raw):,} bytes and enwik8 {SIZE:,}; type --partial to take it as a part of enwik8')
if len(raw) < 1000:
    fail(f'{path} has {len(raw):,} bytes, too few to split in three; type --input=FILE for a longer part')
partial = len(raw) < SIZE
source = dict(name='enwik8' + f', {len(raw):,} bytes of it' * partial, url=None if input else url, sha256=digest,
              stand_in=False, partial=partial)


def boundary(share):
    """Where a split ends: for BPE not inside of a character."""
    cut = int(share * len(raw))
    while tokenizer == 'gpt2' and cut < len(raw) and raw[cut] & 0xC0 == 0x80:
        cut += 1
    return cut


def encoded(part):
    """The (ids, source bytes) of a split."""
    if tokenizer == 'byte':
        return [(np.frombuffer(part, dtype=np.uint8), len(part))]
    text = part.decode('utf-8', 'replace')   # the end of a partial file may be half a character
    return encode_all(vocabulary, pieces([text]))


cuts = [0, boundary(0.9), boundary(0.95), len(raw)]
parts = {split: raw[start:end] for split, start, end in zip(('train', 'val', 'test'), cuts, cuts[1:])}
write_prepared(folder, {split: encoded(part) for split, part in parts.items()}, vocabulary, source,
               more=' (PARTIAL)' * partial)
