"""console.py: a console that cannot be written costs neither a run nor its exit code.

    pytest tests/test_console.py
"""
import json
import os
import pty
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import PYTHON, ROOT, TINY, read_log

from lib import checkpoint

# A run that a signal ends. If no signal comes, the run ends after 0.4 minutes.
LONG = [
    *TINY,
    '--max_iters=100000',
    '--lr_decay_iters=100000',
    '--eval_interval=100000',
    '--log_interval=1',
    '--max_minutes=0.4',
]
# A run of 60 steps to its end.
SHORT = [*TINY, '--max_iters=60', '--lr_decay_iters=60', '--eval_interval=20', '--log_interval=1']
# A locale in which Python writes ASCII.
ASCII = dict(LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0')

# Run a script with SIGHUP ignored, as nohup does.
NOHUP = '''
import os, runpy, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN)
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name='__main__')
'''
# Run a script as if torch were not installed.
HIDE_TORCH = '''
import importlib.util, os, runpy, sys
find_spec = importlib.util.find_spec
def without_torch(name, *rest):
    return None if name == 'torch' else find_spec(name, *rest)
importlib.util.find_spec = without_torch
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name='__main__')
'''


def command(name, *flags, python=PYTHON):
    """Return the words of a shell that run a script."""
    return shlex.join([python, str(ROOT / name), *flags])


def shell(line, **options):
    """Run a line in bash. Return the finished process; its stdout and stderr are bytes."""
    return subprocess.run(['bash', '-c', line], capture_output=True, timeout=100, **options)


def errors_of(done):
    """Return the lines of error in a finished process's stderr, as bytes."""
    return [line for line in done.stderr.splitlines() if line.startswith(b'error: ')]


def saved_at(out):
    """Return the step that last.pt holds."""
    return checkpoint.read(f'{out}/last.pt')['iter_num']


def assert_whole(out, steps):
    """Check that a run logged every step, saved the last one, and left nothing behind."""
    logged = [int(row['iter']) for row in read_log(f'{out}/log.csv')]
    assert logged == list(range(steps + 1))
    assert saved_at(out) == steps
    assert not os.path.exists(f'{out}/.lock')


def wait_for_lines(path, lines):
    """Wait until a file has more than so many lines."""
    path = Path(path)
    deadline = time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b'\n') <= lines:
        assert time.monotonic() < deadline, f'{path} does not grow'
        time.sleep(0.02)


# ---- training ----------------------------------------------------------------------------------

@pytest.mark.parametrize('python', [PYTHON, sys.executable])
def test_ctrl_c_under_tee_saves_the_run(mini, python):
    """A terminal sends Ctrl-C to the whole group, so tee ends before the next line is logged."""
    terminal, console = pty.openpty()
    train = command('train.py', *LONG, python=python)
    line = f'trap : INT; {train} 2>&1 | tee log; echo ${{PIPESTATUS[0]}} > code'
    with subprocess.Popen(
        ['setsid', '--ctty', 'bash', '-c', line],
        stdin=console,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ):
        wait_for_lines('out/log.csv', 20)
        os.write(terminal, b'\x03')
    os.close(terminal)
    os.close(console)
    steps = len(read_log('out/log.csv'))
    assert steps > 20
    assert saved_at('out') == steps
    assert int(Path('code').read_text()) == 128 + signal.SIGINT
    assert not os.path.exists('out/.lock')


def test_a_closed_terminal_saves_the_run(mini):
    """A closed terminal sends SIGHUP."""
    train = [PYTHON, str(ROOT / 'train.py'), *LONG]
    job = subprocess.Popen(train, stderr=subprocess.DEVNULL)
    wait_for_lines('out/log.csv', 20)
    job.send_signal(signal.SIGHUP)
    assert job.wait(60) == 128 + signal.SIGHUP
    steps = len(read_log('out/log.csv'))
    assert steps > 20
    assert saved_at('out') == steps


def test_a_run_under_nohup_ignores_a_closed_terminal(mini):
    train = [PYTHON, '-c', NOHUP, str(ROOT / 'train.py'), *LONG]
    job = subprocess.Popen(train, stderr=subprocess.DEVNULL)
    wait_for_lines('out/log.csv', 20)
    job.send_signal(signal.SIGHUP)
    rows = len(read_log('out/log.csv'))
    wait_for_lines('out/log.csv', rows + 20)
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) == 128 + signal.SIGTERM


def test_a_reader_that_ends_early_does_not_end_the_run(mini):
    """`2> >(head -n 5)` reads five lines. Later lines are dropped."""
    done = shell(f'{command("train.py", *SHORT)} 2> >(head -n 5 >&1; exec 0<&-)')
    assert done.returncode == 0
    assert done.stdout.count(b'\n') == 5
    assert_whole('out', 60)


@pytest.mark.parametrize('where, python', [
    ('2>/dev/full', PYTHON),
    ('>/dev/full 2>&1', PYTHON),
    ('2>&-', sys.executable),
    ('<&- >&- 2>&-', sys.executable),
])
def test_a_full_or_closed_console_does_not_end_the_run(mini, where, python):
    done = shell(f'{command("train.py", *SHORT, python=python)} {where}')
    assert done.returncode == 0
    assert_whole('out', 60)
    # A library's message could end up in the file that has the number of a closed stderr.
    for line in Path('out/log.csv').read_text().splitlines():
        assert line.count(',') == 7


def test_mistakes_keep_their_exit_code(mini):
    done = shell(f'{command("train.py", "--lr=1")} 2>/dev/full; echo $?')
    assert done.stdout == b'2\n'


RENDEZVOUS = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT='1')


@pytest.mark.parametrize('variables, words', [
    (dict(RANK='0'), ['WORLD_SIZE, MASTER_ADDR, MASTER_PORT', 'torchrun', 'unset RANK']),
    (dict(RANK='x', WORLD_SIZE='2', **RENDEZVOUS), ['RANK=x', 'number']),
    (dict(RANK='2', WORLD_SIZE='2', **RENDEZVOUS), ['RANK=2', 'WORLD_SIZE=2']),
])
def test_impossible_variables_of_torchrun_are_refused(
        mini, refused, monkeypatch, variables, words):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    refused('train.py', *TINY, words=words)


# ---- results on stdout -------------------------------------------------------------------------

@pytest.fixture
def work(trained, folder):
    """Enter a folder with the tiny model as out/best.pt and its data. Return its path."""
    os.symlink(trained.parent / 'data', 'data')
    os.mkdir('out')
    os.symlink(trained / 'best.pt', 'out/best.pt')
    return folder


@pytest.mark.parametrize('name, flags', [
    ('train.py', ['--help']),
    ('evaluate.py', ['--help']),
    ('evaluate.py', ['--device=cpu', '--compile=False']),
    ('evaluate.py', ['--device=cpu', '--compile=False', '--json=-']),
    ('ablate.py', ['list']),
    ('sample.py', ['--device=cpu', '--start=1']),
    ('analyze.py', ['--device=cpu', '--start=12 times 3', '--windows=2']),
])
def test_stdout_that_cannot_be_written_ends_the_script(work, name, flags):
    """A full disk is a line of error. A reader that has ended ends the script silently."""
    full = shell(f'{command(name, *flags)} >/dev/full')
    assert full.returncode == 2
    error, = errors_of(full)
    assert b'stdout cannot be written' in error
    gone = shell(f'{command(name, *flags)} > >(exec 0<&-); echo $? >&2')
    assert gone.stderr.splitlines()[-1] == b'%d' % (128 + signal.SIGPIPE)
    for stderr in (full.stderr, gone.stderr):
        assert b'Traceback' not in stderr
        assert b'Exception ignored' not in stderr


def test_a_closed_stdout_is_an_error(work):
    flags = ['--json=-', '--device=cpu', '--compile=False']
    evaluate = command('evaluate.py', *flags, python=sys.executable)
    done = shell(f'{evaluate} >&-')
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(b'error: stdout is closed')


def test_json_on_stdout_is_whole(work):
    done = shell(command('evaluate.py', '--json=-', '--device=cpu', '--compile=False'))
    assert json.loads(done.stdout)['split'] == 'val'


def test_a_sample_is_written_if_nobody_reads_stderr(work):
    sample = command('sample.py', '--start=12 times 3', '--max_new_tokens=20', '--device=cpu')
    text = shell(sample).stdout
    assert text != b''
    assert shell(f'{sample} 2> >(exec 0<&-)').stdout == text


def test_results_are_utf8_in_any_locale(folder):
    done = shell(command('ablate.py', 'list'), env={**os.environ, **ASCII})
    assert done.returncode == 0
    assert '+ ReLU²'.encode() in done.stdout
    assert done.stderr == b''


# ---- importing packages ------------------------------------------------------------------------

def test_a_missing_package_is_named_by_every_script(folder):
    """One line of error says what to install, even for --help.

    first_principles.py needs NumPy alone: test_it_stands_alone in tests/test_first_principles.py.
    """
    scripts = set(ROOT.glob('*.py')) - {ROOT / 'model.py', ROOT / 'first_principles.py'}
    for path in sorted(scripts):
        done = subprocess.run(
            [sys.executable, '-c', HIDE_TORCH, str(path), '--help'],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2, path
        assert done.stdout == '', path
        install = 'type pip install -r requirements.txt'
        assert done.stderr == f'error: the package torch is missing; {install}\n'


def test_ctrl_c_while_packages_are_imported_prints_no_traceback(folder):
    train = [sys.executable, '-X', 'importtime', str(ROOT / 'train.py')]
    job = subprocess.Popen(train, stderr=subprocess.PIPE, text=True)
    for line in job.stderr:
        if 'numpy' in line:   # the first module of numpy has been imported
            break
    job.send_signal(signal.SIGINT)
    _, stderr = job.communicate(timeout=60)
    assert 'Traceback' not in stderr
    assert job.returncode == -signal.SIGINT
