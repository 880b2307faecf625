"""What the tests share: scripts run as a user runs them, a small text, a small dataset."""
import os

os.environ.setdefault('OMP_NUM_THREADS', '1')   # before torch: two workers and torchrun's ranks share the cores

import ctypes
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pixel import write_pixel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Tiny Shakespeare and tiktoken's files come from here, never from the network; the tests that need them skip without
SHARED = Path(os.environ.get('SHARED_DATA') or ROOT.parent / 'shared' / 'data')

TINY = ['--n_layer=2', '--n_head=2', '--n_embd=16', '--block_size=16', '--batch_size=4', '--gradient_accumulation_steps=1',
        '--max_iters=10', '--eval_interval=5', '--eval_iters=2', '--learning_rate=1e-2', '--warmup_iters=2', '--dataset=mini',
        '--device=cpu', '--dtype=float32', '--lr_decay_iters=10']
TEXT = ''.join(f'{i} times {j} is {i * j},\nsaid the miller to his wife.\n' for i in range(12) for j in range(12))


CAN_FORK = hasattr(os, 'pidfd_open')   # on Linux
PYTHON = os.environ.get('FORKING_PYTHON', sys.executable)   # a python that starts at once, see fork_server.py
COMPILED = pytest.mark.xdist_group('compiled')   # in one worker: importing torch's compiler takes seconds
KILL = signal.SIGUSR2 if CAN_FORK else signal.SIGKILL   # fork_client.py passes SIGUSR2 on as SIGKILL


def pytest_configure(config):
    """Make what pytest's workers share: PYTHON, and an empty folder for compiled code."""
    global PYTHON
    if hasattr(config, 'workerinput'):   # a worker has inherited them
        return
    folder = tempfile.TemporaryDirectory()
    config.add_cleanup(folder.cleanup)
    os.environ['TORCHINDUCTOR_CACHE_DIR'] = os.path.join(folder.name, 'compiled')
    if CAN_FORK:
        server = start_fork_server(folder.name)
        config.add_cleanup(server.wait)
        config.add_cleanup(server.stdin.close)   # the last cleanup comes first: the server ends when its stdin is closed
        os.environ['FORKING_PYTHON'] = PYTHON = os.path.join(folder.name, 'python')


def start_fork_server(folder):
    """Start fork_server.py, and write its client into the folder as a command named python."""
    path = os.path.join(folder, 'socket')
    command = os.path.join(folder, 'python')
    client = [sys.executable, '-IS', str(ROOT / 'tests' / 'fork_client.py'), path, command]
    with open(command, 'w') as f:
        f.write(f'#!/bin/sh\nexec {shlex.join(client)} "$@"\n')
    os.chmod(command, 0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(100)
        return subprocess.Popen([sys.executable, str(ROOT / 'tests' / 'fork_server.py'), str(listener.fileno())],
                                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=[listener.fileno()])


@pytest.fixture
def script(monkeypatch, capfd, request):
    """script('train.py', *flags) runs a script to its end in this process -> code, out, err; a traceback is a failure.

    Its pictures are laid out, but only tests marked `pictures` draw them."""
    if not request.node.get_closest_marker('pictures'):
        monkeypatch.setattr('matplotlib.figure.Figure.savefig', write_pixel)

    def run(name, *flags, stdin=None):
        monkeypatch.setattr(sys, 'argv', [str(ROOT / name), *map(str, flags)])
        monkeypatch.setattr(sys, 'executable', PYTHON)   # for scripts that start others
        if stdin is not None:
            import io
            monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding='utf-8'))
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)}
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
    """Runs a script that must end as the contract's errors do: exit 2, one line that holds every word given."""
    def run(name, *flags, words=(), stdin=None):
        result = script(name, *flags, stdin=stdin)
        lines = [line for line in result.err.splitlines() if line.startswith('error: ')]
        assert result.code == 2 and len(lines) == 1, (result.code, result.err)
        assert 'Traceback' not in result.err and result.out == ''
        for word in words:
            assert word in lines[0], lines[0]
        return lines[0]
    return run


@pytest.fixture
def process():
    """process('train.py', *flags) runs a script in a process of its own, for signals and torchrun."""
    def run(name, *flags, launcher=(), **options):
        options = dict(capture_output=True, text=True, timeout=120) | options
        environment = {**os.environ, 'OMP_NUM_THREADS': '1', **options.pop('env', {})}
        return subprocess.run([PYTHON, *launcher, str(ROOT / name), *map(str, flags)], env=environment, **options)
    return run


@pytest.fixture
def forked():
    """forked([2, 'train.py', *flags], [1, 'train.py', *flags]) runs scripts in turn, as that many ranks each (forked.py)."""
    def run(*commands):
        words = [str(word) for command in commands for word in ('--then', *command)]
        done = subprocess.run([PYTHON, str(ROOT / 'tests' / 'forked.py'), *words[1:]], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    return run


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def modes_hold():
    """Make folders' modes hold for root too: the test's thread gives up overriding them."""
    if not hasattr(os, 'geteuid'):
        pytest.skip('this system has no modes of folders')
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, 'capset'):
        pytest.skip('root cannot give up overriding modes here')
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)   # the version of the interface; 0: this thread
    sets = (ctypes.c_uint32 * 6)()   # effective, permitted, inheritable; then their higher 32 bits
    assert libc.capget(header, sets) == 0
    before = sets[0]
    sets[0] &= ~0b110   # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    assert libc.capset(header, sets) == 0
    yield
    sets[0] = before
    assert libc.capset(header, sets) == 0


@pytest.fixture
def mini(folder):
    """A working folder with data/mini: some 5,000 characters."""
    from lib.prepare import write_dataset
    from lib.tokenizers import CharTokenizer
    tokenizer, cut = CharTokenizer(TEXT), int(0.9 * len(TEXT))
    parts = dict(train=TEXT[:cut], val=TEXT[cut:])
    write_dataset('data/mini', {split: [(tokenizer.encode(part), len(part))] for split, part in parts.items()}, tokenizer,
                  dict(name='mini', url=None, sha256='', stand_in=False))
    return folder


@pytest.fixture(scope='session')
def trained(tmp_path_factory):
    """The out_dir of a tiny model trained for some steps, to copy or read, never to change."""
    from lib.prepare import write_dataset
    from lib.tokenizers import CharTokenizer
    home = tmp_path_factory.mktemp('trained')
    tokenizer, cut = CharTokenizer(TEXT), int(0.9 * len(TEXT))
    parts = dict(train=TEXT[:cut], val=TEXT[cut:])
    write_dataset(str(home / 'data/mini'), {split: [(tokenizer.encode(part), len(part))] for split, part in parts.items()},
                  tokenizer, dict(name='mini', url=None, sha256='', stand_in=False))
    subprocess.run([PYTHON, str(ROOT / 'train.py'), *TINY, '--max_iters=60', '--lr_decay_iters=60', '--eval_interval=30'],
                   cwd=home, check=True, capture_output=True, timeout=120)
    return home / 'out'


def shared(name):
    """A file or folder of SHARED; the test that needs it skips without."""
    if not (SHARED / name).exists():
        pytest.skip(f'no local copy of {name}; set SHARED_DATA to a folder that holds it')
    return SHARED / name


@pytest.fixture
def shakespeare():
    return shared('tinyshakespeare.txt')


@pytest.fixture
def head():
    """The first 4,154,400 bytes of enwik8."""
    return shared('enwik8_head.gz')


@pytest.fixture
def gpt2_files(monkeypatch):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(shared('tiktoken')))


@pytest.fixture(scope='session')
def browser():
    """A headless Chromium."""
    api = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    found = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if not found:
        pytest.skip('no chromium on this machine; type apt-get install chromium')
    with api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=found, args=['--no-sandbox'])
        yield browser
        browser.close()


def rewrite(path, tokenizer=None, **knobs):
    """Change what a checkpoint file says about its run: the knobs, and the tokenizer's state."""
    from lib import checkpoint
    loaded = checkpoint.load(str(path))
    loaded['config'] = loaded['config'] | knobs
    if tokenizer:
        loaded['tokenizer'] = tokenizer
    checkpoint.save(str(path), loaded)


def read_log(path):
    import csv
    with open(path, newline='') as f:
        return list(csv.DictReader(f))


def weights(path):
    return torch.load(path, weights_only=True)['model']


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def without_times(path):
    return [{key: row[key] for key in row if key not in ('tok_per_s', 'seconds')} for row in read_log(path)]
