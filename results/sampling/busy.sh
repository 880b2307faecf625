#!/usr/bin/env bash
# Sampling of GPT-2's shape while other programs keep the cores busy: tokens a second with and without OMP_NUM_THREADS=1.
#     results/sampling/busy.sh > results/sampling/busy.txt        # some minutes
set -euo pipefail

measure() {
    echo "  ${*:-as it is}"
    env "$@" python bench.py sample --batch=1 --context=16 --tokens=10 --runs=1 --dtype=float32,int8 $peer 2> /dev/null |
        awk '$2 ~ /float|int8/ { printf "%-14s %-9s %8s ms a token %8s tokens/s\n", $1, $2, $7, $8 }'
}

for loops in 0 1 2; do
    echo "$loops other programs that compute without a pause"
    others=()
    for _ in $(seq 1 $loops); do
        timeout 300 python -c 'while True: pass' &
        others+=($!)
    done
    peer=--peer=transformers measure
    peer= measure OMP_WAIT_POLICY=passive
    peer= measure OMP_NUM_THREADS=1
    [ $loops = 0 ] || kill "${others[@]}"
done
