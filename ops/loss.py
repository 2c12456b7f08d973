"""The next-token loss. Logits exist only for positions with a target, and only for CHUNK of them at a time.

Shapes: N tokens of a micro-batch, R targets, C hidden size, V tokens of the vocabulary that this rank's head
holds (all, without tensor parallelism).
"""

from typing import NamedTuple

import torch
from torch import nn

CHUNK = 256  # targets whose logits exist at a time


class LossOut(NamedTuple):
    """The loss of a micro-batch."""

    total: torch.Tensor  # () fp32, nats summed over the targets; the caller divides
    each: torch.Tensor  # (R,) fp32, the loss of each target; no gradient flows through it
    correct: torch.Tensor | None  # (R,) bool, is the likeliest token the target? None: not computed


class Head(nn.Linear):
    """lm_head: hidden states (N, C) -> logits (N, V).

    The loss uses its weight and the three members below. A head that holds only a shard of the vocabulary
    overrides them (ranks/tp.py).
    """

    first_id = 0  # token id of the first row of the weight

    def local_weight(self):
        """(V, C): the rows of the weight that this rank holds."""
        return self.weight

    def all_reduce(self, tensor, op):
        """All-reduce a tensor over the shards of the vocabulary, in place; op is "sum" or "max"."""


def loss(hidden, head, target_positions, targets, weights=None):
    """Next-token cross-entropy, summed over the targets. Returns a LossOut.

    hidden           (N, C)  after the final norm
    head             a Head
    target_positions (R,)    int64; positions in hidden whose next token is a target. They come from the data:
                             to find them on the device would make the host wait for it
    targets          (R,)    int64; that next token
    weights          (R,)    must be None: a float weight per target is not supported yet

    Raises NotImplementedError if weights are passed.
    """
    if weights is not None:
        raise NotImplementedError("the loss does not support weights yet")
    total, each = ChunkedCrossEntropy.apply(
        hidden[target_positions], head.local_weight(), targets, head, torch.is_grad_enabled())
    return LossOut(total, each, None)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradient of each chunk in forward, while its logits exist.

    Nothing is computed twice. One (CHUNK, V) buffer is alive instead of the three (N, V) buffers of plain
    cross-entropy. The cost: the gradients of hidden and weight exist from forward on, not only in backward.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, head, grad_enabled):
        each = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        hidden_grad = weight_grad = None
        if grad_enabled and ctx.needs_input_grad[0]:
            hidden_grad = torch.empty_like(hidden)
        if grad_enabled and ctx.needs_input_grad[1]:
            weight_grad = torch.empty_like(weight, dtype=torch.float32)  # a sum over chunks needs fp32
            if not len(targets) or hidden.dtype != torch.float32:
                weight_grad.zero_()  # otherwise the first chunk's product overwrites it (beta=0 below)
        # One buffer for all chunks: to allocate one per chunk costs time.
        buffer = hidden.new_empty(min(CHUNK, len(targets)), weight.shape[0])
        for start in range(0, len(targets), CHUNK):
            h = hidden[start : start + CHUNK]
            t = targets[start : start + CHUNK, None] - head.first_id
            # (CHUNK, V). Everything below changes it in place, so that no second buffer is needed.
            logits = torch.mm(h, weight.T, out=buffer[: len(h)]).float()
            largest = logits.amax(dim=1, keepdim=True)
            head.all_reduce(largest, "max")
            logits -= largest
            # 1.0 where this rank's shard of the vocabulary has the target
            is_here = ((t >= 0) & (t < weight.shape[0])).float()
            t = t.clamp(0, weight.shape[0] - 1)
            picked = logits.gather(1, t) * is_here
            sums = torch.cat((logits.exp_().sum(dim=1, keepdim=True), picked), dim=1)
            head.all_reduce(sums, "sum")
            torch.sub(sums[:, 0].log(), sums[:, 1], out=each[start : start + CHUNK])
            if hidden_grad is None and weight_grad is None:
                continue
            # The gradient of the logits: probabilities minus the one-hot target.
            logits /= sums[:, :1]
            logits.scatter_add_(1, t, -is_here)
            if hidden_grad is not None:
                torch.mm(logits.to(h.dtype), weight, out=hidden_grad[start : start + CHUNK])
            if weight_grad is not None and h.dtype == torch.float32:
                weight_grad.addmm_(logits.T, h, beta=min(start, 1))  # no second (V, C) buffer
            elif weight_grad is not None:
                weight_grad += logits.to(h.dtype).T @ h
        if hidden_grad is not None:
            head.all_reduce(hidden_grad, "sum")
        if weight_grad is not None and not (weight.is_leaf and weight.grad_dtype == torch.float32):
            weight_grad = weight_grad.to(weight.dtype)
        ctx.grads = hidden_grad, weight_grad
        ctx.mark_non_differentiable(each)
        return each.sum(), each

    @staticmethod
    def backward(ctx, grad, _):
        if ctx.grads is None:
            raise RuntimeError("backward was already called on this loss, and its gradients were scaled in "
                               "place; compute the loss again")
        hidden_grad, weight_grad = ctx.grads
        ctx.grads = None
        for g in (hidden_grad, weight_grad):
            if g is not None:
                g.mul_(grad)
        return hidden_grad, weight_grad, None, None, None
