"""
Look inside a model: what each head attends to, what it is worth, and where the model fails, as pictures and one page.

    python analyze.py                                          # the run in out/, on its validation split
    python analyze.py --start="ROMEO: What light" --layer=2 --head=1
    python analyze.py --start=FILE:text.txt --tokens=128
    python analyze.py --init_from=gpt2 --start="When Mary and John went to the store, John gave a drink to Mary"

Reads a checkpoint, or Hugging Face's weights, and, where there is one, the validation split it was trained beside. Writes into
<out_dir>/analysis: report.html (everything, in one page that needs nothing else), attention.png, head.png, depth_scan.png and
.csv, head_ablation.png and .csv, losses.png, embeddings.png, gradients.png and .csv, attention.npz. Findings go to stdout.
--to=FOLDER puts the pages elsewhere. Pages of --init_from=NAME go to <out_dir>/analysis-NAME,
unless out_dir is typed and holds no checkpoint.
"""
import base64
import collections
import csv
import json
import math
import os
import re
import statistics
import tempfile

import lib.threads  # noqa: F401  # before torch

import numpy as np
import torch
from scipy import stats
from tqdm import tqdm

from lib import checkpoint as checkpoints
from lib import inside, plots, runtime
from lib.configurator import check, configure, exit_on_signals
from lib.console import fail, read_prompt, say, write
from lib.data import open_first, with_split

init_from = 'resume'     # 'resume': the run in out_dir; else 'gpt2', 'gpt2-xl', another hub name, or a folder of Hugging Face's
out_dir = 'out'          # folder of the run
to = ''                  # folder for the pages; empty: <out_dir>/analysis
checkpoint = ''          # a checkpoint file, instead of the one in out_dir
data_dir = 'data'        # where datasets live; if not typed, the run's own data_dir is tried first
dataset = ''             # whose validation split to use; empty: the one the run was trained on
start = ''               # the text, FILE:path, - (standard input), or VAL:1000: the validation split from its token 1,000 on
tokens = 256             # of the text, at most
layer = 0                # of the head that head.png shows
head = 0                 # its number in that layer, from 0
windows = 'auto'         # of the validation split, to take heads out on; 'auto': as many as a minute or two is enough for
seed = 1337              # of the random tokens that induction is measured on
device = 'auto'          # 'cpu', 'cuda', 'cuda:1', 'mps'
knobs, given = configure(globals(), runtime.find_device)
exit_on_signals()   # and what is half-written is removed

SHOWN_BYTES = 5_000_000   # of attention in report.html; base64 makes a third more of it
HELD_BYTES = 1 << 30      # of attention in memory, of all heads
ABLATION_FLOPS = 1.2e12, 1.3e13   # what taking heads out may cost: usually, and for the fewest windows that give an interval

check(knobs, tokens=2)
if windows != 'auto' and not (type(windows) is int and windows >= 2):
    fail(f'windows={windows!r}: allowed are auto, and whole numbers from 2; type --windows=auto')
opened = checkpoints.open_model(init_from, out_dir, checkpoint, data_dir, given)
model = opened.model
tokenizer = opened.tokenizer
where = re.sub('[\ud800-\udfff]', '\ufffd', opened.where)   # a folder's name need not be UTF-8
config = model.config
if config.n_layer == 0 or config.block_size < 2:
    fail(f'{where} has n_layer={config.n_layer}, block_size={config.block_size}: nothing in it looks from one token at '
         f'another; type --checkpoint=FILE for a model with one layer or more, and two tokens or more')
try:
    inside.check_heads(model, [(layer, head)])
except ValueError as error:
    fail(str(error))
why_not = ''   # the reason for having no data
if dataset:
    data = open_first(dataset, opened.data_dirs, 'val', tokenizer)
    symbols = checkpoints.Symbols(tokenizer.state(), tokenizer.vocab_size)
    checkpoints.check_symbols(data, opened.source, symbols)
else:
    dataset = opened.dataset
    data, why_not = with_split(dataset, tokenizer, opened.data_dirs)
if data and data.stand_in_banner():
    say(data.stand_in_banner())

notes, L, nh = [], config.n_layer, config.n_head


def note(line):
    notes.append(line)
    say('note: ' + line)


def text_of(token):
    return tokenizer.decode([token]).decode('utf-8', 'replace')


# ---- the text ------------------------------------------------------------------------------------------------------
most = min(tokens, config.block_size, math.isqrt(HELD_BYTES // (4 * L * nh)))
if start == '' or start.startswith('VAL:'):
    if data is None:
        fail(f'no validation split to take a text from: {why_not}; type --start=TEXT, '
             f'--data_dir=FOLDER for the folder that holds its dataset, or --dataset=NAME')
    split, first = data.split('val')[0], start[4:] or '0'
    if not first.isdecimal() or len(first) > 18 or int(first) > len(split) - 2:
        fail(f'start={start[:40]!r}: VAL: takes a token from 0 to {len(split) - 2}; type --start=VAL:0')
    ids = split[int(first):int(first) + (tokens if 'tokens' in given else most)].astype(np.int64)
else:
    ids = tokenizer.encode(read_prompt(start))
if len(ids) > most:
    note(f'The text has {len(ids):,} tokens; looked at are the first {most:,}' + (
        f': type --tokens={config.block_size} for more.' if most == tokens else f', all that fit block_size={most:,}.'
        if most == config.block_size else f', as the attention of {L * nh:,} heads is 1 GB then.'))
if len(ids[:most]) < 2:
    fail(f'the text has {len(ids)} token{"s" * (len(ids) != 1)}; it takes two for one to look at another; type a longer '
         f'--start')
idx = torch.from_numpy(np.array(ids[:most], dtype=np.int64))[None]                                # (1, T)
T, words = idx.size(1), [text_of(token) for token in idx[0].tolist()]


def pages_folder():
    """Return the folder for the pages. A pretrained model's do not replace those of a run."""
    if to:
        return to
    checkpoints_there = [name for name in ('best.pt', 'last.pt', 'ckpt.pt')
                         if os.path.exists(os.path.join(out_dir, name))]
    if init_from != 'resume' and ('out_dir' not in given or checkpoints_there):
        name = os.path.basename(os.path.abspath(init_from))
        return os.path.join(out_dir, f'analysis-{name}')
    return os.path.join(out_dir, 'analysis')


def cannot_be_written(error):
    """Fail for the pages' folder."""
    fail(f'{folder} cannot be written ({error.strerror}); make room, '
         f'or type --to=FOLDER for another place')


def open_place(folder):
    """Return `folder`, or the one above if `folder` is not there yet; fails if it is read-only."""
    place = folder if os.path.isdir(folder) else os.path.dirname(os.path.abspath(folder))
    try:
        if os.path.exists(folder) and not os.path.isdir(folder):
            raise NotADirectoryError(0, 'it is a file')
        os.makedirs(place, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            return place
    except OSError as error:
        cannot_be_written(error)


runtime.set_up(device, 'float32', False)
model.to(device).eval()
folder = pages_folder()
place = open_place(folder)
say(f'{where}, {model.num_params():,} parameters; {T} tokens')

# ---- attention: what each head looks at ------------------------------------------------------------------------------
with inside.watched(model, range(L), outputs=True) as seen:
    logits = model(idx.to(device))[0][0].float().cpu()                                            # (T, V)
weights, outputs = (torch.stack([seen[i][key][0] for i in range(L)]) for key in ('weights', 'outputs'))   # (L, nh, T, T or hs)
length = min(64, config.block_size // 2)
with inside.watched(model, range(L)) as seen:
    twice = inside.repeated(model, length, torch.Generator().manual_seed(seed))                   # (1, 2·length)
    model(twice.to(device))
roles = inside.role_matrices(twice[0])
heads = []
for i in range(L):
    measures = inside.scan(weights[i]) | {
        f'role_{role}': score for role, score in inside.role_scores(seen[i]['weights'][0], roles).items()}
    for h in range(nh):
        row = dict(layer=i, head=h) | {key: value[h].item() for key, value in measures.items()}
        best = max(roles, key=lambda role: row[f'role_{role}'])
        row['called'] = best if row[f'role_{best}'] >= inside.NAMED else ''
        heads.append(row)

# ---- losses: where it fails ----------------------------------------------------------------------------------------
losses = inside.token_losses(logits[None, :-1], idx[:, 1:])[0]                                    # (T-1,), of tokens 1 to T-1
top = logits[:-1, :model.drawable].softmax(dim=1).topk(min(5, model.drawable), dim=1)             # (T-1, 5)

# ---- what heads are worth ------------------------------------------------------------------------------------------
def cut(tokens_of, length, count):
    """`count` windows of `length` tokens and their targets, evenly spread: (count, length) each."""
    starts = np.linspace(0, len(tokens_of) - length - 1, count).astype(int)
    rows = torch.from_numpy(np.stack([np.array(tokens_of[s:s + length + 1], dtype=np.int64) for s in starts])).to(device)
    return rows[:, :-1], rows[:, 1:]


# FLOPs of taking out each head once: of the blocks half on average, as what lies before the head is kept, and all of the head
# of the model, about 0.65 of a forward pass
per_token = L * nh * 2 * model.num_params() * 0.65
if data:
    split = data.split('val')[0]
    length = min(config.block_size, 256, len(split) - 1)
    while 8 * length * per_token > ABLATION_FLOPS[1] and length > 32:
        length //= 2
    count = windows if windows != 'auto' else max(8, min(64, int(ABLATION_FLOPS[0] / (per_token * length))))
    x, y = cut(split, length, min(count, max(1, (len(split) - 1) // length)))
    measured_on = f'{len(x)} windows of {length} tokens of the validation split of {dataset}'
else:
    length = max(1, min(T - 1, 64, (T - 1) // 2 if T > 16 else T - 1))
    x, y = cut(idx[0].numpy(), length, max(1, (T - 1) // length))
    measured_on = f'{len(x)} window{"s" * (len(x) > 1)} of {length} tokens of this text'
    note(f'No validation split here ({why_not}): what heads are worth was measured on the text '
         f'itself; type --data_dir=FOLDER for the one that holds its dataset, or --dataset=NAME.')
base, without = inside.head_ablation(
    model, x, y, lambda layers: tqdm(layers, desc='taking out heads', leave=False, disable=None))
for row in heads:
    change = (without[row['layer'], row['head']] - base).double()                                  # (n,)
    row['change'], n = change.mean().item(), len(change)
    half = stats.t.ppf(0.975, n - 1) * change.std().item() / math.sqrt(n) if n > 1 else None
    row['change_low'], row['change_high'] = (None, None) if half is None else (row['change'] - half, row['change'] + half)

# ---- loss by position, gradients, embeddings ---------------------------------------------------------------------------
with torch.no_grad():
    by_position = inside.token_losses(model(x)[0], y).mean(dim=0).tolist() if len(x) > 1 else losses.tolist()
norms = {}
for name, weight, gradient in inside.gradient_norms(model, x[:8], y[:8]):
    parts = name.removeprefix('transformer.').split('.')
    where_to = f'layer {int(parts[1])}: {parts[2]}' if parts[0] == 'h' else parts[0]
    norms.setdefault(where_to, []).append((weight, gradient, model.get_parameter(name).numel()))
gradients = [dict(layer=key, parameters=sum(n for _, _, n in values), weight=math.hypot(*(w for w, _, _ in values)),
                  gradient=math.hypot(*(g for _, g, _ in values))) for key, values in norms.items()]

numbers = (losses, base, without, torch.tensor([(row['weight'], row['gradient']) for row in gradients]))
if not all(t.isfinite().all() for t in numbers):
    fail(f'{where}: its losses or gradients are not finite numbers; type --checkpoint=FILE for a sound one')

wte = model.transformer.wte.weight.detach().cpu()[:model.drawable]
common = [token for token, _ in collections.Counter(idx[0].tolist()).most_common(80)]   # of this text
drawn = range(len(wte)) if len(wte) <= 100 else common
points, shares = inside.principal(wte)
near_common = [(text_of(token), [(text_of(other), cosine) for other, cosine in zip(*found)])
               for token, *found in zip(common, *(t.tolist() for t in inside.neighbours(wte, common[:24], 6)))]
similar = None
if config.pos == 'learned':
    wpe = torch.nn.functional.normalize(model.transformer.wpe.weight.detach().cpu(), dim=1)
    every = wpe[::max(1, len(wpe) // 128)]
    similar = every @ every.T                                                                     # (n, n), n < 256


# ---- in words --------------------------------------------------------------------------------------------------------
def share(x):
    return f'{x:.0%}' if x >= 0.0995 else f'{x:.1%}'


def sentence(row):
    """What one head's measures say."""
    kinds = dict(previous='the token before', first='token 0', diagonal='itself')
    kind = max(kinds, key=lambda key: row[key])
    said = f'looks {row["distance"]:.1f} tokens back on average, puts {share(row[kind])} on {kinds[kind]}'
    if row['stripe'] >= 0.2 and row['stripe_at'] > 0:
        said += f' and {share(row["stripe"])} on token {row["stripe_at"]}'
    return said + f', spreads {share(row["entropy_share"])} as widely as it could'


def label(row):
    return f'{row["layer"]}.{row["head"]}'


by_layer = [statistics.mean(row['distance'] for row in heads if row['layer'] == i) for i in range(L)]
findings = ['Mean distance looked back, layer by layer: ' + ', '.join(f'{d:.1f}' for d in by_layer) + ' tokens.']
narrow, wide = (extreme(heads, key=lambda row: row['entropy_share']) for extreme in (min, max))
findings.append(f'Head {label(narrow)} chooses most sharply, with {share(narrow["entropy_share"])} of the entropy it could '
                f'have' + f'; head {label(wide)} least, with {share(wide["entropy_share"])}' * (len(heads) > 1) + '.')
for key, words_for in (('diagonal', 'itself'), ('previous', 'the token before'), ('first', 'token 0')):
    row = max(heads, key=lambda row: row[key])
    findings.append(f'Head {label(row)} puts {share(row[key])} on {words_for}, the most of all heads.')
row = max(heads, key=lambda row: row['stripe'])
findings.append(f'The brightest column is token {row["stripe_at"]} in head {label(row)}, with {share(row["stripe"])}.')
for role in roles:
    found = sorted((row for row in heads if row['called'] == role), key=lambda row: -row[f'role_{role}'])
    if found:
        named = ', '.join(f'{label(row)} ({share(row[f"role_{role}"])})' for row in found[:5])
        findings.append(f'{role.capitalize()} heads: {named}' + f' and {len(found) - 5} more' * (len(found) > 5) + '.')
if not any(row['called'] for row in heads):
    findings.append(f'No head puts {share(inside.NAMED)} or more where one of the four roles looks.')
row = max(heads, key=lambda row: abs(row['change']))
bounds = '' if row['change_low'] is None else f' (95 %: {row["change_low"]:.4f} to {row["change_high"]:.4f})'
findings.append(f'Taking out head {label(row)} changes the loss the most: {row["change"]:+.4f} nats a token{bounds}.')
if bounds:
    missed = sum(not row['change_low'] <= 0 <= row['change_high'] for row in heads)
    findings.append(f'For {missed} of {len(heads)} heads that interval leaves 0 out; for heads worth nothing 1 in 20 would by '
                    f'chance.')
worst = losses.topk(min(12, T - 1)).indices.add(1).tolist()
expected = [[(text_of(token), chance) for token, chance in zip(*row)] for row in zip(top.indices.tolist(), top.values.tolist())]

# ---- what report.html shows ------------------------------------------------------------------------------------------
size, pool = T, 1
while L * nh * size * (size + 1) // 2 > SHOWN_BYTES:
    pool += 1
    size = -(-T // pool)
maps = weights
if pool > 1:   # queries averaged, keys summed: rows still sum to 1
    padded = torch.nn.functional.pad(weights, (0, size * pool - T, 0, size * pool - T))
    queries = torch.full((size,), pool).clamp(max=T - pool * torch.arange(size))                   # in each block
    maps = padded.view(L, nh, size, pool, size, pool).sum(dim=(3, 5)) / queries[:, None]
    note(f'The page shows attention between blocks of {pool} tokens, which keeps it small; attention.npz has all of it.')
i, j = np.tril_indices(size)
packed = np.round(255 * np.sqrt(maps.numpy()[:, :, i, j].clip(0, 1))).astype(np.uint8).tobytes()
report = dict(
    facts=f'{where}; {model.num_params():,} parameters, {L} layers of {nh} heads, {config.n_embd} wide; {T} tokens of text',
    findings=findings, notes=notes, tokens=words, losses=[None, *losses.tolist()], top=[[], *expected], layers=L, heads=nh,
    layer=layer, head=head, size=size, pool=pool, attention=base64.b64encode(packed).decode(), roles=list(roles),
    scan=[row | dict(says=sentence(row)) for row in heads],
    scan_note=f'Means over the text\'s queries but the first, which has no choice. Roles: share of attention where such a head '
              f'looks, on {len(twice[0])} tokens of which the second half repeats a random first; {inside.NAMED:.0%} or more '
              f'names it.',
    ablation=dict(rows=[dict(layer=row['layer'], head=row['head'], change=row['change'], low=row['change_low'],
                             high=row['change_high']) for row in heads],
                  note=f'Change in loss, nats a token, when its output is zeroed before the projection; on {measured_on}.'),
    worst=[dict(at=i, before=''.join(words[max(0, i - 20):i])[-20:]) for i in worst],
    position=[{'from': i + 1, 'loss': loss} for i, loss in enumerate(by_position)],
    position_note=f'Mean over {measured_on}.' if len(x) > 1 else 'Of this text.',
    embeddings=[dict(token=text_of(token), x=points[token, 0].item(), y=points[token, 1].item()) for token in drawn],
    embedding_note=('All' if drawn is not common else f'The text\'s {len(common)} most frequent') + ' tokens at the first two '
                   f'principal components of all embeddings ({share(shares[0].item())} and {share(shares[1].item())} '
                   f'of the variance), and their nearest neighbours.',
    neighbours=[dict(token=token, near=found) for token, found in near_common],
    similar=None if similar is None else dict(n=len(similar), values=[round(v, 2) for v in similar.flatten().tolist()]),
    similar_note='' if similar is None else f'Cosines between position embeddings, every {max(1, len(wpe) // 128)} of '
                                                    f'{len(wpe)}.',
    gradients=gradients)

# ---- files -----------------------------------------------------------------------------------------------------------
def at(file):
    return os.path.join(part, file)


def write_csv(file, rows):
    with open(at(file), 'w', newline='', encoding='utf-8') as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows({key: f'{x:.6g}' if isinstance(x, float) else x for key, x in row.items()} for row in rows)


title = f'{where}, {T} tokens'
try:
    # until all files are written
    with tempfile.TemporaryDirectory(prefix='analysis-', dir=place) as part:
        np.savez_compressed(at('attention.npz'), weights=weights.numpy(), outputs=outputs.numpy(), tokens=idx[0].numpy(),
                            losses=losses.numpy())
        worth = ('layer', 'head', 'change', 'change_low', 'change_high')
        write_csv('depth_scan.csv', [{key: row[key] for key in row if key not in worth[2:]} for row in heads])
        write_csv('head_ablation.csv', [{key: row[key] for key in worth} for row in heads])
        write_csv('gradients.csv', gradients)
        plots.attention(weights.numpy(), at('attention.png'), title)
        plots.one_head(weights[layer, head].numpy(), words, at('head.png'), f'{where}, head {layer}.{head}')
        plots.depth_scan(heads, at('depth_scan.png'), title)
        plots.head_ablation(heads, at('head_ablation.png'), f'{where}: {measured_on}')
        plots.text_losses(words, losses.tolist(), [
            f'{losses[i - 1]:5.2f}  after {"".join(words[max(0, i - 20):i])[-20:]!r} came {words[i][:20]!r}, expected ' +
            ', '.join(f'{text[:20]!r} {share(chance)}' for text, chance in expected[i - 1]) for i in worst],
            by_position, at('losses.png'), title)
        plots.embeddings(points[drawn].tolist(), [text_of(token) for token in drawn], shares.tolist(), near_common,
                         None if similar is None else similar.numpy(), at('embeddings.png'))
        plots.gradients(gradients, at('gradients.png'), title)
        with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'lib', 'report.html'), encoding='utf-8') as f:
            page = f.read()
        content = json.dumps(report, allow_nan=False).replace('<', '\\u003c')   # so that no text can end the script element
        with open(at('report.html'), 'w', encoding='utf-8') as f:
            f.write(page.replace('DATA', content, 1))
        os.makedirs(folder, exist_ok=True)
        files = os.listdir(part)
        for file in files:
            if os.path.isdir(os.path.join(folder, file)):
                raise IsADirectoryError(0, f'{file} is a folder')
        for file in files:
            os.replace(at(file), os.path.join(folder, file))
except OSError as error:
    cannot_be_written(error)
write('\n'.join(findings) + '\n')
say(f'{len(files)} files in {folder}; open {os.path.join(folder, "report.html")}')
