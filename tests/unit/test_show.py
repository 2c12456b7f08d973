"""tools/show.py: conversations as the model sees them, and what --max_length would truncate."""

import os
import re
import subprocess
import sys

import pytest
from data_helpers import tiny
from helpers import ROOT, write

import data
from tools import show


def run_show(*arguments):
    command = [sys.executable, os.path.join(ROOT, "tools", "show.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_show_prints_what_the_model_sees(tmp_path, capsys):
    """Targets are marked, in green on a terminal; --ids prints ids; only -n rows are read, so the broken one is not."""
    path = write(tmp_path / "rows.json", [{"prompt": "q", "response": "é answer"}] * 3 + [{"broken": 1}])
    out = run_show("show", path, "--model", "tiny", "-n", 2).stdout
    assert out.count("---") == 2
    assert out.count("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n«é answer<|im_end|>»") == 2
    ids = run_show("show", path, "-n", 1, "--ids").stdout
    dataset = data.load(path, tiny, 100, limit=3)
    first = slice(0, dataset.starts[1])
    assert "«" + " ".join(map(str, dataset.tokens[first][dataset.loss_mask[first]])) in ids
    show.show(dataset, tiny, 1, False, True)
    assert "\x1b[32mé answer<|im_end|>\x1b[0m" in capsys.readouterr().out


def test_stats_print_what_max_length_truncates(tmp_path, monkeypatch):
    """Rows and targets beyond each length equal those that data.load truncates."""
    rows = [{"prompt": "q", "response": "word " * n} for n in (3, 600, 1500, 5000)]
    path = write(tmp_path / "rows.json", rows)
    out = run_show("stats", path, "--max_length", 512).stdout
    full = data.load(path, tiny, 10**6)
    for length in (512, 1024, 2048, 4096):
        truncated = data.load(path, tiny, length)
        lost = full.ledger.target - truncated.ledger.target
        rows = truncated.ledger.rows_truncated
        assert re.search(rf"--max_length {length:<5,} truncates {rows} rows .* and removes {lost:,} targets", out)
    assert "packing " in out
    assert "rows     4 in = 4 trained" in out


@pytest.mark.parametrize("arguments, message", [
    (("stats", "none.json"), "no such data file"),
    ((), "show or stats is missing"),
    (("show", "data/example.jsonl", "-n", "0"), "--n 0: it must be at least 1"),
])
def test_invalid_arguments_are_errors(arguments, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["show.py", *arguments])
    with pytest.raises((ValueError, OSError), match=message):
        show.main()
