"""docs/fork.md, another loss: value and gradients are DFT's, and a run works. Starts in a copy that has the change."""

import torch
import torch.nn.functional as F
from helpers import TINY, sft_main

from ops.loss import chunked_cross_entropy

torch.manual_seed(0)
hidden, weight, targets = torch.randn(20, 8), torch.randn(30, 8), torch.randint(0, 30, (20,))
inputs = [[hidden.clone().requires_grad_(), weight.clone().requires_grad_()] for _ in range(2)]
loss = chunked_cross_entropy(*inputs[0], targets, 7)
nll = F.cross_entropy(inputs[1][0] @ inputs[1][1].T, targets, reduction="none")
expected = (nll * (-nll).exp().detach()).sum()
loss.backward(), expected.backward()
torch.testing.assert_close(loss, expected)
for ours, theirs in zip(*inputs):
    torch.testing.assert_close(ours.grad, theirs.grad)
sft_main("--model", TINY, "--batch_size", 8, "--cache_dir", "none", "--max_steps", 2, "--no-gradient_checkpointing",
         "--output_dir", "out")
