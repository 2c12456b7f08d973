"""docs/fork.md: each of its diffs applies to the code as it is, and what comes of it does what the text says."""

import os
import re
import shutil
import subprocess

import pytest
from helpers import ROOT, program

# heading -> the program under tests/programs/ that checks the change
CHECKS = {"Another loss": "fork_loss", "Another optimizer": "fork_optimizer", "Another model family": "fork_family",
          "Another data format": "fork_format", "Another schedule": "fork_schedule"}
pytestmark = pytest.mark.repo  # a fork has its own code, which the diffs need not fit


def sections():
    """heading -> diff"""
    with open(os.path.join(ROOT, "docs", "fork.md"), encoding="utf-8") as f:
        parts = re.split(r"^## ", f.read(), flags=re.M)[1:]
    return {part.splitlines()[0]: re.search(r"^```diff\n(.*?)^```", part, re.S | re.M)[1] for part in parts}


def test_every_change_of_the_page_is_checked():
    assert list(sections()) == list(CHECKS)
    assert all(diff.count("\n+") - diff.count("\n+++") < 25 for diff in sections().values())  # short ones


@pytest.mark.parametrize("name", CHECKS)
def test_the_change_applies_and_works(tmp_path, pytestconfig, name):
    """In a copy of the project, by git apply, as the page says; and, with --full, the check fails without the change."""
    for entry in os.listdir(ROOT):
        path = os.path.join(ROOT, entry)
        if os.path.isdir(path) and (entry == "data" or os.path.exists(os.path.join(path, "__init__.py"))):
            shutil.copytree(path, tmp_path / entry)
        elif entry.endswith(".py"):
            shutil.copy(path, tmp_path)
    (tmp_path / "change.diff").write_text(sections()[name], encoding="utf-8")
    if pytestconfig.getoption("--full"):
        assert program(CHECKS[name], project=tmp_path, cwd=tmp_path).returncode != 0
        for left in ("out", "straight", "again"):
            shutil.rmtree(tmp_path / left, ignore_errors=True)
    applied = subprocess.run(["git", "apply", "change.diff"], cwd=tmp_path, capture_output=True, text=True,
                             env={**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)})
    assert applied.returncode == 0, applied.stderr
    result = program(CHECKS[name], project=tmp_path, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
