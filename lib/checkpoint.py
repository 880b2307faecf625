"""
Checkpoints: one file that stands alone, written whole or not at all, and verified when it is read.

A checkpoint holds tensors and plain types only, so reading it never runs code. Where nanoGPT has a
key, its name is used:
    model           weights, under Hugging Face's GPT-2 names
    model_args      GPTConfig as a dict
    tokenizer       the tokenizer's state
    data            name and SHA-256 of the dataset, and the text that it stands in for, if any
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
"""
import glob
import hashlib
import math
import os
import pickle
import shlex
import shutil
import warnings
from dataclasses import fields

import torch

from lib.console import fail, say
from model import GPT, GPTConfig

SEAL = b'sha256:'            # what the zip's comment begins with; 64 hexadecimal digits follow
SEAL_SIZE = len(SEAL) + 64   # bytes
# what resuming needs of a checkpoint besides the model, and the types allowed
RESUMED = dict(iter_num=int, best_val_loss=(float, int), optimizer=(list, dict), config=dict,
               seconds=(float, int), skipped=int)


class Damaged(Exception):
    """A file is not a whole checkpoint. The message is to be read behind the file's path."""


class Unreadable(Damaged):
    """The system does not let us read a file. The file may be sound."""


# ---- writing a checkpoint ------------------------------------------------------------------------

def keep(path, checkpoint):
    """Save a checkpoint of a run; return whether that worked.

    A full disk costs this save, not the run. The last.pt before this one becomes
    last.previous.pt."""
    previous = None
    if os.path.basename(path) == 'last.pt':
        previous = previous_of(path)
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


def copy(path, last):
    """Let last.pt be the checkpoint in path; return whether that worked.

    The two names share one file, which costs no time and no room. That is safe, as save never
    writes into a file that exists. Where the file system has no links, copy the file."""
    part = last + '.part'
    try:
        if os.path.exists(part):
            os.remove(part)
        try:
            os.link(path, part)
        except OSError:
            shutil.copyfile(path, part)
        if os.path.exists(last):
            _link(last, previous_of(last))
        os.replace(part, last)
        sync_folder(os.path.dirname(last) or '.')
    except OSError as error:
        say(f'{last} could not be written ({error.strerror})')
        return False
    return True


def previous_of(last):
    """Return the name that the last.pt before this one gets."""
    return os.path.join(os.path.dirname(last), 'last.previous.pt')


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
    if checkpoint and os.path.isdir(checkpoint):
        fail(f'checkpoint={checkpoint} is a folder, and --checkpoint takes a file; '
             f'type --out_dir={shlex.quote(checkpoint)}')
    if not checkpoint and os.path.isfile(out_dir):
        fail(f'out_dir={out_dir} is a file, and --out_dir takes the folder of a run; '
             f'type --checkpoint={shlex.quote(out_dir)}')
    earlier = newest_earlier(out_dir, names)
    if earlier and not checkpoint:
        fail(f'no checkpoint at {" or ".join(paths)}; an earlier run is in {earlier}; '
             f'type --out_dir={shlex.quote(earlier)}')
    fail(f'no checkpoint at {" or ".join(paths)}: train one first '
         f'(python train.py config/train_shakespeare_char.py), '
         f'or type --out_dir=FOLDER or --checkpoint=FILE')


def newest_earlier(out_dir, names):
    """Return the newest of the folders out_dir/earlier-N with a checkpoint, '' without one.

    A new run in out_dir moved the files of the run before it there. names: see find."""
    pattern = os.path.join(glob.escape(out_dir), 'earlier-[0-9]*')
    folders = sorted(glob.glob(pattern), key=lambda path: (len(path), path))
    for folder in reversed(folders):
        if any(os.path.isfile(os.path.join(folder, name)) for name in names):
            return folder
    return ''


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
        config = GPTConfig(**args)
    except (ValueError, TypeError) as error:
        fail(f'{path}: this version has no such model ({error}); {another}')
    try:
        return GPT.with_weights(config, weights)
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
        earlier = newest_earlier(out_dir, ('last.pt', 'last.previous.pt'))
        if earlier:
            other = f'an earlier run is in {earlier}; type --out_dir={shlex.quote(earlier)}'
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
