"""model.py against transformers, closed forms and itself. pytest tests/test_model.py"""
import math
import shutil
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

import model as gpt
from lib import optimizers
from model import GPT, GPTConfig

pytestmark = pytest.mark.processor

SMALL = dict(block_size=32, vocab_size=61, n_layer=2, n_head=3, n_embd=48)
# One entry for each kind of architecture. The first one is GPT-2's.
KINDS = [
    {},
    dict(bias=False),
    dict(qkv_bias=False),
    dict(tie_weights=False),
    dict(pos='rope'),
    dict(pos='none'),
    dict(norm='post'),
    dict(norm='none'),
    dict(residual=False),
    dict(qk_norm=True),
    dict(activation='relu2'),
]
WITHOUT_LAYERS = dict(n_layer=0, pos='none')


def small(seed=0, **changes):
    """Return a new GPT with SMALL's sizes and changed fields."""
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{**SMALL, **changes}))


def rough(net, seed=5):
    """Add noise to every parameter, biases and gains included. Return the net.

    A term of the network cannot hide behind a bias of 0 or a gain of 1.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return net


def tokens(B, T, V=61, seed=1):
    """Return random tokens (B, T)."""
    return torch.randint(V, (B, T), generator=seeded(seed))


def seeded(seed):
    """Return a random generator with a seed."""
    return torch.Generator().manual_seed(seed)


def loss_of(net, idx, targets=None):
    """Return the loss of a net; the targets are idx itself unless they are given."""
    _, loss = net(idx, idx if targets is None else targets)
    return loss


def logits_of(net, idx):
    """Return the logits of a net (B, T, V)."""
    logits, _ = net(idx)
    return logits


# ---- the network -------------------------------------------------------------------------------

@pytest.mark.parametrize('changes, count', [
    ({}, 124_439_808),
    (dict(qkv_bias=False), 124_412_160),
    (dict(tie_weights=False), 163_037_184),
])
def test_parameter_counts(changes, count):
    with torch.device('meta'):
        assert GPT(GPTConfig(**changes)).num_params() == count


@pytest.mark.parametrize('changes', [*KINDS, WITHOUT_LAYERS])
@pytest.mark.parametrize('flash', [True, False])
def test_future_never_leaks(changes, flash):
    """Changing token t leaves the logits before t unchanged, and changes those at t.

    minGPT's issue 75 reports such a leak.
    """
    net = rough(small(**changes, flash=flash)).eval()
    idx = tokens(2, 20)
    before = logits_of(net, idx)
    for t in (1, 7, 19):
        other = idx.clone()
        other[:, t] = (other[:, t] + 1) % 61
        after = logits_of(net, other)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.allclose(after[:, t], before[:, t])


@pytest.mark.parametrize('T, past, room', [(1, 0, 0), (9, 0, 0), (1, 8, 0), (4, 5, 0), (4, 5, 7)])
def test_explicit_and_fused_attention_compute_the_formula(T, past, room):
    """The T queries stand behind `past` keys, and `room` keys that none of them sees follow."""
    S = past + T + room
    q = torch.randn(2, 3, T, 16)
    k = torch.randn(2, 3, S, 16)
    v = torch.randn(2, 3, S, 16)
    visible = None
    if S > T:
        visible = torch.ones(T, S, dtype=torch.bool).tril(past)
    explicit = gpt.explicit_attention(q, k, v, visible=visible)
    assert torch.allclose(explicit, gpt.fused_attention(q, k, v, visible=visible), atol=1e-5)

    weights = gpt.attention_weights(q, k, visible)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 3, T))
    assert weights.triu(past + 1).abs().max() == 0

    for t in range(T):   # one query at a time
        seen = past + t + 1
        scores = torch.einsum('bhd,bhsd->bhs', q[:, :, t], k[:, :, :seen]) / math.sqrt(16)
        y = torch.einsum('bhs,bhsd->bhd', scores.softmax(-1), v[:, :, :seen])
        assert torch.allclose(y, explicit[:, :, t], atol=1e-5)


def test_whole_models_agree_with_and_without_flash():
    fused = rough(small())
    explicit = rough(small(flash=False))
    idx = tokens(2, 32)
    fused_logits, fused_loss = fused(idx, idx)
    explicit_logits, explicit_loss = explicit(idx, idx)
    assert torch.allclose(fused_logits, explicit_logits, atol=1e-5)
    fused_loss.backward()
    explicit_loss.backward()
    for p, q in zip(fused.parameters(), explicit.parameters()):
        assert torch.allclose(p.grad, q.grad, atol=1e-5)


@pytest.mark.parametrize('sizes', [
    {},
    dict(n_layer=5, n_head=3, n_embd=48, vocab_size=1003, block_size=40),
])
def test_logits_equal_transformers(sizes):
    """Load the same random weights into GPT2LMHeadModel: logits to 1e-4, loss to 1e-5."""
    from transformers import GPT2Config, GPT2LMHeadModel
    net = rough(small(**sizes)).eval()
    c = net.config
    theirs = GPT2LMHeadModel(GPT2Config(
        vocab_size=c.vocab_size,
        n_positions=c.block_size,
        n_embd=c.n_embd,
        n_layer=c.n_layer,
        n_head=c.n_head,
        bos_token_id=0,
        eos_token_id=0,
    )).eval()
    # transformers stores these matrices transposed.
    transposed = ('c_attn.weight', 'attn.c_proj.weight', 'c_fc.weight', 'mlp.c_proj.weight')
    weights = {}
    for name, p in net.state_dict().items():
        weights[name] = p.t() if name.endswith(transposed) else p
    masks = ('.attn.bias', '.attn.masked_bias')
    expected = {name for name in theirs.state_dict() if not name.endswith(masks)}
    assert weights.keys() == expected
    theirs.load_state_dict(weights, strict=False)

    idx = tokens(3, c.block_size, c.vocab_size)
    next_tokens = torch.cat((idx[:, 1:], torch.full((3, 1), -1)), 1)
    with torch.no_grad():
        logits, loss = net(idx, next_tokens)
        reference = theirs(idx, labels=idx)
    assert torch.allclose(logits, reference.logits, atol=1e-4)
    assert abs(loss - reference.loss) < 1e-5


@pytest.mark.parametrize('changes', [
    {},
    dict(n_layer=4, n_head=3, n_embd=192, vocab_size=65),
    dict(pos='rope'),
])
def test_loss_at_init_is_ln_vocab(changes):
    net = small(**changes)
    V = net.config.vocab_size
    loss = loss_of(net, tokens(8, 32, V), tokens(8, 32, V, seed=2))
    assert abs(loss.item() - math.log(V)) < 0.1


def test_init_is_gpt2s():
    """Matrices have a deviation of 0.02, those before a residual sum 0.02 / √(2 n_layer)."""
    net = small(n_layer=8, n_embd=192)
    for name, p in net.named_parameters():
        if name.endswith('c_proj.weight'):
            assert abs(p.std() - 0.02 / math.sqrt(2 * 8)) < 2e-4
        elif p.dim() == 2:
            assert abs(p.std() - 0.02) < 1e-3
        elif 'ln_' in name and name.endswith('weight'):
            assert torch.equal(p, torch.ones_like(p))
        else:
            assert torch.equal(p, torch.zeros_like(p))


# ---- the fields of the config ------------------------------------------------------------------

def pre_norm(block, x):
    h = x + block.attn(block.ln_1(x))
    return h + block.mlp(block.ln_2(h))


def post_norm(block, x):
    h = block.ln_1(x + block.attn(x))
    return block.ln_2(h + block.mlp(h))


def without_norm(block, x):
    h = x + block.attn(x)
    return h + block.mlp(h)


def without_residual(block, x):
    h = block.attn(block.ln_1(x))
    return block.mlp(block.ln_2(h))


@pytest.mark.parametrize('changes, formula', [
    ({}, pre_norm),
    (dict(norm='post'), post_norm),
    (dict(norm='none'), without_norm),
    (dict(residual=False), without_residual),
])
def test_a_block_computes_its_formula(changes, formula):
    reference = small().transformer.h[0].eval()
    block = small(**changes).transformer.h[0].eval()
    own = block.state_dict()
    block.load_state_dict({k: v for k, v in reference.state_dict().items() if k in own})
    x = torch.randn(2, 5, 48)
    assert torch.allclose(block(x), formula(block, x), atol=1e-6)


def test_fields_add_and_remove_parameters():
    gpt2 = small()
    assert gpt2.lm_head.weight is gpt2.transformer.wte.weight
    assert gpt2.lm_head.bias is None
    untied = small(tie_weights=False)
    assert untied.lm_head.weight is not untied.transformer.wte.weight
    assert small(qkv_bias=False).transformer.h[0].attn.c_attn.bias is None
    assert not any('bias' in name for name, _ in small(bias=False).named_parameters())
    for pos in ('none', 'rope'):
        assert 'transformer.wpe.weight' not in small(pos=pos).state_dict()


def test_gelu_is_the_tanh_form():
    mlp = rough(small()).transformer.h[0].mlp
    x = torch.randn(3, 48)
    h = mlp.c_fc(x)
    tanh = torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h ** 3))
    assert torch.allclose(mlp(x), mlp.c_proj(0.5 * h * (1 + tanh)), atol=1e-6)


def test_relu2_is_the_square_of_relu():
    mlp = small(activation='relu2').transformer.h[0].mlp
    x = torch.randn(3, 48)
    assert torch.allclose(mlp(x), mlp.c_proj(torch.relu(mlp.c_fc(x)) ** 2))


def test_without_positions_the_order_of_earlier_tokens_is_lost():
    """In a single layer without positions, the newest token sees the others as a set."""
    idx = tokens(1, 10)
    shuffled = torch.cat((idx[:, :9].flip(1), idx[:, 9:]), 1)

    def last_logits(net, idx):
        return logits_of(net, idx)[:, -1]

    net = rough(small(pos='none', n_layer=1)).eval()
    assert torch.allclose(last_logits(net, idx), last_logits(net, shuffled), atol=1e-5)
    net = rough(small(n_layer=1)).eval()
    assert not torch.allclose(last_logits(net, idx), last_logits(net, shuffled))


def test_rope_scores_depend_on_distances_alone():
    cos, sin = small(pos='rope').rope
    q = torch.randn(1, 1, 1, 16).expand(1, 32, 1, 16)
    k = torch.randn(1, 1, 1, 16).expand(1, 32, 1, 16)
    queries = gpt.rotate(q, cos, sin)[0, :, 0]
    keys = gpt.rotate(k, cos, sin)[0, :, 0]
    scores = queries @ keys.T
    for distance in (0, 1, 5):
        diagonal = scores.diagonal(-distance)
        assert torch.allclose(diagonal, diagonal[0].expand_as(diagonal), atol=1e-4)
    assert not torch.allclose(scores[5, 5], scores[5, 0])


def test_rope_is_complex_multiplication():
    """Pairs of numbers turn as complex numbers do (arXiv 2104.09864), keeping their length."""
    cos, sin = small(pos='rope').rope
    q = torch.randn(1, 1, 1, 16).expand(1, 32, 1, 16)
    angle = torch.arange(32)[:, None, None] * 10000.0 ** (-torch.arange(8) / 8)
    rotation = torch.polar(torch.ones_like(angle), angle)
    turned = torch.complex(q[..., :8], q[..., 8:]) * rotation
    expected = torch.cat((turned.real, turned.imag), -1)
    assert torch.allclose(gpt.rotate(q, cos, sin), expected, atol=1e-5)


def test_qk_norm_ignores_scale():
    net = rough(small(qk_norm=True)).transformer.h[0].attn.eval()
    x = torch.randn(1, 9, 48)
    before = net(x)
    with torch.no_grad():   # multiply the queries by 7
        net.c_attn.weight[:48] *= 7
        net.c_attn.bias[:48] *= 7
    assert torch.allclose(net(x), before, atol=1e-4)


def test_label_smoothing_acts_in_training_only():
    net = small(label_smoothing=0.1)
    idx = tokens(2, 8)
    logp = logits_of(net, idx).log_softmax(-1)
    hit = -logp.gather(-1, idx[..., None]).mean()
    uniform = -logp.mean(-1).mean()
    assert torch.allclose(loss_of(net, idx), 0.9 * hit + 0.1 * uniform, atol=1e-6)
    assert torch.allclose(loss_of(net.eval(), idx), hit, atol=1e-6)


def test_the_loss_is_the_mean_over_targets_that_are_not_ignored():
    net = small()
    idx = tokens(2, 8)
    targets = idx.clone()
    targets[0, 3:] = -1
    targets[1] = -1
    logits, loss = net(idx, targets)
    assert logits.shape == (2, 8, 61)
    expected = F.cross_entropy(logits[0, :3], idx[0, :3])
    assert torch.allclose(loss, expected, atol=1e-6)


def test_without_targets_the_loss_is_none():
    _, loss = small()(tokens(2, 8))
    assert loss is None


def test_layer_drop():
    """Dropped rows skip a branch, and on average the branch counts in full."""
    block = small(layer_drop=0.4).transformer.h[0]
    x = torch.randn(1, 4, 48).expand(4000, 4, 48)
    torch.manual_seed(0)
    y = block.branch(x, block.ln_1, block.attn) - x
    full = block.eval().branch(x[:1], block.ln_1, block.attn) - x[:1]   # evaluation drops nothing
    kept = y.flatten(1).abs().sum(1) > 0
    dropped_share = (~kept).float().mean()
    assert abs(dropped_share - 0.4) < 0.03
    assert torch.allclose(y.mean(0), full[0], atol=0.05 * full.abs().max().item())
    assert torch.allclose(y[kept][0], full[0] / 0.6, atol=1e-5)


def test_dropout_drops_in_training_only():
    net = small(dropout=0.5)
    idx = tokens(2, 8)
    assert not torch.equal(logits_of(net, idx), logits_of(net, idx))
    net.eval()
    assert torch.equal(logits_of(net, idx), logits_of(net, idx))


# ---- training ----------------------------------------------------------------------------------

@pytest.mark.parametrize('changes', [{}, dict(pos='rope', dropout=0.3)])
def test_grad_checkpointing_changes_nothing(changes):
    idx = tokens(2, 16)

    def gradients(on):
        net = small(grad_checkpointing=on, **changes)
        torch.manual_seed(3)
        loss_of(net, idx).backward()
        return [p.grad for p in net.parameters()]

    for a, b in zip(gradients(False), gradients(True)):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize('changes', KINDS)
def test_every_kind_learns(changes):
    """The loss on one small batch falls, and every parameter gets a gradient."""
    sizes = {**dict(n_head=2, n_embd=32), **changes}
    net = small(**sizes)
    idx = tokens(2, 9)
    x = idx[:, :-1]
    y = idx[:, 1:]
    adam = torch.optim.AdamW(net.optimizer_groups(0.0), lr=3e-3)
    first = loss_of(net, x, y).item()
    for _ in range(60):
        loss = loss_of(net, x, y)
        adam.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in net.parameters())
        adam.step()
    assert loss.item() < 0.8 * first


def test_gradients_are_finite_differences():
    net = rough(small(n_layer=1)).double()
    idx = tokens(1, 6)

    def loss():   # in float64 from end to end; the model's own loss is rounded to float32
        return F.cross_entropy(logits_of(net, idx)[0], idx[0])

    loss().backward()
    eps = 1e-5
    for name, p in net.named_parameters():
        direction = torch.randn_like(p)
        with torch.no_grad():
            p.add_(eps * direction)
            up = loss()
            p.sub_(2 * eps * direction)
            down = loss()
            p.add_(eps * direction)
        difference = (up - down) / (2 * eps)
        assert abs(difference - (p.grad * direction).sum()) < 1e-6, name


@pytest.mark.parametrize('changes', KINDS)
def test_optimizer_groups_own_every_parameter_once(changes):
    net = small(**changes)
    decayed, free = (group['params'] for group in net.optimizer_groups(0.1))
    assert sorted(map(id, decayed + free)) == sorted(map(id, net.parameters()))
    assert all(p.dim() == 2 for p in decayed)
    assert all(p.dim() == 1 for p in free)


@pytest.mark.parametrize('changes', KINDS)
def test_muon_gets_the_square_parts_of_attention(changes):
    """Queries, keys, values and the projection are matrices of their own, then the MLP's two."""
    net = small(**changes)
    shapes = [tuple(part.matrix.shape) for part in optimizers.muon_parts(net)]
    one_layer = [(48, 48), (48, 48), (48, 48), (48, 48), (192, 48), (48, 192)]
    assert shapes == one_layer + one_layer


@pytest.mark.parametrize('changes', [{}, dict(tie_weights=False), dict(pos='rope')])
def test_flops_per_token_are_counted_by_torch(changes):
    """torch's counter runs over forward and backward, the masked half of attention included."""
    from torch.utils.flop_counter import FlopCounterMode
    net = small(flash=False, bias=False, **changes)
    idx = tokens(2, 32)
    with FlopCounterMode(display=False) as counter:
        loss_of(net, idx).backward()
    norms = 6 * sum(p.numel() for p in net.parameters() if p.dim() == 1)   # not in torch's count
    assert counter.get_total_flops() / idx.numel() == net.flops_per_token() - norms


# ---- sampling ----------------------------------------------------------------------------------

@pytest.mark.parametrize('changes', [*KINDS, WITHOUT_LAYERS])
@pytest.mark.parametrize('length', [1, 20, 32, 40])
def test_cache_changes_no_token(changes, length):
    """Greedy text is the same with the cache, without it, and by a plain loop of argmax.

    The texts reach up to block_size and beyond it.
    """
    net = rough(small(**changes)).eval()
    idx = tokens(2, length)
    with_cache = net.generate(idx, 16, temperature=0)
    without_cache = net.generate(idx, 16, temperature=0, kv_cache=False)
    assert torch.equal(with_cache, without_cache)
    plain = idx
    for _ in range(16):
        logits = logits_of(net, plain[:, -32:])
        plain = torch.cat((plain, logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(with_cache, plain)


def test_cached_logits_equal_full_ones():
    net = rough(small()).eval()
    idx = tokens(2, 20)
    cache = gpt.Cache(net.config, 'cpu')
    pieces = []
    for part in idx.split([7] + 13 * [1], dim=1):
        pieces.append(net.hidden(part, cache))
        cache.advance(part.size(1))
    cached = net.lm_head(torch.cat(pieces, 1))
    assert torch.allclose(cached, logits_of(net, idx), atol=1e-5)


def test_generate_repeats_itself_with_the_same_seed():
    net = small(dropout=0.5)
    idx = tokens(3, 4)
    first = net.generate(idx, 12, generator=seeded(7))
    second = net.generate(idx, 12, generator=seeded(7))
    assert first.shape == (3, 16)
    assert torch.equal(first, second)
    assert torch.equal(first[:, :4], idx)
    assert net.training   # generate leaves the mode as it was


@pytest.mark.parametrize('knobs', [dict(top_k=1), dict(top_p=1e-9), dict(temperature=1e-6)])
def test_knobs_that_leave_one_token_are_greedy(knobs):
    net = small(dropout=0.5)
    idx = tokens(3, 4)
    greedy = net.generate(idx, 12, temperature=0)
    assert torch.equal(net.generate(idx, 12, **knobs), greedy)


def test_generate_ends_behind_a_stop_token():
    net = small(dropout=0.5)
    idx = tokens(3, 4)[:1]
    greedy = net.generate(idx, 12, temperature=0)
    stop = greedy[0, 6].item()
    stopped = net.generate(idx, 12, temperature=0, stop=[stop])
    new = greedy[0, 4:].tolist()
    assert torch.equal(stopped, greedy[:, :4 + new.index(stop) + 1])


def test_no_new_tokens_leave_the_prompt():
    net = small(dropout=0.5)
    idx = tokens(3, 4)
    assert torch.equal(net.generate(idx, 0), idx)


@pytest.mark.parametrize('knobs', [
    {},
    dict(temperature=0.5),
    dict(top_k=3),
    dict(top_p=0.8),
    dict(top_k=4, top_p=0.9, temperature=2.0),
    dict(repetition_penalty=1.7, top_k=5),
])
def test_draws_follow_the_distribution(knobs):
    """Compare 20,000 draws at a fixed seed with the exact probabilities, by chi-squared.

    At another seed, one test in 1,000 would fail by chance.
    """
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -3.0]])
    seen = torch.tensor([[True, False, False, True, False, False]])
    probs = gpt.probabilities(logits, seen, gpt.Sampling(**knobs))
    drawn = gpt.draw(probs.expand(20000, 6), gpt.chances([1], 20000).T)
    counts = torch.bincount(drawn.flatten(), minlength=6)
    possible = probs[0] > 0
    assert counts[~possible].sum() == 0
    expected = 20000 * probs[0][possible]
    chi2 = ((counts[possible] - expected) ** 2 / expected).sum()
    assert chi2 < 20.5


@pytest.mark.parametrize('knobs', [
    dict(temperature=0.7),
    dict(top_k=1),
    dict(top_k=7),
    dict(top_k=200),
    dict(top_p=0.3),
    dict(top_p=0.9),
    dict(repetition_penalty=1.3),
    dict(repetition_penalty=0.6),
    dict(temperature=1.5, top_k=20, top_p=0.7, repetition_penalty=1.2),
])
def test_probabilities_are_transformers(knobs):
    """Compare with transformers' processors, in transformers' order, on random logits."""
    from transformers import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )
    kinds = dict(
        repetition_penalty=RepetitionPenaltyLogitsProcessor,
        temperature=TemperatureLogitsWarper,
        top_k=TopKLogitsWarper,
        top_p=TopPLogitsWarper,
    )
    processors = LogitsProcessorList()
    for name, kind in kinds.items():
        if name in knobs:
            processors.append(kind(knobs[name]))
    torch.manual_seed(0)
    for scale in (0.1, 1, 5):
        logits = scale * torch.randn(16, 120)
        idx = torch.randint(120, (16, 9))
        theirs = processors(idx, logits.clone()).softmax(1)
        seen = torch.zeros(16, 120, dtype=torch.bool).scatter(1, idx, True)
        ours = gpt.probabilities(logits, seen, gpt.Sampling(**knobs))
        assert (ours - theirs).abs().max() < 1e-6


def test_top_k_keeps_exactly_k_on_ties():
    seen = torch.zeros(5, 10, dtype=torch.bool)
    probs = gpt.probabilities(torch.zeros(5, 10), seen, gpt.Sampling(top_k=3))
    assert (probs > 0).sum(1).tolist() == [3, 3, 3, 3, 3]


def test_a_draw_at_the_edges():
    """Tokens with a probability of 0 are never drawn, not even at the ends of an interval."""
    probs = torch.tensor([[0, 0.25, 0, 0.75, 0]]).expand(5, 5)
    chance = torch.tensor([0, 0.2499, 0.25, 0.9999, 1 - 2**-24])
    assert gpt.draw(probs, chance[:, None]).flatten().tolist() == [1, 1, 3, 3, 3]


def test_a_rows_text_does_not_depend_on_the_others():
    net = rough(small()).eval()
    idx = tokens(5, 4)
    whole = net.generate(idx, 12, generator=seeded(3))
    for rows in (1, 3):
        alone = net.generate(idx[:rows], 12, generator=seeded(3))
        assert torch.equal(alone, whole[:rows])


def test_several_texts_of_one_prompt_are_those_drawn_alone():
    net = rough(small()).eval()
    idx = tokens(5, 4)[:1]
    chance = gpt.chances([5, 6, 7], 12)
    together = torch.cat(list(net.stream(idx, 12, gpt.Sampling(), chance)), 1)
    for row in range(3):
        alone = torch.cat(list(net.stream(idx, 12, gpt.Sampling(), chance[row:row + 1])), 1)
        assert torch.equal(alone[0], together[row])


def test_a_top_k_above_the_vocabulary_keeps_every_token():
    assert rough(small()).generate(tokens(1, 4), 3, top_k=1000).shape == (1, 7)


# ---- what is refused ---------------------------------------------------------------------------

@pytest.mark.parametrize('changes, words', [
    (dict(n_embd=50), ['n_embd=50', 'n_head=3', '--n_head=2']),
    (dict(block_size=0), ['block_size=0', '1 or more']),
    (dict(vocab_size=0), ['vocab_size']),
    (dict(n_layer=-1), ['n_layer=-1']),
    (dict(pos='sin'), ["'sin'", 'learned, rope, none']),
    (dict(norm='rms'), ['pre, post, none']),
    (dict(activation='nonsense'), [', '.join(gpt.ACTIVATIONS)]),
    (dict(dropout=1.0), ['below 1']),
    (dict(layer_drop=0.1, residual=False), ['residual']),
    (dict(pos='rope', n_head=16), ['odd', 'even']),
])
def test_impossible_shapes_are_refused(changes, words):
    with pytest.raises(ValueError) as error:
        GPTConfig(**{**SMALL, **changes})
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize('name, value', [
    ('max_new_tokens', -1),
    ('temperature', -0.1),
    ('temperature', float('nan')),
    ('top_k', 0),
    ('top_k', 2.0),
    ('top_p', 0.0),
    ('top_p', 1.1),
    ('top_p', float('nan')),
    ('repetition_penalty', 0.0),
    ('repetition_penalty', -1),
])
def test_impossible_sampling_knobs_are_refused(name, value):
    knobs = {'max_new_tokens': 3, name: value}
    with pytest.raises(ValueError, match=f'{name}=.* allowed is .* type --'):
        rough(small()).generate(tokens(1, 4), **knobs)


@pytest.mark.parametrize('idx, words', [
    (torch.tensor([[3, 61]]), 'tokens are 0 to 60'),
    (torch.tensor([[-1, 3]]), 'tokens are 0 to 60'),
    (torch.zeros(1, 0, dtype=torch.long), 'a prompt of shape'),
])
def test_impossible_prompts_are_refused(idx, words):
    with pytest.raises(ValueError, match=words):
        rough(small()).generate(idx, 3)


def test_more_tokens_than_block_size_are_refused():
    with pytest.raises(ValueError, match='33 tokens do not fit block_size=32'):
        small()(tokens(1, 33))


ALONE = '''
import sys
sys.path.insert(0, '.')
import torch
from model import GPT, GPTConfig
net = GPT(GPTConfig(block_size=8, vocab_size=9, n_layer=1, n_head=1, n_embd=8))
print(net.generate(torch.zeros(1, 1, dtype=torch.long), 5).shape)
'''


def test_model_works_alone(tmp_path):
    """Copy model.py into an empty folder, without any other file of this repository."""
    shutil.copy(gpt.__file__, tmp_path)
    done = subprocess.run(
        [sys.executable, '-I', '-c', ALONE],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout == 'torch.Size([1, 6])\n'
    assert done.stderr == ''
