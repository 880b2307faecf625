"""
Write text with a trained model.

    python sample.py --start "ROMEO:"                    # a prompt
    python sample.py --start=FILE:prompt.txt             # from a file, or - for standard input
    python sample.py --checkpoint=out/last.pt --temperature=0 --num_samples=3
    python sample.py --init_from=gpt2 --start="Hello,"   # Hugging Face's weights

Reads best.pt (or last.pt, or nanoGPT's ckpt.pt) in out_dir; writes text to stdout as it is generated.
"""
import codecs
import signal
import sys

import torch

import checkpoint as checkpoints
import runtime
from configurator import configure, fail
from model import chances
from runtime import say

init_from = 'resume'     # 'resume': the run in out_dir; else 'gpt2', 'gpt2-xl', another hub name, or a folder of Hugging Face's
out_dir = 'out'          # folder of the run
checkpoint = ''          # a checkpoint file, instead of the one in out_dir
data_dir = 'data'        # where a checkpoint by nanoGPT finds its vocabulary
start = ''               # the prompt, FILE:path, or - for standard input; empty: as a text begins
num_samples = 1          # texts to write
max_new_tokens = 500     # tokens to add to the prompt
temperature = 0.8        # 0 takes the likeliest token, 1 the model's own odds, more is wilder
top_k = None             # keep the k likeliest tokens only
top_p = None             # keep the fewest tokens that hold this share of the probability
repetition_penalty = 1.0  # above 1, tokens already seen become less likely
stop = ''                # end a text before this string
seed = 1337              # of the first sample; the next ones count up from it, however many there are
kv_cache = True          # remember keys and values of earlier tokens: same text, faster
device = 'auto'          # 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'auto'           # 'float32', 'bfloat16' or 'float16' for matrix products
compile = 'auto'         # torch.compile; 'auto' is off here, where a text is too short to pay for it
configure(globals(), runtime.find_device)

for name, value, good, allowed in (
        ('num_samples', num_samples, num_samples >= 1, '1 or more'),
        ('max_new_tokens', max_new_tokens, max_new_tokens >= 0, '0 or more'),
        ('temperature', temperature, temperature >= 0, '0 or more'),
        ('top_k', top_k, top_k is None or type(top_k) is int and top_k >= 1, 'None or a whole number from 1'),
        ('top_p', top_p, top_p is None or type(top_p) in (int, float) and 0 < top_p <= 1, 'None or above 0 up to 1'),
        ('repetition_penalty', repetition_penalty, repetition_penalty > 0, 'above 0'),
        ('seed', seed, 0 <= seed < 2**63, '0 or more')):
    if not good:
        default = dict(num_samples=1, max_new_tokens=500, temperature=0.8, repetition_penalty=1.0, seed=1337).get(name)
        fail(f'{name}={value!r}: allowed is {allowed}; type --{name}={default}')

model, tokenizer, where, _ = checkpoints.open_model(init_from, out_dir, checkpoint, data_dir)
dtype, compile = runtime.set_up(device, dtype, False if compile == 'auto' else compile)
runtime.cast_matrices(model, dtype)
model.to(device).eval()
say(f'{where}, {model.num_params():,} parameters')
if compile:
    model.hidden = torch.compile(model.hidden, dynamic=True)   # the context grows with every token

LONGEST = 1 << 24   # characters of a prompt
if start == '-':
    if sys.stdin is None:
        fail('--start=- reads standard input, and there is none; type --start=TEXT or --start=FILE:path')
    prompt = sys.stdin.read(LONGEST + 1)
elif start.startswith('FILE:'):
    try:
        with open(start[5:], encoding='utf-8') as f:
            prompt = f.read(LONGEST + 1)
    except (OSError, UnicodeDecodeError) as error:
        fail(f'--start={start}: {error}; FILE: takes a text file in UTF-8')
else:
    prompt = start
if len(prompt) > LONGEST:
    fail(f'--start: a prompt of more than {LONGEST:,} characters; the model sees {model.config.block_size:,} tokens of it; '
         f'type --start=FILE:path for a shorter one')

ids = tokenizer.encode(prompt or tokenizer.opening)
if len(ids) > model.config.block_size:
    say(f'the prompt has {len(ids):,} tokens; the model sees the last {model.config.block_size:,}')
idx = torch.tensor(ids, dtype=torch.long, device=device)[None]                                     # (1, T)

for number in (signal.SIGINT, getattr(signal, 'SIGPIPE', signal.SIGINT)):
    signal.signal(number, signal.SIG_DFL)   # Ctrl-C, or a reader such as head that has seen enough, just ends it


def write(text):
    sys.stdout.buffer.write(text.encode('utf-8', 'surrogateescape'))
    sys.stdout.buffer.flush()


heads = [f'{"-" * 15} sample {i + 1}\n' * (num_samples > 1) + prompt for i in range(num_samples)]
decoders = [codecs.getincrementaldecoder('utf-8')('replace') for _ in heads]   # hold a character back until it is whole
held = [''] * num_samples      # of each text what may be the beginning of `stop`
later = heads[:]               # and what is printed when the texts before it are
ended = [False] * num_samples


def add(i, text):
    """Show more of text i: the first one as it is written, the others after it."""
    if i == 0:
        write(text)
    else:
        later[i] += text


add(0, heads[0])
chance = chances([seed + i for i in range(num_samples)], max_new_tokens).to(device)                # (B, new)
with runtime.autocast(device, dtype):
    for new in model.stream(idx, max_new_tokens, temperature, top_k, top_p, repetition_penalty, chance, kv_cache):
        for i, token in enumerate(new[:, 0].tolist()):
            if not ended[i]:
                ended[i] = token == tokenizer.end
                held[i] += '' if ended[i] else decoders[i].decode(tokenizer.decode([token]))
                if stop and stop in held[i]:
                    held[i], ended[i] = held[i].partition(stop)[0], True
                sure = len(held[i]) if ended[i] else max(0, len(held[i]) - len(stop) + 1) if stop else len(held[i])
                add(i, held[i][:sure])
                held[i] = held[i][sure:]
        if all(ended):
            break
for i in range(num_samples):
    add(i, held[i] + decoders[i].decode(b'', final=True) * (not ended[i]) + '\n')
write(''.join(later[1:]))
