"""One process group, many runs: torchrun tests/laws/fsdp_worker.py RUNS.json runs sft.main() for each list of flags in it.

Starting processes costs more than a run of the tiny model does, so the tests share them.
"""

import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
import sft  # noqa: E402

# A second group over the same store would meet the first one's keys and hang.
sft.processes.dist.destroy_process_group = lambda: None

with open(sys.argv[1], encoding="utf-8") as f:
    runs = json.load(f)
for flags in runs:
    sys.argv = ["sft.py", *flags]
    sft.main()
store = sft.processes.dist.distributed_c10d._get_default_store()
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
store.set(f"worker {rank}", "")  # Ranks.__exit__ does so after one run; the keys of the first run are still there
store.wait([f"worker {rank}" for rank in range(size)])
