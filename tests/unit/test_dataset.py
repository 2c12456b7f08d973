"""A loaded dataset: its ledger balances to the token, rows keep their order, and the digest depends on the content."""

import dataclasses
import re
from collections import Counter

import pytest
from data_helpers import assert_is, by_hand, conversations, repeatable, sources, tiny
from helpers import chat, target_texts, write
from hypothesis import given
from hypothesis import strategies as st

import data

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
        "rows     4 in = 3 trained + 1 dropped, 1 without targets after truncation",
        "tokens   107 in = 10 target + 48 context + 19 truncated (of 2 rows) + 30 in dropped rows")


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
        path = write(tmp_path / "rows.json", [{"messages": messages} for messages in batch])
        how = dict(too_long=too_long, train_on_prompt=on_prompt)
        if not kept:
            with pytest.raises(ValueError, match="no row is left"):
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
