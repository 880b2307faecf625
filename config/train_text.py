# Your own text, without choosing: the net follows from the length of the text and from the minutes.
#
#     python prepare_text.py --input=book.txt --name=mine
#     python train.py config/train_text.py --dataset=mine
#     python train.py config/train_text.py --dataset=mine --max_minutes=60
#     python sample.py --out_dir=out-mine
#
# Three things limit a net:
# - Time: in the same minutes a larger net makes fewer steps. On two cores a net of 0.8M parameters
#   suits a minute, and a net of 3.3M suits six (results/speed.md).
# - Text: a short text that is read again and again is learned by heart, and the loss on other text
#   rises. Dropout delays that. A limit of passes ends the run before, even if minutes are left.
# - Context: a letter is easier to predict with more letters before it, but each of them costs time.

from lib.data import DEFAULT, extent_of

if dataset == DEFAULT and not extent_of(dataset, data_dir).tokens:
    dataset = 'mine'   # no --dataset was typed, and this is the name in all examples
out_dir = f'out-{dataset}'
max_minutes = max_minutes or 10.0
gradient_accumulation_steps = 1
_text = extent_of(dataset, data_dir)

# ---- the table -----------------------------------------------------------------------------------
# A text's length is in letters: characters, or bytes where a token stands for several. The first
# row that is large enough counts. The limits of the rows lie between texts of 50 kB, 1 MB and
# 20 MB, and between 1, 10 and 60 minutes, at about equal ratios.
#
# results/own_text/study.py compares nets for these texts and times, and was not run yet. The nets
# for 1 MB and 1 or 10 minutes are those of results/speed.md. All else is a guess. In an hour a text
# of 1 MB is read some 13 times, and gets the width and the dropout of nanoGPT's recipe for a GPU.
_SHORT = 200_000   # letters
_ANY = float('inf')
_TABLE = (
    # letters  minutes  n_layer  n_embd  context  batch_size  dropout  passes
    (_SHORT,      _ANY,       4,    128,     128,          8,     0.2,     15),
    (4_000_000,    3.2,       4,    128,     128,         16,     0.0,     20),
    (4_000_000,   25.0,       4,    256,     256,         16,     0.1,     20),
    (4_000_000,   _ANY,       6,    384,     256,         16,     0.2,     20),
    (_ANY,         3.2,       4,    128,     128,         16,     0.0,     20),
    (_ANY,        25.0,       4,    256,     256,         16,     0.0,     20),
    (_ANY,        _ANY,       6,    384,     256,         16,     0.0,     20),
)
# On a GPU, where nothing was measured, minutes are worth far more: a minute has the net of an hour.
_minutes = max_minutes if device == 'cpu' else _ANY
_row = next(row for row in _TABLE if _text.letters <= row[0] and _minutes <= row[1])
_, _, n_layer, n_embd, block_size, batch_size, dropout, _passes = _row
if device != 'cpu' and _text.letters > _SHORT:
    batch_size = 4 * batch_size   # keeps a GPU busy; a short text needs small steps, and many
n_head = n_embd // 64   # heads of 64 dimensions, GPT-2's size

# ---- the recipe, for all sizes -------------------------------------------------------------------
# modded-nanogpt's changes to GPT-2, as in speedrun_shakespeare_char.py (results/speed.md)
pos = 'rope'
qk_norm = True
activation = 'relu2'
zero_init = True
tie_weights = False
bias = False
optimizer = 'muon'
muon_learning_rate = 0.02
learning_rate = 2e-2   # AdamW's, for embeddings, head and norms
if n_embd > 256:
    learning_rate = 1e-2
weight_decay = 0.0
cooldown = 1.0         # after warm-up the rates fall to zero in a straight line
min_lr = 0.0

# ---- the tokens ----------------------------------------------------------------------------------
# The context is a number of letters. A token of GPT-2 stands for about four letters, a token of a
# BPE with 1,024 symbols for about two.
_letters_per_token = max(1, round(_text.letters / max(1, _text.tokens)))
block_size = block_size // _letters_per_token
block_size = max(1, min(block_size, _text.longest - 1))   # a window and the token behind it
if _text.symbols > 8192:
    # GPT-2's vocabulary: an embedding for each of 50,257 symbols is larger than the rest of such a
    # net, and most of the symbols are rare in a short text. So the head shares the embedding, with
    # a rate of about GPT-2's.
    tie_weights = True
    learning_rate = 3e-3

# ---- the steps -----------------------------------------------------------------------------------
# Two cores compute some 150 GFLOP/s with these nets. The steps are for a machine that is four times
# as fast. Such a machine takes all the minutes. A slower machine makes fewer steps, and its
# learning rate follows the clock. A flag replaces its own setting alone: with --batch_size, type
# --max_iters too.
_parameters = 12 * n_layer * n_embd**2 + n_embd * _text.symbols
_flops = 6 * _parameters + 12 * n_layer * n_embd * block_size   # a token, forward and backward
_speed = 1.5e11 if device == 'cpu' else 5e13                    # FLOP/s; a GPU's was not measured
_step = batch_size * block_size                                 # tokens
_most = 4 * 60 * max(0.0, max_minutes) * _speed / _flops / _step
max_iters = 1 + int(min(_most, _passes * _text.tokens / _step))
warmup_iters = max_iters // 50
eval_interval = 1 + max_iters // 25   # on two cores some six evaluations, if the time ends the run
eval_iters = 20
log_interval = 1 + max_iters // 100
sample_interval = eval_interval   # shows how the model learns to write
