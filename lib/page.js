'use strict';
// What the pages share: analyze.py's report.html and export_web.py's web.html.

const $ = id => document.getElementById(id);

// Returns a new element with properties and children, which may be texts.
const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};

const percent = share => `${(100 * share).toFixed(share >= 0.0995 ? 0 : 1)} %`;

// A token's text with its white space made visible.
const shown = text => {
  const visible = text.replaceAll('\n', '⏎').replaceAll('\t', '⇥').replaceAll(' ', '␣');
  return visible || '∅';
};

// A token's text in a running text: line breaks stay, and lone white space is made visible.
const running = text => {
  if (text === '\n') return '⏎\n';
  return text.trim() ? text : shown(text).replaceAll('⏎', '⏎\n');
};

// Paint n·n values from 0 to 1, value(row, column), in roughly viridis' colours: dark blue, green,
// yellow.
function paint(canvas, n, value) {
  canvas.width = canvas.height = n;
  const context = canvas.getContext('2d');
  const image = context.createImageData(n, n);
  for (let i = 0; i < n; i++) {
    for (let j = 0; j < n; j++) {
      const v = Math.max(0, Math.min(1, value(i, j)));
      const at = 4 * (i * n + j);
      image.data[at] = 255 * (0.27 + v * (-0.95 + 1.67 * v));
      image.data[at + 1] = 255 * (0.02 + 1.02 * v - 0.14 * v * v);
      image.data[at + 2] = 255 * (0.33 + v * (1.1 - 1.3 * v));
      image.data[at + 3] = 255;
    }
  }
  context.putImageData(image, 0, 0);
}

// Fill a table with what each layer would guess: a row before the first layer, and one after each.
// guesses: [{text, share}] for each row.
function showGuesses(table, guesses) {
  const title = text => make('th', { className: 'text', textContent: text });
  const rows = guesses.map((row, i) => {
    const cells = row.map(({ text, share }) => {
      const bar = make('span', { className: 'bar', style: `width: ${(3 * share).toFixed(2)}em` });
      const token = make('code', { textContent: shown(text) });
      return make('td', { className: 'text' }, token, bar, percent(share));
    });
    return make('tr', {}, title(i ? `after layer ${i - 1}` : 'before layer 0'), ...cells);
  });
  const titles = ['', 'likeliest', 'second', 'third'].map(title);
  table.replaceChildren(make('tr', {}, ...titles), ...rows);
}
