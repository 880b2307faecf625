"""
One token after another, as fast as the memory allows, for sample.py, evaluate.py and bench.py.

A step of one token uses every weight once, so it takes as long as reading the weights. Three
things help. `narrow` keeps the weights in bf16, or in int8 with a scale for each row.
`compiled_step` reads them in loops that keep up with the memory. On a GPU, where launching some
200 small kernels takes longer than running them, `GraphedSampling` replays a step as one CUDA
graph, which may hold compiled loops.
`compiled_step` and `GraphedSampling` compute GPT.next_token, and GPT.stream takes them as `step`.
Beyond block_size, where no cache helps, GPT.next_token itself runs. Figures: results/sampling/.
"""
import functools
import math

import torch
from torch import nn
from torch.nn import functional as F

from lib.data import evaluation_batches
from lib.evaluation import mean_loss
from lib.runtime import aside, captured, cpu_has_avx512
from model import Block, call, fused_attention

# ---- narrow weights ------------------------------------------------------------------------------

def quantized(weight):
    """Return a matrix (out, in) as int8 (out, in) and a scale for each row (out,).

    A row is integers times the row's scale, max |row| / 127."""
    scale = (weight.abs().amax(dim=1) / 127).clamp(min=1e-30)             # (out,)
    return (weight / scale[:, None]).round().to(torch.int8), scale


class NarrowLinear(nn.Module):
    """A finished linear layer with its weights in dtype or in int8 (see quantized)."""

    def __init__(self, linear, dtype, int8):
        super().__init__()
        weight = linear.weight.detach()                                   # (out, in)
        self.dtype = dtype
        self.scale = None
        if int8:
            if dtype == torch.float16:   # sums of numbers up to 127 overflow fp16
                self.dtype = torch.float32
            weight, self.scale = quantized(weight)                        # (out, in), (out,)
        else:
            weight = weight.to(dtype)
        self.weight = weight
        self.words = None   # the same int8 weights, four in an int32, on processors that need it
        on_processor = weight.device.type == 'cpu'
        if int8 and on_processor and weight.size(1) % 4 == 0 and not cpu_has_avx512():
            self.weight = interleaved(weight)                             # (out, in)
            self.words = self.weight.view(torch.int32)                    # (out, in / 4)
        self.bias = None if linear.bias is None else linear.bias.detach()     # (out,)

    def forward(self, x):
        """(..., in) -> (..., out), on a processor in fp32.

        A processor's attention in bf16 takes 4 to 7 times as long as in fp32."""
        shape = (*x.shape[:-1], self.weight.size(0))
        x = x.reshape(-1, x.size(-1)).to(self.dtype)                      # (rows, in)
        if x.size(0) == 1 and torch.compiler.is_compiling():
            return self.finished(self.compiled_product(x[0].float()), shape)
        if self.words is not None:
            x = interleaved(x)
        # From 8 rows on F.linear is faster. The int8 kernel reads 16 numbers at a time; where a row
        # is not a multiple of them it reads past the end and crashes. torch's kernel for CUDA walks
        # along each row with one thread (pytorch PR #190529) and is not used. On a GPU compiled
        # steps read a byte a weight; F.linear moves five, as it first writes weights in dtype.
        int8_kernel = self.scale is not None and x.device.type == 'cpu'
        if int8_kernel and x.size(0) <= 4 and x.size(1) % 16 == 0:
            ones = torch.ones_like(self.scale, dtype=self.dtype)
            y = torch.ops.aten._weight_int8pack_mm(x, self.weight, ones)  # (rows, out)
        else:
            y = F.linear(x, self.weight.to(self.dtype))                   # (rows, out)
        return self.finished(y, shape)

    def compiled_product(self, x):
        """Return W x for one vector, x (in,) -> (out,), written out for inductor.

        Inductor reads W once, as fast as the memory allows, and F.linear half as fast. as_strided
        makes it finish x first. Without it the norm or GELU that x comes from is computed anew for
        every row of W (GPT-2 in bf16, a token: 11.9 instead of 9.0 ms)."""
        x = x.as_strided(x.shape, x.stride())
        if self.words is not None:
            return product_of_words(self.words, x)
        return (self.weight.float() * x).sum(dim=1)

    def finished(self, y, shape):
        """Return a product y with scale and bias, in the precision that forward promises."""
        if self.scale is not None:
            y = y * self.scale
        if self.bias is not None:
            y = y + self.bias
        return y.to(torch.float32 if y.device.type == 'cpu' else self.dtype).view(shape)


def interleaved(matrix):
    """Return a matrix (rows, in) with its columns in the order 0, n, 2n, 3n, 1, n + 1, ...

    n = in / 4. Four neighbours of int8 then are the bytes of an int32 word, and byte j of all words
    is a quarter of the row in order."""
    rows, columns = matrix.shape
    return matrix.reshape(rows, 4, columns // 4).transpose(1, 2).reshape(rows, columns)


def product_of_words(words, x):
    """Return W x for int8 weights W that are interleaved and read as int32.

    words (out, in / 4), x (in,) -> (out,). With AVX2 only, inductor has no vector instruction that
    makes a float of an int8, but it shifts and converts int32. A matrix of (3072, 768) takes 0.12
    instead of 1.35 ms, and in fp32 0.32 (two cores of Zen 4 told to use AVX2 only)."""
    quarter = words.size(1)
    y = 0
    for byte in range(4):
        weights = ((words << (24 - 8 * byte)) >> 24).float()   # the shifts also extend the sign
        y = y + weights * x[byte * quarter:(byte + 1) * quarter]
    return y.sum(dim=1)


def narrow(model, dtype, quantize=''):
    """Prepare a finished model for sampling, in place.

    All linear layers, the head among them, become narrow, and attention is attend_in_sampling. In
    float32 only the speed changes. Embeddings, of which a step reads a row, norms and the residual
    stream stay in fp32.
    The model casts by itself from then on and must not run under autocast: fp16's would overflow
    in int8. Autocast also casts all matrices at every token, and makes GPT-2 slower in bf16 than
    in fp32 (results/negative.md)."""
    model.set_attention(attend_in_sampling)
    int8 = quantize == 'int8'
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Linear):
                setattr(parent, name, NarrowLinear(layer, getattr(torch, dtype), int8))


def quantize_and_compare(model, dtype, data, device):
    """Narrow a model to int8; return its loss before, in fp32, and after: nats a token.

    The loss is that of the same 4,000 tokens or so of data's validation split in every call."""
    def loss():
        block_size = model.config.block_size
        texts = max(1, 4096 // block_size)
        pairs = evaluation_batches(data, 'val', block_size, texts, batches=1)
        return mean_loss(model, pairs, device, 'float32')   # without autocast
    exact = loss()
    narrow(model, dtype, 'int8')
    return exact, loss()


def weight_bytes(model):
    """Return how many bytes a step of one token reads: all matrices of a narrowed model."""
    total = 0
    for layer in model.modules():
        if isinstance(layer, NarrowLinear):
            for t in (layer.weight, layer.scale, layer.bias):
                if t is not None:
                    total += t.nbytes
    return total


def attend_in_sampling(q, k, v, dropout=0.0, visible=None):
    """Return fused_attention, for the single query of a step on a processor by two faster ways.

    q (B, nh, 1, hs), k and v (B, nh, S, hs), visible (1, S). In a compiled step two products become
    loops over k and v: for 256 keys of GPT-2 0.08 ms a layer, where the fused kernel takes 0.3.
    Otherwise the fused kernel runs without oneDNN, which fp32 products profit from elsewhere: for 8
    texts and 1,000 keys 2.2 instead of 5.4 ms."""
    if q.size(2) > 1 or q.device.type != 'cpu' or visible is None:
        return fused_attention(q, k, v, dropout, visible)
    if torch.compiler.is_compiling():
        scores = (q * k).sum(dim=-1, keepdim=True) / math.sqrt(q.size(-1))    # (B, nh, S, 1)
        scores = scores.masked_fill(~visible.t(), float('-inf'))
        return (scores.softmax(dim=2) * v).sum(dim=2, keepdim=True)           # (B, nh, 1, hs)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest')
    y = fused_attention(q, k, v, dropout, visible)                            # (B, nh, 1, hs)
    torch.set_float32_matmul_precision(before)
    return y


# ---- compiled steps ------------------------------------------------------------------------------

def compiled_step(model, idx, cache, seen, chance, sampling):
    """Return the next token as GPT.next_token does, with the blocks and the head compiled.

    The blocks share their code, which takes 4 s for GPT-2 to compile; the whole step as one graph
    takes 40 (results/negative.md). The prompt, and several texts at a time, stay uncompiled."""
    if idx.numel() > 1 or not cache.length:
        return model.next_token(idx, cache, seen, chance, sampling)
    return model.next_token(idx, cache, seen, chance, sampling, run=call_compiled)


def call_compiled(module, *inputs):
    """Return module(*inputs), for a block or a narrowed head."""
    return compiled_forward(type(module))(module, *inputs)


@functools.cache
def compiled_forward(kind):
    """Return the forward of a class of modules, compiled. A block's keys grow: dynamic shapes."""
    return torch.compile(kind.forward, dynamic=True if kind is Block else None)


def compiling_pays(model, device, dtype, quantize, tokens, rows):
    """Return whether compiled_step is worth its 4 to 7 seconds for so many tokens.

    tokens: those within block_size. Judged by the arguments alone, not by a clock: compiled and
    uncompiled steps round differently, and the same command must give the same text. Nothing was
    measured on a GPU, where compiling is assumed to save less than it costs."""
    size = 1 if quantize else getattr(torch, dtype).itemsize
    # seconds saved on a token, measured by hand
    saved = 25e-12 * size * model.num_params() + 0.25e-3 * model.config.n_layer
    return device == 'cpu' and rows == 1 and tokens * saved > 7


# ---- one CUDA graph a step -----------------------------------------------------------------------

class GraphedSampling:
    """GPT.next_token, recorded as a CUDA graph whenever the cache grows, else replayed.

    A graph reads and writes the same memory at every replay. `seen` and the cache's tensors stay
    where they are. The token and its chance are copied to where the graph reads them. On a
    processor the step runs without a graph, which is how it is tested there.

    compiled: whether the graph of a single text is recorded from compiled blocks and head."""

    def __init__(self, compiled=False):
        self.compiled = compiled
        self.recorded = None   # the cache, and its room, that the graph was recorded for
        self.idx = None        # where the graph reads the token, (B, 1)
        self.chance = None     # where the graph reads its chance, (B, 1)
        self.replay = None     # makes the graph's step; returns the new token, (B, 1)

    def __call__(self, model, idx, cache, seen, chance, sampling):
        if not cache.length:   # the prompt
            return model.next_token(idx, cache, seen, chance, sampling)
        if self.recorded != (cache, cache.room):
            self.record(model, idx, cache, seen, chance, sampling)
            self.recorded = (cache, cache.room)
        self.idx.copy_(idx)
        if chance is not None:
            self.chance.copy_(chance)
        return self.replay().clone()   # the next replay writes over it

    def record(self, model, idx, cache, seen, chance, sampling):
        self.idx = idx.clone()                                                # (B, 1)
        self.chance = None if chance is None else chance.clone()                 # (B, 1)

        run = call_compiled if self.compiled and idx.numel() == 1 else call

        def step():
            return model.next_token(self.idx, cache, seen, self.chance, sampling, run)

        self.replay = step
        if idx.device.type == 'cuda':
            # loads kernels and allocates workspaces, which must not be recorded
            aside(lambda: [step() for _ in range(3)])
            self.replay = captured(step)
