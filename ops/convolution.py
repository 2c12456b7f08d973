"""A causal depthwise convolution over a few tokens, and SiLU, within each document of a micro-batch.

Shapes: N tokens, W channels, T taps: each token and the T - 1 before it, which are 0 before a document.
"""

import torch
import torch.nn.functional as F

PIECE = 2**18  # elements that the CPU computes at a time: they stay in its cache


def short_convolution(x, weight, documents, past=None):
    """silu(sum over j < T of weight[:, 0, T - 1 - j] * x[token - j]), in fp32; returns x's dtype.

    x          (N, W)
    weight     (W, 1, T), as in nn.Conv1d
    documents  Documents whose lengths sum to N
    past       dict of one document's earlier tokens, updated in place: "inputs", the last T - 1 rows of x

    Backward computes the sum again: only x and the weight are kept. An operation of its own because conv1d
    wants tokens last, keeps three tensors, and takes three times as long on the CPU.
    """
    T = weight.shape[2]
    numbers = torch.arange(len(x), device=x.device)
    # rows of x among rows where each document begins with T - 1 rows of zeros
    place = numbers + (T - 1) * torch.bucketize(numbers, documents.offsets, right=True)
    before = None
    if past is not None:
        before = past.get("inputs", x.new_zeros(T - 1, x.shape[1]))
        past["inputs"] = torch.cat((before, x))[len(x) :]
    return ShortConvolution.apply(x, weight, place, before, len(documents.offsets))


class ShortConvolution(torch.autograd.Function):
    """Plain operations, which torch.compile sees and fuses."""

    @staticmethod
    def forward(ctx, x, weight, place, before, n):
        ctx.save_for_backward(x, weight, place)
        ctx.n = n
        rows, taps = spread(x, place, weight, n), by_lag(weight)
        if before is not None:
            rows[: len(before)] = before
        y = torch.empty_like(rows, dtype=taps.dtype)
        for span in pieces(rows, taps):
            convolve(rows, taps, *span, out=y[slice(*span)])
        return F.silu(y.index_select(0, place)).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, place = ctx.saved_tensors
        rows, taps = spread(x, place, weight, ctx.n), by_lag(weight)
        grad = spread(grad, place, weight, ctx.n)
        drows, dtaps = torch.zeros_like(rows, dtype=taps.dtype), torch.zeros_like(taps)
        for start, stop in pieces(rows, taps):
            y = convolve(rows, taps, start, stop)
            sigmoid = y.sigmoid()
            dy = grad[start:stop] * sigmoid * (1 + y * (1 - sigmoid))
            for j, tap in enumerate(taps):
                drows[start - j : stop - j].addcmul_(dy, tap)
                dtaps[j] += (dy * rows[start - j : stop - j]).sum(0)
        dweight = dtaps.flip(0).T[:, None].to(weight.dtype)
        return drows.index_select(0, place).to(x.dtype), dweight, None, None, None


def by_lag(weight):
    """(W, 1, T) -> (T, W), in fp32 (fp64 for fp64): the first row is for the token itself."""
    return weight[:, 0].flip(1).T.to(torch.promote_types(weight.dtype, torch.float32)).contiguous()


def spread(x, place, weight, n):
    """x at its places among rows of zeros: T - 1 before each of n - 1 documents, and after the last."""
    rows = x.new_zeros(len(x) + (weight.shape[2] - 1) * n, x.shape[1])
    return rows.index_copy_(0, place, x)


def pieces(rows, taps):
    """(start, stop) of rows that are computed at a time; the first T - 1 rows have no result."""
    first, n = len(taps) - 1, len(rows)
    if rows.device.type != "cpu" or torch.compiler.is_compiling():
        return [(first, n)]
    size = max(1, PIECE // rows.shape[1])
    return [(start, min(start + size, n)) for start in range(first, n, size)]


def convolve(rows, taps, start, stop, out=None):
    """Rows start..stop of the convolution, before SiLU."""
    y = torch.mul(rows[start:stop], taps[0], out=out)
    for j in range(1, len(taps)):
        y.addcmul_(rows[start - j : stop - j], taps[j])
    return y
