"""Counts the collectives of four ranks, dp 2 × tp 2, and compares them with tools/plan.py, for three kinds of run.

No fault is planted. Prints for each run: calls and bytes by kind, counted and planned; then bytes of weights and
gradients on rank 0, counted and planned.
"""

import json

import torch
from helpers import model_loss, small_model
from torch.utils._python_dispatch import TorchDispatchMode

import fsdp
from ops import forecast
from ops.memory import local
from ranks import processes, tp
from tools import plan

KINDS = "allgather", "reducescatter", "allreduce"


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


def built(use_lora, checkpointing, ranks):
    """(a model split over the ranks, its forecast.PlannedRun)."""
    with torch.device("meta"):
        model = small_model(use_lora, tp_size=2, model_type="qwen3", tie_word_embeddings=False)
    parameters = tuple(
        (n, tuple(p.shape), p.element_size(), p.requires_grad) for n, p in model.named_parameters())
    checkpointed_blocks = model.config.num_hidden_layers * checkpointing
    run = forecast.PlannedRun(
        model.config, parameters, 300, batch_size=4, world_size=4, tp=2, checkpointed_blocks=checkpointed_blocks)
    model.model.checkpointed_blocks = checkpointed_blocks
    tp.split(model, ranks.mesh["tp"])
    fsdp.shard(model, ranks, bf16=False, param_offload=False)
    model.to_empty(device="cpu")
    for p in model.parameters():
        torch.nn.init.normal_(local(p), std=0.02)
    return model, run


def counted(model):
    """{kind: (calls, bytes)} of a step of two micro-batches."""
    tokens = torch.arange(300) + 3
    model_loss(model, tokens, (300,), tokens).backward()  # FSDP2's first call has extra collectives
    for p in model.parameters():
        p.grad = None
    with Bytes() as mode:
        for is_last in (False, True):
            fsdp.set_gradient_sync(model, is_last)
            model_loss(model, tokens, (300,), tokens).backward()
    return mode.counts


def planned(run):
    sums = {}
    for name, (calls, size, _) in plan.collectives(run).items():
        kind = next(k for k in KINDS if k in name.replace("-", ""))
        sums[kind] = tuple(a + b for a, b in zip(sums.get(kind, (0, 0)), (calls, size)))
    return sums


results = []
with processes.start(2, 60) as ranks:
    for use_lora, checkpointing in ((False, True), (False, False), (True, True)):
        model, run = built(use_lora, checkpointing, ranks)
        weights = sum(local(p).numel() * 4 for p in model.parameters())
        counts = counted(model)
        gradients = sum(local(p.grad).numel() * 4 for p in model.parameters() if p.requires_grad)
        states = forecast.states(run)
        results.append([counts, planned(run), [weights, gradients], [states["weights"], states["gradients"]]])
    if ranks.rank == 0:
        print("RESULT " + json.dumps(results))
