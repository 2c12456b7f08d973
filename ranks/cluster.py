"""What a cluster says about the nodes of a run, and the network interface between them.

read() turns the variables of Slurm, Kubernetes, SageMaker and SkyPilot into those of train.sh. This file
imports only the standard library: ranks/launch.py has to start fast.
"""

import contextlib
import fcntl
import glob
import json
import os
import re
import socket
import struct

OWN = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "N_GPUS")
# Variables of a rank. Those of an earlier torchrun must not reach the ranks of this run.
OF_A_RANK = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK",
             "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE")
# torchrun takes its flags from these variables; train.sh reads the first five, and passes flags instead
TORCHRUN = ("PET_NNODES", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT", "PET_NPROC_PER_NODE",
            "PET_STANDALONE", "PET_RDZV_ENDPOINT", "PET_RDZV_BACKEND", "PET_RDZV_ID", "PET_RDZV_CONF",
            "PET_LOCAL_ADDR")


class ClusterError(ValueError):
    """The variables of a cluster do not say how to run. The message says what to set."""


def read(env, has_n_gpus=False):
    """({name of OWN: its value}, where the values come from) for an environment such as os.environ.

    has_n_gpus  whether --n_gpus is given, which then counts

    A variable of train.sh that is set wins. Raises ClusterError if the variables do not say how to run.
    """
    own = {name: env[name] for name in OWN if env.get(name)}
    for source, reader in READERS.items():
        found = {name: str(value) for name, value in reader(env, own).items() if value not in (None, "")}
        if found:
            break
    else:
        source, found = "", {}
    if has_n_gpus:
        found.pop("N_GPUS", None)
    merged = {**found, **own}
    if merged.get("NNODES", "1") == "1":  # this node alone, whatever its place among others
        merged = {name: merged[name] for name in merged if name in own or name == "N_GPUS"}
    return merged, source


def torchrun_variables(env, own):
    """PET_*, torchrun's own: a PyTorchJob sets them, and Kubeflow's TrainJob."""
    if not any(env.get(name) for name in TORCHRUN[:5]):
        return {}
    nodes = env.get("PET_NNODES", "")
    low, _, high = nodes.partition(":")
    if "NNODES" not in own and high and low != high:
        raise ClusterError(f"PET_NNODES={nodes}: the number of nodes must be fixed; set NNODES to one number")
    host, _, port = env.get("PET_RDZV_ENDPOINT", "").rpartition(":")
    processes = env.get("PET_NPROC_PER_NODE")
    if processes in ("auto", "gpu", "cpu"):
        processes = count_gpus() if processes != "cpu" else 1
    rank = env.get("PET_NODE_RANK") or env.get("RANK") or env.get("JOB_COMPLETION_INDEX")
    return {"NNODES": low, "NODE_RANK": rank, "N_GPUS": processes,
            "MASTER_ADDR": env.get("PET_MASTER_ADDR") or env.get("MASTER_ADDR") or host,
            "MASTER_PORT": env.get("PET_MASTER_PORT") or env.get("MASTER_PORT") or port}


def count_gpus():
    """The GPUs that this process may use, without torch, which takes seconds to import."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return max(1, len(list(filter(None, visible.split(",")))))
    return max(1, len(glob.glob("/dev/nvidia[0-9]*")))


def sagemaker(env, own):
    """SM_*: the training toolkit sets them on every host."""
    if "SM_HOSTS" not in env:
        return {}
    hosts = sorted(json.loads(env["SM_HOSTS"]))
    this = env.get("SM_CURRENT_HOST")
    if this not in hosts:
        raise ClusterError(f"SM_CURRENT_HOST={this}: it must be one of SM_HOSTS={env['SM_HOSTS']}")
    return {"NNODES": len(hosts), "NODE_RANK": hosts.index(this),
            "MASTER_ADDR": env.get("SM_MASTER_ADDR") or hosts[0], "MASTER_PORT": env.get("SM_MASTER_PORT"),
            "N_GPUS": env.get("SM_NUM_GPUS") if env.get("SM_NUM_GPUS") != "0" else 1}


def skypilot(env, own):
    """SKYPILOT_*: set in the `run` commands of a task."""
    addresses = env.get("SKYPILOT_NODE_IPS", "").split()
    if not addresses:
        return {}
    return {"NNODES": env.get("SKYPILOT_NUM_NODES") or len(addresses),
            "NODE_RANK": env.get("SKYPILOT_NODE_RANK"), "MASTER_ADDR": addresses[0]}


def slurm(env, own):
    """SLURM_*: srun sets them for each task. train.sh is one task per node."""
    nodes = env.get("SLURM_STEP_NUM_NODES") or env.get("SLURM_NNODES") or env.get("SLURM_JOB_NUM_NODES", "1")
    tasks = env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS") or nodes
    is_task = "SLURM_PROCID" in env and ("SLURM_STEP_ID" in env or "SLURM_JOB_ID" not in env)
    if "NNODES" not in own:
        how = "start one task per node: srun --ntasks-per-node=1 ./train.sh --n_gpus N"
        if is_task and tasks != nodes:
            raise ClusterError(f"srun started {tasks} tasks on {nodes} node(s), and each would be a run of "
                               f"its own; {how}; or set NNODES=1 for {tasks} separate runs")
        if nodes != "1" and not is_task:
            raise ClusterError(f"Slurm's job has {nodes} nodes, and srun did not start this process; {how}; "
                               "or set NNODES=1 to use this node only")
    if not is_task or (nodes == "1" and "NNODES" not in own):
        return {}
    names = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST") or ""
    job = env.get("SLURM_JOB_ID", "")
    return {"NNODES": nodes, "NODE_RANK": env.get("SLURM_NODEID") or env["SLURM_PROCID"],
            "MASTER_ADDR": first_host(names),
            # two jobs on a node need two ports; Linux itself hands out those from 32768 on
            "MASTER_PORT": 20000 + int(job) % 10000 if job.isdigit() else None}


def first_host(nodelist):
    """The first host of Slurm's list: gpu[003-007,9],login -> gpu003"""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodelist)[0]
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first)


def pods(env, own):
    """WORLD_SIZE and RANK as numbers of pods, as an older PyTorchJob sets them; the index of an indexed Job.

    JobSet sets only JOB_COMPLETION_INDEX; the manifest has to say MASTER_ADDR and the number of pods.
    """
    if "LOCAL_RANK" in env or not env.get("MASTER_ADDR"):
        return {}  # variables of one rank; or left over, as nobody could meet
    index = env.get("RANK") or env.get("JOB_COMPLETION_INDEX")
    if index is None:
        return {}
    if "NNODES" not in own and not env.get("WORLD_SIZE"):
        name = "RANK" if env.get("RANK") else "JOB_COMPLETION_INDEX"
        raise ClusterError(f"MASTER_ADDR={env['MASTER_ADDR']} and {name}={index} are set, and the number of "
                           "nodes is not; set NNODES to the number of pods, or to 1")
    return {"NNODES": env.get("WORLD_SIZE"), "NODE_RANK": index}


READERS = {"PET_NNODES": torchrun_variables, "SM_HOSTS": sagemaker, "SKYPILOT_NODE_IPS": skypilot,
           "SLURM_JOB_NODELIST": slurm, "WORLD_SIZE and RANK": pods}


def check_rank(env):
    """Raise ClusterError for variables of a rank that are no numbers; remove those that are empty."""
    numbers = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 1}
    for name, low in numbers.items():
        text = env.get(name)
        if text == "":
            del env[name]
        elif text and not (text.isascii() and text.isdigit() and int(text) >= low):
            raise ClusterError(f"{name}={text}: it must be an integer of at least {low}; a launcher such as "
                               "torchrun sets it; unset it to train with one process")
    if int(env.get("RANK", "0")) >= int(env.get("WORLD_SIZE", "1")):
        raise ClusterError(f"RANK={env['RANK']} must be below WORLD_SIZE={env.get('WORLD_SIZE', '1')}; "
                           "unset both to train with one process")


def is_one_rank(env):
    """Whether another launcher has started this process as one rank of several."""
    return (env.get("WORLD_SIZE", "1") != "1"
            and all(env.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")))


# ------------------------------------------------------------------------------------------------------------
# the network interface between the nodes


def interface_of(address):
    """The name of the interface that has this numeric address, or None. Linux only."""
    if ":" in address:
        packed = socket.inet_pton(socket.AF_INET6, address.partition("%")[0]).hex()
        with open("/proc/net/if_inet6") as file:
            return next((line.split()[-1] for line in file if line.startswith(packed)), None)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as query:
        for _, name in socket.if_nameindex():
            try:  # SIOCGIFADDR
                reply = fcntl.ioctl(query, 0x8915, struct.pack("256s", name.encode()[:15]))
            except OSError:  # an interface without an address
                continue
            if socket.inet_ntoa(reply[20:24]) == address:
                return name
    return None


def local_address(host, port):
    """The numeric address from which this node reaches another one. No packet is sent.

    On the host itself that is a loopback address, where /etc/hosts says so: then the address of the default
    route, if there is one.
    """
    address = "127.0.0.1"
    for place in ((host, port), ("192.0.2.1", port)):  # the second is in no network: RFC 5737
        with contextlib.suppress(OSError):
            family, kind, *_, target = socket.getaddrinfo(*place, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind) as query:
                query.connect(target)
                address = query.getsockname()[0]
        if not address.startswith("127.") and address != "::1":
            break
    return address


def check_alone(env):
    """Raise ClusterError if this process would train alone, though the environment speaks of several."""
    size, tasks = env.get("WORLD_SIZE", "1"), env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS", "1")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not env.get(name)]
    if size != "1" and missing:
        raise ClusterError(f"WORLD_SIZE={size} is set, and {' and '.join(missing)} not; unset WORLD_SIZE to "
                           f"train with one process, or start several with ./train.sh --n_gpus {size}")
    is_task = "SLURM_PROCID" in env and ("SLURM_STEP_ID" in env or "SLURM_JOB_ID" not in env)
    if "WORLD_SIZE" not in env and is_task and tasks != "1" and env.get("NNODES") != "1":
        raise ClusterError(f"srun started {tasks} tasks, and each would be a run of its own; start one task "
                           "per node: srun --ntasks-per-node=1 ./train.sh --n_gpus N; or set NNODES=1 for "
                           f"{tasks} separate runs")


def use_interface(address, env):
    """Set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME where unset, for a node that has this address.

    Otherwise gloo publishes the address of the host's own name, which Debian's /etc/hosts gives as 127.0.1.1.
    Returns what was set as text: "GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0", or "".
    """
    name = interface_of(address)
    unset = [key for key in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if not env.get(key)]
    if name is None:
        return ""
    env.update(dict.fromkeys(unset, name))
    return " ".join(f"{key}={name}" for key in unset)
