"""Translate verl's SFT keys into settings of sft.py, by the tables of verl.yaml.

    python -m settings.verl > docs/verl.md      # the tables as a page; a test compares the two

parser.py calls translate() for names that are not settings. A `mapped` key sets one or more settings. A
`warned` key changes no result here: one line of warning. A `refused` key would change what is trained: an
error. A warned or refused key passes silently if its value asks for what happens anyway.
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
    """verl.yaml, every value as text. Read on first use: most runs have no key of verl."""
    with open(os.path.join(os.path.dirname(__file__), "verl.yaml"), encoding="utf-8") as file:
        return yaml.load(file, yaml.BaseLoader)


@functools.cache
def entries():
    """{key: its entry: "kind" (mapped, warned or refused), "note", and the columns of verl.yaml}"""
    found = {key: {"kind": "mapped", "note": "", **entry} for key, entry in tables()["mapped"].items()}
    for kind in "warned", "refused":
        for reason, keys in tables()[kind].items():
            found |= {key: {"kind": kind, "note": reason, "same": same} for key, same in keys.items()}
    return found


def fields_set():
    """The settings that keys of verl can set."""
    return {field for entry in entries().values() for field in entry.get("sets", "").split()}


def key_of(name):
    """The key of the tables that a name means: verl has the same key in several places."""
    for prefix, replacement in tables()["prefixes"].items():
        if name.startswith(prefix):
            name = replacement + name.removeprefix(prefix)
    return name


def entry_name(key):
    """The entry of a key: its own name, or "parent.*" for all keys below a parent; None without an entry."""
    parents = [key[:i] + ".*" for i, char in enumerate(key + ".") if char == "."]
    names = ["*._target_"] if key.endswith("._target_") else [key, *parents[::-1]]
    return next((name for name in names if name in entries()), None)


def translate(given):
    """Translate all of verl's keys of a run together: one may decide what another means, and ${a.b} refers to
    another's value.

    given    {key: (text of its value, its origin, index)}
    returns  [(index, field, text of its value), ...] and [warning, ...]

    Raises UserError for a value that would change what is trained, or that can't be read.
    """
    values = {key: interpolated(key, given) for key in given}
    values = {key: value for key, value in values.items() if value.lower() not in verl_values.EMPTY}
    translations, warnings = [], []
    for key in values:
        _, origin, index = given[key]
        try:
            texts, key_warnings = apply_entry(key, values)
        except UserError as error:
            raise UserError(f"{origin}: {error}") from error
        translations += [(index, field, text) for field, text in texts.items() if text is not None]
        warnings += [f"{origin}: {warning}" for warning in key_warnings]
    # null resets the fields of a key, unless another key sets them
    fields_seen = {field for _, field, _ in translations}
    for key, (_, _, index) in given.items():
        if key in entries() and key not in values:
            fields = entries()[key].get("sets", "").split()
            translations += [(index, field, "none") for field in fields if field not in fields_seen]
    return translations, warnings


def interpolated(key, given, parents=()):
    """The text of a key's value, with ${a.b} replaced by the value of a.b.

    parents  keys that are being replaced: one of these again would never end
    """
    text, origin, _ = given[key]

    def value_of(match):
        other = key_of(match[1])
        if other not in given or other in (key, *parents):
            raise UserError(f"{origin}: {match[0]} has no value; write it out")
        return interpolated(other, given, (key, *parents))

    return re.sub(r"\$\{([^${}]*)\}", value_of, text)


def apply_entry(key, values):
    """({field: text, or None for no change}, [warning, ...]) of a key.

    values  {key: text} of all keys
    """
    entry, value, warnings = entries()[entry_name(key)], values[key], []
    if entry["kind"] != "mapped":
        passes = happens_anyway(value, entry["same"])
        if entry["kind"] == "refused" and not passes:
            raise UserError(f"{value} is refused: {entry['note']}")
        return {}, [] if passes else [f"{value} is not applicable: {entry['note']}"]
    if value.lower() in entry.get("refuses", ()):
        raise UserError(f"{value} is refused: {entry['refuses'][value.lower()]}")
    if value in entry.get("warns", ()):
        warnings.append(f"{value} is not applicable: {entry['warns'][value]}")
    texts = entry.get("values", {}).get(value, value)
    if "by" in entry:
        texts = getattr(verl_values, entry["by"])(key, values, warnings)
    if isinstance(texts, str | None):
        texts = [texts]
    return dict(zip(entry["sets"].split(), texts, strict=True)), warnings


def happens_anyway(value, same):
    """Whether a value asks for what happens anyway. verl.yaml explains how `same` is written."""
    if same == "everything":  # the contents of a checkpoint
        return {"model", "optimizer", "extra"} <= set(value.split(","))
    patterns = [os.environ.get(item[1:], "1") if item.startswith("$") else item for item in same.split()]
    return any(fnmatch.fnmatchcase(plain(value), plain(pattern)) for pattern in patterns)


def plain(text):
    """A number as Python writes it; other text in lower case."""
    try:
        return str(float(text))
    except ValueError:
        return text.lower()


def page():
    """The tables as Markdown."""
    lines = {}
    for key, entry in entries().items():
        effect = " ".join(f"`--{field}`" for field in entry.get("sets", "").split()) or entry["kind"]
        same = entry.get("same", "").replace("everything", "model,optimizer,extra")
        if same == "*":
            effect = "passes silently"
        elif same:
            effect += ", except for " + ", ".join(f"`{value}`" for value in same.split())
        lines[key] = f"| `{key}` | {effect} | {entry['note']} |"
    places = ", ".join(f"`{prefix}…` is read as `{replacement}…`"
                       for prefix, replacement in tables()["prefixes"].items())
    return tables()["page"].format(places=places) + "\n".join(lines[key] for key in sorted(lines))


if __name__ == "__main__":
    print(page())
