"""Kill a run anywhere, start it again, and it ends as if nothing had happened.

    python tests/soak.py [--kills 100] [--seed 0]

Half of the kills are of a run on one process, half of one on two, where every second kill is of one rank alone and the
other must end by itself. Each waits for a phase to begin and then for a random part of its length, as an undisturbed run
had it; among the phases are the moments around the renames that put a checkpoint in its place. The run goes on with
--resume_from auto until it is done; then its weights, moments and metrics.jsonl (but times and memory) are compared with
those of the undisturbed run, to the bit, and the next one begins. Prints the kills by phase; fails if one was not hit.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
TIMES = ("seconds", "tokens_per_second", "peak_memory_gb")
PHASES = ("save", "step", "rename", "evaluation", "tokenise", "renamed", "load", "launch", "start")  # most wanted first
LIMIT = 120  # seconds in which whatever was started must have ended

# The trainer, with a note of each phase in a file, and a pause around the renames for a kill to fit in.
CHILD = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import config, fsdp, sft
notes = open(os.environ["NOTES"] + "." + os.environ.get("RANK", "0"), "a", buffering=1)
at, replace = fsdp.Ranks.at, os.replace

def note(phase):
    print(os.getpid(), time.time(), phase.split(" ")[0], file=notes)

def noted_at(self, phase):
    at(self, phase)
    note(phase)

def noted_replace(source, target):
    note("rename")
    time.sleep(0.02)
    replace(source, target)
    note("renamed")
    time.sleep(0.02)

fsdp.Ranks.at, os.replace = noted_at, noted_replace
config.run(sft.record(sft.main))
"""


class Run:
    """A run of a few steps in a directory of its own, on one process or two."""

    def __init__(self, directory, ranks):
        self.directory, self.ranks, self.process = Path(directory), ranks, None
        self.out, self.notes = self.directory / "out", self.directory / "notes"
        self.directory.mkdir()
        (self.directory / "child.py").write_text(CHILD)

    def start(self):
        for path in self.directory.glob("notes.*"):
            path.unlink()
        flags = ["--model", "tiny", "--train_data", ROOT / "data" / "example_sft.json", "--val_data",
                 ROOT / "data" / "example_sft.json", "--output_dir", self.out, "--cache_dir", self.directory / "cache",
                 "--max_steps", 8, "--save_steps", 2, "--eval_steps", 3, "--batch_size", 8, "--max_length", 128,
                 "--lr", "1e-3", "--no-gradient_checkpointing", "--keep_checkpoints", 2, "--resume_from", "auto"]
        several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", self.ranks] * (self.ranks > 1)
        words = [sys.executable, *several, self.directory / "child.py", *flags]
        environment = {**os.environ, "NOTES": str(self.notes), "OMP_NUM_THREADS": "1", "TMPDIR": str(self.directory)}
        with open(self.directory / "log", "ab") as log:
            self.process = subprocess.Popen(list(map(str, words)), stdout=log, stderr=log, env=environment)

    def seen(self):
        """[(rank, pid, time, phase)] so far."""
        found = []
        for rank in range(self.ranks):
            path = Path(f"{self.notes}.{rank}")
            for line in path.read_text().splitlines() if path.exists() else ():
                if len(words := line.split()) == 3:  # the last one may be half written
                    found.append((rank, int(words[0]), float(words[1]), words[2]))
        return found

    def wait(self, seconds=LIMIT):
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"no end after {seconds} s; {self.said()}") from None

    def kill(self):
        """All of it: torchrun's processes have sessions of their own, so no group has them all."""
        for pid in {self.process.pid, *(pid for _, pid, _, _ in self.seen())}:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.process.wait()

    def said(self):
        return (self.directory / "log").read_text(errors="replace")[-2000:]

    def outcome(self):
        with open(self.out / "metrics.jsonl", encoding="utf-8") as f:
            lines = [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in f]
        latest = self.out / "checkpoints" / "latest"
        return lines, {str(path.relative_to(latest)): load_file(path) for path in latest.rglob("*.safetensors")}


def assert_same(ours, theirs, said):
    """Numbers, weights and moments, to the bit."""
    assert ours[0] == theirs[0], f"metrics.jsonl differs: {said}"
    assert ours[1].keys() == theirs[1].keys()
    for file, tensors in ours[1].items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, theirs[1][file][name]), f"{file}: {name} differs"


def lengths(seen):
    """phase -> [seconds it took, each time], of rank 0."""
    mine = [(at, phase) for rank, _, at, phase in seen if rank == 0]
    found = {}
    for (at, phase), (then, _) in zip(mine, mine[1:]):
        found.setdefault(phase, []).append(then - at)
    return {phase: sum(seconds) / len(seconds) for phase, seconds in found.items()}


def kill_in(run, phase, seconds, alone, chance):
    """Kill a run that has just been started, in a phase; what was killed in fact, None if it ended before."""
    wanted, since = chance.randint(1, 3), time.monotonic()  # the first time, or a later one
    while phase != "launch" and sum(p == phase for rank, _, _, p in run.seen() if rank == 0) < wanted:
        if run.process.poll() is not None:
            return None
        if time.monotonic() - since > LIMIT:
            run.wait(0)
        time.sleep(0.002)
    time.sleep(chance.uniform(0, seconds))
    if run.process.poll() is not None:
        return None
    ranks = {rank: pid for rank, pid, _, _ in run.seen()}
    if not alone or not ranks:
        run.kill()
    else:
        rank = chance.choice(sorted(ranks))
        try:
            os.kill(ranks[rank], signal.SIGKILL)
        except ProcessLookupError:
            return None
        if run.wait() == 0:
            return None  # it had done all but leave
    last = [p for rank, _, _, p in run.seen() if rank == 0]
    return last[-1] if last else "launch"


def soak(ranks, kills, chance, directory):
    """Counter of the phases in which `kills` kills hit a run on `ranks` processes."""
    undisturbed = Run(directory / "undisturbed", ranks)
    undisturbed.start()
    assert undisturbed.wait() == 0, undisturbed.said()
    whole, typical = undisturbed.outcome(), {"launch": 1.5, **lengths(undisturbed.seen())}
    hit, starts, run, done = Counter(), 0, None, 0
    while sum(hit.values()) < kills or run:
        if run is None:
            run = Run(directory / f"run {done}", ranks)
        if chance.random() < 0.5:
            shutil.rmtree(run.directory / "cache", ignore_errors=True)
        run.start()
        starts += 1
        assert starts < 4 * kills + 20, f"no progress; {run.said()}"
        if sum(hit.values()) < kills:
            phase = min(PHASES, key=lambda p: hit[p])
            found = kill_in(run, phase, typical[phase], ranks > 1 and chance.random() < 0.5, chance)
            hit.update([found] if found else [])
        if run.process.poll() is None or run.process.returncode == 0:  # undisturbed, or too late to be disturbed
            assert run.wait() == 0, run.said()
            assert_same(run.outcome(), whole, run.said())
            leftovers = [n for n in os.listdir(run.out / "checkpoints") if n.startswith("tmp")]
            assert not leftovers, leftovers
            shutil.rmtree(run.directory)
            run, done = None, done + 1
    return hit, starts, done


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for ranks, kills in (1, options.kills - options.kills // 2), (2, options.kills // 2):
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as directory:
            hit, starts, done = soak(ranks, kills, random.Random(options.seed), Path(directory))
        print(f"{ranks} process{'es' * (ranks > 1)}: {sum(hit.values())} kills, {starts} starts, {done} runs to the end, "
              f"all to the bit; {time.monotonic() - began:.0f} s")
        print("".join(f"{phase:>12}" for phase in PHASES))
        print("".join(f"{hit[phase]:>12}" for phase in PHASES), flush=True)
        missed = [phase for phase in PHASES if not hit[phase]]
        assert not missed or kills < 3 * len(PHASES), f"never hit: {missed}"


if __name__ == "__main__":
    main()
