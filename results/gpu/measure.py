"""
Check and measure everything on one GPU, in 25 minutes.

    python results/gpu/measure.py --steps=data   # where the texts are; the other steps read data/
    python results/gpu/measure.py                # all steps; typed again, those not yet done
    python results/gpu/measure.py --steps=sampling,fp16 --minutes=9
    python results/gpu/measure.py --small --to=try   # the same steps in a tiny form, on a CPU

It needs torch 2.11 or later and no network, and installs nothing. Every step has a process of its
own and a limit of time, at which the step and all that it has started are killed. Figures are
written as they come. So a run that is cut off leaves what it has, a step that fails costs only
itself, and no step leaves memory in use for the next one.

Reads data/ in the working folder; train.py's runs go to out-gpu/ there. Writes measured.json (all
figures, commands and tracebacks), measured.md (a table) and measured.log (what the commands
printed) into --to.
"""
import contextlib
import csv
import os
import platform
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from importlib import metadata
from json import dumps, loads
from typing import Any

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', '..'))

from lib.configurator import check, configure, exit_on_signals
from lib.console import fail, say

steps = ''        # names of steps with commas between, measured again; '': all not yet done
minutes = 25.0    # after these the running step is killed; a step needs half its limit to begin
small = False     # tiny nets and a few steps of training: shows that the script works
to = 'results/gpu'   # folder of the results
source = os.environ.get('SHARED_DATA', '')   # folder with the texts, for the step `data`
child = ''        # used by this script itself: the one step that this process makes
knobs, _ = configure(globals(), configs=False)

ROOT = os.path.abspath(sys.path[0])
RUNS = 'out-gpu-small' if small else 'out-gpu'   # folder of train.py's runs
# tokens by characters, and GPT-2's tokens
CHARS = 'gpu_small' if small else 'shakespeare_char'
BPE = 'gpu_small' if small else 'enwik8_gpt2'
MAIN_JOB = os.path.join(ROOT, 'config/train_shakespeare_char.py')
SPEEDRUN = os.path.join(ROOT, 'config/speedrun_shakespeare_char.py')
ENWIK8 = os.path.join(ROOT, 'config/train_enwik8_gpt2.py')
# Flags that come last, and make any training of train.py tiny.
TINY = ['--n_layer=1', '--n_head=2', '--n_embd=16', '--block_size=16', '--batch_size=2',
        '--gradient_accumulation_steps=2', '--eval_iters=1', '--eval_interval=2', '--dtype=float32',
        '--device=cpu', '--compile=False', '--prepare=']
# GPT-2's shape on GPT-2's tokens, in steps without accumulation
GPT2 = [f'--dataset={BPE}', '--gradient_accumulation_steps=1', '--batch_size=8',
        '--warmup_iters=10', '--lr_decay_iters=200', '--eval_iters=5', '--log_interval=1']


class Skipped(Exception):
    """Raised by a step that cannot be made here; says why."""


# ---- what the steps use --------------------------------------------------------------------------

def note(figure, value, aim=''):
    """Write down a figure of this step. aim: what it is hoped to be, in words."""
    with open(part_file(child), 'a', encoding='utf-8') as f:
        f.write(dumps(dict(figure=figure, value=value, aim=aim)) + '\n')


def part_file(name):
    """Return the file in which a step notes its figures while it runs."""
    return os.path.join(RUNS, f'{name}.jsonl')


def log_file(name):
    """Return the file of what a step and its commands print."""
    return os.path.join(RUNS, f'{name}.txt')


def said_file(name):
    """Return the file of what a step's command has written to stderr, while the command runs."""
    return os.path.join(RUNS, f'{name}.said')


def length(count, tiny=4):
    """Return a number of training steps, or with --small a tiny one."""
    return tiny if small else count


def find_device():
    """Return 'cuda' where there is a GPU, else 'cpu', as always with --small."""
    import torch
    return 'cuda' if torch.cuda.is_available() and not small else 'cpu'


def need_gpu():
    """Skip the step where there is no GPU, and with --small, which must not run the tests."""
    if find_device() == 'cpu':
        raise Skipped('needs a GPU')


def need_data(name):
    """Skip the step where a dataset is missing."""
    if not os.path.exists(f'data/{name}/train.bin'):
        raise Skipped(f'data/{name} is missing; the step "data" makes it')


def command(*words, code=0):
    """Run a script of the project; return (stdout, stderr). Raise unless it exits with `code`."""
    script, *flags = [str(word) for word in words]
    print('$ python', script, *flags, flush=True)
    with open(said_file(child), 'w+', encoding='utf-8', errors='replace') as said:
        done = subprocess.run([sys.executable, os.path.join(ROOT, script), *flags], check=False,
                              stdout=subprocess.PIPE, stderr=said, text=True, errors='replace')
        said.seek(0)
        errors = said.read()
    os.remove(said_file(child))
    print(errors[-20_000:] + done.stdout[-20_000:], flush=True)
    if done.returncode != code:
        raise RuntimeError(f'exit code {done.returncode} of {" ".join([script, *flags])}\n'
                           f'{errors.strip()[-2000:]}')
    return done.stdout, errors


@dataclass
class Trained:
    """What a run of train.py left."""
    folder: str
    words: str      # what it said
    rows: list      # rows of log.csv with a training loss

    def losses(self):
        return [float(row['train_loss']) for row in self.rows]

    def step_ms(self):
        """Return the milliseconds of a step, the median of the last half of the rows."""
        per_step = int(self.rows[-1]['tokens']) / int(self.rows[-1]['iter'])
        rates = [float(row['tok_per_s']) for row in self.rows[len(self.rows) // 2:]]
        return 1e3 * per_step / statistics.median(rates)

    def last(self, pattern):
        """Return the number that the last match of a pattern holds, None without a match."""
        found = re.findall(pattern, self.words)
        return float(found[-1].replace(',', '')) if found else None


def train(name, *flags):
    """Run train.py into a folder of RUNS; return what it left."""
    folder = os.path.join(RUNS, name)
    if '--init_from=resume' not in flags:
        shutil.rmtree(folder, ignore_errors=True)
    _, words = command(*training(folder, *flags))
    return read_run(folder, words)


def training(folder, *flags):
    """Return the words of a command that trains into a folder, without a sample or a download."""
    words = ['train.py', *flags, f'--out_dir={folder}', '--prepare=', '--sample_interval=0']
    if small:
        words += [f'--dataset={CHARS}', *TINY]
    return words


def read_run(folder, words):
    """Return what a run of train.py left in a folder."""
    with open(os.path.join(folder, 'log.csv'), encoding='utf-8', newline='') as f:
        rows = [row for row in csv.DictReader(f) if row['train_loss']]
    return Trained(folder, words, rows)


def farthest(one, other):
    """Return the largest distance of two runs' losses at the same step."""
    return max(abs(a - b) for a, b in zip(one.losses(), other.losses(), strict=True))


def same_weights(one, other):
    """Return whether two runs end with the same weights, to the bit."""
    import torch
    found = []
    for run in (one, other):
        path = os.path.join(run.folder, 'last.pt')
        found.append(torch.load(path, map_location='cpu', weights_only=True)['model'])
    return all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def seconds_of(work, device, repeats=10):
    """Return the seconds that a call of work takes, the median of some; the first ones are warm-up.

    On a GPU the calls are timed by its own clock."""
    import torch
    times = []
    for _ in range(3 + repeats):
        if device == 'cpu':
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
            continue
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[3:])


# ---- the steps, in their order -------------------------------------------------------------------

def machine():
    """Versions and the card."""
    import torch
    note('python', platform.python_version())
    note('torch', torch.__version__)
    note('CUDA', torch.version.cuda or 'none')
    note('processor cores', os.cpu_count())
    for package in ('triton', 'transformers'):
        with contextlib.suppress(metadata.PackageNotFoundError):
            note(package, metadata.version(package))
    if not torch.cuda.is_available():
        note('card', 'none')
        return
    facts = torch.cuda.get_device_properties(0)
    note('card', facts.name)
    note('memory, GB', facts.total_memory / 1e9)
    note('multiprocessors', facts.multi_processor_count)
    note('compute capability', f'{facts.major}.{facts.minor}')
    note('cuDNN', torch.backends.cudnn.version())
    query = ['nvidia-smi', '--query-gpu=driver_version,clocks.max.sm,power.limit',
             '--format=csv,noheader']
    with contextlib.suppress(OSError):
        done = subprocess.run(query, capture_output=True, text=True, check=False)
        note('driver, highest clock, power limit', done.stdout.strip())


def rates():
    """What the card can do: matrix products, copies, launches of kernels."""
    import torch
    device = find_device()
    n = 128 if small else 8192
    torch.set_float32_matmul_precision('high')   # float32 is TF32 on a GPU
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a = torch.randn(n, n, device=device).to(dtype)
        b = torch.randn(n, n, device=device).to(dtype)
        seconds = seconds_of(lambda a=a, b=b: a @ b, device)
        note(f'products of {n} in {str(dtype)[6:]}, TFLOP/s', 2 * n**3 / seconds / 1e12)
    numbers = torch.randn(1 << (16 if small else 28), device=device)   # 1 GiB
    seconds = seconds_of(lambda: numbers.clone(), device)
    note('copy, GB/s read and written', 2 * numbers.nbytes / seconds / 1e9)
    seconds = seconds_of(lambda: numbers.sum(), device)
    note('read, GB/s', numbers.nbytes / seconds / 1e9)
    one = torch.zeros(1, device=device)
    seconds = seconds_of(lambda: [one.add_(1) for _ in range(200)], device)
    note('one kernel after another, microseconds each', seconds / 200 * 1e6)


def data():
    """The datasets, made from the texts in --source where they are missing."""
    if small:
        write_small_text()
        command('prepare_text.py', f'--input={RUNS}/small.txt', f'--name={CHARS}')
    elif not source and not os.path.exists(f'data/{CHARS}/train.bin'):
        raise Skipped('needs --source=FOLDER with tinyshakespeare.txt and enwik8_head.gz')
    wanted = {
        CHARS: ['prepare_shakespeare.py', '--tokenizer=char',
                f'--input={source}/tinyshakespeare.txt'],
        BPE: ['prepare_enwik8.py', '--tokenizer=gpt2', '--partial',
              f'--input={source}/enwik8_head.gz'],
    }
    if os.path.isdir(f'{source}/tiktoken') and not small:   # GPT-2's merges travel with the data
        shutil.copytree(f'{source}/tiktoken', 'data/tiktoken', dirs_exist_ok=True)
    for name, words in wanted.items():
        if not os.path.exists(f'data/{name}/train.bin'):
            command(*words)
        size = sum(entry.stat().st_size for entry in os.scandir(f'data/{name}'))
        note(f'data/{name}, MB', size / 1e6)


def write_small_text():
    """Write the text of --small."""
    lines = [f'{i} times {j} is {i * j}.\n' for i in range(20) for j in range(20)]
    with open(f'{RUNS}/small.txt', 'w', encoding='utf-8') as f:
        f.write(''.join(lines))


def gpu_tests():
    """The tests that need a GPU."""
    need_gpu()
    files = [os.path.join(ROOT, 'tests', f'test_{name}.py') for name in ('gpu', 'fast', 'decoding')]
    done = subprocess.run(
        [sys.executable, '-m', 'pytest', '-n', '0', '-p', 'no:cacheprovider',
         '-k', '(gpu or cuda) and not measure and not step_that_fails', *files],
        capture_output=True, text=True, check=False, cwd=ROOT)
    print(done.stdout + done.stderr, flush=True)
    lines = done.stdout.strip().splitlines() or ['nothing was printed']
    note('pytest', lines[-1], aim='none failed')
    if done.returncode:
        raise RuntimeError(done.stdout[-3000:])


def main_job():
    """The GPU half of the main job: milliseconds of a step in four ways."""
    need_data(CHARS)
    ways = dict(eager=['--compile=False'], graph=['--compile=False', '--cuda_graph'],
                compiled=['--compile=True'], compiled_graph=['--compile=True', '--cuda_graph'])
    count = length(300)
    for way, flags in ways.items():
        began = time.perf_counter()
        run = train(f'main-{way}', MAIN_JOB, f'--max_iters={count}', f'--eval_interval={count}',
                    *flags)
        note(f'{way}: ms a step', run.step_ms())
        note(f'{way}: seconds of {count} steps with start and end', time.perf_counter() - began)
        note(f'{way}: validation loss', run.last(r'val loss ([\d.]+) nats'))
        note(f'{way}: MB', run.last(r'and ([\d,]+) MB'))


def same_losses():
    """The same losses from the step in four ways, without dropout, whose masks differ."""
    need_data(CHARS)
    common = [MAIN_JOB, '--dropout=0', f'--max_iters={length(40)}', '--log_interval=1',
              '--eval_interval=1000']
    eager = train('same-eager', *common, '--compile=False')
    again = train('same-again', *common, '--compile=False')
    note('eager twice: largest difference of losses', farthest(eager, again))
    graph = train('same-graph', *common, '--compile=False', '--cuda_graph')
    note('graph and eager: largest difference of losses', farthest(eager, graph), 'below 0.02')
    both = train('same-both', *common, '--compile=True', '--cuda_graph')
    note('compiled graph and eager: largest difference of losses', farthest(eager, both),
         'below 0.02')


def main_whole():
    """The GPU half of the main job, whole: nanoGPT's recipe, 5,000 steps."""
    need_data(CHARS)
    run = train('main-whole', MAIN_JOB, '--cuda_graph', f'--max_iters={length(5000)}')
    note('validation loss at the end, whole split', run.last(r'val loss ([\d.]+) nats'))
    losses = [float(loss) for loss in re.findall(r'val loss ([\d.]+), perp', run.words)]
    note('lowest of the evaluations', min(losses), 'about 1.47')
    note('seconds of training', float(run.rows[-1]['seconds']))


def speedrun():
    """speedrun_shakespeare_char.py: seconds to 1.47 nats, and the best loss."""
    need_data(CHARS)
    count = [f'--max_iters={length(800)}']
    if small:
        count.append('--target_loss=100')
    for which in ('compiled for the first time', 'compiled before'):
        run = train('speedrun', SPEEDRUN, *count)
        training_time = run.last(r'reached target_loss=\S+ after [\d,]+ steps: ([\d.]+) s')
        since_start = run.last(r'excluded; ([\d.]+) s since')
        note(f'{which}: seconds of training to 1.47', training_time, 'below 20 on an H100')
        note(f'{which}: seconds to 1.47, everything', since_start)
    best = train('speedrun-best', SPEEDRUN, *count, '--target_loss=0')
    note('loss on the whole split at the end', best.last(r'val loss ([\d.]+) nats'), 'below 1.46')
    losses = [float(loss) for loss in re.findall(r'val loss ([\d.]+), perp', best.words)]
    note('lowest of the evaluations', min(losses), 'below 1.46')
    note('ms a step', best.step_ms())


def deterministic():
    """--deterministic: the same bits twice, and after a resume."""
    need_data(CHARS)
    count = length(60)
    common = [MAIN_JOB, '--deterministic', f'--lr_decay_iters={count}', '--log_interval=1',
              f'--eval_interval={count // 2}']
    whole = train('bits-whole', *common, f'--max_iters={count}')
    again = train('bits-again', *common, f'--max_iters={count}')
    note('twice: losses equal', whole.losses() == again.losses(), 'True')
    note('twice: weights equal to the bit', same_weights(whole, again), 'True')
    note('ms a step', whole.step_ms())
    train('bits-parts', *common, f'--max_iters={count // 2}')
    parts = train('bits-parts', *common, f'--max_iters={count}', '--init_from=resume')
    note('resumed: weights equal to the bit', same_weights(whole, parts), 'True')


def gpt2_batch(B):
    """Measure the training step of 124M at a batch, and where its time goes."""
    flags = ['--net=124M', f'--batch={B}', '--dtype=bfloat16', '--profile', '--runs=2']
    if small and B > 16:
        raise Skipped('the same as gpt2_16 with --small')
    if small:
        flags = ['--net=0.8M', '--batch=1', '--context=8', '--quick', '--dtype=float32',
                 '--profile', '--device=cpu', '--compile=False']
    out, _ = command('bench.py', 'train', *flags, '--json=-')
    row = loads(out)['rows'][0]
    note('tokens a second', row['tok_per_s'])
    note('ms a step', row['step_ms'])
    note('MFU', row.get('mfu', 'peak not known'), '0.45 on an H100, 0.50 where it can be had')
    note('share of the measured products', row['share_of_gemm'])
    note('MB', row['peak_memory_mb'])
    note('seconds of compiling', row['compile_s'])
    note('shares of the step', row['parts'])
    note('kinds of kernels', row['kinds'])


def gpt2_16():
    """124M at B=16."""
    gpt2_batch(16)


def gpt2_32():
    """124M at B=32."""
    gpt2_batch(32)


def gpt2_64():
    """124M at B=64."""
    gpt2_batch(64)


def fp16():
    """200 steps of 124M in fp16: steps that were skipped for an overflow."""
    need_gpu()
    need_data(BPE)
    run = train('fp16', *GPT2, '--dtype=float16', '--max_iters=200', '--eval_interval=200')
    note('steps skipped', run.last(r'skipped (\d+)'), 'a handful, at the beginning')
    note('loss scale at the end', run.last(r'loss scale ([\d.e+]+)'))
    note('loss of the last step', run.losses()[-1], 'below 7')
    note('ms a step', run.step_ms())


def muon():
    """The step of 124M with Muon."""
    flags = ['--net=124M', '--batch=32', '--dtype=bfloat16', '--profile', '--runs=2']
    if small:
        flags = ['--net=0.8M', '--batch=1', '--context=8', '--quick', '--dtype=float32',
                 '--device=cpu', '--compile=False', '--profile']
    out, _ = command('bench.py', 'train', *flags, '--optimizer=muon', '--json=-')
    row = loads(out)['rows'][0]
    note('tokens a second', row['tok_per_s'])
    note('MFU', row.get('mfu', 'peak not known'))
    note('MB', row['peak_memory_mb'])
    note('shares of the step', row['parts'])


def evaluation():
    """The main job's model, or a new one, evaluated in three precisions."""
    need_data(CHARS)
    folder = os.path.join(RUNS, 'main-whole')
    if not os.path.exists(os.path.join(folder, 'best.pt')):
        folder = train('evaluated', MAIN_JOB, f'--max_iters={length(100)}').folder
    for dtype in ('float32', 'bfloat16', 'float16'):
        if dtype == 'float16' and small:
            continue
        flags = [f'--out_dir={folder}', f'--dtype={dtype}', '--batch_size=64', '--compile=False',
                 '--json=-']
        if small:
            flags.append('--device=cpu')
        out, _ = command('evaluate.py', *flags)
        figures = loads(out)
        note(f'{dtype}: nats a token', figures['nats_per_token'], 'equal to 0.001')
        note(f'{dtype}: tokens a second', figures['tokens_per_s'])


def sampling():
    """Tokens a second of 124M at batch 1, 8 and 64, in bf16 and int8, beside transformers."""
    flags = ['--net=124M', '--context=16,900', '--tokens=100']
    ways = [['--batch=1', '--dtype=bfloat16,int8', '--peer=transformers'],
            ['--batch=1', '--dtype=bfloat16,int8', '--compile=True'],
            ['--batch=8,64', '--dtype=bfloat16,int8']]
    if small:
        flags = ['--net=0.8M', '--context=4', '--tokens=2', '--runs=1', '--device=cpu']
        ways = [['--batch=1,2', '--dtype=float32,int8', '--compile=False']]
    for way in ways:
        try:
            out, _ = command('bench.py', 'sample', *flags, *way, '--json=-')
        except RuntimeError as error:   # another way may work
            note(' '.join(way), str(error)[-500:])
            continue
        for row in loads(out)['rows']:
            who = f'{row["who"]} {row["precision"]}'
            if row['compiled']:
                who += ' compiled'
            aim = ''
            if row['who'] == 'ours' and row['batch'] == 1 and row['precision'] == 'bfloat16':
                aim = '1,500'
            note(f'{who}, batch {row["batch"]}, context {row["context"]}: tokens a second',
                 row['tok_per_s'], aim)
            if row['who'] == 'ours':
                note(f'{who}, batch {row["batch"]}, context {row["context"]}: first token, ms',
                     row['first_token_ms'])


def int8_products():
    """Three ways to multiply one vector by int8 weights, beside bf16: microseconds."""
    shapes = [(32, 16)] if small else [(2304, 768), (768, 3072), (50304, 768)]
    for rows, columns in shapes:
        time_int8(rows, columns, find_device())


def time_int8(rows, columns, device):
    """Note the microseconds of each way for matrices (rows, columns)."""
    import torch
    from torch.nn import functional as F
    # So many matrices take turns that they come from memory and not from the cache.
    copies = 2 if small else max(2, 2**28 // (rows * columns))
    weights = torch.randint(-127, 128, (copies, rows, columns), dtype=torch.int8, device=device)
    halves = weights.bfloat16()
    x = torch.randn(1, columns, device=device, dtype=torch.bfloat16)
    ones = torch.ones(rows, device=device, dtype=torch.bfloat16)
    ways = {
        'bf16': lambda i: F.linear(x, halves[i]),
        'int8 widened': lambda i: F.linear(x, weights[i].bfloat16()),
        "torch's int8 kernel": lambda i: torch._weight_int8pack_mm(x, weights[i], ones),
    }
    if not small:   # compiling takes seconds
        compiled = torch.compile(lambda w, x: (w.float() * x).sum(dim=1))
        ways['int8 compiled'] = lambda i: compiled(weights[i], x[0].float())
    for way, product in ways.items():
        figure = f'({rows}, {columns}), {way}: microseconds'
        try:
            work = recorded(lambda p=product: [p(i) for i in range(copies)], device)
            note(figure, seconds_of(work, device) / copies * 1e6)
        except Exception as error:   # the other ways are worth measuring all the same
            note(figure, f'{type(error).__name__}: {error}')


def recorded(work, device):
    """Return work as a CUDA graph, without the time of launches; on a CPU as it is."""
    from lib import runtime
    if device == 'cpu':
        return work
    for _ in range(2):
        runtime.aside(work)
    return runtime.captured(work)


def enwik8_memory():
    """Memory of 163M parameters on enwik8's head, with autocast and without."""
    need_data(BPE)
    for dtype in ('bfloat16', 'float32'):
        if small and dtype == 'bfloat16':
            continue
        run = train(f'enwik8-{dtype}', ENWIK8, '--gradient_accumulation_steps=2',
                    f'--max_iters={length(20)}', '--eval_iters=5', '--log_interval=1',
                    f'--dtype={dtype}', '--compile=False')
        note(f'{dtype}: MB', run.last(r'and ([\d,]+) MB'), 'below 16,000')
        note(f'{dtype}: ms a step', run.step_ms())


def two_ranks():
    """Two ranks on one GPU with gloo: the losses of one process."""
    need_data(CHARS)
    device = ['--device=cpu'] if small else ['--device=cuda:0']
    if not small:
        need_gpu()
    for optimizer in ('adamw', 'muon'):
        common = [MAIN_JOB, '--dropout=0', '--compile=False', '--gradient_accumulation_steps=2',
                  f'--optimizer={optimizer}', '--batch_size=16', '--log_interval=1',
                  f'--max_iters={length(20)}', '--eval_interval=1000']
        one = train(f'one-{optimizer}', *common, *device)
        two = train_on_two_ranks(f'two-{optimizer}', *common, *device, '--backend=gloo')
        note(f'{optimizer}: largest difference of losses', farthest(one, two), 'below 0.02')
        note(f'{optimizer}: ms a step, one process and two', [one.step_ms(), two.step_ms()])


def train_on_two_ranks(name, *flags):
    """Run train.py as two ranks, which find each other by torchrun's variables."""
    folder = os.path.join(RUNS, name)
    shutil.rmtree(folder, ignore_errors=True)
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in (0, 1):
        place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR='127.0.0.1',
                     MASTER_PORT=port)
        if sys.platform == 'linux':   # the machine's name may have no address
            place['GLOO_SOCKET_IFNAME'] = 'lo'
        environment = os.environ | {key: str(value) for key, value in place.items()}
        script, *words = training(folder, *flags)
        ranks.append(subprocess.Popen([sys.executable, os.path.join(ROOT, script), *words],
                                      env=environment, stdout=subprocess.PIPE,
                                      stderr=subprocess.STDOUT, text=True, errors='replace'))
    said = [rank.communicate()[0] for rank in ranks]
    print('\n'.join(said), flush=True)
    if any(rank.returncode for rank in ranks):
        codes = [rank.returncode for rank in ranks]
        raise RuntimeError(f'exit codes {codes} of two ranks\n{said[0][-1500:]}\n{said[1][-1500:]}')
    return read_run(folder, said[0])


def save_and_resume():
    """124M with its optimizer: seconds of a save, and a resumed run's losses."""
    need_data(BPE)
    common = [*GPT2, '--compile=False', '--deterministic']
    whole = train('save-whole', *common, '--max_iters=4', '--eval_interval=4')
    began = time.perf_counter()
    train('save-parts', *common, '--max_iters=2', '--eval_interval=2')
    note('seconds of a run of two steps with two saves', time.perf_counter() - began)
    size = os.path.getsize(os.path.join(RUNS, 'save-parts', 'last.pt'))
    note('MB of last.pt', size / 1e6)
    parts = train('save-parts', *common, '--max_iters=4', '--eval_interval=4',
                  '--init_from=resume')
    note('resumed: weights equal to the bit', same_weights(whole, parts), 'True')
    for name in ('save-whole', 'save-parts'):   # some GB
        shutil.rmtree(os.path.join(RUNS, name), ignore_errors=True)


def out_of_memory():
    """What a batch that is too large for the GPU says."""
    need_gpu()
    need_data(BPE)
    _, words = command(*training(os.path.join(RUNS, 'full'), *GPT2, '--batch_size=1024',
                                 '--compile=False', '--max_iters=2', '--eval_iters=1'), code=2)
    lines = [line for line in words.splitlines() if line.startswith('error: ')]
    note('the line', lines[-1], 'what is wrong, what is allowed, what to type')
    note('lines of traceback', words.count('Traceback'), '0')


@dataclass
class Step:
    """A step of the measurement."""
    work: Any       # a function above
    seconds: int    # after so many the step is killed


STEPS = [
    Step(machine, 60),
    Step(rates, 60),
    Step(data, 60),
    Step(gpu_tests, 200),
    Step(main_job, 240),
    Step(same_losses, 180),
    Step(main_whole, 180),
    Step(speedrun, 240),
    Step(deterministic, 180),
    Step(gpt2_16, 150),
    Step(gpt2_32, 150),
    Step(gpt2_64, 150),
    Step(fp16, 150),
    Step(muon, 180),
    Step(evaluation, 120),
    Step(sampling, 240),
    Step(int8_products, 90),
    Step(enwik8_memory, 120),
    Step(two_ranks, 150),
    Step(save_and_resume, 150),
    Step(out_of_memory, 90),
]


# ---- one step, in a process of its own -----------------------------------------------------------

def make_step(name):
    """Make the step of this name; exit with 0, with 3 where it was skipped, with 1 for an error."""
    step = next(step for step in STEPS if step.work.__name__ == name)
    try:
        step.work()
    except Skipped as why:
        note('skipped', str(why))
        sys.exit(3)
    except Exception:
        note('error', traceback.format_exc()[-6000:])
        sys.exit(1)


def start_step(step, seconds, results):
    """Make a step in a process of its own; write what became of it into results.

    After so many seconds the process and all that it has started are killed."""
    name = step.work.__name__
    for path in (part_file(name), log_file(name), said_file(name)):
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
    began = time.monotonic()
    with open(log_file(name), 'w', encoding='utf-8') as log:
        words = [sys.executable, os.path.abspath(__file__), f'--child={name}', f'--to={to}',
                 f'--source={source}', f'--small={small}']
        process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT,
                                   env=step_environment(), start_new_session=True)
        status = 'cut off'   # stays where this process is ended
        try:
            while time.monotonic() - began < seconds and status == 'cut off':
                left = seconds - (time.monotonic() - began)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = process.wait(min(5, max(0, left)))
                    status = {0: 'done', 3: 'skipped'}.get(code, f'failed, exit code {code}')
                results[name] = outcome(name, status, began)
                write_results(results)
            if status == 'cut off':
                status = f'killed after {seconds:.0f} s'
        finally:   # what the step has started may live on after it
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)
            results[name] = outcome(name, status, began)
            write_results(results)


def outcome(name, status, began):
    """Return what is known of a step by now, as a dict. began: time at which it was started."""
    return dict(status=status, seconds=time.monotonic() - began, figures=read_part(name))


def step_environment():
    """Return the environment of a step, in which tiktoken has GPT-2's merges in data/."""
    environment = dict(os.environ)
    environment.setdefault('TIKTOKEN_CACHE_DIR', os.path.abspath('data/tiktoken'))
    return environment


def read_part(name):
    """Return the figures that a step has noted so far, as a list of dicts."""
    lines = ['']
    if os.path.exists(part_file(name)):
        with open(part_file(name), encoding='utf-8') as f:
            lines = f.read().split('\n')
    rows = [loads(line) for line in lines[:-1]]   # the last line may be cut off
    if os.path.exists(said_file(name)):   # the command runs, or was killed with the step
        with open(said_file(name), encoding='utf-8', errors='replace') as f:
            rows.append(dict(figure='last words of the command', value=f.read()[-3000:], aim=''))
    return rows


# ---- the results ---------------------------------------------------------------------------------

def read_results():
    """Return the results of earlier runs, {step: outcome}."""
    path = os.path.join(to, 'measured.json')
    if not os.path.exists(path):
        return {}
    with open(path, encoding='utf-8') as f:
        return loads(f.read())


def write_results(results):
    """Write measured.json, measured.md and measured.log, each whole or not at all."""
    log = ''
    for name in results:
        if os.path.exists(log_file(name)):
            with open(log_file(name), encoding='utf-8', errors='replace') as f:
                log += f'==== {name}\n{f.read()[-200_000:]}\n'
    texts = {'measured.json': dumps(results, indent=1) + '\n', 'measured.md': table(results),
             'measured.log': log}
    for name, text in texts.items():
        path = os.path.join(to, name)
        with open(path + '.part', 'w', encoding='utf-8') as f:
            f.write(text)
        os.replace(path + '.part', path)


def table(results):
    """Return the results as a Markdown table."""
    lines = ['| step | figure | measured | aim |', '|---|---|---|---|']
    for name, outcome in results.items():
        lines.append(f'| **{name}** | {outcome["status"]} | {outcome["seconds"]:.0f} s | |')
        for row in outcome['figures']:
            value = shown(row['value'])
            lines.append(f'| {name} | {row["figure"]} | {value} | {row["aim"]} |')
    return '\n'.join(lines) + '\n'


def shown(value):
    """Return a figure as a cell of the table."""
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, float):
        return f'{value:,.0f}' if abs(value) >= 1000 else f'{value:.4g}'
    if isinstance(value, dict):
        return ', '.join(f'{key} {shown(part)}' for key, part in value.items())
    if isinstance(value, list):
        return ', '.join(shown(part) for part in value)
    last_line = (str(value).strip().splitlines() or [''])[-1]
    return last_line[:200].replace('|', '\\|')


# ---- the story -----------------------------------------------------------------------------------

def chosen_steps(results):
    """Return the steps to make: those that were typed, or else all that are not done."""
    names = [step.work.__name__ for step in STEPS]
    typed = [name.strip() for name in steps.split(',') if name.strip()]
    for name in typed:
        if name not in names:
            fail(f'steps={name}: there is no such step; allowed are {", ".join(names)}; '
                 f'type --steps={names[0]}')
    if typed:
        return [step for step in STEPS if step.work.__name__ in typed]
    undone = []
    for step in STEPS:
        if results.get(step.work.__name__, {}).get('status') != 'done':
            undone.append(step)
    return undone


check(knobs, minutes=0)
exit_on_signals()
os.makedirs(RUNS, exist_ok=True)
os.makedirs(to, exist_ok=True)
if child:
    make_step(child)
    sys.exit()
results = read_results()
ends = time.monotonic() + 60 * minutes
for step in chosen_steps(results):
    name = step.work.__name__
    left = ends - time.monotonic()
    if left < step.seconds / 2:   # it might be cut off
        say(f'{name}: not begun, as {left:.0f} s are left; type the command again to go on')
        continue
    start_step(step, min(step.seconds, left), results)
    say(f'{name}: {results[name]["status"]}, {results[name]["seconds"]:.0f} s')
    for row in results[name]['figures']:
        say(f'    {row["figure"]}: {shown(row["value"])}')
say(f'the table is {os.path.join(to, "measured.md")}')
