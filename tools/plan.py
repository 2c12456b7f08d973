"""Estimate the memory of a rank, and the bytes and time of its collectives, from config.json alone.

    python tools/plan.py --model Qwen/Qwen2.5-0.5B --micro_batch_size 4 --memory_gb 24
    python tools/plan.py --model Qwen/Qwen2.5-7B --n_gpus 64 --tp 8

Takes the settings of sft.py and five of its own. sft.build() creates the model on meta; the rest is
arithmetic on names and shapes. ops/forecast.py, which computes the memory, says what is counted.
"""

if __name__ == "__main__":
    import os
    import sys

    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    from settings import venv

    venv.enter()  # where torch is missing, continue in the .venv that train.sh made

import math
import os
import sys
from dataclasses import dataclass, replace

import torch

import sft
from disk import files, pretrained
from disk.run import ModelPaths
from ops import forecast
from ops.forecast import (
    AUTO,
    GB,
    PlannedRun,
    activations,
    check,
    largest_micro_batch,
    loss_chunk,
    memory,
    shard_sizes,
    unsharded_bytes,
)
from ranks import processes
from settings import errors
from settings.errors import UserError
from settings.parser import parse, setting


@dataclass
class Config(sft.Config):
    """Estimate what a run with these settings needs: python tools/plan.py [flags of sft.py] [flags]"""

    memory_gb: float | None = setting(None, "GiB per rank; prints the largest micro_batch_size that fits",
                                      low=1e-3, group="planning")
    n_gpus: int | None = setting(None, "plan for this many GPUs; none: the device of this machine", low=1)
    tflops: float = setting(400.0, "speed of a GPU in TFLOP/s; 400 is about an H100 in bf16", low=1e-3,
                            needs="n_gpus")
    gb_per_second: float = setting(50.0, "GB/s that a rank sends for dp; 50 is about right between nodes",
                                   low=1e-3, needs="n_gpus")
    tp_gb_per_second: float = setting(300.0, "GB/s that a rank sends for tp; 300 is about right in a node",
                                      low=1e-3, needs="n_gpus and tp")

    def __post_init__(self):
        if self.tp > 1:
            self.strategy = "megatron"
        super().__post_init__()


# ------------------------------------------------------------------------------------------------------------
# communication and computation of a step


def collectives(run):
    """{name: (calls, bytes of the full tensors, bytes that a rank sends)} per step, for dp and tp.

    A rank sends (n - 1) / n of a tensor in a ring all-gather or reduce-scatter, twice that in an all-reduce.
    Single numbers (loss and gradient norm) are not counted.
    """
    n, dp, tp = run.micro_batches, run.dp, run.tp
    n_blocks = run.config.num_hidden_layers
    reduce_itemsize = 4 if run.bf16 else None
    groups = [*map(str, range(n_blocks)), None]
    gathered = {i: unsharded_bytes(run, i, 2 if run.bf16 else None) for i in groups}
    reduced = [unsharded_bytes(run, i, reduce_itemsize, only_trained=True) for i in groups]
    reduced = [size for size in reduced if size]
    has_head = not run.config.tie_word_embeddings  # with the last norm, a group beside the embedding's
    counts = {}
    if dp > 1:
        counts["dp all-gather, forward"] = n * (len(groups) + has_head), n * sum(gathered.values())
        again = [gathered[i] for i in groups[: n_blocks - 1]]  # the other groups are still there
        counts["dp all-gather, backward"] = n * len(again), n * sum(again)
        both_train = has_head and run.trains_embedding and forecast.trains_head(run)
        counts["dp reduce-scatter"] = len(reduced) + both_train, sum(reduced)
    if tp > 1:
        hidden = run.hidden_bytes
        recomputed = run.checkpointed_blocks  # checkpointing repeats the attention's all-reduce
        # if the embedding is frozen, the first block's input needs no gradient
        backward = 2 * n_blocks + recomputed - (not run.trains_embedding)
        n_chunks = math.ceil(run.tokens / loss_chunk(run))
        counts["tp all-reduce, forward"] = n * (2 * n_blocks + 1), n * (2 * n_blocks + 1) * hidden
        counts["tp all-reduce, backward"] = n * backward, n * backward * hidden
        counts["tp all-reduce, loss"] = n * (2 * n_chunks + 1), n * (4 * 4 * run.tokens + hidden)
        # once per step, before dp's: gradients of what tp does not split (lora_A or lora_B, q_norm, k_norm)
        unsplit = []
        for name, shape, itemsize, trained in run.parameters:
            n_elements = shard_sizes(run, name, shape)[0]
            is_partial = ".lora_" in name or "q_norm" in name or "k_norm" in name
            if trained and is_partial and n_elements == math.prod(shape):
                unsplit.append(n_elements * itemsize)
        if unsplit:
            counts["tp all-reduce, gradients"] = len(unsplit), sum(unsplit)
    result = {}
    for name, (calls, size) in counts.items():
        ranks = dp if "dp" in name else tp
        result[name] = calls, size, size * (2 if "all-reduce" in name else 1) * (1 - 1 / ranks)
    return result


def trained_share(run, part):
    """The share of trained values among those of the matrices in a part of the model, without adapters."""
    sizes = [(math.prod(shape), trained) for name, shape, _, trained in run.parameters
             if part in name and len(shape) > 1 and ".lora_" not in name]
    return sum(n for n, trained in sizes if trained) / max(1, sum(n for n, _ in sizes))


def flops(run):
    """Floating-point operations per step per rank: matrix products, and causal attention per conversation."""
    c, tokens = run.config, run.tokens * run.micro_batches
    attention_matrices = c.hidden_size * c.head_dim * (2 * c.num_attention_heads + 2 * c.num_key_value_heads)
    matrices = c.num_hidden_layers * (attention_matrices + 3 * c.hidden_size * c.intermediate_size)
    # forward, gradient of the input, gradient of the weight unless frozen, recomputed forward
    recomputed = run.checkpointed_blocks / c.num_hidden_layers
    passes = 2 + trained_share(run, ".layers.") + recomputed
    # per token, in forward
    attention = 2 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * run.length
    head_name = "embed_tokens" if c.tie_word_embeddings else "lm_head"
    head = 2 * c.vocab_size * c.hidden_size * (2 + trained_share(run, head_name))
    return tokens * (passes * 2 * matrices + (3 + recomputed) * attention + head) / run.tp


# ------------------------------------------------------------------------------------------------------------
# what is printed


def lines(run, *, memory_gb=None, tflops=None, gb_per_second=None, tp_gb_per_second=None):
    """Yield the lines to print: memory always; collectives and time for several ranks."""
    yield from memory_lines(run)
    if memory_gb:
        for checkpointed_blocks in (run.config.num_hidden_layers, 0):
            yield fit_line(replace(run, checkpointed_blocks=checkpointed_blocks), memory_gb)
        smallest = replace(run, micro_batch_size=1, checkpointed_blocks=run.config.num_hidden_layers)
        if memory(smallest)["device"] > memory_gb * GB:
            yield from remedies(smallest)
    if run.world_size > 1:
        yield from time_lines(run, tflops, gb_per_second, tp_gb_per_second)


def memory_lines(run):
    sizes = memory(run)
    size = {key: f"{value / GB:.3f} GiB" for key, value in sizes.items() if key not in ("stage", "stages")}
    device = "GPU" if run.cuda else "CPU"
    on_device, on_host = f"on the {device}", "in host memory"
    place = on_host if run.cuda and run.param_offload else on_device
    optimizer_place = on_host if run.cuda and (run.param_offload or run.optimizer_offload) else on_device
    n_blocks = run.config.num_hidden_layers
    with_checkpointing = activations(replace(run, checkpointed_blocks=n_blocks)) / GB
    without = activations(replace(run, checkpointed_blocks=0)) / GB
    dtype = "bf16" if run.bf16 else "fp32"
    yield (f"plan     {run.world_size} × {device} = dp {run.dp} × tp {run.tp}, {dtype}; micro-batch "
           f"{run.micro_batch_size} × {run.length:,} tokens, {run.micro_batches} per step per rank; "
           f"{run.checkpointed_blocks} of {n_blocks} blocks checkpointed")
    yield f"weights       {size['weights']:>14}  {place}"
    reduced = ", after they are reduced" * (run.world_size > 1)
    yield f"gradients     {size['gradients']:>14}  {place}{reduced}"
    yield f"optimizer     {size['moments']:>14}  {optimizer_place}: moments"
    if sizes["masters"]:
        yield f"masters       {size['masters']:>14}  {optimizer_place}: fp32 weights"
    yield (f"activations   {size['activations']:>14}  {with_checkpointing:.3f} with checkpointing, "
           f"{without:.3f} without")
    yield f"loss          {size['loss']:>14}  logits of a chunk, gradients of head and hidden states"
    if run.is_sharded:
        yield f"gathered      {size['gathered']:>14}  unsharded parameters: embedding, head, two blocks"
    if sizes["held"] and run.world_size > 1:  # on one rank it is the gradient above
        yield f"held          {size['held']:>14}  the full gradient, between micro-batches"
    if sizes["slack"]:
        yield f"allocator     {size['slack']:>14}  heap fragmentation"
    yield f"peak          {size['device']:>14}  per rank, {on_device}, during {sizes['stage']}"
    if not run.cuda:
        yield f"{'':30}not counting the imported libraries"
    if sizes["host"]:
        yield f"host          {size['host']:>14}  per rank, in host memory"
    if run.cuda and run.param_offload:  # as in collectives(), backward does not fetch the root's again
        fetched = run.micro_batches * (2 * sizes["weights"] - unsharded_bytes(run, None) // run.dp)
        yield (f"PCIe     {(fetched + sizes['gradients']) / GB:>15.3f} GiB  per rank and step: weights twice "
               "per micro-batch, gradients once; prefer --optimizer_offload if it fits: both once")


def remedies(run):
    """The lines about a run that does not fit: what it needs, and what it would need with other settings."""
    needed = memory(run)["device"]
    yield f"         it needs {needed / GB:.1f} GiB; it would need"
    for flags, saved in forecast.savings(run):
        yield f"           {(needed - saved) / GB:7.1f} GiB with {flags}"


def fit_line(run, memory_gb):
    """The line about the micro_batch_size that fits into memory_gb."""
    how = "with checkpointing" if run.checkpointed_blocks else "without checkpointing"
    several = largest_micro_batch(run, memory_gb * GB)
    single = largest_micro_batch(run, memory_gb * GB, several=False)
    if not single:
        return f"         {how}: does not fit in {memory_gb:g} GiB, even with --micro_batch_size 1"
    if not several:
        condition = ", but only if a step is one micro-batch"
    else:
        condition = f", or {single} if a step is one micro-batch" if single > several else ""
    return f"fits     in {memory_gb:g} GiB {how}: --micro_batch_size {several or single}{condition}"


def time_lines(run, tflops, gb_per_second, tp_gb_per_second):
    seconds, speeds = dict(dp=0, tp=0), dict(dp=gb_per_second, tp=tp_gb_per_second)
    yield f"{'collectives per step':26}{'calls':>8}{'GiB in total':>16}{'GiB sent per rank':>20}"
    for name, (calls, total, sent) in collectives(run).items():
        axis = name[:2]
        seconds[axis] += sent / speeds[axis] / 1e9
        yield f"{name:26}{calls:8,}{total / GB:16.3f}{sent / GB:20.3f}"
    work, communication = flops(run) / 1e12, sum(seconds.values())
    compute = work / tflops
    yield f"step     {compute:.2f} s of computation: {work:,.0f} TFLOP per rank at {tflops:g} TFLOP/s"
    yield (f"         {seconds['dp']:.2f} s of dp at {gb_per_second:g} GB/s, "
           f"{seconds['tp']:.2f} s of tp at {tp_gb_per_second:g} GB/s")
    tokens = run.tokens * run.micro_batches * run.dp
    best, worst = max(compute, communication), compute + communication
    yield (f"         {best:.2f} s if they overlap, {worst:.2f} s if not: "
           f"{tokens / best:,.0f} to {tokens / worst:,.0f} tokens per second")


def plan(cfg):
    """Print what a run would need. Loads, tokenises and writes nothing, and waits for no other process."""
    directory = pretrained.model_directory(cfg.model, patterns=["config.json"])
    config_json = files.read_json(os.path.join(directory, "config.json"))
    paths = ModelPaths(
        model=directory, adapter=cfg.resume_adapter, tokenizer=directory, config_json=config_json)
    cuda = bool(cfg.n_gpus) or torch.cuda.is_available()
    dtype = cfg.dtype or ("bf16" if cuda else "fp32")
    ranks = processes.single_process(torch.device("meta"))
    model, _ = sft.build(replace(cfg, dtype=dtype), paths, ranks)
    world_size = cfg.n_gpus or int(os.environ.get("WORLD_SIZE", "1"))
    run = PlannedRun.of(model, cfg, world_size=world_size, cuda=cuda)
    check(run)
    if AUTO in (cfg.micro_batch_size, cfg.gradient_checkpointing):
        run = chosen(run, cfg)
    if os.environ.get("RANK", "0") == "0":
        print(*lines(run, memory_gb=cfg.memory_gb, tflops=cfg.tflops, gb_per_second=cfg.gb_per_second,
                     tp_gb_per_second=cfg.tp_gb_per_second), sep="\n")


def chosen(run, cfg):
    """The PlannedRun that `auto` chooses with --memory_gb, or with the memory of this machine's device.

    Raises UserError if nothing fits, and for a plan for GPUs whose memory is not known.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if cfg.n_gpus and not cfg.memory_gb:
        raise UserError("auto needs --memory_gb with --n_gpus; 79 is an H100 of 80 GB")
    capacity = int(cfg.memory_gb * GB) if cfg.memory_gb else forecast.device_memory(device)
    return forecast.choose(run, capacity, micro_batch_size=cfg.micro_batch_size,
                           gradient_checkpointing=cfg.gradient_checkpointing)


def main():
    cfg, _ = parse(Config, sys.argv[1:])
    plan(cfg)


if __name__ == "__main__":
    errors.run(main)
