"""Sequence parallelism in Ulysses' way (Jacobs et al. 2023, arXiv 2309.14509): --sp N.

The N ranks of an sp group share each micro-batch. data.collate gives each of them an equal part of its
tokens. All layers but attention treat tokens one by one, so they work on the part as on any other tokens.
Attention treats heads one by one. So around it an all-to-all exchanges tokens for heads, and back:

    in the layers   n tokens of this rank,      all H heads    (n, H, D)
    in attention    all N · n tokens,           H / N heads    (N · n, H / N, D)

A layer has four all-to-all in forward (queries, keys, values, the output), four in backward, and four more if
backward computes it again. Each rank sends (N - 1) / N of a tensor. Losses and gradients of an sp group are
sums over its ranks: Ranks.all_reduce and FSDP2 sum them as those of ranks with other conversations.

Autograd keeps 1 / N of what one rank would keep, with two exceptions. With more ranks than key/value heads
each of these is on several ranks. And the output of attention is kept twice, once by attention (its heads)
and once by o_proj (its tokens): to derive one from the other would take a fifth all-to-all.
"""

import functools
import math

import torch


def split(model, ranks):
    """Let the attention layers of a model exchange tokens for heads within this rank's sp group, in place.

    Generation and other calls with whole documents work as before: each rank computes all of them.

    Raises UserError if the model's family has no sp, or the number of ranks does not divide its heads.
    """
    shards, tp = (ranks.mesh[axis].size() for axis in ("shards", "tp"))
    model.config.check_sp(ranks.sp_size, shards, tp)
    hook = functools.partial(attend_by_heads, ranks.sp_size, ranks.sp_group.group_name)
    for block in model.model.layers:
        block.self_attn.register_forward_pre_hook(hook)


def attend_by_heads(size, group, layer, inputs):
    """Hook before forward() of an attention layer: replace `attend`, one of its inputs, by on_heads()."""
    *others, documents, attend, past = inputs
    if documents.is_part:
        attend = functools.partial(on_heads, attend, size, group)
    return *others, documents, attend, past


def on_heads(attend, size, group, q, k, v, documents, window, scale=None):
    """Attention of the whole documents by each rank for some of the heads. Arguments: ops.attention.

    q        (n, H, D), this rank's tokens
    k, v     (n, K, D). Each head is repeated for neighbouring query heads until `size` divides their number
    returns  (n, H, D)
    """
    repeats = size // math.gcd(k.shape[1], size)
    if repeats > 1:
        k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    q, k, v = (Exchange.apply(x, 1, 0, size, group) for x in (q, k, v))
    return Exchange.apply(attend(q, k, v, documents, window, scale), 0, 1, size, group)


class Exchange(torch.autograd.Function):
    """exchange(), whose gradient is the exchange in the other direction. Nothing is kept for backward."""

    @staticmethod
    def forward(ctx, x, cut, join, size, group):
        ctx.arguments = join, cut, size, group
        return exchange(x, cut, join, size, group)

    @staticmethod
    def backward(ctx, grad):
        return exchange(grad, *ctx.arguments), None, None, None, None


def exchange(x, cut, join, size, group):
    """Cut x (tokens, heads, D) into `size` parts along `cut`, send one to each rank; join theirs along `join`.

    cut, join  0: tokens, 1: heads
    group      name of the process group, whose ranks are in the order of their parts

    An operation of the functional collectives: torch.compile knows it, and on CUDA the host does not wait.
    """
    ops, ones = torch.ops._c10d_functional, [1] * size
    parts = x.unflatten(cut, (size, -1)).movedim(cut, 0).contiguous()
    parts = ops.wait_tensor(ops.all_to_all_single(parts, ones, ones, group))
    return parts.movedim(0, join).flatten(join, join + 1)
