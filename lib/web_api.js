'use strict';
/*
The page's end of the worker, and window.gpt for other programs:

    await gpt.generate(await gpt.encode('To be'), 20, {temperature: 0})

works in the browser's console. Where no worker can be made, requests are answered in the page.
*/

const waiting = new Map();   // number of a request -> its Promise's resolve and reject
let requested = 0;
let worker = null;           // null where no worker can be made
let known = null;            // what the request `open` returns: config, facts, dtype, opening
const SLICE = 40;            // milliseconds of work after which other requests get their turn

// Ask for one of `requests` in web_worker.js; returns a Promise of its value.
function ask(name, data = {}) {
  return new Promise((resolve, reject) => {
    requested += 1;
    const number = requested;
    waiting.set(number, { resolve, reject });
    if (worker) worker.postMessage({ number, name, data });
    else setTimeout(() => settle({ number, ...answer(name, data) }));   // the page is drawn first
  });
}

function settle({ number, value, error }) {
  const { resolve, reject } = waiting.get(number);
  waiting.delete(number);
  if (error === undefined) resolve(value);
  else reject(new Error(error));
}

// Return a worker made from the model's scripts, or null: some browsers allow no worker to a page
// that is opened as a file.
function startWorker() {
  return new Promise(resolve => {
    try {
      const scripts = [...document.querySelectorAll('script.model')];
      const program = scripts.map(script => script.textContent);
      const blob = new Blob(program, { type: 'text/javascript' });
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

// ---- the beginning: the model's data go from the page to the worker -----------------------------

async function load() {
  worker = await startWorker();
  const textOf = id => {
    if (!$(id)) throw new Error(`This page is damaged: its end is missing. ${AGAIN}`);
    return $(id).textContent;
  };
  const data = { description: textOf('description'), checksum: textOf('checksum'),
                 weights: textOf('weights') };
  $('weights').remove();   // in the page they would take their memory a second time
  known = await ask('open', data);
}

const parsed = new Promise(resolve => {
  if (document.readyState === 'loading') addEventListener('DOMContentLoaded', resolve);
  else resolve();
});
const ready = parsed.then(load);

// ---- window.gpt ---------------------------------------------------------------------------------

// One call after another: two at the same time would take turns at reading their texts anew.
let lastCall = ready;
function inTurn(task) {
  const call = lastCall.then(task);
  lastCall = call.catch(() => {});
  return ready.then(() => call);
}

window.gpt = {
  ready,
  encode: text => inTurn(() => ask('encode', { text })),
  decode: ids => inTurn(() => ask('decode', { ids: Array.from(ids) })),
  logits: ids => inTurn(() => ask('logits', { ids: Array.from(ids) })),
  attention: ids => inTurn(() => ask('attention', { ids: Array.from(ids) })),
  generate: (ids, count, settings = {}) =>
    inTurn(() => generate(Array.from(ids), count, settings)),
};

// Return the new ids. Between slices of the work, the page's own requests get their turn.
async function generate(ids, count, settings) {
  checkSettings(settings);
  const { temperature = 1, top_k, top_p, seed = Math.floor(Math.random() * 2 ** 32) } = settings;
  const fresh = [];
  let context = ids.length ? ids : known.opening;
  while (fresh.length < count) {
    const { ids: more } = await ask('write', {
      ids: context, count: count - fresh.length, drawn: fresh.length, reader: 'program',
      settings: { temperature, top_k, top_p, seed }, milliseconds: SLICE });
    fresh.push(...more);
    context = [...context, ...more].slice(-known.config.block_size);
  }
  return fresh;
}

// Throw for a setting that means nothing, as check_sampling in model.py does.
function checkSettings({ temperature = 1, top_k = null, top_p = null, seed = 0 }) {
  const require = (good, name, value, allowed) => {
    if (!good) throw new RangeError(`${name} is ${value}; allowed is ${allowed}.`);
  };
  const whole = Number.isInteger;
  require(temperature >= 0, 'Temperature', temperature, 'a number from 0');
  require(top_k === null || whole(top_k) && top_k >= 1, 'Top-k', top_k,
          'a whole number from 1, or nothing');
  require(top_p === null || top_p > 0 && top_p <= 1, 'Top-p', top_p,
          'a number above 0, up to 1, or nothing');
  require(Number.isSafeInteger(seed) && seed >= 0, 'Seed', seed, 'a whole number from 0');
}
