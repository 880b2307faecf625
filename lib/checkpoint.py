"""
Checkpoints: one file that stands alone, written whole or not at all, verified when read, and never run.

A checkpoint holds, under nanoGPT's keys where it has one: model (weights by Hugging Face's GPT-2 names), model_args
(GPTConfig as a dict), tokenizer, optimizer (a list of state dicts), scaler, iter_num, best_val_loss, val_loss, seconds,
skipped, config (the knobs) and format: tensors and plain
types only. Also here: a run's folder and its log, and what a run or a script starts from.

The file is what torch.save writes, a zip; the zip's comment holds the SHA-256 of all that comes before it.
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

SEAL = b'sha256:'          # the comment: this and 64 hexadecimal digits
SEAL_SIZE = len(SEAL) + 64
TRAINING = ('dropout', 'flash', 'label_smoothing', 'layer_drop', 'grad_checkpointing')   # what a finished model is without
# what a resumed run does not take over: it is of the machine and of the command typed; prepare would run what a file says
MACHINE = ('init_from', 'out_dir', 'eval_only', 'backend', 'device', 'prepare')
# the hub's GPT-2s, whose names have no owner
HUB_NAMES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', 'distilgpt2')
OWN = ('best.pt', 'last.previous.pt', 'last.pt', 'log.csv', 'loss.png', 'config.json')   # what a run writes into its folder


class Damaged(Exception):
    """What is wrong with a file, to be read behind its path."""


class Unreadable(Damaged):
    """The system does not let us read a file, which may be sound."""


class _Sink:
    """A file for torch.save whose first error is kept for later: raised inside torch's writer, it would end the process."""

    def __init__(self, file):
        self.file, self.error = file, None

    def write(self, data):
        try:
            if self.error is None:
                self.file.write(data)
        except OSError as error:
            self.error = error
        return len(data)

    def flush(self):
        pass


def _digest(file, size):
    """SHA-256 of a file's first `size` bytes, as hexadecimal digits."""
    digest = hashlib.sha256()
    file.seek(0)
    while size > 0 and (chunk := file.read(min(size, 1 << 22))):
        digest.update(chunk)
        size -= len(chunk)
    return digest.hexdigest().encode()


def sync_folder(folder):
    """Flush a folder's list of names to the disk. Do nothing where folders cannot be opened, as on Windows.

    Raises OSError when the disk refuses."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save(path, checkpoint, previous=None):
    """Write beside the old file, seal, flush to the disk, rename: whatever happens, path is the old one or the new one, whole.

    previous: a second name under which the old file is kept. Raises OSError when the disk is full or read-only."""
    folder, part = os.path.dirname(path) or '.', path + '.part'
    try:
        with open(part, 'w+b') as f:
            sink = _Sink(f)
            torch.save(checkpoint, sink)
            if sink.error:
                raise sink.error
            f.seek(-2, os.SEEK_END)   # a zip ends with the length of its comment
            f.write(SEAL_SIZE.to_bytes(2, 'little'))
            seal = SEAL + _digest(f, f.tell())
            f.seek(0, os.SEEK_END)
            f.write(seal)
            f.flush()
            os.fsync(f.fileno())
        if previous and os.path.exists(path):
            _link(path, previous)
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.remove(part)
    sync_folder(folder)   # the rename itself must reach the disk too


def keep(path, checkpoint):
    """save(), the last.pt before this one kept as last.previous.pt; returns whether it worked: a full disk costs this save,
    and not the run."""
    try:
        folder, name = os.path.split(path)
        save(path, checkpoint, os.path.join(folder, 'last.previous.pt') if name == 'last.pt' else None)
        return True
    except OSError as error:
        say(f'iter {checkpoint["iter_num"]}: {path} could not be written ({error.strerror})'
            + '; the older checkpoint is as it was' * os.path.exists(path))
        return False


def open_folder(out_dir, rank):
    """Make a run's folder; fails now for what would fail at the first save."""
    try:
        os.makedirs(out_dir, exist_ok=True)
        for name in OWN:
            if os.path.isdir(os.path.join(out_dir, name)):
                raise IsADirectoryError(0, f'{name} is a folder')
        with open(os.path.join(out_dir, f'.{rank}.part'), 'w', encoding='utf-8') as f:
            os.remove(f.name)
    except OSError as error:
        fail(f'out_dir={out_dir} cannot be written ({error.strerror}); type --out_dir=FOLDER for another')


def read_log(path):
    """The rows of a log.csv as dicts of text, whole ones only: a machine that failed, or an editor, may have left others."""
    rows = []
    with contextlib.suppress(FileNotFoundError, csv.Error), open(path, newline='', encoding='utf-8', errors='replace') as f:
        for row in csv.DictReader(f):
            if None not in row.values() and re.fullmatch('[0-9]{1,15}', row.get('iter') or ''):
                rows.append(row)
    return rows


def trackers(knobs):
    """Functions of (row, step) that send a logged row to where the knobs say; their packages are optional."""
    found = []
    if knobs['wandb_log']:
        try:
            import wandb
        except ImportError:
            fail('wandb_log needs the package wandb; type pip install wandb, or --wandb_log=False')
        wandb.init(project=knobs['wandb_project'], name=knobs['wandb_run_name'], config=knobs)
        found.append(lambda row, step: wandb.log(row, step=step))
    if knobs['tensorboard_log']:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            fail('tensorboard_log needs the package tensorboard; type pip install tensorboard, or --tensorboard_log=False')
        board = SummaryWriter(os.path.join(knobs['out_dir'], 'tensorboard'))
        found.append(lambda row, step: [board.add_scalar(key, value, step) for key, value in row.items()])
    return found


class RunLog:
    """A run's log.csv, and what of its rows goes elsewhere. Until it has begun, as on all ranks but one, rows go nowhere."""
    columns = dict(iter='d', tokens='d', train_loss='.6f', val_loss='.6f', lr='.6g', grad_norm='.6g', tok_per_s='.0f',
                   seconds='.3f')

    def __init__(self, out_dir):
        self.out_dir, self.path, self.lock = out_dir, os.path.join(out_dir, 'log.csv'), None

    def begin(self, step, knobs, facts):
        """Take the folder: lock it, write config.json (knobs, facts, versions, machine) and a log.csv with the rows before
        `step`, the one resumed at, or for None none, an earlier run moved aside. Raises SystemExit where that cannot be."""
        try:
            self.trackers = trackers(knobs)
            self.lock = runtime.lock(self.out_dir)   # as long as this process lives
            if step is None:
                set_aside(self.out_dir)
            versions = dict(python=platform.python_version(), torch=torch.__version__, numpy=numpy.__version__)
            with open(os.path.join(self.out_dir, 'config.json'), 'w', encoding='utf-8') as f:
                json.dump(knobs | facts | dict(versions=versions, machine=platform.platform()), f, indent=1)
            before = [row for row in read_log(self.path) if step is not None and int(row['iter']) < step]
            with open(self.path + '.part', 'w', newline='', encoding='utf-8') as f:
                writer = csv.DictWriter(f, self.columns, extrasaction='ignore')
                writer.writeheader()
                writer.writerows(before)
            os.replace(self.path + '.part', self.path)
        except OSError as error:
            fail(f'{self.out_dir} cannot be written ({error.strerror}); make room, or type --out_dir=FOLDER for another place')

    def row(self, **row):
        """Append one row; a column that has no value, or None, stays empty."""
        if self.lock:
            row = {key: format(value, self.columns[key]) for key, value in row.items() if value is not None}
            try:
                with open(self.path, 'a', newline='', encoding='utf-8') as f:
                    csv.DictWriter(f, self.columns).writerow(row)
            except OSError as error:
                say(f'iter {row["iter"]}: {self.path} could not be written ({error.strerror})')
            for write in self.trackers:
                write({key: float(value) for key, value in row.items()}, int(row['iter']))

    def end(self):
        if self.lock:
            self.lock.close()
            os.remove(self.lock.name)


def set_aside(out_dir):
    """Move the files of an earlier run to out_dir/earlier-N/: a command typed again by mistake must not cost it."""
    paths = [os.path.join(out_dir, name) for name in OWN]
    if any(os.path.lexists(path) for path in paths[:3]):
        numbered = (os.path.join(out_dir, f'earlier-{n}') for n in itertools.count(1))
        earlier = next(path for path in numbered if not os.path.exists(path))
        say(f'{out_dir} holds an earlier run: moved to {earlier}; --init_from=resume would have gone on with it')
        os.makedirs(earlier)
        for path in filter(os.path.lexists, paths):
            os.replace(path, os.path.join(earlier, os.path.basename(path)))


def _link(path, name):
    """Give a file a second name, in place of what had it; path exists at every instant where the file system has links."""
    try:
        if os.path.exists(name + '.part'):
            os.remove(name + '.part')
        os.link(path, name + '.part')
        os.replace(name + '.part', name)
    except OSError:
        os.replace(path, name)


def find(out_dir, checkpoint='', names=('best.pt', 'last.pt', 'ckpt.pt')):
    """The checkpoint file to use: the one named, or the first of names in out_dir (ckpt.pt is nanoGPT's)."""
    paths = [checkpoint] if checkpoint else [os.path.join(out_dir, name) for name in names]
    for path in paths:
        if os.path.isfile(path):
            return path
    fail(f'no checkpoint at {" or ".join(paths)}: train one first (python train.py config/train_shakespeare_char.py), '
         f'or type --out_dir=FOLDER or --checkpoint=FILE')


def flag(out_dir):
    """What a command to be typed needs behind it to find out_dir again."""
    return '' if out_dir == 'out' else f' --out_dir={shlex.quote(out_dir)}'


def load(path):
    """The checkpoint in a file, on the CPU; fails for a file that is damaged or is none of ours or nanoGPT's."""
    try:
        return read(path)
    except Damaged as error:
        last = os.path.join(os.path.dirname(path), 'last.pt')
        fail(f'{path} {error}; type ' + (f'--checkpoint={shlex.quote(last)}' if path != last and os.path.isfile(last) else
                                         '--checkpoint=FILE or --out_dir=FOLDER for another'))


def load_last(out_dir):
    """(checkpoint, path) to resume from: last.pt, or, with a line saying so, its predecessor when last.pt is damaged."""
    loaded, reasons = None, []
    other = 'type --out_dir=FOLDER for the run to resume, or --init_from=scratch for a new one'
    for path in (os.path.join(out_dir, name) for name in ('last.pt', 'last.previous.pt', 'ckpt.pt')):
        if os.path.isfile(path):
            try:
                loaded = read(path)
                break
            except Unreadable as error:   # going on from an older one would replace it
                fail(f'{path} {error}; make it readable, or {other}')
            except Damaged as error:
                reasons.append(f'{path} {error}')
        elif path.endswith('last.pt'):
            reasons.append(f'{path} is not there')
    if loaded is None:
        fail(f'no checkpoint to resume: {"; ".join(reasons)}; {other}')
    if reasons and not path.endswith('ckpt.pt'):
        say(f'{"; ".join(reasons)}: using {path}, the one before it')
    loaded.setdefault('seconds', 0.0)   # which nanoGPT does not count, nor fp16's skipped steps
    loaded.setdefault('skipped', 0)
    if isinstance(loaded.get('best_val_loss'), torch.Tensor) and loaded['best_val_loss'].numel() == 1:
        loaded['best_val_loss'] = loaded['best_val_loss'].item()   # nanoGPT's is one
    kinds = dict(iter_num=int, best_val_loss=(float, int), optimizer=(list, dict), config=dict, seconds=(float, int),
                 skipped=int)
    for key, kind in kinds.items():
        value = loaded.get(key)
        if not isinstance(value, kind) or isinstance(value, (int, float)) and not (
                0 <= value < 2**53 or value == math.inf and key == 'best_val_loss'):
            fail(f'{path} cannot be resumed from: its {key} is missing or impossible; {other}')
    return loaded, path


def best_loss(out_dir, so_far):
    """The lowest validation loss of a run resumed at so_far: best.pt may be newer than what is resumed."""
    path = os.path.join(out_dir, 'best.pt')
    try:
        return min(so_far, float(read(path)['best_val_loss'])) if os.path.exists(path) else so_far
    except (Damaged, LookupError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        say(f'{path} {error}: the next evaluation replaces it')
        return math.inf


def read(path):
    """load() that raises Damaged."""
    try:
        with open(path, 'rb') as f:
            size = f.seek(0, os.SEEK_END)
            f.seek(max(0, size - SEAL_SIZE))
            seal = f.read()
            sealed = seal.startswith(SEAL)
            if sealed and seal != SEAL + _digest(f, size - SEAL_SIZE):
                raise Damaged('is damaged: its content does not match its checksum')
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')   # of a foreign pickle protocol: the error to come says enough
            loaded = torch.load(path, map_location='cpu', weights_only=True)
    except Damaged:
        raise
    except PermissionError as error:
        raise Unreadable(f'cannot be read ({error.strerror})') from None
    except Exception as error:   # a damaged file can make its reader raise anything
        reason = str(error).strip().splitlines() or ['']
        if isinstance(error, pickle.UnpicklingError):   # torch's own words are of weights_only and its history
            reason = ['it holds more than tensors and plain values, and nothing in it is run']
        raise Damaged(f'cannot be read as a checkpoint, it is damaged or none of ours ({type(error).__name__}'
                      f'{reason[0] and ": "}{reason[0][:120]})') from None
    if not isinstance(loaded, dict) or not all(isinstance(loaded.get(key), dict) for key in ('model', 'model_args')):
        raise Damaged('is not a checkpoint of this project: it lacks model or model_args')
    if 'format' in loaded and not sealed:   # ours always are; nanoGPT's have neither
        raise Damaged('is damaged: its checksum is gone')
    if 'format' not in loaded:
        loaded['model_args'].setdefault('activation', 'gelu_erf')   # which is what nanoGPT's nn.GELU() computes
    return loaded


def build_model(loaded, path, **overrides):
    """The GPT of a checkpoint, on the CPU; overrides are GPTConfig fields such as dropout."""
    known = {field.name: type(field.default) for field in fields(GPTConfig)}
    args = {**loaded['model_args'], **overrides}
    for name, value in args.items():
        if name not in known:
            fail(f'{path}: its model has a setting {name!r} that is not known here: it is of another version or project')
        if type(value) is not known[name] and not (known[name] is float and type(value) is int):
            fail(f'{path}: {name}={value!r} in its model_args is no {known[name].__name__}; type --checkpoint=FILE for another')
    # torch.compile's and DDP's wrappers leave prefixes; nanoGPT without flash attention leaves its masks
    weights = {str(name).removeprefix('module.').removeprefix('_orig_mod.'): p for name, p in loaded['model'].items()
               if not str(name).endswith('.attn.bias')}
    try:
        return GPT.with_weights(GPTConfig(**args), weights)
    except (ValueError, TypeError, RuntimeError, OverflowError, MemoryError) as error:
        fail(f'{path}: its weights do not fit its model_args ({str(error)[:300]}); type --checkpoint=FILE for another')


@dataclass
class Opened:
    """A model that a script uses, and what is known about it."""
    model: GPT          # on the CPU
    tokenizer: object   # one of data.py's
    source: str         # the checkpoint file, or what init_from named
    where: str          # the source in words, with a checkpoint's step
    dataset: str        # the dataset it was trained on; '' where that is not known
    data_dirs: list     # the folders that may hold its dataset, in the order to look


def check_near_names(name, words):
    """Fails for a name that is neither a folder nor known, but close to one that is allowed.

    words: what init_from may be besides names."""
    allowed = (*words, *HUB_NAMES)
    if '/' in name or os.path.isdir(name) or name in allowed:
        return
    near = get_close_matches(name, allowed, n=1, cutoff=0.7)
    if near:
        fail(f'init_from={name}: there is no such folder; did you mean {near[0]}? '
             f'type --init_from={near[0]}')


def is_out_of_reach(error):
    """Return whether huggingface_hub raised `error` for lack of a network and of cached files."""
    try:
        from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
    except ImportError:
        return False
    return isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled))


def from_hub(name, words=('resume',), most_positions=None, **fields):
    """Return (model, tokenizer) of a GPT-2 on Hugging Face's hub or in a folder.

    tokenizer is None where the folder has none. words: see check_near_names. most_positions: a
    longer context is cut to this. fields: GPTConfig's, such as dropout."""
    check_near_names(name, words)
    try:
        if name in ('', 'scratch') or not os.path.isdir(name) and (name[0] in './~' or name.count('/') > 1):
            raise ValueError('there is no such folder')
        folder = fetch_pretrained(name)
        positions = read_hf_config(folder)['n_positions']
        if most_positions is not None and type(positions) is int and positions > most_positions:
            fields['block_size'] = most_positions
        model, tokenizer = GPT.from_pretrained(folder, **fields), read_hf_tokenizer(folder)
    except ImportError as error:
        fail(f'init_from={name} needs the package {error.name}; type pip install -r requirements.txt')
    except (OSError, ValueError) as error:
        if is_out_of_reach(error):
            fail(f'init_from={name}: huggingface.co cannot be reached, and {name} is not in the '
                 f'local cache; allowed are a network once, and a folder with config.json and '
                 f'model.safetensors; type --init_from=FOLDER')
        reason = ' '.join(str(error).split())[:400]
        near = (get_close_matches(name, ('resume', 'scratch', 'gpt2'), 1) or ['gpt2'])[0]
        fail(f'init_from={name}: {reason}; allowed are resume, scratch (train.py), gpt2, gpt2-medium, gpt2-large, gpt2-xl, '
             f'distilgpt2, another GPT-2 on huggingface.co, and a folder with config.json and model.safetensors; '
             f'type --init_from={near if near != name else "FOLDER"}')
    if tokenizer is None and model.config.vocab_size == 50257:
        tokenizer = make_tokenizer('gpt2')
    if tokenizer:
        model.drawable = min(tokenizer.vocab_size, model.config.vocab_size)
    return model, tokenizer


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


def open_model(init_from, out_dir, checkpoint, data_dir, given):
    """Return a script's model as an Opened.

    init_from='resume' takes the checkpoint named, or the best in out_dir that was trained; anything
    else is from_hub's. given: the knobs that were typed, as configure returns them."""
    if init_from != 'resume':
        model, tokenizer = from_hub(init_from, dropout=0.0)
        if tokenizer is None:
            fail(f'init_from={init_from} has no tokenizer.json or vocab.json; type --init_from=FOLDER for one that has')
        return Opened(model, tokenizer, init_from, init_from, '', [data_dir])
    path = find(out_dir, checkpoint)
    loaded, last = load(path), os.path.join(out_dir, 'last.pt')
    if not checkpoint and path != last and loaded.get('iter_num') == 0 and os.path.isfile(last):
        with contextlib.suppress(Damaged):   # a run that was stopped before its first evaluation but that of step 0
            trained = read(last)
            if trained.get('iter_num') and trained.get('val_loss') is None:
                loaded, path = trained, last
    model = build_model(loaded, path)
    knobs = loaded['config'] if isinstance(loaded.get('config'), dict) else {}
    data_dirs = data_dirs_of(knobs, path, data_dir, given)
    tokenizer = find_tokenizer(loaded, path, model, data_dirs)
    where = f'{path}: iter {loaded.get("iter_num")}'
    return Opened(model, tokenizer, path, where, str(knobs.get('dataset', '')), data_dirs)


def starting_point(knobs, given):
    """What training begins from: (checkpoint to resume, GPT of Hugging Face, where it is from, its (tokenizer's state,
    vocab_size, whether that may hold padding)), each None where it is not so, all of them for init_from='scratch'.

    Settles knobs: a run goes on as it was but for what is typed now and what belongs to the machine, and a model trained
    further keeps its shape, which fails where a knob given says otherwise."""
    again = runtime.agree([int(runtime.started_before())])[0]   # torchrun --max-restarts, after a rank has died
    if again and os.path.exists(os.path.join(knobs['out_dir'], 'last.pt')):
        knobs['init_from'] = 'resume'
    if knobs['init_from'] == 'scratch':
        return None, None, None, None
    training, resumed, pretrained = {key: knobs[key] for key in TRAINING}, None, None
    if knobs['init_from'] == 'resume':
        resumed, path = load_last(knobs['out_dir'])
        for key, value in resumed['config'].items():
            if key in knobs and key not in given and key not in MACHINE:
                knobs[key] = checked(key, value, knobs[key], f'{path}: {key}={value!r}')
        dirs = data_dirs_of(resumed['config'], path, knobs['data_dir'], given)
        knobs['data_dir'] = first_with(str(knobs['dataset']), dirs, 'train') or knobs['data_dir']
        args, tokenizer = resumed['model_args'], resumed.get('tokenizer')
    else:
        path = knobs['init_from']
        asked = knobs['block_size'] if 'block_size' in given else None
        pretrained, tokenizer = from_hub(path, ('resume', 'scratch'), asked, **training)
        has = pretrained.config.block_size
        if asked is not None and asked > has:
            say(f'note: {path} has block_size={has}: windows of {has} tokens instead of {asked}')
            knobs['block_size'] = has
        args, tokenizer = asdict(pretrained.config), tokenizer and tokenizer.state()
    for key in (field.name for field in fields(GPTConfig) if field.name in knobs and field.name not in TRAINING):
        had = checked(key, args.get(key, knobs[key]), knobs[key], f'{path}: {key}')
        if had != knobs[key] and key in given:
            fail(f'{key}={knobs[key]}, but the model in {path} has {key}={had}, and training it further keeps its shape; '
                 f'type --{key}={had}, or --init_from=scratch and another --out_dir for a new one')
        knobs[key] = had
    return resumed, pretrained, path, (tokenizer, args.get('vocab_size'), bool(resumed))


def shape(knobs):
    """The GPTConfig that knobs ask for; fails for one that cannot exist."""
    try:
        return GPTConfig(**{field.name: knobs[field.name] for field in fields(GPTConfig) if field.name in knobs})
    except ValueError as error:
        fail(error)


def check_symbols(data, path, symbols):
    """Fails for a dataset of other symbols than those that the model from path was trained on, as starting_point gives them."""
    if symbols is None:
        return
    tokenizer, vocab_size, padded = symbols
    other = tokenizer not in (None, data.tokenizer.state())
    if other or type(vocab_size) is int and (vocab_size < data.vocab_size or vocab_size > data.vocab_size and not tokenizer
                                             and not padded):
        difference = f'{vocab_size} and {data.vocab_size} symbols'
        kind = kind_of(tokenizer)
        if kind == data.tokenizer.state()['kind'] == 'char':
            difference = different_characters(tokenizer['chars'], data.tokenizer.chars)
        fail(f'{path} was trained with another tokenizer than that of {data.folder}: {difference}; '
             f'{advice_for_symbols(path, kind)}')


def kind_of(state):
    """Return the kind of the tokenizer that a checkpoint describes, None where it describes none."""
    if not isinstance(state, dict) or not isinstance(state.get('kind'), str):
        return None
    if state['kind'] == 'char' and not isinstance(state.get('chars'), str):
        return None
    return state['kind']


def different_characters(known, needed):
    """Say which of the characters `needed` by a dataset are not among those `known` to a model."""
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


def find_tokenizer(loaded, path, model, data_dirs):
    """Return the tokenizer in a checkpoint; for one by nanoGPT, that of the dataset in its config.

    model draws from the tokenizer's symbols from then on. data_dirs: where that dataset may be."""
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
            folders = ' or '.join(os.path.join(data_dir, name or '?') for data_dir in data_dirs)
            fail(f'{path} has no tokenizer and the folder of its dataset, {folders}, is not there; '
                 f'type --data_dir=FOLDER for the one that holds {name or "its dataset"}')
        tokenizer = Dataset(name, data_dir).tokenizer
    if tokenizer.vocab_size > model.config.vocab_size:
        fail(f'{path}: its tokenizer has {tokenizer.vocab_size:,} symbols and its model {model.config.vocab_size:,}; type '
             f'--checkpoint=FILE for another')
    model.drawable = tokenizer.vocab_size
    return tokenizer
