"""
One page that holds a model: its weights, its tokenizer, and the program that runs it in a browser.

    web.html web.css  the page and its look
    web_gpt.js        the model, a telling of model.py in JavaScript
    web_tokenizer.js  text to token ids and back
    web_weights.js    bytes to the model's tensors, and the check that none is damaged
    web_worker.js     what the page asks of the model, away from the page's own thread
    web_api.js        the page's end of that, and window.gpt
    web_page.js       what one sees and presses
    page.css page.js  shared with analyze.py's page

The weights are the matrices as float32, float16, or int8 with a scale a row, one after another in
the order of the state dict, and in base64. Vectors (biases and norms) stay in float32.
"""
import base64
import copy
import html
import math
import zlib
from dataclasses import dataclass

import numpy as np
import torch

from lib.decoding import quantized
from lib.pages import as_json, fill
from lib.tokenizers import bpe_merges

# from the smallest page to the largest: bytes for each number of a matrix
NUMBER_BYTES = dict(int8=1, float16=2, float32=4)
TOKENIZERS = ('char', 'byte', 'bpe', 'gpt2')   # kinds that web_tokenizer.js knows
MOST_SYMBOLS = 1 << 16   # symbols of a BPE; its merges are written as uint16
ALIGNED = 4   # a tensor begins at a multiple of this many bytes


# ---- narrow weights ------------------------------------------------------------------------------

def named_weights(model):
    """Return {name: tensor} of what the page needs: a tied head is left out.

    The names are those of the state dict without 'transformer.'."""
    weights = {}
    for name, p in model.state_dict().items():
        if name != 'lm_head.weight' or not model.config.tie_weights:
            weights[name.removeprefix('transformer.')] = p.detach().float().cpu()
    return weights


def rounded(p, dtype):
    """Return a tensor in fp32 with the values that a page of this dtype computes with."""
    if p.dim() < 2 or dtype == 'float32':
        return p
    if dtype == 'float16':
        return p.half().float()
    numbers, scale = quantized(p)
    return numbers * scale[:, None]


def as_in_page(model, dtype):
    """Return a copy of a GPT with the weights that a page of this dtype computes with."""
    narrow = copy.deepcopy(model)
    with torch.no_grad():
        for p in narrow.parameters():
            p.copy_(rounded(p, dtype))
    return narrow


def fits_float16(model):
    """Return whether float16, whose largest number is 65,504, can hold all matrices."""
    return all(p.abs().amax() <= 65504 for p in model.parameters() if p.dim() == 2)


def page_bytes(model, dtype):
    """Return about how many bytes the page has: base64 writes three bytes as four letters."""
    numbers = 0
    for p in model.parameters():
        numbers += p.numel() * (NUMBER_BYTES[dtype] if p.dim() == 2 else 4)
        if dtype == 'int8' and p.dim() == 2:
            numbers += 4 * p.size(0)   # scales
    return 4 * numbers // 3 + 100_000   # the program and a small tokenizer


# ---- what the page holds -------------------------------------------------------------------------

@dataclass
class Packed:
    """Weights as bytes, and where each tensor is."""
    tensors: list   # [{name, shape, dtype, at, scale_at}]; positions in bytes
    data: bytes


def pack(model, dtype):
    """Return a model's weights as Packed."""
    tensors = []
    pieces = []
    size = 0

    def append(array):
        """Add an array to the pieces, at a multiple of ALIGNED bytes; return its position."""
        nonlocal size
        at = size
        piece = array.tobytes()
        piece += bytes(-len(piece) % ALIGNED)
        pieces.append(piece)
        size += len(piece)
        return at

    for name, p in named_weights(model).items():
        own_dtype = dtype if p.dim() == 2 else 'float32'
        tensor = dict(name=name, shape=list(p.shape), dtype=own_dtype)
        if own_dtype == 'int8':
            numbers, scale = quantized(p)
            tensor['at'] = append(numbers.numpy())
            tensor['scale_at'] = append(scale.numpy().astype('<f4'))
        else:
            stored = '<f2' if own_dtype == 'float16' else '<f4'
            tensor['at'] = append(p.numpy().astype(stored))
        tensors.append(tensor)
    return Packed(tensors, b''.join(pieces))


def packed_tokenizer(tokenizer):
    """Return a tokenizer as plain data, from which the page makes it again.

    A BPE is the two tokens of each merge, as uint16 in base64: for GPT-2's 267 kB instead of 1.3 MB
    of tokenizer.json."""
    state = tokenizer.state() | dict(opening=tokenizer.opening, end=tokenizer.end)
    if state['kind'] in ('bpe', 'gpt2'):
        letters, merges = bpe_merges(tokenizer)
        state['bytes'] = letters
        state['merges'] = base64.b64encode(np.array(merges, dtype='<u2').tobytes()).decode()
    return state


def config_of(model):
    """Return the fields of GPTConfig that the page computes with."""
    c = model.config
    names = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'pos', 'norm', 'residual',
             'qk_norm', 'activation')
    return {name: getattr(c, name) for name in names} | dict(drawable=model.drawable)


def written_text(model, tokenizer):
    """Return a text that the model writes, for the page to begin with: a line or two."""
    count = 16 if tokenizer.end else 48   # GPT-2's tokens are longer, and its page reads slowly
    opening = torch.from_numpy(np.asarray(tokenizer.encode(tokenizer.opening), dtype=np.int64))
    ids = model.generate(opening[None], min(count, model.config.block_size), temperature=0.8,
                         stop=tokenizer.end, generator=torch.Generator().manual_seed(1337))
    fresh = [i for i in ids[0, len(opening):].tolist() if i != tokenizer.end]
    return tokenizer.decode(fresh).decode('utf-8', 'ignore').strip()


def make_page(model, tokenizer, dtype, facts):
    """Return the page's text. facts: what its line of facts says, as plain data."""
    packed = pack(model, dtype)
    description = as_json(dict(config=config_of(model), tokenizer=packed_tokenizer(tokenizer),
                               tensors=packed.tensors, bytes=len(packed.data), dtype=dtype,
                               facts=facts))
    # one checksum over both, so that damage to either is noticed
    checksum = zlib.crc32(packed.data, zlib.crc32(description.encode('ascii')))
    title = facts['title'].encode('utf-8', 'replace').decode()   # a folder's name need not be UTF-8
    return fill('web.html', title=html.escape(title), description=description,
                checksum=f'{checksum:08x}', weights=base64.b64encode(packed.data).decode('ascii'))


# ---- choosing a dtype ----------------------------------------------------------------------------

def greedy_ids(model, tokenizer, count):
    """Return the ids of a text's opening and of the `count` likeliest tokens after it."""
    opening = np.asarray(tokenizer.encode(tokenizer.opening), dtype=np.int64)
    return model.generate(torch.from_numpy(opening)[None], count, temperature=0)[0].tolist()


def smallest_equal(model, tokenizer, count):
    """Return the narrowest dtype in which the greedy text of `count` tokens is float32's."""
    expected = greedy_ids(model, tokenizer, count)
    for dtype in ('int8', 'float16'):
        if dtype == 'float16' and not fits_float16(model):
            continue
        if greedy_ids(as_in_page(model, dtype), tokenizer, count) == expected:
            return dtype
    return 'float32'


def size_in_words(size):
    """Return a number of bytes as '1.2 MB'."""
    if size < 1e6:
        return f'{math.ceil(size / 1e3)} kB'
    return f'{size / 1e6:.1f} MB'
