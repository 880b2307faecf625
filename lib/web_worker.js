'use strict';
/*
What the page asks of the model. This runs in a worker, so that the page stays responsive. Where no
worker can be made, the page calls `answer` itself. Requests that can take long end after a number
of milliseconds, and are asked again for the rest.
*/

let loaded = null;   // what unpack returns
// Readings by the heads that are off. Each reader has its own, so that neither spoils the other's.
const readings = { page: new Map(), program: new Map() };
let chances = new Chances(0);

const requests = {
  // Load the model; return what the page says about it.
  open(data) {
    loaded = unpack(data);
    const { model, facts, dtype, opening } = loaded;
    return { config: model.config, facts, dtype, opening };
  },

  encode: ({ text }) => loaded.tokenizer.encode(text),

  decode: ({ ids }) => decode(loaded.tokenizer, ids),

  bytes: ({ id }) => loaded.tokenizer.bytes(id),

  // The logits (V) of the token after ids.
  logits({ ids }) {
    const reading = readingOf('program');
    reading.read(inContext(ids));
    return Float32Array.from(reading.logits());
  },

  // The attention of every head, [layer][head] -> (T·T): rows are queries.
  attention({ ids }) {
    const { n_layer, n_head } = loaded.model.config;
    const reading = readingOf('program');
    reading.read(inContext(ids));
    const T = reading.ids.length;
    const map = (layer, head) => {
      const weights = new Float32Array(T * T);
      for (let i = 0; i < T; i++) weights.set(reading.attention_weights(layer, head, i), i * T);
      return weights;
    };
    return Array.from({ length: n_layer }, (_, layer) =>
      Array.from({ length: n_head }, (_, head) => map(layer, head)));
  },

  // Write tokens after ids: `count` of them, or fewer where the time is over or a text's end or,
  // with `line`, a line's end is reached. settings: temperature, top_k, top_p, seed. drawn: tokens
  // that this seed has written before. off: heads that are off, as 'layer.head'.
  write({ ids, count, settings, drawn, reader, off, line, ends, milliseconds }) {
    const { model, tokenizer, end } = loaded;
    const started = performance.now();
    if (chances.seed !== settings.seed) chances = new Chances(settings.seed);
    const reading = readingOf(reader, off);
    const context = inContext(ids);
    const fresh = [];
    let ended = false;
    while (fresh.length < count && !ended) {
      if (!reading.read(context, started + milliseconds)) break;
      const logits = reading.logits().subarray(0, model.config.drawable);
      const id = choose(logits, settings, chances.at(drawn + fresh.length));
      fresh.push(id);
      context.push(id);
      // beyond block_size context positions shift, and all of the context is read anew
      if (context.length > model.config.block_size) context.shift();
      if (ends && id === end) ended = true;
      if (line && tokenizer.bytes(id).includes(10)) ended = true;
      if (performance.now() > started + milliseconds) break;
    }
    const bytes = joined(fresh.map(id => tokenizer.bytes(id)));
    return { ids: fresh, bytes, ended, milliseconds: performance.now() - started };
  },

  // What there is to see at the end of ids and at `position` of the context: the likeliest tokens,
  // and where a head looks from there. details: also what each layer would guess, maps of all heads
  // for the last `size` tokens, and the milliseconds that these took. While ids are still being
  // read, `read` is less than `of`, and there is nothing else.
  look({ ids, off, position, layer, head, details, size, milliseconds }) {
    const { model, tokenizer } = loaded;
    const { n_layer, drawable } = model.config;
    const context = inContext(ids);
    const found = { texts: pieces(tokenizer, context), of: context.length };
    const reading = readingOf('page', off);
    const whole = readingOf('page');
    const deadline = performance.now() + milliseconds;
    const finished = reading.read(context, deadline) && whole.read(context, deadline);
    found.read = Math.min(reading.ids.length, whole.ids.length);
    if (!finished) return found;

    const guessOf = (id, shares) => ({ id, text: decode(tokenizer, [id]), share: shares[id] });
    const odds = logits => softmax(logits.subarray(0, drawable));
    const after = odds(reading.logits());
    const before = reading === whole ? after : odds(whole.logits());
    found.next = likeliest(after, 10).map(id => ({ ...guessOf(id, after), before: before[id] }));
    found.nextBefore = likeliest(before, 3).map(id => guessOf(id, before));
    if (!n_layer) return found;
    const at = position ?? context.length - 1;
    found.gaze = reading.attention_weights(layer, head, at);
    if (details) {
      const started = performance.now();
      found.lens = Array.from({ length: n_layer + 1 }, (_, i) => {
        const guess = odds(reading.logits(at, i));
        return likeliest(guess, 3).map(id => guessOf(id, guess));
      });
      found.maps = smallMaps(reading, size);
      found.milliseconds = performance.now() - started;
    }
    return found;
  },
};

// Return the tokens that the model sees of ids: the last block_size; a text's opening for no ids.
function inContext(ids) {
  if (!ids.length) return loaded.opening.slice();
  return Array.from(checked(ids)).slice(-loaded.model.config.block_size);
}

function checked(ids) {
  const V = loaded.model.config.vocab_size;
  for (const id of ids) {
    if (!Number.isInteger(id) || id < 0 || id >= V) {
      throw new RangeError(`token ${id} does not exist: they are whole numbers from 0 to ${V - 1}`);
    }
  }
  return ids;
}

// Return the Reading of 'page' or 'program' without some heads, 'layer.head'. The one with all
// heads and the last other one are kept.
function readingOf(reader, off = []) {
  const kept = readings[reader];
  const key = [...off].sort().join();
  if (!kept.has(key)) {
    for (const other of kept.keys()) if (other) kept.delete(other);
    kept.set(key, new Reading(loaded.model, new Set(off)));
  }
  return kept.get(key);
}

// For each head, in order, the attention among the last `size` tokens (n·n): square roots of the
// shares as bytes, because small shares would be invisible.
function smallMaps(reading, size) {
  const { n_layer, n_head } = reading.model.config;
  const T = reading.ids.length;
  const n = Math.min(size, T);
  const maps = [];
  for (let layer = 0; layer < n_layer; layer++) {
    for (let head = 0; head < n_head; head++) {
      const map = new Uint8Array(n * n);
      for (let i = 0; i < n; i++) {
        const weights = reading.attention_weights(layer, head, T - n + i);
        for (let j = 0; j <= i; j++) map[i * n + j] = 255 * Math.sqrt(weights[T - n + j]);
      }
      maps.push(map);
    }
  }
  return maps;
}

// Return {value} or {error}.
function answer(name, data) {
  try {
    return { value: requests[name](data) };
  } catch (error) {
    return { error: error.message };
  }
}

if (typeof document === 'undefined') {   // in a worker
  onmessage = ({ data: { number, name, data } }) => postMessage({ number, ...answer(name, data) });
  postMessage({ started: true });
}
