"""configurator.py: overriding globals. pytest tests/test_configurator.py"""
import os

import pytest

from lib.configurator import check, configure

KNOBS = dict(
    learning_rate=1e-3,
    max_iters=10,
    name='x',
    flag=False,
    device='auto',
    compile='auto',
    top_k=None,
    _private=1,
    min_lr=0.0,
    batch_size=1,
    init_from='scratch',
    out_dir='out',
    start='',
    checkpoint='',
)
WRITES_A_FILE = 'open("ran", "w")'   # a file named ran shows that a file was run as Python


def overridden(*argv, resolve=None):
    """Return the knobs after a command line has overridden them."""
    knobs = dict(KNOBS)
    configure(knobs, resolve, list(argv))
    return knobs


def config(folder, text, name='c.py'):
    """Write a config file. Return its name."""
    (folder / name).write_text(text)
    return name


def error_of(capsys, act):
    """Return the one line of error with which act() ends; the exit code must be 2."""
    with pytest.raises(SystemExit) as stop:
        act()
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith('error: ')
    assert error.count('\n') == 1
    return error


# ---- the command line --------------------------------------------------------------------------

@pytest.mark.parametrize('argv, name, value', [
    (['--max_iters=5'], 'max_iters', 5),
    (['--max_iters', '5'], 'max_iters', 5),
    (['--max_iters=1', '--max_iters=2'], 'max_iters', 2),
    (['--max_iters=1e3'], 'max_iters', 1000),
    (['--max_iters', '-2.0'], 'max_iters', -2),
    (['--learning_rate=1'], 'learning_rate', 1.0),
    (['--learning_rate', '-1e-2'], 'learning_rate', -0.01),
    (['--name=123'], 'name', '123'),
    (['--name=a=b'], 'name', 'a=b'),
    (['--name='], 'name', ''),
    (['--name=None'], 'name', 'None'),
    (['--name=true'], 'name', 'true'),
    (['--name', '-'], 'name', '-'),
    (['--name=--x'], 'name', '--x'),
    (['--flag'], 'flag', True),
    (['--flag=True'], 'flag', True),
    (['--flag=true'], 'flag', True),
    (['--flag', 'False'], 'flag', False),
    (['--flag', 'false'], 'flag', False),
    (['--flag', '--max_iters=3'], 'flag', True),
    (['--compile'], 'compile', True),
    (['--compile=False'], 'compile', False),
    (['--compile=false'], 'compile', False),
    (['--compile=auto'], 'compile', 'auto'),
    (['--device=cuda:1'], 'device', 'cuda:1'),
    (['--top_k=5'], 'top_k', 5),
    (['--top_k=None'], 'top_k', None),
])
def test_flags(argv, name, value):
    got = overridden(*argv)[name]
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize('argv, words', [
    (['--learning_rte=1'], ['learning_rte', '--learning_rate']),
    (['--learning_rate=nan'], ['number']),
    (['--learning_rate=1e999'], ['finite']),
    (['--learning_rate=' + '9' * 400], ['large']),
    (['--max_iters=1.5'], ['max_iters', 'whole number']),
    (['--max_iters=True'], ['whole number']),
    (['--max_iters=abc'], ['whole number']),
    (['--max_iters=None'], ['whole number']),
    (['--max_iters=1e30'], ['large']),
    (['--max_iters=' + '(' * 300], ['whole number']),
    (['--flag=1'], ['True or False']),
    (['--name'], ['no value']),
    (['--_private=2'], ['_private']),
    (['--lr=1'], ['--learning_rate?']),
    (['--resume'], ['--init_from=resume?']),
    (['--epochs=3'], ['--max_iters?']),
    (['--bs=3'], ['--batch_size?']),
    (['--=1'], ['not a knob']),
    (['-x'], ['-x']),
    (['nope.py'], ['nope.py', '--help']),
])
def test_mistakes(argv, words, capsys):
    error = error_of(capsys, lambda: overridden(*argv))
    for word in words:
        assert word in error


@pytest.mark.parametrize('flag, rule, allowed, typed', [
    ('--learning_rate=-1', 0, '0 or more', '--learning_rate=0.0006'),
    ('--max_iters=0', 1, '1 or more', '--max_iters=600000'),
    ('--dropout=2', (0, 1), '0 to 1', '--dropout=0.0'),
    ('--dropout=0', (0.5, 1), '0.5 to 1', '--dropout=0.5'),   # the default is not allowed either
    ('--lr_decay_iters=-1', 0, '0 or more', '--lr_decay_iters=None'),
])
def test_the_default_is_advised_for_a_number_out_of_range(flag, rule, allowed, typed, capsys):
    knobs = dict(learning_rate=6e-4, max_iters=600000, dropout=0.0, lr_decay_iters=None)
    configure(knobs, argv=[flag])
    key = flag[2:].partition('=')[0]
    error = error_of(capsys, lambda: check(knobs, **{key: rule}))
    assert f'allowed are {allowed}' in error
    assert error.endswith(f'; type {typed}\n'), error


@pytest.mark.parametrize('word, typed', [
    ('prompt.txt', '--start=FILE:prompt.txt'),
    ('Hello there', "--start='Hello there'"),
    ('out/best.pt', '--checkpoint=out/best.pt'),
    ('out', '--out_dir=out'),
    ('batch_size=3', '--batch_size=3'),
    ('-batch_size=3', '--batch_size=3'),
    ('resume', '--init_from=resume'),
])
def test_only_py_files_are_run(folder, word, typed, capsys):
    """A file that does not end in .py is never run as Python; the error says what to type."""
    os.mkdir('out')
    for path in ('prompt.txt', 'out/best.pt'):
        (folder / path).write_text(WRITES_A_FILE)
    path = config(folder, 'max_iters = 1')
    error = error_of(capsys, lambda: overridden(path, word))
    assert error.endswith(f'type {typed}\n'), error
    assert not os.path.exists('ran')


@pytest.mark.parametrize('argv, words', [
    (['a.py', 'b.py', 'c.py'], ['"*.py"', 'quotes']),
    (['--name', 'a.py', 'b.py'], ['"*.py"']),
    (['a.py', 'nowhere'], ['nowhere']),
])
def test_scripts_without_configs_run_no_file(folder, argv, words, capsys):
    """One bare word is the first knob, even if it ends in .py. More words are an error."""
    for path in ('a.py', 'b.py', 'c.py'):
        (folder / path).write_text(WRITES_A_FILE)
    knobs = dict(KNOBS)
    configure(knobs, None, ['--flag', 'a.py', '--max_iters=3'], first='name', configs=False)
    assert knobs['name'] == 'a.py'
    error = error_of(
        capsys,
        lambda: configure(knobs, None, argv, first='name', configs=False),
    )
    for word in words:
        assert word in error
    assert not os.path.exists('ran')


def test_a_tilde_is_the_home_folder_in_paths_alone(folder, monkeypatch):
    """Shells do not expand ~ behind --key=. A text such as a prompt stays as it is."""
    monkeypatch.setenv('HOME', '/home/me')
    monkeypatch.setenv('USERPROFILE', '/home/me')
    path = config(folder, "checkpoint = '~/b.pt'\nname = '~/c'")
    knobs = overridden('--out_dir=~/runs/a', path, '--start=~/d')
    assert knobs['out_dir'] == '/home/me/runs/a'
    assert knobs['checkpoint'] == '/home/me/b.pt'
    assert knobs['name'] == '~/c'
    assert knobs['start'] == '~/d'


# ---- config files ------------------------------------------------------------------------------

NANOGPTS_STYLE = '''\
import time
name = 'ft-' + str(time.time())
learning_rate = 1
max_iters = 2 * max_iters
compile = False
_mine = [n for n in range(max_iters)]
flag = len(_mine) == 20
'''

COMPUTES = '''\
import numpy as np
from pathlib import Path
from math import pi, sqrt
def rate(n):
    half = n / 2
    return half
class Sizes:
    wide = 3
table = {'a': 1}
for i, j in enumerate([4, 5]):
    max_iters = i + j
learning_rate = np.float32(0.5) * rate(2)
top_k = np.int64(7)
flag = np.bool_(True)
batch_size = np.float64(8)
out_dir = Path('a') / 'b'
with open(__file__) as f:
    name = f.read(6)
compile = [x for x in (True, False)][1]
'''


def test_a_config_written_for_nanogpt_works(folder):
    """`import time`, computed values, a bool for an 'auto' knob, an int for a float."""
    knobs = overridden(config(folder, NANOGPTS_STYLE))
    assert knobs['name'].startswith('ft-1')
    assert knobs['learning_rate'] == 1.0
    assert knobs['max_iters'] == 20
    assert knobs['compile'] is False
    assert knobs['flag'] is True
    assert knobs['_private'] == 1
    assert 'time' not in knobs


def test_a_config_may_compute(folder):
    """Functions, classes, imports, loop variables, lists and NumPy's numbers are allowed."""
    knobs = overridden(config(folder, COMPUTES))
    expected = dict(
        learning_rate=0.5,
        max_iters=6,
        top_k=7,
        flag=True,
        batch_size=8,
        out_dir=os.path.join('a', 'b'),
        name='import',
        compile=False,
    )
    for name, value in expected.items():
        assert knobs[name] == value
        assert type(knobs[name]) is type(value)


def test_the_last_one_wins(folder, capsys):
    path = config(folder, 'max_iters = 7')
    assert overridden('--max_iters=3', path)['max_iters'] == 7
    assert 'note: c.py comes after --max_iters=3 and sets it to 7' in capsys.readouterr().err
    assert overridden('--max_iters=7', path)['max_iters'] == 7
    assert capsys.readouterr().err == ''
    assert overridden(path, '--max_iters=3')['max_iters'] == 3


@pytest.mark.parametrize('argv, seen', [
    ([], 'cpu'),
    (['--device=cuda'], 'cuda'),
    (['--device', 'auto'], 'cpu'),
])
def test_a_config_sees_the_resolved_device(folder, argv, seen):
    def resolve(name):
        return 'cpu' if name == 'auto' else name

    path = config(folder, "name = device\nif device == 'cpu':\n    max_iters = 99")
    knobs = overridden(path, *argv, resolve=resolve)
    assert knobs['name'] == seen
    assert knobs['device'] == seen
    assert (knobs['max_iters'] == 99) == (seen == 'cpu')


def test_a_config_sees_flags_on_both_sides_of_it(folder, capsys):
    path = config(folder, 'max_iters = max_iters or 10\nout_dir = f"out-{name}-{max_iters}"')
    before = overridden('--name=mine', '--max_iters=3', path)
    behind = overridden(path, '--max_iters=3', '--name', 'mine')
    assert before == behind
    assert (behind['out_dir'], behind['max_iters']) == ('out-mine-3', 3)
    knobs = overridden('--max_iters=4', path, '--max_iters=0')   # the last one wins
    assert (knobs['out_dir'], knobs['max_iters']) == ('out-x-10', 0)
    assert overridden(path, '--name=a', '--name=b')['out_dir'] == 'out-b-10'
    assert 'note' not in capsys.readouterr().err   # the config did not win
    overridden('--max_iters=4', config(folder, 'max_iters = 10', 'ten.py'))
    assert 'note: ten.py comes after --max_iters=4 and sets it to 10' in capsys.readouterr().err
    config(folder, 'pass', 'other.py')
    assert overridden(path, 'other.py', '--name=c')['out_dir'] == 'out-c-10'
    assert overridden('--name=a', 'other.py', '--name=b')['name'] == 'b'
    assert capsys.readouterr().err == ''   # other.py assigns nothing


def test_the_names_given_are_returned(folder):
    path = config(folder, 'max_iters = 10\nif flag:\n    name = "y"')
    _, given = configure(dict(KNOBS), None, [path, '--top_k=2'])
    assert given == {'max_iters', 'top_k'}


@pytest.mark.parametrize('text, words', [
    ('learning_rte = 1', ['learning_rte', '--learning_rate']),
    ('import numpy\nlr = numpy.float32(1e-3)', ['lr', '--learning_rate?']),
    ('if flag is False:\n    epochs = 3', ['epochs', '--max_iters?']),
    ('for i in range(3):\n    size = i', ['size is not a knob']),
    ('a, *b = 1, 2', ['a is not a knob']),
    ('(n := 5)', ['n is not a knob']),
    ('max_iters = "5"', ['max_iters', 'whole number']),
    ('max_iters = 10**5000', ['too large']),
    ('max_iters = [10**5000]', ['c.py']),
    ('def max_iters(): pass', ['whole number']),
    ('\nmax_iters: 2', ['line 2', 'type max_iters = ...']),
    ('max_iters = 1 +', ['line 1', 'SyntaxError']),
    ('\n\nmax_iters = 1 / 0', ['line 3', 'ZeroDivisionError']),
    ('name = 5', ['a text']),
    ('flag = [True]', ['True or False']),
    ('\0', ['c.py']),
    ('configure(globals())', ['script, not a config']),
    ('exit(3)', ['SystemExit']),
])
def test_mistakes_in_a_config(folder, text, words, capsys):
    path = config(folder, text)
    error = error_of(capsys, lambda: overridden(path))
    for word in words:
        assert word in error


# ---- --help ------------------------------------------------------------------------------------

NANOGPTS_KNOBS = {
    'train.py': '''
        out_dir eval_interval log_interval eval_iters eval_only always_save_checkpoint init_from
        wandb_log wandb_project wandb_run_name
        dataset gradient_accumulation_steps batch_size block_size
        n_layer n_head n_embd dropout bias
        learning_rate max_iters weight_decay beta1 beta2 grad_clip
        decay_lr warmup_iters lr_decay_iters min_lr
        backend device dtype compile
    ''',
    'sample.py': '''
        start num_samples max_new_tokens temperature top_k seed device dtype compile
    ''',
}


@pytest.mark.parametrize('name', [
    'train.py',
    'sample.py',
    'evaluate.py',
    'export_hf.py',
    'export_web.py',
    'prepare_shakespeare.py',
    'prepare_enwik8.py',
    'prepare_text.py',
])
def test_help_lists_every_knob(script, name):
    """Each line shows a knob, its default and a comment, on stdout."""
    result = script(name, '--help')
    assert result.code == 0
    assert result.err == ''
    lines = result.out.split('knobs, as --name=value:\n')[1].splitlines()
    assert len(lines) > 3
    for line in lines:
        words = line.split()
        assert len(words) > 2, line
        assert not words[0].isupper(), line   # a constant of the script is not a knob
        assert '  ' in line.strip(), line


def test_every_nanogpt_knob_is_known(script):
    for name, knobs in NANOGPTS_KNOBS.items():
        known = script(name, '--help').out
        for knob in knobs.split():
            assert f'\n  {knob} ' in known
