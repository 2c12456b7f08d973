"""--profile: which steps the trace has, early ends, and the memory snapshot of CUDA."""

import gzip
import json
import re
from types import SimpleNamespace

import pytest
import torch
from helpers import FAST
from torch.cuda import _memory_viz

from screen import profiler


pytestmark = pytest.mark.filterwarnings("error:.*Profiler clears events")  # nothing of that on the screen


@pytest.fixture
def run(tmp_path):
    """A function: traces a run whose steps are one product each; returns the steps that it took and those traced."""

    def run(steps, stop=None, n=3, rank=0, device="cpu"):
        cfg = SimpleNamespace(profile=n, output_dir=str(tmp_path))
        taken = []
        for step in profiler.profiled(steps, cfg, SimpleNamespace(rank=rank, device=torch.device(device))):
            taken.append(step)
            with torch.profiler.record_function(f"step {step}"):
                torch.ones(10) @ torch.ones(10)
            if step == stop:
                break
        path = tmp_path / "trace.json.gz"
        if not path.exists():
            return taken, None
        with gzip.open(path, "rt") as f:
            names = {event["name"] for event in json.load(f)["traceEvents"]}
        path.unlink()
        assert "aten::dot" in names
        return taken, sorted(int(name[5:]) for name in names if re.fullmatch(r"step \d+", name))

    return run


def test_the_trace_has_the_steps_after_the_warm_up(run, capsys, tmp_path, recwarn):
    """From the first step of this run, which a resumed run has too; every step is taken once."""
    for steps in range(1, 9), range(7, 12):
        assert run(steps) == (list(steps), list(steps[2:5]))
        assert f"profile  {tmp_path}/trace.json.gz: 3 of 3 steps" in capsys.readouterr().out
    assert run(range(1, 6), n=None) == ([1, 2, 3, 4, 5], None)
    assert run(range(1, 6), rank=1) == ([1, 2, 3, 4, 5], None)
    assert not [str(warning.message) for warning in recwarn]


def test_a_run_that_ends_early_has_a_shorter_trace(run, capsys):
    """It has too few steps, or stops in step 4, of which the trace has a part."""
    assert run(range(1, 5)) == ([1, 2, 3, 4], [3, 4])
    assert "2 of 3 steps" in capsys.readouterr().out
    assert run(range(1, 9), stop=4) == ([1, 2, 3, 4], [3, 4])
    assert "1 of 3 steps" in capsys.readouterr().out


def test_a_run_of_the_warm_up_only_says_so(run, capsys):
    assert run(range(1, 3)) == ([1, 2], None)
    assert "profile  nothing is written: the first 2 steps are not traced, and this run had 2" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_the_memory_snapshot_is_json_that_torch_can_draw(run, capsys, monkeypatch, tmp_path):
    """The allocator is recorded from the first step, and no longer than needed; without CUDA a line says so."""
    run(range(1, 9))
    assert "no memory snapshot: only CUDA has one" in capsys.readouterr().out
    assert not (tmp_path / "memory.json.gz").exists()
    frames = [{"filename": "sft.py", "line": 7, "name": "backward"}]
    block = {"size": 512, "requested_size": 500, "address": 4096, "state": "active_allocated", "frames": frames}
    segment = {"address": 4096, "total_size": 2**21, "stream": 0, "segment_type": "small", "segment_pool_id": (0, 0),
               "allocated_size": 512, "active_size": 512, "requested_size": 500, "device": 0, "is_expandable": False,
               "blocks": [block, {**block, "state": "inactive", "size": 2**21 - 512, "address": 4608}]}
    event = {"action": "alloc", "addr": 4096, "size": 512, "stream": 0, "time_us": 1, "frames": frames}
    snapshot = {"segments": [segment], "device_traces": [[event]], "allocator_settings": {"expandable_segments": True}}
    calls = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda enabled="all", **_: calls.append(enabled))
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: calls.append("snapshot") or snapshot)
    run(range(1, 9), device="cuda")
    assert calls == ["all", "snapshot", None]
    with gzip.open(tmp_path / "memory.json.gz", "rt") as f:
        written = json.load(f)
    assert written == json.loads(json.dumps(snapshot))
    assert "Active Memory Timeline" in _memory_viz.trace_plot(written)
    assert "total_allocated: 500.0B" in _memory_viz.segsum(written)
    assert f"{tmp_path}/memory.json.gz: the memory" in capsys.readouterr().out


@pytest.mark.full
def test_a_run_with_profile_computes_the_same(train, tmp_path, capsys):
    """The trace has the backward pass and the update of each traced step; the losses are those without it."""
    flags = (*FAST, "--max_length", 64, "--max_steps", 4)
    plain = train(*flags, out="plain")
    traced = train(*flags, "--profile", 2)
    assert [line["loss"] for line in traced] == [line["loss"] for line in plain]
    assert "profile  out/trace.json.gz: 2 of 2 steps" in capsys.readouterr().out
    with gzip.open(tmp_path / "out" / "trace.json.gz", "rt") as f:
        names = [event["name"] for event in json.load(f)["traceEvents"]]
    assert sum(name == "aten::_fused_adamw_" for name in names) == 2 * 2  # with and without weight decay
    assert any(name.startswith("autograd::engine::evaluate_function") for name in names)
    assert not (tmp_path / "plain" / "trace.json.gz").exists()
