"""
Faster ways to the same numbers in training, and the optimizers. `speed_up` puts the former into a model, which computes the
same without them (dropout alone draws other masks); `make_optimizers` gives AdamW, or Muon beside it.

On a processor torch's dropout, attention and cross-entropy lose more time than the matrix products leave room for; on a GPU
small nets wait for kernels to be launched, and Muon's many small products do so everywhere. Letters as in model.py.
"""
import ctypes
import math
import platform
import types

import torch
from torch import nn

from lib.runtime import aside, captured, cpu_has_avx512, cpu_has_bf16
from model import ACTIVATIONS, GPT, fused_attention

# Muon's polynomials a s + b s^3 + c s^5 of the singular values s, one an iteration (the polar express, arXiv 2505.16932).
# Each polynomial is the nearest to 1 on the interval to which the earlier ones map [0.01, 1.02]; the norm that brings s below
# 1 is rounded in bf16, and beyond 1.03 the first polynomials explode. Three of them take such s to between 0.72 and 1.28;
# smaller s grow 77-fold. torch.optim.Muon takes (3.4445, -4.775, 2.0315) five times; the main job's loss is the same with
# three fifths of its products (results/negative.md).
POLAR = ((7.9424, -22.2873, 15.8239), (3.6465, -2.7291, 0.5374), (2.6758, -1.9890, 0.4539))
KEEP_WEIGHTS = 512     # tokens up to which attention keeps its weights for the backward pass
ROW_ELEMENTS = 2**22   # logits that the loss holds in fp32 at a time: 16 MB, which a processor's cache may hold


def speed_up(model):
    """Make a GPT train faster where it is now, through the places model.py leaves for that; returns the model."""
    model.forward = types.MethodType(lean_forward, model)   # a method, which a copy of the model takes as its own
    if next(model.parameters()).device.type == 'cpu':
        keep_memory()
        for layer in list(model.modules()):
            if getattr(layer, 'attend', None) is fused_attention:   # not where the explicit formula was asked for
                layer.attend = attend
            if getattr(layer, 'activation', None) is ACTIVATIONS['gelu']:
                layer.activation = gelu
            for name, child in layer.named_children():
                if type(child) is nn.Dropout:
                    setattr(layer, name, Dropout(child.p))
    return model


def keep_memory():
    """Let the C library keep what tensors give back instead of returning it to the system, which hands it out again page by
    page, cleared: 3.1 instead of 3.8 s for GPT-2 124M's step on two cores, bf16; for smaller nets no difference was found."""
    if platform.libc_ver()[0] == 'glibc':
        libc, trim_threshold, mmap_max = ctypes.CDLL(None), -1, -4   # mallopt(3)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)


# ---- dropout -------------------------------------------------------------------------------------------------------

def kept(shape, p, dtype, generator=None):
    """Ones with probability 1 - p (to 16 bits), else zeros, on the processor: 1.4 ms for 1.6 million in bf16, where
    bernoulli_ takes 11.7. A function of the generator's seed or of torch's, like any draw."""
    count = math.prod(shape)
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-2**63, None, generator=generator).view(torch.int16)[:count]
    return torch.ge(bits.view(shape), min(round(p * 2**16), 2**16 - 1) - 2**15, out=torch.empty(shape, dtype=dtype))


class Dropout(nn.Dropout):
    def forward(self, x):
        if not self.training or not self.p or torch.compiler.is_compiling():
            return super().forward(x)
        return x * kept(x.shape, self.p, x.dtype).div_(1 - self.p)


# ---- activation ----------------------------------------------------------------------------------------------------

def gelu(x):
    """Return GPT-2's GELU of x, any shape: in fp32 by a sigmoid, else as torch computes it.

    Forward and backward of (2048, 512) in fp32 take 1.8 instead of 3.2 ms with AVX2, and 1.8 instead of 2.3 with AVX512. In
    bf16 each of the steps below would round, so torch's kernel, which rounds once, stays."""
    if x.dtype != torch.float32 or torch.compiler.is_compiling():
        return ACTIVATIONS['gelu'](x)
    return SigmoidGELU.apply(x)


class SigmoidGELU(torch.autograd.Function):
    """x/2 (1 + tanh u) = x sigmoid(2u), where 2u = x (LINEAR + CUBIC x^2): the tanh form of GELU (arXiv 1606.08415).

    A sigmoid takes a quarter of a tanh's time. Every line is one pass over the numbers; addcmul would save one pass and take
    fifteen times as long, as its kernel does not vectorize a constant."""
    LINEAR = 2 * math.sqrt(2 / math.pi)
    CUBIC = 0.044715 * LINEAR

    @staticmethod
    def forward(ctx, x):
        s = x * x
        s.mul_(SigmoidGELU.CUBIC)
        s.add_(SigmoidGELU.LINEAR)
        s.mul_(x)                                                                                 # 2u
        s.sigmoid_()
        ctx.save_for_backward(x, s)
        return x * s

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, s = ctx.saved_tensors
        dx = x * x
        dx.mul_(3 * SigmoidGELU.CUBIC)
        dx.add_(SigmoidGELU.LINEAR)                                                               # (2u)'
        dx.mul_(x)
        torch.ops.aten.sigmoid_backward(dx, s, grad_input=dx)                                     # x (2u)' s (1 - s)
        dx.add_(s)
        return dx.mul_(dy)


# ---- attention on a processor --------------------------------------------------------------------------------------

def attend(q, k, v, dropout=0.0):
    """model.py's attention in training, in blocks where that is faster."""
    T, S = q.size(-2), k.size(-2)
    if T != S or not q.requires_grad or torch.compiler.is_compiling() or not blocks_pay(q.dtype, dropout):
        return fused_attention(q, k, v, dropout)
    with torch.autocast('cpu', enabled=False):   # which would make fp32 of the weights, and bf16 again for their product
        y = BlockAttention.apply(*(t.flatten(0, 1) for t in (q, k, v)), dropout, max(64, min(256, T // 4)))
    return y.view_as(q)


def blocks_pay(dtype, dropout):
    """Return whether BlockAttention computes attention on this processor, rather than scaled_dot_product_attention.

    Milliseconds of both, forward and backward, on two cores of Zen 4 with torch 2.13. The columns AVX2 are the same processor
    told to use AVX2 only. Where the two are within a tenth, the choice is the one that is faster for small nets. With dropout
    scaled_dot_product_attention has no fused kernel on a processor.

        (B, nh, T, hs)       bf16         fp32, AVX512   fp32, AVX2   fp32, AVX2, dropout
        (32, 4, 64, 32)      2.2, 10.9    3.3, 17.5      3.2, 2.9     6.1, 11.0
        (12, 4, 64, 32)      1.1, 4.3     1.7, 6.3       1.5, 1.1     2.8, 4.3
        (16, 6, 256, 64)     20.0, 48.9   35.4, 60.4     39.2, 41.9   47.7, 104
        (1, 12, 1024, 64)    35.4, 46.8   58.6, 53.9     63.2, 58.0   102, 201
    """
    return dtype != torch.float32 or dropout > 0 or cpu_has_avx512()


class BlockAttention(torch.autograd.Function):
    """The formula `block` queries at a time, so that most of the future is never computed; (B·nh, T, hs) -> (B·nh, T, hs).
    t are a block's queries, s the keys up to its end. The backward pass reads weights and mask, or above KEEP_WEIGHTS tokens
    makes them again: GPT-2's step at 1,024 tokens takes 0.3 GB less and 4 % longer.

    Forward and backward in bf16 on two cores: 18 instead of scaled_dot_product_attention's 48 ms for (16, 6, 256, 64), 43
    instead of 59 for (1, 12, 1024, 64), 1.6 instead of 10 for (32, 4, 64, 32). With dropout 25 ms for the first, and 0.4 s
    instead of 2.7 for (1, 6, 4096, 64), where scaled_dot_product_attention holds all weights in fp32."""

    @staticmethod
    def forward(ctx, q, k, v, dropout, block):
        T, y, saved = q.size(1), torch.empty_like(v), []
        ctx.dropout, ctx.block, ctx.seed = dropout, block, int(torch.randint(2**62, ())) if dropout else 0
        generator = torch.Generator().manual_seed(ctx.seed)
        q = q / math.sqrt(q.size(2))
        for start in range(0, T, block):
            end = min(start + block, T)
            weights = block_weights(q, k, start, end)                                             # (B·nh, t, s)
            keep = kept(weights.shape, dropout, weights.dtype, generator) if dropout else None
            torch.bmm(weights * keep if dropout else weights, v[:, :end], out=y[:, start:end])
            saved += [weights, keep] if T <= KEEP_WEIGHTS else [None, None]
        ctx.save_for_backward(q, k, v, *saved)
        return y.div_(1 - dropout) if dropout else y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        q, k, v, *saved = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        dy, generator = dy / (1 - ctx.dropout), torch.Generator().manual_seed(ctx.seed)
        for i, start in enumerate(range(0, q.size(1), ctx.block)):
            end, (weights, keep) = min(start + ctx.block, q.size(1)), saved[2 * i:2 * i + 2]
            if weights is None:
                weights = block_weights(q, k, start, end)
                keep = kept(weights.shape, ctx.dropout, weights.dtype, generator) if ctx.dropout else None
            dweights = dy[:, start:end] @ v[:, :end].transpose(1, 2)                              # (B·nh, t, s)
            dropped = weights
            if ctx.dropout:
                dropped, dweights = weights * keep, dweights.mul_(keep)
            dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)          # (B·nh, t, s)
            torch.bmm(dscores, k[:, :end], out=dq[:, start:end])
            dk[:, :end] += dscores.transpose(1, 2) @ q[:, start:end]
            dv[:, :end] += dropped.transpose(1, 2) @ dy[:, start:end]
        return dq.div_(math.sqrt(q.size(2))), dk, dv, None, None


def block_weights(q, k, start, end):
    """Weights of queries start to end, divided by √hs already, over the keys up to end: (B·nh, t, s)."""
    scores = q[:, start:end] @ k[:, :end].transpose(1, 2)
    scores[:, :, start:] += scores.new_full((end - start, end - start), float('-inf')).triu(1)
    return scores.softmax(dim=-1)


# ---- head and loss -------------------------------------------------------------------------------------------------

def lean_forward(model, idx, targets=None):
    """GPT.forward; in training over a large vocabulary without handing out logits, (None, loss)."""
    if targets is None or not model.training or model.config.vocab_size < 4096 or torch.compiler.is_compiling():
        return GPT.forward(model, idx, targets)   # compiled, torch fuses the loss itself
    logits = model.lm_head(model.hidden(idx))                                                     # (B, T, V)
    return None, CrossEntropy.apply(logits.flatten(0, 1), targets.flatten(), model.config.label_smoothing)


class CrossEntropy(torch.autograd.Function):
    """F.cross_entropy (ignoring targets of -1) of logits (N, V) that nobody else reads: their gradient is written over them,
    some rows at a time in fp32, where autograd holds three copies of all in fp32. GPT-2 at 1,024 tokens: 0.3 GB less."""

    @staticmethod
    def forward(ctx, logits, targets, smoothing):
        V, loss = logits.size(1), 0.0
        valid = targets >= 0
        for rows, target, mask in zip(*(t.split(max(1, ROW_ELEMENTS // V)) for t in (logits, targets, valid))):
            z, target = rows.float(), target.clamp(min=0)[:, None]                                # (n, V), (n, 1)
            log_sum = z.logsumexp(dim=1, keepdim=True)                                            # (n, 1)
            nats = log_sum - (1 - smoothing) * z.gather(1, target) - smoothing * z.mean(dim=1, keepdim=True)
            loss = loss + (nats[:, 0] * mask).sum()
            gradient = (z - log_sum).exp_().sub_(smoothing / V)
            gradient.scatter_add_(1, target, torch.full_like(log_sum, smoothing - 1))
            rows.copy_(gradient.mul_(mask[:, None]))
        ctx.gradient, ctx.count = logits, valid.sum()
        return loss / ctx.count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        gradient, ctx.gradient = ctx.gradient, None   # it would live as long as the loss
        return gradient.mul_((dloss / ctx.count.clamp(min=1)).to(gradient.dtype)), None, None


# ---- optimizers ----------------------------------------------------------------------------------------------------------

def make_optimizers(model, name, learning_rate, muon_learning_rate, weight_decay, betas):
    """AdamW for all of a model's parameters, or for 'muon' Muon for the blocks' matrices and AdamW for the rest.

    Returns the optimizers, each group with its 'peak' rate, and (parameter, rows, part): what Muon sees as a parameter is a
    part that shares the model's storage, QKV being three, and needs parameter.grad[rows] as its gradient."""
    device = next(model.parameters()).device.type
    parts = [(p, rows, nn.Parameter(p.detach()[rows])) for p, rows in muon_matrices(model)] if name == 'muon' else []
    groups, muons = model.optimizer_groups(weight_decay), {id(p) for p, _, _ in parts}
    for group in groups:
        group['params'] = [p for p in group['params'] if id(p) not in muons]
    made = [torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=device != 'mps')]
    if parts:
        made.append(Muon([part for _, _, part in parts], precise=device == 'cpu' and not cpu_has_bf16(),
                         lr=muon_learning_rate, weight_decay=weight_decay))
    for opt, peak in zip(made, (learning_rate, muon_learning_rate)):
        for group in opt.param_groups:
            group['peak'] = peak
    return made, parts


def muon_matrices(model):
    """The blocks' matrices as Muon takes them: (parameter, row slice); QKV is three matrices in one tensor.

    Embeddings and head stay with AdamW (kellerjordan.github.io/posts/muon)."""
    C = model.config.n_embd
    for name, p in model.transformer.h.named_parameters():
        if p.dim() == 2:
            for start in range(0, p.size(0), C) if name.endswith('c_attn.weight') else (None,):
                yield p, slice(None) if start is None else slice(start, start + C)


def set_rate(opt, share):
    """Give every group of an optimizer its share of the peak rate; in place where a CUDA graph reads it."""
    for group in opt.param_groups:
        if isinstance(group['lr'], torch.Tensor):
            group['lr'].fill_(group['peak'] * share)
        else:
            group['lr'] = group['peak'] * share


class Muon(torch.optim.Muon):
    """torch.optim.Muon (kellerjordan.github.io/posts/muon) with all matrices of a shape orthogonalized together: 13 instead of
    24 ms for 4 layers of 128 on two cores. In fp32 where the processor has no bf16: emulated it takes five times as long."""

    def __init__(self, params, precise=False, **settings):
        super().__init__(params, **settings)
        self.precise = precise

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            shapes = {}
            for p in group['params']:
                if p.grad is not None:
                    shapes.setdefault(tuple(p.shape), []).append(p)
            for (rows, columns), params in shapes.items():
                grads = [p.grad for p in params]
                averages = [self.state[p].setdefault('momentum_buffer', torch.zeros_like(p)) for p in params]
                torch._foreach_lerp_(averages, grads, 1 - group['momentum'])
                updates = torch.stack(torch._foreach_lerp(grads, averages, group['momentum']))    # Nesterov's look ahead
                updates = orthogonalized(updates if self.precise else updates.bfloat16(), group['eps'])
                updates = list((updates.to(params[0].dtype) * (group['lr'] * math.sqrt(max(1, rows / columns)))).unbind())
                torch._foreach_mul_(params, 1 - group['lr'] * group['weight_decay'])
                torch._foreach_sub_(params, updates)


def orthogonalized(x, eps):
    """Return matrices (n, rows, columns) with the same singular vectors and singular values near 1, by POLAR's polynomials.

    s -> a s + b s^3 + c s^5 is a x + (b g + c g g) x, where g = x xT. eps: the least norm that is divided by."""
    tall = x.size(1) > x.size(2)
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for a, b, c in POLAR:
        gram = x @ x.mT                                                                           # (n, rows, rows)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


# ---- CUDA graphs ---------------------------------------------------------------------------------------------------

class Graphed:
    """A training step, update([(x, y), ...]) -> (loss, norm), that after three calls is recorded as one CUDA graph and from
    then on replayed: a small net's step is some hundred kernels that take less time to run than to launch (nanoGPT's PR #392:
    22 instead of 40 ms). For one GPU, without fp16's scaler, which waits; dropout follows torch.manual_seed here too.
    Written after torch's documentation and tested step by step on a processor; not yet run on a GPU."""

    def __init__(self, update, optimizers):
        self.update, self.calls, self.replay = update, 0, None
        for opt in optimizers:
            for group in opt.param_groups:
                device = group['params'][0].device
                group['lr'] = torch.tensor(float(group['lr']), device=device)
                if 'capturable' in group:
                    group['capturable'] = device.type == 'cuda'
                for p in group['params']:   # of a resumed run
                    if 'step' in opt.state.get(p, ()):
                        opt.state[p]['step'] = opt.state[p]['step'].to(device)

    def __call__(self, batches):
        self.calls += 1
        if self.calls <= 3:   # the first ones compile and allocate
            return aside(lambda: self.update(batches))
        tokens = [t for pair in batches for t in pair]
        if not self.replay:
            self.fed = [t.clone() for t in tokens]
            pairs = list(zip(self.fed[::2], self.fed[1::2]))
            self.replay = captured(lambda: self.update(pairs))
        for t, new in zip(self.fed, tokens):
            t.copy_(new)
        loss, norm = self.replay()
        return loss.clone(), norm.clone()   # the next replay writes over them
