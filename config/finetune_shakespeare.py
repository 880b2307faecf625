# Fine-tune GPT-2 on Tiny Shakespeare as GPT-2's BPE: 301,966 tokens.

init_from = 'gpt2' if device == 'cpu' else 'gpt2-xl'   # 124M or 1.6B parameters; or a folder with Hugging Face's files
dataset = 'shakespeare'
prepare = 'prepare_shakespeare.py --tokenizer=gpt2'   # run when the data is missing
out_dir = 'out-shakespeare'

max_iters = 20
eval_interval = 5
always_save_checkpoint = False   # few steps overfit: best.pt is what counts
learning_rate = 3e-5
decay_lr = False
warmup_iters = 0

if device == 'cpu':
    block_size = 256      # GPT-2's first 256 positions
    batch_size, gradient_accumulation_steps = 4, 2   # 2,048 tokens a step
    eval_iters = 4
else:
    batch_size, gradient_accumulation_steps = 1, 32   # 32,768 tokens a step, an epoch in nine
    eval_iters = 40
