"""--compile: a block is one graph for all packings, numbers stay, kernels are fewer than operations; auto's try."""

import functools
import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
import varlen_helpers
from helpers import Operations, model_loss, small_model
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch._inductor.exc import TritonMissing
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import Scheduler
from torch._inductor.utils import fresh_cache
from torch.distributed.device_mesh import init_device_mesh

import fsdp
from model import generate
from ops import attention, compiler, freezing, nf4

# the lengths of the documents of seven micro-batches; one token is a case of its own for torch.compile
PACKINGS = ((30, 40), (20, 33, 50, 7), (9,) * 11, (100, 60, 3), (1,), (64,) * 5, (200, 17))
FAILURE = compiler.failure  # tests replace it
full = pytest.mark.full


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch):
    """No graph of another test; varlen_attn is the reference, a custom op as torch's own, which no compiler traces."""
    torch._dynamo.reset()
    counters.clear()
    FAILURE.cache_clear()
    varlen_helpers.use(monkeypatch, varlen_helpers.varlen_attn_2_13)
    yield
    attention.varlen_attention.cache_clear()
    FAILURE.cache_clear()
    torch._dynamo.reset()


@pytest.fixture
def traced(monkeypatch):
    """Blocks are compiled without a code generator: the graphs are those of inductor, and it takes seconds."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


def fresh(compiled=True, checkpointed_blocks=0, use_lora=False, **options):
    """A small model with random weights, and adapters whose B is not zero; options of small_model."""
    torch.manual_seed(0)
    net = small_model(use_lora, compiled=compiled, checkpointed_blocks=checkpointed_blocks, **options)
    fill(net)
    return net


@torch.no_grad()
def fill(net):
    for name, p in net.named_parameters():
        p.normal_(1.0 if "norm" in name else 0.0, 0.1)


def step(net, lengths):
    """Loss and gradients of a micro-batch of these documents."""
    tokens = torch.randint(512, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    loss = model_loss(net, tokens, lengths, tokens.roll(-1))
    loss.backward()
    result = {name: p.grad for name, p in net.named_parameters() if p.requires_grad}
    net.zero_grad(set_to_none=True)
    return {"loss": loss.detach(), **result}


def graphs_after_each_step(net):
    graphs = []
    for lengths in PACKINGS:
        step(net, lengths)
        graphs.append(counters["stats"]["unique_graphs"])
    return graphs


ONE_GRAPH = [1, 1, 1, 1, 2, 2, 2]  # and one for the packing of a single token


@pytest.mark.parametrize("options", [
    dict(use_lora=True, checkpointed_blocks=1), pytest.param({}, marks=full),
    pytest.param(dict(checkpointed_blocks=2), marks=full), pytest.param(dict(model_type="qwen3"), marks=full),
    pytest.param(dict(use_lora=True, adapter=dict(lora_dora=True, lora_dropout=0.1), checkpointed_blocks=1),
                 marks=full)], ids=str)
def test_all_blocks_and_packings_share_one_graph(traced, options):
    """No graph break, no compilation after the first step, although numbers and lengths of documents differ; with
    checkpoints, and with LoRA, whose first block gets an input without gradient."""
    assert graphs_after_each_step(fresh(**options)) == ONE_GRAPH
    assert not counters["graph_break"]


@full
def test_backward_ends_above_frozen_blocks(traced):
    """With --freeze of the first blocks; gradients are those of eager. These blocks are one graph more, without backward."""
    net, eager = fresh(num_hidden_layers=3, tie_word_embeddings=False), fresh(
        False, num_hidden_layers=3, tie_word_embeddings=False)
    for model in (net, eager):
        freezing.freeze(model, "embed_tokens,layers.0,layers.1")
    needs = []
    net.model.layers[1].register_forward_hook(lambda block, args, out: needs.append(out.requires_grad))
    for lengths in PACKINGS[:3]:
        expected = step(eager, lengths)
        for name, value in step(net, lengths).items():
            torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-5, msg=name)
    assert needs == [False] * 3 and counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


@pytest.mark.parametrize("window", [
    dict(use_sliding_window=True, sliding_window=5, max_window_layers=0), pytest.param({}, marks=full)])
def test_without_varlen_attn_there_is_one_graph_too(traced, window, monkeypatch):
    """In fp32, and for heads that it does not take; with a checkpoint. Loss and gradients are those of eager."""
    monkeypatch.setattr(attention, "fits_varlen", lambda x, head_dim: False)
    net, eager = fresh(checkpointed_blocks=1, **window), fresh(compiled=False, **window)
    for lengths in PACKINGS[:3]:
        expected = step(eager, lengths)
        for name, value in step(net, lengths).items():
            torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-5, msg=name)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize("options", [
    dict(use_lora=True), pytest.param({}, marks=full), pytest.param(dict(quantize=True, use_lora=True), marks=full)],
    ids=str)
def test_a_compiled_block_keeps_gate_and_up_alone(traced, options):
    """Of the MLP's tensors (tokens, intermediate_size): silu(gate) and the product are computed again."""
    net = fresh(**options)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        step(net, PACKINGS[0])
    width = net.config.intermediate_size
    assert kept.count((sum(PACKINGS[0]), width)) == 2 * net.config.num_hidden_layers


@pytest.mark.full
def test_compiled_qlora_keeps_no_dequantised_matrix(traced):
    """One graph, and for backward only what is stored in 4 bits. A dequantisation that the compiler saw would be the same
    in forward and backward, so it would be computed once and kept."""
    net = fresh(use_lora=True, quantize=True)
    for module in net.modules():
        if isinstance(module, nf4.NF4Weight):
            module.quantize_rows(module.weight.data, torch.randn(module.out_features, module.in_features) * 0.1)
    shapes = {(m.out_features, m.in_features) for m in net.modules() if isinstance(m, nf4.NF4Weight)}
    shapes |= {shape[::-1] for shape in shapes}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        step(net, PACKINGS[0])
    assert kept and not shapes & set(kept)
    assert graphs_after_each_step(net) == ONE_GRAPH and not counters["graph_break"]


@full
def test_blocks_with_and_without_a_window_are_one_graph_each(traced):
    net = fresh(num_hidden_layers=3, use_sliding_window=True, sliding_window=5, max_window_layers=2)
    assert graphs_after_each_step(net) == [2 * n for n in ONE_GRAPH]
    assert not counters["graph_break"]


@pytest.mark.full
@pytest.mark.parametrize("use_lora", [False, True])
def test_fsdp_shares_the_graph_too(traced, use_lora):
    """FSDP2 makes each block's input a view, except where a checkpoint runs the block again."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with torch.device("meta"):
            net = small_model(use_lora, compiled=True, checkpointed_blocks=1)
        ranks = SimpleNamespace(world_size=2, dp_size=1, device=torch.device("cpu"),  # one rank would not use FSDP2
                                mesh=init_device_mesh("cpu", (1,), mesh_dim_names=("dp",)))
        fsdp.shard(net, ranks, bf16=True, param_offload=False)
        net.to_empty(device="cpu")
        net.tie_weights()
        fill(net)
        assert graphs_after_each_step(net) == ONE_GRAPH
        assert not counters["graph_break"]
    finally:
        dist.destroy_process_group()


def test_evaluation_adds_one_graph_and_generation_none(traced):
    """A forward without gradients is another graph. Text is generated without the compiler: its cache grows with each
    token, and each kind of cache would be compiled."""
    net = fresh()
    step(net, PACKINGS[0])
    tokens = list(generate(net, [3, 1, 4], 4, eos_ids=()))
    assert counters["stats"]["unique_graphs"] == 1
    with torch.no_grad():
        for lengths in PACKINGS[:3]:
            model_loss(net, torch.zeros(sum(lengths), dtype=torch.long), lengths, torch.zeros(sum(lengths)).long())
    assert counters["stats"]["unique_graphs"] == 2
    step(net, PACKINGS[1])
    assert counters["stats"]["unique_graphs"] == 2  # compiled again after generation, from the same graph
    assert tokens == list(generate(fresh(compiled=False), [3, 1, 4], 4, eos_ids=()))


# ---- numbers and kernels ------------------------------------------------------------------------------------------

# A block calls products, and attention, in five places: q, k, v; attention; o; gate, up; down. Inductor fuses nothing
# into these calls. Before, between and after them are six places for elementwise operations and sums over a token's
# elements, in forward and again in backward. One kernel for each:
MOST_KERNELS = 2 * 6


@full
def test_compiled_numbers_equal_eager_ones_and_kernels_are_few(monkeypatch):
    """fp32, inductor on the CPU. Loss and gradient are within 1.5e-6 of eager. A parameter's gradient may be a small
    difference of large numbers: it is as near to fp64 as the eager one, up to a factor of 2. All blocks share the
    generated code."""
    sources = []
    monkeypatch.setattr(GraphLowering, "save_output_code", staticmethod(sources.append))
    with fresh_cache():
        compiled = [step(fresh(), lengths) for lengths in PACKINGS[:3]]
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    for lengths, results in zip(PACKINGS, compiled):
        eager, exact = step(fresh(compiled=False), lengths), step(fresh(compiled=False).double(), lengths)
        names = [name for name in eager if name != "loss"]
        assert abs(results["loss"] - eager["loss"]) <= 1.5e-6 * eager["loss"]
        gradients = (torch.cat([tensors[name].flatten() for name in names]) for tensors in (results, eager))
        assert distance(*gradients) <= 1.5e-6
        for name in names:
            assert distance(results[name], exact[name]) <= 2 * distance(eager[name], exact[name]), name
    assert len(sources) == 2  # forward and backward
    kernels = [call for source in sources for call in re.findall(r"^ +cpp_fused_\w+\(", source, re.M)]
    assert 0 < len(kernels) <= MOST_KERNELS
    assert 4 * MOST_KERNELS < eager_operations(3) - eager_operations(2)  # each layer's, of which the products stay


def distance(tensor, other):
    """Norm of the difference / norm of the other."""
    return ((tensor - other).norm() / other.norm()).item()


def eager_operations(layers):
    """Operations of a step that are neither views nor products nor attention."""
    with Operations() as counted:
        step(fresh(compiled=False, num_hidden_layers=layers), PACKINGS[0])
    fixed = ("mm", "addmm", "varlen", "varlen_backward")
    return sum(n for name, n in counted.counts.items() if name not in fixed)


# ---- --compile auto -----------------------------------------------------------------------------------------------

GPP_WITHOUT_HEADERS = """#!/bin/sh
[ "$1" = --version ] && exec g++ --version
echo "main.cpp:1:10: fatal error: Python.h: No such file or directory" >&2
exit 1
"""


def without_triton(self, device):
    raise TritonMissing(None)


@pytest.fixture
def on_the_cpu(monkeypatch):
    """The try for CUDA runs on the CPU, with an empty cache of compiled code."""
    monkeypatch.setattr(compiler, "failure", lambda device_type: FAILURE("cpu"))
    with fresh_cache():
        yield


CUDA = torch.device("cuda")


@pytest.mark.full
def test_auto_compiles_where_a_try_succeeds(on_the_cpu, capsys):
    assert compiler.choose("auto", CUDA) is True
    assert compiler.has_compiler("cuda")
    assert capsys.readouterr().out == ""


def no_compiler(monkeypatch, tmp_path):
    return inductor.patch({"cpp.cxx": ("/nonexistent/g++",)})


def no_headers(monkeypatch, tmp_path):
    (tmp_path / "g++").write_text(GPP_WITHOUT_HEADERS)
    (tmp_path / "g++").chmod(0o755)
    return inductor.patch({"cpp.cxx": (str(tmp_path / "g++"),)})


def no_triton(monkeypatch, tmp_path):
    monkeypatch.setattr(Scheduler, "create_backend", without_triton)
    return nullcontext()


def disabled(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    return nullcontext()


@pytest.mark.parametrize("plant, reason", [
    (no_compiler, r"InvalidCxxCompiler: No working C\+\+ compiler found .*/nonexistent/g\+\+.*"),
    (no_headers, r"CppCompileError: main.cpp:1:10: fatal error: Python.h: No such file or directory"),
    (no_triton, r"TritonMissing: Cannot find a working triton installation.*"),
    (disabled, r"TORCH_COMPILE_DISABLE is 1")])
def test_auto_tells_in_one_line_why_it_is_off(on_the_cpu, plant, reason, monkeypatch, tmp_path, capsys):
    """For what may be missing on a machine. The loss (has_compiler) does not compile there either."""
    with plant(monkeypatch, tmp_path):
        assert compiler.choose("auto", CUDA) is False
    assert re.fullmatch(f"compile  off: {reason}; --compile true shows the error\n", capsys.readouterr().out)
    assert not compiler.has_compiler("cuda")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert compiler.choose("auto", CUDA) is False and capsys.readouterr().out == ""


def test_an_error_that_is_not_the_compilers_is_raised(on_the_cpu, monkeypatch):
    """Such as a device without memory."""
    def full_device(x):
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(torch, "compile", lambda function: full_device)
    with pytest.raises(torch.OutOfMemoryError, match="planted"):
        compiler.choose("auto", CUDA)


@pytest.mark.parametrize("setting, device, tp, expected", [
    (True, "cpu", 1, True), (True, "cuda", 1, True), (False, "cuda", 1, False), (False, "cpu", 1, False),
    ("auto", "cpu", 1, False), ("auto", "meta", 1, False), ("auto", "cuda", 2, False)])
def test_what_needs_no_try(setting, device, tp, expected, monkeypatch, capsys):
    """true and false are obeyed. auto means off on the CPU and with tensor parallelism."""
    monkeypatch.setattr(compiler, "failure", None)
    assert compiler.choose(setting, torch.device(device), tp) is expected
    assert not compiler.has_compiler("cpu") and not compiler.has_compiler("meta")
    assert capsys.readouterr().out == ""
