"""Causal attention within each document of a micro-batch.

On CUDA in bf16, one call of torch's varlen_attn (FlashAttention) serves all documents. Elsewhere, and for
heads of more than 256 values, each is a call of scaled_dot_product_attention. Neither can cap the scores:
ops/soft_cap.py does. No mask is built over documents, and nothing is computed across them.

Shapes: N query tokens, M key tokens, H query heads, K key/value heads, D head_dim.
"""

import functools
import inspect
import itertools

import torch
import torch.nn.functional as F


class Documents:
    """Where the documents of a micro-batch of N tokens begin; made once per micro-batch, for all layers.

    lengths    tuple of ints with sum N: the tokens of each document
    positions  (N,) int64, on the model's device: the position of each token in its document
    offsets    (documents + 1,) int32, on the model's device: where each document begins, and N
    host_offsets  the same in int64 on the CPU: a custom op reads them without waiting for the device
    longest    tokens of the longest document, rounded up to a multiple of 128: torch.compile specialises on a
               number that it sees first, so it should see few
    n_past     tokens of a document that a cache holds before these, in generation
    first      with --sp: the number of the first of these N tokens in the micro-batch, of which each rank has
               a part. `lengths` then sum to its tokens, `offsets` end with them
    is_part    whether these N tokens are such a part
    chunks     ops.delta.Chunks, for the families with linear attention; otherwise None

    A class of its own for torch.compile: it guards on the values of a tuple and would recompile for each
    number of documents.
    """

    def __init__(self, lengths, positions, offsets, n_past=0, *, first=0, is_part=False):
        self.lengths, self.positions, self.offsets, self.n_past = lengths, positions, offsets, n_past
        self.first, self.is_part = first, is_part
        self.host_offsets = torch.tensor((0, *itertools.accumulate(lengths)), device="cpu")
        self.longest = -(-max(lengths) // 128) * 128
        self.chunks = None

    @classmethod
    def of(cls, lengths, device="cpu", first_position=0):
        """The Documents of these lengths. Slower than data.collate, which makes those of training.

        first_position  position of each document's first token: the tokens that a cache holds before it
        """
        positions = [torch.arange(first_position, first_position + n, device=device) for n in lengths]
        offsets = torch.tensor((0, *lengths), device=device).cumsum(0, dtype=torch.int32)
        return cls(tuple(lengths), torch.cat(positions), offsets, first_position)

    def in_longer_than(self, length):
        """(N,) bool, whether a token's document has more tokens than `length`, those in a cache included.

        Computed on the device, where the offsets are: a copy of the lengths would make the host wait. In
        training a conversation ends before its last target (data.collate), as at inference when that target
        is generated.
        """
        lengths = self.offsets.diff()
        is_longer = lengths + self.n_past > length
        of_all = is_longer.repeat_interleave(lengths, output_size=sum(self.lengths))
        return of_all[self.first : self.first + self.positions.shape[0]]


def attend_function(x, head_dim, *, cached, compiled):
    """The function that computes attention: varlen_attention(), attend_each, or the latter as one operation.

    x         hidden states, of the dtype and on the device of the computation
    cached    keys come from a cache, so there are more of them than queries
    compiled  torch.compile will trace the function's caller

    Both have the same arguments:

    q          (N, H, D); with --sp all tokens of the micro-batch, and some of the heads (ranks/sp.py)
    k, v       (M, K, D); M is N. For a single document M may be larger: its earlier tokens, from a cache
    documents  Documents whose lengths sum to N
    window     each token attends to itself and the window - 1 tokens before it; None: to all before it
    scale      of the products of queries and keys; None: 1 / sqrt(D)
    returns    (N, H, D)
    """
    if fits_varlen(x, head_dim) and not cached:
        return varlen_attention()
    return opaque_attention() if compiled and not cached else attend_each


def fits_varlen(x, head_dim):
    """Whether varlen_attn accepts these tensors. meta stands for CUDA: operations are counted there."""
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) < (8, 0):
        return False  # FlashAttention needs an Ampere GPU or newer; bf16 itself works on older ones
    is_gpu = x.device.type in ("cuda", "meta")
    return is_gpu and x.dtype == torch.bfloat16 and head_dim % 8 == 0 and head_dim <= 256


@functools.cache
def varlen_attention():
    """Attention of all documents in one call of torch's varlen_attn.

    Cached, because torch.compile would compile a block again for each new function.
    """
    from torch.nn.attention.varlen import varlen_attn  # takes a second

    # torch 2.12 wants to be asked for fewer key/value heads than query heads; 2.11 has no such argument
    has_gqa = "enable_gqa" in inspect.signature(varlen_attn).parameters
    options = {"enable_gqa": True} if has_gqa else {}

    def attend_varlen(q, k, v, documents, window, scale=None):
        before = window - 1 if window else -1  # tokens before itself; -1: all
        offsets, longest = documents.offsets, documents.longest
        return varlen_attn(
            q, k, v, offsets, offsets, longest, longest, scale=scale, window_size=(before, 0), **options)

    return attend_varlen


def attend_each(q, k, v, documents, window, scale=None):
    """Attention of one document after another.

    On the CPU, 1,024 tokens in six documents take 179 ms, one call with a mask 304 ms.
    """
    q_lengths = documents.lengths
    k_lengths = q_lengths if len(q_lengths) > 1 else k.shape[0]
    outputs = [
        attend_alone(q, k, v, window, scale)
        for q, k, v in zip(q.split(q_lengths), k.split(k_lengths), v.split(k_lengths))
    ]
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def attend_alone(q, k, v, window, scale=None):
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
    has_gqa = q.shape[-1] <= 256  # for wider heads only the kernel that keeps all scores has it
    if not has_gqa:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale,
                                       enable_gqa=has_gqa)
    return y[0].transpose(0, 1)


@functools.cache
def opaque_attention():
    """attend_each as one operation: torch.compile would trace its loop anew for each packing. Cached, too.

    Backward computes the attention again, one document at a time.
    """
    from ops.opaque import operation  # registers operations, which takes a moment

    def attend(q, k, v, offsets, window, scale):
        parts = zip(*(x.split(offsets.diff().tolist()) for x in (q, k, v)))
        return torch.cat([attend_alone(*part, window, scale) for part in parts])

    attend_documents = operation(
        "attend_documents", "Tensor q, Tensor k, Tensor v, Tensor offsets, int? window, float? scale", 3,
        attend, like=0)

    def attend_opaque(q, k, v, documents, window, scale=None):
        return attend_documents(q, k, v, documents.host_offsets, window, scale)

    return attend_opaque
