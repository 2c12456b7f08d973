"""Prints the time-outs of all process groups, in days, and how ranks end, on many ranks: group_timeouts.py TP"""

import os
import sys

import torch
import torch.distributed as dist

from ranks import processes
from settings import errors

with processes.start(int(sys.argv[1]), 60) as ranks:
    for group in dist.distributed_c10d._world.pg_map:
        days = group._get_backend(torch.device("cpu")).options._timeout.days
        os.write(1, f"DAYS {days}\n".encode())  # one call: print() writes pieces, and ranks would mix theirs
os.write(1, f"ENDS AT ONCE {errors.exits_at_once}\n".encode())
