"""Runs of sft.py in one process group, with signals: torchrun tests/laws/signal_worker.py RUNS.json

Of each run RUNS.json has [[rank, phase] or null, signal, flags]: when that rank comes to that phase, it sends
itself the signal. Writes the exit codes of its runs into "codes RANK".
"""

import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
import sft  # noqa: E402
from ranks import processes  # noqa: E402

processes.dist.destroy_process_group = lambda: None  # as in fsdp_worker.py
at, codes = processes.Ranks.at, []


def at_and_signal(self, phase):
    at(self, phase)
    if [self.rank, phase] == due:
        os.kill(os.getpid(), number)


processes.Ranks.at = at_and_signal
with open(sys.argv[1], encoding="utf-8") as f:
    runs = json.load(f)
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
for due, number, flags in runs:
    sys.argv = ["sft.py", *flags]
    try:
        sft.main()
        codes.append(None)
    except SystemExit as error:
        codes.append(error.code)
with open(f"codes {rank}", "w", encoding="utf-8") as f:
    json.dump(codes, f)
store = processes.dist.distributed_c10d._get_default_store()
store.set(f"worker {rank}", "")
store.wait([f"worker {rank}" for rank in range(size)])
