"""Shapes of rows: what each row says, as literal messages, texts, tokens and weights; and the error for a wrong row."""

import json
import re

import pytest
from data_helpers import assert_is, by_hand, tiny
from helpers import chat, target_texts, write

import data
from settings.errors import UserError
from text import formats, keys, messages
from text.formats import read_row

Q, A = chat("q", "a")
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Graz"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def said(row, names=formats.KEYS):
    """[(role, content), ...] of a row."""
    return [(m["role"], m["content"]) for m in read_row(row, "here", names).messages]


def weights(row):
    """The weights of a row's answers."""
    return [m["weight"] for m in read_row(row, "here").messages if m["role"] == "assistant"]


def answers(*marks):
    """A row with an answer for each dict of marks."""
    return {"messages": [turn for mark in marks for turn in (Q, {**A, **mark})]}


def refusal(row, names=formats.KEYS):
    with pytest.raises(UserError, match=r"^here\[3\]: ") as info:
        read_row(row, "here[3]", names)
    return str(info.value)


# ---- shapes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row, expected", [
    ({"prompt": "q", "response": "a"}, chat("q", "a")),
    ({"prompt": "q", "response": "a", "system": "s"}, chat("q", "a", system="s")),
    ({"instruction": "i", "output": "a"}, chat("i", "a")),
    ({"instruction": "i", "input": "", "output": "a"}, chat("i", "a")),
    ({"instruction": "i", "input": None, "output": "a"}, chat("i", "a")),
    ({"instruction": "i", "input": float("nan"), "output": "a"}, chat("i", "a")),
    ({"instruction": "i", "input": "x", "output": "a"}, chat("i\nx", "a")),
    ({"instruction": "x", "input": "x", "output": "a"}, chat("x\nx", "a")),
    ({"prompt": '[{"role": "user", "content": "q"}] Translate.', "response": "a"},
     chat('[{"role": "user", "content": "q"}] Translate.', "a")),  # a text that begins with JSON
    ({"instruction": "i", "output": "a", "system": "", "history": []}, chat("i", "a")),
    ({"instruction": "i", "output": "a", "system": None, "history": None}, chat("i", "a")),
    ({"instruction": "i", "input": "x", "output": "a", "system": "s", "history": [["p", "o"], ["n", "m"]]},
     chat("p", "o", "n", "m", "i\nx", "a", system="s")),
    ({"messages": chat("q", "a", "r", "b", system="s")}, chat("q", "a", "r", "b", system="s")),
    ({"conversations": chat("q", "a")}, chat("q", "a")),
    ({"conversations": chat("q", "a", system="s"), "system": "s"}, chat("q", "a", system="s")),
    ({"messages": None, "conversations": chat("q", "a")}, chat("q", "a")),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
     chat("q", "a", system="s")),
    ({"conversations": [{"from": "system", "value": "s"}, {"from": "user", "value": "q"},
                        {"from": "assistant", "value": "a"}]}, chat("q", "a", system="s")),
    ({"id": 7, "source": "web", "prompt": "q", "response": "a"}, chat("q", "a")),
], ids=str)
def test_every_format_of_rows_becomes_tokens(row, expected, tmp_path):
    """Each accepted format, with its optional keys and with empty ones, down to ids and loss mask."""
    assert_is(data.load(write(tmp_path / "rows.json", [row]), tiny, 2048), [by_hand(expected)])


@pytest.mark.parametrize("question, answer", [
    ("prompt", "completion"), ("question", "answer"), ("query", "response"), ("input", "output"),
    ("instruction", "response"), ("problem", "solution"), ("question", "solution"), ("prompt", "output"),
    ("input", "target"), ("inputs", "targets"), ("Question", "Answer"), ("PROMPT", "reply")])
def test_pairs_of_columns_are_recognised(question, answer):
    assert said({question: "q?", answer: "a."}) == [("user", "q?"), ("assistant", "a.")]
    assert said({"id": 1, answer: "a.", question: "q?", "lang": "en"}) == [("user", "q?"), ("assistant", "a.")]


TURNS = [("user", "q?"), ("assistant", "a.")]


@pytest.mark.parametrize("row", [
    *({name: chat("q?", "a.")} for name in ("messages", "conversation", "dialog", "dialogue", "chat")),
    {"messages": json.dumps(chat("q?", "a."))},
    chat("q?", "a."),  # the row itself is the list
    {"messages": {"role": ["user", "assistant"], "content": ["q?", "a."]}},  # Arrow's struct of lists
    {"conversations": [{"role": "user", "value": "q?"}, {"role": "assistant", "value": "a."}]},
    {"conversations": [{"from": "human", "text": "q?"}, {"from": "gpt", "text": "a."}]},
    {"conversations": [{"from": None, "value": None, "role": "user", "content": "q?"},
                       {"from": "gpt", "value": "a.", "role": None, "content": None}]},
    {"messages": [{"role": "User", "content": "q?"}, {"role": "ASSISTANT", "content": "a."}]},
    {"messages": [{"role": "prompter", "content": "q?"}, {"role": "model", "content": "a."}]},
    {"conversations": [{"from": "Human", "value": "q?"}, {"from": "chatgpt", "value": "a."}]},
    {"conversation": [{"human": "q?", "assistant": "a."}]},
    {"conversation": [{"system": "", "input": "q?", "output": "a."}]},
    {"prompt": [{"role": "user", "content": "q?"}], "completion": [{"role": "assistant", "content": "a."}]},
    {"prompt": [{"role": "user", "content": "q?"}], "response": "a."},
    {"prompt": "q?", "completion": [{"role": "assistant", "content": "a."}]},
    {"prompt": "q?", "completion": {"role": "assistant", "content": "a."}},
    {"prompt": "q?", "completion": chat("q?", "a.")},  # the completion repeats the prompt
    {"prompt": chat("q?"), "completion": chat("q?", "a.")},
    {"messages": chat("q?", "a."), "prompt": "q?", "response": " a."},  # the same twice
    {"messages": chat("q?", "a."), "conversations": chat("q?", "a.")},
    {"messages": chat("q?", "a."), "chosen": chat("q?", "a."), "rejected": chat("q?", "b.")},
    {"prompt": None, "response": None, "instruction": "q?", "input": None, "output": "a.", "messages": None},
    {"prompt": "", "response": "", "instruction": "q?", "output": "a.", "messages": []},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "?"}]},
                  {"role": "assistant", "content": [{"type": "text", "value": "a."}]}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "q?", "image": None}], "images": []},
                  {"role": "assistant", "content": "a.", "tool_calls": [], "audio": None}], "images": None},
    {"question": "q?", "prompt": "q?", "response": "a.", "answer": "reference", "solution": "another"},
    {"messages": [{"Role": "user", "Content": "q?"}, {" role": "assistant", "content ": "a.", "WEIGHT": 1}]},
    {"Conversations": [{"From": "human", "Value": "q?"}, {"from": "gpt", "VALUE": "a.", "From": None}]},
    {"conversation": [{"Human": "q?", "Assistant ": "a."}]},
    {"messages": {"Role": ["user", "assistant"], "Content": ["q?", "a."]}},
    [{"Role": "user", "Content": "q?"}, {"Role": "assistant", "Content": "a."}],
    {"prompt ": "q?", " response": "a."}, {"Prompt\n": "q?", "RESPONSE\t": "a.", "System Prompt": None},
    {"user": "q?", "assistant": "a.", "id": 1}, {"Human": "q?", "GPT": "a."}, {"human": "q?", "bot": "a."},
    {"messages": [json.dumps(Q | {"content": "q?"}), json.dumps(A | {"content": "a."})]},
    {"messages": json.dumps(json.dumps(chat("q?", "a.")))},
    {"prompt": json.dumps(chat("q?")), "completion": json.dumps([{"role": "assistant", "content": "a."}])},
    {"prompt": Q | {"content": "q?"}, "completion": "a."}, {"prompt": "q?", "input": "q?", "output": "a."},
    {"messages": [{"role": " USER", "content": "q?"}, {"role": "Assistant ", "content": "a.", "channel": "final"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "q?", "train": None}]},
                  {"role": "assistant", "content": "a.", "images": [None], "recipient": "all"}], "images": [[], None]},
    {"Prompt": [{"Role": "user", "content": "q?"}], " Completion": [{"Role": "assistant", "content": "a."}]},
], ids=str)
def test_the_same_conversation_in_other_words(row):
    assert said(row) == TURNS and weights(row) == [1.0]


@pytest.mark.parametrize("row, expected", [
    ({"instruction": "i", "context": "c", "response": "a", "category": "qa"}, [("user", "i\nc"), ("assistant", "a")]),
    ({"prompt": "i", "context": "c", "response": "a"}, [("user", "i\nc"), ("assistant", "a")]),
    ({"question": "i", "passage": "c", "answer": "a"}, [("user", "i\nc"), ("assistant", "a")]),
    ({"prompt": "p", "input": "x", "output": "a"}, [("user", "p\nx"), ("assistant", "a")]),
    ({"query": "r", "response": "b", "history": [["q", "a"]], "system": "s"},
     [("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]),
    ({"prompt": "r", "completion": "b", "history": chat("q", "a")},
     [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]),
    ({"prompt": "r", "response": "b", "chat_history": [{"human": "q", "assistant": "a"}]},
     [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]),
    ({"prompt": "q", "response": "a", "sys_prompt": "s"}, [("system", "s"), ("user", "q"), ("assistant", "a")]),
    ({"messages": chat("q", "a"), "history": [["q", "a"]]}, [("user", "q"), ("assistant", "a")]),
    ({"prompt": "r", "response": "b", "history": '[["q", "a"]]'},
     [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]),
    ({"system_prompt": "s", "question": "q", "response": "a"}, [("system", "s"), ("user", "q"), ("assistant", "a")]),
    ({"system": "s", "conversation": [{"human": "q", "assistant": "a"}, {"human": "r", "assistant": "b"}]},
     [("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]),
    ({"messages": [{"role": "developer", "content": "s"}, *chat("q", "a")]},
     [("system", "s"), ("user", "q"), ("assistant", "a")]),
    ({"prompt": "label?", "response": 1}, [("user", "label?"), ("assistant", "1")]),
    ({"instruction": 2.5, "input": "", "output": 2}, [("user", "2.5"), ("assistant", "2")]),
    ({"messages": chat("hi", "Hello.") + chat("x")}, [("user", "hi"), ("assistant", "Hello."), ("user", "x")]),
    ({"prompt": "", "response": "a"}, [("user", ""), ("assistant", "a")]),
    ({"messages": [{"role": "system", "content": ""}, Q, A]}, [("system", ""), ("user", "q"), ("assistant", "a")]),
], ids=str)
def test_nothing_of_a_row_is_dropped(row, expected):
    """Context, history, system prompts and numbers are in the messages."""
    assert said(row) == expected


@pytest.mark.parametrize("role", ["tool", "observation", "function", "tool_response", "ipython", "Tool"])
def test_results_of_tools_have_many_names(role):
    row = {"messages": [Q, {"role": role, "content": "grey", "name": "weather", "tool_call_id": "1"}, A]}
    assert read_row(row, "here").messages[1] == {
        "role": "tool", "content": "grey", "name": "weather", "tool_call_id": "1", "weight": 1.0}


@pytest.mark.parametrize("row, names", [
    ({"question": "q?", "answer": "a."}, ("question", "answer", "messages")),
    ({"question": "q?", "answer": "a.", "messages": chat("x", "y")}, ("question", "answer", "messages")),
    ({"question": "q?", "answer": "a.", "prompt": "x", "response": "y"}, ("question", "answer", "messages")),
    ({"extra_info": {"question": "q?", "deep": {"answer": "a."}}, "prompt": chat("x")},
     ("extra_info.question", "extra_info.deep.answer", "messages")),
    ({"a.b": "q?", "a": {"b": "x"}, "c": "a."}, ("a.b", "c", "messages")),
    ({"chat": chat("q?", "a."), "prompt": "x", "response": "y"}, ("prompt", "response", "chat")),
    ({"chat": chat("q?", "a."), "messages": chat("x", "y")}, ("prompt", "response", "chat")),
    ({"data": {"turns": chat("q?", "a.")}}, ("prompt", "response", "data.turns")),
    ({"prompt": "q?", "response": "a."}, ("question", "answer", "chat")),
    ({"instruction": "q?", "output": "a."}, ("question", "answer", "chat")),
    ({"messages": chat("q?", "a."), "question": "x"}, ("question", "answer", "chat")),
    ({"prompt": "q?", "chosen": "a.", "rejected": "b."}, ("prompt", "chosen", "messages")),
    ({"prompt": "q?", "chosen": chat("q?", "a."), "rejected": chat("q?", "b.")}, ("prompt", "chosen", "messages")),
    ({"prompt": "q?", "chosen": chat("q?", "a."), "rejected": chat("q?", "b.")}, ("prompt", "response", "chosen")),
    ({"conversations": [{"from": "human", "value": "q?"}], "chosen": {"from": "gpt", "value": "a."},
      "rejected": {"from": "gpt", "value": "b."}}, ("conversations", "chosen", "messages")),
    ({"question": "q?", "choices": ["a", "b"], "answer": "a."}, ("question", "answer", "messages")),
    ({"question": "q?", "hint": None, "solution": "x", "answer": "a."}, ("question", "answer", "messages")),
    ({"conversations": [{"from": "human", "value": "q?"}, {"from": "gpt", "value": "a."}]},
     ("question", "answer", "chat"))
], ids=str)
def test_keys_of_rows_may_be_named(row, names):
    """A row that has the named keys is read by them; any other row is read by the default keys."""
    assert said(row, names) == TURNS


# ---- what is trained ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark, weight", [
    *(({key: value}, 0.0) for key in ("train", "training", "trainable", "train_on_turn", "loss")
      for value in (False, 0, "false", "False", 0.0, "0", " FALSE ", "0.0")),
    *(({key: value}, 1.0) for key in ("train", "training", "loss")
      for value in (True, 1, None, "true", 1.0, "1", "", "null")),
    ({"masked": "1"}, 0.0), ({"masked": ""}, 1.0), ({"weight": "null"}, 1.0), ({"weight": ""}, 1.0),
    *(({"weight": text}, float(text)) for text in ("0", "1", "1.0", "0.5", ".5", "5e-1")), ({"Weight": "0"}, 0.0),
    ({"masked": True}, 0.0), ({"mask": 1}, 0.0), ({"masked": False}, 1.0), ({"masked": None}, 1.0),
    *(({key: value}, value) for key in ("weight", "loss_weight", "loss_scale") for value in (0.0, 0.5, 1.0, 2.5)),
    ({"weight": 0}, 0.0), ({"weight": True}, 1.0), ({"weight": None}, 1.0), ({"weight": 3, "loss_weight": 3}, 3.0),
    ({"train": True, "weight": 0}, 0.0), ({"train": False, "weight": 1}, 0.0), ({"loss": True, "weight": 0.5}, 0.5),
    ({"train": True, "loss": 1, "masked": False}, 1.0)], ids=str)
def test_every_mark_of_a_turn_is_honoured(mark, weight):
    """In a list of messages, in ShareGPT's form, and in a turn that is a pair; other turns keep their weight."""
    assert weights(answers(mark, {})) == [weight, 1.0]
    assert weights({"conversations": [{"from": "human", "value": "q"},
                                      {"from": "gpt", "value": "a", **mark}]}) == [weight]
    assert weights({"conversation": [{"human": "q", "assistant": "a", **mark}]}) == [weight]
    read = read_row(answers(mark), "here").messages
    assert [m.keys() for m in read] == [{"role", "content", "weight"}] * 2  # no mark reaches a template


def test_a_turn_that_is_not_trained_has_no_targets(tmp_path):
    """From the file to the targets."""
    rows = [{"conversations": [{"from": "human", "value": "q", "loss": None},
                               {"from": "gpt", "value": "bad", "loss": False},
                               {"from": "human", "value": "r", "loss": None},
                               {"from": "gpt", "value": "good", "loss": True}]},
            {"messages": [{**Q, "loss_weight": 0.0}, {**A, "loss_weight": 0.0}, Q,
                          {**A, "content": "fine", "masked": False}]}]
    dataset = data.load(write(tmp_path / "rows.json", rows), tiny, 100)
    assert target_texts(dataset, 0) == ["good<|im_end|>"] and target_texts(dataset, 1) == ["fine<|im_end|>"]


@pytest.mark.parametrize("mark", [{"weight": 1}, {"loss": True}, {"train": 1}, {"loss_weight": 0.5}], ids=str)
@pytest.mark.parametrize("role", ["user", "system", "tool"])
def test_a_prompt_that_is_marked_as_trained_is_an_error(mark, role):
    say = refusal({"messages": [{"role": role, "content": "x", **mark}, Q, A]})
    assert re.search(rf'"{list(mark)[0]}": .* in a {role} message.*remove it.*--train_on_prompt', say)


@pytest.mark.parametrize("mark", [{"weight": 0}, {"loss": False}, {"train": None}, {"masked": True}, {"masked": False}],
                         ids=str)
def test_a_prompt_may_be_marked_as_not_trained(mark):
    assert weights({"messages": [{**Q, **mark}, A]}) == [1.0]


@pytest.mark.parametrize("row, expected", [
    ({"prompt": "q", "response": "a", "weight": 0.5}, [0.5]),
    *(({"prompt": "q", "response": "a", "weight": value}, [0.5]) for value in ("0.5", " .5", "5e-1")),
    *(({"prompt": "q", "response": "a", "weight": value}, [1.0]) for value in ("", "null", "1", "true", None)),
    ({"prompt": "q", "response": "a", "weight": "0.5", "loss_weight": 0.5, "train": "train"}, [0.5]),
    ({"prompt": "q", "response": "a", "train": "1", "masked": "0", "loss": "0.0"}, [1.0]),
    ({**answers({}, {"weight": 4}, {"loss": False}), "loss_weight": 0.25}, [0.25, 1.0, 0.0]),
    ({"prompt": "q", "response": "a", "train": True, "masked": False, "loss": 0.731}, [1.0]),
    ({"prompt": chat("q", "x", "r"), "completion": [A]}, [0.0, 1.0]),  # TRL trains the completion only
    ({"prompt": [Q, {**A, "train": True}, Q], "completion": [A, Q, A]}, [1.0, 1.0, 1.0]),
    ({"prompt": [{"from": "gpt", "value": "x"}, {"from": "human", "value": "r"}], "completion": [A]}, [0.0, 1.0]),
    ({"prompt": "r", "response": "b", "history": [["q", "a"]]}, [1.0, 1.0])], ids=str)
def test_weights_of_rows(row, expected):
    assert weights(row) == expected


@pytest.mark.parametrize("mark, reason", [
    ({"label": False}, "label is false"), ({"kto_tag": False}, "kto_tag is false"),
    ({"kto_tag": "False"}, "kto_tag is false"), ({"KTO_tag": 0}, "KTO_tag is false"),
    ({"train": False}, "train is false"),
    ({"trainable": 0}, "trainable is false"), ({"train": "0"}, "train is false"), ({"masked": "1"}, "masked is true"),
    ({"Train": "False"}, "Train is false"), ({"masked": True}, "masked is true")], ids=str)
@pytest.mark.parametrize("row", [{"prompt": "q", "response": "a"}, answers({}), {"prompt": [Q], "completion": [A]}],
                         ids=str)
def test_a_row_that_is_not_to_be_trained_is_dropped_and_counted(row, mark, reason, tmp_path):
    read = read_row({**row, **mark}, "here")
    assert read.dropped == reason and read.messages is read.text is read.tokens is None
    path = write(tmp_path / "rows.json", [{**row, **mark}, row])
    dataset = data.load(path, tiny, 100)
    assert dataset.ledger.lines()[0] == f"rows     2 in = 1 trained + 1 dropped (1 {reason})"
    assert [dataset.source(i) for i in range(len(dataset))] == [f"{path}[1]"]


@pytest.mark.parametrize("label", [True, 0, 1, "false", "sports", ["x"], 0.0], ids=str)
def test_other_labels_are_columns_that_are_not_used(label):
    read = read_row({"prompt": "q", "response": "a", "label": label}, "here")
    assert len(read.messages) == 2 and read.unused == (() if label is True else ("label",))


# ---- tools, reasoning, variables of the template ------------------------------------------------------------------


@pytest.mark.parametrize("tools", [
    [TOOL], json.dumps([TOOL]), [json.dumps(TOOL)], [TOOL["function"]], json.dumps([TOOL["function"]]),
    [{**TOOL, "strict": None}], json.dumps(json.dumps([TOOL])), [{"type": "function", **TOOL["function"]}],
    [{"type": "function", "function": json.dumps(TOOL["function"])}],
    [{"name": "weather", "parameters": json.dumps(TOOL["function"]["parameters"])}],
    [{"name": "weather", "input_schema": TOOL["function"]["parameters"]}],  # Anthropic
    [{"type": "function",
      "function": {"name": "weather", "parameters": {"type": "object", "properties": {}, "x": None}}}],
], ids=str)
def test_tools_are_decoded(tools):
    """As a list or as JSON, in OpenAI's form or in LLaMA-Factory's, without Arrow's nulls."""
    assert read_row({"messages": [Q, A], "tools": tools}, "here").tools == [TOOL]
    for name in ("functions", "available_tools", "tools_json"):
        assert read_row({"prompt": "q", "response": "a", name: tools}, "here").tools == [TOOL]


def test_a_tool_without_parameters_gets_the_form_too():
    """What no trainer writes is left to the template."""
    tools = [{"name": "f", "description": "d"}, {"name": "g"}, {"type": "code"}]
    assert read_row({"messages": [Q, A], "tools": tools}, "here").tools == [
        {"type": "function", "function": {"name": "f", "description": "d"}}, {"name": "g"}, {"type": "code"}]


def test_a_tool_with_two_schemas():
    """An empty one is absent; two that differ are an error."""
    schema = TOOL["function"]["parameters"]
    for parameters in ({}, "", schema):
        tools = [{"name": "weather", "parameters": parameters, "input_schema": schema}]
        assert read_row({"messages": [Q, A], "tools": tools}, "here").tools == [TOOL]
    tools = [{"name": "weather", "parameters": {"type": "object"}, "input_schema": schema}]
    assert '"parameters" and "input_schema" of a tool differ' in refusal({"messages": [Q, A], "tools": tools})


@pytest.mark.parametrize("tools", [None, "", " ", "[]", "null", []], ids=str)
def test_no_tools(tools):
    assert read_row({"messages": [Q, A], "tools": tools}, "here").tools is None


@pytest.mark.parametrize("calls", [
    {"tool_calls": [CALL]}, {"tool_calls": json.dumps([CALL])}, {"tool_calls": CALL},
    {"tool_calls": [json.dumps(CALL)]},
    {"tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": '{"town": "Graz"}'}}]},
    {"tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"town": "Graz", "zone": None}},
                     "id": None}]},
    {"function_call": {"name": "weather", "arguments": '{"town": "Graz"}'}},
    {"tool_calls": [CALL["function"]]}, {"tool_calls": [{"name": "weather", "parameters": {"town": "Graz"}}]},
    {"tool_calls": [{"type": "function", "function": {"name": "weather", "args": '{"town": "Graz"}'}}]},
    {"tool_calls": [{"type": "function", "function": json.dumps(CALL["function"])}]}, {"tool_call": CALL["function"]},
    {"tool_calls": [{**CALL["function"], "arguments": json.dumps(json.dumps({"town": "Graz"}))}]}], ids=str)
def test_calls_are_decoded(calls):
    """Templates read arguments as objects; OpenAI and data sets of Arrow have them as texts."""
    for content in ("", None):
        row = {"messages": [Q, {"role": "assistant", "content": content, **calls},
                            {"role": "tool", "content": "grey"}, A]}
        assert read_row(row, "here").messages[1] == {
            "role": "assistant", "content": "", "tool_calls": [CALL], "weight": 1.0}


def test_a_call_keeps_its_id_and_gets_arguments():
    """As templates read it: {"id", "function": {"name", "arguments"}}."""
    for call, expected in (
            ({"name": "f", "id": "1", "arguments": ""},
             {"type": "function", "id": "1", "function": {"name": "f", "arguments": {}}}),
            ({"function": {"name": "f"}}, {"function": {"name": "f", "arguments": {}}}),
            ({"name": "f"}, {"name": "f"})):
        message = read_row({"messages": [Q, {"role": "assistant", "tool_calls": [call]}]}, "here").messages[1]
        assert message["tool_calls"] == [expected]


def test_arguments_keep_their_nulls_in_json():
    """A null in the JSON text of arguments is no null of Arrow."""
    call = {"function": {"name": "f", "arguments": '{"unit": null}'}}
    message = read_row({"messages": [Q, {"role": "assistant", "tool_calls": [call]}]}, "here").messages[1]
    assert message["tool_calls"] == [{"function": {"name": "f", "arguments": {"unit": None}}}]


@pytest.mark.parametrize("role", ["function_call", "tool_call", "Function_Call", "tool_calls", "function-call"])
@pytest.mark.parametrize("content", ['{"name": "weather", "arguments": {"town": "Graz"}}',
                                     '[{"name": "weather", "arguments": "{\\"town\\": \\"Graz\\"}"}]',
                                     {"name": "weather", "arguments": {"town": "Graz"}}], ids=str)
def test_a_function_call_is_an_answer_with_calls(role, content):
    """LLaMA-Factory's and ms-swift's form."""
    rows = [{"conversations": [{"from": "human", "value": "q"}, {"from": role, "value": content},
                               {"from": "observation", "value": "grey"}, {"from": "gpt", "value": "a"}]},
            {"messages": [Q, {"role": role, "content": content}, {"role": "tool_response", "content": "grey"}, A]}]
    for row in rows:
        read = read_row(row, "here").messages
        assert [m["role"] for m in read] == ["user", "assistant", "tool", "assistant"]
        assert read[1] == {"role": "assistant", "content": "", "tool_calls": [CALL], "weight": 1.0}


def test_calls_in_a_row_are_one_message():
    """ms-swift writes calls in parallel as messages of their own, and the text before them, too."""
    call = {"role": "tool_call", "content": '{"name": "weather", "arguments": {"town": "Graz"}}'}
    read = read_row({"messages": [Q, {"role": "assistant", "content": "Let me see."}, call, call, A]}, "here").messages
    assert read[1] == {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL, CALL], "weight": 1.0}
    assert len(read) == 3
    apart = read_row({"messages": [Q, {**A, "loss": False}, call]}, "here").messages
    assert [m["weight"] for m in apart] == [1.0, 0.0, 1.0]
    thought = {"role": "tool_call", "content": "<think>\nhm\n</think>\n" + call["content"]}
    assert read_row({"messages": [Q, thought]}, "here").messages[1]["content"] == "<think>\nhm\n</think>"


@pytest.mark.parametrize("row", [
    {"messages": [Q, {**A, "reasoning_content": "hm"}]}, {"messages": [Q, {**A, "thinking": "hm", "reasoning": None}]},
    {"messages": [Q, {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"},
                                                       {"type": "text", "text": "a"}]}]},
    {"prompt": "q", "response": "a", "reasoning_content": "hm"},
    {"Question": "q", "Complex_CoT": "hm", "Response": "a"}, {"messages": [Q, {**A, "thought": "hm"}]},
    {"messages": [Q, {**A, "thinking": "hm", "reasoning": "hm "}]},
], ids=str)
def test_reasoning(row):
    message = read_row(row, "here").messages[1]
    assert (message["content"], message["reasoning_content"], message["thinking"]) == ("a", "hm", "hm")


BLOCK = "<think>\nhm\n</think>\n\na"
THOUGHT = {"type": "thinking", "thinking": "hm"}
KEYS_OF_REASONING = "reasoning_content", "thinking", "reasoning", "thought", "cot"


def parts(*thoughts, text="a", **more):
    """An answer of thinking parts and a text."""
    return {"role": "assistant", "content": [*thoughts, {"type": "text", "text": text}], **more}


@pytest.mark.parametrize("message", [
    *({**A, a: empty, b: "hm"} for a in KEYS_OF_REASONING for b in KEYS_OF_REASONING if a != b
      for empty in ("", " \n", [])),
    *({**A, a: "hm", b: "h m\n"} for a, b in zip(KEYS_OF_REASONING, KEYS_OF_REASONING[1:])),
    {**A, "Thinking": "", "thinking": "hm"}, {**A, "Thinking": "hm", "thinking": ""},
    parts(THOUGHT, reasoning_content="hm "), parts(THOUGHT, thinking=""), parts(reasoning="hm"),
    parts({**THOUGHT, "thinking": ""}, thinking="hm"), parts({**THOUGHT, "reasoning": "hm"}),
    parts({**THOUGHT, "text": "", "thinking": "", "reasoning": "hm"}), parts({"type": "reasoning", "text": "hm"}),
    {**A, "content": "<think></think>a", "reasoning": "hm"}, {**A, "content": "<think>\n\n</think>\n\na", "cot": "hm"},
    parts(THOUGHT, text="<think> </think>a"), {**A, "content": "</think>a", "thinking": "hm"},
], ids=str)
def test_reasoning_that_is_said_twice_is_one(message):
    """An empty one is absent, in a key, in a part and in the text; white space may differ."""
    read = read_row({"messages": [Q, message]}, "here")
    assert read.messages[1]["content"] == "a" and not read.unused
    assert {squeezed(read.messages[1][key]) for key in ("reasoning_content", "thinking")} == {"hm"}


def squeezed(text):
    return "".join(text.split())


@pytest.mark.parametrize("content", [
    BLOCK, "<think>hm</think>a", "hm</think>a", "<thinking>hm</thinking>a", "<THINK>h m</THINK>a", "[THINK]hm[/THINK]a",
    " <reasoning>hm</reasoning>a"])
def test_reasoning_in_a_key_and_in_the_text_is_read_as_the_text_alone(content):
    """Templates write the key before the text, so a row with both would have its reasoning twice."""
    alone = read_row({"messages": [Q, {**A, "content": content}]}, "here")
    for row in ({"messages": [Q, {**A, "content": content, "reasoning_content": "hm", "thinking": " hm"}]},
                {"messages": [Q, parts(THOUGHT, text=content)]},
                {"prompt": "q", "response": content, "reasoning": "hm"},
                {"Question": "q", "Complex_CoT": "hm", "Response": content},
                {"prompt": "q", "response": content, "reasoning": "on", "cot": "hm", "thinking": "h m"}):
        read = read_row(row, "here")
        assert read.messages == alone.messages and read.unused in ((), ("reasoning",))


@pytest.mark.parametrize("message, say", [
    *(({**A, a: "R1", b: "R2"}, rf'reasonings; remove one: "{a}": "R1", "{b}": "R2"')
      for a, b in zip(KEYS_OF_REASONING, KEYS_OF_REASONING[1:])),
    ({**A, "content": BLOCK, "reasoning_content": "R1"},
     '"reasoning_content": "R1", "the beginning of the content": ".nhm.n"'),
    ({**A, "content": "<thinking>R2</thinking>a", "thinking": "R1"}, '"thinking": "R1", "the beginning'),
    ({**A, "content": "R2</think>a", "thinking": "R1"}, '"thinking": "R1", "the beginning of the content": "R2"'),
    (parts(THOUGHT, cot="R1"), '"cot": "R1", "a part of the content": "hm"'),
    (parts(THOUGHT, text="<think>R2</think>a"), '"a part of the content": "hm", "the beginning'),
    (parts({**THOUGHT, "reasoning": "R2"}), '"thinking": "hm", "reasoning": "R2"'),
    (parts({**THOUGHT, "text": "R2"}), '"thinking": "hm", "text": "R2"'),
    ({"role": "assistant", "content": [{"type": "text", "text": "a"}, THOUGHT]}, "reasoning behind a text"),
    ({"role": "function_call", "content": '<think>R2</think>{"name": "f"}', "thinking": "R1"}, '"thinking": "R1"'),
], ids=str)
def test_reasonings_that_differ_are_an_error(message, say):
    assert re.search(say, refusal({"messages": [Q, message]}))


def test_columns_with_other_reasoning_are_an_error():
    say = refusal({"prompt": "q", "response": "a", "reasoning": "R1", "Complex_CoT": "R2"})
    assert '"reasoning": "R1", "Complex_CoT": "R2"' in say
    assert '"reasoning_content": "R1", "the ' in refusal({"prompt": "q", "response": BLOCK, "thinking": "R1"})


@pytest.mark.parametrize("role", ["user", "system", "tool", "human"])
def test_reasoning_of_another_message_than_an_answer_is_listed(role):
    """It would reach no template. An empty one is absent."""
    name = "user" if role == "human" else role
    for key in KEYS_OF_REASONING:
        read = read_row({"messages": [{"role": role, "content": "x", key: "R1"}, Q, A]}, "here")
        assert read.messages[0] == {"role": name, "content": "x", "weight": 1.0}
        assert read.unused == (f"messages.{key} of {name}",)
    said_in_part = {"role": role, "content": [THOUGHT, {"type": "text", "text": "x"}], "thinking": ""}
    read = read_row({"messages": [said_in_part, Q, A]}, "here")
    assert read.messages[0] == {"role": name, "content": "x", "weight": 1.0}
    assert read.unused == (f"messages.content.thinking of {name}",)


def test_a_call_with_reasoning_of_its_own_is_a_message_of_its_own():
    """Joined with the answer before, its reasoning would be lost."""
    call = {"role": "tool_call", "content": '{"name": "weather", "arguments": {"town": "Graz"}}', "thinking": "R1"}
    read = read_row({"messages": [Q, A, call]}, "here").messages
    assert [m.get("reasoning_content") for m in read] == [None, None, "R1"] and read[2]["tool_calls"] == [CALL]
    thought = {"role": "tool_call", "content": "<think>R2</think>" + call["content"]}
    read = read_row({"messages": [Q, A, thought]}, "here").messages
    assert [m["content"] for m in read] == ["q", "a", "<think>R2</think>"]


def test_unknown_keys_of_parts_are_listed():
    read = read_row({"messages": [Q, parts({**THOUGHT, "signature": "x", "id": ""}, text="a")]}, "here")
    assert read.unused == ("messages.content.signature",) and read.messages[1]["thinking"] == "hm"


@pytest.mark.parametrize("part, say", [
    *((({**THOUGHT, mark: value}, {"text": "a"}), f'"{mark}" of a part of a content; marks are for whole')
      for mark, value in (("train", False), ("weight", 0), ("Masked", True), ("ignore_loss", True))),
    (({"text": "Q1", "content": "Q2"},), "a part of a content has two different texts"),
    (({"type": "text", "value": "Q1", "text": "Q2"},), "two different texts"),
    (({"text": "a", "image": "x.jpg"},), '"image" of a part of a content: text training'),
    (({**THOUGHT, "image": "x.jpg"}, {"text": "a"}), '"image" of a part of a content: text training'),
], ids=str)
def test_parts_that_are_refused(part, say):
    assert say in refusal({"messages": [Q, {"role": "assistant", "content": list(part)}]})


@pytest.mark.parametrize("message", [
    {"role": "assistant", "content": [{"text": "a", "content": "", "value": "a", "train": ""}]},
    {"role": "assistant", "content": [{"text": "", "content": "a", "value": []}]},
    {"role": "assistant", "content": "", "value": "a"}, {"role": "assistant", "Content": "", "content": "a"},
], ids=str)
def test_an_empty_text_beside_another_is_absent(message):
    assert said({"messages": [Q, message]}) == [("user", "q"), ("assistant", "a")]


EMPTY_CALLS = [[], "", "[]", "null", {}, None, {"name": "", "arguments": ""}]


@pytest.mark.parametrize("calls", [
    *({**dict.fromkeys(("tool_calls", "tool_call", "function_call"), empty), key: CALL} for empty in EMPTY_CALLS
      for key in ("tool_calls", "tool_call", "function_call")),
    {"tool_calls": [CALL], "function_call": CALL["function"]},
    {"tool_calls": [CALL], "tool_call": json.dumps(CALL)}], ids=str)
def test_calls_in_several_keys_are_one(calls):
    message = read_row({"messages": [Q, {"role": "assistant", "content": "", **calls}]}, "here").messages[1]
    assert message == {"role": "assistant", "content": "", "tool_calls": [CALL], "weight": 1.0}


def test_an_empty_call_beside_an_answer_is_absent():
    for empty in EMPTY_CALLS:
        for key in ("tool_calls", "tool_call", "function_call"):
            assert "tool_calls" not in read_row(answers({key: empty}), "here").messages[1]


@pytest.mark.parametrize("call", [
    {"name": "f", "arguments": {}, "input": {"b": 2}}, {"name": "f", "arguments": "{}", "parameters": {"b": 2}},
    {"name": "f", "args": {"b": 2}, "input": {"b": 2}}, {"name": "f", "Arguments": {"b": 2}},
    {"function": {"name": "f", "arguments": {}}, "arguments": {"b": 2}}, {"function": {"name": "f"}, "input": '{"b": 2}'},
    {"name": "f", "function": {"name": "f", "arguments": []}, "args": {"b": 2}}], ids=str)
def test_empty_arguments_of_a_call_are_absent(call):
    read = read_row(answers({"tool_calls": [call]}), "here")
    assert read.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"b": 2}} and not read.unused


@pytest.mark.parametrize("marks, say", [
    ({"tool_calls": [CALL], "tool_call": {"name": "g"}}, '"tool_calls", "tool_call" of a message have different calls'),
    ({"tool_calls": [CALL], "function_call": {"name": "weather", "arguments": "{}"}}, "different calls"),
    *(({"role": "function_call", "content": '{"name": "f"}', key: [CALL]}, "has other calls in a key of its own")
      for key in ("tool_calls", "tool_call", "function_call")),
    *(({"tool_calls": [{"name": "f", a: {"x": 1}, b: {"b": 2}}]}, f'call of f are given twice: {{"x": 1}}, and "{b}"')
      for a, b in (("arguments", "input"), ("parameters", "args"), ("input", "parameters"))),
    ({"tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}, "input": {"b": 2}}]}, "given twice"),
    ({"tool_calls": [{"function": {"name": "f"}, "name": "g"}]}, "a call has two different names"),
    ({"tool_calls": [{**CALL, "train": False}]}, '"train" of a call; marks are for whole messages'),
], ids=str)
def test_calls_that_differ_are_an_error(marks, say):
    assert say in refusal(answers(marks))


def test_unknown_keys_of_calls_are_listed():
    """They reach the template, which may not write them."""
    for call in ({"name": "f", "arguments": {}, "result": "grey", "id": "1", "x": None}, {"name": "f", "result": "grey"},
                 {"function": {"name": "f", "arguments": {}, "result": "grey"}, "type": "function", "id": "1"},
                 {"function": {"name": "f", "arguments": {}}, "result": "grey"}):
        assert read_row(answers({"tool_calls": [call]}), "here").unused == ("messages.tool_calls.result",)
        assert read_row({"messages": [Q, {"role": "tool_call", "content": json.dumps(call)}]}, "here").unused == (
            "messages.tool_calls.result",)


@pytest.mark.parametrize("name, value, dropped", [
    ("train", 0.0, "train is false"), ("trainable", 0.0, "trainable is false"), ("masked", 1.0, "masked is true"),
    ("Train", "0.0", "Train is false"), ("kto_tag", 0.0, "kto_tag is false"), ("train", 1.0, None),
    ("masked", 0.0, None)])
def test_a_flag_of_a_row_may_be_a_float(name, value, dropped):
    """pandas writes the booleans of a column with gaps as 0.0 and 1.0. A loss of 0.0 is a score."""
    read = read_row({"prompt": "q", "response": "a", name: value}, "here")
    assert read.dropped == dropped and not read.unused
    read = read_row({"prompt": "q", "response": "a", "Loss": value, "train": 0.5}, "here")
    assert read.dropped is None and read.unused == ("Loss", "train")


@pytest.mark.parametrize("value", ["on", "Off", "low", True, ["x"]], ids=str)
def test_a_column_that_says_whether_there_is_reasoning_is_none(value):
    """Nemotron's data have "reasoning": "on"."""
    read = read_row({"input": [Q], "output": "a", "reasoning": value}, "here")
    assert "reasoning_content" not in read.messages[1] and read.unused == ("reasoning",)


@pytest.mark.parametrize("columns, expected", [
    ({"chat_template_kwargs": {"enable_thinking": False}}, {"enable_thinking": False}),
    ({"chat_template_kwargs": '{"enable_thinking": false, "x": 1}'}, {"enable_thinking": False, "x": 1}),
    ({"enable_thinking": True, "reasoning_effort": "low"}, {"enable_thinking": True, "reasoning_effort": "low"}),
    ({"chat_template_kwargs": {"x": None}, "enable_thinking": None}, {}), ({}, {}),
    *(({"enable_thinking": value}, {"enable_thinking": False}) for value in ("false", "False ", 0, "0", 0.0)),
    *(({"chat_template_kwargs": {"preserve_thinking": value}}, {"preserve_thinking": True}) for value in ("true", 1)),
    ({"chat_template_kwargs": '{"enable_thinking": "false"}', "Enable Thinking": 0}, {"enable_thinking": False}),
    ({"enable_thinking": "", "chat_template_kwargs": {"enable_thinking": "null"}}, {})], ids=str)
def test_variables_of_the_template(columns, expected):
    assert read_row({"messages": [Q, A], **columns}, "here").template_kwargs == expected


# ---- texts and tokens ---------------------------------------------------------------------------------------------


def test_plain_text():
    read = read_row({"text": "Once upon\n", "url": "x", "label": False, "messages": None}, "here")
    assert read == formats.Row(text="Once upon\n", unused=("url", "label"))
    assert read_row({"text": "x", "prompt": "q", "response": "a"}, "here").unused == ("text",)


@pytest.mark.parametrize("columns, expected", [
    ({}, [1.0, 1.0, 1.0]), ({"labels": [-100, 8, 9]}, [0.0, 1.0, 1.0]), ({"labels": [-1, -1, 9]}, [0.0, 0.0, 1.0]),
    ({"loss_mask": [0, 1, 0]}, [0.0, 1.0, 0.0]), ({"completion_mask": [0, 0.5, 2]}, [0.0, 0.5, 2.0]),
    ({"assistant_masks": [False, True, True]}, [0.0, 1.0, 1.0]), ({"labels": [-100, 8, 9], "loss_mask": [1, 1, 0]},
                                                                  [0.0, 1.0, 0.0]),
    ({"seq_lengths": [3], "cu_seqlens": [0, 3]}, [1.0, 1.0, 1.0]),
    ({"attention_mask": [1, 1, 1], "position_ids": [0, 1, 2], "token_type_ids": None}, [1.0, 1.0, 1.0]),
    ({"labels": None, "weight": 2}, [2.0, 2.0, 2.0]), ({"labels": [-100, 8, 9], "text": "x", "documents": ["x"]},
                                                       [0.0, 1.0, 1.0])], ids=str)
def test_rows_of_tokens(columns, expected):
    read = read_row({"input_ids": [7, 8, 9], **columns}, "here")
    assert read.tokens == ([7, 8, 9], expected) and read.messages is read.text is None
    assert read.unused == tuple(name for name in ("text", "documents") if name in columns)


@pytest.mark.parametrize("columns, say", [
    ({"labels": [8, 9, -100]}, '"labels" is 8 at 0, where input_ids is 7; .* not shifted, or -100'),
    ({"labels": [-100, 8]}, '"labels" must have a number for each of the 3 input_ids'),
    ({"loss_mask": "011"}, '"loss_mask" must have a number for each'),
    ({"loss_mask": [0, -1, 1]}, "at least 0, it has -1"),
    ({"loss_mask": [0, float("nan"), 1]}, "must have a number for each"),
    ({"attention_mask": [1, 1, 0]}, "remove the padding"),
    ({"seq_lengths": [1, 2]}, '"seq_lengths" has several documents; write each as a row'),
    ({"cu_seqlens": [0, 1, 3]}, '"cu_seqlens" has several documents'),
    ({"position_ids": [0, 1, 0]}, "packed documents as rows of their own"), ({"pixel_values": [1.5]}, "text training"),
    ({"prompt_mask": [1, 0, 0]}, "it is not known"), ({"input_ids": [[7], [8]]}, "must be a list of token ids"),
    ({"input_ids": [7, -1]}, "must be a list of token ids"), ({"input_ids": "7 8"}, "must be a list of token ids"),
    ({"input_ids": [True, 1]}, "must be a list of token ids")], ids=str)
def test_wrong_rows_of_tokens(columns, say):
    assert re.search(say, refusal({"input_ids": [7, 8, 9], **columns}))


# ---- columns that are not used ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["nan", "NaN", "null", "None", "<noinput>"])
def test_an_input_that_says_that_there_is_none_is_not_used(value):
    read = read_row({"instruction": "i", "input": value, "output": "o"}, "here")
    assert read.messages[0]["content"] == "i" and read.unused == ("input",)


@pytest.mark.parametrize("row, unused", [
    ({"prompt": "q", "response": "a", "id": 1, "source": "web", "lang": None, "tags": []}, ("id", "source")),
    ({"messages": [{**Q, "id": 1}, {**A, "rating": 5, "html": ""}], "score": 0.5},
     ("score", "messages.id", "messages.rating")),
    ({"prompt": "q", "response": "a", "loss": 0.7, "avg_weight": 3, "split": "train", "label_name": "x"},
     ("loss", "avg_weight", "split", "label_name")),
    ({"messages": [Q, A], "problem": "p", "solution": "s", "answer": "42"}, ("problem", "solution", "answer")),
    ({"messages": [Q, A], "prompt": "q", "prompt_id": "x"}, ("prompt", "prompt_id")),
    ({"question": "q", "response": "a", "meta": {"question": "x"}}, ("meta",)),
    ({"question": "red or blue?", "choices": {"text": ["red", "blue"], "label": ["A", "B"]}, "answer": "red"},
     ("choices",)),
    ({"question": "红还是蓝", "options": ["红", "蓝"], "response": "红"}, ("options",)),
    ({"question": "q", "response": "a", "A": "x"}, ("A",))], ids=str)
def test_columns_that_are_not_used_are_listed(row, unused):
    assert len(read_row(row, "here").messages) == 2 and read_row(row, "here").unused == unused


def test_the_ledger_lists_unused_columns_once(tmp_path):
    rows = [{"prompt": "q", "response": "a", "id": i, "source": "web"} for i in range(3)] + [
        {"messages": [Q, {**A, "rating": 5}], "id": 3}, {"prompt": "q", "response": "a", "label": False, "url": "x"}]
    ledger = data.load(write(tmp_path / "rows.json", rows), tiny, 100, cache_dir=str(tmp_path / "cache")).ledger
    assert ledger.lines()[3:] == ("columns not used: id, messages.rating, url",)  # losses by source use `source`
    assert ledger.unused == {"id": 4, "messages.rating": 1, "url": 1}
    assert data.load(f"web={tmp_path / 'rows.json'}", tiny, 100).ledger.unused["source"] == 3
    assert len(data.load(write(tmp_path / "b.json", [{"prompt": "q", "response": "a"}]), tiny, 100).ledger.lines()) == 3


@pytest.mark.parametrize("content", ["See <image> there", "<video> in HTML", "<images>", "a\n<audio src=x>\n"])
def test_tags_inside_a_text_are_text(content):
    assert said({"prompt": content, "response": "a"})[0] == ("user", content)


def test_a_role_that_is_not_known_is_listed():
    """The template may write it, or refuse it."""
    row = {"messages": [{"role": "critic", "content": "x"}, Q, {**A, "content": [{"text": "a", "annotations": [1]}]}]}
    read = read_row(row, "here")
    assert [m["role"] for m in read.messages] == ["critic", "user", "assistant"]
    assert read.unused == ("messages.role critic", "messages.content.annotations")


@pytest.mark.parametrize("role", ["tools", "users", "questioner", "ecosystem", "promoter", "bots", "Assistants", "user1"])
def test_a_role_that_is_another_word_reaches_the_template(role):
    read = read_row({"messages": [Q, {"role": role, "content": "x"}, A]}, "here")
    assert [m["role"] for m in read.messages] == ["user", role, "assistant"]


def test_unknown_keys_of_messages_reach_the_template():
    assert read_row({"messages": [{**Q, "mood": "calm"}, A]}, "here").messages[0]["mood"] == "calm"


# ---- refused ------------------------------------------------------------------------------------------------------

ALPACA = {"instruction": "i", "output": "a"}
PAIR = {"prompt": "q", "response": "a"}
BAD_ROWS = {
    "unknown shape": ({"q": "q", "r": "a"}, r"unrecognised columns 'q', 'r'; .*\"instruction\".*"
                                            "pass --prompt_key q --response_key r$"),
    "unknown shape of three": (
        {"id": 1, "data": {"q": "q", "a": "a"}}, "unrecognised columns 'id', 'data.q', 'data.a'; .*"
                               "--prompt_key COLUMN --response_key COLUMN$"),
    "columns without a name": ({"": {"": {}}, "x": {"": 1}}, "unrecognised columns '.', 'x.'; accepted"),
    "no keys": ({}, "no question and no answer; accepted"),
    "half a pair": ({"prompt": "q"}, 'no answer to "prompt"; accepted'),
    "a context alone": ({"input": "q"}, 'no answer to "input"; accepted'),
    "a system message alone": ({"system": "q"}, "no question and no answer; accepted"),
    "a misspelled answer": (
        {"instruction": "q", "ouput": "a", "id": "x"},
        "no answer to \"instruction\"; unrecognised columns 'ouput' \\(output\\?\\), 'id'; .*"
        "pass --prompt_key instruction --response_key ouput$"),
    "a misspelled question": (
        {"Qestion": "q", "answer": "a"}, "no question for \"answer\"; unrecognised columns 'Qestion' .question\\?.; .*"
        "pass --prompt_key Qestion --response_key answer$"),
    "both misspelled, behind others": (
        {**{f"meta {i}": i for i in range(17)}, "promt": "q", "respnse": "a"},
        "unrecognised columns 'promt' .prompt\\?., 'respnse' .response\\?., 'meta 0', .* and 11 more; accepted .*"
        "pass --prompt_key promt --response_key respnse$"),
    "misspelled messages": ({"mesages": [{"role": "user", "content": "q"}]}, "'mesages' .messages\\?.; accepted"),
    "an answer and an id": ({"id": "x", "answer": "a"}, "unrecognised columns 'id'; .* --response_key COLUMN$"),
    "half an Alpaca row": ({"instruction": "q", "input": ""}, 'no answer to "instruction"; .*--prompt_key COLUMN'),
    "a text": ("just text", "a row must be an object, not str"),
    "a number": (5, "a row must be an object, not int"),
    "null": (None, "a row must be an object, not NoneType"),
    "a list": (["q", "a"], "a row must be an object, not list"),
    "one message": (A, 'the row is a single message; a row is {"messages"'),
    "messages null": ({"messages": None}, "must be a non-empty list .* it is null"),
    "messages empty": ({"messages": []}, "must be a non-empty list"),
    "conversations empty": ({"conversations": []}, "must be a non-empty list"),
    "conversations empty, with system": ({"conversations": [], "system": "s"}, "must be a non-empty list"),
    "messages a text": ({"messages": "hello"}, 'must be a non-empty list .* it is "hello"'),
    "messages a torn list": ({"messages": '[{"role": "us'}, '"messages" is a text, but not the text of JSON '),
    "messages a number in a text": ({"messages": "5"}, 'must be a non-empty list .* it is "5"'),
    "messages an object": ({"messages": {"role": "user", "content": "q"}}, "must be a non-empty list"),
    "message a text": ({"messages": ["q", A]}, "message must be.*'q'"),
    "message null": ({"messages": [None, A]}, "message must be.*None"),
    "message without role": ({"messages": [{"content": "q"}, A]}, "message must be"),
    "message without content": (
        {"messages": [{"role": "user"}, A]}, "content of the user message must be a string.*null"),
    "answer without content": ({"messages": [Q, {"role": "assistant"}]}, "content.*must be a string.*null"),
    "content a boolean": (
        {"prompt": True, "response": "a"}, "content of the user message must be a string, it is true"),
    "content an object": ({"prompt": {"a": 1}, "response": "a"}, "content of the user message must be a string"),
    "contents that differ": ({"messages": [{**Q, "value": "other"}, A]}, "two different contents"),
    "answers": (
        {"prompt": "q", "response": ["a", "b"]}, "assistant message must be a string or a list of .*part is \"a\""),
    "response null": ({"prompt": "q", "response": None}, 'must be a string, it is null; .*"response"'),
    "response NaN": ({"prompt": "q", "response": float("nan")}, "must be a string, it is NaN"),
    "response infinite": ({"prompt": "q", "response": float("inf")}, "must be a string, it is Infinity"),
    "value missing": ({"conversations": [{"from": "human"}, {"from": "gpt", "value": "a"}]}, "must be a string"),
    "role null": ({"messages": [{"role": None, "content": "q"}, A]}, "a message must be"),
    "role a list": ({"messages": [{"role": ["user"], "content": "q"}, A]}, 'unknown "role"'),
    "roles that differ": (
        {"messages": [{"role": "user", "from": "gpt", "content": "q"}, A]}, 'unknown "role": .gpt, user'),
    "role misspelled": ({"messages": [Q, {"role": "Asistant", "content": "a"}, A]}, "unknown \"role\": 'asistant' .assistant\\?.; it must"),
    "from misspelled": ({"conversations": [{"from": "huma", "value": "q"}]}, "unknown \"from\": 'huma' .human\\?.; it must"),
    "from unknown": ({"conversations": [{"from": "bing", "value": "q"}]}, "unknown \"from\": 'bing'.*human.*gpt"),
    "empty answer": ({"prompt": "q", "response": ""}, "empty answer"),
    "blank answer": ({"messages": [Q, {"role": "assistant", "content": " \n\t"}]}, "empty answer"),
    "empty output": ({**ALPACA, "output": ""}, "empty answer"),
    "no assistant": ({"messages": [Q]}, "no assistant message"),
    "roles of one's own": ({"messages": [{"role": "client", "content": "q"}, {"role": "agent", "content": "a"}]},
                           'no assistant message.*; the roles are "client", "agent"$'),
    "messages under another name": ({"turns": chat("q", "a"), "id": 1}, "or pass --messages_key turns$"),
    "messages inside": ({"x": {"conv": chat("q", "a")}}, "or pass --messages_key x.conv$"),
    "only the prompt of verl": ({"prompt": [Q], "reward_model": {"ground_truth": "4"}}, 'no answer to "prompt"; .*'
                                "--prompt_key COLUMN --response_key COLUMN$"),
    "content under another key": ({"messages": [Q, {"role": "assistant", "message": "a"}]},
                                  'it is null; .* write the text as "content", not as "message"$'),
    "content null": ({"messages": [Q, {"role": "assistant", "content": None}]}, 'write the text as "content"$'),
    "a list of messages as Python writes it": ({"prompt": str([Q]), "completion": "a"}, "not the text of JSON"),
    "messages as texts": ({"messages": ["q", "a"]}, "a message must be"),
    "messages in messages": ({"messages": {"messages": chat("q", "a")}}, "must be a non-empty list"),
    "a mark of a part": ({"messages": [Q, {"role": "assistant", "content": [{"text": "a", "train": False}]}]},
                         '"train" of a part of a content; marks are for whole messages'),
    "a channel": (answers({"channel": "analysis"}), 'key "channel" of a message: only final may be trained'),
    "a recipient": (answers({"recipient": "functions.f"}), 'key "recipient" of a message: write a call as tool_calls'),
    "a part that is a call": ({"messages": [Q, {"role": "assistant", "content": [{"type": "tool_use", "name": "f"}]}]},
                              'a part is .*; write a call as "tool_calls"'),
    **{f"an unknown mark {name}": ({**PAIR, name: True}, f'column "{name}": its name says')
       for name in ("mask_history", "roles_to_train", "trainable_turns")},
    "a message that is excluded": (answers({"exclude": True}), 'key "exclude" of a message: it may say'),
    "the place of an image": ({"prompt": "<image>\nWhat?", "response": "a"}, "the place of an image"),
    "the place of an image at the end": ({"prompt": "What?<image>", "response": "a"}, "the place of an image"),
    "the place of a video": ({"messages": [{"role": "user", "content": "See\n<video>\nhere"}, A]}, "the place of an"),
    "kto_tag a word": ({**PAIR, "kto_tag": "bad"}, '"kto_tag" must be true or false, it is "bad"'),
    "Chosen": ({"question": "q", "Chosen": "a", "Rejected": "b"}, "pass --prompt_key question --response_key Chosen$"),
    "chosen answers to an input": ({"input": "q", "chosen": "a", "rejected": "b"}, "--prompt_key input --response_key"),
    "weight below 0": (answers({"weight": -1}), '"weight" must be a number of at least 0, it is -1'),
    "weight infinite": (answers({"weight": float("inf")}), "it is inf"),
    "weight NaN": (answers({"loss_weight": float("nan")}), "it is nan"),
    "weight a word": (answers({"weight": "heavy"}), '"weight" must be a number of at least 0, it is .heavy'),
    "keys that differ": ({"messages": [{"role": "user", "content": "q", "Content": "x"}, A]},
                         'two different values of "content"'),
    "flags of turns in a row": ({**PAIR, "loss": [False, True]}, 'column "loss" is a list; write "train" into each'),
    "a flag that is a word": ({**PAIR, "train": "No"}, 'column "train" must be true or false, it is "No"'),
    "weights of a row that differ": ({**PAIR, "weight": "1", "loss_weight": 2}, '"weight", "loss_weight" differ'),
    "weights of turns in a row": ({**PAIR, "weights": [0, 1]}, 'column "weights": its name says'),
    "weights whose product is 0": ({**answers({"weight": 1e-200}), "weight": 1e-200},
                                   "the weight 1e-200 of the row times 1e-200 in it is 0; write weights nearer to 1"),
    "weights whose product is infinite": ({**answers({"weight": "1e200"}), "weight": 1e200}, "in it is inf"),
    "weights of tokens whose product is 0": (
        {"input_ids": [7, 8], "loss_mask": [0, 1e-200], "weight": 1e-200}, "in it is 0"),
    "train a word": (answers({"train": "no"}), "\"train\" must be true or false.*'no'"),
    "loss a number": (answers({"loss": 0.5}), '"loss" must be true or false.*"weight" may be a number'),
    "train a list": (answers({"train": []}), "\"train\" must be true or false"),
    "marks that contradict": (answers({"train": True, "masked": True}), '"train", "masked" .* contradict'),
    "weights that contradict": (answers({"weight": 1, "loss_weight": 0.5}), "contradict"),
    "an unknown mark": (answers({"ignore_loss": True}), 'key "ignore_loss" of a message: it may say what is trained'),
    "a label of a turn": (answers({"label": False}), 'key "label" of a message'),
    "parts of a turn": (answers({"train_detail": [{"begin_offset": 0}]}), "not supported, see docs/data.md"),
    "weight of a row": ({**PAIR, "weight": "70 kg"}, '"weight" must be a number .* rename the column'),
    "an unknown mask": ({**PAIR, "token_mask": [0, 1]}, 'column "token_mask": its name says that it changes what is'),
    "a mask without tokens": ({**PAIR, "loss_mask": [0, 1]}, 'no "input_ids"'),
    "train_on_inputs": ({**PAIR, "train_on_inputs": True}, 'column "train_on_inputs": it is not supported'),
    "segments": ({"segments": [{"label": True, "text": "x"}]}, 'column "segments"'),
    **{f"column {name}": ({**PAIR, name: value}, f'no prompt has the text of column "{name}"') for name, value in (
        ("documents", ["x"]), ("choices", ["3", "4"]), ("options", {"A": "red", "B": "a"}), ("option_a", "red"),
        ("candidates", ["3"]), ("opb", "red"), ("Article", "Once."), ("choice1", "red"),
        ("choices", {"text": ["red", "blue"], "label": ["A", "B"]}))},
    "choices that only the answer has": ({**PAIR, "choices": ["a"]}, 'column "choices", ."a".; write it into the'),
    "choices that are a part of another word": ({"prompt": "34?", "response": "a", "choices": ["3", "4"]}, '"choices"'),
    "choices in columns": ({"question": "q", "A": "red", "B": "blue", "answer": "A"},
                           'text of column "A", "red"; .* pass --prompt_key question --response_key answer$'),
    "choices beside messages": ({**answers({}), "options": ["red"]}, 'column "options"'),
    "system that differs": ({"messages": chat("q", "a", system="s"), "system": "t"}, '"system" differs from the first'),
    "systems that differ": (
        {**PAIR, "system": "s", "system_prompt": "t"}, 'the columns "system", "system_prompt" differ'),
    "system an object": ({**PAIR, "system": {"a": 1}}, "content of the system message must be a string"),
    "instruction null": ({**ALPACA, "instruction": None}, "user message must be a string, it is null"),
    "input a list": ({**ALPACA, "input": ["x"]}, "user message must be a string"),
    "history a text": ({**ALPACA, "history": "abc"}, '"history" is a text'),
    "history a number": ({**ALPACA, "history": 5}, "history"),
    "history of numbers": ({**ALPACA, "history": [5]}, "history"),
    "history of texts": ({**ALPACA, "history": ["ab"]}, "history"),
    "history of objects": ({**ALPACA, "history": [{"q": "x", "a": "y"}]}, "history"),
    "history without an answer": ({**ALPACA, "history": [["q"]]}, "history"),
    "history of three": ({**ALPACA, "history": [["q", "a", "r"]]}, "history"),
    "history with an empty answer": ({**ALPACA, "history": [["q", ""]]}, "empty answer"),
    "history beside messages": ({**answers({}), "history": [["x", "y"]]}, 'column "history" beside "messages"'),
    "context beside messages": ({**answers({}), "context": "other"}, 'no message has the text of column "context"'),
    "context beside a prompt of messages": ({"prompt": [Q], "completion": "a", "context": "other"}, "no message has"),
    "messages and another pair": ({**answers({}), "prompt": "P", "response": "R"},
                                  '"response" has an answer that the messages in "messages" do not have; remove'),
    "messages and Alpaca": ({**answers({}), "instruction": "P", "output": "R"},
                            "or pass --prompt_key instruction --response_key output"),
    "messages and their answer": (
        {"messages": [Q], "response": "a"}, "pass --prompt_key messages --response_key response"),
    "two lists": ({"messages": chat("q", "a"), "conversations": chat("q", "b")}, "--messages_key conversations"),
    "two questions": ({"prompt": "x", "question": "y", "response": "a"},
                      '"prompt", "question", "response" may all be .* pass --prompt_key COLUMN --response_key COLUMN'),
    "two answers": ({"question": "q", "solution": "x", "answer": "y"}, '"question", "solution", "answer" may all be'),
    "two pairs": ({**PAIR, **ALPACA, "output": "b"}, '"prompt", "instruction", "response", "output" may all be'),
    "chosen": ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preferences; .* pass --response_key chosen$"),
    "chosen conversations": ({"prompt": "q", "chosen": chat("q", "a"), "rejected": chat("q", "b")},
                             "pass --messages_key chosen$"),
    "chosen of Alpaca": ({"instruction": "q", "chosen": "a", "rejected": "b"},
                         "pass --prompt_key instruction --response_key chosen$"),
    "OpenAI's preferences": ({"input": {"messages": [Q]}, "preferred_output": [A], "non_preferred_output": [A]},
                             "pass --prompt_key input.messages --response_key preferred_output$"),
    "rejected_response": ({**answers({}), "rejected_response": "b"}, '"rejected_response": .*remove the column$'),
    "messages that are not the chosen": (
        {**answers({}), "chosen": chat("q", "b"), "rejected": chat("q", "c")}, "chosen$"),
    **{f"column {name}": ({**answers({}), name: ["x.jpg"]}, f'column "{name}": text training can\'t use it')
       for name in ("image", "images", "videos", "audio", "audios", "image_path", "image_urls", "Images",
                    "video_file", "img", "img_path", "screenshot", "jpg", "audio_base64")},
    "an image in a message": (
        {"messages": [{**Q, "images": ["x.jpg"]}, A]}, 'key "images" of a message: text training'),
    "a part that is an image": ({"messages": [{"role": "user", "content": [
        {"type": "text", "text": "q"}, {"type": "image_url", "image_url": {"url": "x"}}]}, A]},
        "part is .*image_url.*text training"),
    "parts without text": ({"messages": [{"role": "user", "content": []}, A]}, r"must be a string, it is \[\]"),
    "tools a word": ({**answers({}), "tools": "weather"}, '"tools" is a text, but not the text of JSON'),
    "tools an object": ({**answers({}), "tools": TOOL}, '"tools" must be a list of objects or its JSON'),
    "tools a number": ({**answers({}), "tools": 5}, '"tools" must be a list of objects'),
    "tools of words": ({**answers({}), "tools": "[5]"}, '"tools" must be a list of objects'),
    "tools in a message": ({"messages": [{**Q, "tools": [TOOL]}, A]}, 'key "tools" of a message: it is not supported'),
    "calls a number": (answers({"tool_calls": 5}), '"tool_calls" must be a list of objects'),
    "a call without a name": (answers({"tool_calls": [{}]}), '"tool_calls" must be a list of objects'),
    "calls a word": (answers({"tool_calls": "weather"}), '"tool_calls" is a text, but not the text of JSON'),
    "arguments a word": (answers({"tool_calls": [{"function": {"name": "f", "arguments": "Graz"}}]}),
                         "the arguments of the call of f is a text, but not the text of JSON"),
    "arguments a list": (answers({"tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}),
                         "the arguments of the call of f must be an object"),
    "calls of the user": ({"messages": [{**Q, "tool_calls": [CALL]}, A]}, "calls in a user message"),
    "a function_call that is no JSON": (
        {"messages": [Q, {"role": "tool_call", "content": "x"}]}, "not the text of JSON"),
    "a function_call without a call": ({"messages": [Q, {"role": "tool_call", "content": "[]"}]}, "without a call"),
    "reasoning a number": (answers({"reasoning_content": 5}), "reasoning of a message must be a string"),
    "kwargs a list": ({**answers({}), "chat_template_kwargs": [1]}, "must be an object"),
    "kwargs of the trainer": (
        {**answers({}), "chat_template_kwargs": {"tools": []}}, 'has "tools", which the trainer sets'),
    "thinking a word": ({**answers({}), "enable_thinking": "yes"}, '"enable_thinking" must be true or false, it is'),
    "thinking 2": ({**answers({}), "chat_template_kwargs": {"enable_thinking": 2}}, "must be true or false, it is 2"),
    "an effort that is a number": ({**answers({}), "reasoning_effort": 2}, '"reasoning_effort" must be a text'),
    "a variable that is the text of a flag": ({**answers({}), "chat_template_kwargs": {"x": "False"}},
                                              '"x" is the text "False", which templates take for true'),
    "thinking that differs": (
        {**answers({}), "enable_thinking": True, "chat_template_kwargs": {"enable_thinking": False}},
                              "may not differ"),
    "text and an answer": ({"text": "q", "answer": "a"}, "no question for .answer.; accepted"),
    "a text that is a list": ({"text": ["x"], "id": 1}, '"text" must be a text, it is ."x".'),
    "an empty text": ({"text": " "}, '"text" is empty; accepted'),
    "weight of a text": ({"text": "x", "weight": 2}, '"weight" of a plain text must be 1'),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named(name):
    """Any mistake in a row is an error with its place, the value, and the rule, on one line."""
    row, say = BAD_ROWS[name]
    text = refusal(row)
    assert re.search(say, text) and "\n" not in text and len(text) < 1000


@pytest.mark.parametrize("row",
                         [{"prompt": "cut emoji \ud83d", "response": "a"},
                          {"prompt": "q", "response": "cut emoji \ud83d"},
                                 5, {"prompt": "q", "response": ""}], ids=repr)
def test_the_error_has_file_and_index(row, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"prompt": "a", "response": "b"}, row]), encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(f"{path}[1]: ")):
        data.load(str(path), tiny, 100)


def test_nesting_too_deep_is_named():
    value = []
    for _ in range(5000):
        value = [value]
    assert "nested too deep" in refusal({"messages": [Q, {**A, "x": value}]})


def test_a_bug_is_not_reported_as_an_error_in_the_row(tmp_path, monkeypatch):
    """A plain ValueError in the reading of a row keeps its traceback; a UserError would hide it."""
    def broken(turn, role, message, columns):
        return int("x")

    monkeypatch.setattr(messages, "read_content", broken)
    with pytest.raises(ValueError, match="invalid literal for int") as info:
        data.load(write(tmp_path / "rows.json", [{"conversations": [{"from": "human", "value": "q"}]}]), tiny, 100)
    assert not isinstance(info.value, UserError) and info.traceback[-1].name == "broken"


def test_a_conversation_is_needed_for_prompts():
    with pytest.raises(UserError, match="here: a conversation is needed here, but it is a plain"):
        formats.to_messages({"text": "x"}, "here")
    with pytest.raises(UserError, match="but label is false"):
        formats.to_messages({**PAIR, "label": False}, "here")
    assert formats.to_messages(PAIR, "here") == [{**Q, "weight": 1.0}, {**A, "weight": 1.0}]


# ---- the tables ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table, found", [(keys.ROW_KEYS, keys.ROW), (keys.MESSAGE_KEYS, keys.MESSAGE)],
                         ids=["rows", "messages"])
def test_each_key_is_in_its_table_once(table, found):
    names = [name for key in table for name in key.names.split()]
    assert len(names) == len(set(names)) == len(found) and names == [name.lower() for name in names]
    assert all(key.meaning and key.writers for key in table)
