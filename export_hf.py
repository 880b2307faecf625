"""
A checkpoint as Hugging Face's transformers reads it.

    python export_hf.py --out_dir=out --to=FOLDER              # best.pt of a run
    python export_hf.py --checkpoint=ckpt.pt --to=FOLDER       # a file, also one of nanoGPT's

then, with transformers: AutoModelForCausalLM.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER); and here:
python sample.py --init_from=FOLDER.

Writes config.json, generation_config.json, model.safetensors, tokenizer.json and tokenizer_config.json into FOLDER.
"""
import os
import shlex
import shutil
import tempfile

from lib import checkpoint as checkpoints
from lib.configurator import configure, exit_on_signals
from lib.console import fail, say
from lib.tokenizers import hf_tokenizer_files

to = ''             # the folder to write; it must be new or empty
init_from = 'resume'  # 'resume': a checkpoint; else a hub name or folder, to be written anew
out_dir = 'out'     # folder of the run
checkpoint = ''     # a checkpoint file, instead of the one in out_dir
data_dir = 'data'   # where a checkpoint by nanoGPT finds its vocabulary
_, given = configure(globals())

if not to:
    fail('--to is needed: the folder to write; type python export_hf.py --out_dir=out --to=FOLDER')
if os.path.exists(to) and (not os.path.isdir(to) or os.listdir(to)):
    fail(f'--to={to} exists and is not an empty folder; type --to=FOLDER for a new one')
opened = checkpoints.open_model(init_from, out_dir, checkpoint, data_dir, given)
model = opened.model
exit_on_signals()   # and what is half-written is removed

part = None
try:
    parent = os.path.dirname(os.path.abspath(to))
    os.makedirs(parent, exist_ok=True)
    part = tempfile.mkdtemp(prefix='.export-', dir=parent)   # on the same disk; moved when all of it is there
    model.save_pretrained(part)
    for name, content in hf_tokenizer_files(opened.tokenizer, model.config.block_size).items():
        with open(os.path.join(part, name), 'w', encoding='utf-8') as f:
            f.write(content)
    os.makedirs(to, exist_ok=True)
    for name in sorted(os.listdir(part), key='config.json'.__eq__):   # config.json last: without it nothing is a model
        os.replace(os.path.join(part, name), os.path.join(to, name))
except ValueError as error:
    fail(f'{opened.where}: {error}; what can be exported is GPT-2 itself: pos=learned, norm=pre, residual=True, qk_norm=False')
except OSError as error:
    fail(f'--to={to} cannot be written ({error.strerror or error}); make room, or type --to=FOLDER for another place')
finally:
    if part and os.path.isdir(part):
        shutil.rmtree(part)
say(f'{opened.where} -> {to}; type python sample.py --init_from={shlex.quote(to)}')
