"""train(Config(...)) in a program under torchrun: from_python.py OUT

Each rank checks what train() returns, and that the process is as before. No fault is planted.
"""

import logging
import os
import signal
import sys
import warnings

import torch
import torch.distributed as dist
from helpers import EXAMPLES, TINY

from sft import Config, train


def state():
    handlers = {name: [*logger.handlers] for name, logger in logging.root.manager.loggerDict.items()
                if getattr(logger, "handlers", None)}
    return (handlers, warnings.showwarning, [*warnings.filters], dict(os.environ), torch.get_rng_state().tolist(),
            {number: signal.getsignal(number) for number in signal.valid_signals()}, dist.is_initialized(),
            signal.pthread_sigmask(signal.SIG_BLOCK, ()))


before = state()
for steps in (1, 2):  # twice: the second run meets the first one's groups in the same store
    run = train(Config(model=TINY, train_data=EXAMPLES, batch_size=4, max_length=64, too_long="truncate",
                       output_dir=f"{sys.argv[1]}{steps}", max_steps=steps))
    assert run.directory == f"{sys.argv[1]}{steps}/checkpoints/step_{steps}", run
    assert len(run.metrics) == steps, run
    differing = [number for number, (a, b) in enumerate(zip(before, state())) if a != b]
    assert not differing, differing
