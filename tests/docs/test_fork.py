"""docs/fork.md: each of its diffs applies to the current code, does what the text says, and leaves the default
suite green."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, program

# heading -> the program under tests/programs/ that checks the change, and its arguments
CHECKS = {"A new setting": "fork_setting", "A new metric": "fork_metric",
          "A logger of your own": "fork_logger", "DFT": "fork_loss dft", "z-loss": "fork_loss z_loss",
          "Label smoothing": "fork_loss label_smoothing",
          "Another optimizer": "fork_optimizer", "Another model family": "fork_family",
          "Another data format": "fork_format", "Another schedule": "fork_schedule"}
MOST_LINES = {"Another optimizer": 60}  # that a diff may add; 25 of the others
pytestmark = pytest.mark.repo  # a fork has its own code, which the diffs need not fit


def sections():
    """heading -> diff"""
    with open(os.path.join(ROOT, "docs", "fork.md"), encoding="utf-8") as f:
        parts = re.split(r"^##+ ", f.read(), flags=re.M)[1:]
    diffs = {part.splitlines()[0]: re.search(r"^```diff\n(.*?)^```", part, re.S | re.M) for part in parts}
    return {heading: diff[1] for heading, diff in diffs.items() if diff}


@pytest.fixture
def project(tmp_path):
    """A copy of the project without its history, as a fork has it; its .venv is the one here."""
    directory = tmp_path / "project"
    others = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", "outputs")
    shutil.copytree(ROOT, directory, ignore=others)
    if os.path.exists(os.path.join(ROOT, ".venv")):
        (directory / ".venv").symlink_to(os.path.realpath(os.path.join(ROOT, ".venv")))
    return directory


def run(command, project):
    """Run a command in the copy; it has to succeed."""
    # git must not look for a repository above the copy
    env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(project.parent)}
    result = subprocess.run(command, cwd=project, capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stdout[-20000:] + result.stderr[-5000:]
    return result.stdout


def apply(diff, project):
    (project / "change.diff").write_text(diff, encoding="utf-8")
    run(["git", "apply", "change.diff"], project)


def check(name, project, directory):
    """Run the program of a section in a new directory, on the copy's modules."""
    directory.mkdir()
    return program(*CHECKS[name].split(), project=project, cwd=directory)


def test_every_change_of_the_page_is_checked():
    assert list(sections()) == list(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_a_change_is_short(name):
    added = [line for line in sections()[name].splitlines() if re.match(r"\+(?!\+\+ b/)", line)]
    assert len(added) <= MOST_LINES.get(name, 25)
    assert [line for line in added if len(line) > 111] == []


@pytest.mark.parametrize("name", CHECKS)
def test_the_change_applies_and_works(project, tmp_path, pytestconfig, name):
    """By git apply, as the page says. With --full, the check also fails on the code without the change."""
    if pytestconfig.getoption("--full"):
        assert check(name, project, tmp_path / "before").returncode != 0
    apply(sections()[name], project)
    result = check(name, project, tmp_path / "after")
    assert result.returncode == 0, result.stderr


@pytest.mark.full
@pytest.mark.parametrize("name", CHECKS)
def test_the_default_suite_is_green_with_the_change(project, name):
    """All that `bash tests/run.sh` runs, after make_config.py. Minutes each: choose one with -k."""
    apply(sections()[name], project)
    run([sys.executable, "tests/make_config.py"], project)
    printed = run([sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", "--rootdir", "tests",
                   "-p", "no:cacheprovider", "tests"], project)
    assert re.search(r"^\d+ passed", printed.splitlines()[-1]), printed[-2000:]


@pytest.mark.full
def test_all_changes_fit_together(project):
    """No diff conflicts with another. After make_config.py the tests of settings pass."""
    for diff in sections().values():
        apply(diff, project)
    run([sys.executable, "tests/make_config.py"], project)
    run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--repo", "tests/unit/test_config.py"],
        project)
