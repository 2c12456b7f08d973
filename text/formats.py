"""Files of conversations -> rows -> messages in one shape.

Owns: which files a --train_data names, the containers (JSON, JSON Lines, gzip, parquet), the shapes of rows.
A file may be untrusted and larger than the memory: it is read a piece at a time, and errors name their place.
"""

import contextlib
import gzip
import json
import os
import re
import zlib

from settings.errors import UserError
from settings.venv import PROJECT

PIECE = 2**20  # characters of a JSON array that are read at a time
LONGEST = 2**26  # characters of one row: a file without line breaks, or a bomb in gzip, would fill the memory
SPACE, DECODER = re.compile(r"[ \t\n\r]*"), json.JSONDecoder()
TOO_LONG = f"a row has at most {LONGEST:,} characters, this one goes on"
SHAPES = ('{"prompt", "response"}, {"instruction", "input"?, "output"}, {"messages" or "conversations": '
          '[{"role", "content"}, ...]} or {"conversations": [{"from", "value"}, ...]}')
KEYS = "prompt", "response", "messages"  # of rows of the first and the third shape, unless told otherwise
SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
                  "system": "system", "observation": "tool", "tool": "tool"}
REASONING = "reasoning_content", "thinking", "reasoning"  # names that a message's reasoning goes by
EXAMPLE = "./data/example_sft.json"
ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")


def data_files(spec):
    """[(weight or None, [files]), ...]: what `spec` names, in order.

    spec  parts with commas; each a file, a directory of them or a dataset id of the hub, with :WEIGHT behind
          it where all have one: the share of an epoch's conversations that come from there
    """
    groups = []
    for part in map(str.strip, spec.split(",")):
        match = None if os.path.exists(part) else re.fullmatch(r"(.+):(\d*\.?\d+)", part)
        path, weight = (match[1], float(match[2])) if match else (part, None)
        if path == EXAMPLE and not os.path.exists(path):  # the default of --train_data, from another folder
            path = os.path.join(PROJECT, path)
        if not os.path.exists(path) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path):
            path = hub_dataset(path)
        files = [path]
        if os.path.isdir(path):
            files = sorted(os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names
                           if name.endswith(ENDINGS))
            # a dataset of the hub has its splits as files or folders: what says train is meant
            files = [f for f in files if "train" in os.path.relpath(f, path)] or files
            if not files:
                raise UserError(f"{path}: no data file in this directory ({', '.join(ENDINGS)})")
        elif not os.path.exists(path):
            raise UserError(f"{path}: no such data file; give a JSON, JSON Lines or parquet file, a "
                            "directory, a dataset id of the hub, or several with commas")
        groups.append((weight, files))
    weights = [weight for weight, _ in groups]
    if None in weights and any(weights) or 0 in weights:
        raise UserError(f"{spec}: give each part a weight above 0 (a.json:0.7,b.json:0.3), or none of them")
    return groups


def hub_dataset(name):
    """Download a dataset's files from the hub, or find them in its cache; return their directory."""
    from huggingface_hub import snapshot_download  # imported here: most runs read a file
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        patterns = ["*" + ending for ending in ENDINGS]
        return snapshot_download(name, repo_type="dataset", allow_patterns=patterns)
    except (LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise UserError(f"{name}: no such data file, and as a dataset of the hub it can't be had: "
                        f"{str(error).strip().splitlines()[-1]}") from error


def read_files(spec):
    """Yield (where, row) for every row of the files that `spec` names.

    Containers, by their first bytes: a JSON array, JSON Lines, gzip of either, parquet (with pyarrow).
    Raises UserError: no such file, or the line and column where a file is not JSON.
    """
    for _, files in data_files(spec):
        for file in files:
            for i, row in enumerate(read_file(file)):
                yield f"{file}[{i}]", row


def read_file(path):
    """Yield the rows of one file, a stretch of it in memory at a time."""
    with open(path, "rb") as f:
        magic = f.read(4)
    if magic == b"PAR1":
        yield from parquet_rows(path)
        return
    with (gzip.open if magic[:2] == b"\x1f\x8b" else open)(path, "rt", encoding="utf-8") as f:
        try:
            first = f.read(1)
            mark = int(first == "\ufeff")  # Python's utf-8-sig, which drops it, drops a torn one as well
            start = f.read(1) if mark else first
            while start.isspace():
                start = f.read(1)
            f.seek(0)
            f.read(mark)
            if start == "[":
                yield from json_array(f, path)
                return
            for number, line in enumerate(iter(lambda: f.readline(LONGEST + 1), ""), 1):
                if len(line) > LONGEST:
                    raise not_json(path, number, 1, TOO_LONG)
                if line.strip():
                    yield parse_json(line, path, number)
        except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{path} can't be read as UTF-8 text: {error}") from error


def parquet_rows(path):
    """Yield the rows of a parquet file, one of its batches in memory at a time."""
    try:
        import pyarrow.parquet  # optional: only parquet files need it
    except ImportError as error:
        raise UserError(f"{path} is a parquet file, which pyarrow reads: pip install pyarrow") from error

    @contextlib.contextmanager
    def reading():
        try:
            yield
        except (pyarrow.ArrowException, ValueError, OSError) as error:  # damaged bytes raise any of them
            raise UserError(f"{path} can't be read as parquet: {error!s:.300}") from error

    with reading():
        batches = pyarrow.parquet.ParquetFile(path).iter_batches()
    while True:
        with reading():
            batch = next(batches, None)
            rows = None if batch is None else batch.to_pylist()
        if rows is None:
            return
        yield from rows


def json_array(f, path):
    """Yield the elements of a JSON array one by one, holding a piece of the text at a time.

    Python's own parser reads each, and once more with twice the text if its end is not in it. Raises
    UserError with line and column.
    """
    text, at, line, column = "", 0, 1, 0  # line and column: where text begins in the file

    def grow():
        nonlocal text, at, line, column
        piece = f.read(max(PIECE, len(text) - at))
        if not piece:
            return False
        done, text, at = text[:at], text[at:] + piece, 0
        line, column = line + done.count("\n"), len(done) - done.rfind("\n") - 1 + ("\n" not in done) * column
        return True

    def peek():
        """The next character that is not white space, or nothing at the end."""
        nonlocal at
        while True:
            at = SPACE.match(text, at).end()
            if at < len(text) or not grow():
                return text[at : at + 1]

    def fail(position, message):
        before = text[:position]
        place = len(before) - before.rfind("\n") + ("\n" not in before) * column
        return not_json(path, line + before.count("\n"), place, message)

    def element():
        nonlocal at
        while True:
            try:
                value, end = DECODER.raw_decode(text, at)
            except json.JSONDecodeError as error:
                # well before the end of the text it is wrong whatever follows, but for a string that goes on
                goes_on = error.pos > len(text) - 20 or error.msg.startswith("Unterminated")
                if goes_on and len(text) - at > LONGEST:
                    raise fail(at, TOO_LONG) from error
                if goes_on and grow():
                    continue
                raise fail(error.pos, error.msg) from error
            except (ValueError, RecursionError) as error:
                raise fail(at, error) from error
            if end - at > LONGEST:
                raise fail(at, TOO_LONG)
            if end + 20 < len(text) or not grow():  # a number may go on in the next piece
                at = end
                return value

    peek()
    at, char = at + 1, ","  # behind the [
    if peek() == "]":
        at, char = at + 1, "]"
    while char == ",":
        peek()
        yield element()
        char = peek()
        at += 1
    if char != "]":
        raise fail(at - 1, "expected , or ]")
    if peek():
        raise fail(at, "something follows the array")


def parse_json(text, path, line):
    """The value of a JSON text that stands in a file from `line` on."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise not_json(path, error.lineno + line - 1, error.colno, error.msg) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists
        raise not_json(path, line, 1, error) from error


def not_json(path, line, column, message):
    return UserError(f"{path} is not JSON: line {line}, column {column}: {message}; a file is a JSON array "
                     "of rows, or one JSON object a line")


def inside(row, key):
    """[the value of a key], where there is none of b in a for the key a.b, or []."""
    if key in row:
        return [row[key]]
    outer, _, inner = key.partition(".")
    return inside(row[outer], inner) if inner and isinstance(row.get(outer), dict) else []


def to_messages(row, where, keys=KEYS):
    """The messages of a row in any of the accepted shapes: [{"role", "content", "train"?, ...}, ...].

    keys  of the prompt, the response and the list of messages; a row without them is read by the default ones

    Raises UserError, which names the row: unknown shape, unknown role, an empty answer, or no answer at all.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where}: unknown row shape, its keys are {type(row).__name__}; accepted are "
                        f"{SHAPES}")
    pairs = [inside(row, prompt) + inside(row, response) for prompt, response in (keys[:2], KEYS[:2])]
    turns = next((row[key] for key in (keys[2], KEYS[2], "conversations") if row.get(key)), None)
    # a prompt and a response whose names were given come before a list of messages
    if isinstance(turns, list) and (keys[:2] == KEYS[:2] or len(pairs[0]) < 2):
        messages = [to_message(turn, where) for turn in turns]
    elif pair := next((pair for pair in pairs if len(pair) == 2), None):
        messages = [to_message({"role": role, "content": content}, where)
                    for role, content in zip(("user", "assistant"), pair)]
    elif "instruction" in row and "output" in row:
        question, history = (row["instruction"], row.get("input") or ""), row.get("history") or []
        if not all(isinstance(part, str) for part in question):
            raise UserError(f'{where}: "instruction" and "input" must be strings, they are {question!r:.80}')
        if not isinstance(history, list) or not all(isinstance(p, list) and len(p) == 2 for p in history):
            raise UserError(f'{where}: "history" must be [["question", "answer"], ...], it is '
                            f"{history!r:.60}")
        exchanges = [*history, ("\n".join(filter(None, question)), row["output"])]
        messages = [to_message({"role": role, "content": content}, where)
                    for exchange in exchanges for role, content in zip(("user", "assistant"), exchange)]
    else:
        named = "".join(f", with --{usual}_key {key}" for usual, key in zip(KEYS, keys) if key != usual)
        raise UserError(f"{where}: unknown row shape, its keys are {sorted(row)!s:.200}; accepted are "
                        f"{SHAPES}{named}")
    if row.get("system") and messages and messages[0]["role"] != "system":
        messages.insert(0, to_message({"role": "system", "content": row["system"]}, where))
    if not any(m["role"] == "assistant" for m in messages):
        raise UserError(f"{where}: no assistant message, so there is nothing to train")
    return messages


def to_message(turn, where):
    """One message, checked: ShareGPT's names turned into role and content, weight into train."""
    if not isinstance(turn, dict) or not ("role" in turn or "from" in turn):
        raise UserError(f'{where}: a message must be {{"role", "content"}} or {{"from", "value"}}, it is '
                        f"{turn!r:.80}")
    message = {k: v for k, v in turn.items() if k not in ("from", "value", "weight")}
    if "from" in turn:
        if not isinstance(turn["from"], str) or turn["from"] not in SHAREGPT_ROLES:
            raise UserError(f"{where}: unknown \"from\": {turn['from']!r:.60}; known are "
                            f"{', '.join(SHAREGPT_ROLES)}")
        message.update(role=SHAREGPT_ROLES[turn["from"]], content=turn.get("value"))
    weight = turn.get("weight", turn.get("train", True))
    if weight not in (0, 1):
        raise UserError(f'{where}: "train" must be true or false (or "weight" 1 or 0), it is {weight!r:.60}')
    if not isinstance(message["role"], str):
        raise UserError(f"{where}: a role must be a string, it is {message['role']!r:.60}")
    message["train"] = bool(weight)
    thoughts = {key: message[key] for key in REASONING if message.get(key) is not None}
    if thoughts:  # under both names that templates read, as transformers does it
        first = next(iter(thoughts.values()))
        message.update({"thinking": first, **thoughts, "reasoning_content": first})
    calls = message["role"] == "assistant" and message.get("tool_calls")
    if calls and not (isinstance(calls, list) and all(
            isinstance(call, dict) and isinstance(call.get("function") or call, dict) for call in calls)):
        raise UserError(f'{where}: "tool_calls" must be a list of objects, as templates read them, not '
                        f"{calls!r:.60}")
    content = message["content"] = "" if calls and message.get("content") is None else message.get("content")
    if not isinstance(content, str):
        raise UserError(f"{where}: the content of a {message['role']:.60} message must be a string, it is "
                        f"{content!r:.60}")
    if message["role"] == "assistant" and not calls and not content.strip():
        raise UserError(f"{where}: an empty answer; remove the row or write what the model should say")
    return message
