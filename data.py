"""From files of conversations to micro-batches of token ids, with every token accounted for.

    python data.py show my.json --model DIR       # conversations as the model sees them, targets marked
    python data.py stats my.json --model DIR      # lengths, what max_length would cut, how full micro-batches are

Owns: reading rows, their shapes, the target mask, the ledger, the cache, which conversations a step holds and how they
are laid into micro-batches. It knows ranks as two integers and nothing else of other processes. A conversation is
rendered once (template.py), tokenised once and masked by the character offsets of its answers.
"""

import contextlib
import fcntl
import gzip
import hashlib
import heapq
import inspect
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import datetime
from fractions import Fraction

import numpy as np
import torch

PIECE = 2**20  # characters of a JSON array that are read at a time
LONGEST = 2**26  # characters of one row: a file without line breaks, or a bomb in gzip, would fill the memory
SPACE, DECODER = re.compile(r"[ \t\n\r]*"), json.JSONDecoder()
TOO_LONG = f"a row has at most {LONGEST:,} characters, this one goes on"
IGNORE = -100  # a target that is not trained: model.py's, and PyTorch's own
SHAPES = ('{"prompt", "response"}, {"instruction", "input"?, "output"}, {"messages" or "conversations": [{"role", '
          '"content"}, ...]} or {"conversations": [{"from", "value"}, ...]}')
KEYS = "prompt", "response", "messages"  # of rows of the first and the third shape, unless told otherwise
SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
                  "observation": "tool", "tool": "tool"}
REASONING = "reasoning_content", "thinking", "reasoning"  # names that a message's reasoning goes by


# ---------------------------------------------------------------------------------------------------------------------
# reading: files -> rows -> messages


ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")


def data_files(spec):
    """[(weight or None, [files]), ...]: what `spec` names, in order.

    spec  parts with commas; each a file, a directory of them or a dataset id of the hub, with :WEIGHT behind it where
          all have one: the share of an epoch's conversations that come from there
    """
    groups = []
    for part in map(str.strip, spec.split(",")):
        match = None if os.path.exists(part) else re.fullmatch(r"(.+):(\d*\.?\d+)", part)
        path, weight = (match[1], float(match[2])) if match else (part, None)
        if not os.path.exists(path) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path):
            path = hub_dataset(path)
        files = [path]
        if os.path.isdir(path):
            files = sorted(os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names
                           if name.endswith(ENDINGS))
            # a dataset of the hub has its splits as files or folders: what says train is meant
            files = [f for f in files if "train" in os.path.relpath(f, path)] or files
            if not files:
                raise FileNotFoundError(f"{path}: no data file in this directory ({', '.join(ENDINGS)})")
        elif not os.path.exists(path):
            raise FileNotFoundError(f"{path}: no such data file; give a JSON, JSON Lines or parquet file, a directory, "
                                    "a dataset id of the hub, or several with commas")
        groups.append((weight, files))
    weights = [weight for weight, _ in groups]
    if None in weights and any(weights) or 0 in weights:
        raise ValueError(f"{spec}: give each part a weight above 0 (a.json:0.7,b.json:0.3), or none of them")
    return groups


def hub_dataset(name):
    """Download a dataset's files from the hub, or find them in its cache; return their directory."""
    from huggingface_hub import snapshot_download  # imported here: most runs read a file
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return snapshot_download(name, repo_type="dataset", allow_patterns=["*" + ending for ending in ENDINGS])
    except (LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise FileNotFoundError(f"{name}: no such data file, and as a dataset of the hub it can't be had: "
                                f"{str(error).strip().splitlines()[-1]}") from error


def read_files(spec):
    """Yield (where, row) for every row of the files that `spec` names.

    Containers, told apart by their first bytes: a JSON array, JSON Lines, gzip of either, parquet (with pyarrow).
    Raises FileNotFoundError, or ValueError with the line and column where a file is not JSON.
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
        try:
            import pyarrow.parquet  # optional: only parquet files need it
        except ImportError as error:
            raise ValueError(f"{path} is a parquet file, which pyarrow reads: pip install pyarrow") from error
        try:
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
                yield from batch.to_pylist()
        except (pyarrow.ArrowException, ValueError, OSError) as error:  # of damaged bytes, any of them
            raise ValueError(f"{path} can't be read as parquet: {error!s:.300}") from error
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
            raise ValueError(f"{path} can't be read as UTF-8 text: {error}") from error


def json_array(f, path):
    """Yield the elements of a JSON array one by one, holding a piece of the text at a time: Python's own parser reads
    each, and once more with twice the text where it does not end in it. Raises ValueError with line and column."""
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
    return ValueError(f"{path} is not JSON: line {line}, column {column}: {message}; a file is a JSON array of rows, "
                      "or one JSON object a line")


def inside(row, key):
    """[the value of a key], where there is none of b in a for the key a.b, or []."""
    if key in row:
        return [row[key]]
    outer, _, inner = key.partition(".")
    return inside(row[outer], inner) if inner and isinstance(row.get(outer), dict) else []


def to_messages(row, where, keys=KEYS):
    """The messages of a row in any of the accepted shapes: [{"role", "content", "train"?, ...}, ...].

    keys  of the prompt, the response and the list of messages; a row without them is told by the usual ones

    Raises ValueError naming the row for an unknown shape, an unknown role, an empty answer, or no answer at all.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{where}: unknown row shape, its keys are {type(row).__name__}; accepted are {SHAPES}")
    pairs = [inside(row, prompt) + inside(row, response) for prompt, response in (keys[:2], KEYS[:2])]
    turns = next((row[key] for key in (keys[2], KEYS[2], "conversations") if row.get(key)), None)
    if isinstance(turns, list) and (keys[:2] == KEYS[:2] or len(pairs[0]) < 2):  # a pair that was asked for comes first
        messages = [to_message(turn, where) for turn in turns]
    elif pair := next((pair for pair in pairs if len(pair) == 2), None):
        messages = [to_message({"role": role, "content": content}, where)
                    for role, content in zip(("user", "assistant"), pair)]
    elif "instruction" in row and "output" in row:
        question, history = (row["instruction"], row.get("input") or ""), row.get("history") or []
        if not all(isinstance(part, str) for part in question):
            raise ValueError(f'{where}: "instruction" and "input" must be strings, they are {question!r:.80}')
        if not isinstance(history, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in history):
            raise ValueError(f'{where}: "history" must be [["question", "answer"], ...], it is {history!r:.60}')
        exchanges = [*history, ("\n".join(filter(None, question)), row["output"])]
        messages = [to_message({"role": role, "content": content}, where)
                    for exchange in exchanges for role, content in zip(("user", "assistant"), exchange)]
    else:
        raise ValueError(f"{where}: unknown row shape, its keys are {sorted(row)!s:.200}; accepted are {SHAPES}"
                         + "".join(f", with --{name}_key {key}" for name, key, usual in zip(KEYS, keys, KEYS)
                                   if key != usual))
    if row.get("system") and messages and messages[0]["role"] != "system":
        messages.insert(0, to_message({"role": "system", "content": row["system"]}, where))
    if not any(m["role"] == "assistant" for m in messages):
        raise ValueError(f"{where}: no assistant message, so there is nothing to train")
    return messages


def to_message(turn, where):
    """One message, checked: ShareGPT's names turned into role and content, weight into train."""
    if not isinstance(turn, dict) or not ("role" in turn or "from" in turn):
        raise ValueError(f'{where}: a message must be {{"role", "content"}} or {{"from", "value"}}, it is {turn!r:.80}')
    message = {k: v for k, v in turn.items() if k not in ("from", "value", "weight")}
    if "from" in turn:
        if not isinstance(turn["from"], str) or turn["from"] not in SHAREGPT_ROLES:
            raise ValueError(f"{where}: unknown \"from\": {turn['from']!r:.60}; known are {', '.join(SHAREGPT_ROLES)}")
        message.update(role=SHAREGPT_ROLES[turn["from"]], content=turn.get("value"))
    weight = turn.get("weight", turn.get("train", True))
    if weight not in (0, 1):
        raise ValueError(f"{where}: \"train\" must be true or false (or \"weight\" 1 or 0), it is {weight!r:.60}")
    if not isinstance(message["role"], str):
        raise ValueError(f"{where}: a role must be a string, it is {message['role']!r:.60}")
    message["train"] = bool(weight)
    thoughts = {key: message[key] for key in REASONING if message.get(key) is not None}
    if thoughts:  # under both names that templates read, as transformers does it
        first = next(iter(thoughts.values()))
        message.update({"thinking": first, **thoughts, "reasoning_content": first})
    calls = message["role"] == "assistant" and message.get("tool_calls")
    if calls and not (isinstance(calls, list) and all(
            isinstance(call, dict) and isinstance(call.get("function") or call, dict) for call in calls)):
        raise ValueError(f'{where}: "tool_calls" must be a list of objects, as templates read them, not {calls!r:.60}')
    content = message["content"] = "" if calls and message.get("content") is None else message.get("content")
    if not isinstance(content, str):
        raise ValueError(f"{where}: the content of a {message['role']:.60} message must be a string, it is "
                         f"{content!r:.60}")
    if message["role"] == "assistant" and not calls and not content.strip():
        raise ValueError(f"{where}: an empty answer; remove the row or write what the model should say")
    return message


def token_range(encoding, start, stop, text_length):
    """The tokens that lie wholly inside the characters [start, stop). One that a merge has pulled over the border
    is left out: the model can't generate it, as its first half is already in the prompt."""

    def first_from(char):
        while char < text_length:
            token = encoding.char_to_token(char)
            if token is not None:
                return token
            char += 1
        return len(encoding)

    first = first_from(start)
    if first < len(encoding) and encoding.token_to_chars(first)[0] < start:
        first += 1
    end = first_from(stop)
    if end < len(encoding) and encoding.token_to_chars(end)[0] < stop:
        end += 1  # the turn's last token takes white space behind it in
    return first, max(first, end)


# ---------------------------------------------------------------------------------------------------------------------
# rows -> flat arrays, with a ledger


@dataclass
class Ledger:
    """Where every row and token went. `check` proves that it balances and decides whether the run may start."""

    rows: int = 0
    trained: int = 0
    dropped: dict = field(default_factory=dict)  # reason -> rows
    tokens: int = 0
    target: int = 0
    context: int = 0
    truncated: int = 0
    in_dropped_rows: int = 0
    rows_truncated: int = 0
    turns: int = 0  # assistant turns that are trained and not truncated
    turns_stopped: int = 0  # those among them whose end is a target

    def drop(self, reason, tokens):
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self.in_dropped_rows += tokens

    def lines(self):
        n_dropped = sum(self.dropped.values())
        dropped = "".join(f", {count} {reason}" for reason, count in self.dropped.items())
        cut = f" (of {self.rows_truncated} rows)" if self.rows_truncated else ""
        extra = f" + {self.in_dropped_rows:,} in dropped rows" if self.in_dropped_rows else ""
        return (f"rows     {self.rows:,} in = {self.trained:,} trained + {n_dropped:,} dropped{dropped}",
                f"tokens   {self.tokens:,} in = {self.target:,} target + {self.context:,} context + "
                f"{self.truncated:,} truncated{cut}{extra}")

    def check(self, spec, max_length):
        assert self.rows == self.trained + sum(self.dropped.values()), self
        assert self.tokens == self.target + self.context + self.truncated + self.in_dropped_rows, self
        if not self.trained:
            raise ValueError(f"{spec}: no row is left to train on: {self.rows} in, dropped {self.dropped}; "
                             f"--max_length {max_length} may be too small for any answer")
        if self.turns_stopped < 0.99 * self.turns:
            raise ValueError(f"{spec}: only {self.turns_stopped} of {self.turns} assistant turns train a token that "
                             "ends them: the model would never stop; use a chat template (--tokenizer) that ends each "
                             "turn with a special token")


ARRAYS = {"tokens": np.int32, "is_target": np.bool_, "sizes": np.int32, "lengths": np.int32, "n_targets": np.int32,
          "file": np.int32, "row": np.int32}  # a Dataset's, one file each in its directory


@dataclass
class Dataset:
    """Conversations as flat arrays, mapped from the disk; conversation i is tokens[starts[i]:starts[i + 1]]."""

    tokens: np.ndarray
    is_target: np.ndarray
    sizes: np.ndarray  # tokens of each
    lengths: np.ndarray  # the inputs of each, up to its last target; what follows that can't change the loss
    n_targets: np.ndarray  # of each
    file: np.ndarray  # where each came from: an index of files
    row: np.ndarray  # and the row in that
    files: list
    weights: list  # of each file: the number of its group, and the group's weight, see data_files
    ledger: Ledger
    digest: str  # a hash of tokens, targets, their order and weights: resume goes on with the same data or not at all

    def __post_init__(self):
        self.starts = np.concatenate(([0], np.cumsum(self.sizes, dtype=np.int64)))

    def __len__(self):
        return len(self.lengths)

    def mix(self):
        """(group of each conversation, weight of each group), or None where no weights were given."""
        if self.weights[0][1] is None:
            return None
        groups = np.array([group for group, _ in self.weights])
        return groups[self.file], [weight for _, weight in sorted(dict(self.weights).items())]

    def source(self, i):
        """Where a conversation came from: "file[row]"."""
        return f"{self.files[self.file[i]]}[{self.row[i]}]"


def take_lock(lock, timeout):
    """Lock a file, whose holder names itself in it and touches it at every sign of progress.

    Raises TimeoutError, with the holder as its pid, when there was none for `timeout` seconds.
    """
    seen = since = None
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock.truncate(0)
            return print(os.getpid(), file=lock, flush=True)
        except BlockingIOError:
            now = os.fstat(lock.fileno()).st_mtime_ns  # of whatever clock: only a change of it counts
            seen, since = (seen, since) if now == seen else (now, time.monotonic())
        if time.monotonic() - since > timeout:
            lock.seek(0)
            holder = lock.read().strip()
            error = TimeoutError(f"process {holder} holds {lock.name} and has made no progress for {timeout} s; end "
                                 "it, or give another --cache_dir")
            error.pid = holder
            raise error
        time.sleep(0.1)  # flock takes no time-out; nothing but how soon we look again depends on this


def load(spec, tokenizer, max_length, too_long="truncate", train_on_prompt=False, train_on="all", cache_dir=None,
         timeout=600, limit=None, keys=KEYS):
    """Read, render, tokenise and mask everything that `spec` names; return a checked Dataset.

    train_on   all: the assistant's turns; last: the last of each conversation
    too_long   what happens to a conversation of more than max_length tokens: truncate (from the right), drop, error
    cache_dir  keep the result there, and map it into memory from there: under a lock, so one process of a node makes
               it while the others wait, before any collective, for as long as it goes on
    timeout    seconds without progress after which it is given up (take_lock)
    limit      rows that are read, without cache_dir
    keys       see to_messages
    """
    options = max_length, too_long, train_on_prompt, train_on, keys
    if cache_dir is None:
        with tempfile.TemporaryDirectory() as directory:  # what is mapped stays when its name is gone
            tokenise(spec, tokenizer, *options, directory, lambda: None, limit)
            return read_arrays(directory)
    # The key is all that the result depends on, this program and, for templates that print it, the date included.
    groups = data_files(spec)
    key = hashlib.blake2b(repr((groups, tokenizer.source, tokenizer.special, options)).encode(), digest_size=16)
    key.update(tokenizer.text.encode())
    if "strftime_now" in tokenizer.source:
        key.update(datetime.now().strftime("%Y-%m-%d").encode())
    for file in (__file__, inspect.getfile(type(tokenizer)), *(file for _, files in groups for file in files)):
        with open(file, "rb") as f:
            while chunk := f.read(2**24):
                key.update(chunk)
    path = os.path.join(os.path.expanduser(cache_dir), key.hexdigest())
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + ".lock", "a+") as lock:
        take_lock(lock, timeout)
        if not os.path.isdir(path):
            shutil.rmtree(path + ".tmp", ignore_errors=True)  # of a process that was killed here
            os.makedirs(path + ".tmp")
            tokenise(spec, tokenizer, *options, path + ".tmp", lambda: os.utime(lock.fileno()))
            os.replace(path + ".tmp", path)
    return read_arrays(path)


def read_arrays(directory):
    """The Dataset that tokenise wrote."""
    with open(os.path.join(directory, "facts.json"), encoding="utf-8") as f:
        facts = json.load(f)
    arrays = {name: np.memmap(os.path.join(directory, name), dtype, mode="r") for name, dtype in ARRAYS.items()}
    return Dataset(**arrays, **{**facts, "ledger": Ledger(**facts["ledger"])})


def tokenise(spec, tokenizer, max_length, too_long, train_on_prompt, train_on, keys, directory, progress, limit=None):
    """See load. Writes a Dataset's arrays and facts into a directory; calls progress() every thousand rows."""
    ledger, state, groups = Ledger(), hashlib.blake2b(digest_size=16), data_files(spec)
    files = [file for _, names in groups for file in names]
    weights = [[group, weight] for group, (weight, names) in enumerate(groups) for _ in names]

    def render(rows):
        """A thousand rows as (file, row number, text, spans)."""
        rendered = []
        for file, number, row in rows:
            where = f"{files[file]}[{number}]"
            messages = to_messages(row, where, keys)
            if train_on == "last":
                for message in [m for m in messages if m["role"] == "assistant"][:-1]:
                    message["train"] = False
            text, spans = tokenizer.render_spans(messages, where, row.get("tools"))
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"{where}: half a character (a lone surrogate): {error}") from error
            rendered.append((file, number, text, spans))
        return rendered

    def encode(rendered):
        return tokenizer.tokenizer.encode_batch([text for *_, text, _ in rendered], add_special_tokens=False)

    def write(rendered, encodings):
        """Mask them and append them to the arrays."""
        found = {name: [] for name in ARRAYS}
        for (file, number, text, spans), encoding in zip(rendered, encodings):
            ids = np.array(encoding.ids, dtype=np.int32)
            length, kept = len(ids), min(len(ids), max_length)
            ledger.rows += 1
            ledger.tokens += length
            if length > max_length and too_long == "error":
                raise ValueError(f"{files[file]}[{number}] has {length} tokens, more than --max_length {max_length}; "
                                 "raise it, or set --too_long to truncate or drop")
            if length > max_length and too_long == "drop":
                ledger.drop("too long", length)
                continue
            is_target = np.full(length, train_on_prompt)
            for start, stop, whole, trained in spans:
                first, end = token_range(encoding, start, stop, len(text))
                if first >= kept < length:
                    break  # cut off, and all behind it: finding its place takes a walk over all tokens
                is_target[first:end] = trained or train_on_prompt
                if trained and end <= kept:
                    ledger.turns += 1
                    ledger.turns_stopped += int(whole and tokenizer.stop_id in ids[first:end])
            is_target[0] = False  # nothing predicts the first token
            is_target = is_target[:kept]
            if not is_target.any():
                ledger.drop("without targets" + (" after truncation" if length > kept else ""), length)
                continue
            n_targets = int(is_target.sum())
            ledger.trained += 1
            ledger.target += n_targets
            ledger.context += kept - n_targets
            ledger.truncated += length - kept
            ledger.rows_truncated += length > kept
            values = ids[:kept], is_target, [kept], is_target.nonzero()[0][-1:], [n_targets], [file], [number]
            for name, part in zip(ARRAYS, values):
                found[name].append(part)
        for name, dtype in ARRAYS.items():
            if found[name]:
                block = np.concatenate(found[name]).astype(dtype).tobytes()
                state.update(block if name in ("tokens", "is_target", "sizes") else b"")
                outputs[name].write(block)

    with contextlib.ExitStack() as stack:
        outputs = {name: stack.enter_context(open(os.path.join(directory, name), "wb")) for name in ARRAYS}
        rows = ((i, number, row) for i, file in enumerate(files) for number, row in enumerate(read_file(file)))
        rows = itertools.islice(rows, limit)
        # The tokenizer works on all cores and without Python's lock: the next thousand are rendered meanwhile.
        waiting, pool = None, stack.enter_context(ThreadPoolExecutor(1))
        while (batch := list(itertools.islice(rows, 1000))) or waiting:
            rendered = render(batch)
            if waiting:
                write(waiting[0], waiting[1].result())
                progress()
            waiting = (rendered, pool.submit(encode, rendered)) if batch else None
    ledger.check(spec, max_length)
    state.update(repr(weights).encode())
    facts = {"files": files, "weights": weights, "ledger": asdict(ledger), "digest": state.hexdigest()}
    with open(os.path.join(directory, "facts.json"), "w", encoding="utf-8") as f:
        json.dump(facts, f)


# ---------------------------------------------------------------------------------------------------------------------
# which conversations a step holds, and how they are laid into micro-batches


class Sampler:
    """Which conversations step 1, 2, ... holds: a pure function of (seed, epoch), so resume needs the step only.

    batch_size conversations a step, or as many as batch_tokens tokens hold where that is given. The last step of an
    epoch takes what is left. len(sampler) is the number of steps: max_steps where given, else that of all epochs.

    mix  Dataset.mix(): groups are drawn from by weight. An epoch is as long as it can be without a conversation twice:
         the group that is shortest for its weight is in it whole, others in part, another part each epoch
    """

    def __init__(self, sizes, epochs, seed, batch_size, batch_tokens=None, max_steps=None, mix=None):
        self.sizes, self.seed, self.batch_size, self.batch_tokens = sizes, seed, batch_size, batch_tokens
        self.groups, self.quotas = None, [len(sizes)]
        if mix:
            self.groups, weights = mix
            counts = np.bincount(self.groups, minlength=len(weights))
            if not counts.all():
                raise ValueError(f"part {counts.argmin() + 1} of the mixed data has no conversation to train on")
            # exact fractions of the decimals as they were written: the same number on every machine
            shares = [Fraction(str(weight)) for weight in weights]
            most = min(int(count) / share for count, share in zip(counts, shares))
            self.quotas = [int(most * share) for share in shares]
            if not all(self.quotas):
                raise ValueError(f"weights {weights} of {counts.tolist()} conversations leave a part without any; give "
                                 "it a larger weight, or leave it out")
        if batch_tokens and np.max(sizes) > batch_tokens:
            raise ValueError(f"--batch_tokens {batch_tokens}: the longest conversation has {np.max(sizes)} tokens")
        self.per_epoch = []  # steps
        while sum(self.per_epoch) < max_steps if max_steps else len(self.per_epoch) < epochs:
            steps = len(self.plan(len(self.per_epoch))[1]) - 1 if batch_tokens else -(-sum(self.quotas) // batch_size)
            self.per_epoch.append(steps)
        self.ends = np.cumsum(self.per_epoch)
        self.total = max_steps or int(self.ends[-1])
        self.epoch, self.cached = None, None

    def __len__(self):
        return self.total

    def plan(self, epoch):
        """The epoch's conversations in order, and where in it each step starts and the last one stops."""
        # Philox's raw stream is the same on every machine and NumPy version, a Generator's shuffle may change.
        keys = np.random.Philox(key=[self.seed, epoch]).random_raw(len(self.sizes))
        order = np.argsort(keys, kind="stable")
        if self.groups is not None:
            drawn = [order[self.groups[order] == g][:quota] for g, quota in enumerate(self.quotas)]
            order = np.concatenate(drawn)
            order = order[np.argsort(keys[order], kind="stable")]
        if not self.batch_tokens:
            return order, np.append(np.arange(0, len(order), self.batch_size), len(order))
        sizes, cuts = self.sizes[order], [0]
        ends = np.cumsum(sizes, dtype=np.int64)
        stops = np.searchsorted(ends, ends - sizes + self.batch_tokens, "right")  # of a step that starts at each
        while cuts[-1] < len(order):
            cuts.append(int(stops[cuts[-1]]))
        return order, np.array(cuts)

    def step(self, step):
        """(epochs done after it as a float, conversation ids) of a step, counted from 1."""
        epoch = int(np.searchsorted(self.ends, step))
        if epoch != self.epoch:
            self.epoch, self.cached = epoch, self.plan(epoch)
        index = step - 1 - (int(self.ends[epoch - 1]) if epoch else 0)
        order, cuts = self.cached
        return epoch + (index + 1) / self.per_epoch[epoch], order[cuts[index] : cuts[index + 1]]

    def ends_epoch(self, step):
        return step in self.ends or step == self.total


def pack(lengths, capacity, max_rows=None, dp_rank=0, dp_size=1):
    """Lay conversations into micro-batches of at most `capacity` tokens (and max_rows conversations); return those of
    one rank as lists of indices into lengths. Every rank gets equally many.

    Longest first into the emptiest. All ranks compute the same plan, in integers, so none has to ask another.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    n, places, longest = lengths[order], np.arange(len(order)), int(lengths.max(initial=1))
    assert longest <= capacity, (lengths, capacity)
    if max_rows:
        room = min(max_rows, capacity // longest)  # so many fit, whichever they are
        turn = places % (2 * dp_size)
        ranks = np.minimum(turn, 2 * dp_size - 1 - turn)  # there and back: as many for each, and as long each time
        count = max(1, -(-len(order) // (room * dp_size)))
    else:
        room, ranks = capacity, share(n, dp_size)
        by_rank = np.argsort(ranks, kind="stable")
        first = np.searchsorted(ranks[by_rank], ranks[by_rank])  # the place of its rank's longest
        before = np.cumsum(n[by_rank]) - n[by_rank]
        # When a conversation's turn comes, the emptiest of `count` micro-batches holds at most before / count tokens,
        # and none while there are more of them than conversations before: this many leave room for each.
        enough = np.minimum((before - before[first]) // (capacity - n[by_rank] + 1), places - first) + 1
        count = int(enough.max(initial=1))
    mine, n = order[ranks == dp_rank], n[ranks == dp_rank]
    bins, batches = [], [[] for _ in range(count)]
    fill(bins, np.ones_like(n) if max_rows else n, n, [room] * count)
    for i, b in zip(mine.tolist(), bins, strict=True):
        batches[b].append(i)
    return batches


def share(n, dp_size):
    """The rank of each of `n` tokens, given longest first: even in tokens and in squared length, attention's cost.

    The longest go where the cost so far is least, up to an even share of the tokens; the last 16th levels the tokens.
    A rank still short of tokens will get more of the short ones: its cost counts what those cost a token beforehand.
    """
    if dp_size == 1 or len(n) <= dp_size:
        return np.arange(len(n)) % dp_size
    tokens, squares = (np.append(np.cumsum(x[::-1])[::-1], 0) for x in (n, n * n))  # from each one on
    ranks, room = [], [-(-int(tokens[0]) // dp_size)] * dp_size
    for part in 4, 8, 16:
        stop = int((tokens > tokens[0] // part).sum())
        fill(ranks, n[:stop], n * (n - squares[stop] // max(1, tokens[stop])), room)
    fill(ranks, n, n, [int(tokens[0])] * dp_size)
    return np.array(ranks)


def fill(bins, sizes, costs, room):
    """Go on with `bins`, the bin of each item: that of least cost so far, without bins from when they lacked room."""
    loads, sizes, costs = [0] * len(room), sizes.tolist(), costs.tolist()
    for b, cost in zip(bins, costs):
        loads[b] += cost
    heap = sorted((load, b) for b, load in enumerate(loads))
    for size, cost in zip(sizes[len(bins) :], costs[len(bins) :]):
        while heap and room[heap[0][1]] < size:
            heapq.heappop(heap)
        if not heap:
            break
        load, b = heap[0]
        bins.append(b)
        room[b] -= size
        heapq.heapreplace(heap, (load + cost, b))


@dataclass
class MicroBatch:
    """Conversations one after another, without padding."""

    tokens: torch.Tensor  # (N,) int64
    targets: torch.Tensor  # (N,) int64: the next token where that is a target, IGNORE elsewhere
    lengths: tuple  # of each conversation; their sum is N
    ids: np.ndarray  # which conversations they are

    def owners(self):
        """(N,) int64: the conversation of each token."""
        return torch.from_numpy(self.ids).repeat_interleave(torch.tensor(self.lengths))


def micro_batches(dataset, ids, capacity, max_rows=None, dp_rank=0, dp_size=1):
    """The micro-batches of a step's conversations for one rank."""
    ids = np.asarray(ids)
    for group in pack(dataset.lengths[ids], capacity, max_rows, dp_rank, dp_size):
        spans = [(int(dataset.starts[i]), int(dataset.lengths[i])) for i in ids[group]]
        if not group:  # fewer conversations than ranks: one token without a target, as all ranks step together
            yield MicroBatch(torch.zeros(1, dtype=torch.long), torch.full((1,), IGNORE), (1,), ids[:1])
            continue
        inputs = np.concatenate([dataset.tokens[s : s + n] for s, n in spans])
        targets = np.concatenate([np.where(dataset.is_target[s + 1 : s + n + 1], dataset.tokens[s + 1 : s + n + 1],
                                           IGNORE) for s, n in spans])
        yield MicroBatch(torch.from_numpy(inputs).long(), torch.from_numpy(targets).long(), tuple(n for _, n in spans),
                         ids[group])


# ---------------------------------------------------------------------------------------------------------------------
# python data.py show|stats FILE --model DIR


def show(dataset, tokenizer, count, ids, color):
    """Print conversations as the model sees them, targets in green, or between « and » without colours."""
    marks, decode = ("\033[32m", "\033[0m") if color else ("«", "»"), tokenizer.tokenizer.decode
    for i in range(min(count, len(dataset))):
        here = slice(dataset.starts[i], dataset.starts[i + 1])
        tokens, targets = dataset.tokens[here], dataset.is_target[here]
        print(f"--- {dataset.source(i)}: {len(tokens)} tokens, {dataset.n_targets[i]} targets")
        borders = [0, *(np.flatnonzero(np.diff(targets)) + 1), len(tokens)]
        for start, stop in itertools.pairwise(borders):
            part = tokens[start:stop].tolist()
            text = " ".join(map(str, part)) + " " if ids else decode(part, skip_special_tokens=False)
            print(f"{marks[0]}{text}{marks[1]}" if targets[start] else text, end="")
        print()


def stats(dataset, capacity, batch_size):
    """Print lengths, what some max_length would cut, and how full packed micro-batches are."""
    sizes, n_targets = dataset.sizes, int(dataset.n_targets.sum())
    shares = (0, 25, 50, 75, 90, 95, 99, 100)
    print("tokens   " + "   ".join(f"{q}%: {n:,.0f}" for q, n in zip(shares, np.percentile(sizes, shares))))
    edges = [0, *(2**k for k in range(4, int(sizes.max()).bit_length() + 1))]
    counts = np.histogram(sizes, edges)[0]
    for low, high, n in zip(edges, edges[1:], counts):
        print(f"{low:>9,} to {high - 1:<9,} {n:>11,} {'#' * round(40 * n / counts.max())}")
    for length in (512, 1024, 2048, 4096):
        long = np.flatnonzero(sizes > length)
        lost = sum(int(dataset.is_target[dataset.starts[i] + length : dataset.starts[i + 1]].sum()) for i in long)
        print(f"--max_length {length:<5,} cuts {len(long):,} rows ({len(long) / len(sizes):.2%}) and {lost:,} target "
              f"tokens ({lost / n_targets:.2%})")
    lengths, used, made = np.minimum(dataset.lengths, capacity), 0, 0
    order, cuts = Sampler(lengths, 1, 42, batch_size).plan(0)
    for ids in np.split(order, cuts[1:-1]):
        made += len(pack(lengths[ids], capacity))
        used += int(lengths[ids].sum())
    print(f"packing  {used / (made * capacity):.1%} of {made:,} micro-batches of {capacity:,} tokens are filled, at "
          f"--batch_size {batch_size}")


def main():
    import checkpoint  # here this file is an entry point; for sft.py it is a leaf
    import template
    from config import knob, parse

    @dataclass
    class Config:
        """Look at data before training: python data.py show|stats FILE [flags]"""

        do: str | None = knob(None, "what to do", ("show", "stats"), group="data")
        data: str = knob("./data/example_sft.json", "as --train_data of sft.py")
        model: str = knob("tiny", "model whose tokenizer and chat template are used: directory, hub id or tiny")
        n: int = knob(3, "show: conversations")
        ids: bool = knob(False, "show: token ids instead of text")
        max_length: int = knob(2048, "show: tokens kept; stats: tokens of a micro-batch")
        batch_size: int = knob(64, "stats: conversations a step")
        train_on: str = knob("all", "which of the assistant's turns", ("all", "last"))
        prompt_key: str = knob(KEYS[0], "as of sft.py")
        response_key: str = knob(KEYS[1], "as of sft.py")
        messages_key: str = knob(KEYS[2], "as of sft.py")

    words = ["--n" if word == "-n" else word for word in sys.argv[1:]]
    cfg, _ = parse(Config, words, positional=["do", "data"])
    if not cfg.do:
        raise ValueError("what to do? python data.py show FILE --model DIR, or python data.py stats FILE --model DIR")
    for name, low in (("n", 1), ("max_length", 2), ("batch_size", 1)):
        if getattr(cfg, name) < low:
            raise ValueError(f"--{name} {getattr(cfg, name)}: it must be at least {low}")
    tokenizer = template.ChatTokenizer(checkpoint.model_directory(cfg.model))
    max_length, limit = (cfg.max_length, cfg.n) if cfg.do == "show" else (2**31 - 1, None)
    dataset = load(cfg.data, tokenizer, max_length, train_on=cfg.train_on, limit=limit,
                   keys=(cfg.prompt_key, cfg.response_key, cfg.messages_key))
    if cfg.do == "show":
        show(dataset, tokenizer, cfg.n, cfg.ids, sys.stdout.isatty() and "NO_COLOR" not in os.environ)
    else:
        print(*dataset.ledger.lines(), sep="\n")
        stats(dataset, cfg.max_length, cfg.batch_size)


if __name__ == "__main__":
    from config import run

    run(main)
