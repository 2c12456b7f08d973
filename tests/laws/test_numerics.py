"""Numerical faults: losses that are not finite, spikes, updates too small to matter. And bitwise reproducibility."""

import json
import os
import re
import statistics
import subprocess
import sys

import pytest
import torch
from helpers import EXAMPLES, ROOT, TINY, launch_all, metrics, run_all, tensors_of
from programs import non_finite
from safetensors.torch import load_file

import data
import sft
from disk import checkpoint, run
from model import CausalLM
from text.template import ChatTokenizer
from tools import selfcheck

FAST = ("--batch_size", 8, "--max_length", 128, "--lr", "1e-3", "--no-gradient_checkpointing",
        "--scheduler", "constant", "--warmup_ratio", 0)
LATEST = os.path.join("out", "checkpoints", "latest")


@pytest.fixture(scope="module")
def rows():
    """The example set, tokenised as in the runs of this file."""
    return data.load(EXAMPLES, ChatTokenizer(TINY), 128)


def conversation(rows, step, index):
    """(source, input tokens) of one conversation of a step; a planted fault recognises it by its tokens."""
    i = data.Sampler(rows.n_inputs, epochs=3, seed=42, batch_size=8).step(step).ids[index]
    return rows.source(i), rows.tokens[rows.starts[i] : rows.starts[i] + rows.n_inputs[i]].tolist()


@pytest.fixture
def plant(monkeypatch):
    """programs.non_finite.plant; CausalLM.forward, which it replaces, is restored after the test."""
    monkeypatch.setattr(CausalLM, "forward", CausalLM.forward)
    return non_finite.plant


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_fault_in_one_micro_batch_stops_before_the_update(train, plant, rows, tmp_path, how, lora):
    """The error names step, rank, micro-batch and conversations: the one whose loss is not finite, or all of the
    micro-batch if only the gradient is not."""
    source, tokens = conversation(rows, 3, 5)
    plant(tokens, how)
    with pytest.raises(FloatingPointError, match=r"step 3: loss .* before the weights were updated. rank 0, ") as info:
        train(*FAST, "--micro_batch_size", 4, "--max_steps", 5, "--save_steps", 1, *(["--use_lora"] if lora else []))
    number, conversations = re.search(r"micro-batch (\d+); conversations: (.*)", str(info.value)).groups()
    ids = data.Sampler(rows.n_inputs, epochs=3, seed=42, batch_size=8).step(3).ids
    batch = list(data.micro_batches(rows, ids, 4 * 128))[int(number) - 1]
    assert conversations.split(", ") == ([source] if how == "loss" else [rows.source(i) for i in batch.ids])
    assert source in conversations
    assert 1 < len(batch.ids) < len(ids)
    assert checkpoint.steps_in(tmp_path / "out" / "checkpoints") == [1, 2]
    assert len(metrics(tmp_path / "out")) == 2


@pytest.mark.parametrize("how", [pytest.param("loss", marks=pytest.mark.full), "gradient"])
def test_a_fault_on_one_rank_stops_both(rows, tmp_path, how):
    """What is printed names the faulty rank."""
    ids = data.Sampler(rows.n_inputs, epochs=3, seed=42, batch_size=8).step(2).ids
    batch = list(data.micro_batches(rows, ids, 128, dp_rank=1, dp_size=2))[0]
    i = batch.ids[0]
    tokens = rows.tokens[rows.starts[i] : rows.starts[i] + rows.n_inputs[i]].tolist()
    (tmp_path / "tokens.json").write_text(json.dumps(tokens))
    command = "non_finite", "tokens.json", how, "--model", TINY, "--train_data", EXAMPLES, *FAST, "--max_steps", 3
    result = launch_all([(2, (*command, "--output_dir", "out"))], tmp_path)
    assert result.returncode
    named = [rows.source(i)] if how == "loss" else [rows.source(i) for i in batch.ids]
    message = f"rank 1, micro-batch 1; conversations: {', '.join(named)}"
    lines = [line for line in result.stderr.splitlines() if "stopped before the weights were updated" in line]
    assert lines, result.stderr
    assert all(line.endswith(message) for line in lines)
    assert not os.listdir(tmp_path / "out" / "checkpoints")


def test_the_spike_guard_skips_a_step_and_training_continues(train, tmp_path, capsys, monkeypatch):
    """Skipped steps follow the rule, recomputed here from the logged norms. A run resumed in between is bitwise the
    same."""
    factor, norm = 1.5, sft.fsdp.grad_norm
    step = 0

    def spiked(model):
        nonlocal step
        step += 1
        return norm(model) * (4.0 if step in (10, 20) else 1.0)

    monkeypatch.setattr(sft.fsdp, "grad_norm", spiked)
    flags = (*FAST, "--max_grad_norm_factor", factor, "--save_steps", 18)
    lines = train(*flags, "--max_steps", 22)
    norms = [line["grad_norm"] for line in lines]
    expected = [len(norms[:i]) >= 16 and norm > factor * statistics.median(norms[:i]) for i, norm in enumerate(norms)]
    assert [line.get("skipped", False) for line in lines] == expected
    assert expected[19] and sum(expected) == 1
    assert re.search(r"step 20: .*gradient norm", capsys.readouterr().out)
    weights = load_file(tmp_path / LATEST / "model.safetensors")

    step = 18  # the resumed run starts with step 19
    again = train(*flags, "--max_steps", 22, "--resume_from", "out/checkpoints/step_18")
    assert [line["loss"] for line in again] == [line["loss"] for line in lines]
    resumed = load_file(tmp_path / LATEST / "model.safetensors")
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)


@pytest.mark.parametrize("flags", [(), pytest.param(("--optimizer_offload",), marks=pytest.mark.full)],
                         ids=["plain", "offload"])
def test_resume_after_a_skipped_step_is_bitwise(train, tmp_path, monkeypatch, flags):
    """Steps 18 and 20 of 22 are skipped, so the optimizer has taken 18 updates at step 20. Bias correction depends on
    the number of updates: a resume that used the step instead would continue differently."""
    norm = sft.fsdp.grad_norm
    step = 0

    def spiked(model):
        nonlocal step
        step += 1
        return norm(model) * (9.0 if step in (18, 20) else 1.0)

    monkeypatch.setattr(sft.fsdp, "grad_norm", spiked)
    flags = (*FAST, *flags, "--max_grad_norm_factor", 3, "--max_steps", 22, "--save_steps", 20)
    lines = train(*flags)
    assert [line["step"] for line in lines if line.get("skipped")] == [18, 20]
    names = ("model.safetensors", "training_state/tensors.safetensors")
    straight = [load_file(tmp_path / LATEST / name) for name in names]

    step = 20  # the resumed run starts with step 21
    again = train(*flags, "--resume_from", "out/checkpoints/step_20")
    assert [line["loss"] for line in again] == [line["loss"] for line in lines]
    for name, before in zip(names, straight):
        resumed = load_file(tmp_path / LATEST / name)
        assert all(torch.equal(resumed[n], before[n]) for n in before), name


def test_a_skipped_step_changes_nothing(train, tmp_path, monkeypatch):
    """Neither weights nor moments change in steps 17 and 18, which are skipped; they do change in step 16."""
    monkeypatch.setattr(run.statistics, "median", lambda norms: 0.0)
    train(*FAST, "--batch_size", 2, "--max_steps", 18, "--max_grad_norm_factor", 1, "--save_steps", 1,
          "--keep_checkpoints", "all")
    for name in ("model.safetensors", "training_state/tensors.safetensors"):
        step_15, step_16, step_18 = (
            load_file(tmp_path / "out" / "checkpoints" / f"step_{step}" / name) for step in (15, 16, 18))
        assert all(torch.equal(step_16[n], step_18[n]) for n in step_16)
        assert not all(torch.equal(step_16[n], step_15[n]) for n in step_16)


@pytest.mark.parametrize("flags, low, high", [
    ((), 0.9, 1.0), *(pytest.param(*case, marks=pytest.mark.full) for case in (
        (("--use_lora",), 0.3, 1.0), (("--optimizer_offload",), 0.9, 1.0)))])
def test_the_fraction_of_changed_weights_is_logged(train, capsys, flags, low, high):
    """In steps 1, 11, ...: the fraction of all trained weights that the update changed."""
    lines = train(*FAST, *flags, "--max_steps", 12)
    assert [line["step"] for line in lines if "changed" in line] == [1, 11]
    assert all(low <= lines[i]["changed"] <= high for i in (0, 10))
    assert "warning: step" not in capsys.readouterr().out


def warned(capsys):
    return re.findall(r"warning: step (\d+) changed 0\.\d\d% of the weights", capsys.readouterr().out)


def test_updates_that_change_no_weight_are_warned_about_once(train, capsys):
    """At a rate of 1e-13 no fp32 weight of this size changes. No warning if only the end of the schedule is small."""
    lines = train("--max_steps", 12, *FAST, "--batch_size", 2, "--lr", "1e-13", "--weight_decay", 0)
    assert max(lines[i]["changed"] for i in (0, 10)) < 0.01
    assert warned(capsys) == ["1"]
    lines = train("--max_steps", 21, *FAST, "--batch_size", 2, "--scheduler", "cosine", "--lr", "1e-9",
                  "--weight_decay", 0, out="other")
    assert lines[20]["changed"] < 0.01
    assert warned(capsys) == []


def test_adapters_without_a_gradient_are_warned_about(train, capsys, monkeypatch):
    """In case they lose it after the check of the first step, which is disabled here."""
    monkeypatch.setattr(selfcheck, "check_adapters", lambda *_: None)
    monkeypatch.setattr(sft.fsdp, "grad_norm", lambda model: sum(
        p.grad.zero_().sum() for p in model.parameters() if p.requires_grad))
    lines = train("--max_steps", 1, *FAST, "--use_lora", "--weight_decay", 0)
    assert lines[0]["changed"] == 0.0
    assert warned(capsys) == ["1"]


def flattened(tensors):
    return torch.cat([t.flatten() for _, t in sorted(tensors.items())])


@pytest.mark.parametrize("flags", [(), ("--use_lora", "--lora_dropout", 0.1), ("--deterministic",)],
                         ids=["full", "lora", "deterministic"])
def test_two_equal_runs_are_bitwise_equal(train, tmp_path, monkeypatch, flags):
    """Metrics and weights. --deterministic forbids operations whose result varies on CUDA."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    runs = []
    try:
        for out in ("a", "b"):
            lines = train(*FAST, *flags, "--max_steps", 4, "--dtype", "fp32", out=out)
            (weights,) = (tmp_path / out / "checkpoints" / "latest").glob("*model.safetensors")
            numbers = [{k: v for k, v in line.items() if k in ("loss", "grad_norm", "changed")} for line in lines]
            runs.append((numbers, flattened(load_file(weights))))
        assert runs[0][0] == runs[1][0]
        assert torch.equal(runs[0][1], runs[1][1])
        is_on = "--deterministic" in flags
        assert torch.are_deterministic_algorithms_enabled() == is_on
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == (":4096:8" if is_on else "")
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.full  # without --full, tests/laws/test_signals.py compares two ranks bitwise
def test_two_equal_runs_of_two_ranks_are_bitwise_equal(tmp_path):
    """Whatever the order in which their messages arrive."""
    flags = ("--model", TINY, "--train_data", EXAMPLES, *FAST, "--max_steps", 4, "--output_dir")
    run_all([(2, (*flags, tmp_path / out)) for out in "ab"], tmp_path)
    assert torch.equal(*(flattened(tensors_of(tmp_path / out / "checkpoints" / "latest")) for out in "ab"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA, where sums have no fixed order by default")
def test_deterministic_on_cuda(train, tmp_path):
    """With --deterministic two equal runs are bitwise equal on CUDA too."""
    test_two_equal_runs_are_bitwise_equal(train, tmp_path, pytest.MonkeyPatch(), ("--deterministic",))


@pytest.mark.full
@pytest.mark.parametrize("steps", [200, 20000])
def test_a_long_run_leaves_nothing_behind(steps):
    """tests/hostile/long_run.py; the longer run takes five minutes."""
    subprocess.run([sys.executable, f"{ROOT}/tests/hostile/long_run.py", "--steps", str(steps)], check=True,
                   capture_output=True, timeout=1200)
