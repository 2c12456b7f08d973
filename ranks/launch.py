"""Start sft.py: as one process, or as several under torchrun. train.sh runs this file.

    python ranks/launch.py [--n_gpus N] [flags of sft.py]

Environment: N_GPUS (as --n_gpus), NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT. This file imports only the
standard library, so that one process starts as fast as with `python sft.py`.
"""

import contextlib
import os
import signal
import subprocess
import sys

SFT = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "sft.py")
# Signals that end a run early, and its exit code: Ctrl-C, Slurm's warning before a requeue, a shutdown.
EXIT_CODES = {signal.SIGINT: 130, signal.SIGUSR1: 0, signal.SIGTERM: 143}


def fail(message):
    """Exit with one error line and code 2, the code of an error in the input."""
    print(f"train.sh: error: {message}", file=sys.stderr)
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
    """(processes on this node, the other arguments). The last --n_gpus counts; without one, N_GPUS does."""
    arguments, others, n_gpus = list(arguments), [], variable("N_GPUS", "1")
    while arguments:
        argument = arguments.pop(0)
        name, equals, value = argument.partition("=")
        if name not in ("--n_gpus", "--n-gpus"):
            others.append(argument)
        elif not equals and not arguments:
            fail("--n_gpus needs a number")
        else:
            n_gpus = value if equals else arguments.pop(0)
    return positive("--n_gpus", n_gpus), others


def check_settings(arguments):
    """Let sft.py check its settings once, before torchrun starts. Exits like sft.py if one is wrong.

    If the workers found the error, each would print its line, followed by torchrun's report of 70 lines.
    """
    command = [sys.executable, SFT, "--explain", "--environment", *arguments]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, check=False)
    if result.returncode:
        os.write(2, result.stderr)
        sys.exit(shell_code(result.returncode))


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
    """Start torchrun in a child process that ignores the signals of EXIT_CODES. Returns the child's id.

    The workers inherit this: they ignore signals until sft.py has installed its handlers.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, EXIT_CODES)  # until supervise() has installed its handlers
    child = os.fork()
    if child == 0:
        for number in EXIT_CODES:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, EXIT_CODES)
        sys.exit(torchrun(arguments, n_gpus, n_nodes))
    return child


def supervise(child):
    """Wait for torchrun, the process `child`, and forward signals to its workers. Returns the exit code.

    torchrun itself would kill a worker 30 s after a signal, in the middle of a step or a checkpoint, and exit
    with code 1 and a traceback. So torchrun ignores the signals of EXIT_CODES. After one of them, each worker
    gets SIGUSR1 every second, and the exit code is the one that sft.py alone would have. A second Ctrl-C
    kills all processes.
    """
    code, has_workers = None, False

    def on_signal(number, _):
        nonlocal code
        if number == signal.SIGINT and code == EXIT_CODES[number]:
            send(signal.SIGKILL, [child, *children(child)])
        if code is None:
            hint = "; press Ctrl-C again to quit without saving" if number == signal.SIGINT else ""
            message = f"\n{signal.Signals(number).name}: passed to all ranks as SIGUSR1{hint}\n"
            with contextlib.suppress(OSError):  # stderr may be closed
                os.write(2, message.encode())
            code = EXIT_CODES[number]
            signal.setitimer(signal.ITIMER_REAL, 0.001, 1)  # at once, then every second

    def on_timer(*_):
        nonlocal has_workers
        workers = children(child)
        has_workers = has_workers or bool(workers)
        if not has_workers:  # torchrun still waits for other nodes: there is nothing to save
            send(signal.SIGKILL, [child])
        send(signal.SIGUSR1, workers)

    signal.signal(signal.SIGALRM, on_timer)
    for number in EXIT_CODES:
        signal.signal(number, on_signal)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, EXIT_CODES)
    result = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    signal.setitimer(signal.ITIMER_REAL, 0)
    if code is not None and (result == 0 or code == EXIT_CODES[signal.SIGINT] or not has_workers):
        return code
    return shell_code(result)


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


def send(number, processes):
    """Send a signal to those of the processes that still exist."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def main():
    n_gpus, arguments = split_n_gpus(sys.argv[1:])
    n_nodes = positive("NNODES", variable("NNODES", "1"))
    n_ranks = n_gpus * n_nodes
    if n_ranks > 1:
        check_range("NODE_RANK", variable("NODE_RANK", "0"), 0, n_nodes - 1)
        check_range("MASTER_PORT", variable("MASTER_PORT", "29500"), 1, 2**16 - 1)
        # as torchrun sets them for the workers: sft.py --explain checks settings against them
        os.environ["WORLD_SIZE"] = str(n_ranks)
        os.environ["LOCAL_WORLD_SIZE"] = str(n_gpus)
        os.environ["GROUP_WORLD_SIZE"] = str(n_nodes)
    if n_ranks == 1 or {"--help", "-h", "--explain"} & set(arguments):
        os.execv(sys.executable, [sys.executable, SFT, "--environment", *arguments])
    check_settings(arguments)
    # otherwise, without a GPU, each process would use all cores
    os.environ["OMP_NUM_THREADS"] = variable("OMP_NUM_THREADS", "1")
    sys.exit(supervise(fork_torchrun(arguments, n_gpus, n_nodes)))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # before torchrun has started
        sys.exit(EXIT_CODES[signal.SIGINT])
