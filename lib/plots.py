"""
Pictures: of a run's log, of benchmarks, and of what analyze.py finds.

matplotlib is imported where a picture is drawn: training goes on without it.
"""
import contextlib
import math
import re
import warnings

from lib.console import say
from lib.run_folder import read_log


@contextlib.contextmanager
def picture(path, rows=1, columns=1, **settings):
    """Yield a new figure and its panels (rows, columns), and write the figure to path as a PNG.

    settings: further arguments of plt.subplots. Raises ImportError without matplotlib, and OSError
    for a path that cannot be written."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    with plt.rc_context({'text.parse_math': False}), warnings.catch_warnings():   # names may hold $
        # a character that the font lacks is drawn as a box
        warnings.filterwarnings('ignore', 'Glyph .* missing from font')
        figure, panels = plt.subplots(rows, columns, squeeze=False, **settings)
        try:
            yield figure, panels
            figure.savefig(path, dpi=110, bbox_inches='tight')
        finally:
            plt.close(figure)


# ---- a run's log ---------------------------------------------------------------------------------

def losses(log_path, path, title):
    """Draw both losses of a log.csv (nats per token) against the tokens trained on.

    A picture is not worth a run: what goes wrong is said, and nothing is drawn."""
    try:
        with picture(path, figsize=(7, 4.5)) as (_, panels):
            axes = panels[0, 0]
            draw_loss(axes, log_path, 'train_loss', lw=0.8, alpha=0.6)
            draw_loss(axes, log_path, 'val_loss', lw=1.6, marker='o', ms=3)
            axes.set(xlabel='tokens trained on', ylabel='loss (nats per token)', title=title)
            axes.grid(alpha=0.3)
            if axes.lines:
                axes.legend()
    except ImportError:
        pass
    except (KeyError, ValueError, OverflowError) as error:   # somebody has edited the log
        say(f'no {path} from this {log_path} ({error})')
    except OSError as error:
        say(f'{path} could not be written ({error.strerror})')


def draw_loss(axes, log_path, column, **style):
    """Draw one of a log's losses, where the log has any."""
    tokens = []
    values = []
    for row in read_log(log_path):
        if row[column]:
            tokens.append(float(int(row['tokens'])))
            values.append(float(row[column]))
    if values:
        label = f'{column.removesuffix("_loss")}, last {values[-1]:.4f}'
        axes.plot(tokens, values, label=label, **style)


# ---- bench.py train --growth ---------------------------------------------------------------------

def growth(rows, path):
    """Draw milliseconds a step and peak memory, a column of panels for each quantity that grows.

    rows: bench.py's, whose `growth` names that quantity. Where the picture cannot be drawn, the
    reason is said."""
    points_of = {}   # quantity: its rows
    for row in rows:
        points_of.setdefault(row['growth'], []).append(row)
    columns = len(points_of)
    try:
        with picture(path, 2, columns, figsize=(4 * columns, 6), sharex='col') as (figure, panels):
            for (quantity, points), (above, below) in zip(points_of.items(), panels.T):
                draw_growth(above, points, quantity, 'step_ms', 'ms a step')
                draw_growth(below, points, quantity, 'peak_memory_mb', 'peak memory, MB')
                below.set(xlabel=quantity)
                above.set_title(what_stays(points[0], quantity), fontsize=9)
            figure.tight_layout()
    except ImportError:
        say(f'no {path}: matplotlib is missing; type pip install -r requirements.txt')
    except OSError as error:
        say(f'{path} could not be written ({error.strerror})')


def draw_growth(axes, points, quantity, figure_of, label):
    """Draw one figure of the rows, from zero, against the quantity that grows."""
    x = [row[quantity] for row in points]
    axes.plot(x, [row[figure_of] for row in points], marker='o', ms=3)
    axes.set(ylabel=label, ylim=(0, None))
    axes.grid(alpha=0.3)


def what_stays(row, quantity):
    """Return in words what is the same in all measurements of a quantity's growth."""
    if quantity == 'batch':
        return f'{row["n_layer"]} layers, context {row["context"]}'
    batch = f'{row["batch"]} x {row["context"]} tokens'
    if quantity == 'context':   # the batch shrinks: the number of tokens in a step is the same
        return f'{batch} a step'
    return batch


# ---- what analyze.py finds -----------------------------------------------------------------------

def attention(weights, path, title):
    """Draw every head's weights (L, nh, T, T) as a small map, a row of maps for each layer."""
    L, nh = weights.shape[:2]
    size = (max(5, 1.1 * nh), max(2, 1.2 * L) + 0.6)   # inches
    with picture(path, L, nh, figsize=size) as (figure, panels):
        for layer, row in enumerate(panels):
            for head, axes in enumerate(row):
                draw_weights(axes, weights[layer, head], 'antialiased')
                axes.set(xticks=[], yticks=[])
                axes.set_title(f'{layer}.{head}', fontsize=7, pad=2)
        explained = 'layer.head; rows are queries, columns keys; square roots of the weights'
        figure.suptitle(f'{title}: {explained}', fontsize=8)


def draw_weights(axes, weights, interpolation):
    """Draw one head's weights (T, T). Their square roots also show weights far below 1."""
    axes.imshow(weights ** 0.5, vmin=0, vmax=1, interpolation=interpolation)


def shown(word):
    """Return a token as text in one line, with visible blanks."""
    return repr(word)[1:-1].replace(' ', '␣')


def one_head(weights, words, path, title):
    """Draw one head's weights (T, T), with the text of its tokens along both axes."""
    T = len(words)
    labels = [shown(word) for word in words]
    side = max(4, min(40, 0.15 * T + 1.5))   # inches
    with picture(path, figsize=(side, side)) as (_, ((axes,),)):
        draw_weights(axes, weights, 'nearest')
        axes.set_xticks(range(T), labels, rotation=90, fontsize=6)
        axes.set_yticks(range(T), labels, fontsize=6)
        axes.set_title(f'{title}: rows are queries, columns keys', fontsize=9)


def depth_scan(rows, path, title):
    """Draw six measures of all heads as maps, with a row for each layer.

    rows: dicts with layer, head and inside.scan's measures, in the order of layers and heads."""
    measures = dict(
        entropy_share='entropy, share of the maximum', distance='distance in tokens',
        diagonal='on the token itself', previous='on the previous token',
        first='on the first token', stripe='on the most attended token')
    L = rows[-1]['layer'] + 1
    nh = rows[-1]['head'] + 1
    with picture(path, 2, 3, figsize=(12, 2.5 + 0.6 * L)) as (figure, panels):
        for axes, (key, name) in zip(panels.flat, measures.items()):
            values = [row[key] for row in rows]
            layers = [values[i * nh:(i + 1) * nh] for i in range(L)]
            largest = None if key == 'distance' else 1
            image = axes.imshow(layers, vmin=0, vmax=largest, aspect='auto')
            figure.colorbar(image, ax=axes)
            axes.set(title=name, xlabel='head', ylabel='layer',
                     xticks=range(0, nh, 1 + nh // 16), yticks=range(0, L, 1 + L // 16))
        figure.suptitle(title, fontsize=10)
        figure.tight_layout()


def head_ablation(rows, path, title):
    """Draw the change in loss without each head (nats) as bars, the largest 60 in order.

    rows: dicts with layer, head, change, and the bounds of its interval, change_low and
    change_high. The bounds are None where there is no interval."""
    rows = sorted(rows, key=lambda row: -row['change'])[:60]
    names = [f'{row["layer"]}.{row["head"]}' for row in rows]
    size = (max(5, 0.22 * len(rows) + 1.5), 4)   # inches
    with picture(path, figsize=size) as (_, ((axes,),)):
        axes.bar(range(len(rows)), [row['change'] for row in rows], alpha=0.6)
        for i, row in enumerate(rows):
            if row['change_low'] is not None:
                bounds = [row['change_low'], row['change_high']]
                axes.plot([i, i], bounds, color='black', lw=0.8)
        axes.set_xticks(range(len(rows)), names, rotation=90, fontsize=7)
        axes.axhline(0, color='black', lw=0.6)
        axes.set(xlabel='layer.head', ylabel='change in loss without the head (nats)')
        axes.set_title(title, fontsize=9)


LINE = 110        # characters in a line of a text that is drawn
LETTER = 0.0665   # inches that one of them takes
LEADING = 0.19    # inches from line to line


def text_losses(tokens, worst, by_position, path, title):
    """Draw a text with each token's loss as its colour, a list of lines, and the loss by position.

    tokens: [(text, nats or None)]. worst: lines of text. by_position: nats."""
    cells, lines = typeset(tokens)
    heights = [LEADING * lines, LEADING * (len(worst) + 1), 2.2]   # inches
    size = (LETTER * LINE, sum(heights) + 1.0)
    with picture(path, 3, 1, figsize=size, height_ratios=heights) as (figure, panels):
        (text,), (table,), (curve,) = panels
        figure.subplots_adjust(left=0, right=1)
        draw_cells(text, cells)
        text.set(xlim=(0, LINE), ylim=(0.4 - lines, 0.6),
                 title=f'{title}: the redder, the higher the loss')
        for i, line in enumerate(worst):
            if len(line) > LINE:
                line = line[:LINE - 1] + '…'
            draw_line(table, 0, -i, line)
        table.set(xlim=(0, LINE), ylim=(-len(worst), 0.6))
        text.axis('off')
        table.axis('off')
        curve.plot(range(1, len(by_position) + 1), by_position)
        curve.set(xlabel='position in the context', ylabel='nats', ylim=(0, None))
        curve.grid(alpha=0.3)


def typeset(tokens):
    """Return the place of each token in lines of LINE characters, and the number of lines.

    tokens: [(text, nats or None)]. The places are [(line, column, printable text, nats)]. A token
    with line breaks has several."""
    cells = []
    line = 0
    column = 0
    for text, nats in tokens:
        for part in re.split('(?<=\n)', text):
            if column and column + len(part) > LINE:
                line += 1
                column = 0
            cells.append((line, column, printable(part), nats))
            column += len(part)
            if part.endswith('\n'):
                line += 1
                column = 0
    return cells, line + 1


def printable(text):
    """Return a text with a sign for each character that a picture cannot show."""
    signs = []
    for character in text:
        if character == '\n':
            character = '⏎'
        elif not character.isprintable():
            character = '·'
        signs.append(character)
    return ''.join(signs)


def draw_cells(axes, cells):
    """Draw typeset's places, the redder, the higher the loss."""
    from matplotlib.patches import Rectangle
    for line, column, text, nats in cells:
        if nats is not None:
            axes.add_patch(Rectangle((column, -line - 0.5), len(text), 1, color='tab:red',
                                     alpha=min(0.8, nats / 8), lw=0))
        draw_line(axes, column, -line, text)


def draw_line(axes, x, y, text):
    axes.text(x, y, text, family='monospace', fontsize=7.7, va='center')


def embeddings(points, shares, neighbours, similar, path):
    """Draw token embeddings in two dimensions, nearest neighbours, and cosines of positions.

    points: [(text of a token, x, y)], the first two principal components. shares: of the variance,
    one for each. neighbours: [(text of a token, [(text of another, cosine)])]. similar: cosines of
    position embeddings (n, n), or None."""
    columns = 2 if similar is None else 3
    with picture(path, 1, columns, figsize=(6 * columns, 5.5)) as (figure, panels):
        plane, table, *others = panels[0]
        for word, x, y in points:
            plane.text(x, y, shown(word), fontsize=8, ha='center', va='center')
        plane.update_datalim([(x, y) for _, x, y in points])
        plane.autoscale_view()
        plane.set(xlabel=f'first principal component, {shares[0]:.0%} of the variance',
                  ylabel=f'second principal component, {shares[1]:.0%} of the variance')
        for i, (word, near) in enumerate(neighbours):
            listed = ', '.join(f'{shown(other)} {cosine:.2f}' for other, cosine in near[:4])
            table.text(0, -i, f'{shown(word):>12}: {listed}', family='monospace', fontsize=7.5)
        table.set(xlim=(0, 1), ylim=(-len(neighbours), 1), title='nearest neighbours, by cosine')
        table.axis('off')
        for axes in others:
            image = axes.imshow(similar, vmin=-1, vmax=1, cmap='coolwarm')
            figure.colorbar(image, ax=axes)
            axes.set(title='cosine of position embeddings', xlabel='position', ylabel='position')


def gradients(rows, path, title):
    """Draw the norms of each layer's weights and gradients, on a logarithmic scale.

    rows: dicts with layer, weight and gradient."""
    size = (max(6, 0.3 * len(rows) + 1), 4)   # inches
    with picture(path, figsize=size) as (_, ((axes,),)):
        for key in ('weight', 'gradient'):
            norms = [row[key] or math.nan for row in rows]   # a logarithm has no place for 0
            axes.plot(range(len(rows)), norms, marker='o', ms=3, lw=0.8, label=f'{key} norm')
        names = [row['layer'] for row in rows]
        axes.set_xticks(range(len(rows)), names, rotation=90, fontsize=7)
        axes.set(yscale='log', title=title)
        axes.yaxis.set_major_formatter('{x:g}')
        axes.yaxis.set_minor_formatter('')
        axes.grid(alpha=0.3)
        axes.legend()


# ---- studies -------------------------------------------------------------------------------------

def study(rows, path, title, unit):
    """Draw the validation losses of a study's variants during training, and their last losses.

    The curves are means over seeds, with bands from the lowest to the highest. rows: dicts with
    name, mean of the last losses, half of its 95 % interval (None: one run), and logs, one for each
    seed: [[tokens, training loss, validation loss], ...]. unit: of the last losses."""
    with picture(path, 1, 2, figsize=(12, 4.5)) as (figure, ((curves, last),)):
        for i, row in enumerate(rows):
            color = f'C{i % 10}'
            points = losses_by_tokens(row['logs'])
            if points:
                lowest = [min(values) for values in points.values()]
                highest = [max(values) for values in points.values()]
                means = [sum(values) / len(values) for values in points.values()]
                curves.plot(list(points), means, color=color, label=row['name'])
                curves.fill_between(list(points), lowest, highest, color=color, alpha=0.2, lw=0)
            last.errorbar([row['mean']], [i], xerr=[row['half'] or 0], fmt='o', ms=4, capsize=3,
                          color=color)
        curves.set(xlabel='tokens trained on', title=title,
                   ylabel='validation loss on a sample (nats per token)')
        last.set_yticks(range(len(rows)), [row['name'] for row in rows])
        last.invert_yaxis()
        last.set(xlabel=f'last loss, whole split ({unit}), 95 % intervals')
        for axes in (curves, last):
            axes.grid(alpha=0.3)
        if curves.lines:
            curves.legend(fontsize=8)
        figure.tight_layout()


def gradients_by_depth(entries, path):
    """Draw the norm of the gradient by block, a panel for each step.

    entries: dicts with variant, step, and norms of the blocks' gradients from the first block."""
    steps = sorted({entry['step'] for entry in entries})
    variants = list(dict.fromkeys(entry['variant'] for entry in entries))
    size = (4 * len(steps), 4)   # inches
    with picture(path, 1, len(steps), figsize=size, sharey=True) as (figure, (panels,)):
        for axes, step in zip(panels, steps):
            for entry in entries:
                if entry['step'] == step:
                    norms = [norm or math.nan for norm in entry['norms']]   # log 0 has no place
                    axes.plot(range(len(norms)), norms, marker='o', ms=3,
                              color=f'C{variants.index(entry["variant"]) % 10}',
                              label=entry['variant'])
            axes.set(yscale='log', xlabel='block', title=f'after {step} steps')
            axes.grid(alpha=0.3)
        panels[0].set_ylabel("norm of the gradient of the block's weights")
        panels[0].yaxis.set_major_formatter('{x:.0e}')
        panels[0].legend(fontsize=8)
        figure.tight_layout()


def losses_by_tokens(logs):
    """Return {tokens trained on: validation losses of the seeds} for the evaluations on the way.

    A log's last loss is left out: it is of the whole split. The loss before training is left out
    too: it is near ln V for every variant, and the curves would be flat beside it."""
    points = {}
    for log in logs:
        for tokens, _, loss in log[:-1]:
            if tokens and loss is not None:
                points.setdefault(tokens, []).append(loss)
    return points
