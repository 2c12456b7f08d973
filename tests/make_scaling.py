"""Rewrite the figures in the tables of docs/scaling.md: .venv/bin/python tests/make_scaling.py

A table stands behind a sentence with the command that all of its rows share, `python tools/plan.py ...`; each row has
the flags to add. Tests compare the page with what this makes.
"""

import contextlib
import io
import os
import re
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
PAGE = os.path.join(ROOT, "docs", "scaling.md")
sys.path.insert(0, ROOT)

from settings.parser import parse
from tools import plan

COMMAND = re.compile(r"^`python tools/plan\.py (--model qwen-\S+ .*?)`$")


@contextlib.contextmanager
def models(text):
    """The working directory has the directories with config.json that the page makes."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)
        for name, config in re.findall(r"mkdir (\S+) && echo '(.*)' >", text):
            os.mkdir(name)
            with open(os.path.join(name, "config.json"), "w") as file:
                file.write(config)
        yield
        os.chdir(before)


def printed(flags):
    """What tools/plan.py prints with these flags."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        plan.plan(parse(plan.Config, flags.split())[0])
    return out.getvalue()


def figures(flags):
    """The cells behind the flags of a row."""
    out = printed(flags)
    peak, = re.findall(r"^peak +([\d.]+) GiB", out, re.M)
    compute, = re.findall(r"^step +([\d.]+) s", out, re.M)
    node, network = re.findall(r"^ +([\d.]+) s in a node.*?, ([\d.]+) s between", out, re.M)[0]
    least, most = re.findall(r"^ +([\d.]+) s if FSDP2's.*?, ([\d.]+) s if not", out, re.M)[0]
    return [f"{float(peak):.1f}", *(f"{float(value):.1f}" for value in (compute, node, network, least, most))]


ROW = re.compile(r"\| (?:`(--.*?)`(?: \*\*best\*\*)?|\(nothing\)) \| \d")


def rows(text):
    """Yield (number of a line, the flags of its row with those of its table) of the page."""
    command = ""
    for i, line in enumerate(text.splitlines()):
        if match := COMMAND.search(line):
            command = match[1]
        if command and (match := ROW.match(line)):
            yield i, f"{command} {match[1] or ''}"


def rewritten(text):
    """The page with the figures of today."""
    lines = text.splitlines()
    with models(text):
        for i, flags in rows(text):
            peak, compute, node, network, least, most = figures(flags)
            cells = lines[i].split("|")[1].strip(), peak, compute, node, network, f"{least} to {most}"
            lines[i] = f"| {' | '.join(cells)} |"
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    with open(PAGE, encoding="utf-8") as file:
        page = rewritten(file.read())
    with open(PAGE, "w", encoding="utf-8") as file:
        file.write(page)
