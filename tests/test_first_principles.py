"""first_principles.py: its gradients, AdamW and text beside model.py's, and what it refuses.

    pytest tests/test_first_principles.py
"""
import ast
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import first_principles as fp
from model import GPT, GPTConfig

LINE = 'To be, or not to be, that is the question.\n'
# Flags for a run of less than a second.
TINY = ['--n_layer=1', '--n_head=2', '--n_embd=32', '--block_size=32', '--batch_size=8']


def random_parameters(rng, n_layer, n_head, n_embd, block_size, vocab_size):
    """Return parameters of which none is 0, so that every gradient matters."""
    p = fp.parameters(n_layer, n_head, n_embd, block_size, vocab_size, seed=1)
    return {name: rng.normal(0, 0.5, array.shape) for name, array in p.items()}


def torch_model(p, n_layer, n_head):
    """Return model.py's GPT in float64 with the same parameters."""
    vocab_size, n_embd = p['transformer.wte.weight'].shape
    block_size = len(p['transformer.wpe.weight'])
    model = GPT(GPTConfig(block_size=block_size, vocab_size=vocab_size, n_layer=n_layer,
                          n_head=n_head, n_embd=n_embd)).double()
    assert list(p) == [name for name, _ in model.named_parameters()]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(p[name]))
    return model


# ---- beside model.py -----------------------------------------------------------------------------

@pytest.mark.parametrize('B, T, n_layer, n_head, n_embd, block_size, vocab_size', [
    (1, 1, 1, 1, 5, 3, 2),
    (3, 7, 2, 3, 12, 9, 11),
    (2, 5, 3, 5, 10, 5, 7),
])
def test_gradients(B, T, n_layer, n_head, n_embd, block_size, vocab_size):
    """The loss and every gradient are those of autograd in float64."""
    rng = np.random.default_rng(0)
    p = random_parameters(rng, n_layer, n_head, n_embd, block_size, vocab_size)
    idx = rng.integers(vocab_size, size=(B, T))
    targets = rng.integers(vocab_size, size=(B, T))
    loss, gradients = fp.loss_and_gradients(p, idx, targets, n_head)
    model = torch_model(p, n_layer, n_head)
    logits = model(torch.from_numpy(idx))[0]   # the model's own loss is in float32
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(targets).flatten())
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-10)
    assert gradients.keys() == p.keys()
    for name, parameter in model.named_parameters():
        reference = parameter.grad.numpy()
        assert gradients[name].shape == reference.shape
        error = np.abs(gradients[name] - reference).max()
        assert error <= 1e-10 * np.abs(reference).max(), name


def test_ten_steps_of_adamw():
    """Ten steps leave the parameters that ten steps of torch's AdamW leave."""
    rng = np.random.default_rng(0)
    p = random_parameters(rng, 1, 2, 8, 4, 5)
    model = torch_model(p, 1, 2)
    optimizer = torch.optim.AdamW(model.optimizer_groups(0.1), lr=1e-2, betas=(0.9, 0.95))
    state = {}
    for step in range(1, 11):
        gradients = {name: rng.normal(0, 1, array.shape) for name, array in p.items()}
        for name, parameter in model.named_parameters():
            parameter.grad = torch.from_numpy(gradients[name].copy())
        optimizer.step()
        fp.adamw(p, gradients, state, step, 1e-2, (0.9, 0.95), 0.1)
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(p[name], parameter.detach().numpy(), rtol=1e-10, atol=1e-12)


def test_first_weights():
    """The arrays are drawn with model.py's deviations, and a seed draws the same again."""
    p = fp.parameters(2, 4, 64, 32, 65, seed=3)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=65, n_layer=2, n_head=4, n_embd=64))
    for name, parameter in model.named_parameters():
        array = p[name]
        assert array.shape == tuple(parameter.shape)
        assert array.dtype == np.float64
        assert array.mean() == pytest.approx(parameter.mean().item(), abs=2e-3)
        assert array.std() == pytest.approx(parameter.std().item(), rel=0.1)
    again = fp.parameters(2, 4, 64, 32, 65, seed=3)
    assert all((p[name] == again[name]).all() for name in p)


def test_float32_stays_float32():
    """Training is in the precision of the arrays: no operation turns float32 into float64."""
    p = fp.parameters(2, 2, 8, 4, 5, seed=1)
    p = {name: array.astype(np.float32) for name, array in p.items()}
    idx = np.arange(8).reshape(2, 4) % 5
    state = {}
    loss, gradients = fp.loss_and_gradients(p, idx, idx, 2)
    fp.adamw(p, gradients, state, 1, 1e-2, (0.9, 0.99), 0.1)
    means = [array for pair in state.values() for array in pair]
    for array in [loss, *gradients.values(), *p.values(), *means]:
        assert array.dtype == np.float32


# ---- each operation by itself --------------------------------------------------------------------

WIDTH = 6
P = {
    'a.weight': np.random.default_rng(1).normal(size=(9, WIDTH)),
    'a.bias': np.random.default_rng(2).normal(size=9),
    'n.weight': np.random.default_rng(3).normal(size=WIDTH),
    'n.bias': np.random.default_rng(4).normal(size=WIDTH),
}


def central_difference(function, array, step=1e-5):
    """Return the gradient of a number, function(), by the entries of an array that it reads."""
    slopes = np.zeros_like(array)
    for place in np.ndindex(array.shape):
        middle = array[place]
        array[place] = middle + step
        above = function()
        array[place] = middle - step
        below = function()
        array[place] = middle
        slopes[place] = (above - below) / (2 * step)
    return slopes


@pytest.mark.parametrize('operation, shape, has_weights', [
    (lambda x: fp.linear(x, P, 'a'), (2, 3, WIDTH), True),
    (lambda x: fp.layer_norm(x, P, 'n'), (2, 3, WIDTH), True),
    (fp.softmax, (2, 3, 4), False),
    (lambda x: fp.attention(x, 2), (2, 5, 12), False),
    (fp.gelu, (2, 3, WIDTH), False),
], ids=['linear', 'layer_norm', 'softmax', 'attention', 'gelu'])
def test_operation(operation, shape, has_weights):
    """A backward pass agrees with central differences, for the input and for the weights.

    The loss is a sum of the outputs with random factors: these are its gradient dy.
    """
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape)
    y, backward = operation(x)
    dy = rng.normal(size=y.shape)
    g = {}
    dx = backward(dy, g) if has_weights else backward(dy)
    slopes = central_difference(lambda: (operation(x)[0] * dy).sum(), x)
    np.testing.assert_allclose(dx, slopes, rtol=1e-6, atol=1e-8)
    assert bool(g) == has_weights
    for name, gradient in g.items():
        slopes = central_difference(lambda: (operation(x)[0] * dy).sum(), P[name])
        np.testing.assert_allclose(gradient, slopes, rtol=1e-6, atol=1e-8)


def test_embedding():
    """Each row gets the gradient of all places that use it, on top of what the head has written."""
    rng = np.random.default_rng(0)
    p = {'transformer.wte.weight': rng.normal(size=(5, WIDTH)),
         'transformer.wpe.weight': rng.normal(size=(4, WIDTH))}
    idx = np.array([[1, 1, 3], [0, 1, 3]])
    x, backward = fp.embedding(idx, p)
    dx = rng.normal(size=x.shape)
    g = {'transformer.wte.weight': np.ones((5, WIDTH))}
    backward(dx, g)
    g['transformer.wte.weight'] -= 1
    for name, gradient in g.items():
        slopes = central_difference(lambda: (fp.embedding(idx, p)[0] * dx).sum(), p[name])
        np.testing.assert_allclose(gradient, slopes, rtol=1e-6, atol=1e-8)


def test_cross_entropy():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 3, 5))
    targets = rng.integers(5, size=(2, 3))
    _, backward = fp.cross_entropy(logits, targets)
    slopes = central_difference(lambda: fp.cross_entropy(logits, targets)[0], logits)
    np.testing.assert_allclose(backward(), slopes, rtol=1e-6, atol=1e-8)


# ---- the command ---------------------------------------------------------------------------------

def test_a_line_by_heart(script, folder):
    """A tiny net learns a line in less than a second, and writes it from the first character."""
    (folder / 'line.txt').write_text(LINE)
    command = ['first_principles.py', '--input=line.txt', *TINY, '--max_iters=200',
               f'--max_new_tokens={len(LINE) - 1}', '--temperature=0.1']
    result = script(*command)
    assert result.code == 0, result.err
    assert result.out == LINE + '\n'
    assert 'step 200: loss 0.' in result.err
    assert script(*command).out == result.out


def test_text_is_that_of_generate(script, folder):
    """At a low temperature the next tokens are those of model.generate, beyond block_size too."""
    rng = np.random.default_rng(0)
    p = random_parameters(rng, 2, 2, 8, 6, 7)
    knobs = fp.argparse.Namespace(block_size=6, n_head=2, temperature=1e-4)
    tokens = [3]
    for _ in range(15):
        tokens.append(fp.next_token(p, tokens, knobs, rng))
    model = torch_model(p, 2, 2)
    expected = model.generate(torch.tensor([[3]]), 15, temperature=0)
    assert tokens == expected[0].tolist()


def test_any_alphabet(script, folder):
    text = 'Füße, 東京 und 😀\n' * 9
    (folder / 'text.txt').write_text(text, encoding='utf-8')
    flags = ['--input=text.txt', '--max_iters=2', '--max_new_tokens=50']
    result = script('first_principles.py', *flags)
    assert result.code == 0, result.err
    assert len(result.out) == 52   # the first character, 50 new ones, and a line break
    assert set(result.out) <= set(text)


def test_it_stands_alone():
    """It imports NumPy and the standard library, and is short enough to be read at one sitting."""
    source = (ROOT / 'first_principles.py').read_text(encoding='utf-8')
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert imported - set(sys.stdlib_module_names) == {'numpy'}
    assert len(source.splitlines()) <= 300


@pytest.mark.parametrize('flags, words', [
    ([], ['--input', '--help']),
    (['--input=none.txt'], ['none.txt', 'No such file', 'UTF-8']),
    (['--input=.'], ['directory', 'UTF-8']),
    (['--input=latin.txt'], ['latin.txt', 'UTF-8']),
    (['--input=empty.txt'], ['empty.txt has 0 characters', 'block_size=64']),
    (['--input=line.txt'], [f'line.txt has {len(LINE)} characters', 'block_size=64']),
    (['--input=line.txt', f'--block_size={len(LINE)}'], ['more than']),
    (['--input=line.txt', '--n_layr=3'], ['n_layr', '--help']),
    (['--input=line.txt', '--n_layer=x'], ['n_layer', "'x'"]),
    (['--input=line.txt', '--n_head=0'], ['n_head=0', 'above 0']),
    (['--input=line.txt', '--learning_rate=nan'], ['learning_rate=nan', 'above 0']),
    (['--input=line.txt', '--n_embd=30'], ['n_embd=30', 'n_head=4', '--n_embd=64']),
    (['--input=line.txt', *TINY, '--learning_rate=1e30'], ['step 2', '--learning_rate=1e+29']),
])
def test_mistakes(refused, folder, flags, words):
    (folder / 'line.txt').write_text(LINE)
    (folder / 'empty.txt').write_text('')
    (folder / 'latin.txt').write_bytes('Füße\n'.encode('latin-1') * 50)
    refused('first_principles.py', *flags, words=words)
