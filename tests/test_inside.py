"""inside.py against transformers, closed forms and heads with known weights.

    pytest tests/test_inside.py
"""
import math

import pytest
import torch
from torch.nn import functional as F

from lib import inside
from model import GPT, GPTConfig

SMALL = dict(block_size=32, vocab_size=50, n_layer=3, n_head=4, n_embd=32)


@pytest.fixture
def net():
    """Return a small GPT whose attention is not uniform and whose biases are not zero."""
    torch.manual_seed(1)
    net = GPT(GPTConfig(**SMALL)).eval()
    for p in net.parameters():
        p.data.normal_(std=0.2)
    return net


def has_hooks(net):
    """Return whether any module of a net has a hook."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def logits_of(net, idx):
    """Return the logits of a net (B, T, V)."""
    logits, _ = net(idx)
    return logits


def loss_of(net, x, y):
    """Return the loss of a net."""
    _, loss = net(x, y)
    return loss


# ---- watching ----------------------------------------------------------------------------------

def test_attention_is_transformers_output_attentions(folder):
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(
        vocab_size=50,
        n_positions=32,
        n_embd=32,
        n_layer=3,
        n_head=4,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation='eager',
    )).eval()
    theirs.save_pretrained(folder / 'gpt2')
    net = GPT.from_pretrained(str(folder / 'gpt2')).eval()
    idx = torch.randint(50, (2, 20))
    with inside.watched(net, range(3)) as seen:
        net(idx)
    with torch.no_grad():
        expected = theirs(idx, output_attentions=True).attentions
    assert len(seen) == 3
    assert len(expected) == 3
    for layer, weights in enumerate(expected):
        ours = seen[layer]['weights']
        assert torch.allclose(ours, weights, atol=1e-5)
        assert ours.std() > 0.05
        assert torch.allclose(ours.sum(dim=-1), torch.ones(2, 4, 20), atol=1e-5)
        assert ours.triu(1).count_nonzero() == 0


def test_watching_a_layer_changes_nothing(net):
    """The outputs of the heads side by side are the projection's input."""
    idx = torch.randint(50, (2, 9))
    with torch.no_grad():
        before = logits_of(net, idx)
    inputs = []
    projection = net.transformer.h[1].attn.c_proj
    handle = projection.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with inside.watched(net, [1], outputs=True) as seen:
        during = logits_of(net, idx)
    handle.remove()
    assert torch.allclose(during, before, atol=1e-5)
    assert not during.requires_grad
    assert logits_of(net, idx).requires_grad
    assert set(seen) == {1}
    assert set(seen[1]) == {'weights', 'outputs'}
    assert torch.equal(seen[1]['outputs'].transpose(1, 2).flatten(2), inputs[0])
    assert seen[1]['weights'].dtype == torch.float32
    assert seen[1]['weights'].shape == (2, 4, 9, 9)


def test_hooks_are_gone_after_an_exception(net):
    before = [block.attn.attention for block in net.transformer.h]
    watched = inside.watched(net, [0, 2], outputs=True)
    zeroed = inside.zeroed(net, [(0, 1), (2, 3)])
    for context in (watched, zeroed):
        with pytest.raises(ZeroDivisionError), context:
            raise ZeroDivisionError
        assert [block.attn.attention for block in net.transformer.h] == before
        assert not has_hooks(net)
        assert torch.is_grad_enabled()


@pytest.mark.parametrize('layers, words', [
    ([3], ['layer=3', '0 to 2']),
    ([0, -1], ['layer=-1']),
    (['1'], ['layer=1', '0 to 2']),
])
def test_layers_that_do_not_exist_are_refused(net, layers, words):
    before = [block.attn.attention for block in net.transformer.h]
    with pytest.raises(ValueError) as error, inside.watched(net, layers):
        pass
    for word in words:
        assert word in str(error.value)
    assert [block.attn.attention for block in net.transformer.h] == before


def test_a_model_without_layers_is_refused():
    net = GPT(GPTConfig(**{**SMALL, 'n_layer': 0}))
    with pytest.raises(ValueError, match='n_layer=0'):
        inside.check_layers(net, [0])


def test_heads_that_do_not_exist_are_refused(net):
    with pytest.raises(ValueError, match='head=4: allowed are 0 to 3'):
        with inside.zeroed(net, [(0, 0), (1, 4)]):
            pass
    assert not has_hooks(net)


# ---- zeroing heads -----------------------------------------------------------------------------

def test_zeroing_changes_the_named_heads_alone(net):
    x = torch.randint(50, (3, 11))
    y = torch.randint(50, (3, 11))
    with torch.no_grad():
        loss = loss_of(net, x, y)
        with inside.zeroed(net, []):
            assert torch.equal(loss_of(net, x, y), loss)
        with inside.zeroed(net, [(1, 2)]):
            assert abs(loss_of(net, x, y) - loss) > 1e-5


def test_zeroing_every_head_of_a_layer_leaves_the_bias(net):
    attn = net.transformer.h[1].attn
    outputs = []
    handle = attn.register_forward_hook(lambda _, args, output: outputs.append(output))
    with inside.zeroed(net, [(1, head) for head in range(4)]):
        net(torch.randint(50, (3, 11)))
    handle.remove()
    bias = attn.c_proj.bias
    assert bias.abs().min() > 0
    assert torch.equal(outputs[0], bias.expand_as(outputs[0]))


def test_head_ablation_is_zeroing_one_head_at_a_time(net, monkeypatch):
    x = torch.randint(50, (3, 11))
    y = torch.randint(50, (3, 11))
    two_windows = 2 * 11 * 50   # logits; the third window comes in a second batch
    monkeypatch.setattr(inside, 'AT_ONCE', two_windows)
    base, losses = inside.head_ablation(net, x, y)

    def loss_by_window():
        with torch.no_grad():
            logits = logits_of(net, x)
        return F.cross_entropy(logits.transpose(1, 2), y, reduction='none').mean(dim=1)

    assert torch.allclose(base, loss_by_window(), atol=1e-6)
    for layer in range(3):
        for head in range(4):
            with inside.zeroed(net, [(layer, head)]):
                expected = loss_by_window()
            assert torch.allclose(losses[layer, head], expected, atol=1e-6)
    assert not has_hooks(net)


# ---- roles of heads ----------------------------------------------------------------------------

def attention_to(columns):
    """Return attention (T, T) of a head whose row i looks at column columns[i] alone."""
    return torch.eye(len(columns))[columns]


def test_scan_of_attention_with_known_measures():
    """Five heads look at all tokens alike, at the same token, and at three other places.

    These places are the token before, the first token, and column 2 from row 3 on. The means
    leave out row 0, which has one token to look at.
    """
    T = 6
    lower = torch.ones(T, T).tril()
    found = inside.scan(torch.stack([
        lower / lower.sum(dim=1, keepdim=True),
        attention_to([0, 1, 2, 3, 4, 5]),
        attention_to([0, 0, 1, 2, 3, 4]),
        attention_to([0, 0, 0, 0, 0, 0]),
        attention_to([0, 1, 2, 2, 2, 2]),
    ]))
    rows = T - 1
    uniform_entropy = sum(math.log(n) for n in range(2, T + 1)) / rows
    uniform_distance = sum(i / 2 for i in range(1, T)) / rows
    uniform_weight = sum(1 / n for n in range(2, T + 1)) / rows
    expected = dict(
        entropy=[uniform_entropy, 0, 0, 0, 0],
        entropy_share=[1, 0, 0, 0, 0],
        distance=[uniform_distance, 0, 1, 3, (1 + 2 + 3) / rows],
        diagonal=[uniform_weight, 1, 0, 0, 2 / rows],
        previous=[uniform_weight, 0, 1, 1 / rows, 1 / rows],
        first=[uniform_weight, 0, 1 / rows, 1, 0],
        stripe=[uniform_weight, 1 / rows, 1 / rows, 1, 4 / rows],
    )
    for name, values in expected.items():
        assert found[name].tolist() == pytest.approx(values, rel=1e-5, abs=1e-8), name
    assert found['stripe_at'].tolist()[3:] == [0, 2]


def test_role_matrices_by_hand():
    matrices = inside.role_matrices(torch.tensor([7, 8, 7, 8, 8]))
    assert matrices['same'].nonzero().tolist() == [[2, 0], [3, 1], [4, 1], [4, 3]]
    assert matrices['induction'].nonzero().tolist() == [[2, 1], [3, 2], [4, 2]]
    assert matrices['previous'].nonzero().tolist() == [[1, 0], [2, 1], [3, 2], [4, 3]]
    assert matrices['sink'].nonzero().tolist() == [[1, 0], [2, 0], [3, 0], [4, 0]]


def model_with_an_induction_head(V, T):
    """Return a GPT of two layers, without norms and biases, with known weights.

    The embedding has a dimension for each token, each token before, and each position. Head 0.0
    looks at the token before and copies it. Head 1.0 looks for the present token among these
    copies, and so finds the token that followed last time.
    """
    C = 2 * (2 * V + T)   # twice the dimensions, because each of the two heads has half of C
    config = GPTConfig(
        block_size=T,
        vocab_size=V,
        n_layer=2,
        n_head=2,
        n_embd=C,
        bias=False,
        norm='none',
        pos='learned',
    )
    net = GPT(config).eval()
    for p in net.parameters():
        p.data.zero_()
    unit = torch.eye(C)
    token = unit[:V]
    token_before = unit[V:2 * V]
    position = unit[2 * V:2 * V + T]
    net.transformer.wte.weight.data.copy_(token)
    net.transformer.wpe.weight.data.copy_(position)

    first, second = (block.attn for block in net.transformer.h)
    query, key, value = first.c_attn.weight.data.split(C)
    loud = 20 * math.sqrt(C // 2)   # makes the softmax nearly one-hot
    for i in range(1, T):   # position i asks for position i - 1
        query[i - 1] += loud * position[i]
    for i in range(T):
        key[i] += position[i]
    for t in range(V):
        value[t] += token[t]
        first.c_proj.weight.data[:, t] += token_before[t]

    query, key, _ = second.c_attn.weight.data.split(C)
    for t in range(V):
        query[t] += loud * token[t]
        key[t] += token_before[t]
    return net


def test_a_known_induction_head_is_found():
    net = model_with_an_induction_head(V=20, T=40)
    idx = inside.repeated(net, 20, torch.Generator().manual_seed(0))
    assert idx.shape == (1, 40)
    assert torch.equal(idx[0, :20], idx[0, 20:])
    assert len(set(idx[0].tolist())) == 20
    with inside.watched(net, [0, 1]) as seen:
        net(idx)
    matrices = inside.role_matrices(idx[0])
    scores = [inside.role_scores(seen[layer]['weights'][0], matrices) for layer in (0, 1)]
    assert scores[0]['previous'][0] > 0.99
    # The first token copies itself, so it is found twice when it returns. This costs half of one
    # row in 20.
    assert scores[1]['induction'][0] == pytest.approx(0.975, abs=0.001)
    for layer in (0, 1):   # head 1 of each layer has zero weights, and looks at all tokens alike
        for role, by_head in scores[layer].items():
            assert by_head[1] < inside.NAMED, role


# ---- gradients and embeddings ------------------------------------------------------------------

def test_gradient_norms_are_finite_differences(net):
    x = torch.randint(50, (2, 8))
    y = torch.randint(50, (2, 8))
    net.double()
    eps = 1e-3   # large, because the loss is rounded to float32
    for name, weight_norm, gradient_norm in inside.gradient_norms(net, x, y)[::7]:
        p = net.get_parameter(name)
        assert weight_norm == pytest.approx(p.detach().norm().item())
        with torch.enable_grad():
            gradient, = torch.autograd.grad(loss_of(net, x, y), p)
        if gradient_norm < 1e-9:
            continue
        direction = gradient / gradient.norm()
        old = p.data.clone()
        with torch.no_grad():
            p.data = old + eps * direction
            up = loss_of(net, x, y)
            p.data = old - eps * direction
            down = loss_of(net, x, y)
            p.data = old
        difference = ((up - down) / (2 * eps)).item()
        assert gradient_norm == pytest.approx(difference, rel=1e-2)
    assert all(p.grad is None for p in net.parameters())


def test_principal_components_are_those_of_the_singular_values():
    torch.manual_seed(3)
    plane = torch.tensor([[3.0, 0, 0, 0], [0, 1.0, 0, 0]])
    flat = torch.randn(200, 2) @ plane + 5
    points, shares = inside.principal(flat)
    centered = flat.double() - flat.double().mean(dim=0)
    squares = torch.linalg.svdvals(centered) ** 2
    assert torch.allclose(shares, squares[:2] / squares.sum())
    assert shares.sum() == pytest.approx(1)
    assert torch.allclose(points.var(dim=0) * 199, squares[:2])


def test_neighbours_are_sorted_by_cosine():
    vectors = torch.tensor([[1.0, 0], [2, 0.1], [0, 1], [-1, 0]])
    near, cosines = inside.neighbours(vectors, [0], 10)
    assert near.tolist() == [[1, 2, 3]]
    expected = [20 / math.hypot(20, 1), 0, -1]
    assert cosines[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize('norm', ['pre', 'post', 'none'])
def test_layer_guesses(norm):
    """Before the first block the stream is the embedding; the last guess is the model's own."""
    torch.manual_seed(0)
    config = GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=8, norm=norm)
    model = GPT(config).eval()
    model.drawable = 9
    idx = torch.tensor([[1, 5, 2]])
    tokens, shares = inside.layer_guesses(model, idx, 3)
    assert tokens.shape == shares.shape == (3, 3, 3)

    with torch.no_grad():
        logits, _ = model(idx)
        embedded = model.transformer.wte(idx) + model.transformer.wpe.weight[:3]
        first_logits = model.lm_head(model.transformer.ln_f(embedded))
    for layer, expected in ((0, first_logits), (2, logits)):
        likeliest = expected[0, :, :9].softmax(dim=1).topk(3, dim=1)
        assert torch.equal(tokens[layer], likeliest.indices)
        assert torch.allclose(shares[layer], likeliest.values)
