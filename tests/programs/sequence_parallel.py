"""The sequence parallelism of whole models against one rank, on four: sequence_parallel.py CASES.json ROWS.json MODE

CASES {name: config.json}; MODE is eager or compiled. No fault is planted. Prints for each sp the numbers of the ranks'
tokens, [rank, sp_rank, tokens_rank], and for each case the largest relative differences of the loss, of the number of
correct targets and of the gradients, and whether generation gives the same tokens.
"""

import functools
import json
import sys

import numpy as np
import torch
import torch.distributed as dist
from helpers import TINY

import data
from families.config import ModelConfig
from families.registry import causal_lm
from model import generate
from ranks import processes, sp
from text.template import ChatTokenizer

with open(sys.argv[1], encoding="utf-8") as f:
    CASES = json.load(f)
COMPILED = sys.argv[3] == "compiled"
if COMPILED:
    torch.compile = functools.partial(torch.compile, backend="aot_eager")


def step(net, batch):
    """Loss, number of correct targets, and gradients of a micro-batch."""
    out = net(batch.tokens, batch.documents, batch.target_positions, batch.targets, batch.weights)
    out.total.backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters() if p.requires_grad]
    net.zero_grad(set_to_none=True)
    return [out.total.detach(), out.correct.sum().double(), *gradients]


def build(config, compiled):
    torch.manual_seed(0)
    net = causal_lm(config)(config, checkpointed_blocks=1, compiled=compiled)
    for name, p in net.named_parameters():
        torch.nn.init.normal_(p, 1.0 if "norm" in name else 0.0, 0.3)
    return net.double()


def differences(config, dataset, ranks):
    """[difference of the loss, of correct targets, of gradients, whether generation is the same] of sp and one rank."""
    # the last one is a micro-batch without a conversation
    groups = [np.array(ids, dtype=int) for ids in ([0, 1, 2, 3, 4], [5, 6], [])]
    alone, net = build(config, compiled=False), build(config, COMPILED)
    sp.split(net, ranks)
    worst = [0.0, 0.0, 0.0]
    for ids in groups:
        expected = step(alone, data.collate(dataset, ids))
        result = step(net, data.collate(dataset, ids, False, ranks.sp_rank, ranks.sp_size))
        for tensor in result:
            dist.all_reduce(tensor, group=ranks.sp_group)
        scale = max(1e-3, *(x.norm().item() for x in expected[2:]))
        relative = [(a - b).norm().item() / max(b.norm().item(), 1e-3 * scale)
                    for a, b in zip(result, expected, strict=True)]
        worst = [*map(max, worst, relative[:2]), max(worst[2], *relative[2:])]
    prompt = dataset.tokens[:9].tolist()
    answers = [list(generate(model.eval(), prompt, 3, ())) for model in (alone, net)]
    return *worst, answers[0] == answers[1]


results = {}
for sp_size in (2, 4):
    if results:  # the next start() must not take this process for one of another run
        ranks.watchdog.close()
    ranks = processes.start(1, 60, sp=sp_size)
    dataset = data.load(sys.argv[2], ChatTokenizer(TINY), 64)
    places = [None] * ranks.world_size
    dist.all_gather_object(places, [ranks.rank, ranks.sp_rank, ranks.tokens_rank])
    results[sp_size] = {"places": places, **{name: differences(ModelConfig.from_dict(config), dataset, ranks)
                                             for name, config in CASES.items()}}
if ranks.rank == 0:
    print("RESULT " + json.dumps(results))
with ranks:  # leaving waits for the other ranks
    pass
