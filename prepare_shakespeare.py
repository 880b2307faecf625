"""
Tiny Shakespeare (char-rnn's file) to token files: 90 % training, 10 % validation.

    python prepare_shakespeare.py                     # characters -> data/shakespeare_char/
    python prepare_shakespeare.py --tokenizer=gpt2    # GPT-2's BPE -> data/shakespeare/
    python prepare_shakespeare.py --tokenizer=bpe --vocab_size=1024   # -> data/shakespeare_bpe/
    python prepare_shakespeare.py --input=FILE        # a local copy instead of the download

Reads the network or FILE. Writes train.bin, val.bin and meta.json, and the download as input.txt.
As characters, there are 65 symbols, 1,003,854 tokens for training and 111,540 for validation; as
GPT-2's BPE, 301,966 and 36,059 tokens; as a BPE of 1,024 symbols that is trained on the training
split, 411,268 and 49,422 tokens.
"""
import contextlib
import hashlib
import os
import shlex

import lib.early  # noqa: F401  # before NumPy and torch

from lib.configurator import check, configure, exit_on_signals
from lib.console import fail, tell
from lib.data import find_dataset
from lib.prepare import download, encode_all, not_a_text, pieces, stand_in_text, write_prepared
from lib.tokenizers import check_vocab_size, make_tokenizer, train_bpe

tokenizer = 'char'   # 'char', 'byte', 'gpt2', or 'bpe': trained on the training split
vocab_size = 1024    # symbols of 'bpe': 256 bytes, pairs that are merged, and <|endoftext|>
input = ''           # a local copy of the text, instead of the download
data_dir = 'data'    # the dataset becomes a folder in here
url = ('https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/'
       'input.txt')  # address of the download
stand_in = False     # if the download fails, use text that every Python ships, and mark it as such
_, given = configure(globals(), first='input', configs=False)

LONGEST = 1 << 28   # bytes of a text
SIZE = 1_115_394    # bytes of Tiny Shakespeare
SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
NAMES = {'char': 'shakespeare_char', 'byte': 'shakespeare_byte', 'gpt2': 'shakespeare',
         'bpe': 'shakespeare_bpe'}


def read_bytes():
    """Return the bytes of the input or of the download, at most LONGEST and one.

    Raises OSError with the reason."""
    if not input and not is_downloaded():
        os.makedirs(folder, exist_ok=True)
        download(url, path, SIZE, SHA256)
    with open(path, 'rb') as f:
        return f.read(LONGEST + 1)


def is_downloaded():
    """Return whether the file at path is Tiny Shakespeare."""
    if not os.path.exists(path):
        return False
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest() == SHA256


def check_stand_in(error):
    """Fail where the text could not be read, unless the stand-in text may take its place."""
    with contextlib.suppress(OSError):   # the folder is not empty
        os.rmdir(folder)
    if input:
        fail(f'--input={input} cannot be read ({error.strerror or error}); a text file is needed; '
             f'type --input=FILE')
    if ready or not stand_in:   # the stand-in never replaces a dataset that is there
        fail(f'{error}; type python prepare_shakespeare.py --tokenizer={tokenizer} --input=FILE '
             f'for a local copy of input.txt, or --stand_in to go on with another text')


def split_text(text):
    """Return {split: its part of the text}."""
    cut = int(0.9 * len(text))
    if cut == 0:
        fail(f'{path} is too short to split: it has {len(text)} characters; '
             f'use a text of some thousands')
    return {'train': text[:cut], 'val': text[cut:]}


check(dict(tokenizer=tokenizer), tokenizer=tuple(NAMES))
check_vocab_size(vocab_size, tokenizer, 'vocab_size' in given)
folder, ready = find_dataset(NAMES[tokenizer], data_dir)
exit_on_signals()   # a signal removes what is half-written, but a download can be resumed
source = dict(name='Tiny Shakespeare', url=url, stand_in=False)
path = input or os.path.join(folder, 'input.txt')
try:
    raw = read_bytes()
except OSError as error:
    check_stand_in(error)
    raw = stand_in_text().encode('utf-8')
    source = dict(name="the topics of Python's language reference (pydoc_data.topics)", url=None,
                  stand_in=True, instead_of='TINY SHAKESPEARE',
                  reason=f'the download failed: {error}')
if len(raw) > LONGEST:
    fail(f'{path} has more than the {LONGEST:,} bytes that this script reads at once; '
         f'type python prepare_text.py --input=FILE --name=NAME')
source['sha256'] = hashlib.sha256(raw).hexdigest()
problem = not_a_text(raw, shlex.quote(path))
if problem:
    fail(f'{path} is {problem}')
try:
    text = raw.decode('utf-8-sig')   # skips the mark with which editors on Windows begin a file
except UnicodeDecodeError as error:
    fail(f'{path} is not UTF-8 (byte {error.start:,}); convert it first, if it is Latin-1: '
         f'iconv -f latin1 -t utf-8 {shlex.quote(path)} > FILE')
if not source['stand_in'] and source['sha256'] != SHA256:
    source.update(name=os.path.basename(input), url=None)
    difference = f'it has {len(raw):,} bytes, not {SIZE:,}'
    if len(raw) == SIZE:
        difference = 'its SHA-256 is another'
    tell(f'note: {input} is not Tiny Shakespeare ({difference}): {folder} gets another text, '
         f'and published losses do not apply to it; to leave {folder} alone, type '
         f'python prepare_text.py --input={shlex.quote(input)} --name=NAME')
parts = split_text(text)
if tokenizer == 'bpe':
    vocabulary = train_bpe(pieces([parts['train']]), vocab_size)
else:
    vocabulary = make_tokenizer(tokenizer, text)
splits = {}
for split, part in parts.items():
    splits[split] = encode_all(vocabulary, pieces([part]))
write_prepared(folder, splits, vocabulary, source)
