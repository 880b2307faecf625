"""sample.py on a tiny trained model. pytest tests/test_sample.py"""
import io
import os
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import TEXT

from lib import checkpoint
from lib.console import as_typed, read_prompt
from lib.starting import find_tokenizer
from lib.tokenizers import CharTokenizer
from model import GPT, GPTConfig

# A locale in which Python reads the command line and standard input as ASCII.
ASCII = dict(LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0')


@pytest.fixture
def sample(script, trained, folder):
    """Return a function that samples from the trained model on the CPU in float32."""
    def run(*flags, stdin=None):
        fixed = [f'--out_dir={trained}', '--device=cpu', '--dtype=float32']
        return script('sample.py', *fixed, *flags, stdin=stdin)
    return run


def as_argument(text):
    """Return text in UTF-8 as Python reads it from the command line in a locale of ASCII."""
    return text.encode().decode('ascii', 'surrogateescape')


# ---- the text ----------------------------------------------------------------------------------

def test_text_goes_to_stdout_alone(sample):
    result = sample('--start=said the', '--max_new_tokens=40')
    assert result.code == 0
    assert result.out.startswith('said the')
    assert result.out.endswith('\n')
    assert len(result.out) == 8 + 40 + 1
    assert set(result.out) <= set(TEXT)
    assert 'best.pt' in result.err


@pytest.mark.processor
def test_greedy_text_is_the_argmax(sample, trained):
    """Compare with a plain loop over the model's logits, beyond block_size."""
    loaded = checkpoint.load(f'{trained}/best.pt')
    net = checkpoint.build_model(loaded, '').eval()
    tokenizer = find_tokenizer(loaded, '', net, ['data'])
    ids = tokenizer.encode('so 3 times').tolist()
    with torch.no_grad():
        for _ in range(30):
            logits, _ = net(torch.tensor([ids[-16:]]))
            ids.append(logits[0, -1].argmax().item())
    expected = tokenizer.decode(ids).decode() + '\n'

    def text(*flags):
        return sample('--start=so 3 times', '--max_new_tokens=30', *flags).out

    assert text('--temperature=0') == expected
    assert text('--temperature=0', '--seed=5') == expected
    assert text('--temperature=0', '--kv_cache=False') == expected
    assert text('--temperature=1', '--top_k=1') == expected
    assert text('--temperature=1', '--top_p=1e-9') == expected


def test_the_seed_decides_the_text(sample):
    def text(seed):
        return sample('--start=a', '--max_new_tokens=60', f'--seed={seed}').out

    first = text(1)
    assert text(1) == first
    assert text(2) != first


def test_several_samples_count_up_from_the_seed(sample):
    flags = ['--start=a', '--max_new_tokens=30']
    both = sample(*flags, '--num_samples=2', '--seed=4').out
    first = sample(*flags, '--seed=4').out
    second = sample(*flags, '--seed=5').out
    line = '-' * 15
    assert both == f'{line} sample 1\n{first}{line} sample 2\n{second}'


def test_text_ends_before_the_stop_text(sample):
    greedy = ['--start=1', '--temperature=0', '--max_new_tokens=60']
    new = sample(*greedy).out[1:-1]
    word = new[20:24]
    before = new.partition(word)[0]
    assert sample(*greedy, f'--stop={word}').out == f'1{before}\n'
    assert sample(*greedy, '--stop=@@@').out == f'1{new}\n'


def test_repetition_penalty_makes_text_more_varied(sample):
    greedy = ['--start=1', '--temperature=0', '--max_new_tokens=20']
    plain = sample(*greedy).out
    varied = sample(*greedy, '--repetition_penalty=1e6').out
    assert len(set(varied)) > len(set(plain))


@pytest.mark.processor
@pytest.mark.parametrize('flag', [
    '--temperature=1e-40',
    '--temperature=1e300',
    '--repetition_penalty=1e-300',
    '--repetition_penalty=1e300',
    '--top_p=1e-300',
])
def test_extreme_knobs_still_draw(sample, flag):
    result = sample('--start=so', flag, '--max_new_tokens=20')
    assert result.code == 0
    assert len(result.out) == 23


# ---- the prompt --------------------------------------------------------------------------------

def test_a_prompt_comes_from_a_file_or_stdin(sample, folder):
    (folder / 'p.txt').write_text('is 12,\n')
    flags = ['--max_new_tokens=20']
    typed = sample('--start=is 12,\n', *flags).out
    assert sample('--start=FILE:p.txt', *flags).out == typed
    assert sample('--start', '-', *flags, stdin='is 12,\n').out == typed


def test_a_prompt_comes_from_the_home_folder(sample, folder, monkeypatch):
    monkeypatch.setenv('HOME', str(folder))
    monkeypatch.setenv('USERPROFILE', str(folder))
    (folder / 'p.txt').write_text('so 3')
    assert sample('--start=FILE:~/p.txt', '--max_new_tokens=0').out == 'so 3\n'


def test_prompts_that_are_empty_or_long(sample):
    flags = ['--max_new_tokens=9']
    assert len(sample(*flags).out) == 10
    assert len(sample('--start=', *flags).out) == 10
    long = TEXT[:100]
    result = sample(f'--start={long}', *flags)
    assert result.out.startswith(long)
    assert len(result.out) == 110
    assert 'the model sees the last 16' in result.err
    assert sample('--start=said', '--max_new_tokens=0').out == 'said\n'


@pytest.mark.parametrize('encoding, newline', [
    ('utf-8', None),
    ('ascii', None),
    ('cp1252', ''),
])
def test_line_ends_are_kept(folder, monkeypatch, encoding, newline):
    """Equal bytes are equal text, from a file and from standard input, in any locale."""
    text = '\ufeffso\r\n3 times\rß 😀\n'.encode()
    (folder / 'p.txt').write_bytes(text)
    stdin = io.TextIOWrapper(
        io.BytesIO(text),
        encoding=encoding,
        errors='surrogateescape',
        newline=newline,
    )
    monkeypatch.setattr('sys.stdin', stdin)
    assert read_prompt('-') == 'so\r\n3 times\rß 😀\n'
    assert read_prompt('FILE:p.txt') == 'so\r\n3 times\rß 😀\n'
    assert not stdin.buffer.closed


@pytest.mark.parametrize('text, words', [
    (b'caf\xe9', 'take text in UTF-8'),
    ('ßaßaßa'.encode(), 'more than 5 characters'),
])
@pytest.mark.parametrize('start', ['-', 'FILE:p.txt'])
def test_a_prompt_that_cannot_be_read_is_refused(folder, monkeypatch, capsys, text, words, start):
    (folder / 'p.txt').write_bytes(text)
    monkeypatch.setattr('sys.stdin', io.TextIOWrapper(io.BytesIO(text), encoding='ascii'))
    with pytest.raises(SystemExit) as stop:
        read_prompt(start, longest=5)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert words in error
    assert error.count('\n') == 1


def test_a_prompt_typed_in_a_locale_of_ascii(folder, process, refused):
    """A prompt is the text that was typed, and a character that the model lacks is named."""
    tokenizer = CharTokenizer('naïve 😀')
    config = GPTConfig(
        block_size=32,
        vocab_size=tokenizer.vocab_size,
        n_layer=1,
        n_head=1,
        n_embd=8,
    )
    checkpoint.save('c.pt', dict(
        format=1,
        model=GPT(config).state_dict(),
        tokenizer=tokenizer.state(),
        model_args=asdict(config),
    ))
    flags = ['sample.py', '--checkpoint=c.pt', '--device=cpu', '--max_new_tokens=20']
    done = process(*flags, '--start=naïve 😀', '--stop=😀', env=ASCII, text=False)
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode()
    assert text.startswith('naïve 😀')
    assert '😀' not in text.removeprefix('naïve 😀')
    assert len(text) < 28   # without --stop, the text has 28 characters
    refused(*flags, f'--start={as_argument("🎉")}', words=["'🎉'", 'vocabulary'])


def test_text_as_typed():
    assert as_typed(as_argument('😀')) == '😀'
    assert as_typed('😀') == '😀'
    for text in ('\udcff', '\ud83d', 'a\udcc3b'):   # these surrogates do not encode UTF-8
        assert as_typed(text) == text


# ---- the checkpoint ----------------------------------------------------------------------------

def test_a_checkpoint_stands_alone(sample, folder):
    """Sampling needs no data folder."""
    assert not (folder / 'data').exists()
    assert sample('--start=so', '--max_new_tokens=5').code == 0


def test_a_run_stopped_before_its_first_evaluation_samples_from_last_pt(script, trained, folder):
    """best.pt of a run that stopped before its first evaluation holds step 0.

    best.pt is still used if last.pt holds step 0 too, has a larger loss, or is empty.
    """
    os.mkdir('out')
    best = checkpoint.load(f'{trained}/best.pt')
    last = checkpoint.load(f'{trained}/last.pt')
    checkpoint.save('out/best.pt', best | dict(iter_num=0))

    def loaded_from():
        return script('sample.py', '--device=cpu', '--max_new_tokens=2').err

    checkpoint.save('out/last.pt', last | dict(iter_num=198, val_loss=None))
    assert 'out/last.pt: iter 198' in loaded_from()
    checkpoint.save('out/last.pt', last | dict(iter_num=0))
    assert 'out/best.pt: iter 0' in loaded_from()
    checkpoint.save('out/last.pt', last | dict(iter_num=198, val_loss=3.0))
    assert 'out/best.pt: iter 0' in loaded_from()
    (folder / 'out/last.pt').write_bytes(b'')
    assert 'out/best.pt: iter 0' in loaded_from()


def test_a_damaged_best_pt_leads_to_last_pt(refused, trained, folder):
    os.mkdir('o p')
    checkpoint.save('o p/last.pt', checkpoint.load(f'{trained}/last.pt'))
    (folder / 'o p/best.pt').write_bytes(b'')
    refused('sample.py', '--out_dir=o p', words=["type --checkpoint='o p/last.pt'"])


@pytest.mark.parametrize('typed, advised', [
    ('resum', 'resume'),
    ('scratch', 'FOLDER'),
    ('./nowhere', 'gpt2'),
])
def test_the_advice_differs_from_what_was_typed(refused, folder, typed, advised):
    refused('sample.py', f'--init_from={typed}', words=[f'type --init_from={advised}'])


def test_without_a_checkpoint_the_error_names_train(refused, folder):
    refused('sample.py', words=['out/best.pt', 'python train.py'])


def test_an_earlier_run_is_named_where_the_new_one_has_no_checkpoint(refused, folder):
    for n in (1, 2, 10):
        os.makedirs(f'out/earlier-{n}')
    for n in (1, 2):
        Path(f'out/earlier-{n}/best.pt').write_bytes(b'')
        Path(f'out/earlier-{n}/last.pt').write_bytes(b'')
    words = ['an earlier run is in out/earlier-2', 'type --out_dir=out/earlier-2']
    refused('sample.py', words=['out/best.pt', *words])
    refused('train.py', '--init_from=resume', '--device=cpu', words=['out/last.pt', *words])


def test_a_file_as_out_dir_is_a_checkpoint(refused, folder):
    Path('best.pt').write_bytes(b'')
    refused('sample.py', '--out_dir=best.pt', words=['is a file', 'type --checkpoint=best.pt'])


def test_weights_of_a_wrapped_model_load(folder, trained, script):
    """torch.compile puts a prefix before the names of weights (nanoGPT's issue 19)."""
    loaded = checkpoint.load(f'{trained}/best.pt')
    loaded['model'] = {f'_orig_mod.{name}': p for name, p in loaded['model'].items()}
    checkpoint.save('wrapped.pt', loaded)
    flags = ['--start=so', '--max_new_tokens=20', '--device=cpu']
    wrapped = script('sample.py', '--checkpoint=wrapped.pt', *flags)
    assert wrapped.out == script('sample.py', f'--out_dir={trained}', *flags).out


def test_padding_is_never_drawn(folder, trained, script):
    """nanoGPT pads its vocabulary to 50304. Here, padding has the largest logits."""
    loaded = checkpoint.load(f'{trained}/best.pt')
    wte = loaded['model']['transformer.wte.weight']
    loaded['model_args']['vocab_size'] = len(wte) + 7
    for name in ('transformer.wte.weight', 'lm_head.weight'):
        loaded['model'][name] = torch.cat((wte, 50 * wte[:7]))
    checkpoint.save('padded.pt', loaded)
    flags = ['--checkpoint=padded.pt', '--device=cpu', '--max_new_tokens=50']
    for temperature in (0, 5):
        result = script('sample.py', *flags, f'--temperature={temperature}')
        assert result.code == 0
        assert len(result.out) == 51


def test_a_pickle_that_runs_code_is_refused(folder, refused):
    class Bomb:
        def __reduce__(self):
            return (open, ('exploded', 'w'))
    torch.save(dict(model={}, model_args=Bomb()), 'bomb.pt')
    refused('sample.py', '--checkpoint=bomb.pt', '--device=cpu', words=['bomb.pt'])
    assert not (folder / 'exploded').exists()


def test_save_is_whole_or_not_at_all(folder, monkeypatch):
    def fail(*args):
        raise OSError(28, 'No space left on device')

    checkpoint.save('a.pt', dict(step=1))
    monkeypatch.setattr(torch, 'save', fail)
    with pytest.raises(OSError):
        checkpoint.save('a.pt', dict(step=2))
    assert torch.load('a.pt') == dict(step=1)
    assert os.listdir() == ['a.pt']


# ---- int8 --------------------------------------------------------------------------------------

INT8 = ['--start=so', '--quantize=int8', '--max_new_tokens=4']


def test_int8_is_not_measured_on_a_dataset_of_another_tokenizer(sample, folder):
    from lib.prepare import write_dataset
    from lib.tokenizers import ByteTokenizer
    tokenizer = ByteTokenizer()
    splits = {split: [(tokenizer.encode(TEXT), len(TEXT))] for split in ('train', 'val')}
    source = dict(name='mini', url=None, sha256='', stand_in=False)
    write_dataset('data/mini', splits, tokenizer, source)
    result = sample(*INT8)
    assert result.code == 0
    assert 'data/mini has another tokenizer' in result.err


def test_int8_is_measured_on_the_runs_own_data(sample, trained):
    """The data lie beside the run, in another folder than this one."""
    result = sample(*INT8)
    assert result.code == 0, result.err
    data = trained.parent / 'data/mini'
    assert f'validation split of {data}' in result.err


def test_int8_is_not_measured_without_data(sample):
    result = sample(*INT8, '--data_dir=nowhere')
    assert result.code == 0, result.err
    assert 'no val.bin of mini in nowhere/mini' in result.err


# ---- what is refused ---------------------------------------------------------------------------

@pytest.mark.parametrize('flags, words', [
    (['--start=日本'], ["'日'", "'本'", 'vocabulary']),
    (['--start=FILE:nope.txt'], ['--start=FILE:nope.txt cannot be read (No such file or directory)',
                                 'the path of a text file', 'type --start=FILE:path']),
    (['--start=FILE:.'], ['--start=FILE:.', 'cannot be read (Is a directory)']),
    (['--temperature=-1'], ['temperature=-1', '0 or more']),
    (['--top_k=0'], ['top_k=0']),
    (['--top_k=1.5'], ['top_k=1.5']),
    (['--top_p=0'], ['top_p=0']),
    (['--top_p=2'], ['top_p=2']),
    (['--repetition_penalty=0'], ['repetition_penalty=0']),
    (['--max_new_tokens=-1'], ['max_new_tokens=-1']),
    (['--max_new_tokens=1000000000000'], ['max_new_tokens=', 'tokens']),
    (['--num_samples=0'], ['num_samples=0']),
    (['--num_samples=9223372036854775807'], ['num_samples=', 'tokens']),
    (['--seed=-1'], ['seed=-1']),
    (['--quantize=int4'], ['int4', 'int8']),
    (['--dtype=float16'], ['float16']),
    (['--checkpoint=nope.pt'], ['nope.pt', '--checkpoint']),
    (['--checkpoint=.'], ['is a folder', 'takes a file', 'type --out_dir=.']),
    (['--temprature=1'], ['--temperature']),
])
def test_mistakes(refused, trained, folder, flags, words):
    refused('sample.py', f'--out_dir={trained}', '--device=cpu', *flags, words=words)
