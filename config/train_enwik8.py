# enwik8 by bytes: 90 million of them to train on. On a GPU 38M parameters; on two CPU cores ten minutes of a small one.

dataset = 'enwik8'
prepare = 'prepare_enwik8.py --tokenizer=byte'   # run when the data is missing
out_dir = 'out-enwik8'
gradient_accumulation_steps = 1

if device == 'cpu':
    n_layer, n_head, n_embd = 4, 4, 192
    block_size = 128
    batch_size = 16       # 2,048 bytes a step
    optimizer = 'muon'
    muon_learning_rate = 0.02
    learning_rate = 8e-3  # for embeddings, norms and biases, AdamW's share
    min_lr = 0.0
    weight_decay = 0.0
    warmup_iters = 100
    max_iters = 3600      # ten minutes
    eval_interval = 500
    eval_iters = 50
    log_interval = 50
else:
    n_layer, n_head, n_embd = 12, 8, 512
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
