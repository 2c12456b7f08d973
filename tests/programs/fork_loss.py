"""docs/fork.md, another loss: fork_loss.py dft|z_loss|label_smoothing. Starts in a copy that has the change.

Value and gradients of the loss are those of autograd: eager, compiled, weighted, with a soft cap. A run has the same
numbers on two ranks, with packing and without, and with tensor parallelism. val_loss and the default stay the
cross-entropy.
"""

import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import EXAMPLES, TINY, metrics, program_path, sft_main
from ranks_of import run

import ops.loss
import sft
from ops.loss import CHUNK, Head, loss

name = sys.argv[1]
flags, attribute, value = {
    "dft": (["--dft"], "is_dft", 1.0), "z_loss": (["--z_loss", 0.01], "z_loss", 0.01),
    "label_smoothing": (["--label_smoothing", 0.1], "smoothing", 0.1)}[name]
common = ("--model", TINY, "--batch_size", 8, "--cache_dir", "none", "--max_steps", 2, "--lr", 1e-3, *flags)
for out, more in {"tp": ("--strategy", "megatron", "--tp", 2), "dp": ("--no-packing",)}.items():
    run(2, list(map(str, [sft.__file__, *common, *more, "--output_dir", out])))
run(2, [program_path("loss_tp"), attribute, str(value)])
sft_main(*common, "--output_dir", "out")
for line in metrics("out"):
    for out in "tp", "dp":
        other = metrics(out)[line["step"] - 1]
        for key in {"loss", "grad_norm", "z_loss"} & line.keys():
            assert other[key] == pytest.approx(line[key], rel=1e-4 if key == "grad_norm" else 1e-5), (out, key)
    assert ("z_loss" in line) == (name == "z_loss")


def by_autograd(logits, targets):
    """The loss of each target."""
    nll = F.cross_entropy(logits, targets, reduction="none")
    if name == "dft":
        return nll * (-nll).exp().detach()
    if name == "z_loss":
        return nll + 0.01 * logits.logsumexp(dim=1).square()
    return F.cross_entropy(logits, targets, reduction="none", label_smoothing=0.1)


torch.manual_seed(0)
n, fused = CHUNK + 50, ops.loss.fused_  # two chunks, of which one is not full
for path in "eager", "fused", "compiled":
    ops.loss.has_compiler = lambda device_type: path != "eager"
    if path == "fused":
        compile_fused, ops.loss.compile_fused = ops.loss.compile_fused, lambda: fused
    if path == "compiled":
        ops.loss.compile_fused = compile_fused
    for soft_cap in (None, 2.0) if path != "compiled" else (None,):
        head = Head(8, 30, bias=False).double()
        hidden, targets = torch.randn(n, 8, requires_grad=True, dtype=torch.float64), torch.randint(0, 30, (n,))
        head.soft_cap, weights = soft_cap, torch.randint(0, 4, (n,)) / 2
        given = hidden, head, torch.arange(n), targets, weights
        logits = head(hidden)
        nll = F.cross_entropy(logits, targets, reduction="none")
        torch.testing.assert_close(loss(*given).each, nll.detach())  # the default
        setattr(head, attribute, value)
        with torch.no_grad():
            torch.testing.assert_close(loss(*given).each, nll)
        found, expected = loss(*given), by_autograd(logits, targets)
        torch.testing.assert_close(found.each, expected.detach(), rtol=1e-10, atol=1e-10)
        assert not torch.allclose(found.each, nll.detach(), rtol=1e-3)
        torch.testing.assert_close(found.log_sum, logits.detach().logsumexp(dim=1), rtol=1e-10, atol=1e-10)
        totals = found.total, (expected * weights).sum()
        for ours, theirs in zip(*(torch.autograd.grad(total, (hidden, head.weight)) for total in totals)):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)

# val_loss is the cross-entropy of the weights: at a learning rate of 0, the loss of a run without the flag
ops.loss.has_compiler = lambda device_type: False
same = ("--model", TINY, "--cache_dir", "none", "--max_steps", 1, "--lr", 0, "--batch_size", 100,
        "--val_data", EXAMPLES)
sft_main(*same, *flags, "--output_dir", "zero_changed")
sft_main(*same, "--output_dir", "zero")
(changed,), (plain,) = ([line for line in metrics(out) if "loss" in line] for out in ("zero_changed", "zero"))
validated = metrics("zero_changed")[-1]
assert validated["val_loss"] == pytest.approx(plain["loss"], rel=1e-5)
assert changed["grad_norm"] != pytest.approx(plain["grad_norm"], rel=1e-3)
if name == "z_loss":  # logged apart: without it, the loss is the cross-entropy
    assert changed["loss"] - changed["z_loss"] == pytest.approx(plain["loss"], rel=1e-5)
