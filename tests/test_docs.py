"""
The pages say what is so: links, names of files and functions, shapes, and the numbers of the tour.

    pytest tests/test_docs.py
"""
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from lib.prepare import write_dataset
from lib.tokenizers import CharTokenizer
from model import GPT, Cache, GPTConfig

PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md')),
         *sorted((ROOT / 'results').rglob('*.md'))]
FILES = (ROOT / 'docs/files.md').read_text(encoding='utf-8')


# ---- links and names -----------------------------------------------------------------------------

def anchors(path):
    """Return the names by which GitHub's links reach a page's headings."""
    headings = re.findall(r'^#+ (.+)$', path.read_text(encoding='utf-8'), re.M)
    return [re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings]


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    """Each relative link leads to a file or folder, and its anchor to a heading of that file."""
    text = re.sub(r'^```.*?^```$', '', page.read_text(encoding='utf-8'), flags=re.S | re.M)
    for link in re.findall(r'\]\(([^)\s]+)\)', text):
        if re.match(r'https?:', link):
            continue
        path, _, anchor = link.partition('#')
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(target), link


def test_each_file_is_on_the_map():
    """docs/files.md links to each script and to each file of lib/."""
    files = [*ROOT.glob('*.py'), *(ROOT / 'lib').glob('*.py'), *(ROOT / 'lib').glob('*.html')]
    assert len(files) > 20
    for path in files:
        assert f'](../{path.relative_to(ROOT)})' in FILES, path.name


def test_the_map_names_what_exists():
    """Each function, class and field that docs/files.md names is defined in the code."""
    code = ''
    for folder in ('', 'lib', 'tests'):
        for path in sorted((ROOT / folder).glob('*.py')):
            code += path.read_text(encoding='utf-8')
    places = FILES.partition('## Where would I add')[2]
    names = set(re.findall(r'`(?:\w+\.)*(\w+)[`(]', places))
    paths = FILES.partition('## Two paths')[2].partition('## Where')[0]
    names |= set(re.findall(r'\b[A-Za-z]+(?:_[a-z]+)+\b|\b(?:[A-Z][a-z]+){2,}\b', paths))
    scripts = {path.stem for path in ROOT.glob('*.py')}
    names = {name for name in names - scripts if not hasattr(torch.nn.functional, name)}
    assert len(names) > 40
    for name in names:
        defined = rf'(?:def|class) {name}\b|\b{name}\b *[=:]|\b{name}=|[\'"]{name}[\'"]'
        assert re.search(defined, code), name


# ---- what the pages say of model.py --------------------------------------------------------------

def shapes_of_the_main_job():
    """Return {a layer's name: the shape of its output} for one batch of the main job on a CPU."""
    net = GPT(GPTConfig(block_size=64, vocab_size=65, n_layer=4, n_head=4, n_embd=128)).eval()
    seen = {}

    def note(name):
        return lambda module, args, out: seen.update({name: tuple(out.shape)})

    for name, module in net.named_modules():
        if name and not name.endswith(('.h', '.drop')):
            module.register_forward_hook(note(name))
    attention = net.transformer.h[0].attn.attention

    def noting_q(q, k, v, dropout, visible):
        seen['q'] = tuple(q.shape)
        return attention(q, k, v, dropout, visible)

    net.set_attention({0: noting_q})
    idx = torch.zeros(32, 64, dtype=torch.long)
    logits, loss = net(idx, idx)
    assert logits.shape == (32, 64, 65) and loss.shape == ()
    return seen


def test_shapes_of_the_two_paths():
    """The shapes in docs/files.md are those of the main job's model."""
    seen = shapes_of_the_main_job()
    path = FILES.partition('text to loss')[2].partition('```')[0].splitlines()
    layers = {'wte + wpe': ['transformer.wte'],
              'h.0.attn.c_attn': ['transformer.h.0.attn.c_attn', 'q'],
              'attention ': ['q'],
              'h.0.attn.c_proj': ['transformer.h.0.attn.c_proj'],
              'h.0.mlp.c_fc': ['transformer.h.0.mlp.c_fc'],
              'h.0.mlp.c_proj': ['transformer.h.0.mlp.c_proj'],
              'ln_f': ['transformer.ln_f'],
              'lm_head': ['lm_head']}
    for words, names in layers.items():
        line = next(line for line in path if words in line)
        for name in names:
            assert str(seen[name]) in line, (line, seen[name])


def test_shapes_of_the_cache():
    """The shapes of the second path in docs/files.md are those that GPT.next_token meets."""
    net = GPT(GPTConfig(block_size=64, vocab_size=65, n_layer=4, n_head=4, n_embd=128)).eval()
    path = FILES.partition('\nprompt to text')[2].partition('```')[0].splitlines()
    prompt = next(line for line in path if 'GPT.next_token, the prompt' in line)
    token = next(line for line in path if 'GPT.next_token, the token' in line)
    cache = Cache(net.config, 'cpu')
    for line, T in ((prompt, 6), (token, 1)):
        logits = net.next_logits(torch.zeros(1, T, dtype=torch.long), cache)
        assert f'logits {tuple(logits.shape)}' in line
        assert f'k, v {tuple(cache.layers[0].k.shape)}' in line
        cache.advance(T)
    assert f'hold {cache.length} tokens' in token


ALONE = '''
import sys
others = ('numpy', 'transformers', 'tiktoken', 'matplotlib', 'requests', 'scipy')
sys.modules.update(dict.fromkeys(others))   # importing one of them fails
import torch, model
assert 'lib' not in sys.modules
net = model.GPT(model.GPTConfig(block_size=8, vocab_size=10, n_layer=1, n_head=2, n_embd=16))
x = torch.arange(8)[None]
optimizer = torch.optim.AdamW(net.optimizer_groups(0.1), lr=1e-2)
for _ in range(50):
    optimizer.zero_grad()
    loss = net(x, x + 1)[1]
    loss.backward()
    optimizer.step()
assert loss < 0.5
assert net.generate(x[:, :1], 7, temperature=0).tolist() == x.tolist()
'''


def test_model_py_needs_torch_alone(tmp_path):
    """A copy of model.py without the other packages trains, and writes what it has learned."""
    shutil.copy(ROOT / 'model.py', tmp_path)
    environment = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
    done = subprocess.run([sys.executable, '-c', ALONE], cwd=tmp_path, env=environment,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# ---- the tour ------------------------------------------------------------------------------------

NUMBER = re.compile(r'-?\d+\.\d+')


def without_numbers(text):
    """Return a text with each decimal number as 0, and each run of blanks as one."""
    return re.sub(r' +', ' ', NUMBER.sub('0', text))


def numbers(text):
    return [float(number) for number in NUMBER.findall(text)]


@pytest.mark.filterwarnings('error')
def test_the_tour(folder, script, shakespeare):
    """docs/tour.py prints every block of docs/tour.md.

    Numbers may differ as far as another processor rounds in another way."""
    text = shakespeare.read_text(encoding='utf-8')
    tokenizer = CharTokenizer(text)
    write_dataset('data/shakespeare_char', {'train': [(tokenizer.encode(text[:2000]), 2000)]},
                  tokenizer, dict(name='head', url=None, sha256='', stand_in=False))
    done = script('docs/tour.py')
    assert done.code == 0 and done.err == '', done.err
    printed = done.out.strip().split('\n\n')
    page = (ROOT / 'docs/tour.md').read_text(encoding='utf-8')
    shown = re.findall(r'```text\n(.*?)\n```', page, re.S)
    assert len(shown) == len(printed) == 15
    for here, there in zip(shown, printed):
        assert without_numbers(here) == without_numbers(there)
        assert numbers(here) == pytest.approx(numbers(there), abs=2e-3)
