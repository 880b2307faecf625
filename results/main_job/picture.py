"""
README's picture: the losses of the main job, and what its model writes.

    python results/main_job/picture.py        # reads log.csv and sample.txt beside it, writes picture.png
"""
import csv
import os

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt

here = os.path.dirname(os.path.abspath(__file__))
with open(os.path.join(here, 'log.csv'), newline='', encoding='utf-8') as f:
    rows = list(csv.DictReader(f))
with open(os.path.join(here, 'sample.txt'), encoding='utf-8') as f:
    text = ''.join(f.readlines()[:13]).rstrip()   # what fits beside the curve

figure, (curve, sample) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(3, 2))
for key, style in (('train_loss', dict(lw=0.8, alpha=0.6)), ('val_loss', dict(lw=1.6, marker='o', ms=3))):
    points = [(float(row['seconds']), float(row[key])) for row in rows if row[key]]
    curve.plot(*zip(*points), label=f'{key.removesuffix("_loss")}, last {points[-1][1]:.3f}', **style)
curve.set(xlabel='seconds of training on two CPU cores', ylabel='nats per character', ylim=(1.2, 3),
          title='Tiny Shakespeare, 0.8M parameters')
curve.grid(alpha=0.3)
curve.legend()
sample.text(0, 1, text, family='monospace', fontsize=9, va='top', transform=sample.transAxes)
sample.set_title('python sample.py --start "ROMEO:"', family='monospace', fontsize=10)
sample.axis('off')
figure.savefig(os.path.join(here, 'picture.png'), dpi=110, bbox_inches='tight')
