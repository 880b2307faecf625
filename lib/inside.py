"""
What goes on inside a GPT: attention on its way through, heads taken out, and numbers made of both.

Nothing of this is in a normal forward pass: hooks are in place for the length of a `with` block, and gone after it, also when
what is in it fails. Letters as in model.py.
"""
import contextlib

import torch
from torch.nn import functional as F

from model import attention_weights

NAMED = 0.4       # share of a head's attention from which on it is called by a role
AT_ONCE = 2**26   # logits that head_ablation holds: 256 MB


# ---- hooks ---------------------------------------------------------------------------------------------------------

def check_layers(model, layers):
    """Raises ValueError for a layer that the model does not have."""
    n = model.config.n_layer
    wrong = [layer for layer in layers if not (type(layer) is int and 0 <= layer < n)]
    if wrong:
        raise ValueError(f'layer={wrong[0]}: ' + (f'allowed are 0 to {n - 1}; type --layer=0' if n else
                                                  'this model has n_layer=0, and no attention to look at'))


def check_heads(model, heads):
    """Raises ValueError for a (layer, head) that the model does not have."""
    check_layers(model, [layer for layer, _ in heads])
    wrong = [head for _, head in heads if not (type(head) is int and 0 <= head < model.config.n_head)]
    if wrong:
        raise ValueError(f'head={wrong[0]}: allowed are 0 to {model.config.n_head - 1}; type --head=0')


@contextlib.contextmanager
def watched(model, layers, outputs=False):
    """Let the attention of these layers take the explicit formula and hand out what it computes, without gradients.

    Yields a dict that each forward pass fills anew: {layer: {'weights': (B, nh, T, S)}}, with outputs=True also 'outputs'
    (B, nh, T, hs), each head's before the projection; in fp32, on the CPU. Raises ValueError for a layer that is not there."""
    check_layers(model, layers)
    seen = {}

    def explicit_attention_of(layer):
        def explicit(q, k, v, dropout=0.0):
            with torch.autocast(q.device.type, enabled=False):
                weights = attention_weights(q.float(), k.float())                                 # (B, nh, T, S)
                y = weights @ v.float()                                                           # (B, nh, T, hs)
            seen[layer] = dict(weights=weights.cpu()) | (dict(outputs=y.cpu()) if outputs else {})
            return y.type_as(v)
        return explicit

    with model.attention_set({layer: explicit_attention_of(layer) for layer in layers}):
        with torch.no_grad():
            yield seen


@contextlib.contextmanager
def zeroed(model, heads):
    """Let these heads, (layer, head) pairs, add nothing: their outputs are zeroed before the projection."""
    check_heads(model, heads)
    nh, hooks = model.config.n_head, []
    try:
        for layer in dict.fromkeys(layer for layer, _ in heads):
            projection = model.transformer.h[layer].attn.c_proj
            mask = torch.ones(nh, model.config.n_embd // nh, device=projection.weight.device)
            mask[[head for its, head in heads if its == layer]] = 0
            mask = mask.flatten()                                                                  # (C,)
            hooks.append(projection.register_forward_pre_hook(lambda _, args, mask=mask: (args[0] * mask,)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


# ---- what attention weights say --------------------------------------------------------------------------------------

def scan(weights):
    """Measures of attention weights (nh, T, T), T >= 2: {name: (nh,)}, means over all queries but the first, which has no
    choice. Entropies in nats, distances in tokens, the rest shares of the attention."""
    nh, T, _ = weights.shape
    rows = weights[:, 1:].double()                                                                # (nh, T-1, T)
    i, j = torch.arange(1, T)[:, None], torch.arange(T)
    entropy = -torch.special.xlogy(rows, rows).sum(dim=2)                                         # (nh, T-1)
    columns = rows.mean(dim=1)                                                                    # (nh, T)
    return dict(entropy=entropy.mean(dim=1), entropy_share=(entropy / torch.log(i[:, 0] + 1.0)).mean(dim=1),
                distance=(rows * (i - j).clamp(min=0)).sum(dim=2).mean(dim=1),
                diagonal=(rows * (i == j)).sum(dim=2).mean(dim=1), previous=(rows * (i == j + 1)).sum(dim=2).mean(dim=1),
                first=columns[:, 0], stripe=columns.amax(dim=1), stripe_at=columns.argmax(dim=1))


def role_matrices(idx):
    """Where a head of a role looks, as 0/1 matrices (T, T) of the tokens idx (T,): queries down, keys across.

    'previous': the token before; 'same': earlier ones like this; 'induction': what followed those (transformer-circuits.pub/
    2022/in-context-learning-and-induction-heads); 'sink': the first of all (arXiv 2309.17453)."""
    T = len(idx)
    i, j = torch.arange(T)[:, None], torch.arange(T)
    same = (idx[:, None] == idx) & (j < i)                                                        # (T, T)
    followed = torch.zeros_like(same)
    followed[:, 1:] = same[:, :-1]
    return dict(previous=i == j + 1, same=same, induction=followed & (j < i), sink=(j == 0) & (i > 0))


def role_scores(weights, matrices):
    """The share of attention (nh, T, T) that falls on each matrix's ones, mean over the rows that have some: {role: (nh,)}; 0
    for a matrix without."""
    scores = {}
    for role, matrix in matrices.items():
        rows = matrix.any(dim=1)
        scores[role] = (weights * matrix).sum(dim=(1, 2)) / rows.sum().clamp(min=1)
    return scores


def repeated(model, length, generator):
    """A random sequence of tokens twice, as induction is measured: (1, 2 · length); no token twice where there are enough."""
    V = model.drawable
    once = torch.randperm(V, generator=generator)[:length] if V >= length else torch.randint(V, (length,), generator=generator)
    return once.repeat(2)[None]


# ---- losses --------------------------------------------------------------------------------------------------------

def token_losses(logits, targets):
    """Nats of each target: logits (B, T, V), targets (B, T) -> (B, T), in fp32."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction='none').view_as(targets)


@torch.no_grad()
def head_ablation(model, x, y, progress=lambda steps: steps):
    """Mean loss of each window of x, y (n, T), nats per token: (n,) as the model is, (n_layer, nh, n) with each head zeroed."""
    L, nh = model.config.n_layer, model.config.n_head
    at_once = max(1, AT_ONCE // (x.size(1) * model.config.vocab_size))   # windows
    whole, losses = torch.empty(len(x)), torch.empty(L, nh, len(x))
    entering = []   # each block, (n, T, C): what lies before a zeroed head need not be computed again
    for layer, first in progress([(layer, first) for first in range(0, len(x), at_once) for layer in range(L)]):
        rows = slice(first, first + at_once)
        if layer == 0:
            entering.clear()
            hooks = [block.register_forward_pre_hook(lambda _, args: entering.append(args)) for block in model.transformer.h]
            try:
                whole[rows] = token_losses(model(x[rows])[0], y[rows]).mean(dim=1).cpu()
            finally:
                for hook in hooks:
                    hook.remove()
        for head in range(nh):
            hidden, *rest = entering[layer]
            with zeroed(model, [(layer, head)]):
                for block in model.transformer.h[layer:]:
                    hidden = block(hidden, *rest)
            logits = model.lm_head(model.transformer.ln_f(hidden))                                # (n, T, V)
            losses[layer, head, rows] = token_losses(logits, y[rows]).mean(dim=1).cpu()
    return whole, losses


def gradient_norms(model, x, y):
    """[(name, weight's norm, gradient's norm)] of every parameter after the loss on one batch; the model's gradients are
    given back as they were."""
    names, params = zip(*model.named_parameters())
    loss = model(x, y)[1]
    return [(name, float(p.detach().norm()), float(grad.norm()) if grad is not None else 0.0)
            for name, p, grad in zip(names, params, torch.autograd.grad(loss, params, allow_unused=True))]


def principal(vectors, count=2):
    """The first principal components of vectors (n, C): coordinates (n, count), and their shares of the variance (count,)."""
    centred = vectors.double() - vectors.double().mean(dim=0)
    values, directions = torch.linalg.eigh(centred.T @ centred)                                   # ascending
    directions = directions[:, -count:].flip(1)
    directions = directions * directions.gather(0, directions.abs().argmax(dim=0)[None]).sign()   # one sign on every machine
    return centred @ directions, values[-count:].flip(0) / values.sum()


def neighbours(vectors, rows, count):
    """The nearest rows of vectors (n, C) to some of them, by cosine: indices (len(rows), count) and cosines."""
    unit = F.normalize(vectors.float(), dim=1)
    cosines = unit[rows] @ unit.T                                                                 # (rows, n)
    cosines[torch.arange(len(rows)), rows] = -2
    found = cosines.topk(min(count, len(vectors) - 1), dim=1)
    return found.indices, found.values
