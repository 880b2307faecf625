"""
Your own text to token files.

    python prepare_text.py --input=book.txt --name=mine                   # characters -> data/mine/
    python prepare_text.py --input=notes/ --name=notes --tokenizer=gpt2   # a folder's .txt, .md, .jsonl
    python prepare_text.py --input="*.jsonl.gz" --name=web --tokenizer=gpt2 --field=text

A document is a text file, a part of one between two <|endoftext|>, or a line of a .jsonl. The
splits are made of whole documents, spread evenly (a single document is cut, its last part is for
validation). In the token files <|endoftext|> stands between two documents, a line break where the
tokenizer has no such token. Each kind of file may be gzipped (.gz).

Reads the input three times, a little at a time; writes train.bin and val.bin (or shards) and
meta.json.
"""
import codecs
import glob
import gzip
import hashlib
import itertools
import json
import os
import shlex
import sys
import zlib
from array import array
from dataclasses import dataclass

from tqdm import tqdm

import data
from configurator import configure, exit_on_signals, fail
from data import encode_all, find_dataset, make_tokenizer, pieces, write_prepared

input = ''           # a file, a folder (all its .txt, .md, .jsonl, also .gz of these), or a pattern in quotes
name = ''            # of the dataset: a folder in data_dir
tokenizer = 'char'   # 'char', 'byte' or 'gpt2'
field = 'text'       # the one of a .jsonl's lines that holds the text
val_fraction = 0.1   # share of the documents (of a single one's characters) for validation
shard_tokens = 100_000_000  # tokens a file; more make several
data_dir = 'data'    # the dataset becomes a folder in here
configure(globals())

ENDINGS = ('.txt', '.md', '.jsonl', '.txt.gz', '.md.gz', '.jsonl.gz')   # what a folder's sweep takes
BLOCK = 1 << 20   # bytes read at a time
AGAIN = 'type python prepare_text.py --input=FILE_OR_FOLDER --name=NAME'


def stop(message):
    """fail(), with the progress bars out of the way."""
    with tqdm.external_write_mode(file=sys.stderr):
        fail(message)


def check_knobs():
    """Return the dataset's folder; fail for a knob that is not allowed."""
    if not input or not name:
        fail(f'--input and --name are needed: what to read and what to call it; {AGAIN}')
    folder, _ = find_dataset(name, data_dir, knob='name')
    if not 0 < val_fraction < 1:
        fail(f'val_fraction={val_fraction}: allowed is a share above 0 and below 1; '
             f'type --val_fraction=0.1')
    if shard_tokens < 1000:
        fail(f'shard_tokens={shard_tokens}: it must be 1000 or more; '
             f'type --shard_tokens=100000000')
    return folder


# ---- which files ---------------------------------------------------------------------------------

def find_files(folder):
    """Return the paths of the input's files, sorted; fail where one is in the dataset's folder."""
    if os.path.isdir(input):
        found = glob.glob(os.path.join(glob.escape(input), '**', '*'), recursive=True)
        paths = [path for path in found if path.lower().endswith(ENDINGS) and os.path.isfile(path)]
        if not paths:
            fail(f'{input} has no file that ends with {", ".join(ENDINGS)}; '
                 f'type --input=FILE for one with another ending')
    elif os.path.isfile(input):
        paths = [input]
    else:
        paths = [path for path in glob.glob(input, recursive=True) if os.path.isfile(path)]
        if not paths:
            fail(f'--input={input}: there is no such file, folder or match of a pattern '
                 f'(in quotes: "texts/*.txt"); {AGAIN}')
    inside = os.path.realpath(folder) + os.sep
    if any(os.path.realpath(path).startswith(inside) for path in paths):
        fail(f'{folder} holds the input and would be written to; '
             f'type --name for another, or move the input')
    return sorted(paths)


# ---- from files to documents ---------------------------------------------------------------------

class Reading:
    """One reading of the whole input, and what it has passed so far."""

    def __init__(self, bar):
        self.bar = bar
        self.bytes = 0   # of all files, unpacked
        self.digest = hashlib.sha256()   # of the same bytes

    def passed(self, block):
        """Count the bytes of a block that has been read."""
        self.bytes += len(block)
        self.digest.update(block)
        self.bar.update(len(block))


def documents(reading):
    """Yield (number, place, text) for the text of all files in turn, some of it at a time.

    number counts the documents that hold any text, from 0. place says where a document is."""
    number = 0
    begun = False   # whether the document has had any text so far
    for path in paths:
        for place, text in read_file(path, reading):
            if text is None:
                number += begun
                begun = False
            elif text:
                begun = True
                yield number, place, text


def read_file(path, reading):
    """Yield (place, text) for each bit of text, and (place, None) at each document's end."""
    if path.lower().removesuffix('.gz').endswith('.jsonl'):
        return read_lines(path, reading)
    return read_plain(path, reading)


def read_plain(path, reading):
    """Yield the documents of a plain text file, which <|endoftext|> stands between."""
    decoder = codecs.getincrementaldecoder('utf-8-sig')()
    held = ''
    before = 0   # bytes before the block
    for block in itertools.chain(blocks(path, reading), [b'']):
        try:
            held += decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            stop(f'{path} is not UTF-8 (near byte {before + error.start:,}); convert it first, '
                 f'if it is Latin-1: iconv -f latin1 -t utf-8 {shlex.quote(path)} > FILE')
        before += len(block)
        *whole, held = held.split(data.END_OF_TEXT)
        for text in whole:
            yield path, text
            yield path, None
        sure = len(held)
        if block:
            sure -= len(data.END_OF_TEXT)   # the last characters may be the beginning of a mark
        if sure > 0:
            yield path, held[:sure]
            held = held[sure:]
    yield path, None


def read_lines(path, reading):
    """Yield the documents of a .jsonl, one a line."""
    for number, line in numbered_lines(path, reading):
        if line.strip():
            place = f'{path}, line {number}'
            yield place, line_text(place, line)
            yield place, None


def numbered_lines(path, reading):
    """Yield (number, bytes of the line), from 1, a line in memory at a time."""
    number = 0
    held = []   # the parts of a line whose end has not been read
    for block in blocks(path, reading):
        first, *others = block.split(b'\n')
        held.append(first)
        for other in others:
            number += 1
            yield number, b''.join(held)
            held = [other]
    yield number + 1, b''.join(held)


def line_text(place, line):
    """Return the document in a line of a .jsonl; fail for a line without one."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        stop(f'{place} is not JSON: {error}; '
             f'give the file another ending than .jsonl if it is plain text')
    text = content.get(field) if isinstance(content, dict) else None
    if not isinstance(text, str):
        stop(f'{place}: no field {field!r} with a text; its fields are {kinds_of(content)}; '
             f'type --field=NAME')
    return text.encode('utf-8', 'replace').decode()   # JSON can hold half of a surrogate pair


def kinds_of(content):
    """Return a record's fields and their types in words."""
    if not isinstance(content, dict) or not content:
        return 'none'
    kinds = [f'{key} ({type(value).__name__})' for key, value in content.items()]
    return ', '.join(kinds)[:200]


def blocks(path, reading):
    """Yield the bytes of a file, unpacked where it ends with .gz, some at a time."""
    opened = gzip.open if path.lower().endswith('.gz') else open
    try:
        with opened(path, 'rb') as f:
            while block := f.read(BLOCK):
                reading.passed(block)
                yield block
    except (OSError, EOFError, zlib.error) as error:   # gzip's own errors are OSErrors
        stop(f'{path} cannot be read: {error}; {AGAIN}')


# ---- from documents to splits --------------------------------------------------------------------

@dataclass
class Survey:
    """What the first reading of the input finds."""
    sizes: array   # characters of each document
    symbols: set   # the text's different characters, where --tokenizer=char collects them
    bytes: int     # of all files, unpacked
    sha256: str    # of the same bytes


def survey():
    """Read the whole input once, and return what is in it; fail where it holds no text."""
    sizes = array('q')
    symbols = set()
    with tqdm(desc='reading', unit='B', unit_scale=True, leave=False, disable=None) as bar:
        reading = Reading(bar)
        for number, _, text in documents(reading):
            if number == len(sizes):
                sizes.append(0)
            sizes[number] += len(text)
            if tokenizer == 'char':
                symbols.update(text)
    if sum(sizes) < 2:
        fail(f'{input} holds no text: {len(paths)} file(s), {sum(sizes)} characters; {AGAIN}')
    return Survey(sizes, symbols, reading.bytes, reading.digest.hexdigest())


def split_text(split, bar):
    """Yield the text of one split, with a separator between its documents."""
    number_of_documents = len(found.sizes)
    for_validation = max(1, round(val_fraction * number_of_documents))   # documents
    characters = sum(found.sizes)
    cut = min(max(1, int((1 - val_fraction) * characters)), characters - 1)
    last = None   # number of the document that the split's text so far ends with
    at = 0   # characters so far, where a single document is cut
    for number, _, text in documents(Reading(bar)):
        if number_of_documents == 1:
            left = max(0, cut - at)
            at += len(text)
            text = text[:left] if split == 'train' else text[left:]
        else:
            before = number * for_validation // number_of_documents
            after = (number + 1) * for_validation // number_of_documents
            if (before != after) != (split == 'val'):
                continue
        if last not in (None, number):
            yield separator
        yield text
        last = number


def write_splits():
    """Write both splits into the dataset's folder; return its meta.json."""
    source = dict(name=input, url=None, sha256=found.sha256, stand_in=False, files=len(paths),
                  documents=len(found.sizes))
    noun = 'document' if len(found.sizes) == 1 else 'documents'
    more = f'; of {len(found.sizes):,} {noun}, {found.bytes:,} bytes'
    with tqdm(desc='tokenizing', total=2 * found.bytes, unit='B', unit_scale=True, leave=False,
              disable=None) as bar:
        splits = {split: encode_all(vocabulary, pieces(split_text(split, bar)))
                  for split in ('train', 'val')}
        return write_prepared(folder, splits, vocabulary, source, shard_tokens, more)


# ---- what to type next ---------------------------------------------------------------------------

def print_commands():
    """Print the commands that train on the dataset and sample from the model."""
    where = ''
    if data_dir != 'data':
        where = f' --data_dir={shlex.quote(data_dir)}'
    if min(info['tokens'] for info in meta['splits'].values()) <= 65:
        print('note: so little text needs a smaller --block_size, or a larger --val_fraction',
              file=sys.stderr)
    print(f"""now type
    python train.py config/train_shakespeare_char.py --dataset={name}{where} --out_dir=out-{name} --max_minutes=5
    python sample.py --out_dir=out-{name}
The first command trains for at most five minutes. For a longer run, add --max_iters=20000 --max_minutes=30 to it.""",
          file=sys.stderr)


# ---- the story -----------------------------------------------------------------------------------

folder = check_knobs()
paths = find_files(folder)
exit_on_signals()   # a signal removes what is half-written
vocabulary = make_tokenizer(tokenizer, '?')   # before the text is read: it may have to be fetched
found = survey()
if tokenizer == 'char':
    if len(found.sizes) > 1:
        found.symbols.add('\n')   # stands between documents
    vocabulary = make_tokenizer('char', ''.join(sorted(found.symbols)))
separator = '\n' if vocabulary.end is None else data.END_OF_TEXT
meta = write_splits()
print_commands()
