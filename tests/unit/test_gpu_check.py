"""tools/gpu_check.py without a GPU: its stages on tiny shapes, and what it does about stages that fail or hang."""

import contextlib
import importlib.metadata
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import warnings
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT

from settings.errors import UserError
from tools import flash_attn_names, gpu_check, gpu_probes, gpu_stages

PROGRAM = os.path.join(ROOT, "tools", "gpu_check.py")
TIMED = {"tokens_per_second", "seconds", "start_s", "first_step_s", "first_loss", "last_loss", "planned_gb",
         "peak_memory_gb", "reserved_memory_gb", "mfu", "host_peak_memory_gb"}
WATCHED = {"syncs", "sync_lines", "ms", "save_s", "step_s"}
KEYS = {  # stage -> keys of its result, at least
    "hardware": {"gpu", "cores", "versions", "copy_tb_per_second", "product_tflops", "host_adamw_gb", "varlen_attn",
                 "to_device_pinned_gb", "to_host_pinned_gb", "to_device_pageable_gb", "to_host_pageable_gb"},
    "kernels": {"checks", "attention_forward_error", "attention_backward_error", "attention_us", "loss_errors",
                "loss_us_per_target", "nf4_product_error", "adamw_error"},
    "laws": {"checks", "bf16_loss_error", "compared_steps", "resumed_from"},
    "eager_0.5b": {"long", "short", "watched"}, "compiled_0.5b": {"watched"},
    "compiled_1.5b": {"long"}, "lora_7b": {"long"}, "lora_7b_4096": {"long"},
    "qlora_7b": {"long", "first_loss_error"}, "offload_7b": {"long"},
}


def results_of(out):
    with open(out / "results.jsonl", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def check_results(out, printed, names):
    """The results of a CPU run: one line per stage, in the files and on the screen, with all keys, all green."""
    results = {result["name"]: result for result in results_of(out)}
    assert list(results) == names
    for name, result in results.items():
        if result["status"] == "skipped" and name.startswith("trl"):
            assert "trl is not installed" in result["reason"]
            continue
        if name == "out_of_memory":
            assert (result["status"], result["reason"]) == ("skipped", "it needs a GPU")
            continue
        assert result["status"] == "ok", (result, (out / "log.txt").read_text()[-3000:])
        assert {"stage", "seconds", "limit"} <= result.keys()
        assert KEYS.get(name, set()) <= result.keys()
        assert all(result.get("checks", {"": True}).values())
        for key in {"long", "short"} & result.keys():
            assert TIMED == result[key].keys()
        if "watched" in result:
            assert WATCHED <= result["watched"].keys()
            assert ("graphs" in result["watched"]) == (name == "compiled_0.5b")
    lines = printed.splitlines()
    for result, line in zip(results.values(), lines):
        assert line.startswith(f"{result['stage']} {result['name']}: {result['status']}") and len(line) <= 150
    table = (out / "table.txt").read_text()
    assert printed.endswith(table) and all(name in table for name in names)
    assert len(os.listdir(out)) <= 8


def run_on_cpu(out, stages):
    command = [sys.executable, PROGRAM, str(out), "3600", "--device", "cpu", "--stages", stages]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    check_results(out, result.stdout, [stage.name for stage in gpu_check.selected(stages)])


@pytest.mark.full
def test_the_first_stages_run_on_the_cpu(tmp_path):
    """Stages 0 and 1: what the machine can do, and the kernels against their references."""
    run_on_cpu(tmp_path, "0-1")


@pytest.mark.full
def test_every_stage_runs_on_the_cpu(tmp_path):
    """All stages on tiny shapes, those with TRL if it is installed."""
    run_on_cpu(tmp_path, "0-10")


@pytest.mark.parametrize("code, error, expected", [
    (1, "out of memory: rank 0 has used up ...\n  --micro_batch_size 8 saves\n  --gradient_checkpointing saves", True),
    (1, "out of memory: rank 0 has used up ...\n  --micro_batch_size 8 saves", False),
    (1, "Traceback\n--micro_batch_size --gradient_checkpointing", False)])
def test_out_of_memory_checks_the_advice(tmp_path, monkeypatch, code, error, expected):
    report = gpu_stages.Report("cpu", str(tmp_path), str(tmp_path), io.StringIO())
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: SimpleNamespace(returncode=code, stderr=error))
    gpu_stages.out_of_memory(report)
    assert report.values["said"] == error.splitlines()
    assert report.values["checks"] == {"exit_code": True, "advice": expected}


# ---- the stages' processes ----------------------------------------------------------------------------------------

SAY = "import json, os, subprocess, sys, time; say = lambda **v: print(json.dumps(v), flush=True); "
FAKE = {  # name -> (limit in seconds, package, program); OUT is replaced
    "fine": (60, None, "say(a=1); say(a=1, b=2.5)"),
    "fails": (60, None, "say(a=3); raise ValueError('planted')"),
    "checks": (60, None, "say(checks={'good': True, 'bad': False}); sys.exit(1)"),
    "hangs": (2, None, "child = subprocess.Popen(['sleep', '600']); say(pid=child.pid); print('{\"pi', flush=True); "
                       "time.sleep(600)"),
    "absent": (60, "no_such_package", ""),
    "too_long": (10000, None, "say(ran=True)"),
    "last": (60, None, "say(lines=len(open('OUT/results.jsonl').readlines()))"),
}


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A function: names of FAKE, seconds -> their results, as run by gpu_check's main in this process."""
    monkeypatch.setattr(gpu_check, "STAGES", tuple(
        gpu_check.Stage(i, name, limit, package) for i, (name, (limit, package, _)) in enumerate(FAKE.items())))
    monkeypatch.setattr(gpu_check, "command", lambda stage, cfg, scratch: [
        sys.executable, "-c", SAY + FAKE[stage.name][2].replace("OUT", cfg.out)])
    before = signal.getsignal(signal.SIGTERM)

    def run(*names, seconds=300):
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", str(tmp_path), str(seconds), "--stages", ",".join(names)])
        with contextlib.suppress(SystemExit):
            gpu_check.main()
        return results_of(tmp_path)

    yield run
    signal.signal(signal.SIGTERM, before)


def is_running(pid):
    """Whether a process exists and is no zombie."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as f:
            return f.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_a_bad_stage_costs_only_itself(fake, capsys):
    """A stage that raises, fails a check or hangs keeps the values it has printed; the next ones run."""
    fine, fails, checks, hangs, absent, too_long, last = fake(*FAKE)
    assert fine == {"stage": 0, "name": "fine", "status": "ok", "seconds": fine["seconds"], "limit": 60, "a": 1,
                    "b": 2.5}
    assert (fails["status"], fails["a"], fails["error"]) == ("failed", 3, "ValueError: planted")
    assert (checks["status"], checks["error"]) == ("failed", "failed checks: bad")
    assert hangs["status"] == "timeout" and 2 <= hangs["seconds"] < 30
    assert not is_running(hangs["pid"])  # what the stage has started ends with it
    assert absent == {"stage": 4, "name": "absent", "status": "skipped",
                      "reason": "no_such_package is not installed, see docs/gpu.md"}
    assert too_long["status"] == "skipped" and too_long["reason"].startswith("its limit of 10000 s does not fit into")
    assert "ran" not in too_long
    assert last["lines"] == 6  # the lines of the earlier stages were on the disk when it ran
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].startswith("1 fails: failed") and "ValueError: planted" in printed[1]
    assert printed[7].split() == ["stage", "quantity", "expected", "measured", "ratio"]  # after one line per stage


def test_the_exit_code_is_1_if_a_stage_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "table", lambda results, judges: [])
    for status, code in (("ok", None), ("skipped", None), ("failed", 1), ("timeout", 1)):
        monkeypatch.setattr(gpu_check, "measure_all", lambda cfg, stages: [{"status": "ok"}, {"status": status}])
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", str(tmp_path), "10"])
        with pytest.raises(SystemExit) if code else contextlib.nullcontext() as info:
            gpu_check.main()
        assert code is None or info.value.code == code


def test_stages_run_in_the_order_given(fake):
    """--stages 7-10,3: the most valuable first."""
    assert [result["name"] for result in fake("last", "0-1")] == ["last", "fine", "fails"]


def test_stop_signal_ends_the_stage(tmp_path):
    """SIGTERM ends the running stage and all that it has started, and removes the temporary directory."""
    code = ("import sys; sys.path.insert(0, {root!r}); from tools import gpu_check as g; "
            "g.command = lambda *_: [sys.executable, '-c', {stage!r}]; "
            "sys.argv = ['gpu_check.py', {out!r}, '300', '--stages', '0']; g.main()")
    stage = SAY + f"f = open({str(tmp_path / 'pid')!r}, 'w'); f.write(str(os.getpid())); f.close(); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", code.format(root=ROOT, stage=stage, out=str(tmp_path / "out"))],
                               env={**os.environ, "TMPDIR": str(tmp_path)})
    deadline = time.monotonic() + 60
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    pid = int((tmp_path / "pid").read_text())
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    assert not is_running(pid)


@pytest.mark.parametrize("text, names", [
    ("0-1", ["hardware", "kernels"]), ("6", ["compiled_1.5b", "trl_1.5b"]),
    ("10,laws,2", ["offload_7b", "laws", "out_of_memory"]), ("5-6", ["trl_0.5b", "compiled_1.5b", "trl_1.5b"])])
def test_stages_are_selected_by_number_or_name(text, names):
    """In the order given, each once."""
    assert [stage.name for stage in gpu_check.selected(text)] == names


@pytest.mark.parametrize("text", ["11", "2-x", "law"])
def test_an_unknown_stage_is_an_error(text):
    """The message has all stages."""
    with pytest.raises(UserError, match="there is no stage .*0 hardware, 1 kernels"):
        gpu_check.selected(text)


def test_list_prints_a_command_per_stage(monkeypatch, capsys):
    """Each is a complete command for one stage of gpu_stages.STAGES."""
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "/tmp/out", "--list"])
    gpu_check.main()
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    assert [words[words.index("--stage") + 1] for words in commands] == list(gpu_stages.STAGES)
    assert all(words[:3] == [sys.executable, PROGRAM, "/tmp/out"] for words in commands)


def test_a_machine_without_a_gpu_is_an_error(tmp_path):
    """--device cuda where torch finds none: one line that says what to type instead."""
    command = gpu_check.command(gpu_check.STAGES[0], SimpleNamespace(out=str(tmp_path), device="cuda"), str(tmp_path))
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == ("gpu_check.py: error: --device cuda: torch finds no GPU; --device cpu runs the stages on "
                             "tiny shapes\n")


def test_table_judges():
    """Bounds, peaks against the plan, and ours against TRL's; an error may not be above its bound."""
    def lines(speed, error, peak, theirs):
        return list(gpu_check.table([
            {"stage": 2, "name": "laws", "status": "ok", "bf16_loss_error": error},
            {"stage": 4, "name": "compiled_0.5b", "status": "ok",
             "long": {"tokens_per_second": speed, "planned_gb": 10.0, "peak_memory_gb": peak}},
            {"stage": 5, "name": "trl_0.5b", "status": "ok", "tokens_per_second": theirs}]))

    good, bad = lines(95e3, 0.019, 10.9, 70e3), lines(89e3, 0.021, 11.1, 90e3)
    assert sum(line.endswith("pass") for line in good) == sum(line.endswith("FAIL") for line in bad) == 4
    assert not any(line.endswith("FAIL") for line in good) and not any(line.endswith("pass") for line in bad)
    (speed,) = [line for line in good if "long.tokens_per_second" in line]
    assert speed.split() == ["4", "compiled_0.5b", "long.tokens_per_second", "1e+05", "95,000", "0.95", "pass"]


# ---- what the stages are made of ----------------------------------------------------------------------------------


def test_a_run_that_ends_early_is_an_error(tmp_path):
    """kill_after names the exit code, and does not wait for steps that never come."""
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.exit(3)"])
    with pytest.raises(RuntimeError, match="ended with code 3 after 0 of 20 steps"):
        gpu_stages.kill_after(process, str(tmp_path), 20)


def test_a_half_written_line_is_no_step(tmp_path):
    """metrics.jsonl is read while the run writes it."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 1, "val_loss": 2.0}\n{"step": 2, "lo')
    assert gpu_stages.steps_so_far(str(tmp_path)) == [{"step": 1, "loss": 2.0}]


def test_watcher_counts_the_syncs_of_one_step():
    """Warnings of step 4 only, by file and line; other warnings do not count."""
    watcher = gpu_stages.Watcher(torch.device("cpu"), 6, saves=False)

    def one_step():
        sync, mode = "called a synchronizing CUDA operation", "the debug mode does not detect all synchronizing operations"
        for text in (sync, mode, sync):
            warnings.warn(text, stacklevel=1)

    with warnings.catch_warnings(record=True):  # takes the warnings that the watcher does not
        warnings.simplefilter("always")
        for step in range(1, 6):
            watcher.after(step)
            one_step()
    assert list(watcher.syncs().values()) == [2]
    assert next(iter(watcher.syncs())).startswith("test_gpu_check.py:")
    with pytest.raises(gpu_stages.Done):
        watcher.after(6)


def test_flash_attn_names(monkeypatch, tmp_path):
    """transformers finds the package, and causal windows are those of varlen_attn: (-1, 0) is all earlier tokens."""
    calls = []

    def varlen_attn(q, k, v, *sizes, **options):
        calls.append((sizes, options["window_size"], options["scale"]))
        return q

    monkeypatch.setattr(flash_attn_names, "varlen_attn", varlen_attn)
    q, offsets = torch.zeros(6, 2, 8), torch.tensor([0, 2, 6], dtype=torch.int32)
    for causal, window in ((True, (-1, -1)), (True, (3, 3)), (False, (-1, -1))):
        flash_attn_names.flash_attn_varlen_func(q, q, q, offsets, offsets, torch.tensor(4), 4, softmax_scale=0.5,
                                                causal=causal, window_size=window, deterministic=True)
    assert [call[1:] for call in calls] == [((-1, 0), 0.5), ((3, 0), 0.5), ((-1, -1), 0.5)]
    assert calls[0][0][2:] == (4, 4) and type(calls[0][0][2]) is int
    assert flash_attn_names.flash_attn_func(q[None], q[None], q[None], causal=True).shape == (1, 6, 2, 8)
    assert calls[-1][0][0].tolist() == [0, 6]

    path = gpu_probes.write_shim(str(tmp_path))
    monkeypatch.setattr(sys, "path", [path.split(os.pathsep)[0], *sys.path])
    assert importlib.metadata.version("flash-attn") == flash_attn_names.__version__
    assert "flash_attn" in importlib.metadata.packages_distributions()


# ---- results.json -------------------------------------------------------------------------------------------------


def test_results_json_has_the_best_result_of_each_stage(tmp_path, monkeypatch):
    """Two calls with one OUT: a later ok replaces all, a later failure only what is not ok. In the order of STAGES."""
    def call(**status_of):
        stages = [stage for name in status_of for stage in gpu_check.selected(name)]
        monkeypatch.setattr(gpu_check, "measure", lambda stage, cfg, scratch: {
            "stage": stage.number, "name": stage.name, "status": status_of[stage.name], "seconds": 1.0,
            "call": len(status_of)})
        gpu_check.measure_all(SimpleNamespace(out=str(tmp_path), seconds=1e6, device="cuda"), stages)
        return {result["name"]: (result["status"], result["call"]) for result in read()}

    def read():
        return json.loads((tmp_path / "results.json").read_text())

    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process keeps its own
    first = call(qlora_7b="failed", hardware="ok", laws="timeout", kernels="ok", lora_7b="failed")
    assert list(first) == ["hardware", "kernels", "laws", "lora_7b", "qlora_7b"]
    second = call(lora_7b="ok", laws="failed", kernels="failed", hardware="ok")
    assert list(second.items()) == [("hardware", ("ok", 4)), ("kernels", ("ok", 5)), ("laws", ("failed", 4)),
                                    ("lora_7b", ("ok", 4)), ("qlora_7b", ("failed", 5))]
    lines = (tmp_path / "results.json").read_text().splitlines()
    assert lines[0] == "[" and lines[-1] == "]"
    assert [json.loads(line.rstrip(",")) for line in lines[1:-1]] == read()  # one stage per line
    assert len(results_of(tmp_path)) == 9  # all calls


def test_results_json_is_written_when_a_stage_fails(fake, tmp_path):
    """Also a stage that STAGES no longer has stays, as the last one."""
    (tmp_path / "results.jsonl").write_text('{"stage": 3, "name": "old_stage", "status": "ok"}\n')
    fake("fails", "fine")
    results = json.loads((tmp_path / "results.json").read_text())
    assert [(result["name"], result["status"]) for result in results] == [
        ("fine", "ok"), ("fails", "failed"), ("old_stage", "ok")]
