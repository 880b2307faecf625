#!/usr/bin/env bash
# Tokens a second by GOMP_SPINCOUNT, the turns that a thread spins before it sleeps: alone, and beside another training run.
#     results/speed/spin.sh > results/speed/spin.txt       # some ten minutes; run where data/shakespeare_char is
set -uo pipefail
home="$(cd "$(dirname "$0")/../.." && pwd)"
runs=$(mktemp -d)
trap 'rm -rf "$runs"' EXIT
flags="--sample_interval=0 --eval_interval=100000 --eval_iters=1 --log_interval=10"

start() {   # turns, out_dir, flags
    exec env GOMP_SPINCOUNT="$1" python "$home/train.py" "$home/config/train_shakespeare_char.py" $flags --out_dir="$2" "${@:3}" > /dev/null 2>&1
}

median() { awk -F, '$1 != "iter" && $7 != "" { print $7 }' "$1/log.csv" | sort -n | awk '{ v[NR] = $1 } END { printf "%s ", v[int((NR + 1) / 2)] }'; }

sample() {   # turns, precisions, tokens
    timeout 100 env GOMP_SPINCOUNT="$1" python "$home/bench.py" sample --net=124M --batch=1 --context=16 --tokens="$3" --runs=1 \
        --dtype="$2" 2> /dev/null | awk '$2 ~ /float|int8/ { printf "%s %s  ", $2, $8 }'
}

echo "alone: training the main job's net (three runs), sampling GPT-2's shape"
for turns in 300000 30000 10000 3000 1000; do
    printf '%-7s training ' $turns
    for run in 1 2 3; do
        (start $turns "$runs/a$run$turns" --max_iters=300 --max_minutes=0)
        median "$runs/a$run$turns"
    done
    printf 'sampling '
    sample $turns float32,int8 20
    echo
done
echo "beside another training run: training, sampling, and what that run makes"
for turns in 300000 30000 10000 3000 1000; do
    (start $turns "$runs/other$turns" --max_iters=100000 --max_minutes=2) &
    other=$!
    sleep 6
    printf '%-7s training ' $turns
    (start $turns "$runs/b$turns" --max_iters=60 --max_minutes=0)
    median "$runs/b$turns"
    printf 'sampling '
    sample $turns float32 6
    kill $other
    wait $other
    printf 'other '
    median "$runs/other$turns"
    echo
done
