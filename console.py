"""
What the scripts say and write: progress, notes and errors on stderr, results on stdout.

A console can fail at any time: a reader such as `head` ends, a terminal is closed, the disk under
a log file fills up. That never stops training or saving: text that a broken stderr cannot take is
dropped. A result that stdout cannot take ends the script with exit code 2. Where the reader of
stdout has ended, the script ends without a word.
"""
import atexit
import os
import sys

READER_GONE = 128 + 13   # exit code of a program that SIGPIPE ends


def open_console():
    """Open files 0, 1 and 2 where they are closed, and let unwritten text not change the exit code.

    Where `2>&-` has closed stderr, the next file that is opened would get its number 2, and with it
    the messages of every library."""
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
    """Flush stdout and stderr, and drop what they cannot take. Python would exit with code 120."""
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
    """End the script for a user's mistake, with exit code 2 and one line on stderr.

    The line says what is wrong, what is allowed and what to type."""
    tell('error: ' + ' '.join(str(message).split()))
    raise SystemExit(2)


def write(text):
    """Write a command's result to stdout, unbuffered, in UTF-8.

    Surrogate escapes become the bytes they stand for."""
    if sys.stdout is None:
        fail('stdout is closed, and the result is written there; type > FILE behind the command')
    try:
        sys.stdout.flush()
        sys.stdout.buffer.write(text.encode('utf-8', 'surrogateescape'))
        sys.stdout.buffer.flush()
    except BrokenPipeError:   # `| head` has seen enough
        raise SystemExit(READER_GONE) from None
    except OSError as error:
        fail(f'stdout cannot be written ({error.strerror}); '
             f'type > FILE behind the command, on a disk with room')
