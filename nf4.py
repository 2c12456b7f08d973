"""A frozen matrix in 4 bits: NormalFloat4 in blocks of 64, their scales in 8 bits, as QLoRA stores its base model.

Owns the 16 levels, the storage of one matrix and products with it, in plain PyTorch on any device. It knows nothing of
layers, adapters, files or other processes, and records nothing for autograd: the caller's Function does.
Source: Dettmers et al. 2023, QLoRA, arXiv 2305.14314, section 3 and appendix E.

Row o of every stored tensor is all there is of row o of the matrix (an output feature), and does not depend on other
rows: slices of rows are, bit for bit, the storage of that slice of the matrix, so ranks may hold one each.
"""

import functools

import torch
import torch.nn.functional as F

BLOCK = 64  # neighbours in a row that share one scale: their largest magnitude
GROUP = 256  # blocks of a row whose scales share two fp32 constants; a row's last group may have fewer
PIECE = 2**22  # values of the matrix that are dequantised at a time in a product: 16 MiB in fp32
TINY = torch.finfo(torch.float32).tiny  # divides in place of a scale or step of 0, and leaves no NaN


def quantile_levels():
    """The levels, (16,) fp32, ascending: 0, and quantiles of N(0, 1) scaled to [-1, 1], 8 above and 7 below it.

    Evenly spaced in probability from 1/2 to the mean of 1 - 1/32 and 1 - 1/30. bitsandbytes' table differs by 2e-7.
    """
    edge = 1 - (1 / 32 + 1 / 30) / 2
    above, below = (torch.special.ndtri(torch.linspace(edge, 0.5, n + 1, dtype=torch.float64)[:n]) for n in (8, 7))
    return (torch.cat((-below, torch.zeros(1), above.flip(0))) / above[0]).float()


LEVELS = quantile_levels()


@functools.cache
def pairs(device):
    """The two levels that each byte stands for, (256,) int64: the bits of two fp32, gathered three times as fast."""
    both = torch.stack((LEVELS.repeat_interleave(16), LEVELS.repeat(16)), dim=1)
    return both.view(torch.int64).flatten().to(device)


def empty(rows, columns, device):
    """Storage of a (rows, columns) matrix, its values undefined; 0.525 bytes a weight for 896 columns.

    codes   (rows, columns / 2)   uint8; two 4-bit indices of LEVELS, the left one in the high bits
    scales  (rows, columns / 64)  uint8; the scale of a block is low + code**2 * step
    coarse  (rows, 2 * groups)    fp32, in mixed precision too; low and step of each group of 256 blocks

    The divisions round up.
    """
    blocks = -(-columns // BLOCK)
    return {
        "codes": torch.empty(rows, -(-columns // 2), dtype=torch.uint8, device=device),
        "scales": torch.empty(rows, blocks, dtype=torch.uint8, device=device),
        "coarse": torch.empty(rows, 2 * -(-blocks // GROUP), dtype=torch.float32, device=device),
    }


def block_scales(storage, start, stop):
    """The scales in use of the blocks in rows start..stop, (stop - start, blocks) fp32."""
    assert storage["coarse"].dtype == torch.float32, "the constants of the scales were cast"
    scales = storage["scales"][start:stop].float().square_()
    for g, part in enumerate(scales.split(GROUP, dim=1)):
        low, step = storage["coarse"][start:stop, 2 * g : 2 * g + 2].split(1, dim=1)
        part.mul_(step).add_(low)  # not fused, which may round otherwise where a vector register is not filled
    return scales


@torch.no_grad()
def quantize_(storage, weight):
    """Fill `storage` from weight (rows, columns) of any float dtype, PIECE / 4 values at a time.

    Raises ValueError where weight is NaN or infinite: one device sync a piece, to see whether it is.
    The 8 bits of a scale are not the paper's (a float around the mean of 256 scales) but count the root of the distance
    to the smallest scale. On normal weights that adds 0.03% to the mean error of one quantisation (0.0728 std), the
    paper's 0.16%; where one column is 100 times the others 0.13%, the paper's 3%, even steps 0.8%: where few scales
    are huge the steps between the others stay fine. A root is rounded exactly, a logarithm not everywhere alike.
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
            raise ValueError(f"the weight is {weight[start + row, column].item()} at row {start + row}, column "
                             f"{column}; only finite numbers can be quantised")
        for g, part in enumerate(largest.split(GROUP, dim=1)):
            low, high = part.aminmax(dim=1, keepdim=True)
            step = (high - low) / 255**2
            storage["coarse"][start:stop, 2 * g : 2 * g + 2] = torch.cat((low, step), dim=1)
            codes = ((part - low) / step.clamp_min(TINY)).sqrt().round()
            storage["scales"][start:stop, GROUP * g : GROUP * (g + 1)] = codes
        # Nearest under the scale that will be used, not the one it stands for: no value ends farther off.
        scales = block_scales(storage, start, stop).clamp_min(TINY).unsqueeze(2)
        codes = torch.bucketize(values / scales, midpoints, out_int32=True).flatten(1)[:, : columns + columns % 2]
        storage["codes"][start:stop] = (codes[:, 0::2] << 4) | codes[:, 1::2]


def dequantize(storage, dtype, start, stop, columns=None):
    """Rows start..stop of the matrix, (stop - start, columns) in `dtype`; an odd number of columns has to be given."""
    scales, codes = block_scales(storage, start, stop), storage["codes"][start:stop]
    columns = columns or 2 * codes.shape[1]
    values = pairs(codes.device).index_select(0, codes.flatten().int())
    values = values.view(torch.float32).view(codes.shape[0], -1)[:, :columns]
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
