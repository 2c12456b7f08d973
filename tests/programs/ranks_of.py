"""Runs programs on many ranks, as the lines of its standard input say; see perform().

Each rank is a fork of this process, which has imported what a run needs: the imports take longer than a run of a tiny
model. torchrun is not used. No fault is planted. After each line it prints an exit code, on a line.
"""

import json
import multiprocessing
import os
import runpy
import signal
import sys
import time

import torch._dynamo  # noqa: F401  checkpointing imports it, which takes a second
import torch.distributed.fsdp  # noqa: F401
from torch.distributed import TCPStore

import lora  # noqa: F401
import sft  # noqa: F401
from ops import nf4  # noqa: F401
from ranks import tp  # noqa: F401


def be_rank(rank, world_size, port, command, local_rank=None):
    local_rank = rank if local_rank is None else local_rank
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(local_rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    be_program(command)


def be_program(command):
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def keep_store(pipe):
    """Host the store of a run, as torchrun's agent does, and send its port."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipe.send(store.port)
    signal.pause()


def run(world_size, command):
    """Run a program on many ranks; exit this process if one fails or the run takes longer than 200 seconds.

    world_size  0: one process that is no rank
    """
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    # in a process of its own: a store has threads, and this process must fork without threads
    agent = fork.Process(target=keep_store, args=(sender,))
    agent.start()
    port, deadline = receiver.recv(), time.monotonic() + 200
    ranks = [fork.Process(target=be_rank, args=(rank, world_size, port, command)) for rank in range(world_size)]
    ranks = ranks or [fork.Process(target=be_program, args=(command,))]
    for process in ranks:
        process.start()
    for process in ranks:  # if one fails, the others give up after --timeout
        process.join(max(0, deadline - time.monotonic()))
    codes = [process.exitcode for process in ranks]
    for process in (agent, *ranks):
        process.kill()
    if any(code != 0 for code in codes):
        sys.exit(f"{world_size} ranks, exit codes {codes}: {' '.join(command)}")


def perform(directory, environment, runs):
    """Runs of a line, in this directory. What they print goes to its files stdout and stderr.

    runs  [[number of ranks, [program, arguments...]], ...], one after another. If one fails, exits with 1
    """
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    for stream, name in ((sys.stdout, "stdout"), (sys.stderr, "stderr")):
        with open(name, "w", encoding="utf-8") as f:
            os.dup2(f.fileno(), stream.fileno())
    for world_size, command in runs:
        started = time.monotonic()
        run(world_size, command)
        print(f"RUN {time.monotonic() - started:.1f} s", *command, flush=True)


if __name__ == "__main__":
    for line in sys.stdin:
        performer = multiprocessing.get_context("fork").Process(target=perform, kwargs=json.loads(line))
        performer.start()
        performer.join()
        print(performer.exitcode, flush=True)
