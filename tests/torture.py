"""
Kill runs, damage files, feed garbage, and count how often the project held.

    python tests/torture.py --minutes=5      # as much of each part as fits
    python tests/torture.py --minutes=60     # the full counts, as in results/reliability.md

Prints a line for each part: what was tried, how often, and how often the project held. Exits with 1
if anything failed. Reads and writes only a temporary folder, and needs no network. The full disk is
a tmpfs where mounting is allowed.
"""
import contextlib
import functools
import gzip
import io
import json
import os

os.environ['OMP_NUM_THREADS'] = '1'   # before torch: children are forked, and threads are not

import pickle
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import conftest  # 'from conftest import TEXT' would make TEXT a knob
import numpy as np
import torch
from forked import ROOT, fork_ranks, fork_script, wait
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from lib import checkpoint, configurator, data, prepare, tokenizers

minutes = 5.0   # time for all parts; 60 are enough for the full counts
seed = 0        # decides when runs are killed and which bytes are damaged
only = ''       # kills, rank_kills, damage, garbage, consoles or folders; '': every part
STEPS = 30      # optimizer steps of a run
TARGETS = dict(kills=200, rank_kills=20, damage=600, garbage=10_000, folders=1000, consoles=200)
SHARES = dict(   # shares of the time
    kills=0.35, rank_kills=0.2, damage=0.05, garbage=0.3, folders=0.05, consoles=0.05)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)   # scripts replace their handlers


def report(line):
    print(line, flush=True)


def report_problem(text):
    print(f'    {text[:600]}', flush=True)


def budget(part):
    """Return how many attempts a part should make, and the time when it must end."""
    deadline = time.monotonic() + 60 * minutes * SHARES[part]
    if only in ('', part):
        return TARGETS[part], deadline
    return 0, deadline


# ---- kills ---------------------------------------------------------------------------------------

@dataclass
class Kills:
    """Counts of runs that were killed and then resumed."""
    runs: int = 0
    in_a_save: int = 0   # a checkpoint was being written
    readable: int = 0    # last.pt could be read, or the run had not written it yet
    equal: int = 0       # the resumed run ended as the uninterrupted one


def start(ranks, out, resume=False):
    """Start a run that saves at each step, as some ranks; return their process ids."""
    argv = [*conftest.TINY,
            f'--out_dir={out}',
            f'--max_iters={STEPS}',
            f'--lr_decay_iters={STEPS}',
            f'--gradient_accumulation_steps={ranks}',
            '--checkpoint_interval=1',
            '--eval_interval=10',
            '--dropout=0.1']
    if resume:
        argv.append('--init_from=resume')
    return fork_ranks(ranks, 'train.py', argv, log=f'{out}.log')


def state(out):
    """Return all that must be equal in two runs; the times in the log are left out."""
    last = checkpoint.read(f'{out}/last.pt')
    weights = {name: p.numpy().tobytes() for name, p in last['model'].items()}
    with open(f'{out}/log.csv') as f:
        rows = [line.rsplit(',', 2)[0] for line in f]
    return weights, last['iter_num'], str(last['optimizer']), rows


def kill_runs(ranks, target, deadline, chance):
    """Kill runs at random instants and resume them. whole-<ranks> keeps the uninterrupted run."""
    began = time.monotonic()
    out = f'whole-{ranks}'
    codes = [wait(pid) for pid in start(ranks, out)]
    assert not any(codes), Path(f'{out}.log').read_text()
    seconds = time.monotonic() - began
    whole = state(out)
    kills = Kills()
    while kills.runs < target and (kills.runs == 0 or time.monotonic() < deadline):
        shutil.rmtree('run', ignore_errors=True)
        pids = start(ranks, 'run')
        time.sleep(chance.random() * seconds)
        os.kill(chance.choice(pids), signal.SIGKILL)
        for pid in pids:
            wait(pid, 20)
        kills.runs += 1
        if os.path.exists('run/last.pt.part') or os.path.exists('run/best.pt.part'):
            kills.in_a_save += 1
        saved = os.path.exists('run/last.pt')
        try:
            if saved:
                checkpoint.read('run/last.pt')
            kills.readable += 1
            codes = [wait(pid) for pid in start(ranks, 'run', resume=saved)]
            if not any(codes) and state('run') == whole:
                kills.equal += 1
        except checkpoint.Damaged as error:
            report_problem(str(error))
    return kills


def try_kills(part, ranks, chance):
    kills = kill_runs(ranks, *budget(part), chance)
    report(f'{ranks} rank(s), SIGKILL at a random instant: {kills.runs} runs, '
           f'{kills.in_a_save} of them in a save; {kills.readable} with a readable checkpoint, '
           f'{kills.equal} ended equal to the uninterrupted run')
    return kills.runs == kills.readable == kills.equal


# ---- consoles ------------------------------------------------------------------------------------

def try_consoles(chance):
    """Let the console of runs fail, and interrupt some of the runs.

    A run holds when it ends with its own exit code, its checkpoint has all steps that it logged,
    and no lock or partial file is left."""
    target, deadline = budget('consoles')
    done = held = 0
    while done < target and (done < 4 or time.monotonic() < deadline):
        number = chance.choice((None, signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        problem = run_with_failing_console(number, chance)
        done += 1
        if problem:
            report_problem(problem)
        else:
            held += 1
    report(f'consoles that fail: {done}, saved with the right exit code: {held}')
    return held == done


def run_with_failing_console(number, chance):
    """Train with a full disk or an ending reader as the console; return what was lost, or ''."""
    shutil.rmtree('run', ignore_errors=True)
    reader = None
    console = '/dev/full'
    if chance.random() < 0.7:
        console = 'console'
        reader = threading.Thread(target=read_some, args=(console, chance.randrange(5000)))
        os.mkfifo(console)
        reader.start()
    argv = [*conftest.TINY,
            f'--max_iters={STEPS}',
            f'--lr_decay_iters={STEPS}',
            '--log_interval=1',
            '--eval_interval=10',
            '--out_dir=run']
    pid = fork_script('train.py', argv, log=console)
    if number:
        stop_after_some_steps(pid, number, chance)
    code = wait(pid)
    if reader:
        reader.join()
        os.remove(console)
    lost = lost_work(code, number)
    if lost:
        return f'{console} {number} {lost}'
    return ''


def read_some(path, size):
    """Read some bytes of a pipe, and close it."""
    with open(path, 'rb', buffering=0) as f:
        while size > 0 and (block := f.read(size)):
            size -= len(block)


def stop_after_some_steps(pid, number, chance):
    """Send a signal at a random instant after the run has logged a few steps."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not logged_steps():
        time.sleep(0.002)
    time.sleep(0.1 * chance.random())
    os.kill(pid, number)   # the process was not waited for yet, so the system has kept its id


def logged_steps():
    """Return how many steps the run has logged."""
    try:
        with open('run/log.csv') as f:
            return len(f.readlines()) - 1
    except FileNotFoundError:
        return 0


def lost_work(code, number):
    """Return what a run with a failing console has lost or left behind, or ''."""
    saved = checkpoint.read('run/last.pt')['iter_num']
    logged = logged_steps()
    if code == 0:
        logged -= 1   # the last row is an evaluation
        if saved != STEPS:
            return f'ended with step {saved}'
    elif not number or code != 128 + number:
        return f'ended with exit code {code}'
    if logged != saved:
        return f'logged {logged} steps and saved {saved}'
    left = [name for name in os.listdir('run') if name == '.lock' or name.endswith('.part')]
    if left:
        return f'left {left}'
    return ''


# ---- damage --------------------------------------------------------------------------------------

def places_of_damage(whole):
    """Return {kind of place: positions} of a checkpoint, a zip file with a seal at its end."""
    header_fields = (0, 4, 8, 14, 18, 26, 28, 30)   # where the fields of a member's header begin
    with zipfile.ZipFile(io.BytesIO(whole)) as z:
        members = z.infolist()
        directory = z.start_dir
    headers = [info.header_offset + field for info in members for field in header_fields]
    first_data = [info.header_offset + 30 + len(info.filename) for info in members]
    end_record = len(whole) - 93
    seal = len(whole) - 71   # the zip's comment, which holds a hash
    return dict(
        headers=headers,
        names_and_padding=first_data,
        data=range(len(whole)),
        directory=range(directory, end_record),
        end_record=range(end_record, seal),
        seal=range(seal, len(whole)))


def damaged_copies(whole, chance):
    """Yield (description, bytes) without end; each kind of place gets its turn."""
    places = places_of_damage(whole)
    while True:
        for name, positions in places.items():
            at = chance.choice(positions)
            kind = chance.choice(('flip', 'flip', 'flip', 'cut', 'zero', 'double', 'drop'))
            n = chance.choice((1, 1, 4, 100))
            bit = 1 << chance.randrange(8)
            rest = dict(
                flip=bytes([whole[at] ^ bit]) + whole[at + 1:],
                cut=b'',
                zero=bytes(n) + whole[at + n:],
                double=whole[at:at + n] + whole[at:],
                drop=whole[at + n:])
            copy = whole[:at] + rest[kind]
            if copy != whole:
                yield f'{kind} in {name}', copy


def try_damage(chance):
    """Damage a checkpoint. Loading must exit with 2 and one line that names the file."""
    target, deadline = budget('damage')
    copies = damaged_copies(Path('whole-1/last.pt').read_bytes(), chance)
    done = noticed = 0
    while done < target and (done < 20 or time.monotonic() < deadline):
        what, content = next(copies)
        Path('hurt.pt').write_bytes(content)
        load = functools.partial(checkpoint.load, 'hurt.pt')
        problem = bad_end(load, allowed=(2,), word='hurt.pt')
        done += 1
        if problem:
            report_problem(f'{what} {problem}')
        else:
            noticed += 1
    report(f'damaged checkpoints: {done}, noticed and named in one line: {noticed}')
    return noticed == done


def bad_end(act, allowed=(0, 2), word=''):
    """Return None if act() works or ends as a user's mistake; otherwise a description.

    A mistake exits with 2 and one line on stderr that holds the word."""
    out = io.TextIOWrapper(io.BytesIO(), encoding='utf-8')
    err = io.StringIO()
    began = time.monotonic()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            act()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException as error:
        return described(error)
    said = err.getvalue()
    errors = [line for line in said.splitlines() if line.startswith('error: ')]
    explained = code != 2 or len(errors) == 1 and word in errors[0]
    if code not in allowed or not explained:
        return f'exit {code}: {said[-500:]}'
    seconds = time.monotonic() - began
    if seconds > 20:
        return f'took {seconds:.0f} s'
    return None


def described(error):
    """Return an exception and its innermost four frames in one line."""
    frames = traceback.extract_tb(error.__traceback__)[::-1][:4]
    places = [f'{Path(frame.filename).name}:{frame.lineno}' for frame in frames]
    return ' < '.join([f'{type(error).__name__}: {error}'[:200], *places])


# ---- garbage -------------------------------------------------------------------------------------

def script(name, *argv, stdin=''):
    """Run a script in this process."""
    before = sys.argv
    sys.argv = [str(ROOT / name), *argv]
    sys.stdin = io.StringIO(stdin)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        runpy.run_path(str(ROOT / name), run_name='__main__')
    finally:
        sys.argv = before
        torch.set_flush_denormal(False)   # hypothesis draws the smallest numbers too
        for number, handler in handlers.items():
            signal.signal(number, handler)


def train_knobs():
    """Return the names of train.py's knobs, as --help lists them."""
    shown = io.TextIOWrapper(io.BytesIO(), encoding='utf-8')
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        script('train.py', '--help')
    table = shown.buffer.getvalue().decode().partition('knobs, as')[2]
    return [line.split()[0] for line in table.splitlines()[1:]]


KNOBS = train_knobs()
assert 'learning_rate' in KNOBS
characters = st.characters(exclude_categories=['Cs'], exclude_characters='\0')
words = st.text(characters, max_size=20)
extremes = st.sampled_from([2**31, 2**63, 10**30, 1e308, -0.0, '1e999', '0x10'])
numbers = st.one_of(st.integers(-3, 40), st.integers(), st.floats(), extremes)
literals = st.sampled_from(['auto', 'True', '', '[1]', '{}', '__import__("os")', '(' * 99])
plain = st.one_of(st.none(), st.booleans(), numbers, words, literals)
nested = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6)
keys = st.one_of(st.sampled_from(KNOBS), words)
flags = st.one_of(
    st.tuples(keys, plain).map(lambda pair: f'--{pair[0]}={pair[1]}'),
    keys.map('--{}'.format),
    words)
command_lines = st.lists(flags, max_size=5)
statements = st.sampled_from([
    'import os',
    'if device == "cpu":',
    '    n_layer = 2',
    'raise ValueError',
    'def f():',
    'n_layer += 1',
    'max_iters = 1/0',
    'exit()',
    'batch_size = "a" * 10**6',
])
config_lines = st.one_of(
    st.tuples(keys, nested).map(lambda pair: f'{pair[0]} = {pair[1]!r}'),
    words,
    statements)
configs = st.lists(config_lines, max_size=6)
meta_places = st.sampled_from([
    ('tokenizer',), ('tokenizer', 'kind'), ('tokenizer', 'chars'), ('tokenizer', 'merges'),
    ('dtype',), ('vocab_size',), ('format',),
    ('splits',), ('splits', 'val'),
    ('splits', 'train'), ('splits', 'train', 'tokens'), ('splits', 'train', 'sha256'),
    ('source',), ('source', 'stand_in'), ('source', 'reason'),
])
saved_places = st.sampled_from([
    ('model_args',), ('model_args', 'n_layer'), ('model_args', 'n_embd'),
    ('model_args', 'vocab_size'), ('model_args', 'block_size'), ('model_args', 'pos'),
    ('model_args', 'extra'),
    ('model',), ('model', 'transformer.wte.weight'), ('model', 'extra'),
    ('tokenizer',), ('tokenizer', 'chars'), ('tokenizer', 'kind'),
    ('config',), ('config', 'n_layer'), ('config', 'learning_rate'), ('config', 'seed'),
    ('config', 'optimizer'), ('config', 'warmup_iters'), ('config', 'lr_decay_iters'),
    ('config', 'prepare'),
    ('optimizer',), ('optimizer', 0), ('optimizer', 0, 'param_groups'),
    ('optimizer', 0, 'state'), ('optimizer', 0, 'state', 1),
    ('optimizer', 0, 'state', 2, 'exp_avg'),
    ('iter_num',), ('best_val_loss',), ('scaler',), ('seconds',), ('skipped',),
])
sample_knobs = st.sampled_from([
    'temperature', 'top_k', 'top_p', 'repetition_penalty', 'stop', 'seed', 'kv_cache'])
sample_flags = st.tuples(sample_knobs, plain).map(lambda pair: f'--{pair[0]}={pair[1]}')


def replace(tree, place, value):
    """Set a value inside nested lists and dicts. place: the keys on the way to the value."""
    *outer, last = place
    for key in outer:
        tree = tree[key]
    tree[last] = value


def without_data(*argv):
    """Return an action: train.py, to the point where it looks for its data."""
    absent = ['--dataset=absent', '--device=cpu', '--init_from=scratch', '--prepare=']
    return functools.partial(script, 'train.py', *argv, *absent)


def fuzz_command_line(argv):
    return without_data(*argv)


def fuzz_config(lines):
    Path('fuzz.py').write_text('\n'.join(lines), encoding='utf-8', errors='replace')
    return without_data('fuzz.py')


def fuzz_meta(change):
    """Put any value into meta.json."""
    meta = json.loads(Path('data/mini/meta.json').read_text())
    replace(meta, *change)
    return fuzz_meta_text(json.dumps(meta))


def fuzz_meta_text(text):
    """Write any text as meta.json."""
    shutil.copytree('data/mini', 'data/fuzzed', dirs_exist_ok=True)
    Path('data/fuzzed/meta.json').write_text(text, encoding='utf-8', errors='replace')
    return read_fuzzed


def fuzz_bin(change):
    """Write any bytes as train.bin, with meta.json or with nanoGPT's meta.pkl beside it."""
    with_meta, raw = change
    shutil.copytree('data/mini', 'data/fuzzed', dirs_exist_ok=True)
    Path('data/fuzzed/train.bin').write_bytes(raw)
    if not with_meta:   # nanoGPT's layout has no hashes to check against
        os.remove('data/fuzzed/meta.json')
        meta = pickle.dumps(dict(itos={0: 'a', 1: 'b'}))
        Path('data/fuzzed/meta.pkl').write_bytes(meta)
    return read_fuzzed


def read_fuzzed():
    opened = data.Dataset('fuzzed')
    data.TrainingWindows(opened, 'train', 8, 0).batch(0, 4)
    next(iter(data.evaluation_batches(opened, 'val', 8, 4)))
    opened.stand_in_banner()


def fuzz_checkpoint(change):
    """Put any value into a checkpoint; sample from it, or resume from it."""
    loaded = checkpoint.read('whole-1/last.pt')
    replace(loaded, *change)
    shutil.rmtree('fuzzed', ignore_errors=True)
    os.makedirs('fuzzed')
    try:
        checkpoint.save('fuzzed/last.pt', loaded)
    except Exception:
        return lambda: None   # torch cannot write this value, so no file can hold it
    place, value = change
    if place[0] in ('model', 'model_args', 'tokenizer'):
        sample = ['--checkpoint=fuzzed/last.pt', '--device=cpu', '--start=1']
        return functools.partial(script, 'sample.py', *sample, '--max_new_tokens=2')
    resume = ['--init_from=resume',
              '--out_dir=fuzzed',
              '--dataset=mini',
              '--prepare=',
              '--device=cpu',
              '--dtype=float32',
              '--compile=False',
              '--max_iters=31',
              '--batch_size=2',
              '--gradient_accumulation_steps=1',
              '--eval_iters=1',
              '--sample_interval=0',
              '--wandb_log=False',
              '--tensorboard_log=False']
    return functools.partial(script, 'train.py', *resume)


def fuzz_prompt(asked):
    prompt, argv = asked
    fixed = ['--max_new_tokens=3', '--dtype=float32']
    sample = ['--out_dir=whole-1', '--device=cpu', f'--start={prompt}', *argv, *fixed]
    return functools.partial(script, 'sample.py', *sample, stdin=prompt)


@dataclass
class Garbage:
    """A kind of input. prepare(input) writes the input's files and returns the action to try."""
    what: str
    count: int   # inputs in a full run
    inputs: st.SearchStrategy
    prepare: Callable


GARBAGE = [
    Garbage('command lines', 3000, command_lines, fuzz_command_line),
    Garbage('config files', 2500, configs, fuzz_config),
    Garbage('meta.json, a value', 1500, st.tuples(meta_places, nested), fuzz_meta),
    Garbage('meta.json, any text', 500, words, fuzz_meta_text),
    Garbage('.bin files', 1000, st.tuples(st.booleans(), st.binary(max_size=200)), fuzz_bin),
    Garbage('checkpoints', 800, st.tuples(saved_places, nested), fuzz_checkpoint),
    Garbage('prompts and sampling flags', 700,
            st.tuples(words, st.lists(sample_flags, max_size=3)), fuzz_prompt),
]


def try_garbage():
    """Try generated inputs. Each must work, or exit with 2 and one line on stderr."""
    target, deadline = budget('garbage')
    total = held = 0
    left = full = sum(kind.count for kind in GARBAGE)
    for kind in GARBAGE:
        now = time.monotonic()
        until = now + max(0.5, (deadline - now) * kind.count / left)
        left -= kind.count
        tried, problems = try_inputs(kind, max(1, target * kind.count // full), until)
        good = tried - len(problems)
        report(f'  {kind.what}: {tried:,} inputs, {good:,} worked or were refused in one line')
        one_of_each = {problem.rpartition(' => ')[2]: problem for problem in problems}
        for problem in one_of_each.values():
            report_problem(problem)
        total += tried
        held += good
    report(f'bad inputs: {total:,}, worked or refused in one line with exit 2: {held:,}')
    return held == total


def try_inputs(kind, count, until):
    """Try inputs until a time, at least one; return how many, and a list of what went wrong."""
    tried = []
    problems = []

    @settings(max_examples=count, deadline=None, database=None, phases=[Phase.generate],
              derandomize=True, suppress_health_check=list(HealthCheck))
    @given(kind.inputs)
    def try_one(value):
        if tried and time.monotonic() > until:
            raise KeyboardInterrupt   # hypothesis stops at no other exception
        tried.append(value)
        problem = bad_end(kind.prepare(value))
        if problem:
            problems.append(f'{value!r} => {problem}')
    try:
        try_one()
    except KeyboardInterrupt:
        if time.monotonic() < until:
            raise
    return len(tried), problems


# ---- a full disk ---------------------------------------------------------------------------------

def try_full_disk():
    """Fill the disk under a run: a tmpfs of 300 kB, or a limit on the size of a file."""
    os.makedirs('small', exist_ok=True)
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=300k', 'tmpfs', 'small']
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    try:
        if not mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
        argv = [*conftest.TINY, '--n_embd=32', '--out_dir=small/out', '--eval_interval=2']
        code = wait(fork_script('train.py', argv, 'full.log'))
        said = Path('full.log').read_text()
        for path in Path('small/out').glob('*.pt'):
            checkpoint.read(str(path))   # raises Damaged
    finally:
        if mounted:
            subprocess.run(['umount', 'small'], check=True)
        else:
            unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    held = code == 2 and 'could not be written' in said and 'Traceback' not in said
    how = 'tmpfs' if mounted else 'RLIMIT_FSIZE'
    outcome = 'said so, ended with 2, older checkpoint intact' if held else 'FAILED'
    report(f'full disk ({how}): {outcome}')
    return held


# ---- text folders --------------------------------------------------------------------------------

def try_text_folders(chance):
    """Prepare random folders of text, and check the splits that are made from them."""
    target, deadline = budget('folders')
    done = held = 0
    while done < target and (done < 5 or time.monotonic() < deadline):
        for name in ('texts', 'elsewhere', 'data/texts'):
            shutil.rmtree(name, ignore_errors=True)
        documents = make_text_folder(chance)
        any_share = 0.001 + 0.998 * chance.random()
        share = chance.choice([0.1, 0.1, 0.01, 0.5, 0.9, any_share])
        argv = [f'--tokenizer={chance.choice(["char", "byte"])}',
                f'--input={chance.choice(["texts", "texts/**/*"])}',
                '--name=texts',
                f'--val_fraction={share}']
        done += 1
        problem = bad_end(functools.partial(script, 'prepare_text.py', *argv))
        problem = problem or wrong_splits(documents, share)
        if problem:
            report_problem(f'folder {done}: {problem}')
        else:
            held += 1
    report(f'text folders: {done:,}, each document once and the share for validation right: '
           f'{held:,}')
    return held == done


def make_text_folder(chance):
    """Write texts/ with files, links and loops; return its documents."""
    documents = make_documents(chance)
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
        stem = f'{chance.choice(folders)}/{chance.choice("abc")}{len(files)}'
        files.append(write_documents(stem, left[:n], chance))
        del left[:n]
    add_links(folders, files, chance)
    if chance.random() < 0.3:
        os.makedirs('texts/.hidden')
        Path('texts/.hidden/no.txt').write_text('not a document')
    return documents


def make_documents(chance):
    """Return documents of random sizes. Each begins with its number, so all differ."""
    documents = []
    for i in range(chance.choice([1, 1, 2, 3, 5, 12, 40])):
        sizes = [chance.randint(1, longest) for longest in (50, 2000, 40_000)]
        size = chance.choice(sizes)
        text = 'to be or né 二 that is ' * (size // 20 + 1)
        documents.append(f'{i:03d}:{text[:size]}')
    return documents


def add_links(folders, files, chance):
    """Add links to files and folders, loops among them, and sometimes a link to nothing."""
    os.symlink('../elsewhere', 'texts/link')
    for i in range(chance.randint(0, 4)):
        folder = chance.choice(folders)
        target = chance.choice(files)
        ending = target.partition('.')[2]
        name = f'{chance.choice("az")}-link-{i}.{ending}'
        os.symlink(os.path.relpath(target, folder), f'{folder}/{name}')
    for i in range(chance.randint(0, 3)):
        folder = chance.choice(folders)
        target = chance.choice(folders)
        name = f'{chance.choice("az")}-loop-{i}'
        os.symlink(os.path.relpath(target, folder), f'{folder}/{name}')
    if chance.random() < 0.3:
        os.symlink('nowhere', f'{chance.choice(folders)}/gone.txt')


def write_documents(stem, documents, chance):
    """Write some documents into one file of a random kind; return its path."""
    kind = chance.choice(['jsonl', 'jsonl.gz', 'txt', 'txt.gz', 'md'])
    if kind.startswith('jsonl'):
        content = '\n'.join(json.dumps(dict(n=1, text=text)) for text in documents)
    else:
        parts = documents
        if chance.random() < 0.3:
            parts = ['', *documents]
        content = tokenizers.END_OF_TEXT.join(parts)
    raw = content.encode(chance.choice(['utf-8', 'utf-8', 'utf-8-sig', 'utf-16']))
    if kind.endswith('gz'):
        raw = gzip.compress(raw)
    path = f'{stem}.{kind}'
    Path(path).write_bytes(raw)
    return path


def wrong_splits(documents, share):
    """Return what is wrong with data/texts, or None.

    Each document must be in it once, and validation must have the share that was asked for. At
    most one document is cut: its head ends the training split, its tail ends the other."""
    if not os.path.exists('data/texts/meta.json'):
        return 'the folder was refused'
    train = split_into_documents('train')
    val = split_into_documents('val')
    counts = Counter(train + val)
    beginnings = [part[:20] for part in counts]
    cut = [document for document in documents if not counts[document]]
    repeated = [document for document in documents if counts[document] > 1]
    if repeated or len(train) + len(val) != len(documents) + len(cut):
        return f'a document is there twice, or a part that is not a document: {beginnings}'
    head = [part for part in train if part not in documents]
    tail = [part for part in val if part not in documents]
    if not len(cut) == len(head) == len(tail):
        return f'{len(cut)} documents are missing: {beginnings}'
    if cut and ''.join(head + tail) != cut[0]:
        return f'the document that was cut is not whole: {beginnings}'
    total = sum(map(len, documents))
    characters = sum(map(len, val))
    allowed = max(map(len, documents))
    if cut:
        allowed = 2
    if abs(characters - share * total) > allowed:
        return f'{characters} of {total} characters are for validation, with val_fraction={share}'
    if any(name.endswith('.part') for name in os.listdir('data/texts')):
        return 'a partial file is left'
    return None


def split_into_documents(split):
    """Return the documents of a split of data/texts; a line break separates them."""
    opened = data.Dataset('texts')
    tokens = np.concatenate(opened.split(split)).tolist()
    return opened.tokenizer.decode(tokens).decode().split('\n')


# ---- all parts -----------------------------------------------------------------------------------

def write_mini():
    """Write data/mini: characters, a tenth of the text for validation."""
    text = conftest.TEXT
    tokenizer = tokenizers.CharTokenizer(text)
    cut = int(0.9 * len(text))
    parts = dict(train=text[:cut], val=text[cut:])
    splits = {split: [(tokenizer.encode(part), len(part))] for split, part in parts.items()}
    source = dict(name='mini', url=None, sha256='', stand_in=False)
    prepare.write_dataset('data/mini', splits, tokenizer, source)


def main():
    """Run every part; return the exit code."""
    began = time.monotonic()
    chance = random.Random(seed)
    write_mini()
    versions = f'torch {torch.__version__}, Python {sys.version.split()[0]}, numpy {np.__version__}'
    report(f'{versions}, seed {seed}, {minutes:g} minutes')
    held = {}   # in the order of the parts
    held['kills'] = try_kills('kills', 1, chance)
    held['rank_kills'] = try_kills('rank_kills', 2, chance)
    held['damage'] = try_damage(chance)
    held['full disk'] = try_full_disk()
    held['garbage'] = try_garbage()
    held['consoles'] = try_consoles(chance)
    held['folders'] = try_text_folders(random.Random(seed))
    failed = [part for part in held if not held[part]]
    verdict = 'all held'
    if failed:
        verdict = f'FAILED: {", ".join(failed)}'
    report(f'{time.monotonic() - began:.0f} s; {verdict}')
    return 1 if failed else 0


if __name__ == '__main__':
    configurator.configure(globals())
    with tempfile.TemporaryDirectory() as home:
        os.chdir(home)
        sys.exit(main())
