"""A rank of a run gets a signal: signal_in_phase.py RANK PHASE NUMBER [flags of sft.py], on many ranks

Planted: rank RANK sends itself signal NUMBER when it enters phase PHASE; with RANK none, no rank does. Each rank
appends its exit code (or null) to the file "codes RANK", its own rank, and exits with 0.
"""

import json
import os
import sys

import sft
from ranks import processes

victim, phase, number = sys.argv[1:4]
sys.argv = ["sft.py", *sys.argv[4:]]
set_phase, code = processes.Ranks.set_phase, None


def set_phase_and_signal(self, name):
    set_phase(self, name)
    if (str(self.rank), name) == (victim, phase):
        os.kill(os.getpid(), int(number))


processes.Ranks.set_phase = set_phase_and_signal
try:
    sft.main()
except SystemExit as stop:
    code = stop.code
with open(f"codes {os.environ['RANK']}", "a", encoding="utf-8") as f:
    f.write(json.dumps(code) + "\n")
