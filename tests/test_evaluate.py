"""evaluate.py: every target once, whatever the batch and the ranks. pytest tests/test_evaluate.py"""
import json
import math
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import rewrite

from lib import checkpoint
from lib.data import Dataset
from lib.prepare import write_dataset
from lib.tokenizers import CharTokenizer, GPT2Tokenizer, token_sizes
from model import GPT, GPTConfig


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


# ---- where the data is ---------------------------------------------------------------------------------------------

def test_a_run_knows_its_data_dir(run, script):
    os.rename('data', 'elsewhere')
    rewrite('out/best.pt', data_dir=str(run / 'elsewhere'))
    result = script('evaluate.py', '--device=cpu')
    assert result.code == 0 and 'val of elsewhere/mini' in result.err, result.err


@pytest.mark.parametrize('place', ['.', 'out', 'runs'])
def test_a_run_is_found_from_another_folder(run, script, monkeypatch, place):
    """Its data lie beside where out_dir was, in the run's folder, or in that folder's parent."""
    os.mkdir('work')
    if place == 'runs':
        rewrite('out/best.pt', out_dir='/gone/long/ago')
        os.mkdir('runs')
        os.rename('out', 'runs/out')
    if place != '.':
        os.rename('data', f'{place}/data')
    monkeypatch.chdir('work')
    result = script('evaluate.py', '--device=cpu', f'--out_dir=../{"runs/" * (place == "runs")}out')
    where = os.path.normpath(run / place / 'data/mini')
    assert result.code == 0 and f'val of {where}' in result.err, result.err


def test_a_data_dir_that_was_typed_is_the_only_one(run, refused, script):
    words = ['no val.bin', 'typo/mini', 'type --data_dir=FOLDER']
    line = refused('evaluate.py', '--device=cpu', '--data_dir=typo', words=words)
    assert 'data/mini,' not in line and line.endswith('--tokenizer=char --data_dir=typo')
    assert script('evaluate.py', '--device=cpu', '--data_dir=data').code == 0


def test_where_it_looked_and_how_to_make_it(run, refused):
    """The tokenizer advised is the model's own kind."""
    shutil.rmtree('data')
    rewrite('out/best.pt', data_dir='texts')
    words = ['texts/mini', 'out/texts/mini', 'data/mini', '--tokenizer=char']
    line = refused('evaluate.py', '--device=cpu', words=words)
    assert line.index('--data_dir=FOLDER') < line.index('prepare_text.py')
    model = GPT(GPTConfig(block_size=8, vocab_size=256, n_layer=1, n_head=1, n_embd=8))
    config = dict(dataset='mine', data_dir=3, out_dir=None)
    checkpoint.save('bytes.pt', dict(format=1, model=model.state_dict(), config=config,
                                     model_args=asdict(model.config), tokenizer=dict(kind='byte')))
    words = ['data/mine', '--name=mine --tokenizer=byte']
    refused('evaluate.py', '--device=cpu', '--checkpoint=bytes.pt', words=words)


def test_a_dataset_typed_lies_beside_the_runs_own(run, script):
    os.rename('data', 'elsewhere')
    os.rename('elsewhere/mini', 'elsewhere/other')
    rewrite('out/best.pt', data_dir='elsewhere')
    result = script('evaluate.py', '--device=cpu', '--dataset=other')
    assert result.code == 0 and 'val of elsewhere/other' in result.err, result.err


def test_another_split_elsewhere(run, script, refused):
    """The first folder that has the split is taken; a split that none has is an error."""
    shutil.copytree('data', 'elsewhere')
    os.remove('elsewhere/mini/val.bin')
    rewrite('out/best.pt', data_dir='elsewhere')
    assert 'val of data/mini' in script('evaluate.py', '--device=cpu').err
    assert 'train of elsewhere/mini' in script('evaluate.py', '--device=cpu', '--split=train').err
    words = ['no test.bin', 'it has val, train', '--split=val']
    refused('evaluate.py', '--device=cpu', '--split=test', words=words)
