"""inside.py: against transformers, closed forms, and heads planted by hand. pytest tests/test_inside.py"""
import math

import pytest
import torch
from torch.nn import functional as F

from lib import inside
from model import GPT, GPTConfig

SMALL = dict(block_size=32, vocab_size=50, n_layer=3, n_head=4, n_embd=32)


@pytest.fixture
def net():
    torch.manual_seed(1)
    net = GPT(GPTConfig(**SMALL)).eval()
    for p in net.parameters():   # large enough for attention that is not uniform, and biases that are not zero
        p.data.normal_(std=0.2)
    return net


def test_attention_is_transformers_output_attentions(folder):
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=32, n_embd=32, n_layer=3, n_head=4, initializer_range=0.3,
                                        bos_token_id=None, eos_token_id=None, attn_implementation='eager')).eval()
    theirs.save_pretrained(folder / 'gpt2')
    net, idx = GPT.from_pretrained(str(folder / 'gpt2')).eval(), torch.randint(50, (2, 20))
    with inside.watched(net, range(3)) as seen:
        net(idx)
    with torch.no_grad():
        expected = theirs(idx, output_attentions=True).attentions
    assert len(expected) == len(seen) == 3
    for layer, weights in enumerate(expected):
        mine = seen[layer]['weights']
        assert torch.allclose(mine, weights, atol=1e-5) and mine.std() > 0.05
        assert torch.allclose(mine.sum(dim=-1), torch.ones(2, 4, 20), atol=1e-5) and mine.triu(1).count_nonzero() == 0


def test_only_what_is_named_is_watched_and_nothing_changes(net):
    """The logits are the same inside and after; heads' outputs side by side are what the projection reads."""
    idx, read = torch.randint(50, (2, 9)), []
    with torch.no_grad():
        before = net(idx)[0]
    handle = net.transformer.h[1].attn.c_proj.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    with inside.watched(net, [1], outputs=True) as seen:
        during = net(idx)[0]
    handle.remove()
    assert set(seen) == {1} and set(seen[1]) == {'weights', 'outputs'} and not during.requires_grad
    assert torch.allclose(during, before, atol=1e-5)
    assert torch.equal(seen[1]['outputs'].transpose(1, 2).flatten(2), read[0])
    assert seen[1]['weights'].dtype == torch.float32 and seen[1]['weights'].shape == (2, 4, 9, 9)
    assert net(idx)[0].requires_grad


def test_hooks_are_gone_after_an_exception(net):
    attends = [block.attn.attention for block in net.transformer.h]
    for context in (inside.watched(net, [0, 2], outputs=True), inside.zeroed(net, [(0, 1), (2, 3)])):
        with pytest.raises(ZeroDivisionError), context:
            raise ZeroDivisionError
        assert [block.attn.attention for block in net.transformer.h] == attends
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
        assert torch.is_grad_enabled()


@pytest.mark.parametrize('layers, words', [([3], ['layer=3', '0 to 2']), ([0, -1], ['layer=-1']), (['1'], ["layer=1", '0 to 2'])])
def test_layers_that_are_not_there(net, layers, words):
    with pytest.raises(ValueError) as error, inside.watched(net, layers):
        pass
    assert all(word in str(error.value) for word in words)
    assert net.transformer.h[0].attn.attention is not None


def test_heads_that_are_not_there(net):
    with pytest.raises(ValueError, match='head=4: allowed are 0 to 3'), inside.zeroed(net, [(0, 0), (1, 4)]):
        pass
    with pytest.raises(ValueError, match='n_layer=0'):
        inside.check_layers(GPT(GPTConfig(**{**SMALL, 'n_layer': 0})), [0])
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_no_head_zeroed_changes_nothing_and_all_leave_the_bias(net):
    x, y = torch.randint(50, (3, 11)), torch.randint(50, (3, 11))
    with torch.no_grad():
        loss = net(x, y)[1]
        with inside.zeroed(net, []):
            assert torch.equal(net(x, y)[1], loss)
        out, attn = [], net.transformer.h[1].attn
        handle = attn.register_forward_hook(lambda _, args, y: out.append(y))
        with inside.zeroed(net, [(1, head) for head in range(4)]):
            net(x, y)
        handle.remove()
        assert torch.equal(out[0], attn.c_proj.bias.expand_as(out[0])) and attn.c_proj.bias.abs().min() > 0
        with inside.zeroed(net, [(1, 2)]):
            assert abs(net(x, y)[1] - loss) > 1e-5


def test_head_ablation_is_zeroing_one_head_at_a_time(net, monkeypatch):
    x, y = torch.randint(50, (3, 11)), torch.randint(50, (3, 11))
    monkeypatch.setattr(inside, 'AT_ONCE', 2 * 11 * 50)   # logits: two of the three windows
    base, losses = inside.head_ablation(net, x, y)
    def by_window():
        with torch.no_grad():
            return F.cross_entropy(net(x)[0].transpose(1, 2), y, reduction='none').mean(dim=1)
    assert torch.allclose(base, by_window(), atol=1e-6)
    for layer in range(3):
        for head in range(4):
            with inside.zeroed(net, [(layer, head)]):
                assert torch.allclose(losses[layer, head], by_window(), atol=1e-6)
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_scan_of_attention_known_by_heart():
    """A head that looks at all tokens alike, at itself, just before, at the first, and at column 2."""
    T = 6
    uniform = torch.ones(T, T).tril()
    before = torch.zeros(T, T)
    before[0, 0] = 1
    before[range(1, T), range(T - 1)] = 1
    first, third = torch.zeros(T, T), torch.eye(T)
    first[:, 0] = 1
    third[3:] = 0
    third[3:, 2] = 1
    found = inside.scan(torch.stack([uniform / uniform.sum(dim=1, keepdim=True), torch.eye(T), before, first, third]))
    harmonic = [sum(1 / k for k in range(2, T + 1)) / 5 for _ in range(1)][0]
    expected = dict(
        entropy=[sum(math.log(n) for n in range(2, T + 1)) / 5, 0, 0, 0, 0], entropy_share=[1, 0, 0, 0, 0],
        distance=[sum(i / 2 for i in range(1, T)) / 5, 0, 1, 3, (1 + 2 + 3) / 5], diagonal=[harmonic, 1, 0, 0, 2 / 5],
        previous=[harmonic, 0, 1, 1 / 5, 1 / 5], first=[harmonic, 0, 1 / 5, 1, 0], stripe=[harmonic, 1 / 5, 1 / 5, 1, 4 / 5])
    for key, values in expected.items():
        assert torch.allclose(found[key].double(), torch.tensor(values, dtype=torch.double)), key
    assert found['stripe_at'].tolist()[3:] == [0, 2]


def test_role_matrices_by_hand():
    matrices = inside.role_matrices(torch.tensor([7, 8, 7, 8, 8]))
    assert matrices['same'].nonzero().tolist() == [[2, 0], [3, 1], [4, 1], [4, 3]]
    assert matrices['induction'].nonzero().tolist() == [[2, 1], [3, 2], [4, 2]]
    assert matrices['previous'].nonzero().tolist() == [[1, 0], [2, 1], [3, 2], [4, 3]]
    assert matrices['sink'].nonzero().tolist() == [[1, 0], [2, 0], [3, 0], [4, 0]]


def test_a_planted_induction_head_is_found():
    """Two layers without norm or MLP: 0.0 copies the token before into spare dimensions, 1.0 looks for its own token there."""
    V, T = 20, 40
    C = 2 * (2 * V + T)   # a token's and the one before's unit vectors, a position's; heads of half of it
    hs = C // 2
    net = GPT(GPTConfig(block_size=T, vocab_size=V, n_layer=2, n_head=2, n_embd=C, bias=False, norm='none', pos='learned')).eval()
    for p in net.parameters():
        p.data.zero_()
    token, last, place = torch.eye(C)[:V], torch.eye(C)[V:2 * V], torch.eye(C)[2 * V:2 * V + T]
    net.transformer.wte.weight.data.copy_(token)
    net.transformer.wpe.weight.data.copy_(place)
    first, second = (block.attn for block in net.transformer.h)
    loud = 20 * math.sqrt(hs)
    for i in range(1, T):   # position i asks for i - 1
        first.c_attn.weight.data[i - 1] += loud * place[i]
    for i in range(T):
        first.c_attn.weight.data[C + i] += place[i]
    for t in range(V):
        first.c_attn.weight.data[2 * C + t] += token[t]
        first.c_proj.weight.data[:, t] += last[t]
        second.c_attn.weight.data[t] += loud * token[t]
        second.c_attn.weight.data[C + t] += last[t]
    idx = inside.repeated(net, 20, torch.Generator().manual_seed(0))
    assert idx.shape == (1, 40) and torch.equal(idx[0, :20], idx[0, 20:]) and len(set(idx[0].tolist())) == 20
    with inside.watched(net, [0, 1]) as seen:
        net(idx)
    matrices = inside.role_matrices(idx[0])
    scores = [inside.role_scores(seen[layer]['weights'][0], matrices) for layer in (0, 1)]
    assert scores[0]['previous'][0] > 0.99
    # the first token has none before it and copies itself: its second coming finds it twice, half of one row in 20
    assert scores[1]['induction'][0] == pytest.approx(0.975, abs=0.001)
    for layer, head in ((0, 1), (1, 1)):   # heads of zeros look at all alike, and are none of these
        assert max(scores[layer][role][head] for role in scores[layer]) < inside.NAMED


def test_gradient_norms_are_finite_differences(net):
    x, y = torch.randint(50, (2, 8)), torch.randint(50, (2, 8))
    for name, weight, gradient in inside.gradient_norms(net.double(), x, y)[::7]:
        p, eps = net.get_parameter(name), 1e-3   # the loss is in fp32
        assert weight == pytest.approx(p.detach().norm().item())
        with torch.enable_grad():
            grad, = torch.autograd.grad(net(x, y)[1], p)
        if gradient < 1e-9:
            continue
        direction, old = grad / grad.norm(), p.data.clone()
        with torch.no_grad():
            p.data = old + eps * direction
            up = net(x, y)[1]
            p.data = old - eps * direction
            assert gradient == pytest.approx(((up - net(x, y)[1]) / (2 * eps)).item(), rel=1e-2)
            p.data = old
    assert all(p.grad is None for p in net.parameters())


def test_principal_components_and_neighbours():
    torch.manual_seed(3)
    flat = torch.randn(200, 2) @ torch.tensor([[3.0, 0, 0, 0], [0, 1.0, 0, 0]]) + 5
    points, shares = inside.principal(flat)
    expected = torch.linalg.svd(flat.double() - flat.double().mean(dim=0))[1] ** 2
    assert torch.allclose(shares, expected[:2] / expected.sum()) and shares.sum() == pytest.approx(1)
    assert torch.allclose(points.var(dim=0) * 199, expected[:2])
    vectors = torch.tensor([[1.0, 0], [2, 0.1], [0, 1], [-1, 0]])
    near, cosines = inside.neighbours(vectors, [0], 10)
    assert near.tolist() == [[1, 2, 3]] and cosines[0].tolist() == pytest.approx([20 / math.hypot(20, 1), 0, -1])


def test_layer_guesses():
    """Before the first block the stream is the embedding; after the last one the guess is the model's."""
    torch.manual_seed(0)
    for norm in ('pre', 'post', 'none'):
        model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=8, norm=norm)).eval()
        model.drawable = 9
        idx = torch.tensor([[1, 5, 2]])
        tokens, shares = inside.layer_guesses(model, idx, 3)
        assert tokens.shape == shares.shape == (3, 3, 3)
        with torch.no_grad():
            expected = model(idx)[0][0, :, :9].softmax(dim=1).topk(3, dim=1)
            x = model.transformer.wte(idx) + model.transformer.wpe.weight[:3]
            first = model.lm_head(model.transformer.ln_f(x))[0, :, :9].softmax(dim=1).topk(3, dim=1)
        assert torch.equal(tokens[2], expected.indices) and torch.allclose(shares[2], expected.values)
        assert torch.equal(tokens[0], first.indices) and torch.allclose(shares[0], first.values)
