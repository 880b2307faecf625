"""
A run's folder: made, locked, given its log, and cleared of an earlier run's files.

log.csv has one row for each logged step. The columns are RunLog.columns.
"""
import contextlib
import csv
import itertools
import json
import os
import platform
import re
import shlex

import numpy
import torch

from lib import runtime
from lib.console import fail, say

# the files that a run writes into its folder; only a run that has begun has one of the first three
OWN = ('best.pt', 'last.previous.pt', 'last.pt', 'log.csv', 'loss.png', 'config.json')


def flag(out_dir):
    """Return the flag by which a command finds out_dir, '' for the default."""
    return '' if out_dir == 'out' else f' --out_dir={shlex.quote(out_dir)}'


def open_folder(out_dir, rank):
    """Make a run's folder. Fail now for what would fail at the first save."""
    try:
        os.makedirs(out_dir, exist_ok=True)
        for name in OWN:
            if os.path.isdir(os.path.join(out_dir, name)):
                raise IsADirectoryError(0, f'{name} is a folder')
        with open(os.path.join(out_dir, f'.{rank}.part'), 'w', encoding='utf-8') as f:
            os.remove(f.name)
    except OSError as error:
        fail(f'out_dir={out_dir} cannot be written ({error.strerror}); '
             f'make it writable, or type --out_dir=FOLDER for a new run elsewhere')


def set_aside(out_dir):
    """Move the files of an earlier run to out_dir/earlier-N/.

    A command that is typed again by mistake must not cost the earlier run."""
    paths = [os.path.join(out_dir, name) for name in OWN]
    if not any(os.path.lexists(path) for path in paths[:3]):
        return
    numbered = (os.path.join(out_dir, f'earlier-{n}') for n in itertools.count(1))
    earlier = next(path for path in numbered if not os.path.exists(path))
    say(f'{out_dir} holds an earlier run: moved to {earlier}; '
        f'--init_from=resume would have gone on with it')
    os.makedirs(earlier)
    for path in paths:
        if os.path.lexists(path):
            os.replace(path, os.path.join(earlier, os.path.basename(path)))


def set_best_aside(out_dir):
    """Rename best.pt, whose loss is that of another text; return its new name, '' without one."""
    path = os.path.join(out_dir, 'best.pt')
    if not os.path.exists(path):
        return ''
    numbered = (os.path.join(out_dir, f'best-earlier-{n}.pt') for n in itertools.count(1))
    name = next(path for path in numbered if not os.path.exists(path))
    os.replace(path, name)
    return name


class RunLog:
    """A run's log.csv, and the trackers that get its rows too.

    Only rank 0 begins it. On other ranks `row` does nothing."""
    # {name: format} in the order of log.csv; docs/files.md says what changes with a new one
    columns = dict(iter='d', tokens='d', train_loss='.6f', val_loss='.6f', lr='.6g',
                   grad_norm='.6g', tok_per_s='.0f', seconds='.3f')

    def __init__(self, out_dir):
        self.out_dir = out_dir
        self.path = os.path.join(out_dir, 'log.csv')
        self.lock = None   # an open file, once the log has begun
        self.trackers = []

    def begin(self, step, knobs, facts):
        """Lock the run's folder, write config.json and begin log.csv.

        step: the step that the run is resumed at; the log keeps the rows before it. For None, a new
        run, the files of an earlier run are moved aside. config.json gets the knobs, the facts,
        the versions and the machine. Fail where the folder is taken or cannot be written."""
        try:
            self.trackers = trackers(knobs)
            self.lock = runtime.lock(self.out_dir)   # as long as this process lives
            versions = dict(python=platform.python_version(), torch=torch.__version__,
                            numpy=numpy.__version__)
            config = knobs | facts | dict(versions=versions, machine=platform.platform())
            path = os.path.join(self.out_dir, 'config.json')
            with open(path + '.part', 'w', encoding='utf-8') as f:   # fails first on a full disk
                json.dump(config, f, indent=1)
            if step is None:
                set_aside(self.out_dir)
            os.replace(path + '.part', path)
            before = []
            if step is not None:
                before = [row for row in read_log(self.path) if int(row['iter']) < step]
            with open(self.path + '.part', 'w', newline='', encoding='utf-8') as f:
                # a column that only another version has is dropped
                writer = csv.DictWriter(f, self.columns, extrasaction='ignore')
                writer.writeheader()
                writer.writerows(before)
            os.replace(self.path + '.part', self.path)
        except OSError as error:
            for name in ('config.json.part', 'log.csv.part', '.lock'):
                with contextlib.suppress(OSError):
                    os.remove(os.path.join(self.out_dir, name))
            fail(f'{self.out_dir} cannot be written ({error.strerror}); make room, '
                 f'or type --out_dir=FOLDER for another place')

    def row(self, **values):
        """Append one row. values: named in `columns`; one that is missing or None stays empty."""
        if not self.lock:
            return
        row = {}
        for key, value in values.items():
            if value is not None:
                row[key] = format(value, self.columns[key])
        try:
            with open(self.path, 'a', newline='', encoding='utf-8') as f:
                csv.DictWriter(f, self.columns).writerow(row)
        except OSError as error:
            say(f'iter {row["iter"]}: {self.path} could not be written ({error.strerror})')
        for send in self.trackers:
            send({key: float(value) for key, value in row.items()}, int(row['iter']))

    def end(self):
        """Unlock the run's folder."""
        if self.lock:
            self.lock.close()
            os.remove(self.lock.name)


def read_log(path):
    """Return the whole rows of a log.csv, as dicts of text; none for a file that is not there.

    A machine that failed, or an editor, may have left others."""
    rows = []
    with (contextlib.suppress(FileNotFoundError, csv.Error),
          open(path, newline='', encoding='utf-8', errors='replace') as f):
        for row in csv.DictReader(f):
            if None not in row.values() and re.fullmatch('[0-9]{1,15}', row.get('iter') or ''):
                rows.append(row)
    return rows


def trackers(knobs):
    """Return functions of (row, step) that send a logged row to where the knobs say.

    Fail where a tracker's package, which is optional, is missing."""
    found = []
    if knobs['wandb_log']:
        try:
            import wandb
        except ImportError:
            fail('wandb_log needs the package wandb; '
                 'type pip install wandb, or --wandb_log=False')
        wandb.init(project=knobs['wandb_project'], name=knobs['wandb_run_name'], config=knobs)
        found.append(lambda row, step: wandb.log(row, step=step))
    if knobs['tensorboard_log']:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            fail('tensorboard_log needs the package tensorboard; '
                 'type pip install tensorboard, or --tensorboard_log=False')
        board = SummaryWriter(os.path.join(knobs['out_dir'], 'tensorboard'))

        def send(row, step):
            for key, value in row.items():
                board.add_scalar(key, value, step)
        found.append(send)
    return found
