"""
GPT-2 from first principles: forward pass, backward pass, AdamW, training and sampling in NumPy.

    python first_principles.py --input=FILE    # learns a text for a minute, and writes one like it

Reads a text file, whose characters are the tokens; writes text to stdout. Net, names and letters
are model.py's. There PyTorch derives the backward pass; here it is written by hand.

A gradient dx has the shape of x, and says by how much the loss rises for each unit by which an
entry of x rises. Every operation returns (y, backward), where backward(dy, g) returns dx and writes
the gradients of the operation's weights into g, a dict {name: gradient}.
"""
import argparse
import math
import sys

import numpy as np

# ---- the operations, each with its backward pass -------------------------------------------------

def embedding(idx, p):
    """Return each token's vector plus its place's vector: idx (B, T) -> (B, T, C)."""
    T = idx.shape[1]
    x = p['transformer.wte.weight'][idx] + p['transformer.wpe.weight'][:T]         # (B, T, C)

    def backward(dx, g):
        """A row that was used at several places gets the sum of their gradients."""
        np.add.at(g['transformer.wte.weight'], idx, dx)   # (V, C), to which the head has written
        g['transformer.wpe.weight'] = np.zeros_like(p['transformer.wpe.weight'])
        g['transformer.wpe.weight'][:T] = dx.sum(axis=0)                           # (T, C)
    return x, backward


def linear(x, p, name):
    """Return x @ weight.T + bias: (B, T, in) -> (B, T, out), with weight (out, in)."""
    weight = p[f'{name}.weight']
    y = x @ weight.T + p[f'{name}.bias']                                           # (B, T, out)

    def backward(dy, g):
        """In a product, each factor's gradient is dy times the other factor; a weight's is summed
        over the B·T tokens that it serves."""
        g[f'{name}.weight'] = np.tensordot(dy, x, axes=((0, 1), (0, 1)))           # (out, in)
        g[f'{name}.bias'] = dy.sum(axis=(0, 1))                                    # (out,)
        return dy @ weight                                                         # (B, T, in)
    return y, backward


def layer_norm(x, p, name):
    """Bring each token's C numbers to mean 0 and variance 1; then multiply by weight, add bias."""
    weight = p[f'{name}.weight']                                                   # (C,)
    centered = x - x.mean(axis=-1, keepdims=True)                                  # (B, T, C)
    variance = (centered * centered).mean(axis=-1, keepdims=True)                  # (B, T, 1)
    scale = 1 / np.sqrt(variance + 1e-5)                                           # (B, T, 1)
    normed = centered * scale                                                      # (B, T, C)
    y = normed * weight + p[f'{name}.bias']

    def backward(dy, g):
        """x cannot change the mean of `normed`, and hardly (for the 1e-5) its variance: the parts
        of dnormed along (1, ..., 1) and along `normed` are removed."""
        g[f'{name}.weight'] = (dy * normed).sum(axis=(0, 1))                       # (C,)
        g[f'{name}.bias'] = dy.sum(axis=(0, 1))                                    # (C,)
        dnormed = dy * weight                                                      # (B, T, C)
        along_ones = dnormed.mean(axis=-1, keepdims=True)                          # (B, T, 1)
        along_normed = (dnormed * normed).mean(axis=-1, keepdims=True)             # (B, T, 1)
        return (dnormed - along_ones - normed * along_normed) * scale              # (B, T, C)
    return y, backward


def softmax(x):
    """Return e^x, divided so that each row, along the last axis, sums to 1. Any shape."""
    y = np.exp(x - x.max(axis=-1, keepdims=True))   # the shift cancels, and e^x cannot overflow
    y /= y.sum(axis=-1, keepdims=True)

    def backward(dy):
        """A rise of x[j] raises y[j], and lowers all of y in proportion, as the sum stays 1."""
        return y * (dy - (y * dy).sum(axis=-1, keepdims=True))
    return y, backward


def attention(qkv, n_head):
    """Return the mean of the values up to each place, weighted in each head by its own
    softmax(query · key / √hs): (B, T, 3C) -> (B, T, C)."""
    B, T, width = qkv.shape
    root = math.sqrt(width // (3 * n_head))                                        # √hs
    q, k, v = qkv.reshape(B, T, 3, n_head, -1).transpose(2, 0, 3, 1, 4)            # (B, nh, T, hs)
    future = np.triu(np.ones((T, T), dtype=bool), k=1)                             # (T, T)
    scores = np.where(future, -np.inf, q @ k.swapaxes(2, 3) / root)                # (B, nh, T, T)
    weights, softmax_back = softmax(scores)                                        # (B, nh, T, T)
    y = (weights @ v).swapaxes(1, 2).reshape(B, T, -1)   # (B, T, C), the heads side by side

    def backward(dy):
        """Both products follow the rule in `linear`; softmax_back multiplies by the weights, which
        are 0 for future keys."""
        dy = dy.reshape(B, T, n_head, -1).swapaxes(1, 2)                           # (B, nh, T, hs)
        dv = weights.swapaxes(2, 3) @ dy                                           # (B, nh, T, hs)
        dscores = softmax_back(dy @ v.swapaxes(2, 3)) / root                       # (B, nh, T, T)
        dq = dscores @ k                                                           # (B, nh, T, hs)
        dk = dscores.swapaxes(2, 3) @ q                                            # (B, nh, T, hs)
        dqkv = np.stack((dq, dk, dv)).transpose(1, 3, 0, 2, 4)                 # (B, T, 3, nh, hs)
        return dqkv.reshape(B, T, width)                                           # (B, T, 3C)
    return y, backward


def gelu(x):
    """Return x/2 · (1 + tanh u) with u = √(2/π) · (x + 0.044715 x³). Any shape."""
    factor = math.sqrt(2 / math.pi)
    square = x * x
    tanh = np.tanh(factor * x * (1 + 0.044715 * square))

    def backward(dy):
        """The product rule for x/2 and 1 + tanh u; the derivative of tanh u is 1 - tanh² u."""
        du = factor * (1 + 3 * 0.044715 * square)
        return dy * 0.5 * (1 + tanh + x * (1 - tanh * tanh) * du)
    return 0.5 * x * (1 + tanh), backward


def cross_entropy(logits, targets):
    """Return the mean of -ln p over the targets (B, T), where p is the softmax of the logits."""
    target = *np.indices(targets.shape), targets   # selects (B, T) of (B, T, V)
    probs, _ = softmax(logits)                                                     # (B, T, V)

    def backward():
        """-ln p = ln(sum of e^logit) - the target's logit: their derivatives are probs and 1."""
        dlogits = probs / targets.size                                             # (B, T, V)
        dlogits[target] -= 1 / targets.size
        return dlogits
    return -np.log(probs[target]).mean(), backward


# ---- the net -------------------------------------------------------------------------------------

def parameters(n_layer, n_head, n_embd, block_size, vocab_size, seed):
    """Return {name: array} in float64, drawn as in model.py. n_head must divide n_embd."""
    rng = np.random.default_rng(seed)
    C = n_embd
    own = {'ln_1': (C,), 'attn.c_attn': (3 * C, C), 'attn.c_proj': (C, C),
           'ln_2': (C,), 'mlp.c_fc': (4 * C, C), 'mlp.c_proj': (C, 4 * C)}
    shapes = {f'transformer.h.{layer}.{name}': shape
              for layer in range(n_layer) for name, shape in own.items()}
    shapes['transformer.ln_f'] = (C,)
    p = {'transformer.wte.weight': rng.normal(0, 0.02, (vocab_size, C)),
         'transformer.wpe.weight': rng.normal(0, 0.02, (block_size, C))}
    for name, shape in shapes.items():
        weight = np.ones(C) if shape == (C,) else rng.normal(0, 0.02, shape)
        if name.endswith('c_proj'):   # the 2·n_layer branches that add to x start smaller
            weight /= math.sqrt(2 * n_layer)
        p[f'{name}.weight'] = weight
        p[f'{name}.bias'] = np.zeros(shape[0])
    return p


def block(x, p, h, n_head):
    """Add attention to x, then the MLP: (B, T, C) -> (B, T, C). h: the block's name in p."""
    y, ln_1_back = layer_norm(x, p, f'{h}.ln_1')                                   # (B, T, C)
    y, c_attn_back = linear(y, p, f'{h}.attn.c_attn')                              # (B, T, 3C)
    y, attention_back = attention(y, n_head)                                       # (B, T, C)
    y, attn_proj_back = linear(y, p, f'{h}.attn.c_proj')                           # (B, T, C)
    x = x + y
    y, ln_2_back = layer_norm(x, p, f'{h}.ln_2')                                   # (B, T, C)
    y, c_fc_back = linear(y, p, f'{h}.mlp.c_fc')                                   # (B, T, 4C)
    y, gelu_back = gelu(y)                                                         # (B, T, 4C)
    y, mlp_proj_back = linear(y, p, f'{h}.mlp.c_proj')                             # (B, T, C)

    def backward(dx, g):
        """The same steps from last to first; a sum x + y passes its gradient to both terms."""
        dy = gelu_back(mlp_proj_back(dx, g))                                       # (B, T, 4C)
        dx = dx + ln_2_back(c_fc_back(dy, g), g)                                   # (B, T, C)
        dy = attention_back(attn_proj_back(dx, g))                                 # (B, T, 3C)
        return dx + ln_1_back(c_attn_back(dy, g), g)                               # (B, T, C)
    return x + y, backward


def forward(p, idx, n_head):
    """Return (logits (B, T, V), backward) for idx (B, T)."""
    x, embedding_back = embedding(idx, p)                                          # (B, T, C)
    block_backs = []
    while f'transformer.h.{len(block_backs)}.ln_1.weight' in p:
        x, block_back = block(x, p, f'transformer.h.{len(block_backs)}', n_head)   # (B, T, C)
        block_backs.append(block_back)
    x, ln_f_back = layer_norm(x, p, 'transformer.ln_f')                            # (B, T, C)
    wte = p['transformer.wte.weight']

    def backward(dlogits):
        """Return {name: gradient}. The head is `linear` with the embedding's matrix, no bias."""
        g = {'transformer.wte.weight': np.tensordot(dlogits, x, axes=((0, 1), (0, 1)))}
        dx = ln_f_back(dlogits @ wte, g)                                           # (B, T, C)
        for block_back in reversed(block_backs):
            dx = block_back(dx, g)                                                 # (B, T, C)
        embedding_back(dx, g)
        return g
    return x @ wte.T, backward


def loss_and_gradients(p, idx, targets, n_head):
    """Return (the mean loss in nats, {name: gradient}). idx and targets (B, T)."""
    logits, backward = forward(p, idx, n_head)                                     # (B, T, V)
    loss, loss_back = cross_entropy(logits, targets)
    return loss, backward(loss_back())


# ---- training, sampling and the command ----------------------------------------------------------

def adamw(p, gradients, state, step, learning_rate, betas, weight_decay):
    """Update p in place. state: {} before the first step. step: 1, 2, 3, ...

    An entry moves by its mean gradient over the root of the mean square. Both means start at 0, and
    dividing by 1 - beta^step makes up for that. Matrices decay, vectors do not. arXiv 1711.05101"""
    for name, gradient in gradients.items():
        mean, square = state.setdefault(name, (np.zeros_like(gradient), np.zeros_like(gradient)))
        mean += (1 - betas[0]) * (gradient - mean)
        square += (1 - betas[1]) * (gradient * gradient - square)
        if gradient.ndim == 2:
            p[name] *= 1 - learning_rate * weight_decay
        root = np.sqrt(square / (1 - betas[1]**step)) + 1e-8
        p[name] -= learning_rate * mean / (1 - betas[0]**step) / root


def train(p, tokens, knobs, rng):
    """Train p on random windows. The rate rises for 50 steps, and falls to 0 at the end."""
    state = {}
    for step in range(1, knobs.max_iters + 1):
        starts = rng.integers(len(tokens) - knobs.block_size, size=(knobs.batch_size, 1))
        places = starts + np.arange(knobs.block_size)                              # (B, T)
        loss, g = loss_and_gradients(p, tokens[places], tokens[places + 1], knobs.n_head)
        if not math.isfinite(loss):
            fail(f'step {step}: the loss is {loss}; allowed is a finite one; '
                 f'type --learning_rate={knobs.learning_rate / 10:g}')
        rate = knobs.learning_rate * min(step / 50, 1 - (step - 1) / knobs.max_iters)
        adamw(p, g, state, step, rate, betas=(0.9, 0.99), weight_decay=0.1)
        if step % 100 == 0 or step == knobs.max_iters:
            print(f'step {step}: loss {loss:.3f}', file=sys.stderr)


def next_token(p, tokens, knobs, rng):
    """Draw the token after a list of tokens. A low temperature takes the likeliest."""
    logits, _ = forward(p, np.array([tokens[-knobs.block_size:]]), knobs.n_head)   # (1, T, V)
    probs, _ = softmax(logits[0, -1] / knobs.temperature)                          # (V,)
    return int(rng.choice(len(probs), p=probs))


def fail(message):
    """End with one line: what is wrong, what is allowed, what to type."""
    print(f'error: {message}', file=sys.stderr)
    sys.exit(2)


class Flags(argparse.ArgumentParser):
    def error(self, message):
        fail(f'{message}; --help lists what is allowed; type python {self.prog} --input=FILE')


def read_flags():
    """Return what the command line says, as an object with a field for each flag."""
    flags = Flags(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flags.add_argument('--input', metavar='FILE', required=True, help='text in UTF-8')
    flags.add_argument('--n_layer', type=int, default=2, help='blocks')
    flags.add_argument('--n_head', type=int, default=4, help='attention heads in a block')
    flags.add_argument('--n_embd', type=int, default=64, help='width')
    flags.add_argument('--block_size', type=int, default=64, help='characters of context')
    flags.add_argument('--batch_size', type=int, default=16, help='sequences in a step')
    flags.add_argument('--max_iters', type=int, default=1500, help='steps')
    flags.add_argument('--learning_rate', type=float, default=1e-2, help="AdamW's peak")
    flags.add_argument('--temperature', type=float, default=0.8, help='of sampling')
    flags.add_argument('--max_new_tokens', type=int, default=500, help='characters to write')
    flags.add_argument('--seed', type=int, default=1337, help='decides weights and windows')
    return flags.parse_args()


def main():
    np.seterr(all='ignore')   # `train` checks the loss instead
    knobs = read_flags()
    for name, value in vars(knobs).items():
        if name != 'input' and not 0 < value < math.inf:
            fail(f'{name}={value}: allowed are numbers above 0; type --{name}=1')
    if knobs.n_embd % knobs.n_head:
        fail(f'n_embd={knobs.n_embd} does not divide by n_head={knobs.n_head}; allowed are '
             f'multiples; type --n_embd={knobs.n_head * 16}')
    try:
        with open(knobs.input, encoding='utf-8') as f:
            text = f.read()
    except (OSError, ValueError) as error:   # ValueError: not UTF-8
        fail(f'{knobs.input}: {error}; allowed is a text file in UTF-8; type --input=FILE')
    if len(text) <= knobs.block_size:
        fail(f'{knobs.input} has {len(text)} characters; allowed are more than block_size='
             f'{knobs.block_size}; type --input=FILE with a longer text, or a smaller --block_size')
    characters, tokens = np.unique(list(text), return_inverse=True)
    rng = np.random.default_rng(knobs.seed)
    p = parameters(knobs.n_layer, knobs.n_head, knobs.n_embd, knobs.block_size, len(characters),
                   knobs.seed)
    # float64 shows a wrong formula, as nothing hides in rounding; float32 trains twice as fast
    p = {name: array.astype(np.float32) for name, array in p.items()}
    train(p, tokens, knobs, rng)
    written = [tokens[0]]
    for _ in range(knobs.max_new_tokens):
        written.append(next_token(p, written, knobs, rng))
    print(''.join(characters[written]))


if __name__ == '__main__':
    main()
