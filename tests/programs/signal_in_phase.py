"""A rank that gets a signal: signal_in_phase.py RANK PHASE NUMBER [flags of sft.py], on many ranks.

Planted: rank RANK sends itself the signal NUMBER when it comes to the phase of that name; RANK may be none. Each rank
adds its exit code, or null, to the file "codes RANK" as a line, and ends with 0.
"""

import json
import os
import sys

import sft
from ranks import processes

victim, phase, number = sys.argv[1:4]
sys.argv = ["sft.py", *sys.argv[4:]]
at, code = processes.Ranks.set_phase, None


def at_and_signal(self, name):
    at(self, name)
    if (str(self.rank), name) == (victim, phase):
        os.kill(os.getpid(), int(number))


processes.Ranks.set_phase = at_and_signal
try:
    sft.main()
except SystemExit as stop:
    code = stop.code
with open(f"codes {os.environ['RANK']}", "a", encoding="utf-8") as f:
    f.write(json.dumps(code) + "\n")
