"""Runs with an error: planted_error.py CASES.json [flags of sft.py] runs sft.py once per [where, what, flags...] of it.

Planted: the function `what` of this file fails in the training loop (where is loop), while data is read (data) or while
a checkpoint is written (checkpoint); none if where is none. Each run is a fork of this process and ends as sft.py would. Its standard output
goes to the file WHERE.WHAT, its standard error to WHERE.WHAT.err, and all exit codes to codes.json.
"""

import json
import os
import sys

import numpy as np
import torch.fx.experimental.symbolic_shapes  # noqa: F401  every run imports it; here once, as it takes a second

import sft
from disk import checkpoint
from screen.log import Log
from settings.errors import UserError, run
from text import conversations


def unpack():
    a, b = (1, 2, 3)


def concatenate():
    np.concatenate([np.zeros((2, 2)), np.zeros(3)])


def convert():
    int("x")


def user_error():
    raise UserError("--planted 1: it must be 2")


def missing_file():
    open("nowhere.txt", encoding="utf-8")


planted = {}  # where -> the function that fails there


def planting(function, where):
    def wrapper(*args, **kwargs):
        planted.pop(where, lambda: None)()  # once: one bad row is an error of one line
        return function(*args, **kwargs)

    return wrapper


Log.step = planting(Log.step, "loop")
conversations.read_row = planting(conversations.read_row, "data")
checkpoint.save = planting(checkpoint.save, "checkpoint")

with open(sys.argv[1], encoding="utf-8") as f:
    cases = json.load(f)
codes = []
for where, what, *flags in cases:
    name = f"{where}.{what}"
    if os.fork() == 0:
        for stream, file in ((1, name), (2, f"{name}.err")):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream)
        planted[where] = globals().get(what)
        sys.argv, code = ["sft.py", *sys.argv[2:], *flags, "--output_dir", f"out.{name}"], 0
        try:
            run(sft.main)
        except SystemExit as stop:
            code = stop.code
        except BaseException:  # as Python does, without the clean-up at exit, which takes a second
            sys.excepthook(*sys.exc_info())
            code = 1
        sys.stderr.flush()
        os._exit(code)
    codes.append(os.waitstatus_to_exitcode(os.wait()[1]))
with open("codes.json", "w", encoding="utf-8") as f:
    json.dump(codes, f)
