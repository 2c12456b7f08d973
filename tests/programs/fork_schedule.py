"""docs/fork.md, another schedule: the rates of a run. Starts in a copy that has the change."""

import pytest
from helpers import TINY, metrics, sft_main

import sft

sft_main("--model", TINY, "--batch_size", 1, "--cache_dir", "none", "--scheduler", "inverse_sqrt",
         "--max_steps", 20, "--lr", 1e-3, "--warmup_ratio", 0.2, "--no-gradient_checkpointing",
         "--output_dir", "out")
rates = [line["lr"] for line in metrics("out")]
assert rates == pytest.approx([2.5e-4, 5e-4, 7.5e-4, *(1e-3 * (4 / step) ** 0.5 for step in range(4, 21))])
floor = sft.Config(scheduler="inverse_sqrt", lr=1.0, min_lr_ratio=0.5, warmup_ratio=0.1)
assert [sft.lr_at(step, 10, floor) for step in (1, 4, 10)] == [1.0, 0.5, 0.5]
no_warmup = sft.Config(scheduler="inverse_sqrt", lr=1.0, warmup_ratio=0.0)
assert sft.lr_at(2, 10, no_warmup) == pytest.approx(0.5**0.5)
assert sft.lr_at(10, 10, sft.Config(lr=1.0)) < 0.1  # the default is as before
