"""
Studies: what one choice is worth, all else equal, over several seeds. train.py is started once a run.

    python ablate.py list                     # the studies and their variants
    python ablate.py heads                    # three seeds each, two to three minutes a run on two cores
    python ablate.py heads --seeds=5          # goes on with those that are there
    python ablate.py heads --full             # the setting of published studies, for a GPU; all there are work at once
    python ablate.py heads --report           # table and picture once more, from heads.json alone

Reads data/<dataset>/; writes NAME.json (every run), NAME.md and NAME.png into results. Interrupted, it goes on where it was.
"""
import concurrent.futures
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

import numpy as np
import torch
from scipy import stats

from lib import plots, runtime
from lib.checkpoint import read_log
from lib.configurator import check, configure, ending_signals
from lib.console import fail, say, write
from lib.data import how_to_make, open_dataset
from lib.tokenizers import token_sizes

study = ''            # which one; may be typed first, without --study=
variants = ''         # some of its variants, with commas between; '': all
seeds = 3             # runs of each variant, with the seeds 1, 2, 3, ...
full = False          # the published setting, else a smaller one for two CPU cores
flags = ''            # for train.py in every run, over the setting: '--n_embd=64 --max_iters=500'
report = False        # write table and picture again from the results there are, and run nothing
results = 'results/ablations'   # folder of what is found
data_dir = 'data'     # where datasets live
device = 'auto'       # 'cpu', 'cuda' (all of them), 'cuda:1', 'mps'
knobs, _ = configure(globals(), runtime.find_device, first='study')

# ---- the setting: what all runs share --------------------------------------------------------------------------------
SETTING = dict(
    dataset='shakespeare_char', n_layer=4, n_head=4, n_embd=128, block_size=64, dropout=0.0, gradient_accumulation_steps=1,
    batch_size=32, max_iters=1500, warmup_iters=50, learning_rate=8e-3, min_lr=0.0, beta2=0.99, eval_interval=250,
    eval_iters=20, log_interval=50, always_save_checkpoint=False)
if full:   # of the studies these answer: 4 layers, 4 heads, 256 wide, context 128, dropout 0.2
    SETTING |= dict(n_embd=256, block_size=128, dropout=0.2, batch_size=64, max_iters=5000, warmup_iters=100,
                    learning_rate=1e-3, eval_interval=500)
WIDTH, RATE = SETTING['n_embd'], SETTING['learning_rate']

# ---- the studies: name, baseline, and what each variant has other than the setting -------------------------------------
# against: the variant it is compared with, if not with the baseline; counted: not trained, but counted in the training text
ROPE = dict(pos='rope')
QK_NORM = ROPE | dict(qk_norm=True)
RELU2 = QK_NORM | dict(activation='relu2')
UNTIED = RELU2 | dict(tie_weights=False, zero_init=True)
STUDIES = {
    'baselines': ('GPT', {
        'uniform': dict(counted='uniform'), 'counted unigram': dict(counted='unigram'),
        'counted bigram': dict(counted='bigram'), 'trained bigram': dict(n_layer=0, pos='none', tie_weights=False),
        'tied bigram': dict(n_layer=0, pos='none'), 'GPT': {}}),
    'heads': ('4 heads', {f'{n} head{"s" * (n > 1)}': dict(n_head=n) for n in (1, 2, 4, 8)}),
    'depth': ('4 layers', {f'{n} layers': dict(n_layer=n) for n in (2, 4, 6, 8)}),
    'width': (f'4 x {WIDTH}', {   # layers x width, of nearly the same number of parameters
        f'{n} x {C}': dict(n_layer=n, n_embd=C)
        for n, C in ((1, 2 * WIDTH), (2, 180 * WIDTH // 128), (4, WIDTH), (8, 92 * WIDTH // 128))}),
    'norm': ('pre', {'pre': {}, 'post': dict(norm='post'), 'none': dict(norm='none')}),
    'residual': ('4 layers', {
        '2 layers': dict(n_layer=2), '2 layers without': dict(n_layer=2, residual=False, against='2 layers'),
        '4 layers': dict(n_layer=4), '4 layers without': dict(n_layer=4, residual=False),
        '8 layers': dict(n_layer=8), '8 layers without': dict(n_layer=8, residual=False, against='8 layers')}),
    'positions': ('learned', {'learned': {}, 'rope': dict(pos='rope'), 'none': dict(pos='none')}),
    'tokenizer': ('char', {   # of GPT-2's tokens, which are 3.3 characters, fewer at a time: all see as much text
        'char': dict(dataset='shakespeare_char'), 'byte': dict(dataset='shakespeare_byte'),
        'gpt2': dict(dataset='shakespeare', batch_size=19 if full else 10)}),
    'dropout': ('0.0', {'0.0': dict(dropout=0.0), '0.1': dict(dropout=0.1), '0.2': dict(dropout=0.2)}),
    'regularization': ('none', {
        'none': {}, 'label smoothing 0.1': dict(label_smoothing=0.1), 'layer drop 0.1': dict(layer_drop=0.1)}),
    'optimizer': (f'AdamW {RATE:g}', {
        f'AdamW {RATE / 2:g}': dict(learning_rate=RATE / 2), f'AdamW {RATE:g}': dict(learning_rate=RATE),
        f'AdamW {2 * RATE:g}': dict(learning_rate=2 * RATE),
        **{f'Muon {rate}': dict(optimizer='muon', muon_learning_rate=rate) for rate in (0.01, 0.02, 0.04)}}),
    'modern': ('GPT-2', {   # one upon the other
        'GPT-2': {}, '+ rope': ROPE, '+ QK-norm': QK_NORM | dict(against='+ rope'),
        '+ ReLU²': RELU2 | dict(against='+ QK-norm'),
        '+ untied head, zero init': UNTIED | dict(against='+ ReLU²'),
        '+ Muon': UNTIED | dict(optimizer='muon', against='+ untied head, zero init')}),
}

if study == 'list':
    for key, (baseline, its) in STUDIES.items():
        names = ', '.join(name + ' (baseline)' * (name == baseline) for name in its)
        write(f'{key:15} {names}\n')
    sys.exit()
if study not in STUDIES:
    fail(f'study={study!r}: allowed are list, {", ".join(STUDIES)}; type python ablate.py heads')
check(knobs, seeds=1)
baseline, every = STUDIES[study]
chosen = [] if report else [part.strip() for part in variants.split(',')] if variants else list(every)
for part in chosen:
    if part not in every:
        fail(f'variants={part!r}: {study} has {", ".join(every)}; type --variants="{baseline}"')
path = os.path.join(results, study + '-full' * full)   # .json, .md, .png
typed = {}
for word in shlex.split(flags):
    found = re.fullmatch(r'--(\w+)=(.*)', word)
    if not found or found[1] in ('seed', 'out_dir', 'device', 'init_from', 'data_dir'):
        fail(f'flags={word!r}: allowed are --key=value of train.py, but for seed, out_dir, device, data_dir and init_from; '
             f'type --flags="--max_iters=500"')
    if found[1] not in SETTING and any(found[1] in has for has in every.values()):   # those rows without it would be misnamed
        fail(f'flags={word!r}: {study} varies {found[1]} itself; allowed are knobs that it leaves alone; type '
             f'--flags="--max_iters=500"')
    typed[found[1]] = found[2]
setting = {key: str(value) for key, value in (SETTING | typed).items()}
changes = {name: {key: str(value) for key, value in has.items()} for name, has in every.items()}


def flags_of(name):
    """What train.py is given for a variant, seed and places apart."""
    return setting | {key: value for key, value in changes[name].items() if key not in ('against', 'counted')}


# ---- data and what is there already ------------------------------------------------------------------------------------
opened = {}   # dataset: (Dataset, a hash of its tokens, bytes a token of the validation split)
for name in chosen:
    dataset = flags_of(name)['dataset']
    if dataset not in opened:
        data = open_dataset(dataset, data_dir)
        if data.stand_in_banner():
            fail(f'{data.folder} is a stand-in, and a study of it would be taken for one of the real text; make it anew: '
                 f'{how_to_make(dataset, data_dir=data_dir)}')
        val = np.concatenate([shard[1:] for shard in data.split('val')])   # the first of each is given, not predicted
        hashed = hashlib.sha256(b''.join(shard.tobytes() for part in ('train', 'val') for shard in data.split(part)))
        opened[dataset] = data, hashed.hexdigest()[:16], token_sizes(data.tokenizer)[0][val].mean()


def read(file):
    """A study's results; fails where the file is none."""
    try:
        with open(file, encoding='utf-8') as f:
            found = json.load(f)
        found['setting'].items(), found['variants'].items(), found['baseline'].upper()
        assert all({'variant', 'seed', 'flags', 'data', 'status', 'torch', 'device'} <= run.keys() for run in found['runs'])
        return found
    except (OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        fail(f'{file} is not a study\'s results ({type(error).__name__}: {error}); type --results=FOLDER for another place')


file = path + '.json'
if report and not os.path.exists(file):
    fail(f'{file} is not there; run it first: python ablate.py {study}' + ' --full' * full)
found = read(file) if os.path.exists(file) else dict(runs=[])
if not report:
    for run in found['runs']:
        name, had = run['variant'], run['flags'] | dict(data=run['data'])
        now = flags_of(name) if name in changes else {}
        now |= dict(data=opened[now['dataset']][1] if now.get('dataset') in opened else run['data'])
        if had != now:
            key = next(key for key in {**had, **now} if had.get(key) != now.get(key))
            fail(f'{file} has runs of {name!r} with {key}={had.get(key)}, which is now {now.get(key)}, and the two are not '
                 f'mixed; type --results=FOLDER for another place')
    elsewhere = [run for other in sorted(glob.glob(os.path.join(results, '*.json'))) if other != file
                 for run in read(other)['runs'] if 'dtype' in run]   # trained to the end: equal runs need not be run again
    found = dict(study=study, baseline=baseline, full=full, setting=setting, variants=changes, runs=found['runs'])


def write_file(file, text):
    """In one piece: a study cut off while it writes keeps what it had."""
    try:
        with open(file + '.part', 'w', encoding='utf-8') as f:
            f.write(text)
        os.replace(file + '.part', file)
    except OSError as error:
        stop()
        fail(f'{file} cannot be written ({error.strerror}); make room, or type --results=FOLDER for another place')


def keep():
    runs = sorted(found['runs'], key=lambda run: (list(changes).index(run['variant']), run['seed']))
    rest = json.dumps({key: value for key, value in found.items() if key != 'runs'}, indent=1, ensure_ascii=False)
    lines = ',\n'.join('  ' + json.dumps(run, ensure_ascii=False) for run in runs)   # a run a line
    write_file(file, f'{rest[:-2]},\n "runs": [\n{lines}\n ]\n}}\n')


# ---- running -----------------------------------------------------------------------------------------------------------
processes = set()


def stop():
    for process in list(processes):
        process.kill()


def interrupted(number, frame):
    stop()
    say(f'stopped; what is done is in {file}, and the same command goes on')
    os._exit(128 + number)


def counted_loss(how):
    """Exact nats per token of the validation split under frequencies of the training text, each count and one more."""
    data, V = opened[setting['dataset']][0], opened[setting['dataset']][0].vocab_size
    if how == 'uniform':
        return math.log(V)
    splits = [[shard.astype(np.int64) for shard in data.split(part)] for part in ('train', 'val')]
    before = [np.concatenate([shard[:-1] for shard in split]) * (how == 'bigram') for split in splits]
    after = [np.concatenate([shard[1:] for shard in split]) for split in splits]
    counts = np.ones((V, V))
    np.add.at(counts, (before[0], after[0]), 1)
    chances = counts / counts.sum(axis=1, keepdims=True)
    return -np.log(chances[before[1], after[1]]).mean().item()


def one_run(name, seed, device):
    """Train one variant with one seed -> what is known of it."""
    given = flags_of(name)
    folder = os.path.join('out-ablate', study, re.sub(r'\W+', '-', f'{name}-{seed}-{os.getpid()}'))
    run = dict(variant=name, seed=seed, flags=given, data=opened[given['dataset']][1], torch=torch.__version__,
               device=device.partition(':')[0])
    bits = 1 / math.log(2) / opened[given['dataset']][2]   # of a nat per token, per byte
    if 'counted' in changes[name]:
        loss = counted_loss(changes[name]['counted'])
        return run | dict(status='done', val_loss=loss, bits_per_byte=loss * bits, parameters=0, tokens=0, seconds=0, log=[])
    for other in elsewhere:
        if all(other[key] == run[key] for key in ('seed', 'flags', 'data', 'torch', 'device')):
            return other | dict(variant=name)
    command = [sys.executable, os.path.join(os.path.dirname(os.path.abspath(__file__)), 'train.py'),
               *(f'--{key}={value}' for key, value in given.items()), f'--seed={seed}', f'--out_dir={folder}',
               f'--data_dir={data_dir}', f'--device={device}']
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors='replace')
    processes.add(process)
    said = process.communicate()[1]
    processes.discard(process)
    rows = read_log(os.path.join(folder, 'log.csv'))
    last = next(iter(said.strip().splitlines()[-1:]), '').removeprefix('error: ')
    run['log'] = [[int(row['tokens']), *(float(row[key]) if row[key] else None for key in ('train_loss', 'val_loss'))]
                  for row in rows]
    if process.returncode == 0:
        with open(os.path.join(folder, 'config.json'), encoding='utf-8') as f:
            config = json.load(f)
        loss = float(rows[-1]['val_loss'])
        run |= dict(status='done', val_loss=loss, bits_per_byte=loss * bits, parameters=config['parameters'],
                    tokens=int(rows[-1]['tokens']), seconds=float(rows[-1]['seconds']), dtype=config['dtype'])
    elif broke := re.match(r'iter (\d+): .*no longer finite', last):
        run |= dict(status='diverged', step=int(broke[1]))
    elif rows or process.returncode != 2:
        run |= dict(status='failed', error=last or f'ended with {process.returncode}')
    else:
        run |= dict(status='refused', error=last)
    shutil.rmtree(folder, ignore_errors=True)
    return run


if not report:
    try:
        for folder in (results, os.path.join('out-ablate', study)):
            os.makedirs(folder, exist_ok=True)
        lock = runtime.lock(os.path.join('out-ablate', study))   # as long as this process lives
        for left_over in glob.glob(os.path.join('out-ablate', study, '*', '')):   # a killed study's run may still write there
            shutil.rmtree(left_over, ignore_errors=True)
    except OSError as error:
        fail(f'{error.filename} cannot be made ({error.strerror}); type --results=FOLDER for another place')
    for number in ending_signals():
        signal.signal(number, interrupted)
    there = {(run['variant'], run['seed']) for run in found['runs'] if run['status'] != 'failed'}   # which is tried again
    todo = [(name, seed) for seed in range(1, seeds + 1) for name in chosen
            if (name, seed) not in there and not ('counted' in changes[name] and seed > 1)]
    devices, free = [device], queue.Queue()
    if device == 'cuda':
        devices = [f'cuda:{i}' for i in range(torch.cuda.device_count())]
    for each in devices:
        free.put(each)

    def next_run(name, seed):
        taken = free.get()
        try:
            return one_run(name, seed, taken)
        finally:
            free.put(taken)

    if found['runs']:   # so that --report finds the variants as they are named now
        keep()
    started = time.perf_counter()
    say(f'{study}: {len(todo)} run{"s" * (len(todo) != 1)} to do on {", ".join(devices)}, {len(there)} in {file}' +
        '; to run it anew type --results=FOLDER' * (not todo))
    with concurrent.futures.ThreadPoolExecutor(len(devices)) as pool:
        pending = [pool.submit(next_run, *what) for what in todo]
        for done, future in enumerate(concurrent.futures.as_completed(pending), 1):
            run = future.result()
            if run['status'] == 'refused':
                pool.shutdown(wait=False, cancel_futures=True)
                stop()
                fail(f'train.py refuses {run["variant"]!r}: {run["error"]}')
            again = (run['variant'], run['seed'])   # one that failed before
            found['runs'] = [old for old in found['runs'] if (old['variant'], old['seed']) != again] + [run]
            keep()
            left = (time.perf_counter() - started) / done * (len(todo) - done)
            say(f'{run["variant"]}, seed {run["seed"]}: ' + (f'{run["val_loss"]:.4f} nats per token' if 'val_loss' in run else
                f'{run["status"]} {run.get("error", "")}') + f'; {done} of {len(todo)}, {runtime.clock(left)} left')

# ---- table and picture, of what the file holds alone --------------------------------------------------------------------
def spread(values):
    """Mean, and the squared standard error with its degrees of freedom; None for a single run, which says nothing of it."""
    return statistics.mean(values), (statistics.variance(values) / len(values), len(values) - 1) if len(values) > 1 else None


def interval(*errors):
    """Half of the 95 % interval of a sum of means: Student's t with Welch's degrees of freedom (Biometrika 34, 1947)."""
    if None in errors:
        return None
    errors = [(error, freedom) for error, freedom in errors if error]
    if not errors:
        return 0.0
    total = sum(error for error, _ in errors)
    return stats.t.ppf(0.975, total**2 / sum(error**2 / freedom for error, freedom in errors)) * math.sqrt(total)


changes = found['variants']
runs_of = {name: [run for run in found['runs'] if run['variant'] == name] for name in changes}
several = len({run['flags']['dataset'] for run in found['runs']}) > 1
key, unit = ('bits_per_byte', 'bits per byte') if several else ('val_loss', 'nats per token')
values = {name: [run[key] for run in runs if run['status'] == 'done'] for name, runs in runs_of.items()}
lines, drawn = [], []
for name, runs in runs_of.items():
    if not runs:
        continue
    has = ', '.join(f'{knob}={value}' for knob, value in changes[name].items() if knob not in ('against', 'counted'))
    other = changes[name].get('against', found['baseline'])
    cells = [name + ' (baseline)' * (name == found['baseline']), has, '', '', '', '', '']
    done = [run for run in runs if run['status'] == 'done']
    if done:
        mean, error = spread(values[name])
        exact = 'counted' in changes[name]
        sd = statistics.stdev(values[name]) if error else None
        cells[2] = f'{done[0]["parameters"]:,}' * (not exact)
        cells[3] = f'{mean:.4f}' + (f' ({sd:.4f})' if error else '' if exact else ' (one run)')
        drawn.append(dict(name=name, mean=mean, half=0.0 if exact else interval(error),
                          logs=[run['log'] for run in done if run['log']]))
        if name != other and values.get(other):
            base, its_error = spread(values[other])
            half = interval((0.0, 1) if exact else error, its_error)
            cells[5] = f'{mean - base:+.4f}' + (
                '' if half is None else f' ({mean - base - half:+.4f} to {mean - base + half:+.4f})') + (
                f' to {other}' if other != found['baseline'] else '') + (
                ': none seen' if half is not None and abs(mean - base) <= half else '')
        if not exact:
            cells[6] = f'{statistics.median(run["tokens"] / max(run["seconds"], 1e-9) for run in done):,.0f}'
    failed = [f'seed {run["seed"]} ' + (f'diverged at step {run["step"]:,}' if run['status'] == 'diverged' else
                                        f'failed: {run["error"]}') for run in runs if run['status'] != 'done']
    cells[4] = '; '.join([f'{len(done)}', *failed])
    lines.append('| ' + ' | '.join(cell.replace('|', '/') for cell in cells) + ' |')
trained = [run for run in found['runs'] if run.get('dtype')]
where = sorted({f'{run["device"]} in {run["dtype"]}, torch {run["torch"]}' for run in trained})
changed = ' '.join(f'--{knob}={value}' for knob, value in found['setting'].items() if str(SETTING.get(knob)) != value)
command = f'python ablate.py {found["study"]}' + ' --full' * found['full'] + (changed and f' --flags="{changed}"')
text = f'''# {found['study']}

`{command}`: each run is train.py with what its row names and otherwise

```
{' '.join(f'--{knob}={value}' for knob, value in found['setting'].items())}
```

Seeds 1, 2, ... of weights, windows and dropout, the same for every row; loss in {unit} on the whole validation split, mean
(standard deviation); difference to the baseline with its 95 % interval (Welch's t), "none seen" where that holds 0. Run on
{'; '.join(where) or 'nothing yet'}.

| variant | has | parameters | loss | runs | difference | tokens/s |
|---|---|---|---|---|---|---|
{chr(10).join(lines)}

![loss curves and last losses]({os.path.basename(path)}.png)
'''
write_file(path + '.md', text)
try:
    plots.study(drawn, path + '.png', found['study'], unit)
except ImportError:
    say(f'no {path}.png: matplotlib is missing; type pip install -r requirements.txt, and then the same with --report')
except OSError as error:
    fail(f'{path}.png cannot be written ({error.strerror}); make room, or type --results=FOLDER for another place')
write(text)
