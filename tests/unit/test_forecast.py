"""ops/forecast.py and tools/plan.py: bytes against those of autograd, of a run's tensors and of real collectives; laws,
what `auto` chooses, and errors."""

import dataclasses
import gc
import json
import math
import os
import re
import shutil
import sys

import pytest
import torch
from helpers import TINY, model_loss, program, small_model, two_layers

import fsdp
import sft
from disk import checkpoint
from families.config import ModelConfig
from ops import forecast, memory
from ranks import processes
from settings.parser import parse
from tools import plan

GB = 2**30


def planned_run(model, length, **settings):
    parameters = tuple((n, tuple(p.shape), p.element_size(), p.requires_grad) for n, p in model.named_parameters())
    return forecast.PlannedRun(model.config, parameters, length, **settings)


def kept_bytes(model, lengths):
    """Bytes of all tensors that autograd keeps for a forward pass, except parameters; each storage once."""
    parameters, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage  # a reference, so that its address is not reused
        return tensor

    tokens = torch.arange(sum(lengths)) % model.config.vocab_size
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model_loss(model, tokens, lengths, tokens)
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
    (), ("--optimizer_offload",), ("--use_lora",), ("--use_lora", "--quantize", "nf4", "--optimizer_offload"),
    ("--use_lora", "--lora_modules_to_save", "embed_tokens"), ("--param_offload",), ("--dtype", "bf16"),
    ("--dtype", "bf16", "--optimizer_offload"),
])
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
    train(*flags, "--max_steps", 1, "--max_length", 64, "--batch_size", 1)
    assert forecast.states(planned_by(monkeypatch, "--model", TINY, *flags)) == sizes


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


@pytest.mark.parametrize("flags", [
    (), ("--no-gradient_checkpointing",), ("--batch_size", "2"), ("--optimizer_offload",), ("--param_offload",),
    ("--use_lora",), ("--use_lora", "--param_offload"), ("--max_length", "32"),
    ("--max_length", "32", "--param_offload")])
def test_the_peak_is_within_5_percent_of_the_allocators(train, tmp_path, monkeypatch, flags):
    """The planned peak against the most memory that torch had allocated during three steps, by its own count."""
    monkeypatch.setattr(checkpoint, "save", lambda *args, **kwargs: None)
    monkeypatch.setattr(checkpoint, "prune", lambda *args: None)
    length, model = 1024 if "--use_lora" in flags else 256, TINY  # with 256, LoRA's peak would be in loading
    if "--max_length" in flags:  # few tokens, a large vocabulary: the peak is the embedding's gradient
        length, model = 32, two_layers(tmp_path, vocab_size=16384)
    rows = [{"prompt": "Go on.", "response": "the " * length}] * 6
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    batch_size = () if "--batch_size" in flags else ("--batch_size", 1)
    arguments = ("--train_data", tmp_path / "rows.json", "--max_length", length, *batch_size, *flags)
    monkeypatch.setattr(memory, "tune_malloc", lambda **kwargs: None)
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        steps = train(*arguments, "--max_steps", 3, model=model)
    assert [step["tokens"] for step in steps] == [512 if "--batch_size" in flags else length] * 3
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    events = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    sizes = [e["args"]["Total Allocated"] for e in events]
    peak = max(sizes) - sizes[0]  # tensors of other tests may exist already
    planned = forecast.memory(planned_by(monkeypatch, "--model", model, *arguments))
    assert math.isclose(planned["device"] - planned["slack"], peak, rel_tol=0.05), (planned, peak)


@pytest.mark.full
def test_collectives_equal_those_of_four_ranks():
    """dp 2 × tp 2, two micro-batches, full with and without checkpointing, and LoRA: calls and bytes of each kind, and
    the bytes that rank 0 holds."""
    result = program("collective_bytes", ranks=4)
    assert result.returncode == 0, result.stderr[-2000:]
    for counted, planned, held, planned_states in json.loads(re.search(r"RESULT (.*)", result.stdout)[1]):
        assert counted == planned
        assert held == planned_states


QWEN_72B = dict(model_type="qwen2", hidden_size=8192, intermediate_size=29568, num_hidden_layers=80, vocab_size=152064,
                num_attention_heads=64, num_key_value_heads=8, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def large():
    with torch.device("meta"):
        model = sft.CausalLM(ModelConfig.from_dict(QWEN_72B))
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
    assert grows([device(checkpointed_blocks=n) for n in (80, 79, 40, 1, 0)])
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


def test_plan_starts_nothing(tmp_path, monkeypatch, capsys):
    """A directory with config.json is enough: no tokenizer, weights or data are read and nothing is written; of several
    processes only rank 0 prints."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN_72B))
    monkeypatch.chdir(tmp_path)
    arguments = ["--model", ".", "--train_data", "none.json", "--n_gpus", "64", "--tp", "8", "--memory_gb", "80"]
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
    embedding excluded."""
    def seconds(*speeds):
        tflops, gb, tp_gb = speeds
        text = "\n".join(plan.lines(large, tflops=tflops, gb_per_second=gb, tp_gb_per_second=tp_gb))
        pattern = r"step +([\d.]+) s of computation.*\n +([\d.]+) s of dp.*?, ([\d.]+) s of tp"
        return [float(x) for x in re.search(pattern, text).groups()]

    full, half = seconds(4, 0.5, 3), seconds(2, 0.25, 1.5)
    assert all(math.isclose(2 * a, b, rel_tol=1e-3) for a, b in zip(full, half))
    assert seconds(4, 0.5, 1.5) == [*full[:2], half[2]]
    assert seconds(4, 0.25, 3) == [full[0], half[1], full[2]]
    tokens, parameters = 128 * 4096 / 64, 72_706_203_648 - 152064 * 8192
    attention = 4 * 2 * 80 * 8192 * 4096 * tokens
    head = 2 * 152064 * 8192 * tokens  # the head is not recomputed
    assert math.isclose(plan.flops(large), 8 * parameters * tokens + attention - head, rel_tol=1e-3)


@pytest.mark.parametrize("arguments, message", [
    (("--tflops", "300"), "--tflops 300.0 has no effect without --n_gpus"),
    (("--gb_per_second", "60"), "has no effect without --n_gpus"),
    (("--n_gpus", "8", "--tp_gb_per_second", "60"), "has no effect without --tp"),
    (("--n_gpus", "0"), "it must be at least 1"),
    (("--n_gpus", "8", "--strategy", "megatron", "--tp", "4"), "use 1 or 2"),
    (("--n_gpus", "3", "--strategy", "megatron", "--tp", "2"), "use 1"),
])
def test_invalid_arguments_are_errors(monkeypatch, arguments, message):
    monkeypatch.setattr(sys, "argv", ["plan.py", "--model", TINY, *arguments])
    with pytest.raises(ValueError, match=re.escape(message)):
        plan.main()
