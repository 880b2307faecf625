"""
A model as one HTML page, which runs it in any browser, without a network, and shows its insides.

    python export_web.py --out_dir=out --to=page.html          # best.pt of a run
    python export_web.py --checkpoint=ckpt.pt --to=page.html   # a file, also one of nanoGPT's
    python export_web.py --init_from=gpt2 --to=page.html       # Hugging Face's weights
    python export_web.py --to=page.html --dtype=float32        # computes what torch computes

Reads a checkpoint or Hugging Face's weights, and, where it is here, the validation split of the
model's dataset, to measure what narrower weights cost. Writes one file.
"""
import os
import tempfile

import lib.early  # noqa: F401  # before NumPy and torch

from lib import web
from lib.configurator import check, configure, exit_on_signals
from lib.console import fail, read_prompt, say
from lib.data import evaluation_batches, with_split
from lib.evaluation import mean_loss
from lib.starting import open_model

to = ''               # the page to write, FILE.html
init_from = 'resume'  # 'resume': a checkpoint; or a model on Hugging Face's hub or in a folder
out_dir = 'out'       # folder of the run
checkpoint = ''       # a checkpoint file, instead of the one in out_dir
data_dir = 'data'     # where datasets live; if not typed, the run's own data_dir is tried first
dtype = 'auto'        # 'int8', 'float16', 'float32'; 'auto': the narrowest with float32's text
start = ''            # the text that the page begins with; empty: one that the model writes
knobs, given = configure(globals())

GREEDY_TOKENS = 200       # tokens in which a narrower dtype must agree with float32 for 'auto'
LARGE = 50_000_000        # bytes from which on a page is not for a phone
LARGEST = 500_000_000     # bytes; browsers cannot hold a text of more than 512 MB
MEASURED_TOKENS = 65_536  # most validation tokens on which narrower weights are measured
MEASURED_FLOPS = 10**12   # most operations that this may take: ten seconds or so


def check_place():
    """Fail for a page that cannot be written, before any work is done."""
    if not to.lower().endswith(('.html', '.htm')):
        fail(f'--to={to!r}: it must name the page to write, and end in .html; '
             f'type python export_web.py --to=page.html')
    if os.path.isdir(to):
        fail(f'--to={to} is a folder, and a page is a file; type --to={to.rstrip("/")}-page.html')
    place = folder   # or the folder above it that exists: new ones are made with the page
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        cannot_be_written(error)


def cannot_be_written(error):
    fail(f'--to={to} cannot be written ({error.strerror or error}); make room, '
         f'or type --to=FILE.html for another place')


def check_size(dtype):
    """Fail for a page that browsers cannot open; say what to expect of a large one."""
    size = web.page_bytes(model, dtype)
    if size > LARGEST:
        smaller = [name for name in web.NUMBER_BYTES if web.page_bytes(model, name) <= LARGEST]
        advice = 'type --init_from=gpt2, or --checkpoint=FILE for another smaller one'
        if smaller:
            advice = f'type --dtype={smaller[-1]}'
        fail(f'the page would have {web.size_in_words(size)} with {parameters:,} parameters in '
             f'{dtype}; browsers open pages of up to {web.size_in_words(LARGEST)}; {advice}')
    if size > LARGE:
        say(f'note: the page will have about {web.size_in_words(size)}: it opens in some seconds '
            f'on a computer, takes twice as much memory, and is too much for most phones')


def check_tokenizer():
    """Fail for a tokenizer that the page does not know."""
    kind = opened.tokenizer.state()['kind']
    if kind not in web.TOKENIZERS:
        fail(f"{opened.where}: the page has no tokenizer {kind}; allowed are "
             f"{', '.join(web.TOKENIZERS)}; type --checkpoint=FILE for a model with one of them")
    symbols = opened.tokenizer.vocab_size
    if kind == 'bpe' and symbols > web.MOST_SYMBOLS:
        fail(f'{opened.where}: its BPE has {symbols:,} symbols; allowed in a page are '
             f'{web.MOST_SYMBOLS:,}; type --checkpoint=FILE for a model with fewer')


def choose_dtype():
    """Return the dtype of the page's weights.

    For 'auto' it is the narrowest that writes what float32 writes."""
    if dtype == 'float16' and not web.fits_float16(model):
        fail(f'{opened.where} has weights above 65,504, the largest number in float16; '
             f'allowed are int8 and float32; type --dtype=float32')
    if dtype != 'auto':
        check_size(dtype)
        return dtype
    check_size('int8')
    chosen = web.smallest_equal(model, opened.tokenizer, GREEDY_TOKENS)
    say(f'{chosen} is the narrowest in which the likeliest {GREEDY_TOKENS} tokens are float32\'s')
    check_size(chosen)
    return chosen


def say_costs():
    """Say what narrower weights cost on the validation split, where there is one here."""
    narrower = [dtype]
    if dtype == 'auto':
        narrower = ['int8', 'float16'] if web.fits_float16(model) else ['int8']
    elif dtype == 'float32':
        return
    data, why_not = with_split(opened.dataset, opened.tokenizer, opened.data_dirs)
    if data is None:
        say(f'note: what {" and ".join(narrower)} cost was not measured: {why_not}; '
            f'type --data_dir=FOLDER')
        return
    exact = validation_loss(model, data)
    for name in narrower:
        loss = validation_loss(web.as_in_page(model, name), data)
        say(f'{name} costs {loss - exact:+.5f} nats a token: {loss:.4f} instead of {exact:.4f} '
            f'on a sample of the validation split of {data.folder}')


def validation_loss(model, data):
    """Return the mean loss of the same tokens in every call, in nats."""
    block_size = model.config.block_size
    tokens = min(MEASURED_TOKENS, MEASURED_FLOPS // (2 * parameters))
    texts = max(1, min(16, tokens // block_size))
    batches = max(1, tokens // (texts * block_size))
    pairs = evaluation_batches(data, 'val', block_size, texts, batches=batches)
    return mean_loss(model, pairs, 'cpu', 'float32')


def first_text():
    """Return the text that the page begins with; fail for characters that the model lacks."""
    if not start:
        return web.written_text(model, opened.tokenizer)
    text = read_prompt(start)
    opened.tokenizer.encode(text)
    return text


def known_facts():
    """Return what the page's line of facts says."""
    title = 'A GPT to look into'
    if init_from != 'resume':
        title = f'{os.path.basename(os.path.abspath(init_from))}, to look into'
    if opened.dataset:
        title = f'A GPT that learned from {opened.dataset}'
    return dict(title=title, parameters=parameters, dataset=opened.dataset,
                tokenizer=opened.tokenizer.state()['kind'], steps=opened.steps,
                val_loss=opened.val_loss, start=beginning)


def write_page(page):
    """Write the page whole or not at all."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix='.export-', dir=folder) as part:
            path = os.path.join(part, 'page.html')
            with open(path, 'w', encoding='utf-8') as f:
                f.write(page)
            os.replace(path, to)
    except OSError as error:
        cannot_be_written(error)


# ---- the story -----------------------------------------------------------------------------------

check(knobs, dtype=('auto', *web.NUMBER_BYTES))
folder = os.path.dirname(os.path.abspath(to))
check_place()
opened = open_model(init_from, out_dir, checkpoint, data_dir, given)
model = opened.model.eval()
parameters = model.num_params()
check_tokenizer()
exit_on_signals()   # a signal removes what is half-written
say(f'{opened.where}, {parameters:,} parameters')

beginning = first_text()
chosen = choose_dtype()
say_costs()
page = web.make_page(model, opened.tokenizer, chosen, known_facts())
write_page(page)
say(f'{to}: {web.size_in_words(os.path.getsize(to))}, weights in {chosen}; open it in a browser')
