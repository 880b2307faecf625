# Tiny Shakespeare by characters: the main job. About three minutes on two CPU cores.
dataset = 'shakespeare_char'
prepare = 'prepare_shakespeare.py --tokenizer=char'

if device == 'cpu':
    # a GPT-2 of 1.8M parameters and a schedule sized to a laptop
    n_layer, n_head, n_embd = 4, 3, 192
    block_size = 64
    batch_size = 32
    flash = False
    optimizer = 'muon'
    learning_rate = 6e-3
    muon_learning_rate = 0.02
    min_lr = 0.0
    weight_decay = 0.0
    warmup_iters = 50
    max_iters = 900
    eval_interval = 150
    eval_iters = 20
    log_interval = 25
    dropout = 0.0
    beta2 = 0.95
else:
    # nanoGPT's 10.65M recipe
    n_layer, n_head, n_embd = 6, 6, 384
    block_size = 256
    batch_size = 64
    dropout = 0.2
    bias = False
    learning_rate = 1e-3
    min_lr = 1e-4
    beta2 = 0.99
    warmup_iters = 100
    max_iters = 5000
    eval_interval = 250
    log_interval = 10

gradient_accumulation_steps = 1
sample_interval = eval_interval
