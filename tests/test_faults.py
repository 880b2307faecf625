"""Faults: kills, damage, full disks, lost ranks, hostile files. pytest tests/test_faults.py

Each test was seen failing without the protection it is about; the long form is tests/torture.py."""
import contextlib
import json
import math
import os
import pickle
import random
import re
import signal
import socket
import subprocess
import threading
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PYTHON, ROOT, TINY, read_log, same_weights, without_times

from lib import checkpoint, prepare
from lib.prepare import unzip

TORCHRUN = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']


# ---- killed at any instant -----------------------------------------------------------------------------------------

@pytest.mark.processor
def test_two_ranks_resume_exactly(mini, forked):
    common = ['train.py', *TINY, '--gradient_accumulation_steps=2', '--dropout=0.1', '--optimizer=muon', '--dtype=bfloat16', '--max_iters=6',
              '--lr_decay_iters=6', '--eval_interval=3']
    forked([2, *common, '--out_dir=whole'], [2, *common, '--out_dir=parts', '--max_iters=3'],
           [2, *common, '--out_dir=parts', '--init_from=resume'])
    assert same_weights('whole/last.pt', 'parts/last.pt') and without_times('whole/log.csv') == without_times('parts/log.csv')


def test_last_is_whole_at_every_instant(folder, monkeypatch):
    """Cut off at each system call of a save, a readable checkpoint is always there."""
    checkpoint.save('last.pt', dict(format=1, model={}, model_args={}, step=0), 'last.previous.pt')

    class Killed(BaseException):
        pass

    def stop(*args, **options):
        raise Killed
    for name in ('open', 'link', 'replace', 'fsync'):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, stop)
            with pytest.raises(Killed):
                checkpoint.save('last.pt', dict(format=1, model={}, model_args={}, step=1), 'last.previous.pt')
        assert checkpoint.read('last.pt')['step'] in (0, 1)


def test_folders_that_cannot_be_opened(mini, script, monkeypatch):
    """As on Windows, where a folder cannot be flushed: every save succeeds and none is reported as failed."""
    opened = os.open

    def refuse_folders(path, *args, **options):
        if os.path.isdir(path):
            raise PermissionError(13, 'Permission denied')
        return opened(path, *args, **options)
    monkeypatch.setattr(os, 'open', refuse_folders)
    result = script('train.py', *TINY)
    assert result.code == 0 and 'could not be written' not in result.err, result.err
    assert checkpoint.load('out/last.pt')['iter_num'] == 10 and os.path.exists('out/last.previous.pt')


def test_previous_checkpoint_is_used_when_last_is_damaged(mini, script):
    script('train.py', *TINY, '--eval_interval=4', '--out_dir=whole')
    script('train.py', *TINY, '--eval_interval=4', '--max_iters=8')
    with open('out/last.pt', 'r+b') as f:
        f.seek(5000)
        f.write(b'damage')
    result = script('train.py', *TINY, '--eval_interval=4', '--init_from=resume')
    assert 'out/last.pt is damaged' in result.err and 'using out/last.previous.pt' in result.err
    assert 'resumed from out/last.previous.pt at iter 4' in result.err
    assert same_weights('whole/last.pt', 'out/last.pt') and without_times('whole/log.csv') == without_times('out/log.csv')


def test_a_last_that_cannot_be_read_is_not_replaced(mini, script, refused, modes_hold):
    script('train.py', *TINY, '--eval_interval=4', '--max_iters=8')
    os.chmod('out/last.pt', 0)
    refused('train.py', *TINY, '--init_from=resume', words=['out/last.pt cannot be read (Permission denied)'])


def test_resumed_from_another_folder(mini, script, monkeypatch):
    """A run's relative data_dir is found from wherever the command is typed."""
    script('train.py', *TINY, '--max_iters=8')
    os.mkdir('elsewhere')
    monkeypatch.chdir('elsewhere')
    result = script('train.py', '--init_from=resume', f'--out_dir={mini}/out', '--max_iters=9', '--device=cpu')
    assert result.code == 0 and 'resumed from' in result.err, result.err


def test_torn_log_line_is_dropped(mini, script):
    script('train.py', *TINY, '--out_dir=whole')
    script('train.py', *TINY, '--max_iters=5')
    with open('out/log.csv', 'a') as f:
        f.write('3,19')   # the machine failed while writing row 30-something
    assert script('train.py', *TINY, '--init_from=resume').code == 0
    assert without_times('whole/log.csv') == without_times('out/log.csv')


def test_best_is_never_replaced_by_a_worse_one(mini, script):
    """best.pt may be newer than last.pt: the run was killed between the two writes."""
    script('train.py', *TINY, '--max_iters=5', '--out_dir=out')
    os.rename('out/last.pt', 'early.pt')
    best = checkpoint.load('out/best.pt')
    best['best_val_loss'] = 0.5
    checkpoint.save('out/best.pt', best)
    os.rename('early.pt', 'out/last.pt')
    assert script('train.py', *TINY, '--init_from=resume').code == 0
    assert checkpoint.load('out/best.pt')['best_val_loss'] == 0.5


def test_a_new_run_does_not_cost_the_old_one(mini, script):
    script('train.py', *TINY)
    before = open('out/last.pt', 'rb').read()
    result = script('train.py', *TINY, '--max_iters=1')
    assert 'moved to out/earlier-1' in result.err and open('out/earlier-1/last.pt', 'rb').read() == before
    assert checkpoint.load('out/last.pt')['iter_num'] == 1 and len(read_log('out/log.csv')) == 2
    script('train.py', *TINY, '--max_iters=2')
    assert open('out/earlier-1/last.pt', 'rb').read() == before and checkpoint.load('out/earlier-2/last.pt')['iter_num'] == 1
    assert json.load(open('out/earlier-2/config.json'))['max_iters'] == 1


def test_a_full_disk_leaves_the_earlier_run_where_it_is(mini, script, refused, monkeypatch):
    script('train.py', *TINY)
    before = sorted(os.listdir('out'))

    def full(*args, **options):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(checkpoint.json, 'dump', full)
    refused('train.py', *TINY, words=['out cannot be written', 'No space left on device'])
    assert sorted(os.listdir('out')) == before


def test_an_old_run_without_its_last_is_kept_too(mini, script):
    script('train.py', *TINY, '--max_iters=2')
    os.remove('out/last.pt')
    best = Path('out/best.pt').read_bytes()
    script('train.py', *TINY, '--max_iters=2', '--seed=3')
    assert Path('out/earlier-1/best.pt').read_bytes() == best != Path('out/best.pt').read_bytes()


def test_two_runs_in_one_folder(mini, refused):
    """The second is refused while the first one writes."""
    run = subprocess.Popen([PYTHON, str(ROOT / 'train.py'), *TINY, '--max_iters=100000', '--decay_lr=False'], stderr=subprocess.PIPE,
                           text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    try:
        assert any(line.startswith('iter 0: loss') for line in run.stderr)
        refused('train.py', *TINY, words=['another run is writing'])
        refused('train.py', *TINY, '--init_from=resume', words=['another run is writing'])
    finally:
        run.send_signal(signal.SIGTERM)
        run.communicate(timeout=60)
    assert run.returncode == 143 and not os.path.exists('out/.lock')


@pytest.mark.parametrize('name', ['last.pt', 'last.previous.pt', 'best.pt', 'log.csv'])
def test_folder_where_a_file_should_be(mini, refused, name):
    """Refused before the first step, not after the last."""
    os.makedirs(f'out/{name}')
    refused('train.py', *TINY, words=['out', name])


@pytest.mark.parametrize('knob', ['--checkpoint_interval=3', '--checkpoint_minutes=1e-9'])
def test_saving_in_between(mini, script, knob):
    from unittest import mock
    with mock.patch.object(checkpoint, 'save', wraps=checkpoint.save) as save:
        script('train.py', *TINY, '--eval_interval=100', '--always_save_checkpoint=False', knob)
    steps = [call.args[1]['iter_num'] for call in save.call_args_list if call.args[0].endswith('last.pt')]
    assert steps == ([0, 3, 6, 9, 10] if 'interval' in knob else list(range(11)))


def test_a_restart_before_the_run_began_is_a_new_run(mini, forked):
    """A rank dies while it starts, in a folder that holds an earlier run: the restart must not take that for its own."""
    forked([2, 'train.py', *TINY, '--gradient_accumulation_steps=2', '--max_iters=3', '--seed=1'])
    (mini / 'start.py').write_text("""import os, runpy, signal, sys, time
if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':
    if os.environ['RANK'] == '1':
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)   # the other rank is still starting when torchrun ends it
del sys.argv[0]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name='__main__')
""")
    done = subprocess.run([PYTHON, *TORCHRUN, '--max-restarts=1', 'start.py', str(ROOT / 'train.py'), *TINY, '--gradient_accumulation_steps=2',
                           '--max_iters=5'], env={**os.environ, 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and 'resumed' not in done.stderr, done.stderr
    assert len(read_log('out/log.csv')) == 6 and checkpoint.load('out/earlier-1/last.pt')['iter_num'] == 3


def test_torture_in_short(folder):
    """tests/torture.py with every part of it: kills, of one process and of two ranks, damage, a full disk, bad inputs, folders."""
    done = subprocess.run([PYTHON, str(ROOT / 'tests' / 'torture.py'), '--minutes=0.05', '--seed=1'], capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0 and 'all held' in done.stdout, done.stdout + done.stderr
    counts = [int(n.replace(',', '')) for n in re.findall(r'^(?:\d rank.*?: |damaged checkpoints: |bad inputs: |consoles that fail: |text folders: )([\d,]+)', done.stdout, re.M)]
    assert len(counts) == 6 and min(counts[:2]) >= 1 and min(counts[2:4]) >= 20 and min(counts[4:]) >= 4, done.stdout


NEEDS_PROC = pytest.mark.skipif(not os.path.exists('/proc'), reason='finds the process of a rank in /proc')


def process_of_rank(rank):
    """Return the process id of a rank that torchrun has started in this folder."""
    for process in Path('/proc').glob('[0-9]*'):
        with contextlib.suppress(OSError):   # it has just ended
            environment = (process / 'environ').read_bytes().split(b'\0')
            if f'RANK={rank}'.encode() in environment and os.readlink(process / 'cwd') == os.getcwd():
                return int(process.name)
    raise LookupError(f'no process of rank {rank}')


@NEEDS_PROC
def test_killed_rank_is_restarted(mini, forked):
    """torchrun --max-restarts after a kill -9 of one rank: goes on from last.pt, ends equal to the uninterrupted run."""
    common = [str(ROOT / 'train.py'), *TINY, '--gradient_accumulation_steps=2', '--checkpoint_interval=1', '--max_iters=40',
              '--lr_decay_iters=40']
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    forked([2, 'train.py', *common[1:], '--out_dir=whole'])
    run = subprocess.Popen([PYTHON, *TORCHRUN, '--max-restarts=2', *common], stderr=subprocess.PIPE, text=True, env=environment)
    said = []
    watchdog = threading.Timer(90, run.kill)   # a hang is a failure, not a wait
    watchdog.start()
    for line in run.stderr:
        said.append(line)
        if line.startswith('iter 15: loss') and not any('resumed' in line for line in said):
            os.kill(process_of_rank(1), signal.SIGKILL)
    watchdog.cancel()
    assert run.wait(120) == 0, ''.join(said)
    assert any('resumed from out/last.pt' in line for line in said)
    assert same_weights('whole/last.pt', 'out/last.pt') and without_times('whole/log.csv') == without_times('out/log.csv')


@NEEDS_PROC
def test_two_agents(mini, forked):
    """Two torchrun agents on loopback; one of the ranks is killed; both agents start again, and go on from last.pt."""
    common = [str(ROOT / 'train.py'), *TINY, '--gradient_accumulation_steps=2', '--checkpoint_interval=1', '--max_iters=40',
              '--lr_decay_iters=40']
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    forked([2, 'train.py', *common[1:], '--out_dir=whole'])
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    agent = [PYTHON, '-m', 'torch.distributed.run', '--nnodes=2', '--nproc_per_node=1', '--max-restarts=2', '--rdzv_backend=c10d',
             f'--rdzv_endpoint=127.0.0.1:{port}', '--rdzv_id=1', '--local_addr=127.0.0.1']
    runs = [subprocess.Popen([*agent, *common], stderr=open(f'agent{i}.log', 'w'), env=environment) for i in range(2)]
    deadline, killed = time.monotonic() + 100, False
    while any(run.poll() is None for run in runs) and time.monotonic() < deadline:
        said = ''.join(open(f'agent{i}.log').read() for i in range(2))
        if not killed and 'iter 10: loss' in said:
            os.kill(process_of_rank(1), signal.SIGKILL)
            killed = True
        time.sleep(0.1)
    for run in runs:
        run.kill()
    said = ''.join(open(f'agent{i}.log').read() for i in range(2))
    assert killed and [run.wait() for run in runs] == [0, 0], said
    assert 'resumed from out/last.pt' in said
    assert same_weights('whole/last.pt', 'out/last.pt') and without_times('whole/log.csv') == without_times('out/log.csv')


def test_ranks_agree_on_the_step_of_a_signal(mini):
    """SIGTERM to torchrun, as a scheduler sends it: all ranks end after the same step, saved, and the run goes on from there."""
    common = [PYTHON, *TORCHRUN, str(ROOT / 'train.py'), *TINY, '--gradient_accumulation_steps=2', '--eval_interval=100000']
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    run = subprocess.Popen([*common, '--max_iters=100000', '--decay_lr=False'], stderr=subprocess.PIPE, text=True, env=environment)
    watchdog = threading.Timer(60, run.kill)
    watchdog.start()
    said = []
    for line in run.stderr:
        said.append(line)
        if line.startswith('iter 30: loss'):
            run.send_signal(signal.SIGTERM)
    watchdog.cancel()
    run.wait(60)
    assert any('signal 15: saved out/last.pt' in line for line in said), ''.join(said)
    step = checkpoint.load('out/last.pt')['iter_num']
    assert step > 30 and len(read_log('out/log.csv')) == step
    again = subprocess.run([*common, '--max_iters=100000', '--init_from=resume', f'--max_iters={step + 2}', '--decay_lr=False'], env=environment,
                           capture_output=True, text=True, timeout=60)
    assert again.returncode == 0 and [int(row['iter']) for row in read_log('out/log.csv')] == list(range(step + 3)), again.stderr


def test_one_ranks_error_ends_all(mini, process):
    """A token out of range that only one rank meets: all end at once, and that rank's message is there."""
    meta = json.loads(open('data/mini/meta.json').read())
    tokens = np.fromfile('data/mini/train.bin', dtype='<u2')
    tokens[len(tokens) // 2] = 999
    tokens.tofile('data/mini/train.bin')
    os.remove('data/mini/meta.json')   # so that nothing notices at start-up: nanoGPT's layout, read window by window
    with open('data/mini/meta.pkl', 'wb') as f:
        pickle.dump(dict(itos=dict(enumerate(meta['tokenizer']['chars']))), f)
    started = time.monotonic()
    code = 'import runpy, sys; from lib import data; data.VERIFY_BELOW = 0; sys.argv[0] = sys.argv[1]; del sys.argv[1]; ' \
           'runpy.run_path(sys.argv[0], run_name="__main__")'
    (mini / 'start.py').write_text(f'import sys; sys.path.insert(0, {str(ROOT)!r}); {code}')
    done = subprocess.run([PYTHON, *TORCHRUN, 'start.py', str(ROOT / 'train.py'), *TINY, '--gradient_accumulation_steps=2',
                           '--max_iters=1000', '--lr_decay_iters=1000', '--eval_interval=1000'], capture_output=True, text=True, timeout=120,
                          env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode != 0 and 'token 999 is outside the vocabulary' in done.stderr
    assert time.monotonic() - started < 40


def test_shards_train_and_load_anywhere(mini, forked):
    """shard=True: the same losses as one process, and its checkpoint is one file that one process resumes from, and back."""
    common = ['train.py', *TINY, '--gradient_accumulation_steps=6', '--max_iters=4', '--lr_decay_iters=8', '--eval_interval=2', '--sample_interval=4']
    on = [*common, '--init_from=resume', '--max_iters=8']
    forked([2, *common, '--shard', '--out_dir=shard-one'], [1, *common, '--out_dir=one-shard'],
           [1, *on, '--out_dir=shard-one'], [2, *on, '--shard', '--out_dir=one-shard', '--sample_interval=0'])
    a, b = read_log('shard-one/log.csv'), read_log('one-shard/log.csv')
    assert [int(row['iter']) for row in a] == list(range(9))
    for one, other in zip(a, b, strict=True):
        for key in ('train_loss', 'val_loss', 'grad_norm'):
            assert (one[key] == other[key] == '') or float(one[key]) == pytest.approx(float(other[key]), abs=1e-5)


# ---- full disks and lost folders -----------------------------------------------------------------------------------

def test_disk_that_fills_up(mini):
    """No file may grow past 20 kB from the second save on: the run says so, goes on, ends cleanly, the old file intact."""
    size = 60_000
    code = f'''
import resource, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
from lib import checkpoint
save, saves = checkpoint.save, []
def limited(*args, **options):
    saves.append(1)
    if len(saves) == 5:
        resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
    return save(*args, **options)
checkpoint.save = limited
sys.argv = ['train.py', *sys.argv[1:]]
runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')
'''
    done = subprocess.run([PYTHON, '-c', code, *TINY, '--eval_interval=2'], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and 'Traceback' not in done.stderr, done.stderr
    assert 'last.pt could not be written (File too large); the older checkpoint is as it was' in done.stderr
    assert done.stderr.splitlines()[-1].startswith('error: ') and 'make room' in done.stderr
    assert 0 < checkpoint.load('out/last.pt')['iter_num'] < 10 and not any(name.endswith('.part') for name in os.listdir('out'))
    assert int(read_log('out/log.csv')[-1]['iter']) == 10


def test_full_disk_for_real(mini, process):
    """On a tmpfs of 300 kB."""
    os.makedirs('small')
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=300k', 'tmpfs', 'small'], capture_output=True).returncode:
        pytest.skip('mounting a tmpfs needs root')
    try:
        done = process('train.py', *TINY, '--out_dir=small/out', '--eval_interval=2', '--n_embd=32')
        assert 'Traceback' not in done.stderr and done.returncode == 2, done.stderr
        assert 'could not be written (No space left on device)' in done.stderr
        for name in os.listdir('small/out'):
            assert not name.endswith('.part')
            if name.endswith('.pt'):
                checkpoint.load('small/out/' + name)
    finally:
        subprocess.run(['umount', 'small'], check=True)


# ---- numbers -------------------------------------------------------------------------------------------------------

def test_out_of_memory_names_the_next_sizes(mini, refused, monkeypatch):
    import model

    def full(*args, **options):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20 GiB')
    monkeypatch.setattr(model.MLP, 'forward', full)
    refused('train.py', *TINY, '--batch_size=6', '--gradient_accumulation_steps=5',
            words=['batch_size=6', '--batch_size=3 --gradient_accumulation_steps=10'])
    refused('train.py', *TINY, '--batch_size=1', words=['--grad_checkpointing'])
    monkeypatch.undo()
    monkeypatch.chdir(mini)
    monkeypatch.setattr(torch.optim.AdamW, 'step', full)   # which takes the memory of its moments at the first step
    refused('train.py', *TINY, '--batch_size=6', '--out_dir=other', words=['--batch_size=3 --gradient_accumulation_steps=2'])


def test_out_of_memory_is_not_any_error(mini, script, monkeypatch):
    import model

    def bug(*args, **options):
        raise RuntimeError('a bug')
    monkeypatch.setattr(model.MLP, 'forward', bug)
    with pytest.raises(RuntimeError, match='a bug'):
        script('train.py', *TINY)


# ---- big data ------------------------------------------------------------------------------------------------------

def test_memory_stays_flat_on_20_gigabytes(folder):
    """A sparse 20 GB split: opened without being read, and many batches later still small (15 MB, if pages were kept)."""
    os.makedirs('data/big')
    for name, size in (('train.bin', 20_000_000_000), ('val.bin', 2_000)):
        with open(f'data/big/{name}', 'wb') as f:
            f.truncate(size)
    code = f'''
import resource, sys, time
sys.path.insert(0, {str(ROOT)!r})
from lib import data
data.RELEASE_AFTER = 2 << 20
with open('data/big/meta.pkl', 'wb') as f:
    __import__('pickle').dump(dict(itos={{0: 'a'}}), f)
def resident():
    return int(open('/proc/self/statm').read().split()[1]) * 4096
started = time.monotonic()
windows = data.TrainingWindows(data.Dataset('big'), 'train', 1024, 0)
windows.batch(0, 8)
opened, before = time.monotonic() - started, resident()
for i in range(30):
    windows.batch(8 * i, 8)
print(opened, resident() - before)
'''
    done = subprocess.run([PYTHON, '-c', code], capture_output=True, text=True, timeout=120)
    opened, grown = map(float, done.stdout.split())
    assert opened < 5 and grown < 8e6, (opened, grown, done.stderr)


# ---- damaged and hostile files -------------------------------------------------------------------------------------

def test_every_kind_of_damage_is_noticed(trained, folder, capsys):
    """Flips and cuts all over a checkpoint: none loads, none is a traceback, the file is always named."""
    whole, chance = (trained / 'last.pt').read_bytes(), random.Random(1)
    places = sorted({*range(64), *range(len(whole) - 200, len(whole)), *(chance.randrange(len(whole)) for _ in range(100))})
    for place in places[::3]:
        for kind in ('flip', 'cut'):
            hurt = whole[:place] if kind == 'cut' else whole[:place] + bytes([whole[place] ^ 1 << chance.randrange(8)]) + whole[place + 1:]
            (folder / 'hurt.pt').write_bytes(hurt)
            with pytest.raises(SystemExit) as stop:
                checkpoint.load('hurt.pt')
            error = capsys.readouterr().err
            assert stop.value.code == 2 and error.count('\n') == 1 and 'hurt.pt' in error, (place, kind, error)


def test_a_checkpoint_is_still_what_torch_load_reads(trained):
    """The seal is a zip comment: torch.load and zip tools read the file as any other."""
    import zipfile
    assert torch.load(trained / 'last.pt', weights_only=True)['iter_num'] == 60
    with zipfile.ZipFile(trained / 'last.pt') as z:
        assert z.comment.startswith(b'sha256:') and z.testzip() is None


@pytest.mark.parametrize('change, words', [
    (dict(model_args='x'), ['lacks model']), (dict(model_args={}), ['weights do not fit']),
    (lambda c: c['model_args'].update(n_embd=10**9), ['weights do not fit']), (lambda c: c['model_args'].update(n_layer='2'), ['n_layer']),
    (lambda c: c['model_args'].update(moe=3), ['moe']), (lambda c: c['model'].pop('transformer.ln_f.weight'), ['transformer.ln_f.weight']),
    (lambda c: c['model'].update({'transformer.wte.weight': 3}), ['weights do not fit']), (lambda c: c['model'].update(more=3), ['more: no tensor']),
    (lambda c: c.update(tokenizer=dict(kind='evil')), ['tokenizer']), (lambda c: c.update(tokenizer=dict(kind='byte')), ['256 symbols']),
    (lambda c: c['model_args'].update(vocab_size=-1), ['vocab_size']), (lambda c: c['model_args'].update(n_layer=10**9), ['n_layer=1000000000']),
    (lambda c: c['model']['transformer.ln_f.weight'].fill_(math.nan), ['not finite'])])
def test_checkpoints_that_lie(trained, folder, refused, change, words):
    loaded = checkpoint.load(str(trained / 'last.pt'))
    loaded.update(change) if isinstance(change, dict) else change(loaded)
    checkpoint.save('lie.pt', loaded)
    refused('sample.py', '--checkpoint=lie.pt', '--device=cpu', '--start=12', words=['lie.pt', *words])


def tensors(key, value):
    """A change to one of AdamW's tensors."""
    return lambda c: c['optimizer'][0]['state'][3].update({key: value})


@pytest.mark.parametrize('change', [
    dict(config=dict(batch_size='many')), dict(config=3), dict(config=dict(dataset='../../etc')), dict(iter_num='x'), dict(iter_num=-3),
    dict(iter_num=10**30), dict(optimizer=3), dict(optimizer=[{}]), dict(optimizer=[dict(state={9999: {}}, param_groups=[])]),
    dict(best_val_loss=None), dict(best_val_loss=10**400), dict(best_val_loss=math.nan), dict(seconds=math.nan), dict(seconds=-5.0),
    dict(seconds=10**400), dict(skipped=math.inf),
    tensors('exp_avg', torch.zeros(3)), tensors('exp_avg', torch.zeros(0)), tensors('exp_avg_sq', 1), tensors('amsgrad', torch.zeros(16)),
    tensors('step', torch.tensor(math.inf)), lambda c: c['optimizer'][0]['state'].pop(0)])
def test_resume_from_a_checkpoint_that_lies(trained, mini, refused, change):
    """Also an optimizer's tensor of another size, past whose end a fused kernel would read."""
    loaded = checkpoint.load(str(trained / 'last.pt'))
    loaded.update(change) if isinstance(change, dict) else change(loaded)
    os.mkdir('out')
    checkpoint.save('out/last.pt', loaded)
    before = Path('out/last.pt').read_bytes()
    refused('train.py', '--init_from=resume', '--device=cpu', '--dtype=float32', '--max_iters=70')
    assert Path('out/last.pt').read_bytes() == before


def test_optimizer_settings_in_a_checkpoint_are_not_taken(mini, script):
    """Rates, decay and switches are the knobs'; the file has the tensors alone."""
    script('train.py', *TINY, '--max_iters=2')
    loaded = checkpoint.load('out/last.pt')
    loaded['optimizer'][0]['param_groups'][0].update(amsgrad=True, maximize=True, weight_decay=9.0, params=['?'])
    checkpoint.save('out/last.pt', loaded)
    assert script('train.py', *TINY, '--init_from=resume', '--max_iters=4').code == 0
    script('train.py', *TINY, '--out_dir=whole', '--max_iters=4', '--eval_interval=2')
    assert same_weights('whole/last.pt', 'out/last.pt')


def test_no_checkpoint_names_a_command_to_run(mini, script, refused):
    (mini / 'prepare_evil.py').write_text('open("ran", "w")')
    script('train.py', *TINY, '--max_iters=2')
    loaded = checkpoint.load('out/last.pt')
    loaded['config'].update(dataset='nope', prepare=str(mini / 'prepare_evil.py'))
    checkpoint.save('out/last.pt', loaded)
    refused('train.py', '--init_from=resume', '--device=cpu', words=['data/nope'])
    assert not os.path.exists('ran')


def test_pickle_bombs(folder, capsys):
    for protocol in range(2, 6):
        class Bomb:
            def __reduce__(self):
                return (os.mkdir, ('exploded',))
        (folder / 'bomb.pt').write_bytes(pickle.dumps(Bomb(), protocol))
        torch.save(dict(model={}, model_args={}, config=Bomb()), 'bomb2.pt')
        for name in ('bomb.pt', 'bomb2.pt'):
            with pytest.raises(SystemExit):
                checkpoint.load(name)
    assert not os.path.exists('exploded')


# ---- downloads -----------------------------------------------------------------------------------------------------

@pytest.fixture
def flaky():
    """A loopback server that breaks off, redirects in a ring, or resumes: flaky(body, plan) -> url, requests seen."""
    import http.server
    import threading
    started = []

    def serve(body, plan):
        seen = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                how = plan[min(len(seen), len(plan) - 1)]
                wanted = self.headers.get('Range')
                seen.append(wanted)
                if how == 'ring':
                    self.send_response(302)
                    self.send_header('Location', '/again')
                    self.end_headers()
                    return
                first = int(wanted[6:-1]) if wanted and how != 'no ranges' else 0
                self.send_response(206 if first else 200)
                if first:
                    self.send_header('Content-Range', f'bytes {first}-{len(body) - 1}/{len(body)}')
                self.send_header('Content-Length', str(len(body) - first))
                self.end_headers()
                self.wfile.write(body[first:first + how] if isinstance(how, int) else body[first:])

            def log_message(self, *args):
                pass
        httpd = http.server.HTTPServer(('127.0.0.1', 0), Handler)
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        started.append(httpd)
        return f'http://127.0.0.1:{httpd.server_port}/file', seen
    yield serve
    for httpd in started:
        httpd.shutdown()


def digest(body):
    import hashlib
    return hashlib.sha256(body).hexdigest()


def test_download_is_taken_up_where_it_broke_off(folder, flaky, monkeypatch):
    monkeypatch.setattr('time.sleep', lambda s: None)
    body = random.Random(0).randbytes(300_000)
    url, seen = flaky(body, [100_000, 50_000, 'all'])
    prepare.download(url, 'file', len(body), digest(body))
    assert (folder / 'file').read_bytes() == body and len(seen) == 3 and seen[0] is None
    resumed = [int(wanted.removeprefix('bytes=').removesuffix('-')) for wanted in seen[1:]]
    assert 0 < resumed[0] <= 100_000 < resumed[1] <= 150_000
    (folder / 'other.part').write_bytes(body[:7])   # left by a process that was killed
    url, seen = flaky(body, ['no ranges'])
    prepare.download(url, 'other', len(body), digest(body))
    assert (folder / 'other').read_bytes() == body and sorted(os.listdir()) == ['file', 'other']


@pytest.mark.parametrize('plan', [['ring'], [10], ['all']])
def test_failed_downloads_leave_nothing(folder, flaky, monkeypatch, plan):
    monkeypatch.setattr('time.sleep', lambda s: None)
    body = b'<html>' * 1000
    url, seen = flaky(body, plan)
    with pytest.raises(OSError):
        prepare.download(url, 'file', 300_000 if plan != ['all'] else len(body), digest(b'something else'))
    assert os.listdir() == [] and len(seen) < 200


# ---- zip files -----------------------------------------------------------------------------------------------------

BOOK = b'the quick brown fox ' * 500


def zipped(path, *members, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, 'w', compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return Path(path)


def patch_sizes(path, size):
    """Let every header of the zip claim `size` bytes for its member."""
    raw = bytearray(path.read_bytes())
    for signature, offset in ((b'PK\3\4', 22), (b'PK\1\2', 24)):
        at = -1
        while (at := raw.find(signature, at + 1)) >= 0:
            raw[at + offset:at + offset + 4] = size.to_bytes(4, 'little')
    path.write_bytes(raw)


def test_unzip_takes_the_one_member_and_writes_nothing(folder):
    (folder / 'inner').mkdir()
    zipped('inner/a.zip', ('../climbed', b'out'), ('/tmp/absolute-climbed', b'out'), ('book', BOOK), ('other', b'x' * 999))
    assert unzip('inner/a.zip', 'book', len(BOOK)) == BOOK
    assert sorted(str(p) for p in folder.rglob('*')) == [str(folder / 'inner'), str(folder / 'inner' / 'a.zip')]
    assert not Path('/tmp/absolute-climbed').exists()


@pytest.mark.parametrize('harm', ['missing', 'too long', 'too short', 'claims less', 'claims more', 'lzma', 'no zip', 'no file', 'empty',
                                  'encrypted', 'wrong offset'])
def test_unzip_refuses(folder, harm):
    size = len(BOOK)
    if harm != 'no file':
        path = zipped('a.zip', ('another' if harm == 'missing' else 'book', BOOK * (1 + (harm == 'too long'))),
                      compression=zipfile.ZIP_LZMA if harm == 'lzma' else zipfile.ZIP_DEFLATED)
    if harm == 'too short':
        size += 1
    elif harm.startswith('claims'):
        size += 7 if harm == 'claims more' else -7
        patch_sizes(path, size)
    elif harm == 'no zip':
        path.write_bytes(b'<html>404</html>' * 100)
    elif harm == 'empty':
        path.write_bytes(b'')
    elif harm == 'encrypted':
        raw = bytearray(path.read_bytes())
        raw[raw.find(b'PK\1\2') + 8] |= 1
        path.write_bytes(raw)
    elif harm == 'wrong offset':
        raw = bytearray(path.read_bytes())
        raw[raw.find(b'PK\1\2') + 42:raw.find(b'PK\1\2') + 46] = (len(raw) - 5).to_bytes(4, 'little')
        path.write_bytes(raw)
    with pytest.raises(OSError, match=r'a\.zip'):
        unzip('a.zip', 'book', size)


def test_unzip_of_a_bomb_stays_small(folder):
    """What packs to a thousandth is read no further than the size expected."""
    zipped('bomb.zip', ('book', bytes(1 << 26)))
    tracemalloc.start()
    with pytest.raises(OSError, match='has not'):
        unzip('bomb.zip', 'book', 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 22, peak


def test_unzip_of_damaged_files(folder):
    """One byte changed anywhere: the right bytes, or OSError, and nothing else."""
    path = zipped('a.zip', ('book', BOOK))
    whole, refusals = path.read_bytes(), 0
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            assert unzip('a.zip', 'book', len(BOOK)) == BOOK
        except OSError:
            refusals += 1
    assert refusals > len(whole) // 3
