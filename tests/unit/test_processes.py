"""ranks/processes.py and ranks/failures.py without a process group: a single process, and which rank is blamed."""

import datetime
import fcntl
import itertools
import os
import re
import signal
import socket
import subprocess
import threading
import time
from concurrent import futures
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from helpers import started

from disk import files
from ranks import failures, processes
from settings.errors import UserError


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_single_process_has_everything_that_a_rank_has(device):
    ranks = processes.single_process(torch.device(device))
    ranks.set_phase("load")
    tensor = torch.ones(2, device=device)
    assert ranks.all_reduce(tensor) is tensor
    assert ranks.broadcast(7) == 7
    assert ranks.poll_signals() == 0
    assert (ranks.rank, ranks.world_size, ranks.dp_rank, ranks.dp_size, ranks.mesh) == (0, 1, 0, 1, None)
    assert not dist.is_initialized()


def test_tp_divides_the_processes():
    for tp, world_size in ((1, 1), (2, 4), (4, 4)):
        processes.check_tp(tp, world_size)
    with pytest.raises(UserError, match=r"--tp 4 does not divide the 6 processes; use one of 1, 2, 3, 6 \(1 with --strategy fsdp\)$"):
        processes.check_tp(4, 6)


@pytest.mark.parametrize("tp, sp, replicas, world_size, message", [
    (1, 1, 2, 1, "--replicas 2 needs a multiple of 2 processes, and this run has 1; start them with "
     "./train.sh --n_gpus 2, or use --replicas 1"),
    (1, 1, 3, 4, "--replicas 3 needs a multiple of 3 processes, and this run has 4; start them with "
     "./train.sh --n_gpus 3, or use --replicas 1 or 2 or 4"),
    (2, 1, 3, 4, "--tp 2 --replicas 3 needs a multiple of 6 processes, and this run has 4; start them with "
     "./train.sh --n_gpus 6, or use --replicas 1 or 2"),
    (1, 2, 4, 6, "--sp 2 --replicas 4 needs a multiple of 8 processes, and this run has 6; start them with "
     "./train.sh --n_gpus 8, or use --replicas 1 or 3"),
    (2, 3, 5, 8, "--tp 2 --sp 3 --replicas 5 needs a multiple of 30 processes, and this run has 8; start them with "
     "./train.sh --n_gpus 30, or use --sp 1 --replicas 1"),
    (1, 2, 2, 1, "--sp 2 --replicas 2 needs a multiple of 4 processes, and this run has 1; start them with "
     "./train.sh --n_gpus 4, or use --sp 1 --replicas 1"),
    (1, 2, 2, 2, "--sp 2 --replicas 2 needs a multiple of 4 processes, and this run has 2; start them with "
     "./train.sh --n_gpus 4, or use --sp 1, or --replicas 1"),
    (4, 2, 2, 2, "--tp 4 needs at least 4 processes, and this run has 2"),
])
def test_a_layout_that_does_not_divide_the_processes_is_an_error(tp, sp, replicas, world_size, message):
    """The error lists sizes that work with the other ones, each of which check_layout then accepts."""
    with pytest.raises(UserError, match=f"^{re.escape(message)}") as error:
        processes.check_layout(tp, sp, replicas, world_size)
    sizes = dict(tp=tp, sp=sp, replicas=replicas)
    for choice in str(error.value).partition(", or use ")[2].split(", or "):
        flags = re.findall(r"--(sp|replicas) ([0-9]+(?: or [0-9]+)*)", choice)
        for numbers in itertools.product(*(numbers.split(" or ") for _, numbers in flags)):
            changed = {name: int(number) for (name, _), number in zip(flags, numbers, strict=True)}
            if changed:  # the error about --tp has another form
                processes.check_layout(**{**sizes, **changed}, world_size=world_size)


def test_layouts_that_divide_the_processes():
    """Every one whose product divides them, and no other."""
    for tp, sp, replicas, world_size in itertools.product(range(1, 5), range(1, 5), range(1, 5), range(1, 13)):
        try:
            processes.check_layout(tp, sp, replicas, world_size)
            is_valid = True
        except UserError:
            is_valid = False
        assert is_valid == (world_size % (tp * sp * replicas) == 0), (tp, sp, replicas, world_size)


def test_a_lock_names_its_holder(tmp_path):
    """After the time-out a UserError has the pid that the holder wrote."""
    path = tmp_path / "x.lock"
    with started("lock_holder", path) as holder:
        holder.stdout.readline()
        with open(path, "a+") as lock:
            with pytest.raises(UserError, match="has made no progress for 0.3 s") as info:
                files.take_lock(lock, 0.3)
        holder.kill()
    assert info.value.pid == holder.pid
    with open(path, "a+") as first, open(path, "a+") as second:
        fcntl.flock(first, fcntl.LOCK_EX)
        first.truncate(0)  # the holder has not written its pid yet
        with pytest.raises(files.LockTimeout) as info:
            files.take_lock(second, 0.2)
    assert info.value.pid is None


def test_a_wait_for_a_lock_counts_only_time_in_which_it_ran(tmp_path, monkeypatch):
    """The whole run was suspended for an hour, the holder too. Then the holder stays where it is for 10 seconds."""
    clock, sleeps = [0.0], []

    def sleep(seconds):
        clock[0] += seconds if sleeps else 3600
        sleeps.append(seconds)

    monkeypatch.setattr(files.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(files.time, "sleep", sleep)
    with open(tmp_path / "x.lock", "a+") as holder, open(tmp_path / "x.lock", "a+") as waiter:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(files.LockTimeout):
            files.take_lock(waiter, 10)
    assert 9 / files.POLL < len(sleeps) < 11 / files.POLL


@pytest.mark.parametrize("late, seen", [(True, [0, 0, 15, 15]), (False, [0, 15, 15, 15])])
def test_a_signal_is_seen_by_all_ranks_at_the_same_poll(late, seen, monkeypatch):
    """Rank 1 receives it before the second poll. A late poll does not wait for the other rank: it returns what the one
    before it found."""
    shared, waited = [], []

    class Work(NamedTuple):
        poll: int

        def wait(self):
            waited.append(self.poll)
            for tensor in shared[self.poll]:
                tensor.fill_(max(shared[self.poll]))

    def all_reduce(tensor, operation, async_op):
        if not shared or len(shared[-1]) == 2:
            shared.append([])
        shared[-1].append(tensor)
        return Work(len(shared) - 1)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    ranks = [processes.Ranks(rank=rank, world_size=2, dp_rank=rank, dp_size=2, mesh=None, device=torch.device("cpu"),
                             store=dist.HashStore(), has_polled=True) for rank in range(2)]
    found = []
    for poll in range(4):
        if poll == 1:
            ranks[1].received_signal = 15
        if late:
            found.append([rank.poll_signals(late=True) for rank in ranks])
            assert len(shared) - 1 not in waited
        else:  # both enter before one waits
            shared.append([torch.tensor(rank.received_signal) for rank in ranks])
            monkeypatch.setattr(dist, "all_reduce", lambda tensor, *_, **__: Both(tensor, shared[-1]))
            found.append([rank.poll_signals() for rank in ranks])
    assert found == [[number, number] for number in seen]
    assert late is False or [rank.poll_signals() for rank in ranks] == [15, 15]


class Both(NamedTuple):
    """Work of a poll that both ranks have entered."""

    tensor: torch.Tensor
    numbers: list

    def wait(self):
        self.tensor.fill_(max(self.numbers))


# ---- the attempts of a run in one store -----------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_ends_a_rank_that_waits_for_others(rank, monkeypatch, capfd, tmp_path):
    """ranks/launch.py has blocked it. For the store, for rank 0 and for the last rank; one rank of a node says so."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with socket.socket() as taken:  # nobody answers there
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setenv("SFT_EXIT_CODE_FILE", str(tmp_path / "code"))
        monkeypatch.setattr(signal, "pthread_sigmask", lambda *_: set())
        monkeypatch.setattr(signal, "sigpending", lambda: {signal.SIGTERM, signal.SIGHUP})
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        with monkeypatch.context() as patch:
            patch.setattr(signal, "sigpending", lambda: {signal.SIGHUP})
            assert processes.pending_signal() == 0
        store = dist.HashStore()
        store.set("newest attempt", "of an earlier run")
        ranks = processes.single_process(torch.device("cpu"))
        ranks.store, ranks.world_size, ranks.rank = store, 2, rank
        waits = [lambda: processes.join(store, rank, 2, 60), ranks.wait_for_start]
        waits += [lambda: processes.connect(rank, 2, 60)] * rank  # as rank 0 it would serve the store
        try:
            for wait in waits:
                with pytest.raises(processes.Stopped) as stopped:
                    wait()
                assert stopped.value.number == signal.SIGTERM and (tmp_path / "code").read_text() == "143"
                line = "\nSIGTERM: stopped before training began; nothing new to save\n"
                assert capfd.readouterr().err == ("" if rank else line)
        finally:
            signal.signal(signal.SIGHUP, before)


@pytest.fixture
def attempts(monkeypatch):
    """(a store, a function: rank, whether it lives on -> a Future of what join() returns, a function that ends all)"""
    monkeypatch.setenv("MASTER_ADDR", "here")
    monkeypatch.setenv("MASTER_PORT", "29500")
    store, pool, ended = dist.HashStore(), futures.ThreadPoolExecutor(8), []

    def live(part, rank, end):
        """What the watchdog of a rank and wait_for_start() write."""
        while not end.wait(0.02):
            part.set(f"state {rank}", f"{part.add('beat', 1)}")
            part.add("turns of rank 0", int(rank == 0))

    def start(rank, timeout=20, lives=True):
        def run():
            part = processes.join(store, rank, 2, timeout)
            if lives:
                ended.append(threading.Event())
                pool.submit(live, part, rank, ended[-1])
            part.set(f"joined {rank}", "")
            return part
        return pool.submit(run)

    def end():
        for event in ended:
            event.set()

    yield store, start, end
    end()
    pool.shutdown()


def test_a_rank_that_never_joined_is_in_the_same_attempt_as_the_others_after_a_restart(attempts):
    """It was killed while it imported torch. To count the attempts of each rank would put it into the first one, whose
    keys are those of dead processes."""
    _, start, end = attempts
    first = start(0).result(20)
    end()
    early = start(1)  # before rank 0, which the other node starts
    with pytest.raises(futures.TimeoutError):
        early.result(0.5)
    second = start(0).result(20)
    early.result(20)
    assert second.check(["joined 1"]) and not first.check(["joined 1"])


def test_a_node_that_is_started_again_joins_the_others(attempts):
    """Its torchrun counts no restart; the attempt before had all ranks."""
    _, start, end = attempts
    parts = [start(0), start(1)]
    assert [part.result(20).check(["joined 0"]) for part in parts] == [True, True]
    end()
    again = [start(1), start(0)]
    assert [part.result(20).check(["joined 0", "joined 1"]) for part in again] == [True, True]
    assert not any(part.result().check(["third"]) for part in parts)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_second_run_in_the_store_of_a_running_one_is_refused(rank, attempts):
    _, start, _ = attempts
    for part in [start(0), start(1)]:
        part.result(20)
    with pytest.raises(UserError, match=rf"MASTER_PORT 29500: another run uses it on here, and has a rank {rank} \(.*"):
        start(rank).result(20)


def test_a_rank_waits_for_rank_0_until_timeout(attempts):
    _, start, _ = attempts
    with pytest.raises(UserError, match="rank 1 waited for rank 0 for --timeout 0.3 s"):
        start(1, timeout=0.3).result(20)


# ---- who is to blame ------------------------------------------------------------------------------------------------


@pytest.fixture
def watchdogs(monkeypatch):
    """Those of four ranks on one store, two ranks on each of two nodes. Threads are not started."""
    monkeypatch.setattr(failures, "collectives", dict)
    monkeypatch.setattr(failures, "child_state", lambda pid: "S")
    store = dist.HashStore()
    store.set_timeout(datetime.timedelta(seconds=1))
    failures.prepare(store, 4)
    found = []
    for rank in range(4):
        monkeypatch.setenv("GROUP_RANK", str(rank // 2))
        monkeypatch.setenv("LOCAL_RANK", str(rank % 2))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        found.append(failures.Watchdog(store, rank, 4, timeout=10))
        found[-1].phase = "step 8"
        monkeypatch.setattr(found[-1], "collectives", {"dp": 7}, raising=False)
    monkeypatch.setattr(failures.Watchdog, "state", lambda self: failures.State(
        self.node, "here", 100 + self.rank, self.phase, {**self.collectives, "store": self.store_waits},
        self.progress, self.beat, os.getppid()))
    return found


def wait(watchdogs, seconds, silent=(), step=0.5):
    """Let time pass until one of them sees a failure; (the rank that saw it, the Failure, seconds) or None."""
    for i in range(int(seconds / step)):
        for watchdog in watchdogs:
            if watchdog.rank not in silent:
                watchdog.exchange()
                watchdog.count(step)
                if failure := watchdog.judge():
                    return watchdog.rank, failure, i * step
    return None


@pytest.mark.parametrize("method", ["exchange", "count"])
def test_no_thread_is_inside_torch_when_a_rank_ends(method, watchdogs, monkeypatch):
    """Python would abort the process at its end. A slow call stands for the moment in which that happens."""
    watchdog, entered = watchdogs[0], threading.Event()
    monkeypatch.setattr(watchdog, method, lambda *_: entered.set() or time.sleep(0.5))
    watchdog.start()
    assert entered.wait(10)
    watchdog.close()
    assert not any(thread.is_alive() for thread in watchdog.threads)


def test_a_rank_that_does_not_get_on_is_blamed(watchdogs):
    """Those that wait for it have entered one collective more."""
    for watchdog in watchdogs[:2] + watchdogs[3:]:
        watchdog.collectives = {"dp": 8}
    rank, failure, seconds = wait(watchdogs, 30)
    assert (failure.rank, failure.node, failure.phase, failure.is_silent) == (2, 1, "step 8", True)
    assert rank == 0 and "it has not moved for 10 s, and rank 0 waits for it in step 8" in failure.line()
    assert 10 < seconds < 15


@pytest.mark.parametrize("silent, cause", [
    ([1], "nothing was heard from it for 10 s"),
    ([2, 3], "nothing was heard from it for 10 s, nor from any other rank of node 1: it is gone, or the link to it "
             "is cut")])
def test_a_rank_that_is_silent_is_blamed(silent, cause, watchdogs):
    wait(watchdogs, 1)
    rank, failure, seconds = wait(watchdogs, 30, silent)
    assert failure.rank == silent[0] and failure.cause == cause and rank == 0 and 9 < seconds < 15


def test_a_rank_that_has_not_started_is_blamed(watchdogs):
    _, failure, _ = wait(watchdogs[:3], 30)
    assert failure.rank == 3 and failure.phase == "start"


def test_a_rank_that_shows_progress_may_take_any_time(watchdogs):
    """Also if the others wait for it in the store, as at the end of tokenising. Until it is stuck."""
    for watchdog in watchdogs[1:]:
        watchdog.store_waits = 1
    for _ in range(10):
        watchdogs[0].progress += 1
        assert wait(watchdogs, 9) is None
    _, failure, _ = wait(watchdogs, 30)
    assert failure.rank == 0


def test_ranks_that_are_all_in_the_same_place_have_more_time(watchdogs):
    """They may load or compile."""
    rank, failure, seconds = wait(watchdogs, 60)
    assert 30 < seconds < 35 and failure.cause.startswith("no rank has moved for 30 s")


def test_a_suspended_process_counts_no_time(watchdogs, monkeypatch):
    """Its thread was not called for an hour; then for 9.5 seconds each half second."""
    clock, counted = [0.0], []
    watchdog = watchdogs[0]

    def sleep(seconds):
        clock[0] += 3600 if not counted else seconds
        return len(counted) == 21

    monkeypatch.setattr(failures.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(watchdog.closed, "wait", sleep)
    monkeypatch.setattr(watchdog, "judge", lambda: None)
    monkeypatch.setattr(watchdog, "count", counted.append)
    watchdog.watch()
    assert counted[0] == 2 * failures.TICK and len(counted) == 21 and set(counted[1:]) == {failures.TICK}


def test_a_process_of_this_node_that_has_ended_is_seen_at_once(watchdogs, monkeypatch):
    """One with the same pid on another node is not it."""
    wait(watchdogs, 1)
    monkeypatch.setattr(failures, "child_state", lambda pid: "" if pid == 101 else "S")
    rank, failure, seconds = wait(watchdogs[2:], 3) or (None, None, None)
    assert failure is None
    rank, failure, seconds = wait(watchdogs, 3)
    assert (rank, failure.rank, seconds) == (0, 1, 0)


def test_a_rank_with_another_parent_has_not_ended(watchdogs, monkeypatch):
    """Without torchrun, or where torchrun starts a script that starts the rank. The kernel says nothing about it."""
    monkeypatch.setattr(failures, "child_state", lambda pid: "" if pid == 101 else "S")
    state = failures.Watchdog.state
    monkeypatch.setattr(failures.Watchdog, "state", lambda self: state(self)._replace(parent=1000 + self.rank))
    assert wait(watchdogs, 9) is None


def test_a_thread_reads_who_the_siblings_are_while_another_judges(watchdogs, monkeypatch):
    """A dict that grew meanwhile would end the judging thread: nobody would notice a lost rank any more."""
    for watchdog in watchdogs[:2]:
        watchdog.exchange()
    watchdogs[1].siblings = {0: watchdogs[0].state()}  # all that it has read so far
    monkeypatch.setattr(failures, "child_state", lambda pid: watchdogs[1].exchange() or "S")
    assert watchdogs[1].gone_sibling() is None and set(watchdogs[1].siblings) == {0, 1}


def test_the_first_failure_wins(watchdogs, monkeypatch):
    """Each rank reads it; the phase of one that does not respond is the last one that it wrote."""
    monkeypatch.setattr("sys.argv", ["tools/evaluate.py"])
    first = watchdogs[1].blame_for(KeyError("x"), 1)
    silent = watchdogs[2].silent(3, watchdogs[3].state(), "gone")
    for watchdog, failure in zip(watchdogs, (None, first, silent)):
        watchdog.proposal = failure
    for watchdog in watchdogs:
        watchdog.exchange()
    watchdogs[0].exchange()
    assert {watchdog.failure for watchdog in watchdogs} == {first}
    assert first.line() == f"evaluate.py: error: rank 1 (node 0, {first.host}) failed in step 8: KeyError: 'x'"
    watchdogs[0].exchange()
    assert not watchdogs[0].unread


def test_a_rank_that_is_done_may_end(watchdogs):
    """Its process may have ended before another one has seen that all are done."""
    watchdogs[0].store.set("done 1", "")
    for rank, watchdog in ((1, watchdogs[0]), (3, watchdogs[2])):
        watchdog.proposal = watchdog.silent(rank, watchdogs[rank].state(), "its process has ended")
        watchdog.exchange()
    assert watchdogs[0].failure is None is watchdogs[0].proposal and watchdogs[2].failure.rank == 3


@pytest.mark.parametrize("error, is_own", [
    (RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer"), False),
    (dist.DistBackendError("NCCL error"), False), (dist.DistNetworkError("x"), False),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), True), (UserError("x"), True),
    (files.LockTimeout("x", pid=5), True)], ids=repr)
def test_which_errors_are_those_of_other_ranks(error, is_own, watchdogs):
    assert bool(watchdogs[0].blame_for(error, 1)) is is_own


def test_a_lock_that_a_rank_holds(watchdogs):
    wait(watchdogs, 1)
    failure = watchdogs[0].blame_for(files.LockTimeout("x", pid=101), 2)
    assert failure.rank == 1 and failure.is_silent
    assert watchdogs[0].blame_for(files.LockTimeout("x", pid=103), 2).rank == 0  # a process of the other node


def test_a_store_that_does_not_answer(watchdogs):
    watchdog = watchdogs[3]
    for _ in range(50):
        watchdog.count(0.5)
        if failure := watchdog.judge():
            break
    assert failure.line().endswith("failed in step 8: node 0 is gone, or the link to it is cut: its "
                                   "store has not answered for 10 s")
    watchdog.is_store_gone = True
    assert "node 0 is gone" in watchdog.judge().cause


def test_a_rank_that_waits_is_not_blamed_for_those_that_wait_for_it():
    """On a mesh: rank 1 is stuck, 0 waits for it in tp, 2 waits for 0 in dp."""
    def state(**entered):
        return failures.State(0, "here", 1, "step 8", entered, 0, 0)

    states = {0: state(tp0=5, dp0=3), 1: state(tp0=4, dp1=3), 2: state(tp1=5, dp0=4), 3: state(tp1=5, dp1=4)}
    assert failures.those_behind(states) == [1]


def test_child_state():
    """Only a child of this process's parent may be killed."""
    assert failures.child_state(os.getpid()) not in ("", "?")
    with subprocess.Popen(["sleep", "100"]) as other:
        states = failures.child_state(other.pid), failures.child_state(2**22 + 1)
        other.kill()
    assert states == ("", "")


def test_ranks_without_conversations_are_counted(capsys):
    def ranks(rank):
        return processes.Ranks(rank=rank, world_size=8, dp_rank=rank, dp_size=8, mesh=None, device=torch.device("cpu"),
                               store=dist.HashStore())

    ranks(1).warn_of_idle(3)
    ranks(0).warn_of_idle(8)
    assert capsys.readouterr().err == ""
    ranks(0).warn_of_idle(3)
    assert "--batch_size 3 is less than the 8 data-parallel ranks: 5 of them compute" in capsys.readouterr().err
