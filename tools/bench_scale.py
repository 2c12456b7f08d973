"""tools/bench.py --part scale: what one of 1,024 ranks does by itself in a step and for a checkpoint.

No other rank runs. Times are those of this process on the CPU, so that other programs change them less.
"""

import json
import os
import re
import statistics
import time
from collections import Counter
from dataclasses import asdict
from multiprocessing import get_context

import numpy as np
import torch
import torch.distributed as dist

import data
from disk import ownership
from families.config import ModelConfig
from families.registry import causal_lm
from ops.packing import pack
from ranks import failures, gate, tp
from text.ledger import Ledger

RANKS, LENGTH, STEPS = 1024, 2048, 5
CONVERSATIONS = 10**6, 10**7  # of the data set
PER_RANK = 4, 16  # conversations of a step
METHODS = ("set", "get", "add", "check", "wait", "append", "compare_set", "multi_get", "multi_set",
           "delete_key")
SHAPES = {  # Qwen2.5's: the layout of the ranks, config.json
    "7B": (ownership.Layout(replicas=16, shards=64), dict(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4)),
    "72B": (ownership.Layout(replicas=2, shards=64, tp=8), dict(
        hidden_size=8192, intermediate_size=29568, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8)),
}
FILE_BYTES = 4 * 10**9  # of a file of the model that was read


def milliseconds(call):
    """(what call() returns, milliseconds of CPU time)."""
    started = time.process_time()
    result = call()
    return result, (time.process_time() - started) * 1e3


# ---- a step ------------------------------------------------------------------------------------------------


def lengths_of(n):
    """(n,) int32: log-normal lengths, 8 to LENGTH tokens, with a median of 245."""
    lengths = np.exp(np.random.default_rng(0).normal(5.5, 1.1, n))
    return np.clip(lengths, 8, LENGTH).astype(np.int32)


def dataset_of(lengths, path):
    """A Dataset of these lengths, whose tokens are a file without content: to read them costs page faults."""
    n_tokens, zeros = int(lengths.sum(dtype=np.int64)), np.broadcast_to(np.int32(0), len(lengths))
    with open(path, "wb") as f:
        f.truncate(4 * n_tokens)
    return data.Dataset(
        tokens=np.memmap(path, dtype=np.int32, mode="r"), loss_mask=np.broadcast_to(True, n_tokens),
        n_tokens=lengths, n_inputs=lengths - 1, n_targets=lengths - 1, file=zeros, row=zeros, source_of=zeros,
        weighted=np.zeros(0, np.int64), weight=np.zeros(0, np.float32), files=["planned"],
        source_names=["planned"], weights=[[0, None]], ledger=Ledger(), digest="")


def steps(dataset, per_rank, rank=RANKS // 2 + 1):
    """{what: milliseconds} of a step of one rank, the median of STEPS; first: an epoch's first step."""
    sampler = data.Sampler(dataset.n_inputs, epochs=1, seed=42, batch_size=RANKS * per_rank)
    _, first = milliseconds(lambda: sampler.step(1))
    rows = []
    for step in range(2, STEPS + 2):
        (_, ids), sample = milliseconds(lambda: sampler.step(step))
        groups, packed = milliseconds(
            lambda: pack(dataset.n_inputs[ids], LENGTH, dp_rank=rank, dp_size=RANKS))
        _, collated = milliseconds(lambda: [data.collate(dataset, ids[group]) for group in groups])
        _, counted = milliseconds(lambda: dataset.count(ids))
        rows.append((sample, packed, collated, counted))
    medians = map(statistics.median, zip(*rows))
    names = "sample_ms", "pack_ms", "collate_ms", "count_ms"
    return {"epoch_starts_ms": first, **dict(zip(names, medians)),
            "step_ms": statistics.median(map(sum, rows))}


# ---- the store ---------------------------------------------------------------------------------------------


def counted(method):
    """A method of CountedStore: it counts the request, then makes it."""
    def call(self, keys, *arguments):
        names = [keys] if isinstance(keys, str) else list(keys)
        name = re.sub(r"[0-9a-f]*\d+", "#", names[0])
        self.record(f"{method} {name}", len(names))
        return getattr(self.store, method)(keys, *arguments)
    return call


class CountedStore(dist.Store):
    """A store whose requests are counted, also those that torch makes in C++.

    record  called with "METHOD KEY", where numbers are #, and the number of keys
    """

    def __init__(self, store, record):
        super().__init__()
        self.store, self.record = store, record

    set, get, add, check, wait, append, compare_set, multi_get, multi_set, delete_key = map(counted, METHODS)

    def clone(self):
        return CountedStore(self.store.clone(), self.record)

    def set_timeout(self, timeout):
        self.store.set_timeout(timeout)


def ticks(world_size, rank=5):
    """{state of the run: Counter of requests in `stride` ticks of a rank's watchdog}, one key or many.

    moving    the rank gets on
    waiting   it has not moved for some seconds, and reads where the others are
    failed    a rank has failed: this one reads it, then waits for the others
    """
    requests, found = Counter(), {}
    store = dist.HashStore()
    failures.prepare(store, world_size)
    watchdogs = [failures.Watchdog(store, other, world_size, 600) for other in range(world_size)]
    for other in watchdogs:
        other.exchange()  # all have started
    watchdog = failures.Watchdog(CountedStore(store, lambda what, n: requests.update({(what, n): 1})),
                                 rank, world_size, 600)
    watchdog.siblings = dict.fromkeys(watchdog.node_ranks)  # read once
    for name in ("moving", "waiting", "failed"):
        if name == "failed":
            store.set("failed", json.dumps(asdict(watchdogs[0].store_failure("planned"))))
        watchdog.ages = {("own",): [None, failures.TICK * 5 * watchdog.stride * (name == "waiting")]}
        requests.clear()
        for _ in range(watchdog.stride):
            watchdog.exchange()
        found[name] = dict(requests)
    return found


def serve(pipe):
    """Host a store, and send its port."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipe.send(store.port)
    pipe.recv()


def cpu_seconds(pid):
    with open(f"/proc/{pid}/stat", encoding="utf-8") as f:
        return sum(map(int, f.read().rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")


def load_of(world_size, seconds=(9000, 900)):
    """{state of the run: share of a core that the watchdogs' requests take on the node of the store}.

    seconds  for how long one rank's requests are made, without pauses; see ticks() for the states
    """
    ours, theirs = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    store = dist.PrefixStore("attempt", dist.TCPStore("127.0.0.1", ours.recv(), is_master=False))
    failures.prepare(store, world_size)
    for rank in range(world_size):
        failures.Watchdog(store, rank, world_size, 600).exchange()
    watchdog, shares = failures.Watchdog(store, 5, world_size, 600), {}
    for name, duration in zip(("moving", "waiting"), seconds):
        watchdog.ages = {("own",): [None, failures.TICK * 5 * watchdog.stride * (name == "waiting")]}
        n_ticks = int(duration / failures.TICK)
        started = cpu_seconds(process.pid)
        for _ in range(n_ticks):
            watchdog.exchange()
        shares[name] = (cpu_seconds(process.pid) - started) / n_ticks * world_size / failures.TICK
    ours.send(None)
    process.join()
    return shares


def gate_of(world_size):
    """Milliseconds in which rank 0 compares the settings and files of all ranks, once at the start."""
    store, values = dist.HashStore(), gate.code()
    store.set("gate program", "")  # the others, which write first, find that nothing differs
    for rank in range(1, world_size):
        gate.compare(store, rank, world_size, "program", values)
    return milliseconds(lambda: gate.compare(store, 0, world_size, "program", values))[1]


# ---- a checkpoint ------------------------------------------------------------------------------------------


def split_of(name):
    """{axis: dimension} over which a parameter is sharded, as tp.split and fsdp.shard do it."""
    split = {"shards": 0}
    if "norm" not in name:
        split["tp"] = int(name.split(".")[-2] in tp.COLUMNS_SPLIT)
    return split


def tensors_of(config):
    """{name: (shape, split, bytes of an element)} of a model in bf16."""
    with torch.device("meta"):
        model = causal_lm(config)(config)
    return {name: (tuple(p.shape), split_of(name), 2) for name, p in model.named_parameters()}


def plan_of(tensors, layout):
    """The plan of a save: (bytes of weights and of training state per rank, (files, owners), turns)."""
    sizes = {name: np.prod(shape, dtype=np.int64).item() * size for name, (shape, _, size) in tensors.items()}
    read = ownership.with_file_names(ownership.filled(sizes, FILE_BYTES), "model")
    plan = ownership.assign(sizes, read, layout.world_size)
    shapes = {name: shape for name, (shape, *_) in tensors.items()}
    turns = list(ownership.turns(*plan, sizes, shapes, 2**27))
    return ownership.bytes_by_rank(layout, tensors, read, 12), plan, turns


def checkpoint(shape):
    layout, sizes = SHAPES[shape]
    tensors = tensors_of(ModelConfig.from_dict(dict(
        model_type="qwen2", vocab_size=152064, rope_theta=1e6, tie_word_embeddings=False, **sizes)))
    ((weights, state), _, turns), ms = milliseconds(lambda: plan_of(tensors, layout))
    return {"plan_seconds": ms / 1e3, "turns": len(turns), "weights_gb": weights.sum() / 2**30,
            "most_weights_to_mean": weights.max() / weights.mean(), "state_gb": state.sum() / 2**30,
            "most_state_to_mean": state.max() / state.mean()}


def bench_scale(cfg, directory):
    line = {"ranks": RANKS, "steps": {}}
    for n in CONVERSATIONS:
        path = os.path.join(directory, "tokens")
        dataset = dataset_of(lengths_of(n), path)
        for per_rank in PER_RANK:
            line["steps"][f"{n // 10**6}M, {per_rank} per rank"] = steps(dataset, per_rank)
    requests = {name: {f"{what}, keys: {n}": count for (what, n), count in requests.items()}
                for name, requests in ticks(RANKS).items()}
    stride = failures.Watchdog(None, 0, RANKS, 600).stride
    store = {f"requests_in_{stride}_ticks": requests, "share_of_a_core": load_of(RANKS)}
    line.update(store=store, gate_ms=gate_of(RANKS), checkpoint={name: checkpoint(name) for name in SHAPES})
    return line
