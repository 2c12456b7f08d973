"""docs/decisions.md and CONTRIBUTING.md: the index has every topic, and what they name exists."""

import os
import re

import pytest
from helpers import ROOT

pytestmark = pytest.mark.repo
PAGES = ("docs/decisions.md", "CONTRIBUTING.md")


def read(name):
    with open(os.path.join(ROOT, name), encoding="utf-8") as f:
        return f.read()


@pytest.mark.parametrize("name", PAGES)
def test_every_test_file_and_program_exists(name):
    text = re.sub(r"^\|.*\| later \|.*$", "", read(name), flags=re.M)  # what is planned need not exist
    named = set(re.findall(r"\b(?:tests|tools|docs|ops|text|disk|ranks|settings|screen)/[\w/.]*\.\w+", text))
    missing = [path for path in named - {"tools/NAME.py"} if not os.path.exists(os.path.join(ROOT, path))]
    assert len(named) > 10 and missing == []


def test_the_index_has_every_topic():
    page = read("docs/decisions.md")
    topics = re.findall(r"^## (\d+)\. (.*)$", page, re.M)
    assert re.findall(r"^(\d+)\. \[(.*)\]\(", page, re.M) == topics and len(topics) > 10
    links = re.findall(r"\]\(#([\w-]+)\)", page)
    slugs = {f"{number}-{re.sub(r'[^a-z -]', '', title.lower()).replace(' ', '-')}" for number, title in topics}
    assert set(links) == slugs


def test_a_single_test_of_contributing_exists():
    """The command for one test names a test that exists."""
    (path, name), = re.findall(r"tests/run\.sh (tests/\S+\.py)::(\w+)", read("CONTRIBUTING.md"))
    assert f"\ndef {name}(" in read(path)
