"""The ledger (the count of every row and token) on five adversarial data sets, and a few hundred cases of fuzz.py.

The expected numbers are counted here from token ids, with the tokenizers library and without data.py.
"""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tracemalloc

import fuzz
import pytest
from data_helpers import FAMILIES, tiny
from fuzz import by_pieces
from helpers import RAW, ROOT, TINY, attempt, chat, chatml, make_directory
from tokenizers import Tokenizer, processors

import data
import sft
from settings.errors import run
from text import containers, masks
from text.template import ChatTokenizer

END, BOS = RAW.token_to_id("<|im_end|>"), RAW.token_to_id("<|endoftext|>")


@pytest.fixture
def model(tmp_path):
    """A function: chat template, keys of tokenizer_config.json -> a directory with models/tiny and these."""

    def make(template=None, raw=None, **config):
        shutil.copytree(TINY, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
        return make_directory(tmp_path / "model", template or chatml("m.content"), raw=raw, **config)

    return make


@pytest.fixture
def ledger(train, tmp_path, capsys):
    """A function: rows and flags -> (lines of metrics.jsonl, numbers of the printed ledger), after one epoch of
    sft.main. It asserts that the ledger's two lines balance."""

    def start(rows, *flags, model="tiny", out="out"):
        (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
        steps = train("--train_data", tmp_path / "rows.json", "--epochs", 1, "--cache_dir", "none", *flags,
                      model=model, out=out)
        printed = capsys.readouterr().out
        lines = [re.search(rf"^{name} .*", printed, re.M)[0].replace(",", "") for name in ("rows", "tokens")]
        patterns = (r"rows +(?P<rows>\d+) in = (?P<trained>\d+) trained \+ (?P<dropped>\d+) dropped"
                    r"(?P<reasons>.*)",
                    r"tokens +(?P<tokens>\d+) in = (?P<target>\d+) target \+ (?P<context>\d+) context \+ "
                    r"(?P<truncated>\d+) truncated( \(of (?P<cut>\d+) rows\))?"
                    r"( \+ (?P<lost>\d+) in dropped rows)?")
        texts = {}
        for pattern, line in zip(patterns, lines, strict=True):
            texts.update(re.fullmatch(pattern, line).groupdict())
        reasons = {reason: int(n) for n, reason in re.findall(r"[ (](\d+) ([a-z ]+)", texts.pop("reasons"))}
        counts = {name: int(value or 0) for name, value in texts.items()}
        assert sum(reasons.values()) == counts["dropped"]
        assert counts["rows"] == counts["trained"] + counts["dropped"]
        assert counts["tokens"] == (
            counts["target"] + counts["context"] + counts["truncated"] + counts["lost"])
        assert sum(step["target_tokens"] for step in steps) == counts["target"]
        assert sum(step["tokens"] for step in steps) == counts["target"] + counts["context"]
        return steps, {**counts, "reasons": reasons}

    return start


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """A function: rows and flags -> the one error line of a run that trained nothing."""

    def start(rows, *flags, model="tiny"):
        (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
        argv = ["sft.py", "--model", model, "--train_data", tmp_path / "rows.json", "--output_dir",
                 tmp_path / "refused", "--cache_dir", "none", *flags]
        monkeypatch.setattr(sys, "argv", [str(word) for word in argv])
        with pytest.raises(SystemExit) as end:
            run(sft.main)
        lines = capsys.readouterr().err.splitlines()
        assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith("sft.py: error: ")
        assert not os.path.exists(tmp_path / "refused" / "metrics.jsonl")
        assert not os.listdir(tmp_path / "refused" / "checkpoints")
        return lines[0].removeprefix("sft.py: error: ")

    return start


TALKS = [chat("Hello?", "Hi there."), chat("你是谁？", "我是模型 🙂", "And?", "<|im_end|> ends a turn.", system="s"),
         [*chat("q", "One."), *chat("r"), {"role": "assistant", "content": "Two.", "train": False}]]
ROWS = [{"messages": messages} for messages in TALKS]


def counted(talks, max_length=10**6, before=0):
    """(tokens, targets, truncated tokens) of conversations in ChatML, each after `before` tokens of context."""
    pieces = [(before + len(ids), mask) for ids, mask in map(by_pieces, talks)]
    return (sum(n for n, _ in pieces), sum(sum(mask[: max_length - before]) for _, mask in pieces),
            sum(max(0, n - max_length) for n, _ in pieces))


# ----------------------------------------------------------------------------------------------------------
# five adversarial data sets


def test_pad_equals_eos(model, ledger, tmp_path):
    """If the stop token is also the pad token, every turn still trains it."""
    directory = model(pad_token="<|im_end|>", eos_token="<|im_end|>")
    steps, says = ledger(ROWS, "--batch_size", 2, model=directory)
    tokens, targets, _ = counted(TALKS)
    assert says == dict(rows=3, trained=3, dropped=0, reasons={}, tokens=tokens, target=targets,
                        context=tokens - targets, truncated=0, cut=0, lost=0)
    assert len(steps) == 2
    dataset = data.load(str(tmp_path / "rows.json"), ChatTokenizer(directory), 2048)
    trained = dataset.tokens[dataset.loss_mask].tolist()
    assert trained.count(END) == 1 + 3 + 1  # one of each trained turn, and one that an answer writes out


def test_over_long_prompts(ledger, refused):
    """A row whose prompt is longer than max_length has no target: it is dropped. Others are truncated. Both are
    counted."""
    talks = [chat("word " * 60, "lost"), chat("q", "words " * 60), chat("q", "short"),
             chat("word " * 20, "x", "r", "y")]
    rows = [{"messages": messages} for messages in talks]
    sizes = [len(by_pieces(messages)[0]) for messages in talks]
    assert sizes[0] > 60 and sizes[1] > 60 and sizes[3] < 60
    kept = [talks[1], talks[2], talks[3]]
    tokens, targets, cut = counted(kept, 60)
    _, says = ledger(rows, "--max_length", 60)
    assert says == dict(rows=4, trained=3, dropped=1, reasons={"without targets after truncation": 1},
                        lost=sizes[0], cut=1, tokens=sum(sizes), target=targets,
                        context=tokens - cut - targets, truncated=cut)
    _, says = ledger(rows, "--max_length", 60, "--too_long", "drop", out="dropping")
    tokens, targets, _ = counted(talks[2:])
    assert says == dict(rows=4, trained=2, dropped=2, reasons={"too long": 2}, lost=sizes[0] + sizes[1],
                        cut=0, tokens=sum(sizes), target=targets, context=tokens - targets, truncated=0)
    error = refused(rows, "--max_length", 60, "--too_long", "error")
    assert f"rows.json[0] has {sizes[0]} tokens, more than --max_length 60" in error
    for how in ("truncate", "drop"):
        error = refused(rows[:1] * 3, "--max_length", 60, "--too_long", how)
        assert "no row is left to train on: 3 in, all dropped (3 " in error
        assert error.endswith("; raise --max_length 60")


@pytest.mark.parametrize("reply", ["", " ", "\n\t\u3000"])
def test_empty_replies(reply, refused):
    """An empty answer is an error with the name of its row, wherever it is, trained or not."""
    empty = {"role": "assistant", "content": reply}
    rows = [{"prompt": "q", "response": reply}, {"messages": [*chat("q"), {**empty, "train": False}]},
            {"messages": [*chat("q"), empty, *chat("r", "b")]},
            {"instruction": "q", "output": "a", "history": [["q", reply]]},
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": reply}]}]
    for row in rows:
        assert re.search(r"rows\.json\[1\]: an empty answer; remove the row", refused([ROWS[0], row]))


def adds_bos(raw):
    """A tokenizer that adds a BOS, like Llama's."""
    raw.post_processor = processors.TemplateProcessing("<|endoftext|> $A",
                                                       special_tokens=[("<|endoftext|>", BOS)])
    return raw


def test_a_template_that_adds_the_bos_itself(model, ledger, tmp_path):
    """The text begins with a BOS and the tokenizer would add another: the dataset has one, as context."""
    raw = adds_bos(Tokenizer.from_file(os.path.join(TINY, "tokenizer.json")))
    assert raw.encode("<|endoftext|>x").ids[:2] == [BOS, BOS]
    directory = model("{{- bos_token }}" + chatml("m.content"), raw, bos_token="<|endoftext|>")
    _, says = ledger(ROWS, model=directory)
    tokens, targets, _ = counted(TALKS, before=1)
    assert says == dict(rows=3, trained=3, dropped=0, reasons={}, tokens=tokens, target=targets,
                        context=tokens - targets, truncated=0, cut=0, lost=0)
    dataset = data.load(str(tmp_path / "rows.json"), ChatTokenizer(directory), 2048)
    for i, messages in enumerate(TALKS):
        ids, mask = by_pieces(messages)
        here = slice(dataset.starts[i], dataset.starts[i + 1])
        assert dataset.tokens[here].tolist() == [BOS, *ids]
        assert dataset.loss_mask[here].tolist() == [False, *mask]


USERS_END = chatml("m.content").replace("'<|im_end|>\\n'",
                                        "('\\n' if m.role == 'assistant' else '<|im_end|>\\n')")


@pytest.mark.parametrize("template, how_many", [
    ("{%- for m in messages %}{{- m.role + ': ' + m.content + '\\n' }}{%- endfor %}"
     "{%- if add_generation_prompt %}{{- 'assistant: ' }}{%- endif %}", "0 of 4"),
    (chatml("m.content").replace("<|im_end|>", ""), "0 of 4"),
    (USERS_END, "0 of 4")], ids=["plain text", "headers only", "ends the user's turns"])
def test_a_template_that_never_ends_the_turn(template, how_many, model, refused):
    """The model would never learn to stop, so the run does not start."""
    talks = [TALKS[0], chat("q", "a", "r", "b"), TALKS[2]]
    error = refused([{"messages": messages} for messages in talks], model=model(template))
    assert f"rows.json: only {how_many} assistant turns train a token that ends them: the model" in error


SOMETIMES = chatml("m.content").replace("'<|im_end|>\\n'",
                                        "('\\n' if m.content == 'endless' else '<|im_end|>\\n')")


def test_99_percent_of_the_turns_must_train_their_stop_token(model, ledger, refused):
    """With 99 of 100 the run starts, with 98 of 99 or 197 of 199 it does not. Turns that are truncated or not
    trained do not count."""
    directory = model(SOMETIMES)
    endless, ended = {"messages": chat("q", "endless")}, {"messages": chat("q", "done")}
    untrained = {"messages": [*chat("q", "endless"), *chat("r", "done")]}
    untrained["messages"][1]["train"] = False
    long = {"messages": chat("q", "a very long answer " * 9)}
    _, says = ledger([endless] + [ended] * 99, "--batch_size", 100, "--max_length", 40, model=directory)
    ids, mask = by_pieces(chat("q", "done"))
    shown = by_pieces(chat("q", "endless"))
    assert says["tokens"] == 99 * len(ids) + len(shown[0]) - 1
    assert says["target"] == 99 * sum(mask) + sum(shown[1]) - 1
    for rows, how_many in (([endless] + [ended] * 98, "98 of 99"),
                           ([endless] * 2 + [ended] * 197, "197 of 199"),
                           ([endless] + [ended] * 98 + [long] * 50, "98 of 99"),
                           ([endless] + [ended] * 50 + [untrained] * 48, "98 of 99")):
        assert f"only {how_many} assistant turns" in refused(rows, "--max_length", 40, model=directory)


# ----------------------------------------------------------------------------------------------------------
# random files: fuzz.py


@pytest.mark.parametrize("target, cases", [
    ("data", 100), ("json", 100), ("parquet", 30), ("tokenizer", 30), ("tokens", 50), ("info", 10), ("kwargs", 10),
    ("tables", 30), ("sources", 10), ("template", 10)])
def test_any_file_is_counted_or_refused(target, cases, tmp_path, monkeypatch):
    """Each case is trained as counted here, or ends in one error line that names the file."""
    if target in ("parquet", "tables"):
        pytest.importorskip("pyarrow")
    monkeypatch.chdir(tmp_path)  # `sources` changes it
    monkeypatch.setattr(containers, "CHUNK", containers.CHUNK)  # `tables` changes it
    fuzz.fuzz(target, cases, str(tmp_path))


@pytest.mark.full
@pytest.mark.parametrize("target", [
    "data", "tokens", "json", "tables", "parquet", "sources", "info", "template", "kwargs"])
def test_a_hundred_thousand_cases(target, tmp_path):
    """Takes about half an hour each: python tests/hostile/fuzz.py TARGET --cases 100000 --seed N"""
    command = [sys.executable, os.path.join(ROOT, "tests", "hostile", "fuzz.py"), target, "--cases", "100000"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]


MISTRAL = list(FAMILIES).index("has [INST] in plain text, like Mistral")
CALLS = b'{"messages": [{"role": "assistant", "content": "", "tool_calls": %s}]}'
FOUND = {  # cases of the targets that once ended in a traceback or a page of text
    "a file of special tokens with null": ("tokenizer", ("special_tokens_map.json", b"null")),
    "a special token without content": ("tokenizer", ("tokenizer_config.json", b'{"pad_token": {}}')),
    "a template that is not a text": ("tokenizer", ("tokenizer_config.json", b'{"chat_template": {}}')),
    "templates by name that are not texts": (
        "tokenizer", ("tokenizer_config.json", b'{"chat_template": [1, {}]}')),
    "an empty object for a tokenizer": ("tokenizer", ("tokenizer.json", b"{}")),
    "a tokenizer that is not UTF-8": ("tokenizer", ("tokenizer.json", b'{"a": "\xff"}')),
    "a configuration that is not UTF-8": ("tokenizer", ("tokenizer_config.json", b'{"a": "\xff"}')),
    "a break outside a loop": ("tokenizer", ("tokenizer_config.json", b'{"chat_template": "{% break %}"}')),
    "a macro that calls itself": ("tokenizer", ("tokenizer_config.json", json.dumps(
        {"chat_template": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"}).encode())),
    "four letters of parquet": ("parquet", (b"PAR1",)),
    "other bytes between the letters of parquet": ("parquet", (b"PAR1" + b"x" * 99 + b"PAR1",)),
    "a page of a key": ("json", (b'{"' + b"x" * 5000 + b'": 1}',)),
    "a page of a role": ("json", (b'{"messages": [{"role": "' + b"x" * 5000 + b'", "content": "q"}, '
                                  b'{"role": "assistant", "content": "a"}]}',)),
    "a page of another from": ("json", (b'{"conversations": [{"from": "' + b"x" * 5000 + b'"}]}',)),
    "a page of a weight": ("json", (b'{"messages": [{"role": "user", "weight": "' + b"1" * 5000 + b'"}]}',)),
    "half a byte order mark": ("json", (b"\xef",)),
    "half a byte order mark in gzip": ("json", (gzip.compress(b"\xef\xbb"),)),
    "a number beside a call": (
        "template", (-1, chat("q", "a"), {"content": 5, "tool_calls": [{}]}, None, ())),
    # the header of such an answer belongs to no answer
    "an empty answer after another answer": ("template", (
        MISTRAL, [*chat("q", "a"), {"role": "assistant", "content": "</think>"}, *chat("r")], {}, None, ())),
    "an answer before any prompt, whose text is then the prompt": ("template", (MISTRAL, [
        {"role": "assistant", "content": "x"}, *chat("x"), *chat("x")], {}, None, ())),
    "an answer before any prompt, whose text a later prompt has": ("template", (MISTRAL, [
        {"role": "assistant", "content": "x"}, *chat("y"), *chat("x"), *chat("z")], {}, None, ())),
    "a page of a tokenizer's error": (
        "tokenizer", ("tokenizer.json", b'{"added_tokens": ["' + b"x" * 3000 + b'"]}')),
    "a variable of the name of an argument": ("kwargs", ('{"self": 1, "template": 2}', None, chat("q", "a"))),
    "a format that is an object": ("info", (({}, {}, []), ({"rows": {"file_name": "rows.json", "formatting": {}}},))),
    "a page of a file's name": ("info", (({}, {}, []), ({"rows": {"file_name": "x" * 3000}},))),
    "calls that are a number": ("json", (CALLS % b"5",)),
    "a call of a number": ("json", (CALLS % b'[{"function": 5}]',)),
    "a call of a list": ("json", (CALLS % b"[[1]]",)),
    "a page of a call's name": ("json", (CALLS % (b'[{"name": "' + b"x" * 5000 + b'"}]'),)),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found(name, tmp_path):
    """Cases that once crashed."""
    target, case = FOUND[name]
    if target == "parquet":
        pytest.importorskip("pyarrow")
    fuzz.TARGETS[target](str(tmp_path))[0](*case)


START = '{"prompt": "q", "response": "a", "x": '
# name: (beginning of a row, text, how often the text is repeated, end of the row, error or None)
TRAPS = {
    "50 MB in one line": (START + '"', "word ", 10**7, '"}', None),
    "50 MB in one line that does not end": (START + '"', "word ", 10**7, "", "Unterminated string"),
    "100,000 lists in one another": (START, "[", 10**5, "]" * 10**5 + "}", "recursion"),
    "100,000 objects in one another": (START, '{"a":', 10**5, "1" + "}" * (10**5 + 1), "recursion"),
    "a number of 100,000 digits": (START, "9", 10**5, "}", "limit"),
    "a fraction of 100,000 digits": (START + "0.", "9", 10**5, "}", None),
    "NaN and infinities": (START, "[NaN, Infinity, -Infinity, 1e999]", 1, "}", None),
    "NaN as an answer": ('{"prompt": "q", "response": ', "NaN", 1, "}", "must be a string, it is NaN"),
    "NaN as a weight": ('{"messages": [{"role": "user", "content": "q", "weight": ', "NaN", 1, "}]}",
                        "it is nan"),
    "a key again and again": ('{"prompt": "q", "response": ', '5, "response": ', 10**5, '"a"}', "appears twice"),
}


@pytest.mark.parametrize("name", TRAPS)
@pytest.mark.parametrize("lines", [True, False], ids=["lines", "array"])
def test_a_file_made_to_take_time_or_memory(name, lines, tmp_path):
    """Long, deep, large or repeated: trained, or refused, in seconds and with memory of a few times the size."""
    before, piece, times, after, say = TRAPS[name]
    text = before + piece * times + after
    path = tmp_path / "rows.json"
    path.write_text(text if lines else f"[{text}]")
    tracemalloc.start()
    started = time.monotonic()
    dataset, refusal = attempt(data.load, str(path), tiny, 64, naming=str(path))
    peak, seconds = tracemalloc.get_traced_memory()[1], time.monotonic() - started
    tracemalloc.stop()
    assert peak < 8 * len(text) + 64 * 2**20 and seconds < 20
    if say:
        assert say in refusal
    else:
        ids, mask = by_pieces(chat("q", "a"))
        assert dataset.tokens.tolist() == ids and dataset.loss_mask.tolist() == mask


def test_truncated_turns_cost_nothing(tmp_path, monkeypatch):
    """Finding the tokens of a turn walks over those of the conversation. Of 2,000 turns only those within
    max_length are searched."""
    messages, looked = chat("q", "a") * 2000, []
    token_range = masks.token_range
    monkeypatch.setattr(masks, "token_range", lambda *arguments: (looked.append(1), token_range(*arguments))[1])
    (tmp_path / "rows.json").write_text(json.dumps([{"messages": messages}]))
    dataset, (ids, mask) = data.load(str(tmp_path / "rows.json"), tiny, 64), by_pieces(messages)
    assert dataset.tokens.tolist() == ids[:64] and dataset.loss_mask.tolist() == mask[:64]
    assert dataset.ledger.turns == dataset.ledger.turns_stopped == 3 and len(looked) < 6
