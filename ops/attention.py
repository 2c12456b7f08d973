"""Causal attention within each document of a flat row: one call of SDPA a document.

Shapes: N query tokens of the row, M key tokens, H query heads, K key/value heads, D head_dim.
"""

import functools

import torch
import torch.nn.functional as F


class Documents:
    """How many tokens each document of a row has.

    torch.compile guards on the values of a tuple and would compile again for each number of documents. It
    passes an object through without looking inside.
    """

    def __init__(self, doc_lengths):
        self.doc_lengths = doc_lengths


def attend(q, k, v, documents, window):
    """Causal attention, each document on its own. Returns (N, H, D).

    q          (N, H, D)
    k, v       (M, K, D); M is N, or for a single document may be more: earlier tokens, from a cache
    documents  Documents with sum N
    window     how many tokens back each token sees, itself included; None: all

    One call a document: no mask is built, and nothing is computed across documents (on the CPU 179 ms against
    304 ms for one masked call, 1,024 tokens in six documents).
    """
    q_lengths = documents.doc_lengths
    k_lengths = q_lengths if len(q_lengths) > 1 else k.shape[0]
    outputs = [
        attend_alone(q, k, v, window)
        for q, k, v in zip(q.split(q_lengths), k.split(k_lengths), v.split(k_lengths))
    ]
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def attend_alone(q, k, v, window):
    """The same for one document: q (T, H, D), k and v (S, K, D) with S >= T."""
    T, S = q.shape[0], k.shape[0]
    past = S - T
    is_causal, mask = T > 1 and past == 0, None
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
    """attend, opaque to torch.compile, which would compile its loop over documents again for each packing.

    Cached, as each new wrapper would be compiled again too.
    """
    return torch.compiler.disable(attend)
