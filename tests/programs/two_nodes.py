"""Two nodes on this machine, and a fault: two_nodes.py FAULT VICTIM PROJECT [flags], under `unshare -Urn`

Each node is a network namespace with an end of one cable, and runs PROJECT's train.sh with two ranks. VICTIM is a rank,
whose node has the fault if it is one of a node. FAULT is none, raise, memory or shape (an error in PROJECT's copy of
sft.py), kill or stop (SIGKILL or SIGSTOP of the rank), node (SIGKILL of all processes of its node), link (the cable is
cut), torchrun (SIGKILL of its node's torchrun), term (SIGTERM of its node's train.sh), pause (all processes of both
nodes are stopped for 15 seconds) or again (the nodes run torchrun --max-restarts, as docs/cluster.md says; the one of
the node is killed and started again).
Writes result.json: {"codes", "seconds" from the fault until a node ended, "screens"}, of each node.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

fault, victim, project = sys.argv[1], int(sys.argv[2]), sys.argv[3]
node = victim // 2
LIMIT = 150  # seconds


def start_namespace():
    """A process that holds a new network namespace."""
    process = subprocess.Popen(["unshare", "-n", "sh", "-c", "ip link set lo up; echo; exec sleep 1000"],
                               stdout=subprocess.PIPE)
    process.stdout.readline()
    return process


def inside(i, *command, **options):
    return subprocess.Popen(["nsenter", "-t", str(holders[i].pid), "-n", *command], **options)


def descendants(pid):
    """The process and all that it has started."""
    found = [pid]
    for process in found:
        with contextlib.suppress(FileNotFoundError):
            for thread in os.listdir(f"/proc/{process}/task"):
                with open(f"/proc/{process}/task/{thread}/children") as f:
                    found += map(int, f.read().split())
    return found


def send(number, processes):
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def pid_of(rank):
    with open(f"pid {rank}") as f:
        return int(f.read())


def start(i):
    """Start the command of a node."""
    command, environment = commands[i]
    return inside(i, *command, env=environment, stdin=subprocess.DEVNULL, stdout=open(f"out_{i}", "a"),
                  stderr=open(f"err_{i}", "a"), start_new_session=True)


holders = [start_namespace() for _ in range(2)]
a, b = (str(holder.pid) for holder in holders)
cable = "type", "veth", "peer", "name", "eth0", "netns", b
subprocess.run(["ip", "link", "add", "eth0", "netns", a, *cable], check=True)
nodes, commands, started = [], {}, time.monotonic()
for i in range(2):
    inside(i, "ip", "address", "add", f"10.0.0.{i + 1}/24", "dev", "eth0").wait()
    inside(i, "ip", "link", "set", "eth0", "up").wait()
for i in range(2):
    os.makedirs(f"home_{i}", exist_ok=True)
    environment = {**os.environ, "HOME": os.path.abspath(f"home_{i}"), "NNODES": "2", "NODE_RANK": str(i),
                   "MASTER_ADDR": "10.0.0.1", "GLOO_SOCKET_IFNAME": "eth0", "PYTHON": sys.executable,
                   "FAULT": fault, "VICTIM": str(victim)}
    commands[i] = [[f"{project}/train.sh", *sys.argv[4:]], environment]
    if fault == "again":
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else a node that comes back waits for ever
        commands[i][0] = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "2",
                          "--max-restarts", "3", "--rdzv_backend", "c10d", "--rdzv_endpoint", "10.0.0.1:29500",
                          "--rdzv_conf", f"is_host={int(i == 0)}", "--local_addr", f"10.0.0.{i + 1}",
                          f"{project}/sft.py", *sys.argv[4:]]
    nodes.append(start(i))
while not os.path.exists("begun") and time.monotonic() < started + LIMIT and all(n.poll() is None for n in nodes):
    time.sleep(0.1)
begun, planted = time.monotonic(), [victim]
if fault in ("kill", "stop"):
    send(signal.SIGKILL if fault == "kill" else signal.SIGSTOP, [pid_of(victim)])
elif fault == "node":
    send(signal.SIGKILL, descendants(nodes[node].pid))
elif fault == "torchrun":
    with open(f"/proc/{pid_of(victim)}/stat") as f:
        send(signal.SIGKILL, [int(f.read().rpartition(")")[2].split()[1])])
elif fault == "again":
    nodes[node].kill()
    nodes[node].wait()
    nodes[node] = start(node)
elif fault == "link":
    inside(node, "ip", "link", "set", "eth0", "down").wait()
elif fault == "term":
    nodes[node].send_signal(signal.SIGTERM)
elif fault == "pause":
    processes = descendants(nodes[0].pid) + descendants(nodes[1].pid)
    send(signal.SIGSTOP, processes)
    time.sleep(15)
    send(signal.SIGCONT, processes)
codes, seconds = [None, None], [None, None]
while None in codes and time.monotonic() < begun + LIMIT:
    for i in range(2):
        if codes[i] is None and (code := nodes[i].poll()) is not None:
            codes[i], seconds[i] = code, time.monotonic() - begun
    time.sleep(0.05)
ranks = [rank for rank in range(4) if os.path.exists(f"pid {rank}") and os.path.exists(f"/proc/{pid_of(rank)}")]
for process in (*nodes, *holders):
    send(signal.SIGKILL, descendants(process.pid))
screens = [open(f"err_{i}").read() for i in range(2)]
with open("result.json", "w") as f:
    json.dump({"codes": codes, "seconds": seconds, "screens": screens, "left": ranks,
               "started": begun - started}, f)
