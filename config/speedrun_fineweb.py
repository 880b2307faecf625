# The fastest way to 3.28 nats on FineWeb's validation shard, the goal of modded-nanogpt's speedrun
# and the loss of llm.c's GPT-2 124M after 10 billion tokens. It needs GPUs, and was not run here.
#
#     torchrun --standalone --nproc_per_node=8 train.py config/speedrun_fineweb.py
#
# The changes to GPT-2 are those that model.py has in common with modded-nanogpt's records of late
# 2024. The number of steps is theirs, too: 4,578 of 524,288 tokens, 2.4 billion together.

dataset = 'fineweb'
# 25 training shards, so that no token is seen twice: 5.2 GB
prepare = 'prepare_corpus.py --name=fineweb --shards=25'   # run when the data is missing
out_dir = 'out-speedrun-fineweb'
target_loss = 3.28

pos = 'rope'
qk_norm = True
activation = 'relu2'
zero_init = True
tie_weights = False    # 162M parameters, of which 124M work on a token
bias = False
n_layer = 12
n_head = 6             # a head has 128 dimensions
n_embd = 768
block_size = 1024
batch_size = 32
gradient_accumulation_steps = 16   # over all GPUs together: 524,288 tokens a step

optimizer = 'muon'
muon_learning_rate = 0.02
learning_rate = 3.6e-3   # AdamW's, for embeddings, head and norms
weight_decay = 0.0
warmup_iters = 0
cooldown = 0.286       # the rates stay for 3,270 steps, then fall to zero in a straight line
min_lr = 0.0
max_iters = 4578

eval_interval = 250
eval_iters = 320       # 10.5 million tokens; at the goal, the whole shard of 100 million decides
log_interval = 10
