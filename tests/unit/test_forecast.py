"""ops/forecast.py and tools/plan.py: bytes against those of autograd, of a run's tensors and of real collectives; laws,
what `auto` chooses, and errors."""

import collections
import dataclasses
import functools
import gc
import json
import math
import os
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers import TINY, chat, first, model_directory, model_loss, program, small_model, tensors_of, two_layers, write
from test_families import FAMILY_CASES, SIZES
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import fsdp
import sft
from disk import checkpoint, writer
from families.config import ModelConfig
from model import CausalLM
from ops import activations, forecast, memory, optim
from ops.attention import Documents
from ranks import processes, sp
from settings.parser import parse
from tools import plan
from tools.step_time import Cluster, flops

GB = 2**30


def planned_run(model, length, **settings):
    parameters = tuple((n, tuple(p.shape), p.element_size(), p.requires_grad) for n, p in model.named_parameters())
    return forecast.PlannedRun(model.config, parameters, length, **settings)


def kept_bytes(model, lengths, documents=None):
    """Bytes of all tensors that autograd keeps for a forward pass, except parameters; each storage once.

    documents  with --sp those of a rank's part; None: all tokens of `lengths`
    """
    parameters, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage  # a reference, so that its address is not reused
        return tensor

    documents = documents or Documents.of(lengths)
    tokens = torch.arange(len(documents.positions)) % model.config.vocab_size
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(tokens, documents, torch.arange(len(tokens)), tokens).total
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


MODELS = {
    "full": {}, "untied": dict(tie_word_embeddings=False), "qwen3": dict(model_type="qwen3"),
    "lora": dict(use_lora=True), "lora qwen3": dict(use_lora=True, model_type="qwen3"),
    "dropout": dict(use_lora=True, adapter=dict(lora_dropout=0.1)),
    "dora": dict(use_lora=True, adapter=dict(lora_dora=True)), "nf4": dict(use_lora=True, quantize=True),
    "embedding": dict(use_lora=True, adapter=dict(lora_modules_to_save="embed_tokens")),
    "attention": dict(use_lora=True, adapter=dict(lora_targets="q_proj,v_proj")),
}


@pytest.mark.parametrize("micro_batch_size", [1, 2])
@pytest.mark.parametrize("checkpointed_blocks", [0, 1, 2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_activations_to_the_byte(name, checkpointed_blocks, micro_batch_size):
    """The planned bytes of the blocks, plus the final norm, the rotary angles, and the ids of tokens and targets."""
    model = small_model(**MODELS[name], num_hidden_layers=3)
    model.model.checkpointed_blocks = checkpointed_blocks
    dropout = MODELS[name].get("adapter", {}).get("lora_dropout", 0.0)
    run = planned_run(model, 20, micro_batch_size=micro_batch_size, checkpointed_blocks=checkpointed_blocks,
                      dropout=dropout)
    N = 20 * micro_batch_size
    hidden = N * model.config.hidden_size * 4
    is_full, trains_embedding = "use_lora" not in MODELS[name], model.model.embed_tokens.weight.requires_grad
    other = hidden * (1 + is_full) + 4 * N + 4 * N * model.config.head_dim + 8 * N * (1 + trains_embedding)
    assert kept_bytes(model, (20,) * micro_batch_size) == forecast.kept_bytes(run) + other


@pytest.fixture
def mesh():
    """A function from the sizes of (replicas, shards, sp) to the Ranks of one of so many processes. The others don't
    exist: nothing is exchanged, but shapes and calls are those of real ones."""
    def of(replicas, shards, sp_size):
        n = replicas * shards
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=n)
        axes = init_device_mesh("cpu", (replicas, shards, 1), mesh_dim_names=("replicas", "shards", "tp"))
        group = init_device_mesh("cpu", (n // sp_size, sp_size), mesh_dim_names=("dp", "sp"))["sp"].get_group()
        return SimpleNamespace(mesh=axes, sp_size=sp_size, sp_rank=0, sp_group=group, world_size=n,
                               device=torch.device("cpu"))

    yield of
    dist.destroy_process_group()


@pytest.mark.parametrize("micro_batch_size", [1, 2])
@pytest.mark.parametrize("checkpointed_blocks", [0, 1])
@pytest.mark.parametrize("sp_size", [2, 4, 8])
@pytest.mark.parametrize("name", ["full", "lora", *(pytest.param(name, marks=pytest.mark.full)
                                                    for name in ("qwen3", "dropout", "attention"))])
def test_activations_of_an_sp_rank_to_the_byte(name, sp_size, checkpointed_blocks, micro_batch_size, mesh):
    """Eight query heads, two for keys and values, which are repeated from sp 4 on; a micro-batch that sp does not divide
    ends with a document of padding."""
    model = small_model(**MODELS[name], num_hidden_layers=3, num_attention_heads=8)
    model.model.checkpointed_blocks = checkpointed_blocks
    sp.split(model, mesh(1, 8, sp_size))
    run = planned_run(model, 21, micro_batch_size=micro_batch_size, checkpointed_blocks=checkpointed_blocks,
                      world_size=8, sp=sp_size, dropout=MODELS[name].get("adapter", {}).get("lora_dropout", 0.0))
    padding = -21 * micro_batch_size % sp_size
    lengths = (21,) * micro_batch_size + (padding,) * (padding > 0)
    N, whole = sum(lengths) // sp_size, Documents.of(lengths)
    assert run.rank_tokens == N
    documents = Documents(lengths, whole.positions[:N], whole.offsets, is_part=True)
    hidden, trains_embedding = N * model.config.hidden_size * 4, model.model.embed_tokens.weight.requires_grad
    other = hidden * (2 if trains_embedding else 1) + 4 * N + 4 * N * model.config.head_dim
    other += 8 * N * (1 + trains_embedding)
    assert kept_bytes(model, lengths, documents) == forecast.kept_bytes(run) + other


def grown(before=frozenset()):
    """{address: bytes} of the fp32 tensors in memory that were not there before."""
    gc.collect()
    found = {}
    for tensor in [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]:
        for t in (tensor, tensor.grad if tensor.is_leaf else None):
            if t is not None and t.dtype == torch.float32 and t.device.type == "cpu":
                storage = memory.local(t).untyped_storage()
                if storage.nbytes() and storage.data_ptr() not in before:
                    found[storage.data_ptr()] = storage.nbytes()
    return found


@pytest.mark.parametrize("tied, reduction, replicas", [
    (True, "micro_batch", 2), (False, "step", 1), (False, "micro_batch", 1),
    *(pytest.param(*case, marks=pytest.mark.full) for case in (
        (True, "step", 1), (True, "step", 2), (True, "micro_batch", 1), (False, "step", 2), (False, "micro_batch", 2)))])
def test_what_fsdp_holds_to_the_byte(reduction, replicas, tied, mesh):
    """The parameters that are gathered when forward ends, and the gradients between two micro-batches."""
    model = small_model(tie_word_embeddings=tied, hidden_size=128)
    run = planned_run(model, 16, batch_size=8, world_size=4, replicas=replicas, gradient_reduction=reduction)
    fsdp.shard(model, mesh(replicas, 4 // replicas, 1), bf16=False, param_offload=False, gradient_reduction=reduction)
    tokens = torch.arange(16)

    def loss():
        fsdp.set_gradient_sync(model, is_last=False)
        return model_loss(model, tokens, (16,), tokens)

    fsdp.set_gradient_sync(model, is_last=True)
    model_loss(model, tokens, (16,), tokens).backward()  # the first one makes FSDP2's buffers
    for p in model.parameters():
        p.grad = None
    before, first = set(grown()), loss()
    gathered = sum(4 * p.numel() for p in model.parameters() if not memory.is_split(p))
    assert gathered == sum(forecast.gathered_bytes(run, group) for group in (None, forecast.HEAD, "0"))
    first.backward()
    del first
    assert sum(grown(before).values()) == forecast.held_bytes(run)
    assert forecast.held_bytes(dataclasses.replace(run, batch_size=4)) == 0


class FusedNorm(torch.autograd.Function):
    """What torch's kernel for CUDA keeps of F.rms_norm: x, and 1 / rms in fp32."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return x * weight

    @staticmethod
    def backward(ctx, grad):
        return grad, grad


@pytest.mark.parametrize("micro_batch_size", [1, 2])
@pytest.mark.parametrize("checkpointed_blocks", [0, 1, 3])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "dropout"])  # its mask is of another type on CUDA
def test_activations_on_cuda_to_the_byte(name, checkpointed_blocks, micro_batch_size, monkeypatch):
    """In bf16 on meta, which stands for CUDA: one varlen_attn per layer keeps q, k, v, its output, the logsumexp and 16
    bytes. The norms, which meta computes in parts, are replaced by what CUDA's kernel keeps."""
    monkeypatch.setattr(torch.nn.RMSNorm, "forward", lambda norm, x: FusedNorm.apply(x, norm.weight))
    model = small_model(**MODELS[name], num_hidden_layers=3).to(torch.bfloat16).to("meta")
    model.model.checkpointed_blocks = checkpointed_blocks
    run = planned_run(model, 20, micro_batch_size=micro_batch_size, checkpointed_blocks=checkpointed_blocks, cuda=True,
                      bf16=True)
    N = 20 * micro_batch_size
    other = 2 * N * model.config.hidden_size + 4 * N + 4 * N * model.config.head_dim
    other += 8 * N * (1 + model.model.embed_tokens.weight.requires_grad)
    if checkpointed_blocks < 3:
        other += 4 * (micro_batch_size + 1)  # where each document begins
    parameters, kept = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()  # on meta all addresses are 0
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage
        return tensor

    ids = torch.zeros(N, dtype=torch.int64, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        documents = Documents.of((20,) * micro_batch_size, "meta")
        loss = model(ids, documents, torch.zeros_like(ids), torch.zeros_like(ids)).total
    assert loss.requires_grad
    assert sum(storage.nbytes() for storage in kept.values()) == forecast.kept_bytes(run) + other


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "dropout"])  # its mask is of another type on CUDA
def test_measured_blocks_keep_what_the_formula_says(name, cuda):
    """Blocks of families/ are measured on meta. Those of model.py have both: the first block, and the others."""
    model = small_model(**MODELS[name], num_hidden_layers=3).to("meta")
    run = planned_run(model.to(torch.bfloat16) if cuda else model, 256, cuda=cuda, bf16=cuda)
    first, *others = [256 * size for size in activations.measure(model, bf16=cuda, fused_norms=cuda)]
    rng_state = 16 * cuda
    assert first + rng_state == forecast.block_activations(run, is_first=True)
    assert [size + rng_state for size in others] == [forecast.block_activations(run)] * 2


@pytest.mark.parametrize("tp, sp_size", [(2, 1), (1, 2), (1, 4), (2, 2), (2, 4)])
def test_measured_blocks_of_parallel_ranks(tp, sp_size):
    """tp: 1 / tp of the heads and of the MLP; the hidden states are whole. sp: 1 / sp of the tokens, but keys and values
    are repeated where there are more ranks than heads of them."""
    model = small_model(num_hidden_layers=1, tie_word_embeddings=False, num_attention_heads=8).to("meta")
    model.model.embed_tokens.requires_grad_(True)
    size, = activations.measure(model, bf16=False, fused_norms=True, tp=tp, sp=sp_size)
    run = planned_run(model, 256 * sp_size, tp=tp, sp=sp_size, world_size=8, cuda=True)
    assert 256 * size == pytest.approx(forecast.block_activations(run))


@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_activations_of_each_block_in_backward(k):
    """When backward of block i begins, the inputs of the checkpointed blocks below it, all of the other blocks below it,
    and all of block i itself: counted here block by block."""
    run = planned_run(small_model(num_hidden_layers=3), 20, checkpointed_blocks=k)
    block = forecast.block_activations(run)
    for i in range(3):
        below = sum(run.hidden_bytes if j < k else block for j in range(i))
        assert forecast.activations(run, i) == below + block
    assert forecast.activations(run) == forecast.activations(run, 2)


@pytest.mark.parametrize("flags", [
    (), ("--use_lora", "--lora_targets", "gate_proj"), *(pytest.param(flags, marks=pytest.mark.full) for flags in (
        ("--use_lora", "--lora_plus_ratio", "4", "--lora_dora"), ("--dtype", "bf16"), ("--freeze", "embed_tokens"),
        ("--use_lora", "--lora_modules_to_save", "embed_tokens")))])
def test_the_buffers_of_optimizer_offload(train, monkeypatch, flags):
    """What a run of tiny writes into them, to the byte: the first parameter goes to one, the second to the other, and
    so on. On CUDA, where they are pinned, both are as large as the largest."""
    written, part = collections.Counter(), optim.part

    def counted(buffer, p):
        written[id(buffer)] = max(written[id(buffer)], 4 * memory.local(p).numel())
        return part(buffer, p)

    monkeypatch.setattr(optim, "part", counted)
    train(*flags, "--optimizer_offload", "--max_steps", 1, "--max_length", 64, "--batch_size", 1, model=TINY)
    run = planned_by(monkeypatch, "--model", TINY, *flags, "--optimizer_offload")
    assert forecast.buffer_bytes(run) == sum(written.values())
    assert forecast.buffer_bytes(dataclasses.replace(run, cuda=True)) == 2 * max(written.values())


@pytest.mark.parametrize("flags", [
    (), ("--optimizer_offload",), ("--use_lora",), ("--dtype", "bf16"),
    *(pytest.param(flags, marks=pytest.mark.full) for flags in (
        ("--use_lora", "--quantize", "nf4", "--optimizer_offload"), ("--param_offload",),
        ("--use_lora", "--lora_modules_to_save", "embed_tokens"), ("--dtype", "bf16", "--optimizer_offload")))])
def test_states_equal_the_tensors_of_a_run(train, monkeypatch, flags):
    """Weights, gradients, moments and masters of a run of tiny, to the byte."""
    sizes, save, norm = {}, checkpoint.save, fsdp.grad_norm

    def size(tensors):
        return sum(memory.local(t).numel() * t.element_size() for t in tensors)

    def counted_norm(model):
        sizes["gradients"] = size(p.grad for p in model.parameters() if p.requires_grad)
        return norm(model)

    def counted_save(root, step, *, model, optimizer, **rest):
        sizes.update(weights=size(model.parameters()), masters=size(getattr(optimizer, "masters", {}).values()),
                     moments=size(s[name] for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")))
        return save(root, step, model=model, optimizer=optimizer, **rest)

    monkeypatch.setattr(fsdp, "grad_norm", counted_norm)
    monkeypatch.setattr(checkpoint, "save", counted_save)
    train(*flags, "--max_steps", 1, "--max_length", 64, "--batch_size", 1, model=TINY)
    assert forecast.states(planned_by(monkeypatch, "--model", TINY, *flags)) == sizes


def test_the_optimizer_says_how_much_state_it_has(monkeypatch):
    """One moment for matrices, none for vectors: in the plan, and in what --async_save copies."""
    class Sparse(optim.AdamW):
        def new_state(self, p):
            return {"momentum": torch.zeros_like(p)} if p.ndim > 1 else {}

    monkeypatch.setattr(optim, "choose", lambda model, cfg: (Sparse, optim.parameter_groups(model, 0.1)))
    run = planned_by(monkeypatch, "--model", TINY, "--async_save", "--dtype", "bf16")
    tensors = tensors_of(TINY).values()
    matrices, vectors = (sum(t.numel() for t in tensors if (t.ndim > 1) == wanted) for wanted in (True, False))
    assert forecast.states(run)["moments"] == 4 * matrices
    assert forecast.copied_bytes(run) == 10 * matrices + 6 * vectors
    [line] = [line for line in plan.memory_lines(run) if line.startswith("optimizer")]
    assert f" {4 * matrices / 2**30:.3f} GiB" in line


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_copy_of_an_asynchronous_save(dtype, train, monkeypatch, tmp_path):
    """What the writer holds in host memory: 14 bytes a parameter, 2 less where the model's files are fp32."""
    held, finish = [], writer.Writer.finish

    def count(self):
        self.wait()
        held.append(sum(len(data) for *_, file in self.last_jobs if isinstance(file, writer.TensorFile)
                        for data in list(file.held)[1:]))  # the first is the header
        finish(self)

    def convert(tensors):
        tensors.update({name: t.bfloat16() if dtype == "bf16" else t.float() for name, t in tensors.items()})

    monkeypatch.setattr(writer.Writer, "finish", count)
    model = model_directory(tmp_path / "m", change_tensors=convert)
    flags = ("--model", model, "--async_save", "--max_length", 64, "--batch_size", 1)
    train(*flags, "--save_steps", 1, "--max_steps", 2)
    run = planned_by(monkeypatch, *flags)
    n_parameters = sum(math.prod(shape) for _, shape, *_ in run.parameters)
    assert forecast.copied_bytes(run) == 14 * n_parameters
    assert held[0] == (14 if dtype == "bf16" else 12) * n_parameters
    on_gpus = dataclasses.replace(run, cuda=True, world_size=4)
    without = dataclasses.replace(on_gpus, async_save=False)
    assert forecast.memory(on_gpus)["host"] - forecast.memory(without)["host"] == 14 * n_parameters // 4
    assert forecast.memory(on_gpus)["device"] == forecast.memory(without)["device"]


def planned_by(monkeypatch, *flags):
    """The PlannedRun that tools/plan.py makes from these flags."""
    runs = []

    def keep(run, **options):
        runs.append(run)
        return ()

    with monkeypatch.context() as patch:
        patch.setattr(plan, "lines", keep)
        plan.plan(parse(plan.Config, [str(flag) for flag in flags])[0])
    return runs[0]


def peak_of(run, tmp_path, monkeypatch):
    """The most bytes that torch had allocated while a run was trained, by its own count."""
    monkeypatch.setattr(memory, "tune_malloc", lambda **kwargs: None)
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    events = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    sizes = [e["args"]["Total Allocated"] for e in events]
    return max(sizes) - sizes[0]  # tensors of other tests may exist already


@pytest.mark.parametrize("flags", [
    (), ("--use_lora",), ("--param_offload",), ("--dtype", "bf16", "--max_length", "32"),
    *(pytest.param(flags, marks=pytest.mark.full) for flags in (
        ("--no-gradient_checkpointing",), ("--batch_size", "2"), ("--optimizer_offload",), ("--max_length", "32"),
        ("--use_lora", "--param_offload"), ("--max_length", "32", "--param_offload"))),
    pytest.param(("--dtype", "bf16", "--max_length", "32", "--optimizer_offload"), marks=[
        pytest.mark.full, pytest.mark.xfail(strict=True, reason="one more fp32 tensor of the largest parameter")])])
def test_the_peak_is_within_5_percent_of_the_allocators(train, tmp_path, monkeypatch, flags):
    """The planned peak against the most memory that torch had allocated during three steps, by its own count."""
    monkeypatch.setattr(checkpoint, "save", lambda *args, **kwargs: None)
    monkeypatch.setattr(checkpoint, "prune", lambda *args: None)
    length, model = 1024 if "--use_lora" in flags else 256, TINY  # with 256, LoRA's peak would be in loading
    if "--max_length" in flags:  # few tokens, a large vocabulary: the peak is the embedding's gradient
        length, model = 32, two_layers(tmp_path, vocab_size=16384)
    rows = [{"messages": chat("q", "a", "Go on.", "the " * length)}] * 6  # one turn has its end
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    batch_size = () if "--batch_size" in flags else ("--batch_size", 1)
    arguments = ("--train_data", tmp_path / "rows.json", "--max_length", length, *batch_size, *flags)
    steps = []
    peak = peak_of(lambda: steps.extend(train(*arguments, "--max_steps", 3, model=model)), tmp_path, monkeypatch)
    assert [step["tokens"] for step in steps] == [512 if "--batch_size" in flags else length] * 3
    planned = forecast.memory(planned_by(monkeypatch, "--model", model, *arguments))
    assert math.isclose(planned["device"] - planned["slack"], peak, rel_tol=0.05), (planned, peak)


@pytest.mark.parametrize("flags", [(), pytest.param(("--use_lora", "--no-gradient_checkpointing"), marks=pytest.mark.full)],
                         ids=["full", "lora"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.full] * (name != "qwen3.5"))
                                  for name in FAMILY_CASES])
def test_the_peak_of_each_family_is_within_10_percent(name, flags, train, tmp_path, monkeypatch):
    """The planned peak against torch's own count; by default of one family."""
    config = {**SIZES, **FAMILY_CASES[name], "hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 16,
              "hidden_act": None}  # the default of each family
    directory = two_layers(tmp_path / "model", **config)
    rows = [{"messages": chat("q", "a", "Go on.", "the " * 1024)}] * 6
    arguments = ("--train_data", write(tmp_path / "rows.json", rows), "--max_length", 1024, "--batch_size", 2,
                 "--micro_batch_size", 1, *flags)
    monkeypatch.setattr(checkpoint, "save", lambda *args, **kwargs: None)
    peak = peak_of(lambda: train(*arguments, "--max_steps", 2, model=directory), tmp_path, monkeypatch)
    planned = forecast.memory(planned_by(monkeypatch, "--model", directory, *arguments))
    assert math.isclose(planned["device"] - planned["slack"], peak, rel_tol=0.1), planned["stages"]


@pytest.mark.full
def test_collectives_equal_those_of_four_ranks():
    """tp, sp and replicas, two micro-batches, full with and without checkpointing, and LoRA: calls and bytes of each
    kind, and the bytes that rank 0 holds."""
    result = program("collective_bytes", ranks=4)
    assert result.returncode == 0, result.stderr[-2000:]
    cases = json.loads(re.search(r"RESULT (.*)", result.stdout)[1])
    assert len(cases) == 8
    for name, (counted, planned, held, planned_states) in cases.items():
        assert counted == planned, name
        assert held == planned_states, name


QWEN_72B = dict(model_type="qwen2", hidden_size=8192, intermediate_size=29568, num_hidden_layers=80, vocab_size=152064,
                num_attention_heads=64, num_key_value_heads=8, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def large():
    with torch.device("meta"):
        model = CausalLM(ModelConfig.from_dict(QWEN_72B))
    return planned_run(model, 4096, batch_size=128, world_size=64, tp=8, bf16=True, cuda=True, checkpointed_blocks=80)


def test_memory_is_monotonic(large):
    """Memory grows with the micro-batch and its length, falls with more ranks, checkpointing and offload."""
    def device(**changes):
        return forecast.memory(dataclasses.replace(large, **changes))["device"]

    def grows(values):
        return all(a < b for a, b in zip(values, values[1:]))

    assert grows([device(micro_batch_size=n, batch_size=256) for n in (1, 2, 3, 4)])
    assert grows([device(length=n) for n in (128, 4096, 8192)])
    assert grows([device(world_size=n, batch_size=4 * n) for n in (512, 256, 64, 8)])
    assert grows([device(checkpointed_blocks=n) for n in (79, 40, 1, 0)])
    assert device(checkpointed_blocks=80) <= device(checkpointed_blocks=79)  # the last block exists in full either way
    assert grows([device(param_offload=True), device()])
    assert grows([device(optimizer_offload=True), device()])
    assert grows([device(batch_size=8), device(batch_size=9)])  # the second micro-batch holds the full gradient


@pytest.mark.parametrize("checkpointed_blocks", [0, 40, 80])
def test_the_largest_micro_batch_fits_and_a_larger_one_does_not(large, checkpointed_blocks):
    """With two micro-batches per step, which hold the full gradient between them, and with one, which fits more."""
    run, largest = dataclasses.replace(large, length=512, checkpointed_blocks=checkpointed_blocks), []
    for several in (True, False):
        largest.append(forecast.largest_micro_batch(run, 80 * GB, several))
        fits, fits_not = (
            dataclasses.replace(run, micro_batch_size=n, batch_size=n * run.dp * (1 + several))
            for n in (largest[-1], largest[-1] + 1))
        assert forecast.memory(fits)["device"] <= 80 * GB < forecast.memory(fits_not)["device"]
    assert 1 < largest[0] < largest[1]
    assert forecast.largest_micro_batch(run, 1 * GB) == 0


# ---- auto -------------------------------------------------------------------------------------------------------------

QWEN_05B = dict(model_type="qwen2", hidden_size=896, intermediate_size=4864, num_hidden_layers=24, vocab_size=151936,
                num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True)
QWEN_7B = dict(model_type="qwen2", hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, vocab_size=152064,
               num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False)


@functools.cache
def on_one_gpu(config, **settings):
    """The PlannedRun of a model with these keys of config.json, in bf16 on one GPU."""
    with torch.device("meta"):
        model = CausalLM(ModelConfig.from_dict(dict(config)))
    cfg = sft.Config(batch_size=64, **settings)
    return forecast.PlannedRun.of(model, cfg, world_size=1, cuda=True)


def gpu(config, **settings):
    return on_one_gpu(tuple(config.items()), **settings)


def device_gb(run):
    return forecast.memory(run)["device"] / GB


@pytest.mark.parametrize("capacity", first(2, [16, 40, 12, 20, 28, 80]))
def test_auto_is_the_cheapest_that_fits(capacity):
    """Against all pairs of a size and a number of blocks: none that fits is cheaper, and the choice fits into 85 %."""
    run = gpu(QWEN_05B)
    chosen = forecast.choose(run, capacity * GB)
    costs = {}
    for n in (16, 8, 4, 2, 1):
        for k in range(25):
            planned = dataclasses.replace(run, micro_batch_size=n, checkpointed_blocks=k)
            if device_gb(planned) <= 0.85 * capacity:
                costs[n, k] = (1 + k / 72) * (1 + 2048 / (n * 2048))
    assert (chosen.micro_batch_size, chosen.checkpointed_blocks) == min(costs, key=costs.get)
    if capacity == 80:
        assert (chosen.micro_batch_size, chosen.checkpointed_blocks) == (16, 0)
    if capacity == 12:
        assert 0 < chosen.checkpointed_blocks < 24


def test_auto_never_makes_more_than_a_step_or_32768_tokens():
    """And at least one conversation, however long."""
    for length, batch_size, n in ((2048, 64, 16), (2048, 5, 5), (256, 64, 64), (256, 300, 128), (50000, 64, 1)):
        run = dataclasses.replace(gpu(QWEN_05B), length=length, batch_size=batch_size)
        assert forecast.choose(run, 10_000 * GB).micro_batch_size == n
    run = dataclasses.replace(gpu(QWEN_05B), world_size=8, batch_size=64)
    assert forecast.choose(run, 10_000 * GB).micro_batch_size == 8
    run = dataclasses.replace(run, sp=2, length=8192)  # the 32,768 tokens are those of a rank
    assert forecast.choose(run, 10_000 * GB).micro_batch_size == 8
    assert forecast.choose(dataclasses.replace(run, sp=1), 10_000 * GB).micro_batch_size == 4


def test_a_large_gradient_is_reduced_with_each_micro_batch():
    """Of 7B in fp32: 28.4 GiB, a tenth of 284. Not where a step has one micro-batch, or ranks share nothing."""
    run = dataclasses.replace(gpu(QWEN_7B), world_size=8, batch_size=64)
    full = 4 * sum(math.prod(shape) for _, shape, *_ in run.parameters)
    assert forecast.gradient_reduction(run, 10 * full - 1) == "micro_batch"
    assert forecast.gradient_reduction(run, 10 * full) == "step"
    for changes in (dict(micro_batch_size=8), dict(world_size=1), dict(replicas=8)):
        assert forecast.gradient_reduction(dataclasses.replace(run, **changes), full) == "step"
    on_tp = dataclasses.replace(run, tp=2)
    on_tp_full = sum(4 * forecast.shard_sizes(on_tp, name, shape)[0] for name, shape, *_ in run.parameters)
    assert forecast.gradient_reduction(on_tp, 10 * on_tp_full) == "step"
    assert forecast.gradient_reduction(on_tp, 10 * on_tp_full - 1) == "micro_batch"
    often = dataclasses.replace(run, gradient_reduction="micro_batch")
    assert forecast.held_bytes(run) == full and full / 8 <= forecast.held_bytes(often) < 1.001 * full / 8
    assert forecast.memory(run)["device"] - forecast.memory(often)["device"] > 0.7 * full


@pytest.mark.parametrize("batch_size, capacity, expected", [(64, 80, "step"), (512, 80, "micro_batch"), (512, 300, "step")])
def test_the_reduction_is_chosen_for_the_size_that_is_chosen(batch_size, capacity, expected):
    """7B in 80 GiB: a step of 8 × 1,024 tokens a rank is one micro-batch, which holds nothing; one of 64 is several."""
    run = dataclasses.replace(gpu(QWEN_7B), world_size=8, batch_size=batch_size, length=1024)
    chosen = forecast.choose(run, capacity * GB, reduction="auto")
    assert chosen.gradient_reduction == expected and (chosen.micro_batches > 1) == (batch_size == 512)
    assert forecast.memory(chosen)["device"] <= forecast.FILL * capacity * GB
    given = dataclasses.replace(run, gradient_reduction="micro_batch")
    assert forecast.choose(given, capacity * GB).gradient_reduction == "micro_batch"


def test_remedies_name_sp_and_the_reduction_where_they_help():
    """--sp is the next size that the ranks and the heads allow; the reduction saves only where a gradient is held."""
    run = dataclasses.replace(gpu(QWEN_7B), world_size=8, batch_size=64, length=32768, checkpointed_blocks=28)
    saved = dict(forecast.savings(run))
    for flags, changes in (("--sp 2", dict(sp=2)),
                           ("--gradient_reduction micro_batch", dict(gradient_reduction="micro_batch"))):
        assert saved[flags] == forecast.memory(run)["device"] - forecast.memory(
            dataclasses.replace(run, **changes))["device"] > GB
    assert "--sp 4" in dict(forecast.savings(dataclasses.replace(run, sp=2)))  # 28 heads
    assert not [flags for flags, _ in forecast.savings(dataclasses.replace(run, sp=4)) if flags.startswith("--sp")]
    once = dict(forecast.savings(dataclasses.replace(run, batch_size=8)))
    assert "--gradient_reduction micro_batch" not in once
    alone = [flags for flags, _ in forecast.savings(dataclasses.replace(run, world_size=1))]
    assert not [flags for flags in alone if flags.startswith(("--sp", "--gradient_reduction"))]


def test_what_offload_saves_counts_how_weights_are_stored(monkeypatch):
    """Several GPUs in bf16: FSDP2's weights are fp32, with --optimizer_offload bf16; those of adapters are fp32."""
    for flags in ((), ("--use_lora",)):
        flags = "--model", TINY, "--ranks", 4, "--gradient_reduction", "step", *flags
        run, offloaded = planned_by(monkeypatch, *flags), planned_by(monkeypatch, *flags, "--optimizer_offload")
        difference = forecast.memory(run)["device"] - forecast.memory(offloaded)["device"]
        assert dict(forecast.savings(run)).get("--optimizer_offload", 0) == max(0, difference)
        assert forecast.as_stored(offloaded) == offloaded and forecast.as_stored(run) == run


def test_only_what_is_auto_is_chosen():
    """A number that is given stays."""
    run = dataclasses.replace(gpu(QWEN_05B), micro_batch_size=3, checkpointed_blocks=7)
    chosen = forecast.choose(run, 80 * GB, micro_batch_size=3)
    assert (chosen.micro_batch_size, chosen.checkpointed_blocks) == (3, 0)
    chosen = forecast.choose(run, 80 * GB, gradient_checkpointing=True)
    assert (chosen.micro_batch_size, chosen.checkpointed_blocks) == (16, 7)


def test_auto_that_does_not_fit_says_what_it_needs_and_what_would_help():
    """7B in full on 80 GB: LoRA and offload would help; nothing that does not apply is named."""
    run = gpu(QWEN_7B)
    with pytest.raises(ValueError) as error:
        forecast.choose(run, 80 * GB)
    text = str(error.value)
    smallest = dataclasses.replace(run, checkpointed_blocks=28)
    assert f"needs {device_gb(smallest):.1f} GiB" in text and "85% of 80.0 GiB" in text
    sizes = dict(re.findall(r"^  (--.*?) +([\d.]+) GiB$", text, re.M))
    in_fp32 = tuple((name, shape, 4, trained) for name, shape, _, trained in run.parameters)  # as where it is sharded
    for flags, changes in (("--optimizer_offload", dict(optimizer_offload=True)),
                           ("--n_gpus 2", dict(world_size=2, parameters=in_fp32, gradient_reduction="micro_batch")),
                           ("--max_length 1024", dict(length=1024))):
        saved = device_gb(smallest) - device_gb(dataclasses.replace(smallest, **changes))
        assert float(sizes[flags]) == pytest.approx(saved, abs=0.01)
    assert list(sizes.values()) == sorted(sizes.values(), key=float, reverse=True)
    assert {"--use_lora", "--use_lora --quantize nf4"} < set(sizes)
    assert not any("--micro_batch_size" in flags or "--gradient_checkpointing" in flags for flags in sizes)
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("quantize", [False, True])
def test_the_saving_of_lora_is_that_of_a_run_with_lora(quantize, monkeypatch):
    """with_lora() makes the parameters of a model that sft.build() gives adapters, in name, shape and dtype."""
    flags = ("--quantize", "nf4") if quantize else ()
    full = planned_by(monkeypatch, "--model", TINY)
    lora = planned_by(monkeypatch, "--model", TINY, "--use_lora", *flags)
    assert sorted(forecast.with_lora(full, quantize).parameters) == sorted(lora.parameters)
    if quantize:
        plain = planned_by(monkeypatch, "--model", TINY, "--use_lora")
        assert sorted(forecast.with_lora(plain, True).parameters) == sorted(lora.parameters)


def test_the_planned_run_of_a_loaded_model_is_that_of_a_model_on_meta(train, monkeypatch):
    """Also in bf16, where parameters have other dtypes."""
    models, save = [], checkpoint.save
    monkeypatch.setattr(checkpoint, "save",
                        lambda *args, model, **rest: models.append(model) or save(*args, model=model, **rest))
    for flags in (), ("--use_lora",), ("--dtype", "bf16"), ("--dtype", "bf16", "--use_lora"):
        train(*flags, "--max_steps", 1, "--max_length", 64, "--batch_size", 1, out="_".join(("out", *flags)), model=TINY)
        cfg = parse(sft.Config, ["--model", TINY, *flags])[0]
        loaded = forecast.PlannedRun.of(models[-1], cfg, world_size=1, cuda=False)
        assert loaded.parameters == planned_by(monkeypatch, "--model", TINY, *flags).parameters


@pytest.mark.parametrize("flags", [(), pytest.param(("--use_lora",), marks=pytest.mark.full)])
def test_the_peak_of_a_chosen_run_is_within_5_percent(train, tmp_path, monkeypatch, flags, capsys):
    """With memory for one and a half blocks less than all: the forecast on the screen is what the allocator counts."""
    rows = [{"input_ids": [7] * 1024}] * 6
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    arguments = ("--train_data", tmp_path / "rows.json", "--max_length", 512, "--batch_size", 2, *flags)
    run = dataclasses.replace(planned_by(monkeypatch, "--model", TINY, *arguments), micro_batch_size=2)
    all_kept, two_kept = (
        forecast.memory(dataclasses.replace(run, checkpointed_blocks=k))["device"] for k in (0, 2))
    monkeypatch.setattr(forecast, "device_memory", lambda device: int((all_kept + two_kept) / 2 / forecast.FILL))
    monkeypatch.setattr(checkpoint, "save", lambda *args, **kwargs: None)
    monkeypatch.setattr(checkpoint, "prune", lambda *args: None)
    monkeypatch.setattr(memory, "tune_malloc", lambda **kwargs: None)
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        train(*arguments, "--max_steps", 3, "--micro_batch_size", 2, "--gradient_checkpointing", "auto", model=TINY)
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    events = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    sizes = [e["args"]["Total Allocated"] for e in events]
    k = int(re.search(r"memory   micro_batch_size 2 \(1,024 tokens\), (\d) of 4 blocks", capsys.readouterr().out)[1])
    assert k in (1, 2)
    planned = forecast.memory(dataclasses.replace(run, checkpointed_blocks=k))
    assert math.isclose(planned["device"] - planned["slack"], max(sizes) - sizes[0], rel_tol=0.05)


def test_plan_prints_what_auto_would_choose(monkeypatch, capsys):
    arguments = ["plan.py", "--model", TINY, "--micro_batch_size", "auto", "--gradient_checkpointing", "auto"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--memory_gb", "1"])
    plan.main()
    assert "micro-batch 4 × 2,048 tokens, 1 per step per rank" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*arguments, "--n_gpus", "1"])
    plan.main()  # a GPU of 79 GiB
    assert "micro-batch 4 × 2,048 tokens, 1 per step per rank; 0 of 4 blocks" in capsys.readouterr().out


def test_plan_says_what_does_not_fit_and_what_would(tmp_path, monkeypatch, capsys):
    """A model of 7B on 24 GiB: no micro-batch size is advised, and each remedy has what the plan with it needs."""
    config = dict(model_type="qwen2", vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                  num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False)
    (tmp_path / "config.json").write_text(json.dumps(config))

    def printed(*flags):
        monkeypatch.setattr(sys, "argv", ["plan.py", "--model", str(tmp_path), "--n_gpus", "1", "--memory_gb", "24", *flags])
        plan.main()
        return capsys.readouterr().out

    out = printed()
    assert out.count("does not fit in 24 GiB, even with --micro_batch_size 1") == 2 and "fits " not in out
    needed, = re.findall(r"it needs ([\d.]+) GiB; it would need\n", out)
    remedies = re.findall(r"^ +([\d.]+) GiB with (.*)", out, re.M)
    assert ("--use_lora --quantize nf4" in dict(map(reversed, remedies))) and len(remedies) >= 3
    for gib, flags in [(needed, ""), *remedies]:
        peak, = re.findall(r"^peak +([\d.]+) GiB", printed(*flags.split()), re.M)
        assert abs(float(peak) - float(gib)) < 0.06, flags
    assert "it needs" not in printed("--use_lora", "--quantize", "nf4")


GIB = str(GB)


@pytest.mark.parametrize("groups, limits, expected", [
    ("0::/a/b\n", {"memory.max": "max"}, None),
    ("0::/a/b\n", {"memory.max": "max", "a/memory.max": GIB}, GB),
    ("0::/a/b\n", {"a/memory.max": GIB, "a/b/memory.max": str(2 * GB)}, GB),
    ("0::/\n", {"memory.max": GIB}, GB),  # a container sees its own group as the topmost
    ("1:cpu:/x\n4:memory:/x\n", {"memory/x/memory.limit_in_bytes": GIB, "memory/memory.limit_in_bytes": "9" * 19}, GB),
    ("1:cpu:/x\n", {"memory/x/memory.limit_in_bytes": GIB}, None),
    (None, {}, None)], ids=str)
def test_the_limit_of_a_container_counts(groups, limits, expected, tmp_path, monkeypatch):
    """Of both versions of cgroups, and of every group above the process's; otherwise the host's memory."""
    for name, text in limits.items():
        path = tmp_path / "sys" / "fs" / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    if groups:
        (tmp_path / "proc" / "self").mkdir(parents=True)
        (tmp_path / "proc" / "self" / "cgroup").write_text(groups)
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert forecast.host_memory(str(tmp_path)) == (expected or physical)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert forecast.device_memory(torch.device("cpu")) == forecast.host_memory() // 4


def test_ulimit_counts(monkeypatch):
    """ulimit -v, if it is lower than the host's memory."""
    monkeypatch.setattr(forecast.resource, "getrlimit", lambda which: (10**9, forecast.resource.RLIM_INFINITY))
    assert forecast.host_memory() == 10**9


def test_plan_starts_nothing(tmp_path, monkeypatch, capsys):
    """A directory with config.json is enough: no tokenizer, weights or data are read and nothing is written; of several
    processes only rank 0 prints."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN_72B))
    monkeypatch.chdir(tmp_path)
    arguments = ["--model", ".", "--train_data", "none.json", "--ranks", "64", "--tp", "8", "--memory_gb", "80"]
    monkeypatch.setattr(sys, "argv", ["plan.py", *arguments])
    monkeypatch.setattr(processes, "start", None)
    plan.main()
    text = capsys.readouterr().out
    assert "dp 8 × tp 8" in text
    assert os.listdir() == ["config.json"]
    sizes = {line.split()[0]: float(line.split()[1]) for line in text.splitlines()
             if line.startswith(("weights", "optimizer"))}
    assert math.isclose(sizes["weights"], 72_706_203_648 * 4 / 64 / GB, rel_tol=1e-3)
    assert math.isclose(sizes["optimizer"], 2 * sizes["weights"], rel_tol=1e-3)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "64")
    plan.main()
    assert capsys.readouterr().out == ""


def test_only_config_json_is_downloaded_from_the_hub(tmp_path, monkeypatch, capsys):
    import huggingface_hub

    shutil.copy(os.path.join(TINY, "config.json"), tmp_path)
    downloads = []

    def download(name, **options):
        downloads.append((name, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(sys, "argv", ["plan.py", "--model", "some/model"])
    plan.main()
    assert downloads == [("some/model", {"allow_patterns": ["config.json"]})]
    assert "peak" in capsys.readouterr().out


def test_step_time_is_work_over_speed(large):
    """Half the speed takes twice the time. With checkpointing a step needs 8 operations per parameter and token, the
    embedding excluded. tp is inside a node, the shards are in different ones."""
    def seconds(*speeds):
        text = "\n".join(plan.lines(large, cluster=Cluster(8, *speeds)))
        pattern = r"step +([\d.]+) s of computation.*\n +([\d.]+) s in a node.*?, ([\d.]+) s between"
        compute, node, network = [float(x) for x in re.search(pattern, text).groups()]
        return [compute, network, node]

    full, half = seconds(4, 3, 0.5), seconds(2, 1.5, 0.25)
    assert all(math.isclose(2 * a, b, rel_tol=1e-3) for a, b in zip(full, half))
    assert seconds(4, 1.5, 0.5) == [*full[:2], half[2]]
    assert seconds(4, 3, 0.25) == [full[0], half[1], full[2]]
    tokens, parameters = 128 * 4096 / 64, 72_706_203_648 - 152064 * 8192
    attention = 4 * 2 * 80 * 8192 * 4096 * tokens
    head = 2 * 152064 * 8192 * tokens  # the head is not recomputed
    assert math.isclose(sum(flops(large)), 8 * parameters * tokens + attention - head, rel_tol=1e-3)


@pytest.mark.parametrize("arguments, message", [
    (("--tflops", "300"), "--tflops 300.0 has no effect without --n_gpus"),
    (("--node_gb_per_second", "60"), "has no effect without --n_gpus or --ranks"),
    (("--n_gpus", "8", "--network_gb_per_second", "60"), "has no effect without --ranks"),
    (("--n_gpus", "0"), "it must be at least 1"),
    (("--n_gpus", "8", "--strategy", "megatron", "--tp", "4"), "use 1 or 2"),
    (("--n_gpus", "3", "--strategy", "megatron", "--tp", "2"), "use 1"),
])
def test_invalid_arguments_are_errors(monkeypatch, arguments, message):
    monkeypatch.setattr(sys, "argv", ["plan.py", "--model", TINY, *arguments])
    with pytest.raises(ValueError, match=re.escape(message)):
        plan.main()


@pytest.mark.parametrize("setting, cuda, tp, expected", [
    ("auto", True, 1, True), ("auto", True, 2, False), ("auto", False, 1, False), (True, False, 1, True),
    (False, True, 1, False)])
def test_compiled_blocks_keep_less(setting, cuda, tp, expected):
    """Per token and block, in bf16, 4 bytes for each column of the MLP: silu(gate) and silu(gate) * up, which are computed
    again (test_compile.py). `auto` compiles on CUDA, without tp."""
    assert forecast.is_compiled(SimpleNamespace(compile=setting, tp=tp), cuda) is expected
    model = small_model(num_hidden_layers=3)
    eager, compiled = (
        planned_run(model, 20, checkpointed_blocks=0, cuda=True, bf16=True, compiled=compiled) for compiled in (False, True))
    assert forecast.kept_bytes(eager) - forecast.kept_bytes(compiled) == 3 * 20 * 4 * model.config.intermediate_size
