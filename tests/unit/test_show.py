"""tools/show.py: conversations as the model sees them, and what max_length would cut."""

import os
import re
import subprocess
import sys

import pytest
from data_helpers import tiny
from helpers import ROOT, write

import data
from tools import show


def look(*words):
    command = [sys.executable, os.path.join(ROOT, "tools", "show.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


def test_show_prints_what_the_model_sees(tmp_path, capsys):
    """Targets are marked, in green on a terminal; ids on request; only so many rows are read."""
    path = write(tmp_path / "rows.json", [{"prompt": "q", "response": "é answer"}] * 3 + [{"broken": 1}])
    out = look("show", path, "--model", "tiny", "-n", 2).stdout
    assert out.count("---") == 2
    assert out.count("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n«é answer<|im_end|>»") == 2
    ids = look("show", path, "-n", 1, "--ids").stdout
    dataset = data.load(path, tiny, 100, limit=3)
    first = slice(0, dataset.starts[1])
    assert "«" + " ".join(map(str, dataset.tokens[first][dataset.loss_mask[first]])) in ids
    show.show(dataset, tiny, 1, False, True)
    assert "\x1b[32mé answer<|im_end|>\x1b[0m" in capsys.readouterr().out


def test_stats_say_what_max_length_cuts(tmp_path, monkeypatch):
    """Rows and target tokens beyond each length, by another count of the same."""
    rows = [{"prompt": "q", "response": "word " * n} for n in (3, 600, 1500, 5000)]
    path = write(tmp_path / "rows.json", rows)
    out = look("stats", path, "--max_length", 512).stdout
    whole = data.load(path, tiny, 10**6)
    for length in (512, 1024, 2048, 4096):
        cut = data.load(path, tiny, length)
        lost = whole.ledger.target - cut.ledger.target
        cuts = rf"--max_length {length:<5,} cuts {cut.ledger.rows_truncated} rows .* and {lost:,} target"
        assert re.search(cuts, out)
    assert "packing " in out and "rows     4 in = 4 trained" in out
    for words, message in ((("stats", str(tmp_path / "none.json")), "no such data file"), ((), "what to do?"),
                           (("show", path, "-n", "0"), "--n 0: it must be at least 1")):
        monkeypatch.setattr(sys, "argv", ["show.py", *words])
        with pytest.raises((ValueError, OSError), match=message):
            show.main()
