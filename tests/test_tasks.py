"""evaluate.py --task: HellaSwag's and LAMBADA's scores. pytest tests/test_tasks.py"""
import hashlib
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import shared

from lib import tasks
from lib.tokenizers import ByteTokenizer, hf_tokenizer_files
from model import GPT, GPTConfig

WORDS = 'the miller said to his wife that seven times eight is fifty six and she laughed'.split()
BLOCK_SIZE = 160   # bytes


def words(rng, count):
    return ' '.join(rng.choice(WORDS, count))


def write_items(path, items):
    Path(path).write_text(''.join(json.dumps(item) + '\n' for item in items))


@pytest.fixture(scope='session')
def benchmarks(tmp_path_factory):
    """Return a folder with 40 invented items of each benchmark, and an export in tiny/."""
    home = tmp_path_factory.mktemp('benchmarks')
    rng = np.random.default_rng(4)
    hellaswag = []
    lambada = []
    for number in range(40):
        # Every eighth context is longer than the model's.
        context = words(rng, 70 if number % 8 == 0 else rng.integers(3, 20))
        endings = [words(rng, rng.integers(1, 9)) for _ in range(4)]
        hellaswag.append(dict(ctx=context, endings=endings, label=int(rng.integers(4)), ind=number))
        lambada.append(dict(text=f'{context} {words(rng, 1)} unbelievably'))
    write_items(home / 'hellaswag.jsonl', hellaswag)
    write_items(home / 'lambada.jsonl', lambada)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=BLOCK_SIZE, vocab_size=256, n_layer=2, n_head=2, n_embd=16))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    model.save_pretrained(home / 'tiny')
    for name, content in hf_tokenizer_files(ByteTokenizer(), BLOCK_SIZE).items():
        (home / 'tiny' / name).write_text(content)
    return home


@pytest.fixture
def bench(benchmarks, monkeypatch):
    """Enter the folder of the benchmarks. Tests do not change it."""
    monkeypatch.chdir(benchmarks)
    return benchmarks


@pytest.fixture
def run_task(script):
    """Return a function that scores a task on the CPU: run_task('hellaswag', *flags)."""
    def run(task, *flags):
        flags = [f'--task={task}', f'--input={task}.jsonl', '--init_from=tiny', *flags]
        result = script('evaluate.py', '--device=cpu', '--json=-', *flags)
        assert result.code == 0, result.err
        return json.loads(result.out), result.err
    return run


# ---- the scores are transformers' --------------------------------------------------------------

def by_transformers(theirs, context, choice):
    """Return (nats of a choice's tokens together, their number, whether all are the likeliest)."""
    ids = torch.tensor(list(f'{context}{choice}'.encode())[-BLOCK_SIZE - 1:])
    n = len(choice)
    with torch.no_grad():
        logits = theirs(ids[None, :-1]).logits[0, -n:]
    nats = -logits.log_softmax(-1)[range(n), ids[-n:]].sum().item()
    return nats, n, bool((logits.argmax(-1) == ids[-n:]).all())


def our_scores(task):
    """Return the items of a task and their Scores, in batches of 7 windows."""
    items = tasks.read_items(task, f'{task}.jsonl', ByteTokenizer())
    model = GPT.from_pretrained('tiny').eval()
    windows, _ = tasks.windows_of(items, BLOCK_SIZE)
    return items, tasks.score(model, items, tasks.window_batches(windows, 7), 'cpu', 'float32')


@pytest.mark.processor
def test_hellaswag_is_scored_as_by_transformers(bench, run_task):
    _, scores = our_scores('hellaswag')
    theirs = transformers.GPT2LMHeadModel.from_pretrained('tiny').eval()
    right = right_norm = 0
    lines = Path('hellaswag.jsonl').read_text().splitlines()
    for number, line in enumerate(lines):
        item = json.loads(line)
        choices = [by_transformers(theirs, item['ctx'], f' {text}') for text in item['endings']]
        nats = np.array([choice[0] for choice in choices])
        lengths = np.array([choice[1] for choice in choices])
        assert scores.nats[number] == pytest.approx(nats, abs=1e-4)
        right += nats.argmin() == item['label']
        right_norm += (nats / lengths).argmin() == item['label']
    found, said = run_task('hellaswag')
    assert list(found) == ['task', 'items', 'accuracy', 'accuracy_norm', 'low', 'high']
    assert (found['task'], found['items']) == ('hellaswag', 40)
    assert found['accuracy'] == right / 40
    assert found['accuracy_norm'] == right_norm / 40
    assert found['low'] < found['accuracy'] < found['high']
    assert said.count('do not fit into block_size=160') == 1
    assert 'note: 5 of 40 contexts' in said


@pytest.mark.processor
def test_lambada_is_scored_as_by_transformers(bench, run_task):
    _, scores = our_scores('lambada')
    theirs = transformers.GPT2LMHeadModel.from_pretrained('tiny').eval()
    nats = []
    right = 0
    for line in Path('lambada.jsonl').read_text().splitlines():
        context, _, word = json.loads(line)['text'].rpartition(' ')
        lost, _, likeliest = by_transformers(theirs, context, f' {word}')
        nats.append(lost)
        right += likeliest
    assert scores.nats[:, 0] == pytest.approx(np.array(nats), abs=1e-4)
    found, _ = run_task('lambada')
    assert list(found) == ['task', 'items', 'accuracy', 'perplexity', 'low', 'high']
    assert found['accuracy'] == right / 40
    assert found['perplexity'] == pytest.approx(math.exp(np.mean(nats)), rel=1e-4)


def test_a_word_counts_only_if_all_its_tokens_are_the_likeliest(folder):
    """A model that always expects the next letter of the alphabet."""
    write_items('lambada.jsonl', [dict(text='xyz abc'), dict(text='xyz abd'), dict(text='a abc\n')])
    model = GPT(GPTConfig(block_size=8, vocab_size=256, n_layer=1, n_head=1, n_embd=256, pos='none',
                          tie_weights=False))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.transformer.ln_f.weight.fill_(1)
        model.transformer.wte.weight.copy_(torch.eye(256))
        following = {i: i + 1 for i in range(256)} | {ord('z'): ord(' '), ord(' '): ord('a')}
        for before, after in following.items():
            if after < 256:
                model.lm_head.weight[after, before] = 1
    items = tasks.read_items('lambada', 'lambada.jsonl', ByteTokenizer())
    windows, _ = tasks.windows_of(items, 8)
    scores = tasks.score(model, items, tasks.window_batches(windows, 2), 'cpu', 'float32')
    assert scores.misses[:, 0].tolist() == [0, 1, 1]   # " abc", " abd", and " abc" after an a
    assert tasks.figures('lambada', items, scores)['accuracy'] == pytest.approx(1 / 3)


def test_the_batch_size_changes_nothing(bench, run_task):
    """Nor does the number of ranks: test_ranks_agree in test_evaluate.py."""
    one, _ = run_task('hellaswag')
    for batch_size in (1, 1000):
        assert run_task('hellaswag', f'--batch_size={batch_size}')[0] == one
    one, _ = run_task('lambada')
    seven, _ = run_task('lambada', '--batch_size=7')
    assert seven.pop('perplexity') == pytest.approx(one.pop('perplexity'))
    assert seven == one


def test_a_limit_takes_the_first_items(bench, run_task, script):
    found, _ = run_task('hellaswag', '--limit=9')
    assert found['items'] == 9
    result = script('evaluate.py', '--device=cpu', '--init_from=tiny', '--task=lambada',
                    '--input=lambada.jsonl', '--limit=3')
    lines = [line.split() for line in result.out.splitlines()]
    assert lines[0] == ['task', 'lambada']
    assert lines[1] == ['items', '3']


@pytest.mark.parametrize('right, items, low, high', [   # R: prop.test(right, items, correct=FALSE)
    (0, 10, 0.0, 0.2775),
    (5, 10, 0.2366, 0.7634),
    (2871, 10042, 0.2771, 0.2948),
    (40, 40, 0.9124, 1.0),
])
def test_the_interval_is_wilsons(right, items, low, high):
    assert tasks.interval(right, items) == pytest.approx((low, high), abs=1e-4)


# ---- bad items ---------------------------------------------------------------------------------

GOOD = dict(ctx='a b', endings=['c', 'd', 'e', 'f'], label=0)


@pytest.mark.parametrize('line, problem', [
    (dict(endings=GOOD['endings'], label=0), 'no "ctx"'),
    (dict(GOOD, ctx=' '), 'no "ctx"'),
    (dict(ctx='a', label=0), '"endings"'),
    (dict(GOOD, endings=['c', 'd', 'e']), 'four'),
    (dict(GOOD, endings=['c', 'd', ' ', 'f']), 'ending 2'),
    (dict(GOOD, endings=['c', 'd', 'e', 5]), 'ending 3'),
    (dict(GOOD, label=4), '"label" is 4'),
    (dict(GOOD, label=-1), '"label" is -1'),
    (dict(GOOD, label='1'), '"label" is "1"'),
    (dict(GOOD, label=True), '"label" is true'),
    (dict(ctx='a', endings=GOOD['endings']), '"label" is null'),
    (dict(GOOD, endings=['c ' * 100, 'd', 'e', 'f']), '201 tokens'),
    ([1, 2], 'no "ctx"'),
    ('{"ctx": ', 'Expecting'),
])
def test_a_bad_item_of_hellaswag_is_named_by_its_line(bench, refused, tmp_path, line, problem):
    line = line if isinstance(line, str) else json.dumps(line)
    (tmp_path / 'bad.jsonl').write_text(json.dumps(GOOD) + f'\n\n{line}\n')
    refused('evaluate.py', '--device=cpu', '--init_from=tiny', '--task=hellaswag',
            f'--input={tmp_path}/bad.jsonl', words=['bad.jsonl, line 3', problem, '--input=FILE'])


@pytest.mark.parametrize('item, problem', [
    (dict(), 'no "text"'),
    (dict(text=3), 'no "text"'),
    (dict(text='word '), 'single word'),
])
def test_a_bad_item_of_lambada_is_named_by_its_line(bench, refused, tmp_path, item, problem):
    write_items(tmp_path / 'bad.jsonl', [dict(text='two words'), item])
    refused('evaluate.py', '--device=cpu', '--init_from=tiny', '--task=lambada',
            f'--input={tmp_path}/bad.jsonl', words=['bad.jsonl, line 2', problem, '--input=FILE'])


@pytest.mark.parametrize('flags, problem', [
    (['--task=glue'], 'hellaswag, lambada'),
    (['--task=hellaswag', '--split=val'], '--split'),
    (['--task=hellaswag', '--quantize=int8'], '--quantize'),
    (['--input=hellaswag.jsonl'], '--task=hellaswag'),
    (['--limit=3'], '--task=hellaswag'),
    (['--task=hellaswag', '--limit=-1'], 'limit=-1'),
    (['--task=hellaswag', '--input=none.jsonl'], 'none.jsonl'),
    (['--task=hellaswag', '--input=tiny/model.safetensors'], 'UTF-8'),
    (['--task=hellaswag', '--input=empty.jsonl'], 'no items'),
])
def test_mistakes(bench, refused, flags, problem):
    Path('empty.jsonl').write_text('\n')
    refused('evaluate.py', '--device=cpu', '--init_from=tiny', *flags, words=[problem])


# ---- the published files -----------------------------------------------------------------------

def test_the_published_file_is_fetched_once_and_checked(bench, script, server, monkeypatch,
                                                        no_waiting, tmp_path, refused):
    body = Path('hellaswag.jsonl').read_bytes()
    digest = hashlib.sha256(body).hexdigest()
    flags = ['--device=cpu', '--init_from=tiny', '--task=hellaswag', f'--data_dir={tmp_path}/data',
             '--limit=2']

    def publish(*replies):
        known = tasks.TASKS['hellaswag']
        here = tasks.Published(server(*replies), len(body), digest, known.form)
        monkeypatch.setitem(tasks.TASKS, 'hellaswag', here)

    for reply in ((404, b''), (429, b''), (200, b'<html>'), (200, body[::-1])):
        publish(reply)
        refused('evaluate.py', *flags, words=['--input=FILE', '127.0.0.1'])
        assert not os.path.exists(tmp_path / 'data/hellaswag')
    publish((200, body[:999]), (200, body))
    assert script('evaluate.py', *flags).code == 0
    publish((404, b''))
    assert script('evaluate.py', *flags).code == 0   # the file is there


def test_hellaswags_published_file_is_read():
    """A local copy has the form that read_items expects."""
    path = shared('hellaswag_val.jsonl')
    assert len(tasks.read_items('hellaswag', path, ByteTokenizer())) == 10042
