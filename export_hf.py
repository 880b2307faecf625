"""
A checkpoint to a folder that Hugging Face's transformers reads.

    python export_hf.py --out_dir=out --to=FOLDER              # best.pt of a run
    python export_hf.py --checkpoint=ckpt.pt --to=FOLDER       # a file, also one of nanoGPT's

then, with transformers,
    AutoModelForCausalLM.from_pretrained(FOLDER)
    AutoTokenizer.from_pretrained(FOLDER)
and here
    python sample.py --init_from=FOLDER

Writes config.json, generation_config.json, model.safetensors, tokenizer.json and
tokenizer_config.json into FOLDER.
"""
import os
import shlex
import shutil
import tempfile

import lib.early  # noqa: F401  # before NumPy and torch

from lib.configurator import configure, exit_on_signals
from lib.console import fail, say
from lib.starting import open_model
from lib.tokenizers import hf_tokenizer_files

to = ''               # the folder to write; it must be new or empty
init_from = 'resume'  # 'resume': a checkpoint; or a model on Hugging Face's hub or in a folder
out_dir = 'out'       # folder of the run
checkpoint = ''       # a checkpoint file, instead of the one in out_dir
data_dir = 'data'     # folder of datasets; a checkpoint by nanoGPT needs the vocabulary of its own
_, given = configure(globals())


def write_into(folder):
    """Write the model and its tokenizer into a folder."""
    model.save_pretrained(folder, opened.tokenizer.end)
    files = hf_tokenizer_files(opened.tokenizer, model.config.block_size)
    for name, content in files.items():
        with open(os.path.join(folder, name), 'w', encoding='utf-8') as f:
            f.write(content)


def move_files(start, end):
    """Move the files of one folder into another, config.json last.

    A folder without config.json is not taken for a model, so a half-moved one does no harm."""
    names = sorted(os.listdir(start))
    names.remove('config.json')
    for name in [*names, 'config.json']:
        os.replace(os.path.join(start, name), os.path.join(end, name))


if not to:
    fail('--to is needed: the folder to write; '
         'type python export_hf.py --out_dir=out --to=FOLDER')
if os.path.exists(to) and (not os.path.isdir(to) or os.listdir(to)):
    fail(f'--to={to} exists and is not an empty folder; type --to=FOLDER for a new one')
opened = open_model(init_from, out_dir, checkpoint, data_dir, given)
model = opened.model
exit_on_signals()   # a signal removes what is half-written

part = None
try:
    parent = os.path.dirname(os.path.abspath(to))
    os.makedirs(parent, exist_ok=True)
    part = tempfile.mkdtemp(prefix='.export-', dir=parent)   # on the same disk as FOLDER
    write_into(part)
    os.makedirs(to, exist_ok=True)
    move_files(part, to)
except ValueError as error:
    fail(f'{opened.where}: {error}; transformers reads GPT-2 alone; type --checkpoint=FILE for a '
         f'model with the defaults pos=learned, norm=pre, residual=True, qk_norm=False')
except OSError as error:
    fail(f'--to={to} cannot be written ({error.strerror or error}); make room, '
         f'or type --to=FOLDER for another place')
finally:
    if part and os.path.isdir(part):
        shutil.rmtree(part)
say(f'{opened.where} -> {to}; type python sample.py --init_from={shlex.quote(to)}')
