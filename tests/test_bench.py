"""bench.py and bench_step.py on very small models. pytest tests/test_bench.py"""
import json

import pytest

SMALL = ['--n_layer=1', '--n_head=1', '--n_embd=8', '--block_size=8', '--vocab_size=65']
SAMPLE = [
    'bench.py',
    'sample',
    '--net=0.8M',
    '--device=cpu',
    '--compile=False',
    '--tokens=4',
    '--runs=1',
    '--context=8',
]
TRAIN = ['bench.py', 'train', '--quick', '--net=0.8M', '--device=cpu']

# A model.py with nanoGPT's interface. nanoGPT itself is measured by hand:
# see results/speed.md and results/sampling/.
NANOGPT = '''
from dataclasses import dataclass
import torch
print("hello")

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        print("number of parameters")
        self.wte = torch.nn.Embedding(config.vocab_size, 8)

    def forward(self, x, y):
        print("here")
        return None, self.wte(x).square().mean()

    def generate(self, idx, n):
        return torch.cat((idx, idx[:, -1:]), 1)

    def configure_optimizers(self, decay, rate, betas, device):
        return torch.optim.AdamW(self.parameters(), lr=rate)
'''
# A model.py that ends its process while it is imported.
DIES = '''
import os, threading, time
threading.Timer(0.1, lambda: os._exit(9)).start()
time.sleep(5)
'''


@pytest.fixture
def nanogpt(folder):
    """Enter an empty folder with a model.py of nanoGPT's interface. Return its path."""
    (folder / 'model.py').write_text(NANOGPT)
    return folder


def errors_of(done):
    """Return the lines of error of a script that must have refused without a traceback."""
    assert done.returncode == 2, done.stderr
    assert 'Traceback' not in done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith('error: ')]


# ---- bench.py sample ---------------------------------------------------------------------------

@pytest.mark.parametrize('has_bf16', [True, False])
def test_precisions_that_the_processor_emulates_are_left_out(
        script, folder, monkeypatch, has_bf16):
    """bfloat16 is left out for both sides, and a note names the flag that measures it anyway."""
    monkeypatch.setattr('lib.runtime.cpu_has_bf16', lambda: has_bf16)
    result = script(*SAMPLE, '--batch=1', '--peer=transformers', '--json=-')
    found = json.loads(result.out)
    measured = [(row['who'], row['precision']) for row in found['rows']]
    if has_bf16:
        assert measured == [
            ('ours', 'float32'),
            ('ours', 'bfloat16'),
            ('ours', 'int8'),
            ('transformers', 'float32'),
            ('transformers', 'bfloat16'),
        ]
        assert found['left_out'] == []
        assert 'left out: bfloat16' not in result.err
    else:
        assert measured == [
            ('ours', 'float32'),
            ('ours', 'int8'),
            ('transformers', 'float32'),
        ]
        assert found['left_out'] == ['bfloat16']
        assert 'left out: bfloat16' in result.err
        assert '--dtype=bfloat16' in result.err


@pytest.mark.processor
def test_bench_sample_measures_what_was_typed(script, folder):
    precisions = '--dtype=float32,bfloat16,int8'
    result = script(*SAMPLE, '--batch=1,2', '--peer=transformers', precisions, '--json=-')
    found = json.loads(result.out)
    rows = found['rows']
    assert result.code == 0
    assert set(found) >= {'rows', 'machine', 'versions'}
    assert [(row['who'], row['precision'], row['batch']) for row in rows] == [
        ('ours', 'float32', 1),
        ('ours', 'bfloat16', 1),
        ('ours', 'int8', 1),
        ('transformers', 'float32', 1),
        ('transformers', 'bfloat16', 1),
        ('ours', 'float32', 2),
        ('ours', 'bfloat16', 2),
        ('ours', 'int8', 2),
    ]
    for row in rows:
        assert row['what'] == 'sample'
        assert row['context'] == 8
        assert row['tok_per_s'] == pytest.approx(row['batch'] / row['step_ms'] * 1e3)
    float32, bfloat16, int8 = [row['bytes_per_token'] for row in rows[:3]]
    assert float32 == pytest.approx(2 * bfloat16, rel=0.02)
    assert bfloat16 > 1.8 * int8


@pytest.mark.processor
def test_bench_sample_prints_a_table(script, folder):
    header, row = script(*SAMPLE, '--batch=1', '--dtype=float32').out.splitlines()
    assert row.split()[:4] == ['ours', 'float32', '1', '8']


def test_bench_sample_beside_nanogpt(script, nanogpt):
    flags = ['--batch=1', '--dtype=float32', f'--peer=nanogpt:{nanogpt}', '--json=-']
    found = json.loads(script(*SAMPLE, *flags).out)
    assert [row['who'] for row in found['rows']] == ['ours', 'nanogpt']


@pytest.mark.parametrize('flags, words', [
    (['nothing'], ["what='nothing'", 'sample', 'train']),
    (['--net=7B'], ["net='7B'", '124M']),
    (['--net=0.8M,10.65M'], ['0.8M,10.65M', '124M']),
    (['--net=0.8M', '--context=64'], ['block_size=64', '--context=24']),
    (['--net=0.8M', '--tokens=64'], ['tokens=64', '--tokens=32']),
    (['--tokens=0'], ['tokens']),
    (['--runs=-1'], ['runs']),
    (['--batch=0'], ['batch']),
    (['--batch=1,x'], ['batch']),
    (['--batch=1000000000000'], ['4,096']),
    (['--dtype=int4'], ['int4', 'int8']),
    (['--peer=vllm'], ['vllm', 'transformers']),
    (['--peer=nanogpt:'], ['nanogpt:', 'model.py']),
    (['--peer=nanogpt:nowhere'], ['nowhere', 'model.py']),
    (['--json=no/where.json'], ['no/where.json']),
    (['--bach=1'], ['--batch']),
])
def test_bench_sample_mistakes(refused, folder, flags, words):
    refused('bench.py', *flags, '--device=cpu', '--compile=False', words=words)


# ---- bench.py train ----------------------------------------------------------------------------

@pytest.mark.processor
def test_bench_train_reports_a_short_run(script, folder):
    """Check the JSON and the table, and every figure that is a quotient of two others."""
    result = script(*TRAIN, '--profile', '--dropout=0.1', '--json=-')
    assert result.code == 0, result.err
    assert '0.8M    ours' in result.err   # the table goes to stderr if stdout holds the JSON
    found = json.loads(result.out)
    row, = found['rows']
    assert row['what'] == 'train'
    assert row['who'] == 'ours'
    assert row['batch'] == 12
    assert row['context'] == 64
    assert row['dropout'] == 0.1
    assert row['tok_per_s'] == pytest.approx(12 * 64 / row['step_ms'] * 1e3)

    # A token costs 6 FLOPs for each weight of a matrix or a norm, and 12 C T in each layer for
    # the attention (PaLM, appendix B). Looking up a position costs nothing.
    C, T, n_layer = 128, 64, 4
    head = 65 * C
    matrices = n_layer * 12 * C**2
    norms = (2 * n_layer + 1) * C
    flops = 6 * (head + matrices + norms) + n_layer * 12 * C * T
    assert row['gflop_per_s'] == pytest.approx(row['tok_per_s'] * flops / 1e9)
    gemm_share = row['gflop_per_s'] / row['gemm_gflop_per_s']
    assert row['share_of_gemm'] == pytest.approx(gemm_share)
    assert 0 < gemm_share < 1
    assert found['machine']['gemm_gflop_per_s'] == row['gemm_gflop_per_s']

    loader_share = row['loader_ms'] / row['step_ms']
    assert row['loader_share'] == pytest.approx(loader_share)
    assert 0 < loader_share < 0.2
    assert 0.9 < sum(row['parts'].values()) <= 1
    assert min(row['parts'].values()) > 0
    assert sum(row['kinds'].values()) == pytest.approx(1)
    assert row['kinds']['products'] > 0
    assert row['kinds']['dropout'] > 0
    assert 100 < row['peak_memory_mb'] < 4000


def test_bench_train_beside_transformers(script, folder):
    flags = ['--optimizer=muon', '--dtype=float32', '--batch=2', '--context=16']
    found = json.loads(script(*TRAIN, *flags, '--peer=transformers', '--json=-').out)
    ours, theirs = found['rows']
    assert ours['who'] == 'ours'
    assert theirs['who'] == 'transformers'
    for row in (ours, theirs):
        assert row['precision'] == 'float32'
        assert row['batch'] == 2
        assert row['context'] == 16
        assert row['tok_per_s'] > 0
    assert 'transformers' in found['versions']


def test_bench_train_beside_a_peer_that_dies(process, folder):
    """The error is one line, and the other measured process is ended."""
    (folder / 'model.py').write_text(DIES)
    done = process(*TRAIN, f'--peer=nanogpt:{folder}')
    errors = errors_of(done)
    assert 'exit code 9' in errors[0]


@pytest.mark.parametrize('flags, words', [
    (['--net=7B'], ["net='7B'", '124M']),
    (['--net=0.8M', '--dtype=float16'], ['needs a GPU', 'bfloat16']),
    (['--net=0.8M', '--context=x'], ['context']),
    (['--optimizer=sgd'], ['sgd', 'muon']),
    (['--dtype=int8'], ['int8', 'float32, bfloat16']),
    (['--dropout=2'], ['dropout=2', 'below 1']),
    (['--batch=0'], ['batch']),
    (['--seed=-1'], ['seed=-1']),
    (['--peer=nanogpt:nowhere'], ['nowhere', 'model.py']),
    (['--peer_dropout=x'], ["peer_dropout='x'", 'below 1']),
    (['--plot=x.png'], ['--growth']),
    (['--growth', '--plot=no/x.png'], ['no/x.png']),
    (['--growth', '--plot=d.png'], ['d.png']),
    (['--growth', '--peer=transformers'], ['growth', 'peer']),
])
def test_bench_train_mistakes(refused, folder, flags, words):
    (folder / 'd.png').mkdir()
    refused('bench.py', 'train', *flags, '--device=cpu', words=words)


def test_growth_is_drawn(folder):
    from lib import plots
    rows = []
    for kind in ('context', 'batch', 'n_layer'):
        for i in (1, 2):
            row = dict(context=64, batch=2, n_layer=3, step_ms=5.0 * i, peak_memory_mb=9.0)
            row['growth'] = kind
            row[kind] = i
            rows.append(row)
    plots.growth(rows, 'growth.png')
    assert (folder / 'growth.png').stat().st_size > 5000


# ---- bench_step.py -----------------------------------------------------------------------------

def test_bench_step_beside_nanogpt(process, nanogpt):
    flags = ['--vocab_size=9', '--block_size=4', '--device=cpu']
    done = process('bench_step.py', f'--who=nanogpt:{nanogpt}', *flags, input='2\n')
    first, second = map(json.loads, done.stdout.splitlines())
    assert first['precision'] == 'float32'
    assert second['steps'] == 2
    assert second['seconds'] > 0


def test_bench_step_refuses_a_model_that_is_not_nanogpts(process, folder):
    done = process('bench_step.py', f'--who=nanogpt:{folder}', '--device=cpu')
    errors = errors_of(done)
    assert "its model.py is not nanoGPT's" in errors[0]


@pytest.mark.parametrize('flags, stdin, words', [
    (['--n_head=5'], '', ['n_head=5']),
    (['--n_layer=-1'], '', ['n_layer=-1']),
    (['--dropout=2'], '', ['dropout=2']),
    (['--batch_size=0'], '', ['batch_size=0']),
    (['--seed=-1'], '', ['seed=-1']),
    (['--who=foo'], '', ['foo', 'transformers']),
    (['--who=nanogpt:'], '', ['nanogpt:PATH']),
    (['--optimizer=foo'], '', ['foo', 'muon']),
    (SMALL, 'abc\n', ['abc', 'profile']),
    (SMALL, '0\n', ['0', 'profile']),
])
def test_bench_step_mistakes(process, folder, flags, stdin, words):
    error, = errors_of(process('bench_step.py', *flags, '--device=cpu', input=stdin))
    for word in words:
        assert word in error
