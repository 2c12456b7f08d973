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
    # no gradient flows through these
    each: torch.Tensor  # (R,) fp32, the unweighted loss of each target
    log_sum: torch.Tensor  # (R,) fp32, the log of the sum of exp(logits) over the vocabulary
    correct: torch.Tensor  # (R,) bool: the target is the likeliest token; of equal logits, the lowest id wins


class Head(nn.Linear):
    """lm_head: hidden states (N, C) -> logits (N, V), or their loss.

    The loss uses its weight and the members below. A head that holds only a shard of the vocabulary
    overrides them (ranks/tp.py).
    """

    first_id = 0  # token id of the first row of the weight
    tp_size = 1  # ranks that share the vocabulary
    soft_cap = None  # a number: the logits are soft_cap * tanh(products / soft_cap)

    def forward(self, hidden, target_positions=None, targets=None, weights=None):
        """Logits; with targets, loss() of them. Both come here because FSDP2 gathers the weight for it."""
        if targets is None:
            return self.logits(hidden)
        return loss(hidden, self, target_positions, targets, weights)

    def logits(self, hidden):
        return self.capped(super().forward(hidden))

    def capped(self, logits):
        """The logits of the products with the weight."""
        return logits if self.soft_cap is None else (logits / self.soft_cap).tanh() * self.soft_cap

    def local_weight(self):
        """(V, C): the rows of the weight that this rank holds."""
        return self.weight

    def all_reduce(self, tensor, op):
        """All-reduce a tensor over the shards of the vocabulary, in place; op is "sum" or "max"."""


def objective(nll, log_sum, head):
    """The loss that is trained. This is the place to change for another one: see docs/fork.md.

    nll      (rows,) fp32, the negative log-likelihood of each target, in nats
    log_sum  (rows,) fp32, LossOut.log_sum
    head     the Head, for settings that a fork gives it
    returns  (the loss of each target, its derivative with respect to nll, and with respect to log_sum)

    All are (rows,) fp32. The gradient of the logits follows from the two derivatives. The same code runs
    eagerly, compiled, and with tensor parallelism: nll and log_sum are those of the complete vocabulary.
    An evaluation does not call this: its loss is nll.
    """
    each, by_nll, by_log_sum = nll, torch.ones_like(nll), torch.zeros_like(nll)
    # a term that a fork adds comes here, with its derivatives
    return each, by_nll, by_log_sum


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
    weight = head.local_weight()
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
    return LossOut(*ChunkedLoss.apply(hidden, weight, Targets(target_positions, targets, weights), head))


class Targets(NamedTuple):
    """Arguments of loss()."""

    positions: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor | None

    def chunk(self, start, stop):
        return Targets(*(None if x is None else x[start:stop] for x in self))


def wide(dtype):
    """The dtype of losses and sums: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


class ChunkedLoss(torch.autograd.Function):
    """Computes the gradient of each chunk in forward, while its logits exist.

    Nothing is computed twice. One (chunk, V) buffer is alive instead of the three (N, V) buffers of plain
    cross-entropy. The cost: the gradients of hidden and weight exist from forward on, not only in backward.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, head):
        n, chunk = len(targets.ids), chunk_size(weight.shape[0], hidden.device.type)
        each, log_sum = (torch.empty(n, dtype=wide(hidden.dtype), device=hidden.device) for _ in range(2))
        correct = torch.empty(n, dtype=torch.bool, device=hidden.device)
        hidden_grad = weight_grad = None
        if ctx.needs_input_grad[0]:
            hidden_grad = hidden.new_empty(n, hidden.shape[1])  # only of the positions with a target
        if ctx.needs_input_grad[1]:
            weight_grad = torch.empty_like(weight, dtype=each.dtype)  # a sum over chunks needs fp32
            if not n:
                weight_grad.zero_()  # otherwise the first chunk's product overwrites it
        needs_gradient = hidden_grad is not None or weight_grad is not None
        # One buffer for all chunks: to allocate one per chunk costs time. The last chunk may shrink it: a
        # view would be another graph for the compiler.
        logits = hidden.new_empty(min(chunk, n), weight.shape[0])
        for start in range(0, n, chunk):
            span, here = slice(start, start + chunk), targets.chunk(start, start + chunk)
            h = hidden.index_select(0, here.positions)
            torch.mm(h, weight.T, out=logits.resize_(len(h), weight.shape[0]))
            # The logits become their gradient, so that no second buffer is needed.
            each[span], log_sum[span], correct[span] = row_losses_(logits, here, head, needs_gradient)
            if hidden_grad is not None:
                torch.mm(logits, weight, out=hidden_grad[span])
            if weight_grad is not None:
                add_product_(weight_grad, logits.T, h, is_first=start == 0)
        if hidden_grad is not None:
            head.all_reduce(hidden_grad, "sum")
        if weight_grad is not None and not (weight.is_leaf and weight.grad_dtype == torch.float32):
            weight_grad = weight_grad.to(weight.dtype)
        ctx.grads, ctx.n_tokens = (hidden_grad, weight_grad), len(hidden)
        ctx.save_for_backward(targets.positions)
        ctx.mark_non_differentiable(each, log_sum, correct)
        return (each if targets.weights is None else each * targets.weights).sum(), each, log_sum, correct

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
        return hidden_grad, weight_grad, None, None


def add_product_(total, a, b, is_first):
    """total += a @ b, in total's dtype; the first product overwrites total."""
    beta = 0 if is_first else 1
    if b.dtype == total.dtype:
        total.addmm_(a, b, beta=beta)
    elif total.device.type != "cpu":
        # 16-bit factors, summed and added in fp32 inside the product: no second buffer, no rounding between.
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    else:  # torch (2.11 to 2.15) has out_dtype on the GPU only
        if is_first:
            total.zero_()
        total += a @ b


def row_losses_(logits, targets, head, needs_gradient):
    """each, log_sum and correct of LossOut for these rows.

    Changes the logits: with needs_gradient, into their gradient.

    logits   (rows, V)  of any float dtype
    targets  Targets of these rows

    Compiled it moves 6 bytes a bf16 logit, eager 26 (tests/unit/test_loss.py counts them). A compiled
    function can't all-reduce halfway, so with tensor parallelism it is eager, as where there is no compiler.
    """
    if head.tp_size == 1 and has_compiler(logits.device.type):
        # Without a gradient no weights are read; to pass them would only be another graph.
        each, log_sum, correct, at_target = compiled(
            logits, targets.ids, targets.weights if needs_gradient else None, head, needs_gradient)
        if needs_gradient:
            logits.scatter_(1, targets.ids[:, None], at_target)
        return each, log_sum, correct
    # fp32 logits change in place; others are copied to fp32, piece by piece. So are those with a cap, which
    # the gradient needs as they are.
    is_wide = logits.dtype == wide(logits.dtype) and head.soft_cap is None
    piece = PIECE if logits.device.type == "cpu" else GPU_PIECE
    rows = len(logits) if is_wide else max(1, piece // logits.shape[1])
    pieces = [eager_(logits[i : i + rows], targets.chunk(i, i + rows), head, needs_gradient)
              for i in range(0, len(logits), rows)]
    return map(torch.cat, zip(*pieces))


def with_factors(nll, log_sum, weights, head):
    """(objective, factor, at_target), each (rows, 1) like the arguments.

    The gradient of the logits is factor times the probabilities, but at_target at the target.
    """
    each, by_nll, by_log_sum = objective(nll, log_sum, head)
    # probability minus one, exact for likely targets too
    factor, at_target = by_nll + by_log_sum, by_nll * torch.expm1(-nll) + by_log_sum * torch.exp(-nll)
    if weights is not None:
        factor, at_target = factor * weights[:, None], at_target * weights[:, None]
    return each, factor, at_target


def eager_(logits, targets, head, needs_gradient):
    """row_losses_ as single operations, with all-reduces over the shards of the vocabulary."""
    ids, products = targets.ids[:, None] - head.first_id, logits
    if head.soft_cap is not None:
        logits = head.capped(logits.to(wide(logits.dtype)))
    largest_here, likeliest = logits.max(dim=1, keepdim=True)  # of equal logits the first
    largest = largest_here.to(wide(logits.dtype), copy=True)
    head.all_reduce(largest, "max")
    x = logits.sub_(largest) if logits.dtype == largest.dtype else logits - largest
    is_here = (ids >= 0) & (ids < logits.shape[1])  # has this rank's shard the target?
    is_beaten = (largest_here == largest) & (likeliest < ids)  # by an equal logit of a lower id
    ids = ids.clamp(0, logits.shape[1] - 1)
    picked = x.gather(1, ids) * is_here
    sums = torch.cat((picked, is_beaten.to(x.dtype), x.exp_().sum(dim=1, keepdim=True)), dim=1)
    head.all_reduce(sums, "sum")
    picked, n_beaten, exp_sum = sums.split(1, dim=1)
    each = nll = exp_sum.log() - picked
    log_sum = exp_sum.log() + largest
    if needs_gradient:
        each, factor, at_target = with_factors(nll, log_sum, targets.weights, head)
        torch.div(x, exp_sum / factor, out=logits)
        at_target = at_target.to(logits.dtype)
        if head.tp_size > 1:  # the target may be in another rank's shard
            at_target = torch.where(is_here, at_target, logits.gather(1, ids))
        logits.scatter_(1, ids, at_target)
        if head.soft_cap is not None:
            products.copy_(logits.mul_(cap_slope(products, head.soft_cap)))
    return each[:, 0], log_sum[:, 0], ((picked == 0) & (n_beaten == 0))[:, 0]


def cap_slope(products, soft_cap):
    """The derivative of soft_cap * tanh(products / soft_cap), in fp32: 1 - tanh²."""
    return 1 - (products.to(wide(products.dtype)) / soft_cap).tanh().square()


def fused_(logits, target_ids, weights, head, needs_gradient):
    """row_losses_ for the compiler, which holds no (rows, V) tensor but the logits.

    It returns the gradient at the targets, (rows, 1), which the caller writes: one number a row, for which a
    kernel over all logits would have to search.
    """
    x, target_ids = logits.to(wide(logits.dtype)), target_ids[:, None]
    if head.soft_cap is not None:
        slope, x = cap_slope(x, head.soft_cap), head.capped(x)
    largest, likeliest = x.max(dim=1, keepdim=True)
    x = x - largest
    exp_log_sum = x.exp().sum(dim=1, keepdim=True).log()
    each = nll = exp_log_sum - x.gather(1, target_ids)
    log_sum, at_target = exp_log_sum + largest, None
    if needs_gradient:
        each, factor, at_target = with_factors(nll, log_sum, weights, head)
        gradient = (x - exp_log_sum).exp() * factor
        if head.soft_cap is not None:
            gradient, at_target = gradient * slope, at_target * slope.gather(1, target_ids)
        logits.copy_(gradient)
        at_target = at_target.to(logits.dtype)
    return each[:, 0], log_sum[:, 0], (likeliest == target_ids)[:, 0], at_target


def compiled(logits, target_ids, weights, head, needs_gradient):
    """fused_(), compiled once for each vocabulary: to divide by a number that is not known is slow."""
    for tensor in (logits, target_ids, weights):
        if tensor is not None:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return compile_fused()(logits, target_ids, weights, head, needs_gradient)


@functools.cache
def compile_fused():
    warnings.filterwarnings("ignore", "\nOnline softmax is disabled")  # says that few rows are slower
    return torch.compile(fused_, dynamic=False, fullgraph=True)
