"""OLMo 2 and 3: norms after attention and MLP, and norms of queries and keys over all heads.

Sources: OLMo 2 (arXiv 2501.00656), OLMo 3 (2512.13961). What differs between them (windows, and rotary
positions for each kind of layer) is in families/rows.py.
"""

from torch import nn

import model


class Attention(model.Attention):
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.q_norm = nn.RMSNorm(self.q_proj.out_features, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(self.k_proj.out_features, eps=config.rms_norm_eps)

    def project(self, x, documents):
        q, k, v = self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x)), self.v_proj(x)
        return [y.unflatten(-1, (-1, self.head_dim)) for y in (q, k, v)]


class Block(nn.Module):
    """The norms are on what attention and MLP add to the hidden states, not on what they read."""

    def __init__(self, config, layer):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = model.MLP(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_feedforward_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x, cos, sin, documents, attend, past=None):
        x = x + self.post_attention_layernorm(self.self_attn(x, cos, sin, documents, attend, past))
        return x + self.post_feedforward_layernorm(self.mlp(x))


class Decoder(model.Decoder):
    block_class = Block


class CausalLM(model.CausalLM):
    decoder_class = Decoder
