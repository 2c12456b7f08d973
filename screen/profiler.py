"""--profile N: where the time of N training steps goes and, on CUDA, what their memory holds.

trace.json.gz opens in https://ui.perfetto.dev. memory.json.gz is torch's snapshot of the allocator: each
allocation with its Python stack. It is JSON because reading torch's own file can run code. To look at it:

    python -c "import gzip, json; from torch.cuda import _memory_viz as viz; \\
        print(viz.trace_plot(json.load(gzip.open('memory.json.gz'))))" > memory.html
"""

import gzip
import json
import os
from itertools import islice

import torch
from tqdm import tqdm

from disk import files

WARM_UP = 2  # steps before the trace: the first one allocates, in the second one the profiler starts
ALLOCATIONS = 100_000  # newest that the snapshot keeps; each takes some kB of host memory


def profiled(steps, cfg, ranks):
    """Yield the items of an iterator, one per step of a run; trace cfg.profile of them, after WARM_UP.

    Only rank 0 is traced: the others compute the same, and its collectives show how long it waits for them.
    A run that ends earlier writes what there is. Traced steps are slower than others.
    """
    steps = iter(steps)
    if cfg.profile and ranks.rank == 0:
        with trace(cfg, ranks.device) as profiler:
            for step in islice(steps, WARM_UP + cfg.profile):
                yield step
                profiler.step()
        if profiler.step_num <= WARM_UP:
            tqdm.write(f"profile  nothing is written: the first {WARM_UP} steps are not traced, and this run "
                       f"had {profiler.step_num}")
    yield from steps


def trace(cfg, device):
    """A torch.profiler.profile that writes its files when its last step is over, or when it is left."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.memory._record_memory_history(context="alloc", stacks="python", max_entries=ALLOCATIONS)

    def write(finished):
        n_steps = finished.step_num - WARM_UP
        if n_steps < 1:
            return
        path = os.path.join(cfg.output_dir, "trace.json.gz")
        with files.naming(path):
            finished.export_chrome_trace(path)
        tqdm.write(f"profile  {path}: {n_steps} of {cfg.profile} steps; it opens in https://ui.perfetto.dev")
        if device.type != "cuda":
            tqdm.write("         no memory snapshot: only CUDA has one")
            return
        path = os.path.join(cfg.output_dir, "memory.json.gz")
        with files.naming(path), gzip.open(path, "wt", encoding="utf-8") as f:
            json.dump(torch.cuda.memory._snapshot(), f)
        torch.cuda.memory._record_memory_history(enabled=None)
        tqdm.write(f"         {path}: the memory; screen/profiler.py says how to look at it")

    # acc_events: there is one cycle, and torch 2.11 warns that others would be lost
    return torch.profiler.profile(
        activities=activities, on_trace_ready=write, record_shapes=True, acc_events=True,
        schedule=torch.profiler.schedule(wait=WARM_UP - 1, warmup=1, active=cfg.profile, repeat=1))
