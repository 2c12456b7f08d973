"""Packing: how many micro-batches a step takes, and which conversations each of a rank's micro-batches holds.

All ranks compute the same result, in integers, so none has to ask another.
"""

import heapq

import numpy as np


def ceil_div(a, b):
    return -(-a // b)


def pack(lengths, capacity, max_conversations=None, dp_rank=0, dp_size=1):
    """Lay conversations into micro-batches; return those of one rank, as lists of indices into lengths.

    lengths   tokens of each conversation
    capacity  a micro-batch holds at most so many tokens, and max_conversations conversations where that is given

    Every rank gets equally many micro-batches, some of them empty if there are too few conversations. The
    longest conversation comes first, and each goes into the micro-batch that has the fewest tokens so far.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")  # longest first
    n, longest = lengths[order], int(lengths.max(initial=1))
    assert longest <= capacity, (lengths, capacity)
    if max_conversations:
        # Ranks 0 1 2 2 1 0 0 1 2 ...: as many conversations on each, and about as long ones at the same time.
        turn = np.arange(len(n)) % (2 * dp_size)
        ranks = np.minimum(turn, 2 * dp_size - 1 - turn)
        room = min(max_conversations, capacity // longest)  # so many conversations fit, whichever they are
        count = max(1, ceil_div(len(n), room * dp_size))
    else:
        ranks, room = split_over_ranks(n, dp_size), capacity
        count = micro_batches_needed(n, ranks, capacity, dp_size)
    mine, n = order[ranks == dp_rank], n[ranks == dp_rank]
    bins, batches = [], [[] for _ in range(count)]
    assign_least_loaded(bins, np.ones_like(n) if max_conversations else n, costs=n, room=[room] * count)
    for i, b in zip(mine.tolist(), bins, strict=True):
        batches[b].append(i)
    return batches


def micro_batches_needed(n, ranks, capacity, dp_size):
    """How many micro-batches of `capacity` tokens each rank gets, so that each conversation fits at its turn.

    n      (conversations,) int64, tokens of each, longest first
    ranks  (conversations,) int64, the rank of each

    If k micro-batches hold `before` tokens together, the emptiest holds at most before // k. A conversation
    of m tokens fits there if before // k <= capacity - m, that is, k > before // (capacity - m + 1). It also
    fits if k is larger than the number of conversations before it, as one micro-batch is still empty then.
    """
    borders = np.cumsum(np.bincount(ranks, minlength=dp_size))[:-1]
    count = 1
    for m in np.split(n[np.argsort(ranks, kind="stable")], borders):  # of each rank, longest first
        before = np.cumsum(m) - m
        enough = np.minimum(before // (capacity - m + 1), np.arange(len(m))) + 1
        count = max(count, int(enough.max(initial=1)))
    return count


def split_over_ranks(n, dp_size):
    """The rank of each conversation: even in tokens and in squared length, which is attention's cost.

    n        (conversations,) int64, tokens of each, longest first
    returns  (conversations,) int64

    First the longest ones, down to where the shorter ones hold 1/4 of all tokens: each goes to the rank of
    least squared length so far. A rank that is short of tokens will get more of the shorter ones later on, so
    the squared length that those have per token is subtracted beforehand. Then the same down to 1/8, and to
    1/16. No rank takes more than an even share of the tokens here. The last 16th levels the tokens.
    """
    if dp_size == 1 or len(n) <= dp_size:
        return np.arange(len(n)) % dp_size
    squares = n * n
    # sums over each conversation and all shorter ones
    tokens_left, squares_left = (np.append(np.cumsum(x[::-1])[::-1], 0) for x in (n, squares))
    total, ranks = int(tokens_left[0]), []
    room = [ceil_div(total, dp_size)] * dp_size
    for part in 4, 8, 16:
        stop = int((tokens_left > total // part).sum())
        per_token = squares_left[stop] // max(1, tokens_left[stop])
        assign_least_loaded(ranks, n[:stop], costs=squares - n * per_token, room=room)
    assign_least_loaded(ranks, n, costs=n, room=[total] * dp_size)
    return np.array(ranks)


def assign_least_loaded(bins, sizes, *, costs, room):
    """Append to `bins` the bin of each further item: that of least cost so far, of several the first.

    bins   list, the bins of the first items
    sizes  (items,) int64, the room that each item takes
    costs  (at least items,) int64, what each item adds to the cost of its bin, the first items included
    room   list, what is left in each bin; what is taken here is subtracted

    A bin that lacks room for an item when its turn comes gets none of the later ones. Where all bins are
    closed like that, the remaining items get none.
    """
    sizes, costs, loads = sizes.tolist(), costs.tolist(), [0] * len(room)
    for b, cost in zip(bins, costs):
        loads[b] += cost
    heap = sorted((load, b) for b, load in enumerate(loads))
    for size, cost in zip(sizes[len(bins) :], costs[len(bins) :]):
        while heap and room[heap[0][1]] < size:
            heapq.heappop(heap)
        if not heap:
            break
        load, b = heap[0]
        bins.append(b)
        room[b] -= size
        heapq.heapreplace(heap, (load + cost, b))
