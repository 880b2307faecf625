"""
GPT-2, the whole of it, in one file that needs torch alone: copy it anywhere and it works. (Hugging Face's files are read by
huggingface_hub and safetensors, imported where that is done.)

The letters used below and in every shape:
    B  batch, sequences side by side           C   n_embd, the width of a token's vector
    T  time, tokens in this call               nh  n_head, heads in a layer
    S  tokens a query can look at (T + cached) hs  head size, C / nh
    V  vocab_size

    idx (B, T) -> wte + wpe (B, T, C) -> n_layer blocks (B, T, C) -> ln_f -> lm_head -> logits (B, T, V)

Tokens meet each other in one place only, the attention; everything else works on each position by itself.
Names are those of GPT-2's released weights and of Hugging Face's GPT2LMHeadModel.
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

ACTIVATIONS = dict(gelu=lambda x: F.gelu(x, approximate='tanh'), gelu_erf=F.gelu, relu2=lambda x: F.relu(x).square())

# Hugging Face's config.json: its names for our fields, with the value of one that it leaves out; what must be so in any GPT-2
# that is read here; its names of activations; and the matrices that its Conv1D keeps as (in, out)
HF_FIELDS = dict(n_positions=('block_size', 1024), vocab_size=('vocab_size', 50257), n_layer=('n_layer', 12),
                 n_head=('n_head', 12), n_embd=('n_embd', 768), tie_word_embeddings=('tie_weights', True))
HF_FIXED = dict(layer_norm_epsilon=1e-5, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False,
                add_cross_attention=False)
HF_ACTIVATIONS = dict(gelu_new='gelu', gelu_pytorch_tanh='gelu', gelu='gelu_erf', relu2='relu2')
HF_TRANSPOSED = ('attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight')


@dataclass
class GPTConfig:
    """The shape of a GPT. The defaults are GPT-2 124M's. Raises ValueError for a shape that cannot exist."""
    block_size: int = 1024       # tokens of context
    vocab_size: int = 50257
    n_layer: int = 12            # 0 is a bigram model: embedding, norm, head
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True            # biases in linears and norms
    # what GPT-2 fixed, each read on one line below so that its worth can be measured
    qkv_bias: bool = True        # bias of the QKV projection (needs bias)
    tie_weights: bool = True     # the head is the token embedding
    pos: str = 'learned'         # 'learned' | 'rope' | 'none'
    norm: str = 'pre'            # 'pre' | 'post' | 'none'
    residual: bool = True        # x + f(x), else f(x)
    qk_norm: bool = False        # unit RMS for queries and keys
    activation: str = 'gelu'     # 'gelu' (tanh form, as GPT-2 was trained) | 'gelu_erf' (exact, as nanoGPT's) | 'relu2'
    zero_init: bool = False      # residual branches and an untied head start at 0, else GPT-2's N(0, 0.02)
    # how it is trained; none of these changes what the finished model computes
    flash: bool = True           # fused attention, else the explicit formula
    label_smoothing: float = 0.0
    layer_drop: float = 0.0      # probability that a sequence skips a residual branch (stochastic depth)
    grad_checkpointing: bool = False  # recompute each block in the backward pass: less memory, a third more work

    def __post_init__(self):
        for name, least in dict(block_size=1, vocab_size=1, n_layer=0, n_head=1, n_embd=1).items():
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name}={value}: it must be {least} or more; type --{name}={getattr(GPTConfig, name)}")
        if self.n_embd % self.n_head:
            equal = [n for n in range(1, min(self.n_embd, 1000) + 1) if self.n_embd % n == 0]
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}: every head gets an equal share "
                             f"of the width; type --n_head={min(equal, key=lambda n: abs(n - self.n_head))}")
        for name, allowed in dict(pos=('learned', 'rope', 'none'), norm=('pre', 'post', 'none'),
                                  activation=tuple(ACTIVATIONS)).items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name}={value!r}: allowed are {', '.join(allowed)}; type --{name}={allowed[0]}")
        for name in ('dropout', 'label_smoothing', 'layer_drop'):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value}: it must be at least 0 and below 1; type --{name}=0")
        if self.layer_drop and not self.residual:
            raise ValueError("layer_drop skips a residual branch and residual=False has none; type --layer_drop=0")
        if self.pos == 'rope' and self.n_embd // self.n_head % 2:
            raise ValueError(f"pos='rope' turns pairs of numbers and the head size n_embd/n_head = "
                             f"{self.n_embd // self.n_head} is odd, not even; type --pos=learned")


# ---- attention, twice: as the formula reads, and fused -------------------------------------------------------------

def attention_weights(q, k):
    """softmax(q·kᵀ/√hs) with the future masked: (B, nh, T, hs), (B, nh, S, hs) -> (B, nh, T, S), every row sums to 1.

    The last query sits on the last key, so with S > T the first S - T keys are the past of all queries."""
    T, S = q.size(-2), k.size(-2)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))                                       # (B, nh, T, S)
    future = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1)
    return scores.masked_fill(future, float('-inf')).softmax(dim=-1)


def explicit_attention(q, k, v, dropout=0.0):
    """The definition, and the tests' oracle: each position's weighted mean of the values it may see."""
    return F.dropout(attention_weights(q, k), dropout) @ v                                        # (B, nh, T, hs)


def fused_attention(q, k, v, dropout=0.0):
    """The same numbers without ever holding the (T, S) matrix (flash attention, arXiv 2205.14135)."""
    T, S = q.size(-2), k.size(-2)
    if T == S or T == 1:   # a single query is the newest token and sees all keys
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=T > 1)
    past = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=past, dropout_p=dropout)


def rotate(x, cos, sin):
    """Rotary positions (arXiv 2104.09864): turn each pair (i, i + hs/2) of x (B, T, heads, hs) by its angle; cos and sin
    (T, 1, hs) hold it for both of a pair, sin with the first one's minus. Roll, not halves: 1.6 times as fast on a CPU."""
    wide = x.float()
    return torch.addcmul(wide * cos, wide.roll(x.size(-1) // 2, dims=-1), sin).type_as(x)


class LayerCache:
    """One layer's keys and values of the tokens read so far, at most `size` of them."""

    def __init__(self, size):
        self.size, self.length = size, 0

    def expand(self, rows):
        """Repeat the one row that was read, so that `rows` texts can go on from it."""
        filled, self.length = (self.k[:, :, :self.length], self.v[:, :, :self.length]), 0
        self.append(*(t.expand(rows, -1, -1, -1) for t in filled))

    def append(self, k, v):
        """Add T tokens' k and v (B, nh, T, hs); returns all so far, (B, nh, S, hs)."""
        if self.length == 0:   # the first keys tell batch, heads, dtype and device
            self.k, self.v = (t.new_empty(*t.shape[:2], self.size, t.size(3)) for t in (k, v))
        start, self.length = self.length, self.length + k.size(2)
        self.k[:, :, start:self.length], self.v[:, :, start:self.length] = k, v
        return self.k[:, :, :self.length], self.v[:, :, :self.length]


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias and config.qkv_bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head, self.qk_norm, self.drop = config.n_head, config.qk_norm, nn.Dropout(config.dropout)
        self.attention = fused_attention if config.flash else explicit_attention   # see GPT.set_attention

    def forward(self, x, rope=None, cache=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3 * self.n_head, C // self.n_head)                        # (B, T, 3·nh, hs)
        qk, v = qkv.split((2 * self.n_head, self.n_head), dim=2)                   # (B, T, 2·nh, hs), (B, T, nh, hs)
        if self.qk_norm:
            qk = F.rms_norm(qk, qk.shape[-1:])
        if rope is not None:
            qk = rotate(qk, *rope)
        q, k, v = (t.transpose(1, 2) for t in (*qk.chunk(2, dim=2), v))                           # (B, nh, T, hs)
        if cache is not None:
            k, v = cache.append(k, v)                                                             # (B, nh, S, hs)
        y = self.attention(q, k, v, self.drop.p if self.training else 0.0)                           # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)                                                    # (B, T, C): heads in a row
        return self.drop(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.activation, self.drop = ACTIVATIONS[config.activation], nn.Dropout(config.dropout)

    def forward(self, x):
        x = self.c_fc(x)                                                                          # (B, T, 4C)
        return self.drop(self.c_proj(self.activation(x)))                                         # (B, T, C)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = layer_norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = layer_norm(config)
        self.mlp = MLP(config)
        self.norm, self.residual, self.layer_drop = config.norm, config.residual, config.layer_drop

    def forward(self, x, rope=None, cache=None):
        x = self.branch(x, self.ln_1, lambda x: self.attn(x, rope, cache))
        return self.branch(x, self.ln_2, self.mlp)

    def branch(self, x, norm, layer):
        """GPT-2's x + layer(norm(x)), or what the config puts in its place; (B, T, C) -> (B, T, C)."""
        y = layer(norm(x) if self.norm == 'pre' else x)
        if self.layer_drop and self.training:   # whole sequences skip the branch, the others make up for them
            keep = torch.rand(x.size(0), 1, 1, device=x.device) >= self.layer_drop                # (B, 1, 1)
            y = y * keep / (1 - self.layer_drop)
        y = x + y if self.residual else y
        return norm(y) if self.norm == 'post' else y


def layer_norm(config):
    return nn.Identity() if config.norm == 'none' else nn.LayerNorm(config.n_embd, bias=config.bias)


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.drawable = config.vocab_size   # tokens that sampling may draw: rows above a tokenizer's vocabulary are padding
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd) if config.pos == 'learned' else nn.Identity(),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=layer_norm(config) if config.norm == 'pre' else nn.Identity(),   # 'post' has just normalised
        ))
        self.drop = nn.Dropout(config.dropout)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.pos == 'rope':
            hs = config.n_embd // config.n_head
            angle = torch.outer(torch.arange(config.block_size, device='cpu'),   # not 'meta', see with_weights
                                10000.0 ** -(torch.arange(0, hs, 2, device='cpu') / hs))
            self.register_buffer('rope', torch.stack((angle.cos().repeat(1, 2), torch.cat((-angle.sin(), angle.sin()), dim=1)))
                                 [:, :, None], persistent=False)                                  # (2, block_size, 1, hs)
        # GPT-2's initialisation: N(0, 0.02); what is added to the residual stream 2·n_layer times starts smaller
        for name, p in self.named_parameters():
            if config.zero_init and name.endswith(('c_proj.weight', 'lm_head.weight')):
                nn.init.zeros_(p)
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if name.endswith('c_proj.weight') else 0.02)
            elif name.endswith('bias'):
                nn.init.zeros_(p)
        if config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight

    def forward(self, idx, targets=None):
        """idx (B, T) int64, T <= block_size; targets likewise, -1 ignored -> logits (B, T, V), mean loss in nats or None."""
        logits = self.lm_head(self.hidden(idx))                                                   # (B, T, V)
        if targets is None:
            return logits, None
        smoothing = self.config.label_smoothing if self.training else 0.0   # evaluation is in true nats
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1,
                                       label_smoothing=smoothing)

    def hidden(self, idx, cache=None):
        """What the head reads: (B, T) -> (B, T, C). With a cache (one LayerCache a layer) idx continues what it holds."""
        T, past = idx.size(1), cache[0].length if cache else 0
        if past + T > self.config.block_size:
            raise ValueError(f"{past + T} tokens do not fit block_size={self.config.block_size}; pass the last ones")
        x = self.transformer.wte(idx)                                                             # (B, T, C)
        if self.config.pos == 'learned':
            x = x + self.transformer.wpe.weight[past:past + T]
        x = self.drop(x)
        rope = self.rope[:, past:past + T] if self.config.pos == 'rope' else None
        for i, block in enumerate(self.transformer.h):
            if self.config.grad_checkpointing and self.training:
                x = checkpoint(block, x, rope, use_reentrant=False)
            else:
                x = block(x, rope, cache and cache[i])
        return self.transformer.ln_f(x)

    # ---- other ways to compute the same: lib/fast.py, lib/decoding.py and lib/inside.py have some ----------

    def set_attention(self, attention):
        """Let all blocks, or for {layer: function} some, compute attention with another function.

        attention(q, k, v, dropout=0.0) gives what fused_attention gives."""
        if not isinstance(attention, dict):
            attention = dict.fromkeys(range(self.config.n_layer), attention)
        for layer, function in attention.items():
            self.transformer.h[layer].attn.attention = function

    @contextlib.contextmanager
    def attention_set(self, attention):
        """Call set_attention for the length of a `with` block."""
        before = {layer: block.attn.attention for layer, block in enumerate(self.transformer.h)}
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
        """Let another kind of nn.Dropout draw the masks."""
        for module in [self, *(block.attn for block in self.transformer.h), *(block.mlp for block in self.transformer.h)]:
            module.drop = kind(module.drop.p)

    # ---- sampling --------------------------------------------------------------------------------------------------

    def next_logits(self, idx, cache=None):
        """What follows idx (B, T): the last position's logits in fp32, for the tokens that may be drawn, (B, V)."""
        return self.lm_head(self.hidden(idx, cache)[:, -1])[:, :self.drawable].float()            # (B, V)

    def check_prompt(self, idx):
        if idx.dim() != 2 or not idx.numel():
            raise ValueError(f"an empty prompt, of shape {tuple(idx.shape)}: idx is (B, T) with one token or more")
        if not 0 <= idx.min() <= idx.max() < self.config.vocab_size:
            raise ValueError(f"idx holds {int(idx.min())} to {int(idx.max())}: tokens are 0 to {self.config.vocab_size - 1}")

    @torch.inference_mode()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, repetition_penalty=1.0,
               chance=None, kv_cache=True):
        """Yield max_new_tokens times the next token of every row, (B, 1). Arguments as in generate; chance (B, max_new_tokens),
        numbers from [0, 1), decides the draws above temperature 0. One row of idx, read once, serves several of chance."""
        self.check_prompt(idx)
        check_sampling(max_new_tokens, temperature, top_k, top_p, repetition_penalty)
        block_size, rows = self.config.block_size, idx.size(0) if chance is None else chance.size(0)
        cache = [LayerCache(block_size) for _ in self.transformer.h] if kv_cache and idx.size(1) <= block_size else []
        for i in range(max_new_tokens):
            if cache and idx.size(1) <= block_size:
                logits = self.next_logits(idx[:, cache[0].length:], cache)                        # (B, V)
            else:   # past block_size every position of the window shifts, and what was cached is no longer true
                logits = self.next_logits(idx[:, -block_size:])
            if idx.size(0) < rows:
                idx, logits = idx.expand(rows, -1), logits.expand(rows, -1)
                for layer in cache:
                    layer.expand(rows)
            new = choose(logits, idx, temperature, top_k, top_p, repetition_penalty,
                         None if chance is None else chance[:, i:i + 1])                          # (B, 1)
            idx = torch.cat((idx, new), dim=1)                                                    # (B, T + 1)
            yield new

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, repetition_penalty=1.0,
                 stop=None, generator=None, kv_cache=True):
        """Continue every row of idx (B, T) -> (B, T + new).

        temperature 0 takes the likeliest token; top_k keeps the k likeliest, top_p the fewest that hold that share of
        the probability. stop: a token id or several; a row that draws one repeats it, and all rows done end the call.
        generator: a row's draws depend on it and on the row's number alone, not on how many rows there are.
        The kv_cache changes the speed and not the text. Raises ValueError for knobs or a prompt that mean nothing."""
        self.check_prompt(idx)
        was_training, stop = self.training, torch.as_tensor([] if stop is None else stop, device=idx.device).view(-1)
        done = torch.zeros(idx.size(0), 1, dtype=torch.bool, device=idx.device)
        device = 'cpu' if generator is None else generator.device
        first = int(torch.randint(2**62, (), generator=generator, device=device)) if temperature else 0
        chance = chances([first + row for row in range(idx.size(0))], max(0, max_new_tokens)).to(idx.device)
        self.eval()
        try:
            tokens = [idx]
            for new in self.stream(idx, max_new_tokens, temperature, top_k, top_p, repetition_penalty, chance, kv_cache):
                tokens.append(torch.where(done, tokens[-1][:, -1:], new))
                done = done | torch.isin(tokens[-1], stop)
                if stop.numel() and done.all():
                    break
        finally:
            self.train(was_training)
        return torch.cat(tokens, dim=1)

    # ---- weights from elsewhere, and for elsewhere -----------------------------------------------------------------

    @classmethod
    def with_weights(cls, config, weights):
        """A GPT that takes over the tensors of a state dict, in fp32. Raises ValueError naming those that do not fit."""
        if config.n_layer > len(weights):   # before its blocks are made one by one
            raise ValueError(f'n_layer={config.n_layer}, and there are {len(weights)} tensors')
        with torch.device('meta'):   # nothing is allocated and nothing drawn
            model = cls(config)
        if config.tie_weights and 'transformer.wte.weight' in weights:
            weights = {**weights, 'lm_head.weight': weights['transformer.wte.weight']}
        have, want = ({name: tuple(p.shape) for name, p in tensors.items() if isinstance(p, torch.Tensor)}
                      for tensors in (weights, model.state_dict()))
        wrong = [f'{name}: {have.get(name, "no tensor")} where {want.get(name, "none")} is expected'
                 for name in {**want, **weights} if have.get(name) != want.get(name) or name not in have]
        if wrong:
            raise ValueError('; '.join(wrong[:4]) + f'; and {len(wrong) - 4} more' * (len(wrong) > 4))
        if not all(p.is_floating_point() and p.isfinite().all() for p in weights.values()):
            raise ValueError('some of the weights are not finite numbers')
        model.load_state_dict({name: p.float() for name, p in weights.items()}, assign=True)
        if config.tie_weights:
            model.lm_head.weight = model.transformer.wte.weight
        return model

    @classmethod
    def from_pretrained(cls, name, dropout=None, block_size=None, **training):
        """A GPT-2 in fp32, on the CPU, from Hugging Face's hub ('gpt2', 'distilgpt2', 'owner/name') or a local folder.

        dropout: None for its own; block_size: fewer positions than it has; training: GPTConfig's fields of that name.
        Raises OSError for what cannot be fetched or read, ValueError for what is no GPT-2."""
        from safetensors.torch import load_file  # here: the rest of this file needs torch alone
        folder = fetch_pretrained(name)
        hf = read_hf_config(folder)
        other = [key for key, value in {'model_type': 'gpt2', **HF_FIXED}.items() if hf[key] != value]
        other += [key for key, (_, default) in HF_FIELDS.items() if type(hf[key]) is not type(default)]
        other += ['n_inner'] * (not other and hf.get('n_inner') not in (None, 4 * hf['n_embd']))
        other += ['activation_function'] * (hf['activation_function'] not in tuple(HF_ACTIVATIONS))
        other += ['resid_pdrop'] * (dropout is None and type(hf['resid_pdrop']) not in (int, float))
        if other:
            raise ValueError(f'{name} is no GPT-2 as it is known here: {", ".join(f"{key}={hf[key]!r}" for key in other)}')
        fields = {ours: hf[theirs] for theirs, (ours, _) in HF_FIELDS.items()}
        if block_size is not None and block_size > fields['block_size']:
            raise ValueError(f'block_size={block_size}, and {name} knows {fields["block_size"]} positions')
        fields['block_size'] = block_size or fields['block_size']
        weights = {}
        for path in sorted(glob.glob(os.path.join(glob.escape(folder), 'model*.safetensors'))):
            try:
                weights.update(load_file(path))
            except Exception as error:   # SafetensorError, and what a file that lies about itself makes of it
                raise ValueError(f'{path} cannot be read: {error}') from error
        if not weights:
            raise ValueError(f"{name} has no model.safetensors; transformers' save_pretrained writes one")
        # GPT-2's own files have no prefix, and hold the causal masks
        weights = {key if key.startswith(('transformer.', 'lm_head.')) else f'transformer.{key}': p
                   for key, p in transposed(weights).items() if not key.endswith(('.attn.bias', '.attn.masked_bias'))}
        if 'transformer.wpe.weight' in weights:
            weights['transformer.wpe.weight'] = weights['transformer.wpe.weight'][:fields['block_size']].clone()
        return cls.with_weights(GPTConfig(**fields, activation=HF_ACTIVATIONS[hf['activation_function']],
                                          dropout=hf['resid_pdrop'] if dropout is None else dropout, **training), weights)

    def save_pretrained(self, folder):
        """Write config.json, model.safetensors and generation_config.json as transformers reads them.

        Absent biases become zeros, which computes the same. Raises ValueError for what GPT-2 cannot express."""
        from safetensors.torch import save_file  # here: the rest of this file needs torch alone
        c = self.config
        needed = dict(pos='learned', norm='pre', residual=True, qk_norm=False)
        other = [f'{name}={getattr(c, name)!r}' for name in needed if getattr(c, name) != needed[name]]
        if other:
            raise ValueError(f"GPT-2 has no {', '.join(other)}: Hugging Face's GPT2LMHeadModel would compute something else")
        weights = {name: p.detach().float().cpu() for name, p in self.state_dict().items()}
        if c.tie_weights:
            del weights['lm_head.weight']
        for name, p in list(weights.items()):
            bias = name.removesuffix('weight') + 'bias'
            if name.startswith(('transformer.h.', 'transformer.ln_f.')) and name.endswith('weight') and bias not in weights:
                weights[bias] = torch.zeros(p.size(0))
        end = 50256 if c.vocab_size > 50256 else None   # <|endoftext|>, where there is one
        hf = {theirs: getattr(c, ours) for theirs, (ours, _) in HF_FIELDS.items()} | HF_FIXED
        ends = dict(bos_token_id=end, eos_token_id=end)
        hf |= dict(model_type='gpt2', architectures=['GPT2LMHeadModel'], **ends, dtype='float32',
                   activation_function=next(theirs for theirs, ours in HF_ACTIVATIONS.items() if ours == c.activation),
                   resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.dropout)
        padding = list(range(self.drawable, c.vocab_size))   # that no tokenizer knows
        generation = ends | (dict(suppress_tokens=padding) if padding else {})
        os.makedirs(folder, exist_ok=True)
        save_file(transposed(weights), os.path.join(folder, 'model.safetensors'), metadata=dict(format='pt'))
        for name, content in (('generation_config', generation), ('config', hf)):
            with open(os.path.join(folder, f'{name}.json'), 'w', encoding='utf-8') as f:
                json.dump(content, f, indent=1)
        os.chmod(os.path.join(folder, 'model.safetensors'), os.stat(os.path.join(folder, 'config.json')).st_mode)   # not 0600

    # ---- what the training loop asks of the model ------------------------------------------------------------------

    def num_params(self):
        """Parameters, a tied matrix counted once: 124,439,808 for GPT-2."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self):
        """Forward and backward, as PaLM's appendix B counts (arXiv 2204.02311): 6 per weight that multiplies, and attention."""
        c = self.config
        looked_up = sum(p.numel() for name, p in self.named_parameters()
                        if name == 'transformer.wpe.weight' or name == 'transformer.wte.weight' and not c.tie_weights)
        return 6 * (self.num_params() - looked_up) + 12 * c.n_layer * c.n_embd * c.block_size

    def optimizer_groups(self, weight_decay):
        """AdamW's parameter groups: decay for what multiplies (matrices, embeddings), none for biases and norms."""
        return [dict(params=[p for p in self.parameters() if p.dim() >= 2], weight_decay=weight_decay),
                dict(params=[p for p in self.parameters() if p.dim() < 2], weight_decay=0.0)]


def transposed(weights):
    """A state dict with the matrices turned that Hugging Face's Conv1D keeps as (in, out): there and back."""
    return {name: (p.T if name.endswith(HF_TRANSPOSED) and p.dim() == 2 else p).contiguous() for name, p in weights.items()}


def fetch_pretrained(name):
    """A local folder with config.json, weights and tokenizer files: `name` itself, or what huggingface_hub caches of it."""
    if os.path.isdir(name):
        return name
    from huggingface_hub import snapshot_download  # here: only a hub name needs it
    return snapshot_download(name, allow_patterns=['config.json', 'model*.safetensors', 'tokenizer.json', 'vocab.json'])


def read_hf_config(folder):
    """Return a folder's config.json, with transformers' defaults for what it leaves out."""
    with open(os.path.join(folder, 'config.json'), encoding='utf-8') as f:
        hf = json.load(f)
    defaults = {'model_type': None, **{theirs: default for theirs, (_, default) in HF_FIELDS.items()}, **HF_FIXED,
                'activation_function': 'gelu_new', 'resid_pdrop': 0.1}
    return defaults | (hf if isinstance(hf, dict) else {})


def check_sampling(max_new_tokens, temperature, top_k, top_p, repetition_penalty):
    """Raises ValueError for a value that means nothing."""
    for name, value, good, allowed in (
            ('max_new_tokens', max_new_tokens, max_new_tokens >= 0, '0 or more; type --max_new_tokens=500'),
            ('temperature', temperature, temperature >= 0, '0 or more; type --temperature=0.8'),
            ('top_k', top_k, top_k is None or type(top_k) is int and top_k >= 1, 'None or 1 or more; type --top_k=20'),
            ('top_p', top_p, top_p is None or not isinstance(top_p, str) and 0 < top_p <= 1, 'in (0, 1]; type --top_p=0.9'),
            ('repetition_penalty', repetition_penalty, repetition_penalty > 0, 'above 0; type --repetition_penalty=1.0')):
        if not good:
            raise ValueError(f'{name}={value!r}: allowed is {allowed}')


def penalized(logits, idx, repetition_penalty):
    """CTRL's penalty (arXiv 1909.05858): of logits (B, V), those of the tokens in idx (B, T) become less likely."""
    if repetition_penalty == 1.0:
        return logits
    seen = logits.gather(1, idx)
    seen = torch.where(seen < 0, seen * repetition_penalty, seen / repetition_penalty)
    return logits.scatter(1, idx, seen.clamp(-1e30, 1e30))   # an extreme penalty must not become inf - inf


def probabilities(logits, idx, temperature=1.0, top_k=None, top_p=None, repetition_penalty=1.0):
    """What the next token is drawn from: logits (B, V), and the tokens so far (B, T) -> (B, V), rows sum to 1.

    Penalty, temperature (above 0), top_k, top_p, in the order and with the meaning transformers gives them."""
    logits = penalized(logits, idx, repetition_penalty)
    logits = (logits - logits.amax(dim=1, keepdim=True)) / max(temperature, 1e-20)   # never above 0, never 0/0
    if top_k is not None and top_k < logits.size(1):
        kept = logits.topk(top_k)   # exactly k, also on ties
        logits = torch.full_like(logits, float('-inf')).scatter(1, kept.indices, kept.values)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(dim=1).cumsum(dim=1) - ordered.softmax(dim=1)   # mass of the likelier tokens
        beyond = (before >= top_p) & (before > 0)   # never the likeliest
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), float('-inf'))
    return logits.softmax(dim=1)


def choose(logits, idx, temperature, top_k, top_p, repetition_penalty, chance):
    """The next token (B, 1) from logits (B, V): the likeliest at temperature 0, else what chance (B, 1) decides."""
    if temperature == 0:
        return penalized(logits, idx, repetition_penalty).argmax(dim=1, keepdim=True)
    if chance is None:
        raise ValueError(f'temperature={temperature} draws, and chance is None; pass chances(seeds, max_new_tokens)')
    return draw(probabilities(logits, idx, temperature, top_k, top_p, repetition_penalty), chance)


def chances(seeds, count):
    """Uniform numbers from [0, 1), (len(seeds), count): a row is decided by its seed alone, on every device."""
    rows = [torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
    return torch.stack(rows).float().clamp(max=1 - 2**-24)


def draw(probs, chance):
    """The token at which the running sum of probs (B, V) passes chance (B, 1) -> (B, 1)."""
    precise = torch.float32 if probs.device.type == 'mps' else torch.float64   # which Apple's GPUs do not have
    mass = probs.to(precise).cumsum(dim=1)                                                        # (B, V)
    drawn = torch.searchsorted(mass, chance.to(precise) * mass[:, -1:], right=True)   # never one of probability 0
    return drawn.clamp(max=probs.size(1) - 1)
