"""The loss of a step by source: which sources the lines of metrics.jsonl name, and what they say of each."""

import numpy as np

MOST, OTHER = 20, "other"  # sources with a name of their own in a line; the name of the rest together


class Sources:
    """The sources of a Dataset that has several; without them `names` is empty, and nothing is computed.

    names  list: the MOST sources with the most targets, in the Dataset's order, and OTHER for the rest
    index  (conversations,) uint8: the source of each conversation, as an index of `names`
    """

    def __init__(self, dataset):
        self.dataset, self.names = dataset, []
        targets = np.bincount(dataset.source_of, dataset.n_targets, len(dataset.source_names))
        present = np.flatnonzero(targets)
        if len(present) < 2:
            return
        largest = present[np.argsort(-targets[present], kind="stable")][:MOST]
        self.names = [dataset.source_names[i] for i in np.sort(largest)]
        if len(present) > MOST and OTHER not in self.names:
            self.names.append(OTHER)
        numbers = {name: number for number, name in enumerate(self.names)}
        numbers = [numbers.get(name, numbers.get(OTHER, 0)) for name in dataset.source_names]
        self.index = np.array(numbers, dtype=np.uint8)[dataset.source_of]

    def values(self, ids, sums):
        """{name: {"loss", "target_weight"}} of a step, for each source that it has a conversation of.

        ids   the conversations of the step
        sums  for each of `names`, the losses of its targets times their weights, summed
        """
        result = {}
        for i, (name, total) in enumerate(zip(self.names, sums, strict=True)):
            mine = ids[self.index[ids] == i]
            if len(mine):
                weight = self.dataset.count(mine)["target_weight"]
                result[name] = {"loss": total / weight, "target_weight": weight}
        return result
