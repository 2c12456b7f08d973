"""What a step of a planned run takes: the bytes of its collectives on each link, and seconds, by arithmetic.

Ranks are numbered node by node: tp innermost, then sp, which is a part of the shards, then replicas. So the
sizes decide which groups are inside a node and which cross it. Nothing is measured: seconds are bytes or
operations by the speeds of a Cluster. Latency is not counted.
"""

import functools
import math
from dataclasses import dataclass, field
from types import SimpleNamespace

from ops.forecast import loss_chunk, shard_sizes

# Speeds of offload, per GPU: bytes per second to and from pinned host memory, and of the host's memory while
# AdamW runs on the CPU, of which each of 8 ranks has a share. Assumed; --optimizer_offload is a last resort.
PCIE, HOST = 25e9, 15e9
ADAMW_BYTES = 28  # per parameter: reads gradient, weight and two moments, writes the last three; all fp32


@dataclass(frozen=True)
class Cluster:
    """GPUs and the links between them.

    gpus_per_node           GPUs that NVLink connects
    tflops                  speed of a GPU, 1e12 operations per second
    node_gb_per_second      what a GPU sends to others of its node, 1e9 bytes per second
    network_gb_per_second   what a GPU sends to other nodes, through its own network card
    """

    gpus_per_node: int = 8
    tflops: float = 400.0
    node_gb_per_second: float = 300.0
    network_gb_per_second: float = 50.0


# ------------------------------------------------------------------------------------------------------------
# collectives


@functools.lru_cache(maxsize=1024)
def padded_sizes(parameters, tp, shards):
    """{(group, bytes per element, is trained): elements on a tp rank}, padded to equal shards.

    The groups of fsdp.shard: blocks "0", "1", ...; "embedding" and "head", or "root" if they are tied.
    """
    is_untied = any(name.startswith("lm_head") for name, *_ in parameters)
    sizes, layout = {}, SimpleNamespace(tp=tp, shards=shards)
    for name, shape, itemsize, trained in parameters:
        group = "root"
        if ".layers." in name:
            group = name.split(".")[2]
        elif is_untied:
            group = "embedding" if "embed_tokens" in name else "head"
        key = group, itemsize, trained
        sizes[key] = sizes.get(key, 0) + shard_sizes(layout, name, shape)[1] * shards
    return sizes


def fsdp_groups(run, itemsize=None, only_trained=False):
    """{group: bytes on a tp rank} of what FSDP2 gathers together; itemsize None: as stored."""
    sizes = {}
    padded = padded_sizes(run.parameters, run.tp, run.shards)
    for (group, stored, trained), n in padded.items():
        if trained or not only_trained:
            sizes[group] = sizes.get(group, 0) + n * (itemsize or stored)
    return sizes


def gathers(run, itemsize=None):
    """(bytes of each group gathered in forward, those gathered again in backward) of a micro-batch.

    The last block, norm and head stay gathered, and the embedding's backward needs no weight.
    """
    groups = fsdp_groups(run, itemsize)
    return list(groups.values()), [groups[str(i)] for i in range(run.config.num_hidden_layers - 1)]


def collectives(run):
    """{name: (calls, bytes of the full tensors, bytes that a rank sends)} per step; names begin with an axis.

    A rank sends (n - 1) / n of a tensor in a ring all-gather or reduce-scatter and in an all-to-all, twice
    that in a ring all-reduce. Of an all-gather or reduce-scatter the unsharded tensor counts, of the others
    what a rank has. Single numbers (loss and gradient norm) are not counted.
    """
    counts = {**fsdp_collectives(run), **sp_collectives(run)}
    if run.tp > 1:
        counts.update(tp_collectives(run))
    sizes = dict(shards=run.shards, replicas=run.replicas, sp=run.sp, tp=run.tp)
    result = {}
    for name, (calls, size) in counts.items():
        n = sizes[name.split()[0]]
        if n > 1 and calls:
            result[name] = calls, size, size * (2 if "all-reduce" in name else 1) * (1 - 1 / n)
    return result


def fsdp_collectives(run):
    """Gathers with each micro-batch; gradients are reduced over shards as --gradient_reduction says.

    Over replicas they are reduced with the last micro-batch only.
    """
    n, (forward, backward) = run.micro_batches, gathers(run, 2 if run.bf16 else None)
    reduced = fsdp_groups(run, 4 if run.bf16 else None, only_trained=True)
    reduced = [size for size in reduced.values() if size]
    n_reductions = n if run.gradient_reduction == "micro_batch" else 1
    return {
        "shards all-gather, forward": (n * len(forward), n * sum(forward)),
        "shards all-gather, backward": (n * len(backward), n * sum(backward)),
        "shards reduce-scatter": (n_reductions * len(reduced), n_reductions * sum(reduced)),
        "replicas all-reduce": (len(reduced), sum(reduced) // run.shards),
    }


def sp_collectives(run):
    """Of q, k, v and the output of each attention (ranks/sp.py), in forward, backward and recomputed forward.

    Keys and values count as often as sp repeats their heads.
    """
    n, c = run.micro_batches, run.config
    heads = 2 * (c.num_attention_heads // run.tp + run.key_heads)
    of_blocks = [run.rank_tokens * heads * head_dim * run.itemsize for head_dim in c.head_dims]
    counts = {}
    for name, sizes in (("forward", of_blocks), ("backward", of_blocks),
                        ("recomputed", of_blocks[: run.checkpointed_blocks])):
        counts[f"sp all-to-all, {name}"] = 4 * n * len(sizes), n * sum(sizes)
    return counts


def tp_collectives(run):
    """Of hidden states: two per block and direction; and of what the loss needs of the vocabulary."""
    n, n_blocks, hidden = run.micro_batches, run.config.num_hidden_layers, run.hidden_bytes
    recomputed = run.checkpointed_blocks  # checkpointing repeats the attention's all-reduce
    # if the embedding is frozen, the first block's input needs no gradient
    backward = 2 * n_blocks + recomputed - (not run.trains_embedding)
    n_chunks = math.ceil(run.rank_tokens / loss_chunk(run))
    # once per step, before FSDP2's: gradients of what tp does not split (lora_A or lora_B, q_norm, k_norm)
    unsplit = []
    for name, shape, itemsize, trained in run.parameters:
        is_partial = ".lora_" in name or "q_norm" in name or "k_norm" in name
        if trained and is_partial and shard_sizes(run, name, shape)[0] == math.prod(shape):
            unsplit.append(math.prod(shape) * itemsize)
    return {
        "tp all-reduce, forward": (n * (2 * n_blocks + 1), n * (2 * n_blocks + 1) * hidden),
        "tp all-reduce, backward": (n * backward, n * backward * hidden),
        "tp all-reduce, loss": (n * (2 * n_chunks + 1), n * (4 * 4 * run.rank_tokens + hidden)),
        "tp all-reduce, gradients": (len(unsplit), sum(unsplit)),
    }


# ------------------------------------------------------------------------------------------------------------
# links


@functools.cache
def share_between_nodes(stride, size, world_size, gpus_per_node, is_ring=True):
    """The share of the bytes that a rank sends which leaves its node: in the group that crosses most.

    stride   distance of two neighbours in a group of `size` ranks
    is_ring  each rank sends to the next one only; NCCL makes a ring for each network card, so that the cards
             of a node share what leaves it. False: an all-to-all, each rank sends to every other one
    """
    shares = [0.0]
    for first in range(0, world_size, stride * size):
        nodes = [(first + i * stride) // gpus_per_node for i in range(size)]
        if is_ring and size > 1:
            shares.append(sum(a != b for a, b in zip(nodes, [*nodes[1:], nodes[0]])) / size)
        elif size > 1:
            shares += [1 - (nodes.count(node) - 1) / (size - 1) for node in set(nodes)]
    return max(shares)


def sent(run, cluster):
    """{name of a collective: (bytes that a rank sends inside its node, bytes to other nodes)}"""
    strides = dict(tp=1, sp=run.tp, shards=run.tp, replicas=run.tp * run.shards)
    sizes = dict(tp=run.tp, sp=run.sp, shards=run.shards, replicas=run.replicas)
    result = {}
    for name, (_, _, size) in collectives(run).items():
        axis = name.split()[0]
        share = share_between_nodes(strides[axis], sizes[axis], run.world_size, cluster.gpus_per_node,
                                    "all-to-all" not in name)
        result[name] = size * (1 - share), size * share
    return result


# ------------------------------------------------------------------------------------------------------------
# computation and seconds


@functools.lru_cache(maxsize=16)
def trained_share(parameters, part):
    """The share of trained values among those of the matrices in a part of the model, without adapters."""
    sizes = [(math.prod(shape), trained) for name, shape, _, trained in parameters
             if part in name and len(shape) > 1 and ".lora_" not in name]
    return sum(n for n, trained in sizes if trained) / max(1, sum(n for n, _ in sizes))


def tokens_of_a_step(run):
    """Tokens that a rank computes in a step, in the group that reads most conversations."""
    return math.ceil(run.batch_size / run.dp) * run.length / run.sp


def flops(run):
    """(operations per step per rank, those that checkpointing repeats beside them): products and attention.

    Attention is causal: a token sees half of its conversation, or its window.
    """
    c, tokens = run.config, tokens_of_a_step(run)
    attention_matrices = c.hidden_size * c.head_dim * (2 * c.num_attention_heads + 2 * c.num_key_value_heads)
    matrices = c.num_hidden_layers * (attention_matrices + 3 * c.hidden_size * c.intermediate_size)
    attention = 0  # per token, in forward: two products
    for kind, window, head_dim in zip(c.layer_types, c.sliding_windows, c.head_dims):
        seen = min(window or run.length, run.length)
        pairs = seen * (seen + 1) / 2 + (run.length - seen) * seen
        attention += 4 * c.num_attention_heads * head_dim * pairs / run.length * (kind != "linear_attention")
    # forward, gradient of the input, gradient of the weight unless frozen
    passes = 2 + trained_share(run.parameters, ".layers.")
    head_name = "embed_tokens" if c.tie_word_embeddings else "lm_head"
    head = 2 * c.vocab_size * c.hidden_size * (2 + trained_share(run.parameters, head_name))
    repeated = run.checkpointed_blocks / c.num_hidden_layers * (2 * matrices + attention)
    return (tokens * (passes * 2 * matrices + 3 * attention + head) / run.tp, tokens * repeated / run.tp)


def offload_seconds(run):
    """Seconds in which a rank waits for copies to and from host memory and for AdamW on the CPU."""
    if not (run.cuda and (run.param_offload or run.optimizer_offload)):
        return 0.0
    gradients = sum(fsdp_groups(run, only_trained=True).values()) / run.shards
    n_trained = sum(fsdp_groups(run, 1, only_trained=True).values()) / run.shards
    forward, backward = (sum(sizes) / run.shards for sizes in gathers(run))
    weights = run.micro_batches * (forward + backward) if run.param_offload else forward
    return (gradients + weights) / PCIE + ADAMW_BYTES * n_trained / HOST


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, by what takes them, and of each link.

    The collectives of tp and sp overlap with nothing: the next product waits for them. Those of FSDP2, over
    shards and replicas, may overlap with computation.
    """

    computation: float
    recomputation: float  # of checkpointed blocks
    tp: float
    sp: float
    shards: float
    replicas: float
    offload: float
    node: float = field(compare=False)  # what all bytes inside the node need
    network: float = field(compare=False)  # what all bytes between nodes need

    @property
    def waiting(self):
        return self.computation + self.recomputation + self.tp + self.sp + self.offload

    @property
    def exposed(self):
        """What FSDP2's collectives add even if they overlap: they take longer than the computation."""
        return max(0.0, self.shards + self.replicas - self.computation - self.recomputation)

    @property
    def least(self):
        return self.waiting + self.exposed

    @property
    def most(self):
        return self.waiting + self.shards + self.replicas


def step_time(run, cluster):
    """The StepTime of a run on a Cluster. A collective takes as long as the slower one of its links."""
    seconds, links = dict.fromkeys(("tp", "sp", "shards", "replicas"), 0.0), [0.0, 0.0]
    for name, sizes in sent(run, cluster).items():
        speeds = cluster.node_gb_per_second * 1e9, cluster.network_gb_per_second * 1e9
        times = [size / speed for size, speed in zip(sizes, speeds)]
        seconds[name.split()[0]] += max(times)
        links = [total + time for total, time in zip(links, times)]
    once, repeated = (n / cluster.tflops / 1e12 for n in flops(run))
    return StepTime(computation=once, recomputation=repeated, **seconds, offload=offload_seconds(run),
                    node=links[0], network=links[1])
