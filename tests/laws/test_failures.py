"""One rank fails: all ranks end soon, with a non-zero exit code, and one line says which it was, where, and why."""

import fcntl
import itertools
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from helpers import EXAMPLES, ROOT, TINY, launch_all, metrics, program, torchrun

from disk import checkpoint

RUN = ("--model", TINY, "--train_data", EXAMPLES, "--max_steps", 4, "--batch_size", 8, "--max_length", 128,
       "--no-gradient_checkpointing", "--output_dir", "out")
PHASES = ("start", "tokenise", "load", "step 2", "evaluation after step 2", "save of step 2")
BY_DEFAULT = (("raise", "step 2", 1),)


def assert_reported(result, how, phase, rank):
    """The line names rank, phase and cause, and no other rank is blamed."""
    causes = {"kill": "its process has ended",
              "stop": r"nothing was heard from it for [\d.]+ s: it is stopped \(SIGSTOP\)",
              "block": r"it has not moved for \d s, and rank \d waits for it", "hold": "nothing was heard from it"}
    screen = result.stderr.split("ChildFailedError")[0]  # before torchrun's report
    assert result.returncode
    if how == "raise":
        assert re.search(rf"^sft.py: rank {rank} \(node 0, \S+\) failed in {phase}:\nTraceback", screen, re.M), screen
        assert screen.count("KeyError: 'planted'") == 1
    elif how == "user":
        assert screen.count("sft.py: error: --planted 1: it must be 2\n") == 1
    else:
        line = rf"^sft.py: error: rank {rank} \(node 0, \S+\) did not respond in {phase}: {causes[how]}"
        assert re.search(line, screen, re.M), screen
    assert len(re.findall(r"^sft.py: ", screen, re.M)) == 1, screen


@pytest.mark.parametrize("how, phase, rank", [
    pytest.param(*case, marks=() if case in BY_DEFAULT else pytest.mark.full)
    for case in [*itertools.product(("raise", "kill", "stop"), PHASES, (0, 1)),
                 ("user", "load", 1), ("block", "step 2", 0), ("hold", "step 2", 1)]])
def test_a_failing_rank_ends_all(how, phase, rank, tmp_path):
    """With --full in every phase and on both ranks; -rA shows how long each run took to end."""
    result = program("failing_rank", how, phase, rank, *RUN, "--save_steps", 2, "--val_data", EXAMPLES,
                     "--eval_steps", 2, "--timeout", 5, ranks=2, cwd=tmp_path)
    seconds = time.time() - float((tmp_path / "planted").read_text())
    print(f"{how:5} on rank {rank} in {phase:24} all ranks ended within {seconds:4.1f} s")
    assert seconds < (15 if how in ("raise", "user", "kill") else 20)
    assert_reported(result, how, phase, rank)
    assert checkpoint.steps_in(tmp_path / "out" / "checkpoints") == []


@pytest.mark.full
def test_one_of_four_ranks_is_stopped(tmp_path):
    """It is the one that is blamed, and it is the only one that is killed."""
    result = program("failing_rank", "stop", "step 2", 2, *RUN, "--timeout", 3, ranks=4, cwd=tmp_path)
    assert_reported(result, "stop", "step 2", 2)
    ended = dict(re.findall(r"rank +: (\d) .*\n +exitcode +: (-?\d+)", result.stderr))
    assert ended.pop("2", "-9") == "-9" and set(ended.values()) == {"1"}


@pytest.mark.full
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_stalls_after_training_ends_the_run(rank, tmp_path):
    """At the end the ranks wait for each other."""
    result = program("failing_rank", "stop", "end", rank, *RUN, "--timeout", 5, ranks=2, cwd=tmp_path)
    assert_reported(result, "stop", "save of step 4", rank)
    assert checkpoint.steps_in(tmp_path / "out" / "checkpoints")[-1] == 4  # the last step is saved


@pytest.mark.full
def test_a_rank_that_stalls_while_it_tokenises_ends_the_run(tmp_path):
    """The other ranks wait for the lock of the token cache, for at most --timeout, and name the rank that holds it. If
    another program holds the lock, no rank is blamed."""
    flags = [*RUN, "--timeout", 4, "--cache_dir", tmp_path / "cache"]
    result = program("failing_rank", "stop", "lock", 0, *flags, ranks=3, cwd=tmp_path)
    assert result.returncode
    assert re.search(r"^sft.py: error: rank \d \(node 0, .*\) did not respond in tokenise: ", result.stderr, re.M)
    (lock,) = (tmp_path / "cache").glob("*.lock")
    with open(lock, "r+") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        f.truncate(0)
        print(os.getpid(), file=f, flush=True)
        result = torchrun(2, f"{ROOT}/sft.py", *flags, cwd=tmp_path)
    assert result.returncode
    assert result.stderr.count(f"sft.py: error: process {os.getpid()} holds {lock}") == 1


@pytest.mark.full
@pytest.mark.parametrize("static", [False, True])
def test_a_run_is_restarted_from_its_last_checkpoint(static, tmp_path):
    """torchrun --max-restarts with --resume_from auto. What the first attempt wrote to the store, which a static
    rendezvous keeps, does not end the second one."""
    rendezvous = ["--master_addr", "127.0.0.1", "--master_port", "29517"] if static else ["--standalone"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", *rendezvous, "--max_restarts",
               "2", f"{ROOT}/tests/programs/failing_rank.py", "kill", "step 3", "1", *RUN, "--save_steps", 2,
               "--resume_from", "auto"]
    result = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, timeout=300,
                            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests"})
    assert result.returncode == 0, result.stderr
    assert "rank 1 (node 0, " in result.stderr and "resume" in result.stdout
    assert [line["step"] for line in metrics(tmp_path / "out")] == [1, 2, 3, 4]


@pytest.mark.full
def test_a_second_run_in_the_store_of_the_first_is_refused(tmp_path):
    """Each rank is there once. The first run has both of its ranks; the second one's rank 1 comes to the same port."""
    host = ("from torch.distributed import TCPStore; import time; store = TCPStore('127.0.0.1', 0, is_master=True, "
            "wait_for_workers=False); print(store.port, flush=True); time.sleep(200)")
    flags = [sys.executable, f"{ROOT}/sft.py", *map(str, RUN[:4]), "--epochs", "10000", "--output_dir", "out",
             "--timeout", "30"]
    with subprocess.Popen([sys.executable, "-c", host], stdout=subprocess.PIPE, text=True) as store:
        port = store.stdout.readline().strip()
        environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                       "TORCHELASTIC_USE_AGENT_STORE": "True"}
        first = [subprocess.Popen(flags, cwd=tmp_path, env={**environment, "RANK": rank}, stdout=subprocess.DEVNULL,
                                  stderr=subprocess.DEVNULL) for rank in "01"]
        limit = time.monotonic() + 100
        while not (tmp_path / "out" / "metrics.jsonl").exists() and time.monotonic() < limit:
            time.sleep(0.1)
        second = subprocess.run(flags, cwd=tmp_path, env={**environment, "RANK": "1"}, capture_output=True, text=True,
                                timeout=60)
        for process in (*first, store):
            process.kill()
            process.wait()
    assert second.returncode == 2
    assert re.fullmatch(rf"sft.py: error: MASTER_PORT {port}: another run uses it on 127.0.0.1, and has a rank 1 "
                        rf"\(\S+, process {first[1].pid}\); .*\n", second.stderr)


@pytest.mark.full
def test_all_groups_have_a_later_time_out_than_the_watchdog(tmp_path):
    """Those of the mesh would have torch's, which count the time for which a run was suspended."""
    result = launch_all([(4, ("group_timeouts", 2))], tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("DAYS 20\n") == result.stdout.count("DAYS") == 4 * 4  # all, and three axes
    assert result.stdout.count("ENDS AT ONCE True\n") == 4  # threads of gloo, see errors.end


@pytest.mark.full
def test_ranks_end_with_their_torchrun(tmp_path):
    """SIGKILL of torchrun: nobody would see what they train."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", f"{ROOT}/sft.py",
               *map(str, RUN[:4]), "--epochs", "10000", "--output_dir", "out"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 60
    while not (tmp_path / "out" / "metrics.jsonl").exists() and time.monotonic() < limit:
        time.sleep(0.1)
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as f:
        ranks = f.read().split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(2)
    assert len(ranks) == 2 and not any(os.path.exists(f"/proc/{pid}") for pid in ranks)
