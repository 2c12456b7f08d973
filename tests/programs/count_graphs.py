"""Runs sft.py and prints how many graphs torch.compile has made after each step: count_graphs.py [flags of sft.py]

No fault is planted.
"""

import sft
from screen.log import Log
from torch._dynamo.utils import counters

graphs, step = [], Log.step


def step_and_count(self, *args, **values):
    step(self, *args, **values)
    graphs.append(counters["stats"]["unique_graphs"])


Log.step = step_and_count
sft.main()
print("graphs", *graphs)
