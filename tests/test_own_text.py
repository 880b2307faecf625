"""config/train_text.py, which chooses by text and time, and the study behind it.

pytest tests/test_own_text.py
"""
import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TEXT, write_shard

from lib.configurator import configure
from lib.data import DEFAULT, extent_of
from lib.prepare import write_dataset
from lib.tokenizers import ByteTokenizer, CharTokenizer, GPT2Tokenizer, train_bpe

CONFIG = str(ROOT / 'config/train_text.py')
KNOBS = dict(
    out_dir='out', dataset=DEFAULT, data_dir='data', device='auto', max_minutes=0.0,
    gradient_accumulation_steps=40, batch_size=12, block_size=1024, n_layer=12, n_head=12,
    n_embd=768, dropout=0.0, bias=True, tie_weights=True, pos='learned', qk_norm=False,
    activation='gelu', zero_init=False, optimizer='adamw', learning_rate=6e-4,
    muon_learning_rate=0.02, max_iters=600000, weight_decay=0.1, warmup_iters=2000, cooldown=0.0,
    min_lr=6e-5, eval_interval=2000, eval_iters=200, log_interval=1, sample_interval=0)


def chosen(*flags, device='cpu'):
    """Return the knobs that the config chooses, with flags behind it."""
    knobs = dict(KNOBS)
    configure(knobs, lambda name: device, [CONFIG, *flags])
    return knobs


def write_text(name, tokenizer, text):
    """Write a text as the dataset data/<name>, its last tenth for validation."""
    cut = int(0.9 * len(text))
    splits = {}
    for split, part in (('train', text[:cut]), ('val', text[cut:])):
        splits[split] = [(tokenizer.encode(part), len(part))]
    write_dataset(f'data/{name}', splits, tokenizer, dict(name=name, url=None, sha256='',
                                                          stand_in=False))


def claim(letters, name='mine'):
    """Make a dataset of so many characters: files of their size, without content."""
    os.makedirs(f'data/{name}', exist_ok=True)
    with open(f'data/{name}/train.bin', 'wb') as f:
        f.truncate(2 * letters)
    meta = dict(tokenizer=dict(kind='byte'), vocab_size=256, dtype='uint16',
                splits=dict(train=dict(bytes=letters)))
    Path(f'data/{name}/meta.json').write_text(json.dumps(meta))


# ---- how much there is ---------------------------------------------------------------------------

def test_the_extent_of_each_kind_of_dataset(folder, gpt2_files):
    write_text('characters', CharTokenizer(TEXT), TEXT)
    write_text('words', train_bpe([TEXT], 300), TEXT)
    write_text('gpt2', GPT2Tokenizer(), TEXT)
    letters = int(0.9 * len(TEXT))
    extent = extent_of('characters')
    assert (extent.tokens, extent.longest, extent.letters) == (letters, letters, letters)
    assert extent.symbols == len(set(TEXT))
    extent = extent_of('words')
    assert extent.symbols == 300 and extent.letters == letters and extent.tokens < letters
    assert extent_of('gpt2').symbols == 50257


def test_the_extent_of_other_projects_datasets(folder):
    os.makedirs('data/shards')
    for number in (1, 2):
        write_shard(f'data/shards/x_train_{number:06d}.bin', np.arange(60 * number))
    extent = extent_of('shards')
    assert (extent.tokens, extent.longest) == (180, 120)   # without the headers
    assert (extent.symbols, extent.letters) == (50257, 4 * 180)
    os.makedirs('data/nanogpt')
    Path('data/nanogpt/train.bin').write_bytes(bytes(200))
    Path('data/nanogpt/meta.pkl').write_bytes(b'')
    extent = extent_of('nanogpt')
    assert (extent.tokens, extent.letters, extent.symbols) == (100, 100, 256)
    assert extent_of('nothing').tokens == 0


@pytest.mark.parametrize('content', ['', '[]', '{"tokenizer": 3}', '{"tokenizer": {"kind": "x"}}'])
def test_the_extent_with_a_damaged_meta(folder, content):
    claim(1000)
    Path('data/mine/meta.json').write_text(content)
    assert extent_of('mine').tokens == 1000


# ---- what is chosen ------------------------------------------------------------------------------

def test_longer_texts_and_more_minutes_get_larger_nets(folder):
    widths = []
    for letters in (45_000, 1_000_000, 20_000_000):
        claim(letters)
        widths.append([chosen(f'--max_minutes={minutes}')['n_embd'] for minutes in (1, 10, 60)])
    for row in widths:
        assert row == sorted(row)
    for column in zip(*widths):
        assert list(column) == sorted(column)
    assert widths[2] == [128, 256, 384]


def test_a_short_text_gets_dropout_and_few_passes(folder):
    claim(45_000)
    short = chosen('--max_minutes=60')
    claim(20_000_000)
    long = chosen('--max_minutes=60')
    passes = short['max_iters'] * short['batch_size'] * short['block_size'] / 45_000
    assert short['dropout'] > long['dropout'] == 0
    assert 5 < passes < 40


def test_ten_minutes_are_the_default(folder):
    claim(1_000_000)
    assert chosen() == chosen('--max_minutes=10')
    assert chosen('--dataset=mine')['out_dir'] == 'out-mine'
    assert chosen('--max_minutes=0')['max_minutes'] == 0     # the flag wins
    assert chosen('--max_minutes=0')['max_iters'] == chosen()['max_iters']
    assert chosen('--n_embd=64', '--out_dir=here')['out_dir'] == 'here'


def test_a_context_is_shorter_than_the_text(folder):
    for letters, block_size in ((2, 1), (60, 59), (100_000, 128)):
        claim(letters)
        assert chosen()['block_size'] == block_size


def test_tokens_of_several_letters_get_a_shorter_context(folder):
    claim(1_000_000)
    characters = chosen()
    os.makedirs('data/shards')
    with open('data/shards/x_train_000001.bin', 'wb') as f:
        f.truncate(2 * 250_000)
    tokens = chosen('--dataset=shards')
    assert tokens['block_size'] * 4 == characters['block_size']
    assert tokens['tie_weights'] and not characters['tie_weights']


def test_a_gpu_gets_more(folder):
    claim(20_000_000)
    gpu = chosen('--max_minutes=1', device='cuda')
    cpu = chosen('--max_minutes=1')
    assert gpu['batch_size'] > cpu['batch_size'] and gpu['n_embd'] > cpu['n_embd']
    assert gpu['max_iters'] > cpu['max_iters']


# ---- training ------------------------------------------------------------------------------------

SHORT = ['--max_iters=2', '--eval_iters=1', '--sample_interval=0', '--n_layer=1', '--n_head=1',
         '--n_embd=16', '--batch_size=2', '--device=cpu']


@pytest.mark.parametrize('kind', ['char', 'byte', 'bpe', 'gpt2'])
def test_training_on_each_kind_of_tokens(folder, script, gpt2_files, kind):
    tokenizers = dict(char=lambda: CharTokenizer(TEXT), byte=ByteTokenizer,
                      bpe=lambda: train_bpe([TEXT], 300), gpt2=GPT2Tokenizer)
    write_text('mine', tokenizers[kind](), TEXT)
    result = script('train.py', CONFIG, '--dataset=mine', *SHORT)
    assert result.code == 0, result.err
    assert 'done: 2 steps' in result.err
    assert os.path.exists('out-mine/last.pt')


def test_the_time_ends_a_run(folder, script):
    """A run whose minutes are over before its steps ends with the rates decayed."""
    write_text('mine', CharTokenizer(TEXT), TEXT)
    small = ['--max_minutes=0.002', '--max_iters=100000', '--n_layer=1', '--n_head=1',
             '--n_embd=16', '--batch_size=2', '--sample_interval=0', '--device=cpu']
    result = script('train.py', CONFIG, *small)
    assert result.code == 0, result.err
    assert 'max_minutes=0.002 was reached' in result.err


def test_a_missing_dataset_is_named_with_what_to_type(folder, refused):
    refused('train.py', CONFIG, '--device=cpu',
            words=['data/mine', 'python prepare_text.py', '--name=mine'])
    refused('train.py', CONFIG, '--dataset=book', '--device=cpu',
            words=['data/book', 'python prepare_text.py', '--name=book'])
    refused('train.py', CONFIG, '--dataset=../x', '--device=cpu', words=['dataset', 'not a name'])


# ---- the study -----------------------------------------------------------------------------------

STUDY = 'results/own_text/study.py'


def test_the_study_compares_what_the_config_chooses(folder, script):
    planned = script(STUDY, '--plan', '--minutes=1,10,60', '--results=.').out
    for size, letters in dict(small=45_000, medium=1_003_854, large=18_000_000).items():
        claim(letters)
        for minutes in (1, 10, 60):
            knobs = chosen(f'--max_minutes={minutes}')
            choice = (f'{knobs["n_layer"]} × {knobs["n_embd"]}, context {knobs["block_size"]}, '
                      f'batch {knobs["batch_size"]}, dropout {knobs["dropout"]}, ')
            rows = [line for line in planned.splitlines() if f' {size} ' in line]
            assert any(choice in row for row in rows), (size, minutes)


RUNS = """text,minutes,choice,seed,val_loss,lowest,steps,passes,seconds,parameters
small,10,"4 × 256, context 128, batch 8, dropout 0.3, at most 15 passes",1,2.5,2.4,9,0.1,3.0,999
"""


def test_the_study_runs_what_is_not_finished(folder, script, shakespeare):
    Path('README.md').write_text((ROOT / 'results/own_text/README.md').read_text())
    Path('runs.csv').write_text(RUNS)
    words = [STUDY, f'--texts={shakespeare.parent}', '--results=.', '--speed=0.00001',
             '--sizes=small', '--minutes=10']
    assert 'runs: 1,' in script(*words, '--plan').out
    result = script(*words)
    assert result.code == 0, result.err
    runs = Path('runs.csv').read_text()
    assert runs.startswith(RUNS) and runs.count('\n') == 3
    assert 'runs: 0,' in script(*words, '--plan').out
    page = Path('README.md').read_text()
    assert '| 10 | 4 × 256, context 128, batch 8, dropout 0.3, at most 15 passes | **2.5' in page
    assert '| 10 | 4 × 128, context 128, batch 8' in page
    assert 'Until study.py has run' not in page
    assert '<!-- end of the tables -->' in page


@pytest.mark.parametrize('flags, words', [
    (['--sizes=huge'], ['huge', 'small, medium, large', '--sizes=small']),
    (['--minutes=5'], ['5', '1, 10, 60', '--minutes=1']),
    (['--sizes=bible', '--minutes=1'], ['kjv.txt', '--texts=FOLDER']),
    (['--speed=0'], ['speed=0', 'above 0', '--speed=1']),
])
def test_mistakes_in_the_study(folder, refused, flags, words):
    refused(STUDY, '--results=.', *flags, words=words)


def test_a_trial_of_the_study_does_not_count_as_a_run(folder, refused):
    refused(STUDY, '--speed=0.1', words=['trial run', '--results=FOLDER'])
