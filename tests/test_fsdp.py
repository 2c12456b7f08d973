"""Many ranks: the same losses, weights and checkpoints on any layout; what is communicated; where tensors lie.

Ranks are gloo processes on the CPU, one thread each.
"""

import itertools
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_sft import EXAMPLES, TINY

import checkpoint

RUN = ("--train_data", EXAMPLES, "--lr", "1e-3", "--batch_size", "10", "--max_length", "256", "--max_steps", "10",
       "--timeout", "60")
LAYOUTS = {  # name: (ranks, flags)
    "one": (1, ()), "dp2": (2, ()), "tp2": (2, ("--strategy", "megatron", "--tp", "2")), "dp4": (4, ("--strategy", "fsdp2")),
    "dp2tp2": (4, ("--strategy", "megatron", "--tp", "2")), "tp4": (4, ("--strategy", "megatron", "--tp", "4")),
}


def torchrun(ranks, *words, **options):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", "0",
               "--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def metrics(directory):
    with open(os.path.join(directory, "metrics.jsonl"), encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def tensors_of(directory):
    """All tensors of a model directory or training_state, whatever files they are in."""
    found = {}
    for file in sorted(os.listdir(directory)):
        if file.endswith(".safetensors"):
            found.update(load_file(os.path.join(directory, file)))
    return found


@pytest.fixture(scope="session")
def four_heads(tmp_path_factory):
    """models/tiny with four key/value heads, q/k norm (qwen3) and an untied head: what tp 4 and norms need."""
    directory = tmp_path_factory.mktemp("four_heads")
    for file in os.listdir(TINY):
        if file.startswith("tokenizer"):
            (directory / file).write_bytes(open(os.path.join(TINY, file), "rb").read())
    config = checkpoint.read_json(os.path.join(TINY, "config.json"))
    config.update(model_type="qwen3", num_key_value_heads=4, head_dim=32, tie_word_embeddings=False, num_hidden_layers=2)
    (directory / "config.json").write_text(json.dumps(config))
    import sft

    torch.manual_seed(1)
    model = sft.CausalLM(sft.ModelConfig.from_dict(config))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02) if p.ndim > 1 else torch.nn.init.normal_(p, mean=1.0, std=0.1)
    save_file({n: p.detach() for n, p in model.named_parameters()}, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.fixture(scope="session")
def runs(tmp_path_factory, four_heads):
    """Every axis of the law, pairwise and more: name -> output directory. One process group a number of ranks."""
    root = tmp_path_factory.mktemp("runs")
    offloads = {"": (), "param": ("--param_offload",), "opt": ("--optimizer_offload",)}
    shapes = {"": (), "unpacked": ("--no-packing", "--no-gradient_checkpointing"),
              "plain": ("--no-gradient_checkpointing",)}
    models = {"tied": TINY, "untied": four_heads}
    plans = {1: {f"{model} one  ": ("--model", models[model]) for model in models}, 2: {}, 4: {}}
    for (i, layout), (j, offload) in itertools.product(enumerate(LAYOUTS), enumerate(offloads)):
        ranks, flags = LAYOUTS[layout]
        model = "untied" if (i + j) % 2 or layout == "tp4" else "tied"  # tied: two key/value heads
        shape = list(shapes)[(i + 2 * j) % 3]
        plans[ranks][f"{model} {layout} {offload} {shape}"] = (
            "--model", models[model], *flags, *offloads[offload], *shapes[shape])
    found = {}
    for ranks, plan in plans.items():
        words = []
        for name, flags in plan.items():
            found[name] = root / name.replace(" ", "_")
            words.append([*RUN, *map(str, flags), "--output_dir", str(found[name])])
        file = root / f"{ranks}.json"
        file.write_text(json.dumps(words))
        result = torchrun(ranks, os.path.join(ROOT, "tests", "fsdp_worker.py"), file)
        assert result.returncode == 0, result.stderr[-3000:]
    return found


def test_losses_do_not_depend_on_the_layout(runs):
    """The gradient law over ranks, tp, offload, packing and checkpointing, tied and untied: ten steps, 1e-5 relative."""
    worst = 0
    for name, directory in runs.items():
        base = metrics(runs[f"{name.split()[0]} one  "])
        for a, b in zip(base, metrics(directory), strict=True):
            worst = max(worst, abs(a["loss"] / b["loss"] - 1))
            assert math.isclose(a["loss"], b["loss"], rel_tol=1e-5), (name, a, b)
            assert math.isclose(a["grad_norm"], b["grad_norm"], rel_tol=1e-4), (name, a, b)
            assert a["tokens"] == b["tokens"] and a["target_tokens"] == b["target_tokens"]
    assert len(runs) == 19 and worst > 0  # 18 pairs of layout and offload, one of which is a base, and the other base


def test_checkpoints_do_not_depend_on_the_layout(runs):
    """The last step's directory holds the same tensors, under the same names, with the same moments."""
    for name, directory in runs.items():
        base = runs[f"{name.split()[0]} one  "] / "checkpoints" / "step_10"
        other = directory / "checkpoints" / "step_10"
        for part in ("", "training_state"):
            a, b = tensors_of(base / part), tensors_of(other / part)
            assert set(a) == set(b), name
            for key in a:
                if not key.startswith("rng."):  # Adam divides by what may be near zero, so not element by element
                    off = (a[key].float() - b[key].float()).norm() / a[key].float().norm()
                    assert off < 2e-3, (name, key, off)


def test_every_rank_writes_its_share(runs):
    """Four ranks: four files of about equal size, an index that names them, and transformers loads it."""
    from transformers import AutoModelForCausalLM

    step = next(runs[name] for name in runs if name.startswith("untied dp4")) / "checkpoints" / "step_10"
    files = sorted(f for f in os.listdir(step) if f.endswith(".safetensors"))
    assert len(files) == 4 and files[0] == "model-00001-of-00004.safetensors"
    index = checkpoint.read_json(step / "model.safetensors.index.json")["weight_map"]
    assert set(index.values()) == set(files) and set(index) == set(checkpoint.weight_entries(step))
    theirs = AutoModelForCausalLM.from_pretrained(step, dtype=torch.float32)
    for name, tensor in tensors_of(step).items():
        assert torch.equal(theirs.state_dict()[name], tensor.float()), name
