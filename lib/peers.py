"""
GPTs of other projects, measured beside ours by bench.py and bench_step.py.

They are made with random weights, from the same GPTConfig as ours.
"""
import contextlib
import importlib.util
import os
import sys

from lib.console import fail


def nanogpt(folder, config):
    """Return the GPT of a clone of nanoGPT.

    Runs the model.py in `folder`, and fails if that file is not nanoGPT's."""
    try:
        spec = importlib.util.spec_from_file_location('nanogpt', os.path.join(folder, 'model.py'))
        module = importlib.util.module_from_spec(spec)
        sys.modules['nanogpt'] = module   # dataclasses look their module up here
        with contextlib.redirect_stdout(sys.stderr):   # nanoGPT prints its number of parameters
            spec.loader.exec_module(module)
            return module.GPT(module.GPTConfig(
                block_size=config.block_size, vocab_size=config.vocab_size,
                n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd,
                dropout=config.dropout, bias=config.bias))
    except (Exception, SystemExit) as error:   # another file can do anything
        fail(f'peer=nanogpt:{folder}: its model.py is not nanoGPT\'s '
             f'({type(error).__name__}: {error}); type --peer=nanogpt:PATH')


def transformers_gpt2(config):
    """Return transformers' GPT-2. Fails where transformers is not installed.

    config.bias has no effect: this model always has biases."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel  # here: only this peer needs it
    except ImportError:
        fail('peer=transformers needs the package transformers; '
             'type pip install -r requirements-dev.txt')
    return GPT2LMHeadModel(GPT2Config(
        n_positions=config.block_size, vocab_size=config.vocab_size,
        n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd,
        resid_pdrop=config.dropout, embd_pdrop=config.dropout, attn_pdrop=config.dropout,
        bos_token_id=None, eos_token_id=None))
