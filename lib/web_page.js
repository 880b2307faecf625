'use strict';
/*
What one sees and presses. The text is kept as token ids. Whenever something has changed, `refresh`
asks the worker what there is to see, and shows it.
*/

const MAP_TOKENS = 48;       // tokens across a small picture of a head
const LINE_TOKENS = 400;     // most tokens of a line
const LARGE = 20e6;          // parameters from which on details may take long

const state = {
  ids: [],             // the text, in tokens
  decoder: null,       // makes characters of the bytes that are written
  drawn: 0,            // tokens written since the text was last changed by hand
  off: new Set(),      // heads that are off, as 'layer.head'
  layer: 0,
  head: 0,
  headChosen: false,   // whether somebody has chosen the head
  position: null,      // the token looked from, in the context; null: the last one
  pinned: false,       // whether it stays when the pointer leaves
  writing: false,
  textError: '',       // why the text cannot be used
  settingError: '',    // why the settings cannot be used
  failure: '',         // what went wrong in the worker, such as too little memory
  seen: null,          // what there was to see last
  speed: null,         // tokens a second
  detailTime: 0,       // milliseconds that each layer's guess and the maps take
  detailed: 0,         // when they were looked at last
};

const plural = (count, noun) => `${count.toLocaleString('en')} ${noun}${count === 1 ? '' : 's'}`;
const spoken = text => ({ '\n': 'line break', ' ': 'blank', '\t': 'tab' })[text] ?? text;

// The next picture of the page; at once where the page is not to be seen.
const nextFrame = () => new Promise(resolve => {
  if (document.hidden) setTimeout(resolve);
  else requestAnimationFrame(() => resolve());
});

// ---- the text -----------------------------------------------------------------------------------

// The text was changed by hand.
async function typed() {
  stop();
  const text = $('prompt').value;
  try {
    const ids = await ask('encode', { text });
    if (text !== $('prompt').value) return;   // it has changed again
    state.ids = ids;
    state.textError = '';
  } catch (error) {
    state.textError = `${error.message} Take it out to go on.`;
  }
  state.drawn = 0;
  state.decoder = new TextDecoder('utf-8', { ignoreBOM: true });
  lookFromEnd();
}

// The part of the text that the model sees.
const context = () => state.ids.slice(-known.config.block_size);

// Add tokens at the end. bytes: theirs. An empty text goes on from what all texts begin with, which
// the text box does not show.
function append(ids, bytes) {
  if (!state.ids.length) state.ids.push(...known.opening);
  state.ids.push(...ids);
  state.drawn += ids.length;
  state.position = null;
  state.pinned = false;
  const prompt = $('prompt');
  prompt.value += state.decoder.decode(bytes, { stream: true });
  prompt.scrollTop = prompt.scrollHeight;
}

// Take a token instead of drawing one.
async function take(id) {
  stop();
  const bytes = await ask('bytes', { id });
  append([id], bytes);
  refresh();
}

// ---- writing ------------------------------------------------------------------------------------

function typedSettings() {
  const number = (id, empty) => $(id).value === '' ? empty : Number($(id).value);
  const settings = { temperature: number('temperature', 1), top_k: number('top_k', null),
                     top_p: number('top_p', null), seed: number('seed', 0) };
  checkSettings(settings);
  return settings;
}

function settingChanged() {
  state.drawn = 0;
  try {
    typedSettings();
    state.settingError = '';
  } catch (error) {
    state.settingError = error.message;
  }
  showNote();
  showControls();
}

// Write `count` tokens; with `line`, up to the next line break.
async function write(count, line = false) {
  let milliseconds = 0;
  let written = 0;
  const settings = typedSettings();
  state.writing = true;
  while (state.writing && written < count) {
    const { drawn } = state;
    const more = await ask('write', {
      ids: context(), drawn, settings, line, count: Math.min(count - written, 64),
      off: [...state.off], reader: 'page', ends: true, milliseconds: SLICE });
    if (!state.writing) break;   // the text may have changed meanwhile
    written += more.ids.length;
    milliseconds += more.milliseconds;
    state.speed = 1000 * written / milliseconds;
    append(more.ids, more.bytes);
    await refresh();
    if (more.ended) break;
  }
  stop();
  refresh();
}

function stop() {
  state.writing = false;
  showControls();
}

// ---- looking ------------------------------------------------------------------------------------

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
    // details that take long come after the rest, and while writing in a tenth of the time
    const rest = performance.now() - state.detailed;
    const soon = state.detailTime < SLICE || state.writing && rest > 10 * state.detailTime;
    try {
      const finished = await look(soon);
      if (!soon && finished && !lookAgain && !state.writing) await look(true);
      state.failure = '';
    } catch (error) {
      state.failure = error.message;
      stop();
      showNote();
    }
    await nextFrame();
  }
}

// Look once; returns whether the text was read to its end before it changed. details: also each
// layer's guess and the maps.
async function look(details) {
  for (;;) {
    const { off, position, layer, head } = state;
    const seen = await ask('look', {
      ids: context(), off: [...off], position, layer, head, details, size: MAP_TOKENS,
      milliseconds: SLICE });
    if (seen.next) {
      state.seen = { ...seen, layer, head, position, off: new Set(off) };
      if (seen.maps) {
        state.detailTime = seen.milliseconds;
        state.detailed = performance.now();
      }
      show();
      return true;
    }
    if (!state.writing) showNote(`Reading: ${seen.read} of ${plural(seen.of, known.word)}. `);
    if (lookAgain && !state.writing) return false;
  }
}

function show() {
  showNote();
  showControls();
  showFacts();
  showNext();
  if (!known.config.n_layer) return;
  showText();
  showGaze();
  showEffect();
  if (state.seen.maps) showMaps();
  if (state.seen.lens) showGuesses($('lens'), state.seen.lens);
}

// ---- notes, controls and facts ------------------------------------------------------------------

function showNote(progress = '') {
  const { ids, textError, settingError, failure } = state;
  const { block_size } = known.config;
  const wrong = textError || settingError || failure;
  let note = progress;
  if (!ids.length) note += 'The text is empty: the model begins as its texts begin.';
  if (ids.length > block_size) {
    note += `The text has ${plural(ids.length, known.word)}. The model sees the last `
      + `${block_size}, shown below. Each new ${known.word} moves all of them one place forward, `
      + `so the model has to read all ${block_size} again. That is about ${block_size} times the `
      + 'work, and the model writes more slowly now.';
  }
  $('note').textContent = wrong || note;
  $('note').classList.toggle('wrong', Boolean(wrong));
  $('prompt').setAttribute('aria-invalid', Boolean(textError));
}

function showControls() {
  const { writing, textError, settingError } = state;
  const usable = !textError && !settingError;
  for (const id of ['one', 'line']) $(id).disabled = writing || !usable;
  $('on').disabled = !writing && !usable;
  $('on').textContent = writing ? 'Stop' : 'On and on';
  $('clear').disabled = writing;
  $('gaze').setAttribute('aria-live', writing ? 'off' : 'polite');
}

function showFacts() {
  const { facts, config, dtype, word } = known;
  const parts = [`${plural(facts.parameters, 'parameter')}, the numbers that training found`];
  if (facts.dataset) {
    const steps = facts.steps ? ` in ${plural(facts.steps, 'step')}` : '';
    parts.push(`learned from ${facts.dataset}${steps}`);
  }
  if (facts.val_loss) {
    // the perplexity, in words
    const choices = Math.exp(facts.val_loss);
    const among = choices < 10 ? choices.toFixed(1) : Math.round(choices).toLocaleString('en');
    parts.push(`on a text it has not seen, it is as unsure as between ${among} equally likely `
      + `${word}s, of ${config.drawable.toLocaleString('en')} (a validation loss of `
      + `${facts.val_loss.toFixed(3)} nats)`);
  }
  parts.push(`sees the last ${plural(config.block_size, word)}`, `weights in ${dtype}`);
  if (state.speed) {
    parts.push(`writes ${state.speed.toFixed(state.speed < 10 ? 1 : 0)} ${word}s a second here`);
  }
  $('facts').textContent = parts.join(' · ') + '.';
}

// ---- what comes next ----------------------------------------------------------------------------

// The ten rows stay and their content changes, so that a click that has begun finds its button.
const nextRows = [];

function makeNextRow() {
  const row = {
    id: null, token: make('code'), share: make('span'), shareBefore: make('small'),
    before: make('span', { className: 'bar before' }), after: make('span', { className: 'bar' }),
  };
  const bars = make('span', { className: 'bars' }, row.before, row.after);
  const shares = make('span', { className: 'share' }, row.share, row.shareBefore);
  row.button = make('button', {}, row.token, bars, shares);
  row.button.addEventListener('click', () => take(row.id));
  row.item = make('li', {}, row.button);
  return row;
}

function showNext() {
  const { next, off } = state.seen;
  while (nextRows.length < next.length) {
    nextRows.push(makeNextRow());
    $('next').append(nextRows.at(-1).item);
  }
  const compared = off.size > 0;
  const widest = Math.max(0.1, ...next.map(({ share, before }) => Math.max(share, before)));
  const width = share => `${(100 * share / widest).toFixed(1)}%`;
  next.forEach(({ id, text, share, before }, i) => {
    const row = nextRows[i];
    row.id = id;
    row.token.textContent = shown(text);
    row.after.style.width = width(share);
    row.before.style.width = width(before);
    row.share.textContent = percent(share);
    row.shareBefore.textContent = percent(before);
    row.before.hidden = !compared;
    row.shareBefore.hidden = !compared;
    const label = `take ${spoken(text)}, ${percent(share)}`;
    row.button.setAttribute('aria-label', compared ? `${label}, before ${percent(before)}` : label);
  });
}

// ---- where it looks -----------------------------------------------------------------------------

const spans = [];   // one for each token that the model sees

function makeSpan(i) {
  const span = make('span', { id: `token-${i}` });
  span.setAttribute('role', 'option');
  span.addEventListener('pointerenter', ({ pointerType }) => {
    if (pointerType === 'mouse' && !state.pinned) lookFrom(i);
  });
  span.addEventListener('click', () => {
    const again = state.pinned && state.position === i;
    if (again) lookFromEnd();
    else lookFrom(i, true);
  });
  return span;
}

function showText() {
  const { texts } = state.seen;
  while (spans.length < texts.length) spans.push(makeSpan(spans.length));
  texts.forEach((text, i) => {
    const content = running(text);
    if (spans[i].textContent !== content) spans[i].textContent = content;
  });
  if ($('text').childElementCount !== texts.length) {
    $('text').replaceChildren(...spans.slice(0, texts.length));
  }
}

function lookFrom(position, pinned = false) {
  if (!state.seen || state.writing) return;
  state.position = position;
  state.pinned = pinned;
  refresh();
}

function lookFromEnd() {
  state.position = null;
  state.pinned = false;
  refresh();
}

function showGaze() {
  const { texts, gaze, layer, head, position } = state.seen;
  const at = position ?? texts.length - 1;
  texts.forEach((text, i) => {
    const strength = i <= at ? 0.8 * Math.sqrt(gaze[i]) : 0;   // small shares are visible, too
    spans[i].style.background = `rgba(var(--to), ${strength.toFixed(3)})`;
    spans[i].style.opacity = i <= at ? '' : '0.45';
    spans[i].setAttribute('aria-selected', i === at);
  });
  $('text').setAttribute('aria-activedescendant', `token-${at}`);

  const token = i => make('code', { textContent: shown(texts[i]) });
  const line = make('div', {}, 'At ', token(at), `, head ${layer}.${head} looks`);
  const most = likeliest(gaze, 4).filter((i, n) => n === 0 || gaze[i] >= 0.01);
  most.forEach((i, n) => {
    const where = at === i ? '(itself)' : `(${at - i} back)`;
    line.append(n ? ', ' : ' ', `${percent(gaze[i])} at `, token(i), ` ${where}`);
  });
  const isOff = state.seen.off.has(`${layer}.${head}`);
  line.append(isOff ? '. It is switched off: what it finds is not used.' : '.');
  $('gaze').replaceChildren(line);
}

function pickHead(layer, head) {
  state.layer = layer;
  state.head = head;
  state.headChosen = true;
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

function keyOnText(event) {
  const moves = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
  const turns = { ArrowUp: -1, ArrowDown: 1 };
  if (!state.seen) return;
  if (event.key in moves) {
    const last = state.seen.texts.length - 1;
    const at = Math.max(0, Math.min(last, (state.position ?? last) + moves[event.key]));
    if (at === last) lookFromEnd();
    else lookFrom(at, true);
    spans[at].scrollIntoView({ block: 'nearest' });
  } else if (event.key in turns) {
    const { n_layer, n_head } = known.config;
    const heads = n_layer * n_head;
    const at = (state.layer * n_head + state.head + turns[event.key] + heads) % heads;
    pickHead(Math.floor(at / n_head), at % n_head);
  } else return;
  event.preventDefault();
}

// ---- every head, with a switch ------------------------------------------------------------------

function makeMaps() {
  const { n_layer, n_head } = known.config;
  const least = n_head > 8 ? '2.9rem' : '4.2rem';
  if (n_head > 8) $('maps').closest('section').style.flexBasis = '100%';
  $('maps').style.gridTemplateColumns = `repeat(${n_head}, minmax(${least}, 7.5rem))`;
  for (let layer = 0; layer < n_layer; layer++) {
    $('layer').append(make('option', { value: layer, textContent: layer }));
    for (let head = 0; head < n_head; head++) $('maps').append(makeMap(layer, head));
  }
  for (let head = 0; head < n_head; head++) {
    $('head').append(make('option', { value: head, textContent: head }));
  }
}

function makeMap(layer, head) {
  const name = `${layer}.${head}`;
  const button = make('button', {}, make('canvas', { width: 1, height: 1 }));
  button.dataset.at = name;
  button.setAttribute('aria-label', `show where layer ${layer}, head ${head} looks`);
  button.addEventListener('click', () => pickHead(layer, head));
  const box = make('input', { type: 'checkbox', checked: true });
  box.setAttribute('aria-label', `head ${name} is on`);
  box.addEventListener('change', () => {
    if (box.checked) state.off.delete(name);
    else state.off.add(name);
    switched();
  });
  return make('div', {}, button, make('label', {}, box, name));
}

// Some head was switched on or off.
function switched() {
  for (const cell of $('maps').children) {
    const off = state.off.has(cell.querySelector('button').dataset.at);
    cell.classList.toggle('off', off);
    cell.querySelector('input').checked = !off;
  }
  $('all-on').disabled = !state.off.size;
  $('compared').hidden = !state.off.size;
  $('without').textContent = `without head ${[...state.off].join(', ')}`;
  refresh();
}

function showMaps() {
  const { maps, of } = state.seen;
  const n = Math.min(MAP_TOKENS, of);
  const canvases = $('maps').querySelectorAll('canvas');
  maps.forEach((map, i) => paint(canvases[i], n, (row, column) => map[row * n + column] / 255));
  if (!state.headChosen && n > 1) pickClearest(maps, n);
}

// Choose the head that looks at single tokens the most: of all heads it is the easiest to
// understand.
function pickClearest(maps, n) {
  const clearness = maps.map(map => {
    let sum = 0;
    for (let i = 1; i < n; i++) sum += Math.max(...map.subarray(i * n, (i + 1) * n));
    return sum;
  });
  const [best] = likeliest(clearness, 1);
  const { n_head } = known.config;
  pickHead(Math.floor(best / n_head), best % n_head);
}

// What the heads that are off change, beside the switches: on a phone the bars are far above.
function showEffect() {
  const { next, nextBefore, off } = state.seen;
  const listed = guesses => guesses.flatMap(({ text, share }, i) => {
    const token = make('code', { textContent: shown(text) });
    return [i ? ', ' : ' ', make('span', { className: 'whole' }, token, ` ${percent(share)}`)];
  });
  const parts = ['With all heads:', ...listed(nextBefore), `. Without ${[...off].join(', ')}:`,
                 ...listed(next.slice(0, 3)), '.'];
  $('effect').replaceChildren(...off.size ? parts : []);
}

// ---- the beginning ------------------------------------------------------------------------------

// A token's name, and what it is.
const KINDS = {
  char: ['character', 'A token is a character here.'],
  byte: ['byte', 'A token is a byte here: a letter of English is one, of other languages several.'],
  bpe: ['token', 'A token is a short word here, or a part of a longer one.'],
  gpt2: ['token', 'A token is a short word here, or a part of a longer one.'],
};

function showWords() {
  const [word, sentence] = KINDS[known.facts.tokenizer];
  known.word = word;
  $('kind').textContent = sentence;
  for (const span of document.querySelectorAll('.token-word')) span.textContent = word;
}

function connect() {
  $('prompt').addEventListener('input', typed);
  $('one').addEventListener('click', () => write(1));
  $('line').addEventListener('click', () => write(LINE_TOKENS, true));
  $('on').addEventListener('click', () => state.writing ? stop() : write(Infinity));
  $('clear').addEventListener('click', () => {
    $('prompt').value = '';
    $('prompt').focus();
    typed();
  });
  for (const id of ['temperature', 'top_k', 'top_p', 'seed']) {
    $(id).addEventListener('input', settingChanged);
  }
  $('layer').addEventListener('change', () => pickHead(Number($('layer').value), state.head));
  $('head').addEventListener('change', () => pickHead(state.layer, Number($('head').value)));
  $('text').addEventListener('keydown', keyOnText);
  $('text').addEventListener('pointerleave', ({ pointerType }) => {
    if (pointerType === 'mouse' && !state.pinned && state.position !== null) lookFromEnd();
  });
  $('all-on').addEventListener('click', () => {
    state.off.clear();
    switched();
  });
  addEventListener('keydown', ({ key }) => {
    if (key === 'Escape') stop();
  });
}

function begin() {
  showWords();
  makeMaps();
  showHead();
  connect();
  $('facts').removeAttribute('role');   // a screen reader need not say each new speed
  $('inside').hidden = !known.config.n_layer;
  $('try-heads').hidden = !known.config.n_layer;
  $('all').hidden = false;
  if (known.facts.parameters > LARGE) state.detailTime = 1000;   // a guess, until it is measured
  showFacts();
  $('prompt').value = known.facts.start;
  typed();
}

ready.then(begin).catch(error => {
  $('facts').textContent = error.message;
  $('facts').classList.add('wrong');
});
