"""
A corpus from Hugging Face's hub to a dataset.

    python prepare_corpus.py --name=fineweb              # two shards of 200 MB -> data/fineweb/
    python prepare_corpus.py --name=fineweb --shards=103          # all of it: 20.8 GB
    python prepare_corpus.py --name=fineweb_edu --shards=10
    python prepare_corpus.py --name=tinystories --tokenizer=byte  # 2.3 GB, and 4.5 of tokens
    python prepare_corpus.py --name=tinystories --tokenizer=bpe --vocab_size=2048

FineWeb (pages of the web) and FineWeb-Edu (the instructive ones among them) come as shards of 100
million tokens in GPT-2's BPE, by the author of modded-nanogpt: one for validation, and --shards for
training. They stay in the hub's cache, and links in data/<name>/ lead there. TinyStories is a text,
stories in the words of small children, with a validation text of its own. prepare_text.py makes
tokens of it, of any kind.

The downloads are huggingface_hub's: HF_ENDPOINT names a mirror, HF_HOME another place for the
cache, HF_TOKEN an access token, and HF_HUB_OFFLINE=1 takes what is in the cache. A file that is
there is not fetched again. An interrupted command, typed again, goes on in the middle of the file
that it was fetching.
"""
import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys

import lib.early  # noqa: F401  # before NumPy and torch

from lib.configurator import check, configure, exit_on_signals
from lib.console import fail, tell
from lib.corpora import CORPORA, Room, fetch, sha256_of
from lib.data import HEADER, check_header, find_dataset, headed_shards, how_to_make, plain_shards
from lib.prepare import HOME, record
from lib.tokenizers import check_vocab_size

name = ''            # 'fineweb', 'fineweb_edu' or 'tinystories'; the dataset gets that name, too
shards = 1           # training shards of fineweb and fineweb_edu, 100 million tokens each
tokenizer = 'gpt2'   # tinystories: one that prepare_text.py takes, 'byte', 'bpe', 'gpt2', ...
vocab_size = 1024    # symbols of 'bpe': 256 bytes, pairs that are merged, and <|endoftext|>
data_dir = 'data'    # the dataset becomes a folder in here
knobs, given = configure(globals(), first='name', configs=False)

TEXT_BYTES = 2_250_255_763   # both texts of TinyStories


# ---- what is asked for ---------------------------------------------------------------------------

def check_knobs():
    """Fail for a knob that is not allowed, and for knobs that do not go together."""
    if corpus.shards:
        check(knobs, shards=(1, corpus.shards))
        if tokenizer != 'gpt2':
            fail(f"tokenizer={tokenizer}: {name} comes in GPT-2's tokens, and only gpt2 is "
                 f'allowed; type --tokenizer=gpt2')
    elif 'shards' in given:
        fail(f'--shards={shards}: {name} has no shards; type --name={name} without --shards')
    check_vocab_size(vocab_size, tokenizer, 'vocab_size' in given)
    for split in ('train', 'val'):
        if corpus.shards and plain_shards(folder, split):
            fail(f'{folder} holds token files of another kind, and is not written to; move them '
                 f'away, or type --data_dir=FOLDER for another place')


def same_command():
    """Return the command that was typed, with its flags."""
    command = how_to_make(name, data_dir=data_dir)
    if shards != 1:
        command += f' --shards={shards}'
    if tokenizer != 'gpt2':
        command += f' {shlex.join(flags_of_tokenizer())}'
    return command


def flags_of_tokenizer():
    """Return the flags by which prepare_text.py makes the same tokenizer."""
    flags = [f'--tokenizer={tokenizer}']
    if tokenizer == 'bpe':
        flags.append(f'--vocab_size={vocab_size}')
    return flags


def failed(reason):
    """Fail for what the hub did, with what to type instead."""
    copies = f'copies of the files in {folder}'
    if not corpus.shards:
        copies = (f'a copy of the text: python prepare_text.py --input=FILE --val_input=FILE '
                  f'--name={name} {shlex.join(flags_of_tokenizer())}')
    fail(f'{name} could not be fetched from the hub ({reason}); files that are whole are kept: '
         f'type {same_command()} again to go on; allowed are also a mirror, '
         f'HF_ENDPOINT=URL before the command, and {copies}')


# ---- shards --------------------------------------------------------------------------------------

def prepare_shards():
    """Link the shards into the dataset's folder, and write its meta.json."""
    known = recorded()
    files = [corpus.val, *(corpus.train.format(number) for number in range(1, shards + 1))]
    absent = [file for file in files if not os.path.exists(os.path.join(folder, file))]
    revision = known.get('revision', corpus.revision)
    try:
        fetched = fetch(corpus, revision, absent)
    except OSError as error:
        failed(error)
    try:
        os.makedirs(folder, exist_ok=True)
        for file, found in fetched.items():
            revision = found.revision
            known['sha256'][file] = found.sha256
            link(os.path.realpath(found.path), os.path.join(folder, file))
        meta = describe(known['sha256'], revision)
        record(folder, meta)
    except OSError as error:
        fail(f'{folder} cannot be written: {error.strerror or error}; make room, '
             f'or type --data_dir=FOLDER for another place')
    counts = []
    for split, info in meta['splits'].items():
        count = len(info['sha256'])
        counts.append(f'{split} {info["tokens"]:,} in {count} {"file" if count == 1 else "files"}')
    tell(f'{folder}: tokens: {", ".join(counts)}; {corpus.title}, revision {revision[:12]}')


def recorded():
    """Return dict(sha256={file: SHA-256}, revision=commit) of an earlier call, as far as known."""
    known = dict(sha256={})
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        with open(os.path.join(folder, 'meta.json'), encoding='utf-8') as f:
            meta = json.load(f)
        for info in meta['splits'].values():
            known['sha256'].update(info['sha256'])
        known['revision'] = str(meta['source']['revision'])
    return known


def link(path, target):
    """Make target a link to path, or a copy where the system has no links."""
    if os.path.lexists(target):   # a link to a cache that was cleared
        os.remove(target)
    try:
        os.symlink(path, target)
    except OSError:
        shutil.copyfile(path, target)


def describe(sha256, revision):
    """Return meta for all shards in the folder.

    sha256: {file: SHA-256} of those that were verified. Fail for another one that is not whole or
    is known to be another file."""
    splits = {}
    for split in ('train', 'val'):
        splits[split] = dict(tokens=0, sha256={})
        for path in headed_shards(folder, split):
            file = os.path.basename(path)
            digest = sha256.get(file) or sha256_of(path)
            try:
                with open(path, 'rb') as f:
                    splits[split]['tokens'] += check_header(f.read(HEADER), os.path.getsize(path))
                if digest != corpus.sha256.get(file, digest):
                    raise ValueError(f'is not the file of {corpus.repo}: its SHA-256 is another')
            except ValueError as error:
                fail(f'{path} {error}; remove it, and type {same_command()}')
            splits[split]['sha256'][file] = digest
    return dict(format=1, tokenizer=dict(kind='gpt2'), vocab_size=50257, dtype='uint16',
                splits=splits, source=source(revision))


def source(revision):
    """Return what meta.json says about the source. Its shards have a SHA-256 each, and no other."""
    return dict(name=corpus.title, url=f'https://huggingface.co/datasets/{corpus.repo}',
                revision=revision, sha256='', stand_in=False)


# ---- texts ---------------------------------------------------------------------------------------

def prepare_text():
    """Let prepare_text.py make tokens of the two texts, and note where they are from."""
    # upper limits for English: a token of a BPE with 1,024 symbols has 2.4 bytes on average
    tokens_a_byte = 1.0
    if tokenizer == 'gpt2':
        tokens_a_byte = 0.3
    elif tokenizer == 'bpe' and vocab_size >= 1024:
        tokens_a_byte = 0.6
    room = Room(folder, int(2 * tokens_a_byte * TEXT_BYTES), '--data_dir=FOLDER')
    try:
        fetched = fetch(corpus, corpus.revision, [corpus.train, corpus.val], [room])
    except OSError as error:
        failed(error)
    command = ['prepare_text.py', f'--input={fetched[corpus.train].path}',
               f'--val_input={fetched[corpus.val].path}', f'--name={name}',
               *flags_of_tokenizer(), f'--data_dir={data_dir}']
    tell(f'running {shlex.join(command)}')
    command[0] = os.path.join(HOME, command[0])
    status = subprocess.run([sys.executable, *command]).returncode
    if status:
        sys.exit(status if status > 0 else 128 - status)
    with open(os.path.join(folder, 'meta.json'), encoding='utf-8') as f:
        meta = json.load(f)
    known = source(fetched[corpus.train].revision)
    known['sha256'] = fetched[corpus.train].sha256
    meta['source'] |= known
    record(folder, meta)


# ---- the story -----------------------------------------------------------------------------------

check(knobs, name=tuple(CORPORA))
corpus = CORPORA[name]
folder, _ = find_dataset(name, data_dir, knob='name')
check_knobs()
exit_on_signals()   # a signal removes what is half-written
place = ''
if data_dir != 'data':
    place = f' --data_dir={shlex.quote(data_dir)}'
if corpus.shards:
    prepare_shards()
    dataset = '' if name == 'fineweb' else f' --dataset={name}'
    tell(f'now type python train.py config/train_gpt2.py{dataset}{place}')
else:
    prepare_text()
    tell(f'These stories have a recipe of their own, too: python train.py '
         f'config/train_tinystories.py{place}')
