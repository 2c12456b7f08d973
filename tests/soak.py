"""Kill a run again and again, let it go on, and compare what comes out with a run that nobody disturbed, bit for bit.

    python tests/soak.py --kills 100    # prints what was killed in which phase; exit code 1, and why, at a difference

Runs of the tiny model, on one rank and on two, are killed (SIGKILL: all ranks, or one alone) and started again with
--resume_from auto. A kill waits for a phase of sft.py to begin (Ranks.at tells), then for a random part of the time that
the phase takes; or it waits for one of the moves that make a checkpoint (os.replace, os.symlink), before which the rank
stops to be killed. There is no torchrun, which would end the ranks that are left: they have to do it by themselves.

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

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; and a fork keeps no threads

import torch._dynamo  # noqa: E402, F401  an optimizer imports it, in a second

import checkpoint  # noqa: E402
import config  # noqa: E402
import fsdp  # noqa: E402
import sft  # noqa: E402

STEPS, TIMEOUT = 8, 10
EXAMPLES, VALIDATION = (os.path.join(ROOT, "data", name) for name in ("example_sft.json", "example.jsonl"))
RUN = ("--model", "tiny", "--train_data", EXAMPLES, "--val_data", VALIDATION, "--max_length", 64, "--batch_size", 2,
       "--lr", 1e-3, "--max_steps", STEPS, "--save_steps", 2, "--eval_steps", 3, "--keep_checkpoints", 2, "--keep_best",
       "--timeout", TIMEOUT, "--resume_from", "auto")
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
    at, replace, symlink = fsdp.Ranks.at, os.replace, os.symlink
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

    fsdp.Ranks.at, os.replace, os.symlink = tell_phase, told_replace, told_symlink
    sys.argv = ["sft.py", *map(str, flags)]
    config.run(sft.main)


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
    flags = (*RUN, "--output_dir", directory, "--cache_dir", f"{directory}.cache")
    processes = [fork.Process(target=be_rank, args=(rank, size, port, flags, writing, screen, MOVES.get(window)))
                 for rank in range(size)]
    for process in processes:
        process.start()
    os.close(writing)
    return Start(processes, reading, screen, [])


def undisturbed(directory, size):
    """A run without a kill: (seconds that each phase takes at the longest, what comes out)."""
    start = begin(directory, size)
    codes = start.wait(120)
    assert codes == [0] * size, f"exit codes {codes}; see {start.screen}"
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
    """Start the run and kill `victims` in `target`, a phase or a window. Returns the phase that the kill met and the
    seconds until all had ended; or None where the run came to its end before."""
    start, is_window = begin(directory, size, target), target in MOVES
    nth = draw.randint(1, 2) if target in ("step", "save") else 1
    until = time.monotonic() + 60
    is_there = 0
    while is_there < nth:
        assert time.monotonic() < until, f"{target} did not come within 60 s; see {start.screen}"
        if not start.read(1):
            codes = start.wait(0)
            assert codes == [0] * size, f"exit codes {codes}; see {start.screen}"
            return None
        is_there = sum(word == ("window" if is_window else target) and (is_window or rank == victims[0])
                       for _, rank, word in start.told)
    if not is_window:
        time.sleep(draw.random() * lasts[target])
    start.kill(victims)
    killed = time.monotonic()
    codes = start.wait(3 * TIMEOUT)
    was_whole = os.path.isdir(os.path.join(directory, "checkpoints", f"step_{STEPS}"))
    for rank in set(range(size)) - set(victims):  # in its last words it may miss nobody
        assert codes[rank] or was_whole, f"rank {rank} ended with 0 without rank {victims}; see {start.screen}"
    if all(codes[rank] == 0 for rank in victims):
        return None  # it was faster
    phase = [word for _, rank, word in start.told if rank == victims[0] and word != "window"][-1]
    return target if is_window else phase, time.monotonic() - killed


def check_whole(directory):
    """Law 5: whatever has the name of a step is whole, and so is what latest names."""
    root = os.path.join(directory, "checkpoints")
    steps = checkpoint.steps_in(root)
    for step in steps:
        checkpoint.verify(os.path.join(root, f"step_{step}"))
    link = os.path.join(root, "latest")
    assert not os.path.lexists(link) or os.path.isdir(link), f"{link} names what is not there"


def soak(kills, seed, directory):
    """Kill `kills` times. Returns (Counter of phases and windows by ranks and victims, the longest that ranks took to
    end after another was killed, runs compared, starts)."""
    draw = random.Random(seed)
    phases = draw.sample(PHASES, len(PHASES))
    waiting = {1: phases[:3], 2: phases[3:]}  # few kills meet each phase once
    for queue, n in zip(waiting.values(), ((kills + 1) // 2, kills // 2)):
        while len(queue) < n:
            queue += [*MOVES, *draw.sample(PHASES, len(PHASES))]
        del queue[n:]
    met, slowest, runs, starts = Counter(), 0.0, 0, 0
    for size, queue in waiting.items():
        lasts, right = undisturbed(os.path.join(directory, f"right{size}"), size)
        for run in range(kills + 2):  # every run should meet a kill, most meet many
            if not queue:
                break
            out, n_starts, is_over = os.path.join(directory, f"ranks{size}_run{run}"), 0, False
            while not is_over:
                kill = n_starts < 8 and queue
                starts, n_starts = starts + 1, n_starts + 1
                if not kill:
                    codes = (last := begin(out, size)).wait(120)
                    assert codes == [0] * size, f"exit codes {codes}; see {last.screen}"
                    break
                target = queue[0]
                victims = [0] if size == 1 else draw.choice(([0, 1], [0], [1]))
                if target in MOVES and size == 2:  # rank 0 makes them
                    victims = draw.choice(([0, 1], [0]))
                hit = disturb(out, size, target, victims, lasts, draw)
                check_whole(out)
                is_over = hit is None
                if is_over and target in NEEDS:
                    queue.insert(0, NEEDS[target])
                elif hit:
                    queue.pop(0)
                    what, seconds = hit
                    met[what, size, "all" if len(victims) == size else "one"] += 1
                    slowest = max(slowest, seconds) if len(victims) < size else slowest
                    if what != target and target not in {w for w, *_ in met}:
                        queue.append(target)  # its moment was missed, and nothing has met it yet
            runs += 1
            compare(out, right)
        assert not queue, f"{len(queue)} kills met nothing in {kills + 2} runs: {queue[:5]}"
    return met, slowest, runs, starts


def compare(directory, right):
    found = outcome(directory)
    differ = [name for name in sorted(right.keys() | found.keys()) if right.get(name) != found.get(name)]
    assert not differ, f"{directory} is not what an undisturbed run gives: {differ[:8]} ({len(differ)} in all)"
    shutil.rmtree(directory)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="at least 6, one for each phase")
    parser.add_argument("--seed", type=int, default=None, help="of the moments; none is another each time")
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    directory, started = tempfile.mkdtemp(prefix="soak_"), time.monotonic()
    print(f"seed {seed}, in {directory}", flush=True)
    met, slowest, runs, starts = soak(args.kills, seed, directory)
    columns = ((1, "all"), (2, "all"), (2, "one"))
    print(f"{'killed in':28}{'1 rank':>10}{'both of 2':>12}{'one of 2':>12}")
    for name in (*PHASES, *MOVES):
        print(f"{name:28}" + "".join(f"{met[name, *column]:{width}}" for column, width in zip(columns, (10, 12, 12))))
    print(f"{met.total()} kills, {starts} starts, {runs} runs, each to the bit that of an undisturbed one; "
          f"a rank left alone ended within {slowest:.1f} s; {time.monotonic() - started:.0f} s in all")
    missed = [name for name in PHASES if not any(what == name for what, *_ in met)]
    if missed:
        sys.exit(f"no kill met: {', '.join(missed)}")
    shutil.rmtree(directory)


if __name__ == "__main__":
    main()
