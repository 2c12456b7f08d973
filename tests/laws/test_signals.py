"""Signals: the current step ends, a checkpoint is saved, all ranks exit together, and the run resumes
exactly."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import EXAMPLES, ROOT, TINY, VALIDATION, program, run_all
from safetensors.torch import load_file

from ranks import processes

RUN = ("--max_steps", 6, "--batch_size", 8, "--max_length", 128, "--lr", "1e-3", "--eval_steps", 2,
       "--save_steps", 3, "--no-gradient_checkpointing", "--val_data", VALIDATION)
MODEL = ("--model", TINY, "--train_data", EXAMPLES)
TIMES = ("seconds", "tokens_per_second", "peak_memory_gb")
PHASES = ("step 1", "evaluation after step 2", "save of step 3", "step 5", "evaluation after step 6",
          "save of step 6")


def outcome(directory):
    """All that a run leaves that must not depend on how often it was stopped: its numbers, weights and
    moments."""
    with open(directory / "metrics.jsonl", encoding="utf-8") as f:
        lines = [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in f]
    latest = directory / "checkpoints" / "latest"
    names = "model.safetensors", "training_state/tensors.safetensors"
    return lines, *(load_file(latest / name) for name in names)


def assert_same(a, b):
    assert a[0] == b[0]
    for ours, theirs in zip(a[1:], b[1:]):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def merged(directory):
    """As outcome, of two ranks, whose shards lie in two files."""
    latest, parts = directory / "checkpoints" / "latest", ({}, {})
    for part, where in zip(parts, (latest, latest / "training_state")):
        for path in sorted(where.glob("*.safetensors")):
            part.update(load_file(path))
    with open(directory / "metrics.jsonl", encoding="utf-8") as f:
        return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in f], *parts


def test_stopped_in_every_phase_a_run_goes_on_exactly(train, tmp_path, monkeypatch, capfd):
    """Six times over, by each of the signals; the exit code tells which, a line tells what."""
    before = [signal.getsignal(number) for number in processes.EXIT_CODES]
    train(*RUN, out="whole")
    at = processes.Ranks.set_phase  # the phases are noted as ever, with a signal behind the one
    for i, phase in enumerate(PHASES):
        number, code = list(processes.EXIT_CODES.items())[i % 3]
        monkeypatch.setattr(processes.Ranks, "set_phase", lambda self, name, due=phase, number=number:
                            (at(self, name), os.kill(os.getpid(), number) if name == due else None))
        with pytest.raises(SystemExit) as info:
            train(*RUN, "--resume_from", "auto")
        assert info.value.code == code
        out, err = capfd.readouterr()
        assert err.count(f"{signal.Signals(number).name}: finishing this step and saving") == 1
        step = int(re.search(r"(\d+)$", phase)[1])
        assert os.readlink(tmp_path / "out" / "checkpoints" / "latest") == f"step_{step}"
        # stopped in its evaluation, even the last step is not all there is
        assert (f"stopped  after step {step} of 6; continue with --resume_from auto" in out) == (phase != PHASES[-1])
    monkeypatch.setattr(processes.Ranks, "set_phase", at)
    train(*RUN, "--resume_from", "auto")
    assert_same(outcome(tmp_path / "out"), outcome(tmp_path / "whole"))
    assert [signal.getsignal(number) for number in processes.EXIT_CODES] == before


@pytest.mark.parametrize("phase", ["tokenise", "load"])
def test_stopped_before_the_first_step_nothing_is_written(phase, train, tmp_path, monkeypatch, capfd):
    """At once. The run that was there is as it was."""
    train(*RUN[2:], "--max_steps", 1)
    files, phases = sorted(tmp_path.rglob("*")), []

    def at(self, name):
        phases.append(name)
        if name == phase:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(processes.Ranks, "set_phase", at)
    with pytest.raises(SystemExit) as info:
        train(*RUN[2:], "--max_steps", 2, "--resume_from", "auto")
    assert info.value.code == 143 and "SIGTERM: stopped before the first step" in capfd.readouterr().err
    assert phases[-1] == phase and sorted(tmp_path.rglob("*")) == files


def test_ctrl_c_twice_stops_at_once_with_one_line_each(tmp_path):
    """In a step that would take a minute."""
    result = program("slow_step", *RUN, *MODEL, "--output_dir", "out", cwd=tmp_path)
    assert result.returncode == 130 and "Traceback" not in result.stderr
    assert [line for line in result.stderr.splitlines() if line] == [
        "SIGINT: finishing this step and saving; press Ctrl-C again to quit without saving",
        "stopped without saving; progress since the last checkpoint is lost"]


def test_a_signal_to_one_rank_stops_both(tmp_path):
    """In an evaluation and in a save, to either; together again the run is the undisturbed one to the bit."""
    flags = *RUN, *MODEL, "--output_dir"
    stops = [(i, phase, list(processes.EXIT_CODES)[i + 1]) for i, phase in enumerate(PHASES[1:3])]
    planted = [("none", "none", 0, *flags, "whole")]
    planted += [(*stop, *flags, "out", "--resume_from", "auto") for stop in (*stops, ("none", "none", 0))]
    run_all([(2, ("signal_in_phase", *map(str, words))) for words in planted], tmp_path)
    for rank in range(2):
        codes = [json.loads(line) for line in (tmp_path / f"codes {rank}").read_text().splitlines()]
        assert codes == [None, *(processes.EXIT_CODES[number] for _, _, number in stops), None]
    assert_same(merged(tmp_path / "out"), merged(tmp_path / "whole"))


@pytest.mark.parametrize("number, code", [pytest.param(signal.SIGUSR1, 0, marks=pytest.mark.full),
                                          (signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130,
                                                                              marks=pytest.mark.full)])
def test_train_sh_passes_a_signal_on_and_ends_as_sft_py_does(number, code, tmp_path):
    """Over torchrun, without its traceback: both ranks save, and train.sh has the exit code."""
    words = [f"{ROOT}/train.sh", "--n_gpus", "2", "--model", "tiny", "--epochs", "10000",
             "--save_steps", "1000000", "--output_dir", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHON": sys.executable}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
                          start_new_session=True) as process:
        metrics, limit = tmp_path / "out" / "metrics.jsonl", time.monotonic() + 60
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < limit:
            time.sleep(0.1)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in err
    step = int(re.search(r"stopped  after step (\d+) of", out)[1])
    assert os.readlink(tmp_path / "out" / "checkpoints" / "latest") == f"step_{step}"
