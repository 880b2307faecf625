"""
GPT-2, the whole of it, in one file. Copy it anywhere: it needs torch alone, and safetensors and
huggingface_hub for Hugging Face's files.

The letters used below and in every shape:
    B  batch, sequences side by side           C   n_embd, the width of a token's vector
    T  time, tokens in this call               nh  n_head, heads in a block
    S  keys: T, or the places in a cache       hs  head size, C / nh
    V  vocab_size

    idx (B, T) -> wte + wpe (B, T, C) -> n_layer blocks -> ln_f -> lm_head -> logits (B, T, V)

The logits at a position are the model's guess of the next token. Tokens meet each other in one
place only, the attention. All other layers work on each position alone. Names are those of GPT-2's
released weights and of Hugging Face's GPT2LMHeadModel: wte embeds tokens, wpe positions, h are the
blocks, c_attn and c_fc are the first matrices of attention and MLP, c_proj the last ones, ln is a
layer norm, and lm_head turns C numbers into V logits.

In reading order: the config, attention, MLP, block, GPT. A first reading can end after GPT.hidden.
After the class come the functions that its methods use: the cache and the choice of a token for
sampling, Hugging Face's files, the checks.
"""
import contextlib
import glob
import json
import math
import os
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# To add an activation, see docs/files.md.
ACTIVATIONS = dict(gelu=lambda x: F.gelu(x, approximate='tanh'),   # as GPT-2 was trained
                   gelu_erf=F.gelu,                                # exact, nanoGPT's
                   relu2=lambda x: F.relu(x).square())


@dataclass
class GPTConfig:
    """The shape of a GPT. The defaults are GPT-2 124M's.

    Raises ValueError for a shape that cannot exist."""
    block_size: int = 1024       # tokens of context
    vocab_size: int = 50257      # different tokens
    n_layer: int = 12            # blocks; with 0 and pos='none' the model is a bigram
    n_head: int = 12             # attention heads in a block
    n_embd: int = 768            # width
    dropout: float = 0.0         # share of activations dropped in training
    bias: bool = True            # biases in linears and norms
    # The defaults are GPT-2's. The other values are for measuring what each choice is worth.
    qkv_bias: bool = True        # bias of the QKV projection (needs bias)
    tie_weights: bool = True     # the head is the token embedding
    pos: str = 'learned'         # 'learned' | 'rope' | 'none'
    norm: str = 'pre'            # 'pre' | 'post' | 'none'
    residual: bool = True        # x + f(x), else f(x)
    qk_norm: bool = False        # unit RMS for queries and keys
    activation: str = 'gelu'     # one of ACTIVATIONS
    zero_init: bool = False      # residual branches and an untied head start at 0
    # settings that do not change what a trained model computes
    flash: bool = True           # fused attention, else the explicit formula
    label_smoothing: float = 0.0     # share of the target spread over the vocabulary
    layer_drop: float = 0.0      # probability that a sequence skips a residual branch
    grad_checkpointing: bool = False  # recompute blocks in backward: less memory, more time

    def __post_init__(self):
        check_config(self)


# ---- attention, twice: as the formula reads, and fused -------------------------------------------

def attention_weights(q, k, visible=None):
    """Return softmax(q·kᵀ/√hs) over the keys that a query may see; every row sums to 1.

    q (B, nh, T, hs), k (B, nh, S, hs) -> (B, nh, T, S). visible (T, S): True where the query may
    see the key. None: S = T, and each token sees itself and those before."""
    T = q.size(-2)
    if visible is None:
        visible = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))                       # (B, nh, T, S)
    return scores.masked_fill(~visible, float('-inf')).softmax(dim=-1)


def explicit_attention(q, k, v, dropout=0.0, visible=None):
    """Return each query's weighted mean of the values: the definition, and the tests' oracle."""
    return F.dropout(attention_weights(q, k, visible), dropout) @ v                # (B, nh, T, hs)


def fused_attention(q, k, v, dropout=0.0, visible=None):
    """Return the same without holding the (T, S) weights (flash attention, arXiv 2205.14135)."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout,
                                          is_causal=visible is None)


class CausalSelfAttention(nn.Module):
    """Let each token take something from the tokens before it.

    A token's query is compared with the key of every earlier token and its own. The better they
    match, the more of that token's value it takes. The nh heads do this apart from each other, on
    hs numbers each."""

    def __init__(self, config):
        super().__init__()
        qkv_bias = config.bias and config.qkv_bias
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=qkv_bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.drop = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.qk_norm = config.qk_norm
        # lib/fast.py (training on a CPU) and lib/decoding.py (sampling) set another function.
        self.attention = fused_attention if config.flash else explicit_attention

    def forward(self, x, rope=None, cache=None):
        """(B, T, C) -> (B, T, C).

        rope (2, T, 1, hs): the rows of rope_table for x's positions. cache: the LayerCache of the
        tokens before x."""
        B, T, C = x.shape
        nh = self.n_head
        qkv = self.c_attn(x).view(B, T, 3 * nh, C // nh)                         # (B, T, 3·nh, hs)
        qk, v = qkv.split((2 * nh, nh), dim=2)               # (B, T, 2·nh, hs), (B, T, nh, hs)
        if self.qk_norm:
            qk = F.rms_norm(qk, qk.shape[-1:])
        if rope is not None:
            qk = rotate(qk, *rope)
        q, k, v = (t.transpose(1, 2) for t in (*qk.chunk(2, dim=2), v))            # (B, nh, T, hs)
        visible = None
        if cache is not None:
            k, v, visible = cache.add(k, v)                      # (B, nh, S, hs), (T, S) or None
        dropout = self.drop.p if self.training else 0.0
        y = self.attention(q, k, v, dropout, visible)                              # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)               # the heads' outputs side by side
        return self.drop(self.c_proj(y))


def rotate(x, cos, sin):
    """Turn each pair (i, i + hs/2) of x (B, T, heads, hs) by its angle: rotary positions.

    cos and sin (T, 1, hs) are repeated for both halves; sin is negated in the first. Rolling is 1.6
    times as fast as slicing on a CPU. arXiv 2104.09864."""
    wide = x.float()
    return torch.addcmul(wide * cos, wide.roll(x.size(-1) // 2, dims=-1), sin).type_as(x)


def rope_table(config):
    """Return cosines and sines of the angles of every position, as rotate wants them.

    (2, block_size, 1, hs); the angles are position · 10000^(-2i/hs)."""
    hs = config.n_embd // config.n_head
    # on the CPU even while with_weights builds on 'meta'
    positions = torch.arange(config.block_size, device='cpu')
    frequencies = 10000.0 ** -(torch.arange(0, hs, 2, device='cpu') / hs)
    angle = torch.outer(positions, frequencies)                                 # (block_size, hs/2)
    cos = angle.cos().repeat(1, 2)
    sin = torch.cat((-angle.sin(), angle.sin()), dim=1)
    return torch.stack((cos, sin))[:, :, None]


# ---- the other layers ----------------------------------------------------------------------------

class MLP(nn.Module):
    """Change each token's vector by itself: to four times the width, bend it, and back."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.drop = nn.Dropout(config.dropout)
        self.activation = ACTIVATIONS[config.activation]   # lib/fast.py has a faster gelu

    def forward(self, x):
        """(B, T, C) -> (B, T, C)."""
        x = self.c_fc(x)                                                           # (B, T, 4C)
        x = self.activation(x)
        return self.drop(self.c_proj(x))                                           # (B, T, C)


class Block(nn.Module):
    """Add what attention and then the MLP find to the stream of vectors x."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = layer_norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = layer_norm(config)
        self.mlp = MLP(config)
        self.norm = config.norm
        self.residual = config.residual
        self.layer_drop = config.layer_drop

    def forward(self, x, rope=None, cache=None):
        """(B, T, C) -> (B, T, C)."""
        if self.norm == 'pre' and self.residual and not self.layer_drop:
            # GPT-2's block, written out; branch computes the same
            x = x + self.attn(self.ln_1(x), rope, cache)
            return x + self.mlp(self.ln_2(x))
        x = self.branch(x, self.ln_1, lambda y: self.attn(y, rope, cache))
        return self.branch(x, self.ln_2, self.mlp)

    def branch(self, x, norm, sublayer):
        """Return x + sublayer(norm(x)) with the config's changes to it; (B, T, C) -> (B, T, C)."""
        y = sublayer(norm(x) if self.norm == 'pre' else x)
        if self.layer_drop and self.training:   # scaled up so that the mean stays the same
            keep = torch.rand(x.size(0), 1, 1, device=x.device) >= self.layer_drop     # (B, 1, 1)
            y = y * keep / (1 - self.layer_drop)
        if self.residual:
            y = x + y
        return norm(y) if self.norm == 'post' else y


def layer_norm(config):
    if config.norm == 'none':
        return nn.Identity()
    return nn.LayerNorm(config.n_embd, bias=config.bias)


def call(module, *inputs):
    """Return module(*inputs): how hidden calls a block, and next_logits the head.

    lib/decoding.py passes a function that calls their compiled code in place of this one."""
    return module(*inputs)


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        # Tokens that sampling may draw. Scripts lower it to the tokenizer's number of tokens where
        # vocab_size is rounded up for speed.
        self.drawable = config.vocab_size
        # Placeholders keep the modules in GPT-2's order.
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Identity(),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.Identity(),
        ))
        if config.pos == 'learned':
            self.transformer.wpe = nn.Embedding(config.block_size, config.n_embd)
        if config.norm == 'pre':   # with 'post' the last block has just normalized
            self.transformer.ln_f = layer_norm(config)
        self.drop = nn.Dropout(config.dropout)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.pos == 'rope':
            self.register_buffer('rope', rope_table(config), persistent=False)
        self.init_weights()
        if config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight

    def init_weights(self):
        """Draw the matrices from a normal distribution of mean 0 and standard deviation 0.02.

        For the 2·n_layer matrices that add to the residual stream it is 0.02/√(2·n_layer). Biases
        start at 0, and the weights of norms stay 1."""
        c = self.config
        for name, p in self.named_parameters():
            std = 0.02
            if name.endswith('c_proj.weight'):
                std = 0.02 / math.sqrt(2 * c.n_layer)
            if c.zero_init and name.endswith(('c_proj.weight', 'lm_head.weight')):
                nn.init.zeros_(p)
            elif p.dim() == 2:
                nn.init.normal_(p, std=std)
            elif name.endswith('bias'):
                nn.init.zeros_(p)

    def forward(self, idx, targets=None):
        """Return (logits (B, T, V), the mean loss in nats or None).

        idx (B, T) int64, T <= block_size. targets (B, T): the token that follows each one of idx;
        -1 is ignored."""
        logits = self.lm_head(self.hidden(idx))                                    # (B, T, V)
        if targets is None:
            return logits, None
        smoothing = self.config.label_smoothing if self.training else 0.0
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1,
                               label_smoothing=smoothing)
        return logits, loss

    def hidden(self, idx, cache=None, run=call):
        """Return the vectors that the head reads: (B, T) -> (B, T, C).

        cache: a Cache; idx follows the tokens in it. run: calls a block; see `call`."""
        T = idx.size(1)
        past = 0 if cache is None else cache.length
        if past + T > self.config.block_size:
            raise ValueError(f'{past + T} tokens do not fit block_size={self.config.block_size}; '
                             f'pass the last ones')
        position = slice(0, T)   # a slice or a tensor: both can index rows
        caches = [None] * self.config.n_layer
        if cache is not None:
            position = cache.begin(T)                                              # (T,)
            caches = cache.layers
        x = self.transformer.wte(idx)                                              # (B, T, C)
        if self.config.pos == 'learned':
            x = x + self.transformer.wpe.weight[position]
        x = self.drop(x)
        rope = None
        if self.config.pos == 'rope':
            rope = self.rope[:, position]                                          # (2, T, 1, hs)
        for block, layer_cache in zip(self.transformer.h, caches):
            if self.config.grad_checkpointing and self.training:   # training has no cache
                x = checkpoint(block, x, rope, use_reentrant=False)
            else:
                x = run(block, x, rope, layer_cache)
        return self.transformer.ln_f(x)

    # ---- other ways to compute the same: see lib/fast.py, decoding.py and inside.py -------------

    def set_attention(self, attention):
        """Give all blocks another attention function, or some blocks with {number: function}.

        attention(q, k, v, dropout=0.0, visible=None) must return what fused_attention returns."""
        if not isinstance(attention, dict):
            attention = dict.fromkeys(range(self.config.n_layer), attention)
        for layer, function in attention.items():
            self.transformer.h[layer].attn.attention = function

    @contextlib.contextmanager
    def using_attention(self, attention):
        """Call set_attention for the length of a `with` block."""
        before = {i: block.attn.attention for i, block in enumerate(self.transformer.h)}
        try:
            self.set_attention(attention)
            yield
        finally:
            self.set_attention(before)

    def set_activation(self, activation):
        """Let all blocks compute the MLP's activation with another function of a tensor."""
        for block in self.transformer.h:
            block.mlp.activation = activation

    def set_dropout(self, kind):
        """Replace every nn.Dropout by kind(p).

        The attention functions draw the masks of attention's weights themselves."""
        self.drop = kind(self.drop.p)
        for block in self.transformer.h:
            block.attn.drop = kind(block.attn.drop.p)
            block.mlp.drop = kind(block.mlp.drop.p)

    # ---- sampling --------------------------------------------------------------------------------

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None,
                 repetition_penalty=1.0, stop=None, generator=None, kv_cache=True):
        """Continue every row of idx (B, T); return (B, T + new). sample.py uses stream instead.

        temperature: 0 takes the likeliest token. top_k: keep the k likeliest. top_p: keep the
        fewest tokens that hold this share of the probability. stop: a token id or several; a row
        that draws one repeats it, and the call ends when all rows have.
        generator: a row's draws depend on it and on the row's number alone.
        kv_cache: changes the speed and not the text.
        Raises ValueError for knobs or a prompt that mean nothing."""
        self.check_prompt(idx)
        was_training = self.training
        stop = torch.as_tensor([] if stop is None else stop, device=idx.device).view(-1)
        done = torch.zeros(idx.size(0), 1, dtype=torch.bool, device=idx.device)
        device = 'cpu' if generator is None else generator.device
        first_seed = 0
        if temperature:   # greedy text leaves the generator as it is
            first_seed = int(torch.randint(2**62, (), generator=generator, device=device))
        seeds = [first_seed + row for row in range(idx.size(0))]
        chance = chances(seeds, max(0, max_new_tokens)).to(idx.device)             # (B, new)
        sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
        tokens = [idx]
        self.eval()
        try:
            for new in self.stream(idx, max_new_tokens, sampling, chance, kv_cache):
                # a row that has stopped repeats its last token, whatever stream goes on with
                last = tokens[-1][:, -1:]                                          # (B, 1)
                tokens.append(torch.where(done, last, new))
                done = done | torch.isin(tokens[-1], stop)
                if stop.numel() and done.all():
                    break
        finally:
            self.train(was_training)
        return torch.cat(tokens, dim=1)

    @torch.inference_mode()
    def stream(self, idx, max_new_tokens, sampling, chance=None, kv_cache=True, step=None):
        """Yield the next token of every text, (rows, 1), max_new_tokens times.

        The model must be in eval mode. idx (B, T): the prompt. sampling: a Sampling. chance
        (B, max_new_tokens): numbers from [0, 1) that decide the draws above temperature 0. A single
        prompt can be continued several times: idx (1, T) and one row of chance per sample.
        step: a function that computes what GPT.next_token computes, while the cache serves;
        lib/decoding.py has faster ones. Beyond block_size GPT.next_token itself reads the whole
        window for each token."""
        self.check_prompt(idx)
        if max_new_tokens < 0:
            raise ValueError(f'max_new_tokens={max_new_tokens}: allowed is 0 or more; '
                             f'type --max_new_tokens=500')
        block_size = self.config.block_size
        rows = idx.size(0) if chance is None else chance.size(0)
        step = step or GPT.next_token
        seen = torch.zeros(rows, self.config.vocab_size, dtype=torch.bool, device=idx.device)
        seen.scatter_(1, idx.expand(rows, -1), True)                               # (rows, V)
        window = idx[:, -block_size:]     # all that the model can look at
        unread = window                   # tokens that the cache does not hold
        cache = None
        if kv_cache and idx.size(1) <= block_size:
            cache = Cache(self.config, idx.device)
        for i in range(max_new_tokens):
            if cache and cache.length == block_size:
                cache = None   # all positions shift now; cached keys would be at the wrong ones
            now = None if chance is None else chance[:, i:i + 1]                   # (B, 1)
            if cache is None:
                new = self.next_token(window, None, seen, now, sampling)           # (B, 1)
            else:
                new = step(self, unread, cache, seen, now, sampling)               # (B, 1)
                if unread.size(0) < rows:
                    cache.expand(rows)
                cache.advance(unread.size(1))
            unread = new
            window = torch.cat((window.expand(rows, -1), new), dim=1)[:, -block_size:]
            seen.scatter_(1, new, True)
            yield new

    def next_token(self, idx, cache, seen, chance, sampling, run=call):
        """Return the next token of every text, (B, 1): one step of sampling.

        idx (B, T): the prompt, the newest token, or without a cache the whole window. A prompt
        (1, T) serves all texts. seen (B, V): True for the tokens that occurred. chance (B, 1):
        numbers from [0, 1), or None at temperature 0."""
        logits = self.next_logits(idx, cache, run)                                 # (B, drawable)
        logits = logits.expand(seen.size(0), -1)   # a single prompt serves all texts
        return choose(logits, seen[:, :self.drawable], chance, sampling)

    def next_logits(self, idx, cache=None, run=call):
        """Return the logits of the token after idx (B, T), in fp32: (B, self.drawable)."""
        x = self.hidden(idx, cache, run)[:, -1]                                    # (B, C)
        return run(self.lm_head, x)[:, :self.drawable].float()

    def check_prompt(self, idx):
        """Raise ValueError for a prompt that is empty or holds tokens that do not exist."""
        if idx.dim() != 2 or not idx.numel():
            raise ValueError(f'a prompt of shape {tuple(idx.shape)}: '
                             f'idx is (B, T) with one token or more')
        if not 0 <= idx.min() <= idx.max() < self.config.vocab_size:
            raise ValueError(f'idx holds {int(idx.min())} to {int(idx.max())}: '
                             f'tokens are 0 to {self.config.vocab_size - 1}')

    # ---- what training asks of a model -----------------------------------------------------------

    def num_params(self):
        """Return the number of parameters, a tied matrix counted once: 124,439,808 for GPT-2."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self):
        """Return the FLOPs of a token's forward and backward pass, as PaLM counts them.

        2 forward and 4 backward for each parameter of linears, norms and biases; looking up an
        embedding costs nothing. 12·C·block_size in each block for the products of attention, as
        if the future were not masked (arXiv 2204.02311, appendix B)."""
        c = self.config
        multiplied = self.num_params()
        if c.pos == 'learned':
            multiplied -= self.transformer.wpe.weight.numel()
        if not c.tie_weights:
            multiplied -= self.transformer.wte.weight.numel()
        return 6 * multiplied + 12 * c.n_layer * c.n_embd * c.block_size

    def optimizer_groups(self, weight_decay):
        """Return AdamW's parameter groups: matrices and embeddings decay, vectors do not."""
        matrices = [p for p in self.parameters() if p.dim() >= 2]
        vectors = [p for p in self.parameters() if p.dim() < 2]
        return [dict(params=matrices, weight_decay=weight_decay),
                dict(params=vectors, weight_decay=0.0)]

    # ---- Hugging Face's files --------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, name, dropout=None, block_size=None, **training):
        """Return a GPT-2 in fp32, on the CPU, from Hugging Face's hub or a folder.

        name: 'gpt2', 'distilgpt2', 'owner/name', or a path. dropout: None for the saved one.
        block_size: fewer positions than the saved ones. training: GPTConfig's training fields.
        Raises OSError for files that cannot be fetched or read, ValueError if it is not a GPT-2."""
        folder = fetch_pretrained(name)
        hf = read_hf_config(folder)
        check_hf_config(name, hf, dropout)
        fields = {ours: hf[theirs] for theirs, (ours, _) in HF_FIELDS.items()}
        if block_size is not None and block_size > fields['block_size']:
            raise ValueError(f'block_size={block_size}, but {name} knows '
                             f'{fields["block_size"]} positions')
        if block_size is not None:
            fields['block_size'] = block_size
        fields['activation'] = HF_ACTIVATIONS[hf['activation_function']]
        fields['dropout'] = hf['resid_pdrop'] if dropout is None else dropout
        weights = {}
        for key, p in transposed(read_hf_weights(name, folder)).items():
            if key.endswith(('.attn.bias', '.attn.masked_bias')):   # causal masks
                continue
            if not key.startswith(('transformer.', 'lm_head.')):  # GPT-2's own files have no prefix
                key = f'transformer.{key}'
            weights[key] = p
        if 'transformer.wpe.weight' in weights:
            positions = weights['transformer.wpe.weight']
            weights['transformer.wpe.weight'] = positions[:fields['block_size']].clone()
        return cls.with_weights(GPTConfig(**fields, **training), weights)

    @classmethod
    def with_weights(cls, config, weights):
        """Return a GPT that takes over the tensors of a state dict, in fp32.

        Raises ValueError naming the tensors that do not fit."""
        if config.n_layer > len(weights):   # making millions of blocks would take hours
            raise ValueError(f'n_layer={config.n_layer}, and there are {len(weights)} tensors')
        with torch.device('meta'):   # nothing is allocated and nothing drawn
            model = cls(config)
        if config.tie_weights and 'transformer.wte.weight' in weights:
            weights = {**weights, 'lm_head.weight': weights['transformer.wte.weight']}
        have = shapes(weights)
        want = shapes(model.state_dict())
        wrong = []
        for name in {**want, **weights}:
            if name not in have or have[name] != want.get(name):
                wrong.append(f'{name}: {have.get(name, "no tensor")} where '
                             f'{want.get(name, "none")} is expected')
        if len(wrong) > 4:
            wrong[4:] = [f'and {len(wrong) - 4} more']
        if wrong:
            raise ValueError('; '.join(wrong))
        if not all(p.is_floating_point() and p.isfinite().all() for p in weights.values()):
            raise ValueError('some of the weights are not finite numbers')
        model.load_state_dict({name: p.float() for name, p in weights.items()}, assign=True)
        if config.tie_weights:   # assign=True has untied them
            model.lm_head.weight = model.transformer.wte.weight
        return model

    def save_pretrained(self, folder, end='auto'):
        """Write config.json, generation_config.json and model.safetensors for transformers.

        end: the id of <|endoftext|>, or None; 'auto': GPT-2's, if the vocabulary has it. Absent
        biases become zeros, which computes the same. Raises ValueError for a model that GPT-2
        cannot express, OSError where the folder cannot be written."""
        # here: the rest of this file needs torch alone
        from safetensors import SafetensorError
        from safetensors.torch import save_file
        c = self.config
        other = []
        for name, needed in dict(pos='learned', norm='pre', residual=True, qk_norm=False).items():
            if getattr(c, name) != needed:
                other.append(f'{name}={getattr(c, name)!r}')
        if c.activation not in HF_ACTIVATIONS.values():
            allowed = ', '.join(dict.fromkeys(HF_ACTIVATIONS.values()))
            raise ValueError(f'transformers has no activation={c.activation!r}; allowed are '
                             f'{allowed}')
        if other:
            raise ValueError(f"GPT-2 has no {', '.join(other)}: "
                             f"Hugging Face's GPT2LMHeadModel would compute something else")
        weights = {name: p.detach().float().cpu() for name, p in self.state_dict().items()}
        if c.tie_weights:
            del weights['lm_head.weight']
        for name, p in list(weights.items()):
            bias = name.removesuffix('weight') + 'bias'
            has_bias_in_gpt2 = name.startswith(('transformer.h.', 'transformer.ln_f.'))
            if has_bias_in_gpt2 and name.endswith('weight') and bias not in weights:
                weights[bias] = torch.zeros(p.size(0))   # (out,): p is still (out, in)
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, 'model.safetensors')
        try:
            save_file(transposed(weights), path, metadata=dict(format='pt'))
        except SafetensorError as error:   # a full disk
            raise OSError(str(error)) from error
        if end == 'auto':
            end = end_of_text(c)
        for name, content in (('generation_config', hf_generation_config(self, end)),
                              ('config', hf_config(c, end))):
            with open(os.path.join(folder, f'{name}.json'), 'w', encoding='utf-8') as f:
                json.dump(content, f, indent=1)
        # safetensors lets only the owner read its file; config.json has the user's usual rights
        os.chmod(path, os.stat(os.path.join(folder, 'config.json')).st_mode)


# ---- the cache of a text -------------------------------------------------------------------------

class Cache:
    """The keys and values of the tokens read so far, which are not computed again.

    The prompt is read first, then one token at a time. Each time hidden calls begin, every layer
    calls add, and stream calls advance.

    There is room for tokens to come, which no query sees yet. So a step has the same shapes for
    many tokens. The position of the next token is a tensor, not a number in the code. So one
    compiled step serves all these tokens, and so does one CUDA graph, a recording of a GPU's work
    that is replayed (as in github.com/pytorch-labs/gpt-fast)."""

    def __init__(self, config, device):
        on_cpu = torch.device(device).type == 'cpu'
        # Room is made for so many tokens at a time. Each new size needs a CUDA graph of its own.
        self.span = 64 if on_cpu else 256
        self.all_positions = torch.arange(config.block_size, device=device)
        self.length = 0                     # tokens read
        self.start = self.all_positions[:1].clone()   # the same number, as a tensor (1,)
        self.room = 0                       # places for tokens, S; 0 before the prompt is read
        self.position = None                # (T,), of the tokens that are being read
        self.visible = None                 # (T, S), or None while the prompt is read
        self.layers = [LayerCache(self) for _ in range(config.n_layer)]

    def begin(self, T):
        """Return the positions (T,) of the tokens to be read, and note what they see."""
        self.position = self.start + self.all_positions[:T]
        self.visible = None
        if self.length:
            self.visible = self.all_positions[:self.room] <= self.position[:, None]    # (T, S)
        return self.position

    def advance(self, T):
        """Count T tokens as read, and have room for the next one."""
        self.length += T
        self.start.fill_(self.length)
        if self.length >= self.room:
            spans = self.length // self.span + 1
            self.room = min(len(self.all_positions), spans * self.span)
            more = self.room - self.length
            for layer in self.layers:   # append empty places
                layer.k = F.pad(layer.k, (0, 0, 0, more))                          # (B, nh, S, hs)
                layer.v = F.pad(layer.v, (0, 0, 0, more))

    def expand(self, rows):
        """Repeat the single prompt that was read, so that `rows` texts can continue it.

        The repeated keys and values share their memory until advance copies them."""
        for layer in self.layers:
            layer.k = layer.k.expand(rows, -1, -1, -1)
            layer.v = layer.v.expand(rows, -1, -1, -1)


class LayerCache:
    """One layer's part of a Cache: k and v (B, nh, S, hs)."""

    def __init__(self, cache):
        self.cache = cache
        self.k = None
        self.v = None

    def add(self, k, v):
        """Add T tokens' k and v (B, nh, T, hs).

        Return all keys and values, (B, nh, S, hs), and which of them each query sees, (T, S). For a
        prompt S is T, and the latter is None, as in fused_attention."""
        if self.cache.visible is None:   # a prompt
            self.k = k
            self.v = v
        else:
            self.k.index_copy_(2, self.cache.position, k)
            self.v.index_copy_(2, self.cache.position, v)
        return self.k, self.v, self.cache.visible


# ---- from logits to a token ----------------------------------------------------------------------

@dataclass
class Sampling:
    """How a token is chosen. Raises ValueError for a setting that means nothing."""
    temperature: float = 1.0          # 0 takes the likeliest token
    top_k: int | None = None          # keep the k likeliest tokens
    top_p: float | None = None        # keep the fewest tokens that hold this share
    repetition_penalty: float = 1.0   # above 1: tokens that occurred are less likely

    def __post_init__(self):
        check_sampling(self)


def choose(logits, seen, chance, sampling):
    """Return the next token (B, 1) from logits (B, V).

    seen (B, V): True for tokens of the text so far. At temperature 0 the token is the likeliest,
    else the one that chance (B, 1) picks."""
    if sampling.temperature == 0:
        return penalized(logits, seen, sampling).argmax(dim=1, keepdim=True)
    if chance is None:
        raise ValueError(f'temperature={sampling.temperature} needs chance to draw, but chance is '
                         f'None; pass chances(seeds, max_new_tokens)')
    return draw(probabilities(logits, seen, sampling), chance)


def probabilities(logits, seen, sampling):
    """Return what the next token is drawn from, (B, V): rows that sum to 1.

    logits and seen (B, V). Penalty, temperature (above 0), top_k and top_p apply in this order,
    with the meaning that transformers gives them."""
    logits = penalized(logits, seen, sampling)
    # the largest is 0 now, so that a tiny temperature cannot make it infinite
    logits = logits - logits.amax(dim=1, keepdim=True)
    logits = logits / max(sampling.temperature, 1e-20)
    top_k = sampling.top_k
    if top_k is not None and top_k < logits.size(1):
        kept = logits.topk(top_k)   # exactly k, also on ties
        logits = torch.full_like(logits, float('-inf')).scatter(1, kept.indices, kept.values)
    top_p = sampling.top_p
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True)
        shares = ordered.softmax(dim=1)
        likelier = shares.cumsum(dim=1) - shares   # probability of the tokens before
        beyond = (likelier >= top_p) & (likelier > 0)   # a top_p that rounds to 0 keeps one token
        beyond = beyond.scatter(1, order, beyond)   # from sorted order back to tokens' order
        logits = logits.masked_fill(beyond, float('-inf'))
    return logits.softmax(dim=1)


def penalized(logits, seen, sampling):
    """Return logits (B, V) with the tokens seen (B, V) less likely (CTRL, arXiv 1909.05858)."""
    penalty = sampling.repetition_penalty
    if penalty == 1.0:
        return logits
    lower = torch.where(logits < 0, logits * penalty, logits / penalty)
    # finite, as probabilities subtracts the largest logit, and inf - inf is not a number
    return torch.where(seen, lower.clamp(-1e30, 1e30), logits)


def chances(seeds, count):
    """Return uniform numbers from [0, 1), (len(seeds), count), on the CPU.

    A row depends on its seed alone, and is the same on every device."""
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        rows.append(torch.rand(count, generator=generator, dtype=torch.float64))
    # rounding to fp32 may give 1, which is out of range; 1 - 2^-24 is the largest number below
    return torch.stack(rows).float().clamp(max=1 - 2**-24)


def draw(probs, chance):
    """Return the token (B, 1) at which the running sum of probs (B, V) passes chance (B, 1)."""
    device = probs.device
    precise = torch.float32 if device.type == 'mps' else torch.float64   # MPS has no float64
    if torch.are_deterministic_algorithms_enabled():   # a GPU's cumsum is not, and would raise
        probs = probs.cpu()
        chance = chance.cpu()
    mass = probs.to(precise).cumsum(dim=1)                                         # (B, V)
    # right=True: never a token of probability 0
    drawn = torch.searchsorted(mass, chance.to(precise) * mass[:, -1:], right=True)
    # rounding may have taken the product to the whole mass
    return drawn.clamp(max=probs.size(1) - 1).to(device)


# ---- Hugging Face's config and weights -----------------------------------------------------------

# our fields by Hugging Face's names in config.json, with their defaults
HF_FIELDS = dict(n_positions=('block_size', 1024), vocab_size=('vocab_size', 50257),
                 n_layer=('n_layer', 12), n_head=('n_head', 12), n_embd=('n_embd', 768),
                 tie_word_embeddings=('tie_weights', True))
# settings that every GPT-2 must have
HF_FIXED = dict(layer_norm_epsilon=1e-5, scale_attn_weights=True,
                scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
# our activations by Hugging Face's names; its "gelu" is the exact form
HF_ACTIVATIONS = dict(gelu_new='gelu', gelu_pytorch_tanh='gelu', gelu='gelu_erf', relu2='relu2')
# matrices that Hugging Face's Conv1D keeps as (in, out)
HF_TRANSPOSED = ('attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight')


def fetch_pretrained(name):
    """Return a local folder with config.json, weights and tokenizer files.

    It is `name` itself, or the folder in which huggingface_hub keeps what it downloads."""
    if os.path.isdir(name):
        return name
    from huggingface_hub import snapshot_download  # here: only a hub name needs it
    files = ['config.json', 'model*.safetensors', 'tokenizer.json', 'vocab.json']
    return snapshot_download(name, allow_patterns=files)


def read_hf_config(folder):
    """Return a folder's config.json, with transformers' defaults for the settings it leaves out."""
    with open(os.path.join(folder, 'config.json'), encoding='utf-8') as f:
        hf = json.load(f)
    defaults = {theirs: default for theirs, (_, default) in HF_FIELDS.items()}
    defaults |= HF_FIXED
    defaults |= dict(model_type=None, activation_function='gelu_new', resid_pdrop=0.1)
    return defaults | (hf if isinstance(hf, dict) else {})


def check_hf_config(name, hf, dropout):
    """Raise ValueError, naming the settings, for a config.json that is not a supported GPT-2's."""
    other = []
    for key, value in {'model_type': 'gpt2', **HF_FIXED}.items():
        if hf[key] != value:
            other.append(key)
    for key, (_, default) in HF_FIELDS.items():
        if type(hf[key]) is not type(default):
            other.append(key)
    if not other and hf.get('n_inner') not in (None, 4 * hf['n_embd']):
        other.append('n_inner')
    if hf['activation_function'] not in tuple(HF_ACTIVATIONS):
        other.append('activation_function')
    if dropout is None and type(hf['resid_pdrop']) not in (int, float):
        other.append('resid_pdrop')
    if other:
        settings = ', '.join(f'{key}={hf[key]!r}' for key in other)
        raise ValueError(f'{name} is not a supported GPT-2: {settings}')


def read_hf_weights(name, folder):
    """Return the tensors of a folder's model*.safetensors.

    Raises ValueError where there are none or they cannot be read."""
    from safetensors.torch import load_file  # here: the rest of this file needs torch alone
    weights = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), 'model*.safetensors'))):
        try:
            weights.update(load_file(path))
        except Exception as error:   # a damaged file can raise more than SafetensorError
            raise ValueError(f'{path} cannot be read: {error}') from error
    if not weights:
        raise ValueError(f"{name} has no model.safetensors; "
                         f"transformers' save_pretrained writes one")
    return weights


def hf_config(config, end):
    """Return the content of config.json for a GPTConfig that GPT-2 can express.

    end: the id of <|endoftext|>, or None."""
    # reversed: of two names for one function, the first stays
    names = {ours: theirs for theirs, ours in reversed(HF_ACTIVATIONS.items())}
    hf = {theirs: getattr(config, ours) for theirs, (ours, _) in HF_FIELDS.items()}
    return hf | HF_FIXED | dict(
        model_type='gpt2', architectures=['GPT2LMHeadModel'], bos_token_id=end, eos_token_id=end,
        dtype='float32', activation_function=names[config.activation], resid_pdrop=config.dropout,
        embd_pdrop=config.dropout, attn_pdrop=config.dropout)


def hf_generation_config(model, end):
    """Return the content of generation_config.json: generate must not draw padding tokens."""
    content = dict(bos_token_id=end, eos_token_id=end)
    padding = list(range(model.drawable, model.config.vocab_size))
    if padding:
        content['suppress_tokens'] = padding
    return content


def end_of_text(config):
    """Return the id of GPT-2's <|endoftext|>, None for a vocabulary smaller than GPT-2's."""
    return 50256 if config.vocab_size > 50256 else None


def transposed(weights):
    """Return a state dict with Conv1D's matrices transposed; doing it again gives the original."""
    turned = {}
    for name, p in weights.items():
        if name.endswith(HF_TRANSPOSED) and p.dim() == 2:
            p = p.T
        turned[name] = p.contiguous()
    return turned


def shapes(tensors):
    """Return {name: shape} of the entries of a state dict that are tensors."""
    return {name: tuple(p.shape) for name, p in tensors.items() if isinstance(p, torch.Tensor)}


# ---- checks --------------------------------------------------------------------------------------

def check_config(config):
    """Raise ValueError for a GPTConfig that cannot exist."""
    for name, least in dict(block_size=1, vocab_size=1, n_layer=0, n_head=1, n_embd=1).items():
        value = getattr(config, name)
        if value < least:
            raise ValueError(f'{name}={value}: it must be {least} or more; '
                             f'type --{name}={getattr(GPTConfig, name)}')
    if config.n_embd % config.n_head:
        divisors = [n for n in range(1, min(config.n_embd, 1000) + 1) if config.n_embd % n == 0]
        nearest = min(divisors, key=lambda n: abs(n - config.n_head))
        raise ValueError(f'n_embd={config.n_embd} is not divisible by n_head={config.n_head}: '
                         f'every head gets an equal share of the width; type --n_head={nearest}')
    words = dict(pos=('learned', 'rope', 'none'), norm=('pre', 'post', 'none'),
                 activation=tuple(ACTIVATIONS))
    for name, allowed in words.items():
        value = getattr(config, name)
        if value not in allowed:
            raise ValueError(f"{name}={value!r}: allowed are {', '.join(allowed)}; "
                             f"type --{name}={allowed[0]}")
    for name in ('dropout', 'label_smoothing', 'layer_drop'):
        value = getattr(config, name)
        if not 0 <= value < 1:
            raise ValueError(f'{name}={value}: it must be at least 0 and below 1; type --{name}=0')
    if config.layer_drop and not config.residual:
        raise ValueError('layer_drop skips a residual branch and residual=False has none; '
                         'type --layer_drop=0')
    hs = config.n_embd // config.n_head
    if config.pos == 'rope' and hs % 2:
        raise ValueError(f"pos='rope' turns pairs of numbers and the head size n_embd/n_head "
                         f"= {hs} is odd, not even; type --pos=learned")


def check_sampling(sampling):
    """Raise ValueError for a Sampling that means nothing."""
    def require(good, name, allowed):
        if not good:
            raise ValueError(f'{name}={getattr(sampling, name)!r}: allowed is {allowed}')

    top_k = sampling.top_k
    top_p = sampling.top_p
    require(sampling.temperature >= 0, 'temperature', '0 or more; type --temperature=0.8')
    require(top_k is None or type(top_k) is int and top_k >= 1, 'top_k',
            'None or 1 or more; type --top_k=20')
    require(top_p is None or not isinstance(top_p, str) and 0 < top_p <= 1, 'top_p',
            'in (0, 1]; type --top_p=0.9')
    require(sampling.repetition_penalty > 0, 'repetition_penalty',
            'above 0; type --repetition_penalty=1.0')
