"""A loaded dataset: its ledger balances to the token, rows keep their order, and the digest depends on the content."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
from data_helpers import assert_is, by_hand, conversations, ends_a_turn, repeatable, sources, tiny
from helpers import RAW, ROOT, TINY, chat, chatml, make_directory, target_texts, write
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

import data
import sft
import text.conversations
from settings.errors import UserError
from text.ledger import check_settings
from text.template import ChatTokenizer

LEDGER_ROWS = [  # tokens, targets: 18, 2; 21, 5; 38, 3 and 3; 30, 2
    {"prompt": "a", "response": "b"}, {"prompt": "a", "response": "b c d e"},
    {"messages": chat("a", "b c", "d", "e f")}, {"prompt": "a b c d e f g h i j k", "response": "b"}]


@pytest.mark.parametrize("max_length, too_long, on_prompt, expected", [
    (100, "truncate", False, dict(trained=4, dropped={}, tokens=107, target=15, context=92, truncated=0)),
    (20, "truncate", False, dict(trained=3, dropped={"without targets after truncation": 1}, tokens=107,
                                 target=10, context=48, truncated=19, in_dropped_rows=30, rows_truncated=2)),
    (20, "drop", False, dict(trained=1, dropped={"too long": 3}, tokens=107, target=2, context=16,
                             truncated=0, in_dropped_rows=89, rows_truncated=0)),
    (29, "drop", False, dict(trained=2, dropped={"too long": 2}, tokens=107, target=7, context=32,
                             truncated=0, in_dropped_rows=68)),
    (30, "drop", False, dict(trained=3, dropped={"too long": 1}, tokens=107, target=9, context=60,
                             truncated=0, in_dropped_rows=38)),
    (40, "error", False, dict(trained=4, dropped={}, tokens=107, target=15, context=92, truncated=0)),
    (100, "truncate", True, dict(trained=4, dropped={}, tokens=107, target=103, context=4, truncated=0)),
    (20, "truncate", True, dict(trained=4, dropped={}, tokens=107, target=74, context=4, truncated=29,
                                in_dropped_rows=0, rows_truncated=3)),
])
def test_the_ledger_has_these_numbers(max_length, too_long, on_prompt, expected, tmp_path):
    """Rows and tokens are counted exactly, for each value of --too_long."""
    dataset = data.load(write(tmp_path / "rows.json", LEDGER_ROWS), tiny, max_length, too_long=too_long,
                        train_on_prompt=on_prompt)
    ledger = dataclasses.asdict(dataset.ledger)
    assert {key: ledger[key] for key in expected} == expected
    assert ledger["rows"] == 4
    assert ledger["trained"] == len(dataset) == len(sources(dataset))
    assert len(dataset.tokens) == ledger["target"] + ledger["context"]
    assert dataset.loss_mask.sum() == ledger["target"]


def test_the_ledger_is_printed_as_it_balances(tmp_path):
    """The two lines on the screen have every number of the two sums."""
    dataset = data.load(write(tmp_path / "rows.json", LEDGER_ROWS), tiny, 20)
    assert dataset.ledger.lines() == (
        "rows     4 in = 3 trained + 1 dropped (1 without targets after truncation)",
        "tokens   107 in = 10 target + 48 context + 19 truncated (of 2 rows) + 30 in dropped rows",
        "prompts  5 of 5 trained turns (100 %) follow the prompt that inference renders")
    assert dataset.ledger.lines(dataset.files)[0] == f"files    {tmp_path}/rows.json"


@pytest.mark.parametrize("options, expected", [({}, 3), ({"split_turns": True}, 3), ({"train_on": "last"}, 1)], ids=str)
def test_rows_that_begin_with_a_trained_answer_are_counted(options, expected, tmp_path):
    """After a system message too; not where the answer is no target. A row counts once, not each of its samples."""
    greeting, system, *later = [
        {"role": role, "content": "Hello."} for role in ("assistant", "system", "user", "assistant")]
    starts = [[greeting], [system, greeting], [{**greeting, "train": False}], later, [system]]
    rows = [{"messages": start + later} for start in starts] + [{"conversations": [{"from": "gpt", "value": "alone"}]}]
    ledger = data.load(write(tmp_path / "rows.json", rows), tiny, 100, **options).ledger
    assert ledger.unasked == expected
    assert any(line.startswith(f"unasked  {expected} row") for line in ledger.lines())


def test_an_error_for_long_conversations_names_the_row_and_both_lengths(tmp_path):
    """--too_long error stops at the first row that is longer, with its length and the limit."""
    path = write(tmp_path / "rows.json", LEDGER_ROWS)
    with pytest.raises(ValueError, match=re.escape(f"{path}[1] has 21 tokens, more than --max_length 20")):
        data.load(path, tiny, 20, too_long="error")


@pytest.mark.parametrize("rows, max_length", [(LEDGER_ROWS, 15), (LEDGER_ROWS, 2), ([
    {"messages": [chat("q")[0], {"role": "assistant", "content": "a", "train": False}]}], 100)])
def test_no_row_to_train_is_an_error(rows, max_length, tmp_path):
    """A run without a target does not start, and the error says why rows were dropped."""
    with pytest.raises(ValueError,
                       match=rf"no row is left to train on: {len(rows)} in, all dropped .* without targets"):
        data.load(write(tmp_path / "rows.json", rows), tiny, max_length)


def test_rows_without_targets_are_dropped_and_counted(tmp_path):
    """A row whose answers are all marked as not trained is dropped and counted."""
    untrained = {"messages": [chat("q")[0], {"role": "assistant", "content": "a", "train": False}]}
    path = write(tmp_path / "rows.json", [untrained, {"prompt": "a", "response": "b"}])
    dataset = data.load(path, tiny, 100)
    assert dataset.ledger.dropped == {"without targets": 1} and sources(dataset) == [f"{path}[1]"]
    assert dataset.ledger.in_dropped_rows == len(by_hand(untrained["messages"])[0])


def test_the_ledger_balances_for_any_data(tmp_path):
    """rows = trained + dropped, and tokens = target + context + truncated + in_dropped_rows, as counted here."""

    @repeatable
    @given(st.lists(conversations(), min_size=1, max_size=6), st.integers(2, 60),
           st.sampled_from(["truncate", "drop"]), st.booleans())
    def check(batch, max_length, too_long, on_prompt):
        kept, ends, dropped, expected = [], [], Counter(), Counter(rows=len(batch))
        for messages in batch:
            ids, mask = by_hand(messages)
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
            ends.append(ends_a_turn(messages, max_length, on_prompt))
            expected["trained"] += 1
            expected["target"] += sum(mask[:max_length])
            expected["context"] += min(len(ids), max_length) - sum(mask[:max_length])
            expected["truncated"] += max(0, len(ids) - max_length)
            expected["rows_truncated"] += long
        path = write(tmp_path / "rows.json", [{"messages": messages} for messages in batch])
        how = dict(too_long=too_long, train_on_prompt=on_prompt)
        if not any(ends):
            with pytest.raises(ValueError, match="all assistant turns" if kept else "no row is left"):
                data.load(path, tiny, max_length, **how)
            return
        dataset = data.load(path, tiny, max_length, **how)
        assert_is(dataset, kept)
        ledger = dataclasses.asdict(dataset.ledger)
        assert Counter(ledger.pop("dropped")) == dropped
        names = "rows trained tokens target context truncated in_dropped_rows rows_truncated".split()
        assert {name: ledger[name] for name in names} == {name: expected[name] for name in names}
        parts = "target context truncated in_dropped_rows".split()
        assert ledger["tokens"] == sum(ledger[name] for name in parts)

    check()


def test_more_rows_than_one_batch_of_the_tokenizer_keep_their_order(tmp_path):
    """Rows are encoded a thousand at a time: none is lost or moved between batches."""
    rows = [{"prompt": str(i), "response": f"answer {i}"} for i in range(2001)]
    path = write(tmp_path / "rows.json", rows)
    dataset = data.load(path, tiny, 100)
    assert sources(dataset) == [f"{path}[{i}]" for i in range(2001)]
    for i in (0, 999, 1000, 1999, 2000):
        assert target_texts(dataset, i) == [f"answer {i}<|im_end|>"]


def test_the_digest_depends_on_tokens_targets_order_and_borders(tmp_path):
    """The digest, which resume compares, is equal for equal data and differs if a step would differ."""
    rows = [{"prompt": "a", "response": "b c"}, {"prompt": "d", "response": "e f"}]
    untrained = {"messages": [*chat("a", "b c"), *chat("d", "e f")]}
    untrained["messages"][1]["train"] = False

    def digest(rows, **how):
        return data.load(write(tmp_path / "rows.json", rows), tiny, **{"max_length": 100, **how}).digest

    variants = [rows, rows[::-1], rows[:1], rows + rows[:1],
                [{"messages": [*chat("a", "b c"), *chat("d", "e f")]}], [untrained],
                [rows[0], {"prompt": "d", "response": "e g"}]]
    digests = [*map(digest, variants), digest(rows, train_on_prompt=True), digest(rows, max_length=18)]
    assert len(set(digests)) == len(digests)
    assert [digest(variant) for variant in variants] == digests[: len(variants)]
    assert digest([{"messages": chat("a", "b c")}, {"instruction": "d", "output": "e f"}]) == digests[0]


# ---- rows without messages ------------------------------------------------------------------------------

EOS = RAW.token_to_id("<|endoftext|>")
TEXT = "one two three four five six seven eight nine ten"


def with_post_processor(path, **config):
    """A directory whose tokenizer.json adds <s> before each text, as Llama's does."""
    raw = Tokenizer.from_file(os.path.join(TINY, "tokenizer.json"))
    raw.add_special_tokens(["<s>"])
    raw.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", raw.token_to_id("<s>"))])
    return ChatTokenizer(make_directory(path, chatml("m.content"), raw=raw, bos_token="<s>", **config))


def test_every_token_of_a_text_is_a_target_but_the_first(tmp_path):
    """As transformers encodes it, with its EOS at the end. The text's own EOS is not doubled."""
    rows = [{"text": TEXT}, {"text": TEXT + "<|endoftext|>"}]
    dataset = data.load(write(tmp_path / "rows.json", rows), tiny, 100)
    ids = AutoTokenizer.from_pretrained(TINY)(TEXT)["input_ids"] + [EOS]
    assert_is(dataset, [(ids, [False] + [True] * (len(ids) - 1))] * 2)
    assert dataset.ledger.lines()[-1] == "turns    no row has messages, so whether turns end was not checked"


def test_a_text_begins_as_the_tokenizer_says(tmp_path):
    """The post-processor's BOS comes first, and once if the text brings its own; a chat gets none."""
    tokenizer = with_post_processor(tmp_path / "model")
    rows = [{"text": TEXT}, {"text": "<s>" + TEXT}, {"prompt": "a", "response": "b"}]
    dataset = data.load(write(tmp_path / "rows.json", rows), tokenizer, 100)
    ids = AutoTokenizer.from_pretrained(tmp_path / "model")(TEXT)["input_ids"]
    assert ids[0] == tokenizer.tokenizer.token_to_id("<s>")
    expected = ids + [EOS], [False] + [True] * len(ids)
    assert_is(dataset, [expected, expected, by_hand(chat("a", "b"))])


def test_a_tokenizer_without_eos_adds_none(tmp_path):
    tokenizer = ChatTokenizer(make_directory(tmp_path / "model", chatml("m.content"), eos_token=None))
    dataset = data.load(write(tmp_path / "rows.json", [{"text": TEXT}]), tokenizer, 100)
    assert dataset.tokens.tolist() == RAW.encode(TEXT).ids


@pytest.mark.parametrize("max_length", [2, 3, 4, 5, 7, 10, 11, 12, 13, 50])
def test_long_texts_are_cut_into_pieces_and_nothing_is_lost(max_length, tmp_path):
    """The pieces of a text are its tokens, in order; all but the first of each are targets, EOS always is.

    Only pieces of 2 tokens can't hold the last of an odd number of tokens; it is counted as truncated.
    """
    for n in range(1, 14):
        text = TEXT[: 3 * n]
        dataset = data.load(write(tmp_path / "rows.json", [{"text": text}, {"text": "b"}]), tiny, max_length)
        ids = RAW.encode(text).ids + [EOS]
        lost = int(max_length == 2 and len(ids) % 2)
        pieces = [dataset.tokens[a:b].tolist() for a, b in zip(dataset.starts, dataset.starts[1:])]
        assert sum(pieces[:-1], []) == ids[: len(ids) - lost]
        assert all(2 <= len(piece) <= max_length for piece in pieces)
        assert len(pieces) - 1 == -(-(len(ids) - lost) // max_length)
        for a, b in zip(dataset.starts, dataset.starts[1:]):
            assert dataset.loss_mask[a:b].tolist() == [False] + [True] * (b - a - 1)
        ledger = dataset.ledger
        assert (ledger.rows, ledger.trained, ledger.truncated) == (2, 2, lost)
        assert (ledger.context, ledger.target) == (len(pieces), len(dataset.tokens) - len(pieces))
        if len(pieces) > 2:
            assert f"pieces   1 texts longer than --max_length are cut into {len(pieces) - 1}" in ledger.lines()
        assert set(sources(dataset)[:-1]) == {f"{tmp_path / 'rows.json'}[0]"}


def test_tokens_are_trained_as_they_are(tmp_path):
    """Ids and targets of the row, without BOS or EOS; the first is never a target; --too_long holds."""
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [5, -100, 7, 8]},
            {"input_ids": [9, 10, 11], "loss_mask": [0, 0.5, 1]}]
    path = write(tmp_path / "rows.json", rows)
    dataset = data.load(path, tiny, 100)
    assert_is(dataset, [([5, 6, 7, 8], [False, False, True, True]), ([9, 10, 11], [False, True, True])])
    assert dataset.weights_of(1).tolist() == [0, 0.5, 1]
    assert_is(data.load(path, tiny, 3), [([5, 6, 7], [False, False, True]), ([9, 10, 11], [False, True, True])])
    assert sources(data.load(path, tiny, 3, too_long="drop")) == [f"{path}[1]"]
    with pytest.raises(ValueError, match="has 4 tokens, more than --max_length 3"):
        data.load(path, tiny, 3, too_long="error")


@pytest.mark.parametrize("row, message", [
    ({"input_ids": [1, tiny.size], "loss_mask": [0, 1]}, f"has the ids 0 to {tiny.size - 1}, but not {tiny.size};"),
    ({"input_ids": [1, -1], "loss_mask": [0, 1]}, "a list of token ids, it is [1, -1]"),
    ({"input_ids": [1, 2], "loss_mask": [1]}, "a number for each of the 2 input_ids"),
    ({"input_ids": [1, 2], "loss_mask": [0, -1]}, "numbers of at least 0, it has -1"),
    ({"input_ids": [1, 2], "loss_mask": [0, float("nan")]}, "it is [0, NaN]"),
])
def test_unusable_tokens_name_the_row(row, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape("rows.json[0]: ") + ".*" + re.escape(message)):
        data.load(write(tmp_path / "rows.json", [row]), tiny, 100)


def test_conversations_without_a_complete_turn_do_not_start(tmp_path):
    """All answers are cut: no end of a turn is trained. Texts beside them do not change that; alone they are fine."""
    long = {"prompt": "a", "response": "b c d e f g h"}
    for rows in ([long] * 9, [long, {"text": TEXT}]):
        with pytest.raises(ValueError, match="all assistant turns of the .* are truncated.*raise --max_length 18"):
            data.load(write(tmp_path / "rows.json", rows), tiny, 18)
    dataset = data.load(write(tmp_path / "rows.json", [long, {"prompt": "a", "response": "b"}]), tiny, 18)
    assert dataset.ledger.turns == 1


def test_only_conversations_count_in_the_stop_gate(tmp_path):
    """A thousand texts don't hide one conversation whose turn has no end."""
    tokenizer = ChatTokenizer(make_directory(tmp_path / "model", "{% for m in messages %}{{ m.role + ': ' + "
                                             "m.content + '\n' }}{% endfor %}"))
    rows = [{"text": TEXT}] * 1000 + [{"prompt": "a", "response": "b"}]
    with pytest.raises(ValueError, match="only 0 of 1 assistant turns"):
        data.load(write(tmp_path / "rows.json", rows), tokenizer, 100)


def test_settings_without_effect_on_the_rows_are_errors(tmp_path):
    """--too_long where all rows are plain texts; those about turns where no row has messages; --train_reasoning false
    where no answer has reasoning."""
    def check(train, val=None, **settings):
        sets = [data.load(write(tmp_path / f"{i}.json", rows), tiny, 100) for i, rows in enumerate((train, val)) if rows]
        check_settings(sft.Config(**settings), sets[0], sets[1] if val else None)

    text, tokens = [{"text": TEXT}], [{"input_ids": [1, 2], "loss_mask": [0, 1]}]
    with pytest.raises(ValueError, match="--epochs 1e.18 with --batch_tokens: at most 10,000 epochs"):
        check(tokens, epochs=1e18, batch_tokens=100)  # to plan them would take for ever
    check(tokens, epochs=1e18, batch_tokens=100, max_steps=1)
    conversation = [{"prompt": "a", "response": "b"}]
    for how in "truncate", "drop", "error":
        with pytest.raises(ValueError, match=f"--too_long {how}: no effect, because plain texts are cut"):
            check(text, too_long=how)
        check(tokens, too_long=how)
        check(text, conversation, too_long=how)
    for settings in dict(train_on="last"), dict(train_on_prompt=True), dict(split_turns=True):
        with pytest.raises(ValueError, match="--(train_on|split_turns).*no row has messages"):
            check(text, tokens, **settings)
        check(text + conversation, **settings)
    with pytest.raises(ValueError, match="--train_reasoning false: no effect, because no trained answer has reasoning"):
        check(conversation, conversation, train_reasoning=False)
    thought = [{"prompt": "a", "response": "<think>\nhm\n</think>\n\nb"}]
    check(thought, conversation, train_reasoning=False)
    check(conversation, thought, train_reasoning=False)
    check(text)


# ---- rows that can't be used ------------------------------------------------------------------------------


GOOD = {"prompt": "a", "response": "b"}


def lines_of(rows):
    """JSON Lines; a text is written as it is."""
    return "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)


def test_all_bad_rows_of_a_file_are_in_one_error(tmp_path):
    """By row, or by line where a line is not JSON: each with its own reason; the rows of another file are not read."""
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text(lines_of([GOOD, {"prompt": "a"}, "{nonsense\n", GOOD, {"messages": []}]))
    second.write_text(lines_of([{"prompt": "c"}]))
    with pytest.raises(UserError) as error:
        data.load(f"{first},{second}", tiny, 100)
    head, *rows = str(error.value).splitlines()
    assert head == "3 rows can't be used; correct them, or drop them with --bad_rows drop:"
    places = [f"{first} line 2: no answer to", f"{first} line 3, column 2 is not JSON",
              f'{first} line 5: "messages" must be a non-empty list']
    assert [row.strip()[: len(place)] for row, place in zip(rows, places, strict=True)] == places


@pytest.mark.parametrize("n_bad, named", [(1, 1), (2, 2), (20, 20), (21, 20), (400, 20)])
def test_the_first_bad_rows_are_named_and_all_are_counted(n_bad, named, tmp_path):
    path = write(tmp_path / "rows.json", [GOOD, *[{"prompt": "a"}] * n_bad, GOOD])
    with pytest.raises(UserError) as error:
        data.load(path, tiny, 100)
    text = str(error.value)
    assert text.count(f"{path}[") == named and f"{path}[1]" in text and f"{path}[{named}]" in text
    assert (f"{n_bad} rows can't be used" in text) == (n_bad > 1)
    assert (f"and {n_bad - 20} more" in text) == (n_bad > 20)
    assert ("--bad_rows drop leaves it out" in text) == (n_bad == 1)


def test_a_file_of_nothing_but_bad_rows_is_not_read_to_its_end(tmp_path):
    """After a thousand bad rows without a good one; a good one before keeps it reading. Only then is --bad_rows drop
    of use."""
    for n_rows, head in (1500, "none of the first 1,000 rows can be used; correct them:\n"), (1, ".*--response_key COLUMN$"):
        with pytest.raises(UserError, match=f"^{head}"):
            data.load(write(tmp_path / "rows.json", [{"prompt": "a"}] * n_rows), tiny, 100)
    path = write(tmp_path / "rows.json", [GOOD] + [{"prompt": "a"}] * 1500)
    with pytest.raises(UserError, match="^1,500 rows can't be used"):
        data.load(path, tiny, 100)


def test_bad_rows_are_dropped_and_counted(tmp_path):
    """With --bad_rows drop. Their reasons are warnings: three, and the number of the others."""
    path = tmp_path / "rows.jsonl"
    path.write_text(lines_of([GOOD, *[{"prompt": "a"}] * 4, "{nonsense\n", {"prompt": "c", "response": "d"}]))
    dataset = data.load(str(path), tiny, 100, bad_rows="drop")
    assert list(dataset.row) == [0, 6] and dataset.ledger.dropped == {"bad": 5}
    lines = dataset.ledger.lines()
    assert lines[0] == "rows     7 in = 2 trained + 5 dropped (5 bad)"
    assert [line.partition(": ")[0] for line in lines[-4:]] == [
        *(f"warning  {path} line {i}" for i in (2, 3, 4)), "warning  and 2 more"]
    with pytest.raises(UserError, match=r"no row is left .* all dropped \(1 bad\); the first: .*bad.json\[0\]: no answer"):
        data.load(write(tmp_path / "bad.json", [{"prompt": "a"}]), tiny, 100, bad_rows="drop")


def test_columns_that_are_not_used_and_look_misspelled_come_first(tmp_path):
    """So do keys of messages; a known name with more letters is another word. A warning names the first row."""
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "wieght": 0}]
    row = {"id": 1, "context_id": "x", "messages": messages, "sytem": "s"}
    path = write(tmp_path / "rows.json", [{"prompt": "q", "response": "a"}, row, row])
    lines = data.load(path, tiny, 100).ledger.lines()
    assert lines[-3:] == (
        "columns not used: sytem (system?), messages.wieght (weight?), id, context_id",
        f'warning  {path}[1]: "sytem" is not used; should it be "system"?',
        f'warning  {path}[1]: "messages.wieght" is not used; should it be "weight"?')


def test_names_of_columns_cannot_change_the_terminal(tmp_path):
    """Control characters and line breaks in them are escaped, on the ledger's lines and in errors."""
    name = "note\n\n\x1b[31mred\u202e"
    ledger = data.load(write(tmp_path / "rows.json", [{**GOOD, name: 1}]), tiny, 100).ledger
    assert ledger.lines()[-1] == r"columns not used: note \x1b[31mred\u202e"
    path = write(tmp_path / "bad.json", [{name: "a", "x": "b"}])
    command = [sys.executable, os.path.join(ROOT, "tools", "show.py"), "show", path, "--model", "tiny"]
    error = subprocess.run(command, capture_output=True, text=True).stderr
    assert error.startswith("show.py: error: ") and error.endswith("\n") and error[:-1].isprintable()


def test_columns_that_are_new_in_each_row_take_bounded_memory(tmp_path):
    ledger = data.load(write(tmp_path / "rows.json", [{**GOOD, f"c{i}": 1} for i in range(1500)]), tiny, 100).ledger
    assert len(ledger.unused) == 1000 and ledger.lines()[-1].endswith("c18, c19 and 980 more")


def test_progress_is_shown_after_each_megabyte(tmp_path, monkeypatch):
    """And not only after a thousand rows: --timeout counts from one batch to the next."""
    assert text.conversations.BATCH_CHARACTERS == 2**20
    monkeypatch.setattr(text.conversations, "BATCH_CHARACTERS", 1000)
    rows = [{"prompt": "x", "response": "y " * 300} for _ in range(4)]
    calls = []
    loaded = data.load(write(tmp_path / "long.json", rows), ChatTokenizer(TINY), 1000, progress=lambda: calls.append(1))
    assert len(calls) == 2 and len(loaded) == 4


@pytest.mark.parametrize("characters, read", [(1, [3, 4, 5, 5, 5]), (2**20, [3, 4, 5, 5, 5]),
                                              (2 * 2**20, [2, 3, 4, 5, 5]), (4 * 2**20, [1, 2, 3, 4, 5])])
def test_batches_are_encoded_ahead_but_few_long_rows(characters, read, monkeypatch):
    """How many batches are read when each one's encodings are ready. The tokens of long rows would fill the memory."""
    tokenizer, pulled, found = ChatTokenizer(TINY), [], []
    monkeypatch.setattr(tokenizer, "tokenizer", SimpleNamespace(encode_batch=lambda texts, **_: list(map(len, texts))))

    def batches():
        for i in range(5):
            pulled.append(i)
            yield [SimpleNamespace(text="a" * (characters + i))]

    for batch, encodings in tokenizer.encode_ahead(batches()):
        assert encodings == [len(batch[0].text)]
        found.append(len(pulled))
    assert found == read
