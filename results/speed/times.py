"""
Seconds of training to a loss, and losses in a time: ours with three seeds, and nanoGPT beside.

    python results/speed/times.py ../nanoGPT > results/speed/times.txt
    python results/speed/times.py ../nanoGPT 'in 60 s'      # a part of it

Run it on a quiet machine where data/shakespeare_char and data/enwik8 (its head, see
results/enwik8) are. ../nanoGPT is a clone whose data/shakespeare_char holds the same token files,
and a meta.pkl with the characters. Losses are on the whole validation split, nanoGPT's too: our
evaluate.py reads its checkpoint.
"""
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

HERE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SEEDS = (1, 2, 3)
OUT_DIR = 'out-times'
CHAR = 'config/speedrun_shakespeare_char.py'
SMALL = '--n_layer=4 --n_head=2 --n_embd=128'
OURS = {   # what is measured: config and flags
    'the 0.8M net to 1.886': f'{CHAR} {SMALL} --block_size=64 --batch_size=32 --max_iters=130 '
                             '--eval_interval=130 --target_loss=1.886',
    'in 60 s': f'{CHAR} {SMALL} --block_size=128 --batch_size=16 --max_iters=620 '
               '--eval_interval=620 --target_loss=0',
    'in 180 s': f'{CHAR} --n_head=3 --n_embd=192 --batch_size=8 --max_iters=900 '
                '--eval_interval=900 --target_loss=0',
    'to 1.47': CHAR,
    'the head of enwik8 to 1.4928': 'config/speedrun_enwik8.py',
}
NANOGPT_STEPS = {'the 0.8M net to 1.886': 2000, 'in 60 s': 1150, 'in 180 s': 3500}


@dataclass
class Run:
    """A run of train.py, and its figures."""
    command: str
    loss: float      # nats per character or byte
    seconds: float   # training alone
    wall: float      # seconds of the whole command


def run_script(words, folder):
    """Run a script with its flags in a folder; return (the finished process, seconds)."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True,
                          cwd=folder)
    return done, time.perf_counter() - started


def train_ours(flags, seed):
    """Train one of ours; print its figures and return them."""
    command = f'python train.py {flags} --seed={seed} --out_dir={OUT_DIR}'
    done, wall = run_script(command.split()[1:], HERE)
    steps, loss = re.findall(r'done: ([\d,]+) steps.*val loss ([\d.]+) nats', done.stderr)[0]
    with open(os.path.join(HERE, OUT_DIR, 'log.csv'), encoding='utf-8') as f:
        last = f.read().splitlines()[-1]
    seconds = float(last.split(',')[-1])
    print(f'    seed {seed}: {loss} nats, {seconds:.1f} s of training, {wall:.1f} s in all, '
          f'{steps} steps', flush=True)
    return Run(command, float(loss), seconds, wall)


def train_nanogpt(folder, steps):
    """Train with nanoGPT's recipe for a CPU, in its folder; print the figures."""
    command = ('python train.py config/train_shakespeare_char.py --device=cpu --compile=False '
               f'--eval_iters=1 --eval_interval={steps} --log_interval=1 --block_size=64 '
               '--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 '
               f'--max_iters={steps} --lr_decay_iters={steps} --dropout=0.0 --out_dir={OUT_DIR}')
    done, wall = run_script(command.split()[1:], folder)
    times = re.findall(r'iter \d+: loss [\d.]+, time ([\d.]+)ms', done.stdout)[:steps]
    seconds = sum(float(ms) for ms in times) / 1e3
    evaluated, _ = run_script(
        ['evaluate.py', f'--checkpoint={folder}/{OUT_DIR}/ckpt.pt', '--dtype=float32',
         f'--data_dir={folder}/data', '--json=-'], HERE)
    loss = float(re.search(r'"nats_per_token": ([\d.]+)', evaluated.stdout)[1])
    print(f'    {command}')
    print(f'    nanoGPT: {loss:.4f} nats, {seconds:.1f} s of training, {wall:.1f} s in all, '
          f'{steps} steps', flush=True)


def mean_sd(values, digits):
    """Return '1.5 (0.1)', the mean and the standard deviation."""
    return f'{statistics.mean(values):.{digits}f} ({statistics.stdev(values):.{digits}f})'


def measure(name, folder):
    """Measure one line of OURS, nanoGPT first where it has a recipe for it."""
    print(name)
    if name in NANOGPT_STEPS:
        train_nanogpt(folder, NANOGPT_STEPS[name])
    runs = [train_ours(OURS[name], seed) for seed in SEEDS]
    print(f'    {runs[0].command}  # and 2, 3')
    loss = mean_sd([run.loss for run in runs], 4)
    seconds = mean_sd([run.seconds for run in runs], 1)
    wall = mean_sd([run.wall for run in runs], 1)
    print(f'    mean (sd): {loss} nats, {seconds} s of training, {wall} s in all')


for name in sys.argv[2:] or OURS:
    measure(name, sys.argv[1])
shutil.rmtree(os.path.join(HERE, OUT_DIR))
