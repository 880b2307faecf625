# The main job: Tiny Shakespeare by characters. It takes at most three minutes on two CPU cores.

dataset = 'shakespeare_char'
prepare = 'prepare_shakespeare.py --tokenizer=char --stand_in'   # run when the data is missing
gradient_accumulation_steps = 1   # the batches are small enough for one pass

if device == 'cpu':
    # A GPT-2 with 0.8M parameters. In the same minutes a wider or deeper one makes fewer steps and
    # ends at a higher loss.
    n_layer = 4
    n_head = 4
    n_embd = 128
    block_size = 64       # 128 at half the batch is 0.012 nats worse in the same time
    batch_size = 32       # 2,048 tokens a step keep Muon's share of the time below a quarter
    dropout = 0.0         # three epochs do not overfit a net this small
    optimizer = 'muon'    # reaches AdamW's loss in about half the steps (results/ablations)
    muon_learning_rate = 0.02
    learning_rate = 8e-3  # AdamW's, for embeddings, norms and biases
    min_lr = 0.0
    weight_decay = 0.1
    beta2 = 0.99          # a step has few tokens, so the average is over more steps
    warmup_iters = 50
    max_iters = 1550
    # A slower processor makes fewer steps, and its learning rate still falls to min_lr.
    max_minutes = 2.7     # 0: no limit
    eval_interval = 300
    eval_iters = 20       # a third of the validation split; the last evaluation takes all of it
    log_interval = 20
else:
    # nanoGPT's recipe for a GPU: 10.65M parameters, 1.47 nats
    n_layer = 6
    n_head = 6
    n_embd = 384
    block_size = 256
    batch_size = 64
    dropout = 0.2         # without it, 82 epochs overfit
    bias = False
    learning_rate = 1e-3
    min_lr = 1e-4
    beta2 = 0.99          # a step has few tokens, so the average is over more steps
    warmup_iters = 100
    max_iters = 5000
    eval_interval = 250
    log_interval = 10

sample_interval = eval_interval   # shows how the model learns to write
