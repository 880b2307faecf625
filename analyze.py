"""
Look inside a model: what each head attends to, what it is worth, and where the model fails.

    python analyze.py                                     # the run in out/, on its validation split
    python analyze.py --start="ROMEO: What light" --layer=2 --head=1
    python analyze.py --start=FILE:text.txt --tokens=128
    python analyze.py --init_from=gpt2 --start="When Mary and John went to the store, John gave"

Reads a checkpoint or Hugging Face's weights, and the validation split of the model's dataset where
there is one. Prints its findings on stdout, and writes into <out_dir>/analysis:

    report.html                   everything below, in one page that needs nothing else
    attention.png and .npz        the attention weights of every head
    head.png                      those of one head, with the tokens
    depth_scan.png and .csv       what each head attends to, in numbers
    head_ablation.png and .csv    how much the loss changes without each head
    losses.png                    the loss of each token of the text
    embeddings.png                token and position embeddings
    gradients.png and .csv        the norms of each layer's weights and gradients

--to=FOLDER names another folder. The pages of --init_from=NAME go to <out_dir>/analysis-NAME, but
to <out_dir>/analysis if out_dir is typed and holds no checkpoint.
"""
import base64
import csv
import math
import os
import re
import statistics
import tempfile
from collections import Counter
from dataclasses import dataclass

import lib.early  # noqa: F401  # before NumPy and torch

import numpy as np
import torch
from scipy import stats
from torch.nn import functional as F
from tqdm import tqdm

from lib import inside, plots
from lib.configurator import check, configure, exit_on_signals
from lib.console import counted, fail, read_prompt, say, write
from lib.data import open_first, with_split
from lib.pages import as_json, fill
from lib.runtime import find_device, set_up
from lib.starting import Symbols, check_symbols, open_model

init_from = 'resume'     # 'resume' for the run in out_dir, 'gpt2' or another hub name, or a folder
out_dir = 'out'          # folder of the run
to = ''                  # folder for the pages; empty: <out_dir>/analysis
checkpoint = ''          # a checkpoint file, instead of the one in out_dir
data_dir = 'data'        # where datasets live; if not typed, the run's own data_dir is tried first
dataset = ''             # dataset with the validation split; empty: the one the run was trained on
start = ''               # a text, FILE:path, - for stdin, or VAL:1000: validation text from there
tokens = 256             # most tokens of the text to analyze
layer = 0                # layer of the head in head.png, from 0
head = 0                 # number of that head in its layer, from 0
windows = 'auto'         # validation windows for head ablation; 'auto' spends one to two minutes
seed = 1337              # seed of the random tokens for induction scores
device = 'auto'          # 'cpu', 'cuda', 'cuda:1', 'mps'
knobs, given = configure(globals(), find_device)

SHOWN_BYTES = 5_000_000   # bytes of attention in report.html, before base64 adds a third
HELD_BYTES = 1 << 30      # bytes of attention in memory, all heads together
USUAL_FLOPS = 1.2e12      # operations of the head ablation with --windows=auto
MOST_FLOPS = 1.3e13       # operations of the head ablation with FEWEST_WINDOWS
FEWEST_WINDOWS = 8        # windows that --windows=auto takes at least, for a useful interval
# Findings call a head by the role for which its score is the highest.
ROLES = dict(previous='Previous-token heads', same='Duplicate-token heads',
             induction='Induction heads', sink='Attention-sink heads')
notes = []   # what the page repeats of the notes on stderr


def note(line):
    notes.append(line)
    say('note: ' + line)


def share(fraction):
    return f'{fraction:.0%}' if fraction >= 0.0995 else f'{fraction:.1%}'


def text_of(token):
    return tokenizer.decode([token]).decode('utf-8', 'replace')


# ---- gather: the model, its dataset, the text, and a place for the pages -------------------------

def check_knobs():
    """Fail for a number of tokens or windows that is not allowed."""
    check(knobs, tokens=2)
    if windows != 'auto' and not (type(windows) is int and windows >= 2):
        fail(f'windows={windows!r}: allowed are auto, and whole numbers from 2; '
             f'type --windows=auto')


def check_model():
    """Fail for a model without attention, or without the head of --layer and --head."""
    config = model.config
    if config.n_layer == 0 or config.block_size < 2:
        fail(f'{where} has n_layer={config.n_layer}, block_size={config.block_size}: no token in '
             f'it attends to another one; type --checkpoint=FILE for a model with one layer or '
             f'more, and with a context of two tokens or more')
    try:
        inside.check_heads(model, [(layer, head)])
    except ValueError as error:
        fail(str(error))


def open_data():
    """Return (the dataset with the validation split, ''), or (None, why there is none)."""
    if dataset:
        chosen = open_first(dataset, opened.data_dirs, 'val', tokenizer)
        check_symbols(chosen, opened.source, Symbols(tokenizer.state(), tokenizer.vocab_size))
        reason = ''
    else:
        chosen, reason = with_split(opened.dataset, tokenizer, opened.data_dirs)
    if chosen and chosen.stand_in_banner():
        say(chosen.stand_in_banner())
    return chosen, reason


@dataclass
class Text:
    """The text that is analyzed."""
    idx: torch.Tensor   # the tokens, (1, T)
    words: list         # the text of each token


def read_text():
    """Return the text of --start as tokens, as many as are analyzed; say if there are more."""
    maps = model.config.n_layer * model.config.n_head   # (T, T) in fp32 each
    most = min(tokens, model.config.block_size, math.isqrt(HELD_BYTES // (4 * maps)))
    if start == '' or start.startswith('VAL:'):
        ids = validation_text(tokens if 'tokens' in given else most)
    else:
        ids = tokenizer.encode(read_prompt(start))
    if len(ids) < 2:
        fail(f'the text has {counted(len(ids), "token")}, and attention takes two or more; '
             f'type a longer --start')
    if len(ids) > most:
        if most == tokens:
            reason = f'; type --tokens={model.config.block_size} for more'
        elif most == model.config.block_size:
            reason = f', which is all that fits block_size={most:,}'
        else:
            reason = f', as the attention of {maps:,} heads to more of them would take over 1 GB'
        note(f'The text has {len(ids):,} tokens. Analyzed are the first {most:,}{reason}.')
    idx = torch.from_numpy(np.array(ids[:most], dtype=np.int64))[None]    # (1, T)
    return Text(idx, [text_of(token) for token in idx[0].tolist()])


def validation_text(count):
    """Return `count` tokens of the validation split, from the one that --start=VAL:n names."""
    if data is None:
        fail(f'no validation split to take a text from: {why_not}; type --start=TEXT, '
             f'--data_dir=FOLDER for the folder that holds its dataset, or --dataset=NAME')
    split = data.split('val')[0]
    first = start.removeprefix('VAL:') or '0'
    last = len(split) - 2
    if not first.isdecimal() or len(first) > 18 or int(first) > last:
        fail(f'start={start[:40]!r}: VAL: takes a token from 0 to {last}; type --start=VAL:0')
    return split[int(first):int(first) + count].astype(np.int64)


def pages_folder():
    """Return the folder for the pages. A pretrained model's do not replace those of a run."""
    if to:
        return to
    names = ('best.pt', 'last.pt', 'ckpt.pt')
    holds_run = any(os.path.exists(os.path.join(out_dir, name)) for name in names)
    if init_from != 'resume' and ('out_dir' not in given or holds_run):
        name = os.path.basename(os.path.abspath(init_from))
        return os.path.join(out_dir, f'analysis-{name}')
    return os.path.join(out_dir, 'analysis')


def open_place():
    """Return the pages' folder, or the one above if it does not exist; fail if it is read-only.

    The pages' folder itself is made only when there are pages."""
    place = folder
    if not os.path.isdir(folder):
        place = os.path.dirname(os.path.abspath(folder))
    try:
        if os.path.exists(folder) and not os.path.isdir(folder):
            raise NotADirectoryError(0, 'it is a file')
        os.makedirs(place, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            return place
    except OSError as error:
        cannot_be_written(error)


def cannot_be_written(error):
    """Fail for the pages' folder."""
    fail(f'{folder} cannot be written ({error.strerror}); make room, '
         f'or type --to=FOLDER for another place')


# ---- measure: attention, and the loss of each token ----------------------------------------------

@dataclass
class Attention:
    """What the model computes on the text: fp32, on the CPU."""
    weights: torch.Tensor   # (L, nh, T, T)
    outputs: torch.Tensor   # each head's, before the projection, (L, nh, T, hs)
    logits: torch.Tensor    # (T, V)


def attend():
    """Run the model on the text."""
    layers = range(model.config.n_layer)
    with inside.watched(model, layers, outputs=True) as seen:
        logits = model(text.idx.to(device))[0][0].float().cpu()           # (T, V)
    weights = torch.stack([seen[i]['weights'][0] for i in layers])        # (L, nh, T, T)
    outputs = torch.stack([seen[i]['outputs'][0] for i in layers])        # (L, nh, T, hs)
    return Attention(weights, outputs, logits)


def repeated_tokens():
    """Return random tokens twice in a row, at most 128, to measure the roles of heads on."""
    length = min(64, model.config.block_size // 2)
    return inside.repeated(model, length, torch.Generator().manual_seed(seed))


def scan_heads(weights, twice):
    """Return a dict for each head: layer, head, inside.scan's measures, roles, and `called`.

    weights: the attention on the text, (L, nh, T, T). twice: repeated_tokens(). `called` is the
    head's role, '' for a head without a clear one."""
    layers = range(model.config.n_layer)
    with inside.watched(model, layers) as seen:
        model(twice.to(device))
    matrices = inside.role_matrices(twice[0])
    rows = []
    for i in layers:
        measures = inside.scan(weights[i])
        scores = inside.role_scores(seen[i]['weights'][0], matrices)
        for h in range(model.config.n_head):
            row = dict(layer=i, head=h)
            for name, values in measures.items():
                row[name] = values[h].item()
            for role in ROLES:
                row[f'role_{role}'] = scores[role][h].item()
            best = max(ROLES, key=lambda role: row[f'role_{role}'])
            row['called'] = best if row[f'role_{best}'] >= inside.NAMED else ''
            rows.append(row)
    return rows


@dataclass
class Failures:
    """Where the model fails on the text."""
    losses: torch.Tensor   # nats of tokens 1 to T - 1, (T-1,)
    expected: list         # for each of them the most probable: [(text of a token, probability)]
    worst: list            # positions of the tokens with the highest losses, the highest first


def guesses_of_layers():
    """Return for each token what each layer would guess to come next, three tokens each.

    The guesses are [token][layer][{text, share}], from before the first layer to after the last."""
    tokens, shares = inside.layer_guesses(model, text.idx.to(device), min(3, model.drawable))
    guesses = []
    for token in range(text.idx.size(1)):
        layers = []
        for ids, values in zip(tokens[:, token].tolist(), shares[:, token].tolist()):
            layers.append([dict(text=text_of(i), share=round(value, 4))
                           for i, value in zip(ids, values)])
        guesses.append(layers)
    return guesses


def find_failures(logits):
    """Return the losses of the text's tokens, and what the model expected instead.

    logits: (T, V)."""
    losses = inside.token_losses(logits[None, :-1], text.idx[:, 1:])[0]   # (T-1,)
    chances = logits[:-1, :model.drawable].softmax(dim=1)
    top = chances.topk(min(5, model.drawable), dim=1)                     # (T-1, 5)
    expected = []
    for ids, values in zip(top.indices.tolist(), top.values.tolist()):
        expected.append([(text_of(token), chance) for token, chance in zip(ids, values)])
    worst = losses.topk(min(12, len(losses))).indices + 1
    return Failures(losses, expected, worst.tolist())


# ---- measure: what heads are worth ---------------------------------------------------------------

@dataclass
class Batch:
    """Windows on which losses and gradients are measured."""
    x: torch.Tensor   # (n, length)
    y: torch.Tensor   # their targets, (n, length)
    source: str       # a description: '64 windows of 64 tokens of this text'


def cut_windows():
    """Return windows of the validation split; of the text itself where there is no such split."""
    if data:
        split = data.split('val')[0]
        length, count = ablation_size(len(split))
        x, y = spread_evenly(split, length, count)
        return Batch(x, y, f'{counted(len(x), "window")} of {length} tokens of the validation '
                           f'split of {data.name}')
    note(f'No validation split here ({why_not}): what heads are worth was measured on the text '
         f'itself; type --data_dir=FOLDER for the one that holds its dataset, or --dataset=NAME.')
    targets = text.idx.size(1) - 1
    length = min(targets, 64)
    if targets >= 16:
        length = min(targets // 2, 64)   # two windows at least
    x, y = spread_evenly(text.idx[0].numpy(), length, targets // length)
    return Batch(x, y, f'{counted(len(x), "window")} of {length} tokens of this text')


def ablation_size(available):
    """Return the length and the number of windows for the ablation of every head.

    available: tokens of the validation split. A forward pass takes two operations for each
    parameter and token. Ablating a head takes 0.65 of a pass: the blocks before the head need not
    be computed again, which are half of them on average, and the model's head is computed whole."""
    config = model.config
    per_token = config.n_layer * config.n_head * 2 * model.num_params() * 0.65
    length = min(config.block_size, 256, available - 1)
    while FEWEST_WINDOWS * length * per_token > MOST_FLOPS and length > 32:
        length //= 2
    count = windows
    if windows == 'auto':
        affordable = int(USUAL_FLOPS / (per_token * length))
        count = max(FEWEST_WINDOWS, min(64, affordable))
    return length, min(count, max(1, (available - 1) // length))


def spread_evenly(ids, length, count):
    """Return `count` windows of tokens and their targets, evenly spread: (count, length) each."""
    rows = []
    for first in np.linspace(0, len(ids) - length - 1, count).astype(int):
        rows.append(np.array(ids[first:first + length + 1], dtype=np.int64))
    rows = torch.from_numpy(np.stack(rows)).to(device)                    # (count, length + 1)
    return rows[:, :-1], rows[:, 1:]


def ablate_heads(batch):
    """Return a dict for each head: layer, head, and the change in loss when it is zeroed.

    The change is in nats per token, with the bounds of its 95 % interval. The bounds are None for a
    single window."""
    def progress(steps):
        return tqdm(steps, desc='head ablation', leave=False, disable=None)
    whole, without = inside.head_ablation(model, batch.x, batch.y, progress)
    rows = []
    for i in range(model.config.n_layer):
        for h in range(model.config.n_head):
            changes = (without[i, h] - whole).double()                    # (n,)
            mean = changes.mean().item()
            half = half_interval(changes)
            row = dict(layer=i, head=h, change=mean, change_low=None, change_high=None)
            if half is not None:
                row |= dict(change_low=mean - half, change_high=mean + half)
            rows.append(row)
    return rows


def half_interval(values):
    """Return half of the 95 % interval of the mean of values (n,), by Student's t; None for one."""
    n = len(values)
    if n == 1:
        return None
    return stats.t.ppf(0.975, n - 1) * values.std().item() / math.sqrt(n)


# ---- measure: positions, gradients, embeddings ---------------------------------------------------

def losses_by_position(batch, losses):
    """Return the mean loss at each position of the windows, in nats.

    losses: those of the text, which stand in for the mean where there is a single window."""
    if len(batch.x) == 1:
        return losses.tolist()
    with torch.no_grad():
        return inside.token_losses(model(batch.x)[0], batch.y).mean(dim=0).tolist()


def gradients_by_layer(batch):
    """Return a dict for each layer: its number of parameters, the norms of weights and gradient.

    Attention, MLP and each norm of a block count as layers of their own."""
    groups = {}   # layer -> its parameters as (size, norm of the weights, norm of the gradient)
    for name, weight, gradient in inside.gradient_norms(model, batch.x[:8], batch.y[:8]):
        size = model.get_parameter(name).numel()
        groups.setdefault(layer_of(name), []).append((size, weight, gradient))
    rows = []
    for name, parameters in groups.items():
        sizes, norms, gradient_norms = zip(*parameters)
        rows.append(dict(layer=name, parameters=sum(sizes), weight=math.hypot(*norms),
                         gradient=math.hypot(*gradient_norms)))
    return rows


def layer_of(parameter):
    """Return 'wte' for 'transformer.wte.weight', 'layer 0: attn' for one of that block's."""
    parts = parameter.removeprefix('transformer.').split('.')
    return f'layer {parts[1]}: {parts[2]}' if parts[0] == 'h' else parts[0]


@dataclass
class Embeddings:
    """The token embeddings in two dimensions, and the cosines of tokens and of positions."""
    points: list            # [(text of a token, x, y)]: the first two principal components
    shares: list            # share of the variance of each principal component
    selection: str          # the tokens that are points: 'All' or 'The text's 80 most frequent'
    near: list              # nearest neighbours: [(text of a token, [(text of another, cosine)])]
    positions: np.ndarray   # cosines of learned positions, (n, n) with n < 256, or None
    step: int               # every step-th position is among these


def look_at_embeddings():
    """Return what the embeddings of tokens and positions say; neighbours of the text's tokens."""
    wte = model.transformer.wte.weight.detach().cpu()[:model.drawable]    # (V, C)
    frequent = [token for token, _ in Counter(text.idx[0].tolist()).most_common(80)]
    drawn = frequent
    selection = f"The text's {len(frequent)} most frequent"
    if len(wte) <= 100:
        drawn = range(len(wte))
        selection = 'All'
    coordinates, shares = inside.principal(wte)                           # (V, 2), (2,)
    points = [(text_of(token), *coordinates[token].tolist()) for token in drawn]
    positions = None
    step = 1
    if model.config.pos == 'learned':
        wpe = F.normalize(model.transformer.wpe.weight.detach().cpu(), dim=1)   # (T, C)
        step = max(1, len(wpe) // 128)
        positions = (wpe[::step] @ wpe[::step].T).numpy()                 # (n, n)
    return Embeddings(points, shares.tolist(), selection, nearest_tokens(wte, frequent[:24]),
                      positions, step)


def nearest_tokens(wte, chosen):
    """Return [(text of a token, [(text of another, cosine)])] for some tokens, six others each.

    wte: the embeddings, (V, C)."""
    rows = []
    indices, cosines = inside.neighbours(wte, chosen, 6)
    for token, others, values in zip(chosen, indices.tolist(), cosines.tolist()):
        near = [(text_of(other), cosine) for other, cosine in zip(others, values)]
        rows.append((text_of(token), near))
    return rows


# ---- measure: all of it --------------------------------------------------------------------------

@dataclass
class Analysis:
    """All that is measured."""
    attention: Attention     # on the text
    twice: torch.Tensor      # the tokens for the roles, (1, 2 * length)
    scans: list              # what each head attends to: scan_heads'
    failures: Failures       # on the text
    guesses: list            # each layer's guesses for each token (guesses_of_layers)
    batch: Batch             # what all below is measured on
    worth: list              # what each head is worth: ablate_heads'
    by_position: list        # mean loss at each position, nats
    gradients: list          # norms of each layer: gradients_by_layer's
    embeddings: Embeddings


def measure():
    """Return the analysis of the model on the text; fail where its numbers are not finite."""
    attention = attend()
    twice = repeated_tokens()
    scans = scan_heads(attention.weights, twice)
    failures = find_failures(attention.logits)
    batch = cut_windows()
    worth = ablate_heads(batch)
    by_position = losses_by_position(batch, failures.losses)
    gradients = gradients_by_layer(batch)
    check_finite(failures.losses, worth, gradients)
    return Analysis(attention, twice, scans, failures, guesses_of_layers(), batch, worth,
                    by_position, gradients, look_at_embeddings())


def check_finite(losses, worth, gradients):
    """Fail where a loss or a gradient is not a finite number."""
    numbers = losses.tolist()
    numbers += [row['change'] for row in worth]
    numbers += [row['weight'] for row in gradients]
    numbers += [row['gradient'] for row in gradients]
    if not all(math.isfinite(number) for number in numbers):
        fail(f'{where}: its losses or gradients are not finite numbers; '
             f'type --checkpoint=FILE for a sound one')


# ---- put into words ------------------------------------------------------------------------------

def label(row):
    return f'{row["layer"]}.{row["head"]}'


def sentence(row):
    """Return in words what one head attends to."""
    kinds = dict(previous='the previous token', first='token 0', diagonal='the token itself')
    kind = max(kinds, key=lambda kind: row[kind])
    said = (f'attends {row["distance"]:.1f} tokens back on average, '
            f'with {share(row[kind])} on {kinds[kind]}')
    if row['stripe'] >= 0.2 and row['stripe_at'] > 0:
        said += f' and {share(row["stripe"])} on token {row["stripe_at"]}'
    return said + f'; its entropy is {share(row["entropy_share"])} of the maximum'


def attention_findings(heads):
    """Return lines on how far, how sharply, and where to heads attend. heads: scan_heads' rows."""
    distances = {}   # layer -> of each head
    for row in heads:
        distances.setdefault(row['layer'], []).append(row['distance'])
    means = ', '.join(f'{statistics.mean(values):.1f}' for values in distances.values())
    sharp = min(heads, key=lambda row: row['entropy_share'])
    broad = max(heads, key=lambda row: row['entropy_share'])
    sharpness = (f'Head {label(sharp)} has the sharpest attention, '
                 f'with {share(sharp["entropy_share"])} of the maximum entropy')
    if len(heads) > 1:
        sharpness += f'; head {label(broad)} has the broadest, with {share(broad["entropy_share"])}'
    lines = [f'Mean attention distance, layer by layer: {means} tokens.', f'{sharpness}.']
    for kind, words in (('diagonal', 'the token itself'), ('previous', 'the previous token'),
                        ('first', 'token 0')):
        row = max(heads, key=lambda row: row[kind])
        lines.append(f'Head {label(row)} puts {share(row[kind])} of its attention on {words}, '
                     f'the most of all heads.')
    row = max(heads, key=lambda row: row['stripe'])
    lines.append(f'The most attended token is token {row["stripe_at"]} in head {label(row)}, '
                 f'with {share(row["stripe"])} on average.')
    return lines


def role_findings(heads):
    """Return a line for each role that heads have. heads: scan_heads' rows."""
    lines = []
    for role, name in ROLES.items():
        score = f'role_{role}'
        called = [row for row in heads if row['called'] == role]
        called.sort(key=lambda row: -row[score])
        if called:
            listed = ', '.join(f'{label(row)} ({share(row[score])})' for row in called[:5])
            if len(called) > 5:
                listed += f' and {len(called) - 5} more'
            lines.append(f'{name}: {listed}.')
    if not lines:
        lines.append(f'No head has a role: none puts {share(inside.NAMED)} or more of its '
                     f'attention where a previous-token, duplicate-token, induction or '
                     f'attention-sink head does.')
    return lines


def worth_findings(worth):
    """Return lines on the head that is worth the most. worth: ablate_heads' rows."""
    row = max(worth, key=lambda row: abs(row['change']))
    line = (f'Ablating head {label(row)} changes the loss the most: '
            f'{row["change"]:+.4f} nats per token')
    if row['change_low'] is None:
        return [f'{line}.']
    bounds = f'{row["change_low"]:.4f} to {row["change_high"]:.4f}'
    clear = [row for row in worth if not row['change_low'] <= 0 <= row['change_high']]
    return [f'{line} (95 % interval: {bounds}).',
            f'For {len(clear)} of {counted(len(worth), "head")} that interval excludes 0; '
            f'for a head without effect it does so by chance once in 20.']


def words_before(i):
    """Return the last 20 characters before token i."""
    return ''.join(text.words[max(0, i - 20):i])[-20:]


def failure_lines(failures):
    """Return a line of text for each of the worst tokens."""
    lines = []
    for i in failures.worst:
        expected = ', '.join(f'{word[:20]!r} {share(chance)}'
                             for word, chance in failures.expected[i - 1])
        lines.append(f'{failures.losses[i - 1]:5.2f}  after {words_before(i)!r} '
                     f'came {text.words[i][:20]!r}, expected {expected}')
    return lines


# ---- draw ----------------------------------------------------------------------------------------

def draw(found, part):
    """Write the pictures into the folder `part`."""
    def at(file):
        return os.path.join(part, file)
    title = f'{where}, {len(text.words)} tokens'
    weights = found.attention.weights.numpy()
    plots.attention(weights, at('attention.png'), title)
    plots.one_head(weights[layer, head], text.words, at('head.png'),
                   f'{where}, head {layer}.{head}')
    plots.depth_scan(found.scans, at('depth_scan.png'), title)
    plots.head_ablation(found.worth, at('head_ablation.png'), f'{where}: {found.batch.source}')
    losses = [None, *found.failures.losses.tolist()]   # the first token is not predicted
    plots.text_losses(list(zip(text.words, losses)), failure_lines(found.failures),
                      found.by_position, at('losses.png'), title)
    plots.embeddings(found.embeddings.points, found.embeddings.shares, found.embeddings.near,
                     found.embeddings.positions, at('embeddings.png'))
    plots.gradients(found.gradients, at('gradients.png'), title)


# ---- write ---------------------------------------------------------------------------------------

@dataclass
class Maps:
    """Attention as report.html shows it."""
    size: int      # rows and columns of a head's map
    pool: int      # tokens in a row or column
    packed: bytes  # square roots of the weights in 255 steps: every head's lower triangle in turn


def shown_maps(weights):
    """Return the attention weights (L, nh, T, T) for the page, in blocks where it is too much.

    A block's queries are averaged and its keys summed, so that rows still sum to 1."""
    L, nh, T, _ = weights.shape
    size = T
    pool = 1
    while L * nh * size * (size + 1) // 2 > SHOWN_BYTES:
        pool += 1
        size = math.ceil(T / pool)
    if pool > 1:
        padding = size * pool - T
        blocks = F.pad(weights, (0, padding, 0, padding)).view(L, nh, size, pool, size, pool)
        queries = (T - pool * torch.arange(size)).clamp(max=pool)         # in each block, (size,)
        weights = blocks.sum(dim=(3, 5)) / queries[:, None]               # (L, nh, size, size)
        note(f'The page shows attention between blocks of {pool} tokens, which keeps it small; '
             f'attention.npz has all of it.')
    i, j = np.tril_indices(size)
    roots = np.sqrt(weights.numpy()[:, :, i, j].clip(0, 1))
    return Maps(size, pool, np.round(255 * roots).astype(np.uint8).tobytes())


def page_data(found):
    """Return what report.html shows, as plain data; its script reads these names."""
    config = model.config
    maps = shown_maps(found.attention.weights)
    page = dict(
        facts=f'{where}; {model.num_params():,} parameters, {config.n_layer} layers of '
              f'{config.n_head} heads, {config.n_embd} wide; {len(text.words)} tokens of text',
        findings=findings, notes=notes, tokens=text.words,
        losses=[None, *found.failures.losses.tolist()], top=[[], *found.failures.expected],
        guesses=found.guesses,
        layers=config.n_layer, heads=config.n_head, layer=layer, head=head,
        size=maps.size, pool=maps.pool, attention=base64.b64encode(maps.packed).decode())
    page |= head_tables(found)
    page |= loss_tables(found)
    page |= embedding_tables(found.embeddings)
    page |= dict(gradients=found.gradients)
    return page


def head_tables(found):
    """Return the part of page_data on what heads attend to and what they are worth."""
    scan = []
    ablation = []
    for row, worth in zip(found.scans, found.worth):
        scan.append(row | worth | dict(says=sentence(row)))
        ablation.append(dict(layer=worth['layer'], head=worth['head'], change=worth['change'],
                             low=worth['change_low'], high=worth['change_high']))
    return dict(
        roles=list(ROLES),
        scan=scan,
        scan_note=f"Means over the text's queries but the first, which can only attend to itself. "
                  f'The roles are shares of the attention where a head of that role attends to, on '
                  f'{found.twice.size(1)} random tokens, the second half of which repeats the '
                  f'first. A head is named after a role from {inside.NAMED:.0%} on.',
        ablation=dict(rows=ablation, note=f"Change in loss, nats per token, when the head's output "
                                          f'is zeroed before the projection; on '
                                          f'{found.batch.source}. This page does not run the '
                                          f'model: a page by export_web.py does, and has a switch '
                                          f'for each head.'))


def loss_tables(found):
    """Return the part of page_data on the worst tokens and on the loss by position."""
    position_note = 'Of this text.'
    if len(found.batch.x) > 1:
        position_note = f'Mean over {found.batch.source}.'
    position = [{'from': i, 'loss': loss} for i, loss in enumerate(found.by_position, 1)]
    return dict(worst=[dict(at=i, before=words_before(i)) for i in found.failures.worst],
                position=position, position_note=position_note)


def embedding_tables(embeddings):
    """Return the part of page_data on embeddings."""
    first, second = embeddings.shares
    near = [dict(token=word, near=others) for word, others in embeddings.near]
    similar = None
    similar_note = ''
    if embeddings.positions is not None:
        values = embeddings.positions.flatten().tolist()
        similar = dict(n=len(embeddings.positions), values=[round(value, 2) for value in values])
        similar_note = (f'Cosines between position embeddings, every {embeddings.step} of '
                        f'{model.config.block_size}.')
    return dict(
        embeddings=[dict(token=word, x=x, y=y) for word, x, y in embeddings.points],
        embedding_note=f'{embeddings.selection} tokens at the first two principal components of '
                       f'all embeddings ({share(first)} and {share(second)} of the variance), and '
                       f'their nearest neighbours.',
        neighbours=near, similar=similar, similar_note=similar_note)


def write_tables(found, part):
    """Write the arrays and the .csv files into the folder `part`."""
    np.savez_compressed(os.path.join(part, 'attention.npz'),
                        weights=found.attention.weights.numpy(),
                        outputs=found.attention.outputs.numpy(),
                        tokens=text.idx[0].numpy(), losses=found.failures.losses.numpy())
    write_csv(os.path.join(part, 'depth_scan.csv'), found.scans)
    write_csv(os.path.join(part, 'head_ablation.csv'), found.worth)
    write_csv(os.path.join(part, 'gradients.csv'), found.gradients)


def write_csv(path, rows):
    """Write dicts with the same keys as a .csv, six digits of each number."""
    with open(path, 'w', newline='', encoding='utf-8') as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f'{value:.6g}' if isinstance(value, float) else value
                             for key, value in row.items()})


def write_page(content, part):
    """Write report.html into the folder `part`: lib/report.html with its data filled in."""
    page = fill('report.html', data=as_json(content))
    with open(os.path.join(part, 'report.html'), 'w', encoding='utf-8') as f:
        f.write(page)


def write_pages(found):
    """Write all files into the pages' folder, or none; return how many."""
    content = page_data(found)
    try:
        # a signal or an error removes this folder
        with tempfile.TemporaryDirectory(prefix='analysis-', dir=place) as part:
            write_tables(found, part)
            draw(found, part)
            write_page(content, part)
            return move_files(part)
    except OSError as error:
        cannot_be_written(error)


def move_files(part):
    """Move the files in the folder `part` to the pages' folder; return how many."""
    os.makedirs(folder, exist_ok=True)
    files = os.listdir(part)
    for file in files:
        if os.path.isdir(os.path.join(folder, file)):
            raise IsADirectoryError(0, f'{file} is a folder')
    for file in files:
        os.replace(os.path.join(part, file), os.path.join(folder, file))
    return len(files)


# ---- the story -----------------------------------------------------------------------------------

exit_on_signals()   # a signal removes what is half-written
check_knobs()
opened = open_model(init_from, out_dir, checkpoint, data_dir, given)
model = opened.model
tokenizer = opened.tokenizer
where = re.sub('[\ud800-\udfff]', '\ufffd', opened.where)   # a folder's name need not be UTF-8
check_model()
data, why_not = open_data()
text = read_text()
set_up(device, 'float32', False, exact=True)
model.to(device).eval()
folder = pages_folder()
place = open_place()   # where a temporary folder can be made and then renamed
say(f'{where}, {model.num_params():,} parameters; {len(text.words)} tokens')

found = measure()
findings = attention_findings(found.scans) + role_findings(found.scans)
findings += worth_findings(found.worth)
written = write_pages(found)
write('\n'.join(findings) + '\n')
say(f'{written} files in {folder}; open {os.path.join(folder, "report.html")}')
