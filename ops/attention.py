"""Causal attention within each document of a micro-batch: one SDPA call per document.

Shapes: N query tokens, M key tokens, H query heads, K key/value heads, D head_dim.
"""

import functools

import torch
import torch.nn.functional as F


class Documents:
    """How many tokens each document of a micro-batch has.

    A class of its own for torch.compile: it guards on the values of a tuple and would recompile for each
    number of documents. It passes an object through without looking inside.
    """

    def __init__(self, doc_lengths):
        self.doc_lengths = doc_lengths


def attend(q, k, v, documents, window):
    """Causal attention within each document. Returns (N, H, D).

    q          (N, H, D)
    k, v       (M, K, D); M is N. For a single document M may be larger: its earlier tokens, from a cache
    documents  Documents whose lengths sum to N
    window     each token attends to itself and the window - 1 tokens before it; None: to all before it

    With one call per document no mask is built, and nothing is computed across documents. On the CPU, 1,024
    tokens in six documents take 179 ms, one masked call 304 ms.
    """
    q_lengths = documents.doc_lengths
    k_lengths = q_lengths if len(q_lengths) > 1 else k.shape[0]
    outputs = [
        attend_alone(q, k, v, window)
        for q, k, v in zip(q.split(q_lengths), k.split(k_lengths), v.split(k_lengths))
    ]
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def attend_alone(q, k, v, window):
    """Causal attention of one document: q (T, H, D), k and v (S, K, D) with S >= T. Returns (T, H, D)."""
    T, S = q.shape[0], k.shape[0]
    past = S - T  # tokens whose keys and values come from the cache
    is_causal = T > 1 and past == 0
    mask = None
    if (past and T > 1) or (window and window < S):
        is_causal = False
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(past)
        if window:
            mask = mask.triu(past + 1 - window)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, heads, tokens, D)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=True)
    return y[0].transpose(0, 1)


@functools.cache
def opaque_attend():
    """attend, hidden from torch.compile, which would recompile its loop over documents for each packing.

    Cached, because torch.compile would recompile for each new wrapper too.
    """
    return torch.compiler.disable(attend)
