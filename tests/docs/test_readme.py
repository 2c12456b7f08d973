"""Every command of the READMEs runs, in their order, in a copy of the project; both READMEs have the same ones.

The commands are taken as they stand. What a machine without a hub, GPUs or a second node needs is around them: the hub's
model is a directory of that name, my.json is there, MAX_STEPS is in the environment, srun is a stand-in.
"""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT

READMES = [os.path.join(ROOT, name) for name in ("README.md", "README.zh-CN.md")]
SMALLER = {"10.0.0.1": "127.0.0.1", "--n_gpus 8": "--n_gpus 1", "N_GPUS=8": "N_GPUS=1", "--n_gpus 4": "--n_gpus 2",
           "--nproc_per_node 4": "--nproc_per_node 2", "/shared/": "shared/",
           "--vs trl": "--vs transformers --rows 8 --repeats 1"}  # TRL is not installed for the tests
STARTS = re.compile(r"(\./train\.sh|python|torchrun|bash|[A-Z_]+=\S+ )")


def blocks(path):
    """The fenced blocks that hold commands, each a list of lines, without what stands behind a # in a line."""
    with open(path, encoding="utf-8") as f:
        found = re.findall(r"^```\n(.*?)^```", f.read(), re.S | re.M)
    found = [[re.sub(r"\s+# .*|\s+#.*(?<=.)$", "", line) if not line.startswith("#") else line
              for line in block.splitlines()] for block in found]
    return [block for block in found if STARTS.match(block[0]) or block[0].startswith("#!")]


def inline(path):
    """Commands inside sentences: `python ...`."""
    with open(path, encoding="utf-8") as f:
        text = re.sub(r"^```\n.*?^```", "", f.read(), flags=re.S | re.M)
    return sorted({c for c in re.findall(r"`((?:python|torchrun|\./train\.sh|bash) [^`]+)`", text)})


@pytest.mark.repo
def test_both_readmes_have_the_same_commands_and_are_short():
    english, chinese = READMES
    assert blocks(english) == blocks(chinese) and inline(english) == inline(chinese)
    for path in READMES:
        with open(path, encoding="utf-8") as f:
            assert len(f.readlines()) < 250, path


@pytest.mark.repo
def test_what_the_readmes_link_to_is_there():
    for path in READMES:
        with open(path, encoding="utf-8") as f:
            links = re.findall(r"\]\(([^)#:]+)\)", f.read())
        assert links and [link for link in links if not os.path.exists(os.path.join(ROOT, link))] == []


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    directory = tmp_path_factory.mktemp("readme")
    for name in os.listdir(ROOT):
        path = os.path.join(ROOT, name)
        if name in ("data", "models", "configs") or os.path.exists(os.path.join(path, "__init__.py")):
            shutil.copytree(path, directory / name)
        elif os.path.isfile(path) and not name.startswith("."):
            shutil.copy(path, directory)
    shutil.copytree(directory / "models" / "tiny", directory / "Qwen" / "Qwen2.5-0.5B")
    for name in ("my.json", "val.json"):
        shutil.copy(directory / "data" / "example_sft.json", directory / name)
    stubs = directory / "stubs"
    stubs.mkdir()
    (stubs / "srun").write_text('#!/bin/bash\n[ "$1" = --kill-on-bad-exit=1 ] && shift\nSLURM_NODEID=0 exec "$@"\n')
    (stubs / "scontrol").write_text("#!/bin/bash\necho 127.0.0.1\n")
    for stub in stubs.iterdir():
        stub.chmod(0o755)
    return directory


def start(command, project, **env):
    python = os.path.dirname(sys.executable)
    env = {**os.environ, "PATH": f"{project / 'stubs'}:{python}:{os.environ['PATH']}", "PYTHON": sys.executable,
           "MAX_STEPS": "2", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "here", **env}
    return subprocess.Popen(["bash", "-ec", command], cwd=project, env=env, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


@pytest.mark.repo
@pytest.mark.full
def test_every_command_runs(project):
    """Blocks first, in order: later ones use what earlier ones made; then those inside sentences."""
    ran = 0
    commands = [["\n".join(block)] if block[0].startswith("#!") else block for block in blocks(READMES[0])]
    for block in [*commands, *([line] for line in inline(READMES[0]))]:
        together = [line for line in block if line.startswith("NNODES=")]
        for line in [together] if together else [[line] for line in block if STARTS.match(line) or line[:2] == "#!"]:
            if line == ["bash tests/run.sh"]:
                continue  # it is running
            processes = []
            for command in line:
                for long, short in SMALLER.items():
                    command = command.replace(long, short)
                if "sft.py" in command and "--selfcheck" not in command:
                    command += " --max_steps 2"
                if "bench.py --part loss" in command:
                    command += " --tokens 64 --vocab 1000 --repeats 1"
                command = command.replace("RUN1", "outputs").replace("RUN2", "outputs")
                processes.append((command, start(command, project, MASTER_PORT="29633")))
            screens = []
            for command, process in processes:
                screens.append(process.communicate(timeout=200)[0])
                assert process.returncode == 0, f"{command}\n{screens[-1]}"
                ran += 1
            assert not together or ["saved " in screen for screen in screens] == [True, False]  # two nodes, one result
    assert ran > 12
    assert json.loads((project / "merged" / "config.json").read_text())["model_type"] == "qwen2"
    assert (project / "comparison.html").exists() and (project / "shared" / "run" / "metrics.jsonl").exists()
