"""ablate.py: a study from start to table, a study that is interrupted, and what is refused.

    pytest tests/test_ablate.py
"""
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import KILL, PYTHON, ROOT, TEXT

from lib.data import TrainingWindows, open_dataset
from model import GPT, GPTConfig

# Flags of train.py for a run of less than a second.
TINY = (
    '--n_layer=1 --n_embd=16 --block_size=16 --batch_size=4 --max_iters=6 --eval_interval=3 '
    '--warmup_iters=0 --eval_iters=2 --dtype=float32 --dataset=mini'
)
FLAGS = ['--device=cpu', f'--flags={TINY}']
HEADS = ['heads', *FLAGS, '--variants=1 head, 4 heads', '--seeds=2']
# Flags that ablate.py adds for a run of the variant '1 head'.
ONE_HEAD = [
    '--n_head=1',
    '--learning_rate=8e-3',
    '--min_lr=0',
    '--beta2=0.99',
    '--gradient_accumulation_steps=1',
]
# Tests with this mark run in one worker, because the fixture `whole` takes 3 seconds.
STUDY = pytest.mark.xdist_group('study')
RESULTS = Path('results/ablations/heads.json')


def runs_of(name='heads'):
    """Return the runs in a study's results."""
    path = Path(f'results/ablations/{name}.json')
    return json.loads(path.read_text(encoding='utf-8'))['runs']


def losses_of(runs):
    """Return {(variant, seed): validation loss}."""
    return {(run['variant'], run['seed']): run['val_loss'] for run in runs}


def change_meta(**changes):
    """Change entries of data/mini/meta.json."""
    path = Path('data/mini/meta.json')
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope='session')
def whole(trained, tmp_path_factory):
    """Return a folder in which a study of two variants and two seeds ran without interruption.

    out.txt and err.txt hold what the study printed.
    """
    home = tmp_path_factory.mktemp('whole')
    shutil.copytree(trained.parent / 'data', home / 'data')
    done = subprocess.run(
        [PYTHON, str(ROOT / 'ablate.py'), *HEADS],
        cwd=home,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    (home / 'out.txt').write_text(done.stdout)
    (home / 'err.txt').write_text(done.stderr)
    return home


@pytest.fixture
def study(whole, folder):
    """Enter a copy of the folder `whole`. Return its path."""
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    return folder


# ---- a study -----------------------------------------------------------------------------------

@STUDY
def test_a_study_writes_a_table_and_a_picture_and_removes_its_runs(study):
    said = Path('err.txt').read_text()
    assert '4 runs to do' in said
    assert '4 of 4, 0m 00s left' in said
    found = losses_of(runs_of())
    assert set(found) == {('1 head', 1), ('1 head', 2), ('4 heads', 1), ('4 heads', 2)}
    assert len(set(found.values())) == 4
    table = Path('results/ablations/heads.md').read_text()
    assert table == Path('out.txt').read_text()
    row = next(line for line in table.splitlines() if line.startswith('| 1 head '))
    losses = [found['1 head', 1], found['1 head', 2]]
    mean = statistics.mean(losses)
    deviation = statistics.stdev(losses)
    assert f'{mean:.4f} ({deviation:.4f}) | 2 |' in row
    assert Path('results/ablations/heads.png').read_bytes()[:4] == b'\x89PNG'
    assert not any(path.is_dir() for path in Path('out-ablate/heads').iterdir())


@STUDY
def test_a_studys_loss_is_that_of_train(study, script):
    done = script(
        'train.py',
        *TINY.split(),
        *ONE_HEAD,
        '--seed=2',
        '--device=cpu',
        '--out_dir=alone',
    )
    assert done.code == 0
    last = Path('alone/log.csv').read_text().splitlines()[-1].split(',')
    val_loss = float(last[3])
    assert losses_of(runs_of())['1 head', 2] == val_loss


@STUDY
def test_the_interval_is_welchs(study):
    """The interval of a difference is scipy's for samples of unequal variance."""
    from scipy import stats
    found = losses_of(runs_of())
    one = [found['1 head', 1], found['1 head', 2]]
    four = [found['4 heads', 1], found['4 heads', 2]]
    low, high = stats.ttest_ind(one, four, equal_var=False).confidence_interval()
    difference = np.mean(one) - np.mean(four)
    table = Path('results/ablations/heads.md').read_text()
    shown = re.search(r'\| 1 head .*\| ([+-][\d.]+) \(([+-][\d.]+) to ([+-][\d.]+)\)', table)
    numbers = [float(number) for number in shown.groups()]
    assert numbers == pytest.approx([difference, low, high], abs=6e-5)


@STUDY
@pytest.mark.parametrize('number', [signal.SIGINT, KILL])
def test_an_interrupted_study_continues(whole, script, folder, number):
    """Finished runs stay, the others run, and the results are those of an uninterrupted study."""
    shutil.copytree(whole / 'data', 'data')
    process = subprocess.Popen(
        [PYTHON, str(ROOT / 'ablate.py'), *HEADS],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    for line in process.stderr:
        if '1 of 4' in line:
            break
    process.send_signal(number)
    rest = process.stderr.read()
    code = process.wait(timeout=60)
    if number == KILL:
        assert code == -signal.SIGKILL
    else:
        assert code == 128 + signal.SIGINT
        assert 'the same command goes on' in rest
    before = runs_of()
    assert 1 <= len(before) < 4

    result = script('ablate.py', *HEADS)
    assert result.code == 0, result.err
    assert f'{4 - len(before)} run' in result.err
    assert all(run in runs_of() for run in before)
    uninterrupted = json.loads((whole / RESULTS).read_text())['runs']
    assert losses_of(runs_of()) == losses_of(uninterrupted)
    again = script('ablate.py', *HEADS)
    assert f'0 runs to do on cpu, 4 in {RESULTS}' in again.err


@STUDY
def test_equal_runs_are_copied_from_another_study(study, script):
    """The variant 'pre' of the study norm has the same flags as the variant '4 heads'."""
    result = script('ablate.py', 'norm', *FLAGS, '--variants=pre', '--seeds=2')
    assert result.code == 0, result.err
    equal = [run | dict(variant='pre') for run in runs_of() if run['variant'] == '4 heads']
    assert runs_of('norm') == equal   # the seconds of each run are equal too


def test_counted_baselines(mini, script):
    """Count tokens and pairs in dicts, and compare the cross-entropies."""
    variants = '--variants=uniform,counted unigram,counted bigram'
    result = script('ablate.py', 'baselines', *FLAGS, variants)
    assert result.code == 0, result.err
    found = losses_of(runs_of('baselines'))
    assert set(found) == {('uniform', 1), ('counted unigram', 1), ('counted bigram', 1)}

    train = np.fromfile('data/mini/train.bin', dtype='<u2').tolist()
    val = np.fromfile('data/mini/val.bin', dtype='<u2').tolist()
    V = json.loads(Path('data/mini/meta.json').read_text())['vocab_size']
    once = Counter(train[1:])
    pairs = Counter(zip(train, train[1:]))
    firsts = Counter(train[:-1])
    unigram = 0.0
    bigram = 0.0
    for a, b in zip(val, val[1:]):   # each count is raised by 1
        unigram -= math.log((once[b] + 1) / (len(train) - 1 + V))
        bigram -= math.log((pairs[a, b] + 1) / (firsts[a] + V))
    targets = len(val) - 1
    assert found['uniform', 1] == pytest.approx(math.log(V))
    assert found['counted unigram', 1] == pytest.approx(unigram / targets)
    assert found['counted bigram', 1] == pytest.approx(bigram / targets)

    # A counted baseline is never copied in place of a training run.
    assert script('ablate.py', 'norm', *FLAGS, '--variants=pre', '--seeds=1').code == 0
    assert 'dtype' in runs_of('norm')[0]
    assert losses_of(runs_of('norm'))['pre', 1] != found['uniform', 1]


def test_gradients_through_depth(mini, script):
    """The study residual measures each block's gradient; the first ones are those of model.py."""
    command = ['residual', *FLAGS, '--variants=2 layers without', '--seeds=1']
    result = script('ablate.py', *command)
    assert result.code == 0, result.err
    path = Path('results/ablations/residual.json')
    entry, = json.loads(path.read_text())['gradients']   # TINY has fewer than 20 steps
    assert entry['variant'] == '2 layers without' and entry['step'] == 0
    assert Path('results/ablations/residual-gradients.png').exists()

    data = open_dataset('mini', 'data')
    x, y = TrainingWindows(data, 'train', 16, seed=1).batch(0, 4)
    torch.manual_seed(1)
    net = GPT(GPTConfig(block_size=16, vocab_size=data.vocab_size, n_layer=2, n_head=4, n_embd=16,
                        residual=False))
    net(x, y)[1].backward()
    for block, norm in zip(net.transformer.h, entry['norms'], strict=True):
        gradient = torch.cat([p.grad.flatten() for p in block.parameters()])
        assert norm == pytest.approx(gradient.norm().item(), rel=1e-3)

    # A second call measures nothing again, and the page stays as it was.
    page = Path('results/ablations/residual.md').read_bytes()
    again = script('ablate.py', *command)
    assert 'gradients measured' not in again.err
    assert Path('results/ablations/residual.md').read_bytes() == page


def test_the_bits_per_byte_of_a_bpe(folder, script):
    """A token stands for several bytes, and its nats are shared among them."""
    Path('a.txt').write_text(TEXT)
    bpe = ['--tokenizer=bpe', '--vocab_size=300', '--name=shakespeare_bpe_512']
    assert script('prepare_text.py', '--input=a.txt', *bpe).code == 0
    flags = TINY.replace('mini', 'shakespeare_bpe_512') + ' --max_minutes=1'
    command = ['tokenizer', '--variants=bpe 512', '--seeds=1', '--device=cpu']
    assert script('ablate.py', *command, f'--flags={flags}').code == 0
    [run] = runs_of('tokenizer')
    data = open_dataset('shakespeare_bpe_512', 'data')
    predicted = data.split('val')[0].tolist()[1:]
    bits = run['val_loss'] * len(predicted) / math.log(2)
    assert run['bits_per_byte'] == pytest.approx(bits / len(data.tokenizer.decode(predicted)))


def test_a_diverged_run_is_shown_and_not_repeated(mini, script):
    wild = f'--flags={TINY} --learning_rate=1e18 --grad_clip=0'
    command = ['heads', '--device=cpu', wild, '--variants=4 heads', '--seeds=1']
    result = script('ablate.py', *command)
    assert result.code == 0, result.err
    row = r'\| 4 heads \(baseline\) \|.*\| 0; seed 1 diverged at step \d'
    assert re.search(row, result.out), result.err
    assert '0 runs to do' in script('ablate.py', *command).err


def test_a_failed_run_is_shown_and_tried_again(mini, script, monkeypatch):
    for path in ROOT.glob('*.py'):
        shutil.copy(path, '.')
    shutil.copytree(ROOT / 'lib', 'lib')
    monkeypatch.setattr('conftest.ROOT', mini)
    whole = Path('train.py').read_text()
    step = '    now.step += 1\n'
    assert step in whole
    broken = whole.replace(step, f'{step}    raise OSError("the roof fell in")\n')
    Path('train.py').write_text(broken)
    result = script('ablate.py', 'norm', *FLAGS, '--variants=pre,post', '--seeds=1')
    assert result.code == 0, result.err
    assert result.out.count('0; seed 1 failed: OSError: the roof fell in') == 2

    Path('train.py').write_text(whole)
    result = script('ablate.py', 'norm', *FLAGS, '--variants=post', '--seeds=1')
    assert '1 run to do' in result.err
    assert 'seed 1 failed' in result.out
    assert '| post |' in result.out
    status = {run['variant']: run['status'] for run in runs_of('norm')}
    assert status == {'pre': 'failed', 'post': 'done'}


def test_the_committed_tables_come_from_the_committed_results(script, folder):
    """--report writes the committed tables from the JSON files alone, byte for byte."""
    shutil.copytree(ROOT / 'results/ablations', 'results/ablations')
    found = sorted(Path('results/ablations').glob('**/*.json'))
    assert len(found) >= 14
    for path in found:
        table = path.with_suffix('.md')
        os.remove(table)
        command = [path.stem.removesuffix('-full'), '--report', f'--results={path.parent}']
        if path.stem.endswith('-full'):
            command.append('--full')
        result = script('ablate.py', *command)
        assert result.code == 0, result.err
        assert table.read_bytes() == (ROOT / table).read_bytes()


def test_list(script, folder):
    result = script('ablate.py', 'list')
    assert result.code == 0
    assert len(result.out.splitlines()) == 12
    assert '4 heads (baseline)' in result.out


# ---- what is refused ---------------------------------------------------------------------------

@pytest.mark.parametrize('command, words', [
    ([], ["study=''", 'list']),
    (['headz'], ["study='headz'", 'heads', 'modern']),
    (['heads', '--variants=3 heads'], ['3 heads', '8 heads']),
    (['heads', '--seeds=0'], ['seeds=0']),
    (['heads', '--report'], ['heads.json', 'python ablate.py heads']),
])
def test_mistakes(refused, mini, command, words):
    refused('ablate.py', *command, '--device=cpu', words=words)


@pytest.mark.parametrize('study, flags, words', [
    ('heads', '--seed=3', ['seed', '--key=value']),
    ('heads', '"--n_embd=64', ['No closing quotation', '--flags=']),
    ('heads', '--n_layr=3', ['n_layr', 'n_layer']),
    ('heads', '--n_embd=30', ['n_embd=30', 'n_head']),
    ('norm', '--norm=post', ['norm varies norm', '--max_iters=500']),
])
def test_flags_that_train_refuses_end_the_study(refused, mini, study, flags, words):
    refused('ablate.py', study, f'--flags={TINY} {flags}', '--device=cpu', words=words)


def test_a_missing_dataset_is_refused(refused, mini):
    words = ['nowhere', 'prepare_shakespeare.py']
    refused('ablate.py', 'heads', '--data_dir=nowhere', words=words)


def test_a_stand_in_is_refused(refused, mini):
    change_meta(source=dict(stand_in=True, name='x', reason='y'))
    refused('ablate.py', 'heads', *FLAGS, words=['stand-in'])


@STUDY
def test_results_of_other_knobs_are_not_mixed(study, refused):
    before = RESULTS.read_bytes()
    more_steps = f'--flags={TINY} --max_iters=7'
    command = ['heads', '--device=cpu', more_steps, '--variants=4 heads', '--seeds=2']
    refused('ablate.py', *command, words=['max_iters=6', 'now 7', '--results'])
    assert RESULTS.read_bytes() == before


@STUDY
def test_results_of_other_data_are_not_mixed(study, refused):
    before = RESULTS.read_bytes()
    change_meta(splits={})   # without hashes, the dataset opens
    tokens = np.fromfile('data/mini/val.bin', dtype='<u2')
    tokens[::-1].tofile('data/mini/val.bin')
    command = ['heads', *FLAGS, '--variants=4 heads', '--seeds=2']
    refused('ablate.py', *command, words=['data=', '--results'])
    assert RESULTS.read_bytes() == before


@STUDY
def test_damaged_results_are_refused(study, refused):
    RESULTS.write_bytes(RESULTS.read_bytes()[:-30])
    refused('ablate.py', 'heads', *FLAGS, words=['heads.json', 'JSON'])


@STUDY
def test_results_that_cannot_be_written_stay_as_they_are(study, refused):
    before = RESULTS.read_bytes()
    os.makedirs('results/ablations/heads.json.part')   # in place of the file to be written
    command = ['heads', *FLAGS, '--variants=2 heads', '--seeds=1']
    refused('ablate.py', *command, words=['heads.json', 'cannot be written'])
    assert RESULTS.read_bytes() == before
