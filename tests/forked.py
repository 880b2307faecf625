"""
Ranks without torchrun: torch is imported once, then every run and every rank of it is a fork.

A fork starts in a tenth of the time that a fresh start takes.

    python tests/forked.py 2 train.py --max_iters=6 --then 1 train.py --init_from=resume

Ends with the first exit code that is not 0. Restarts, agents and signals are tested with torchrun.
"""
import atexit
import os

os.environ['OMP_NUM_THREADS'] = '1'   # before torch: forks do not inherit its threads

import runpy
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch.distributed.fsdp  # noqa: F401, in the parent, so that no fork imports it again

ROOT = Path(__file__).resolve().parent.parent


def fork_script(script, flags, log='', environment=()):
    """Run a script in a forked child; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    atexit._clear()   # what the parent has to do at its end, such as removing its temporary folder
    code = 99
    try:
        os.environ.update(environment)
        if log:
            with open(log, 'w') as f:
                os.dup2(f.fileno(), 1), os.dup2(f.fileno(), 2)
        sys.argv = [str(ROOT / script), *flags]
        sys.path[:1] = [str(ROOT)]
        sys.modules['matplotlib'] = None   # no plots: the time goes into the runs
        runpy.run_path(str(ROOT / script), run_name='__main__')
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    from lib.console import settle  # here, where sys.path has its folder
    settle()
    os._exit(code)


def fork_ranks(ranks, script, flags, log=''):
    """The same as many ranks that find each other on loopback; returns their process ids."""
    if ranks == 1:
        return [fork_script(script, flags, log)]
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = str(s.getsockname()[1])
    where = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=port, WORLD_SIZE=str(ranks))
    pids = []
    for rank in range(ranks):
        environment = {**where, 'RANK': str(rank), 'LOCAL_RANK': str(rank)}
        pids.append(fork_script(script, flags, log and f'{log}.{rank}', environment))
    return pids


def wait(pid, seconds=60):
    """A child's exit status, -9 when it had to be killed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -9


if __name__ == '__main__':
    commands, code = [[]], 0
    for word in sys.argv[1:]:
        commands.append([]) if word == '--then' else commands[-1].append(word)
    for ranks, script, *flags in commands:
        codes = [wait(pid) for pid in fork_ranks(int(ranks), script, flags)]
        code = next((code for code in codes if code), 0)
        if code:
            break
    sys.exit(code if code >= 0 else 128 - code)
