"""The processes of a run: where each stands, what it is doing, and how all of them end.

Ranks are laid out as (dp, tp): ranks of one tp group read the same conversations and hold slices of each
matrix, ranks along dp read different ones. A failure on one rank ends all, and the rank that caused it is
named. A signal to one ends all in good order.
"""

import datetime
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
from ranks.launch import EXIT_CODES
from settings.errors import UserError


class Whereabouts(NamedTuple):
    """What a rank last wrote down for the others: its phase, since when (Unix time), and its process."""

    rank: int
    phase: str
    since: float
    host: str
    pid: int


@dataclass
class Ranks:
    """Where this process stands. dp_rank indexes data; mesh has the axes dp and tp, None for a process alone.

    Used as `with start(...) as ranks`: a failure inside is reported with its rank and phase, and a signal of
    EXIT_CODES ends the run in good order: at once before the first poll_signals(), as nothing is to be saved.
    """

    rank: int
    world_size: int
    dp_rank: int
    dp_size: int
    mesh: DeviceMesh | None
    device: torch.device
    store: dist.Store
    phase: str = "start"
    received_signal: int = 0  # the signal that this rank has received
    stop_signal: int = 0  # the one that all ranks know of
    is_polled: bool = False
    handlers: dict = field(default_factory=dict)  # those that were there before

    def set_phase(self, phase):
        """Write down what this rank is doing, for the others to see should it not come back."""
        self.phase = phase
        self.store.set(f"rank {self.rank}", f"{phase}|{time.time()}|{socket.gethostname()}|{os.getpid()}")

    def all_reduce(self, tensor):
        """Sum a tensor over the data-parallel ranks, in place: one all-reduce."""
        if self.dp_size > 1:
            dist.all_reduce(tensor, group=self.mesh["dp"].get_group())
        return tensor

    def broadcast(self, number):
        """Rank 0's whole number, on every rank."""
        if self.world_size == 1:
            return number
        number = torch.tensor(number, device=self.device)
        dist.broadcast(number, 0)
        return int(number)

    def on_signal(self, number, _):
        """The handler of EXIT_CODES. It writes without a buffer: it may interrupt a print."""
        if number == self.received_signal == signal.SIGINT:
            os.write(2, b"\nstopped without saving; progress since the last checkpoint is lost\n")
            os._exit(EXIT_CODES[number])
        if self.rank == 0 and not self.received_signal:
            what = "finishing this step and saving" if self.is_polled else "stopped before the first step"
            is_again = self.is_polled and number == signal.SIGINT
            again = "; press Ctrl-C again to quit without saving" if is_again else ""
            os.write(2, f"\n{signal.Signals(number).name}: {what}{again}\n".encode())
        self.received_signal = max(self.received_signal, number)
        if not self.is_polled:
            sys.exit(EXIT_CODES[self.received_signal])

    def poll_signals(self):
        """The signal that any rank has received, or 0. All ranks call it, get the same, and stop together."""
        self.is_polled = True
        number = torch.tensor(self.received_signal)  # of gloo, on the CPU: the device is not waited for
        if self.world_size > 1:
            dist.all_reduce(number, dist.ReduceOp.MAX)
        self.stop_signal = int(number)
        return self.stop_signal

    def __enter__(self):
        self.set_phase("start")
        self.handlers = {number: signal.signal(number, self.on_signal) for number in EXIT_CODES}
        return self

    def __exit__(self, kind, error, _):
        """End together with the other ranks. Where a signal has ended one, all end with its exit code."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if kind is SystemExit and self.received_signal:
            self.store.set("stopped", str(self.received_signal))
        elif error is None:
            self.leave()
        elif self.world_size == 1:
            dist.destroy_process_group()
        elif self.store.check(["stopped"]):
            sys.exit(EXIT_CODES[int(self.store.get("stopped"))])
        else:
            self.blame(error)

    def leave(self):
        """Wait until all ranks are done: none closes its connections while another is still in the last
        collective, and rank 0, which has the store, leaves last."""
        self.phase = "end"  # others read what this rank wrote last: since then it is waited for
        try:
            for word in ("done", "left"):
                self.store.set(f"{word} {self.rank}", "")
                if word == "done" or self.rank == 0:
                    self.store.wait([f"{word} {rank}" for rank in range(self.world_size)])
        except dist.DistStoreError as error:
            self.blame(error)
            raise
        dist.destroy_process_group()

    def blame(self, error):
        """Say which rank failed, where, and why; torchrun then ends the others.

        It is this rank, unless it waited in vain for another. Then RuntimeError names the other; torchrun
        repeats it in its report if it takes this rank for the first to fail. After a time-out the other is
        killed as well: it may be stopped (SIGSTOP), and then could not end by itself.
        """
        culprit, now = self.waited_for(error), time.time()
        if culprit is None:
            print(f"sft.py: rank {self.rank} failed in {self.phase}: {type(error).__name__}: {error}",
                  file=sys.stderr)
            return
        if culprit.host == socket.gethostname() and is_timeout(error):
            os.kill(culprit.pid, signal.SIGKILL)
        raise RuntimeError(
            f"rank {self.rank} waited in {self.phase} for rank {culprit.rank}, which is gone, or stalled in "
            f"{culprit.phase} since {now - culprit.since:.0f} s: {str(error).splitlines()[0]}") from error

    def waited_for(self, error):
        """The Whereabouts of the rank that this one waited for in vain; None where the error is its own.

        For a lock it is the holder, if that is a rank. For a collective it is the rank that has been in its
        phase for the longest: the others got further.
        """
        if not isinstance(error, (RuntimeError, LockTimeout)):
            return None
        keys = {rank: f"rank {rank}" for rank in range(self.world_size)}
        if not self.store.check(list(keys.values())):
            return None
        others = []
        for rank, key in keys.items():
            phase, since, host, pid = self.store.get(key).decode().split("|")
            others.append(Whereabouts(rank, phase, float(since), host, int(pid)))
        others.pop(self.rank)
        if isinstance(error, LockTimeout):
            holder = socket.gethostname(), error.pid
            others = [other for other in others if (other.host, other.pid) == holder]
        return min(others, key=lambda other: other.since, default=None)


def is_timeout(error):
    """Whether an error says that another process did not answer in time: gloo, NCCL and the store have no
    class for it. Otherwise its connection was closed: it has ended."""
    return isinstance(error, LockTimeout) or "imed out" in str(error) or "timeout" in str(error)


def check_tp(tp, size):
    """Raise UserError when tp, the ranks that share each matrix, does not divide the number of processes."""
    if size % tp:
        fit = [n for n in range(1, size + 1) if size % n == 0]
        raise UserError(f"--tp {tp} does not divide the {size} processes; these do: {fit}")


def start(tp, timeout, deterministic=False):
    """Join the process group that torchrun describes (one process alone makes its own) and lay out the mesh.

    tp             ranks that share each matrix
    timeout        seconds after which a rank that the others wait for is given up
    deterministic  the same bits on CUDA each time

    Raises UserError when tp does not divide the number of processes.
    """
    rank, size, local = (int(os.environ.get(name, default)) for name, default in (
        ("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")))
    check_tp(tp, size)
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
        # for debugging only; it would cost a pass over all new memory
        torch.utils.deterministic.fill_uninitialized_memory = False
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    store = next(dist.rendezvous("env://", rank, size))[0] if "WORLD_SIZE" in os.environ else dist.HashStore()
    timeout = datetime.timedelta(seconds=timeout)
    store.set_timeout(timeout)  # its own is 30 minutes, which leave() would wait
    if not dist.is_initialized():
        # Offloaded gradients are CPU tensors, so their collectives need gloo beside nccl.
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    mesh = init_device_mesh(device.type, (size // tp, tp), mesh_dim_names=("dp", "tp"))
    return Ranks(rank=rank, world_size=size, dp_rank=rank // tp, dp_size=size // tp, mesh=mesh, device=device,
                 store=store)


def single_process(device):
    """The Ranks of one process without group and mesh, for what trains nothing. device may be meta."""
    return Ranks(rank=0, world_size=1, dp_rank=0, dp_size=1, mesh=None, device=device, store=dist.HashStore())
