"""Shared by the tests: running scripts as a user runs them, a small text, a small dataset."""
import os

# Set before torch is imported: two workers and torchrun's ranks share the cores.
os.environ.setdefault('OMP_NUM_THREADS', '1')

import csv
import ctypes
import http.server
import io
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pixel import write_pixel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Tiny Shakespeare and tiktoken's files are read from this folder, never from the network.
# Tests that need a file that is not here are skipped.
SHARED = Path(os.environ.get('SHARED_DATA') or ROOT.parent / 'shared' / 'data')

# Flags of train.py for a run of less than a second on the dataset mini.
TINY = [
    '--n_layer=2',
    '--n_head=2',
    '--n_embd=16',
    '--block_size=16',
    '--batch_size=4',
    '--gradient_accumulation_steps=1',
    '--max_iters=10',
    '--lr_decay_iters=10',
    '--eval_interval=5',
    '--eval_iters=2',
    '--learning_rate=1e-2',
    '--warmup_iters=2',
    '--dataset=mini',
    '--device=cpu',
    '--dtype=float32',
]
TEXT = ''.join(
    f'{i} times {j} is {i * j},\nsaid the miller to his wife.\n'
    for i in range(12)
    for j in range(12)
)

CAN_FORK = hasattr(os, 'pidfd_open')   # true on Linux
# A python that starts in a few hundredths of a second: see fork_server.py.
PYTHON = os.environ.get('FORKING_PYTHON', sys.executable)
# Tests with this mark run in one worker, because importing torch's compiler takes seconds.
COMPILED = pytest.mark.xdist_group('compiled')
# The signal that kills a script started with PYTHON: fork_client.py forwards SIGUSR2 as SIGKILL.
KILL = signal.SIGUSR2 if CAN_FORK else signal.SIGKILL


def pytest_configure(config):
    """Start the fork server behind PYTHON, and make an empty folder for compiled code."""
    global PYTHON
    if hasattr(config, 'workerinput'):   # a worker inherits both from the first process
        return
    folder = tempfile.TemporaryDirectory()
    config.add_cleanup(folder.cleanup)
    os.environ['TORCHINDUCTOR_CACHE_DIR'] = os.path.join(folder.name, 'compiled')
    if CAN_FORK:
        server = start_fork_server(folder.name)
        # Cleanups run in reverse order: closing the server's stdin ends it, then wait() returns.
        config.add_cleanup(server.wait)
        config.add_cleanup(server.stdin.close)
        PYTHON = os.path.join(folder.name, 'python')
        os.environ['FORKING_PYTHON'] = PYTHON


def start_fork_server(folder):
    """Start fork_server.py, and write its client into a folder as a command named python."""
    path = os.path.join(folder, 'socket')
    command = os.path.join(folder, 'python')
    program = str(ROOT / 'tests' / 'fork_client.py')
    client = shlex.join([sys.executable, '-IS', program, path, command])
    with open(command, 'w') as f:
        f.write(f'#!/bin/sh\nexec {client} "$@"\n')
    os.chmod(command, 0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(100)
        number = listener.fileno()
        return subprocess.Popen(
            [sys.executable, str(ROOT / 'tests' / 'fork_server.py'), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[number],
        )


@pytest.fixture
def script(monkeypatch, capfd, request):
    """Return a function that runs a script in this process: script('train.py', *flags).

    The function returns the exit code, stdout and stderr as .code, .out and .err.
    A traceback fails the test. Figures are laid out but not drawn, except in tests marked
    `pictures`.
    """
    if not request.node.get_closest_marker('pictures'):
        monkeypatch.setattr('matplotlib.figure.Figure.savefig', write_pixel)

    def run(name, *flags, stdin=None):
        monkeypatch.setattr(sys, 'argv', [str(ROOT / name), *map(str, flags)])
        monkeypatch.setattr(sys, 'executable', PYTHON)   # used by scripts that start others
        if stdin is not None:
            given = io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding='utf-8')
            monkeypatch.setattr(sys, 'stdin', given)
        handled = (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)
        handlers = {number: signal.getsignal(number) for number in handled}
        capfd.readouterr()
        try:
            runpy.run_path(str(ROOT / name), run_name='__main__')
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            torch.use_deterministic_algorithms(False)
        captured = capfd.readouterr()
        return SimpleNamespace(code=code, out=captured.out, err=captured.err)
    return run


@pytest.fixture
def refused(script):
    """Return a function that runs a script and checks that it refuses: refused('train.py', *flags).

    The script must exit with 2, and print one line of error that holds every one of `words`.
    The function returns that line.
    """
    def run(name, *flags, words=(), stdin=None):
        result = script(name, *flags, stdin=stdin)
        lines = [line for line in result.err.splitlines() if line.startswith('error: ')]
        assert result.code == 2 and len(lines) == 1, (result.code, result.err)
        assert 'Traceback' not in result.err
        assert result.out == ''
        for word in words:
            assert word in lines[0], lines[0]
        return lines[0]
    return run


@pytest.fixture
def process():
    """Return a function that runs a script in a process of its own: process('train.py', *flags).

    For tests of torchrun, of the environment and of standard streams. `launcher` holds Python's
    options; `options` go to subprocess.run.
    """
    def run(name, *flags, launcher=(), **options):
        options = dict(capture_output=True, text=True, timeout=120) | options
        environment = {**os.environ, 'OMP_NUM_THREADS': '1', **options.pop('env', {})}
        command = [PYTHON, *launcher, str(ROOT / name), *map(str, flags)]
        return subprocess.run(command, env=environment, **options)
    return run


@pytest.fixture
def forked():
    """Return a function that runs scripts one after another, each with a number of ranks.

    forked([2, 'train.py', *flags], [1, 'train.py', *flags]) calls forked.py.
    """
    def run(*commands):
        words = []
        for command in commands:
            words += ['--then', *map(str, command)]
        done = subprocess.run(
            [PYTHON, str(ROOT / 'tests' / 'forked.py'), *words[1:]],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
    return run


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Enter an empty working folder and return its path."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def modes_hold():
    """Make permissions apply to root too.

    The test's thread gives up root's right to override permissions, and gets it back at the end.
    """
    if not hasattr(os, 'geteuid'):
        pytest.skip('folders have no permissions on this system')
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, 'capset'):
        pytest.skip('root cannot give up overriding permissions on this system')
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)   # the interface's version; 0 for this thread
    # Lower 32 bits of the effective, permitted and inheritable sets, then the higher 32 bits.
    sets = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    before = sets[0]
    sets[0] &= ~0b110   # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    assert libc.capset(header, sets) == 0
    yield
    sets[0] = before
    assert libc.capset(header, sets) == 0


def write_mini(home):
    """Write TEXT as the dataset home/data/mini, some 5,000 characters, a tenth for validation."""
    from lib.prepare import write_dataset
    from lib.tokenizers import CharTokenizer
    tokenizer = CharTokenizer(TEXT)
    cut = int(0.9 * len(TEXT))
    splits = {}
    for split, part in (('train', TEXT[:cut]), ('val', TEXT[cut:])):
        splits[split] = [(tokenizer.encode(part), len(part))]
    source = dict(name='mini', url=None, sha256='', stand_in=False)
    write_dataset(str(home / 'data/mini'), splits, tokenizer, source)


def write_shard(path, tokens, magic=20240520, version=1):
    """Write tokens as a shard of llm.c: a header of 256 int32, then uint16."""
    header = np.zeros(256, dtype='<i4')
    header[:3] = magic, version, len(tokens)
    Path(path).write_bytes(header.tobytes() + np.asarray(tokens).astype('<u2').tobytes())


@pytest.fixture
def mini(folder):
    """Enter an empty working folder that holds data/mini, and return its path."""
    write_mini(folder)
    return folder


@pytest.fixture(scope='session')
def trained(tmp_path_factory):
    """Return the out_dir of a tiny model trained for 60 steps. Tests copy or read it only."""
    home = tmp_path_factory.mktemp('trained')
    write_mini(home)
    flags = [*TINY, '--max_iters=60', '--lr_decay_iters=60', '--eval_interval=30']
    subprocess.run(
        [PYTHON, str(ROOT / 'train.py'), *flags],
        cwd=home,
        check=True,
        capture_output=True,
        timeout=120,
    )
    return home / 'out'


def shared(name):
    """Return the path of a file or folder in SHARED. Skip the test if it does not exist."""
    if not (SHARED / name).exists():
        pytest.skip(f'no local copy of {name}; set SHARED_DATA to a folder that holds it')
    return SHARED / name


@pytest.fixture
def shakespeare():
    """Return the path of the Tiny Shakespeare text."""
    return shared('tinyshakespeare.txt')


@pytest.fixture
def head():
    """Return the path of the first 4,154,400 bytes of enwik8, compressed with gzip."""
    return shared('enwik8_head.gz')


@pytest.fixture
def gpt2_files(monkeypatch):
    """Let tiktoken read GPT-2's files from SHARED."""
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(shared('tiktoken')))


@pytest.fixture(scope='session')
def browser():
    """Return a headless Chromium."""
    api = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    names = ('chromium', 'chromium-browser', 'google-chrome')
    found = next(filter(None, map(shutil.which, names)), None)
    if not found:
        pytest.skip('no chromium on this machine; type apt-get install chromium')
    with api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=found, args=['--no-sandbox'])
        yield browser
        browser.close()


@pytest.fixture
def server():
    """Return serve((status, body), ...) -> url, which starts a server on loopback.

    The server gives each reply once, and the last one for ever.
    """
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
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        started.append(httpd)
        return f'http://127.0.0.1:{httpd.server_port}/input.txt'

    yield serve
    for httpd in started:
        httpd.shutdown()


@pytest.fixture
def no_waiting(monkeypatch):
    """Retry a download at once."""
    monkeypatch.setattr('time.sleep', lambda seconds: None)


def rewrite(path, tokenizer=None, **knobs):
    """Change knobs, and the tokenizer's state if one is given, in a checkpoint file."""
    from lib import checkpoint
    loaded = checkpoint.load(str(path))
    loaded['config'] = loaded['config'] | knobs
    if tokenizer:
        loaded['tokenizer'] = tokenizer
    checkpoint.save(str(path), loaded)


def read_log(path):
    """Return the rows of a log.csv, each a dict of strings."""
    with open(path, newline='') as f:
        return list(csv.DictReader(f))


def without_times(path):
    """Return the rows of a log.csv without the columns that differ from run to run."""
    rows = read_log(path)
    for row in rows:
        del row['tok_per_s']
        del row['seconds']
    return rows


def weights(path):
    """Return the state dict in a checkpoint file."""
    return torch.load(path, weights_only=True)['model']


def same_weights(a, b):
    """Return whether the weights in two checkpoint files are equal to the bit."""
    first = weights(a)
    second = weights(b)
    if first.keys() != second.keys():
        return False
    return all(torch.equal(first[name], second[name]) for name in first)
