"""docs/fork.md: each of its diffs applies to the code as it is, and the result does what the text says."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, program

# heading -> the program under tests/programs/ that checks the change
CHECKS = {"A new setting": "fork_setting", "A new metric": "fork_metric", "Another loss": "fork_loss",
          "Another optimizer": "fork_optimizer", "Another model family": "fork_family",
          "Another data format": "fork_format", "Another schedule": "fork_schedule"}
pytestmark = pytest.mark.repo  # a fork has its own code, which the diffs need not fit


def sections():
    """heading -> diff"""
    with open(os.path.join(ROOT, "docs", "fork.md"), encoding="utf-8") as f:
        parts = re.split(r"^## ", f.read(), flags=re.M)[1:]
    return {part.splitlines()[0]: re.search(r"^```diff\n(.*?)^```", part, re.S | re.M)[1] for part in parts}


@pytest.fixture
def project(tmp_path):
    """A copy of the code and of what its own tests need."""
    directory = tmp_path / "project"
    directory.mkdir()
    for entry in os.listdir(ROOT):
        path = os.path.join(ROOT, entry)
        is_package = os.path.exists(os.path.join(path, "__init__.py"))
        if is_package or entry in ("configs", "data", "tests"):
            shutil.copytree(path, directory / entry, ignore=shutil.ignore_patterns("__pycache__"))
        elif entry.endswith((".py", ".yaml")):
            shutil.copy(path, directory)
    (directory / "models").symlink_to(os.path.join(ROOT, "models"))
    return directory


def run(command, project):
    """Run a command in the copy; it has to succeed."""
    # git must not look for a repository above the copy
    env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(project.parent)}
    result = subprocess.run(command, cwd=project, capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def apply(diff, project):
    (project / "change.diff").write_text(diff, encoding="utf-8")
    run(["git", "apply", "change.diff"], project)


def check(name, project, directory):
    """Run the program of a section in a new directory, on the copy's modules."""
    directory.mkdir()
    return program(CHECKS[name], project=project, cwd=directory)


def test_every_change_of_the_page_is_checked():
    assert list(sections()) == list(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_a_change_is_short(name):
    added = [line for line in sections()[name].splitlines() if re.match(r"\+(?!\+\+ b/)", line)]
    assert len(added) < 25
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
def test_all_changes_fit_together(project):
    """None is in the way of another. After make_config.py the tests of settings ask for nothing more."""
    for diff in sections().values():
        apply(diff, project)
    run([sys.executable, "tests/make_config.py"], project)
    run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/unit/test_config.py", "-k",
         "configuration_file or number_has_a_range or every_knob"], project)
