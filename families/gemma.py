"""Gemma 2 and Gemma 3 (text): norms before and after attention and MLP, GeGLU, scaled embeddings, soft caps.

Sources: arXiv 2408.00118 (Gemma 2), 2503.19786 (Gemma 3). Windows, rotary bases and defaults are in
families/rows.py.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn

import model
from ops.norm import ZeroCenteredRMSNorm


def gelu(x):
    """The approximation of GELU by tanh, which Gemma is trained with."""
    return F.gelu(x, approximate="tanh")


@functools.cache
def rounded(number, dtype):
    """A number rounded to a dtype. Embeddings are multiplied by sqrt(3072) = 55.43; in bf16 by 55.5."""
    return torch.tensor(number, dtype=dtype, device="cpu").item()


class Attention(model.Attention):
    """Another scale of the scores; Gemma 3 normalises queries and keys."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.scale = (config.values.get("query_pre_attn_scalar") or 256) ** -0.5
        if config.qk_norm:
            self.q_norm = ZeroCenteredRMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = ZeroCenteredRMSNorm(self.head_dim, eps=config.rms_norm_eps)


class MLP(model.MLP):
    def forward(self, x):
        return self.down_proj(model.swiglu(self.gate_proj(x), self.up_proj(x), gelu))


class Block(nn.Module):
    """A block that also normalises what attention and MLP add to the hidden states."""

    attention_class, norm_class = Attention, ZeroCenteredRMSNorm

    def __init__(self, config, layer):
        super().__init__()
        self.self_attn = self.attention_class(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = self.norm_class(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = self.norm_class(config.hidden_size, eps=config.rms_norm_eps)
        self.pre_feedforward_layernorm = self.norm_class(config.hidden_size, eps=config.rms_norm_eps)
        self.post_feedforward_layernorm = self.norm_class(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x, cos, sin, documents, attend, past=None):
        y = self.self_attn(self.input_layernorm(x), cos, sin, documents, attend, past)
        x = x + self.post_attention_layernorm(y)
        y = self.mlp(self.pre_feedforward_layernorm(x))
        return x + self.post_feedforward_layernorm(y)


class Decoder(model.Decoder):
    block_class = Block

    def __init__(self, config, checkpointed_blocks=0, compiled=False):
        super().__init__(config, checkpointed_blocks, compiled)
        self.norm = self.block_class.norm_class(config.hidden_size, eps=config.rms_norm_eps)

    def embed(self, tokens):
        x = self.embed_tokens(tokens)
        return x * rounded(self.config.hidden_size**0.5, x.dtype)

    def attend_function(self, x, layer, cached):
        cap = self.config.values.get("attn_logit_softcapping")
        if not cap:
            return super().attend_function(x, layer, cached)
        from ops.soft_cap import soft_capped  # registers operations, which takes a moment

        return soft_capped(cap)


class CausalLM(model.CausalLM):
    decoder_class = Decoder

    def __init__(self, config, checkpointed_blocks=0, compiled=False):
        super().__init__(config, checkpointed_blocks, compiled)
        self.lm_head.soft_cap = config.values.get("final_logit_softcapping")
