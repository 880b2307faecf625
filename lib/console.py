"""
The console: progress, notes and errors go to stderr, results to stdout, prompts come from stdin.

A console can fail at any time: a reader such as `head` ends, a terminal is closed, the disk under
a log file fills up. That never stops training or saving: text that a broken stderr cannot take is
dropped. A result that stdout cannot take ends the script with exit code 2. Where the reader of
stdout has ended, the script ends without a word.
"""
import atexit
import contextlib
import io
import os
import signal
import sys
import time

READER_GONE = 128 + 13   # exit code of a program that SIGPIPE ends


def open_console():
    """Open files 0, 1 and 2 where they are closed, and flush stdout and stderr at the end.

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
    if os.environ.get('LOCAL_RANK', '0') != '0':
        _wait_for_first_rank()
    tell('error: ' + ' '.join(str(message).split()))
    raise SystemExit(2)


def _wait_for_first_rank():
    """Give a machine's first rank the time to fail for the same reason.

    torchrun then ends this rank by SIGTERM, and the error is usually printed once. A mistake that
    only this rank meets is printed late."""
    with contextlib.suppress(ValueError):   # this is not the main thread
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(2)


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


def counted(number, noun):
    """Return '1 line' or '2 lines'."""
    return f'{number:,} {noun}' if number == 1 else f'{number:,} {noun}s'


def as_typed(text):
    """Return a word of the command line as the text that was typed.

    In a locale of ASCII, Python hands each byte of a character above 127 on as half of a surrogate
    pair. Text that was not typed in UTF-8 is returned as it is."""
    try:
        return text.encode('utf-8', 'surrogateescape').decode('utf-8', 'surrogateescape')
    except UnicodeEncodeError:   # other halves of pairs, from a config file or from Windows
        return text


def read_prompt(start, longest=1 << 24):
    """Return the text that a knob `start` stands for: itself, FILE:path, or - for standard input.

    Line ends stay as they are. Fails for more than `longest` characters."""
    if start == '-' and sys.stdin is None:
        fail('--start=- reads standard input, and there is none; '
             'type --start=TEXT or --start=FILE:path')
    try:
        if start == '-':
            text = _read_stdin(longest + 1)
        elif start.startswith('FILE:'):
            path = os.path.expanduser(start.removeprefix('FILE:'))
            # utf-8-sig skips the mark with which editors on Windows begin a file
            with open(path, encoding='utf-8-sig', newline='') as f:
                text = f.read(longest + 1)
        else:
            text = as_typed(start)
    except OSError as error:
        fail(f'--start={start} cannot be read ({error.strerror or error}); FILE: takes the path of '
             f'a text file; type --start=FILE:path, or --start=TEXT')
    except UnicodeDecodeError as error:
        fail(f'--start={start} is not UTF-8 (byte {error.start:,}); '
             f'FILE: and - take text in UTF-8; type --start=TEXT')
    if len(text) > longest:
        fail(f'--start: a prompt of more than {longest:,} characters, far more than a model sees; '
             f'type --start=FILE:path for a shorter one')
    return text


def _read_stdin(longest):
    """Return at most `longest` characters of standard input, which is UTF-8 in any locale."""
    if not hasattr(sys.stdin, 'buffer'):   # replaced by a stream of text
        return sys.stdin.read(longest).removeprefix('\ufeff')
    decoded = io.TextIOWrapper(sys.stdin.buffer, encoding='utf-8-sig', newline='')
    try:
        return decoded.read(longest)
    finally:
        decoded.detach()   # collecting `decoded` would close standard input
