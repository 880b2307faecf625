"""
Studies of what one choice is worth, all else equal, over several seeds.

    python ablate.py list                # the studies and their variants
    python ablate.py heads               # three seeds each, two to three minutes a run on two cores
    python ablate.py heads --seeds=5     # runs the seeds that are missing
    python ablate.py heads --full        # the setting of published studies, for GPUs, in parallel
    python ablate.py heads --report      # table and picture once more, from heads.json alone

Starts train.py once for each variant and seed. Reads data/<dataset>/; writes NAME.json (every run),
NAME.md and NAME.png into the folder of results. An interrupted study continues with the same
command. The study residual also measures gradients, and writes residual-gradients.png.
"""
import ast
import glob
import hashlib
import json
import math
import os
import queue
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, fields

import lib.early  # noqa: F401  # before NumPy and torch

import numpy as np
import torch
from scipy import stats

from lib import plots
from lib.configurator import check, configure, ending_signals
from lib.console import counted, fail, say, write
from lib.data import Dataset, TrainingWindows, how_to_make, open_dataset
from lib.fast import TrainingLoss
from lib.optimizers import Optimizers, Schedule, TrainingStep
from lib.run_folder import read_log
from lib.runtime import clock, find_device, lock
from lib.tokenizers import token_sizes
from model import GPT, GPTConfig

study = ''            # name of the study; may be typed first, without --study=
variants = ''         # some of its variants, with commas between them; empty: all
seeds = 3             # runs of each variant, with the seeds 1, 2, 3, ...
full = False          # the published setting; False: a smaller one for two CPU cores
flags = ''            # flags for train.py in every run: '--n_embd=64 --max_iters=500'
report = False        # write table and picture from the results that exist, and run nothing
results = 'results/ablations'   # folder of the results
data_dir = 'data'     # where datasets live
device = 'auto'       # 'cpu', 'cuda' (every GPU, in parallel), 'cuda:1', 'mps'
knobs, _ = configure(globals(), find_device, first='study')

HERE = os.path.dirname(os.path.abspath(__file__))
RUNNING = 'out-ablate'   # folder of the runs that are not finished

# ---- the setting: what all runs share ------------------------------------------------------------

SETTING = dict(
    dataset='shakespeare_char', n_layer=4, n_head=4, n_embd=128, block_size=64, dropout=0.0,
    gradient_accumulation_steps=1, batch_size=32, max_iters=1500, warmup_iters=50,
    learning_rate=8e-3, min_lr=0.0, beta2=0.99, eval_interval=250, eval_iters=20,
    log_interval=50, always_save_checkpoint=False)
if full:
    SETTING |= dict(
        n_embd=256, block_size=128, dropout=0.2, batch_size=64, max_iters=5000, warmup_iters=100,
        learning_rate=1e-3, eval_interval=500)
WIDTH = SETTING['n_embd']
RATE = SETTING['learning_rate']

# ---- the studies: name -> (baseline, {variant: its flags for train.py}) --------------------------

# Two keys of a variant are not flags. against: the variant that it is compared with, instead of the
# baseline. counted: it is not trained, but counted in the training text.
NOT_FLAGS = ('against', 'counted')

ROPE = dict(pos='rope')
QK_NORM = ROPE | dict(qk_norm=True)
RELU2 = QK_NORM | dict(activation='relu2')
UNTIED = RELU2 | dict(tie_weights=False, zero_init=True)
STUDIES = {
    'baselines': ('GPT', {
        'uniform': dict(counted='uniform'),
        'counted unigram': dict(counted='unigram'),
        'counted bigram': dict(counted='bigram'),
        'trained bigram': dict(n_layer=0, pos='none', tie_weights=False),
        'tied bigram': dict(n_layer=0, pos='none'),
        'GPT': {}}),
    'heads': ('4 heads', {
        '1 head': dict(n_head=1),
        '2 heads': dict(n_head=2),
        '4 heads': dict(n_head=4),
        '8 heads': dict(n_head=8)}),
    'depth': ('4 layers', {f'{n} layers': dict(n_layer=n) for n in (2, 4, 6, 8)}),
    'width': (f'4 x {WIDTH}', {   # layers x width, with nearly the same number of parameters
        f'{n} x {C}': dict(n_layer=n, n_embd=C)
        for n, C in ((1, 2 * WIDTH), (2, 180 * WIDTH // 128), (4, WIDTH), (8, 92 * WIDTH // 128))}),
    'norm': ('pre', {
        'pre': {},
        'post': dict(norm='post'),
        'none': dict(norm='none')}),
    'residual': ('4 layers', {
        '2 layers': dict(n_layer=2),
        '2 layers without': dict(n_layer=2, residual=False, against='2 layers'),
        '4 layers': dict(n_layer=4),
        '4 layers without': dict(n_layer=4, residual=False),
        '8 layers': dict(n_layer=8),
        '8 layers without': dict(n_layer=8, residual=False, against='8 layers')}),
    'positions': ('learned', {
        'learned': {},
        'rope': dict(pos='rope'),
        'none': dict(pos='none')}),
    'tokenizer': ('char', {
        'char': dict(dataset='shakespeare_char'),
        'byte': dict(dataset='shakespeare_byte'),
        # These tokens are 2.0, 2.4, 3.3 and 3.3 characters long. With fewer sequences, all variants
        # see as much text. For as much time instead, whatever the text, add
        # --flags="--max_minutes=1.5 --max_iters=6000 --warmup_iters=200" and another --results.
        'bpe 512': dict(dataset='shakespeare_bpe_512', batch_size=33 if full else 16),
        'bpe 1024': dict(dataset='shakespeare_bpe', batch_size=26 if full else 13),
        'bpe 4096': dict(dataset='shakespeare_bpe_4096', batch_size=19 if full else 10),
        'gpt2': dict(dataset='shakespeare', batch_size=19 if full else 10)}),
    'dropout': ('0.0', {
        '0.0': dict(dropout=0.0),
        '0.1': dict(dropout=0.1),
        '0.2': dict(dropout=0.2)}),
    'regularization': ('none', {
        'none': {},
        'label smoothing 0.1': dict(label_smoothing=0.1),
        'layer drop 0.1': dict(layer_drop=0.1)}),
    'optimizer': (f'AdamW {RATE:g}', {
        f'AdamW {RATE / 2:g}': dict(learning_rate=RATE / 2),
        f'AdamW {RATE:g}': dict(learning_rate=RATE),
        f'AdamW {2 * RATE:g}': dict(learning_rate=2 * RATE),
        'Muon 0.01': dict(optimizer='muon', muon_learning_rate=0.01),
        'Muon 0.02': dict(optimizer='muon', muon_learning_rate=0.02),
        'Muon 0.04': dict(optimizer='muon', muon_learning_rate=0.04)}),
    'modern': ('GPT-2', {   # each adds one change to the one before
        'GPT-2': {},
        '+ rope': ROPE,
        '+ QK-norm': QK_NORM | dict(against='+ rope'),
        '+ ReLU²': RELU2 | dict(against='+ QK-norm'),
        '+ untied head, zero init': UNTIED | dict(against='+ ReLU²'),
        '+ Muon': UNTIED | dict(optimizer='muon', against='+ untied head, zero init')}),
}


def marked(variant, baseline):
    """Return a variant's name, with a mark if it is the baseline."""
    return f'{variant} (baseline)' if variant == baseline else variant


def print_studies():
    """Write the name of every study, and of its variants, on stdout."""
    for name, (baseline, changes) in STUDIES.items():
        names = ', '.join(marked(variant, baseline) for variant in changes)
        write(f'{name:15} {names}\n')


# ---- plan: variants, flags and data --------------------------------------------------------------

@dataclass
class Plan:
    """What the command asks for."""
    baseline: str    # name of a variant
    changes: dict    # variant -> {key: value as text}, flags and NOT_FLAGS, of the whole study
    chosen: list     # variants to run
    setting: dict    # flags that all runs share: {knob of train.py: value as text}

    def flags_of(self, variant):
        """Return train.py's flags for a variant, without seed, device and folders."""
        return self.setting | flags_among(self.changes[variant])


def flags_among(changes):
    """Return what is a flag for train.py among the changes of a variant."""
    return {key: value for key, value in changes.items() if key not in NOT_FLAGS}


def make_plan():
    """Return the plan for the knobs; fail for a study, variant or flag that is not allowed."""
    if study not in STUDIES:
        fail(f'study={study!r}: allowed are list, {", ".join(STUDIES)}; '
             f'type python ablate.py heads')
    check(knobs, seeds=1)
    baseline, changes = STUDIES[study]
    return Plan(baseline, {variant: as_text(values) for variant, values in changes.items()},
                chosen_variants(baseline, changes), as_text(SETTING | typed_flags(changes)))


def as_text(values):
    """Return a dict with its values as a command line has them."""
    return {key: str(value) for key, value in values.items()}


def chosen_variants(baseline, changes):
    """Return the variants that --variants names, or all; none for --report."""
    if report:
        return []
    if not variants:
        return list(changes)
    chosen = [name.strip() for name in variants.split(',')]
    for name in chosen:
        if name not in changes:
            fail(f'variants={name!r}: {study} has {", ".join(changes)}; '
                 f'type --variants="{baseline}"')
    return chosen


def typed_flags(changes):
    """Return the flags in --flags as {knob: text}.

    Fail for a knob that some variants of the study change and the setting does not have: the other
    variants would get the flag too, and their names would be wrong."""
    typed = {}
    try:
        words = shlex.split(flags)
    except ValueError as error:
        fail(f'flags={flags!r}: {error}; allowed are --key=value of train.py, as in a shell; '
             f'type --flags="--max_iters=500"')
    for word in words:
        parts = re.fullmatch(r'--(\w+)=(.*)', word)
        if not parts or parts[1] in ('seed', 'out_dir', 'device', 'init_from', 'data_dir'):
            fail(f'flags={word!r}: allowed are --key=value of train.py, but for seed, out_dir, '
                 f'device, data_dir and init_from; type --flags="--max_iters=500"')
        key = parts[1]
        if key not in SETTING and any(key in values for values in changes.values()):
            fail(f'flags={word!r}: {study} varies {key} itself; allowed are knobs that it leaves '
                 f'alone; type --flags="--max_iters=500"')
        typed[key] = parts[2]
    return typed


@dataclass
class Opened:
    """A dataset of the study."""
    data: Dataset
    digest: str              # hash of its tokens, 16 hexadecimal digits
    bytes_per_token: float   # mean over the validation split


def open_datasets():
    """Return {name: Opened} for the chosen variants; fail for a stand-in text."""
    datasets = {}
    for variant in plan.chosen:
        name = plan.flags_of(variant)['dataset']
        if name not in datasets:
            datasets[name] = open_one(name)
    return datasets


def open_one(name):
    """Return a dataset as an Opened; fail for a stand-in text."""
    data = open_dataset(name, data_dir)
    if data.stand_in_banner():
        fail(f'{data.folder} is a stand-in, and a study of it would be taken for one of the real '
             f'text; make it anew: {how_to_make(name, data_dir=data_dir)}')
    digest = hashlib.sha256()
    for split in ('train', 'val'):
        for shard in data.split(split):
            digest.update(shard.tobytes())
    predicted = np.concatenate([shard[1:] for shard in data.split('val')])
    sizes = token_sizes(data.tokenizer)[0]
    return Opened(data, digest.hexdigest()[:16], sizes[predicted].mean())


# ---- results: what is there already --------------------------------------------------------------

def read_results(path):
    """Return a study's results; fail where the file holds something else."""
    needed = {'variant', 'seed', 'flags', 'data', 'status', 'torch', 'device'}
    try:
        with open(path, encoding='utf-8') as f:
            there = json.load(f)
        there['setting'].items(), there['variants'].items(), there['full']
        there['baseline'].upper(), there['study'].upper()
        for run in there['runs']:
            missing = needed - run.keys()
            if missing:
                raise ValueError(f'a run has no {min(missing)}')
        return there
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        fail(f"{path} is not a study's results ({type(error).__name__}: {error}); "
             f'type --results=FOLDER for another place')


def results_to_report():
    """Return the results that exist; fail where there are none."""
    if not os.path.exists(file):
        command = f'python ablate.py {study}'
        if full:
            command += ' --full'
        fail(f'{file} is not there; run it first: {command}')
    return read_results(file)


def results_to_continue():
    """Return the results with the runs that exist; fail where those were of other flags or data."""
    there = dict(runs=[])
    if os.path.exists(file):
        there = read_results(file)
    for run in there['runs']:
        check_unchanged(run)
    return dict(study=study, baseline=plan.baseline, full=full, setting=plan.setting,
                variants=plan.changes, runs=there['runs'], gradients=there.get('gradients', []))


def check_unchanged(run):
    """Fail for a run that would have other flags, or other data, if it were started now."""
    variant = run['variant']
    had = run['flags'] | dict(data=run['data'])
    now = dict(data=run['data'])
    if variant in plan.changes:
        now |= plan.flags_of(variant)
        if now['dataset'] in datasets:
            now['data'] = datasets[now['dataset']].digest
    for key in had | now:
        if had.get(key) != now.get(key):
            fail(f'{file} has runs of {variant!r} with {key}={had.get(key)}, which is now '
                 f'{now.get(key)}, and the two are not mixed; '
                 f'type --results=FOLDER for another place')


def trained_elsewhere():
    """Return the runs of the other studies that were trained to the end."""
    runs = []
    for other in sorted(glob.glob(os.path.join(results, '*.json'))):
        if other != file:
            runs += [run for run in read_results(other)['runs'] if 'dtype' in run]
    return runs


def save_results():
    """Write the results as JSON, with a line for each run in the order of the variants.

    Gradients, if the study measures them, are also a line each."""
    order = list(found['variants'])
    runs = sorted(found['runs'], key=lambda run: (order.index(run['variant']), run['seed']))
    rest = {key: value for key, value in found.items() if key not in ('runs', 'gradients')}
    text = json.dumps(rest, indent=1, ensure_ascii=False).removesuffix('\n}')
    for key, entries in (('runs', runs), ('gradients', found['gradients'])):
        if entries or key == 'runs':
            lines = ',\n'.join('  ' + json.dumps(entry, ensure_ascii=False) for entry in entries)
            text += f',\n "{key}": [\n{lines}\n ]'
    write_file(file, text + '\n}\n')


def write_file(path, content):
    """Write a file whole: what a study that is interrupted has written before stays as it was."""
    try:
        with open(path + '.part', 'w', encoding='utf-8') as f:
            f.write(content)
        os.replace(path + '.part', path)
    except OSError as error:
        kill_runs()
        fail(f'{path} cannot be written ({error.strerror}); make room, '
             f'or type --results=FOLDER for another place')


# ---- run: one variant with one seed --------------------------------------------------------------

processes = set()   # train.py's that are at work


def kill_runs():
    for process in list(processes):
        process.kill()


def one_run(variant, seed, on):
    """Train a variant with a seed, or count it; return what is known of the run as plain data.

    on: the device. An equal run of another study is taken over instead."""
    train_flags = plan.flags_of(variant)
    run = dict(variant=variant, seed=seed, flags=train_flags,
               data=datasets[train_flags['dataset']].digest, torch=torch.__version__,
               device=on.partition(':')[0])
    if 'counted' in plan.changes[variant]:
        loss = counted_loss(plan.changes[variant]['counted'])
        return run | dict(status='done', val_loss=loss, bits_per_byte=bits_per_byte(loss, run),
                          parameters=0, tokens=0, seconds=0, log=[])
    for other in elsewhere:
        if all(other[key] == run[key] for key in ('seed', 'flags', 'data', 'torch', 'device')):
            return other | dict(variant=variant)
    return train(run, on)


def bits_per_byte(loss, run):
    """Return bits per byte for a loss in nats per token."""
    bytes_per_token = datasets[run['flags']['dataset']].bytes_per_token
    return loss * (1 / math.log(2) / bytes_per_token)


def counted_loss(how):
    """Return the exact loss of a model of frequencies, in nats per token of the validation split.

    how: 'uniform', 'unigram' or 'bigram'. The frequencies are those of the training text, with one
    added to each count, so that no probability is 0."""
    data = datasets[plan.setting['dataset']].data
    V = data.vocab_size
    if how == 'uniform':
        return math.log(V)
    counts = np.ones((V, V))   # by the token before, and the token
    np.add.at(counts, pairs(data, 'train', how), 1)
    probabilities = counts / counts.sum(axis=1, keepdims=True)
    return -np.log(probabilities[pairs(data, 'val', how)]).mean().item()


def pairs(data, split, how):
    """Return (the tokens before, the tokens) of all targets in a split, two arrays.

    For 'unigram' every token before is 0, so that it makes no difference."""
    shards = [shard.astype(np.int64) for shard in data.split(split)]
    before = np.concatenate([shard[:-1] for shard in shards])
    after = np.concatenate([shard[1:] for shard in shards])
    if how == 'unigram':
        before = np.zeros_like(before)
    return before, after


def train(run, on):
    """Return a run with what train.py did. on: the device."""
    name = f'{run["variant"]}-{run["seed"]}-{os.getpid()}'
    folder = os.path.join(RUNNING, study, re.sub(r'\W+', '-', name))
    code, last_line = run_train_py(run, on, folder)
    logged = read_log(os.path.join(folder, 'log.csv'))
    run['log'] = [[int(row['tokens']), as_number(row['train_loss']), as_number(row['val_loss'])]
                  for row in logged]
    stopped_at = re.match(r'iter (\d+): .*no longer finite', last_line)
    if code == 0:
        run |= finished(run, logged[-1], folder)
    elif stopped_at:
        run |= dict(status='diverged', step=int(stopped_at[1]))
    elif logged or code != 2:
        run |= dict(status='failed', error=last_line or f'ended with {code}')
    else:
        run |= dict(status='refused', error=last_line)
    shutil.rmtree(folder, ignore_errors=True)
    return run


def run_train_py(run, on, folder):
    """Run train.py to its end; return its exit code and the last line that it printed on stderr."""
    command = [sys.executable, os.path.join(HERE, 'train.py')]
    command += [f'--{key}={value}' for key, value in run['flags'].items()]
    command += [f'--seed={run["seed"]}', f'--out_dir={folder}', f'--data_dir={data_dir}',
                f'--device={on}']
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               text=True, errors='replace')
    processes.add(process)
    said = process.communicate()[1].strip().splitlines()
    processes.discard(process)
    last_line = said[-1] if said else ''
    return process.returncode, last_line.removeprefix('error: ')


def as_number(cell):
    """Return a cell of log.csv as a number, None for an empty one."""
    return float(cell) if cell else None


def finished(run, last, folder):
    """Return what is known of a run that came to its end. last: the last row of its log."""
    with open(os.path.join(folder, 'config.json'), encoding='utf-8') as f:
        config = json.load(f)
    loss = float(last['val_loss'])
    return dict(status='done', val_loss=loss, bits_per_byte=bits_per_byte(loss, run),
                parameters=config['parameters'], tokens=int(last['tokens']),
                seconds=float(last['seconds']), dtype=config['dtype'])


# ---- run: all of them ----------------------------------------------------------------------------

def take_folders():
    """Make the folders of results and of runs; return the lock on the latter.

    What a killed study has left there is removed."""
    running = os.path.join(RUNNING, study)
    try:
        os.makedirs(results, exist_ok=True)
        os.makedirs(running, exist_ok=True)
        held = lock(running)
        for left_over in glob.glob(os.path.join(running, '*', '')):
            shutil.rmtree(left_over, ignore_errors=True)   # a train.py may still write there
        return held
    except OSError as error:
        fail(f'{error.filename} cannot be made ({error.strerror}); '
             f'type --results=FOLDER for another place')


def stop_on_signals():
    """Let a signal end the runs and this script at once: the results have been written."""
    def stop(number, frame):
        kill_runs()
        say(f'stopped; what is done is in {file}, and the same command goes on')
        os._exit(128 + number)
    for number in ending_signals():
        signal.signal(number, stop)


def key_of(run):
    return run['variant'], run['seed']


def runs_to_do(there):
    """Return the (variant, seed) pairs that are not `there`, seed by seed. Counts need one seed."""
    todo = []
    for seed in range(1, seeds + 1):
        for variant in plan.chosen:
            repeats = 'counted' in plan.changes[variant] and seed > 1
            if (variant, seed) not in there and not repeats:
                todo.append((variant, seed))
    return todo


def run_all():
    """Do the runs that are missing or have failed, and save the results after each of them."""
    there = {key_of(run) for run in found['runs'] if run['status'] != 'failed'}
    todo = runs_to_do(there)
    devices = [device]
    if device == 'cuda':
        devices = [f'cuda:{i}' for i in range(torch.cuda.device_count())]
    if found['runs']:
        save_results()   # --report then finds the variants by their present names
    message = (f'{study}: {counted(len(todo), "run")} to do on {", ".join(devices)}, '
               f'{len(there)} in {file}')
    if not todo:
        message += '; to run it anew type --results=FOLDER'
    say(message)
    free = queue.Queue()   # devices without a run
    for name in devices:
        free.put(name)
    started = time.perf_counter()
    with ThreadPoolExecutor(len(devices)) as pool:
        pending = [pool.submit(run_on_free, free, variant, seed) for variant, seed in todo]
        for done, future in enumerate(as_completed(pending), 1):
            run = future.result()
            if run['status'] == 'refused':   # the next runs would be refused too
                pool.shutdown(wait=False, cancel_futures=True)
                kill_runs()
                fail(f'train.py refuses {run["variant"]!r}: {run["error"]}')
            found['runs'] = [old for old in found['runs'] if key_of(old) != key_of(run)] + [run]
            save_results()
            left = (time.perf_counter() - started) / done * (len(todo) - done)
            say(f'{run["variant"]}, seed {run["seed"]}: {outcome(run)}; '
                f'{done} of {len(todo)}, {clock(left)} left')


def run_on_free(free, variant, seed):
    """Do a run on a device from the queue of free ones, and put it back."""
    on = free.get()
    try:
        return one_run(variant, seed, on)
    finally:
        free.put(on)


def outcome(run):
    """Return in words how a run ended."""
    if run['status'] == 'done':
        return f'{run["val_loss"]:.4f} nats per token'
    if run['status'] == 'diverged':
        return f'diverged at step {run["step"]:,}'
    return f'failed: {run["error"]}'


# ---- run: the gradients of the study residual ----------------------------------------------------

GRADIENT_STEPS = (0, 20, 100)   # optimizer steps after which gradients are measured


def measure_gradients():
    """Measure the gradients of the chosen variants that have none yet, and save the results."""
    there = {entry['variant'] for entry in found['gradients']}
    for variant in plan.chosen:
        if variant not in there:
            found['gradients'] += gradients_through_depth(variant, seed=1)
            save_results()
            say(f'{variant}: gradients measured')


def gradients_through_depth(variant, seed):
    """Return what the gradient of each block's weights is on the way, as plain data.

    The net is trained as train.py trains it, in fp32 and on the processor. The norm is that of all
    weights of a block together, before clipping."""
    flags = {key: as_value(text) for key, text in plan.flags_of(variant).items()}
    data = datasets[flags['dataset']].data
    shape = {field.name: flags[field.name] for field in fields(GPTConfig) if field.name in flags}
    torch.manual_seed(seed)
    net = GPT(GPTConfig(**shape, vocab_size=data.vocab_size))
    rate = flags['learning_rate']
    optimizers = Optimizers(net, 'adamw', (rate, 0.0), 0.1, (0.9, flags['beta2']))
    schedule = Schedule(flags['max_iters'], 0, True, flags['warmup_iters'], None, 0.0, 0.0)
    B = flags['batch_size']
    windows = TrainingWindows(data, 'train', flags['block_size'], seed)
    measured = []
    norms = []   # this step's norms, one a block

    def note(part):
        """Note the norms when the backward pass has ended, before they are clipped."""
        if part == 'backward':
            norms[:] = [gradient_norm(block) for block in net.transformer.h]

    scaler = torch.amp.GradScaler('cpu', enabled=False)
    train = TrainingStep(net, TrainingLoss(net), optimizers, scaler, 1.0, 'cpu', 'float32', note)
    for step in range(min(GRADIENT_STEPS[-1], flags['max_iters']) + 1):
        optimizers.set_rates(schedule.share(step))
        loss, _ = train([windows.batch(step * B, B)])
        if step in GRADIENT_STEPS:
            measured.append(dict(variant=variant, seed=seed, step=step, loss=loss.item(),
                                 norms=list(norms)))
    return measured


def as_value(text):
    """Return a flag's text as the value that it stands for; other words stay text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def gradient_norm(module):
    """Return the norm of the gradient of all parameters of a module."""
    return math.sqrt(sum(p.grad.square().sum().item() for p in module.parameters()))


# ---- tabulate: means and intervals ---------------------------------------------------------------

@dataclass
class Estimate:
    """A mean over seeds, and how far it can be off."""
    mean: float
    variance: float   # squared standard error of the mean; 0 where it is exact, None for one run
    freedom: int      # degrees of freedom of the variance


def mean_over_seeds(values, exact):
    """Return the mean of the seeds' values as an Estimate. exact: whether they were counted."""
    mean = statistics.mean(values)
    if exact:
        return Estimate(mean, 0.0, 1)
    if len(values) == 1:
        return Estimate(mean, None, 0)
    return Estimate(mean, statistics.variance(values) / len(values), len(values) - 1)


def half_interval(*estimates):
    """Return half of the 95 % interval of a sum or difference of means; None with a single run.

    Student's t with Welch's degrees of freedom (Biometrika 34, 1947)."""
    if any(one.variance is None for one in estimates):
        return None
    uncertain = [one for one in estimates if one.variance]
    if not uncertain:
        return 0.0
    total = sum(one.variance for one in uncertain)
    freedom = total**2 / sum(one.variance**2 / one.freedom for one in uncertain)
    return stats.t.ppf(0.975, freedom) * math.sqrt(total)


@dataclass
class Row:
    """A variant in the table and in the picture."""
    name: str
    changes: dict        # flags and NOT_FLAGS
    runs: list           # all runs of the variant
    done: list           # runs that came to their end
    values: list         # last losses of these runs
    estimate: Estimate   # mean of these losses; None where no run is done


def make_rows(measure):
    """Return the rows of all variants that have runs, by name. measure: choose_measure's key."""
    rows = {}
    for name, changes in found['variants'].items():
        runs = [run for run in found['runs'] if run['variant'] == name]
        done = [run for run in runs if run['status'] == 'done']
        values = [run[measure] for run in done]
        mean = mean_over_seeds(values, 'counted' in changes) if values else None
        if runs:
            rows[name] = Row(name, changes, runs, done, values, mean)
    return rows


# ---- tabulate: the cells of a row ----------------------------------------------------------------

def table_line(row, rows):
    """Return a row of the table in Markdown. rows: all of them, by name."""
    listed = ', '.join(f'{key}={value}' for key, value in flags_among(row.changes).items())
    cells = [marked(row.name, found['baseline']), listed, parameters_cell(row), loss_cell(row),
             runs_cell(row), difference_cell(row, rows), speed_cell(row)]
    return '| ' + ' | '.join(cell.replace('|', '/') for cell in cells) + ' |'


def parameters_cell(row):
    if not row.done or 'counted' in row.changes:
        return ''
    return f'{row.done[0]["parameters"]:,}'


def loss_cell(row):
    """Return the mean loss, with the standard deviation over the seeds."""
    if not row.done:
        return ''
    mean = f'{row.estimate.mean:.4f}'
    if 'counted' in row.changes:
        return mean
    if len(row.values) == 1:
        return f'{mean} (one run)'
    return f'{mean} ({statistics.stdev(row.values):.4f})'


def runs_cell(row):
    """Return how many runs are done, and what became of the others."""
    parts = [f'{len(row.done)}']
    for run in row.runs:
        if run['status'] != 'done':
            parts.append(f'seed {run["seed"]} {outcome(run)}')
    return '; '.join(parts)


def difference_cell(row, rows):
    """Return the difference to the baseline, or to the variant of `against`, with its interval."""
    other = row.changes.get('against', found['baseline'])
    if not row.done or row.name == other or other not in rows or not rows[other].done:
        return ''
    difference = row.estimate.mean - rows[other].estimate.mean
    half = half_interval(row.estimate, rows[other].estimate)
    cell = f'{difference:+.4f}'
    if half is not None:
        cell += f' ({difference - half:+.4f} to {difference + half:+.4f})'
    if other != found['baseline']:
        cell += f' to {other}'
    if half is not None and abs(difference) <= half:
        cell += ': none seen'
    return cell


def speed_cell(row):
    """Return the median over the runs of tokens per second."""
    if not row.done or 'counted' in row.changes:
        return ''
    speeds = [run['tokens'] / max(run['seconds'], 1e-9) for run in row.done]
    return f'{statistics.median(speeds):,.0f}'


# ---- tabulate: the page and the picture ----------------------------------------------------------

def choose_measure():
    """Return the key in a run of the loss that the study compares, and its unit."""
    if len({run['flags']['dataset'] for run in found['runs']}) > 1:
        return 'bits_per_byte', 'bits per byte'
    return 'val_loss', 'nats per token'


def command_of_results():
    """Return the command that the results are of."""
    command = f'python ablate.py {found["study"]}'
    if found['full']:
        command += ' --full'
    changed = [f'--{key}={value}' for key, value in found['setting'].items()
               if str(SETTING.get(key)) != value]
    if changed:
        command += f' --flags="{" ".join(changed)}"'
    return command


def machines():
    """Return the device, the precision and torch's version of the runs that were trained."""
    kinds = {f'{run["device"]} in {run["dtype"]}, torch {run["torch"]}'
             for run in found['runs'] if run.get('dtype')}
    return '; '.join(sorted(kinds)) or 'nothing yet'


def page(rows, unit):
    """Return the study's page in Markdown."""
    lines = '\n'.join(table_line(row, rows) for row in rows.values())
    shared = ' '.join(f'--{key}={value}' for key, value in found['setting'].items())
    return f'''# {found['study']}

`{command_of_results()}`: each run is train.py with the flags of its row, and otherwise with these:

```
{shared}
```

The seeds 1, 2, ... of weights, windows and dropout are the same for every row. The loss is in
{unit} on the whole validation split: mean (standard deviation). The difference is to the baseline,
with its 95 % interval (Welch's t); "none seen" means that the interval contains 0. Run on
{machines()}.

| variant | flags | parameters | loss | runs | difference | tokens/s |
|---|---|---|---|---|---|---|
{lines}

![loss curves and last losses]({os.path.basename(stem)}.png)
{gradients_section()}'''


def gradients_section():
    """Return the page's section on gradients through depth; nothing where none were measured."""
    if not found.get('gradients'):
        return ''
    lines = ''
    for entry in found['gradients']:
        norms = ', '.join(f'{norm:.2g}' for norm in entry['norms'])
        lines += f'| {entry["variant"]} | {entry["step"]} | {entry["loss"]:.3f} | {norms} |\n'
    return f'''
## Gradients through depth

The norm of the gradient of each block's weights, before clipping, after some steps of training in
fp32. Seed 1, the flags as above.

| variant | step | training loss | blocks, from the first to the last |
|---|---|---|---|
{lines}
![gradient norms by block]({os.path.basename(stem)}-gradients.png)
'''


def draw(rows, unit):
    """Write the study's picture; say so where matplotlib is missing."""
    drawn = []
    for row in rows.values():
        if row.done:
            logs = [run['log'] for run in row.done if run['log']]
            drawn.append(dict(name=row.name, mean=row.estimate.mean,
                              half=half_interval(row.estimate), logs=logs))
    try:
        plots.study(drawn, f'{stem}.png', found['study'], unit)
        if found.get('gradients'):
            plots.gradients_by_depth(found['gradients'], f'{stem}-gradients.png')
    except ImportError:
        say(f'no {stem}.png: matplotlib is missing; type pip install -r requirements.txt, '
            f'and then the same with --report')
    except OSError as error:
        fail(f'{stem}.png cannot be written ({error.strerror}); make room, '
             f'or type --results=FOLDER for another place')


# ---- the story -----------------------------------------------------------------------------------

if study == 'list':
    print_studies()
    sys.exit()
plan = make_plan()
stem = os.path.join(results, f'{study}-full' if full else study)   # path without .json or .md
file = f'{stem}.json'
datasets = open_datasets()
if report:
    found = results_to_report()
else:
    found = results_to_continue()
    elsewhere = trained_elsewhere()
    held = take_folders()   # a lock, as long as this process lives
    stop_on_signals()
    run_all()
    if study == 'residual':
        measure_gradients()
measure, unit = choose_measure()
rows = make_rows(measure)
text = page(rows, unit)
write_file(f'{stem}.md', text)
draw(rows, unit)
write(text)
