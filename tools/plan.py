"""Estimate the memory of a rank, and the bytes and time of its collectives, from config.json alone.

    python tools/plan.py --model Qwen/Qwen2.5-0.5B --micro_batch_size 4 --memory_gb 24
    python tools/plan.py --model Qwen/Qwen2.5-7B --ranks 64 --tp 8
    python tools/plan.py --model Qwen/Qwen2.5-7B --ranks 64 --max_length 131072 --best

Takes the settings of sft.py and seven of its own. sft.build() creates the model on meta; the rest is
arithmetic on names and shapes. ops/forecast.py computes the memory, tools/step_time.py the time, and says
what is counted; tools/best.py searches.
"""

if __name__ == "__main__":
    import os
    import sys

    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    from settings import venv

    venv.enter()  # where torch is missing, continue in the .venv that train.sh made

import os
import sys
from dataclasses import dataclass, replace

import torch

import sft
from disk import files, pretrained, resume
from disk.run import ModelPaths
from ops import forecast
from ops.forecast import (
    AUTO,
    GB,
    PlannedRun,
    activations,
    check,
    largest_micro_batch,
    memory,
)
from ranks import processes
from settings import errors
from settings.errors import UserError
from settings.parser import parse, setting
from tools import best
from tools.step_time import Cluster, collectives, gathers, sent, step_time

GPU_GB = 79  # GiB of an H100 of 80 GB: the memory of a planned GPU, where --memory_gb does not say it
SEARCHED = ("tp or sp or replicas or micro_batch_size or gradient_checkpointing or gradient_reduction "
            "or param_offload or optimizer_offload")
WHEN = {"step": "once a step", "micro_batch": "with each"}


@dataclass
class Config(sft.Config):
    """Estimate what a run with these settings needs: python tools/plan.py [flags of sft.py] [flags]"""

    memory_gb: float | None = setting(None, "GiB per rank; prints the largest micro_batch_size that fits. "
                                      f"auto and --best: none means {GPU_GB}, an H100", low=1e-3,
                                      group="planning")
    n_gpus: int | None = setting(None, "GPUs of a node, as of train.sh; none: 8 with --ranks, otherwise the "
                                 "plan is for the device of this machine", low=1)
    ranks: int | None = setting(None, "GPUs of all nodes; none: one node", low=1)
    best: bool = setting(False, "search the layouts of these GPUs and print the three fastest that fit",
                         needs="n_gpus or ranks", unless=SEARCHED)
    tflops: float = setting(Cluster.tflops, "speed of a GPU in TFLOP/s; 400 is about an H100 in bf16",
                            low=1e-3, needs="n_gpus or ranks")
    node_gb_per_second: float = setting(
        Cluster.node_gb_per_second, "GB/s that a GPU sends inside its node; 300 is about right for NVLink, "
        "25 for PCIe", low=1e-3, needs="n_gpus or ranks")
    network_gb_per_second: float = setting(
        Cluster.network_gb_per_second, "GB/s that a GPU sends to other nodes; 50: a card of 400 Gb/s each",
        low=1e-3, needs="ranks")

    def __post_init__(self):
        if self.tp > 1:
            self.strategy = "megatron"
        self.complete(resume.settings)
        processes.check_strategy(self.strategy, self.tp)  # sp and replicas divide --ranks: forecast.check

    def world_size(self):
        return self.ranks or self.n_gpus or int(os.environ.get("WORLD_SIZE", "1"))

    def cluster(self):
        """The Cluster of a plan. Raises UserError if --ranks is not a whole number of nodes."""
        n, n_gpus = self.world_size(), self.n_gpus or Cluster.gpus_per_node
        if not (self.n_gpus or self.ranks):  # the processes of torchrun
            n_gpus = int(os.environ.get("LOCAL_WORLD_SIZE", n))
        elif n % n_gpus and (n > n_gpus or self.n_gpus):
            divisors = [str(i) for i in range(1, n + 1) if n % i == 0]
            raise UserError(f"--ranks {n} is not a multiple of the {n_gpus} GPUs of a node; set --n_gpus to "
                            f"one of {', '.join(divisors)}, or --ranks {max(1, n // n_gpus) * n_gpus}")
        return Cluster(min(n, n_gpus), self.tflops, self.node_gb_per_second, self.network_gb_per_second)


# ------------------------------------------------------------------------------------------------------------
# what is printed


def lines(run, *, cluster, memory_gb=None):
    """Yield the lines to print: memory always; collectives and time for several ranks."""
    yield from memory_lines(run)
    if memory_gb:
        for checkpointed_blocks in (run.config.num_hidden_layers, 0):
            yield fit_line(replace(run, checkpointed_blocks=checkpointed_blocks), memory_gb)
        smallest = replace(run, micro_batch_size=1, checkpointed_blocks=run.config.num_hidden_layers)
        if memory(smallest)["device"] > memory_gb * GB:
            yield from remedies(smallest, cluster)
    if run.world_size > 1:
        yield from time_lines(run, cluster)


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
    sp = f"sp {run.sp} × " * (run.sp > 1)
    replicas = f", {run.replicas} replicas of {run.shards} shards" * (run.replicas > 1)
    has_choice = run.micro_batches > 1 and run.is_sharded
    reduction = f", gradients reduced {WHEN[run.gradient_reduction]}" * has_choice
    yield (f"plan     {run.world_size} × {device} = dp {run.dp} × {sp}tp {run.tp}{replicas}, {dtype}; "
           f"micro-batch {run.micro_batch_size} × {run.length:,} tokens, {run.micro_batches} per step per "
           f"rank{reduction}; {run.checkpointed_blocks} of {n_blocks} blocks checkpointed")
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
        yield f"gathered      {size['gathered']:>14}  unsharded parameters"
    if sizes["held"] and run.world_size > 1:  # on one rank it is the gradient above
        part = "full gradient" if run.gradient_reduction == "step" else "gradient's shard"
        yield f"held          {size['held']:>14}  the {part}, between micro-batches"
    if sizes["slack"]:
        yield f"allocator     {size['slack']:>14}  heap fragmentation"
    yield f"peak          {size['device']:>14}  per rank, {on_device}, during {sizes['stage']}"
    if not run.cuda:
        yield f"{'':30}not counting the imported libraries"
    if sizes["host"]:
        yield f"host          {size['host']:>14}  per rank, in host memory"
    if run.cuda and run.param_offload:
        fetched = run.micro_batches * sum(map(sum, gathers(run))) / run.shards
        yield (f"PCIe     {(fetched + sizes['gradients']) / GB:>15.3f} GiB  per rank and step: weights twice "
               "per micro-batch, gradients once; prefer --optimizer_offload if it fits: both once")


def remedies(run, cluster):
    """The lines about a run that does not fit: what it needs, and what it would need with other settings."""
    has_nodes = run.world_size > cluster.gpus_per_node
    needed = memory(run)["device"]
    yield f"         it needs {needed / GB:.1f} GiB; it would need"
    for flags, saved in forecast.savings(run):
        flags = flags.replace("--n_gpus", "--ranks") if has_nodes else flags
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


def time_lines(run, cluster):
    """The bytes of each collective on each link, the seconds of each link, and those of a step."""
    yield f"{'sent per rank and step':26}{'calls':>8}{'GiB in its node':>18}{'GiB to other nodes':>20}"
    links = sent(run, cluster)
    for name, (calls, *_) in collectives(run).items():
        in_node, between = links[name]
        yield f"{name:26}{calls:8,}{in_node / GB:18.3f}{between / GB:20.3f}"
    time = step_time(run, cluster)
    compute = time.computation + time.recomputation
    again = f", {time.recomputation:.2f} s of it in checkpointed blocks" * (time.recomputation > 0)
    yield f"step     {compute:.2f} s of computation at {cluster.tflops:g} TFLOP/s{again}"
    yield (f"         {time.node:.2f} s in a node at {cluster.node_gb_per_second:g} GB/s, "
           f"{time.network:.2f} s between nodes at {cluster.network_gb_per_second:g} GB/s")
    if parts := best.parts(time):  # of a tiny model none takes 0.01 s
        yield f"         {parts}"
    tokens = run.batch_size * run.length
    yield (f"         {time.least:.2f} s if FSDP2's collectives overlap with computation, {time.most:.2f} s "
           f"if not: {tokens / time.least:,.0f} to {tokens / time.most:,.0f} tokens per second")
    if run.batch_size < run.dp:
        yield (f"         {run.batch_size} conversations for {run.dp} groups of ranks: the others compute "
               "nothing; use more --batch_size, or more --sp")


def plan(cfg):
    """Print what a run would need. Loads, tokenises and writes nothing, and waits for no other process."""
    directory = pretrained.model_directory(cfg.model, patterns=["config.json"])
    config_json = files.read_json(os.path.join(directory, "config.json"))
    paths = ModelPaths(
        model=directory, adapter=cfg.resume_adapter, tokenizer=directory, config_json=config_json)
    cuda = bool(cfg.n_gpus or cfg.ranks) or torch.cuda.is_available()
    dtype = cfg.dtype or ("bf16" if cuda else "fp32")
    ranks = processes.single_process(torch.device("meta"))
    model, _ = sft.build(replace(cfg, dtype=dtype), paths, ranks)
    run = PlannedRun.of(model, cfg, world_size=cfg.world_size(), cuda=cuda)
    cluster = cfg.cluster()

    def planned(tp, sp):
        other = replace(cfg, tp=tp, sp=sp, best=False)  # UserError where a setting does not work with them
        return PlannedRun.of(model, other, world_size=cfg.world_size(), cuda=cuda)

    if cfg.best:
        printed = best.lines(run, cluster, capacity(cfg), planned)
    else:
        check(run)
        printed = lines(chosen(run, cfg), cluster=cluster, memory_gb=cfg.memory_gb)
    if os.environ.get("RANK", "0") == "0":
        print(*printed, sep="\n")


def chosen(run, cfg):
    """The PlannedRun with what `auto` chooses, see RunState.choose_memory. UserError if nothing fits."""
    if AUTO in (cfg.micro_batch_size, cfg.gradient_checkpointing):
        return forecast.choose(run, capacity(cfg), micro_batch_size=cfg.micro_batch_size,
                               gradient_checkpointing=cfg.gradient_checkpointing,
                               reduction=cfg.gradient_reduction)
    if cfg.gradient_reduction == AUTO:
        return replace(run, gradient_reduction=forecast.gradient_reduction(run, capacity(cfg)))
    return run


def capacity(cfg):
    """Bytes of a rank's device: of --memory_gb, of a planned GPU, or of this machine's device."""
    if cfg.memory_gb or cfg.n_gpus or cfg.ranks:
        return int((cfg.memory_gb or GPU_GB) * GB)
    return forecast.device_memory(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def main():
    cfg, _ = parse(Config, sys.argv[1:])
    plan(cfg)


if __name__ == "__main__":
    errors.run(main)
