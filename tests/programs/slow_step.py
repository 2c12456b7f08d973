"""A run whose first step gets Ctrl-C twice and would take a minute: slow_step.py [flags of sft.py]

Planted: backward() sends the process two SIGINT and sleeps.
"""

import os
import signal
import time

import sft
from settings.errors import run


def slow(*words, **options):
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
    time.sleep(60)


sft.backward = slow
run(sft.main)
