"""
Other projects' GPTs, to be measured beside ours in bench.py.
"""
import contextlib
import importlib.util
import os
import sys

from lib.console import fail


def nanogpt(folder, *shape):
    """The GPT of a clone of nanoGPT, made by its own model.py (which is run) from GPTConfig(*shape), to be measured beside."""
    try:
        spec = importlib.util.spec_from_file_location('nanogpt', os.path.join(folder, 'model.py'))
        theirs = importlib.util.module_from_spec(spec)
        sys.modules['nanogpt'] = theirs   # which its dataclass looks up
        with contextlib.redirect_stdout(sys.stderr):
            spec.loader.exec_module(theirs)
            return theirs.GPT(theirs.GPTConfig(*shape))
    except (Exception, SystemExit) as error:   # it is whatever a file holds
        fail(f'peer=nanogpt:{folder}: its model.py is not nanoGPT\'s ({type(error).__name__}: {error}); type '
             f'--peer=nanogpt:PATH')


def transformers_gpt2(block_size, vocab_size, n_layer, n_head, n_embd, dropout):
    """transformers' GPT-2 of a shape with random weights, to be measured beside."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel  # here: only this peer needs it
    except ImportError:
        fail('peer=transformers needs the package transformers; type pip install -r requirements-dev.txt')
    return GPT2LMHeadModel(GPT2Config(
        n_positions=block_size, vocab_size=vocab_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd, resid_pdrop=dropout,
        embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=None, eos_token_id=None))
