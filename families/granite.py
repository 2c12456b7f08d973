"""Granite 4 dense (350M, 1B, micro): attention of Granite 3, and one matrix for gate and up, as on disk.

Not here: the Mamba layers and experts of the larger ones (they are refused). Source: the definition of
GraniteMoeHybridForCausalLM in transformers 5.24.
"""

import torch
from torch import nn

import model


class SharedMLP(nn.Module):
    """SwiGLU. It is shared with nothing in a model without experts."""

    def __init__(self, config):
        super().__init__()
        self.input_linear = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.output_linear = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.output_linear(model.swiglu(*self.input_linear(x).chunk(2, dim=-1)))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.multiplier = config.residual_multiplier
        self.self_attn = model.Attention(config, layer)
        self.shared_mlp = SharedMLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x, cos, sin, documents, attend, past=None):
        y = self.self_attn(self.input_layernorm(x), cos, sin, documents, attend, past)
        x = torch.add(x, y, alpha=self.multiplier)
        return torch.add(x, self.shared_mlp(self.post_attention_layernorm(x)), alpha=self.multiplier)


class Decoder(model.Decoder):
    block_class = Block


class CausalLM(model.CausalLM):
    decoder_class = Decoder
