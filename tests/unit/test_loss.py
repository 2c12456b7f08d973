"""ops/loss.py: exact against autograd in fp64, with weights, on two ranks, compiled; what it moves on device meta.

tests/unit/test_model.py compares the chunked loss with plain cross-entropy, as the model uses it.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import first, program
from torch.utils._python_dispatch import TorchDispatchMode

import ops.loss
from ops.loss import Head, Targets, chunk_size, loss

V, C = 1003, 24


def head_of(weight):
    head = Head(*reversed(weight.shape), bias=False, device="meta")
    head.weight = torch.nn.Parameter(weight)
    return head


def inputs(n=300, dtype=torch.float64, targets=200, device="cpu"):
    """(hidden, head, target_positions in no order, targets, weights, of which some are 0)."""
    rng = torch.Generator().manual_seed(5)
    hidden, weight = (torch.randn(rows, C, generator=rng, dtype=torch.float64).to(dtype) for rows in (n, V))
    positions = torch.randperm(n, generator=rng)[:targets]
    targets = torch.randint(0, V, (targets,), generator=rng)
    weights = torch.randint(0, 5, (len(targets),), generator=rng) / 4
    positions, targets, weights = (x.to(device) for x in (positions, targets, weights))
    return hidden.to(device).requires_grad_(), head_of(weight.to(device)), positions, targets, weights


def results(hidden, head, positions, targets, weights):
    """(total, each, gradients of hidden and weight for total / 3)."""
    hidden.grad = head.weight.grad = None
    out = loss(hidden, head, positions, targets, weights)
    (out.total / 3).backward()
    return out.total.detach(), out.each, hidden.grad, head.weight.grad


def oracle(hidden, head, positions, targets, weights):
    """results() of autograd, in fp64."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, head.weight))
    logits, cap = hidden[positions] @ weight.T, head.soft_cap
    each = F.cross_entropy(logits if cap is None else cap * torch.tanh(logits / cap), targets, reduction="none")
    total = (each if weights is None else each * weights).sum()
    return total.detach(), each.detach(), *torch.autograd.grad(total / 3, (hidden, weight))


def error(result, expected):
    """The norm of the difference in norms of `expected`, or the norm itself where nothing is expected."""
    norm = expected.norm()
    return ((result - expected).norm() / (norm if norm else 1)).item()


# ---- exactness ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("targets, chunk", [(200, 64), (200, 200), (1, 64), (0, 64), (300, 7)])
def test_value_and_gradients_are_those_of_autograd_in_fp64(targets, chunk, weighted, monkeypatch):
    """To 1e-12: no piece of a formula is missing, and each gradient arrives at the position that it belongs to."""
    monkeypatch.setattr(ops.loss, "CHUNK", chunk)
    *given, weights = inputs(targets=targets)
    given.append(weights if weighted else None)
    for result, expected in zip(results(*given), oracle(*given), strict=True):
        assert result.dtype == torch.float64 and error(result, expected) < 1e-12
    untouched = torch.ones(300, dtype=torch.bool).index_fill_(0, given[2], False)
    assert not given[0].grad[untouched].any()


@pytest.mark.parametrize("weighted, compiles", [
    (False, False), (True, False), pytest.param(False, True, marks=pytest.mark.full),
    pytest.param(True, True, marks=pytest.mark.full)])
def test_a_soft_cap_has_the_gradient_of_autograd(weighted, compiles, monkeypatch):
    """Logits of +-15 capped at 4: the loss of one chunk and of many in fp64, in pieces, and as the compiler gets it, in
    fp32. Logits of generation are capped too."""
    for chunk, piece in ((64, ops.loss.PIECE), (200, 10 * V)):
        monkeypatch.setattr(ops.loss, "CHUNK", chunk)
        monkeypatch.setattr(ops.loss, "PIECE", piece)
        *given, weights = inputs()
        given[1].soft_cap = 4.0
        given.append(weights if weighted else None)
        expected = oracle(*given)
        for result, exact in zip(results(*given), expected, strict=True):
            assert error(result, exact) < 1e-12
    with torch.no_grad():
        assert error(loss(*given).total, expected[0]) < 1e-12
        logits = given[0] @ given[1].weight.T
        assert logits.abs().max() > 15
        torch.testing.assert_close(given[1](given[0]), 4 * torch.tanh(logits / 4))
    torch._dynamo.reset()
    monkeypatch.setattr(ops.loss, "has_compiler", lambda device_type: True)
    if not compiles:
        monkeypatch.setattr(ops.loss, "compile_fused", lambda: ops.loss.fused_)
    given[0], given[1] = given[0].detach().float().requires_grad_(), head_of(given[1].weight.data.float())
    given[1].soft_cap = 4.0
    for result, exact in zip(results(*given), expected, strict=True):
        assert error(result, exact) < 1e-6


@pytest.mark.parametrize("path, dtype", first(8, [
    *itertools.product(["eager", "capped", "fused", "fused and capped"], [torch.float32, torch.bfloat16]),
    ("compiled", torch.bfloat16), ("compiled", torch.float32)]))
def test_correct_says_which_targets_argmax_finds(path, dtype, monkeypatch):
    """Of equal logits the lowest id: two or three in a row are, and the target is each of them in turn."""
    monkeypatch.setattr(ops.loss, "CHUNK", 64)
    if path == "compiled":
        torch._dynamo.reset()
    if "fused" in path or path == "compiled":
        monkeypatch.setattr(ops.loss, "has_compiler", lambda device_type: True)
    if "fused" in path:
        monkeypatch.setattr(ops.loss, "compile_fused", lambda: ops.loss.fused_)
    hidden, head, positions, targets, _ = inputs(dtype=dtype)
    head.soft_cap = 4.0 if "capped" in path else None
    with torch.no_grad():
        head.weight[V // 2:2 * (V // 2)] = head.weight[: V // 2]  # each id of the first half has a twin in the second
        head.weight[V - 1] = head.weight[0]
        found = head.capped((hidden[positions] @ head.weight.T).float()).argmax(dim=1)
    first = found[:150]
    assert (first < V // 2).all()
    targets[:50], targets[50:100] = first[:50], first[50:100] + V // 2  # correct; beaten by its twin; far away
    expected = found == targets
    assert 50 <= expected.sum() < 60 and not expected[50:100].any()
    out = loss(hidden, head, positions, targets)
    assert out.correct.dtype == torch.bool and torch.equal(out.correct, expected)
    with torch.no_grad():
        assert torch.equal(loss(hidden, head, positions, targets).correct, expected)


def test_the_gradient_is_that_of_finite_differences():
    """Of hidden, through the choice of rows and back: central differences of the total in fp64."""
    hidden, head, *rest = inputs(n=6, targets=4)
    gradient = 3 * results(hidden, head, *rest)[2]
    with torch.no_grad():
        for row in range(6):
            direction = torch.zeros_like(hidden)
            direction[row] = torch.linspace(-1, 1, C)
            up, down = (loss(hidden + step * direction, head, *rest).total for step in (1e-5, -1e-5))
            torch.testing.assert_close((up - down) / 2e-5, (gradient * direction).sum(), atol=1e-8, rtol=1e-7)


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_weights_scale_the_total_and_the_gradient_but_not_the_loss_of_each(dtype, limit):
    """A weight of 0 leaves an exactly zero gradient, and evaluation gets the same total."""
    hidden, head, positions, targets, weights = given = inputs(dtype=dtype)
    total, each, hidden_grad, weight_grad = results(*given)
    for result, expected in zip((total, each, hidden_grad, weight_grad), oracle(*given), strict=True):
        assert error(result, expected) < limit
    assert torch.equal(each, loss(hidden, head, positions, targets).each)
    assert torch.equal(total, (each * weights).sum())
    assert (weights == 0).any() and not hidden_grad[positions[weights == 0]].any()
    with torch.no_grad():
        assert torch.equal(loss(*given).total, total)


@pytest.mark.full
def test_two_ranks_share_the_vocabulary(tmp_path):
    """With weights too: tests/programs/loss_tp.py compares with one rank."""
    result = program("loss_tp", ranks=2, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]


class Dtypes(TorchDispatchMode):
    """The number of elements of the largest result in a dtype."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype, self.largest = dtype, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == self.dtype:
            self.largest = max(self.largest, result.numel())
        return result


def test_16_bit_logits_are_converted_piece_by_piece(monkeypatch):
    """fp32 logits of at most PIECE values exist, and the results have the same bits as without pieces."""
    *given, weights = inputs(dtype=torch.bfloat16)
    frozen = given[1].weight.requires_grad_(False)  # its gradient would be fp32 too
    for weights in (None, weights):
        whole = results(*given, weights)
        with monkeypatch.context() as patch, Dtypes(torch.float32) as fp32:
            patch.setattr(ops.loss, "PIECE", 10 * V + 5)
            pieces = results(*given, weights)
        assert fp32.largest == 10 * V < 200 * V and frozen.grad is None
        assert all(torch.equal(a, b) for a, b in zip(whole[:3], pieces[:3]))


# ---- what runs on a GPU, counted on device meta -------------------------------------------------------------------


def test_chunks_hold_a_gibibyte_of_logits_except_on_the_cpu():
    """In multiples of 256, at least 256, whatever the vocabulary; 152k tokens: between 3,500 and 4,096 targets."""
    assert chunk_size(151936, "cpu") == ops.loss.CHUNK == 256
    assert 3500 <= chunk_size(151936, "cuda") <= 4096
    for vocabulary in (1000, 32000, 49152, 128256, 151936, 262144):
        n = chunk_size(vocabulary, "cuda")
        assert n == chunk_size(vocabulary, "meta") and n % 256 == 0
        assert abs(2 * n * vocabulary / 2**30 - 1) < 256 * vocabulary / 2**30
    assert chunk_size(10**8, "cuda") == 256


def nbytes(tensors):
    return sum(t.numel() * t.itemsize for t in tensors)


class Traffic(TorchDispatchMode):
    """Sums the bytes that operations read and write, separately for matrix products; views move none.

    Every tensor argument is read, and every result is written: an operation in place counts twice. A gather, a
    scatter and an index_select touch only what they choose, so they count their indices, and their results or
    sources twice. An allocation moves nothing.
    """

    def __init__(self):
        super().__init__()
        self.products, self.others, self.calls = 0, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if func.is_view or name.startswith(("empty", "new_empty", "resize_")):
            return result
        reads, writes = ([x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]
                         for tree in (args, result))
        moved = nbytes(reads) + nbytes(writes)
        if name in ("gather", "index_select"):
            moved = nbytes(reads[1:]) + 2 * nbytes([result])
        elif name in ("scatter_", "index_copy_"):
            moved = nbytes(reads[1:]) + nbytes(reads[2:])
        if name in ("mm", "addmm", "addmm_"):
            self.products += moved
        else:
            self.others += moved
        self.calls += [(name, tuple(x.shape), x.dtype) for x in writes]
        return result

    def calls_of(self, *names):
        return [call for call in self.calls if call[0] in names]


@pytest.fixture
def on_meta(monkeypatch):
    """A function: weighted -> inputs on device meta, bf16, whose 200 targets are 4 chunks (64, 64, 64, 8)."""
    monkeypatch.setattr(ops.loss, "chunk_size", lambda vocabulary, device_type: 64)

    def make(weighted=False):
        *given, weights = inputs(dtype=torch.bfloat16, device="meta")
        return *given, weights if weighted else None

    return make


def test_forward_and_backward_run_on_meta(on_meta):
    """There is no sync in them: .item() and nonzero raise on meta."""
    for weighted in (False, True):
        total, each, hidden_grad, weight_grad = results(*on_meta(weighted))
        assert each.shape == (200,) and each.dtype == total.dtype == torch.float32
        assert hidden_grad.shape == (300, C) and weight_grad.shape == (V, C)
    with torch.no_grad():
        loss(*on_meta())


@pytest.mark.parametrize("weighted", [False, True])
def test_eager_passes_move_26_bytes_a_logit(weighted):
    """max 2, subtract 2 + 4, exp 4 + 4, sum 4, divide 4 + 2; all else is vectors of one value per target."""
    logits = torch.empty(200, V, dtype=torch.bfloat16, device="meta")
    targets, weights = (torch.empty(200, dtype=dtype, device="meta") for dtype in (torch.int64, torch.float32))
    head = Head(C, V, device="meta")
    with Traffic() as traffic:
        ops.loss.row_losses_(logits, Targets(None, targets, weights if weighted else None), head, True)
    vectors = traffic.others - 26 * logits.numel()
    assert 0 < vectors < 500 * 200 and not traffic.products


def test_the_passes_are_all_that_the_loss_does_to_the_logits(on_meta, monkeypatch):
    """Three products touch the logits once each: no cast, no copy. A chunk adds to the weight's gradient once.

    The function of the elementwise passes counts as one operation that reads and writes the logits: what it moves
    inside is the subject of the tests above and below.
    """
    given, passes = on_meta(), []

    def one_operation(logits, targets, *_):
        passes.append(2 * nbytes([logits]))
        with torch.utils._python_dispatch._disable_current_modes():
            return [torch.empty(len(logits), dtype=dtype, device="meta")
                    for dtype in (torch.float32, torch.float32, torch.bool)]

    monkeypatch.setattr(ops.loss, "row_losses_", one_operation)
    with Traffic() as traffic:
        out = loss(*given)
    logits = 200 * V
    assert sum(passes) == 4 * logits and len(passes) == 4
    rows, matrix = 200 * C, V * C
    # Head: reads rows and the weight, writes logits. Gradient of the rows: reads logits and the weight, writes rows.
    # Gradient of the weight: reads logits and rows, reads and writes fp32.
    head, hidden_grad, weight_grad = 2 * rows + 4 * 2 * matrix + 2 * logits, 2 * rows + 4 * 2 * matrix + 2 * logits, (
        2 * rows + 4 * 8 * matrix + 2 * logits)
    assert traffic.products == head + hidden_grad + weight_grad
    # Beside the products: each target's row is read and written once, the weight's gradient is rounded once.
    vectors = traffic.others - 4 * rows - 6 * matrix
    assert 0 < vectors < 100 * 200
    whole = ((V, C), torch.float32)
    assert [name for name, *made in traffic.calls if tuple(made) == whole] == ["addmm"] * 4
    with Traffic() as traffic:
        out.total.backward()
    assert {name for name, *_ in traffic.calls} <= {"mul_", "zeros", "new_zeros", "index_copy_", "ones_like"}


@pytest.mark.full
@pytest.mark.parametrize("dtype, bytes_a_logit", [(torch.bfloat16, 6), (torch.float32, 12)])
def test_compiled_passes_move_less_than_8_bytes_a_bf16_logit(dtype, bytes_a_logit):
    """As the compiler's scheduler counts what its loops read and write: two reads and one write of the logits.

    The loops for largest and sum are fused over a row, and count as one read. If the second loop found nothing of
    the row in a cache, it would be 8 bytes.
    """
    logits, targets, moved = torch.randn(200, V).to(dtype), torch.randint(0, V, (200,)), []

    def count(nodes):
        moved.extend(node.get_read_write_buffers_sizes() for node in nodes)
        return nodes

    torch._dynamo.reset()
    with torch._inductor.config.patch(_post_fusion_custom_pass=count, force_disable_caches=True):
        torch.compile(ops.loss.fused_, dynamic=False, fullgraph=True)(
            logits, targets, None, Head(C, V, device="meta"), True)
    vectors = sum(moved) - bytes_a_logit * logits.numel()
    assert 0 < vectors < 400 * 200


@pytest.mark.parametrize("dtype, weighted, limit", [
    (torch.float32, False, 1e-6), (torch.float32, True, 1e-6), (torch.bfloat16, False, 5e-3)])
def test_compiled_loss_is_that_of_fp64(dtype, weighted, limit, monkeypatch):
    """The compiler's code for the CPU, one graph for all chunks, against autograd."""
    torch._dynamo.reset()
    monkeypatch.setattr(ops.loss, "has_compiler", lambda device_type: True)
    monkeypatch.setattr(ops.loss, "CHUNK", 64)
    *given, weights = inputs(dtype=dtype)
    given.append(weights if weighted else None)
    if dtype == torch.bfloat16:  # a head of which each logit is one value of hidden: exact in bf16
        given[1] = head_of(torch.eye(C, dtype=dtype)[torch.arange(V) % C])
    expected = oracle(*given)
    for result, exact in zip(results(*given), expected, strict=True):
        assert error(result, exact) < limit
    assert len(torch._dynamo.eval_frame._debug_get_cache_entry_list(ops.loss.fused_.__code__)) == 1
    with torch.no_grad():
        assert error(loss(*given).total, expected[0]) < 1e-6


def test_a_shared_vocabulary_is_never_compiled(monkeypatch):
    """A compiled function could not all-reduce halfway; one rank's is compiled."""
    def called(*_):
        raise NotImplementedError

    monkeypatch.setattr(ops.loss, "has_compiler", lambda device_type: True)
    monkeypatch.setattr(ops.loss, "compiled", called)
    given = inputs()
    given[1].tp_size = 2
    loss(*given)
    given[1].tp_size = 1
    with pytest.raises(NotImplementedError):
        loss(*given)
