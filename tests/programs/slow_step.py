"""A run that gets Ctrl-C twice during a step: slow_step.py [flags of sft.py]

Planted: backward() sends the process two SIGINT, then sleeps for a minute.
"""

import os
import signal
import time

import sft
from settings.errors import run


def slow(*args, **kwargs):
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
    time.sleep(60)


sft.backward = slow
run(sft.main)
