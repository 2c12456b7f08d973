"""One rank of a run fails: failing_rank.py HOW PHASE RANK [flags of sft.py], under torchrun

Planted: when rank RANK enters phase PHASE, it raises a KeyError (HOW is raise) or a UserError (user), gets SIGKILL
(kill) or SIGSTOP (stop), or calls a function of C that sleeps, as one that releases Python's lock (block) or holds it
(hold). Only in the first attempt of torchrun --max-restarts. PHASE is the name of a phase, or start (before training),
end (after training) or lock (the rank that takes the lock of the token cache stops, whichever RANK is). The time of the
failure is written to the file `planted`.
"""

import ctypes
import os
import signal
import sys
import time

import data
import sft
from ranks import processes
from settings import errors

how, phase, rank = sys.argv[1:4]
sys.argv = ["sft.py", *sys.argv[4:]]
set_phase, train = processes.Ranks.set_phase, sft.train


def fail():
    with open("planted", "w", encoding="utf-8") as f:
        f.write(str(time.time()))
    if how == "raise":
        raise KeyError("planted")
    if how == "user":
        raise errors.UserError("--planted 1: it must be 2")
    if how in ("block", "hold"):
        (ctypes.CDLL if how == "block" else ctypes.PyDLL)(None).sleep(100)
    else:
        os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)


def set_phase_and_fail(self, name):
    set_phase(self, name)
    is_first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if is_first and self.rank == int(rank) and name == phase != "start":
        fail()


def fail_and_train(cfg, ranks, origins):
    if ranks.rank == int(rank) and phase == "start":
        fail()
    train(cfg, ranks, origins)
    if ranks.rank == int(rank) and phase == "end":
        fail()


def stop(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGSTOP)


processes.Ranks.set_phase, sft.train = set_phase_and_fail, fail_and_train
if phase == "lock":
    data.tokenise = stop
errors.run(sft.main)
