"""
The numbers of docs/tour.md: the first characters of Tiny Shakespeare, followed through model.py to a loss, a step and a text.

    python docs/tour.py        # reads data/shakespeare_char, which train.py or prepare_shakespeare.py makes

Writes the tour's blocks to stdout; a test holds the page against them, so that it stays true.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))   # model.py is a folder up

import torch

import model as gpt
from lib.configurator import configure
from lib.data import open_dataset

data_dir = 'data'   # where datasets live
configure(globals())


def show(name, t):
    """A tensor's name, its shape, and the first six numbers of its first row."""
    print(f'{name:14} {str(tuple(t.shape)):14}', end='')
    corner = t.detach()
    while corner.dim() > 1:
        corner = corner[0]
    print('  '.join(f'{x:7.3f}' for x in corner[:6].tolist()) + '  ...' * (len(corner) > 6))


data = open_dataset('shakespeare_char', data_dir, needs=('train',))
if data.stand_in_banner():   # other numbers than the page's
    print(data.stand_in_banner(), file=sys.stderr)
print('# text')
T = 8
ids = torch.from_numpy(data.split('train')[0][:2 * T + 1].astype('int64'))
x, y = torch.stack((ids[:T], ids[T:2 * T])), torch.stack((ids[1:T + 1], ids[T + 1:2 * T + 1]))   # (B, T) each, y one later
for row in range(2):
    text, later = (data.tokenizer.decode(t[row].tolist()).decode() for t in (x, y))
    print(f'x[{row}] {text!r:12} {x[row].tolist()}')
    print(f'y[{row}] {later!r:12} {y[row].tolist()}')

print('\n# model')
torch.manual_seed(1337)
model = gpt.GPT(gpt.GPTConfig(block_size=T, vocab_size=data.vocab_size, n_layer=2, n_head=2, n_embd=16))
for name, p in model.named_parameters():
    if '.h.1.' not in name:   # as block 0
        print(f'{name:34} {str(tuple(p.shape)):10} {p.numel():5}')
print(f'{model.num_params():,} parameters, of which the head has none: it is the token embedding')

print('\n# embedding')
wte, wpe, h = model.transformer.wte, model.transformer.wpe, model.transformer.h
token, position = wte(x), wpe.weight[:T]                                                          # (B, T, C), (T, C)
stream = token + position                                                                         # (B, T, C)
for name, t in (('wte(x)', token), ('wpe', position), ('x', stream)):
    show(name, t)

print('\n# attention of block 0')
attn = h[0].attn
normed = h[0].ln_1(stream)                                                                        # (B, T, C)
show('ln_1(x)', normed)
qkv = attn.c_attn(normed)                                                                         # (B, T, 3C)
show('c_attn', qkv)
q, k, v = (t.view(2, T, 2, 8).transpose(1, 2) for t in qkv.chunk(3, dim=2))                       # (B, nh, T, hs)
show('q', q)
weights = gpt.attention_weights(q, k)                                                             # (B, nh, T, T)
print('weights of head 0 on x[0], queries down, keys across:')
for letter, row in zip(data.tokenizer.decode(x[0].tolist()).decode(), weights[0, 0].tolist()):
    print(f'  {letter!r}  ' + '  '.join(f'{w:.3f}' for w in row))
heads = (weights @ v).transpose(1, 2).reshape(2, T, 16)                                           # (B, T, C)
show('weights @ v', heads)
stream = stream + attn.c_proj(heads)                                                              # (B, T, C)
show('x + attention', stream)

print('\n# MLP of block 0')
mlp = h[0].mlp
wide = mlp.c_fc(h[0].ln_2(stream))                                                                # (B, T, 4C)
show('c_fc', wide)
show('gelu', mlp.activation(wide))
stream = stream + mlp.c_proj(mlp.activation(wide))                                                # (B, T, C)
show('x + MLP', stream)

print('\n# head and loss')
stream = model.transformer.ln_f(h[1](stream))                                                     # (B, T, C)
show('ln_f', stream)
logits = model.lm_head(stream)                                                                    # (B, T, V)
show('logits', logits)
chances = logits.softmax(dim=-1).gather(2, y[:, :, None])[:, :, 0]                                # (B, T)
show('p(y)', chances)
loss = -chances.log().mean()
same = model(x, y)[1]
print(f'loss, the mean of -ln p(y): {loss:.4f}; model(x, y) says {same:.4f}; ln 65 = {torch.tensor(65.0).log():.4f}')

print('\n# backward and one step')
same.backward()
for name, p in model.named_parameters():
    if p.dim() == 2 and name.startswith(('transformer.w', 'transformer.h.0')):
        print(f'{name:34} gradient norm {p.grad.norm():.4f}')
optimizer = torch.optim.AdamW(model.optimizer_groups(0.1), lr=1e-2)
optimizer.step()
print(f'loss after one step of AdamW: {model(x, y)[1]:.4f}')

print('\n# by heart')
for _ in range(199):
    optimizer.zero_grad()
    model(x, y)[1].backward()
    optimizer.step()
print(f'loss after 200 steps: {model(x, y)[1]:.1f}')
for row in range(2):
    text = model.generate(x[row:row + 1, :1], T - 1, temperature=0)                               # (1, T)
    first, whole = (data.tokenizer.decode(t.tolist()).decode() for t in (x[row, :1], text[0]))
    print(f'{first!r} goes on: {whole!r}')
