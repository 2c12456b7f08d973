"""Packing: each conversation is in one micro-batch, ranks are even, micro-batches are few; their content."""

import numpy as np
import pytest
import torch
from data_helpers import by_hand, conversations, lognormal, repeatable, tiny
from helpers import chat, write
from hypothesis import given
from hypothesis import strategies as st

import data
from ops.attention import Documents
from ops.packing import assign_least_loaded, ceil_div, pack, split_over_ranks


@st.composite
def packings(draw):
    lengths = draw(st.lists(st.integers(1, 50), min_size=1, max_size=40))
    capacity = max(lengths) + draw(st.integers(0, 100))
    return lengths, capacity, draw(st.sampled_from([None, 1, 2, 5])), draw(st.integers(1, 5))


@repeatable
@given(packings())
def test_packing_is_a_partition_within_its_limits(packing):
    """All ranks together have every conversation once, no micro-batch exceeds its limits, all ranks have the same
    number of micro-batches, and a second call returns the same."""
    lengths, capacity, max_conversations, dp_size = packing
    ranks = [pack(lengths, capacity, max_conversations, rank, dp_size) for rank in range(dp_size)]
    assert len({len(rank) for rank in ranks}) == 1
    batches = [batch for rank in ranks for batch in rank]
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in batch) <= capacity for batch in batches)
    assert all(len(batch) <= (max_conversations or len(lengths)) for batch in batches)
    assert ranks == [pack(np.array(lengths), capacity, max_conversations, rank, dp_size) for rank in range(dp_size)]
    if dp_size == 1:
        assert all(batches)


@repeatable
@given(packings())
def test_packing_takes_few_micro_batches_and_loads_them_evenly(packing):
    """Micro-batches differ by at most the longest conversation, and no two of them are less than half full."""
    lengths, capacity, _, dp_size = packing
    loads = [[sum(lengths[i] for i in batch) for batch in pack(lengths, capacity, None, rank, dp_size)]
             for rank in range(dp_size)]
    flat = [load for rank in loads for load in rank]
    assert max(flat) - min(flat) <= max(lengths)
    assert len(loads[0]) <= max(1, ceil_div(2 * sum(lengths), capacity * dp_size))


def test_packing_of_a_few_lengths():
    """The longest go first, each into the emptiest micro-batch; there are only as many micro-batches as needed."""
    assert pack([1, 4, 2, 3], 5) == [[1, 0], [3, 2]]
    assert pack([5, 4, 3, 3, 3], 9) == [[0], [1, 4], [2, 3]]
    assert pack([5, 4, 3, 3, 3], 18) == [[0, 1, 2, 3, 4]]
    assert pack([5, 4, 3, 3, 3], 18, max_conversations=2) == [[0], [1, 4], [2, 3]]
    assert [pack([1, 4, 2, 3], 5, None, rank, 2) for rank in (0, 1)] == [[[1, 0]], [[3, 2]]]


def test_items_go_to_the_least_loaded_bin_that_is_open():
    """Worked out by hand: bin 1 has the least cost, but is closed when an item does not fit; bin 0 gets the rest."""
    bins, capacity_left = [0], [10, 3]
    assign_least_loaded(bins, np.array([1, 2, 2, 1]), costs=np.array([5, 1, 1, 1]), capacity_left=capacity_left)
    assert (bins, capacity_left) == ([0, 1, 0, 0], [7, 1])
    assign_least_loaded(bins, np.array([1, 2, 2, 1, 9]), costs=np.array([5, 1, 1, 1, 1]), capacity_left=capacity_left)
    assert (bins, capacity_left) == ([0, 1, 0, 0], [7, 1])  # 9 fits into no bin


# ---- ranks are even -------------------------------------------------------------------------------------


def steps_of(dp_size, count, per_rank=64):
    """The lengths of `count` steps, (count, conversations); per_rank conversations per rank in each step."""
    return lognormal(count * dp_size * per_rank).reshape(count, dp_size * per_rank)


def unevenness(sums):
    return (max(sums) - min(sums)) / (sum(sums) / len(sums))


def rank_sums(lengths, dp_size, capacity=2048):
    """(tokens of each rank, squared lengths of each rank), counted from the micro-batches."""
    ranks = [lengths[sum(pack(lengths, capacity, None, rank, dp_size), [])] for rank in range(dp_size)]
    return [int(n.sum()) for n in ranks], [int((n**2).sum()) for n in ranks]


@pytest.mark.parametrize("dp_size, count", [(16, 30), (32, 15), (64, 6), (128, 1)])
def test_ranks_are_even_in_tokens_and_in_attention(dp_size, count):
    """With 64 conversations per rank, the ranks of every step are within 2 % in tokens, 5 % in squared lengths."""
    for lengths in steps_of(dp_size, count):
        tokens, squares = rank_sums(lengths, dp_size)
        assert unevenness(tokens) < 0.02
        assert unevenness(squares) < 0.05


@pytest.mark.parametrize("dp_size", [2, 3, 8])
def test_few_ranks_are_as_even_as_their_conversations_allow(dp_size):
    """One conversation may cost more than a rank's fraction of the step. In about 1 step of 100 no split is even in
    squared lengths."""
    sums = [rank_sums(lengths, dp_size) for lengths in steps_of(dp_size, 1200 // dp_size)]
    assert max(unevenness(tokens) for tokens, _ in sums) < 0.02
    uneven = sum(unevenness(squares) >= 0.05 for _, squares in sums)
    assert uneven <= 0.02 * len(sums) and np.median([unevenness(squares) for _, squares in sums]) < 0.01


def test_1024_ranks_are_even():
    """1,024 ranks, measured on split_over_ranks, which pack() of three of the ranks then agrees with."""
    lengths, dp_size = lognormal(1024 * 64), 1024
    order = np.argsort(-lengths, kind="stable")
    ranks = split_over_ranks(lengths[order], dp_size)
    tokens = [int(lengths[order[ranks == rank]].sum()) for rank in range(dp_size)]
    squares = [int((lengths[order[ranks == rank]] ** 2).sum()) for rank in range(dp_size)]
    assert unevenness(tokens) < 0.02 and unevenness(squares) < 0.05
    batches = {rank: pack(lengths, 2048, None, rank, dp_size) for rank in (0, 517, 1023)}
    assert len({len(rank) for rank in batches.values()}) == 1
    for rank, batches_of_rank in batches.items():
        assert sorted(i for batch in batches_of_rank for i in batch) == sorted(order[ranks == rank].tolist())


@repeatable
@given(st.lists(st.integers(1, 2048), min_size=1, max_size=120), st.integers(1, 9))
def test_no_rank_is_ahead_by_more_than_a_conversation(lengths, dp_size):
    """Whatever the lengths, the tokens of two ranks differ by at most the longest conversation."""
    tokens, _ = rank_sums(np.array(lengths), dp_size)
    assert max(tokens) - min(tokens) <= max(*lengths, dp_size)


def test_without_packing_ranks_take_turns():
    """--no-packing: every rank gets the same number of conversations, and at each turn about the same length."""
    lengths = lognormal(8 * 64)
    ranks = [pack(lengths, 2048, 1, rank, 8) for rank in range(8)]
    assert [len(rank) for rank in ranks] == [64] * 8
    assert all(len(batch) == 1 for rank in ranks for batch in rank)
    assert unevenness([sum(int(lengths[batch].sum()) for batch in rank) for rank in ranks]) < 0.1
    slowest = sum(max(int(lengths[rank[turn]].sum()) for rank in ranks) for turn in range(64))
    assert slowest < 1.15 * lengths.sum() / 8  # all ranks wait for the slowest of each turn


# ---- micro-batches are few, and within their limits -----------------------------------------------------


@pytest.mark.parametrize("capacity", [2048, 4096, 8192, 16384])
@pytest.mark.parametrize("dp_size, count", [(1, 200), (8, 40), (64, 10)])
def test_micro_batches_are_within_one_of_the_fewest(dp_size, count, capacity):
    """In 95 of 100 steps a rank has at most one micro-batch more than tokens / ranks / capacity; mostly none."""
    more = []
    for lengths in steps_of(dp_size, count):
        n_batches = len(pack(lengths, capacity, None, dp_size // 2, dp_size))
        more.append(n_batches - ceil_div(int(lengths.sum()), dp_size * capacity))
    assert min(more) >= 0 and np.mean(np.array(more) <= 1) >= 0.95 and np.mean(np.array(more) == 0) > 0.8


LENGTHS = {
    "real": lognormal(64 * 7),
    "equal": np.full(100, 50),
    "each fills a micro-batch": np.full(30, 2048),
    "two never fit": np.full(31, 1025),
    "one long, many short": np.array([2048] + [1] * 300),
    "falling": np.arange(2048, 0, -17),
    "as many as ranks": np.array([5, 1, 2048, 3, 3, 3, 4]),
    "fewer than ranks": np.array([7, 2048]),
    "one": np.array([2048]),
    "none": np.array([], dtype=np.int64),
}


@pytest.mark.parametrize("max_conversations", [None, 1, 4])
@pytest.mark.parametrize("dp_size", [1, 2, 7])
@pytest.mark.parametrize("name", LENGTHS)
def test_every_conversation_is_in_one_micro_batch_of_one_rank(name, dp_size, max_conversations):
    """No micro-batch exceeds its limits, all ranks have the same number of them, and no more than necessary."""
    lengths = LENGTHS[name]
    ranks = [pack(lengths, 2048, max_conversations, rank, dp_size) for rank in range(dp_size)]
    assert len({len(rank) for rank in ranks}) == 1
    batches = [batch for rank in ranks for batch in rank]
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(lengths[batch].sum() <= 2048 and len(batch) <= (max_conversations or len(lengths)) for batch in batches)
    if max_conversations:
        at_a_time = dp_size * min(max_conversations, 2048 // max(lengths, default=1))
        assert len(ranks[0]) == max(1, ceil_div(len(lengths), at_a_time))
    else:  # no two are less than half full; conversations longer than half a micro-batch are in one each
        assert len(ranks[0]) <= max(1, (lengths > 1024).sum(), ceil_div(2 * lengths.sum(), 2048 * dp_size))


@repeatable
@given(st.lists(st.integers(1, 99), min_size=1, max_size=80), st.integers(0, 60), st.integers(1, 6))
def test_the_result_does_not_depend_on_the_integer_type(lengths, slack, dp_size):
    """Lists, and integers of 16, 32 and 64 bits, also where their squares would overflow."""
    lengths = [600 * n for n in lengths]
    capacity = max(lengths) + 600 * slack
    inputs = [lengths, *(np.array(lengths, dtype=dtype) for dtype in (np.int64, np.int32, np.uint16))]
    results = [[pack(of_a_type, capacity, None, rank, dp_size) for rank in range(dp_size)] for of_a_type in inputs]
    assert all(result == results[0] for result in results)


def test_the_result_for_fixed_lengths_is_pinned():
    """Ranks on different machines and versions must compute the same, and a resumed run the same as before."""
    lengths = [700, 30, 410, 55, 90, 120, 8, 260, 75, 190, 33, 61, 140, 17, 480, 25]
    assert [pack(lengths, 700, None, rank, 3) for rank in range(3)] == [
        [[0], [8, 11, 10, 15]],
        [[14], [12, 5, 4, 3, 13]],
        [[2, 1, 6], [7, 9]]]


# ---- the content of micro-batches -----------------------------------------------------------------------


def dataset_of(batch, path, **options):
    return data.load(write(path, [{"messages": messages} for messages in batch]), tiny, 10**6, **options)


def conversations_in(batch):
    """The conversations of a micro-batch: [(inputs, [(position, the target that follows it), ...]), ...]."""
    result, start = [], 0
    for length in batch.lengths:
        positions, targets = batch.target_positions.tolist(), batch.targets.tolist()
        pairs = [(position - start, target) for position, target in zip(positions, targets)
                 if start <= position < start + length]
        result.append((batch.tokens[start : start + length].tolist(), pairs))
        start += length
    return result


def test_micro_batches_ask_for_the_next_token_where_it_is_a_target(tmp_path):
    """Inputs end before the last target. target_positions are the positions whose next token is a target, found
    here by hand."""

    @repeatable
    @given(st.lists(conversations(), min_size=1, max_size=5), st.integers(0, 80),
           st.sampled_from([None, 1, 2]), st.booleans())
    def check(conversations_, slack, max_conversations, on_prompt):
        conversations_ = [chat("always", "one"), *conversations_]
        dataset = dataset_of(conversations_, tmp_path / "rows.json", train_on_prompt=on_prompt)
        expected = []
        for ids, mask in map(by_hand, conversations_):
            mask = [False] + [True] * (len(ids) - 1) if on_prompt else mask
            if any(mask):
                targets = [position for position, is_target in enumerate(mask) if is_target]
                expected.append((ids[: targets[-1]], [(position - 1, ids[position]) for position in targets]))
        got, capacity = [], int(dataset.n_inputs.max()) + slack
        for batch in data.micro_batches(dataset, range(len(dataset)), capacity, max_conversations):
            assert batch.tokens.dtype == batch.target_positions.dtype == batch.targets.dtype == torch.int64
            assert batch.tokens.shape == (sum(batch.lengths),)
            assert batch.target_positions.shape == batch.targets.shape
            assert batch.target_positions.tolist() == sorted(set(batch.target_positions.tolist()))
            assert sum(batch.lengths) <= capacity and len(batch.lengths) <= (max_conversations or 99)
            got += conversations_in(batch)
        assert sorted(got) == sorted(expected)
        assert all(pairs[-1][0] == len(inputs) - 1 for inputs, pairs in got)
        assert sum(len(pairs) for _, pairs in got) == dataset.ledger.target

    check()


@pytest.mark.parametrize("on_prompt", [False, True])
def test_each_target_has_its_conversation(on_prompt, tmp_path):
    """One index of the dataset for each target, whatever the order and the lengths of the conversations.

    With on_prompt the first position of a conversation has a target too.
    """
    dataset = dataset_of([chat(f"q{i}", "answer " * (i % 3 + 1)) for i in range(7)], tmp_path / "rows.json",
                         train_on_prompt=on_prompt)
    for batch in data.micro_batches(dataset, np.array([6, 1, 4, 2]), 60):
        owners = [i for i, (_, pairs) in zip(batch.ids.tolist(), conversations_in(batch), strict=True)
                  for _ in pairs]
        assert batch.conversation_of_target.dtype == torch.int64
        assert batch.conversation_of_target.tolist() == owners
        assert np.bincount(owners, minlength=7)[batch.ids].tolist() == dataset.n_targets[batch.ids].tolist()


@pytest.mark.parametrize("ids", [[3], []])
def test_a_rank_without_conversations_gets_one_token_and_no_target(ids, tmp_path):
    """All ranks must take part in each micro-batch, because collectives wait for all of them."""
    dataset = dataset_of([chat(f"q{i}", "answer") for i in range(4)], tmp_path / "rows.json")
    (idle,) = data.micro_batches(dataset, np.array(ids, dtype=int), 60, dp_rank=1, dp_size=2)
    assert idle.tokens.tolist() == [0] and idle.lengths == (1,) and idle.ids.tolist() == []
    for tensor in (idle.target_positions, idle.targets, idle.conversation_of_target):
        assert tensor.shape == (0,) and tensor.dtype == torch.int64


@pytest.mark.parametrize("ids", [[2], [3, 1], [0, 1, 2], []])
def test_all_tensors_of_a_micro_batch_are_views_of_one_buffer(ids, tmp_path):
    """So one copy moves them. Its Documents equal those made from the lengths, also for an odd number of offsets."""
    dataset = dataset_of([chat(f"q{i}", "answer " * (i + 1)) for i in range(4)], tmp_path / "rows.json")
    batch = data.collate(dataset, np.array(ids, dtype=int))
    expected = Documents.of(batch.lengths)
    assert batch.documents.longest == expected.longest and batch.documents.lengths == expected.lengths
    for name in ("positions", "offsets"):
        tensor, other = getattr(batch.documents, name), getattr(expected, name)
        assert torch.equal(tensor, other) and tensor.dtype == other.dtype and tensor.is_contiguous()
    storage = batch.buffer.untyped_storage().data_ptr()
    tensors = (batch.tokens, batch.target_positions, batch.targets, batch.conversation_of_target,
               batch.documents.positions, batch.documents.offsets)
    assert all(tensor.untyped_storage().data_ptr() == storage for tensor in tensors)
    copy = batch.to("meta")
    assert copy.tokens.is_meta and copy.documents.offsets.is_meta and copy.ids is batch.ids


def test_micro_batches_contain_only_conversations_of_the_step(tmp_path):
    """The ids of a step choose the conversations; no micro-batch contains others."""
    batch = [chat(f"q{i}", f"answer {i}") for i in range(6)]
    dataset = dataset_of(batch, tmp_path / "rows.json")
    batches = data.micro_batches(dataset, np.array([4, 1, 5]), 60)
    got = [inputs for micro_batch in batches for inputs, _ in conversations_in(micro_batch)]
    expected = [by_hand(batch[i])[0][: dataset.n_inputs[i]] for i in (4, 1, 5)]
    assert sorted(got) == sorted(expected)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_all_ranks_yield_the_same_number_of_micro_batches(count, dp_size, tmp_path):
    """Also in a step with fewer conversations than ranks. Together they have all targets of the step."""
    dataset = dataset_of([chat(f"q{i}", f"answer {i}") for i in range(8)], tmp_path / "rows.json")
    ids = list(range(count))
    ranks = [list(data.micro_batches(dataset, ids, 60, dp_rank=rank, dp_size=dp_size)) for rank in range(dp_size)]
    assert len({len(rank) for rank in ranks}) == 1
    targets = [target for rank in ranks for batch in rank for target in batch.targets.tolist()]
    expected = []
    for i in ids:
        tokens, mask = by_hand(chat(f"q{i}", f"answer {i}"))
        expected += [token for token, is_target in zip(tokens, mask, strict=True) if is_target]
    assert sorted(targets) == sorted(expected)
