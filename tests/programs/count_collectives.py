"""Counts the collectives of a micro-batch, and what is in memory: count_collectives.py CASE ..., under torchrun

A case is a JSON object: the directory of a "model"; and, if they are not 1, false and "step", "tp", "replicas",
"use_lora" and "gradient_reduction". No fault is planted. Prints for each case a JSON object:

    counts      collectives of [forward, backward] of a micro-batch that is not the last of its step, and of the last
    held        elements of the parameters that rank 0 holds, and `parameters`, how many there are
    evaluated   elements that it holds after an evaluation and an answer to a prompt
    gradient    elements of all that is new in memory between the two micro-batches
    reduced     elements of the gradient's shards after the last one
"""

import gc
import json
import sys
import warnings

import torch
from helpers import model_loss
from torch.distributed.tensor.debug import CommDebugMode

import fsdp
import lora
import sft
from disk import files, peft
from families.config import ModelConfig
from model import CausalLM, generate
from ops.memory import local
from ranks import processes, tp


def built(ranks, model, use_lora=False, gradient_reduction="step", **_):
    """The model of a directory, split over the ranks, with random weights."""
    with torch.device("meta"):
        model = CausalLM(ModelConfig.from_dict(files.read_json(f"{model}/config.json")))
    if use_lora:
        config, lora_ranks = peft.new(model, sft.Config(use_lora=True, model="base"))
        lora.inject(model, config, lora_ranks, ranks.mesh["tp"].size())
    if ranks.mesh["tp"].size() > 1:
        tp.split(model, ranks.mesh["tp"])
    fsdp.shard(model, ranks, bf16=False, param_offload=False, gradient_reduction=gradient_reduction)
    model.to_empty(device="cpu")
    model.tie_weights()
    for p in model.parameters():
        torch.nn.init.normal_(local(p), std=0.02)
    return model


def elements(model):
    """Elements of the parameters that this rank holds."""
    return sum(local(p).numel() for p in model.parameters())


def in_memory():
    """Elements of all fp32 tensors of this process."""
    gc.collect()
    found = {}
    for tensor in [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]:
        for t in (tensor, tensor.grad if tensor.is_leaf else None):
            if t is not None and t.dtype == torch.float32 and t.device.type == "cpu":
                storage = local(t).untyped_storage()
                found[storage.data_ptr()] = storage.nbytes() // 4
    return sum(found.values())


def measured(model):
    targets = torch.arange(40) + 3
    batch = targets, (25, 15), targets
    for _ in range(2):  # FSDP2's first call has extra collectives, and the first to reduce often makes its buffers
        model_loss(model, *batch).backward()
        for p in model.parameters():
            p.grad = None
    counts, before = [], in_memory()
    for is_last in (False, True):
        fsdp.set_gradient_sync(model, is_last)
        with CommDebugMode() as forward:
            loss = model_loss(model, *batch)
        with CommDebugMode() as backward:
            loss.backward()
        counts.append([{str(op): n for op, n in mode.get_comm_counts().items()} for mode in (forward, backward)])
        if not is_last:
            del loss, forward, backward
            gradient = in_memory() - before
    held = elements(model)
    with torch.no_grad(), fsdp.evaluation(model):
        model_loss(model, *batch)
        assert len(list(generate(model, [3, 4, 5], 2, ()))) == 2
    return dict(counts=counts, held=held, evaluated=elements(model), gradient=gradient,
                reduced=sum(local(p.grad).numel() for p in model.parameters() if p.grad is not None),
                parameters=sum(p.numel() for p in model.parameters()))


# CommDebugMode makes views of what modules return
warnings.filterwarnings("ignore", "FSDP2-wrapped module")
results = []
for case in map(json.loads, sys.argv[1:]):
    if results:  # the next start() must not take this process for one of another run
        ranks.watchdog.close()
    ranks = processes.start(case.get("tp", 1), 60, replicas=case.get("replicas", 1))
    results.append(measured(built(ranks, **case)))
if ranks.rank == 0:
    print("RESULT " + json.dumps(results))
with ranks:  # leaving waits for the other ranks
    pass
