"""export_web.py: a page of a model that computes in a browser what torch computes.

pytest tests/test_web.py"""
import functools
import json
import os
import random
import re
from dataclasses import asdict

import pytest
import torch
from conftest import shared
from scipy import stats

from lib import checkpoint, inside, tokenizers, web
from lib.tokenizers import ByteTokenizer, CharTokenizer, GPT2Tokenizer, train_bpe
from model import GPT, GPTConfig, Sampling, chances, probabilities

CHARS = ''.join(map(chr, range(32, 127))) + '\nüß€😀'
TINY = dict(block_size=16, vocab_size=len(CHARS), n_layer=2, n_head=2, n_embd=16)
NASTY = 'a </script><script>document.title="pwned"</script> & "b" <!-- c'

# GPT-2 itself, and models that differ from it in every field of GPTConfig that the page reads
SHAPES = dict(
    gpt2=dict(),
    rope=dict(pos='rope', qk_norm=True, bias=False),
    post=dict(norm='post', activation='gelu_erf', tie_weights=False),
    bare=dict(norm='none', pos='none', activation='relu2', qkv_bias=False),
    straight=dict(residual=False, n_head=1, n_layer=1, qk_norm=True),
    bigram=dict(n_layer=0, tie_weights=False),
    wide=dict(n_embd=30, n_head=3, n_layer=3, block_size=5, vocab_size=len(CHARS) + 6),
)


def tiny(seed=0, **fields):
    """A model with weights that are far from their initial values, so that every part matters."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**TINY | fields)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = 0.2 if p.dim() == 2 else 0.1
            p.copy_(torch.randn_like(p) * scale + (p.dim() == 1 and name.endswith('weight')))
    model.drawable = min(len(CHARS), model.config.vocab_size)
    return model


def facts(tokenizer, **other):
    return dict(title='A <GPT>', parameters=7, dataset='mini', tokenizer=tokenizer.state()['kind'],
                steps=None, val_loss=None, start='') | other


class Page:
    """A page in the browser, with what it said and asked for."""

    def __init__(self, context, path):
        self.page = context.new_page()
        self.said = []
        self.asked = []
        self.page.on('console', lambda message: self.said.append(message.text))
        self.page.on('pageerror', lambda error: self.said.append(str(error)))
        self.page.on('request', lambda request: self.asked.append(request.url))
        self.page.goto(path.absolute().as_uri())

    def __call__(self, code, argument=None):
        """Return what a call of window.gpt gives, with typed arrays as lists."""
        plain = 'x => ArrayBuffer.isView(x) ? [...x] : Array.isArray(x) ? x.map(plain) : x'
        return self.page.evaluate(f'async x => {{ const plain = {plain}; await gpt.ready; '
                                  f'return plain(await {code}); }}', argument)

    def until(self, condition):
        """Wait for a condition. wait_for_function would need eval, which the page forbids."""
        self.page.evaluate(f'(async () => {{ await gpt.ready; while (!({condition})) '
                           f'await new Promise(requestAnimationFrame); }})()')

    def settled(self):
        """Wait until the page shows what there is to see."""
        self.until('state.seen && !waiting.size && !looking && !state.writing')

    def close(self):
        """Check that nothing was fetched or complained about, and that nothing is too wide."""
        width = self.page.viewport_size['width']
        assert self.page.evaluate('document.documentElement.scrollWidth') <= width
        assert not self.said
        assert all(url.startswith(('file:', 'blob:')) for url in self.asked)
        self.page.close()


@pytest.fixture(scope='module')
def context(browser):
    """context(width, scheme, script) -> a browser's context, which starts slowly and is shared."""
    @functools.cache
    def make(width=1200, scheme='light', script=''):
        made = browser.new_context(viewport=dict(width=width, height=800), color_scheme=scheme)
        if script:
            made.add_init_script(script)
        return made
    return make


@pytest.fixture
def opened(context, folder):
    """opened(model, tokenizer, dtype) -> a Page, closed and checked at the end."""
    pages = []

    def show(model, tokenizer=None, dtype='float32', **options):
        tokenizer = tokenizer or CharTokenizer(CHARS)
        path = folder / f'page{len(pages)}.html'
        about = facts(tokenizer, start=options.pop('start', ''),
                      val_loss=options.pop('val_loss', None))
        path.write_text(web.make_page(model, tokenizer, dtype, about), encoding='utf-8')
        pages.append(Page(context(**options), path))
        return pages[-1]
    yield show
    for page in pages:
        page.close()


def compare(page, model, ids, tolerance):
    """Compare logits, 50 greedy ids and attention with torch's; return the ids written."""
    V = model.config.vocab_size
    with torch.no_grad(), inside.watched(model, range(model.config.n_layer)) as seen:
        expected = model(torch.tensor([ids]))[0][0, -1]
    found = torch.tensor(page('gpt.logits(x)', ids))
    assert found.shape == (V,) and (found - expected).abs().max() < tolerance
    new = page('gpt.generate(x, 50, {temperature: 0})', ids)
    assert new == model.generate(torch.tensor([ids]), 50, temperature=0)[0, len(ids):].tolist()
    attention = page('gpt.attention(x)', ids)
    assert len(attention) == model.config.n_layer
    for layer, heads in enumerate(attention):
        weights = torch.tensor(heads).view(model.config.n_head, len(ids), len(ids))
        assert (weights - seen[layer]['weights'][0]).abs().max() < 1e-4
    return new


def test_odd_shapes_compute_what_torch_computes(opened):
    for fields in SHAPES.values():
        model = tiny(**fields)
        page = opened(model)
        assert page('gpt.encode("a ü😀")') == CharTokenizer(CHARS).encode('a ü😀').tolist()
        new = compare(page, model, [5, 3, 60, 5, 7], tolerance=1e-3)
        text = CharTokenizer(CHARS).decode(new).decode()
        assert page('gpt.decode(x)', new) == text


def test_narrow_weights(opened):
    """float16 stays near torch's float32; int8 computes what its own definition says."""
    model = tiny(tie_weights=False, pos='rope')
    ids = [5, 3, 60, 5, 7, 9]
    with torch.no_grad():
        exact = model(torch.tensor([ids]))[0][0, -1]
    found = torch.tensor(opened(model, dtype='float16')('gpt.logits(x)', ids))
    assert 0 < (found - exact).abs().max() < 1e-2
    for fields in (dict(), dict(tie_weights=False, pos='rope')):
        model = tiny(**fields)
        compare(opened(model, dtype='int8'), web.as_in_page(model, 'int8'), ids, tolerance=1e-3)


DRAWS = '''(async () => {
    const all = [];
    for (let seed = 0; seed < x.count; seed++) {
        all.push(...await gpt.generate(x.ids, 1, {...x.settings, seed}));
    }
    return all;
})()'''


def test_draws(opened):
    """Draws follow the exact probabilities, and a seed draws what it draws in model.generate."""
    model = tiny(tie_weights=False)
    page = opened(model)
    ids = [5, 3, 60]
    settings = dict(temperature=0.7, top_k=9, top_p=0.9)
    idx = torch.tensor([ids])
    with torch.no_grad():
        logits = model(idx)[0][:, -1]
        seen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, idx, True)
        exact = probabilities(logits, seen, Sampling(**settings))[0].double()
    exact /= exact.sum()
    count = 2000
    drawn = page(DRAWS, dict(ids=ids, count=count, settings=settings))
    kept = exact.nonzero()[:, 0].tolist()
    assert set(drawn) <= set(kept) and len(kept) > 3
    observed = [drawn.count(i) for i in kept]
    assert stats.chisquare(observed, [count * exact[i].item() for i in kept]).pvalue > 0.001
    for seed in (1337, 2**32 + 5):
        sampling = Sampling(temperature=0.8, top_k=20, top_p=0.95)
        stream = model.stream(idx, 40, sampling, chances([seed], 40))
        settings = dict(temperature=0.8, top_k=20, top_p=0.95, seed=seed)
        found = page('gpt.generate(x.ids, 40, x.settings)', dict(ids=ids, settings=settings))
        assert found == [int(new) for new in stream]


SCRIPTS = [
    "The quick brown fox can't, won't and shouldn't: 12,345.67!",
    'Ελληνικά και Кириллица',
    'العربية مرحبا 123',
    '中文字符 日本語のテキスト 한국어',
    'हिन्दी भाषा ไทย',
    '😀👩\u200d👩\u200d👧 🇩🇪 e\u0301 ﬁ ½ Ⅷ',
    '  two  blanks \n\n\t tabs\u00a0\u2003\u0085\ufeff end  ',
    'a<|endoftext|>b', '\r\n\x00\x7f', 'aB' * 2000, '']


def test_gpt2_bpe(opened, gpt2_files):
    """encode equals tiktoken's, over many scripts and made-up texts; decode returns the text."""
    tokenizer = GPT2Tokenizer()
    page = opened(tiny(vocab_size=50257, block_size=32, n_layer=1), tokenizer, 'int8')
    letters = 'aaeéüßжш中文字😀 \n\t1239\'.,s\u00a0\u200d'
    generator = random.Random(0)
    texts = SCRIPTS + [''.join(generator.choices(letters, k=30)) for _ in range(200)]
    texts.append(shared('tinyshakespeare.txt').read_text()[:5000])
    found = page('Promise.all(x.map(text => gpt.encode(text)))', texts)
    for text, ids in zip(texts, found):
        assert ids == tokenizer.encode(text).tolist(), text
    assert page('Promise.all(x.map(ids => gpt.decode(ids)))', found) == texts
    assert page.page.evaluate('WORDS.flags') == 'gu'


def test_a_trained_bpe(opened):
    """encode equals the tokenizer's, decode returns the text."""
    tokenizer = train_bpe(['low lower lowest, new newer newest é é é 中中 ' * 20], 270)
    page = opened(tiny(vocab_size=270), tokenizer, start='low')
    texts = ['low lowest newer', 'aé😀 中文', 'a<|endoftext|>b', '']
    found = page('Promise.all(x.map(text => gpt.encode(text)))', texts)
    for text, ids in zip(texts, found):
        assert ids == tokenizer.encode(text).tolist(), text
    assert page('Promise.all(x.map(ids => gpt.decode(ids)))', found) == texts
    page.page.wait_for_selector('#next button', timeout=5000)   # the page itself opens, too
    assert page.page.inner_text('#one') == 'One token'


def test_a_bpe_of_gpt2s_size(opened):
    """The ids need all of 16 bits, and <|endoftext|> comes after the other tokens."""
    letters = ''.join(tokenizers._byte_letters())
    merges = [f'{left} {right}' for left in letters for right in letters][:50_000]
    tokenizer = tokenizers.BPETokenizer(merges)
    page = opened(tiny(vocab_size=50257, n_layer=1), tokenizer, 'int8')
    text = 'low lowest<|endoftext|>é 中'
    ids = page('gpt.encode(x)', text)
    assert ids == tokenizer.encode(text).tolist() and max(ids) == 50256
    assert page('gpt.decode(x)', ids) == text


def test_bytes(opened):
    page = opened(tiny(vocab_size=256), ByteTokenizer())
    assert page('gpt.encode("aé😀")') == list('aé😀'.encode())
    assert page('gpt.decode(x)', list('aé😀'.encode())) == 'aé😀'
    page.page.fill('#prompt', 'é')
    page.settled()
    assert page.page.locator('#text span').count() == 2


def test_looking_inside(opened):
    """What the page shows is what the model computes: bars, shading, maps, lens, heads off."""
    model = tiny()
    page = opened(model, start='hello', val_loss=1.5)
    page.settled()
    said = page.page.inner_text('#facts')
    assert f'as unsure as between 4.5 equally likely characters, of {len(CHARS)} (' in said
    tokenizer = CharTokenizer(CHARS)
    idx = torch.tensor(tokenizer.encode('hello').astype('int64'))[None]
    with torch.no_grad(), inside.watched(model, [0, 1]) as seen:
        whole = model(idx)[0][0, -1].softmax(0)
    with torch.no_grad(), inside.zeroed(model, [(1, 0)]):
        without = model(idx)[0][0, -1].softmax(0)

    shares = page.page.evaluate('state.seen.next.map(({ share }) => share)')
    assert shares == pytest.approx(whole.topk(10).values.tolist(), abs=1e-4)
    assert page.page.locator('#next button').count() == 10
    page.page.locator('#maps button').nth(3).click()
    page.page.focus('#text')
    page.page.keyboard.press('ArrowLeft')
    page.settled()
    gaze = page.page.evaluate('[...state.seen.gaze]')
    assert gaze == pytest.approx(seen[1]['weights'][0, 1, 3, :4].tolist(), abs=1e-5)
    assert 'head 1.1' in page.page.inner_text('#gaze')
    maps = page.page.evaluate('state.seen.maps.map(map => [...map])')
    for head, map in enumerate(maps):
        exact = seen[head // 2]['weights'][0, head % 2]
        assert (torch.tensor(map).view(5, 5) / 255 - exact.sqrt()).abs().max() < 1 / 255
    page.page.keyboard.press('End')
    page.settled()
    guesses = page.page.evaluate('state.seen.lens.map(guesses => guesses[0].share)')
    assert len(guesses) == 3 and guesses[2] == pytest.approx(whole.max().item(), abs=1e-4)
    with torch.no_grad():
        x = model.transformer.wte(idx) + model.transformer.wpe.weight[:5]
        x = model.transformer.h[0](x)
        early = model.lm_head(model.transformer.ln_f(x))[0, -1].softmax(0)
    assert guesses[1] == pytest.approx(early.max().item(), abs=1e-4)

    page.page.locator('#maps input').nth(2).uncheck()
    page.settled()
    rows = page.page.evaluate('state.seen.next')
    best = without.topk(10)
    assert [row['share'] for row in rows] == pytest.approx(best.values.tolist(), abs=1e-4)
    before = whole[[row['id'] for row in rows]]
    assert [row['before'] for row in rows] == pytest.approx(before.tolist(), abs=1e-4)
    assert 'Without 1.0: ' in page.page.inner_text('#effect')
    assert page.page.locator('#next .before:visible').count() == 10
    page.page.click('#all-on')
    page.settled()
    assert page.page.locator('#next .before:visible').count() == 0


def test_writing(opened):
    """Tokens, lines, on and on; a taken token; settings; the text that sample.py writes."""
    model = tiny(tie_weights=False)
    page = opened(model, start='ab')
    page.settled()
    tokenizer = CharTokenizer(CHARS)
    value = lambda: page.page.input_value('#prompt')
    page.page.click('#one')
    page.settled()
    assert len(value()) == 3
    page.page.locator('#next button').first.click()
    page.settled()
    taken = page.page.evaluate('state.ids')
    assert len(value()) == 4 and taken == tokenizer.encode(value()).tolist()
    page.page.click('#line')
    page.settled()
    assert value().endswith('\n') or len(value()) == 404
    page.page.click('#clear')
    page.page.fill('#prompt', 'so')
    page.page.click('#settings summary')
    page.page.fill('#temperature', '0.5')
    page.page.fill('#top_k', '40')
    page.page.fill('#seed', '7')
    page.page.click('#on')
    page.until('state.ids.length > 40')
    page.page.click('#on')   # the button says Stop now
    page.settled()
    written = tokenizer.encode(value()).tolist()
    idx = torch.tensor([written[:2]])
    count = len(written) - 2
    sampling = Sampling(temperature=0.5, top_k=40)
    stream = model.stream(idx, count, sampling, chances([7], count))
    expected = [int(new) for new in stream]
    assert written[2:] == expected and 'sees the last 16' in page.page.inner_text('#note')
    assert page.page.locator('#text span').count() == 16
    page.page.fill('#top_p', '3')
    assert 'Top-p is 3; allowed' in page.page.inner_text('#note')
    page.page.fill('#top_p', '')
    page.page.fill('#prompt', 'x')
    page.settled()
    assert 'allowed' not in page.page.inner_text('#note')


def test_what_cannot_be_read(opened):
    """An unknown character is named and nothing else changes; empty and long texts work."""
    page = opened(tiny(), start='hello')
    page.settled()
    before = page.page.inner_text('#next')
    page.page.fill('#prompt', 'hellò')
    page.until('state.textError')
    page.settled()   # the page shows the error with what it looks at next
    assert '"ò"' in page.page.inner_text('#note') and page.page.is_disabled('#one')
    assert page.page.inner_text('#next') == before
    with pytest.raises(Exception, match='does not know "ò"'):
        page('gpt.encode("ò")')
    with pytest.raises(Exception, match='token 999 does not exist'):
        page('gpt.logits([999])')
    page.page.fill('#prompt', '')
    page.settled()
    assert 'empty' in page.page.inner_text('#note') and page.page.is_enabled('#one')
    opening = CharTokenizer(CHARS).encode('\n').tolist()
    assert page('gpt.logits([])') == page('gpt.logits(x)', opening)
    greedy = 'gpt.generate(x, 40, {temperature: 0})'
    assert page(greedy, []) == page(greedy, opening)
    page.page.fill('#prompt', NASTY)
    page.settled()
    assert page.page.title() == 'A <GPT>'
    assert page.page.inner_text('#text').replace('␣', ' ') in NASTY
    ids = CharTokenizer(CHARS).encode(NASTY).tolist()
    assert page('gpt.logits(x)', ids) == page('gpt.logits(x)', ids[-16:])


def test_without_a_worker(opened):
    """Where the browser allows no worker, the page computes by itself."""
    model = tiny()
    page = opened(model, start='hello', script='delete window.Worker')
    compare(page, model, [5, 3, 60], tolerance=1e-3)
    page.settled()
    page.page.click('#one')
    page.settled()
    assert len(page.page.input_value('#prompt')) == 6


def test_phones_and_keys(opened):
    """375 pixels and dark: nothing is wider, and Tab reaches everything."""
    page = opened(tiny(n_head=4), start='hello', width=375, scheme='dark').page
    page.wait_for_selector('#next button')
    page.click('#settings summary')
    page.focus('#prompt')
    reached = set()
    for _ in range(60):
        reached.add(page.evaluate('document.activeElement.id || document.activeElement.ariaLabel'))
        page.keyboard.press('Tab')
    for name in ('prompt', 'one', 'line', 'on', 'clear', 'temperature', 'top_k', 'top_p', 'seed',
                 'layer', 'head', 'text', 'head 0.0 is on', 'show where layer 1, head 3 looks'):
        assert name in reached, name
    assert sum(name.startswith('take ') for name in reached if name) >= 8
    unnamed = page.evaluate('''[...document.querySelectorAll('button, input, select, textarea')]
        .filter(e => !e.ariaLabel && !e.textContent.trim() && !e.labels?.length).length''')
    assert unnamed == 0


def test_a_damaged_page(context, folder):
    """One changed letter, a cut end: the page says so and shows nothing else."""
    tokenizer = CharTokenizer(CHARS)
    whole = web.make_page(tiny(), tokenizer, 'int8', facts(tokenizer))
    weights = whole.index('id="weights">')
    letter = whole[weights + 1000]
    changed = whole[:weights + 1000] + ('B' if letter == 'A' else 'A') + whole[weights + 1001:]
    told = whole.replace('"block_size": 16', '"block_size": 17')
    sign = whole[:weights + 900] + '*' + whole[weights + 901:]
    cases = dict(changed=changed, cut=whole[:-3000], shorter=whole[:weights + 2000], told=told,
                 lost=whole[:weights - 50], sign=sign)
    for name, content in cases.items():
        (folder / f'{name}.html').write_text(content, encoding='utf-8')
        page = Page(context(), folder / f'{name}.html')
        page.page.wait_for_selector('#facts.wrong')
        assert 'This page is damaged' in page.page.inner_text('#facts'), name
        assert not page.page.is_visible('#all')
        with pytest.raises(Exception, match='damaged'):
            page('gpt.ready')
        page.close()


# ---- the script ----------------------------------------------------------------------------------

def described(path):
    """Return what a page's description holds."""
    page = open(path, encoding='utf-8').read()
    return json.loads(re.search(r'id="description">(.*?)</script>', page, re.DOTALL)[1])


def test_the_script(script, trained, folder):
    """The page of a run: the narrowest weights with float32's text, sizes and costs in words."""
    data = f'--data_dir={trained.parent / "data"}'
    result = script('export_web.py', f'--out_dir={trained}', data, '--to=deep/page.html')
    assert result.code == 0 and result.out == '', result.err
    found = described('deep/page.html')
    model = checkpoint.build_model(checkpoint.load(f'{trained}/best.pt'), '')
    tokenizer = CharTokenizer(found['tokenizer']['chars'])
    texts = {dtype: web.greedy_ids(web.as_in_page(model, dtype), tokenizer, 200)
             for dtype in web.NUMBER_BYTES}
    chosen = next(dtype for dtype in texts if texts[dtype] == texts['float32'])
    assert found['dtype'] == chosen and f'weights in {chosen}' in result.err
    assert found['facts']['dataset'] == 'mini' and found['facts']['val_loss'] > 0
    for narrow in ('int8', 'float16'):
        assert re.search(rf'{narrow} costs [+-]0\.0\d+ nats a token', result.err)
    assert os.listdir('deep') == ['page.html']
    for dtype, size in (('int8', 1), ('float16', 2), ('float32', 4)):
        flags = [f'--out_dir={trained}', '--data_dir=nowhere', f'--dtype={dtype}', '--start=so']
        result = script('export_web.py', *flags, '--to=deep/page.html')
        assert result.code == 0, result.err
        assert described('deep/page.html')['bytes'] > size * 7_000
        assert ('was not measured' in result.err) == (dtype != 'float32')
        assert described('deep/page.html')['facts']['start'] == 'so'


def test_a_gpt2_of_hugging_face(script, folder, gpt2_files):
    tiny(vocab_size=50257).save_pretrained('tiny')
    result = script('export_web.py', '--init_from=tiny', '--to=page.html', '--dtype=int8')
    assert result.code == 0, result.err
    assert described('page.html')['tokenizer']['kind'] == 'gpt2'


def test_mistakes(script, refused, trained, folder, modes_hold, monkeypatch):
    run = f'--out_dir={trained}'
    refused('export_web.py', run, words=['--to', '.html', 'type'])
    refused('export_web.py', run, '--to=page.txt', words=['page.txt', '.html'])
    refused('export_web.py', run, '--to=p.html', '--dtype=int4', words=['int4', 'int8', 'float16'])
    refused('export_web.py', run, '--to=p.html', '--start=ü', words=['ü', 'vocabulary'])
    refused('export_web.py', '--out_dir=nowhere', '--to=new/p.html', words=['nowhere', 'train.py'])
    (folder / 'f.html').mkdir()
    refused('export_web.py', run, '--to=f.html', words=['f.html', 'folder'])
    (folder / 'closed').mkdir()
    os.chmod('closed', 0o555)
    refused('export_web.py', run, '--to=closed/p.html',
            words=['closed/p.html', 'cannot be written'])
    (folder / 'file').write_text('')
    refused('export_web.py', run, '--to=file/p.html', words=['file/p.html', 'cannot be written'])
    assert sorted(os.listdir()) == ['closed', 'f.html', 'file']

    nanogpt = tiny()
    torch.save(dict(model=nanogpt.state_dict(), model_args=asdict(nanogpt.config)), 'ckpt.pt')
    refused('export_web.py', '--checkpoint=ckpt.pt', '--to=p.html',
            words=['ckpt.pt', 'no tokenizer'])
    large = tiny()
    with torch.no_grad():
        large.transformer.wte.weight[0, 0] = 1e6
    saved = dict(model=large.state_dict(), model_args=asdict(large.config),
                 tokenizer=CharTokenizer(CHARS).state())
    torch.save(saved, 'large.pt')
    refused('export_web.py', '--checkpoint=large.pt', '--to=p.html', '--dtype=float16',
            words=['65,504', '--dtype=float32'])
    sizes = dict(int8=250e6, float16=350e6, float32=550e6)
    monkeypatch.setattr('lib.web.page_bytes', lambda model, dtype: sizes[dtype])
    refused('export_web.py', run, '--to=p.html', '--dtype=float32',
            words=['550.0 MB', '500.0 MB', '--dtype=float16'])
    result = script('export_web.py', run, '--to=p.html', '--dtype=int8')
    assert result.code == 0 and 'too much for most phones' in result.err
