# The main job: Tiny Shakespeare by characters. At most three minutes on two CPU cores.

dataset = 'shakespeare_char'
prepare = 'prepare_shakespeare.py --tokenizer=char --stand_in'   # run when the data is missing
gradient_accumulation_steps = 1   # the batches are small enough to do without

if device == 'cpu':
    # a GPT-2 of 0.8M parameters: in the same minutes a wider or deeper one gets fewer steps and a higher loss
    n_layer, n_head, n_embd = 4, 4, 128
    block_size = 64       # twice the context at half the batch is 0.012 nats worse in the same time
    batch_size = 32       # 2,048 tokens a step, so that Muon's share of it stays below a quarter
    dropout = 0.0         # three epochs do not overfit a net this small
    optimizer = 'muon'    # at AdamW's loss in about half the steps (results/ablations)
    muon_learning_rate = 0.02
    learning_rate = 8e-3     # for embeddings, norms and biases, AdamW's share
    min_lr = 0.0
    weight_decay = 0.1
    beta2 = 0.99          # few tokens a step: a longer memory
    warmup_iters = 50
    max_iters = 1550
    max_minutes = 2.7     # a slower processor takes fewer steps, and its rate still falls to min_lr; 0: no limit
    eval_interval = 300
    eval_iters = 20       # a third of the validation split; the last evaluation takes all of it
    log_interval = 20
else:
    # nanoGPT's recipe for a GPU: 10.65M parameters, 1.47 nats
    n_layer, n_head, n_embd = 6, 6, 384
    block_size = 256
    batch_size = 64
    dropout = 0.2         # 82 epochs overfit without
    bias = False
    learning_rate = 1e-3
    min_lr = 1e-4
    beta2 = 0.99          # few tokens a step: a longer memory
    warmup_iters = 100
    max_iters = 5000
    eval_interval = 250
    log_interval = 10

sample_interval = eval_interval   # watch it learn to write
