"""Which tokens are targets: literal ids, an independent reading of ChatML, and make_weights() alone."""

import json
import os

import numpy as np
import pytest
from data_helpers import EXAMPLES, assert_is, by_hand, conversations, repeatable, sources, tiny
from helpers import RAW, ROOT, TINY, chat, chatml, make_directory, mask_spans, target_texts, write
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

import data
from text import masks
from text.template import ChatTokenizer
from text.turns import Span

LITERAL = [
    ("example_sft.json", 0, [
        (False,
         "<|im_start|>user\nWhat is supervised fine-tuning?<|im_end|>\n<|im_start|>assistant\n",
         [1, 87, 85, 267, 201, 470, 312, 548, 1812, 1211, 1257, 33, 2, 201, 1, 361, 85, 283, 86, 935, 201]),
        (True,
         "Supervised fine-tuning continues the training of a pretrained language model on prompts paired"
         " with good responses, so that it learns to answer in that manner. The loss is usually computed"
         " on the response tokens only.<|im_end|>",
         [1009, 1812, 1211, 1257, 1786, 874, 268, 560, 335, 261, 929, 86, 396, 356, 1827, 544, 321, 302, 609,
          747, 85, 302, 1937, 70, 550, 808, 407, 977, 871, 14, 375, 411, 340, 461, 318, 492, 331, 1746, 330,
          411, 286, 1142, 267, 16, 774, 483, 312, 1168, 1042, 1252, 356, 321, 268, 1762, 991, 800, 16, 2]),
        (False, "\n", [201]),
    ]),
    ("example_sft.json", 5, [
        (False,
         "<|im_start|>user\n为什么要留出一部分数据做验证？<|im_end|>\n<|im_start|>assistant\n",
         [1, 87, 85, 267, 201, 834, 438, 992, 1604, 1262, 561, 589, 1264, 309, 2, 201, 1, 361, 85, 283, 86,
          935, 201]),
        (True,
         "模型可能只是背下了训练数据。用它没见过的数据来测，才能看出它是否真的学会了，也便于挑选检查点。"
         "<|im_end|>",
         [542, 1164, 693, 322, 167, 228, 237, 531, 1670, 561, 273, 310, 405, 978, 1648, 805, 279, 561, 511,
          1362, 236, 366, 529, 498, 467, 426, 405, 1522, 1574, 279, 1176, 586, 1428, 1361, 126, 801, 884, 242,
          967, 1256, 273, 2]),
        (False,
         "\n<|im_start|>user\n那留多少比较合适？<|im_end|>\n<|im_start|>assistant\n",
         [201, 1, 87, 85, 267, 201, 168, 227, 99, 992, 720, 1215, 1699, 309, 2, 201, 1, 361, 85, 283, 86, 935,
          201]),
        (True,
         "数据有几千条时，留出百分之五到十就可以；数据很多时，固定留几百到一两千条也够用。<|im_end|>",
         [561, 414, 714, 1754, 387, 266, 992, 426, 1706, 1149, 360, 715, 413, 415, 901, 561, 509, 1588, 1095,
          121, 953, 992, 714, 726, 1551, 530, 1754, 506, 919, 310, 273, 2]),
        (False, "\n", [201]),
    ]),
    ("example_alpaca.json", 3, [
        (False,
         "<|im_start|>system\n你是一位讲课简明的老师。<|im_end|>\n<|im_start|>user\n用一句话解释什么是词"
         "元。<|im_end|>\n<|im_start|>assistant\n",
         [1, 85, 91, 473, 862, 201, 952, 1520, 810, 305, 113, 308, 125, 829, 1133, 279, 619, 226, 546, 233,
          273, 2, 201, 1, 87, 85, 267, 201, 310, 1139, 707, 1647, 374, 235, 442, 322, 308, 238, 710, 273, 2,
          201, 1, 361, 85, 283, 86, 935, 201]),
        (True,
         "词元是语言模型处理文本的基本单位，可能是一个字、一个词，也可能只是词的一部分。<|im_end|>",
         [308, 238, 710, 322, 708, 167, 104, 225, 542, 1480, 1231, 466, 799, 279, 164, 256, 121, 799, 1533,
          810, 266, 1164, 1520, 1586, 630, 306, 394, 308, 238, 1428, 1164, 693, 322, 308, 238, 279, 306, 1262,
          273, 2]),
        (False, "\n", [201]),
    ]),
    ("example_alpaca.json", 4, [
        (False,
         "<|im_start|>user\nWhat does the // operator do in Python?<|im_end|>\n<|im_start|>assistant\n",
         [1, 87, 85, 267, 201, 470, 1603, 268, 223, 17, 17, 304, 1327, 272, 274, 425, 330, 1210, 33, 2, 201,
          1, 361, 85, 283, 86, 935, 201]),
        (True,
         "It is floor division: it divides two numbers and rounds the result down, so `7 // 2` is 3.<|im"
         "_end|>",
         [736, 312, 276, 78, 81, 274, 553, 1043, 378, 28, 340, 553, 88, 518, 269, 777, 1767, 303, 364, 289,
          80, 564, 268, 510, 1618, 1510, 14, 375, 680, 25, 223, 17, 17, 223, 20, 66, 312, 223, 21, 16, 2]),
        (False,
         "\n<|im_start|>user\nWhat does the following expression give, then?\n-7 // 2<|im_end|>\n<|im_st"
         "art|>assistant\n",
         [201, 1, 87, 85, 267, 201, 470, 1603, 268, 276, 744, 1021, 285, 384, 2025, 1435, 378, 343, 741, 14,
          1104, 33, 201, 15, 25, 223, 17, 17, 223, 20, 2, 201, 1, 361, 85, 283, 86, 935, 201]),
        (True,
         "It gives -4, which may surprise you: floor division rounds toward negative infinity rather tha"
         "n toward zero.<|im_end|>",
         [736, 1158, 456, 22, 14, 1696, 286, 446, 265, 432, 2025, 1471, 406, 28, 276, 78, 81, 274, 553, 1043,
          378, 364, 289, 80, 564, 259, 314, 318, 70, 537, 73, 1437, 330, 72, 263, 910, 364, 272, 684, 900,
          259, 314, 318, 70, 223, 1813, 16, 2]),
        (False, "\n", [201]),
    ]),
    ("example_conversations.json", 2, [
        (False,
         "<|im_start|>user\nWhat is 17 times 6?<|im_end|>\n<|im_start|>assistant\n17 times 6 is 112.<|im"
         "_end|>\n<|im_start|>user\nThat does not look right. Please check it.<|im_end|>\n<|im_start|>as"
         "sistant\n",
         [1, 87, 85, 267, 201, 470, 312, 223, 19, 25, 1778, 223, 24, 33, 2, 201, 1, 361, 85, 283, 86, 935,
          201, 19, 25, 1778, 223, 24, 312, 223, 19, 19, 20, 16, 2, 201, 1, 87, 85, 267, 201, 54, 327, 1603,
          807, 1465, 1028, 364, 447, 16, 624, 1837, 1117, 340, 16, 2, 201, 1, 361, 85, 283, 86, 935, 201]),
        (True,
         "You are right, I made a mistake. Ten sixes are 60 and seven sixes are 42, so 17 times 6 is 102"
         ".<|im_end|>",
         [1292, 683, 364, 447, 14, 370, 286, 430, 71, 261, 286, 283, 86, 1294, 16, 223, 54, 292, 265, 1313,
          269, 683, 223, 24, 18, 303, 1665, 265, 1313, 269, 683, 223, 22, 20, 14, 375, 223, 19, 25, 1778, 223,
          24, 312, 223, 19, 18, 20, 16, 2]),
        (False, "\n", [201]),
    ]),
    ("example_sharegpt.json", 1, [
        (False,
         "<|im_start|>system\n你是一位细心的中文编辑。<|im_end|>\n<|im_start|>user\n“通过这次活动，使我学"
         "到了很多。”这句话有什么毛病？<|im_end|>\n<|im_start|>assistant\n",
         [1, 85, 91, 473, 862, 201, 952, 1520, 810, 324, 231, 837, 279, 1175, 1694, 479, 242, 273, 2, 201, 1,
          87, 85, 267, 201, 385, 821, 805, 508, 543, 522, 1356, 104, 266, 351, 126, 487, 445, 360, 586, 509,
          395, 909, 508, 692, 707, 819, 453, 252, 166, 248, 230, 309, 2, 201, 1, 361, 85, 283, 86, 935, 201]),
        (True,
         "“通过”和“使”连用，句子没有了主语。删去其中一个就好，例如：“这次活动使我学到了很多。”<|im_end|>"
         "",
         [385, 821, 805, 386, 377, 385, 351, 126, 386, 1151, 310, 266, 692, 354, 241, 1254, 586, 262, 122,
          708, 273, 301, 257, 844, 317, 1350, 306, 394, 413, 390, 266, 1361, 236, 882, 1635, 508, 543, 522,
          1356, 104, 351, 126, 487, 445, 360, 586, 509, 395, 909, 2]),
        (False, "\n", [201]),
    ]),
    ("example.jsonl", 2, [
        (False,
         "<|im_start|>user\nHow do I make a Python script exit with an error?<|im_end|>\n<|im_start|>ass"
         "istant\n",
         [1, 87, 85, 267, 201, 469, 425, 370, 1724, 261, 1210, 905, 84, 75, 747, 384, 275, 550, 293, 1815, 33,
          2, 201, 1, 361, 85, 283, 86, 935, 201]),
        (True,
         "Call `sys.exit` with a message: Python prints it to standard error and ends the script with ex"
         "it status 1.<|im_end|>",
         [37, 637, 680, 85, 91, 85, 16, 71, 90, 275, 66, 550, 261, 286, 1435, 1184, 28, 1210, 927, 1413, 85,
          340, 331, 365, 313, 70, 318, 70, 1815, 303, 894, 564, 268, 905, 84, 75, 747, 550, 384, 275, 365,
          272, 87, 85, 223, 19, 16, 2]),
        (False, "\n", [201]),
    ]),
]


@pytest.mark.parametrize("name, row, expected", LITERAL, ids=[f"{name}-{row}" for name, row, _ in LITERAL])
def test_targets_are_these_tokens(name, row, expected):
    """Answers and <|im_end|> are targets, token by token; prompts, headers and the newline after a turn are
    not."""
    assert mask_spans(data.load(os.path.join(ROOT, "data", name), tiny, 2048), row) == expected


# ---- make_weights(), alone ----------------------------------------------------------------------------

STOP = 9


class Handmade:
    """Like tokenizers.Encoding, made of (id, text) for a token, or of a text without a token."""

    def __init__(self, *pieces):
        self.text, self.ids, self.places = "", [], []
        for piece in pieces:
            token, piece = piece if isinstance(piece, tuple) else (None, piece)
            if token is not None:
                self.ids.append(token)
                self.places.append((len(self.text), len(self.text) + len(piece)))
            self.text += piece

    def __len__(self):
        return len(self.ids)

    def char_to_token(self, char):
        return next((i for i, (start, stop) in enumerate(self.places) if start <= char < stop), None)

    def token_to_chars(self, token):
        return self.places[token]


ONE = Handmade((1, "user:"), (2, "hi\n"), (3, "bot:"), (4, "oh "), (5, "yes"), (STOP, "<end>"), (6, "\n"))
TWO = Handmade((3, "bot:"), (4, "a"), (STOP, "<end>"), (2, "hi\n"), (3, "bot:"), (5, "b"), (STOP, "<end>"))


def masked(encoding, spans, kept=None, train_on_prompt=False, stop_token_ids=(STOP,), train_reasoning=True):
    """(loss mask as text, turns, turns whose stop token is a target[, tokens of reasoning if there are any])."""
    kept = len(encoding) if kept is None else kept
    weights, turns, stopped, reasoning = masks.make_weights(
        encoding, encoding.ids, [Span(*span) for span in spans], encoding.text, kept=kept,
        stop_token_ids=stop_token_ids, train_on_prompt=train_on_prompt, train_reasoning=train_reasoning)
    assert weights.dtype == np.float64 and weights.shape == (kept,)
    assert type(turns) is type(stopped) is int
    counts = (turns, stopped, reasoning) if reasoning else (turns, stopped)
    return "".join(".x"[target] for target in (weights > 0).tolist()), *counts


@pytest.mark.parametrize("how, expected", [
    ({}, ("...xxx.", 1, 1)),
    (dict(stop_token_ids=()), ("...xxx.", 1, 0)),
    (dict(stop_token_ids=(7,)), ("...xxx.", 1, 0)),
    (dict(train_on_prompt=True), (".xxxxxx", 1, 1)),
    (dict(kept=6), ("...xxx", 1, 1)),
    (dict(kept=5), ("...xx", 0, 0)),  # a truncated turn is trained, but does not count as a turn that has to stop
    (dict(kept=3), ("...", 0, 0)),
    (dict(kept=2, train_on_prompt=True), (".x", 0, 0)),
], ids=str)
def test_mask_of_one_turn(how, expected):
    """The turn from the end of its header to its stop token, and how it counts. The text is
    user:hi_bot:oh yes<end>_"""
    assert ONE.text[12:23] == "oh yes<end>"
    assert masked(ONE, [(12, 23, True, True)], **how) == expected


@pytest.mark.parametrize("span, expected", [
    ((12, 23, True, False), (".......", 0, 0)),
    ((12, 18, False, True), ("...xx..", 1, 0)),  # a turn without its stop token
    ((12, 18, True, True), ("...xx..", 1, 0)),  # its stop token is outside
    ((12, 23, False, True), ("...xxx.", 1, 0)),
    ((13, 23, True, True), ("....xx.", 1, 1)),  # the first token begins before the span
    ((12, 17, False, True), ("...xx..", 1, 0)),  # the last token ends after the span
    ((24, 24, False, True), (".......", 1, 0)),  # an empty span
], ids=str)
def test_mask_of_another_span(span, expected):
    """Only tokens inside a span are targets, and only if the span is trained."""
    assert masked(ONE, [span]) == expected


@pytest.mark.parametrize("trained, how, expected", [
    ((True, True), {}, (".xx..xx", 2, 2)),
    ((False, True), {}, (".....xx", 1, 1)),
    ((True, False), {}, (".xx....", 1, 1)),
    ((True, True), dict(kept=6), (".xx..x", 1, 1)),
    ((True, True), dict(kept=5), (".xx..", 1, 1)),
    ((False, True), dict(train_on_prompt=True), (".xxxxxx", 2, 2)),
], ids=str)
def test_mask_of_two_turns(trained, how, expected):
    """Each turn is trained or not by itself. Truncated turns do not count."""
    assert TWO.text[4:10] == "a<end>" and TWO.text[17:23] == "b<end>"
    assert masked(TWO, [(4, 10, True, trained[0]), (17, 23, True, trained[1])], **how) == expected


def test_mask_skips_characters_without_a_token():
    """A normaliser may drop characters. The tokens of the span begin after them."""
    encoding = Handmade((3, "bot:"), "  ", (4, "a"), " ", (STOP, "<end>"), " ")
    assert encoding.text[4:13] == "  a <end>"
    assert masked(encoding, [(4, 13, True, True)]) == (".xx", 1, 1)


THINKING = Handmade((3, "bot:"), (7, "<t>"), (4, "hm"), (8, "</t>\n"), (5, "yes"), (STOP, "<end>"), (6, "\n"))


@pytest.mark.parametrize("answer, how, expected", [
    (14, {}, (".xxxxx.", 1, 1, 3)),
    (14, dict(train_reasoning=False), ("....xx.", 1, 1, 3)),
    (13, dict(train_reasoning=False), ("....xx.", 1, 1, 3)),  # a token that is in part reasoning is no target
    (4, dict(train_reasoning=False), (".xxxxx.", 1, 1)),  # no reasoning
    (14, dict(train_reasoning=False, kept=3), ("...", 0, 0, 3)),
], ids=str)
def test_mask_of_reasoning(answer, how, expected):
    """Without --train_reasoning the targets begin at the answer; tokens of reasoning are counted either way."""
    assert THINKING.text[4:22] == "<t>hm</t>\nyes<end>"
    assert masked(THINKING, [(4, 22, True, True, answer)], **how) == expected


def test_mask_of_nothing():
    """A text without tokens has no target."""
    assert masked(Handmade("text"), [(0, 4, False, True)]) == ("", 1, 0)


# ---- an independent reading of ChatML -------------------------------------------------------------------


def as_messages(row):
    """The messages of an example row, for the oracle: each format read separately."""
    if "prompt" in row:
        return chat(row["prompt"], row["response"])
    if "instruction" in row:
        question = row["instruction"] + ("\n" + row["input"] if row.get("input") else "")
        before = [text for pair in row.get("history", []) for text in pair]
        return chat(*before, question, row["output"], system=row.get("system"))
    turns = row.get("messages", row.get("conversations"))
    names = {"human": "user", "gpt": "assistant", "system": "system"}
    return [{"role": names[turn["from"]], "content": turn["value"]} if "from" in turn else turn
            for turn in turns]


@pytest.mark.parametrize("path", EXAMPLES, ids=map(os.path.basename, EXAMPLES))
def test_every_example_row_equals_chatml_by_hand(path):
    """All rows of all example files have the ids and the loss mask of an independent reading of the template."""
    with open(path, encoding="utf-8") as f:
        rows = [json.loads(line) for line in f] if path.endswith("l") else json.load(f)
    dataset = data.load(path, tiny, 2048)
    assert_is(dataset, [by_hand(as_messages(row)) for row in rows])
    assert sources(dataset) == [f"{path}[{i}]" for i in range(len(rows))]


@pytest.fixture(scope="module")
def merging(tmp_path_factory):
    """models/tiny with a token for two newlines: that of the header merges with the first one of an answer."""
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
def test_any_conversation_equals_chatml_by_hand(merges, merging, tmp_path):
    """For any messages, ids and loss mask equal those of the independent reading, also if answers begin with
    newlines."""
    tokenizer = ChatTokenizer(merging) if merges else tiny
    raw = Tokenizer.from_file(os.path.join(merging, "tokenizer.json")) if merges else RAW

    @repeatable
    @given(st.lists(conversations(), min_size=1, max_size=4))
    def check(batch):
        batch = [chat("always", "one"), *batch]
        expected = [by_hand(messages, raw) for messages in batch]
        path = write(tmp_path / "rows.json", [{"messages": messages} for messages in batch])
        assert_is(data.load(path, tokenizer, 10**6), [pair for pair in expected if any(pair[1])])

    check()


def test_a_token_that_begins_in_the_header_is_not_a_target(merging, tmp_path):
    """A newline that merged with that of the header is in the prompt, so the model never generates it."""
    path = write(tmp_path / "rows.json", [{"prompt": "q", "response": "\nHi"},
                                          {"prompt": "q", "response": "Hi"}])
    raw = Tokenizer.from_file(os.path.join(merging, "tokenizer.json"))
    dataset = data.load(path, ChatTokenizer(merging), 2048)
    assert [text for _, text, _ in mask_spans(dataset, 0, raw)][0].endswith("assistant\n\n")
    assert target_texts(dataset, 0, raw) == ["Hi<|im_end|>"] == target_texts(dataset, 1, raw)
    unmerged = data.load(path, tiny, 2048)
    assert target_texts(unmerged) == ["\nHi<|im_end|>"]


def test_characters_used_as_marks_are_ordinary_text(tmp_path):
    """U+FDD0 and U+FDD1 in a message change no loss mask: only {% generation %} makes marks."""
    messages = chat("a \ufdd0 b \ufdd1", "Hi.")
    assert_is(data.load(write(tmp_path / "rows.json", [{"messages": messages}]), tiny, 2048),
              [by_hand(messages)])


# ---- which turns are trained ----------------------------------------------------------------------------


@pytest.mark.parametrize("mark", [{"train": False}, {"weight": 0}, {"weight": 0.0}, {"weight": False}])
def test_a_turn_marked_not_to_train_has_no_target(mark, tmp_path):
    """A turn with "train": false or weight 0 is context: neither its text nor its stop token is a target."""
    first, second = chat("q", "One."), chat("r", "Two.")
    for conversation, expected in (([first[0], {**first[1], **mark}, *second], ["Two.<|im_end|>"]),
                                   ([*second, first[0], {**first[1], **mark}], ["Two.<|im_end|>"]),
                                   ([*first, *second], ["One.<|im_end|>", "Two.<|im_end|>"])):
        dataset = data.load(write(tmp_path / "rows.json", [{"messages": conversation}]), tiny, 2048)
        assert target_texts(dataset) == expected


@pytest.mark.parametrize("mark", [{"train": True}, {"weight": 1}, {"weight": 1.0}])
def test_a_turn_marked_to_train_equals_one_without_a_mark(mark, tmp_path):
    """"train": true and weight 1 are the default, and templates do not see these keys."""
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "One.", **mark}]
    watching = chatml("(m.content + (' marked' if 'train' in m or 'weight' in m else ''))")
    path = write(tmp_path / "rows.json", [{"messages": messages}])
    for tokenizer in (tiny, ChatTokenizer(make_directory(tmp_path / "model", watching))):
        assert_is(data.load(path, tokenizer, 2048), [by_hand(chat("q", "One."))])


def test_train_on_last(tmp_path):
    """Only the last assistant turn of each conversation is trained; if that has "train": false, none is."""
    rows = [{"messages": [*chat("q", "first"), *chat("q2", "second")]},
            {"messages": [*chat("q", "first"), {"role": "user", "content": "q2"},
                          {"role": "assistant", "content": "second", "train": False}]}]
    path = write(tmp_path / "rows.json", rows)
    dataset = data.load(path, tiny, 100, train_on="last")
    assert target_texts(dataset) == ["second<|im_end|>"]
    assert dataset.ledger.dropped == {"without targets": 1} and dataset.ledger.turns == 1


def test_train_on_prompt_trains_all_but_the_first_token(tmp_path):
    """Every token is a target but the first, which nothing predicts. "train": false has no effect then."""
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "train": False}]
    dataset = data.load(write(tmp_path / "rows.json", [{"messages": messages}]), tiny, 100,
                        train_on_prompt=True)
    ids, _ = by_hand(messages)
    assert_is(dataset, [(ids, [False] + [True] * (len(ids) - 1))])
