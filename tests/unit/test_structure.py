"""What the README says of the files: which may import which, and where no word of other processes stands."""

import ast
import os
import re

import pytest
from conftest import ROOT

FILES = {name[:-3] for name in os.listdir(ROOT) if name.endswith(".py")}
BENEATH = {  # what each file imports when it is imported; the others import no file of ours
    "data": {"formats"}, "samples": {"formats", "fsdp", "model"}, "diagnosis": {"data", "fsdp"},
    "pretrained": {"disk"}, "checkpoint": {"pretrained", "disk"}, "template": {"disk", "sandbox"}, "log": {"disk"},
}
PROGRAMS = {"sft", "chat", "bench", "sides", "merge", "show"}  # where the others meet


def imported(name):
    """The files of ours that a file imports at its top level."""
    with open(os.path.join(ROOT, f"{name}.py"), encoding="utf-8") as f:
        tree = ast.parse(f.read())
    found = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    return found & FILES


@pytest.mark.parametrize("name", sorted(FILES - PROGRAMS))
def test_a_file_imports_what_lies_beneath_it(name):
    """A neighbour would have to be read, and changed, with it."""
    assert imported(name) == BENEATH.get(name, set())


@pytest.mark.parametrize("name, words", [("model", "mesh|dtensor|rank|fsdp"), ("data", "mesh|dtensor|fsdp|torch.dist"),
                                         ("formats", "mesh|dtensor|rank|fsdp")])
def test_other_processes_have_no_word_in_the_model_and_the_data(name, words):
    """data.py knows ranks as two integers; what is split or summed over processes is told from outside."""
    with open(os.path.join(ROOT, f"{name}.py"), encoding="utf-8") as f:
        assert not re.findall(rf"\b\w*(?:{words})\w*", f.read(), re.IGNORECASE)
