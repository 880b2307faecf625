"""data.py and prepare_shakespeare.py. pytest tests/test_data.py"""
import hashlib
import http.server
import json
import os
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from lib import data, tokenizers
from lib.data import Dataset, TrainingWindows, evaluation_batches, how_to_make
from lib.prepare import write_dataset
from lib.tokenizers import ByteTokenizer, CharTokenizer

SCRIPTS = ['To be, or not to be', 'Быть или не быть', '生きるべきか', '存在还是毁灭', 'أكون أو لا أكون', 'להיות או לא להיות', '🎭🏴󠁧󠁢󠁥󠁮󠁧󠁿 e\u0301']


def make(tokens, folder='data/made', val=None, vocab=256, **meta):
    class Numbers(ByteTokenizer):
        vocab_size = vocab
    source = dict(name='made', url=None, sha256='', stand_in=False)
    write_dataset(folder, dict(train=[(tokens, len(tokens))], val=[(tokens if val is None else val, 1)]), Numbers(), source)
    made = Dataset('made')
    made.vocab_size = vocab
    return made


# ---- tokenizers ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('text', SCRIPTS + ['', '\x00\r\n\t', ''.join(SCRIPTS)])
def test_round_trip(text, gpt2_files):
    for tokenizer in (CharTokenizer(text or 'x'), ByteTokenizer(), tokenizers.GPT2Tokenizer()):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids.tolist()).decode() == text
        assert len(ids) == 0 or 0 <= ids.min() and ids.max() < tokenizer.vocab_size
        again = tokenizers.load_tokenizer(json.loads(json.dumps(tokenizer.state())))
        assert again.encode(text).tolist() == ids.tolist()


def test_gpt2_tokens_are_gpt2s(gpt2_files):
    tokenizer = tokenizers.GPT2Tokenizer()
    assert tokenizer.encode('Hello, world! <|endoftext|>').tolist() == [15496, 11, 995, 0, 220, 50256]


def test_unknown_character_is_named(capsys):
    with pytest.raises(SystemExit):
        CharTokenizer('abc').encode('abc日z本a日')
    error = capsys.readouterr().err
    assert all(word in error for word in ("'日'", "'z'", "'本'", "'abc'")) and error.count("'日'") == 1


@pytest.mark.parametrize('state', [None, {}, {'kind': 'bpe'}, {'kind': 'char'}, {'kind': 'char', 'chars': ''}, {'kind': 'char', 'chars': 3}])
def test_foreign_tokenizer_state(state):
    with pytest.raises(ValueError):
        tokenizers.load_tokenizer(state)


# ---- token files ---------------------------------------------------------------------------------------------------

def test_files_are_what_the_contract_says(folder):
    made = make(np.arange(100) % 256)
    raw = (folder / 'data/made/train.bin').read_bytes()
    assert raw == np.arange(100, dtype='<u2').tobytes()   # nothing else, so that nanoGPT reads it
    assert made.meta['dtype'] == 'uint16' and made.meta['splits']['train']['tokens'] == 100
    assert made.meta['splits']['train']['sha256'] == {'train.bin': hashlib.sha256(raw).hexdigest()}
    assert made.split('train')[0].tolist() == list(range(100))
    assert sorted(os.listdir('data/made')) == ['meta.json', 'train.bin', 'val.bin']


def test_large_vocabulary_takes_four_bytes(folder):
    text = ''.join(map(chr, range(0x10000, 0x10000 + 70_000)))
    tokenizer = CharTokenizer(text)
    write_dataset('data/made', dict(train=[(tokenizer.encode(text), 1)]), tokenizer, dict(name='', url=None, sha256='', stand_in=False))
    shard = Dataset('made').split('train')[0]
    assert shard.dtype == np.uint32 and shard.max() == 69_999
    assert tokenizer.decode(shard.tolist()).decode() == text


def test_shards_and_nanogpts_files(folder):
    """Shards in their order; without meta.json, meta.pkl's characters or GPT-2's BPE, and no other pickle."""
    os.makedirs('data/made')
    for i in range(3):
        np.full(10, i, dtype='<u2').tofile(f'data/made/train_00{i}.bin')
    with open('data/made/meta.pkl', 'wb') as f:
        pickle.dump(dict(vocab_size=3, itos=dict(enumerate('abc')), stoi={}), f)
    made = Dataset('made')
    assert np.concatenate(made.split('train')).tolist() == [0] * 10 + [1] * 10 + [2] * 10
    assert made.tokenizer.state() == dict(kind='char', chars='abc')
    with open('data/made/meta.pkl', 'wb') as f:
        pickle.dump(os.system, f)
    with pytest.raises(SystemExit):
        Dataset('made')


def test_without_any_meta_file(folder, gpt2_files, capsys):
    """nanoGPT writes none for GPT-2's tokens; since it may also have been lost, that is said."""
    os.makedirs('data/made')
    np.array([15496, 995], dtype='<u2').tofile('data/made/train.bin')
    assert Dataset('made').tokenizer.decode([15496, 995]) == b'Hello world'
    assert "data/made has no meta.json: its tokens are taken for GPT-2's" in capsys.readouterr().err


def damage(change):
    meta = json.loads(open('data/made/meta.json').read())
    change(meta)
    with open('data/made/meta.json', 'w') as f:
        json.dump(meta, f)


def cut_short():
    with open('data/made/train.bin', 'r+b') as f:
        f.truncate(100)


def flip():
    with open('data/made/train.bin', 'r+b') as f:
        f.write(b'\7')


@pytest.mark.parametrize('change, words', [
    (lambda: os.remove('data/made/train.bin'), ['no train.bin', 'prepare']), (cut_short, ['disagrees', '200', '100']),
    (flip, ['disagrees', 'SHA-256']), (lambda: damage(lambda meta: meta.pop('tokenizer')), ['meta', 'tokenizer']),
    (lambda: damage(lambda meta: meta.update(dtype='float64')), ['meta']), (lambda: damage(lambda meta: meta.update(splits=[1])), ['meta']),
    (lambda: damage(lambda meta: meta['splits']['train'].pop('sha256')), ['does not describe train.bin']),
    (lambda: open('data/made/meta.json', 'w').write('[' * 5000), ['meta']), (lambda: open('data/made/meta.json', 'w').write('3'), ['meta'])])
def test_damaged_dataset(folder, capsys, change, words):
    make(np.arange(100) % 256)
    change()
    with pytest.raises(SystemExit) as stop:
        Dataset('made').split('train')
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count('\n') == 1 and all(word in error for word in words), error


def test_token_outside_the_vocabulary(folder, capsys, monkeypatch):
    """Found at start-up in a small file, and in the batch where a file is too large to be read first."""
    make(np.array([1, 2, 300, 4] * 10), vocab=256)
    with pytest.raises(SystemExit):
        Dataset('made').split('train')
    assert 'token 300 is outside the vocabulary, 0 to 255' in capsys.readouterr().err
    monkeypatch.setattr(data, 'VERIFY_BELOW', 0)
    windows = TrainingWindows(Dataset('made'), 'train', 8, seed=1)
    with pytest.raises(SystemExit):
        windows.batch(0, 4)


def test_files_that_cannot_be_opened(mini, capsys, monkeypatch):
    """One line for each kind of file, that names it."""
    import builtins
    import mmap

    from lib import checkpoint
    Path('last.pt').write_bytes(b'x')
    real = builtins.open
    forbidden = ''

    def guarded(path, *args, **kwargs):
        if forbidden and str(path).endswith(forbidden):
            raise PermissionError(13, 'Permission denied', str(path))
        return real(path, *args, **kwargs)
    monkeypatch.setattr(builtins, 'open', guarded)

    def line_for(act):
        with pytest.raises(SystemExit) as stop:
            act()
        line = capsys.readouterr().err
        assert stop.value.code == 2 and line.startswith('error: ') and line.count('\n') == 1
        assert 'Permission denied' in line
        return line
    for split in ('train', 'val'):
        forbidden = f'{split}.bin'
        line = line_for(lambda split=split: Dataset('mini').split(split))
        assert f'data/mini/{split}.bin cannot be read' in line
    forbidden = 'meta.json'
    assert 'data/mini' in line_for(lambda: Dataset('mini'))
    forbidden = 'last.pt'
    assert 'damaged' not in line_for(lambda: checkpoint.load('last.pt'))
    forbidden = ''

    def refusing(*args, **kwargs):
        raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr(mmap, 'mmap', refusing)
    assert 'data/mini/val.bin cannot be read' in line_for(lambda: Dataset('mini').split('val'))
    os.rename('data/mini/meta.json', 'data/mini/meta.pkl')
    forbidden = 'meta.pkl'
    assert 'data/mini' in line_for(lambda: Dataset('mini'))


def test_what_makes_a_dataset_again(folder, capsys):
    """The tokenizer is the dataset's own, the folder the one it is in."""
    source = dict(name='made', url=None, sha256='', stand_in=False)
    splits = {split: [(np.arange(50), 50)] for split in ('train', 'val')}
    write_dataset('else where/made', splits, ByteTokenizer(), source)
    with open('else where/made/val.bin', 'ab') as f:
        f.write(b'0')
    with pytest.raises(SystemExit):
        Dataset('made', 'else where').split('val')
    line = capsys.readouterr().err
    assert "--name=made --tokenizer=byte --data_dir='else where' to make it again" in line
    assert how_to_make('shakespeare') == 'python prepare_shakespeare.py --tokenizer=gpt2'



# ---- windows -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('n, T', [(1000, 7), (100, 16), (17, 16), (40, 16), (33, 16), (32, 16)])
def test_each_window_once_an_epoch(folder, n, T):
    """Windows of an epoch do not overlap, all are visited, epochs differ in offset and order; y is x shifted by one."""
    np.random.seed(0)
    tokens = np.arange(n) % 65_536   # each token tells its place
    windows = TrainingWindows(make(tokens, vocab=65_536), 'train', T, seed=3)
    per_epoch, seen = len(windows), []
    assert per_epoch == max(1, (n - T) // T)
    for epoch in range(4):
        x, y = windows.batch(epoch * per_epoch, per_epoch)
        assert torch.equal(y, x + 1) and x.shape == (per_epoch, T) and x.dtype == torch.int64
        starts = x[:, 0].tolist()
        assert len(set(starts)) == per_epoch and all((s - min(starts)) % T == 0 for s in starts)
        assert max(starts) - min(starts) == (per_epoch - 1) * T
        seen.append(starts)
    if n == 1000:
        assert len({min(starts) % T for starts in seen}) > 1 and len({tuple(starts) for starts in seen}) == 4
        assert seen[0] != sorted(seen[0])


def test_batches_are_pure_in_seed_and_position(folder):
    made = make(np.arange(5000) % 256)
    windows = TrainingWindows(made, 'train', 16, seed=3)
    whole = windows.batch(290, 40)[0]   # across the end of the first epoch
    windows.batch(5000, 3)
    assert torch.equal(windows.batch(290, 40)[0], whole)
    assert torch.equal(torch.cat([TrainingWindows(made, 'train', 16, seed=3).batch(290 + 10 * i, 10)[0] for i in range(4)]), whole)
    assert not torch.equal(TrainingWindows(made, 'train', 16, seed=4).batch(290, 40)[0], whole)


def test_windows_stay_inside_a_shard(folder):
    os.makedirs('data/made')
    for i, n in enumerate((50, 5, 120)):
        np.arange(1000 * i, 1000 * i + n, dtype='<u2').tofile(f'data/made/train_00{i}.bin')
    made = Dataset.__new__(Dataset)
    made.folder, made.again, made.meta, made.dtype, made.vocab_size, made.opened, made.maps = 'data/made', '', {}, '<u2', 65_536, {}, []
    x, y = TrainingWindows(made, 'train', 8, seed=0).batch(0, (50 - 8) // 8 + (120 - 8) // 8)
    assert torch.equal(y, x + 1) and len(set(x[:, 0].tolist())) == len(x)
    assert set((x[:, 0] // 1000).tolist()) == {0, 2}


@pytest.mark.parametrize('n, T, B', [(1000, 16, 7), (100, 16, 200), (17, 16, 1), (18, 16, 1), (2, 16, 1)])
def test_evaluation_scores_every_target_once(folder, n, T, B):
    made = make(np.arange(n) % 65_536, vocab=65_536)
    for ranks in (1, 3):
        scored = []
        for rank in range(ranks):
            for x, y in evaluation_batches(made, 'val', T, B, rank=rank, ranks=ranks):
                assert x.shape == y.shape == (min(B, -(-(n - 1) // T)), T)
                assert torch.equal(x[y >= 0] + 1, y[y >= 0])
                scored += y[y >= 0].tolist()
        assert sorted(scored) == list(range(1, n))


def test_evaluation_sample_is_fixed_and_spread(folder):
    made = make(np.arange(10_000) % 65_536, vocab=65_536)
    a, b = (torch.cat([x for x, _ in evaluation_batches(made, 'val', 10, 5, batches=4)]) for _ in range(2))
    assert torch.equal(a, b) and a.shape == (20, 10) and a[:, 0].tolist() == list(range(0, 10_000, 500))
    assert len(torch.cat([x for x, _ in evaluation_batches(made, 'val', 10, 5, batches=10_000)])) == 1000


@pytest.mark.parametrize('n, words', [(10, ['10 tokens', 'block_size=16', '--block_size=9']), (16, ['--block_size=15'])])
def test_text_shorter_than_block_size(folder, capsys, n, words):
    with pytest.raises(SystemExit):
        TrainingWindows(make(np.arange(n)), 'train', 16, seed=0)
    error = capsys.readouterr().err
    assert all(word in error for word in words), error


# ---- prepare_shakespeare.py ----------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind, name, vocab, train, val', [
    ('char', 'shakespeare_char', 65, 1_003_854, 111_540), ('byte', 'shakespeare_byte', 256, 1_003_854, 111_540),
    ('gpt2', 'shakespeare', 50_257, 301_966, 36_059)])
def test_tiny_shakespeare(folder, script, shakespeare, gpt2_files, kind, name, vocab, train, val):
    result = script('prepare_shakespeare.py', f'--input={shakespeare}', f'--tokenizer={kind}')
    assert result.code == 0 and result.out == '' and f'{train:,}' in result.err and f'{val:,}' in result.err
    made = Dataset(name)
    assert made.vocab_size == vocab and not made.stand_in_banner()
    assert [len(made.split(split)[0]) for split in ('train', 'val')] == [train, val]
    source = made.meta['source']
    assert source['sha256'] == '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed' and not source['stand_in']
    whole = b''.join(made.tokenizer.decode(made.split(split)[0].tolist()) for split in ('train', 'val'))
    assert whole == shakespeare.read_bytes()
    assert sum(made.meta['splits'][split]['bytes'] for split in ('train', 'val')) == len(whole)


@pytest.fixture
def server():
    """A loopback server: server(body, status, ...) -> url; each reply is given once, the last one for ever."""
    started = []

    def serve(*replies):
        left = list(replies)

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                status, body = left.pop(0) if len(left) > 1 else left[0]
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass
        httpd = http.server.HTTPServer(('127.0.0.1', 0), Handler)
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        started.append(httpd)
        return f'http://127.0.0.1:{httpd.server_port}/input.txt'
    yield serve
    for httpd in started:
        httpd.shutdown()


def test_download_retries_and_checks(folder, script, shakespeare, server, monkeypatch):
    monkeypatch.setattr('time.sleep', lambda s: None)
    body = shakespeare.read_bytes()
    url = server((500, b''), (200, body[:1000]), (200, body))
    assert script('prepare_shakespeare.py', f'--url={url}').code == 0
    assert (folder / 'data/shakespeare_char/input.txt').read_bytes() == body
    assert sorted(os.listdir('data/shakespeare_char')) == ['input.txt', 'meta.json', 'train.bin', 'val.bin']
    assert script('prepare_shakespeare.py', '--url=http://127.0.0.1:9/x').code == 0   # what is there is not fetched again


@pytest.mark.parametrize('reply', [(404, b''), (200, b'<html>error</html>'), (200, b'x' * 1_115_394), (200, b'x' * 2_000_000), None])
def test_failed_download_leaves_nothing(folder, refused, server, monkeypatch, reply):
    monkeypatch.setattr('time.sleep', lambda s: None)
    url = server(reply) if reply else 'http://127.0.0.1:9/x'
    refused('prepare_shakespeare.py', f'--url={url}', words=['--input=FILE', '--stand_in'])
    assert not os.path.exists('data') or os.listdir('data') == []


def test_stand_in_is_marked(folder, script, monkeypatch):
    monkeypatch.setattr('time.sleep', lambda s: None)
    result = script('prepare_shakespeare.py', '--url=http://127.0.0.1:9/x', '--stand_in')
    made = Dataset('shakespeare_char')
    assert result.code == 0 and made.meta['source']['stand_in'] is True
    assert sum(map(len, made.split('train'))) > 300_000
    banner = made.stand_in_banner()
    for words in ('NOT TINY SHAKESPEARE', 'pydoc_data.topics', 'download failed', 'python prepare_shakespeare.py --tokenizer=char'):
        assert words in banner


@pytest.mark.parametrize('flags, words', [
    (['--tokenizer=bpe'], ['bpe', 'char, byte, gpt2']), (['--input=nope.txt'], ['nope.txt', '--input']), (['--input=.'], ['--input']),
    (['--input=latin.txt'], ['UTF-8', 'iconv']), (['--input=empty.txt'], ['too short']), (['--tokenizr=char'], ['--tokenizer'])])
def test_prepare_mistakes(folder, refused, flags, words):
    (folder / 'latin.txt').write_bytes(b'caf\xe9')
    (folder / 'empty.txt').write_bytes(b'')
    refused('prepare_shakespeare.py', *flags, words=words)
    assert not os.path.exists('data/shakespeare_char/meta.json')


def test_other_text_is_recorded_as_such(folder, script):
    (folder / 'mine.txt').write_text('Übermut tut selten gut. ' * 50, encoding='utf-8')
    result = script('prepare_shakespeare.py', '--input=mine.txt')
    assert result.code == 0 and 'not the Tiny Shakespeare file' in result.err
    assert Dataset('shakespeare_char').meta['source'] == dict(
        name='mine.txt', url=None, sha256=hashlib.sha256((folder / 'mine.txt').read_bytes()).hexdigest(), stand_in=False)


def test_unwritable_folder(folder, refused):
    (folder / 'data').write_text('a file where the folder should be')
    (folder / 'mine.txt').write_text('some text ' * 50)
    refused('prepare_shakespeare.py', '--input=mine.txt', words=['data', '--data_dir'])
