"""PYTHON of conftest.py does what a python started afresh does. pytest tests/test_fork_server.py"""
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import CAN_FORK, KILL, PYTHON

pytestmark = pytest.mark.skipif(not CAN_FORK, reason='PYTHON is a plain python here')
WAITS = 'import os, time; print(os.getpid(), flush=True); time.sleep(60)'


def both(*words, **options):
    """What a python that was started afresh, and then PYTHON, end with: exit code, stdout and the last line of stderr."""
    ends = []
    for python in (sys.executable, PYTHON):
        done = subprocess.run([python, *words], capture_output=True, text=True, timeout=60, **options)
        ends.append((done.returncode, done.stdout, done.stderr.splitlines()[-1:]))
    return ends


@pytest.mark.parametrize('code', [
    'import sys; print(sys.argv, sys.path, __name__, __file__)', 'import os; print(os.getcwd(), os.environ["HERE"])',
    'print(input()); print(input())', 'raise SystemExit', 'raise SystemExit(300)', 'raise SystemExit("a word")', '1 / 0',
    'raise KeyboardInterrupt', 'import os; os.abort()', 'import atexit; atexit.register(print, "at the end")',
    'import threading, time; threading.Thread(target=lambda: (time.sleep(0.1), print("late"))).start()'])
def test_a_script_ends_the_same(folder, code):
    (folder / 'a.py').write_text(code)
    afresh, forked = both('a.py', 'word', '--flag=x', input='first\nlast\n', env={**os.environ, 'HERE': 'here'})
    assert forked == afresh


def test_modules_code_and_other_files(folder):
    (folder / 'a.py').write_text('import sys; print(sys.argv, sys.path[0]); sys.exit(len(sys.argv))')
    for words in (['-m', 'a', 'word'], ['-u', 'a.py', 'word'], ['-c', 'import sys; print(sys.argv, sys.path[0])', 'word']):
        afresh, forked = both(*words)
        assert forked == afresh
    with open('written', 'w') as f:
        subprocess.run([PYTHON, '-c', f'import os; os.write({f.fileno()}, b"here")'], pass_fds=[f.fileno()], check=True)
    assert (folder / 'written').read_text() == 'here'


def test_what_a_fork_cannot_do_is_started_afresh(folder):
    """Options, variables that are read at the start, and scripts that are missing."""
    (folder / 'sitecustomize.py').write_text('import builtins; builtins.customized = True')
    customized = 'import builtins, sys; print(hasattr(builtins, "customized"), "torch" in sys.modules, sys.flags.dev_mode)'
    for words, environment in ((['-X', 'dev', '-c', customized], {}), (['-c', customized], dict(PYTHONPATH='.')), (['missing.py'], {})):
        afresh, forked = both(*words, env={**os.environ, **environment})
        assert forked == afresh
    assert subprocess.run([PYTHON, '-c', customized], capture_output=True, text=True).stdout == 'False True False\n'


@pytest.mark.parametrize('number, code', [(signal.SIGTERM, -15), (signal.SIGINT, -2), (KILL, -9), (signal.SIGKILL, -9)])
def test_signals_reach_the_script(number, code):
    """SIGKILL ends the client, and then the script."""
    process = subprocess.Popen([PYTHON, '-c', WAITS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    pid = int(process.stdout.readline())
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == code
    deadline = time.monotonic() + 60
    while os.path.exists(f'/proc/{pid}'):
        assert time.monotonic() < deadline
        time.sleep(0.01)
