"""
A python command that starts in a few hundredths of a second with torch imported: every start is a fork of one server.

conftest.py starts the server and names the command PYTHON, which runs fork_client.py. The client hands its arguments,
working folder, environment and open files to the server, passes signals on, and ends as the fork ends. Where a fork would
differ from a fresh start (see `can_fork`), the client starts Python afresh. All forks share one seed of hashes: what depends
on the order of a set shows only between processes started afresh.
"""
import atexit
import contextlib
import ctypes
import fcntl
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
import types
from dataclasses import dataclass

from pixel import write_pixel

# The scripts' slow imports. The project's own modules are not among them: some tests run a changed copy of those.
IMPORTS = ('torch', 'torch._dynamo', 'torch.distributed.fsdp', 'matplotlib.pyplot', 'scipy.stats')
# Variables that Python or a package reads while it starts: in a fork a new value would come too late.
READ_AT_START = ('PYTHON', 'LD_', 'LANG', 'LC_', 'OMP_', 'MKL_', 'ATEN_', 'ONEDNN_', 'CXX', 'HF_', 'MPL')
REQUEST_BYTES = 1 << 20
MOST_FILES = 250
PR_SET_PDEATHSIG = 1   # prctl's number for: the signal to get when the parent ends


@dataclass
class Request:
    """What a client asks for."""
    executable: str     # the command itself, for scripts that start others
    words: list         # Python's arguments
    folder: str         # the working folder
    environment: dict
    files: dict         # {a file's number in the client: its number in the server}


@dataclass
class Fork:
    """A script that runs for a client."""
    pid: int
    ended: int          # a file descriptor that is readable when the script has ended
    client: socket.socket


def receive(client):
    """Return a Request, read as a line of JSON and the client's open files; return None for a client that was killed."""
    line, files, _, _ = socket.recv_fds(client, REQUEST_BYTES, MOST_FILES)
    while not line.endswith(b'\n'):
        more = client.recv(REQUEST_BYTES)
        if not more:
            for file in files:
                os.close(file)
            return None
        line += more
    asked = json.loads(line)
    numbers = asked.pop('files')
    return Request(**asked, files=dict(zip(numbers, files, strict=True)))


def read_at_start(environment):
    """Return the variables of an environment that a fork cannot change."""
    return {key: value for key, value in environment.items() if key.startswith(READ_AT_START)}


def can_fork(request):
    """Return whether a fork does what a fresh start would: for a script, -m or -c, in the same environment."""
    words = request.words
    if words[:1] == ['-u']:
        words = words[1:]
    if not words:   # Python reads stdin
        return False
    known = words[0] in ('-c', '-m') or os.path.isfile(os.path.join(request.folder, words[0]))
    return known and read_at_start(request.environment) == read_at_start(os.environ)


def serve(listener):
    """Fork for each client. Returns its Request in the fork; returns None in the server when the tests have ended."""
    forks = []
    while True:
        waited_for = [0, listener, *(fork.ended for fork in forks), *(fork.client for fork in forks)]
        ready, _, _ = select.select(waited_for, [], [])
        if 0 in ready:   # stdin is closed: the tests have ended
            for fork in forks:
                with contextlib.suppress(OSError):   # a fork leads a group: what it has started ends with it
                    os.killpg(fork.pid, signal.SIGKILL)
            return None
        for fork in [fork for fork in forks if fork.ended in ready]:
            _, status = os.waitpid(fork.pid, 0)
            with contextlib.suppress(OSError):   # the client may have been killed
                fork.client.sendall(b'%d\n' % os.waitstatus_to_exitcode(status))
            forget(fork)
            forks.remove(fork)
        for fork in [fork for fork in forks if fork.client in ready]:   # the client was killed
            os.kill(fork.pid, signal.SIGKILL)
        if listener in ready:
            client, _ = listener.accept()
            request = receive(client)
            if request is None:
                client.close()
                continue
            if can_fork(request):
                pid = os.fork()
                if pid == 0:
                    for fork in forks:
                        forget(fork)
                    client.close()
                    listener.close()
                    return request
                with contextlib.suppress(OSError):   # the client may have been killed; its fork is ended below
                    client.sendall(b'%d\n' % pid)
                forks.append(Fork(pid, os.pidfd_open(pid), client))
            else:
                with contextlib.suppress(OSError):   # the client may have been killed
                    client.sendall(b'start afresh\n')
                client.close()
            for file in request.files.values():
                os.close(file)


def forget(fork):
    os.close(fork.ended)
    fork.client.close()


def become(request):
    """Take over a client's files, working folder and environment."""
    os.setsid()   # signals for the client's group reach the fork through the client alone
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.close(0)
    free = max(request.files, default=0) + 1
    copies = {number: fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, free) for number, file in request.files.items()}
    for file in request.files.values():
        os.close(file)
    for number, file in copies.items():
        os.dup2(file, number)
        os.close(file)
    signal.signal(signal.SIGINT, signal.default_int_handler)   # also where the tests' own shell ignores SIGINT
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.environment)
    sys.executable = request.executable


def run(words):
    """Run `python WORDS`."""
    if words[0] == '-u':
        words = words[1:]
        sys.stdout = open(1, 'w', encoding=sys.stdout.encoding, buffering=1, closefd=False)   # a line at a time
    sys.modules['__main__'] = main = types.ModuleType('__main__')
    kind, sys.argv = words[0], words
    if kind == '-m':
        sys.argv = words[1:]
        sys.path[0] = os.getcwd()
        runpy._run_module_as_main(words[1])   # what Python does for -m
    elif kind == '-c':
        sys.argv = ['-c', *words[2:]]
        sys.path[0] = ''
        exec(words[1], main.__dict__)
    else:
        main.__file__ = os.path.abspath(words[0])
        sys.path[0] = os.path.dirname(os.path.realpath(words[0]))
        with open(main.__file__, 'rb') as f:
            source = f.read()
        exec(compile(source, main.__file__, 'exec', dont_inherit=True), main.__dict__)


def exit_code(act):
    """Call act(); returns the exit code that Python would have: see sys.exit."""
    try:
        act()
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def leave(code):
    """End the process as Python does, but without freeing every object of torch's, which takes a third of a second."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except OSError:
            code = 120   # Python's own for this
    os._exit(code & 0xff)


if __name__ == '__main__':
    for name in IMPORTS:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    with contextlib.suppress(KeyError):   # pictures are drawn where pytest's own processes run the scripts
        sys.modules['matplotlib.figure'].Figure.savefig = write_pixel
    gc.freeze()   # a collection in a fork would copy every page of these modules
    asked = serve(socket.socket(fileno=int(sys.argv[1])))
    if asked:
        become(asked)
        leave(exit_code(lambda: run(asked.words)))
