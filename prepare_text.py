"""
Your own text to token files.

    python prepare_text.py --input=book.txt --name=mine                   # characters -> data/mine/
    python prepare_text.py --input=notes/ --name=notes --tokenizer=gpt2   # every .txt, .md and .jsonl in a folder
    python prepare_text.py --input="*.jsonl.gz" --name=web --tokenizer=gpt2 --field=text

A document is a text file, a part of one between two <|endoftext|>, or a line of a .jsonl; the splits are made of whole ones,
spread evenly (a single document is cut, its last part is for validation). In the token files <|endoftext|> stands between
two documents, a line break where the tokenizer has no such token. All of them may be gzipped (.gz).

Reads the input twice or more, a little at a time; writes train.bin and val.bin (or shards) and meta.json.
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

KINDS = ('.txt', '.md', '.jsonl', '.txt.gz', '.md.gz', '.jsonl.gz')
BLOCK = 1 << 20   # bytes read at a time

again = 'type python prepare_text.py --input=FILE_OR_FOLDER --name=NAME'
if not input or not name:
    fail(f'--input and --name are needed: what to read and what to call it; {again}')
folder, _ = find_dataset(name, data_dir, knob='name')
if not 0 < val_fraction < 1:
    fail(f'val_fraction={val_fraction}: allowed is a share above 0 and below 1; type --val_fraction=0.1')
if shard_tokens < 1000:
    fail(f'shard_tokens={shard_tokens}: it must be 1000 or more; type --shard_tokens=100000000')
if os.path.isdir(input):
    paths = sorted(path for path in glob.glob(os.path.join(glob.escape(input), '**', '*'), recursive=True)
                   if path.lower().endswith(KINDS) and os.path.isfile(path))
    if not paths:
        fail(f'{input} has no file that ends with {", ".join(KINDS)}; type --input=FILE for one with another ending')
else:
    paths = [input] if os.path.isfile(input) else sorted(filter(os.path.isfile, glob.glob(input, recursive=True)))
    if not paths:
        fail(f'--input={input}: there is no such file, folder or match of a pattern (in quotes: "texts/*.txt"); {again}')
if os.path.exists(folder) and any(os.path.realpath(path).startswith(os.path.realpath(folder) + os.sep) for path in paths):
    fail(f'{folder} holds the input and would be written to; type --name for another, or move the input')
exit_on_signals()   # and what is half-written is removed


def stop(message):
    bar.clear()
    fail(message)


def blocks(path):
    """The bytes of a file, unpacked if it ends with .gz, some at a time."""
    try:
        with gzip.open(path) if path.lower().endswith('.gz') else open(path, 'rb') as f:
            while block := f.read(BLOCK):
                yield block
    except (OSError, EOFError, zlib.error) as error:   # gzip's own errors are OSErrors
        stop(f'{path} cannot be read: {error}; {again}')


def line_text(path, number, line):
    """The document in a line of a .jsonl."""
    try:
        content = json.loads(line)
        if not isinstance(content, dict) or not isinstance(content.get(field), str):
            has = content.items() if isinstance(content, dict) else ()
            has = ', '.join(f'{key} ({type(value).__name__})' for key, value in has) or 'none'
            stop(f'{path}, line {number}: no field {field!r} with a text; its fields are {has[:200]}; type --field=NAME')
        return content[field].encode('utf-8', 'replace').decode('utf-8')   # JSON can hold half of a surrogate pair
    except (ValueError, RecursionError) as error:
        stop(f'{path}, line {number} is no JSON: {error}; give it another ending than .jsonl if it is plain text')


def stream(progress):
    """The text of all files in turn, some at a time, and None at the end of each document."""
    for path in paths:
        if path.lower().removesuffix('.gz').endswith('.jsonl'):
            number, held = 0, []
            for block in blocks(path):
                progress(block)
                first, *others = block.split(b'\n')
                held.append(first)
                for other in others:
                    number, line, held = number + 1, b''.join(held), [other]
                    if line.strip():
                        yield line_text(path, number, line)
                        yield None
            if b''.join(held).strip():
                yield line_text(path, number + 1, b''.join(held))
        else:
            decoder, held, before = codecs.getincrementaldecoder('utf-8-sig')(), '', 0
            for block in itertools.chain(blocks(path), [b'']):
                progress(block)
                try:
                    held += decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    stop(f'{path} is not UTF-8 (near byte {before + error.start:,}); '
                         f'convert it first, if it is Latin-1: iconv -f latin1 -t utf-8 {shlex.quote(path)} > FILE')
                before += len(block)
                *whole, held = held.split(data.END_OF_TEXT)
                for text in whole:
                    yield text
                    yield None
                sure = len(held) - len(data.END_OF_TEXT) * bool(block)   # the rest may be the beginning of one
                if sure > 0:
                    yield held[:sure]
                    held = held[sure:]
        yield None


def texts(split, progress):
    """The text of one split, its documents apart."""
    document, inside, separate, at = 0, False, False, 0   # at: characters so far, where a single document is cut
    for text in stream(progress):
        if text is None:
            document, inside = document + inside, False
        elif text:
            if documents == 1:
                at, text = at + len(text), text[:max(0, cut - at)] if split == 'train' else text[max(0, cut - at):]
                yield text
            elif (document * for_validation // documents != (document + 1) * for_validation // documents) == (split == 'val'):
                if separate and not inside:
                    yield data.END_OF_TEXT if tokenizer == 'gpt2' else '\n'
                yield text
                separate = True
            inside = True


vocabulary = make_tokenizer(tokenizer, '?')   # first: it may have to be fetched; characters are collected below
digest, sizes, characters, symbols, documents, inside = hashlib.sha256(), [], 0, set(), 0, False
with tqdm(desc='reading', unit='B', unit_scale=True, leave=False, disable=None) as bar:
    for text in stream(lambda block: (digest.update(block), sizes.append(len(block)), bar.update(len(block)))):
        if text:
            characters += len(text)
            symbols.update(text) if tokenizer == 'char' else None
            documents, inside = documents + (not inside), True
        inside = text is not None and inside
if characters < 2:
    fail(f'{input} holds no text: {len(paths)} file(s), {characters} characters; {again}')
for_validation = max(1, round(val_fraction * documents))   # documents
cut = min(max(1, int((1 - val_fraction) * characters)), characters - 1)
if tokenizer == 'char':
    vocabulary = make_tokenizer('char', ''.join(sorted(symbols | {'\n'} if documents > 1 else symbols)))
source = dict(name=input, url=None, sha256=digest.hexdigest(), stand_in=False, files=len(paths), documents=documents)
with tqdm(desc='tokenizing', total=2 * sum(sizes), unit='B', unit_scale=True, leave=False, disable=None) as bar:
    splits = {split: encode_all(vocabulary, pieces(texts(split, lambda block: bar.update(len(block)))))
              for split in ('train', 'val')}
    meta = write_prepared(folder, splits, vocabulary, source, shard_tokens,
                          f'; of {documents:,} document{"s" * (documents != 1)}, {sum(sizes):,} bytes')

where = f' --data_dir={shlex.quote(data_dir)}' * (data_dir != 'data')
if min(info['tokens'] for info in meta['splits'].values()) <= 65:
    print('note: so little text needs a smaller --block_size, or a larger --val_fraction', file=sys.stderr)
print(f"""now type
    python train.py config/train_shakespeare_char.py --dataset={name}{where} --out_dir=out-{name} --max_minutes=5
    python sample.py --out_dir=out-{name}
The first command trains for at most five minutes. For a longer run, add --max_iters=20000 --max_minutes=30 to it.""",
      file=sys.stderr)
