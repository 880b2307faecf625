"""analyze.py, from a checkpoint to a page that a browser shows. pytest tests/test_analyze.py"""
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

FILES = {'attention.npz', 'attention.png', 'depth_scan.csv', 'depth_scan.png', 'embeddings.png', 'gradients.csv', 'gradients.png',
         'head.png', 'head_ablation.csv', 'head_ablation.png', 'losses.png', 'report.html'}
NASTY = 'the miller <script>document.title="pwned"</script> & "his" </script><!-- wife'


def report_of(path):
    """What the page was given."""
    page = path.read_text()
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


@pytest.fixture
def run(trained, folder):
    """A working folder with the tiny model's run and its data."""
    shutil.copytree(trained, 'out')
    shutil.copytree(trained.parent / 'data', 'data')
    return folder


@pytest.mark.pictures
def test_analyze(script, run):
    result = script('analyze.py', '--device=cpu', '--start=VAL:3', '--layer=1', '--head=1', '--windows=5')
    assert result.code == 0, result.err
    assert {path.name for path in (run / 'out/analysis').iterdir()} == FILES
    for path in (run / 'out/analysis').glob('*.png'):
        assert path.read_bytes()[:8] == b'\x89PNG\r\n\x1a\n' and path.stat().st_size > 3000
    arrays = np.load(run / 'out/analysis/attention.npz')
    assert arrays['weights'].shape == (2, 2, 16, 16) and np.allclose(arrays['weights'].sum(-1), 1, atol=1e-6)
    assert arrays['outputs'].shape == (2, 2, 16, 8)
    tokens = np.fromfile('data/mini/val.bin', dtype='<u2')[3:19]
    assert arrays['tokens'].tolist() == tokens.tolist()
    found = report_of(run / 'out/analysis/report.html')
    assert (found['layer'], found['head'], found['size'], found['pool']) == (1, 1, 16, 1)
    assert found['losses'][1:] == pytest.approx(arrays['losses'].tolist())
    with open('out/analysis/head_ablation.csv') as f:
        rows = list(csv.DictReader(f))
    assert [(row['layer'], row['head']) for row in rows] == [('0', '0'), ('0', '1'), ('1', '0'), ('1', '1')]
    for row in rows:
        assert float(row['change_low']) < float(row['change']) < float(row['change_high'])
    assert all(line in found['findings'] for line in result.out.splitlines())
    assert 'note:' not in result.err and not list((run / 'out').glob('analysis-*'))
    assert 'Analyzed are the first 16, which is all that fits' in script('analyze.py', '--tokens=20', '--windows=2').err


def test_the_interval_is_students(script, run):
    """Mean ± t · sd/√n of the windows' differences, measured here once more by zeroing the head."""
    from scipy import stats
    from torch.nn import functional as F

    from lib import inside
    from lib.checkpoint import open_model
    script('analyze.py', '--device=cpu', '--windows=4')
    model = open_model('resume', 'out', '', 'data', given=set()).model
    split = np.fromfile('data/mini/val.bin', dtype='<u2').astype(np.int64)
    starts = np.linspace(0, len(split) - 17, 4).astype(int)
    rows = torch.from_numpy(np.stack([split[s:s + 17] for s in starts]))

    def losses():
        with torch.no_grad():
            return F.cross_entropy(model(rows[:, :-1])[0].transpose(1, 2), rows[:, 1:], reduction='none').mean(dim=1).double()
    base = losses()
    with inside.zeroed(model.eval(), [(1, 0)]):
        change = losses() - base
    low, high = stats.t.interval(0.95, 3, loc=change.mean(), scale=change.std() / 2)
    with open('out/analysis/head_ablation.csv') as f:
        row = list(csv.DictReader(f))[2]
    assert [float(row[key]) for key in ('change', 'change_low', 'change_high')] == pytest.approx(
        [change.mean().item(), float(low), float(high)], abs=1e-5)


def tiny(run, **fields):
    """An untrained model of bytes, as nasty.pt."""
    from lib import checkpoint
    from lib.tokenizers import ByteTokenizer
    from model import GPT, GPTConfig
    torch.manual_seed(0)
    model = GPT(GPTConfig(**dict(block_size=128, vocab_size=256, n_layer=2, n_head=2, n_embd=16) | fields))
    return model, lambda: checkpoint.save('nasty.pt', torch.load(run / 'out/best.pt', weights_only=True) | dict(
        tokenizer=ByteTokenizer().state(), model_args=model.config.__dict__, model=model.state_dict(), config={}))


@pytest.mark.pictures
@pytest.mark.parametrize('fields', [
    dict(block_size=2), dict(block_size=3, n_layer=1, n_head=1), dict(pos='rope'), dict(norm='post', residual=False, bias=False),
    dict(pos='none', norm='none', qk_norm=True, tie_weights=False)])
def test_small_and_unusual_models(script, run, fields):
    """Numbers in every cell, also where a context is too short for two of anything."""
    model, save = tiny(run, **fields)
    save()
    result = script('analyze.py', '--device=cpu', '--checkpoint=nasty.pt', '--start=hello there')
    assert result.code == 0, result.err
    with open('out/analysis/depth_scan.csv') as f:
        for row in csv.DictReader(f):
            assert all(np.isfinite(float(value)) for key, value in row.items() if key != 'called')
    assert 'NaN' not in (run / 'out/analysis/report.html').read_text()


def test_losses_that_are_no_numbers_are_refused(refused, run):
    model, save = tiny(run)
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(1e30)
        model.transformer.ln_f.bias.fill_(1e38)
    save()
    refused('analyze.py', '--device=cpu', '--checkpoint=nasty.pt', '--start=hello', words=['nasty.pt', 'not finite'])
    assert not (run / 'out/analysis').exists()


@pytest.mark.pictures
def test_names_are_no_formulas(script, run):
    (run / 'a$\\frac$').mkdir()
    shutil.copy('out/best.pt', 'a$\\frac$/b.pt')
    assert script('analyze.py', '--device=cpu', '--checkpoint=a$\\frac$/b.pt', '--windows=2').code == 0


def test_ctrl_c_leaves_nothing(run):
    process = subprocess.Popen([PYTHON, str(ROOT / 'analyze.py'), '--device=cpu', '--windows=60'],
                               stderr=subprocess.PIPE, text=True)
    while 'parameters' not in process.stderr.readline():   # then its folder is there
        pass
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert not (run / 'out/analysis').exists() and not list((run / 'out').glob('analysis-*'))


def test_without_a_validation_split(script, run):
    shutil.rmtree('data')
    with open('text.txt', 'w', encoding='utf-8-sig') as f:   # with the mark of an editor on Windows
        f.write('the miller said')
    result = script('analyze.py', '--device=cpu', '--start=FILE:text.txt')
    assert result.code == 0 and 'measured on the text itself' in result.err
    assert report_of(run / 'out/analysis/report.html')['tokens'] == list('the miller said')


def test_a_run_knows_its_data_dir(script, run):
    os.rename('data', 'elsewhere')
    rewrite('out/best.pt', data_dir='elsewhere')
    result = script('analyze.py', '--device=cpu', '--windows=2')
    assert result.code == 0 and 'note:' not in result.err, result.err


def test_a_dataset_of_another_tokenizer_is_named(script, refused, run):
    from lib.prepare import write_dataset
    from lib.tokenizers import ByteTokenizer
    tokenizer = ByteTokenizer()
    write_dataset('data/mini', dict(val=[(tokenizer.encode(TEXT), len(TEXT))]), tokenizer,
                  dict(name='mini', url=None, sha256='', stand_in=False))
    result = script('analyze.py', '--device=cpu', '--start=the miller')
    for words in ('measured on the text itself', 'data/mini has another tokenizer'):
        assert words in result.err
    refused('analyze.py', '--device=cpu', words=['data/mini has another tokenizer', '--start=TEXT'])


def changed(run, monkeypatch, old, new):
    """analyze.py with one line of it otherwise."""
    source = (ROOT / 'analyze.py').read_text()
    assert old in source
    for path in ROOT.glob('*.py'):
        shutil.copy(path, run)
    shutil.copytree(ROOT / 'lib', run / 'lib', dirs_exist_ok=True)
    (run / 'analyze.py').write_text(source.replace(old, new))
    monkeypatch.setattr('conftest.ROOT', run)


def test_more_attention_than_fits_is_cut(script, run, monkeypatch):
    changed(run, monkeypatch, 'HELD_BYTES = 1 << 30', 'HELD_BYTES = 4 * 4 * 10 * 10')
    result = script('analyze.py', '--device=cpu', '--windows=2', '--tokens=20')
    assert 'Analyzed are the first 10, as the attention of 4 heads' in result.err
    assert len(report_of(run / 'out/analysis/report.html')['tokens']) == 10


def test_what_cannot_be_written_is_said(refused, run):
    """A folder in a file's place, a file in the folder's."""
    (run / 'out/analysis/gradients.png').mkdir(parents=True)
    refused('analyze.py', '--device=cpu', '--start=the miller', words=['out/analysis', 'cannot be written', '--to'])
    assert [path.name for path in (run / 'out/analysis').iterdir()] == ['gradients.png']
    assert not list((run / 'out').glob('analysis-*'))
    (run / 'file').write_text('')
    refused('analyze.py', '--device=cpu', '--checkpoint=out/best.pt', '--out_dir=file', words=['file', '--to=FOLDER'])
    refused('analyze.py', '--device=cpu', '--to=file', words=['file', '--to=FOLDER'])


def test_the_pages_go_where_to_says(script, run):
    result = script('analyze.py', '--device=cpu', '--windows=2', '--to=deep/pages')
    assert result.code == 0 and 'deep/pages/report.html' in result.err, result.err
    assert set(os.listdir('deep/pages')) == FILES and os.listdir('deep') == ['pages']
    assert not os.path.exists('out/analysis')
    assert script('analyze.py', '--device=cpu', '--windows=2', '--to=deep/pages').code == 0


def test_a_folder_that_is_read_only(script, refused, run, modes_hold):
    """Found before the work is done; the advice can be followed; evaluating needs no writing."""
    os.chmod('out', 0o555)
    line = refused('analyze.py', '--device=cpu', words=['out/analysis', 'type --to=FOLDER'])
    assert 'Permission denied' in line
    result = script('analyze.py', '--device=cpu', '--windows=2', '--to=pages')
    assert result.code == 0 and set(os.listdir('pages')) == FILES, result.err
    os.chmod('pages', 0o555)
    refused('analyze.py', '--device=cpu', '--to=pages', words=['pages cannot be written'])
    result = script('train.py', '--init_from=resume', '--eval_only', '--device=cpu')
    assert result.code == 0 and 'on the whole split' in result.err, result.err
    refused('train.py', '--init_from=resume', '--device=cpu', words=['out_dir=out cannot be'])
    os.chmod('out', 0o755)


@pytest.mark.skipif(os.name == 'nt', reason='names are not bytes there')
def test_a_name_that_is_not_utf8(run):
    """The page shows a replacement character for what cannot be read."""
    name = b'out-\xff'
    try:
        os.rename('out', name)
    except OSError:
        pytest.skip('this file system takes no such name')
    flags = [b'--out_dir=' + name, '--device=cpu', '--windows=2']
    done = subprocess.run([PYTHON, str(ROOT / 'analyze.py'), *flags], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert {file.decode() for file in os.listdir(name + b'/analysis')} == FILES
    page = run / os.fsdecode(name) / 'analysis/report.html'
    assert 'out-\ufffd/best.pt' in report_of(page)['facts']

def test_long_contexts_are_shown_in_blocks(script, run, monkeypatch):
    """The page gets blocks when all would be too much, rows still sum to 1; the arrays stay whole."""
    changed(run, monkeypatch, 'SHOWN_BYTES = 5_000_000', 'SHOWN_BYTES = 100')
    result = script('analyze.py', '--device=cpu', '--windows=2')
    assert 'between blocks of' in result.err
    found = report_of(run / 'out/analysis/report.html')
    size = found['size']
    import base64
    packed = np.frombuffer(base64.b64decode(found['attention']), np.uint8).reshape(4, size * (size + 1) // 2)
    assert packed.size <= 100 and found['pool'] * size >= 16
    weights = (packed / 255) ** 2
    for i in range(size):
        assert np.allclose(weights[:, i * (i + 1) // 2:(i + 1) * (i + 2) // 2].sum(1), 1, atol=0.02)


def test_a_gpt2_of_hugging_face(script, folder, gpt2_files):
    from transformers import GPT2Config

    from model import GPT, GPTConfig
    torch.manual_seed(0)
    GPT(GPTConfig(block_size=32, n_layer=1, n_head=2, n_embd=16)).save_pretrained('tiny')
    from lib import tokenizers
    for name, content in tokenizers.hf_tokenizer_files(tokenizers.GPT2Tokenizer(), 32).items():
        (folder / 'tiny' / name).write_text(content if isinstance(content, str) else json.dumps(content))
    assert GPT2Config.from_pretrained('tiny').n_embd == 16
    flags = ['--device=cpu', '--start=When Mary and John went to the store, John gave']
    result = script('analyze.py', '--init_from=tiny', *flags)
    assert result.code == 0, result.err
    assert report_of(folder / 'out/analysis-tiny/report.html')['tokens'][1] == ' Mary'
    assert 'out/analysis-tiny' in result.err and os.listdir('out') == ['analysis-tiny']
    # a folder that was typed and holds no run is this model's own
    flags += ['--init_from=./tiny/', '--out_dir=mine']
    assert script('analyze.py', *flags).code == 0 and os.listdir('mine') == ['analysis']
    (folder / 'mine/ckpt.pt').write_bytes(b'')
    assert script('analyze.py', *flags).code == 0
    assert sorted(os.listdir('mine')) == ['analysis', 'analysis-tiny', 'ckpt.pt']


def test_a_checkpoint_of_nanogpt(script, mini):
    """With its characters from its dataset's folder; what is no GPT's at all is refused."""
    from test_hub import nanogpt_checkpoint
    nanogpt_checkpoint('ckpt.pt', vocab_size=len(json.loads((mini / 'data/mini/meta.json').read_text())['tokenizer']['chars']))
    result = script('analyze.py', '--device=cpu', '--checkpoint=ckpt.pt', '--start=the miller')
    assert result.code == 0 and report_of(mini / 'out/analysis/report.html')['tokens'] == list('the miller'), result.err
    torch.save(dict(weights=torch.ones(3)), 'other.pt')
    result = script('analyze.py', '--device=cpu', '--checkpoint=other.pt', '--start=the miller')
    assert result.code == 2 and 'other.pt' in result.err and 'Traceback' not in result.err


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no /dev/full here')
def test_a_full_stdout(process, run):
    with open('/dev/full', 'w') as full:
        done = process('analyze.py', '--device=cpu', '--windows=2', capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2 and 'stdout cannot be written' in done.stderr and 'Traceback' not in done.stderr
    assert (run / 'out/analysis/report.html').exists()


@pytest.mark.parametrize('flags, words', [
    (['--layer=2'], ['layer=2', '0 to 1']), (['--head=-1'], ['head=-1', '0 to 1']), (['--start=t'], ['1 token', 'two']),
    (['--start=FILE:nowhere'], ['nowhere']), (['--start=VAL:999999'], ['VAL:999999', 'VAL:0']), (['--start=VAL:x'], ['VAL:x']), ([f'--start=VAL:{"9" * 5000}'], ['VAL:9999', 'VAL:0']),
    (['--tokens=1'], ['tokens=1']), (['--windows=1'], ['windows=1', 'auto']), (['--start=ü'], ['ü', 'vocabulary']),
    (['--checkpoint=data/mini/meta.json'], ['meta.json']), (['--dataset=none'], ['none', 'val.bin']), (['--laier=1'], ['--layer'])])
def test_mistakes(refused, run, flags, words):
    refused('analyze.py', *flags, '--device=cpu', words=words)
    assert not (run / 'out/analysis').exists()


def test_the_page_in_a_browser(script, run, browser):
    """No error; pickers and keys work; markup stays text; nothing is fetched; a phone need not scroll sideways."""
    tiny(run)[1]()
    result = script('analyze.py', '--device=cpu', '--checkpoint=nasty.pt', f'--start={NASTY}')
    assert result.code == 0, result.err
    for width, scheme in ((1100, 'light'), (390, 'dark')):
        page = browser.new_page(viewport=dict(width=width, height=800), color_scheme=scheme)
        said, asked = [], []
        page.on('console', lambda message, said=said: said.append(message.text))
        page.on('pageerror', lambda error, said=said: said.append(str(error)))
        page.on('request', lambda request, asked=asked: asked.append(request.url))
        page.goto((run / 'out/analysis/report.html').as_uri())
        assert page.title() == 'Inside a GPT' and page.locator('#text span').count() == len(NASTY)
        assert ''.join(page.locator('#text span').all_text_contents()).replace('␣', ' ') == NASTY
        page.focus('#text')
        for key in ('ArrowRight', 'ArrowRight', 'ArrowRight', 'ArrowDown'):
            page.keyboard.press(key)
        assert page.input_value('#head') == '1' and page.input_value('#layer') == '0'
        assert page.locator('#lens tr').count() == 4 and 'after layer 1' in page.inner_text('#lens')
        assert 'Token 2' in page.inner_text('#said') and 'head 0.1' in page.inner_text('#said')
        shares = [float(share) for share in re.findall(r'([\d.]+) % \((?:\d+ back|itself)\)', page.inner_text('#said'))]
        assert 98 <= sum(shares) <= 102   # of all three tokens so far
        assert page.locator('#tip').is_visible() and 'nats' in page.inner_text('#tip')
        page.locator('h2').nth(2).dispatch_event('pointerdown')   # elsewhere
        assert not page.locator('#tip').is_visible()
        page.select_option('#layer', '1')
        assert 'head 1.1' in page.inner_text('#said')
        page.locator('#maps button').nth(2).click()
        assert (page.input_value('#layer'), page.input_value('#head')) == ('1', '0')
        page.locator('#text span').nth(7).hover()
        assert 'Token 7' in page.inner_text('#said') and page.locator('#tip').is_visible()
        page.mouse.wheel(0, 3000)
        page.locator('#tip').wait_for(state='hidden')
        page.locator('#scan th', has_text='entropy').click()
        entropies = [float(cell) for cell in page.locator('#scan tr td:nth-child(2)').all_text_contents()]
        assert entropies == sorted(entropies, reverse=True) and len(entropies) == 4
        page.keyboard.press('Tab')
        page.select_option('#mode', 'loss')
        assert page.evaluate('document.documentElement.scrollWidth') <= width
        assert page.title() == 'Inside a GPT' and not said and all(url.startswith('file:') for url in asked)
        page.close()
