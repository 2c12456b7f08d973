"""LLaMA-Factory's dataset_info.json: an entry describes where a dataset is and what its columns mean.

Format: data/README.md of https://github.com/hiyouga/LLaMA-Factory
"""

import os
from typing import NamedTuple

from disk.files import read_json
from settings.errors import UserError
from text.keys import row_use
from text.messages import listed

ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "history": "history",
          "system": "system", "tools": "tools"}  # LLaMA-Factory's name of a column: ours
SHAREGPT = {"messages": "conversations", "system": "system", "tools": "tools"}
OPENAI = {**SHAREGPT, "messages": "messages"}
SHAPES = {"alpaca": ALPACA, "sharegpt": SHAREGPT, "openai": OPENAI}
DEFAULTS = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations"}
ROLES = {"user_tag": "human", "assistant_tag": "gpt", "observation_tag": "observation",
         "function_tag": "function_call", "system_tag": "system"}  # tag: its default, as ShareGPT has it
TURN = ("from", "value"), ("role", "content")  # keys of a message: ShareGPT's, OpenAI's
OPENAI_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
REFUSED = {"chosen": "preferred and rejected answers", "rejected": "preferred and rejected answers",
           "kto_tag": "judgements of answers (KTO)", "images": "images", "videos": "videos",
           "audios": "audio"}
# Uses of text/keys.py: a column that the entry does not name is not read as one of these.
CONVERSATION = {"messages", "prompt", "response", "context", "history", "system", "tools", "text",
                "reasoning", "preference", "depends"}
NEEDED = ("prompt", "query"), ("response",), ("messages",)  # of each, a row has one that its entry names
UNNAMED = "not named in dataset_info.json"


class Entry(NamedTuple):
    """What an entry says about rows. Its repr is part of the token cache's key."""

    formatting: str
    columns: tuple  # ((their column, our column), ...)
    role: str  # keys of a message
    content: str
    roles: tuple  # ((the value of the role, ours), ...)
    keys: tuple = ()  # ((LLaMA-Factory's name, their column), ...), as the entry has it

    def to_row(self, row, where):
        """(the row in a shape that formats.py reads, its place for errors).

        A UserError stands for a row without a column that the entry names. What does not fit otherwise stays
        as it is, and is reported by formats.py; the place says which columns have other names there.

        A column that the entry does not name and that would be read as text gets another name, so that it is
        listed among the columns that are not used.
        """
        named, ours = dict(self.columns), {}
        keys = dict(self.keys)
        for needed in NEEDED:
            absent = [key for key in needed if key in keys]
            if absent and not any(keys[key] in row for key in absent):
                return self.lacks(absent[0], row, where), where
        for key, value in row.items():
            if key in named:
                ours[named[key]] = value
            elif row_use(key) in CONVERSATION:
                ours[f"{key} ({UNNAMED})"] = value
            else:
                ours[key] = value
        for key in ("conversations", "messages"):
            if key in named.values() and isinstance(ours.get(key), list):
                ours[key] = [self.to_turn(turn) for turn in ours[key]]
        return ours, where + self.note

    def turn_keys(self):
        """{their key of a message: ours} of role and content."""
        return dict(zip((self.role, self.content), TURN[self.formatting == "openai"]))

    @property
    def note(self):
        """What to add to the place of a row: which columns and keys have other names for formats.py."""
        pairs = [*self.columns, *(self.turn_keys().items() if self.formatting != "alpaca" else ())]
        # a name may have line ends: repr() escapes them
        renamed = ", ".join(f"{repr(theirs)[1:-1]:.60} as {ours}" for theirs, ours in pairs if theirs != ours)
        return f" (read {renamed})" if renamed else ""

    def check(self, seen, where):
        """Raise UserError if no row had a column that the entry gives another name, as `seen` has all."""
        for key, column in self.keys:
            if column not in seen and dict(self.columns)[column] != column:
                raise self.lacks(key, seen, where)

    def lacks(self, key, row, where):
        """The UserError for rows without a column that the entry names."""
        there, column = listed(row) or "none", dict(self.keys)[key]
        return UserError(f'{where}: dataset_info.json has "{key}": "{column:.60}", but there is no such '
                         f"column; there are {there:.300}; correct the columns of the entry")

    def to_turn(self, turn):
        if not isinstance(turn, dict):
            return turn
        ours = self.turn_keys()
        role = ours[self.role]
        theirs = {our: their for their, our in ours.items() if their != our and their in turn}
        turn = {ours.get(key) or (f"{key} ({UNNAMED})" if key in theirs else key): value
                for key, value in turn.items()}
        if isinstance(turn.get(role), str):
            turn[role] = dict(self.roles).get(turn[role], turn[role])
        return turn


def has_entry(path, name):
    entries = read_json(path)
    return isinstance(entries, dict) and name in entries


def read_entry(path, name):
    """(Entry, {"path", "config", "split"} of its data, number of rows or None) of one entry.

    Raises UserError if there is no such entry, or if it describes what can't be trained on here.
    """
    entries = read_json(path)
    if not isinstance(entries, dict):
        raise UserError(f"{path} must be an object of entries: {{name: {{file_name, ...}}}}")
    entries = {key: value for key, value in entries.items() if isinstance(value, dict)}
    entry = entries.get(name)
    if entry is None:
        wrong = f"{path}:{name}: no such entry" if name else f"{path}: name one of its entries"
        names = " ".join(", ".join(entries).split()) or "none"  # in one line
        example = " ".join(next(iter(entries), "ENTRY").split())
        raise UserError(f"{wrong}; it has {names:.1000}; write {path}:{example}")
    where = f"{path}:{name}"
    formatting = entry.get("formatting", "alpaca")
    if not isinstance(formatting, str) or formatting not in SHAPES:
        raise UserError(f"{where}: formatting must be one of {', '.join(SHAPES)}, it is {formatting!r:.60}")
    columns, tags = (texts(entry, key, where) for key in ("columns", "tags"))
    for key, what in REFUSED.items():
        if columns.get(key) or key == "chosen" and entry.get("ranking"):
            raise UserError(f"{where}: this entry has {what}, which supervised fine-tuning on text can't "
                            "use; choose an entry with prompts and answers")
    # LLaMA-Factory: without "columns" the defaults count, with them only those that are named
    defaults = {key: value for key, value in DEFAULTS.items() if key in SHAPES[formatting]}
    columns = columns or defaults if formatting == "alpaca" else {**defaults, **columns}
    shape = dict(SHAPES[formatting])
    if formatting == "alpaca" and "prompt" in columns and "response" not in columns:
        shape["prompt"] = "text"  # for pre-training
    ours = OPENAI_ROLES if formatting == "openai" else {}
    roles = {tags.get(tag, default): ours.get(default, default) for tag, default in ROLES.items()}
    role, content = TURN[formatting == "openai"]
    result = Entry(formatting, tuple((columns[key], shape[key]) for key in shape if key in columns),
                   tags.get("role_tag", role), tags.get("content_tag", content), tuple(roles.items()),
                   tuple((key, columns[key]) for key in shape if key in columns))
    samples = entry.get("num_samples")
    if samples is not None and (not isinstance(samples, int) or samples < 1):
        raise UserError(f"{where}: num_samples must be a whole number above 0, it is {samples!r:.60}")
    return result, place_of(entry, path, where), samples


def texts(entry, key, where):
    """An object of texts in an entry; those that are null are dropped."""
    value = entry.get(key) or {}
    if not isinstance(value, dict) or not all(isinstance(v, str | None) for v in value.values()):
        raise UserError(f"{where}: {key} must be an object of texts, it is {value!r:.100}")
    return {k: v for k, v in value.items() if v}


def place_of(entry, path, where):
    """{"path", "config", "split"}: where the data of an entry is."""
    if entry.get("hf_hub_url"):
        return dict(path=str(entry["hf_hub_url"]), config=entry.get("subset") or entry.get("folder"),
                    split=entry.get("split"))
    if entry.get("file_name"):
        file = os.path.join(os.path.dirname(path), str(entry["file_name"]))
        if not os.path.exists(file):
            raise UserError(f"{where}: its file_name {file:.300} does not exist; correct it, or download the "
                            "file")
        return dict(path=file, config=None, split=None)
    reasons = {"script_url": "is a Python script, which is not run here; pass the files that it reads",
               "ms_hub_url": "is on ModelScope, which is not read here; download it and pass the directory",
               "om_hub_url": "is on Openmind, which is not read here; download it and pass the directory",
               "cloud_file_name": "is in a cloud store, which is not read; download it and pass the file"}
    reason = next((f"{key} {text}" for key, text in reasons.items() if entry.get(key)), None)
    raise UserError(f"{where}: {reason or 'it has no file_name and no hf_hub_url, so no data'}")
