# The fastest way to a loss on enwik8 by bytes: the recipe of speedrun_shakespeare_char.py (results/speed.md).

dataset = 'enwik8'
prepare = 'prepare_enwik8.py --tokenizer=byte'   # run when the data is missing
out_dir = 'out-speedrun-enwik8'
gradient_accumulation_steps = 1

pos = 'rope'
qk_norm = True
activation = 'relu2'
zero_init = True
tie_weights = False
bias = False
optimizer = 'muon'
muon_learning_rate = 0.02
weight_decay = 0.0
warmup_iters = 20
cooldown = 1.0         # the rate falls from the first step after warm-up to nothing at the last
min_lr = 0.0
eval_iters = 50
log_interval = 50

if device == 'cpu':
    n_layer, n_head, n_embd = 4, 3, 192
    block_size = 256
    batch_size = 8     # 2,048 bytes a step
    learning_rate = 2e-2   # for embeddings, head and norms, AdamW's share
    max_iters = 2700
    eval_interval = 1350
    target_loss = 1.4928   # of train_enwik8.py after ten minutes on the head of 4 MB, nats per byte (results/enwik8)
else:
    n_layer, n_head, n_embd = 12, 8, 512
    block_size = 512
    batch_size = 64    # 32,768 bytes a step
    learning_rate = 1e-2
    max_iters = 8000   # three epochs; this half is not yet measured
    eval_interval = 1000
