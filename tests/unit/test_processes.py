"""ranks/processes.py where no process group is needed: a process alone, and whom a rank blames for its
error."""

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
def test_a_process_alone_has_all_that_a_rank_has(device):
    ranks = processes.single_process(torch.device(device))
    ranks.set_phase("load")
    tensor = torch.ones(2, device=device)
    assert ranks.all_reduce(tensor) is tensor and ranks.broadcast(7) == 7 and ranks.poll_signals() == 0
    assert (ranks.rank, ranks.world_size, ranks.dp_rank, ranks.dp_size, ranks.mesh) == (0, 1, 0, 1, None)
    assert not dist.is_initialized()


def test_tp_divides_the_processes():
    for tp, size in ((1, 1), (2, 4), (4, 4)):
        processes.check_tp(tp, size)
    with pytest.raises(UserError, match=r"--tp 4 does not divide the 6 processes; these do: \[1, 2, 3, 6\]"):
        processes.check_tp(4, 6)


@pytest.fixture
def ranks(monkeypatch):
    """Rank 1 of three in step 8. Rank 0 is in step 8 too, and rank 2 in step 7, since before the others,
    elsewhere."""
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
def test_whom_a_rank_waited_for(error, culprit, ranks):
    """After a collective, for the rank that has been in its phase for the longest; for a lock, for its
    holder, if it is a rank on this host; after an error of its own, for none."""
    found = ranks.waited_for(error)
    assert (found and found.rank) == culprit


def test_an_error_of_its_own_is_reported_by_the_rank(ranks, capsys):
    ranks.blame(UserError("bad file"))
    assert capsys.readouterr().err == "sft.py: rank 1 failed in step 8: UserError: bad file\n"


@pytest.mark.parametrize("error, host, killed", [
    (RuntimeError("Timed out waiting"), "here", [333]),
    (RuntimeError("wait timeout after 5 ms"), "here", [333]),
    (files.LockTimeout("no progress", pid=333), "here", [333]),
    (RuntimeError("Timed out waiting"), "far", []),  # the pid is another host's
    (RuntimeError("Connection reset"), "here", [])], ids=str)  # it has ended
def test_a_rank_that_may_be_stopped_is_named_and_killed(error, host, killed, ranks, monkeypatch):
    """It can't end by itself."""
    sent = []
    monkeypatch.setattr(os, "kill", lambda *words: sent.append(words[0]))
    ranks.store.set("rank 2", f"step 7|990|{socket.gethostname() if host == 'here' else host}|333")
    message = "rank 1 waited in step 8 for rank 2, which is gone, or stalled in step 7 since"
    with pytest.raises(RuntimeError, match=message):
        ranks.blame(error)
    assert sent == killed


def test_a_lock_says_who_holds_it(tmp_path):
    """After the time-out, as an error of the input, with the pid that the holder wrote."""
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
