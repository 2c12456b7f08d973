"""A step that is not finite: non_finite.py TOKENS.json HOW [flags of sft.py]; plant() is also called inside a test.

Planted: wherever a micro-batch has the conversation of these tokens, its loss and the conversation's own are NaN (HOW
is loss), or the gradient of the micro-batch is infinite while the loss is not (gradient).
"""

import json
import math
import sys

import torch

import sft
from settings import errors


def plant(tokens, how):
    forward, wanted = sft.CausalLM.forward, torch.tensor(tokens)

    def faulty(self, tokens, doc_lengths, target_positions, targets):
        out, ends = forward(self, tokens, doc_lengths, target_positions, targets), torch.tensor(doc_lengths).cumsum(0)
        hit = [i for i, part in enumerate(tokens.split(doc_lengths)) if torch.equal(part, wanted)]
        if hit and how == "loss":
            each = out.each.masked_fill(torch.searchsorted(ends, target_positions, right=True) == hit[0], math.nan)
            return out._replace(total=out.total * math.nan, each=each)
        if hit:
            out.total.register_hook(lambda grad: grad * math.inf)
        return out

    sft.CausalLM.forward = faulty


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as f:
        plant(json.load(f), sys.argv[2])
    sys.argv = ["sft.py", *sys.argv[3:]]
    errors.run(sft.record(sft.main))
