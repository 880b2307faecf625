"""
Run scripts with several ranks, without torchrun: each rank is a fork of a process that has torch.

Forking takes a tenth of the time of starting Python and importing torch.

    python tests/forked.py 2 train.py --max_iters=6 --then 1 train.py --init_from=resume

The command ends with the first exit code that is not 0. Restarts, torchrun's agents and signals
are not tested with this command but with torchrun itself.
"""
import atexit
import os

# Set before torch is imported: a fork does not inherit the threads that torch has started.
os.environ['OMP_NUM_THREADS'] = '1'

import runpy
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch.distributed.fsdp  # noqa: F401, imported here once, and not again in each fork

ROOT = Path(__file__).resolve().parent.parent


def fork_script(script, flags, log='', environment=()):
    """Run a script in a forked child. Return the child's process id.

    `log` names a file for the child's stdout and stderr. `environment` is added to os.environ.
    """
    pid = os.fork()
    if pid:
        return pid
    # Drop the parent's exit handlers, such as the one that removes its temporary folder.
    atexit._clear()
    code = 99
    try:
        os.environ.update(environment)
        if log:
            with open(log, 'w') as f:
                os.dup2(f.fileno(), 1)
                os.dup2(f.fileno(), 2)
        sys.argv = [str(ROOT / script), *flags]
        sys.path[0] = str(ROOT)
        sys.modules['matplotlib'] = None   # the script draws no plots, which saves time
        runpy.run_path(str(ROOT / script), run_name='__main__')
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    from lib.console import settle  # imported here, because sys.path holds ROOT only in the child
    settle()
    os._exit(code)


def fork_ranks(ranks, script, flags, log=''):
    """Run a script as several ranks that connect over loopback. Return their process ids.

    With more than one rank, the output of rank 0 goes to the file `log`.0, and so on.
    """
    if ranks == 1:
        return [fork_script(script, flags, log)]
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = str(s.getsockname()[1])
    shared = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=port, WORLD_SIZE=str(ranks))
    pids = []
    for rank in range(ranks):
        environment = dict(shared, RANK=str(rank), LOCAL_RANK=str(rank))
        rank_log = f'{log}.{rank}' if log else ''
        pids.append(fork_script(script, flags, rank_log, environment))
    return pids


def wait(pid, seconds=60):
    """Return a child's exit code. Kill the child and return -9 after so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -9


def commands_of(words):
    """Split words at every '--then' into a list of commands."""
    commands = [[]]
    for word in words:
        if word == '--then':
            commands.append([])
        else:
            commands[-1].append(word)
    return commands


def run(ranks, script, *flags):
    """Run a script to its end. Return the first exit code that is not 0, or 0."""
    codes = [wait(pid) for pid in fork_ranks(int(ranks), script, flags)]
    failed = [code for code in codes if code]
    return failed[0] if failed else 0


if __name__ == '__main__':
    code = 0
    for command in commands_of(sys.argv[1:]):
        code = run(*command)
        if code:
            break
    sys.exit(code if code >= 0 else 128 - code)
