"""
What the scripts say and write: progress, notes and errors on stderr, results on stdout.

A console can fail at any time: a reader such as `head` ends, a terminal is closed, the disk that holds a log file fills up.
That never stops training or saving: what a broken stderr cannot take is dropped. A result that stdout cannot take ends the
script with exit code 2, and quietly where its reader has seen enough.
"""
import atexit
import os
import sys

READER_GONE = 128 + 13   # exit code of a program that SIGPIPE ends


def open_console():
    """Make sure that numbers 0 to 2 are open files, and that unwritten text cannot change the exit code at the end.

    Where `2>&-` has closed stderr, the next file opened would get its number, and with it the messages of every library."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
    if sys.stderr is None:   # tqdm and others would write to it
        sys.stderr = open(os.devnull, 'w', encoding='utf-8')
    atexit.unregister(settle)
    atexit.register(settle)


def settle():
    """Flush stdout and stderr; drop what they cannot take. Python would end with exit code 120 for it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream:
                stream.flush()
        except ValueError:   # it is closed
            pass
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def tell(*words):
    """Print words on stderr, as far as that can be written."""
    try:
        print(*words, file=sys.stderr, flush=True)
    except (OSError, ValueError):   # ValueError: it is closed
        pass


def say(*words):
    """Print progress or a note on stderr, from rank 0 alone."""
    if os.environ.get('RANK', '0') == '0':
        tell(*words)


def fail(message):
    """End the script for a user's mistake: one line on stderr (what is wrong, what is allowed, what to type), exit code 2."""
    tell('error: ' + ' '.join(str(message).split()))
    raise SystemExit(2)


def write(text):
    """Write a command's result to stdout as UTF-8, unbuffered; undecodable bytes pass through unchanged."""
    if sys.stdout is None:
        fail('stdout is closed, and the result is written there; type > FILE behind the command')
    try:
        sys.stdout.flush()
        sys.stdout.buffer.write(text.encode('utf-8', 'surrogateescape'))
        sys.stdout.buffer.flush()
    except BrokenPipeError:   # `| head` has seen enough
        raise SystemExit(READER_GONE) from None
    except OSError as error:
        fail(f'stdout cannot be written ({error.strerror}); type > FILE behind the command, on a disk with room')
