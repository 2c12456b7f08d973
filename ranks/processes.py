"""The processes of a run: their place in the mesh, the phase that each is in, and how all end together.

The mesh is (dp, tp). Ranks of one tp group read the same conversations and hold slices of each matrix; ranks
along dp read different conversations. If one rank fails, all end, and the error names the rank that caused
it. If one rank receives a signal, all finish the step, save and exit.
"""

import contextlib
import datetime
import json
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from disk.files import LockTimeout
from ranks.launch import EXIT_CODES, OUT_OF_MEMORY
from settings.errors import OutOfMemory, UserError


END_OF = "end of "  # a phase in which a rank waits for the others


class Whereabouts(NamedTuple):
    """What a rank last wrote to the store for the others."""

    rank: int
    phase: str
    since: float  # Unix time at which the phase began
    host: str
    pid: int


@dataclass
class Ranks:
    """This process among the others: its ranks, its device, and what all processes do together.

    Used as `with start(...) as ranks`. A failure inside is reported with its rank and phase. A signal of
    EXIT_CODES ends the run: at once before the first poll_signals(), as there is nothing to save yet; later
    the training loop sees it through poll_signals().
    """

    rank: int
    world_size: int
    dp_rank: int  # decides which conversations this process reads
    dp_size: int
    mesh: DeviceMesh | None  # with the axes dp and tp; None without a process group
    device: torch.device
    store: dist.Store
    phase: str = "start"
    received_signal: int = 0  # number of the signal that this rank has received, or 0
    stop_signal: int = 0  # number of the signal that all ranks have agreed on, or 0
    micro_batch: object = None  # the data.MicroBatch that is being computed; an out-of-memory error names it
    planned: object = None  # the forecast.PlannedRun, from which that error computes what would help
    has_polled: bool = False  # from the first poll_signals() on, a signal does not exit at once
    shown: float = 0.0  # when this rank last showed its progress, a time.monotonic()
    previous_handlers: dict = field(default_factory=dict)  # signal -> handler to restore at the end

    def set_phase(self, phase):
        """Write to the store what this rank is doing, for the others to report if it stops responding."""
        self.phase = phase
        self.store.set(f"rank {self.rank}", f"{phase}|{time.time()}|{socket.gethostname()}|{os.getpid()}")

    def show_progress(self):
        """Write to the store, at most once a second, that this rank is at work in its phase."""
        if self.world_size > 1 and time.monotonic() - self.shown > 1:
            self.shown = time.monotonic()
            self.set_phase(self.phase)
            self.store.add("progress", 1)

    def wait_for_slower(self):
        """Wait for all ranks at the end of a phase that may take some of them much longer than others.

        The limit of a collective is --timeout for all of it. Here it begins anew whenever a rank shows
        progress. Raises RuntimeError if none does for that long.
        """
        phase = self.phase
        self.set_phase(END_OF + phase)
        done, seen, since = self.store.add(f"{phase} done", 1), None, None
        # 2 s more: the wait for a lock, whose error names the holder, ends first
        limit = self.store.timeout.total_seconds() + 2
        while done < self.world_size:
            now = done, self.store.add("progress", 0)
            if now != seen:
                seen, since = now, time.monotonic()
            if time.monotonic() - since > limit:
                raise RuntimeError(f"timed out: no rank made progress for {limit:.0f} s")
            time.sleep(0.1)
            done = self.store.add(f"{phase} done", 0)

    def all_reduce(self, tensor):
        """Sum a tensor over the data-parallel ranks, in place: one all-reduce."""
        if self.dp_size > 1:
            dist.all_reduce(tensor, group=self.mesh["dp"].get_group())
        return tensor

    def broadcast(self, number):
        """The integer that rank 0 passes, on every rank."""
        if self.world_size == 1:
            return number
        number = torch.tensor(number, device=self.device)
        dist.broadcast(number, 0)
        return int(number)

    def on_signal(self, number, _):
        """Signal handler."""
        if number == self.received_signal == signal.SIGINT:
            write_to_screen("stopped without saving; progress since the last checkpoint is lost")
            os._exit(EXIT_CODES[number])
        if self.rank == 0 and not self.received_signal:
            message = "finishing this step and saving" if self.has_polled else "stopped before the first step"
            if self.has_polled and number == signal.SIGINT:
                message += "; press Ctrl-C again to quit without saving"
            write_to_screen(f"{signal.Signals(number).name}: {message}")
        self.received_signal = max(self.received_signal, number)
        if not self.has_polled:
            sys.exit(EXIT_CODES[self.received_signal])

    def poll_signals(self):
        """The signal that any rank has received, or 0. A collective: all ranks get the same."""
        self.has_polled = True
        number = torch.tensor(self.received_signal)  # on the CPU, by gloo: no device sync
        if self.world_size > 1:
            dist.all_reduce(number, dist.ReduceOp.MAX)
        self.stop_signal = int(number)
        return self.stop_signal

    def __enter__(self):
        self.set_phase("start")
        self.previous_handlers = {number: signal.signal(number, self.on_signal) for number in EXIT_CODES}
        return self

    def __exit__(self, kind, error, _):
        """End together with the other ranks. If a signal has ended one of them, all exit with its code.

        If memory ran out on one of them, that rank prints why and all exit with code 1.
        """
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)
        if kind is SystemExit and self.received_signal:
            self.store.set("stopped", str(self.received_signal))
        elif error is None:
            self.wait_for_all()
        elif self.world_size == 1:
            dist.destroy_process_group()
        elif self.store.check(["stopped"]):
            sys.exit(EXIT_CODES[int(self.store.get("stopped"))])
        elif isinstance(error, OutOfMemory):
            if self.store.add(OUT_OF_MEMORY, 1) == 1:  # the first rank: others may be short of it too
                print(f"sft.py: error: {error}", file=sys.stderr)
                leave_for_torchrun(OUT_OF_MEMORY)
            sys.exit(1)
        elif self.store.check([OUT_OF_MEMORY]):
            sys.exit(1)  # that rank has ended the run and says why
        else:
            self.report_failure(error)

    def wait_for_all(self):
        """Wait until all ranks are done, then close the process group.

        No rank closes its connections while another is still in the last collective. Rank 0, which serves the
        store, waits until the others have passed their wait.
        """
        self.phase = "end"  # for report_failure; the store keeps the last phase and the time when it began
        try:
            for state in ("done", "left"):
                self.store.set(f"{state} {self.rank}", "")
                if state == "done" or self.rank == 0:
                    self.store.wait([f"{state} {rank}" for rank in range(self.world_size)])
        except dist.DistStoreError as error:
            self.report_failure(error)
            raise
        dist.destroy_process_group()

    def report_failure(self, error):
        """Print which rank failed, in which phase, and why; torchrun then ends the others.

        If this rank has waited in vain for another, it raises RuntimeError, which names the other rank. If
        this rank is the first to fail, torchrun repeats the message in its report. After a time-out the
        other rank is also killed: it may be stopped (SIGSTOP), and then it could not end by itself.
        """
        culprit, now = self.find_culprit(error), time.time()
        if culprit is None:
            print(f"sft.py: rank {self.rank} failed in {self.phase}: {type(error).__name__}: {error}",
                  file=sys.stderr)
            return
        if culprit.host == socket.gethostname() and is_timeout(error):
            os.kill(culprit.pid, signal.SIGKILL)
        raise RuntimeError(
            f"rank {culprit.rank} did not respond in {culprit.phase} (it exited or hung), "
            f"{now - culprit.since:.0f} s after that began; rank {self.rank} waited for it in {self.phase}: "
            f"{str(error).splitlines()[0]}") from error

    def find_culprit(self, error):
        """The Whereabouts of the rank that this one waited for in vain; None if the error is this rank's own.

        For a lock it is the rank that holds it, if a rank does. For a collective it is the rank that has been
        in its phase for the longest: the others have reached a later phase.
        """
        if not isinstance(error, (RuntimeError, LockTimeout)):
            return None
        keys = [f"rank {rank}" for rank in range(self.world_size)]
        if not self.store.check(keys):
            return None
        others = []
        for rank, key in enumerate(keys):
            phase, since, host, pid = self.store.get(key).decode().split("|")
            others.append(Whereabouts(rank, phase, float(since), host, int(pid)))
        others.pop(self.rank)
        if self.phase.startswith(END_OF):  # those that wait as this rank does are not the culprit
            others = [other for other in others if other.phase != self.phase]
        if isinstance(error, LockTimeout):
            holder = socket.gethostname(), error.pid
            others = [other for other in others if (other.host, other.pid) == holder]
        return min(others, key=lambda other: other.since, default=None)


def write_to_screen(line):
    """Write a line to stderr in a signal handler: os.write has no buffer, as it may interrupt a print.

    With `| tee`, Ctrl-C has ended the reader too, and the write fails: that must not end the run.
    """
    with contextlib.suppress(OSError):
        os.write(2, f"\n{line}\n".encode())


def leave_for_torchrun(message):
    """Write the file that torchrun's report quotes, in its format; without torchrun do nothing."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with open(path, "w", encoding="utf-8") as f:
            json.dump({"message": message, "timestamp": int(time.time())}, f)


def is_timeout(error):
    """Whether an error means that another process did not respond in time.

    If not, the connection was closed: that process has ended. gloo, NCCL and the store have no error class
    for a time-out, so this reads the message.
    """
    return isinstance(error, LockTimeout) or "imed out" in str(error) or "timeout" in str(error)


def check_tp(tp, world_size):
    """Raise UserError if tp, the number of ranks that split each matrix, does not divide the world size."""
    if world_size < tp:
        raise UserError(f"--tp {tp} needs at least {tp} processes, and this run has {world_size}; start it "
                        f"with ./train.sh --n_gpus {tp} or torchrun --nproc_per_node {tp}")
    if world_size % tp:
        divisors = [str(n) for n in range(1, world_size + 1) if world_size % n == 0]
        raise UserError(f"--tp {tp} does not divide the {world_size} processes; use one of "
                        f"{', '.join(divisors)}")


def check_strategy(strategy, tp):
    """Raise UserError if --strategy and --tp contradict each other, or tp does not suit the ranks started."""
    if "WORLD_SIZE" in os.environ:
        check_tp(tp, int(os.environ["WORLD_SIZE"]))
    if (tp > 1) != (strategy == "megatron"):
        raise UserError(f"--strategy {strategy} with --tp {tp}: megatron needs --tp 2 or more, fsdp needs "
                        "--tp 1; use --strategy megatron --tp 2, or neither")


def start(tp, timeout, deterministic=False):
    """Join the process group that torchrun describes, or create one for this single process.

    tp             number of ranks that split each matrix
    timeout        seconds until a rank that does not respond counts as failed
    deterministic  make results on CUDA bit-identical from run to run

    Returns the Ranks of this process. Raises UserError if tp does not divide the number of processes.
    """
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    check_tp(tp, world_size)
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
        # fills new memory, which helps debugging only and costs a pass over that memory
        torch.utils.deterministic.fill_uninitialized_memory = False
    # With fixed segments, micro-batches of ever other sizes fragment the memory. Read when CUDA starts
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        if world_size > 1:  # a single process has no collective, and NCCL would take a second and memory
            backend = "cpu:gloo,cuda:nccl"  # gloo too: offloaded gradients are CPU tensors
    store = dist.HashStore()
    if "WORLD_SIZE" in os.environ:
        store = next(dist.rendezvous("env://", rank, world_size))[0]
    timeout = datetime.timedelta(seconds=timeout)
    store.set_timeout(timeout)  # wait_for_all() would otherwise wait for the store's default, 30 minutes
    if not dist.is_initialized():
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    dp_size = world_size // tp
    mesh = init_device_mesh(device.type, (dp_size, tp), mesh_dim_names=("dp", "tp"))
    return Ranks(rank=rank, world_size=world_size, dp_rank=rank // tp, dp_size=dp_size, mesh=mesh,
                 device=device, store=store)


def single_process(device):
    """The Ranks of one process without process group and mesh, for programs that do not train.

    device  may be meta
    """
    return Ranks(rank=0, world_size=1, dp_rank=0, dp_size=1, mesh=None, device=device, store=dist.HashStore())
