"""
One token after another, as fast as the memory allows: what sample.py, evaluate.py and bench.py do to a finished model (and,
at the end, the sample that train.py prints of an unfinished one).

A step of one token uses every weight once, so it takes as long as reading the weights. Hence fewer bytes a weight (`narrow`:
bf16, or int8 with a scale a row), compiled loops that read them at the memory's pace (`compile_steps`), and on a GPU, where
starting some 200 small kernels takes longer than running them, one CUDA graph (`graph_stream`). Figures: results/sampling/.
"""
import math
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

from lib.data import evaluation_batches
from lib.evaluation import mean_loss
from lib.runtime import aside, captured, cpu_has_avx512
from model import Block, LayerCache, check_sampling, choose, fused_attention


class NarrowLinear(nn.Module):
    """A finished linear layer with its weights in dtype, or in int8: W = integers times a scale a row, max |row| / 127."""

    def __init__(self, linear, dtype, int8):
        super().__init__()
        weight, self.dtype, self.scale = linear.weight.detach(), dtype, None
        if int8:
            self.dtype = torch.float32 if dtype == torch.float16 else dtype   # sums of numbers up to 127 overflow fp16
            self.scale = (weight.abs().amax(dim=1) / 127).clamp(min=1e-30)                        # (out,)
            weight = (weight / self.scale[:, None]).round().to(torch.int8)
        self.weight = weight if int8 else weight.to(dtype)                                        # (out, in)
        self.words = None   # the same int8 weights, four in an int32, on processors that need it
        if int8 and weight.device.type == 'cpu' and weight.size(1) % 4 == 0 and not cpu_has_avx512():
            self.weight = interleaved(weight)                                                     # (out, in)
            self.words = self.weight.view(torch.int32)                                            # (out, in / 4)
        self.bias = None if linear.bias is None else linear.bias.detach()                         # (out,)

    def forward(self, x):
        """(..., in) -> (..., out), on a processor in fp32: its attention in bf16 takes 4 to 7 times as long as in fp32."""
        shape = (*x.shape[:-1], self.weight.size(0))
        x = x.reshape(-1, x.size(-1)).to(self.dtype)                                              # (rows, in)
        if x.size(0) == 1 and torch.compiler.is_compiling():
            # Rows of W times x, written out: inductor reads W once, as fast as memory allows, F.linear half as fast. as_strided
            # makes it finish x first; else it computes the norm or GELU that x comes from anew for every row of W (GPT-2 in
            # bf16, a token: 11.9 ms instead of 9.0)
            x = x[0].float()                                                                      # (in,)
            x = x.as_strided(x.shape, x.stride())
            if self.words is not None:
                y = product_of_words(self.words, x)                                               # (out,)
            else:
                y = (self.weight.float() * x).sum(dim=1)                                          # (out,)
            return self.finished(y, shape)
        if self.words is not None:
            x = interleaved(x)
        if self.scale is not None and x.device.type == 'cpu' and x.size(0) <= 4 and x.size(1) % 16 == 0:
            # from 8 rows on F.linear is faster, and 16 is what the kernel reads at a time: past the end, and crashes, if not so
            y = torch.ops.aten._weight_int8pack_mm(x, self.weight, torch.ones_like(self.scale, dtype=self.dtype))
        else:
            y = F.linear(x, self.weight.to(self.dtype))                                           # (rows, out)
        return self.finished(y, shape)

    def finished(self, y, shape):
        """Return a product y with scale and bias, in the precision and shape that forward promises."""
        if self.scale is not None:
            y = y * self.scale
        if self.bias is not None:
            y = y + self.bias
        return y.to(torch.float32 if y.device.type == 'cpu' else self.dtype).view(shape)


def interleaved(matrix):
    """Return a matrix (rows, in) with its columns in the order 0, n, 2n, 3n, 1, n + 1, ..., where n = in / 4.

    Four neighbours of int8 then are the bytes of an int32 word, and byte j of all words is a quarter of the row in order."""
    rows, columns = matrix.shape
    return matrix.reshape(rows, 4, columns // 4).transpose(1, 2).reshape(rows, columns)


def product_of_words(words, x):
    """Return W x for int8 weights W that are interleaved and read as int32: words (out, in / 4), x (in,) -> (out,).

    With AVX2 only, inductor has no vector instruction that makes a float of an int8, but it shifts and converts int32: a
    matrix of (3072, 768) takes 0.12 instead of 1.35 ms, and in fp32 0.32 (two cores of Zen 4 told to use AVX2 only)."""
    quarter = words.size(1)
    y = 0
    for byte in range(4):
        weights = ((words << (24 - 8 * byte)) >> 24).float()   # the shifts also extend the sign    (out, in / 4)
        y = y + weights * x[byte * quarter:(byte + 1) * quarter]
    return y.sum(dim=1)


def narrow(model, dtype, quantize=''):
    """Keep a finished model's matrices in the precision they are multiplied in: replace its linear layers, the head among them,
    by narrow ones, in place. Embeddings, of which a step reads a row, norms and the residual stream stay fp32.
    Autocast instead casts all matrices at every token, and makes GPT-2 slower in bf16 than in fp32 (results/negative.md)."""
    model.set_attention(attend)
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Linear):
                setattr(parent, name, NarrowLinear(layer, getattr(torch, dtype), quantize == 'int8'))


def quantize_and_compare(model, dtype, data, device):
    """narrow(model) to int8, and its loss before, in fp32, and after: nats a token on some 4,000 tokens of data's validation
    split, always the same ones."""
    def loss(dtype):
        block_size = model.config.block_size
        pairs = evaluation_batches(data, 'val', block_size, max(1, 4096 // block_size), batches=1)
        return mean_loss(model, pairs, device, dtype)
    exact = loss('float32')
    narrow(model, dtype, 'int8')
    return exact, loss(dtype)


def weight_bytes(model):
    """What a step of one token reads of a narrowed model: all its matrices."""
    layers = [layer for layer in model.modules() if isinstance(layer, NarrowLinear)]
    return sum(t.nbytes for layer in layers for t in (layer.weight, layer.scale, layer.bias) if t is not None)


def attend(q, k, v, dropout=0.0):
    """fused_attention, and two faster ways for the single query of a step on a processor, (B, nh, 1, hs): in a compiled step
    two products that inductor turns into loops over k and v (256 keys of GPT-2: 0.08 ms a layer, fused 0.3); uncompiled the
    fused one without oneDNN, which fp32 products otherwise profit from (8 texts, 1,000 keys: 2.2 instead of 5.4 ms)."""
    if q.size(2) > 1 or q.device.type != 'cpu':
        return fused_attention(q, k, v, dropout)
    if torch.compiler.is_compiling():
        scores = (q * k).sum(dim=-1, keepdim=True) / math.sqrt(q.size(-1))                        # (B, nh, S, 1)
        return (scores.softmax(dim=2) * v).sum(dim=2, keepdim=True)                               # (B, nh, 1, hs)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest')
    y = fused_attention(q, k, v, dropout)                                                         # (B, nh, 1, hs)
    torch.set_float32_matmul_precision(before)
    return y


def compile_steps(model):
    """Compile what a single token needs: the block, once for all layers (4 s for GPT-2; the whole step as one graph takes 40,
    results/negative.md), and the head. Several tokens or texts at a time stay uncompiled."""
    def single(layer, fast):
        eager = layer.forward
        layer.forward = lambda x, *rest: fast(layer, x, *rest) if x.numel() == x.size(-1) else eager(x, *rest)
    block = torch.compile(Block.forward, dynamic=True)   # dynamic: the context grows with every token
    for layer in model.transformer.h:
        single(layer, block)
    single(model.lm_head, torch.compile(NarrowLinear.forward))


def compiling_pays(model, device, dtype, quantize, tokens, rows):
    """Whether compile_steps is worth its 4 to 7 seconds for so many tokens within block_size. Judged by the arguments alone, by
    no clock: compiled and uncompiled steps round differently, and the same command has to give the same text."""
    size = 1 if quantize else getattr(torch, dtype).itemsize
    saved = 25e-12 * size * model.num_params() + 0.25e-3 * model.config.n_layer   # seconds a token, measured by hand
    return device == 'cpu' and rows == 1 and tokens * saved > 7


class GraphCache(LayerCache):
    """A LayerCache that writes where a tensor says, so that one CUDA graph is right for every position."""

    def __init__(self, filled, state):
        self.k, self.v, self.state = filled.k, filled.v, state
        for t in (self.k, self.v):   # what is masked is still multiplied, by 0
            t[:, :, filled.length:] = 0

    def append(self, k, v):
        self.k.index_copy_(2, self.state.position, k)
        self.v.index_copy_(2, self.state.position, v)
        return self.k[:, :, :self.state.span], self.v[:, :, :self.state.span]


@torch.inference_mode()
def graph_stream(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, repetition_penalty=1.0, chance=None,
                 kv_cache=True):
    """model.stream on a GPU, the whole one-token step, the choice included, being one CUDA graph that is replayed. A graph
    attends to a span of keys, those not yet written masked; a new one is recorded when the span is full. On a processor the
    same step runs as it is, which is how it is tested there."""
    block_size, knobs, idx = model.config.block_size, (temperature, top_k, top_p, repetition_penalty), idx.long()
    model.check_prompt(idx)
    check_sampling(max_new_tokens, *knobs)
    rows, T, device = idx.size(0) if chance is None else chance.size(0), idx.size(1), idx.device
    steps = min(max_new_tokens - 1, block_size - T) if kv_cache and T else 0   # those that one more key has room for
    if steps < 1 or not model.transformer.h:
        yield from model.stream(idx, max_new_tokens, *knobs, chance, kv_cache)
        return
    cache = [LayerCache(block_size) for _ in model.transformer.h]
    logits = model.next_logits(idx, cache).expand(rows, -1)                                       # (B, V)
    for layer in cache:
        if rows > idx.size(0):
            layer.expand(rows)
    seen = torch.cat((idx.expand(rows, -1), idx[:, -1:].expand(rows, block_size + 1 - T)), dim=1)   # filled with a token seen
    state = SimpleNamespace(position=torch.full((1,), T, device=device), span=0, mask=None,
                            token=choose(logits, idx.expand(rows, -1), *knobs, None if chance is None else chance[:, :1]))
    if chance is None:   # nothing is drawn
        chance = torch.zeros(rows, max_new_tokens, device=device)
    cache = [GraphCache(layer, state) for layer in cache]
    seen.index_copy_(1, state.position, state.token)
    yield state.token.clone()

    def masked(q, k, v, dropout=0.0):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=state.mask)

    def following():
        """The token after state.token, which is at state.position."""
        x = model.transformer.wte(state.token)                                                    # (B, 1, C)
        if model.config.pos == 'learned':
            x = x + model.transformer.wpe(state.position)
        rope = model.rope[:, state.position] if model.config.pos == 'rope' else None
        state.mask = torch.arange(state.span, device=device)[None] <= state.position              # (1, S)
        for block, layer in zip(model.transformer.h, cache):
            x = block(x, rope, layer)
        logits = model.lm_head(model.transformer.ln_f(x)[:, -1])[:, :model.drawable].float()
        return choose(logits, seen, *knobs, chance.index_select(1, state.position + 1 - T))

    def step():
        state.token.copy_(following())
        state.position += 1
        seen.index_copy_(1, state.position, state.token)

    with model.attention_set(masked):
        for i in range(T, T + steps):
            if i >= state.span:
                state.span, replay = min(block_size, 256 * (i // 256 + 1)), step
                if device.type == 'cuda':
                    aside(lambda: [following() for _ in range(3)])   # compiles and allocates what is not to be recorded
                    replay = captured(step)
            replay()
            yield state.token.clone()
    if steps + 1 < max_new_tokens:   # past block_size the window is recomputed
        yield from model.stream(seen, max_new_tokens - steps - 1, *knobs, chance[:, steps + 1:], kv_cache=False)
