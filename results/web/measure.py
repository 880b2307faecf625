"""
Tokens a second in the page, for three nets, and beside it in torch: model.generate in float32, on
one thread, with the step that sample.py takes.

    python results/web/measure.py out/best.pt > results/web/speed.txt

Run it on a quiet machine with Chromium and playwright (requirements-dev.txt), from the repository's
folder. out/best.pt is the main job's checkpoint; the other two nets have random weights. GPT-2's
needs tiktoken's files.
"""
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

os.environ['OMP_NUM_THREADS'] = '1'   # before torch: one core, as a page has

HERE = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(HERE))

import torch  # noqa: E402  # after OMP_NUM_THREADS
from playwright.sync_api import sync_playwright  # noqa: E402

from lib import checkpoint  # noqa: E402
from lib.tokenizers import CharTokenizer, GPT2Tokenizer  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

ROUNDS = 3   # the page and torch take turns; the median counts


@dataclass
class Net:
    """A net to measure."""
    name: str
    path: str       # the net's checkpoint
    dtype: str
    tokens: int     # to write within the context, at a time
    beyond: int     # to write beyond the context, where each is slow
    wanted: int     # tokens a second within it


def random_net(path, tokenizer, **fields):
    """Save a model with random weights."""
    torch.manual_seed(1337)
    model = GPT(GPTConfig(**fields))
    saved = dict(model=model.state_dict(), model_args=model.config.__dict__, config={},
                 tokenizer=tokenizer.state())
    torch.save(saved, path)


def nets(main_job, folder):
    """Return the nets; the two with random weights are made in the folder."""
    medium = f'{folder}/medium.pt'
    gpt2 = f'{folder}/gpt2.pt'
    random_net(medium, CharTokenizer(map(chr, range(32, 97))), block_size=256, vocab_size=65,
               n_layer=6, n_head=6, n_embd=384, bias=False)
    random_net(gpt2, GPT2Tokenizer())
    found = []
    for dtype in ('float32', 'int8'):
        found.append(Net('the main job, 0.8M', main_job, dtype, tokens=56, beyond=20, wanted=300))
        found.append(Net('10.65M', medium, dtype, tokens=56, beyond=2, wanted=30))
    found.append(Net('GPT-2 124M', gpt2, 'int8', tokens=20, beyond=0, wanted=2))
    return found


def export(net, folder):
    """Return the path of the net's page."""
    path = f'{folder}/page.html'
    subprocess.run([sys.executable, str(HERE / 'export_web.py'), f'--checkpoint={net.path}',
                    f'--dtype={net.dtype}', f'--to={path}', '--start=A'], check=True,
                   capture_output=True)
    return path


IN_PAGE = '''async ({ short, count, long, beyond }) => {
  const rate = async (prompt, n) => {
    await gpt.logits([prompt[0] + 1]);   // nothing of the prompt is in the cache
    const started = performance.now();
    await gpt.generate(prompt, n, { seed: 1 });
    return 1000 * n / (performance.now() - started);
  };
  await rate(short, count);   // compiled by now
  return [await rate(short, count), beyond ? await rate(long, beyond) : 0];
}'''


def prompts(model):
    """Return two prompts: of four tokens, and of one more than the context holds."""
    short = [1, 2, 3, 4]
    return short, short * (model.config.block_size // 4) + [1]


def in_page(page, net, model):
    """Return tokens a second of the page, within and beyond the context."""
    short, long = prompts(model)
    argument = dict(short=short, count=net.tokens, long=long, beyond=net.beyond)
    return page.evaluate(IN_PAGE, argument)


def in_torch(model, net):
    """Return tokens a second of model.generate in float32, within and beyond the context."""
    rates = []
    for prompt, count in zip(prompts(model), (net.tokens, net.beyond)):
        idx = torch.tensor([prompt])
        model.generate(idx, 1)
        started = time.perf_counter()
        model.generate(idx, count)
        rates.append(count / (time.perf_counter() - started))
    return rates


def processor():
    """Return the processor's name, as far as the system tells."""
    try:
        found = re.search(r'model name\s*: (.*)', Path('/proc/cpuinfo').read_text('utf-8'))
    except OSError:
        found = None
    return found[1] if found else platform.processor()


def measure(browser, net, folder):
    """Print the net's row."""
    path = export(net, folder)
    model = checkpoint.build_model(checkpoint.load(net.path), net.path).eval()
    page = browser.new_page()
    page.set_default_timeout(0)
    started = time.perf_counter()
    page.goto(Path(path).as_uri())
    page.evaluate('gpt.ready.then(() => 0)')
    opening = time.perf_counter() - started
    rounds = []
    for _ in range(ROUNDS):
        rounds.append([*in_page(page, net, model), *in_torch(model, net)])
    page.close()
    ours, ours_beyond, torchs, torchs_beyond = map(statistics.median, zip(*rounds))
    beyond = '| |'
    if net.beyond:
        beyond = f'| {ours_beyond:,.1f} | {torchs_beyond:,.1f}'
    megabytes = os.path.getsize(path) / 1e6
    print(f'| {net.name} | {net.dtype} | {megabytes:.1f} MB | {opening:.1f} s | {ours:,.1f} | '
          f'{net.wanted} | {torchs:,.1f} {beyond} |', flush=True)


chromium = shutil.which('chromium') or shutil.which('google-chrome')
with sync_playwright() as p, tempfile.TemporaryDirectory() as folder:
    browser = p.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
    print(f'{processor()}, one core; {platform.system()}, Python {platform.python_version()}, '
          f'torch {torch.__version__}, Chromium {browser.version}; the median of {ROUNDS} rounds\n')
    print('| net | weights | page | opens in | page, tokens/s | wanted | torch, tokens/s | '
          'page beyond the context | torch beyond it |')
    print('|---|---|---|---|---|---|---|---|---|')
    for net in nets(sys.argv[1], folder):
        measure(browser, net, folder)
    browser.close()
