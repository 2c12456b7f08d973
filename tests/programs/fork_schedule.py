"""docs/fork.md, another schedule: the rates of a run. Starts in a copy that has the change."""

from helpers import TINY, metrics, sft_main

sft_main("--model", TINY, "--batch_size", 1, "--cache_dir", "none", "--scheduler", "wsd", "--max_steps", 20,
         "--lr", 1e-3, "--warmup_ratio", 0.1, "--no-gradient_checkpointing", "--output_dir", "out")
rates = [line["lr"] for line in metrics("out")]
assert rates[:2] == [5e-4, 1e-3] and rates[2:16] == [1e-3] * 14  # 14 of the 18 steps after the warm-up
assert all(a > b for a, b in zip(rates[16:], rates[17:])) and 0 < rates[-1] < 4e-4
