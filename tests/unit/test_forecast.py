"""tools/plan.py: bytes that autograd keeps, tensors of a run, collectives of ranks, each counted apart; laws and errors."""

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
from ops import memory
from ranks import processes
from settings.parser import parse
from tools import plan

GB = 2**30


def layout_of(model, length, **settings):
    shapes = tuple((n, tuple(p.shape), p.element_size(), p.requires_grad) for n, p in model.named_parameters())
    return plan.Layout(model.config, shapes, length, **settings)


def kept_bytes(model, lengths):
    """Bytes of all tensors that autograd keeps of a forward pass, parameters apart; each storage once."""
    parameters, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage  # held, so that no other takes its place
        return tensor

    tokens = torch.arange(sum(lengths)) % model.config.vocab_size
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model_loss(model, tokens, lengths, tokens)
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


MODELS = {
    "full": {}, "untied": dict(tie_word_embeddings=False), "qwen3": dict(model_type="qwen3"),
    "lora": dict(use_lora=True),
    "lora qwen3": dict(use_lora=True, model_type="qwen3"), "dropout": dict(use_lora=True, adapter=dict(lora_dropout=0.1)),
    "dora": dict(use_lora=True, adapter=dict(lora_dora=True)), "nf4": dict(use_lora=True, quantize=True),
    "embedding": dict(use_lora=True, adapter=dict(lora_modules_to_save="embed_tokens")), "attention": dict(use_lora=True, adapter=dict(lora_targets="q_proj,v_proj")),
}


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_activations_to_the_byte(name, checkpointing, micro):
    """What is kept of the blocks, beside the last norm's, the angles, and the ids of tokens and targets."""
    model = small_model(**MODELS[name])
    model.model.gradient_checkpointing = checkpointing
    dropout = MODELS[name].get("adapter", {}).get("lora_dropout", 0.0)
    layout = layout_of(model, 20, micro=micro, checkpointing=checkpointing, dropout=dropout)
    N, row = 20 * micro, 20 * micro * model.config.hidden_size * 4
    kept, one = plan.activations(layout)
    if checkpointing:  # the block at work is run in backward; here it is its input
        kept += row - one
    is_full, trains_embedding = "use_lora" not in MODELS[name], model.model.embed_tokens.weight.requires_grad
    other = row * (1 + is_full) + 4 * N + 4 * N * model.config.head_dim + 8 * N * (1 + trains_embedding)
    assert kept_bytes(model, (20,) * micro) == kept + other


@pytest.mark.parametrize("flags", [
    (), ("--optimizer_offload",), ("--use_lora",), ("--use_lora", "--quantize", "nf4", "--optimizer_offload"),
    ("--use_lora", "--lora_modules_to_save", "embed_tokens"), ("--param_offload",), ("--dtype", "bf16"),
    ("--dtype", "bf16", "--optimizer_offload"),
])
def test_states_are_a_runs_tensors(train, monkeypatch, flags):
    """Weights, gradients, moments and masters of a run of tiny, to the byte."""
    found, save, norm = {}, checkpoint.save, fsdp.grad_norm

    def size(tensors):
        return sum(memory.local(t).numel() * t.element_size() for t in tensors)

    def counted_norm(model):
        found["gradients"] = size(p.grad for p in model.parameters() if p.requires_grad)
        return norm(model)

    def counted_save(root, step, *, model, optimizer, **rest):
        found.update(weights=size(model.parameters()), masters=size(getattr(optimizer, "masters", {}).values()),
                     moments=size(s[name] for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")))
        return save(root, step, model=model, optimizer=optimizer, **rest)

    monkeypatch.setattr(fsdp, "grad_norm", counted_norm)
    monkeypatch.setattr(checkpoint, "save", counted_save)
    planned, lines = [], plan.lines
    monkeypatch.setattr(plan, "lines", lambda layout, **rest: planned.append(layout) or lines(layout, **rest))
    train(*flags, "--max_steps", 1, "--max_length", 64, "--batch_size", 1)
    plan.plan(parse(plan.Config, ["--model", TINY, *flags])[0])
    assert plan.states(planned[0]) == found


@pytest.mark.parametrize("flags", [
    (), ("--no-gradient_checkpointing",), ("--batch_size", "2"), ("--optimizer_offload",), ("--param_offload",),
    ("--use_lora",), ("--use_lora", "--param_offload"), ("--max_length", "32"),
    ("--max_length", "32", "--param_offload")])
def test_peak_is_the_allocators(train, tmp_path, monkeypatch, flags):
    """Of a few steps, within 5 %: the most that torch had allocated, by its own count."""
    monkeypatch.setattr(checkpoint, "save", lambda *words, **settings: None)
    monkeypatch.setattr(checkpoint, "prune", lambda *arguments: None)
    length, model = 1024 if "--use_lora" in flags else 256, TINY  # else its peak is in loading
    if "--max_length" in flags:  # few tokens, many words: the embedding's gradient is the peak
        length, model = 32, two_layers(tmp_path, vocab_size=16384)
    rows = [{"prompt": "Go on.", "response": "the " * length}] * 6
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    words = ("--train_data", tmp_path / "rows.json", "--max_length", length, *(flags if "--batch_size" in flags else (
        "--batch_size", 1, *flags)))
    monkeypatch.setattr(memory, "tune_malloc", lambda **how: None)
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        steps = train(*words, "--max_steps", 3, model=model)
    assert [step["tokens"] for step in steps] == [512 if "--batch_size" in flags else length] * 3
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    events = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    sizes = [e["args"]["Total Allocated"] for e in events]
    peak = max(sizes) - sizes[0]  # other tests' tensors may be there
    planned = []
    monkeypatch.setattr(plan, "lines", lambda layout, **rest: planned.append(layout) or ())
    plan.plan(parse(plan.Config, ["--model", str(model), *map(str, words)])[0])
    found = plan.memory(planned[0])
    assert math.isclose(found["device"] - found["slack"], peak, rel_tol=0.05), (found, peak)


@pytest.mark.full
def test_collectives_are_what_ranks_do():
    """dp 2 × tp 2, two micro-batches, full with and without checkpointing and LoRA: calls and bytes of each kind, and
    what rank 0 holds."""
    result = program("collective_bytes", ranks=4)
    assert result.returncode == 0, result.stderr[-2000:]
    for counted, planned, held, states in json.loads(re.search(r"RESULT (.*)", result.stdout)[1]):
        assert counted == planned
        assert held == states


QWEN_72B = dict(model_type="qwen2", hidden_size=8192, intermediate_size=29568, num_hidden_layers=80, vocab_size=152064,
                num_attention_heads=64, num_key_value_heads=8, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def large():
    with torch.device("meta"):
        model = sft.CausalLM(ModelConfig.from_dict(QWEN_72B))
    return layout_of(model, 4096, batch=128, ranks=64, tp=8, bf16=True, cuda=True)


def test_more_of_anything_is_not_less(large):
    """Memory grows with the micro-batch and its length, falls with more ranks, checkpointing and offload."""
    def device(**changes):
        return plan.memory(dataclasses.replace(large, **changes))["device"]

    def grows(values):
        return all(a < b for a, b in zip(values, values[1:]))

    assert grows([device(micro=n, batch=256) for n in (1, 2, 3, 4)])
    assert grows([device(length=n) for n in (128, 4096, 8192)])
    assert grows([device(ranks=n, batch=4 * n) for n in (512, 256, 64, 8)])
    assert grows([device(), device(checkpointing=False)]) and grows([device(param_offload=True), device()])
    assert grows([device(optimizer_offload=True), device()])
    assert grows([device(batch=8), device(batch=9)])  # the gradient is held from the second micro-batch on


@pytest.mark.parametrize("checkpointing", [False, True])
def test_largest_micro_batch_fits_and_one_more_does_not(large, checkpointing):
    """Where the gradient is held between two of them, and alone, which leaves more room."""
    layout, found = dataclasses.replace(large, length=512, checkpointing=checkpointing), []
    for several in (True, False):
        found.append(plan.largest_micro(layout, 80 * GB, several))
        sizes = [plan.memory(dataclasses.replace(layout, micro=n, batch=n * layout.dp * (1 + several)))["device"]
                 for n in (found[-1], found[-1] + 1)]
        assert sizes[0] <= 80 * GB < sizes[1]
    assert 1 < found[0] < found[1] and plan.largest_micro(layout, 1 * GB) == 0


def test_plan_starts_nothing(tmp_path, monkeypatch, capsys):
    """From a directory with config.json alone: no tokenizer, weights or data are looked for, no folder is made; of
    several processes rank 0 prints."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN_72B))
    monkeypatch.chdir(tmp_path)
    words = ["plan.py", "--model", ".", "--train_data", "none.json", "--n_gpus", "64", "--tp", "8", "--memory_gb", "80"]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(processes, "start", None)
    plan.main()
    text = capsys.readouterr().out
    assert "dp 8 × tp 8" in text and os.listdir() == ["config.json"]
    sizes = {line.split()[0]: float(line.split()[1]) for line in text.splitlines()
             if line.startswith(("weights", "optimizer"))}
    assert math.isclose(sizes["weights"], 72_706_203_648 * 4 / 64 / GB, rel_tol=1e-3)
    assert math.isclose(sizes["optimizer"], 2 * sizes["weights"], rel_tol=1e-3)
    monkeypatch.setenv("RANK", "1")
    plan.main()
    assert capsys.readouterr().out == ""


def test_of_the_hub_it_reads_the_configuration_alone(tmp_path, monkeypatch, capsys):
    """A directory without weights or tokenizer will do; nothing else is asked for."""
    import huggingface_hub

    shutil.copy(os.path.join(TINY, "config.json"), tmp_path)
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **how: (asked.append((name, how)),
                                                                                   str(tmp_path))[1])
    monkeypatch.setattr(sys, "argv", ["plan.py", "--model", "some/model"])
    plan.main()
    assert asked == [("some/model", {"allow_patterns": ["config.json"]})] and "peak" in capsys.readouterr().out


def test_step_time_is_work_over_speed(large):
    """Half the speeds, twice the time; 72B at full speed: 8 operations a parameter and token, embeddings apart."""
    def seconds(*speeds):
        tflops, gb, tp_gb = speeds
        text = "\n".join(plan.lines(large, tflops=tflops, gb_per_second=gb, tp_gb_per_second=tp_gb))
        pattern = r"step +([\d.]+) s .*?, ([\d.]+) s of dp.*?, ([\d.]+) s of tp"
        return [float(x) for x in re.search(pattern, text).groups()]

    whole, half = seconds(4, 0.5, 3), seconds(2, 0.25, 1.5)
    assert all(math.isclose(2 * a, b, rel_tol=1e-3) for a, b in zip(whole, half))
    assert seconds(4, 0.5, 1.5) == [*whole[:2], half[2]] and seconds(4, 0.25, 3) == [whole[0], half[1], whole[2]]
    tokens, parameters = 128 * 4096 / 64, 72_706_203_648 - 152064 * 8192
    attention = 4 * 2 * 80 * 8192 * 4096 * tokens
    head = 2 * 152064 * 8192 * tokens  # which is not run again
    assert math.isclose(plan.flops(large), 8 * parameters * tokens + attention - head, rel_tol=1e-3)


@pytest.mark.parametrize("words, message", [
    (("--tflops", "300"), "--tflops 300.0 does nothing without --n_gpus"),
    (("--gb_per_second", "60"), "does nothing without --n_gpus"),
    (("--n_gpus", "8", "--tp_gb_per_second", "60"), "does nothing without --tp"),
    (("--n_gpus", "0"), "it must be at least 1"),
    (("--n_gpus", "8", "--strategy", "megatron", "--tp", "4"), "these do: [1, 2]"),
    (("--n_gpus", "3", "--strategy", "megatron", "--tp", "2"), "these do: [1]"),
])
def test_what_can_not_be_planned_is_an_error(monkeypatch, words, message):
    monkeypatch.setattr(sys, "argv", ["plan.py", "--model", TINY, *words])
    with pytest.raises(ValueError, match=re.escape(message)):
        plan.main()
