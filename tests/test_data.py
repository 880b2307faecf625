"""data.py and prepare_shakespeare.py. pytest tests/test_data.py"""
import builtins
import hashlib
import json
import math
import mmap
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from lib import checkpoint, data, tokenizers
from lib.data import Dataset, TrainingWindows, evaluation_batches, how_to_make
from lib.prepare import write_dataset
from lib.tokenizers import ByteTokenizer, CharTokenizer

SCRIPTS = [
    'To be, or not to be',
    'Быть или не быть',
    '生きるべきか',
    '存在还是毁灭',
    'أكون أو لا أكون',
    'להיות או לא להיות',
    '🎭🏴󠁧󠁢󠁥󠁮󠁧󠁿 e\u0301',
]
SOURCE = dict(name='made', url=None, sha256='', stand_in=False)
TINY_SHAKESPEARE = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
UNREACHABLE = 'http://127.0.0.1:9/x'


def make(tokens, vocab=256):
    """Write tokens as both splits of data/made. Return the dataset."""
    class Numbers(ByteTokenizer):
        vocab_size = vocab
    splits = dict(train=[(tokens, len(tokens))], val=[(tokens, len(tokens))])
    write_dataset('data/made', splits, Numbers(), SOURCE)
    made = Dataset('made')
    made.vocab_size = vocab
    return made


def write_shards(shards, chars):
    """Write arrays as data/made/train_000.bin, train_001.bin, ..., and nanoGPT's meta.pkl."""
    os.makedirs('data/made')
    for i, tokens in enumerate(shards):
        tokens.astype('<u2').tofile(f'data/made/train_00{i}.bin')
    write_meta_pkl(dict(vocab_size=len(chars), itos=dict(enumerate(chars)), stoi={}))


def write_meta_pkl(meta):
    with open('data/made/meta.pkl', 'wb') as f:
        pickle.dump(meta, f)


def error_of(capsys, act):
    """Return the one line of error with which act() ends; the exit code must be 2."""
    with pytest.raises(SystemExit) as stop:
        act()
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith('error: ')
    assert error.count('\n') == 1
    return error


# ---- tokenizers --------------------------------------------------------------------------------

@pytest.mark.parametrize('text', [*SCRIPTS, '', '\x00\r\n\t', ''.join(SCRIPTS)])
def test_round_trip(text, gpt2_files):
    for tokenizer in (CharTokenizer(text or 'x'), ByteTokenizer(), tokenizers.GPT2Tokenizer()):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids.tolist()).decode() == text
        if len(ids):
            assert 0 <= ids.min()
            assert ids.max() < tokenizer.vocab_size
        state = json.loads(json.dumps(tokenizer.state()))
        again = tokenizers.load_tokenizer(state)
        assert again.encode(text).tolist() == ids.tolist()


def test_gpt2_tokens_are_gpt2s(gpt2_files):
    ids = tokenizers.GPT2Tokenizer().encode('Hello, world! <|endoftext|>')
    assert ids.tolist() == [15496, 11, 995, 0, 220, 50256]


def test_unknown_characters_are_named_once(capsys):
    error = error_of(capsys, lambda: CharTokenizer('abc').encode('abc日z本a日'))
    for word in ("'日'", "'z'", "'本'", "'abc'"):
        assert word in error
    assert error.count("'日'") == 1


@pytest.mark.parametrize('state', [
    None,
    {},
    {'kind': 'bpe'},
    {'kind': 'char'},
    {'kind': 'char', 'chars': ''},
    {'kind': 'char', 'chars': 3},
])
def test_a_state_that_is_not_a_tokenizers_is_refused(state):
    with pytest.raises(ValueError):
        tokenizers.load_tokenizer(state)


# ---- token files -------------------------------------------------------------------------------

def test_files_are_what_the_contract_says(folder):
    made = make(np.arange(100) % 256)
    raw = (folder / 'data/made/train.bin').read_bytes()
    assert raw == np.arange(100, dtype='<u2').tobytes()   # tokens alone, as in nanoGPT's files
    assert made.meta['dtype'] == 'uint16'
    split = made.meta['splits']['train']
    assert split['tokens'] == 100
    assert split['sha256'] == {'train.bin': hashlib.sha256(raw).hexdigest()}
    assert made.split('train')[0].tolist() == list(range(100))
    assert sorted(os.listdir('data/made')) == ['meta.json', 'train.bin', 'val.bin']


def test_large_vocabulary_takes_four_bytes(folder):
    text = ''.join(map(chr, range(0x10000, 0x10000 + 70_000)))
    tokenizer = CharTokenizer(text)
    write_dataset('data/made', dict(train=[(tokenizer.encode(text), 1)]), tokenizer, SOURCE)
    shard = Dataset('made').split('train')[0]
    assert shard.dtype == np.uint32
    assert shard.max() == 69_999
    assert tokenizer.decode(shard.tolist()).decode() == text


def test_shards_are_read_in_order(folder):
    write_shards([np.full(10, i) for i in range(3)], 'abc')
    shards = Dataset('made').split('train')
    assert np.concatenate(shards).tolist() == [0] * 10 + [1] * 10 + [2] * 10


def test_the_characters_of_nanogpts_meta_pkl_are_read(folder):
    write_shards([np.full(10, 2)], 'abc')
    assert Dataset('made').tokenizer.state() == dict(kind='char', chars='abc')


def test_a_pickle_that_is_not_nanogpts_is_refused(folder):
    write_shards([np.full(10, 2)], 'abc')
    write_meta_pkl(os.system)
    with pytest.raises(SystemExit):
        Dataset('made')


def test_without_any_meta_file_the_tokens_are_gpt2s(folder, gpt2_files, capsys):
    """nanoGPT writes no meta file for GPT-2's tokens. A note says what is assumed."""
    os.makedirs('data/made')
    np.array([15496, 995], dtype='<u2').tofile('data/made/train.bin')
    assert Dataset('made').tokenizer.decode([15496, 995]) == b'Hello world'
    note = "data/made has no meta.json: its tokens are taken for GPT-2's"
    assert note in capsys.readouterr().err


def remove_train_bin():
    os.remove('data/made/train.bin')


def cut_train_bin_short():
    with open('data/made/train.bin', 'r+b') as f:
        f.truncate(100)


def change_a_byte_of_train_bin():
    with open('data/made/train.bin', 'r+b') as f:
        f.write(b'\7')


def change_meta(change):
    meta = json.loads(Path('data/made/meta.json').read_text())
    change(meta)
    Path('data/made/meta.json').write_text(json.dumps(meta))


def remove_the_tokenizer():
    change_meta(lambda meta: meta.pop('tokenizer'))


def remove_the_hash():
    change_meta(lambda meta: meta['splits']['train'].pop('sha256'))


def write_an_unknown_dtype():
    change_meta(lambda meta: meta.update(dtype='float64'))


def write_a_list_of_splits():
    change_meta(lambda meta: meta.update(splits=[1]))


def write_a_number_as_meta():
    Path('data/made/meta.json').write_text('3')


def write_brackets_as_meta():
    """A parser that calls itself for each bracket would overflow its stack."""
    Path('data/made/meta.json').write_text('[' * 5000)


@pytest.mark.parametrize('damage, words', [
    (remove_train_bin, ['no train.bin', 'prepare']),
    (cut_train_bin_short, ['disagrees', '200', '100']),
    (change_a_byte_of_train_bin, ['disagrees', 'SHA-256']),
    (remove_the_tokenizer, ['meta', 'tokenizer']),
    (remove_the_hash, ['does not describe train.bin']),
    (write_an_unknown_dtype, ['meta']),
    (write_a_list_of_splits, ['meta']),
    (write_a_number_as_meta, ['meta']),
    (write_brackets_as_meta, ['meta']),
])
def test_damaged_dataset(folder, capsys, damage, words):
    make(np.arange(100) % 256)
    damage()
    error = error_of(capsys, lambda: Dataset('made').split('train'))
    for word in words:
        assert word in error


def test_token_outside_the_vocabulary(folder, capsys, monkeypatch):
    """A small file is checked when it is opened, a large file batch by batch."""
    make(np.array([1, 2, 300, 4] * 10), vocab=256)
    error = error_of(capsys, lambda: Dataset('made').split('train'))
    assert 'token 300 is outside the vocabulary, 0 to 255' in error
    monkeypatch.setattr(data, 'VERIFY_BELOW', 0)
    windows = TrainingWindows(Dataset('made'), 'train', 8, seed=1)
    with pytest.raises(SystemExit):
        windows.batch(0, 4)


@pytest.fixture
def forbid(monkeypatch):
    """Return a function that makes open() fail for files whose names have an ending."""
    real_open = builtins.open
    forbidden = []

    def guarded(path, *args, **kwargs):
        if str(path).endswith(tuple(forbidden)):
            raise PermissionError(13, 'Permission denied', str(path))
        return real_open(path, *args, **kwargs)

    monkeypatch.setattr(builtins, 'open', guarded)
    return forbidden.append


@pytest.mark.parametrize('split', ['train', 'val'])
def test_a_token_file_that_cannot_be_opened_is_named(mini, capsys, forbid, split):
    forbid(f'{split}.bin')
    error = error_of(capsys, lambda: Dataset('mini').split(split))
    assert f'data/mini/{split}.bin cannot be read' in error
    assert 'Permission denied' in error


def test_a_token_file_that_cannot_be_mapped_is_named(mini, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr(mmap, 'mmap', refuse)
    error = error_of(capsys, lambda: Dataset('mini').split('val'))
    assert 'data/mini/val.bin cannot be read' in error
    assert 'Permission denied' in error


@pytest.mark.parametrize('name', ['meta.json', 'meta.pkl'])
def test_a_meta_file_that_cannot_be_opened_is_named(mini, capsys, forbid, name):
    os.rename('data/mini/meta.json', f'data/mini/{name}')
    forbid(name)
    error = error_of(capsys, lambda: Dataset('mini'))
    assert 'data/mini' in error
    assert 'Permission denied' in error


def test_a_checkpoint_that_cannot_be_opened_is_not_called_damaged(folder, capsys, forbid):
    (folder / 'last.pt').write_bytes(b'x')
    forbid('last.pt')
    error = error_of(capsys, lambda: checkpoint.load('last.pt'))
    assert 'Permission denied' in error
    assert 'damaged' not in error


def test_the_error_holds_the_command_that_makes_the_dataset_again(folder, capsys):
    """The command names the dataset's own tokenizer, and the folder that it is in."""
    splits = {split: [(np.arange(50), 50)] for split in ('train', 'val')}
    write_dataset('else where/made', splits, ByteTokenizer(), SOURCE)
    with open('else where/made/val.bin', 'ab') as f:
        f.write(b'0')
    error = error_of(capsys, lambda: Dataset('made', 'else where').split('val'))
    assert "--name=made --tokenizer=byte --data_dir='else where' to make it again" in error


def test_a_known_dataset_is_made_with_its_own_script():
    assert how_to_make('shakespeare') == 'python prepare_shakespeare.py --tokenizer=gpt2'


# ---- windows -----------------------------------------------------------------------------------

@pytest.mark.parametrize('n, T', [
    (1000, 7),
    (100, 16),
    (17, 16),
    (40, 16),
    (33, 16),
    (32, 16),
])
def test_each_window_comes_once_an_epoch(folder, n, T):
    """Windows of an epoch do not overlap; epochs differ in offset and order; y is x shifted."""
    tokens = np.arange(n)   # each token tells its place
    windows = TrainingWindows(make(tokens, vocab=65_536), 'train', T, seed=3)
    per_epoch = len(windows)
    assert per_epoch == max(1, (n - T) // T)
    epochs = []
    for epoch in range(4):
        x, y = windows.batch(epoch * per_epoch, per_epoch)
        assert torch.equal(y, x + 1)
        assert x.shape == (per_epoch, T)
        assert x.dtype == torch.int64
        starts = x[:, 0].tolist()
        offset = min(starts)
        assert sorted(starts) == [offset + i * T for i in range(per_epoch)]
        epochs.append(starts)
    if n == 1000:
        assert len({min(starts) % T for starts in epochs}) > 1
        assert len({tuple(starts) for starts in epochs}) == 4
        assert epochs[0] != sorted(epochs[0])


def test_batches_are_pure_in_seed_and_position(folder):
    made = make(np.arange(5000) % 256)

    def inputs(seed, first, count):
        x, _ = TrainingWindows(made, 'train', 16, seed=seed).batch(first, count)
        return x

    windows = TrainingWindows(made, 'train', 16, seed=3)
    whole, _ = windows.batch(290, 40)   # reaches across the end of the first epoch
    windows.batch(5000, 3)
    again, _ = windows.batch(290, 40)
    assert torch.equal(again, whole)
    quarters = [inputs(3, first, 10) for first in (290, 300, 310, 320)]
    assert torch.equal(torch.cat(quarters), whole)
    assert not torch.equal(inputs(4, 290, 40), whole)


def test_windows_stay_inside_a_shard(folder):
    """Shards of 50, 5 and 120 tokens; a token tells its shard and its place in the shard."""
    shards = [1000 * i + np.arange(n) for i, n in enumerate((50, 5, 120))]
    write_shards(shards, ''.join(map(chr, range(0x4000, 0x4000 + 3000))))
    windows = TrainingWindows(Dataset('made'), 'train', 8, seed=0)
    x, y = windows.batch(0, (50 - 8) // 8 + (120 - 8) // 8)
    assert torch.equal(y, x + 1)
    assert len(set(x[:, 0].tolist())) == len(x)
    assert set((x[:, 0] // 1000).tolist()) == {0, 2}   # the second shard is too short


@pytest.mark.parametrize('n, T, B', [
    (1000, 16, 7),
    (100, 16, 200),
    (17, 16, 1),
    (18, 16, 1),
    (2, 16, 1),
])
@pytest.mark.parametrize('ranks', [1, 3])
def test_evaluation_scores_every_target_once(folder, n, T, B, ranks):
    made = make(np.arange(n), vocab=65_536)
    windows = math.ceil((n - 1) / T)
    scored = []
    for rank in range(ranks):
        for x, y in evaluation_batches(made, 'val', T, B, rank=rank, ranks=ranks):
            assert x.shape == y.shape == (min(B, windows), T)
            counted = y >= 0
            assert torch.equal(x[counted] + 1, y[counted])
            scored += y[counted].tolist()
    assert sorted(scored) == list(range(1, n))


def test_evaluation_sample_is_fixed_and_spread(folder):
    made = make(np.arange(10_000), vocab=65_536)

    def sample(batches):
        return torch.cat([x for x, _ in evaluation_batches(made, 'val', 10, 5, batches=batches)])

    first = sample(4)
    assert torch.equal(first, sample(4))
    assert first.shape == (20, 10)
    assert first[:, 0].tolist() == list(range(0, 10_000, 500))
    assert len(sample(10_000)) == 1000


@pytest.mark.parametrize('n, words', [
    (10, ['10 tokens', 'block_size=16', '--block_size=9']),
    (16, ['--block_size=15']),
])
def test_text_shorter_than_block_size_is_refused(folder, capsys, n, words):
    made = make(np.arange(n))
    error = error_of(capsys, lambda: TrainingWindows(made, 'train', 16, seed=0))
    for word in words:
        assert word in error


# ---- prepare_shakespeare.py --------------------------------------------------------------------

@pytest.mark.parametrize('kind, name, vocab, train, val', [
    ('char', 'shakespeare_char', 65, 1_003_854, 111_540),
    ('byte', 'shakespeare_byte', 256, 1_003_854, 111_540),
    ('gpt2', 'shakespeare', 50_257, 301_966, 36_059),
    ('bpe', 'shakespeare_bpe', 1024, 411_268, 49_422),
])
def test_tiny_shakespeare(folder, script, shakespeare, gpt2_files, kind, name, vocab, train, val):
    result = script('prepare_shakespeare.py', f'--input={shakespeare}', f'--tokenizer={kind}')
    assert result.code == 0
    assert result.out == ''
    assert f'{train:,}' in result.err
    assert f'{val:,}' in result.err
    made = Dataset(name)
    assert made.vocab_size == vocab
    assert not made.stand_in_banner()
    source = made.meta['source']
    assert source['sha256'] == TINY_SHAKESPEARE
    assert not source['stand_in']
    train_tokens, = made.split('train')
    val_tokens, = made.split('val')
    assert len(train_tokens) == train
    assert len(val_tokens) == val
    decode = made.tokenizer.decode
    whole = decode(train_tokens.tolist()) + decode(val_tokens.tolist())
    assert whole == shakespeare.read_bytes()
    splits = made.meta['splits']
    assert splits['train']['bytes'] + splits['val']['bytes'] == len(whole)


def test_download_retries_and_checks(folder, script, shakespeare, server, no_waiting):
    body = shakespeare.read_bytes()
    url = server((500, b''), (200, body[:1000]), (200, body))
    assert script('prepare_shakespeare.py', f'--url={url}').code == 0
    assert (folder / 'data/shakespeare_char/input.txt').read_bytes() == body
    files = sorted(os.listdir('data/shakespeare_char'))
    assert files == ['input.txt', 'meta.json', 'train.bin', 'val.bin']
    # The downloaded text is used again: nothing answers at this URL.
    assert script('prepare_shakespeare.py', f'--url={UNREACHABLE}').code == 0


@pytest.mark.parametrize('reply', [
    (404, b''),
    (200, b'<html>error</html>'),
    (200, b'x' * 1_115_394),   # the right length
    (200, b'x' * 2_000_000),
    None,
])
def test_failed_download_leaves_nothing(folder, refused, server, no_waiting, reply):
    url = server(reply) if reply else UNREACHABLE
    refused('prepare_shakespeare.py', f'--url={url}', words=['--input=FILE', '--stand_in'])
    assert not os.path.exists('data') or os.listdir('data') == []


def test_stand_in_is_marked(folder, script, no_waiting):
    result = script('prepare_shakespeare.py', f'--url={UNREACHABLE}', '--stand_in')
    assert result.code == 0
    made = Dataset('shakespeare_char')
    assert made.meta['source']['stand_in'] is True
    assert sum(map(len, made.split('train'))) > 300_000
    banner = made.stand_in_banner()
    assert 'NOT TINY SHAKESPEARE' in banner
    assert 'pydoc_data.topics' in banner
    assert 'download failed' in banner
    assert 'python prepare_shakespeare.py --tokenizer=char\n' in banner
    assert 'python prepare_shakespeare.py --tokenizer=char --input=input.txt\n' in banner


@pytest.mark.parametrize('flags, words', [
    (['--tokenizer=klingon'], ['klingon', 'char, byte, gpt2, bpe']),
    (['--tokenizr=char'], ['--tokenizer']),
    (['--input=nope.txt'], ['--input=nope.txt', '(No such file or directory)', '--input=FILE']),
    (['--input=.'], ['--input']),
    (['--input=latin.txt'], ['UTF-8', 'iconv -f latin1']),
    (['--input=wide.txt'], ['UTF-16', 'iconv -f utf-16le -t utf-8 wide.txt']),
    (['--input=book.pdf'], ['book.pdf is a PDF', '--input=FILE.txt']),
    (['--input=empty.txt'], ['too short']),
])
def test_prepare_mistakes(folder, refused, flags, words):
    (folder / 'latin.txt').write_bytes(b'caf\xe9')
    (folder / 'wide.txt').write_text('wide', encoding='utf-16')
    (folder / 'book.pdf').write_bytes(b'%PDF-1.7')
    (folder / 'empty.txt').write_bytes(b'')
    refused('prepare_shakespeare.py', *flags, words=words)
    assert not os.path.exists('data/shakespeare_char/meta.json')


def test_an_edited_shakespeare_is_not_shakespeare(folder, script):
    (folder / 'edited.txt').write_bytes(b'Farst Citizen:\n' * 74_359 + b'ninebytes')
    result = script('prepare_shakespeare.py', '--input=edited.txt')
    assert result.code == 0, result.err
    assert 'edited.txt is not Tiny Shakespeare (its SHA-256 is another): ' in result.err


def test_another_text_is_recorded_as_such(folder, script):
    path = folder / 'mine.txt'
    path.write_text('Übermut tut selten gut. ' * 50, encoding='utf-8')
    result = script('prepare_shakespeare.py', '--input=mine.txt')
    assert result.code == 0
    for words in ('mine.txt is not Tiny Shakespeare', '1,250 bytes, not 1,115,394',
                  'published losses do not apply', 'prepare_text.py --input=mine.txt --name=NAME'):
        assert words in result.err
    assert Dataset('shakespeare_char').meta['source'] == dict(
        name='mine.txt',
        url=None,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        stand_in=False,
    )


def test_a_folder_that_cannot_be_made_is_refused(folder, refused):
    (folder / 'data').write_text('a file in place of the folder')
    (folder / 'mine.txt').write_text('some text ' * 50)
    refused('prepare_shakespeare.py', '--input=mine.txt', words=['data', '--data_dir'])
