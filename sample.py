"""
Write text with a trained model.

    python sample.py --start "ROMEO:"                    # a prompt
    python sample.py --start=FILE:prompt.txt             # from a file, or - for standard input
    python sample.py --checkpoint=out/last.pt --temperature=1 --num_samples=3
    python sample.py --init_from=gpt2 --start="Hello,"   # Hugging Face's weights

Reads best.pt (or last.pt, or nanoGPT's ckpt.pt) in out_dir; writes text to stdout as it is generated.
"""
import codecs
import functools
import signal

import torch

from lib import checkpoint as checkpoints
from lib import decoding, runtime
from lib.configurator import check, configure
from lib.console import as_typed, fail, read_prompt, say, write
from lib.data import with_split
from model import chances, check_sampling

init_from = 'resume'     # 'resume': the run in out_dir; else 'gpt2', 'gpt2-xl', another hub name, or a folder of Hugging Face's
out_dir = 'out'          # folder of the run
checkpoint = ''          # a checkpoint file, instead of the one in out_dir
data_dir = 'data'        # where datasets live; if not typed, the run's own data_dir is tried first
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
dtype = 'auto'           # 'float32', 'bfloat16' or 'float16' for the matrices; float32: the same text for any num_samples
quantize = ''            # 'int8': a byte a weight, with one scale a row: faster, at a loss that is measured and shown
compile = 'auto'         # torch.compile for the steps of one token; 'auto': when max_new_tokens pays for its seconds
knobs, given = configure(globals(), runtime.find_device)
signal.signal(signal.SIGINT, signal.SIG_DFL)   # Ctrl-C just ends it

check(knobs, num_samples=1, quantize=('', 'int8'), seed=0)
try:
    check_sampling(max_new_tokens, temperature, top_k, top_p, repetition_penalty)
except ValueError as error:
    fail(str(error))
if num_samples * max(1, max_new_tokens) > 1 << 24:
    fail(f'num_samples={num_samples} times max_new_tokens={max_new_tokens} are more than {1 << 24:,} tokens; type '
         f'--max_new_tokens=500, or fewer --num_samples')

opened = checkpoints.open_model(init_from, out_dir, checkpoint, data_dir, given)
model = opened.model
tokenizer = opened.tokenizer
block_size = model.config.block_size

prompt = read_prompt(start)
stop = as_typed(stop)
ids = tokenizer.encode(prompt or tokenizer.opening)
idx = torch.tensor(ids, dtype=torch.long, device=device)[None]                                     # (1, T)

dtype, parameters = runtime.find_dtype(dtype, device), model.num_params()
pays = decoding.compiling_pays(model, device, dtype, quantize, min(max_new_tokens, block_size - len(ids)), num_samples)
dtype, compile = runtime.set_up(device, dtype, compile, pays=pays)
model.to(device).eval()
data, why_not = None, ''
if quantize:
    data, why_not = with_split(opened.dataset, tokenizer, opened.data_dirs)
if data:
    exact, lossy = decoding.quantize_and_compare(model, dtype, data, device)
    say(f'int8: {lossy:.4f} nats a token on a sample of the validation split of {data.folder}, '
        f'{exact:.4f} in float32')
else:
    decoding.narrow(model, dtype, quantize)
    if quantize:
        say(f'note: what int8 costs was not measured: {why_not}; type --data_dir=FOLDER, '
            f'or python evaluate.py --quantize=int8 --dataset=NAME')
say(f'{opened.where}, {parameters:,} parameters, '
    f'{decoding.weight_bytes(model) / 1e6:,.1f} MB of weights to read for a token')
if compile:
    decoding.compile_steps(model)
if len(ids) > block_size:
    say(f'the prompt has {len(ids):,} tokens; the model sees the last {block_size:,}')
beyond = min(max_new_tokens, len(ids) + max_new_tokens - 1 - block_size)
if beyond > 0:
    say(f'{beyond:,} of {max_new_tokens:,} tokens go beyond block_size={block_size}: the window is read anew for each')

titles = [f'{"-" * 15} sample {i + 1}\n' * (num_samples > 1) + prompt for i in range(num_samples)]
decoders = [codecs.getincrementaldecoder('utf-8')('replace') for _ in titles]   # hold a character back until it is whole
held = [''] * num_samples      # of each text what may be the beginning of `stop`
later = titles[:]               # and what is printed when the texts before it are
ended = [False] * num_samples


def add(i, text):   # the first text is shown as it is written, the others after it
    if i == 0:
        write(text)
    else:
        later[i] += text


add(0, titles[0])
chance = chances([seed + i for i in range(num_samples)], max_new_tokens).to(device)                # (B, new)
stream = functools.partial(decoding.graph_stream, model) if device.startswith('cuda') else model.stream
with runtime.autocast(device, 'float32' if device == 'cpu' else dtype):   # a narrowed model needs none there
    for new in stream(idx, max_new_tokens, temperature, top_k, top_p, repetition_penalty, chance, kv_cache):
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
    add(i, held[i] + '\n')   # a character that max_new_tokens cut in two is left out
write(''.join(later[1:]))
