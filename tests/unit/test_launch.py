"""Starting: train.sh, ranks/launch.py, and every program where only the .venv of train.sh has torch."""

import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from helpers import ROOT, TESTS, first, torchrun

import sft
from ranks import packages
from ranks.launch import EXIT_CODES, children
from settings import errors, venv
from settings.errors import UserError

TOOLS = sorted(pathlib.Path(ROOT, "tools").glob("*.py"))
PROGRAMS = ["sft.py", "chat.py", *(f"tools/{path.name}" for path in TOOLS if "__main__" in path.read_text())]
# Packages that users install beside this project. A module here with such a name would hide the package, or be
# hidden by it.
PACKAGES = {"verl", "trl", "peft", "datasets", "transformers", "evaluate", "kernels", "accelerate", "torch",
            "numpy", "wandb", "trackio", "tensorboard", "pyarrow", "jinja2", "yaml", "tokenizers"}


def train_sh(*arguments, cwd, **env):
    """The completed process of ./train.sh with these arguments, in another directory."""
    return subprocess.run([os.path.join(ROOT, "train.sh"), *arguments], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, "PYTHON": sys.executable, **env})


@pytest.mark.parametrize("arguments, line", first(1, [
    (["--strategy", "megatron", "--tp", "2"], "--tp 2 does not divide the 3 processes; use one of 1, 3 "
     "(1 with --strategy fsdp)"),
    (["--batchsize", "4"], "unknown setting 'batchsize'; the nearest is 'batch_size'; --help lists them all")]),
    ids=str)
def test_a_wrong_setting_of_several_ranks_is_one_line(arguments, line, tmp_path):
    """It is found before torchrun starts."""
    done = train_sh("--n_gpus", "3", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"sft.py: error: {line}\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("program, arguments, line", first(1, [
    ("sft.py", ["--lr", "x"], "flag --lr: lr can't be 'x'; it must be a number"),
    ("sft.py", ["--model", "nowhere"], "--model nowhere: no such directory"),
    ("sft.py", ["--model", "tiny", "--train_data", "nowhere"], "--train_data nowhere: no such data file"),
    ("tools/evaluate.py", ["nowhere"], "nowhere: no FILE follows")]))
def test_torchrun_prints_an_error_of_all_ranks_once(program, arguments, line, tmp_path):
    """The other ranks wait for torchrun to end them."""
    done = torchrun(3, os.path.join(ROOT, program), *arguments, cwd=tmp_path)
    lines = re.findall(r"^\S+\.py: error: (.*)", done.stderr, re.M)
    assert done.returncode == 1 and len(lines) == 1 and lines[0].startswith(line), done.stderr


@pytest.mark.parametrize("env, pending, waits, is_printed", [
    ({"LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "a"}, set(), True, True),  # torchrun does not end it: it is alone
    ({"LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "a"}, {signal.SIGTERM}, False, False),  # a rank of train.sh
    ({"LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "a"}, set(), False, True), ({"LOCAL_RANK": "1"}, set(), False, True)])
def test_a_rank_prints_an_error_at_once_later_or_not(env, pending, waits, is_printed, monkeypatch, capsys):
    """A later rank of torchrun leaves it to the first one of its node."""
    clock = iter(range(100))
    monkeypatch.setattr(errors, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda seconds: None))
    monkeypatch.setattr(errors.signal, "sigpending", lambda: pending)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="2"):
        errors.report(lambda: sft.Config(lr=-1))
    line = ": error: --lr -1.0: it must be at least 0\n"
    assert capsys.readouterr().err.endswith(line) if is_printed else not capsys.readouterr().err
    assert (next(clock) > 5) == waits


@pytest.mark.parametrize("arguments, line", [
    (["--n_gpus", "two"], "--n_gpus two: it must be an integer of at least 1"),
    (["--n_gpus=0"], "--n_gpus 0: it must be an integer of at least 1"),
    (["--n_gpus"], "--n_gpus needs a number"),
    (["--setup"], "--setup needs a requirements file, such as requirements.txt"),
    (["--setup", "nothing.txt"], "--setup needs a requirements file, such as requirements.txt")], ids=str)
def test_train_sh_names_what_is_wrong_with_its_own_flags(arguments, line, tmp_path):
    done = train_sh(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"train.sh: error: {line}\n")


@pytest.mark.parametrize("env, line", [
    ({"NODE_RANK": "7"}, "NODE_RANK 7: it must be an integer from 0 to 1"),
    ({"NODE_RANK": "x"}, "NODE_RANK x: it must be an integer from 0 to 1"),
    ({"MASTER_PORT": "abc"}, "MASTER_PORT abc: it must be an integer from 1 to 65535")], ids=str)
def test_nodes_and_ports_are_numbers(env, line, tmp_path):
    done = train_sh("--model", "tiny", cwd=tmp_path, NNODES="2", **env)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"train.sh: error: {line}\n")


@pytest.mark.repo
def test_train_sh_is_short():
    with open(os.path.join(ROOT, "train.sh"), encoding="utf-8") as f:
        lines = f.readlines()
    assert len(lines) <= 60
    assert {"N_GPUS", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"} <= set("".join(lines).split())


def test_train_sh_runs_nothing_from_the_current_directory(tmp_path):
    """Through a symbolic link, with CDPATH set, and where files have the names of modules that it imports."""
    for name in ("csv", "re", "torch", "os", "importlib", "venv", "pip", "signal", "socket"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a module was imported from the current directory')")
    os.makedirs(tmp_path / "bin")
    (tmp_path / "bin" / "train").symlink_to(os.path.relpath(os.path.join(ROOT, "train.sh"), tmp_path / "bin"))
    done = subprocess.run(["bin/train", "--n_gpus", "two"], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHON": sys.executable, "CDPATH": str(tmp_path)})
    assert done.stderr == "train.sh: error: --n_gpus two: it must be an integer of at least 1\n"
    assert done.returncode == 2 and sorted(path.name for path in (tmp_path / "bin").iterdir()) == ["train"]


PIP = """import json, sys
print("torch 0.0 is installed", file=sys.stderr)
json.dump([sys.argv[1:], sys.stdin.read()], open("LOG", "w"))"""


@pytest.fixture
def venv_with(tmp_path):
    """A function: {package: version} -> the requirements that train.sh --setup gives to pip; None if it doesn't call it.

    The project's .venv says that it has these packages, and its pip only notes how it is called.
    """
    os.makedirs(tmp_path / "ranks")
    for name in ("train.sh", "ranks/packages.py", "requirements.txt"):
        shutil.copy(os.path.join(ROOT, name), tmp_path / name)
    (tmp_path / "more.txt").write_text("-r requirements.txt\nsomething>=1.5\n")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / ".venv"], check=True)
    (packages,) = (tmp_path / ".venv" / "lib").glob("*/site-packages")
    (packages / "pip.py").write_text(PIP.replace("LOG", str(tmp_path / "log")))

    def setup(versions, file="requirements.txt"):
        for name, version in versions.items():
            os.makedirs(packages / f"{name}-{version}.dist-info")
            (packages / f"{name}-{version}.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
        done = subprocess.run([tmp_path / "train.sh", "--setup", file], capture_output=True, text=True,
                              env={"PATH": f"{tmp_path / '.venv' / 'bin'}:/usr/bin:/bin"})
        assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / ".venv" / "bin" / "python"), done.stderr
        if not (tmp_path / "log").exists():
            assert done.stderr == ""
            return None
        arguments, requirements = json.loads((tmp_path / "log").read_text())
        assert arguments[:1] + arguments[-2:] == ["install", "-r", "/dev/stdin"]
        return [re.match(r"[\w-]+", line)[0] for line in requirements.split()]

    return setup


OTHERS = {"safetensors": "9.0", "tokenizers": "9.0", "huggingface_hub": "9.0", "numpy": "9.0"}


@pytest.mark.parametrize("versions, file, installs", [
    ({"torch": "2.13.0+cpu", **OTHERS}, "requirements.txt", None),
    ({"torch": "2.99.0.dev20280101+cu150", **OTHERS}, "requirements.txt", None),
    ({"torch": "3.0.0", **OTHERS}, "more.txt", ["something"]),
    ({"torch": "2.99.0", **OTHERS, "numpy": "1.26", "something": "1.5"}, "more.txt", ["numpy"]),
    ({"torch": "2.10.0", **OTHERS}, "requirements.txt", ["torch"]),
    ({"numpy": "2.0"}, "requirements.txt", ["torch", "safetensors", "tokenizers", "huggingface_hub"])], ids=str)
def test_a_newer_torch_stays(venv_with, versions, file, installs):
    """What is missing or too old is installed, and nothing else: pip would take a torch of the tested range."""
    assert venv_with(versions, file) == installs


def test_a_torch_outside_the_tested_range(monkeypatch, capsys):
    """Newer: one line, on rank 0. Older: the program continues in .venv, or says what is needed; train() raises."""
    (low, below), = re.findall(r"^torch>=([\d.]+),<([\d.]+)$", pathlib.Path(ROOT, "requirements.txt").read_text(), re.M)
    major, minor = low.split(".")
    monkeypatch.setattr(sys, "argv", ["/x/sft.py"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(venv, "PYTHON", "/nowhere/bin/python")
    for version, old, printed in ((f"{low}.0", False, ""), (f"{below}.0+cpu", False, "sft.py: warning: torch {} is newer "
                                  "than what is tested ({})\n"), (f"{major}.{int(minor) - 1}.1", True, "")):
        text = printed.format(version, f"torch>={low},<{below}")
        monkeypatch.setattr(packages, "installed", lambda name: version)
        monkeypatch.delenv("RANK", raising=False)
        if old:
            with pytest.raises(SystemExit):
                venv.enter()
            assert re.fullmatch(rf"sft.py: error: \S+ has torch {version}, and the trainer needs torch>={low},<{below}; bash "
                                r"\S*train.sh --setup requirements.txt makes a .venv that has it\n", capsys.readouterr().err)
            with pytest.raises(UserError, match=f"has torch {version}, and the trainer needs torch>={low}"):
                sft.train(sft.Config(model="tiny"))
            continue
        venv.enter()
        assert capsys.readouterr().err == text
        monkeypatch.setenv("RANK", "1")
        venv.enter()
        assert capsys.readouterr().err == ""


@pytest.mark.full
def test_train_sh_installs_with_nothing_from_the_current_directory(tmp_path):
    """A requirement that no index has: venv and pip run as far as that, isolated (Python 3.10 has no -P)."""
    project = tmp_path / "project"
    os.makedirs(project / "ranks")
    for name in ("train.sh", "ranks/packages.py"):
        shutil.copy(os.path.join(ROOT, name), project / name)
    (project / "requirements.txt").write_text("no-such-package-of-anyone>=1.0\n")
    for name in ("venv", "pip", "re", "ensurepip"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a module was imported from the current directory')")
    done = subprocess.run([project / "train.sh", "--setup", "requirements.txt"], cwd=tmp_path, capture_output=True,
                          text=True, env={**os.environ, "PYTHON": sys.executable, "PIP_NO_INDEX": "1"})
    assert "current directory" not in done.stderr and "No matching distribution" in done.stderr
    assert (project / ".venv" / "bin" / "python").exists() and not (tmp_path / ".venv").exists()


# ----------------------------------------------------------------------------------------------------
# ranks/launch.py, with planted_sft.py instead of sft.py


@pytest.fixture
def launch(tmp_path):
    """A function: arguments, environment -> a process of ranks/launch.py with them, in tmp_path."""
    os.makedirs(tmp_path / "project" / "ranks")
    os.makedirs(tmp_path / "project" / "settings")
    for name in ("ranks/launch.py", "ranks/cluster.py", "ranks/meeting.py", "settings/errors.py"):
        shutil.copy(os.path.join(ROOT, name), tmp_path / "project" / name)
    shutil.copy(os.path.join(TESTS, "programs", "planted_sft.py"), tmp_path / "project" / "sft.py")
    (tmp_path / "torch.py").write_text("raise SystemExit('a module was imported from the current directory')")

    def start(*arguments, **env):
        others = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        command = [sys.executable, tmp_path / "project" / "ranks" / "launch.py", *arguments]
        env = {**others, "LOG": str(tmp_path / "log"), **env}
        return subprocess.Popen(command, cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE)

    return start


def read_log(tmp_path):
    """(lines that were logged before torchrun started, lines of the workers)"""
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    workers = [line for line in lines if "RANK" in line["env"]]
    return [line for line in lines if line not in workers], workers


def test_one_process_is_sft_py_itself(launch, tmp_path):
    """It becomes sft.py in the same process, with every argument but --n_gpus."""
    process = launch("--lr", "1", "--n_gpus=1", "model=x", N_GPUS="4", NNODES="")
    assert process.wait() == 0
    (line,), workers = read_log(tmp_path)
    assert line["arguments"] == ["--environment", "--lr", "1", "model=x"]
    assert line["pid"] == process.pid and workers == []
    assert "WORLD_SIZE" not in line["env"]


@pytest.mark.parametrize("word", ["--help", "-h", "--explain"])
def test_flags_that_only_print_start_no_ranks(word, launch, tmp_path):
    assert launch("--n_gpus", "2", word).wait() == 0
    (line,), workers = read_log(tmp_path)
    assert line["arguments"] == ["--environment", word] and line["env"]["WORLD_SIZE"] == "2" and workers == []


def test_two_runs_at_the_same_time(launch, tmp_path):
    """Each checks its settings once, with the final world size, and has its own port. Workers block signals
    at first and have Python's usual path."""
    runs = [launch("--n_gpus", "2", "--lr", "1", PLANT="meet 4") for _ in range(2)]
    for run in runs:
        assert run.wait(timeout=60) == 0, run.stderr.read()
    checks, workers = read_log(tmp_path)
    assert [line["arguments"] for line in checks] == 2 * [["--explain", "--environment", "--lr", "1"]]
    for line in checks:
        assert line["env"] == {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1"}
    assert sorted(line["env"]["RANK"] for line in workers) == ["0", "0", "1", "1"]
    for line in workers:
        assert line["arguments"] == ["--environment", "--lr", "1"] and line["is_deaf"] and not line["safe_path"]
        assert line["env"]["OMP_NUM_THREADS"] == "1" and line["env"]["MASTER_ADDR"] == "127.0.0.1"
    assert len({line["env"]["MASTER_PORT"] for line in workers}) == 2


def test_two_nodes_use_the_given_port(launch, tmp_path):
    port = free_port()
    nodes = [launch(PLANT="meet 2", NNODES="2", NODE_RANK=rank, MASTER_PORT=port) for rank in "10"]
    for node in nodes:
        assert node.wait(timeout=60) == 0, node.stderr.read()
    checks, workers = read_log(tmp_path)
    assert len(checks) == 2 and sorted(line["env"]["RANK"] for line in workers) == ["0", "1"]
    for line in workers:
        assert (line["env"]["WORLD_SIZE"], line["env"]["MASTER_PORT"]) == ("2", port)


@pytest.mark.parametrize("code", [pytest.param(1, marks=pytest.mark.full), 2])
def test_the_exit_code_of_a_failed_worker(code, launch):
    """It is that of the launcher, without torchrun's report: the worker has said why."""
    process = launch("--n_gpus", "2", PLANT=f"exit {code}")
    err = process.communicate(timeout=60)[1]
    assert process.returncode == code and err == ""


def test_a_worker_that_was_killed_is_named(launch):
    """It could not say so itself."""
    process = launch("--n_gpus", "2", PLANT="kill")
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert err == "train.sh: error: rank 1 was ended by SIGKILL; if it was the kernel, memory ran out: see dmesg\n"


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def test_a_node_that_waits_says_so_and_ends_at_the_first_signal(launch):
    """Node 0 with each signal of EXIT_CODES, node 1 with one. Nothing was trained, so the code is never 0."""
    runs = [(number, launch(NNODES="2", NODE_RANK=rank, MASTER_PORT=free_port()))
            for number, rank in [*((number, "0") for number in EXIT_CODES), (signal.SIGTERM, "1")]]
    for number, run in runs:
        assert re.match(r"train.sh: waiting for node [01] of 2 at 127.0.0.1:\d+", run.stderr.readline())
        run.send_signal(number)
    for number, run in runs:
        out, err = run.communicate(timeout=20)
        assert run.returncode == 128 + number
        assert err == f"\n{signal.Signals(number).name}: stopped before training began; nothing new to save\n"


def test_nohup_keeps_a_waiting_node_alive(launch):
    """SIGHUP is ignored if it was on entry, as nohup does; the next SIGTERM ends the node."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run = launch(NNODES="2", MASTER_PORT=free_port())
    finally:
        signal.signal(signal.SIGHUP, before)
    run.stderr.readline()
    run.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    run.send_signal(signal.SIGTERM)
    assert run.communicate(timeout=20) and run.returncode == 143


@pytest.mark.parametrize("nodes, line", [
    ([("2", "0"), ("2", "0")], r"two nodes have NODE_RANK 0 \(.*\); give each node a number of its own, from 0 to 1"),
    ([("3", "0"), ("2", "1")], r"node 1 \(.*\) has NNODES 2, and node 0 \(.*\) has 3; set the same on all nodes"),
    ([("3", "0"), ("3", "1"), ("3", "1")], r"two nodes have NODE_RANK 1 \(.*")], ids=str)
def test_nodes_that_do_not_fit_together_are_refused_at_once(nodes, line, launch):
    port = free_port()
    runs = [launch(NNODES=n, NODE_RANK=rank, MASTER_PORT=port) for n, rank in nodes]
    for run in runs:
        err = run.communicate(timeout=20)[1]
        assert run.returncode == 2 and re.search(rf"^train.sh: error: {line}$", err, re.M), err


def test_a_wait_ends_after_timeout_and_names_the_likely_mistake(launch):
    runs = [launch(NNODES="2", NODE_RANK="1", MASTER_ADDR="no.such.host.invalid", TIMEOUT="2"),
            launch(NNODES="3", NODE_RANK="0", MASTER_PORT=free_port(), TIMEOUT="2")]
    expected = ["waiting for node 0 of 2 at no.such.host.invalid:29500: the name does not resolve",
                "waiting for nodes 1, 2 of 3 at 127.0.0.1:"]
    for run, line in zip(runs, expected, strict=True):
        err = run.communicate(timeout=60)[1]
        assert run.returncode == 2 and f"train.sh: error: gave up after --timeout 2 s: {line}" in err
        assert f"train.sh: {line}" in err


def test_a_taken_port_is_one_line(launch):
    """On one node, as node 0; and node 1 says what it found there."""
    with socket.create_server(("", 0)) as other:
        port = str(other.getsockname()[1])
        one, node_0 = launch("--n_gpus", "2", MASTER_PORT=port), launch(NNODES="2", NODE_RANK="0", MASTER_PORT=port)
        node_1 = launch(NNODES="2", NODE_RANK="1", MASTER_PORT=port)
        lines = {one: f"MASTER_PORT {port}: Address already in use; unset it: train.sh then takes a free port",
                 node_0: f"MASTER_PORT {port} is in use on this node, by another run or program; set another port, "
                         "the same on all nodes"}
        for run, line in lines.items():
            assert run.communicate(timeout=20)[1] == f"train.sh: error: {line}\n" and run.returncode == 2
        assert "what listens there is not a train.sh that waits" in node_1.stderr.readline()
        node_1.terminate()
        assert node_1.wait(timeout=20) == 143


def await_workers(tmp_path):
    """Wait until two workers have logged how they were started."""
    limit = time.monotonic() + 60
    while not (tmp_path / "log").exists() or len(read_log(tmp_path)[1]) < 2:
        assert time.monotonic() < limit
        time.sleep(0.1)


def test_a_signal_reaches_each_worker_and_their_code_is_the_launchers(launch, tmp_path):
    """A signal on any node ends all of them, and each launcher learns of it from its ranks."""
    run = launch("--n_gpus", "2", PLANT="code 129")
    await_workers(tmp_path)
    run.terminate()
    assert run.wait(timeout=60) == 129, run.stderr.read()


@pytest.mark.full
def test_a_worker_that_still_starts_some_time_after_a_signal_is_killed(launch, tmp_path):
    """It may wait for a node that is gone, in a call that no signal ends."""
    path = tmp_path / "project" / "ranks" / "launch.py"
    text = path.read_text()
    assert text.count("\nSTARTING = 30 ") == 1
    path.write_text(text.replace("\nSTARTING = 30 ", "\nSTARTING = 2 "))
    run = launch("--n_gpus", "2", PLANT="hang")
    await_workers(tmp_path)
    run.terminate()
    err = run.communicate(timeout=30)[1]  # the workers, which sleep for a minute, share this pipe
    assert (run.returncode, err) == (143, "")


def test_a_second_ctrl_c_kills_all(launch, tmp_path):
    process = launch("--n_gpus", "2", PLANT="hang")
    await_workers(tmp_path)
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1.5)  # they block the signal
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=10)[1]  # the workers share this pipe, so it closes with the last of them
    assert process.returncode == 130
    assert err == "\nstopped without saving; steps that no checkpoint has are lost\n"


def test_torchrun_ends_with_a_launcher_that_is_killed(launch, tmp_path):
    """By SIGKILL, which it can't pass on. The ranks end with torchrun, see test_failures.py; here they are planted."""
    process = launch("--n_gpus", "2", PLANT="hang")
    await_workers(tmp_path)
    (torchrun,) = children(process.pid)
    workers = children(torchrun)
    process.kill()
    process.wait()
    try:
        limit = time.monotonic() + 10
        while os.path.exists(f"/proc/{torchrun}") and time.monotonic() < limit:
            time.sleep(0.05)
        assert not os.path.exists(f"/proc/{torchrun}")
    finally:
        for pid in workers:
            os.kill(pid, signal.SIGKILL)


# ----------------------------------------------------------------------------------------------------
# a machine whose Python has no torch, where train.sh has made .venv


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """(a copy of the project without .venv, an environment in which `python` has no packages)"""
    directory = tmp_path_factory.mktemp("machine")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory / "bare"], check=True)
    names = shutil.ignore_patterns(".*", "tests", "docs", "outputs", "__pycache__")
    shutil.copytree(ROOT, directory / "project", ignore=names)
    trap = directory / "project" / "tools" / "numpy.py"
    trap.write_text("raise SystemExit('a module was imported from tools/')")
    env = {"PATH": f"{directory / 'bare' / 'bin'}:/usr/bin:/bin", "HOME": os.environ["HOME"],
           "OMP_NUM_THREADS": "1"}
    return directory / "project", env


@pytest.fixture
def dot_venv(bare):
    """A function that links the project's .venv to a directory, until the test ends."""
    link = bare[0] / ".venv"
    yield link.symlink_to
    link.unlink()


@pytest.mark.parametrize("safe_path", ["", "1"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_without_torch_continues_in_the_venv(program, safe_path, bare, dot_venv, tmp_path):
    """In any directory, with every argument, and with python -P, which does not add the program's directory to
    the path."""
    os.makedirs(tmp_path / "bin")
    (tmp_path / "bin" / "python").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    dot_venv(tmp_path)
    arguments = ["-u", str(bare[0] / program), "some", "--arguments"]
    env = {**bare[1], "PYTHONSAFEPATH": safe_path}
    done = subprocess.run(["python", *arguments], cwd=tmp_path, env=env, text=True, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, " ".join(arguments) + "\n", "")


@pytest.mark.parametrize("program, arguments, printed", first(1, [
    ("tools/show.py", ["show", "-n", "1"], "data/example_sft.json[0]: "),
    ("sft.py", ["--help"], "Supervised fine-tuning: "), ("chat.py", ["--help"], "Talk to a model: ")]))
def test_a_command_of_the_readme_runs_where_only_the_venv_has_torch(program, arguments, printed, bare, dot_venv,
                                                                    tmp_path):
    """In a directory without the example data, and with a file in tools/ that has the name of a package."""
    dot_venv(sys.prefix)
    done = subprocess.run(["python", bare[0] / program, *arguments], cwd=tmp_path, env=bare[1], text=True,
                          capture_output=True)
    assert done.returncode == 0 and printed in done.stdout, done.stderr


def test_without_any_torch_a_program_says_how_to_get_it(bare, tmp_path):
    done = subprocess.run(["python", bare[0] / "chat.py"], cwd=tmp_path, env=bare[1], text=True,
                          capture_output=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    found = re.match(r"chat.py: error: \S+ has no torch; bash (\S+) --setup requirements.txt", done.stderr)
    assert os.path.samefile(found[1], bare[0] / "train.sh")


def test_a_printed_command_works_in_the_current_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable) + ":/usr/bin:/bin")
    monkeypatch.chdir(ROOT)
    assert venv.command("tools/show.py") == "python tools/show.py"
    monkeypatch.chdir(tmp_path)
    assert venv.command("chat.py") == f"python {ROOT}/chat.py"
    monkeypatch.setattr(venv, "PROJECT", str(tmp_path / "a b"))
    assert venv.command("chat.py") == f"python '{tmp_path}/a b/chat.py'"
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert venv.command("chat.py").startswith(f"{sys.executable} ")


def test_no_module_has_the_name_of_a_package():
    """Otherwise `python -m verl.trainer...` in this directory would start a module of this project, and
    `import evaluate` in a tool would import one."""
    entries = [entry for entry in os.scandir(ROOT) if entry.name[0] not in "._"]
    names = {entry.name.removesuffix(".py") for entry in entries
             if entry.is_dir() or entry.name.endswith(".py")}
    installed = PACKAGES | set(importlib.metadata.packages_distributions()) | sys.stdlib_module_names
    assert {"sft", "settings", "tools"} <= names and names & installed == set()
