"""The next-token loss. Logits exist only for positions with a target, and only for a chunk of them at a time.

Shapes: N tokens of a micro-batch, R targets, C hidden size, V tokens of the vocabulary that this rank's head
holds (all, without tensor parallelism).
"""

import functools
import warnings
from typing import NamedTuple

import torch
from torch import nn

from ops.compiler import has_compiler

CHUNK = 256  # targets whose logits exist at a time on the CPU
# 16-bit logits that are converted to fp32 at a time where no compiler fuses it: 64 MiB, on the GPU 256
PIECE, GPU_PIECE = 2**24, 2**26


class LossOut(NamedTuple):
    """The loss of a micro-batch."""

    total: torch.Tensor  # () fp32, nats summed over the targets (times their weights); the caller divides
    each: torch.Tensor  # (R,) fp32, the unweighted loss of each target; no gradient flows through it
    correct: torch.Tensor  # (R,) bool: the target is the likeliest token; of equal logits, the lowest id wins


class Head(nn.Linear):
    """lm_head: hidden states (N, C) -> logits (N, V).

    The loss uses its weight and the members below. A head that holds only a shard of the vocabulary
    overrides them (ranks/tp.py).
    """

    first_id = 0  # token id of the first row of the weight
    tp_size = 1  # ranks that share the vocabulary
    soft_cap = None  # a number: the logits are soft_cap * tanh(products / soft_cap)

    def forward(self, hidden):
        return self.capped(super().forward(hidden))

    def capped(self, logits):
        """The logits of the products with the weight."""
        return logits if self.soft_cap is None else (logits / self.soft_cap).tanh() * self.soft_cap

    def local_weight(self):
        """(V, C): the rows of the weight that this rank holds."""
        return self.weight

    def all_reduce(self, tensor, op):
        """All-reduce a tensor over the shards of the vocabulary, in place; op is "sum" or "max"."""


def chunk_size(vocabulary, device_type):
    """Targets whose logits exist at a time, for a head that holds `vocabulary` tokens.

    On the CPU CHUNK. Elsewhere about 1 GiB of bf16 logits, in multiples of 256 (3,584 for 152k tokens): each
    chunk reads and writes the head's fp32 gradient once, so small chunks would spend their time on that.
    """
    return CHUNK if device_type == "cpu" else max(256, round(2**29 / vocabulary / 256) * 256)


def loss(hidden, head, target_positions, targets, weights=None):
    """Next-token cross-entropy, summed over the targets. Returns a LossOut.

    hidden           (N, C)  after the final norm
    head             a Head
    target_positions (R,)    int64, no two equal; positions in hidden whose next token is a target. They come
                             from the data: to find them on the device would make the host wait for it
    targets          (R,)    int64; that next token
    weights          (R,)    fp32; what the loss of each target is multiplied by in the total. None: 1

    All of it is in fp64 if hidden is.
    """
    return LossOut(*ChunkedCrossEntropy.apply(
        hidden, head.local_weight(), target_positions, targets, weights, head, torch.is_grad_enabled()))


def wide(dtype):
    """The dtype of losses and sums: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradient of each chunk in forward, while its logits exist.

    Nothing is computed twice. One (chunk, V) buffer is alive instead of the three (N, V) buffers of plain
    cross-entropy. The cost: the gradients of hidden and weight exist from forward on, not only in backward.
    """

    @staticmethod
    def forward(ctx, hidden, weight, target_positions, targets, weights, head, grad_enabled):
        n, chunk = len(targets), chunk_size(weight.shape[0], hidden.device.type)
        each = torch.empty(n, dtype=wide(hidden.dtype), device=hidden.device)
        correct = torch.empty(n, dtype=torch.bool, device=hidden.device)
        hidden_grad = weight_grad = None
        if grad_enabled and ctx.needs_input_grad[0]:
            hidden_grad = hidden.new_empty(n, hidden.shape[1])  # only of the positions with a target
        if grad_enabled and ctx.needs_input_grad[1]:
            weight_grad = torch.empty_like(weight, dtype=each.dtype)  # a sum over chunks needs fp32
            if not n:
                weight_grad.zero_()  # otherwise the first chunk's product overwrites it
        needs_gradient = hidden_grad is not None or weight_grad is not None
        # One buffer for all chunks: to allocate one per chunk costs time. The last chunk may shrink it: a
        # view would be another graph for the compiler.
        logits = hidden.new_empty(min(chunk, n), weight.shape[0])
        for start in range(0, n, chunk):
            span = slice(start, start + chunk)
            h = hidden.index_select(0, target_positions[span])
            torch.mm(h, weight.T, out=logits.resize_(len(h), weight.shape[0]))
            row_weights = None if weights is None else weights[span]
            # The logits become their gradient, so that no second buffer is needed.
            each[span], correct[span] = cross_entropy_(
                logits, targets[span], row_weights, head, needs_gradient)
            if hidden_grad is not None:
                torch.mm(logits, weight, out=hidden_grad[span])
            if weight_grad is not None:
                add_product_(weight_grad, logits.T, h, is_first=start == 0)
        if hidden_grad is not None:
            head.all_reduce(hidden_grad, "sum")
        if weight_grad is not None and not (weight.is_leaf and weight.grad_dtype == torch.float32):
            weight_grad = weight_grad.to(weight.dtype)
        ctx.grads, ctx.n_tokens = (hidden_grad, weight_grad), len(hidden)
        ctx.save_for_backward(target_positions)
        ctx.mark_non_differentiable(each, correct)
        return (each if weights is None else each * weights).sum(), each, correct

    @staticmethod
    def backward(ctx, grad, *_):
        if ctx.grads is None:
            raise RuntimeError("backward was already called on this loss, and its gradients were scaled in "
                               "place; compute the loss again")
        hidden_grad, weight_grad = ctx.grads
        ctx.grads = None
        for g in (hidden_grad, weight_grad):
            if g is not None:
                g.mul_(grad)
        if hidden_grad is not None:
            # The gradient of hidden[target_positions] would sort them, in case two are equal.
            zeros = hidden_grad.new_zeros(ctx.n_tokens, hidden_grad.shape[1])
            hidden_grad = zeros.index_copy_(0, ctx.saved_tensors[0], hidden_grad)
        return hidden_grad, weight_grad, None, None, None, None, None


def add_product_(total, a, b, is_first):
    """total += a @ b, in total's dtype; the first product overwrites total."""
    beta = 0 if is_first else 1
    if b.dtype == total.dtype:
        total.addmm_(a, b, beta=beta)
    elif total.device.type != "cpu":
        # 16-bit factors, summed and added in fp32 inside the product: no second buffer, no rounding between.
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    else:  # torch (2.11 to 2.13) has out_dtype on the GPU only
        if is_first:
            total.zero_()
        total += a @ b


def cross_entropy_(logits, targets, weights, head, needs_gradient):
    """The loss of each target, (rows,) fp32, and whether it is the likeliest token, (rows,) bool.

    Changes the logits: with needs_gradient, into their gradient.

    logits   (rows, V)  of any float dtype
    targets  (rows,)    int64
    weights  (rows,)    factors of the rows of the gradient, or None

    Compiled it moves 6 bytes a bf16 logit, eager 26 (tests/unit/test_loss.py counts them). A compiled
    function can't all-reduce halfway, so with tensor parallelism it is eager, as where there is no compiler.
    """
    if head.tp_size == 1 and has_compiler(logits.device.type):
        if head.soft_cap is not None:
            slope = cap_slope(logits.gather(1, targets[:, None]), head.soft_cap)[:, 0]
        # Without a gradient no weights are read; to pass them would only be another graph.
        each, correct = compiled(
            logits, targets, weights if needs_gradient else None, needs_gradient, head.soft_cap)
        if needs_gradient:
            at_target = torch.expm1(-each)  # probability minus one
            if weights is not None:
                at_target = at_target * weights
            if head.soft_cap is not None:
                at_target = at_target * slope
            logits.scatter_(1, targets[:, None], at_target.to(logits.dtype)[:, None])
        return each, correct
    # fp32 logits change in place; others are copied to fp32, piece by piece. So are those with a cap, which
    # the gradient needs as they are.
    is_wide = logits.dtype == wide(logits.dtype) and head.soft_cap is None
    piece = PIECE if logits.device.type == "cpu" else GPU_PIECE
    rows = len(logits) if is_wide else max(1, piece // logits.shape[1])
    results = []
    for span in (slice(start, start + rows) for start in range(0, len(logits), rows)):
        row_weights = None if weights is None else weights[span]
        results.append(eager_(logits[span], targets[span], row_weights, head, needs_gradient))
    each, correct = map(torch.cat, zip(*results))
    return each, correct


def eager_(logits, targets, weights, head, needs_gradient):
    """cross_entropy_ as single operations, with all-reduces over the shards of the vocabulary."""
    t, products = targets[:, None] - head.first_id, logits
    if head.soft_cap is not None:
        logits = head.capped(logits.to(wide(logits.dtype)))
    largest, likeliest = logits.max(dim=1, keepdim=True)  # of equal logits the first
    largest_here = largest = largest.to(wide(logits.dtype))
    if head.tp_size > 1:
        head.all_reduce(largest := largest_here.clone(), "max")
    x = logits.sub_(largest) if logits.dtype == largest.dtype else logits - largest
    # 1.0 where this rank's shard of the vocabulary has the target
    is_here = ((t >= 0) & (t < logits.shape[1])).to(x.dtype)
    t = t.clamp(0, logits.shape[1] - 1)
    picked = x.gather(1, t) * is_here
    # 1.0 where this rank has the largest logit at an id below the target
    is_beaten = ((largest_here == largest) & (likeliest + head.first_id < targets[:, None])).to(x.dtype)
    sums = torch.cat((x.exp_().sum(dim=1, keepdim=True), picked, is_beaten), dim=1)
    head.all_reduce(sums, "sum")
    each = sums[:, 0].log() - sums[:, 1]
    correct = (sums[:, 1] == 0) & (sums[:, 2] == 0)
    if needs_gradient:
        # The gradient of the logits: probabilities minus the one-hot target.
        sums = sums[:, :1]
        at_target = x.gather(1, t) / sums - is_here
        if weights is not None:
            at_target, sums = at_target * weights[:, None], sums / weights[:, None]
        torch.div(x, sums, out=logits).scatter_(1, t, at_target.to(logits.dtype))
        if head.soft_cap is not None:
            products.copy_(logits.mul_(cap_slope(products, head.soft_cap)))
    return each, correct


def cap_slope(products, soft_cap):
    """The derivative of soft_cap * tanh(products / soft_cap), in fp32: 1 - tanh²."""
    return 1 - (products.to(wide(products.dtype)) / soft_cap).tanh().square()


def fused_(logits, targets, weights, needs_gradient, soft_cap=None):
    """cross_entropy_ for the compiler, which holds no (rows, V) tensor but the logits.

    It leaves the gradient at the targets to its caller: one number a row, for which a kernel over all logits
    would have to search.
    """
    x = logits.to(wide(logits.dtype))
    if soft_cap is not None:
        slope, x = cap_slope(x, soft_cap), (x / soft_cap).tanh() * soft_cap
    largest, likeliest = x.max(dim=1, keepdim=True)
    x = x - largest
    log_sum = x.exp().sum(dim=1, keepdim=True).log()
    each = log_sum - x.gather(1, targets[:, None])
    if needs_gradient:
        probabilities = (x - log_sum).exp()
        if soft_cap is not None:
            probabilities = probabilities * slope
        logits.copy_(probabilities if weights is None else probabilities * weights[:, None])
    return each[:, 0], likeliest[:, 0] == targets


def compiled(logits, targets, weights, needs_gradient, soft_cap=None):
    """fused_(), compiled once for each vocabulary: to divide by a number that is not known is slow."""
    for tensor in (logits, targets, weights):
        if tensor is not None:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return compile_fused()(logits, targets, weights, needs_gradient, soft_cap)


@functools.cache
def compile_fused():
    warnings.filterwarnings("ignore", "\nOnline softmax is disabled")  # says that few rows are slower
    return torch.compile(fused_, dynamic=False, fullgraph=True)
