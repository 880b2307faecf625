"""
Write text with a trained model.

    python sample.py --start "ROMEO:"                    # a prompt
    python sample.py --start=FILE:prompt.txt             # from a file, or - for standard input
    python sample.py --checkpoint=out/last.pt --temperature=1 --num_samples=3
    python sample.py --init_from=gpt2 --start="Hello,"   # Hugging Face's weights

Reads best.pt (or last.pt, or nanoGPT's ckpt.pt) in out_dir; writes text to stdout as it comes.
"""
import codecs
import shlex
import signal

import lib.early  # noqa: F401  # before NumPy and torch

import torch

from lib import decoding, runtime
from lib.configurator import check, configure
from lib.console import as_typed, fail, read_prompt, say, write
from lib.data import with_split
from lib.run_folder import flag
from lib.starting import open_model
from model import GPT, Sampling, chances

init_from = 'resume'     # 'resume': the run in out_dir; else 'gpt2', a hub name, or a folder
out_dir = 'out'          # folder of the run
checkpoint = ''          # a checkpoint file, instead of the one in out_dir
data_dir = 'data'        # where the run's dataset is; if not typed, the run's own is tried first
start = ''               # the prompt, FILE:path, or - for standard input; empty: as a text begins
num_samples = 1          # texts to write
max_new_tokens = 500     # tokens to add to the prompt
temperature = 0.8        # 0 takes the likeliest token, 1 the model's own odds, more is wilder
top_k = None             # keep the k likeliest tokens only
top_p = None             # keep the fewest tokens that hold this share of the probability
repetition_penalty = 1.0  # above 1, tokens already seen become less likely
stop = ''                # end a text before this string
seed = 1337              # decides the first sample; the next samples have the next seeds
kv_cache = True          # remember keys and values of earlier tokens: same text, faster
device = 'auto'          # 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'auto'           # 'float32' (texts do not depend on num_samples), 'bfloat16', 'float16'
quantize = ''            # 'int8': a byte a weight, with one scale a row; its loss is measured
compile = 'auto'         # torch.compile for single tokens; 'auto': when it saves its own seconds
knobs, given = configure(globals(), runtime.find_device)
signal.signal(signal.SIGINT, signal.SIG_DFL)   # Ctrl-C just ends it

MOST_TOKENS = 1 << 24   # tokens of all samples together


def check_knobs():
    """Fail for a knob that means nothing."""
    check(knobs, num_samples=1, max_new_tokens=0, quantize=('', 'int8'), seed=0)
    if num_samples * max(1, max_new_tokens) > MOST_TOKENS:
        fail(f'num_samples={num_samples} times max_new_tokens={max_new_tokens} are more than '
             f'{MOST_TOKENS:,} tokens; type --max_new_tokens=500, or fewer --num_samples')


def narrow_and_compare(model, opened):
    """Keep the model's matrices in dtype or int8; say what int8 costs on the validation split."""
    if not quantize:
        decoding.narrow(model, dtype)
        return
    data, why_not = with_split(opened.dataset, opened.tokenizer, opened.data_dirs)
    if data:
        exact, lossy = decoding.quantize_and_compare(model, dtype, data, device)
        say(f'int8: {lossy:.4f} nats a token on a sample of the validation split of {data.folder}, '
            f'{exact:.4f} in float32')
    else:
        decoding.narrow(model, dtype, quantize)
        say(f'note: what int8 costs was not measured: {why_not}; type --data_dir=FOLDER, '
            f'or python evaluate.py --quantize=int8 --dataset=NAME')


def say_limits(prompt_tokens, block_size):
    """Say what a prompt or a text that is longer than the context costs."""
    if prompt_tokens > block_size:
        say(f'the prompt has {prompt_tokens:,} tokens; the model sees the last {block_size:,}')
    beyond = min(max_new_tokens, prompt_tokens + max_new_tokens - 1 - block_size)
    if beyond > 0:
        say(f'{beyond:,} of {max_new_tokens:,} tokens go beyond block_size={block_size}: '
            f'the window is read anew for each')


def the_model():
    """Return the flag by which another script finds the same model."""
    if init_from != 'resume':
        return f' --init_from={shlex.quote(init_from)}'
    if checkpoint:
        return f' --checkpoint={shlex.quote(checkpoint)}'
    return flag(out_dir)


class Text:
    """One sample: takes tokens, and gives out the characters that are certain."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder('utf-8')('replace')   # gives whole characters
        self.held = ''        # may be the beginning of `stop`
        self.ended = False

    def add(self, token):
        """Take the next token; return the text that is certain by now."""
        if self.ended:
            return ''
        if token == self.tokenizer.end:
            self.ended = True
        else:
            self.held += self.decoder.decode(self.tokenizer.decode([token]))
        if stop and stop in self.held:
            self.held = self.held.partition(stop)[0]
            self.ended = True
        certain = len(self.held)
        if stop and not self.ended:
            certain = max(0, certain - len(stop) + 1)
        text = self.held[:certain]
        self.held = self.held[certain:]
        return text

    def rest(self):
        """Return the end of the text; a character that max_new_tokens cut in two is left out."""
        return self.held + '\n'


def write_samples(new_tokens, prompt, tokenizer):
    """Write the first text as it is generated, and the other texts after it.

    new_tokens: yields the next token of each text, (B, 1)."""
    texts = [Text(tokenizer) for _ in range(num_samples)]
    titles = [prompt]
    if num_samples > 1:
        titles = [f'{"-" * 15} sample {i + 1}\n{prompt}' for i in range(num_samples)]
    later = titles[1:]
    write(titles[0])
    for new in new_tokens:
        for i, token in enumerate(new[:, 0].tolist()):
            text = texts[i].add(token)
            if i == 0:
                write(text)
            else:
                later[i - 1] += text
        if all(text.ended for text in texts):
            break
    write(texts[0].rest())
    for text, written in zip(texts[1:], later):
        write(written + text.rest())


def find_sampling():
    """Return the knobs of sampling as a Sampling; fail where one of them means nothing."""
    try:
        return Sampling(temperature, top_k, top_p, repetition_penalty)
    except ValueError as error:
        fail(error)


def find_step():
    """Return the function that makes a token: a faster GPT.next_token where there is one."""
    if device.startswith('cuda'):
        return decoding.GraphedSampling(compile)
    if compile:
        return decoding.compiled_step
    return GPT.next_token


# ---- the story -----------------------------------------------------------------------------------

check_knobs()
sampling = find_sampling()
opened = open_model(init_from, out_dir, checkpoint, data_dir, given)
model = opened.model
prompt = read_prompt(start)
stop = as_typed(stop)
ids = opened.tokenizer.encode(prompt or opened.tokenizer.opening)
idx = torch.tensor(ids, dtype=torch.long, device=device)[None]                             # (1, T)

dtype = runtime.find_dtype(dtype, device)
parameters = model.num_params()   # in a narrow model only embeddings and norms would be counted
cached_tokens = 0
if kv_cache:
    cached_tokens = min(max_new_tokens, model.config.block_size - len(ids))
pays = decoding.compiling_pays(model, device, dtype, quantize, cached_tokens, num_samples)
if compile is True and (device == 'mps' or num_samples > 1 or not kv_cache):
    say('note: compile=True is for one text with kv_cache, on cpu or cuda; nothing is compiled')
    compile = False
dtype, compile = runtime.set_up(device, dtype, compile, pays=pays)
if quantize and device.startswith('cuda') and not compile:
    say('note: uncompiled, a GPU moves five bytes for each int8 weight, and two in bfloat16; '
        'type --dtype=bfloat16 without --quantize, or for one text --compile=True')
model.to(device).eval()
narrow_and_compare(model, opened)
say(f'{opened.where}, {parameters:,} parameters, '
    f'{decoding.weight_bytes(model) / 1e6:,.1f} MB of weights to read for a token')
say_limits(len(ids), model.config.block_size)
if opened.trained_on.get('stands_in_for'):
    say(f'note: this model was trained on a stand-in text, and not on '
        f'{opened.trained_on["stands_in_for"]}')

seeds = [seed + i for i in range(num_samples)]
chance = chances(seeds, max_new_tokens).to(device)                                   # (B, new)
# a generator: each token is computed when write_samples asks for it
new_tokens = model.stream(idx, max_new_tokens, sampling, chance, kv_cache, find_step())
write_samples(new_tokens, prompt, opened.tokenizer)
say(f'for a page that runs this model in a browser and shows its insides, '
    f'type python export_web.py{the_model()} --to=page.html')
