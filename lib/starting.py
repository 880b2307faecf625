"""
What a script starts from: a checkpoint of this project or of nanoGPT, or a GPT-2 of Hugging Face.

`open_model` is for scripts that use a model, `starting_point` for train.py.
"""
import contextlib
import glob
import math
import os
import shlex
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches

import torch

from lib import runtime
from lib.checkpoint import Damaged, build_model, find, load, load_last, read
from lib.configurator import checked
from lib.console import fail, say
from lib.data import Dataset, find_dataset, first_with
from lib.tokenizers import load_tokenizer, make_tokenizer, read_hf_tokenizer
from model import GPT, GPTConfig, fetch_pretrained, read_hf_config

# settings that matter only during training
TRAINING = ('dropout', 'flash', 'label_smoothing', 'layer_drop', 'grad_checkpointing')
# Knobs that a resumed run does not restore: they are tied to this machine or to the command typed.
# Restoring `prepare` would let a checkpoint run a command.
MACHINE = ('init_from', 'out_dir', 'eval_only', 'backend', 'device', 'prepare')
# names of models on Hugging Face's hub that have no owner in front
HUB_NAMES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', 'distilgpt2')


# ---- the model that a script uses ----------------------------------------------------------------

@dataclass
class Opened:
    """A model that a script uses, and what is known about it."""
    model: GPT          # on the CPU
    tokenizer: object   # one of lib/tokenizers.py's
    source: str         # the checkpoint file, or what init_from named
    where: str          # the source in words, with a checkpoint's step
    dataset: str        # the dataset it was trained on; '' where that is not known
    data_dirs: list     # the folders that may hold its dataset, in the order to look
    trained_on: dict = field(default_factory=dict)   # what a checkpoint says about its text
    steps: int | None = None         # optimizer steps that a checkpoint's run had made
    val_loss: float | None = None    # the checkpoint's validation loss, nats per token


def open_model(init_from, out_dir, checkpoint, data_dir, given):
    """Return a script's model as an Opened.

    init_from='resume' stands for the file `checkpoint`, or else for the best model in out_dir that
    was trained. Other values are from_hub's names. given: the knobs that were set, as configure
    returns them."""
    if init_from != 'resume':
        model, tokenizer = from_hub(init_from, dropout=0.0)
        if tokenizer is None:
            fail(f'init_from={init_from} has no tokenizer.json or vocab.json; '
                 f'type --init_from=FOLDER for one that has')
        return Opened(model, tokenizer, init_from, init_from, '', [data_dir])
    path = find(out_dir, checkpoint)
    loaded = load(path)
    if not checkpoint and loaded.get('iter_num') == 0:
        loaded, path = _trained_instead(loaded, path, out_dir)
    model = build_model(loaded, path)
    knobs = loaded['config'] if isinstance(loaded.get('config'), dict) else {}
    data_dirs = data_dirs_of(knobs, path, data_dir, given)
    tokenizer = find_tokenizer(loaded, path, model, data_dirs)
    where = f'{path}: iter {loaded.get("iter_num")}'
    trained_on = _trained_on(loaded)
    return Opened(model, tokenizer, path, where, str(knobs.get('dataset', '')), data_dirs,
                  trained_on, _steps_of(loaded), _val_loss_of(loaded))


def _trained_on(loaded):
    """Return what a checkpoint says about its text; {} for one by nanoGPT or an earlier version."""
    data = loaded.get('data')
    return data if isinstance(data, dict) else {}


def _steps_of(loaded):
    """Return a checkpoint's number of steps, None where it holds something else."""
    steps = loaded.get('iter_num')
    return steps if type(steps) is int else None


def _val_loss_of(loaded):
    """Return a checkpoint's validation loss, None where there is none that is a finite number."""
    val_loss = loaded.get('val_loss')
    if val_loss is None:
        val_loss = loaded.get('best_val_loss')
    is_number = isinstance(val_loss, (int, float))
    is_number = is_number or isinstance(val_loss, torch.Tensor) and val_loss.numel() == 1
    return float(val_loss) if is_number and math.isfinite(val_loss) else None


def _trained_instead(loaded, path, out_dir):
    """Return (checkpoint, path) of last.pt in place of a best.pt from step 0, where that is better.

    A run that is stopped before its second evaluation leaves such a best.pt, and a last.pt that is
    trained and not evaluated."""
    last = os.path.join(out_dir, 'last.pt')
    if path != last and os.path.isfile(last):
        with contextlib.suppress(Damaged):
            trained = read(last)
            if trained.get('iter_num') and trained.get('val_loss') is None:
                return trained, last
    return loaded, path


def data_dirs_of(knobs, path, data_dir, given):
    """Return the folders that may hold the dataset of a run, in the order to look.

    knobs: the run's. path: the run's checkpoint file. data_dir: the script's knob. given: the knobs
    that were set; a data_dir that was set is the only folder. A relative data_dir of the run is
    also tried from the folder that out_dir was in, from the run's folder, and from its parent."""
    if 'data_dir' in given:
        return [data_dir]
    known = knobs.get('data_dir', data_dir)
    if not isinstance(known, str) or '\0' in known:
        known = data_dir
    run = os.path.dirname(os.path.abspath(path))
    starts = [os.getcwd()]
    was = knobs.get('out_dir')
    if isinstance(was, str) and run.endswith(os.sep + os.path.normpath(was)):
        starts.append(run.removesuffix(os.sep + os.path.normpath(was)))
    starts += [run, os.path.dirname(run)]
    folders = [os.path.abspath(os.path.join(start, known)) for start in starts]
    folders.append(os.path.abspath(data_dir))
    here = os.path.join(os.getcwd(), '')
    return [folder.removeprefix(here) for folder in dict.fromkeys(folders)]


def find_tokenizer(loaded, path, model, data_dirs):
    """Return the tokenizer in a checkpoint; for one by nanoGPT, that of the dataset in its config.

    From then on the model draws only tokens that the tokenizer has. path: the checkpoint's file.
    data_dirs: the folders that may hold the dataset."""
    if 'tokenizer' in loaded:
        try:
            tokenizer = load_tokenizer(loaded['tokenizer'])
        except ValueError as error:
            fail(f'{path}: {error}; type --checkpoint=FILE for another')
    else:
        config = loaded.get('config')
        name = str(config.get('dataset', '')) if isinstance(config, dict) else ''
        data_dir = dataset_folder(name, data_dirs) if name else None
        if data_dir is None:
            folders = [os.path.join(data_dir, name or '?') for data_dir in data_dirs]
            fail(f'{path} has no tokenizer and the folder of its dataset, '
                 f'{" or ".join(folders)}, is not there; '
                 f'type --data_dir=FOLDER for the one that holds {name or "its dataset"}')
        tokenizer = Dataset(name, data_dir).tokenizer
    if tokenizer.vocab_size > model.config.vocab_size:
        fail(f'{path}: its tokenizer has {tokenizer.vocab_size:,} symbols and its model '
             f'{model.config.vocab_size:,}; type --checkpoint=FILE for another')
    model.drawable = tokenizer.vocab_size
    return tokenizer


def dataset_folder(name, data_dirs):
    """Return the first of data_dirs in which a dataset's folder holds a vocabulary or tokens.

    Where none holds them, return the first that has the folder, or None."""
    empty = None
    for data_dir in data_dirs:
        folder, _ = find_dataset(name, data_dir)
        for pattern in ('meta.*', '*.bin'):
            if glob.glob(os.path.join(glob.escape(folder), pattern)):
                return data_dir
        if empty is None and os.path.isdir(folder):
            empty = data_dir
    return empty


# ---- Hugging Face's models -----------------------------------------------------------------------

def from_hub(name, words=('resume',), most_positions=None, **settings):
    """Return (model, tokenizer) of a GPT-2 on Hugging Face's hub or in a folder.

    tokenizer is None where the folder has none. words: see check_near_names. most_positions: a
    longer context is cut to this. settings: fields of GPTConfig, such as dropout."""
    check_near_names(name, words)
    try:
        if _is_missing_folder(name):
            raise ValueError('there is no such folder')
        folder = fetch_pretrained(name)
        positions = read_hf_config(folder)['n_positions']
        if most_positions is not None and type(positions) is int and positions > most_positions:
            settings['block_size'] = most_positions
        model = GPT.from_pretrained(folder, **settings)
        tokenizer = read_hf_tokenizer(folder)
    except ImportError as error:
        fail(f'init_from={name} needs the package {error.name}; '
             f'type pip install -r requirements.txt')
    except (OSError, ValueError) as error:
        _fail_without_model(name, error)
    if tokenizer is None and model.config.vocab_size == 50257:
        tokenizer = make_tokenizer('gpt2')
    if tokenizer:
        model.drawable = min(tokenizer.vocab_size, model.config.vocab_size)
    return model, tokenizer


def check_near_names(name, words):
    """Fail for a name that is neither a folder nor known, but close to one that is allowed.

    words: values of init_from that are not names."""
    allowed = (*words, *HUB_NAMES)
    folder = os.path.dirname(name) if os.path.isfile(name) else name
    is_run = any(os.path.isfile(os.path.join(folder, each)) for each in ('last.pt', 'best.pt'))
    if name and (is_run or name.endswith('.pt') and os.path.isfile(name)):
        out_dir = shlex.quote(folder or os.curdir)
        fail(f'init_from={name} is a run or a checkpoint of this project, and init_from takes '
             f"Hugging Face's folders; type --init_from=resume --out_dir={out_dir}")
    if '/' in name or os.path.isdir(name) or name in allowed:
        return
    near = get_close_matches(name, allowed, n=1, cutoff=0.7)
    if near:
        fail(f'init_from={name}: there is no such folder; did you mean {near[0]}? '
             f'type --init_from={near[0]}')


def _is_missing_folder(name):
    """Return whether a name can only be a folder's, and there is no such folder."""
    if name in ('', 'scratch'):
        return True
    if os.path.isdir(name):
        return False
    return name[0] in './~' or name.count('/') > 1   # the hub's names are OWNER/MODEL


def _fail_without_model(name, error):
    """Fail for a model that could not be fetched or read."""
    if is_out_of_reach(error):
        fail(f'init_from={name}: huggingface.co cannot be reached, and {name} is not in the '
             f'local cache; allowed are a network once, and a folder with config.json and '
             f'model.safetensors; type --init_from=FOLDER')
    reason = ' '.join(str(error).split())[:400]
    near = get_close_matches(name, ('resume', 'scratch', 'gpt2'), n=1) or ['gpt2']
    advice = near[0] if near[0] != name else 'FOLDER'
    fail(f'init_from={name}: {reason}; allowed are resume, scratch (train.py), gpt2, gpt2-medium, '
         f'gpt2-large, gpt2-xl, distilgpt2, another GPT-2 on huggingface.co, and a folder with '
         f'config.json and model.safetensors; type --init_from={advice}')


def is_out_of_reach(error):
    """Return whether huggingface_hub raised `error` for lack of a network and of cached files."""
    try:
        from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
    except ImportError:
        return False
    return isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled))


# ---- what training starts from -------------------------------------------------------------------

@dataclass
class Symbols:
    """The tokens that a model was trained on."""
    tokenizer: dict | None   # the tokenizer's state, None where it is not known
    vocab_size: int          # rows of the model's embedding
    padded: bool = False     # whether some of the rows may be padding
    trained_on: dict = field(default_factory=dict)   # what a checkpoint says about its text


@dataclass
class Start:
    """What a training run starts from: nothing, or one of resumed and pretrained."""
    resumed: dict | None = None       # the checkpoint that the run goes on from
    pretrained: GPT | None = None     # a model from Hugging Face
    path: str = ''                    # the checkpoint's file, or the name of the pretrained model
    symbols: Symbols | None = None    # what the model was trained on


def starting_point(knobs, given):
    """Return the Start of a training run, and settle its knobs in place.

    A resumed run keeps its knobs, apart from those set now and those of MACHINE. A model that is
    trained further keeps its shape; fail where a knob that was set says otherwise. given: the
    knobs that were typed or assigned by a config."""
    # whether torchrun --max-restarts has restarted this process, because a rank has died
    restarted = runtime.agree([int(runtime.started_before())])[0]
    if restarted and os.path.exists(os.path.join(knobs['out_dir'], 'last.pt')):
        knobs['init_from'] = 'resume'
    if knobs['init_from'] == 'scratch':
        return Start()
    if knobs['init_from'] == 'resume':
        start = _resume(knobs, given)
        model_args = start.resumed['model_args']
    else:
        start = _train_further(knobs, given)
        model_args = asdict(start.pretrained.config)
    _keep_shape(knobs, given, model_args, start.path)
    return start


def _resume(knobs, given):
    """Return the Start of a resumed run, and restore its knobs."""
    resumed, path = load_last(knobs['out_dir'])
    for key, value in resumed['config'].items():
        if key in knobs and key not in given and key not in MACHINE:
            knobs[key] = checked(key, value, knobs[key], f'{path}: {key}={value!r}')
    data_dirs = data_dirs_of(resumed['config'], path, knobs['data_dir'], given)
    found = first_with(str(knobs['dataset']), data_dirs, 'train')
    if found is not None:
        knobs['data_dir'] = found
    vocab_size = resumed['model_args'].get('vocab_size')
    symbols = Symbols(resumed.get('tokenizer'), vocab_size, padded=True,
                      trained_on=_trained_on(resumed))
    return Start(resumed=resumed, path=path, symbols=symbols)


def _train_further(knobs, given):
    """Return the Start of a run that trains a model from Hugging Face further."""
    name = knobs['init_from']
    asked = knobs['block_size'] if 'block_size' in given else None
    settings = {key: knobs[key] for key in TRAINING}
    model, tokenizer = from_hub(name, ('resume', 'scratch'), asked, **settings)
    has = model.config.block_size
    if asked is not None and asked > has:
        say(f'note: {name} has block_size={has}: windows of {has} tokens instead of {asked}')
        knobs['block_size'] = has
    state = tokenizer.state() if tokenizer else None
    return Start(pretrained=model, path=name, symbols=Symbols(state, model.config.vocab_size))


def _keep_shape(knobs, given, model_args, path):
    """Give the knobs the shape of a model that is trained further.

    Fail where a knob that was typed says otherwise. path: what the model is from."""
    for each in fields(GPTConfig):
        key = each.name
        if key not in knobs or key in TRAINING:
            continue
        had = checked(key, model_args.get(key, knobs[key]), knobs[key], f'{path}: {key}')
        if had != knobs[key] and key in given:
            fail(f'{key}={knobs[key]}, but the model in {path} has {key}={had}, and training it '
                 f'further keeps its shape; type --{key}={had}, or --init_from=scratch and '
                 f'another --out_dir for a new one')
        knobs[key] = had


def shape(knobs):
    """Return the GPTConfig that knobs ask for; fail for one that cannot exist."""
    asked = {each.name: knobs[each.name] for each in fields(GPTConfig) if each.name in knobs}
    try:
        return GPTConfig(**asked)
    except ValueError as error:
        fail(error)


def check_symbols(data, path, symbols):
    """Fail for a dataset with other tokens than the Symbols that a model was trained on.

    path: what the model is from. symbols: None for a new model, which fits every dataset."""
    if symbols is None or _fits(data, symbols):
        return
    difference = f'{symbols.vocab_size} and {data.vocab_size} symbols'
    kind = kind_of(symbols.tokenizer)
    if kind == data.tokenizer.state()['kind'] == 'char':
        difference = different_characters(symbols.tokenizer['chars'], data.tokenizer.chars)
    elif kind == data.tokenizer.state()['kind'] == 'bpe':
        difference += ', learned from different texts or with another --vocab_size'
    advice = advice_for_symbols(path, kind)
    if was_replaced(data, symbols.trained_on):
        advice = (f'{data.folder} was made anew after that training; '
                  f'train a new model on it, or {advice}')
    fail(f'{path} was trained with another tokenizer than that of {data.folder}: {difference}; '
         f'{advice}')


def was_replaced(data, trained_on):
    """Return whether a dataset has other token files than when a model was trained on it.

    trained_on: what the model's checkpoint says about its text; {} where that is not known."""
    now = data.fingerprint()
    then = trained_on.get('sha256')
    return trained_on.get('name') == data.name and bool(now and then) and now != then


def is_other_text(resumed, data):
    """Return whether a run was trained on another text than the dataset that it is resumed with."""
    was = resumed.get('data')
    if not isinstance(was, dict):   # an earlier version's checkpoint, or nanoGPT's
        return str(resumed['config'].get('dataset', data.name)) != data.name
    now = data.fingerprint()
    if now and was.get('sha256'):
        return now != was['sha256']
    return was.get('name') != data.name


def _fits(data, symbols):
    """Return whether a dataset has the Symbols that a model was trained on, as far as is known."""
    if symbols.tokenizer not in (None, data.tokenizer.state()):
        return False
    if type(symbols.vocab_size) is not int:   # a checkpoint can hold anything
        return True
    if symbols.tokenizer is None and not symbols.padded:
        return symbols.vocab_size == data.vocab_size
    return symbols.vocab_size >= data.vocab_size


def kind_of(state):
    """Return the kind of tokenizer that a checkpoint describes, None where it has no description.

    state: whatever the checkpoint holds."""
    if not isinstance(state, dict) or not isinstance(state.get('kind'), str):
        return None
    if state['kind'] == 'char' and not isinstance(state.get('chars'), str):
        return None
    return state['kind']


def different_characters(known, needed):
    """Return the clause that names the characters of a dataset that a model lacks.

    known: the model's characters. needed: the dataset's."""
    lacking = [char for char in needed if char not in known]
    if not lacking:
        return 'it knows all characters of that dataset, but numbers them differently'
    shown = ', '.join(map(repr, lacking[:20]))
    if len(lacking) > 20:
        shown += ', ...'
    return f'it lacks {len(lacking)} of its characters: {shown}'


def advice_for_symbols(path, kind):
    """Return what to type for a dataset with the tokenizer of the model in path.

    kind: the tokenizer's, None where it is not known."""
    if kind in ('byte', 'gpt2'):
        made_by = kind
    elif kind and os.path.isfile(path):
        made_by = shlex.quote(f'FROM:{path}')
    elif kind == 'char':
        return 'type --dataset=NAME for one with the same characters'
    else:
        return 'type --dataset=NAME for one with the same'
    return (f'type --dataset=NAME for one with the same, which python prepare_text.py --input=FILE '
            f'--name=NAME --tokenizer={made_by} makes')
