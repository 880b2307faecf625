"""
Faster ways to the same numbers in training. Letters as in model.py.

On a processor torch's own dropout, attention and GELU take longer than they need to.
`use_on_processor` gives a model the functions of this file through its setters. The model computes
the same without them, except that dropout draws other masks. `TrainingLoss` is the loss that
train.py minimizes. On a GPU small nets wait for kernels to be launched: `GraphedTraining` records
a training step and replays it.
"""
import ctypes
import math
import platform

import torch
from torch import nn
from torch.nn import functional as F

from lib.runtime import aside, captured, cpu_has_avx512
from model import ACTIVATIONS, fused_attention

KEEP_WEIGHTS = 512     # tokens up to which attention keeps its weights for the backward pass
# Logits that the loss holds in fp32 at a time. 16 MB may fit a processor's cache. A GPU has no use
# for small pieces, and launches some 25 kernels for each.
ROW_ELEMENTS = dict(cpu=2**22, cuda=2**28)


def use_on_processor(model):
    """Let a GPT train on a processor with this file's attention, GELU and dropout."""
    keep_memory()
    if model.config.flash:   # False asks for the formula
        model.set_attention(attend_in_training)
    if model.config.activation == 'gelu':
        model.set_activation(gelu)
    model.set_dropout(Dropout)


def keep_memory():
    """Let the C library keep freed memory instead of returning it to the system.

    The system hands it out again page by page, cleared. GPT-2 124M's step on two cores in bf16
    takes 3.1 instead of 3.8 s; for smaller nets no difference was found."""
    if platform.libc_ver()[0] == 'glibc':
        libc = ctypes.CDLL(None)
        trim_threshold = -1   # numbers of mallopt(3)
        mmap_max = -4
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)


# ---- dropout -------------------------------------------------------------------------------------

def kept(shape, p, dtype, generator=None):
    """Return ones with probability 1 - p, to 16 bits, and zeros, on the processor.

    1.6 million in bf16 take 1.4 ms, and bernoulli_ takes 11.7. The result is a function of the
    generator's seed or of torch's, like any draw."""
    count = math.prod(shape)
    words = torch.empty(-(-count // 4), dtype=torch.int64)   # four numbers of 16 bits each
    bits = words.random_(-2**63, None, generator=generator).view(torch.int16)[:count]
    threshold = min(round(p * 2**16), 2**16 - 1) - 2**15
    return torch.ge(bits.view(shape), threshold, out=torch.empty(shape, dtype=dtype))


class Dropout(nn.Dropout):
    """nn.Dropout with masks by `kept`."""

    def forward(self, x):
        if not self.training or not self.p or torch.compiler.is_compiling():
            return super().forward(x)
        return x * kept(x.shape, self.p, x.dtype).div_(1 - self.p)


# ---- activation ----------------------------------------------------------------------------------

def gelu(x):
    """Return GPT-2's GELU of x, any shape: in fp32 by a sigmoid, else as torch computes it.

    Forward and backward of (2048, 512) in fp32 take 1.8 instead of 3.2 ms with AVX2, and 1.8
    instead of 2.3 with AVX512. In bf16 every step of SigmoidGELU would round; torch's kernel
    rounds once."""
    if x.dtype != torch.float32 or torch.compiler.is_compiling():
        return ACTIVATIONS['gelu'](x)
    return SigmoidGELU.apply(x)


class SigmoidGELU(torch.autograd.Function):
    """GELU's tanh form: x/2 (1 + tanh u) = x sigmoid(2u), where 2u = x (LINEAR + CUBIC x^2).

    A sigmoid takes a quarter of a tanh's time. Every line is one pass over the numbers. addcmul
    would save one pass and take fifteen times as long, as its kernel does not vectorize a
    constant. arXiv 1606.08415."""
    LINEAR = 2 * math.sqrt(2 / math.pi)
    CUBIC = 0.044715 * LINEAR

    @staticmethod
    def forward(ctx, x):
        s = x * x
        s.mul_(SigmoidGELU.CUBIC)
        s.add_(SigmoidGELU.LINEAR)
        s.mul_(x)                                                         # 2u
        s.sigmoid_()
        ctx.save_for_backward(x, s)
        return x * s

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, s = ctx.saved_tensors
        dx = x * x
        dx.mul_(3 * SigmoidGELU.CUBIC)
        dx.add_(SigmoidGELU.LINEAR)                                       # (2u)'
        dx.mul_(x)
        torch.ops.aten.sigmoid_backward(dx, s, grad_input=dx)             # x (2u)' s (1 - s)
        dx.add_(s)
        return dx.mul_(dy)


# ---- attention on a processor --------------------------------------------------------------------

def attend_in_training(q, k, v, dropout=0.0, visible=None):
    """Return model.py's attention, in training by blocks where that is faster; (B, nh, T, hs)."""
    in_training = q.requires_grad and visible is None and not torch.compiler.is_compiling()
    if not in_training or not blocks_pay(q.dtype, dropout):
        return fused_attention(q, k, v, dropout, visible)
    T = q.size(-2)
    block = max(64, min(256, T // 4))
    q3, k3, v3 = (t.flatten(0, 1) for t in (q, k, v))                     # (B·nh, T, hs)
    # autocast would turn the weights into fp32, and into bf16 again for their product
    with torch.autocast('cpu', enabled=False):
        y = BlockAttention.apply(q3, k3, v3, dropout, block)
    return y.view_as(q)


def blocks_pay(dtype, dropout):
    """Return whether BlockAttention is to compute attention on this processor.

    The alternative is scaled_dot_product_attention, which has no fused kernel for dropout on a
    processor. Milliseconds of BlockAttention and of it, forward and backward, on two cores of Zen
    4 with torch 2.13. The columns AVX2 are the same processor told to use AVX2 only. Where the
    two are within a tenth, the choice is the one that is faster for small nets.

        (B, nh, T, hs)       bf16         fp32, AVX512   fp32, AVX2   fp32, AVX2, dropout
        (32, 4, 64, 32)      2.2, 10.9    3.3, 17.5      3.2, 2.9     6.1, 11.0
        (12, 4, 64, 32)      1.1, 4.3     1.7, 6.3       1.5, 1.1     2.8, 4.3
        (16, 6, 256, 64)     20.0, 48.9   35.4, 60.4     39.2, 41.9   47.7, 104
        (1, 12, 1024, 64)    35.4, 46.8   58.6, 53.9     63.2, 58.0   102, 201
    """
    return dtype != torch.float32 or dropout > 0 or cpu_has_avx512()


class BlockAttention(torch.autograd.Function):
    """Attention `block` queries at a time, which skips the future of each block.

    With 256 tokens or more this saves at least three eighths of the products. With 64 there is
    one block.

    q, k, v (B·nh, T, hs) -> (B·nh, T, hs). Below, t are a block's queries and s the keys up to
    its end. The backward pass reads weights and mask, or above KEEP_WEIGHTS tokens computes them
    again: GPT-2's step at 1,024 tokens then takes 0.3 GB less and 4 % longer.

    Forward and backward in bf16 on two cores, beside scaled_dot_product_attention: 18 and 48 ms
    for (16, 6, 256, 64), 43 and 59 for (1, 12, 1024, 64), 1.6 and 10 for (32, 4, 64, 32). With
    dropout 25 ms for the first shape. For (1, 6, 4096, 64) with dropout 0.4 and 2.7 s: the other
    holds all weights in fp32."""

    @staticmethod
    def forward(ctx, q, k, v, dropout, block):
        T = q.size(1)
        ctx.dropout = dropout
        ctx.block = block
        ctx.seed = int(torch.randint(2**62, ())) if dropout else 0
        generator = torch.Generator().manual_seed(ctx.seed)
        q = q / math.sqrt(q.size(2))
        y = torch.empty_like(v)
        saved = []   # weights and mask of each block
        for start in range(0, T, block):
            end = min(start + block, T)
            weights = block_weights(q, k, start, end)                     # (B·nh, t, s)
            keep = None
            dropped = weights
            if dropout:
                keep = kept(weights.shape, dropout, weights.dtype, generator)
                dropped = weights * keep
            torch.bmm(dropped, v[:, :end], out=y[:, start:end])
            saved += [weights, keep] if T <= KEEP_WEIGHTS else [None, None]
        ctx.save_for_backward(q, k, v, *saved)
        return y.div_(1 - dropout) if dropout else y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        q, k, v, *saved = ctx.saved_tensors
        T = q.size(1)
        dq = torch.empty_like(q)
        dk = torch.zeros_like(k)
        dv = torch.zeros_like(v)
        dy = dy / (1 - ctx.dropout)
        generator = torch.Generator().manual_seed(ctx.seed)
        for i, start in enumerate(range(0, T, ctx.block)):
            end = min(start + ctx.block, T)
            weights, keep = saved[2 * i:2 * i + 2]
            if weights is None:
                weights = block_weights(q, k, start, end)                 # (B·nh, t, s)
                if ctx.dropout:
                    keep = kept(weights.shape, ctx.dropout, weights.dtype, generator)
            dweights = dy[:, start:end] @ v[:, :end].transpose(1, 2)      # (B·nh, t, s)
            dropped = weights
            if ctx.dropout:
                dropped = weights * keep
                dweights.mul_(keep)
            dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)
            torch.bmm(dscores, k[:, :end], out=dq[:, start:end])
            dk[:, :end] += dscores.transpose(1, 2) @ q[:, start:end]
            dv[:, :end] += dropped.transpose(1, 2) @ dy[:, start:end]
        return dq.div_(math.sqrt(q.size(2))), dk, dv, None, None


def block_weights(q, k, start, end):
    """Return the weights of queries start to end over the keys up to end: (B·nh, t, s).

    q is divided by √hs already."""
    scores = q[:, start:end] @ k[:, :end].transpose(1, 2)
    t = end - start
    scores[:, :, start:] += scores.new_full((t, t), float('-inf')).triu(1)
    return scores.softmax(dim=-1)


# ---- head and loss -------------------------------------------------------------------------------

class TrainingLoss(nn.Module):
    """The loss of a GPT on targets: (idx, targets) -> mean nats, a tensor.

    lean: from 4,096 tokens of vocabulary on, never hold the gradient of the logits beside them
    (CrossEntropy). For a smaller vocabulary, and compiled, it is the loss of GPT.forward."""

    def __init__(self, model, lean=True):
        super().__init__()
        self.model = model
        self.lean = lean and model.config.vocab_size >= 4096

    def forward(self, idx, targets):
        if not self.lean or torch.compiler.is_compiling():
            return self.model(idx, targets)[1]
        logits = self.model.lm_head(self.model.hidden(idx))               # (B, T, V)
        smoothing = self.model.config.label_smoothing
        if logits.dtype == torch.float16:
            # A gradient in fp16 must be scaled before it is rounded, and here it is not yet.
            return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(),
                                   ignore_index=-1, label_smoothing=smoothing)
        return CrossEntropy.apply(logits.flatten(0, 1), targets.flatten(), smoothing)


class CrossEntropy(torch.autograd.Function):
    """F.cross_entropy of logits (N, V) that nobody else reads; targets (N,), where -1 is ignored.

    The gradient is written over the logits, some rows at a time in fp32. Autograd holds three
    copies of all rows in fp32. GPT-2 at 1,024 tokens: 0.3 GB less."""

    @staticmethod
    def forward(ctx, logits, targets, smoothing):
        V = logits.size(1)
        n = max(1, ROW_ELEMENTS.get(logits.device.type, 2**22) // V)   # rows at a time
        valid = targets >= 0
        loss = 0.0
        for rows, target, mask in zip(logits.split(n), targets.split(n), valid.split(n)):
            z = rows.float()                                              # (n, V)
            target = target.clamp(min=0)[:, None]                         # (n, 1)
            log_sum = z.logsumexp(dim=1, keepdim=True)                    # (n, 1)
            nats = log_sum - (1 - smoothing) * z.gather(1, target)        # (n, 1)
            if smoothing:
                nats = nats - smoothing * z.mean(dim=1, keepdim=True)
            loss = loss + (nats[:, 0] * mask).sum()
            gradient = (z - log_sum).exp_().sub_(smoothing / V)           # (n, V)
            gradient.scatter_add_(1, target, torch.full_like(log_sum, smoothing - 1))
            rows.copy_(gradient.mul_(mask[:, None]))
        ctx.gradient = logits
        ctx.count = valid.sum()
        return loss / ctx.count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        gradient = ctx.gradient
        ctx.gradient = None   # frees it: the context lives as long as the loss
        return gradient.mul_((dloss / ctx.count.clamp(min=1)).to(gradient.dtype)), None, None


# ---- CUDA graphs ---------------------------------------------------------------------------------

class GraphedTraining:
    """A training step that is recorded as one CUDA graph in its fourth call, and then replayed.

    A small net's step is some hundred kernels that take less time to run than to launch (nanoGPT's
    PR #392: 22 instead of 40 ms). For one GPU, without fp16's scaler, which waits for the GPU.
    Dropout follows torch.manual_seed in a replay too."""

    def __init__(self, step, optimizers):
        """step: called with [(x, y), ...], returns (loss, norm). optimizers: an Optimizers."""
        self.step = step
        self.calls = 0
        self.replay = None
        for opt in optimizers.all:
            for group in opt.param_groups:
                device = next(step.model.parameters()).device   # a group may be empty
                group['lr'] = torch.tensor(float(group['lr']), device=device)
                if 'capturable' in group:
                    group['capturable'] = device.type == 'cuda'
                for p in group['params']:   # a resumed run has states
                    if 'step' in opt.state.get(p, ()):
                        opt.state[p]['step'] = opt.state[p]['step'].to(device)

    def __call__(self, batches):
        self.calls += 1
        if self.calls <= 3:   # the first calls compile and allocate
            return aside(lambda: self.step(batches))
        tokens = [t for pair in batches for t in pair]
        if not self.replay:
            self.fed = [t.clone() for t in tokens]
            pairs = list(zip(self.fed[::2], self.fed[1::2]))
            self.replay = captured(lambda: self.step(pairs))
        for t, new in zip(self.fed, tokens):
            t.copy_(new)
        loss, norm = self.replay()
        return loss.clone(), norm.clone()   # the next replay writes over them
