"""Replaces sft.py in tests of ranks/launch.py: appends to the file LOG, as a JSON line, how it was started.

Planted: the fault that the environment variable PLANT names. exit N: workers exit with code N; kill: worker 1 gets
SIGKILL, worker 0 exits later; meet N: workers wait until N of them have started; hang: workers sleep for a minute;
code N: they wait for SIGTERM, then leave exit code N as sft.py does. TIMEOUT: the value of --timeout.
"""

import json
import os
import signal
import sys
import time

KEYS = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
        "OMP_NUM_THREADS")


def started_workers():
    with open(os.environ["LOG"], encoding="utf-8") as f:
        return sum("RANK" in json.loads(line)["env"] for line in f)


line = {"arguments": sys.argv[1:], "pid": os.getpid(),
        "env": {key: os.environ[key] for key in KEYS if key in os.environ},
        "is_deaf": signal.SIGUSR1 in signal.pthread_sigmask(signal.SIG_BLOCK, []),
        "safe_path": bool(getattr(sys.flags, "safe_path", False))}
with open(os.environ["LOG"], "a", encoding="utf-8") as f:
    f.write(json.dumps(line) + "\n")
if "--explain" in line["arguments"]:
    print(f"timeout = {os.environ.get('TIMEOUT', 60)} default")
fault, _, number = os.environ.get("PLANT", "").partition(" ")
if "RANK" in os.environ and fault == "exit":
    sys.exit(int(number))
if "RANK" in os.environ and fault == "kill":
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(2)
while fault == "meet" and "RANK" in os.environ and started_workers() < int(number):
    time.sleep(0.05)
if "RANK" in os.environ and fault == "code":
    signal.sigwait([signal.SIGTERM])  # the launcher has blocked it
    with open(os.environ["SFT_EXIT_CODE_FILE"], "w", encoding="utf-8") as f:
        f.write(number)
if "RANK" in os.environ and fault == "hang":
    time.sleep(60)
