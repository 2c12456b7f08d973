"""Counts what ranks of a group say to each other: count_collectives.py MODEL TP:full|lora ...

Nothing is planted. For each TP, prints the calls of a forward and a backward pass, first of a micro-batch that is not
a step's last, then of one that is, and how many elements this rank holds of how many.
"""

import json
import sys

import torch
from helpers import model_loss
from torch.distributed.tensor.debug import CommDebugMode

import fsdp
import lora
import sft
from disk import files, peft
from families.config import ModelConfig
from model import CausalLM
from ops.memory import local
from ranks import processes, tp


def built(directory, with_lora, ranks):
    """The model of a directory, split over the ranks, with random values."""
    with torch.device("meta"):
        model = CausalLM(ModelConfig.from_dict(files.read_json(f"{directory}/config.json")))
    if with_lora:
        config, lora_ranks = peft.new(model, sft.Config(use_lora=True, model="base"))
        lora.inject(model, config, lora_ranks, ranks.mesh["tp"].size())
    if ranks.mesh["tp"].size() > 1:
        tp.split(model, ranks.mesh["tp"])
    fsdp.shard(model, ranks, bf16=False, param_offload=False)
    model.to_empty(device="cpu")
    model.tie_weights()
    for p in model.parameters():
        torch.nn.init.normal_(local(p), std=0.02)
    return model


def count(model):
    targets = torch.arange(40) + 3
    batch = targets, (25, 15), targets
    model_loss(model, *batch).backward()  # the first call sets up
    counts = []
    for last in (False, True):
        fsdp.set_gradient_sync(model, enabled=last)
        with CommDebugMode() as forward:
            loss = model_loss(model, *batch)
        with CommDebugMode() as backward:
            loss.backward()
        counts.append([{str(op): n for op, n in mode.get_comm_counts().items()} for mode in (forward, backward)])
    return counts


found = []
for case in sys.argv[2:]:
    size, how = case.split(":")
    ranks = processes.start(int(size), 60)
    model = built(sys.argv[1], how == "lora", ranks)
    held = sum(local(p).numel() for p in model.parameters())
    found.append([count(model), held, sum(p.numel() for p in model.parameters())])
if ranks.rank == 0:
    print("RESULT " + json.dumps(found))
with ranks:  # waits for the others
    pass
