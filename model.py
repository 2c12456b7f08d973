"""A decoder-only transformer whose parameters have Hugging Face's names.

The architecture of Llama, Qwen2, Qwen3, Mistral and those like them (the FAMILIES without a file of their own
in families/). This file knows nothing about weight files, processes or chat templates.

A micro-batch is one flat sequence of documents, one after another, without padding. Each document attends
only to itself, with positions from 0.

Shapes: N tokens of a micro-batch, C hidden size, H query heads, K key/value heads, D head_dim, V vocabulary.
"""

import functools
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ops.attention import Documents, attend_function
from ops.loss import Head
from settings.errors import UserError


@functools.cache
def frequencies_on(device, frequencies):
    """A tuple of frequencies as a tensor. Cached, because a copy to the GPU makes the host wait."""
    return torch.tensor(frequencies, device=device)


def rope_cos_sin(documents, rope):
    """Cosine and sine of the rotary angles, (N, 1, pairs) each, fp32. RoFormer (arXiv 2104.09864).

    Computed for each micro-batch (a few thousand numbers), so that there is no buffer to move, save or cast.

    documents  ops.attention.Documents
    rope       families.rope.Rope
    """
    positions = documents.positions[:, None, None]
    frequencies = frequencies_on(positions.device, rope.frequencies)
    if rope.long_frequencies:
        is_long = documents.in_longer_than(rope.original_length)[:, None, None]
        frequencies = torch.where(
            is_long, frequencies_on(positions.device, rope.long_frequencies), frequencies)
    elif rope.ends_at_length and max(documents.lengths) + documents.n_past > rope.original_length:
        raise UserError(f"dynamic rope scaling is supported up to {rope.original_length:,} tokens, and a "
                        f"conversation has more; --max_length {rope.original_length} cuts it")
    angle = positions.float() * frequencies
    return angle.cos() * rope.factor, angle.sin() * rope.factor


def rotate(x, cos, sin):
    """Rotate each pair (i, i + pairs) of x (N, H, D) by its angle, in fp32; returns x's dtype.

    With less than D / 2 pairs the rest of x stays as it is: partial rotary positions.
    """
    x, rest = x.split((2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]), dim=-1)
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).type_as(x)
    return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.window = D, config.sliding_windows[layer]
        self.scale = config.attention_scale
        self.q_proj = nn.Linear(C, H * D, bias=config.qkv_bias)
        self.k_proj = nn.Linear(C, K * D, bias=config.qkv_bias)
        self.v_proj = nn.Linear(C, K * D, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * D, C, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(D, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(D, eps=config.rms_norm_eps)

    def project(self, x, documents):
        """Hidden states (N, C) -> queries (N, H, D), keys and values (N, K, D), not yet rotated."""
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # the tensor's size gives H
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def forward(self, x, cos, sin, documents, attend, past=None):
        q, k, v = self.project(x, documents)
        if cos is not None:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if past is not None:  # generation: keys and values of the earlier tokens of one document
            k = past["k"] = torch.cat((past["k"], k)) if "k" in past else k
            v = past["v"] = torch.cat((past["v"], v)) if "v" in past else v
        return self.o_proj(attend(q, k, v, documents, self.window, self.scale).flatten(1))


def swiglu(gate, up, activation=F.silu):
    """silu(gate) * up, the input of down_proj (arXiv 2002.05202). With another activation: GeGLU.

    Compiled, backward computes it again, in the kernel that needs gate and up anyway: a third less to keep of
    the MLP. Eager that would take one more pass over memory.
    """
    if torch.compiler.is_compiling():
        return checkpoint(lambda: activation(gate) * up, use_reentrant=False, preserve_rng_state=False)
    return activation(gate) * up


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x):
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    attention_class, mlp_class = Attention, MLP  # a family's subclass may have others

    def __init__(self, config, layer):
        super().__init__()
        self.multiplier = config.residual_multiplier
        self.self_attn = self.attention_class(config, layer)
        self.mlp = self.mlp_class(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x, cos, sin, documents, attend, past=None):
        y = self.self_attn(self.input_layernorm(x), cos, sin, documents, attend, past)
        x = torch.add(x, y, alpha=self.multiplier)
        return torch.add(x, self.mlp(self.post_attention_layernorm(x)), alpha=self.multiplier)


class Decoder(nn.Module):
    """Embedding, blocks and final norm. A family with other blocks has a subclass in families/NAME.py."""

    block_class = Block

    def __init__(self, config, checkpointed_blocks=0, compiled=False):
        super().__init__()
        self.config, self.compiled = config, compiled
        self.checkpointed_blocks, self.has_dropout = checkpointed_blocks, False  # lora.inject may set it
        # nn.Embedding's default initialisation on meta imports torch's compiler, which takes a second
        values = torch.empty(config.vocab_size, config.hidden_size).uniform_(-1, 1)
        self.embed_tokens = nn.Embedding.from_pretrained(values, freeze=False)
        self.layers = nn.ModuleList(self.block_class(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if compiled:  # dynamic: one compilation for all blocks and all lengths
            for block in self.layers:
                block.compile(dynamic=True)

    def embed(self, tokens):
        """Token ids (N,) -> hidden states (N, C)."""
        x, multiplier = self.embed_tokens(tokens), self.config.embedding_multiplier
        return x if multiplier == 1 else x * multiplier

    def attend_function(self, x, layer, cached):
        """ops.attention.attend_function for a layer."""
        return attend_function(x, self.config.head_dims[layer], cached=cached, compiled=self.compiled)

    def forward(self, tokens, documents, past=None):
        ropes = {rope: rope_cos_sin(documents, rope) for rope in set(self.config.ropes) if rope}
        x = self.embed(tokens)  # (N, C)
        first_trains = any(p.requires_grad for p in self.layers[0].parameters())  # not with --freeze layers.0
        if self.compiled and torch.is_grad_enabled() and first_trains:
            x.requires_grad_()  # with LoRA the first block's input needs none, and would be compiled apart
        for i, block in enumerate(self.layers):
            cos, sin = ropes.get(self.config.ropes[i], (None, None))  # None: no rotary positions
            attend = self.attend_function(x, i, cached=past is not None)
            if self.compiled:
                # Sharding makes the input a view, but not when a checkpoint runs the block again: two graphs.
                x = x.view_as(x)
            if i < self.checkpointed_blocks and torch.is_grad_enabled():
                # Keep the block's input only and run the block again in backward: 1/3 more compute. Not
                # re-entrant: with LoRA a block's input may need no gradient, and its adapters would get none.
                # To keep the state of the random numbers costs time, and only dropout needs it.
                x = checkpoint(block, x, cos, sin, documents, attend, use_reentrant=False,
                               preserve_rng_state=self.has_dropout)
            else:
                x = block(x, cos, sin, documents, attend, past[i] if past else None)
        x = self.norm(x)
        return x if self.config.logits_scaling == 1 else x / self.config.logits_scaling


class CausalLM(nn.Module):
    """The model. Parameters have the checkpoint's names (model.layers.0.self_attn.q_proj.weight, ...).

    config               families.config.ModelConfig
    checkpointed_blocks  the first this many blocks keep their inputs only and run again in backward
    compiled             torch.compile the blocks
    """

    decoder_class = Decoder

    def __init__(self, config, checkpointed_blocks=0, compiled=False):
        super().__init__()
        self.config = config
        self.model = self.decoder_class(config, checkpointed_blocks, compiled)
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        self.n_parameters = sum(p.numel() for p in self.parameters())  # without adapters
        self.peft_config = None  # PEFT's adapter_config.json, after lora.inject

    def tie_weights(self):
        """Make head and embedding one tensor if config.json says so. Repeat it after moving parameters."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens, documents, target_positions=None, targets=None, weights=None, past=None):
        """Logits, or the loss if targets are given.

        tokens            (N,) int64, documents one after another
        documents         ops.attention.Documents of these N tokens, on their device
        target_positions  (R,) int64, the positions whose next token is a target
        targets           (R,) int64, those next tokens
        weights           (R,) fp32, what the losses of the targets are multiplied by; None: 1
        past              list of one dict per layer: the key/value cache of generation, updated in place
        returns           with targets, a LossOut: nats summed over the targets, which the caller divides.
                          With `past`, logits of the last token, (1, V). Otherwise logits, (N, V)
        """
        hidden = self.model(tokens, documents, past)
        if past is not None:
            hidden = hidden[-1:]
        return self.lm_head(hidden, target_positions, targets, weights)


@torch.no_grad()
def generate(model, tokens, max_new_tokens, eos_ids, sample=lambda logits: int(logits.argmax())):
    """Yield new token ids one by one, with a key/value cache. Stop after yielding one of eos_ids.

    tokens  list of ids, the rendered prompt
    sample  function from logits (V,) to an id; greedy by default
    """
    past = [{} for _ in model.model.layers]
    device, n_past, text = model.lm_head.weight.device, 0, [*tokens]
    # one token more, and the frequencies are others: those of the cached keys too (LongRoPE)
    limits = {rope.original_length for rope in model.config.ropes if rope and rope.long_frequencies}
    for _ in range(max_new_tokens):
        if n_past in limits:
            past, tokens, n_past = [{} for _ in past], text, 0
        documents = Documents.of((len(tokens),), device, first_position=n_past)
        # a compiled model would be compiled again for the cache: several graphs, for a few tokens
        with torch.compiler.set_stance("force_eager") if model.model.compiled else nullcontext():
            logits = model(torch.tensor(tokens, device=device), documents, past=past)
        token = sample(logits[0])
        yield token
        if token in eos_ids:
            return
        n_past += len(tokens)
        tokens = [token]
        text.append(token)


def sample_function(temperature, top_p):
    """Return a function from logits (V,) to a token id.

    temperature  0: greedy; 1: sample from the model's distribution
    top_p        sample from the most likely tokens that together have this probability
    """

    def sample(logits):
        if temperature == 0:
            return int(logits.argmax())
        probabilities, ids = torch.softmax(logits.float() / temperature, dim=0).sort(descending=True)
        kept = probabilities.cumsum(0) - probabilities < top_p  # includes the token that reaches top_p
        return int(ids[torch.multinomial(probabilities * kept, 1)])

    return sample
