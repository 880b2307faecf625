"""
The ladder of results/speed.md: what each way of fast.py and runtime.set_up is worth, one upon the other and each left out.

    python results/speed/ladder.py 10.65M > results/speed/ladder-10.65M.txt      # also 124M, 0.8M, main
    python results/speed/ladder.py steps > results/speed/ladder-steps.txt        # steps instead of seconds: the recipe's parts

The first form measures steps in fresh processes, three rounds in turns; the second trains the 0.8M net for 120 steps with
three seeds, all parts of the recipe but one, on the whole validation split. Run where data/shakespeare_char is.
"""
import os
import re
import statistics
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, HERE)
WAYS = ('onednn', 'bf16', 'attention', 'dropout', 'gelu', 'memory', 'loss', 'vocabulary', 'muon', 'polar')
UNUSED = {'124M': ('dropout', 'gelu', 'muon', 'polar'), '10.65M': ('loss', 'gelu', 'vocabulary', 'muon', 'polar'),
          '0.8M': ('dropout', 'gelu', 'loss', 'vocabulary'), 'main': ('dropout', 'loss', 'vocabulary')}
NETS = {'124M': dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50257, batch=1),
        '10.65M': dict(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=65, batch=16, dropout=0.2),
        '0.8M': dict(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=65, batch=32)}
NETS['main'] = NETS['0.8M']   # the main job's, with biases and GPT-2's GELU; the others have nanoGPT's settings


def measure(net, ways):
    """Seconds of a step with these ways, the median of some; run in a process of its own."""
    import torch

    from lib import fast, optimizers
    from model import GPT, GPTConfig
    torch.manual_seed(1)
    torch.set_float32_matmul_precision('medium' if 'onednn' in ways else 'highest')
    if 'memory' in ways:
        fast.keep_memory()
    shape = dict(NETS[net])
    B, T, share = shape.pop('batch'), shape['block_size'], shape.pop('dropout', 0.0)
    if 'vocabulary' in ways:
        shape['vocab_size'] = -(-shape['vocab_size'] // 64) * 64
    main = net == 'main'
    model = GPT(GPTConfig(**shape, dropout=share, bias=main, activation='gelu' if main else 'gelu_erf'))
    if 'attention' in ways:
        model.set_attention(fast.attend)
    if 'gelu' in ways:
        model.set_activation(fast.gelu)
    if 'dropout' in ways:
        model.set_dropout(fast.Dropout)
    else:
        fast.kept = lambda shape, p, dtype, generator=None: torch.empty(shape, dtype=dtype).bernoulli_(1 - p)
    loss_of = fast.TrainingLoss(model, lean='loss' in ways)
    name = 'muon' if net in ('0.8M', 'main') else 'adamw'
    made = optimizers.Optimizers(model, name, (1e-3, 0.02), 0.1, (0.9, 0.95))
    if 'polar' not in ways:
        optimizers.POLAR = ((3.4445, -4.775, 2.0315),) * 5   # torch.optim.Muon's
    if made.parts and 'muon' not in ways:
        made.all[1] = torch.optim.Muon(made.all[1].param_groups[0]['params'], lr=0.02)
    dtype = 'bfloat16' if 'bf16' in ways else 'float32'
    scaler = torch.amp.GradScaler('cpu', enabled=False)
    step = optimizers.TrainingStep(model, loss_of, made, scaler, 1.0, 'cpu', dtype)
    idx = torch.randint(65, (B, T + 1))
    times = []
    for _ in range(2 + {'124M': 2, '10.65M': 3, '0.8M': 40, 'main': 40}[net]):   # the first two allocate
        started = time.perf_counter()
        step([(idx[:, :-1].contiguous(), idx[:, 1:].contiguous())])
        times.append(time.perf_counter() - started)
    print(statistics.median(times[2:]))


def in_turns(net):
    from lib import runtime
    ways = [way for way in WAYS if way not in UNUSED[net] and (way != 'bf16' or runtime.cpu_has_bf16())]
    if net == 'main':   # torch's own Muon multiplies in bf16, which takes most of a step where bf16 is emulated
        ways = ['muon', 'polar', *(way for way in ways if way not in ('muon', 'polar'))]
    rungs = [('torch as it is', [])] + [('+ ' + way, ways[:i + 1]) for i, way in enumerate(ways)]
    if net != '124M':   # whose steps take long
        rungs += [('all but ' + way, [other for other in ways if other != way]) for way in ways[:-1]]
    seconds = [[] for _ in rungs]
    for _ in range(3):
        for (_, taken), found in zip(rungs, seconds):
            done = subprocess.run([sys.executable, __file__, net, *taken, 'now'], capture_output=True, text=True, check=True)
            found.append(float(done.stdout.split()[-1]))
    medians = [statistics.median(found) for found in seconds]
    tokens = NETS[net]['batch'] * NETS[net]['block_size']
    print(f'{net}, {tokens:,} tokens a step: ms a step (of three runs), tokens/s, factor')
    for i, ((name, _), median, found) in enumerate(zip(rungs, medians, seconds)):
        factor = '' if not i else f'{medians[i - 1] / median:.2f} on the one above' if i <= len(ways) else \
            f'{median / medians[len(ways)]:.2f} times as long as all'
        print(f'{name:22} {1e3 * median:8.1f} ({1e3 * min(found):.1f} to {1e3 * max(found):.1f}) {tokens / median:9,.0f}  '
              f'{factor}')


PARTS = {'rope': '--pos=learned', 'qk_norm': '--qk_norm=False', 'relu2': '--activation=gelu', 'zero_init': '--zero_init=False',
         'untied head': '--tie_weights=True', 'linear cooldown': '--cooldown=0', 'no biases': '--bias=True',
         'muon': '--optimizer=adamw'}


def in_steps():
    flags = '--n_layer=4 --n_head=2 --n_embd=128 --block_size=64 --batch_size=32 --learning_rate=2e-2 --max_iters=120 ' \
            '--eval_interval=1000 --eval_iters=1 --target_loss=0 --out_dir=out-ladder'.split()
    variants = {'all': []} | {f'all but {part}': [flag] for part, flag in PARTS.items()}
    variants['all but muon, AdamW 4e-3'] = ['--optimizer=adamw', '--learning_rate=4e-3']
    variants['none: GPT-2, AdamW 4e-3'] = [*PARTS.values(), '--learning_rate=4e-3']
    print('the 0.8M net, 120 steps of 2,048 characters: validation loss, mean of 3 seeds (sd)')
    for name, changes in variants.items():
        losses = []
        for seed in (1, 2, 3):
            done = subprocess.run([sys.executable, 'train.py', 'config/speedrun_shakespeare_char.py', *flags, *changes,
                                   f'--seed={seed}'], capture_output=True, text=True, check=True, cwd=HERE)
            losses.append(float(re.findall(r'val loss ([\d.]+)', done.stderr)[-1]))
        print(f'{name:26} {statistics.mean(losses):.4f} ({statistics.stdev(losses):.4f})', flush=True)


if sys.argv[-1] == 'now':
    measure(sys.argv[1], sys.argv[2:-1])
elif sys.argv[1:] == ['steps']:
    in_steps()
else:
    in_turns(sys.argv[1])
