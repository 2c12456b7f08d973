"""docs/fork.md, another optimizer: with --use_muon a killed run resumes exactly; several ranks, with FSDP2 and tp, train
what one does; an update equals its definition by the SVD; a skipped update changes no bit; no step waits for the device; the
forecast counts one moment for matrices. Starts in a copy that has the change."""

import os
import signal

import pytest
import torch
from helpers import TINY, metrics, sft_main, tensors_of
from ranks_of import run

import sft
from disk.run import ModelPaths
from ops import forecast, optim
from ranks import processes
from settings.errors import UserError

FLAGS = ("--model", TINY, "--use_muon", "--batch_size", "4", "--cache_dir", "none", "--lr", "1e-3", "--dtype", "fp32",
         "--grad_clip", "0.5", "--weight_decay", "0.1", "--max_steps", "4", "--save_steps", "1",
         "--keep_checkpoints", "all")
CFG = sft.Config(model=TINY, use_muon=True)


def state(run, step):
    """The optimizer's state and the fp32 weights of a step directory."""
    return tensors_of(os.path.join(run, "checkpoints", f"step_{step}", "training_state"))


def killed(*flags):
    """A run that gets SIGKILL in its fourth update."""
    step = optim.Muon.step

    def step_or_die(self, grad_scale=None, skip=None):
        if self.updates == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        step(self, grad_scale, skip)

    child = os.fork()
    if child == 0:
        optim.Muon.step = step_or_die
        sft_main(*flags)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


# forks first, while this process has no threads
killed(*FLAGS, "--output_dir", "again")
TP = ("--strategy", "megatron", "--tp", "2")
LAYOUTS = {"fsdp": (2, ()), "uneven": (3, ()), "tp": (2, TP), "both": (4, TP)}  # name: (ranks, flags)
for name, (n_ranks, flags) in LAYOUTS.items():
    run(n_ranks, [sft.__file__, *FLAGS, *flags, "--output_dir", name])
sft_main(*FLAGS, "--output_dir", "straight")
sft_main(*FLAGS, "--output_dir", "again", "--resume_from", "auto")
sft_main(*FLAGS, "--output_dir", "bf16", "--dtype", "bf16")

losses = [line["loss"] for line in metrics("straight")]
last, first = state("straight", 4), state("straight", 1)
assert [line["loss"] for line in metrics("again")] == losses
assert last.keys() == state("again", 4).keys() and all(torch.equal(t, last[n]) for n, t in state("again", 4).items())
assert [line["loss"] for line in metrics("bf16")] == pytest.approx(losses, rel=1e-2)
for name in LAYOUTS:
    assert [line["loss"] for line in metrics(name)] == pytest.approx(losses, rel=1e-5), name
    other = state(name, 1)
    assert other.keys() == first.keys()
    for key, tensor in first.items():
        before = tensors_of(TINY)[key.partition(".")[2]].float() if key.startswith("master.") else 0
        # Newton-Schulz multiplies small singular values, and what was rounded of them, by 3.4^5
        assert (other[key] - tensor).norm() <= 1e-3 * (tensor - before).norm(), (name, key)

# the first update: five times the polynomial on the singular values. The momentum is a multiple of the gradient
rate = metrics("straight")[0]["lr"]
for name, before in tensors_of(TINY).items():
    is_muon = ".layers." in name and before.ndim == 2
    assert {key.split(".")[0] for key in first if key.endswith("." + name)} == (
        {"momentum", "master"} if is_muon else {"exp_avg", "exp_avg_sq", "master"})
    if is_muon:
        u, s, v = torch.linalg.svd(first["momentum." + name].double(), full_matrices=False)
        s = s / s.norm()
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        assert s.max() < 1.3
        expected = before.double() * (1 - rate * 0.1) - rate * 0.2 * max(before.shape) ** 0.5 * (u * s) @ v
        assert (first["master." + name] - expected).norm() <= 1e-4 * (expected - before).norm(), name

# the size of the state, in the forecast as in the checkpoint
meta = processes.single_process(torch.device("meta"))
model, _ = sft.build(CFG, ModelPaths.find(TINY), meta)
planned = forecast.PlannedRun.of(model, CFG, world_size=1, cuda=False)
assert forecast.states(planned)["moments"] == sum(4 * t.numel() for n, t in first.items() if not n.startswith("master."))

# a step on meta: it would raise where the host reads a number
optimizer = optim.create(model, CFG)
for p in model.parameters():
    p.grad = torch.empty_like(p)
optim.update(optimizer, torch.ones((), device="meta"), torch.ones((), device="meta"), lr=1.0, grad_clip=1.0, norm_limit=3.0)

# a skipped update, by a gradient that is not finite
p = torch.nn.Parameter(torch.randn(6, 9))
optimizer = optim.Muon([dict(params=[p], weight_decay=0.1, lr_ratio=1.0, is_muon=True)], lr=0.1, betas=(0.9, 0.95), eps=1e-8)
for factor, count in ((1.0, 1), (float("nan"), 1), (1.0, 2)):
    before = [p.detach().clone(), *(t.clone() for t in optimizer.state_of(p).values())]
    p.grad = torch.ones(6, 9) * factor
    optim.update(optimizer, torch.tensor(1.0), p.grad.norm(), lr=0.1, grad_clip=1.0)
    same = [torch.equal(a, b) for a, b in zip(before, (p, *optimizer.state_of(p).values()), strict=True)]
    assert same == [factor != factor] * 2 and optimizer.updates == count

for flag in ("--optimizer_offload", "--param_offload", "--use_lora"):
    with pytest.raises(UserError, match=f"--use_muon does not work with {flag}"):
        sft_main(*FLAGS, flag, "--output_dir", "refused")
