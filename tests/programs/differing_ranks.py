"""Two ranks, each on a node of its own, that differ: differing_ranks.py CASES.json FLAGS...

Runs sft.py once for each case, {"name", "flags": more flags of rank 1, "patch": {"module.attribute": value on rank 1}},
with FLAGS and --output_dir NAME. Writes NAME.RANK.err, what each rank printed, and codes.json, {name: exit codes}.
"""

import importlib
import json
import multiprocessing
import os
import sys

from ranks_of import be_rank, keep_store

from disk import lock
from helpers import ROOT

lock.PATIENCE = 0.5  # the tests share a disk


def be(rank, port, case, flags):
    more = case["flags"] if rank else []
    for name, value in (case["patch"] if rank else {}).items():
        module, attribute = name.rsplit(".", 1)
        setattr(importlib.import_module(module), attribute, value)
    with open(f"{case['name']}.{rank}.err", "w", encoding="utf-8") as f:
        os.dup2(f.fileno(), 2)
        command = [os.path.join(ROOT, "sft.py"), *flags, "--output_dir", case["name"], *more]
        be_rank(rank, 2, port, command, local_rank=0)


def main():
    with open(sys.argv[1], encoding="utf-8") as f:
        cases = json.load(f)
    codes, fork = {}, multiprocessing.get_context("fork")
    for case in cases:
        receiver, sender = fork.Pipe(duplex=False)
        agent = fork.Process(target=keep_store, args=(sender,))
        agent.start()
        port = receiver.recv()
        ranks = [fork.Process(target=be, args=(rank, port, case, sys.argv[2:])) for rank in range(2)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(120)
        codes[case["name"]] = [process.exitcode for process in ranks]
        for process in (agent, *ranks):
            process.kill()
    with open("codes.json", "w", encoding="utf-8") as f:
        json.dump(codes, f)


if __name__ == "__main__":
    main()
