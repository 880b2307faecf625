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


def losses(log_path, path, title):
    """Draw both losses of a log.csv (nats per token) against tokens into a PNG; says so where that cannot be."""
    try:
        import matplotlib
        matplotlib.use('Agg')
        import matplotlib.pyplot as plt
    except ImportError:
        return
    figure, axes = plt.subplots(figsize=(7, 4.5))
    try:
        for key, style in (('train_loss', dict(lw=0.8, alpha=0.6)), ('val_loss', dict(lw=1.6, marker='o', ms=3))):
            points = [(float(int(row['tokens'])), float(row[key])) for row in read_log(log_path) if row[key]]
            if points:
                axes.plot(*zip(*points), label=f'{key.removesuffix("_loss")}, last {points[-1][1]:.4f}', **style)
        axes.set(xlabel='tokens trained on', ylabel='loss (nats per token)', title=title)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
        figure.savefig(path, dpi=110, bbox_inches='tight')
    except (KeyError, ValueError, OverflowError) as error:   # somebody edited it: a picture is not worth a run
        say(f'no {path} from this {log_path} ({error})')
    except OSError as error:
        say(f'{path} could not be written ({error.strerror})')
    finally:
        plt.close(figure)
