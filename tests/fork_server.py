"""
A python command that starts in a few hundredths of a second, because torch is imported already.

conftest.py starts this server and names the command PYTHON, which runs fork_client.py. The client
sends its arguments, working folder, environment and open files to the server. The server forks,
and the fork runs the script. The client forwards signals to the fork and ends as the fork ends.

Where a fork would differ from a new process (see `can_fork`), the client starts Python itself.
All forks share one seed for hashes. A result that depends on the order of a set varies only
between processes that were started by themselves.
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

# Slow imports of the scripts. The project's own modules are missing here on purpose, because some
# tests run a changed copy of them.
IMPORTS = (
    'torch',
    'torch._dynamo',
    'torch.distributed.fsdp',
    'matplotlib.pyplot',
    'scipy.stats',
)
# Prefixes of the variables that Python or a package reads while it starts. A fork cannot change
# them any more.
READ_AT_START = (
    'PYTHON',
    'LD_',
    'LANG',
    'LC_',
    'OMP_',
    'MKL_',
    'ATEN_',
    'ONEDNN_',
    'CXX',
    'HF_',
    'MPL',
)
REQUEST_BYTES = 1 << 20
MOST_FILES = 250
PR_SET_PDEATHSIG = 1   # an option of prctl: choose a signal to receive when the parent ends


@dataclass
class Request:
    """A client's request to run a script."""
    executable: str     # the command PYTHON, for scripts that start other scripts
    words: list         # Python's arguments
    folder: str         # the working folder
    environment: dict
    files: dict         # {a file's number in the client: its number in the server}


@dataclass
class Fork:
    """A fork that runs a script for a client."""
    pid: int
    ended: int          # a file descriptor that is readable when the script has ended
    client: socket.socket


def receive(client):
    """Return a Request, or None if the client was killed.

    A request is a line of JSON, sent along with the client's open files.
    """
    line, files, _, _ = socket.recv_fds(client, REQUEST_BYTES, MOST_FILES)
    while not line.endswith(b'\n'):
        more = client.recv(REQUEST_BYTES)
        if not more:
            for file in files:
                os.close(file)
            return None
        line += more
    fields = json.loads(line)
    numbers = fields.pop('files')
    return Request(**fields, files=dict(zip(numbers, files, strict=True)))


def send(client, line):
    """Send a line to a client. A client that was killed is not an error."""
    with contextlib.suppress(OSError):
        client.sendall(line)


def read_at_start(environment):
    """Return the variables of an environment that a fork cannot change."""
    return {key: value for key, value in environment.items() if key.startswith(READ_AT_START)}


def can_fork(request):
    """Return whether a fork behaves like a new process.

    This holds for a script, -m or -c, in the environment that the server was started in.
    """
    words = request.words
    if words[:1] == ['-u']:
        words = words[1:]
    if not words:   # Python would read a program from stdin
        return False
    known = words[0] in ('-c', '-m') or os.path.isfile(os.path.join(request.folder, words[0]))
    return known and read_at_start(request.environment) == read_at_start(os.environ)


def serve(listener):
    """Fork for each client until stdin is closed.

    Return a client's Request in each fork, and None in the server when the tests have ended.
    """
    forks = []
    while True:
        ended = [fork.ended for fork in forks]
        clients = [fork.client for fork in forks]
        ready, _, _ = select.select([0, listener, *ended, *clients], [], [])
        if 0 in ready:   # stdin is closed, so the tests have ended
            for fork in forks:
                # A fork leads a process group: the processes that it has started end with it.
                with contextlib.suppress(OSError):
                    os.killpg(fork.pid, signal.SIGKILL)
            return None
        for fork in [fork for fork in forks if fork.ended in ready]:
            _, status = os.waitpid(fork.pid, 0)
            send(fork.client, b'%d\n' % os.waitstatus_to_exitcode(status))
            forget(fork)
            forks.remove(fork)
        for fork in forks:
            if fork.client in ready:   # the client was killed
                os.kill(fork.pid, signal.SIGKILL)
        if listener not in ready:
            continue

        client, _ = listener.accept()
        request = receive(client)
        if request is None:
            client.close()
        elif can_fork(request):
            pid = os.fork()
            if pid == 0:
                for fork in forks:
                    forget(fork)
                client.close()
                listener.close()
                return request
            send(client, b'%d\n' % pid)
            forks.append(Fork(pid, os.pidfd_open(pid), client))
            close_files(request)
        else:
            send(client, b'start afresh\n')
            client.close()
            close_files(request)


def close_files(request):
    """Close the server's copies of a client's files."""
    for file in request.files.values():
        os.close(file)


def forget(fork):
    """Close the files that belong to a fork."""
    os.close(fork.ended)
    fork.client.close()


def become(request):
    """Take over a client's files, working folder and environment."""
    os.setsid()   # signals to the client's process group reach the fork only through the client
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.close(0)
    # Copy the files above every number that the client uses, then to the client's own numbers.
    free = max(request.files, default=0) + 1
    copies = {}
    for number, file in request.files.items():
        copies[number] = fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, free)
    close_files(request)
    for number, file in copies.items():
        os.dup2(file, number)
        os.close(file)
    # Restore Ctrl-C, even if the shell that started the tests ignores SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.environment)
    sys.executable = request.executable


def run(words):
    """Run `python WORDS`."""
    if words[0] == '-u':
        words = words[1:]
        encoding = sys.stdout.encoding
        line_by_line = 1
        sys.stdout = open(1, 'w', encoding=encoding, buffering=line_by_line, closefd=False)
    main = types.ModuleType('__main__')
    sys.modules['__main__'] = main
    if words[0] == '-m':
        sys.argv = words[1:]
        sys.path[0] = os.getcwd()
        runpy._run_module_as_main(words[1])   # the function that Python itself calls for -m
    elif words[0] == '-c':
        sys.argv = ['-c', *words[2:]]
        sys.path[0] = ''
        exec(words[1], main.__dict__)
    else:
        sys.argv = words
        main.__file__ = os.path.abspath(words[0])
        sys.path[0] = os.path.dirname(os.path.realpath(words[0]))
        with open(main.__file__, 'rb') as f:
            source = f.read()
        exec(compile(source, main.__file__, 'exec', dont_inherit=True), main.__dict__)


def exit_code(act):
    """Call act(). Return the exit code that Python would end with, as sys.exit describes it."""
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
    """End the process as Python does, except that torch's objects are not freed.

    Freeing them takes a third of a second.
    """
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except OSError:
            code = 120   # Python's own exit code for a stream that cannot be flushed
    os._exit(code & 0xff)


if __name__ == '__main__':
    for name in IMPORTS:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    # Forks write one pixel for each picture. Pictures are tested in pytest's own processes.
    with contextlib.suppress(KeyError):
        sys.modules['matplotlib.figure'].Figure.savefig = write_pixel
    gc.freeze()   # without this, garbage collection in a fork copies every page of the imports
    asked = serve(socket.socket(fileno=int(sys.argv[1])))
    if asked:
        become(asked)
        leave(exit_code(lambda: run(asked.words)))
