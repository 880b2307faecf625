# GPT-2 124M from scratch, as nanoGPT trains it: 2.85 nats on OpenWebText, after four to five days
# on eight A100s.
#
#     torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

# your own copy; to make it from a folder of texts:
# python prepare_text.py --input=FOLDER --name=openwebtext --tokenizer=gpt2
dataset = 'openwebtext'
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
