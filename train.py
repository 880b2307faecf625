"""
Train a GPT: one straight story from knobs to a finished model.

    python train.py config/train_shakespeare_char.py                  # the main job
    python train.py config/train_shakespeare_char.py --n_layer=8      # any knob can be overridden
    python train.py --init_from=resume                                # go on with the run in out_dir
    torchrun --standalone --nproc_per_node=8 train.py config/...      # one process a GPU (or a core)

Reads data/<dataset>/; writes last.pt, best.pt, log.csv, loss.png and config.json into out_dir.
"""
import math
import os
import signal
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from lib import checkpoint, fast, plots, runtime
from lib.configurator import check, configure
from lib.console import fail, say
from lib.data import Dataset, TrainingWindows, evaluation_batches
from lib.evaluation import mean_loss, perplexity
from lib.optimizers import Optimizers, Schedule, TrainingStep
from lib.prepare import prepare_missing
from model import GPT

# ---- knobs ---------------------------------------------------------------------------------------------------------
# the run
out_dir = 'out'              # folder of checkpoints and logs
init_from = 'scratch'        # 'scratch', 'resume' (out_dir/last.pt), or 'gpt2', another hub name or folder of Hugging Face's
eval_interval = 2000         # optimizer steps between evaluations, each followed by a save
eval_iters = 200             # batches each evaluation looks at, always the same; the last evaluation takes the whole split
eval_only = False            # evaluate the whole validation split and stop
always_save_checkpoint = True  # False: an evaluation writes last.pt only if the loss improved (the end always writes)
checkpoint_interval = 0      # also write last.pt every so many optimizer steps, 0 for never
checkpoint_minutes = 0.0     # also write last.pt every so many minutes, 0 for never
log_interval = 1             # optimizer steps between log lines
sample_interval = 0          # optimizer steps between samples printed, 0 for none
seed = 1337                  # of weights, windows and dropout
deterministic = False        # bit-identical repeats on a GPU too, at some cost in speed
wandb_log = False            # log to Weights & Biases
wandb_project = 'gpt'        # its project
wandb_run_name = 'gpt2'      # its run
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
max_minutes = 0.0            # minutes of training after which the run ends, with its schedule decayed to the end; 0: no limit
target_loss = 0.0            # end when the whole validation split is below it (nats per token) at an evaluation; 0: do not
weight_decay = 1e-1          # decoupled, on matrices only
beta1 = 0.9                  # AdamW's
beta2 = 0.95                 # AdamW's
grad_clip = 1.0              # largest gradient norm, 0 for no clipping
decay_lr = True              # warm up and decay, else a constant rate
warmup_iters = 2000          # steps of linear warm-up
lr_decay_iters = None        # step at which the rate reaches min_lr; None: max_iters
cooldown = 0.0               # share of the steps, the last ones, in which the rate falls linearly; 0: cosine after warm-up
min_lr = 6e-5                # AdamW's rate at the end; Muon's ends at the same share of its peak
# machine
shard = False                # under torchrun: split parameters, gradients and optimizer over the ranks (FSDP2)
backend = 'auto'             # torchrun's: 'nccl' on GPUs, 'gloo' elsewhere
device = 'auto'              # 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'auto'               # 'float32', 'bfloat16' or 'float16' for matrix products
compile = 'auto'             # torch.compile: True, False
cuda_graph = False           # on one GPU: record the step once and replay it, for nets that run faster than they are launched
knobs, given = configure(globals(), runtime.find_device)
begun = time.perf_counter()
signal.signal(signal.SIGINT, signal.SIG_DFL)   # until all ranks have met, Ctrl-C ends this one at once
rank, ranks, device = runtime.join_ranks(backend, device)
signals = runtime.Signals()   # from here on a signal finishes the step and saves

# ---- resume and checks: everything a user may have mistyped, before anything is written ----------------------------
resumed, pretrained, path, its_symbols = checkpoint.starting_point(knobs, given)
globals().update({**knobs, 'device': device})   # of the run that goes on, or of the model that is trained further
check(knobs, eval_interval=1, eval_iters=1, log_interval=1, sample_interval=0, checkpoint_interval=0, checkpoint_minutes=0,
      seed=0, gradient_accumulation_steps=1, batch_size=1, learning_rate=0, muon_learning_rate=0, max_iters=0, max_minutes=0,
      weight_decay=0, beta1=0, beta2=0, grad_clip=0, warmup_iters=0, min_lr=0, target_loss=0, cooldown=(0, 1),
      lr_decay_iters=0, optimizer=('adamw', 'muon'))
if not (beta1 < 1 and beta2 < 1):
    fail(f'beta1={beta1}, beta2={beta2}: both must be below 1; type --beta1=0.9 --beta2=0.95')
if cooldown and not decay_lr:
    fail(f'cooldown={cooldown} lets the rate fall and decay_lr=False keeps it; type --cooldown=0, or --decay_lr=True')
if shard and optimizer == 'muon':
    fail('shard=True splits the matrices that Muon needs whole; allowed with it is adamw; type --optimizer=adamw')
config = checkpoint.shape(knobs)
runtime.check_memory(12 * n_layer * n_embd**2 + block_size * n_embd, batch_size * block_size)
if gradient_accumulation_steps % ranks:
    nearest = max(ranks, round(gradient_accumulation_steps / ranks) * ranks)
    fail(f'gradient_accumulation_steps={gradient_accumulation_steps} does not divide by {ranks} ranks; it counts the '
         f'micro-steps of all ranks together; type --gradient_accumulation_steps={nearest}')

# ---- data ----------------------------------------------------------------------------------------------------------
prepare_missing(dataset, data_dir, prepare)
if caught := runtime.agree([signals.caught])[0]:   # which also waits for the rank that prepares
    sys.exit(128 + caught)
data = Dataset(dataset, data_dir)
if data.stand_in_banner():
    say(data.stand_in_banner())
checkpoint.check_symbols(data, path, its_symbols)
windows = TrainingWindows(data, 'train', block_size, seed)
next(evaluation_batches(data, 'val', block_size, 1))   # fails now where there is nothing to evaluate on

dtype, compile = runtime.set_up(device, dtype, compile, deterministic)
if not eval_only:
    checkpoint.open_folder(out_dir, rank)

# ---- model and optimizers ------------------------------------------------------------------------------------------
torch.manual_seed(seed)
if resumed:
    model = checkpoint.build_model(resumed, path, **{key: knobs[key] for key in checkpoint.TRAINING})
    if resumed['iter_num'] > max_iters:
        say(f'note: {path} is at iter {resumed["iter_num"]}, past max_iters={max_iters}: there is nothing left to train')
    elif 0 < 60 * max_minutes <= resumed['seconds'] and resumed['iter_num'] < max_iters and not eval_only:
        minutes = resumed['seconds'] / 60
        say(f'note: {path} has had {minutes:.1f} minutes of training, and max_minutes={max_minutes:g}: there is nothing left '
            f'to train; type --max_minutes={math.ceil(minutes + 5)} for some more, or --max_minutes=0 for no limit')
elif not (model := pretrained):
    V = data.vocab_size   # of a large one a multiple of 64: the head's products are up to 1.25 times as fast
    model = GPT(replace(config, vocab_size=V if V < 4096 else -(-V // 64) * 64))
model.drawable = data.vocab_size
parameters, flops_per_token = model.num_params(), model.flops_per_token()
model.to(device)
if shard := shard and ranks > 1:
    runtime.shard(model, ranks, device)

if device == 'cpu':
    fast.use_on_processor(model)
optimizers = Optimizers(model, optimizer, (learning_rate, muon_learning_rate), weight_decay, (beta1, beta2))
floor = min_lr / learning_rate if learning_rate else 1.0
schedule = Schedule(max_iters, max_minutes, decay_lr, warmup_iters, lr_decay_iters, cooldown, floor)
scaler = torch.amp.GradScaler(device.partition(':')[0], enabled=dtype == 'float16')

micro_steps = gradient_accumulation_steps // ranks   # of this rank
sequences = batch_size * gradient_accumulation_steps   # in one optimizer step, over all ranks
tokens_per_step = sequences * block_size
step, best_val_loss, seconds, skipped = 0, math.inf, 0.0, 0   # updates, lowest validation loss, training time, fp16's skips
elapsed = 0.0   # the training time that all ranks agree on
unseen = []   # step, loss and gradient norm of the steps since the last look
if resumed:
    step, seconds, skipped = (resumed[key] for key in ('iter_num', 'seconds', 'skipped'))
    best_val_loss = checkpoint.best_loss(out_dir, float(resumed['best_val_loss']))
    optimizers.load(resumed, scaler, path)
    resumed = None   # its tensors would sit in memory twice
    say(f'resumed from {path} at iter {step}')

loss_of = fast.TrainingLoss(model, lean=not shard)
predict = model   # what evaluations call
if compile:
    loss_of = torch.compile(loss_of)
    predict = torch.compile(model)
if ranks > 1 and not shard:
    gpus = [device] if device.startswith('cuda') else None
    loss_of = DistributedDataParallel(loss_of, device_ids=gpus)
training_step = TrainingStep(model, loss_of, optimizers, scaler, grad_clip, device, dtype)


def load(first):
    """batch_size windows, from number `first` on, on the device: x, y (B, T)."""
    x, y = windows.batch(first, batch_size)
    if device.startswith('cuda'):
        x, y = x.pin_memory(), y.pin_memory()   # so that the copy overlaps with the step before
    return x.to(device, non_blocking=True), y.to(device, non_blocking=True)


def evaluate(batches):
    """Validation loss in nats per token over a fixed sample of batches, or over the whole split for None."""
    pairs = evaluation_batches(data, 'val', block_size, batch_size, batches, rank, ranks)
    return mean_loss(predict, pairs, device, dtype)


def sample_text():
    """Return what the model writes after the first token of the validation split, between two lines."""
    first = torch.tensor(data.split('val')[0][:1].astype('int64'), device=device)[None]           # (1, 1)
    generator = torch.Generator(device).manual_seed(seed)   # its own, so that looking does not move training
    idx = model.generate(first, 200, temperature=0.8, generator=generator)                        # (1, 201)
    text = data.tokenizer.decode(idx[0].tolist()).decode('utf-8', 'replace')
    return '\n'.join(('-' * 40, text, '-' * 40))


def save(name):
    """Write a checkpoint into out_dir, from rank 0; returns whether that worked. A full disk costs this save, not the run."""
    look()
    weights, states = runtime.whole(model.state_dict()), runtime.whole(optimizers.state())
    return rank != 0 or checkpoint.keep(os.path.join(out_dir, name), dict(
        format=1, model=weights, model_args=asdict(model.config), tokenizer=data.tokenizer.state(), optimizer=states,
        scaler=scaler.state_dict(), iter_num=step, best_val_loss=best_val_loss, val_loss=val_loss,
        seconds=max(seconds, elapsed), skipped=skipped, config=knobs))


def look():
    """Check the numbers of the steps since the last look: before a log line and before a save, so that in between a GPU
    need not wait. Where they are no longer finite the run ends, and checkpoints stay as they are."""
    for number, loss, grad_norm in unseen:
        if not math.isfinite(loss) or not math.isfinite(grad_norm) and not scaler.is_enabled():
            stop_not_finite(number, f'loss {float(loss) / micro_steps}, gradient norm {float(grad_norm)}')
    unseen.clear()


def stop_not_finite(step, what):
    rate = schedule.share(schedule.position(step, elapsed)) * learning_rate
    fail(f'iter {step}: {what}, learning rate {rate:.3g}, loss scale {scaler.get_scale():g}: no '
         f'longer finite; no checkpoint was overwritten; type a lower --learning_rate (and --muon_learning_rate), more '
         f'--warmup_iters, or --dtype=float32')


# ---- before the first step: what is about to happen ----------------------------------------------------------------
say(f'{parameters:,} parameters; dataset {dataset}: {sum(map(len, windows.shards)):,} training tokens, '
    f'{tokens_per_step / max(len(windows) * block_size, 1):.3g} epochs a step')
say(f'tokens per step = {batch_size} batch x {block_size} block x {gradient_accumulation_steps} accumulation '
    f'({micro_steps} each on {ranks} ranks) = {tokens_per_step:,}')
if init_from == 'scratch':
    say(f'expect a loss near ln({model.config.vocab_size}) = {math.log(model.config.vocab_size):.4f} at the start')

log, last_path = checkpoint.RunLog(out_dir), os.path.join(out_dir, 'last.pt')
if rank == 0 and not eval_only:
    facts = dict(device=device, dtype=dtype, compile=compile, ranks=ranks, parameters=parameters)
    log.begin(step if init_from == 'resume' else None, knobs, facts)
    runtime.started_before(mark=True)
if eval_only:
    signals.release()   # there is nothing to save
    val_loss = evaluate(None)
    say(f'val loss {val_loss:.4f}, perplexity {perplexity(val_loss):.2f} on the whole split')
    runtime.leave(0)
if max_minutes and not decay_lr:
    say(f'note: with decay_lr=False the run of max_minutes={max_minutes:g} ends at a constant rate')

step_once = training_step
if cuda_graph and device.startswith('cuda') and ranks == 1 and not scaler.is_enabled() and not grad_checkpointing:
    step_once = fast.Graphed(training_step, optimizers)
elif cuda_graph:
    say('note: cuda_graph is for one GPU, without fp16 and grad_checkpointing: steps are launched as ever')

# ---- the loop ------------------------------------------------------------------------------------------------------
model.train()
peak = runtime.peak_flops(device)
logged_step, logged_seconds, saved, saved_at = step, seconds, True, time.monotonic()
drawn_at = time.monotonic()   # when loss.png was drawn last
behind = False   # whether the schedule has followed max_minutes instead of the steps
while True:
    # all ranks use the slowest rank's time and therefore end after the same step
    elapsed = runtime.agree([seconds])[0] if max_minutes else seconds
    out_of_time = bool(max_minutes) and elapsed >= 60 * max_minutes
    val_loss, last = None, step >= max_iters or out_of_time
    if step % eval_interval == 0 or last:
        started = time.perf_counter()
        look()   # waits for a GPU's last steps, which are training time
        seconds += time.perf_counter() - started
        val_loss = sample_loss = evaluate(eval_iters)
        whole = last or sample_loss < target_loss
        if whole:
            val_loss = evaluate(None)
            last = last or val_loss < target_loss
        if not math.isfinite(val_loss):
            stop_not_finite(step, f'validation loss {val_loss}')
        improved = sample_loss < best_val_loss   # always judged on the same sample
        best_val_loss = min(best_val_loss, sample_loss)
        say(f'iter {step}: val loss {val_loss:.4f}, perplexity {perplexity(val_loss):.2f}' + ' on the whole split' * whole)
        if whole and val_loss < target_loss:
            say(f'reached target_loss={target_loss:g} after {step:,} steps: {seconds:.1f} s of training, evaluations excluded; '
                f'{time.perf_counter() - begun:.1f} s since the knobs were read')
        elif last and target_loss:
            limit = f'max_minutes={max_minutes:g}' if out_of_time else f'max_iters={max_iters}'
            say(f'target_loss={target_loss:g} was not reached in {limit}')
        if improved:
            save('best.pt')
        if improved or last or always_save_checkpoint:
            saved, saved_at = save('last.pt'), time.monotonic()
    if sample_interval and (last or step and step % sample_interval == 0) and (rank == 0 or shard):
        with runtime.autocast(device, dtype):   # on all ranks of a sharded model, which need each other
            say(sample_text())
    if out_of_time and step < max_iters:
        say(f'max_minutes={max_minutes:g} was reached after {step:,} of max_iters={max_iters:,} steps')
    if last:
        log.row(iter=step, tokens=step * tokens_per_step, val_loss=val_loss, seconds=seconds)
    due = val_loss is None and (bool(checkpoint_interval) and step % checkpoint_interval == 0 or
                                bool(checkpoint_minutes) and time.monotonic() - saved_at >= 60 * checkpoint_minutes)
    caught, due = (0, 0) if last else runtime.agree([signals.caught, int(due)])
    if caught or due:
        saved, saved_at = save('last.pt'), time.monotonic()
    if rank == 0 and (last or caught or val_loss is not None and time.monotonic() - drawn_at > 30):
        plots.losses(log.path, os.path.join(out_dir, 'loss.png'), f'{dataset}, {parameters:,} parameters')
        drawn_at = time.monotonic()   # a picture takes a fifth of a second
    if caught and saved:
        say(f'signal {caught}: saved {last_path} at iter {step}; type --init_from=resume{checkpoint.flag(out_dir)} to go on')
    if last or caught:
        break

    started = time.perf_counter()
    # dropout, like the windows, is a function of (seed, step, rank): nothing done between two steps can move it
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> 1))
    scheduled = schedule.position(step, elapsed)
    if decay_lr and scheduled != step and not behind:
        behind = True
        say(f'iter {step}: from here the learning rate follows max_minutes={max_minutes:g} and no longer the steps, and '
            f'another run will not repeat this one bit for bit; type --max_minutes=0 for all {max_iters:,} steps')
    rate = schedule.share(scheduled)
    optimizers.set_rates(rate)
    batches = [load(step * sequences + (rank * micro_steps + i) * batch_size) for i in range(micro_steps)]
    with runtime.explained_out_of_memory(batch_size, gradient_accumulation_steps, block_size, device):
        loss, grad_norm = step_once(batches)
    skipped += scaler.is_enabled() and not bool(torch.isfinite(grad_norm))

    unseen.append((step, loss, grad_norm))
    logged = step % log_interval == 0 or val_loss is not None
    if logged:
        look()
        loss = runtime.total([float(loss)], device)[0] / gradient_accumulation_steps
    seconds += time.perf_counter() - started
    if logged:
        steps, spent = step + 1 - logged_step, seconds - logged_seconds
        tok_per_s = steps * tokens_per_step / spent
        mfu = f' | mfu {tok_per_s * flops_per_token / peak / ranks:.1%}' if peak else ''
        mfu += f' | skipped {skipped}, loss scale {scaler.get_scale():g}' if scaler.is_enabled() else ''
        left = (max_iters - step - 1) * spent / steps
        if max_minutes:
            left = max(0.0, min(left, 60 * max_minutes - seconds))
        say(f'iter {step}: loss {loss:.4f}, perplexity {perplexity(loss):.2f} | lr {rate * learning_rate:.2e} | '
            f'grad norm {grad_norm:.3f} | {tok_per_s:,.0f} tok/s{mfu} | {runtime.clock(left)} left')
        log.row(iter=step, tokens=step * tokens_per_step, train_loss=loss, val_loss=val_loss, lr=rate * learning_rate,
                grad_norm=float(grad_norm), tok_per_s=tok_per_s, seconds=seconds)
        logged_step, logged_seconds = step + 1, seconds
    step += 1

log.end()
if last:
    say(f'done: {step:,} steps in {runtime.clock(seconds)} and {runtime.peak_memory(device):,.0f} MB; val loss {val_loss:.4f} '
        f'nats per token on the whole split; type python sample.py' + checkpoint.flag(out_dir))
if not saved:
    fail(f'{last_path} could not be written at the end; make room, ' + ('and type --init_from=resume' + checkpoint.flag(out_dir)
         if os.path.exists(last_path) else 'or type --out_dir=FOLDER for another place'))
runtime.leave(128 + caught if caught else 0)
