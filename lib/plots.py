"""
Pictures: of a run's log, of benchmarks, and of what analyze.py finds.

matplotlib is imported where a picture is drawn: training goes on without it.
"""
import contextlib
import math
import re
import warnings

from lib.checkpoint import read_log
from lib.console import say


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


# ---- what analyze.py finds -------------------------------------------------------------------------------------------

def attention(weights, path, title):
    """Every head's weights (L, nh, T, T) as a small map: layers down, heads across."""
    L, nh = weights.shape[:2]
    with picture(path, L, nh, figsize=(max(5, 1.1 * nh), max(2, 1.2 * L) + 0.6)) as (figure, panels):
        for layer, row in enumerate(panels):
            for head, axes in enumerate(row):
                axes.imshow(weights[layer, head] ** 0.5, vmin=0, vmax=1, interpolation='antialiased')
                axes.set(xticks=[], yticks=[])
                axes.set_title(f'{layer}.{head}', fontsize=7, pad=2)
        figure.suptitle(f'{title}: layer.head, queries down, keys across, square roots of the weights', fontsize=8)


def shown(word):
    """A token in one line, with its blanks."""
    return repr(word)[1:-1].replace(' ', '␣')


def one_head(weights, words, path, title):
    """One head's weights (T, T) in full, with its tokens."""
    T, words = len(words), [shown(word) for word in words]
    with picture(path, figsize=[max(4, min(40, 0.15 * T + 1.5))] * 2) as (_, ((axes,),)):
        axes.imshow(weights ** 0.5, vmin=0, vmax=1, interpolation='nearest')
        axes.set_xticks(range(T), words, rotation=90, fontsize=6)
        axes.set_yticks(range(T), words, fontsize=6)
        axes.set_title(f'{title}: queries down, keys across', fontsize=9)


def depth_scan(rows, path, title):
    """Measures of all heads as maps, layers down and heads across; rows: dicts with layer, head and the measures."""
    measures = dict(entropy_share='entropy, of its most', distance='tokens looked back', diagonal='on itself',
                    previous='on the token before', first='on the first token', stripe='on the most attended column')
    L, nh = rows[-1]['layer'] + 1, rows[-1]['head'] + 1
    with picture(path, 2, 3, figsize=(12, 2.5 + 0.6 * L)) as (figure, panels):
        for axes, (key, name) in zip(panels.flat, measures.items()):
            values = [[row[key] for row in rows[i * nh:(i + 1) * nh]] for i in range(L)]
            image = axes.imshow(values, vmin=0, vmax=None if key == 'distance' else 1, aspect='auto')
            figure.colorbar(image, ax=axes)
            axes.set(title=name, xlabel='head', ylabel='layer', xticks=range(0, nh, 1 + nh // 16),
                     yticks=range(0, L, 1 + L // 16))
        figure.suptitle(title, fontsize=10)
        figure.tight_layout()


def head_ablation(rows, path, title):
    """The loss without each head, less the loss with it (nats): bars with their intervals, the largest first, 60 at most."""
    rows = sorted(rows, key=lambda row: -row['change'])[:60]
    with picture(path, figsize=(max(5, 0.22 * len(rows) + 1.5), 4)) as (_, ((axes,),)):
        axes.bar(range(len(rows)), [row['change'] for row in rows], alpha=0.6)
        for i, row in enumerate(rows):
            if row['change_low'] is not None:
                axes.plot([i, i], [row['change_low'], row['change_high']], color='black', lw=0.8)
        axes.set_xticks(range(len(rows)), [f'{row["layer"]}.{row["head"]}' for row in rows], rotation=90, fontsize=7)
        axes.axhline(0, color='black', lw=0.6)
        axes.set(xlabel='layer.head', ylabel='loss without it, less loss (nats)')
        axes.set_title(title, fontsize=9)


def text_losses(words, nats, worst, by_position, path, title):
    """A text as lines of tokens coloured by loss; what was expected where it is worst; loss by position in the context.

    words: of T tokens; nats: of all but the first; worst: lines of text; by_position: nats."""
    from matplotlib.patches import Rectangle
    across, cells, line, column = 110, [], 0, 0
    for word, loss in zip(words, [None, *nats]):
        for part in re.split('(?<=\n)', word):
            if column and column + len(part) > across:
                line, column = line + 1, 0
            cells.append((line, column, ''.join(c if c.isprintable() else '⏎' if c == '\n' else '·' for c in part), loss))
            line, column = (line + 1, 0) if part.endswith('\n') else (line, column + len(part))
    heights = [0.19 * (line + 1), 0.19 * (len(worst) + 1), 2.2]   # inches
    size = (across * 0.0665, sum(heights) + 1.0)   # of a character of the text
    with picture(path, 3, 1, figsize=size, height_ratios=heights) as (figure, ((text,), (table,), (axes,))):
        figure.subplots_adjust(left=0, right=1)
        style = dict(family='monospace', fontsize=7.7, va='center')
        for i, j, part, loss in cells:
            if loss is not None:
                text.add_patch(Rectangle((j, -i - 0.5), len(part), 1, color='tab:red', alpha=min(0.8, loss / 8), lw=0))
            text.text(j, -i, part, **style)
        text.set(xlim=(0, across), ylim=(-line - 0.6, 0.6), title=f'{title}: the redder, the higher the loss')
        for i, said in enumerate(worst):
            table.text(0, -i, said if len(said) <= across else said[:across - 1] + '…', **style)
        table.set(xlim=(0, across), ylim=(-len(worst), 0.6))
        for panel in (text, table):
            panel.axis('off')
        axes.plot(range(1, len(by_position) + 1), by_position)
        axes.set(xlabel='position in the context', ylabel='nats', ylim=(0, None))
        axes.grid(alpha=0.3)


def embeddings(points, words, shares, neighbours, similar, path):
    """Tokens at their embeddings' first two principal components; the nearest neighbours of some, [(token, [(token, cosine)])];
    the cosines of position embeddings (n, n), or None."""
    columns = 2 if similar is None else 3
    with picture(path, 1, columns, figsize=(6 * columns, 5.5)) as (figure, ((axes, table, *rest),)):
        for (x, y), word in zip(points, words):
            axes.text(x, y, shown(word), fontsize=8, ha='center', va='center')
        axes.update_datalim(points)
        axes.autoscale_view()
        axes.set(xlabel=f'first principal component, {shares[0]:.0%} of the variance', ylabel=f'second, {shares[1]:.0%}')
        for i, (word, near) in enumerate(neighbours):
            line = ', '.join(f'{shown(other)} {cosine:.2f}' for other, cosine in near[:4])
            table.text(0, -i, f'{shown(word):>12}: {line}', family='monospace', fontsize=7.5)
        table.set(xlim=(0, 1), ylim=(-len(neighbours), 1), title='nearest neighbours, by cosine')
        table.axis('off')
        for axes in rest:
            figure.colorbar(axes.imshow(similar, vmin=-1, vmax=1, cmap='coolwarm'), ax=axes)
            axes.set(title='cosine of position embeddings', xlabel='position', ylabel='position')


def gradients(rows, path, title):
    """Norms of weights and gradients a layer, logarithmic; rows: dicts with layer, weight and gradient."""
    with picture(path, figsize=(max(6, 0.3 * len(rows) + 1), 4)) as (_, ((axes,),)):
        for key in ('weight', 'gradient'):
            axes.plot(range(len(rows)), [row[key] or math.nan for row in rows], marker='o', ms=3, lw=0.8, label=f'{key} norm')
        axes.set_xticks(range(len(rows)), [row['layer'] for row in rows], rotation=90, fontsize=7)
        axes.set(yscale='log', title=title)
        axes.yaxis.set_major_formatter('{x:g}')
        axes.yaxis.set_minor_formatter('')
        axes.grid(alpha=0.3)
        axes.legend()


# ---- studies ---------------------------------------------------------------------------------------------------------------

def study(rows, path, title, unit):
    """Validation losses on the way, means over seeds with bands from lowest to highest; the last ones with 95 % intervals.

    rows: dicts with name, mean and half of its interval (None: one run), logs: [[tokens, training, validation loss], ...]."""
    with picture(path, 1, 2, figsize=(12, 4.5)) as (figure, ((curves, last),)):
        for i, row in enumerate(rows):
            points = {}
            for log in row['logs']:
                for tokens, _, loss in log[:-1]:   # the last one is of the whole split, and on the right
                    if tokens and loss is not None:   # all begin at ln V, which would flatten the rest
                        points.setdefault(tokens, []).append(loss)
            if points:
                means = [sum(losses) / len(losses) for losses in points.values()]
                curves.plot(list(points), means, color=f'C{i % 10}', label=row['name'])
                curves.fill_between(list(points), [min(losses) for losses in points.values()],
                                    [max(losses) for losses in points.values()], color=f'C{i % 10}', alpha=0.2, lw=0)
            last.errorbar([row['mean']], [i], xerr=[row['half'] or 0], fmt='o', ms=4, capsize=3, color=f'C{i % 10}')
        curves.set(xlabel='tokens trained on', ylabel='validation loss on a sample (nats per token)', title=title)
        last.set_yticks(range(len(rows)), [row['name'] for row in rows])
        last.invert_yaxis()
        last.set(xlabel=f'last loss, whole split ({unit}), 95 % intervals')
        for axes in (curves, last):
            axes.grid(alpha=0.3)
        if curves.lines:
            curves.legend(fontsize=8)
        figure.tight_layout()
