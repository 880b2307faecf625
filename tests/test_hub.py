"""Hugging Face's weights and tokenizers, both ways, and nanoGPT's checkpoints. pytest tests/test_hub.py"""
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, TEXT, read_log
from safetensors.torch import load_file, save_file

from lib import checkpoint, data, prepare, tokenizers
from model import GPT, GPTConfig

transformers.logging.set_verbosity_error()
SIZES = dict(n_layer=5, n_head=3, n_embd=48, vocab_size=1003, n_positions=64)
# six scripts, emoji with joiners, combining marks, blanks of all kinds, and the end of a text
TEXTS = ['Hello, world!  two  spaces\n\n\ttab', 'Привет, мир', '你好世界，這是測試', 'こんにちは世界', 'مرحبا بالعالم', 'नमस्ते दुनिया',
         'שלום עולם', '👩‍👩‍👧‍👦 🇫🇷🎉', 'e\u0301 \u200b zero', "I'll can't 123 4567 \r\n x", '\u00a0nbsp\u3000wide', '']


def hf_model(**changes):
    """A random GPT-2 by transformers; weights large enough that greedy text varies."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(**{**SIZES, **changes}, initializer_range=0.3, bos_token_id=None, eos_token_id=None)
    model = transformers.GPT2LMHeadModel(config).eval()
    for p in model.parameters():   # biases and norms too, which transformers leaves at 0 and 1
        if p.dim() == 1:
            torch.nn.init.normal_(p, p.mean().item(), 0.1)
    return model


def close(ours, theirs, tolerance=1e-4):
    idx = torch.randint(ours.config.vocab_size, (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (ours.eval()(idx)[0] - theirs.eval()(idx).logits).abs().max() < tolerance
    greedy = theirs.generate(idx[:, :10], attention_mask=torch.ones_like(idx[:, :10]), max_new_tokens=50, do_sample=False, pad_token_id=0)
    assert torch.equal(ours.generate(idx[:, :10], 50, temperature=0), greedy)


# ---- weights -------------------------------------------------------------------------------------------------------

@pytest.mark.processor
@pytest.mark.parametrize('changes', [{}, dict(tie_word_embeddings=False), dict(activation_function='gelu'),
                                     dict(activation_function='relu2'), dict(n_inner=192), dict(n_layer=1, n_head=1, n_embd=7)])
def test_there_and_back(folder, changes):
    theirs = hf_model(**changes)
    theirs.save_pretrained('theirs')
    ours = GPT.from_pretrained('theirs')
    assert ours.config.dropout == 0.1 and GPT.from_pretrained('theirs', dropout=0.3).config.dropout == 0.3
    close(ours, theirs)
    ours.save_pretrained('ours')
    again = transformers.AutoModelForCausalLM.from_pretrained('ours')
    close(ours, again)
    a, b = theirs.state_dict(), again.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert load_file('theirs/model.safetensors').keys() == load_file('ours/model.safetensors').keys()


@pytest.mark.processor
@pytest.mark.parametrize('changes', [dict(bias=False), dict(qkv_bias=False), dict(tie_weights=False), dict(activation='relu2'),
                                     dict(activation='gelu_erf'), dict(dropout=0.2, flash=False)])
def test_ours_in_transformers(folder, changes):
    torch.manual_seed(0)
    ours = GPT(GPTConfig(**{**dict(block_size=64, vocab_size=100, n_layer=2, n_head=2, n_embd=32), **changes}))
    for p in ours.parameters():
        torch.nn.init.normal_(p, std=0.3)
    ours.save_pretrained('ours')
    close(ours, transformers.AutoModelForCausalLM.from_pretrained('ours'))
    close(GPT.from_pretrained('ours'), transformers.AutoModelForCausalLM.from_pretrained('ours'))


def test_padded_rows_are_not_drawn_there_either(folder):
    torch.manual_seed(0)
    ours = GPT(GPTConfig(block_size=64, vocab_size=128, n_layer=1, n_head=1, n_embd=8))
    torch.nn.init.normal_(ours.transformer.wte.weight)
    ours.drawable = 20
    ours.save_pretrained('ours')
    theirs = transformers.AutoModelForCausalLM.from_pretrained('ours')
    idx = torch.arange(5)[None]
    text = theirs.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=40, do_sample=False, pad_token_id=0)
    assert text.max() < 20 and torch.equal(text, ours.generate(idx, 40, temperature=0))


@pytest.mark.parametrize('change', [dict(pos='rope'), dict(pos='none'), dict(norm='post'), dict(norm='none'), dict(residual=False),
                                    dict(qk_norm=True, norm='post')])
def test_what_gpt2_cannot_express_is_refused(folder, change):
    with pytest.raises(ValueError) as refusal:
        GPT(GPTConfig(block_size=8, vocab_size=9, n_layer=1, n_head=1, n_embd=8, **change)).save_pretrained('out')
    assert all(f'{name}={value!r}' in str(refusal.value) for name, value in change.items()) and not os.path.exists('out')


def test_old_files(folder):
    """As on the hub: no prefix, masks with every layer, a head that repeats the embedding, several files, half precision."""
    theirs = hf_model()
    theirs.save_pretrained('theirs')
    weights = load_file('theirs/model.safetensors')
    old = {name.removeprefix('transformer.'): p for name, p in weights.items()}
    for i in range(5):
        old[f'h.{i}.attn.bias'] = torch.ones(1, 1, 64, 64).tril()
        old[f'h.{i}.attn.masked_bias'] = torch.tensor(-1e4)
    shutil.copytree('theirs', 'old')
    save_file({name: p.contiguous() for name, p in old.items()}, 'old/model.safetensors')
    close(GPT.from_pretrained('old'), theirs)
    weights['lm_head.weight'] = weights['transformer.wte.weight'].clone()
    names = sorted(weights)
    shutil.copytree('theirs', 'parts')
    os.remove('parts/model.safetensors')
    for i in range(2):
        save_file({name: weights[name] for name in names[i::2]}, f'parts/model-0000{i + 1}-of-00002.safetensors')
    close(GPT.from_pretrained('parts'), theirs)
    theirs.half().save_pretrained('half')
    ours = GPT.from_pretrained('half')
    assert ours.lm_head.weight.dtype == torch.float32
    close(ours, theirs.float())


def test_cropped_positions(folder):
    theirs = hf_model()
    theirs.save_pretrained('theirs')
    ours = GPT.from_pretrained('theirs', block_size=20).eval()
    idx = torch.randint(1003, (2, 20))
    with torch.no_grad():
        assert ours.config.block_size == 20 and (ours(idx)[0] - theirs(idx).logits).abs().max() < 1e-4
    with pytest.raises(ValueError, match='64 positions'):
        GPT.from_pretrained('theirs', block_size=65)


def test_hub_name_from_the_cache(folder, monkeypatch):
    """huggingface_hub's own cache and offline mode."""
    import huggingface_hub.constants
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(folder / 'hub'))
    theirs = hf_model()
    theirs.save_pretrained('hub/models--someone--tiny/snapshots/abc')
    os.makedirs('hub/models--someone--tiny/refs')
    Path('hub/models--someone--tiny/refs/main').write_text('abc')
    close(GPT.from_pretrained('someone/tiny'), theirs)
    with pytest.raises(OSError):
        GPT.from_pretrained('someone/else')


def harm(kind):
    """Make the GPT-2 in 'theirs' one that must be refused."""
    path = Path('theirs/config.json')
    config, weights = json.loads(path.read_text()), load_file('theirs/model.safetensors')
    changes = {'llama': dict(model_type='llama'), 'epsilon': dict(layer_norm_epsilon=1e-6), 'inner': dict(n_inner=7),
               'activation': dict(activation_function='silu'), 'layers': dict(n_layer=10**9), 'text': dict(n_layer='5'),
               'heads': dict(n_head=5), 'scaled': dict(scale_attn_by_inverse_layer_idx=True), 'vocabulary': dict(vocab_size=1004),
               'list': dict(activation_function=['gelu']), 'null': dict(n_embd=None, n_inner=192)}
    if kind in changes:
        path.write_text(json.dumps({**config, **changes[kind]}))
    elif kind == 'no config':
        path.unlink()
    elif kind == 'no json':
        path.write_text('{')
    elif kind == 'no object':
        path.write_text('[]')
    elif kind == 'no weights':
        os.rename('theirs/model.safetensors', 'theirs/pytorch_model.bin')
    elif kind == 'missing':
        del weights['transformer.h.3.mlp.c_fc.weight']
    elif kind == 'unexpected':
        weights['score.weight'] = torch.zeros(2, 48)
    elif kind == 'integers':
        weights = {name: p.to(torch.int8) for name, p in weights.items()}
    elif kind == 'not finite':
        weights['transformer.wpe.weight'][3, 4] = float('inf')
    if kind in ('missing', 'unexpected', 'not finite', 'integers'):
        save_file(weights, 'theirs/model.safetensors')
    raw = bytearray(Path('theirs/model.safetensors').read_bytes()) if kind in ('cut', 'offsets', 'huge header') else b''
    if kind == 'cut':
        raw = raw[:len(raw) // 2]
    elif kind == 'offsets':
        raw = raw.replace(b'"data_offsets":[0,', b'"data_offsets":[9,', 1)
    elif kind == 'huge header':
        raw[:8] = (1 << 62).to_bytes(8, 'little')
    if raw:
        Path('theirs/model.safetensors').write_bytes(raw)


@pytest.mark.parametrize('kind, word', [
    ('llama', 'llama'), ('epsilon', 'layer_norm_epsilon=1e-06'), ('inner', 'n_inner=7'), ('activation', 'silu'), ('layers', 'n_layer=1000000000'),
    ('text', "n_layer='5'"), ('heads', 'n_head'), ('scaled', 'scale_attn_by_inverse_layer_idx'), ('vocabulary', 'transformer.wte.weight'),
    ('list', 'activation_function'), ('null', 'n_embd=None'), ('no config', 'config.json'), ('no json', 'Expecting'), ('no object', 'not a supported GPT-2'),
    ('no weights', 'model.safetensors'), ('missing', 'transformer.h.3.mlp.c_fc.weight'), ('unexpected', 'score.weight'),
    ('not finite', 'not finite'), ('integers', 'not finite numbers'), ('cut', 'model.safetensors'), ('offsets', 'model.safetensors'), ('huge header', 'model.safetensors')])
def test_what_is_no_gpt2_is_refused(folder, refused, kind, word):
    hf_model().save_pretrained('theirs')
    harm(kind)
    refused('sample.py', '--init_from=theirs', '--device=cpu', words=['theirs', word, '--init_from'])


def test_name_that_does_not_exist(mini, refused, monkeypatch):
    import huggingface_hub.constants
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    for name in ('someone/nobody', 'gpt2-huge', './nowhere', '/nowhere/at/all', 'a b', ''):
        for script in ('train.py', 'sample.py', 'evaluate.py'):
            refused(script, f'--init_from={name}', words=['init_from', name])


def test_a_name_that_was_nearly_typed(mini, refused, monkeypatch):
    """A short line at once: neither the hub is asked nor explained."""
    monkeypatch.setattr('lib.checkpoint.fetch_pretrained', None)
    places = {'export_hf.py': ['--to=new'], 'export_web.py': ['--to=new.html']}
    for script in ('train.py', 'sample.py', 'evaluate.py', 'analyze.py', *places):
        to = places.get(script, [])
        nearly = dict(resum='resume', distillgpt2='distilgpt2') | {'gpt2-larg': 'gpt2-large'}
        for typed, meant in nearly.items():
            words = [typed, f'did you mean {meant}?', f'type --init_from={meant}']
            line = refused(script, f'--init_from={typed}', *to, words=words)
            assert len(line) < 120, line
    refused('train.py', '--init_from=scrach', words=['type --init_from=scratch'])


def test_a_name_on_the_hub_without_a_network(folder, refused, process, monkeypatch):
    """Neither a hub out of reach nor offline mode gives more than a short line."""
    import huggingface_hub.constants
    reach = dict(HF_HOME=str(folder / 'hf'), HF_ENDPOINT='http://127.0.0.1:9')
    lines = [process('sample.py', '--init_from=someone/nobody', env=reach).stderr.strip()]
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(folder / 'hub'))
    lines.append(refused('train.py', '--init_from=someone/nobody', '--device=cpu'))
    for line in lines:
        assert '\n' not in line and len(line) < 300, line
        for words in ('error: init_from=someone/nobody: ', 'cannot be reached',
                      'not in the local cache', 'model.safetensors', 'type --init_from=FOLDER'):
            assert words in line, line


def test_a_run_is_not_hugging_faces_folder(trained, folder, refused):
    for name in (trained, trained / 'last.pt'):
        refused('train.py', f'--init_from={name}', words=['run', f'type --init_from=resume --out_dir={trained}'])


def test_export_on_a_full_disk(trained, folder, refused, monkeypatch):
    import safetensors
    import safetensors.torch

    def full(*args, **options):
        raise safetensors.SafetensorError('No space left on device')
    monkeypatch.setattr(safetensors.torch, 'save_file', full)
    refused('export_hf.py', f'--out_dir={trained}', '--to=there', words=['--to=there', 'No space left'])


# ---- tokenizers ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', ['gpt2', 'byte', 'char'])
def test_tokenizer_files(folder, gpt2_files, kind):
    ours = tokenizers.make_tokenizer(kind, ''.join(TEXTS) + '<|endoftext|> ab')
    for name, content in tokenizers.hf_tokenizer_files(ours, 64).items():
        Path(name).write_text(content, encoding='utf-8')
    theirs = transformers.AutoTokenizer.from_pretrained('.')
    for text in [*TEXTS, 'a<|endoftext|> b', '  ' * 50, ''.join(TEXTS) * 3]:
        ids = ours.encode(text).tolist()
        assert theirs.encode(text, add_special_tokens=False) == ids, text
        assert theirs.decode(ids) == text
    assert theirs.eos_token == ('<|endoftext|>' if kind == 'gpt2' else None)
    assert tokenizers.read_hf_tokenizer('.').state() == ours.state()


def test_vocabulary_of_another_language(folder, gpt2_files):
    """As many tokens as GPT-2 and other ones: never taken for GPT-2's."""
    for name, content in tokenizers.hf_tokenizer_files(tokenizers.make_tokenizer('gpt2'), 64).items():
        Path(name).write_text(content, encoding='utf-8')
    content = json.loads(Path('tokenizer.json').read_text(encoding='utf-8'))
    vocab = content['model']['vocab']
    Path('vocab.json').write_text(json.dumps({**vocab, '<|endoftext|>': 50256}))
    assert content['model']['merges'][:3] == [['Ġ', 't'], ['Ġ', 'a'], ['h', 'e']]   # the first ones of GPT-2's merges.txt
    os.rename('tokenizer.json', 'kept')
    assert tokenizers.read_hf_tokenizer('.').state() == dict(kind='gpt2')
    vocab['Ġthe'], vocab['Ġof'] = vocab['Ġof'], vocab['Ġthe']
    Path('vocab.json').write_text(json.dumps(vocab))
    with pytest.raises(ValueError, match='neither'):
        tokenizers.read_hf_tokenizer('.')
    for text in ('{', '[]', '{"model": 3}', '{"a": [1]}', 'null'):
        Path('vocab.json').write_text(text)
        with pytest.raises(ValueError, match=r'vocab\.json'):
            tokenizers.read_hf_tokenizer('.')


# ---- the scripts ---------------------------------------------------------------------------------------------------

def test_export(trained, folder, script):
    """A trained model speaks the same in transformers as here."""
    assert script('export_hf.py', f'--checkpoint={trained}/last.pt', '--to=exported').code == 0
    assert sorted(os.listdir('exported')) == ['config.json', 'generation_config.json', 'model.safetensors', 'tokenizer.json',
                                              'tokenizer_config.json']
    assert len({os.stat(f'exported/{name}').st_mode for name in os.listdir('exported')}) == 1
    model = transformers.AutoModelForCausalLM.from_pretrained('exported')
    tokenizer = transformers.AutoTokenizer.from_pretrained('exported')
    with torch.no_grad():
        text = tokenizer.decode(model.generate(torch.tensor([tokenizer.encode('3 times')]), max_new_tokens=9, do_sample=False, pad_token_id=0)[0])
    flags = ['--start=3 times', '--temperature=0', '--max_new_tokens=9', '--device=cpu', '--dtype=float32']
    assert script('sample.py', f'--checkpoint={trained}/last.pt', *flags).out == text + '\n'
    assert script('sample.py', '--init_from=exported', *flags).out == text + '\n'


@pytest.mark.parametrize('kind', ['byte', 'gpt2'])
def test_export_with_the_other_tokenizers(folder, script, gpt2_files, kind):
    """Text in, greedy text out, in transformers and here; ids above the tokenizer's are padding."""
    torch.manual_seed(0)
    tokenizer = tokenizers.make_tokenizer(kind)
    model = GPT(GPTConfig(block_size=32, vocab_size=tokenizer.vocab_size + 47, n_layer=1, n_head=1, n_embd=8))
    torch.nn.init.normal_(model.transformer.wte.weight)
    checkpoint.save('a.pt', dict(format=1, model=model.state_dict(), model_args=asdict(model.config), tokenizer=tokenizer.state()))
    assert script('export_hf.py', '--checkpoint=a.pt', '--to=exported').code == 0
    theirs, encoder = transformers.AutoModelForCausalLM.from_pretrained('exported'), transformers.AutoTokenizer.from_pretrained('exported')
    ids = torch.tensor([encoder.encode('né 二 🎉')])
    text = encoder.decode(theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=15, do_sample=False, pad_token_id=0)[0])
    flags = ['--start=né 二 🎉', '--temperature=0', '--max_new_tokens=15', '--device=cpu', '--dtype=float32']
    assert script('sample.py', '--init_from=exported', *flags).out == text + '\n' == script('sample.py', '--checkpoint=a.pt', *flags).out


def test_export_refusals(trained, folder, refused, script):
    refused('export_hf.py', f'--checkpoint={trained}/last.pt', words=['--to'])
    (folder / 'full').mkdir()
    (folder / 'full' / 'x').write_text('mine')
    refused('export_hf.py', f'--checkpoint={trained}/last.pt', '--to=full', words=['full', 'empty'])
    loaded = checkpoint.load(str(trained / 'last.pt'))
    loaded['model_args'].update(residual=False)
    checkpoint.save('other.pt', loaded)
    refused('export_hf.py', '--checkpoint=other.pt', '--to=out', words=['residual=False', 'pos=learned'])
    refused('export_hf.py', '--checkpoint=none.pt', '--to=out', words=['none.pt'])
    assert sorted(os.listdir()) == ['full', 'other.pt'] and os.listdir('full') == ['x']


def test_fine_tuning(mini, script, refused):
    """The first loss is transformers' own on the same windows; the run is an ordinary one from there on."""
    vocab = data.Dataset('mini').vocab_size
    theirs = hf_model(vocab_size=vocab)
    theirs.save_pretrained('theirs')
    common = ['--init_from=theirs', '--dataset=mini', '--device=cpu', '--dtype=float32', '--eval_iters=1000', '--batch_size=4',
              '--gradient_accumulation_steps=1', '--eval_interval=2', '--learning_rate=1e-3', '--warmup_iters=0', '--block_size=32', '--dropout=0.25']
    result = script('train.py', *common, '--max_iters=4')
    assert result.code == 0, result.err
    losses = []
    for x, y in data.evaluation_batches(data.Dataset('mini'), 'val', 32, 4):
        with torch.no_grad():
            logits = theirs(x).logits
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1, reduction='none')[y.flatten() >= 0])
    rows = read_log('out/log.csv')
    assert float(rows[0]['val_loss']) == pytest.approx(torch.cat(losses).mean().item(), abs=1e-4)
    assert float(rows[-1]['val_loss']) < float(rows[0]['val_loss'])
    args = checkpoint.load('out/last.pt')['model_args']
    assert (args['block_size'], args['n_layer'], args['n_embd'], args['dropout']) == (32, 5, 48, 0.25)
    assert script('train.py', '--init_from=resume', '--max_iters=6', '--device=cpu').code == 0
    assert json.load(open('out/config.json'))['n_layer'] == 5
    refused('train.py', *common, '--n_layer=3', words=['n_layer=3', 'n_layer=5'])
    hf_model().save_pretrained('larger')
    refused('train.py', '--init_from=larger', *common[1:], words=['another tokenizer', '1003'])


def test_fine_tuning_ones_own_export(trained, mini, script, refused):
    """A config that asks for more context than the model has gets the model's."""
    assert script('export_hf.py', f'--out_dir={trained}', '--to=out-hf').code == 0
    Path('more.py').write_text("init_from = 'gpt2'\ndataset = 'mini'\nblock_size = 256\n"
                               "out_dir = 'out-more'\nmax_iters = 2\n")
    flags = ['more.py', '--init_from=out-hf', '--device=cpu', '--eval_iters=1', '--batch_size=2',
             '--gradient_accumulation_steps=1']
    result = script('train.py', *flags)
    assert result.code == 0 and 'done: 2 steps' in result.err, result.err
    note = 'note: out-hf has block_size=16: windows of 16 tokens instead of 256\n'
    assert result.err.count(note) == 1
    assert checkpoint.load('out-more/last.pt')['model_args']['block_size'] == 16
    assert json.load(open('out-more/config.json'))['block_size'] == 16
    # data of another tokenizer: the advice makes data that the model can be trained on
    tokenizer = tokenizers.ByteTokenizer()
    splits = {split: [(tokenizer.encode(TEXT), len(TEXT))] for split in ('train', 'val')}
    source = dict(name='bytes', url=None, sha256='', stand_in=False)
    prepare.write_dataset('data/bytes', splits, tokenizer, source)
    words = ['out-hf', 'another tokenizer', 'same characters']
    line = refused('train.py', *flags, '--dataset=bytes', words=words)
    assert 'FROM:' not in line   # which takes a checkpoint file
    assert checkpoint.load('out-more/last.pt')['iter_num'] == 2


def test_advice_for_an_export_of_bytes(mini, script, refused):
    """Followed, it leads to a run."""
    model = GPT(GPTConfig(block_size=16, vocab_size=256, n_layer=1, n_head=1, n_embd=8))
    checkpoint.save('a.pt', dict(format=1, model=model.state_dict(), tokenizer=dict(kind='byte'),
                                 model_args=asdict(model.config)))
    assert script('export_hf.py', '--checkpoint=a.pt', '--to=out-hf').code == 0
    flags = ['--init_from=out-hf', '--device=cpu', '--eval_iters=1', '--batch_size=2',
             '--gradient_accumulation_steps=1', '--max_iters=1']
    refused('train.py', *flags, '--dataset=mini',
            words=['--dataset=NAME', 'prepare_text.py --input=FILE --name=NAME --tokenizer=byte'])
    Path('text.txt').write_text(TEXT)
    made = script('prepare_text.py', '--input=text.txt', '--name=mine', '--tokenizer=byte')
    assert made.code == 0 and script('train.py', *flags, '--dataset=mine').code == 0


@pytest.mark.parametrize('name, parameters', [('train_gpt2', 124_439_808), ('train_gpt2_nobias', 124_412_160),
                                              ('train_enwik8_gpt2', 163_037_184)])
def test_sizes_of_the_configs(folder, name, parameters):
    """To the last parameter, on whatever device."""
    from lib.configurator import configure
    text = (ROOT / 'train.py').read_text().partition('# ---- knobs')[2].partition('knobs, given')[0]
    for device in ('cpu', 'cuda'):
        knobs = {}
        exec('#' + text, knobs)
        configure(knobs, lambda name, device=device: device, [str(ROOT / f'config/{name}.py')])
        fields = {field: knobs[field] for field in GPTConfig.__dataclass_fields__ if field in knobs}
        with torch.device('meta'):
            assert GPT(GPTConfig(**fields)).num_params() == parameters
        if name == 'train_enwik8_gpt2':
            assert knobs['batch_size'] * knobs['gradient_accumulation_steps'] == 64 and knobs['dtype'] == 'auto'


@pytest.mark.parametrize('name', ['finetune_shakespeare', 'eval_gpt2', 'eval_gpt2_medium', 'eval_gpt2_large', 'eval_gpt2_xl'])
def test_configs_for_gpt2(folder, script, gpt2_files, monkeypatch, name):
    """With a random GPT-2 of its vocabulary in the hub's cache, as each config comes."""
    import huggingface_hub.constants
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(folder / 'hub'))
    theirs = hf_model(n_layer=1, n_head=2, n_embd=8, vocab_size=50257, n_positions=1024)
    size = name.removeprefix('eval_').replace('_', '-') if name.startswith('eval') else 'gpt2'
    theirs.save_pretrained(f'hub/models--{size}/snapshots/abc')
    os.makedirs(f'hub/models--{size}/refs')
    Path(f'hub/models--{size}/refs/main').write_text('abc')
    Path('short.txt').write_text(TEXT[:4000])
    assert script('prepare_shakespeare.py', '--tokenizer=gpt2', '--input=short.txt').code == 0
    result = script('train.py', f'config/{name}.py', '--device=cpu', '--dtype=float32', *['--max_iters=2', '--eval_iters=1', '--batch_size=1'] * (name[0] == 'f'))
    assert result.code == 0, result.err
    assert ('done: 2 steps' if name[0] == 'f' else 'val loss') in result.err
    if name == 'eval_gpt2':
        x, y = next(data.evaluation_batches(data.Dataset('shakespeare'), 'val', 1024, 1))
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten(), ignore_index=-1).item()
        assert f'val loss {loss:.4f}' in result.err


# ---- nanoGPT -------------------------------------------------------------------------------------------------------

def nanogpt_checkpoint(path, prefix='', bias=True, vocab_size=64, dataset='mini'):
    """A file as nanoGPT's train.py saves it, with the optimizer after a step; returns the same model by transformers."""
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=16, vocab_size=vocab_size, n_positions=64, activation_function='gelu', initializer_range=0.3,
        bos_token_id=None, eos_token_id=None)).eval()   # nanoGPT's nn.GELU() is the exact one
    weights = {}
    for name, p in theirs.state_dict().items():
        transposed = name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight'))
        if bias or not name.endswith('.bias'):
            weights[name] = (p.T.contiguous() if transposed else p).clone()
    params = [torch.nn.Parameter(p.clone()) for name, p in weights.items() if name != 'lm_head.weight']
    groups = [dict(params=[p for p in params if p.dim() >= 2], weight_decay=0.1), dict(params=[p for p in params if p.dim() < 2], weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    sum(p.square().sum() for p in params).backward()
    optimizer.step()
    args = dict(n_layer=2, n_head=2, n_embd=16, block_size=64, bias=bias, vocab_size=vocab_size, dropout=0.0)
    config = dict(out_dir='out', eval_interval=5, eval_iters=3, dataset=dataset, batch_size=4, block_size=32, learning_rate=1e-3, max_iters=8,
                  gradient_accumulation_steps=1, device='cuda', dtype='bfloat16', compile=True, backend='nccl', always_save_checkpoint=True,
                  init_from='scratch', warmup_iters=1, lr_decay_iters=8, min_lr=1e-4, beta2=0.95, wandb_log=False)
    torch.save(dict(model={prefix + name: p for name, p in weights.items()}, optimizer=optimizer.state_dict(), model_args=args, iter_num=6,
                    best_val_loss=torch.tensor(3.25), config=config), path)
    return theirs


@pytest.mark.parametrize('prefix, bias', [('', True), ('_orig_mod.', True), ('_orig_mod.', False)])
def test_nanogpt_checkpoint(mini, script, prefix, bias):
    """Loads everywhere, and computes what nanoGPT computed."""
    import pickle
    meta = json.load(open('data/mini/meta.json'))
    os.remove('data/mini/meta.json')
    chars = meta['tokenizer']['chars']
    with open('data/mini/meta.pkl', 'wb') as f:
        pickle.dump(dict(vocab_size=len(chars), itos=dict(enumerate(chars)), stoi={c: i for i, c in enumerate(chars)}), f)
    os.mkdir('out')
    theirs = nanogpt_checkpoint('out/ckpt.pt', prefix, bias, vocab_size=len(chars))
    ours = checkpoint.build_model(checkpoint.load('out/ckpt.pt'), 'out/ckpt.pt')
    close(ours, theirs, 1e-5)
    assert script('sample.py', '--device=cpu', '--max_new_tokens=20').code == 0
    result = script('evaluate.py', '--device=cpu', '--json=-')
    nats, targets = 0.0, 0
    for x, y in data.evaluation_batches(data.Dataset('mini'), 'val', 64, 4):
        with torch.no_grad():
            nats += torch.nn.functional.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten(), ignore_index=-1, reduction='sum').item()
        targets += int((y >= 0).sum())
    assert json.loads(result.out)['nats_per_token'] == pytest.approx(nats / targets, abs=1e-5)
    result = script('train.py', '--init_from=resume', '--device=cpu', '--dtype=float32', '--compile=False')
    assert result.code == 0 and 'resumed from out/ckpt.pt at iter 6' in result.err, result.err
    assert [int(row['iter']) for row in read_log('out/log.csv')] == [6, 7, 8]
    assert script('export_hf.py', '--checkpoint=out/ckpt.pt', '--to=exported').code == 0
    close(ours, transformers.AutoModelForCausalLM.from_pretrained('exported'), 1e-5)


def test_nanogpt_vocabulary_beside_its_run(mini, script, refused):
    """Its clone is elsewhere; a folder of that name without a vocabulary here is passed over."""
    os.mkdir('clone')
    os.rename('data', 'clone/data')
    os.mkdir('clone/out')
    os.makedirs('data/mini')
    Path('data/mini/prepare.py').write_text('')
    nanogpt_checkpoint('clone/out/ckpt.pt', vocab_size=data.Dataset('mini', 'clone/data').vocab_size)
    flags = ['--out_dir=clone/out', '--device=cpu']
    result = script('sample.py', *flags, '--start=the miller', '--max_new_tokens=3')
    assert result.code == 0 and result.out.startswith('the miller'), result.err
    assert script('export_hf.py', '--out_dir=clone/out', '--to=exported').code == 0
    refused('sample.py', *flags, '--data_dir=typo', words=['typo/mini', 'type --data_dir=FOLDER'])
    shutil.rmtree('clone/data')
    os.remove('data/mini/prepare.py')
    os.rmdir('data/mini')
    refused('sample.py', *flags, words=['data/mini or clone/data/mini', 'type --data_dir=FOLDER'])


def test_nanogpt_optimizer_is_matched_by_parameter(mini):
    """Its state lies in the order of its parameters; ours must be the same order."""
    theirs = nanogpt_checkpoint('ckpt.pt')
    loaded = checkpoint.load('ckpt.pt')
    model = checkpoint.build_model(loaded, 'ckpt.pt')
    params = [p for group in model.optimizer_groups(0.1) for p in group['params']]
    for i, p in enumerate(params):   # the gradient of the sum of squares is twice the weight, and exp_avg a tenth of it
        assert torch.allclose(loaded['optimizer']['state'][i]['exp_avg'], 0.2 * p.detach(), atol=1e-6)
    assert len(params) == len(loaded['optimizer']['state']) == len(list(theirs.parameters()))


def test_nanogpt_bpe(folder, script, gpt2_files):
    """Token files without any meta are GPT-2's BPE."""
    os.makedirs('data/owt')
    ids = tokenizers.make_tokenizer('gpt2').encode(TEXT)
    for split in ('train', 'val'):
        np.asarray(ids, dtype=np.uint16).tofile(f'data/owt/{split}.bin')
    nanogpt_checkpoint('ckpt.pt', vocab_size=50304, dataset='owt')
    result = script('sample.py', '--checkpoint=ckpt.pt', '--device=cpu', '--max_new_tokens=5', '--start=the miller')
    assert result.code == 0 and result.out.startswith('the miller'), result.err
    assert script('evaluate.py', '--checkpoint=ckpt.pt', '--device=cpu').code == 0
