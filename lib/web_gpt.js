'use strict';
/*
The GPT of model.py, told once more in plain JavaScript. Names and shapes are model.py's:

    T  time, tokens in this call         C   n_embd, the width of a token's vector
    S  tokens read so far, with those    nh  n_head, heads in a layer
    V  vocab_size                        hs  head size, C / nh

    ids (T) -> wte + wpe (T, C) -> n_layer blocks -> ln_f -> lm_head -> logits (V)

There is one text, so there is no B. A matrix is a typed array, row after row. Activations are
Float64Array, because JavaScript multiplies in float64 anyway, and reading a float32 would add a
conversion to every product: 1.5 instead of 1.3 billion products a second for a small matrix.
*/

// ---- linear layers: nearly all of the time is spent here ----------------------------------------

// Return x (T, in) · weightᵀ (in, out) + bias. weight: {data (out, in), scale, rows, columns}.
// Int8 weights are multiplied as they are, and a row's scale comes once at the end. Expanded to
// float32 they would take four times the memory, and a net of 10.65M would write 1.1 times as fast.
function linear(x, T, { weight, bias }) {
  const { data, scale, rows, columns } = weight;
  const y = new Float64Array(T * rows);                                          // (T, out)
  let t = 0;
  for (; t + 4 <= T; t += 4) {
    multiplyFour(y.subarray(t * rows), x.subarray(t * columns), data, rows, columns);
  }
  for (; t < T; t++) {
    multiplyOne(y.subarray(t * rows), x.subarray(t * columns), data, rows, columns);
  }
  for (let at = 0; at < y.length; at += rows) {
    if (scale) for (let row = 0; row < rows; row++) y[at + row] *= scale[row];
    if (bias) for (let row = 0; row < rows; row++) y[at + row] += bias[row];
  }
  return y;
}

// One token. Four rows at a time share each number of x, and their four sums do not wait for each
// other.
function multiplyOne(y, x, data, rows, columns) {
  let row = 0;
  for (; row + 4 <= rows; row += 4) {
    const a = row * columns;
    const b = a + columns;
    const c = b + columns;
    const d = c + columns;
    let sumA = 0, sumB = 0, sumC = 0, sumD = 0;
    for (let i = 0; i < columns; i++) {
      const value = x[i];
      sumA += data[a + i] * value;
      sumB += data[b + i] * value;
      sumC += data[c + i] * value;
      sumD += data[d + i] * value;
    }
    y[row] = sumA;
    y[row + 1] = sumB;
    y[row + 2] = sumC;
    y[row + 3] = sumD;
  }
  for (; row < rows; row++) {
    let sum = 0;
    for (let i = 0; i < columns; i++) sum += data[row * columns + i] * x[i];
    y[row] = sum;
  }
}

// Four tokens. A weight that has been read, and an int8 that has been converted, serves four sums:
// twice as many products a second as one token after another.
function multiplyFour(y, x, data, rows, columns) {
  const x1 = columns, x2 = 2 * columns, x3 = 3 * columns;
  const y1 = rows, y2 = 2 * rows, y3 = 3 * rows;
  let row = 0;
  for (; row + 2 <= rows; row += 2) {
    const a = row * columns;
    const b = a + columns;
    let a0 = 0, a1 = 0, a2 = 0, a3 = 0;
    let b0 = 0, b1 = 0, b2 = 0, b3 = 0;
    for (let i = 0; i < columns; i++) {
      const weightA = data[a + i], weightB = data[b + i];
      const v0 = x[i], v1 = x[x1 + i], v2 = x[x2 + i], v3 = x[x3 + i];
      a0 += weightA * v0;
      a1 += weightA * v1;
      a2 += weightA * v2;
      a3 += weightA * v3;
      b0 += weightB * v0;
      b1 += weightB * v1;
      b2 += weightB * v2;
      b3 += weightB * v3;
    }
    y[row] = a0;
    y[y1 + row] = a1;
    y[y2 + row] = a2;
    y[y3 + row] = a3;
    y[row + 1] = b0;
    y[y1 + row + 1] = b1;
    y[y2 + row + 1] = b2;
    y[y3 + row + 1] = b3;
  }
  for (; row < rows; row++) {
    for (let t = 0; t < 4; t++) {
      let sum = 0;
      for (let i = 0; i < columns; i++) sum += data[row * columns + i] * x[t * columns + i];
      y[t * rows + row] = sum;
    }
  }
}

// ---- the small layers ---------------------------------------------------------------------------

// x (T, C) -> (T, C). norm: {weight, bias}, null where the config has no norm.
function layer_norm(x, T, norm) {
  if (!norm) return x;
  const { weight, bias } = norm;
  const C = weight.length;
  const y = new Float64Array(T * C);                                             // (T, C)
  for (let t = 0; t < T; t++) {
    let mean = 0;
    for (let i = 0; i < C; i++) mean += x[t * C + i] / C;
    let variance = 0;
    for (let i = 0; i < C; i++) variance += (x[t * C + i] - mean) ** 2 / C;
    const inverse = 1 / Math.sqrt(variance + 1e-5);
    for (let i = 0; i < C; i++) {
      y[t * C + i] = (x[t * C + i] - mean) * inverse * weight[i] + (bias ? bias[i] : 0);
    }
  }
  return y;
}

// Give each hs numbers of x a root mean square of 1, in place: QK-norm, one head after another.
function rms_norm(x, hs) {
  for (let at = 0; at < x.length; at += hs) {
    let square = 0;
    for (let i = at; i < at + hs; i++) square += x[i] * x[i] / hs;
    const inverse = 1 / Math.sqrt(square + 2 ** -23);   // float32's epsilon, as in torch
    for (let i = at; i < at + hs; i++) x[i] *= inverse;
  }
}

// Turn each pair (i, i + hs/2) of the heads of one token, x (heads, hs), by its angle, in place:
// rotary positions. The angles are rounded to float32 as in model.py.
function rotate(x, hs, position) {
  const half = hs / 2;
  for (let i = 0; i < half; i++) {
    const frequency = Math.fround(10000 ** -(2 * i / hs));
    const angle = Math.fround(position * frequency);
    const cos = Math.cos(angle);
    const sin = Math.sin(angle);
    for (let at = i; at < x.length; at += hs) {
      const first = x[at];
      const second = x[at + half];
      x[at] = first * cos - second * sin;
      x[at + half] = second * cos + first * sin;
    }
  }
}

const ACTIVATIONS = {
  // 0.5 x (1 + tanh(u)) with tanh(u) = 1 - 2 / (e^2u + 1): Math.exp takes less time than Math.tanh
  gelu: x => x - x / (Math.exp(2 * Math.sqrt(2 / Math.PI) * (x + 0.044715 * x * x * x)) + 1),
  gelu_erf: x => 0.5 * x * (1 + erf(x / Math.SQRT2)),
  relu2: x => x > 0 ? x * x : 0,
};

// The error function, within 1.5e-7: formula 7.1.26 of Abramowitz and Stegun.
function erf(x) {
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  const polynomial = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741
    + t * (-1.453152027 + t * 1.061405429))));
  return Math.sign(x) * (1 - polynomial * Math.exp(-x * x));
}

// Turn values into shares that sum to 1, in place.
function softmax(values) {
  let largest = -Infinity;
  for (let i = 0; i < values.length; i++) if (values[i] > largest) largest = values[i];
  let sum = 0;
  for (let i = 0; i < values.length; i++) {
    values[i] = Math.exp(values[i] - largest);
    sum += values[i];
  }
  for (let i = 0; i < values.length; i++) values[i] /= sum;
  return values;
}

// ---- the model ----------------------------------------------------------------------------------

class GPT {
  // config: GPTConfig's fields, and drawable, the number of tokens that sampling may draw.
  // tensors: {name: Float32Array}, and for a matrix {name: {data, scale, rows, columns}}.
  constructor(config, tensors) {
    this.config = config;
    const tensor = name => tensors[name] || null;
    const linearOf = name => ({ weight: tensors[name + '.weight'], bias: tensor(name + '.bias') });
    const normOf = name => tensor(name + '.weight') && linearOf(name);
    const blockOf = i => ({
      ln_1: normOf(`h.${i}.ln_1`),
      attn: { c_attn: linearOf(`h.${i}.attn.c_attn`), c_proj: linearOf(`h.${i}.attn.c_proj`) },
      ln_2: normOf(`h.${i}.ln_2`),
      mlp: { c_fc: linearOf(`h.${i}.mlp.c_fc`), c_proj: linearOf(`h.${i}.mlp.c_proj`) },
    });
    this.transformer = {
      wte: tensors['wte.weight'],                                                // (V, C)
      wpe: tensor('wpe.weight'),                                                 // (block_size, C)
      h: Array.from({ length: config.n_layer }, (_, i) => blockOf(i)),
      ln_f: normOf('ln_f'),
    };
    this.lm_head = { weight: tensor('lm_head.weight') || this.transformer.wte, bias: null };
  }

  // ids (T), of which the first is at position `past` -> (T, C)
  embed(ids, past) {
    const { wte, wpe } = this.transformer;
    const C = this.config.n_embd;
    const x = new Float64Array(ids.length * C);                                  // (T, C)
    ids.forEach((id, t) => {
      addRow(x, t * C, wte, id);
      if (wpe) addRow(x, t * C, wpe, past + t);
    });
    return x;
  }

  // One position's vector (C) -> logits (V): the final norm and the head. On the stream after an
  // earlier layer it is that layer's guess, the logit lens.
  logits(x) {
    return linear(layer_norm(x, 1, this.transformer.ln_f), 1, this.lm_head);     // (V)
  }
}

// Add a row of a matrix to x from `at` on.
function addRow(x, at, { data, scale, columns }, row) {
  const factor = scale ? scale[row] : 1;
  for (let i = 0; i < columns; i++) x[at + i] += factor * data[row * columns + i];
}

// ---- a text as the model has read it ------------------------------------------------------------

const GROUP = 8;   // tokens that are read together

// Queries, keys and values of every layer, and the residual stream between the layers, for the
// tokens read so far. A text that begins with the same tokens is only read from the first other one
// on. This is the KV cache of writing, and it makes a keystroke cheap.
class Reading {
  // off: a Set of 'layer.head', heads whose output is replaced by zeros
  constructor(model, off = new Set()) {
    this.model = model;
    this.off = off;
    this.ids = [];
    this.capacity = 0;
    const layers = this.model.config.n_layer;
    this.layers = Array.from({ length: layers }, () => ({ q: null, k: null, v: null }));
    this.streams = new Array(layers + 1).fill(null);
  }

  // Read ids, at most block_size of them, until all are read or the clock passes `deadline`.
  // Return whether all are read.
  read(ids, deadline = Infinity) {
    let same = 0;
    while (same < this.ids.length && same < ids.length && this.ids[same] === ids[same]) same++;
    this.ids.length = same;
    this.makeRoom(ids.length);
    while (this.ids.length < ids.length) {
      this.forward(ids.slice(this.ids.length, this.ids.length + GROUP));
      if (this.ids.length < ids.length && performance.now() > deadline) return false;
    }
    return true;
  }

  // Let the caches, (capacity, C) each, hold this many tokens.
  makeRoom(tokens) {
    if (tokens <= this.capacity) return;
    const { block_size, n_embd } = this.model.config;
    this.capacity = Math.min(block_size, Math.max(64, 2 * tokens));
    const larger = old => {
      const array = new Float32Array(this.capacity * n_embd);
      if (old) array.set(old);
      return array;
    };
    for (const layer of this.layers) {
      layer.q = larger(layer.q);
      layer.k = larger(layer.k);
      layer.v = larger(layer.v);
    }
    this.streams = this.streams.map(larger);
  }

  // Read the next tokens, ids (T), into the caches.
  forward(ids) {
    const past = this.ids.length;
    const C = this.model.config.n_embd;
    let x = this.model.embed(ids, past);                                         // (T, C)
    this.streams[0].set(x, past * C);
    this.model.transformer.h.forEach((block, i) => {
      x = this.block(x, ids.length, block, i);
      this.streams[i + 1].set(x, past * C);
    });
    this.ids.push(...ids);
  }

  // (T, C) -> (T, C)
  block(x, T, block, layer) {
    x = this.branch(x, T, block.ln_1, y => this.attention(y, T, block.attn, layer));
    return this.branch(x, T, block.ln_2, y => this.mlp(y, T, block.mlp));
  }

  // x + layer(norm(x)) in GPT-2, with the config's changes to it; (T, C) -> (T, C)
  branch(x, T, norm, layer) {
    const { norm: place, residual } = this.model.config;
    const y = layer(place === 'pre' ? layer_norm(x, T, norm) : x);
    if (residual) for (let i = 0; i < y.length; i++) y[i] += x[i];
    return place === 'post' ? layer_norm(y, T, norm) : y;
  }

  // (T, C) -> (T, C)
  mlp(x, T, { c_fc, c_proj }) {
    const y = linear(x, T, c_fc);                                                // (T, 4C)
    const activation = ACTIVATIONS[this.model.config.activation];
    for (let i = 0; i < y.length; i++) y[i] = activation(y[i]);
    return linear(y, T, c_proj);                                                 // (T, C)
  }

  // (T, C) -> (T, C); the new tokens' queries, keys and values go into the cache.
  attention(x, T, { c_attn, c_proj }, layer) {
    const { n_head, n_embd: C, qk_norm, pos } = this.model.config;
    const hs = C / n_head;
    const past = this.ids.length;
    const { q, k, v } = this.layers[layer];                                      // (S, C) each
    const qkv = linear(x, T, c_attn);                                            // (T, 3C)
    for (let t = 0; t < T; t++) {
      const qk = qkv.subarray(t * 3 * C, t * 3 * C + 2 * C);                     // (2·nh, hs)
      if (qk_norm) rms_norm(qk, hs);
      if (pos === 'rope') rotate(qk, hs, past + t);
      q.set(qk.subarray(0, C), (past + t) * C);
      k.set(qk.subarray(C), (past + t) * C);
      v.set(qkv.subarray(t * 3 * C + 2 * C, (t + 1) * 3 * C), (past + t) * C);
    }
    const y = new Float64Array(T * C);                                           // (T, C)
    for (let head = 0; head < n_head; head++) {
      if (this.off.has(`${layer}.${head}`)) continue;
      for (let t = 0; t < T; t++) {
        const weights = this.attention_weights(layer, head, past + t);           // (S)
        const at = t * C + head * hs;
        for (let j = 0; j < weights.length; j++) {
          const share = weights[j];
          const from = j * C + head * hs;
          for (let i = 0; i < hs; i++) y[at + i] += share * v[from + i];
        }
      }
    }
    return linear(y, T, c_proj);                                                 // (T, C)
  }

  // Where a head looks from a position: softmax(q·kᵀ/√hs) over that token and those before it.
  // Return position + 1 shares that sum to 1.
  attention_weights(layer, head, position) {
    const { n_head, n_embd: C } = this.model.config;
    const hs = C / n_head;
    const { q, k } = this.layers[layer];
    const query = q.subarray(position * C + head * hs, position * C + (head + 1) * hs);
    const scores = new Float64Array(position + 1);                               // (S)
    for (let j = 0; j <= position; j++) {
      const from = j * C + head * hs;
      let score = 0;
      for (let i = 0; i < hs; i++) score += query[i] * k[from + i];
      scores[j] = score / Math.sqrt(hs);
    }
    return softmax(scores);
  }

  // The logits (V) after a position, as the stream below a layer would have them; by default those
  // of the model, after the last token.
  logits(position = this.ids.length - 1, layer = this.model.config.n_layer) {
    const C = this.model.config.n_embd;
    const x = Float64Array.from(this.streams[layer].subarray(position * C, (position + 1) * C));
    return this.model.logits(x);                                                 // (V)
  }
}

// ---- from logits to a token ---------------------------------------------------------------------

// What the next token is drawn from. logits (V); temperature above 0. top_k keeps the k likeliest
// tokens, top_p the fewest that hold this share of the probability; null switches either off.
function probabilities(logits, { temperature = 1, top_k = null, top_p = null } = {}) {
  let largest = -Infinity;
  for (const value of logits) if (value > largest) largest = value;
  const scaled = logits.map(value => (value - largest) / Math.max(temperature, 1e-20));
  if (top_k !== null && top_k < scaled.length) {
    for (const id of likeliest(scaled, scaled.length).slice(top_k)) scaled[id] = -Infinity;
  }
  if (top_p !== null && top_p < 1) {
    const order = likeliest(scaled, scaled.length);
    const shares = softmax(scaled.slice());
    let likelier = 0;   // probability of the tokens before
    for (const id of order) {
      if (likelier >= top_p && likelier > 0) scaled[id] = -Infinity;
      likelier += shares[id];
    }
  }
  return softmax(scaled);
}

// The indices of the `count` largest values, the largest first.
function likeliest(values, count) {
  if (count > 20) {
    const all = Array.from(values.keys());
    return all.sort((a, b) => values[b] - values[a] || a - b).slice(0, count);
  }
  const best = [];
  for (let i = 0; i < values.length; i++) {
    if (best.length === count && values[i] <= values[best[count - 1]]) continue;
    let at = best.length;
    while (at > 0 && values[best[at - 1]] < values[i]) at--;
    best.splice(at, 0, i);
    if (best.length > count) best.pop();
  }
  return best;
}

// The token at which the running sum of the probabilities passes chance, a number from [0, 1).
function draw(probs, chance) {
  const total = probs.reduce((sum, share) => sum + share, 0);
  let mass = 0;
  for (let id = 0; id < probs.length; id++) {
    mass += probs[id];
    if (mass > chance * total) return id;
  }
  return probs.length - 1;
}

// The next token after logits (V): the likeliest at temperature 0, else the one that chance draws.
function choose(logits, settings, chance) {
  if (settings.temperature === 0) return likeliest(logits, 1)[0];
  return draw(probabilities(logits, settings), chance);
}

// Uniform numbers from [0, 1), decided by a seed. They are those that torch.rand draws in float64,
// with the generator MT19937, so a seed writes here the text that it writes in sample.py.
class Chances {
  constructor(seed) {
    this.seed = seed;
    this.drawn = [];
    this.state = new Uint32Array(624);
    this.state[0] = seed % 2 ** 32;
    for (let i = 1; i < 624; i++) {
      const before = this.state[i - 1] ^ this.state[i - 1] >>> 30;
      this.state[i] = Math.imul(1812433253, before) + i;
    }
    this.next = 624;
  }

  // The number for the i-th token that is written.
  at(i) {
    while (this.drawn.length <= i) {
      const high = this.bits() % 2 ** 21;
      const low = this.bits();
      const number = Math.fround((high * 2 ** 32 + low) / 2 ** 53);
      this.drawn.push(Math.min(number, 1 - 2 ** -24));
    }
    return this.drawn[i];
  }

  // 32 random bits
  bits() {
    if (this.next === 624) this.twist();
    let y = this.state[this.next++];
    y ^= y >>> 11;
    y ^= y << 7 & 0x9d2c5680;
    y ^= y << 15 & 0xefc60000;
    return (y ^ y >>> 18) >>> 0;
  }

  twist() {
    const state = this.state;
    for (let i = 0; i < 624; i++) {
      const y = state[i] & 0x80000000 | state[(i + 1) % 624] & 0x7fffffff;
      state[i] = state[(i + 397) % 624] ^ y >>> 1 ^ (y & 1 ? 0x9908b0df : 0);
    }
    this.next = 0;
  }
}
