"""docs/fork.md, another optimizer: resume is exact, one moment is saved, a step is a sign. Starts in a copy that has the
change."""

import os
import shutil

import torch
from helpers import TINY, metrics, sft_main
from safetensors.torch import load_file

FLAGS = ("--model", TINY, "--batch_size", 8, "--cache_dir", "none", "--lr", "1e-4", "--grad_clip", 0, "--weight_decay", 0.1,
         "--max_steps", 4, "--no-gradient_checkpointing")
AGAIN = (*FLAGS, "--output_dir", "again", "--save_steps", 2)

sft_main(*FLAGS, "--output_dir", "straight", "--save_steps", 1)
sft_main(*AGAIN)
shutil.rmtree("again/checkpoints/step_4")
os.remove("again/checkpoints/latest")
sft_main(*AGAIN, "--resume_from", "auto")
lines = metrics("straight")
assert [line["loss"] for line in lines] == [line["loss"] for line in metrics("again")]

state = load_file("straight/checkpoints/step_1/training_state/tensors.safetensors")
assert not any(name.startswith("exp_avg_sq") for name in state)
start = load_file(os.path.join(TINY, "model.safetensors"))
name, rate = "model.layers.0.mlp.up_proj.weight", lines[0]["lr"]
moved = state["master." + name] - start[name].float() * (1 - rate * 0.1)
assert torch.allclose(moved.abs(), torch.tensor(rate), rtol=1e-3)
assert torch.equal(moved.sign(), -state["exp_avg." + name].sign())
