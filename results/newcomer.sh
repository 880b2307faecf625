#!/usr/bin/env bash
# What newcomers met elsewhere, tried here: rows 1 to 34 of a list read from the issues of nanoGPT, nanochat, litgpt and others,
# each by its command in our words. Run in an empty folder, in an environment with requirements-dev.txt:
#     bash REPOSITORY/results/newcomer.sh TINYSHAKESPEARE.txt > newcomer.txt
set -u
here=$(cd "$(dirname "$0")/.." && pwd)
text=$(realpath "$1")
export CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 TMPDIR=$PWD
missed=0

py() { python "$here/$1" "${@:2}"; }
T() { py train.py --device=cpu --dataset=shakespeare_char --n_layer=2 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4 \
      --gradient_accumulation_steps=1 --eval_interval=5 --eval_iters=2 --max_iters=10 --warmup_iters=0 --learning_rate=1e-2 \
      --dtype=float32 "$@" 2>&1; }
torchrun2() { torchrun --standalone --nproc_per_node=2 "$here/$1" "${@:2}" 2>&1; }
column() { python -c "import csv, sys; print([row[sys.argv[2]] for row in csv.DictReader(open(sys.argv[1]))])" "$1" "$2"; }
close() { python -c "import sys; a, b, most = map(float, sys.argv[1:]); sys.exit(abs(a - b) > most)" "$1" "$2" "$3"; }
figure() { python -c "import json, sys; print(json.load(sys.stdin)['$1'])"; }
says() { local all; all=$(cat); [[ $all == *"$1"* ]] || { echo "    nothing says: $1"; return 1; }; }
refused() { local out; out=$("${@:2}" 2>&1) && return 1; [ "$(grep -c '^error: ' <<< "$out")" = 1 ] && says "$1" <<< "$out"; }
holds() {   # row, what, a function that fails where it does not hold
    (set -e; "$3") > log 2>&1   # not as an if's condition, where set -e would not hold
    if [ $? = 0 ]; then echo "$1: $2: holds"; else echo "$1: $2: MISSED"; sed 's/^/    /' log | tail -5; missed=1; fi
}

py prepare_shakespeare.py --input="$text" 2> /dev/null || exit 1
T > /dev/null || exit 1

row1() { py train.py "$here/config/train_shakespeare_char.py" --max_iters=2 --eval_iters=1 --out_dir=r1 2>&1 | says 'device cpu'
         py sample.py --out_dir=r1 --max_new_tokens=20; }
row2() { CC=/bin/false CXX=/bin/false TORCHINDUCTOR_CACHE_DIR=$PWD/c refused 'type --compile=False' T --compile=True --out_dir=r2
         CC=/bin/false CXX=/bin/false T --compile=auto --out_dir=r2; }
row3() { T --out_dir=r3; before=$(sha256sum r3/best.pt)
         refused 'no longer finite' T --out_dir=r3 --init_from=resume --max_iters=40 --learning_rate=1e9 --decay_lr=False --grad_clip=0
         [ "$before" = "$(sha256sum r3/best.pt)" ]; py sample.py --out_dir=r3 --max_new_tokens=5
         T --out_dir=r3a; T --out_dir=r3b --flash=False
         close "$(column r3a/log.csv train_loss | tr -d "[]',," | awk '{print $10}')" \
               "$(column r3b/log.csv train_loss | tr -d "[]',," | awk '{print $10}')" 1e-4; }
row4() { T --out_dir=r4 | says 'ln(65) = 4.1744'; close "$(python -c "import csv; print(next(csv.DictReader(open('r4/log.csv')))['val_loss'])")" 4.1744 0.2; }
row5() { for i in $(seq 500); do echo hello world; done > a.txt; py prepare_text.py --input=a.txt --name=mine --tokenizer=char 2>&1 | says 'train.py'
         T --dataset=mine --out_dir=r5; }
row6() { mkdir -p r6; refused 'type' py prepare_shakespeare.py --url=http://127.0.0.1:9/x --data_dir=r6 ; [ -z "$(find r6 -type f)" ]
         refused 'prepare' T --dataset=nope --out_dir=r6; }
row7() { T --lr_decay_iters=20 --max_iters=20 --out_dir=r7a; T --lr_decay_iters=20 --out_dir=r7b; T --lr_decay_iters=20 --max_iters=20 --out_dir=r7b --init_from=resume
         [ "$(column r7a/log.csv train_loss)" = "$(column r7b/log.csv train_loss)" ]
         python -c "import torch; a, b = (torch.load(f, weights_only=True)['model'] for f in ('r7a/last.pt', 'r7b/last.pt')); assert all(torch.equal(a[k], b[k]) for k in a)"; }
row8() { timeout -s INT 15 python "$here/train.py" --device=cpu --dataset=shakespeare_char --n_layer=2 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4 \
         --gradient_accumulation_steps=1 --max_iters=1000000 --out_dir=r8 || [ $? = 124 ]; [ -s r8/last.pt ]; py sample.py --out_dir=r8 --max_new_tokens=5; }
row9() { T --compile=True --out_dir=r9
         python -c "import torch; c = torch.load('r9/last.pt', weights_only=True); assert not any(k.startswith('_orig_mod') for k in c['model'])"; }
row10() { for cache in True False; do py sample.py --start='First Citizen: we are accounted' --num_samples=3 --max_new_tokens=40 --dtype=float32 \
          --temperature=0 --kv_cache=$cache > cache$cache; done; cmp cacheTrue cacheFalse; }
row11() { refused 'did you mean --learning_rate' T --learning_rte=1; T --learning_rate=1 --out_dir=r11; refused "'='" py sample.py --start='a=b'
          py train.py --help | says 'learning_rate'; }
row12() { refused '日' py sample.py --start=日本; mv data data.off; py sample.py --max_new_tokens=5; code=$?; mv data.off data; return $code; }
row13() { py sample.py --temperature=0 --seed=1 --max_new_tokens=30 > a; py sample.py --temperature=0 --seed=2 --max_new_tokens=30 | cmp a -
          py sample.py --top_p=1e-9 --max_new_tokens=30 | cmp a -; refused 'temperature=-1' py sample.py --temperature=-1
          py sample.py --stop=e --max_new_tokens=30; echo First > p.txt; py sample.py --start=FILE:p.txt --max_new_tokens=5; }
row14() { cd "$here"; python -m pytest -q -n0 -p no:cacheprovider tests/test_train.py -k mps; }
row15() { a=$(py evaluate.py --batch_size=1 --json=- | figure nats_per_token); b=$(py evaluate.py --batch_size=7 --json=- | figure nats_per_token); close "$a" "$b" 1e-5
          (echo '<mediawiki xmlns="a">'; cat "$text") | head -c 100000 > e8; py prepare_enwik8.py --input=e8 --partial --data_dir=r15
          [ "$(stat -c %s r15/enwik8/{train,val,test}.bin | tr '\n' ' ')" = '180000 10000 10000 ' ]; }
row16() { T --eval_iters=2 --out_dir=r16a; T --eval_iters=5 --out_dir=r16b; [ "$(column r16a/log.csv train_loss)" = "$(column r16b/log.csv train_loss)" ]
          cp -r "$here/results/ablations" r16; py ablate.py heads --report --results=r16; cmp r16/heads.md "$here/results/ablations/heads.md"; }
row17() { [ -s out/log.csv ] && [ -s out/loss.png ]; ! python -c 'import wandb'; column out/log.csv grad_norm; }
row18() { T --batch_size=8 --out_dir=r18a; T --batch_size=2 --gradient_accumulation_steps=4 --out_dir=r18b
          python -c "import csv; a, b = ([float(row['train_loss'] or 0) for row in csv.DictReader(open(f))] for f in ('r18a/log.csv', 'r18b/log.csv')); assert max(abs(x - y) for x, y in zip(a, b)) < 1e-4"; }
row19() { T --batch_size=2 --gradient_accumulation_steps=2 --out_dir=r19a
          torchrun2 train.py --device=cpu --dataset=shakespeare_char --n_layer=2 --n_head=2 --n_embd=16 --block_size=16 --batch_size=2 --gradient_accumulation_steps=2 \
            --eval_interval=5 --eval_iters=2 --max_iters=10 --warmup_iters=0 --learning_rate=1e-2 --dtype=float32 --out_dir=r19b
          python -c "import csv; a, b = ([float(row['train_loss'] or 0) for row in csv.DictReader(open(f))] for f in ('r19a/log.csv', 'r19b/log.csv')); assert len(a) == 11 and max(abs(x - y) for x, y in zip(a, b)) < 1e-5"; }
row20() { T --out_dir=r20 | says 'tokens per step = 4 batch x 16 block x 1 accumulation'
          torchrun2 train.py "$here/config/train_shakespeare_char.py" --device=cpu --gradient_accumulation_steps=3 --out_dir=r20 | says 'does not divide by 2 ranks'; }
row21() { a=$(py evaluate.py --device=cpu --json=- | figure nats_per_token); torchrun --standalone --nproc_per_node=2 "$here/evaluate.py" --device=cpu --json=two.json; close "$a" "$(figure nats_per_token < two.json)" 1e-6; }
row22() { T --out_dir=r22 | says ' MB; val loss'; refused 'type' T --batch_size=1000000000 --out_dir=r22; }
row23() { python -W error::FutureWarning -W error::DeprecationWarning "$here/train.py" "$here/config/train_shakespeare_char.py" --max_iters=2 --eval_iters=1 --out_dir=r23; }
row24() { py export_hf.py --out_dir=out --to=hf
          python -c "
import sys, torch, transformers
sys.path.insert(0, '$here')
import checkpoint
ours, tokenizer = checkpoint.open_model('resume', 'out', '', 'data')[:2]
theirs, its = transformers.AutoModelForCausalLM.from_pretrained('hf').eval(), transformers.AutoTokenizer.from_pretrained('hf')
idx = torch.tensor([its('First Citi').input_ids])
assert idx[0].tolist() == list(tokenizer.encode('First Citi'))
with torch.no_grad(): print('largest difference of logits', (difference := (ours.eval()(idx)[0] - theirs(idx).logits).abs().max()))
assert difference < 1e-4
assert torch.equal(ours.generate(idx[:, :4], 10, temperature=0), theirs.generate(idx[:, :4], max_new_tokens=10, do_sample=False, pad_token_id=0))"; }
row25() { python -c "
import sys, torch, transformers
sys.path.insert(0, '$here')
from model import GPT
theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=32)).eval()
theirs.save_pretrained('random')
idx = torch.randint(50, (2, 20))
with torch.no_grad(): assert (GPT.from_pretrained('random').eval()(idx)[0] - theirs(idx).logits).abs().max() < 1e-4"; }
row26() { py analyze.py --start='First Citizen' --out_dir=out
          python -c "
import numpy as np
w = np.load('out/analysis/attention.npz')['weights'].astype('float64')
assert abs(w.sum(-1) - 1).max() < 1e-5 and not np.triu(w, 1).any(), w.shape"; }
row27() { env -u DISPLAY MPLBACKEND=Agg python "$here/analyze.py" --layer=1 --tokens=16 ; file out/analysis/head.png | says 'PNG image'; }
row28() { cd "$here"; python -m pytest -q -n0 -p no:cacheprovider tests/test_inside.py; }
row29() { refused 'layer' py analyze.py --layer=99; }
row31() { cd "$here"; python -m pytest -q -n0 -p no:cacheprovider tests/test_model.py -k 'future or causal or later'; }
row32() { printf 'Привет, 世界! 👩‍👩‍👧 é\n%.0s' {1..200} > utf8.txt; py prepare_text.py --input=utf8.txt --name=utf8 --tokenizer=byte
          python -c "
import numpy as np
read = b''.join(np.fromfile(f'data/utf8/{split}.bin', dtype='<u2').astype(np.uint8).tobytes() for split in ('train', 'val'))
assert read == open('utf8.txt', 'rb').read(), len(read)"; T --dataset=utf8 --out_dir=r32; py sample.py --out_dir=r32 --start=世 --max_new_tokens=5; }
row33() { PYTHONUTF8=0 LC_ALL=C PYTHONIOENCODING=utf-8 python -X warn_default_encoding -W error::EncodingWarning "$here/prepare_shakespeare.py" --input="$text" --data_dir=r33
          PYTHONUTF8=0 LC_ALL=C python -X warn_default_encoding "$here/train.py" --device=cpu --dataset=shakespeare_char --n_layer=1 --n_head=1 --n_embd=8 --block_size=16 \
            --gradient_accumulation_steps=1 --max_iters=2 --eval_iters=1 --out_dir=r33 2> said; ! grep "EncodingWarning" said | grep "$here"; }
row34() { head -c 100 "$text" > tiny.txt; py prepare_text.py --input=tiny.txt --name=tiny --tokenizer=char; refused 'type --block_size=' T --dataset=tiny --block_size=256 --out_dir=r34; }

echo "# $(python -c 'import torch, sys; print("torch", torch.__version__, "Python", sys.version.split()[0])')"
holds 1 'runs without CUDA, with no flags' row1
holds 2 'torch.compile without a compiler: an error where asked for, a note where not' row2
holds 3 'a diverging run stops, says where, and keeps the good checkpoint; flash or not is the same loss' row3
holds 4 'the first loss is near ln V, which is printed' row4
holds 5 'own text: two commands' row5
holds 6 'a failed download leaves nothing; a missing dataset names its command' row6
holds 7 'resuming is exact' row7
holds 8 'Ctrl-C saves, and sampling works then' row8
holds 9 'checkpoints have plain names and load with weights_only' row9
holds 10 'the same text with the KV cache and without, past block_size too' row10
holds 11 'typos, whole numbers for rates, = in a prompt, --help' row11
holds 12 'characters outside the vocabulary are named; sampling needs no data' row12
holds 13 'temperature 0, top_p, stop, a prompt from a file' row13
holds 14 'a GPU of Apple that computes wrong is not taken' row14
holds 15 'evaluation does not depend on the batch size; enwik8 is split 90/5/5' row15
holds 16 'evaluating more does not change training; tables come from the raw results' row16
holds 17 'logs and plots without wandb' row17
holds 18 'the training loss is of the whole batch' row18
holds 19 'two ranks on a CPU: the same losses' row19
holds 20 'tokens a step are printed; accumulation that does not divide is refused' row20
holds 21 'evaluation on two ranks gives the same number' row21
holds 22 'memory is printed; too large a batch is refused with what fits' row22
holds 23 'no FutureWarning, no DeprecationWarning' row23
holds 24 'export to transformers: the same logits and text' row24
holds 25 'any GPT-2 from a folder' row25
holds 26 'attention of my own model: rows sum to 1, no future' row26
holds 27 'figures without a display' row27
holds 28 'heads are taken out before the projection, its bias stays' row28
holds 29 'an unknown layer is refused' row29
holds 31 'the causal mask does not leak' row31
holds 32 'any language, by bytes, there and back' row32
holds 33 'no encoding left to the platform' row33
holds 34 'a text shorter than block_size: which is the largest that works' row34
exit $missed
