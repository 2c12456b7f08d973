"""Measure what autograd keeps for the blocks of a model: a forward pass on meta, which computes nothing.

ops/forecast.py has a formula for the blocks of model.py. Those of families/NAME.py are measured.
"""

import copy
import math
from dataclasses import replace

import torch

from ops.attention import Documents


class KeptByAttention(torch.autograd.Function):
    """Keeps for backward what attention keeps (q, k, v, its output and a logsumexp), and computes nothing."""

    @staticmethod
    def forward(ctx, q, k, v):
        y = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, y, q.new_empty(q.shape[:2], dtype=torch.float32))
        return y

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError("only the forward pass is measured")


class Exchanged(torch.autograd.Function):
    """A tensor of another shape, as from an all-to-all of ranks/sp.py: nothing is kept for backward."""

    @staticmethod
    def forward(ctx, x, *shape):
        return x.new_empty(shape)

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError("only the forward pass is measured")


def attend_function(sp):
    """A function in place of attention that keeps what attention keeps, with the exchanges of ranks/sp.py."""
    def attend(q, k, v, *_, **__):
        if sp == 1:
            return KeptByAttention.apply(q, k, v)
        repeats = sp // math.gcd(k.shape[1], sp)
        q_heads, *key_heads = (Exchanged.apply(x, x.shape[0] * sp, x.shape[1] * n // sp, x.shape[2])
                               for x, n in ((q, 1), (k, repeats), (v, repeats)))
        y = KeptByAttention.apply(q_heads, *key_heads)
        return Exchanged.apply(y, *q.shape)

    return attend


class Kept:
    """The bytes that autograd keeps of one forward pass, each storage once, without the parameters.

    fused_norms  a norm keeps its input and 1 / rms, as the kernel of CUDA; False: what its operations keep
    """

    def __init__(self, block, fused_norms):
        self.ignored = {p.untyped_storage()._cdata for p in block.parameters()}
        self.storages, self.in_norm = {}, False
        norms = [m for m in block.modules() if fused_norms and type(m).__name__.endswith("RMSNorm")]
        for norm in norms:
            norm.register_forward_pre_hook(self.enter_norm)
            norm.register_forward_hook(self.leave_norm)

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.ignored and not self.in_norm:
            self.storages[storage._cdata] = storage  # a reference, so that its identity is not used again
        return tensor

    def enter_norm(self, norm, inputs):
        self.in_norm = True

    def leave_norm(self, norm, inputs, output):
        self.in_norm = False
        if output.requires_grad:
            self.pack(inputs[0])
            self.pack(inputs[0].new_empty(inputs[0].shape[:-1], dtype=torch.float32))

    @property
    def n_bytes(self):
        return sum(storage.nbytes() for storage in self.storages.values())


def measure(model, *, bf16, fused_norms, tp=1, sp=1, length=256):
    """Bytes per token of a rank that autograd keeps for each block in eager mode, (blocks,).

    model   on meta, with its adapters
    tp      the heads and the MLP are split over so many ranks
    sp      so many ranks exchange tokens for heads around attention
    length  tokens of the document that is measured

    Blocks that keep the same are measured once.
    """
    embedding_trains, found, sizes = model.model.embed_tokens.weight.requires_grad, {}, []
    for i, block in enumerate(model.model.layers):
        kind = (model.config.layer_types[i], model.config.ropes[i] is None, i > 0 or embedding_trains)
        if kind not in found:
            needs_input_grad = kind[-1]
            found[kind] = block_bytes(block, i, model.config, bf16, fused_norms, needs_input_grad, length, sp)
            if tp > 1:
                found[kind] *= tp_share(block, i, model.config, tp, length, sp)
        sizes.append(found[kind])
    return tuple(sizes)


def block_bytes(block, layer, config, bf16, fused_norms, needs_input_grad, length, sp):
    """Bytes per token of a rank that autograd keeps for one block."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    block, rope = copy.deepcopy(block).to(dtype), config.ropes[layer]
    x = torch.empty(length, config.hidden_size, dtype=dtype, device="meta", requires_grad=needs_input_grad)
    cos = sin = None
    if rope:
        cos, sin = torch.empty(2, length, 1, len(rope.frequencies), device="meta")
    documents, kept = Documents.of((length,), "meta"), Kept(block, fused_norms)
    kept.ignored |= {t.untyped_storage()._cdata for t in (cos, documents.positions, documents.offsets)
                     if t is not None}

    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        block(x, cos, sin, documents, attend_function(sp))
    return kept.n_bytes / length


def tp_share(block, layer, config, tp, length, sp):
    """The share of a block's bytes that a tp rank keeps: measured on a block with fewer heads.

    Keys and values are repeated as often as the heads of the rank need, not those of the whole block.
    """
    share = replace(config, num_attention_heads=config.num_attention_heads // tp,
                    num_key_value_heads=config.num_key_value_heads // tp,
                    intermediate_size=config.intermediate_size // tp)
    sizes = []
    for other in (share, config):
        with torch.device("meta"):
            fresh = type(block)(other, layer)
        sizes.append(block_bytes(fresh, layer, other, False, True, True, length, sp))
    return sizes[0] / sizes[1]
