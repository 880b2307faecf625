"""sample.py on a tiny trained model. pytest tests/test_sample.py"""
import io
import os
from dataclasses import asdict

import pytest
import torch
from conftest import TEXT

from lib import checkpoint
from lib.console import as_typed, read_prompt
from lib.tokenizers import CharTokenizer
from model import GPT, GPTConfig


@pytest.fixture
def sample(script, trained, folder):
    return lambda *flags, **options: script('sample.py', f'--out_dir={trained}', '--device=cpu', '--dtype=float32', *flags, **options)


def test_text_goes_to_stdout_alone(sample, trained):
    result = sample('--start=said the', '--max_new_tokens=40')
    assert result.code == 0 and result.out.startswith('said the') and result.out.endswith('\n') and len(result.out) == 8 + 40 + 1
    assert set(result.out) <= set(TEXT) and 'best.pt' in result.err


@pytest.mark.processor
def test_greedy_text_is_the_argmax(sample, trained):
    """Against a plain loop over the checkpoint's logits, beyond block_size, whatever the seed and the cache."""
    loaded = checkpoint.load(f'{trained}/best.pt')
    net = checkpoint.build_model(loaded, '').eval()
    tokenizer = checkpoint.find_tokenizer(loaded, '', net, ['data'])
    ids = tokenizer.encode('so 3 times').tolist()
    with torch.no_grad():
        for _ in range(30):
            ids.append(net(torch.tensor([ids[-16:]]))[0][0, -1].argmax().item())
    expected = tokenizer.decode(ids).decode() + '\n'
    for flags in ([], ['--seed=5'], ['--kv_cache=False'], ['--top_k=1', '--temperature=1'], ['--top_p=1e-9', '--temperature=1']):
        assert sample('--start=so 3 times', '--max_new_tokens=30', '--temperature=0', *flags).out == expected


def test_stopped_before_the_first_evaluation(script, trained, folder):
    """best.pt is of step 0 then: the text is by last.pt, which has learned something, unless it was found to be worse."""
    os.mkdir('out')
    best, last = (checkpoint.load(f'{trained}/best.pt') for _ in range(2))
    for name, loaded, more in (('best', best, dict(iter_num=0)), ('last', last, dict(iter_num=198, val_loss=None))):
        checkpoint.save(f'out/{name}.pt', loaded | more)
    assert 'out/last.pt: iter 198' in script('sample.py', '--device=cpu', '--max_new_tokens=2').err
    for more in (dict(iter_num=0), dict(iter_num=198, val_loss=3.0), None):
        checkpoint.save('out/last.pt', last | more) if more else open('out/last.pt', 'wb').close()
        assert 'out/best.pt: iter 0' in script('sample.py', '--device=cpu', '--max_new_tokens=2').err


def test_what_to_type_instead(refused, trained, folder):
    """Never what was typed; a damaged best.pt leads to the last.pt beside it."""
    os.mkdir('o p')
    checkpoint.save('o p/last.pt', checkpoint.load(f'{trained}/last.pt'))
    open('o p/best.pt', 'wb').close()
    refused('sample.py', '--out_dir=o p', words=["type --checkpoint='o p/last.pt'"])
    for typed, instead in (('resum', 'resume'), ('scratch', 'FOLDER'), ('./nowhere', 'gpt2')):
        refused('sample.py', f'--init_from={typed}', words=[f'type --init_from={instead}'])


def test_seed(sample):
    texts = [sample('--start=a', '--max_new_tokens=60', f'--seed={seed}').out for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_several_samples_count_up_from_the_seed(sample):
    both = sample('--start=a', '--num_samples=2', '--seed=4', '--max_new_tokens=30').out
    assert both == ''.join(f'{"-" * 15} sample {i + 1}\n' + sample('--start=a', f'--seed={4 + i}', '--max_new_tokens=30').out for i in (0, 1))


def test_prompt_from_file_and_stdin(sample, folder):
    (folder / 'p.txt').write_text('is 12,\n')
    typed = sample('--start=is 12,\n', '--max_new_tokens=20').out
    assert sample('--start=FILE:p.txt', '--max_new_tokens=20').out == typed
    assert sample('--start', '-', '--max_new_tokens=20', stdin='is 12,\n').out == typed


@pytest.mark.parametrize('encoding, newline', [('utf-8', None), ('ascii', None), ('cp1252', '')])
def test_line_ends_are_kept(folder, monkeypatch, encoding, newline):
    """The same bytes are the same text, from a file and from standard input, in any locale."""
    text = '\ufeffso\r\n3 times\rß 😀\n'.encode()
    (folder / 'p.txt').write_bytes(text)
    stdin = io.TextIOWrapper(io.BytesIO(text), encoding=encoding, errors='surrogateescape', newline=newline)
    monkeypatch.setattr('sys.stdin', stdin)
    assert read_prompt('-') == 'so\r\n3 times\rß 😀\n' == read_prompt('FILE:p.txt')
    assert not stdin.buffer.closed


def test_a_prompt_that_is_not_utf8(folder, monkeypatch, capsys):
    """It is refused in one line, and so is one that is too long, wherever it comes from."""
    for text, words in ((b'caf\xe9', 'take text in UTF-8'), ('ßa'.encode() * 3, 'more than 5 characters')):
        (folder / 'p.txt').write_bytes(text)
        monkeypatch.setattr('sys.stdin', io.TextIOWrapper(io.BytesIO(text), encoding='ascii'))
        for start in ('-', 'FILE:p.txt'):
            with pytest.raises(SystemExit) as stop:
                read_prompt(start, longest=5)
            line = capsys.readouterr().err
            assert stop.value.code == 2 and words in line and line.count('\n') == 1


def test_what_is_typed_in_a_locale_of_ascii(folder, process, refused):
    """A prompt is the text that was typed, and a character that the model lacks is named."""
    tokenizer = CharTokenizer('naïve 😀')
    V = tokenizer.vocab_size
    model = GPT(GPTConfig(block_size=32, vocab_size=V, n_layer=1, n_head=1, n_embd=8))
    checkpoint.save('c.pt', dict(format=1, model=model.state_dict(), tokenizer=tokenizer.state(),
                                 model_args=asdict(model.config)))
    flags = ['sample.py', '--checkpoint=c.pt', '--device=cpu', '--max_new_tokens=20']
    ascii = dict(LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0')
    done = process(*flags, '--start=naïve 😀', '--stop=😀', env=ascii, text=False)
    text = done.stdout.decode()
    assert done.returncode == 0 and text.startswith('naïve 😀'), done.stderr
    assert '😀' not in text.removeprefix('naïve 😀') and len(text) < 28   # 20 tokens without `stop`
    typed = '🎉'.encode().decode('ascii', 'surrogateescape')
    refused(*flags, f'--start={typed}', words=["'🎉'", 'vocabulary'])


def test_text_as_typed():
    assert as_typed('😀'.encode().decode('ascii', 'surrogateescape')) == '😀' == as_typed('😀')
    for text in ('\udcff', '\ud83d', 'a\udcc3b'):   # what was no text stays what it was
        assert as_typed(text) == text


def test_a_prompt_from_the_home_folder(sample, folder, monkeypatch):
    monkeypatch.setenv('HOME', str(folder))
    monkeypatch.setenv('USERPROFILE', str(folder))
    (folder / 'p.txt').write_text('so 3')
    assert sample('--start=FILE:~/p.txt', '--max_new_tokens=0').out == 'so 3\n'


def test_stop(sample):
    whole = sample('--start=1', '--temperature=0', '--max_new_tokens=60').out[1:-1]
    word = whole[20:24]
    assert sample('--start=1', '--temperature=0', '--max_new_tokens=60', f'--stop={word}').out == '1' + whole.partition(word)[0] + '\n'
    assert sample('--start=1', '--temperature=0', '--max_new_tokens=60', '--stop=@@@').out == '1' + whole + '\n'


def test_prompts_that_are_empty_or_long(sample):
    assert len(sample('--max_new_tokens=9').out) == len(sample('--start=', '--max_new_tokens=9').out) == 10
    long = TEXT[:100]
    result = sample(f'--start={long}', '--max_new_tokens=9')
    assert result.out.startswith(long) and len(result.out) == 110 and 'the model sees the last 16' in result.err
    assert sample('--start=said', '--max_new_tokens=0').out == 'said\n'


def test_repetition_penalty(sample):
    assert len(set(sample('--start=1', '--temperature=0', '--repetition_penalty=1e6', '--max_new_tokens=20').out)) > \
        len(set(sample('--start=1', '--temperature=0', '--max_new_tokens=20').out))


@pytest.mark.parametrize('flags, words', [
    (['--start=日本'], ["'日'", "'本'", 'vocabulary']), (['--temperature=-1'], ['temperature=-1', '0 or more']),
    (['--top_k=0'], ['top_k=0']), (['--top_k=1.5'], ['top_k=1.5']), (['--top_p=0'], ['top_p=0']), (['--top_p=2'], ['top_p=2']),
    (['--repetition_penalty=0'], ['repetition_penalty=0']), (['--max_new_tokens=-1'], ['max_new_tokens=-1']),
    (['--num_samples=0'], ['num_samples=0']), (['--num_samples=9223372036854775807'], ['num_samples=', 'tokens']),
    (['--max_new_tokens=1000000000000'], ['max_new_tokens=', 'tokens']), (['--quantize=int4'], ['int4', 'int8']), (['--seed=-1'], ['seed=-1']), (['--start=FILE:nope.txt'], ['nope.txt']),
    (['--checkpoint=nope.pt'], ['nope.pt', '--checkpoint']), (['--temprature=1'], ['--temperature']), (['--dtype=float16'], ['float16'])])
def test_mistakes(refused, trained, folder, flags, words):
    refused('sample.py', f'--out_dir={trained}', '--device=cpu', *flags, words=words)


@pytest.mark.processor
@pytest.mark.parametrize('flag', ['--temperature=1e-40', '--repetition_penalty=1e-300', '--repetition_penalty=1e300', '--top_p=1e-300',
                                  '--temperature=1e300'])
def test_extreme_knobs_still_draw(sample, flag):
    result = sample('--start=so', flag, '--max_new_tokens=20')
    assert result.code == 0 and len(result.out) == 23


def test_int8_beside_another_dataset_of_that_name(sample, folder):
    """Its loss is not measured on tokens that mean something else."""
    from lib.prepare import write_dataset
    from lib.tokenizers import ByteTokenizer
    tokenizer = ByteTokenizer()
    write_dataset('data/mini', {split: [(tokenizer.encode(TEXT), len(TEXT))] for split in ('train', 'val')}, tokenizer,
                  dict(name='mini', url=None, sha256='', stand_in=False))
    result = sample('--start=so', '--quantize=int8', '--max_new_tokens=4')
    assert result.code == 0 and 'data/mini has another tokenizer' in result.err


def test_int8_is_measured_where_the_run_knows_its_data(sample, trained, folder):
    """The run lies elsewhere, and its data beside it."""
    result = sample('--start=so', '--quantize=int8', '--max_new_tokens=4')
    folder = trained.parent / 'data/mini'
    assert result.code == 0 and f'validation split of {folder}' in result.err, result.err
    result = sample('--start=so', '--quantize=int8', '--max_new_tokens=4', '--data_dir=nowhere')
    assert result.code == 0 and 'no val.bin of mini in nowhere/mini' in result.err, result.err


def test_stdout_that_cannot_be_written(process, trained, folder):
    with open('/dev/full', 'w') as full:
        done = process('sample.py', f'--out_dir={trained}', '--device=cpu', '--max_new_tokens=9', capture_output=False, stdout=full, stderr=-1)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith('error: stdout cannot be written'), done.stderr


def test_no_checkpoint(refused, folder):
    refused('sample.py', words=['out/best.pt', 'python train.py'])


def test_checkpoint_stands_alone(sample, folder):
    """Sampling needs no data folder: there is none here."""
    assert not (folder / 'data').exists() and sample('--start=so', '--max_new_tokens=5').code == 0


def test_wrapped_names_load(folder, trained, script):
    """Weights saved from a compiled or distributed wrapper (nanoGPT #19)."""
    loaded = checkpoint.load(f'{trained}/best.pt')
    loaded['model'] = {'_orig_mod.' + name: p for name, p in loaded['model'].items()}
    checkpoint.save('wrapped.pt', loaded)
    flags = ['--start=so', '--max_new_tokens=20', '--device=cpu']
    assert script('sample.py', '--checkpoint=wrapped.pt', *flags).out == script('sample.py', f'--out_dir={trained}', *flags).out


def test_padding_is_never_drawn(folder, trained, script):
    """Rows of the vocabulary above the tokenizer's, as in a nanoGPT checkpoint padded to 50304."""
    loaded = checkpoint.load(f'{trained}/best.pt')
    wte = loaded['model']['transformer.wte.weight']
    loaded['model_args']['vocab_size'] = len(wte) + 7
    for name in ('transformer.wte.weight', 'lm_head.weight'):   # the padding is made the likeliest of all
        loaded['model'][name] = torch.cat((wte, 50 * wte[:7]))
    checkpoint.save('padded.pt', loaded)
    for temperature in (0, 5):
        result = script('sample.py', '--checkpoint=padded.pt', '--device=cpu', f'--temperature={temperature}', '--max_new_tokens=50')
        assert result.code == 0 and len(result.out) == 51


def test_pickle_bomb_is_refused(folder, refused):
    class Bomb:
        def __reduce__(self):
            return (open, ('exploded', 'w'))
    torch.save(dict(model={}, model_args=Bomb()), 'bomb.pt')
    refused('sample.py', '--checkpoint=bomb.pt', '--device=cpu', words=['bomb.pt'])
    assert not (folder / 'exploded').exists()


def test_save_is_whole_or_not_at_all(folder, monkeypatch):
    checkpoint.save('a.pt', dict(step=1))
    monkeypatch.setattr(torch, 'save', lambda *args: (_ for _ in ()).throw(OSError(28, 'No space left on device')))
    with pytest.raises(OSError):
        checkpoint.save('a.pt', dict(step=2))
    assert torch.load('a.pt') == dict(step=1)
    assert [p.name for p in folder.iterdir()] == ['a.pt']
