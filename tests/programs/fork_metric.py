"""docs/fork.md, a new metric: its values, on several ranks too, and its curve. Starts in a copy that has the
change."""

import pytest
from helpers import TINY, metrics, sft_main
from ranks_of import run

import sft
from screen import report

FLAGS = ("--model", TINY, "--cache_dir", "none", "--max_steps", "3", "--lr", "1e-3")


def values(directory):
    return [line["max_loss"] for line in metrics(directory)]


run(2, [sft.__file__, *FLAGS, "--batch_size", "8", "--output_dir", "ranks"])
sft_main(*FLAGS, "--batch_size", 8, "--output_dir", "out")
sft_main(*FLAGS, "--batch_size", 1, "--output_dir", "single")

assert values("ranks") == pytest.approx(values("out"), rel=1e-4)
assert all(line["max_loss"] > line["loss"] for line in metrics("out"))
assert values("single") == pytest.approx([line["loss"] for line in metrics("single")])
assert report.Run("out").curves()["train"]["max_loss"] == pytest.approx(values("out"), rel=1e-3)
with open("out/report.html", encoding="utf-8") as f:
    assert 'data-curve="max_loss"' in f.read()
