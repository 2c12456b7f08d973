"""Data files -> rows -> messages in one format.

Owns which files --train_data names, the containers (JSON, JSON Lines, gzip, parquet) and the formats of rows.
A file may be untrusted and larger than host memory: it is read in chunks, and errors name the file and place.
"""

import contextlib
import gzip
import json
import os
import re
import sys
import zlib

from disk.files import check_hub_endpoint
from settings.errors import UserError
from settings.venv import PROJECT

CHUNK = 2**20  # characters of a JSON array that are read at a time
MAX_ROW = 2**26  # characters of one row: without a limit, a gzip bomb would exhaust host memory
SPACE, DECODER = re.compile(r"[ \t\n\r]*"), json.JSONDecoder()
TOO_LONG = f"a row may have at most {MAX_ROW:,} characters, and this one is longer"
SHAPES = ('{"prompt", "response"}, {"instruction", "input"?, "output"}, {"messages" or "conversations": '
          '[{"role", "content"}, ...]} or {"conversations": [{"from", "value"}, ...]}')
KEYS = "prompt", "response", "messages"  # defaults of --prompt_key, --response_key and --messages_key
SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
                  "system": "system", "observation": "tool", "tool": "tool"}
REASONING = "reasoning_content", "thinking", "reasoning"  # keys of a message that may hold its reasoning
EXAMPLE = "./data/example_sft.json"
ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")


def data_files(spec):
    """The files that --train_data or --val_data names, in order: [(weight or None, [files]), ...].

    spec  sources separated by commas: each a file, a directory of files, or the id of a hub dataset. Either
          all or none end in :WEIGHT, the fraction of an epoch's conversations that come from this source.
          Weights are relative, so their sum may be any number.

    Raises UserError if a source does not exist or has no data files, or if only some have a weight.
    """
    groups = []
    for source in map(str.strip, spec.split(",")):
        match = None if os.path.exists(source) else re.fullmatch(r"(.+):(\d*\.?\d+)", source)
        path, weight = (match[1], float(match[2])) if match else (source, None)
        if path == EXAMPLE and not os.path.exists(path):  # the default of --train_data, in another directory
            path = os.path.join(PROJECT, path)
        if not os.path.exists(path) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path):
            path = hub_dataset(path)
        files = [path]
        if os.path.isdir(path):
            files = sorted(os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names
                           if name.endswith(ENDINGS))
            # Splits of a hub dataset are files or folders: use only those with "train" in the path, if any.
            files = [f for f in files if "train" in os.path.relpath(f, path)] or files
            if not files:
                raise UserError(f"{path}: no data file in this directory ({', '.join(ENDINGS)})")
        elif not os.path.exists(path):
            raise UserError(f"{path}: no such data file; pass a JSON, JSON Lines or parquet file, a "
                            "directory, the id of a hub dataset, or several of these separated by commas")
        groups.append((weight, files))
    weights = [weight for weight, _ in groups]
    some_lack_weights = None in weights and any(weights)
    if some_lack_weights or 0 in weights:
        raise UserError(f"{spec}: either every source needs a weight above 0 (a.json:0.7,b.json:0.3), or "
                        "none may have one")
    return groups


def hub_dataset(name):
    """Download the files of a hub dataset, or find them in the hub's cache. Returns their directory."""
    check_hub_endpoint()
    from huggingface_hub import snapshot_download  # imported here: most runs read local files
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        patterns = ["*" + ending for ending in ENDINGS]
        return snapshot_download(name, repo_type="dataset", allow_patterns=patterns)
    except (LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise UserError(f"{name} is neither a local file nor reachable as a hub dataset: "
                        f"{str(error).strip().splitlines()[-1]}") from error


def read_files(spec):
    """Yield ("file[row]", row) for every row of the files that `spec` names, see data_files.

    The first bytes decide the container: a JSON array, JSON Lines, gzip of either, or parquet (with pyarrow).
    Raises UserError if a file does not exist, or with the line and column where it is not JSON.
    """
    for _, files in data_files(spec):
        for file in files:
            for i, row in enumerate(read_rows(file)):
                yield f"{file}[{i}]", row


def read_rows(path):
    """Yield the rows of one file. Only a chunk of the file is in memory at a time."""
    with open(path, "rb") as f:
        magic = f.read(4)
    if magic == b"PAR1":
        yield from parquet_rows(path)
        return
    open_text = gzip.open if magic[:2] == b"\x1f\x8b" else open
    with open_text(path, "rt", encoding="utf-8") as f:
        try:
            char = f.read(1)
            has_bom = char == "\ufeff"  # Python's utf-8-sig would also drop an incomplete byte order mark
            if has_bom:
                char = f.read(1)
            while char.isspace():
                char = f.read(1)
            f.seek(0)
            f.read(int(has_bom))
            if char == "[":
                yield from json_array(f, path)
                return
            for number, line in enumerate(iter(lambda: f.readline(MAX_ROW + 1), ""), 1):
                if len(line) > MAX_ROW:
                    raise not_json(path, number, 1, TOO_LONG)
                if line.strip():
                    yield parse_json(line, path, number)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8: {error}; if it is GBK, convert it: iconv -f gbk -t utf-8 "
                            "OLD > NEW") from error
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{path} can't be decompressed: {error}") from error


def parquet_rows(path):
    """Yield the rows of a parquet file. Only one of its batches is in memory at a time."""
    try:
        import pyarrow.parquet  # optional package: only parquet files need it
    except ImportError as error:
        raise UserError(f"{path} is a parquet file and needs pyarrow; run {sys.executable} -m pip install "
                        "pyarrow") from error

    @contextlib.contextmanager
    def reading():
        try:
            yield
        except (pyarrow.ArrowException, ValueError, OSError) as error:  # a damaged file raises any of them
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
    """Yield the elements of a JSON array one by one. Only a chunk of the text is in memory at a time.

    Python's parser reads each element; if the chunk ends inside one, it starts again with twice the text.
    Raises UserError with line and column.
    """
    text, at = "", 0  # the chunk in memory, and the position in it
    line, column = 1, 0  # where the chunk begins in the file

    def grow():
        """Drop the text before `at` and read more. Returns False at the end of the file."""
        nonlocal text, at, line, column
        chunk = f.read(max(CHUNK, len(text) - at))
        if not chunk:
            return False
        done, text, at = text[:at], text[at:] + chunk, 0
        if "\n" in done:
            line, column = line + done.count("\n"), 0
        column += len(done) - done.rfind("\n") - 1
        return True

    def peek():
        """Move to the next character that is not white space and return it; "" at the end of the file."""
        nonlocal at
        while True:
            at = SPACE.match(text, at).end()
            if at < len(text) or not grow():
                return text[at : at + 1]

    def error_at(position, message):
        before = text[:position]
        place = len(before) - before.rfind("\n")
        if "\n" not in before:
            place += column
        return not_json(path, line + before.count("\n"), place, message)

    def element():
        nonlocal at
        while True:
            try:
                value, end = DECODER.raw_decode(text, at)
            except json.JSONDecodeError as error:
                # More text can only help near the end of the chunk, or in a string without its closing quote.
                may_continue = error.pos > len(text) - 20 or error.msg.startswith("Unterminated")
                if may_continue and len(text) - at > MAX_ROW:
                    raise error_at(at, TOO_LONG) from error
                if may_continue and grow():
                    continue
                raise error_at(error.pos, error.msg) from error
            except (ValueError, RecursionError) as error:
                raise error_at(at, error) from error
            if end - at > MAX_ROW:
                raise error_at(at, TOO_LONG)
            if end + 20 < len(text) or not grow():  # otherwise a number may continue in the next chunk
                at = end
                return value

    peek()
    at, char = at + 1, ","  # after the [
    if peek() == "]":
        at, char = at + 1, "]"
    while char == ",":
        peek()
        yield element()
        char = peek()
        at += 1
    if char != "]":
        raise error_at(at - 1, "expected , or ]")
    if peek():
        raise error_at(at, "text after the array")


def parse_json(text, path, line):
    """The value of a JSON text that begins at `line` of a file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise not_json(path, error.lineno + line - 1, error.colno, error.msg) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or too deep nesting
        raise not_json(path, line, 1, error) from error


def not_json(path, line, column, message):
    return UserError(f"{path} is not JSON: line {line}, column {column}: {message}; expected a JSON array, "
                     "or one JSON object per line")


def values_of(row, key):
    """[the value of a key], or [] if the row does not have it. If there is no key "a.b", it is b inside a."""
    if key in row:
        return [row[key]]
    outer, _, inner = key.partition(".")
    return values_of(row[outer], inner) if inner and isinstance(row.get(outer), dict) else []


def to_messages(row, where, keys=KEYS):
    """The messages of a row in any of the accepted formats: [{"role", "content", "train", ...}, ...].

    where  "file[row]", for errors
    keys   of the prompt, the response and the list of messages; a row without them is read by KEYS

    Raises UserError, which names the row: unknown columns, an unknown role, an empty answer, or no answer.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row must be an object, not {type(row).__name__}; accepted are {SHAPES}")
    named = values_of(row, keys[0]) + values_of(row, keys[1])
    default = values_of(row, KEYS[0]) + values_of(row, KEYS[1])
    turn_keys = [key for key in (keys[2], KEYS[2], "conversations") if key in row]
    turns = next((row[key] for key in turn_keys if row[key]), None)
    has_named_pair = keys[:2] != KEYS[:2] and len(named) == 2
    if isinstance(turns, list) and not has_named_pair:
        messages = [to_message(turn, where) for turn in turns]
    elif len(named) == 2 or len(default) == 2:
        messages = exchange(*(named if len(named) == 2 else default), where)
    elif "instruction" in row and "output" in row:
        messages = alpaca_messages(row, where)
    elif turn_keys:
        key = turn_keys[0]
        raise UserError(f'{where}: "{key}" must be a non-empty list of {{"role", "content"}} objects, it is '
                        f"{json.dumps(row[key], default=str):.60}")
    else:
        columns = ", ".join(map(repr, row)) or "(none)"
        raise UserError(f"{where}: unrecognised columns {columns:.200}; accepted are {SHAPES}, "
                        f"or {column_flags(row, keys)}")
    if row.get("system") and messages and messages[0]["role"] != "system":
        messages.insert(0, to_message({"role": "system", "content": row["system"]}, where))
    if not any(m["role"] == "assistant" for m in messages):
        raise UserError(f"{where}: no assistant message, so there is nothing to train")
    return messages


def column_flags(row, keys):
    """For an error: the flags that name the columns of a row, and those passed flags that they replace."""
    prompt, response = "COLUMN", "COLUMN"
    if len(row) == 2 and all(re.fullmatch(r"[\w.-]{1,60}", name) for name in row):
        prompt, response = row
    hint = f"pass --prompt_key {prompt} --response_key {response}"
    passed = [f"--{default}_key {key}" for default, key in zip(KEYS, keys) if key != default]
    return hint + (f" instead of {' '.join(passed)}" if passed else "")


def exchange(question, answer, where):
    """The two messages of a question and its answer."""
    return [to_message({"role": "user", "content": question}, where),
            to_message({"role": "assistant", "content": answer}, where)]


def alpaca_messages(row, where):
    """The messages of an Alpaca row: instruction, input, output, and history as LLaMA-Factory has it."""
    texts = row["instruction"], row.get("input") or ""
    history = row.get("history") or []
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f'{where}: "instruction" and "input" must be strings, they are {texts!r:.80}')
    if not isinstance(history, list) or not all(isinstance(p, list) and len(p) == 2 for p in history):
        raise UserError(f'{where}: "history" must be [["question", "answer"], ...], it is {history!r:.60}')
    question = "\n".join(filter(None, texts))
    pairs = [*history, (question, row["output"])]
    return [message for pair in pairs for message in exchange(*pair, where)]


def to_message(turn, where):
    """One message, checked. Keys of ShareGPT become role and content, and `weight` becomes `train`.

    Raises UserError, which names the row.
    """
    if not isinstance(turn, dict) or not ("role" in turn or "from" in turn):
        raise UserError(f'{where}: a message must be {{"role", "content"}} or {{"from", "value"}}, it is '
                        f"{turn!r:.80}")
    message = {k: v for k, v in turn.items() if k not in ("from", "value", "weight")}
    if "from" in turn:
        if not isinstance(turn["from"], str) or turn["from"] not in SHAREGPT_ROLES:
            raise UserError(f"{where}: unknown \"from\": {turn['from']!r:.60}; it must be one of "
                            f"{', '.join(SHAREGPT_ROLES)}")
        message.update(role=SHAREGPT_ROLES[turn["from"]], content=turn.get("value"))
    weight = turn.get("weight", turn.get("train", True))
    if weight not in (0, 1):
        raise UserError(f'{where}: "train" must be true or false (or "weight" 1 or 0), it is {weight!r:.60}')
    if not isinstance(message["role"], str):
        raise UserError(f"{where}: a role must be a string, it is {message['role']!r:.60}")
    message["train"] = bool(weight)
    reasoning = {key: message[key] for key in REASONING if message.get(key) is not None}
    if reasoning:  # set both keys that templates read, as transformers does
        text = next(iter(reasoning.values()))
        message.update({"thinking": text, **reasoning, "reasoning_content": text})
    calls = message["role"] == "assistant" and message.get("tool_calls")
    if calls and not is_list_of_calls(calls):
        raise UserError(f'{where}: "tool_calls" must be a list of objects, as templates read them, not '
                        f"{calls!r:.60}")
    content = message.get("content")
    if calls and content is None:
        content = ""
    message["content"] = content
    if not isinstance(content, str):
        raise UserError(f"{where}: the content of the {message['role']:.60} message must be a string, it is "
                        f"{json.dumps(content, default=str):.60}; remove the row or write the text")
    if message["role"] == "assistant" and not calls and not content.strip():
        raise UserError(f"{where}: an empty answer; remove the row or write what the model should say")
    return message


def is_list_of_calls(calls):
    """Whether "tool_calls" is [{"name", ...} or {"function": {"name", ...}}, ...]: a list of objects."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        return False
    return all(isinstance(call.get("function") or call, dict) for call in calls)
