"""The plan of an epoch at the scale of real runs: even ranks, few micro-batches, full steps, each conversation once."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data

repeatable = settings(deadline=None, derandomize=True, database=None, max_examples=150)


def lognormal(count, seed=0):
    """Lengths as of real conversations: median 120, a long tail, cut at 2,048."""
    normal = np.random.default_rng(seed).standard_normal(count)
    return np.clip(120 * np.exp(normal), 8, 2048).astype(np.int64)


def steps_of(dp_size, count, per_rank=64):
    """`count` steps of 64 conversations a rank, as lengths."""
    return lognormal(count * dp_size * per_rank).reshape(count, dp_size * per_rank)


def unevenness(sums):
    return (max(sums) - min(sums)) / (sum(sums) / len(sums))


def rank_sums(lengths, dp_size, capacity=2048):
    """(tokens, squared lengths) of each rank, counted from its micro-batches."""
    ranks = [lengths[sum(data.pack(lengths, capacity, None, rank, dp_size), [])] for rank in range(dp_size)]
    return [int(n.sum()) for n in ranks], [int((n**2).sum()) for n in ranks]


# ---------------------------------------------------------------------------------------------------------------------
# ranks are even


@pytest.mark.parametrize("dp_size, count", [(16, 30), (32, 15), (64, 6), (128, 1)])
def test_ranks_are_even_in_tokens_and_in_attention(dp_size, count):
    """With 64 conversations a rank, every step's ranks are within 2 % in tokens, 5 % in squared lengths."""
    for lengths in steps_of(dp_size, count):
        tokens, squares = rank_sums(lengths, dp_size)
        assert unevenness(tokens) < 0.02 and unevenness(squares) < 0.05, (unevenness(tokens), unevenness(squares))


@pytest.mark.parametrize("dp_size", [2, 3, 8])
def test_few_ranks_are_as_even_as_their_conversations_allow(dp_size):
    """One conversation may cost more than a rank's share: in about 1 step of 100 no plan is even in squares."""
    sums = [rank_sums(lengths, dp_size) for lengths in steps_of(dp_size, 1200 // dp_size)]
    assert max(unevenness(tokens) for tokens, _ in sums) < 0.02
    uneven = sum(unevenness(squares) >= 0.05 for _, squares in sums)
    assert uneven <= 0.02 * len(sums) and np.median([unevenness(squares) for _, squares in sums]) < 0.01


def test_1024_ranks_are_even():
    """The same with 1,024 ranks, from what all of them share; a rank's micro-batches hold what that says."""
    lengths, dp_size = lognormal(1024 * 64), 1024
    order = np.argsort(-lengths, kind="stable")
    ranks = data.share(lengths[order], dp_size)
    tokens = [int(lengths[order[ranks == rank]].sum()) for rank in range(dp_size)]
    squares = [int((lengths[order[ranks == rank]] ** 2).sum()) for rank in range(dp_size)]
    assert unevenness(tokens) < 0.02 and unevenness(squares) < 0.05
    batches = {rank: data.pack(lengths, 2048, None, rank, dp_size) for rank in (0, 517, 1023)}
    assert len({len(rank) for rank in batches.values()}) == 1
    for rank, its in batches.items():
        assert sorted(i for batch in its for i in batch) == sorted(order[ranks == rank].tolist())


@repeatable
@given(st.lists(st.integers(1, 2048), min_size=1, max_size=120), st.integers(1, 9))
def test_no_rank_is_ahead_by_more_than_a_conversation(lengths, dp_size):
    """Whatever the lengths are, ranks' tokens differ by no more than the longest has."""
    tokens, _ = rank_sums(np.array(lengths), dp_size)
    assert max(tokens) - min(tokens) <= max(*lengths, dp_size)


def test_without_packing_ranks_take_turns():
    """--no-packing: as many conversations a rank, and each time about as long ones on all of them."""
    lengths = lognormal(8 * 64)
    ranks = [data.pack(lengths, 2048, 1, rank, 8) for rank in range(8)]
    assert [len(rank) for rank in ranks] == [64] * 8 and all(len(batch) == 1 for rank in ranks for batch in rank)
    assert unevenness([sum(int(lengths[batch].sum()) for batch in rank) for rank in ranks]) < 0.1
    together = sum(max(int(lengths[rank[place]].sum()) for rank in ranks) for place in range(64))
    assert together < 1.15 * lengths.sum() / 8  # what is waited for


# ---------------------------------------------------------------------------------------------------------------------
# micro-batches are few, and hold what they may


@pytest.mark.parametrize("capacity", [2048, 4096, 8192, 16384])
@pytest.mark.parametrize("dp_size, count", [(1, 200), (8, 40), (64, 10)])
def test_micro_batches_are_within_one_of_the_fewest(dp_size, count, capacity):
    """A rank executes at most one more than tokens / ranks / capacity ask for, in 95 of 100 steps; mostly none more."""
    more = []
    for lengths in steps_of(dp_size, count):
        n_batches = len(data.pack(lengths, capacity, None, dp_size // 2, dp_size))
        more.append(n_batches - -(-int(lengths.sum()) // (dp_size * capacity)))
    assert min(more) >= 0 and np.mean(np.array(more) <= 1) >= 0.95 and np.mean(np.array(more) == 0) > 0.8


LENGTHS = {
    "real": lognormal(64 * 7),
    "equal": np.full(100, 50),
    "each fills one": np.full(30, 2048),
    "two never fit": np.full(31, 1025),
    "a giant among dwarfs": np.array([2048] + [1] * 300),
    "falling": np.arange(2048, 0, -17),
    "as many as ranks": np.array([5, 1, 2048, 3, 3, 3, 4]),
    "fewer than ranks": np.array([7, 2048]),
    "one": np.array([2048]),
    "none": np.array([], dtype=np.int64),
}


@pytest.mark.parametrize("max_rows", [None, 1, 4])
@pytest.mark.parametrize("dp_size", [1, 2, 7])
@pytest.mark.parametrize("name", LENGTHS)
def test_every_conversation_is_in_one_micro_batch_of_one_rank(name, dp_size, max_rows):
    """No more tokens or conversations than fit, equally many micro-batches on each rank, and none is without cause."""
    lengths = LENGTHS[name]
    ranks = [data.pack(lengths, 2048, max_rows, rank, dp_size) for rank in range(dp_size)]
    assert len({len(rank) for rank in ranks}) == 1
    batches = [batch for rank in ranks for batch in rank]
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(lengths[batch].sum() <= 2048 and len(batch) <= (max_rows or len(lengths)) for batch in batches)
    if max_rows:
        rows = dp_size * min(max_rows, 2048 // max(lengths, default=1))
        assert len(ranks[0]) == max(1, -(-len(lengths) // rows))
    else:  # no two half-empty ones, and of those longer than half a micro-batch one in each
        assert len(ranks[0]) <= max(1, (lengths > 1024).sum(), -(-2 * lengths.sum() // (2048 * dp_size)))


@repeatable
@given(st.lists(st.integers(1, 99), min_size=1, max_size=80), st.integers(0, 60), st.integers(1, 6))
def test_a_plan_is_the_same_from_any_integers(lengths, slack, dp_size):
    """Lists, 16, 32 and 64 bits: ranks plan alike whatever type lengths come in, also where squares do not fit it."""
    lengths = [600 * n for n in lengths]
    capacity = max(lengths) + 600 * slack
    kinds = [lengths, *(np.array(lengths, dtype=kind) for kind in (np.int64, np.int32, np.uint16))]
    plans = [[data.pack(kind, capacity, None, rank, dp_size) for rank in range(dp_size)] for kind in kinds]
    assert all(plan == plans[0] for plan in plans)


def test_the_plan_of_these_lengths_is_this():
    """Pinned: ranks of different machines or versions must not plan differently."""
    lengths = [700, 30, 410, 55, 90, 120, 8, 260, 75, 190, 33, 61, 140, 17, 480, 25]
    assert [data.pack(lengths, 700, None, rank, 3) for rank in range(3)] == [
        [[0], [8, 11, 10, 15]],
        [[14], [12, 5, 4, 3, 13]],
        [[2, 1, 6], [7, 9]]]


# ---------------------------------------------------------------------------------------------------------------------
# steps


@pytest.mark.parametrize("batch_tokens", [2048, 12544, 131072])
def test_batch_tokens_cut_where_the_next_would_pass(batch_tokens):
    """The steps are those of counting one conversation after another; those of 131,072 tokens are all 98 % full."""
    sizes = lognormal(40_000)
    sampler = data.Sampler(sizes, 2, 42, 1, batch_tokens)
    order, per_epoch = data.Sampler(sizes, 2, 42, len(sizes)).step(2)[1], []
    for i in order.tolist():
        if not per_epoch or sizes[per_epoch[-1]].sum() + sizes[i] > batch_tokens:
            per_epoch.append([])
        per_epoch[-1].append(i)
    first = sampler.per_epoch[0]
    assert [sampler.step(first + 1 + step)[1].tolist() for step in range(len(per_epoch))] == per_epoch
    assert len(sampler) == first + len(per_epoch)
    full = [sizes[step].sum() / batch_tokens for step in per_epoch[:-1]]
    assert max(full) <= 1 and np.mean(full) > {2048: 0.85, 12544: 0.98, 131072: 0.995}[batch_tokens]
    assert batch_tokens < 100_000 or min(full) > 0.98


@pytest.mark.parametrize("batch_tokens", [None, 2048])
def test_the_plan_of_an_epoch_has_no_object_for_each_row(batch_tokens):
    """What stays of an epoch's plan is two numbers of eight bytes a conversation, even where each is a step."""
    sizes = np.full(100_000, 2048)
    tracemalloc.start()
    try:
        sampler = data.Sampler(sizes, 1, 42, 1, batch_tokens)
        sampler.step(1)
        assert len(sampler) == 100_000
        assert tracemalloc.get_traced_memory()[0] < 20 * len(sizes)
    finally:
        tracemalloc.stop()


def test_the_last_step_of_an_epoch_holds_the_rest():
    """Steps of 64 conversations a rank at many ranks: all full but the last, each conversation once."""
    sampler = data.Sampler(lognormal(100_000), 1, 42, 64 * 128)
    steps = [sampler.step(step)[1] for step in range(1, len(sampler) + 1)]
    assert [len(ids) for ids in steps] == [8192] * 12 + [100_000 - 12 * 8192]
    assert np.array_equal(np.sort(np.concatenate(steps)), np.arange(100_000))
