# enwik8 by bytes, 90 million of them for training.
# On a GPU the model has 38M parameters. On two CPU cores a small one trains for ten minutes.

dataset = 'enwik8'
prepare = 'prepare_enwik8.py --tokenizer=byte'   # run when the data is missing
out_dir = 'out-enwik8'
gradient_accumulation_steps = 1

if device == 'cpu':
    n_layer = 4
    n_head = 4
    n_embd = 192
    block_size = 128
    batch_size = 16       # 2,048 bytes a step
    optimizer = 'muon'
    muon_learning_rate = 0.02
    learning_rate = 8e-3  # AdamW's, for embeddings, norms and biases
    min_lr = 0.0
    weight_decay = 0.0
    warmup_iters = 100
    max_iters = 3600      # ten minutes
    eval_interval = 500
    eval_iters = 50
    log_interval = 50
else:
    n_layer = 12
    n_head = 8
    n_embd = 512
    block_size = 512
    batch_size = 64       # 32,768 bytes a step
    dropout = 0.1
    learning_rate = 6e-4
    min_lr = 6e-5
    beta2 = 0.99
    warmup_iters = 500
    max_iters = 30000     # 11 epochs
    eval_interval = 1000
    log_interval = 50
