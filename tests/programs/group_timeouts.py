"""Prints the time-outs of all process groups, in days, on many ranks: group_timeouts.py TP"""

import sys

import torch
import torch.distributed as dist

from ranks import processes

with processes.start(int(sys.argv[1]), 60) as ranks:
    for group in dist.distributed_c10d._world.pg_map:
        print("DAYS", group._get_backend(torch.device("cpu")).options._timeout.days, flush=True)
