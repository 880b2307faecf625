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

import pytest
from conftest import PYTHON, ROOT, TINY, read_log

from lib import checkpoint

LONG = [*TINY, '--max_iters=100000', '--lr_decay_iters=100000', '--eval_interval=100000',
        '--log_interval=1', '--max_minutes=0.4']   # the minutes end it where a signal does not
SHORT = [*TINY, '--max_iters=60', '--lr_decay_iters=60', '--eval_interval=20', '--log_interval=1']
MASTER = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT='1')
# a locale in which Python writes ASCII
ASCII = dict(LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0')


NOHUP = '''
import os, runpy, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN)
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name='__main__')
'''


def command(name, *flags, python=PYTHON):
    """Return a shell's words that run a script."""
    return shlex.join([python, str(ROOT / name), *flags])


def shell(line, **options):
    """Run a line in bash; return what came of it, its outputs as bytes."""
    return subprocess.run(['bash', '-c', line], capture_output=True, timeout=100, **options)


def saved_at(out):
    return checkpoint.read(f'{out}/last.pt')['iter_num']


def whole(out, steps):
    """Return whether a run has logged every step, saved the last one and left nothing behind."""
    rows = read_log(f'{out}/log.csv')
    return (saved_at(out) == steps and [int(row['iter']) for row in rows] == list(range(steps + 1))
            and not os.path.exists(f'{out}/.lock'))


def wait_for(path, lines):
    """Wait until a file has so many lines."""
    deadline = time.monotonic() + 60
    while not (os.path.exists(path) and len(open(path, 'rb').readlines()) > lines):
        assert time.monotonic() < deadline, f'{path} does not grow'
        time.sleep(0.02)


@pytest.mark.parametrize('python', [PYTHON, sys.executable])
def test_ctrl_c_under_tee(mini, python):
    """A terminal sends Ctrl-C to the whole group: tee ends before the next line is logged."""
    terminal, console = pty.openpty()
    train = command('train.py', *LONG, python=python)
    line = f'trap : INT; {train} 2>&1 | tee log; echo ${{PIPESTATUS[0]}} > code'
    with subprocess.Popen(['setsid', '--ctty', 'bash', '-c', line], stdin=console,
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
        wait_for('out/log.csv', 20)
        os.write(terminal, b'\x03')
    os.close(terminal)
    os.close(console)
    steps = len(read_log('out/log.csv'))
    assert int(open('code').read()) == 130
    assert saved_at('out') == steps > 20
    assert not os.path.exists('out/.lock')


def test_a_reader_that_has_seen_enough(mini):
    """`2> >(head -n 5)`: what nobody reads is dropped, the run goes on to its end."""
    done = shell(f'{command("train.py", *SHORT)} 2> >(head -n 5 >&1; exec 0<&-)')
    assert done.returncode == 0 and done.stdout.count(b'\n') == 5 and whole('out', 60)


@pytest.mark.parametrize('where, python', [
    ('2>/dev/full', PYTHON), ('>/dev/full 2>&1', PYTHON), ('2>&-', sys.executable),
    ('<&- >&- 2>&-', sys.executable)])
def test_a_console_that_cannot_be_written(mini, where, python):
    """A full disk under the console's log, or closed files: the run is whole and ends with 0."""
    done = shell(f'{command("train.py", *SHORT, python=python)} {where}')
    assert done.returncode == 0 and whole('out', 60)
    with open('out/log.csv') as f:
        assert all(line.count(',') == 7 for line in f)   # no library's message is in it


def test_mistakes_keep_their_exit_code(mini):
    done = shell(f'{command("train.py", "--lr=1")} 2>/dev/full; echo $?')
    assert done.stdout == b'2\n'


@pytest.mark.parametrize('name, flags', [
    ('train.py', ['--help']), ('evaluate.py', ['--help']), ('evaluate.py', []),
    ('evaluate.py', ['--json=-']), ('ablate.py', ['list']), ('sample.py', ['--start=1']),
    ('analyze.py', ['--start=12 times 3', '--windows=2'])])
def test_stdout_that_cannot_be_written(trained, folder, name, flags):
    """A full disk is said in one line; a reader that has ended ends the script in silence."""
    if name in ('evaluate.py', 'sample.py', 'analyze.py') and '--help' not in flags:
        os.symlink(trained.parent / 'data', 'data')
        os.mkdir('out')
        os.symlink(trained / 'best.pt', 'out/best.pt')
        flags = [*flags, '--device=cpu']
    full = shell(f'{command(name, *flags)} >/dev/full')
    errors = [line for line in full.stderr.splitlines() if line.startswith(b'error: ')]
    assert full.returncode == 2 and len(errors) == 1 and b'stdout' in errors[0], full.stderr
    gone = shell(f'{command(name, *flags)} > >(exec 0<&-); echo $? >&2')
    assert gone.stderr.splitlines()[-1] == b'141'
    for said in (full.stderr, gone.stderr):
        assert b'Traceback' not in said and b'Exception ignored' not in said


def test_closed_stdout(trained, folder):
    os.symlink(trained.parent / 'data', 'data')
    flags = ['--json=-', f'--out_dir={trained}', '--device=cpu']
    done = shell(f'{command("evaluate.py", *flags, python=sys.executable)} >&-')
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(b'error: stdout is closed')


def test_a_sample_without_stderr(trained, folder):
    """Notes that nobody reads do not cost the text."""
    flags = ['--start=12 times 3', f'--out_dir={trained}', '--max_new_tokens=20', '--device=cpu']
    unread = shell(f'{command("sample.py", *flags)} 2> >(exec 0<&-)')
    assert unread.stdout == shell(command('sample.py', *flags)).stdout != b''


def test_a_locale_without_letters(folder):
    """Results are UTF-8 in any locale."""
    done = shell(command('ablate.py', 'list'), env={**os.environ, **ASCII})
    assert done.returncode == 0 and '+ ReLU²'.encode() in done.stdout and done.stderr == b''


def test_a_closed_terminal_saves(mini):
    """SIGHUP is what a closed terminal sends; nohup ignores it, and so does a run under it."""
    job = subprocess.Popen([PYTHON, str(ROOT / 'train.py'), *LONG], stderr=subprocess.DEVNULL)
    wait_for('out/log.csv', 20)
    job.send_signal(signal.SIGHUP)
    assert job.wait(60) == 128 + signal.SIGHUP
    assert saved_at('out') == len(read_log('out/log.csv')) > 20
    nohup = [PYTHON, '-c', NOHUP, str(ROOT / 'train.py'), *LONG, '--out_dir=ignored']
    job = subprocess.Popen(nohup, stderr=subprocess.DEVNULL)
    wait_for('ignored/log.csv', 20)
    job.send_signal(signal.SIGHUP)
    rows = len(read_log('ignored/log.csv'))
    wait_for('ignored/log.csv', rows + 20)
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) == 128 + signal.SIGTERM


@pytest.mark.parametrize('variables, words', [
    (dict(RANK='0'), ['WORLD_SIZE, MASTER_ADDR, MASTER_PORT', 'torchrun', 'unset RANK']),
    (dict(RANK='x', WORLD_SIZE='2', **MASTER), ['RANK=x', 'number']),
    (dict(RANK='2', WORLD_SIZE='2', **MASTER), ['RANK=2', 'WORLD_SIZE=2'])])
def test_half_of_torchruns_variables(mini, refused, monkeypatch, variables, words):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    refused('train.py', *TINY, words=words)


def test_json_is_whole_on_stdout(trained, folder):
    os.symlink(trained.parent / 'data', 'data')
    done = shell(command('evaluate.py', '--json=-', f'--out_dir={trained}', '--device=cpu'))
    assert json.loads(done.stdout)['split'] == 'val'


def test_a_package_that_is_missing(folder):
    """Every script says in one line what to install, with --help too."""
    hide = 'import importlib.util as u, runpy, sys; real = u.find_spec; ' \
           'u.find_spec = lambda name, *rest: None if name == "torch" else real(name, *rest); ' \
           'sys.argv = sys.argv[1:]; sys.path.insert(0, sys.argv[0].rpartition("/")[0]); ' \
           'runpy.run_path(sys.argv[0], run_name="__main__")'
    for path in sorted(ROOT.glob('*.py')):
        if path.name == 'model.py':
            continue
        done = subprocess.run([sys.executable, '-c', hide, str(path), '--help'], capture_output=True, text=True)
        assert done.returncode == 2 and done.stdout == '', (path, done.stdout)
        assert done.stderr == 'error: the package torch is missing; type pip install -r requirements.txt\n'


def test_ctrl_c_while_packages_are_imported(folder):
    job = subprocess.Popen([sys.executable, '-X', 'importtime', str(ROOT / 'train.py')], stderr=subprocess.PIPE, text=True)
    for line in job.stderr:
        if 'numpy' in line:   # the first of its modules has been imported
            break
    job.send_signal(signal.SIGINT)
    assert 'Traceback' not in job.communicate(timeout=60)[1] and job.returncode == -signal.SIGINT
