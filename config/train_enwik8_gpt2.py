# enwik8 in GPT-2's BPE, for one GPU with 16 GB.
# The model has GPT-2's shape and a head of its own: 163M parameters.

dataset = 'enwik8_gpt2'
prepare = 'prepare_enwik8.py --tokenizer=gpt2'   # run when the data is missing
out_dir = 'out-enwik8-gpt2'

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
tie_weights = False       # 38.6M more parameters, but no more work
# 16 GB hold 4 sequences in half precision; dtype='auto' is fp16 on a T4 or V100, without bf16
batch_size = 4
gradient_accumulation_steps = 16   # 64 sequences, 65,536 tokens a step
dropout = 0.2             # some 27 million tokens, seen five times

learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 200
max_iters = 2000
eval_interval = 200
eval_iters = 50
log_interval = 10
