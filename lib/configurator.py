"""
Override a script's knobs from config files and the command line.

A script assigns its knobs at module level, a comment beside each, and then calls
`configure(globals())`:

    python train.py config/train_shakespeare_char.py --batch_size=32 --dtype float32 --eval_only

Config files are Python run with the knobs as their globals. Flags are `--key=value`, `--key value`,
or `--key` for True. They apply from left to right, so the last one wins. A config file also sees
the flags that follow it. `--help` lists the knobs.
"""
import ast
import difflib
import glob
import math
import os
import shlex
import signal
import sys
import tokenize
import traceback

from lib.console import fail, open_console, say, write

PLAIN = (bool, int, float, str, type(None))
# Knobs that name a file or a folder. Shells do not expand the ~ in --key=~/file.
PATHS = ('checkpoint', 'data_dir', 'init_from', 'input', 'json', 'out_dir', 'plot', 'results', 'to',
         'val_input')
# words that other programs use, and the knobs that mean the same here
OTHER_WORDS = {
    'resume': 'init_from=resume', 'model': 'init_from', 'output': 'out_dir',
    'epochs': 'max_iters', 'steps': 'max_iters', 'iters': 'max_iters', 'max_steps': 'max_iters',
    'context': 'block_size', 'context_length': 'block_size', 'seq_len': 'block_size',
    'layers': 'n_layer', 'heads': 'n_head', 'd_model': 'n_embd', 'hidden_size': 'n_embd',
    'prompt': 'start', 'length': 'max_new_tokens', 'accum': 'gradient_accumulation_steps'}


_defaults = {}   # {knob: its default} of the running script, which check's errors suggest


def exit_on_signals():
    """Let SIGINT, SIGTERM and SIGHUP end the script as sys.exit does, so that it can clean up."""
    for number in ending_signals():
        signal.signal(number, lambda number, frame: sys.exit(128 + number))


def ending_signals():
    """Return the signals of Ctrl-C, of `kill` and, unless nohup hides it, of a closed terminal."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, 'SIGHUP') and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return numbers


def configure(knobs, resolve_device=None, argv=None, first=None, configs=True):
    """Apply config files and flags to a script's globals, in place.

    Return ({name: value} of all knobs, the names typed or assigned by a config).
    Config files may compute from knobs and branch on them, so they see the flags that come after
    them, too. Those flags then override what the config assigned.
    resolve_device('auto') -> 'cpu' or the like. Config files see the resolved device.
    first: the knob that one bare word, without --, stands for.
    configs: whether words that end in .py are config files."""
    open_console()
    names = {}   # with their defaults
    for name, value in knobs.items():
        if not name.startswith('_') and isinstance(value, PLAIN):
            names[name] = value
    _defaults.clear()
    _defaults.update(names)
    words = _words(list(sys.argv[1:] if argv is None else argv), names, first, configs)
    if words is None:
        write(_help(knobs, names))
        raise SystemExit(0)
    if resolve_device and any(key is None for key, _ in words):
        chosen = [text for key, text in words if key == 'device']
        knobs['device'] = resolve_device(chosen[-1] if chosen else knobs['device'])
    given = set()
    for position, (key, text) in enumerate(words):
        if key is None:
            typed = {name: knobs[name] for name in given}
            later = _values(words[position + 1:], names)
            given |= _run_config(text, knobs, names, later)
            for name, value in typed.items():
                if knobs[name] != value and name not in later:
                    say(f'note: {text} comes after --{name}={value} and sets it to '
                        f'{knobs[name]!r}: the last one wins')
        else:
            given.add(key)
            knobs[key] = _value(key, text, names)
    if resolve_device:
        knobs['device'] = resolve_device(knobs['device'])
    return {name: knobs[name] for name in names}, given


def check(knobs, **rules):
    """Fail for a knob outside its rule.

    A rule is the least that a number may be, (least, most), or a tuple of the words allowed.
    None is always allowed, where a knob takes it."""
    for key, rule in rules.items():
        value = knobs[key]
        if isinstance(rule, tuple) and isinstance(rule[0], str):
            good, other = value in rule, next(filter(None, rule))
            allowed = ', '.join(word or "''" for word in rule)
        else:
            least, most = rule if isinstance(rule, tuple) else (rule, 2**63 - 1)
            good = _is_within(value, least, most)
            other = _defaults.get(key, least)
            if not _is_within(other, least, most):
                other = least
            allowed = f'{least} to {most}' if most < 2**63 - 1 else f'{least} or more, below 2^63'
        if not good:
            fail(f'{key}={_shown(value)}: allowed are {allowed}; type --{key}={other}')


def _is_within(value, least, most):
    """Return whether a value is None or a number in a range, its ends included."""
    return value is None or type(value) in (int, float) and least <= value <= most


def _words(argv, names, first, configs):
    """Return [(None, config file) or (knob, text)] in the order typed; None for --help."""
    words = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word in ('-h', '--help'):
            return None
        if not word.startswith('--'):
            before = [key for key, _ in words]
            if configs and word.endswith('.py'):
                words.append((None, _find_config(word)))
            elif first and first not in before and (word == '-' or not word.startswith('-')):
                words.append((first, word))
            else:
                fail(_bare(word, names, first, before))
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
                fail(f'--{key} has no value: it takes {_kind(names[key])}; '
                     f'type --{key}={names[key]}')
        words.append((key, text))
    return words


def _bare(word, names, first, before):
    """Return the error for a word that is neither a flag nor a config file, with a guess."""
    key, _, value = word.lstrip('-').partition('=')
    there = os.path.exists(word)
    if key in names:
        meant = f'--{key}={value or names[key]}'
    elif word in OTHER_WORDS and OTHER_WORDS[word].partition('=')[0] in names:
        meant = f'--{OTHER_WORDS[word]}'
    elif first and first in before:
        pattern = os.path.join(os.path.dirname(word), '*' + os.path.splitext(word)[1])
        meant = f'--{first} once'
        if there:
            meant = f'--{first}="{pattern}", in quotes, for several files'
    elif 'checkpoint' in names and word.endswith('.pt'):
        meant = f'--checkpoint={word}'
    elif 'out_dir' in names and glob.glob(os.path.join(glob.escape(word), '*.pt')):
        meant = f'--out_dir={word}'
    elif 'start' in names and not word.startswith('-'):
        meant = f'--start=FILE:{word}' if there else f'--start={shlex.quote(word)}'
    else:
        near = difflib.get_close_matches(word, [f'config/{name}' for name in _configs()], n=1)
        meant = near[0] if near else '--help for the list'
    allowed = 'flags are --key=value, config files end in .py'
    if first:
        allowed = f'flags are --key=value, and one word alone is the {first}'
    return f'{word!r} is neither a flag nor a config file: {allowed}; type {meant}'


def _configs():
    """Return the names of the config files beside the script."""
    paths = glob.glob(os.path.join(glob.escape(_home()), 'config', '*.py'))
    return [os.path.basename(path) for path in paths]


def _home():
    """Return the script's folder."""
    return os.path.dirname(os.path.abspath(sys.argv[0]))


def _find_config(word):
    """Return the path of a config file: in the working folder, or else beside the script."""
    for path in (word, os.path.join(_home(), word)):
        if os.path.isfile(path):
            return path
    near = difflib.get_close_matches(word, [f'config/{name}' for name in _configs()], n=1)
    advice = near[0] if near else '--help for the list of flags'
    fail(f'there is no config file {word!r}; type {advice}')


class _Scope(dict):
    """Globals that remember which names were assigned."""

    def __init__(self, names):
        super().__init__(names)
        self.assigned = set()

    def __setitem__(self, name, value):
        self.assigned.add(name)
        super().__setitem__(name, value)


def _run_config(path, knobs, names, later):
    """Run a config file with the knobs as its globals; return the names of those it assigns.

    later: {knob: value} of the flags that come after the file. The file sees these values."""
    seen = {name: knobs[name] for name in names} | later
    scope = _Scope(seen)
    scope.update(__name__='__config__', __file__=path)
    try:
        with open(path, encoding='utf-8-sig') as f:   # editors on Windows begin a file with a mark
            tree = ast.parse(f.read(), path)
        _check_statements(tree)
        exec(compile(tree, path, 'exec'), scope)
    except (Exception, SystemExit) as error:   # a user's file can do anything wrong
        line = 1
        for frame in traceback.extract_tb(error.__traceback__):
            if frame.filename == path:
                line = frame.lineno
        line = getattr(error, 'lineno', None) or line
        what = error.msg if isinstance(error, SyntaxError) else error
        fail(f'{path}, line {line}: {type(error).__name__}: {what}; '
             f'a config file is Python that assigns knobs')
    for key, value in scope.items():
        changed = key in scope.assigned or value is not seen.get(key)
        if key in names and changed:
            value = _plain(value)
            knobs[key] = checked(key, value, names[key], f'{path}: {key}={_shown(value)}')
    for key in _assigned(tree):
        own = key.startswith('_') or not isinstance(_plain(scope.get(key)), PLAIN)
        if key not in names and not own:
            fail(_unknown(f'{path}: {key}', key, names) + ' (names of its own start with _)')
    return scope.assigned & names.keys()


def _check_statements(tree):
    """Raise SyntaxError for a script, and for a name with a colon, which would assign nothing."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'configure':
            raise SyntaxError('it is a script, not a config')
        if isinstance(node, ast.AnnAssign) and node.value is None:
            name = ast.unparse(node.target)
            error = SyntaxError(f'{name} with a colon gets no value; type {name} = ...')
            error.lineno = node.lineno
            raise error


def _assigned(tree):
    """Return the names that a module assigns with =, without those of loops and imports."""
    found = []
    nodes = [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            continue
        nodes.extend(ast.iter_child_nodes(node))
        targets = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, (ast.AnnAssign, ast.AugAssign, ast.NamedExpr)):
            targets = [node.target]
        for target in targets:
            for part in ast.walk(target):
                if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                    found.append(part.id)
    return found


def _plain(value):
    """Return NumPy's and torch's single numbers as Python's, a path as text, all else unchanged."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if getattr(value, 'ndim', None) == 0 and hasattr(value, 'item'):
        return value.item()
    return value


def _values(words, names):
    """Return {knob: value} of the flags among words, but for the device, which is resolved."""
    return {key: _value(key, text, names) for key, text in words if key not in (None, 'device')}


def _value(key, text, names):
    """Return the value of the flag --key=text; fail for one of a wrong type."""
    return checked(key, _parse(text, names[key]), names[key], f'--{key}={text}')


def _parse(text, default):
    """Return the value of a flag's text.

    A knob that is a string takes the text unchanged, any other knob takes a Python literal."""
    if isinstance(default, str) and default != 'auto':
        return text
    if isinstance(default, bool) or default == 'auto':
        if text.strip() in ('true', 'false'):
            return text.strip() == 'true'
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text
    return value if isinstance(value, PLAIN) or default is not None else text


def checked(key, value, default, where):
    """Return value as the type of the knob's default; fail for another type.

    A default of 'auto' or None takes any plain value, which the script itself checks."""
    if isinstance(value, float) and not math.isfinite(value):
        fail(f'{where}: not a finite number; type --{key}={default}')
    if type(default) is int and type(value) is float and value.is_integer():   # 1e3
        value = int(value)
    if type(value) is int and not -2**63 <= value < 2**63:
        fail(f'{where}: too large, 64 bits are what there is; type --{key}={default}')
    if type(default) is float and type(value) is int:
        return float(value)
    if key in PATHS and isinstance(value, str) and value.startswith('~'):
        return os.path.expanduser(value)
    if type(value) is type(default) or default is None and isinstance(value, PLAIN):
        return value
    if default == 'auto' and isinstance(value, (bool, int, float, str)):
        return value
    fail(f'{where}: wrong type, {key} takes {_kind(default)}; type --{key}={default!r}')


def _shown(value):
    """Return a value as an error's line shows it, whatever its size."""
    try:
        return repr(value)[:200]
    except ValueError:   # Python does not write out the largest numbers
        return f'a huge {type(value).__name__}'


def _kind(default):
    """Return in words which values a knob with this default takes."""
    if default == 'auto' or default is None:
        return f'{default} or a value'
    words = {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'a text'}
    return words[type(default)]


def _unknown(what, key, names):
    """Return the error for a name that is not a knob, with the knob that was probably meant."""
    near = _nearest(key, names)
    advice = f'did you mean --{near}?' if near else 'type --help for the list'
    return f'{what} is not a knob of this script; {advice}'


def _nearest(key, names):
    """Return the knob meant by another program's word, by initials or by a misspelling, or None."""
    other = OTHER_WORDS.get(key, '')
    if other.partition('=')[0] in names:
        return other
    for name in names:
        if key == ''.join(part[:1] for part in name.split('_')):   # lr, wd, bs
            return name
    return next(iter(difflib.get_close_matches(key, names, n=1, cutoff=0.5)), None)


def _help(knobs, names):
    """Return the script's docstring, then each knob with its default and its comment."""
    path = knobs.get('__file__')
    comments = {}   # line: its comment
    lines = {}      # knob: the line that assigns it first
    if path:
        with tokenize.open(path) as f:
            for token in tokenize.generate_tokens(f.readline):
                if token.type == tokenize.COMMENT:
                    comments[token.start[0]] = token.string.lstrip('# ')
        with tokenize.open(path) as f:
            for node in ast.parse(f.read()).body:
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    lines.setdefault(node.targets[0].id, node.end_lineno)
    text = [(knobs.get('__doc__') or '').strip(), '', 'knobs, as --name=value:']
    width = max(map(len, names))
    for name, default in names.items():
        comment = comments.get(lines.get(name), '')
        text.append(f'  {name:{width}} {default!r:>14}  {comment}'.rstrip())
    return '\n'.join(text) + '\n'
