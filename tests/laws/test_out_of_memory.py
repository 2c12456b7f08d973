"""Memory that runs out ends a run with a few lines: where, how much, what would help, how to continue. Not a traceback."""

import dataclasses
import json
import os
import re
import time

import pytest
import torch
from helpers import EXAMPLES, TINY, VALIDATION, launch_all, program
from programs.planted_out_of_memory import plant

import sft
from disk import checkpoint
from disk.run import ModelPaths
from ops import forecast
from screen import out_of_memory
from ranks import processes
from settings.errors import OutOfMemory

FLAGS = ("--model", TINY, "--train_data", EXAMPLES, "--cache_dir", "none", "--max_length", 256, "--batch_size", 8,
         "--micro_batch_size", 4, "--no-gradient_checkpointing", "--max_steps", 4, "--output_dir", "out")
SAVING = ("--save_steps", 1)
PHASES = {"forward": "step 2", "backward": "step 2", "optimizer": "step 2", "load": "load", "data": "tokenise",
          "evaluation": "evaluation after step 2"}


def planted(directory, where, error, *flags, rank=0, ranks=None):
    """Standard error of a program with an error planted there; it exits with code 1."""
    result = program("planted_out_of_memory", where, error, rank, *FLAGS, *flags, cwd=directory, ranks=ranks)
    assert result.returncode == 1, result.stderr
    return result.stderr


@pytest.fixture
def lines(train, monkeypatch):
    """A function: the lines of the message of a run in this process, with an error planted there."""

    def run(where, error, *flags):
        with monkeypatch.context() as patch:
            plant(where, error, put=patch.setattr)
            with pytest.raises(OutOfMemory) as caught:
                train(*FLAGS, *flags)
        return str(caught.value).splitlines()

    return run


def planned_run():
    """The forecast.PlannedRun of FLAGS."""
    cfg = sft.Config(max_length=256, batch_size=8, micro_batch_size=4, gradient_checkpointing=False)
    model, _ = sft.build(cfg, ModelPaths.find(TINY), processes.single_process(torch.device("meta")))
    return forecast.PlannedRun.of(model, cfg, world_size=1, cuda=False)


@pytest.mark.parametrize("where, error, size", [
    ("forward", "device", "2.00 GiB"), ("backward", "device", "2.00 GiB"), ("backward", "allocator", "262144.00 GiB"),
    ("optimizer", "host", "3.50 GiB"), ("evaluation", "device", "2.00 GiB")])
def test_it_says_where_and_how_to_continue(where, error, size, lines):
    """Phase, line of the code, micro-batch, sizes, and the checkpoint to continue from, in at most 100 columns."""
    validation = ("--val_data", VALIDATION, "--eval_steps", 1) if where == "evaluation" else ()
    lines = lines(where, error, *SAVING, *validation)
    assert lines[0] == f"out of memory: rank 0 has used up the host memory in {PHASES[where]}"
    assert re.fullmatch(r"  at           \S+\.py:\d+ .+", lines[1])
    if where == "optimizer":  # all micro-batches are done
        assert "micro-batch" not in lines[2]
    else:
        found = re.fullmatch(r"  micro-batch  (\d+) conversations, ([\d,]+) tokens, the longest (\d+)", lines.pop(2))
        conversations, tokens, longest = (int(text.replace(",", "")) for text in found.groups())
        assert 1 <= conversations <= 8 and longest <= 256 and longest <= tokens <= 4 * 256
    planned = forecast.memory(planned_run())["device"] / forecast.GB
    pattern = rf"  memory       tried to allocate {size}; peak [\d.]+ of [\d.]+ GiB; the forecast was {planned:.2f} GiB"
    assert re.fullmatch(pattern, lines[2]), lines[2]
    assert lines[3] == "  These settings would save, by the forecast:"
    assert lines[-1] == "  To continue after step 1: the same command with --micro_batch_size 2 --resume_from auto"
    assert max(map(len, lines)) <= 100 and len(lines) < 14


def test_a_program_prints_the_message_and_nothing_else(tmp_path):
    """No traceback; exit code 1."""
    lines = planted(tmp_path, "backward", "allocator", *SAVING).splitlines()
    assert lines[0] == "sft.py: error: out of memory: rank 0 has used up the host memory in step 2"
    assert lines[-1].startswith("  To continue after step 1: ")
    assert all(line.startswith("  ") for line in lines[1:]) and len(lines) < 14


def test_the_settings_are_those_that_apply_with_what_they_save(lines):
    """The largest first, each with the difference of two forecasts. A full run on the CPU: no offload, no more ranks. What
    a resumed run may not change is marked."""
    lines = lines("forward", "device", *SAVING)
    listed = [re.fullmatch(r"    (--.*?) +([\d.]+) GiB(   in a new run, with another --output_dir)?", line)
              for line in lines[5:-1]]
    run = planned_run()
    changed = {
        "--micro_batch_size 2": dataclasses.replace(run, micro_batch_size=2),
        "--gradient_checkpointing true": dataclasses.replace(run, checkpointed_blocks=4),
        "--max_length 128": dataclasses.replace(run, length=128),
        "--use_lora": forecast.with_lora(run), "--use_lora --quantize nf4": forecast.with_lora(run, quantize=True)}
    assert {match[1] for match in listed} == set(changed)
    now, sizes = forecast.memory(run)["device"], []
    for flags, size, mark in (match.groups() for match in listed):
        saved = (now - forecast.memory(changed[flags])["device"]) / forecast.GB
        assert size == f"{saved:.2f}"
        assert bool(mark) == flags.startswith(("--max_length", "--use_lora"))
        sizes.append(saved)
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("where", ["load", "data"])
def test_before_the_first_step_nothing_is_saved(where, lines):
    """While data is read the model is not known yet."""
    lines = lines(where, "host")
    assert f"in {PHASES[where]}" in lines[0] and "micro-batch" not in "".join(lines)
    last = "  The model was not loaded yet: free memory on this host, or train on less data at a time"
    if where == "load":
        last = "  Nothing was saved yet. To start again: the same command with --micro_batch_size 2"
    assert lines[-1] == last


@pytest.mark.parametrize("where, rank", [("backward", 1), ("optimizer", 0)])
@pytest.mark.full
def test_one_of_two_ranks(where, rank, tmp_path):
    """The message comes once, from that rank; the other ends at once, without a word."""
    started = time.monotonic()
    text = planted(tmp_path, where, "device", *SAVING, "--timeout", 100, rank=rank, ranks=2)
    assert time.monotonic() - started < 90  # it does not wait for --timeout
    assert text.count("out of memory:") == 1 and f"out of memory: rank {rank} has" in text
    assert re.search(rf"traceback : .*rank {rank} .* memory ran out; the screen of that node says", text)
    assert text.count("--resume_from auto") == 1
    for noise in "did not respond", "OutOfMemory:", "[rank":
        assert noise not in text, text
    assert text.count("Traceback") == 1 and "ChildFailedError" in text  # torchrun's own; ranks/launch.py prints none


def test_another_runtime_error_stays_what_it_is(train, monkeypatch):
    """Even if its text has the word memory."""
    plant("forward", "other", put=monkeypatch.setattr)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train(*FLAGS)


def test_the_same_command_with_a_shorter_max_length_works_afterwards(tmp_path, train, lines):
    """A directory without a checkpoint is no run, although metrics.jsonl has a step."""
    assert lines("evaluation", "device", "--val_data", VALIDATION, "--eval_steps", 1)[-1].startswith("  Nothing was saved")
    assert (tmp_path / "out" / "metrics.jsonl").read_text()
    assert os.listdir(tmp_path / "out" / "checkpoints") == []
    lines = train("--max_length", 128, "--max_steps", 2)
    assert [line["step"] for line in lines] == [1, 2]


# ---- auto: chosen once per run ----------------------------------------------------------------------------------------

AUTO = ("--micro_batch_size", "auto", "--gradient_checkpointing", "auto", "--max_length", 256, "--batch_size", 8,
        "--lr", "1e-3")


def chosen(directory, step):
    with open(directory / "checkpoints" / f"step_{step}" / "training_state" / "state.json", encoding="utf-8") as f:
        return json.load(f)["chosen"]


def limited(run, monkeypatch, **changes):
    """Let the device have just the memory for this run."""
    size = forecast.memory(dataclasses.replace(run, **changes))["device"]
    monkeypatch.setattr(forecast, "device_memory", lambda device: int(size / forecast.FILL) + 1)


def test_a_resumed_run_takes_what_was_chosen_before(train, tmp_path, monkeypatch, capsys):
    """So that it computes the same numbers, although another device would choose otherwise. A number that is given wins."""
    run = planned_run()
    limited(run, monkeypatch, micro_batch_size=8, checkpointed_blocks=3)
    straight = train(*AUTO, "--max_steps", 4, out="straight", model=TINY)
    before = chosen(tmp_path / "straight", 4)
    place = {"world_size": 1, "tp": 1, "sp": 1, "replicas": 1, "max_length": 256}
    assert before == {**place, "micro_batch_size": 8, "checkpointed_blocks": 3}
    train(*AUTO, "--max_steps", 4, "--save_steps", 2, out="resumed", model=TINY)
    for step in 3, 4:  # as if killed after step 2
        for path in (tmp_path / "resumed" / "checkpoints").glob(f"step_{step}"):
            path.rename(tmp_path / f"gone_{step}")
    (tmp_path / "resumed" / "checkpoints" / "latest").unlink()
    monkeypatch.setattr(forecast, "device_memory", lambda device: 100 * 2**30)
    capsys.readouterr()
    resumed = train(*AUTO, "--max_steps", 4, "--resume_from", "auto", out="resumed", model=TINY)
    assert "micro_batch_size 8 (2,048 tokens), 3 of 4 blocks checkpointed: forecast" in capsys.readouterr().out
    assert chosen(tmp_path / "resumed", 4) == before
    assert [line["loss"] for line in resumed] == [line["loss"] for line in straight]
    train(*AUTO, "--max_steps", 5, "--resume_from", "auto", "--micro_batch_size", 2, out="resumed", model=TINY)
    assert chosen(tmp_path / "resumed", 5) == {**place, "checkpointed_blocks": 3}


def test_what_was_chosen_but_does_not_fit_is_chosen_again(train, tmp_path, monkeypatch):
    """A resume on a device with less memory; and one with another --max_length, of which each micro-batch holds more."""
    train(*AUTO, "--max_steps", 1)
    limited(planned_run(), monkeypatch, micro_batch_size=2, checkpointed_blocks=1)
    train(*AUTO, "--max_steps", 2, "--resume_from", "auto")
    assert chosen(tmp_path / "out", 2)["micro_batch_size"] < chosen(tmp_path / "out", 1)["micro_batch_size"] == 8
    monkeypatch.undo()
    train(*AUTO, "--max_steps", 3, "--resume_from", "auto", "--max_length", 2048)
    assert chosen(tmp_path / "out", 3)["max_length"] == 2048


def test_the_model_checkpoints_as_many_blocks_as_were_chosen(train, monkeypatch):
    """And the micro-batches are of the chosen size: one for the step's eight conversations."""
    seen, save, backward = [], checkpoint.save, sft.backward

    def recorded(*args, model, **rest):
        seen.append(model.model.checkpointed_blocks)
        return save(*args, model=model, **rest)

    def counted(model, batches, *rest):
        seen.append(len(batches))
        return backward(model, batches, *rest)

    monkeypatch.setattr(checkpoint, "save", recorded)
    monkeypatch.setattr(sft, "backward", counted)
    limited(planned_run(), monkeypatch, micro_batch_size=8, checkpointed_blocks=3)
    train(*AUTO, "--max_steps", 1, model=TINY)
    assert seen == [1, 3]


def test_what_was_chosen_for_other_ranks_is_chosen_again(train, tmp_path, monkeypatch):
    """For four ranks, each with a fourth of the step."""
    train(*AUTO, "--max_steps", 1)
    state = tmp_path / "out" / "checkpoints" / "step_1" / "training_state" / "state.json"
    saved = json.loads(state.read_text())
    saved["chosen"] |= {"world_size": 4, "micro_batch_size": 2}
    monkeypatch.setattr("disk.checkpoint.verify", lambda directory: None)
    state.write_text(json.dumps(saved))
    train(*AUTO, "--max_steps", 2, "--resume_from", "auto")
    assert chosen(tmp_path / "out", 2)["micro_batch_size"] == 8
    for damage in {"micro_batch_size": 0}, {"micro_batch_size": True}, {"size": 3}, [3]:
        state.write_text(json.dumps({**saved, "chosen": damage}))
        with pytest.raises(ValueError, match="`chosen` in its state.json must be numbers"):
            train(*AUTO, "--max_steps", 2, "--resume_from", state.parent.parent)


def test_config_yaml_of_a_run_keeps_auto(train, tmp_path, capsys):
    """Another machine chooses for itself."""
    train(*AUTO, "--max_steps", 1, model=TINY)
    text = (tmp_path / "out" / "config.yaml").read_text()
    assert "micro_batch_size: auto\n" in text and "gradient_checkpointing: auto\n" in text
    assert re.search(r"^memory   micro_batch_size 8 \(2,048 tokens\), 0 of 4 blocks checkpointed: forecast "
                     r"[\d.]+ of [\d.]+ GiB$", capsys.readouterr().out, re.M)


def test_the_rank_with_the_least_memory_decides(tmp_path):
    """The minimum over ranks, here that of rank 1."""
    result = launch_all([(2, ("smallest_memory", 4, 1))], tmp_path)
    assert result.returncode == 0, result.stderr
    assert re.findall(r"RESULT (\d+)", result.stdout) == ["1", "1"]


def test_auto_that_does_not_fit_is_one_error(train, monkeypatch):
    monkeypatch.setattr(forecast, "device_memory", lambda device: 2**20)
    with pytest.raises(ValueError, match=r"this run does not fit(.|\n)*--max_length 128"):
        train(*AUTO, "--max_steps", 1)


@pytest.mark.parametrize("error, expected", [
    (torch.OutOfMemoryError("CUDA out of memory."), True), (MemoryError(), True),
    (RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
    (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), True),
    (RuntimeError("CUDA error: device-side assert triggered"), False), (RuntimeError("shapes differ"), False)])
def test_which_errors_mean_that_memory_ran_out(error, expected):
    assert out_of_memory.is_out_of_memory(error) is expected
