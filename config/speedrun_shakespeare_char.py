# The fastest way to a loss on Tiny Shakespeare by characters, with everything model.py knows: results/speed.md.
#     python train.py config/speedrun_shakespeare_char.py                    # 1.47 nats, as nanoGPT's recipe for a GPU
# For the other losses of that page its commands override what is below.

dataset = 'shakespeare_char'
prepare = 'prepare_shakespeare.py --tokenizer=char --stand_in'   # run when the data is missing
out_dir = 'out-speedrun'
target_loss = 1.47
gradient_accumulation_steps = 1

# modded-nanogpt's changes to GPT-2
pos = 'rope'
qk_norm = True
activation = 'relu2'   # and on a processor two to three times as fast as the tanh form of GELU
zero_init = True
tie_weights = False
bias = False
optimizer = 'muon'
muon_learning_rate = 0.02
learning_rate = 2e-2   # for embeddings, head and norms, AdamW's share
weight_decay = 0.0
warmup_iters = 10
cooldown = 1.0         # the rate falls from the first step after warm-up to nothing at the last
min_lr = 0.0
eval_iters = 20
log_interval = 50

if device == 'cpu':
    n_layer, n_head, n_embd = 4, 4, 256
    block_size = 256
    batch_size = 16    # 4,096 characters a step
    max_iters = 750
    eval_interval = 750
else:
    n_layer, n_head, n_embd = 6, 6, 384
    block_size = 256
    batch_size = 64    # 16,384 characters a step
    dropout = 0.1      # thirteen epochs; this half is not yet measured
    learning_rate = 1e-2
    max_iters = 800
    cuda_graph = True  # a step of some milliseconds
    eval_interval = 200
