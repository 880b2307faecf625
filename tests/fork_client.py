"""
The client of fork_server.py: ends as the script ends that the server runs for it.

    python -IS fork_client.py SOCKET COMMAND WORDS...      # as `python WORDS...`; COMMAND: what scripts take for Python
"""
import json
import os
import signal
import socket
import sys

KILL = signal.SIGUSR2   # stands for SIGKILL, which cannot be passed on
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, KILL)


def open_files():
    """Return the numbers of the files that this process was given."""
    numbers = []
    for number in map(int, os.listdir('/proc/self/fd')):
        try:
            os.fstat(number)
            numbers.append(number)
        except OSError:
            pass   # it was the list itself
    return numbers


signal.signal(signal.SIGINT, signal.SIG_DFL)
path, command, *words = sys.argv[1:]
files = open_files()
server = socket.socket(socket.AF_UNIX)
server.connect(path)
asked = dict(executable=command, words=words, folder=os.getcwd(), environment=dict(os.environ), files=files)
line = json.dumps(asked).encode() + b'\n'
sent = socket.send_fds(server, [line], files)
while sent < len(line):
    sent += server.send(line[sent:])

answers = server.makefile()
answer = answers.readline()
if answer == 'start afresh\n':
    os.execv(sys.executable, [sys.executable, *words])
pid = int(answer)


def forward(number, frame):
    try:
        os.kill(pid, signal.SIGKILL if number == KILL else number)
    except ProcessLookupError:
        pass   # it has just ended


for number in FORWARDED:
    signal.signal(number, forward)
code = int(answers.readline())
if code < 0:
    if code != -signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
