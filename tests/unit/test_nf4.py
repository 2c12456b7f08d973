"""ops/nf4.py compared with a naive quantiser in float64, the table of bitsandbytes, and slices of itself."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from disk import pretrained
from ops import nf4
from settings.errors import UserError

TABLE = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0])  # appendix E of the paper
SHAPES = [(896, 896), (4864, 896), (896, 4864), (128, 896)]  # linear layers of a 0.5B model
ODD_SHAPES = [(5, 200), (3, 61), (4, 1), (1, 64), (7, 129), (2, 64 * 257 + 3)]  # a partial block, odd, one column; two groups


def normal(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def stored(weight):
    packed = nf4.empty(*weight.shape, weight.device).fill_(0xA5)  # so that a byte that is not written shows
    storage = nf4.views(packed, weight.shape[1])
    assert nf4.quantize_(storage, weight)
    return storage


def round_trip(weight):
    rows, columns = weight.shape
    return nf4.dequantize(stored(weight), torch.float32, 0, rows, columns)


def naive(weight, second=lambda scales: scales):
    """Quantisation in float64 by the definition: compare each value with all 16 levels times its block's scale.

    second  the second quantisation, of the scales (rows, blocks): used to dequantise, not to choose the codes
    """
    rows, columns = weight.shape
    values = F.pad(weight.double(), (0, -columns % 64)).view(rows, -1, 64)
    scales = values.abs().amax(dim=2)
    result = torch.empty_like(values)
    for r in range(rows):
        candidates = TABLE.double() * scales[r, :, None, None]  # (blocks, 1, 16)
        nearest = (values[r, :, :, None] - candidates).abs().argmin(dim=2)
        result[r] = TABLE.double()[nearest] * second(scales)[r, :, None]
    return result.view(rows, -1)[:, :columns].float()


def float8_around_the_mean(scales):
    """The paper's second quantisation: 8-bit floats of the distance to the mean, one constant per 256 scales."""
    flat = (scales - scales.mean()).flatten()
    groups = F.pad(flat, (0, -len(flat) % 256)).view(-1, 256)
    largest = groups.abs().amax(dim=1, keepdim=True) / 448  # the largest float8_e4m3
    groups = (groups / largest).float().to(torch.float8_e4m3fn).double() * largest
    return scales.mean() + groups.flatten()[: len(flat)].view_as(scales)


def mean_error(result, weight):
    """Mean absolute error in units of the weight's standard deviation."""
    return ((result - weight).abs().mean() / weight.std()).item()


def test_levels_are_those_of_the_paper():
    """To 1e-6, with exact values at both ends and zero."""
    assert nf4.LEVELS.dtype == torch.float32
    torch.testing.assert_close(nf4.LEVELS, TABLE, atol=1e-6, rtol=0)
    assert nf4.LEVELS[[0, 7, 15]].tolist() == [-1, 0, 1]


@pytest.mark.parametrize("columns", [64 * 14, 64 * 300, 64 * 5 + 9])
def test_round_trip_equals_the_definition_where_scales_are_exact(columns):
    """If 8 bits represent the largest value of each block exactly, the second quantisation must add no error."""
    weight = normal(6, columns)
    blocks = -(-columns // 64)
    codes = torch.randint(0, 256, (6, blocks), generator=torch.Generator().manual_seed(1))
    codes[:, 0::256] = 0  # each group has a smallest and a largest scale
    codes[:, 1::256] = 255
    scales = 2**-7 + codes.double() ** 2 * 2**-22
    scales[:, 256:] *= 4  # a second group, with other constants
    weight = F.pad(weight, (0, -columns % 64)).view(6, blocks, 64)
    weight = weight / weight[:, :, :9].abs().amax(dim=2, keepdim=True)  # also of the partial block
    weight = (weight.clamp(-1, 1) * scales[:, :, None].float()).view(6, -1)[:, :columns]
    torch.testing.assert_close(round_trip(weight), naive(weight), atol=1e-7, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_error_of_normal_weights(shape):
    """One quantisation has a mean error of 0.0728 standard deviations; the second adds at most 0.1 % of it."""
    weight = normal(*shape)[:200]
    once = mean_error(naive(weight), weight)
    assert 0.072 < once < 0.074
    assert once < mean_error(round_trip(weight), weight) < 1.001 * once
    assert mean_error(naive(weight, float8_around_the_mean), weight) > 1.0015 * once  # the paper's way


def test_one_large_column_does_not_spoil_the_scales_of_others():
    """The paper's second quantisation adds 9 % to the error here; evenly spaced codes would add 0.8 %."""
    weight = normal(100, 896)
    weight[:, 100] *= 100
    once = mean_error(naive(weight), weight)
    assert mean_error(round_trip(weight), weight) < 1.003 * once
    assert mean_error(naive(weight, float8_around_the_mean), weight) > 1.05 * once


def test_codes_are_the_nearest_under_the_scale_in_use():
    """No other level, times the scale that dequantises, is closer to any weight."""
    weight = normal(50, 896)
    weight[:, 100] *= 30  # so that the other scales are coarse enough to see a difference
    storage = stored(weight)
    scales = nf4.block_scales(storage, 0, 50).repeat_interleave(64, dim=1)
    best = (weight[..., None] - nf4.LEVELS * scales[..., None]).abs().amin(dim=2)
    error = (weight - nf4.dequantize(storage, torch.float32, 0, 50)).abs()
    torch.testing.assert_close(error, best, atol=1e-8, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_per_weight(shape):
    """Between 0.5 and 0.53, and every stored tensor has one row per row of the matrix."""
    layer = nf4.NF4Linear(torch.nn.Linear(*reversed(shape), bias=False, device="meta"))
    assert 0.5 < layer.weight.nbytes / (shape[0] * shape[1]) < 0.53
    assert all(len(tensor) == shape[0] for tensor in nf4.views(nf4.empty(*shape, "cpu"), shape[1]).values())


@pytest.mark.parametrize("shape", [(896, 896), *ODD_SHAPES])
def test_slices_of_rows_are_the_storage_of_those_rows(shape, monkeypatch):
    """Bit for bit, wherever the pieces begin: ranks quantise their own rows and all-gather the others."""
    weight = normal(*shape)
    full = stored(weight)
    monkeypatch.setattr(nf4, "PIECE", 4 * 3 * shape[1])  # three rows at a time
    for start, stop in ((0, 1), (1, 2), (shape[0] // 3, shape[0]), (0, shape[0])):
        alone = stored(weight[start:stop])
        for name, tensor in full.items():
            assert torch.equal(alone[name], tensor[start:stop]), name
        rows = nf4.dequantize(full, torch.float32, start, stop, shape[1])
        assert torch.equal(rows, nf4.dequantize(alone, torch.float32, 0, stop - start, shape[1]))


@pytest.mark.parametrize("shape", ODD_SHAPES)
def test_any_number_of_columns(shape):
    """The error is within half a gap between levels, also in partial blocks."""
    weight = normal(*shape)
    result = round_trip(weight)
    assert result.shape == shape
    largest = F.pad(weight, (0, -shape[1] % 64)).view(shape[0], -1, 64).abs().amax(dim=2)
    allowed = largest.repeat_interleave(64, dim=1)[:, : shape[1]] * 0.16  # half the widest gap is 0.152
    assert ((result - weight).abs() <= allowed).all()


class FiniteQuotients(TorchDispatchMode):
    """Fails where a division gives NaN or inf: which integer they are cast to depends on the processor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        assert func is not torch.ops.aten.div.Tensor or result.isfinite().all()
        return result


def test_zero_rows_and_blocks_are_exactly_zero():
    """And no scale or step of zero divides."""
    weight = normal(6, 896)
    weight[0] = 0
    weight[1, 64:128] = 0
    weight[2, 64:] = 0
    weight[3, :] = 0
    weight[3, 5] = 3e-3  # all values of the row but one are zero
    weight[4, 0] = 1e4  # the scales of the row's other blocks round to zero
    weight[5] = weight[5].sign() * 1e-30
    with FiniteQuotients():
        result = round_trip(weight)
    assert torch.equal(result[weight == 0], torch.zeros(int((weight == 0).sum())))
    assert result[3, 5] == weight[3, 5]
    assert torch.equal(result[5], weight[5])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_quantised_as_their_fp32_values(dtype):
    """The storage is the same, and the dequantised values are the fp32 values, rounded to the dtype."""
    weight = normal(9, 200).to(dtype)
    same = stored(weight.float())
    assert all(torch.equal(tensor, same[name]) for name, tensor in stored(weight).items())
    result = nf4.dequantize(same, dtype, 2, 7)
    assert result.dtype == dtype and torch.equal(result, nf4.dequantize(same, torch.float32, 2, 7).to(dtype))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(value):
    """Quantising says so, and the error of the check names the value, its row and its column."""
    weight = normal(4, 130)
    nf4.check_finite(weight)
    weight[2, 129] = value
    storage = nf4.views(nf4.empty(*weight.shape, "cpu"), 130)
    assert not nf4.quantize_(storage, weight)
    with pytest.raises(UserError, match=f"the weight is {value} at row 12, column 129; only finite numbers"):
        nf4.check_finite(weight, first_row=10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("chunk", [61, 61 * 7, 61 * 50])
def test_reading_in_pieces_of_any_size_stores_the_same_bits(chunk, dtype, tmp_path, monkeypatch):
    """And a value that is not finite is named by file, tensor, row and column, whichever piece has it."""
    weight = normal(50, 61).to(dtype)
    layer = nf4.NF4Linear(torch.nn.Linear(61, 50, bias=False))
    monkeypatch.setattr(pretrained, "CHUNK", chunk)

    def read():
        save_file({"a.weight": weight}, tmp_path / "model.safetensors")
        entry = pretrained.read_header(tmp_path / "model.safetensors")["a.weight"]
        layer.weight.data.view(torch.uint8).fill_(0xA5)
        pretrained.read_quantized("a.weight", entry, layer.weight, layer)

    read()
    storage = nf4.views(layer.weight.data.view(torch.uint8), 61)
    assert all(torch.equal(storage[name], tensor) for name, tensor in stored(weight).items())
    weight[43, 60] = float("nan")
    with pytest.raises(UserError, match="model.safetensors: a.weight: the weight is nan at row 43, column 60;"):
        read()


def test_loading_to_a_gpu_takes_large_pieces(tmp_path):
    """On meta, which stands for CUDA: pieces of 2**25 values, and only one at the end asks whether all are finite."""
    rows, columns = 2**13, 2**13  # two pieces
    entry = pretrained.TensorEntry("absent", "BF16", (rows, columns), 0)
    layer = nf4.NF4Linear(torch.nn.Linear(columns, rows, bias=False, device="meta"))
    pieces = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained, "read_into", lambda entry, weight, spans: pieces.append(weight.numel()))
        with pytest.raises(RuntimeError, match="meta tensors"):  # the one question: is_finite, as a number
            pretrained.read_quantized("a.weight", entry, layer.weight, layer)
    assert pieces == [2**25] * 2


@pytest.mark.parametrize("rows, columns", [(300, 200), (50, 61), (5, 1)])
@pytest.mark.parametrize("transpose", [True, False])
def test_product_equals_that_with_the_full_matrix(rows, columns, transpose, monkeypatch):
    """In pieces of 40 rows; the last piece may be shorter."""
    monkeypatch.setattr(nf4, "PIECE", 40 * columns)
    storage = stored(normal(rows, columns))
    weight = nf4.dequantize(storage, torch.float32, 0, rows, columns)
    x = normal(17, columns if transpose else rows, seed=1) * 50
    expected = (x.double() @ (weight.T if transpose else weight).double()).float()
    result = nf4.matmul(x, storage, columns, transpose)
    assert result.dtype == x.dtype
    assert (result - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("transpose", [True, False])
def test_product_in_bf16_is_rounded_once(transpose, monkeypatch):
    """Sums over 100 pieces in bf16 would be off by 1 %; one rounding of the result is 0.2 %."""
    monkeypatch.setattr(nf4, "PIECE", 4 * 200)
    storage = stored(normal(400, 200))
    weight = nf4.dequantize(storage, torch.bfloat16, 0, 400).double()
    x = normal(64, 200 if transpose else 400, seed=1).bfloat16()
    expected = x.double() @ (weight.T if transpose else weight)
    result = nf4.matmul(x, storage, 200, transpose)
    assert result.dtype == torch.bfloat16
    assert (result.double() - expected).norm() < 3e-3 * expected.norm()


class Calls(TorchDispatchMode):
    """The names of the operations that compute, and not only make a view."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.names.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


def test_a_gpu_dequantises_a_matrix_at_once(monkeypatch):
    """On meta, which stands for CUDA: one dequantisation and one product for forward, the same for backward.

    A matrix of 18,944 x 3,584 values would be 17 pieces on the CPU, each with a sum over all of the result.
    """
    rows, columns = 18944, 3584
    layer = nf4.NF4Linear(torch.nn.Linear(columns, rows, bias=False, device="meta"))
    x = torch.empty(64, columns, device="meta", dtype=torch.bfloat16, requires_grad=True)
    matrices, dequantize = [], nf4.dequantize
    monkeypatch.setattr(nf4, "dequantize", lambda *a: matrices.append(a[2:]) or dequantize(*a))
    with Calls() as forward:
        y = layer(x)
    with Calls() as backward:
        y.backward(torch.empty_like(y))
    assert matrices == [(0, rows, columns)] * 2
    for names in (forward.names, backward.names):
        assert names.count("mm") == 1 and names.count("index_select") == 1
        assert not {"addmm_", "new_zeros", "zeros"} & set(names)
    assert nf4.piece_size("cpu") == nf4.PIECE < rows * columns < nf4.piece_size("cuda")


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_a_matrix_at_once_gives_the_results_of_pieces(dtype, limit, transpose, monkeypatch):
    """Within rounding; a product of one piece is not summed in another buffer."""
    storage = stored(normal(300, 200))
    x = normal(17, 200 if transpose else 300, seed=1).to(dtype)
    whole = nf4.matmul(x, storage, 200, transpose)
    monkeypatch.setattr(nf4, "PIECE", 40 * 200)
    pieces = nf4.matmul(x, storage, 200, transpose)
    assert whole.dtype == pieces.dtype and (whole - pieces).norm() <= limit * whole.norm()


@pytest.mark.parametrize("columns", [896, 61, 1, 129, 64 * 257 + 3])
@pytest.mark.full
def test_compiled_dequantisation_has_the_same_bits(columns, monkeypatch):
    """The compiler's code for the CPU: one kernel for any number of rows, and two dtypes; the scales stay eager."""
    from torch._inductor import metrics  # takes seconds

    torch._dynamo.reset()
    for dtype in (torch.float32, torch.bfloat16):
        metrics.reset()
        for rows in (7, 3, 50):
            storage = stored(normal(rows, columns) * torch.logspace(-4, 4, rows)[:, None])
            expected = nf4.dequantize(storage, dtype, 0, rows, columns)
            with monkeypatch.context() as patch:
                patch.setattr(nf4, "has_compiler", lambda device_type: True)
                result = nf4.dequantize(storage, dtype, 0, rows, columns)
            assert torch.equal(result, expected) and result.is_contiguous() and result.dtype == dtype
        assert metrics.generated_kernel_count == 1


@pytest.mark.full
def test_compiled_dequantisation_in_checkpointed_layers(monkeypatch):
    """Forward, the second forward in backward, and backward give the bits of the eager function."""
    torch._dynamo.reset()
    layer = nf4.NF4Linear(torch.nn.Linear(61, 50, bias=False))
    layer.quantize_rows(layer.weight.data, normal(50, 61))
    results = []
    for compiled in (False, True):
        monkeypatch.setattr(nf4, "has_compiler", lambda device_type: compiled)
        x = normal(17, 61, seed=1).requires_grad_()
        y = checkpoint(layer, x, use_reentrant=False)
        y.square().sum().backward()
        results.append((y.detach(), x.grad))
    assert all(map(torch.equal, *results))


class Peak(TorchDispatchMode):
    """Measures the peak number of bytes in tensors that operations created."""

    def __init__(self):
        super().__init__()
        self.alive, self.bytes = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.alive.append(weakref.ref(result))
        storages = [ref().untyped_storage() for ref in self.alive if ref() is not None]
        self.bytes = max(self.bytes, sum({s.data_ptr(): s.nbytes() for s in storages}.values()))  # views count once
        return result


@pytest.mark.parametrize("transpose", [True, False])
def test_product_never_dequantises_the_full_matrix(transpose, monkeypatch):
    """With pieces of 1/8 of the matrix, less than three pieces exist: one, the one before it, and codes as integers."""
    monkeypatch.setattr(nf4, "PIECE", 4864 * 896 // 8)
    rows, columns = 4864, 896
    storage = stored(normal(rows, columns))
    x = normal(8, columns if transpose else rows)
    blocks, dequantize = [], nf4.dequantize
    monkeypatch.setattr(nf4, "dequantize", lambda *a: blocks.append(a[3] - a[2]) or dequantize(*a))
    with Peak() as peak:
        result = nf4.matmul(x, storage, columns, transpose)
    assert len(blocks) == 8 and sum(blocks) == rows and max(blocks) == rows // 8
    inputs = x.nbytes + sum(tensor.nbytes for tensor in storage.values())  # Peak sees views of them
    assert 4 * nf4.PIECE < peak.bytes - inputs - result.nbytes < 3 * 4 * nf4.PIECE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_quantising_adds_less_than_64_mb(dtype):
    """For any matrix: a piece has 2**22 / 4 values, however many rows there are."""
    weight = normal(4864, 896).to(dtype)
    storage = nf4.views(nf4.empty(*weight.shape, "cpu"), weight.shape[1])
    with Peak() as peak:
        nf4.quantize_(storage, weight)
    assert peak.bytes - weight.nbytes - sum(t.nbytes for t in storage.values()) < 64e6
    assert nf4.PIECE == 2**22
