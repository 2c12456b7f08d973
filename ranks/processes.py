"""The processes of a run: where each stands, what it is doing, and how all of them end.

Ranks are laid out as (dp, tp): ranks of one tp group read the same conversations and hold slices of each matrix,
ranks along dp read different ones. A failure on one rank ends all, with the one to blame named; a signal to one ends
all in good order.
"""

import datetime
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from settings.errors import UserError

# What ends a run early, and the exit code then: Ctrl-C, Slurm's warning before a requeue, a shutdown.
STOPS = {signal.SIGINT: 130, signal.SIGUSR1: 0, signal.SIGTERM: 143}


@dataclass
class Ranks:
    """Where this process stands. dp_rank indexes data; mesh has the axes dp and tp.

    Used as `with start(...) as ranks`: a failure inside is reported with its rank and phase, and a signal of STOPS
    ends the run in good order. Before the first call of stopped() there is nothing to save: it ends at once.
    """

    rank: int
    size: int
    dp_rank: int
    dp_size: int
    mesh: DeviceMesh
    device: torch.device
    store: dist.Store
    phase: str = "start"
    noted: int = 0  # the signal that this rank has been sent
    stop: int = 0  # the one that all ranks know of
    is_polled: bool = False
    handlers: dict = field(default_factory=dict)  # those that were there before

    def at(self, phase):
        """Note what this rank is doing, for the others to see should it not come back."""
        self.phase = phase
        self.store.set(f"rank {self.rank}", f"{phase}|{time.time()}|{socket.gethostname()}|{os.getpid()}")

    def sum(self, tensor):
        """Sum a tensor over the data-parallel ranks, in place: one all-reduce."""
        if self.dp_size > 1:
            dist.all_reduce(tensor, group=self.mesh["dp"].get_group())
        return tensor

    def agree(self, number):
        """Rank 0's whole number, on every rank."""
        number = torch.tensor(number, device=self.device)
        dist.broadcast(number, 0)
        return int(number)

    def note(self, number, _):
        """The handler of STOPS. It writes without a buffer, for it may have come in the middle of a print."""
        if number == self.noted == signal.SIGINT:
            os.write(2, b"\nstopped at once: what came after the last checkpoint is lost\n")
            os._exit(STOPS[number])
        if self.rank == 0 and not self.noted:
            what = "the step in hand ends and is saved" if self.is_polled else "stopped before the first step"
            again = "; Ctrl-C again stops at once" if self.is_polled and number == signal.SIGINT else ""
            os.write(2, f"\n{signal.Signals(number).name}: {what}{again}\n".encode())
        self.noted = max(self.noted, number)
        if not self.is_polled:
            sys.exit(STOPS[self.noted])

    def stopped(self):
        """The signal that any rank has been sent, or 0. Every rank calls it and gets the same: none leaves alone."""
        self.is_polled = True
        number = torch.tensor(self.noted)  # of gloo, on the CPU: the device is not waited for
        if self.size > 1:
            dist.all_reduce(number, dist.ReduceOp.MAX)
        self.stop = int(number)
        return self.stop

    def __enter__(self):
        self.at("start")
        self.handlers = {number: signal.signal(number, self.note) for number in STOPS}
        return self

    def __exit__(self, kind, error, _):
        """Say which rank failed, where, and why; torchrun then ends the others. Where a collective failed, another
        rank is the cause: the one that noted its phase longest ago, or, where a lock was waited for, the one whose pid
        the error has. It is killed, for it may be stopped. One that a signal has ended is nobody's fault: all end."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if kind is SystemExit and self.noted:
            self.store.set("stopped", str(self.noted))
            return
        if error is not None and self.size > 1 and self.store.check(["stopped"]):
            sys.exit(STOPS[int(self.store.get("stopped"))])
        if error is None:  # none hangs up while another is still in the last collective, rank 0 (the store) last of all
            self.phase = "end"  # others read what this rank noted last: since then it is waited for
            try:
                for word in ("done", "left"):
                    self.store.set(f"{word} {self.rank}", "")
                    if word == "done" or self.rank == 0:
                        self.store.wait([f"{word} {rank}" for rank in range(self.size)])
            except dist.DistStoreError as stalled:
                kind, error = type(stalled), stalled
        if error is None or self.size == 1:
            return dist.destroy_process_group()
        noted = {}
        if issubclass(kind, (RuntimeError, TimeoutError)) and self.store.check([f"rank {r}" for r in range(self.size)]):
            noted = {r: self.store.get(f"rank {r}").decode().split("|") for r in range(self.size) if r != self.rank}
        if awaited := getattr(error, "pid", None):
            noted = {r: note for r, note in noted.items() if note[2:] == [socket.gethostname(), awaited]}
        if not noted:
            print(f"sft.py: rank {self.rank} failed in {self.phase}: {kind.__name__}: {error}", file=sys.stderr)
        else:
            rank, (phase, since, host, pid) = min(noted.items(), key=lambda item: float(item[1][1]))
            if host == socket.gethostname() and (awaited or "imed out" in str(error) or "timeout" in str(error)):
                os.kill(int(pid), signal.SIGKILL)
            raise RuntimeError(  # what torchrun then repeats, should it take this rank for the first to fail
                f"rank {self.rank} waited in {self.phase} for rank {rank}, which is gone, or stalled in {phase} since "
                f"{time.time() - float(since):.0f} s: {str(error).splitlines()[0]}") from error


def start(tp, timeout):
    """Join the process group that torchrun describes (one process alone makes its own) and lay out the mesh.

    tp       ranks that share each matrix;  timeout  seconds after which a rank that the others wait for is given up

    Raises ValueError when tp does not divide the number of processes.
    """
    rank, size, local = (int(os.environ.get(name, default)) for name, default in (
        ("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")))
    if size % tp:
        fit = [n for n in range(1, size + 1) if size % n == 0]
        raise UserError(f"--tp {tp} does not divide the {size} processes; these do: {fit}")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    # Offloaded gradients are CPU tensors, so their collectives need gloo beside nccl.
    store = next(dist.rendezvous("env://", rank, size))[0] if "WORLD_SIZE" in os.environ else dist.HashStore()
    store.set_timeout(datetime.timedelta(seconds=timeout))  # its own is 30 minutes, which __exit__ would wait
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=size,
                                timeout=datetime.timedelta(seconds=timeout))
    mesh = init_device_mesh(device.type, (size // tp, tp), mesh_dim_names=("dp", "tp"))
    return Ranks(rank, size, rank // tp, size // tp, mesh, device, store)
