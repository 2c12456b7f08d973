"""Check and time the trainer on one GPU, in stages: `python tools/gpu_check.py OUT SECONDS [--stages 0-6]`

Each stage is a process of its own with a limit in seconds. A stage that fails, or is ended at its limit,
costs only itself. A stage whose limit does not fit into the time that remains is skipped by name. As soon as
a stage ends, its one JSON line is in OUT/results.jsonl and 150 characters of it on the screen. The table
comes last: what was expected beside what was measured. OUT also gets results.json (one result per stage, of
all calls with this OUT, for tools/bench.py --compare), table.txt, log.txt (what the stages printed) and
kernels.txt (the profiles). Models and runs are in a temporary directory, in /dev/shm where there is room.

--list prints each stage's command, so that a person can run one alone. --device cpu runs every stage on tiny
shapes: it proves that the stages work, its figures mean nothing. docs/gpu.md describes the stages, and the
packages that the comparison with TRL needs. The code is in gpu_probes.py (0, 1) and gpu_stages.py (the rest).
"""

if __name__ == "__main__":
    import os
    import sys

    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    from settings import venv

    venv.enter()  # where torch is missing, continue in the .venv that train.sh made

import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

from settings.errors import UserError, run
from settings.parser import check, parse, setting

SHARED_MEMORY = "/dev/shm"
CPU_LIMIT = 300  # seconds of every stage with --device cpu: it is a test, and the machine may be busy
ROOM = 40 * 2**30  # bytes in SHARED_MEMORY that the largest stage needs, the 7B model and a run
LOG_BYTES = 100_000  # of a stage's output that log.txt keeps: its end
FAILED, TIMEOUT, SKIPPED, OK = "failed", "timeout", "skipped", "ok"


@dataclass(frozen=True)
class Stage:
    """A stage and what is expected of it on an H100.

    number    several stages may share one; --stages selects by number or name
    limit     seconds; they are ended there
    package   a package without which the stage is skipped
    expected  {key: (estimate, bound)} of its results; a dot separates nested keys. An estimate is arithmetic
              from docs/gpu.md, no measurement. bound is None, or the least value that passes; for names that
              end with _error it is the largest one
    needs_gpu  skipped with --device cpu
    """

    number: int
    name: str
    limit: float
    package: str | None = None
    expected: dict | None = None
    needs_gpu: bool = False


SPEED = "tokens_per_second"
STAGES = (
    Stage(0, "hardware", 40, expected={
        "copy_tb_per_second": (3.0, None), "product_tflops": (790, None), "to_device_pinned_gb": (50, None),
        "to_device_pageable_gb": (5, None), "host_adamw_gb": (120, None)}),
    Stage(1, "kernels", 45, expected={
        "attention_forward_error": (4e-3, 1e-2), "attention_backward_error": (6e-3, 2e-2),
        "loss_us_per_target": (2.0, None)}),
    Stage(2, "laws", 110, expected={"bf16_loss_error": (1e-2, 2e-2)}),
    Stage(2, "out_of_memory", 45, needs_gpu=True),
    Stage(3, "eager_0.5b", 90, expected={
        f"long.{SPEED}": (80e3, None), f"short.{SPEED}": (80e3, None), "watched.syncs": (0, None)}),
    Stage(4, "compiled_0.5b", 100, expected={
        f"long.{SPEED}": (100e3, 90e3), f"short.{SPEED}": (105e3, None)}),
    Stage(5, "trl_0.5b", 60, "trl", {SPEED: (70e3, None)}),
    Stage(6, "compiled_1.5b", 75, expected={f"long.{SPEED}": (42e3, 38e3)}),
    Stage(6, "trl_1.5b", 60, "trl", {SPEED: (34e3, None)}),
    Stage(7, "lora_7b", 100, expected={f"long.{SPEED}": (14.5e3, 13e3)}),
    # 14,110 is what NeMo AutoModel publishes for this run
    Stage(7, "lora_7b_4096", 80, expected={f"long.{SPEED}": (14.1e3, 14.11e3)}),
    Stage(8, "qlora_7b", 90, expected={
        f"long.{SPEED}": (13.5e3, None), "first_loss_error": (0.1, 0.15)}),
    Stage(9, "trl_7b", 60, "trl", {SPEED: (12.5e3, None)}),
    Stage(10, "offload_7b", 190, expected={f"long.{SPEED}": (7.5e3, 7e3)}),
)
# stages whose ratio of tokens per second the table shows: ours, TRL's, expected
COMPARED = (("compiled_0.5b", "trl_0.5b", 1.4), ("compiled_1.5b", "trl_1.5b", 1.25),
            ("lora_7b", "trl_7b", 1.15))


@dataclass
class Config:
    """Check and time the trainer on one GPU: python tools/gpu_check.py OUT SECONDS [flags]"""

    out: str | None = setting(None, "directory for results.jsonl, results.json, table.txt, log.txt and "
                              "kernels.txt", group="gpu_check")
    seconds: float | None = setting(None, "stop after this many seconds", low=1)
    stages: str = setting("0-10", "numbers or names, with commas, in this order: 7-10,3 or laws,eager_0.5b")
    device: str = setting("cuda", "cpu: tiny shapes, to test the stages", ("cuda", "cpu"))
    list: bool = setting(False, "print the command of each stage, and exit")
    stage: str | None = setting(None, "internal: run this stage only, in this process")
    scratch: str | None = setting(None, "internal: directory for models and runs, kept", needs="stage")

    def __post_init__(self):
        check(self)


def selected(text):
    """The Stages that --stages selects, in its order. Raises UserError for a number or name that none has."""
    chosen = []
    for item in filter(None, map(str.strip, text.split(","))):
        first, _, last = item.partition("-")
        numbers = ()
        if first.isdigit() and (last.isdigit() or not last):
            numbers = range(int(first), int(last or first) + 1)
        found = [stage for stage in STAGES if stage.name == item or stage.number in numbers]
        if not found:
            names = ", ".join(f"{stage.number} {stage.name}" for stage in STAGES)
            raise UserError(f"--stages {text}: there is no stage {item}; use numbers or names of {names}")
        chosen += [stage for stage in found if stage not in chosen]
    return chosen


def limit_of(stage, device):
    """Seconds after which a stage is ended."""
    return stage.limit if device == "cuda" else CPU_LIMIT


def command(stage, cfg, scratch):
    """The command of a stage, as a list. It prints its JSON line more than once: the last one counts."""
    return [sys.executable, os.path.abspath(__file__), cfg.out or "OUT", "--stage", stage.name, "--device",
            cfg.device, "--scratch", scratch]


def scratch_directory(device):
    """A new temporary directory, in /dev/shm on a GPU machine that has room there."""
    if device == "cuda" and os.path.isdir(SHARED_MEMORY) and shutil.disk_usage(SHARED_MEMORY).free > ROOM:
        return tempfile.mkdtemp(prefix="gpu_check_", dir=SHARED_MEMORY)
    return tempfile.mkdtemp(prefix="gpu_check_")


# ------------------------------------------------------------------------------------------------------------
# run the stages


def end_group(process):
    """Kill a stage and all processes that it has started: its process group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # all of them have ended
    process.wait()


def wait(arguments, limit, stdout, stderr):
    """Run a command in its own process group for at most `limit` seconds; return its status."""
    with open(stdout, "wb") as out, open(stderr, "wb") as err:
        process = subprocess.Popen(arguments, stdout=out, stderr=err, preexec_fn=os.setpgrp)
    try:
        return OK if process.wait(limit) == 0 else FAILED
    except subprocess.TimeoutExpired:
        return TIMEOUT
    finally:  # also where this process is being ended
        end_group(process)


def last_values(path):
    """The last complete JSON line of a stage's output; {} if it has printed none."""
    with open(path, "rb") as f:
        lines = f.read().splitlines()
    for line in reversed(lines):
        try:
            return json.loads(line)
        except ValueError:
            continue  # it was ended while it wrote this line
    return {}


def measure(stage, cfg, scratch):
    """Run a stage; return its result."""
    started = time.monotonic()
    paths = [os.path.join(scratch, f"{stage.name}.{name}") for name in ("out", "err")]
    limit = limit_of(stage, cfg.device)
    status = wait(command(stage, cfg, scratch), limit, *paths)
    seconds = time.monotonic() - started
    with open(paths[1], "rb") as f:
        log = f.read()[-LOG_BYTES:].decode(errors="replace")
    result = {"stage": stage.number, "name": stage.name, "status": status, "seconds": round(seconds, 1),
              "limit": limit}
    values = last_values(paths[0])
    failed = [name for name, passed in values.get("checks", {}).items() if not passed]
    if status == FAILED and failed:
        result["error"] = f"failed checks: {', '.join(failed)}"
    elif status == FAILED:
        result["error"] = next((line for line in reversed(log.splitlines()) if line.strip()), "no output")
    with open(os.path.join(cfg.out, "log.txt"), "a", encoding="utf-8") as f:
        f.write(f"=== {stage.number} {stage.name}: {status} after {seconds:.1f} s\n{log}\n")
    return {**result, **values}


def reason_to_skip(stage, device, left):
    """Why a stage cannot run, as a text; "" if it can.

    device  "cuda" or "cpu"
    left    seconds that remain
    """
    if stage.package and importlib.util.find_spec(stage.package) is None:
        return f"{stage.package} is not installed, see docs/gpu.md"
    if stage.needs_gpu and device == "cpu":
        return "it needs a GPU"
    limit = limit_of(stage, device)
    if limit > left:
        return f"its limit of {limit:g} s does not fit into the {left:.0f} s that remain"
    return ""


def brief(result):
    """A result in at most 150 characters, the most important first."""
    words = [f"{result['stage']} {result['name']}: {result['status']}"]
    if "seconds" in result:
        words[0] += f" {result['seconds']:g} s"
    words += [str(result[key]) for key in ("error", "reason") if key in result]
    known = {"stage", "name", "status", "seconds", "limit", "error", "reason", "checks"}
    for key, value in flat(result).items():
        if key.split(".")[0] not in known and isinstance(value, (int, float)):
            words.append(f"{key} {value:g}")
    return ", ".join(words)[:150]


def write_results(out):
    """Write OUT/results.json: for each stage in OUT/results.jsonl the last result that is ok, else the last.

    So a later call with the same OUT adds stages and corrects failed ones, and its failure costs no figure.
    One stage per line, in the order of STAGES; those that STAGES no longer has come last.
    """
    results = {}
    with open(os.path.join(out, "results.jsonl"), encoding="utf-8") as f:
        for result in map(json.loads, f):
            name = result["name"]
            if result["status"] == OK or results.get(name, result)["status"] != OK:
                results[name] = result
    lines = [json.dumps(result) for result in in_order(results.values())]
    with open(os.path.join(out, "results.json"), "w", encoding="utf-8") as f:
        f.write("[\n" + ",\n".join(lines) + "\n]\n")


def in_order(results):
    """Results in the order of STAGES; those of other stages last."""
    names = [stage.name for stage in STAGES]
    return sorted(results, key=lambda result: (*names, result["name"]).index(result["name"]))


def measure_all(cfg, stages):
    """Run the stages one after another; return their results, which are on the disk as soon as they exist."""
    deadline = time.monotonic() + cfg.seconds
    os.makedirs(cfg.out, exist_ok=True)
    scratch = scratch_directory(cfg.device)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the stage, see wait()
    results = []
    try:
        with open(os.path.join(cfg.out, "results.jsonl"), "a", encoding="utf-8") as f:
            for stage in stages:
                reason = reason_to_skip(stage, cfg.device, deadline - time.monotonic())
                if reason:
                    result = {"stage": stage.number, "name": stage.name, "status": SKIPPED,
                              "reason": reason}
                else:
                    result = measure(stage, cfg, scratch)
                results.append(result)
                f.write(json.dumps(result) + "\n")
                f.flush()
                os.fsync(f.fileno())
                write_results(cfg.out)  # now, because this process may be killed before it ends
                print(brief(result), flush=True)
    finally:
        shutil.rmtree(scratch)
    return results


# ------------------------------------------------------------------------------------------------------------
# the table


def flat(values, prefix=""):
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    items = {}
    for key, value in values.items():
        items.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return items


def passed(key, value, bound):
    """Whether a value is within its bound, as a word; "" without a bound."""
    if bound is None:
        return ""
    is_within = value <= bound if key.endswith("_error") else value >= bound
    return "pass" if is_within else "FAIL"


def row(name, key, expected, value, verdict=""):
    """A line of the table."""
    ratio = f"{value / expected:8.2f}" if expected else ""
    return f"{name:18} {key:32} {expected:>12,.5g} {value:>12,.5g} {ratio:>8}  {verdict}"


def table(results, judges=True):
    """The lines of the table: expected and measured values, peaks against the plan, and ours against TRL's.

    judges  say which values are within their bounds; not for the tiny shapes of the CPU
    """
    yield f"{'stage':18} {'quantity':32} {'expected':>12} {'measured':>12} {'ratio':>8}"
    by_name = {result["name"]: flat(result) for result in results}
    expected = {stage.name: stage.expected or {} for stage in STAGES}
    for result in results:
        name, values = result["name"], by_name[result["name"]]
        label = f"{result['stage']} {name}"
        note = result.get("error") or result.get("reason") or ""
        yield f"{label:18} {result['status']} {note:.80}".rstrip()
        for key, (estimate, bound) in expected[name].items():
            value = values.get(key)
            if value is not None:
                yield row(label, key, estimate, value, passed(key, value, bound) if judges else "")
        for key, planned in values.items():
            peak = values.get(key.replace("planned_gb", "peak_memory_gb"))
            if judges and key.endswith("planned_gb") and planned and peak is not None:
                verdict = "pass" if abs(peak / planned - 1) <= 0.1 else "FAIL"
                yield row(label, key.replace("planned_gb", "peak_memory_gb"), planned, peak, verdict)
    for ours, theirs, estimate in COMPARED:
        speeds = by_name.get(ours, {}).get(f"long.{SPEED}"), by_name.get(theirs, {}).get(SPEED)
        if all(speeds):
            ratio = speeds[0] / speeds[1]
            yield row("", f"{ours} / {theirs}", estimate, ratio, "pass" if ratio > 1 else "FAIL")


def main():
    cfg, _ = parse(Config, sys.argv[1:], positional=["out", "seconds"])
    if cfg.stage:
        from tools import gpu_stages  # imports torch, which the process that starts the stages does not need
        gpu_stages.run_stage(cfg.stage, cfg.device, cfg.scratch, cfg.out)
        return
    stages = selected(cfg.stages)
    if cfg.list:
        parent = SHARED_MEMORY if cfg.device == "cuda" else tempfile.gettempdir()
        directory = os.path.join(parent, "gpu_check")
        for stage in stages:
            print(f"# {stage.number} {stage.name}, limit {limit_of(stage, cfg.device):g} s")
            print(shlex.join(command(stage, cfg, directory)))
        return
    if not cfg.out or not cfg.seconds:
        raise UserError("OUT or SECONDS is missing; run python tools/gpu_check.py OUT SECONDS, "
                        "for example python tools/gpu_check.py /tmp/out 420 --stages 0-6")
    results = measure_all(cfg, stages)
    lines = "\n".join(table(results, judges=cfg.device == "cuda"))
    with open(os.path.join(cfg.out, "table.txt"), "w", encoding="utf-8") as f:
        f.write(lines + "\n")
    print(lines)
    if any(result["status"] in ("failed", "timeout") for result in results):
        sys.exit(1)


if __name__ == "__main__":
    run(main)
