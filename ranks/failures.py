"""How a run ends when one of its ranks fails: all ranks end soon, and one line says which was first, and why.

Each rank of several has a Watchdog. One of its threads carries: it writes to the store where this rank is,
and reads whether a rank has failed. The other one counts: for how long nothing has changed here and
elsewhere. It ends the process even while the main thread is blocked in a call of gloo or NCCL, and while the
store's node is gone. Who is to blame follows from the number of collectives that each rank has entered: the
ranks that wait for another have entered one more.
"""

import contextlib
import datetime
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch.distributed as dist

from disk.files import LockTimeout
from ranks.launch import CODE_FILE
from settings.errors import OutOfMemory, UserError, printable

TICK = 0.5  # seconds between two looks at the store
GRACE = 3  # seconds: how soon a rank that fails is known to one whose connection to it was closed
TOGETHER = 3  # all ranks may be in the same place for this many --timeout: they may load or compile
NEWS = 3  # seconds that a rank that ends waits for the others to read why
# Time-out of gloo, NCCL and the store. They count time for which a process was suspended, which the watchdog
# does not. Milliseconds must fit into 32 bits
BACKEND_TIMEOUT = datetime.timedelta(days=20)


@dataclass(frozen=True)
class Failure:
    """What ends the run, as the store and the screen show it."""

    rank: int
    node: int
    host: str
    pid: int
    phase: str
    cause: str  # "" if a signal ended the run: nothing more is printed
    code: int = 1  # exit code of all ranks
    is_silent: bool = False  # the rank does not respond; else it ends by itself, and prints its error

    def line(self):
        verb = "did not respond" if self.is_silent else "failed"
        return (f"{os.path.basename(sys.argv[0])}: error: rank {self.rank} (node {self.node}, {self.host}) "
                f"{verb} in {self.phase}: {self.cause}")


class State(NamedTuple):
    """What a rank last wrote to the store for the others."""

    node: int
    host: str
    pid: int
    phase: str
    entered: dict  # name of a process group -> number of its collectives that the rank has entered
    progress: int  # how often the rank has shown progress within its phase
    beat: int  # grows as long as the process runs
    parent: int = 0  # id of the parent process, torchrun

    @property
    def place(self):
        """What changes as long as the main thread gets on."""
        return self.phase, self.entered, self.progress


def collectives():
    """{name of a process group of this rank: number of its collectives entered so far}"""
    return {group.group_name: sum(group._get_backend(device)._get_sequence_number_for_group()
                                  for device in group._device_types)
            for group in list(dist.distributed_c10d._world.pg_map)}


def those_behind(states):
    """The ranks that others wait for: some have entered a collective that these have not entered.

    A rank that waits, and for which a third one waits, is not one of them.

    states  {rank: State}
    """
    latest, earliest = {}, {}
    for state in states.values():
        for group, number in state.entered.items():
            latest[group] = max(number, latest.get(group, 0))
            earliest[group] = min(number, earliest.get(group, number))
    return [rank for rank, state in states.items()
            if any(number < latest[group] for group, number in state.entered.items())
            and not any(number > earliest[group] for group, number in state.entered.items())]


def is_from_others(error):
    """Whether an error only says that another rank is gone or late.

    gloo has no error class of its own. Its messages begin with a file name of gloo's sources.
    """
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))


def code_of(error):
    """The exit code that settings.errors.run gives an error."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    is_input = isinstance(error, UserError) or (isinstance(error, OSError) and error.filename is not None)
    return 2 if is_input else 1


def child_state(pid):
    """The state of a process, a letter of `man proc`, if it is a child of this one's parent; "" otherwise.

    Without /proc it is "?".
    """
    if not os.path.exists("/proc/self/stat"):
        return "?"
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as f:
            state, parent = f.read().rpartition(")")[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return state if int(parent) == os.getppid() and state not in "ZX" else ""


def prepare(store, world_size):
    """Let every rank have a state in a new store: "", until it starts. To read a missing key would block."""
    store.multi_set([f"state {rank}" for rank in range(world_size)], [""] * world_size)


class Watchdog:
    """Watches this rank and the others once start() is called; see the top of this file.

    store    a connection of its own: a call of the main thread may block
    timeout  seconds for which a rank that others wait for may stay where it is. Only the time in which this
             process itself ran counts: a run that was suspended as a whole continues
    """

    def __init__(self, store, rank, world_size, timeout):
        self.store, self.rank, self.world_size, self.timeout = store, rank, world_size, timeout
        # Of many ranks, each reads the others' states more seldom: at most 128 per tick
        self.stride = 1 + world_size // 128
        self.grace = GRACE + self.stride * TICK
        self.phase, self.progress, self.store_waits, self.beat = "start", 0, 0, 0
        self.node = int(os.environ.get("GROUP_RANK", "0"))
        first = rank - int(os.environ.get("LOCAL_RANK", rank))
        self.node_ranks = range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        self.host = socket.gethostname()
        self.failure = None  # the Failure that ends the run
        self.proposal = None  # the Failure that this rank knows; the first proposal in the store wins
        self.own_error = None  # the Failure for which the main thread prints an error and exits
        self.lost = None  # why the main thread can't reach other ranks
        self.states = {}  # {rank: State} of all ranks, read while this one does not move
        self.siblings = {}  # {rank: State} of this node's ranks that are children of this one's parent
        self.has_read = False  # whether this rank is counted among those that have read the failure
        self.unread = world_size  # the number of ranks that have not read the failure yet
        self.ages = {}  # (rank, "beat" or "place") -> [what it was, seconds for which it has not changed]
        self.is_store_gone = False
        self.wake = threading.Event()

        self.closed = threading.Event()
        self.threads = [threading.Thread(target=target, daemon=True) for target in (self.carry, self.watch)]

    def start(self):
        for thread in self.threads:
            thread.start()

    # ---- the main thread -----------------------------------------------------------------------------

    def state(self):
        entered = {**collectives(), "store": self.store_waits}
        return State(self.node, self.host, os.getpid(), self.phase, entered, self.progress, self.beat,
                     os.getppid())

    def close(self):
        """Watch no longer: all ranks are done, or this one ends.

        A thread that is inside torch's C++ when Python ends would abort the process ("terminate called
        without an active exception"). Both call it: the store, and collectives().
        """
        self.closed.set()
        self.wake.set()
        for thread in self.threads:
            if thread.is_alive():
                thread.join(NEWS)

    def fail(self, error, code):
        """End the run because of an error in the main thread.

        Returns if this rank is the one to print it. Otherwise the other thread ends the process.

        code  exit code of all ranks
        """
        self.await_siblings()
        failure = self.blame_for(error, code)
        if failure is None:
            self.lost = str(error).splitlines()[0]
        else:
            self.own_error = None if failure.is_silent else failure
            self.propose(failure)
            if self.failure == self.own_error:
                is_first_on_node()  # the others need not print it
                if failure.cause:
                    leave_for_torchrun(failure.line())
                self.await_readers()
                self.close()
                return
        while True:
            time.sleep(1)

    def await_siblings(self):
        """Wait until carry() has read who the other ranks of this node are, but not for long.

        If torchrun has seen before this rank that one of them was killed, its SIGTERM is the error here.
        """
        self.wake.set()
        deadline = time.monotonic() + 2 * TICK
        while len(self.siblings) < len(self.node_ranks) and time.monotonic() < deadline:
            time.sleep(0.02)

    def blame_for(self, error, code):
        """The Failure that an error of the main thread stands for; None if watch() has to find it."""
        if gone := self.gone_sibling():  # torchrun then stops this rank too
            return gone
        if isinstance(error, LockTimeout):
            for rank, state in self.siblings.items():
                if state.pid == error.pid:
                    return self.silent(rank, state, str(error))
        if is_from_others(error):
            return None
        cause = f"{type(error).__name__}: {error}"
        if isinstance(error, OutOfMemory):
            cause = "memory ran out; the screen of that node says what would help"
        if isinstance(error, SystemExit):
            cause = ""
        cause = printable("\n".join(cause.splitlines()[-3:]))[:1000]
        return Failure(self.rank, self.node, self.host, os.getpid(), self.phase, cause, code)

    def propose(self, failure):
        """Let carry() write a failure to the store; self.failure is the first one that is there."""
        self.proposal = failure
        self.wake.set()
        deadline = time.monotonic() + NEWS
        while self.failure is None and self.proposal and not self.is_store_gone:
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        self.failure = self.failure or self.proposal

    def await_readers(self):
        """Wait until all ranks have read the failure: the store may end with this process."""
        deadline = time.monotonic() + NEWS
        while self.unread and not self.is_store_gone and time.monotonic() < deadline:
            time.sleep(0.02)

    # ---- the thread that carries ---------------------------------------------------------------------

    def carry(self):
        try:
            while self.unread and not self.closed.is_set():
                self.exchange()
                self.wake.wait(TICK)
                self.wake.clear()
        except dist.DistError:
            self.is_store_gone = True

    def exchange(self):
        self.beat += 1
        self.store.set(f"state {self.rank}", json.dumps(self.state()))
        if self.failure is None and self.proposal:
            self.claim(self.proposal)
        elif self.failure is None and self.store.check(["failed"]):
            self.failure = Failure(**json.loads(self.store.get("failed")))
        if self.failure:
            is_silent = self.failure.is_silent  # then nobody waits for the rank that failed
            counts = not self.has_read and not (is_silent and self.failure.rank == self.rank)
            self.has_read = True
            self.unread = self.world_size - is_silent - self.store.add("readers", int(counts))
            return
        if len(self.siblings) < len(self.node_ranks):
            # without torchrun, or under a script, ranks of a node may have different parents; a new dict each
            # time, as other threads go through the old one
            self.siblings = {**self.siblings, **{rank: state for rank, state in self.read(
                self.node_ranks).items() if state.parent == os.getppid()}}
        if self.is_looking and (self.beat + self.rank) % self.stride == 0:  # not all in the same tick
            self.states = self.read(range(self.world_size))

    def claim(self, failure):
        """Write a failure to the store unless one is there. A rank that is done may end: it is no failure."""
        if failure.is_silent and self.store.check([f"done {failure.rank}"]):
            self.proposal = None
            return
        if failure.is_silent and (known := self.read([failure.rank])):
            failure = replace(failure, phase=known[failure.rank].phase)  # the last one that it wrote
        text = self.store.compare_set("failed", "", json.dumps(asdict(failure)))
        self.failure = Failure(**json.loads(text))

    def read(self, ranks):
        """{rank: State} of those of the ranks that have started: one request, whatever their number."""
        texts = self.store.multi_get([f"state {rank}" for rank in ranks])
        return {rank: State(*json.loads(text)) for rank, text in zip(ranks, texts) if text}

    # ---- the thread that counts ----------------------------------------------------------------------

    def watch(self):
        last = time.monotonic()
        while self.failure is None and not self.closed.wait(TICK):
            now = time.monotonic()
            self.count(min(now - last, 2 * TICK))  # after a longer time this process was suspended
            last = now
            if self.failure is None and (failure := self.judge()):
                self.propose(failure)
        if self.failure:  # in a thread that close() does not wait for
            threading.Thread(target=self.end, daemon=True).start()

    def age(self, key, value, seconds):
        """Add to the time for which a value has not changed."""
        before = self.ages.get(key)
        self.ages[key] = [value, before[1] + seconds if before and before[0] == value else 0]

    def age_of(self, *key):
        return self.ages[key][1] if key in self.ages else 0

    @property
    def is_looking(self):
        """Whether this rank reads where the others are: it has not moved for some seconds.

        Of many ranks, for more: otherwise all would read all states in each long step of a large model.
        """
        return bool(self.lost) or self.age_of("own") > 4 * TICK * self.stride

    def count(self, seconds):
        self.age(("own",), self.state().place, seconds)
        self.age(("store",), self.beat, seconds)
        if not self.is_looking:
            self.ages = {key: age for key, age in self.ages.items() if key in (("own",), ("store",))}
            return
        for rank in range(self.world_size):
            state = self.states.get(rank)
            self.age((rank, "beat"), state and state.beat, seconds)
            self.age((rank, "place"), state and state.place, seconds)

    def judge(self):
        """The Failure that this rank sees, or None."""
        if gone := self.gone_sibling():
            return gone
        if self.is_store_gone:
            return self.store_failure("node 0 is gone: the connection to its store was closed")
        limit = self.grace if self.lost else max(self.timeout, self.grace)
        if self.age_of("store") > limit:
            self.is_store_gone = True
            return self.store_failure(f"node 0 is gone, or the link to it is cut: its store has not "
                                      f"answered for {limit} s")
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        silent = [rank for rank in others if self.age_of(rank, "beat") > limit]
        if silent:
            silent.sort(key=lambda rank: -self.age_of(rank, "beat"))
            return self.silent_failure(silent, limit)
        stuck = {rank: state for rank, state in self.states.items() if self.age_of(rank, "place") > limit}
        behind = [rank for rank in those_behind(self.states) if rank in stuck]
        if behind and self.rank not in behind and self.is_looking:
            return self.silent(behind[0], stuck[behind[0]], f"it has not moved for {limit} s, and rank "
                               f"{self.rank} waits for it in {self.phase}")
        limit = 2 * self.grace if self.lost else TOGETHER * self.timeout
        if self.is_looking and min((self.age_of(rank, "place") for rank in others), default=0) > limit:
            why = self.lost or (f"no rank has moved for {limit} s, and all are in the same collectives: "
                                "check the network and the GPUs, or raise --timeout for a longer load")
            return Failure(self.rank, self.node, self.host, os.getpid(), self.phase, why)
        return None

    def gone_sibling(self):
        """The Failure of a rank of this node whose process has ended, or None."""
        for rank, state in self.siblings.items():
            if rank != self.rank and not child_state(state.pid):
                state = self.states.get(rank, state)
                return self.silent(rank, state, "its process has ended (killed, or crashed)")
        return None

    def store_failure(self, cause):
        return Failure(self.rank, self.node, self.host, os.getpid(), self.phase, cause)

    def silent_failure(self, silent, limit):
        """The Failure of ranks that have not written to the store."""
        rank, cause = silent[0], f"nothing was heard from it for {limit:g} s"
        state = self.states.get(rank, State(-1, "unknown host", 0, "start", {}, 0, 0))
        if state.node == self.node and child_state(state.pid) == "T":
            cause += ": it is stopped (SIGSTOP)"
        of_node = [other for other, known in self.states.items() if known.node == state.node]
        if len(silent) > 1 and set(of_node) <= set(silent) and state.node != self.node:
            cause += f", nor from any other rank of node {state.node}: it is gone, or the link to it is cut"
        return self.silent(rank, state, cause)

    def silent(self, rank, state, cause):
        return Failure(rank, state.node, state.host, state.pid, state.phase, cause, is_silent=True)

    def end(self):
        """Say why, once on each node, and end this process."""
        failure = self.failure
        is_own = failure == self.own_error
        is_here = failure.node == self.node and bool(child_state(failure.pid))
        if failure.cause and not is_own and is_first_on_node():
            with contextlib.suppress(OSError):
                os.write(2, (failure.line() + "\n").encode())
        if failure.cause:
            leave_for_torchrun(failure.line())
        self.await_readers()
        # the rank that failed prints its error: as soon as one rank ends, torchrun ends the others
        deadline = time.monotonic() + 2 * NEWS * (is_own or (is_here and not failure.is_silent))
        while (is_own or child_state(failure.pid)) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)  # so that torchrun has seen that rank end, and not this one
        if is_here and failure.is_silent and failure.rank != self.rank and child_state(failure.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(failure.pid, signal.SIGKILL)  # a stopped process could not end by itself
        os._exit(failure.code if failure.cause else leave_exit_code(failure.code))


def is_first_on_node():
    """Whether this process is the first of its node to report, by a file in torchrun's directory."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path or not os.path.isdir(os.path.dirname(path)):
        return True
    try:
        os.close(os.open(os.path.join(os.path.dirname(path), "..", "reported"), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def leave_exit_code(code):
    """Leave the exit code of a run that a signal ended for train.sh. Returns the one to exit with.

    Under train.sh that is 0: for any other one, torchrun kills the other ranks.
    """
    path = os.environ.get(CODE_FILE)
    if path is None:
        return code
    with open(path, "w", encoding="utf-8") as f:
        f.write(str(code))
    return 0


def leave_for_torchrun(message):
    """Write the file that torchrun's report quotes, in its format; without torchrun do nothing."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as f:
            extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
            json.dump({"message": {"message": message, "extraInfo": extra}}, f)


def print_traceback(error):
    """Print a traceback in at most 22 lines; a longer one is whole in the file that is named."""
    lines = "".join(traceback.format_exception(error)).splitlines()
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if len(lines) > 22 and path:
        path = os.path.join(os.path.dirname(path), "traceback.txt")
        with open(path, "w", encoding="utf-8") as f:
            f.write("\n".join(lines) + "\n")
        lines[6:-15] = [f"  ... {len(lines) - 21} more lines are in {path}"]
    print("\n".join(lines), file=sys.stderr)
