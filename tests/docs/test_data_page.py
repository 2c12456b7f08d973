"""docs/data.md: each example of a row gives what the page says, and its tables have each key that is known."""

import json
import os
import re

import pytest
from helpers import ROOT

from settings.errors import UserError
from text import keys
from text.formats import KEYS, read_row

with open(os.path.join(ROOT, "docs", "data.md"), encoding="utf-8") as f:
    PAGE = f.read()
# an example: a row, the flags that it needs, and what it becomes
EXAMPLES = re.findall(r"^([{\[].*?)(?:  # (--.*))?\n→ (.*)$", PAGE, re.M)


def result(row, names):
    """What a row becomes, as the page writes it."""
    try:
        read = read_row(row, "rows.json[0]", names)
    except UserError as error:
        return f"error: {str(error).removeprefix('rows.json[0]: ')}"
    parts = [f"dropped: {read.dropped}"] if read.dropped else []
    for message in read.messages or ():
        calls = f" calls {json.dumps(message['tool_calls'])}" if "tool_calls" in message else ""
        thought = f" reasoning {json.dumps(message['reasoning_content'])}" if "reasoning_content" in message else ""
        is_default = message["role"] != "assistant" or message["weight"] == 1
        weight = "" if is_default else f" (weight {message['weight']:g})"
        parts.append(f"{message['role']}{thought} {json.dumps(message['content'])}{calls}{weight}")
    if read.text:
        parts.append(f"text {json.dumps(read.text)}")
    if read.tokens:
        parts.append("tokens {} weights {}".format(*map(json.dumps, read.tokens)))
    if read.tools:
        parts.append("tools " + ", ".join(tool["function"]["name"] for tool in read.tools))
    if read.template_kwargs:
        parts.append(f"template variables {json.dumps(read.template_kwargs)}")
    return " · ".join(parts) + (f"; not used: {', '.join(read.unused)}" if read.unused else "")


def test_there_are_examples():
    assert len(EXAMPLES) > 40 and PAGE.count("\n→ ") == len(EXAMPLES)


@pytest.mark.parametrize("row, flags, expected", EXAMPLES, ids=[row for row, *_ in EXAMPLES])
def test_an_example_is_true(row, flags, expected):
    """A result is exact; of an error the page may have the beginning only."""
    named = dict(re.findall(r"--(\w+)_key (\S+)", flags))
    got = result(json.loads(row), tuple(named.get(key, key) for key in KEYS))
    if expected.startswith("error: ") and expected.endswith(" …"):
        assert got.startswith(expected.removesuffix(" …"))
    else:
        assert got == expected


@pytest.mark.parametrize("table", [keys.ROW_KEYS, keys.MESSAGE_KEYS], ids=["rows", "messages"])
def test_the_page_has_each_key(table):
    """With what it does and who writes it, as in text/keys.py."""
    lines = PAGE.splitlines()
    missing = [line for line in map(line_of, table) if line not in lines]
    assert not missing, "\n".join(["docs/data.md lacks these lines:", *missing])


def line_of(key):
    """The line of a key in a table of the page."""
    return f"| {', '.join(f'`{name}`' for name in key.names.split())} | {key.meaning} | {key.writers} |"


def test_the_page_has_each_role():
    for role in {*keys.ROLES.values()}:
        names = ", ".join(f"`{name}`" for name, found in keys.ROLES.items() if found == role)
        assert f"| {role} | {names} |" in PAGE
