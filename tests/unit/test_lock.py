"""One run writes to an output directory, and nothing that no run wrote is overwritten (disk/lock.py)."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from helpers import ROOT, TINY, VALIDATION

from disk import lock
from ranks import processes
from settings.errors import UserError

RUN = ("--max_steps", 2, "--batch_size", 2, "--max_length", 64, "--no-gradient_checkpointing", "--save_steps", 1)
ELSEWHERE = {"machine": "another kernel", "host": "node-b", "pid": 4711, "start": "1"}


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.1)


@pytest.fixture
def other():
    """A process that is alive, and not this one."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def write_lock(directory, age=0.0, **changes):
    """Write the lock of a holder that this process is not; return its path."""
    path = directory / lock.LOCK
    path.write_text(json.dumps({**lock.this_process(), **changes}))
    os.utime(path, (time.time() - age,) * 2)
    return path


def take(directory, timeout=600):
    held = lock.Lock(str(directory))
    held.take(timeout, lambda: None)
    held.release()


def of(process):
    return {"pid": process.pid, "start": lock.start_of(process.pid)}


def test_a_holder_that_touches_its_lock_is_named(tmp_path, other):
    """On this machine and on another one."""
    for holder, name in ((of(other), f"process {other.pid} on "), (ELSEWHERE, "process 4711 on node-b ")):
        path, ends = write_lock(tmp_path, **holder), threading.Event()
        thread = threading.Thread(target=lambda path=path, ends=ends: [os.utime(path) for _ in iter(
            lambda: ends.wait(0.05), True)])
        thread.start()
        with pytest.raises(UserError, match=f"{name}.*writes to .*use another --output_dir"):
            take(tmp_path)
        ends.set()
        thread.join()
        assert json.loads(path.read_text())["pid"] == holder["pid"]


@pytest.mark.parametrize("age, holder, environment, reason", [
    (0, {"pid": 2**22 + 1}, {}, "which has ended"),
    (0, {"start": "12"}, {}, "which has ended"),  # another process has its pid now
    (0, {**ELSEWHERE, "run_id": "r1"}, {"TORCHELASTIC_RUN_ID": "r1"}, "the same run r1"),
    (0, {**ELSEWHERE, "run_id": "77"}, {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "1"}, "the same run 77"),
    (601, ELSEWHERE, {}, "without a sign of life for 60. s"),
    (601, {**ELSEWHERE, "run_id": "none"}, {"TORCHELASTIC_RUN_ID": "none"}, "without a sign of life for 60. s")])
def test_a_lock_whose_holder_has_ended_is_taken_over_with_a_line(age, holder, environment, reason, tmp_path, capsys,
                                                                 monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    path = write_lock(tmp_path, age, **holder)
    take(tmp_path)
    line = capsys.readouterr().err
    assert line.startswith(f"lock     {path} of process ") and line.endswith(", was taken over\n"), line
    assert line.count("\n") == 1 and re.search(reason, line)
    assert list(tmp_path.iterdir()) == []


def test_a_restart_takes_the_lock_of_the_start_before_it(tmp_path, other, monkeypatch, capsys):
    """Of the same run on this machine, whose former process still ends."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "r1")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    write_lock(tmp_path, **of(other), restarts=1)
    take(tmp_path)
    assert "an earlier start of the run r1, was taken over" in capsys.readouterr().err


def test_a_silent_holder_is_awaited_until_the_limit(tmp_path, capsys):
    """It may be another node that is gone, or one that is slow: it gets --timeout seconds, not a refusal."""
    path, waited = write_lock(tmp_path, **ELSEWHERE), []
    held = lock.Lock(str(tmp_path))
    held.take(1, lambda: waited.append(path.exists()))
    held.release()
    lines = capsys.readouterr().err.splitlines()
    assert "process 4711 on node-b gives no sign of life; it is taken over after --timeout 1 s" in lines[0]
    assert "without a sign of life for 1 s, was taken over" in lines[1] and len(waited) > 2


def test_an_empty_lock_is_taken_over_once_it_is_old(tmp_path):
    """A full disk or a kill left it, between its creation and its content. A new one gets its content yet."""
    path, waited = tmp_path / lock.LOCK, []
    for content in ("", "{}"):
        path.write_text(content)
        os.utime(path, (time.time() - lock.PATIENCE + 0.3,) * 2)
        held = lock.Lock(str(tmp_path))
        held.take(600, lambda: waited.append(path.stat().st_size))
        held.release()
    assert len(waited) > 4 and not path.exists()


def test_a_jump_of_the_clock_does_not_take_the_lock_of_a_holder_that_is_alive(tmp_path, other):
    path = write_lock(tmp_path, 10**6, **of(other))
    thread = threading.Timer(0.1, os.utime, [path])
    thread.start()
    with pytest.raises(UserError, match=f"process {other.pid} on .* writes to"):
        take(tmp_path)
    thread.join()


def test_what_is_not_a_lock_stays(tmp_path):
    for text in ("my notes", "[1]", '{"pid": 1}'):
        (tmp_path / lock.LOCK).write_text(text)
        with pytest.raises(UserError, match="run.lock is not a run's lock"):
            take(tmp_path)
        assert (tmp_path / lock.LOCK).read_text() == text


def test_a_lock_that_was_taken_meanwhile_is_not_removed(tmp_path):
    """Two processes have found the same stale lock, and this one is the slower."""
    path = write_lock(tmp_path, **ELSEWHERE)
    stale = {**json.loads(path.read_text()), "pid": 1}
    assert not lock.Lock(str(tmp_path)).remove(stale)
    assert json.loads(path.read_text())["pid"] == 4711 and os.listdir(tmp_path) == [lock.LOCK]


def contend(directory, start, held):
    start.wait()
    mine = lock.Lock(directory)
    try:
        mine.take(600, lambda: None)
    except UserError:
        return
    with held.get_lock():
        held.value += 1
    time.sleep(1.5)  # while the others look
    mine.release()


def test_of_many_processes_that_find_a_stale_lock_one_gets_it(tmp_path):
    fork = multiprocessing.get_context("fork")
    write_lock(tmp_path, pid=2**22 + 1)
    start, held = fork.Event(), fork.Value("i", 0)
    processes = [fork.Process(target=contend, args=(str(tmp_path), start, held)) for _ in range(8)]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert held.value == 1


@pytest.mark.parametrize("has_ended", [False, True])
def test_a_run_whose_lock_was_taken_over_saves_nothing_more(has_ended, train, tmp_path, monkeypatch):
    """It was frozen for longer than --timeout, and another run writes there now, or has ended since."""
    set_phase = processes.Ranks.set_phase

    def set_phase_and_lose(self, phase):
        set_phase(self, phase)
        if phase == "step 2":
            path = write_lock(tmp_path / "out", **ELSEWHERE)
            if has_ended:
                path.unlink()
                time.sleep(3 * lock.HEARTBEAT)

    monkeypatch.setattr(processes.Ranks, "set_phase", set_phase_and_lose)
    message = "run.lock is gone: another run" if has_ended else "process 4711 on node-b writes to out "
    with pytest.raises(UserError, match=f"{message}.*saves nothing"):
        train(*RUN)
    assert os.listdir(tmp_path / "out" / "checkpoints" ) and not (tmp_path / "out/checkpoints/step_2").exists()
    holder = lock.read_lock(str(tmp_path / "out"))
    assert holder is None if has_ended else holder["pid"] == 4711


def test_the_lock_is_there_while_a_run_writes_and_gone_after(train, tmp_path, monkeypatch):
    """After an error too. --selfcheck, which writes nothing, works beside another run."""
    seen, set_phase = [], processes.Ranks.set_phase

    def look(self, phase):
        set_phase(self, phase)
        seen.append((phase, (tmp_path / "out" / lock.LOCK).exists()))
        if phase == "step 2":
            raise UserError("planted")

    monkeypatch.setattr(processes.Ranks, "set_phase", look)
    with pytest.raises(UserError, match="planted"):
        train(*RUN)
    assert {has_lock for phase, has_lock in seen if phase not in ("start", "lock of the output directory")} == {True}
    assert not (tmp_path / "out" / lock.LOCK).exists()
    path = write_lock(tmp_path / "out", **ELSEWHERE)
    train(*RUN, "--selfcheck")
    assert path.exists()


@pytest.mark.parametrize("name, text", [("config.yaml", "lr: 1.0e-4\n"), ("config.yaml", "# mine\nmodel: tiny\n"),
                                        ("metrics.jsonl", '{"step": 1}\n'), ("report.html", "<p>mine"),
                                        ("samples.jsonl", "{}\n"), ("ledger.json", "{}")])
def test_a_file_that_no_run_wrote_is_not_overwritten(name, text, train, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text(text)
    with pytest.raises(UserError, match=f"--output_dir out: no run wrote its {name}"):
        train(*RUN)
    assert (tmp_path / "out" / name).read_text() == text


def test_a_run_that_saved_nothing_may_be_repeated(train, tmp_path, monkeypatch):
    """Its files are a run's; config.yaml says so in its first line. One of an older version has no such line."""
    monkeypatch.setattr(processes.Ranks, "poll_signals", lambda self: (_ for _ in ()).throw(UserError("planted")))
    with pytest.raises(UserError, match="planted"):
        train(*RUN)
    monkeypatch.undo()
    config = tmp_path / "out" / "config.yaml"
    first, _, rest = config.read_text().partition("\n")
    assert first.startswith("# Settings of a run")
    config.write_text(rest)
    assert len(train(*RUN)) == 2


def test_the_checkpoint_of_another_run_does_not_continue_into_a_run(train, tmp_path):
    """Its lines would replace those of the run that is there, and its steps the steps."""
    train(*RUN, out="a")
    train(*RUN, "--lr", "1e-3", out="b")
    before = (tmp_path / "a" / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="--resume_from b/checkpoints/step_1 belongs to another run than the one in"):
        train(*RUN, "--resume_from", "b/checkpoints/step_1", out="a")
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == before
    assert len(train(*RUN, "--lr", "1e-3", "--resume_from", "b/checkpoints/step_1", out="c")) == 1


@pytest.mark.full
def test_a_second_process_is_refused_and_the_first_one_ends_well(tmp_path):
    command = [sys.executable, f"{ROOT}/sft.py", "--model", TINY, "--train_data", VALIDATION, "--cache_dir", "none",
               "--batch_size", "1", "--max_length", "64", "--epochs", "100000", "--output_dir", "out"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as first:
        while not (tmp_path / "out" / "metrics.jsonl").exists():
            time.sleep(0.1)
        second = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        first.send_signal(signal.SIGTERM)
        out, _ = first.communicate(timeout=60)
    assert second.returncode == 2 and f"error: process {first.pid} on " in second.stderr, second.stderr
    assert first.returncode == 143 and "stopped  after step" in out
    steps = [json.loads(line)["step"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))
