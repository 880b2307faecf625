"""
Published benchmarks: their items, the scores that a model gives to them, and what those amount to.

An item of HellaSwag is a context with four endings, one of which is right. An item of LAMBADA is a
text whose last word is to be predicted.
"""
import hashlib
import json
import math
import os
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from lib.console import fail
from lib.evaluation import perplexity
from lib.prepare import download
from lib.runtime import autocast, total

NORMAL_95 = 1.959964   # standard deviations on each side that hold 95 % of a normal distribution


@dataclass
class Published:
    """A benchmark's file as its authors published it."""
    url: str
    size: int      # bytes
    sha256: str
    form: str      # what an item has, as errors say it


TASKS = {
    'hellaswag': Published(   # the validation split, 10,042 items
        'https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl',
        12_246_618, '0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588',
        '"ctx" (a text), "endings" (four texts) and "label" (0 to 3)'),
    'lambada': Published(     # the test split in OpenAI's form, 5,153 items
        'https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl',
        1_819_752, '4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226',
        '"text" (a text of two words or more)')}


# ---- items ---------------------------------------------------------------------------------------

@dataclass
class Item:
    """A context and its choices, as token ids."""
    place: str      # file and line
    context: list
    choices: list   # HellaSwag's four endings, or LAMBADA's last word alone
    label: int      # number of the right choice


def published_file(task, data_dir):
    """Return the path of a task's published file in data_dir, and fetch the file if need be.

    Raises OSError with the reason."""
    known = TASKS[task]
    path = os.path.join(data_dir, task, os.path.basename(known.url))
    if os.path.exists(path):
        with open(path, 'rb') as f:
            if hashlib.file_digest(f, 'sha256').hexdigest() == known.sha256:
                return path
    os.makedirs(os.path.dirname(path), exist_ok=True)
    download(known.url, path, known.size, known.sha256)
    return path


def read_items(task, path, tokenizer, limit=0):
    """Return the items of a .jsonl, its first `limit` ones or (0) all. Fail for a bad line."""
    parse = {'hellaswag': _hellaswag_texts, 'lambada': _lambada_texts}[task]
    items = []
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        place = f'{path}, line {number}'
        try:
            context, choices, label = parse(json.loads(line))
            context = tokenizer.encode(context).tolist()
            choices = [tokenizer.encode(choice).tolist() for choice in choices]
            if not context or not all(choices):
                raise ValueError('a part of it has no tokens')
        except (ValueError, RecursionError) as error:
            fail(f"{place}: {error}; {task}'s items have {TASKS[task].form}; "
                 f'mend the line, or type --input=FILE for another file')
        items.append(Item(place, context, choices, label))
        if len(items) == limit:
            break
    if not items:
        fail(f"{path} has no items; {task}'s items have {TASKS[task].form}, one a line; "
             f'type --input=FILE for another file')
    return items


def _lines(path):
    """Return the lines of a file of text. Fail where it cannot be read."""
    try:
        with open(path, encoding='utf-8-sig') as f:
            return f.read().split('\n')
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, 'strerror', None) or error
        fail(f'--input={path}: {reason}; allowed is a .jsonl in UTF-8; type --input=FILE for one')


def _hellaswag_texts(item):
    """Return (context, endings, number of the right one). Raises ValueError for another item."""
    context = _text_of(item, 'ctx')
    endings = item.get('endings')
    if not isinstance(endings, list) or len(endings) != 4:
        raise ValueError('"endings" is not a list of four texts')
    for number, ending in enumerate(endings):
        if not isinstance(ending, str) or not ending.strip():
            raise ValueError(f'ending {number} is not a text with words')
    label = item.get('label')
    if type(label) is not int or not 0 <= label < 4:
        raise ValueError(f'"label" is {json.dumps(label)}')
    return context, [f' {ending}' for ending in endings], label


def _lambada_texts(item):
    """Return (what is before the last word, [the last word], 0). Raises ValueError as above."""
    context, _, word = _text_of(item, 'text').rstrip().rpartition(' ')
    if not context.strip():
        raise ValueError('"text" has a single word, and nothing before it to predict it from')
    return context, [f' {word}'], 0


def _text_of(item, field):
    """Return a field of an item that must hold a text. Raises ValueError where it does not."""
    text = item.get(field) if isinstance(item, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'it has no "{field}" with a text')
    return text.encode('utf-8', 'replace').decode()   # JSON can hold half of a surrogate pair


# ---- scores --------------------------------------------------------------------------------------

@dataclass
class Window:
    """A choice behind as much of its context as fits into block_size."""
    item: int      # number of the item
    choice: int    # number of the choice
    ids: list      # tokens of the context, then of the choice
    targets: int   # how many of the last tokens are the choice's


@dataclass
class Scores:
    """What a model gives to each choice, (items, choices) each."""
    nats: np.ndarray     # minus the log-probability of all its tokens together
    misses: np.ndarray   # how many of its tokens are not the most probable ones in their places
    tokens: np.ndarray   # how many tokens it has


def windows_of(items, block_size):
    """Return (a Window for each choice, the longest first, how many contexts were cut)."""
    windows = []
    cut = 0
    for number, item in enumerate(items):
        longest = max(map(len, item.choices))
        if longest > block_size:
            fail(f'{item.place}: a choice of {longest} tokens, and the model sees '
                 f'block_size={block_size}; allowed are items that fit; type --input=FILE for a '
                 f'file without this one')
        if len(item.context) + longest > block_size + 1:   # the last token is only a target
            cut += 1
        for choice, ids in enumerate(item.choices):
            last = (item.context + ids)[-block_size - 1:]
            windows.append(Window(number, choice, last, len(ids)))
    # neighbours of similar length share a batch, which then has little padding
    windows.sort(key=lambda window: -len(window.ids))
    return windows, cut


def window_batches(windows, batch_size, rank=0, ranks=1):
    """Yield this rank's share of the windows as (windows, x, y), with x and y (B, T).

    y is x one token later where the choice's tokens are to be predicted, and -1 elsewhere."""
    for first in range(rank * batch_size, len(windows), ranks * batch_size):
        batch = windows[first:first + batch_size]
        T = max(len(window.ids) for window in batch) - 1
        x = torch.zeros(len(batch), T, dtype=torch.int64)
        y = torch.full((len(batch), T), -1)
        for row, window in enumerate(batch):
            end = len(window.ids) - 1
            x[row, :end] = torch.tensor(window.ids[:-1])
            y[row, end - window.targets:end] = torch.tensor(window.ids[-window.targets:])
        yield batch, x, y


@torch.no_grad()
def score(model, items, batches, device, dtype):
    """Return the Scores of all items from the window_batches of all ranks.

    They depend neither on the size of the batches nor on the number of ranks."""
    shape = len(items), len(items[0].choices)
    nats = np.zeros(shape)
    misses = np.zeros(shape)
    for batch, x, y in batches:
        with autocast(device, dtype):
            logits, _ = model(x.to(device))                                        # (B, T, V)
        row, column = (y >= 0).nonzero(as_tuple=True)                              # (N,) each
        targets = y[row, column].to(device)
        z = logits[row.to(device), column.to(device)].float()                      # (N, V)
        lost = F.cross_entropy(z, targets, reduction='none').cpu()                 # (N,)
        likeliest = z[:, :model.drawable].argmax(1)
        missed = (likeliest != targets).cpu()
        for number, window in enumerate(batch):
            place = window.item, window.choice
            nats[place] = lost[row == number].double().sum()
            misses[place] = missed[row == number].sum()
    summed = np.array(total([*nats.flatten(), *misses.flatten()], device))   # each rank has others
    tokens = [[len(choice) for choice in item.choices] for item in items]
    return Scores(*summed.reshape(2, *shape), np.array(tokens))


# ---- what the scores amount to -------------------------------------------------------------------

def figures(task, items, scores):
    """Return what evaluate.py says of a task: its items, the accuracy and its 95 % interval."""
    if task == 'lambada':
        right = scores.misses[:, 0] == 0
        more = dict(perplexity=perplexity(scores.nats.mean()))   # a last word's
    else:
        labels = np.array([item.label for item in items])
        right = scores.nats.argmin(1) == labels
        mean_nats = scores.nats / scores.tokens
        more = dict(accuracy_norm=float((mean_nats.argmin(1) == labels).mean()))
    low, high = interval(int(right.sum()), len(items))
    return dict(task=task, items=len(items), accuracy=float(right.mean()), **more,
                low=low, high=high)


def interval(right, items):
    """Return Wilson's 95 % interval for a share of which `right` of so many items are a sample."""
    z = NORMAL_95
    share = right / items
    middle = share + z * z / (2 * items)
    half = z * math.sqrt(share * (1 - share) / items + z * z / (4 * items * items))
    scale = 1 + z * z / items
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)
