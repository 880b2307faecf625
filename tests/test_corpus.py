"""prepare_corpus.py against a hub on loopback. pytest tests/test_corpus.py"""
import collections
import hashlib
import http.server
import json
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants as hub_constants
import huggingface_hub.utils.logging
import numpy as np
import pytest
from conftest import write_shard

from lib import corpora
from lib.data import Dataset, how_to_make
from lib.prepare import dataset_made_by

COMMIT = 'c0ffee' + '0' * 34
USAGE = collections.namedtuple('USAGE', 'total used free')


def digest(body):
    return hashlib.sha256(body).hexdigest()


class Hub:
    """A hub on loopback: what it serves, what it was asked, and what goes wrong with it.

    files: {name: bytes} of every dataset. cut: bytes after which each of the next answers with a
    file ends, one by one. answer: (status, body) instead of any other answer.
    """

    def __init__(self):
        self.files = {}
        self.swapped = {}   # {name: other bytes of the same length} that are sent instead
        self.cut = []
        self.answer = None
        self.asked = []     # (method, path, Range)

    def downloads(self):
        """Return the names of the files that were asked for, in order."""
        return [os.path.basename(path) for method, path, _ in self.asked
                if method == 'GET' and '/resolve/' in path]


class Handler(http.server.BaseHTTPRequestHandler):
    hub = None

    def do_HEAD(self):
        self.reply('HEAD')

    def do_GET(self):
        self.reply('GET')

    def log_message(self, *args):
        pass

    def reply(self, method):
        self.hub.asked.append((method, self.path, self.headers.get('Range')))
        if self.hub.answer:
            status, body = self.hub.answer
            return self.send(status, body, {'Content-Type': 'text/html'}, method)
        if self.path.startswith('/api/datasets/'):
            return self.send(200, json.dumps(self.listing()).encode(), {}, method)
        name = os.path.basename(self.path)
        if name not in self.hub.files:
            return self.send(404, b'', {'X-Error-Code': 'EntryNotFound'}, method)
        body = self.hub.files[name]
        headers = {'X-Repo-Commit': COMMIT, 'ETag': f'"{digest(body)}"', 'Accept-Ranges': 'bytes'}
        self.send_file(self.hub.swapped.get(name, body), headers, method)

    def listing(self):
        siblings = []
        for name, body in self.hub.files.items():
            lfs = dict(size=len(body), sha256=digest(body), pointerSize=130)
            siblings.append(dict(rfilename=name, size=len(body), lfs=lfs))
        return dict(id='someone/corpus', sha=COMMIT, siblings=siblings)

    def send_file(self, body, headers, method):
        first = 0
        if self.headers.get('Range'):
            first = int(self.headers['Range'].removeprefix('bytes=').partition('-')[0])
            headers['Content-Range'] = f'bytes {first}-{len(body) - 1}/{len(body)}'
        self.send(206 if first else 200, body[first:], headers, method)

    def send(self, status, body, headers, method):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if method == 'HEAD':
            return
        if self.hub.cut and '/resolve/' in self.path:
            body = body[:self.hub.cut.pop(0)]
            self.close_connection = True
        self.wfile.write(body)


@pytest.fixture
def hub(folder, monkeypatch, no_waiting):
    """Start a hub with some shards and stories, and let the corpora be those. Return it."""
    served = Hub()
    handler = type('Served', (Handler,), dict(hub=served))
    httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    url = f'http://127.0.0.1:{httpd.server_port}'   # as HF_ENDPOINT gives it
    template = hub_constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(hub_constants.ENDPOINT, url)
    monkeypatch.setattr(hub_constants, 'HUGGINGFACE_CO_URL_TEMPLATE', template)
    monkeypatch.setattr(hub_constants, 'ENDPOINT', url)
    # The hub's logger holds an earlier test's stderr, which is closed.
    huggingface_hub.utils.logging.set_verbosity_error()
    monkeypatch.setattr(hub_constants, 'HF_HUB_CACHE', str(folder / 'hub'))
    for number in range(4):
        name = f'fineweb_train_{number:06d}.bin' if number else 'fineweb_val_000000.bin'
        write_shard(folder / name, np.arange(100 * number, 100 * number + 60))
        served.files[name] = (folder / name).read_bytes()
        served.files[name.replace('fineweb', 'finewebedu')] = served.files[name]
        os.remove(folder / name)
    served.files['TinyStoriesV2-GPT4-train.txt'] = b'Once\n<|endoftext|>\nupon\n<|endoftext|>\n'
    served.files['TinyStoriesV2-GPT4-valid.txt'] = b'A cat sat.\n<|endoftext|>\n'
    for name, corpus in list(corpora.CORPORA.items()):
        known = {file: digest(served.files[file]) for file in corpus.sha256}
        changed = replace(corpus, sha256=known)
        if corpus.revision != 'main':
            changed.revision = COMMIT
        monkeypatch.setitem(corpora.CORPORA, name, changed)
    yield served
    httpd.shutdown()


@pytest.fixture
def prepare(script):
    """Return a function that runs prepare_corpus.py, which must work; it returns stderr."""
    def run(*flags):
        result = script('prepare_corpus.py', *flags)
        assert result.code == 0, result.err
        assert result.out == ''
        return result.err
    return run


def tokens(name, split):
    return [shard.tolist() for shard in Dataset(name).split(split)]


# ---- shards --------------------------------------------------------------------------------------

def test_shards_become_a_dataset(hub, prepare, gpt2_files):
    said = prepare('fineweb')
    assert 'train 60 in 1 file, val 60 in 1 file' in said
    assert tokens('fineweb', 'train') == [list(range(100, 160))]
    assert tokens('fineweb', 'val') == [list(range(60))]
    meta = Dataset('fineweb').meta
    assert meta['source']['revision'] == COMMIT
    assert meta['source']['url'] == 'https://huggingface.co/datasets/kjj0/fineweb10B-gpt2'
    body = hub.files['fineweb_train_000001.bin']
    assert meta['splits']['train']['sha256'] == {'fineweb_train_000001.bin': digest(body)}
    assert Dataset('fineweb').fingerprint()
    assert hub.downloads() == ['fineweb_val_000000.bin', 'fineweb_train_000001.bin']


def test_more_shards_are_added_and_none_is_fetched_twice(hub, prepare, gpt2_files):
    prepare('--name=fineweb')
    hub.asked.clear()
    prepare('--name=fineweb', '--shards=3')
    assert hub.downloads() == ['fineweb_train_000002.bin', 'fineweb_train_000003.bin']
    hub.asked.clear()
    prepare('--name=fineweb')   # the other shards stay
    assert len(tokens('fineweb', 'train')) == 3
    shutil.rmtree('data')
    prepare('--name=fineweb', '--shards=3')   # from the cache
    assert len(tokens('fineweb', 'train')) == 3
    assert hub.asked == []


def test_offline_mode_takes_what_is_in_the_cache(hub, prepare, refused, monkeypatch, gpt2_files):
    prepare('fineweb_edu')
    shutil.rmtree('data')
    monkeypatch.setattr(hub_constants, 'HF_HUB_OFFLINE', True)
    prepare('fineweb_edu')
    assert len(tokens('fineweb_edu', 'train')) == 1
    words = ['HF_ENDPOINT', 'type python prepare_corpus.py --name=fineweb_edu --shards=2 again']
    refused('prepare_corpus.py', 'fineweb_edu', '--shards=2', words=words)


def test_a_corpus_without_a_pinned_commit_stays_at_the_first_one(hub, prepare, gpt2_files):
    said = prepare('fineweb_edu')
    assert 'now type python train.py config/train_gpt2.py --dataset=fineweb_edu' in said
    assert Dataset('fineweb_edu').meta['source']['revision'] == COMMIT
    assert any(path.startswith('/api/') and '/revision/main' in path for _, path, _ in hub.asked)
    hub.asked.clear()
    prepare('fineweb_edu', '--shards=2')
    paths = [path for _, path, _ in hub.asked]
    assert paths and all(COMMIT in path for path in paths)


def test_a_link_to_a_cache_that_was_cleared_is_made_again(hub, prepare, gpt2_files):
    prepare('fineweb')
    shutil.rmtree('hub')
    with pytest.raises(SystemExit):
        Dataset('fineweb').split('train')
    prepare('fineweb')
    assert tokens('fineweb', 'train') == [list(range(100, 160))]


def test_shards_that_a_user_has_are_not_fetched(hub, prepare, refused, gpt2_files):
    os.makedirs('data/fineweb')
    for name, body in hub.files.items():
        if name.startswith('fineweb_'):
            Path(f'data/fineweb/{name}').write_bytes(body)
    prepare('fineweb')
    assert hub.asked == []
    assert len(tokens('fineweb', 'train')) == 3
    os.remove('data/fineweb/meta.json')
    write_shard('data/fineweb/fineweb_train_000001.bin', [1, 2, 3])
    words = ['fineweb_train_000001.bin', 'SHA-256', 'remove it, and type python prepare_corpus.py']
    refused('prepare_corpus.py', 'fineweb', words=words)


# ---- a hub that fails ----------------------------------------------------------------------------

def test_a_file_that_breaks_off_is_resumed(hub, prepare, gpt2_files, monkeypatch):
    monkeypatch.setattr(hub_constants, 'DOWNLOAD_CHUNK_SIZE', 10)   # bytes instead of 10 MB
    hub.cut = [1100, 3]
    prepare('fineweb')
    assert tokens('fineweb', 'val') == [list(range(60))]
    ranges = [asked for method, path, asked in hub.asked if 'val' in path and method == 'GET']
    assert ranges == [None, 'bytes=1100-', 'bytes=1100-']   # less than a chunk is fetched again


def test_a_file_that_broke_off_is_resumed_by_a_later_call(hub, prepare, refused, gpt2_files,
                                                           monkeypatch):
    """The first call gives up after six tries, as where the network is gone."""
    monkeypatch.setattr(hub_constants, 'DOWNLOAD_CHUNK_SIZE', 10)   # bytes instead of 10 MB
    hub.cut = [1100] + [0] * 20
    refused('prepare_corpus.py', 'fineweb', words=['again to go on'])
    hub.cut = []
    hub.asked.clear()
    prepare('fineweb')
    assert tokens('fineweb', 'val') == [list(range(60))]
    ranges = [asked for method, path, asked in hub.asked if 'val' in path and method == 'GET']
    assert ranges == ['bytes=1100-']
    assert not list(Path('hub').rglob('*.part*'))


def test_a_part_of_another_file_is_removed(hub, prepare, refused, gpt2_files):
    name = 'fineweb_val_000000.bin'
    blobs = Path('hub/datasets--kjj0--fineweb10B-gpt2/blobs')
    blobs.mkdir(parents=True)
    part = blobs / f'{digest(hub.files[name])}.part'
    part.write_bytes(b'<html>log in</html>')
    refused('prepare_corpus.py', 'fineweb', words=[name, 'another file than expected'])
    part.write_bytes(bytes(5000))   # more than the file has
    prepare('fineweb')
    assert tokens('fineweb', 'val') == [list(range(60))]


@pytest.mark.parametrize('answer', [
    (404, b''),
    (429, b'slow down'),
    (500, b''),
    (200, b'<html>log in</html>'),
    (200, b'[1]'),
    (200, b'{}'),
])
def test_a_hub_that_answers_something_else(hub, refused, answer):
    hub.answer = answer
    words = ['fineweb could not be fetched', 'type python prepare_corpus.py --name=fineweb']
    refused('prepare_corpus.py', 'fineweb', words=words)
    assert not os.path.exists('data')


@pytest.mark.parametrize('name', ['fineweb', 'fineweb_edu'])
def test_a_file_with_another_hash_is_removed(hub, refused, prepare, gpt2_files, name):
    file = f'{name.replace("_", "")}_train_000001.bin'
    hub.swapped = {file: b'x' * len(hub.files[file])}
    words = [f'{file} of kjj0/', 'SHA-256']
    refused('prepare_corpus.py', name, words=words)
    assert not os.path.exists(f'data/{name}')
    hub.swapped.clear()
    hub.asked.clear()
    prepare(name)
    assert hub.downloads() == [file]   # the other one is whole


def test_a_hub_that_dies_in_the_middle(hub, refused, prepare, gpt2_files):
    hub.cut = [10**6] + [0] * 20   # the first file is sent, and nothing of the second
    words = ['fineweb could not be fetched', 'again to go on']
    refused('prepare_corpus.py', 'fineweb', words=words)
    hub.cut = []
    hub.asked.clear()
    prepare('fineweb')
    assert hub.downloads() == ['fineweb_train_000001.bin']


def test_a_shard_that_the_hub_lacks(hub, refused):
    words = ['no file fineweb_train_000004.bin', COMMIT]
    refused('prepare_corpus.py', 'fineweb', '--shards=5', words=words)
    assert hub.downloads() == []


def test_a_disk_that_is_too_small(hub, refused, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: USAGE(10**9, 10**9, 2287))
    words = ['0 MB are needed', 'HF_HOME=FOLDER']   # 2 x 1,144 bytes
    refused('prepare_corpus.py', 'fineweb', words=words)
    refused('prepare_corpus.py', 'tinystories', words=['--data_dir=FOLDER', '1,350 MB'])
    assert hub.downloads() == []


# ---- stories -------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', ['byte', 'char'])
def test_stories_have_their_own_validation_text(hub, prepare, kind):
    said = prepare('tinystories', f'--tokenizer={kind}')
    assert 'python train.py config/train_tinystories.py' in said
    made = Dataset('tinystories')
    decoded = [made.tokenizer.decode(made.split(split)[0].tolist()) for split in ('train', 'val')]
    assert decoded == [b'Once\n\n\nupon\n\n\n', b'A cat sat.\n\n\n']
    source = made.meta['source']
    assert source['name'].startswith('TinyStories')
    assert source['revision'] == COMMIT
    assert source['sha256'] == digest(hub.files['TinyStoriesV2-GPT4-train.txt'])
    assert source['documents'] == 5   # what follows the last mark is one, too


def test_stories_in_gpt2s_tokens(hub, prepare, gpt2_files):
    prepare('tinystories')
    assert 50256 in tokens('tinystories', 'train')[0]   # between two stories


def test_stories_in_tokens_learned_from_them(hub, prepare):
    hub.files['TinyStoriesV2-GPT4-train.txt'] = b'Once upon a time upon a time\n<|endoftext|>\n'
    corpus = corpora.CORPORA['tinystories']
    corpus.sha256[corpus.train] = digest(hub.files[corpus.train])
    said = prepare('tinystories', '--tokenizer=bpe', '--vocab_size=260')
    assert '--vocab_size=260' in said   # the command that is run
    assert Dataset('tinystories').vocab_size == 260


def test_the_advice_after_a_failure_has_all_flags(hub, refused):
    hub.answer = (404, b'')
    flags = ['--tokenizer=bpe', '--vocab_size=260']
    again = 'type python prepare_corpus.py --name=tinystories --tokenizer=bpe --vocab_size=260'
    words = [again, '--name=tinystories --tokenizer=bpe --vocab_size=260']
    refused('prepare_corpus.py', 'tinystories', *flags, words=words)


# ---- mistakes ------------------------------------------------------------------------------------

@pytest.mark.parametrize('flags, words', [
    ([], ["name=''", 'fineweb, fineweb_edu, tinystories']),
    (['openwebtext'], ['fineweb, fineweb_edu, tinystories']),
    (['fineweb', '--shards=0'], ['shards=0', '1 to 103']),
    (['fineweb', '--shards=104'], ['shards=104', '1 to 103']),
    (['fineweb', '--tokenizer=char'], ['--tokenizer=gpt2']),
    (['tinystories', '--shards=2'], ['--shards']),
    (['tinystories', '--vocab_size=512'], ['vocab_size=512', '--tokenizer=bpe']),
    (['fineweb', '--vocab_size=512'], ['vocab_size=512', "tokenizer=gpt2"]),
    (['tinystories', '--tokenizer=bpe', '--vocab_size=9'], ['vocab_size=9', '257']),
    (['tinystories', '--tokenizer=words'], ['words']),
])
def test_mistakes(hub, refused, script, flags, words):
    if '--tokenizer=words' in flags:   # prepare_text.py's error
        result = script('prepare_corpus.py', *flags)
        assert result.code == 2 and 'Traceback' not in result.err
        return
    refused('prepare_corpus.py', *flags, words=words)
    assert hub.asked == []


def test_shards_are_not_put_beside_other_token_files(hub, refused):
    os.makedirs('data/fineweb')
    Path('data/fineweb/train.bin').write_bytes(b'ab')
    refused('prepare_corpus.py', 'fineweb', words=['data/fineweb', 'another kind', '--data_dir'])
    assert hub.asked == []


def test_errors_and_configs_name_the_command_of_each_corpus():
    for name in corpora.CORPORA:
        command = how_to_make(name)
        assert command == f'python prepare_corpus.py --name={name}'
        assert dataset_made_by(command.removeprefix('python ')) == name
    assert dataset_made_by('prepare_corpus.py --name=fineweb --shards=9') == 'fineweb'
