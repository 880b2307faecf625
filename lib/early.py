"""
Import this before NumPy and torch: it says which package is missing, and settles what they read.

Ctrl-C while they are imported ends a script at once, without Python's traceback.

torch on a processor splits each operation over threads, which wait for the slowest at its end. The
OpenMP library of torch's Linux packages lets them spin for 300,000 turns, some 5 ms, before they
sleep. On an idle machine that limit is never reached. Where another program computes too, the
slowest thread waits for a core on which another thread only spins, and training falls to a tenth of
its speed. With 1,000 turns two programs get half of the machine each, and alone a program keeps its
speed. Figures: results/speed.md, "Beside other programs".
"""
import importlib.util
import os
import signal
import sys

signal.signal(signal.SIGINT, signal.SIG_DFL)
os.environ.setdefault('GOMP_SPINCOUNT', '1000')
for package in ('numpy', 'torch'):
    if importlib.util.find_spec(package) is None:
        print(f'error: the package {package} is missing; type pip install -r requirements.txt',
              file=sys.stderr)
        sys.exit(2)
