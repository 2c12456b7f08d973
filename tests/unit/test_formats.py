"""Formats of rows: what is read, and the error for a wrong row."""

import json
import re

import pytest
from data_helpers import assert_is, by_hand, tiny
from helpers import chat, write

import data
from settings.errors import UserError
from text import formats

ROWS = [{"prompt": "a", "response": "b"}, {"prompt": "为什么", "response": "d \u2028 e"}]

# ---- rows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row, messages", [
    ({"prompt": "q", "response": "a"}, chat("q", "a")),
    ({"prompt": "q", "response": "a", "system": "s"}, chat("q", "a", system="s")),
    ({"instruction": "i", "output": "a"}, chat("i", "a")),
    ({"instruction": "i", "input": "", "output": "a"}, chat("i", "a")),
    ({"instruction": "i", "input": None, "output": "a"}, chat("i", "a")),
    ({"instruction": "i", "input": "x", "output": "a"}, chat("i\nx", "a")),
    ({"instruction": "i", "output": "a", "system": "", "history": []}, chat("i", "a")),
    ({"instruction": "i", "output": "a", "system": None, "history": None}, chat("i", "a")),
    ({"instruction": "i", "input": "x", "output": "a", "system": "s", "history": [["p", "o"], ["n", "m"]]},
     chat("p", "o", "n", "m", "i\nx", "a", system="s")),
    ({"messages": chat("q", "a", "r", "b", system="s")}, chat("q", "a", "r", "b", system="s")),
    ({"conversations": chat("q", "a")}, chat("q", "a")),
    ({"conversations": chat("q", "a", system="s"), "system": "t"}, chat("q", "a", system="s")),
    ({"messages": None, "conversations": chat("q", "a")}, chat("q", "a")),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
     chat("q", "a", system="s")),
    ({"conversations": [{"from": "system", "value": "s"}, {"from": "user", "value": "q"},
                        {"from": "assistant", "value": "a"}]}, chat("q", "a", system="s")),
    ({"id": 7, "source": "web", "prompt": "q", "response": "a"}, chat("q", "a")),
], ids=str)
def test_every_format_of_rows_becomes_messages(row, messages, tmp_path):
    """Each accepted format, with its optional keys and with empty ones."""
    assert_is(data.load(write(tmp_path / "rows.json", [row]), tiny, 2048), [by_hand(messages)])


@pytest.mark.parametrize("row, keys", [
    ({"question": "q?", "answer": "a."}, ("question", "answer", "messages")),
    ({"question": "q?", "answer": "a.", "messages": chat("x", "y")}, ("question", "answer", "messages")),
    ({"question": "q?", "answer": "a.", "prompt": "x", "response": "y"}, ("question", "answer", "messages")),
    ({"extra_info": {"question": "q?", "deep": {"answer": "a."}}, "prompt": chat("x")},
     ("extra_info.question", "extra_info.deep.answer", "messages")),
    ({"a.b": "q?", "a": {"b": "x"}, "c": "a."}, ("a.b", "c", "messages")),
    ({"chat": chat("q?", "a."), "prompt": "x", "response": "y"}, ("prompt", "response", "chat")),
    ({"chat": chat("q?", "a."), "messages": chat("x", "y")}, ("prompt", "response", "chat")),
    ({"prompt": "q?", "response": "a."}, ("question", "answer", "chat")),
    ({"instruction": "q?", "output": "a."}, ("question", "answer", "chat")),
    ({"messages": chat("q?", "a."), "question": "x"}, ("question", "answer", "chat")),
    ({"conversations": [{"from": "human", "value": "q?"}, {"from": "gpt", "value": "a."}]},
     ("question", "answer", "chat"))
], ids=range(11))
def test_keys_of_rows_may_be_named(row, keys):
    """A row that has the named keys is read by them; any other row is read by the default keys."""
    messages = formats.to_messages(row, "here", keys)
    assert [(m["role"], m["content"]) for m in messages] == [("user", "q?"), ("assistant", "a.")]


Q, A = chat("q", "a")
ALPACA = {"instruction": "i", "output": "a"}
BAD_ROWS = {
    "unknown shape": ({"question": "q", "answer": "a"},
                      r"unrecognised columns 'question', 'answer'; .*\"instruction\".*"
                      "pass --prompt_key question --response_key answer$"),
    "no keys": ({}, r"unrecognised columns \(none\); accepted"),
    "half a pair": ({"prompt": "q"}, "unrecognised columns 'prompt'; accepted"),
    "a text": ("just text", "a row must be an object, not str"),
    "a number": (5, "a row must be an object, not int"),
    "null": (None, "a row must be an object, not NoneType"),
    "a list": ([Q, A], "a row must be an object, not list"),
    "messages null": ({"messages": None}, "must be a non-empty list .* it is null"),
    "messages empty": ({"messages": []}, ""),
    "conversations empty": ({"conversations": []}, ""),
    "conversations empty, with system": ({"conversations": [], "system": "s"}, ""),
    "messages a text": ({"messages": "hello"}, 'non-empty list .* it is "hello"'),
    "messages an object": ({"messages": {"role": "user", "content": "q"}}, "must be a non-empty list"),
    "message a text": ({"messages": ["q", A]}, "message must be.*'q'"),
    "message null": ({"messages": [None, A]}, "message must be.*None"),
    "message without role": ({"messages": [{"content": "q"}, A]}, "message must be"),
    "message without content": ({"messages": [{"role": "user"}, A]},
                                "content of the user message must be a string.*null"),
    "answer without content": ({"messages": [Q, {"role": "assistant"}]}, "content.*must be a string.*null"),
    "content a list": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, A]},
                       "content of the user message must be a string.*type"),
    "content a number": ({"prompt": 5, "response": "a"},
                         "content of the user message must be a string, it is 5"),
    "response null": ({"prompt": "q", "response": None}, "must be a string, it is null"),
    "value missing": ({"conversations": [{"from": "human"}, {"from": "gpt", "value": "a"}]},
                      "must be a string"),
    "role null": ({"messages": [{"role": None, "content": "q"}, A]}, "role"),
    "role a list": ({"messages": [{"role": ["user"], "content": "q"}, A]}, "role"),
    "from unknown": ({"conversations": [{"from": "bing", "value": "q"}]},
                     "unknown \"from\": 'bing'.*human.*gpt"),
    "from a list": ({"conversations": [{"from": ["human"], "value": "q"}, A]}, "from"),
    "from null": ({"conversations": [{"from": None, "value": "q"}, A]}, "unknown \"from\": None"),
    "empty answer": ({"prompt": "q", "response": ""}, "empty answer"),
    "blank answer": ({"messages": [Q, {"role": "assistant", "content": " \n\t"}]}, "empty answer"),
    "empty output": ({**ALPACA, "output": ""}, "empty answer"),
    "no assistant": ({"messages": [Q]}, "no assistant message"),
    "weight 2": ({"messages": [Q, {**A, "weight": 2}]}, "\"weight\" 1 or 0.*it is 2"),
    "weight 0.5": ({"messages": [Q, {**A, "weight": 0.5}]}, "it is 0.5"),
    "weight null": ({"messages": [Q, {**A, "weight": None}]}, "it is None"),
    "weight a text": ({"messages": [Q, {**A, "weight": "1"}]}, "it is '1'"),
    "train a text": ({"messages": [Q, {**A, "train": "false"}]}, "\"train\" must be true or false.*'false'"),
    "train a list": ({"messages": [Q, {**A, "train": []}]}, "\"train\" must be true or false"),
    "system a number": ({"prompt": "q", "response": "a", "system": 5},
                        "content of the system message must be a string"),
    "instruction a number": ({**ALPACA, "instruction": 5}, "string"),
    "instruction null": ({**ALPACA, "instruction": None}, "string"),
    "input a number": ({**ALPACA, "input": 5}, "string"),
    "input a list": ({**ALPACA, "input": ["x"]}, "string"),
    "history a text": ({**ALPACA, "history": "abc"}, "history"),
    "history a number": ({**ALPACA, "history": 5}, "history"),
    "history of numbers": ({**ALPACA, "history": [5]}, "history"),
    "history of texts": ({**ALPACA, "history": ["ab"]}, "history"),
    "history of objects": ({**ALPACA, "history": [{"q": "x", "a": "y"}]}, "history"),
    "history without an answer": ({**ALPACA, "history": [["q"]]}, "history"),
    "history of three": ({**ALPACA, "history": [["q", "a", "r"]]}, "history"),
    "history with an empty answer": ({**ALPACA, "history": [["q", ""]]}, "empty answer"),
    "half a character": ({"prompt": "cut emoji \ud83d", "response": "a"}, ""),
    "half a character in an answer": ({"prompt": "q", "response": "cut emoji \ud83d"}, ""),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named(name, tmp_path):
    """Any mistake in a row is an error with file and index, the value, and the rule."""
    row, say = BAD_ROWS[name]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"prompt": "a", "response": "b"}, row]), encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(f"{path}[1]") + f".*{say}"):
        data.load(str(path), tiny, 100)


def test_a_bug_is_not_reported_as_an_error_in_the_row(tmp_path, monkeypatch):
    """A plain ValueError in to_messages keeps its traceback; a UserError would hide it."""
    def broken(turn, where):
        return int("x")

    monkeypatch.setattr(formats, "to_message", broken)
    with pytest.raises(ValueError, match="invalid literal for int") as info:
        data.load(write(tmp_path / "rows.json", ROWS), tiny, 100)
    assert not isinstance(info.value, UserError) and info.traceback[-1].name == "broken"
