"""A run with a step that is not finite: non_finite.py TOKENS.json HOW [flags of sft.py]. A test also calls plant().

Planted: if a micro-batch contains the conversation with these tokens, its loss and that of the conversation are NaN
(HOW is loss), or its gradient is infinite while its loss is finite (gradient).
"""

import json
import math
import sys

import torch

import sft
from model import CausalLM
from settings import errors


def plant(tokens, how):
    forward, faulty_conversation = CausalLM.forward, torch.tensor(tokens)

    def faulty(self, tokens, documents, target_positions, targets, weights):
        out = forward(self, tokens, documents, target_positions, targets, weights)
        conversations = enumerate(tokens.split(documents.lengths))
        hits = [i for i, conversation in conversations if torch.equal(conversation, faulty_conversation)]
        if hits and how == "loss":
            ends = torch.tensor(documents.lengths).cumsum(0)
            owners = torch.searchsorted(ends, target_positions, right=True)
            each = out.each.masked_fill(owners == hits[0], math.nan)
            return out._replace(total=out.total * math.nan, each=each)
        if hits:
            out.total.register_hook(lambda grad: grad * math.inf)
        return out

    CausalLM.forward = faulty


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as f:
        plant(json.load(f), sys.argv[2])
    sys.argv = ["sft.py", *sys.argv[3:]]
    errors.run(sft.main)
