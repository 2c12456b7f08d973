"""docs/fork.md, another optimizer: with --optimizer lion, offloaded or not, a killed run resumes exactly and
one moment is saved; a step is a sign; two ranks do the same. Starts in a copy that has the change."""

import os
import signal

import pytest
import torch
from helpers import TINY, metrics, sft_main, tensors_of
from ranks_of import run

import sft
from ops import optim

FLAGS = ("--model", TINY, "--optimizer", "lion", "--batch_size", "2", "--cache_dir", "none", "--lr", "1e-4",
         "--grad_clip", "0.5", "--weight_decay", "0.1", "--max_steps", "4")
OFFLOAD = ((), ("--optimizer_offload",))


def killed(*flags):
    """A run that gets SIGKILL in its fourth update."""
    step = optim.Lion.step

    def step_or_die(self, grad_scale=None, skip=None):
        if self.updates == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        step(self, grad_scale, skip)

    child = os.fork()
    if child == 0:
        optim.Lion.step = step_or_die
        sft_main(*flags)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


# forks first, while this process has no threads
for i, offload in enumerate(OFFLOAD):
    killed(*FLAGS, *offload, "--output_dir", f"again{i}", "--save_steps", "2")
run(2, [sft.__file__, *FLAGS, "--output_dir", "ranks"])

for i, offload in enumerate(OFFLOAD):
    sft_main(*FLAGS, *offload, "--output_dir", f"straight{i}", "--save_steps", 1,
             "--keep_checkpoints", "all")
    sft_main(*FLAGS, *offload, "--output_dir", f"again{i}", "--save_steps", 2, "--resume_from", "auto")
    losses = [line["loss"] for line in metrics(f"straight{i}")]
    assert [line["loss"] for line in metrics(f"again{i}")] == losses
    for inner in ("", "training_state"):
        straight, again = (tensors_of(os.path.join(f"{name}{i}", "checkpoints", "step_4", inner))
                           for name in ("straight", "again"))
        assert straight.keys() == again.keys() and all(torch.equal(straight[n], again[n]) for n in straight)
    assert {name.split(".")[0] for name in again} == {"exp_avg", "master"}
assert [line["loss"] for line in metrics("ranks")] == pytest.approx(losses, rel=1e-3)

state = tensors_of("straight0/checkpoints/step_1/training_state")
name, rate = "model.layers.0.mlp.up_proj.weight", metrics("straight0")[0]["lr"]
moved = state["master." + name] - tensors_of(TINY)[name].float() * (1 - rate * 0.1)
assert torch.allclose(moved.abs(), torch.tensor(rate), rtol=1e-3)
assert torch.equal(moved.sign(), -state["exp_avg." + name].sign())
