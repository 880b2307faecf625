#!/usr/bin/env bash
# Does the possibility of looking inside cost training anything? 300 steps of the main job from two copies of the project, one
# without inside.py, analyze.py and report.html, in turns: milliseconds a step.
#     results/analysis/cost.sh DATA_DIR > results/analysis/cost.txt
set -euo pipefail
data=$(realpath "$1") work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for copy in with without; do
    mkdir "$work/$copy"
    git ls-files -z | xargs -0 cp --parents -t "$work/$copy"
done
rm "$work"/without/{analyze,lib/inside}.py "$work"/without/lib/report.html
for pair in 1 2 3 4 5 6; do
    for copy in with without; do
        (cd "$work/$copy" && python train.py config/train_shakespeare_char.py --data_dir="$data" --max_iters=300 \
            --eval_interval=300 --sample_interval=0 --out_dir=out-$pair 2> /dev/null)
        awk -F, -v copy=$copy -v pair=$pair 'END { printf "pair %s, %-8s %.2f ms a step\n", pair, copy, $NF / 300 * 1000 }' \
            "$work/$copy/out-$pair/log.csv"
    done
done
