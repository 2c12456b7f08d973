"""Stands in for sft.py under ranks/launch.py: notes how it was started in LOG (a JSON line), and ends as
PLANT says.

PLANT: exit N (in the workers), meet N (wait until N workers are there), hang (ignore what asks to end)
"""

import json
import os
import signal
import sys
import time

KEYS = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
        "OMP_NUM_THREADS")


def workers():
    with open(os.environ["LOG"], encoding="utf-8") as f:
        return sum("RANK" in json.loads(line)["env"] for line in f)


line = {"arguments": sys.argv[1:], "pid": os.getpid(),
        "env": {key: os.environ[key] for key in KEYS if key in os.environ},
        "is_deaf": signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN,
        "safe_path": bool(getattr(sys.flags, "safe_path", False))}
with open(os.environ["LOG"], "a", encoding="utf-8") as f:
    f.write(json.dumps(line) + "\n")
what, _, number = os.environ.get("PLANT", "").partition(" ")
if "RANK" in os.environ and what == "exit":
    sys.exit(int(number))
while what == "meet" and "RANK" in os.environ and workers() < int(number):
    time.sleep(0.05)
if "RANK" in os.environ and what == "hang":
    time.sleep(60)
