"""A folder with llm.c's and modded-nanogpt's shards is a dataset. pytest tests/test_shards.py"""
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, write_mini, write_shard

from lib import data
from lib.data import Dataset, TrainingWindows, evaluation_batches

MAGIC = 20240520
EOT = 50256


@pytest.fixture
def shards(folder):
    """Write data/web, two training shards and one for validation, and data/plain, its copy.

    The copy has the same tokens in files of ours, without headers.
    """
    rng = np.random.default_rng(0)
    os.makedirs('data/web')
    os.makedirs('data/plain')
    for split, number, count in (('train', 1, 3000), ('train', 2, 1777), ('val', 0, 500)):
        tokens = rng.integers(0, EOT + 1, count)
        write_shard(f'data/web/fineweb_{split}_{number:06d}.bin', tokens)
        tokens.astype('<u2').tofile(f'data/plain/{split}_{number:03d}.bin')
    return folder


@pytest.fixture
def refused_data(shards, capsys):
    """Return a function that checks that a dataset is refused in one line that holds `words`."""
    def run(*words, name='web', split='train'):
        with pytest.raises(SystemExit) as stop:
            Dataset(name).split(split)
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert error.startswith('error: ') and error.count('\n') == 1
        for word in words:
            assert word in error, error
        return error
    return run


# ---- the same as without headers ---------------------------------------------------------------

def test_windows_are_those_of_a_headerless_copy(shards, gpt2_files, capsys):
    web = Dataset('web')
    assert web.tokenizer.state() == dict(kind='gpt2')
    assert web.stand_in_banner() == ''
    assert capsys.readouterr().err == ''   # the headers say what the tokens are
    plain = Dataset('plain')
    assert [len(shard) for shard in web.split('train')] == [3000, 1777]
    for first in (0, 100, 5000):   # the last one is some epochs on
        batches = []
        for made in (web, plain):
            batches.append(TrainingWindows(made, 'train', 32, seed=5).batch(first, 40))
        for ours, theirs in zip(*batches):
            assert torch.equal(ours, theirs)


def test_evaluations_are_those_of_a_headerless_copy(shards, gpt2_files):
    for batches, stride in ((None, None), (3, None), (None, 7)):
        pairs = []
        for name in ('web', 'plain'):
            pairs.append(list(evaluation_batches(Dataset(name), 'val', 32, 4, batches,
                                                 stride=stride)))
        assert len(pairs[0]) == len(pairs[1])
        for ours, theirs in zip(*pairs):
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(ours[1], theirs[1])


def test_shards_are_mapped_into_memory_and_read_in_order(shards, gpt2_files):
    for number in range(3, 12):
        write_shard(f'data/web/fineweb_train_{number}.bin', np.full(9, number))
    web = Dataset('web')
    last = [int(shard[-1]) for shard in web.split('train')]
    assert last[:9] == list(range(3, 10)) + [10, 11]   # a shorter name is an earlier one
    assert len(web.maps) == 11
    assert not web.split('train')[0].flags.owndata


def test_training_and_evaluating_on_shards(shards, script, gpt2_files):
    flags = ['--dataset=web', '--max_iters=2', '--n_layer=1', '--sample_interval=0']
    result = script('train.py', *TINY, *flags)
    assert result.code == 0, result.err
    assert '4,777 training tokens' in result.err
    result = script('evaluate.py', '--device=cpu', '--compile=False', '--json=-')
    assert result.code == 0, result.err
    assert json.loads(result.out)['tokens'] == 499


def test_evaluating_needs_no_training_shards(shards, gpt2_files):
    for path in Path('data/web').glob('*train*'):
        path.unlink()
    assert data.first_with('web', ['data'], 'val') == 'data'
    assert len(Dataset('web').split('val')[0]) == 500


def test_a_token_outside_the_vocabulary(refused_data, gpt2_files):
    write_shard('data/web/fineweb_train_000002.bin', np.array([1, 50257, 3]))
    refused_data('fineweb_train_000002.bin', 'token 50257', '0 to 50256')


# ---- bad shards --------------------------------------------------------------------------------

SHARD = 'data/web/fineweb_train_000002.bin'


def cut_short():
    os.truncate(SHARD, os.path.getsize(SHARD) - 2)


def cut_inside_a_token():
    os.truncate(SHARD, os.path.getsize(SHARD) - 1)


def cut_inside_the_header():
    os.truncate(SHARD, 1000)


def make_longer():
    with open(SHARD, 'ab') as f:
        f.write(b'\0\0')


def change_header(place, value):
    """Return a function that writes another number into the shard's header."""
    def change():
        with open(SHARD, 'r+b') as f:
            f.seek(4 * place)
            f.write(np.array(value, dtype='<i4').tobytes())
    return change


@pytest.mark.parametrize('damage, words', [
    (cut_short, ['1,777', '3,552 bytes']),
    (cut_inside_a_token, ['1,777', '3,553 bytes']),
    (cut_inside_the_header, ['1,000 bytes', 'header']),
    (make_longer, ['1,777', '3,556 bytes']),
    (change_header(0, 20240801), ['20240801', '20240520']),
    (change_header(1, 2), ['version 2', '1']),
    (change_header(2, 5), [' 5 tokens']),
    (change_header(2, -1), [' -1 tokens']),
    (lambda: write_shard(SHARD, np.array([], dtype=int)), [' 0 tokens']),
])
def test_damaged_shard(refused_data, gpt2_files, damage, words):
    damage()
    error = refused_data(SHARD, *words, '--dataset=NAME')
    assert 'prepare_text.py' not in error


def test_a_damaged_shard_of_a_known_corpus_is_fetched_again(refused_data, gpt2_files):
    cut_short()
    os.rename('data/web', 'data/fineweb')
    words = ['fineweb_train_000002.bin', 'type python prepare_corpus.py --name=fineweb']
    refused_data(*words, name='fineweb')


def test_validation_without_training_shards(shards, refused, gpt2_files):
    for path in Path('data/web').glob('*train*'):
        path.unlink()
    words = ['data/web', 'no shards *_train_*.bin', '--dataset=NAME']
    refused('train.py', *TINY, '--dataset=web', words=words)
    os.rename('data/web', 'data/fineweb')
    words = ['no shards *_train_*.bin', 'python prepare_corpus.py --name=fineweb']
    refused('train.py', *TINY, '--dataset=fineweb', words=words)


@pytest.mark.parametrize('ours', ['train.bin', 'train_003.bin', 'val.bin'])
def test_both_kinds_of_files(refused_data, gpt2_files, ours):
    shutil.copy('data/plain/train_001.bin', f'data/web/{ours}')
    refused_data('data/web', ours, 'fineweb_train_000001.bin', 'two kinds')


def test_preparing_a_text_never_replaces_shards(shards, refused, gpt2_files):
    Path('text.txt').write_text('some text ' * 50)
    refused('prepare_text.py', 'text.txt', '--name=web', words=['data/web', 'shards', '--name'])
    assert len(os.listdir('data/web')) == 3


# ---- what to type first ------------------------------------------------------------------------

def test_bare_training_says_what_to_type_first(folder, refused):
    error = refused('train.py')
    first = error.index('python train.py config/train_shakespeare_char.py')
    second = error.index('python train.py config/train_gpt2.py')
    third = error.index('python prepare_text.py --input=FOLDER --name=openwebtext')
    assert first < second < third
    assert os.listdir('.') == []


def test_a_dataset_of_nanogpts_default_name_is_used(folder, script):
    write_mini(folder)
    os.rename('data/mini', 'data/openwebtext')
    flags = [flag for flag in TINY if flag != '--dataset=mini']
    assert script('train.py', *flags, '--max_iters=1').code == 0
