"""The processes of a run: their place in the mesh, the phase that each is in, and how all end together.

The mesh is (replicas, shards, tp). Ranks of one tp group read the same conversations and hold slices of each
matrix. FSDP2 shards these over `shards`; `replicas` hold copies. Ranks along replicas and shards read other
conversations (dp), but those of one sp group, neighbours in `shards`: each has a part of every conversation.

If one rank fails, all end (failures.py). If one rank receives a signal, all finish the step, save and exit.
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
import uuid
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ranks import cluster, gate
from ranks.failures import (
    BACKEND_TIMEOUT,
    TICK,
    Watchdog,
    code_of,
    leave_exit_code,
    prepare,
    print_traceback,
)
from ranks.launch import CODE_FILE, EXIT_CODES, end_with_parent, exit_code, handle_signals
from settings import errors
from settings.errors import NonFiniteError, OutOfMemory, UserError

PAUSE = 0.05  # seconds between two looks at the store while ranks start
NOT_BEGUN = "stopped before training began; nothing new to save"


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
    mesh: DeviceMesh | None  # with the axes replicas, shards and tp; None without a process group
    device: torch.device
    store: dist.Store
    sp_rank: int = 0  # decides which of a micro-batch's tokens this process has
    sp_size: int = 1
    sp_group: dist.ProcessGroup | None = None  # with sp_size > 1
    phase: str = "start"
    received_signal: int = 0  # number of the signal that this rank has received, or 0
    stop_signal: int = 0  # number of the signal that all ranks have agreed on, or 0
    micro_batch: object = None  # the data.MicroBatch that is being computed; an out-of-memory error names it
    planned: object = None  # the forecast.PlannedRun, from which that error computes what would help
    has_polled: bool = False  # from the first poll_signals() on, a signal does not exit at once
    watchdog: Watchdog | None = None  # with several ranks
    warnings: object = None  # with several ranks, the screen.log.Warnings
    in_python: bool = False  # train() was called from Python: its process lives on, whatever happens
    ends: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)  # closed if in_python
    late: tuple | None = None  # the poll that poll_signals(late=True) has begun: (dist.Work, its number)
    previous_handlers: dict = field(default_factory=dict)  # signal -> handler to restore at the end
    previous_mask: set = field(default_factory=set)  # the blocked signals, to restore too

    @property
    def tokens_rank(self):
        """The number of this rank among those that compute other tokens; the same in a tp group."""
        return self.dp_rank * self.sp_size + self.sp_rank

    def set_phase(self, phase):
        """Write to the store what this rank is doing, for the others to report if it stops responding."""
        self.phase = phase
        if self.watchdog:
            self.watchdog.phase = phase
            self.store.set(f"state {self.rank}", json.dumps(self.watchdog.state()))

    def show_progress(self):
        """Say that this rank is at work in its phase. Its watchdog sends it to the others."""
        if self.watchdog:
            self.watchdog.progress += 1

    def wait_for_start(self):
        """Wait until every rank has joined. A signal ends the wait on all of them.

        init_process_group would wait as well, but in a call that no signal ends.
        """
        started = self.store.add("started", 1)
        while started < self.world_size:
            if number := pending_signal():
                self.received_signal = number
                end_by_signal(number, has_trained=False)
            time.sleep(PAUSE)
            if self.rank == 0:
                self.store.add("turns of rank 0", 1)  # join() waits for it
            started = self.store.add("started", 0)

    def wait_for_slower(self):
        """Wait for all ranks at the end of a phase that may take some of them much longer than others.

        A rank for which the others wait may take any time as long as it shows progress.
        """
        if self.watchdog:
            self.watchdog.store_waits += 1
        phase = f"{self.phase} done"
        done = self.store.add(phase, 1)
        while done < self.world_size:
            time.sleep(0.1)
            done = self.store.add(phase, 0)

    def count(self, what):
        """Count this rank; the last one sets the key "all WHAT", so that the others wait for one key."""
        if self.store.add(f"number {what}", 1) == self.world_size:
            self.store.set(f"all {what}", "")

    def each(self, batches):
        """Yield data.MicroBatches on this rank's device, and remember which one is being computed."""
        for batch in batches:
            self.micro_batch = batch
            yield batch.to(self.device)
        self.micro_batch = None

    def warn_of_idle(self, batch_size):
        """Print a warning if a step has fewer conversations than there are ranks to read them."""
        if batch_size < self.dp_size and self.rank == 0:
            print(f"warning: --batch_size {batch_size} is less than the {self.dp_size} data-parallel ranks: "
                  f"{self.dp_size - batch_size} of them compute nothing; set --batch_size {self.dp_size} or "
                  "more, or use fewer ranks", file=sys.stderr)

    def all_reduce(self, tensor):
        """Sum a tensor over the ranks that compute other tokens, in place."""
        for axis in ("shards", "replicas") if self.world_size > 1 else ():
            group = self.mesh.get_group(axis)
            if group.size() > 1:
                dist.all_reduce(tensor, group=group)
        return tensor

    def broadcast(self, number):
        """The integer that rank 0 passes, on every rank."""
        if self.world_size == 1:
            return number
        number = torch.tensor(number, device=self.device)
        dist.broadcast(number, 0)
        return int(number)

    def agree(self, stage, values):
        """Raise UserError if the values of a rank differ from those of rank 0, see gate.compare."""
        if self.watchdog:
            self.watchdog.store_waits += 1
        gate.compare(self.store, self.rank, self.world_size, stage, values)

    def on_signal(self, number, _):
        """Signal handler."""
        if self.watchdog and (self.watchdog.failure or self.watchdog.lost):  # torchrun ends all ranks
            return
        if number == self.received_signal == signal.SIGINT:
            if self.in_python and self.world_size == 1:
                raise KeyboardInterrupt
            write_to_screen("stopped without saving; steps that no checkpoint has are lost")
            os._exit(EXIT_CODES[number])
        if os.environ.get("LOCAL_RANK", "0") == "0" and not self.received_signal:  # once on each node
            message = NOT_BEGUN
            if self.has_polled:
                message = "finishing this step and saving"
            if self.has_polled and number == signal.SIGINT:
                message += "; press Ctrl-C again to quit without saving"
            write_to_screen(f"{signal.Signals(number).name}: {message}")
        self.received_signal = max(self.received_signal, number)
        if not self.has_polled:
            end_by_signal(self.received_signal, has_trained=False)

    def poll_signals(self, late=False):
        """The signal that any rank has received, or 0. A collective: all ranks get the same.

        late  return what the late poll before found, or 0 after none: no rank waits for the others here. A
              signal is then seen one such poll later. The next poll that is not late sees it in any case.
              Before the first step it does nothing, as on_signal ends the run itself

        The first call that is not late, before the first step, ends the run if there is one.
        """
        if late and not self.has_polled:
            return 0
        is_first, self.has_polled = not self.has_polled, True
        number = torch.tensor(self.received_signal)  # on the CPU, by gloo: no device sync
        if self.world_size > 1:
            work = dist.all_reduce(number, dist.ReduceOp.MAX, async_op=True)
            before, self.late = self.late, (work, number) if late else None
            if late:
                work, number = before or (None, torch.tensor(0))
            if work:
                work.wait()
        self.stop_signal = max(self.stop_signal, int(number))
        if is_first and self.stop_signal:
            end_by_signal(self.stop_signal, has_trained=False)
        return self.stop_signal

    def __enter__(self):
        with contextlib.ExitStack() as ends:
            ends.push(self)  # a signal may be pending
            self.set_phase("start")
            if threading.current_thread() is threading.main_thread():  # Python allows handlers in no other
                self.previous_handlers = handle_signals(self.on_signal)
                # as ranks/launch.py has blocked them
                self.previous_mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, EXIT_CODES)
            ends.pop_all()
        return self

    def __exit__(self, _, error, __):
        """End together with the other ranks.

        An error that was the first one of the run is raised as it is, with its traceback; the processes of
        the other ranks end with its exit code. If a signal has ended a rank before the first step, all exit
        with its code.
        """
        if self.stop_signal:
            block_signals()
        if error is None:
            self.wait_for_all()
        elif self.watchdog:
            code = code_of(error)
            if number := self.stop_signal or self.received_signal:
                code = exit_code(number, has_trained=False)
            reported = UserError, NonFiniteError, OutOfMemory, SystemExit, BrokenPipeError  # by errors.run
            is_bug = code == 1 and not isinstance(error, reported)
            self.watchdog.fail(error, code)
            if is_bug:
                print(f"{os.path.basename(sys.argv[0])}: rank {self.rank} (node {self.watchdog.node}, "
                      f"{self.watchdog.host}) failed in {self.phase}:", file=sys.stderr)
                print_traceback(error)
                sys.exit(1)
        elif dist.is_initialized():
            dist.destroy_process_group()
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)
        if self.in_python and self.previous_handlers:
            signal.pthread_sigmask(signal.SIG_SETMASK, self.previous_mask)

    def wait_for_all(self):
        """Wait until all ranks are done, then close the process group.

        No rank closes its connections while another is still in the last collective. Rank 0, which may serve
        the store, waits until the others have passed their wait.
        """
        if self.watchdog:
            self.watchdog.store_waits += 1
            self.watchdog.phase = "end"
        self.store.set(f"done {self.rank}", "")  # from now on, this process may end
        self.count("done")
        self.store.wait(["all done"])
        if self.watchdog:
            self.watchdog.close()
        self.count("left")
        if self.rank == 0:
            with contextlib.suppress(dist.DistStoreError):  # all are done, whatever becomes of one of them
                limit = datetime.timedelta(seconds=60)
                self.store.wait(["all left"], limit)
        dist.destroy_process_group()
        if self.world_size > 1:  # a script that called train() may end at once, see errors.end
            time.sleep(PAUSE)  # in which gloo's threads can free the tensors of the last collectives


class Stopped(SystemExit):
    """Signal `number` has ended the run. The exit code is that of the command."""

    def __init__(self, number, has_trained):
        super().__init__(leave_exit_code(exit_code(number, has_trained)))
        self.number, self.has_trained = number, has_trained


def pending_signal():
    """The signal that came while this rank starts, or 0. A line says so, once on each node.

    ranks/launch.py has blocked the signals; Ranks.on_signal handles them from the end of the start on.
    """
    pending = signal.sigpending() & EXIT_CODES.keys()
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # by nohup
        pending -= {signal.SIGHUP}
    number = max(pending, default=0)
    if number and os.environ.get("LOCAL_RANK", "0") == "0":
        write_to_screen(f"{signal.Signals(number).name}: {NOT_BEGUN}")
    return number


def end_by_signal(number, has_trained):
    """Raise Stopped, as signal `number` ends a run. Under train.sh its code is that of ranks/launch.py."""
    block_signals()
    raise Stopped(number, has_trained)


def block_signals():
    """Under train.sh, ignore more signals: Slurm sends one to every process, and train.sh passes it on."""
    if CODE_FILE in os.environ:
        signal.pthread_sigmask(signal.SIG_BLOCK, EXIT_CODES)


def write_to_screen(line):
    """Write a line to stderr in a signal handler: os.write has no buffer, as it may interrupt a print.

    With `| tee`, Ctrl-C has ended the reader too, and the write fails: that must not end the run.
    """
    with contextlib.suppress(OSError):
        os.write(2, f"\n{line}\n".encode())


def check_layout(tp, sp, replicas, world_size):
    """Raise UserError unless tp * sp * replicas divides the world size."""
    check_tp(tp, world_size)
    sizes = {"--tp": tp, "--sp": sp, "--replicas": replicas}
    used = {flag: size for flag, size in sizes.items() if size > 1}
    product = tp * sp * replicas
    if world_size % product == 0:
        return
    fits = []
    for flag, size in used.items():
        others = product // size
        if flag != "--tp" and world_size % others == 0:
            divisors = [n for n in range(1, world_size // others + 1) if world_size // others % n == 0]
            fits.append(f"{flag} {' or '.join(map(str, divisors))}")
    if not fits:  # as on a resume with fewer ranks, which takes these sizes from its run
        fits.append(" ".join(f"{flag} 1" for flag in used if flag != "--tp"))
    flags = " ".join(f"{flag} {size}" for flag, size in used.items())
    raise UserError(f"{flags} needs a multiple of {product} processes, and this run has {world_size}; start "
                    f"them with ./train.sh --n_gpus {product}, or use {', or '.join(fits)}")


def check_tp(tp, world_size):
    """Raise UserError if tp, the number of ranks that split each matrix, does not divide the world size."""
    if world_size < tp:
        raise UserError(f"--tp {tp} needs at least {tp} processes, and this run has {world_size}; start it "
                        f"with ./train.sh --n_gpus {tp} or torchrun --nproc_per_node {tp}, or, also to "
                        "resume a run with fewer, use --strategy fsdp --tp 1")
    if world_size % tp:
        divisors = [str(n) for n in range(1, world_size + 1) if world_size % n == 0]
        raise UserError(f"--tp {tp} does not divide the {world_size} processes; use one of "
                        f"{', '.join(divisors)} (1 with --strategy fsdp)")


def check_strategy(strategy, tp, sp=1, replicas=1):
    """Raise UserError if --strategy and --tp contradict each other, or a size does not suit the processes."""
    env = dict(os.environ)
    try:
        cluster.check_rank(env)
    except cluster.ClusterError as error:
        raise UserError(str(error)) from error
    if "WORLD_SIZE" in env or sp * replicas > 1:
        check_layout(tp, sp, replicas, int(env.get("WORLD_SIZE", "1")))
    if (tp > 1) != (strategy == "megatron"):
        other = f"--strategy megatron --tp {tp}" if tp > 1 else "--strategy megatron --tp 2"
        raise UserError(f"--strategy {strategy} does not go with --tp {tp}: use {other}, or --strategy fsdp "
                        "--tp 1")


def start(tp, timeout, deterministic=False, same=None, *, sp=1, replicas=1):
    """Join the process group that torchrun describes, or create one for this single process.

    tp             number of ranks that split each matrix
    sp             number of ranks that share the tokens of a conversation
    replicas       number of copies of the model
    timeout        seconds until a rank that does not respond counts as failed, see failures.Watchdog
    deterministic  make results on CUDA bit-identical from run to run
    same           {what: text} that must be the same on all ranks, see gate.compare. Here, because ranks with
                   another tp would wait for each other to build the mesh

    Returns the Ranks of this process. Raises UserError if these sizes do not divide the number of processes,
    if another run uses the store of this one, or the environment speaks of several and does not say how to
    meet them.
    """
    try:
        cluster.check_rank(os.environ)
        cluster.check_alone(os.environ)
    except cluster.ClusterError as error:
        raise UserError(str(error)) from error
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    check_layout(tp, sp, replicas, world_size)
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
            # NCCL's own monitor would abort a run that was suspended for 8 minutes. Not tested on a GPU
            os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
    store, watchdog = dist.HashStore(), None
    if world_size > 1:
        if world_size > int(os.environ.get("LOCAL_WORLD_SIZE", world_size)):  # train.sh has done this already
            master = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            cluster.use_interface(cluster.local_address(*master), os.environ)
        store = join(connect(rank, world_size, timeout), rank, world_size, timeout)
        watchdog = Watchdog(store.clone(), rank, world_size, timeout)
        watchdog.start()
    ranks = Ranks(rank=rank, world_size=world_size, dp_rank=rank // (sp * tp),
                  dp_size=world_size // (sp * tp), sp_rank=rank // tp % sp, sp_size=sp, mesh=None,
                  device=device, store=store, watchdog=watchdog)
    with contextlib.ExitStack() as ends:
        ends.push(ranks)  # so that an error ends the other ranks too
        if watchdog:
            errors.exits_at_once = not dist.is_initialized()  # otherwise by a script that calls train()
            ranks.wait_for_start()
            store.set_timeout(BACKEND_TIMEOUT)
            ranks.agree("program", {"device": device.type, **(same or {})})
        if not dist.is_initialized():
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size,
                                    timeout=BACKEND_TIMEOUT)
        ranks.mesh = init_device_mesh(device.type, (replicas, world_size // (replicas * tp), tp),
                                      mesh_dim_names=("replicas", "shards", "tp"))
        groups = ranks.mesh.get_all_groups()
        if sp > 1:
            tokens = init_device_mesh(device.type, (ranks.dp_size, sp, tp), mesh_dim_names=("dp", "sp", "tp"))
            ranks.sp_group = tokens["sp"].get_group()
            groups += tokens.get_all_groups()
        if watchdog:
            # torch 2.15 has it in public, and warns of the other one
            set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
            for group in groups:  # torch's defaults: 10 minutes for NCCL, 30 for gloo
                set_timeout(BACKEND_TIMEOUT, group)
        ends.pop_all()
    return ranks


def connect(rank, world_size, timeout):
    """The store of this run, at MASTER_ADDR:MASTER_PORT. Raises UserError after `timeout` seconds.

    Without torchrun, rank 0 waits here for all others. In a thread: a signal then ends the wait.
    """
    outcome, limit = [], datetime.timedelta(seconds=timeout)
    master = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])

    def run():
        try:
            if rank:
                wait_for_port(master, timeout)
            outcome.append(next(dist.rendezvous("env://", rank, world_size, timeout=limit))[0])
        except (dist.DistError, OSError) as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        if number := pending_signal():
            end_by_signal(number, has_trained=False)
        thread.join(PAUSE)
    if not outcome:  # a bug, whose traceback the thread has printed
        sys.exit(1)
    if isinstance(outcome[0], Exception):
        raise UserError(f"rank {rank} of {world_size} has met no others at MASTER_ADDR={master[0]} "
                        f"MASTER_PORT={master[1]} for --timeout {timeout} s; start all, or unset RANK and "
                        f"WORLD_SIZE to train with one process ({str(outcome[0]).splitlines()[0]:.200})")
    return outcome[0]


def wait_for_port(place, timeout):
    """Wait until somebody listens at (host, port): torch would print stacks of C++. Raises OSError."""
    until = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection(place, timeout=1).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise
        time.sleep(PAUSE)


def join(store, rank, world_size, timeout):
    """The part of the store that this attempt of the run uses.

    torchrun --max_restarts starts a run again in the same store, where the keys of earlier attempts still
    are. Rank 0 begins a part; another rank joins the newest one, if rank 0 is seen to take turns in it. To
    count the attempts would not do: a rank that was killed before it counted would be one behind, and a node
    that was started again knows of no attempt before.

    timeout  seconds until a rank gives up to wait for rank 0; time for which it was suspended does not count

    Raises UserError if another run uses the store, or rank 0 does not come.
    """
    me, place = uuid.uuid4().hex, f"{socket.gethostname()}, process {os.getpid()}"
    part = name = turns = state = None
    waited, limit = 0, timeout
    if rank == 0:
        limit = 3 * TICK if store.check(["newest attempt"]) else 0
    while waited < limit:
        if number := pending_signal():
            end_by_signal(number, has_trained=False)
        newest = store.get("newest attempt").decode() if store.check(["newest attempt"]) else None
        if newest != name:
            name, part, state = newest, dist.PrefixStore(newest, store), None
            turns = part.add("turns of rank 0", 0)
        elif name:
            before, state = state, part.get(f"state {rank}") if part.check([f"state {rank}"]) else None
            if before and state != before:
                host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
                raise UserError(f"MASTER_PORT {port}: another run uses it on {host}, and has a rank {rank} "
                                f"({part.get(f'place of rank {rank}').decode()}); wait for its end, or set "
                                "another MASTER_PORT, the same on all nodes")
            if rank and part.add("turns of rank 0", 0) > turns:
                if part.compare_set(f"claim of rank {rank}", "", me).decode() == me:
                    part.set(f"place of rank {rank}", place)
                    return part
        time.sleep(PAUSE)
        waited += PAUSE
    if rank:
        raise UserError(f"rank {rank} waited for rank 0 for --timeout {timeout} s; it runs on the node of "
                        f"MASTER_ADDR {os.environ['MASTER_ADDR']}: see what is printed there")
    name = f"attempt {me}"
    part = dist.PrefixStore(name, store)
    part.set("place of rank 0", place)
    prepare(part, world_size)
    store.set("newest attempt", name)
    return part


def single_process(device):
    """The Ranks of one process without process group and mesh, for programs that do not train.

    device  may be meta
    """
    return Ranks(rank=0, world_size=1, dp_rank=0, dp_size=1, mesh=None, device=device, store=dist.HashStore())
