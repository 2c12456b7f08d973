"""The dense text model of Qwen3.5: three of four layers are gated delta nets, the fourth is attention.

Source: Gated Delta Networks (arXiv 2412.06464) and the configuration of the published checkpoints. Parameters
have the names of Hugging Face's Qwen3_5ForCausalLM.
"""

import torch
import torch.nn.functional as F
from torch import nn

import model
from ops.convolution import short_convolution
from ops.delta import cut, delta_rule
from ops.norm import ZeroCenteredRMSNorm
from settings.errors import UserError

# the sizes of a gated delta net in config.json: defaults of Hugging Face's class, and the largest allowed
SIZES = {"linear_num_key_heads": (16, 2**12), "linear_num_value_heads": (32, 2**12),
         "linear_key_head_dim": (128, 2**13), "linear_value_head_dim": (128, 2**13),
         "linear_conv_kernel_dim": (4, 2**10)}


def sizes(values):
    """The sizes of a gated delta net, in the order of SIZES. Raises UserError for one that can't be."""
    result = [values.get(key, default) for key, (default, _) in SIZES.items()]
    for (key, (_, largest)), size in zip(SIZES.items(), result):
        if type(size) is not int or not 1 <= size <= largest:
            raise UserError(f"config.json: {key} is {size!r:.60}; it must be an integer from 1 to "
                            f"{largest:,}")
    if result[1] % result[0]:
        raise UserError(f"config.json: linear_num_value_heads {result[1]} must be a multiple of "
                        f"linear_num_key_heads {result[0]}")
    return result


class GatedDeltaNet(nn.Module):
    """Linear attention: projections, a short convolution, the gated delta rule, a gated norm."""

    def __init__(self, config):
        super().__init__()
        C, (K, H, D, E, taps) = config.hidden_size, sizes(config.values)
        self.key_heads, self.value_heads, self.eps = K, H, config.rms_norm_eps
        self.widths = K * D, K * D, H * E  # of q, k and v
        W = sum(self.widths)
        self.in_proj_qkv = nn.Linear(C, W, bias=False)
        self.in_proj_z = nn.Linear(C, H * E, bias=False)
        self.in_proj_b = nn.Linear(C, H, bias=False)
        self.in_proj_a = nn.Linear(C, H, bias=False)
        self.conv1d = nn.Conv1d(W, W, taps, groups=W, bias=False)  # only its weight is used
        self.dt_bias = nn.Parameter(torch.ones(H))
        self.A_log = nn.Parameter(torch.empty(H).uniform_(0.01, 16).log_())
        self.norm = nn.RMSNorm(E, eps=config.rms_norm_eps)
        self.out_proj = nn.Linear(H * E, C, bias=False)

    def forward(self, x, documents, past=None):
        qkv = short_convolution(self.in_proj_qkv(x), self.conv1d.weight, documents, past)
        q, k, v = qkv.split(self.widths, dim=1)
        q, k = (y.unflatten(1, (self.key_heads, -1)) for y in (q, k))
        v = v.unflatten(1, (self.value_heads, -1))
        # log of what a head's state keeps; in fp32, as in bf16 exp(A_log) would have three digits
        g = -self.A_log.float().exp() * F.softplus(self.in_proj_a(x).float() + self.dt_bias.float())
        y = delta_rule(q, k, v, g, self.in_proj_b(x).sigmoid(), documents, past)
        z = self.in_proj_z(x).view_as(y)
        return self.out_proj((self.norm(y) * F.silu(z.float())).type_as(x).flatten(1))


class Attention(model.Attention):
    """Attention whose output is gated: q_proj also gives the gate of each head."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        D, eps = config.head_dim, config.rms_norm_eps
        width = 2 * config.num_attention_heads * D
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.q_norm, self.k_norm = ZeroCenteredRMSNorm(D, eps=eps), ZeroCenteredRMSNorm(D, eps=eps)

    def forward(self, x, cos, sin, documents, attend, past=None):
        q, gate = self.q_proj(x).unflatten(-1, (-1, 2 * self.head_dim)).chunk(2, dim=-1)  # (N, H, D) each
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # (N, K, D)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        q, k = (model.rotate(y, cos, sin) for y in (self.q_norm(q), self.k_norm(k)))
        if past is not None:
            k = past["k"] = torch.cat((past["k"], k)) if "k" in past else k
            v = past["v"] = torch.cat((past["v"], v)) if "v" in past else v
        y = attend(q, k, v, documents, self.window, self.scale)
        return self.o_proj((y * gate.sigmoid()).flatten(1))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        if config.layer_types[layer] == "linear_attention":
            self.linear_attn = GatedDeltaNet(config)
        else:
            self.self_attn = Attention(config, layer)
        self.mlp = model.MLP(config)
        self.input_layernorm = ZeroCenteredRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = ZeroCenteredRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x, cos, sin, documents, attend, past=None):
        y = self.input_layernorm(x)
        if hasattr(self, "linear_attn"):
            x = x + self.linear_attn(y, documents, past)
        else:
            x = x + self.self_attn(y, cos, sin, documents, attend, past)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(model.Decoder):
    block_class = Block

    def __init__(self, config, checkpointed_blocks=0, compiled=False):
        super().__init__(config, checkpointed_blocks, compiled)
        self.norm = ZeroCenteredRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, tokens, documents, past=None):
        cut(documents)  # here, once for all blocks and outside of compiled code
        return super().forward(tokens, documents, past)


class CausalLM(model.CausalLM):
    decoder_class = Decoder
