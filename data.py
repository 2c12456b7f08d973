"""From files of conversations to micro-batches of token ids, with every token accounted for.

Owns: reading rows, their shapes, the chat template, the target mask, the ledger, which conversations a step holds and
how they are laid into micro-batches. It knows ranks as two integers and nothing else of other processes.

The conversation is rendered once, whole, with the model's own template and tokenised once; targets are found by
character offsets in that one text. Nothing is rendered message by message or derived from a padding id.
"""

import fcntl
import gzip
import hashlib
import heapq
import json
import os
import re
import shutil
import time
import zlib
from dataclasses import asdict, dataclass, field
from datetime import datetime

import jinja2
import jinja2.ext
import jinja2.sandbox
import numpy as np
import torch
from tokenizers import Tokenizer

IGNORE = -100  # a target that is not trained: model.py's, and PyTorch's own
SHAPES = ('{"prompt", "response"}, {"instruction", "input"?, "output"}, {"messages" or "conversations": [{"role", '
          '"content"}, ...]} or {"conversations": [{"from", "value"}, ...]}')
SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
                  "observation": "tool", "tool": "tool"}
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


# ---------------------------------------------------------------------------------------------------------------------
# reading: files -> rows -> messages


def data_files(spec):
    """The files that `spec` names: a file, several with commas, or a directory of them."""
    found = []
    for path in map(str.strip, spec.split(",")):
        if os.path.isdir(path):
            endings = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
            files = sorted(os.path.join(path, f) for f in os.listdir(path) if f.endswith(endings))
            if not files:
                raise FileNotFoundError(f"{path}: no data file in this directory ({', '.join(endings)})")
        elif not os.path.exists(path):
            raise FileNotFoundError(f"{path}: no such data file; give a JSON, JSON Lines or parquet file, several with "
                                    "commas, or a directory")
        else:
            files = [path]
        found += files
    return found


def read_files(spec):
    """Yield (where, row) for every row of the files that `spec` names.

    Containers, told apart by their first bytes: a JSON array, JSON Lines, gzip of either, parquet (with pyarrow).
    Raises FileNotFoundError, or ValueError with the line and column where a file is not JSON.
    """
    for file in data_files(spec):
        for i, row in enumerate(read_file(file)):
            yield f"{file}[{i}]", row


def read_file(path):
    """Yield the rows of one file."""
    with open(path, "rb") as f:
        magic = f.read(4)
    if magic == b"PAR1":
        try:
            import pyarrow.parquet  # optional: only parquet files need it
        except ImportError as error:
            raise ValueError(f"{path} is a parquet file, which pyarrow reads: pip install pyarrow") from error
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
        return
    with (gzip.open if magic[:2] == b"\x1f\x8b" else open)(path, "rt", encoding="utf-8-sig") as f:
        try:
            start = f.read(1)
            while start.isspace():
                start = f.read(1)
            f.seek(0)
            if start != "[":
                for number, line in enumerate(f, 1):
                    if line.strip():
                        yield parse_json(line, path, number)
                return
            rows = parse_json(f.read(), path, 1)
        except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path} can't be read as UTF-8 text: {error}") from error
    yield from rows


def parse_json(text, path, first_line):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: line {error.lineno + first_line - 1}, column {error.colno}: {error.msg}"
                         "; a file is a JSON array of rows, or one JSON object a line") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists
        raise ValueError(f"{path}: Python can't read its JSON, line {first_line} on: {error}") from error


def to_messages(row, where):
    """The messages of a row in any of the accepted shapes: [{"role", "content", "train"?, ...}, ...].

    Raises ValueError naming the row for an unknown shape, an unknown role, an empty answer, or no answer at all.
    """
    keys = sorted(row) if isinstance(row, dict) else type(row).__name__
    turns = (row.get("messages") or row.get("conversations")) if isinstance(row, dict) else None
    if isinstance(turns, list):
        messages = [to_message(turn, where) for turn in turns]
    elif isinstance(row, dict) and "prompt" in row and "response" in row:
        messages = [to_message({"role": "user", "content": row["prompt"]}, where),
                    to_message({"role": "assistant", "content": row["response"]}, where)]
    elif isinstance(row, dict) and "instruction" in row and "output" in row:
        question, history = (row["instruction"], row.get("input") or ""), row.get("history") or []
        if not all(isinstance(part, str) for part in question):
            raise ValueError(f'{where}: "instruction" and "input" must be strings, they are {question!r:.80}')
        if not isinstance(history, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in history):
            raise ValueError(f'{where}: "history" must be [["question", "answer"], ...], it is {history!r:.60}')
        exchanges = [*history, ("\n".join(filter(None, question)), row["output"])]
        messages = [to_message({"role": role, "content": content}, where)
                    for exchange in exchanges for role, content in zip(("user", "assistant"), exchange)]
    else:
        raise ValueError(f"{where}: unknown row shape, its keys are {keys}; accepted are {SHAPES}")
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
            raise ValueError(f"{where}: unknown \"from\": {turn['from']!r}; known are {', '.join(SHAREGPT_ROLES)}")
        message.update(role=SHAREGPT_ROLES[turn["from"]], content=turn.get("value"))
    weight = turn.get("weight", turn.get("train", True))
    if weight not in (0, 1):
        raise ValueError(f"{where}: \"train\" must be true or false (or \"weight\" 1 or 0), it is {weight!r}")
    if not isinstance(message["role"], str):
        raise ValueError(f"{where}: a role must be a string, it is {message['role']!r:.60}")
    message["train"] = bool(weight)
    content = message.get("content")
    if message["role"] == "assistant" and message.get("tool_calls"):
        message["content"] = content or ""
    elif not isinstance(content, str):
        raise ValueError(f"{where}: the content of a {message['role']} message must be a string, it is {content!r:.60}")
    elif message["role"] == "assistant" and not content.strip():
        raise ValueError(f"{where}: an empty answer; remove the row or write what the model should say")
    return message


# ---------------------------------------------------------------------------------------------------------------------
# the chat template and where its targets are


TEMPLATE_ERRORS = jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError


class GenerationBlock(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %}, by which a template marks what the assistant generates."""

    tags = {"generation"}
    MARKS = "\ufdd0", "\ufdd1"  # Unicode noncharacters: never in text, taken out again after rendering

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller):
        return caller().join(self.MARKS)


def refuse(message):
    raise jinja2.TemplateError(message)


class ChatTokenizer:
    """A model's tokenizer and chat template, as its directory has them.

    turn_end     text of the token that ends an assistant turn, e.g. <|im_end|>; None if the template never ends one
    stop_id      its id
    size         one more than the highest id
    header       what the generation prompt ends with, e.g. "assistant\\n": an answer's targets begin after it
    is_fallback  the model has no template and gets ChatML
    """

    def __init__(self, directory):
        path = os.path.join(directory, "tokenizer.json")
        if not os.path.exists(path):
            raise FileNotFoundError(f"{directory} has no tokenizer.json; --tokenizer may name another directory")
        with open(path, encoding="utf-8") as f:
            text = f.read()
        parse_json(text, path, 1)
        self.tokenizer, self.text = Tokenizer.from_str(text), text
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.added = self.tokenizer.get_added_tokens_decoder()
        self.size = max(self.tokenizer.get_vocab_size(), *(i + 1 for i in self.added), 0)
        config = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if os.path.exists(path := os.path.join(directory, name)):
                with open(path, encoding="utf-8") as f:
                    config.update(parse_json(f.read(), path, 1))
        named = {k: v["content"] if isinstance(v, dict) else v for k, v in config.items() if k.endswith("_token")}
        self.special = {k: v for k, v in named.items() if isinstance(v, str)}  # bos_token, eos_token, ...

        source = config.get("chat_template")
        if isinstance(source, list):  # several by name
            source = {t["name"]: t["template"] for t in source}.get("default")
        if os.path.exists(path := os.path.join(directory, "chat_template.jinja")):
            with open(path, encoding="utf-8") as f:
                source = f.read()
        self.is_fallback = source is None
        if self.is_fallback:
            known = self.tokenizer.token_to_id("<|im_end|>") is not None
            end = "<|im_end|>" if known else self.special.get("eos_token")
            if end is None:
                raise ValueError(f"{directory}: no chat template, no <|im_end|> and no eos_token to end turns with")
            source = CHATML.replace("<|im_end|>", end)
        self.source, self.marks_answers = source, re.search(r"\{%[-+]?\s*generation\b", source) is not None

        # As transformers sets it up (utils/chat_template_utils.py), sandboxed: a template can't touch Python.
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, jinja2.ext.loopcontrols])
        environment.filters["tojson"] = lambda x, ensure_ascii=False, indent=None, separators=None, sort_keys=False: (
            json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys))
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self.template = environment.from_string(source)
            self.learn_turns()
        except TEMPLATE_ERRORS as error:
            raise ValueError(f"{directory}: its chat template can't be used: {error}") from error

    def learn_turns(self):
        """Find header and turn end by rendering two short probes, with and without an answer."""
        ask, reply = {"role": "user", "content": "probe question"}, {"role": "assistant", "content": "probe answer"}
        again = {"role": "user", "content": "second question"}
        prompt, one, two = self.render([ask], True), self.render([ask, reply]), self.render([ask, reply, again])
        question_end = one.index("probe question") + len("probe question")
        tail, gap = (text[text.index("probe answer") + len("probe answer") :] for text in (one, two))
        joint = one[question_end : len(os.path.commonprefix([prompt, one]))]
        # What closes the user's turn closes the assistant's too; what is left of the joint is the answer's header.
        shared = os.path.commonprefix([joint, gap])
        added = [t.content for t in self.added.values()]
        ends = [(tail.index(token), -len(token), token) for token in added if token in tail]
        self.turn_end = min(ends)[2] if ends else None
        self.stop_id = self.tokenizer.token_to_id(self.turn_end) if ends else None
        opening = shared.rpartition(self.turn_end)[2].lstrip() if ends else ""
        self.header = opening + joint[len(shared) :]

    def render(self, messages, add_generation_prompt=False, tools=None):
        """The text of a conversation, as transformers' apply_chat_template gives it."""
        text = self.render_marked(messages, add_generation_prompt, tools)
        return re.sub(f"[{''.join(GenerationBlock.MARKS)}]", "", text) if self.marks_answers else text

    def render_marked(self, messages, add_generation_prompt=False, tools=None):
        messages = [{k: v for k, v in m.items() if k != "train"} for m in messages]
        return self.template.render(messages=messages, tools=tools, documents=None,
                                    add_generation_prompt=add_generation_prompt, **self.special)

    def render_spans(self, messages, where, tools=None):
        """Render once and find each assistant turn: text, [(start, stop, whole, trained), ...] in characters.

        A span runs from the end of the turn's header to the end of the token that ends it: reasoning that the
        template puts there is inside, the newline after the turn and a header behind the last turn are not.
        `whole` says that the turn's end is in it.

        Raises ValueError when the template refuses the conversation or an answer can't be found in the text.
        """
        try:
            marked = self.render_marked(messages, tools=tools)
        except TEMPLATE_ERRORS as error:
            raise ValueError(f"{where}: the model's chat template refuses this conversation: {error}") from error
        answers = [m for m in messages if m["role"] == "assistant"]
        opens, closes = GenerationBlock.MARKS
        if self.marks_answers:
            text, spans = "", []
            for i, piece in enumerate(re.split(f"[{opens}{closes}]", marked)):
                if i % 2:  # inside a block
                    spans.append((len(text), len(text) + len(piece), bool(self.turn_end and self.turn_end in piece)))
                text += piece
            if len(spans) != len(answers):
                raise ValueError(f"{where}: the chat template marks {len(spans)} answers as generated, there are "
                                 f"{len(answers)}")
            return text, [(*span, m["train"]) for span, m in zip(spans, answers)]

        text, spans, cursor = marked, [], 0
        for message in messages:
            content = message["content"].strip()
            if message["role"] != "assistant":
                found = locate(text, content, cursor)
                cursor = found[1] if found else cursor
                continue
            header = text.find(self.header, cursor)
            begin = header + len(self.header)
            found = locate(text, content, begin) if header >= 0 else None
            if header >= 0 and (not found or text[begin : found[0]].strip()):
                # templates move or drop the reasoning before the answer
                limit = text.find(self.turn_end, begin) if self.turn_end else -1
                thought = text.rfind("</think>", begin, limit if limit >= 0 else len(text))
                found = locate(text, content.rpartition("</think>")[2].strip(),
                               begin if thought < 0 else thought + len("</think>"))
            if not found:
                raise ValueError(f"{where}: the answer {content!r:.60} can't be found in what the chat template made "
                                 f"of it: {text[cursor:]!r:.200}")
            start, stop = (header + len(self.header) if self.header else found[0]), found[1]
            end = text.find(self.turn_end, stop) if self.turn_end else -1
            between = text[stop:end].strip() if end >= 0 else "?"
            whole = not between or bool(end >= 0 and message.get("tool_calls"))
            cursor = end + len(self.turn_end) if whole else stop
            spans.append((start, cursor, whole, message["train"]))
        return text, spans


def locate(text, content, start):
    """(start, stop) of content in text, from `start` on; white space may differ, as some templates re-indent."""
    at = text.find(content, start)
    if at >= 0:
        return at, at + len(content)
    found = re.compile(r"\s+".join(map(re.escape, content.split()))).search(text, start)
    return found.span() if found else None


def token_range(encoding, start, stop, text_length):
    """The tokens that lie wholly inside the characters [start, stop). One that a merge has pulled over the border
    is left out: the model can't generate it, as its first half is already in the prompt."""

    def first_from(char):
        while char < text_length:
            token = encoding.char_to_token(char)
            if token is not None:
                return token
            char += 1
        return len(encoding.ids)

    first = first_from(start)
    if first < len(encoding.ids) and encoding.token_to_chars(first)[0] < start:
        first += 1
    end = first_from(stop)
    if end < len(encoding.ids) and encoding.token_to_chars(end)[0] < stop:
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
            raise ValueError(f"only {self.turns_stopped} of {self.turns} assistant turns train a token that ends them: "
                             "the model would never stop; use a chat template (--tokenizer) that ends each turn with "
                             "a special token")


ARRAYS = "tokens", "is_target", "starts", "lengths"  # a Dataset's, in the order of its fields


@dataclass
class Dataset:
    """Conversations as flat arrays; conversation i is tokens[starts[i]:starts[i + 1]]."""

    tokens: np.ndarray  # int32
    is_target: np.ndarray  # bool
    starts: np.ndarray  # int64, one more than there are conversations
    lengths: np.ndarray  # int64: the inputs of each, up to its last target; what follows that can't change the loss
    sources: list  # "file[row]" of each
    ledger: Ledger

    def __post_init__(self):
        self.sizes = np.diff(self.starts)  # tokens of each
        self.n_targets = np.add.reduceat(self.is_target, self.starts[:-1], dtype=np.int64)

    def __len__(self):
        return len(self.lengths)

    def digest(self):
        """A hash of tokens, targets and their order: resume goes on with the same data or not at all."""
        state = hashlib.blake2b(digest_size=16)
        for array in (self.tokens, self.is_target, self.starts):
            state.update(np.ascontiguousarray(array))
        return state.hexdigest()


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
        time.sleep(0.1)


def load(spec, tokenizer, max_length, too_long="truncate", train_on_prompt=False, cache_dir=None, timeout=600):
    """Read, render, tokenise and mask everything that `spec` names; return a checked Dataset.

    too_long   what happens to a conversation of more than max_length tokens: truncate (from the right), drop, error
    cache_dir  keep the result there, and map it into memory from there: under a lock, so one process of a node makes
               it while the others wait, before any collective, for as long as it goes on
    timeout    seconds without progress after which it is given up (take_lock)
    """
    options = max_length, too_long, train_on_prompt
    if cache_dir is None:
        return tokenise(spec, tokenizer, *options, lambda: None)
    # The key is all that the result depends on, this program and, for templates that print it, the date included.
    key = hashlib.blake2b(repr((spec, tokenizer.source, tokenizer.special, options)).encode(), digest_size=16)
    key.update(tokenizer.text.encode())
    if "strftime_now" in tokenizer.source:
        key.update(datetime.now().strftime("%Y-%m-%d").encode())
    for file in (__file__, *data_files(spec)):
        with open(file, "rb") as f:
            while chunk := f.read(2**24):
                key.update(chunk)
    path = os.path.join(os.path.expanduser(cache_dir), key.hexdigest())
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + ".lock", "a+") as lock:
        take_lock(lock, timeout)
        if not os.path.isdir(path):
            shutil.rmtree(path + ".tmp", ignore_errors=True)  # of a process that was killed here
            dataset = tokenise(spec, tokenizer, *options, lambda: os.utime(lock.fileno()))
            os.makedirs(path + ".tmp")
            for name in ARRAYS:
                np.save(os.path.join(path + ".tmp", name + ".npy"), getattr(dataset, name))
            with open(os.path.join(path + ".tmp", "facts.json"), "w", encoding="utf-8") as f:
                json.dump({"sources": dataset.sources, "ledger": asdict(dataset.ledger)}, f)
            os.replace(path + ".tmp", path)
    arrays = [np.load(os.path.join(path, name + ".npy"), mmap_mode="r", allow_pickle=False) for name in ARRAYS]
    with open(os.path.join(path, "facts.json"), encoding="utf-8") as f:
        facts = json.load(f)
    return Dataset(*arrays, facts["sources"], Ledger(**facts["ledger"]))


def tokenise(spec, tokenizer, max_length, too_long, train_on_prompt, progress):
    """See load; calls progress() every thousand rows."""
    ledger, tokens, masks, sources = Ledger(), [], [], []

    def add(rows):
        rendered = []
        for where, row in rows:
            text, spans = tokenizer.render_spans(to_messages(row, where), where, row.get("tools"))
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"{where}: half a character (a lone surrogate): {error}") from error
            rendered.append((where, text, spans))
        encodings = tokenizer.tokenizer.encode_batch([text for _, text, _ in rendered], add_special_tokens=False)
        for (where, text, spans), encoding in zip(rendered, encodings):
            length, kept = len(encoding.ids), min(len(encoding.ids), max_length)
            ledger.rows += 1
            ledger.tokens += length
            if length > max_length and too_long == "error":
                raise ValueError(f"{where} has {length} tokens, more than --max_length {max_length}; raise it, or set "
                                 "--too_long to truncate or drop")
            if length > max_length and too_long == "drop":
                ledger.drop("too long", length)
                continue
            is_target = np.full(length, train_on_prompt)
            for start, stop, whole, trained in spans:
                first, end = token_range(encoding, start, stop, len(text))
                is_target[first:end] = trained or train_on_prompt
                if trained and end <= kept:
                    ledger.turns += 1
                    ledger.turns_stopped += whole and tokenizer.stop_id in encoding.ids[first:end]
            is_target[0] = False  # nothing predicts the first token
            is_target = is_target[:kept]
            if not is_target.any():
                ledger.drop("without targets" + (" after truncation" if length > kept else ""), length)
                continue
            ledger.trained += 1
            ledger.target += int(is_target.sum())
            ledger.context += kept - int(is_target.sum())
            ledger.truncated += length - kept
            ledger.rows_truncated += length > kept
            tokens.append(np.array(encoding.ids[:kept], dtype=np.int32))
            masks.append(is_target)
            sources.append(where)

    waiting = []
    for item in read_files(spec):
        waiting.append(item)
        if len(waiting) == 1000:  # encode_batch works on all cores
            add(waiting)
            waiting = []
            progress()
    if waiting:
        add(waiting)
    ledger.check(spec, max_length)
    starts = np.concatenate(([0], np.cumsum([len(t) for t in tokens])))
    lengths = np.array([mask.nonzero()[0][-1] for mask in masks])
    return Dataset(np.concatenate(tokens), np.concatenate(masks), starts, lengths, sources, ledger)


# ---------------------------------------------------------------------------------------------------------------------
# which conversations a step holds, and how they are laid into micro-batches


class Sampler:
    """Which conversations step 1, 2, ... holds: a pure function of (seed, epoch), so resume needs the step only.

    batch_size conversations a step, or as many as batch_tokens tokens hold where that is given. The last step of an
    epoch takes what is left. len(sampler) is the number of steps: max_steps where given, else that of all epochs.
    """

    def __init__(self, sizes, epochs, seed, batch_size, batch_tokens=None, max_steps=None):
        self.sizes, self.seed, self.batch_size, self.batch_tokens = sizes, seed, batch_size, batch_tokens
        if batch_tokens and max(sizes) > batch_tokens:
            raise ValueError(f"--batch_tokens {batch_tokens}: the longest conversation has {max(sizes)} tokens")
        self.per_epoch = []  # steps
        while sum(self.per_epoch) < max_steps if max_steps else len(self.per_epoch) < epochs:
            steps = len(self.batches(len(self.per_epoch))) if batch_tokens else -(-len(sizes) // batch_size)
            self.per_epoch.append(steps)
        self.ends = np.cumsum(self.per_epoch)
        self.total = max_steps or int(self.ends[-1])
        self.epoch, self.cached = None, None

    def __len__(self):
        return self.total

    def batches(self, epoch):
        """The epoch's conversations in order, cut into steps."""
        # Philox's raw stream is the same on every machine and NumPy version, a Generator's shuffle may change.
        keys = np.random.Philox(key=[self.seed, epoch]).random_raw(len(self.sizes))
        order = np.argsort(keys, kind="stable")
        if not self.batch_tokens:
            return [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        cuts, total = [], 0
        for i, size in enumerate(self.sizes[order].tolist()):
            if total + size > self.batch_tokens:
                cuts.append(i)
                total = 0
            total += size
        return np.split(order, cuts)

    def step(self, step):
        """(epochs done after it as a float, conversation ids) of a step, counted from 1."""
        epoch = int(np.searchsorted(self.ends, step))
        if epoch != self.epoch:
            self.epoch, self.cached = epoch, self.batches(epoch)
        index = step - 1 - (int(self.ends[epoch - 1]) if epoch else 0)
        return epoch + (index + 1) / self.per_epoch[epoch], self.cached[index]

    def ends_epoch(self, step):
        return step in self.ends or step == self.total


def pack(lengths, capacity, max_rows=None, dp_rank=0, dp_size=1):
    """Lay conversations into micro-batches of at most `capacity` tokens (and max_rows conversations); return those of
    one rank as lists of indices into lengths. Every rank gets equally many.

    Longest first into the emptiest, with as few micro-batches as that fills: all ranks compute the same plan, so none
    has to ask another, and their loads are even.
    """
    assert all(n <= capacity for n in lengths), (lengths, capacity)
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    count = max(1, -(-int(sum(lengths)) // (capacity * dp_size)))
    while True:
        bins = [[] for _ in range(count * dp_size)]
        heap = [(0, i) for i in range(len(bins))]
        for i in order:
            if not heap or heap[0][0] + lengths[i] > capacity:
                break  # not even the emptiest has room
            load, b = heapq.heappop(heap)
            bins[b].append(i)
            if max_rows is None or len(bins[b]) < max_rows:
                heapq.heappush(heap, (load + int(lengths[i]), b))
        else:
            return bins[dp_rank::dp_size]
        count += 1


@dataclass
class MicroBatch:
    """Conversations one after another, without padding."""

    tokens: torch.Tensor  # (N,) int64
    targets: torch.Tensor  # (N,) int64: the next token where that is a target, IGNORE elsewhere
    lengths: tuple  # of each conversation; their sum is N


def micro_batches(dataset, ids, capacity, max_rows=None, dp_rank=0, dp_size=1):
    """The micro-batches of a step's conversations for one rank."""
    ids = np.asarray(ids)
    for group in pack(dataset.lengths[ids], capacity, max_rows, dp_rank, dp_size):
        spans = [(int(dataset.starts[i]), int(dataset.lengths[i])) for i in ids[group]]
        if not group:  # fewer conversations than ranks: one token without a target, as all ranks step together
            yield MicroBatch(torch.zeros(1, dtype=torch.long), torch.full((1,), IGNORE), (1,))
            continue
        inputs = np.concatenate([dataset.tokens[s : s + n] for s, n in spans])
        targets = np.concatenate([np.where(dataset.is_target[s + 1 : s + n + 1], dataset.tokens[s + 1 : s + n + 1],
                                           IGNORE) for s, n in spans])
        yield MicroBatch(torch.from_numpy(inputs).long(), torch.from_numpy(targets).long(), tuple(n for _, n in spans))
