"""Counts the collectives of a micro-batch: count_collectives.py MODEL TP:full|lora ..., under torchrun

No fault is planted. Prints for each TP:full|lora: the collectives of forward and of backward, for a micro-batch that
is not the last of its step and for the last one; how many elements rank 0 holds; how many the model has.
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


def built(directory, use_lora, ranks):
    """The model of a directory, split over the ranks, with random weights."""
    with torch.device("meta"):
        model = CausalLM(ModelConfig.from_dict(files.read_json(f"{directory}/config.json")))
    if use_lora:
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
    model_loss(model, *batch).backward()  # FSDP2's first call has extra collectives
    counts = []
    for is_last in (False, True):
        fsdp.set_gradient_sync(model, is_last)
        with CommDebugMode() as forward:
            loss = model_loss(model, *batch)
        with CommDebugMode() as backward:
            loss.backward()
        counts.append([{str(op): n for op, n in mode.get_comm_counts().items()} for mode in (forward, backward)])
    return counts


results = []
for case in sys.argv[2:]:
    tp_size, how = case.split(":")
    if results:  # the next start() must not take this process for one of another run
        ranks.watchdog.close()
    ranks = processes.start(int(tp_size), 60)
    model = built(sys.argv[1], how == "lora", ranks)
    n_held = sum(local(p).numel() for p in model.parameters())
    results.append([count(model), n_held, sum(p.numel() for p in model.parameters())])
if ranks.rank == 0:
    print("RESULT " + json.dumps(results))
with ranks:  # leaving waits for the other ranks
    pass
