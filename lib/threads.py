"""
Import this before torch: threads that wait for each other give way sooner.

torch on a processor splits each operation over threads, which wait for the slowest at its end. The
OpenMP library of torch's Linux packages lets them spin for 300,000 turns, some 5 ms, before they
sleep. On an idle machine that is never reached. Where another program computes too, the slowest
thread waits for a core on which another thread only spins: training and sampling then fall to a
fortieth of their speed. With fewer turns they lose what they share.
Figures: results/speed.md, "Beside other programs".
"""
import os

os.environ.setdefault('GOMP_SPINCOUNT', '10000')
