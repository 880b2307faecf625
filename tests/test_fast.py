"""fast.py and optimizers.py against the formula or torch's own. pytest tests/test_fast.py"""
import copy
import math
import types
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import model as gpt
from lib import fast, optimizers, runtime
from model import GPT, GPTConfig

pytestmark = pytest.mark.processor

SMALL = dict(block_size=32, vocab_size=61, n_layer=2, n_head=3, n_embd=48)
CLASSIC = ((3.4445, -4.775, 2.0315),) * 5   # torch.optim.Muon's polynomial, five times


def small(**changes):
    """Return a new GPT with SMALL's sizes and changed fields."""
    return GPT(GPTConfig(**{**SMALL, **changes}))


def small_and_fast(**changes):
    """Return such a GPT that uses every way in lib/fast.py."""
    net = small(**changes)
    fast.use_on_processor(net)
    return net


def loss_of(net, idx, targets=None):
    """Return the loss of a net; the targets are idx itself unless they are given."""
    _, loss = net(idx, idx if targets is None else targets)
    return loss


def step_of(net, made, training_loss=None):
    """Return train.py's step in float32 on a net's device, without clipping."""
    if training_loss is None:
        training_loss = fast.TrainingLoss(net, lean=False)
    device = next(net.parameters()).device.type
    scaler = torch.amp.GradScaler(device, enabled=False)
    clip = 0.0
    return optimizers.TrainingStep(net, training_loss, made, scaler, clip, device, 'float32')


def muon_of(net):
    """Return Muon and AdamW with train.py's kind of settings."""
    rates = (1e-3, 0.01)
    return optimizers.Optimizers(net, 'muon', rates, 0.1, (0.9, 0.95))


def operations_behind(y):
    """Return the names of the operations in the graph of a tensor."""
    names = set()
    nodes = [y.grad_fn]
    while nodes:
        node = nodes.pop()
        names.add(type(node).__name__)
        nodes += [parent for parent, _ in node.next_functions if parent]
    return names


# ---- attention ---------------------------------------------------------------------------------

@pytest.fixture
def blocks(monkeypatch):
    """Use attention by blocks on every processor, even where torch's own is faster."""
    monkeypatch.setattr(fast, 'blocks_pay', lambda dtype, dropout: True)


def random_attention(T):
    """Return q, k, v (2, 3, T, 8), which need gradients, and a gradient of y of that shape."""
    q = torch.randn(2, 3, T, 8, requires_grad=True)
    k = torch.randn(2, 3, T, 8, requires_grad=True)
    v = torch.randn(2, 3, T, 8, requires_grad=True)
    upstream = torch.randn(2, 3, T, 8)
    return q, k, v, upstream


# Attention weights are computed again in the backward pass if T is above KEEP_WEIGHTS, 512.
@pytest.mark.usefixtures('blocks')
@pytest.mark.parametrize('T', [1, 3, 64, 128, 129, 300, 600, 1100])
def test_attention_by_blocks_is_the_formula(T):
    """Compare values and gradients with those of the explicit formula, to 1e-5."""
    def run(attend):
        torch.manual_seed(T)
        q, k, v, upstream = random_attention(T)
        y = attend(q, k, v)
        y.backward(upstream)
        return y.detach(), q.grad, k.grad, v.grad

    for ours, formula in zip(run(fast.attend_in_training), run(gpt.explicit_attention)):
        assert torch.allclose(ours, formula, atol=1e-5)


@pytest.mark.parametrize('T', [3, 140, 600, 1100])
def test_attention_with_dropout_is_the_formula_with_the_same_mask(T, monkeypatch):
    """Compare values and gradients to 1e-5; the mask drops the share it is asked for."""
    masks = []
    draw = fast.kept

    def kept(*args):
        mask = draw(*args)
        masks.append(mask)
        return mask

    monkeypatch.setattr(fast, 'kept', kept)
    torch.manual_seed(0)
    q, k, v, upstream = random_attention(T)
    y = fast.attend_in_training(q, k, v, 0.3)
    gradients = torch.autograd.grad(y, (q, k, v), upstream)

    whole_mask = torch.ones(6, T, T)
    rows_of_a_block = max(64, min(256, T // 4))
    starts = range(0, T, rows_of_a_block)
    for start, mask in zip(starts, masks):   # the backward pass of long rows draws masks again
        whole_mask[:, start:start + mask.size(1), :mask.size(2)] = mask
    weights = gpt.attention_weights(q, k) * whole_mask.view(2, 3, T, T) / 0.7
    formula = weights @ v
    assert torch.allclose(y, formula, atol=1e-5)
    expected = torch.autograd.grad(formula, (q, k, v), upstream)
    for ours, theirs in zip(gradients, expected):
        assert torch.allclose(ours, theirs, atol=1e-5)
    if T > 100:
        kept_weights = sum(mask.sum() for mask in masks)
        all_weights = sum(mask.numel() for mask in masks)
        assert abs(kept_weights / all_weights - 0.7) < 0.005


@pytest.mark.usefixtures('blocks')
@pytest.mark.parametrize('dropout', [0.0, 0.2])
def test_long_attention_saves_nothing_quadratic(dropout):
    """Above KEEP_WEIGHTS tokens, only q, k and v are saved for the backward pass.

    Up to KEEP_WEIGHTS tokens, weights and masks are saved too.
    """
    def largest_saved(T):
        sizes = []

        def note(tensor):
            sizes.append(tensor.numel())
            return tensor

        q, k, v = (torch.randn(1, 2, T, 8, requires_grad=True) for _ in range(3))
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            fast.attend_in_training(q, k, v, dropout)
        return max(sizes)

    short = fast.KEEP_WEIGHTS
    long = fast.KEEP_WEIGHTS + 88
    assert largest_saved(long) == 2 * long * 8
    assert largest_saved(short) > 2 * short * 8


@pytest.mark.parametrize('avx512, dtype, dropout, by_blocks', [
    (True, torch.bfloat16, 0.0, True),
    (True, torch.float32, 0.0, True),
    (False, torch.float32, 0.0, False),
    (False, torch.float32, 0.2, True),
])
def test_attention_is_chosen_by_the_processor(monkeypatch, avx512, dtype, dropout, by_blocks):
    """Each kind of processor uses what was faster there. Both ways compute the formula."""
    monkeypatch.setattr(fast, 'cpu_has_avx512', lambda: avx512)
    q, k, v = (torch.randn(2, 3, 16, 8, dtype=dtype, requires_grad=True) for _ in range(3))
    y = fast.attend_in_training(q, k, v, dropout)
    assert ('BlockAttentionBackward' in operations_behind(y)) == by_blocks
    if not dropout:
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        assert torch.allclose(y, gpt.explicit_attention(q, k, v), atol=tolerance)


@pytest.mark.usefixtures('blocks')
def test_attention_by_blocks_is_used_in_training():
    logits, _ = small_and_fast()(torch.zeros(1, 8, dtype=torch.long))
    assert 'BlockAttentionBackward' in operations_behind(logits)


@pytest.mark.usefixtures('blocks')
def test_a_faster_model_generates():
    with torch.no_grad():
        idx = small_and_fast().generate(torch.zeros(1, 1, dtype=torch.long), 3)
    assert idx.shape == (1, 4)


@pytest.mark.usefixtures('blocks')
def test_flash_false_still_means_the_explicit_formula():
    net = small_and_fast(flash=False)
    assert net.transformer.h[0].attn.attention is gpt.explicit_attention


# ---- activation and dropout --------------------------------------------------------------------

@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_gelu_by_a_sigmoid_is_the_tanh_form(dtype, tolerance):
    """Compare value and gradient with torch's, from where GELU is 0 to where it is x."""
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    extremes = torch.tensor([-1e5, -0.0, 1e5], dtype=torch.float64)
    x = torch.cat((x, extremes)).to(dtype)
    ours = x.clone().requires_grad_()
    theirs = x.clone().requires_grad_()
    y = fast.SigmoidGELU.apply(ours)
    expected = F.gelu(theirs, approximate='tanh')
    assert torch.allclose(y, expected, rtol=tolerance, atol=tolerance)
    generator = torch.Generator().manual_seed(0)
    upstream = torch.randn(x.shape, dtype=dtype, generator=generator)
    y.backward(upstream)
    expected.backward(upstream)
    assert torch.allclose(ours.grad, theirs.grad, rtol=tolerance, atol=3 * tolerance)


def test_gelu_in_bf16_is_torchs():
    """Both round once, at the end."""
    x = torch.randn(1000).bfloat16()
    assert torch.equal(fast.gelu(x), F.gelu(x, approximate='tanh'))


@pytest.mark.parametrize('name', gpt.ACTIVATIONS)
def test_gelu_alone_is_exchanged(name):
    mlp = small_and_fast(activation=name).transformer.h[0].mlp
    expected = fast.gelu if name == 'gelu' else gpt.ACTIVATIONS[name]
    assert mlp.activation is expected


@pytest.mark.parametrize('p', [0.0, 0.1, 0.5, 0.999])
def test_dropout(p):
    """Check the share kept, to five standard errors, the scale, the gradient and the seed."""
    layer = fast.Dropout(p)
    x = torch.ones(100, 999, requires_grad=True)
    torch.manual_seed(1)
    y = layer(x)
    kept = y > 0
    share = kept.float().mean().item()
    standard_error = math.sqrt(p * (1 - p) / x.numel())
    assert abs(share - (1 - p)) <= 5 * standard_error
    assert torch.allclose(y[kept], torch.tensor(1 / (1 - p)))

    both_kept = kept[:, 1:] & kept[:, :-1]   # neighbours are drawn independently
    assert abs(both_kept.float().mean().item() - (1 - p) ** 2) < 0.01

    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    torch.manual_seed(1)
    assert torch.equal(layer(x), y)
    assert torch.equal(layer.eval()(x), x)


def test_dropout_next_to_one_drops():
    assert fast.kept((1_000_003,), 0.999999, torch.float32).mean() < 1e-4


# ---- the loss ----------------------------------------------------------------------------------

@pytest.mark.parametrize('smoothing', [0.0, 0.2])
def test_cross_entropy_is_torchs(smoothing, monkeypatch):
    """Compare loss and gradient, with ignored targets, over several chunks of rows."""
    V = 6000
    monkeypatch.setattr(fast, 'ROW_ELEMENTS', dict(cpu=8 * V))
    torch.manual_seed(2)
    logits = 3 * torch.randn(50, V)
    targets = torch.randint(V, (50,))
    targets[::7] = -1
    theirs = logits.clone().requires_grad_()
    ours = logits.clone().requires_grad_()
    expected = F.cross_entropy(theirs, targets, ignore_index=-1, label_smoothing=smoothing)
    loss = fast.CrossEntropy.apply(ours * 1.0, targets, smoothing)   # overwrites its input
    assert abs(loss - expected) < 1e-5
    (3 * expected).backward()
    (3 * loss).backward()
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-7)


def test_targets_that_are_all_ignored_give_no_gradient():
    logits = torch.randn(3, 5000, requires_grad=True)
    fast.CrossEntropy.apply(logits * 1.0, torch.full((3,), -1), 0.1).backward()
    assert torch.equal(logits.grad, torch.zeros(3, 5000))


def test_the_lean_loss_trains_the_same():
    """Compare loss and every gradient with autograd's, for a vocabulary of 5,000."""
    def run(lean):
        torch.manual_seed(3)
        net = small(vocab_size=5000)
        idx = torch.randint(5000, (3, 32))
        loss = fast.TrainingLoss(net, lean)(idx, idx.roll(-1, 1))
        loss.backward()
        assert ('CrossEntropyBackward' in operations_behind(loss)) == lean
        return loss, [p.grad for p in net.parameters()]

    loss, gradients = run(lean=False)
    lean_loss, lean_gradients = run(lean=True)
    assert abs(loss - lean_loss) < 1e-5
    for gradient, lean_gradient in zip(gradients, lean_gradients):
        assert torch.allclose(gradient, lean_gradient, atol=1e-6)


# ---- all ways together -------------------------------------------------------------------------

def unstacked(optimizer):
    """Give each matrix of Muon a group of its own, so that no matrices are stacked."""
    for group in optimizer.param_groups:
        singles = [dict(group, params=[p]) for p in group['params']]
    optimizer.param_groups = singles


def test_no_gradient_is_held_after_a_step():
    """Muon's matrices have views of the gradients, which would keep all of them in memory."""
    net = small()
    made = muon_of(net)
    idx = torch.randint(net.config.vocab_size, (2, 8))
    step_of(net, made)([(idx, idx)])
    matrices = [part.matrix for part in made.parts]
    assert matrices and all(p.grad is None for p in [*net.parameters(), *matrices])


@pytest.mark.parametrize('change', ['attention', 'dropout module', 'loss', 'muon', 'all'])
def test_the_loss_curve_stays(change):
    """Compare the losses of twenty steps in float32 with and without a way, to 1e-5.

    Dropout is 0, because a faster dropout draws other masks.
    """
    def curve(changes):
        torch.manual_seed(4)
        net = small(vocab_size=4096, block_size=64)
        if 'all' in changes:
            fast.use_on_processor(net)
        if 'attention' in changes:
            net.set_attention(fast.attend_in_training)
        if 'dropout module' in changes:
            net.set_dropout(fast.Dropout)
        made = muon_of(net)
        muon = made.all[1]
        muon.precise = True
        if not changes & {'muon', 'all'}:
            unstacked(muon)
        lean = bool(changes & {'loss', 'all'})
        step = step_of(net, made, fast.TrainingLoss(net, lean=lean))
        generator = torch.Generator().manual_seed(5)
        losses = []
        for _ in range(20):
            idx = torch.randint(40, (2, 65), generator=generator)
            loss = step([(idx[:, :-1], idx[:, 1:])])[0]
            losses.append(loss.item())
        return losses

    slow = curve(set())
    quick = curve({change})
    assert slow[-1] < slow[0] - 1
    assert quick == pytest.approx(slow, abs=1e-5, rel=0)


def test_a_copy_of_a_faster_model_computes_with_its_own_weights():
    torch.manual_seed(5)
    net = small_and_fast()
    twin = copy.deepcopy(net)
    idx = torch.randint(61, (1, 9))
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert abs(loss_of(twin, idx) - math.log(61)) < 1e-6
    assert abs(loss_of(net, idx) - math.log(61)) > 1e-6


def test_one_autocast_context_leaves_the_gradients():
    """Run four micro-steps under one autocast context, as train.py does, and under four.

    The gradients in bfloat16 are equal to the bit.
    """
    torch.manual_seed(10)
    net = small_and_fast()
    batches = [torch.randint(61, (2, 17)) for _ in range(4)]

    def gradients(outer):
        net.zero_grad()
        with runtime.autocast('cpu', outer):
            for idx in batches:
                with runtime.autocast('cpu', 'bfloat16'):
                    loss = loss_of(net, idx[:, :-1], idx[:, 1:])
                with torch.autocast('cpu', enabled=False):
                    (loss / 4).backward()
        return [p.grad.clone() for p in net.parameters()]

    for four_contexts, one_context in zip(gradients('float32'), gradients('bfloat16')):
        assert torch.equal(four_contexts, one_context)


def test_memory_is_kept_only_where_the_library_is_glibc(monkeypatch):
    """mallopt's numbers have another meaning in other C libraries."""
    calls = []

    def mallopt(option, value):
        calls.append((option, value))

    monkeypatch.setattr(fast.ctypes, 'CDLL', lambda name: types.SimpleNamespace(mallopt=mallopt))
    monkeypatch.setattr(fast.platform, 'libc_ver', lambda: ('', ''))
    fast.keep_memory()
    assert calls == []
    monkeypatch.setattr(fast.platform, 'libc_ver', lambda: ('glibc', '2.36'))
    fast.keep_memory()
    no_mmap = (-4, 0)    # M_MMAP_MAX
    no_trim = (-1, -1)   # M_TRIM_THRESHOLD
    assert calls == [no_mmap, no_trim]


# ---- Muon --------------------------------------------------------------------------------------

@pytest.mark.parametrize('precise', [False, True])
def test_muon_is_torchs_matrix_by_matrix(precise, monkeypatch):
    """Compare three steps of torch.optim.Muon with its own polynomial, on three shapes.

    torch multiplies in bfloat16. This rounds each of 15 products to 2^-9 of its value.
    """
    monkeypatch.setattr(optimizers, 'POLAR', CLASSIC)
    shapes = [(8, 8), (32, 8), (8, 32), (8, 8), (8, 32)]

    def run(kind, **settings):
        torch.manual_seed(6)
        params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
        optimizer = kind(params, lr=0.1, weight_decay=0.2, **settings)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape)
            optimizer.step()
        return params, optimizer

    theirs, _ = run(torch.optim.Muon)
    ours, optimizer = run(optimizers.Muon, precise=precise)
    tolerance = 0.02 if precise else 0.004
    for a, b in zip(theirs, ours):
        assert (a - b).abs().max() < tolerance
    for state in optimizer.state_dict()['state'].values():
        assert set(state) == {'momentum_buffer'}


@pytest.mark.parametrize('shape', [(3, 12, 5), (3, 5, 12), (2, 8, 8)])
def test_orthogonalized_is_the_polynomials_of_the_singular_values(shape):
    """In float64, the result is u p3(p2(p1(s))) v of the singular value decomposition u s v."""
    torch.manual_seed(7)
    x = torch.randn(shape, dtype=torch.float64)
    scaled = x / x.norm(dim=(1, 2), keepdim=True)
    u, s, vh = torch.linalg.svd(scaled, full_matrices=False)
    for a, b, c in optimizers.POLAR:
        s = a * s + b * s**3 + c * s**5
    expected = u @ torch.diag_embed(s) @ vh
    assert torch.allclose(optimizers.orthogonalized(x, 1e-7), expected, atol=1e-9)


def test_polar_polynomials_are_the_best_of_their_intervals():
    """scipy's linear program finds the same polynomials.

    Each one is the best on the interval that the polynomials before it leave.
    """
    import numpy as np
    from scipy.optimize import linprog
    low = 0.01
    high = 1.02
    for polynomial in optimizers.POLAR:
        s = np.linspace(low, high, 2000)
        powers = np.stack((s, s**3, s**5), axis=1)
        ones = np.ones((len(s), 1))
        # Minimize the error e with -e <= 1 - p(s) <= e for all s; p has three coefficients.
        unbounded = (None, None)
        best = linprog(
            [0, 0, 0, 1],
            A_ub=np.block([[powers, -ones], [-powers, -ones]]),
            b_ub=np.concatenate((ones, -ones)),
            bounds=[unbounded, unbounded, unbounded, (0, None)],
        ).x
        error = best[3]
        assert polynomial == pytest.approx(best[:3], abs=2e-3)
        low = 1 - error
        high = 1 + error
    assert (low, high) == pytest.approx((0.724, 1.276), abs=1e-3)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_orthogonalized_matrices_of_rank_one_stay_small(dtype):
    """Rounding the norm can raise their one singular value above 1.

    Polynomials made for the interval [0, 1] would then explode.
    """
    torch.manual_seed(11)
    for _ in range(50):
        x = torch.outer(torch.randn(64), torch.randn(128))[None].to(dtype)
        assert 0.6 < optimizers.orthogonalized(x, 1e-7).float().norm() < 1.6


# Rank by rank: a few updates with gradients that all ranks draw alike, beside the same updates made
# by one process before the ranks have found each other.
MUON_ON_RANKS = """
import torch
from lib import optimizers, runtime
counted = []
orthogonalized = optimizers.orthogonalized

def count(x, eps):
    counted.append(x.size(0))
    return orthogonalized(x, eps)

optimizers.orthogonalized = count

def updated():
    counted.clear()
    rng = torch.Generator().manual_seed(5)
    shapes = [(12, 12)] * 5 + [(48, 12)] * 2 + [(12, 48)]
    params = [torch.nn.Parameter(torch.randn(shape, generator=rng)) for shape in shapes]
    muon = optimizers.Muon(params, precise=True, lr=0.02, weight_decay=0.1)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn(p.shape, generator=rng)
        muon.step()
    return params

alone = updated()
assert counted == [5, 2, 1] * 3, counted
rank, ranks, _ = runtime.join_ranks('gloo', 'cpu')
together = updated()
shares = {0: [3, 1, 1], 1: [2, 1, 0]}
assert counted == shares[rank] * 3, counted
for one, other in zip(alone, together, strict=True):
    assert torch.equal(one, other)
runtime.leave(0)
"""


def test_ranks_share_muons_matrices(folder, forked):
    """Two ranks orthogonalize about half of the matrices each, and get what one process gets."""
    Path('ranks.py').write_text(MUON_ON_RANKS)
    forked([2, folder / 'ranks.py'])


# ---- CUDA graphs -------------------------------------------------------------------------------

def capture_like_cuda(step):
    """Return a function that calls step() and copies each result into the first, as graphs do."""
    same_tensors = []

    def replay():
        result = step()
        if not same_tensors:
            same_tensors.extend(result)
        for old, new in zip(same_tensors, result):
            old.copy_(new)
        return same_tensors
    return replay


@pytest.mark.parametrize('micro_steps', [1, 2])
def test_a_graphed_step_trains_the_same(micro_steps, monkeypatch):
    """Compare ten steps with and without GraphedTraining, to the bit, without a GPU.

    Rates and batches change while their tensors stay the same ones. The result of a step must not
    change with the next step.
    """
    monkeypatch.setattr(fast, 'aside', lambda step: step())
    monkeypatch.setattr(fast, 'captured', capture_like_cuda)

    def batch():
        return torch.randint(61, (2, 8)), torch.randint(61, (2, 8))

    def run(graphed):
        torch.manual_seed(8)
        net = small()
        made = muon_of(net)
        plain = step_of(net, made)
        # turns the rates into tensors, for both steps
        with_graph = fast.GraphedTraining(plain, made)
        step = with_graph if graphed else plain
        losses = []
        for i in range(10):
            made.set_rates(1 - i / 10)
            loss = step([batch() for _ in range(micro_steps)])[0]
            losses.append(loss)
        return [*losses, *net.parameters()]

    for plain, graphed in zip(run(graphed=False), run(graphed=True)):
        assert torch.equal(plain, graphed)


def test_a_graphed_step_of_a_net_without_vectors():
    """Without norms and biases one of AdamW's parameter groups is empty."""
    net = small(norm='none', bias=False)
    made = muon_of(net)
    step = fast.GraphedTraining(step_of(net, made), made)
    for group in made.all[0].param_groups:
        assert isinstance(group['lr'], torch.Tensor)
    idx = torch.randint(net.config.vocab_size, (2, 8))
    loss, _ = step.step([(idx, idx)])
    assert loss.isfinite()


def test_the_loss_of_fp16_logits_is_torchs():
    """CrossEntropy's gradient would be rounded to fp16 before the scaler has scaled it."""
    torch.manual_seed(3)
    net = small(vocab_size=4096)
    idx = torch.randint(4096, (2, 8))
    lean_loss = fast.TrainingLoss(net)
    gradients = []
    for loss_of in (lean_loss, lambda x, y: net(x, y)[1]):
        with torch.autocast('cpu', dtype=torch.float16):
            loss = loss_of(idx, idx)
        (loss / 100_000).backward()   # most probabilities are below fp16's smallest number now
        gradients.append(net.transformer.wte.weight.grad.clone())
        net.zero_grad(set_to_none=True)
    assert torch.equal(*gradients)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_a_cuda_graph_trains_the_same():
    """Dropout in a graph follows the seed of each step."""
    def run(graphed):
        torch.manual_seed(9)
        net = small(dropout=0.2).cuda()
        made = muon_of(net)
        step = step_of(net, made)
        if graphed:
            step = fast.GraphedTraining(step, made)
        losses = []
        for i in range(10):
            made.set_rates(1 - i / 10)
            generator = torch.Generator().manual_seed(i)
            idx = torch.randint(61, (2, 17), generator=generator).cuda()
            torch.manual_seed(i)
            x = idx[:, :-1].contiguous()
            y = idx[:, 1:].contiguous()
            losses.append(step([(x, y)])[0])
        return torch.stack(losses)

    assert torch.allclose(run(graphed=False), run(graphed=True), atol=1e-3)
