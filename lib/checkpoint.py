"""
Checkpoints: one file that stands alone, written whole or not at all, and verified when it is read.

A checkpoint holds tensors and plain types only, so reading it never runs code. Where nanoGPT has a
key, its name is used:
    model           weights, under Hugging Face's GPT-2 names
    model_args      GPTConfig as a dict
    tokenizer       the tokenizer's state
    optimizer       a list of state dicts
    scaler          fp16's loss scale
    iter_num        optimizer steps made
    best_val_loss   lowest validation loss of the run, nats per token
    val_loss        this step's validation loss, None where the step had no evaluation
    seconds         training time
    skipped         steps that fp16's overflows skipped
    config          the knobs
    format          1; nanoGPT's checkpoints have no such key

The file is what torch.save writes, a zip. The zip's comment is the seal: it holds the SHA-256 of
everything before it.

Also here: a run's folder and its log, and the model that a run or a script starts from.
"""
import contextlib
import csv
import glob
import hashlib
import itertools
import json
import math
import os
import pickle
import platform
import re
import shlex
import warnings
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches

import numpy
import torch

from lib import runtime
from lib.configurator import checked
from lib.console import fail, say
from lib.data import Dataset, find_dataset, first_with
from lib.tokenizers import load_tokenizer, make_tokenizer, read_hf_tokenizer
from model import GPT, GPTConfig, fetch_pretrained, read_hf_config

SEAL = b'sha256:'            # what the zip's comment begins with; 64 hexadecimal digits follow
SEAL_SIZE = len(SEAL) + 64   # bytes
# the files that a run writes into its folder; only a run that has begun has one of the first three
OWN = ('best.pt', 'last.previous.pt', 'last.pt', 'log.csv', 'loss.png', 'config.json')
# settings that matter only during training
TRAINING = ('dropout', 'flash', 'label_smoothing', 'layer_drop', 'grad_checkpointing')
# Knobs that a resumed run does not restore: they are tied to this machine or to the command typed.
# Restoring `prepare` would let a checkpoint run a command.
MACHINE = ('init_from', 'out_dir', 'eval_only', 'backend', 'device', 'prepare')
# what resuming needs of a checkpoint besides the model, and the types allowed
RESUMED = dict(iter_num=int, best_val_loss=(float, int), optimizer=(list, dict), config=dict,
               seconds=(float, int), skipped=int)
# names of models on Hugging Face's hub that have no owner in front
HUB_NAMES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', 'distilgpt2')


class Damaged(Exception):
    """A file is not a whole checkpoint. The message is to be read behind the file's path."""


class Unreadable(Damaged):
    """The system does not let us read a file. The file may be sound."""


# ---- writing a checkpoint ------------------------------------------------------------------------

def keep(path, checkpoint):
    """Save a checkpoint of a run; return whether that worked.

    A full disk costs this save, not the run. The last.pt before this one becomes
    last.previous.pt."""
    folder, name = os.path.split(path)
    previous = None
    if name == 'last.pt':
        previous = os.path.join(folder, 'last.previous.pt')
    try:
        save(path, checkpoint, previous)
    except OSError as error:
        message = f'iter {checkpoint["iter_num"]}: {path} could not be written ({error.strerror})'
        if os.path.exists(path):
            message += '; the older checkpoint is as it was'
        say(message)
        return False
    return True


def save(path, checkpoint, previous=None):
    """Write a checkpoint beside the old file, seal it, flush it to the disk, and rename it.

    Whatever happens, path is the old file or the new one, and whole. previous: a second name that
    the old file is given. Raises OSError when the disk is full or read-only."""
    part = path + '.part'
    try:
        with open(part, 'w+b') as f:
            sink = _Sink(f)
            torch.save(checkpoint, sink)
            if sink.error:
                raise sink.error
            _seal(f)
            f.flush()
            os.fsync(f.fileno())
        if previous and os.path.exists(path):
            _link(path, previous)
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.remove(part)
    sync_folder(os.path.dirname(path) or '.')   # the rename itself must reach the disk too


class _Sink:
    """A file for torch.save that notes its first error, for save to raise.

    An error that is raised inside torch's writer ends the process."""

    def __init__(self, file):
        self.file = file
        self.error = None

    def write(self, data):
        try:
            if self.error is None:
                self.file.write(data)
        except OSError as error:
            self.error = error
        return len(data)

    def flush(self):
        pass


def _seal(file):
    """Append the seal to a file that torch.save has written."""
    file.seek(-2, os.SEEK_END)   # a zip ends with the length of its comment
    file.write(SEAL_SIZE.to_bytes(2, 'little'))
    seal = SEAL + _digest(file, file.tell())
    file.seek(0, os.SEEK_END)
    file.write(seal)


def _digest(file, size):
    """Return the SHA-256 of a file's first `size` bytes, as hexadecimal digits."""
    digest = hashlib.sha256()
    file.seek(0)
    while size > 0:
        chunk = file.read(min(size, 1 << 22))
        if not chunk:
            break
        digest.update(chunk)
        size -= len(chunk)
    return digest.hexdigest().encode()


def _link(path, name):
    """Give a file a second name, and take that name from the file that had it.

    Where the file system has links, path exists at every instant. Elsewhere it is renamed."""
    try:
        if os.path.exists(name + '.part'):
            os.remove(name + '.part')
        os.link(path, name + '.part')
        os.replace(name + '.part', name)
    except OSError:
        os.replace(path, name)


def sync_folder(folder):
    """Flush a folder's list of names to the disk.

    Do nothing where folders cannot be opened, as on Windows. Raises OSError when the disk
    refuses."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- reading a checkpoint ------------------------------------------------------------------------

def find(out_dir, checkpoint='', names=('best.pt', 'last.pt', 'ckpt.pt')):
    """Return the path of the checkpoint to use: the file named, or the first of names in out_dir.

    ckpt.pt is nanoGPT's. Fail where there is no such file."""
    paths = [os.path.join(out_dir, name) for name in names]
    if checkpoint:
        paths = [checkpoint]
    for path in paths:
        if os.path.isfile(path):
            return path
    fail(f'no checkpoint at {" or ".join(paths)}: train one first '
         f'(python train.py config/train_shakespeare_char.py), '
         f'or type --out_dir=FOLDER or --checkpoint=FILE')


def load(path):
    """Return the checkpoint in a file, on the CPU.

    Fail for a file that is damaged, and for one that neither this project nor nanoGPT wrote."""
    try:
        return read(path)
    except Damaged as error:
        advice = '--checkpoint=FILE or --out_dir=FOLDER for another'
        last = os.path.join(os.path.dirname(path), 'last.pt')
        if path != last and os.path.isfile(last):
            advice = f'--checkpoint={shlex.quote(last)}'
        fail(f'{path} {error}; type {advice}')


def read(path):
    """Return the checkpoint in a file, on the CPU. Raises Damaged for a file that load refuses."""
    try:
        sealed = _verify_seal(path)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')   # about a foreign pickle protocol: an error follows
            loaded = torch.load(path, map_location='cpu', weights_only=True)
    except Damaged:
        raise
    except PermissionError as error:
        raise Unreadable(f'cannot be read ({error.strerror})') from None
    except Exception as error:   # a damaged file can make its reader raise anything
        raise Damaged(f'cannot be read as a checkpoint: it is damaged, or neither this project '
                      f'nor nanoGPT wrote it ({_in_short(error)})') from None
    if not isinstance(loaded, dict):
        loaded = {}
    if not all(isinstance(loaded.get(key), dict) for key in ('model', 'model_args')):
        raise Damaged('is not a checkpoint of this project: it lacks model or model_args')
    if 'format' in loaded and not sealed:   # this project's have both, nanoGPT's neither
        raise Damaged('is damaged: its checksum is gone')
    if 'format' not in loaded:
        # nanoGPT's nn.GELU() is the exact form
        loaded['model_args'].setdefault('activation', 'gelu_erf')
    return loaded


def _verify_seal(path):
    """Return whether a file has a seal. Raises Damaged for a seal that does not match the file."""
    with open(path, 'rb') as f:
        size = f.seek(0, os.SEEK_END)
        f.seek(max(0, size - SEAL_SIZE))
        seal = f.read()
        if not seal.startswith(SEAL):
            return False
        if seal != SEAL + _digest(f, size - SEAL_SIZE):
            raise Damaged('is damaged: its content does not match its checksum')
    return True


def _in_short(error):
    """Return the kind of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    if isinstance(error, pickle.UnpicklingError):   # torch's message is about weights_only
        lines = ['it holds more than tensors and plain values, and nothing in it is run']
    kind = type(error).__name__
    return f'{kind}: {lines[0][:120]}' if lines else kind


def build_model(loaded, path, **overrides):
    """Return the GPT of a checkpoint, on the CPU.

    overrides: fields of GPTConfig, such as dropout. Fail where the checkpoint does not fit this
    version of GPT. path: the checkpoint's file."""
    another = 'type --checkpoint=FILE for another'
    kinds = {field.name: type(field.default) for field in fields(GPTConfig)}
    args = {**loaded['model_args'], **overrides}
    for name, value in args.items():
        if name not in kinds:
            fail(f'{path}: its model has an unknown setting, {name!r}, so it was made by another '
                 f'version or project; {another}')
        kind = kinds[name]
        whole_number = kind is float and type(value) is int
        if type(value) is not kind and not whole_number:
            fail(f'{path}: {name}={value!r} in its model_args must be of type {kind.__name__}; '
                 f'{another}')
    weights = {}
    for name, weight in loaded['model'].items():
        # nanoGPT without flash attention saves its causal masks
        if not str(name).endswith('.attn.bias'):
            # DDP and torch.compile put these in front of the names
            name = str(name).removeprefix('module.').removeprefix('_orig_mod.')
            weights[name] = weight
    try:
        return GPT.with_weights(GPTConfig(**args), weights)
    except (ValueError, TypeError, RuntimeError, OverflowError, MemoryError) as error:
        fail(f'{path}: its weights do not fit its model_args ({str(error)[:300]}); {another}')


def load_last(out_dir):
    """Return (checkpoint, path) of the run to resume.

    The checkpoint is last.pt, the one before it where last.pt is missing or damaged, or else
    nanoGPT's ckpt.pt. Say so where it is the one before. Fail where none can be resumed."""
    other = 'type --out_dir=FOLDER for the run to resume, or --init_from=scratch for a new one'
    loaded = None
    reasons = []   # why not the checkpoints before this one
    for name in ('last.pt', 'last.previous.pt', 'ckpt.pt'):
        path = os.path.join(out_dir, name)
        if os.path.isfile(path):
            try:
                loaded = read(path)
                break
            except Unreadable as error:   # resuming from an older one would replace it
                fail(f'{path} {error}; make it readable, or {other}')
            except Damaged as error:
                reasons.append(f'{path} {error}')
        elif name == 'last.pt':
            reasons.append(f'{path} is not there')
    if loaded is None:
        fail(f'no checkpoint to resume: {"; ".join(reasons)}; {other}')
    if reasons and name != 'ckpt.pt':
        say(f'{"; ".join(reasons)}: using {path}, the one before it')
    loaded.setdefault('seconds', 0.0)   # nanoGPT's checkpoints have neither of these two
    loaded.setdefault('skipped', 0)
    best = loaded.get('best_val_loss')
    if isinstance(best, torch.Tensor) and best.numel() == 1:   # as in nanoGPT's
        loaded['best_val_loss'] = best.item()
    for key in RESUMED:
        if not _is_resumable(key, loaded.get(key)):
            fail(f'{path} cannot be resumed from: its {key} is missing or impossible; {other}')
    return loaded, path


def _is_resumable(key, value):
    """Return whether a checkpoint's value under one of RESUMED's keys is possible."""
    if not isinstance(value, RESUMED[key]):
        return False
    if isinstance(value, (list, dict)):
        return True
    if key == 'best_val_loss' and value == math.inf:   # there has been no evaluation
        return True
    return 0 <= value < 2**53


def best_loss(out_dir, so_far):
    """Return the lowest validation loss of a run that is resumed.

    so_far: the loss in the checkpoint that is resumed. best.pt may be newer."""
    path = os.path.join(out_dir, 'best.pt')
    if not os.path.exists(path):
        return so_far
    try:
        return min(so_far, float(read(path)['best_val_loss']))
    except (Damaged, LookupError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        say(f'{path} {error}: the next evaluation replaces it')
        return math.inf


def is_other_text(resumed, data):
    """Return whether a run was trained on another text than the dataset that it is resumed with."""
    was = resumed.get('data')
    if not isinstance(was, dict):   # an earlier version's checkpoint, or nanoGPT's
        return str(resumed['config'].get('dataset', data.name)) != data.name
    now = data.fingerprint()
    if now and was.get('sha256'):
        return now != was['sha256']
    return was.get('name') != data.name


def set_best_aside(out_dir):
    """Rename best.pt, whose loss is that of another text; return its new name, '' without one."""
    path = os.path.join(out_dir, 'best.pt')
    if not os.path.exists(path):
        return ''
    numbered = (os.path.join(out_dir, f'best-earlier-{n}.pt') for n in itertools.count(1))
    name = next(path for path in numbered if not os.path.exists(path))
    os.replace(path, name)
    return name


# ---- a run's folder and its log ------------------------------------------------------------------

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


class RunLog:
    """A run's log.csv, and the trackers that get its rows too.

    A log that has not begun drops its rows: on all ranks but one it never begins."""
    # columns and how their values are written
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
        """Append one row; a column without a value, or with None, stays empty."""
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


# ---- the model that a script uses ----------------------------------------------------------------

@dataclass
class Opened:
    """A model that a script uses, and what is known about it."""
    model: GPT          # on the CPU
    tokenizer: object   # one of lib/tokenizers.py's
    source: str         # the checkpoint file, or what init_from named
    where: str          # the source in words, with a checkpoint's step
    dataset: str        # the dataset it was trained on; '' where that is not known
    data_dirs: list     # the folders that may hold its dataset, in the order to look


def open_model(init_from, out_dir, checkpoint, data_dir, given):
    """Return a script's model as an Opened.

    init_from='resume' stands for the file `checkpoint`, or else for the best model in out_dir that
    was trained. Other values are from_hub's names. given: the knobs that were typed, as configure
    returns them."""
    if init_from != 'resume':
        model, tokenizer = from_hub(init_from, dropout=0.0)
        if tokenizer is None:
            fail(f'init_from={init_from} has no tokenizer.json or vocab.json; '
                 f'type --init_from=FOLDER for one that has')
        return Opened(model, tokenizer, init_from, init_from, '', [data_dir])
    path = find(out_dir, checkpoint)
    loaded = load(path)
    if not checkpoint and loaded.get('iter_num') == 0:
        loaded, path = _trained_instead(loaded, path, out_dir)
    model = build_model(loaded, path)
    knobs = loaded['config'] if isinstance(loaded.get('config'), dict) else {}
    data_dirs = data_dirs_of(knobs, path, data_dir, given)
    tokenizer = find_tokenizer(loaded, path, model, data_dirs)
    where = f'{path}: iter {loaded.get("iter_num")}'
    return Opened(model, tokenizer, path, where, str(knobs.get('dataset', '')), data_dirs)


def _trained_instead(loaded, path, out_dir):
    """Return (checkpoint, path) of last.pt in place of a best.pt from step 0, where that is better.

    A run that is stopped before its second evaluation leaves such a best.pt, and a last.pt that is
    trained and not evaluated."""
    last = os.path.join(out_dir, 'last.pt')
    if path != last and os.path.isfile(last):
        with contextlib.suppress(Damaged):
            trained = read(last)
            if trained.get('iter_num') and trained.get('val_loss') is None:
                return trained, last
    return loaded, path


def data_dirs_of(knobs, path, data_dir, given):
    """Return the folders that may hold the dataset of a run, in the order to look.

    knobs: the run's. path: the run's checkpoint file. data_dir: the script's knob. given: the knobs
    that were typed; a data_dir that was typed is the only folder. A relative data_dir of the run is
    also tried from the folder that out_dir was in, from the run's folder, and from its parent."""
    if 'data_dir' in given:
        return [data_dir]
    known = knobs.get('data_dir', data_dir)
    if not isinstance(known, str) or '\0' in known:
        known = data_dir
    run = os.path.dirname(os.path.abspath(path))
    starts = [os.getcwd()]
    was = knobs.get('out_dir')
    if isinstance(was, str) and run.endswith(os.sep + os.path.normpath(was)):
        starts.append(run.removesuffix(os.sep + os.path.normpath(was)))
    starts += [run, os.path.dirname(run)]
    folders = [os.path.abspath(os.path.join(start, known)) for start in starts]
    folders.append(os.path.abspath(data_dir))
    here = os.path.join(os.getcwd(), '')
    return [folder.removeprefix(here) for folder in dict.fromkeys(folders)]


def find_tokenizer(loaded, path, model, data_dirs):
    """Return the tokenizer in a checkpoint; for one by nanoGPT, that of the dataset in its config.

    From then on the model draws only tokens that the tokenizer has. path: the checkpoint's file.
    data_dirs: the folders that may hold the dataset."""
    if 'tokenizer' in loaded:
        try:
            tokenizer = load_tokenizer(loaded['tokenizer'])
        except ValueError as error:
            fail(f'{path}: {error}; type --checkpoint=FILE for another')
    else:
        config = loaded.get('config')
        name = str(config.get('dataset', '')) if isinstance(config, dict) else ''
        data_dir = dataset_folder(name, data_dirs) if name else None
        if data_dir is None:
            folders = [os.path.join(data_dir, name or '?') for data_dir in data_dirs]
            fail(f'{path} has no tokenizer and the folder of its dataset, '
                 f'{" or ".join(folders)}, is not there; '
                 f'type --data_dir=FOLDER for the one that holds {name or "its dataset"}')
        tokenizer = Dataset(name, data_dir).tokenizer
    if tokenizer.vocab_size > model.config.vocab_size:
        fail(f'{path}: its tokenizer has {tokenizer.vocab_size:,} symbols and its model '
             f'{model.config.vocab_size:,}; type --checkpoint=FILE for another')
    model.drawable = tokenizer.vocab_size
    return tokenizer


def dataset_folder(name, data_dirs):
    """Return the first of data_dirs in which a dataset's folder holds a vocabulary or tokens.

    Where none holds them, return the first that has the folder, or None."""
    empty = None
    for data_dir in data_dirs:
        folder, _ = find_dataset(name, data_dir)
        for pattern in ('meta.*', '*.bin'):
            if glob.glob(os.path.join(glob.escape(folder), pattern)):
                return data_dir
        if empty is None and os.path.isdir(folder):
            empty = data_dir
    return empty


# ---- Hugging Face's models -----------------------------------------------------------------------

def from_hub(name, words=('resume',), most_positions=None, **settings):
    """Return (model, tokenizer) of a GPT-2 on Hugging Face's hub or in a folder.

    tokenizer is None where the folder has none. words: see check_near_names. most_positions: a
    longer context is cut to this. settings: fields of GPTConfig, such as dropout."""
    check_near_names(name, words)
    try:
        if _is_missing_folder(name):
            raise ValueError('there is no such folder')
        folder = fetch_pretrained(name)
        positions = read_hf_config(folder)['n_positions']
        if most_positions is not None and type(positions) is int and positions > most_positions:
            settings['block_size'] = most_positions
        model = GPT.from_pretrained(folder, **settings)
        tokenizer = read_hf_tokenizer(folder)
    except ImportError as error:
        fail(f'init_from={name} needs the package {error.name}; '
             f'type pip install -r requirements.txt')
    except (OSError, ValueError) as error:
        _fail_without_model(name, error)
    if tokenizer is None and model.config.vocab_size == 50257:
        tokenizer = make_tokenizer('gpt2')
    if tokenizer:
        model.drawable = min(tokenizer.vocab_size, model.config.vocab_size)
    return model, tokenizer


def check_near_names(name, words):
    """Fail for a name that is neither a folder nor known, but close to one that is allowed.

    words: values of init_from that are not names."""
    allowed = (*words, *HUB_NAMES)
    folder = os.path.dirname(name) if os.path.isfile(name) else name
    is_run = any(os.path.isfile(os.path.join(folder, each)) for each in ('last.pt', 'best.pt'))
    if name and (is_run or name.endswith('.pt') and os.path.isfile(name)):
        out_dir = shlex.quote(folder or os.curdir)
        fail(f'init_from={name} is a run or a checkpoint of this project, and init_from takes '
             f"Hugging Face's folders; type --init_from=resume --out_dir={out_dir}")
    if '/' in name or os.path.isdir(name) or name in allowed:
        return
    near = get_close_matches(name, allowed, n=1, cutoff=0.7)
    if near:
        fail(f'init_from={name}: there is no such folder; did you mean {near[0]}? '
             f'type --init_from={near[0]}')


def _is_missing_folder(name):
    """Return whether a name can only be a folder's, and there is no such folder."""
    if name in ('', 'scratch'):
        return True
    if os.path.isdir(name):
        return False
    return name[0] in './~' or name.count('/') > 1   # the hub's names are OWNER/MODEL


def _fail_without_model(name, error):
    """Fail for a model that could not be fetched or read."""
    if is_out_of_reach(error):
        fail(f'init_from={name}: huggingface.co cannot be reached, and {name} is not in the '
             f'local cache; allowed are a network once, and a folder with config.json and '
             f'model.safetensors; type --init_from=FOLDER')
    reason = ' '.join(str(error).split())[:400]
    near = get_close_matches(name, ('resume', 'scratch', 'gpt2'), n=1) or ['gpt2']
    advice = near[0] if near[0] != name else 'FOLDER'
    fail(f'init_from={name}: {reason}; allowed are resume, scratch (train.py), gpt2, gpt2-medium, '
         f'gpt2-large, gpt2-xl, distilgpt2, another GPT-2 on huggingface.co, and a folder with '
         f'config.json and model.safetensors; type --init_from={advice}')


def is_out_of_reach(error):
    """Return whether huggingface_hub raised `error` for lack of a network and of cached files."""
    try:
        from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
    except ImportError:
        return False
    return isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled))


# ---- what training starts from -------------------------------------------------------------------

@dataclass
class Symbols:
    """The tokens that a model was trained on."""
    tokenizer: dict | None   # the tokenizer's state, None where it is not known
    vocab_size: int          # rows of the model's embedding
    padded: bool = False     # whether some of the rows may be padding


@dataclass
class Start:
    """What a training run starts from: nothing, or one of resumed and pretrained."""
    resumed: dict | None = None       # the checkpoint that the run goes on from
    pretrained: GPT | None = None     # a model from Hugging Face
    path: str = ''                    # the checkpoint's file, or the name of the pretrained model
    symbols: Symbols | None = None    # what the model was trained on


def starting_point(knobs, given):
    """Return the Start of a training run, and settle its knobs in place.

    A resumed run keeps its knobs, apart from those typed now and those of MACHINE. A model that is
    trained further keeps its shape; fail where a knob that was typed says otherwise. given: the
    knobs that were typed."""
    # whether torchrun --max-restarts has restarted this process, because a rank has died
    restarted = runtime.agree([int(runtime.started_before())])[0]
    if restarted and os.path.exists(os.path.join(knobs['out_dir'], 'last.pt')):
        knobs['init_from'] = 'resume'
    if knobs['init_from'] == 'scratch':
        return Start()
    if knobs['init_from'] == 'resume':
        start = _resume(knobs, given)
        model_args = start.resumed['model_args']
    else:
        start = _train_further(knobs, given)
        model_args = asdict(start.pretrained.config)
    _keep_shape(knobs, given, model_args, start.path)
    return start


def _resume(knobs, given):
    """Return the Start of a resumed run, and restore its knobs."""
    resumed, path = load_last(knobs['out_dir'])
    for key, value in resumed['config'].items():
        if key in knobs and key not in given and key not in MACHINE:
            knobs[key] = checked(key, value, knobs[key], f'{path}: {key}={value!r}')
    data_dirs = data_dirs_of(resumed['config'], path, knobs['data_dir'], given)
    found = first_with(str(knobs['dataset']), data_dirs, 'train')
    if found is not None:
        knobs['data_dir'] = found
    vocab_size = resumed['model_args'].get('vocab_size')
    symbols = Symbols(resumed.get('tokenizer'), vocab_size, padded=True)
    return Start(resumed=resumed, path=path, symbols=symbols)


def _train_further(knobs, given):
    """Return the Start of a run that trains a model from Hugging Face further."""
    name = knobs['init_from']
    asked = knobs['block_size'] if 'block_size' in given else None
    settings = {key: knobs[key] for key in TRAINING}
    model, tokenizer = from_hub(name, ('resume', 'scratch'), asked, **settings)
    has = model.config.block_size
    if asked is not None and asked > has:
        say(f'note: {name} has block_size={has}: windows of {has} tokens instead of {asked}')
        knobs['block_size'] = has
    state = tokenizer.state() if tokenizer else None
    return Start(pretrained=model, path=name, symbols=Symbols(state, model.config.vocab_size))


def _keep_shape(knobs, given, model_args, path):
    """Give the knobs the shape of a model that is trained further.

    Fail where a knob that was typed says otherwise. path: what the model is from."""
    for field in fields(GPTConfig):
        key = field.name
        if key not in knobs or key in TRAINING:
            continue
        had = checked(key, model_args.get(key, knobs[key]), knobs[key], f'{path}: {key}')
        if had != knobs[key] and key in given:
            fail(f'{key}={knobs[key]}, but the model in {path} has {key}={had}, and training it '
                 f'further keeps its shape; type --{key}={had}, or --init_from=scratch and '
                 f'another --out_dir for a new one')
        knobs[key] = had


def shape(knobs):
    """Return the GPTConfig that knobs ask for; fail for one that cannot exist."""
    asked = {field.name: knobs[field.name] for field in fields(GPTConfig) if field.name in knobs}
    try:
        return GPTConfig(**asked)
    except ValueError as error:
        fail(error)


def check_symbols(data, path, symbols):
    """Fail for a dataset with other tokens than the Symbols that a model was trained on.

    path: what the model is from. symbols: None for a new model, which fits every dataset."""
    if symbols is None or _fits(data, symbols):
        return
    difference = f'{symbols.vocab_size} and {data.vocab_size} symbols'
    kind = kind_of(symbols.tokenizer)
    if kind == data.tokenizer.state()['kind'] == 'char':
        difference = different_characters(symbols.tokenizer['chars'], data.tokenizer.chars)
    fail(f'{path} was trained with another tokenizer than that of {data.folder}: {difference}; '
         f'{advice_for_symbols(path, kind)}')


def _fits(data, symbols):
    """Return whether a dataset has the Symbols that a model was trained on, as far as is known."""
    if symbols.tokenizer not in (None, data.tokenizer.state()):
        return False
    if type(symbols.vocab_size) is not int:   # a checkpoint can hold anything
        return True
    if symbols.tokenizer is None and not symbols.padded:
        return symbols.vocab_size == data.vocab_size
    return symbols.vocab_size >= data.vocab_size


def kind_of(state):
    """Return the kind of tokenizer that a checkpoint describes, None where it has no description.

    state: whatever the checkpoint holds."""
    if not isinstance(state, dict) or not isinstance(state.get('kind'), str):
        return None
    if state['kind'] == 'char' and not isinstance(state.get('chars'), str):
        return None
    return state['kind']


def different_characters(known, needed):
    """Return the clause that names the characters of a dataset that a model lacks.

    known: the model's characters. needed: the dataset's."""
    lacking = [char for char in needed if char not in known]
    if not lacking:
        return 'it knows all characters of that dataset, but numbers them differently'
    shown = ', '.join(map(repr, lacking[:20]))
    if len(lacking) > 20:
        shown += ', ...'
    return f'it lacks {len(lacking)} of its characters: {shown}'


def advice_for_symbols(path, kind):
    """Return what to type for a dataset with the tokenizer of the model in path.

    kind: the tokenizer's, None where it is not known."""
    if kind in ('byte', 'gpt2'):
        made_by = kind
    elif kind and os.path.isfile(path):
        made_by = shlex.quote(f'FROM:{path}')
    elif kind == 'char':
        return 'type --dataset=NAME for one with the same characters'
    else:
        return 'type --dataset=NAME for one with the same'
    return (f'type --dataset=NAME for one with the same, which python prepare_text.py --input=FILE '
            f'--name=NAME --tokenizer={made_by} makes')
