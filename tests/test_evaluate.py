"""evaluate.py: every target once, whatever the batch and the ranks. pytest tests/test_evaluate.py"""
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
from data import CharTokenizer, Dataset, GPT2Tokenizer, token_sizes, write_dataset


@pytest.fixture
def run(trained, mini):
    """A working folder with the dataset and a copy of the run."""
    shutil.copytree(trained, 'out')
    return mini


def by_hand(stride):
    """Sum of nats and number of targets: each target from the window in which it is new, one window at a time."""
    loaded = checkpoint.load('out/best.pt')
    model = checkpoint.build_model(loaded, 'best.pt').eval()
    ids, T = torch.tensor(Dataset('mini').split('val')[0].astype(np.int64)), model.config.block_size
    nats, scored = 0.0, 0   # scored: targets so far, which are ids[1:]
    for start in range(0, len(ids), stride):
        x, y = ids[start:start + T], ids[start + 1:start + T + 1]
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(model(x[None, :len(y)])[0][0], y, reduction='none').double()
        new = start + len(y) - scored
        nats, scored = nats + float(losses[len(losses) - new:].sum()), scored + new
        if scored == len(ids) - 1:
            return nats, scored


@pytest.mark.processor
@pytest.mark.parametrize('stride', [16, 15, 7, 1])
def test_every_target_once(run, script, stride):
    nats, targets = by_hand(stride)
    for batch_size in (1, 5, 10**11):
        result = script('evaluate.py', '--json=-', '--device=cpu', f'--batch_size={batch_size}', *[f'--stride={stride}'] * (stride < 16))
        figures = json.loads(result.out)
        assert list(figures) == 'split tokens bytes nats_per_token perplexity bits_per_byte bits_per_char tokens_per_s'.split()
        assert figures['tokens'] == targets == figures['bytes'] and figures['split'] == 'val'
        assert figures['nats_per_token'] == pytest.approx(nats / targets, abs=1e-6)
        assert figures['perplexity'] == pytest.approx(math.exp(nats / targets)) and figures['tokens_per_s'] > 0
        assert figures['bits_per_byte'] == figures['bits_per_char'] == pytest.approx(nats / targets / math.log(2))


def test_ranks_agree(run, forked):
    forked(*[[ranks, 'evaluate.py', '--device=cpu', f'--json={ranks}.json', '--stride=5', '--batch_size=3'] for ranks in (1, 2, 3)])
    one, two, three = (json.load(open(f'{ranks}.json')) for ranks in (1, 2, 3))
    for other in (two, three):
        assert other['nats_per_token'] == pytest.approx(one['nats_per_token'], abs=1e-6) and other['tokens'] == one['tokens']


@pytest.mark.processor
def test_bytes_and_characters(trained, folder, script, gpt2_files):
    """Bits per byte and per character count the text, not the tokens."""
    text = 'né 二 🎉 ' * 100
    assert [sizes.sum() for sizes in token_sizes(CharTokenizer('né二🎉'))] == [len('né二🎉'.encode()), 4]
    by_token, chars = token_sizes(GPT2Tokenizer())
    ids = GPT2Tokenizer().encode(text + '<|endoftext|>')
    assert by_token[ids].sum() == len(text.encode()) and chars[ids].sum() == len(text)
    (folder / 'text.txt').write_text(text)
    assert script('prepare_text.py', '--input=text.txt', '--name=mine').code == 0
    tiny = ['--n_layer=1', '--n_head=1', '--n_embd=8', '--block_size=8', '--max_iters=2', '--eval_iters=1', '--gradient_accumulation_steps=1']
    assert script('train.py', '--dataset=mine', '--device=cpu', *tiny).code == 0
    figures = json.loads(script('evaluate.py', '--device=cpu', '--json=-').out)
    assert figures['tokens'] == 69 and figures['bytes'] == len(('né 二 🎉 ' * 10)[1:].encode())
    assert figures['bits_per_char'] == pytest.approx(figures['nats_per_token'] / math.log(2))
    assert figures['bits_per_byte'] == pytest.approx(figures['bits_per_char'] * figures['tokens'] / figures['bytes'])


def test_nothing_is_touched(run, script):
    before = {path: path.read_bytes() for path in Path().rglob('*') if path.is_file()}
    table = script('evaluate.py', '--device=cpu')
    assert table.code == 0 and table.out.splitlines()[0].split() == ['split', 'val'] and len(table.out.splitlines()) == 8
    assert {path: path.read_bytes() for path in Path().rglob('*') if path.is_file()} == before
    script('evaluate.py', '--device=cpu', '--json=out.json', '--split=train')
    assert json.load(open('out.json'))['split'] == 'train'


def test_refusals(run, refused):
    for flags, words in ((['--split=test'], ['no test.bin', 'it has val, train']), (['--split=dev'], ['train, val, test']), (['--stride=0'], ['stride=0']),
                         (['--stride=17'], ['block_size=16']), (['--stride=2.5'], ['stride']), (['--batch_size=0'], ['batch_size=0']),
                         (['--dataset=nope'], ['data/nope']), (['--dataset=../mini'], ['not a name']), (['--json=no/where.json'], ['no/where.json']),
                         (['--out_dir=none'], ['none/best.pt']), (['--checkpoint=none.pt'], ['none.pt'])):
        refused('evaluate.py', '--device=cpu', *flags, words=words)
    tokenizer = CharTokenizer('abc')
    write_dataset('data/other', dict(val=[(tokenizer.encode('abc' * 9), 27)]), tokenizer, dict(name='', url=None, sha256='', stand_in=False))
    refused('evaluate.py', '--device=cpu', '--dataset=other', words=['another tokenizer'])
    assert not os.path.exists('no')
