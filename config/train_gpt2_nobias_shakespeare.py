# GPT-2 124M without the bias of the QKV projection (124,412,160 parameters, and 36,096 of padding),
# from scratch on Tiny Shakespeare in GPT-2's BPE, on two CPU cores. After 40 minutes of training it
# has 4.958 nats per token on the whole validation split (results/published/gpt2_nobias.txt).
#
#     python train.py config/train_gpt2_nobias_shakespeare.py
#     python sample.py --out_dir=out-gpt2-nobias-shakespeare --start="ROMEO:"
#
# A published run of the same net took 1.1 million tokens of a small text, and 59 minutes on an RTX
# 3050, to a validation loss of 5.330 (results/published.md).

dataset = 'shakespeare'
prepare = 'prepare_shakespeare.py --tokenizer=gpt2'   # run when the data is missing
out_dir = 'out-gpt2-nobias-shakespeare'

# the net: train.py's defaults are GPT-2's 12 layers, 12 heads, 768 wide, context 1,024
qkv_bias = False
# The published run has 0.1. Less than two passes over the text leave no time to overfit.
dropout = 0.0

# The batch. A step of Muon multiplies as much as the passes over 1,140 tokens, however many tokens
# the step has. So 278 steps of 2,048 tokens take about as long as 435 of 1,024, and read more.
batch_size = 1
gradient_accumulation_steps = 2   # 2,048 tokens a step; one text at a time needs less memory

# The optimizer. A text of 301,966 tokens allows few steps, and Muon makes the most of each: it
# reaches AdamW's loss in about half the steps (results/ablations).
optimizer = 'muon'
muon_learning_rate = 0.02
learning_rate = 3e-3  # AdamW's, for embeddings, norms and biases; small nets take 8e-3
weight_decay = 0.1

# The schedule: ten steps of warm-up, and then a straight line to zero. The line follows the clock
# on a slower machine, and the run still ends with the learning rate at zero.
warmup_iters = 10
cooldown = 1.0
min_lr = 0.0
max_iters = 278       # 569,344 tokens, not two passes over the text
max_minutes = 45.0

eval_interval = 100
eval_iters = 8        # a quarter of the validation split; the last evaluation takes all of it
log_interval = 5
