"""tools/bench.py: speed of a list of steps, a run that is killed before it saves, FLOPs, flags that do not fit."""

import os
import shutil

import pytest

import data
from families.config import ModelConfig
from ops import flops
from settings.parser import parse
from text.template import ChatTokenizer
from tools import bench, bench_sides

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


def test_useful_flops_are_those_of_every_conversation_once(tmp_path):
    bench.write_model(str(tmp_path), SHAPE)
    bench.write_rows(str(tmp_path / "rows.json"), 10)
    cfg, _ = parse(bench.Config, ["--part", "step"])
    dataset = data.load(str(tmp_path / "rows.json"), ChatTokenizer(str(tmp_path)), bench.LENGTH)
    steps = bench.useful_flops(cfg, SHAPE, str(tmp_path))
    config = ModelConfig.from_dict(SHAPE)
    assert len(steps) == 3
    assert sum(steps) == flops.step_flops(config, dataset.n_inputs, dataset.n_targets.sum(), is_lora=False)


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
