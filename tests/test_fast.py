"""fast.py: each faster way beside the formula or torch's own. pytest tests/test_fast.py"""
import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import model as gpt
from lib import fast, optimizers, runtime
from model import GPT, GPTConfig

pytestmark = pytest.mark.processor

SMALL = dict(block_size=32, vocab_size=61, n_layer=2, n_head=3, n_embd=48)


def faster(net):
    """Return a net that uses every way of lib/fast.py."""
    fast.use_on_processor(net)
    return net


def step_of(net, made, loss_of=None):
    """Return train.py's step in fp32 on a net's device, without clipping."""
    device = next(net.parameters()).device.type
    scaler = torch.amp.GradScaler(device, enabled=False)
    return optimizers.TrainingStep(net, loss_of or fast.TrainingLoss(net, lean=False), made, scaler, 0.0,
                                   device, 'float32')


def muon_of(net):
    return optimizers.Optimizers(net, 'muon', (1e-3, 0.01), 0.1, (0.9, 0.95))


CLASSIC = ((3.4445, -4.775, 2.0315),) * 5   # torch.optim.Muon's polynomial, five times


@pytest.fixture
def blocks(monkeypatch):
    """Attention by blocks on every processor, also where scaled_dot_product_attention is faster."""
    monkeypatch.setattr(fast, 'blocks_pay', lambda dtype, dropout: True)


@pytest.mark.usefixtures('blocks')
@pytest.mark.parametrize('T', [1, 3, 64, 128, 129, 300, 600, 1100])   # above KEEP_WEIGHTS weights are computed twice
def test_attention_by_blocks_is_the_formula(T):
    """Its values, and the gradients of q, k and v, which the formula's autograd gives."""
    def run(attend):
        torch.manual_seed(T)
        q, k, v, g = (torch.randn(2, 3, T, 8, requires_grad=i < 3) for i in range(4))
        y = attend(q, k, v)
        y.backward(g)
        return y.detach(), q.grad, k.grad, v.grad
    for ours, formula in zip(run(fast.attend), run(gpt.explicit_attention)):
        assert torch.allclose(ours, formula, atol=1e-5)


@pytest.mark.parametrize('T', [3, 140, 600, 1100])
def test_attention_drops_weights_and_differentiates_what_it_dropped(T, monkeypatch):
    """With the same mask as the formula: values and gradients to 1e-5; the mask drops the share it is asked for."""
    masks = []
    monkeypatch.setattr(fast, 'kept', lambda *args, draw=fast.kept: masks.append(draw(*args)) or masks[-1])
    torch.manual_seed(0)
    q, k, v, g = (torch.randn(2, 3, T, 8, requires_grad=i < 3) for i in range(4))
    y = fast.attend(q, k, v, 0.3)
    mine = torch.autograd.grad(y, (q, k, v), g)
    keep = torch.ones(6, T, T)
    for mask, start in zip(masks, range(0, T, max(64, min(256, T // 4)))):
        keep[:, start:start + mask.size(1), :mask.size(2)] = mask
    formula = (gpt.attention_weights(q, k) * keep.view(2, 3, T, T) / 0.7) @ v
    assert torch.allclose(y, formula, atol=1e-5)
    for ours, its in zip(mine, torch.autograd.grad(formula, (q, k, v), g)):
        assert torch.allclose(ours, its, atol=1e-5)
    if T > 100:
        assert abs(sum(mask.sum() for mask in masks) / sum(mask.numel() for mask in masks) - 0.7) < 0.005


@pytest.mark.usefixtures('blocks')
@pytest.mark.parametrize('dropout', [0.0, 0.2])
def test_long_attention_keeps_nothing_quadratic(dropout):
    """Above KEEP_WEIGHTS tokens the backward pass is left q, k and v alone; up to there weights and masks, too."""
    def saved(T):
        sizes = []
        q, k, v = (torch.randn(1, 2, T, 8, requires_grad=True) for _ in range(3))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            fast.attend(q, k, v, dropout)
        return max(sizes)
    assert saved(fast.KEEP_WEIGHTS + 88) == 2 * 600 * 8 and saved(fast.KEEP_WEIGHTS) > 2 * 512 * 8


@pytest.mark.parametrize('avx512, dtype, dropout, expected', [
    (True, torch.bfloat16, 0.0, True), (True, torch.float32, 0.0, True), (False, torch.float32, 0.0, False),
    (False, torch.float32, 0.2, True)])
def test_attention_is_chosen_by_the_processor(monkeypatch, avx512, dtype, dropout, expected):
    """Each kind of processor gets what was faster there; both ways compute the formula."""
    monkeypatch.setattr(fast, 'cpu_has_avx512', lambda: avx512)
    q, k, v = (torch.randn(2, 3, 16, 8, dtype=dtype, requires_grad=True) for _ in range(3))
    y = fast.attend(q, k, v, dropout)
    names, todo = set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        names.add(type(node).__name__)
        todo += [parent for parent, _ in node.next_functions if parent]
    assert ('BlockAttentionBackward' in names) == expected
    if not dropout:
        assert torch.allclose(y, gpt.explicit_attention(q, k, v), atol=1e-5 if dtype == torch.float32 else 3e-2)


@pytest.mark.usefixtures('blocks')
def test_attention_by_blocks_is_taken_in_training_alone():
    net = faster(GPT(GPTConfig(**SMALL)))
    taken = net(torch.zeros(1, 8, dtype=torch.long))[0].grad_fn
    names, todo = set(), [taken]
    while todo:
        node = todo.pop()
        names.add(type(node).__name__)
        todo += [parent for parent, _ in node.next_functions if parent]
    assert 'BlockAttentionBackward' in names
    with torch.no_grad():
        assert net.generate(torch.zeros(1, 1, dtype=torch.long), 3).shape == (1, 4)
    explicit = faster(GPT(GPTConfig(**SMALL, flash=False)))
    assert explicit.transformer.h[0].attn.attention is gpt.explicit_attention


def test_gelu_by_a_sigmoid_is_the_tanh_form():
    """In float64 value and gradient are torch's to 1e-12, from where it is 0 to where it is x; in fp32 to fp32's rounding."""
    x = torch.cat((torch.linspace(-12, 12, 4001, dtype=torch.float64), torch.tensor([-1e5, -0.0, 1e5], dtype=torch.float64)))
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        ours, theirs = (x.clone().to(dtype).requires_grad_() for _ in range(2))
        y, expected = fast.SigmoidGELU.apply(ours), F.gelu(theirs, approximate='tanh')
        assert torch.allclose(y, expected, rtol=tolerance, atol=tolerance)
        upstream = torch.randn(x.shape, dtype=dtype)
        y.backward(upstream)
        expected.backward(upstream)
        assert torch.allclose(ours.grad, theirs.grad, rtol=tolerance, atol=3 * tolerance)


def test_gelu_rounds_once_in_bf16_and_leaves_other_activations_alone():
    x = torch.randn(1000).bfloat16()
    assert torch.equal(fast.gelu(x), F.gelu(x, approximate='tanh'))
    for name, function in gpt.ACTIVATIONS.items():
        mlp = faster(GPT(GPTConfig(**SMALL, activation=name))).transformer.h[0].mlp
        assert mlp.activation is (fast.gelu if name == 'gelu' else function)


@pytest.mark.parametrize('p', [0.0, 0.1, 0.5, 0.999])
def test_dropout(p):
    """The share kept (five standard errors), made up for; the gradient through the same mask; a function of the seed."""
    layer, x = fast.Dropout(p), torch.ones(100, 999, requires_grad=True)
    torch.manual_seed(1)
    y = layer(x)
    share = (y > 0).float().mean().item()
    assert abs(share - (1 - p)) <= 5 * math.sqrt(p * (1 - p) / x.numel())
    assert torch.allclose(y[y > 0], torch.tensor(1 / (1 - p)))
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    torch.manual_seed(1)
    assert torch.equal(layer(x), y)
    neighbours = (y[:, 1:] > 0) & (y[:, :-1] > 0)   # draws beside each other share no bits
    assert abs(neighbours.float().mean().item() - (1 - p) ** 2) < 0.01
    assert torch.equal(layer.eval()(x), x)


def test_dropout_next_to_one_drops():
    assert fast.kept((1_000_003,), 0.999999, torch.float32).mean() < 1e-4


@pytest.mark.parametrize('smoothing', [0.0, 0.2])
def test_cross_entropy_is_torchs(smoothing, monkeypatch):
    """Loss and gradient of the logits, with ignored targets, over several chunks of rows."""
    torch.manual_seed(2)
    logits, targets = 3 * torch.randn(50, 300_000 // 50), torch.randint(6000, (50,))
    targets[::7] = -1
    theirs = logits.clone().requires_grad_()
    expected = F.cross_entropy(theirs, targets, ignore_index=-1, label_smoothing=smoothing)
    (3 * expected).backward()
    monkeypatch.setattr(fast, 'ROW_ELEMENTS', 6000 * 8)
    ours = logits.clone().requires_grad_()
    loss = fast.CrossEntropy.apply(ours * 1.0, targets, smoothing)
    assert abs(loss - expected) < 1e-5
    (3 * loss).backward()
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-7)


def test_targets_that_are_all_ignored_teach_nothing():
    logits = torch.randn(3, 5000, requires_grad=True)
    fast.CrossEntropy.apply(logits * 1.0, torch.full((3,), -1), 0.1).backward()
    assert torch.equal(logits.grad, torch.zeros(3, 5000))


def test_a_large_vocabulary_trains_the_same():
    """Loss and every gradient of a net with 5,000 tokens, lean and as autograd computes them."""
    def run(lean):
        torch.manual_seed(3)
        net = GPT(GPTConfig(**{**SMALL, 'vocab_size': 5000}))
        idx = torch.randint(5000, (3, 32))
        loss = fast.TrainingLoss(net, lean)(idx, idx.roll(-1, 1))
        loss.backward()
        names = {type(node).__name__ for node in (loss.grad_fn, *(f for f, _ in loss.grad_fn.next_functions))}
        return loss, [p.grad for p in net.parameters()], names
    (loss, grads, names), (lean_loss, lean_grads, lean_names) = run(False), run(True)
    assert 'CrossEntropyBackward' in lean_names and 'CrossEntropyBackward' not in names
    assert abs(loss - lean_loss) < 1e-5
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(grads, lean_grads))


@pytest.mark.parametrize('change', ['attention', 'dropout module', 'loss', 'muon', 'all'])
def test_the_loss_curve_stays(change):
    """Twenty steps in fp32 with and without each way: the same losses to 1e-5. Dropout, whose draws differ, at p = 0 here."""
    def curve(changed):
        torch.manual_seed(4)
        net = GPT(GPTConfig(**{**SMALL, 'vocab_size': 4096, 'block_size': 64}))
        if changed and change == 'all':
            fast.use_on_processor(net)
        if changed and change == 'attention':
            net.set_attention(fast.attend)
        if changed and change == 'dropout module':
            net.set_dropout(fast.Dropout)
        made = muon_of(net)
        muon = made.all[1]
        muon.precise = True
        if not (changed and change in ('muon', 'all')):   # a matrix at a time
            for group in muon.param_groups:
                singles = [dict(group, params=[p]) for p in group['params']]
            muon.param_groups = singles
        step = step_of(net, made, fast.TrainingLoss(net, lean=changed and change in ('loss', 'all')))
        losses, generator = [], torch.Generator().manual_seed(5)
        for _ in range(20):
            idx = torch.randint(40, (2, 65), generator=generator)
            losses.append(step([(idx[:, :-1], idx[:, 1:])])[0].item())
        return losses
    slow, quick = curve(False), curve(True)
    assert slow[-1] < slow[0] - 1 and max(abs(a - b) for a, b in zip(slow, quick)) < 1e-5


def test_a_copy_of_a_faster_model_computes_with_its_own_weights():
    torch.manual_seed(5)
    net = faster(GPT(GPTConfig(**SMALL)))
    twin, idx = copy.deepcopy(net), torch.randint(61, (1, 9))
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert abs(twin(idx, idx)[1] - math.log(61)) < 1e-6 < abs(net(idx, idx)[1] - math.log(61))


@pytest.mark.parametrize('precise', [False, True])
def test_muon_is_torchs_matrix_by_matrix(precise, monkeypatch):
    """Three steps with matrices of three shapes beside torch.optim.Muon, with its polynomials; its products are in bf16."""
    monkeypatch.setattr(optimizers, 'POLAR', CLASSIC)

    def run(kind, **settings):
        torch.manual_seed(6)
        params = [nn.Parameter(torch.randn(shape)) for shape in ((8, 8), (32, 8), (8, 32), (8, 8), (8, 32))]
        opt = kind(params, lr=0.1, weight_decay=0.2, **settings)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape)
            opt.step()
        return params, opt
    (theirs, _), (ours, opt) = run(torch.optim.Muon), run(optimizers.Muon, precise=precise)
    # bf16 rounds each of fifteen products to 2^-9 of its value; the same rounding in one order and the other
    assert max((a - b).abs().max().item() for a, b in zip(theirs, ours)) < (0.02 if precise else 0.004)
    assert all(set(state) == {'momentum_buffer'} for state in opt.state_dict()['state'].values())


def test_orthogonalized_is_the_polynomials_of_the_singular_values():
    """In float64: u p3(p2(p1(s))) v of the singular value decomposition, for wide, tall and square matrices."""
    torch.manual_seed(7)
    for shape in ((3, 12, 5), (3, 5, 12), (2, 8, 8)):
        x = torch.randn(shape, dtype=torch.float64)
        u, s, vh = torch.linalg.svd(x / x.norm(dim=(1, 2), keepdim=True), full_matrices=False)
        for a, b, c in optimizers.POLAR:
            s = a * s + b * s**3 + c * s**5
        assert torch.allclose(optimizers.orthogonalized(x, 1e-7), u @ torch.diag_embed(s) @ vh, atol=1e-9)


def test_polar_polynomials_are_the_best_of_their_intervals():
    """scipy's linear program finds the same polynomials, each on the interval the ones before it leave."""
    import numpy as np
    from scipy.optimize import linprog
    low, high = 0.01, 1.02
    for polynomial in optimizers.POLAR:
        s = np.linspace(low, high, 2000)
        powers = np.stack((s, s**3, s**5), axis=1)
        ones = np.ones((len(s), 1))
        # the least error e with -e <= 1 - p(s) <= e
        best = linprog([0, 0, 0, 1], A_ub=np.block([[powers, -ones], [-powers, -ones]]), b_ub=np.concatenate((ones, -ones)),
                       bounds=[(None, None)] * 3 + [(0, None)]).x
        assert polynomial == pytest.approx(best[:3], abs=2e-3)
        low, high = 1 - best[3], 1 + best[3]
    assert (low, high) == pytest.approx((0.724, 1.276), abs=1e-3)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_orthogonalized_matrices_of_rank_one_stay_small(dtype):
    """Their one singular value is 1 but for the rounding of the norm, where polynomials made for [0, 1] would explode."""
    torch.manual_seed(11)
    for _ in range(50):
        x = torch.outer(torch.randn(64), torch.randn(128))[None].to(dtype)
        assert 0.6 < optimizers.orthogonalized(x, 1e-7).float().norm() < 1.6


def test_kept_memory_is_asked_for_where_there_is_glibc(monkeypatch):
    calls = []
    monkeypatch.setattr(fast.ctypes, 'CDLL', lambda name: type('C', (), dict(mallopt=lambda self, *a: calls.append(a)))())
    monkeypatch.setattr(fast.platform, 'libc_ver', lambda: ('glibc', '2.36'))
    fast.keep_memory()
    assert calls == [(-4, 0), (-1, -1)]
    monkeypatch.setattr(fast.platform, 'libc_ver', lambda: ('', ''))
    fast.keep_memory()
    assert len(calls) == 2


@pytest.mark.parametrize('micro_steps', [1, 2])
def test_a_graphed_step_trains_the_same(micro_steps, monkeypatch):
    """What the CUDA graph records, run as it is: rates, batches and results that change while the tensors stay. Ten steps
    beside the plain ones, to the bit; the result of a step outlives the next."""
    monkeypatch.setattr(fast, 'aside', lambda step: step())

    def captured(step):
        kept_result = []

        def replay():
            result = step()
            if not kept_result:
                kept_result.extend(result)
            for old, new in zip(kept_result, result):   # a graph writes where it wrote when it was captured
                old.copy_(new)
            return kept_result
        return replay
    monkeypatch.setattr(fast, 'captured', captured)

    def run(graphed):
        torch.manual_seed(8)
        net = GPT(GPTConfig(**SMALL))
        made = muon_of(net)
        losses = []
        plain = step_of(net, made)
        step = fast.Graphed(plain, made)   # makes tensors of the rates, for both
        if not graphed:
            step = plain
        for i in range(10):
            made.set_rates(1 - i / 10)
            losses.append(step([(torch.randint(61, (2, 8)), torch.randint(61, (2, 8))) for _ in range(micro_steps)])[0])
        return [*losses, *net.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(run(False), run(True)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_a_cuda_graph_trains_the_same():
    """Dropout included, which follows the seed of each step."""
    def run(graphed):
        torch.manual_seed(9)
        net = GPT(GPTConfig(**SMALL, dropout=0.2)).cuda()
        made = muon_of(net)
        losses = []
        step = step_of(net, made)
        if graphed:
            step = fast.Graphed(step, made)
        for i in range(10):
            made.set_rates(1 - i / 10)
            idx = torch.randint(61, (2, 17), generator=torch.Generator().manual_seed(i)).cuda()
            torch.manual_seed(i)
            losses.append(step([(idx[:, :-1].contiguous(), idx[:, 1:].contiguous())])[0])
        return torch.stack(losses)
    assert torch.allclose(run(False), run(True), atol=1e-3)


def test_one_autocast_context_leaves_the_gradients():
    """Four micro-steps in bf16 under one autocast context, as train.py has them: the gradients of four contexts, to the bit."""
    torch.manual_seed(10)
    net = faster(GPT(GPTConfig(**SMALL)))
    batches = [torch.randint(61, (2, 17)) for _ in range(4)]

    def gradients(outer):
        net.zero_grad()
        with runtime.autocast('cpu', outer):
            for idx in batches:
                with runtime.autocast('cpu', 'bfloat16'):
                    loss = net(idx[:, :-1], idx[:, 1:])[1]
                with torch.autocast('cpu', enabled=False):
                    (loss / 4).backward()
        return [p.grad.clone() for p in net.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(gradients('float32'), gradients('bfloat16')))
