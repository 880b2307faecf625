"""enwik8 and your own text become token files. pytest tests/test_prepare.py"""
import functools
import gzip
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from array import array
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import KILL, PYTHON, ROOT, SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import checkpoint, data, prepare
from lib.data import Dataset
from lib.tokenizers import END_OF_TEXT

MINE = '--name=mine'   # the dataset that most tests prepare
A_TXT = ['--input=a.txt', MINE]


def read(name, split):
    """Return the text of a split, all shards together."""
    opened = Dataset(name)
    tokens = np.concatenate(opened.split(split)).tolist()
    return opened.tokenizer.decode(tokens).decode()


def read_both():
    """Return the training text of data/mine, followed by its validation text."""
    return read('mine', 'train') + read('mine', 'val')


def source():
    """Return what meta.json of data/mine says about the text's source."""
    return Dataset('mine').meta['source']


def contents(folder):
    """Return {name: bytes} of a folder's files, partial files left out."""
    files = Path(folder).iterdir()
    return {path.name: path.read_bytes() for path in files if path.suffix != '.part'}


def notes(result):
    """Return the lines of stderr that begin with 'note: '."""
    return [line for line in result.err.splitlines() if line.startswith('note: ')]


def commands(said):
    """Return the words of each python command that a script has printed."""
    lines = [line for line in said.splitlines() if line.startswith('    python ')]
    return [shlex.split(line)[1:] for line in lines]


def wait_for_a_part(pattern):
    """Wait until a partial file of a dataset is being written."""
    deadline = time.monotonic() + 60
    while not list(Path('data').glob(pattern)) and time.monotonic() < deadline:
        time.sleep(0.01)


def write_hex(f, lines, digits):
    """Write lines of random hexadecimal digits."""
    for _ in range(lines):
        f.write(os.urandom(digits // 2).hex().encode() + b'\n')


# ---- pieces of a text and their tokens -----------------------------------------------------------

@functools.cache
def gpt2_encode():
    """Return tiktoken's encoder for GPT-2, or None where no copy of its files is found."""
    if not (SHARED / 'tiktoken').exists():
        return None
    os.environ['TIKTOKEN_CACHE_DIR'] = str(SHARED / 'tiktoken')
    import tiktoken
    return tiktoken.get_encoding('gpt2').encode_ordinary


SYMBOLS = "ab1'!. \n\t\r\x1c\x85\u00a0\u3000é你e\u0301🎉st<|endoftext|>"
BLOCKS = st.lists(st.text(st.sampled_from(SYMBOLS), max_size=40), max_size=8)


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(BLOCKS, st.integers(1, 20))
def test_pieces_are_the_text_cut_where_gpt2_cuts(blocks, size):
    text = ''.join(blocks)
    parts = list(prepare.pieces(blocks, size))
    assert ''.join(parts) == text
    assert all(parts)
    longest = max(map(len, blocks), default=0)
    assert all(len(part) <= 16 * size + longest for part in parts)
    encode = gpt2_encode()
    cut_at_blanks = all(part[0] in ' \n' for part in parts[1:])
    if encode and cut_at_blanks:
        tokens = [token for part in parts for token in encode(part)]
        assert tokens == encode(text)


def test_a_text_without_blanks_is_cut_at_a_limit():
    parts = list(prepare.pieces(['x' * 1000] * 100, 100))
    assert ''.join(parts) == 'x' * 100_000
    assert max(map(len, parts)) <= 1600 + 1000


# ---- enwik8 --------------------------------------------------------------------------------------

def test_a_part_of_enwik8_becomes_bytes(folder, script, head):
    raw = gzip.open(head).read()
    assert script('prepare_enwik8.py', f'--input={head}', '--partial').code == 0
    opened = Dataset('enwik8')
    assert opened.meta['dtype'] == 'uint16'
    assert opened.meta['source']['partial'] is True
    assert opened.meta['source']['sha256'] == hashlib.sha256(raw).hexdigest()
    parts = [opened.split(split)[0] for split in ('train', 'val', 'test')]
    assert [len(part) for part in parts] == [3_738_960, 207_720, 207_720]
    assert np.concatenate(parts).astype(np.uint8).tobytes() == raw


def test_a_part_of_enwik8_becomes_bpe(folder, script, head, gpt2_files):
    import tiktoken
    raw = gzip.open(head).read()
    flags = [f'--input={head}', '--partial', '--tokenizer=gpt2']
    assert script('prepare_enwik8.py', *flags).code == 0
    opened = Dataset('enwik8_gpt2')
    encode = tiktoken.get_encoding('gpt2').encode_ordinary
    start = 0
    for split in ('train', 'val', 'test'):
        end = start + opened.meta['splits'][split]['bytes']
        text = raw[start:end].decode()   # fails where a character is cut
        assert opened.split(split)[0].tolist() == encode(text)
        start = end
    assert start == len(raw)


def write_zip(path, name, content):
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr(name, content)


def write_false_enwik8(kind):
    """Write a file that prepare_enwik8.py must refuse; return its path."""
    if kind == 'too short':
        Path('a').write_bytes(b'<mediawiki xmlns="\'' + b'x' * 1_000_000)
    elif kind == 'tiny':
        Path('a').write_bytes(b'<mediawiki xmlns="\'' + b'x' * 10)
    elif kind == 'other content':
        Path('a').write_bytes(b'<mediawiki xmlns=')
        os.truncate('a', 100_000_000)
    elif kind == 'other text':
        Path('a').write_bytes(b'x' * 10_000)
    elif kind == 'other member':
        write_zip('a', '../enwik8', b'x' * 1000)
    elif kind == 'cut zip':
        write_zip('b', 'enwik8', os.urandom(10_000))
        Path('a').write_bytes(Path('b').read_bytes()[:5000])
    elif kind == 'cut gzip':
        Path('a.gz').write_bytes(gzip.compress(os.urandom(10_000), mtime=0)[:-20])
        return 'a.gz'
    elif kind == 'folder':
        os.mkdir('a folder')
        return 'a folder'
    elif kind == 'missing':
        return 'nowhere'
    return 'a'


@pytest.mark.parametrize('kind, flags, words', [
    ('too short', [], ['1,000,019', '--partial']),
    ('tiny', ['--partial'], ['too few']),
    ('other content', [], ['not enwik8', 'prepare_text.py']),
    ('other text', ['--partial'], ['does not begin', 'prepare_text.py']),
    ('other member', [], ['enwik8']),
    ('cut zip', ['--partial'], ['zip']),
    ('cut gzip', [], ['a.gz']),
    ('folder', [], ['folder']),
    ('missing', [], ['nowhere cannot be read (No such file or directory); type']),
])
def test_a_file_that_is_not_enwik8_is_refused(folder, refused, kind, flags, words):
    path = write_false_enwik8(kind)
    refused('prepare_enwik8.py', f'--input={path}', *flags, words=words)
    assert not os.path.exists('data/enwik8/meta.json')
    assert not os.path.exists('../enwik8')   # the name of a member in one of the zips


def test_enwik8_without_a_network_asks_for_a_file(folder, refused, monkeypatch):
    monkeypatch.setattr('time.sleep', lambda s: None)   # between the tries of the download
    refused('prepare_enwik8.py', '--url=http://127.0.0.1:9/enwik8.zip', words=['--input'])
    assert not any(path.is_file() for path in folder.rglob('*'))


# ---- your own text -------------------------------------------------------------------------------

DOCUMENTS = ['first\nof two lines', 'the second 二', 'third 🎉', 'a fourth', 'five', 'six',
             'seven', 'eight', 'nine', 'ten', 'eleven']


def write_document_files():
    """Write DOCUMENTS as the files of a folder and of a folder inside it."""
    os.makedirs('in/deeper')
    folders = ['in', 'in/deeper']
    endings = ['txt', 'md', 'txt.gz']
    for i, text in enumerate(DOCUMENTS):
        ending = endings[i % 3]
        raw = text.encode()
        if ending == 'txt.gz':
            raw = gzip.compress(raw, mtime=0)
        Path(folders[i % 2], f'{i:02d}.{ending}').write_bytes(raw)
    Path('in/ignored.bin').write_bytes(b'\xff')


def write_documents(kind):
    """Write DOCUMENTS as some kind of files; return the value of --input for them."""
    if kind == 'folder':
        write_document_files()
        return 'in'
    if kind == 'jsonl':
        lines = []
        for i, text in enumerate(DOCUMENTS):
            lines.append(json.dumps(dict(text=text, n=i), ensure_ascii=i % 2 == 0))
        Path('in.jsonl').write_text('\n\n'.join(lines))
    elif kind == 'jsonl.gz':
        with gzip.open('in.jsonl.gz', 'wt') as f:
            f.writelines(json.dumps(dict(text=text)) + '\n' for text in DOCUMENTS)
    elif kind == 'txt':
        Path('in.txt').write_text(END_OF_TEXT.join(DOCUMENTS) + END_OF_TEXT)
    return f'in.{kind}'


def documents_in_reading_order(kind):
    if kind != 'folder':
        return DOCUMENTS
    paths = sorted(Path('in').rglob('[0-9]*'), key=str)
    return [DOCUMENTS[int(path.name[:2])] for path in paths]


@pytest.mark.parametrize('kind', ['folder', 'jsonl', 'jsonl.gz', 'txt'])
@pytest.mark.parametrize('tokenizer', ['char', 'byte', 'gpt2'])
@pytest.mark.parametrize('block', [1 << 20, 7])
def test_each_document_is_in_one_split(folder, script, gpt2_files, kind, tokenizer, block):
    """The kind of files and the size of the blocks that are read make no difference."""
    program = (ROOT / 'prepare_text.py').read_text()
    program = program.replace('BLOCK = 1 << 20', f'BLOCK = {block}')
    Path('prepare_text.py').write_text(program)
    flags = [f'--input={write_documents(kind)}', MINE, f'--tokenizer={tokenizer}',
             '--val_fraction=0.2']
    result = script(str(folder / 'prepare_text.py'), *flags)
    assert result.code == 0, result.err
    documents = documents_in_reading_order(kind)
    train = read('mine', 'train')
    val = read('mine', 'val')
    written = sum(info['bytes'] for info in Dataset('mine').meta['splits'].values())
    text_bytes = sum(len(text.encode()) for text in documents)
    assert source()['documents'] == len(documents)
    if tokenizer == 'gpt2':   # documents end with the token <|endoftext|>
        train = train.split(END_OF_TEXT)
        val = val.split(END_OF_TEXT)
        assert sorted(train + val) == sorted(documents)
        assert train == [text for text in documents if text in train]   # in reading order
        assert len(val) == 2
        assert written == text_bytes
    else:   # line breaks separate documents
        assert all((text in train) != (text in val) for text in documents)
        assert len(train) + len(val) + 1 == len('\n'.join(documents))
        assert written == text_bytes + len(documents) - 2


def test_a_single_document_is_cut(folder, script, gpt2_files):
    text = '0123456789 ' * 1000
    Path('a.txt').write_text(text)
    for tokenizer in ('char', 'byte', 'gpt2'):
        assert script('prepare_text.py', *A_TXT, f'--tokenizer={tokenizer}').code == 0
        assert read('mine', 'train') == text[:9900]
        assert read('mine', 'val') == text[9900:]


def test_a_dataset_made_anew_replaces_all_shards(folder, script):
    Path('a.txt').write_text('abcdefghij' * 1000)
    script('prepare_text.py', *A_TXT, '--shard_tokens=4000')
    shards = ['train_000.bin', 'train_001.bin', 'train_002.bin']
    assert sorted(os.listdir('data/mine')) == ['meta.json', *shards, 'val.bin']
    assert read('mine', 'train') == 'abcdefghij' * 900
    Path('a.txt').write_text('xyz' * 1000)
    script('prepare_text.py', *A_TXT)
    assert sorted(os.listdir('data/mine')) == ['meta.json', 'train.bin', 'val.bin']
    assert read('mine', 'train') == 'xyz' * 900


@pytest.mark.parametrize('name, content, words', [
    ('a.txt', b'caf\xe9', ['not UTF-8', 'iconv']),
    ('a.txt', b'\xff\xfe\xff', ['not UTF-16', 'iconv']),
    ('a.txt', 'ok é'.encode() * 300_000 + b'\xe2\x82', ['not UTF-8']),
    ('a.txt', b'%PDF-1.4\n%\xc4\xe5', ['a.txt is a PDF', 'pdftotext', 'type --input=FILE.txt']),
    ('a.txt', b'%PDF-1.4\nall of it ASCII', ['a PDF']),
    ('a.txt', b'PK\x03\x04\x14\0', ['a zip archive, as .docx', 'plain text']),
    ('a.txt', b'\xd0\xcf\x11\xe0\xa1', ['.doc']),
    ('a.txt', b'{\\rtf1 Hello}', ['RTF']),
    ('a.txt', gzip.compress(b'x' * 99, mtime=0), ['gzip', 'gunzip']),
    ('a.txt', 'no mark'.encode('utf-16le'), ['UTF-16', 'iconv -f utf-16le -t utf-8 a.txt']),
    ('a.txt', 'no mark'.encode('utf-16be'), ['UTF-16', 'iconv -f utf-16be']),
    ('a.txt', b'', ['no text']),
    ('a.txt', END_OF_TEXT.encode() * 3, ['no text']),
    ('a.txt', b'x', ['no text']),
    ('a.txt.gz', b'no gzip', ['a.txt.gz']),
    ('a.txt.gz', gzip.compress(b'x' * 9999, mtime=0)[:-9], ['a.txt.gz']),
    ('a.jsonl', b'{"text": "a"}\n\n{"body": "b"}\n', ['line 3', "'text'", 'body', '--field']),
    ('a.jsonl', b'{"text": "a"}\n{"text": 5}', ['line 2', 'text (a number)', '--field']),
    ('a.jsonl', b'{"text": "a"}\n[1]\n', ['line 2']),
    ('a.jsonl', b'{"text": "a"}\n{"text', ['line 2']),
    ('a.jsonl', b'[' * 100_000, ['line 1']),
    ('a.jsonl', b'{"text": "\xff"}', ['line 1']),
], ids=str)
def test_a_file_without_usable_text_is_refused(folder, refused, name, content, words):
    Path(name).write_bytes(content)
    refused('prepare_text.py', f'--input={name}', MINE, words=words)
    assert not os.path.exists('data')


@pytest.mark.parametrize('flags, words', [
    (['--input=nothing'], ['--input', 'nothing']),
    (['--input=*.none'], ['*.none', 'pattern']),
    (['--input=empty'], ['no file that ends with', '.jsonl']),
    (['--name=../mine'], ["name='../mine'", '--name=']),
    (['--name='], ['--name']),
    (['--tokenizer=klingon'], ['tokenizer=klingon', 'char, byte, bpe, gpt2']),
    (['--val_fraction=1'], ['val_fraction']),
    (['--shard_tokens=1'], ['shard_tokens']),
    (['--data_dir=a.txt'], ['--data_dir']),
])
def test_mistakes_are_refused_before_anything_is_written(folder, refused, flags, words):
    Path('a.txt').write_bytes(b'xy')
    os.mkdir('empty')
    refused('prepare_text.py', *A_TXT, *flags, words=words)
    assert sorted(os.listdir()) == ['a.txt', 'empty']


def test_input_inside_the_dataset_is_refused(folder, refused):
    os.makedirs('data/mine')
    text = Path('data/mine/input.txt')
    text.write_text('my only copy')
    refused('prepare_text.py', f'--input={text}', MINE, words=['data/mine', '--name'])
    assert text.read_text() == 'my only copy'


def test_a_byte_order_mark_is_not_text(folder, script):
    Path('a.txt').write_bytes('\ufeffabc'.encode() + b'abc' * 99)
    assert script('prepare_text.py', *A_TXT).code == 0
    assert Dataset('mine').tokenizer.chars == 'abc'
    assert script('prepare_shakespeare.py', '--input=a.txt').code == 0
    assert Dataset('shakespeare_char').tokenizer.chars == 'abc'


def test_half_of_a_surrogate_pair_becomes_a_question_mark(folder, script):
    Path('a.jsonl').write_text('{"text": "ab\\ud83d"}\n{"text": "\\ud83d\\ude00"}\n')
    for tokenizer in ('char', 'byte'):
        flags = ['--input=a.jsonl', MINE, f'--tokenizer={tokenizer}']
        assert script('prepare_text.py', *flags).code == 0
        assert read('mine', 'train') == 'a\n😀'   # four characters, two for each split
        assert read('mine', 'val') == 'b?'


# ---- interruptions, full disks and memory --------------------------------------------------------

@pytest.mark.parametrize('how', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interruption_leaves_the_older_dataset(folder, script, how):
    """Only SIGKILL leaves a partial file."""
    Path('a.txt').write_text('the old text ' * 100)
    script('prepare_text.py', *A_TXT)
    before = contents('data/mine')
    with open('b.txt', 'wb') as f:
        write_hex(f, lines=300, digits=200_000)
    command = [PYTHON, str(ROOT / 'prepare_text.py'), '--input=b.txt', MINE]
    run = subprocess.Popen(command, stderr=subprocess.PIPE)
    wait_for_a_part('mine/*.part')
    run.send_signal(KILL if how == signal.SIGKILL else how)
    run.communicate(timeout=60)
    assert contents('data/mine') == before
    if how == signal.SIGKILL:
        assert run.returncode == -9
    else:
        assert run.returncode == 128 + how
        assert not list(Path('data/mine').glob('*.part'))


SLOW_START = '''
import runpy
import sys
import time
sys.path.insert(0, {root!r})
import numpy as np
asarray = np.asarray
def slow(ids):
    time.sleep(0.2)
    return asarray(ids)
np.asarray = slow   # tokens are written slowly, so the signal comes while files are incomplete
runpy.run_path({script!r}, run_name='__main__')
'''


@pytest.mark.parametrize('name, flags', [
    ('prepare_shakespeare.py', []),
    ('prepare_enwik8.py', ['--partial']),
])
def test_an_interruption_of_a_first_dataset_leaves_no_file(folder, name, flags):
    with open('b.txt', 'wb') as f:
        f.write(b'<mediawiki xmlns=')
        write_hex(f, lines=900, digits=100_000)
    Path('start.py').write_text(SLOW_START.format(root=str(ROOT), script=str(ROOT / name)))
    command = [PYTHON, 'start.py', '--input=b.txt', *flags]
    run = subprocess.Popen(command, stderr=subprocess.PIPE)
    wait_for_a_part('*/*.part')
    run.send_signal(signal.SIGINT)
    said = run.communicate(timeout=60)[1]
    assert run.returncode == 130
    assert b'Traceback' not in said
    assert not list(Path('data').glob('*/*'))


def test_a_full_disk_is_reported_and_leaves_no_folder(folder, refused, monkeypatch):
    Path('a.txt').write_text('some text ' * 1000)

    def full(*args, **options):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(data.json, 'dump', full)
    refused('prepare_text.py', *A_TXT, words=['data/mine', 'No space left'])
    assert not os.path.exists('data/mine')


PRINT_PEAK = '''
import re
import runpy
import sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
status = open('/proc/self/status').read()
print(int(re.search(r'VmHWM:\\s*(\\d+) kB', status)[1]) // 1024)
'''


def test_memory_does_not_grow_with_the_input(folder):
    """A file of 200 MB is prepared in less than 500 MB of memory. torch alone takes half of it."""
    line = ('the quick brown fox jumps over the lazy dog ' * 20 + '\n').encode()
    with open('big.txt', 'wb') as f:
        for _ in range(200_000_000 // (len(line) * 100)):
            f.write(line * 100)
    flags = ['--input=big.txt', '--name=big', '--tokenizer=byte']
    command = [sys.executable, '-c', PRINT_PEAK, str(ROOT / 'prepare_text.py'), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120,
                          env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 500


# ---- the share for validation --------------------------------------------------------------------

def validation_characters(sizes, chosen):
    """Return how many characters a choice gives to validation, and check that it is possible."""
    characters = sum(size for size, taken in zip(sizes, chosen.validation) if taken)
    if chosen.cut is not None:
        assert not chosen.validation[chosen.cut]
        assert sizes[chosen.cut] == max(sizes)
        assert 1 <= chosen.at < sizes[chosen.cut]
        characters += sizes[chosen.cut] - chosen.at
    return characters


SIZE = st.one_of(st.integers(1, 4), st.integers(1, 10**6))
SIZES = st.lists(SIZE, min_size=1, max_size=40).filter(lambda sizes: sum(sizes) >= 2)
EXTREMES = st.sampled_from([0.1, 0.5, 0.9, 1e-9, 1 - 1e-9])


@settings(max_examples=1000, deadline=None, derandomize=True, database=None)
@given(SIZES, st.one_of(st.floats(0.001, 0.999), EXTREMES))
def test_the_share_is_within_a_document_or_exact(sizes, share):
    chosen = prepare.split_documents(array('q', sizes), share)
    total = sum(sizes)
    characters = validation_characters(sizes, chosen)
    least = 2 if total >= 4 else 1
    target = min(max(share * total, least), total - least)
    assert len(chosen.validation) == len(sizes)
    assert characters == chosen.characters
    assert least <= characters <= total - least
    allowed = 1
    if chosen.cut is None:
        quarter = min(target, total - target) / 4
        allowed = min(total / len(sizes), quarter) + 2
    assert abs(characters - target) <= allowed


@pytest.mark.parametrize('sizes, share, taken, cut, at', [
    ([100] * 10, 0.1, [4], None, 0),
    ([100] * 20, 0.1, [4, 14], None, 0),
    ([100] * 4, 0.5, [0, 2], None, 0),
    ([1000], 0.1, [], 0, 900),
    ([3], 0.1, [], 0, 2),
    ([4], 0.1, [], 0, 2),
    ([10], 0.999, [], 0, 2),
    ([96, 288_910 - 96], 0.1, [], 1, 259_923),
    ([2000, 1_115_394, 2000, 2000], 0.1, [], 1, 1_003_254),
    ([12, 10], 0.9, [1], 0, 2),   # the largest document alone is too short for validation
])
def test_documents_are_spread_or_the_largest_is_cut(sizes, share, taken, cut, at):
    chosen = prepare.split_documents(array('q', sizes), share)
    assert [i for i, byte in enumerate(chosen.validation) if byte] == taken
    assert chosen.cut == cut
    assert chosen.at == at


def write_a_book_among_notes(kind, book):
    """Write a long document and short ones into in/; return the name of the long one."""
    os.mkdir('in')
    if kind == 'jsonl':
        lines = [json.dumps(dict(text=text)) for text in ('short', book, 'another')]
        Path('in/web.jsonl').write_text('\n'.join(lines))
        return 'in/web.jsonl, line 2'
    if kind == 'title':
        Path('in/book.txt').write_text('A long book' + END_OF_TEXT + book)
        return 'in/book.txt'
    Path('in/book.txt').write_text(book)
    short = ['in/a0.txt']
    if kind == 'notes':
        short += ['in/a1.txt', 'in/a2.txt']
    for i, path in enumerate(short):
        Path(path).write_text(f'note {i}' * 16)
    return 'in/book.txt'


@pytest.mark.parametrize('kind', ['notes', 'readme', 'title', 'jsonl'])
def test_a_long_document_among_short_ones_is_cut_and_named(folder, script, kind):
    """val_fraction is a share of the text, not of the documents."""
    book = ''.join(f'{i} and so on. ' for i in range(2000))
    name = write_a_book_among_notes(kind, book)
    result = script('prepare_text.py', '--input=in', MINE)
    assert result.code == 0
    train = read('mine', 'train')
    val = read('mine', 'val')
    assert len(val) == pytest.approx(0.1 * (len(train) + len(val)), abs=5)
    assert book.endswith(val)
    note, = notes(result)
    assert f'the largest document ({name}, {len(book):,} characters) is cut' in note
    assert f'its last {len(val):,} characters are for validation' in note
    assert 'instead of 10 %' in note


def test_documents_and_their_split_are_reported(folder, script):
    Path('a.txt').write_text(END_OF_TEXT.join(['ten letter'] * 20))
    said = script('prepare_text.py', *A_TXT).err
    assert '20 documents, 447 bytes, 2 of them for validation' in said
    Path('a.txt').write_text('ten letter' * 20)
    said = script('prepare_text.py', *A_TXT).err
    assert '1 document, 200 bytes, its last 20 characters for validation' in said
    assert 'note: the largest' not in said


# ---- files, links and endings --------------------------------------------------------------------

POSIX = pytest.mark.skipif(
    os.name == 'nt', reason='symbolic links need a privilege there, processes have no signal 0')


@pytest.fixture
def three(folder):
    """in/ with three documents of 40 characters, one of them in a folder."""
    os.makedirs('in/deeper')
    for i, name in enumerate(['in/chat.txt', 'in/more.txt', 'in/deeper/last.txt']):
        Path(name).write_text(f'{i}' * 40)
    return folder


@POSIX
@pytest.mark.parametrize('pattern', ['in', 'in/**/*.txt', '**/**/*.txt'])
def test_a_file_is_read_once_whatever_links_to_it(three, script, pattern):
    os.symlink('chat.txt', 'in/latest.txt')
    os.symlink('.', 'in/loop')
    os.symlink('..', 'in/deeper/up')
    os.symlink('more.txt', 'in/a.txt')
    assert script('prepare_text.py', f'--input={pattern}', MINE).code == 0
    assert source()['files'] == source()['documents'] == 3
    assert [read_both().count(digit) for digit in '012'] == [40, 40, 40]


@POSIX
def test_links_to_a_folder_elsewhere_are_followed_once(three, script):
    os.mkdir('elsewhere')
    Path('elsewhere/far.txt').write_text('3' * 40)
    for name in ('in/link', 'in/second link'):
        os.symlink('../elsewhere', name)
    for pattern in ('in', 'in/**/*.txt'):
        assert script('prepare_text.py', f'--input={pattern}', MINE).code == 0
        assert source()['documents'] == 4


@POSIX
@pytest.mark.parametrize('pattern', ['in', 'in/**/*.txt'])
def test_locked_folders_and_broken_links_are_noted(three, script, monkeypatch, pattern):
    os.mkdir('in/locked')
    os.symlink('nowhere', 'in/gone.txt')
    real = os.scandir

    def scandir(path):
        if str(path).rstrip('/').endswith('locked'):
            raise PermissionError(13, 'Permission denied', str(path))
        return real(path)
    monkeypatch.setattr(os, 'scandir', scandir)
    result = script('prepare_text.py', f'--input={pattern}', MINE)
    assert result.code == 0
    note, = (note for note in notes(result) if note.startswith('note: 2 '))
    assert 'in/locked (Permission denied)' in note
    assert 'in/gone.txt (a broken link)' in note
    assert source()['documents'] == 3


@POSIX
def test_a_folder_with_only_broken_links_is_refused(folder, refused):
    os.mkdir('in')
    os.symlink('nowhere', 'in/gone.txt')
    refused('prepare_text.py', '--input=in', MINE, words=['in has no file that ends with'])
    refused('prepare_text.py', '--input=in/*.txt', MINE, words=['in/*.txt', 'match'])
    assert not os.path.exists('data')


def test_files_with_other_endings_are_counted(three, script):
    for name in ('a.pdf', 'b.PDF', 'deeper/c.pdf', 'd.json', 'Makefile'):
        Path('in', name).write_text('x')
    said = script('prepare_text.py', '--input=in', MINE).err
    assert ('note: 5 files were left out because of their ending: .pdf 3, .json 1, none 1; '
            'type --input="in/**/*.json" for the .json\n') in said


# ---- parts of a dataset --------------------------------------------------------------------------

@POSIX
def test_partial_files_of_ended_processes_are_removed(folder, script):
    ended = subprocess.Popen(['true'])
    ended.wait()
    running = subprocess.Popen(['sleep', '60'])
    stale = [f'train_000.bin.{ended.pid}.part', 'val.bin.99999999999999999999.part']
    kept = [f'train_000.bin.{running.pid}.part', 'input.txt.part']
    try:
        os.makedirs('data/mine')
        for name in stale + kept:
            Path('data/mine', name).write_text('x')
        Path('a.txt').write_text('some text ' * 100)
        assert script('prepare_text.py', *A_TXT).code == 0
    finally:
        running.kill()
        running.wait()
    assert sorted(os.listdir('data/mine')) == sorted(['meta.json', 'train.bin', 'val.bin', *kept])


@pytest.mark.parametrize('text, flags', [
    ('abc', []),
    ('abc', ['--val_fraction=0.001']),
    ('once', ['--tokenizer=gpt2', '--val_fraction=0.5']),
])
def test_a_split_too_short_to_train_on_is_refused(folder, refused, script, gpt2_files, text, flags):
    """The older dataset stays as it was."""
    Path('a.txt').write_text('the old text ' * 10)
    script('prepare_text.py', *A_TXT)
    before = contents('data/mine')
    Path('b.txt').write_text(text)
    words = ['data/mine', '1 token', '--input=FILE']
    refused('prepare_text.py', '--input=b.txt', MINE, *flags, words=words)
    assert contents('data/mine') == before


def test_replacing_another_dataset_is_noted(folder, script):
    Path('a.txt').write_text('some text ' * 1000)
    assert 'replaces' not in script('prepare_text.py', *A_TXT).err
    assert 'replaces' not in script('prepare_text.py', *A_TXT).err   # the same dataset again
    said = script('prepare_text.py', *A_TXT, '--tokenizer=byte').err
    assert ('note: data/mine replaces the dataset that was there: char, 9,000 training tokens, '
            'from a.txt\n') in said
    Path('data/mine/meta.json').write_text('[3]')
    said = script('prepare_text.py', *A_TXT).err
    assert 'note: data/mine replaces the token files that were there\n' in said


# ---- other inputs --------------------------------------------------------------------------------

def test_standard_input_is_read(folder, script, refused):
    text = 'piped é text ' * 100
    assert script('prepare_text.py', '--input=-', MINE, stdin=text).code == 0
    assert read_both() == text
    assert source()['name'] == 'standard input'
    words = ['standard input holds no text']
    refused('prepare_text.py', '--input=-', '--name=empty', stdin='', words=words)


def test_a_closed_standard_input_is_refused(folder, refused, monkeypatch):
    monkeypatch.setattr(sys, 'stdin', None)
    refused('prepare_text.py', '--input=-', MINE, words=['--input=-', '--input=FILE'])


@pytest.mark.parametrize('encoding', ['utf-16', 'utf-16-le', 'utf-16-be', 'utf-32', 'utf-32-be'])
@pytest.mark.parametrize('ending', ['txt', 'jsonl', 'json', 'txt.gz'])
def test_utf_16_and_utf_32_are_read(folder, script, encoding, ending):
    """Editors and shells on Windows write them, with a byte order mark."""
    content = text = 'Größe 二 🎉 ' * 50
    if ending == 'jsonl':
        content = json.dumps(dict(text=text), ensure_ascii=False) + '\n'
    elif ending == 'json':
        content = json.dumps([text], ensure_ascii=False)
    if encoding.endswith('e'):   # Python writes no mark for these encodings
        content = '\ufeff' + content
    raw = content.encode(encoding)
    if ending == 'txt.gz':
        raw = gzip.compress(raw, mtime=0)
    Path(f'a.{ending}').write_bytes(raw)
    assert script('prepare_text.py', f'--input=a.{ending}', MINE).code == 0
    assert read_both() == text


BAD_LINES = [
    '{"text": "first"}',
    '{"text": null}',
    'no JSON',
    '{"text": "second, longer"}',
    '{"body": "x"}',
    '',
    '{"text": "third"}',
]


def test_a_line_without_text_is_refused_or_skipped(folder, script, refused):
    Path('web.jsonl').write_text('\n'.join(BAD_LINES))
    words = ['web.jsonl, line 2', "'text'", 'null', '--field', '--skip_bad']
    refused('prepare_text.py', '--input=web.jsonl', MINE, words=words)
    result = script('prepare_text.py', '--input=web.jsonl', MINE, '--skip_bad')
    assert result.code == 0
    note = "note: 3 lines were skipped, the first is web.jsonl, line 2: no field 'text'"
    assert note in result.err
    assert source()['documents'] == 3


def test_a_line_that_is_not_json_is_refused(folder, refused):
    Path('two.jsonl').write_text('\n'.join(BAD_LINES[:1] + BAD_LINES[2:]))
    words = ['two.jsonl, line 2', 'not JSON', '--skip_bad']
    refused('prepare_text.py', '--input=two.jsonl', MINE, words=words)


def test_a_file_with_only_bad_lines_is_refused(folder, refused):
    Path('none.jsonl').write_text('\n'.join(BAD_LINES[1:3]))
    words = ['none.jsonl holds no text', '2 lines were skipped']
    refused('prepare_text.py', '--input=none.jsonl', MINE, '--skip_bad', words=words)


@pytest.mark.parametrize('name', ['a.json', 'a.json.gz'])
def test_a_json_list_of_texts_and_records_is_read(folder, script, name):
    items = ['a text of its own', dict(text='a record', n=1), dict(text='another ' * 9)]
    raw = json.dumps(items, indent=1).encode()
    if name == 'a.json.gz':
        raw = gzip.compress(raw, mtime=0)
    Path(name).write_bytes(raw)
    for pattern in (name, 'a.*'):
        assert script('prepare_text.py', f'--input={pattern}', MINE).code == 0
        assert source()['documents'] == 3
        assert 'a text of its own\na record\nanother' in read_both()


@pytest.mark.parametrize('content, words', [
    ('{"text": "a"}', ['a.json', 'list', 'object']),
    ('3', ['a.json', 'list', 'number']),
    ('{"text', ['a.json is not JSON']),
    ('[' * 100_000, ['a.json']),
    ('["a", 3]', ['a.json, item 2', '--skip_bad']),
    ('["a", {"text": null}]', ['a.json, item 2', 'null', '--skip_bad']),
    ('["a", ["b"]]', ['a.json, item 2']),
], ids=str)
def test_other_json_is_refused(folder, refused, content, words):
    Path('a.json').write_text(content)
    refused('prepare_text.py', '--input=a.json', MINE, words=words)


def test_items_without_text_can_be_skipped(folder, script):
    Path('b.json').write_text('["abcdefgh", null, {"text": 5}, {"text": "ijkl"}]')
    result = script('prepare_text.py', '--input=b.json', MINE, '--skip_bad')
    assert result.code == 0
    assert 'note: 2 items were skipped, the first is b.json, item 2: ' in result.err


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='the system has no named pipes')
def test_a_pipe_is_refused_because_input_is_read_twice(folder, refused):
    os.mkfifo('pipe')
    refused('prepare_text.py', '--input=pipe', MINE, words=['pipe', 'type --input=- < pipe'])


def test_input_that_changes_while_it_is_read_is_refused(folder, refused, monkeypatch):
    Path('a.txt').write_text('some text ' * 100)
    split_documents = prepare.split_documents

    def append_and_split(*arguments):
        with open('a.txt', 'a') as f:
            f.write(END_OF_TEXT + 'more')
        return split_documents(*arguments)
    monkeypatch.setattr(prepare, 'split_documents', append_and_split)
    refused('prepare_text.py', *A_TXT, words=['a.txt changed while it was read'])
    assert not os.path.exists('data/mine')


# ---- a vocabulary that exists --------------------------------------------------------------------

FROM_BEST = [MINE, '--tokenizer=FROM:out/best.pt']


def test_a_text_with_a_checkpoints_vocabulary_trains_it_further(trained, folder, script):
    shutil.copytree(trained, 'out')
    Path('a.txt').write_text('said the miller to his wife.\n' * 30)
    assert script('prepare_text.py', '--input=a.txt', *FROM_BEST).code == 0
    vocabulary = torch.load('out/best.pt', weights_only=True)['tokenizer']
    assert Dataset('mine').tokenizer.state() == vocabulary
    assert read('mine', 'train').startswith('said the miller')
    resumed = script('train.py', '--init_from=resume', '--dataset=mine', '--max_iters=62',
                     '--eval_iters=1', '--device=cpu')
    assert resumed.code == 0, resumed.err


def test_characters_not_in_a_vocabulary_are_refused_or_dropped(trained, folder, script, refused):
    shutil.copytree(trained, 'out')
    os.mkdir('other')
    Path('other/b.txt').write_text('said the 日 miller')
    Path('other/c.txt').write_text('Q. 日')
    words = ['out/best.pt', "'日' 2", "'Q' 1", '3 characters', 'other/b.txt', '--drop_unknown']
    refused('prepare_text.py', '--input=other', *FROM_BEST, words=words)
    result = script('prepare_text.py', '--input=other', *FROM_BEST, '--drop_unknown')
    assert result.code == 0
    note, = (note for note in notes(result) if note.startswith('note: dropped 3 characters'))
    for word in ("'日' 2", "'Q' 1", 'other/b.txt'):
        assert word in note
    assert read_both() == 'said the  miller. '


def test_a_vocabulary_without_a_line_break_is_refused_or_joins_documents(folder, script, refused):
    tokenizer = dict(kind='char', chars='ab')
    checkpoint.save('ab.pt', dict(format=1, model={}, model_args={}, tokenizer=tokenizer))
    Path('a.txt').write_text(END_OF_TEXT.join(['abab'] * 20))
    flags = [*A_TXT, '--tokenizer=FROM:ab.pt']
    refused('prepare_text.py', *flags, words=['line break', '--drop_unknown'])
    assert script('prepare_text.py', *flags, '--drop_unknown').code == 0
    assert read_both() == 'abab' * 20


@pytest.mark.parametrize('kind', ['byte', 'gpt2'])
def test_other_tokenizers_are_read_too(folder, script, gpt2_files, monkeypatch, kind):
    """The path may begin with ~, the home folder."""
    monkeypatch.setenv('HOME', str(folder))
    tokenizer = dict(kind=kind)
    checkpoint.save('it.pt', dict(format=1, model={}, model_args={}, tokenizer=tokenizer))
    Path('a.txt').write_text('any text 日 at all. ' * 40)
    assert script('prepare_text.py', *A_TXT, '--tokenizer=FROM:~/it.pt').code == 0
    assert Dataset('mine').tokenizer.state() == tokenizer


@pytest.mark.parametrize('kind, words', [
    ('missing', ['no.pt', 'there is no such file', 'FROM:']),
    ('not a checkpoint', ['no.pt', 'cannot be read as a checkpoint']),
    ('without a tokenizer', ['no.pt', 'no tokenizer']),
    ('unknown tokenizer', ['no.pt', 'tokenizer']),
])
def test_a_file_without_a_vocabulary_is_refused(folder, refused, kind, words):
    empty = dict(model={}, model_args={}, format=1)
    if kind == 'not a checkpoint':
        Path('no.pt').write_text('hello')
    elif kind == 'without a tokenizer':
        checkpoint.save('no.pt', empty)
    elif kind == 'unknown tokenizer':
        checkpoint.save('no.pt', empty | dict(tokenizer=dict(kind='klingon')))
    Path('a.txt').write_text('some text ' * 40)
    refused('prepare_text.py', *A_TXT, '--tokenizer=FROM:no.pt', words=words)
    assert not os.path.exists('data')


# ---- the commands that prepare_text.py prints ----------------------------------------------------

TINY_RUN = ['--max_iters=2', '--eval_iters=1', '--sample_interval=0', '--n_layer=1', '--n_head=1',
            '--n_embd=8', '--device=cpu']


def test_printed_commands_choose_for_the_text(folder, script):
    Path('my text.txt').write_text('the miller said to his wife, ' * 500)
    said = script('prepare_text.py', '--input=my text.txt', MINE).err
    train, sample = commands(said)
    assert train == ['train.py', 'config/train_text.py', '--dataset=mine']
    assert sample == ['sample.py', '--out_dir=out-mine']
    assert '--max_minutes=60' in said


@pytest.mark.parametrize('characters, flags', [
    (200, []),
    (10, []),
    (4, []),
    (10_000, ['--val_fraction=0.999']),
    (3000, []),
    (2600, ['--shard_tokens=1000']),
])
def test_printed_commands_work_for_short_texts_too(folder, script, characters, flags):
    Path('a.txt').write_text(('the miller said to his wife, ' * 400)[:characters])
    result = script('prepare_text.py', *A_TXT, *flags)
    assert not notes(result)
    train, sample = commands(result.err)
    done = script(*train, *TINY_RUN)
    assert done.code == 0, done.err
    text = script(*sample, '--max_new_tokens=9', '--device=cpu').out
    assert len(text) > 5


# ---- a validation text of its own ----------------------------------------------------------------

def test_a_validation_text_of_its_own(folder, script):
    Path('train.txt').write_text('one\n<|endoftext|>\ntwo\n<|endoftext|>\n')
    Path('valid.txt').write_text('three\n<|endoftext|>\nfour')
    result = script('prepare_text.py', 'train.txt', '--val_input=valid.txt', MINE)
    assert result.code == 0, result.err
    assert read('mine', 'train') == 'one\n\n\ntwo\n\n\n'
    assert read('mine', 'val') == 'three\n\n\nfour'
    assert '2 of them for validation' in result.err
    assert source()['files'] == 2


def test_a_folder_may_hold_the_validation_text(folder, script):
    os.mkdir('texts')
    for name in 'abc':
        Path(f'texts/{name}.txt').write_text(f'text {name} ' * 3)
    assert script('prepare_text.py', 'texts', '--val_input=texts/b.txt', MINE).code == 0
    assert read('mine', 'val') == 'text b ' * 3
    assert read('mine', 'train') == 'text a ' * 3 + '\n' + 'text c ' * 3


def test_standard_input_with_a_validation_text(folder, script):
    Path('b.txt').write_text('for validation')
    flags = ['--input=-', '--val_input=b.txt', MINE]
    assert script('prepare_text.py', *flags, stdin='for training').code == 0
    assert read('mine', 'train') == 'for training'
    assert read('mine', 'val') == 'for validation'


@pytest.mark.parametrize('flags, words', [
    (['--val_input=none.txt'], ['--val_input=none.txt', 'no such']),
    (['--val_input=-'], ['--val_input=-']),
    (['--val_input=a.txt'], ['none is left for training']),
    (['--val_input=b.txt', '--val_fraction=0.2'], ['do not go together']),
    (['--val_input=empty.txt'], ['the val split has 0 tokens']),
])
def test_mistakes_with_a_validation_text(folder, refused, flags, words):
    for name in ('a', 'b'):
        Path(f'{name}.txt').write_text('some text ' * 9)
    Path('empty.txt').write_text('')
    refused('prepare_text.py', *A_TXT, *flags, words=words)
    assert not os.path.exists('data/mine')
