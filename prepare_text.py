"""
Your own text to token files.

    python prepare_text.py book.txt --name=mine               # characters -> data/mine/
    python prepare_text.py --input=notes/ --name=notes        # a folder's .txt, .md and .jsonl
    python prepare_text.py --input="*.jsonl.gz" --name=web --tokenizer=gpt2 --field=text --skip_bad
    python prepare_text.py --input="dump/**/*.json" --name=dump      # lists of texts or of records
    pdftotext book.pdf - | python prepare_text.py --input=- --name=book     # standard input
    python prepare_text.py book.txt --name=mine --tokenizer=bpe --vocab_size=1024
    python prepare_text.py --input=train.txt --val_input=valid.txt --name=mine   # splits of its own
    python prepare_text.py --input=more.txt --name=more --tokenizer=FROM:out/best.pt

The last command takes the vocabulary of a model that exists, and train.py --init_from=resume can
then go on with that model.

A document is a text file, a part of one between two <|endoftext|>, a line of a .jsonl or an item of
a .json. Each kind of file may be gzipped (.gz). Text is UTF-8, or UTF-16 or UTF-32 with a byte
order mark. A folder's hidden files are skipped; links are followed, and a file is read once.

The splits are made of whole documents, spread evenly. Where the documents are too few or too
unequal for the share, the largest is cut and its last part is for validation. In the token files
<|endoftext|> stands between two documents, a line break where the tokenizer has no such token.

Reads the input three times, or four times to train a BPE on the training split; a little at a time
(a .json whole). Writes train.bin and val.bin (or shards) and meta.json.
"""
import codecs
import glob
import gzip
import hashlib
import itertools
import json
import os
import shlex
import shutil
import sys
import tempfile
import zlib
from array import array
from collections import Counter
from dataclasses import dataclass

import lib.early  # noqa: F401  # before NumPy and torch

from tqdm import tqdm

from lib import prepare, tokenizers
from lib.configurator import configure, exit_on_signals
from lib.console import counted, fail, tell
from lib.data import find_dataset
from lib.prepare import encode_all, not_a_text, pieces, write_prepared
from lib.tokenizers import check_vocab_size, make_tokenizer, train_bpe

input = ''           # a file, a folder (its .txt, .md, .jsonl), a pattern in quotes, or - for stdin
name = ''            # name of the dataset, a folder in data_dir
tokenizer = 'char'   # 'char', 'byte', 'bpe', 'gpt2', or FROM:FILE for a checkpoint's vocabulary
vocab_size = 1024    # symbols of 'bpe': 256 bytes, pairs that are merged, and <|endoftext|>
field = 'text'       # name of the field that holds the text in a .jsonl's or .json's records
skip_bad = False     # skip lines and items of JSON that hold no text, and count them
drop_unknown = False  # drop characters that FROM:FILE's vocabulary lacks, and count them
val_input = ''       # like input, for validation alone; then val_fraction does not count
val_fraction = 0.1   # share of the characters that is for validation, above 0 and below 1
shard_tokens = 100_000_000  # tokens a file; more make several
data_dir = 'data'    # the dataset becomes a folder in here
knobs, given = configure(globals(), first='input', configs=False)

PLAIN_ENDINGS = ('.txt', '.md', '.jsonl')
ENDINGS = PLAIN_ENDINGS + tuple(ending + '.gz' for ending in PLAIN_ENDINGS)   # a folder's files
# UTF-32's little-endian mark begins with UTF-16's, and therefore comes first
MARKS = {codecs.BOM_UTF32_LE: 'utf-32', codecs.BOM_UTF32_BE: 'utf-32',
         codecs.BOM_UTF16_LE: 'utf-16', codecs.BOM_UTF16_BE: 'utf-16'}
STDIN = 'standard input'
FROM = 'FROM:'
BLOCK = 1 << 20   # bytes read at a time
SHOWN = 10   # paths, endings or characters that a message lists
AGAIN = 'type python prepare_text.py --input=FILE_OR_FOLDER --name=NAME'


def note(message):
    tell(f'note: {message}')


def stop(message):
    """fail(), with the progress bars out of the way."""
    with tqdm.external_write_mode(file=sys.stderr):
        fail(message)


def listed(words):
    """Return the first words with commas between them, and how many others there are."""
    if len(words) <= SHOWN:
        return ', '.join(words)
    return ', '.join(words[:SHOWN]) + f' and {len(words) - SHOWN:,} more'


def typed(path):
    """Return a path as a shell command names it."""
    return '-' if input == '-' and path == STDIN else shlex.quote(path)


def check_knobs():
    """Return the dataset's folder; fail for a knob that is not allowed."""
    if not input or not name:
        fail(f'--input and --name are needed: what to read and what to call it; {AGAIN}')
    folder, _ = find_dataset(name, data_dir, knob='name')
    if val_input and 'val_fraction' in given:
        fail(f'--val_input={val_input} and --val_fraction={val_fraction} do not go together: the '
             f'first names the whole validation split; type --val_input={shlex.quote(val_input)}')
    if val_input == '-':
        fail('--val_input=-: allowed are a file, a folder or a pattern; type --val_input=FILE')
    if not 0 < val_fraction < 1:
        fail(f'val_fraction={val_fraction}: allowed is a share above 0 and below 1; '
             f'type --val_fraction=0.1')
    if shard_tokens < 1000:
        fail(f'shard_tokens={shard_tokens}: it must be 1000 or more; '
             f'type --shard_tokens=100000000')
    check_vocab_size(vocab_size, tokenizer, 'vocab_size' in given)
    return folder


# ---- which files ---------------------------------------------------------------------------------

def find_both():
    """Return (the files of input, those of val_input), without those of val_input in the first."""
    for_validation = find_files(folder, val_input, 'val_input') if val_input else []
    for_training = find_files(folder, input, 'input')
    real = {os.path.realpath(path) for path in for_validation}
    for_training = [path for path in for_training if os.path.realpath(path) not in real]
    if not for_training:
        fail(f'--val_input={val_input} names all files of --input={input}, and none is left for '
             f'training; {AGAIN} --val_input=OTHER')
    return for_training, for_validation


def find_files(folder, named, knob):
    """Return a knob's files, sorted by path; fail where one is in the dataset's folder.

    A file that several names lead to is in the list once, under the first of them."""
    if named == '-':
        return [STDIN]
    unread = []   # paths that cannot be read, each with the reason
    if os.path.isdir(named):
        candidates = folder_files(named, unread)
        nothing = (f'{named} has no file that ends with {", ".join(ENDINGS)}; '
                   f'type --{knob}=FILE for one with another ending')
    elif os.path.exists(named) and not os.path.isfile(named):
        advice = f'type --{knob}=FILE'
        if knob == 'input':
            advice = f'type --input=- < {shlex.quote(named)} for a pipe'
        fail(f'--{knob}={named} is not a regular file, and is read more than once; {advice}')
    else:
        candidates = [named] if os.path.isfile(named) else matches(named, unread)
        nothing = (f'--{knob}={named}: there is no such file, folder or match of a pattern '
                   f'(in quotes: "texts/*.txt"); {AGAIN}')
    once = {}   # real path -> path
    for path in sorted(set(candidates)):
        if os.path.isfile(path):
            once.setdefault(os.path.realpath(path), path)
        elif os.path.islink(path) and not os.path.exists(path):
            unread.append(f'{path} (a broken link)')
    if unread:
        note(f'{counted(len(unread), "path")} could not be read: {listed(unread)}')
    if not once:
        fail(nothing)
    inside = os.path.realpath(folder) + os.sep
    if any(real.startswith(inside) for real in once):
        fail(f'{folder} holds the input and would be written to; '
             f'type --name for another, or move the input')
    return list(once.values())


def folder_files(top, unread):
    """Return the paths in a folder that end as text does; say how many others there are."""
    paths = []
    left_out = Counter()
    for folder, entries in folders_under(top, unread):
        for entry in entries:
            path = os.path.join(folder, entry)
            if entry.lower().endswith(ENDINGS) or not os.path.exists(path):
                paths.append(path)
            elif os.path.isfile(path):
                left_out[ending_of(entry)] += 1
    if left_out:
        total = counted(sum(left_out.values()), 'file')
        was = 'was' if left_out.total() == 1 else 'were'
        endings = [f'{ending} {n:,}' for ending, n in left_out.most_common()]
        message = f'{total} {was} left out because of their ending: {listed(endings)}'
        for ending in ('.json', '.json.gz'):
            if ending in left_out:
                pattern = os.path.join(top, '**', f'*{ending}')
                message += f'; type --input="{pattern}" for the {ending}'
        note(message)
    return paths


def ending_of(entry):
    """Return a file's ending with its dot, two of them where the last is .gz, or 'none'."""
    stem, ending = os.path.splitext(entry.lower())
    if ending == '.gz':
        ending = os.path.splitext(stem)[1] + ending
    return ending or 'none'


def folders_under(top, unread):
    """Yield (folder, names of its files) for a folder and all below it, hidden ones apart.

    Links are followed, but no folder is entered twice, so a loop of links comes to an end."""
    entered = {os.path.realpath(top)}

    def cannot_enter(error):
        unread.append(f'{error.filename} ({error.strerror})')
    for folder, inner, entries in os.walk(top, onerror=cannot_enter, followlinks=True):
        chosen = []
        for entry in sorted(inner):
            real = os.path.realpath(os.path.join(folder, entry))
            if not entry.startswith('.') and real not in entered:
                entered.add(real)
                chosen.append(entry)
        inner[:] = chosen   # os.walk enters these
        yield folder, [entry for entry in entries if not entry.startswith('.')]


def matches(pattern, unread):
    """Return the paths that a pattern stands for.

    glob alone would follow loops of links at each **, so its folders come from folders_under."""
    parts = pattern.replace(os.sep, '/').split('/')
    if '**' not in parts:
        return glob.glob(pattern)
    at = parts.index('**')
    before = '/'.join(parts[:at]) + '/'
    after = '/'.join(parts[at + 1:]) or '*'
    tops = glob.glob(before) if at else [os.curdir]
    paths = []
    for top in tops:
        for folder, _ in folders_under(top, unread):
            here = folder.removeprefix(os.curdir + os.sep) if not at else folder
            start = '' if here == os.curdir else glob.escape(here)
            paths += matches(os.path.join(start, after), unread)
    return paths


def spool():
    """Return standard input as a temporary file: it is read more than once."""
    if sys.stdin is None:
        fail('--input=- reads standard input, and there is none; type --input=FILE')
    file = tempfile.TemporaryFile()
    try:
        shutil.copyfileobj(sys.stdin.buffer, file)
        file.flush()
    except OSError as error:
        fail(f'--input=-: standard input cannot be kept in {tempfile.gettempdir()} '
             f'({error.strerror or error}); make room, or type --input=FILE')
    return file


# ---- from files to documents ---------------------------------------------------------------------

class Reading:
    """One reading of the whole input, and what it has passed and left out so far."""

    def __init__(self, bar):
        self.bar = bar
        self.bytes = 0   # bytes of all files, unpacked
        self.digest = hashlib.sha256()   # hash of the same bytes
        self.skipped = Counter()   # lines and items of JSON without a text
        self.first_skipped = ''    # where the first one is, and what is wrong with it
        self.begins = {}           # {path: documents before its first one}
        self.unknown = Counter()   # characters that the given vocabulary lacks
        self.first_unknown = ''    # where the first one is

    def passed(self, block):
        """Count the bytes of a block that has been read."""
        self.bytes += len(block)
        self.digest.update(block)
        self.bar.update(len(block))

    def skip(self, kind, problem, advice):
        """Count a line or an item that holds no text; fail without --skip_bad."""
        if not skip_bad:
            stop(f'{problem}; {advice}, or --skip_bad to go on without such {kind}s')
        self.skipped[kind] += 1
        self.first_skipped = self.first_skipped or problem

    def known(self, text, place):
        """Return the text without the characters that the given vocabulary lacks; count them."""
        unknown = set(text) - alphabet
        if not unknown:
            return text
        for character in unknown:
            self.unknown[character] += text.count(character)
        self.first_unknown = self.first_unknown or place
        return text.translate(dict.fromkeys(map(ord, unknown)))

    def skipped_in_words(self):
        counts = ' and '.join(counted(n, kind) for kind, n in self.skipped.items())
        was = 'was' if self.skipped.total() == 1 else 'were'
        return f'{counts} {was} skipped, the first is {self.first_skipped}'

    def unknown_in_words(self):
        counts = listed([f'{character!r} {n:,}' for character, n in self.unknown.most_common()])
        return (f'{counted(self.unknown.total(), "character")} that the vocabulary of '
                f'{tokenizer.removeprefix(FROM)} lacks, the first in {self.first_unknown}: '
                f'{counts}')


def documents(reading):
    """Yield (number, place, text) for the text of all files in turn, some of it at a time.

    number counts the documents that hold any text, from 0. place says where a document is."""
    number = 0
    begun = False   # whether the document has had any text so far
    for path in paths:
        reading.begins[path] = number
        for place, text in read_file(path, reading):
            if text and alphabet:
                text = reading.known(text, place)
            if text is None:
                number += begun
                begun = False
            elif text:
                begun = True
                yield number, place, text


def read_file(path, reading):
    """Yield (place, text) for each bit of text, and (place, None) at each document's end."""
    unpacked = path.lower().removesuffix('.gz')
    if unpacked.endswith('.jsonl'):
        return read_lines(path, reading)
    if unpacked.endswith('.json'):
        return read_items(path, reading)
    return read_plain(path, reading)


def read_plain(path, reading):
    """Yield the documents of a plain text file, which <|endoftext|> stands between."""
    decoder = codecs.getincrementaldecoder('utf-8')()
    held = ''
    before = 0   # bytes before the block
    for block in itertools.chain(utf8_blocks(path, reading), [b'']):
        try:
            held += decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            stop(f'{path} is not UTF-8 (near byte {before + error.start:,}); convert it first, '
                 f'if it is Latin-1: iconv -f latin1 -t utf-8 {typed(path)} > FILE')
        before += len(block)
        *whole, held = held.split(tokenizers.END_OF_TEXT)
        for text in whole:
            yield path, text
            yield path, None
        sure = len(held)
        if block:
            sure -= len(tokenizers.END_OF_TEXT)   # the rest may be the beginning of a mark
        if sure > 0:
            yield path, held[:sure]
            held = held[sure:]
    yield path, None


def read_lines(path, reading):
    """Yield the documents of a .jsonl, one a line."""
    for number, line in numbered_lines(path, reading):
        if not line.strip():
            continue
        place = f'{path}, line {number}'
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reading.skip('line', f'{place} is not JSON: {error}',
                         'give the file another ending than .jsonl if it is plain text')
            continue
        yield place, record_text(record, 'line', place, reading)
        yield place, None


def numbered_lines(path, reading):
    """Yield (number, bytes of the line), from 1, a line in memory at a time."""
    number = 0
    held = []   # the parts of a line whose end has not been read
    for block in utf8_blocks(path, reading):
        first, *others = block.split(b'\n')
        held.append(first)
        for other in others:
            number += 1
            yield number, b''.join(held)
            held = [other]
    yield number + 1, b''.join(held)


def read_items(path, reading):
    """Yield the documents of a .json: a list of texts, or of records with a field."""
    try:
        items = json.loads(b''.join(utf8_blocks(path, reading)))
    except (ValueError, RecursionError) as error:
        stop(f'{path} is not JSON: {error}; '
             f'give the file another ending than .json if it is plain text')
    if not isinstance(items, list):
        stop(f'{path} holds {json_kind(items)}; a .json must hold a list of texts or of records '
             f'with the field {field!r}; type --input=FILE for another file')
    for number, item in enumerate(items, 1):
        place = f'{path}, item {number}'
        if isinstance(item, str):
            yield place, as_text(item)
        else:
            yield place, record_text(item, 'item', place, reading)
        yield place, None


def record_text(record, kind, place, reading):
    """Return the text of a record, '' for one that is skipped."""
    text = record.get(field) if isinstance(record, dict) else None
    if isinstance(text, str):
        return as_text(text)
    if isinstance(record, dict) and record:
        has = ', '.join(f'{key} ({json_kind(value)})' for key, value in record.items())
        problem = f'{place}: no field {field!r} with a text; its fields are {has[:200]}'
    else:
        problem = f'{place}: no field {field!r} with a text, but {json_kind(record)}'
    reading.skip(kind, problem, 'type --field=NAME')
    return ''


def as_text(text):
    """Return a JSON string as text: it can hold half of a surrogate pair."""
    return text.encode('utf-8', 'replace').decode()


def json_kind(value):
    """Return the name that JSON has for a value's type."""
    if value is None:
        return 'null'
    names = {dict: 'an object', list: 'a list', str: 'a text', bool: 'true or false'}
    return names.get(type(value), 'a number')


def utf8_blocks(path, reading):
    """Yield the bytes of a file as UTF-8 without a byte order mark, some at a time."""
    raw = blocks(path, reading)
    first = next(raw, b'')
    encoding = next((MARKS[mark] for mark in MARKS if first.startswith(mark)), None)
    if encoding is None:
        problem = not_a_text(first, typed(path))
        if problem:
            stop(f'{path} is {problem}')
        yield first.removeprefix(codecs.BOM_UTF8)
        yield from raw
        return
    decoder = codecs.getincrementaldecoder(encoding)()
    for block in itertools.chain([first], raw, [b'']):
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            stop(f'{path} begins with the mark of {encoding.upper()} and is not {encoding.upper()} '
                 f'({error.reason}); convert it first: '
                 f'iconv -c -f {encoding} -t utf-8 {typed(path)} > FILE')
        if text:
            yield text.encode()


def blocks(path, reading):
    """Yield the bytes of a file, unpacked where it ends with .gz, some at a time."""
    try:
        with open_file(path) as f:
            while block := f.read(BLOCK):
                reading.passed(block)
                yield block
    except (OSError, EOFError, zlib.error) as error:   # gzip's own errors are OSErrors
        reason = getattr(error, 'strerror', None) or error
        stop(f'{path} cannot be read ({reason}); {AGAIN}')


def open_file(path):
    """Return a file opened to read its bytes from the beginning."""
    if input == '-' and path == STDIN:
        spooled.seek(0)
        return open(os.dup(spooled.fileno()), 'rb')
    if path.lower().endswith('.gz'):
        return gzip.open(path)
    return open(path, 'rb')


# ---- the vocabulary ------------------------------------------------------------------------------

def given_vocabulary():
    """Return the tokenizer that does not depend on the text, None for 'char' and 'bpe'."""
    if tokenizer.startswith(FROM):
        return checkpoint_vocabulary(os.path.expanduser(tokenizer.removeprefix(FROM)))
    if tokenizer not in ('char', 'byte', 'bpe', 'gpt2'):
        fail(f'tokenizer={tokenizer}: allowed are char, byte, bpe, gpt2 and {FROM}FILE for the '
             f'vocabulary of a checkpoint; type --tokenizer=char')
    return None if tokenizer in ('char', 'bpe') else make_tokenizer(tokenizer)


def checkpoint_vocabulary(path):
    """Return the tokenizer that a checkpoint holds; fail for a file without one."""
    from lib import checkpoint  # here: only this kind of vocabulary needs the modules of training
    another = f'type --tokenizer={FROM}out/best.pt, or --tokenizer=char for a new vocabulary'
    if not os.path.isfile(path):
        fail(f'--tokenizer={FROM}{path}: there is no such file; {another}')
    try:
        loaded = checkpoint.read(path)
    except checkpoint.Damaged as error:
        fail(f'--tokenizer={FROM}{path}: it {error}; {another}')
    if 'tokenizer' not in loaded:
        fail(f'{path} holds no tokenizer, as nanoGPT keeps it elsewhere; {another}')
    try:
        return tokenizers.load_tokenizer(loaded['tokenizer'])
    except ValueError as error:
        fail(f'{path}: {error}; {another}')


def new_vocabulary():
    """Return the tokenizer that is made from the text: its characters, or a BPE."""
    if tokenizer == 'char':
        if len(found.sizes) > 1:
            found.symbols.add('\n')   # stands between documents
        return make_tokenizer('char', ''.join(sorted(found.symbols)))
    return train_bpe(training_pieces(), vocab_size)


def training_pieces():
    """Yield the text for training in pieces, with <|endoftext|> between its documents."""
    with tqdm(desc='counting words', total=found.reading.bytes, unit='B', unit_scale=True,
              leave=False, disable=None) as bar:
        yield from pieces(split_text('train', tokenizers.END_OF_TEXT, bar))


def find_separator():
    """Return what stands between two documents of the token files."""
    if vocabulary.end is not None:
        return tokenizers.END_OF_TEXT
    if not alphabet or '\n' in alphabet or len(found.sizes) == 1:
        return '\n'
    if not drop_unknown:
        fail(f'the vocabulary of {tokenizer.removeprefix(FROM)} has no line break, which stands '
             f'between two documents; type --drop_unknown to put nothing between them')
    return ''


# ---- from documents to splits --------------------------------------------------------------------

@dataclass
class Survey:
    """What the first reading of the input finds."""
    sizes: array      # characters of each document
    largest: str      # place of the largest document, the first one of that size
    symbols: set      # the text's different characters, where --tokenizer=char collects them
    reading: Reading  # the reading itself


def survey():
    """Read the whole input once, and return what is in it; fail where it holds no text."""
    sizes = array('q')
    symbols = set()
    largest = ''
    most = 0   # characters of the largest document
    with tqdm(desc='reading', unit='B', unit_scale=True, leave=False, disable=None) as bar:
        reading = Reading(bar)
        for number, place, text in documents(reading):
            if number == len(sizes):
                sizes.append(0)
            sizes[number] += len(text)
            if sizes[number] > most:
                most = sizes[number]
                largest = place
            if tokenizer == 'char':
                symbols.update(text)
    if reading.unknown and not drop_unknown:
        fail(f'{reading.unknown_in_words()}; type --drop_unknown to drop them, '
             f'or --tokenizer=char for a new vocabulary')
    if sum(sizes) < 2:
        what = STDIN if input == '-' else input
        skipped = ''
        if reading.skipped:
            skipped = f', {reading.skipped_in_words()}'
        fail(f'{what} holds no text: {len(paths)} file(s), {sum(sizes)} characters{skipped}; '
             f'{AGAIN}')
    if reading.skipped:
        note(reading.skipped_in_words())
    if reading.unknown:
        note(f'dropped {reading.unknown_in_words()}')
    return Survey(sizes, largest, symbols, reading)


def choose():
    """Return which documents are for validation; say where one of several is cut."""
    if val_paths:
        return prepare.documents_from(found.sizes, found.reading.begins[val_paths[0]])
    chosen = prepare.split_documents(found.sizes, val_fraction)
    if chosen.cut is not None and len(found.sizes) > 1:
        size = found.sizes[chosen.cut]
        whole = 100 * chosen.whole / sum(found.sizes)
        note(f'the largest document ({found.largest}, {size:,} characters) is cut: its last '
             f'{size - chosen.at:,} characters are for validation; whole documents would have '
             f'made it {whole:.3g} % of the text instead of {100 * val_fraction:.3g} %')
    return chosen


def split_text(split, separator, bar):
    """Yield the text of one split, with a separator between its documents."""
    last = None   # number of the document that the split's text so far ends with
    at = 0        # characters of the cut document so far
    reading = Reading(bar)
    for number, _, text in documents(reading):
        if number >= len(found.sizes):
            break
        if number == chosen.cut:
            for_training = max(0, chosen.at - at)
            at += len(text)
            text = text[:for_training] if split == 'train' else text[for_training:]
        elif chosen.validation[number] != (split == 'val'):
            continue
        if not text:
            continue
        if last not in (None, number):
            yield separator
        yield text
        last = number
    if reading.digest.digest() != found.reading.digest.digest():
        what = STDIN if input == '-' else input
        stop(f'{what} changed while it was read; type the same command again')


def write_splits():
    """Write both splits into the dataset's folder."""
    total_bytes = found.reading.bytes
    source = dict(name=STDIN if input == '-' else input, url=None,
                  sha256=found.reading.digest.hexdigest(), stand_in=False, files=len(paths),
                  documents=len(found.sizes))
    more = f'; of {counted(len(found.sizes), "document")}, {counted(total_bytes, "byte")}'
    if len(found.sizes) == 1:
        more += f', its last {chosen.characters:,} characters for validation'
    elif chosen.cut is None:   # also with val_input
        more += f', {sum(chosen.validation):,} of them for validation'
    with tqdm(desc='tokenizing', total=2 * total_bytes, unit='B', unit_scale=True, leave=False,
              disable=None) as bar:
        splits = {split: encode_all(vocabulary, pieces(split_text(split, separator, bar)))
                  for split in ('train', 'val')}
        write_prepared(folder, splits, vocabulary, source, shard_tokens, more)


# ---- what to type next ---------------------------------------------------------------------------

def print_commands():
    """Print the commands that train on the dataset and sample from the model."""
    dataset = f'--dataset={name}'
    if data_dir != 'data':
        dataset += f' --data_dir={shlex.quote(data_dir)}'
    tell(f"""now type
    python train.py config/train_text.py {dataset}
    python sample.py --out_dir=out-{name}
The first command trains for at most ten minutes, with a net for this text and this time. If the \
text is long, --max_minutes=60 takes a larger net and more time.""")
    out_dir = os.path.dirname(os.path.expanduser(tokenizer.removeprefix(FROM))) or os.curdir
    if tokenizer.startswith(FROM) and os.path.isfile(os.path.join(out_dir, 'last.pt')):
        tell(f'To go on with the model in {out_dir} instead, type python train.py '
             f'--init_from=resume --out_dir={shlex.quote(out_dir)} {dataset} --max_minutes=0 and a '
             f'larger --max_iters.')


# ---- the story -----------------------------------------------------------------------------------

folder = check_knobs()
exit_on_signals()   # a signal removes what is half-written
vocabulary = given_vocabulary()   # before the text is read: it may have to be fetched
alphabet = set()   # the characters that the text may have; empty for all
if isinstance(vocabulary, tokenizers.CharTokenizer):
    alphabet = set(vocabulary.chars)
train_paths, val_paths = find_both()
paths = train_paths + val_paths   # in the order in which documents() reads them
if input == '-':
    spooled = spool()
found = survey()
chosen = choose()
if vocabulary is None:
    vocabulary = new_vocabulary()
separator = find_separator()
write_splits()
print_commands()
