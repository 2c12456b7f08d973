"""Prints the smallest of several numbers, one of each rank: smallest_memory.py NUMBER NUMBER, under torchrun

No fault is planted.
"""

import sys

from ops import forecast
from ranks import processes

with processes.start(1, 60) as ranks:
    print(f"RESULT {forecast.smallest(int(sys.argv[1 + ranks.rank]), ranks)}", flush=True)
