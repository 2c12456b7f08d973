"""ops/delta.py and ops/convolution.py, against the recurrence token by token in fp64, and torch's conv1d."""

import sys
import types

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch._dynamo.utils import counters

from ops import delta
from ops.attention import Documents
from ops.convolution import short_convolution
from ops.delta import CHUNK, cut, delta_rule

LENGTHS = (5, CHUNK + 6, 1, CHUNK, 2 * CHUNK + 2, 3)
PACKINGS = ((30, 40), (20, 33, 50, 7), (9,) * 11, (100, 60, 3), (200, 17), (64,) * 5, (300,))


def inputs(lengths=LENGTHS, heads=(2, 6), sizes=(8, 12), dtype=torch.float64, decay=3.0):
    """[q, k, v, g, beta] that require gradients: heads and sizes of keys and of values."""
    rng, N = torch.Generator().manual_seed(0), sum(lengths)
    q, k = torch.randn(2, N, heads[0], sizes[0], generator=rng, dtype=torch.float64)
    v = torch.randn(N, heads[1], sizes[1], generator=rng, dtype=torch.float64)
    g, beta = torch.rand(2, N, heads[1], generator=rng, dtype=torch.float64)
    return [x.to(dtype).requires_grad_() for x in (q, k, v, g * -decay, beta)]


def recurrence(q, k, v, g, beta, lengths):
    """The definition: one token after another, from a state of zeros in each document."""
    H, D, result = v.shape[1], q.shape[2], []
    q, k = ((x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()).repeat_interleave(H // x.shape[1], dim=1)
            for x in (q, k))
    for document in zip(*(x.split(lengths) for x in (q, k, v, g, beta)), strict=True):
        S = v.new_zeros(H, D, v.shape[2])
        for q_t, k_t, v_t, g_t, beta_t in zip(*document, strict=True):
            S = S * g_t.exp()[:, None, None]
            S = S + k_t[:, :, None] * (beta_t[:, None] * (v_t - torch.einsum("hd,hde->he", k_t, S)))[:, None]
            result.append(torch.einsum("hd,hde->he", q_t, S) * D**-0.5)
    return torch.stack(result)


def outcome(function, tensors):
    """The output, and the gradients of a fixed weighted sum of it."""
    out = function(*tensors)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
    return out, *torch.autograd.grad((out.double() * weights).sum(), tensors)


def distances(results, expected):
    """Of each tensor: the norm of the difference relative to the norm."""
    return [((x - y).norm() / y.norm()).item() for x, y in zip(results, expected, strict=True)]


def cast(tensors, dtype):
    return [x.detach().to(dtype).requires_grad_() for x in tensors]


# ---- the rule -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, piece", [
    ({}, 2**13), (dict(heads=(4, 4), sizes=(16, 8)), 700), (dict(heads=(2, 6)), 1), (dict(decay=0.01), 2**13),
    (dict(lengths=(1,)), 2**13), (dict(lengths=(1, 1, 2)), 2**13), (dict(lengths=(200,)), 300)], ids=str)
def test_the_rule_in_chunks_is_the_recurrence(options, piece, monkeypatch):
    """Output and all gradients, exactly in fp64 and to 1e-6 in fp32; with any number of heads at a time."""
    monkeypatch.setattr(delta, "PIECE", piece)
    lengths, tensors = options.get("lengths", LENGTHS), inputs(**options)
    documents = Documents.of(lengths)
    expected = outcome(lambda *x: recurrence(*x, lengths), tensors)
    for dtype, limit in ((torch.float64, 1e-13), (torch.float32, 2e-6)):
        results = outcome(lambda *x: delta_rule(*x, documents), cast(tensors, dtype))
        assert max(distances(results, expected)) < limit
        assert all(x.dtype == dtype for x in results)


def test_steep_and_flat_decays_in_one_chunk():
    """Sums of g of some thousands inside a chunk, between tokens that forget nothing."""
    tensors = inputs((3 * CHUNK,), heads=(2, 2))
    with torch.no_grad():
        tensors[3].mul_(1e-3)
        tensors[3][::7] = -80.0
    documents = Documents.of((3 * CHUNK,))
    tensors = [*cast(tensors, torch.float32)]
    expected = outcome(lambda *x: recurrence(*x, (3 * CHUNK,)), cast(tensors, torch.float64))
    assert max(distances(outcome(lambda *x: delta_rule(*x, documents), tensors), expected)) < 2e-6


def test_bf16_is_computed_in_fp32():
    """The output differs from that of the same numbers in fp32 by its own rounding only."""
    tensors = cast(inputs(), torch.bfloat16)
    exact = outcome(lambda *x: delta_rule(*x, Documents.of(LENGTHS)), cast(tensors, torch.float32))
    rounded = outcome(lambda *x: delta_rule(*x, Documents.of(LENGTHS)), tensors)
    assert all(x.dtype == torch.bfloat16 for x in rounded)
    assert max(distances([x.float() for x in rounded], exact)) < 4e-3


def test_transformers_computes_the_same():
    """One document, as the models of Qwen3.5 call it."""
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

    def theirs(q, k, v, g, beta):
        q, k, v, g, beta = (x[None] for x in (q, k, v, g, beta))
        return torch_chunk_gated_delta_rule(q, k, v, g, beta, use_qk_l2norm_in_kernel=True)[0][0]

    tensors = inputs((150,), dtype=torch.float32)
    expected = outcome(theirs, tensors)
    assert max(distances(outcome(lambda *x: delta_rule(*x, Documents.of((150,))), tensors), expected)) < 5e-6


@pytest.mark.parametrize("broken", [0, 1, 2, 4, 5])
def test_a_document_sees_no_other(broken):
    """Packed is alone; and nan in one document reaches no output and no gradient of the others."""
    packed = inputs(dtype=torch.float32)
    alone = [cast(part, torch.float32) for part in zip(*(x.split(LENGTHS) for x in packed), strict=True)]
    with torch.no_grad():
        start = sum(LENGTHS[:broken])
        for x in packed:
            x[start : start + LENGTHS[broken]] = torch.nan
    y = delta_rule(*packed, Documents.of(LENGTHS))
    grads = torch.autograd.grad(y, packed, torch.ones_like(y))
    parts = list(zip(*(x.split(LENGTHS) for x in (y, *grads)), strict=True))
    for i, tensors in enumerate(alone):
        expected = delta_rule(*tensors, Documents.of((LENGTHS[i],)))
        expected = expected, *torch.autograd.grad(expected, tensors, torch.ones_like(expected))
        if i == broken:
            assert all(part.isnan().any() for part in parts[i])
        else:
            assert max(distances(parts[i], expected)) < 1e-6


@pytest.mark.parametrize("cuts", [(150,), (70, 1, 79), (1, 1, 2, 146), (100,) + (1,) * 50])
def test_a_cache_continues_a_document(cuts):
    """Pieces of a prompt, then token by token."""
    tensors = [x.detach() for x in inputs((150,))]
    past, results, start = {}, [], 0
    for n in cuts:
        documents = Documents.of((n,), first_position=start)
        results.append(delta_rule(*(x[start : start + n] for x in tensors), documents, past))
        start += n
    torch.testing.assert_close(torch.cat(results), recurrence(*tensors, (150,)), atol=1e-13, rtol=1e-11)
    assert past["state"].shape == (6, 8, 12)


def test_backward_keeps_the_arguments_only():
    """And the two tensors of Chunks, which all layers share."""
    tensors, documents = inputs(), Documents.of(LENGTHS)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        delta_rule(*tensors, documents)
    allowed = {x.data_ptr() for x in (*tensors, documents.chunks.place, documents.chunks.active)}
    assert len(kept) == 7 and {x.data_ptr() for x in kept} == allowed


def test_the_rule_runs_on_meta():
    """Shapes and dtypes of output and gradients."""
    tensors = [x.detach().to("meta", torch.bfloat16).requires_grad_() for x in inputs()]
    out = delta_rule(*tensors, Documents.of(LENGTHS, "meta"))
    assert out.shape == tensors[2].shape and out.dtype == torch.bfloat16
    for x, grad in zip(tensors, torch.autograd.grad(out, tensors, torch.ones_like(out)), strict=True):
        assert grad.shape == x.shape and grad.device.type == "meta"


def test_the_operations_keep_torchs_rules():
    """Schema, fake tensors, autograd registration and dynamic shapes, by torch's own checks."""
    chunks = cut(Documents.of(LENGTHS))
    tensors = inputs()
    torch.library.opcheck(delta.chunked, (*tensors, chunks.place, chunks.active))
    detached = [x.detach() for x in tensors]
    arguments = (torch.ones_like(detached[2]), *detached, chunks.place, chunks.active)
    torch.library.opcheck(delta.chunked_backward, arguments, test_utils=("test_schema", "test_faketensor"))


# ---- the convolution ----------------------------------------------------------------------------------------------


def conv1d(x, weight, lengths):
    """torch's own convolution, one document after another."""
    parts = [F.conv1d(part.T[None], weight, padding=weight.shape[2] - 1, groups=len(weight))[0, :, : len(part)]
             for part in x.split(lengths)]
    return F.silu(torch.cat(parts, dim=1).T)


def convolution_inputs(dtype=torch.float64, taps=4):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(sum(LENGTHS), 10, generator=rng, dtype=torch.float64)
    weight = torch.randn(10, 1, taps, generator=rng, dtype=torch.float64)
    return [x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]


@pytest.mark.parametrize("piece", [1, 300, 2**18])
@pytest.mark.parametrize("taps", [4, 2])
def test_the_convolution_is_that_of_torch(piece, taps, monkeypatch):
    monkeypatch.setattr("ops.convolution.PIECE", piece)
    tensors, documents = convolution_inputs(taps=taps), Documents.of(LENGTHS)
    results = outcome(lambda *x: short_convolution(*x, documents), tensors)
    assert max(distances(results, outcome(lambda *x: conv1d(*x, LENGTHS), tensors))) < 1e-14
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        short_convolution(*tensors, documents)
    assert sum(t.numel() for t in kept) == sum(t.numel() for t in tensors) + len(tensors[0])  # and the places


def test_the_convolution_in_bf16_rounds_once():
    tensors = convolution_inputs(torch.bfloat16)
    exact = outcome(lambda *x: conv1d(*x, LENGTHS), cast(tensors, torch.float32))
    results = outcome(lambda *x: short_convolution(*x, Documents.of(LENGTHS)), tensors)
    assert max(distances([x.float() for x in results], exact)) < 4e-3


def test_the_convolution_sees_one_document():
    """nan in one document reaches no output and no gradient of its neighbours."""
    x, weight = convolution_inputs()
    expected = short_convolution(x, weight, Documents.of(LENGTHS))
    expected_grad, = torch.autograd.grad(expected.sum(), x)
    spoiled = x.detach().clone()
    spoiled[5 : 5 + LENGTHS[1]] = torch.nan
    spoiled.requires_grad_()
    y = short_convolution(spoiled, weight, Documents.of(LENGTHS))
    grad, = torch.autograd.grad(y.sum(), spoiled)
    for result, right in ((y, expected), (grad, expected_grad)):
        assert result.isnan().any(dim=1).sum() == LENGTHS[1]
        assert torch.equal(result[~result.isnan().any(dim=1)], right[~result.isnan().any(dim=1)])


@pytest.mark.parametrize("taps", [4, 1])
@pytest.mark.parametrize("cuts", [(220,), (2, 1, 217), (1, 1, 1, 1, 216), (200,) + (1,) * 20])
def test_a_cache_continues_the_convolution(cuts, taps):
    x, weight = (t.detach() for t in convolution_inputs(taps=taps))
    past, results, start = {}, [], 0
    for n in cuts:
        documents = Documents.of((n,), first_position=start)
        results.append(short_convolution(x[start : start + n], weight, documents, past))
        start += n
    torch.testing.assert_close(torch.cat(results), conv1d(x[:220], weight, (220,)))
    assert torch.equal(past["inputs"], x[221 - taps : 220])


# ---- compiled, and fla --------------------------------------------------------------------------------------------


def layer(x, weight, g, beta, documents):
    q, k, v = short_convolution(x, weight, documents).split((16, 16, 72), dim=1)
    return delta_rule(q.unflatten(1, (2, 8)), k.unflatten(1, (2, 8)), v.unflatten(1, (6, 12)), g, beta, documents)


@pytest.mark.full
def test_all_packings_are_one_graph():
    """No graph break and one compilation for all lengths; outputs and gradients are those of eager."""
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(layer, dynamic=True, fullgraph=True, backend="aot_eager")
    for lengths in PACKINGS:
        *_, g, beta = inputs(lengths, dtype=torch.float32)
        rng = torch.Generator().manual_seed(1)
        x, weight = (torch.randn(*shape, generator=rng).requires_grad_() for shape in ((len(g), 104), (104, 1, 4)))
        documents = Documents.of(lengths)
        cut(documents)
        results, expected = (outcome(lambda *t: f(*t, documents), (x, weight, g, beta)) for f in (compiled, layer))
        assert max(distances(results, expected)) < 1e-6
        assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


class FlaFunction(torch.autograd.Function):
    """A Function as fla's are: in an older form, which torch.func can't differentiate."""

    @staticmethod
    def forward(ctx, q, k, v, g, beta, place, active):
        arguments = (*(x[0] for x in (q, k, v, g, beta)), place, active)
        ctx.save_for_backward(*arguments)
        return delta.chunked(*arguments)[None]

    @staticmethod
    def backward(ctx, grad):
        return *(x[None] for x in delta.chunked_backward(grad[0], *ctx.saved_tensors)), None, None


@pytest.fixture
def fla(monkeypatch):
    """A module with the signature of flash-linear-attention, which checks what it asks for and calls our rule."""
    calls = []

    def chunk_gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False,
                               use_qk_l2norm_in_kernel=False, cu_seqlens=None, cp_context=None, **kwargs):
        assert not kwargs and q.shape[0] == 1 and use_qk_l2norm_in_kernel
        assert q.shape == k.shape and q.shape[:3] == v.shape[:3] == (*g.shape,) == (*beta.shape,)
        assert q.dtype == k.dtype == v.dtype == torch.bfloat16 and g.dtype == torch.float32
        calls.append(cu_seqlens)
        lengths = tuple(cu_seqlens.diff().tolist())
        documents = Documents.of(lengths)
        chunks = cut(documents)
        return FlaFunction.apply(q, k, v, g, beta, chunks.place, chunks.active), None

    module = types.ModuleType("fla.ops.gated_delta_rule")
    module.chunk_gated_delta_rule = chunk_gated_delta_rule
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", module)
    monkeypatch.setattr(delta, "uses_fla", lambda q: q.dtype == torch.bfloat16)
    return calls


def test_fla_gets_the_offsets_of_the_documents(fla):
    """The same tensor each time, for which fla keeps what it has computed; and a head of its own for each value."""
    tensors, documents = cast(inputs(), torch.bfloat16), Documents.of(LENGTHS)
    expected = outcome(lambda *x: recurrence(*x, LENGTHS), cast(tensors, torch.float32))
    results = outcome(lambda *x: delta_rule(*x, documents), tensors)
    assert max(distances([x.float() for x in results], expected)) < 1e-2
    delta_rule(*tensors, documents)
    assert len(fla) == 2 and all(offsets is documents.offsets for offsets in fla)
    delta_rule(*(x.detach()[:3] for x in tensors), Documents.of((3,)), {})  # generation uses our own
    assert len(fla) == 2


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_fla_is_one_operation_of_a_compiled_block(fla, backend):
    """One graph for all packings. Output and gradients are those of eager to the last bit (inductor: to bf16), and the
    offsets are the same tensor in forward and backward."""
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(delta_rule, dynamic=True, fullgraph=True, backend=backend)
    for lengths in PACKINGS[:4]:
        tensors, documents = cast(inputs(lengths), torch.bfloat16), Documents.of(lengths)
        expected = outcome(lambda *x: delta_rule(*x, documents), tensors)
        fla.clear()
        results = outcome(lambda *x: compiled(*x, documents), tensors)
        assert len(fla) == 2 and all(offsets is documents.offsets for offsets in fla)
        assert all(torch.equal(one, other) for one, other in zip(results, expected, strict=True))
        assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("installed, device, dtype, uses", [
    (True, "cuda", torch.bfloat16, True), (True, "cuda", torch.float16, True), (True, "cuda", torch.float32, False),
    (True, "cpu", torch.bfloat16, False), (True, "meta", torch.bfloat16, False),
    (False, "cuda", torch.bfloat16, False)])
def test_fla_is_used_on_cuda_in_16_bits(installed, device, dtype, uses, monkeypatch):
    """Its kernels take no fp32. It is imported by the first call, never on the CPU."""
    monkeypatch.setattr(delta, "HAS_FLA", installed)
    x = types.SimpleNamespace(device=torch.device(device), dtype=dtype)
    assert delta.uses_fla(x) == uses
