"""ablate.py: a study from start to table, cut off in the middle, and what it refuses. pytest tests/test_ablate.py"""
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess

import numpy as np
import pytest
from conftest import KILL, PYTHON, ROOT

TINY = '--n_layer=1 --n_embd=16 --block_size=16 --batch_size=4 --max_iters=6 --eval_interval=3 --warmup_iters=0 ' \
       '--eval_iters=2 --dtype=float32 --dataset=mini'
FLAGS = ['--device=cpu', f'--flags={TINY}']
STUDY = pytest.mark.xdist_group('study')   # in one worker: the fixture whole takes 3 s
HEADS = [*FLAGS, '--variants=1 head, 4 heads', '--seeds=2']


def results(name='heads'):
    with open(f'results/ablations/{name}.json', encoding='utf-8') as f:
        return json.load(f)


def losses(name='heads'):
    return {(run['variant'], run['seed']): run['val_loss'] for run in results(name)['runs']}


@pytest.fixture(scope='session')
def whole(trained, tmp_path_factory):
    """A working folder in which the study of two variants with two seeds has run in one piece; what it printed in said."""
    home = tmp_path_factory.mktemp('whole')
    shutil.copytree(trained.parent / 'data', home / 'data')
    done = subprocess.run([PYTHON, str(ROOT / 'ablate.py'), 'heads', *HEADS], cwd=home, capture_output=True, text=True,
                          check=True, timeout=300)
    (home / 'out.txt').write_text(done.stdout)
    (home / 'err.txt').write_text(done.stderr)
    return home


@STUDY
def test_a_study(whole, script, folder):
    """Two variants, two seeds: train.py's own losses, a table of them, a picture; nothing is left of the runs."""
    said = (whole / 'err.txt').read_text()
    assert '4 runs to do' in said and '4 of 4, 0m 00s left' in said
    shutil.copytree(whole, '.', dirs_exist_ok=True)
    found = losses()
    assert set(found) == {(name, seed) for name in ('1 head', '4 heads') for seed in (1, 2)} and len(set(found.values())) == 4
    done = script('train.py', *TINY.split(), '--n_head=1', '--learning_rate=8e-3', '--min_lr=0', '--beta2=0.99', '--seed=2',
                  '--gradient_accumulation_steps=1', '--device=cpu', '--out_dir=alone')
    assert done.code == 0
    last = (folder / 'alone/log.csv').read_text().splitlines()[-1].split(',')
    assert found['1 head', 2] == float(last[3])
    table = (folder / 'results/ablations/heads.md').read_text()
    assert table == (whole / 'out.txt').read_text()
    row = next(line for line in table.splitlines() if line.startswith('| 1 head '))
    values = [found['1 head', seed] for seed in (1, 2)]
    assert f'{statistics.mean(values):.4f} ({statistics.stdev(values):.4f}) | 2 |' in row
    assert (folder / 'results/ablations/heads.png').read_bytes()[:4] == b'\x89PNG'
    assert not any(path.is_dir() for path in (folder / 'out-ablate/heads').iterdir())


@STUDY
def test_the_interval_is_welchs(whole, folder):
    """The difference's interval is scipy's for samples of unequal variance."""
    from scipy import stats
    shutil.copytree(whole / 'results', 'results')
    found = losses()
    one, four = ([found[name, seed] for seed in (1, 2)] for name in ('1 head', '4 heads'))
    low, high = stats.ttest_ind(one, four, equal_var=False).confidence_interval()
    shown = re.search(r'\| 1 head .*\| ([+-][\d.]+) \(([+-][\d.]+) to ([+-][\d.]+)\)', open('results/ablations/heads.md').read())
    assert [float(x) for x in shown.groups()] == pytest.approx([np.mean(one) - np.mean(four), low, high], abs=6e-5)


@STUDY
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGKILL])
def test_a_study_cut_off_goes_on(whole, script, folder, number):
    """What was done stays as it was, what was not is done, and the results are those of a study in one piece."""
    shutil.copytree(whole / 'data', 'data')
    process = subprocess.Popen([PYTHON, str(ROOT / 'ablate.py'), 'heads', *HEADS], stderr=subprocess.PIPE,
                               stdout=subprocess.DEVNULL, text=True)
    for line in process.stderr:
        if '1 of 4' in line:
            break
    process.send_signal(KILL if number == signal.SIGKILL else number)
    rest, code = process.stderr.read(), process.wait(timeout=60)
    assert code == (130 if number == signal.SIGINT else -9)
    assert number == signal.SIGKILL or 'the same command goes on' in rest
    before = results()['runs']
    assert 1 <= len(before) < 4
    result = script('ablate.py', 'heads', *HEADS)
    assert result.code == 0 and f'{4 - len(before)} run' in result.err, result.err
    assert all(run in results()['runs'] for run in before)
    assert losses() == {(run['variant'], run['seed']): run['val_loss'] for run in json.loads(
        (whole / 'results/ablations/heads.json').read_text())['runs']}
    assert '0 runs to do on cpu, 4 in results/ablations/heads.json' in script('ablate.py', 'heads', *HEADS).err


@STUDY
def test_equal_runs_are_taken_from_another_study(whole, script, folder):
    """To the second they took: they are not run again."""
    shutil.copytree(whole, '.', dirs_exist_ok=True)
    result = script('ablate.py', 'norm', *FLAGS, '--variants=pre', '--seeds=2')
    assert result.code == 0, result.err
    assert results('norm')['runs'] == [run | dict(variant='pre') for run in results()['runs'] if run['variant'] == '4 heads']


def test_counted_baselines(mini, script):
    """The chances of each token by hand: in a dict, one token after another."""
    result = script('ablate.py', 'baselines', *FLAGS, '--variants=uniform,counted unigram,counted bigram')
    assert result.code == 0, result.err
    found = losses('baselines')
    assert set(found) == {('uniform', 1), ('counted unigram', 1), ('counted bigram', 1)}
    train, val = (np.fromfile(f'data/mini/{part}.bin', dtype='<u2').tolist() for part in ('train', 'val'))
    V = json.loads(open('data/mini/meta.json').read())['vocab_size']
    assert found['uniform', 1] == pytest.approx(math.log(V))
    once, pairs, firsts = {}, {}, {}
    for a, b in zip(train, train[1:]):
        once[b] = once.get(b, 0) + 1
        pairs[a, b] = pairs.get((a, b), 0) + 1
        firsts[a] = firsts.get(a, 0) + 1
    alone = -sum(math.log((once.get(b, 0) + 1) / (len(train) - 1 + V)) for b in val[1:]) / (len(val) - 1)
    bigram = -sum(math.log((pairs.get(pair, 0) + 1) / (firsts.get(pair[0], 0) + V))
                  for pair in zip(val, val[1:])) / (len(val) - 1)
    assert found['counted unigram', 1] == pytest.approx(alone) and found['counted bigram', 1] == pytest.approx(bigram)
    # what is counted is no run of training, whatever its flags
    assert script('ablate.py', 'norm', *FLAGS, '--variants=pre', '--seeds=1').code == 0
    assert 'dtype' in results('norm')['runs'][0] and losses('norm')['pre', 1] != found['uniform', 1]


def test_a_diverged_and_a_failed_run_are_shown(mini, script, monkeypatch):
    """Neither dropped; the diverged one with its step; the failed one is tried again, the other not."""
    wild = ['--device=cpu', f'--flags={TINY} --learning_rate=1e18 --grad_clip=0', '--variants=4 heads', '--seeds=1']
    result = script('ablate.py', 'heads', *wild)
    assert result.code == 0 and re.search(r'\| 4 heads \(baseline\) \|.*\| 0; seed 1 diverged at step \d', result.out), result.err
    assert '0 runs to do' in script('ablate.py', 'heads', *wild).err
    for path in ROOT.glob('*.py'):
        shutil.copy(path, '.')
    shutil.copytree(ROOT / 'lib', 'lib')
    source = open('train.py').read()
    with open('train.py', 'w') as f:
        f.write(source.replace('    now.step += 1\n', '    now.step += 1\n    raise OSError("the roof fell in")\n'))
    monkeypatch.setattr('conftest.ROOT', mini)
    result = script('ablate.py', 'norm', *FLAGS, '--variants=pre,post', '--seeds=1')
    assert result.code == 0 and result.out.count('0; seed 1 failed: OSError: the roof fell in') == 2
    with open('train.py', 'w') as f:
        f.write(source)
    result = script('ablate.py', 'norm', *FLAGS, '--variants=post', '--seeds=1')
    assert '1 run to do' in result.err and 'seed 1 failed' in result.out and '| post |' in result.out
    assert {run['variant']: run['status'] for run in results('norm')['runs']} == {'pre': 'failed', 'post': 'done'}


def test_the_committed_tables_come_from_the_committed_results(script, folder):
    """Byte for byte, from the JSON alone."""
    shutil.copytree(ROOT / 'results/ablations', 'results/ablations')
    found = [path.relative_to(ROOT) for path in sorted((ROOT / 'results/ablations').glob('**/*.json'))]
    assert len(found) >= 14
    for path in found:
        os.remove(path.with_suffix('.md'))
        result = script('ablate.py', path.stem.removesuffix('-full'), '--report', f'--results={path.parent}', *['--full'] * path.stem.endswith('-full'))
        assert result.code == 0, result.err
        assert path.with_suffix('.md').read_bytes() == (ROOT / path).with_suffix('.md').read_bytes()


def test_list(script, folder):
    result = script('ablate.py', 'list')
    assert result.code == 0 and len(result.out.splitlines()) == 12 and '4 heads (baseline)' in result.out


@pytest.mark.parametrize('flags, words', [
    (['headz'], ["study='headz'", 'heads', 'modern']), ([], ["study=''", 'list']), (['heads', '--variants=3 heads'], ['3 heads', '8 heads']),
    (['heads', '--seeds=0'], ['seeds=0']), (['heads', '--data_dir=nowhere'], ['nowhere', 'prepare_shakespeare.py']),
    (['heads', '--report'], ['heads.json', 'python ablate.py heads']), (['heads', '--flags=--seed=3'], ['seed', '--key=value']),
    (['heads', '--flags="--n_embd=64'], ['No closing quotation', '--flags=']),
    (['norm', '--flags=--norm=post'], ['norm varies norm', '--max_iters=500']), (['heads', '--flags=--n_layr=3'], ['n_layr', 'n_layer']), (['heads', '--flags=--n_embd=30'], ['n_embd=30', 'n_head'])])
def test_mistakes(refused, mini, flags, words):
    """Unknown studies and variants with the list; what train.py refuses ends the study in its words."""
    more = [] if any('--data_dir' in flag for flag in flags) else ['--device=cpu']
    if any('--flags' in flag for flag in flags):
        flags = [flag.replace('--flags=', f'--flags={TINY} ') for flag in flags]
    line = refused_line(refused, flags + more)
    assert all(word in line for word in words), line


def refused_line(refused, flags):
    """The error's line; what is said before it may be progress."""
    return refused('ablate.py', *flags)


@STUDY
def test_results_of_other_knobs_are_not_mixed(whole, refused, folder):
    shutil.copytree(whole, '.', dirs_exist_ok=True)
    before = open('results/ablations/heads.json').read()
    other = ['--device=cpu', f'--flags={TINY} --max_iters=7', '--variants=4 heads', '--seeds=2']
    refused('ablate.py', 'heads', *other, words=['max_iters=6', 'now 7', '--results'])
    tokens = np.fromfile('data/mini/val.bin', dtype='<u2')
    meta = json.loads(open('data/mini/meta.json').read())
    del meta['splits']
    json.dump(meta | dict(splits={}), open('data/mini/meta.json', 'w'))
    tokens[::-1].tofile('data/mini/val.bin')
    refused('ablate.py', 'heads', *FLAGS, '--variants=4 heads', '--seeds=2', words=['data=', '--results'])
    assert open('results/ablations/heads.json').read() == before
    with open('results/ablations/heads.json', 'w') as f:
        f.write(before[:-30])
    refused('ablate.py', 'heads', *FLAGS, words=['heads.json', 'JSON'])


def test_a_stand_in_is_refused(refused, mini):
    meta = json.loads(open('data/mini/meta.json').read())
    json.dump(meta | dict(source=dict(stand_in=True, name='x', reason='y')), open('data/mini/meta.json', 'w'))
    refused('ablate.py', 'heads', *FLAGS, words=['stand-in'])


@STUDY
def test_a_full_disk(whole, refused, folder):
    """Said in a line, and what was there stays."""
    shutil.copytree(whole, '.', dirs_exist_ok=True)
    before = open('results/ablations/heads.json').read()
    os.makedirs('results/ablations/heads.json.part')
    refused('ablate.py', 'heads', *FLAGS, '--variants=2 heads', '--seeds=1', words=['heads.json', 'cannot be written'])
    assert open('results/ablations/heads.json').read() == before
