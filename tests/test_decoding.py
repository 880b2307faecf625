"""Narrow weights, compiled steps, the step that a CUDA graph records. pytest tests/test_decoding.py"""
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import COMPILED
from test_model import rough, small, tokens
from torch.nn import functional as F

import model as gpt
from lib import decoding

pytestmark = pytest.mark.filterwarnings('ignore:.*torch.jit:DeprecationWarning')   # as find_compile does, for torch's own imports
KINDS = [{}, dict(pos='rope'), dict(pos='none'), dict(n_head=3, n_embd=24), dict(norm='post'), dict(residual=False),
         dict(qk_norm=True, activation='relu2', tie_weights=False, bias=False)]


def exact(linear):
    """What int8 weights stand for, from the definition: each row rounded to 255 steps of its largest number / 127."""
    step = linear.weight.abs().amax(1, keepdim=True) / 127
    return (linear.weight / step).round() * step


@pytest.mark.processor
@pytest.mark.parametrize('rows', [1, 3, 4, 5, 33])
@pytest.mark.parametrize('width', [96, 66])
@pytest.mark.parametrize('bias', [True, False])
def test_int8_is_its_definition(rows, width, bias):
    """For each of the ways it is computed: the packed product of few rows (a width it crashes on: 66), F.linear of many."""
    torch.manual_seed(rows)
    linear, x = torch.nn.Linear(width, 40, bias=bias), torch.randn(rows, 1, width)
    with torch.inference_mode():
        ours = decoding.NarrowLinear(linear, torch.float32, True)(x)
        assert ours.shape == (rows, 1, 40) and (ours - F.linear(x, exact(linear), linear.bias)).abs().max() < 1e-5
        assert (ours - linear(x)).abs().max() < 0.03 and not torch.equal(ours, linear(x))
        rounded = decoding.NarrowLinear(linear, torch.bfloat16, True)(x)
        assert rounded.dtype == torch.float32 and (rounded - F.linear(x, exact(linear), linear.bias)).abs().max() < 0.02
        # sums of numbers up to 127 are beyond fp16
        large = 300 * torch.sign(linear.weight[:1]).expand(rows, -1)
        halved = decoding.NarrowLinear(linear, torch.float16, True)(large)
        assert (halved - F.linear(large, exact(linear), linear.bias)).abs().max() < 1e-5 * halved.abs().max()


@pytest.mark.processor
@pytest.mark.parametrize('rows', [1, 3, 9])
def test_int8_words_hold_the_int8_weights(monkeypatch, rows):
    """Where four weights are read as one int32, as with AVX2 alone, the products are those of the weights one by one."""
    linear, x = torch.nn.Linear(48, 20), torch.randn(rows, 48)
    layers = []
    for has_avx512 in (True, False):
        monkeypatch.setattr(decoding, 'cpu_has_avx512', lambda answer=has_avx512: answer)
        layers.append(decoding.NarrowLinear(linear, torch.float32, True))
    whole, words = layers
    assert whole.words is None and words.words.shape == (20, 12) and words.words.dtype == torch.int32
    assert torch.allclose(words(x), whole(x), atol=1e-5)
    row = decoding.product_of_words(words.words, x[0]) * words.scale + linear.bias
    assert torch.allclose(row, whole(x)[0], atol=1e-5)


def test_int8_of_a_row_of_zeros():
    linear = torch.nn.Linear(32, 4)
    torch.nn.init.zeros_(linear.weight)
    with torch.inference_mode():
        assert torch.equal(decoding.NarrowLinear(linear, torch.float32, True)(torch.ones(1, 32)), linear.bias[None])


@pytest.mark.processor
def test_narrow_replaces_every_matrix_and_nothing_else():
    net = rough(small(n_layer=3))
    matrices = {name: p.numel() for name, p in net.named_parameters() if p.dim() == 2 and 'wpe' not in name}   # the head is wte
    biases = sum(p.numel() for name, p in net.named_parameters() if name.endswith('bias') and 'ln_' not in name)
    before = net.transformer.wte.weight.clone()
    decoding.narrow(net, 'bfloat16')
    assert not any(isinstance(layer, torch.nn.Linear) for layer in net.modules())
    assert decoding.weight_bytes(net) == 2 * sum(matrices.values()) + 4 * biases
    assert torch.equal(net.transformer.wte.weight, before) and {p.dtype for p in net.parameters()} == {torch.float32}


@COMPILED
@pytest.mark.parametrize('changes, steps', [({}, ['uncompiled']), (dict(pos='rope', n_head=1, n_embd=26, norm='post'), ['uncompiled', 'compiled'])])
def test_fp32_text_is_the_same_narrowed_compiled_or_not(changes, steps):
    """Token for token, up to and beyond block_size, also for several texts, which go on uncompiled.

    Learned positions are compiled in test_compiled_sample, likewise up to and beyond block_size, and for several texts."""
    torch._dynamo.reset()
    net, idx = rough(small(**changes)).eval(), tokens(1, 5)
    chance = gpt.chances([1, 2, 3], 34)
    expected = {rows: torch.cat(list(net.stream(idx, 34, chance=chance[:rows])), 1) for rows in (1, 3)}
    greedy = net.generate(idx, 34, temperature=0, kv_cache=False)
    decoding.narrow(net, 'float32')
    for kind in steps:
        if kind == 'compiled':
            decoding.compile_steps(net)
        for rows in (1, 3):
            assert torch.equal(torch.cat(list(net.stream(idx, 34, chance=chance[:rows])), 1), expected[rows])
        assert torch.equal(net.generate(idx, 34, temperature=0), greedy)


@pytest.mark.processor
@COMPILED
@pytest.mark.parametrize('quantize', ['', 'int8'])
def test_compiled_and_not_agree_but_for_rounding(quantize):
    torch._dynamo.reset()
    net, idx = rough(small(n_embd=66)).eval(), tokens(1, 20)
    decoding.narrow(net, 'bfloat16', quantize)

    def steps():
        cache = [gpt.LayerCache(32) for _ in net.transformer.h]
        with torch.inference_mode():
            return torch.cat([net.next_logits(idx[:, i:i + 1], cache) for i in range(20)])
    before = steps()
    decoding.compile_steps(net)
    assert (steps() - before).abs().max() < 0.03 * before.abs().max()


# Prompt lengths matter to positions and cache: KINDS[:3] are tested with five lengths, the rest with one.
@pytest.mark.parametrize('changes, T', [*((changes, T) for changes in KINDS[:3] for T in (1, 20, 31, 32, 40)),
                                        *((changes, 20) for changes in KINDS[3:])])
def test_the_step_of_the_graph_gives_the_same_text(changes, T):
    """graph_stream runs on a processor what it records on a GPU."""
    net = rough(small(**changes)).eval()
    for B, rows in ((1, 1), (1, 3), (2, 2)):
        idx, chance = tokens(B, T), gpt.chances(range(rows), 20)
        for count, knobs in ((1, {}), (20, dict(temperature=0)), (20, {}), (20, dict(top_k=5, temperature=2.0, repetition_penalty=1.5)),
                             (20, dict(top_p=0.7)), (12, dict(kv_cache=False))):
            ours, plain = ([new.clone() for new in stream(idx, count, chance=chance[:, :count], **knobs)]
                           for stream in (lambda *a, **k: decoding.graph_stream(net, *a, **k), net.stream))
            assert torch.equal(torch.cat(ours, 1), torch.cat(plain, 1))
    assert all(block.attn.attention is gpt.fused_attention for block in net.transformer.h)   # left as it was
    for idx, knobs in ((torch.tensor([[61]]), {}), (tokens(1, 4), dict(temperature=-1.0)), (tokens(1, 4), dict(top_k=0))):
        with pytest.raises(ValueError):
            list(decoding.graph_stream(net, idx, 3, chance=chance, **knobs))
    with pytest.raises(ValueError, match='chance is None'):
        list(decoding.graph_stream(net, tokens(1, 4), 3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU: it records CUDA graphs')
@pytest.mark.parametrize('changes', KINDS)
def test_graph_on_a_gpu(changes):
    net = rough(small(**changes)).eval().cuda()
    idx, chance = tokens(1, 5).cuda(), gpt.chances([1, 2, 3], 34).cuda()
    assert torch.equal(torch.cat(list(decoding.graph_stream(net, idx, 34, chance=chance)), 1),
                       torch.cat(list(net.stream(idx, 34, chance=chance)), 1))


def test_compiling_pays_for_many_tokens_of_one_text():
    net, big = small(), SimpleNamespace(config=gpt.GPTConfig(), num_params=lambda: 124_439_808)
    assert decoding.compiling_pays(big, 'cpu', 'bfloat16', '', 1000, 1)
    for other in ((net, 'cpu', 'bfloat16', '', 1000, 1), (big, 'cpu', 'bfloat16', '', 100, 1), (big, 'cpu', 'bfloat16', '', 1000, 8),
                  (big, 'cuda', 'bfloat16', '', 1000, 1)):
        assert not decoding.compiling_pays(*other)


# ---- the scripts ---------------------------------------------------------------------------------------------------

@pytest.mark.processor
def test_sample_in_int8_shows_its_loss(script, trained, folder):
    flags = [f'--out_dir={trained}', '--start=so', '--max_new_tokens=30', '--device=cpu', '--quantize=int8', '--temperature=0']
    shown = script('sample.py', *flags, f'--data_dir={trained.parent / "data"}')
    assert shown.code == 0 and 'int8: ' in shown.err and 'in float32' in shown.err and len(shown.out) == 33
    assert 'what int8 costs was not measured' in script('sample.py', *flags, '--data_dir=nowhere').err
    measured = json.loads(script('evaluate.py', f'--out_dir={trained}', f'--data_dir={trained.parent / "data"}', '--device=cpu',
                                 '--quantize=int8', '--json=-').out)
    plain = json.loads(script('evaluate.py', f'--out_dir={trained}', f'--data_dir={trained.parent / "data"}', '--device=cpu',
                              '--json=-').out)
    assert 0 < abs(measured['nats_lost']) < 0.02
    assert measured['nats_per_token'] - measured['nats_lost'] == pytest.approx(plain['nats_per_token'], abs=1e-9)


def test_sample_says_how_many_tokens_recompute_the_window(script, trained, folder):
    result = script('sample.py', f'--out_dir={trained}', '--start=so', '--max_new_tokens=30', '--device=cpu')
    assert '15 of 30 tokens go beyond block_size=16' in result.err   # 2 + 14 fill the window, and one more comes of it


@COMPILED
def test_compiled_sample(script, trained, folder):
    torch._dynamo.reset()
    flags = [f'--out_dir={trained}', '--start=so', '--device=cpu', '--dtype=float32', '--max_new_tokens=34']
    one, several = ([script('sample.py', *flags, f'--num_samples={count}', f'--compile={choice}').out for choice in (True, False)]
                    for count in (1, 3))
    assert one[0] == one[1] and len(one[0]) == 37
    assert several[0] == several[1] and len(several[0]) > 3 * 37
