"""docs/fork.md, a new metric: with --max_loss its values, on several ranks too, on the screen, in metrics.jsonl
and as a curve; without it no line has it. Starts in a copy that has the change."""

import contextlib
import io

import pytest
from helpers import TINY, metrics, sft_main
from ranks_of import run

import sft
from screen import report

FLAGS = ("--model", TINY, "--cache_dir", "none", "--max_steps", "3", "--lr", "1e-3")


def values(directory):
    return [line["max_loss"] for line in metrics(directory)]


run(2, [sft.__file__, *FLAGS, "--max_loss", "--batch_size", "8", "--output_dir", "ranks"])
screen = io.StringIO()
with contextlib.redirect_stdout(screen):
    sft_main(*FLAGS, "--max_loss", "--batch_size", 8, "--output_dir", "out")
sft_main(*FLAGS, "--max_loss", "--batch_size", 1, "--output_dir", "single")
sft_main(*FLAGS, "--batch_size", 8, "--output_dir", "without")

assert values("ranks") == pytest.approx(values("out"), rel=1e-4)
assert all(line["max_loss"] > line["loss"] for line in metrics("out"))
assert values("single") == pytest.approx([line["loss"] for line in metrics("single")])
assert f", max loss {values('out')[-1]:.3g}" in screen.getvalue()
assert not any("max_loss" in line for line in metrics("without"))
assert report.Run("out").curves()["train"]["max_loss"] == pytest.approx(values("out"), rel=1e-3)
with open("out/report.html", encoding="utf-8") as f:
    assert 'data-curve="max_loss"' in f.read()
