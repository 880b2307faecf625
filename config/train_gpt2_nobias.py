# GPT-2 124M without the bias of the QKV projection: 124,412,160 parameters, and 36,096 of padding. The rest is train.py's
# defaults, which are the recipe that train_gpt2.py writes out.
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_nobias.py

out_dir = 'out-gpt2-nobias'
qkv_bias = False
eval_interval = 1000
log_interval = 10
