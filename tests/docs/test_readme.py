"""The READMEs and pages of docs/: every command runs, every figure of a plan is printed, settings are true.

The commands run unchanged and in the order of the pages, in a copy of the project, on a machine where only
.venv has the packages, as train.sh leaves it. The tests replace what the machine lacks (hub, GPUs, second
node): the hub's model is a directory of that name, my.json exists, MAX_STEPS is in the environment, srun is a
stub.
"""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import make_scaling
import pytest
from helpers import ROOT

import sft
from tools import plan

READMES = [os.path.join(ROOT, name) for name in ("README.md", "README.zh-CN.md")]
# pages whose commands are executed, in blocks and in sentences
PAGES = [READMES[0],
         *(os.path.join(ROOT, "docs", name) for name in ("cluster.md", "data.md", "checkpoints.md"))]
SCALING = os.path.join(ROOT, "docs", "scaling.md")  # commands in sentences, and a table of plans
SMALLER = {"10.0.0.1": "127.0.0.1", "--n_gpus 8 --model tiny": "--n_gpus 1 --model tiny",
           "N_GPUS=8": "N_GPUS=1", "--n_gpus 4": "--n_gpus 2", "--nproc_per_node 4": "--nproc_per_node 2",
           "--nproc_per_node 8": "--nproc_per_node 2",
           "/shared/": "shared/", "checkpoints/step_40": "checkpoints/step_2",
           "--vs trl": "--vs transformers --rows 8 --repeats 1",  # TRL is not installed for the tests
           "-m timeit": "-m timeit -n 1 -r 1"}
STARTS = re.compile(r"(\./train\.sh|python|torchrun|bash|mkdir|[A-Z_]+=\S+ )")
# this suite, what is not in the copy, and 20 runs, two of which test_bench.py makes
NOT_RUN = {"bash tests/run.sh", "python tests/make_scaling.py", "python tools/bench.py --part plan"}
ACTIVATE = "source .venv/bin/activate"  # what the READMEs say for torchrun
FENCE = re.compile(r"^```\w*\n(.*?)^```", re.S | re.M)
pytestmark = pytest.mark.repo  # a fork has READMEs of its own


def read(path):
    with open(path, encoding="utf-8") as f:
        return f.read()


def blocks(path):
    """The fenced blocks that hold commands, each a list of lines, without their comments."""
    found = [[re.sub(r"\s+# .*|\s+#.*(?<=.)$", "", line) if not line.startswith("#") else line
              for line in block.splitlines()] for block in FENCE.findall(read(path))]
    return [block for block in found if STARTS.match(block[0]) or block[0].startswith("#!")]


def inline(path):
    """Commands inside sentences: `python ...`."""
    text = FENCE.sub("", read(path))
    return sorted({c for c in re.findall(r"`((?:python|torchrun|\./train\.sh|bash) [^`]+)`", text)})


def loaders(path):
    """Expressions inside sentences that load a checkpoint elsewhere: `Auto...from_pretrained(...)`."""
    return re.findall(r"`(Auto\w+\.from_pretrained\([^`]+\))`", read(path))


def test_both_readmes_have_the_same_commands_and_are_short():
    english, chinese = READMES
    assert blocks(english) == blocks(chinese)
    assert inline(english) == inline(chinese)
    assert loaders(english) == loaders(chinese) and len(loaders(english)) == 2
    for path in READMES:
        assert len(read(path).splitlines()) <= 180, path


def python_blocks(path):
    return re.findall(r"^```python\n(.*?)^```", read(path), re.S | re.M)


def test_the_lines_of_python_run(tmp_path, monkeypatch, capsys):
    """docs/python.md, whose block the READMEs may show too."""
    (block,) = python_blocks(os.path.join(ROOT, "docs", "python.md"))
    assert len(list(filter(None, block.splitlines()))) <= 8
    assert all(shown == block for path in READMES for shown in python_blocks(path))
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    printed = capsys.readouterr().out
    first, last = re.search(r"^loss (\S+) -> (\S+), in outputs/python/checkpoints/step_20$", printed, re.M).groups()
    assert float(last) < float(first)
    assert "40 lines of metrics, the last step is in outputs/python/checkpoints/step_40\n" in printed


@pytest.mark.parametrize("path", READMES, ids=os.path.basename)
def test_the_first_block_has_two_commands_and_limits_come_before(path):
    """On the first screen: what it does not do, then exactly two commands."""
    assert len(blocks(path)[0]) == 2
    first_screen = read(path).partition("\n## ")[0]
    assert len(first_screen.splitlines()) < 20
    assert [word for word in ("FSDP2", "NCCL", "DPO", "`--max_length`") if word not in first_screen] == []


def test_both_readmes_have_the_same_structure():
    """As many sections, list items, rows and links, in the same order."""
    english, chinese = ([re.match(r"#+ |- |\| |```|!?\[|", line)[0] for line in read(path).splitlines()]
                        for path in READMES)
    kept = [[mark for mark in marks if mark.strip() and "[" not in mark] for marks in (english, chinese)]
    assert kept[0] == kept[1]
    each_other = {"README.md", "README.zh-CN.md"}
    links = [set(re.findall(r"\]\(([^)]+)\)", read(path))) - each_other for path in READMES]
    assert links[0] == links[1]


@pytest.mark.parametrize("path", [*READMES, *PAGES[1:], SCALING], ids=os.path.basename)
def test_the_links_of_a_page_exist(path):
    links = re.findall(r"\]\(([^)#:]+)\)", read(path))
    assert links or path not in READMES
    assert [link for link in links if not os.path.exists(os.path.join(os.path.dirname(path), link))] == []


def table_of_settings(path):
    """[(flags, variables, defaults), ...] of the rows of a README's table of settings."""
    row = re.compile(r"\| `--\w+`[^|]*\| (`[A-Z]|\|)")  # the second column has variables, or nothing
    rows = [line.split("|") for line in read(path).splitlines() if row.match(line)]
    return [(re.findall(r"`--(\w+)`", row[1]), re.findall(r"`([A-Z_]+)`", row[2]),
             [default.strip() for default in re.split("[,、]", row[3])]) for row in rows]


@pytest.mark.parametrize("path", READMES, ids=os.path.basename)
def test_the_table_of_settings_is_true(path):
    """About 30 flags, all of which exist, with the environment names and the defaults that they have."""
    fields = {field.name: field for field in dataclasses.fields(sft.Config)}
    variables_of = {name: field.metadata["env"] for name, field in fields.items()} | {"n_gpus": "N_GPUS"}
    defaults_of = {name: field.default for name, field in fields.items()} | {"n_gpus": 1}
    table = table_of_settings(path)
    named = {flag for flags, *_ in table for flag in flags}
    assert 24 <= len(named) <= 34 and {"chat_template", "bad_rows", "split_turns"} <= named
    for flags, variables, defaults in table:
        assert variables == [variables_of[flag] for flag in flags if variables_of[flag]]
        for flag, shown in zip(flags, defaults, strict=True):
            default = defaults_of[flag]
            if isinstance(default, float):
                assert float(shown) == default, flag
            else:
                assert shown in (str(default).lower() if isinstance(default, bool) else str(default),
                                 *(("none", "无") if default is None else ())), flag


@pytest.mark.parametrize("path", [*READMES, *PAGES[1:], SCALING], ids=os.path.basename)
def test_every_flag_in_a_sentence_exists(path):
    """`--name` alone in quotes is a setting of a run, or of the program that the page speaks of."""
    others = {"n_gpus", "config", "help", "explain", "base", "prompt", "temperature", "top_p", "system",
              "setup", "signals_to_handle", "master_port", "kill", "signal", "dtype",
              "requeue", "max", "rdzv_endpoint", "rdzv_conf", "local_addr",
              "full", "kills"}  # "max": torchrun's --max-restarts
    planning = {field.name for field in dataclasses.fields(plan.Config)}
    quoted = re.findall(r"`--(no-\w+|\w+)[^`]*`", FENCE.sub("", read(path)))
    named = {flag.removeprefix("no-") for flag in quoted}
    assert named - others - planning == set()


@pytest.mark.parametrize("path", READMES, ids=os.path.basename)
def test_the_map_has_every_file_of_the_top_level_and_every_folder_of_code(path):
    first_column = re.findall(r"^\| .*?\|", read(path).split("\n## ")[-1], re.M)
    named = {link.rstrip("/") for cell in first_column for link in re.findall(r"\]\(([^)]+)\)", cell)}
    there = {entry.name for entry in os.scandir(ROOT) if entry.name.endswith(".py")
             or os.path.exists(os.path.join(entry.path, "__init__.py"))}
    assert named == there | {"train.sh", "configs"}


def test_the_tables_of_plans_are_what_is_printed():
    """Each row of docs/scaling.md has the figures that tools/plan.py prints with the flags in it."""
    text = read(SCALING)
    assert len(list(make_scaling.rows(text))) >= 16
    assert make_scaling.rewritten(text) == text


@pytest.mark.full
def test_the_best_rows_of_the_tables_are_what_best_prints_first():
    text, wanted = read(SCALING), ("tp", "sp", "replicas", "micro_batch_size", "gradient_checkpointing")
    lines = text.splitlines()
    best = [flags for i, flags in make_scaling.rows(text) if "**best**" in lines[i]]
    assert len(best) == 3
    with make_scaling.models(text):
        for flags in best:
            n, length, batch = (re.search(rf"--{name} (\d+)", flags)[1] for name in ("ranks", "max_length", "batch_size"))
            model = re.search(r"--model \S+", flags)[0]
            first = make_scaling.printed(f"{model} --ranks {n} --max_length {length} --batch_size {batch} --best")
            first = re.search(r"^1 +(.*)", first, re.M)[1]
            pattern = rf"--({'|'.join(wanted)}) (\S+)"
            assert re.findall(pattern, first) == re.findall(pattern, flags.partition("--batch_size ")[2])


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
    for name in ("my.json", "val.json", "my_val.json", "chats.json"):
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
        env["MASTER_PORT"] = "29633"  # with two nodes, train.sh does not look for a free port
    if command.startswith("torchrun "):
        command = f"{ACTIVATE}\n{command}"
    if command.startswith("python chat.py") and "--prompt" not in command:
        command = f"echo Hello | {command}"  # what a user types there
    return subprocess.Popen(["bash", "-ec", command], cwd=project, env=env, stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def shortened(command):
    """A command that takes less time and needs no second node."""
    for long, short in SMALLER.items():
        command = command.replace(long, short)
    if "sft.py" in command and "--selfcheck" not in command:
        command += " --max_steps 2"
    if "bench.py --part loss" in command:
        command += " --tokens 64 --vocab 1000 --repeats 1"
    return command.replace("RUN1", "outputs").replace("RUN2", "outputs")


def commands_in_order():
    """Groups of commands that run at the same time. Blocks first, in the order of the pages: later ones use
    what earlier ones made; then those inside sentences, each once."""
    groups = []
    for block in [block for path in [*PAGES, SCALING] for block in blocks(path)]:
        if block[0].startswith("#!"):
            groups.append(["\n".join(block)])
        elif block[0].startswith("NNODES="):
            groups.append(block)
        else:
            groups += [[line] for line in block if STARTS.match(line)]
    sentences = dict.fromkeys(command for path in [*PAGES, SCALING] for command in inline(path))
    groups += [[line] for line in sentences if line not in NOT_RUN]
    return groups


@pytest.mark.full
def test_every_command_runs(project):
    """All commands of all pages succeed and print what the pages show, except times and steps. The checkpoints
    load in transformers and PEFT."""
    assert all(ACTIVATE in read(path) for path in READMES)
    screens = {}
    for group in commands_in_order():
        processes = [(command, start(shortened(command), project)) for command in group]
        for command, process in processes:
            screens[command] = process.communicate(timeout=200)[0]
            assert process.returncode == 0, f"{command}\n{screens[command]}"
        if len(group) > 1:  # two nodes, one result
            assert ["saved " in screens[command] for command in group] == [True, False]
    assert len(screens) > 25
    assert json.loads((project / "merged" / "config.json").read_text())["model_type"] == "qwen2"
    assert (project / "comparison.html").exists() and (project / "shared" / "run" / "metrics.jsonl").exists()

    def without_steps(line):
        """The environment sets MAX_STEPS."""
        return re.sub(r"\d+ = [\d.]+ epochs × |\d+, [\d.]+ epochs of |step_\d+", "", line)

    first = screens["./train.sh --model tiny"]
    ledger = next(screens[command] for command in screens if "outputs/ledger" in command)
    for path, screen in ((READMES[0], first), (READMES[1], first), (PAGES[2], ledger)):
        text = "\n".join(FENCE.findall(read(path)))
        shown = re.findall(r"^(?:model |rows |tokens |steps |saved ).*", text, re.M)
        printed = list(map(without_steps, screen.splitlines()))
        assert len(shown) in (2, 5)
        assert [line for line in shown if without_steps(line) not in printed] == []

    program = "from transformers import AutoModelForCausalLM\nfrom peft import AutoPeftModelForCausalLM\n"
    for call in loaders(READMES[0]):
        program += f"assert sum(p.numel() for p in {call}.parameters()) > 10**6\n"
    loaded = subprocess.run([sys.executable, "-c", program], cwd=project, capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr
