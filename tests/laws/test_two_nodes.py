"""Two nodes, each in a network namespace of its own with two ranks: a fault on one of them ends both.

-rA shows how long each node took. Both have the same host name.
"""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, TESTS, TINY, metrics

TIMEOUT = 6
FLAGS = ("--n_gpus", 2, "--model", TINY, "--max_length", 64, "--batch_size", 8, "--no-gradient_checkpointing",
         "--timeout", TIMEOUT, "--output_dir", "out")
PLANTED = '''
        open("begun", "w").close() if step == 4 else open(f"pid {ranks.rank}", "w").write(str(os.getpid()))
        if step == 5 and str(ranks.rank) == os.environ["VICTIM"]:
            if os.environ["FAULT"] == "raise":
                raise KeyError("planted")
            if os.environ["FAULT"] == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            if os.environ["FAULT"] == "shape":
                torch.ones(2, 3) @ torch.ones(2, 3)
'''
BY_ITSELF = {"raise": "KeyError: 'planted'", "memory": "memory ran out", "shape": "mat1 and mat2 shapes cannot be"}


def reason_to_skip():
    """Why two network namespaces are not possible here, or ""."""
    if not all(map(shutil.which, ("ip", "unshare", "nsenter"))):
        return "needs iproute2 and util-linux"
    made = subprocess.run(["unshare", "-Urn", "unshare", "-n", "true"], capture_output=True, text=True)
    return made.stderr and f"namespaces are not allowed here: {made.stderr}"


pytestmark = [pytest.mark.full, pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip() or "possible")]


@pytest.fixture
def two_nodes(tmp_path):
    """A function: (fault, rank, flags) -> what tests/programs/two_nodes.py has written."""
    project = tmp_path / "project"
    shutil.copytree(ROOT, project, ignore=shutil.ignore_patterns(".git", ".venv", "outputs", "tests", "docs"))
    text, line = (project / "sft.py").read_text(), '        ranks.set_phase(f"step {step}")\n'
    assert text.count(line) == 1
    (project / "sft.py").write_text(text.replace(line, line + PLANTED))
    launcher, limit = project / "ranks" / "launch.py", "int(port), timeout)"
    assert launcher.read_text().count(limit) == 1  # the nodes wait for each other as long as a slow machine needs
    launcher.write_text(launcher.read_text().replace(limit, "int(port), 100)"))

    def run(fault, rank, *flags, base=FLAGS):
        command = ["unshare", "-Urn", sys.executable, os.path.join(TESTS, "programs", "two_nodes.py"), fault, rank,
                   project, *base, *flags]
        subprocess.run(list(map(str, command)), cwd=tmp_path, check=True, timeout=400)
        result = json.loads((tmp_path / "result.json").read_text())
        print(f"{fault:8} on rank {rank}: exit codes {result['codes']}, ended after {result['seconds']} s")
        print(*result["screens"], sep="\n" + 100 * "-" + "\n")
        return result

    return run



@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("fault", ["raise", "memory", "shape", "kill", "node", "torchrun", "stop", "link"])
def test_a_fault_on_one_node_ends_both(fault, rank, two_nodes):
    """In time, with a non-zero exit code, in at most 30 lines, and the rank or node is named on both."""
    result = two_nodes(fault, rank, "--epochs", 10000)
    limit = 15 + (TIMEOUT if fault in ("stop", "link") else 0)
    node, codes, seconds, screens = rank // 2, result["codes"], result["seconds"], result["screens"]
    assert None not in codes and 0 not in codes
    assert max(seconds) < limit
    assert not result["left"], "ranks that train on"
    for i, screen in enumerate(screens):
        if i == node and fault in ("node", "torchrun"):  # nobody is there to say it
            continue
        assert len(screen.splitlines()) <= 30
        assert screen.count("Traceback") == (fault in ("raise", "shape") and i == node)
        if fault == "link" or (fault in ("node", "torchrun") and node == 0):
            # the node that is not node 0 has no store any more; node 0 hears nothing from the other one
            assert "node 0 is gone" in screen if i == 1 else "(node 1, " in screen and "did not respond" in screen
        elif fault == "memory" and i == node:
            assert screen.count(f"out of memory: rank {rank} has used up") == 1
        elif fault in ("node", "torchrun"):
            assert f"(node {node}, " in screen and "did not respond in step" in screen
        else:
            assert f"rank {rank} (node {node}, " in screen and "in step" in screen
            assert fault not in BY_ITSELF or BY_ITSELF[fault] in screen


@pytest.mark.parametrize("rank", [1, 2])
def test_a_signal_to_one_node_ends_both_with_the_same_code(rank, two_nodes, tmp_path):
    """And a checkpoint is saved."""
    result = two_nodes("term", rank, "--epochs", 10000)
    assert result["codes"] == [143, 143]
    assert (tmp_path / "out" / "checkpoints" / "latest").exists()
    assert not any("error" in screen or "Traceback" in screen for screen in result["screens"])


def test_a_node_that_is_started_again_continues_the_run(two_nodes, tmp_path):
    """torchrun as docs/cluster.md says; that of node 1 is killed. All steps are there, each once."""
    flags = [flag for flag in FLAGS if flag not in ("--n_gpus", 2)]
    assert len(flags) == len(FLAGS) - 2
    result = two_nodes("again", 2, "--max_steps", 20, "--save_steps", 2, "--resume_from", "auto", base=flags)
    assert result["codes"] == [0, 0]
    assert [line["step"] for line in metrics(tmp_path / "out") if "lr" in line] == list(range(1, 21))
    assert len(re.findall(r"^resume +step [246] of ", (tmp_path / "out_0").read_text() + (tmp_path / "out_1").read_text(),
                          re.M)) == 1


def test_a_run_that_was_suspended_continues(two_nodes):
    """Longer than --timeout. Only the time for which a process ran counts."""
    result = two_nodes("pause", 0, "--max_steps", 30)
    assert result["codes"] == [0, 0]
