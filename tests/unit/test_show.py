"""tools/show.py: conversations as the model sees them, what --max_length would truncate, the token cache."""

import dataclasses
import inspect
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from data_helpers import tiny
from helpers import ROOT, TINY, make_directory, write

import data
import sft
from settings.errors import UserError
from text import token_cache
from text.template import ChatTokenizer
from tools import show


def test_show_prints_what_the_model_sees(output, tmp_path, capsys):
    """Targets are marked, in green on a terminal; --ids prints ids; only -n rows are read, so the broken one is not."""
    path = write(tmp_path / "rows.json", [{"prompt": "q", "response": "é answer"}] * 3 + [{"broken": 1}])
    command = [sys.executable, os.path.join(ROOT, "tools", "show.py"), "show", path, "--model", "tiny", "-n", "2"]
    out = subprocess.run(command, capture_output=True, text=True).stdout
    assert out.count("---") == 2
    assert out.count("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n«é answer<|im_end|>»") == 2
    ids = output("show", path, "-n", 1, "--ids")
    dataset = data.load(path, tiny, 100, limit=3)
    first = slice(0, dataset.starts[1])
    assert "«" + " ".join(map(str, dataset.tokens[first][dataset.loss_mask[first]])) in ids
    show.show(dataset, tiny, [0], False, show.COLOURS)
    assert "\x1b[32mé answer<|im_end|>\x1b[0m" in capsys.readouterr().out


@pytest.fixture
def output(monkeypatch, capsys):
    """A function: arguments of show.py -> what it prints."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["show.py", *map(str, arguments)])
        show.main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def rows(tmp_path):
    """A file of ten rows: question 0 to question 9 with answers of 1, 2, ... words."""
    return write(tmp_path / "rows.json", [{"prompt": f"question {i}", "response": "word " * (i + 1), "id": i}
                                          for i in range(10)])


def test_every_data_setting_of_sft_is_a_setting_here():
    """With its type, default and help, and it reaches the function that sft.py passes it to."""
    fields = {field.name: field for field in dataclasses.fields(show.Config)}
    used = {*inspect.signature(data.Options).parameters, *inspect.signature(ChatTokenizer).parameters,
            "model", "tokenizer", "prompt_key", "response_key", "messages_key", "cache_dir"}
    theirs = {field.name: field for field in show.data_settings()}
    assert {"model", "tokenizer", "max_length", "too_long", "train_on", "train_on_prompt", "bad_rows",
            "chat_template", "template_kwargs", "cache_dir"} <= theirs.keys()
    assert not {"train_data", "val_data", "batch_size", "lr"} & theirs.keys()
    for name, field in theirs.items():
        assert name in used, f"--{name} of sft.py changes nothing in show.py"
        assert fields[name].type == field.type and fields[name].metadata["help"] == field.metadata["help"]
        assert name == "model" or fields[name].default == field.default
    assert next(iter(theirs)) == next(iter(dataclasses.fields(sft.Config))).name == "model"


def test_data_settings_change_what_is_shown(output, tmp_path):
    """The settings of sft.py have the same effect here."""
    path = write(tmp_path / "rows.json", [{"messages": [{"role": role, "content": text} for role, text in (
        ("user", "q"), ("assistant", "one"), ("user", "r"), ("assistant", "two"))]}])
    assert output("show", path).count("«") == 2
    assert output("show", path, "--train_on", "last").count("«") == 1
    assert "<|im_start|>«user\nq" in output("show", path, "--train_on_prompt").replace("\n«", "«")
    named = write(tmp_path / "named.json", [{"q": "question", "a": "answer"}])
    assert "«answer<|im_end|>»" in output("show", named, "--prompt_key", "q", "--response_key", "a")
    template = ("{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
                "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")
    make_directory(tmp_path / "other", template)
    assert "user: q<|im_end|>assistant:" in output("show", path, "--tokenizer", tmp_path / "other")
    with pytest.raises(UserError, match="--tokenizer nowhere: no such directory"):
        output("show", path, "--tokenizer", "nowhere")


def test_a_row_of_the_file(output, rows):
    """--row reads no later row. A row that does not exist, or was dropped, is an error."""
    out = output("show", rows, "--row", 7)
    assert re.findall("^---.*", out, re.M) == [f"--- {rows}[7]: 32 tokens, 12 targets", "--- of the 8 rows that were read:"]
    assert "question 7" in out and "--- of the" not in output("show", rows, "--n", 3)
    with pytest.raises(UserError, match=r"--row 10: no conversation .* has 10 in = 10 trained .* rows count from 0"):
        output("show", rows, "--row", 10)
    length = len(tiny.tokenizer.encode(tiny.render([{"role": "user", "content": "question 0"},
                                                    {"role": "assistant", "content": "word "}])).ids)
    with pytest.raises(UserError, match=r"--row 9: .*\(9 too long"):
        output("show", rows, "--row", 9, "--too_long", "drop", "--max_length", length)


def test_the_first_rows_need_not_be_like_the_others(output, tmp_path):
    """Where they are too long, or are not trained, sft.py would still train on the file."""
    pair = {"prompt": "q", "response": "a"}
    long = write(tmp_path / "long.json", [{"prompt": "q", "response": "word " * 60}] * 3 + [pair] * 9)
    flags = "--max_length", 40
    assert output("show", long, *flags).count("more tokens with") == 3
    assert "3 dropped (3 too long)" in output("show", long, *flags, "--too_long", "drop")
    other = write(tmp_path / "other.json", [{**pair, "label": False}, {**pair, "weight": 0}, pair])
    out = output("show", other, "-n", 2)
    assert "rows     2 in = 0 trained + 2 dropped (1 label is false, 1 without targets)" in out and "«" not in out
    with pytest.raises(UserError, match="--row 0: no conversation comes from this row; .*1 label is false"):
        output("show", other, "--row", 0)


def test_a_row_of_a_source_that_begins_later(output, rows):
    """--row counts from the beginning of the file, also if the source names some of its rows only."""
    out = output("show", f"{rows}[5:9]", "--row", 7)
    assert re.findall("^---.*", out, re.M)[0].startswith(f"--- {rows}[7]: ") and "question 7" in out
    with pytest.raises(UserError, match="--row 4: no conversation comes from this row"):
        output("show", f"{rows}[5:9]", "--row", 4)


def test_bad_rows_and_what_is_not_used_are_printed(output, tmp_path):
    """Bad rows end the program unless --bad_rows drop counts them, even lines that are not JSON."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "q", "response": "a", "score": 1}\n{"broken": 1}\n{"prompt": 1,,}\n', encoding="utf-8")
    for command in "show", "stats":
        with pytest.raises(UserError, match="2 rows can't be used"):
            output(command, path)
        out = output(command, path, "--bad_rows", "drop")
        assert "rows     3 in = 1 trained + 2 dropped (2 bad)" in out
        assert "columns not used: score" in out
        assert "rows.jsonl line 2: " in out and "rows.jsonl line 3, column 14 is not JSON" in out


def test_a_plain_text_and_tokens_are_shown(output, tmp_path):
    """A text in pieces of --max_length, and tokens with the weights of the row."""
    text = write(tmp_path / "text.json", [{"text": "word " * 30}])
    pieces = re.findall(r"text.json\[0\]: (\d+) tokens, (\d+) targets\n", output("show", text, "--row", 0,
                                                                            "--max_length", 8))
    assert len(pieces) > 3 and all(int(targets) == int(tokens) - 1 for tokens, targets in pieces)
    tokens = write(tmp_path / "tokens.json", [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "weight": 0.5}])
    assert "5 «6 7 »×0.5" in output("show", tokens, "--ids")


def test_random_conversations_are_drawn_with_a_seed(output, rows):
    def sources(*arguments):
        return re.findall(r"rows.json\[(\d+)\]", output("show", rows, *arguments))

    assert sources("--random", 4) == sources("--random", 4) != sources("--random", 4, "--seed", 1)
    assert len(set(sources("--random", 4))) == 4
    assert sorted(sources("--random", 99)) == sorted(map(str, range(10)))
    for arguments in ("--random", 2, "--row", 1), ("--random", 2, "-n", 1), ("--seed", 1):
        with pytest.raises(UserError, match="does not work with|no effect without"):
            output("show", rows, *arguments)


def test_what_is_truncated_is_marked(output, rows):
    """How many tokens and targets, and how they begin; with --too_long drop, how many rows."""
    full = data.load(rows, tiny, 10**6)
    length = int(full.n_tokens[5]) - 4
    out = output("show", rows, "--row", 5, "--max_length", length)
    lost = int(full.loss_mask[full.starts[6] - 4 : full.starts[6]].sum())
    assert 0 < lost < 4  # the last token is the newline after the turn
    assert f": {length} tokens, {full.n_targets[5] - lost} targets, 4 more tokens with {lost} targets truncated" in out
    cut = tiny.tokenizer.decode(full.tokens[full.starts[6] - 4 : full.starts[6]].tolist(), skip_special_tokens=False)
    assert f"⟪truncated: {cut}⟫" in out
    assert "truncated:" not in output("show", rows, "--row", 5, "--max_length", length + 4)
    assert "rows     10 in = 6 trained + 4 dropped (4 too long)" in output(
        "show", rows, "-n", 10, "--max_length", length + 4, "--too_long", "drop")


def test_control_characters_are_escaped(output, tmp_path):
    """Raw ones could clear the screen, hide what a row says or type commands into some terminals."""
    text = "a\x1b[2J\x07\r\x7f\x9b31m\u202egnp\u2028\u2066\U000e0041 b\tc\nd 👨\u200d👩 é中"
    (tmp_path / "a\x1b[31m").mkdir()
    path = write(tmp_path / "a\x1b[31m" / "rows.json", [{"prompt": "q", "response": text, "k\x1b[0m": 1}])
    for out in output("show", path), output("stats", path):
        assert re.findall(r"[^\n\t\u200d\x20-\x7e«»中é👨👩…#×]", out) == []
    shown = output("show", path)
    assert r"a\x1b[2J\x07\r\x7f\x9b31m\u202egnp\u2028\u2066\U000e0041 b" + "\tc\nd 👨\u200d👩 é中" in shown
    assert r"a\x1b[31m" in shown and r"k\x1b[0m 1" in output("stats", path)


def test_weights_are_marked(rows, capsys):
    """A weight that is neither 0 nor 1 follows the tokens that have it."""
    dataset = data.load(rows, tiny, 100, limit=2)
    show.show(dataset, tiny, [0, 1], False, show.PLAIN)
    assert "×" not in capsys.readouterr().out
    weighted = dataset.starts[1] + np.flatnonzero(dataset.loss_mask[dataset.starts[1] :])
    weight = np.array([0.5] * (len(weighted) - 1) + [2], np.float32)
    show.show(dataclasses.replace(dataset, weighted=weighted, weight=weight), tiny, [0, 1], False, show.PLAIN)
    first, second = capsys.readouterr().out.split("---")[1:]
    assert "×" not in first
    assert re.search("«word word »×0.5«<.im_end.>»×2\n", second)


def test_stats_print_what_max_length_truncates(output, tmp_path):
    """Rows and targets beyond each length equal those that data.load truncates."""
    rows = [{"prompt": "q", "response": "word " * n} for n in (3, 600, 1500, 5000)]
    path = write(tmp_path / "rows.json", rows)
    out = output("stats", path, "--max_length", 512)
    full = data.load(path, tiny, 10**6)
    for length in (512, 1024, 2048, 4096):
        truncated = data.load(path, tiny, length)
        lost = full.ledger.target - truncated.ledger.target
        rows = truncated.ledger.rows_truncated
        assert re.search(rf"--max_length {length:<5,} truncates {rows} rows .* and removes {lost:,} targets", out)
    assert "packing " in out
    assert "rows     4 in = 4 trained" in out
    dropped = output("stats", path, "--max_length", 700, "--too_long", "drop")
    is_long = full.n_tokens > 700
    n_targets = full.n_targets[is_long].sum()
    assert re.search(rf"--max_length 700   drops {is_long.sum()} rows .* removes {n_targets:,} targets", dropped)


def test_stats_count_the_keys_of_rows_and_messages(output, tmp_path):
    """Those with a value: a parquet file has every column in every row."""
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 1, "name": None}]
    path = write(tmp_path / "rows.json", [{"messages": turns, "id": 1, "score": None, "tags": ["x", {"y": 1}]}] * 2
                                         + [{"conversations": [{"from": "human", "value": "q"},
                                                               {"from": "gpt", "value": "a"}], "id": 0}])
    out = output("stats", path)
    assert "row keys     id 3, messages 2, tags 2, conversations 1\n" in out
    assert "message keys role 4, content 4, weight 2, from 2, value 2\n" in out


def test_the_cache_is_listed_and_cleared(output, rows, tmp_path):
    """With size, ages, model and data of each entry. Only entries are removed."""
    cache = tmp_path / "cache"
    assert "0 entries" in output("--cache", "--cache_dir", cache)
    tokenizer = ChatTokenizer(TINY)
    tokenizer.directory = "models/\x1b[31mtiny"
    for max_length in (64, 65):
        data.load(rows, tokenizer, max_length, cache_dir=str(cache))
    entries = token_cache.entries(cache)
    day = 86400
    os.utime(entries[1].path, (0, entries[1].made - 3 * day))
    (cache / "notes.txt").write_text("kept")
    out = output("--cache", "--cache_dir", cache)
    assert out.count("rows.json") == 2 and out.count(r"models/\x1b[31mtiny") == 2 and "\x1b" not in out
    assert re.search(r" 0\.0 days +3\.0 days ", out)
    size = sum(os.path.getsize(os.path.join(entry.path, name)) for entry in entries for name in os.listdir(entry.path))
    assert f"2 entries, {size / 1e6:.1f} MB in {cache}" in out and "--cache clear" in out
    assert f"2 entries, {size / 1e6:.1f} MB removed" in output("--cache", "clear", "--cache_dir", cache)
    assert os.listdir(cache) == ["notes.txt"]
    assert r"in c\x1b" in output("--cache", "--cache_dir", "c\x1b")
    assert r"from c\x1b" in output("--cache", "clear", "--cache_dir", "c\x1b")
    for arguments, message in ((("--cache", "--cache_dir", "none"), "not none"), (("show", "--cache"), "does not work"),
                               (("--cache_dir", "x"), "no effect without --cache")):
        with pytest.raises(UserError, match=message):
            output(*arguments)


@pytest.mark.parametrize("arguments, message", [
    (("stats", "none.json"), "no such data file"),
    ((), "show or stats is missing"),
    ((os.path.join(ROOT, "README.md"), "-n", "2"), "what to do with it comes first: .* show .*README.md --n 2, or stats"),
    (("nowhere.json",), "nowhere.json: what to do with it comes first"),
    (("show", "data/example.jsonl", "-n", "0"), "--n 0: it must be at least 1"),
    (("stats", "data/example.jsonl", "--row", "3"), "--row 3 does not work with --do stats"),
    (("show", "data/example.jsonl", "--batch_size", "3"), "--batch_size 3 does not work with --do show"),
])
def test_invalid_arguments_are_errors(arguments, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["show.py", *arguments])
    with pytest.raises((ValueError, OSError), match=message):
        show.main()
