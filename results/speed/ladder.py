"""
The ladder of results/speed.md: what each way to train faster is worth, in seconds and in loss.

    python results/speed/ladder.py 10.65M > results/speed/ladder-10.65M.txt   # 124M, 0.8M, main
    python results/speed/ladder.py steps > results/speed/ladder-steps.txt

The first command measures a net's step with one way after the other added, and with each left out.
Every measurement has a process of its own, and three rounds are made in turns. The second command
counts losses instead of seconds: it trains the 0.8M net for 120 steps with three seeds, each time
without one part of the recipe, and takes the loss on the whole validation split.

Run it where data/shakespeare_char is.
"""
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field

HERE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, HERE)

NETS = {   # nanoGPT's settings, but for the main job
    '124M': dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50257),
    '10.65M': dict(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=65, dropout=0.2),
    '0.8M': dict(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=65),
    'main': dict(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=65),
}
BATCH = {'124M': 1, '10.65M': 16, '0.8M': 32, 'main': 32}   # sequences in a step
STEPS = {'124M': 2, '10.65M': 3, '0.8M': 40, 'main': 40}    # steps in a measurement
WARM_UP = 2   # steps before those: they allocate
ROUNDS = 3
# the ways of lib/fast.py, lib/runtime.py and lib/optimizers.py, in the order of the ladder
WAYS = ('onednn', 'bf16', 'attention', 'dropout', 'gelu', 'memory', 'loss', 'vocabulary', 'muon',
        'polar')
UNUSED = {   # ways that change nothing for a net
    '124M': ('dropout', 'gelu', 'muon', 'polar'),
    '10.65M': ('loss', 'gelu', 'vocabulary', 'muon', 'polar'),
    '0.8M': ('dropout', 'gelu', 'loss', 'vocabulary'),
    'main': ('dropout', 'loss', 'vocabulary'),
}

SEEDS = (1, 2, 3)
SMALL = ('--n_layer=4 --n_head=2 --n_embd=128 --block_size=64 --batch_size=32 '
         '--learning_rate=2e-2 --max_iters=120 --eval_interval=1000 --eval_iters=1 '
         '--target_loss=0 --out_dir=out-ladder').split()
PARTS = {   # parts of the recipe, and the flags that undo them
    'rope': '--pos=learned',
    'qk_norm': '--qk_norm=False',
    'relu2': '--activation=gelu',
    'zero_init': '--zero_init=False',
    'untied head': '--tie_weights=True',
    'linear cooldown': '--cooldown=0',
    'no biases': '--bias=True',
    'muon': '--optimizer=adamw',
}


# ---- seconds: one measurement, in a process of its own -------------------------------------------

def measure(net, ways):
    """Print the seconds of a training step with these ways, the median of some."""
    import torch

    from lib import fast
    torch.manual_seed(1)
    torch.set_float32_matmul_precision('medium' if 'onednn' in ways else 'highest')
    if 'memory' in ways:
        fast.keep_memory()
    step = make_step(net, ways)
    T = NETS[net]['block_size']
    idx = torch.randint(65, (BATCH[net], T + 1))
    x = idx[:, :-1].contiguous()                                          # (B, T)
    y = idx[:, 1:].contiguous()                                           # (B, T)
    times = []
    for _ in range(WARM_UP + STEPS[net]):
        started = time.perf_counter()
        step([(x, y)])
        times.append(time.perf_counter() - started)
    print(statistics.median(times[WARM_UP:]))


def make_step(net, ways):
    """Return a training step of a net."""
    import torch

    from lib import fast
    from lib.optimizers import TrainingStep
    model = make_model(net, ways)
    loss_of = fast.TrainingLoss(model, lean='loss' in ways)
    precision = 'bfloat16' if 'bf16' in ways else 'float32'
    scaler = torch.amp.GradScaler('cpu', enabled=False)
    optimizers = make_optimizers(model, net, ways)
    return TrainingStep(model, loss_of, optimizers, scaler, 1.0, 'cpu', precision)


def make_model(net, ways):
    """Return the GPT of a net with some of lib/fast.py's ways."""
    import torch

    from lib import fast
    from model import GPT, GPTConfig
    shape = dict(NETS[net])
    if 'vocabulary' in ways:   # rounded up to a multiple of 64
        shape['vocab_size'] = -(-shape['vocab_size'] // 64) * 64
    if net == 'main':   # GPT-2's biases and GELU
        config = GPTConfig(**shape)
    else:
        config = GPTConfig(**shape, bias=False, activation='gelu_erf')
    model = GPT(config)
    if 'attention' in ways:
        model.set_attention(fast.attend_in_training)
    if 'gelu' in ways:
        model.set_activation(fast.gelu)
    if 'dropout' in ways:
        model.set_dropout(fast.Dropout)
    else:
        # fast.attend_in_training draws its masks with fast.kept. This process measures the state
        # before fast.kept was written, which is not in the code any more.
        def bernoulli(shape, p, dtype, generator=None):
            return torch.empty(shape, dtype=dtype).bernoulli_(1 - p)
        fast.kept = bernoulli
    return model


def make_optimizers(model, net, ways):
    """Return AdamW for the two larger nets, Muon with AdamW for the small ones."""
    import torch

    from lib import optimizers
    if net in ('124M', '10.65M'):
        return optimizers.Optimizers(model, 'adamw', (1e-3, 0.02), 0.1, (0.9, 0.95))
    if 'polar' not in ways:   # torch.optim.Muon's polynomials, the state before POLAR was found
        optimizers.POLAR = ((3.4445, -4.775, 2.0315),) * 5
    made = optimizers.Optimizers(model, 'muon', (1e-3, 0.02), 0.1, (0.9, 0.95))
    if 'muon' not in ways:
        _, muon = made.all
        made.all[1] = torch.optim.Muon(muon.param_groups[0]['params'], lr=0.02)
    return made


# ---- seconds: the ladder -------------------------------------------------------------------------

@dataclass
class Rung:
    """A set of ways, and the seconds of a step that its processes have measured."""
    name: str
    ways: list
    seconds: list = field(default_factory=list)

    @property
    def median(self):
        return statistics.median(self.seconds)


def ways_for(net):
    """Return the ways to measure, in the order of the ladder."""
    from lib import runtime
    ways = [way for way in WAYS if way not in UNUSED[net]]
    if 'bf16' in ways and not runtime.cpu_has_bf16():
        ways.remove('bf16')
    if net == 'main':
        # torch's own Muon multiplies in bf16. Where that is emulated it takes most of a step, and
        # hides what the other ways are worth.
        for way in ('polar', 'muon'):
            ways.remove(way)
            ways.insert(0, way)
    return ways


def in_turns(net):
    """Print the ladder of a net."""
    ways = ways_for(net)
    ladder = [Rung('torch as it is', [])]
    for i, way in enumerate(ways):
        ladder.append(Rung('+ ' + way, ways[:i + 1]))
    left_out = []
    if net != '124M':   # a step of this net takes too long for more
        for way in ways[:-1]:
            left_out.append(Rung('all but ' + way, [other for other in ways if other != way]))
    for _ in range(ROUNDS):
        for rung in ladder + left_out:
            rung.seconds.append(measured(net, rung.ways))

    tokens = BATCH[net] * NETS[net]['block_size']
    print(f'{net}, {tokens:,} tokens a step: ms a step (of three runs), tokens/s, factor')
    print_rung(ladder[0], tokens, '')
    for before, rung in zip(ladder, ladder[1:]):
        print_rung(rung, tokens, f'{before.median / rung.median:.2f} on the one above')
    for rung in left_out:
        factor = rung.median / ladder[-1].median
        print_rung(rung, tokens, f'{factor:.2f} times as long as all')


def measured(net, ways):
    """Return the seconds of a step, measured in a fresh process."""
    command = [sys.executable, __file__, net, *ways, 'now']
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def print_rung(rung, tokens, factor):
    least = 1e3 * min(rung.seconds)
    most = 1e3 * max(rung.seconds)
    print(f'{rung.name:22} {1e3 * rung.median:8.1f} ({least:.1f} to {most:.1f}) '
          f'{tokens / rung.median:9,.0f}  {factor}')


# ---- losses: the parts of the recipe -------------------------------------------------------------

def in_steps():
    """Print the loss after 120 steps without each part of the recipe."""
    variants = {'all': []}
    for part, flag in PARTS.items():
        variants[f'all but {part}'] = [flag]
    variants['all but muon, AdamW 4e-3'] = ['--optimizer=adamw', '--learning_rate=4e-3']
    variants['none: GPT-2, AdamW 4e-3'] = [*PARTS.values(), '--learning_rate=4e-3']
    print('the 0.8M net, 120 steps of 2,048 characters: validation loss, mean of 3 seeds (sd)')
    for name, changes in variants.items():
        losses = [trained_loss(changes, seed) for seed in SEEDS]
        print(f'{name:26} {statistics.mean(losses):.4f} ({statistics.stdev(losses):.4f})',
              flush=True)


def trained_loss(changes, seed):
    """Train a variant of the recipe; return its loss on the whole validation split."""
    command = [sys.executable, 'train.py', 'config/speedrun_shakespeare_char.py', *SMALL, *changes,
               f'--seed={seed}']
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE)
    return float(re.findall(r'val loss ([\d.]+)', done.stderr)[-1])


# ---- the story -----------------------------------------------------------------------------------

if sys.argv[-1] == 'now':   # typed by measured()
    measure(sys.argv[1], sys.argv[2:-1])
elif sys.argv[1:] == ['steps']:
    in_steps()
else:
    in_turns(sys.argv[1])
