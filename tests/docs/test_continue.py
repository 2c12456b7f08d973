"""docs/continue.md: its commands run in the order of the page and print what it shows; the rates and the order of the
data are as it says."""

import itertools
import json
import os
import re
import shlex
import shutil
import sys

import pytest
from helpers import EXAMPLES, ROOT, metrics

import sft
from settings.errors import UserError
from tools import merge

with open(os.path.join(ROOT, "docs", "continue.md"), encoding="utf-8") as f:
    PAGE = f.read()
FENCE = re.compile(r"^```\n(.*?)^```\n", re.S | re.M)
pytestmark = pytest.mark.repo  # the numbers are those of the embedded model


def steps_of_page():
    """[(commands, the lines that the last one prints), ...]"""
    blocks = [block.splitlines() for block in FENCE.findall(PAGE)]
    is_command = [block[0].startswith(("./train.sh", "python")) for block in blocks]
    pairs = itertools.zip_longest(zip(blocks, is_command), zip(blocks[1:], is_command[1:]), fillvalue=([], True))
    return [(block, [] if next_is_command else following)
            for (block, is_one), (following, next_is_command) in pairs if is_one]


class Stopped(Exception):
    """Ends a run before its first step."""


def run(command, monkeypatch, capfd):
    """What a command prints, by the same functions in this process. One of 180 steps ends before the first."""
    def stop(*args):
        raise Stopped

    program, *flags = shlex.split(command)
    main = {"./train.sh": sft.main, "python": merge.main}[program]
    monkeypatch.setattr(sys, "argv", ["sft.py", *flags] if program == "./train.sh" else flags)
    with monkeypatch.context() as patch:
        if "--epochs 20 " in command:
            patch.setattr(sft, "backward", stop)
        try:
            main()
        except UserError as error:
            print(f"sft.py: error: {error}")
        except Stopped:
            pass
    return "".join(capfd.readouterr())


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("continue")
    (path / "data").mkdir()
    shutil.copy(EXAMPLES, path / "data" / "example_sft.json")
    with open(EXAMPLES, encoding="utf-8") as f:
        (path / "new.json").write_text(json.dumps(json.load(f)[:30]))
    return path


def test_the_commands_print_what_the_page_shows(directory, monkeypatch, capfd):
    monkeypatch.chdir(directory)
    for commands, shown in steps_of_page():
        for command in commands:
            printed = run(command, monkeypatch, capfd)
        assert [line for line in shown if line not in printed.splitlines()] == [], printed


def rates(directory, name):
    return {line["step"]: line["lr"] for line in metrics(directory / "outputs" / name)}


def test_the_rates_are_as_the_page_says(directory):
    """wsd: 15 is the last step at the peak of 18, 30 of 36; the decay that ends a run early begins at once."""
    wsd, longer, ended, mine = (rates(directory, name) for name in ("wsd", "longer", "ended", "mine"))
    assert [step for step in wsd if wsd[step] == 4e-3] == list(range(2, 16))
    assert [step for step in longer if longer[step] == 4e-3] == list(range(16, 31))
    assert list(longer) == list(range(16, 37))
    assert list(ended) == list(range(26, 31)) and sorted(ended.values(), reverse=True) == list(ended.values())
    assert ended[26] < 4e-3 and ended[30] < 1e-3
    assert [mine[step] for step in range(28, 37)] == [1e-4] * 9


def test_the_order_of_the_data_is_as_the_page_says(directory):
    """Every continued run of four epochs has the steps of any other one; new data is all that is trained on it."""
    tokens = {name: {line["step"]: line["tokens"] for line in metrics(directory / "outputs" / name)}
              for name in ("mine", "wsd", "longer", "more", "full")}
    assert list(tokens["mine"]) == list(range(1, 37)) and len({*tokens["mine"].values()}) > 20
    for name in ("wsd", "longer"):
        assert tokens[name].items() <= tokens["mine"].items(), name
    assert list(tokens["more"]) == list(range(1, 9))
    assert sum(tokens["more"].values()) == sum(tokens["full"].values()) < sum(tokens["wsd"].values()) / 3


def test_the_links_exist_and_checkpoints_md_points_here():
    links = re.findall(r"\]\(([^)#:]+)\)", PAGE)
    assert links and all(os.path.exists(os.path.join(ROOT, "docs", link)) for link in links)
    with open(os.path.join(ROOT, "docs", "checkpoints.md"), encoding="utf-8") as f:
        assert "(continue.md)" in f.read()
