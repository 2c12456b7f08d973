"""Signals: the current step ends, a checkpoint is saved, all ranks exit together, and the run resumes exactly."""

import contextlib
import json
import os
import re
import signal
import socket
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
    """(lines of metrics.jsonl, weights, moments) of a run: they must not depend on how often it was stopped."""
    with open(directory / "metrics.jsonl", encoding="utf-8") as f:
        lines = [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in f]
    latest = directory / "checkpoints" / "latest"
    names = "model.safetensors", "training_state/tensors.safetensors"
    return lines, *(load_file(latest / name) for name in names)


def assert_same(a, b):
    assert a[0] == b[0]
    for tensors, others in zip(a[1:], b[1:]):
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensors[name], others[name]) for name in tensors)


def merged(directory):
    """As outcome(), of a run of two ranks, whose shards are in two files."""
    latest, tensors = directory / "checkpoints" / "latest", ({}, {})
    for merged_tensors, folder in zip(tensors, (latest, latest / "training_state")):
        for path in sorted(folder.glob("*.safetensors")):
            merged_tensors.update(load_file(path))
    with open(directory / "metrics.jsonl", encoding="utf-8") as f:
        return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in f], *tensors


def test_a_run_stopped_in_every_phase_resumes_exactly(train, tmp_path, monkeypatch, capfd):
    """Six stops, with each of the signals. The exit code depends on the signal, and a line reports it."""
    before = [signal.getsignal(number) for number in processes.EXIT_CODES]
    train(*RUN, out="uninterrupted")
    set_phase = processes.Ranks.set_phase
    for i, phase in enumerate(PHASES):
        number, code = list(processes.EXIT_CODES.items())[i % 3]

        def set_phase_and_signal(self, name, due=phase, number=number):
            set_phase(self, name)
            if name == due:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(processes.Ranks, "set_phase", set_phase_and_signal)
        with pytest.raises(SystemExit) as info:
            train(*RUN, "--resume_from", "auto")
        assert info.value.code == code
        out, err = capfd.readouterr()
        assert err.count(f"{signal.Signals(number).name}: finishing this step and saving") == 1
        step = int(re.search(r"(\d+)$", phase)[1])
        assert os.readlink(tmp_path / "out" / "checkpoints" / "latest") == f"step_{step}"
        # a run that is stopped in the evaluation after its last step is not finished
        assert (f"stopped  after step {step} of 6; continue with --output_dir out --resume_from auto" in out) == (phase != PHASES[-1])
    monkeypatch.setattr(processes.Ranks, "set_phase", set_phase)
    train(*RUN, "--resume_from", "auto")
    assert_same(outcome(tmp_path / "out"), outcome(tmp_path / "uninterrupted"))
    assert [signal.getsignal(number) for number in processes.EXIT_CODES] == before


@pytest.mark.parametrize("phase", ["tokenise", "load"])
def test_stopped_before_the_first_step_nothing_is_written(phase, train, tmp_path, monkeypatch, capfd):
    """The process exits at once, and the files of the run before it are unchanged."""
    train(*RUN[2:], "--max_steps", 1)
    files, phases = sorted(tmp_path.rglob("*")), []

    def set_phase(self, name):
        phases.append(name)
        if name == phase:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(processes.Ranks, "set_phase", set_phase)
    with pytest.raises(SystemExit) as info:
        train(*RUN[2:], "--max_steps", 2, "--resume_from", "auto")
    assert info.value.code == 143 and "SIGTERM: stopped before training began; nothing new to save" in capfd.readouterr().err
    assert phases[-1] == phase and sorted(tmp_path.rglob("*")) == files


def test_ctrl_c_twice_stops_at_once_with_one_line_each(tmp_path):
    """During a step that would take a minute."""
    result = program("slow_step", *RUN, *MODEL, "--output_dir", "out", cwd=tmp_path)
    assert result.returncode == 130 and "Traceback" not in result.stderr
    assert [line for line in result.stderr.splitlines() if line] == [
        "SIGINT: finishing this step and saving; press Ctrl-C again to quit without saving",
        "stopped without saving; steps that no checkpoint has are lost"]


def test_a_signal_to_one_rank_stops_both(tmp_path, request, half):
    """During an evaluation; with --full also during a save, to the other rank. The resumed run is bit-identical to one
    without signals."""
    flags = "--max_steps", 3, "--save_steps", 2, *RUN[2:-5], *RUN[-3:], "--model", half, *MODEL[2:], "--output_dir"
    stops = [(1, "evaluation after step 2", int(signal.SIGTERM)), (0, "save of step 2", int(signal.SIGUSR1))]
    stops = stops[:1 + request.config.getoption("--full")]
    planted = [("none", "none", 0, *flags, "uninterrupted")]
    planted += [(*stop, *flags, "out", "--resume_from", "auto") for stop in (*stops, ("none", "none", 0))]
    run_all([(2, ("signal_in_phase", *map(str, arguments))) for arguments in planted], tmp_path)
    for rank in range(2):
        codes = [json.loads(line) for line in (tmp_path / f"codes {rank}").read_text().splitlines()]
        assert codes == [None, *(processes.EXIT_CODES[number] for _, _, number in stops), None]
    assert_same(merged(tmp_path / "out"), merged(tmp_path / "uninterrupted"))


@contextlib.contextmanager
def started_run(tmp_path):
    """A process of train.sh with two ranks, in a session of its own, once it has made a step."""
    command = [f"{ROOT}/train.sh", "--n_gpus", "2", "--model", "tiny", "--epochs", "10000", "--save_steps", "1000000",
               "--output_dir", str(tmp_path / "out")]
    metrics, limit = tmp_path / "out" / "metrics.jsonl", time.monotonic() + 120
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                          env={**os.environ, "PYTHON": sys.executable}) as process:
        while not (metrics.exists() and metrics.stat().st_size):
            assert process.poll() is None and time.monotonic() < limit
            time.sleep(0.1)
        yield process


@pytest.mark.full
@pytest.mark.parametrize("number, code", [(signal.SIGUSR1, 0), (signal.SIGTERM, 143), (signal.SIGINT, 130),
                                          (signal.SIGHUP, 129)])
def test_train_sh_forwards_a_signal_and_exits_like_sft_py(number, code, tmp_path):
    """Through torchrun, without its traceback: both ranks save, and train.sh has the exit code."""
    with started_run(tmp_path) as process:
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in err
    hint = "; press Ctrl-C again to quit without saving" if number == signal.SIGINT else ""
    assert err == f"\n{signal.Signals(number).name}: finishing this step and saving{hint}\n"  # as with one rank
    step = int(re.search(r"stopped  after step (\d+) of", out)[1])
    assert os.readlink(tmp_path / "out" / "checkpoints" / "latest") == f"step_{step}"


def processes_of(launcher):
    """Ids of the launcher and of all processes below it."""
    below = subprocess.run(["pgrep", "-P", str(launcher)], stdout=subprocess.PIPE, text=True).stdout.split()
    return [launcher, *(pid for child in below for pid in processes_of(int(child)))]


@pytest.mark.full
@pytest.mark.parametrize("number, code, how", [
    (signal.SIGTERM, 143, "each"), (signal.SIGTERM, 143, "each twice"), (signal.SIGHUP, 129, "each twice"),
    (signal.SIGINT, 130, "group")])
def test_a_signal_to_all_processes_of_a_run_saves_a_checkpoint(number, code, how, tmp_path):
    """To each, as scancel sends it: the launcher, torchrun and the ranks; also again within a second. To the process
    group, as a terminal sends Ctrl-C. No report is printed."""
    with started_run(tmp_path) as process:
        for _ in range(1 + ("twice" in how)):
            if how == "group":
                os.killpg(process.pid, number)
            for pid in processes_of(process.pid) if how != "group" else ():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == code and err.count("finishing this step and saving") == 1
    assert len(err.splitlines()) == 2, err
    step = int(re.search(r"stopped  after step (\d+) of", out)[1])
    assert os.readlink(tmp_path / "out" / "checkpoints" / "latest") == f"step_{step}"


@pytest.mark.full
@pytest.mark.parametrize("number, code, phase, to_all", [
    (signal.SIGTERM, 143, "step", False), (signal.SIGUSR1, 0, "step", False), (signal.SIGTERM, 143, "step", True),
    (signal.SIGTERM, 143, "tokenise", False), (signal.SIGUSR1, 138, "tokenise", True)])
def test_two_nodes_exit_with_the_same_code(number, code, phase, to_all, tmp_path):
    """A signal to the launcher of one node, or to every process of both as scancel sends it; no report."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    data = tmp_path / "rows.json"  # takes longer to tokenise than the test
    with open(EXAMPLES, encoding="utf-8") as f:
        data.write_text(json.dumps(json.load(f) * (8000 if phase == "tokenise" else 1)))
    command = [f"{ROOT}/train.sh", "--model", "tiny", "--epochs", "10000", "--save_steps", "1000000",
               "--train_data", str(data), "--output_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache")]
    environment = {**os.environ, "PYTHON": sys.executable, "NNODES": "2", "MASTER_PORT": port}
    nodes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                              env={**environment, "NODE_RANK": rank}) for rank in "01"]
    metrics, limit = tmp_path / "out" / "metrics.jsonl", time.monotonic() + 100
    while time.monotonic() < limit:
        if metrics.exists() and metrics.stat().st_size or phase == "tokenise" and len(processes_of(nodes[1].pid)) > 2:
            break
        time.sleep(0.1)
    if phase == "tokenise":
        time.sleep(8)  # the ranks import torch and read the rows
    for pid in [pid for node in nodes for pid in processes_of(node.pid)] if to_all else [nodes[1].pid]:
        os.kill(pid, number)
    for node in nodes:
        err = node.communicate(timeout=100)[1]
        assert node.returncode == code and "Traceback" not in err and "Root Cause" not in err, err
    assert (tmp_path / "out" / "checkpoints" / "latest").exists() == (phase == "step")


def test_ctrl_c_during_imports_prints_no_traceback(tmp_path):
    """Of sft.py; a torch that takes long to import stands for the time that the real one takes."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)")
    with subprocess.Popen([sys.executable, f"{ROOT}/sft.py"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)}) as process:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        assert (process.communicate(timeout=20)[1], process.returncode) == ("", -signal.SIGINT)
