# GPT-2 124M from scratch, by nanoGPT's recipe, on FineWeb in place of OpenWebText. On OpenWebText
# the recipe ends at 2.85 nats, after four to five days on eight A100s. It was not run here.
#
#     python prepare_corpus.py --name=fineweb --shards=103    # 10.3 billion tokens, 20.8 GB
#     torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
#
# Without the first command, one shard of 100 million tokens is fetched (400 MB with validation).
# One shard is enough for a first try. The whole run would see it 3,000 times, and overfit.

dataset = 'fineweb'   # openwebtext is nanoGPT's; --dataset=openwebtext takes your own copy
prepare = 'prepare_corpus.py --name=fineweb'   # run when the data is missing
out_dir = 'out-gpt2'

batch_size = 12           # sequences of 1,024 tokens
block_size = 1024
gradient_accumulation_steps = 5 * 8   # over all GPUs together: 491,520 tokens a step

max_iters = 600000        # 300 billion tokens
lr_decay_iters = 600000
learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 2000
weight_decay = 1e-1

eval_interval = 1000
eval_iters = 200
log_interval = 10
