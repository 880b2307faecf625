"""configurator.py: overriding globals. pytest tests/test_configurator.py"""
import os

import pytest

from lib.configurator import configure

KNOBS = dict(learning_rate=1e-3, max_iters=10, name='x', flag=False, device='auto', compile='auto', top_k=None, _private=1,
             min_lr=0.0, batch_size=1, init_from='scratch', out_dir='out', start='', checkpoint='')


def overridden(*argv, resolve=None):
    knobs = dict(KNOBS)
    configure(knobs, resolve, list(argv))
    return knobs


@pytest.mark.parametrize('argv, name, value', [
    (['--max_iters=5'], 'max_iters', 5), (['--max_iters', '5'], 'max_iters', 5), (['--max_iters=1', '--max_iters=2'], 'max_iters', 2),
    (['--learning_rate=1'], 'learning_rate', 1.0), (['--learning_rate', '-1e-2'], 'learning_rate', -0.01),
    (['--name=123'], 'name', '123'), (['--name=a=b'], 'name', 'a=b'), (['--name='], 'name', ''), (['--name=None'], 'name', 'None'),
    (['--name', '-'], 'name', '-'), (['--name=--x'], 'name', '--x'), (['--flag'], 'flag', True), (['--flag', 'False'], 'flag', False),
    (['--flag=True'], 'flag', True), (['--flag', '--max_iters=3'], 'flag', True), (['--compile=False'], 'compile', False),
    (['--compile'], 'compile', True), (['--compile=auto'], 'compile', 'auto'), (['--device=cuda:1'], 'device', 'cuda:1'),
    (['--top_k=5'], 'top_k', 5), (['--top_k=None'], 'top_k', None), (['--max_iters=1e3'], 'max_iters', 1000),
    (['--max_iters', '-2.0'], 'max_iters', -2), (['--flag=true'], 'flag', True), (['--flag', 'false'], 'flag', False),
    (['--compile=false'], 'compile', False), (['--name=true'], 'name', 'true')])
def test_flags(argv, name, value):
    got = overridden(*argv)[name]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize('argv, words', [
    (['--learning_rte=1'], ['learning_rte', '--learning_rate']), (['--max_iters=1.5'], ['max_iters', 'whole number']),
    (['--max_iters=True'], ['whole number']), (['--max_iters=abc'], ['whole number']), (['--learning_rate=nan'], ['number']),
    (['--learning_rate=1e999'], ['finite']), (['--flag=1'], ['True or False']), (['--name'], ['no value']),
    (['--max_iters=None'], ['whole number']), (['nope.py'], ['nope.py', '--help']), (['-x'], ['-x']), (['--_private=2'], ['_private']),
    (['--lr=1'], ['--learning_rate?']), (['--resume'], ['--init_from=resume?']), (['--epochs=3'], ['--max_iters?']),
    (['--bs=3'], ['--batch_size?']), (['--max_iters=1e30'], ['large']), (['--=1'], ['not a knob']), (['--learning_rate=' + '9' * 400], ['large']), (['--max_iters=' + '(' * 300], ['whole number'])])
def test_mistakes(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        overridden(*argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count('\n') == 1 and error.startswith('error: ')
    assert all(word in error for word in words), error


def config(folder, text, name='c.py'):
    (folder / name).write_text(text)
    return name


def test_config_like_nanogpt(folder):
    """`import time`, computed values, a bool for an 'auto' knob, an int for a float."""
    path = config(folder, "import time\nname = 'ft-' + str(time.time())\nlearning_rate = 1\nmax_iters = 2 * max_iters\n"
                          "compile = False\n_mine = [n for n in range(max_iters)]\nflag = len(_mine) == 20\n")
    knobs = overridden(path)
    assert knobs['name'].startswith('ft-1') and knobs['learning_rate'] == 1.0 and knobs['max_iters'] == 20
    assert knobs['compile'] is False and knobs['flag'] is True and 'time' not in knobs and knobs['_private'] == 1


def test_a_config_may_compute(folder):
    """Functions, classes, imports, loop variables, lists and NumPy's numbers are Python, not misspelled knobs."""
    path = config(folder, "import numpy as np\nfrom pathlib import Path\nfrom math import pi, sqrt\n"
                          "def rate(n):\n    half = n / 2\n    return half\n"
                          "class Sizes:\n    wide = 3\n"
                          "table = {'a': 1}\nfor i, j in enumerate([4, 5]):\n    max_iters = i + j\n"
                          "learning_rate = np.float32(0.5) * rate(2)\ntop_k = np.int64(7)\nflag = np.bool_(True)\n"
                          "batch_size = np.float64(8)\nout_dir = Path('a') / 'b'\nwith open(__file__) as f:\n    name = f.read(6)\n"
                          "compile = [x for x in (True, False)][1]\n")
    knobs = overridden(path)
    assert knobs['learning_rate'] == 0.5 and type(knobs['learning_rate']) is float
    assert (knobs['max_iters'], knobs['top_k'], knobs['flag'], knobs['batch_size']) == (6, 7, True, 8)
    assert {type(knobs[key]) for key in ('max_iters', 'top_k', 'batch_size')} == {int} and type(knobs['flag']) is bool
    assert knobs['out_dir'] == os.path.join('a', 'b') and knobs['name'] == 'import' and knobs['compile'] is False


def test_home_folder(folder, monkeypatch):
    """Shells leave ~ as it is behind --key=."""
    monkeypatch.setenv('HOME', '/home/me')
    monkeypatch.setenv('USERPROFILE', '/home/me')
    knobs = overridden('--out_dir=~/runs/a', config(folder, "checkpoint = '~/b.pt'\nname = '~/c'"), '--start=~/d')
    assert (knobs['out_dir'], knobs['checkpoint']) == ('/home/me/runs/a', '/home/me/b.pt')
    assert (knobs['name'], knobs['start']) == ('~/c', '~/d')


@pytest.mark.parametrize('word, typed', [
    ('prompt.txt', '--start=FILE:prompt.txt'), ('Hello there', "--start='Hello there'"), ('out/best.pt', '--checkpoint=out/best.pt'),
    ('out', '--out_dir=out'), ('batch_size=3', '--batch_size=3'), ('-batch_size=3', '--batch_size=3'), ('resume', '--init_from=resume')])
def test_only_py_files_are_run(folder, word, typed, capsys):
    """A word that is a file but not a .py is never run as Python; the error says what was meant."""
    os.mkdir('out')
    for path in ('prompt.txt', 'out/best.pt'):
        (folder / path).write_text('open("ran", "w")')
    with pytest.raises(SystemExit) as stop:
        overridden(config(folder, 'max_iters = 1'), word)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count('\n') == 1 and error.rstrip().endswith(f'type {typed}'), error
    assert not os.path.exists('ran')


@pytest.mark.parametrize('argv, words', [(['a.py', 'b.py', 'c.py'], ['"*.py"', 'quotes']), (['--name', 'a.py', 'b.py'], ['"*.py"']),
                                         (['a.py', 'nowhere'], ['nowhere'])])
def test_scripts_without_configs(folder, argv, words, capsys):
    """One bare word is the first knob, whatever its ending; a shell that expanded *.py gave more, and none is run."""
    for path in ('a.py', 'b.py', 'c.py'):
        (folder / path).write_text('open("ran", "w")')
    knobs = dict(KNOBS)
    configure(knobs, None, ['--flag', 'a.py', '--max_iters=3'], first='name', configs=False)
    assert knobs['name'] == 'a.py'
    with pytest.raises(SystemExit) as stop:
        configure(knobs, None, argv, first='name', configs=False)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count('\n') == 1 and all(word in error for word in words), error
    assert not os.path.exists('ran')


def test_last_one_wins(folder, capsys):
    path = config(folder, 'max_iters = 7')
    assert overridden('--max_iters=3', path)['max_iters'] == 7
    assert 'note: c.py comes after --max_iters=3 and sets it to 7' in capsys.readouterr().err
    assert overridden('--max_iters=7', path)['max_iters'] == 7 and capsys.readouterr().err == ''
    assert overridden(path, '--max_iters=3')['max_iters'] == 3


@pytest.mark.parametrize('argv, seen', [([], 'cpu'), (['--device=cuda'], 'cuda'), (['--device', 'auto'], 'cpu')])
def test_config_sees_resolved_device(folder, argv, seen):
    path = config(folder, "name = device\nif device == 'cpu':\n    max_iters = 99")
    knobs = overridden(path, *argv, resolve=lambda name: 'cpu' if name == 'auto' else name)
    assert knobs['name'] == knobs['device'] == seen and (knobs['max_iters'] == 99) == (seen == 'cpu')


def test_names_given(folder):
    path = config(folder, 'max_iters = 10\nif flag:\n    name = "y"')
    assert configure(dict(KNOBS), None, [path, '--top_k=2'])[1] == {'max_iters', 'top_k'}


@pytest.mark.parametrize('text, words', [
    ('learning_rte = 1', ['learning_rte', '--learning_rate']), ('max_iters = "5"', ['max_iters', 'whole number']),
    ('max_iters = 1 +', ['line 1', 'SyntaxError']), ('\n\nmax_iters = 1 / 0', ['line 3', 'ZeroDivisionError']),
    ('name = 5', ['a text']), ('\0', ['c.py']), ('if flag is False:\n    epochs = 3', ['epochs', '--max_iters?']),
    ('for i in range(3):\n    size = i', ['size is not a knob']), ('a, *b = 1, 2', ['a is not a knob']),
    ('import numpy\nlr = numpy.float32(1e-3)', ['lr', '--learning_rate?']), ('(n := 5)', ['n is not a knob']),
    ('\nmax_iters: 2', ['line 2', 'type max_iters = ...']), ('configure(globals())', ['script, not a config']),
    ('flag = [True]', ['True or False']), ('def max_iters(): pass', ['whole number']),
    ('max_iters = 10**5000', ['too large']), ('max_iters = [10**5000]', ['c.py']), ('exit(3)', ['SystemExit'])])
def test_config_mistakes(folder, text, words, capsys):
    with pytest.raises(SystemExit) as stop:
        overridden(config(folder, text))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count('\n') == 1
    assert all(word in error for word in words), error


@pytest.mark.parametrize('name', ['train.py', 'sample.py', 'evaluate.py', 'export_hf.py', 'prepare_shakespeare.py', 'prepare_enwik8.py',
                                  'prepare_text.py', 'export_web.py'])
def test_help_lists_every_knob(script, name):
    """Each knob with its default and a comment, on stdout."""
    result = script(name, '--help')
    lines = result.out.split('knobs, as --name=value:\n')[1].splitlines()
    assert result.code == 0 and result.err == '' and len(lines) > 3 and not any(line.split()[0].isupper() for line in lines)
    assert all(len(line.split(None, 2)) >= 2 and '  ' in line.strip() and len(line.split()) > 2 for line in lines), result.out


def test_every_nanogpt_knob_is_known(script):
    known = script('train.py', '--help').out
    for name in ('out_dir eval_interval log_interval eval_iters eval_only always_save_checkpoint init_from wandb_log wandb_project '
                 'wandb_run_name dataset gradient_accumulation_steps batch_size block_size n_layer n_head n_embd dropout bias '
                 'learning_rate max_iters weight_decay beta1 beta2 grad_clip decay_lr warmup_iters lr_decay_iters min_lr backend '
                 'device dtype compile').split():
        assert f'\n  {name} ' in known
    known = script('sample.py', '--help').out
    for name in 'start num_samples max_new_tokens temperature top_k seed device dtype compile'.split():
        assert f'\n  {name} ' in known
