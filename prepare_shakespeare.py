"""
Tiny Shakespeare (char-rnn's file) to token files: 90 % training, 10 % validation.

    python prepare_shakespeare.py                     # characters -> data/shakespeare_char/
    python prepare_shakespeare.py --tokenizer=gpt2    # GPT-2's BPE -> data/shakespeare/
    python prepare_shakespeare.py --input=FILE        # a local copy instead of the download

Reads the network or FILE; writes train.bin, val.bin and meta.json, and what it downloads as input.txt.
As characters: 65 symbols, 1,003,854 and 111,540 tokens; as GPT-2's BPE: 301,966 and 36,059.
"""
import contextlib
import hashlib
import os

from lib.configurator import check, configure, exit_on_signals
from lib.console import fail, tell
from lib.data import find_dataset
from lib.prepare import download, encode_all, pieces, stand_in_text, write_prepared
from lib.tokenizers import make_tokenizer

tokenizer = 'char'   # 'char', 'byte' or 'gpt2'
input = ''           # a local copy of the text, instead of the download
data_dir = 'data'    # the dataset becomes a folder in here
url = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'  # where it is downloaded from
stand_in = False     # if the download fails, use text that every Python ships instead, marked as such
configure(globals(), first='input', configs=False)

LONGEST = 1 << 28   # bytes of a text
SIZE, SHA256 = 1_115_394, '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'

names = {'char': 'shakespeare_char', 'byte': 'shakespeare_byte', 'gpt2': 'shakespeare'}
check(dict(tokenizer=tokenizer), tokenizer=tuple(names))
folder, ready = find_dataset(names[tokenizer], data_dir)
exit_on_signals()   # and what is half-written is removed; a download goes on where it stopped
source = dict(name='Tiny Shakespeare', url=url, sha256=SHA256, stand_in=False)
path = input or os.path.join(folder, 'input.txt')

try:
    if not input:
        os.makedirs(folder, exist_ok=True)
        with open(path, 'rb') if os.path.exists(path) else open(os.devnull, 'rb') as f:
            have = hashlib.sha256(f.read()).hexdigest() == SHA256
        if not have:
            download(url, path, SIZE, SHA256)
    with open(path, 'rb') as f:
        raw = f.read(LONGEST + 1)
except OSError as error:
    with contextlib.suppress(OSError):
        os.rmdir(folder)   # if it is empty
    if input or not stand_in or ready:   # a stand-in never takes the place of what is there
        fail(f'{error}; ' + ('--input takes a text file' if input else
             f'type python prepare_shakespeare.py --tokenizer={tokenizer} --input=FILE for a local copy of input.txt, or '
             f'--stand_in to go on with another text'))
    raw = stand_in_text().encode('utf-8')
    source = dict(name="the topics of Python's language reference (pydoc_data.topics)", url=None, stand_in=True,
                  instead_of='TINY SHAKESPEARE', reason=f'the download failed: {error}')

if len(raw) > LONGEST:
    fail(f'{path} has more than the {LONGEST:,} bytes that are read at once here; '
         f'type python prepare_text.py --input=FILE --name=NAME')
source['sha256'] = hashlib.sha256(raw).hexdigest()
if not source['stand_in'] and source['sha256'] != SHA256:
    source.update(name=os.path.basename(input), url=None)
    tell(f'note: {input} is not the Tiny Shakespeare file; taken as it is and recorded under its own name')
try:
    text = raw.decode('utf-8-sig')   # without the mark with which editors on Windows begin a file
except UnicodeDecodeError as error:
    fail(f'{path} is not UTF-8 (byte {error.start}); convert it first: iconv -f latin1 -t utf-8')

cut = int(0.9 * len(text))
if cut == 0:
    fail(f'{path} is too short to split: it has {len(text)} characters; use a text of some thousands')
parts = dict(train=text[:cut], val=text[cut:])
vocabulary = make_tokenizer(tokenizer, text)
write_prepared(folder, {split: encode_all(vocabulary, pieces([part])) for split, part in parts.items()}, vocabulary, source)
