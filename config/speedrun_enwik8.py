# The fastest way to a loss on enwik8 by bytes.
# The recipe is that of speedrun_shakespeare_char.py (results/speed.md).

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
cooldown = 1.0         # after warm-up the rates fall to zero in a straight line
min_lr = 0.0
eval_iters = 50
log_interval = 50

if device == 'cpu':
    n_layer = 4
    n_head = 3
    n_embd = 192
    block_size = 256
    batch_size = 8     # 2,048 bytes a step
    learning_rate = 2e-2   # AdamW's, for embeddings, head and norms
    max_iters = 2700
    eval_interval = 1350
    # nats per byte; train_enwik8.py gets there in ten minutes on the head of 4 MB (results/enwik8)
    target_loss = 1.4928
else:
    # not measured yet
    n_layer = 12
    n_head = 8
    n_embd = 512
    block_size = 512
    batch_size = 64    # 32,768 bytes a step
    learning_rate = 1e-2
    max_iters = 8000   # three epochs
    eval_interval = 1000
