"""docs/fork.md, another loss: value and gradients are DFT's, and a run has the same numbers with tensor
parallelism. Starts in a copy that has the change."""

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, metrics, sft_main
from ranks_of import run

import sft
from ops.loss import CHUNK, Head, loss

FLAGS = ("--model", TINY, "--batch_size", "8", "--cache_dir", "none", "--max_steps", "2", "--lr", "1e-3")
run(2, [sft.__file__, *FLAGS, "--strategy", "megatron", "--tp", "2", "--output_dir", "tp"])
sft_main(*FLAGS, "--output_dir", "out")
for ours, theirs in zip(metrics("tp"), metrics("out"), strict=True):
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)

torch.manual_seed(0)
n = CHUNK + 50  # two chunks, of which one is not full
head = Head(8, 30, bias=False)
hidden, targets = torch.randn(n, 8, requires_grad=True), torch.randint(0, 30, (n,))
found = loss(hidden, head, torch.arange(n), targets)
nll = F.cross_entropy(head(hidden), targets, reduction="none")
expected = nll * (-nll).exp().detach()
torch.testing.assert_close(found.each, expected.detach())
gradients = (torch.autograd.grad(total, (hidden, head.weight)) for total in (found.total, expected.sum()))
for ours, theirs in zip(*gradients):
    torch.testing.assert_close(ours, theirs)
