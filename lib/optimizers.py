"""
AdamW and Muon, the schedule of their rates, and the training step that train.py runs and bench.py
measures.

Letters as in model.py.
"""
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lib.console import fail
from lib.runtime import autocast, gathered, has_bf16, is_sharded, place

# Muon's polynomials a s + b s^3 + c s^5 of the singular values s, one for each iteration (the polar
# express, arXiv 2505.16932). Each is the nearest to 1 on the interval to which the earlier ones map
# [0.01, 1.02]. The norm that brings s below 1 is rounded in bf16, and beyond 1.03 the first
# polynomials explode. Three of them take such s to between 0.72 and 1.28; smaller s grow 77-fold.
# torch.optim.Muon takes (3.4445, -4.775, 2.0315) five times; the main job's loss is the same with
# three fifths of its products (results/negative.md).
POLAR = ((7.9424, -22.2873, 15.8239), (3.6465, -2.7291, 0.5374), (2.6758, -1.9890, 0.4539))


# ---- the schedule --------------------------------------------------------------------------------

@dataclass
class Schedule:
    """The share of its peak that a rate has at each step of a run."""
    max_iters: int          # optimizer steps
    max_minutes: float      # minutes of training that the run may take; 0: no limit
    decay_lr: bool          # False: the rates stay at their peaks
    warmup_iters: int       # steps of linear warm-up
    lr_decay_iters: int     # step at which the share reaches `floor`; None: max_iters
    cooldown: float         # share of the steps with a linear fall at the end; 0: cosine
    floor: float            # share at the end

    def position(self, step, elapsed):
        """Return the step at which the schedule is: `step`, or a later one if time is short.

        The share of the run that is done is step / max_iters or elapsed / max_minutes, the larger
        of the two. elapsed: seconds. Time counts only once it leads by a hundredth of what is left.
        A stall of up to a hundredth of max_minutes therefore changes nothing."""
        if not self.max_minutes:
            return step
        steps_done = step / max(1, self.max_iters)
        time_done = min(1.0, elapsed / (60 * self.max_minutes))
        if time_done <= steps_done + 0.01 * (1 - time_done):
            return step
        return time_done * self.max_iters

    def share(self, step):
        """Return the share of the peak rate at a step, which position may make fractional.

        The share rises in a linear warm-up and falls along a cosine. With cooldown it is constant
        until a linear fall at the end (warm-up, stable, decay; arXiv 2405.18392)."""
        if not self.decay_lr:
            return 1.0
        if step < self.warmup_iters:
            return (step + 1) / (self.warmup_iters + 1)
        end = self.max_iters if self.lr_decay_iters is None else self.lr_decay_iters
        if step >= end:
            return self.floor
        if self.cooldown:
            fall = (end - step) / (end * self.cooldown)
            return min(1.0, self.floor + (1 - self.floor) * fall)
        done = (step - self.warmup_iters) / (end - self.warmup_iters)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * done))


# ---- the optimizers of a model -------------------------------------------------------------------

@dataclass
class Part:
    """A matrix as Muon takes it: rows of a parameter, with which it shares its storage."""
    source: nn.Parameter    # the model's parameter
    rows: slice             # rows of the parameter
    matrix: nn.Parameter    # what Muon updates


class Optimizers:
    """AdamW for all parameters of a model, or Muon for the blocks' matrices and AdamW for the rest.

    Muon takes the query, key and value matrices of c_attn apart. Embeddings and head stay with
    AdamW (kellerjordan.github.io/posts/muon)."""

    def __init__(self, model, kind, peaks, weight_decay, betas):
        """kind: 'adamw' or 'muon'. peaks: (AdamW's peak rate, Muon's peak rate)."""
        device = next(model.parameters()).device.type
        self.parts = list(muon_parts(model)) if kind == 'muon' else []
        muons = {id(part.source) for part in self.parts}
        groups = model.optimizer_groups(weight_decay)
        for group in groups:
            group['params'] = [p for p in group['params'] if id(p) not in muons]
        self.all = [torch.optim.AdamW(groups, lr=peaks[0], betas=betas, fused=device != 'mps')]
        if self.parts:
            precise = not has_bf16(device)
            matrices = [part.matrix for part in self.parts]
            self.all.append(Muon(matrices, precise, lr=peaks[1], weight_decay=weight_decay))
        for opt, peak in zip(self.all, peaks):
            for group in opt.param_groups:
                group['peak'] = peak

    def set_rates(self, share):
        """Give every parameter group a share of its peak rate.

        A rate that is a tensor changes in place, as a CUDA graph reads it."""
        for opt in self.all:
            for group in opt.param_groups:
                if isinstance(group['lr'], torch.Tensor):
                    group['lr'].fill_(group['peak'] * share)
                else:
                    group['lr'] = group['peak'] * share

    def link_gradients(self):
        """Give Muon's matrices their gradients.

        The gradients are views, so that unscaling and clipping reach both."""
        for part in self.parts:
            part.matrix.grad = part.source.grad[part.rows]

    def unlink_gradients(self):
        """Take the gradients from Muon's matrices; a view would keep its memory in use."""
        for part in self.parts:
            part.matrix.grad = None

    def state(self):
        """Return the state dicts, AdamW's first."""
        return [opt.state_dict() for opt in self.all]

    def load(self, loaded, scaler, path):
        """Take over the states in a loaded checkpoint, and fp16's scale.

        Fail where they are another optimizer's. path: the checkpoint's file."""
        states = loaded['optimizer']
        if not isinstance(states, list):   # nanoGPT's checkpoints have one
            states = [states]
        try:
            for opt, state in zip(self.all, states, strict=True):
                load_state(opt, state)
            if scaler.is_enabled():
                scaler.load_state_dict(loaded.get('scaler') or {})
        except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
            now, other = 'adamw', 'muon'
            if self.parts:
                now, other = 'muon', 'adamw'
            fail(f'{path}: its optimizer state is not that of optimizer={now} ({error}); '
                 f'type --optimizer={other}')


def muon_parts(model):
    """Yield the blocks' matrices as Parts. c_attn's three matrices are three Parts."""
    C = model.config.n_embd
    for name, p in model.transformer.h.named_parameters():
        if p.dim() == 2:
            slices = [slice(None)]
            if name.endswith('c_attn.weight'):
                slices = [slice(start, start + C) for start in range(0, p.size(0), C)]
            for rows in slices:
                yield Part(p, rows, nn.Parameter(p.detach()[rows]))


def load_state(opt, state):
    """Take over the tensors of a whole state dict, of a sharded parameter this rank's share.

    Rates and other settings stay opt's own. Raises ValueError for tensors that do not fit opt's
    parameters: fused kernels would read past their ends."""
    params = [p for group in opt.param_groups for p in group['params']]
    keys = {'momentum_buffer'}
    if isinstance(opt, torch.optim.AdamW):
        keys = {'step', 'exp_avg', 'exp_avg_sq'}
    if set(state['state']) not in (set(), set(range(len(params)))):
        raise ValueError(f'it has {len(state["state"])} of {len(params)} parameters')
    for i, tensors in state['state'].items():
        for key in keys | set(tensors):
            value = tensors.get(key)
            shape = torch.Size() if key == 'step' else params[i].shape
            fits = key in keys and isinstance(value, torch.Tensor) and value.shape == shape
            if not fits or not torch.isfinite(value).all():
                raise ValueError(f'the {key} of parameter {i} is not what it should be')
            if is_sharded(params[i]) and key != 'step':
                tensors[key] = sharded_like(params[i], value)
    groups = opt.state_dict()['param_groups']
    for own, saved in zip(groups, state['param_groups']):
        own['lr'] = float(saved['lr'])   # for the record: every step sets its own
    opt.load_state_dict(dict(state=state['state'], param_groups=groups))


def sharded_like(param, value):
    """Return a whole tensor split over the ranks as a sharded parameter is."""
    # imported here: torch.distributed.tensor takes half a second
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(value.to(param.device), param.device_mesh, param.placements)


# ---- Muon ----------------------------------------------------------------------------------------

class Muon(torch.optim.Muon):
    """torch.optim.Muon with all matrices of one shape orthogonalized together.

    For 4 layers of width 128 on two cores: 13 instead of 24 ms. precise: multiply in fp32, where
    bf16 is emulated; on a processor that takes five times as long. Several ranks have the same
    gradients, and share the work."""

    def __init__(self, params, precise=False, **settings):
        super().__init__(params, **settings)
        self.precise = precise

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            shapes = {}
            for p in group['params']:
                if p.grad is not None:
                    shapes.setdefault(tuple(p.shape), []).append(p)
            for params in shapes.values():
                self.update(params, group)

    def update(self, params, group):
        """Update parameters of one shape (rows, columns)."""
        rows, columns = params[0].shape
        grads = [p.grad for p in params]
        for p in params:
            if 'momentum_buffer' not in self.state[p]:
                self.state[p]['momentum_buffer'] = torch.zeros_like(p)
        averages = [self.state[p]['momentum_buffer'] for p in params]
        torch._foreach_lerp_(averages, grads, 1 - group['momentum'])
        ahead = torch._foreach_lerp(grads, averages, group['momentum'])   # Nesterov's look ahead
        x = torch.stack(ahead)                                            # (n, rows, columns)
        if not self.precise:
            x = x.bfloat16()
        x = orthogonalized_by_ranks(x, group['eps']).to(params[0].dtype)
        rate = group['lr'] * math.sqrt(max(1, rows / columns))
        torch._foreach_mul_(params, 1 - group['lr'] * group['weight_decay'])
        torch._foreach_sub_(params, list((x * rate).unbind()))


def orthogonalized_by_ranks(x, eps):
    """Return orthogonalized(x, eps), where every rank has the same x and computes a share of it.

    x: (n, rows, columns). A rank's share is n / ranks matrices, rounded up; zeros fill the last."""
    rank, ranks = place()
    if ranks == 1:
        return orthogonalized(x, eps)
    n = -(-x.size(0) // ranks)
    own = x[rank * n:(rank + 1) * n]
    share = x.new_zeros(n, x.size(1), x.size(2))
    share[:own.size(0)] = orthogonalized(own, eps)
    return gathered(share, ranks)[:x.size(0)]


def orthogonalized(x, eps):
    """Return matrices (n, rows, columns) with the singular vectors of x and singular values near 1.

    POLAR's polynomial a s + b s^3 + c s^5 of the singular values is a x + (b g + c g g) x, where
    g = x xT. eps: the least norm that is divided by."""
    tall = x.size(1) > x.size(2)
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for a, b, c in POLAR:
        gram = x @ x.mT                                                   # (n, rows, rows)
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)         # b g + c g g
        x = torch.baddbmm(x, factor, x, beta=a)
    return x.mT if tall else x


# ---- the training step ---------------------------------------------------------------------------

def no_clock(part):
    """Measure nothing."""


@dataclass
class TrainingStep:
    """One optimizer step: the gradients of some micro-batches, clipped, and the update."""
    model: nn.Module        # holds the parameters
    loss_of: nn.Module      # (idx, targets) -> loss; may be compiled, and wrapped by DDP
    optimizers: Optimizers
    scaler: Any             # fp16's torch.amp.GradScaler, not enabled for other precisions
    grad_clip: float        # largest norm of the gradient; 0 for no clipping
    device: str
    dtype: str              # precision of the matrix products
    clock: Any = no_clock   # called after each 'forward', 'backward' and 'update'

    def __call__(self, batches):
        """Return (the sum of the micro-batches' losses, the gradient's norm), two tensors.

        batches: [(x, y)] of this rank, (B, T) each. Nothing in here waits for a GPU, but for fp16's
        scale."""
        total = 0.0
        # one context around all micro-batches: the weights are cast once for them
        with autocast(self.device, self.dtype):
            for i, (x, y) in enumerate(batches):
                self.sync_gradients(i == len(batches) - 1)
                total = total + self.add_gradient(x, y, len(batches))
        norm = self.update()
        self.clock('update')
        return total, norm

    def sync_gradients(self, on):
        """Let the ranks exchange gradients in the next backward pass, or not yet."""
        if hasattr(self.model, 'set_requires_gradient_sync'):   # FSDP2
            self.model.set_requires_gradient_sync(on)
        elif hasattr(self.loss_of, 'require_backward_grad_sync'):   # DDP
            self.loss_of.require_backward_grad_sync = on

    def add_gradient(self, x, y, count):
        """Add a micro-batch's share of the mean gradient of `count`; return its loss."""
        loss = self.loss_of(x, y)
        self.clock('forward')
        # The backward pass runs in the precision of each forward operation, by itself.
        with torch.autocast(self.device.partition(':')[0], enabled=False):
            self.scaler.scale(loss / count).backward()
        self.clock('backward')
        return loss.detach()

    def update(self):
        """Clip the gradient, update the parameters, drop the gradient; return its norm.

        Where fp16 overflowed, the parameters stay and the loss scale goes down."""
        self.optimizers.link_gradients()
        for opt in self.optimizers.all:
            self.scaler.unscale_(opt)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip or math.inf)
        if is_sharded(norm):
            norm = norm.full_tensor()
        if not self.scaler.is_enabled() or torch.isfinite(norm):
            for opt in self.optimizers.all:
                opt.step()
        self.scaler.update()
        self.model.zero_grad(set_to_none=True)
        self.optimizers.unlink_gradients()
        return norm
