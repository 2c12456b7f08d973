"""Random files: each is used correctly, or refused with one error line that names it.

    python tests/hostile/fuzz.py data --cases 100000 [--seed N]
    targets: data (rows), tokens (rows that are tokens or plain texts), json, parquet and tables (bytes of data
    files), sources (--train_data), info (dataset_info.json), template, kwargs (--template_kwargs, and those of rows),
    tokenizer, config, weights, resume

Hypothesis generates the cases. Each ends in a value, which is compared with a count made here, or in an error
that settings.errors.run prints as one line, see helpers.attempt. Any other error, or a case that takes too
long, is a failure; the shortest one of each kind is printed. test_ledger.py has the failures that were found,
and runs some hundred cases too.
"""

import argparse
import contextlib
import dataclasses
import faulthandler
import gzip
import io
import json
import math
import os
import random
import re
import shutil
import sys
import tempfile
import traceback
import zlib
from collections import Counter
from pathlib import Path

TESTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [os.path.dirname(TESTS), TESTS]  # when started as a program
os.environ["HF_HUB_OFFLINE"] = "1"
from data_helpers import FAMILIES, tiny  # noqa: E402
from helpers import RAW, ROOT, TINY, attempt, chatml, make_directory  # noqa: E402
import numpy as np  # noqa: E402
from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import data  # noqa: E402
from settings.errors import UserError  # noqa: E402
from text import containers, formats, masks, sources  # noqa: E402
from text.formats import NO_CONTEXT  # noqa: E402
from text.template import ChatTokenizer  # noqa: E402

END = RAW.token_to_id(tiny.special["eos_token"])
outcomes = Counter()  # how often each outcome was, for the report


def count_outcome(outcome):
    """Count an outcome by its text, without the parts that come from the case."""
    text = str(outcome).replace("n't", " not")
    text = re.sub(r"(?s)'.*?'|\".*?\"|\[.*|\{.*|\S*/\S+|here\[0\]|[^ -~]+|\d+", "…", text)
    outcomes[" ".join(text.split())[:60]] += 1


# ----------------------------------------------------------------------------------------------------------
# conversations and rows

UNUSUAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_start|>assistant\n",
         "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n", "<|im_", "end|>", "assistant\n", "user\n",
         "system", "<think>", "</think>", "<think>\nhm\n</think>\n\n", "{{ x }}", "{% generation %}",
         "\ufdd0", "\ufdd1", "\ufdd2", "\ufeff", "\ufffd", "\0", "\x1c", "\x85", "\u200b", "\u202e", "\u2028",
         "\u0301", "e\u0301", "🙂", "👩‍👩‍👧", "🇨🇳", "你好，世界。", "\u3000", "\u00a0", " ", "  ", "\n", "\n\n",
         "\r\n", "\t", "word " * 60, "a" * 700, "\n" * 90, '"', "\\", "\\ud800", "'s", "0", "42",
         "def f(x):\n    return x\n"]
texts = st.lists(st.one_of(st.sampled_from(UNUSUAL), st.text(max_size=6)), max_size=5).map("".join)
answers = texts.filter(str.strip)
marks = st.sampled_from([{}] * 4 + [{"train": True}, {"train": False}, {"weight": 1}, {"weight": 0},
                                    {"weight": 0.0}, {"train": True, "weight": 0}, {"loss": 1}, {"loss": None},
                                    {"masked": True}, {"masked": False, "loss_weight": 2.5}])
no_marks = st.sampled_from([{}] * 4 + [{"train": False}, {"weight": 0}, {"loss": None}, {"masked": False}])


def is_trained(message):
    """Whether an answer is trained: no mark of it says that it is not."""
    said = [message.get(key) for key in ("train", "loss", "weight", "loss_weight")]
    return not message.get("masked") and all(value or value is None for value in said)


@st.composite
def conversations(draw):
    """Messages that the tiny template accepts: a system message may be the first, others have any order."""
    alternating = st.integers(1, 3).map(lambda n: ["user", "assistant"] * n)
    any_order = st.lists(st.sampled_from(["user", "assistant"]), min_size=1, max_size=5)
    roles = draw(st.one_of(alternating, alternating, any_order.filter(lambda r: "assistant" in r)))
    messages = [{"role": r, "content": draw(answers if r == "assistant" else texts), **draw(marks if r == "assistant" else no_marks)}
                for r in roles]
    return ([{"role": "system", "content": draw(texts)}] if draw(st.booleans()) else []) + messages


@st.composite
def rows(draw):
    """(a row in any of the accepted formats, its messages)"""
    messages = draw(conversations())
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    turns = [{k: v for k, v in m.items() if k in ("role", "content")} for m in messages[system is not None :]]
    pairs = list(zip(turns[::2], turns[1::2]))
    plain = len(turns) % 2 == 0 and all([m["role"] for m in pair] == ["user", "assistant"] for pair in pairs)
    more = ["history"] + ["pair"] * (len(pairs) == 1) if plain else []
    shape = draw(st.sampled_from(["messages", "conversations", "from", *more]))
    extra = draw(st.sampled_from([{}, {}, {"id": 7}, {"tools": None},
                                  {"source": "web", "score": 1.5, "label": 3}, {"label": True, "prompt": None}]))
    if shape in ("messages", "conversations"):
        return {shape: messages, **extra}, messages
    if shape == "from":
        senders = {"user": ("human", "user", "Prompter"), "assistant": ("gpt", "assistant", "MODEL"),
                   "system": ("system", "developer")}
        sharegpt = [{"from": draw(st.sampled_from(senders[m["role"]])), "value": m["content"],
                     **{k: v for k, v in m.items() if k not in ("role", "content")}} for m in messages]
        if system and draw(st.booleans()):
            return {"conversations": sharegpt[1:], "system": system, **extra}, messages
        return {"conversations": sharegpt, **extra}, messages
    messages = ([{"role": "system", "content": system}] if system else []) + turns
    around = {"system": system} if system or draw(st.booleans()) else {}
    extra.pop("prompt", None)
    if shape == "pair":
        question, answer = draw(st.sampled_from([
            ("prompt", "response"), ("prompt", "completion"), ("question", "answer"), ("Query", "Response"),
            ("input", "output"), ("problem", "solution")]))
        contents = [turn["content"] for turn in turns]
        if question == "prompt":
            contents = draw(st.sampled_from([contents, [turns[:1], turns[1:]], [turns[:1], contents[1]]]))
        return {**extra, question: contents[0], answer: contents[1], **around}, messages
    *history, (question, answer) = [[m["content"] for m in pair] for pair in pairs]
    more = {"history": history} if history or draw(st.booleans()) else {}
    return {"instruction": question, "output": answer, **more, **around, **extra}, messages


names = st.sampled_from([
    "role", "content", "from", "value", "train", "weight", "messages", "conversations", "prompt", "response",
    "instruction", "input", "output", "history", "system", "tools", "tool_calls", "function", "name",
    "arguments", "reasoning_content", "reasoning", "thinking", "id", "", "loss", "masked", "loss_weight", "images",
    "chosen", "label", "completion", "context", "chat_template_kwargs", "enable_thinking", "type", "function_call"])
leaves = st.integers(0, 3).flatmap(lambda kind: (texts, *map(st.sampled_from, (
    [None, True, False], [0, 1, -1, 2, 10**30, 0.5, float("nan"), float("inf")],
    ["", " ", "\ud800", "a\udfff", "user", "assistant", "system", "tool", "human", "gpt", "true",
     "x" * 3000])))[kind])
values = st.recursive(leaves, lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.dictionaries(names, inner, max_size=3),
    st.dictionaries(st.one_of(names, texts), inner, max_size=3)), max_leaves=5)


extras = st.dictionaries(st.sampled_from(["tool_calls", "tool_calls", "reasoning_content", "reasoning",
                                          "thinking", "tools", "name", "weight", "system"]), values,
                         max_size=2)


@st.composite
def damaged(draw, value):
    """A JSON value with a change in one place."""
    if not isinstance(value, (list, dict)) or not value or draw(st.integers(0, 5)) == 0:
        return draw(values)
    value = value.copy()
    key = draw(st.sampled_from(list(value) if isinstance(value, dict) else range(len(value))))
    how = draw(st.integers(0, 9))
    if how == 0:
        del value[key]
    elif how == 1 and isinstance(value, dict):
        value[draw(names)] = draw(values)
    elif how == 1:
        value.insert(key, draw(values))
    else:
        value[key] = draw(damaged(value[key]))
    return value


@st.composite
def damaged_rows(draw):
    """A row whose messages have more keys, a row with one or two wrong places, or any JSON value."""
    row, messages = draw(rows())
    if draw(st.booleans()):
        return {"messages": [{**message, **draw(extras)} for message in messages], **draw(extras)}
    for _ in range(draw(st.integers(1, 2))):
        row = draw(damaged(row))
    return row


options = st.fixed_dictionaries({
    "max_length": st.one_of(st.integers(2, 60), st.integers(30, 400), st.just(10**6), st.just(10**6)),
    "too_long": st.sampled_from(["truncate", "truncate", "drop", "error"]), "train_on_prompt": st.booleans(),
    "train_on": st.sampled_from(["all", "all", "last"])})


def by_pieces(messages, on_prompt=False):
    """(ids, loss mask) of ChatML with the tokenizer of models/tiny, without its offsets.

    Each text between special tokens is encoded by itself. A token has one character per byte, so lengths of
    tokens give the place of each.
    """
    special = {i: token.content for i, token in RAW.get_added_tokens_decoder().items()}
    start, end, newline = (RAW.encode(text).ids for text in ("<|im_start|>", "<|im_end|>", "\n"))
    ids, mask = [], []
    for message in messages:
        header, trained = message["role"] + "\n", message["role"] == "assistant" and is_trained(message)
        piece, at = RAW.encode(header + message["content"]).ids, 0
        ids += [*start, *piece, *end, *newline]
        mask += [False]
        for token in piece:
            mask.append(trained and at >= len(header.encode()))
            at += len(special.get(token) or RAW.id_to_token(token))
        mask += [trained, False]
    return (ids, [False] + [True] * (len(ids) - 1)) if on_prompt else (ids, mask)


def count(conversations_, max_length, too_long, train_on_prompt, train_on):
    """([(row, ids, loss mask) of each trained conversation], expected numbers of the ledger).

    conversations_  messages of each row, or why it is dropped
    """
    kept, expected, dropped = [], Counter(), Counter()
    for row, messages in enumerate(conversations_):
        if isinstance(messages, str):
            dropped[messages] += 1
            expected.update(rows=1)
            continue
        if train_on == "last":
            last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
            messages = [m if i == last or m["role"] != "assistant" else {**m, "train": False, "weight": 0}
                        for i, m in enumerate(messages)]
        ids, mask = by_pieces(messages, train_on_prompt)
        expected.update(rows=1, tokens=len(ids))
        is_long, cut = len(ids) > max_length, min(len(ids), max_length)
        reason = ("too long" if is_long and too_long == "drop" else None if any(mask[:cut]) else
                  "without targets" + (" after truncation" if is_long else ""))
        if reason:
            dropped[reason] += 1
            expected.update(in_dropped_rows=len(ids))
            continue
        kept.append((row, ids[:cut], mask[:cut]))
        expected.update(trained=1, target=sum(mask[:cut]), context=cut - sum(mask[:cut]),
                        truncated=len(ids) - cut, rows_truncated=is_long)
    return kept, {**dict.fromkeys(("rows", "tokens", "in_dropped_rows", "trained", "target", "context",
                                   "truncated", "rows_truncated"), 0), **expected, "dropped": dict(dropped)}


def assert_counts(dataset, path, kept, expected):
    """The dataset has exactly these conversations, and its ledger these numbers."""
    ledger = dataclasses.asdict(dataset.ledger)
    assert {name: ledger[name] for name in expected} == expected
    assert ledger["rows"] == ledger["trained"] + sum(ledger["dropped"].values())
    parts = "target context truncated in_dropped_rows".split()
    assert ledger["tokens"] == sum(ledger[name] for name in parts)
    assert 0.99 * ledger["turns"] <= ledger["turns_stopped"] <= ledger["turns"] != 0
    assert len(dataset) == len(kept) == ledger["trained"]
    for i, (row, ids, mask) in enumerate(kept):
        here = slice(dataset.starts[i], dataset.starts[i + 1])
        assert dataset.tokens[here].tolist() == ids
        assert dataset.loss_mask[here].tolist() == mask
        assert dataset.source(i) == f"{path}[{row}]"
        assert dataset.n_targets[i] == sum(mask) > 0
        assert dataset.n_inputs[i] == max(place for place, target in enumerate(mask) if target)
    assert dataset.starts[-1] == len(dataset.tokens) == ledger["target"] + ledger["context"]
    assert dataset.n_targets.sum() == ledger["target"]


def check_load(path, conversations_, how, tokenizer):
    """Load a file with known conversations: they are counted exactly, or refused if and only if they have to be."""
    kept, expected = count(conversations_, **how)
    dataset, refusal = attempt(data.load, path, tokenizer, **how, naming=path)
    read = [messages for messages in conversations_ if not isinstance(messages, str)]
    longest = max((len(by_pieces(messages)[0]) for messages in read), default=0)
    if how["too_long"] == "error" and longest > how["max_length"]:
        assert "more than --max_length" in refusal
    elif not kept:
        assert "no row is left to train on" in refusal
    elif refusal and "all assistant turns" in refusal:
        lengths = [len(by_pieces(conversations_[row])[0]) for row, *_ in kept]
        assert min(lengths) > how["max_length"]
    else:
        assert refusal is None, refusal
        assert_counts(dataset, path, kept, expected)
    count_outcome(refusal or "trained")


def check_rows(path, batch, how):
    """Rows with known messages, as an array or lines, are trained exactly."""
    write(path, [row for row, _ in batch], lines=len(batch) % 2 == 0)
    check_load(path, [messages for _, messages in batch], how, tiny)


def check_damaged_rows(path, batch, how):
    """Rows with any change: the messages that read_row makes are trained exactly, or the row is refused."""
    write(path, batch)
    messages = []
    for i, row in enumerate(batch):
        read, refusal = attempt(formats.read_row, row, f"{path}[{i}]", naming=f"{path}[{i}]")
        if refusal is None and read.dropped:
            messages.append(read.dropped)
            continue
        if refusal is None:
            read, tools = read.messages, read.tools
            assert all(0 <= message["weight"] < math.inf for message in read)
            _, refusal = attempt(tiny.render_spans, read, f"{path}[{i}]", tools, naming=f"{path}[{i}]")
        if refusal is None and not is_text(read):
            refusal = f"{path}[{i}]: the text contains half a character"
        if refusal:
            _, first = attempt(data.load, path, tiny, **{**how, "too_long": "truncate"}, naming=path)
            place = len(f"{path}[{i}]: half a character")
            assert first and refusal[:place] in first, (first, refusal)  # the error of two rows lists both
            return count_outcome(refusal)
        messages.append(read)
    check_load(path, messages, how, tiny)


def is_text(messages):
    try:
        "".join(m["role"] + m["content"] for m in messages).encode()
    except UnicodeEncodeError:
        return False
    return True


def write(path, batch, lines=False):
    with open(path, "w", encoding="utf-8") as f:
        f.write("\n".join(map(json.dumps, batch)) if lines else json.dumps(batch))


# A target: a function of a directory that returns (a function that checks one case, a strategy for its arguments).


def case_data(directory):
    """Rows: two of three cases are correct."""
    path = os.path.join(directory, "rows.json")

    def check(good, batch, how):
        check_rows(path, batch, how) if good else check_damaged_rows(path, batch, how)

    return check, st.one_of(
        st.tuples(st.just(True), st.lists(rows(), min_size=1, max_size=4), options),
        st.tuples(st.just(True), st.lists(rows(), min_size=1, max_size=4), options),
        st.tuples(st.just(False), st.lists(damaged_rows(), min_size=1, max_size=2), options))


@st.composite
def token_rows(draw):
    """(a row of tokens or of plain text, its ids and their weights), or (a row, None) if it has to be refused."""
    if draw(st.integers(0, 3)) == 0:
        text = draw(answers.filter(str.strip))
        ids = RAW.encode(text).ids
        ids += [END] * (ids[-1:] != [END])
        return {"text": text}, (ids, [1.0] * len(ids))
    ids = draw(st.lists(st.integers(0, tiny.size - 1), min_size=1, max_size=9))
    row, weights, is_wrong = {"input_ids": ids}, [1.0] * len(ids), False
    numbers = st.sampled_from([0, 1, True, False, 0.5, 2.5, 1e-3])
    if draw(st.booleans()):
        kept = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
        row["labels"] = [i if keep else -100 for i, keep in zip(ids, kept)]
        weights = [float(keep) for keep in kept]
    for name in draw(st.sets(st.sampled_from(["loss_mask", "completion_mask", "assistant_masks"]))):
        row[name] = draw(st.lists(numbers, min_size=len(ids), max_size=len(ids)))
        weights = [weight * value for weight, value in zip(weights, row[name])]
    more = {"attention_mask": [1] * len(ids), "position_ids": list(range(len(ids))), "id": "x", "text": "x"}
    row |= {name: more[name] for name in draw(st.sets(st.sampled_from(sorted(more))))}
    if draw(st.booleans()):
        row["weight"] = draw(st.sampled_from([0, 1, 0.5, 3]))
        weights = [weight * row["weight"] for weight in weights]
    lists = [name for name, value in row.items() if isinstance(value, list) and value]
    if lists and draw(st.integers(0, 3)) == 0:
        name = draw(st.sampled_from(lists))
        wrong = {"input_ids": [-1, tiny.size, 1.5, "5", None, True], "labels": [tiny.size + 1, None, "x", 10**400],
                 "attention_mask": [0, None], "position_ids": [77, None]}.get(name, [-1, None, "1", float("nan")])
        is_wrong, at = True, draw(st.integers(0, len(row[name]) - 1))
        row[name] = [*row[name][:at], draw(st.sampled_from(wrong)), *row[name][at + 1 :]]
    elif lists and draw(st.integers(0, 5)) == 0:
        row[draw(st.sampled_from(lists))].append(1)
        is_wrong = len(lists) > 1
        if not is_wrong:
            weights.append(weights[0] and row.get("weight", 1))
    return row, None if is_wrong else (row.get("input_ids"), [0.0, *weights[1:]])


def case_tokens(directory):
    """Rows that are tokens, or plain texts: ids and weights are what the rows say, or the rows are refused."""
    path = os.path.join(directory, "rows.jsonl")

    def check(batch, max_length):
        write(path, [row for row, _ in batch], lines=True)
        dataset, refusal = attempt(data.load, path, tiny, max_length, naming=path)
        count_outcome(refusal or "trained")
        if any(expected is None for _, expected in batch):
            assert refusal
            return
        ids, weights, total = [], [], 0
        for row, (row_ids, row_weights) in batch:
            total += len(row_ids)
            cuts = masks.pieces(len(row_ids), max_length) if "text" in row and "input_ids" not in row else [
                (0, max_length)]
            for start, stop in cuts:
                here = [0.0, *row_weights[start + 1 : stop]]
                if any(here):
                    ids, weights = [*ids, row_ids[start:stop]], [*weights, here]
        assert (refusal is None) == bool(ids), refusal
        if refusal:
            return
        ledger = dataset.ledger
        assert ledger.rows == len(batch) == ledger.trained + sum(ledger.dropped.values())
        assert ledger.tokens == ledger.target + ledger.context + ledger.truncated + ledger.in_dropped_rows == total
        assert len(dataset) == len(ids)
        for i, (row_ids, row_weights) in enumerate(zip(ids, weights)):
            assert dataset.tokens[dataset.starts[i] : dataset.starts[i + 1]].tolist() == row_ids
            assert dataset.weights_of(i).tolist() == np.array(row_weights, np.float32).tolist()
        assert ledger.target == sum(weight > 0 for row_weights in weights for weight in row_weights)
        assert math.isclose(ledger.weight, sum(map(sum, weights)), rel_tol=1e-6)

    return check, st.tuples(st.lists(token_rows(), min_size=1, max_size=3),
                            st.one_of(st.integers(3, 12), st.just(2048)))


# ----------------------------------------------------------------------------------------------------------
# bytes

PIECES = [b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"[", b"]", b"{", b"}", b",", b":", b'"', b"\\",
          b"\\ud800", b"\n", b"\r", b"\x0b", b"\xc2\xa0", b"NaN", b"-Infinity", b"1e999", b"-", b"9" * 5000,
          b"[" * 3000, b'{"a":' * 3000, b"null", b"true", b'"prompt"', b'"messages": []', b"PAR1",
          b"\x1f\x8b"]


@st.composite
def broken(draw, content, most=4):
    """Bytes with up to `most` changes: flipped, cut, inserted or repeated bytes."""
    for _ in range(draw(st.integers(0, most))):
        at, n = draw(st.integers(0, len(content))), draw(st.integers(0, 60))
        how = draw(st.integers(0, 5))
        if how == 0:
            flipped = bytes(b ^ (1 << draw(st.integers(0, 7))) for b in content[at : at + 1])
            content = content[:at] + flipped + content[at + 1 :]
        elif how == 1:
            content = content[:at]
        elif how == 2:
            content = content[:at] + content[at + n :]
        elif how == 3:
            content = content[: at + n] + content[at:]
        else:
            content = content[:at] + draw(st.sampled_from(PIECES)) + content[at:]
    return content


EXAMPLES = [path.read_bytes() for path in sorted(Path(ROOT, "data").iterdir())]
EXAMPLES = [content if len(content) < 4000
            else json.dumps(json.loads(content)[:6], ensure_ascii=False).encode() for content in EXAMPLES]


@st.composite
def files(draw):
    """Bytes of a damaged data file, some compressed with gzip, which may be damaged too."""
    content = draw(broken(draw(st.sampled_from(EXAMPLES))))
    if draw(st.integers(0, 3)) == 0:
        content = draw(broken(gzip.compress(content, 1, mtime=0), 1))
    return content


def by_python(content):
    """The rows of a file by json.loads of the full text, of each line, or of one object after another; None if it
    is not JSON."""
    try:
        text = (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode("utf-8-sig")
        text = io.StringIO(text, newline=None).read().lstrip("\ufeff")  # line ends as in a text file
        if text.lstrip()[:1] == "[":
            return json.loads(text, object_pairs_hook=containers.unique)
        texts = [line.lstrip("\ufeff") for line in text.split("\n")]
        first = next(filter(str.strip, texts), "")
        if not first.lstrip().startswith("{") or not containers.continues(first):
            return [json.loads(line, object_pairs_hook=containers.unique) for line in texts if line.strip()]
        space = " \t\r\n"  # JSON's; Python's strip() removes a no-break space too
        found, text = [], text.lstrip(space)
        while text[:1] == "{":
            value, end = containers.DECODER.raw_decode(text)
            found, text = [*found, value], text[end:].lstrip(space)
        return None if text else found
    except (ValueError, EOFError, OSError, zlib.error, RecursionError):
        return None


def rows_in(path):
    """The rows of a file; a line that is not JSON raises its error, as data.render does."""
    found = [row for _, row in containers.read_rows(path)]
    for row in found:
        if isinstance(row, UserError):
            raise row
    return found


def check_bytes(path, content):
    """The rows equal those of Python's parser, and are then trained or refused like other rows."""
    Path(path).write_bytes(content)
    expected = by_python(content)
    got, refusal = attempt(rows_in, path, naming=path)
    if content[:4] != b"PAR1":
        assert (expected is None) == (got is None), refusal
        assert repr(got) == repr(expected)
    how = dict(max_length=2048, too_long="truncate", train_on_prompt=False, train_on="all")
    if expected is None or "\\ud" in ascii(expected):
        _, refusal = attempt(data.load, path, tiny, **how, naming=path)
        assert refusal or expected
        return count_outcome(refusal or "trained, half a character is in an unused key")
    check_damaged_rows(path, got, how) if got else attempt(data.load, path, tiny, **how, naming=path)


def case_json(directory):
    """The example files, damaged."""
    path = os.path.join(directory, "rows.json")
    return lambda content: check_bytes(path, content), st.tuples(files())


def case_tables(directory):
    """CSV, TSV, text, zstd, objects that hold rows, arrow: rows, or one line that names the file."""
    import pyarrow

    table = pyarrow.Table.from_pylist([{"prompt": f"q{i}", "response": ["a"] * i} for i in range(20)])
    arrow = []
    for make in (pyarrow.ipc.new_file, pyarrow.ipc.new_stream):
        sink = pyarrow.BufferOutputStream()
        with make(sink, table.schema) as writer:
            writer.write_table(table)
        arrow.append(("rows.arrow", sink.getvalue().to_pybytes()))
    row = {"prompt": "q", "response": "a"}
    contents = [("rows.csv", b'prompt,response\nq,"a, b\nc"\nr,"x ""y"""\n'),
                ("rows.tsv", b"prompt\tresponse\nq\ta\n"), ("rows.txt", "One.\n\nTwo 界.\n".encode()),
                ("rows.json", json.dumps({"v": 1, "data": [row] * 3}).encode()),
                ("rows.json", json.dumps({"train": [row], "test": [row]}, indent=1).encode()),
                ("rows.json", json.dumps({"prompt": {"0": "q"}, "response": {"0": "a"}}).encode()),
                ("rows.jsonl", json.dumps(row).encode("utf-16")), *arrow,
                ("rows.jsonl.zst", pyarrow.compress(EXAMPLES[0], "zstd", asbytes=True))]

    def check(name, content, split, chunk):
        path = os.path.join(directory, name)
        Path(path).write_bytes(content)
        containers.CHUNK = chunk
        found, refusal = attempt(lambda: list(containers.read_rows(path, split)), naming=path)
        assert refusal or all(where.startswith(path) for where, _ in found)
        count_outcome(refusal or f"{name} read")

    cases = st.one_of(st.sampled_from(contents), st.sampled_from(contents).flatmap(
        lambda case: st.tuples(st.just(case[0]), broken(case[1], 2))))
    return lambda case, *more: check(*case, *more), st.tuples(
        cases, st.sampled_from([None, "validation", "test"]), st.sampled_from([7, 2**20]))


def case_sources(directory):
    """The grammar of --train_data: sources, or one line that has what is written."""
    for name in ("a.json", "b,c:d.csv", "d/train.jsonl", "d/en/test.jsonl", "x=y@z[1].txt"):
        os.makedirs(os.path.dirname(os.path.join(directory, name)), exist_ok=True)
        Path(directory, name).write_text('{"prompt": "q", "response": "a"}', encoding="utf-8")
    os.chdir(directory)
    parts = st.sampled_from(["a.json", "b,c:d.csv", "d", "d/en", "x=y@z[1].txt", "n=", ":en", "@test", "@", "[:5]",
                             "[5]", ":0.5", ":1", ",", ":", "[", "]", " ", "=", "~", "-1", "\0", "界", '{"path": "d"}',
                             "/"])
    a_value = st.one_of(st.sampled_from(["a.json", "d", "1:2", "0.5"]), st.integers(), st.none())
    keys = st.sampled_from(["path", "split", "rows", "weight", "x"])
    mappings = st.lists(st.dictionaries(keys, a_value, max_size=3), max_size=2).map(json.dumps)

    def check(spec):
        found, refusal = attempt(sources.data_files, spec)
        assert refusal or all(os.path.isfile(file) for source in found for file in source.files)
        count_outcome(refusal or "found")

    return check, st.tuples(st.one_of(st.lists(parts, max_size=8).map("".join), mappings))


def case_info(directory):
    """An entry of dataset_info.json: its columns and tags mean what it says, or it is refused by name."""
    path, info = os.path.join(directory, "rows.json"), os.path.join(directory, "dataset_info.json")
    words = st.sampled_from(["a", "b c", "prompt", "output", "system", "Text", "来", "x.y", "role", "tools"])
    how = dict(max_length=10**6, too_long="truncate", train_on_prompt=False, train_on="all")

    @st.composite
    def alpaca(draw):
        keys = ["prompt", "query", "response", "system"]
        columns = dict(zip(keys, draw(st.lists(words, min_size=4, max_size=4, unique=True))))
        row = {columns[key]: draw(answers) for key in keys}
        messages = [{"role": role, "content": row[columns[key]]} for role, key in
                    (("system", "system"), ("user", "prompt"), ("assistant", "response"))]
        if row[columns["query"]].strip() not in NO_CONTEXT:
            messages[1]["content"] += "\n" + row[columns["query"]]
        return {"columns": columns}, row, messages

    @st.composite
    def sharegpt(draw):
        roles = ("user", "assistant") * draw(st.integers(1, 3))
        messages = [{"role": role, "content": draw(answers)} for role in roles]
        tags = dict(zip(("role_tag", "content_tag"), draw(st.lists(words, min_size=2, max_size=2, unique=True))))
        roles = dict(zip(("user_tag", "assistant_tag"), draw(st.lists(
            words.filter(lambda word: word != "system"), min_size=2, max_size=2, unique=True))))
        turns = [{tags["role_tag"]: roles[m["role"] + "_tag"], tags["content_tag"]: m["content"]} for m in messages]
        column = draw(words)
        return ({"formatting": "sharegpt", "columns": {"messages": column}, "tags": {**tags, **roles}},
                {column: turns}, messages)

    def check(case, damage):
        entry, row, messages = case
        entries = {"rows": {"file_name": "rows.json", **entry}}
        Path(path).write_text(json.dumps([row]), encoding="utf-8")
        if damage:
            Path(info).write_bytes(damage[0](json.dumps(entries).encode()) if callable(damage[0])
                                   else json.dumps(damage[0]).encode())
            dataset, refusal = attempt(data.load, f"{info}:rows", tiny, 2048, naming=directory)
            assert refusal or dataset.ledger.rows == 1
            return count_outcome(refusal or "trained, damaged")
        Path(info).write_text(json.dumps(entries), encoding="utf-8")
        kept, expected = count([messages], **how)
        dataset, refusal = attempt(data.load, f"{info}:rows", tiny, **how, naming=directory)
        count_outcome(refusal or "trained")
        assert refusal is None, refusal
        assert_counts(dataset, path, kept, expected)

    good = st.one_of(alpaca(), sharegpt())
    whole = st.one_of(good.flatmap(lambda case: damaged({"rows": {"file_name": "rows.json", **case[0]}})))
    return check, st.tuples(good, st.one_of(st.just(()), st.tuples(whole)))


def case_parquet(directory):
    """A parquet file of rows, damaged; needs pyarrow."""
    import pyarrow
    import pyarrow.parquet

    path = os.path.join(directory, "rows.parquet")
    batch = [{"prompt": f"q{i}", "response": f"answer {i}", "n": [i] * i} for i in range(50)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(batch), path)
    content_of_file = Path(path).read_bytes()

    def check(content):
        Path(path).write_bytes(content)
        dataset, refusal = attempt(data.load, path, tiny, 2048, naming=path)
        assert refusal or dataset.ledger.rows == len(dataset)
        count_outcome(refusal or "trained")

    return check, st.tuples(broken(content_of_file, 2))


# ----------------------------------------------------------------------------------------------------------
# templates and tokenizers


CODE = ["{%", "%}", "{{", "}}", "{#", "'", "(", ")", "|", ".", "x", " ", "\\n", "{% generation %}",
        "{% endgeneration %}", "{% for i in range(9) %}", "{% endfor %}", "| tojson", ".__class__",
        "messages", "1/0", "m.content", "eos_token", "{{ raise_exception(messages) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "strftime_now('%Q')", "loop", "{% break %}",
        "{% include 'x' %}", "<|im_end|>", "\ud800", "~", "is not defined", "[::-1]", "[0]", "('%s' % m)",
        "namespace()", "{% set x = namespace(a=[]) %}", "*"]


def case_template(directory):
    """The text of any conversation equals that of transformers, or both refuse it. Some templates are changed."""
    from transformers import AutoTokenizer

    made = []
    templates = [*FAMILIES.values(), (chatml("m.content | string"), [], {})]
    for i, (template, special, config, *_) in enumerate(templates):
        path = make_directory(Path(directory) / f"model{i}", template, special, **config)
        made.append((path, ChatTokenizer(path), AutoTokenizer.from_pretrained(path)))
    thinks = ["think" in tokenizer.source for _, tokenizer, _ in made]
    call = st.fixed_dictionaries({"name": texts, "arguments": values})
    calls = st.lists(st.fixed_dictionaries({"function": call}), max_size=2)
    more_ = st.one_of(extras, st.fixed_dictionaries({}, optional={
        "reasoning_content": texts, "reasoning": texts, "thinking": texts, "tool_calls": calls}))

    def check(which, messages, more, tools, changed):
        path, ours, theirs = made[which]
        if changed:
            source = changed[0](ours.source)
            path = os.path.join(directory, "changed")
            shutil.copytree(made[which][0], path, dirs_exist_ok=True)
            with open(os.path.join(path, "chat_template.jinja"), "w", encoding="utf-8",
                      errors="surrogatepass") as f:
                f.write(source)
            ours, refusal = attempt(ChatTokenizer, path, naming=path)
            if refusal:
                return count_outcome(refusal)
        messages = [{**m, **(more if m["role"] == "assistant" else {})} for m in messages]
        read, refusal = attempt(formats.to_messages, {"messages": messages}, "here[0]", naming="here[0]")
        if refusal:
            return count_outcome(refusal)
        rendered, refusal = attempt(ours.render_spans, read, "here[0]", tools, naming="here[0]")
        count_outcome(refusal or "rendered")
        if refusal:
            return
        text, spans, _ = rendered
        turns = [m for m in read if m["role"] == "assistant"]
        assert [span.weight for span in spans] == [m["weight"] for m in turns]
        assert all(0 <= span.start <= span.stop <= len(text) for span in spans)
        assert all(a.stop <= b.start for a, b in zip(spans, spans[1:]))
        with_stop_token = [span for span in spans if span.has_stop_token]
        assert all(ours.turn_end in text[span.start : span.stop] for span in with_stop_token)
        if not changed:  # these templates strip contents and drop reasoning, but change nothing else
            for (start, stop, has_stop_token, *_), message in zip(spans, turns):
                assert has_stop_token and text[:stop].endswith(ours.turn_end)
                turn = text[start:stop].removesuffix(ours.turn_end).strip()
                if thinks[which]:
                    assert turn.endswith(message["content"].rpartition("</think>")[2].strip())
                else:
                    assert turn == message["content"].strip()
                assert ours.marks_answers or text[:start].endswith(ours.header)
            plain = [{k: v for k, v in m.items() if k != "weight"} for m in read]
            with contextlib.suppress(UnicodeEncodeError):  # half a character: data.load refuses it
                assert text == theirs.apply_chat_template(plain, tools=tools, tokenize=False)

    @st.composite
    def edits(draw):
        """A function that changes the source of a template in a few places."""
        draws = draw(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 40), st.integers(0, 3),
                                        st.sampled_from(
            CODE)), min_size=1, max_size=3))

        def apply(source):
            for at, n, how, piece in draws:
                at %= len(source) + 1
                source = {0: source[:at] + source[at + n :], 1: source[: at + n] + source[at:]}.get(
                    how, source[:at] + piece + source[at:])
            return source

        return apply

    return check, st.tuples(st.integers(0, len(made) - 1), conversations(), more_,
                            st.one_of(st.none(), st.lists(st.dictionaries(names, leaves, max_size=2),
                                                          max_size=2)),
                            st.one_of(st.just(()), st.tuples(edits())))


def case_kwargs(directory):
    """Variables of a chat template, of the run and of rows: the text is that of transformers, or they are refused."""
    from transformers import AutoTokenizer

    shown = ("{{ x | tojson if x is defined }}{{ y if y is string }}{% if z is mapping %}{{ z | length }}{% endif %}")
    path = make_directory(Path(directory) / "model", shown + FAMILIES[
        "puts an empty think block into the last turn, like Qwen3"][0], [], eos_token="<|im_end|>")
    theirs = AutoTokenizer.from_pretrained(path)
    names_ = st.sampled_from(["x", "y", "z", "enable_thinking", "reasoning_effort", "messages", "tools", "eos_token",
                              "documents", "self", "template", "loop", "", "\ud800", "date_string"])
    plain = st.dictionaries(names_, values, max_size=3)
    written = st.one_of(plain.map(json.dumps), plain, values, texts)

    def check(of_run, of_row, messages):
        tokenizer, refusal = attempt(ChatTokenizer, path, template_kwargs=of_run)
        if refusal:
            return count_outcome(refusal)
        row = {"messages": messages, "chat_template_kwargs": of_row}
        read, refusal = attempt(formats.read_row, row, "here[0]", naming="here[0]")
        if refusal:
            return count_outcome(refusal)
        rendered, refusal = attempt(tokenizer.render_spans, read.messages, "here[0]", read.tools,
                                    read.template_kwargs, naming="here[0]")
        count_outcome(refusal or "rendered")
        if refusal:
            return
        kwargs = {**tokenizer.template_kwargs, **read.template_kwargs}
        plain = [{k: v for k, v in m.items() if k != "weight"} for m in read.messages]
        if not {"self", "documents", "conversations"} & kwargs.keys():  # transformers can't pass them, or wants lists
            assert rendered.text == theirs.apply_chat_template(plain, tokenize=False, **kwargs)
        assert [span.weight for span in rendered.spans] == [
            m["weight"] for m in read.messages if m["role"] == "assistant"]

    return check, st.tuples(st.one_of(st.none(), written), st.one_of(st.none(), written), conversations())


def case_tokenizer(directory):
    """One of tokenizer.json, tokenizer_config.json and special_tokens_map.json is damaged: it loads, or is named."""
    path = os.path.join(directory, "model")
    shutil.copytree(TINY, path)
    read = {name: Path(path, name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    small = json.loads(read["tokenizer.json"])
    small["model"]["merges"] = small["model"]["merges"][:40]
    small["model"]["vocab"] = dict(list(small["model"]["vocab"].items())[:340])
    read["tokenizer.json"] = json.dumps(small, ensure_ascii=False).encode()
    read["special_tokens_map.json"] = b'{"eos_token": {"content": "<|im_end|>", "lstrip": false}}'

    def check(name, content):
        for other, undamaged in read.items():
            Path(path, other).write_bytes(content if other == name else undamaged)
        count_outcome(attempt(ChatTokenizer, path, naming=path)[1] or "used")

    return check, st.sampled_from(sorted(read)).flatmap(lambda name: st.tuples(st.just(name), st.one_of(
        broken(read[name], 2), damaged(json.loads(read[name])).map(json.dumps).map(str.encode))))


# ----------------------------------------------------------------------------------------------------------
# settings and checkpoints


def case_config(directory):
    """Arguments of the command line and a YAML file."""
    import sft
    from settings import verl
    from settings.parser import parse

    path = os.path.join(directory, "run.yaml")
    defaults = Path(ROOT, "config.yaml").read_bytes()
    lines = st.lists(st.sampled_from([
        b"lr: 1e-4", b"use_lora: true", b"model: tiny", b"batch_size: 8", b"data:", b"  train_files: a.json",
        b"trainer:", b"  total_epochs: 2", b"actor_rollout_ref:", b"  actor:", b"    strategy: fsdp", b"- a",
        b"[a, b]", b"lr: !!python/object/apply:os.system [x]", b"lr: &a 1", b"seed: *a", b"<<: *a", b"? x",
        b"%YAML 9.9", b"---", b"...", b"{a: b}", b"lr: .nan", b"lr: .inf", b"seed: 1_000", b"seed: 0x10",
        b"lr: '1e-4", b"\t lr: 1", b"defaults: [a]", b"null: 1", b"[a]: 1", b"{a: 1}: 2", b"1: 1",
        b"lora_targets: [q_proj, v_proj]", b"# x"]),
        max_size=6).map(b"\n".join)
    yamls = st.one_of(broken(defaults), lines, lines.flatmap(broken), st.sampled_from(PIECES))
    ours = st.sampled_from([f.name for f in dataclasses.fields(sft.Config)])
    keys = st.one_of(ours, ours, ours, st.sampled_from(sorted(verl.entries())), texts, st.sampled_from(
        ["config", "config-path", "config-name", "no-packing", "no-lr", "help", "explain", "environment",
         "a.b.c", ""]))
    given_ = st.one_of(texts, *[st.sampled_from([
        "", "1", "2", "0", "-1", "0.5", "true", "none", "nan", "inf", "1e400", "1e-4", "[a,b]", "[", "{}",
        "9" * 5000, "1_0", "٣", "tiny", directory, path, "\0", "\ud800", "fsdp", "bf16", "linear"])] * 4)
    before = st.sampled_from(["--"] * 6 + ["-", "", "+", "++", "---"])
    arguments = st.lists(st.one_of(st.tuples(st.builds("{}{}={}".format, before, keys, given_)),
                               st.tuples(st.builds("{}{}".format, before, keys), given_),
                               st.tuples(st.builds("{}{}={}".format, before, keys, given_))), max_size=4)

    def check(arguments, content):
        Path(path).write_bytes(content)
        argv = [word for group in arguments for word in group] + ["--config", path] * (content != b"")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                _, refusal = attempt(parse, sft.Config, argv)
            except SystemExit as end:
                refusal = None
                assert end.code == 0
        count_outcome(refusal or "parsed")

    return check, st.tuples(arguments, st.one_of(st.just(b""), yamls))


def case_weights(directory):
    """A damaged safetensors file, or index and files: the entries are inside their files, or it is refused."""
    import torch
    from safetensors.torch import save

    from disk import pretrained

    tensors = {f"model.layers.{i}.weight": torch.arange(6.0).reshape(2, 3) for i in range(4)}
    halves = [save({n: tensors[n] for n in names}, {"format": "pt"})
              for names in (list(tensors)[:2], list(tensors)[2:])]
    weight_map = {n: f"{i // 2}.safetensors" for i, n in enumerate(tensors)}
    index = {"metadata": {"total_size": 96}, "weight_map": weight_map}
    header = json.loads(halves[0][8 : 8 + int.from_bytes(halves[0][:8], "little")])
    body = halves[0][-48:]

    def packed(value):
        text = json.dumps(value).encode()
        return len(text).to_bytes(8, "little") + text + body

    first = st.one_of(broken(halves[0], 2), damaged(header).map(packed))
    indexes = st.one_of(broken(json.dumps(index).encode(), 2), damaged(index).map(json.dumps).map(str.encode))

    def check(content, map_):
        for name, what in (("0.safetensors", content), ("1.safetensors", halves[1]),
                           ("model.safetensors", content), ("model.safetensors.index.json", map_)):
            path = os.path.join(directory, name)
            if what is not None:
                Path(path).write_bytes(what)
            elif os.path.exists(path):
                os.remove(path)
        entries, refusal = attempt(pretrained.weight_entries, directory, naming=directory)
        count_outcome(refusal or "read")
        for entry in (entries or {}).values():
            assert 0 < entry.start <= entry.start + entry.n_bytes <= os.path.getsize(entry.file)

    return check, st.one_of(st.tuples(first, st.none()), st.tuples(st.just(halves[0]), indexes),
                            st.tuples(first, indexes))


def case_resume(directory):
    """A checkpoints directory with any content: a step directory with a complete state, no step, or a refusal.
    The manifest is damaged, is damaged with a checksum of its own that fits, or fits any state."""
    from disk import checkpoint

    state = {"step": 7, "data": "abc", "seed": 42, "best": {"val_loss": 1.5, "step": 3, "behind": 0}}
    saved = json.dumps(state).encode()
    states = st.one_of(st.just(saved), broken(saved, 2), damaged(state).map(json.dumps).map(str.encode))
    sums = {"step": 7, "files": {checkpoint.STATE: [len(saved), zlib.crc32(saved)]}}
    manifest = checkpoint.manifest(sums["step"], sums["files"])

    def signed(value):
        """A damaged manifest with a checksum that fits it."""
        text = json.dumps(value, indent=2)
        if not isinstance(value, dict):
            return text.encode()
        return json.dumps({**value, "crc32": zlib.crc32((text + "\n").encode())}, indent=2).encode() + b"\n"

    fits = st.just(None)
    manifests = st.one_of(fits, fits, st.just(manifest), broken(manifest, 2), damaged(sums).map(signed))
    any_steps = st.lists(st.sampled_from(["step_1", "step_7", "step_07", "step_-1", "step_x", "tmp_step_9"]),
                         max_size=3)
    steps = st.one_of(st.just(["step_7"]), st.just(["step_7"]), any_steps)
    links = st.sampled_from([None, None, "step_7", "step_7", "step_7", "step_9", "latest", ".",
                             "step_7/training_state", "/"])

    def check(content, manifest_, names_, link, asked):
        root = os.path.join(directory, "root")
        shutil.rmtree(root, ignore_errors=True)
        for name in names_:
            os.makedirs(os.path.join(root, name, "training_state"), exist_ok=True)
            Path(root, name, checkpoint.STATE).write_bytes(content)
            number = int("".join(filter(str.isdigit, name)) or 7)
            Path(root, name, checkpoint.MANIFEST).write_bytes(checkpoint.manifest(number, {
                checkpoint.STATE: [len(content), zlib.crc32(content)]}) if manifest_ is None else manifest_)
        if link:
            os.makedirs(root, exist_ok=True)
            os.symlink(link, os.path.join(root, "latest"))
        asked = asked if asked == "auto" else os.path.join(root, asked)
        found, refusal = attempt(checkpoint.resume_directory, asked, root, naming="--resume_from")
        if found and not refusal:
            _, refusal = attempt(checkpoint.verify, found, naming=found)
            assert refusal or manifest_ is None or content == saved, "damage that was not detected"
            if refusal:
                return count_outcome(refusal)
            state, refusal = attempt(checkpoint.load_state, found, naming="state.json")
            assert refusal or isinstance(state, dict) and isinstance(state.get("step"), int), state
        count_outcome(refusal or f"resumes {bool(found)}")

    asked = st.sampled_from(["auto"] * 9 + ["step_7", "latest", "", "\0", "step_x"])
    return check, st.tuples(states, manifests, steps, links, asked)


# ----------------------------------------------------------------------------------------------------------

TARGETS = {"data": case_data, "tokens": case_tokens, "json": case_json, "parquet": case_parquet,
           "tables": case_tables, "sources": case_sources, "info": case_info, "template": case_template,
           "kwargs": case_kwargs,
           "tokenizer": case_tokenizer, "config": case_config, "weights": case_weights, "resume": case_resume}


def fuzz(target, cases, directory, seed_=None):
    """Run a number of cases of a target.

    Without a seed the cases are always the same, and the smallest one that fails raises. With a seed, returns
    {kind of failure: (the shortest case, its traceback)}.
    """
    check, strategy = TARGETS[target](directory)
    failures, phases = {}, (Phase.generate,) if seed_ is not None else (Phase.generate, Phase.shrink)

    @settings(max_examples=cases, deadline=None, database=None, derandomize=seed_ is None, phases=phases,
              suppress_health_check=list(HealthCheck), print_blob=False)
    @given(strategy)
    def run(case):
        try:
            check(*case)
        except BaseException as error:  # a Rust panic is not an Exception
            if seed_ is None or isinstance(error, KeyboardInterrupt):
                raise
            frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(ROOT)]
            place = os.path.relpath(frames[-1].filename, ROOT)
            kind = f"{type(error).__name__} at {place}:{frames[-1].lineno}"
            count_outcome(f"FAILED {kind.partition(':')[0]}")
            if len(repr(case)) < len(repr(failures.get(kind, (case * 2,))[0])):
                failures[kind] = case, traceback.format_exc()

    (run if seed_ is None else seed(seed_)(run))()
    return failures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=random.randrange(10**9))
    asked = parser.parse_args()
    faulthandler.enable()
    sys.stdout.reconfigure(errors="backslashreplace")
    with tempfile.TemporaryDirectory() as scratch:
        failures = fuzz(asked.target, asked.cases, scratch, asked.seed)
    print(f"{asked.target}, seed {asked.seed}: {sum(outcomes.values()):,} cases")
    for outcome, n in outcomes.most_common(30):
        print(f"{n:>9,} {outcome}")
    for kind, (case, trace) in failures.items():
        short = "\n".join(line[:300] for line in trace.splitlines()[-14:])
        print(f"\n{kind}: {case!r:.1500}\n{short}")
    sys.exit(bool(failures))
