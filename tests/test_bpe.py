"""A byte-level BPE that is trained on a text: lib/bpe.py and --tokenizer=bpe.

    pytest tests/test_bpe.py
"""
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TEXT, TINY, same_weights

from lib import bpe, checkpoint, tokenizers
from lib.data import Dataset, how_to_make
from lib.tokenizers import END_OF_TEXT, BPETokenizer, token_sizes, train_bpe

MIXED = "Größe 二重 🎉🏴󠁧󠁢󠁥󠁮󠁧󠁿 e\u0301 don't  a\t\r\n\x00<|endoftext|> עולם नमस्ते 1234"
BPE = ['--tokenizer=bpe', '--vocab_size=300']


# ---- the trainer ---------------------------------------------------------------------------------

def learn_slowly(text, most):
    """Return (merges, merges before the first tie): every pair is counted anew for each merge."""
    words = [(list(map(ord, word)), n) for word, n in bpe.count_words([text]).items()]
    tokens = [bytes([byte]) for byte in range(256)]
    merges = []
    first_tie = most
    while len(merges) < most:
        pairs = Counter()
        for word, n in words:
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        if list(pairs.values()).count(pairs[best]) > 1:
            first_tie = min(first_tie, len(merges))
        left, right = best
        merges.append((tokens[left], tokens[right]))
        tokens.append(tokens[left] + tokens[right])
        words = [(merged(word, best, len(tokens) - 1), n) for word, n in words]
    return merges, first_tie


def merged(word, pair, token):
    """Return a list of tokens in which a token replaces a pair, from the left."""
    result = []
    for each in word:
        result.append(each)
        if tuple(result[-2:]) == pair:
            result[-2:] = [token]
    return result


@pytest.mark.parametrize('alphabet', ['a', 'ab', 'aab  é\n', "it's 12!\t"])
def test_the_merges_are_those_of_counting_anew(alphabet):
    chance = random.Random(alphabet)
    for length in (0, 1, 2, 7, 40, 300, 300):
        text = ''.join(chance.choices(alphabet, k=length))
        expected, _ = learn_slowly(text, 40)
        assert bpe.learn([text], 40) == expected


def text_of_words(seed):
    """Return a text of 200 words, each as often as chance decides, so that ties come late."""
    chance = random.Random(seed)
    words = []
    for _ in range(200):
        word = ''.join(chance.choices('etaoinshrdluéß', k=chance.randint(1, 6)))
        words += [word] * chance.randint(1, 200)
    chance.shuffle(words)
    return ' '.join(words)


def test_the_merges_are_those_of_hugging_faces_trainer():
    """Theirs breaks ties by the visible characters by which it writes bytes, so a tie ends this."""
    import tokenizers as hf
    text = text_of_words(seed=24)
    _, first_tie = learn_slowly(text, 100)
    assert first_tie > 60
    byte_level = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = hf.trainers.BpeTrainer(vocab_size=257 + first_tie, special_tokens=[END_OF_TEXT],
                                     initial_alphabet=byte_level.alphabet(), show_progress=False)
    theirs = hf.Tokenizer(hf.models.BPE())
    theirs.pre_tokenizer = byte_level
    theirs.train_from_iterator([text], trainer)
    merges = json.loads(theirs.to_str())['model']['merges']
    assert train_bpe([text], 257 + first_tie).state()['merges'] == list(map(' '.join, merges))


def test_two_runs_are_equal():
    """Neither the hashes that Python draws for each process nor the parts of a text matter."""
    program = ('from lib import bpe; import sys; text = sys.stdin.read(); '
               'print(bpe.learn([text], 80)); '
               'print(bpe.learn(text.splitlines(True), 80))')
    printed = []
    for seed in '12':
        done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, text=True, check=True,
                              input=TEXT, capture_output=True,
                              env=dict(os.environ, PYTHONHASHSEED=seed, PYTHONUTF8='1'))
        printed += done.stdout.splitlines()
    assert len(printed) == 4
    assert set(printed) == {str(bpe.learn([TEXT], 80))}


def test_a_token_is_never_longer_than_a_word_or_the_limit():
    for text in ('x' * 1_000_000, 'x' * 100 + ' ' + 'xy' * 1000):
        for left, right in bpe.learn([text], 1000):
            assert len(left + right) <= bpe.LONGEST
    assert bpe.learn(['ab ab'], 1000) == [(b'a', b'b'), (b' ', b'ab')]


# ---- the tokenizer -------------------------------------------------------------------------------

@pytest.fixture(scope='session')
def trained_bpe():
    """Return a BPE of 340 symbols."""
    return train_bpe([TEXT, MIXED], 340)


def test_it_is_lossless(trained_bpe):
    chance = random.Random(0)
    texts = [MIXED, '', TEXT]
    texts.append(''.join(map(chr, range(0xD800))))
    texts.append(''.join(map(chr, range(0x1F300, 0x1F700))))
    for size in (1, 10, 1000, 1000):
        texts.append(chance.randbytes(size).decode('utf-8', 'surrogateescape'))
    for text in texts:
        ids = trained_bpe.encode(text)
        assert trained_bpe.decode(ids.tolist()) == text.encode('utf-8', 'surrogateescape')
        assert ids.max(initial=0) < trained_bpe.vocab_size == 340
    assert trained_bpe.decode(trained_bpe.encode('a\ud83db').tolist()) == b'a?b'


def test_the_end_of_text_is_its_last_token(trained_bpe):
    assert trained_bpe.end == 339
    assert trained_bpe.encode(f'a{END_OF_TEXT}').tolist() == [97, 339]
    bytes_of, chars_of = token_sizes(trained_bpe)
    ids = trained_bpe.encode(MIXED)
    text = MIXED.replace(END_OF_TEXT, '')
    assert bytes_of[ids].sum() == len(text.encode())
    assert chars_of[ids].sum() == len(text)
    assert not any(b'<|' in trained_bpe.decode([i]) for i in range(339))   # never learned


def test_each_token_is_encoded_as_itself(trained_bpe):
    """tiktoken makes the merges as they were learned."""
    for i in range(128, 339):
        token = trained_bpe.decode([i])
        if token.decode('utf-8', 'replace').encode() == token:
            assert trained_bpe.encode(token.decode()).tolist() == [i]


MERGES = ['Ġ t', 'h e', 'Ġt he']


@pytest.mark.parametrize('merges', [
    None,
    'Ġ t',
    [['Ġ', 't']],
    [0, 1],
    [*MERGES, 'Ġ t'],          # a second time
    [*MERGES, 'Ġth e'],        # there is no token Ġth
    ['Ġt he', 'Ġ t', 'h e'],   # before its parts
    ['Ġ'],
    ['Ġ t h'],
    ['Ġ '],
    [' t'],
    ['二 t'],
    ['\ud800 t'],
    [f'{"x" * 2**n} {"x" * 2**n}' for n in range(8)],
    ['x' * 10**7],
    ['a b'] * 300_000,
], ids=lambda merges: str(merges)[:30])
def test_a_state_with_impossible_merges_is_refused(merges):
    with pytest.raises(ValueError, match='merge') as error:
        tokenizers.load_tokenizer(dict(kind='bpe', merges=merges))
    assert len(str(error.value)) < 300


def test_a_state_makes_the_same_tokenizer(trained_bpe):
    state = json.loads(json.dumps(trained_bpe.state()))
    again = tokenizers.load_tokenizer(state)
    assert again.state() == state
    assert again.encode(MIXED).tolist() == trained_bpe.encode(MIXED).tolist()
    assert BPETokenizer(MERGES).encode(' the').tolist() == [258]
    assert BPETokenizer([]).vocab_size == 257


# ---- datasets ------------------------------------------------------------------------------------

def whole(name, splits=('train', 'val')):
    """Return the bytes of a dataset's splits, one after another."""
    made = Dataset(name)
    parts = [np.concatenate(made.split(split)).tolist() for split in splits]
    return b''.join(map(made.tokenizer.decode, parts))


def test_only_the_training_split_is_learned(folder, script):
    Path('a.txt').write_text('ab ab abab ' * 90 + 'xyz xyzz ' * 10)
    flags = ['--input=a.txt', '--name=mine', '--tokenizer=bpe', '--vocab_size=259']
    assert script('prepare_text.py', *flags).code == 0
    assert Dataset('mine').tokenizer.state()['merges'] == ['a b', 'Ġ ab']
    assert whole('mine') == Path('a.txt').read_bytes()
    before = Path('data/mine/train.bin').read_bytes()
    assert script('prepare_text.py', *flags).code == 0
    assert Path('data/mine/train.bin').read_bytes() == before
    assert script('prepare_shakespeare.py', '--input=a.txt', *flags[2:]).code == 0
    assert Dataset('shakespeare_bpe').tokenizer.state() == Dataset('mine').tokenizer.state()


def test_documents_are_separated_and_the_separator_is_not_learned(folder, script):
    os.mkdir('in')
    for i in range(12):
        Path(f'in/{i}.txt').write_text(f'the {i} end<|end ' * 9)
    assert script('prepare_text.py', 'in', '--name=mine', *BPE[:1], '--vocab_size=265').code == 0
    made = Dataset('mine')
    tokens = np.concatenate(made.split('train'))
    assert (tokens == made.tokenizer.end).sum() == 10
    assert whole('mine').count(END_OF_TEXT.encode()) == 10
    assert not any('|>' in merge.replace(' ', '') for merge in made.tokenizer.merges)


def test_enwik8_becomes_a_bpe(folder, script):
    raw = ('<mediawiki xmlns=' + TEXT + 'é二' * 500).encode()
    Path('head').write_bytes(raw)
    assert script('prepare_enwik8.py', '--input=head', '--partial', *BPE).code == 0
    assert whole('enwik8_bpe', ('train', 'val', 'test')) == raw
    assert Dataset('enwik8_bpe').vocab_size == 300


@pytest.mark.parametrize('text, flags, words', [
    (TEXT, ['--vocab_size=256'], ['vocab_size=256', '257', '--vocab_size=1024']),
    (TEXT, ['--vocab_size=-1'], ['vocab_size=-1', '257']),
    (TEXT, ['--vocab_size=999999999'], ['vocab_size=999999999', '262144']),
    (TEXT, ['--vocab_size=10000'], ['vocab_size=10000', 'at most 334 symbols', '77 pairs']),
    (TEXT, ['--vocab_size=300', '--tokenizer=byte'], ['vocab_size=300', '--tokenizer=bpe']),
    ('ab', [], ['at most 257 symbols', '0 pairs', '--vocab_size=257']),
    ('x' * 90_000, [], ['at most 266 symbols', '9 pairs', '--vocab_size=266']),
    ('x ' * 90_000, [], ['at most 258 symbols', '1 pair ', '--vocab_size=258']),
    ('', [], []),
], ids=lambda value: str(value)[:20])
@pytest.mark.parametrize('program', ['prepare_text.py', 'prepare_shakespeare.py'])
def test_an_impossible_vocabulary_is_refused(folder, refused, program, text, flags, words):
    Path('a.txt').write_text(text)
    if program == 'prepare_text.py':
        flags = ['--name=mine', *flags]
    refused(program, '--input=a.txt', '--tokenizer=bpe', *flags, words=words)
    assert not list(Path().glob('data/*/*'))


def test_the_command_to_make_a_dataset_again_has_its_size(trained_bpe):
    own = how_to_make('mine', trained_bpe)
    assert own.endswith('--name=mine --tokenizer=bpe --vocab_size=340')
    known = how_to_make('shakespeare_bpe', trained_bpe)
    assert known == 'python prepare_shakespeare.py --tokenizer=bpe --vocab_size=340'
    study = how_to_make('shakespeare_bpe_512', trained_bpe)
    assert study.endswith('--name=shakespeare_bpe_512 --tokenizer=bpe --vocab_size=512')


# ---- runs ----------------------------------------------------------------------------------------

@pytest.fixture
def run(folder, script):
    """Enter a folder with data/mine as a BPE and a run on it in out/. Return its path."""
    Path('a.txt').write_text(TEXT)
    assert script('prepare_text.py', '--input=a.txt', '--name=mine', *BPE).code == 0
    assert script('train.py', *TINY, '--dataset=mine').code == 0
    return folder


CPU = ['--device=cpu', '--dtype=float32']


def test_a_run_is_evaluated_sampled_resumed_and_gives_its_vocabulary(run, script, refused):
    done = script('evaluate.py', '--json=-', '--compile=False', *CPU)
    figures = json.loads(done.out)
    ids = Dataset('mine').split('val')[0].tolist()
    text = Dataset('mine').tokenizer.decode(ids[1:])
    assert figures['tokens'] == len(ids) - 1
    assert figures['bytes'] == len(text)
    bits = figures['nats_per_token'] * figures['tokens'] / np.log(2)
    assert figures['bits_per_byte'] == pytest.approx(bits / len(text))
    assert script('sample.py', '--start=said', '--max_new_tokens=5', *CPU).out.startswith('said')
    assert script('sample.py', '--max_new_tokens=5', *CPU).code == 0
    script('train.py', *TINY, '--dataset=mine', '--max_iters=5', '--out_dir=half')
    assert script('train.py', '--init_from=resume', '--out_dir=half', '--max_iters=10').code == 0
    assert same_weights('half/last.pt', 'out/last.pt')
    Path('b.txt').write_text('another text 二 altogether. ' * 20)
    flags = ['--input=b.txt', '--name=more']
    assert script('prepare_text.py', *flags, '--tokenizer=FROM:out/best.pt').code == 0
    assert Dataset('more').tokenizer.state() == Dataset('mine').tokenizer.state()
    assert script('prepare_text.py', *flags, '--tokenizer=bpe', '--vocab_size=270').code == 0
    words = ['300 and 270 symbols, learned from different texts', '--tokenizer=FROM:out/last.pt']
    refused('train.py', '--init_from=resume', '--dataset=more', words=words)


@pytest.mark.parametrize('merges, words', [
    (MERGES[::-1], ["merge 0 is 'Ġt he'", 'allowed are']),
    (['Ġ t', 'Ġ t'], ["merge 1 is 'Ġ t'"]),
    ([*MERGES, 'Ġthe 二'], ['merge 3']),
])
def test_a_checkpoint_with_impossible_merges_is_refused(trained, folder, refused, merges, words):
    loaded = checkpoint.load(str(trained / 'last.pt'))
    checkpoint.save('lie.pt', loaded | dict(tokenizer=dict(kind='bpe', merges=merges)))
    words = ['lie.pt', '--checkpoint=FILE', *words]
    refused('sample.py', '--checkpoint=lie.pt', *CPU, words=words)
