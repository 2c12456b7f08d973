"""A run of sft.py with the flags given; prints how many graphs torch.compile had made after each step.

Nothing is planted.
"""

import sft
from screen.log import Log
from torch._dynamo.utils import counters

seen, step = [], Log.step


def step_and_count(self, *args, **values):
    step(self, *args, **values)
    seen.append(counters["stats"]["unique_graphs"])


Log.step = step_and_count
sft.main()
print("graphs", *seen)
