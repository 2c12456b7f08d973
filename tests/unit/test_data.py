"""Text to micro-batches: literal target ids, two independent oracles, a balanced ledger, and what bad input says."""

import dataclasses
import gzip
import io
import json
import os
import re
import subprocess
import sys
import tracemalloc
from collections import Counter
from itertools import groupby

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, processors
from transformers import AutoTokenizer

import data
from text import formats
from tools import show
from text.template import ChatTokenizer

TINY = os.path.join(ROOT, "models", "tiny")
EXAMPLES = [os.path.join(ROOT, "data", name) for name in (
    "example_sft.json", "example_alpaca.json", "example_conversations.json", "example_sharegpt.json", "example.jsonl")]
RAW = Tokenizer.from_file(os.path.join(TINY, "tokenizer.json"))
tiny = ChatTokenizer(TINY)
repeatable = settings(deadline=None, derandomize=True, database=None, max_examples=150)


def write(path, rows):
    """A JSON file of rows; its path as text."""
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return str(path)


def chat(*contents, system=None):
    """Messages: user, assistant, user, ..."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + turns


def runs(dataset, i=0, tokenizer=RAW):
    """Conversation i as (is a target, decoded text, token ids), one for each run of equal mask."""
    here = slice(dataset.starts[i], dataset.starts[i + 1])
    pairs = zip(dataset.is_target[here].tolist(), dataset.tokens[here].tolist(), strict=True)
    grouped = [(target, [token for _, token in group]) for target, group in groupby(pairs, key=lambda pair: pair[0])]
    return [(target, tokenizer.decode(ids, skip_special_tokens=False), ids) for target, ids in grouped]


def target_texts(dataset, i=0, tokenizer=RAW):
    return [text for target, text, _ in runs(dataset, i, tokenizer) if target]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """A file that every example of a property writes anew."""
    return tmp_path_factory.mktemp("scratch") / "rows.json"


# ---------------------------------------------------------------------------------------------------------------------
# the examples, literally

LITERAL = [
    ("example_sft.json", 0, [
        (False,
         "<|im_start|>user\nWhat is supervised fine-tuning?<|im_end|>\n<|im_start|>assistant\n",
         [1, 87, 85, 267, 201, 470, 312, 548, 1812, 1211, 1257, 33, 2, 201, 1, 361, 85, 283, 86, 935, 201]),
        (True,
         "Supervised fine-tuning continues the training of a pretrained language model on prompts paired"
         " with good responses, so that it learns to answer in that manner. The loss is usually computed"
         " on the response tokens only.<|im_end|>",
         [1009, 1812, 1211, 1257, 1786, 874, 268, 560, 335, 261, 929, 86, 396, 356, 1827, 544, 321, 302, 609, 747, 85,
          302, 1937, 70, 550, 808, 407, 977, 871, 14, 375, 411, 340, 461, 318, 492, 331, 1746, 330, 411, 286, 1142,
          267, 16, 774, 483, 312, 1168, 1042, 1252, 356, 321, 268, 1762, 991, 800, 16, 2]),
        (False, "\n", [201]),
    ]),
    ("example_sft.json", 5, [
        (False,
         "<|im_start|>user\n为什么要留出一部分数据做验证？<|im_end|>\n<|im_start|>assistant\n",
         [1, 87, 85, 267, 201, 834, 438, 992, 1604, 1262, 561, 589, 1264, 309, 2, 201, 1, 361, 85, 283, 86, 935, 201]),
        (True,
         "模型可能只是背下了训练数据。用它没见过的数据来测，才能看出它是否真的学会了，也便于挑选检查点。"
         "<|im_end|>",
         [542, 1164, 693, 322, 167, 228, 237, 531, 1670, 561, 273, 310, 405, 978, 1648, 805, 279, 561, 511, 1362, 236,
          366, 529, 498, 467, 426, 405, 1522, 1574, 279, 1176, 586, 1428, 1361, 126, 801, 884, 242, 967, 1256, 273, 2]),
        (False,
         "\n<|im_start|>user\n那留多少比较合适？<|im_end|>\n<|im_start|>assistant\n",
         [201, 1, 87, 85, 267, 201, 168, 227, 99, 992, 720, 1215, 1699, 309, 2, 201, 1, 361, 85, 283, 86, 935, 201]),
        (True,
         "数据有几千条时，留出百分之五到十就可以；数据很多时，固定留几百到一两千条也够用。<|im_end|>",
         [561, 414, 714, 1754, 387, 266, 992, 426, 1706, 1149, 360, 715, 413, 415, 901, 561, 509, 1588, 1095, 121,
          953, 992, 714, 726, 1551, 530, 1754, 506, 919, 310, 273, 2]),
        (False, "\n", [201]),
    ]),
    ("example_alpaca.json", 3, [
        (False,
         "<|im_start|>system\n你是一位讲课简明的老师。<|im_end|>\n<|im_start|>user\n用一句话解释什么是词"
         "元。<|im_end|>\n<|im_start|>assistant\n",
         [1, 85, 91, 473, 862, 201, 952, 1520, 810, 305, 113, 308, 125, 829, 1133, 279, 619, 226, 546, 233, 273, 2,
          201, 1, 87, 85, 267, 201, 310, 1139, 707, 1647, 374, 235, 442, 322, 308, 238, 710, 273, 2, 201, 1, 361, 85,
          283, 86, 935, 201]),
        (True,
         "词元是语言模型处理文本的基本单位，可能是一个字、一个词，也可能只是词的一部分。<|im_end|>",
         [308, 238, 710, 322, 708, 167, 104, 225, 542, 1480, 1231, 466, 799, 279, 164, 256, 121, 799, 1533, 810, 266,
          1164, 1520, 1586, 630, 306, 394, 308, 238, 1428, 1164, 693, 322, 308, 238, 279, 306, 1262, 273, 2]),
        (False, "\n", [201]),
    ]),
    ("example_alpaca.json", 4, [
        (False,
         "<|im_start|>user\nWhat does the // operator do in Python?<|im_end|>\n<|im_start|>assistant\n",
         [1, 87, 85, 267, 201, 470, 1603, 268, 223, 17, 17, 304, 1327, 272, 274, 425, 330, 1210, 33, 2, 201, 1, 361,
          85, 283, 86, 935, 201]),
        (True,
         "It is floor division: it divides two numbers and rounds the result down, so `7 // 2` is 3.<|im"
         "_end|>",
         [736, 312, 276, 78, 81, 274, 553, 1043, 378, 28, 340, 553, 88, 518, 269, 777, 1767, 303, 364, 289, 80, 564,
          268, 510, 1618, 1510, 14, 375, 680, 25, 223, 17, 17, 223, 20, 66, 312, 223, 21, 16, 2]),
        (False,
         "\n<|im_start|>user\nWhat does the following expression give, then?\n-7 // 2<|im_end|>\n<|im_st"
         "art|>assistant\n",
         [201, 1, 87, 85, 267, 201, 470, 1603, 268, 276, 744, 1021, 285, 384, 2025, 1435, 378, 343, 741, 14, 1104, 33,
          201, 15, 25, 223, 17, 17, 223, 20, 2, 201, 1, 361, 85, 283, 86, 935, 201]),
        (True,
         "It gives -4, which may surprise you: floor division rounds toward negative infinity rather tha"
         "n toward zero.<|im_end|>",
         [736, 1158, 456, 22, 14, 1696, 286, 446, 265, 432, 2025, 1471, 406, 28, 276, 78, 81, 274, 553, 1043, 378,
          364, 289, 80, 564, 259, 314, 318, 70, 537, 73, 1437, 330, 72, 263, 910, 364, 272, 684, 900, 259, 314, 318,
          70, 223, 1813, 16, 2]),
        (False, "\n", [201]),
    ]),
    ("example_conversations.json", 2, [
        (False,
         "<|im_start|>user\nWhat is 17 times 6?<|im_end|>\n<|im_start|>assistant\n17 times 6 is 112.<|im"
         "_end|>\n<|im_start|>user\nThat does not look right. Please check it.<|im_end|>\n<|im_start|>as"
         "sistant\n",
         [1, 87, 85, 267, 201, 470, 312, 223, 19, 25, 1778, 223, 24, 33, 2, 201, 1, 361, 85, 283, 86, 935, 201, 19,
          25, 1778, 223, 24, 312, 223, 19, 19, 20, 16, 2, 201, 1, 87, 85, 267, 201, 54, 327, 1603, 807, 1465, 1028,
          364, 447, 16, 624, 1837, 1117, 340, 16, 2, 201, 1, 361, 85, 283, 86, 935, 201]),
        (True,
         "You are right, I made a mistake. Ten sixes are 60 and seven sixes are 42, so 17 times 6 is 102"
         ".<|im_end|>",
         [1292, 683, 364, 447, 14, 370, 286, 430, 71, 261, 286, 283, 86, 1294, 16, 223, 54, 292, 265, 1313, 269, 683,
          223, 24, 18, 303, 1665, 265, 1313, 269, 683, 223, 22, 20, 14, 375, 223, 19, 25, 1778, 223, 24, 312, 223, 19,
          18, 20, 16, 2]),
        (False, "\n", [201]),
    ]),
    ("example_sharegpt.json", 1, [
        (False,
         "<|im_start|>system\n你是一位细心的中文编辑。<|im_end|>\n<|im_start|>user\n“通过这次活动，使我学"
         "到了很多。”这句话有什么毛病？<|im_end|>\n<|im_start|>assistant\n",
         [1, 85, 91, 473, 862, 201, 952, 1520, 810, 324, 231, 837, 279, 1175, 1694, 479, 242, 273, 2, 201, 1, 87, 85,
          267, 201, 385, 821, 805, 508, 543, 522, 1356, 104, 266, 351, 126, 487, 445, 360, 586, 509, 395, 909, 508,
          692, 707, 819, 453, 252, 166, 248, 230, 309, 2, 201, 1, 361, 85, 283, 86, 935, 201]),
        (True,
         "“通过”和“使”连用，句子没有了主语。删去其中一个就好，例如：“这次活动使我学到了很多。”<|im_end|>"
         "",
         [385, 821, 805, 386, 377, 385, 351, 126, 386, 1151, 310, 266, 692, 354, 241, 1254, 586, 262, 122, 708, 273,
          301, 257, 844, 317, 1350, 306, 394, 413, 390, 266, 1361, 236, 882, 1635, 508, 543, 522, 1356, 104, 351, 126,
          487, 445, 360, 586, 509, 395, 909, 2]),
        (False, "\n", [201]),
    ]),
    ("example.jsonl", 2, [
        (False,
         "<|im_start|>user\nHow do I make a Python script exit with an error?<|im_end|>\n<|im_start|>ass"
         "istant\n",
         [1, 87, 85, 267, 201, 469, 425, 370, 1724, 261, 1210, 905, 84, 75, 747, 384, 275, 550, 293, 1815, 33, 2, 201,
          1, 361, 85, 283, 86, 935, 201]),
        (True,
         "Call `sys.exit` with a message: Python prints it to standard error and ends the script with ex"
         "it status 1.<|im_end|>",
         [37, 637, 680, 85, 91, 85, 16, 71, 90, 275, 66, 550, 261, 286, 1435, 1184, 28, 1210, 927, 1413, 85, 340, 331,
          365, 313, 70, 318, 70, 1815, 303, 894, 564, 268, 905, 84, 75, 747, 550, 384, 275, 365, 272, 87, 85, 223, 19,
          16, 2]),
        (False, "\n", [201]),
    ]),
]


@pytest.mark.parametrize("name, row, expected", LITERAL, ids=[f"{name}-{row}" for name, row, _ in LITERAL])
def test_targets_are_these_tokens(name, row, expected):
    """Answers and <|im_end|> are targets, token by token; prompts, headers and the newline after a turn are not."""
    assert runs(data.load(os.path.join(ROOT, "data", name), tiny, 2048), row) == expected


# ---------------------------------------------------------------------------------------------------------------------
# ChatML by hand: an oracle that shares no code with data.py


def by_hand(messages, raw=RAW):
    """(ids, mask) of ChatML: each piece between special tokens is encoded alone, and bytes say where a token begins.

    A token of a byte-level vocabulary has one character a byte, so no offsets of the library are needed.
    """
    start, end = raw.token_to_id("<|im_start|>"), raw.token_to_id("<|im_end|>")
    newline = raw.encode("\n").ids
    ids, mask = [], []
    for message in messages:
        header = message["role"] + "\n"
        piece = raw.encode(header + message["content"]).ids
        trained = message["role"] == "assistant" and message.get("train", True)
        begins = np.cumsum([0] + [len(raw.id_to_token(token)) for token in piece[:-1]])
        ids += [start, *piece, end, *newline]
        mask += [False, *(trained and byte >= len(header) for byte in begins), trained, *[False] * len(newline)]
    return ids, mask


def as_messages(row):
    """The messages of an example row, for the oracle: each shape read the long way."""
    if "prompt" in row:
        return chat(row["prompt"], row["response"])
    if "instruction" in row:
        question = row["instruction"] + ("\n" + row["input"] if row.get("input") else "")
        before = [text for pair in row.get("history", []) for text in pair]
        return chat(*before, question, row["output"], system=row.get("system"))
    turns = row.get("messages", row.get("conversations"))
    names = {"human": "user", "gpt": "assistant", "system": "system"}
    return [{"role": names[turn["from"]], "content": turn["value"]} if "from" in turn else turn for turn in turns]


def assert_is(dataset, expected):
    """The dataset's conversations are these (ids, mask), in this order."""
    assert len(dataset) == len(expected)
    for i, (ids, mask) in enumerate(expected):
        here = slice(dataset.starts[i], dataset.starts[i + 1])
        assert dataset.tokens[here].tolist() == ids
        assert dataset.is_target[here].tolist() == mask
        assert dataset.lengths[i] == max(place for place, target in enumerate(mask) if target)


@pytest.mark.parametrize("path", EXAMPLES, ids=map(os.path.basename, EXAMPLES))
def test_every_example_row_equals_chatml_by_hand(path):
    """All rows of all example files have the ids and the mask of an independent reading of the template."""
    with open(path, encoding="utf-8") as f:
        rows = [json.loads(line) for line in f] if path.endswith("l") else json.load(f)
    dataset = data.load(path, tiny, 2048)
    assert_is(dataset, [by_hand(as_messages(row)) for row in rows])
    assert sources(dataset) == [f"{path}[{i}]" for i in range(len(rows))]


WORDS = ["assistant", "user", "system", "assistant\n", "user\n", "im_start", "<|im_", "end|>", "{{ messages }}", "\n",
         "\n\n", " ", "  ", "\t", "\r\n", "你好", "，世界。", "🙂", "👩‍👩‍👧", "é", "e\u0301", "\u3000", "\u00a0", "Hello",
         " there", "def f(x):\n    return x\n", "a=1", "0", "42", "</s>", "[INST]", "\\n", '"', "'s"]
SPECIAL = re.compile(r"<\|im_start\|>|<\|im_end\|>|<\|endoftext\|>")
contents = st.lists(st.one_of(st.sampled_from(WORDS), st.text("ab 1\n界", max_size=3)), max_size=6).map("".join).filter(
    lambda text: not SPECIAL.search(text))
answers = contents.filter(str.strip)


@st.composite
def conversations(draw):
    """Messages in ChatML's order, or in any other that the tiny template takes; some answers are not trained."""
    roles = draw(st.one_of(st.integers(1, 3).map(lambda n: ["user", "assistant"] * n),
                           st.lists(st.sampled_from(["user", "assistant"]), min_size=1, max_size=5).filter(
                               lambda roles: "assistant" in roles)))
    messages = [{"role": role, "content": draw(answers if role == "assistant" else contents)} for role in roles]
    for message in messages:
        if message["role"] == "assistant" and draw(st.integers(0, 4)) == 0:
            message["train"] = False
    return ([{"role": "system", "content": draw(contents)}] if draw(st.booleans()) else []) + messages


@pytest.fixture(scope="module")
def merging(tmp_path_factory):
    """models/tiny with a token for two newlines, which the header's newline and an answer's first one become."""
    directory = tmp_path_factory.mktemp("merging")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        with open(os.path.join(TINY, name), encoding="utf-8") as f:
            content = json.load(f)
        if name == "tokenizer.json":
            content["model"]["vocab"]["ĊĊ"] = len(content["model"]["vocab"])
            content["model"]["merges"].insert(0, ["Ċ", "Ċ"])
        write(directory / name, content)
    return str(directory)


@pytest.mark.parametrize("merges", [False, True], ids=["tiny", "newlines merge"])
def test_any_conversation_equals_chatml_by_hand(merges, merging, scratch):
    """Whatever is said, ids and mask are those of the independent reading, where answers begin with newlines too."""
    tokenizer = ChatTokenizer(merging) if merges else tiny
    raw = Tokenizer.from_file(os.path.join(merging, "tokenizer.json")) if merges else RAW

    @repeatable
    @given(st.lists(conversations(), min_size=1, max_size=4))
    def check(batch):
        batch = [chat("always", "one"), *batch]
        expected = [by_hand(messages, raw) for messages in batch]
        path = write(scratch, [{"messages": messages} for messages in batch])
        assert_is(data.load(path, tokenizer, 10**6), [pair for pair in expected if any(pair[1])])

    check()


def test_a_token_that_begins_in_the_header_is_not_a_target(merging, tmp_path):
    """A newline that merged with the header's own is in the prompt already, so the model never has to say it."""
    path = write(tmp_path / "rows.json", [{"prompt": "q", "response": "\nHi"}, {"prompt": "q", "response": "Hi"}])
    raw = Tokenizer.from_file(os.path.join(merging, "tokenizer.json"))
    dataset = data.load(path, ChatTokenizer(merging), 2048)
    assert [text for _, text, _ in runs(dataset, 0, raw)][0].endswith("assistant\n\n")
    assert target_texts(dataset, 0, raw) == ["Hi<|im_end|>"] == target_texts(dataset, 1, raw)
    unmerged = data.load(path, tiny, 2048)
    assert target_texts(unmerged) == ["\nHi<|im_end|>"]


@pytest.mark.parametrize("mark", [{"train": False}, {"weight": 0}, {"weight": 0.0}, {"weight": False}])
def test_a_turn_marked_not_to_train_has_no_target(mark, tmp_path):
    """"train": false, or weight 0, keeps a turn as context: neither its words nor its end are targets."""
    first, second = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "One."}), chat("r", "Two.")
    for conversation, expected in (([first[0], {**first[1], **mark}, *second], ["Two.<|im_end|>"]),
                                   ([*second, first[0], {**first[1], **mark}], ["Two.<|im_end|>"]),
                                   ([*first, *second], ["One.<|im_end|>", "Two.<|im_end|>"])):
        dataset = data.load(write(tmp_path / "rows.json", [{"messages": conversation}]), tiny, 2048)
        assert target_texts(dataset) == expected


@pytest.mark.parametrize("mark", [{"train": True}, {"weight": 1}, {"weight": 1.0}])
def test_a_turn_marked_to_train_is_as_one_without_a_mark(mark, tmp_path):
    """"train": true and weight 1 are the default, and no template ever sees the mark."""
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "One.", **mark}]
    watching = chatml("(m.content + (' marked' if 'train' in m or 'weight' in m else ''))")
    path = write(tmp_path / "rows.json", [{"messages": messages}])
    for tokenizer in (tiny, ChatTokenizer(make_directory(tmp_path / "model", watching))):
        assert_is(data.load(path, tokenizer, 2048), [by_hand(chat("q", "One."))])


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
def test_every_row_shape_becomes_the_same_messages(row, messages, tmp_path):
    """Each accepted shape, its optional keys and its empty ones read as the conversation that they mean."""
    assert_is(data.load(write(tmp_path / "rows.json", [row]), tiny, 2048), [by_hand(messages)])


# ---------------------------------------------------------------------------------------------------------------------
# other templates, beside transformers


def make_directory(path, template, special=(), raw=None, **config):
    """A model directory's tokenizer half: models/tiny's tokenizer, more special tokens, this template."""
    path.mkdir(exist_ok=True)
    raw = raw or Tokenizer.from_file(os.path.join(TINY, "tokenizer.json"))
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) if isinstance(token, str) else token
                            for token in special])
    raw.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
              "eos_token": "<|endoftext|>", **config}
    write(path / "tokenizer_config.json", config if template is None else {**config, "chat_template": template})
    return str(path)


def chatml(content, role="m.role", more=""):
    """A ChatML template whose messages have this content."""
    return ("{%- for m in messages %}{{- '<|im_start|>' + " + role + " + '\\n' + " + content + " + '<|im_end|>\\n' }}"
            "{%- endfor %}" + more + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}")


LLAMA3 = """\
{{- bos_token }}
{%- for m in messages %}
    {{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n'+ m['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
"""
HOLDS_BOS = """\
<s>{% for m in messages %}
    {% if m.role == 'user' %}
<|user|>{{ m.content }}{{ eos_token }}
    {%- elif m.role == 'assistant' %}
<|assistant|>{{ m.content }}{{ eos_token }}
    {%- endif %}
{% endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""
QWEN3 = """\
{%- set ns = namespace(last=messages|length - 1, multi_step=true) %}
{%- for m in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and m.role == "user" %}
        {%- set ns.multi_step = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.role != "assistant" %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}
    {%- else %}
        {%- set content = m.content %}
        {%- set reasoning = '' %}
        {%- if m.reasoning_content is string %}
            {%- set reasoning = m.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
            {{- '<|im_start|>' + m.role + '\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' }}
            {{- content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + m.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
DROPS_THINKING = chatml("(m.content.split('</think>')[-1].lstrip('\\n') if m.role == 'assistant' and not loop.last "
                        "else m.content)")
STRIPS = chatml("m.content.strip()")
GENERATION = """\
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' %}
        {%- generation %}{{ m.content + '<|im_end|>' }}{%- endgeneration %}
    {%- else %}
        {{- m.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
MISTRAL = """\
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {{- '[INST] ' + m.content + ' [/INST]' }}
    {%- elif m.role == 'assistant' %}
        {{- ' ' + m.content + eos_token }}
    {%- else %}
        {{- raise_exception('Only user and assistant roles are supported!') }}
    {%- endif %}
{%- endfor %}"""
PLAIN_WORDS = """\
{%- for m in messages %}
    {{- {'user': 'Question: ', 'assistant': 'Answer: ', 'system': ''}[m.role] + m.content }}
    {{- eos_token if m.role == 'assistant' else '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'Answer:' }}{%- endif %}"""
GEMMA = """\
{{- bos_token }}
{%- for m in messages %}
    {%- set role = 'model' if m.role == 'assistant' else m.role %}
    {{- '<start_of_turn>' + role + '\\n' + m.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""
PHI3 = """\
{%- for m in messages %}{{- '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- else %}{{- eos_token }}{%- endif %}"""

THOUGHT = "<think>\nso far\n</think>\n\n"
PLAIN = (chat("Hello?", "Hi there."), chat("Hello?", "Hi there.", "你是谁？", "你好，world 🙂"))
# name: (template, special tokens, config, conversations, target texts of each)
FAMILIES = {
    "always appends the header, like Llama 3": (
        LLAMA3, ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        dict(bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"),
        [*PLAIN, chat("q ", " Hi. \n", "r", "\tBye.", system=" s ")],
        [["Hi there.<|eot_id|>"], ["Hi there.<|eot_id|>", "你好，world 🙂<|eot_id|>"],
         ["Hi.<|eot_id|>", "Bye.<|eot_id|>"]]),
    "holds the BOS in its text, like Zephyr": (
        HOLDS_BOS, ["<s>", "</s>", "<|user|>", "<|assistant|>"], dict(bos_token="<s>", eos_token="</s>"),
        [*PLAIN], [["Hi there.</s>"], ["Hi there.</s>", "你好，world 🙂</s>"]]),
    "puts an empty think block into the last turn, like Qwen3": (
        QWEN3, [], dict(pad_token="<|endoftext|>", eos_token="<|im_end|>"),
        [*PLAIN, chat("q", THOUGHT + "One.", "r", THOUGHT + "Two."),
         [*chat("q", "One."), {"role": "user", "content": "r"},
          {"role": "assistant", "content": "Two.", "reasoning_content": "hm"}]],
        [["<think>\n\n</think>\n\nHi there.<|im_end|>"],
         ["Hi there.<|im_end|>", "<think>\n\n</think>\n\n你好，world 🙂<|im_end|>"],
         ["One.<|im_end|>", THOUGHT + "Two.<|im_end|>"],
         ["One.<|im_end|>", "<think>\nhm\n</think>\n\nTwo.<|im_end|>"]]),
    "drops the thinking of earlier turns": (
        DROPS_THINKING, [], {},
        [*PLAIN, chat("q", THOUGHT + "One."), chat("q", THOUGHT + "One.", "r", THOUGHT + "Two.")],
        [["Hi there.<|im_end|>"], ["Hi there.<|im_end|>", "你好，world 🙂<|im_end|>"], [THOUGHT + "One.<|im_end|>"],
         ["One.<|im_end|>", THOUGHT + "Two.<|im_end|>"]]),
    "strips contents": (
        STRIPS, [], {}, [*PLAIN, chat(" q \n", "\n\n Hi. \n", " ", "Bye.\t", system="\ns")],
        [["Hi there.<|im_end|>"], ["Hi there.<|im_end|>", "你好，world 🙂<|im_end|>"],
         ["Hi.<|im_end|>", "Bye.<|im_end|>"]]),
    "marks {% generation %}": (
        GENERATION, [], {}, [*PLAIN, chat("q", " Hi. \n", "r", "Bye.", system="s")],
        [["Hi there.<|im_end|>"], ["Hi there.<|im_end|>", "你好，world 🙂<|im_end|>"],
         [" Hi. \n<|im_end|>", "Bye.<|im_end|>"]]),
    "has [INST] of plain words, like Mistral": (
        MISTRAL, ["<s>", "</s>"], dict(bos_token="<s>", eos_token="</s>"),
        [*PLAIN, chat("[INST] q [/INST]", "[/INST]")],
        [[" Hi there.</s>"], [" Hi there.</s>", " 你好，world 🙂</s>"], [" [/INST]</s>"]]),
    "has a prompt that ends before the header's space": (
        PLAIN_WORDS, ["</s>"], dict(eos_token="</s>"), [*PLAIN, chat("Answer: q", "Answer: a", "r", "b", system="s\n")],
        [[" Hi there.</s>"], [" Hi there.</s>", " 你好，world 🙂</s>"], [" Answer: a</s>", " b</s>"]]),
    "names its roles otherwise, like Gemma": (
        GEMMA, ["<bos>", "<start_of_turn>", "<end_of_turn>"], dict(bos_token="<bos>"), [*PLAIN],
        [["Hi there.<end_of_turn>"], ["Hi there.<end_of_turn>", "你好，world 🙂<end_of_turn>"]]),
    "ends turns with a token that takes the newline in, like Phi-3": (
        PHI3, ["<|system|>", "<|user|>", *(AddedToken(t, rstrip=True, normalized=False, special=True)
                                           for t in ("<|end|>", "<|assistant|>"))], {}, [*PLAIN],
        [["Hi there.<|end|>"], ["Hi there.<|end|>", "你好，world 🙂<|end|>"]]),
    "pads with the token that ends turns": (
        chatml("m.content"), [], dict(pad_token="<|im_end|>", eos_token="<|im_end|>"), [*PLAIN],
        [["Hi there.<|im_end|>"], ["Hi there.<|im_end|>", "你好，world 🙂<|im_end|>"]]),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_targets_of_template_that(name, tmp_path):
    """The decoded targets of single- and multi-turn conversations are exactly the answers and what ends them."""
    template, special, config, batch, expected = FAMILIES[name]
    tokenizer = ChatTokenizer(make_directory(tmp_path / "model", template, special, **config))
    path = write(tmp_path / "rows.json", [{"messages": messages} for messages in batch])
    dataset = data.load(path, tokenizer, 2048)
    assert not tokenizer.is_fallback
    assert [target_texts(dataset, i, tokenizer.tokenizer) for i in range(len(batch))] == expected
    turns = sum(map(len, expected))
    assert (dataset.ledger.turns, dataset.ledger.turns_stopped) == (turns, turns)


@pytest.mark.parametrize("name", ["models/tiny", *FAMILIES])
def test_text_and_ids_are_those_of_transformers(name, tmp_path):
    """What is trained on is what apply_chat_template writes and its tokenizer encodes, without a second BOS."""
    if name == "models/tiny":
        directory, batch = TINY, [*PLAIN, chat(" q\n", "\n a ", "", "b", system="s")]
    else:
        template, special, config, batch, _ = FAMILIES[name]
        raw = Tokenizer.from_file(os.path.join(TINY, "tokenizer.json"))
        if bos := config.get("bos_token"):  # as Llama's: encode() adds a BOS unless told not to
            raw.add_special_tokens([AddedToken(bos, special=True, normalized=False)])
            bos_and_id = bos, raw.token_to_id(bos)
            raw.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[bos_and_id])
        directory = make_directory(tmp_path / "model", template, special, raw, **config)
    ours, theirs = ChatTokenizer(directory), AutoTokenizer.from_pretrained(directory)
    dataset = data.load(write(tmp_path / "rows.json", [{"messages": m} for m in batch]), ours, 2048)
    for i, messages in enumerate(batch):
        text = theirs.apply_chat_template(messages, tokenize=False)
        assert ours.render(messages) == text
        prompt = theirs.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        assert ours.render(messages[:-1], add_generation_prompt=True) == prompt
        ids = dataset.tokens[dataset.starts[i] : dataset.starts[i + 1]].tolist()
        encoded = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask="gen" in name)
        assert ids == encoded["input_ids"] == theirs(text, add_special_tokens=False)["input_ids"]
        if "gen" in name:
            mask = dataset.is_target[dataset.starts[i] : dataset.starts[i + 1]]
            assert mask.astype(int).tolist() == encoded["assistant_masks"]
        if ours.special.get("bos_token"):
            assert ids.count(ours.tokenizer.token_to_id(ours.special["bos_token"])) == 1 and ids[0] != ids[1]


def test_a_template_may_use_what_transformers_offers_it(tmp_path):
    """tools, tojson without ASCII escapes, break and continue, strftime_now and block trimming render alike."""
    template = """
    {%- if tools %}{{- '<|im_start|>system\\n' + tools | tojson + tools | tojson(indent=2) + '<|im_end|>' }}{% endif %}
    {% for m in messages %}
        {% if loop.index0 == 4 %}{% break %}{% endif %}
        {% if m.role == 'system' %}{% continue %}{% endif %}
<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
    {% endfor %}
{{ strftime_now('%Y') }}
"""
    directory = make_directory(tmp_path / "model", template)
    ours, theirs = ChatTokenizer(directory), AutoTokenizer.from_pretrained(directory)
    tools = [{"type": "function", "function": {"name": "天气", "description": "<b>'&\"", "parameters": {}}}]
    messages = chat("Hello?", "Hi.", "Again?", "Hi!", system="no")
    for given_tools in (None, tools):
        text = theirs.apply_chat_template(messages, tools=given_tools, tokenize=False)
        assert ours.render(messages, tools=given_tools) == text
    assert "天气" in text and "no" not in text


def test_the_tools_of_a_row_reach_its_template(tmp_path):
    """A row's "tools" are rendered as its template does with them."""
    template = chatml("m.content").replace("{%- for", "{%- if tools %}{{- tools[0].name }}{%- endif %}{%- for", 1)
    tokenizer = ChatTokenizer(make_directory(tmp_path / "model", template))
    path = write(tmp_path / "rows.json", [{"messages": chat("q", "a"), "tools": [{"name": "weather"}]}])
    assert runs(data.load(path, tokenizer, 2048))[0][1].startswith("weather<|im_start|>user\nq")


def test_a_call_of_a_tool_is_a_target(tmp_path):
    """An assistant message without words but with tool_calls is trained as the template renders it, up to its end."""
    template = chatml("m.content + (m.tool_calls | tojson if m.tool_calls else '')")
    tokenizer = ChatTokenizer(make_directory(tmp_path / "model", template))
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]},
                {"role": "tool", "content": "7"}, {"role": "assistant", "content": "Seven."}]
    dataset = data.load(write(tmp_path / "rows.json", [{"messages": messages}]), tokenizer, 2048)
    assert target_texts(dataset) == ['[{"name": "f"}]<|im_end|>', "Seven.<|im_end|>"]


@pytest.mark.parametrize("thought, answer", [
    ("maybe 42, since 6 * 7 is 42", "42"), ("yes", "yes"), ("assistant\n42", "42"), ("hm </think> hm", "hm"),
    ("", "42")])
@pytest.mark.parametrize("template", ["tiny", "Qwen3", "drops"])
def test_reasoning_that_already_says_the_answer_is_trained_to_its_end(template, thought, answer, tmp_path):
    """An answer's words may stand in the reasoning before them: the turn still ends where it ends."""
    source = {"tiny": chatml("m.content"), "Qwen3": QWEN3, "drops": DROPS_THINKING}[template]
    tokenizer = ChatTokenizer(make_directory(tmp_path / "model", source))
    said = f"<think>\n{thought}\n</think>\n\n{answer}"
    dataset = data.load(write(tmp_path / "rows.json", [{"messages": chat("q", said)}]), tokenizer, 2048)
    rendered = tokenizer.render(chat("q", said)).split("<|im_start|>assistant\n")[1]
    assert target_texts(dataset) == [rendered.removesuffix("\n")]
    assert rendered.endswith(f"</think>\n\n{answer}<|im_end|>\n")


def test_reasoning_in_a_key_of_its_own_may_say_the_answer(tmp_path):
    """reasoning_content that the template renders before the answer is trained with it, whatever it says."""
    tokenizer = ChatTokenizer(make_directory(tmp_path / "model", QWEN3))
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "42", "reasoning_content": "42?"}]
    dataset = data.load(write(tmp_path / "rows.json", [{"messages": messages}]), tokenizer, 2048)
    assert target_texts(dataset) == ["<think>\n42?\n</think>\n\n42<|im_end|>"]


def test_an_answer_of_reasoning_only_is_not_lost(tmp_path):
    """A turn that ends with </think> is trained as it stands: nothing of it is dropped in silence."""
    path = write(tmp_path / "rows.json", [{"messages": chat("q", "<think>\nhm\n</think>")}])
    assert target_texts(data.load(path, tiny, 2048)) == ["<think>\nhm\n</think><|im_end|>"]


def test_characters_that_the_product_uses_as_marks_are_text(tmp_path):
    """The noncharacters U+FDD0 and U+FDD1 in a message change no mask: {% generation %} alone makes marks."""
    messages = chat("a \ufdd0 b \ufdd1", "Hi.")
    assert_is(data.load(write(tmp_path / "rows.json", [{"messages": messages}]), tiny, 2048), [by_hand(messages)])


NEVER_ENDS = """\
{%- for m in messages %}{{- m.role + ': ' + m.content + '\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- 'assistant: ' }}{%- endif %}"""
SOMETIMES_ENDS = "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content }}" \
                 "{{- '' if m.content == 'endless' else '<|im_end|>' }}{%- endfor %}"


def test_a_template_that_never_ends_a_turn_is_refused(tmp_path):
    """A model that is never shown a stop token would never stop: the run does not start."""
    tokenizer = ChatTokenizer(make_directory(tmp_path / "model", NEVER_ENDS))
    with pytest.raises(ValueError, match="only 0 of 2 assistant turns .* would never stop"):
        data.load(write(tmp_path / "rows.json", [{"messages": m} for m in PLAIN[:1] * 2]), tokenizer, 2048)


def test_99_percent_of_turns_must_end(tmp_path):
    """One endless turn of 100 may pass, one of 99 may not; turns that are not trained or were cut do not count."""
    tokenizer = ChatTokenizer(make_directory(tmp_path / "model", SOMETIMES_ENDS))
    endless, ended = {"messages": chat("q", "endless")}, {"messages": chat("q", "done")}
    untrained = {"messages": [*chat("q", "endless"), *chat("r", "done")]}
    untrained["messages"][1]["train"] = False
    dataset = data.load(write(tmp_path / "rows.json", [endless] + 99 * [ended] + 50 * [untrained]), tokenizer, 2048)
    assert (dataset.ledger.turns, dataset.ledger.turns_stopped) == (150, 149)
    with pytest.raises(ValueError, match="only 98 of 99 assistant turns"):
        data.load(write(tmp_path / "rows.json", [endless] + 98 * [ended]), tokenizer, 2048)
    long = {"messages": chat("q", "a very long answer that is cut off")}
    dataset = data.load(write(tmp_path / "rows.json", 50 * [long]), tokenizer, 18)
    assert (dataset.ledger.turns, dataset.ledger.rows_truncated) == (0, 50)


def test_a_conversation_that_the_template_refuses_names_the_row(tmp_path):
    """What a template raises about the order of roles becomes an error that says which row it was."""
    rows = [{"messages": chat("q", "a")},
            {"messages": [*chat("q", "a"), {"role": "system", "content": "late"}, *chat("r", "b")]}]
    path = write(tmp_path / "rows.json", rows)
    say = ".*refuses.*a system message can only be the first"
    with pytest.raises(ValueError, match=re.escape(f"{path}[1]: ") + say):
        data.load(path, tiny, 2048)


def test_an_answer_that_the_template_changes_names_the_row(tmp_path):
    """Targets are never guessed: where the answer isn't in the rendered text, the row is an error."""
    template = chatml("m.content.replace('secret', '***')")
    tokenizer = ChatTokenizer(make_directory(tmp_path / "model", template))
    path = write(tmp_path / "rows.json", [{"messages": chat("q", "a")}, {"messages": chat("q", "a secret")}])
    with pytest.raises(ValueError, match=re.escape(f"{path}[1]: ") + "the answer 'a secret' can't be found"):
        data.load(path, tokenizer, 2048)


def test_a_prompt_that_the_template_changes_moves_no_target(tmp_path):
    """A question that is rendered in other words may hold a header and the answer: the answer's own place counts."""
    template = chatml("(m.content.replace('secret', '***') if m.role == 'user' else m.content)")
    tokenizer = ChatTokenizer(make_directory(tmp_path / "model", template))
    path = write(tmp_path / "rows.json", [{"messages": chat("my secret:\nassistant\nHi.", "Hi.")}])
    shown = [(target, text) for target, text, _ in runs(data.load(path, tokenizer, 2048))]
    assert shown == [(False, "<|im_start|>user\nmy ***:\nassistant\nHi.<|im_end|>\n<|im_start|>assistant\n"),
                     (True, "Hi.<|im_end|>"), (False, "\n")]


@pytest.mark.parametrize("template, say", [("{% for m in messages %}", "chat template can't be used"),
                                           ("{{ raise_exception('no chat here') }}", "no chat here"),
                                           ("{{ messages.__class__.__mro__ }}", "chat template can't be used"),
                                           ("{{ 'silent' }}", "chat template"),
                                           ("{{ messages[0].content + 1 }}", "chat template")])
def test_a_template_that_cannot_be_used_names_its_directory(template, say, tmp_path):
    """A broken template, one that reaches for Python, or one that renders no message is an error with a place."""
    directory = make_directory(tmp_path / "model", template)
    with pytest.raises(ValueError, match=re.escape(directory) + f".*{say}"):
        ChatTokenizer(directory)


def test_a_template_that_fails_on_a_conversation_names_the_row(tmp_path):
    """A Python error inside a template, such as adding text and a missing key, is an error of that row."""
    template = chatml("(m.content + (m.number if 'five' in m.content else ''))")
    tokenizer = ChatTokenizer(make_directory(tmp_path / "model", template))
    rows = [{"messages": [{"role": "user", "content": "five", "number": 5}, {"role": "assistant", "content": "a"}]}]
    path = write(tmp_path / "rows.json", rows)
    with pytest.raises(ValueError, match=re.escape(f"{path}[0]: ")):
        data.load(path, tokenizer, 2048)


def test_without_a_template_there_is_chatml(tmp_path):
    """A tokenizer without a template gets ChatML, says so, and trains the tokens that ChatML by hand has."""
    tokenizer = ChatTokenizer(make_directory(tmp_path / "model", None))
    assert tokenizer.is_fallback and not tiny.is_fallback
    assert tokenizer.stop_id == RAW.token_to_id("<|im_end|>")
    batch = [*PLAIN, chat(" q", "\na ", system="s")]
    dataset = data.load(write(tmp_path / "rows.json", [{"messages": m} for m in batch]), tokenizer, 2048)
    assert_is(dataset, [by_hand(messages) for messages in batch])


def without_chatml_tokens():
    """models/tiny's tokenizer, whose vocabulary has no <|im_start|> and no <|im_end|>."""
    with open(os.path.join(TINY, "tokenizer.json"), encoding="utf-8") as f:
        return Tokenizer.from_str(f.read().replace("<|im_start|>", "<|other_1|>").replace("<|im_end|>", "<|other_2|>"))


def test_chatml_without_its_tokens_ends_turns_with_the_eos(tmp_path):
    """Where the vocabulary has no <|im_end|>, the eos token stands in for it."""
    raw = without_chatml_tokens()
    tokenizer = ChatTokenizer(make_directory(tmp_path / "model", None, raw=raw))
    assert tokenizer.is_fallback and tokenizer.turn_end == "<|endoftext|>"
    assert tokenizer.stop_id == raw.token_to_id("<|endoftext|>") == 0
    dataset = data.load(write(tmp_path / "rows.json", [{"messages": m} for m in PLAIN]), tokenizer, 2048)
    assert target_texts(dataset, 1, raw) == ["Hi there.<|endoftext|>", "你好，world 🙂<|endoftext|>"]
    text = "<|im_start|>user\nHello?<|endoftext|>\n<|im_start|>assistant\nHi there.<|endoftext|>\n"
    assert raw.decode(dataset.tokens[: dataset.starts[1]].tolist(), skip_special_tokens=False) == text


def test_chatml_without_any_token_to_end_turns_is_refused(tmp_path):
    """No template, no <|im_end|> and no eos token: an error that names the directory."""
    directory = make_directory(tmp_path / "model", None, raw=without_chatml_tokens(), eos_token=None)
    with pytest.raises(ValueError, match=re.escape(directory)):
        ChatTokenizer(directory)


def test_where_a_template_is_found(tmp_path):
    """chat_template.jinja goes before tokenizer_config.json; of several by name the default one is taken."""
    several = [{"name": "tool_use", "template": chatml("'tool'")},
               {"name": "default", "template": chatml("'2' + m.content")}]
    directory = make_directory(tmp_path / "model", several)
    assert ChatTokenizer(directory).render(chat("q")) == "<|im_start|>user\n2q<|im_end|>\n"
    (tmp_path / "model" / "chat_template.jinja").write_text(chatml("'3' + m.content"), encoding="utf-8")
    assert ChatTokenizer(directory).render(chat("q")) == "<|im_start|>user\n3q<|im_end|>\n"
    assert AutoTokenizer.from_pretrained(directory).apply_chat_template(chat("q"), tokenize=False) == (
        "<|im_start|>user\n3q<|im_end|>\n")


def test_a_directory_without_tokenizer_says_so(tmp_path):
    """No tokenizer.json: FileNotFoundError names the directory, the file and the flag."""
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path)) + " has no tokenizer.json; --tokenizer"):
        ChatTokenizer(str(tmp_path))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_tokenizer_file_is_named(name, tmp_path):
    """A file of the tokenizer that was cut short is an error with its path."""
    directory = make_directory(tmp_path / "model", chatml("m.content"))
    content = (tmp_path / "model" / name).read_text(encoding="utf-8")
    (tmp_path / "model" / name).write_text(content[: len(content) // 2], encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(os.path.join(directory, name))):
        ChatTokenizer(directory)


# ---------------------------------------------------------------------------------------------------------------------
# the ledger


LEDGER_ROWS = [  # tokens, targets: 18, 2; 21, 5; 38, 3 and 3; 30, 2
    {"prompt": "a", "response": "b"}, {"prompt": "a", "response": "b c d e"},
    {"messages": chat("a", "b c", "d", "e f")}, {"prompt": "a b c d e f g h i j k", "response": "b"}]


@pytest.mark.parametrize("max_length, too_long, on_prompt, expected", [
    (100, "truncate", False, dict(trained=4, dropped={}, tokens=107, target=15, context=92, truncated=0)),
    (20, "truncate", False, dict(trained=3, dropped={"without targets after truncation": 1}, tokens=107, target=10,
                                 context=48, truncated=19, in_dropped_rows=30, rows_truncated=2)),
    (20, "drop", False, dict(trained=1, dropped={"too long": 3}, tokens=107, target=2, context=16, truncated=0,
                             in_dropped_rows=89, rows_truncated=0)),
    (29, "drop", False, dict(trained=2, dropped={"too long": 2}, tokens=107, target=7, context=32, truncated=0,
                             in_dropped_rows=68)),
    (30, "drop", False, dict(trained=3, dropped={"too long": 1}, tokens=107, target=9, context=60, truncated=0,
                             in_dropped_rows=38)),
    (40, "error", False, dict(trained=4, dropped={}, tokens=107, target=15, context=92, truncated=0)),
    (100, "truncate", True, dict(trained=4, dropped={}, tokens=107, target=103, context=4, truncated=0)),
    (20, "truncate", True, dict(trained=4, dropped={}, tokens=107, target=74, context=4, truncated=29,
                                in_dropped_rows=0, rows_truncated=3)),
])
def test_the_ledger_has_these_numbers(max_length, too_long, on_prompt, expected, tmp_path):
    """Rows and tokens are counted where they went, to the token, for each way with conversations that are too long."""
    dataset = data.load(write(tmp_path / "rows.json", LEDGER_ROWS), tiny, max_length, too_long, on_prompt)
    ledger = dataclasses.asdict(dataset.ledger)
    assert {key: ledger[key] for key in expected} == expected
    assert ledger["rows"] == 4
    assert ledger["trained"] == len(dataset) == len(sources(dataset))
    assert (len(dataset.tokens), dataset.is_target.sum()) == (ledger["target"] + ledger["context"], ledger["target"])


def test_the_ledger_is_printed_as_it_balances(tmp_path):
    """The two lines before the first step name every number of the balance."""
    dataset = data.load(write(tmp_path / "rows.json", LEDGER_ROWS), tiny, 20)
    assert dataset.ledger.lines() == (
        "rows     4 in = 3 trained + 1 dropped, 1 without targets after truncation",
        "tokens   107 in = 10 target + 48 context + 19 truncated (of 2 rows) + 30 in dropped rows")


def test_an_error_for_long_conversations_names_the_row_and_both_lengths(tmp_path):
    """--too_long error stops at the first row that is longer, and says by how much."""
    path = write(tmp_path / "rows.json", LEDGER_ROWS)
    with pytest.raises(ValueError, match=re.escape(f"{path}[1] has 21 tokens, more than --max_length 20")):
        data.load(path, tiny, 20, "error")


@pytest.mark.parametrize("rows, max_length", [(LEDGER_ROWS, 15), (LEDGER_ROWS, 2), ([
    {"messages": [chat("q")[0], {"role": "assistant", "content": "a", "train": False}]}], 100)])
def test_nothing_left_to_train_is_an_error(rows, max_length, tmp_path):
    """A run that would train no token does not start, and the message says what became of the rows."""
    with pytest.raises(ValueError, match=rf"no row is left to train on: {len(rows)} in, dropped .*'without targets"):
        data.load(write(tmp_path / "rows.json", rows), tiny, max_length)


def test_rows_without_targets_are_dropped_and_counted(tmp_path):
    """A row whose answers are all marked untrained leaves the data, not the count."""
    untrained = {"messages": [chat("q")[0], {"role": "assistant", "content": "a", "train": False}]}
    path = write(tmp_path / "rows.json", [untrained, {"prompt": "a", "response": "b"}])
    dataset = data.load(path, tiny, 100)
    assert dataset.ledger.dropped == {"without targets": 1} and sources(dataset) == [f"{path}[1]"]
    assert dataset.ledger.in_dropped_rows == len(by_hand(untrained["messages"])[0])


def test_train_on_prompt_trains_all_but_the_first_token(tmp_path):
    """With train_on_prompt every token is a target except the first, which nothing predicts; "train" is overruled."""
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "train": False}]
    dataset = data.load(write(tmp_path / "rows.json", [{"messages": messages}]), tiny, 100, train_on_prompt=True)
    ids, _ = by_hand(messages)
    assert_is(dataset, [(ids, [False] + [True] * (len(ids) - 1))])


def test_the_ledger_balances_for_any_data(scratch):
    """Rows in = trained + dropped, tokens in = target + context + truncated + in dropped rows, counted by hand."""

    @repeatable
    @given(st.lists(conversations(), min_size=1, max_size=6), st.integers(2, 60), st.sampled_from(["truncate", "drop"]),
           st.booleans())
    def check(batch, max_length, too_long, on_prompt):
        kept, dropped, expected = [], Counter(), Counter(rows=len(batch))
        for ids, mask in map(by_hand, batch):
            if on_prompt:
                mask = [False] + [True] * (len(ids) - 1)
            expected["tokens"] += len(ids)
            long = len(ids) > max_length
            reason = ("too long" if long and too_long == "drop" else None if any(mask[:max_length]) else
                      "without targets" + (" after truncation" if long else ""))
            if reason:
                dropped[reason] += 1
                expected["in_dropped_rows"] += len(ids)
                continue
            kept.append((ids[:max_length], mask[:max_length]))
            expected["trained"] += 1
            expected["target"] += sum(mask[:max_length])
            expected["context"] += min(len(ids), max_length) - sum(mask[:max_length])
            expected["truncated"] += max(0, len(ids) - max_length)
            expected["rows_truncated"] += long
        path = write(scratch, [{"messages": messages} for messages in batch])
        if not kept:
            with pytest.raises(ValueError, match="no row is left"):
                data.load(path, tiny, max_length, too_long, on_prompt)
            return
        dataset = data.load(path, tiny, max_length, too_long, on_prompt)
        assert_is(dataset, kept)
        ledger = dataclasses.asdict(dataset.ledger)
        assert Counter(ledger.pop("dropped")) == dropped
        names = "rows trained tokens target context truncated in_dropped_rows rows_truncated".split()
        assert {name: ledger[name] for name in names} == {name: expected[name] for name in names}
        assert ledger["tokens"] == sum(ledger[name] for name in ("target", "context", "truncated", "in_dropped_rows"))

    check()


def test_more_rows_than_one_batch_of_the_tokenizer_keep_their_order(tmp_path):
    """Rows are encoded a thousand at a time: none is lost or moved where one batch ends and the next begins."""
    rows = [{"prompt": str(i), "response": f"answer {i}"} for i in range(2001)]
    path = write(tmp_path / "rows.json", rows)
    dataset = data.load(path, tiny, 100)
    assert sources(dataset) == [f"{path}[{i}]" for i in range(2001)]
    for i in (0, 999, 1000, 1999, 2000):
        assert target_texts(dataset, i) == [f"answer {i}<|im_end|>"]


def test_the_digest_knows_tokens_targets_order_and_borders(tmp_path):
    """Resume's fingerprint is equal for equal data and differs for whatever would change a step."""
    rows = [{"prompt": "a", "response": "b c"}, {"prompt": "d", "response": "e f"}]
    untrained = {"messages": [*chat("a", "b c"), *chat("d", "e f")]}
    untrained["messages"][1]["train"] = False

    def digest(rows, **how):
        return data.load(write(tmp_path / "rows.json", rows), tiny, **{"max_length": 100, **how}).digest

    variants = [rows, rows[::-1], rows[:1], rows + rows[:1], [{"messages": [*chat("a", "b c"), *chat("d", "e f")]}],
                [untrained], [rows[0], {"prompt": "d", "response": "e g"}]]
    digests = [*map(digest, variants), digest(rows, train_on_prompt=True), digest(rows, max_length=18)]
    assert len(set(digests)) == len(digests)
    assert [digest(variant) for variant in variants] == digests[: len(variants)]
    assert digest([{"messages": chat("a", "b c")}, {"instruction": "d", "output": "e f"}]) == digests[0]


# ---------------------------------------------------------------------------------------------------------------------
# files, and what is wrong with them

ROWS = [{"prompt": "a", "response": "b"}, {"prompt": "为什么", "response": "d \u2028 e"}]
ARRAY = json.dumps(ROWS, ensure_ascii=False).encode()
LINES = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in ROWS)
BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize("content", [
    ARRAY, LINES, BOM + ARRAY, BOM + LINES, gzip.compress(ARRAY), gzip.compress(LINES), gzip.compress(BOM + ARRAY),
    b" \n\t" + ARRAY, b"\n\n" + LINES, BOM + b"\r\n " + ARRAY, LINES.replace(b"\n", b"\r\n"),
    LINES.replace(b"\n", b"\n\n"), LINES.rstrip(), json.dumps(ROWS, indent=1).encode(), json.dumps(ROWS).encode()],
    ids=["array", "lines", "BOM array", "BOM lines", "gzip array", "gzip lines", "gzip BOM array", "space array",
         "blank lines first", "BOM space array", "CRLF lines", "blank lines between", "no last newline",
         "indented array", "escaped array"])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows"])
def test_a_container_is_told_by_its_first_bytes(content, name, tmp_path):
    """JSON array, JSON Lines and gzip of either read the same, whatever the name, with BOM, blanks and CRLF."""
    (tmp_path / name).write_bytes(content)
    path = str(tmp_path / name)
    assert list(formats.read_files(path)) == [(f"{path}[0]", ROWS[0]), (f"{path}[1]", ROWS[1])]


def test_a_directory_is_its_data_files_in_order_of_name(tmp_path):
    """A directory stands for its .json, .jsonl and .gz files, sorted; others in it are left alone."""
    for name, row in (("b.json", 1), ("a.jsonl", 0), ("c.jsonl.gz", 2), ("d.json.gz", 3)):
        content = json.dumps({"row": row}).encode() + b"\n"
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    for name in ("README.md", "notes.txt", "x.json.bak"):
        (tmp_path / name).write_text("not data", encoding="utf-8")
    expected = [(str(tmp_path / name) + "[0]", {"row": i})
                for i, name in enumerate(("a.jsonl", "b.json", "c.jsonl.gz", "d.json.gz"))]
    assert list(formats.read_files(str(tmp_path))) == expected


def test_several_files_keep_the_order_in_which_they_are_named(tmp_path):
    """Commas join files and directories; each row names its own file and its place there."""
    (tmp_path / "sub").mkdir()
    first, second = write(tmp_path / "z.json", [{"row": 0}, {"row": 1}]), write(tmp_path / "a.json", [{"row": 2}])
    write(tmp_path / "sub" / "m.json", [{"row": 3}])
    got = list(formats.read_files(f"{first},{second},{tmp_path / 'sub'}"))
    assert got == [(f"{first}[0]", {"row": 0}), (f"{first}[1]", {"row": 1}), (f"{second}[0]", {"row": 2}),
                   (f"{tmp_path / 'sub' / 'm.json'}[0]", {"row": 3})]


def test_a_missing_file_is_named(tmp_path):
    """No such file, among several too: FileNotFoundError with the path and what may be given."""
    good, missing = write(tmp_path / "rows.json", ROWS), str(tmp_path / "missing.json")
    for spec in (missing, f"{good},{missing}"):
        with pytest.raises(FileNotFoundError, match=re.escape(missing) + ": no such data file; give a JSON"):
            data.load(spec, tiny, 100)


def test_a_directory_without_data_is_named(tmp_path):
    """A directory without data files: FileNotFoundError with the endings that would count."""
    (tmp_path / "rows.txt").write_text("x", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path)) + r": no data file .*\.jsonl"):
        data.load(str(tmp_path), tiny, 100)


GOOD_LINE = b'{"prompt": "a", "response": "b"}\n'


@pytest.mark.parametrize("content, line, column", [
    (b'[\n {"prompt": "a", "response": "b"},\n {"prompt": "a" "response": "b"}\n]', 3, 17),
    (b'[\n {"prompt": "a", "response": "b"}\n', 3, 1),
    (b'[{"prompt": "a", "response": "b"},]', 1, "3[45]"),  # Python 3.13 points at the comma
    (GOOD_LINE + b"\n" + b'{"prompt": "a" "response": "b"}\n', 3, 16),
    (GOOD_LINE + GOOD_LINE + b'{"prompt": "a", "resp', 3, 17),
    (GOOD_LINE.strip() + GOOD_LINE, 1, 33),
    (b'["a", "b"]\n["c", "d"]\n', 2, 1),
    (b'{\n "prompt": "a",\n "response": "b"\n}\n', 2, 1),
    (b"prompt,response\na,b\n", 1, 1),
], ids=["array", "cut array", "trailing comma", "lines", "cut line", "two in a line", "lines of arrays",
        "one object over several lines", "CSV"])
def test_what_is_not_json_names_line_and_column(content, line, column, tmp_path):
    """A syntax error is reported with its file, line, column and what a file must be."""
    path = tmp_path / "rows.json"
    for packed in (content, gzip.compress(content)):
        path.write_bytes(packed)
        say = re.escape(f"{path} is not JSON: line {line}, column ") + f"{column}: .*a JSON array of rows, or one JSON"
        with pytest.raises(ValueError, match=say):
            data.load(str(path), tiny, 100)


PACKED = gzip.compress(os.urandom(200).hex().encode())


@pytest.mark.parametrize("content", [
    ARRAY[:20] + b"\xff" + ARRAY[20:], '[{"prompt": "a", "response": "b"}]'.encode("utf-16"), PACKED[:-12],
    PACKED[:-8] + b"\0" * 8, PACKED[:20] + b"\xff" * 20 + PACKED[40:], b"[" * 200_000,
    b'[{"prompt": "a", "response": "b", "n": ' + b"1" * 5000 + b"}]"],
    ids=["not UTF-8", "UTF-16", "cut gzip", "gzip with a wrong sum", "damaged gzip", "nested too deep", "long number"])
def test_a_file_that_cannot_be_read_is_named(content, tmp_path):
    """Bytes that are no text, a damaged archive, or JSON that Python gives up on: ValueError with the file."""
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        data.load(str(path), tiny, 100)


@pytest.mark.parametrize("content", [b"", b" \n ", b"[]", BOM, gzip.compress(b"")],
                         ids=["empty", "blank", "empty array", "BOM only", "gzip of nothing"])
def test_a_file_without_rows_is_named(content, tmp_path):
    """No rows at all is an error that names the file, not the length limit."""
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        data.load(str(path), tiny, 100)


Q, A = chat("q", "a")
ALPACA = {"instruction": "i", "output": "a"}
BAD_ROWS = {
    "unknown shape": ({"question": "q", "answer": "a"},
                      r"unknown row shape.*\['answer', 'question'\].*\"instruction\""),
    "no keys": ({}, r"unknown row shape.*\[\]"),
    "half a pair": ({"prompt": "q"}, r"unknown row shape.*\['prompt'\]"),
    "a text": ("just text", "unknown row shape.*str"),
    "a number": (5, "unknown row shape.*int"),
    "null": (None, "unknown row shape.*NoneType"),
    "a list": ([Q, A], "unknown row shape.*list"),
    "messages null": ({"messages": None}, r"unknown row shape.*\['messages'\]"),
    "messages empty": ({"messages": []}, ""),
    "conversations empty": ({"conversations": []}, ""),
    "conversations empty, with system": ({"conversations": [], "system": "s"}, ""),
    "messages a text": ({"messages": "hello"}, "unknown row shape"),
    "messages an object": ({"messages": {"role": "user", "content": "q"}}, "unknown row shape"),
    "message a text": ({"messages": ["q", A]}, "message must be.*'q'"),
    "message null": ({"messages": [None, A]}, "message must be.*None"),
    "message without role": ({"messages": [{"content": "q"}, A]}, "message must be"),
    "message without content": ({"messages": [{"role": "user"}, A]},
                                "content of a user message must be a string.*None"),
    "answer without content": ({"messages": [Q, {"role": "assistant"}]}, "content.*must be a string.*None"),
    "content a list": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, A]},
                       "content of a user message must be a string.*type"),
    "content a number": ({"prompt": 5, "response": "a"}, "content of a user message must be a string, it is 5"),
    "response null": ({"prompt": "q", "response": None}, "must be a string, it is None"),
    "value missing": ({"conversations": [{"from": "human"}, {"from": "gpt", "value": "a"}]}, "must be a string"),
    "role null": ({"messages": [{"role": None, "content": "q"}, A]}, "role"),
    "role a list": ({"messages": [{"role": ["user"], "content": "q"}, A]}, "role"),
    "from unknown": ({"conversations": [{"from": "bing", "value": "q"}]}, "unknown \"from\": 'bing'.*human.*gpt"),
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
    "system a number": ({"prompt": "q", "response": "a", "system": 5}, "content of a system message must be a string"),
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
    """Whatever is wrong with a row is a ValueError with file and index, what was found, and the rule."""
    row, say = BAD_ROWS[name]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"prompt": "a", "response": "b"}, row]), encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(f"{path}[1]") + f".*{say}"):
        data.load(str(path), tiny, 100)


# ---------------------------------------------------------------------------------------------------------------------
# which conversations a step holds


def steps(sampler):
    return [sampler.step(step) for step in range(1, len(sampler) + 1)]


def test_the_order_of_a_seed_is_this():
    """The permutation of seed 42 is pinned: no library or machine may change what a run's steps hold."""
    sampler = data.Sampler(np.full(8, 10), epochs=2, seed=42, batch_size=8)
    assert [ids.tolist() for _, ids in steps(sampler)] == [[7, 1, 6, 4, 3, 5, 0, 2], [4, 5, 3, 0, 2, 7, 1, 6]]


def test_an_epoch_holds_every_conversation_once():
    """Each epoch's steps are a partition; all are full but its last; the float says how many epochs are done."""

    @repeatable
    @given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 4), st.integers(0, 10**18))
    def check(count, batch_size, epochs, seed):
        sampler = data.Sampler(np.full(count, 7), epochs, seed, batch_size)
        per_epoch = -(-count // batch_size)
        assert len(sampler) == epochs * per_epoch and sampler.per_epoch == [per_epoch] * epochs
        for epoch in range(epochs):
            got = steps(sampler)[epoch * per_epoch : (epoch + 1) * per_epoch]
            assert sorted(i for _, ids in got for i in ids) == list(range(count))
            assert [len(ids) for _, ids in got[:-1]] == [batch_size] * (per_epoch - 1)
            assert 1 <= len(got[-1][1]) <= batch_size
            np.testing.assert_allclose([done for done, _ in got], epoch + np.arange(1, per_epoch + 1) / per_epoch)

    check()


def test_orders_differ_between_epochs_and_seeds_and_agree_otherwise():
    """The order is a function of (seed, epoch) alone: not of batch size, number of epochs or what was asked before."""

    def order(seed, epoch, batch_size=50, epochs=3):
        per_epoch = -(-50 // batch_size)
        sampler = data.Sampler(np.full(50, 7), epochs, seed, batch_size)
        return tuple(i for step in range(per_epoch) for i in sampler.step(epoch * per_epoch + step + 1)[1].tolist())

    orders = {(seed, epoch): order(seed, epoch) for seed in (0, 1, 42, 10**18) for epoch in range(3)}
    assert len(set(orders.values())) == 12 and tuple(range(50)) not in orders.values()
    assert all(order(*key, batch_size=7) == value == order(*key, epochs=5) for key, value in orders.items())


def test_batch_tokens_fill_each_step():
    """With batch_tokens a step never passes them, and ends only where the next conversation would."""

    @repeatable
    @given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(0, 60), st.integers(1, 3),
           st.integers(0, 99))
    def check(sizes, slack, epochs, seed):
        limit = max(sizes) + slack
        sampler = data.Sampler(np.array(sizes), epochs, seed, batch_size=1, batch_tokens=limit)
        got, plain = steps(sampler), data.Sampler(np.array(sizes), epochs, seed, batch_size=len(sizes))
        assert len(sampler) == sum(sampler.per_epoch) and len(sampler.per_epoch) == epochs
        for epoch in range(epochs):
            mine, got = got[: sampler.per_epoch[epoch]], got[sampler.per_epoch[epoch] :]
            batches = [[sizes[i] for i in ids] for _, ids in mine]
            assert np.concatenate([ids for _, ids in mine]).tolist() == plain.step(epoch + 1)[1].tolist()
            assert all(sum(batch) <= limit for batch in batches)
            assert all(sum(batch) + following[0] > limit for batch, following in zip(batches, batches[1:]))
            assert mine[-1][0] == epoch + 1
        assert got == []

    check()


def test_batch_tokens_below_the_longest_conversation_are_refused():
    """No step could hold it: the error gives both numbers."""
    with pytest.raises(ValueError, match="--batch_tokens 29: the longest conversation has 30 tokens"):
        data.Sampler(np.array([3, 30, 4]), 1, 42, 4, batch_tokens=29)
    assert len(data.Sampler(np.array([3, 30, 4]), 1, 42, 4, batch_tokens=30)) >= 2


@pytest.mark.parametrize("batch_tokens", [None, 60])
@pytest.mark.parametrize("max_steps", [1, 3, 4, 5, 8, 30])
def test_max_steps_overrule_epochs(max_steps, batch_tokens):
    """max_steps may cut the epochs short or go on beyond them; the steps are the same as those of more epochs."""
    sizes = np.arange(10, 26)
    sampler = data.Sampler(sizes, 2, 42, 4, batch_tokens, max_steps)
    longer = data.Sampler(sizes, 40, 42, 4, batch_tokens)
    assert len(sampler) == max_steps
    for (done, ids), (done_longer, ids_longer) in zip(steps(sampler), steps(longer)):
        assert done == done_longer and ids.tolist() == ids_longer.tolist()
    if not batch_tokens:
        assert sampler.step(max_steps)[0] == max_steps / 4


@pytest.mark.parametrize("batch_tokens", [None, 60])
def test_a_step_may_be_asked_for_in_any_order(batch_tokens):
    """Resume starts at any step: what a step holds does not depend on the steps before it."""
    arguments = np.arange(10, 21), 3, 7, 4, batch_tokens
    straight = steps(data.Sampler(*arguments))
    jumping = data.Sampler(*arguments)
    for step in [len(straight), 1, *range(len(straight), 0, -1), 2, len(straight) // 2 + 1]:
        done, ids = jumping.step(step)
        assert (done, ids.tolist()) == (straight[step - 1][0], straight[step - 1][1].tolist())
        assert data.Sampler(*arguments).step(step)[1].tolist() == ids.tolist()


def test_ends_epoch_at_the_last_step_of_each_epoch_and_of_all():
    """Checkpoints and validations fall on the ends of epochs, and on the end of the run."""

    def ends(*arguments):
        sampler = data.Sampler(*arguments)
        return [step for step in range(1, len(sampler) + 1) if sampler.ends_epoch(step)]

    assert ends(np.full(10, 5), 3, 42, 4) == [3, 6, 9]
    assert ends(np.full(10, 5), 3, 42, 4, None, 7) == [3, 6, 7]
    assert ends(np.full(10, 5), 1, 42, 4, None, 2) == [2]
    assert ends(np.full(10, 5), 2, 42, 1, 25) == [2, 4]


# ---------------------------------------------------------------------------------------------------------------------
# micro-batches


@st.composite
def packings(draw):
    lengths = draw(st.lists(st.integers(1, 50), min_size=1, max_size=40))
    capacity = max(lengths) + draw(st.integers(0, 100))
    return lengths, capacity, draw(st.sampled_from([None, 1, 2, 5])), draw(st.integers(1, 5))


@repeatable
@given(packings())
def test_packing_is_a_partition_within_its_limits(packing):
    """All ranks together hold every conversation once, none too much, each equally many micro-batches, always alike."""
    lengths, capacity, max_rows, dp_size = packing
    ranks = [data.pack(lengths, capacity, max_rows, rank, dp_size) for rank in range(dp_size)]
    assert len({len(rank) for rank in ranks}) == 1
    batches = [batch for rank in ranks for batch in rank]
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in batch) <= capacity for batch in batches)
    assert all(len(batch) <= (max_rows or len(lengths)) for batch in batches)
    assert ranks == [data.pack(np.array(lengths), capacity, max_rows, rank, dp_size) for rank in range(dp_size)]
    if dp_size == 1:
        assert all(batches)


@repeatable
@given(packings())
def test_packing_takes_few_micro_batches_and_loads_them_evenly(packing):
    """No rank works more than a longest conversation longer than another; two half-empty micro-batches never stay."""
    lengths, capacity, _, dp_size = packing
    loads = [[sum(lengths[i] for i in batch) for batch in data.pack(lengths, capacity, None, rank, dp_size)]
             for rank in range(dp_size)]
    flat = [load for rank in loads for load in rank]
    assert max(flat) - min(flat) <= max(lengths)
    assert len(loads[0]) <= max(1, -(-2 * sum(lengths) // (capacity * dp_size)))


def test_packing_lays_these_out():
    """The longest go first, each into the emptiest micro-batch, and another opens only where that has no room."""
    assert data.pack([1, 4, 2, 3], 5) == [[1, 0], [3, 2]]
    assert data.pack([5, 4, 3, 3, 3], 9) == [[0], [1, 4], [2, 3]]
    assert data.pack([5, 4, 3, 3, 3], 18) == [[0, 1, 2, 3, 4]]
    assert data.pack([5, 4, 3, 3, 3], 18, max_rows=2) == [[0], [1, 4], [2, 3]]
    assert [data.pack([1, 4, 2, 3], 5, None, rank, 2) for rank in (0, 1)] == [[[1, 0]], [[3, 2]]]


def dataset_of(batch, path, **how):
    return data.load(write(path, [{"messages": messages} for messages in batch]), tiny, 10**6, **how)


def taken_apart(batch):
    """The conversations of a micro-batch: [(inputs, targets), ...]."""
    inputs, targets = (part.split(list(batch.lengths)) for part in (batch.tokens, batch.targets))
    return [(a.tolist(), b.tolist()) for a, b in zip(inputs, targets, strict=True)]


def test_micro_batches_ask_for_the_next_token_where_it_is_a_target(scratch):
    """Inputs are a conversation up to its last target, targets the next token where by hand it is one, else IGNORE."""

    @repeatable
    @given(st.lists(conversations(), min_size=1, max_size=5), st.integers(0, 80), st.sampled_from([None, 1, 2]),
           st.booleans())
    def check(conversations_, slack, max_rows, on_prompt):
        conversations_ = [chat("always", "one"), *conversations_]
        dataset = dataset_of(conversations_, scratch, train_on_prompt=on_prompt)
        expected = []
        for ids, mask in map(by_hand, conversations_):
            mask = [False] + [True] * (len(ids) - 1) if on_prompt else mask
            if any(mask):
                n = max(place for place, target in enumerate(mask) if target)
                nexts = zip(ids[1 : n + 1], mask[1 : n + 1], strict=True)
                expected.append((ids[:n], [token if target else data.IGNORE for token, target in nexts]))
        got = []
        for batch in data.micro_batches(dataset, range(len(dataset)), int(dataset.lengths.max()) + slack, max_rows):
            assert batch.tokens.dtype == batch.targets.dtype == torch.int64
            assert batch.tokens.shape == batch.targets.shape == (sum(batch.lengths),)
            assert sum(batch.lengths) <= dataset.lengths.max() + slack and len(batch.lengths) <= (max_rows or 99)
            got += taken_apart(batch)
        assert sorted(got) == sorted(expected)
        assert all(targets[-1] != data.IGNORE for _, targets in got)
        assert sum(target != data.IGNORE for _, targets in got for target in targets) == dataset.ledger.target

    check()


def test_micro_batches_hold_the_conversations_of_the_step_only(tmp_path):
    """The ids of a step choose the conversations; the others are in none of its micro-batches."""
    batch = [chat(f"q{i}", f"answer {i}") for i in range(6)]
    dataset = dataset_of(batch, tmp_path / "rows.json")
    got = [inputs for micro in data.micro_batches(dataset, np.array([4, 1, 5]), 60) for inputs, _ in taken_apart(micro)]
    expected = [by_hand(batch[i])[0][: dataset.lengths[i]] for i in (4, 1, 5)]
    assert sorted(got) == sorted(expected)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_ranks_share_a_step_and_none_waits_for_another(count, dp_size, tmp_path):
    """Every rank yields equally many micro-batches, also of a step with fewer conversations than ranks."""
    dataset = dataset_of([chat(f"q{i}", f"answer {i}") for i in range(8)], tmp_path / "rows.json")
    ids = list(range(count))
    ranks = [list(data.micro_batches(dataset, ids, 60, None, rank, dp_size)) for rank in range(dp_size)]
    assert len({len(rank) for rank in ranks}) == 1
    targets = [target for rank in ranks for batch in rank for target in batch.targets.tolist() if target != data.IGNORE]
    alone = []
    for i in ids:
        tokens, mask = by_hand(chat(f"q{i}", f"answer {i}"))
        alone += [token for token, target in zip(tokens, mask, strict=True) if target]
    assert sorted(targets) == sorted(alone)


# ---- the cache of tokenised data --------------------------------------------------------------------------------


def sources(dataset):
    return [dataset.source(i) for i in range(len(dataset))]


def same(a, b):
    return (all(np.array_equal(getattr(a, name), getattr(b, name)) for name in data.ARRAYS)
            and a.files == b.files and a.ledger == b.ledger and a.digest == b.digest)


def test_the_cache_returns_what_tokenising_does(tmp_path, monkeypatch):
    """A second load maps the first one's arrays and tokenises nothing."""
    tokenizer, spec = ChatTokenizer(TINY), os.path.join(ROOT, "data", "example_sft.json")
    fresh = data.load(spec, tokenizer, 64)
    assert same(fresh, data.load(spec, tokenizer, 64, cache_dir=str(tmp_path)))
    monkeypatch.setattr(data, "tokenise", lambda *_: pytest.fail("tokenised again"))
    cached = data.load(spec, tokenizer, 64, cache_dir=str(tmp_path))
    assert same(fresh, cached) and isinstance(cached.tokens, np.memmap)


def test_any_change_misses_the_cache(tmp_path, monkeypatch):
    """Data, each option, template, tokenizer, special tokens and the program are in the key; so is the date, for
    templates with it."""
    spec = tmp_path / "rows.json"
    spec.write_text(json.dumps([{"messages": chat("q", "answer")}]))
    tokenizer, calls = ChatTokenizer(TINY), []
    tokenise = data.tokenise
    monkeypatch.setattr(data, "tokenise", lambda *words: (calls.append(1), tokenise(*words))[1])

    def made(*options):
        before = len(calls)
        data.load(str(spec), tokenizer, *(options or (64,)), cache_dir=str(tmp_path / "cache"))
        return len(calls) > before

    assert made() and not made()
    assert made(65) and made(64, "drop") and made(64, "truncate", True) and made(64, "truncate", False, "last")
    assert not made(64, "truncate", False, "all")
    spec.write_text(json.dumps([{"messages": chat("q", "answers")}]))
    assert made() and not made()
    for name, value in (("source", tokenizer.source + " "), ("text", tokenizer.text + " "),
                        ("special", {**tokenizer.special, "x_token": "y"}), ("source", "{# strftime_now #}")):
        with monkeypatch.context() as patch:
            patch.setattr(tokenizer, name, value)
            assert made() and not made(), name
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "source", "{# strftime_now #}")
        clock = type("Clock", (), {"now": staticmethod(lambda: __import__("datetime").datetime(2000, 1, 1))})
        patch.setattr(data, "datetime", clock)
        assert made() and not made()
    with monkeypatch.context() as patch:
        patch.setattr(data, "read_file", lambda path: formats.read_file(path))  # which another file has
        assert made() and not made()


def test_a_crash_while_caching_leaves_nothing_half(tmp_path, monkeypatch):
    """An error on the way leaves no entry, and the next load makes it."""
    tokenizer, spec = ChatTokenizer(TINY), os.path.join(ROOT, "data", "example.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(data.json, "dump", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            data.load(spec, tokenizer, 64, cache_dir=str(tmp_path))
    assert not [f for f in os.listdir(tmp_path) if not f.endswith((".tmp", ".lock"))]
    assert same(data.load(spec, tokenizer, 64, cache_dir=str(tmp_path)), data.load(spec, tokenizer, 64))
    assert not [f for f in os.listdir(tmp_path) if f.endswith(".tmp")]


def test_processes_tokenise_once_and_wait_for_each_other(tmp_path):
    """Three processes at once: one makes the entry, the others wait on its lock and get the same."""
    code = (f"import sys; sys.path.insert(0, {ROOT!r}); import data, template\n"
            "tokenise = data.tokenise\n"
            "data.tokenise = lambda *words: (print('MADE'), tokenise(*words))[1]\n"
            f"tokenizer, spec = template.ChatTokenizer({TINY!r}), {os.path.join(ROOT, 'data', 'example_sft.json')!r}\n"
            f"dataset = data.load(spec, tokenizer, 64, cache_dir={str(tmp_path)!r})\nprint(dataset.digest)")
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate()[0].split() for process in processes]
    assert sorted(len(words) for words in outputs) == [1, 1, 2] and len({words[-1] for words in outputs}) == 1


# ---- streamed arrays, mixing, train_on, hub datasets, show and stats -----------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.lists(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
                             lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=6)),
       st.sampled_from([1, 3, 17, 1000]), st.sampled_from([None, 1]), st.booleans(),
       st.none() | st.tuples(st.integers(0, 200), st.sampled_from(["", ",", "]", "}", "x", '"', "\n"])))
def test_a_streamed_array_is_what_json_reads(rows, piece, indent, ascii_only, damage):
    """Any array in pieces of any size: json.loads' values, or its error with its line and column."""
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    if damage:
        text = text[: 1 + damage[0]] + damage[1] + text[2 + damage[0] :]
    try:
        expected = json.loads(text)
    except json.JSONDecodeError as error:
        expected = f"line {error.lineno}, column {error.colno}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "PIECE", piece)
        try:
            got = list(formats.json_array(io.StringIO(text), "rows.json"))
        except ValueError as error:
            assert isinstance(expected, str) and expected in str(error), (text, expected)
        else:
            assert got == expected, text


def test_an_array_is_read_in_pieces(tmp_path):
    """2,000 rows of 5 kB: never more than a few pieces of text in memory, and an error far in has its place."""
    path = tmp_path / "rows.json"
    rows = [{"prompt": "p", "response": "word " * 1000}] * 2000
    path.write_text(json.dumps(rows, indent=0) + "\n")
    tracemalloc.start()
    assert sum(1 for _ in formats.read_file(str(path))) == 2000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * formats.PIECE < path.stat().st_size
    path.write_text(path.read_text().rstrip()[:-1] + ",\n{oops}]")
    with pytest.raises(ValueError, match=rf"is not JSON: line {2000 * 4 + 3}, column 2: "):
        list(formats.read_file(str(path)))


def mixed(tmp_path, *sizes):
    return [write(tmp_path / f"{i}.json", [{"prompt": f"q{i}", "response": f"r{i} {j}"} for j in range(n)])
            for i, n in enumerate(sizes)]


def test_files_are_mixed_by_weight(tmp_path):
    """0.7 and 0.3 of 100 and 20 conversations: an epoch has the 20 and 46 of the 100, other ones in the next epoch."""
    a, b = mixed(tmp_path, 100, 20)
    dataset = data.load(f"{a}:0.7,{b}:0.3", tiny, 100)
    sampler = data.Sampler(dataset.lengths, 2, 42, 6, mix=dataset.mix())
    assert len(sampler) == 22  # 66 conversations an epoch
    epochs = [np.concatenate([sampler.step(s)[1] for s in range(first, first + 11)]) for first in (1, 12)]
    for ids in epochs:
        assert len(set(ids)) == 66 and np.bincount(dataset.file[ids]).tolist() == [46, 20]
        assert 0 < np.count_nonzero(dataset.file[ids[:33]]) < 20  # in no order of files
    assert set(epochs[0]) != set(epochs[1])
    again = data.Sampler(dataset.lengths, 2, 42, 6, mix=dataset.mix())
    assert all(np.array_equal(sampler.step(s)[1], again.step(s)[1]) for s in range(1, 23))
    assert dataset.digest != data.load(f"{a}:0.6,{b}:0.4", tiny, 100).digest != data.load(f"{a},{b}", tiny, 100).digest
    assert data.load(f"{a},{b}", tiny, 100).mix() is None


def test_a_directory_has_one_weight(tmp_path):
    """Its files are one group."""
    (tmp_path / "dir").mkdir()
    mixed(tmp_path / "dir", 10, 10)
    (b,) = mixed(tmp_path, 5)
    dataset = data.load(f"{tmp_path / 'dir'}:4,{b}:1", tiny, 100)
    assert data.Sampler(dataset.lengths, 1, 1, 5, mix=dataset.mix()).quotas == [20, 5]


@pytest.mark.parametrize("spec, message", [("{a}:0.7,{b}", "give each part a weight"), ("{a}:0,{b}:1", "above 0"),
                                           ("{a}:0.001,{b}:1", "leave a part without any")])
def test_bad_weights_are_one_line(spec, message, tmp_path):
    a, b = mixed(tmp_path, 5, 5)
    with pytest.raises(ValueError, match=message):
        dataset = data.load(spec.format(a=a, b=b), tiny, 100)
        data.Sampler(dataset.lengths, 1, 1, 5, mix=dataset.mix())


def test_train_on_last(tmp_path):
    """The last assistant turn of each conversation only; a last turn that says train: false trains nothing instead."""
    rows = [{"messages": [*chat("q", "first"), *chat("q2", "second")]},
            {"messages": [*chat("q", "first"), {"role": "user", "content": "q2"},
                          {"role": "assistant", "content": "second", "train": False}]}]
    path = write(tmp_path / "rows.json", rows)
    dataset = data.load(path, tiny, 100, train_on="last")
    assert target_texts(dataset) == ["second<|im_end|>"]
    assert dataset.ledger.dropped == {"without targets": 1} and dataset.ledger.turns == 1


def test_a_hub_dataset_is_downloaded(tmp_path, monkeypatch):
    """owner/name that is no path goes to the hub's client; the training split's files are read, others not."""
    import huggingface_hub

    asked = []
    (tmp_path / "data").mkdir()
    for name in ("train-00000.json", "test-00000.json"):
        write(tmp_path / "data" / name, [{"prompt": name, "response": "r"}])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **how: (asked.append((name, how)), str(
        tmp_path))[1])
    dataset = data.load("owner/name", tiny, 100)
    assert sources(dataset) == [f"{tmp_path}/data/train-00000.json[0]"]
    assert asked[0][0] == "owner/name" and asked[0][1]["repo_type"] == "dataset"


def test_a_hub_that_can_not_be_reached_is_one_line(monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError
    import huggingface_hub

    def fail(*_, **__):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match="owner/name: no such data file, and as a dataset .*no network"):
        data.load("owner/name", tiny, 100)


def look(*words):
    command = [sys.executable, os.path.join(ROOT, "tools", "show.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


def test_show_prints_what_the_model_sees(tmp_path, capsys):
    """Targets are marked, in green on a terminal; ids on request; only so many rows are read."""
    path = write(tmp_path / "rows.json", [{"prompt": "q", "response": "é answer"}] * 3 + [{"broken": 1}])
    out = look("show", path, "--model", "tiny", "-n", 2).stdout
    assert out.count("---") == 2
    assert out.count("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n«é answer<|im_end|>»") == 2
    ids = look("show", path, "-n", 1, "--ids").stdout
    dataset = data.load(path, tiny, 100, limit=3)
    assert "«" + " ".join(map(str, dataset.tokens[: dataset.starts[1]][dataset.is_target[: dataset.starts[1]]])) in ids
    show.show(dataset, tiny, 1, False, True)
    assert "\x1b[32mé answer<|im_end|>\x1b[0m" in capsys.readouterr().out


def test_stats_say_what_max_length_cuts(tmp_path, monkeypatch):
    """Rows and target tokens beyond each length, by another count of the same."""
    rows = [{"prompt": "q", "response": "word " * n} for n in (3, 600, 1500, 5000)]
    path = write(tmp_path / "rows.json", rows)
    out = look("stats", path, "--max_length", 512).stdout
    whole = data.load(path, tiny, 10**6)
    for length in (512, 1024, 2048, 4096):
        cut = data.load(path, tiny, length)
        lost = whole.ledger.target - cut.ledger.target
        cuts = rf"--max_length {length:<5,} cuts {cut.ledger.rows_truncated} rows .* and {lost:,} target"
        assert re.search(cuts, out)
    assert "packing " in out and "rows     4 in = 4 trained" in out
    for words, message in ((("stats", str(tmp_path / "none.json")), "no such data file"), ((), "what to do?"),
                           (("show", path, "-n", "0"), "--n 0: it must be at least 1")):
        monkeypatch.setattr(sys, "argv", ["show.py", *words])
        with pytest.raises((ValueError, OSError), match=message):
            show.main()


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
    """Where a row has the keys that were named, they are its question and answer, or its messages; any other row is
    told by the usual ones."""
    found = formats.to_messages(row, "here", keys)
    assert [(m["role"], m["content"]) for m in found] == [("user", "q?"), ("assistant", "a.")]


def test_the_cache_knows_the_keys_of_rows(tmp_path):
    """The same file read by other keys is other data; a row that has neither is refused, with the keys looked for."""
    path = write(tmp_path / "rows.json", [{"prompt": "q", "response": "one", "question": "q", "answer": "two"}])
    keys = dict.fromkeys(["prompt", "question"])
    for question, answer in ("prompt", "response"), ("question", "answer"), ("prompt", "response"):
        keys[question] = data.load(path, tiny, 100, cache_dir=str(tmp_path / "cache"),
                                   keys=(question, answer, "messages"))
    assert [target_texts(dataset) for dataset in keys.values()] == [["one<|im_end|>"], ["two<|im_end|>"]]
    with pytest.raises(ValueError, match=r"its keys are \['a'\]; .* with --prompt_key q, with --response_key r$"):
        formats.to_messages({"a": 1}, "here", ("q", "r", "messages"))
    with pytest.raises(ValueError, match="the content of a user message must be a string, it is None"):
        formats.to_messages({"q": None, "r": "a"}, "here", ("q", "r", "messages"))


def test_who_holds_the_lock_of_the_cache_shows_progress(tmp_path, monkeypatch):
    """Every thousand rows its file gets another time: those who wait for it (take_lock) wait on, however long it is."""
    path = write(tmp_path / "rows.json", [{"prompt": "q", "response": "a"}] * 3001)
    tokenizer, times = ChatTokenizer(TINY), []
    render = tokenizer.render_spans

    def watching(messages, where, tools=None):
        if where.endswith("000]"):
            (lock,) = (tmp_path / "cache").glob("*.lock")
            times.append(lock.stat().st_mtime)
            os.utime(lock, (0, 0))
        return render(messages, where, tools)

    monkeypatch.setattr(tokenizer, "render_spans", watching)
    data.load(path, tokenizer, 100, cache_dir=str(tmp_path / "cache"))
    assert len(times) == 3 and all(times)


THINKS = chatml("('<think>' + m.thinking + '</think>' if m.thinking is defined else '') + m.content")


@pytest.mark.parametrize("said, as_content, as_thinking", [
    ({"reasoning": "hm"}, "hm", "hm"), ({"thinking": "hm"}, "hm", "hm"), ({"reasoning_content": "hm"}, "hm", "hm"),
    ({"reasoning_content": None, "thinking": None, "reasoning": "hm"}, "hm", "hm"), ({"reasoning_content": ""}, "", ""),
    ({"reasoning": "b", "thinking": "a"}, "a", "a"), ({"reasoning_content": "a", "thinking": "b"}, "a", "b"),
    ({"reasoning_content": "", "reasoning": "b"}, "", "")], ids=str)
def test_reasoning_goes_by_three_names(said, as_content, as_thinking, tmp_path):
    """reasoning, thinking and reasoning_content reach templates that read another of them, as transformers has it."""
    messages = [*chat("q"), {"role": "assistant", "content": "a", **said}]
    path = write(tmp_path / "rows.json", [{"messages": messages}])
    for name, template, expected in (("a", QWEN3, f"<think>\n{as_content}\n</think>\n\na<|im_end|>"),
                                     ("b", THINKS, f"<think>{as_thinking}</think>a<|im_end|>")):
        directory = make_directory(tmp_path / name, template)
        tokenizer = ChatTokenizer(directory)
        assert target_texts(data.load(path, tokenizer, 100)) == [expected]
        if hasattr(transformers.utils.chat_template_utils, "_alias_reasoning_fields"):  # since 5.24
            text = AutoTokenizer.from_pretrained(directory).apply_chat_template(messages, tokenize=False)
            assert text.endswith(expected + "\n") and tokenizer.render(formats.to_messages(
                {"messages": messages}, "here")) == text


@pytest.mark.parametrize("name", FAMILIES)
def test_questions_in_a_row_are_no_targets(name, tmp_path):
    """Also where the header is what closes a question, as [/INST] does: of several only the last opens an answer."""
    template, special, config, _, (plain, *_) = FAMILIES[name]
    tokenizer = ChatTokenizer(make_directory(tmp_path / "model", template, special, **config))
    messages = [*chat("q"), *chat(""), *chat("a b", "a"), *chat("a"), *chat("b", "a")]
    dataset = data.load(write(tmp_path / "rows.json", [{"messages": messages}]), tokenizer, 100)
    answer = plain[0].replace("Hi there.", "a")
    earlier = answer.rpartition("</think>\n\n")[2]  # Qwen3's empty thought is in the last turn only
    assert target_texts(dataset, 0, tokenizer.tokenizer) == [earlier, answer]
    assert tokenizer.is_closing == (name == "has [INST] of plain words, like Mistral")
