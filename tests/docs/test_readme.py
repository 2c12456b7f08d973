"""Every command of the READMEs runs, in their order, in a copy of the project; both READMEs have the same.

The commands are taken as they stand, on a machine where only .venv has the packages, as train.sh leaves it.
What a machine without a hub, GPUs or a second node needs is around them: the hub's model is a directory of
that name, my.json is there, MAX_STEPS is in the environment, srun is a stand-in.
"""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT

import sft

READMES = [os.path.join(ROOT, name) for name in ("README.md", "README.zh-CN.md")]
SMALLER = {"10.0.0.1": "127.0.0.1", "--n_gpus 8 --model tiny": "--n_gpus 1 --model tiny",
           "N_GPUS=8": "N_GPUS=1", "--n_gpus 4": "--n_gpus 2", "--nproc_per_node 4": "--nproc_per_node 2",
           "/shared/": "shared/",
           "--vs trl": "--vs transformers --rows 8 --repeats 1"}  # TRL is not installed for the tests
STARTS = re.compile(r"(\./train\.sh|python|torchrun|bash|[A-Z_]+=\S+ )")
ACTIVATE = "source .venv/bin/activate"  # what the READMEs say for torchrun
pytestmark = pytest.mark.repo  # a fork has READMEs of its own


def read(path):
    with open(path, encoding="utf-8") as f:
        return f.read()


def blocks(path):
    """The fenced blocks that hold commands, each a list of lines, without their comments."""
    found = re.findall(r"^```\n(.*?)^```", read(path), re.S | re.M)
    found = [[re.sub(r"\s+# .*|\s+#.*(?<=.)$", "", line) if not line.startswith("#") else line
              for line in block.splitlines()] for block in found]
    return [block for block in found if STARTS.match(block[0]) or block[0].startswith("#!")]


def inline(path):
    """Commands inside sentences: `python ...`."""
    text = re.sub(r"^```\n.*?^```", "", read(path), flags=re.S | re.M)
    return sorted({c for c in re.findall(r"`((?:python|torchrun|\./train\.sh|bash) [^`]+)`", text)})


def test_both_readmes_have_the_same_commands_and_are_short():
    english, chinese = READMES
    assert blocks(english) == blocks(chinese) and inline(english) == inline(chinese)
    for path in READMES:
        assert len(read(path).splitlines()) < 250, path


def test_what_the_readmes_link_to_is_there():
    for path in READMES:
        links = re.findall(r"\]\(([^)#:]+)\)", read(path))
        assert links and [link for link in links if not os.path.exists(os.path.join(ROOT, link))] == []


@pytest.mark.parametrize("path", READMES, ids=os.path.basename)
def test_the_table_of_settings_has_all_of_them(path):
    """Flags and variables, and no others."""
    row = re.compile(r"\| `--\w+`[^|]*\| (`[A-Z]|\|)")  # the second column has variables, or nothing
    rows = [line.split("|") for line in read(path).splitlines() if row.match(line)]
    flags = {flag for row in rows for flag in re.findall(r"`--(\w+)", "".join(row))}
    variables = {name for row in rows for name in re.findall(r"`([A-Z_]+)`", row[2])}
    fields = dataclasses.fields(sft.Config)
    assert flags == {field.name for field in fields} | {"n_gpus", "config"}
    assert variables == {field.metadata["env"] for field in fields} - {None} | {"N_GPUS", "CONFIG"}


@pytest.mark.parametrize("path", READMES, ids=os.path.basename)
def test_the_map_has_every_file_of_the_top_level_and_every_folder_of_code(path):
    first_column = re.findall(r"^\| .*?\|", read(path).split("\n## ")[-1], re.M)
    named = {link.rstrip("/") for cell in first_column for link in re.findall(r"\]\(([^)]+)\)", cell)}
    there = {entry.name for entry in os.scandir(ROOT) if entry.name.endswith(".py")
             or os.path.exists(os.path.join(entry.path, "__init__.py"))}
    assert named == there | {"train.sh", "configs"}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project without tests and documents, with a .venv that has this Python's packages; beside
    it a Python that has none."""
    machine = tmp_path_factory.mktemp("machine")
    directory, stubs = machine / "project", machine / "stubs"
    others = shutil.ignore_patterns(".*", "tests", "docs", "outputs", "__pycache__")
    shutil.copytree(ROOT, directory, ignore=others)
    for environment in (machine / "bare", directory / ".venv"):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    (packages,) = (directory / ".venv").glob("lib/python*/site-packages")
    found = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages / "packages.pth").write_text("".join(f"{path}\n" for path in found))
    torchrun = os.path.join(os.path.dirname(sys.executable), "torchrun")
    (directory / ".venv" / "bin" / "torchrun").symlink_to(torchrun)

    shutil.copytree(directory / "models" / "tiny", directory / "Qwen" / "Qwen2.5-0.5B")
    for name in ("my.json", "val.json"):
        shutil.copy(directory / "data" / "example_sft.json", directory / name)
    stubs.mkdir()
    (stubs / "srun").write_text("#!/bin/bash\n"
                                '[ "$1" = --kill-on-bad-exit=1 ] && shift\n'
                                'SLURM_NODEID=0 exec "$@"\n')
    (stubs / "scontrol").write_text("#!/bin/bash\necho 127.0.0.1\n")
    for stub in stubs.iterdir():
        stub.chmod(0o755)
    return directory


def start(command, project):
    machine, ours = project.parent, ("PYTHON", "VIRTUAL_ENV", "PYTHONPATH")
    env = {name: value for name, value in os.environ.items() if name not in ours}
    env |= {"PATH": f"{machine / 'stubs'}:{machine / 'bare' / 'bin'}:/usr/bin:/bin", "MAX_STEPS": "2",
            "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "here"}
    if command.startswith("NNODES="):
        env["MASTER_PORT"] = "29633"  # two nodes do not look for a free one
    if command.startswith("torchrun "):
        command = f"{ACTIVATE}\n{command}"
    return subprocess.Popen(["bash", "-ec", command], cwd=project, env=env, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def shortened(command):
    """A command that takes less time, and one node for two."""
    for long, short in SMALLER.items():
        command = command.replace(long, short)
    if "sft.py" in command and "--selfcheck" not in command:
        command += " --max_steps 2"
    if "bench.py --part loss" in command:
        command += " --tokens 64 --vocab 1000 --repeats 1"
    return command.replace("RUN1", "outputs").replace("RUN2", "outputs")


@pytest.mark.full
def test_every_command_runs(project):
    """Blocks first, in order: later ones use what earlier ones made; then those inside sentences."""
    assert all(ACTIVATE in read(path) for path in READMES)
    ran = 0
    groups = []  # commands that run at the same time
    for block in blocks(READMES[0]):
        if block[0].startswith("#!"):
            groups.append(["\n".join(block)])
        elif block[0].startswith("NNODES="):
            groups.append(block)
        else:
            groups += [[line] for line in block if STARTS.match(line)]
    groups += [[line] for line in inline(READMES[0]) if line != "bash tests/run.sh"]  # which is running
    for group in groups:
        processes = [(command, start(shortened(command), project)) for command in group]
        screens = []
        for command, process in processes:
            screens.append(process.communicate(timeout=200)[0])
            assert process.returncode == 0, f"{command}\n{screens[-1]}"
            ran += 1
        if len(group) > 1:  # two nodes, one result
            assert ["saved " in screen for screen in screens] == [True, False]
    assert ran > 12
    assert json.loads((project / "merged" / "config.json").read_text())["model_type"] == "qwen2"
    assert (project / "comparison.html").exists() and (project / "shared" / "run" / "metrics.jsonl").exists()
