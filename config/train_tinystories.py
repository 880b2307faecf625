# TinyStories: stories in the words of small children, from which small models learn whole sentences
# (Eldan and Li, arXiv 2305.07759). The first run downloads 2.3 GB of text.
#
#     python train.py config/train_tinystories.py
#     python sample.py --out_dir=out-tinystories --start="Once upon a time"
#
# Neither half was run on the stories themselves, so their losses are not known yet. The half for a
# processor was tried for 150 steps on another text, in bytes; with the tokens below, it was not.

dataset = 'tinystories'
out_dir = 'out-tinystories'
gradient_accumulation_steps = 1

# the recipe of speedrun_shakespeare_char.py (results/speed.md), but for its size
pos = 'rope'
qk_norm = True
activation = 'relu2'
zero_init = True
bias = False
optimizer = 'muon'
muon_learning_rate = 0.02
weight_decay = 0.0
warmup_iters = 50
cooldown = 1.0         # after warm-up the rates fall to zero in a straight line
min_lr = 0.0
log_interval = 50

if device == 'cpu':
    # 4.2M parameters. The tokens are learned from the stories. With GPT-2's 50,257 tokens, the head
    # alone would take most of the time of a net this small. With bytes the context would be about a
    # third as long, and the token files would take 4.5 GB. Learning the tokens reads all stories
    # once: up to half an hour at the 1.4 to 2.5 MB/s in results/tokenizing.
    # run when the data is missing
    prepare = 'prepare_corpus.py --name=tinystories --tokenizer=bpe --vocab_size=2048'
    tie_weights = False
    n_layer = 4
    n_head = 4
    n_embd = 256
    block_size = 256
    batch_size = 16        # 4,096 tokens a step
    learning_rate = 2e-2   # AdamW's, for embeddings, head and norms
    # 50 minutes at 0.53 s a step: the speedrun's 0.47 s (Zen 4), and a seventh for the larger head.
    # The last evaluation reads all 22 MB of the validation stories, in the rest of an hour.
    max_iters = 5600
    max_minutes = 50.0
    eval_interval = 1000
    eval_iters = 50
else:
    # 26M parameters on GPT-2's tokens; not measured yet
    prepare = 'prepare_corpus.py --name=tinystories --tokenizer=gpt2'   # run when data is missing
    n_layer = 8
    n_head = 5
    n_embd = 320
    block_size = 512
    batch_size = 64        # 32,768 tokens a step
    learning_rate = 3e-3   # AdamW's, for the embedding, which is the head, too, and for norms
    max_iters = 15000      # some 490 million tokens, about an epoch
    eval_interval = 1000
    eval_iters = 50

sample_interval = eval_interval   # shows how the model learns to tell stories
