"""Test narrow weights and the faster steps of sampling. pytest tests/test_decoding.py"""
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import COMPILED
from test_model import rough, small, tokens
from torch.nn import functional as F

import model as gpt
from lib import decoding
from lib.data import Dataset
from lib.prepare import write_dataset
from lib.tokenizers import CharTokenizer
from model import Sampling

# find_compile ignores it likewise, for torch's own imports
pytestmark = pytest.mark.filterwarnings('ignore:.*torch.jit:DeprecationWarning')
KINDS = [
    {},
    dict(pos='rope'),
    dict(pos='none'),
    dict(n_head=3, n_embd=24),
    dict(norm='post'),
    dict(residual=False),
    dict(qk_norm=True, activation='relu2', tie_weights=False, bias=False),
]


# ---- narrow weights ----------------------------------------------------------------------------

def exact(linear):
    """Return what int8 weights stand for: rows rounded to multiples of |largest number| / 127."""
    step = linear.weight.abs().amax(1, keepdim=True) / 127
    return (linear.weight / step).round() * step


@pytest.mark.processor
@pytest.mark.parametrize('rows', [1, 3, 4, 5, 33])
@pytest.mark.parametrize('width', [96, 66])   # torch's int8 kernel crashes on 66
@pytest.mark.parametrize('bias', [True, False])
def test_int8_is_its_definition(rows, width, bias):
    """Few rows are multiplied by torch's int8 kernel, many by F.linear."""
    torch.manual_seed(rows)
    linear = torch.nn.Linear(width, 40, bias=bias)
    x = torch.randn(rows, 1, width)
    with torch.inference_mode():
        expected = F.linear(x, exact(linear), linear.bias)
        ours = decoding.NarrowLinear(linear, torch.float32, True)(x)
        assert ours.shape == (rows, 1, 40)
        assert (ours - expected).abs().max() < 1e-5
        assert (ours - linear(x)).abs().max() < 0.03
        assert not torch.equal(ours, linear(x))

        rounded = decoding.NarrowLinear(linear, torch.bfloat16, True)(x)
        assert rounded.dtype == torch.float32
        assert (rounded - expected).abs().max() < 0.02


@pytest.mark.processor
@pytest.mark.parametrize('rows', [1, 33])
def test_int8_does_not_overflow_in_fp16(rows):
    """Sums of numbers up to 127 are beyond fp16."""
    torch.manual_seed(rows)
    linear = torch.nn.Linear(96, 40)
    x = 300 * torch.sign(linear.weight[:1]).expand(rows, -1)
    with torch.inference_mode():
        ours = decoding.NarrowLinear(linear, torch.float16, True)(x)
        expected = F.linear(x, exact(linear), linear.bias)
    assert (ours - expected).abs().max() < 1e-5 * ours.abs().max()


def test_int8_is_measured_without_fp16s_autocast(folder):
    """Autocast would cast int8's sums to fp16, in which they overflow."""
    net = rough(small()).eval()
    with torch.no_grad():
        for block in net.transformer.h:   # activations of some thousands between the two
            block.mlp.c_fc.weight.mul_(3000)
            block.mlp.c_proj.weight.div_(3000)
    ids = torch.randint(61, (4000,)).numpy()
    splits = dict(train=[(ids, 4000)], val=[(ids, 4000)])
    source = dict(name='random', url=None, sha256='', stand_in=False)
    letters = ''.join(map(chr, range(60, 121)))
    write_dataset('data/random', splits, CharTokenizer(letters), source)
    data = Dataset('random', 'data')
    exact_loss, lossy_loss = decoding.quantize_and_compare(net, 'float16', data, 'cpu')
    assert abs(lossy_loss - exact_loss) < 0.5


@pytest.mark.processor
@pytest.mark.parametrize('rows', [1, 3, 9])
def test_words_hold_the_int8_weights(monkeypatch, rows):
    """With AVX2 alone four weights are read as one int32; the products stay the same."""
    linear = torch.nn.Linear(48, 20)
    x = torch.randn(rows, 48)
    layers = []
    for has_avx512 in (True, False):
        monkeypatch.setattr(decoding, 'cpu_has_avx512', lambda answer=has_avx512: answer)
        layers.append(decoding.NarrowLinear(linear, torch.float32, True))
    whole, words = layers
    assert whole.words is None
    assert words.words.shape == (20, 12)
    assert words.words.dtype == torch.int32
    assert torch.allclose(words(x), whole(x), atol=1e-5)
    row = decoding.product_of_words(words.words, x[0]) * words.scale + linear.bias
    assert torch.allclose(row, whole(x)[0], atol=1e-5)


def test_int8_of_a_row_of_zeros():
    linear = torch.nn.Linear(32, 4)
    torch.nn.init.zeros_(linear.weight)
    with torch.inference_mode():
        ours = decoding.NarrowLinear(linear, torch.float32, True)(torch.ones(1, 32))
    assert torch.equal(ours, linear.bias[None])


@pytest.mark.processor
def test_narrow_replaces_every_matrix_and_nothing_else():
    net = rough(small(n_layer=3))
    numbers = 0   # the tied head is counted as wte
    biases = 0
    for name, p in net.named_parameters():
        if p.dim() == 2 and 'wpe' not in name:
            numbers += p.numel()
        if name.endswith('bias') and 'ln_' not in name:
            biases += p.numel()
    before = net.transformer.wte.weight.clone()
    decoding.narrow(net, 'bfloat16')
    assert not any(isinstance(layer, torch.nn.Linear) for layer in net.modules())
    assert decoding.weight_bytes(net) == 2 * numbers + 4 * biases
    assert torch.equal(net.transformer.wte.weight, before)
    assert {p.dtype for p in net.parameters()} == {torch.float32}


# ---- steps -------------------------------------------------------------------------------------

def text(net, idx, chance, sampling=None, **how):
    """Return the tokens (B, new) that a net's stream yields."""
    stream = net.stream(idx, chance.size(1), sampling or Sampling(), chance, **how)
    return torch.cat(list(stream), 1)


@COMPILED
@pytest.mark.parametrize('changes, steps', [
    ({}, [None]),   # learned positions are compiled in test_compiled_sample
    (dict(pos='rope', n_head=1, n_embd=26, norm='post'),
     [None, decoding.compiled_step, decoding.GraphedSampling(compiled=True)]),
])
def test_fp32_text_is_the_same_narrowed_compiled_or_not(changes, steps):
    """The texts reach up to block_size and beyond it. Several texts stay uncompiled."""
    torch._dynamo.reset()
    decoding.compiled_forward.cache_clear()
    net = rough(small(**changes)).eval()
    idx = tokens(1, 5)
    chance = gpt.chances([1, 2, 3], 34)
    one = text(net, idx, chance[:1])
    three = text(net, idx, chance)
    greedy = text(net, idx, chance[:1], Sampling(temperature=0), kv_cache=False)
    decoding.narrow(net, 'float32')
    for step in steps:
        assert torch.equal(text(net, idx, chance[:1], step=step), one)
        assert torch.equal(text(net, idx, chance, step=step), three)
        assert torch.equal(text(net, idx, chance[:1], Sampling(temperature=0), step=step), greedy)


@pytest.mark.processor
@COMPILED
@pytest.mark.parametrize('quantize', ['', 'int8'])
def test_compiled_logits_differ_by_rounding_alone(quantize):
    torch._dynamo.reset()
    decoding.compiled_forward.cache_clear()
    net = rough(small(n_embd=66)).eval()
    idx = tokens(1, 20)
    decoding.narrow(net, 'bfloat16', quantize)

    def logits(run):
        """Return the logits after each token, read one by one: (20, V)."""
        cache = gpt.Cache(net.config, 'cpu')
        rows = []
        with torch.inference_mode():
            for i in range(20):
                rows.append(net.next_logits(idx[:, i:i + 1], cache, run if i else gpt.call))
                cache.advance(1)
        return torch.cat(rows)

    plain = logits(gpt.call)
    compiled = logits(decoding.call_compiled)
    assert (compiled - plain).abs().max() < 0.03 * plain.abs().max()


# Prompt lengths matter to positions and the cache: three kinds are tested with all lengths.
LENGTHS = [(changes, T) for changes in KINDS[:3] for T in (1, 20, 31, 32, 40)]
LENGTHS += [(changes, 20) for changes in KINDS[3:]]


@pytest.mark.parametrize('changes, T', LENGTHS)
def test_the_step_that_a_graph_records_gives_the_same_text(changes, T):
    """On a processor GraphedSampling runs what it records on a GPU, with the same copies."""
    net = rough(small(**changes)).eval()
    for B, rows in ((1, 1), (1, 3), (2, 2)):
        idx = tokens(B, T)
        chance = gpt.chances(range(rows), 20)
        step = decoding.GraphedSampling()   # records anew for each text
        for sampling in (
            Sampling(temperature=0),
            Sampling(),
            Sampling(top_k=5, temperature=2.0, repetition_penalty=1.5),
            Sampling(top_p=0.7),
        ):
            plain = text(net, idx, chance, sampling)
            assert torch.equal(text(net, idx, chance, sampling, step=step), plain)
        assert torch.equal(text(net, idx, chance[:, :1], step=step), text(net, idx, chance[:, :1]))


def test_a_graph_is_recorded_when_the_cache_grows(monkeypatch):
    """140 tokens need room for 64, 128 and 140 on a processor, and a graph for each."""
    rooms = []
    record = decoding.GraphedSampling.record

    def noted(self, model, idx, cache, *rest):
        rooms.append(cache.room)
        record(self, model, idx, cache, *rest)

    monkeypatch.setattr(decoding.GraphedSampling, 'record', noted)
    net = rough(small(block_size=140)).eval()
    chance = gpt.chances([1], 140)
    assert torch.equal(
        text(net, tokens(1, 5), chance, step=decoding.GraphedSampling()),
        text(net, tokens(1, 5), chance),
    )
    assert rooms == [64, 128, 140]


@pytest.mark.parametrize('idx, words', [
    (torch.tensor([[61]]), 'tokens are 0 to 60'),
    (torch.empty(1, 0, dtype=torch.long), 'a prompt of shape'),
])
def test_stream_refuses_a_prompt(idx, words):
    with pytest.raises(ValueError, match=words):
        text(small(), idx, gpt.chances([1], 3), step=decoding.GraphedSampling())


def test_stream_needs_chance_to_draw():
    with pytest.raises(ValueError, match='chance is None'):
        next(small().stream(tokens(1, 4), 3, Sampling()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU: it records CUDA graphs')
@pytest.mark.parametrize('changes', KINDS)
def test_graph_on_a_gpu(changes):
    net = rough(small(**changes)).eval().cuda()
    idx = tokens(1, 5).cuda()
    chance = gpt.chances([1, 2, 3], 34).cuda()
    graphed = text(net, idx, chance, step=decoding.GraphedSampling())
    assert torch.equal(graphed, text(net, idx, chance))


def test_compiling_pays_for_many_tokens_of_one_text():
    net = small()
    big = SimpleNamespace(config=gpt.GPTConfig(), num_params=lambda: 124_439_808)
    assert decoding.compiling_pays(big, 'cpu', 'bfloat16', '', 1000, 1)
    assert not decoding.compiling_pays(net, 'cpu', 'bfloat16', '', 1000, 1)
    assert not decoding.compiling_pays(big, 'cpu', 'bfloat16', '', 100, 1)
    assert not decoding.compiling_pays(big, 'cpu', 'bfloat16', '', 1000, 8)
    assert not decoding.compiling_pays(big, 'cuda', 'bfloat16', '', 1000, 1)


# ---- the scripts -------------------------------------------------------------------------------

@pytest.mark.processor
def test_sample_in_int8_shows_its_loss(script, trained, folder):
    data = f'--data_dir={trained.parent / "data"}'
    flags = [
        f'--out_dir={trained}',
        '--start=so',
        '--max_new_tokens=30',
        '--device=cpu',
        '--quantize=int8',
        '--temperature=0',
    ]
    shown = script('sample.py', *flags, data)
    assert shown.code == 0
    assert 'int8: ' in shown.err
    assert 'in float32' in shown.err
    assert len(shown.out) == 33
    without_data = script('sample.py', *flags, '--data_dir=nowhere')
    assert 'what int8 costs was not measured' in without_data.err

    flags = [f'--out_dir={trained}', data, '--device=cpu', '--compile=False', '--json=-']
    measured = json.loads(script('evaluate.py', *flags, '--quantize=int8').out)
    plain = json.loads(script('evaluate.py', *flags).out)
    assert 0 < abs(measured['nats_lost']) < 0.02
    exact_loss = measured['nats_per_token'] - measured['nats_lost']
    assert exact_loss == pytest.approx(plain['nats_per_token'], abs=1e-9)


def test_sample_says_how_many_tokens_recompute_the_window(script, trained, folder):
    flags = [f'--out_dir={trained}', '--start=so', '--max_new_tokens=30', '--device=cpu']
    result = script('sample.py', *flags)
    # 2 + 14 fill the window, and one more token comes of it
    assert '15 of 30 tokens go beyond block_size=16' in result.err


@COMPILED
def test_compiled_sample(script, trained, folder):
    torch._dynamo.reset()
    decoding.compiled_forward.cache_clear()
    flags = [
        f'--out_dir={trained}',
        '--start=so',
        '--device=cpu',
        '--dtype=float32',
        '--max_new_tokens=34',
    ]

    def samples(count, compile):
        return script('sample.py', *flags, f'--num_samples={count}', f'--compile={compile}').out

    one = samples(1, True)
    assert one == samples(1, False)
    assert len(one) == 37
    three = samples(3, True)
    assert three == samples(3, False)
    assert len(three) > 3 * 37
