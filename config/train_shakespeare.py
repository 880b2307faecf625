# Tiny Shakespeare in GPT-2's BPE, from scratch. On a GPU the net is GPT-2 124M, with the bias of
# the QKV projection and a context of 1,024. On a processor it is a smaller one.
#
#     python train.py config/train_shakespeare.py
#     python sample.py --out_dir=out-shakespeare-scratch --start="ROMEO:"
#
# 301,966 tokens are few, and a net learns them by heart. best.pt is the net before that, and
# last.pt the one at the end.

dataset = 'shakespeare'
prepare = 'prepare_shakespeare.py --tokenizer=gpt2'   # run when the data is missing
out_dir = 'out-shakespeare-scratch'
gradient_accumulation_steps = 1

optimizer = 'muon'    # reaches AdamW's loss in about half the steps (results/ablations)
muon_learning_rate = 0.02
min_lr = 0.0
cooldown = 1.0        # after warm-up the rates fall to zero in a straight line
warmup_iters = 10
log_interval = 10

if device == 'cpu':
    # 14.5M parameters, of which 12.9M are the embedding of 50,257 tokens
    n_layer = 2
    n_head = 4
    n_embd = 256
    block_size = 256
    batch_size = 8        # 2,048 tokens a step
    dropout = 0.1
    learning_rate = 4e-3  # AdamW's, for embeddings, norms and biases
    max_iters = 400       # 819,200 tokens, not three passes over the text
    max_minutes = 10.0
    eval_interval = 100
    eval_iters = 8        # half of the validation split; the last evaluation takes all of it
else:
    # train.py's defaults are GPT-2's shape; not measured yet
    batch_size = 8        # 8,192 tokens a step
    dropout = 0.2         # eight passes over the text would overfit without it
    learning_rate = 2e-3
    max_iters = 300
    eval_interval = 25
    eval_iters = 4

sample_interval = eval_interval   # shows how the model learns to write
