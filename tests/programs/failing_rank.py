"""One rank fails: failing_rank.py HOW PHASE RANK [flags of sft.py], under torchrun.

Planted: rank RANK raises a KeyError (HOW is raise), is killed (kill) or is stopped (stop) when it enters the phase of
that name; PHASE may also be start (before all), end (when all is done) or lock (whichever rank gets the lock of the
token cache). The file `planted` then has the time.
"""

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
at, train = processes.Ranks.set_phase, sft.train


def fail():
    with open("planted", "w", encoding="utf-8") as f:
        f.write(str(time.time()))
    if how == "raise":
        raise KeyError("planted")
    os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)


def at_and_fail(self, name):
    at(self, name)
    if self.rank == int(rank) and name == phase != "start":
        fail()


def fail_and_train(cfg, ranks):
    if ranks.rank == int(rank) and phase == "start":
        fail()
    train(cfg, ranks)
    if ranks.rank == int(rank) and phase == "end":
        fail()


def stop(*words, **options):
    os.kill(os.getpid(), signal.SIGSTOP)


processes.Ranks.set_phase, sft.train = at_and_fail, fail_and_train
if phase == "lock":
    data.tokenise = stop
errors.run(sft.record(sft.main))
