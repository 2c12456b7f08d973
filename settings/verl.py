"""verl's settings for SFT -> ours, by verl.yaml's tables. parser.py asks here for names that are not ours.

    python -m settings.verl > docs/verl.md      # the tables as a page; a test compares the two

A key that is `taken` sets ours. One that is `warned` changes no number here: one line. One that is `refused`
would change what is trained: an error. Neither happens where the value asks for what happens anyway.
"""

import fnmatch
import functools
import os
import re

import yaml

from settings import verl_values
from settings.errors import UserError


@functools.cache
def tables():
    """verl.yaml, all of it as text. Read on first use: most runs have no name of verl's."""
    with open(os.path.join(os.path.dirname(__file__), "verl.yaml"), encoding="utf-8") as file:
        return yaml.load(file, yaml.BaseLoader)


@functools.cache
def rows():
    """{key: its row: "kind" (taken, warned or refused), "note", and the columns that verl.yaml explains}"""
    found = {key: {"kind": "taken", "note": "", **row} for key, row in tables()["taken"].items()}
    for kind in "warned", "refused":
        for reason, keys in tables()[kind].items():
            found |= {key: {"kind": kind, "note": reason, "same": same} for key, same in keys.items()}
    return found


@functools.cache
def elsewhere():
    """{name in TRL, torchtune or LLaMA-Factory: ours}"""
    return {theirs: ours for ours, names in tables()["elsewhere"].items() for theirs in names.split()}


def fields_set():
    """The settings of ours that keys of verl's set."""
    return {field for row in rows().values() for field in row.get("sets", "").split()}


def key_of(name):
    """The key of the tables that a name means: verl has several places for the same one."""
    for prefix, instead in tables()["prefixes"].items():
        if name.startswith(prefix):
            name = instead + name.removeprefix(prefix)
    return name


def row_name(key):
    """The name of a key's own row, or of the row for all keys below one of its parents; None without one."""
    parents = [key[:i] + ".*" for i, char in enumerate(key + ".") if char == "."]
    names = ["*._target_"] if key.endswith("._target_") else [key, *parents[::-1]]
    return next((name for name in names if name in rows()), None)


def translate(given):
    """([(index, our field, text of its value), ...], [warning, ...]) of all that is given in verl's words.

    given  {key: (text of its value, where it was given, index)}

    Keys are read together: one may decide what another means, and ${a.b} is the value of another.
    Raises UserError for a value that would change what is trained, or that can't be read.
    """
    values = {key: interpolated(key, given) for key in given}
    values = {key: value for key, value in values.items() if value.lower() not in verl_values.EMPTY}
    settings, warnings = [], []
    for key in values:
        _, origin, index = given[key]
        try:
            texts, said = row_applied(key, values)
        except UserError as error:
            raise UserError(f"{origin}: {error}") from error
        settings += [(index, field, text) for field, text in texts.items() if text is not None]
        warnings += [f"{origin}: {line}" for line in said]
    # null is what a field is without the key, unless another key says it
    sets = {field for _, field, _ in settings}
    settings += [(given[key][2], field, "none") for key in given if key in rows() and key not in values
                 for field in rows()[key].get("sets", "").split() if field not in sets]
    return settings, warnings


def interpolated(key, given, inside=()):
    """The text of a key's value, with ${a.b} replaced by the value of a.b."""
    text, origin, _ = given[key]

    def value_of(match):
        other = key_of(match[1])
        if other not in given or other in (key, *inside):
            raise UserError(f"{origin}: {match[0]} has no value; write it out")
        return interpolated(other, given, (key, *inside))

    return re.sub(r"\$\{([^${}]*)\}", value_of, text)


def row_applied(key, values):
    """({our field: text, None to leave it as it is}, [warning, ...]) of a key; values holds those of all."""
    row, value, warnings = rows()[row_name(key)], values[key], []
    if row["kind"] != "taken":
        passes = happens_anyway(value, row["same"])
        if row["kind"] == "refused" and not passes:
            raise UserError(f"{value} is refused: {row['note']}")
        return {}, [] if passes else [f"{value} is not applicable: {row['note']}"]
    if value.lower() in row.get("refuses", ()):
        raise UserError(f"{value} is refused: {row['refuses'][value.lower()]}")
    if value in row.get("warns", ()):
        warnings.append(f"{value} is not applicable: {row['warns'][value]}")
    texts = row.get("values", {}).get(value, value)
    if "by" in row:
        texts = getattr(verl_values, row["by"])(key, values, warnings)
    texts = [texts] if isinstance(texts, str | None) else texts
    return dict(zip(row["sets"].split(), texts, strict=True)), warnings


def happens_anyway(value, same):
    """Is the value one of those that ask for what happens anyway? verl.yaml says how these are written."""
    if same == "everything":  # what a checkpoint holds
        return {"model", "optimizer", "extra"} <= set(value.split(","))
    same = [os.environ.get(word[1:], "1") if word.startswith("$") else word for word in same.split()]
    return any(fnmatch.fnmatchcase(plain(value), plain(word)) for word in same)


def plain(text):
    """A number as Python writes it, other text in lower case."""
    try:
        return str(float(text))
    except ValueError:
        return text.lower()


def page():
    """The tables as Markdown."""
    lines = {}
    for key, row in rows().items():
        settings = " ".join(f"`--{field}`" for field in row.get("sets", "").split())
        same = row.get("same", "").replace("everything", "model,optimizer,extra")
        but = ", but for " + ", ".join(f"`{value}`" for value in same.split()) if same else ""
        lines[key] = f"| `{key}` | {settings or row['kind'] + but} | {row['note']} |"
    places = ", ".join(f"`{prefix}…` as `{instead}…`" for prefix, instead in tables()["prefixes"].items())
    return tables()["page"].format(places=places) + "\n".join(lines[key] for key in sorted(lines))


if __name__ == "__main__":
    print(page())
