"""docs/fork.md, another loss: with --loss dft value and gradients are DFT's, and a run has the same numbers with
tensor parallelism; val_loss and the default stay the cross-entropy. Starts in a copy that has the change."""

import pytest
import torch
import torch.nn.functional as F
from helpers import EXAMPLES, TINY, metrics, sft_main
from ranks_of import run

import sft
from ops.loss import CHUNK, Head, loss

FLAGS = ("--model", TINY, "--batch_size", "8", "--cache_dir", "none", "--max_steps", "2", "--lr", "1e-3")
DFT = ("--loss", "dft")
run(2, [sft.__file__, *FLAGS, *DFT, "--strategy", "megatron", "--tp", "2", "--output_dir", "tp"])
sft_main(*FLAGS, *DFT, "--output_dir", "out")
for ours, theirs in zip(metrics("tp"), metrics("out"), strict=True):
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)

torch.manual_seed(0)
n = CHUNK + 50  # two chunks, of which one is not full
head = Head(8, 30, bias=False)
hidden, targets = torch.randn(n, 8, requires_grad=True), torch.randint(0, 30, (n,))
plain = loss(hidden, head, torch.arange(n), targets)
head.is_dft = True
found = loss(hidden, head, torch.arange(n), targets)
with torch.no_grad():
    assert torch.equal(loss(hidden, head, torch.arange(n), targets).each, plain.each)
nll = F.cross_entropy(head(hidden), targets, reduction="none")
expected = nll * (-nll).exp().detach()
torch.testing.assert_close(plain.each, nll.detach())
torch.testing.assert_close(found.each, expected.detach())
gradients = (torch.autograd.grad(total, (hidden, head.weight)) for total in (found.total, expected.sum()))
for ours, theirs in zip(*gradients):
    torch.testing.assert_close(ours, theirs)

# val_loss is the cross-entropy of the weights: at a learning rate of 0, the loss of a run without --loss
same = ("--model", TINY, "--cache_dir", "none", "--max_steps", 1, "--lr", 0, "--batch_size", 100,
        "--val_data", EXAMPLES)
sft_main(*same, *DFT, "--output_dir", "zero_dft")
sft_main(*same, "--output_dir", "zero")
(dft, _), (plain, _), (_, validated) = metrics("zero_dft"), metrics("zero"), metrics("zero_dft")
assert validated["val_loss"] == pytest.approx(plain["loss"], rel=1e-5) and dft["loss"] < plain["loss"] / 2
