"""
Train a GPT: one straight story from knobs to a finished model.

    python train.py config/train_shakespeare_char.py                # the main job
    python train.py config/train_shakespeare_char.py --n_layer=8    # any knob can be overridden
    python train.py --init_from=resume                              # go on with the run in out_dir
    torchrun --standalone --nproc_per_node=8 train.py config/...    # one process a GPU (or a core)

Reads data/<dataset>/; writes last.pt, best.pt, log.csv, loss.png and config.json into out_dir.
"""
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, replace

import lib.early  # noqa: F401  # before NumPy and torch

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from lib import checkpoint, fast, plots, run_folder, runtime, starting
from lib.configurator import check, configure
from lib.console import counted, fail, say
from lib.data import Dataset, TrainingWindows, evaluation_batches
from lib.evaluation import mean_loss, shown_perplexity
from lib.optimizers import Optimizers, Schedule, TrainingStep
from lib.prepare import prepare_missing
from model import GPT

# ---- knobs ---------------------------------------------------------------------------------------
# the run
out_dir = 'out'              # folder of checkpoints and logs
init_from = 'scratch'        # 'scratch', 'resume' (out_dir/last.pt), 'gpt2', a hub name or a folder
eval_interval = 2000         # optimizer steps between evaluations, each followed by a save
eval_iters = 200             # batches of an evaluation; the last evaluation takes the whole split
eval_only = False            # evaluate the whole validation split and stop
always_save_checkpoint = True  # False: evaluations write last.pt only if the loss improved
checkpoint_interval = 0      # optimizer steps between further saves of last.pt; 0: none
checkpoint_minutes = 0.0     # minutes between further saves of last.pt; 0: none
log_interval = 1             # optimizer steps between log lines
sample_interval = 0          # optimizer steps between printed samples; 0: none
seed = 1337                  # decides weights, windows and dropout
deterministic = False        # bit-identical repeats on a GPU too, at some cost in speed
wandb_log = False            # log to Weights & Biases
wandb_project = 'gpt'        # project at Weights & Biases
wandb_run_name = 'gpt2'      # name of the run at Weights & Biases
tensorboard_log = False      # log to out_dir/tensorboard
# data
dataset = 'openwebtext'      # folder in data_dir
data_dir = 'data'            # where datasets live
prepare = ''                 # script and flags that make the dataset, run when it is missing
gradient_accumulation_steps = 40  # micro-steps per optimizer step, over all ranks together
batch_size = 12              # sequences per micro-step
block_size = 1024            # tokens of context
# model (GPTConfig in model.py)
n_layer = 12                 # blocks
n_head = 12                  # attention heads in a block
n_embd = 768                 # width
dropout = 0.0                # share of activations dropped
bias = True                  # biases in linears and norms
qkv_bias = True              # bias of the QKV projection
tie_weights = True           # the head is the token embedding
pos = 'learned'              # positions: 'learned', 'rope' or 'none'
norm = 'pre'                 # layer norm: 'pre', 'post' or 'none'
residual = True              # x + f(x), else f(x)
qk_norm = False              # normalise queries and keys
activation = 'gelu'          # 'gelu', 'gelu_erf' (nanoGPT's) or 'relu2'
zero_init = False            # residual branches and an untied head start at 0
flash = True                 # fused attention, else the explicit formula
label_smoothing = 0.0        # share of the target spread over the vocabulary, in training only
layer_drop = 0.0             # probability that a sequence skips a residual branch
grad_checkpointing = False   # recompute blocks in the backward pass: less memory, more time
# optimizer
optimizer = 'adamw'          # 'adamw', or 'muon' for the blocks' matrices and AdamW for the rest
learning_rate = 6e-4         # AdamW's peak
muon_learning_rate = 0.02    # Muon's peak; both follow the same schedule
max_iters = 600000           # optimizer steps
max_minutes = 0.0            # minutes of training after which the run ends, decayed; 0: no limit
target_loss = 0.0            # validation loss (nats per token) that ends the run; 0: none
weight_decay = 1e-1          # decoupled, on matrices only
beta1 = 0.9                  # AdamW's first
beta2 = 0.95                 # AdamW's second
grad_clip = 1.0              # largest gradient norm; 0: no clipping
decay_lr = True              # warm up and decay, else a constant rate
warmup_iters = 2000          # steps of linear warm-up
lr_decay_iters = None        # step at which the rate reaches min_lr; None: max_iters
cooldown = 0.0               # share of the steps with a linear fall at the end; 0: cosine
min_lr = 6e-5                # AdamW's rate at the end; Muon's ends at the same share of its peak
# machine
shard = False                # under torchrun: split parameters and optimizer over ranks (FSDP2)
backend = 'auto'             # torchrun's: 'nccl' on GPUs, 'gloo' elsewhere
device = 'auto'              # 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'auto'               # 'float32', 'bfloat16' or 'float16' for matrix products
compile = 'auto'             # torch.compile: True, False
cuda_graph = False           # on one GPU: record the step once and replay it; helps small nets
knobs, given = configure(globals(), runtime.find_device)
begun = time.perf_counter()
signal.signal(signal.SIGINT, signal.SIG_DFL)   # Ctrl-C ends a rank that waits for the others
rank, ranks, device = runtime.join_ranks(backend, device)
signals = runtime.Signals()   # from here on a signal finishes the step and saves

# ---- checks: everything a user may have mistyped, before anything is written ---------------------

def check_knobs():
    """Fail for a knob that means nothing, and for knobs that do not go together."""
    check(knobs, eval_interval=1, eval_iters=1, log_interval=1, sample_interval=0,
          checkpoint_interval=0, checkpoint_minutes=0, seed=0, gradient_accumulation_steps=1,
          batch_size=1, learning_rate=0, muon_learning_rate=0, max_iters=0, max_minutes=0,
          weight_decay=0, beta1=0, beta2=0, grad_clip=0, warmup_iters=0, min_lr=0, target_loss=0,
          cooldown=(0, 1), lr_decay_iters=0, optimizer=('adamw', 'muon'))
    if not (beta1 < 1 and beta2 < 1):
        fail(f'beta1={beta1}, beta2={beta2}: both must be below 1; type --beta1=0.9 --beta2=0.95')
    if cooldown and not decay_lr:
        fail(f'cooldown={cooldown} needs decay_lr=True; type --cooldown=0, or --decay_lr=True')
    if shard and optimizer == 'muon':
        fail('shard=True splits the matrices that Muon needs whole; allowed with it is adamw; '
             'type --optimizer=adamw')
    if gradient_accumulation_steps % ranks:
        nearest = max(ranks, round(gradient_accumulation_steps / ranks) * ranks)
        fail(f'gradient_accumulation_steps={gradient_accumulation_steps} does not divide by '
             f'{ranks} ranks; it counts the micro-steps of all ranks together; '
             f'type --gradient_accumulation_steps={nearest}')


start = starting.starting_point(knobs, given)
globals().update({**knobs, 'device': device})   # a resumed run's or a pretrained model's settings
check_knobs()
config = starting.shape(knobs)   # apart from vocab_size, which the data decides
runtime.check_memory(12 * n_layer * n_embd**2 + block_size * n_embd, batch_size * block_size)

# ---- data ----------------------------------------------------------------------------------------
prepare_missing(dataset, data_dir, prepare)
caught = runtime.agree([signals.caught])[0]   # waits for the rank that prepares
if caught:
    sys.exit(128 + caught)
data = Dataset(dataset, data_dir)
if data.stand_in_banner():
    say(data.stand_in_banner())
starting.check_symbols(data, start.path, start.symbols)
other_text = start.resumed is not None and starting.is_other_text(start.resumed, data)
windows = TrainingWindows(data, 'train', block_size, seed)
next(evaluation_batches(data, 'val', block_size, 1))   # fails now if there is nothing to evaluate

dtype, compile = runtime.set_up(device, dtype, compile, deterministic)
if dropout:
    # Some of cuDNN's kernels round the rate to sixteenths (pytorch PR #174245).
    torch.backends.cuda.enable_cudnn_sdp(False)
if not eval_only:
    run_folder.open_folder(out_dir, rank)

# ---- model and optimizers ------------------------------------------------------------------------
torch.manual_seed(seed)
if start.resumed:
    settings = {key: knobs[key] for key in starting.TRAINING}
    model = checkpoint.build_model(start.resumed, start.path, **settings)
elif start.pretrained:
    model = start.pretrained
else:
    V = data.vocab_size
    if V >= 4096:   # with a multiple of 64 the head's products are up to 1.25 times as fast
        V = -(-V // 64) * 64
    model = GPT(replace(config, vocab_size=V))
model.drawable = data.vocab_size
parameters = model.num_params()
flops_per_token = model.flops_per_token()
sharded = shard and ranks > 1
if sharded:
    if compile:   # FSDP2's hooks would break the graph of a whole model at every block
        for block in model.transformer.h:
            block.compile()
    runtime.shard(model, ranks, device, dtype)
else:
    model.to(device)
if device == 'cpu':
    fast.use_on_processor(model)

floor = min_lr / learning_rate if learning_rate else 1.0
schedule = Schedule(max_iters, max_minutes, decay_lr, warmup_iters, lr_decay_iters, cooldown, floor)
peaks = (learning_rate, muon_learning_rate)
optimizers = Optimizers(model, optimizer, peaks, weight_decay, (beta1, beta2))
scaler = torch.amp.GradScaler(device.partition(':')[0], enabled=dtype == 'float16')

loss_of = fast.TrainingLoss(model, lean=not sharded)   # what training minimizes
predict = model                                        # what evaluations call
if compile and not sharded:
    loss_of = torch.compile(loss_of)
    predict = torch.compile(model)
if ranks > 1 and not sharded:
    gpus = [device] if device.startswith('cuda') else None
    loss_of = DistributedDataParallel(loss_of, device_ids=gpus, gradient_as_bucket_view=True)
training_step = TrainingStep(model, loss_of, optimizers, scaler, grad_clip, device, dtype)
can_record = device.startswith('cuda') and ranks == 1 and not scaler.is_enabled()
if cuda_graph and can_record and not grad_checkpointing:
    training_step = fast.GraphedTraining(training_step, optimizers)
elif cuda_graph:
    say('note: cuda_graph is for one GPU, without fp16 and grad_checkpointing: '
        'steps are launched as ever')

micro_steps = gradient_accumulation_steps // ranks     # this rank's share
sequences = batch_size * gradient_accumulation_steps   # in one optimizer step, over all ranks
tokens_per_step = sequences * block_size


# ---- where the run is ----------------------------------------------------------------------------

@dataclass
class Progress:
    """What changes from step to step, apart from the model and its optimizers."""
    step: int = 0                   # optimizer steps made
    # training time of this rank, without evaluations, saves, samples and log lines
    seconds: float = 0.0
    elapsed: float = 0.0            # the slowest rank's seconds, on which all ranks agree
    skipped: int = 0                # steps without an update, because fp16 overflowed
    best_val_loss: float = math.inf
    val_loss: float = None          # loss of this step's evaluation; None without one
    train_loss: float = math.inf    # loss of the last log line
    unseen: list = field(default_factory=list)   # (step, loss, gradient norm), not yet looked at
    saved: bool = True              # whether the last save worked
    saved_at: float = 0.0           # time of the last save
    drawn_at: float = 0.0           # time at which loss.png was drawn
    logged_step: int = 0            # the first step after the last log line
    logged_seconds: float = 0.0     # `seconds` at that log line
    behind: bool = False            # whether the schedule follows max_minutes, no longer the steps


now = Progress(saved_at=time.monotonic(), drawn_at=time.monotonic())
last_path = os.path.join(out_dir, 'last.pt')
resume_flag = '--init_from=resume' + run_folder.flag(out_dir)
if start.resumed:
    now.step = now.logged_step = start.resumed['iter_num']
    now.seconds = now.logged_seconds = start.resumed['seconds']
    now.skipped = start.resumed['skipped']
    if not other_text:
        now.best_val_loss = checkpoint.best_loss(out_dir, float(start.resumed['best_val_loss']))
    optimizers.load(start.resumed, scaler, start.path)
    start.resumed = None   # frees the memory of a second copy of the tensors
    say(f'resumed from {start.path} at iter {now.step}')


def out_of_memory_explained():
    """Return a context that turns running out of memory into advice on the batch's size."""
    return runtime.explained_out_of_memory(batch_size, gradient_accumulation_steps, block_size,
                                           device)


# ---- evaluate and save ---------------------------------------------------------------------------

def evaluate(batches):
    """Return the validation loss in nats per token, over `batches` batches or (None) the split."""
    pairs = evaluation_batches(data, 'val', block_size, batch_size, batches, rank, ranks)
    with out_of_memory_explained():
        return mean_loss(predict, pairs, device, dtype)


def check_finite():
    """Fail where a number of the last steps is not finite; checkpoints stay as they are.

    Called before a log line and before a save. In between a GPU need not wait."""
    for step, loss, grad_norm in now.unseen:
        # fp16's overflows skip the update and lower the loss scale
        norm_is_fine = math.isfinite(grad_norm) or scaler.is_enabled()
        if not math.isfinite(loss) or not norm_is_fine:
            fail_not_finite(step, f'loss {float(loss) / micro_steps}, '
                                  f'gradient norm {float(grad_norm)}')
    now.unseen.clear()


def fail_not_finite(step, what):
    rate = schedule.share(schedule.position(step, now.elapsed)) * learning_rate
    fail(f'iter {step}: {what}, learning rate {rate:.3g}, loss scale {scaler.get_scale():g}: '
         f'no longer finite; no checkpoint was overwritten; type a lower --learning_rate '
         f'(and --muon_learning_rate), more --warmup_iters, or --dtype=float32')


def save(name):
    """Write a checkpoint into out_dir, from rank 0; return whether that worked.

    A full disk costs this save, not the run."""
    check_finite()
    weights = runtime.whole(model.state_dict())
    states = runtime.whole(optimizers.state())
    if rank != 0:
        return True
    return checkpoint.keep(os.path.join(out_dir, name), dict(
        format=1, model=weights, model_args=asdict(model.config), tokenizer=data.tokenizer.state(),
        data=dict(name=data.name, sha256=data.fingerprint(), stands_in_for=data.stands_in_for()),
        optimizer=states, scaler=scaler.state_dict(), iter_num=now.step,
        best_val_loss=now.best_val_loss, val_loss=now.val_loss,
        seconds=max(now.seconds, now.elapsed), skipped=now.skipped, config=knobs))


def save_last():
    now.saved = save('last.pt')
    now.saved_at = time.monotonic()


def evaluate_and_save(last):
    """Evaluate, say the loss, save; return whether the run ends here, by `last` or target_loss.

    The best loss is always judged on the same eval_iters batches. The last evaluation takes the
    whole validation split."""
    started = time.perf_counter()
    check_finite()   # waits for a GPU's last steps, which are training time
    now.seconds += time.perf_counter() - started

    sample_loss = now.val_loss = evaluate(eval_iters)
    whole = last or sample_loss < target_loss
    if whole:
        now.val_loss = evaluate(None)
    if not math.isfinite(now.val_loss):
        fail_not_finite(now.step, f'validation loss {now.val_loss}')
    reached = whole and now.val_loss < target_loss
    improved = sample_loss < now.best_val_loss
    now.best_val_loss = min(now.best_val_loss, sample_loss)

    where = ' on the whole split' if whole else ''
    say(f'iter {now.step}: val loss {now.val_loss:.4f}, '
        f'perplexity {shown_perplexity(now.val_loss)}{where}')
    if reached:
        say(f'reached target_loss={target_loss:g} after {counted(now.step, "step")}: '
            f'{now.seconds:.1f} s of training, evaluations excluded; '
            f'{time.perf_counter() - begun:.1f} s since the knobs were read')
    elif last and target_loss:
        limit = f'max_minutes={max_minutes:g}' if out_of_time() else f'max_iters={max_iters}'
        say(f'target_loss={target_loss:g} was not reached in {limit}')
    if improved and save('best.pt'):
        if rank == 0:   # the same file under a second name
            now.saved = checkpoint.copy(os.path.join(out_dir, 'best.pt'), last_path)
        now.saved_at = time.monotonic()
    elif improved or last or reached or always_save_checkpoint:
        save_last()
    return last or reached


def save_if_due(last):
    """Save on a signal, and as often as checkpoint_... says; return the signal's number or 0."""
    if last:
        return 0
    due = False
    if now.val_loss is None and checkpoint_interval:
        due = now.step % checkpoint_interval == 0
    if now.val_loss is None and checkpoint_minutes:
        due = due or time.monotonic() - now.saved_at >= 60 * checkpoint_minutes
    caught, due = runtime.agree([signals.caught, int(due)])
    if caught or due:
        save_last()
    return caught


# ---- sample and draw -----------------------------------------------------------------------------

def sample():
    """Print what the model writes after the first token of the validation split."""
    first = torch.tensor(data.split('val')[0][:1].astype('int64'), device=device)[None]   # (1, 1)
    generator = torch.Generator(device).manual_seed(seed)   # training draws from another
    with runtime.autocast(device, dtype):
        idx = model.generate(first, 200, temperature=0.8, generator=generator)            # (1, 201)
    text = data.tokenizer.decode(idx[0].tolist()).decode('utf-8', 'replace')
    say('\n'.join(('-' * 40, text, '-' * 40)))


def draw_losses():
    title = f'{dataset}, {parameters:,} parameters'
    plots.losses(log.path, os.path.join(out_dir, 'loss.png'), title)
    now.drawn_at = time.monotonic()


# ---- one optimizer step --------------------------------------------------------------------------

def load_batch(first):
    """Return batch_size windows, from number `first` on, on the device: x, y (B, T)."""
    x, y = windows.batch(first, batch_size)
    if device.startswith('cuda'):   # pinned, the copy overlaps with the step before
        x = x.pin_memory()
        y = y.pin_memory()
    return x.to(device, non_blocking=True), y.to(device, non_blocking=True)


def train_one_step():
    """Make one optimizer step; return its share of the peak rate, its loss and gradient norm.

    loss is the sum over this rank's micro-steps. Both numbers are tensors that a GPU may still be
    computing."""
    # Dropout, like the windows, is a function of (seed, step, rank): evaluations, samples and a
    # resumed run do not change it.
    entropy = np.random.SeedSequence((seed, now.step, rank))
    torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))
    position = schedule.position(now.step, now.elapsed)
    if decay_lr and position != now.step and not now.behind:
        now.behind = True
        say(f'iter {now.step}: from here the learning rate follows max_minutes={max_minutes:g} and '
            f'no longer the steps, and another run will not repeat this one bit for bit; '
            f'type --max_minutes=0 for all {max_iters:,} steps')
    share = schedule.share(position)
    optimizers.set_rates(share)
    first = now.step * sequences + rank * micro_steps * batch_size   # this rank's first window
    batches = [load_batch(first + i * batch_size) for i in range(micro_steps)]
    with out_of_memory_explained():
        loss, grad_norm = training_step(batches)
    if scaler.is_enabled() and not torch.isfinite(grad_norm):
        now.skipped += 1
    now.unseen.append((now.step, loss, grad_norm))
    return share, loss, grad_norm


def log_step(share, loss, grad_norm):
    """Say a line and write a row of log.csv. loss: the mean over all ranks, nats per token.

    All ranks call it, and only rank 0's row is written. Its time is not training time."""
    steps = now.step + 1 - now.logged_step
    spent = now.seconds - now.logged_seconds
    tok_per_s = steps * tokens_per_step / spent
    rate = share * learning_rate
    left = (max_iters - now.step - 1) * spent / steps
    if max_minutes:
        left = max(0.0, min(left, 60 * max_minutes - now.seconds))
    more = ''
    if peak:
        more += f' | mfu {tok_per_s * flops_per_token / peak / ranks:.1%}'
    if scaler.is_enabled():
        more += f' | skipped {now.skipped}, loss scale {scaler.get_scale():g}'
    say(f'iter {now.step}: loss {loss:.4f}, perplexity {shown_perplexity(loss)} | lr {rate:.2e} | '
        f'grad norm {grad_norm:.3f} | {tok_per_s:,.0f} tok/s{more} | {runtime.clock(left)} left')
    log.row(iter=now.step, tokens=now.step * tokens_per_step, train_loss=loss,
            val_loss=now.val_loss, lr=rate, grad_norm=float(grad_norm), tok_per_s=tok_per_s,
            seconds=now.seconds)
    now.train_loss = loss
    now.logged_step = now.step + 1
    now.logged_seconds = now.seconds


def out_of_time():
    return bool(max_minutes) and now.elapsed >= 60 * max_minutes


# ---- before the first step -----------------------------------------------------------------------

def say_what_is_about_to_happen():
    epochs = tokens_per_step / max(len(windows) * block_size, 1)
    say(f'{parameters:,} parameters; dataset {dataset}: {sum(map(len, windows.shards)):,} training '
        f'tokens, {epochs:.3g} epochs a step')
    say(f'tokens per step = {batch_size} batch x {block_size} block x '
        f'{gradient_accumulation_steps} accumulation ({micro_steps} each on '
        f'{counted(ranks, "rank")}) = {tokens_per_step:,}')
    if init_from == 'scratch':
        V = model.config.vocab_size
        say(f'expect a loss near ln({V}) = {math.log(V):.4f} at the start')
    if eval_only:
        return
    minutes = now.seconds / 60
    if init_from == 'resume' and now.step > max_iters:
        say(f'note: {start.path} is at iter {now.step}, past max_iters={max_iters}: '
            f'there is nothing left to train')
    elif init_from == 'resume' and 0 < 60 * max_minutes <= now.seconds and now.step < max_iters:
        say(f'note: {start.path} has had {minutes:.1f} minutes of training, and '
            f'max_minutes={max_minutes:g}: there is nothing left to train; '
            f'type --max_minutes={math.ceil(minutes + 5)} for some more, '
            f'or --max_minutes=0 for no limit')
    if max_minutes and not decay_lr:
        say(f'note: with decay_lr=False the run of max_minutes={max_minutes:g} ends at a constant '
            f'rate')


def begin_log():
    """Begin the run's log, and set aside what belongs to an earlier run or another text."""
    facts = dict(device=device, dtype=dtype, compile=compile, ranks=ranks, parameters=parameters)
    log.begin(now.step if init_from == 'resume' else None, knobs, facts)
    runtime.started_before(mark=True)
    if other_text:
        say(f'note: {start.path} was trained on another text than {data.folder}: '
            f'the best loss begins anew')
        earlier = run_folder.set_best_aside(out_dir)
        if earlier:
            say(f'note: the best.pt of that text is now {earlier}')


say_what_is_about_to_happen()
if eval_only:
    signals.release()   # there is nothing to save
    val_loss = evaluate(None)
    say(f'val loss {val_loss:.4f}, perplexity {shown_perplexity(val_loss)} on the whole split')
    runtime.leave(0)

log = run_folder.RunLog(out_dir)
if rank == 0:
    begin_log()

# ---- the loop ------------------------------------------------------------------------------------
model.train()
peak = runtime.peak_flops(device)   # FLOP/s of this GPU, None where it is not known
while True:
    # with a limit of time, all ranks use the slowest rank's and therefore end after the same step
    now.elapsed = runtime.agree([now.seconds])[0] if max_minutes else now.seconds
    now.val_loss = None
    last = now.step >= max_iters or out_of_time()
    if now.step % eval_interval == 0 or last:   # step 0 too: the loss before training
        last = evaluate_and_save(last)
    if sample_interval and (last or now.step and now.step % sample_interval == 0):
        if rank == 0 or sharded:   # the ranks of a sharded model need each other
            sample()
    if out_of_time() and now.step < max_iters:
        say(f'max_minutes={max_minutes:g} was reached after {now.step:,} of '
            f'max_iters={max_iters:,} steps; --max_minutes=0 has no limit')
    if last:
        log.row(iter=now.step, tokens=now.step * tokens_per_step, val_loss=now.val_loss,
                seconds=now.seconds)
    caught = save_if_due(last)
    evaluated_long_ago = now.val_loss is not None and time.monotonic() - now.drawn_at > 30
    if rank == 0 and (last or caught or evaluated_long_ago):   # a picture takes a fifth of a second
        draw_losses()
    if caught and now.saved:
        say(f'signal {caught}: saved {last_path} at iter {now.step}; type {resume_flag} to go on')
    if last or caught:
        break

    started = time.perf_counter()
    share, loss, grad_norm = train_one_step()
    logged = now.step % log_interval == 0 or now.val_loss is not None
    if logged:
        check_finite()
        loss = runtime.total([float(loss)], device)[0] / gradient_accumulation_steps
    now.seconds += time.perf_counter() - started
    if logged:
        log_step(share, loss, grad_norm)
    now.step += 1

# ---- the end -------------------------------------------------------------------------------------

def say_if_diverged():
    """Say where the model, once trained, predicts far worse than equal odds for all tokens."""
    V = model.config.vocab_size
    limit = math.log(V) + 0.5   # a new model begins slightly above ln V
    if now.step == 0 or now.val_loss < limit:
        return
    equal = f'note: equal odds for all tokens have a loss of ln({V}) = {math.log(V):.4f}'
    if now.train_loss < math.log(V):
        say(f'{equal}: this run learned the training text by heart; type a higher --dropout, '
            f'fewer --max_iters, or a smaller net')
    else:
        say(f'{equal}: this run diverged; type a lower --learning_rate (and '
            f'--muon_learning_rate), or more --warmup_iters')


log.end()
if last:
    say(f'done: {counted(now.step, "step")} in {runtime.clock(now.seconds)} and '
        f'{runtime.peak_memory(device):,.0f} MB; val loss {now.val_loss:.4f} nats per token on the '
        f'whole split; type python sample.py{run_folder.flag(out_dir)}')
    if now.saved:
        say(f'or, for a page that runs the model in a browser and shows its insides, '
            f'python export_web.py{run_folder.flag(out_dir)} --to=page.html')
    say_if_diverged()
if not now.saved:
    advice = 'type --out_dir=FOLDER for another place'
    if os.path.exists(last_path):
        advice = f'type {resume_flag}'
    fail(f'{last_path} could not be written at the end; make room, and {advice}')
runtime.leave(128 + caught if caught else 0)
