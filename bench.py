"""Measure a part of the trainer: python bench.py --part loss prints one JSON line.

loss   the chunked cross-entropy beside a plain one: seconds and peak memory of forward and backward
load   a model directory of random weights: seconds and peak memory of loading it into fp32

Each side runs in a process of its own, as peak memory is the process's; figures of one line come from one run of this
command and are meant as ratios. Nothing here is a test.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import checkpoint
from config import knob, parse, run
from model import IGNORE, CausalLM, ModelConfig, chunked_cross_entropy
from sft import peak_memory_gb

QWEN_05B = dict(model_type="qwen2", hidden_size=896, intermediate_size=4864, num_hidden_layers=24, vocab_size=151936,
                num_attention_heads=14, num_key_value_heads=2, rope_theta=1e6, tie_word_embeddings=True)


@dataclass
class Config:
    """Measure a part of the trainer: python bench.py --part NAME [flags]"""

    part: str = knob("loss", "what to measure", ("loss", "load"), group="bench")
    repeats: int = knob(3, "timed runs after a warm-up; the median is given, with the extremes")
    tokens: int = knob(4096, "loss: rows of the hidden state")
    hidden: int = knob(896, "loss: their width")
    vocab: int = knob(151936, "loss: words")
    targets: float = knob(0.5, "loss: share of the tokens that are targets; the others are prompt")
    side: str | None = knob(None, "do this step only, in this process", ("plain", "chunked", "write", "load"))
    directory: str | None = knob(None, "load: where the model is, for --side")


def timed(action, repeats):
    """seconds [median, least, most] of action(), and the GiB that its first call adds to the process's peak."""
    before = peak_memory_gb(torch.device("cpu"))
    action()
    added = peak_memory_gb(torch.device("cpu")) - before
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return {"seconds": [statistics.median(seconds), min(seconds), max(seconds)], "added_peak_gb": added}


def bench_loss(cfg):
    torch.manual_seed(0)
    hidden = torch.randn(cfg.tokens, cfg.hidden, requires_grad=True)
    weight = (torch.randn(cfg.vocab, cfg.hidden).mul_(0.02)).requires_grad_()
    targets = torch.randint(0, cfg.vocab, (cfg.tokens,))
    targets[torch.rand(cfg.tokens) >= cfg.targets] = IGNORE

    def plain():
        F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORE, reduction="sum").backward()

    def chunked():
        chunked_cross_entropy(hidden, weight, targets).backward()

    def action():
        hidden.grad = weight.grad = None
        (plain if cfg.side == "plain" else chunked)()

    return timed(action, cfg.repeats)


def write_model(directory):
    """A Qwen2.5-0.5B-shaped model.safetensors in bf16, as the hub has it."""
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in CausalLM(ModelConfig.from_dict(QWEN_05B)).named_parameters()}
    save_file({n: torch.full(s, 0.5, dtype=torch.bfloat16) for n, s in shapes.items()},
              os.path.join(directory, "model.safetensors"), metadata={"format": "pt"})
    return {"parameters_gb": 4 * sum(s.numel() for s in shapes.values()) / 2**30}


def bench_load(cfg):
    def load():
        with torch.device("meta"):
            model = CausalLM(ModelConfig.from_dict(QWEN_05B))
        model.to_empty(device="cpu")
        model.tie_weights()
        checkpoint.load_weights(model, cfg.directory)

    return timed(load, cfg.repeats)


def side(*flags):
    """What `bench.py --side ...` prints, run in a process of its own."""
    words = [sys.executable, os.path.abspath(__file__), *sys.argv[1:], *flags]
    return json.loads(subprocess.run(words, stdout=subprocess.PIPE, check=True).stdout)


def main():
    cfg, _ = parse(Config, sys.argv[1:])
    if cfg.side:
        sides = {"plain": bench_loss, "chunked": bench_loss, "load": bench_load,
                 "write": lambda cfg: write_model(cfg.directory)}
        return print(json.dumps(sides[cfg.side](cfg)))
    line = {"part": cfg.part, "command": " ".join(["python", *sys.argv]), "torch": torch.__version__,
            "python": platform.python_version(), "device": f"CPU, {torch.get_num_threads()} threads"}
    if cfg.part == "load":
        with tempfile.TemporaryDirectory() as directory:
            line.update(side("--side", "write", "--directory", directory))
            line.update(side("--side", "load", "--directory", directory))
        line["memory_ratio"] = line["added_peak_gb"] / line["parameters_gb"]
    else:
        line.update({name: side("--side", name) for name in ("plain", "chunked")})
        line["memory_ratio"] = line["chunked"]["added_peak_gb"] / line["plain"]["added_peak_gb"]
        line["time_ratio"] = line["chunked"]["seconds"][0] / line["plain"]["seconds"][0]
    print(json.dumps(line))


if __name__ == "__main__":
    run(main)
