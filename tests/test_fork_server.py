"""PYTHON of conftest.py behaves like a new Python process. pytest tests/test_fork_server.py"""
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import CAN_FORK, KILL, PYTHON

pytestmark = pytest.mark.skipif(not CAN_FORK, reason='PYTHON is a plain python on this system')

PRINT_THE_COMMAND = 'import sys; print(sys.argv, sys.path[0])'
WAIT = 'import os, time; print(os.getpid(), flush=True); time.sleep(60)'
SCRIPTS = [
    'import sys; print(sys.argv, sys.path, __name__, __file__)',
    'import os; print(os.getcwd(), os.environ["HERE"])',
    'print(input()); print(input())',
    'raise SystemExit',
    'raise SystemExit(300)',
    'raise SystemExit("a word")',
    '1 / 0',
    'raise KeyboardInterrupt',
    'import os; os.abort()',
    'import atexit; atexit.register(print, "at the end")',
    '''
import threading, time
def late():
    time.sleep(0.1)
    print("late")
threading.Thread(target=late).start()
''',
]


def end_of(python, words, options):
    """Return the exit code, stdout and the last line of stderr of a command."""
    done = subprocess.run(
        [python, *words],
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )
    return done.returncode, done.stdout, done.stderr.splitlines()[-1:]


def assert_same_end(*words, **options):
    """Check that a command ends the same with a new Python process and with PYTHON."""
    assert end_of(PYTHON, words, options) == end_of(sys.executable, words, options)


@pytest.mark.parametrize('code', SCRIPTS)
def test_a_script_ends_the_same(folder, code):
    (folder / 'a.py').write_text(code)
    environment = {**os.environ, 'HERE': 'here'}
    assert_same_end('a.py', 'word', '--flag=x', input='first\nlast\n', env=environment)


@pytest.mark.parametrize('words', [
    ['-m', 'a', 'word'],
    ['-u', 'a.py', 'word'],
    ['-c', PRINT_THE_COMMAND, 'word'],
])
def test_options_of_python_work_the_same(folder, words):
    (folder / 'a.py').write_text(f'{PRINT_THE_COMMAND}; sys.exit(len(sys.argv))')
    assert_same_end(*words)


def test_open_files_are_passed_on(folder):
    with open('written', 'w') as f:
        number = f.fileno()
        code = f'import os; os.write({number}, b"here")'
        subprocess.run([PYTHON, '-c', code], pass_fds=[number], check=True)
    assert (folder / 'written').read_text() == 'here'


def test_a_new_process_starts_where_a_fork_would_differ(folder):
    """Options of Python, variables that are read at the start, and scripts that are missing."""
    (folder / 'sitecustomize.py').write_text('import builtins; builtins.customized = True')
    code = (
        'import builtins, sys; '
        'print(hasattr(builtins, "customized"), "torch" in sys.modules, sys.flags.dev_mode)'
    )
    assert_same_end('-X', 'dev', '-c', code)
    assert_same_end('-c', code, env={**os.environ, 'PYTHONPATH': '.'})
    assert_same_end('missing.py')
    forked = subprocess.run([PYTHON, '-c', code], capture_output=True, text=True)
    assert forked.stdout == 'False True False\n'


@pytest.mark.parametrize('number, code', [
    (signal.SIGTERM, -15),
    (signal.SIGINT, -2),
    (KILL, -9),
    (signal.SIGKILL, -9),
])
def test_signals_reach_the_script(number, code):
    """SIGKILL ends the client, and then the server ends the script."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen([PYTHON, '-c', WAIT], **pipes)
    pid = int(process.stdout.readline())
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == code
    deadline = time.monotonic() + 60
    while os.path.exists(f'/proc/{pid}'):
        assert time.monotonic() < deadline
        time.sleep(0.01)
