"""Packing: which of a step's conversations go to which rank, and into which of its micro-batches; mixing.

Every rank computes the same result, in integers, so no rank has to ask another.
"""

import heapq
from fractions import Fraction

import numpy as np

from settings.errors import UserError


def ceil_div(a, b):
    return -(-a // b)


def mixed_quotas(counts, weights):
    """How many conversations an epoch draws from each group, in proportion to the weights.

    No conversation is drawn twice in an epoch, so the group with the fewest conversations for its weight
    decides how long the epoch is: all of it is drawn. The other groups are drawn anew in each epoch.
    Raises UserError if a group has no conversation, or if its quota is zero.
    """
    if not counts.all():
        raise UserError(f"source {counts.argmin() + 1} of the mixed data has no conversation to train on; "
                        "remove it from --train_data")
    # exact fractions instead of floats: the same result on every machine
    fractions = [Fraction(str(weight)) for weight in weights]
    most = min(int(count) / fraction for count, fraction in zip(counts, fractions))
    quotas = [int(most * fraction) for fraction in fractions]
    if not all(quotas):
        raise UserError(f"weights {weights} of {counts.tolist()} conversations: source {quotas.index(0) + 1} "
                        "would get none; raise its weight, or remove it from --train_data")
    return quotas


def limits(cfg):
    """(tokens, conversations or None: no limit) that a micro-batch may hold, from the settings of sft.py."""
    tokens = min(cfg.micro_batch_size * cfg.max_length, 2**62)  # pack() counts in int64
    return tokens, None if cfg.packing else cfg.micro_batch_size


def pack(lengths, capacity, max_conversations=None, dp_rank=0, dp_size=1):
    """Distribute a step's conversations over micro-batches; return those of one rank.

    lengths            (conversations,) tokens of each
    capacity           tokens that a micro-batch may hold
    max_conversations  conversations that a micro-batch may hold; None: no limit
    returns            list of micro-batches, each a list of indices of `lengths`

    Every rank gets the same number of micro-batches. Some are empty if there are too few conversations.
    Within a rank, the longest conversation comes first, and each goes into the micro-batch that has the
    fewest tokens so far.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")  # longest first
    lengths = lengths[order]
    longest = int(lengths.max(initial=1))
    assert longest <= capacity, (lengths, capacity)
    if max_conversations:
        # Ranks 0 1 2 2 1 0 0 1 2 ...: the numbers of conversations per rank differ by at most one, and in
        # each round all ranks get conversations of about the same length.
        position = np.arange(len(lengths)) % (2 * dp_size)
        ranks = np.minimum(position, 2 * dp_size - 1 - position)
        # Count conversations instead of tokens: this many fit into a micro-batch, whichever they are.
        limit = min(max_conversations, capacity // longest)
        sizes = np.ones_like(lengths)
        n_batches = max(1, ceil_div(len(lengths), limit * dp_size))
    else:
        ranks = split_over_ranks(lengths, dp_size)
        sizes, limit = lengths, capacity
        n_batches = micro_batches_needed(lengths, ranks, capacity, dp_size)
    is_mine = ranks == dp_rank
    order, lengths, sizes = order[is_mine], lengths[is_mine], sizes[is_mine]
    assigned, batches = [], [[] for _ in range(n_batches)]
    assign_least_loaded(assigned, sizes, costs=lengths, capacity_left=[limit] * n_batches)
    for conversation, batch in zip(order.tolist(), assigned, strict=True):
        batches[batch].append(conversation)
    return batches


def micro_batches_needed(lengths, ranks, capacity, dp_size):
    """The number of micro-batches per rank with which the greedy assignment of `pack` never gets stuck.

    lengths   (conversations,) int64, tokens of each, longest first
    ranks     (conversations,) int64, the rank of each
    capacity  tokens that a micro-batch may hold

    A conversation fits if the emptiest micro-batch still has `length` tokens free. Let the rank's earlier
    conversations have `tokens_before` tokens together. With k micro-batches, the emptiest one holds at most
    the average, tokens_before // k. So k is enough if

        tokens_before // k <= capacity - length,   that is,   k > tokens_before // (capacity - length + 1)

    k is also enough if it is larger than the number of earlier conversations: one micro-batch is still empty.
    The smaller of the two is what this conversation needs; the result is the largest need of all.
    """
    by_rank = lengths[np.argsort(ranks, kind="stable")]  # sorted by rank, within a rank longest first
    counts = np.bincount(ranks, minlength=dp_size)
    first = np.repeat(np.cumsum(counts) - counts, counts)  # where the conversations of the same rank begin
    tokens_before = np.cumsum(by_rank) - by_rank
    tokens_before -= tokens_before[first]
    conversations_before = np.arange(len(by_rank)) - first
    needed = 1 + np.minimum(tokens_before // (capacity - by_rank + 1), conversations_before)
    return int(needed.max(initial=1))


def split_over_ranks(lengths, dp_size):
    """The rank of each conversation: even in tokens and in squared length, which is attention's cost.

    lengths  (conversations,) int64, tokens of each, longest first
    returns  (conversations,) int64

    Long conversations decide the squared lengths; short ones can still even out the tokens. So:

    1. Three passes assign the long conversations: until the shorter ones hold 1/4 of all tokens, then 1/8,
       then 1/16. Each conversation goes to the rank with the least cost so far. No rank takes more than
       ceil(all tokens / dp_size).
    2. The cost of a conversation is its squared length, minus the squared length of as many tokens in shorter
       conversations: a rank that gets fewer tokens now gets more of those in the last pass. Each of the three
       passes estimates the subtrahend from the conversations that are shorter than its own.
    3. The last pass assigns the rest, each to the rank with the fewest tokens so far.
    """
    if dp_size == 1 or len(lengths) <= dp_size:
        return np.arange(len(lengths)) % dp_size
    squares = lengths * lengths
    # [i]: sum over conversation i and all shorter ones
    tokens_left = np.append(np.cumsum(lengths[::-1])[::-1], 0)
    squares_left = np.append(np.cumsum(squares[::-1])[::-1], 0)
    total = int(tokens_left[0])
    ranks = []
    capacity_left = [ceil_div(total, dp_size)] * dp_size
    for divisor in 4, 8, 16:
        stop = int((tokens_left > total // divisor).sum())
        square_per_token = squares_left[stop] // max(1, tokens_left[stop])
        costs = squares - lengths * square_per_token
        assign_least_loaded(ranks, lengths[:stop], costs=costs, capacity_left=capacity_left)
    assign_least_loaded(ranks, lengths, costs=lengths, capacity_left=[total] * dp_size)
    return np.array(ranks)


def assign_least_loaded(bins, sizes, *, costs, capacity_left):
    """Assign items to bins, each to the bin of least cost so far (of equals the first); extends `bins`.

    bins           list, the bin of each item that is already assigned; the bins of further items are appended
    sizes          (items,) int64, how much of a bin's capacity each item takes
    costs          (at least items,) int64, what each item adds to its bin's cost, assigned ones included
    capacity_left  list, of each bin; reduced by the items that are assigned here

    If an item does not fit into the bin of least cost, that bin is closed for the rest of the call. If all
    bins are closed, the remaining items are not assigned.
    """
    sizes, costs, loads = sizes.tolist(), costs.tolist(), [0] * len(capacity_left)
    for b, cost in zip(bins, costs):
        loads[b] += cost
    heap = sorted((load, b) for b, load in enumerate(loads))
    for size, cost in zip(sizes[len(bins) :], costs[len(bins) :]):
        while heap and capacity_left[heap[0][1]] < size:
            heapq.heappop(heap)
        if not heap:
            break
        load, b = heap[0]
        bins.append(b)
        capacity_left[b] -= size
        heapq.heapreplace(heap, (load + cost, b))
