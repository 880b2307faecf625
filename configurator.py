"""
Override a script's knobs from config files and the command line.

A script assigns its knobs at module level, a comment beside each, and then calls `configure(globals())`:

    python train.py config/train_shakespeare_char.py --batch_size=32 --dtype float32 --eval_only

Config files are Python run with the knobs as their globals; flags are `--key=value`, `--key value`, or `--key` for
True. They apply from left to right, so the last one wins. `--help` lists the knobs.
"""
import ast
import difflib
import glob
import math
import os
import re
import signal
import sys
import tokenize
import types

PLAIN = (bool, int, float, str, type(None))


def fail(message):
    """End the script for a user's mistake: one line on stderr (what is wrong, what is allowed, what to type), exit 2."""
    print('error: ' + ' '.join(str(message).split()), file=sys.stderr, flush=True)
    raise SystemExit(2)


def exit_on_signals():
    """Let SIGINT and SIGTERM end the script as its own exit would, so that what is half-written is removed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))


def configure(knobs, resolve_device=None, argv=None, first=None):
    """Apply config files and flags to a script's globals, in place; returns ({name: value} of all knobs, the names given).

    resolve_device('auto') -> 'cpu' or the like: config files may branch on `device`, and so they see what it will be,
    a --device anywhere on the command line included. first: the knob that a first word without -- stands for."""
    names = {k: v for k, v in knobs.items() if not k.startswith('_') and isinstance(v, PLAIN)}   # with their defaults
    argv = list(sys.argv[1:] if argv is None else argv)
    if first and argv and not argv[0].startswith('-') and not argv[0].endswith('.py'):
        argv[0] = f'--{first}={argv[0]}'
    words = _words(argv, names)
    if words is None:
        _print_help(knobs, names)
        raise SystemExit(0)
    if resolve_device and any(key is None for key, _ in words):
        chosen = [text for key, text in words if key == 'device']
        knobs['device'] = resolve_device(chosen[-1] if chosen else knobs['device'])
    given = set()
    for key, text in words:
        if key is None:
            given |= _run_config(text, knobs, names)
        else:
            given.add(key)
            knobs[key] = checked(key, _parse(text, names[key]), names[key], f'--{key}={text}')
    if resolve_device:
        knobs['device'] = resolve_device(knobs['device'])
    return {k: knobs[k] for k in names}, given


def check(knobs, **rules):
    """Fails for a knob outside its rule: the least that a number may be, (least, most), or a tuple of the words allowed. None
    is always allowed, where a knob takes it."""
    for key, rule in rules.items():
        value = knobs[key]
        if isinstance(rule, tuple) and isinstance(rule[0], str):
            good, other = value in rule, next(filter(None, rule))
            allowed = ', '.join(word or "''" for word in rule)
        else:
            least, most = rule if isinstance(rule, tuple) else (rule, 2**63 - 1)
            good = value is None or type(value) in (int, float) and least <= value <= most
            other = min(max(least, 1), most)
            allowed = f'{least} to {most}' if most < 2**63 - 1 else f'{least} or more, below 2^63'
        if not good:
            fail(f'{key}={_shown(value)}: allowed are {allowed}; type --{key}={other}')


def _words(argv, names):
    """[(None, config file) or (knob, text)] in the order given; None when help is asked for."""
    words, rest = [], list(argv)
    while rest:
        word = rest.pop(0)
        if word in ('-h', '--help'):
            return None
        if not word.startswith('--'):
            words.append((None, _find_config(word)))
            continue
        key, given, text = word[2:].partition('=')
        if key not in names:
            fail(_unknown(f'--{key}', key, names))
        if not given:
            flag = isinstance(names[key], bool) or names[key] == 'auto'
            if rest and not rest[0].startswith('--') and not (flag and rest[0].endswith('.py')):
                text = rest.pop(0)
            elif flag:
                text = 'True'
            else:
                fail(f'--{key} has no value: it takes {_kind(names[key])}; type --{key}={names[key]}')
        words.append((key, text))
    return words


def _find_config(word):
    """A config file is looked for where it is named, then beside the script, so that any working folder will do."""
    for path in (word, os.path.join(os.path.dirname(os.path.abspath(sys.argv[0])), word)):
        if os.path.isfile(path):
            return path
    there = glob.glob(os.path.join(os.path.dirname(os.path.abspath(sys.argv[0])), 'config', '*.py'))
    near = difflib.get_close_matches(word, [f'config/{os.path.basename(path)}' for path in there], n=1)
    fail(f'{word!r} is neither a config file nor a flag: flags are --key=value; ' +
         (f'did you mean {near[0]}?' if near else 'type --help for the list'))


class _Scope(dict):
    """Globals that remember which names were assigned."""

    def __init__(self, names):
        super().__init__(names)
        self.assigned = set()

    def __setitem__(self, name, value):
        self.assigned.add(name)
        super().__setitem__(name, value)


def _run_config(path, knobs, names):
    """Run a config file with the knobs as its globals and take over what it assigned; returns those names."""
    scope = _Scope({**{k: knobs[k] for k in names}, '__name__': '__config__', '__file__': path})
    try:
        with open(path, encoding='utf-8-sig') as f:   # editors on Windows begin a file with a mark
            exec(compile(f.read(), path, 'exec'), scope)
    except (Exception, SystemExit) as error:   # whatever a user's file does wrong; its line is all they need
        frames, tb = [], error.__traceback__
        while tb:
            frames.append(tb)
            tb = tb.tb_next
        line = getattr(error, 'lineno', None) or next(
            (t.tb_lineno for t in reversed(frames) if t.tb_frame.f_code.co_filename == path), 1)
        fail(f'{path}, line {line}: {type(error).__name__}: {error}; a config file is Python that assigns knobs')
    for key, value in scope.items():
        if key.startswith('_') or isinstance(value, types.ModuleType):
            continue
        if key not in names:
            fail(_unknown(f'{path}: {key}', key, names) + ' (names of its own start with _)')
        knobs[key] = checked(key, value, names[key], f'{path}: {key}={_shown(value)}')
    return scope.assigned & names.keys()


def _parse(text, default):
    """The value a flag's text stands for: a string knob takes it as it is, any other a Python literal."""
    if isinstance(default, str) and default != 'auto':
        return text
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text
    return value if isinstance(value, PLAIN) or default is not None else text


def checked(key, value, default, where):
    """value, as the type of the knob's default; fails for another type. 'auto' and None leave it to the script."""
    if isinstance(value, float) and not math.isfinite(value):
        fail(f'{where}: not a finite number; type --{key}={default}')
    if type(value) is int and not -2**63 <= value < 2**63:
        fail(f'{where}: too large, 64 bits are what there is; type --{key}={default}')
    if type(default) is float and type(value) is int:
        return float(value)
    if type(value) is type(default) or default is None and isinstance(value, PLAIN):
        return value
    if default == 'auto' and isinstance(value, (bool, int, float, str)):
        return value
    fail(f'{where}: wrong type, {key} takes {_kind(default)}; type --{key}={default!r}')


def _shown(value):
    """A value in an error's line, whatever its size."""
    try:
        return repr(value)[:200]
    except ValueError:   # Python does not write out the largest numbers
        return f'a huge {type(value).__name__}'


def _kind(default):
    if default == 'auto' or default is None:
        return f'{default} or a value'
    return {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'a text'}[type(default)]


def _unknown(what, key, names):
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    return f'{what} is not a knob of this script' + (
        f'; did you mean --{near[0]}?' if near else '; type --help for the list')


def _print_help(knobs, names):
    """The script's docstring, then each knob with its default and the comment beside its assignment."""
    path = knobs.get('__file__')
    comments, lines = {}, {}
    if path:
        with tokenize.open(path) as f:
            comments = {t.start[0]: t.string.lstrip('# ') for t in tokenize.generate_tokens(f.readline)
                        if t.type == tokenize.COMMENT}
        with tokenize.open(path) as f:
            for node in ast.parse(f.read()).body:
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    lines.setdefault(node.targets[0].id, node.end_lineno)   # the first assignment is the knob's
    print((knobs.get('__doc__') or '').strip() + '\n\nknobs, as --name=value:')
    width = max(map(len, names))
    for name, default in names.items():
        print(re.sub(r'\s+$', '', f'  {name:{width}} {default!r:>14}  {comments.get(lines.get(name), "")}'))
