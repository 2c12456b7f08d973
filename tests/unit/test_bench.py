"""tools/bench.py: speed of a list of steps, a run that is killed before it saves, FLOPs, flags that do not
fit, old figures beside new ones."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

import data
from families.config import ModelConfig
from model import CausalLM
from ops import flops
from settings.errors import UserError
from settings.parser import parse
from text.template import ChatTokenizer
from tools import bench, bench_sides, compare, gpu_check

SHAPE = {**bench.SMALL, "num_hidden_layers": 1}


def test_speed_is_the_median_of_steps_6_to_20_on_cuda_and_that_of_all_but_the_first_on_the_cpu():
    """The first five steps are slow, a later one too, and step 21 is not counted."""
    steps = [(100.0, 10)] * 5 + [(2.0, 20)] * 7 + [(50.0, 20)] + [(1.0, 20)] * 7 + [(0.001, 20)] * 9
    assert bench_sides.speed(steps, "cuda") == 10.0
    assert bench_sides.speed([(100.0, 7), (1.0, 10), (3.0, 30)], "cpu") == 10.0


def test_a_killed_run_returns_its_first_steps_and_saves_nothing(tmp_path, monkeypatch):
    """An epoch has 4 steps, of which 3 are wanted; the output directory is removed."""
    bench.write_model(str(tmp_path), SHAPE)
    bench.write_rows(str(tmp_path / "rows.json"), 16)
    removed, remove = [], shutil.rmtree

    def rmtree(path):
        removed.append((path, os.listdir(os.path.join(path, "checkpoints"))))
        remove(path)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    lines = bench.train(str(tmp_path), 1, 3, "--train_data", str(tmp_path / "rows.json"), saves=False)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert removed == [(str(tmp_path / "run"), [])]


@pytest.mark.full
def test_the_plan_of_a_run_is_its_peak_within_a_tenth(tmp_path, monkeypatch):
    """Two of the runs of --part plan, whose peaks vary least."""
    kinds = {"32k": "--no-gradient_checkpointing", "152k": "--optimizer_offload"}
    planned = {shape: (*bench.PLANNED[shape][:2], (kind,)) for shape, kind in kinds.items()}
    monkeypatch.setattr(bench, "PLANNED", planned)
    monkeypatch.setattr(bench, "PLANNED_RANKS", {})
    figures = bench.bench_plan(parse(bench.Config, ["--part", "plan", "--repeats", "1"])[0], str(tmp_path))
    assert list(figures["runs"]) == [" ".join(item) for item in kinds.items()]
    assert figures["largest_difference"] <= 0.1


def test_useful_flops_are_those_of_every_conversation_once(tmp_path):
    bench.write_model(str(tmp_path), SHAPE)
    bench.write_rows(str(tmp_path / "rows.json"), 10)
    cfg, _ = parse(bench.Config, ["--part", "step"])
    dataset = data.load(str(tmp_path / "rows.json"), ChatTokenizer(str(tmp_path)), bench.LENGTH)
    steps = bench.useful_flops(cfg, SHAPE, str(tmp_path))
    config = ModelConfig.from_dict(SHAPE)
    assert len(steps) == 3
    with torch.device("meta"):
        matrices = flops.Matrices.of(CausalLM(config))
    assert sum(steps) == flops.step_flops(config, matrices, dataset.n_inputs, dataset.n_targets.sum())


@pytest.fixture
def tiny_delta(monkeypatch):
    """--part delta in this process, on a tiny model."""
    small = dict(hidden_size=32, intermediate_size=64, vocab_size=61, num_attention_heads=2, num_key_value_heads=1,
                 head_dim=16, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
                 linear_value_head_dim=8)
    monkeypatch.setattr(bench_sides, "QWEN_35", {**bench_sides.QWEN_35, **small})
    monkeypatch.setattr(bench_sides, "PACKINGS", {"one": (9,), "short": (5, 9, 3)})
    monkeypatch.setattr(bench, "start_sides", lambda n, flag, side: [bench_sides.SIDES[side](cfg)])
    cfg, _ = parse(bench.Config, ["--part", "delta", "--repeats", "2"])
    return lambda: json.loads(json.dumps(bench.bench_delta(cfg, None)))


@pytest.mark.full
def test_delta_compares_the_same_loss_in_alternating_rounds(tiny_delta, monkeypatch):
    """One packed micro-batch against each document alone and one padded batch; the warm-up does not count."""
    order, now, losses = [], [0.0], bench_sides.delta_losses

    def slow(ours, theirs, side, documents):
        order.append((side, len(documents)))
        now[0] += {"sft": 2.0, "alone": 4.0, "padded": 8.0}[side] * (100 if len(order) <= 2 else 1)
        return losses(ours, theirs, side, documents)

    monkeypatch.setattr(bench_sides, "delta_losses", slow)
    monkeypatch.setattr(bench_sides.time, "perf_counter", lambda: now[0])
    line = tiny_delta()
    assert order == [("sft", 1), ("alone", 1)] * 3 + [("sft", 3), ("alone", 3), ("padded", 3)] * 3
    assert line["one_seconds"] == {"sft": [2.0] * 3, "alone": [4.0] * 3, "sft_to_alone": 0.5}
    assert line["short_seconds"]["padded"] == [8.0] * 3 and line["short_seconds"]["sft_to_padded"] == 0.25
    assert line["short_thread_seconds"]["alone"][0] > 0
    assert line["layers"] == 4 and line["kept_linear_to_attention"] > 0


@pytest.mark.full
@pytest.mark.parametrize("broken", ["alone", "padded"])
def test_delta_refuses_to_compare_another_loss(broken, tiny_delta, monkeypatch):
    losses = bench_sides.delta_losses

    def other(ours, theirs, side, documents):
        if side == broken and len(documents) > 1:
            documents = documents[1:]
        return losses(ours, theirs, side, documents)

    monkeypatch.setattr(bench_sides, "delta_losses", other)
    with pytest.raises(AssertionError):
        tiny_delta()


@pytest.mark.parametrize("flags, message", [
    ("--part loss --device cuda", "--device cuda works with --part step only"),
    ("--device cuda", "--device cuda works with --part step only"),
    ("--part step --device cuda --vs transformers", "and there with --vs trl"),
    ("--part step --device cuda", "torch finds no CUDA device; use --device cpu"),
    ("--side trl_packed", "--side trl_packed needs --directory DIR")])
def test_flags_that_do_not_fit_are_errors(flags, message, monkeypatch):
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        parse(bench.Config, flags.split())


# ---- --compare ----------------------------------------------------------------------------------------------------

SPEED = "tokens_per_second"
VERSIONS = {"python": "3.12.1", "torch": "2.11.0"}
OLD = [  # not in the order of gpu_check.STAGES
    {"stage": 5, "name": "trl_0.5b", "status": "ok", "seconds": 30.0, "limit": 60, SPEED: 80e3, "first": 1.8e9},
    {"stage": 0, "name": "hardware", "status": "ok", "seconds": 9.0, "limit": 40, "gpu": "NVIDIA H200", "cores": 16,
     "versions": VERSIONS, "nvidia_smi": "580.1, 143771, 0, 1980, 700.00", "product_tflops": 700.0, "syncs": 0},
    {"stage": 4, "name": "compiled_0.5b", "status": "ok", "seconds": 60.0, "limit": 75, "only_old": 1.0,
     "checks": {"equal": True}, "long": {SPEED: 120e3, "seconds": 0.125, "step_s": [1.0, 2.0]}},
    {"stage": 2, "name": "laws", "status": "timeout", "seconds": 110.0, "limit": 110, "bf16_loss_error": 1.0},
]
NEW = [
    {**OLD[1], "product_tflops": 350.0, "cores": 8, "versions": {**VERSIONS, "torch": "2.13.0"}},
    {"stage": 4, "name": "compiled_0.5b", "status": "ok", "seconds": 50.0, "limit": 75, "checks": {"equal": True},
     "long": {SPEED: 90e3, "seconds": 0.25, "only_new": 3, "step_s": [1.0, 2.0]}},
    {**OLD[0], "seconds": 20.0, SPEED: 75e3, "first": 1.9e9},
    {**OLD[3], "status": "ok"},
    {"stage": 7, "name": "lora_7b", "status": "skipped", "reason": "planted"},
]
CPU = [{**OLD[1], "gpu": "", "limit": gpu_check.CPU_LIMIT}]
del CPU[0]["nvidia_smi"]
A_LINE = "it must be a results.json of tools/gpu_check.py, such as docs/gpu.json"


@pytest.fixture
def compared(tmp_path, monkeypatch, capsys):
    """A function: old and new results (objects or text), flags -> lines that are printed, "" for --directory OUT."""
    def run(old, new=None, *flags):
        for path, results in ((tmp_path / "old.json", old), (tmp_path / "out" / "results.json", new)):
            path.parent.mkdir(exist_ok=True)
            if results is not None:
                path.write_text(results if isinstance(results, str) else json.dumps(results))
        directory = () if flags else ("--directory", str(tmp_path / "out"))
        monkeypatch.setattr("sys.argv", ["compare.py", "--compare", str(tmp_path / "old.json"), *directory, *flags])
        compare.main()
        return capsys.readouterr().out.splitlines()

    return run


def test_compare_prints_old_beside_new(compared):
    """Each figure that both have, of stages that are ok in both, in the order of STAGES; then the ratio to TRL."""
    lines = compared(OLD, NEW)
    assert lines[:3] == ["old: NVIDIA H200, driver 580.1, torch 2.11.0, 16 CPU cores",
                         "new: NVIDIA H200, driver 580.1, torch 2.13.0, 8 CPU cores", ""]
    table = lines[3:lines.index("", 3)]
    assert [line.split() for line in table] == [
        ["stage", "quantity", "old", "new", "new/old"],
        ["hardware", "product_tflops", "700", "350", "0.500"],
        ["hardware", "syncs", "0", "0", "-"],
        ["compiled_0.5b", f"long.{SPEED}", "120,000", "90,000", "0.750"],
        ["compiled_0.5b", "long.seconds", "0.125", "0.25", "2.000"],
        ["trl_0.5b", SPEED, "80,000", "75,000", "0.938"],
        "ours / TRL compiled_0.5b / trl_0.5b 1.5 1.2 0.800".split()]
    assert len({len(line) for line in table}) == 1
    assert lines[-1] == "Not compared, with their status in old and new: laws (timeout, ok), lora_7b (absent, skipped)"


def test_compare_escapes_what_files_say(compared):
    """A name in a file could hold codes that change what the terminal shows."""
    results = [{**NEW[0], "gpu": "H\x1b[2J", "a\x1b[31m": 1.0}, *NEW[1:]]
    text = "\n".join(compared(results, results))
    assert "\x1b" not in text and r"H\x1b[2J" in text and r"a\x1b[31m" in text


@pytest.mark.parametrize("gpu, beginning", [("NVIDIA H100", "The GPUs differ: "), ("", "One of the GPUs is not known: "),
                                            ("NVIDIA H200\nNVIDIA H200", None)])
def test_compare_says_that_the_gpus_differ(gpu, beginning, compared):
    """One line. nvidia-smi has a line for each GPU of a machine."""
    line = compared(OLD, [{**NEW[0], "gpu": gpu}, *NEW[1:]])[2]
    rule = "speeds of two GPUs cannot be compared, only ratios between stages of one column."
    assert line == (beginning + rule if beginning else "")


def test_compare_is_at_most_110_columns_wide(compared):
    """Longer keys are cut, and the list of stages without figures is wrapped."""
    long = [{**OLD[1], "k" * 200: 1234567.0, "gpu": "G" * 200}]
    failed = [{"name": f"stage_{i}", "status": "failed"} for i in range(30)]
    lines = compared(long + failed, long)
    assert max(map(len, lines)) == 110 and sum("k" * 40 in line for line in lines) == 1
    assert " ".join(lines).count("(failed, absent)") == 30


@pytest.mark.parametrize("old, new, flags, message", [
    (None, NEW, (), f"old.json: there is no file .*old.json; {A_LINE}"),
    ("{", NEW, (), f"old.json is not JSON .*; {A_LINE}"),
    ({"hardware": {}}, NEW, (), f"is no list of results with a name and a status; {A_LINE}"),
    ([{"name": "hardware"}], NEW, (), f"is no list of results with a name and a status; {A_LINE}"),
    (OLD, None, (), f"--directory .*out: there is no file .*out/results.json; {A_LINE}"),
    (OLD, NEW[3:], (), "no figure in common with .*; ok in FILE are hardware, compiled_0.5b, trl_0.5b"),
    (OLD, CPU, (), "one of it and .* was measured on a GPU, the other on the CPU with tiny shapes; use an OUT"),
    (OLD, None, ("--device", "cpu"), r"a GPU \(NVIDIA H200\), and --device cpu measures tiny shapes; use --device cuda"),
    (OLD, None, ("--device", "cuda"), r"and torch finds no GPU here; .* or --directory OUT for results that exist"),
    (OLD[2:3], None, ("--device", "none"), r"a GPU \(unknown\), and torch finds no GPU here; use --device cuda"),
    (CPU, None, ("--device", "cuda"), "--device cuda: .* was measured on the CPU .*; use --device cpu"),
    ([{**CPU[0], "status": "failed"}], None, ("--device", "cpu"), "none of the stages .* is ok in it; use another"),
    (OLD, NEW, ("--directory", "out", "--device", "cuda"), "--directory out does not work with --device")])
def test_files_that_cannot_be_compared_are_errors(old, new, flags, message, compared, monkeypatch):
    """Before anything runs, in one line."""
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(compare.subprocess, "run", None)
    with pytest.raises(UserError, match=message) as info:
        compared(old, new, *flags)
    assert "\n" not in str(info.value)


def test_compare_takes_the_gpu_if_there_is_one(compared, monkeypatch):
    """The stages of FILE that are ok, in one call of gpu_check whose SECONDS fit their limits."""
    started = []
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(compare.subprocess, "run", started.append)
    with pytest.raises(UserError, match="results.json"):  # the planted run has written none
        compared(OLD, None, "--device", "none")
    program, out, seconds, *flags = started[0][1:]
    limits = {stage.name: stage.limit for stage in gpu_check.STAGES}
    assert program.endswith("gpu_check.py") and os.path.isdir(out)
    assert float(seconds) > limits["hardware"] + limits["compiled_0.5b"] + limits["trl_0.5b"]
    assert flags == ["--device", "cuda", "--stages", "hardware,compiled_0.5b,trl_0.5b"]
    os.rmdir(out)


@pytest.mark.parametrize("other", ["--part step", "--side plain_loop --directory DIR", "--vs trl"])
def test_compare_does_not_work_with_other_parts(other):
    with pytest.raises(UserError, match="--compare FILE does not work with --"):
        parse(bench.Config, f"--compare FILE {other}".split())


@pytest.mark.full
def test_compare_measures_the_stages_of_a_file(tmp_path):
    """bench.py --compare FILE, FILE of the CPU: stage 0 runs on tiny shapes; its OUT can be compared again."""
    (tmp_path / "old.json").write_text(json.dumps(CPU))
    command = [sys.executable, bench.__file__, "--compare", str(tmp_path / "old.json")]
    (tmp_path / "temporary").mkdir()
    result = subprocess.run([*command, "--device", "cpu"], capture_output=True, text=True,
                            env={**os.environ, "TMPDIR": str(tmp_path / "temporary")})
    assert result.returncode == 0, result.stdout + result.stderr
    (out,) = (tmp_path / "temporary").glob("compare_*")
    lines = result.stdout.splitlines()
    assert lines[0].startswith("measuring 1 stages, at most 310 s") and lines[0].endswith(str(out))
    assert lines[1].startswith("0 hardware: ok")
    old, new = (line for line in lines if line.startswith(("old: ", "new: ")))
    assert "CPU, tiny shapes, torch 2.11.0" in old and f"CPU, tiny shapes, torch {bench.torch.__version__}" in new
    (new_rate,) = (values["product_tflops"] for values in json.loads((out / "results.json").read_text()))
    (row,) = (line.split() for line in lines if line.startswith("hardware") and "product_tflops" in line)
    assert row[2:] == ["700", f"{new_rate:,.6g}", f"{new_rate / 700:.3f}"]
    again = subprocess.run([*command, "--directory", str(out)], capture_output=True, text=True)
    assert again.stdout.splitlines() == lines[lines.index(old):]
