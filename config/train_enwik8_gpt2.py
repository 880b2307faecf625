# enwik8 as GPT-2's BPE, GPT-2's shape with a head of its own: 163M parameters, for one GPU of 16 GB.

dataset = 'enwik8_gpt2'
prepare = 'prepare_enwik8.py --tokenizer=gpt2'   # run when the data is missing
out_dir = 'out-enwik8-gpt2'

n_layer, n_head, n_embd = 12, 12, 768
block_size = 1024
tie_weights = False       # 38.6M parameters more, no more work
batch_size = 4            # what 16 GB hold in half precision: fp16 on a T4 or V100, which have no bf16 (dtype='auto')
gradient_accumulation_steps = 16   # 64 sequences, 65,536 tokens a step
dropout = 0.2             # some 27 million tokens, seen five times

learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 200
max_iters = 2000
eval_interval = 200
eval_iters = 50
log_interval = 10
