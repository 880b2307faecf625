# The loss of OpenAI's GPT-2, 774M parameters, on the whole validation split of a dataset with its tokenizer.

init_from = 'gpt2-large'
dataset = 'shakespeare'
prepare = 'prepare_shakespeare.py --tokenizer=gpt2'   # run when the data is missing
eval_only = True
batch_size = 4
