"""
Every command of README.md and docs/ runs, with a small budget and without a network.

    pytest tests/test_readme.py

Commands stand in blocks marked ```sh, a line each; what they print stands in blocks marked ```text.
"""
import gzip
import hashlib
import json
import os
import random
import re
import shlex
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
import transformers
from conftest import COMPILED, PYTHON, ROOT, SHARED, write_shard

from lib import corpora, tasks
from lib.prepare import write_dataset
from lib.tokenizers import ByteTokenizer, CharTokenizer, GPT2Tokenizer, train_bpe
from model import GPT, GPTConfig

PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
MAIN = 'config/train_shakespeare_char.py'
COMMIT = 'c0ffee' + '0' * 34   # of the corpora in the hub's cache
FIRST_BLOCK = ['pip install -r requirements.txt', f'python train.py {MAIN}',
               'python sample.py --start "ROMEO:"']
# Commands that are tested elsewhere: .ci/run runs pip, and tests/test_docs.py the tour.
# lm_eval is a package of its own, and was tried by hand.
ELSEWHERE = ('pip ', 'export ', 'python docs/tour.py', 'lm_eval ')


# ---- the commands of the pages -------------------------------------------------------------------

def blocks(page, language):
    """Return the texts of a page's blocks that are marked with a language."""
    text = page.read_text(encoding='utf-8')
    return re.findall(rf'^```{language}\n(.*?)\n```$', text, re.S | re.M)


def shown_commands():
    """Return the commands of all pages in their order, each one once."""
    found = []
    for page in PAGES:
        for block in blocks(page, 'sh'):
            lines = re.sub(r' *\\\n *', ' ', block).splitlines()   # a backslash continues a line
            found += [line.partition('   # ')[0].strip() for line in lines]
    return list(dict.fromkeys(found))


@dataclass
class Command:
    """A command as the tests run it, with stand-ins for what a reader has."""
    script: str                 # 'train.py'
    flags: list                 # what follows it
    stdin: str = None           # what `echo ... |` sends it
    environment: dict = field(default_factory=dict)   # the variables set in front of it


def parsed(line):
    """Return a line of a page as a Command; fail for a line that does not run a script."""
    line = stood_in(line.removesuffix(' 2>&1 | tee log.txt'))
    before, _, line = line.rpartition(' | ')
    words = shlex.split(line)
    environment = {}
    while '=' in words[0]:
        name, _, value = words.pop(0).partition('=')
        environment[name] = value
    assert words[0] == 'python', f'{line}: say in this file how to test such a command'
    stdin = shlex.split(before)[1] + '\n' if before else None
    return Command(words[1], words[2:], stdin, environment)


def stood_in(line):
    """Return a line with the stand-ins for what the pages name and the test's folder lacks."""
    for name, stand_in in {
            'TIKTOKEN_CACHE_DIR=tiktoken': f'TIKTOKEN_CACHE_DIR={SHARED / "tiktoken"}',
            '../nanoGPT/data': 'data',
            '../nanoGPT': 'nanogpt',
            'HOST1': '127.0.0.1',
            'nproc_per_node=8': 'nproc_per_node=2'}.items():
        line = line.replace(name, str(stand_in))
    return line


RUN_HERE = [line for line in shown_commands() if not line.startswith(ELSEWHERE)]
ON_RANKS = [line for line in RUN_HERE if 'torchrun' in line]
ALONE = [line for line in RUN_HERE if 'torchrun' not in line]


def test_each_script_is_shown():
    """A page has a command of each script, and each line is one that these tests know."""
    scripts = set()
    for path in ROOT.glob('*.py'):
        if re.search(r'^(\w+, \w+ = )?configure\(globals', path.read_text(encoding='utf-8'), re.M):
            scripts.add(path.name)
    scripts.remove('bench_step.py')   # bench.py's, not a reader's
    assert scripts <= set(' '.join(RUN_HERE).split())
    for line in ALONE:
        assert parsed(line).script in BUDGET, line


def test_the_first_commands_are_there_verbatim():
    """The first block of the front page is what a newcomer copies, and what .ci/run runs."""
    assert blocks(ROOT / 'README.md', 'sh')[0].splitlines() == FIRST_BLOCK


def test_pip_installs_what_the_requirements_name():
    """Files that pip reads exist, and a version on a page is the version that is required."""
    required = (ROOT / 'requirements.txt').read_text(encoding='utf-8').split()
    lines = [line for line in shown_commands() if line.startswith('pip ')]
    assert lines
    for line in lines:
        words = line.partition('&&')[0].split()[2:]
        for flag, word in zip(['', *words], words):
            if flag == '-r':
                assert (ROOT / word).exists(), line
            if '==' in word:
                assert word in required, line


def test_what_the_front_page_shows_was_printed():
    """Each line of printed text on the front page is in a file under results/."""
    logs = []
    for path in sorted((ROOT / 'results').rglob('*')):
        if path.suffix in ('.txt', '.log', '.md'):
            logs.append(path.read_text(encoding='utf-8'))
    logs = '\n'.join(logs)
    shown = '\n'.join(blocks(ROOT / 'README.md', 'text')).splitlines()
    assert shown
    for line in shown:
        assert line in logs, line


# ---- a place to run them in ----------------------------------------------------------------------

NANOGPT = '''
import torch
from dataclasses import dataclass
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
        self.wte = torch.nn.Embedding(config.vocab_size, 8)
    def forward(self, x, y):
        return None, self.wte(x).square().mean()
    def generate(self, idx, n):
        return torch.cat((idx, idx[:, -1:]), 1)
    def configure_optimizers(self, decay, rate, betas, device):
        return torch.optim.AdamW(self.parameters(), lr=rate)
'''


def write_datasets(folder, text):
    """Write a small dataset for each name that the pages' commands train on."""
    characters = CharTokenizer((SHARED / 'tinyshakespeare.txt').read_text(encoding='utf-8'))
    tokenizers = dict(
        shakespeare_char=characters, shakespeare_byte=ByteTokenizer(), shakespeare=GPT2Tokenizer(),
        openwebtext=GPT2Tokenizer(), enwik8=ByteTokenizer(), enwik8_gpt2=GPT2Tokenizer(),
        shakespeare_bpe=train_bpe([text], 300), tinystories=ByteTokenizer(), mine=characters)
    for name, tokenizer in tokenizers.items():
        parts = dict(train=text[:24000], val=text[24000:27000])
        if 'enwik8' in name:
            parts['test'] = text[27000:]
        splits = {}
        for split, part in parts.items():
            splits[split] = [(tokenizer.encode(part), len(part))]
        source = dict(name=name, url=None, sha256='', stand_in=False)
        write_dataset(str(folder / name), splits, tokenizer, source)
    (folder / 'fineweb').mkdir()
    for name, part in (('train_000001', text[:24000]), ('val_000000', text[24000:27000])):
        write_shard(folder / f'fineweb/fineweb_{name}.bin', GPT2Tokenizer().encode(part))
    return characters


def many_words():
    """Return words with enough different pairs for the documents' largest BPE."""
    letters = random.Random(1).choices('abcdefghijklmnop ', k=12_000)
    return ''.join(letters)


def write_corpora(hub, monkeypatch):
    """Write shards and stories where huggingface_hub's cache has what it downloads."""
    for name, corpus in list(corpora.CORPORA.items()):
        here = replace(corpus, revision=COMMIT, sha256={})
        monkeypatch.setitem(corpora.CORPORA, name, here)
        folder = hub / f'datasets--{corpus.repo.replace("/", "--")}/snapshots/{COMMIT}'
        folder.mkdir(parents=True)
        for number in range(1, corpus.shards + 1):
            write_shard(folder / corpus.train.format(number), range(40))
        if corpus.shards:
            write_shard(folder / corpus.val, range(40))
        else:
            for file in (corpus.train, corpus.val):
                story = f'{many_words()}\n<|endoftext|>\nOnce there was a cat.\n'
                (folder / file).write_text(story)


def write_benchmarks(folder, monkeypatch):
    """Write a small file of each benchmark where evaluate.py keeps the published one."""
    items = dict(hellaswag=dict(ctx='A cat', endings=['sat.', 'ran.', 'ate.', 'was.'], label=1),
                 lambada=dict(text='A cat sat on the mat'))
    for task, known in list(tasks.TASKS.items()):
        body = 3 * (json.dumps(items[task]) + '\n')
        path = folder / task / known.url.rpartition('/')[2]
        path.parent.mkdir()
        path.write_text(body)
        here = replace(known, sha256=hashlib.sha256(body.encode()).hexdigest())
        monkeypatch.setitem(tasks.TASKS, task, here)


def write_gpt2s(home):
    """Write a tiny GPT-2 into a folder, and into the hub's cache under two names."""
    torch.manual_seed(0)
    shape = transformers.GPT2Config(n_layer=1, n_head=1, n_embd=8, n_positions=1024)
    transformers.GPT2LMHeadModel(shape).save_pretrained(home / 'gpt2-folder')
    for name in ('gpt2', 'distilgpt2'):
        shutil.copytree(home / 'gpt2-folder', home / f'hub/models--{name}/snapshots/abc')
        (home / f'hub/models--{name}/refs').mkdir()
        (home / f'hub/models--{name}/refs/main').write_text('abc')


def write_nanogpt_checkpoint(path, vocab_size):
    """Write a checkpoint as nanoGPT's train.py writes it: without a vocabulary."""
    shape = dict(n_layer=2, n_head=2, n_embd=16, block_size=64, bias=True, vocab_size=vocab_size,
                 dropout=0.0)
    content = dict(model=GPT(GPTConfig(**shape)).state_dict(), optimizer={}, model_args=shape,
                   iter_num=1, best_val_loss=torch.tensor(3.0),
                   config=dict(dataset='shakespeare_char'))
    torch.save(content, path)


@pytest.fixture(scope='session')
def home(tmp_path_factory):
    """The folder of somebody who has used the project for a while: data, runs, GPT-2; all small."""
    if not (SHARED / 'tinyshakespeare.txt').exists() or not (SHARED / 'tiktoken').exists():
        pytest.skip('no local copy of the texts; set SHARED_DATA to a folder that holds them')
    home = tmp_path_factory.mktemp('home')
    text = (SHARED / 'tinyshakespeare.txt').read_text(encoding='utf-8')[:30000]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('TIKTOKEN_CACHE_DIR', str(SHARED / 'tiktoken'))
        characters = write_datasets(home / 'data', text)
    for name in ('book.txt', 'input.txt', 'texts/one.txt', 'texts/two.md'):
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_text(text[:8000])
    (home / 'prompt.txt').write_text('ROMEO:')
    beginning = '<mediawiki xmlns="' + text   # by which prepare_enwik8.py knows enwik8
    (home / 'enwik8_head.gz').write_bytes(gzip.compress(beginning.encode()))
    (home / 'nanogpt').mkdir()
    (home / 'nanogpt/model.py').write_text(NANOGPT)
    write_gpt2s(home)
    write_nanogpt_checkpoint(home / 'ckpt.pt', characters.vocab_size)
    small = ['--n_layer=2', '--n_head=4', '--n_embd=16', '--max_iters=2', '--eval_iters=1',
             '--device=cpu']
    for config in (MAIN, 'config/train_enwik8.py'):
        command = [PYTHON, str(ROOT / 'train.py'), str(ROOT / config), *small]
        subprocess.run(command, cwd=home, check=True, timeout=120)
    shutil.copytree(home / 'out', home / 'out-mine')
    shutil.copytree(home / 'out', home / 'out-speedrun')
    shutil.copytree(home / 'out', home / 'out-shakespeare')
    shutil.copytree(home / 'out', home / 'out-tinystories')
    shutil.copytree(home / 'gpt2-folder', home / 'exported')
    return home


@pytest.fixture
def place(home, tmp_path, monkeypatch):
    """A copy of that home to run a command in, with the environment that it needs."""
    import huggingface_hub.constants
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(SHARED / 'tiktoken'))
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    return tmp_path


# ---- on one process ------------------------------------------------------------------------------

BUDGET = {   # the flags that keep a script's commands short
    'train.py': ['--max_iters=2', '--eval_iters=1', '--device=cpu'],
    'sample.py': ['--max_new_tokens=20', '--device=cpu'],
    'evaluate.py': ['--device=cpu', '--compile=False'],
    'analyze.py': ['--device=cpu', '--tokens=16', '--windows=2'],
    'export_hf.py': [],
    'export_web.py': [],
    'prepare_shakespeare.py': ['--input=book.txt'],
    'prepare_text.py': [],
    'prepare_corpus.py': [],
    'prepare_enwik8.py': ['--data_dir=more', '--input=enwik8_head.gz', '--partial'],
    'ablate.py': ['--device=cpu', '--seeds=1', '--variants=1 head',
                  '--flags=--n_layer=1 --n_embd=8 --max_iters=2 --eval_iters=1'],
    'bench.py': ['--device=cpu', '--net=0.8M', '--dtype=float32'],
    'first_principles.py': ['--max_iters=2', '--max_new_tokens=20'],
}
QUIET = ('train.py', 'prepare_shakespeare.py', 'prepare_text.py', 'prepare_enwik8.py',
         'export_hf.py', 'export_web.py', 'prepare_corpus.py',
         'bench.py')   # scripts that may print no result
TINY = ['--n_layer=1', '--n_head=1', '--n_embd=8', '--block_size=64']
FOR_A_GPU = ('config/train_enwik8_gpt2.py', 'config/train_gpt2.py',   # configs of a large model
             'config/speedrun_fineweb.py')


def within_budget(command):
    """Return a command's flags and those that keep it short."""
    flags = command.flags + BUDGET[command.script]
    if command.script == 'train.py':
        flags += few_sequences(flags)
        if flags[0] in FOR_A_GPU:
            flags += [*TINY, '--gradient_accumulation_steps=1']
        if '--device=cuda' in flags:
            flags.remove('--device=cpu')
    if command.script == 'bench.py' and 'train' in flags:
        flags += ['--quick']
    elif command.script == 'bench.py':
        flags += ['--tokens=4', '--runs=1', '--context=8', '--batch=1', '--compile=False']
    if command.script == 'ablate.py' and '--report' in flags:
        flags.remove(BUDGET['ablate.py'][-1])   # the results are those of the real setting
    if command.script == 'export_hf.py':
        flags += ['--to=new-folder']
    return flags


def few_sequences(flags):
    """Return flags for small batches. Only commands that run a config unchanged print samples."""
    more = []
    if not any(flag.startswith('--batch_size') for flag in flags):
        more.append('--batch_size=2')
    if flags[0].startswith('config/') and len(flags) > 1 + len(BUDGET['train.py']):
        more.append('--sample_interval=0')
    return more


def compiled_together(line):
    """Return a line as a parameter; those that compile run in one of pytest's workers."""
    return pytest.param(line, marks=COMPILED if line.endswith('--compile') else [])


# the line that compiles takes the longest, and comes first so that the other worker has the rest
LONGEST_FIRST = sorted(ALONE, key=lambda line: not line.endswith('--compile'))


@pytest.mark.pictures
@pytest.mark.parametrize('line', [compiled_together(line) for line in LONGEST_FIRST])
def test_command(place, script, line, recwarn, monkeypatch):
    """A command of one process works and warns of nothing."""
    command = parsed(line)
    flags = within_budget(command)
    for name, value in command.environment.items():
        monkeypatch.setenv(name, value)
    if '--report' in flags:
        shutil.copytree(ROOT / 'results/ablations', place / 'results/ablations')
    if command.script == 'prepare_corpus.py':
        write_corpora(place / 'hub', monkeypatch)
    if any(flag.startswith('--task=') for flag in flags):
        write_benchmarks(place / 'data', monkeypatch)
    result = script(command.script, *flags, stdin=command.stdin)
    if '--device=cuda' in flags and not torch.cuda.is_available():
        assert result.code == 2 and 'it has' in result.err   # the error says what there is
        return
    assert result.code == 0, result.err
    assert 'Warning' not in result.err and 'Traceback' not in result.err, result.err
    # a file that an earlier test left open is collected in this one
    warnings = [warning for warning in recwarn if warning.category is not ResourceWarning]
    assert not warnings, [str(warning.message) for warning in warnings]
    assert result.out or command.script in QUIET, result.err


# ---- on several ranks ----------------------------------------------------------------------------

RANKS_BUDGET = ['--max_iters=2', '--eval_iters=1', '--device=cpu', '--batch_size=2', '--n_layer=1']


def put_first_on_path(place, programs):
    """Write shell scripts, {name: what it does}, into a folder; return PATH with it in front."""
    folder = place / 'bin'
    folder.mkdir()
    for name, does in programs.items():
        (folder / name).write_text(f'#!/bin/sh\n{does}\n')
        (folder / name).chmod(0o755)
    return f'{folder}:{Path(sys.executable).parent}:{os.environ["PATH"]}'


def shell_line(line, port):
    """Return the line for a shell, with a small budget and ranks on this machine alone."""
    line = stood_in(line).replace('29500', str(port))
    line = re.sub(r' (train|evaluate)\.py', rf' {ROOT}/\1.py', line)
    line = line.replace(' config/', f' {ROOT}/config/')
    if '--nnodes=2' in line:   # a rank on each
        line = line.replace('--nproc_per_node=2', '--nproc_per_node=1')
    if '--rdzv_endpoint' in line:   # the name of this machine may not lead to it
        line = line.replace('torchrun ', 'torchrun --local_addr=127.0.0.1 ')
    if 'evaluate.py' in line:
        return line
    if 'train_gpt2.py' in line:
        line += ' --n_head=1 --n_embd=8 --block_size=16'
    return ' '.join([line, *RANKS_BUDGET])


@pytest.mark.parametrize('line', ON_RANKS)
def test_command_for_several_ranks(place, line):
    """A command runs on two ranks; the one for two machines is started twice.

    The first command is torchrun's, and its ranks start afresh. For the others PYTHON runs the same
    torchrun. srun and scontrol are stand-ins for Slurm's."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    programs = dict(srun='exec "$@"', scontrol='echo 127.0.0.1')
    if line != ON_RANKS[0]:
        programs['torchrun'] = f'exec {PYTHON} {Path(sys.executable).parent / "torchrun"} "$@"'
    environment = dict(os.environ, PATH=put_first_on_path(place, programs), OMP_NUM_THREADS='1',
                       SLURM_NNODES='1', SLURM_JOB_ID='7', SLURM_JOB_NODELIST='here')
    words = ['bash', '-c', shell_line(line, port)]
    agents = []
    for _ in range(2 if '--nnodes=2' in line else 1):
        agents.append(subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                       text=True, env=environment))
    try:
        printed = [agent.communicate(timeout=120) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0] * len(agents), printed
    text = ''.join(out + err for out, err in printed)
    if 'evaluate.py' in line:
        assert text.count('nats_per_token') == 1, text   # by rank 0 alone
    else:
        assert 'done: 2 steps' in text and ' on 2 ranks' in text, text
    # At the start of a line: an agent whose host left first logs a traceback of its own, behind a
    # date, and exits with 0.
    assert not re.search('^Traceback', text, re.M), text
