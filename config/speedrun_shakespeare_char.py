# The fastest way to a loss on Tiny Shakespeare by characters, with all variants in model.py that
# help. It goes to 1.47 nats per character, the loss of nanoGPT's recipe for a GPU:
#
#     python train.py config/speedrun_shakespeare_char.py
#
# results/speed.md has the commands for other losses; their flags override the settings below.

dataset = 'shakespeare_char'
prepare = 'prepare_shakespeare.py --tokenizer=char --stand_in'   # run when the data is missing
out_dir = 'out-speedrun'
target_loss = 1.47
gradient_accumulation_steps = 1

# modded-nanogpt's changes to GPT-2
pos = 'rope'
qk_norm = True
activation = 'relu2'   # on a processor also two to three times as fast as GELU's tanh form
zero_init = True
tie_weights = False
bias = False
optimizer = 'muon'
muon_learning_rate = 0.02
learning_rate = 2e-2   # AdamW's, for embeddings, head and norms
weight_decay = 0.0
warmup_iters = 10
cooldown = 1.0         # after warm-up the rates fall to zero in a straight line
min_lr = 0.0
eval_iters = 20
log_interval = 50

if device == 'cpu':
    n_layer = 4
    n_head = 4
    n_embd = 256
    block_size = 256
    batch_size = 16    # 4,096 characters a step
    max_iters = 750
    eval_interval = 750
else:
    # not measured yet
    n_layer = 6
    n_head = 6
    n_embd = 384
    block_size = 256
    batch_size = 64    # 16,384 characters a step
    dropout = 0.1      # the run is thirteen epochs
    learning_rate = 1e-2
    max_iters = 800
    cuda_graph = True  # a step takes only some milliseconds
    eval_interval = 200
