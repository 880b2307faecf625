"""
Test what is for GPUs: on a processor where it can be shown, else only where there is a GPU.

pytest tests/test_gpu.py. Further tests with gpu or cuda in their names are in test_fast.py and
test_decoding.py; results/gpu/measure.py runs all of them on a GPU.
"""
import contextlib
import json
from pathlib import Path

import pytest
import torch
from test_fast import small
from test_model import rough, tokens

import model as gpt
from lib import decoding, fast, runtime

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason='needs a machine without a GPU')


# ---- a GPU that is not there -------------------------------------------------------------------

@without_gpu
@pytest.mark.parametrize('cuda, words', [
    (None, 'was built without CUDA'),
    ('13.0', 'no GPU was found, or no driver for one'),
])
def test_a_missing_gpu_is_explained(refused, folder, monkeypatch, cuda, words):
    """What is wrong, what is allowed, what to type."""
    monkeypatch.setattr(torch.version, 'cuda', cuda)
    refused('sample.py', '--device=cuda',
            words=['device=cuda: ', words, 'it has cpu', 'type --device=auto'])


# ---- a device that is only imagined ------------------------------------------------------------

@pytest.mark.parametrize('changes', [{}, dict(vocab_size=4096), dict(pos='rope', qk_norm=True)])
def test_a_loss_stays_on_its_device(changes):
    """On 'meta', where tensors have no numbers, no operation takes a tensor of the processor."""
    net = small(**changes).to('meta')
    idx = torch.zeros(2, 8, dtype=torch.long, device='meta')
    loss = fast.TrainingLoss(net)(idx, idx)
    loss.backward()
    assert loss.device.type == net.transformer.wte.weight.grad.device.type == 'meta'


@pytest.mark.parametrize('quantize', ['', 'int8'])
def test_a_sampled_token_stays_on_its_device(quantize):
    net = small().eval().to('meta')
    idx = torch.zeros(1, 5, dtype=torch.long, device='meta')
    decoding.narrow(net, 'bfloat16', quantize)
    cache = gpt.Cache(net.config, 'meta')
    with torch.no_grad():
        for T in (5, 1, 1):
            logits = net.next_logits(idx[:, :T], cache)
            cache.advance(T)
    assert logits.device.type == 'meta'
    assert logits.dtype == torch.float32


def test_a_step_is_tried_and_captured_on_one_stream(monkeypatch):
    """What torch makes for a stream at its first use must be there before the capture."""
    used = []

    class Stream:
        def __init__(self, device=None):
            self.device = device

        def wait_stream(self, other):
            pass

    @contextlib.contextmanager
    def stream(chosen):
        used.append(chosen)
        yield

    @contextlib.contextmanager
    def graph(recorded, stream=None):
        used.append(stream)
        yield

    default = Stream()
    monkeypatch.setattr(torch.cuda, 'Stream', Stream)
    monkeypatch.setattr(torch.cuda, 'stream', stream)
    monkeypatch.setattr(torch.cuda, 'graph', graph)
    monkeypatch.setattr(torch.cuda, 'CUDAGraph', lambda: None)
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 0)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda: default)
    runtime.side_stream.cache_clear()
    runtime.aside(lambda: None)
    runtime.aside(lambda: None)
    runtime.captured(lambda: None)
    runtime.side_stream.cache_clear()
    tried, again, captured = used
    assert tried is again is captured is not default


# ---- a GPU -------------------------------------------------------------------------------------

@needs_gpu
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_the_head_loss_on_a_gpu_is_torchs(dtype):
    torch.manual_seed(4)
    logits = torch.randn(300, 5000, device='cuda').to(dtype)
    targets = torch.randint(-1, 5000, (300,), device='cuda')
    found = []
    for loss_of in (lambda z: fast.CrossEntropy.apply(z.clone(), targets, 0.0),
                    lambda z: torch.nn.functional.cross_entropy(z.float(), targets,
                                                                ignore_index=-1)):
        z = logits.clone().requires_grad_()
        loss = loss_of(z)
        loss.backward()
        found.append((loss.detach(), z.grad.float()))
    ours, theirs = found
    assert torch.allclose(ours[0], theirs[0], rtol=1e-4)
    assert torch.allclose(ours[1], theirs[1], atol=1e-5, rtol=1e-2)


@needs_gpu
@pytest.mark.parametrize('quantize', ['', 'int8'])
def test_narrow_logits_on_a_gpu(quantize):
    """Compiled and not, they differ from fp32's by rounding alone."""
    net = rough(small(n_embd=96, n_head=3)).eval().cuda()
    idx = tokens(1, 20).cuda()

    def logits(run):
        """Return the logits after each token, read one by one: (20, V)."""
        cache = gpt.Cache(net.config, 'cuda')
        rows = []
        for i in range(20):
            rows.append(net.next_logits(idx[:, i:i + 1], cache, run if i else gpt.call))
            cache.advance(1)
        return torch.cat(rows)

    with torch.inference_mode():
        exact = logits(gpt.call)
        decoding.narrow(net, 'bfloat16', quantize)
        for run in (gpt.call, decoding.call_compiled):
            assert (logits(run) - exact).abs().max() < 0.05 * exact.abs().max()


@needs_gpu
def test_int8_is_sampled_on_a_gpu_from_a_compiled_graph():
    net = rough(small()).eval().cuda()
    decoding.narrow(net, 'bfloat16', 'int8')
    chance = gpt.chances([1], 30).cuda()
    step = decoding.GraphedSampling(compiled=True)
    found = list(net.stream(tokens(1, 5).cuda(), 30, gpt.Sampling(), chance, step=step))
    assert len(found) == 30


# ---- results/gpu/measure.py --------------------------------------------------------------------

SKIPPED = {'gpu_tests', 'gpt2_32', 'gpt2_64', 'fp16', 'out_of_memory'}


def test_measure_in_its_small_form(folder, process):
    """All steps, and none a second time."""
    done = process('results/gpu/measure.py', '--small', '--to=found')
    assert done.returncode == 0, done.stderr
    found = json.loads(Path('found/measured.json').read_text())
    assert len(found) == 21
    for name, outcome in found.items():
        expected = 'skipped' if name in SKIPPED else 'done'
        assert outcome['status'] == expected, (name, outcome)
        assert outcome['figures'], name
    assert {row['figure']: row['value'] for row in found['deterministic']['figures']}[
        'resumed: weights equal to the bit'] is True
    table = Path('found/measured.md').read_text()
    assert '| **speedrun** | done |' in table
    assert '| fp16 | skipped | needs a GPU |  |' in table
    assert '$ python train.py' in Path('found/measured.log').read_text()


def test_a_step_that_fails_is_written_down(folder, process):
    """The traceback is kept, the next step is made, and a mistyped step is refused."""
    done = process('results/gpu/measure.py', '--small', '--to=found', '--source=nowhere',
                   '--steps=evaluation,muon_,rates')
    assert done.returncode == 2
    assert 'steps=muon_' in done.stderr
    Path('data/gpu_small').mkdir(parents=True)
    Path('data/gpu_small/train.bin').touch()
    done = process('results/gpu/measure.py', '--small', '--to=found', '--steps=evaluation,rates')
    assert done.returncode == 0, done.stderr
    found = json.loads(Path('found/measured.json').read_text())
    assert found['evaluation']['status'] == 'failed, exit code 1'
    assert 'Traceback' in found['evaluation']['figures'][-1]['value']
    assert found['rates']['status'] == 'done'
