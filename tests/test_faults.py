"""Faults: kills, damage, full disks, lost ranks, hostile files. pytest tests/test_faults.py

Each test was seen failing without the protection that it tests. tests/torture.py does the same at
random and for longer."""
import contextlib
import hashlib
import http.server
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

import model
from lib import checkpoint, prepare, run_folder
from lib.prepare import unzip

TRAIN = str(ROOT / 'train.py')
TORCHRUN = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
TWO_RANKS = [*TINY, '--gradient_accumulation_steps=2']   # a micro-step for each
ENDLESS = ['--max_iters=100000', '--decay_lr=False']


def run_python(*argv):
    """Run Python to its end."""
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    return subprocess.run([PYTHON, *argv], capture_output=True, text=True, timeout=120,
                          env=environment)


def start_python(*argv, stderr=subprocess.PIPE):
    """Start Python; its stderr can be read line by line."""
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    return subprocess.Popen([PYTHON, *argv], stderr=stderr, text=True, env=environment)


def lines_of(run, seconds):
    """Yield the lines of a process's stderr; kill it after some seconds, as a hang is a failure."""
    watchdog = threading.Timer(seconds, run.kill)
    watchdog.start()
    yield from run.stderr
    watchdog.cancel()


def last_step(path='out/last.pt'):
    return checkpoint.load(path)['iter_num']


def equal_runs(out, other):
    """Tell whether two runs end with the same weights and the same log, times left out."""
    return (same_weights(f'{out}/last.pt', f'{other}/last.pt')
            and without_times(f'{out}/log.csv') == without_times(f'{other}/log.csv'))


def put(place, value):
    """Return a function that sets a value in a checkpoint. place: the keys on the way to it."""
    def change(loaded):
        for key in place[:-1]:
            loaded = loaded[key]
        loaded[place[-1]] = value
    return change


# ---- killed at any instant -----------------------------------------------------------------------

@pytest.mark.processor
def test_two_ranks_resume_exactly(mini, forked):
    common = ['train.py', *TWO_RANKS, '--optimizer=muon', '--dtype=bfloat16', '--dropout=0.1',
              '--max_iters=6', '--lr_decay_iters=6', '--eval_interval=3']
    forked([2, *common, '--out_dir=whole'],
           [2, *common, '--out_dir=parts', '--max_iters=3'],
           [2, *common, '--out_dir=parts', '--init_from=resume'])
    assert equal_runs('whole', 'parts')


@pytest.mark.parametrize('call', ['open', 'link', 'replace', 'fsync'])
def test_a_save_cut_off_at_a_system_call_leaves_a_whole_checkpoint(folder, monkeypatch, call):
    class Killed(BaseException):
        pass

    def stop(*args, **options):
        raise Killed
    older = dict(format=1, model={}, model_args={}, step=0)
    checkpoint.save('last.pt', older, 'last.previous.pt')
    with monkeypatch.context() as patch:
        patch.setattr(os, call, stop)
        with pytest.raises(Killed):
            checkpoint.save('last.pt', older | dict(step=1), 'last.previous.pt')
    assert checkpoint.read('last.pt')['step'] in (0, 1)


def test_a_run_saves_where_folders_cannot_be_flushed(mini, script, monkeypatch):
    """Windows opens no folders. No save may be reported as failed there."""
    opened = os.open

    def refuse_folders(path, *args, **options):
        if os.path.isdir(path):
            raise PermissionError(13, 'Permission denied')
        return opened(path, *args, **options)
    monkeypatch.setattr(os, 'open', refuse_folders)
    result = script('train.py', *TINY)
    assert result.code == 0, result.err
    assert 'could not be written' not in result.err
    assert last_step() == 10
    assert os.path.exists('out/last.previous.pt')


def test_the_previous_checkpoint_is_used_when_the_last_is_damaged(mini, script):
    every_four = [*TINY, '--eval_interval=4']
    script('train.py', *every_four, '--out_dir=whole')
    script('train.py', *every_four, '--max_iters=8')
    with open('out/last.pt', 'r+b') as f:
        f.seek(5000)
        f.write(b'damage')
    result = script('train.py', *every_four, '--init_from=resume')
    assert 'out/last.pt is damaged' in result.err
    assert 'using out/last.previous.pt' in result.err
    assert 'resumed from out/last.previous.pt at iter 4' in result.err
    assert equal_runs('whole', 'out')


def test_a_last_checkpoint_that_cannot_be_read_is_an_error(mini, script, refused, modes_hold):
    """The previous checkpoint is whole, but nothing says that the last one is damaged."""
    script('train.py', *TINY, '--eval_interval=4', '--max_iters=8')
    os.chmod('out/last.pt', 0)
    words = ['out/last.pt cannot be read (Permission denied)']
    refused('train.py', *TINY, '--init_from=resume', words=words)


def test_a_run_can_be_resumed_from_another_working_folder(mini, script, monkeypatch):
    """The run's data_dir is relative to the folder where the run began."""
    script('train.py', *TINY, '--max_iters=8')
    os.mkdir('elsewhere')
    monkeypatch.chdir('elsewhere')
    result = script('train.py', '--init_from=resume', f'--out_dir={mini}/out', '--max_iters=9',
                    '--device=cpu')
    assert result.code == 0, result.err
    assert 'resumed from' in result.err


def test_a_torn_log_line_is_dropped(mini, script):
    script('train.py', *TINY, '--out_dir=whole')
    script('train.py', *TINY, '--max_iters=5')
    with open('out/log.csv', 'a') as f:
        f.write('3,19')   # the machine failed while a row was written
    assert script('train.py', *TINY, '--init_from=resume').code == 0
    assert without_times('whole/log.csv') == without_times('out/log.csv')


@pytest.mark.parametrize('links', [True, False])
def test_an_improving_evaluation_writes_one_file(mini, script, monkeypatch, links):
    """best.pt and last.pt share it, where the file system has links."""
    if not links:
        def refuse(*names):
            raise OSError(1, 'no links here')
        monkeypatch.setattr(os, 'link', refuse)
    script('train.py', *TINY, '--max_iters=0')
    assert os.path.samefile('out/best.pt', 'out/last.pt') == links
    assert Path('out/best.pt').read_bytes() == Path('out/last.pt').read_bytes()
    script('train.py', *TINY, '--max_iters=4', '--init_from=resume')
    assert checkpoint.load('out/last.pt')['iter_num'] == 4
    assert checkpoint.load('out/last.previous.pt')['iter_num'] < 4


def test_best_is_never_replaced_by_a_worse_one(mini, script):
    """best.pt is newer than last.pt when a run is killed between the two writes."""
    script('train.py', *TINY, '--max_iters=5')
    best = checkpoint.load('out/best.pt')
    checkpoint.save('out/best.pt', best | dict(best_val_loss=0.5))
    assert script('train.py', *TINY, '--init_from=resume').code == 0
    assert checkpoint.load('out/best.pt')['best_val_loss'] == 0.5


@pytest.mark.parametrize('knob, expected', [
    ('--checkpoint_interval=3', [0, 3, 6, 9, 10]),
    ('--checkpoint_minutes=1e-9', list(range(11))),
])
def test_last_is_saved_between_evaluations(mini, script, monkeypatch, knob, expected):
    steps = []
    save = checkpoint.save

    def noting_steps(path, saved, *others):
        if path.endswith('last.pt'):
            steps.append(saved['iter_num'])
        save(path, saved, *others)
    monkeypatch.setattr(checkpoint, 'save', noting_steps)
    copy = checkpoint.copy

    def noting_copies(path, last):
        steps.append(checkpoint.load(path)['iter_num'])
        return copy(path, last)

    monkeypatch.setattr(checkpoint, 'copy', noting_copies)   # of an evaluation that improves
    script('train.py', *TINY, '--eval_interval=100', '--always_save_checkpoint=False', knob)
    assert steps == expected


def test_torture_in_short(folder):
    """Every part of tests/torture.py holds, and tries at least a few cases."""
    done = run_python(str(ROOT / 'tests' / 'torture.py'), '--minutes=0.05', '--seed=1')
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'all held' in done.stdout
    least = {'1 rank': 1, '2 rank': 1, 'damaged checkpoints': 20, 'bad inputs': 20,
             'consoles that fail': 4, 'text folders': 4}
    for part, cases in least.items():
        count = re.search(rf'^{part}.*?: ([\d,]+)', done.stdout, re.M)[1]
        assert int(count.replace(',', '')) >= cases, done.stdout


# ---- runs that share a folder --------------------------------------------------------------------

def test_a_new_run_moves_the_earlier_one_aside(mini, script):
    script('train.py', *TINY)
    before = Path('out/last.pt').read_bytes()
    result = script('train.py', *TINY, '--max_iters=1')
    assert 'moved to out/earlier-1' in result.err
    assert Path('out/earlier-1/last.pt').read_bytes() == before
    assert last_step() == 1
    assert len(read_log('out/log.csv')) == 2
    script('train.py', *TINY, '--max_iters=2')
    assert Path('out/earlier-1/last.pt').read_bytes() == before
    assert last_step('out/earlier-2/last.pt') == 1
    assert json.loads(Path('out/earlier-2/config.json').read_text())['max_iters'] == 1


def test_a_full_disk_leaves_the_earlier_run_where_it_is(mini, script, refused, monkeypatch):
    script('train.py', *TINY)
    before = sorted(os.listdir('out'))

    def full(*args, **options):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(run_folder.json, 'dump', full)
    refused('train.py', *TINY, words=['out cannot be written', 'No space left on device'])
    assert sorted(os.listdir('out')) == before


def test_an_earlier_run_without_its_last_checkpoint_is_moved_too(mini, script):
    script('train.py', *TINY, '--max_iters=2')
    os.remove('out/last.pt')
    best = Path('out/best.pt').read_bytes()
    script('train.py', *TINY, '--max_iters=2', '--seed=3')
    assert Path('out/earlier-1/best.pt').read_bytes() == best
    assert Path('out/best.pt').read_bytes() != best


def test_a_second_run_in_a_folder_is_refused_while_the_first_writes(mini, refused):
    run = start_python(TRAIN, *TINY, *ENDLESS)
    try:
        assert any(line.startswith('iter 0: loss') for line in run.stderr)
        refused('train.py', *TINY, words=['another run is writing'])
        refused('train.py', *TINY, '--init_from=resume', words=['another run is writing'])
    finally:
        run.send_signal(signal.SIGTERM)
        run.communicate(timeout=60)
    assert run.returncode == 143
    assert not os.path.exists('out/.lock')


@pytest.mark.parametrize('name', ['last.pt', 'last.previous.pt', 'best.pt', 'log.csv'])
def test_a_folder_where_a_file_should_be_is_refused_at_the_start(mini, refused, name):
    os.makedirs(f'out/{name}')
    refused('train.py', *TINY, words=['out', name])


# ---- lost ranks ----------------------------------------------------------------------------------

# In torchrun's first attempt rank 1 dies while rank 0 is still starting.
DIE_AT_FIRST = '''
import os
import runpy
import signal
import sys
import time
if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':
    if os.environ['RANK'] == '1':
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
del sys.argv[0]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name='__main__')
'''


def test_a_restart_before_the_run_began_is_a_new_run(mini, forked):
    """The folder holds an earlier run, and the restart must not take it for its own."""
    forked([2, 'train.py', *TWO_RANKS, '--max_iters=3', '--seed=1'])
    Path('start.py').write_text(DIE_AT_FIRST)
    done = run_python(*TORCHRUN, '--max-restarts=1', 'start.py', TRAIN, *TWO_RANKS,
                      '--max_iters=5')
    assert done.returncode == 0, done.stderr
    assert 'resumed' not in done.stderr
    assert len(read_log('out/log.csv')) == 6
    assert last_step('out/earlier-1/last.pt') == 3


NEEDS_PROC = pytest.mark.skipif(
    not os.path.exists('/proc'), reason='finds the process of a rank in /proc')
FORTY_STEPS = [*TWO_RANKS, '--max_iters=40', '--lr_decay_iters=40', '--checkpoint_interval=1']


def process_of_rank(rank):
    """Return the process id of a rank that torchrun has started in this folder."""
    for process in Path('/proc').glob('[0-9]*'):
        with contextlib.suppress(OSError):   # the process has just ended
            environment = (process / 'environ').read_bytes().split(b'\0')
            here = os.readlink(process / 'cwd') == os.getcwd()
            if here and f'RANK={rank}'.encode() in environment:
                return int(process.name)
    raise LookupError(f'no process of rank {rank}')


@NEEDS_PROC
def test_a_killed_rank_is_restarted_and_the_run_ends_the_same(mini, forked):
    """torchrun --max-restarts starts all ranks again, and they resume from last.pt."""
    forked([2, 'train.py', *FORTY_STEPS, '--out_dir=whole'])
    run = start_python(*TORCHRUN, '--max-restarts=2', TRAIN, *FORTY_STEPS)
    said = []
    for line in lines_of(run, 90):
        said.append(line)
        if line.startswith('iter 15: loss') and not any('resumed' in line for line in said):
            os.kill(process_of_rank(1), signal.SIGKILL)
    assert run.wait(120) == 0, ''.join(said)
    assert any('resumed from out/last.pt' in line for line in said)
    assert equal_runs('whole', 'out')


@NEEDS_PROC
def test_two_agents_restart_after_a_rank_was_killed(mini, forked):
    """Each torchrun agent stands for a machine, here on loopback. Both must start again."""
    forked([2, 'train.py', *FORTY_STEPS, '--out_dir=whole'])
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    agent = ['-m', 'torch.distributed.run', '--nnodes=2', '--nproc_per_node=1',
             '--max-restarts=2', '--rdzv_backend=c10d', '--rdzv_id=1', '--local_addr=127.0.0.1',
             f'--rdzv_endpoint=127.0.0.1:{port}']
    logs = [Path('agent0.log'), Path('agent1.log')]
    runs = []
    for log in logs:
        runs.append(start_python(*agent, TRAIN, *FORTY_STEPS, stderr=log.open('w')))
    deadline = time.monotonic() + 100
    killed = False
    while any(run.poll() is None for run in runs) and time.monotonic() < deadline:
        if not killed and any('iter 10: loss' in log.read_text() for log in logs):
            os.kill(process_of_rank(1), signal.SIGKILL)
            killed = True
        time.sleep(0.1)
    for run in runs:
        run.kill()
    said = ''.join(log.read_text() for log in logs)
    assert killed, said
    assert [run.wait() for run in runs] == [0, 0], said
    assert 'resumed from out/last.pt' in said
    assert equal_runs('whole', 'out')


def test_ranks_agree_on_the_step_of_a_signal(mini):
    """A scheduler sends SIGTERM to torchrun. All ranks save the same step, and can resume."""
    common = [*TORCHRUN, TRAIN, *TWO_RANKS, '--eval_interval=100000', *ENDLESS]
    run = start_python(*common)
    said = []
    for line in lines_of(run, 60):
        said.append(line)
        if line.startswith('iter 30: loss'):
            run.send_signal(signal.SIGTERM)
    run.wait(60)
    assert any('signal 15: saved out/last.pt' in line for line in said), ''.join(said)
    step = last_step()
    assert step > 30
    assert len(read_log('out/log.csv')) == step
    again = run_python(*common, '--init_from=resume', f'--max_iters={step + 2}')
    assert again.returncode == 0, again.stderr
    steps = [int(row['iter']) for row in read_log('out/log.csv')]
    assert steps == list(range(step + 3))


# A small file is checked when it is opened. VERIFY_BELOW = 0 leaves every file to the batches.
WITHOUT_VERIFYING = f'''
import runpy
import sys
sys.path.insert(0, {str(ROOT)!r})
from lib import data
data.VERIFY_BELOW = 0
runpy.run_path({TRAIN!r}, run_name='__main__')
'''


def use_nanogpts_layout():
    """Replace meta.json of data/mini by nanoGPT's meta.pkl, which has no hashes."""
    path = Path('data/mini/meta.json')
    chars = json.loads(path.read_text())['tokenizer']['chars']
    path.unlink()
    Path('data/mini/meta.pkl').write_bytes(pickle.dumps(dict(itos=dict(enumerate(chars)))))


def test_an_error_of_one_rank_ends_all_with_its_message(mini):
    """Only one rank meets a token that is out of range."""
    use_nanogpts_layout()
    tokens = np.fromfile('data/mini/train.bin', dtype='<u2')
    tokens[len(tokens) // 2] = 999
    tokens.tofile('data/mini/train.bin')
    Path('start.py').write_text(WITHOUT_VERIFYING)
    began = time.monotonic()
    done = run_python(*TORCHRUN, 'start.py', *TWO_RANKS, '--max_iters=1000',
                      '--lr_decay_iters=1000', '--eval_interval=1000')
    assert done.returncode != 0
    assert 'token 999 is outside the vocabulary' in done.stderr
    assert time.monotonic() - began < 40


def test_a_sharded_run_and_one_process_resume_from_each_other(mini, forked):
    """A sharded run has the losses of one process, and writes one whole checkpoint."""
    common = ['train.py', *TINY, '--gradient_accumulation_steps=6', '--max_iters=4',
              '--lr_decay_iters=8', '--eval_interval=2', '--sample_interval=4']
    more = [*common, '--init_from=resume', '--max_iters=8']
    forked([2, *common, '--shard', '--out_dir=shard-one'],
           [1, *common, '--out_dir=one-shard'],
           [1, *more, '--out_dir=shard-one'],
           [2, *more, '--shard', '--out_dir=one-shard', '--sample_interval=0'])
    rows = read_log('shard-one/log.csv')
    assert [int(row['iter']) for row in rows] == list(range(9))
    for one, other in zip(rows, read_log('one-shard/log.csv'), strict=True):
        for key in ('train_loss', 'val_loss', 'grad_norm'):
            both_empty = one[key] == other[key] == ''
            assert both_empty or float(one[key]) == pytest.approx(float(other[key]), abs=1e-5)


# ---- full disks ----------------------------------------------------------------------------------

# From the fifth save on, no file may grow past 60,000 bytes.
DISK_THAT_FILLS_UP = f'''
import resource
import runpy
import sys
sys.path.insert(0, {str(ROOT)!r})
from lib import checkpoint
save = checkpoint.save
saves = []
def limited(*args, **options):
    saves.append(1)
    if len(saves) == 5:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
    return save(*args, **options)
checkpoint.save = limited
sys.argv = ['train.py', *sys.argv[1:]]
runpy.run_path({TRAIN!r}, run_name='__main__')
'''


def test_a_disk_that_fills_up_costs_only_new_checkpoints(mini):
    """The run reports the failed save, makes all its steps, and ends with exit code 2."""
    done = run_python('-c', DISK_THAT_FILLS_UP, *TINY, '--eval_interval=2')
    assert done.returncode == 2, done.stderr
    assert 'Traceback' not in done.stderr
    assert ('last.pt could not be written (File too large); '
            'the older checkpoint is as it was') in done.stderr
    error = done.stderr.splitlines()[-1]
    assert error.startswith('error: ')
    assert 'make room' in error
    assert 0 < last_step() < 10
    assert not list(Path('out').glob('*.part'))
    assert int(read_log('out/log.csv')[-1]['iter']) == 10


def test_a_full_file_system_costs_only_new_checkpoints(mini, process):
    """The file system is a tmpfs of 300 kB."""
    os.makedirs('small')
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=300k', 'tmpfs', 'small']
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('mounting a tmpfs needs root')
    try:
        argv = [*TINY, '--out_dir=small/out', '--eval_interval=2', '--n_embd=32']
        done = process('train.py', *argv)
        assert done.returncode == 2, done.stderr
        assert 'Traceback' not in done.stderr
        assert 'could not be written (No space left on device)' in done.stderr
        for path in Path('small/out').iterdir():
            assert path.suffix != '.part'
            if path.suffix == '.pt':
                checkpoint.load(str(path))
    finally:
        subprocess.run(['umount', 'small'], check=True)


# ---- memory --------------------------------------------------------------------------------------

def run_out_of_memory(*args, **options):
    raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20 GiB')


def test_out_of_memory_names_the_next_smaller_sizes(mini, refused, monkeypatch):
    monkeypatch.setattr(model.MLP, 'forward', run_out_of_memory)
    words = ['batch_size=6', '--batch_size=3 --gradient_accumulation_steps=10']
    refused('train.py', *TINY, '--batch_size=6', '--gradient_accumulation_steps=5', words=words)
    refused('train.py', *TINY, '--batch_size=1', words=['--grad_checkpointing'])


def test_out_of_memory_in_the_optimizer_names_them_too(mini, refused, monkeypatch):
    """AdamW allocates its moments at the first step."""
    monkeypatch.setattr(torch.optim.AdamW, 'step', run_out_of_memory)
    words = ['--batch_size=3 --gradient_accumulation_steps=2']
    refused('train.py', *TINY, '--batch_size=6', words=words)


def test_another_runtime_error_keeps_its_traceback(mini, script, monkeypatch):
    def bug(*args, **options):
        raise RuntimeError('a bug')
    monkeypatch.setattr(model.MLP, 'forward', bug)
    with pytest.raises(RuntimeError, match='a bug'):
        script('train.py', *TINY)


PRINT_GROWTH = f'''
import pickle
import sys
import time
sys.path.insert(0, {str(ROOT)!r})
from lib import data
data.RELEASE_AFTER = 2 << 20
with open('data/big/meta.pkl', 'wb') as f:
    pickle.dump(dict(itos={{0: 'a'}}), f)
def resident():
    return int(open('/proc/self/statm').read().split()[1]) * 4096   # bytes
began = time.monotonic()
windows = data.TrainingWindows(data.Dataset('big'), 'train', 1024, 0)
windows.batch(0, 8)
seconds = time.monotonic() - began
before = resident()
for i in range(30):
    windows.batch(8 * i, 8)
print(seconds, resident() - before)
'''


def test_memory_stays_flat_on_20_gigabytes(folder):
    """Opening reads little. Batches give back their pages, which would add up to 15 MB."""
    os.makedirs('data/big')
    for name, size in (('train.bin', 20_000_000_000), ('val.bin', 2_000)):
        Path('data/big', name).touch()
        os.truncate(f'data/big/{name}', size)   # a sparse file
    done = run_python('-c', PRINT_GROWTH)
    assert done.returncode == 0, done.stderr
    seconds, grown = map(float, done.stdout.split())
    assert seconds < 5
    assert grown < 8e6


# ---- damaged and hostile checkpoints -------------------------------------------------------------

def test_every_kind_of_damage_is_noticed(trained, folder, capsys):
    """A checkpoint with a flipped bit or a lost end does not load, and the error names the file."""
    whole = (trained / 'last.pt').read_bytes()
    chance = random.Random(1)
    beginning = range(64)
    end = range(len(whole) - 200, len(whole))
    anywhere = [chance.randrange(len(whole)) for _ in range(100)]
    places = sorted({*beginning, *end, *anywhere})
    for place in places[::3]:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << chance.randrange(8)
        for kind, content in (('flip', flipped), ('cut', whole[:place])):
            Path('hurt.pt').write_bytes(content)
            with pytest.raises(SystemExit) as stop:
                checkpoint.load('hurt.pt')
            error = capsys.readouterr().err
            assert stop.value.code == 2, (kind, place)
            assert error.count('\n') == 1, (kind, place, error)
            assert 'hurt.pt' in error, (kind, place, error)


def test_torch_load_and_zip_tools_read_a_checkpoint(trained):
    """The seal is the comment of the zip file that torch.save writes."""
    assert torch.load(trained / 'last.pt', weights_only=True)['iter_num'] == 60
    with zipfile.ZipFile(trained / 'last.pt') as z:
        assert z.comment.startswith(b'sha256:')
        assert z.testzip() is None


LN_F = 'transformer.ln_f.weight'


@pytest.mark.parametrize('change, words', [
    (put(['model_args'], 'x'), ['lacks model']),
    (put(['model_args'], {}), ['weights do not fit']),
    (put(['model_args', 'n_embd'], 10**9), ['weights do not fit']),
    (put(['model_args', 'n_layer'], '2'), ['n_layer']),
    (put(['model_args', 'n_layer'], 10**9), ['n_layer=1000000000']),
    (put(['model_args', 'vocab_size'], -1), ['vocab_size']),
    (put(['model_args', 'moe'], 3), ['moe']),
    (put(['model', 'transformer.wte.weight'], 3), ['weights do not fit']),
    (put(['model', 'more'], 3), ['more: no tensor']),
    (put(['model', LN_F], torch.full((16,), math.nan)), ['not finite']),
    (lambda loaded: loaded['model'].pop(LN_F), [LN_F]),
    (put(['tokenizer'], dict(kind='evil')), ['tokenizer']),
    (put(['tokenizer'], dict(kind='byte')), ['256 symbols']),
])
def test_a_checkpoint_with_a_wrong_model_is_refused(trained, folder, refused, change, words):
    loaded = checkpoint.load(str(trained / 'last.pt'))
    change(loaded)
    checkpoint.save('lie.pt', loaded)
    flags = ['--checkpoint=lie.pt', '--device=cpu', '--start=12']
    refused('sample.py', *flags, words=['lie.pt', *words])


def put_moment(key, value):
    """Return a function that changes what AdamW knows about a parameter."""
    return put(['optimizer', 0, 'state', 3, key], value)


@pytest.mark.parametrize('change', [
    put(['config'], dict(batch_size='many')),
    put(['config'], 3),
    put(['config'], dict(dataset='../../etc')),
    put(['iter_num'], 'x'),
    put(['iter_num'], -3),
    put(['iter_num'], 10**30),
    put(['best_val_loss'], None),
    put(['best_val_loss'], 10**400),
    put(['best_val_loss'], math.nan),
    put(['seconds'], math.nan),
    put(['seconds'], -5.0),
    put(['seconds'], 10**400),
    put(['skipped'], math.inf),
    put(['optimizer'], 3),
    put(['optimizer'], [{}]),
    put(['optimizer'], [dict(state={9999: {}}, param_groups=[])]),
    lambda loaded: loaded['optimizer'][0]['state'].pop(0),
    put_moment('exp_avg', torch.zeros(3)),   # a fused kernel would read past its end
    put_moment('exp_avg', torch.zeros(0)),
    put_moment('exp_avg_sq', 1),
    put_moment('amsgrad', torch.zeros(16)),
    put_moment('step', torch.tensor(math.inf)),
])
def test_a_checkpoint_with_a_wrong_run_is_not_resumed(trained, mini, refused, change):
    loaded = checkpoint.load(str(trained / 'last.pt'))
    change(loaded)
    os.mkdir('out')
    checkpoint.save('out/last.pt', loaded)
    before = Path('out/last.pt').read_bytes()
    refused('train.py', '--init_from=resume', '--device=cpu', '--dtype=float32', '--max_iters=70')
    assert Path('out/last.pt').read_bytes() == before


def test_optimizer_settings_in_a_checkpoint_are_ignored(mini, script):
    """Rates, decay and switches come from the knobs, only the tensors from the file."""
    script('train.py', *TINY, '--out_dir=whole', '--max_iters=4', '--eval_interval=2')
    script('train.py', *TINY, '--max_iters=2')
    loaded = checkpoint.load('out/last.pt')
    group = loaded['optimizer'][0]['param_groups'][0]
    group.update(amsgrad=True, maximize=True, weight_decay=9.0, params=['?'])
    checkpoint.save('out/last.pt', loaded)
    assert script('train.py', *TINY, '--init_from=resume', '--max_iters=4').code == 0
    assert same_weights('whole/last.pt', 'out/last.pt')


def test_a_checkpoint_cannot_name_a_command_to_run(mini, script, refused):
    Path('prepare_evil.py').write_text('open("ran", "w")')
    script('train.py', *TINY, '--max_iters=2')
    loaded = checkpoint.load('out/last.pt')
    loaded['config'].update(dataset='nope', prepare=str(mini / 'prepare_evil.py'))
    checkpoint.save('out/last.pt', loaded)
    refused('train.py', '--init_from=resume', '--device=cpu', words=['data/nope'])
    assert not os.path.exists('ran')


class Bomb:
    """Unpickling this object makes a folder."""
    def __reduce__(self):
        return os.mkdir, ('exploded',)


def test_reading_a_checkpoint_runs_no_code(folder):
    torch.save(dict(model={}, model_args={}, config=Bomb()), 'inside.pt')
    for protocol in range(2, 6):
        Path(f'{protocol}.pt').write_bytes(pickle.dumps(Bomb(), protocol))
    for name in ('inside.pt', '2.pt', '3.pt', '4.pt', '5.pt'):
        with pytest.raises(SystemExit):
            checkpoint.load(name)
    assert not os.path.exists('exploded')


# ---- downloads -----------------------------------------------------------------------------------

@pytest.fixture
def flaky(monkeypatch):
    """flaky(body, plan) starts a server on loopback -> its URL, the Range headers it has seen.

    plan has an item for each request; the last item serves all later requests too. An item is a
    number of bytes after which the connection ends, 'all', 'no ranges' for a server that ignores
    Range, or 'ring' for redirections without end."""
    monkeypatch.setattr('time.sleep', lambda s: None)   # between the tries of a download
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
                first = 0
                if wanted and how != 'no ranges':
                    first = first_byte(wanted)
                self.send_response(206 if first else 200)
                if first:
                    self.send_header('Content-Range', f'bytes {first}-{len(body) - 1}/{len(body)}')
                self.send_header('Content-Length', str(len(body) - first))
                self.end_headers()
                last = first + how if isinstance(how, int) else len(body)
                self.wfile.write(body[first:last])

            def log_message(self, *args):
                pass
        httpd = http.server.HTTPServer(('127.0.0.1', 0), Handler)
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        started.append(httpd)
        return f'http://127.0.0.1:{httpd.server_port}/file', seen
    yield serve
    for httpd in started:
        httpd.shutdown()


def first_byte(wanted):
    """Return the number in a header like 'bytes=100-'."""
    return int(wanted.removeprefix('bytes=').removesuffix('-'))


def digest(body):
    return hashlib.sha256(body).hexdigest()


def test_a_download_resumes_where_it_broke_off(folder, flaky):
    body = random.Random(0).randbytes(300_000)
    url, seen = flaky(body, [100_000, 50_000, 'all'])
    prepare.download(url, 'file', len(body), digest(body))
    assert Path('file').read_bytes() == body
    assert os.listdir() == ['file']
    assert len(seen) == 3
    assert seen[0] is None
    second, third = map(first_byte, seen[1:])
    assert 0 < second <= 100_000 < third <= 150_000


def test_a_download_goes_on_after_a_call_that_failed(folder, flaky):
    body = random.Random(0).randbytes(300_000)
    url, seen = flaky(body, [100_000, 0, 0, 0, 'all'])
    with pytest.raises(OSError):
        prepare.download(url, 'file', len(body), digest(body))
    assert os.listdir() == ['file.part']
    prepare.download(url, 'file', len(body), digest(body))
    assert Path('file').read_bytes() == body
    assert os.listdir() == ['file']
    assert first_byte(seen[-1]) > 0


def test_a_part_of_another_file_is_fetched_again(folder, flaky):
    body = random.Random(0).randbytes(300_000)
    Path('file.part').write_bytes(b'<html>log in</html>')   # sent instead of the file
    url, seen = flaky(body, ['all'])
    prepare.download(url, 'file', len(body), digest(body))
    assert Path('file').read_bytes() == body
    assert len(seen) == 2


def test_a_download_starts_again_where_the_server_has_no_ranges(folder, flaky):
    body = random.Random(0).randbytes(300_000)
    Path('file.part').write_bytes(body[:7])   # left by a process that was killed
    url, seen = flaky(body, ['no ranges'])
    prepare.download(url, 'file', len(body), digest(body))
    assert Path('file').read_bytes() == body
    assert os.listdir() == ['file']


@pytest.mark.parametrize('plan, size', [
    (['ring'], 300_000),
    ([0], 300_000),
    (['all'], 6000),   # the right size and other bytes
])
def test_a_failed_download_leaves_nothing(folder, flaky, plan, size):
    url, seen = flaky(b'<html>' * 1000, plan)
    with pytest.raises(OSError):
        prepare.download(url, 'file', size, digest(b'something else'))
    assert os.listdir() == []
    assert len(seen) < 200


# ---- zip files -----------------------------------------------------------------------------------

BOOK = b'the quick brown fox ' * 500
LOCAL, CENTRAL = b'PK\3\4', b'PK\1\2'   # signatures of a member's header and directory entry


def zipped(path, *members, compression=zipfile.ZIP_DEFLATED):
    """Write a zip file of (name, content) pairs; return its path."""
    with zipfile.ZipFile(path, 'w', compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return Path(path)


def patch_sizes(path, size):
    """Let every header of the zip claim `size` bytes for its member."""
    raw = bytearray(path.read_bytes())
    for signature, offset in ((LOCAL, 22), (CENTRAL, 24)):
        at = -1
        while (at := raw.find(signature, at + 1)) >= 0:
            raw[at + offset:at + offset + 4] = size.to_bytes(4, 'little')
    path.write_bytes(raw)


def patch_directory(path, offset, content):
    """Overwrite some bytes of the zip's first directory entry."""
    raw = bytearray(path.read_bytes())
    at = raw.find(CENTRAL) + offset
    raw[at:at + len(content)] = content
    path.write_bytes(raw)


def test_unzip_returns_one_member_and_writes_nothing(folder):
    (folder / 'inner').mkdir()
    zipped('inner/a.zip',
           ('../climbed', b'out'),
           ('/tmp/absolute-climbed', b'out'),
           ('book', BOOK),
           ('other', b'x' * 999))
    assert unzip('inner/a.zip', 'book', len(BOOK)) == BOOK
    assert sorted(folder.rglob('*')) == [folder / 'inner', folder / 'inner' / 'a.zip']
    assert not Path('/tmp/absolute-climbed').exists()


def write_bad_zip(harm):
    """Write a.zip with something wrong; return the size that its member is expected to have."""
    path = Path('a.zip')
    size = len(BOOK)
    if harm == 'no file':
        return size
    if harm == 'empty':
        path.touch()
    elif harm == 'no zip':
        path.write_bytes(b'<html>404</html>' * 100)
    elif harm == 'missing':
        zipped(path, ('another', BOOK))
    elif harm == 'too long':
        zipped(path, ('book', BOOK * 2))
    elif harm == 'lzma':
        zipped(path, ('book', BOOK), compression=zipfile.ZIP_LZMA)
    else:
        zipped(path, ('book', BOOK))
    if harm == 'too short':
        return size + 1
    if harm == 'claims less':
        patch_sizes(path, size - 7)
        return size - 7
    if harm == 'claims more':
        patch_sizes(path, size + 7)
        return size + 7
    if harm == 'encrypted':
        patch_directory(path, 8, b'\1')
    elif harm == 'wrong offset':
        beyond = path.stat().st_size - 5
        patch_directory(path, 42, beyond.to_bytes(4, 'little'))
    return size


@pytest.mark.parametrize('harm', [
    'no file', 'empty', 'no zip', 'missing', 'too long', 'too short', 'claims less', 'claims more',
    'lzma', 'encrypted', 'wrong offset',
])
def test_unzip_refuses_a_bad_file(folder, harm):
    size = write_bad_zip(harm)
    with pytest.raises(OSError, match=r'a\.zip'):
        unzip('a.zip', 'book', size)


def test_unzip_reads_no_further_than_the_expected_size(folder):
    """64 MB of zeros are packed to a thousandth."""
    zipped('bomb.zip', ('book', bytes(1 << 26)))
    tracemalloc.start()
    with pytest.raises(OSError, match='has not'):
        unzip('bomb.zip', 'book', 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 22


def test_unzip_of_a_damaged_file_is_right_or_refused(folder):
    """One bit is flipped, in every byte in turn."""
    path = zipped('a.zip', ('book', BOOK))
    whole = path.read_bytes()
    refusals = 0
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            assert unzip('a.zip', 'book', len(BOOK)) == BOOK
        except OSError:
            refusals += 1
    assert refusals > len(whole) // 3
