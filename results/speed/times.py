"""
Seconds of training to a loss, and losses in a time: ours with three seeds, and nanoGPT's train.py beside.

    python results/speed/times.py ../nanoGPT > results/speed/times.txt
    python results/speed/times.py ../nanoGPT 'in 60 s'                     # a part of it

Run where data/shakespeare_char and data/enwik8 (its head: results/enwik8) are, on a quiet machine; ../nanoGPT: a clone whose
data/shakespeare_char holds the same token files (and a meta.pkl with its characters). Losses are on the whole validation split,
nanoGPT's by our evaluate.py.
"""
import os
import re
import shutil
import statistics
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SMALL = '--n_layer=4 --n_head=2 --n_embd=128'
CHAR = 'config/speedrun_shakespeare_char.py'
OURS = {   # what is shown: config and flags
    'the 0.8M net to 1.886': f'{CHAR} {SMALL} --block_size=64 --batch_size=32 --max_iters=130 --eval_interval=130 '
                             '--target_loss=1.886',
    'in 60 s': f'{CHAR} {SMALL} --block_size=128 --batch_size=16 --max_iters=620 --eval_interval=620 --target_loss=0',
    'in 180 s': f'{CHAR} --n_head=3 --n_embd=192 --batch_size=8 --max_iters=900 --eval_interval=900 --target_loss=0',
    'to 1.47': CHAR,
    'the head of enwik8 to 1.4928': 'config/speedrun_enwik8.py',
}
NANOGPT = {'the 0.8M net to 1.886': 2000, 'in 60 s': 1150, 'in 180 s': 3500}   # steps of its recipe for a CPU
ITS = '--device=cpu --compile=False --eval_iters=1 --eval_interval={0} --log_interval=1 --block_size=64 --batch_size=12 ' \
      '--n_layer=4 --n_head=4 --n_embd=128 --max_iters={0} --lr_decay_iters={0} --dropout=0.0 --out_dir=out-times'


def ours(flags, seed):
    command = f'python train.py {flags} --seed={seed} --out_dir=out-times'
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *command.split()[1:]], capture_output=True, text=True, check=True, cwd=HERE)
    wall = time.perf_counter() - started
    steps, loss = re.findall(r'done: ([\d,]+) steps.*val loss ([\d.]+) nats', done.stderr)[0]
    with open(os.path.join(HERE, 'out-times', 'log.csv'), encoding='utf-8') as f:
        seconds = float(f.read().splitlines()[-1].split(',')[-1])
    print(f'    seed {seed}: {loss} nats, {seconds:.1f} s of training, {wall:.1f} s in all, {steps} steps', flush=True)
    return float(loss), seconds, wall, command


def nanogpt(folder, steps):
    command = f'python train.py config/train_shakespeare_char.py {ITS.format(steps)}'
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *command.split()[1:]], capture_output=True, text=True, check=True, cwd=folder)
    wall = time.perf_counter() - started
    seconds = sum(float(ms) for ms in re.findall(r'iter \d+: loss [\d.]+, time ([\d.]+)ms', done.stdout)[:steps]) / 1e3
    evaluated = subprocess.run([sys.executable, 'evaluate.py', f'--checkpoint={folder}/out-times/ckpt.pt', '--dtype=float32',
                                f'--data_dir={folder}/data', '--json=-'], capture_output=True, text=True, check=True, cwd=HERE)
    loss = float(re.search(r'"nats_per_token": ([\d.]+)', evaluated.stdout)[1])
    print(f'    {command}\n    nanoGPT: {loss:.4f} nats, {seconds:.1f} s of training, {wall:.1f} s in all, {steps} steps',
          flush=True)


for name in sys.argv[2:] or OURS:
    flags = OURS[name]
    print(name)
    if name in NANOGPT:
        nanogpt(sys.argv[1], NANOGPT[name])
    found = [ours(flags, seed) for seed in (1, 2, 3)]
    print(f'    {found[0][3]}  # and 2, 3')
    spread = [(statistics.mean(values), statistics.stdev(values)) for values in list(zip(*found))[:3]]
    print('    mean (sd): {:.4f} ({:.4f}) nats, {:.1f} ({:.1f}) s of training, {:.1f} ({:.1f}) s in all'.format(
        *(figure for pair in spread for figure in pair)))
shutil.rmtree(os.path.join(HERE, 'out-times'))
