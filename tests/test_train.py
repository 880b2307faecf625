"""train.py end to end on a small text: results, exactness, mistakes. pytest tests/test_train.py"""
import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PYTHON, ROOT, TEXT, TINY, read_log, same_weights, weights, without_times

from lib import checkpoint, optimizers, runtime
from lib.configurator import configure
from lib.data import Dataset, TrainingWindows
from lib.prepare import write_dataset
from lib.tokenizers import CharTokenizer


def flags(**knobs):
    """Return the command-line flags that set knobs."""
    return [f'--{key}={value}' for key, value in knobs.items()]


def torchrun(ranks):
    """Return the launcher that starts a script as some ranks on this machine."""
    return ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}']


def start_training(*argv, **variables):
    """Start train.py in a process of its own; its stderr can be read line by line."""
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', **variables}
    command = [PYTHON, str(ROOT / 'train.py'), *argv]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def write_text(name, text, tokenizer=None):
    """Write data/<name>, with the same text in both splits."""
    tokenizer = tokenizer or CharTokenizer(text)
    splits = {split: [(tokenizer.encode(text), len(text))] for split in ('train', 'val')}
    source = dict(name=name, url=None, sha256='', stand_in=False)
    write_dataset(f'data/{name}', splits, tokenizer, source)


def column(path, name):
    """Return the numbers in a column of a log, without its empty cells."""
    return [float(row[name]) for row in read_log(path) if row[name]]


def val_losses(path):
    """Return {step: validation loss} for the evaluations in a log."""
    return {int(row['iter']): float(row['val_loss']) for row in read_log(path) if row['val_loss']}


def assert_logs_agree(path, other, *columns):
    """Check that the columns of two logs are equal but for rounding."""
    for a, b in zip(read_log(path), read_log(other), strict=True):
        for name in columns:
            both_empty = a[name] == b[name] == ''
            assert both_empty or float(a[name]) == pytest.approx(float(b[name]), abs=1e-5)


def knobs_on_a_gpu(config):
    """Return train.py's knobs as a config file leaves them on a GPU."""
    source = (ROOT / 'train.py').read_text()
    defaults = source.partition('# ---- knobs')[2].partition('knobs, given')[0]
    knobs = {}
    exec('#' + defaults, knobs)
    configure(knobs, lambda name: 'cuda', [str(ROOT / config)])
    return knobs


# ---- files and messages of a run -----------------------------------------------------------------

@pytest.mark.processor
@pytest.mark.pictures
def test_a_run_leaves_its_files_and_reports_itself(mini, script):
    result = script('train.py', *TINY, '--sample_interval=5')
    assert result.code == 0
    assert result.out == ''
    assert 'Warning' not in result.err
    files = ['best.pt', 'config.json', 'last.previous.pt', 'last.pt', 'log.csv', 'loss.png']
    assert sorted(os.listdir('out')) == files
    assert Path('out/loss.png').read_bytes().startswith(b'\x89PNG')
    last = torch.load('out/last.pt', weights_only=True)   # tensors and plain types only
    check_log(read_log('out/log.csv'))
    check_checkpoint(last)
    check_config(json.loads(Path('out/config.json').read_text()))
    last['model'].pop('lm_head.weight')   # the same tensor as the embedding
    check_report(result.err, parameters=sum(p.numel() for p in last['model'].values()))


def check_log(rows):
    """Check the log of a run of 10 steps, 64 tokens each, evaluated at every fifth."""
    assert list(rows[0]) == ['iter', 'tokens', 'train_loss', 'val_loss', 'lr', 'grad_norm',
                             'tok_per_s', 'seconds']
    assert [int(row['iter']) for row in rows] == list(range(11))
    assert [int(row['tokens']) for row in rows] == list(range(0, 704, 64))
    assert [row['iter'] for row in rows if row['val_loss']] == ['0', '5', '10']
    first = float(rows[0]['train_loss'])
    assert abs(first - math.log(len(set(TEXT)))) < 0.1
    assert float(rows[9]['train_loss']) < first
    warm_up = [1e-2 / 3, 2e-2 / 3, 1e-2]
    assert [float(row['lr']) for row in rows[:3]] == pytest.approx(warm_up, rel=1e-4)
    floor = 6e-5
    halfway = floor + (1e-2 - floor) * 0.5 * (1 + math.cos(math.pi / 2))
    assert float(rows[6]['lr']) == pytest.approx(halfway, rel=1e-4)


def check_checkpoint(last):
    assert last['iter_num'] == 10
    assert last['model_args']['n_embd'] == 16
    assert last['tokenizer']['kind'] == 'char'
    assert last['config']['max_iters'] == 10
    assert last['best_val_loss'] > 0
    assert 'transformer.h.1.attn.c_attn.weight' in last['model']
    assert not any(name.startswith(('_orig_mod', 'module')) for name in last['model'])


def check_config(config):
    assert config['device'] == 'cpu'
    assert config['dtype'] == 'float32'
    assert config['compile'] is False
    assert config['learning_rate'] == 1e-2
    assert config['versions']['torch'] == torch.__version__


def check_report(report, parameters):
    """Check the lines on stderr: the run's sizes, its steps, its peak memory."""
    symbols = len(set(TEXT))
    for words in ('device cpu',
                  f'{parameters:,} parameters',
                  '4 batch x 16 block x 1 accumulation',
                  '= 64',
                  f'ln({symbols}) = {math.log(symbols):.4f}',
                  '-' * 40):
        assert words in report, words
    step = next(line for line in report.splitlines() if line.startswith('iter 3: loss'))
    parts = [r'iter 3: loss [\d.]+, perplexity [\d.]+',
             r'lr [\de.-]+',
             r'grad norm [\d.]+',
             r'[\d,]+ tok/s',
             r'\S+ \S+ left']
    assert re.fullmatch(r' \| '.join(parts), step)
    end = re.search(r'done: 10 steps in 0m \d\ds and ([\d,]+) MB; val loss', report)
    peak = re.search(r'VmHWM:\s*(\d+) kB', Path('/proc/self/status').read_text())
    assert int(end[1].replace(',', '')) == pytest.approx(int(peak[1]) * 1024 / 1e6, abs=2)


@pytest.mark.processor
def test_the_final_loss_is_the_mean_over_the_whole_split(mini, script):
    """The last val_loss equals one computed from the checkpoint, window by window."""
    script('train.py', *TINY)
    net = checkpoint.build_model(checkpoint.load('out/last.pt'), 'out/last.pt').eval()
    tokens = torch.from_numpy(Dataset('mini').split('val')[0].astype('int64'))
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, 16):
            piece = tokens[start:start + 17]
            logp = net(piece[None, :-1])[0].log_softmax(-1)
            nats -= logp[0].gather(1, piece[1:, None]).sum().item()
    mean = nats / (len(tokens) - 1)
    assert column('out/log.csv', 'val_loss')[-1] == pytest.approx(mean, abs=1e-5)


def test_best_holds_the_lowest_loss_and_last_the_last_step(mini, script):
    """A learning rate of 3 makes the loss rise after its lowest value."""
    rising = flags(max_iters=40, decay_lr=False, learning_rate=3, weight_decay=0)
    script('train.py', *TINY, *rising)
    losses = val_losses('out/log.csv')
    best = checkpoint.load('out/best.pt')
    last = checkpoint.load('out/last.pt')
    assert best['iter_num'] < last['iter_num'] == 40
    lowest = min(loss for step, loss in losses.items() if step < 40)
    assert losses[best['iter_num']] == pytest.approx(lowest, abs=1e-6)


def test_eval_only_leaves_a_run_without_steps_as_it_was(mini, script):
    assert script('train.py', *TINY, '--max_iters=0').code == 0
    assert checkpoint.load('out/last.pt')['iter_num'] == 0
    saved = Path('out/last.pt').read_bytes()
    log = Path('out/log.csv').read_text()
    result = script('train.py', *TINY, '--init_from=resume', '--eval_only')
    assert result.code == 0
    assert 'on the whole split' in result.err
    assert Path('out/last.pt').read_bytes() == saved
    assert Path('out/log.csv').read_text() == log


def test_eval_only_makes_no_folder(mini, script, trained):
    script('export_hf.py', f'--out_dir={trained}', '--to=hf')
    before = sorted(os.listdir())
    result = script('train.py', *TINY, '--init_from=hf', '--eval_only')
    assert result.code == 0, result.err
    assert 'on the whole split' in result.err
    assert sorted(os.listdir()) == before


def test_tensorboard_gets_the_losses_of_the_log(mini, script):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    assert script('train.py', *TINY, '--tensorboard_log').code == 0
    events = EventAccumulator('out/tensorboard').Reload()
    shown = [round(event.value, 4) for event in events.Scalars('val_loss')]
    assert shown == [round(loss, 4) for loss in column('out/log.csv', 'val_loss')]


def test_wandb_gets_a_row_for_every_step(mini, script, monkeypatch):
    runs, rows = [], {}
    fake = SimpleNamespace(
        init=lambda **options: runs.append(options['name']),
        log=lambda row, step: rows.update({step: row}))
    monkeypatch.setitem(sys.modules, 'wandb', fake)
    assert script('train.py', *TINY, '--wandb_log', '--wandb_run_name=mine').code == 0
    assert runs == ['mine']
    assert list(rows) == list(range(11))
    assert 'val_loss' in rows[0]


@pytest.mark.parametrize('knob, package', [
    ('wandb_log', 'wandb'),
    ('tensorboard_log', 'torch.utils.tensorboard'),
])
def test_a_tracker_that_is_not_installed_is_refused(mini, refused, monkeypatch, knob, package):
    monkeypatch.setitem(sys.modules, package, None)
    refused('train.py', *TINY, f'--{knob}', words=[knob, 'pip install'])


WITHOUT_OPTIONAL_PACKAGES = f'''
import runpy
import sys
sys.path.insert(0, {str(ROOT)!r})
optional = ['tiktoken', 'requests', 'matplotlib', 'wandb', 'tensorboard', 'tqdm']
sys.modules.update(dict.fromkeys(optional))   # None: importing the package fails
train = ['train.py', *{TINY!r}]
sample = ['sample.py', '--start=so', '--max_new_tokens=5']
for command in (train, sample):
    sys.argv = command
    try:
        runpy.run_path({str(ROOT)!r} + '/' + command[0], run_name='__main__')
    except SystemExit as stop:
        assert not stop.code, (command, stop.code)
'''


def test_characters_need_torch_and_numpy_alone(mini):
    """A run and its sample work without any optional package (nanoGPT #53: no requirements)."""
    command = [sys.executable, '-W', 'error::FutureWarning', '-c', WITHOUT_OPTIONAL_PACKAGES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('so')
    assert len(done.stdout) == len('so') + 5 + len('\n')
    assert not os.path.exists('out/loss.png')


# ---- architectures and optimizers ----------------------------------------------------------------

@pytest.mark.processor
@pytest.mark.parametrize('knobs', [
    dict(optimizer='muon'),
    dict(pos='rope', norm='post', qk_norm=True, activation='relu2', dropout=0.1),
    dict(label_smoothing=0.1, layer_drop=0.2, grad_checkpointing=True, bias=False,
         tie_weights=False),
    dict(dtype='bfloat16', flash=False),
    dict(grad_clip=0, decay_lr=False, weight_decay=0),
])
def test_every_knob_trains(mini, script, knobs):
    result = script('train.py', *TINY, *flags(**knobs), '--max_iters=30', '--lr_decay_iters=30')
    assert result.code == 0, result.err
    losses = column('out/log.csv', 'val_loss')
    assert losses[-1] < losses[0] - 0.3


def split_attention(name, matrix):
    """Return q, k and v of an attention's joint matrix (3C, C); other matrices stay whole."""
    if 'c_attn' in name:
        return matrix.detach().chunk(3)
    return [matrix.detach()]


def torch_muon(weight, gradient):
    """Return a matrix after one step of torch's own Muon."""
    alone = torch.nn.Parameter(weight.clone())
    alone.grad = gradient.clone()
    torch.optim.Muon([alone], lr=0.02, weight_decay=0.1).step()
    return alone.detach()


@pytest.mark.processor
def test_muon_does_what_torch_does_to_separate_matrices(mini, script, monkeypatch):
    """One step from the same weights equals torch's Muon with q, k and v as three parameters.

    torch's Muon multiplies in bf16 on every processor; the test makes ours do the same."""
    monkeypatch.setattr(optimizers, 'has_bf16', lambda device: True)
    polynomial = (3.4445, -4.775, 2.0315)   # torch's coefficients
    monkeypatch.setattr(optimizers, 'POLAR', (polynomial,) * 5)
    muon = [*TINY, '--optimizer=muon', '--warmup_iters=0', '--grad_clip=0']
    script('train.py', *muon, '--max_iters=0')
    os.rename('out', 'start')
    script('train.py', *muon, '--max_iters=1')
    net = checkpoint.build_model(checkpoint.load('start/last.pt'), '')
    windows = TrainingWindows(Dataset('mini'), 'train', 16, 1337)
    logits, loss = net(*windows.batch(0, 4))
    loss.backward()
    after = weights('out/last.pt')
    for name, p in net.transformer.h.named_parameters():
        if p.dim() != 2:
            continue
        before = split_attention(name, p)
        gradients = split_attention(name, p.grad)
        ours = split_attention(name, after['transformer.h.' + name])
        for old, gradient, new in zip(before, gradients, ours, strict=True):
            theirs = torch_muon(old, gradient)
            # bf16 rounds differently because ours multiplies several matrices at a time
            assert (theirs - new).norm() < 0.05 * (theirs - old).norm(), name


@pytest.mark.processor
@pytest.mark.parametrize('has_bf16, expected', [(False, torch.float32), (True, torch.bfloat16)])
def test_muon_multiplies_in_bf16_only_in_hardware(mini, script, monkeypatch, has_bf16, expected):
    dtypes = []
    orthogonalized = optimizers.orthogonalized

    def noting_dtypes(x, eps):
        dtypes.append(x.dtype)
        return orthogonalized(x, eps)
    monkeypatch.setattr(optimizers, 'orthogonalized', noting_dtypes)
    monkeypatch.setattr(optimizers, 'has_bf16', lambda device: has_bf16)
    assert script('train.py', *TINY, '--optimizer=muon', '--max_iters=1').code == 0
    assert dtypes == [expected] * 3   # a call for each of the three shapes of matrices


def test_zero_init_starts_at_the_uniform_distribution(mini, script):
    """An untied head and the end of every branch start at 0."""
    script('train.py', *TINY, '--zero_init', '--tie_weights=False', '--max_iters=0')
    start = weights('out/last.pt')
    zeros = {name for name, p in start.items() if p.dim() == 2 and not p.any()}
    assert zeros == {'lm_head.weight',
                     'transformer.h.0.attn.c_proj.weight',
                     'transformer.h.0.mlp.c_proj.weight',
                     'transformer.h.1.attn.c_proj.weight',
                     'transformer.h.1.mlp.c_proj.weight'}
    uniform = math.log(len(start['lm_head.weight']))
    assert column('out/log.csv', 'val_loss')[-1] == pytest.approx(uniform, abs=1e-5)


def test_zero_init_leaves_a_tied_head_as_gpt2s(mini, script):
    script('train.py', *TINY, '--zero_init', '--max_iters=0')
    assert weights('out/last.pt')['lm_head.weight'].any()


def test_large_vocabularies_are_padded_to_a_multiple_of_64(script, folder):
    """nanoGPT pads GPT-2's vocabulary to 50,304. Sampling never draws the padding."""
    os.makedirs('data/wide')
    chars = ''.join(chr(0x4e00 + i) for i in range(5000))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5000, (400,), generator=generator).numpy().astype('<u2')
    for split in ('train', 'val'):
        tokens.tofile(f'data/wide/{split}.bin')
    tokenizer = dict(kind='char', chars=chars)
    meta = dict(tokenizer=tokenizer, dtype='uint16', splits={}, source={})
    Path('data/wide/meta.json').write_text(json.dumps(meta))
    assert script('train.py', *TINY, '--dataset=wide', '--max_iters=2').code == 0
    assert weights('out/last.pt')['lm_head.weight'].shape == (5056, 16)
    hot = flags(device='cpu', temperature=50, max_new_tokens=300, start=chars[0])
    text = script('sample.py', *hot).out
    assert set(text.rstrip('\n')) <= set(chars)


def test_a_padded_vocabulary_samples_while_training(mini, script):
    """A nanoGPT checkpoint has more rows than its tokenizer has symbols."""
    script('train.py', *TINY, '--max_iters=2')
    loaded = checkpoint.load('out/last.pt')
    wte = loaded['model']['transformer.wte.weight']
    loaded['model_args']['vocab_size'] += 9
    for name in ('transformer.wte.weight', 'lm_head.weight'):
        loaded['model'][name] = torch.cat((wte, 40 * wte[:9]))
    for tensors in loaded['optimizer'][0]['state'].values():
        for key, value in tensors.items():
            if value.shape == wte.shape:
                tensors[key] = torch.cat((value, value[:9]))
    loaded['best_val_loss'] = torch.tensor(loaded['best_val_loss'])
    checkpoint.save('out/last.pt', loaded)
    more = flags(init_from='resume', max_iters=4, sample_interval=1)
    assert script('train.py', *TINY, *more).code == 0


# ---- exactness -----------------------------------------------------------------------------------

@pytest.mark.processor
@pytest.mark.parametrize('knobs', [
    dict(dropout=0.2, gradient_accumulation_steps=2),
    dict(optimizer='muon', dtype='bfloat16', dropout=0.1),
])
def test_ten_steps_equal_five_and_five_after_a_resume(mini, script, knobs):
    """Weights, optimizer state and log are equal to the bit."""
    common = [*TINY, *flags(**knobs)]
    script('train.py', *common, '--out_dir=whole')
    script('train.py', *common, '--out_dir=parts', '--max_iters=5')
    result = script('train.py', *common, '--out_dir=parts', '--init_from=resume')
    assert 'resumed from parts/last.pt at iter 5' in result.err
    assert 'at the start' not in result.err
    assert same_weights('whole/last.pt', 'parts/last.pt')
    assert without_times('whole/log.csv') == without_times('parts/log.csv')
    whole = torch.load('whole/last.pt', weights_only=True)
    parts = torch.load('parts/last.pt', weights_only=True)
    assert str(whole['optimizer']) == str(parts['optimizer'])


def test_a_resumed_run_has_the_knobs_it_began_with(mini, script):
    script('train.py', *TINY, '--out_dir=whole')
    script('train.py', *TINY, '--max_iters=5')
    more = flags(init_from='resume', max_iters=10, device='cpu', dtype='float32')
    assert script('train.py', *more).code == 0
    assert checkpoint.load('out/last.pt')['iter_num'] == 10
    assert same_weights('whole/last.pt', 'out/last.pt')


def test_knobs_of_the_optimizer_can_change_at_a_resume(mini, script):
    script('train.py', *TINY, '--max_iters=5', '--weight_decay=0')
    changed = flags(init_from='resume', max_iters=10, weight_decay=0.5, beta1=0.8)
    script('train.py', *TINY, *changed)
    matrices, vectors = checkpoint.load('out/last.pt')['optimizer'][0]['param_groups']
    assert matrices['weight_decay'] == 0.5
    assert vectors['weight_decay'] == 0.0
    assert matrices['betas'][0] == 0.8


@pytest.mark.processor
def test_evaluating_and_sampling_never_move_training(mini, script):
    script('train.py', *TINY, '--dropout=0.1')
    more_often = flags(eval_interval=3, eval_iters=5, sample_interval=2)
    script('train.py', *TINY, '--dropout=0.1', '--out_dir=other', *more_often)
    assert same_weights('out/last.pt', 'other/last.pt')
    losses = [row['train_loss'] for row in read_log('out/log.csv')]
    assert losses == [row['train_loss'] for row in read_log('other/log.csv')]


@pytest.mark.processor
def test_accumulation_equals_a_larger_batch(mini, script):
    """One batch of 8 equals four of 2: the same windows, the same mean loss, the same step."""
    common = [*TINY, '--eval_iters=1000']
    large = flags(out_dir='large', batch_size=8, gradient_accumulation_steps=1)
    small = flags(out_dir='small', batch_size=2, gradient_accumulation_steps=4)
    script('train.py', *common, *large)
    script('train.py', *common, *small)
    assert_logs_agree('large/log.csv', 'small/log.csv', 'train_loss', 'val_loss')


# A thread of torch that is still alive when Python shuts down can abort the process. So a rank
# skips Python's shutdown, and still calls the functions that were registered with atexit.
ABORT_AT_SHUTDOWN = '''
import atexit
import os
class Thread:
    def __del__(self, abort=os.abort):
        abort()
if 'RANK' in os.environ:
    caught = Thread()
    atexit.register(lambda: open('exit-' + os.environ['RANK'], 'w').close())
'''


def test_several_ranks_equal_one_process(mini, script, process):
    """torchrun with gloo on the CPU: the same losses from the same global batch."""
    common = [*TINY, '--gradient_accumulation_steps=6', '--max_iters=5', '--eval_iters=1000']
    script('train.py', *common, '--out_dir=one')
    Path('sitecustomize.py').write_text(ABORT_AT_SHUTDOWN)
    done = process('train.py', *common, '--out_dir=many', launcher=torchrun(ranks=3),
                   env=dict(PYTHONPATH='.'))
    assert done.returncode == 0, done.stderr
    assert len(list(Path().glob('exit-*'))) == 3
    columns = ['train_loss', 'val_loss', 'grad_norm']
    assert_logs_agree('one/log.csv', 'many/log.csv', *columns)
    assert not any(name.startswith('module') for name in weights('many/last.pt'))


def test_micro_steps_that_ranks_cannot_share_are_refused(mini, process):
    argv = [*TINY, '--gradient_accumulation_steps=3']
    done = process('train.py', *argv, launcher=torchrun(ranks=2))
    error, = [line for line in done.stderr.splitlines() if 'error: ' in line]   # of one rank alone
    assert done.returncode != 0
    assert 'does not divide by 2 ranks' in error
    assert 'type --gradient_accumulation_steps=4' in error
    assert not os.path.exists('out')


# ---- signals -------------------------------------------------------------------------------------

@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_after_a_step_that_is_saved(mini, number):
    """The exit code is 128 + signal, and the message says how to resume."""
    endless = flags(eval_interval=100_000, max_iters=100_000, decay_lr=False)
    run = start_training(*TINY, *endless, '--out_dir=out a')
    for line in run.stderr:
        if line.startswith('iter 20: loss'):
            run.send_signal(number)
            break
    rest = run.stderr.read()
    assert run.wait(60) == 128 + number
    assert f'signal {int(number)}: saved out a/last.pt' in rest
    assert "type --init_from=resume --out_dir='out a' to go on" in rest   # quoted for a shell
    assert 'Traceback' not in rest
    stopped = checkpoint.load('out a/last.pt')['iter_num']
    assert stopped > 20
    assert len(read_log('out a/log.csv')) == stopped


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_rank_that_waits_for_the_others_ends_at_a_signal(mini, number):
    """When a rank dies at the start, torchrun signals the others. None may wait for SIGKILL."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    alone = dict(RANK='0', LOCAL_RANK='0', WORLD_SIZE='2',
                 MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    run = start_training(*TINY, '--gradient_accumulation_steps=2', **alone)
    try:
        wait_for_a_listener(port)   # rank 0 listens while it waits for rank 1
        run.send_signal(number)
        assert run.wait(10) == -number
    finally:
        run.kill()
        run.stderr.close()


def wait_for_a_listener(port):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket() as s:
            if s.connect_ex(('127.0.0.1', port)) == 0:
                return
        time.sleep(0.05)
    pytest.fail('rank 0 never listened')


# ---- time, targets and the learning rate ---------------------------------------------------------

# a run that ends after 0.6 seconds of training
LONG = [*TINY, *flags(max_iters=1_000_000, lr_decay_iters=1_000_000, eval_interval=1_000_000,
                      warmup_iters=0, min_lr=1e-4, max_minutes=0.01)]


def test_a_time_limit_that_is_not_reached_changes_nothing(mini, script):
    """Weights and log are equal to the bit, and no message speaks of the limit."""
    script('train.py', *TINY, '--dropout=0.1', '--out_dir=free')
    limited = script('train.py', *TINY, '--dropout=0.1', '--max_minutes=30')
    assert limited.code == 0
    assert 'max_minutes' not in limited.err
    assert same_weights('free/last.pt', 'out/last.pt')
    assert without_times('free/log.csv') == without_times('out/log.csv')


def test_a_time_limit_ends_a_run_with_its_schedule_decayed(mini, script):
    """The end is a normal one: the whole validation split, last.pt, and 'done'."""
    result = script('train.py', *LONG)
    assert result.code == 0, result.err
    rows = read_log('out/log.csv')
    steps = int(rows[-1]['iter'])
    assert 1 < steps < 1_000_000
    assert rows[-1]['val_loss']
    assert float(rows[-1]['seconds']) >= 0.6
    assert checkpoint.load('out/last.pt')['iter_num'] == steps
    for words in ('from here the learning rate follows max_minutes=0.01',
                  f'max_minutes=0.01 was reached after {steps:,} of max_iters=1,000,000 steps',
                  'on the whole split',
                  f'done: {steps:,} steps',
                  'type --max_minutes=0 for all 1,000,000 steps'):
        assert words in result.err, words
    check_rates_follow_time(rows[:-1])


def check_rates_follow_time(rows):
    """Check each rate: the cosine at the larger of two shares, of all steps and of 0.6 s."""
    before = 0.0   # seconds of training when the step began
    for row in rows:
        done = max(int(row['iter']) / 1_000_000, min(1, before / 0.6))
        expected = 1e-4 + (1e-2 - 1e-4) * 0.5 * (1 + math.cos(math.pi * done))
        assert float(row['lr']) == pytest.approx(expected, rel=0.01, abs=3e-5)
        before = float(row['seconds'])


def test_a_time_limit_shorter_than_a_step_makes_one_step(mini, script):
    result = script('train.py', *LONG, '--max_minutes=1e-9')
    assert result.code == 0
    assert 'done: 1 step in' in result.err
    assert read_log('out/log.csv')[-1]['val_loss']


def test_a_run_past_its_time_is_trained_further_only_with_more_minutes(mini, script):
    """Resumed with the same minutes, the run ends without a step and says what to type."""
    script('train.py', *LONG)
    steps = checkpoint.load('out/last.pt')['iter_num']
    again = script('train.py', '--init_from=resume', '--device=cpu')
    assert again.code == 0
    assert 'there is nothing left to train; type --max_minutes=6' in again.err
    unchanged = checkpoint.load('out/last.pt')
    assert unchanged['iter_num'] == steps
    seconds = unchanged['seconds']
    limit = flags(max_minutes=(seconds + 0.6) / 60)
    more = script('train.py', '--init_from=resume', '--device=cpu', *limit)
    assert more.code == 0
    assert checkpoint.load('out/last.pt')['iter_num'] > steps
    assert float(read_log('out/log.csv')[-1]['seconds']) >= seconds + 0.599


def test_a_time_limit_without_decay_ends_at_a_constant_rate(mini, script):
    result = script('train.py', *LONG, '--decay_lr=False')
    assert result.code == 0
    constant = 'with decay_lr=False the run of max_minutes=0.01 ends at a constant rate'
    assert constant in result.err
    assert 'decayed' not in result.err
    assert 'learning rate follows' not in result.err
    assert {row['lr'] for row in read_log('out/log.csv') if row['lr']} == {'0.01'}


FAST_CLOCK_ON_RANK_1 = f'''
import os
import runpy
import time
clock = time.perf_counter
if os.environ['RANK'] == '1':
    time.perf_counter = lambda: 3 * clock()
runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')
'''


def test_a_time_limit_ends_all_ranks_after_the_same_step(mini, forked):
    """One rank's clock runs three times as fast, and no rank waits for the other forever."""
    Path('start.py').write_text(FAST_CLOCK_ON_RANK_1)
    forked([2, str(mini / 'start.py'), *LONG, '--gradient_accumulation_steps=2'])
    steps = checkpoint.load('out/last.pt')['iter_num']
    assert 1 <= steps < 1_000_000
    assert int(read_log('out/log.csv')[-1]['iter']) == steps


@pytest.mark.processor
@pytest.mark.pictures   # the reported time must not include drawing
def test_target_loss_ends_a_run_at_the_first_evaluation_below(mini, script):
    """The loss is that of the whole split. The run reports its seconds and saves its weights."""
    sixty = flags(max_iters=60, lr_decay_iters=60, eval_interval=20)
    result = script('train.py', *TINY, *sixty, '--target_loss=2.9')
    assert result.code == 0
    reached = re.search(r'reached target_loss=2.9 after (20|40) steps: '
                        r'([\d.]+) s of training, evaluations excluded; ([\d.]+) s', result.err)
    steps, training, everything = reached.groups()
    assert 0 < float(training) <= float(everything)
    last = read_log('out/log.csv')[-1]
    assert last['iter'] == steps
    assert float(last['val_loss']) < 2.9
    assert float(last['seconds']) == pytest.approx(float(training), abs=0.051)
    evaluated = script('evaluate.py', '--device=cpu', '--dtype=float32', '--json=-')
    loss = json.loads(evaluated.out)['nats_per_token']
    assert loss == pytest.approx(float(last['val_loss']), abs=1e-5)


def test_a_target_loss_that_is_not_reached_is_reported(mini, script):
    missed = script('train.py', *TINY, '--max_iters=2', '--target_loss=0.001')
    assert missed.code == 0
    assert 'target_loss=0.001 was not reached in max_iters=2' in missed.err


def test_cooldown_is_a_straight_line_over_the_last_share_of_steps(mini, script):
    twenty = flags(max_iters=20, lr_decay_iters=20, warmup_iters=4, cooldown=0.5, min_lr=1e-3)
    script('train.py', *TINY, *twenty)
    warm_up = [1e-2 * (i + 1) / 5 for i in range(4)]
    peak = [1e-2] * 6
    line = [1e-2 - 9e-3 * i / 10 for i in range(10)]
    assert column('out/log.csv', 'lr') == pytest.approx(warm_up + peak + line, rel=1e-5)


# ---- configs and datasets ------------------------------------------------------------------------

NANOGPT_CONFIG = '''
# train a miniature character-level model
import time
out_dir = 'out-mini'
eval_interval = 5 # keep frequent because we'll overfit
eval_iters = 2
log_interval = 1
always_save_checkpoint = False
wandb_log = False
wandb_project = 'mini'
wandb_run_name = 'mini-' + str(time.time())
dataset = 'mini'
gradient_accumulation_steps = 1
batch_size = 4
block_size = 16
n_layer = 2
n_head = 2
n_embd = 2 * 8
dropout = 0.2
learning_rate = 1e-3
max_iters = 10
lr_decay_iters = 10
min_lr = learning_rate / 10
beta2 = 0.99
warmup_iters = 1
bias = False
device = 'cpu'
compile = False
'''


def test_a_nanogpt_config_runs_unchanged(mini, script):
    Path('c.py').write_text(NANOGPT_CONFIG)
    assert script('train.py', 'c.py', '--dtype=float32').code == 0
    assert checkpoint.load('out-mini/last.pt')['iter_num'] == 10
    sample = flags(out_dir='out-mini', device='cpu', max_new_tokens=3)
    assert script('sample.py', *sample).code == 0


def test_the_main_config_on_a_gpu_is_nanogpts():
    knobs = knobs_on_a_gpu('config/train_shakespeare_char.py')
    nanogpts = dict(
        dataset='shakespeare_char', batch_size=64, gradient_accumulation_steps=1,
        n_layer=6, n_head=6, n_embd=384, block_size=256, dropout=0.2,
        learning_rate=1e-3, min_lr=1e-4, beta2=0.99, warmup_iters=100, max_iters=5000)
    assert {key: knobs[key] for key in nanogpts} == nanogpts


# a python that does not pause between the tries of a download
IMPATIENT_PYTHON = f'''#!/bin/sh
exec {PYTHON} -c '
import os, runpy, sys, time
time.sleep = lambda seconds: None
del sys.argv[0]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")' "$@"
'''


def test_a_missing_dataset_is_prepared(folder, script, monkeypatch):
    """Without a network the main config trains on the stand-in, and says so in every run."""
    python = folder / 'python'
    python.write_text(IMPATIENT_PYTHON)
    python.chmod(0o755)
    monkeypatch.setattr('conftest.PYTHON', str(python))
    for variable in ('HTTPS_PROXY', 'https_proxy'):
        monkeypatch.setenv(variable, 'http://127.0.0.1:9')   # nothing listens there
    short = flags(max_iters=1, eval_iters=1, sample_interval=0, n_layer=1, n_head=1, n_embd=12,
                  batch_size=2, block_size=4096, device='cpu')
    for run in range(2):
        result = script('train.py', 'config/train_shakespeare_char.py', *short)
        assert result.code == 0, result.err
        assert ('running prepare_shakespeare.py' in result.err) == (run == 0)
        for words in ('THIS IS NOT TINY SHAKESPEARE',
                      'the download failed',
                      'python prepare_shakespeare.py --tokenizer=char'):
            assert words in result.err
    meta = json.loads(Path('data/shakespeare_char/meta.json').read_text())
    assert meta['source']['stand_in'] is True


def test_prepare_makes_only_the_dataset_that_is_missing(mini, refused):
    """The prepare script of another dataset is refused, and so is text that is not a script."""
    other = '--prepare=prepare_shakespeare.py --tokenizer=char'
    refused('train.py', *TINY, '--dataset=shakespeare', other, words=['makes shakespeare_char'])
    for prepare in ("'", ' ', 'nofile.py'):
        refused('train.py', *TINY, '--dataset=nope', f'--prepare={prepare}', words=['--prepare='])


def test_a_stand_in_never_replaces_a_dataset(mini, refused, monkeypatch):
    monkeypatch.setattr('time.sleep', lambda s: None)
    os.rename('data/mini', 'data/shakespeare_char')
    before = Path('data/shakespeare_char/meta.json').read_text()
    refused('prepare_shakespeare.py', '--url=http://127.0.0.1:9/x', '--stand_in')
    assert Path('data/shakespeare_char/meta.json').read_text() == before


@pytest.mark.parametrize('name', ['other', 'mini'])
def test_resuming_on_another_text_starts_a_new_best_loss(mini, script, name):
    """The text has another name, or the same name and new content. The old best.pt is kept."""
    script('train.py', *TINY)
    before = Path('out/best.pt').read_bytes()
    tokenizer = CharTokenizer(TEXT)
    noise = ''.join(random.Random(0).choices(tokenizer.chars, k=3000))   # a higher loss than TEXT
    write_text(name, noise, tokenizer)
    more = flags(init_from='resume', dataset=name, max_iters=20, device='cpu')
    result = script('train.py', *more)
    assert result.code == 0, result.err
    assert 'another text' in result.err
    assert 'best-earlier-1.pt' in result.err
    assert Path('out/best-earlier-1.pt').read_bytes() == before
    best = checkpoint.load('out/best.pt')
    assert best['iter_num'] >= 10
    assert best['data']['name'] == name
    again = script('train.py', '--init_from=resume', '--max_iters=22', '--device=cpu')
    assert again.code == 0
    assert 'another text' not in again.err


def test_resuming_on_another_vocabulary_is_refused(mini, script, refused):
    script('train.py', *TINY, '--max_iters=2')
    write_text('other', '0123456789abcdef' * 50)
    before = Path('out/last.pt').read_bytes()
    other = ['--init_from=resume', '--dataset=other']
    refused('train.py', *TINY, *other, words=['another tokenizer', '--dataset'])
    assert Path('out/last.pt').read_bytes() == before


def test_characters_that_a_model_lacks_are_named(mini, script, refused):
    """The error names the first 20 and counts all. It also tells where only the order differs."""
    assert script('train.py', *TINY, '--max_iters=1', '--out_dir=o p').code == 0
    alphabet = ''.join(map(chr, range(0x3b1, 0x3ca)))
    write_text('accents', 'was für ein Ärger' * 50)
    write_text('greek', f'the miller {alphabet}' * 50)
    write_text('fewer', 'the miller said' * 50)
    resume = [*TINY, '--out_dir=o p', '--init_from=resume']
    advice = ['--dataset=NAME',
              'python prepare_text.py --input=FILE --name=NAME ',
              "--tokenizer='FROM:o p/last.pt'"]
    lacking = ['o p/last.pt', 'data/accents', "lacks 4 of its characters: 'g', 'n', 'Ä', 'ü';"]
    refused('train.py', *resume, '--dataset=accents', words=[*lacking, *advice])
    lacking = ["lacks 25 of its characters: 'α', ", "'τ', ...;"]
    line = refused('train.py', *resume, '--dataset=greek', words=[*lacking, *advice])
    assert "'υ'" not in line
    numbered = ['numbers them differently']
    line = refused('train.py', *resume, '--dataset=fewer', words=[*numbered, *advice])
    assert 'lacks' not in line


@pytest.mark.parametrize('state', [
    3,
    ['char'],
    dict(chars='abc'),
    dict(kind='char'),
    dict(kind=['char']),
    dict(kind='char', chars=7),
])
def test_a_malformed_tokenizer_counts_as_another_one(mini, trained, refused, state):
    os.mkdir('out')
    loaded = checkpoint.load(str(trained / 'last.pt'))
    checkpoint.save('out/last.pt', loaded | dict(tokenizer=state))
    words = ['another tokenizer', '--dataset=NAME']
    line = refused('train.py', '--init_from=resume', '--device=cpu', words=words)
    assert 'FROM:' not in line   # a malformed tokenizer has no vocabulary to take


def test_an_unusable_validation_split_is_found_before_anything_moves(mini, script, refused):
    script('train.py', *TINY, '--max_iters=2')
    path = Path('data/mini/meta.json')
    meta = json.loads(path.read_text())
    del meta['splits']['val']
    path.write_text(json.dumps(meta))
    os.truncate('data/mini/val.bin', 2)
    refused('train.py', *TINY, words=['val', 'use more text'])
    assert not os.path.exists('out/earlier-1')


def test_a_resume_keeps_dtype_and_data_dir(mini, script):
    os.rename('data', 'elsewhere')
    script('train.py', *TINY, '--max_iters=2', '--data_dir=elsewhere')
    result = script('train.py', '--init_from=resume', '--max_iters=4', '--device=cpu')
    assert result.code == 0
    assert 'dtype float32' in result.err


# ---- mistakes and damaged files ------------------------------------------------------------------

@pytest.mark.parametrize('argv, words', [
    (['--learning_rte=1'], ['learning_rte', '--learning_rate']),
    (['--max_iters=ten'], ['whole number']),
    (['--max_iters=-1'], ['max_iters=-1']),
    (['--max_minutes=-1'], ['max_minutes=-1', '0']),
    (['--dataset=nope'], ['data/nope', 'prepare']),
    (['--dataset=../mini'], ["'../mini'", 'not a name']),
    (['--block_size=50000'], ['block_size=50000', 'type --block_size=']),
    (['--block_size=0'], ['block_size=0', '1 or more']),
    (['--n_head=3'], ['n_embd=16', 'n_head=3', '--n_head=']),
    (['--n_head=0'], ['n_head=0']),
    (['--n_layer=-1'], ['n_layer=-1']),
    (['--n_layer=' + '9' * 30], ['n_layer']),
    (['--n_embd=1000000007'], ['n_embd=1000000007']),
    (['--n_embd=1000000', '--n_head=1'], ['GiB', '--n_embd']),
    (['--dtype=float16'], ['float16', 'GPU', '--dtype=auto']),
    (['--dtype=int8'], ['int8', 'float32, bfloat16, float16']),
    (['--device=tpu'], ['tpu', '--device=auto']),
    (['--compile=maybe'], ['maybe', 'auto, True, False']),
    (['--compile=0'], ['compile=0', 'True, False']),
    (['--compile=1'], ['compile=1']),
    (['--out_dir=file/run'], ['file/run', '--out_dir']),
    (['--batch_size=0'], ['batch_size=0']),
    (['--batch_size=' + '9' * 15], ['GiB', '--batch_size']),
    (['--eval_interval=0'], ['eval_interval=0']),
    (['--gradient_accumulation_steps=0'], ['gradient_accumulation_steps=0']),
    (['--learning_rate=-1'], ['learning_rate=-1']),
    (['--lr_decay_iters=soon'], ['lr_decay_iters']),
    (['--cooldown=0.5', '--decay_lr=False'], ['cooldown=0.5', 'decay_lr=True', '--cooldown=0']),
    (['--seed=-5'], ['seed=-5']),
    (['--seed=' + '9' * 25], ['seed=']),
    (['--optimizer=sgd'], ['adamw, muon']),
    (['--pos=sin'], ['learned, rope, none']),
    (['--dropout=1'], ['dropout=1', 'below 1']),
    (['--beta2=1'], ['below 1']),
    (['--init_from=gpt5'], ['gpt5', 'mean gpt2']),
    (['--init_from=resume', '--out_dir=empty'], ['no checkpoint', 'empty/last.pt']),
])
def test_mistakes_are_refused_before_anything_is_written(mini, refused, argv, words):
    Path('file').write_text('a file where a folder should be')
    refused('train.py', *TINY, *argv, words=words)
    assert not os.path.exists('out')
    assert not os.path.exists('empty')


def test_a_gpu_that_is_not_there_is_refused(mini, refused):
    if torch.cuda.is_available():
        pytest.skip('this machine has a GPU')
    refused('train.py', *TINY, '--device=cuda', words=['device=cuda', 'cpu', '--device=auto'])


def test_a_token_file_that_differs_from_meta_json_is_refused(mini, refused):
    with open('data/mini/train.bin', 'ab') as f:
        f.write(b'\0\0')
    refused('train.py', *TINY, words=['disagrees with meta.json'])


def test_a_resumed_run_cannot_change_its_shape_or_optimizer(mini, script, refused):
    script('train.py', *TINY, '--max_iters=1')
    resume = [*TINY, '--init_from=resume']
    refused('train.py', *resume, '--n_layer=3', words=['n_layer=3', 'n_layer=2'])
    refused('train.py', *resume, '--optimizer=muon', words=['optimizer=muon'])


@pytest.mark.parametrize('content', [b'', b'not a checkpoint', b'PK\x03\x04' + b'\0' * 100])
def test_a_damaged_checkpoint_is_refused(mini, refused, content):
    os.makedirs('out')
    Path('out/last.pt').write_bytes(content)
    words = ['out/last.pt', 'damaged']
    refused('train.py', *TINY, '--init_from=resume', words=words)
    refused('sample.py', '--checkpoint=out/last.pt', '--device=cpu', words=words)


def test_a_loss_that_is_not_finite_ends_the_run_and_saves_nothing(mini, script, refused):
    script('train.py', *TINY)
    last = Path('out/last.pt').read_bytes()
    best = Path('out/best.pt').read_bytes()
    explode = flags(init_from='resume', max_iters=200, learning_rate=1e18, decay_lr=False,
                    grad_clip=0, eval_interval=1000, norm='pre')
    words = ['no longer finite', 'learning rate', 'gradient norm', '--learning_rate']
    refused('train.py', *TINY, *explode, words=words)
    assert Path('out/last.pt').read_bytes() == last
    assert Path('out/best.pt').read_bytes() == best


@pytest.mark.parametrize('learning_rate, diverged', [(30, True), (1e-2, False), (0, False)])
def test_a_run_that_diverged_is_told_so(mini, script, learning_rate, diverged):
    """The loss is finite and far above that of equal odds."""
    result = script('train.py', *TINY, f'--learning_rate={learning_rate}', '--min_lr=0')
    assert result.code == 0, result.err
    assert ('this run diverged; type a lower --learning_rate' in result.err) == diverged
    assert ('equal odds for all tokens' in result.err) == diverged
    assert not re.search(r'perplexity \d{7}', result.err)   # a huge one is shown as 1.2e+09


def test_a_text_learned_by_heart_is_not_called_diverged(mini, script):
    tokenizer = CharTokenizer('abcd')
    splits = {split: [(tokenizer.encode(text), len(text))]
              for split, text in (('train', 'ab' * 200), ('val', 'cd' * 200))}
    source = dict(name='', url=None, sha256='', stand_in=False)
    write_dataset('data/heart', splits, tokenizer, source)
    result = script('train.py', *TINY, '--dataset=heart', '--max_iters=100', '--learning_rate=5e-2',
                    '--decay_lr=False', '--warmup_iters=0', '--eval_interval=100')
    assert result.code == 0, result.err
    assert 'learned the training text by heart; type a higher --dropout' in result.err
    assert 'diverged' not in result.err


def test_one_step_is_not_called_steps(mini, script):
    result = script('train.py', *TINY, '--max_iters=1')
    assert 'done: 1 step in ' in result.err
    assert '(1 each on 1 rank) = 64' in result.err


@pytest.mark.pictures
@pytest.mark.parametrize('position, value, plotted', [
    pytest.param(2, 'edited', False, id='a word as a loss'),
    pytest.param(0, '\u00b2', True, id='a superscript as a step'),
    pytest.param(0, '9' * 5000, True, id='a step of 5,000 digits'),
    pytest.param(1, '9' * 400, False, id='a number of tokens above all floats'),
    pytest.param(3, '"' + 'x' * 200_000, True, id='an open quote'),
])
def test_an_edited_log_does_not_stop_a_run(mini, script, position, value, plotted):
    script('train.py', *TINY, '--max_iters=5')
    log = Path('out/log.csv')
    lines = log.read_text().splitlines()
    cells = lines[2].split(',')
    cells[position] = value
    lines[2] = ','.join(cells)
    log.write_text('\n'.join(lines) + '\n')
    result = script('train.py', *TINY, '--init_from=resume')
    assert result.code == 0, result.err
    assert not os.path.exists('out/log.csv.part')
    assert ('no out/loss.png from' not in result.err) == plotted


# ---- compilation ---------------------------------------------------------------------------------

@pytest.fixture
def no_compiler(monkeypatch):
    """Make every compiled function fail as on a machine without a C++ compiler."""
    def fail(*args, **kwargs):
        raise RuntimeError('InvalidCxxCompiler: No working C++ compiler found\nand more')
    monkeypatch.setattr(torch, 'compile', lambda f: fail)
    monkeypatch.setattr(torch, 'ones', lambda *args, **kwargs: None)   # no GPU is needed
    monkeypatch.setattr('platform.system', lambda: 'Linux')


def test_compile_auto_runs_eagerly_without_a_compiler(no_compiler):
    reason = 'InvalidCxxCompiler: No working C++ compiler found'
    note = f' (torch.compile does not work here: {reason})'
    assert runtime.find_compile('auto', 'cuda') == (False, note)
    assert runtime.find_compile('auto', 'cpu') == (False, '')
    assert runtime.find_compile(False, 'cuda') == (False, '')


def test_compile_by_name_is_refused_without_a_compiler(mini, process):
    nothing = dict(CXX='/bin/false', TORCHINDUCTOR_CACHE_DIR=str(mini / 'cache'))
    done = process('train.py', *TINY, '--compile=True', env=nothing)
    assert done.returncode == 2
    assert done.stderr.startswith('error: ')
    assert done.stderr.count('\n') == 1
    assert 'type --compile=False' in done.stderr


def test_compiled_code_has_a_folder_for_each_kind_of_processor(monkeypatch, folder):
    """Code that was compiled for one kind would compute other results on another."""
    monkeypatch.setattr(torch, 'compile', lambda f: f)
    monkeypatch.setenv('XDG_CACHE_HOME', str(folder))
    folders = set()
    for kind in ('AVX2', 'AVX512'):
        monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda kind=kind: kind)
        monkeypatch.delenv('TORCHINDUCTOR_CACHE_DIR')
        assert runtime.find_compile(True, 'cpu') == (True, '')
        folders.add(os.environ['TORCHINDUCTOR_CACHE_DIR'])
    assert len(folders) == 2
    for path in folders:
        assert path.startswith(str(folder))
        assert os.path.isdir(path)


# ---- the machine ---------------------------------------------------------------------------------

@pytest.mark.processor
def test_dtype_follows_the_hardware(monkeypatch):
    monkeypatch.setattr(runtime, 'cpu_has_bf16', lambda: True)
    assert runtime.find_dtype('auto', 'cpu') == 'bfloat16'
    monkeypatch.setattr(runtime, 'cpu_has_bf16', lambda: False)
    assert runtime.find_dtype('auto', 'cpu') == 'float32'
    assert runtime.find_dtype('auto', 'mps') == 'float32'
    expected = {(7, 5): 'float16', (8, 0): 'bfloat16', (9, 0): 'bfloat16'}
    for capability, dtype in expected.items():
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device, c=capability: c)
        assert runtime.find_dtype('auto', 'cuda:0') == dtype


@pytest.fixture
def with_mps(monkeypatch):
    """Let torch report that the machine has Apple's GPU."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)


def test_mps_that_fails_is_taken_only_by_name(with_mps, capfd):
    """The probe fails, since this machine has no such GPU."""
    assert runtime.find_device('auto') == 'cpu'
    assert 'mps' in capfd.readouterr().err
    assert runtime.find_device('mps') == 'mps'


def test_mps_is_taken_only_where_it_computes_correctly(with_mps, monkeypatch):
    """The probe runs on the CPU here, once as it is, once with a second result that is 1 % off."""
    computes_right = runtime.computes_right
    monkeypatch.setattr(runtime, 'computes_right', lambda device: computes_right('cpu'))
    assert runtime.find_device('auto') == 'mps'
    calls = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def wrong_the_second_time(q, k, v, is_causal):
        calls.append(1)
        result = attend(q, k, v, is_causal=is_causal)
        if len(calls) == 2:
            result = 1.01 * result
        return result
    monkeypatch.setattr(torch.nn.functional, 'scaled_dot_product_attention', wrong_the_second_time)
    assert runtime.find_device('auto') == 'cpu'
    assert len(calls) == 2


@pytest.mark.processor
def test_bf16_in_hardware_is_what_cpuinfo_lists():
    """ATEN_CPU_CAPABILITY can tell torch to treat the processor as an older one."""
    if not os.path.exists('/proc/cpuinfo'):
        pytest.skip('no /proc/cpuinfo to compare with')
    words = Path('/proc/cpuinfo').read_text().split()
    listed = 'avx512_bf16' in words or 'amx_tile' in words
    treated_as_older = os.environ.get('ATEN_CPU_CAPABILITY') in ('default', 'avx2')
    assert runtime.cpu_has_bf16() == (listed and not treated_as_older)


@pytest.mark.processor
def test_a_processor_with_avx2_alone_trains_in_fp32():
    ask = ('from lib import runtime; '
           'print(runtime.cpu_has_bf16(), runtime.find_dtype("auto", "cpu"))')
    done = subprocess.run([sys.executable, '-c', ask], cwd=ROOT, timeout=60, text=True,
                          capture_output=True, env={**os.environ, 'ATEN_CPU_CAPABILITY': 'avx2'})
    assert done.stdout == 'False float32\n', done.stderr


@pytest.mark.parametrize('name, peak', [
    ('NVIDIA H200', 989e12),
    ('NVIDIA A100-SXM4-80GB', 312e12),
    ('Tesla T4', 65e12),
    ('NVIDIA T400', None),
    ('NVIDIA L4', 121e12),
    ('NVIDIA L40', None),
    ('NVIDIA L40S', 362e12),
    ('NVIDIA A10G', 70e12),
    ('NVIDIA RTX A1000', None),
    ('NVIDIA GeForce GTX 1080', None),
    ('NVIDIA GeForce RTX 4090', 165e12),
])
def test_peak_flops_are_known_or_none(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: name)
    assert runtime.peak_flops('cuda') == peak
    assert runtime.peak_flops('cpu') is None
