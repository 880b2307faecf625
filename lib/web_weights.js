'use strict';
/*
The weights of the page: base64 to bytes, bytes to the model's tensors, and a check that nothing is
damaged.
*/

const AGAIN = 'Copy or download the file once more.';

// Verify the page's data and return the model and its tokenizer, with the ids of a text's opening
// and, where there is one, of the token that ends a text. description: JSON as text.
// checksum: CRC-32 of the description and the weights, eight hexadecimal digits.
function unpack({ description, checksum, weights }) {
  const damaged = `This page is damaged: its weights do not match their checksum. ${AGAIN}`;
  let bytes;
  try {
    bytes = decodeBase64(weights.trim());
  } catch {   // a letter that base64 does not have
    throw new Error(damaged);
  }
  const found = crc32(bytes, crc32(new TextEncoder().encode(description)));
  if (found !== parseInt(checksum, 16)) throw new Error(damaged);
  const { config, tokenizer, tensors, facts, dtype } = JSON.parse(description);
  const named = tensors.map(each => [each.name, tensor(each, bytes.buffer)]);
  const model = new GPT(config, Object.fromEntries(named));
  const made = makeTokenizer(tokenizer);
  return { model, facts, dtype, tokenizer: made, end: tokenizer.end,
           opening: made.encode(tokenizer.opening) };
}

// Base64 is decoded a piece at a time: as one text of characters it would take twice its memory.
function decodeBase64(text) {
  const padding = text.endsWith('==') ? 2 : text.endsWith('=') ? 1 : 0;
  const bytes = new Uint8Array(text.length / 4 * 3 - padding);
  const piece = 4 * 2 ** 18;   // letters; a multiple of 4, which are three bytes
  let at = 0;
  for (let i = 0; i < text.length; i += piece) {
    const binary = atob(text.slice(i, i + piece));
    for (let j = 0; j < binary.length; j++) bytes[at++] = binary.charCodeAt(j);
  }
  return bytes;
}

// CRC-32, as zip files have it, going on from the checksum of earlier bytes. It notices every
// single damaged byte, and of other accidents all but one in four billion. SHA-256 would notice no
// more: whoever changes the page on purpose can change the checksum, too. And a page that is opened
// as a file may have no crypto.subtle.
function crc32(bytes, before = 0) {
  const table = new Uint32Array(256);
  for (let i = 0; i < 256; i++) {
    let rest = i;
    for (let bit = 0; bit < 8; bit++) rest = rest & 1 ? 0xedb88320 ^ rest >>> 1 : rest >>> 1;
    table[i] = rest;
  }
  let crc = ~before;
  for (let i = 0; i < bytes.length; i++) crc = table[(crc ^ bytes[i]) & 255] ^ crc >>> 8;
  return ~crc >>> 0;
}

// A vector as Float32Array, a matrix as {data, scale, rows, columns}.
function tensor({ shape, dtype, at, scale_at }, buffer) {
  const size = shape.reduce((product, length) => product * length, 1);
  let data;
  if (dtype === 'int8') data = new Int8Array(buffer, at, size);
  else if (dtype === 'float16') data = expanded(new Uint16Array(buffer, at, size));
  else data = new Float32Array(buffer, at, size);
  if (shape.length === 1) return data;
  const scale = dtype === 'int8' ? new Float32Array(buffer, scale_at, shape[0]) : null;
  return { data, scale, rows: shape[0], columns: shape[1] };
}

// float16 to float32, by a table of all 65,536 numbers that 16 bits can be.
function expanded(halves) {
  if (!expanded.table) expanded.table = Float32Array.from({ length: 65536 }, (_, bits) => {
    const sign = bits >> 15 ? -1 : 1;
    const exponent = bits >> 10 & 31;
    const fraction = bits & 1023;
    if (exponent === 0) return sign * fraction * 2 ** -24;
    if (exponent === 31) return fraction ? NaN : sign * Infinity;
    return sign * (1024 + fraction) * 2 ** (exponent - 25);
  });
  const { table } = expanded;
  const numbers = new Float32Array(halves.length);
  for (let i = 0; i < halves.length; i++) numbers[i] = table[halves[i]];
  return numbers;
}
