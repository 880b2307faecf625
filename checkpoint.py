"""
Checkpoints: one file that stands alone, written whole or not at all, read without running anything in it.

A checkpoint holds, under nanoGPT's keys where it has one: model (weights by Hugging Face's GPT-2 names), model_args
(GPTConfig as a dict), tokenizer, optimizer (a list of state dicts), scaler, iter_num, best_val_loss, val_loss, seconds,
config (the knobs) and rng (of rank 0, for the record: train.py seeds every step anew): tensors and plain types only.
"""
import os
import pickle
from dataclasses import fields

import torch

from configurator import fail
from data import Dataset, load_tokenizer
from model import GPT, GPTConfig


def save(path, checkpoint):
    """Write beside the old file, flush to the disk, rename: whatever happens, path is the old one or the new one, whole."""
    folder, part = os.path.dirname(path) or '.', path + '.part'
    try:
        with open(part, 'wb') as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.remove(part)
    handle = os.open(folder, os.O_RDONLY)   # the rename itself must reach the disk too
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def find(out_dir, checkpoint='', names=('best.pt', 'last.pt', 'ckpt.pt')):
    """The checkpoint file to use: the one named, or the first of names in out_dir (ckpt.pt is nanoGPT's)."""
    paths = [checkpoint] if checkpoint else [os.path.join(out_dir, name) for name in names]
    for path in paths:
        if os.path.isfile(path):
            return path
    fail(f'no checkpoint at {" or ".join(paths)}: train one first (python train.py config/train_shakespeare_char.py), '
         f'or type --out_dir=FOLDER or --checkpoint=FILE')


def load(path):
    """The checkpoint in a file, on the CPU; fails for a file that is damaged or is none of ours or nanoGPT's."""
    try:
        loaded = torch.load(path, map_location='cpu', weights_only=True)
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, AttributeError, TypeError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()
        fail(f'{path} cannot be read as a checkpoint ({type(error).__name__}: {reason[0][:150] if reason else ""}): it is '
             f'damaged or none of ours; type --checkpoint=FILE for another')
    if not isinstance(loaded, dict) or not all(isinstance(loaded.get(key), dict) for key in ('model', 'model_args')):
        fail(f'{path} is not a checkpoint of this project: it lacks model or model_args; type --checkpoint=FILE for another')
    return loaded


def build_model(loaded, path, **overrides):
    """The GPT of a checkpoint, on the CPU; overrides are GPTConfig fields such as dropout."""
    known = {field.name for field in fields(GPTConfig)}
    unknown = set(loaded['model_args']) - known
    if unknown:
        fail(f'{path}: its model has settings that are not known here ({", ".join(map(str, sorted(unknown, key=str)))}); '
             f'it was written by another version or project')
    try:
        model = GPT(GPTConfig(**{**loaded['model_args'], **overrides}))
        # torch.compile's and DDP's wrappers leave prefixes; nanoGPT without flash attention leaves its masks
        weights = {name.removeprefix('module.').removeprefix('_orig_mod.'): p for name, p in loaded['model'].items()}
        model.load_state_dict({name: p for name, p in weights.items() if not name.endswith('.attn.bias')})
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        fail(f'{path}: its weights do not fit its model_args ({str(error)[:300]}); type --checkpoint=FILE for another')
    return model


def find_tokenizer(loaded, path, data_dir='data'):
    """The tokenizer in a checkpoint; for one by nanoGPT, that of the dataset its config names."""
    if 'tokenizer' not in loaded:
        return Dataset(str(loaded.get('config', {}).get('dataset', '')), data_dir).tokenizer
    try:
        return load_tokenizer(loaded['tokenizer'])
    except ValueError as error:
        fail(f'{path}: {error}; type --checkpoint=FILE for another')
