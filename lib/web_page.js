'use strict';
/*
What one sees and presses, and window.gpt for other programs.

The page keeps the text as token ids. It asks the worker what there is to see, and asks again whenever
something has changed meanwhile.
*/

// ---- the worker -----------------------------------------------------------------------------------

const waiting = new Map();   // number of a request -> its Promise's resolve and reject
let requested = 0;
let worker = null;           // null: requests are answered in the page itself

// Ask for one of `requests` (web_worker.js); returns a Promise of its value.
function ask(name, data = {}) {
  return new Promise((resolve, reject) => {
    requested += 1;
    const number = requested;
    waiting.set(number, { resolve, reject });
    if (worker) worker.postMessage({ number, name, data });
    else setTimeout(() => settle({ number, ...answer(name, data) }));   // after the page is drawn
  });
}

function settle({ number, value, error }) {
  const { resolve, reject } = waiting.get(number);
  waiting.delete(number);
  if (error === undefined) resolve(value);
  else reject(new Error(error));
}

// Start a worker from the model's scripts; some browsers allow none to a page opened as a file.
function startWorker() {
  return new Promise(resolve => {
    try {
      const scripts = [...document.querySelectorAll('script.model')].map(script => script.textContent);
      const blob = new Blob(scripts, { type: 'text/javascript' });
      const started = new Worker(URL.createObjectURL(blob));
      started.onerror = () => resolve(null);
      started.onmessage = ({ data }) => {
        if (data.started) resolve(started);
        else settle(data);
      };
    } catch {
      resolve(null);
    }
  });
}

const SLICE = 40;   // milliseconds of work between two looks at the page
let known = null;   // what `open` returns: config, facts, dtype, end

async function load() {
  worker = await startWorker();
  const textOf = id => {
    const element = $(id);
    if (!element) throw new Error('This page is damaged: its end is missing. Copy or download the file once more.');
    return element.textContent;
  };
  const data = { description: textOf('description'), checksum: textOf('checksum'), weights: textOf('weights') };
  $('weights').remove();   // the worker has them; they would take their memory twice
  known = await ask('open', data);
}

// ---- window.gpt -----------------------------------------------------------------------------------

const whenParsed = new Promise(resolve => {
  if (document.readyState === 'loading') addEventListener('DOMContentLoaded', resolve);
  else resolve();
});
const ready = whenParsed.then(load);

// One call after another: two at the same time would take turns at reading their texts anew.
let lastCall = ready;
function inTurn(task) {
  const call = lastCall.then(task);
  lastCall = call.catch(() => {});
  return ready.then(() => call);
}

// In a page's console: await gpt.generate(await gpt.encode('To be'), 20, {temperature: 0})
window.gpt = {
  ready,
  encode: text => inTurn(() => ask('encode', { text })),
  decode: ids => inTurn(() => ask('decode', { ids: Array.from(ids) })),
  logits: ids => inTurn(() => ask('logits', { ids: Array.from(ids) })),
  attention: ids => inTurn(() => ask('attention', { ids: Array.from(ids) })),
  generate: (ids, count, settings = {}) => inTurn(() => generate(Array.from(ids), count, settings)),
};

// Returns the new ids. The page's own requests are answered between slices of the work.
async function generate(ids, count, settings) {
  checkSettings(settings);
  const seed = settings.seed ?? Math.floor(Math.random() * 2 ** 32);
  const fresh = [];
  while (fresh.length < count) {
    const { ids: more } = await ask('write', {
      ids: [...ids, ...fresh], count: count - fresh.length, drawn: fresh.length, milliseconds: SLICE,
      settings: { temperature: 1, ...settings, seed }, reader: 'program' });
    fresh.push(...more);
  }
  return fresh;
}

// Throw for a setting that means nothing, as check_sampling of model.py does.
function checkSettings({ temperature = 1, top_k = null, top_p = null, seed = 0 }) {
  const require = (good, name, value, allowed) => {
    if (!good) throw new RangeError(`${name} is ${value}; allowed is ${allowed}`);
  };
  require(temperature >= 0, 'temperature', temperature, '0 or more');
  require(top_k === null || Number.isInteger(top_k) && top_k >= 1, 'top-k', top_k, 'a whole number from 1, or nothing');
  require(top_p === null || top_p > 0 && top_p <= 1, 'top-p', top_p, 'a number above 0, up to 1, or nothing');
  require(Number.isSafeInteger(seed) && seed >= 0, 'seed', seed, 'a whole number from 0');
}

// ---- the text -------------------------------------------------------------------------------------

const MAP_TOKENS = 48;       // tokens across a small picture of a head
const LINE_TOKENS = 400;     // tokens at most in one line

const state = {
  ids: [],             // the text, in tokens
  decoder: null,       // makes characters of the bytes that are written
  drawn: 0,            // tokens written since the text was last changed by hand
  off: new Set(),      // heads that are off, as 'layer.head'
  layer: 0,
  head: 0,
  position: null,      // the token looked from, in the context; null: the last one
  writing: false,
  wrong: '',           // why the text cannot be used
  seen: null,          // what `look` returned last
  speed: null,         // tokens a second
  detailTime: 0,       // milliseconds that each layer's guess and the maps take
  detailed: 0,         // when they were looked at last
};
const pieceDecoder = () => new TextDecoder('utf-8', { ignoreBOM: true });

// The text was changed by hand.
async function typed() {
  stop();
  const text = $('prompt').value;
  try {
    const ids = await ask('encode', { text });
    if (text !== $('prompt').value) return;   // there is a newer text by now
    state.ids = ids;
    state.wrong = '';
  } catch (error) {
    state.wrong = `${error.message} Take it out to go on.`;
  }
  state.drawn = 0;
  state.position = null;
  state.decoder = pieceDecoder();
  refresh();
}

// Add tokens at the end. bytes: theirs.
function append(ids, bytes) {
  state.ids.push(...ids);
  state.drawn += ids.length;
  state.position = null;
  const prompt = $('prompt');
  prompt.value += state.decoder.decode(bytes, { stream: true });
  prompt.scrollTop = prompt.scrollHeight;
}

function settingsOfPage() {
  const number = (id, empty) => $(id).value === '' ? empty : Number($(id).value);
  const settings = { temperature: number('temperature', 1), top_k: number('top_k', null),
                     top_p: number('top_p', null), seed: number('seed', 0) };
  checkSettings(settings);
  return settings;
}

// Write `count` tokens, or, with `line`, up to the next line break.
async function write(count, line = false) {
  let left = count;
  let milliseconds = 0;
  let written = 0;
  state.writing = true;
  showControls();
  try {
    const settings = settingsOfPage();
    while (state.writing && left > 0) {
      const { ids, drawn } = state;
      const more = await ask('write', { ids, count: Math.min(left, 64), settings, drawn, reader: 'page',
                                        off: [...state.off], line, ends: true, milliseconds: SLICE });
      if (!state.writing) break;   // the text may have been changed meanwhile
      left -= more.ids.length;
      written += more.ids.length;
      milliseconds += more.milliseconds;
      state.speed = 1000 * written / milliseconds;
      append(more.ids, more.bytes);
      await refresh();
      if (more.ended) break;
    }
    state.wrong = '';
  } catch (error) {
    state.wrong = error.message;
  }
  stop();
  refresh();
}

function stop() {
  state.writing = false;
  showControls();
}

// The next picture of the page; at once where the page is not to be seen.
const drawnOnScreen = () => new Promise(resolve => {
  if (document.hidden) setTimeout(resolve);
  else requestAnimationFrame(() => resolve());
});

// ---- looking --------------------------------------------------------------------------------------

let looking = null;      // a Promise while there is something to look at
let lookAgain = false;

// Show what there is to see now; returns a Promise of having shown it. A call while another one is
// under way makes that one go on.
function refresh() {
  lookAgain = true;
  looking ??= lookOn().finally(() => { looking = null; });
  return looking;
}

async function lookOn() {
  while (lookAgain) {
    lookAgain = false;
    try {
      // details that take long come after the rest, and while writing in a tenth of the time
      const rest = performance.now() - state.detailed;
      const soon = state.detailTime < SLICE || state.writing && rest > 10 * state.detailTime;
      const finished = await look(soon);
      if (!soon && finished && !lookAgain && !state.writing) await look(true);
    } catch (error) {
      state.wrong = error.message;
      showNote(null);
    }
    await drawnOnScreen();
  }
}

// Look once; returns whether the text has been read to its end before there was a newer one.
// details: each layer's guess and the maps, too.
async function look(details) {
  for (;;) {
    const { ids, off, position, layer, head } = state;
    const seen = await ask('look', { ids, off: [...off], position, layer, head, details, size: MAP_TOKENS,
                                     milliseconds: SLICE });
    Object.assign(seen, { layer, head, position, off: new Set(off) });
    if (seen.next) {
      state.seen = seen;
      if (seen.maps) {
        state.detailTime = seen.milliseconds;
        state.detailed = performance.now();
      }
      show(seen);
      return true;
    }
    if (!state.writing) showNote(seen);
    if (lookAgain && !state.writing) return false;
  }
}

function show(seen) {
  showNote(seen);
  showControls();
  showFacts();
  showNext(seen);
  if (!known.config.n_layer) return;
  showText(seen);
  if (seen.maps) showMaps(seen);
  if (seen.lens) showLens(seen);
}

const plural = (count, word) => `${count.toLocaleString('en')} ${word}${count === 1 ? '' : 's'}`;

function showNote(seen) {
  const { block_size } = known.config;
  const notes = [];
  if (seen && !seen.next) notes.push(`Reading: ${seen.read} of ${seen.of} ${known.word}s.`);
  if (!state.ids.length) notes.push('The text is empty: the model begins as its texts begin.');
  if (state.ids.length > block_size) {
    notes.push(`The text has ${plural(state.ids.length, known.word)}. The model sees the last ${block_size}, shown below, `
      + `and reads them anew for each ${known.word}, so it writes more slowly now.`);
  }
  $('note').textContent = state.wrong || notes.join(' ');
  $('note').classList.toggle('wrong', Boolean(state.wrong));
  $('prompt').setAttribute('aria-invalid', Boolean(state.wrong));
}

function showControls() {
  const { writing, wrong } = state;
  for (const id of ['one', 'line', 'clear']) $(id).disabled = writing;
  $('on').textContent = writing ? 'Stop' : 'On and on';
  if (wrong && !writing) for (const id of ['one', 'line', 'on']) $(id).disabled = isTextWrong();
  else $('on').disabled = false;
}

// Whether the text, rather than a setting, is what is wrong.
const isTextWrong = () => state.wrong.endsWith('Take it out to go on.');

function showFacts() {
  const { facts, config } = known;
  const parts = [plural(facts.parameters, 'parameter') + ' (the numbers that training found)'];
  if (facts.dataset) parts.push(`learned from ${facts.dataset}` + (facts.steps ? ` in ${plural(facts.steps, 'step')}` : ''));
  if (facts.val_loss) {
    parts.push(`validation loss ${facts.val_loss.toFixed(3)} nats on text it has not seen, where blind guessing has `
      + `${Math.log(config.drawable).toFixed(3)}`);
  }
  parts.push(`sees the last ${plural(config.block_size, known.word)}`);
  parts.push(`weights in ${known.dtype}`);
  if (state.speed) parts.push(`writes ${state.speed.toFixed(state.speed < 10 ? 1 : 0)} ${known.word}s a second here`);
  $('facts').textContent = parts.join(' · ') + '.';
}

// The ten rows stay and their content changes, so that a click that has begun finds its button.
const nextRows = [];

function nextRow() {
  const parts = { token: make('code'), before: make('span', { className: 'bar before' }),
                  after: make('span', { className: 'bar' }), share: make('span'), shareBefore: make('small') };
  const bars = make('span', { className: 'bars' }, parts.before, parts.after);
  const shares = make('span', { className: 'share' }, parts.share, parts.shareBefore);
  const button = make('button', {}, parts.token, bars, shares);
  const row = { ...parts, button, item: make('li', {}, button), id: null };
  button.addEventListener('click', () => take(row.id));
  return row;
}

function showNext({ next, off }) {
  while (nextRows.length < next.length) nextRows.push(nextRow());
  if ($('next').childElementCount !== next.length) $('next').replaceChildren(...nextRows.map(row => row.item));
  const compared = off.size > 0;
  const widest = Math.max(...next.map(({ share, before }) => Math.max(share, before)));
  next.forEach(({ id, text, share, before }, i) => {
    const row = nextRows[i];
    row.id = id;
    row.token.textContent = shown(text);
    row.after.style.width = `${(100 * share / widest).toFixed(1)}%`;
    row.before.style.width = `${(100 * before / widest).toFixed(1)}%`;
    row.share.textContent = percent(share);
    row.shareBefore.textContent = percent(before);
    row.before.hidden = row.shareBefore.hidden = !compared;
    row.button.setAttribute('aria-label', `take ${spoken(text)}, ${percent(share)}`
      + (compared ? `, before ${percent(before)}` : ''));
  });
}

const spoken = text => ({ '\n': 'line break', ' ': 'blank', '\t': 'tab' })[text] ?? text;

// Take a token instead of drawing one.
async function take(id) {
  stop();
  const bytes = await ask('bytes', { id });
  append([id], bytes);
  refresh();
}

// ---- the text, shaded -----------------------------------------------------------------------------

const spans = [];

function showText(seen) {
  const { texts } = seen;
  while (spans.length < texts.length) spans.push(tokenSpan(spans.length));
  texts.forEach((text, i) => {
    const content = running(text);
    if (spans[i].textContent !== content) spans[i].textContent = content;
  });
  if ($('text').childElementCount !== texts.length) $('text').replaceChildren(...spans.slice(0, texts.length));
  showGaze();
}

function tokenSpan(i) {
  const span = make('span', { id: `token-${i}` });
  span.setAttribute('role', 'option');
  span.addEventListener('pointerenter', () => lookFrom(i));
  span.addEventListener('click', () => lookFrom(i));
  return span;
}

function lookFrom(position) {
  if (!state.seen || state.writing) return;
  state.position = position === state.seen.texts.length - 1 ? null : position;
  refresh();
}

function showGaze() {
  const { texts, gaze, layer, head, position } = state.seen;
  const at = position ?? texts.length - 1;
  spans.slice(0, texts.length).forEach((span, i) => {
    span.style.background = i < gaze.length ? `rgba(var(--to), ${(0.8 * Math.sqrt(gaze[i])).toFixed(3)})` : '';
    span.style.opacity = i <= at ? '' : '0.45';
    span.setAttribute('aria-selected', i === at);
  });
  $('text').setAttribute('aria-activedescendant', `token-${at}`);
  const most = likeliest(gaze, 4).filter(i => gaze[i] >= 0.01);
  const line = make('div', {}, 'At ', make('code', { textContent: shown(texts[at]) }), `, head ${layer}.${head} looks`);
  most.forEach((i, n) => {
    const back = at === i ? 'itself' : `${at - i} back`;
    line.append(n ? ', ' : ' ', `${percent(gaze[i])} at `, make('code', { textContent: shown(texts[i]) }), ` (${back})`);
  });
  line.append(state.off.has(`${layer}.${head}`) ? '. It is switched off: what it finds is not used.' : '.');
  $('gaze').replaceChildren(line);
}

$('text').addEventListener('keydown', event => {
  const moves = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
  const turns = { ArrowUp: -1, ArrowDown: 1 };
  if (!state.seen) return;
  if (event.key in moves) {
    const last = state.seen.texts.length - 1;
    const at = Math.max(0, Math.min(last, (state.position ?? last) + moves[event.key]));
    lookFrom(at);
    spans[at].scrollIntoView({ block: 'nearest' });
  } else if (event.key in turns) {
    const { n_layer, n_head } = known.config;
    const heads = n_layer * n_head;
    const at = (state.layer * n_head + state.head + turns[event.key] + heads) % heads;
    pickHead(Math.floor(at / n_head), at % n_head);
  } else return;
  event.preventDefault();
});

function pickHead(layer, head) {
  state.layer = layer;
  state.head = head;
  showHead();
  refresh();
}

function showHead() {
  const { layer, head } = state;
  $('layer').value = layer;
  $('head').value = head;
  for (const button of $('maps').querySelectorAll('button')) {
    button.setAttribute('aria-pressed', button.dataset.at === `${layer}.${head}`);
  }
}

// ---- the heads and their switches -----------------------------------------------------------------

function makeMaps() {
  const { n_layer, n_head } = known.config;
  const width = n_head > 8 ? '2.9rem' : '4.5rem';
  $('maps').style.gridTemplateColumns = `repeat(${n_head}, minmax(${width}, 7.5rem))`;
  for (let layer = 0; layer < n_layer; layer++) {
    $('layer').append(make('option', { value: layer, textContent: layer }));
    for (let head = 0; head < n_head; head++) {
      const name = `${layer}.${head}`;
      const button = make('button', { title: `head ${name}` }, make('canvas', { width: 1, height: 1 }));
      button.dataset.at = name;
      button.setAttribute('aria-label', `show where layer ${layer}, head ${head} looks`);
      button.addEventListener('click', () => pickHead(layer, head));
      const box = make('input', { type: 'checkbox', checked: true });
      box.setAttribute('aria-label', `head ${name} is on`);
      box.addEventListener('change', () => switchHead(name, box.checked));
      const cell = make('div', {}, button, make('label', {}, box, name));
      $('maps').append(cell);
    }
  }
  for (let head = 0; head < n_head; head++) $('head').append(make('option', { value: head, textContent: head }));
}

function switchHead(name, on) {
  if (on) state.off.delete(name);
  else state.off.add(name);
  for (const cell of $('maps').children) {
    const off = state.off.has(cell.querySelector('button').dataset.at);
    cell.classList.toggle('off', off);
    cell.querySelector('input').checked = !off;
  }
  $('all-on').disabled = !state.off.size;
  showSentences();
  refresh();
}

function showMaps({ maps, of }) {
  const n = Math.min(MAP_TOKENS, of);
  [...$('maps').querySelectorAll('canvas')].forEach((canvas, i) => {
    paint(canvas, n, (row, column) => maps[i][row * n + column] / 255);
  });
}

// ---- each layer's guess ---------------------------------------------------------------------------

function showLens({ lens }) {
  const rows = lens.map((guesses, i) => {
    const name = i ? `after layer ${i - 1}` : 'before layer 0';
    const cells = guesses.map(({ text, share }) => make('td', { className: 'text' },
      make('code', { textContent: shown(text) }),
      make('span', { className: 'bar', style: `width: ${(4 * share).toFixed(2)}em` }), percent(share)));
    return make('tr', {}, make('th', { className: 'text', textContent: name, scope: 'row' }), ...cells);
  });
  $('lens').replaceChildren(...rows);
}

// ---- the sentences --------------------------------------------------------------------------------

const WORDS_FOR_TOKEN = { char: 'character', byte: 'byte', gpt2: 'token' };

function showSentences() {
  const { word } = known;
  const what = {
    char: 'It goes by characters.',
    byte: 'It goes by bytes; a letter of English is one, of other languages two or three.',
    gpt2: 'It goes by tokens: short words, and parts of longer ones.',
  };
  $('what').textContent = `This model reads a text and says what comes next. ${what[known.facts.tokenizer]} Type something, `
    + 'or let it write. Everything happens in this page, and nothing leaves it.';
  const odds = `The model gives every ${word} it knows a probability of being the next one. These are the ten likeliest. `
    + 'Press one to take it.';
  const without = [...state.off].join(', ');
  $('next-says').textContent = state.off.size ? `${odds} Blue: without head ${without}. Orange: with all heads.` : odds;
  $('lens-says').textContent = `The layers improve the guess one after another. Here each one is asked early: what would come `
    + `after the ${word} looked from, if the model ended here? Before layer 0 it knows that ${word} alone, and often just `
    + 'repeats it. The last row is its answer.';
  for (const span of document.querySelectorAll('.token-word')) span.textContent = word;
}

function showSettings() {
  const value = id => $(id).value;
  const parts = [`temperature ${value('temperature') || 1}`];
  if (value('top_k')) parts.push(`top-k ${value('top_k')}`);
  if (value('top_p')) parts.push(`top-p ${value('top_p')}`);
  parts.push(`seed ${value('seed') || 0}`);
  $('settings').querySelector('summary').textContent = `How it chooses: ${parts.join(', ')}`;
}

// ---- the beginning --------------------------------------------------------------------------------

function connect() {
  $('prompt').addEventListener('input', typed);
  $('one').addEventListener('click', () => write(1));
  $('line').addEventListener('click', () => write(LINE_TOKENS, true));
  $('on').addEventListener('click', () => state.writing ? stop() : write(Infinity));
  $('clear').addEventListener('click', () => {
    $('prompt').value = '';
    typed();
    $('prompt').focus();
  });
  for (const id of ['temperature', 'top_k', 'top_p', 'seed']) {
    $(id).addEventListener('input', () => {
      state.drawn = 0;
      try {
        settingsOfPage();
        if (!isTextWrong()) state.wrong = '';
      } catch (error) {
        state.wrong = error.message;
      }
      showNote(state.seen);
      showControls();
      showSettings();
    });
  }
  $('layer').addEventListener('change', () => pickHead(Number($('layer').value), state.head));
  $('head').addEventListener('change', () => pickHead(state.layer, Number($('head').value)));
  $('text').addEventListener('pointerleave', () => lookFrom((state.seen?.texts.length ?? 0) - 1));
  $('all-on').addEventListener('click', () => {
    state.off.clear();
    switchHead('', true);
  });
}

ready.then(() => {
  known.word = WORDS_FOR_TOKEN[known.facts.tokenizer];
  makeMaps();
  connect();
  showSentences();
  showSettings();
  showHead();
  $('inside').hidden = !known.config.n_layer;
  $('all').hidden = false;
  if (known.facts.parameters > 20e6) state.detailTime = 1000;   // a guess, until it is measured
  $('prompt').value = known.facts.start;
  typed();
}, error => {
  $('facts').textContent = error.message;
  $('facts').classList.add('wrong');
  $('facts').setAttribute('role', 'alert');
});
