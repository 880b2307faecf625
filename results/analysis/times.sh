#!/usr/bin/env bash
# How long analyze.py takes, whole commands: nanoGPT's net for characters after 30 steps, and GPT-2 124M's shape with random
# weights. Needs data/shakespeare_char and data/shakespeare.
#     results/analysis/times.sh > results/analysis/times.txt
set -euo pipefail
python train.py config/train_shakespeare_char.py --n_layer=6 --n_head=6 --n_embd=384 --block_size=256 --max_iters=30 \
    --warmup_iters=5 --batch_size=8 --eval_interval=30 --sample_interval=0 --out_dir=out-times 2> /dev/null
python - <<'PYTHON'
import json
import data
from model import GPT, GPTConfig
GPT(GPTConfig()).save_pretrained('out-times/gpt2')
for name, content in data.hf_tokenizer_files(data.GPT2Tokenizer(), 1024).items():
    with open(f'out-times/gpt2/{name}', 'w') as f:
        f.write(content if isinstance(content, str) else json.dumps(content))
PYTHON
timed() {
    local from=$(date +%s.%N)
    "$@" > /dev/null 2>&1
    echo "$(date +%s.%N) $from $(stat -c %s out-times/analysis/report.html)" |
        awk -v command="$*" '{ printf "%.1f s, report.html %.1f MB: %s\n", $1 - $2, $3 / 1e6, command }'
}
for run in 1 2 3; do
    timed python analyze.py --out_dir=out-times
done
for run in 1 2; do
    timed python analyze.py --out_dir=out-times --init_from=out-times/gpt2 --dataset=shakespeare
    timed python analyze.py --out_dir=out-times --init_from=out-times/gpt2 --start=FILE:README.md
done
rm -r out-times
