"""ranks/processes.py without a process group: a single process, and which rank a failure is attributed to."""

import datetime
import fcntl
import os
import socket

import pytest
import torch
import torch.distributed as dist
from helpers import started

from disk import files
from ranks import processes
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
    with pytest.raises(UserError, match=r"--tp 4 does not divide the 6 processes; use one of 1, 2, 3, 6$"):
        processes.check_tp(4, 6)


@pytest.fixture
def ranks(monkeypatch):
    """Rank 1 of three. Ranks 0 and 1 are in step 8 on this host; rank 2 has been in step 7 for longer, on
    another."""
    ranks = processes.Ranks(rank=1, world_size=3, dp_rank=1, dp_size=3, mesh=None, device=torch.device("cpu"),
                            store=dist.HashStore())
    host = socket.gethostname()
    texts = f"step 8|1000.5|{host}|111", f"step 8|1000.25|{host}|222", "step 7|990|far|333"
    for rank, text in enumerate(texts):
        ranks.store.set(f"rank {rank}", text)
    ranks.phase = "step 8"
    return ranks


@pytest.mark.parametrize("error, culprit", [
    (RuntimeError("Connection closed by peer"), 2), (dist.DistStoreError("timed out"), 2),
    (KeyError("x"), None), (UserError("x"), None),
    (files.LockTimeout("x", pid=111), 0), (files.LockTimeout("x", pid=333), None),
    (files.LockTimeout("x", pid=None), None)], ids=repr)
def test_the_culprit_of_a_failure(error, culprit, ranks):
    """For a collective the rank that has been in its phase for the longest; for a lock its holder, if that is
    a rank on this host; none for an error of the rank's own."""
    found = ranks.find_culprit(error)
    assert (found and found.rank) == culprit


def test_a_rank_reports_its_own_error(ranks, capsys):
    ranks.report_failure(UserError("bad file"))
    assert capsys.readouterr().err == "sft.py: rank 1 failed in step 8: UserError: bad file\n"


@pytest.mark.parametrize("error, host, killed", [
    (RuntimeError("Timed out waiting"), "here", [333]),
    (RuntimeError("wait timeout after 5 ms"), "here", [333]),
    (files.LockTimeout("no progress", pid=333), "here", [333]),
    (RuntimeError("Timed out waiting"), "far", []),  # the pid is another host's
    (RuntimeError("Connection reset"), "here", [])], ids=str)  # it has ended
def test_a_rank_that_may_be_stopped_is_named_and_killed(error, host, killed, ranks, monkeypatch):
    """A stopped process (SIGSTOP) can't end by itself."""
    sent = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append(pid))
    ranks.store.set("rank 2", f"step 7|990|{socket.gethostname() if host == 'here' else host}|333")
    message = r"rank 2 did not respond in step 7 \(it exited or hung\), .* rank 1 waited for it in step 8: "
    with pytest.raises(RuntimeError, match=message):
        ranks.report_failure(error)
    assert sent == killed


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


def test_a_rank_waits_for_slower_ones_that_make_progress(monkeypatch):
    """Longer than --timeout, here 1 s; until one is stuck. Then that one is the culprit, not another that waits."""
    store = dist.HashStore()
    store.set_timeout(datetime.timedelta(seconds=1))
    slow, waiting, first = (processes.Ranks(rank=rank, world_size=3, dp_rank=rank, dp_size=3, mesh=None,
                                            device=torch.device("cpu"), store=store) for rank in range(3))
    clock, end = [100.0], None

    def sleep(seconds):  # meanwhile the slow rank works
        clock[0] += seconds
        if clock[0] < 160:
            slow.show_progress()
        elif end == "done":
            store.add("tokenise done", 1)

    monkeypatch.setattr(processes.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(processes.time, "time", lambda: clock[0])
    monkeypatch.setattr(processes.time, "sleep", sleep)
    for end in "done", "stuck":
        clock[0] = 100.0
        slow.shown = 0.0
        for rank in slow, waiting, first:
            rank.set_phase("tokenise")
        store.add("tokenise done", 1 - store.add("tokenise done", 0))  # `waiting` is done
        waiting.set_phase("end of tokenise")
        if end == "done":
            first.wait_for_slower()
            assert 160 <= clock[0] < 161
    with pytest.raises(RuntimeError, match="timed out: no rank made progress for 3 s") as info:
        first.wait_for_slower()
    assert 159 + 3 < clock[0] < 160 + 4  # the last progress was shown between 158.9 and 160
    assert store.add("progress", 0) < 2 * 61  # once a second, of 600 calls
    assert first.find_culprit(info.value).rank == 0
