# The loss of OpenAI's GPT-2 with 1.6B parameters, on a dataset's whole validation split.
# The dataset must be in GPT-2's BPE.

init_from = 'gpt2-xl'
dataset = 'shakespeare'
prepare = 'prepare_shakespeare.py --tokenizer=gpt2'   # run when the data is missing
eval_only = True
batch_size = 4
compile = False   # compiling takes longer than one pass over the split
