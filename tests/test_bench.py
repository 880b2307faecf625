"""bench.py and bench_step.py, on shapes that take no time. pytest tests/test_bench.py"""
import json
import sys

import pytest

SMALL = ['--n_layer=1', '--n_head=1', '--n_embd=8', '--block_size=8', '--vocab_size=65']
BENCH = ['bench.py', 'sample', '--net=0.8M', '--device=cpu', '--compile=False', '--tokens=4', '--runs=1', '--context=8']


@pytest.mark.parametrize('has_bf16', [True, False])
def test_bench_sample_measures_what_pays(script, folder, monkeypatch, has_bf16):
    """Precisions that the processor emulates are left out, of ours and of transformers', and named, unless typed."""
    monkeypatch.setattr('lib.runtime.cpu_has_bf16', lambda: has_bf16)
    result = script(*BENCH, '--batch=1', '--peer=transformers', '--json=-')
    found = json.loads(result.out)
    half = ['bfloat16'] if has_bf16 else []
    assert [(row['who'], row['precision']) for row in found['rows']] == [
        *(('ours', precision) for precision in ('float32', *half, 'int8')),
        *(('transformers', precision) for precision in ('float32', *half))]
    assert found['left_out'] == ([] if has_bf16 else ['bfloat16'])
    assert ('left out: bfloat16' in result.err and '--dtype=bfloat16' in result.err) != has_bf16


@pytest.mark.processor
def test_bench(script, folder):
    result = script(*BENCH, '--batch=1,2', '--peer=transformers', '--dtype=float32,bfloat16,int8', '--json=-')
    found = json.loads(result.out)
    assert result.code == 0 and set(found) >= {'rows', 'machine', 'versions'}
    assert [(row['who'], row['precision'], row['batch']) for row in found['rows']] == [
        *(('ours', precision, 1) for precision in ('float32', 'bfloat16', 'int8')),
        *(('transformers', precision, 1) for precision in ('float32', 'bfloat16')),
        *(('ours', precision, 2) for precision in ('float32', 'bfloat16', 'int8'))]
    for row in found['rows']:
        assert row['what'] == 'sample' and row['context'] == 8 and row['tok_per_s'] == pytest.approx(row['batch'] / row['step_ms'] * 1e3)
    read = [row['bytes_per_token'] for row in found['rows'][:3]]
    assert read[0] == pytest.approx(2 * read[1], rel=0.02) and read[1] > 1.8 * read[2]
    table = script(*BENCH, '--batch=1', '--dtype=float32').out.splitlines()
    assert len(table) == 2 and table[1].split()[:4] == ['ours', 'float32', '1', '8']


def test_bench_beside_nanogpt(script, folder):
    """Any model.py of that interface; nanoGPT's own is measured by hand (results/sampling)."""
    (folder / 'model.py').write_text(f'import sys\nsys.path.insert(0, {str(sys.path[0])!r})\nfrom dataclasses import dataclass\n'
                                     'import torch\n@dataclass\nclass GPTConfig:\n    block_size: int\n    vocab_size: int\n'
                                     '    n_layer: int\n    n_head: int\n    n_embd: int\n    dropout: float\n    bias: bool\n'
                                     'class GPT(torch.nn.Module):\n    def __init__(self, config):\n        super().__init__()\n'
                                     '        print("number of parameters")\n'
                                     '    def generate(self, idx, n):\n        return torch.cat((idx, idx[:, -1:]), 1)\n')
    found = json.loads(script(*BENCH, '--batch=1', '--dtype=float32', f'--peer=nanogpt:{folder}', '--json=-').out)
    assert [row['who'] for row in found['rows']] == ['ours', 'nanogpt']


@pytest.mark.parametrize('flags, words', [
    (['nothing'], ["what='nothing'", 'sample', 'train']), (['--net=7B'], ["net='7B'", '124M']), (['--batch=0'], ['batch']),
    (['--batch=1,x'], ['batch']), (['--dtype=int4'], ['int4', 'int8']), (['--tokens=0'], ['tokens']), (['--runs=-1'], ['runs']),
    (['--net=0.8M', '--context=64'], ['block_size=64', '--context=24']), (['--peer=vllm'], ['vllm', 'transformers']),
    (['--peer=nanogpt:nowhere'], ['nowhere', 'model.py']), (['--peer=nanogpt:'], ['nanogpt:', 'model.py']),
    (['--net=0.8M,10.65M'], ['0.8M,10.65M', '124M']), (['--net=0.8M', '--tokens=64'], ['tokens=64', '--tokens=32']), (['--batch=1000000000000'], ['4,096']), (['--json=no/where.json'], ['no/where.json']), (['--bach=1'], ['--batch'])])
def test_bench_sample_mistakes(refused, folder, flags, words):
    refused('bench.py', *flags, '--device=cpu', '--compile=False', words=words)


@pytest.mark.processor
def test_bench_train_quick(script, folder):
    """The table and JSON of a short run, with every figure a reader would divide by another."""
    result = script('bench.py', 'train', '--quick', '--net=0.8M', '--profile', '--dropout=0.1', '--device=cpu', '--json=-')
    assert result.code == 0, result.err
    found = json.loads(result.out)
    row, = found['rows']
    assert (row['what'], row['who'], row['batch'], row['context'], row['dropout']) == ('train', 'ours', 12, 64, 0.1)
    assert row['tok_per_s'] == pytest.approx(12 * 64 / row['step_ms'] * 1e3)
    # 6 per weight that multiplies, 12 C T a layer for the attention: PaLM, appendix B
    weights = 65 * 128 + 4 * 12 * 128**2 + 9 * 128   # tied head, matrices, gains; nothing for the positions
    assert row['gflop_per_s'] == pytest.approx(row['tok_per_s'] * (6 * weights + 12 * 4 * 128 * 64) / 1e9)
    assert row['share_of_gemm'] == pytest.approx(row['gflop_per_s'] / row['gemm_gflop_per_s']) and 0 < row['share_of_gemm'] < 1
    assert row['loader_share'] == pytest.approx(row['loader_ms'] / row['step_ms']) and 0 < row['loader_share'] < 0.2
    assert 0.9 < sum(row['parts'].values()) <= 1 and sum(row['kinds'].values()) == pytest.approx(1)
    assert min(row['parts'].values()) > 0 and row['kinds']['products'] > 0 and row['kinds']['dropout'] > 0
    assert 100 < row['peak_memory_mb'] < 4000 and found['machine']['gemm_gflop_per_s'] == row['gemm_gflop_per_s']
    assert '0.8M    ours' in result.err   # the table, beside JSON on stdout


def test_bench_train_beside_transformers(script, folder):
    found = json.loads(script('bench.py', 'train', '--quick', '--net=0.8M', '--optimizer=muon', '--dtype=float32', '--batch=2',
                              '--context=16', '--peer=transformers', '--device=cpu', '--json=-').out)
    assert [(row['who'], row['precision']) for row in found['rows']] == [
        ('ours', 'float32'), ('transformers', 'float32')]
    assert all(row['tok_per_s'] > 0 and row['batch'] == 2 and row['context'] == 16 for row in found['rows'])
    assert 'transformers' in found['versions']


def test_bench_step_beside_nanogpt(process, folder):
    """Any model.py of that interface; nanoGPT's own is measured by hand (results/speed.md)."""
    (folder / 'model.py').write_text(
        'import torch\nfrom dataclasses import dataclass\nprint("hello")\n@dataclass\nclass GPTConfig:\n    block_size: int\n'
        '    vocab_size: int\n    n_layer: int\n    n_head: int\n    n_embd: int\n    dropout: float\n    bias: bool\n'
        'class GPT(torch.nn.Module):\n    def __init__(self, c):\n        super().__init__()\n        print("number of parameters")\n'
        '        self.wte = torch.nn.Embedding(c.vocab_size, 8)\n'
        '    def forward(self, x, y):\n        print("here")\n        return None, self.wte(x).square().mean()\n'
        '    def configure_optimizers(self, decay, rate, betas, device):\n        return torch.optim.AdamW(self.parameters(), lr=rate)\n')
    done = process('bench_step.py', f'--who=nanogpt:{folder}', '--vocab_size=9', '--block_size=4', '--device=cpu', input='2\n')
    first, second = map(json.loads, done.stdout.splitlines())
    assert first['precision'] == 'float32' and second['steps'] == 2 and second['seconds'] > 0
    done = process('bench_step.py', f'--who=nanogpt:{folder / "none"}', '--device=cpu')
    assert done.returncode == 2 and "its model.py is not nanoGPT's" in done.stderr and 'Traceback' not in done.stderr


def test_growth_is_drawn(folder):
    from lib import plots
    rows = [dict(growth=kind, context=64, batch=2, n_layer=3, step_ms=5.0 * i, peak_memory_mb=9.0) | {kind: i}
            for kind in ('context', 'batch', 'n_layer') for i in (1, 2)]
    plots.growth(rows, 'growth.png')
    assert (folder / 'growth.png').stat().st_size > 5000


@pytest.mark.parametrize('flags, words', [
    (['--net=7B'], ["net='7B'", '124M']), (['--optimizer=sgd'], ['sgd', 'muon']), (['--dropout=2'], ['dropout=2', 'below 1']),
    (['--dtype=int8'], ['int8', 'float32, bfloat16']), (['--net=0.8M', '--dtype=float16'], ['needs a GPU', 'bfloat16']),
    (['--peer_dropout=x'], ["peer_dropout='x'", 'below 1']), (['--plot=x.png'], ['--growth']), (['--growth', '--plot=no/x.png'], ['no/x.png']),
    (['--batch=0'], ['batch']), (['--net=0.8M', '--context=x'], ['context']), (['--growth', '--plot=d.png'], ['d.png']),
    (['--growth', '--peer=transformers'], ['growth', 'peer']), (['--seed=-1'], ['seed=-1']), (['--peer=nanogpt:nowhere'], ['nowhere', 'model.py'])])
def test_bench_train_mistakes(refused, folder, flags, words):
    (folder / 'd.png').mkdir()
    refused('bench.py', 'train', *flags, '--device=cpu', words=words)


@pytest.mark.parametrize('flags, stdin, words', [
    (['--n_head=5'], '', ['n_head=5']), (['--n_layer=-1'], '', ['n_layer=-1']), (['--dropout=2'], '', ['dropout=2']),
    (['--batch_size=0'], '', ['batch_size=0']), (['--seed=-1'], '', ['seed=-1']), (['--who=foo'], '', ['foo', 'transformers']),
    (['--who=nanogpt:'], '', ['nanogpt:PATH']), (['--optimizer=foo'], '', ['foo', 'muon']),
    (SMALL, 'abc\n', ['abc', 'profile']), (SMALL, '0\n', ['0', 'profile'])])
def test_bench_step_mistakes(process, folder, flags, stdin, words):
    done = process('bench_step.py', *flags, '--device=cpu', input=stdin)
    errors = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    assert done.returncode == 2 and len(errors) == 1 and 'Traceback' not in done.stderr, done.stderr
    assert all(word in errors[0] for word in words)


def test_bench_train_beside_a_peer_that_dies(process, folder):
    """One line, and the other measured process ends with it."""
    (folder / 'model.py').write_text('import os, threading\nthreading.Timer(0.1, lambda: os._exit(9)).start()\n'
                                     'import time; time.sleep(5)\n')
    done = process('bench.py', 'train', '--quick', '--net=0.8M', f'--peer=nanogpt:{folder}', '--device=cpu')
    errors = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    assert done.returncode == 2 and 'exit code 9' in errors[0] and 'Traceback' not in done.stderr
