"""docs/fork.md: each of its diffs applies to the code as it is, and what comes of it does what the text says."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT

FIRST = """
import json, math, os, sys
import torch
import torch.nn.functional as F
TINY = os.path.join("models", "tiny")
def lines(directory):
    with open(os.path.join(directory, "metrics.jsonl")) as f:
        return [json.loads(line) for line in f]
def run(*flags):
    import sft
    sys.argv = ["sft.py", "--model", "tiny", "--batch_size", "8", "--cache_dir", "none", *map(str, flags)]
    sft.main()
"""
CHECKS = {
    "Another loss": """
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
run("--max_steps", 2, "--output_dir", "out")
""",
    "Another optimizer": """
flags = ("--lr", "1e-4", "--grad_clip", 0, "--weight_decay", 0.1, "--save_steps", 1)
run(*flags, "--max_steps", 4, "--output_dir", "straight")
run(*flags, "--max_steps", 4, "--output_dir", "again", "--save_steps", 2)
import shutil
shutil.rmtree("again/checkpoints/step_4")
os.remove("again/checkpoints/latest")
run(*flags, "--max_steps", 4, "--output_dir", "again", "--save_steps", 2, "--resume_from", "auto")
assert [line["loss"] for line in lines("straight")] == [line["loss"] for line in lines("again")]
from safetensors.torch import load_file
state = load_file("straight/checkpoints/step_1/training_state/tensors.safetensors")
assert not any(name.startswith("exp_avg_sq") for name in state)
start = load_file(os.path.join(TINY, "model.safetensors"))
name = "model.layers.0.mlp.up_proj.weight"
rate = lines("straight")[0]["lr"]
moved = state["master." + name] - start[name].float() * (1 - rate * 0.1)
assert torch.allclose(moved.abs(), torch.tensor(rate), rtol=1e-3)  # a step of Lion is a sign
assert torch.equal(moved.sign(), -state["exp_avg." + name].sign())
""",
    "Another model family": """
from transformers import AutoModelForCausalLM, SmolLM3Config
from families.config import ModelConfig
from model import CausalLM
torch.manual_seed(0)
config = SmolLM3Config(hidden_size=64, intermediate_size=96, num_hidden_layers=5, num_attention_heads=4, vocab_size=99,
                       num_key_value_heads=2, pad_token_id=0, bos_token_id=0, eos_token_id=0)
assert config.no_rope_layers == [1, 1, 1, 0, 1]
theirs = AutoModelForCausalLM.from_config(config).eval()
ours = CausalLM(ModelConfig.from_dict(json.loads(config.to_json_string())))
ours.load_state_dict(theirs.state_dict())
tokens = torch.randint(0, 99, (40,))
with torch.no_grad():
    torch.testing.assert_close(ours(tokens, (40,)), theirs(tokens[None]).logits[0], rtol=1e-4, atol=1e-4)
""",
    "Another data format": """
row = {"instruction": "Who?", "context": "Ada wrote it.", "response": "Ada.", "category": "closed_qa"}
with open("dolly.jsonl", "w") as f:
    f.write(json.dumps(row) + chr(10) + json.dumps({**row, "context": ""}) + chr(10))
from text.formats import read_files, to_messages
found = [to_messages(row, where) for where, row in read_files("dolly.jsonl")]
assert [m[0]["content"] for m in found] == ["Ada wrote it.\\n\\nWho?", "Who?"] and found[0][1]["content"] == "Ada."
run("--train_data", "dolly.jsonl", "--max_steps", 1, "--output_dir", "out")
assert lines("out")[0]["target_tokens"] > 4
""",
    "Another schedule": """
run("--scheduler", "wsd", "--max_steps", 20, "--lr", 1e-3, "--warmup_ratio", 0.1, "--output_dir", "out")
rates = [line["lr"] for line in lines("out")]
assert rates[:2] == [5e-4, 1e-3] and rates[2:16] == [1e-3] * 14  # 14 of the 18 after the warm-up, and then down
assert all(a > b for a, b in zip(rates[16:], rates[17:])) and 0 < rates[-1] < 4e-4
""",
}


def sections():
    """heading -> diff"""
    with open(os.path.join(ROOT, "docs", "fork.md"), encoding="utf-8") as f:
        parts = re.split(r"^## ", f.read(), flags=re.M)[1:]
    return {part.splitlines()[0]: re.search(r"^```diff\n(.*?)^```", part, re.S | re.M)[1] for part in parts}


def test_every_change_of_the_page_is_checked():
    assert list(sections()) == list(CHECKS)
    assert all(diff.count("\n+") - diff.count("\n+++") < 25 for diff in sections().values())  # short ones


@pytest.mark.parametrize("name", CHECKS)
def test_the_change_applies_and_works(tmp_path, pytestconfig, name):
    """In a copy of the project, by git apply, as the page says; and, with --full, the check fails without the change."""
    for entry in os.listdir(ROOT):
        path = os.path.join(ROOT, entry)
        if entry in ("data", "models", "assets"):
            shutil.copytree(path, tmp_path / entry)
        elif entry.endswith(".py"):
            shutil.copy(path, tmp_path)
    (tmp_path / "change.diff").write_text(sections()[name], encoding="utf-8")
    (tmp_path / "check.py").write_text(FIRST + CHECKS[name], encoding="utf-8")
    env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    check = [sys.executable, "check.py"]
    if pytestconfig.getoption("--full"):
        assert subprocess.run(check, cwd=tmp_path, env=env, capture_output=True).returncode != 0
        for left in ("out", "straight", "again"):
            shutil.rmtree(tmp_path / left, ignore_errors=True)
    applied = subprocess.run(["git", "apply", "change.diff"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert applied.returncode == 0, applied.stderr
    result = subprocess.run(check, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
