"""Start sft.py: as one process, or as several under torchrun. train.sh runs this file.

    python ranks/launch.py [--n_gpus N] [flags of sft.py]

Environment: N_GPUS (as --n_gpus), NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, or what cluster.py reads in
their place. This file imports only the standard library, so that one process starts as fast as with
`python sft.py`.
"""

import contextlib
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time

if __name__ == "__main__":  # in place of ranks/, whose names could hide those of packages
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from ranks import cluster, meeting
from settings.errors import printable

SFT = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "sft.py")
# Signals that end a run early, and its exit code: Ctrl-C, Slurm's warning before a requeue, a shutdown, a
# lost terminal, a CPU limit. SIGUSR1 asks for a checkpoint; without a step there is none, see exit_code().
EXIT_CODES = {signal.SIGINT: 130, signal.SIGUSR1: 0, signal.SIGTERM: 143, signal.SIGHUP: 129,
              signal.SIGXCPU: 152}
# The environment variable with the path of the file in which ranks leave the exit code of a signal. They exit
# with 0 then: for any other code, torchrun kills the other ranks and writes a report.
CODE_FILE = "SFT_EXIT_CODE_FILE"
PR_SET_PDEATHSIG = 1  # of prctl(2)
STARTING = 30  # seconds after a signal until ranks that still start are killed


def exit_code(number, has_trained):
    """The exit code of a run that signal `number` ended. Without a step it is never 0."""
    return EXIT_CODES[number] if has_trained else 128 + number


def fail(message):
    """Exit with one error line and code 2, the code of an error in the input."""
    print(f"train.sh: error: {printable(message)}", file=sys.stderr)
    sys.exit(2)


def variable(name, default):
    """An environment variable; an empty one counts as not set."""
    return os.environ.get(name) or default


def positive(name, text):
    """The number of processes or nodes in a text. Exits if it is not a positive integer."""
    if not (text.isascii() and text.isdigit() and int(text)):
        fail(f"{name} {text}: it must be an integer of at least 1")
    return int(text)


def check_range(name, text, low, high):
    """Exit if a text is not an integer from low to high."""
    if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
        fail(f"{name} {text}: it must be an integer from {low} to {high}")


def split_n_gpus(arguments):
    """(value of the last --n_gpus or None, the other arguments)"""
    arguments, others, n_gpus = list(arguments), [], None
    while arguments:
        argument = arguments.pop(0)
        name, equals, value = argument.partition("=")
        if name not in ("--n_gpus", "--n-gpus"):
            others.append(argument)
        elif not equals and not arguments:
            fail("--n_gpus needs a number")
        else:
            n_gpus = value if equals else arguments.pop(0)
    return n_gpus, others


def check_settings(arguments):
    """Let sft.py check its settings once, before torchrun starts. Exits like sft.py if one is wrong.

    If the workers found the error, each would print its line, followed by torchrun's report of 70 lines.
    Returns --timeout in seconds.
    """
    command = [sys.executable, SFT, "--explain", "--environment", *arguments]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            check=False)
    if result.returncode:
        os.write(2, result.stderr)
        sys.exit(shell_code(result.returncode))
    return int(re.search(rb"^timeout +=\s+(\d+)", result.stdout, re.M)[1])


def torchrun(arguments, n_gpus, n_nodes):
    """Run sft.py under torchrun, in this process, until all workers have ended. Returns the exit code.

    A worker that fails prints why, and all have the same exit code. So torchrun's report and its log of the
    signals that it sends, some 40 lines, are not shown. What a worker can't print is: which signal killed it.
    """
    import logging

    # when the store ends before a rank, torch would print a stack of 15 lines of C++
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from torch.distributed import run  # imported here: the process that supervises this one needs no torch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    rendezvous = ["--standalone", "--local_addr", "127.0.0.1"]  # torchrun picks a free port
    if n_nodes > 1 or variable("MASTER_PORT", ""):
        rendezvous = ["--nnodes", str(n_nodes), "--node_rank", variable("NODE_RANK", "0"),
                      "--master_addr", variable("MASTER_ADDR", "127.0.0.1"),
                      "--master_port", variable("MASTER_PORT", "29500")]
    flags = ["--nproc_per_node", str(n_gpus), *rendezvous, "--signals_to_handle", "SIGHUP,SIGQUIT"]
    logging.disable(logging.ERROR)
    try:
        run.run(run.parse_args([*flags, SFT, "--environment", *arguments]))
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        reported = [code for code in codes.values() if code > 0]
        if not reported:
            rank, code = next(iter(codes.items()))
            name = signal.Signals(-code).name
            hint = "; if it was the kernel, memory ran out: see dmesg" if code == -signal.SIGKILL else ""
            print(f"train.sh: error: rank {rank} was ended by {name}{hint}", file=sys.stderr)
        return reported[0] if reported else 1
    return 0


def fork_torchrun(arguments, n_gpus, n_nodes):
    """Start torchrun in a child process that blocks the signals of EXIT_CODES. Returns the child's id.

    The workers inherit this: a signal is pending until sft.py has installed its handlers and unblocks it.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, EXIT_CODES)  # until supervise() has installed its handlers
    child = os.fork()
    if child == 0:
        end_with_parent()
        for number in EXIT_CODES:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup: the run survives its terminal
                signal.signal(number, signal.SIG_DFL)
        sys.exit(torchrun(arguments, n_gpus, n_nodes))
    return child


def end_with_parent():
    """Let the kernel end this process when its parent has ended: it would train on, and nobody would see it.

    torchrun ends with train.sh, and its ranks end with torchrun, also after a SIGKILL. Linux only.
    """
    if sys.platform == "linux":
        import ctypes  # imported here: a single process has no use for it

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def supervise(child, n_nodes, code_file):
    """Wait for torchrun, the process `child`, and forward signals to its workers. Returns the exit code.

    torchrun itself would kill a worker 30 s after a signal, in the middle of a step or a checkpoint, and exit
    with code 1 and a traceback. So torchrun blocks the signals of EXIT_CODES, and each worker gets the signal
    from here, once. The workers then leave the exit code, the same on all nodes, in the file `code_file`.
    A second Ctrl-C kills all processes. So does a signal if a rank is still starting STARTING seconds later:
    a call that waits for the ranks of a node that is gone returns only after --timeout.
    """
    received, signalled, starting, give_up = None, set(), set(), None

    def on_signal(number, _):
        nonlocal received, give_up
        if number == received == signal.SIGINT:
            with contextlib.suppress(OSError):  # stderr may be closed
                os.write(2, b"\nstopped without saving; steps that no checkpoint has are lost\n")
            send(signal.SIGKILL, [child, *children(child)])
        if received is None:
            received = number
            # Without workers there is nothing to save. But those of several nodes should end together
            give_up = time.monotonic() + (STARTING if n_nodes > 1 or children(child) else 0)
            signal.setitimer(signal.ITIMER_REAL, 0.001, 0.2)

    def on_timer(*_):
        nonlocal starting, give_up
        workers = set(children(child))
        starting = {worker for worker in workers - signalled | starting & workers if blocks(worker, received)}
        is_idle = not signalled | workers
        if time.monotonic() >= give_up and (starting or is_idle):
            send(signal.SIGKILL, [child, *workers])
            if is_idle:  # no rank says it
                give_up = math.inf
                say_not_begun(received)
        send(received, workers - signalled)
        signalled.update(workers)

    signal.signal(signal.SIGALRM, on_timer)
    handle_signals(on_signal)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, EXIT_CODES)
    result = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    signal.setitimer(signal.ITIMER_REAL, 0)
    if result == -signal.SIGKILL and received is not None:  # killed above
        return 128 + received
    with open(code_file) as file:
        left = file.read()
    return int(left) if left and result == 0 else shell_code(result)


def handle_signals(handler):
    """Install the handler for the signals of EXIT_CODES. Returns {signal: the handler before}.

    Not for SIGHUP if nohup has it ignored, nor for a signal whose handler is not Python's: nobody could put
    that back.
    """
    before = {number: signal.getsignal(number) for number in EXIT_CODES}
    before = {number: old for number, old in before.items()
              if old is not None and (number, old) != (signal.SIGHUP, signal.SIG_IGN)}
    for number in before:
        signal.signal(number, handler)
    return before


def say_not_begun(number):
    """Write that signal `number` has ended a run of which no rank had started."""
    with contextlib.suppress(OSError):  # stderr may be closed
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: stopped before training began; nothing new to save\n".encode())


def stop_early(number, _):
    """Signal handler while there are no processes yet."""
    say_not_begun(number)
    sys.exit(exit_code(number, has_trained=False))


def shell_code(result):
    """The exit code as a shell reports it: 128 + N if signal N ended the process (in Python: -N)."""
    return result if result >= 0 else 128 - result


def children(process):
    """Ids of the children of a process."""
    try:
        command = ["pgrep", "-P", str(process)]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout
    except FileNotFoundError:  # no pgrep: a container without procps
        output = ""
        with contextlib.suppress(FileNotFoundError), open(f"/proc/{process}/task/{process}/children") as file:
            output = file.read()
    return [int(pid) for pid in output.split()]


def blocks(process, number):
    """Whether a process blocks a signal, as a rank does until it has installed its handlers. Linux only."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{process}/status") as file:
        mask = re.search(r"^SigBlk:\s+(\w+)", file.read(), re.M)
        return mask is not None and bool(int(mask[1], 16) >> (number - 1) & 1)
    return False


def send(number, processes):
    """Send a signal to those of the processes that still exist."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def find_place(n_gpus):
    """(processes on this node, nodes): from the flag --n_gpus (or None), the environment and the cluster.

    Sets the variables of train.sh, and removes those of an earlier torchrun.
    """
    try:
        place, source = cluster.read(os.environ, n_gpus is not None)
    except cluster.ClusterError as error:
        fail(str(error))
    for name in (*cluster.OF_A_RANK, *cluster.TORCHRUN):
        os.environ.pop(name, None)
    os.environ.update(place)
    n_gpus = positive("--n_gpus", n_gpus or variable("N_GPUS", "1"))
    n_nodes = positive("NNODES", variable("NNODES", "1"))
    check_range("NODE_RANK", variable("NODE_RANK", "0"), 0, n_nodes - 1)
    check_range("MASTER_PORT", variable("MASTER_PORT", "29500"), 1, 2**16 - 1)
    if n_nodes > 1 and source:
        meeting.show(f"from {source}: NNODES={n_nodes} NODE_RANK={variable('NODE_RANK', '0')} "
                     f"MASTER_ADDR={variable('MASTER_ADDR', '127.0.0.1')} "
                     f"MASTER_PORT={variable('MASTER_PORT', '29500')}, {n_gpus} processes on this node")
    return n_gpus, n_nodes


def meet(n_nodes, timeout):
    """Wait for the other nodes, then choose the interface to them. Exits if they do not fit together."""
    port = variable("MASTER_PORT", "29500")
    if n_nodes == 1:
        os.environ["MASTER_ADDR"] = "127.0.0.1"  # the port of this node is the one that is used
        if variable("MASTER_PORT", ""):
            check_free(int(port))
        return
    address = variable("MASTER_ADDR", "127.0.0.1")
    nodes = meeting.Meeting(int(variable("NODE_RANK", "0")), n_nodes, address, int(port), timeout)
    try:
        meeting.wait_for_nodes(nodes)
    except meeting.MeetingError as error:
        fail(str(error))
    chosen = cluster.use_interface(nodes.interface_address, os.environ)
    if chosen:
        meeting.show(f"{n_nodes} nodes have joined; {chosen}, the interface of {nodes.interface_address}")


def check_free(port):
    """Exit if another program listens on a port of this node."""
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        fail(f"MASTER_PORT {port}: {os.strerror(error.errno)}; unset it: train.sh then takes a free port")


def main():
    n_gpus, arguments = split_n_gpus(sys.argv[1:])
    single = [sys.executable, SFT, "--environment", *arguments]
    if cluster.is_one_rank(os.environ):
        if n_gpus is not None:
            fail("RANK, LOCAL_RANK and WORLD_SIZE are set: another launcher has started this as one rank, "
                 f"and --n_gpus {n_gpus} would start more in it; remove --n_gpus, or unset them")
        os.execv(sys.executable, single)
    n_gpus, n_nodes = find_place(n_gpus)
    n_ranks = n_gpus * n_nodes
    if n_ranks > 1:  # as torchrun sets them for the workers: sft.py --explain checks settings against them
        sizes = {"WORLD_SIZE": n_ranks, "LOCAL_WORLD_SIZE": n_gpus, "GROUP_WORLD_SIZE": n_nodes}
        os.environ.update({name: str(size) for name, size in sizes.items()})
    if n_ranks == 1 or {"--help", "-h", "--explain"} & set(arguments):
        os.execv(sys.executable, single)
    handle_signals(stop_early)
    meet(n_nodes, check_settings(arguments))
    # otherwise, without a GPU, each process would use all cores
    os.environ["OMP_NUM_THREADS"] = variable("OMP_NUM_THREADS", "1")
    descriptor, path = tempfile.mkstemp()
    os.close(descriptor)
    os.environ[CODE_FILE] = path
    child = fork_torchrun(arguments, n_gpus, n_nodes)
    try:
        sys.exit(supervise(child, n_nodes, path))
    finally:
        os.unlink(path)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # before torchrun has started
        sys.exit(EXIT_CODES[signal.SIGINT])
