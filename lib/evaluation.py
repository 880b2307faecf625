"""
How well a model predicts: the mean loss over batches, and what it means.
"""
import math

import torch
from torch.nn import functional as F

from lib.runtime import autocast, total

ROW_ELEMENTS = 2**24   # logits that are held in fp32 at a time


def perplexity(nats):
    """Return e^nats: the number of equally likely tokens that would be as hard to predict."""
    return math.exp(min(nats, 700))   # e^710 is larger than any float


def shown_perplexity(nats):
    """Return the perplexity as a line of progress shows it: 4.56, or 1.2e+09 where it is huge."""
    value = perplexity(nats)
    return f'{value:.2f}' if value < 1e6 else f'{value:.1e}'


@torch.no_grad()
def mean_loss(model, batches, device, dtype):
    """Return the mean nats per target over batches of x, y (B, T), of all ranks' batches together.

    The model is in eval mode meanwhile. Targets of -1 do not count. The result does not depend on
    the size of the batches: the sum is in float64."""
    was_training = model.training
    model.eval()
    nats = 0.0
    targets = 0
    for x, y in batches:
        with autocast(device, dtype):
            logits, _ = model(x.to(device))                               # (B, T, V)
        rows_at_a_time = max(1, ROW_ELEMENTS // logits.size(2))
        logit_rows = logits.flatten(0, 1).split(rows_at_a_time)
        target_rows = y.to(device).flatten().split(rows_at_a_time)
        for z, target in zip(logit_rows, target_rows):
            losses = F.cross_entropy(z.float(), target, ignore_index=-1, reduction='none')
            # Apple's GPUs have no float64
            nats = nats + losses.to('cpu' if device == 'mps' else device, torch.float64).sum()
        targets += int((y >= 0).sum())
    model.train(was_training)
    nats, targets = total([float(nats), targets], device)
    return nats / targets
