"""train.py end to end on a small text: what it writes, exactness, bad input. pytest tests/test_train.py"""
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

import pytest
import torch
from conftest import PYTHON, ROOT, TEXT, TINY, read_log, same_weights, weights, without_times

from lib import checkpoint, optimizers, runtime


def flags(**knobs):
    return [f'--{key}={value}' for key, value in knobs.items()]


# ---- what a run leaves and says ------------------------------------------------------------------------------------

@pytest.mark.processor
@pytest.mark.pictures
def test_a_run(mini, script):
    result = script('train.py', *TINY, '--sample_interval=5')
    assert result.code == 0 and result.out == '' and 'Warning' not in result.err
    assert sorted(os.listdir('out')) == ['best.pt', 'config.json', 'last.previous.pt', 'last.pt', 'log.csv', 'loss.png']

    rows = read_log('out/log.csv')
    assert list(rows[0]) == ['iter', 'tokens', 'train_loss', 'val_loss', 'lr', 'grad_norm', 'tok_per_s', 'seconds']
    assert [int(row['iter']) for row in rows] == list(range(11)) and [int(row['tokens']) for row in rows] == list(range(0, 704, 64))
    assert [row['iter'] for row in rows if row['val_loss']] == ['0', '5', '10']
    assert abs(float(rows[0]['train_loss']) - math.log(len(set(TEXT)))) < 0.1 and float(rows[9]['train_loss']) < float(rows[0]['train_loss'])
    assert [float(row['lr']) for row in rows[:3]] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2], rel=1e-4)   # warm-up, then cosine
    floor = 6e-5
    assert float(rows[6]['lr']) == pytest.approx(floor + (1e-2 - floor) * 0.5 * (1 + math.cos(math.pi / 2)), rel=1e-4)

    last = torch.load('out/last.pt', weights_only=True)   # tensors and plain types only
    assert last['iter_num'] == 10 and last['model_args']['n_embd'] == 16 and last['tokenizer']['kind'] == 'char'
    assert last['config']['max_iters'] == 10 and last['best_val_loss'] > 0
    assert not any(name.startswith(('_orig_mod', 'module')) for name in last['model'])
    assert 'transformer.h.1.attn.c_attn.weight' in last['model']
    config = json.load(open('out/config.json'))
    assert config['device'] == 'cpu' and config['dtype'] == 'float32' and config['compile'] is False
    assert config['versions']['torch'] == torch.__version__ and config['learning_rate'] == 1e-2
    assert open('out/loss.png', 'rb').read(4) == b'\x89PNG'

    parameters = sum(p.numel() for name, p in last['model'].items() if name != 'lm_head.weight')
    for words in ('device cpu', f'{parameters:,} parameters', '4 batch x 16 block x 1 accumulation', '= 64', f'ln({len(set(TEXT))}) = {math.log(len(set(TEXT))):.4f}',
                  '-' * 40):
        assert words in result.err, words
    memory = int(re.search(r'done: 10 steps in 0m \d\ds and ([\d,]+) MB; val loss', result.err)[1].replace(',', ''))
    peak = next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM'))   # kB, of this process
    assert memory == pytest.approx(peak * 1024 / 1e6, abs=2)
    line = next(line for line in result.err.splitlines() if line.startswith('iter 3: loss'))
    assert re.fullmatch(r'iter 3: loss [\d.]+, perplexity [\d.]+ \| lr [\de.-]+ \| grad norm [\d.]+ \| [\d,]+ tok/s \| \S+ \S+ left', line)


@pytest.mark.processor
def test_final_loss_is_the_whole_split(mini, script):
    """The last val_loss, computed once more from the checkpoint, window by window."""
    script('train.py', *TINY)
    net = checkpoint.build_model(checkpoint.load('out/last.pt'), 'out/last.pt').eval()
    from lib.data import Dataset
    tokens = torch.from_numpy(Dataset('mini').split('val')[0].astype('int64'))
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, 16):
            piece = tokens[start:start + 17]
            logp = net(piece[None, :-1])[0].log_softmax(-1)
            nats -= logp[0].gather(1, piece[1:, None]).sum().item()
    assert float(read_log('out/log.csv')[-1]['val_loss']) == pytest.approx(nats / (len(tokens) - 1), abs=1e-5)


def test_best_is_the_lowest(mini, script):
    """A run made to get worse keeps the best it had; last.pt goes on."""
    script('train.py', *TINY, '--max_iters=40', '--decay_lr=False', '--learning_rate=3', '--weight_decay=0')
    losses = {int(row['iter']): float(row['val_loss']) for row in read_log('out/log.csv') if row['val_loss']}
    best, last = checkpoint.load('out/best.pt'), checkpoint.load('out/last.pt')
    assert best['iter_num'] < last['iter_num'] == 40
    assert losses[best['iter_num']] == pytest.approx(min(v for k, v in losses.items() if k < 40), abs=1e-6)


def test_max_iters_zero_and_eval_only(mini, script):
    assert script('train.py', *TINY, '--max_iters=0').code == 0
    assert checkpoint.load('out/last.pt')['iter_num'] == 0
    before = open('out/last.pt', 'rb').read(), open('out/log.csv').read()
    result = script('train.py', *TINY, '--init_from=resume', '--eval_only')
    assert result.code == 0 and 'on the whole split' in result.err
    assert before == (open('out/last.pt', 'rb').read(), open('out/log.csv').read())


def test_eval_only_makes_no_folder(mini, script, trained):
    result = script('export_hf.py', f'--out_dir={trained}', '--to=hf')
    before = sorted(os.listdir())
    result = script('train.py', *TINY, '--init_from=hf', '--eval_only')
    assert result.code == 0 and 'on the whole split' in result.err, result.err
    assert sorted(os.listdir()) == before


@pytest.mark.processor
@pytest.mark.parametrize('knobs', [dict(optimizer='muon'), dict(pos='rope', norm='post', qk_norm=True, activation='relu2', dropout=0.1),
                                   dict(label_smoothing=0.1, layer_drop=0.2, grad_checkpointing=True, bias=False, tie_weights=False),
                                   dict(dtype='bfloat16', flash=False), dict(grad_clip=0, decay_lr=False, weight_decay=0)])
def test_every_knob_trains(mini, script, knobs):
    assert script('train.py', *TINY, *flags(**knobs), '--max_iters=30', '--lr_decay_iters=30').code == 0
    rows = read_log('out/log.csv')
    assert float(rows[-1]['val_loss']) < float(rows[0]['val_loss']) - 0.3


@pytest.mark.processor
def test_muon_does_what_torch_does_to_separate_matrices(mini, script, monkeypatch):
    """One step from the same weights with q, k and v as three parameters of torch's own Muon.

    torch's multiplies in bf16 on every processor, so ours is made to do the same."""
    from lib.data import Dataset, TrainingWindows
    monkeypatch.setattr(optimizers, 'cpu_has_bf16', lambda: True)
    monkeypatch.setattr(optimizers, 'POLAR', ((3.4445, -4.775, 2.0315),) * 5)   # torch's polynomial
    script('train.py', *TINY, '--optimizer=muon', '--max_iters=0', '--warmup_iters=0', '--grad_clip=0')
    os.rename('out', 'start')
    script('train.py', *TINY, '--optimizer=muon', '--max_iters=1', '--warmup_iters=0', '--grad_clip=0')
    net = checkpoint.build_model(checkpoint.load('start/last.pt'), '')
    net(*TrainingWindows(Dataset('mini'), 'train', 16, 1337).batch(0, 4))[1].backward()
    after = weights('out/last.pt')
    for name, p in net.transformer.h.named_parameters():
        if p.dim() == 2:
            parts, grads = (t.detach().chunk(3) if 'c_attn' in name else (t.detach(),) for t in (p, p.grad))
            for part, grad, new in zip(parts, grads, after['transformer.h.' + name].split([len(part) for part in parts])):
                alone = torch.nn.Parameter(part.clone())
                alone.grad = grad.clone()
                torch.optim.Muon([alone], lr=0.02, weight_decay=0.1).step()
                # the difference is bf16's rounding, as ours multiplies several matrices at a time
                assert (alone.detach() - new).norm() < 0.05 * (alone.detach() - part).norm(), name


@pytest.mark.processor
def test_muon_without_bf16_hardware(mini, script, monkeypatch):
    """It multiplies in fp32 there, and in bf16 where the processor has it."""
    seen = []
    monkeypatch.setattr(optimizers, 'orthogonalized', lambda x, eps, its=optimizers.orthogonalized: seen.append(x.dtype) or its(x, eps))
    for has_bf16 in (False, True):
        monkeypatch.setattr(optimizers, 'cpu_has_bf16', lambda answer=has_bf16: answer)
        assert script('train.py', *TINY, '--optimizer=muon', '--max_iters=1').code == 0
    assert seen == [torch.float32] * 3 + [torch.bfloat16] * 3   # three shapes


def test_tensorboard(mini, script):
    pytest.importorskip('tensorboard')
    assert script('train.py', *TINY, '--tensorboard_log').code == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator('out/tensorboard').Reload()
    assert [round(e.value, 4) for e in events.Scalars('val_loss')] == [
        round(float(row['val_loss']), 4) for row in read_log('out/log.csv') if row['val_loss']]


def test_wandb(mini, script, monkeypatch):
    from types import SimpleNamespace
    rows = []
    fake = SimpleNamespace(init=lambda **options: rows.append(options), log=lambda row, step: rows.append((step, row)))
    monkeypatch.setitem(sys.modules, 'wandb', fake)
    assert script('train.py', *TINY, '--wandb_log', '--wandb_run_name=mine').code == 0
    assert rows[0]['name'] == 'mine' and [step for step, _ in rows[1:]] == list(range(11)) and 'val_loss' in rows[1][1]


@pytest.mark.parametrize('knob, package', [('wandb_log', 'wandb'), ('tensorboard_log', 'torch.utils.tensorboard')])
def test_tracker_that_is_not_installed(mini, refused, monkeypatch, knob, package):
    monkeypatch.setitem(sys.modules, package, None)
    refused('train.py', *TINY, f'--{knob}', words=[knob, 'pip install'])


def test_decay_typed_anew_holds_after_a_resume(mini, script):
    script('train.py', *TINY, '--max_iters=5', '--weight_decay=0')
    script('train.py', *TINY, '--init_from=resume', '--max_iters=10', '--weight_decay=0.5', '--beta1=0.8')
    groups = checkpoint.load('out/last.pt')['optimizer'][0]['param_groups']
    assert [group['weight_decay'] for group in groups] == [0.5, 0.0] and groups[0]['betas'][0] == 0.8


def test_characters_need_torch_and_numpy_alone(mini, process):
    """With every optional package out of reach, a run and its sample still work (nanoGPT #53: no requirements)."""
    hide = 'import sys; sys.modules.update(dict.fromkeys(["tiktoken", "requests", "matplotlib", "wandb", "tensorboard", "tqdm"]))'
    code = f'''
{hide}
import runpy
sys.path.insert(0, {str(ROOT)!r})
for name, *flags in {[['train.py', *TINY], ['sample.py', '--start=so', '--max_new_tokens=5']]!r}:
    sys.argv = [name, *flags]
    try:
        runpy.run_path({str(ROOT)!r} + '/' + name, run_name='__main__')
    except SystemExit as stop:
        assert not stop.code, (name, stop.code)
'''
    done = subprocess.run([sys.executable, '-W', 'error::FutureWarning', '-c', code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith('so') and len(done.stdout) == 8, done.stderr
    assert not os.path.exists('out/loss.png')


# ---- exactness -----------------------------------------------------------------------------------------------------

@pytest.mark.processor
@pytest.mark.parametrize('knobs', [dict(dropout=0.2, gradient_accumulation_steps=2), dict(optimizer='muon', dtype='bfloat16', dropout=0.1)])
def test_ten_steps_are_five_and_five(mini, script, knobs):
    """10 steps equal 5 + resume + 5 bit for bit, weights and log, whatever else was evaluated or sampled on the way."""
    script('train.py', *TINY, *flags(**knobs), '--out_dir=whole')
    script('train.py', *TINY, *flags(**knobs), '--out_dir=parts', '--max_iters=5')
    result = script('train.py', *TINY, *flags(**knobs), '--out_dir=parts', '--init_from=resume')
    assert 'resumed from parts/last.pt at iter 5' in result.err and 'at the start' not in result.err
    assert same_weights('whole/last.pt', 'parts/last.pt')
    assert without_times('whole/log.csv') == without_times('parts/log.csv')
    a, b = (torch.load(f'{run}/last.pt', weights_only=True)['optimizer'] for run in ('whole', 'parts'))
    assert str(a) == str(b)


def test_resume_takes_the_runs_own_knobs(mini, script):
    script('train.py', *TINY, '--max_iters=5')
    result = script('train.py', '--init_from=resume', '--max_iters=10', '--device=cpu', '--dtype=float32')
    assert result.code == 0 and checkpoint.load('out/last.pt')['iter_num'] == 10
    script('train.py', *TINY, '--out_dir=whole')
    assert same_weights('whole/last.pt', 'out/last.pt')


@pytest.mark.processor
def test_evaluation_never_moves_training(mini, script):
    script('train.py', *TINY, '--dropout=0.1')
    script('train.py', *TINY, '--dropout=0.1', '--out_dir=other', '--eval_interval=3', '--eval_iters=5', '--sample_interval=2')
    assert same_weights('out/last.pt', 'other/last.pt')
    assert [row['train_loss'] for row in read_log('out/log.csv')] == [row['train_loss'] for row in read_log('other/log.csv')]


@pytest.mark.processor
def test_accumulation_equals_a_larger_batch(mini, script):
    """1 x 8 equals 4 x 2: the same windows, the same mean loss, the same step."""
    for out, knobs in (('a', dict(batch_size=8, gradient_accumulation_steps=1)), ('b', dict(batch_size=2, gradient_accumulation_steps=4))):
        script('train.py', *TINY, *flags(**knobs), f'--out_dir={out}', '--eval_iters=1000')
    for a, b in zip(read_log('a/log.csv'), read_log('b/log.csv')):
        for key in ('train_loss', 'val_loss'):
            assert (a[key] == b[key] == '') or float(a[key]) == pytest.approx(float(b[key]), abs=1e-5)


@pytest.mark.parametrize('ranks', [3])
def test_several_processes_equal_one(mini, script, process, ranks):
    """torchrun with gloo on the CPU: the same losses from the same global batch."""
    common = [*TINY, '--gradient_accumulation_steps=6', '--max_iters=5', '--eval_iters=1000']
    script('train.py', *common, '--out_dir=one')
    # torch's threads may be caught by Python's end, and then abort: a rank must leave without it, but not without atexit's
    Path('sitecustomize.py').write_text("""import atexit, os
class Thread:
    def __del__(self, abort=os.abort):
        abort()
if 'RANK' in os.environ:
    caught = Thread()
    atexit.register(lambda: open('exit-' + os.environ['RANK'], 'w').close())
""")
    done = process('train.py', *common, '--out_dir=many', env=dict(PYTHONPATH='.'),
                   launcher=['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}'])
    assert done.returncode == 0, done.stderr
    assert len(list(Path().glob('exit-*'))) == ranks
    for a, b in zip(read_log('one/log.csv'), read_log('many/log.csv'), strict=True):
        for key in ('train_loss', 'val_loss', 'grad_norm'):
            assert (a[key] == b[key] == '') or float(a[key]) == pytest.approx(float(b[key]), abs=1e-5)
    assert not any(name.startswith('module') for name in weights('many/last.pt'))


def test_accumulation_not_divisible_by_ranks(mini, process):
    done = process('train.py', *TINY, '--gradient_accumulation_steps=3',
                   launcher=['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2'])
    errors = [line for line in done.stderr.splitlines() if 'error: ' in line]
    assert done.returncode != 0 and any('does not divide by 2 ranks' in line and 'type --gradient_accumulation_steps=4' in line for line in errors)
    assert not os.path.exists('out')


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_says_so(mini, number):
    """Ctrl-C or a preemption ends after the step, saved, with 128 + signal; resuming reaches the uninterrupted weights."""
    command = [PYTHON, str(ROOT / 'train.py'), *TINY, '--eval_interval=100000', '--max_iters=100000', '--decay_lr=False',
               '--out_dir=out a']
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    for line in run.stderr:
        if line.startswith('iter 20: loss'):
            run.send_signal(number)
            break
    rest = run.stderr.read()
    assert run.wait(60) == 128 + number and f'signal {int(number)}: saved out a/last.pt' in rest and 'Traceback' not in rest
    assert "type --init_from=resume --out_dir='out a' to go on" in rest   # as a shell takes it
    stopped = checkpoint.load('out a/last.pt')['iter_num']
    assert stopped > 20 and len(read_log('out a/log.csv')) == stopped


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_rank_that_waits_for_the_others_ends_at_a_signal(mini, number):
    """torchrun ends the ranks that are left when one dies while all start; they are not to wait for its SIGKILL."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = str(s.getsockname()[1])
    alone = dict(RANK='0', LOCAL_RANK='0', WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    command = [PYTHON, str(ROOT / 'train.py'), *TINY, '--gradient_accumulation_steps=2']
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **alone})
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:   # until rank 0 listens, and waits for rank 1
        with socket.socket() as s:
            if s.connect_ex(('127.0.0.1', int(port))) == 0:
                break
        time.sleep(0.05)
    else:
        pytest.fail('rank 0 never listened')
    try:
        run.send_signal(number)
        assert run.wait(10) == -number
    finally:
        run.kill()
        run.stderr.close()


# ---- max_minutes ---------------------------------------------------------------------------------------------------

LONG = [*TINY, '--max_iters=1000000', '--lr_decay_iters=1000000', '--warmup_iters=0', '--eval_interval=1000000',
        '--min_lr=1e-4', '--max_minutes=0.01']   # a run that ends after 0.6 seconds of training


def test_a_run_that_ends_in_time_is_the_same_without_the_limit(mini, script):
    """Weights and log are equal to the bit, and nothing is said of a limit."""
    script('train.py', *TINY, '--dropout=0.1', '--out_dir=free')
    limited = script('train.py', *TINY, '--dropout=0.1', '--max_minutes=30')
    assert limited.code == 0 and 'max_minutes' not in limited.err
    assert same_weights('free/last.pt', 'out/last.pt')
    assert without_times('free/log.csv') == without_times('out/log.csv')


def test_time_ends_a_run_with_its_schedule_decayed(mini, script):
    """Every rate is the cosine's at the larger of both shares, and the end is a normal one: the whole split, last.pt, done."""
    result = script('train.py', *LONG)
    assert result.code == 0, result.err
    rows = read_log('out/log.csv')
    steps = int(rows[-1]['iter'])
    assert 1 < steps < 1_000_000 and rows[-1]['val_loss']
    for words in (f'max_minutes=0.01 was reached after {steps:,} of max_iters=1,000,000 steps', 'on the whole split',
                  f'done: {steps:,} steps', 'type --max_minutes=0 for all 1,000,000 steps',
                  'from here the learning rate follows max_minutes=0.01'):
        assert words in result.err, words
    assert checkpoint.load('out/last.pt')['iter_num'] == steps
    assert float(rows[-1]['seconds']) >= 0.6
    before = 0.0   # seconds of training when the step began
    for row in rows[:-1]:
        done = max(int(row['iter']) / 1_000_000, min(1, before / 0.6))
        expected = 1e-4 + (1e-2 - 1e-4) * 0.5 * (1 + math.cos(math.pi * done))
        assert float(row['lr']) == pytest.approx(expected, rel=0.01, abs=3e-5)
        before = float(row['seconds'])


def test_time_shorter_than_a_step_makes_one(mini, script):
    result = script('train.py', *LONG, '--max_minutes=1e-9')
    assert result.code == 0 and 'done: 1 steps' in result.err and read_log('out/log.csv')[-1]['val_loss']


def test_a_run_past_its_time_is_not_trained_further(mini, script):
    """A resumed run ends whole without a step, says what to type, and goes on with more minutes."""
    script('train.py', *LONG)
    steps = checkpoint.load('out/last.pt')['iter_num']
    again = script('train.py', '--init_from=resume', '--device=cpu')
    assert again.code == 0 and 'there is nothing left to train; type --max_minutes=6' in again.err, again.err
    assert checkpoint.load('out/last.pt')['iter_num'] == steps
    seconds = checkpoint.load('out/last.pt')['seconds']
    more = script('train.py', '--init_from=resume', '--device=cpu', f'--max_minutes={(seconds + 0.6) / 60}')
    assert more.code == 0 and checkpoint.load('out/last.pt')['iter_num'] > steps
    assert float(read_log('out/log.csv')[-1]['seconds']) >= seconds + 0.599


def test_time_without_decay_ends_at_a_constant_rate(mini, script):
    result = script('train.py', *LONG, '--decay_lr=False')
    assert result.code == 0 and 'with decay_lr=False the run of max_minutes=0.01 ends at a constant rate' in result.err
    assert 'decayed' not in result.err and 'learning rate follows' not in result.err
    assert {row['lr'] for row in read_log('out/log.csv') if row['lr']} == {'0.01'}


def test_time_below_zero(mini, refused):
    refused('train.py', *TINY, '--max_minutes=-1', words=['max_minutes=-1', '0'])


def test_all_ranks_end_after_the_same_step(mini, forked):
    """Two ranks, one with a clock that runs three times as fast, do not wait for each other for ever."""
    (mini / 'start.py').write_text(f"""import os, runpy, sys, time
if os.environ['RANK'] == '1':
    time.perf_counter = lambda clock=time.perf_counter: 3 * clock()
runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')
""")
    forked([2, str(mini / 'start.py'), *LONG, '--gradient_accumulation_steps=2'])
    steps = checkpoint.load('out/last.pt')['iter_num']
    assert 1 <= steps < 1_000_000 and int(read_log('out/log.csv')[-1]['iter']) == steps


# ---- the main job's config and others' -----------------------------------------------------------------------------

def test_nanogpt_style_config_runs_unchanged(mini, script):
    (mini / 'c.py').write_text('''
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
''')
    assert script('train.py', 'c.py', '--dtype=float32').code == 0
    assert checkpoint.load('out-mini/last.pt')['iter_num'] == 10
    assert script('sample.py', '--out_dir=out-mini', '--device=cpu', '--max_new_tokens=3').code == 0


def test_data_is_prepared_when_missing(folder, script, monkeypatch):
    """No network: the main job's config trains on the stand-in, loudly, every time."""
    (folder / 'python').write_text(f"""#!/bin/sh
exec {PYTHON} -c '
import os, runpy, sys, time
time.sleep = lambda seconds: None   # between the tries of the download
del sys.argv[0]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")' "$@"
""")
    (folder / 'python').chmod(0o755)
    monkeypatch.setattr('conftest.PYTHON', str(folder / 'python'))
    for variable in ('HTTPS_PROXY', 'https_proxy'):
        monkeypatch.setenv(variable, 'http://127.0.0.1:9')   # nothing listens there
    short = ['config/train_shakespeare_char.py', '--max_iters=1', '--n_layer=1', '--n_embd=12', '--batch_size=2', '--device=cpu',
             '--eval_iters=1', '--block_size=4096', '--n_head=1', '--sample_interval=0']
    for run in range(2):
        result = script('train.py', *short)
        assert result.code == 0, result.err
        assert ('running prepare_shakespeare.py' in result.err) == (run == 0)
        for words in ('THIS IS NOT TINY SHAKESPEARE', 'the download failed', 'python prepare_shakespeare.py --tokenizer=char'):
            assert words in result.err
    assert json.load(open('data/shakespeare_char/meta.json'))['source']['stand_in'] is True


def test_main_config_on_gpu_is_nanogpts(folder):
    from lib.configurator import configure
    text = (ROOT / 'train.py').read_text().partition('# ---- knobs')[2].partition('knobs, given')[0]
    knobs = {}
    exec('#' + text, knobs)
    configure(knobs, lambda name: 'cuda', [str(ROOT / 'config/train_shakespeare_char.py')])
    expected = dict(n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=64, dropout=0.2, learning_rate=1e-3, max_iters=5000,
                    min_lr=1e-4, beta2=0.99, warmup_iters=100, gradient_accumulation_steps=1, dataset='shakespeare_char')
    assert {key: knobs[key] for key in expected} == expected


# ---- bad input -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('argv, words', [
    (['--learning_rte=1'], ['learning_rte', '--learning_rate']), (['--max_iters=ten'], ['whole number']),
    (['--dataset=nope'], ['data/nope', 'prepare']), (['--dataset=../mini'], ["'../mini'", 'not a name']),
    (['--block_size=50000'], ['block_size=50000', 'type --block_size=']), (['--block_size=0'], ['block_size=0', '1 or more']),
    (['--n_head=3'], ['n_embd=16', 'n_head=3', '--n_head=']), (['--n_head=0'], ['n_head=0']), (['--n_layer=-1'], ['n_layer=-1']),
    (['--dtype=float16'], ['float16', 'GPU', '--dtype=auto']), (['--dtype=int8'], ['int8', 'float32, bfloat16, float16']),
    (['--device=tpu'], ['tpu', '--device=auto']), (['--compile=maybe'], ['maybe', 'auto, True, False']),
    (['--out_dir=file/run'], ['file/run', '--out_dir']), (['--batch_size=0'], ['batch_size=0']), (['--eval_interval=0'], ['eval_interval=0']),
    (['--gradient_accumulation_steps=0'], ['gradient_accumulation_steps=0']), (['--max_iters=-1'], ['max_iters=-1']),
    (['--learning_rate=-1'], ['learning_rate=-1']), (['--seed=-5'], ['seed=-5']), (['--seed=' + '9' * 25], ['seed=']),
    (['--optimizer=sgd'], ['adamw, muon']), (['--pos=sin'], ['learned, rope, none']), (['--dropout=1'], ['dropout=1', 'below 1']),
    (['--beta2=1'], ['below 1']), (['--lr_decay_iters=soon'], ['lr_decay_iters']), (['--init_from=gpt5'], ['gpt5', 'mean gpt2']),
    (['--n_embd=1000000007'], ['n_embd=1000000007']), (['--n_embd=1000000', '--n_head=1'], ['GiB', '--n_embd']),
    (['--n_layer=' + '9' * 30], ['n_layer']), (['--batch_size=' + '9' * 15], ['GiB', '--batch_size']),
    (['--init_from=resume', '--out_dir=empty'], ['no checkpoint', 'empty/last.pt'])])
def test_mistakes(mini, refused, argv, words):
    (mini / 'file').write_text('a file where a folder should be')
    refused('train.py', *TINY, *argv, words=words)
    assert not os.path.exists('out') and not os.path.exists('empty')   # nothing half-written


def test_cuda_that_is_not_there(mini, refused):
    if torch.cuda.is_available():
        pytest.skip('this machine has a GPU')
    refused('train.py', *TINY, '--device=cuda', words=['device=cuda', 'cpu', '--device=auto'])


def test_bin_that_is_not_meta_json(mini, refused):
    with open('data/mini/train.bin', 'ab') as f:
        f.write(b'\0\0')
    refused('train.py', *TINY, words=['disagrees with meta.json'])


def test_resumed_run_keeps_its_shape(mini, script, refused):
    script('train.py', *TINY, '--max_iters=1')
    refused('train.py', *TINY, '--init_from=resume', '--n_layer=3', words=['n_layer=3', 'n_layer=2'])
    refused('train.py', *TINY, '--init_from=resume', '--optimizer=muon', words=['optimizer=muon'])


@pytest.mark.parametrize('content', [b'', b'not a checkpoint', b'PK\x03\x04' + b'\0' * 100])
def test_damaged_checkpoint(mini, refused, content):
    os.makedirs('out')
    (mini / 'out/last.pt').write_bytes(content)
    refused('train.py', *TINY, '--init_from=resume', words=['out/last.pt', 'damaged'])
    refused('sample.py', '--checkpoint=out/last.pt', '--device=cpu', words=['out/last.pt', 'damaged'])


def test_loss_that_is_not_finite(mini, script, refused):
    script('train.py', *TINY)
    before = open('out/last.pt', 'rb').read(), open('out/best.pt', 'rb').read()
    refused('train.py', *TINY, '--init_from=resume', '--max_iters=200', '--learning_rate=1e18', '--decay_lr=False', '--grad_clip=0',
            '--eval_interval=1000', '--norm=pre', words=['no longer finite', 'learning rate', 'gradient norm', '--learning_rate'])
    assert before == (open('out/last.pt', 'rb').read(), open('out/best.pt', 'rb').read())


def test_compile_without_a_compiler(mini, monkeypatch, capfd):
    """auto says so and goes on eagerly; asked for by name, it is an error."""
    def broken(*args, **kwargs):
        raise RuntimeError('InvalidCxxCompiler: No working C++ compiler found\nand more')
    monkeypatch.setattr(torch, 'compile', lambda f: broken)
    monkeypatch.setattr('platform.system', lambda: 'Linux')
    monkeypatch.setattr(torch, 'ones', lambda *args, **kwargs: None)
    assert runtime.find_compile('auto', 'cuda') == (
        False, ' (torch.compile does not work here: InvalidCxxCompiler: No working C++ compiler found)')
    assert runtime.find_compile('auto', 'cpu') == (False, '') and runtime.find_compile(False, 'cuda') == (False, '')
    with pytest.raises(SystemExit) as stop:
        runtime.find_compile(True, 'cpu')
    assert stop.value.code == 2 and 'type --compile=False' in capfd.readouterr().err


def test_compile_asked_for_with_no_compiler_in_reach(mini, process):
    done = process('train.py', *TINY, '--compile=True', env={'CXX': '/bin/false', 'TORCHINDUCTOR_CACHE_DIR': str(mini / 'cache')})
    assert done.returncode == 2 and 'Traceback' not in done.stderr and 'type --compile=False' in done.stderr
    assert [line.startswith('error: ') for line in done.stderr.splitlines()] == [True]


def test_compiled_code_is_kept_for_each_kind_of_processor(monkeypatch, folder):
    """Code that was compiled for one kind is not found on another, where it would compute something else."""
    monkeypatch.setattr(torch, 'compile', lambda f: f)
    monkeypatch.setenv('XDG_CACHE_HOME', str(folder))
    folders = set()
    for kind in ('AVX2', 'AVX512'):
        monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda kind=kind: kind)
        monkeypatch.delenv('TORCHINDUCTOR_CACHE_DIR')
        assert runtime.find_compile(True, 'cpu') == (True, '')
        folders.add(os.environ['TORCHINDUCTOR_CACHE_DIR'])
    assert len(folders) == 2 and all(path.startswith(str(folder)) and os.path.isdir(path) for path in folders)


# ---- the machine ---------------------------------------------------------------------------------------------------

@pytest.mark.processor
def test_dtype_follows_the_hardware(monkeypatch):
    monkeypatch.setattr(runtime, 'cpu_has_bf16', lambda: True)
    assert runtime.find_dtype('auto', 'cpu') == 'bfloat16'
    monkeypatch.setattr(runtime, 'cpu_has_bf16', lambda: False)
    assert runtime.find_dtype('auto', 'cpu') == runtime.find_dtype('auto', 'mps') == 'float32'
    for capability, expected in (((7, 5), 'float16'), ((8, 0), 'bfloat16'), ((9, 0), 'bfloat16')):
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device, c=capability: c)
        assert runtime.find_dtype('auto', 'cuda:0') == expected


def test_mps_is_taken_only_where_it_computes_right(monkeypatch, capfd):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    assert runtime.find_device('auto') == 'cpu'   # nothing is computed there at all
    assert 'mps' in capfd.readouterr().err and runtime.find_device('mps') == 'mps'
    monkeypatch.setattr(runtime, 'computes_right', lambda device, its=runtime.computes_right: its('cpu'))
    assert runtime.find_device('auto') == 'mps'
    attend, calls = torch.nn.functional.scaled_dot_product_attention, []

    def wrong_the_second_time(q, k, v, is_causal):
        calls.append(1)
        return attend(q, k, v, is_causal=is_causal) * (1.01 if len(calls) == 2 else 1)
    monkeypatch.setattr(torch.nn.functional, 'scaled_dot_product_attention', wrong_the_second_time)
    assert runtime.find_device('auto') == 'cpu' and len(calls) == 2


@pytest.mark.processor
def test_processor_is_read():
    """bf16 in hardware is what /proc/cpuinfo lists, unless torch was told to treat the processor as an older one."""
    if not os.path.exists('/proc/cpuinfo'):
        pytest.skip('no /proc/cpuinfo to compare with')
    words = open('/proc/cpuinfo').read().split()
    told_older = os.environ.get('ATEN_CPU_CAPABILITY') in ('default', 'avx2')
    assert runtime.cpu_has_bf16() == (not told_older and ('avx512_bf16' in words or 'amx_tile' in words))


@pytest.mark.processor
def test_a_processor_with_avx2_alone_has_no_bf16():
    """In a process that torch is told to run as on such a processor, the precision of a run is fp32."""
    ask = 'from lib import runtime; print(runtime.cpu_has_bf16(), runtime.find_dtype("auto", "cpu"))'
    done = subprocess.run([sys.executable, '-c', ask], env={**os.environ, 'ATEN_CPU_CAPABILITY': 'avx2'}, cwd=ROOT,
                          capture_output=True, text=True, timeout=60)
    assert done.stdout == 'False float32\n', done.stderr


def test_mfu_is_of_a_known_peak_only(monkeypatch):
    assert runtime.peak_flops('cpu') is None
    for name, peak in (('NVIDIA H200', 989e12), ('NVIDIA A100-SXM4-80GB', 312e12), ('Tesla T4', 65e12), ('NVIDIA L4', 121e12),
                       ('NVIDIA L40S', 362e12), ('NVIDIA A10G', 70e12), ('NVIDIA GeForce GTX 1080', None), ('NVIDIA L40', None), ('NVIDIA T400', None),
                       ('NVIDIA RTX A1000', None), ('NVIDIA GeForce RTX 4090', 165e12)):
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device, n=name: n)
        assert runtime.peak_flops('cuda') == peak


# ---- what fresh eyes found -----------------------------------------------------------------------------------------

def test_prepare_never_costs_real_data(mini, refused, monkeypatch):
    """A dataset that is missing is not made by another one's prepare, and a stand-in never replaces what is there."""
    monkeypatch.setattr('time.sleep', lambda s: None)
    os.rename('data/mini', 'data/shakespeare_char')
    before = open('data/shakespeare_char/meta.json').read()
    refused('train.py', *TINY, '--dataset=shakespeare', '--prepare=prepare_shakespeare.py --tokenizer=char', words=['makes shakespeare_char'])
    refused('prepare_shakespeare.py', '--url=http://127.0.0.1:9/x', '--stand_in')
    assert open('data/shakespeare_char/meta.json').read() == before
    for prepare in ("'", ' ', 'nofile.py'):
        refused('train.py', *TINY, '--dataset=nope', f'--prepare={prepare}', words=['--prepare='])


@pytest.mark.parametrize('name', ['other', 'mini'])
def test_resumed_on_another_text_the_best_loss_begins_anew(mini, script, name):
    """Of another name, or the same name prepared anew: best.pt of the first text is kept under another name."""
    from lib.prepare import write_dataset
    from lib.tokenizers import CharTokenizer
    script('train.py', *TINY)
    before = Path('out/best.pt').read_bytes()
    tokenizer = CharTokenizer(TEXT)
    harder = ''.join(random.Random(0).choices(tokenizer.chars, k=3000))   # its loss stays above that of TEXT
    write_dataset(f'data/{name}', {split: [(tokenizer.encode(harder), len(harder))] for split in ('train', 'val')},
                  tokenizer, dict(name=name, url=None, sha256='', stand_in=False))
    result = script('train.py', '--init_from=resume', f'--dataset={name}', '--max_iters=20', '--device=cpu')
    assert result.code == 0 and 'another text' in result.err and 'best-earlier-1.pt' in result.err, result.err
    assert Path('out/best-earlier-1.pt').read_bytes() == before
    best = checkpoint.load('out/best.pt')
    assert best['iter_num'] >= 10 and best['data']['name'] == name
    again = script('train.py', '--init_from=resume', '--max_iters=22', '--device=cpu')
    assert again.code == 0 and 'another text' not in again.err


def test_resume_on_another_vocabulary(mini, script, refused):
    from lib.prepare import write_dataset
    from lib.tokenizers import CharTokenizer
    script('train.py', *TINY, '--max_iters=2')
    text = '0123456789abcdef' * 50
    tokenizer = CharTokenizer(text)
    write_dataset('data/other', {split: [(tokenizer.encode(text), len(text))] for split in ('train', 'val')}, tokenizer,
                  dict(name='other', url=None, sha256='', stand_in=False))
    before = open('out/last.pt', 'rb').read()
    refused('train.py', *TINY, '--init_from=resume', '--dataset=other', words=['another tokenizer', '--dataset'])
    assert open('out/last.pt', 'rb').read() == before


def test_characters_that_a_model_lacks_are_named(mini, script, refused):
    """The first 20 of them, and how many there are; or that they are only numbered differently."""
    from lib.prepare import write_dataset
    from lib.tokenizers import CharTokenizer
    assert script('train.py', *TINY, '--max_iters=1', '--out_dir=o p').code == 0
    greek = ''.join(map(chr, range(0x3b1, 0x3ca)))
    texts = dict(accents='was für ein Ärger', greek=f'the miller {greek}', fewer='the miller said')
    for name, text in texts.items():
        tokenizer = CharTokenizer(text)
        splits = {split: [(tokenizer.encode(text * 50), len(text))] for split in ('train', 'val')}
        source = dict(name=name, url=None, sha256='', stand_in=False)
        write_dataset(f'data/{name}', splits, tokenizer, source)
    advice = ['--dataset=NAME', 'python prepare_text.py --input=FILE --name=NAME ',
              "--tokenizer='FROM:o p/last.pt'"]
    flags = [*TINY, '--out_dir=o p', '--init_from=resume']
    words = ['o p/last.pt', 'data/accents', "lacks 4 of its characters: 'g', 'n', 'Ä', 'ü';"] + advice
    refused('train.py', *flags, '--dataset=accents', words=words)
    words = ["lacks 25 of its characters: 'α', ", "'τ', ...;", *advice]
    line = refused('train.py', *flags, '--dataset=greek', words=words)
    assert "'υ'" not in line
    words = ['numbers them differently', *advice]
    line = refused('train.py', *flags, '--dataset=fewer', words=words)
    assert 'lacks' not in line


@pytest.mark.parametrize('state', [3, ['char'], dict(chars='abc'), dict(kind='char'), dict(kind=['char']),
                                   dict(kind='char', chars=7)])
def test_a_tokenizer_that_says_nothing_is_another(mini, trained, refused, state):
    os.mkdir('out')
    loaded = checkpoint.load(str(trained / 'last.pt'))
    checkpoint.save('out/last.pt', loaded | dict(tokenizer=state))
    words = ['another tokenizer', '--dataset=NAME']
    line = refused('train.py', '--init_from=resume', '--device=cpu', words=words)
    assert 'FROM:' not in line   # there is nothing to take from it


def test_unusable_validation_split_is_found_before_anything_moves(mini, script, refused):
    script('train.py', *TINY, '--max_iters=2')
    meta = json.load(open('data/mini/meta.json'))
    del meta['splits']['val']
    json.dump(meta, open('data/mini/meta.json', 'w'))
    with open('data/mini/val.bin', 'r+b') as f:
        f.truncate(2)
    refused('train.py', *TINY, words=['val', 'use more text'])
    assert not os.path.exists('out/earlier-1')


def test_resume_keeps_dtype_and_data_dir(mini, script):
    os.rename('data', 'elsewhere')
    script('train.py', *TINY, '--max_iters=2', '--data_dir=elsewhere')
    result = script('train.py', '--init_from=resume', '--max_iters=4', '--device=cpu')
    assert result.code == 0 and 'dtype float32' in result.err


@pytest.mark.parametrize('flags, words', [(['--compile=0'], ['compile=0', 'True, False']), (['--compile=1'], ['compile=1'])])
def test_compile_is_no_number(mini, refused, flags, words):
    refused('train.py', *TINY, *flags, words=words)


def test_padded_vocabulary_samples_while_training(mini, script):
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
    assert script('train.py', *TINY, '--init_from=resume', '--max_iters=4', '--sample_interval=1').code == 0


@pytest.mark.pictures
@pytest.mark.parametrize('column, value', [(2, 'edited'), (0, '\u00b2'), (0, '9' * 5000), (1, '9' * 400), (3, '"' + 'x' * 200_000)])
def test_edited_log_does_not_stop_a_run(mini, script, column, value):
    script('train.py', *TINY, '--max_iters=5')
    lines = open('out/log.csv').read().splitlines()
    cells = lines[2].split(',')
    cells[column] = value
    lines[2] = ','.join(cells)
    open('out/log.csv', 'w').write('\n'.join(lines) + '\n')
    result = script('train.py', *TINY, '--init_from=resume')
    assert result.code == 0 and not os.path.exists('out/log.csv.part'), result.err
    assert ('no out/loss.png from' in result.err) == (column in (1, 2))


@pytest.mark.processor
@pytest.mark.pictures   # the training time must leave out drawing
def test_target_loss(mini, script):
    """The run ends at the first evaluation below the target on the whole split, says its seconds, and leaves its weights."""
    result = script('train.py', *TINY, '--max_iters=60', '--eval_interval=20', '--lr_decay_iters=60', '--target_loss=2.9')
    reached = re.search(r'reached target_loss=2.9 after (20|40) steps: ([\d.]+) s of training, evaluations excluded; ([\d.]+) s',
                        result.err)
    assert result.code == 0 and reached and 0 < float(reached[2]) <= float(reached[3])
    rows = read_log('out/log.csv')
    assert rows[-1]['iter'] == reached[1] and float(rows[-1]['val_loss']) < 2.9
    assert float(rows[-1]['seconds']) == pytest.approx(float(reached[2]), abs=0.051)
    evaluated = json.loads(script('evaluate.py', '--device=cpu', '--dtype=float32', '--json=-').out)
    assert evaluated['nats_per_token'] == pytest.approx(float(rows[-1]['val_loss']), abs=1e-5)
    missed = script('train.py', *TINY, '--max_iters=2', '--target_loss=0.001')
    assert missed.code == 0 and 'target_loss=0.001 was not reached in max_iters=2' in missed.err


def test_cooldown(mini, script):
    """Warm-up, the peak, then a straight line to min_lr over the last half."""
    script('train.py', *TINY, '--max_iters=20', '--lr_decay_iters=20', '--warmup_iters=4', '--cooldown=0.5', '--min_lr=1e-3')
    rates = [float(row['lr']) for row in read_log('out/log.csv') if row['lr']]
    expected = [1e-2 * (i + 1) / 5 for i in range(4)] + [1e-2] * 6 + [1e-2 - 9e-3 * i / 10 for i in range(10)]
    assert rates == pytest.approx(expected, rel=1e-5)


def test_a_cooldown_needs_a_decay(mini, refused):
    refused('train.py', *TINY, '--cooldown=0.5', '--decay_lr=False', words=['cooldown=0.5', 'decay_lr=True', '--cooldown=0'])


def test_zero_init(mini, script):
    """Branches and an untied head start at 0, so that the first loss is that of the uniform distribution; a tied head is GPT-2's."""
    script('train.py', *TINY, '--zero_init', '--tie_weights=False', '--max_iters=0')
    start = weights('out/last.pt')
    zeros = {name for name, p in start.items() if p.dim() == 2 and not p.any()}
    assert zeros == {'lm_head.weight', *(f'transformer.h.{i}.{part}.c_proj.weight' for i in (0, 1) for part in ('attn', 'mlp'))}
    vocab_size = len(start['lm_head.weight'])
    assert float(read_log('out/log.csv')[-1]['val_loss']) == pytest.approx(math.log(vocab_size), abs=1e-5)
    script('train.py', *TINY, '--zero_init', '--max_iters=0', '--out_dir=tied')
    assert weights('tied/last.pt')['lm_head.weight'].any()


def test_large_vocabularies_are_padded(script, folder):
    """To a multiple of 64, as nanoGPT's 50,304; sampling never draws the padding."""
    (folder / 'data' / 'wide').mkdir(parents=True)
    chars = ''.join(sorted({chr(0x4e00 + i) for i in range(5000)}))
    tokens = torch.randint(5000, (400,), generator=torch.Generator().manual_seed(0)).numpy().astype('<u2')
    for split in ('train', 'val'):
        tokens.tofile(f'data/wide/{split}.bin')
    (folder / 'data' / 'wide' / 'meta.json').write_text(json.dumps(
        dict(tokenizer=dict(kind='char', chars=chars), dtype='uint16', splits={}, source={})))
    assert script('train.py', *TINY, '--dataset=wide', '--max_iters=2').code == 0
    assert weights('out/last.pt')['lm_head.weight'].shape == (5056, 16)
    text = script('sample.py', '--device=cpu', '--temperature=50', '--max_new_tokens=300', '--start=' + chars[0]).out
    assert set(text.rstrip('\n')) <= set(chars)
