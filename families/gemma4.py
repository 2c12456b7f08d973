"""Gemma 4 dense (12B, 31B): layers with full attention have wider heads, few of them for keys and values.

Not here: the embeddings for each layer and the shared keys and values of E2B and E4B, the experts of 26B-A4B
(they are refused). Source: the definition in transformers 5.24.
"""

import torch
from torch import nn

import model
from families import gemma


class Attention(model.Attention):
    """Queries, keys and values are normalised, values without a weight; scores are not scaled.

    With attention_k_eq_v, layers with full attention have no v_proj: the values are the keys before norm and
    rotation.
    """

    def __init__(self, config, layer):
        nn.Module.__init__(self)
        C, D, values = config.hidden_size, config.head_dims[layer], config.values
        H, K = config.num_attention_heads, config.num_key_value_heads
        is_full = config.layer_types[layer] == "full_attention"
        if is_full:
            K = values["num_global_key_value_heads"]
        self.head_dim, self.window = D, config.sliding_windows[layer]
        self.scale = 1.0
        self.q_proj = nn.Linear(C, H * D, bias=config.qkv_bias)
        self.k_proj = nn.Linear(C, K * D, bias=config.qkv_bias)
        self.v_proj = None
        if not (is_full and values.get("attention_k_eq_v")):
            self.v_proj = nn.Linear(C, K * D, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * D, C, bias=config.o_bias)
        self.q_norm = nn.RMSNorm(D, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(D, eps=config.rms_norm_eps)
        self.v_norm = nn.RMSNorm(D, eps=config.rms_norm_eps, elementwise_affine=False)

    def project(self, x, documents):
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # (N, H, D)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # (N, K, D)
        v = k if self.v_proj is None else self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        return self.q_norm(q), self.k_norm(k), self.v_norm(v)


class Block(gemma.Block):
    attention_class, norm_class = Attention, nn.RMSNorm

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.layer_scalar = nn.Parameter(torch.ones(1), requires_grad=False)  # a constant of the checkpoint

    def forward(self, x, cos, sin, documents, attend, past=None):
        return super().forward(x, cos, sin, documents, attend, past) * self.layer_scalar


class Decoder(gemma.Decoder):
    block_class = Block


class CausalLM(gemma.CausalLM):
    decoder_class = Decoder
