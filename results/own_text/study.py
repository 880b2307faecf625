"""
Which net suits a text and a time? The study behind the table in config/train_text.py.

    python results/own_text/study.py --texts=FOLDER --plan       # what would be run, in minutes
    python results/own_text/study.py --texts=FOLDER              # run it, and write the tables
    python results/own_text/study.py --texts=FOLDER --minutes=1 --sizes=small,medium
    python results/own_text/study.py --report                    # the tables from runs.csv alone

Run it on a quiet machine. FOLDER holds tinyshakespeare.txt, and enwik8_head.gz, the head of
Wikipedia's dump. It also holds two texts from Debian's packages linux-doc-6.1 and bible-kjv, the
documentation of the Linux kernel and the King James Bible:

    find /usr/share/doc/linux-doc-6.1 -name '*.rst.gz' -not -path '*translations*' |
        LC_ALL=C sort | xargs zcat | head -c 20000000 > FOLDER/kernel.txt
    COLUMNS=80 bible gen1:1-rev22:21 > FOLDER/kjv.txt

The net was chosen on texts of 50 kB, 1 MB and 20 MB, and then tried on enwik8 and the Bible.

A choice is a row of the config's table: the run takes config/train_text.py with that row alone. So
all else is what a user gets. Each finished run is a line of runs.csv beside this script, and is not
run again. README.md gets its tables from these lines.
"""
import csv
import gzip
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from lib.configurator import check, configure  # noqa: E402
from lib.console import fail, tell, write  # noqa: E402
from lib.data import extent_of  # noqa: E402

texts = ''                       # folder of the texts named above
minutes = ''                     # run only these of 1, 10 and 60, with commas between; '': 1,10
sizes = ''                       # run only these of small, medium, large, enwik8, bible; '': all
seed = 1                         # seed of every run
speed = 1.0                      # minutes that a minute of the study takes; less to try the script
plan = False                     # print what would be run, with its minutes, and run nothing
report = False                   # write the tables and run nothing
results = str(Path(__file__).parent)   # folder of runs.csv and README.md
work = 'out-own-text'            # folder of the datasets and of one run's files
knobs, given = configure(globals(), configs=False)

CONFIG = ROOT / 'config/train_text.py'
MAIN_JOB = 'main job'
CHOSEN = 'train_text.py'   # the config as it is
OVERHEAD = 0.4             # minutes of a run for start and evaluations

# ---- what is compared ----------------------------------------------------------------------------
# A choice is n_layer, n_embd, context, batch_size, dropout and passes, as in the config's table, or
# these and further flags. The first choice of a text and a time is what the config's table had
# before the study. For 1 MB that is the best of results/speed.md.
CHOICES = {
    ('small', 1): (
        (4, 128, 128, 8, 0.2, 15),
        (4, 128, 128, 8, 0.3, 30),
        (3, 128, 64, 8, 0.1, 10),
        ((4, 128, 128, 8, 0.2, 15), '--weight_decay=0.1'),
        MAIN_JOB),
    ('medium', 1): (
        (4, 128, 128, 16, 0.0, 20),
        (3, 192, 128, 16, 0.0, 20),
        (4, 128, 256, 8, 0.0, 20),
        MAIN_JOB),
    ('large', 1): (
        (4, 128, 128, 16, 0.0, 20),
        (3, 192, 128, 16, 0.0, 20),
        (2, 256, 64, 32, 0.0, 20),
        MAIN_JOB),
    ('small', 10): (
        (4, 128, 128, 8, 0.3, 40),
        (4, 256, 128, 8, 0.3, 15)),
    ('medium', 10): (
        (4, 256, 256, 16, 0.1, 20),
        (4, 256, 256, 16, 0.0, 20)),
    ('large', 10): (
        (4, 256, 256, 16, 0.0, 20),
        (6, 256, 256, 8, 0.0, 20)),
    ('medium', 60): (
        (6, 384, 256, 16, 0.2, 20),
        (4, 256, 256, 16, 0.2, 40)),
    ('large', 60): (
        (6, 384, 256, 16, 0.0, 20),
        (6, 256, 256, 16, 0.0, 20)),
    # texts on which nothing was chosen
    ('enwik8', 1): (CHOSEN, MAIN_JOB),
    ('bible', 1): (CHOSEN, MAIN_JOB),
    ('bible', 10): (CHOSEN, MAIN_JOB),
}
BY_HAND = 60   # minutes of a column that is run only where --minutes names it
DESCRIBED = {
    'small': 'the first 50,000 characters of Tiny Shakespeare',
    'medium': 'Tiny Shakespeare, 1.1 MB',
    'large': 'the documentation of the Linux kernel, 20 MB, as bytes',
    'enwik8': 'Wikipedia, the first 4.2 MB of enwik8, as bytes',
    'bible': 'the King James Bible, 4.3 MB',
}


# ---- the texts -----------------------------------------------------------------------------------

def text_of(size):
    """Return the text of a size; fail where its file is missing."""
    try:
        if size == 'bible':
            return (Path(texts) / 'kjv.txt').read_text(encoding='utf-8')
        if size == 'large':   # the last character may be cut
            return (Path(texts) / 'kernel.txt').read_text(encoding='utf-8', errors='ignore')
        if size == 'enwik8':
            head = gzip.decompress((Path(texts) / 'enwik8_head.gz').read_bytes())
            return head.decode('utf-8', 'ignore')
        whole = (Path(texts) / 'tinyshakespeare.txt').read_text(encoding='utf-8')
        return whole[:50_000] if size == 'small' else whole
    except OSError as error:
        fail(f'the text {size} cannot be read: {error}; type --texts=FOLDER for the folder that '
             f'holds it, or --sizes= with the others')


def prepare(size):
    """Make the dataset of a text where it is missing."""
    if extent_of(size, f'{work}/data').tokens:
        return
    os.makedirs(work, exist_ok=True)
    path = f'{work}/{size}.txt'
    Path(path).write_text(text_of(size), encoding='utf-8', newline='')
    tokenizer = 'byte' if size in ('large', 'enwik8') else 'char'
    run_script('prepare_text.py', f'--input={path}', f'--name={size}', f'--tokenizer={tokenizer}',
               f'--data_dir={work}/data')


# ---- one run -------------------------------------------------------------------------------------

@dataclass
class Run:
    """A run of train.py, a line of runs.csv."""
    text: str
    minutes: float
    choice: str           # in words
    seed: int
    val_loss: float       # at the end, nats per character or byte of the whole validation split
    # the lowest loss of all evaluations, on 20 batches: after too many passes it is below val_loss
    lowest: float
    steps: int
    passes: float         # through the training text
    seconds: float        # seconds of training
    parameters: int

    def key(self):
        return self.text, float(self.minutes), self.choice, int(self.seed)


def in_words(choice):
    """Return a choice as the tables name it."""
    if isinstance(choice, str):
        return choice
    if isinstance(choice[0], tuple):
        row, flags = choice
        return f'{in_words(row)}, {flags}'
    n_layer, n_embd, context, batch_size, dropout, passes = choice
    return (f'{n_layer} × {n_embd}, context {context}, batch {batch_size}, dropout {dropout}, '
            f'at most {passes} passes')


def with_one_row(choice):
    """Return config/train_text.py, as text, with one choice for its whole table."""
    text = CONFIG.read_text(encoding='utf-8')
    row = ', '.join(map(str, ('_ANY', '_ANY', *choice)))
    changed, count = re.subn(r'^_TABLE = \(\n.*?^\)$', f'_TABLE = (({row}),)', text,
                             flags=re.S | re.M)
    assert count == 1, 'the config has a table'
    return changed


def flags_of(size, column, choice):
    """Return the words with which train.py runs a choice."""
    flags = [f'--dataset={size}', f'--data_dir={work}/data', f'--out_dir={work}/run',
             f'--max_minutes={column * speed}', f'--seed={seed}', '--sample_interval=0']
    if choice == MAIN_JOB:
        # it makes some 900 steps a minute on two cores
        return ['config/train_shakespeare_char.py', f'--max_iters={int(1000 * column)}', *flags]
    if choice == CHOSEN:
        return ['config/train_text.py', *flags]
    if isinstance(choice[0], tuple):
        choice, more = choice
        flags += more.split()
    config = f'{work}/choice.py'
    Path(config).write_text(with_one_row(choice), encoding='utf-8')
    return [config, *flags]


def run_script(script, *words):
    """Run a script, and return what it said; fail where it fails."""
    done = subprocess.run([sys.executable, str(ROOT / script), *words], capture_output=True,
                          text=True)
    if done.returncode:
        fail(f'{script} {" ".join(words)} ended with {done.returncode}: '
             f'{done.stderr[-300:]}; the runs before it are kept: type the same command again')
    return done.stderr


def train(size, column, choice):
    """Train one choice on a text; return its Run."""
    shutil.rmtree(f'{work}/run', ignore_errors=True)
    said = run_script('train.py', *flags_of(size, column, choice))
    parameters = int(re.search(r'([\d,]+) parameters', said)[1].replace(',', ''))
    with open(f'{work}/run/log.csv', newline='', encoding='utf-8') as f:
        rows = list(csv.DictReader(f))
    losses = [float(row['val_loss']) for row in rows if row['val_loss']]
    last = rows[-1]
    passes = int(last['tokens']) / extent_of(size, f'{work}/data').tokens
    return Run(size, column, in_words(choice), seed, round(losses[-1], 4), round(min(losses), 4),
               int(last['iter']), round(passes, 2), round(float(last['seconds']), 1), parameters)


# ---- all runs ------------------------------------------------------------------------------------

def runs_path():
    return Path(results) / 'runs.csv'


def finished():
    """Return the runs in runs.csv."""
    if not runs_path().exists():
        return []
    with open(runs_path(), newline='', encoding='utf-8') as f:
        return [Run(**row) for row in csv.DictReader(f)]


def add(run):
    """Write a run behind the others in runs.csv."""
    new = not runs_path().exists()
    with open(runs_path(), 'a', newline='', encoding='utf-8') as f:
        writer = csv.DictWriter(f, list(vars(run)))
        if new:
            writer.writeheader()
        writer.writerow(vars(run))


def wanted():
    """Return [(text, minutes, choice)] of the runs asked for that are not finished."""
    columns = [float(word) for word in minutes.split(',') if word]
    known = {run.key() for run in finished()}
    found = []
    for (size, column), choices in CHOICES.items():
        if sizes and size not in sizes.split(','):
            continue
        if columns and column not in columns or not columns and column == BY_HAND:
            continue
        for choice in choices:
            if (size, float(column), in_words(choice), seed) not in known:
                found.append((size, column, choice))
    return found


def check_words():
    """Fail for a text or a number of minutes that the study does not have."""
    check(knobs, seed=0)
    if speed <= 0:
        fail(f'speed={speed}: allowed are numbers above 0; type --speed=1')
    if speed != 1 and 'results' not in given:
        fail(f'speed={speed}: a trial run must not count as a run of the study; '
             f'type --results=FOLDER with a copy of README.md')
    all_sizes = list(dict.fromkeys(size for size, _ in CHOICES))
    for size in filter(None, sizes.split(',')):
        if size not in all_sizes:
            fail(f'sizes={sizes}: there is no text {size}; allowed are {", ".join(all_sizes)}; '
                 f'type --sizes=small')
    all_columns = sorted({str(column) for _, column in CHOICES}, key=int)
    for column in filter(None, minutes.split(',')):
        if column not in all_columns:
            fail(f'minutes={minutes}: there is no column {column}; '
                 f'allowed are {", ".join(all_columns)}; type --minutes=1')


# ---- the tables ----------------------------------------------------------------------------------

def tables(runs):
    """Return the tables of all runs, one a text."""
    lines = []
    for size, described in DESCRIBED.items():
        here = [run for run in runs if run.text == size]
        if not here:
            continue
        lines += [f'### {described[0].upper()}{described[1:]}', '',
                  '| minutes | choice | loss at the end | lowest on the way | passes | steps | '
                  'training, s | parameters |', '|---|---|---|---|---|---|---|---|']
        for column in sorted({float(run.minutes) for run in here}):
            cell = [run for run in here if float(run.minutes) == column]
            cell.sort(key=lambda run: float(run.val_loss))
            for run in cell:
                lines.append(row_of(run, best=run is cell[0]))
        lines.append('')
    return '\n'.join(lines)


def row_of(run, best):
    """Return a run as a line of its table. The lowest loss of a column is in bold."""
    loss = f'{float(run.val_loss):.4f}'
    if best:
        loss = f'**{loss}**'
    return (f'| {float(run.minutes):g} | {run.choice} | {loss} | {float(run.lowest):.4f} | '
            f'{float(run.passes):g} | {int(run.steps):,} | {float(run.seconds):.0f} | '
            f'{int(run.parameters):,} |')


BEGIN = '<!-- tables by study.py -->'
END = '<!-- end of the tables -->'


def write_tables():
    """Put the tables into README.md, between its marks."""
    path = Path(results) / 'README.md'
    page = path.read_text(encoding='utf-8')
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f'{before}{BEGIN}\n\n{tables(finished())}\n{END}{after}', encoding='utf-8')


# ---- the story -----------------------------------------------------------------------------------

check_words()
todo = wanted()
if plan:
    for size, column, choice in todo:
        write(f'{column:3} min  {size:7}  {in_words(choice)}\n')
    total = sum(column * speed + OVERHEAD for _, column, _ in todo)
    write(f'runs: {len(todo)}, together at most {total:.0f} minutes\n')
    sys.exit(0)
if not report:
    for size, _, _ in todo:   # a missing text is named before the first run
        prepare(size)
    for size, column, choice in todo:
        started = time.perf_counter()
        run = train(size, column, choice)
        add(run)
        tell(f'{size}, {column} min, {run.choice}: {run.val_loss:.4f} after {run.steps:,} steps; '
             f'{time.perf_counter() - started:.0f} s in all')
if finished():
    write_tables()
