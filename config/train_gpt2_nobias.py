# GPT-2 124M without the bias of the QKV projection: 124,412,160 parameters, and 36,096 of padding.
#
#     torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_nobias.py
#
# All other settings are train.py's defaults, the recipe that train_gpt2.py writes out. Its head
# says how to fetch more than one shard.

dataset = 'fineweb'
prepare = 'prepare_corpus.py --name=fineweb'   # run when the data is missing
out_dir = 'out-gpt2-nobias'
qkv_bias = False
eval_interval = 1000
log_interval = 10
