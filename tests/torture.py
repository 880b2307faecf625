"""
Kill it, damage it, feed it garbage, and count.

    python tests/torture.py --minutes=5      # as much of everything as fits
    python tests/torture.py --minutes=60     # all of it: the figures in results/reliability.md

Each line printed: what, how often, how often it held. Exit 1 if anything ever did not. Reads nothing outside a temporary
folder, needs no network; a full disk is made real with a tmpfs where mounting is allowed.
"""
import contextlib
import functools
import gzip
import io
import json
import os

os.environ['OMP_NUM_THREADS'] = '1'   # before torch: children are forked, which threads would not survive

import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from conftest import TEXT, TINY
from forked import ROOT, fork_ranks, fork_script, wait
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from lib import checkpoint, configurator, data, prepare, tokenizers

minutes = 5.0   # time for all of it; 60 are enough for the full counts
seed = 0        # of the instants and the places
only = ''       # one part alone: kills, rank_kills, damage, garbage, consoles or folders
TARGETS = dict(kills=200, rank_kills=20, damage=600, garbage=10_000, folders=1000, consoles=200)   # the full counts
SHARES = dict(kills=0.35, rank_kills=0.2, damage=0.05, garbage=0.3, folders=0.05, consoles=0.05)   # of the time
STEPS = 30


def start(ranks, out, resume=False):
    """One run of STEPS steps that saves at each, in `ranks` processes; returns their ids."""
    return fork_ranks(ranks, 'train.py', [*TINY, f'--max_iters={STEPS}', f'--lr_decay_iters={STEPS}', '--checkpoint_interval=1',
                                          f'--out_dir={out}', '--dropout=0.1', f'--gradient_accumulation_steps={ranks}',
                                          '--eval_interval=10'] + ['--init_from=resume'] * resume, log=f'{out}.log')


def state(out):
    """What must be equal: the weights, the optimizer's state and the log but for its times."""
    last = checkpoint.read(f'{out}/last.pt')
    with open(f'{out}/log.csv') as f:
        rows = [line.rsplit(',', 2)[0] for line in f]
    return {name: p.numpy().tobytes() for name, p in last['model'].items()}, str(last['optimizer']), last['iter_num'], rows


def kills(ranks, target, deadline, chance):
    """Kill runs at random instants; count those with a readable checkpoint, and those that end as the uninterrupted one."""
    began = time.monotonic()
    assert [wait(pid) for pid in start(ranks, 'whole')] == [0] * ranks, open('whole.log').read()
    whole, length = state('whole'), time.monotonic() - began
    done = readable = equal = saving = 0
    while done < target and (done == 0 or time.monotonic() < deadline):
        shutil.rmtree('run', ignore_errors=True)
        pids = start(ranks, 'run')
        time.sleep(chance.random() * length)
        os.kill(chance.choice(pids), signal.SIGKILL)
        for pid in pids:
            wait(pid, 20)
        done += 1
        saving += os.path.exists('run/last.pt.part') or os.path.exists('run/best.pt.part')
        have = os.path.exists('run/last.pt')
        try:
            readable += not have or checkpoint.read('run/last.pt')['iter_num'] >= 0   # killed before the first save: none
            if not any(wait(pid) for pid in start(ranks, 'run', resume=have)):
                equal += state('run') == whole
        except checkpoint.Damaged as error:
            print('   ', error)
    return done, readable, equal, saving


def consoles(target, deadline, chance):
    """Let the console of runs fail, and interrupt some of them; return (runs, those that held).

    A run holds when its exit code is its own, all steps that it logged are in its checkpoint, and
    nothing is left behind."""
    done = held = 0
    while done < target and (done < 4 or time.monotonic() < deadline):
        shutil.rmtree('run', ignore_errors=True)
        number = chance.choice((None, signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        reader = None
        console = '/dev/full'
        if chance.random() < 0.7:
            console = 'console'
            reader = threading.Thread(target=read_some, args=(console, chance.randrange(5000)))
            os.mkfifo(console)
            reader.start()
        pid = fork_script('train.py', [
            *TINY, f'--max_iters={STEPS}', f'--lr_decay_iters={STEPS}', '--log_interval=1',
            '--eval_interval=10', '--out_dir=run'], log=console)
        if number:
            stop_after_some_steps(pid, number, chance)
        code = wait(pid)
        if reader:
            reader.join()
            os.remove(console)
        done += 1
        problem = unsaved(code, number)
        held += not problem
        if problem:
            print('   ', console, number, problem)
    return done, held


def read_some(path, size):
    """Read some bytes of a pipe, as a reader does that has seen enough."""
    with open(path, 'rb', buffering=0) as f:
        while size > 0 and (block := f.read(size)):
            size -= len(block)


def stop_after_some_steps(pid, number, chance):
    """Send a signal at a random instant after the run has logged a few steps."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not logged_steps():
        time.sleep(0.002)
    time.sleep(0.1 * chance.random())
    os.kill(pid, number)   # it has not been waited for, so its number is still its own


def logged_steps():
    """Return how many steps the run has logged."""
    try:
        with open('run/log.csv') as f:
            return len(f.readlines()) - 1
    except FileNotFoundError:
        return 0


def unsaved(code, number):
    """Return what a run with a broken console has lost, '' for nothing."""
    left = [name for name in os.listdir('run') if name == '.lock' or name.endswith('.part')]
    step = checkpoint.read('run/last.pt')['iter_num']
    rows = logged_steps()
    if code == 0:
        rows -= 1   # the last row is an evaluation
        if step != STEPS:
            return f'it ended with step {step}'
    elif not number or code != 128 + number:
        return f'its exit code is {code}'
    if rows != step:
        return f'{rows} steps are logged and {step} are saved'
    return f'it left {left}' if left else ''


def damaged_copies(whole, chance):
    """Endless (place, bytes): every class of position of a zip flipped, cut, zeroed, doubled or dropped."""
    with zipfile.ZipFile(io.BytesIO(whole)) as z:
        headers = [info.header_offset + i for info in z.infolist() for i in (0, 4, 8, 14, 18, 26, 28, 30)]
        first_data = [info.header_offset + 30 + len(info.filename) for info in z.infolist()]
        directory = z.start_dir
    classes = dict(headers=headers, names_and_padding=first_data, data=range(len(whole)), directory=range(directory, len(whole) - 93),
                   end_record=range(len(whole) - 93, len(whole) - 71), seal=range(len(whole) - 71, len(whole)))
    while True:
        for name, places in classes.items():
            at = chance.choice(places)
            kind = chance.choice(('flip', 'flip', 'flip', 'cut', 'zero', 'double', 'drop'))
            n = chance.choice((1, 1, 4, 100))
            middle = dict(flip=bytes([whole[at] ^ 1 << chance.randrange(8)]) + whole[at + 1:], cut=b'', drop=whole[at + n:],
                          zero=bytes(n) + whole[at + n:], double=whole[at:at + n] + whole[at:])[kind]
            if whole[:at] + middle != whole:
                yield f'{kind} in {name}', whole[:at] + middle


def damage(target, deadline, chance):
    """Count damaged checkpoints that were noticed: exit 2, one line that names the file."""
    with open('whole/last.pt', 'rb') as f:
        copies = damaged_copies(f.read(), chance)
    done = noticed = 0
    while done < target and (done < 20 or time.monotonic() < deadline):
        what, content = next(copies)
        with open('hurt.pt', 'wb') as f:
            f.write(content)
        done += 1
        held = ends_well(lambda: checkpoint.load('hurt.pt'), must_fail=True, word='hurt.pt')
        noticed += held is None
        if held:
            print('   ', what, held)
    return done, noticed


def ends_well(act, must_fail=False, word=''):
    """None if act() worked, or ended as a user's mistake does; else what it did instead."""
    out, err = io.TextIOWrapper(io.BytesIO(), encoding='utf-8'), io.StringIO()
    started = time.monotonic()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            act()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException as error:
        return ' < '.join([f'{type(error).__name__}: {error}'[:200]] + [f'{Path(frame.filename).name}:{frame.lineno}' for frame in
                                                                        traceback.extract_tb(error.__traceback__)[::-1][:4]])
    errors = [line for line in err.getvalue().splitlines() if line.startswith('error: ')]
    if code not in ((2,) if must_fail else (0, 2)) or code == 2 and (len(errors) != 1 or word not in errors[0]):
        return f'exit {code}: {err.getvalue()[-500:]}'
    if time.monotonic() - started > 20:
        return f'took {time.monotonic() - started:.0f} s'
    return None


def script(name, *flags, stdin=''):
    """Run a script in this process."""
    argv, sys.argv, sys.stdin = sys.argv, [str(ROOT / name), *flags], io.StringIO(stdin)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)}
    try:
        runpy.run_path(str(ROOT / name), run_name='__main__')
    finally:
        sys.argv = argv
        torch.set_flush_denormal(False)   # hypothesis draws the smallest numbers too
        for number, handler in handlers.items():
            signal.signal(number, handler)


with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding='utf-8')) as shown, contextlib.suppress(SystemExit):
    script('train.py', '--help')
KNOBS = [line.split()[0] for line in shown.buffer.getvalue().decode().partition('knobs, as')[2].splitlines()[1:]]
assert 'learning_rate' in KNOBS
words = st.text(st.characters(exclude_categories=['Cs'], exclude_characters='\0'), max_size=20)
numbers = st.one_of(st.integers(-3, 40), st.integers(), st.floats(), st.sampled_from([2**31, 2**63, 10**30, 1e308, -0.0, '1e999', '0x10']))
plain = st.one_of(st.none(), st.booleans(), numbers, words, st.sampled_from(['auto', 'True', '', '[1]', '{}', '__import__("os")', '(' * 99]))
nested = st.recursive(plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3), max_leaves=6)
keys = st.one_of(st.sampled_from(KNOBS), words)
flags = st.lists(st.one_of(st.tuples(keys, plain).map(lambda kv: f'--{kv[0]}={kv[1]}'), words, keys.map('--{}'.format)), max_size=5)
config_lines = st.lists(st.one_of(st.tuples(keys, nested).map(lambda kv: f'{kv[0]} = {kv[1]!r}'), words,
                                  st.sampled_from(['import os', 'if device == "cpu":', '    n_layer = 2', 'raise ValueError', 'def f():',
                                                   'n_layer += 1', 'max_iters = 1/0', 'exit()', 'batch_size = "a" * 10**6'])), max_size=6)


def fuzz_flags(argv):
    """Any command line at all, up to the point where train.py looks for its data."""
    return lambda: script('train.py', *argv, '--dataset=absent', '--device=cpu', '--init_from=scratch', '--prepare=')


def fuzz_config(lines):
    with open('fuzz.py', 'w', encoding='utf-8', errors='replace') as f:
        f.write('\n'.join(lines))
    return lambda: script('train.py', 'fuzz.py', '--dataset=absent', '--device=cpu', '--init_from=scratch', '--prepare=')


def fuzz_meta(change):
    place, value = change
    meta = json.loads(Path('data/mini/meta.json').read_text())
    spot = meta
    for key in place[:-1]:
        spot = spot[key]
    spot[place[-1]] = value
    shutil.copytree('data/mini', 'data/fuzzed', dirs_exist_ok=True)
    Path('data/fuzzed/meta.json').write_text(json.dumps(meta), encoding='utf-8')
    return read_fuzzed


def read_fuzzed():
    opened = data.Dataset('fuzzed')
    data.TrainingWindows(opened, 'train', 8, 0).batch(0, 4)
    next(iter(data.evaluation_batches(opened, 'val', 8, 4)))
    opened.stand_in_banner()


def fuzz_meta_text(text):
    shutil.copytree('data/mini', 'data/fuzzed', dirs_exist_ok=True)
    Path('data/fuzzed/meta.json').write_text(text, encoding='utf-8', errors='replace')
    return read_fuzzed


def fuzz_bin(content):
    shutil.copytree('data/mini', 'data/fuzzed', dirs_exist_ok=True)
    with_meta, raw = content
    Path('data/fuzzed/train.bin').write_bytes(raw)
    if not with_meta:   # nanoGPT's layout, with nothing to check against
        os.remove('data/fuzzed/meta.json')
        Path('data/fuzzed/meta.pkl').write_bytes(b'\x80\x02}q\x00X\x04\x00\x00\x00itosq\x01}q\x02(K\x00X\x01\x00\x00\x00aK\x01X\x01\x00\x00\x00bus.')
    return read_fuzzed


def fuzz_checkpoint(change):
    place, value = change
    loaded = checkpoint.read('whole/last.pt')
    spot = loaded
    for key in place[:-1]:
        spot = spot[key]
    spot[place[-1]] = value
    os.makedirs('fuzzed', exist_ok=True)
    for name in os.listdir('fuzzed'):
        os.remove(f'fuzzed/{name}') if os.path.isfile(f'fuzzed/{name}') else shutil.rmtree(f'fuzzed/{name}')
    try:
        checkpoint.save('fuzzed/last.pt', loaded)
    except Exception:
        return lambda: None   # torch cannot write it, so nobody will read it
    if place[0] in ('model', 'model_args', 'tokenizer'):
        return lambda: script('sample.py', '--checkpoint=fuzzed/last.pt', '--device=cpu', '--max_new_tokens=2', '--start=1')
    return lambda: script('train.py', '--init_from=resume', '--out_dir=fuzzed', '--device=cpu', '--dtype=float32', '--max_iters=31',
                          '--dataset=mini', '--prepare=', '--sample_interval=0', '--eval_iters=1', '--wandb_log=False',
                          '--tensorboard_log=False', '--batch_size=2', '--gradient_accumulation_steps=1', '--compile=False')


def fuzz_prompt(asked):
    prompt, argv = asked
    kept = [flag for flag in argv if not flag.startswith(('--max_new', '--num', '--out_dir', '--device', '--dtype', '--compile'))]
    return lambda: script('sample.py', '--out_dir=whole', '--device=cpu', f'--start={prompt}', *kept, '--max_new_tokens=3',
                          '--dtype=float32', stdin=prompt)


meta_places = st.sampled_from([('tokenizer',), ('tokenizer', 'kind'), ('tokenizer', 'chars'), ('dtype',), ('splits',), ('splits', 'train'),
                               ('splits', 'train', 'tokens'), ('splits', 'train', 'sha256'), ('splits', 'val'), ('source',),
                               ('source', 'stand_in'), ('source', 'reason'), ('vocab_size',), ('format',)])
saved_places = st.sampled_from([('model_args',), ('model_args', 'n_layer'), ('model_args', 'n_embd'), ('model_args', 'vocab_size'),
                                ('model_args', 'block_size'), ('model_args', 'pos'), ('model_args', 'extra'), ('model',),
                                ('model', 'transformer.wte.weight'), ('model', 'extra'), ('tokenizer',), ('tokenizer', 'chars'),
                                ('tokenizer', 'kind'), ('config',), ('config', 'n_layer'), ('config', 'learning_rate'), ('config', 'seed'),
                                ('config', 'optimizer'), ('config', 'warmup_iters'), ('config', 'lr_decay_iters'), ('optimizer',),
                                ('optimizer', 0), ('optimizer', 0, 'state'), ('optimizer', 0, 'state', 1), ('optimizer', 0, 'state', 2, 'exp_avg'),
                                ('optimizer', 0, 'param_groups'), ('config', 'prepare'), ('iter_num',), ('best_val_loss',), ('scaler',), ('seconds',), ('skipped',)])
sample_flags = st.lists(st.tuples(st.sampled_from(['temperature', 'top_k', 'top_p', 'repetition_penalty', 'stop', 'seed', 'kv_cache']), plain)
                        .map(lambda kv: f'--{kv[0]}={kv[1]}'), max_size=3)
GARBAGE = [('command lines', 3000, flags, fuzz_flags), ('config files', 2500, config_lines, fuzz_config),
           ('meta.json, a value', 1500, st.tuples(meta_places, nested), fuzz_meta), ('meta.json, any text', 500, words, fuzz_meta_text),
           ('.bin files', 1000, st.tuples(st.booleans(), st.binary(max_size=200)), fuzz_bin),
           ('checkpoints', 800, st.tuples(saved_places, nested), fuzz_checkpoint),
           ('prompts and sampling flags', 700, st.tuples(words, sample_flags), fuzz_prompt)]


def garbage(target, deadline):
    """Generated bad inputs: each works, or ends with exit 2 and one line. Returns (inputs, held)."""
    total, held, all_of_it = 0, 0, sum(count for _, count, _, _ in GARBAGE)
    for i, (what, count, inputs, act) in enumerate(GARBAGE):
        until = time.monotonic() + max(0.5, (deadline - time.monotonic()) * count / sum(c for _, c, _, _ in GARBAGE[i:]))
        tried, wrong = try_all(inputs, act, max(1, target * count // all_of_it), until)
        print(f'  {what}: {tried:,} inputs, {tried - len(wrong):,} worked or were refused in one line', flush=True)
        for problem in {problem.rpartition(' => ')[2]: problem for problem in wrong}.values():   # one of each kind
            print('   ', problem[:600])
        total, held = total + tried, held + tried - len(wrong)
    return total, held


def try_all(inputs, act, count, until):
    """Up to count generated inputs, up to a time: (how many, [what went wrong])."""
    tried, wrong = [], []

    @settings(max_examples=count, deadline=None, database=None, phases=[Phase.generate], derandomize=True,
              suppress_health_check=list(HealthCheck))
    @given(inputs)
    def one(value):
        if time.monotonic() > until:
            raise KeyboardInterrupt   # the one thing that hypothesis stops at
        tried.append(None)
        problem = ends_well(act(value))
        if problem:
            wrong.append(f'{value!r} => {problem}')
    try:
        one()
    except KeyboardInterrupt:
        if time.monotonic() < until:
            raise
    return len(tried), wrong


def full_disk():
    """A run whose disk fills up: on a tmpfs, or under a limit on the size of files. Returns how it was made, and whether it held."""
    os.makedirs('small', exist_ok=True)
    mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=300k', 'tmpfs', 'small'], capture_output=True).returncode == 0
    try:
        if not mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
        pid = fork_script('train.py', [*TINY, '--n_embd=32', '--out_dir=small/out', '--eval_interval=2'], 'full.log')
        code, said = wait(pid), Path('full.log').read_text()
        whole = all(checkpoint.read(f'small/out/{name}') for name in os.listdir('small/out') if name.endswith('.pt'))
        return 'tmpfs' if mounted else 'RLIMIT_FSIZE', code == 2 and 'could not be written' in said and 'Traceback' not in said and whole
    finally:
        if mounted:
            subprocess.run(['umount', 'small'], check=True)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def text_folders(target, deadline, chance):
    """Prepare random folders of text, and count those whose splits are what prepare_text.py promises."""
    done = held = 0
    while done < target and (done < 5 or time.monotonic() < deadline):
        for name in ('texts', 'elsewhere', 'data/texts'):
            shutil.rmtree(name, ignore_errors=True)
        documents = make_text_folder(chance)
        share = chance.choice([0.1, 0.1, 0.01, 0.5, 0.9, 0.001 + 0.998 * chance.random()])
        tokenizer = chance.choice(['char', 'byte'])
        given = chance.choice(['texts', 'texts/**/*'])
        done += 1
        problem = ends_well(functools.partial(script, 'prepare_text.py', f'--input={given}', '--name=texts',
                                              f'--tokenizer={tokenizer}', f'--val_fraction={share}'))
        problem = problem or wrong_splits(documents, share)
        held += problem is None
        if problem:
            print(f'    folder {done}: {problem[:600]}')
    return done, held


def make_text_folder(chance):
    """Write texts/ with files, links and loops; return the documents that are in it."""
    documents = []
    for i in range(chance.choice([1, 1, 2, 3, 5, 12, 40])):
        size = chance.choice([chance.randint(1, 50), chance.randint(1, 2000), chance.randint(1, 40_000)])
        documents.append(f'{i:03d}:' + ('to be or né 二 that is ' * (size // 20 + 1))[:size])
    folders = ['texts']
    for i in range(chance.randint(0, 5)):
        folders.append(f'{chance.choice(folders)}/folder {i}')
    folders.append('elsewhere')
    for folder in folders:
        os.makedirs(folder)
    left = list(documents)
    files = []
    while left:
        n = min(len(left), chance.choice([1, 1, 2, 5]))
        files.append(write_documents(f'{chance.choice(folders)}/{chance.choice("abc")}{len(files)}', left[:n], chance))
        del left[:n]
    os.symlink('../elsewhere', 'texts/link')
    for i in range(chance.randint(0, 4)):
        folder, target = chance.choice(folders), chance.choice(files)
        ending = target.partition('.')[2]
        os.symlink(os.path.relpath(target, folder), f'{folder}/{chance.choice("az")}-link-{i}.{ending}')
    for i in range(chance.randint(0, 3)):
        folder = chance.choice(folders)
        os.symlink(os.path.relpath(chance.choice(folders), folder), f'{folder}/{chance.choice("az")}-loop-{i}')
    if chance.random() < 0.3:
        os.symlink('nowhere', f'{chance.choice(folders)}/gone.txt')
    if chance.random() < 0.3:
        os.makedirs('texts/.hidden')
        Path('texts/.hidden/no.txt').write_text('not a document')
    return documents


def write_documents(stem, documents, chance):
    """Write some documents into one file of a random kind; return its path."""
    kind = chance.choice(['jsonl', 'jsonl.gz', 'txt', 'txt.gz', 'md'])
    if kind.startswith('jsonl'):
        content = '\n'.join(json.dumps(dict(n=1, text=text)) for text in documents)
    else:
        content = tokenizers.END_OF_TEXT.join(['', *documents] if chance.random() < 0.3 else documents)
    raw = content.encode(chance.choice(['utf-8', 'utf-8', 'utf-8-sig', 'utf-16']))
    if kind.endswith('gz'):
        raw = gzip.compress(raw)
    Path(f'{stem}.{kind}').write_bytes(raw)
    return f'{stem}.{kind}'


def wrong_splits(documents, share):
    """None if data/texts holds each document once and the share that was asked for; else what is wrong."""
    if not os.path.exists('data/texts/meta.json'):
        return 'it was refused'
    opened = data.Dataset('texts')
    text = {split: opened.tokenizer.decode(np.concatenate(opened.split(split)).tolist()).decode() for split in ('train', 'val')}
    train, val = (text[split].split('\n') for split in ('train', 'val'))
    counts = Counter(train + val)
    missing = [document for document in documents if not counts[document]]
    if any(counts[document] > 1 for document in documents) or len(train) + len(val) != len(documents) + len(missing):
        return f'a document is in it twice, or something else is: {[part[:20] for part in counts]}'
    head, tail = ([part for part in parts if part not in documents] for parts in (train, val))
    if missing and [''.join(head + tail)] != missing or len(head) != len(missing) or len(tail) != len(missing):
        return f'{len(missing)} documents are missing: {[part[:20] for part in missing]}'
    total, characters = sum(map(len, documents)), sum(map(len, val))
    allowed = 2 if missing else max(map(len, documents))
    if abs(characters - share * total) > allowed:
        return f'{characters} of {total} characters are for validation, with val_fraction={share}'
    if [name for name in os.listdir('data/texts') if name.endswith('.part')]:
        return 'a part of a file is left'
    return None


def main():
    chance, began, failed = random.Random(seed), time.monotonic(), []
    cut = int(0.9 * len(TEXT))
    tokenizer = tokenizers.CharTokenizer(TEXT)
    prepare.write_dataset('data/mini', dict(train=[(tokenizer.encode(TEXT[:cut]), cut)], val=[(tokenizer.encode(TEXT[cut:]), len(TEXT) - cut)]),
                       tokenizer, dict(name='mini', url=None, sha256='', stand_in=False))
    print(f'torch {torch.__version__}, Python {sys.version.split()[0]}, numpy {np.__version__}, seed {seed}, {minutes:g} minutes', flush=True)
    for what, ranks in (('kills', 1), ('rank_kills', 2)):
        until = time.monotonic() + 60 * minutes * SHARES[what]
        done, readable, equal, saving = kills(ranks, TARGETS[what] * (only in ('', what)), until, chance)
        print(f'{ranks} rank(s), SIGKILL at a random instant: {done} runs, {saving} of them in a save; {readable} with a readable '
              f'checkpoint, {equal} ended equal to the uninterrupted run', flush=True)
        failed += [what] * (readable < done or equal < done)
        if ranks == 1:
            shutil.copytree('whole', 'kept')
    shutil.rmtree('whole')
    shutil.move('kept', 'whole')
    done, noticed = damage(TARGETS['damage'] * (only in ('', 'damage')), time.monotonic() + 60 * minutes * SHARES['damage'], chance)
    print(f'damaged checkpoints: {done}, noticed and named in one line: {noticed}', flush=True)
    failed += ['damage'] * (noticed < done)
    how, held = full_disk()
    print(f'full disk ({how}): {"said so, ended with 2, older checkpoint intact" if held else "FAILED"}', flush=True)
    failed += ['full disk'] * (not held)
    done, held = garbage(TARGETS['garbage'] * (only in ('', 'garbage')), time.monotonic() + 60 * minutes * SHARES['garbage'])
    print(f'bad inputs: {done:,}, worked or refused in one line with exit 2: {held:,}', flush=True)
    failed += ['garbage'] * (held < done)
    done, held = consoles(TARGETS['consoles'] * (only in ('', 'consoles')),
                          time.monotonic() + 60 * minutes * SHARES['consoles'], chance)
    print(f'consoles that fail: {done}, saved with the right exit code: {held}', flush=True)
    failed += ['consoles'] * (held < done)
    done, held = text_folders(TARGETS['folders'] * (only in ('', 'folders')), time.monotonic() + 60 * minutes * SHARES['folders'],
                              random.Random(seed))
    print(f'text folders: {done:,}, each document once and the share for validation right: {held:,}', flush=True)
    failed += ['folders'] * (held < done)
    print(f'{time.monotonic() - began:.0f} s; ' + (f'FAILED: {", ".join(failed)}' if failed else 'all held'))
    return 1 if failed else 0


if __name__ == '__main__':
    configurator.configure(globals())
    with tempfile.TemporaryDirectory() as home:
        os.chdir(home)
        sys.exit(main())
