"""Clusters: what train.sh reads from their variables, and the manifests of docs/cluster.md."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time

import pytest
import yaml
from helpers import ROOT, metrics

from ranks import cluster, processes
from settings import errors

PAGE = os.path.join(ROOT, "docs", "cluster.md")
SRUN = {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_JOB_NODELIST": "gpu[003-004,9]", "SLURM_NNODES": "2"}


def place(rank, address, port=None, n_gpus=None, nodes="2"):
    found = {"NNODES": nodes, "NODE_RANK": rank, "MASTER_ADDR": address, "MASTER_PORT": port, "N_GPUS": n_gpus}
    return {name: value for name, value in found.items() if value is not None}


@pytest.mark.parametrize("env, expected", [
    ({"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_NPROC_PER_NODE": "4", "PET_MASTER_ADDR": "m",
      "PET_MASTER_PORT": "23456", "WORLD_SIZE": "8", "RANK": "1", "MASTER_ADDR": "m", "MASTER_PORT": "23456"},
     place("1", "m", "23456", "4")),
    ({"PET_NNODES": "2:2", "PET_RDZV_ENDPOINT": "m:29400", "JOB_COMPLETION_INDEX": "1"}, place("1", "m", "29400")),
    ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "m", "MASTER_PORT": "23456"}, place("1", "m", "23456")),
    ({"NNODES": "2", "JOB_COMPLETION_INDEX": "1", "MASTER_ADDR": "m"}, place("1", "m")),
    ({"SM_HOSTS": '["algo-2", "algo-1"]', "SM_CURRENT_HOST": "algo-2", "SM_NUM_GPUS": "8"},
     place("1", "algo-1", n_gpus="8")),
    ({"SM_HOSTS": '["algo-1"]', "SM_CURRENT_HOST": "algo-1", "SM_NUM_GPUS": "0"}, {"N_GPUS": "1"}),
    ({"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_NODES": "2"},
     place("1", "10.0.0.1")),
    ({**SRUN, "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_NODEID": "1"}, place("1", "gpu003", "24711")),
    ({**SRUN, "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_NODEID": "1", "NODE_RANK": "0", "MASTER_ADDR": "m"},
     place("0", "m", "24711")),  # what is set wins
    ({"SLURM_JOB_ID": "1", "SLURM_NNODES": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, {}),  # sbatch, no srun
    ({**SRUN, "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "NNODES": "1"}, {"NNODES": "1"}),
    ({"WORLD_SIZE": "2"}, {}), ({}, {}),
    ({"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "m"}, {"MASTER_ADDR": "m"})],
    ids=lambda value: " ".join(value) or "none")
def test_the_variables_of_a_cluster(env, expected):
    assert {name: value for name, value in cluster.read(env)[0].items() if value} == expected
    assert "N_GPUS" not in cluster.read(env, has_n_gpus=True)[0]


@pytest.mark.parametrize("env, words", [
    ({**SRUN, "SLURM_NTASKS": "2"}, "srun did not start this process"),
    ({**SRUN, "SLURM_NTASKS": "8", "SLURM_PROCID": "3"}, "srun started 8 tasks on 2 node(s)"),
    ({"SLURM_NNODES": "1", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, "--ntasks-per-node=1"),
    ({"PET_NNODES": "1:4"}, "set NNODES to one number"),
    ({"MASTER_ADDR": "m", "JOB_COMPLETION_INDEX": "1"}, "set NNODES to the number of pods"),
    ({"SM_HOSTS": '["a"]', "SM_CURRENT_HOST": "b"}, "SM_CURRENT_HOST=b")], ids=str)
def test_variables_that_do_not_say_how_to_run_are_refused(env, words):
    with pytest.raises(cluster.ClusterError, match=re.escape(words)):
        cluster.read(env)


@pytest.mark.parametrize("env, words", [
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set, and RANK and MASTER_ADDR and MASTER_PORT not; unset WORLD_SIZE"),
    ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "srun started 2 tasks"),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two: it must be an integer of at least 1; .* unset it"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0: it must be an integer of at least 1"), ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1: it"),
    ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 must be below WORLD_SIZE=2"), ({"RANK": "1"}, "below WORLD_SIZE=1"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "tcp://a:1"}, "MASTER_PORT=tcp://a:1: it must be an integer")],
    ids=str)
def test_sft_py_does_not_train_alone_where_several_were_meant(env, words, train, monkeypatch):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(errors.UserError, match=words):
        train("--max_steps", 1)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.full), 1])
def test_a_rank_that_meets_no_other_says_so(rank, monkeypatch):
    """All variables of a rank are set, and nobody else is there: left over, or another node failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(errors.UserError, match=f"rank {rank} of 2 has met no others at MASTER_ADDR=127.0.0.1 "
                                               f"MASTER_PORT={port} for --timeout 1 s; start all, or unset RANK"):
        processes.connect(rank, 2, 1)


def test_world_size_1_needs_no_master(train, monkeypatch):
    """An empty variable is none."""
    for name, text in {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "", "MASTER_PORT": ""}.items():
        monkeypatch.setenv(name, text)
    assert len(train("--max_steps", 1)) == 1


def test_the_interface_that_leads_to_the_other_nodes(monkeypatch):
    """lo has 127.0.0.1. A variable that is set stays; an address of no interface sets nothing."""
    env = {"NCCL_SOCKET_IFNAME": "ib0"}
    assert cluster.use_interface("127.0.0.1", env) == "GLOO_SOCKET_IFNAME=lo"
    assert env == {"NCCL_SOCKET_IFNAME": "ib0", "GLOO_SOCKET_IFNAME": "lo"}
    assert cluster.use_interface("192.0.2.7", {}) == ""


def test_the_address_of_a_host_whose_name_means_itself(monkeypatch):
    """Debian's /etc/hosts has 127.0.1.1 for the host's own name: then the default route decides."""
    routes = {"10.0.0.1": "10.0.0.2", "own-name": "127.0.1.1", "192.0.2.1": "10.0.0.7"}

    class Socket:
        def __init__(self, *_):
            self.name = None

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def connect(self, target):
            if target[0] not in routes:
                raise OSError("Network is unreachable")
            self.name = routes[target[0]]

        def getsockname(self):
            return self.name, 0

    monkeypatch.setattr(cluster.socket, "getaddrinfo", lambda host, port, type: [(2, type, 0, "", (host, port))])
    monkeypatch.setattr(cluster.socket, "socket", Socket)
    assert cluster.local_address("10.0.0.1", 1) == "10.0.0.2"
    assert cluster.local_address("own-name", 1) == "10.0.0.7"
    del routes["192.0.2.1"]  # a machine without a network
    assert cluster.local_address("own-name", 1) == "127.0.1.1" and cluster.local_address("gone", 1) == "127.0.0.1"


# ---- the manifests --------------------------------------------------------------------------------------------------


def manifests():
    """{first word: text} of the fenced blocks of docs/cluster.md."""
    with open(PAGE, encoding="utf-8") as f:
        found = re.findall(r"^```\w*\n(.*?)^```", f.read(), re.S | re.M)
    return {block.split()[0]: block for block in found}


def pytorch_job():
    job = yaml.safe_load(manifests()["apiVersion:"])
    return job, job["spec"]["pytorchReplicaSpecs"]


def test_the_pytorch_job_has_what_its_kind_requires():
    """The schema is published only inside a CRD, on the network; so these are its required fields and its enums."""
    job, replicas = pytorch_job()
    assert (job["apiVersion"], job["kind"], set(job)) == (
        "kubeflow.org/v1", "PyTorchJob", {"apiVersion", "kind", "metadata", "spec"})
    assert set(job["spec"]) <= {"elasticPolicy", "nprocPerNode", "pytorchReplicaSpecs", "runPolicy"}
    assert set(replicas) == {"Master", "Worker"} and replicas["Master"]["replicas"] == 1
    for replica in replicas.values():
        assert set(replica) == {"replicas", "restartPolicy", "template"}
        assert replica["restartPolicy"] in ("Always", "OnFailure", "Never", "ExitCode")
        (container,) = replica["template"]["spec"]["containers"]
        assert container["name"] == "pytorch"  # the operator sets its variables in the container of this name
        assert all(isinstance(word, str) for word in container["command"])
        mounts = {mount["name"] for mount in container["volumeMounts"]}
        assert mounts == {volume["name"] for volume in replica["template"]["spec"]["volumes"]}


def test_the_skypilot_task_has_known_fields():
    task = yaml.safe_load(manifests()["name:"])
    assert set(task) <= {"name", "num_nodes", "resources", "file_mounts", "workdir", "setup", "run", "envs"}
    assert task["num_nodes"] == 2 and re.fullmatch(r"\w+:8", task["resources"]["accelerators"])


def test_the_slurm_script_is_bash_and_its_options_are_slurms():
    script = manifests()["#!/bin/bash"]
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    options = re.findall(r"--([\w-]+)", "".join(re.findall(r"^#SBATCH.*", script, re.M)))
    assert options == ["nodes", "ntasks-per-node", "gpus-per-node", "requeue", "open-mode", "signal"]


def command_of(manifest):
    """The words of the manifest's ./train.sh, for one process per node and no shared directory."""
    if manifest == "slurm":
        line = re.search(r"\./train\.sh.*?(?= &)", manifests()["#!/bin/bash"])[0]
        words = shlex.split(line)
    elif manifest == "kubernetes":
        words = pytorch_job()[1]["Worker"]["template"]["spec"]["containers"][0]["command"]
    else:
        words = shlex.split(yaml.safe_load(manifests()["name:"])["run"])
    words = [word.replace("/shared/", "shared/") for word in words]
    words[words.index("--n_gpus") + 1] = "1"
    return [os.path.join(ROOT, "train.sh"), *words[1:], "--max_steps", "2"]


def variables_of(manifest, rank, port):
    """What the cluster sets on node `rank` of two, on this machine."""
    return {
        "slurm": {"SLURM_NNODES": "2", "SLURM_NTASKS": "2", "SLURM_NODEID": rank, "SLURM_PROCID": rank,
                  "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "x", "SLURM_JOB_NODELIST": "localhost", "MASTER_PORT": port},
        "kubernetes": {"PET_NNODES": "2", "PET_NODE_RANK": rank, "PET_NPROC_PER_NODE": "auto", "WORLD_SIZE": "2",
                       "RANK": rank, "MASTER_ADDR": "localhost", "MASTER_PORT": port},
        "skypilot": {"SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1", "SKYPILOT_NUM_NODES": "2",
                     "SKYPILOT_NODE_RANK": rank, "MASTER_PORT": port}}[manifest]


@pytest.mark.full
@pytest.mark.parametrize("manifest", ["slurm", "kubernetes", "skypilot"])
def test_the_command_of_a_manifest_trains_on_two_nodes(manifest, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    nodes = [subprocess.Popen(command_of(manifest), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              text=True, env={**os.environ, "PYTHON": sys.executable,
                                              **variables_of(manifest, rank, port)}) for rank in "01"]
    for node in nodes:
        out, err = node.communicate(timeout=120)
        assert node.returncode == 0 and "2 nodes have joined" in err, err
    (run,) = (tmp_path / "shared").iterdir()
    assert [line["step"] for line in metrics(run) if "loss" in line] == [1, 2]


@pytest.mark.full
def test_torchrun_restarts_a_run_that_lost_a_rank(tmp_path):
    """As the README shows it: --max-restarts and --resume_from auto; a rank is killed, all steps are made once."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts", "1",
               os.path.join(ROOT, "sft.py"), "--model", "tiny", "--max_steps", "300", "--save_steps", "10",
               "--output_dir", "out", "--resume_from", "auto"]
    with subprocess.Popen([sys.executable, *command], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
                          stderr=subprocess.STDOUT) as process:
        limit, latest = time.monotonic() + 120, tmp_path / "out" / "checkpoints" / "latest"
        while not latest.exists() and time.monotonic() < limit:
            time.sleep(0.1)
        ranks = subprocess.run(["pgrep", "-P", str(process.pid)], stdout=subprocess.PIPE, text=True).stdout.split()
        os.kill(int(ranks[1]), signal.SIGKILL)
        out = process.communicate(timeout=200)[0]
    assert process.returncode == 0, out[-3000:]
    assert [line["step"] for line in metrics(tmp_path / "out") if "lr" in line] == list(range(1, 301))
    assert json.loads((latest / "config.json").read_text())["model_type"] == "qwen2"
