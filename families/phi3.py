"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: one matrix for queries, keys and values, and one for gate and up.

Both stay as they are in the files, so an adapter has PEFT's names. LongRoPE and partial rotary positions are
in families/rope.py. Sources: Phi-3 (arXiv 2404.14219), Phi-4-mini (2503.01743).
"""

from torch import nn

import model


class Attention(model.Attention):
    def __init__(self, config, layer):
        super().__init__(config, layer)
        del self.q_proj, self.k_proj, self.v_proj
        self.heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        self.qkv_proj = nn.Linear(config.hidden_size, sum(self.heads) * self.head_dim, bias=config.qkv_bias)

    def project(self, x, documents):
        return self.qkv_proj(x).unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=1)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(model.swiglu(*self.gate_up_proj(x).chunk(2, dim=-1)))


class Block(model.Block):
    attention_class, mlp_class = Attention, MLP


class Decoder(model.Decoder):
    block_class = Block


class CausalLM(model.CausalLM):
    decoder_class = Decoder
