"""
README's picture: the losses of the main job, and what its model writes.

    python results/main_job/picture.py

Reads log.csv and sample.txt beside this file, writes picture.png there.
"""
import csv
import os

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt

HERE = os.path.dirname(os.path.abspath(__file__))
LINES = 13   # lines of the sample that fit beside the curve


def read_log():
    with open(os.path.join(HERE, 'log.csv'), newline='', encoding='utf-8') as f:
        return list(csv.DictReader(f))


def read_sample():
    with open(os.path.join(HERE, 'sample.txt'), encoding='utf-8') as f:
        return ''.join(f.readlines()[:LINES]).rstrip()


def draw_loss(axes, rows, column, **style):
    """Draw one of the log's losses against the seconds of training."""
    measured = [row for row in rows if row[column]]
    seconds = [float(row['seconds']) for row in measured]
    nats = [float(row[column]) for row in measured]
    label = f'{column.removesuffix("_loss")}, last {nats[-1]:.3f}'
    axes.plot(seconds, nats, label=label, **style)


def draw_losses(axes, rows):
    draw_loss(axes, rows, 'train_loss', lw=0.8, alpha=0.6)
    draw_loss(axes, rows, 'val_loss', lw=1.6, marker='o', ms=3)
    axes.set(xlabel='seconds of training on two CPU cores', ylabel='nats per character',
             ylim=(1.2, 3), title='Tiny Shakespeare, 0.8M parameters')
    axes.grid(alpha=0.3)
    axes.legend()


def write_text(axes, text):
    axes.text(0, 1, text, family='monospace', fontsize=9, va='top', transform=axes.transAxes)
    axes.set_title('python sample.py --start "ROMEO:"', family='monospace', fontsize=10)
    axes.axis('off')


figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(3, 2))
draw_losses(left, read_log())
write_text(right, read_sample())
figure.savefig(os.path.join(HERE, 'picture.png'), dpi=110, bbox_inches='tight')
