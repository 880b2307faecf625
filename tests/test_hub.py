"""Hugging Face's weights and tokenizers, nanoGPT's checkpoints. pytest tests/test_hub.py"""
import json
import os
import pickle
import shutil
from dataclasses import asdict
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
import transformers
from conftest import ROOT, TEXT, read_log
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

import model as gpt
from lib import checkpoint, data, prepare, tokenizers
from lib.configurator import configure
from model import GPT, GPTConfig

transformers.logging.set_verbosity_error()

SIZES = dict(n_layer=5, n_head=3, n_embd=48, vocab_size=1003, n_positions=64)
# seven scripts, emoji with joiners, combining marks, blanks of all kinds, and no text at all
TEXTS = [
    'Hello, world!  two  spaces\n\n\ttab',
    'Привет, мир',
    '你好世界，這是測試',
    'こんにちは世界',
    'مرحبا بالعالم',
    'नमस्ते दुनिया',
    'שלום עולם',
    '👩‍👩‍👧‍👦 🇫🇷🎉',
    'e\u0301 \u200b zero',
    "I'll can't 123 4567 \r\n x",
    '\u00a0nbsp\u3000wide',
    '',
]
SHORT_RUN = ['--device=cpu', '--eval_iters=1', '--batch_size=2', '--gradient_accumulation_steps=1']


def hf_model(**changes):
    """Return a random GPT-2 by transformers; its weights are large, so greedy text varies."""
    torch.manual_seed(0)
    settings = {**SIZES, **changes}
    config = transformers.GPT2Config(**settings, initializer_range=0.3, bos_token_id=None,
                                     eos_token_id=None)
    model = transformers.GPT2LMHeadModel(config).eval()
    for p in model.parameters():
        if p.dim() == 1:   # transformers leaves biases at 0 and norms at 1
            torch.nn.init.normal_(p, p.mean().item(), 0.1)
    return model


def small_gpt(**changes):
    """Return a GPT of ours with random weights."""
    torch.manual_seed(0)
    sizes = dict(block_size=64, vocab_size=100, n_layer=1, n_head=1, n_embd=8)
    return GPT(GPTConfig(**{**sizes, **changes}))


def read_by_transformers(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def greedy(theirs, idx, n):
    """Return idx and the n most likely tokens after it, by transformers."""
    with torch.no_grad():
        return theirs.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=n,
                               do_sample=False, pad_token_id=0)


def assert_same_model(ours, theirs, tolerance=1e-4):
    """Check that our model and transformers' have the same logits and the same greedy text."""
    generator = torch.Generator().manual_seed(1)
    idx = torch.randint(ours.config.vocab_size, (3, 40), generator=generator)
    with torch.no_grad():
        logits, loss = ours.eval()(idx)
        expected = theirs.eval()(idx).logits
    assert (logits - expected).abs().max() < tolerance
    start = idx[:, :10]
    assert torch.equal(ours.generate(start, 50, temperature=0), greedy(theirs, start, 50))


def validation_loss(theirs, dataset, block_size):
    """Return transformers' mean loss over the validation split, in nats per token."""
    nats = 0.0
    targets = 0
    for x, y in data.evaluation_batches(data.Dataset(dataset), 'val', block_size, 4):
        with torch.no_grad():
            logits = theirs(x).logits.flatten(0, 1)
        nats += cross_entropy(logits, y.flatten(), ignore_index=-1, reduction='sum').item()
        targets += int((y >= 0).sum())
    return nats / targets


def save_checkpoint(path, model, tokenizer):
    """Write a checkpoint of a model that was not trained."""
    checkpoint.save(path, dict(format=1, model=model.state_dict(),
                               model_args=asdict(model.config), tokenizer=tokenizer.state()))


@pytest.fixture
def offline(folder, monkeypatch):
    """Put the hub in offline mode, with hub/ in the test's folder as its cache."""
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(folder / 'hub'))


def put_into_cache(model, name):
    """Save a model where huggingface_hub's cache has the models that it downloads."""
    home = Path('hub', 'models--' + name.replace('/', '--'))
    model.save_pretrained(home / 'snapshots' / 'abc')
    (home / 'refs').mkdir()
    (home / 'refs' / 'main').write_text('abc')


# ---- weights -------------------------------------------------------------------------------------

@pytest.mark.processor
@pytest.mark.parametrize('changes', [
    {},
    dict(tie_word_embeddings=False),
    dict(activation_function='gelu'),
    dict(activation_function='relu2'),
    dict(n_inner=192),
    dict(n_layer=1, n_head=1, n_embd=7),
])
def test_a_model_of_transformers_comes_back_unchanged(folder, changes):
    theirs = hf_model(**changes)
    theirs.save_pretrained('theirs')
    ours = GPT.from_pretrained('theirs')
    assert ours.config.dropout == 0.1
    assert_same_model(ours, theirs)
    ours.save_pretrained('ours')
    again = read_by_transformers('ours')
    assert_same_model(ours, again)
    before = theirs.state_dict()
    after = again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    names = load_file('theirs/model.safetensors').keys()
    assert load_file('ours/model.safetensors').keys() == names


def test_dropout_can_be_chosen(folder):
    hf_model().save_pretrained('theirs')
    assert GPT.from_pretrained('theirs', dropout=0.3).config.dropout == 0.3


@pytest.mark.processor
@pytest.mark.parametrize('changes', [
    dict(bias=False),
    dict(qkv_bias=False),
    dict(tie_weights=False),
    dict(activation='relu2'),
    dict(activation='gelu_erf'),
    dict(dropout=0.2, flash=False),
])
def test_a_model_of_ours_is_the_same_in_transformers(folder, changes):
    ours = small_gpt(n_layer=2, n_head=2, n_embd=32, **changes)
    for p in ours.parameters():
        torch.nn.init.normal_(p, std=0.3)
    ours.save_pretrained('ours')
    theirs = read_by_transformers('ours')
    assert_same_model(ours, theirs)
    assert_same_model(GPT.from_pretrained('ours'), theirs)


def test_transformers_never_draws_padded_rows(folder):
    ours = small_gpt(vocab_size=128)
    torch.nn.init.normal_(ours.transformer.wte.weight)
    ours.drawable = 20   # the tokenizer has 20 symbols, the other rows are padding
    ours.save_pretrained('ours')
    theirs = read_by_transformers('ours')
    idx = torch.arange(5)[None]
    text = greedy(theirs, idx, 40)
    assert text.max() < 20
    assert torch.equal(text, ours.generate(idx, 40, temperature=0))


@pytest.mark.parametrize('change', [
    dict(pos='rope'),
    dict(pos='none'),
    dict(norm='post'),
    dict(norm='none'),
    dict(residual=False),
    dict(qk_norm=True, norm='post'),
])
def test_a_model_that_gpt2_cannot_express_is_not_saved(folder, change):
    with pytest.raises(ValueError) as refusal:
        small_gpt(**change).save_pretrained('out')
    for name, value in change.items():
        assert f'{name}={value!r}' in str(refusal.value)
    assert not os.path.exists('out')


def test_old_files_without_a_prefix_and_with_masks_are_read(folder):
    """The first GPT-2s on the hub have names without 'transformer.', and each layer's mask."""
    theirs = hf_model()
    theirs.save_pretrained('theirs')
    weights = load_file('theirs/model.safetensors')
    old = {name.removeprefix('transformer.'): p.contiguous() for name, p in weights.items()}
    for i in range(5):
        old[f'h.{i}.attn.bias'] = torch.ones(1, 1, 64, 64).tril()
        old[f'h.{i}.attn.masked_bias'] = torch.tensor(-1e4)
    save_file(old, 'theirs/model.safetensors')
    assert_same_model(GPT.from_pretrained('theirs'), theirs)


def test_weights_in_several_files_are_read(folder):
    """The head repeats the embedding, as in some files on the hub."""
    theirs = hf_model()
    theirs.save_pretrained('theirs')
    weights = load_file('theirs/model.safetensors')
    weights['lm_head.weight'] = weights['transformer.wte.weight'].clone()
    names = sorted(weights)
    os.remove('theirs/model.safetensors')
    for i in range(2):
        part = {name: weights[name] for name in names[i::2]}
        save_file(part, f'theirs/model-0000{i + 1}-of-00002.safetensors')
    assert_same_model(GPT.from_pretrained('theirs'), theirs)


def test_half_precision_becomes_single_precision(folder):
    theirs = hf_model().half()
    theirs.save_pretrained('half')
    ours = GPT.from_pretrained('half')
    assert ours.lm_head.weight.dtype == torch.float32
    assert_same_model(ours, theirs.float())


def test_positions_can_be_cropped_but_not_added(folder):
    theirs = hf_model()
    theirs.save_pretrained('theirs')
    ours = GPT.from_pretrained('theirs', block_size=20).eval()
    assert ours.config.block_size == 20
    idx = torch.randint(1003, (2, 20))
    with torch.no_grad():
        logits, loss = ours(idx)
        assert (logits - theirs(idx).logits).abs().max() < 1e-4
    with pytest.raises(ValueError, match='64 positions'):
        GPT.from_pretrained('theirs', block_size=65)


def test_a_hub_name_is_found_in_the_cache(offline):
    theirs = hf_model()
    put_into_cache(theirs, 'someone/tiny')
    assert_same_model(GPT.from_pretrained('someone/tiny'), theirs)
    with pytest.raises(OSError):
        GPT.from_pretrained('someone/else')


# ---- models that are refused ---------------------------------------------------------------------

@pytest.mark.parametrize('change, word', [
    (dict(model_type='llama'), 'llama'),
    (dict(layer_norm_epsilon=1e-6), 'layer_norm_epsilon=1e-06'),
    (dict(n_inner=7), 'n_inner=7'),
    (dict(activation_function='nonsense'), 'nonsense'),
    (dict(activation_function=['gelu']), 'activation_function'),
    (dict(n_layer=10**9), 'n_layer=1000000000'),
    (dict(n_layer='5'), "n_layer='5'"),
    (dict(n_head=5), 'n_head'),
    (dict(n_embd=None, n_inner=192), 'n_embd=None'),
    (dict(scale_attn_by_inverse_layer_idx=True), 'scale_attn_by_inverse_layer_idx'),
    (dict(vocab_size=1004), 'transformer.wte.weight'),
])
def test_a_config_that_is_not_a_gpt2_is_refused(folder, refused, change, word):
    hf_model().save_pretrained('theirs')
    path = Path('theirs/config.json')
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | change))
    words = ['theirs', word, '--init_from']
    refused('sample.py', '--init_from=theirs', '--device=cpu', words=words)


def damage(kind):
    """Damage the GPT-2 in theirs/ in some way."""
    config = Path('theirs/config.json')
    file = Path('theirs/model.safetensors')
    if kind == 'no config':
        config.unlink()
    elif kind == 'no json':
        config.write_text('{')
    elif kind == 'no object':
        config.write_text('[]')
    elif kind == 'no weights':
        file.rename('theirs/pytorch_model.bin')
    elif kind == 'cut':
        os.truncate(file, file.stat().st_size // 2)
    elif kind == 'offsets':
        raw = file.read_bytes()
        file.write_bytes(raw.replace(b'"data_offsets":[0,', b'"data_offsets":[9,', 1))
    elif kind == 'huge header':
        file.write_bytes((1 << 62).to_bytes(8, 'little') + file.read_bytes()[8:])
    else:
        save_file(damaged_weights(kind, load_file(file)), file)


def damaged_weights(kind, weights):
    if kind == 'missing':
        del weights['transformer.h.3.mlp.c_fc.weight']
    elif kind == 'unexpected':
        weights['score.weight'] = torch.zeros(2, 48)
    elif kind == 'not finite':
        weights['transformer.wpe.weight'][3, 4] = float('inf')
    elif kind == 'integers':
        weights = {name: p.to(torch.int8) for name, p in weights.items()}
    return weights


@pytest.mark.parametrize('kind, word', [
    ('no config', 'config.json'),
    ('no json', 'Expecting'),
    ('no object', 'not a supported GPT-2'),
    ('no weights', 'model.safetensors'),
    ('cut', 'model.safetensors'),
    ('offsets', 'model.safetensors'),
    ('huge header', 'model.safetensors'),
    ('missing', 'transformer.h.3.mlp.c_fc.weight'),
    ('unexpected', 'score.weight'),
    ('not finite', 'not finite'),
    ('integers', 'not finite numbers'),
])
def test_damaged_files_are_refused(folder, refused, kind, word):
    hf_model().save_pretrained('theirs')
    damage(kind)
    words = ['theirs', word, '--init_from']
    refused('sample.py', '--init_from=theirs', '--device=cpu', words=words)


@pytest.mark.parametrize('program', ['train.py', 'sample.py', 'evaluate.py'])
def test_a_name_that_does_not_exist_is_refused(mini, refused, offline, program):
    for name in ('someone/nobody', 'gpt2-huge', './nowhere', '/nowhere/at/all', 'a b', ''):
        refused(program, f'--init_from={name}', words=['init_from', name])


@pytest.mark.parametrize('program, flags', [
    ('train.py', []),
    ('sample.py', []),
    ('evaluate.py', []),
    ('analyze.py', []),
    ('export_hf.py', ['--to=new']),
    ('export_web.py', ['--to=new.html']),
])
def test_a_misspelt_name_is_corrected(mini, refused, monkeypatch, program, flags):
    """The error is one short line, and the hub is not asked."""
    monkeypatch.setattr('lib.starting.fetch_pretrained', None)
    misspelt = {'resum': 'resume', 'distillgpt2': 'distilgpt2', 'gpt2-larg': 'gpt2-large'}
    for typed, meant in misspelt.items():
        words = [typed, f'did you mean {meant}?', f'type --init_from={meant}']
        line = refused(program, f'--init_from={typed}', *flags, words=words)
        assert len(line) < 120, line


def test_a_misspelt_scratch_is_corrected(mini, refused, monkeypatch):
    monkeypatch.setattr('lib.starting.fetch_pretrained', None)
    refused('train.py', '--init_from=scrach', words=['type --init_from=scratch'])


UNREACHABLE = ['init_from=someone/nobody: ', 'cannot be reached', 'not in the local cache',
               'model.safetensors', 'type --init_from=FOLDER']


def test_a_hub_out_of_reach_is_one_short_line(folder, process):
    nowhere = dict(HF_HOME=str(folder / 'hf'), HF_ENDPOINT='http://127.0.0.1:9')
    line = process('sample.py', '--init_from=someone/nobody', env=nowhere).stderr.strip()
    assert '\n' not in line
    assert len(line) < 300
    for words in ('error: ', *UNREACHABLE):
        assert words in line, line


def test_the_hubs_offline_mode_is_one_short_line(refused, offline):
    line = refused('train.py', '--init_from=someone/nobody', '--device=cpu', words=UNREACHABLE)
    assert len(line) < 300


def test_a_runs_folder_is_not_a_model_to_start_from(trained, folder, refused):
    for name in (trained, trained / 'last.pt'):
        words = ['run', f'type --init_from=resume --out_dir={trained}']
        refused('train.py', f'--init_from={name}', words=words)


# ---- tokenizers ----------------------------------------------------------------------------------

def write_tokenizer(tokenizer):
    """Write a tokenizer as Hugging Face's files into the working folder."""
    for name, content in tokenizers.hf_tokenizer_files(tokenizer, 64).items():
        Path(name).write_text(content, encoding='utf-8')


@pytest.mark.parametrize('kind, end', [('gpt2', '<|endoftext|>'), ('bpe', '<|endoftext|>'),
                                       ('byte', None), ('char', None)])
def test_a_tokenizer_is_the_same_in_transformers(folder, gpt2_files, kind, end):
    source = ''.join(TEXTS) + '<|endoftext|> ab'
    ours = tokenizers.make_tokenizer(kind, source, vocab_size=330)
    write_tokenizer(ours)
    theirs = transformers.AutoTokenizer.from_pretrained('.')
    for text in [*TEXTS, 'a<|endoftext|> b', '  ' * 50, ''.join(TEXTS) * 3]:
        ids = ours.encode(text).tolist()
        assert theirs.encode(text, add_special_tokens=False) == ids, text
        assert theirs.decode(ids) == text
    assert theirs.eos_token == end
    assert tokenizers.read_hf_tokenizer('.').state() == ours.state()


def test_a_vocabulary_as_large_as_gpt2s_is_not_taken_for_it(folder, gpt2_files):
    """Models in other languages have as many tokens as GPT-2, and different ones."""
    write_tokenizer(tokenizers.make_tokenizer('gpt2'))
    model = json.loads(Path('tokenizer.json').read_text(encoding='utf-8'))['model']
    assert model['merges'][:3] == [['Ġ', 't'], ['Ġ', 'a'], ['h', 'e']]   # as in GPT-2's merges.txt
    vocab = model['vocab']
    os.remove('tokenizer.json')
    Path('vocab.json').write_text(json.dumps({**vocab, '<|endoftext|>': 50256}))
    assert tokenizers.read_hf_tokenizer('.').state() == dict(kind='gpt2')
    swapped = {**vocab, 'Ġthe': vocab['Ġof'], 'Ġof': vocab['Ġthe']}
    Path('vocab.json').write_text(json.dumps(swapped))
    with pytest.raises(ValueError, match='neither'):
        tokenizers.read_hf_tokenizer('.')


def test_a_bpe_without_merges_is_not_taken_for_bytes(folder):
    write_tokenizer(tokenizers.BPETokenizer([]))
    assert tokenizers.read_hf_tokenizer('.').state() == dict(kind='bpe', merges=[])


@pytest.mark.parametrize('change', [
    lambda vocab: vocab.update(qqz=vocab.pop('he')),   # two tokens before it do not make it
    lambda vocab: vocab.update(he=300),
    lambda vocab: vocab.update(he=vocab['th'], th=vocab['he'], a=vocab['b'], b=vocab['a']),
    lambda vocab: vocab.update({'h' * 5000: len(vocab)}),
])
def test_a_bpe_that_is_not_this_projects_is_refused(folder, change):
    write_tokenizer(tokenizers.BPETokenizer(['h e', 't h', 'th e']))
    path = Path('tokenizer.json')
    content = json.loads(path.read_text(encoding='utf-8'))
    change(content['model']['vocab'])
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match='neither|merge'):
        tokenizers.read_hf_tokenizer('.')


@pytest.mark.parametrize('text', ['{', '[]', '{"model": 3}', '{"a": [1]}', 'null'])
def test_a_malformed_vocabulary_is_refused(folder, text):
    Path('vocab.json').write_text(text)
    with pytest.raises(ValueError, match=r'vocab\.json'):
        tokenizers.read_hf_tokenizer('.')


# ---- export --------------------------------------------------------------------------------------

GREEDY = ['--temperature=0', '--device=cpu', '--dtype=float32']


def greedy_text(folder, start, n):
    """Return a text and its n most likely tokens, all by transformers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer.encode(start)])
    return tokenizer.decode(greedy(read_by_transformers(folder), ids, n)[0])


def test_an_exported_run_writes_the_same_text_in_transformers(trained, folder, script):
    assert script('export_hf.py', f'--checkpoint={trained}/last.pt', '--to=exported').code == 0
    files = sorted(Path('exported').iterdir())
    assert [path.name for path in files] == ['config.json', 'generation_config.json',
                                             'model.safetensors', 'tokenizer.json',
                                             'tokenizer_config.json']
    assert len({path.stat().st_mode for path in files}) == 1
    text = greedy_text('exported', '3 times', 9) + '\n'
    flags = ['--start=3 times', '--max_new_tokens=9', *GREEDY]
    assert script('sample.py', f'--checkpoint={trained}/last.pt', *flags).out == text
    assert script('sample.py', '--init_from=exported', *flags).out == text


@pytest.mark.parametrize('kind', ['byte', 'bpe', 'gpt2'])
def test_other_tokenizers_are_exported_too(folder, script, gpt2_files, kind):
    """The model has 47 rows more than the tokenizer has symbols. They are padding."""
    tokenizer = tokenizers.make_tokenizer(kind, TEXT, vocab_size=300)
    model = small_gpt(block_size=32, vocab_size=tokenizer.vocab_size + 47)
    torch.nn.init.normal_(model.transformer.wte.weight)
    save_checkpoint('a.pt', model, tokenizer)
    assert script('export_hf.py', '--checkpoint=a.pt', '--to=exported').code == 0
    for name in ('config', 'generation_config'):
        content = json.loads(Path(f'exported/{name}.json').read_text())
        assert content['eos_token_id'] == tokenizer.end
    text = greedy_text('exported', 'né 二 🎉', 15) + '\n'
    flags = ['--start=né 二 🎉', '--max_new_tokens=15', *GREEDY]
    assert script('sample.py', '--init_from=exported', *flags).out == text
    assert script('sample.py', '--checkpoint=a.pt', *flags).out == text


def eos_ids(folder):
    """Return the ids of <|endoftext|> that an export's two config files name."""
    ids = []
    for name in ('config', 'generation_config'):
        content = json.loads(Path(folder, f'{name}.json').read_text())
        ids.append(content['eos_token_id'])
    return ids


def test_a_bpe_as_large_as_gpt2s_comes_back_as_itself(folder):
    """It has GPT-2's 50,257 symbols, and other ones."""
    letters = tokenizers._byte_letters()
    merges = [f'{left} {right}' for left in letters for right in letters][:50_000]
    tokenizer = tokenizers.BPETokenizer(merges)
    assert (tokenizer.vocab_size, tokenizer.end) == (50257, 50256)
    write_tokenizer(tokenizer)
    assert tokenizers.read_hf_tokenizer('.').state() == tokenizer.state()


def test_a_large_alphabet_has_no_end_of_text(folder, script):
    """Symbol 50,256 of GPT-2 is <|endoftext|>; here it is a character like any other."""
    characters = [chr(i) for i in range(10, 51_000)]   # below the halves of surrogate pairs
    tokenizer = tokenizers.CharTokenizer(characters)
    save_checkpoint('a.pt', small_gpt(block_size=32, vocab_size=len(characters)), tokenizer)
    assert script('export_hf.py', '--checkpoint=a.pt', '--to=exported').code == 0
    assert eos_ids('exported') == [None, None]
    flags = ['--start=ab', '--max_new_tokens=5', *GREEDY]
    text = script('sample.py', '--checkpoint=a.pt', *flags).out
    assert script('sample.py', '--init_from=exported', *flags).out == text

def test_an_activation_that_transformers_lacks_is_not_exported(monkeypatch, tmp_path):
    monkeypatch.setitem(gpt.ACTIVATIONS, 'square', torch.square)
    with pytest.raises(ValueError, match="activation='square'"):
        small_gpt(activation='square').save_pretrained(tmp_path)
    assert not os.listdir(tmp_path)


def test_a_mistake_in_an_export_writes_nothing(trained, folder, refused):
    last = f'--checkpoint={trained}/last.pt'
    os.mkdir('full')
    Path('full/x').write_text('mine')
    loaded = checkpoint.load(str(trained / 'last.pt'))
    loaded['model_args'].update(residual=False)
    checkpoint.save('other.pt', loaded)
    refused('export_hf.py', last, words=['--to'])
    refused('export_hf.py', last, '--to=full', words=['full', 'empty'])
    other = ['--checkpoint=other.pt', '--to=out']
    refused('export_hf.py', *other, words=['residual=False', 'pos=learned'])
    refused('export_hf.py', '--checkpoint=none.pt', '--to=out', words=['none.pt'])
    assert sorted(os.listdir()) == ['full', 'other.pt']
    assert os.listdir('full') == ['x']


def test_an_export_to_a_full_disk_is_refused(trained, folder, refused, monkeypatch):
    def full(*args, **options):
        raise safetensors.SafetensorError('No space left on device')
    monkeypatch.setattr(safetensors.torch, 'save_file', full)
    words = ['--to=there', 'No space left']
    refused('export_hf.py', f'--out_dir={trained}', '--to=there', words=words)


# ---- fine-tuning ---------------------------------------------------------------------------------

FINE_TUNE = ['--dataset=mini', '--device=cpu', '--dtype=float32', '--eval_iters=1000',
             '--batch_size=4', '--gradient_accumulation_steps=1', '--eval_interval=2',
             '--learning_rate=1e-3', '--warmup_iters=0', '--block_size=32', '--dropout=0.25']


def test_fine_tuning_starts_at_the_loss_that_transformers_has(mini, script, refused):
    """The run has the sizes of the model it began with, and can be resumed like any other."""
    theirs = hf_model(vocab_size=data.Dataset('mini').vocab_size)
    theirs.save_pretrained('theirs')
    result = script('train.py', '--init_from=theirs', *FINE_TUNE, '--max_iters=4')
    assert result.code == 0, result.err
    rows = read_log('out/log.csv')
    first = float(rows[0]['val_loss'])
    assert first == pytest.approx(validation_loss(theirs, 'mini', 32), abs=1e-4)
    assert float(rows[-1]['val_loss']) < first
    args = checkpoint.load('out/last.pt')['model_args']
    expected = dict(block_size=32, n_layer=5, n_embd=48, dropout=0.25)
    assert {name: args[name] for name in expected} == expected
    assert script('train.py', '--init_from=resume', '--max_iters=6', '--device=cpu').code == 0
    assert json.loads(Path('out/config.json').read_text())['n_layer'] == 5
    other_size = ['--init_from=theirs', *FINE_TUNE, '--n_layer=3']
    refused('train.py', *other_size, words=['n_layer=3', 'n_layer=5'])


def test_fine_tuning_on_another_vocabulary_is_refused(mini, refused):
    hf_model().save_pretrained('larger')
    words = ['another tokenizer', '1003']
    refused('train.py', '--init_from=larger', *FINE_TUNE, words=words)


MORE_CONTEXT = '''
init_from = 'gpt2'
dataset = 'mini'
block_size = 256
out_dir = 'out-more'
max_iters = 2
'''


def test_an_export_is_trained_with_the_context_that_it_has(trained, mini, script, refused):
    """The config asks for more context. A dataset with another tokenizer is refused."""
    assert script('export_hf.py', f'--out_dir={trained}', '--to=out-hf').code == 0
    Path('more.py').write_text(MORE_CONTEXT)
    flags = ['more.py', '--init_from=out-hf', *SHORT_RUN]
    result = script('train.py', *flags)
    assert result.code == 0, result.err
    assert 'done: 2 steps' in result.err
    note = 'note: out-hf has block_size=16: windows of 16 tokens instead of 256\n'
    assert result.err.count(note) == 1
    assert checkpoint.load('out-more/last.pt')['model_args']['block_size'] == 16
    assert json.loads(Path('out-more/config.json').read_text())['block_size'] == 16
    tokenizer = tokenizers.ByteTokenizer()
    splits = {split: [(tokenizer.encode(TEXT), len(TEXT))] for split in ('train', 'val')}
    source = dict(name='bytes', url=None, sha256='', stand_in=False)
    prepare.write_dataset('data/bytes', splits, tokenizer, source)
    words = ['out-hf', 'another tokenizer', 'same characters']
    line = refused('train.py', *flags, '--dataset=bytes', words=words)
    assert 'FROM:' not in line   # FROM: takes a checkpoint file, and an export is a folder
    assert checkpoint.load('out-more/last.pt')['iter_num'] == 2


def test_the_advice_for_an_export_of_bytes_leads_to_a_run(mini, script, refused):
    model = small_gpt(block_size=16, vocab_size=256)
    save_checkpoint('a.pt', model, tokenizers.ByteTokenizer())
    assert script('export_hf.py', '--checkpoint=a.pt', '--to=out-hf').code == 0
    flags = ['--init_from=out-hf', *SHORT_RUN, '--max_iters=1']
    advice = 'prepare_text.py --input=FILE --name=NAME --tokenizer=byte'
    refused('train.py', *flags, '--dataset=mini', words=['--dataset=NAME', advice])
    Path('text.txt').write_text(TEXT)
    text = ['--input=text.txt', '--name=mine', '--tokenizer=byte']
    assert script('prepare_text.py', *text).code == 0
    assert script('train.py', *flags, '--dataset=mine').code == 0


# ---- the configs for GPT-2 -----------------------------------------------------------------------

def knobs_after(config, device):
    """Return train.py's knobs as a config file leaves them on a device."""
    source = (ROOT / 'train.py').read_text()
    defaults = source.partition('# ---- knobs')[2].partition('knobs, given')[0]
    knobs = {}
    exec('#' + defaults, knobs)
    configure(knobs, lambda name: device, [str(ROOT / 'config' / config)])
    return knobs


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
@pytest.mark.parametrize('name, parameters', [
    ('train_gpt2.py', 124_439_808),
    ('train_gpt2_nobias.py', 124_412_160),
    ('train_gpt2_nobias_shakespeare.py', 124_412_160),
    ('train_enwik8_gpt2.py', 163_037_184),
    ('speedrun_fineweb.py', 162_148_608),
])
def test_a_config_has_its_number_of_parameters_on_any_device(name, parameters, device):
    knobs = knobs_after(name, device)
    fields = {field: knobs[field] for field in GPTConfig.__dataclass_fields__ if field in knobs}
    with torch.device('meta'):
        assert GPT(GPTConfig(**fields)).num_params() == parameters


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
@pytest.mark.parametrize('name', sorted(path.name for path in (ROOT / 'config').glob('*.py')))
def test_a_config_makes_its_own_dataset(name, device):
    knobs = knobs_after(name, device)
    if name == 'train_text.py':   # the user's own text
        assert knobs['prepare'] == '' and knobs['dataset'] == 'mine'
        return
    assert prepare.dataset_made_by(knobs['prepare']) == knobs['dataset']


def test_the_config_for_stories_on_a_processor_has_the_parameters_that_it_names():
    knobs = knobs_after('train_tinystories.py', 'cpu')
    fields = {field: knobs[field] for field in GPTConfig.__dataclass_fields__ if field in knobs}
    with torch.device('meta'):
        net = GPT(GPTConfig(**fields | dict(vocab_size=2048)))
    assert round(net.num_params() / 1e6, 1) == 4.2


@pytest.mark.parametrize('name, device, parameters', [
    ('train_tinystories.py', 'cuda', 26e6),
    ('train_shakespeare.py', 'cuda', 124_439_808),
    ('train_shakespeare.py', 'cpu', 14.5e6),
])
def test_a_config_has_about_the_parameters_that_it_names(name, device, parameters):
    knobs = knobs_after(name, device)
    fields = {field: knobs[field] for field in GPTConfig.__dataclass_fields__ if field in knobs}
    with torch.device('meta'):
        assert GPT(GPTConfig(**fields)).num_params() == pytest.approx(parameters, rel=0.02)


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_the_published_net_on_shakespeare_keeps_its_setting(device):
    """The context is the published one, and the tokens at most as many."""
    knobs = knobs_after('train_gpt2_nobias_shakespeare.py', device)
    assert knobs['block_size'] == 1024 and not knobs['qkv_bias']
    sequences = knobs['batch_size'] * knobs['gradient_accumulation_steps']
    assert knobs['max_iters'] * sequences * 1024 <= 1_100_000
    assert knobs['max_minutes'] <= 59


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_the_batch_of_the_enwik8_config_is_the_same_on_any_device(device):
    knobs = knobs_after('train_enwik8_gpt2.py', device)
    assert knobs['batch_size'] * knobs['gradient_accumulation_steps'] == 64
    assert knobs['dtype'] == 'auto'


@pytest.fixture
def gpt2_in_cache(offline, script, gpt2_files):
    """gpt2_in_cache(name) puts a random GPT-2 of that name into the hub's cache, and returns it.

    The fixture also prepares data/shakespeare."""
    Path('short.txt').write_text(TEXT[:4000])
    assert script('prepare_shakespeare.py', '--tokenizer=gpt2', '--input=short.txt').code == 0

    def put(name):
        theirs = hf_model(n_layer=1, n_head=2, n_embd=8, vocab_size=50257, n_positions=1024)
        put_into_cache(theirs, name)
        return theirs
    return put


def test_the_config_for_fine_tuning_runs(gpt2_in_cache, script):
    gpt2_in_cache('gpt2')
    short = ['--device=cpu', '--dtype=float32', '--max_iters=2', '--eval_iters=1', '--batch_size=1']
    result = script('train.py', 'config/finetune_shakespeare.py', *short)
    assert result.code == 0, result.err
    assert 'done: 2 steps' in result.err


@pytest.mark.parametrize('name', ['gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl'])
def test_the_configs_for_evaluation_print_the_loss(gpt2_in_cache, script, name):
    theirs = gpt2_in_cache(name)
    config = f'config/eval_{name.replace("-", "_")}.py'
    result = script('train.py', config, '--device=cpu', '--dtype=float32')
    assert result.code == 0, result.err
    loss = validation_loss(theirs, 'shakespeare', 1024)
    assert f'val loss {loss:.4f}' in result.err


# ---- nanoGPT -------------------------------------------------------------------------------------

def nanogpt_weights(theirs, bias):
    """Return the weights of a model of transformers as nanoGPT names and lays them out."""
    weights = {}
    for name, p in theirs.state_dict().items():
        if name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight')):
            p = p.T.contiguous()
        if bias or not name.endswith('.bias'):
            weights[name] = p.clone()
    return weights


def nanogpt_optimizer(weights):
    """Return nanoGPT's AdamW after a step; the loss is the sum of all squared weights."""
    params = [torch.nn.Parameter(p) for name, p in weights.items() if name != 'lm_head.weight']
    groups = [dict(params=[p for p in params if p.dim() >= 2], weight_decay=0.1),
              dict(params=[p for p in params if p.dim() < 2], weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    sum(p.square().sum() for p in params).backward()
    optimizer.step()
    return optimizer.state_dict()


def nanogpt_checkpoint(path, prefix='', bias=True, vocab_size=64, dataset='mini'):
    """Write a file as nanoGPT's train.py does; return the same model by transformers."""
    torch.manual_seed(0)
    sizes = dict(n_layer=2, n_head=2, n_embd=16, vocab_size=vocab_size)
    exact_gelu = 'gelu'   # nanoGPT's nn.GELU(); GPT-2's is an approximation
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        **sizes, n_positions=64, activation_function=exact_gelu, initializer_range=0.3,
        bos_token_id=None, eos_token_id=None)).eval()
    weights = nanogpt_weights(theirs, bias)
    config = dict(
        out_dir='out', eval_interval=5, eval_iters=3, always_save_checkpoint=True,
        init_from='scratch', wandb_log=False, dataset=dataset, gradient_accumulation_steps=1,
        batch_size=4, block_size=32, learning_rate=1e-3, max_iters=8, beta2=0.95, warmup_iters=1,
        lr_decay_iters=8, min_lr=1e-4, backend='nccl', device='cuda', dtype='bfloat16',
        compile=True)
    torch.save(dict(
        model={prefix + name: p for name, p in weights.items()},
        optimizer=nanogpt_optimizer({name: p.clone() for name, p in weights.items()}),
        model_args=dict(**sizes, block_size=64, bias=bias, dropout=0.0),
        iter_num=6,
        best_val_loss=torch.tensor(3.25),
        config=config), path)
    return theirs


def use_nanogpts_meta():
    """Replace meta.json of data/mini by nanoGPT's meta.pkl; return the number of characters."""
    path = Path('data/mini/meta.json')
    chars = json.loads(path.read_text())['tokenizer']['chars']
    path.unlink()
    meta = dict(
        vocab_size=len(chars),
        itos=dict(enumerate(chars)),
        stoi={char: i for i, char in enumerate(chars)})
    Path('data/mini/meta.pkl').write_bytes(pickle.dumps(meta))
    return len(chars)


@pytest.mark.parametrize('prefix, bias', [('', True), ('_orig_mod.', True), ('_orig_mod.', False)])
def test_a_nanogpt_checkpoint_works_in_every_script(mini, script, prefix, bias):
    os.mkdir('out')
    theirs = nanogpt_checkpoint('out/ckpt.pt', prefix, bias, vocab_size=use_nanogpts_meta())
    ours = checkpoint.build_model(checkpoint.load('out/ckpt.pt'), 'out/ckpt.pt')
    assert_same_model(ours, theirs, 1e-5)
    assert script('sample.py', '--device=cpu', '--max_new_tokens=20').code == 0
    flags = ['--device=cpu', '--compile=False', '--json=-']
    evaluated = json.loads(script('evaluate.py', *flags).out)
    loss = validation_loss(theirs, 'mini', 64)
    assert evaluated['nats_per_token'] == pytest.approx(loss, abs=1e-5)
    here = ['--device=cpu', '--dtype=float32', '--compile=False']
    resumed = script('train.py', '--init_from=resume', *here)
    assert resumed.code == 0, resumed.err
    assert 'resumed from out/ckpt.pt at iter 6' in resumed.err
    assert [int(row['iter']) for row in read_log('out/log.csv')] == [6, 7, 8]
    assert script('export_hf.py', '--checkpoint=out/ckpt.pt', '--to=exported').code == 0
    assert_same_model(ours, read_by_transformers('exported'), 1e-5)


def test_a_nanogpt_vocabulary_is_found_beside_its_run(mini, script, refused):
    """The run is in a clone of nanoGPT. data/mini exists here too, but has no vocabulary."""
    os.makedirs('clone/out')
    os.rename('data', 'clone/data')
    os.makedirs('data/mini')
    Path('data/mini/prepare.py').touch()
    symbols = data.Dataset('mini', 'clone/data').vocab_size
    nanogpt_checkpoint('clone/out/ckpt.pt', vocab_size=symbols)
    flags = ['--out_dir=clone/out', '--device=cpu']
    result = script('sample.py', *flags, '--start=the miller', '--max_new_tokens=3')
    assert result.code == 0, result.err
    assert result.out.startswith('the miller')
    assert script('export_hf.py', '--out_dir=clone/out', '--to=exported').code == 0
    advice = 'type --data_dir=FOLDER'
    refused('sample.py', *flags, '--data_dir=typo', words=['typo/mini', advice])
    shutil.rmtree('clone/data')
    shutil.rmtree('data/mini')
    refused('sample.py', *flags, words=['data/mini or clone/data/mini', advice])


def test_nanogpts_optimizer_state_belongs_to_the_same_parameters(mini):
    """The state has no names. It lies in the order of the parameters, and ours must be equal.

    The gradient of the sum of squares is twice the weight, and exp_avg is a tenth of it."""
    theirs = nanogpt_checkpoint('ckpt.pt')
    loaded = checkpoint.load('ckpt.pt')
    model = checkpoint.build_model(loaded, 'ckpt.pt')
    params = [p for group in model.optimizer_groups(0.1) for p in group['params']]
    state = loaded['optimizer']['state']
    assert len(params) == len(state) == len(list(theirs.parameters()))
    for i, p in enumerate(params):
        assert torch.allclose(state[i]['exp_avg'], 0.2 * p.detach(), atol=1e-6)


def test_nanogpts_token_files_without_meta_are_gpt2s_bpe(folder, script, gpt2_files):
    os.makedirs('data/owt')
    ids = tokenizers.make_tokenizer('gpt2').encode(TEXT)
    for split in ('train', 'val'):
        np.asarray(ids, dtype=np.uint16).tofile(f'data/owt/{split}.bin')
    nanogpt_checkpoint('ckpt.pt', vocab_size=50304, dataset='owt')
    flags = ['--checkpoint=ckpt.pt', '--device=cpu']
    result = script('sample.py', *flags, '--max_new_tokens=5', '--start=the miller')
    assert result.code == 0, result.err
    assert result.out.startswith('the miller')
    assert script('evaluate.py', *flags, '--compile=False').code == 0
