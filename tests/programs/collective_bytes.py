"""Counts the collectives of four ranks in several layouts and kinds of run, and compares them with tools/plan.py.

No fault is planted. Prints {name: [counted, planned, bytes held, planned]} of the cases: calls and bytes by kind of
collective; then bytes of weights and gradients on rank 0.
"""

import dataclasses
import json

import torch
from helpers import small_model
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

import fsdp
from ops import forecast
from ops.attention import Documents
from ops.memory import local
from ranks import processes, sp, tp
from tools import plan

KINDS = "allgather", "reducescatter", "allreduce", "alltoall"
LENGTH = 299  # tokens of a micro-batch, which sp pads
# Fields of PlannedRun, and use_lora. Two micro-batches per step
CASES = {
    "tp": dict(tp=2, checkpointed_blocks=2),
    "tp, no checkpointing": dict(tp=2),
    "tp, LoRA": dict(tp=2, checkpointed_blocks=2, use_lora=True),
    "sp, repeated heads": dict(sp=4, checkpointed_blocks=1),
    "tp and sp": dict(tp=2, sp=2, checkpointed_blocks=2),
    "replicas, tied": dict(replicas=2, tie_word_embeddings=True),
    "replicas and sp, each micro-batch": dict(replicas=2, sp=2, gradient_reduction="micro_batch"),
    "LoRA, each micro-batch": dict(replicas=2, gradient_reduction="micro_batch", use_lora=True, checkpointed_blocks=2),
}


class Bytes(TorchDispatchMode):
    """Counts calls and bytes of each kind of collective; a call counts the full tensor that it communicates."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name.startswith(("c10d::", "_c10d_functional::")) and "wait" not in name and "wrap" not in name:
            kind = next(k for k in KINDS if k in name.replace("_", ""))
            tensor = args[1] if kind == "reducescatter" and name.startswith("c10d::") else args[0]
            tensor = tensor[0] if isinstance(tensor, (list, tuple)) else tensor
            calls, size = self.counts.get(kind, (0, 0))
            self.counts[kind] = calls + 1, size + tensor.numel() * tensor.element_size()
        return func(*args, **(kwargs or {}))


def laid_out(ranks, run):
    """The Ranks of another layout of the same processes, as processes.start makes them."""
    n = ranks.world_size
    mesh = init_device_mesh("cpu", (run.replicas, run.shards, run.tp), mesh_dim_names=("replicas", "shards", "tp"))
    tokens = init_device_mesh("cpu", (n // (run.sp * run.tp), run.sp, run.tp), mesh_dim_names=("dp", "sp", "tp"))
    return dataclasses.replace(ranks, mesh=mesh, sp_rank=ranks.rank // run.tp % run.sp, sp_size=run.sp,
                               sp_group=tokens["sp"].get_group())


def built(ranks, use_lora=False, tie_word_embeddings=False, **settings):
    """(a model split over the ranks, its forecast.PlannedRun, the Ranks of its layout)."""
    with torch.device("meta"):
        model = small_model(use_lora, tp_size=settings.get("tp", 1), model_type="qwen3", num_hidden_layers=3,
                            num_attention_heads=8, tie_word_embeddings=tie_word_embeddings)
    parameters = tuple(
        (n, tuple(p.shape), p.element_size(), p.requires_grad) for n, p in model.named_parameters())
    run = forecast.PlannedRun(model.config, parameters, LENGTH, world_size=4, **settings)
    run = dataclasses.replace(run, batch_size=2 * run.dp)
    model.model.checkpointed_blocks = run.checkpointed_blocks
    ranks = laid_out(ranks, run)
    if run.tp > 1:
        tp.split(model, ranks.mesh["tp"])
    if run.sp > 1:
        sp.split(model, ranks)
    fsdp.shard(model, ranks, bf16=False, param_offload=False, gradient_reduction=run.gradient_reduction)
    model.to_empty(device="cpu")
    for p in model.parameters():
        torch.nn.init.normal_(local(p), std=0.02)
    return model, run, ranks


def loss_of(model, ranks):
    """The loss of this rank's part of a micro-batch of one conversation, laid out as data.collate does."""
    padding = -LENGTH % ranks.sp_size
    n = (LENGTH + padding) // ranks.sp_size
    first = ranks.sp_rank * n
    lengths = (LENGTH, padding) if padding else (LENGTH,)
    positions = torch.cat([torch.arange(length) for length in lengths])[first : first + n]
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    documents = Documents(lengths, positions, offsets, first=first, is_part=ranks.sp_size > 1)
    tokens = torch.arange(first, first + n) + 3
    return model(tokens, documents, torch.arange(n), tokens).total


def counted(model, ranks):
    """{kind: (calls, bytes)} of a step of two micro-batches."""
    fsdp.set_gradient_sync(model, True)
    loss_of(model, ranks).backward()  # FSDP2's first call has extra collectives
    for p in model.parameters():
        p.grad = None
    with Bytes() as mode:
        for is_last in (False, True):
            fsdp.set_gradient_sync(model, is_last)
            loss_of(model, ranks).backward()
    return mode.counts


def planned(run):
    sums = {}
    for name, (calls, size, _) in plan.collectives(run).items():
        kind = next(k for k in KINDS if k in name.replace("-", ""))
        sums[kind] = tuple(a + b for a, b in zip(sums.get(kind, (0, 0)), (calls, size)))
    return sums


results = {}
with processes.start(1, 60) as ranks:
    for name, case in CASES.items():
        model, run, layout = built(ranks, **case)
        weights = sum(local(p).numel() * 4 for p in model.parameters())
        counts = counted(model, layout)
        gradients = sum(local(p.grad).numel() * 4 for p in model.parameters() if p.requires_grad)
        states = forecast.states(run)
        results[name] = counts, planned(run), [weights, gradients], [states["weights"], states["gradients"]]
    if ranks.rank == 0:
        print("RESULT " + json.dumps(results))
