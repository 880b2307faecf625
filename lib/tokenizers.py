"""
Tokenizers: text to token ids and back, and their files for Hugging Face's transformers.

A tokenizer has
    vocab_size          the number of its tokens
    encode(text)        token ids, an int array
    decode(ids)         bytes
    state()             plain data, from which load_tokenizer makes it again
    opening             the text that generation begins with where there is no prompt
    end                 the token that ends a text, None where there is none
"""
import functools
import json
import os

import numpy as np

from lib.console import fail

END_OF_TEXT = '<|endoftext|>'


class CharTokenizer:
    """One token a character, numbered in the order of their code points."""
    end = None   # the token that ends a text

    def __init__(self, chars):
        self.chars = ''.join(sorted(set(chars)))
        self.codes = np.frombuffer(self.chars.encode('utf-32-le', 'surrogatepass'), dtype='<u4')
        self.vocab_size = len(self.chars)
        self.opening = '\n' if '\n' in self.chars else self.chars[:1]

    def encode(self, text):
        """Token ids, an int array as long as text; fails on a character that the vocabulary lacks, naming it."""
        codes = np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), dtype='<u4')
        ids = np.searchsorted(self.codes, codes).clip(max=self.vocab_size - 1)
        missing = codes[self.codes[ids] != codes]
        if len(missing):
            shown = ', '.join(f'{chr(c)!r}' for c in dict.fromkeys(missing[:1000].tolist()))[:200]
            fail(f'not in the vocabulary of {self.vocab_size} characters: {shown}; allowed are {self.chars!r}; '
                 f'leave them out, or train on a text that has them or with --tokenizer=byte')
        return ids

    def decode(self, ids):
        return ''.join(self.chars[i] for i in ids).encode('utf-8', 'surrogatepass')

    def state(self):
        return dict(kind='char', chars=self.chars)


class ByteTokenizer:
    """One token a byte of UTF-8: any text, 256 symbols."""
    vocab_size, opening, end = 256, '\n', None

    def encode(self, text):
        return np.frombuffer(text.encode('utf-8', 'surrogateescape'), dtype=np.uint8)

    def decode(self, ids):
        return bytes(ids)

    def state(self):
        return dict(kind='byte')


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding, through tiktoken."""
    vocab_size, opening, end = 50257, END_OF_TEXT, 50256

    def __init__(self):
        import tiktoken  # here, so that characters and bytes need torch and numpy alone
        try:
            self.bpe = tiktoken.get_encoding('gpt2')
        except Exception as error:   # whatever its download met
            fail(f"tiktoken cannot fetch GPT-2's vocabulary ({type(error).__name__}); it needs the network once, or a folder "
                 f"with its two files; type TIKTOKEN_CACHE_DIR=FOLDER before the command")

    def encode(self, text):
        """Token ids; <|endoftext|> in the text becomes that one token."""
        try:
            return self.bpe.encode_to_numpy(text, allowed_special={END_OF_TEXT})
        except UnicodeEncodeError:   # half of a surrogate pair has no bytes
            return self.encode(text.encode('utf-8', 'replace').decode('utf-8'))

    def decode(self, ids):
        return self.bpe.decode_bytes(list(ids))

    def state(self):
        return dict(kind='gpt2')


@functools.cache
def token_sizes(tokenizer):
    """Bytes and characters of each token, (V,) each; none for the end of a text, which is in no text."""
    texts = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    texts = [b'' if text == END_OF_TEXT.encode() else text for text in texts]
    later = bytes(range(0x80, 0xC0))   # a character's bytes after its first
    return np.array([len(text) for text in texts]), np.array([len(text.translate(None, later)) for text in texts])


def make_tokenizer(kind, text=''):
    """A new tokenizer for a text: 'char', 'byte' or 'gpt2'."""
    makers = dict(char=lambda: CharTokenizer(text), byte=ByteTokenizer, gpt2=GPT2Tokenizer)
    if kind not in makers:
        fail(f'tokenizer={kind}: allowed are {", ".join(makers)}; type --tokenizer=char')
    return makers[kind]()


def load_tokenizer(state):
    """The tokenizer that state() described. Raises ValueError for anything else."""
    if not isinstance(state, dict) or state.get('kind') not in ('char', 'byte', 'gpt2'):
        raise ValueError('it names no tokenizer that is known here')
    if state['kind'] == 'char' and not (isinstance(state.get('chars'), str) and state['chars']):
        raise ValueError("its character tokenizer has no 'chars'")
    return make_tokenizer(state['kind'], state.get('chars', ''))


# ---- Hugging Face's tokenizer files --------------------------------------------------------------

def _byte_letters():
    """The letter by which GPT-2's files write each byte: its own where that can be seen, else one from 256 on."""
    seen, others = {*range(33, 127), *range(161, 173), *range(174, 256)}, iter(range(256, 512))
    return [chr(byte if byte in seen else next(others)) for byte in range(256)]


def _gpt2_vocab(bpe):
    """{token in those letters: id} of GPT-2's tokens, <|endoftext|> apart."""
    letters = _byte_letters()
    return {''.join(letters[byte] for byte in bpe.decode_single_token_bytes(i)): i for i in range(50256)}


def _merges(vocab):
    """[the two parts of each longer token] in the order of their ids: what the earlier tokens make of it."""
    merges = []
    for token, i in vocab.items():
        parts = list(token)
        while len(parts) > 2:
            ids = [vocab.get(a + b, i) for a, b in zip(parts, parts[1:])]
            at = ids.index(min(ids))
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append(parts)
    return merges


def hf_tokenizer_files(tokenizer, block_size):
    """{name: content} of the files from which transformers' AutoTokenizer makes the same tokenizer."""
    kind, end, added = tokenizer.state()['kind'], None, []
    if kind == 'char':   # BPE without merges would drop an unknown character in silence, WordLevel raises
        model = dict(type='WordLevel', vocab={char: i for i, char in enumerate(tokenizer.chars)}, unk_token='')
        split = dict(type='Split', pattern=dict(Regex=r'[\s\S]'), behavior='Isolated', invert=False)
        decoder = dict(type='Fuse')
    else:
        vocab = _gpt2_vocab(tokenizer.bpe) if kind == 'gpt2' else {letter: i for i, letter in enumerate(_byte_letters())}
        model = dict(type='BPE', vocab=vocab, merges=_merges(vocab) if kind == 'gpt2' else [])
        split = decoder = dict(type='ByteLevel', add_prefix_space=False, trim_offsets=True, use_regex=kind == 'gpt2')
        if kind == 'gpt2':
            end = END_OF_TEXT
            added = [dict(id=50256, content=end, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)]
    files = {'tokenizer.json': dict(version='1.0', truncation=None, padding=None, added_tokens=added, normalizer=None,
                                    pre_tokenizer=split, post_processor=None, decoder=decoder, model=model),
             'tokenizer_config.json': dict(tokenizer_class='PreTrainedTokenizerFast', model_max_length=block_size,
                                           bos_token=end, eos_token=end, clean_up_tokenization_spaces=False)}
    return {name: json.dumps(content, ensure_ascii=False) for name, content in files.items()}


def read_hf_tokenizer(folder):
    """The tokenizer of a folder's tokenizer.json or vocab.json, None where there is neither; ValueError for one not ours."""
    for name in ('tokenizer.json', 'vocab.json'):
        path = os.path.join(folder, name)
        if os.path.exists(path):
            try:
                with open(path, encoding='utf-8') as f:
                    vocab = json.load(f)
                vocab = dict(vocab['model']['vocab'] if name == 'tokenizer.json' else vocab)
                if vocab == {letter: i for i, letter in enumerate(_byte_letters())}:
                    return ByteTokenizer()
                if vocab and vocab == {char: i for i, char in enumerate(sorted(vocab))} and max(map(len, vocab)) == 1:
                    return CharTokenizer(vocab)
                vocab.pop(END_OF_TEXT, None)
                if len(vocab) == 50256 and vocab == _gpt2_vocab((tokenizer := GPT2Tokenizer()).bpe):
                    return tokenizer
            except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                raise ValueError(f'{path} cannot be used ({type(error).__name__}: {str(error)[:200]})') from error
            raise ValueError(f"{path} is neither GPT-2's vocabulary nor one of characters or bytes")
    return None
