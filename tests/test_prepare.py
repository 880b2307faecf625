"""enwik8 and your own text, to token files. pytest tests/test_prepare.py"""
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


def read(name, split):
    """The text of a split, its shards put together."""
    opened = Dataset(name)
    return opened.tokenizer.decode(np.concatenate(opened.split(split)).tolist()).decode()


# ---- pieces and tokens of them -------------------------------------------------------------------------------------

@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(st.lists(st.text(st.sampled_from("ab1'!. \n\t\r\x1c\x85\u00a0\u3000é你e\u0301🎉st<|endoftext|>"), max_size=40), max_size=8), st.integers(1, 20))
def test_pieces_are_the_text_and_cut_where_gpt2_cuts(blocks, size):
    text, parts = ''.join(blocks), list(prepare.pieces(blocks, size))
    assert ''.join(parts) == text and all(parts)
    assert all(len(part) <= 16 * size + len(max(blocks, key=len)) for part in parts)
    if (SHARED / 'tiktoken').exists():
        os.environ['TIKTOKEN_CACHE_DIR'] = str(SHARED / 'tiktoken')
        import tiktoken
        encode = tiktoken.get_encoding('gpt2').encode_ordinary
        if all(part[0] in ' \n' for part in parts[1:]):   # none was cut by force
            assert [i for part in parts for i in encode(part)] == encode(text)


def test_a_run_without_a_blank_is_cut_by_force():
    parts = list(prepare.pieces(['x' * 1000] * 100, 100))
    assert ''.join(parts) == 'x' * 100_000 and max(map(len, parts)) <= 1600 + 1000


# ---- enwik8 --------------------------------------------------------------------------------------------------------

def test_enwik8_head_in_bytes(folder, script, head):
    raw = gzip.open(head).read()
    assert script('prepare_enwik8.py', f'--input={head}', '--partial').code == 0
    opened = Dataset('enwik8')
    assert opened.meta['source']['partial'] is True and opened.meta['source']['sha256'] == hashlib.sha256(raw).hexdigest()
    parts = [opened.split(split)[0] for split in ('train', 'val', 'test')]
    assert [len(part) for part in parts] == [3_738_960, 207_720, 207_720] and opened.meta['dtype'] == 'uint16'
    assert np.concatenate(parts).astype(np.uint8).tobytes() == raw


def test_enwik8_head_as_bpe(folder, script, head, gpt2_files):
    raw = gzip.open(head).read()
    assert script('prepare_enwik8.py', f'--input={head}', '--partial', '--tokenizer=gpt2').code == 0
    opened = Dataset('enwik8_gpt2')
    import tiktoken
    start = 0
    for split in ('train', 'val', 'test'):
        info = opened.meta['splits'][split]
        text = raw[start:start + info['bytes']].decode()   # no character is cut
        assert opened.split(split)[0].tolist() == tiktoken.get_encoding('gpt2').encode_ordinary(text)
        start += info['bytes']
    assert start == len(raw)


@pytest.mark.parametrize('kind, flags, words', [
    ('short', [], ['1,000,019', '--partial']), ('other', [], ['not enwik8', 'prepare_text.py']), ('tiny', ['--partial'], ['too few']),
    ('text', ['--partial'], ['does not begin', 'prepare_text.py']), ('cut zip', ['--partial'], ['zip']), ('zip', [], ['enwik8']), ('bad gz', [], ['a.gz']), ('none', [], ['nowhere']), ('folder', [], ['folder'])])
def test_enwik8_refusals(folder, refused, kind, flags, words):
    path = 'a'
    if kind in ('short', 'tiny'):
        Path('a').write_bytes(b'<mediawiki xmlns="\'' + b'x' * (1_000_000 if kind == 'short' else 10))
    elif kind == 'text':
        Path('a').write_bytes(b'x' * 10_000)
    elif kind == 'cut zip':
        with zipfile.ZipFile('b', 'w') as archive:
            archive.writestr('enwik8', os.urandom(10_000))
        Path('a').write_bytes(Path('b').read_bytes()[:5000])
    elif kind == 'other':
        with open('a', 'wb') as f:
            f.write(b'<mediawiki xmlns=')
            f.truncate(100_000_000)
    elif kind == 'zip':
        with zipfile.ZipFile('a', 'w') as archive:
            archive.writestr('../enwik8', b'x' * 1000)
    elif kind == 'bad gz':
        path = 'a.gz'
        Path(path).write_bytes(gzip.compress(os.urandom(10_000))[:-20])
    elif kind == 'folder':
        path = 'a folder'
        os.mkdir(path)
    else:
        path = 'nowhere'
    refused('prepare_enwik8.py', f'--input={path}', *flags, words=words)
    assert not os.path.exists('data/enwik8/meta.json') and not os.path.exists('climbed')


def test_enwik8_download_that_is_none(folder, refused, monkeypatch):
    monkeypatch.setattr('time.sleep', lambda s: None)
    refused('prepare_enwik8.py', '--url=http://127.0.0.1:9/enwik8.zip', words=['--input'])
    assert not any(path.is_file() for path in folder.rglob('*'))


# ---- your own text -------------------------------------------------------------------------------------------------

DOCUMENTS = ['first\nof two lines', 'the second 二', 'third 🎉', 'a fourth', 'five', 'six', 'seven', 'eight', 'nine', 'ten', 'eleven']


def lay_out(kind):
    """DOCUMENTS as files; returns --input for them."""
    if kind == 'folder':
        os.makedirs('in/deeper')
        for i, text in enumerate(DOCUMENTS):
            name = f'in/{"deeper/" if i % 2 else ""}{i:02d}.' + ('txt', 'md', 'txt.gz')[i % 3]
            with gzip.open(name, 'wb') if name.endswith('.gz') else open(name, 'wb') as f:
                f.write(text.encode())
        Path('in/ignored.bin').write_bytes(b'\xff')
        return 'in'
    if kind == 'jsonl':
        Path('in.jsonl').write_text('\n\n'.join(json.dumps(dict(text=text, n=i), ensure_ascii=i % 2 == 0) for i, text in enumerate(DOCUMENTS)))
    elif kind == 'jsonl.gz':
        with gzip.open('in.jsonl.gz', 'wt') as f:
            f.writelines(json.dumps(dict(text=text)) + '\n' for text in DOCUMENTS)
    elif kind == 'txt':
        Path('in.txt').write_text(END_OF_TEXT.join(DOCUMENTS) + END_OF_TEXT)
    return f'in.{kind}' if kind != 'pattern' else 'in/**/*.t*'


@pytest.mark.parametrize('kind', ['folder', 'jsonl', 'jsonl.gz', 'txt'])
@pytest.mark.parametrize('tokenizer', ['char', 'byte', 'gpt2'])
@pytest.mark.parametrize('block', [1 << 20, 7])
def test_documents(folder, script, gpt2_files, monkeypatch, kind, tokenizer, block):
    """Whole documents in each split, apart from each other, whatever the files and however they are read."""
    source = (ROOT / 'prepare_text.py').read_text().replace('BLOCK = 1 << 20', f'BLOCK = {block}')
    (folder / 'prepare_text.py').write_text(source)
    result = script(str(folder / 'prepare_text.py'), f'--input={lay_out(kind)}', '--name=mine', f'--tokenizer={tokenizer}', '--val_fraction=0.2')
    assert result.code == 0, result.err
    order = DOCUMENTS
    if kind == 'folder':
        order = [DOCUMENTS[int(path.name[:2])] for path in sorted(Path('in').rglob('[0-9]*'), key=str)]
    apart = END_OF_TEXT if tokenizer == 'gpt2' else '\n'
    train, val = read('mine', 'train').split(apart), read('mine', 'val').split(apart)
    if apart == '\n':
        train, val = apart.join(train), apart.join(val)
        assert all((text in train) != (text in val) for text in order)
        assert len(train) + len(val) + 1 == len('\n'.join(order))
    else:
        assert sorted(train + val) == sorted(order) and len(val) == 2
        assert train == [text for text in order if text in train]   # in their order
    meta = Dataset('mine').meta
    assert meta['source']['documents'] == len(DOCUMENTS)
    text_bytes = sum(len(text.encode()) for text in order) + (0 if tokenizer == 'gpt2' else len(order) - 2)
    assert sum(info['bytes'] for info in meta['splits'].values()) == text_bytes


def test_a_single_document_is_cut(folder, script, gpt2_files):
    Path('a.txt').write_text('0123456789 ' * 1000)
    for tokenizer in ('char', 'byte', 'gpt2'):
        assert script('prepare_text.py', '--input=a.txt', '--name=mine', f'--tokenizer={tokenizer}').code == 0
        assert (read('mine', 'train'), read('mine', 'val')) == (('0123456789 ' * 1000)[:9900], ('0123456789 ' * 1000)[9900:])


def test_shards_and_a_dataset_made_anew(folder, script):
    Path('a.txt').write_text('abcdefghij' * 1000)
    script('prepare_text.py', '--input=a.txt', '--name=mine', '--shard_tokens=4000')
    assert sorted(os.listdir('data/mine')) == ['meta.json', 'train_000.bin', 'train_001.bin', 'train_002.bin', 'val.bin']
    assert read('mine', 'train') == 'abcdefghij' * 900
    Path('a.txt').write_text('xyz' * 1000)
    script('prepare_text.py', '--input=a.txt', '--name=mine')
    assert sorted(os.listdir('data/mine')) == ['meta.json', 'train.bin', 'val.bin'] and read('mine', 'train') == 'xyz' * 900


@pytest.mark.parametrize('write, flags, words', [
    ({}, [], ['--input', 'nothing']), ({'nothing': None}, [], ['no file that ends with', '.jsonl']),
    ({'nothing': b'caf\xe9'}, [], ['not UTF-8', 'iconv']), ({'nothing': b'\xff\xfe\xff'}, [], ['not UTF-16', 'iconv']), ({'nothing': 'ok é'.encode() * 300_000 + b'\xe2\x82'}, [], ['not UTF-8']),
    ({'nothing': b''}, [], ['no text']), ({'nothing': END_OF_TEXT.encode() * 3}, [], ['no text']), ({'nothing': b'x'}, [], ['no text']),
    ({'a.jsonl': b'{"text": "a"}\n\n{"body": "b"}\n'}, ['--input=a.jsonl'], ['line 3', "'text'", 'body', '--field']),
    ({'a.jsonl': b'{"text": "a"}\n{"text": 5}'}, ['--input=a.jsonl'], ['line 2', 'text (a number)', '--field']),
    ({'a.jsonl': b'{"text": "a"}\n[1]\n'}, ['--input=a.jsonl'], ['line 2']), ({'a.jsonl': b'{"text": "a"}\n{"text'}, ['--input=a.jsonl'], ['line 2']),
    ({'a.jsonl': b'[' * 100_000}, ['--input=a.jsonl'], ['line 1']), ({'a.jsonl': b'{"text": "\xff"}'}, ['--input=a.jsonl'], ['line 1']),
    ({'a.txt.gz': b'no gzip'}, ['--input=a.txt.gz'], ['a.txt.gz']), ({'a.txt.gz': gzip.compress(b'x' * 9999)[:-9]}, ['--input=a.txt.gz'], ['a.txt.gz']),
    ({'nothing': b'xy'}, ['--name=../mine'], ["name='../mine'", '--name=']), ({'nothing': b'xy'}, ['--name='], ['--name']),
    ({'nothing': b'xy'}, ['--tokenizer=bpe'], ['tokenizer=bpe']), ({'nothing': b'xy'}, ['--val_fraction=1'], ['val_fraction']),
    ({'nothing': b'xy'}, ['--shard_tokens=1'], ['shard_tokens']), ({}, ['--input=*.none'], ['*.none', 'pattern']),
    ({'data': b'x', 'nothing': b'xy'}, [], ['--data_dir'])])
def test_text_refusals(folder, refused, write, flags, words):
    """And nothing is left that looks like a dataset."""
    for name, content in write.items():
        os.mkdir(name) if content is None else Path(name).write_bytes(content)
    refused('prepare_text.py', '--input=nothing', '--name=mine', *flags, words=words)
    assert not any(Path().glob('data*/mine/*'))


def test_input_inside_of_the_dataset(folder, refused):
    os.makedirs('data/mine')
    Path('data/mine/input.txt').write_text('my only copy')
    refused('prepare_text.py', '--input=data/mine/input.txt', '--name=mine', words=['data/mine', '--name'])
    assert Path('data/mine/input.txt').read_text() == 'my only copy'


def test_byte_order_mark(folder, script):
    Path('a.txt').write_bytes('\ufeffabc'.encode() * 1 + b'abc' * 99)
    assert script('prepare_text.py', '--input=a.txt', '--name=mine').code == 0
    assert Dataset('mine').tokenizer.chars == 'abc'
    assert script('prepare_shakespeare.py', '--input=a.txt').code == 0
    assert Dataset('shakespeare_char').tokenizer.chars == 'abc'


def test_half_of_a_surrogate_pair(folder, script):
    Path('a.jsonl').write_text('{"text": "ab\\ud83d"}\n{"text": "\\ud83d\\ude00"}\n')
    for tokenizer in ('char', 'byte'):
        assert script('prepare_text.py', '--input=a.jsonl', '--name=mine', f'--tokenizer={tokenizer}').code == 0
        assert (read('mine', 'train'), read('mine', 'val')) == ('a\n😀', 'b?')   # four characters, two for each split


@pytest.mark.parametrize('how', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted(folder, script, how):
    """Whatever stops it: what was there before is there still, and nothing looks finished that is not."""
    Path('a.txt').write_text('the old text ' * 100)
    script('prepare_text.py', '--input=a.txt', '--name=mine')
    before = {path.name: path.read_bytes() for path in Path('data/mine').iterdir()}
    with open('b.txt', 'wb') as f:
        for _ in range(300):
            f.write(os.urandom(100_000).hex().encode() + b'\n')
    run = subprocess.Popen([PYTHON, str(ROOT / 'prepare_text.py'), '--input=b.txt', '--name=mine'], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list(Path('data/mine').glob('*.part')) and time.monotonic() < deadline:
        time.sleep(0.01)
    run.send_signal(KILL if how == signal.SIGKILL else how)
    run.communicate(timeout=60)
    assert run.returncode == (-9 if how == signal.SIGKILL else 128 + how)
    assert {path.name: path.read_bytes() for path in Path('data/mine').iterdir() if path.suffix != '.part'} == before
    assert how == signal.SIGKILL or not list(Path('data/mine').glob('*.part'))


@pytest.mark.parametrize('name', ['prepare_shakespeare.py', 'prepare_enwik8.py'])
def test_interrupted_in_the_middle_of_the_others(folder, name):
    """Ctrl-C while token files are written: none of them is left."""
    with open('b.txt', 'wb') as f:
        f.write(b'<mediawiki xmlns=')
        for _ in range(900):
            f.write(os.urandom(50_000).hex().encode() + b'\n')
    slow = 'import os, time; import numpy as np; real = np.asarray; np.asarray = lambda ids: (time.sleep(0.2), real(ids))[1]'
    Path('start.py').write_text(f'import sys; sys.path.insert(0, {str(ROOT)!r}); {slow}; import runpy; runpy.run_path({str(ROOT / name)!r}, run_name="__main__")')
    run = subprocess.Popen([PYTHON, 'start.py', '--input=b.txt', *['--partial'] * ('enwik8' in name)], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list(Path('data').glob('*/*.part')) and time.monotonic() < deadline:
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    assert b'Traceback' not in run.communicate(timeout=60)[1] and run.returncode == 130
    assert not list(Path('data').glob('*/*'))


def test_full_disk(folder, refused, monkeypatch):
    """No room: one line, and the old dataset as it was."""
    Path('a.txt').write_text('some text ' * 1000)

    def full(*args, **options):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(data.json, 'dump', full)
    refused('prepare_text.py', '--input=a.txt', '--name=mine', words=['data/mine', 'No space left'])
    assert not os.path.exists('data/mine')


def test_memory_does_not_grow_with_the_input(folder):
    """200 MB of text in one file, read, split and written: the process stays under 500 MB, of which torch alone takes half."""
    line = ('the quick brown fox jumps over the lazy dog ' * 20 + '\n').encode()
    with open('big.txt', 'wb') as f:
        for _ in range(200_000_000 // (len(line) * 100)):
            f.write(line * 100)
    code = ('import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name="__main__"); '
            'print(next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))')
    done = subprocess.run([sys.executable, '-c', code, str(ROOT / 'prepare_text.py'), '--input=big.txt', '--name=big', '--tokenizer=byte'],
                          capture_output=True, text=True, timeout=120, env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert done.returncode == 0 and int(done.stdout) < 500, done.stderr + done.stdout


def test_the_commands_it_prints(folder, script):
    """What it ends with can be typed as it stands."""
    Path('my text.txt').write_text('the miller said to his wife, ' * 500)
    said = script('prepare_text.py', '--input=my text.txt', '--name=mine').err
    train, sample = [line.split()[1:] for line in said.splitlines() if line.startswith('    python ')]
    assert '--max_minutes=5' in train and '--max_minutes=30' in said
    tiny = ['--max_iters=2', '--n_layer=1', '--n_embd=8', '--n_head=1', '--eval_iters=1', '--sample_interval=0', '--device=cpu']
    assert script(*train, *tiny).code == 0
    assert len(script(*sample, '--max_new_tokens=9', '--device=cpu').out) > 9


# ---- the share for validation --------------------------------------------------------------------

def validation_characters(sizes, chosen):
    """Return how many characters a choice gives to validation, and check that it is possible."""
    characters = sum(size for size, taken in zip(sizes, chosen.validation) if taken)
    if chosen.cut is not None:
        assert not chosen.validation[chosen.cut] and sizes[chosen.cut] == max(sizes)
        assert 1 <= chosen.at < sizes[chosen.cut]
        characters += sizes[chosen.cut] - chosen.at
    return characters


@settings(max_examples=1000, deadline=None, derandomize=True, database=None)
@given(st.lists(st.one_of(st.integers(1, 4), st.integers(1, 10**6)), min_size=1, max_size=40)
       .filter(lambda sizes: sum(sizes) >= 2),
       st.one_of(st.floats(0.001, 0.999), st.sampled_from([0.1, 0.5, 0.9, 1e-9, 1 - 1e-9])))
def test_the_share_is_within_a_document_or_exact(sizes, share):
    chosen = prepare.split_documents(array('q', sizes), share)
    total = sum(sizes)
    characters = validation_characters(sizes, chosen)
    least = 2 if total >= 4 else 1
    target = min(max(share * total, least), total - least)
    assert len(chosen.validation) == len(sizes) and characters == chosen.characters
    assert least <= characters <= total - least
    if chosen.cut is None:
        assert abs(characters - target) <= min(total / len(sizes), min(target, total - target) / 4) + 2
    else:
        assert abs(characters - target) <= 1


@pytest.mark.parametrize('sizes, share, taken, cut, at', [
    ([100] * 10, 0.1, [4], None, 0), ([100] * 20, 0.1, [4, 14], None, 0), ([100] * 4, 0.5, [0, 2], None, 0),
    ([1000], 0.1, [], 0, 900), ([3], 0.1, [], 0, 2), ([4], 0.1, [], 0, 2), ([10], 0.999, [], 0, 2),
    ([96, 288_910 - 96], 0.1, [], 1, 259_923), ([2000, 1_115_394, 2000, 2000], 0.1, [], 1, 1_003_254),
    ([12, 10], 0.9, [1], 0, 2)])   # the largest alone would be too short for what validation is owed
def test_choice_of_documents(sizes, share, taken, cut, at):
    chosen = prepare.split_documents(array('q', sizes), share)
    assert [i for i, byte in enumerate(chosen.validation) if byte] == taken
    assert (chosen.cut, chosen.at) == (cut, at)


@pytest.mark.parametrize('kind', ['notes', 'readme', 'title', 'jsonl'])
def test_val_fraction_is_a_share_of_the_text(folder, script, kind):
    """A long document among short ones is cut, and that is said with its name."""
    book = ''.join(f'{i} and so on. ' for i in range(2000))
    os.mkdir('in')
    if kind == 'title':
        Path('in/book.txt').write_text('A long book' + END_OF_TEXT + book)
    elif kind == 'jsonl':
        lines = [json.dumps(dict(text=text)) for text in ('short', book, 'another')]
        Path('in/web.jsonl').write_text('\n'.join(lines))
    else:
        Path('in/book.txt').write_text(book)
        for i in range(3 if kind == 'notes' else 1):
            Path(f'in/a{i}.txt').write_text(f'note {i}' * 16)
    result = script('prepare_text.py', '--input=in', '--name=mine')
    train, val = read('mine', 'train'), read('mine', 'val')
    assert result.code == 0 and len(val) == pytest.approx(0.1 * (len(train) + len(val)), abs=5)
    assert book.endswith(val)
    note, = (line for line in result.err.splitlines() if line.startswith('note: '))
    where = 'in/web.jsonl, line 2' if kind == 'jsonl' else 'in/book.txt'
    assert f'the largest document ({where}, {len(book):,} characters) is cut' in note
    assert f'its last {len(val):,} characters are for validation' in note and 'instead of 10 %' in note


def test_what_was_done_is_said(folder, script):
    Path('a.txt').write_text(END_OF_TEXT.join(['ten letter'] * 20))
    assert '20 documents, 447 bytes, 2 of them for validation' in script('prepare_text.py', '--input=a.txt', '--name=mine').err
    Path('a.txt').write_text('ten letter' * 20)
    said = script('prepare_text.py', '--input=a.txt', '--name=mine').err
    assert '1 document, 200 bytes, its last 20 characters for validation' in said and 'note: the largest' not in said


# ---- files, links and endings --------------------------------------------------------------------

POSIX = pytest.mark.skipif(os.name == 'nt', reason='symbolic links need a privilege there, processes have no signal 0')


@pytest.fixture
def three(folder):
    """in/ with three documents of 40 characters, one of them in a folder."""
    os.makedirs('in/deeper')
    for i, name in enumerate(['in/chat.txt', 'in/more.txt', 'in/deeper/last.txt']):
        Path(name).write_text(f'{i}' * 40)
    return folder


@POSIX
@pytest.mark.parametrize('kind', ['folder', 'pattern', 'nested pattern'])
def test_a_file_is_read_once_whatever_links_to_it(three, script, kind):
    os.symlink('chat.txt', 'in/latest.txt')
    os.symlink('.', 'in/loop')
    os.symlink('..', 'in/deeper/up')
    os.symlink('more.txt', 'in/a.txt')
    given = dict(folder='in', pattern='in/**/*.txt').get(kind, '**/**/*.txt')
    assert script('prepare_text.py', f'--input={given}', '--name=mine').code == 0
    assert Dataset('mine').meta['source']['files'] == Dataset('mine').meta['source']['documents'] == 3
    both = read('mine', 'train') + read('mine', 'val')
    assert [both.count(digit) for digit in '012'] == [40, 40, 40]


@POSIX
def test_a_link_to_a_folder_elsewhere_is_followed(three, script):
    os.mkdir('elsewhere')
    Path('elsewhere/far.txt').write_text('3' * 40)
    for name in ('in/link', 'in/second link'):
        os.symlink('../elsewhere', name)
    for what in ('in', 'in/**/*.txt'):
        assert script('prepare_text.py', f'--input={what}', '--name=mine').code == 0
        assert Dataset('mine').meta['source']['documents'] == 4


@POSIX
@pytest.mark.parametrize('given', ['in', 'in/**/*.txt'])
def test_what_cannot_be_entered_is_said(three, script, monkeypatch, given):
    os.mkdir('in/locked')
    os.symlink('nowhere', 'in/gone.txt')
    real = os.scandir

    def scandir(path):
        if str(path).rstrip('/').endswith('locked'):
            raise PermissionError(13, 'Permission denied', str(path))
        return real(path)
    monkeypatch.setattr(os, 'scandir', scandir)
    result = script('prepare_text.py', f'--input={given}', '--name=mine')
    note, = (line for line in result.err.splitlines() if line.startswith('note: 2 '))
    assert 'in/locked (Permission denied)' in note and 'in/gone.txt (a link to what is not there)' in note
    assert result.code == 0 and Dataset('mine').meta['source']['documents'] == 3


@POSIX
def test_nothing_left_is_an_error(folder, refused):
    os.mkdir('in')
    os.symlink('nowhere', 'in/gone.txt')
    refused('prepare_text.py', '--input=in', '--name=mine', words=['in has no file that ends with'])
    refused('prepare_text.py', '--input=in/*.txt', '--name=mine', words=['in/*.txt', 'match'])
    assert not os.path.exists('data')


def test_endings_left_out_are_counted(three, script):
    for name in ('a.pdf', 'b.PDF', 'deeper/c.pdf', 'd.json', 'Makefile'):
        Path('in', name).write_text('x')
    said = script('prepare_text.py', '--input=in', '--name=mine').err
    assert ('note: 5 files were left out because of their ending: .pdf 3, .json 1, none 1; '
            'type --input="in/**/*.json" for the .json\n') in said


# ---- parts of a dataset --------------------------------------------------------------------------

@POSIX
def test_parts_of_ended_processes_are_removed(folder, script):
    ended = subprocess.Popen(['true'])
    ended.wait()
    running = subprocess.Popen(['sleep', '60'])
    try:
        os.makedirs('data/mine')
        stale = [f'train_000.bin.{ended.pid}.part', 'val.bin.99999999999999999999.part']
        kept = [f'train_000.bin.{running.pid}.part', 'input.txt.part']
        for name in stale + kept:
            Path('data/mine', name).write_text('x')
        Path('a.txt').write_text('some text ' * 100)
        assert script('prepare_text.py', '--input=a.txt', '--name=mine').code == 0
    finally:
        running.kill()
        running.wait()
    assert sorted(os.listdir('data/mine')) == sorted(['meta.json', 'train.bin', 'val.bin', *kept])


@pytest.mark.parametrize('flags', [[], ['--val_fraction=0.001'], ['--tokenizer=gpt2', '--val_fraction=0.5']])
def test_a_split_too_short_to_train_on(folder, refused, script, gpt2_files, flags):
    """Refused, and the older dataset is as it was."""
    Path('a.txt').write_text('the old text ' * 10)
    script('prepare_text.py', '--input=a.txt', '--name=mine')
    before = {path.name: path.read_bytes() for path in Path('data/mine').iterdir()}
    Path('b.txt').write_text('abc' if len(flags) < 2 else 'once')
    refused('prepare_text.py', '--input=b.txt', '--name=mine', *flags, words=['data/mine', '1 token', '--input=FILE'])
    assert {path.name: path.read_bytes() for path in Path('data/mine').iterdir()} == before


def test_a_dataset_that_is_replaced_is_said(folder, script):
    Path('a.txt').write_text('some text ' * 1000)
    assert 'replaces' not in script('prepare_text.py', '--input=a.txt', '--name=mine').err
    assert 'replaces' not in script('prepare_text.py', '--input=a.txt', '--name=mine').err   # the same again
    said = script('prepare_text.py', '--input=a.txt', '--name=mine', '--tokenizer=byte').err
    assert ('note: data/mine replaces the dataset that was there: char, 9,000 training tokens, '
            'from a.txt\n') in said
    Path('data/mine/meta.json').write_text('[3]')
    said = script('prepare_text.py', '--input=a.txt', '--name=mine').err
    assert 'note: data/mine replaces the token files that were there\n' in said


# ---- other inputs --------------------------------------------------------------------------------

def test_standard_input(folder, script, refused):
    text = 'piped é text ' * 100
    assert script('prepare_text.py', '--input=-', '--name=mine', stdin=text).code == 0
    assert read('mine', 'train') + read('mine', 'val') == text
    assert Dataset('mine').meta['source']['name'] == 'standard input'
    refused('prepare_text.py', '--input=-', '--name=empty', stdin='', words=['standard input holds no text'])


def test_no_standard_input(folder, refused, monkeypatch):
    monkeypatch.setattr(sys, 'stdin', None)
    refused('prepare_text.py', '--input=-', '--name=mine', words=['--input=-', '--input=FILE'])


@pytest.mark.parametrize('encoding', ['utf-16', 'utf-16-le', 'utf-16-be', 'utf-32', 'utf-32-be'])
@pytest.mark.parametrize('ending', ['txt', 'jsonl', 'json', 'txt.gz'])
def test_wide_encodings_with_a_mark(folder, script, encoding, ending):
    """UTF-16 and UTF-32 as editors and shells on Windows write them."""
    text = 'Größe 二 🎉 ' * 50
    content = dict(jsonl=json.dumps(dict(text=text), ensure_ascii=False) + '\n',
                   json=json.dumps([text], ensure_ascii=False)).get(ending, text)
    if encoding.endswith('e'):
        content = '\ufeff' + content
    raw = content.encode(encoding)
    Path(f'a.{ending}').write_bytes(gzip.compress(raw) if ending.endswith('gz') else raw)
    assert script('prepare_text.py', f'--input=a.{ending}', '--name=mine').code == 0
    assert read('mine', 'train') + read('mine', 'val') == text


BAD_LINES = ['{"text": "first"}', '{"text": null}', 'no JSON', '{"text": "second, longer"}', '{"body": "x"}', '',
             '{"text": "third"}']


def test_lines_without_a_text(folder, script, refused):
    Path('web.jsonl').write_text('\n'.join(BAD_LINES))
    refused('prepare_text.py', '--input=web.jsonl', '--name=mine',
            words=['web.jsonl, line 2', "'text'", 'null', '--field', '--skip_bad'])
    Path('two.jsonl').write_text('\n'.join(BAD_LINES[:1] + BAD_LINES[2:]))
    refused('prepare_text.py', '--input=two.jsonl', '--name=mine', words=['two.jsonl, line 2', 'not JSON', '--skip_bad'])
    result = script('prepare_text.py', '--input=web.jsonl', '--name=mine', '--skip_bad')
    assert result.code == 0 and "note: 3 lines were skipped, the first is web.jsonl, line 2: no field 'text'" in result.err
    assert Dataset('mine').meta['source']['documents'] == 3
    Path('none.jsonl').write_text('\n'.join(BAD_LINES[1:3]))
    refused('prepare_text.py', '--input=none.jsonl', '--name=mine', '--skip_bad', words=['none.jsonl holds no text', '2 lines were skipped'])


@pytest.mark.parametrize('packed', [False, True])
def test_json_lists(folder, script, packed):
    items = ['a text of its own', dict(text='a record', n=1), dict(text='another ' * 9)]
    raw = json.dumps(items, indent=1).encode()
    name = 'a.json.gz' if packed else 'a.json'
    Path(name).write_bytes(gzip.compress(raw) if packed else raw)
    for what in (name, 'a.*'):
        assert script('prepare_text.py', f'--input={what}', '--name=mine').code == 0
        assert Dataset('mine').meta['source']['documents'] == 3
        assert 'a text of its own\na record\nanother' in read('mine', 'train') + read('mine', 'val')
    Path(name).unlink()


@pytest.mark.parametrize('content, words', [
    ('{"text": "a"}', ['a.json', 'list', 'object']), ('3', ['a.json', 'list', 'number']), ('{"text', ['a.json is not JSON']),
    ('[' * 100_000, ['a.json']), ('["a", 3]', ['a.json, item 2', '--skip_bad']), ('["a", {"text": null}]', ['a.json, item 2', 'null', '--skip_bad']),
    ('["a", ["b"]]', ['a.json, item 2'])])
def test_other_json(folder, refused, script, content, words):
    Path('a.json').write_text(content)
    refused('prepare_text.py', '--input=a.json', '--name=mine', words=words)
    Path('b.json').write_text('["abcdefgh", null, {"text": 5}, {"text": "ijkl"}]')
    result = script('prepare_text.py', '--input=b.json', '--name=mine', '--skip_bad')
    assert result.code == 0 and 'note: 2 items were skipped, the first is b.json, item 2: ' in result.err


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='the system has no named pipes')
def test_a_pipe_is_not_read_more_than_once(folder, refused):
    os.mkfifo('pipe')
    refused('prepare_text.py', '--input=pipe', '--name=mine', words=['pipe', 'type --input=- < pipe'])


def test_input_that_changes_while_it_is_read(folder, refused, monkeypatch):
    Path('a.txt').write_text('some text ' * 100)
    real = prepare.split_documents

    def choose(*given):
        with open('a.txt', 'a') as f:
            f.write(END_OF_TEXT + 'more')
        return real(*given)
    monkeypatch.setattr(prepare, 'split_documents', choose)
    refused('prepare_text.py', '--input=a.txt', '--name=mine', words=['a.txt changed while it was read'])
    assert not os.path.exists('data/mine')


# ---- a vocabulary that exists --------------------------------------------------------------------

RESUME = ['--init_from=resume', '--dataset=mine', '--max_iters=62', '--eval_iters=1', '--device=cpu']


def test_the_vocabulary_of_a_checkpoint(trained, folder, script, refused):
    """Prepared with it, a text is accepted by --init_from=resume."""
    shutil.copytree(trained, 'out')
    its = torch.load('out/best.pt', weights_only=True)['tokenizer']
    Path('a.txt').write_text('said the miller to his wife.\n' * 30)
    assert script('prepare_text.py', '--input=a.txt', '--name=mine', '--tokenizer=FROM:out/best.pt').code == 0
    assert Dataset('mine').tokenizer.state() == its and read('mine', 'train').startswith('said the miller')
    resumed = script('train.py', *RESUME)
    assert resumed.code == 0, resumed.err
    Path('other').mkdir()
    Path('other/b.txt').write_text('said the 日 miller')
    Path('other/c.txt').write_text('Q. 日')
    lacking = refused('prepare_text.py', '--input=other', '--name=mine', '--tokenizer=FROM:out/best.pt',
                      words=["'日' 2", "'Q' 1", '3 characters', 'other/b.txt', '--drop_unknown'])
    assert 'out/best.pt' in lacking
    result = script('prepare_text.py', '--input=other', '--name=mine', '--tokenizer=FROM:out/best.pt', '--drop_unknown')
    note, = (line for line in result.err.splitlines() if line.startswith('note: dropped 3 characters'))
    assert result.code == 0 and "'日' 2" in note and "'Q' 1" in note and 'other/b.txt' in note
    both = read('mine', 'train') + read('mine', 'val')
    assert both == 'said the  miller. '


def test_a_vocabulary_without_a_line_break(folder, script, refused):
    checkpoint.save('ab.pt', dict(format=1, model={}, model_args={}, tokenizer=dict(kind='char', chars='ab')))
    Path('a.txt').write_text(END_OF_TEXT.join(['abab'] * 20))
    refused('prepare_text.py', '--input=a.txt', '--name=mine', '--tokenizer=FROM:ab.pt', words=['line break', '--drop_unknown'])
    assert script('prepare_text.py', '--input=a.txt', '--name=mine', '--tokenizer=FROM:ab.pt', '--drop_unknown').code == 0
    assert read('mine', 'train') + read('mine', 'val') == 'abab' * 20


@pytest.mark.parametrize('kind', ['byte', 'gpt2'])
def test_other_vocabularies_of_checkpoints(folder, script, gpt2_files, monkeypatch, kind):
    monkeypatch.setenv('HOME', str(folder))
    checkpoint.save('it.pt', dict(format=1, model={}, model_args={}, tokenizer=dict(kind=kind)))
    Path('a.txt').write_text('any text 日 at all. ' * 40)
    assert script('prepare_text.py', '--input=a.txt', '--name=mine', '--tokenizer=FROM:~/it.pt').code == 0
    assert Dataset('mine').tokenizer.state() == dict(kind=kind)


@pytest.mark.parametrize('kind, words', [
    ('none', ['no.pt', 'there is no such file', 'FROM:']), ('foreign', ['no.pt', 'cannot be read as a checkpoint']),
    ('without', ['no.pt', 'no tokenizer']), ('unknown', ['no.pt', 'tokenizer'])])
def test_files_without_a_vocabulary(folder, refused, kind, words):
    whole = dict(model={}, model_args={}, format=1)
    if kind == 'foreign':
        Path('no.pt').write_text('hello')
    elif kind != 'none':
        checkpoint.save('no.pt', whole | (dict(tokenizer=dict(kind='klingon')) if kind == 'unknown' else {}))
    Path('a.txt').write_text('some text ' * 40)
    refused('prepare_text.py', '--input=a.txt', '--name=mine', '--tokenizer=FROM:no.pt', words=words)
    assert not os.path.exists('data')


# ---- what it says at the end ---------------------------------------------------------------------

@pytest.mark.parametrize('characters, flags, block_size', [
    (200, [], 64), (60, [], 53), (10, [], 7), (4, [], 1), (10_000, ['--val_fraction=0.999'], 9), (3000, [], None),
    (2600, ['--shard_tokens=1000'], None)])
def test_the_commands_work_however_short_the_text_is(folder, script, characters, flags, block_size):
    Path('a.txt').write_text(('the miller said to his wife, ' * 400)[:characters])
    said = script('prepare_text.py', '--input=a.txt', '--name=mine', *flags).err
    train, sample = [shlex.split(line)[1:] for line in said.splitlines() if line.startswith('    python ')]
    assert [flag for flag in train if 'block_size' in flag] == ([f'--block_size={block_size}'] if block_size else [])
    assert ('note: ' in said) == bool(block_size) and 'val_fraction' not in said
    tiny = ['--max_iters=2', '--n_layer=1', '--n_embd=8', '--n_head=1', '--eval_iters=1', '--sample_interval=0', '--device=cpu']
    done = script(*train, *tiny)
    assert done.code == 0, done.err
    assert len(script(*sample, '--max_new_tokens=9', '--device=cpu').out) > 5
