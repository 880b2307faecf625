"""
enwik8, the first 100,000,000 bytes of the English Wikipedia, to token files.

    python prepare_enwik8.py                      # bytes -> data/enwik8/
    python prepare_enwik8.py --tokenizer=gpt2     # GPT-2's BPE -> data/enwik8_gpt2/
    python prepare_enwik8.py --tokenizer=bpe --vocab_size=1024    # -> data/enwik8_bpe/
    python prepare_enwik8.py --input=enwik8.zip   # a local copy: the zip, a .gz, or the text itself
    python prepare_enwik8.py --input=head.gz --partial   # the beginning of enwik8

The splits for training, validation and test have 90, 5 and 5 % of the bytes. A BPE is trained on
the training split.

Reads the network or FILE. Writes train.bin, val.bin, test.bin and meta.json, and the download as
data/enwik8/enwik8.zip.
"""
import gzip
import hashlib
import os
import zlib

import lib.early  # noqa: F401  # before NumPy and torch

import numpy as np

from lib.configurator import check, configure, exit_on_signals
from lib.console import fail
from lib.prepare import download, encode_all, pieces, unzip, write_prepared
from lib.tokenizers import check_vocab_size, make_tokenizer, train_bpe

tokenizer = 'byte'   # 'byte', 'gpt2', or 'bpe': trained on the training split
vocab_size = 1024    # symbols of 'bpe': 256 bytes, pairs that are merged, and <|endoftext|>
input = ''           # a local copy, instead of the download: .zip, .gz or the text itself
partial = False      # take a file that is shorter than enwik8, and mark the dataset as partial
data_dir = 'data'    # the dataset becomes a folder in here
url = 'https://mattmahoney.net/dc/enwik8.zip'   # address of the download
_, given = configure(globals(), first='input', configs=False)

ZIP_SIZE = 36_445_475   # bytes
ZIP_SHA256 = '547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc'
SIZE = 100_000_000      # bytes
SHA256 = '2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8'
NAMES = {'byte': 'enwik8', 'gpt2': 'enwik8_gpt2', 'bpe': 'enwik8_bpe'}
ANOTHER_TEXT = 'for another text type python prepare_text.py --input=FILE --name=NAME'


def read_bytes():
    """Return the bytes of the input or of the download, at most SIZE and one.

    Raises OSError, EOFError or zlib.error for a file that cannot be read."""
    if not input and not (os.path.exists(path) and os.path.getsize(path) == ZIP_SIZE):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        download(url, path, ZIP_SIZE, ZIP_SHA256)
    with open(path, 'rb') as f:
        is_zip = f.read(2) == b'PK'
    if is_zip:
        return unzip(path, 'enwik8', SIZE)
    opener = gzip.open if path.endswith('.gz') else open
    with opener(path, 'rb') as f:
        return f.read(SIZE + 1)   # the bound is for a .gz, which may unpack to any size


def check_bytes():
    """Fail for bytes that are not enwik8 or, with --partial, its beginning."""
    if len(raw) >= SIZE and digest != SHA256:
        fail(f'{path} is not enwik8: {len(raw):,} bytes or more with another SHA-256; '
             f'{ANOTHER_TEXT}')
    if not raw.startswith(b'<mediawiki xmlns='):
        fail(f'{path} does not begin as enwik8 does; {ANOTHER_TEXT}')
    if is_part and not partial:
        fail(f'{path} has {len(raw):,} bytes and enwik8 {SIZE:,}; '
             f'type --partial to take it as a part of enwik8')
    if len(raw) < 1000:
        fail(f'{path} has {len(raw):,} bytes, too few to split in three; '
             f'type --input=FILE for a longer part')


def boundary(share):
    """Return the byte at which a split ends. With BPE a split does not end inside a character."""
    cut = int(share * len(raw))
    if tokenizer != 'byte':
        while cut < len(raw) and raw[cut] & 0xC0 == 0x80:   # a character's byte after its first
            cut += 1
    return cut


def encoded(part):
    """Return the (ids, source bytes) of a split, in one or several chunks."""
    if tokenizer == 'byte':
        return [(np.frombuffer(part, dtype=np.uint8), len(part))]
    return encode_all(vocabulary, text_pieces(part))


def text_pieces(part):
    """Yield the text of a split in pieces."""
    return pieces([part.decode('utf-8', 'replace')])   # a partial file may end inside a character


check(dict(tokenizer=tokenizer), tokenizer=tuple(NAMES))
check_vocab_size(vocab_size, tokenizer, 'vocab_size' in given)
folder = os.path.join(data_dir, NAMES[tokenizer])
exit_on_signals()   # a signal removes what is half-written, but a download can be resumed
path = input or os.path.join(data_dir, 'enwik8', 'enwik8.zip')
if tokenizer != 'bpe':
    vocabulary = make_tokenizer(tokenizer)   # before enwik8 is read: it may have to be fetched
try:
    raw = read_bytes()
except (OSError, EOFError, zlib.error) as error:   # gzip's own errors are OSErrors
    reason = str(error)
    if getattr(error, 'strerror', None):
        reason = f'{path} cannot be read ({error.strerror})'
    elif path not in reason:
        reason = f'{path}: {reason}'
    fail(f'{reason}; type python prepare_enwik8.py --tokenizer={tokenizer} --input=FILE '
         f'for a local copy of enwik8.zip, enwik8.gz or enwik8, whole; '
         f'a part of it (--partial) is a .gz or the text itself')
digest = hashlib.sha256(raw).hexdigest()
is_part = len(raw) < SIZE
check_bytes()

source = dict(name='enwik8', url=None if input else url, sha256=digest, stand_in=False,
              partial=is_part)
remark = ''
if is_part:
    source['name'] = f'enwik8, {len(raw):,} bytes of it'
    remark = ' (PARTIAL)'
test_at = boundary(0.95)
val_at = boundary(0.9)
if tokenizer == 'bpe':
    vocabulary = train_bpe(text_pieces(raw[:val_at]), vocab_size)
splits = {'train': encoded(raw[:val_at]),
          'val': encoded(raw[val_at:test_at]),
          'test': encoded(raw[test_at:])}
write_prepared(folder, splits, vocabulary, source, more=remark)
