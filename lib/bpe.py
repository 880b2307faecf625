"""
Byte-level byte-pair encoding (BPE), learned from a text.

A text is cut into words, and each word into its bytes: 256 tokens write any text. Then the pair of
neighbouring tokens that is most frequent becomes a token of its own, everywhere in the text. This
is repeated, each time with the tokens made so far, until there are as many tokens as wanted:

    text          low low lower      three words: 'low', ' low' and ' lower'
    l, o -> lo    lo·w  ·lo·w  ·lo·w·e·r       (l, o) is there three times, as (o, w) is
    lo, w -> low  low  ·low  ·low·e·r          (lo, w) is there three times

Encoding makes the same merges in the same order. tiktoken does it, in lib/tokenizers.py. Sources:
Sennrich, Haddow and Birch, 2016 (arXiv 1508.07909); for bytes, GPT-2.
"""
import heapq
from collections import Counter, defaultdict

# GPT-2's pattern of a word: an English ending, or letters, digits or other characters with at most
# one blank in front of them, or white space. No token reaches across the border of a word.
PATTERN = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
           r"|\s+(?!\S)|\s+")
LONGEST = 128   # bytes; a longer word counts as several, so no token is longer


def learn(texts, most):
    """Return the merges of a text in order, at most `most`, each a pair of tokens (bytes, bytes).

    texts: the text in parts, each of which ends where a word ends. The merges are fewer than `most`
    if every word has become a single token. Of equally frequent pairs, the one with the older left
    token is merged first; of those with the same left token, the one with the older right token."""
    text = Words(count_words(texts))
    tokens = [bytes([byte]) for byte in range(256)]
    merges = []
    # The smallest entry of the heap is the most frequent pair. Python compares entries of the same
    # count by the pair's characters, whose code points are the numbers of the tokens.
    heap = [(-count, pair) for pair, count in text.pairs.items()]
    heapq.heapify(heap)
    while heap and len(merges) < most:
        count, pair = heapq.heappop(heap)
        now = text.pairs[pair]
        if -count != now:   # Other merges have made the pair less frequent, never more frequent.
            if now:
                heapq.heappush(heap, (-now, pair))
            continue
        left, right = (tokens[ord(character)] for character in pair)
        merges.append((left, right))
        for new in text.merge(pair, merged=chr(len(tokens))):
            heapq.heappush(heap, (-text.pairs[new], new))
        tokens.append(left + right)
    return merges


class Words:
    """The different words of a text, each a str with one character per token: chr(its number).

    pairs: {pair: how often it is in the text}. places: {pair: numbers of the words that have it or
    had it}. A pair is a str of two characters."""

    def __init__(self, counts):
        self.words = list(counts)
        self.counts = list(counts.values())   # how often each word is in the text
        self.pairs = Counter()
        self.places = defaultdict(set)
        for number, word in enumerate(self.words):
            for left, right in zip(word, word[1:]):
                self.add(left + right, number)

    def add(self, pair, number):
        """Count a pair that a word has."""
        self.pairs[pair] += self.counts[number]
        self.places[pair].add(number)

    def merge(self, pair, merged):
        """Replace a pair by the token `merged` in every word, and return the set of new pairs.

        Only words that have the pair are touched, and only pairs beside it are counted anew. So the
        time depends on how often the pair is there, and not on the size of the text."""
        left, right = pair
        found = set()
        for number in self.places.pop(pair):
            # from the left: aaa becomes [aa]a
            word = self.words[number] = self.words[number].replace(pair, merged)
            at = word.find(merged)
            while at >= 0:
                before = word[at - 1:at]     # the token before, '' at the beginning of the word
                after = word[at + 1:at + 2]
                if before:
                    was = right if before == merged else before
                    self.pairs[was + left] -= self.counts[number]
                    self.add(before + merged, number)
                    found.add(before + merged)
                if after and after != merged:   # (merged, merged) is counted in the next round
                    self.pairs[right + after] -= self.counts[number]
                    self.add(merged + after, number)
                    found.add(merged + after)
                at = word.find(merged, at + 1)
        del self.pairs[pair]
        return found


def count_words(texts):
    """Return {word: how often it is in a text}, each word a str with one character per byte."""
    import regex  # imported here: only learning needs it. Python's own re does not know \p{L}.
    pattern = regex.compile(PATTERN)
    found = Counter()
    for text in texts:
        found.update(pattern.findall(text))
    counts = Counter()
    for word, count in found.items():
        word = word.encode('utf-8', 'replace').decode('latin-1')   # code points 0 to 255
        for start in range(0, len(word), LONGEST):
            counts[word[start:start + LONGEST]] += count
    return counts
