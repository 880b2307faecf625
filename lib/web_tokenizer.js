'use strict';
/*
Text to token ids and back, as in lib/tokenizers.py: characters, bytes of UTF-8, and BPE, which is
GPT-2's or a trained one.

A tokenizer has encode(text) -> ids, and bytes(id) -> the token's bytes. Decoding joins the bytes of
several tokens before it makes characters of them, because a character can be cut in two by tokens.
*/

// state: what lib/web.py packed
function makeTokenizer(state) {
  const kinds = { char: charTokenizer, byte: byteTokenizer, bpe: bpeTokenizer, gpt2: bpeTokenizer };
  return kinds[state.kind](state);
}

function charTokenizer({ chars }) {
  const characters = Array.from(chars);   // code points, not halves of surrogate pairs
  const idOf = new Map(characters.map((character, id) => [character, id]));
  return {
    bytes: id => utf8(characters[id]),
    encode(text) {
      const ids = [];
      const missing = new Set();
      for (const character of text) {
        if (idOf.has(character)) ids.push(idOf.get(character));
        else missing.add(character);
      }
      if (missing.size) {
        const named = [...missing].slice(0, 20).map(each => JSON.stringify(each)).join(', ');
        const allowed = characters.join('').replace('\n', '⏎').replace(' ', '␣');
        throw new Error(`The model does not know ${named}. It learned from a text with `
          + `${characters.length} different characters: ${allowed.slice(0, 300)}`);
      }
      return ids;
    },
  };
}

function byteTokenizer() {
  return {
    bytes: id => Uint8Array.of(id),
    encode: text => Array.from(utf8(text)),
  };
}

const END_OF_TEXT = '<|endoftext|>';
// GPT-2's words: 's, 't and the like; letters, numbers or other signs, with a blank before them;
// white space. \p{White_Space} is what tiktoken means by \s. JavaScript's \s is another set.
const WORDS = new RegExp([
  "'(?:[sdmt]|ll|ve|re)", ' ?\\p{L}+', ' ?\\p{N}+', ' ?[^\\p{White_Space}\\p{L}\\p{N}]+',
  '\\p{White_Space}+(?!\\P{White_Space})', '\\p{White_Space}+'].join('|'), 'gu');

// bytes: those of tokens 0 to 255. merges: pairs of tokens, uint16 in base64; pair i makes token
// 256 + i. end: the token after all merges, <|endoftext|>.
function bpeTokenizer({ bytes, merges, end }) {
  const tokenBytes = bytes.map(byte => Uint8Array.of(byte));
  const tokenOfByte = new Array(256);
  bytes.forEach((byte, id) => { tokenOfByte[byte] = id; });
  const pairs = new Uint16Array(fromBase64(merges).buffer);
  const merged = new Map();   // left · 65536 + right -> the token of both
  for (let i = 0; i < pairs.length; i += 2) {
    const left = tokenBytes[pairs[i]];
    const right = tokenBytes[pairs[i + 1]];
    merged.set(pairs[i] * 65536 + pairs[i + 1], tokenBytes.length);
    tokenBytes.push(joined([left, right]));
  }
  tokenBytes[end] = utf8(END_OF_TEXT);
  const known = new Map();   // word -> its ids; words come again

  const mergedAt = (ids, i) => merged.get(ids[i] * 65536 + ids[i + 1]) ?? Infinity;

  // The ids of a word: the pair that was learned first is merged first, wherever it occurs. What a
  // merge makes can only be merged later, since its own merges were learned later.
  function encodeWord(word) {
    let ids = Array.from(utf8(word), byte => tokenOfByte[byte]);
    for (;;) {
      let first = Infinity;
      for (let i = 0; i + 1 < ids.length; i++) first = Math.min(first, mergedAt(ids, i));
      if (first === Infinity) return ids;
      const shorter = [];
      for (let i = 0; i < ids.length; i++) {
        const merges = i + 1 < ids.length && mergedAt(ids, i) === first;
        shorter.push(merges ? first : ids[i]);
        if (merges) i++;
      }
      ids = shorter;
    }
  }

  return {
    bytes: id => tokenBytes[id],
    encode(text) {
      const ids = [];
      text.split(END_OF_TEXT).forEach((part, i) => {
        if (i) ids.push(end);
        for (const [word] of part.matchAll(WORDS)) {
          if (!known.has(word)) known.set(word, encodeWord(word));
          for (const id of known.get(word)) ids.push(id);
        }
      });
      return ids;
    },
  };
}

function utf8(text) {
  return new TextEncoder().encode(text);
}

// Arrays of bytes, one after another.
function joined(arrays) {
  const all = new Uint8Array(arrays.reduce((sum, array) => sum + array.length, 0));
  let at = 0;
  for (const array of arrays) {
    all.set(array, at);
    at += array.length;
  }
  return all;
}

// The text of ids; bytes that are not UTF-8 become replacement characters.
function decode(tokenizer, ids) {
  const bytes = joined(Array.from(ids, id => tokenizer.bytes(id)));
  return new TextDecoder('utf-8', { ignoreBOM: true }).decode(bytes);
}

// The text that each of ids adds: '' for a token that ends in the middle of a character.
function pieces(tokenizer, ids) {
  const decoder = new TextDecoder('utf-8', { ignoreBOM: true });
  const texts = Array.from(ids, id => decoder.decode(tokenizer.bytes(id), { stream: true }));
  if (texts.length) texts[texts.length - 1] += decoder.decode();
  return texts;
}

function fromBase64(text) {
  return Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
}
