"""Start sft.py: as one process, or as several under torchrun. train.sh runs this file.

    python ranks/launch.py [--n_gpus N] [flags of sft.py]

Environment: N_GPUS (as --n_gpus), NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT. It imports the standard
library only: one process starts as fast as by `python sft.py`.
"""

import contextlib
import os
import signal
import subprocess
import sys

SFT = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "sft.py")
# What ends a run early, and its exit code then: Ctrl-C, Slurm's warning before a requeue, a shutdown.
EXIT_CODES = {signal.SIGINT: 130, signal.SIGUSR1: 0, signal.SIGTERM: 143}


def fail(message):
    """End with one line and the exit code of an error of the input."""
    print(f"train.sh: error: {message}", file=sys.stderr)
    sys.exit(2)


def variable(name, default):
    """An environment variable; an empty one counts as not set."""
    return os.environ.get(name) or default


def count(name, text):
    """A number of processes or nodes; ends the program if the text is not a whole number above 0."""
    if not (text.isascii() and text.isdigit() and int(text)):
        fail(f"{name} {text}: it must be a number, at least 1")
    return int(text)


def whole(name, text, low, high):
    """End the program if the text is not a whole number from low to high."""
    if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
        fail(f"{name} {text}: it must be a number from {low} to {high}")


def take_n_gpus(words):
    """(processes on this node, the other words): the last --n_gpus counts; without one, N_GPUS."""
    words, others, n_gpus = list(words), [], variable("N_GPUS", "1")
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if name not in ("--n_gpus", "--n-gpus"):
            others.append(word)
        elif not equals and not words:
            fail("--n_gpus needs a number")
        else:
            n_gpus = value if equals else words.pop(0)
    return count("--n_gpus", n_gpus), others


def check_settings(words):
    """Let sft.py check its settings once, and end as it does if one is wrong: with one line and exit code 2.

    Found by the workers, each would print that line, and torchrun its report of 70 lines behind them.
    """
    command = [sys.executable, SFT, "--explain", "--environment", *words]
    checked = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                             stderr=subprocess.PIPE, check=False)
    if checked.returncode:
        os.write(2, checked.stderr)
        sys.exit(shell_code(checked.returncode))


def torchrun(words, n_gpus, n_nodes):
    """Run sft.py under torchrun, in this process, until all workers have ended; return the exit code.

    It is 2 if the first worker to fail has that code: it has printed what is wrong with the input. Any other
    failure raises torchrun's ChildFailedError, whose text is its report.
    """
    from torch.distributed import run  # here, as the process that waits for this one does not need torch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    port, node_rank = variable("MASTER_PORT", ""), variable("NODE_RANK", "0")
    rendezvous = ["--standalone", "--local_addr", "127.0.0.1"]  # at a free port
    if n_nodes > 1 or port:
        rendezvous = ["--nnodes", str(n_nodes), "--node_rank", node_rank,
                      "--master_addr", variable("MASTER_ADDR", "127.0.0.1"), "--master_port", port or "29500"]
    options = ["--nproc_per_node", str(n_gpus), *rendezvous, "--signals_to_handle", "SIGHUP,SIGQUIT"]
    try:
        run.run(run.parse_args([*options, SFT, "--environment", *words]))
    except ChildFailedError as error:
        if error.get_first_failure()[1].exitcode != 2:
            raise
        return 2
    return 0


def fork_torchrun(words, n_gpus, n_nodes):
    """Start torchrun in a process that ignores the signals of EXIT_CODES; return its id.

    Its workers inherit that: they ignore a signal while Python starts, until sft.py installs its handlers.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, EXIT_CODES)  # a signal waits until supervise() has its handlers
    child = os.fork()
    if child == 0:
        for number in EXIT_CODES:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, EXIT_CODES)
        sys.exit(torchrun(words, n_gpus, n_nodes))
    return child


def supervise(child):
    """Wait for torchrun, the process `child`, and pass signals on to its workers; return the exit code.

    torchrun itself would kill a worker 30 s after a signal, in the middle of a step or a checkpoint, and end
    with code 1 and a traceback. So it ignores the signals of EXIT_CODES. After one, each worker gets SIGUSR1
    every second, and the exit code is that of sft.py alone after this signal. Ctrl-C again kills all of them.
    """
    code, has_workers = None, False

    def on_signal(number, _):
        nonlocal code
        if number == signal.SIGINT and code == EXIT_CODES[number]:
            send(signal.SIGKILL, [child, *children(child)])
        if code is None:
            code = EXIT_CODES[number]
            signal.setitimer(signal.ITIMER_REAL, 0.001, 1)  # at once, then every second

    def on_timer(*_):
        nonlocal has_workers
        workers = children(child)
        has_workers = has_workers or bool(workers)
        if not has_workers:  # it still waits for the other nodes: there is nothing to save
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
    """The exit code as a shell gives it: 128 + N for a process that signal N ended, which Python calls -N."""
    return result if result >= 0 else 128 - result


def children(process):
    """Ids of the children of a process."""
    try:
        command = ["pgrep", "-P", str(process)]
        found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout
    except FileNotFoundError:  # a container without procps
        found = ""
        with contextlib.suppress(FileNotFoundError), open(f"/proc/{process}/task/{process}/children") as file:
            found = file.read()
    return [int(word) for word in found.split()]


def send(number, processes):
    """Send a signal to those of the processes that still exist."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def main():
    n_gpus, words = take_n_gpus(sys.argv[1:])
    n_nodes = count("NNODES", variable("NNODES", "1"))
    n_ranks = n_gpus * n_nodes
    if n_ranks > 1:
        whole("NODE_RANK", variable("NODE_RANK", "0"), 0, n_nodes - 1)
        whole("MASTER_PORT", variable("MASTER_PORT", "29500"), 1, 2**16 - 1)
    if n_ranks > 1:  # as torchrun says it to the workers
        os.environ["WORLD_SIZE"] = str(n_ranks)
        os.environ["LOCAL_WORLD_SIZE"] = str(n_gpus)
        os.environ["GROUP_WORLD_SIZE"] = str(n_nodes)
    if n_ranks == 1 or {"--help", "-h", "--explain"} & set(words):
        os.execv(sys.executable, [sys.executable, SFT, "--environment", *words])
    check_settings(words)
    # without a GPU each process would take all cores
    os.environ["OMP_NUM_THREADS"] = variable("OMP_NUM_THREADS", "1")
    sys.exit(supervise(fork_torchrun(words, n_gpus, n_nodes)))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # before there are workers
        sys.exit(EXIT_CODES[signal.SIGINT])
