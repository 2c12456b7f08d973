"""Programs on many ranks: ranks_of.py RUNS.json runs each [ranks, [program, words of its command line]] of the file.

A rank is a fork of this process, which has imported what a run needs: that takes longer than a run of a tiny model.
There is no torchrun. Nothing is planted. Ends with 1 where a run does not end well, without those behind it.
"""

import json
import multiprocessing
import os
import runpy
import signal
import sys
import time

import torch._dynamo  # noqa: F401  checkpointing imports it, in a second
import torch.distributed.fsdp  # noqa: F401
from torch.distributed import TCPStore

import lora  # noqa: F401
import sft  # noqa: F401
from ops import nf4  # noqa: F401
from ranks import tp  # noqa: F401


def be_rank(rank, size, port, words):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def keep_store(pipe):
    """What torchrun's agent does: hold the store of a run, and say on which port."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipe.send(store.port)
    signal.pause()


def run(size, words):
    fork = multiprocessing.get_context("fork")
    reading, writing = fork.Pipe(duplex=False)
    agent = fork.Process(target=keep_store, args=(writing,))  # not in this process, which must fork without threads
    agent.start()
    port, until = reading.recv(), time.monotonic() + 200
    ranks = [fork.Process(target=be_rank, args=(rank, size, port, words)) for rank in range(size)]
    for process in ranks:
        process.start()
    for process in ranks:  # where one fails the others give up after --timeout
        process.join(max(0, until - time.monotonic()))
    codes = [process.exitcode for process in ranks]
    for process in (agent, *ranks):
        process.kill()
    if any(code != 0 for code in codes):
        sys.exit(f"{size} ranks, exit codes {codes}: {' '.join(words)}")


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as f:
        runs = json.load(f)
    for size, words in runs:
        started = time.monotonic()
        run(size, words)
        print(f"RUN {time.monotonic() - started:.1f} s", *words, flush=True)
