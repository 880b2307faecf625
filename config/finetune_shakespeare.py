# Fine-tune GPT-2 on Tiny Shakespeare in GPT-2's BPE: 301,966 tokens.

# 1.6B parameters on a GPU, 124M on a CPU; a folder with Hugging Face's files is possible too
init_from = 'gpt2' if device == 'cpu' else 'gpt2-xl'
dataset = 'shakespeare'
prepare = 'prepare_shakespeare.py --tokenizer=gpt2'   # run when the data is missing
out_dir = 'out-shakespeare'

max_iters = 20
eval_interval = 5
always_save_checkpoint = False   # a few steps overfit, so best.pt is the result
learning_rate = 3e-5
decay_lr = False
warmup_iters = 0
compile = False   # compiling takes longer than 20 steps

if device == 'cpu':
    block_size = 256      # the first 256 of GPT-2's 1,024 positions
    batch_size = 4
    gradient_accumulation_steps = 2    # 2,048 tokens a step
    eval_iters = 4
else:
    batch_size = 1
    gradient_accumulation_steps = 32   # 32,768 tokens a step, an epoch in nine steps
    eval_iters = 40
