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
KINDS = [{}, dict(bias=False), dict(qkv_bias=False), dict(tie_weights=False), dict(pos='rope'), dict(pos='none'), dict(norm='post'),
         dict(norm='none'), dict(residual=False), dict(qk_norm=True), dict(activation='relu2')]


def small(seed=0, **changes):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{**SMALL, **changes}))


def tokens(B, T, V=61, seed=1):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


def rough(net, seed=5):
    """Random biases and gains too, so that no term of the network can hide behind its zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return net


@pytest.mark.parametrize('changes, count', [({}, 124_439_808), (dict(qkv_bias=False), 124_412_160),
                                            (dict(tie_weights=False), 163_037_184)])
def test_parameter_counts(changes, count):
    with torch.device('meta'):
        assert GPT(GPTConfig(**changes)).num_params() == count


@pytest.mark.parametrize('changes', KINDS + [dict(n_layer=0, pos='none')])
@pytest.mark.parametrize('flash', [True, False])
def test_future_never_leaks(changes, flash):
    """Changing token t leaves the logits before t as they were, and moves the one at t (minGPT #75 leaked)."""
    net, idx = rough(small(**changes, flash=flash)).eval(), tokens(2, 20)
    before = net(idx)[0]
    for t in (1, 7, 19):
        other = idx.clone()
        other[:, t] = (other[:, t] + 1) % 61
        after = net(other)[0]
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.allclose(after[:, t], before[:, t])


@pytest.mark.parametrize('T, S', [(1, 1), (9, 9), (1, 9), (4, 9)])
def test_explicit_and_fused_attention_agree(T, S):
    q, k, v = torch.randn(2, 3, T, 16), torch.randn(2, 3, S, 16), torch.randn(2, 3, S, 16)
    explicit = gpt.explicit_attention(q, k, v)
    assert torch.allclose(explicit, gpt.fused_attention(q, k, v), atol=1e-5)
    weights = gpt.attention_weights(q, k)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 3, T)) and weights.triu(S - T + 1).abs().max() == 0
    for t in range(T):   # the formula, one query at a time
        seen = S - T + t + 1
        scores = torch.einsum('bhd,bhsd->bhs', q[:, :, t], k[:, :, :seen]) / 4
        assert torch.allclose(torch.einsum('bhs,bhsd->bhd', scores.softmax(-1), v[:, :, :seen]), explicit[:, :, t], atol=1e-5)


def test_whole_models_agree_with_and_without_flash():
    net, idx = rough(small()), tokens(2, 32)
    explicit = rough(small(flash=False))
    (a, loss_a), (b, loss_b) = net(idx, idx), explicit(idx, idx)
    assert torch.allclose(a, b, atol=1e-5)
    loss_a.backward(), loss_b.backward()
    for p, q in zip(net.parameters(), explicit.parameters()):
        assert torch.allclose(p.grad, q.grad, atol=1e-5)


@pytest.mark.parametrize('sizes', [dict(), dict(n_layer=5, n_head=3, n_embd=48, vocab_size=1003, block_size=40)])
def test_logits_equal_transformers(sizes):
    """The same random weights in GPT2LMHeadModel: logits to 1e-4, loss to 1e-5."""
    from transformers import GPT2Config, GPT2LMHeadModel
    net = rough(small(**sizes)).eval()
    c = net.config
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
                                        n_head=c.n_head, bos_token_id=0, eos_token_id=0)).eval()
    conv1d = ('attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight')
    weights = {name: p.t() if name.endswith(conv1d) else p for name, p in net.state_dict().items()}
    assert weights.keys() == {name for name in theirs.state_dict() if not name.endswith(('.attn.bias', '.attn.masked_bias'))}
    theirs.load_state_dict(weights, strict=False)
    idx = tokens(3, c.block_size, c.vocab_size)
    with torch.no_grad():
        logits, loss = net(idx, torch.cat((idx[:, 1:], torch.full((3, 1), -1)), 1))
        reference = theirs(idx, labels=idx)
    assert torch.allclose(logits, reference.logits, atol=1e-4)
    assert abs(loss - reference.loss) < 1e-5


@pytest.mark.parametrize('changes', [{}, dict(n_layer=4, n_head=3, n_embd=192, vocab_size=65), dict(pos='rope')])
def test_loss_at_init_is_ln_vocab(changes):
    net = small(**changes)
    V = net.config.vocab_size
    assert abs(net(tokens(8, 32, V), tokens(8, 32, V, seed=2))[1].item() - math.log(V)) < 0.1


def test_init_is_gpt2s():
    net = small(n_layer=8, n_embd=192)
    for name, p in net.named_parameters():
        if name.endswith('c_proj.weight'):
            assert abs(p.std() - 0.02 / 4) < 2e-4   # √(2·8) = 4
        elif p.dim() == 2:
            assert abs(p.std() - 0.02) < 1e-3
        else:
            assert torch.equal(p, torch.ones_like(p) if 'ln_' in name and name.endswith('weight') else torch.zeros_like(p))


def test_fields_do_what_they_say():
    x = torch.randn(2, 5, 48)
    block = small().transformer.h[0].eval()
    for changes, formula in (
            ({}, lambda a, m: (lambda h: h + m(block.ln_2(h)))(x + a(block.ln_1(x)))),
            (dict(norm='post'), lambda a, m: (lambda h: block.ln_2(h + m(h)))(block.ln_1(x + a(x)))),
            (dict(norm='none'), lambda a, m: (lambda h: h + m(h))(x + a(x))),
            (dict(residual=False), lambda a, m: m(block.ln_2(a(block.ln_1(x)))))):
        other = small(**changes).transformer.h[0].eval()
        other.load_state_dict({k: v for k, v in block.state_dict().items() if k in other.state_dict()})
        assert torch.allclose(other(x), formula(other.attn, other.mlp), atol=1e-6)
    assert small(qkv_bias=False).transformer.h[0].attn.c_attn.bias is None and small().lm_head.bias is None
    assert small(tie_weights=False).lm_head.weight is not small().transformer.wte.weight
    net = small()
    assert net.lm_head.weight is net.transformer.wte.weight
    assert not any('bias' in name for name, _ in small(bias=False).named_parameters())
    assert all('transformer.wpe.weight' not in small(pos=pos).state_dict() for pos in ('none', 'rope'))
    mlp, y = small(activation='relu2').transformer.h[0].mlp, torch.randn(3, 48)
    assert torch.allclose(mlp(y), mlp.c_proj(torch.relu(mlp.c_fc(y)) ** 2))
    mlp, z = rough(small()).transformer.h[0].mlp, torch.randn(3, 48)
    h = mlp.c_fc(z)
    tanh_form = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h ** 3)))
    assert torch.allclose(mlp(z), mlp.c_proj(tanh_form), atol=1e-6)


def test_no_positions_and_no_order():
    """Without positions the newest token sees a set: the order of the earlier ones is lost on it, in one layer."""
    net, idx = rough(small(pos='none', n_layer=1)).eval(), tokens(1, 10)
    shuffled = torch.cat((idx[:, :9].flip(1), idx[:, 9:]), 1)
    assert torch.allclose(net(idx)[0][:, -1], net(shuffled)[0][:, -1], atol=1e-5)
    assert not torch.allclose(rough(small(n_layer=1)).eval()(idx)[0][:, -1], rough(small(n_layer=1)).eval()(shuffled)[0][:, -1])


def test_rope_sees_distances_only():
    """Scores depend on i - j alone, rotations keep lengths, and complex multiplication gives the same (arXiv 2104.09864)."""
    net = small(pos='rope')
    cos, sin = net.rope
    q, k = torch.randn(1, 1, 1, 16).expand(1, 32, 1, 16), torch.randn(1, 1, 1, 16).expand(1, 32, 1, 16)
    scores = gpt.rotate(q, cos, sin)[0, :, 0] @ gpt.rotate(k, cos, sin)[0, :, 0].T
    for distance in (0, 1, 5):
        diagonal = scores.diagonal(-distance)
        assert torch.allclose(diagonal, diagonal[0].expand_as(diagonal), atol=1e-4)
    assert not torch.allclose(scores[5, 5], scores[5, 0])
    angle = torch.arange(32)[:, None, None] * 10000.0 ** (-torch.arange(8) / 8)
    turned = torch.complex(q[..., :8], q[..., 8:]) * torch.polar(torch.ones_like(angle), angle)
    assert torch.allclose(gpt.rotate(q, cos, sin), torch.cat((turned.real, turned.imag), -1), atol=1e-5)


def test_qk_norm_ignores_scale():
    net, x = rough(small(qk_norm=True)).transformer.h[0].attn.eval(), torch.randn(1, 9, 48)
    before = net(x)
    with torch.no_grad():
        net.c_attn.weight[:48] *= 7
        net.c_attn.bias[:48] *= 7
    assert torch.allclose(net(x), before, atol=1e-4)


def test_label_smoothing_in_training_only():
    net, idx = small(label_smoothing=0.1), tokens(2, 8)
    logp = net(idx)[0].log_softmax(-1)
    hit = -logp.gather(-1, idx[..., None]).mean()
    assert torch.allclose(net(idx, idx)[1], 0.9 * hit + 0.1 * -logp.mean(-1).mean(), atol=1e-6)
    assert torch.allclose(net.eval()(idx, idx)[1], hit, atol=1e-6)


def test_ignored_targets_and_mean():
    net, idx = small(), tokens(2, 8)
    targets = idx.clone()
    targets[0, 3:], targets[1] = -1, -1
    logits, loss = net(idx, targets)
    assert logits.shape == (2, 8, 61)
    assert torch.allclose(loss, F.cross_entropy(logits[0, :3], idx[0, :3]), atol=1e-6)
    assert net(idx)[1] is None


def test_layer_drop():
    """On average a branch counts in full, dropped rows skip it, evaluation never drops."""
    block, x = small(layer_drop=0.4).transformer.h[0], torch.randn(1, 4, 48).expand(4000, 4, 48)
    torch.manual_seed(0)
    y = block.branch(x, block.ln_1, block.attn) - x
    full = block.eval().branch(x[:1], block.ln_1, block.attn) - x[:1]
    dropped = (y.flatten(1).abs().sum(1) == 0).float().mean()
    assert abs(dropped - 0.4) < 0.03
    assert torch.allclose(y.mean(0), full[0], atol=0.05 * full.abs().max().item())
    assert torch.allclose(y[y.flatten(1).abs().sum(1) > 0][0], full[0] / 0.6, atol=1e-5)


def test_dropout_drops_in_training_only():
    net, idx = small(dropout=0.5), tokens(2, 8)
    assert not torch.equal(net(idx)[0], net(idx)[0])
    assert torch.equal(net.eval()(idx)[0], net(idx)[0])


@pytest.mark.parametrize('changes', [{}, dict(pos='rope', dropout=0.3)])
def test_grad_checkpointing_changes_nothing(changes):
    idx, grads = tokens(2, 16), []
    for on in (False, True):
        net = small(grad_checkpointing=on, **changes)
        torch.manual_seed(3)
        net(idx, idx)[1].backward()
        grads.append([p.grad for p in net.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads))


@pytest.mark.parametrize('changes', KINDS)
def test_every_kind_learns(changes):
    """One small batch can be driven down, and every parameter gets a gradient."""
    net, idx = small(**{**dict(n_head=2, n_embd=32), **changes}), tokens(2, 9)
    adam = torch.optim.AdamW(net.optimizer_groups(0.0), lr=3e-3)
    first = net(idx[:, :-1], idx[:, 1:])[1].item()
    for _ in range(60):
        loss = net(idx[:, :-1], idx[:, 1:])[1]
        adam.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in net.parameters())
        adam.step()
    assert loss.item() < 0.8 * first


def test_gradient_is_a_finite_difference():
    net, idx = rough(small(n_layer=1)).double(), tokens(1, 6)

    def loss():   # in double from end to end; the model's own is rounded to fp32
        return F.cross_entropy(net(idx)[0][0], idx[0])

    loss().backward()
    for name, p in net.named_parameters():
        direction = torch.randn_like(p)
        with torch.no_grad():
            p.add_(1e-5 * direction)
            up = loss()
            p.sub_(2e-5 * direction)
            down = loss()
            p.add_(1e-5 * direction)
        assert abs((up - down) / 2e-5 - (p.grad * direction).sum()) < 1e-6, name


def test_optimizer_groups_own_every_parameter_once():
    for changes in KINDS:
        net = small(**changes)
        decayed, free = (group['params'] for group in net.optimizer_groups(0.1))
        assert sorted(map(id, decayed + free)) == sorted(map(id, net.parameters()))
        assert all(p.dim() == 2 for p in decayed) and all(p.dim() == 1 for p in free)
        parts = list(optimizers.muon_parts(net))
        assert [tuple(part.matrix.shape) for part in parts] == [(48, 48)] * 4 + [(192, 48), (48, 192)] + [(48, 48)] * 4 + [(192, 48), (48, 192)]


def test_flops_per_token():
    """torch's own counter over forward and backward, attention's masked half included."""
    from torch.utils.flop_counter import FlopCounterMode
    for changes in ({}, dict(tie_weights=False), dict(pos='rope')):
        net, idx = small(flash=False, bias=False, **changes), tokens(2, 32)
        with FlopCounterMode(display=False) as counter:
            net(idx, idx)[1].backward()
        norms = 6 * sum(p.numel() for p in net.parameters() if p.dim() == 1)
        assert counter.get_total_flops() / idx.numel() == net.flops_per_token() - norms


# ---- sampling ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('changes', KINDS + [dict(n_layer=0, pos='none')])
@pytest.mark.parametrize('length', [1, 20, 32, 40])
def test_cache_changes_no_token(changes, length):
    """Greedy text with the cache equals the text without, up to and beyond block_size, and equals the plain argmax loop."""
    net, idx = rough(small(**changes)).eval(), tokens(2, length)
    with_cache = net.generate(idx, 16, temperature=0)
    assert torch.equal(with_cache, net.generate(idx, 16, temperature=0, kv_cache=False))
    plain = idx
    for _ in range(16):
        plain = torch.cat((plain, net(plain[:, -32:])[0][:, -1:].argmax(-1)), 1)
    assert torch.equal(with_cache, plain)


def test_cached_logits_equal_full_ones():
    net, idx = rough(small()).eval(), tokens(2, 20)
    cache = [gpt.LayerCache(32) for _ in range(2)]
    pieces = [net.hidden(part, cache) for part in idx.split([7, 1, 1, 8, 3], dim=1)]
    assert torch.allclose(net.lm_head(torch.cat(pieces, 1)), net(idx)[0], atol=1e-5)


def test_generate():
    net, idx = small(dropout=0.5), tokens(3, 4)
    assert torch.equal(net.generate(idx, 0), idx)
    a, b = (net.generate(idx, 12, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert a.shape == (3, 16) and torch.equal(a, b) and torch.equal(a[:, :4], idx) and net.training
    greedy = net.generate(idx, 12, temperature=0)
    for knobs in (dict(top_k=1), dict(top_p=1e-9), dict(temperature=1e-6)):
        assert torch.equal(net.generate(idx, 12, **knobs), greedy)
    stopped = net.generate(idx[:1], 12, temperature=0, stop=[greedy[0, 6].item()])
    assert torch.equal(stopped, greedy[:1, :4 + (greedy[0, 4:] == greedy[0, 6]).nonzero()[0].item() + 1])
    with pytest.raises(ValueError, match='empty prompt'):
        net.generate(idx[:, :0], 3)


@pytest.mark.parametrize('knobs', [{}, dict(temperature=0.5), dict(top_k=3), dict(top_p=0.8), dict(top_k=4, top_p=0.9, temperature=2.0),
                                   dict(repetition_penalty=1.7, top_k=5)])
def test_draws_follow_the_distribution(knobs):
    """Chi-squared of 20,000 draws against the exact probabilities, a false alarm in 1,000 at a fixed seed."""
    idx, logits = torch.tensor([[0, 3]]), torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -3.0]])
    probs = gpt.probabilities(logits, idx, **knobs)
    drawn = gpt.draw(probs.expand(20000, 6), gpt.chances([1], 20000).T)
    counts, possible = torch.bincount(drawn.flatten(), minlength=6), probs[0] > 0
    assert counts[~possible].sum() == 0
    chi2 = ((counts - 20000 * probs[0])[possible] ** 2 / (20000 * probs[0][possible])).sum()
    assert chi2 < 20.5


@pytest.mark.parametrize('knobs', [dict(temperature=0.7), dict(top_k=1), dict(top_k=7), dict(top_k=200), dict(top_p=0.3), dict(top_p=0.9),
                                   dict(repetition_penalty=1.3), dict(repetition_penalty=0.6),
                                   dict(temperature=1.5, top_k=20, top_p=0.7, repetition_penalty=1.2)])
def test_probabilities_are_transformers(knobs):
    """On random logits, against its processors in its order."""
    from transformers import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )
    made = dict(repetition_penalty=RepetitionPenaltyLogitsProcessor, temperature=TemperatureLogitsWarper, top_k=TopKLogitsWarper, top_p=TopPLogitsWarper)
    processors = LogitsProcessorList([made[name](knobs[name]) for name in made if name in knobs])
    torch.manual_seed(0)
    for scale in (0.1, 1, 5):
        logits, idx = scale * torch.randn(16, 120), torch.randint(120, (16, 9))
        theirs = processors(idx, logits.clone()).softmax(1)
        assert (gpt.probabilities(logits, idx, **knobs) - theirs).abs().max() < 1e-6


def test_top_k_keeps_exactly_k_on_ties():
    assert (gpt.probabilities(torch.zeros(5, 10), torch.zeros(5, 1, dtype=torch.long), top_k=3) > 0).sum(1).tolist() == [3] * 5


def test_a_draw_at_the_edges():
    probs = torch.tensor([[0, 0.25, 0, 0.75, 0]])
    chance = torch.tensor([0, 0.2499, 0.25, 0.9999, 1 - 2**-24])
    assert gpt.draw(probs.expand(5, 5), chance[:, None]).flatten().tolist() == [1, 1, 3, 3, 3]


def test_a_rows_text_does_not_depend_on_the_others():
    net, idx = rough(small()).eval(), tokens(5, 4)
    whole = net.generate(idx, 12, generator=torch.Generator().manual_seed(3))
    for rows in (1, 3):
        assert torch.equal(net.generate(idx[:rows], 12, generator=torch.Generator().manual_seed(3)), whole[:rows])
    chance = gpt.chances([5, 6, 7], 12)
    together = torch.cat(list(net.stream(idx[:1], 12, chance=chance)), 1)   # one prompt, read once
    for row in range(3):
        assert torch.equal(torch.cat(list(net.stream(idx[:1], 12, chance=chance[row:row + 1])), 1)[0], together[row])


# ---- shapes that cannot exist --------------------------------------------------------------------------------------

@pytest.mark.parametrize('changes, words', [
    (dict(n_embd=50), ['n_embd=50', 'n_head=3', '--n_head=2']), (dict(block_size=0), ['block_size=0', '1 or more']),
    (dict(vocab_size=0), ['vocab_size']), (dict(n_layer=-1), ['n_layer=-1']), (dict(pos='sin'), ["'sin'", 'learned, rope, none']),
    (dict(norm='rms'), ['pre, post, none']), (dict(activation='silu'), ['gelu, gelu_erf, relu2']), (dict(dropout=1.0), ['below 1']),
    (dict(layer_drop=0.1, residual=False), ['residual']), (dict(pos='rope', n_head=16), ['odd', 'even'])])
def test_impossible_shapes(changes, words):
    with pytest.raises(ValueError) as error:
        GPTConfig(**{**SMALL, **changes})
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize('knobs', [dict(max_new_tokens=-1), dict(temperature=-0.1), dict(temperature=float('nan')), dict(top_k=0), dict(top_k=2.0),
                                   dict(top_p=0.0), dict(top_p=1.1), dict(top_p=float('nan')), dict(repetition_penalty=0.0), dict(repetition_penalty=-1)])
def test_sampling_knobs_that_mean_nothing(knobs):
    with pytest.raises(ValueError, match=f'{next(iter(knobs))}=.* allowed is .* type --'):
        rough(small()).generate(tokens(1, 4), **{'max_new_tokens': 3, **knobs})


def test_prompts_that_mean_nothing():
    net = rough(small())
    for idx, words in ((torch.tensor([[3, 61]]), 'tokens are 0 to 60'), (torch.tensor([[-1, 3]]), 'tokens are 0 to 60'), (tokens(1, 4)[:, :0], 'empty prompt')):
        with pytest.raises(ValueError, match=words):
            net.generate(idx, 3)
    assert torch.equal(net.generate(tokens(2, 4), 0), tokens(2, 4)) and net.generate(tokens(1, 4), 3, top_k=1000).shape == (1, 7)


def test_too_long():
    with pytest.raises(ValueError, match='33 tokens do not fit block_size=32'):
        small()(tokens(1, 33))


def test_model_works_alone(tmp_path):
    """model.py copied into an empty folder, with nothing of ours beside it."""
    shutil.copy(gpt.__file__, tmp_path)
    code = ('import torch; from model import GPT, GPTConfig; '
            'net = GPT(GPTConfig(block_size=8, vocab_size=9, n_layer=1, n_head=1, n_embd=8)); '
            'print(net.generate(torch.zeros(1, 1, dtype=torch.long), 5).shape)')
    done = subprocess.run([sys.executable, '-I', '-c', f'import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}'], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.stdout == 'torch.Size([1, 6])\n' and done.stderr == ''
