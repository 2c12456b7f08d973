"""sft.py whose first step gets two Ctrl-C and would take a minute: python tests/laws/slow_step.py FLAGS"""

import os
import signal
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
import sft  # noqa: E402
from settings.errors import run  # noqa: E402


def slow(*words, **options):
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
    time.sleep(60)


sft.backward = slow
run(sft.main)
