"""
Tokenizers: text to token ids and back, and their files for Hugging Face's transformers.

A tokenizer has
    vocab_size          the number of its tokens, V
    encode(text)        the text's token ids, an int array
    decode(ids)         the tokens' bytes
    state()             plain data, from which load_tokenizer makes the tokenizer again
    opening             the prompt where the user gives none
    end                 the token that ends a text, or None
"""
import functools
import itertools
import json
import os
import re

import numpy as np

from lib import bpe
from lib.console import fail

END_OF_TEXT = '<|endoftext|>'
LEAST = 257      # symbols of a BPE: 256 bytes and <|endoftext|>
MOST = 1 << 18   # symbols of a BPE; a checkpoint with more is refused


# ---- characters and bytes ------------------------------------------------------------------------

class CharTokenizer:
    """One token per character, numbered in the order of their code points."""
    end = None

    def __init__(self, chars):
        self.chars = ''.join(sorted(set(chars)))
        self.codes = code_points(self.chars)
        self.vocab_size = len(self.chars)
        self.opening = '\n' if '\n' in self.chars else self.chars[:1]

    def encode(self, text):
        """Return the token ids, as many as the text has characters.

        Fail for characters that the vocabulary lacks, and name them."""
        codes = code_points(text)
        ids = np.searchsorted(self.codes, codes).clip(max=self.vocab_size - 1)
        missing = codes[self.codes[ids] != codes]
        if len(missing):
            characters = dict.fromkeys(chr(code) for code in missing[:1000])   # each one once
            shown = ', '.join(map(repr, characters))[:200]
            fail(f'not in the vocabulary of {self.vocab_size} characters: {shown}; '
                 f'allowed are {self.chars!r}; leave them out, or train on a text that has them '
                 f'or with --tokenizer=byte')
        return ids

    def decode(self, ids):
        text = ''.join(self.chars[i] for i in ids)
        return text.encode('utf-8', 'surrogatepass')

    def state(self):
        return dict(kind='char', chars=self.chars)


def code_points(text):
    """Return the code points of a text's characters, an array of uint32."""
    return np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), dtype='<u4')


class ByteTokenizer:
    """One token per byte of UTF-8: 256 tokens for any text."""
    vocab_size = 256
    opening = '\n'
    end = None

    def encode(self, text):
        return np.frombuffer(text.encode('utf-8', 'surrogateescape'), dtype=np.uint8)

    def decode(self, ids):
        return bytes(ids)

    def state(self):
        return dict(kind='byte')


# ---- byte-pair encoding --------------------------------------------------------------------------

class BPETokenizer:
    """Byte-pair encoding with the merges that lib/bpe.py learned, computed by tiktoken.

    Tokens 0 to 255 are the bytes, the next ones are those that the merges make, in order, and the
    last one is <|endoftext|>. A merge is written as in GPT-2's files: two tokens in letters (see
    _byte_letters) with a blank between them."""
    opening = '\n'   # A model of a single text has never seen <|endoftext|>.

    def __init__(self, merges):
        """Raises ValueError for merges that ranks_of refuses."""
        import tiktoken  # imported here: characters and bytes need torch and NumPy alone
        ranks = ranks_of(merges)
        self.merges = list(merges)
        self.end = len(ranks)
        self.vocab_size = len(ranks) + 1
        self.encoding = tiktoken.Encoding('bpe', pat_str=bpe.PATTERN, mergeable_ranks=ranks,
                                          special_tokens={END_OF_TEXT: self.end})

    def encode(self, text):
        """Return the token ids; <|endoftext|> in the text becomes the single token of that name."""
        try:
            return self.encoding.encode_to_numpy(text, allowed_special={END_OF_TEXT})
        except UnicodeEncodeError:   # it holds half of a surrogate pair
            return self._encode_parts(re.split('([\udc80-\udcff])', text))

    def _encode_parts(self, parts):
        """Return the token ids of a text whose parts are, in turn, a text and a single byte.

        Python reads a byte that is not UTF-8 as half of a surrogate pair. Other halves have no
        bytes, and become question marks."""
        ids = []
        for text, byte in itertools.zip_longest(parts[::2], parts[1::2], fillvalue=''):
            ids.extend(self.encode(text.encode('utf-8', 'replace').decode('utf-8')))
            if byte:
                raw = byte.encode('utf-8', 'surrogateescape')
                ids.append(self.encoding.encode_single_token(raw))
        return np.array(ids, dtype=np.uint32)

    def decode(self, ids):
        return self.encoding.decode_bytes(list(ids))

    def state(self):
        return dict(kind='bpe', merges=self.merges)


def ranks_of(merges):
    """Return {token as bytes: its number} of the 256 bytes and of the tokens that merges make.

    Raises ValueError for merges that are not a list of texts, that are too many, that join a token
    which no earlier merge makes, or that make a token a second time or a token that is too long."""
    is_list = isinstance(merges, list) and all(isinstance(merge, str) for merge in merges)
    if not is_list or len(merges) > MOST - LEAST:
        raise ValueError(f"its tokenizer's merges are not a list of at most {MOST - LEAST:,} texts")
    byte_of = _byte_vocab()
    made = set(byte_of)
    ranks = {bytes([byte]): byte for byte in range(256)}
    for number, merge in enumerate(merges):
        parts = merge.split(' ')
        token = ''.join(parts)
        is_new = len(token) <= bpe.LONGEST and token not in made
        if len(parts) != 2 or not made.issuperset(parts) or not is_new:
            raise ValueError(f"its tokenizer's merge {number:,} is {merge[:40]!r}; allowed are two "
                             f'tokens that are there before it and make a new one of at most '
                             f'{bpe.LONGEST} bytes')
        made.add(token)
        ranks[bytes(byte_of[letter] for letter in token)] = len(ranks)
    return ranks


class GPT2Tokenizer(BPETokenizer):
    """GPT-2's byte-pair encoding, with the merges that OpenAI learned from web pages."""
    vocab_size = 50257
    opening = END_OF_TEXT
    end = 50256

    def __init__(self):
        import tiktoken
        try:
            self.encoding = tiktoken.get_encoding('gpt2')
        except Exception as error:   # tiktoken's download can raise anything
            fail(f"tiktoken cannot fetch GPT-2's vocabulary ({type(error).__name__}); "
                 f'it needs the network once, or a folder with its two files; '
                 f'type TIKTOKEN_CACHE_DIR=FOLDER before the command')

    def state(self):
        return dict(kind='gpt2')


# ---- making a tokenizer --------------------------------------------------------------------------

def make_tokenizer(kind, text='', vocab_size=1024):
    """Return a new tokenizer. kind: 'char', 'byte', 'bpe' or 'gpt2'.

    text: the source of 'char' and 'bpe'. vocab_size: the symbols of 'bpe'."""
    if kind == 'char':
        return CharTokenizer(text)
    if kind == 'byte':
        return ByteTokenizer()
    if kind == 'bpe':
        return train_bpe([text], vocab_size)
    if kind == 'gpt2':
        return GPT2Tokenizer()
    fail(f'tokenizer={kind}: allowed are char, byte, bpe, gpt2; type --tokenizer=char')


def train_bpe(texts, vocab_size):
    """Return a BPETokenizer of vocab_size symbols, learned from a text.

    texts: the text in parts that end where a word ends. Fail where the text does not give as many
    symbols."""
    check_vocab_size(vocab_size)
    documents = (document for text in texts for document in text.split(END_OF_TEXT))
    pairs = bpe.learn(documents, vocab_size - LEAST)
    if len(pairs) < vocab_size - LEAST:
        most = LEAST + len(pairs)
        noun = 'pair' if len(pairs) == 1 else 'pairs'
        fail(f'vocab_size={vocab_size}: the training text gives at most {most:,} symbols '
             f'(256 bytes, {len(pairs):,} {noun} to merge, and <|endoftext|>); '
             f'type --vocab_size={most}, or use more text')
    letters = _byte_letters()
    merges = []
    for pair in pairs:
        merges.append(' '.join(''.join(letters[byte] for byte in token) for token in pair))
    return BPETokenizer(merges)


def check_vocab_size(vocab_size, kind='bpe', typed=True):
    """Fail for a number of symbols that no BPE can have, or that is typed for another kind."""
    if kind != 'bpe':
        if typed:
            fail(f'vocab_size={vocab_size}: only a tokenizer that is trained has it, and '
                 f'tokenizer={kind} is not; type --tokenizer=bpe, or leave --vocab_size out')
        return
    if not LEAST <= vocab_size <= MOST:
        fail(f'vocab_size={vocab_size}: allowed are {LEAST} (the 256 bytes and <|endoftext|>) to '
             f'{MOST}; type --vocab_size=1024')


def load_tokenizer(state):
    """Return the tokenizer that state() described. Raises ValueError for anything else."""
    kind = state.get('kind') if isinstance(state, dict) else None
    if kind not in ('char', 'byte', 'bpe', 'gpt2'):
        raise ValueError('it does not name a known tokenizer')
    if kind == 'bpe':
        return BPETokenizer(state.get('merges'))
    if kind == 'char' and not (isinstance(state.get('chars'), str) and state['chars']):
        raise ValueError("its character tokenizer has no 'chars'")
    return make_tokenizer(kind, state.get('chars', ''))


@functools.cache
def token_sizes(tokenizer):
    """Return (bytes, characters) of each token, (V,) each.

    <|endoftext|> has 0 of both, because it stands between texts and not in them."""
    later_bytes = bytes(range(0x80, 0xC0))   # the bytes of a character after its first one
    sizes = np.zeros((2, tokenizer.vocab_size), dtype=np.int64)
    for i in range(tokenizer.vocab_size):
        text = tokenizer.decode([i])
        if text != END_OF_TEXT.encode():
            sizes[0, i] = len(text)
            sizes[1, i] = len(text.translate(None, later_bytes))
    return sizes[0], sizes[1]


# ---- Hugging Face's tokenizer files --------------------------------------------------------------

def hf_tokenizer_files(tokenizer, block_size):
    """Return {name: content} of the files from which AutoTokenizer makes the same tokenizer."""
    kind = tokenizer.state()['kind']
    parts = dict(added_tokens=[], normalizer=None, pre_tokenizer=None, post_processor=None,
                 decoder=None, model=None)
    end = None
    if kind == 'char':
        parts.update(_character_parts(tokenizer))
    elif kind == 'byte':
        parts.update(_bpe_parts(_byte_vocab(), merges=[], use_regex=False))
    else:
        vocab = _bpe_vocab(tokenizer)
        parts.update(_bpe_parts(vocab, _merges(vocab), use_regex=True))
        end = END_OF_TEXT
        parts['added_tokens'] = [dict(id=tokenizer.end, content=end, single_word=False,
                                      lstrip=False, rstrip=False, normalized=False, special=True)]
    config = dict(tokenizer_class='PreTrainedTokenizerFast', model_max_length=block_size,
                  bos_token=end, eos_token=end, clean_up_tokenization_spaces=False)
    whole = dict(version='1.0', truncation=None, padding=None, **parts)
    return {'tokenizer.json': json.dumps(whole, ensure_ascii=False),
            'tokenizer_config.json': json.dumps(config, ensure_ascii=False)}


def _character_parts(tokenizer):
    """Return the parts of tokenizer.json for one token per character.

    The model is WordLevel, because it raises an error for an unknown character. BPE without merges
    would drop the character in silence."""
    vocab = {char: i for i, char in enumerate(tokenizer.chars)}
    return dict(pre_tokenizer=dict(type='Split', pattern=dict(Regex=r'[\s\S]'),
                                   behavior='Isolated', invert=False),
                decoder=dict(type='Fuse'),
                model=dict(type='WordLevel', vocab=vocab, unk_token=''))


def _bpe_parts(vocab, merges, use_regex):
    """Return the parts of tokenizer.json for BPE over bytes.

    use_regex: whether GPT-2's pattern first splits a text into words."""
    byte_level = dict(type='ByteLevel', add_prefix_space=False, trim_offsets=True,
                      use_regex=use_regex)
    return dict(pre_tokenizer=byte_level, decoder=byte_level,
                model=dict(type='BPE', vocab=vocab, merges=merges))


def _byte_letters():
    """Return the 256 letters by which GPT-2's files write bytes.

    A byte with a visible character in Latin-1 is written as that character. The other bytes are
    written, in their order, as the characters from 256 on."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    letters = []
    others = 0
    for byte in range(256):
        if byte in visible:
            letters.append(chr(byte))
        else:
            letters.append(chr(256 + others))
            others += 1
    return letters


def _byte_vocab():
    """Return {letter: byte}."""
    return {letter: byte for byte, letter in enumerate(_byte_letters())}


def _bpe_vocab(tokenizer):
    """Return {token, written in letters: id} of a BPE's tokens except <|endoftext|>."""
    letters = _byte_letters()
    vocab = {}
    for i in range(tokenizer.end):
        token = tokenizer.encoding.decode_single_token_bytes(i)
        vocab[''.join(letters[byte] for byte in token)] = i
    return vocab


def _merges(vocab):
    """Return [[left, right]] of the tokens longer than a letter, in the order of their ids.

    left and right are the two parts that the merges of the earlier tokens leave of a token."""
    merges = []
    for token, i in vocab.items():
        parts = list(token)
        while len(parts) > 2:
            ids = [vocab.get(left + right, i) for left, right in zip(parts, parts[1:])]
            at = ids.index(min(ids))
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append(parts)
    return merges


def bpe_merges(tokenizer):
    """Return (the bytes of tokens 0 to 255, the two token ids of each merge, in their order).

    Merge i makes token 256 + i. export_web.py writes them into its page."""
    vocab = _bpe_vocab(tokenizer)
    bytes_of = [tokenizer.encoding.decode_single_token_bytes(i)[0] for i in range(256)]
    return bytes_of, [(vocab[left], vocab[right]) for left, right in _merges(vocab)]


def read_hf_tokenizer(folder):
    """Return the tokenizer of a folder's tokenizer.json or vocab.json, None where both are missing.

    Raises ValueError for a vocabulary that no tokenizer of this file has."""
    for name in ('tokenizer.json', 'vocab.json'):
        path = os.path.join(folder, name)
        if os.path.exists(path):
            try:
                tokenizer = _known_tokenizer(_read_vocab(path))
            except (OSError, ValueError, LookupError, TypeError, AttributeError,
                    RecursionError) as error:   # a file can hold anything
                reason = f'{type(error).__name__}: {str(error)[:200]}'
                raise ValueError(f'{path} cannot be used ({reason})') from error
            if tokenizer is None:
                raise ValueError(f"{path} is neither GPT-2's vocabulary nor one of characters or "
                                 f"bytes, nor a BPE of this project")
            return tokenizer
    return None


def _read_vocab(path):
    """Return {token: id} of a tokenizer.json, <|endoftext|> included, or of a vocab.json."""
    with open(path, encoding='utf-8') as f:
        content = json.load(f)
    if os.path.basename(path) != 'tokenizer.json':
        return dict(content)
    vocab = dict(content['model']['vocab'])
    for token in content.get('added_tokens', []):
        if token['content'] == END_OF_TEXT:
            vocab[END_OF_TEXT] = token['id']
    return vocab


def _known_tokenizer(vocab):
    """Return the tokenizer that numbers its tokens as vocab does, or None."""
    if vocab == _byte_vocab():
        return ByteTokenizer()
    in_order = {token: i for i, token in enumerate(sorted(vocab))}
    if vocab and vocab == in_order and max(map(len, vocab)) == 1:
        return CharTokenizer(vocab)
    words = {token: i for token, i in vocab.items() if token != END_OF_TEXT}
    learned = _learned_bpe(words) if vocab.get(END_OF_TEXT) == len(words) else None
    if learned is None and len(words) == GPT2Tokenizer.end:
        tokenizer = GPT2Tokenizer()
        if words == _bpe_vocab(tokenizer):
            return tokenizer
    return learned


def _learned_bpe(words):
    """Return the BPETokenizer that numbers its tokens as words does, <|endoftext|> apart, or None.

    Only a BPE of this project numbers the bytes in their order."""
    in_order = sorted(words, key=words.get)
    numbers = [words[token] for token in in_order]
    longest = max(map(len, in_order), default=0)
    if numbers != list(range(len(words))) or longest > bpe.LONGEST:
        return None
    if in_order[:256] != _byte_letters():
        return None
    merges = [' '.join(pair) for pair in _merges({token: words[token] for token in in_order})]
    if [merge.replace(' ', '') for merge in merges] != in_order[256:]:
        return None
    return BPETokenizer(merges)
