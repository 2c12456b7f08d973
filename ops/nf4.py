"""A frozen matrix in 4 bits, as QLoRA stores its base model: NormalFloat4 in blocks of 64, scales in 8 bits.

This file has the 16 levels, the storage of one matrix, products with it and the linear layer made of them, in
plain PyTorch on any device. It knows nothing of adapters, files or other processes.
Source: Dettmers et al. 2023, QLoRA, arXiv 2305.14314, section 3 and appendix E.

Row o of every stored tensor holds all of row o of the matrix (an output feature) and does not depend on other
rows. Slices of rows are, bit for bit, the storage of that slice of the matrix, so ranks may hold one each.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn

from settings.errors import UserError

BLOCK = 64  # neighbours in a row that share one scale: their largest magnitude
GROUP = 256  # blocks of a row whose scales share two fp32 constants; a row's last group may have fewer
PIECE = 2**22  # values of the matrix that are dequantised at a time in a product: 16 MiB in fp32
TINY = torch.finfo(torch.float32).tiny  # divides in place of a scale or step of 0, and leaves no NaN


def quantile_levels():
    """The levels, (16,) fp32, ascending: 0, and quantiles of N(0, 1) scaled to [-1, 1], 8 above 0, 7 below.

    They are evenly spaced in probability from 1/2 to the mean of 1 - 1/32 and 1 - 1/30. The table of
    bitsandbytes differs by 2e-7.
    """
    edge = 1 - (1 / 32 + 1 / 30) / 2
    above, below = (
        torch.special.ndtri(torch.linspace(edge, 0.5, n + 1, dtype=torch.float64)[:n]) for n in (8, 7))
    return (torch.cat((-below, torch.zeros(1), above.flip(0))) / above[0]).float()


LEVELS = quantile_levels()


@functools.cache
def pairs(device):
    """The two levels of each byte, (256,) int64 of two fp32 each: that is three times as fast to gather."""
    both = torch.stack((LEVELS.repeat_interleave(16), LEVELS.repeat(16)), dim=1)
    return both.view(torch.int64).flatten().to(device)


def views(packed, columns):
    """Views of packed, (rows, bytes) uint8, which stores a (rows, columns) matrix row by row; / rounds up.

    coarse  (rows, 2 * groups)    fp32; low and step of each group of 256 blocks
    scales  (rows, columns / 64)  uint8; the scale of a block is low + code**2 * step
    codes   (rows, columns / 2)   uint8; two 4-bit indices of LEVELS, the left one in the high bits
    """
    blocks = -(-columns // BLOCK)
    first, second = 8 * -(-blocks // GROUP), 8 * -(-blocks // GROUP) + blocks
    return {"coarse": packed[:, :first].view(torch.float32), "scales": packed[:, first:second],
            "codes": packed[:, second : second + -(-columns // 2)]}


def empty(rows, columns, device):
    """Undefined packed storage, (rows, bytes) uint8: 0.525 bytes a weight for 896 columns.

    The bytes of a row are a multiple of 4.
    """
    blocks = -(-columns // BLOCK)
    used = 8 * -(-blocks // GROUP) + blocks + -(-columns // 2)
    return torch.empty(rows, used + -used % 4, dtype=torch.uint8, device=device)


def block_scales(storage, start, stop):
    """The scales in use of the blocks in rows start..stop, (stop - start, blocks) fp32."""
    scales = storage["scales"][start:stop].float().square_()
    for g, part in enumerate(scales.split(GROUP, dim=1)):
        low, step = storage["coarse"][start:stop, 2 * g : 2 * g + 2].split(1, dim=1)
        # not fused: a fused product may round differently where a vector register is not filled
        part.mul_(step).add_(low)
    return scales


@torch.no_grad()
def quantize_(storage, weight):
    """Fill `storage` from weight (rows, columns) of any float dtype, PIECE / 4 values at a time.

    Raises UserError where weight is NaN or infinite: one device sync a piece, to see whether it is.

    The 8 bits of a scale encode the square root of its distance to the smallest scale of the group; the paper
    stores a float around the mean. On normal weights this adds 0.03 to 0.05% to the mean error of one
    quantisation (0.0728 std), the paper's way 0.2%. With one column 100 times the others it adds 0.1%, the
    paper's way 9%, even steps 0.8%: a few huge scales leave fine steps for the rest. A square root is rounded
    exactly; a logarithm is not, and slices of rows could differ.
    """
    rows, columns = weight.shape
    midpoints = ((LEVELS[1:] + LEVELS[:-1]) / 2).to(weight.device)
    rows_at_once = max(1, PIECE // 4 // columns)
    for start in range(0, rows, rows_at_once):
        stop = min(start + rows_at_once, rows)
        values = F.pad(weight[start:stop].float(), (0, -columns % BLOCK)).unflatten(1, (-1, BLOCK))
        largest = values.abs().amax(dim=2)  # (rows, blocks); NaN where a value is
        if not largest.isfinite().all():
            row, column = (~values.flatten(1).isfinite()).nonzero()[0].tolist()
            raise UserError(f"the weight is {weight[start + row, column].item()} at row {start + row}, "
                            f"column {column}; only finite numbers can be quantised")
        for g, part in enumerate(largest.split(GROUP, dim=1)):
            low, high = part.aminmax(dim=1, keepdim=True)
            step = (high - low) / 255**2
            storage["coarse"][start:stop, 2 * g : 2 * g + 2] = torch.cat((low, step), dim=1)
            codes = ((part - low) / step.clamp_min(TINY)).sqrt().round()
            storage["scales"][start:stop, GROUP * g : GROUP * (g + 1)] = codes
        # Nearest under the scale that will be used, not the scale it encodes: no value ends farther off.
        scales = block_scales(storage, start, stop).clamp_min(TINY).unsqueeze(2)
        codes = torch.bucketize(
            values / scales, midpoints, out_int32=True).flatten(1)[:, : columns + columns % 2]
        storage["codes"][start:stop] = (codes[:, 0::2] << 4) | codes[:, 1::2]


def dequantize(storage, dtype, start, stop, columns=None):
    """Rows start..stop of the matrix, (stop - start, columns) in `dtype`. An odd `columns` must be given."""
    scales, codes = block_scales(storage, start, stop), storage["codes"][start:stop]
    columns = columns or 2 * codes.shape[1]
    values = pairs(codes.device).index_select(0, codes.flatten().int())
    values = values.view(torch.float32).view(codes.shape[0], 2 * codes.shape[1])[:, :columns]
    full = columns // BLOCK
    values[:, : full * BLOCK].unflatten(1, (full, BLOCK)).mul_(scales[:, :full, None])
    values[:, full * BLOCK :].mul_(scales[:, full:])  # of the last block, if the row ends within it
    return values.to(dtype)


def matmul(x, storage, columns, transpose):
    """x (N, columns) @ W.T, (N, rows), if transpose, else x (N, rows) @ W, (N, columns); in x's dtype.

    W exists PIECE values at a time (or one row), and sums over pieces are in fp32 whatever the dtype of x.
    """
    rows, wide = storage["codes"].shape[0], torch.promote_types(x.dtype, torch.float32)
    out = x.new_empty(x.shape[0], rows) if transpose else x.new_zeros(x.shape[0], columns, dtype=wide)
    rows_at_once = max(1, PIECE // columns)
    for start in range(0, rows, rows_at_once):
        stop = min(start + rows_at_once, rows)
        weight = dequantize(storage, x.dtype, start, stop, columns)
        if transpose:
            torch.mm(x, weight.T, out=out[:, start:stop])
        elif x.dtype == wide:
            out.addmm_(x[:, start:stop], weight)
        else:
            out += x[:, start:stop] @ weight
    return out.to(x.dtype)


class Product(torch.autograd.Function):
    """x @ W.T that keeps only W's storage for backward, where W is dequantised a second time."""

    @staticmethod
    def forward(ctx, x, weight, columns):
        ctx.save_for_backward(weight)
        ctx.columns = columns
        return matmul(x, views(weight.view(torch.uint8), columns), columns, transpose=True)

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return (
            matmul(grad, views(weight.view(torch.uint8), ctx.columns), ctx.columns, transpose=False),
            None,
            None,
        )


class NF4Weight:
    """Mixin for a linear layer whose frozen weight is packed storage, its bytes viewed as bf16.

    Nothing computes with that bf16: FSDP2 shards no integers (torch 2.11), and mixed precision casts fp32 and
    integers, but not bf16.
    """

    def product(self, x, weight, bias):
        """x @ W.T + bias, of a whole weight as it is stored."""
        y = Product.apply(x, weight, self.in_features)
        return y if bias is None else y.add_(bias)

    def quantize_rows(self, stored, weight):
        """Quantise rows of the matrix into the same rows of the weight. Raises UserError if not finite."""
        quantize_(views(stored.view(torch.uint8), self.in_features), weight)


class NF4Linear(NF4Weight, nn.Linear):
    """A frozen linear layer in 4 bits."""

    def __init__(self, linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        packed = empty(linear.out_features, linear.in_features, linear.weight.device)
        self.weight = nn.Parameter(packed.view(torch.bfloat16), requires_grad=False)

    def forward(self, x):
        return self.product(x, self.weight, self.bias)


def quantize_linears(model):
    """Replace every linear layer but the head, whose weight the loss reads, by a 4-bit one, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, NF4Linear(module))
