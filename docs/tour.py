"""
The numbers of docs/tour.md: the first characters of Tiny Shakespeare, followed through model.py to
a loss, a step and a text, and then through first_principles.py back from the loss to the weights.

    python docs/tour.py

Reads data/shakespeare_char, made by train.py or prepare_shakespeare.py. Writes the page's blocks to
stdout; a test compares them with the page. Each function prints one block, in the page's order; the
story is at the end of the file. Letters as in model.py.
"""
import os
import sys
from types import SimpleNamespace

# model.py and first_principles.py are one folder up
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import torch

import first_principles as fp
import model as gpt
from lib.configurator import configure
from lib.data import open_dataset

data_dir = 'data'   # where datasets live
configure(globals())

B = 2          # sequences
T = 8          # tokens in each
C = 16         # width
nh = 2         # heads
hs = C // nh   # width of a head
BLOCK = 'transformer.h.0'           # the first block's name
WTE = 'transformer.wte.weight'      # the embedding's, which is the head too

norm = np.linalg.norm


def show(name, t):
    """Print a tensor's name, its shape, and the first six numbers of its first row."""
    row = t.detach()
    while row.dim() > 1:
        row = row[0]
    numbers = '  '.join(f'{x:7.3f}' for x in row[:6].tolist())
    if len(row) > 6:
        numbers += '  ...'
    print(f'{name:14} {str(tuple(t.shape)):14}{numbers}')


def text_of(ids):
    """Return the text of a row of token ids."""
    return data.tokenizer.decode(ids.tolist()).decode()


# ---- the first half: from text to a loss, a step and a text --------------------------------------

def read_text():
    """Return the first characters as x and y, each (B, T)."""
    print('# text')
    ids = torch.from_numpy(data.split('train')[0][:B * T + 1].astype('int64'))
    x = ids[:-1].view(B, T)                                               # (B, T)
    y = ids[1:].view(B, T)                                                # (B, T), one later
    for row in range(B):
        print(f'x[{row}] {text_of(x[row])!r:12} {x[row].tolist()}')
        print(f'y[{row}] {text_of(y[row])!r:12} {y[row].tolist()}')
    return x, y


def make_model():
    """Return a new model of two blocks."""
    print('\n# model')
    torch.manual_seed(1337)
    model = gpt.GPT(gpt.GPTConfig(block_size=T, vocab_size=data.vocab_size, n_layer=2, n_head=nh,
                                  n_embd=C))
    for name, p in model.named_parameters():
        if '.h.1.' not in name:   # block 1 has the shapes of block 0
            print(f'{name:34} {str(tuple(p.shape)):10} {p.numel():5}')
    print(f'{model.num_params():,} parameters, of which the head has none: '
          f'it is the token embedding')
    return model


def embed(model, x):
    """Return the residual stream (B, T, C) that enters block 0."""
    print('\n# embedding')
    token = model.transformer.wte(x)                                      # (B, T, C)
    position = model.transformer.wpe.weight[:T]                           # (T, C)
    stream = token + position                                             # (B, T, C)
    show('wte(x)', token)
    show('wpe', position)
    show('x', stream)
    return stream


def attend(block, stream, x):
    """Return the stream after a block's attention, and head 0's weights and values on x[0]."""
    print('\n# attention of block 0')
    attn = block.attn
    normed = block.ln_1(stream)                                           # (B, T, C)
    show('ln_1(x)', normed)
    qkv = attn.c_attn(normed)                                             # (B, T, 3C)
    show('c_attn', qkv)
    q, k, v = (t.view(B, T, nh, hs).transpose(1, 2) for t in qkv.chunk(3, dim=2))  # (B, nh, T, hs)
    show('q', q)
    weights = gpt.attention_weights(q, k)                                 # (B, nh, T, T)
    print('weights of head 0 on x[0], queries down, keys across:')
    for letter, row in zip(text_of(x[0]), weights[0, 0].tolist()):
        print(f'  {letter!r}  ' + '  '.join(f'{w:.3f}' for w in row))
    heads = (weights @ v).transpose(1, 2).reshape(B, T, C)                # (B, T, C)
    show('weights @ v', heads)
    stream = stream + attn.c_proj(heads)                                  # (B, T, C)
    show('x + attention', stream)
    return stream, weights[0, 0], v[0, 0]


def feed_forward(block, stream):
    """Return the stream (B, T, C) after a block's MLP."""
    print('\n# MLP of block 0')
    wide = block.mlp.c_fc(block.ln_2(stream))                             # (B, T, 4C)
    show('c_fc', wide)
    bent = block.mlp.activation(wide)                                     # (B, T, 4C)
    show('gelu', bent)
    stream = stream + block.mlp.c_proj(bent)                              # (B, T, C)
    show('x + MLP', stream)
    return stream


def find_loss(model, stream, x, y):
    """Return the model's own loss, the same as that of the stream (B, T, C) after block 1."""
    print('\n# head and loss')
    stream = model.transformer.ln_f(stream)                               # (B, T, C)
    show('ln_f', stream)
    logits = model.lm_head(stream)                                        # (B, T, V)
    show('logits', logits)
    probs = logits.softmax(dim=-1)                                        # (B, T, V)
    chances = probs.gather(2, y[:, :, None])[:, :, 0]                     # (B, T)
    show('p(y)', chances)
    loss = -chances.log().mean()
    _, same = model(x, y)
    uniform = torch.tensor(65.0).log()   # the loss where all characters are equally likely
    print(f'loss, the mean of -ln p(y): {loss:.4f}; model(x, y) says {same:.4f}; '
          f'ln 65 = {uniform:.4f}')
    return same


def make_one_step(model, loss, x, y):
    """Take one step of AdamW; return the optimizer, and autograd's {name: gradient}."""
    print('\n# backward and one step')
    loss.backward()
    autograd = {name: p.grad.numpy() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        if p.dim() == 2 and name.startswith(('transformer.w', BLOCK)):
            print(f'{name:34} gradient norm {p.grad.norm():.4f}')
    optimizer = torch.optim.AdamW(model.optimizer_groups(0.1), lr=1e-2)
    optimizer.step()
    _, loss = model(x, y)
    print(f'loss after one step of AdamW: {loss:.4f}')
    return optimizer, autograd


def learn_by_heart(model, optimizer, x, y):
    """Take 199 steps more, and let the model write."""
    print('\n# by heart')
    for _ in range(199):
        optimizer.zero_grad()
        _, loss = model(x, y)
        loss.backward()
        optimizer.step()
    _, loss = model(x, y)
    print(f'loss after 200 steps: {loss:.1f}')
    for row in range(B):
        first = x[row:row + 1, :1]                                        # (1, 1)
        whole = model.generate(first, T - 1, temperature=0)               # (1, T)
        print(f'{text_of(first[0])!r} goes on: {text_of(whole[0])!r}')


# ---- the second half: from the loss back to the weights ------------------------------------------

def show_gradient(name, array):
    """Print a gradient as `show` prints a tensor, times 1,000."""
    show(name, torch.from_numpy(1000 * array))


def cosine(a, b):
    """Return the size of the cosine of the angle between two vectors."""
    return abs(a @ b) / (norm(a) * norm(b))


def try_a_slope(p, idx, targets):
    """Raise one number of the parameters p, and compare the rise of the loss with its gradient."""
    print('\n# a gradient is a slope')
    matrix = p[WTE]                                                       # (V, C)
    low, gradients = fp.loss_and_gradients(p, idx, targets, nh)
    matrix[18, 0] += 0.001
    high, _ = fp.loss_and_gradients(p, idx, targets, nh)
    matrix[18, 0] -= 0.001
    print(f'loss {low:.6f}, and with wte[18, 0] raised by 0.001 {high:.6f}')
    print(f'(rise of the loss) / 0.001 = {(high - low) / 0.001:.4f}')
    print(f"entry [18, 0] of wte's gradient: {gradients[WTE][18, 0]:.4f}")


def go_forward(p, idx, targets):
    """Return the ways back of all steps of a forward pass, and what the page shows of its tensors.

    It prints nothing."""
    f = SimpleNamespace()
    x_0, f.embedding_back = fp.embedding(idx, p)                          # (B, T, C)
    normed, f.ln_1_back = fp.layer_norm(x_0, p, f'{BLOCK}.ln_1')          # (B, T, C)
    qkv, f.c_attn_back = fp.linear(normed, p, f'{BLOCK}.attn.c_attn')     # (B, T, 3C)
    heads, f.attention_back = fp.attention(qkv, nh)                       # (B, T, C)
    branch, f.attn_proj_back = fp.linear(heads, p, f'{BLOCK}.attn.c_proj')   # (B, T, C)
    x_1 = x_0 + branch
    normed, f.ln_2_back = fp.layer_norm(x_1, p, f'{BLOCK}.ln_2')          # (B, T, C)
    wide, f.c_fc_back = fp.linear(normed, p, f'{BLOCK}.mlp.c_fc')         # (B, T, 4C)
    bent, f.gelu_back = fp.gelu(wide)                                     # (B, T, 4C)
    branch, f.mlp_proj_back = fp.linear(bent, p, f'{BLOCK}.mlp.c_proj')   # (B, T, C)
    f.x_2, f.block_1_back = fp.block(x_1 + branch, p, 'transformer.h.1', nh)   # (B, T, C)
    f.normed, f.ln_f_back = fp.layer_norm(f.x_2, p, 'transformer.ln_f')   # (B, T, C)
    _, f.loss_back = fp.cross_entropy(f.normed @ p[WTE].T, targets)
    return f


def back_to_the_head(p, f, targets, back):
    """Return the gradient (B, T, C) of what the head reads; put that of the head into back."""
    print('\n# gradients of the loss and of the head')
    dlogits = f.loss_back()                                               # (B, T, V)
    answer = targets[0, 0]
    show_gradient('dlogits', dlogits)
    print(f"at 'F': 'i' {1000 * dlogits[0, 0, answer]:.3f}, all others together "
          f'{1000 * np.delete(dlogits[0, 0], answer).sum():.3f}')
    back[WTE] = np.tensordot(dlogits, f.normed, axes=((0, 1), (0, 1)))    # (V, C)
    dnormed = dlogits @ p[WTE]                                            # (B, T, C)
    show_gradient('d ln_f(x)', dnormed)
    return dnormed


def back_through_the_last_norm(f, dnormed, back):
    """Return the gradient (B, T, C) of the stream after block 1."""
    print('\n# gradient of layer norm')
    dx_2 = f.ln_f_back(dnormed, back)                                     # (B, T, C)
    deviation = f.x_2[0, 0].std()
    show_gradient('dx, block 1', dx_2)
    print(f"at 'F': the deviation of x is {deviation:.4f}, and 1/deviation {1 / deviation:.1f}")
    for name, direction in (('(1, ..., 1)', np.ones(C)), ('ln_f(x)', f.normed[0, 0])):
        print(f'cosine with {name:12} before {cosine(dnormed[0, 0], direction):.3f}, after '
              f'{cosine(dx_2[0, 0], direction):.3f}')
    return dx_2


def back_through_the_mlp(f, dx_2, back):
    """Return the gradient (B, T, C) of the stream between attention and MLP of block 0."""
    print('\n# gradients of the MLP of block 0')
    dx_1 = f.block_1_back(dx_2, back)                                     # (B, T, C)
    dbent = f.mlp_proj_back(dx_1, back)                                   # (B, T, 4C)
    dwide = f.gelu_back(dbent)                                            # (B, T, 4C)
    dbranch = f.ln_2_back(f.c_fc_back(dwide, back), back)                 # (B, T, C)
    show_gradient('dx, block 0', dx_1)
    show_gradient('d gelu', dbent)
    show('slope of gelu', torch.from_numpy(dwide / dbent))
    show_gradient('d c_fc', dwide)
    show_gradient('d branch', dbranch)
    dx_1 = dx_1 + dbranch
    show_gradient('dx, their sum', dx_1)
    return dx_1


def back_through_the_attention(f, dx_1, weights, values, back):
    """Return the gradient (B, T, C) of the embedding.

    weights (T, T) and values (T, hs) are those of head 0 on x[0]."""
    print('\n# gradients of the attention of block 0')
    dheads = f.attn_proj_back(dx_1, back)                                 # (B, T, C)
    dqkv = f.attention_back(dheads)                                       # (B, T, 3C)
    dbranch = f.ln_1_back(f.c_attn_back(dqkv, back), back)                # (B, T, C)
    row = weights[2]                                                      # (T,), of the query 'r'
    drow = values @ dheads[0, 2, :hs]                                     # (T,)
    dscores = row * (drow - row @ drow)                                   # (T,)
    show_gradient('d heads', dheads)
    print("row 'r' of head 0 on x[0]:")
    for name, numbers in (('weights', row), ('d weights', 1000 * drow),
                          ('d scores', 1000 * dscores)):
        print(f'  {name:9}' + '  '.join(f'{number:7.4f}' for number in numbers[:4]) + '  ...')
    show_gradient('d c_attn', dqkv)
    show_gradient('d v', dqkv[:, :, 2 * C:])
    dx_0 = dx_1 + dbranch
    show_gradient('dx', dx_0)
    return dx_0


def back_to_the_embedding(f, dx_0, back, autograd):
    """Finish the gradients in back, and compare them with autograd's."""
    print('\n# gradient of the embedding')
    head = back[WTE].copy()                                               # (V, C)
    f.embedding_back(dx_0, back)
    both = back[WTE]                                                      # (V, C)
    print(f'gradient norm of wte: from the head {norm(head):.4f}, from the embedding '
          f'{norm(both - head):.4f}, of their sum {norm(both):.4f}')
    largest = max(norm(back[name] - autograd[name]) / norm(autograd[name]) for name in autograd)
    print(f'{len(back)} gradients; the largest relative difference to autograd: {largest:.4f}')


def step_by_hand(p, back, idx, targets):
    """Take AdamW's first step with the gradients in back."""
    print("\n# AdamW's first step")
    started = {name: array.copy() for name, array in p.items()}
    fp.adamw(p, back, {}, 1, 1e-2, (0.9, 0.999), 0.1)
    for name in (WTE, f'{BLOCK}.attn.c_attn.weight', f'{BLOCK}.mlp.c_fc.weight'):
        print(f'{name:34} [0, 0]: gradient {1000 * back[name][0, 0]:7.3f}, moved from '
              f'{started[name][0, 0]:7.4f} to {p[name][0, 0]:7.4f}')
    low, _ = fp.loss_and_gradients(p, idx, targets, nh)
    print(f'loss after one step of AdamW: {low:.4f}')


# ---- the story -----------------------------------------------------------------------------------

data = open_dataset('shakespeare_char', data_dir, needs=('train',))
if data.stand_in_banner():   # a stand-in's numbers are not the page's
    print(data.stand_in_banner(), file=sys.stderr)

x, y = read_text()
model = make_model()
fresh = {name: p.detach().double().numpy() for name, p in model.named_parameters()}   # copies
blocks = model.transformer.h
stream = embed(model, x)
stream, weights, values = attend(blocks[0], stream, x)
stream = feed_forward(blocks[0], stream)
stream = blocks[1](stream)
loss = find_loss(model, stream, x, y)
optimizer, autograd = make_one_step(model, loss, x, y)
learn_by_heart(model, optimizer, x, y)

idx = x.numpy()
targets = y.numpy()
back = {}   # {name: gradient}, filled from the loss back to the embedding
try_a_slope(fresh, idx, targets)
forward = go_forward(fresh, idx, targets)
dnormed = back_to_the_head(fresh, forward, targets, back)
dx_2 = back_through_the_last_norm(forward, dnormed, back)
dx_1 = back_through_the_mlp(forward, dx_2, back)
weights = weights.detach().double().numpy()                               # (T, T)
values = values.detach().double().numpy()                                 # (T, hs)
dx_0 = back_through_the_attention(forward, dx_1, weights, values, back)
back_to_the_embedding(forward, dx_0, back, autograd)
step_by_hand(fresh, back, idx, targets)
