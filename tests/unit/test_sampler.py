"""Which conversations a step holds: each once per epoch, in a pinned order, mixed by weight, in full steps."""

import tracemalloc

import numpy as np
import pytest
from data_helpers import lognormal, mixed, repeatable, tiny
from hypothesis import given
from hypothesis import strategies as st

import data


def steps(sampler):
    return [sampler.step(step) for step in range(1, len(sampler) + 1)]


def per_epoch_of(sampler):
    """The steps of each epoch."""
    return [sampler.steps_of(epoch) for epoch in range(len(sampler.ends))]


def test_a_million_epochs_take_no_time_to_plan():
    """One row for 10^9 epochs, and --max_steps far beyond one epoch, with and without --batch_tokens: the plan takes
    neither memory nor time that grows with the epochs, and a late step is found at once."""
    tracemalloc.start()
    long = data.Sampler(np.full(1, 7), epochs=1e9, seed=42, batch_size=4)
    assert len(long) == 10**9 and long.step(10**9).epoch == 10**9 and long.is_due(10**9 - 5, None)
    capped = data.Sampler(np.full(3, 7), epochs=3, seed=42, batch_size=2, max_steps=10**9)
    assert len(capped) == 10**9 and [capped.is_due(10**8 + i, None) for i in range(2)] == [True, False]
    lazy = data.Sampler(np.full(3, 7), epochs=3, seed=42, batch_size=1, batch_tokens=14, max_steps=10**9)
    assert len(lazy) == 10**9 and len(lazy.ends) == 1 and lazy.step(5).epoch == 2.5 and len(lazy.ends) == 3
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


def test_the_order_of_a_seed_is_this():
    """The permutation of seed 42 is pinned: it may not depend on the version of a library or on the machine."""
    sampler = data.Sampler(np.full(8, 10), epochs=2, seed=42, batch_size=8)
    assert [ids.tolist() for _, ids in steps(sampler)] == [[7, 1, 6, 4, 3, 5, 0, 2], [4, 5, 3, 0, 2, 7, 1, 6]]


def test_an_epoch_holds_every_conversation_once():
    """The steps of an epoch partition its conversations, and all but the last are full. Step.epoch is the
    number of epochs that are done."""

    @repeatable
    @given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 4), st.integers(0, 10**18))
    def check(count, batch_size, epochs, seed):
        sampler = data.Sampler(np.full(count, 7), epochs=epochs, seed=seed, batch_size=batch_size)
        per_epoch = -(-count // batch_size)
        assert len(sampler) == epochs * per_epoch and per_epoch_of(sampler) == [per_epoch] * epochs
        for epoch in range(epochs):
            got = steps(sampler)[epoch * per_epoch : (epoch + 1) * per_epoch]
            assert sorted(i for _, ids in got for i in ids) == list(range(count))
            assert [len(ids) for _, ids in got[:-1]] == [batch_size] * (per_epoch - 1)
            assert 1 <= len(got[-1][1]) <= batch_size
            np.testing.assert_allclose([done for done, _ in got],
                                       epoch + np.arange(1, per_epoch + 1) / per_epoch)

    check()


def test_orders_differ_between_epochs_and_seeds_and_agree_otherwise():
    """The order depends only on (seed, epoch), not on batch size, number of epochs or earlier calls."""

    def order(seed, epoch, batch_size=50, epochs=3):
        per_epoch = -(-50 // batch_size)
        sampler = data.Sampler(np.full(50, 7), epochs=epochs, seed=seed, batch_size=batch_size)
        first = epoch * per_epoch + 1
        return tuple(i for step in range(first, first + per_epoch) for i in sampler.step(step).ids.tolist())

    orders = {(seed, epoch): order(seed, epoch) for seed in (0, 1, 42, 10**18) for epoch in range(3)}
    assert len(set(orders.values())) == 12 and tuple(range(50)) not in orders.values()
    assert all(order(*key, batch_size=7) == value == order(*key, epochs=5) for key, value in orders.items())


def test_batch_tokens_limit_each_step():
    """With batch_tokens a step never has more tokens, and ends only where the next conversation would not fit."""

    @repeatable
    @given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(0, 60), st.integers(1, 3),
           st.integers(0, 99))
    def check(lengths, slack, epochs, seed):
        limit = max(lengths) + slack
        sampler = data.Sampler(np.array(lengths), epochs=epochs, seed=seed, batch_size=1, batch_tokens=limit)
        plain = data.Sampler(np.array(lengths), epochs=epochs, seed=seed, batch_size=len(lengths))
        got = steps(sampler)
        assert len(sampler) == sum(per_epoch_of(sampler)) and len(per_epoch_of(sampler)) == epochs
        for epoch in range(epochs):
            mine, got = got[: per_epoch_of(sampler)[epoch]], got[per_epoch_of(sampler)[epoch] :]
            batches = [[lengths[i] for i in ids] for _, ids in mine]
            assert np.concatenate([ids for _, ids in mine]).tolist() == plain.step(epoch + 1).ids.tolist()
            assert all(sum(batch) <= limit for batch in batches)
            assert all(sum(batch) + following[0] > limit for batch, following in zip(batches, batches[1:]))
            assert mine[-1][0] == epoch + 1
        assert got == []

    check()


def test_batch_tokens_below_the_longest_conversation_are_refused():
    """No step could hold it. The error has both numbers."""
    with pytest.raises(ValueError, match="--batch_tokens 29: the longest conversation has 30 tokens"):
        data.Sampler(np.array([3, 30, 4]), epochs=1, seed=42, batch_size=4, batch_tokens=29)
    assert len(data.Sampler(np.array([3, 30, 4]), epochs=1, seed=42, batch_size=4, batch_tokens=30)) >= 2


@pytest.mark.parametrize("batch_tokens", [None, 60])
@pytest.mark.parametrize("max_steps", [1, 3, 4, 5, 8, 30])
def test_max_steps_overrides_epochs(max_steps, batch_tokens):
    """max_steps may be fewer or more steps than the epochs have; the steps equal those of more epochs."""
    lengths = np.arange(10, 26)
    sampler = data.Sampler(lengths, epochs=2, seed=42, batch_size=4, batch_tokens=batch_tokens,
                           max_steps=max_steps)
    longer = data.Sampler(lengths, epochs=40, seed=42, batch_size=4, batch_tokens=batch_tokens)
    assert len(sampler) == max_steps
    for (done, ids), (done_longer, ids_longer) in zip(steps(sampler), steps(longer)):
        assert done == done_longer and ids.tolist() == ids_longer.tolist()
    if not batch_tokens:
        assert sampler.step(max_steps).epoch == max_steps / 4


@pytest.mark.parametrize("batch_tokens", [None, 60])
def test_steps_may_be_read_in_any_order(batch_tokens):
    """Resume starts at any step, so a step does not depend on earlier calls."""

    def sampler():
        return data.Sampler(np.arange(10, 21), epochs=3, seed=7, batch_size=4, batch_tokens=batch_tokens)

    straight, jumping = steps(sampler()), sampler()
    for step in [len(straight), 1, *range(len(straight), 0, -1), 2, len(straight) // 2 + 1]:
        done, ids = jumping.step(step)
        assert (done, ids.tolist()) == (straight[step - 1].epoch, straight[step - 1].ids.tolist())
        assert sampler().step(step).ids.tolist() == ids.tolist()


def test_once_per_epoch_is_after_its_last_step_and_after_the_last_of_all():
    """By default checkpoints and validations are at the end of each epoch and at the end of the run."""

    def ends(count, **how):
        sampler = data.Sampler(np.full(count, 5), seed=42, **how)
        return [step for step in range(1, len(sampler) + 1) if sampler.is_due(step, None)]

    assert ends(10, epochs=3, batch_size=4) == [3, 6, 9]
    assert ends(10, epochs=3, batch_size=4, max_steps=7) == [3, 6, 7]
    assert ends(10, epochs=1, batch_size=4, max_steps=2) == [2]
    assert ends(10, epochs=2, batch_size=1, batch_tokens=25) == [2, 4]
    sampler = data.Sampler(np.full(10, 5), seed=42, epochs=3, batch_size=4)
    assert [step for step in range(1, 10) if sampler.is_due(step, 4)] == [4, 8]


# ---- at scale -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_tokens", [2048, 12544, 131072])
def test_batch_tokens_end_a_step_where_the_next_would_not_fit(batch_tokens):
    """The steps equal those of a plain loop over conversations. Steps of 131,072 tokens are all 98 % full."""
    lengths = lognormal(40_000)
    sampler = data.Sampler(lengths, epochs=2, seed=42, batch_size=1, batch_tokens=batch_tokens)
    order, per_epoch = data.Sampler(lengths, epochs=2, seed=42, batch_size=len(lengths)).step(2).ids, []
    for i in order.tolist():
        if not per_epoch or lengths[per_epoch[-1]].sum() + lengths[i] > batch_tokens:
            per_epoch.append([])
        per_epoch[-1].append(i)
    first = per_epoch_of(sampler)[0]
    assert [sampler.step(first + 1 + step).ids.tolist() for step in range(len(per_epoch))] == per_epoch
    assert len(sampler) == first + len(per_epoch)
    full = [lengths[step].sum() / batch_tokens for step in per_epoch[:-1]]
    assert max(full) <= 1 and np.mean(full) > {2048: 0.85, 12544: 0.98, 131072: 0.995}[batch_tokens]
    assert batch_tokens < 100_000 or min(full) > 0.98


@pytest.mark.parametrize("batch_tokens", [None, 2048])
def test_the_order_of_an_epoch_has_no_object_per_conversation(batch_tokens):
    """An epoch keeps two numbers of eight bytes per conversation, even if each conversation is a step."""
    lengths = np.full(100_000, 2048)
    tracemalloc.start()
    try:
        sampler = data.Sampler(lengths, epochs=1, seed=42, batch_size=1, batch_tokens=batch_tokens)
        sampler.step(1)
        assert len(sampler) == 100_000
        assert tracemalloc.get_traced_memory()[0] < 20 * len(lengths)
    finally:
        tracemalloc.stop()


def test_the_last_step_of_an_epoch_holds_the_rest():
    """Steps of 64 conversations per rank at 128 ranks: all full but the last, each conversation once."""
    sampler = data.Sampler(lognormal(100_000), epochs=1, seed=42, batch_size=64 * 128)
    steps = [sampler.step(step).ids for step in range(1, len(sampler) + 1)]
    assert [len(ids) for ids in steps] == [8192] * 12 + [100_000 - 12 * 8192]
    assert np.array_equal(np.sort(np.concatenate(steps)), np.arange(100_000))


# ---- mixes ----------------------------------------------------------------------------------------------


def test_files_are_mixed_by_weight(tmp_path):
    """Weights 0.7 and 0.3 for 100 and 20 conversations: an epoch has all 20, and 46 of the 100. The next epoch
    draws other ones."""
    a, b = mixed(tmp_path, 100, 20)
    dataset = data.load(f"{a}:0.7,{b}:0.3", tiny, 100)
    sampler = data.Sampler(dataset.n_inputs, epochs=2, seed=42, batch_size=6, mix=dataset.mix())
    assert len(sampler) == 22  # 66 conversations per epoch
    epochs = [np.concatenate([sampler.step(s).ids for s in range(first, first + 11)]) for first in (1, 12)]
    for ids in epochs:
        assert len(set(ids)) == 66 and np.bincount(dataset.file[ids]).tolist() == [46, 20]
        assert 0 < np.count_nonzero(dataset.file[ids[:33]]) < 20  # not sorted by file
    assert set(epochs[0]) != set(epochs[1])
    again = data.Sampler(dataset.n_inputs, epochs=2, seed=42, batch_size=6, mix=dataset.mix())
    assert all(np.array_equal(sampler.step(s).ids, again.step(s).ids) for s in range(1, 23))
    others = [data.load(spec, tiny, 100).digest for spec in (f"{a}:0.6,{b}:0.4", f"{a},{b}")]
    assert len({dataset.digest, *others}) == 3
    assert data.load(f"{a},{b}", tiny, 100).mix() is None


def test_a_directory_has_one_weight(tmp_path):
    """The files of a directory are one group."""
    (tmp_path / "dir").mkdir()
    mixed(tmp_path / "dir", 10, 10)
    (b,) = mixed(tmp_path, 5)
    dataset = data.load(f"{tmp_path / 'dir'}:4,{b}:1", tiny, 100)
    assert data.Sampler(dataset.n_inputs, epochs=1, seed=1, batch_size=5, mix=dataset.mix()).quotas == [20, 5]


@pytest.mark.parametrize("spec, message", [("{a}:0.7,{b}", "every source needs a weight above 0"),
                                           ("{a}:0,{b}:1", "above 0"),
                                           ("{a}:0.001,{b}:1", "source 1 would get none")])
def test_bad_weights_are_one_line(spec, message, tmp_path):
    a, b = mixed(tmp_path, 5, 5)
    with pytest.raises(ValueError, match=message):
        dataset = data.load(spec.format(a=a, b=b), tiny, 100)
        data.Sampler(dataset.n_inputs, epochs=1, seed=1, batch_size=5, mix=dataset.mix())


# ---- fractions of an epoch ------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs, total", [(0.5, 5), (0.01, 1), (1.1, 11), (1.5, 15), (2.75, 28), (2, 20), (2.0, 20)])
def test_a_fraction_of_an_epoch_is_its_first_steps(epochs, total):
    """10 steps an epoch, rounded up; 1.1 epochs are 11 steps although 1.1 is more than 11 / 10 in binary. The steps are
    those of whole epochs."""
    n_inputs = np.full(40, 10)
    part = data.Sampler(n_inputs, epochs=epochs, seed=3, batch_size=4)
    full = data.Sampler(n_inputs, epochs=3, seed=3, batch_size=4)
    assert len(part) == total
    for step in range(1, total + 1):
        a, b = part.step(step), full.step(step)
        assert a.epoch == b.epoch and (a.ids == b.ids).all()
    assert part.is_due(total, None)


def test_a_fraction_of_an_epoch_with_batch_tokens():
    """The fraction is one of the steps of its own epoch."""
    n_inputs = np.random.default_rng(0).integers(2, 50, 60)
    full = data.Sampler(n_inputs, epochs=3, seed=3, batch_size=1, batch_tokens=90)
    part = data.Sampler(n_inputs, epochs=2.5, seed=3, batch_size=1, batch_tokens=90)
    assert per_epoch_of(part) == per_epoch_of(full)
    assert len(part) == sum(per_epoch_of(full)[:2]) + -(-per_epoch_of(full)[2] // 2)
