"""flash_attn's names over torch's own FlashAttention-2 (torch.nn.attention.varlen), for transformers and TRL.

tools/gpu_probes.py copies this file to flash_attn/__init__.py in a temporary directory, so that TRL packs
with FlashAttention-2 without a compiled wheel of 250 MB. Its FlashAttention is then torch's build, which a
table with such a figure has to say. Nothing in the project imports this file.
"""

import inspect

import torch
from torch.nn.attention.varlen import varlen_attn

__version__ = "2.8.3"  # the version whose names these are
# torch 2.11 accepts fewer key/value heads than heads without a flag, later versions ask for one
GQA = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                           softmax_scale=None, causal=False, window_size=(-1, -1), **_):
    window = (window_size[0], 0) if causal else tuple(window_size)
    return varlen_attn(q, k, v, cu_seqlens_q, cu_seqlens_k, int(max_seqlen_q), int(max_seqlen_k),
                       scale=softmax_scale, window_size=window, **GQA)


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), **_):
    batch, n = q.shape[:2]
    offsets = torch.arange(0, (batch + 1) * n, n, dtype=torch.int32, device=q.device)
    flattened = (x.flatten(0, 1) for x in (q, k, v))
    return flash_attn_varlen_func(*flattened, offsets, offsets, n, n, dropout_p, softmax_scale, causal,
                                  window_size).unflatten(0, (batch, n))


def flash_attn_with_kvcache(*_, **__):
    raise NotImplementedError("for training only")
