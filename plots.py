"""
The rows of a run's log.csv, and pictures of them. matplotlib is imported where a picture is drawn: training goes on without.
"""
import contextlib
import csv
import re

from runtime import say


def read_log(path):
    """The rows of a log.csv as dicts of text, whole ones only: a machine that failed, or an editor, may have left others."""
    rows = []
    with contextlib.suppress(FileNotFoundError, csv.Error), open(path, newline='', encoding='utf-8', errors='replace') as f:
        for row in csv.DictReader(f):
            if None not in row.values() and re.fullmatch('[0-9]{1,15}', row.get('iter') or ''):
                rows.append(row)
    return rows


@contextlib.contextmanager
def picture(path, rows=1, columns=1, **settings):
    """A figure and its panels (rows, columns) to draw on, then written to path as a PNG. Raises ImportError and OSError."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    figure, panels = plt.subplots(rows, columns, squeeze=False, **settings)
    try:
        yield figure, panels
        figure.savefig(path, dpi=110, bbox_inches='tight')
    finally:
        plt.close(figure)


def losses(log_path, path, title):
    """Draw both losses of a log.csv (nats per token) against tokens; says so where that cannot be, as training goes on."""
    try:
        with picture(path, figsize=(7, 4.5)) as (_, ((axes,),)):
            for key, style in (('train_loss', dict(lw=0.8, alpha=0.6)), ('val_loss', dict(lw=1.6, marker='o', ms=3))):
                points = [(float(int(row['tokens'])), float(row[key])) for row in read_log(log_path) if row[key]]
                if points:
                    axes.plot(*zip(*points), label=f'{key.removesuffix("_loss")}, last {points[-1][1]:.4f}', **style)
            axes.set(xlabel='tokens trained on', ylabel='loss (nats per token)', title=title)
            axes.grid(alpha=0.3)
            if axes.lines:
                axes.legend()
    except ImportError:
        pass
    except (KeyError, ValueError, OverflowError) as error:   # somebody edited it: a picture is not worth a run
        say(f'no {path} from this {log_path} ({error})')
    except OSError as error:
        say(f'{path} could not be written ({error.strerror})')


def growth(rows, path):
    """Draw milliseconds a step and peak memory of bench.py train --growth, one panel a quantity that grows; says so where that
    cannot be, as the table is worth more."""
    kinds = list(dict.fromkeys(row['growth'] for row in rows))
    try:
        with picture(path, 2, len(kinds), figsize=(4 * len(kinds), 6), sharex='col') as (figure, panels):
            for kind, (above, below) in zip(kinds, panels.T):
                points = [row for row in rows if row['growth'] == kind]
                x = [row[kind] for row in points]
                # contexts are measured at the same number of tokens a step, so that only the attention grows
                for axes, key, label in ((above, 'step_ms', 'ms a step'), (below, 'peak_memory_mb', 'peak memory, MB')):
                    axes.plot(x, [row[key] for row in points], marker='o', ms=3)
                    axes.set(ylabel=label, ylim=(0, None))
                    axes.grid(alpha=0.3)
                below.set(xlabel=kind)
                first = points[0]
                above.set_title(f'{first["n_layer"]} layers, context {first["context"]}' if kind == 'batch' else
                                f'{first["batch"]} x {first["context"]} tokens' + ' a step' * (kind == 'context'), fontsize=9)
            figure.tight_layout()
    except ImportError:
        say(f'no {path}: matplotlib is missing; type pip install -r requirements.txt')
    except OSError as error:
        say(f'{path} could not be written ({error.strerror})')
