"""evaluate.py: every target counts once, and its data is found. pytest tests/test_evaluate.py"""
import json
import math
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COMPILED, TEXT, rewrite
from torch.nn import functional as F

from lib import checkpoint
from lib.data import Dataset
from lib.prepare import write_dataset
from lib.tokenizers import ByteTokenizer, CharTokenizer, GPT2Tokenizer, token_sizes
from model import GPT, GPTConfig

KEYS = [
    'split',
    'tokens',
    'bytes',
    'nats_per_token',
    'perplexity',
    'bits_per_byte',
    'bits_per_char',
    'tokens_per_s',
]


@pytest.fixture
def run(trained, mini):
    """Enter a folder with a dataset and a copy of the run trained on it. Return its path."""
    shutil.copytree(trained, 'out')
    return mini


@pytest.fixture
def evaluate(script):
    """Return a function that runs evaluate.py on the CPU, uncompiled unless `flags` say so."""
    def run(*flags):
        return script('evaluate.py', '--device=cpu', '--compile=False', *flags)
    return run


@pytest.fixture
def refused_evaluation(refused):
    """Return a function that checks that evaluate.py refuses."""
    def run(*flags, words):
        return refused('evaluate.py', '--device=cpu', '--compile=False', *flags, words=words)
    return run


# ---- figures -----------------------------------------------------------------------------------

def by_hand(stride):
    """Return the sum of nats and the number of targets, computed one window at a time.

    Each target counts in the first window that holds it.
    """
    model = checkpoint.build_model(checkpoint.load('out/best.pt'), 'best.pt').eval()
    T = model.config.block_size
    ids = torch.tensor(Dataset('mini').split('val')[0].astype(np.int64))
    nats = 0.0
    scored = 0   # ids[1] to ids[scored] have counted
    for start in range(0, len(ids), stride):
        y = ids[start + 1:start + T + 1]
        x = ids[start:start + len(y)]
        with torch.no_grad():
            logits, _ = model(x[None])
        losses = F.cross_entropy(logits[0], y, reduction='none').double()
        first_new = scored - start
        nats += losses[first_new:].sum().item()
        scored = start + len(y)
        if scored == len(ids) - 1:
            return nats, scored


@pytest.mark.processor
@pytest.mark.parametrize('stride, compile', [
    (16, False),
    (15, False),
    (7, False),
    (1, False),
    pytest.param(7, True, marks=COMPILED),
])
def test_every_target_once(run, evaluate, stride, compile):
    nats, targets = by_hand(stride)
    flags = ['--json=-', f'--compile={compile}']
    if stride < 16:   # the default stride is block_size, 16
        flags.append(f'--stride={stride}')
    for batch_size in [5] if compile else [1, 5, 10**11]:
        result = evaluate(*flags, f'--batch_size={batch_size}')
        figures = json.loads(result.out)
        assert list(figures) == KEYS
        assert figures['split'] == 'val'
        assert figures['tokens'] == targets
        assert figures['bytes'] == targets
        assert figures['nats_per_token'] == pytest.approx(nats / targets, abs=1e-6)
        assert figures['perplexity'] == pytest.approx(math.exp(nats / targets))
        bits = nats / targets / math.log(2)
        assert figures['bits_per_byte'] == pytest.approx(bits)
        assert figures['bits_per_char'] == figures['bits_per_byte']
        assert figures['tokens_per_s'] > 0


def test_ranks_agree(run, forked):
    flags = ['--device=cpu', '--stride=5', '--batch_size=3', '--compile=False']
    commands = []
    for ranks in (1, 2, 3):
        commands.append([ranks, 'evaluate.py', *flags, f'--json={ranks}.json'])
    items = ''
    for i in range(1, 12):
        text = f'{i} times 11 is {11 * i},'
        endings = [f'{11 * i + wrong},' for wrong in (-1, 0, 1, 2)]
        items += json.dumps(dict(text=text, ctx=text[:-4], endings=endings, label=1)) + '\n'
    Path('items.jsonl').write_text(items)
    for task in ('hellaswag', 'lambada'):
        for ranks in (1, 2, 3):
            commands.append([ranks, 'evaluate.py', '--device=cpu', f'--task={task}',
                             '--input=items.jsonl', '--batch_size=5', f'--json={task}{ranks}.json'])
    forked(*commands)
    for task in ('hellaswag', 'lambada'):
        one, *others = [json.loads(Path(f'{task}{ranks}.json').read_text()) for ranks in (1, 2, 3)]
        assert one['items'] == 11
        for other in others:
            assert other.pop('task') == task
            assert other == pytest.approx({key: one[key] for key in other})
    one, *others = [json.loads(Path(f'{ranks}.json').read_text()) for ranks in (1, 2, 3)]
    for other in others:
        assert other['nats_per_token'] == pytest.approx(one['nats_per_token'], abs=1e-6)
        assert other['tokens'] == one['tokens']


def test_sizes_of_tokens_in_bytes_and_characters(gpt2_files):
    bytes_of, chars_of = token_sizes(CharTokenizer('né二🎉'))
    assert bytes_of.sum() == len('né二🎉'.encode())
    assert chars_of.sum() == 4
    text = 'né 二 🎉 ' * 100
    tokenizer = GPT2Tokenizer()
    bytes_of, chars_of = token_sizes(tokenizer)
    ids = tokenizer.encode(text + '<|endoftext|>')   # a special token has no size
    assert bytes_of[ids].sum() == len(text.encode())
    assert chars_of[ids].sum() == len(text)


@pytest.mark.processor
def test_bits_per_byte_and_per_character_count_the_text(folder, script, evaluate):
    """A character of this text takes one to four bytes, and is one token."""
    (folder / 'text.txt').write_text('né 二 🎉 ' * 100)
    assert script('prepare_text.py', '--input=text.txt', '--name=mine').code == 0
    tiny = [
        '--n_layer=1',
        '--n_head=1',
        '--n_embd=8',
        '--block_size=8',
        '--max_iters=2',
        '--eval_iters=1',
        '--gradient_accumulation_steps=1',
    ]
    assert script('train.py', '--dataset=mine', '--device=cpu', *tiny).code == 0
    figures = json.loads(evaluate('--json=-').out)
    val = 'né 二 🎉 ' * 10
    assert figures['tokens'] == len(val) - 1   # the first token is never a target
    assert figures['bytes'] == len(val[1:].encode())
    bits = figures['nats_per_token'] / math.log(2)
    assert figures['bits_per_char'] == pytest.approx(bits)
    chars_per_byte = figures['tokens'] / figures['bytes']
    assert figures['bits_per_byte'] == pytest.approx(bits * chars_per_byte)


def test_evaluating_changes_no_file(run, evaluate):
    def files():
        return {path: path.read_bytes() for path in run.rglob('*') if path.is_file()}

    before = files()
    result = evaluate()
    assert result.code == 0
    lines = result.out.splitlines()
    assert len(lines) == len(KEYS)
    assert lines[0].split() == ['split', 'val']
    assert files() == before


def test_json_may_go_to_a_file(run, evaluate):
    assert evaluate('--json=out.json', '--split=train').code == 0
    assert json.loads(Path('out.json').read_text())['split'] == 'train'


# ---- what is refused ---------------------------------------------------------------------------

@pytest.mark.parametrize('flags, words', [
    (['--split=test'], ['no test.bin', 'it has val, train']),
    (['--split=dev'], ['train, val, test']),
    (['--stride=0'], ['stride=0']),
    (['--stride=17'], ['block_size=16']),
    (['--stride=2.5'], ['stride']),
    (['--batch_size=0'], ['batch_size=0']),
    (['--dataset=nope'], ['data/nope']),
    (['--dataset=../mini'], ['not a name']),
    (['--json=no/where.json'], ['no/where.json']),
    (['--out_dir=none'], ['none/best.pt']),
    (['--checkpoint=none.pt'], ['none.pt']),
])
def test_mistakes(run, refused_evaluation, flags, words):
    refused_evaluation(*flags, words=words)
    assert not os.path.exists('no')


def test_a_dataset_of_another_tokenizer_is_refused(run, refused_evaluation):
    tokenizer = CharTokenizer('abc')
    source = dict(name='', url=None, sha256='', stand_in=False)
    val = [(tokenizer.encode('abc' * 9), 27)]
    write_dataset('data/other', dict(val=val), tokenizer, source)
    refused_evaluation('--dataset=other', words=['another tokenizer'])


@pytest.mark.parametrize('characters, fits', [(TEXT, True), ('abc', False)])
def test_a_dataset_made_anew_after_training_is_told(
    run, evaluate, refused_evaluation, script, refused, characters, fits,
):
    """The model was trained on a stand-in, and the real text has its place now."""
    saved = checkpoint.load('out/best.pt')
    saved['data'] |= dict(sha256='of the stand-in', stands_in_for='TINY SHAKESPEARE')
    for name in ('best.pt', 'last.pt'):
        checkpoint.save(f'out/{name}', saved)
    tokenizer = CharTokenizer(characters)
    part = [(tokenizer.encode(characters[:3] * 99), 297)]
    source = dict(name='', url=None, sha256='', stand_in=False)
    write_dataset('data/mini', dict(train=part, val=part), tokenizer, source)
    if fits:
        result = evaluate()
        assert result.code == 0, result.err
        note = 'note: data/mini has other token files than when out/best.pt was trained'
        assert note in result.err
    else:
        words = ['another tokenizer', 'data/mini was made anew after that training',
                 'train a new model on it, or type --dataset=NAME']
        refused_evaluation(words=words)
        refused('train.py', '--init_from=resume', '--max_iters=70', '--device=cpu', words=words)
    sampled = script('sample.py', '--max_new_tokens=2', '--device=cpu')
    assert 'trained on a stand-in text, and not on TINY SHAKESPEARE' in sampled.err


# ---- where the data is -------------------------------------------------------------------------

def test_a_run_knows_its_data_dir(run, evaluate):
    os.rename('data', 'elsewhere')
    rewrite('out/best.pt', data_dir=str(run / 'elsewhere'))
    result = evaluate()
    assert result.code == 0, result.err
    assert 'val of elsewhere/mini' in result.err


def test_data_beside_out_dir_are_found_from_another_folder(run, evaluate, monkeypatch):
    os.mkdir('work')
    monkeypatch.chdir('work')
    result = evaluate('--out_dir=../out')
    assert result.code == 0, result.err
    assert f'val of {run / "data/mini"}' in result.err


def test_data_in_the_runs_folder_are_found_from_another_folder(run, evaluate, monkeypatch):
    os.mkdir('work')
    os.rename('data', 'out/data')
    monkeypatch.chdir('work')
    result = evaluate('--out_dir=../out')
    assert result.code == 0, result.err
    assert f'val of {run / "out/data/mini"}' in result.err


def test_data_beside_a_run_that_was_moved_are_found(run, evaluate, monkeypatch):
    rewrite('out/best.pt', out_dir='/gone/long/ago')
    os.mkdir('runs')
    os.rename('out', 'runs/out')
    os.rename('data', 'runs/data')
    os.mkdir('work')
    monkeypatch.chdir('work')
    result = evaluate('--out_dir=../runs/out')
    assert result.code == 0, result.err
    assert f'val of {run / "runs/data/mini"}' in result.err


def test_a_data_dir_that_was_typed_is_the_only_one(run, refused_evaluation, evaluate):
    words = ['no val.bin', 'typo/mini', 'type --data_dir=FOLDER']
    error = refused_evaluation('--data_dir=typo', words=words)
    assert 'data/mini,' not in error
    assert error.endswith('--tokenizer=char --data_dir=typo')
    assert evaluate('--data_dir=data').code == 0


def test_without_data_the_error_names_each_folder_and_the_command(run, refused_evaluation):
    shutil.rmtree('data')
    rewrite('out/best.pt', data_dir='texts')
    words = ['texts/mini', 'out/texts/mini', 'data/mini', '--tokenizer=char']
    error = refused_evaluation(words=words)
    assert error.index('--data_dir=FOLDER') < error.index('prepare_text.py')


def test_the_command_names_the_models_own_tokenizer(folder, refused_evaluation):
    """A data_dir in the checkpoint that is not a text is ignored."""
    model = GPT(GPTConfig(block_size=8, vocab_size=256, n_layer=1, n_head=1, n_embd=8))
    checkpoint.save('bytes.pt', dict(
        format=1,
        model=model.state_dict(),
        model_args=asdict(model.config),
        tokenizer=ByteTokenizer().state(),
        config=dict(dataset='mine', data_dir=3, out_dir=None),
    ))
    words = ['data/mine', '--name=mine --tokenizer=byte']
    refused_evaluation('--checkpoint=bytes.pt', words=words)


def test_a_dataset_that_was_typed_lies_beside_the_runs_own(run, evaluate):
    os.rename('data', 'elsewhere')
    os.rename('elsewhere/mini', 'elsewhere/other')
    rewrite('out/best.pt', data_dir='elsewhere')
    result = evaluate('--dataset=other')
    assert result.code == 0, result.err
    assert 'val of elsewhere/other' in result.err


def test_the_first_folder_with_the_split_is_used(run, evaluate, refused_evaluation):
    shutil.copytree('data', 'elsewhere')
    os.remove('elsewhere/mini/val.bin')
    rewrite('out/best.pt', data_dir='elsewhere')
    assert 'val of data/mini' in evaluate().err
    assert 'train of elsewhere/mini' in evaluate('--split=train').err
    words = ['no test.bin', 'it has val, train', '--split=val']
    refused_evaluation('--split=test', words=words)
