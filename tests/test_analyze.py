"""analyze.py, from a checkpoint to a page in a browser. pytest tests/test_analyze.py"""
import base64
import csv
import json
import os
import re
import shutil
import signal
import subprocess

import numpy as np
import pytest
import torch
from conftest import PYTHON, ROOT, TEXT, rewrite
from torch.nn import functional as F

FILES = {
    'attention.npz',
    'attention.png',
    'depth_scan.csv',
    'depth_scan.png',
    'embeddings.png',
    'gradients.csv',
    'gradients.png',
    'head.png',
    'head_ablation.csv',
    'head_ablation.png',
    'losses.png',
    'report.html',
}
NASTY = 'the miller <script>document.title="pwned"</script> & "his" </script><!-- wife'


@pytest.fixture
def run(trained, folder):
    """Enter a folder with a copy of the tiny model's run and data. Return its path."""
    shutil.copytree(trained, 'out')
    shutil.copytree(trained.parent / 'data', 'data')
    return folder


@pytest.fixture
def analyze(script):
    """Return a function that runs analyze.py on the CPU."""
    def run(*flags):
        return script('analyze.py', '--device=cpu', *flags)
    return run


@pytest.fixture
def refused_analysis(refused):
    """Return a function that checks that analyze.py refuses."""
    def run(*flags, words):
        return refused('analyze.py', '--device=cpu', *flags, words=words)
    return run


def report_of(path):
    """Return the data in a page."""
    page = path.read_text()
    tag = r'<script type="application/json" id="data">(.*?)</script>'
    return json.loads(re.search(tag, page, re.DOTALL)[1])


def rows_of(path):
    """Return the rows of a CSV file, each a dict of strings."""
    with open(path, newline='') as f:
        return list(csv.DictReader(f))


def untrained(**fields):
    """Return a small model of bytes with random weights."""
    from model import GPT, GPTConfig
    torch.manual_seed(0)
    sizes = dict(block_size=128, vocab_size=256, n_layer=2, n_head=2, n_embd=16)
    return GPT(GPTConfig(**sizes | fields))


def save_as_nasty(model):
    """Save a model of bytes as nasty.pt."""
    from lib import checkpoint
    from lib.tokenizers import ByteTokenizer
    loaded = torch.load('out/best.pt', weights_only=True)
    loaded['tokenizer'] = ByteTokenizer().state()
    loaded['model_args'] = model.config.__dict__
    loaded['model'] = model.state_dict()
    loaded['config'] = {}
    checkpoint.save('nasty.pt', loaded)


def change_analyze(run, monkeypatch, old, new):
    """Copy the scripts into the folder `run` and change one line of analyze.py there."""
    source = (ROOT / 'analyze.py').read_text()
    assert old in source
    for path in ROOT.glob('*.py'):
        shutil.copy(path, run)
    shutil.copytree(ROOT / 'lib', run / 'lib', dirs_exist_ok=True)
    (run / 'analyze.py').write_text(source.replace(old, new))
    monkeypatch.setattr('conftest.ROOT', run)


def nothing_is_left(run):
    """Return whether neither the results nor a temporary folder for them exists."""
    return not (run / 'out/analysis').exists() and not list((run / 'out').glob('analysis-*'))


# ---- results -----------------------------------------------------------------------------------

@pytest.mark.pictures
def test_an_analysis_writes_every_file(analyze, run):
    result = analyze('--start=VAL:3', '--layer=1', '--head=1', '--windows=5')
    assert result.code == 0, result.err
    assert 'note:' not in result.err
    assert {path.name for path in (run / 'out/analysis').iterdir()} == FILES
    assert not list((run / 'out').glob('analysis-*'))
    for path in (run / 'out/analysis').glob('*.png'):
        assert path.read_bytes()[:8] == b'\x89PNG\r\n\x1a\n'
        assert path.stat().st_size > 3000

    arrays = np.load('out/analysis/attention.npz')
    assert arrays['weights'].shape == (2, 2, 16, 16)
    assert np.allclose(arrays['weights'].sum(-1), 1, atol=1e-6)
    assert arrays['outputs'].shape == (2, 2, 16, 8)
    tokens = np.fromfile('data/mini/val.bin', dtype='<u2')[3:19]
    assert arrays['tokens'].tolist() == tokens.tolist()

    found = report_of(run / 'out/analysis/report.html')
    assert found['layer'] == 1
    assert found['head'] == 1
    assert found['size'] == 16
    assert found['pool'] == 1
    assert found['losses'][1:] == pytest.approx(arrays['losses'].tolist())
    for line in result.out.splitlines():
        assert line in found['findings']

    rows = rows_of('out/analysis/head_ablation.csv')
    heads = [(row['layer'], row['head']) for row in rows]
    assert heads == [('0', '0'), ('0', '1'), ('1', '0'), ('1', '1')]
    for row in rows:
        assert float(row['change_low']) < float(row['change']) < float(row['change_high'])


def test_tokens_beyond_the_context_are_left_out(analyze, run):
    result = analyze('--tokens=20', '--windows=2')
    assert 'Analyzed are the first 16, which is all that fits' in result.err


def test_the_interval_is_students(analyze, run):
    """Zero a head here, and compare with mean ± t · sd / √n of the windows' differences."""
    from scipy import stats

    from lib import inside
    from lib.starting import open_model
    analyze('--windows=4')
    row = rows_of('out/analysis/head_ablation.csv')[2]
    assert (row['layer'], row['head']) == ('1', '0')

    model = open_model('resume', 'out', '', 'data', given=set()).model.eval()
    split = np.fromfile('data/mini/val.bin', dtype='<u2').astype(np.int64)
    starts = np.linspace(0, len(split) - 17, 4).astype(int)
    windows = torch.from_numpy(np.stack([split[start:start + 17] for start in starts]))

    def losses():
        with torch.no_grad():
            logits, _ = model(windows[:, :-1])
        by_token = F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction='none')
        return by_token.mean(dim=1).double()

    base = losses()
    with inside.zeroed(model, [(1, 0)]):
        change = losses() - base
    mean = change.mean().item()
    low, high = stats.t.interval(0.95, df=3, loc=mean, scale=change.std().item() / 2)
    written = [float(row[key]) for key in ('change', 'change_low', 'change_high')]
    assert written == pytest.approx([mean, low, high], abs=1e-5)


@pytest.mark.pictures
@pytest.mark.parametrize('fields', [
    dict(block_size=2),
    dict(block_size=3, n_layer=1, n_head=1),
    dict(pos='rope'),
    dict(norm='post', residual=False, bias=False),
    dict(pos='none', norm='none', qk_norm=True, tie_weights=False),
])
def test_small_and_unusual_models_give_numbers_in_every_cell(analyze, run, fields):
    save_as_nasty(untrained(**fields))
    result = analyze('--checkpoint=nasty.pt', '--start=hello there')
    assert result.code == 0, result.err
    for row in rows_of('out/analysis/depth_scan.csv'):
        del row['called']   # the head's role, a word
        assert all(np.isfinite(float(value)) for value in row.values())
    assert 'NaN' not in (run / 'out/analysis/report.html').read_text()


def test_attention_that_does_not_fit_in_memory_is_cut(analyze, run, monkeypatch):
    change_analyze(run, monkeypatch, 'HELD_BYTES = 1 << 30', 'HELD_BYTES = 4 * 4 * 10 * 10')
    result = analyze('--windows=2', '--tokens=20')
    assert 'Analyzed are the first 10, as the attention of 4 heads' in result.err
    assert len(report_of(run / 'out/analysis/report.html')['tokens']) == 10


def test_long_contexts_are_shown_in_blocks(analyze, run, monkeypatch):
    """The page holds blocks if the whole attention is too large. Rows still sum to 1."""
    change_analyze(run, monkeypatch, 'SHOWN_BYTES = 5_000_000', 'SHOWN_BYTES = 100')
    result = analyze('--windows=2')
    assert 'between blocks of' in result.err
    found = report_of(run / 'out/analysis/report.html')
    size = found['size']
    assert found['pool'] * size >= 16
    numbers = np.frombuffer(base64.b64decode(found['attention']), np.uint8)
    assert numbers.size <= 100
    heads = numbers.reshape(4, size * (size + 1) // 2)   # the lower triangle, row after row
    weights = (heads / 255) ** 2
    start = 0
    for row in range(size):
        end = start + row + 1
        assert np.allclose(weights[:, start:end].sum(1), 1, atol=0.02)
        start = end


# ---- models, texts and data from elsewhere -----------------------------------------------------

def test_without_a_validation_split_the_text_is_measured(analyze, run):
    shutil.rmtree('data')
    # utf-8-sig writes the byte order mark that editors on Windows write.
    with open('text.txt', 'w', encoding='utf-8-sig') as f:
        f.write('the miller said')
    result = analyze('--start=FILE:text.txt')
    assert result.code == 0
    assert 'measured on the text itself' in result.err
    tokens = report_of(run / 'out/analysis/report.html')['tokens']
    assert tokens == list('the miller said')


def test_a_run_knows_its_data_dir(analyze, run):
    os.rename('data', 'elsewhere')
    rewrite('out/best.pt', data_dir='elsewhere')
    result = analyze('--windows=2')
    assert result.code == 0, result.err
    assert 'note:' not in result.err


def test_a_dataset_of_another_tokenizer_is_named(analyze, refused_analysis, run):
    from lib.prepare import write_dataset
    from lib.tokenizers import ByteTokenizer
    tokenizer = ByteTokenizer()
    source = dict(name='mini', url=None, sha256='', stand_in=False)
    write_dataset('data/mini', dict(val=[(tokenizer.encode(TEXT), len(TEXT))]), tokenizer, source)
    result = analyze('--start=the miller')
    assert 'measured on the text itself' in result.err
    assert 'data/mini has another tokenizer' in result.err
    refused_analysis(words=['data/mini has another tokenizer', '--start=TEXT'])


def write_tiny_gpt2(folder):
    """Write a random GPT-2 into a folder, in Hugging Face's format."""
    from transformers import GPT2Config

    from lib import tokenizers
    from model import GPT, GPTConfig
    torch.manual_seed(0)
    GPT(GPTConfig(block_size=32, n_layer=1, n_head=2, n_embd=16)).save_pretrained(str(folder))
    files = tokenizers.hf_tokenizer_files(tokenizers.GPT2Tokenizer(), 32)
    for name, content in files.items():
        if not isinstance(content, str):
            content = json.dumps(content)
        (folder / name).write_text(content)
    assert GPT2Config.from_pretrained(folder).n_embd == 16


def test_a_gpt2_of_hugging_face(analyze, folder, gpt2_files):
    write_tiny_gpt2(folder / 'tiny')
    text = '--start=When Mary and John went to the store, John gave'
    result = analyze('--init_from=tiny', text)
    assert result.code == 0, result.err
    assert 'out/analysis-tiny' in result.err
    assert os.listdir('out') == ['analysis-tiny']
    tokens = report_of(folder / 'out/analysis-tiny/report.html')['tokens']
    assert tokens[1] == ' Mary'

    # A folder that was typed and holds no run gets the analysis under its plain name.
    flags = ['--init_from=./tiny/', '--out_dir=mine', text]
    assert analyze(*flags).code == 0
    assert os.listdir('mine') == ['analysis']
    # A folder with a run gets the analysis of another model under that model's name.
    (folder / 'mine/ckpt.pt').write_bytes(b'')
    assert analyze(*flags).code == 0
    assert sorted(os.listdir('mine')) == ['analysis', 'analysis-tiny', 'ckpt.pt']


def test_a_checkpoint_of_nanogpt(analyze, mini):
    """The characters come from the folder of the checkpoint's dataset."""
    from test_hub import nanogpt_checkpoint
    meta = json.loads((mini / 'data/mini/meta.json').read_text())
    nanogpt_checkpoint('ckpt.pt', vocab_size=len(meta['tokenizer']['chars']))
    result = analyze('--checkpoint=ckpt.pt', '--start=the miller')
    assert result.code == 0, result.err
    tokens = report_of(mini / 'out/analysis/report.html')['tokens']
    assert tokens == list('the miller')


# ---- names and folders -------------------------------------------------------------------------

@pytest.mark.pictures
def test_names_are_not_read_as_formulas(analyze, run):
    """matplotlib typesets text between dollar signs."""
    (run / 'a$\\frac$').mkdir()
    shutil.copy('out/best.pt', 'a$\\frac$/b.pt')
    assert analyze('--checkpoint=a$\\frac$/b.pt', '--windows=2').code == 0


@pytest.mark.skipif(os.name == 'nt', reason='names are not bytes on Windows')
def test_a_name_that_is_not_utf8(run):
    """The page shows a replacement character for the byte."""
    name = b'out-\xff'
    try:
        os.rename('out', name)
    except OSError:
        pytest.skip('this file system accepts only names in UTF-8')
    flags = [b'--out_dir=' + name, '--device=cpu', '--windows=2']
    command = [PYTHON, str(ROOT / 'analyze.py'), *flags]
    done = subprocess.run(command, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert {file.decode() for file in os.listdir(name + b'/analysis')} == FILES
    page = run / os.fsdecode(name) / 'analysis/report.html'
    assert 'out-\ufffd/best.pt' in report_of(page)['facts']


def test_to_names_the_folder_of_the_pages(analyze, run):
    result = analyze('--windows=2', '--to=deep/pages')
    assert result.code == 0, result.err
    assert 'deep/pages/report.html' in result.err
    assert set(os.listdir('deep/pages')) == FILES
    assert os.listdir('deep') == ['pages']
    assert not os.path.exists('out/analysis')
    assert analyze('--windows=2', '--to=deep/pages').code == 0   # replaces the pages


def test_a_folder_in_place_of_a_file_is_refused(refused_analysis, run):
    (run / 'out/analysis/gradients.png').mkdir(parents=True)
    words = ['out/analysis', 'cannot be written', '--to']
    refused_analysis('--start=the miller', words=words)
    assert os.listdir('out/analysis') == ['gradients.png']
    assert not list((run / 'out').glob('analysis-*'))


@pytest.mark.parametrize('flags', [
    ['--checkpoint=out/best.pt', '--out_dir=file'],
    ['--to=file'],
])
def test_a_file_in_place_of_the_folder_is_refused(refused_analysis, run, flags):
    (run / 'file').write_text('')
    refused_analysis(*flags, words=['file', '--to=FOLDER'])


def test_a_read_only_folder_is_refused_before_the_work(
        script, analyze, refused, refused_analysis, run, modes_hold):
    """The advice in the error can be followed. Evaluating needs no folder to write to."""
    os.chmod('out', 0o555)
    error = refused_analysis(words=['out/analysis', 'type --to=FOLDER'])
    assert 'Permission denied' in error
    result = analyze('--windows=2', '--to=pages')
    assert result.code == 0, result.err
    assert set(os.listdir('pages')) == FILES
    os.chmod('pages', 0o555)
    refused_analysis('--to=pages', words=['pages cannot be written'])

    resume = ['train.py', '--init_from=resume', '--device=cpu']
    result = script(*resume, '--eval_only')
    assert result.code == 0, result.err
    assert 'on the whole split' in result.err
    refused(*resume, words=['out_dir=out cannot be'])
    os.chmod('out', 0o755)


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='this system has no /dev/full')
def test_a_full_stdout_is_an_error_behind_the_report(process, run):
    flags = ['--device=cpu', '--windows=2']
    with open('/dev/full', 'w') as full:
        streams = dict(capture_output=False, stdout=full, stderr=subprocess.PIPE)
        done = process('analyze.py', *flags, **streams)
    assert done.returncode == 2
    assert 'stdout cannot be written' in done.stderr
    assert 'Traceback' not in done.stderr
    assert (run / 'out/analysis/report.html').exists()


def test_ctrl_c_leaves_nothing(run):
    command = [PYTHON, str(ROOT / 'analyze.py'), '--device=cpu', '--windows=60']
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while 'parameters' not in process.stderr.readline():   # the folder exists after this line
        pass
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert nothing_is_left(run)


# ---- what is refused ---------------------------------------------------------------------------

@pytest.mark.parametrize('flags, words', [
    (['--layer=2'], ['layer=2', '0 to 1']),
    (['--head=-1'], ['head=-1', '0 to 1']),
    (['--start=t'], ['1 token', 'two']),
    (['--start=ü'], ['ü', 'vocabulary']),
    (['--start=FILE:nowhere'], ['nowhere']),
    (['--start=VAL:999999'], ['VAL:999999', 'VAL:0']),
    (['--start=VAL:x'], ['VAL:x']),
    (['--start=VAL:' + '9' * 5000], ['VAL:9999', 'VAL:0']),
    (['--tokens=1'], ['tokens=1']),
    (['--windows=1'], ['windows=1', 'auto']),
    (['--checkpoint=data/mini/meta.json'], ['meta.json']),
    (['--dataset=none'], ['none', 'val.bin']),
    (['--laier=1'], ['--layer']),
])
def test_mistakes(refused_analysis, run, flags, words):
    refused_analysis(*flags, words=words)
    assert nothing_is_left(run)


def test_losses_that_are_not_finite_are_refused(refused_analysis, run):
    model = untrained()
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(1e30)
        model.transformer.ln_f.bias.fill_(1e38)
    save_as_nasty(model)
    words = ['nasty.pt', 'not finite']
    refused_analysis('--checkpoint=nasty.pt', '--start=hello', words=words)
    assert nothing_is_left(run)


def test_a_file_that_is_not_a_checkpoint_is_refused(refused_analysis, mini):
    torch.save(dict(weights=torch.ones(3)), 'other.pt')
    refused_analysis('--checkpoint=other.pt', '--start=the miller', words=['other.pt'])


# ---- the page ----------------------------------------------------------------------------------

@pytest.fixture
def nasty_page(analyze, run):
    """Return the URL of a page about NASTY, a text that is full of markup."""
    save_as_nasty(untrained())
    result = analyze('--checkpoint=nasty.pt', f'--start={NASTY}')
    assert result.code == 0, result.err
    return (run / 'out/analysis/report.html').as_uri()


def check_text(page):
    """Check that markup in the text is shown and not executed."""
    assert page.title() == 'Inside a GPT'
    tokens = page.locator('#text span')
    assert tokens.count() == len(NASTY)
    assert ''.join(tokens.all_text_contents()).replace('␣', ' ') == NASTY


def check_keys(page):
    """Check that arrow keys choose a token and a head, and that the tip can be closed."""
    page.focus('#text')
    for key in ('ArrowRight', 'ArrowRight', 'ArrowRight', 'ArrowDown'):
        page.keyboard.press(key)
    assert page.input_value('#layer') == '0'
    assert page.input_value('#head') == '1'
    said = page.inner_text('#said')
    assert 'Token 2' in said
    assert 'head 0.1' in said
    shares = re.findall(r'([\d.]+) % \((?:\d+ back|itself)\)', said)
    assert 98 <= sum(map(float, shares)) <= 102   # the shares of tokens 0, 1 and 2
    assert page.locator('#tip').is_visible()
    assert 'nats' in page.inner_text('#tip')
    page.locator('h2').nth(2).dispatch_event('pointerdown')   # a click beside the tip
    assert not page.locator('#tip').is_visible()


def check_pickers(page):
    """Check that the list, the maps, the mouse and the wheel choose what is shown."""
    page.select_option('#layer', '1')
    assert 'head 1.1' in page.inner_text('#said')
    page.locator('#maps button').nth(2).click()
    assert page.input_value('#layer') == '1'
    assert page.input_value('#head') == '0'
    page.locator('#text span').nth(7).hover()
    assert 'Token 7' in page.inner_text('#said')
    assert page.locator('#tip').is_visible()
    page.mouse.wheel(0, 3000)
    page.locator('#tip').wait_for(state='hidden')


def check_sorting(page):
    """Check that a click on a column of the table sorts by it."""
    page.locator('#scan th', has_text='entropy').click()
    cells = page.locator('#scan tr td:nth-child(2)').all_text_contents()
    entropies = [float(cell) for cell in cells]
    assert len(entropies) == 4
    assert entropies == sorted(entropies, reverse=True)


def check_page(page, url, width):
    """Check that the page works without an error, a request or scrolling sideways."""
    messages = []
    requests = []
    page.on('console', lambda message: messages.append(message.text))
    page.on('pageerror', lambda error: messages.append(str(error)))
    page.on('request', lambda request: requests.append(request.url))
    page.goto(url)
    check_text(page)
    check_keys(page)
    check_pickers(page)
    check_sorting(page)
    page.keyboard.press('Tab')
    page.select_option('#mode', 'loss')
    assert page.evaluate('document.documentElement.scrollWidth') <= width
    assert page.title() == 'Inside a GPT'
    assert messages == []
    assert all(asked.startswith('file:') for asked in requests)


def test_the_page_works_on_a_desktop_and_on_a_phone(browser, nasty_page):
    for width, scheme in ((1100, 'light'), (390, 'dark')):
        page = browser.new_page(viewport=dict(width=width, height=800), color_scheme=scheme)
        check_page(page, nasty_page, width)
        page.close()
