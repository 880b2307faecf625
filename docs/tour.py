"""
The numbers of docs/tour.md: the first characters of Tiny Shakespeare, followed through model.py to
a loss, a step and a text, and then through first_principles.py back from the loss to the weights.

    python docs/tour.py

Reads data/shakespeare_char, made by train.py or prepare_shakespeare.py. Writes the page's blocks to
stdout; a test compares them with the page. Letters as in model.py.
"""
import os
import sys

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


data = open_dataset('shakespeare_char', data_dir, needs=('train',))
if data.stand_in_banner():   # a stand-in's numbers are not the page's
    print(data.stand_in_banner(), file=sys.stderr)

print('# text')
ids = torch.from_numpy(data.split('train')[0][:B * T + 1].astype('int64'))
x = ids[:-1].view(B, T)                                                   # (B, T)
y = ids[1:].view(B, T)                                                    # (B, T), one later
for row in range(B):
    print(f'x[{row}] {text_of(x[row])!r:12} {x[row].tolist()}')
    print(f'y[{row}] {text_of(y[row])!r:12} {y[row].tolist()}')

print('\n# model')
torch.manual_seed(1337)
model = gpt.GPT(gpt.GPTConfig(block_size=T, vocab_size=data.vocab_size, n_layer=2, n_head=nh,
                              n_embd=C))
for name, p in model.named_parameters():
    if '.h.1.' not in name:   # block 1 has the shapes of block 0
        print(f'{name:34} {str(tuple(p.shape)):10} {p.numel():5}')
fresh = {name: p.detach().double().numpy() for name, p in model.named_parameters()}   # copies
print(f'{model.num_params():,} parameters, of which the head has none: it is the token embedding')

print('\n# embedding')
wte = model.transformer.wte
wpe = model.transformer.wpe
h = model.transformer.h
token = wte(x)                                                            # (B, T, C)
position = wpe.weight[:T]                                                 # (T, C)
stream = token + position                                                 # (B, T, C)
show('wte(x)', token)
show('wpe', position)
show('x', stream)

print('\n# attention of block 0')
attn = h[0].attn
normed = h[0].ln_1(stream)                                                # (B, T, C)
show('ln_1(x)', normed)
qkv = attn.c_attn(normed)                                                 # (B, T, 3C)
show('c_attn', qkv)
q, k, v = (t.view(B, T, nh, hs).transpose(1, 2) for t in qkv.chunk(3, dim=2))   # (B, nh, T, hs)
show('q', q)
weights = gpt.attention_weights(q, k)                                     # (B, nh, T, T)
print('weights of head 0 on x[0], queries down, keys across:')
for letter, row in zip(text_of(x[0]), weights[0, 0].tolist()):
    print(f'  {letter!r}  ' + '  '.join(f'{w:.3f}' for w in row))
heads = (weights @ v).transpose(1, 2).reshape(B, T, C)                    # (B, T, C)
show('weights @ v', heads)
stream = stream + attn.c_proj(heads)                                      # (B, T, C)
show('x + attention', stream)

print('\n# MLP of block 0')
mlp = h[0].mlp
wide = mlp.c_fc(h[0].ln_2(stream))                                        # (B, T, 4C)
show('c_fc', wide)
bent = mlp.activation(wide)                                               # (B, T, 4C)
show('gelu', bent)
stream = stream + mlp.c_proj(bent)                                        # (B, T, C)
show('x + MLP', stream)

print('\n# head and loss')
stream = h[1](stream)                                                     # (B, T, C)
stream = model.transformer.ln_f(stream)                                   # (B, T, C)
show('ln_f', stream)
logits = model.lm_head(stream)                                            # (B, T, V)
show('logits', logits)
probs = logits.softmax(dim=-1)                                            # (B, T, V)
chances = probs.gather(2, y[:, :, None])[:, :, 0]                         # (B, T)
show('p(y)', chances)
loss = -chances.log().mean()
_, same = model(x, y)
uniform = torch.tensor(65.0).log()   # the loss where all characters are equally likely
print(f'loss, the mean of -ln p(y): {loss:.4f}; model(x, y) says {same:.4f}; '
      f'ln 65 = {uniform:.4f}')

print('\n# backward and one step')
same.backward()
autograd = {name: p.grad.numpy() for name, p in model.named_parameters()}
for name, p in model.named_parameters():
    if p.dim() == 2 and name.startswith(('transformer.w', 'transformer.h.0')):
        print(f'{name:34} gradient norm {p.grad.norm():.4f}')
optimizer = torch.optim.AdamW(model.optimizer_groups(0.1), lr=1e-2)
optimizer.step()
_, loss = model(x, y)
print(f'loss after one step of AdamW: {loss:.4f}')

print('\n# by heart')
for _ in range(199):
    optimizer.zero_grad()
    _, loss = model(x, y)
    loss.backward()
    optimizer.step()
_, loss = model(x, y)
print(f'loss after 200 steps: {loss:.1f}')
for row in range(B):
    first = x[row:row + 1, :1]                                            # (1, 1)
    whole = model.generate(first, T - 1, temperature=0)                   # (1, T)
    print(f'{text_of(first[0])!r} goes on: {text_of(whole[0])!r}')

# ---- the second half: from the loss back to the weights ------------------------------------------

norm = np.linalg.norm


def show_gradient(name, array):
    """Print a gradient as `show` prints a tensor, times 1,000."""
    show(name, torch.from_numpy(1000 * array))


def cosine(a, b):
    """Return the size of the cosine of the angle between two vectors."""
    return abs(a @ b) / (norm(a) * norm(b))


print('\n# a gradient is a slope')
idx = x.numpy()
targets = y.numpy()
matrix = fresh['transformer.wte.weight']                                  # (V, C)
low, gradients = fp.loss_and_gradients(fresh, idx, targets, nh)
matrix[18, 0] += 0.001
high, _ = fp.loss_and_gradients(fresh, idx, targets, nh)
matrix[18, 0] -= 0.001
print(f'loss {low:.6f}, and with wte[18, 0] raised by 0.001 {high:.6f}')
print(f'(rise of the loss) / 0.001 = {(high - low) / 0.001:.4f}')
print(f"entry [18, 0] of wte's gradient: {gradients['transformer.wte.weight'][18, 0]:.4f}")

# the forward pass again, now with the way back of every step
block = 'transformer.h.0'
x_0, embedding_back = fp.embedding(idx, fresh)                            # (B, T, C)
normed_1, ln_1_back = fp.layer_norm(x_0, fresh, f'{block}.ln_1')          # (B, T, C)
qkv, c_attn_back = fp.linear(normed_1, fresh, f'{block}.attn.c_attn')     # (B, T, 3C)
heads, attention_back = fp.attention(qkv, nh)                             # (B, T, C)
branch, attn_proj_back = fp.linear(heads, fresh, f'{block}.attn.c_proj')  # (B, T, C)
x_1 = x_0 + branch
normed_2, ln_2_back = fp.layer_norm(x_1, fresh, f'{block}.ln_2')          # (B, T, C)
wide, c_fc_back = fp.linear(normed_2, fresh, f'{block}.mlp.c_fc')         # (B, T, 4C)
bent, gelu_back = fp.gelu(wide)                                           # (B, T, 4C)
branch, mlp_proj_back = fp.linear(bent, fresh, f'{block}.mlp.c_proj')     # (B, T, C)
x_2, block_1_back = fp.block(x_1 + branch, fresh, 'transformer.h.1', nh)  # (B, T, C)
normed_f, ln_f_back = fp.layer_norm(x_2, fresh, 'transformer.ln_f')       # (B, T, C)
_, loss_back = fp.cross_entropy(normed_f @ matrix.T, targets)

print('\n# gradients of the loss and of the head')
dlogits = loss_back()                                                     # (B, T, V)
answer = targets[0, 0]
show_gradient('dlogits', dlogits)
print(f"at 'F': 'i' {1000 * dlogits[0, 0, answer]:.3f}, all others together "
      f'{1000 * np.delete(dlogits[0, 0], answer).sum():.3f}')
back = {'transformer.wte.weight': np.tensordot(dlogits, normed_f, axes=((0, 1), (0, 1)))}
dnormed = dlogits @ matrix                                                # (B, T, C)
show_gradient('d ln_f(x)', dnormed)

print('\n# gradient of layer norm')
dx_2 = ln_f_back(dnormed, back)                                           # (B, T, C)
show_gradient('dx, block 1', dx_2)
print(f"at 'F': the deviation of x is {x_2[0, 0].std():.4f}, and 1/deviation "
      f'{1 / x_2[0, 0].std():.1f}')
for name, direction in (('(1, ..., 1)', np.ones(C)), ('ln_f(x)', normed_f[0, 0])):
    print(f'cosine with {name:12} before {cosine(dnormed[0, 0], direction):.3f}, after '
          f'{cosine(dx_2[0, 0], direction):.3f}')

print('\n# gradients of the MLP of block 0')
dx_1 = block_1_back(dx_2, back)                                           # (B, T, C)
dbent = mlp_proj_back(dx_1, back)                                         # (B, T, 4C)
dwide = gelu_back(dbent)                                                  # (B, T, 4C)
dbranch = ln_2_back(c_fc_back(dwide, back), back)                         # (B, T, C)
show_gradient('dx, block 0', dx_1)
show_gradient('d gelu', dbent)
show('slope of gelu', torch.from_numpy(dwide / dbent))
show_gradient('d c_fc', dwide)
show_gradient('d branch', dbranch)
dx_1 = dx_1 + dbranch
show_gradient('dx, their sum', dx_1)

print('\n# gradients of the attention of block 0')
dheads = attn_proj_back(dx_1, back)                                       # (B, T, C)
dqkv = attention_back(dheads)                                             # (B, T, 3C)
dbranch = ln_1_back(c_attn_back(dqkv, back), back)                        # (B, T, C)
dx_0 = dx_1 + dbranch
values = v.detach().double().numpy()[0, 0]                                # (T, hs)
row = weights[0, 0, 2].detach().double().numpy()                          # (T,), of the query 'r'
drow = values @ dheads[0, 2, :hs]                                         # (T,)
dscores = row * (drow - row @ drow)                                       # (T,)
show_gradient('d heads', dheads)
print("row 'r' of head 0 on x[0]:")
for name, numbers in (('weights', row), ('d weights', 1000 * drow), ('d scores', 1000 * dscores)):
    print(f'  {name:9}' + '  '.join(f'{number:7.4f}' for number in numbers[:4]) + '  ...')
show_gradient('d c_attn', dqkv)
show_gradient('d v', dqkv[:, :, 2 * C:])
show_gradient('dx', dx_0)

print('\n# gradient of the embedding')
head = back['transformer.wte.weight'].copy()                              # (V, C)
embedding_back(dx_0, back)
both = back['transformer.wte.weight']                                     # (V, C)
print(f'gradient norm of wte: from the head {norm(head):.4f}, from the embedding '
      f'{norm(both - head):.4f}, of their sum {norm(both):.4f}')
largest = max(norm(back[name] - autograd[name]) / norm(autograd[name]) for name in autograd)
print(f'{len(back)} gradients; the largest relative difference to autograd: {largest:.4f}')

print("\n# AdamW's first step")
started = {name: array.copy() for name, array in fresh.items()}
fp.adamw(fresh, back, {}, 1, 1e-2, (0.9, 0.999), 0.1)
for name in ('transformer.wte.weight', f'{block}.attn.c_attn.weight', f'{block}.mlp.c_fc.weight'):
    print(f'{name:34} [0, 0]: gradient {1000 * back[name][0, 0]:7.3f}, moved from '
          f'{started[name][0, 0]:7.4f} to {fresh[name][0, 0]:7.4f}')
low, _ = fp.loss_and_gradients(fresh, idx, targets, nh)
print(f'loss after one step of AdamW: {low:.4f}')
