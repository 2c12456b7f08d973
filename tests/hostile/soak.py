"""Kill a run again and again, let it go on, and compare what comes out with a run that nobody disturbed, bit for bit.

    python tests/hostile/soak.py --kills 100    # prints what was killed in which phase; exit code 1, and why, at a difference
    python tests/hostile/soak.py -- --use_lora --lora_dropout 0.1    # the same of a run with these flags as well

Runs of the tiny model, on one rank and on two, are killed (SIGKILL: all ranks, or one alone) and started again with
--resume_from auto. A kill waits for a phase of sft.py to begin (Ranks.set_phase tells), then for a random part of the time
that the phase takes; or it waits for one of the moves that make a checkpoint (os.replace, os.symlink), before which the
rank stops to be killed. There is no torchrun, which would end the ranks that are left: they have to do it by
themselves.

A start is a fork of this process, which has imported everything: an import takes ten times what is tested.
"""

import argparse
import json
import multiprocessing
import os
import random
import re
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; and a fork keeps no threads

import torch._dynamo  # noqa: E402, F401  gradient checkpointing imports it, in a second

import sft  # noqa: E402
from disk import checkpoint  # noqa: E402
from ranks import processes  # noqa: E402
from settings import errors  # noqa: E402

STEPS, TIMEOUT = 6, 10
EXAMPLES, VALIDATION = (os.path.join(ROOT, "data", name) for name in ("example_sft.json", "example.jsonl"))
RUN = ("--model", os.path.join(ROOT, "models", "tiny"), "--train_data", EXAMPLES, "--val_data", VALIDATION, "--max_length", 64, "--batch_size", 2,
       "--lr", 1e-3, "--max_steps", STEPS, "--save_steps", 2, "--eval_steps", 3, "--keep_checkpoints", 2, "--keep_best",
       "--timeout", TIMEOUT, "--resume_from", "auto")
MORE = []  # flags from behind --
PHASES = ("start", "tokenise", "load", "step", "evaluation", "save")
MOVES = {  # name of a window: the move that comes next in it, without numbers
    "a step without its name": "save: tmp_step -> step",
    "a step, no link": "save: step => tmp_latest",
    "latest not there yet": "load: tmp_latest -> latest, the first",
    "latest not moved yet": "save: tmp_latest -> latest",
    "old step aside, no new one": "save: tmp_step -> step, an old one aside",
    "latest moved, a run goes on": "load: tmp_latest -> latest",
    "metrics.jsonl not cut yet": "load: metrics.jsonl.tmp -> metrics.jsonl",
    "an old step to be removed": "save: step -> tmp_old_step",
    "best not moved yet": "save: tmp_best -> best",
}
NEEDS = {  # windows that only a kill in another one opens
    "latest not there yet": "a step, no link", "old step aside, no new one": "latest not moved yet",
    "latest moved, a run goes on": "latest not moved yet",
}
CHANGES = ("seconds", "tokens_per_second", "peak_memory_gb")  # what a run does not repeat


def be_rank(rank, size, port, flags, pipe, screen, window):
    """A forked process: sft.main() as rank `rank`, which writes to `pipe` what it does, and stops before `window`."""
    os.setsid()
    for stream in (1, 2):
        os.dup2(os.open(screen, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    if size > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))
    at, replace, symlink = processes.Ranks.set_phase, os.replace, os.symlink
    phase = ""

    def tell(word):
        os.write(pipe, f"{rank} {word}\n".encode())  # short enough to stay whole

    def tell_phase(ranks, name):
        nonlocal phase
        at(ranks, name)
        phase = name.split()[0]
        tell(phase)

    def stop_before(source, arrow, target):
        directory = os.path.dirname(target)
        names = [re.sub(r"_\d+$", "", os.path.basename(path)) for path in (source, target)]
        move = f"{phase}: {names[0]} {arrow} {names[1]}"
        if names[1] == "latest" and not os.path.lexists(target):
            move += ", the first"
        if names[0] == "tmp_step" and any(name.startswith("tmp_old_step") for name in os.listdir(directory)):
            move += ", an old one aside"
        if move == window:
            tell("window")
            time.sleep(60)  # to be killed

    def told_replace(source, target):
        stop_before(source, "->", target)
        replace(source, target)

    def told_symlink(source, target):
        stop_before(source, "=>", target)
        symlink(source, target)

    processes.Ranks.set_phase, os.replace, os.symlink = tell_phase, told_replace, told_symlink
    sys.argv = ["sft.py", *map(str, flags)]
    errors.run(sft.main)


@dataclass
class Start:
    """One start of a run: its processes, and what they tell as (time, rank, word)."""

    processes: list
    pipe: int
    screen: str
    told: list

    def read(self, seconds):
        """Take in what is told within `seconds`; False at the end, when no process is left."""
        if not select.select([self.pipe], [], [], max(0, seconds))[0]:
            return True
        text, now = os.read(self.pipe, 65536).decode(), time.monotonic()
        self.told += [(now, int(rank), word) for rank, word in map(str.split, text.splitlines())]
        return bool(text)

    def wait(self, seconds):
        """Wait for the end of all; AssertionError, when it does not come in time. Returns the exit codes."""
        until = time.monotonic() + seconds
        while self.read(until - time.monotonic()):
            if time.monotonic() > until:
                left = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
                self.kill(left)
                raise AssertionError(f"rank {left} had not ended {seconds} s later; see {self.screen}")
        for process in self.processes:
            process.join()
        os.close(self.pipe)
        return [process.exitcode for process in self.processes]

    def finish(self, seconds):
        """Wait for the end of a run that nobody disturbs."""
        codes = self.wait(seconds)
        assert not any(codes), f"exit codes {codes}; see {self.screen}"

    def times(self, word, ranks):
        """How often one of the ranks has told the word."""
        return sum(told == word and rank in ranks for _, rank, told in self.told)

    def kill(self, ranks):
        for rank in ranks:
            if self.processes[rank].is_alive():
                os.kill(self.processes[rank].pid, signal.SIGKILL)


def begin(directory, size, window=None):
    reading, writing = os.pipe()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    screen, fork = f"{directory}.screen", multiprocessing.get_context("fork")
    flags = (*RUN, *MORE, "--output_dir", directory, "--cache_dir", f"{directory}.cache")
    processes = [fork.Process(target=be_rank, args=(rank, size, port, flags, writing, screen, MOVES.get(window)))
                 for rank in range(size)]
    for process in processes:
        process.start()
    os.close(writing)
    return Start(processes, reading, screen, [])


def undisturbed(directory, size):
    """A run without a kill: (seconds that each phase takes at the longest, what comes out)."""
    start = begin(directory, size)
    start.finish(120)
    told = [(t, word) for t, rank, word in start.told if rank == 0] + [(time.monotonic(), "")]
    lasts = {}
    for (t, word), (then, _) in zip(told, told[1:]):
        lasts[word] = max(lasts.get(word, 0), then - t)
    return lasts, outcome(directory)


def outcome(directory):
    """What a run leaves, as {name: bytes}: each file of the last step's directory, links, and all metrics."""
    root, found = os.path.join(directory, "checkpoints"), {}
    last = os.path.join(root, f"step_{STEPS}")
    for parent, _, files in os.walk(last):
        for file in files:
            with open(path := os.path.join(parent, file), "rb") as f:
                found[os.path.relpath(path, last)] = f.read()
    found.update({link: os.readlink(os.path.join(root, link)) for link in ("latest", "best")})
    with open(os.path.join(directory, "metrics.jsonl"), encoding="utf-8") as f:
        for line in map(json.loads, f):
            kind = f"metrics.jsonl, step {line['step']}, {'validation' if 'val_loss' in line else 'training'}"
            assert kind not in found, f"{directory}/{kind}: twice"
            found[kind] = {key: value for key, value in line.items() if key not in CHANGES}
    return found


def disturb(directory, size, target, victims, lasts, draw):
    """Start the run and kill `victims` in `target`, a phase or a window. Returns the phase or window that the kill met
    and the seconds until all had ended; or None where the run came to its end before."""
    start, word = begin(directory, size, target), "window" if target in MOVES else target
    nth = draw.randint(1, 2) if target in ("step", "save") else 1
    until = time.monotonic() + 60
    while start.times(word, victims[:1]) < nth:
        assert time.monotonic() < until, f"{target} did not come within 60 s; see {start.screen}"
        if not start.read(1):
            start.finish(0)
            return None
    if word == target:
        time.sleep(draw.random() * lasts[target])
    start.kill(victims)
    killed = time.monotonic()
    codes = start.wait(3 * TIMEOUT)
    if codes[victims[0]] == 0:
        return None  # it was faster
    assert codes[victims[0]] == -signal.SIGKILL, f"exit codes {codes}; see {start.screen}"
    was_saved = os.path.isdir(os.path.join(directory, "checkpoints", f"step_{STEPS}"))
    for rank in set(range(size)) - set(victims):  # with its work done it may miss nobody
        assert codes[rank] or was_saved, f"rank {rank} ended with 0, rank {victims} being gone; see {start.screen}"
    phases = [told for _, rank, told in start.told if rank == victims[0] and told != "window"]
    return target if target in MOVES else phases[-1], time.monotonic() - killed


def check_whole(directory):
    """Law 5: whatever has the name of a step is whole, and so is what the links name."""
    root = os.path.join(directory, "checkpoints")
    for step in checkpoint.steps_in(root):
        checkpoint.verify(os.path.join(root, f"step_{step}"))
    for link in (os.path.join(root, name) for name in ("latest", "best")):
        assert not os.path.lexists(link) or os.path.isdir(link), f"{link} names what is not there"


def plan(kills, draw):
    """Ranks -> phases and windows to kill in, in order. Each phase is there once before any comes again."""
    phases = draw.sample(PHASES, len(PHASES))
    targets = {1: phases[:3], 2: phases[3:]}
    for size, n in (1, (kills + 1) // 2), (2, kills // 2):
        while len(targets[size]) < n:
            targets[size] += [*MOVES, *draw.sample(PHASES, len(PHASES))]
        del targets[size][n:]
    return targets


@dataclass
class Tally:
    met: Counter  # (phase or window, ranks, "all" or "one" of them killed) -> kills
    starts: int = 0
    runs: int = 0
    slowest: float = 0.0  # seconds until a rank had ended that was left alone


def disturbed(directory, size, targets, lasts, draw, tally):
    """One run, killed up to eight times, until it is over. Takes from `targets` those that are done."""
    for _ in range(8):
        if not targets:
            break
        target, tally.starts = targets[0], tally.starts + 1
        victims = draw.choice(([0], [0, 1], [1]) if target in PHASES else ([0], [0, 1]))  # rank 0 makes the moves
        victims = [0] if size == 1 else victims
        hit = disturb(directory, size, target, victims, lasts, draw)
        check_whole(directory)
        if hit is None:
            if target in NEEDS:
                targets.insert(0, NEEDS[target])
            return
        what, seconds = hit
        tally.met[what, size, "all" if len(victims) == size else "one"] += 1
        if len(victims) < size:
            tally.slowest = max(tally.slowest, seconds)
        targets.pop(0)
        if not any(target == what for what, *_ in tally.met):  # its moment was missed, and no other kill has met it
            targets.append(target)
    tally.starts += 1
    begin(directory, size).finish(120)


def soak(kills, draw, directory):
    """Kill `kills` times, compare each run, and return the Tally."""
    tally = Tally(Counter())
    for size, targets in plan(kills, draw).items():
        lasts, right = undisturbed(os.path.join(directory, f"undisturbed{size}"), size)
        for i in range(kills + 2):  # each run meets a kill at least, or its next does
            if targets:
                out = os.path.join(directory, f"ranks{size}_run{i}")
                disturbed(out, size, targets, lasts, draw, tally)
                compare(out, right)
                tally.runs += 1
        assert not targets, f"{len(targets)} kills met nothing in {kills + 2} runs: {targets[:5]}"
    return tally


def compare(directory, right):
    found = outcome(directory)
    differ = [name for name in sorted(right.keys() | found.keys()) if right.get(name) != found.get(name)]
    assert not differ, f"{directory} is not what an undisturbed run gives: {differ[:8]} ({len(differ)} in all)"
    shutil.rmtree(directory)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="at least 6, one for each phase")
    parser.add_argument("--seed", type=int, default=None, help="of the moments; none is another each time")
    parser.add_argument("flags", nargs="*", help="of sft.py, behind --")
    args = parser.parse_args()
    MORE.extend(args.flags)
    if args.kills < len(PHASES):
        parser.error(f"--kills {args.kills}: each phase takes one; give at least {len(PHASES)}")
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    directory, started = tempfile.mkdtemp(prefix="soak_"), time.monotonic()
    print(f"seed {seed}, in {directory}", flush=True)
    tally = soak(args.kills, random.Random(seed), directory)
    columns = {"1 rank": (1, "all"), "both of 2": (2, "all"), "one of 2": (2, "one")}
    print(f"{'killed in':28}" + "".join(f"{name:>12}" for name in columns))
    for name in (*PHASES, *MOVES):
        print(f"{name:28}" + "".join(f"{tally.met[name, *column]:12}" for column in columns.values()))
    print(f"{tally.met.total()} kills, {tally.starts} starts, {tally.runs} runs, each to the bit as one undisturbed; "
          f"a rank left alone ended within {tally.slowest:.1f} s; {time.monotonic() - started:.0f} s in all")
    if missed := [name for name in PHASES if not any(what == name for what, *_ in tally.met)]:
        sys.exit(f"no kill met: {', '.join(missed)}")
    shutil.rmtree(directory)


if __name__ == "__main__":
    main()
