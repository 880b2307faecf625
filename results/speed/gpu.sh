#!/usr/bin/env bash
# What results/speed.md leaves open about one GPU, by one command, into results/speed/gpu/.
# No GPU could be had so far: written, not yet run on one.
#     results/speed/gpu.sh ../nanoGPT          # a clone; data/shakespeare_char and data/enwik8 prepared
set -euo pipefail
out=results/speed/gpu
mkdir -p $out
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv > $out/machine.csv
python bench.py train --peer=transformers,nanogpt:"$1" --json=$out/train.json | tee $out/train.txt   # MFU in the JSON
python bench.py train --net=124M --dtype=float32,bfloat16,float16 --json=$out/memory.json | tee $out/memory.txt
for seed in 1 2 3; do
    python train.py config/speedrun_shakespeare_char.py --seed=$seed --out_dir=out-gpu 2> $out/to-1.47-seed$seed.txt
    python train.py config/speedrun_shakespeare_char.py --seed=$seed --out_dir=out-gpu --target_loss=0 2> $out/best-seed$seed.txt
    python evaluate.py --out_dir=out-gpu --checkpoint=out-gpu/best.pt | tee $out/best-seed$seed-whole-split.txt
done
python train.py config/speedrun_enwik8.py --out_dir=out-gpu-enwik8 2> $out/enwik8.txt
python evaluate.py --out_dir=out-gpu-enwik8 --split=test --stride=32 | tee $out/enwik8-test.txt
