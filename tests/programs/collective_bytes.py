"""Counts the collectives of four ranks, dp 2 x tp 2, and what tools/plan.py says of them, for three kinds of run.

Nothing is planted. Prints for each: calls and bytes by kind, the same as planned, elements held, the same as planned.
"""

import json

import torch
from helpers import model_loss, small_model
from torch.utils._python_dispatch import TorchDispatchMode

import fsdp
from ops.memory import local
from ranks import processes, tp
from tools import plan

KINDS = "allgather", "reducescatter", "allreduce"


class Bytes(TorchDispatchMode):
    """Calls and bytes of each collective, as it is called: the whole tensor that is gathered, scattered or summed."""

    def __init__(self):
        super().__init__()
        self.found = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name.startswith(("c10d::", "_c10d_functional::")) and "wait" not in name and "wrap" not in name:
            kind = next(k for k in KINDS if k in name.replace("_", ""))
            tensor = args[1] if kind == "reducescatter" and name.startswith("c10d::") else args[0]
            tensor = tensor[0] if isinstance(tensor, (list, tuple)) else tensor
            calls, size = self.found.get(kind, (0, 0))
            self.found[kind] = calls + 1, size + tensor.numel() * tensor.element_size()
        return func(*args, **(kwargs or {}))


def built(use_lora, checkpointing, ranks):
    """(a model split over the ranks, its plan.Layout)."""
    with torch.device("meta"):
        model = small_model(use_lora, model_type="qwen3", tie_word_embeddings=False)
    layout = plan.Layout(model.config, tuple((n, tuple(p.shape), p.element_size(), p.requires_grad)
                                             for n, p in model.named_parameters()),
                         300, batch=4, ranks=4, tp=2, checkpointing=checkpointing)
    model.model.gradient_checkpointing = checkpointing
    tp.split(model, ranks.mesh["tp"])
    fsdp.shard(model, ranks, bf16=False, param_offload=False)
    model.to_empty(device="cpu")
    for p in model.parameters():
        torch.nn.init.normal_(local(p), std=0.02)
    return model, layout


def counted(model):
    """Calls and bytes by kind, of two micro-batches."""
    tokens = torch.arange(300) + 3
    model_loss(model, tokens, (300,), tokens).backward()  # the first call sets up
    for p in model.parameters():
        p.grad = None
    with Bytes() as mode:
        for last in (False, True):
            fsdp.set_gradient_sync(model, enabled=last)
            model_loss(model, tokens, (300,), tokens).backward()
    return mode.found


def planned(layout):
    sums = {}
    for what, (calls, size, _) in plan.collectives(layout).items():
        kind = next(k for k in KINDS if k in what.replace("-", ""))
        sums[kind] = tuple(a + b for a, b in zip(sums.get(kind, (0, 0)), (calls, size)))
    return sums


results = []
with processes.start(2, 60) as ranks:
    for use_lora, checkpointing in ((False, True), (False, False), (True, True)):
        model, layout = built(use_lora, checkpointing, ranks)
        held = sum(local(p).numel() * 4 for p in model.parameters())
        found = counted(model)
        gradients = sum(local(p.grad).numel() * 4 for p in model.parameters() if p.requires_grad)
        states = plan.states(layout)
        results.append([found, planned(layout), [held, gradients], [states["weights"], states["gradients"]]])
    if ranks.rank == 0:
        print("RESULT " + json.dumps(results))
