"""A frozen matrix in 4 bits, as QLoRA stores its base model: NormalFloat4 in blocks of 64, scales in 8 bits.

This file contains the 16 levels, the storage of one matrix, products with it, and a linear layer that uses
them. It is plain PyTorch for any device, and knows nothing about adapters, files or other processes.
Source: Dettmers et al. 2023, QLoRA, arXiv 2305.14314, section 3 and appendix E.

Each row of the matrix (an output feature) is stored in one row of bytes and independently of all other rows.
So a slice of the stored rows is, bit for bit, what the same slice of the matrix would be stored as, and the
rows can be sharded over ranks.
"""

import functools
import sys

import torch
import torch.nn.functional as F
from torch import nn

from ops.compiler import has_compiler
from settings.errors import UserError

BLOCK = 64  # neighbours in a row that share one scale, their largest magnitude
GROUP = 256  # blocks of a row whose scales share two fp32 constants; the last group may have fewer blocks
PIECE = 2**22  # values of the matrix that a product on the CPU dequantises at a time: 16 MiB in fp32
TINY = torch.finfo(torch.float32).tiny  # the divisor in place of a scale or step of 0, which would give NaN


def quantile_levels():
    """The levels, (16,) fp32, ascending: 0, and 8 quantiles of N(0, 1) above it and 7 below, in [-1, 1].

    The quantiles are evenly spaced in probability, from 1/2 to the mean of 1 - 1/32 and 1 - 1/30, and scaled
    so that the largest is 1. The table of bitsandbytes differs by 2e-7.
    """
    edge = 1 - (1 / 32 + 1 / 30) / 2
    above, below = (
        torch.special.ndtri(torch.linspace(edge, 0.5, n + 1, dtype=torch.float64)[:n]) for n in (8, 7))
    return (torch.cat((-below, torch.zeros(1), above.flip(0))) / above[0]).float()


LEVELS = quantile_levels()


@functools.cache
def pairs(device):
    """The two levels that each byte stands for, (256,) int64 that hold two fp32 each.

    One gather of 64 bits is three times as fast as two of 32.
    """
    both = torch.stack((LEVELS.repeat_interleave(16), LEVELS.repeat(16)), dim=1)
    return both.view(torch.int64).flatten().to(device)


def views(packed, columns):
    """Views of `packed`, (rows, bytes) uint8, which stores a (rows, columns) matrix row by row.

    coarse  (rows, 2 * groups)    fp32; low and step of each group of 256 blocks
    scales  (rows, columns / 64)  uint8; the scale of a block is low + code**2 * step
    codes   (rows, columns / 2)   uint8; two 4-bit indices of LEVELS, the left one in the high bits

    Both quotients round up.
    """
    blocks = -(-columns // BLOCK)
    scales_start = 8 * -(-blocks // GROUP)
    codes_start = scales_start + blocks
    return {"coarse": packed[:, :scales_start].view(torch.float32),
            "scales": packed[:, scales_start:codes_start],
            "codes": packed[:, codes_start : codes_start + -(-columns // 2)]}


def empty(rows, columns, device):
    """Uninitialised storage of a (rows, columns) matrix, (rows, bytes) uint8.

    896 columns take 0.527 bytes per weight. The bytes of a row are a multiple of 4.
    """
    blocks = -(-columns // BLOCK)
    used = 8 * -(-blocks // GROUP) + blocks + -(-columns // 2)
    return torch.empty(rows, used + -used % 4, dtype=torch.uint8, device=device)


def block_scales(storage, start, stop):
    """The dequantised scales of the blocks in rows start..stop, (stop - start, blocks) fp32."""
    scales = storage["scales"][start:stop].float().square_()
    for g, group_scales in enumerate(scales.split(GROUP, dim=1)):
        low, step = storage["coarse"][start:stop, 2 * g : 2 * g + 2].split(1, dim=1)
        # Not fused: a fused multiply-add may round differently where a vector register is not full.
        group_scales.mul_(step).add_(low)
    return scales


def piece_size(device_type):
    """Values of a matrix that a product dequantises at a time. Not on the CPU: any number, so a full matrix.

    Each piece costs launches and, in backward, one more sum over the result: on the GPU that is slower than
    the product. A bf16 matrix of 68 million values takes 136 MB.
    """
    return PIECE if device_type == "cpu" else sys.maxsize


@torch.no_grad()
def quantize_(storage, weight):
    """Quantise `weight` (rows, columns), of any float dtype, into `storage`, PIECE / 4 values at a time.

    On CUDA all at once: the caller bounds it, and each value takes about 30 bytes. Returns whether all values
    are finite, () bool on weight's device; to read it is a device sync. check_finite names one that is not.

    The 8 bits of a scale encode the square root of its distance to the smallest scale of its group; the paper
    stores an 8-bit float around the mean. With square roots, a few huge scales leave fine steps for the rest:

                                            square root     the paper's way   even steps
        normal weights                      0.03 to 0.05 %  0.2 %
        one column 100 times the others     0.1 %           9 %               0.8 %

    (what the 8 bits add to the mean error of quantisation, which is 0.0728 std for normal weights). Square
    roots are rounded exactly. Logarithms are not, so slices of rows could differ.
    """
    rows, columns = weight.shape
    midpoints = ((LEVELS[1:] + LEVELS[:-1]) / 2).to(weight.device)
    rows_at_once = max(1, piece_size(weight.device.type) // 4 // columns)
    is_finite = torch.ones((), dtype=torch.bool, device=weight.device)
    for start in range(0, rows, rows_at_once):
        stop = min(start + rows_at_once, rows)
        values = F.pad(weight[start:stop].float(), (0, -columns % BLOCK)).unflatten(1, (-1, BLOCK))
        largest = values.abs().amax(dim=2)  # (rows, blocks); NaN where a value is
        is_finite &= largest.isfinite().all()
        for g, group_largest in enumerate(largest.split(GROUP, dim=1)):
            low, high = group_largest.aminmax(dim=1, keepdim=True)
            # by a tensor: CUDA divides by a number as a product with its reciprocal, which rounds otherwise
            step = (high - low) / low.new_full((), 255**2)
            storage["coarse"][start:stop, 2 * g : 2 * g + 2] = torch.cat((low, step), dim=1)
            codes = ((group_largest - low) / step.clamp_min(TINY)).sqrt().round()
            storage["scales"][start:stop, GROUP * g : GROUP * (g + 1)] = codes
        # Choose the nearest level under the scale as it will be dequantised, not under the exact scale: that
        # is what minimises the error.
        scales = block_scales(storage, start, stop).clamp_min(TINY).unsqueeze(2)
        codes = torch.bucketize(
            values / scales, midpoints, out_int32=True).flatten(1)[:, : columns + columns % 2]
        storage["codes"][start:stop] = (codes[:, 0::2] << 4) | codes[:, 1::2]
    return is_finite


def check_finite(weight, first_row=0):
    """Raise UserError with the row and column of the first value that is NaN or infinite, if there is one.

    first_row  what the rows are counted from
    """
    bad = (~weight.isfinite()).nonzero()
    if len(bad):
        row, column = bad[0].tolist()
        raise UserError(f"the weight is {weight[row, column].item()} at row {first_row + row}, "
                        f"column {column}; only finite numbers can be quantised")


def dequantize(storage, dtype, start, stop, columns=None):
    """Rows start..stop of the matrix, (stop - start, columns) in `dtype`.

    columns  required if it is odd; by default twice the bytes of a row's codes
    """
    codes = storage["codes"][start:stop]
    columns = columns or 2 * codes.shape[1]
    scales = block_scales(storage, start, stop)
    if has_compiler(codes.device.type):
        return compiled(scales, codes, dtype, columns)
    values = pairs(codes.device).index_select(0, codes.flatten().int())
    values = values.view(torch.float32).view(codes.shape[0], 2 * codes.shape[1])[:, :columns]
    full = columns // BLOCK
    values[:, : full * BLOCK].unflatten(1, (full, BLOCK)).mul_(scales[:, :full, None])
    values[:, full * BLOCK :].mul_(scales[:, full:])  # a last block of fewer than BLOCK values
    return values.to(dtype)


def fused(scales, codes, levels, dtype, columns):
    """dequantize() for the compiler: look-up, scale and cast in one loop, with the same bits.

    The scales are not computed here: a compiler may fuse their product and sum, which rounds once, not twice.
    Here is one product and one cast for each value, so there is nothing to fuse.
    """
    shifts = 4 - 4 * torch.arange(2, device=codes.device)  # the left of two codes is in the high bits
    indices = (codes.int()[:, :, None] >> shifts) & 15
    scales = scales[:, :, None].expand(-1, -1, BLOCK // 2).flatten(1)[:, : codes.shape[1], None]
    return (levels[indices] * scales).to(dtype).flatten(1)[:, :columns].contiguous()


def compiled(scales, codes, dtype, columns):
    """fused(), compiled once for each number of columns: to divide by a number that is not known is slow."""
    for tensor in (scales, codes):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return compile_fused()(scales, codes, levels_on(codes.device), dtype, columns)


@functools.cache
def compile_fused():
    return torch.compile(fused, dynamic=False, fullgraph=True)


@functools.cache
def levels_on(device):
    return LEVELS.to(device)


def matmul(x, storage, columns, transpose):
    """The product of x and the stored matrix W (rows, columns), in x's dtype.

    transpose  x (N, columns) @ W.T -> (N, rows); otherwise x (N, rows) @ W -> (N, columns)

    Only piece_size values of W (at least one row) are dequantised at a time. Sums over several pieces are in
    fp32 (fp64 if x is).
    """
    rows, wide = storage["codes"].shape[0], torch.promote_types(x.dtype, torch.float32)
    rows_at_once = max(1, piece_size(x.device.type) // columns)
    if rows_at_once >= rows:
        weight = dequantize(storage, x.dtype, 0, rows, columns)
        return x @ (weight.T if transpose else weight)
    out = x.new_empty(x.shape[0], rows) if transpose else x.new_zeros(x.shape[0], columns, dtype=wide)
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


@torch.library.custom_op("sft::nf4_product", mutates_args=())
def opaque_product(x: torch.Tensor, weight: torch.Tensor, columns: int, transpose: bool) -> torch.Tensor:
    """matmul() with a layer's weight, as one operation of a compiled block.

    If the compiler saw the dequantisation, it would keep the matrix of forward for backward, all of them in
    bf16, instead of computing it again; and its scales could round otherwise.
    """
    return matmul(x, views(weight.view(torch.uint8), columns), columns, transpose)


@opaque_product.register_fake
def _(x, weight, columns, transpose):
    return x.new_empty(x.shape[0], len(weight) if transpose else columns)


def product(x, weight, columns, transpose):
    """matmul() with a layer's weight (rows, bytes / 2), its storage viewed as bf16."""
    if torch.compiler.is_compiling():
        return opaque_product(x, weight, columns, transpose)
    return matmul(x, views(weight.view(torch.uint8), columns), columns, transpose)


class Product(torch.autograd.Function):
    """x @ W.T. It saves only W's storage for backward, which dequantises W a second time."""

    @staticmethod
    def forward(ctx, x, weight, columns):
        ctx.save_for_backward(weight)
        ctx.columns = columns
        return product(x, weight, columns, transpose=True)

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return product(grad, weight, ctx.columns, transpose=False), None, None


class NF4Weight:
    """Mixin for a linear layer whose frozen weight is NF4 storage, its bytes viewed as bf16.

    Nothing computes with these bf16 values. The view exists because FSDP2 does not shard integers (torch
    2.11), and because mixed precision casts fp32 and integers, but not bf16.
    """

    def product(self, x, weight, bias):
        """x @ W.T + bias; `weight` is the full (unsharded) storage."""
        y = Product.apply(x, weight, self.in_features)
        return y if bias is None else y.add_(bias)

    def quantize_rows(self, stored, weight):
        """Quantise some rows of the matrix into `stored`, the same rows of the layer's weight.

        Returns whether they are finite, as quantize_ does.
        """
        return quantize_(views(stored.view(torch.uint8), self.in_features), weight)


class NF4Linear(NF4Weight, nn.Linear):
    """A linear layer with a frozen 4-bit weight."""

    def __init__(self, linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        packed = empty(linear.out_features, linear.in_features, linear.weight.device)
        self.weight = nn.Parameter(packed.view(torch.bfloat16), requires_grad=False)

    def forward(self, x):
        return self.product(x, self.weight, self.bias)


def quantize_linears(model):
    """Replace every linear layer by an NF4Linear, in place. Not the head: the loss reads its weight."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, NF4Linear(module))
