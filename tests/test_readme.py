"""Every command of README.md, with a small budget and without a network. pytest tests/test_readme.py"""
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import COMPILED, PYTHON, ROOT, SHARED

from lib.prepare import write_dataset
from lib.tokenizers import ByteTokenizer, CharTokenizer, GPT2Tokenizer
from model import GPT, GPTConfig

README = (ROOT / 'README.md').read_text(encoding='utf-8')
MAIN = 'config/train_shakespeare_char.py'


def commands():
    """What a reader copies: lines of code, and of each table cell the commands; what begins with -- belongs to the first of its
    cell. pip's lines are run by .ci/run."""
    found = [line for block in re.findall(r'^```\n(.*?)^```', README, re.S | re.M) for line in block.splitlines()]
    for row in re.findall(r'^\|.*\|$', README, re.M):
        for cell in re.split(r'(?<!\\)\|', row):
            first = None
            for span in re.findall(r'`([^`]+)`', cell.replace('\\|', '|')):
                if re.match(r'(python|torchrun|srun|echo) ', span):
                    first = first or span
                    found.append(span)
                elif span.startswith('--') and first:
                    found.append(f'{first} {span}')
    return list(dict.fromkeys(line for line in found if re.match(r'(python|torchrun|srun|echo) ', line)))


def test_commands_are_found():
    """Of every script a command, and in each fenced block and table what a reader would see there."""
    found = commands()
    scripts = {path.name for path in ROOT.glob('*.py') if re.search(r'^(\w+, \w+ = )?configure\(globals', path.read_text(), re.M)}
    assert scripts - {'bench_step.py'} <= {word for command in found for word in command.split()}
    assert f'python train.py {MAIN}' in found and 'python sample.py --start "ROMEO:"' in found
    assert 'python evaluate.py --stride=16' in found and 'echo "ROMEO:" | python sample.py --start=-' in found
    assert len(found) > 70 and sum('torchrun' in command for command in found) >= 7


# ---- a place to run them in ----------------------------------------------------------------------------------------

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


@pytest.fixture(scope='session')
def home(tmp_path_factory):
    """A folder as somebody has it who has worked with this for a while: data, a run, GPT-2 in the hub's cache; all small."""
    if not (SHARED / 'tinyshakespeare.txt').exists() or not (SHARED / 'tiktoken').exists():
        pytest.skip('no local copy of the texts; set SHARED_DATA to a folder that holds them')
    home = tmp_path_factory.mktemp('home')
    text = (SHARED / 'tinyshakespeare.txt').read_text(encoding='utf-8')
    alphabet, text = ''.join(sorted(set(text))), text[:30000]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('TIKTOKEN_CACHE_DIR', str(SHARED / 'tiktoken'))
        for name, tokenizer in dict(shakespeare_char=CharTokenizer(alphabet), shakespeare=GPT2Tokenizer(), shakespeare_byte=ByteTokenizer(), enwik8=ByteTokenizer(),
                                    enwik8_gpt2=GPT2Tokenizer()).items():
            parts = dict(train=text[:24000], val=text[24000:27000], test=text[27000:])
            write_dataset(str(home / 'data' / name), {split: [(tokenizer.encode(part), len(part))] for split, part in parts.items()
                                                      if split != 'test' or 'enwik8' in name}, tokenizer,
                          dict(name=name, url=None, sha256='', stand_in=False))
    (home / 'short.txt').write_text(text[:8000])
    (home / 'prompt.txt').write_text('ROMEO:')
    (home / 'nanogpt').mkdir()
    (home / 'nanogpt/model.py').write_text(NANOGPT)
    small = ['--n_layer=2', '--n_head=4', '--n_embd=16', '--max_iters=2', '--eval_iters=1', '--device=cpu']
    for config in (MAIN, 'config/train_enwik8.py'):
        subprocess.run([PYTHON, str(ROOT / 'train.py'), str(ROOT / config), *small], cwd=home, check=True, timeout=120)
    torch.manual_seed(0)
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_head=1, n_embd=8, n_positions=1024))
    gpt2.save_pretrained(home / 'gpt2')
    for name in ('gpt2', 'distilgpt2'):
        shutil.copytree(home / 'gpt2', home / f'hub/models--{name}/snapshots/abc')
        (home / f'hub/models--{name}/refs').mkdir()
        (home / f'hub/models--{name}/refs/main').write_text('abc')
    # a checkpoint as nanoGPT's train.py writes it: without a vocabulary
    shape = dict(n_layer=2, n_head=2, n_embd=16, block_size=64, bias=True, vocab_size=len(alphabet), dropout=0.0)
    torch.save(dict(model=GPT(GPTConfig(**shape)).state_dict(), optimizer={}, model_args=shape, iter_num=1,
                    best_val_loss=torch.tensor(3.0), config=dict(dataset='shakespeare_char')), home / 'ckpt.pt')
    return home


BUDGET = {
    'train.py': ['--max_iters=2', '--eval_iters=1', '--device=cpu'], 'sample.py': ['--max_new_tokens=20', '--device=cpu'],
    'evaluate.py': ['--device=cpu'], 'analyze.py': ['--device=cpu', '--tokens=16', '--windows=2'], 'export_hf.py': [], 'export_web.py': [],
    'prepare_shakespeare.py': ['--input=short.txt'], 'prepare_text.py': [], 'prepare_enwik8.py': ['--data_dir=more'],
    'ablate.py': ['--device=cpu', '--seeds=1', '--variants=1 head', '--flags=--n_layer=1 --n_embd=8 --max_iters=2 --eval_iters=1'],
    'bench.py': ['--device=cpu', '--net=0.8M', '--dtype=float32']}


def filled_in(command):
    """A command with its capitals replaced and its budget cut."""
    for capitals, meant in {'enwik8.py --input=FILE': f'enwik8.py --input={SHARED / "enwik8_head.gz"}', 'FILE_OR_FOLDER': 'short.txt', 'input=FILE': 'input=short.txt', 'CONFIG': str(ROOT / MAIN), 'PATH': 'nanogpt',
                            'init_from=FOLDER': 'init_from=gpt2', 'data_dir=FOLDER': 'data_dir=data', 'to=FOLDER': 'to=exported', 'results=FOLDER': 'results=mine',
                            'nproc_per_node=8': 'nproc_per_node=2', ' train.py': f' {ROOT / "train.py"}'}.items():
        if 'torchrun' in command or capitals != ' train.py':
            command = command.replace(capitals, meant)
    left = re.findall(r'\b[A-Z]{4,}\b', re.sub(r'ROMEO|JULIET|FILE:|SLURM\w+', '', command))
    assert not left, f'{left} in {command}: say here what stands for it'
    return command


def few_sequences(flags):
    """Return flags for small batches. Only commands that run a config unchanged print samples."""
    more = []
    if not any(flag.startswith('--batch_size') for flag in flags):
        more.append('--batch_size=2')
    if flags[0].startswith('config/') and len(flags) > 1 + len(BUDGET['train.py']):
        more.append('--sample_interval=0')
    return more


@pytest.fixture
def place(home, tmp_path, monkeypatch):
    """A copy of that home to run a command in, with what it needs of an environment."""
    import huggingface_hub.constants
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(SHARED / 'tiktoken'))
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    return tmp_path


@pytest.mark.pictures
@pytest.mark.parametrize('command', [pytest.param(command, marks=COMPILED if command.endswith('--compile') else [])
                                     for command in commands() if 'torchrun' not in command])
def test_command(place, script, command, recwarn):
    given, _, words = filled_in(command).rpartition(' | ')
    name, *flags = shlex.split(words)[1:]
    flags += BUDGET[name]
    if name == 'train.py':
        flags += few_sequences(flags)
    if name == 'bench.py':
        flags += ['--quick'] if 'train' in flags else ['--tokens=4', '--runs=1', '--context=8', '--batch=1', '--compile=False']
    if name == 'ablate.py' and '--report' in flags:
        shutil.copytree(ROOT / 'results/ablations', place / 'results/ablations')
        flags.remove(BUDGET[name][-1])
    if 'config/train_enwik8_gpt2.py' in flags:   # a GPU's
        flags += ['--n_layer=1', '--n_head=1', '--n_embd=8', '--block_size=64', '--gradient_accumulation_steps=1']
    if '--device=cuda' in flags:
        flags.remove('--device=cpu')
    result = script(name, *flags, stdin=shlex.split(given)[1] if given else None)
    if '--device=cuda' in flags and not torch.cuda.is_available():   # the row says that it tells what there is
        assert result.code == 2 and 'it has' in result.err
        return
    assert result.code == 0, result.err
    assert 'Warning' not in result.err and 'Traceback' not in result.err, result.err
    # a file that an earlier test's script left open is collected in this one, and is no matter of the command
    assert not [str(warning.message) for warning in recwarn if warning.category is not ResourceWarning]
    assert result.out or name in ('train.py', 'prepare_shakespeare.py', 'prepare_text.py', 'prepare_enwik8.py', 'export_hf.py', 'export_web.py', 'bench.py'), result.err


SEVERAL_RANKS = [command for command in commands() if 'torchrun' in command]


@pytest.mark.parametrize('command', SEVERAL_RANKS)
def test_command_for_several_ranks(place, command):
    """As it stands, on two ranks; the line for two machines is started twice, srun and scontrol stand for Slurm's.

    The first command is torchrun's and its ranks' start afresh; for the others PYTHON runs the same torchrun."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    (place / 'bin').mkdir()
    stand_ins = dict(srun='exec "$@"', scontrol='echo 127.0.0.1')
    if command != SEVERAL_RANKS[0]:
        stand_ins['torchrun'] = f'exec {PYTHON} {Path(sys.executable).parent / "torchrun"} "$@"'
    for name, does in stand_ins.items():
        (place / 'bin' / name).write_text(f'#!/bin/sh\n{does}\n')
        (place / 'bin' / name).chmod(0o755)
    line = filled_in(command).replace('HOST1', '127.0.0.1').replace('29500', str(port))
    ranks = line.replace('--nproc_per_node=2', '--nproc_per_node=1') if '--nnodes=2' in line else line
    budget = ' --max_iters=2 --eval_iters=1 --device=cpu --batch_size=2 --n_layer=1' + ' --optimizer=adamw' * ('--shard' in line)
    if '--rdzv_endpoint' in line:   # of agents that find each other by name, which this machine's may not be
        ranks = ranks.replace('torchrun ', 'torchrun --local_addr=127.0.0.1 ')
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'SLURM_NNODES': '1', 'SLURM_JOB_ID': '7', 'SLURM_JOB_NODELIST': 'here',
                   'PATH': f'{place / "bin"}:{Path(sys.executable).parent}:{os.environ["PATH"]}'}
    agents = [subprocess.Popen(['bash', '-c', ranks + budget], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
              for _ in range(2 if '--nnodes=2' in line else 1)]
    try:
        said = [agent.communicate(timeout=120)[1] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0] * len(agents), said
    lines = ''.join(said).splitlines()
    assert 'done: 2 steps' in ''.join(said) and ' on 2 ranks' in ''.join(said), said
    # At the start of a line: an agent whose host left first logs a traceback of its own, behind a date, and exits with 0.
    assert not [line for line in lines if line.startswith('Traceback')], said


# ---- what else the page says ---------------------------------------------------------------------------------------

def test_links_and_shapes():
    """Every link leads to a file, and the shapes of the two paths are those of the main job's model."""
    for link in re.findall(r'\]\(([^)#]+)\)', README):
        assert (ROOT / link).exists(), link
    net = GPT(GPTConfig(block_size=64, vocab_size=65, n_layer=4, n_head=4, n_embd=128)).eval()
    seen, path = {}, README.partition('text to loss')[2].partition('```')[0]

    def note(name):
        return lambda module, args, out: seen.update({name: tuple(out.shape)})
    for name, module in net.named_modules():
        if name and not name.endswith(('.h', '.drop')):
            module.register_forward_hook(note(name))
    attend = net.transformer.h[0].attn.attention
    net.set_attention({0: lambda q, k, v, dropout: seen.update(q=tuple(q.shape)) or attend(q, k, v, dropout)})
    logits, loss = net(torch.zeros(32, 64, dtype=torch.long), torch.zeros(32, 64, dtype=torch.long))
    for line, names in {'wte + wpe': ['transformer.wte'], 'h.0.attn.c_attn': ['transformer.h.0.attn.c_attn', 'q'], 'attention ': ['q'],
                        'h.0.attn.c_proj': ['transformer.h.0.attn.c_proj'], 'h.0.mlp.c_fc': ['transformer.h.0.mlp.c_fc'],
                        'h.0.mlp.c_proj': ['transformer.h.0.mlp.c_proj'], 'ln_f': ['transformer.ln_f'], 'lm_head': ['lm_head']}.items():
        row = next(row for row in path.splitlines() if line in row)
        assert all(str(seen[name]) in row for name in names), (row, [seen[name] for name in names])
    assert logits.shape == (32, 64, 65) and loss.shape == ()
    caches = net.stream(torch.zeros(1, 6, dtype=torch.long), 2, temperature=0)
    assert next(caches).shape == (1, 1)


def test_model_py_alone(tmp_path):
    """Copied elsewhere, with torch alone, it trains, writes text, and reads what it saved."""
    shutil.copy(ROOT / 'model.py', tmp_path)
    alone = '''
import sys
sys.modules.update(dict.fromkeys(('numpy', 'transformers', 'tiktoken', 'matplotlib', 'requests', 'scipy')))   # an import of them fails
import torch, model
assert 'lib' not in sys.modules
net = model.GPT(model.GPTConfig(block_size=8, vocab_size=10, n_layer=1, n_head=2, n_embd=16))
x = torch.arange(8)[None]
optimizer = torch.optim.AdamW(net.optimizer_groups(0.1), lr=1e-2)
for _ in range(50):
    optimizer.zero_grad(); loss = net(x, x + 1)[1]; loss.backward(); optimizer.step()
assert loss < 0.5
assert net.generate(x[:, :1], 7, temperature=0).tolist() == x.tolist()
'''
    done = subprocess.run([sys.executable, '-c', alone], cwd=tmp_path, capture_output=True, text=True, timeout=120,
                          env={key: value for key, value in os.environ.items() if key != 'PYTHONPATH'})
    assert done.returncode == 0, done.stderr
