"""Kill runs many times, resume them, and compare the result bitwise with a run that was never killed.

    python tests/hostile/soak.py --kills 100    # prints the kills of each phase; exit code 1 on a difference
    python tests/hostile/soak.py -- --use_lora --lora_dropout 0.1    # the same, with these flags added to each run

Runs of the tiny model on one rank and on two get SIGKILL (all ranks, or only one) and are restarted with --resume_from
auto. There are two kinds of kill:

- in a phase of sft.py (Ranks.set_phase), after a random fraction of the time that the phase takes;
- in a window: before one of the calls of os.replace or os.symlink that publish a checkpoint, or before the thread that
  writes it flushes a file. The rank stops there.

With --async_save checkpoints are written and published while steps are computed, so the windows then come in these.

There is no torchrun, which would end the surviving ranks: they must end by themselves.

Each start is a fork of this process, which has imported everything: imports would take ten times as long as the run.
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
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; threads do not survive a fork

import torch._dynamo  # noqa: E402, F401  gradient checkpointing would import it, which takes a second

import sft  # noqa: E402
from disk import checkpoint, writer  # noqa: E402
from ranks import processes  # noqa: E402
from settings import errors  # noqa: E402

STEPS, TIMEOUT = 6, 10
EXAMPLES, VALIDATION = (os.path.join(ROOT, "data", name) for name in ("example_sft.json", "example.jsonl"))
RUN = ("--model", os.path.join(ROOT, "models", "tiny"), "--train_data", EXAMPLES, "--val_data", VALIDATION,
       "--max_length", 64, "--batch_size", 2, "--lr", 1e-3, "--max_steps", STEPS, "--save_steps", 2,
       "--eval_steps", 3, "--keep_checkpoints", 2, "--keep_best",
       "--timeout", TIMEOUT, "--resume_from", "auto")
MORE = []  # the flags after --
PHASES = ("start", "tokenise", "load", "step", "evaluation", "save")
MOVES = {  # name of a window: the call that comes next, as stop_before writes it
    "a file is not flushed": "save: model.safetensors written",
    "training state is not flushed": "save: tensors.safetensors written",
    "a step without its name": "save: tmp_step -> step",
    "a step, no link": "save: step => tmp_latest",
    "no latest yet": "load: tmp_latest -> latest, the first",
    "latest not moved yet": "save: tmp_latest -> latest",
    "old step renamed, no new one": "save: tmp_step -> step, an old one renamed",
    "latest moved, a run resumes": "load: tmp_latest -> latest",
    "metrics.jsonl not truncated": "load: metrics.jsonl.tmp -> metrics.jsonl",
    "an old step to be removed": "save: step -> tmp_old_step",
    "best not moved yet": "save: tmp_best -> best",
}
NEEDS = {  # window: the window in which a kill must come first, as only then it occurs
    "no latest yet": "a step, no link",
    "old step renamed, no new one": "latest not moved yet",
    "latest moved, a run resumes": "latest not moved yet",
}
NOT_REPRODUCIBLE = ("seconds", "tokens_per_second", "peak_memory_gb", "reserved_memory_gb", "mfu")  # metrics that differ between equal runs


def be_rank(rank, size, port, flags, pipe, screen, window):
    """In a forked process: sft.main() as rank `rank`. Writes "RANK WORD" lines to `pipe`, and stops before `window`.

    A word is the name of a phase that begins, or "window".
    """
    os.setsid()
    for stream in (1, 2):
        os.dup2(os.open(screen, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    if size > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    set_phase, replace, symlink, flush = processes.Ranks.set_phase, os.replace, os.symlink, writer.TensorFile.flush
    phase = ""

    def report(word):
        os.write(pipe, f"{rank} {word}\n".encode())  # short enough to be one atomic write

    def reported_phase(ranks, name):
        nonlocal phase
        set_phase(ranks, name)
        word = name.split()[0]
        if word in PHASES and (phase, word) != ("start", "start"):  # the lock of the directory is a part of start
            phase = word
            report(phase)

    def stop_at(move):
        if move == window:
            report("window")
            time.sleep(60)  # the kill comes here

    def stop_before(source, arrow, target):
        directory = os.path.dirname(target)
        names = [re.sub(r"_\d+$", "", os.path.basename(path)) for path in (source, target)]
        move = f"{'load' if phase == 'load' else 'save'}: {names[0]} {arrow} {names[1]}"
        if names[1] == "latest" and not os.path.lexists(target):
            move += ", the first"
        if names[0] == "tmp_step" and any(name.startswith("tmp_old_step") for name in os.listdir(directory)):
            move += ", an old one renamed"
        stop_at(move)

    def stopping_replace(source, target):
        stop_before(source, "->", target)
        replace(source, target)

    def stopping_symlink(source, target):
        stop_before(source, "=>", target)
        symlink(source, target)

    def stopping_flush(file):
        file.write_held()
        name = re.sub(r"-\d+-of-\d+", "", os.path.basename(file.path))
        stop_at(f"save: {name} written")
        return flush(file)

    processes.Ranks.set_phase, writer.TensorFile.flush = reported_phase, stopping_flush
    os.replace, os.symlink = stopping_replace, stopping_symlink
    sys.argv = ["sft.py", *map(str, flags)]
    errors.run(sft.main)


@dataclass
class Start:
    """One start of a run: its processes, and their reports as [(time, rank, word), ...]."""

    processes: list
    pipe: int
    screen: str
    reports: list

    def read(self, seconds):
        """Wait up to `seconds` for reports and store them. Returns False when no process is left."""
        if not select.select([self.pipe], [], [], max(0, seconds))[0]:
            return True
        text, now = os.read(self.pipe, 65536).decode(), time.monotonic()
        self.reports += [(now, int(rank), word) for rank, word in map(str.split, text.splitlines())]
        return bool(text)

    def wait(self, seconds):
        """Wait until all processes have ended; return their exit codes. AssertionError if it takes too long."""
        until = time.monotonic() + seconds
        while self.read(until - time.monotonic()):
            if time.monotonic() > until:
                alive = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
                self.kill(alive)
                raise AssertionError(f"rank {alive} had not ended after {seconds} s; see {self.screen}")
        for process in self.processes:
            process.join()
        os.close(self.pipe)
        return [process.exitcode for process in self.processes]

    def finish(self, seconds):
        """Wait for the end of a run that is not killed."""
        codes = self.wait(seconds)
        assert not any(codes), f"exit codes {codes}; see {self.screen}"

    def times(self, word, ranks):
        """How often one of the ranks has reported the word."""
        return sum(reported == word and rank in ranks for _, rank, reported in self.reports)

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
    """A run without a kill: ({phase: its longest duration in seconds}, its outcome)."""
    start = begin(directory, size)
    start.finish(120)
    reports = [(t, word) for t, rank, word in start.reports if rank == 0] + [(time.monotonic(), "")]
    durations = {}
    for (begins, word), (ends, _) in zip(reports, reports[1:]):
        durations[word] = max(durations.get(word, 0), ends - begins)
    return durations, outcome(directory)


def outcome(directory):
    """The result of a run, {name: content}: each file of the last step's directory, the links, and all metrics."""
    root, contents = os.path.join(directory, "checkpoints"), {}
    last = os.path.join(root, f"step_{STEPS}")
    for parent, _, files in os.walk(last):
        for file in files:
            path = os.path.join(parent, file)
            with open(path, "rb") as f:
                contents[os.path.relpath(path, last)] = f.read()
    # the settings differ in --async_save, and so does their checksum
    del contents["training_state/settings.json"]
    manifest = json.loads(contents["training_state/manifest.json"])
    contents["training_state/manifest.json"] = {
        name: entry for name, entry in manifest["files"].items() if name != "training_state/settings.json"}
    contents.update({link: os.readlink(os.path.join(root, link)) for link in ("latest", "best")})
    with open(os.path.join(directory, "metrics.jsonl"), encoding="utf-8") as f:
        for line in map(json.loads, f):
            kind = "validation" if "val_loss" in line else "training"
            name = f"metrics.jsonl, step {line['step']}, {kind}"
            assert name not in contents, f"{directory}/{name}: twice"
            contents[name] = {key: value for key, value in line.items() if key not in NOT_REPRODUCIBLE}
    return contents


def disturb(directory, size, target, victims, durations, generator):
    """Start the run and kill the ranks `victims` in `target`, a phase or a window.

    Returns (the phase or window in which the kill came, seconds until all ranks had ended), or None if the run ended
    before the kill.
    """
    start = begin(directory, size, target)
    word = "window" if target in MOVES else target
    nth = generator.randint(1, 2) if target in ("step", "save") else 1
    until = time.monotonic() + 60
    while start.times(word, victims[:1]) < nth:
        assert time.monotonic() < until, f"{target} did not begin within 60 s; see {start.screen}"
        if not start.read(1):
            start.finish(0)
            return None
    if word == target:
        time.sleep(generator.random() * durations[target])
    start.kill(victims)
    killed = time.monotonic()
    codes = start.wait(3 * TIMEOUT)
    if codes[victims[0]] == 0:
        return None  # it ended before the signal came
    assert codes[victims[0]] == -signal.SIGKILL, f"exit codes {codes}; see {start.screen}"
    was_saved = os.path.isdir(os.path.join(directory, "checkpoints", f"step_{STEPS}"))
    for rank in set(range(size)) - set(victims):  # after the last save, a rank may end without noticing the kill
        assert codes[rank] or was_saved, f"rank {rank} ended with 0 after {victims} were killed; see {start.screen}"
    phases = [word for _, rank, word in start.reports if rank == victims[0] and word != "window"]
    return target if target in MOVES else phases[-1], time.monotonic() - killed


def check_complete(directory):
    """Every directory with the name of a step is a complete checkpoint, and the links point to directories."""
    root = os.path.join(directory, "checkpoints")
    for step in checkpoint.steps_in(root):
        checkpoint.verify(os.path.join(root, f"step_{step}"))
    for link in (os.path.join(root, name) for name in ("latest", "best")):
        assert not os.path.lexists(link) or os.path.isdir(link), f"{link} points to a missing directory"


def choose_targets(kills, generator):
    """{number of ranks: phases and windows to kill in, in order}. Each phase comes once before any comes twice."""
    phases = generator.sample(PHASES, len(PHASES))
    targets = {1: phases[:3], 2: phases[3:]}
    for size, n in (1, (kills + 1) // 2), (2, kills // 2):
        while len(targets[size]) < n:
            targets[size] += [*MOVES, *generator.sample(PHASES, len(PHASES))]
        del targets[size][n:]
    return targets


@dataclass
class Tally:
    """Counts over all runs."""

    hits: Counter  # (phase or window, number of ranks, "all" or "one" of them killed) -> kills
    starts: int = 0
    runs: int = 0
    slowest: float = 0.0  # the longest time, in seconds, until a surviving rank ended


def disturbed(directory, size, targets, durations, generator, tally):
    """One run, killed up to eight times, then finished. Removes from `targets` those that are done."""
    for _ in range(8):
        if not targets:
            break
        target, tally.starts = targets[0], tally.starts + 1
        # Only rank 0 publishes checkpoints, so it must be among the victims in a window.
        victims = generator.choice(([0], [0, 1], [1]) if target in PHASES else ([0], [0, 1]))
        victims = [0] if size == 1 else victims
        hit = disturb(directory, size, target, victims, durations, generator)
        check_complete(directory)
        if hit is None:
            if target in NEEDS:
                targets.insert(0, NEEDS[target])
            return
        killed_in, seconds = hit
        tally.hits[killed_in, size, "all" if len(victims) == size else "one"] += 1
        if len(victims) < size:
            tally.slowest = max(tally.slowest, seconds)
        targets.pop(0)
        if not any(target == name for name, *_ in tally.hits):  # the kill came too late: try this target again
            targets.append(target)
    tally.starts += 1
    begin(directory, size).finish(120)


def soak(kills, generator, directory):
    """Kill `kills` times, compare each run, and return the Tally."""
    tally = Tally(Counter())
    for size, targets in choose_targets(kills, generator).items():
        durations, expected = undisturbed(os.path.join(directory, f"undisturbed{size}"), size)
        for i in range(kills + 2):  # enough: of two runs in a row, at least one is killed
            if targets:
                out = os.path.join(directory, f"ranks{size}_run{i}")
                disturbed(out, size, targets, durations, generator, tally)
                compare(out, expected)
                tally.runs += 1
        assert not targets, f"{len(targets)} kills were not possible in {kills + 2} runs: {targets[:5]}"
    return tally


def compare(directory, expected):
    """AssertionError unless the outcome of a run is bitwise the expected one. Removes the run's directory."""
    result = outcome(directory)
    names = sorted(expected.keys() | result.keys())
    differ = [name for name in names if expected.get(name) != result.get(name)]
    assert not differ, f"{directory} differs from an undisturbed run: {differ[:8]} ({len(differ)} in all)"
    shutil.rmtree(directory)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="number of kills; at least 6, one per phase")
    parser.add_argument("--seed", type=int, default=None, help="of the kills' times and victims; default: random")
    parser.add_argument("flags", nargs="*", help="flags for sft.py, after --")
    args = parser.parse_args()
    MORE.extend(args.flags)
    if args.kills < len(PHASES):
        parser.error(f"--kills {args.kills}: each phase needs one; use at least {len(PHASES)}")
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    directory, started = tempfile.mkdtemp(prefix="soak_"), time.monotonic()
    print(f"seed {seed}, in {directory}", flush=True)
    tally = soak(args.kills, random.Random(seed), directory)
    columns = {"1 rank": (1, "all"), "both of 2": (2, "all"), "one of 2": (2, "one")}
    print(f"{'killed in':28}" + "".join(f"{name:>12}" for name in columns))
    for name in (*PHASES, *MOVES):
        print(f"{name:28}" + "".join(f"{tally.hits[name, *column]:12}" for column in columns.values()))
    print(f"{tally.hits.total()} kills, {tally.starts} starts, {tally.runs} runs, each bitwise equal to an undisturbed "
          f"one; surviving ranks ended within {tally.slowest:.1f} s; {time.monotonic() - started:.0f} s in all")
    missed = [phase for phase in PHASES if not any(name == phase for name, *_ in tally.hits)]
    if missed:
        sys.exit(f"no kill in these phases: {', '.join(missed)}")
    shutil.rmtree(directory)


if __name__ == "__main__":
    main()
