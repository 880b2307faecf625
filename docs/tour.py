"""
The numbers of docs/tour.md: the first characters of Tiny Shakespeare, followed through model.py to
a loss, a step and a text.

    python docs/tour.py

Reads data/shakespeare_char, made by train.py or prepare_shakespeare.py. Writes the page's blocks to
stdout; a test compares them with the page. Letters as in model.py.
"""
import os
import sys

# model.py is one folder up
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

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
