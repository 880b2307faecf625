"""
The client of fork_server.py: asks the server to run a script, and ends as the script ends.

    python -IS fork_client.py SOCKET COMMAND WORDS...     # runs `python WORDS...`

The script sees COMMAND as sys.executable. The client starts with -IS, which is the fastest way to
start Python, so it imports nothing but the standard library.
"""
import json
import os
import signal
import socket
import sys

KILL = signal.SIGUSR2   # forwarded as SIGKILL, because no process can catch SIGKILL itself
FORWARDED = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    KILL,
)


def open_files():
    """Return the numbers of this process's open files."""
    numbers = []
    for number in map(int, os.listdir('/proc/self/fd')):
        try:
            os.fstat(number)
            numbers.append(number)
        except OSError:
            pass   # this number belonged to the listing of the folder, now closed
    return numbers


signal.signal(signal.SIGINT, signal.SIG_DFL)
path, command, *words = sys.argv[1:]
files = open_files()
server = socket.socket(socket.AF_UNIX)
server.connect(path)
request = dict(
    executable=command,
    words=words,
    folder=os.getcwd(),
    environment=dict(os.environ),
    files=files,
)
line = json.dumps(request).encode() + b'\n'
sent = socket.send_fds(server, [line], files)
while sent < len(line):
    sent += server.send(line[sent:])

answers = server.makefile()
answer = answers.readline()
if answer == 'start afresh\n':
    os.execv(sys.executable, [sys.executable, *words])
pid = int(answer)


def forward(number, frame):
    """Send a signal on to the script."""
    try:
        os.kill(pid, signal.SIGKILL if number == KILL else number)
    except ProcessLookupError:
        pass   # the script has just ended


for number in FORWARDED:
    signal.signal(number, forward)
code = int(answers.readline())
if code < 0:   # a signal ended the script, and ends the client in the same way
    if code != -signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
