"""Search for the layouts of a cluster with the shortest step: python tools/plan.py --best.

A layout is tp × sp × replicas. For each one micro_batch_size, gradient_checkpointing, gradient_reduction and
offload are searched too. Every candidate trains the same conversations per step, --batch_size.
"""

import bisect
import heapq
import itertools
import math
from dataclasses import dataclass, replace

from ops import forecast
from ops.forecast import FILL, GB, PlannedRun, memory
from settings.errors import UserError
from tools.step_time import StepTime, step_time

OFFLOADS = {"": {}, "--optimizer_offload": {"optimizer_offload": True},
            "--param_offload": {"param_offload": True}}  # flag -> fields of PlannedRun
PARTS = {  # fields of StepTime -> what is printed
    "computation": "computation", "recomputation": "recomputation", "tp": "tp's all-reduces",
    "sp": "sp's all-to-alls", "shards": "FSDP2's collectives", "replicas": "all-reduces over replicas",
    "offload": "offload"}


@dataclass(frozen=True)
class Candidate:
    """A run that fits, with its StepTime and the bytes of a rank's device."""

    run: PlannedRun
    offload: str  # one of OFFLOADS
    time: StepTime
    device: int

    @property
    def seconds(self):
        return middle(self.time)

    @property
    def flags(self):
        """The settings of sft.py that make this run."""
        run, sizes = self.run, []
        if run.tp > 1:
            sizes.append(f"--strategy megatron --tp {run.tp}")
        sizes += [f"--{name} {value}" for name in ("sp", "replicas", "micro_batch_size")
                  if (value := getattr(run, name)) > 1]
        if run.checkpointed_blocks == 0:
            sizes.append("--no-gradient_checkpointing")
        elif run.checkpointed_blocks < run.config.num_hidden_layers:
            sizes.append("--gradient_checkpointing auto")
        if run.micro_batches > 1 and run.is_sharded:  # otherwise there is nothing to reduce
            sizes.append(f"--gradient_reduction {run.gradient_reduction}")
        return " ".join(filter(None, [*sizes, self.offload])) or "the defaults"


def middle(time):
    """Seconds by which candidates are compared: half of FSDP2's collectives overlap as well as they can."""
    return (time.least + time.most) / 2


# ------------------------------------------------------------------------------------------------------------
# search


def divisors(n):
    return [i for i in range(1, n + 1) if n % i == 0]


def layouts(run, planned):
    """The runs of every tp × sp × replicas that the model and the number of ranks allow, and [reason, ...].

    A reason says why a model has no tp, or no sp, at all. planned: see Search
    """
    found, reasons = [], {}
    for tp, sp in itertools.product(divisors(run.world_size), repeat=2):
        if run.world_size % (tp * sp):
            continue
        layout = replace(run, tp=tp, sp=sp)
        try:
            forecast.check(layout)
            layout = planned(tp, sp) if planned else layout
        except UserError as error:
            axis = ("tp", tp) if sp == 1 else ("sp", sp)
            reasons.setdefault(axis[0], str(error).partition("; ")[0])
            continue
        found += [replace(layout, replicas=n) for n in divisors(layout.dp)]
    return found, [text for axis, text in reasons.items() if all(getattr(run, axis) == 1 for run in found)]


def variants(layout):
    """A layout's runs without checkpointing and offload: each micro_batch_size and gradient_reduction."""
    needed = math.ceil(layout.batch_size / layout.dp)  # conversations of a group of ranks
    sizes = {needed, *(2**i for i in range(needed.bit_length()) if 2**i <= needed)}
    for size in sizes:
        run = replace(layout, micro_batch_size=size, checkpointed_blocks=0)
        for reduction in ("step", "micro_batch") if run.micro_batches > 1 else ("step",):
            yield replace(run, gradient_reduction=reduction)


class Search:
    """The fastest candidates that fit into `limit` bytes, of different layouts, the fastest first.

    Runs are visited in the order of the time that they would take without checkpointing, which is a lower
    bound: when it exceeds the time of the third best layout, nothing better can follow.

    planned  a function: (tp, sp) -> the run with them, in which more may differ (compilation, what the blocks
             of a family keep); UserError if a setting does not work with them. None: nothing else differs
    """

    def __init__(self, run, cluster, limit, count=3, planned=None):
        self.cluster, self.limit, self.count = cluster, limit, count
        self.too_large = []  # sizes_of runs that do not fit
        self.best = {}  # (tp, sp, replicas) -> Candidate
        self.layouts, self.reasons = layouts(run, planned)
        self.queue, self.numbers = [], itertools.count()
        for layout in self.layouts:
            for variant in variants(layout):
                self.push(variant, "")

    def push(self, run, offload):
        run = forecast.as_stored(replace(run, **OFFLOADS[offload]))
        bound = middle(step_time(run, self.cluster))
        heapq.heappush(self.queue, (bound, next(self.numbers), run, offload))  # no run is compared

    def candidates(self):
        while self.queue:
            bound, _, run, offload = heapq.heappop(self.queue)
            key, found = (run.tp, run.sp, run.replicas), self.fastest()
            slowest = found[-1].seconds if len(found) == self.count else math.inf
            if bound > slowest:
                break
            if key in self.best:
                slowest = min(slowest, self.best[key].seconds)
            candidate = self.fitting(run, offload, slowest)
            if candidate is None or candidate.run.checkpointed_blocks:
                for other, changes in OFFLOADS.items():
                    if run.cuda and changes and not offload:
                        self.push(run, other)
            if candidate:
                self.best[key] = min([candidate, self.best.get(key, candidate)], key=order)
        return self.fastest()

    def fastest(self):
        return sorted(self.best.values(), key=order)[: self.count]

    def fitting(self, run, offload, slowest):
        """The Candidate with as few checkpointed blocks as fit; None if that takes over `slowest` s."""
        def seconds(k):
            return middle(step_time(replace(run, checkpointed_blocks=k), self.cluster))

        def fits(k):
            return memory(replace(run, checkpointed_blocks=k))["device"] <= self.limit

        blocks = range(run.config.num_hidden_layers + 1)
        most = bisect.bisect_right(blocks, slowest, key=seconds) - 1  # that a run so fast may recompute
        sizes = sizes_of(run, offload, most)
        if most < 0 or any(is_larger(sizes, other) for other in self.too_large):
            return None
        if not fits(most):
            self.too_large.append(sizes)
            return None
        k = bisect.bisect_left(range(most), True, key=fits)  # memory falls with k
        run = replace(run, checkpointed_blocks=k)
        return Candidate(run, offload, step_time(run, self.cluster), memory(run)["device"])


def order(candidate):
    run = candidate.run
    return candidate.seconds, run.replicas, candidate.device


def sizes_of(run, offload, checkpointed_blocks):
    """(what two runs must have in common, numbers with each of which memory rises), for is_larger."""
    holds = run.micro_batches > 1 and run.gradient_reduction == "step"
    sizes = run.micro_batch_size, run.replicas, -run.sp, holds, -checkpointed_blocks
    # without shards nothing is gathered; with replicas FSDP2 sums gradients in another buffer
    return (run.tp, run.micro_batches > 1, run.shards > 1, run.replicas > 1, offload), sizes


def is_larger(sizes, other):
    """Whether a run needs at least as much memory as another one, by their sizes_of alone."""
    return sizes[0] == other[0] and all(a >= b for a, b in zip(sizes[1], other[1]))


# ------------------------------------------------------------------------------------------------------------
# what is printed


def lines(run, cluster, capacity, planned=None):
    """Yield the lines of `plan.py --best`. Raises UserError if nothing fits into FILL of `capacity` bytes.

    planned  see Search
    """
    limit = FILL * capacity
    search = Search(run, cluster, limit, planned=planned)
    found = search.candidates()
    if not found:
        smallest = least(search.layouts)
        raise UserError(f"nothing fits: one conversation of {run.length:,} tokens per micro-batch needs "
                        f"{smallest[0] / GB:.1f} GiB per rank with {smallest[1].flags}, and {FILL:.0%} of "
                        f"{capacity / GB:.1f} GiB may be used; use more ranks, a shorter --max_length or "
                        "--use_lora")
    n_nodes = math.ceil(run.world_size / cluster.gpus_per_node)
    nodes = f"{n_nodes} nodes of {cluster.gpus_per_node}" if n_nodes > 1 else "one node"
    yield (f"best     {run.world_size} GPUs in {nodes}, {capacity / GB:g} GiB each, of which {FILL:.0%} may "
           "be used")
    yield f"         a step has {run.batch_size} conversations of {run.length:,} tokens"
    for i, candidate in enumerate(found, 1):
        time = candidate.time
        tokens = run.batch_size * run.length / candidate.seconds
        yield f"{i}        {candidate.flags}"
        yield (f"         {candidate.device / GB:.1f} GiB; {time.least:.2f} s if FSDP2's collectives "
               f"overlap, {time.most:.2f} s if not: about {tokens:,.0f} tokens per second")
        yield f"         {parts(time)}"
        if i > 1:
            yield f"         {loses(candidate, found[0])}"
    idle = found[0].run.dp - run.batch_size
    if idle > 0:
        yield (f"idle     {idle} of {found[0].run.dp} groups of ranks have no conversation: raise "
               f"--batch_size to {found[0].run.dp}, or use fewer GPUs")
    for text in (*search.reasons, *impossible(search.layouts, limit)):
        yield f"excluded {text}"


def parts(time):
    """The seconds of a step by what takes them."""
    shown = [f"{getattr(time, name):.2f} s {text}" for name, text in PARTS.items()
             if getattr(time, name) >= 0.005]
    return ", ".join(shown)


def loses(candidate, first):
    """Why a candidate is slower than the first one: the parts of its time that differ."""
    slower = candidate.seconds - first.seconds
    differences = {text: getattr(candidate.time, name) - getattr(first.time, name)
                   for name, text in PARTS.items()}
    shown = sorted(((text, seconds) for text, seconds in differences.items()
                    if abs(seconds) >= max(0.005, 0.02 * slower)), key=lambda item: -item[1])
    reason = ", ".join(f"{seconds:+.2f} s {text}" for text, seconds in shown)
    if slower < 0.005:
        return f"as fast as the first, with {(candidate.device - first.device) / GB:+.1f} GiB"
    return f"loses {slower:.2f} s ({slower / first.seconds:.0%}) to the first: {reason}"


def least(runs, **changes):
    """(bytes of a rank's device, Candidate) of the run that needs least among those of these layouts.

    Each has one conversation per micro-batch. changes: fields of PlannedRun that are fixed; otherwise all
    blocks are checkpointed, and each offload is tried
    """
    smallest = {}  # memory falls with sp and rises with replicas
    for run in runs:
        if run.replicas == 1 and (run.tp not in smallest or run.sp > smallest[run.tp].sp):
            smallest[run.tp] = run
    found = []
    for run in smallest.values():
        run = replace(run, micro_batch_size=1, gradient_reduction="micro_batch",
                      checkpointed_blocks=run.config.num_hidden_layers)
        for offload, settings in OFFLOADS.items():
            if not settings or (run.cuda and changes.get("offload", True)):
                fixed = {k: v for k, v in changes.items() if k != "offload"}
                smaller = forecast.as_stored(replace(run, **settings, **fixed))
                found.append((memory(smaller)["device"], Candidate(smaller, offload, None, 0)))
    return min(found, key=lambda item: item[0])


def impossible(runs, limit):
    """The lines about settings without which nothing fits."""
    tokens = f"one conversation of {runs[0].length:,} tokens needs"
    for axis in ("sp", "tp"):
        needed, candidate = least([run for run in runs if getattr(run, axis) == 1])
        if needed > limit:
            yield f"without --{axis}, {tokens} {needed / GB:.1f} GiB, with {candidate.flags}"
    for text, changes in dict(gradient_checkpointing=dict(checkpointed_blocks=0),
                              offload=dict(offload=False)).items():
        needed, candidate = least(runs, **changes)
        if needed > limit:
            yield f"without {text}, {tokens} {needed / GB:.1f} GiB, with {candidate.flags}"
