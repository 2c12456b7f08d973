"""Causal attention within documents, with capped scores: cap * tanh(score / cap). Gemma 2 (arXiv 2408.00118).

Of torch's fused kernels only flex_attention can cap, and it has no backward on the CPU. Here plain products
compute a block of queries at a time. Only q, k, v, the output and a logsumexp per head are kept: backward
computes the scores of each block again, as FlashAttention (2205.14135, 2307.08691) does.

Shapes: as in ops/attention.py.
"""

import functools

import torch

# scores (heads x queries x keys) that exist at a time; about four tensors of them in fp32
BLOCK, GPU_BLOCK = 2**22, 2**26


def blocks(q, k, offsets, window):
    """Yield (queries, keys, visible) for one block of queries after another.

    queries  slice of rows of q, all of one document
    keys     slice of rows of k that these queries see
    visible  (queries, keys) bool: which of them each query sees
    """
    past = len(k) - len(q)  # tokens whose keys come from the cache; then there is one document
    limit = (BLOCK if q.device.type == "cpu" else GPU_BLOCK) // q.shape[1]
    offsets = offsets.tolist()
    for start, stop in zip(offsets, offsets[1:]):
        length = stop - start + past
        most = max(window, 128) if window else length  # more rows of a window would be computed for nothing
        rows = max(1, min(most, limit // min(length, 2 * most)))
        for first in range(start, stop, rows):
            last = min(first + rows, stop)
            begin = max(start, first + past + 1 - window) if window else start
            end = last + past
            visible = torch.ones(last - first, end - begin, dtype=torch.bool, device=q.device)
            visible = visible.tril_(first + past - begin)
            if window:
                visible = visible.triu_(first + past - begin + 1 - window)
            yield slice(first, last), slice(begin, end), visible


def by_group(x, n_groups):
    """(rows, heads, D) -> (groups, heads / groups * rows, D): one matrix for the heads that share keys."""
    return x.unflatten(1, (n_groups, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def by_row(x, rows):
    """The inverse of by_group: (groups, heads / groups * rows, D) -> (rows, heads, D)."""
    return x.unflatten(1, (-1, rows)).permute(2, 0, 1, 3).flatten(1, 2)


def tanh_and_scores(q, k, visible, scale, cap):
    """(tanh(scores / cap), capped scores, -inf where not visible), of q (K, R, D) and k (K, S, D), fp32."""
    scores = q @ k.mT
    tanh = (scores.to(torch.promote_types(q.dtype, torch.float32)) * (scale / cap)).tanh_()
    capped = (tanh * cap).view(len(q), -1, *visible.shape).masked_fill_(~visible, -torch.inf)
    return tanh, capped.view_as(tanh)


@torch.library.custom_op("sft::soft_capped_attention", mutates_args=())
def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offsets: torch.Tensor, window: int,
            scale: float, cap: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(output (N, H, D), logsumexp of each query and head (N, H) fp32). One operation of a compiled block.

    offsets  (documents + 1,) int64 on the CPU
    window   0: no limit
    """
    K = k.shape[1]
    y, logsumexp = empty_results(q)
    for rows, keys, visible in blocks(q, k, offsets, window):
        _, scores = tanh_and_scores(by_group(q[rows], K), k[keys].transpose(0, 1), visible, scale, cap)
        sums = scores.logsumexp(dim=-1, keepdim=True)
        probabilities = scores.sub_(sums).exp_().to(v.dtype)
        y[rows] = by_row(probabilities @ v[keys].transpose(0, 1), len(visible))
        logsumexp[rows] = by_row(sums, len(visible))[..., 0]
    return y, logsumexp


@torch.library.custom_op("sft::soft_capped_attention_backward", mutates_args=())
def backward(grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, y: torch.Tensor,
             logsumexp: torch.Tensor, offsets: torch.Tensor, window: int, scale: float,
             cap: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v. FlashAttention's, with the factor 1 - tanh² of the cap."""
    K, dtype = k.shape[1], q.dtype
    q_grad = q.new_empty(q.shape)
    k_grad, v_grad = (x.new_zeros(x.shape, dtype=logsumexp.dtype).transpose(0, 1) for x in (k, v))
    for rows, keys, visible in blocks(q, k, offsets, window):
        queries, y_grad = by_group(q[rows], K), by_group(grad[rows], K)
        k_block, v_block = k[keys].transpose(0, 1), v[keys].transpose(0, 1)
        tanh, scores = tanh_and_scores(queries, k_block, visible, scale, cap)
        probabilities = scores.sub_(by_group(logsumexp[rows][..., None], K)).exp_()
        v_grad[:, keys] += probabilities.to(dtype).mT @ y_grad
        means = (y_grad * by_group(y[rows], K)).sum(dim=-1, keepdim=True, dtype=logsumexp.dtype)
        score_grad = (y_grad @ v_block.mT - means).mul_(probabilities)
        score_grad = score_grad.mul_(tanh.square_().neg_().add_(1)).mul_(scale).to(dtype)
        q_grad[rows] = by_row(score_grad @ k_block, len(visible))
        k_grad[:, keys] += score_grad.mT @ queries
        del tanh, scores, probabilities, score_grad  # before the next block has its own
    k_grad, v_grad = (x.transpose(0, 1).to(dtype) for x in (k_grad, v_grad))
    return q_grad, k_grad, v_grad


@forward.register_fake
def empty_results(q, *_):
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))


@backward.register_fake
def _(grad, q, k, v, *_):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def keep(ctx, inputs, output):
    q, k, v, offsets, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, *output, offsets)


def gradients(ctx, grad, _):
    return (*backward(grad, *ctx.saved_tensors, *ctx.numbers), None, None, None, None)


forward.register_autograd(gradients, setup_context=keep)


@functools.cache
def soft_capped(cap):
    """The function that computes attention with scores capped at `cap`. Cached: see ops.attention.opaque."""

    def attend_soft_capped(q, k, v, documents, window, scale=None):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return forward(q, k, v, documents.host_offsets, window or 0, scale, cap)[0]

    return attend_soft_capped
