"""
What goes on inside a GPT: its attention weights, the ablation of heads, and measures of both.

A normal forward pass knows nothing of this file. Hooks are in place for the length of a `with`
block, and are removed after it, also when an exception ends the block. Letters as in model.py.
"""
import contextlib

import torch
from torch.nn import functional as F

from model import attention_weights

NAMED = 0.4       # share of its attention from which on a head is named after a role
AT_ONCE = 2**26   # logits that head_ablation computes at once: 256 MB


# ---- hooks ---------------------------------------------------------------------------------------

def check_layers(model, layers):
    """Raise ValueError for a layer that the model does not have."""
    n = model.config.n_layer
    for layer in layers:
        if type(layer) is int and 0 <= layer < n:
            continue
        if n == 0:
            raise ValueError(f'layer={layer}: this model has n_layer=0 and no attention to look at')
        raise ValueError(f'layer={layer}: allowed are 0 to {n - 1}; type --layer=0')


def check_heads(model, heads):
    """Raise ValueError for a (layer, head) that the model does not have."""
    check_layers(model, [layer for layer, _ in heads])
    nh = model.config.n_head
    for _, head in heads:
        if not (type(head) is int and 0 <= head < nh):
            raise ValueError(f'head={head}: allowed are 0 to {nh - 1}; type --head=0')


@contextlib.contextmanager
def watched(model, layers, outputs=False):
    """Yield a dict that each forward pass fills with the attention of these layers.

    The dict is {layer: {'weights': (B, nh, T, S)}}. With outputs=True each layer also has 'outputs'
    (B, nh, T, hs), the heads' outputs before the projection. All of it is fp32 and on the CPU.
    Within the block these layers compute attention by the explicit formula, and no gradients are
    recorded. Raises ValueError for a layer that the model does not have."""
    check_layers(model, layers)
    seen = {}

    def explicit_attention_of(layer):
        def explicit(q, k, v, dropout=0.0, visible=None):
            with torch.autocast(q.device.type, enabled=False):
                weights = attention_weights(q.float(), k.float(), visible)   # (B, nh, T, S)
                y = weights @ v.float()                                   # (B, nh, T, hs)
            seen[layer] = dict(weights=weights.cpu())
            if outputs:
                seen[layer]['outputs'] = y.cpu()
            return y.type_as(v)
        return explicit

    with model.using_attention({layer: explicit_attention_of(layer) for layer in layers}):
        with torch.no_grad():
            yield seen


@contextlib.contextmanager
def zeroed(model, heads):
    """Zero the outputs of these heads before the projection, so that they add nothing.

    heads: (layer, head) pairs. Raises ValueError for a head that the model does not have."""
    check_heads(model, heads)
    heads_of = {}   # layer -> its heads
    for layer, head in heads:
        heads_of.setdefault(layer, []).append(head)
    hooks = []
    try:
        for layer, chosen in heads_of.items():
            projection = model.transformer.h[layer].attn.c_proj
            mask = head_mask(model.config, chosen, projection.weight.device)
            hooks.append(projection.register_forward_pre_hook(multiply_by(mask)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def head_mask(config, heads, device):
    """Return a mask (C,): zeros for the outputs of these heads of a layer, ones for the others."""
    mask = torch.ones(config.n_head, config.n_embd // config.n_head, device=device)   # (nh, hs)
    mask[heads] = 0
    return mask.flatten()                                                 # (C,)


def multiply_by(mask):
    """Return a forward pre-hook that multiplies a module's input by a mask."""
    return lambda module, args: (args[0] * mask,)


@contextlib.contextmanager
def inputs_recorded(modules):
    """Yield a list to which each forward pass appends the arguments of these modules."""
    inputs = []
    hooks = []
    try:
        for module in modules:
            hook = module.register_forward_pre_hook(lambda module, args: inputs.append(args))
            hooks.append(hook)
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


# ---- measures of attention weights ---------------------------------------------------------------

def scan(weights):
    """Return measures of attention weights (nh, T, T), T >= 2, as {name: (nh,)}.

    Each is a mean over all queries but the first, which can only attend to itself. entropy is in
    nats, and entropy_share is its share of the largest possible entropy. distance is in tokens.
    stripe_at is the key with the highest mean attention. The others are shares of the attention."""
    nh, T, _ = weights.shape
    rows = weights[:, 1:].double()                                        # (nh, T-1, T)
    i = torch.arange(1, T)[:, None]                                       # (T-1, 1) queries
    j = torch.arange(T)                                                   # (T,) keys
    entropy = -torch.special.xlogy(rows, rows).sum(dim=2)                 # (nh, T-1)
    largest = torch.log(i[:, 0] + 1.0)                                    # (T-1,)
    columns = rows.mean(dim=1)                                            # (nh, T)

    def mean_of(values):
        """Return the mean over queries of the attention-weighted sum of values (T-1, T)."""
        return (rows * values).sum(dim=2).mean(dim=1)                     # (nh,)

    return dict(
        entropy=entropy.mean(dim=1),
        entropy_share=(entropy / largest).mean(dim=1),
        distance=mean_of((i - j).clamp(min=0)),
        diagonal=mean_of(i == j),
        previous=mean_of(i == j + 1),
        first=columns[:, 0],
        stripe=columns.amax(dim=1),
        stripe_at=columns.argmax(dim=1))


def role_matrices(idx):
    """Return where a head of each role attends to, as {role: boolean matrix (T, T)}.

    idx: the tokens (T,). Queries are rows, keys are columns.
    'previous': the token before. 'same': earlier occurrences of the query's token.
    'induction': the tokens that followed those occurrences
    (transformer-circuits.pub/2022/in-context-learning-and-induction-heads).
    'sink': the first token (arXiv 2309.17453)."""
    T = len(idx)
    i = torch.arange(T)[:, None]
    j = torch.arange(T)
    same = (idx[:, None] == idx) & (j < i)                                # (T, T)
    followed = torch.zeros_like(same)
    followed[:, 1:] = same[:, :-1]
    return dict(
        previous=i == j + 1,
        same=same,
        induction=followed & (j < i),
        sink=(j == 0) & (i > 0))


def role_scores(weights, matrices):
    """Return the share of attention (nh, T, T) on each role's matrix, as {role: (nh,)}.

    The share is a mean over the queries for which the matrix has a key, and 0 where it has none."""
    scores = {}
    for role, matrix in matrices.items():
        queries = matrix.any(dim=1).sum().clamp(min=1)
        scores[role] = (weights * matrix).sum(dim=(1, 2)) / queries
    return scores


def repeated(model, length, generator):
    """Return a random sequence of tokens twice in a row, (1, 2 * length), to measure induction on.

    Within the sequence no token occurs twice, unless the vocabulary is smaller than length."""
    V = model.drawable
    if V >= length:
        once = torch.randperm(V, generator=generator)[:length]
    else:
        once = torch.randint(V, (length,), generator=generator)
    return once.repeat(2)[None]


# ---- losses and gradients ------------------------------------------------------------------------

def token_losses(logits, targets):
    """Return the loss of each target in nats, (B, T), in fp32.

    logits: (B, T, V). targets: (B, T)."""
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction='none')
    return losses.view_as(targets)


@torch.no_grad()
def head_ablation(model, x, y, progress=lambda steps: steps):
    """Return the mean loss of each window, of the whole model and with each head zeroed in turn.

    x, y: the windows and their targets, (n, T). The losses are in nats per token: (n,) of the whole
    model, and (n_layer, nh, n). progress: wraps the list of steps, as tqdm does.

    What the blocks before a zeroed head compute does not depend on the head. Each block's input is
    therefore recorded once and reused."""
    L = model.config.n_layer
    nh = model.config.n_head
    blocks = model.transformer.h
    whole = torch.empty(len(x))
    losses = torch.empty(L, nh, len(x))
    at_once = max(1, AT_ONCE // (x.size(1) * model.config.vocab_size))   # windows
    starts = range(0, len(x), at_once)
    inputs = []   # each block's arguments for the windows at hand; the first is (n, T, C)
    for start, layer in progress([(start, layer) for start in starts for layer in range(L)]):
        rows = slice(start, start + at_once)
        if layer == 0:
            with inputs_recorded(blocks) as inputs:
                logits = model(x[rows])[0]                                # (n, T, V)
            whole[rows] = token_losses(logits, y[rows]).mean(dim=1).cpu()
        for head in range(nh):
            hidden, *rest = inputs[layer]
            with zeroed(model, [(layer, head)]):
                for block in blocks[layer:]:
                    hidden = block(hidden, *rest)                         # (n, T, C)
            logits = model.lm_head(model.transformer.ln_f(hidden))        # (n, T, V)
            losses[layer, head, rows] = token_losses(logits, y[rows]).mean(dim=1).cpu()
    return whole, losses


def gradient_norms(model, x, y):
    """Return [(name, norm of the parameter, norm of its gradient)] for the loss on one batch.

    The gradients that the model holds are not touched."""
    names, params = zip(*model.named_parameters())
    loss = model(x, y)[1]
    gradients = torch.autograd.grad(loss, params, allow_unused=True)
    norms = []
    for name, p, gradient in zip(names, params, gradients):
        norm = 0.0
        if gradient is not None:
            norm = float(gradient.norm())
        norms.append((name, float(p.detach().norm()), norm))
    return norms


# ---- each layer's guess --------------------------------------------------------------------------

@torch.no_grad()
def layer_guesses(model, idx, count):
    """Return what would come after each token if the model ended before or after each block.

    idx: the tokens of one text, (1, T). The final norm and the head are applied to the residual
    stream before the first block and after every block: the logit lens. Returns the `count` most
    probable tokens and their probabilities, (n_layer + 1, T, count) each, on the CPU."""
    layers = [*model.transformer.h, model.transformer.ln_f]   # their inputs are the stream
    with inputs_recorded(layers) as inputs:
        model(idx)
    tokens = []
    shares = []
    for stream, *_ in inputs:
        logits = model.lm_head(model.transformer.ln_f(stream))[0]         # (T, V)
        top = logits[:, :model.drawable].float().softmax(dim=1).topk(count, dim=1)
        tokens.append(top.indices.cpu())                                  # (T, count)
        shares.append(top.values.cpu())                                   # (T, count)
    return torch.stack(tokens), torch.stack(shares)


# ---- embeddings ----------------------------------------------------------------------------------

def principal(vectors, count=2):
    """Return the first principal components of vectors (n, C): coordinates and shares.

    The coordinates are (n, count). The shares of the variance are (count,)."""
    centred = vectors.double() - vectors.double().mean(dim=0)
    values, directions = torch.linalg.eigh(centred.T @ centred)           # ascending
    directions = directions[:, -count:].flip(1)                           # (C, count)
    largest = directions.gather(0, directions.abs().argmax(dim=0)[None])  # (1, count)
    directions = directions * largest.sign()   # eigenvectors have an arbitrary sign
    return centred @ directions, values[-count:].flip(0) / values.sum()


def neighbours(vectors, rows, count):
    """Return the nearest other vectors to some of vectors (n, C), by cosine.

    rows: the indices of those some. Returns indices and cosines, (len(rows), count) each, or as
    many as there are."""
    unit = F.normalize(vectors.float(), dim=1)
    cosines = unit[rows] @ unit.T                                         # (rows, n)
    cosines[torch.arange(len(rows)), rows] = -2   # not itself
    found = cosines.topk(min(count, len(vectors) - 1), dim=1)
    return found.indices, found.values
