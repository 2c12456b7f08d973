"""docs/fork.md, a new setting: flag, file and range work, and the run uses it. Starts in a copy that has the
change."""

import pytest
from helpers import TINY, metrics, sft_main

import sft
from settings.errors import UserError
from settings.parser import parse

sft_main("--model", TINY, "--batch_size", 1, "--cache_dir", "none", "--lr", 1e-3, "--warmup_ratio", 0.5,
         "--warmup_steps", 4, "--max_steps", 6, "--no-gradient_checkpointing", "--output_dir", "out")
rates = [line["lr"] for line in metrics("out")]
assert rates[:4] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3]) and rates[5] < rates[4], rates
again, _ = parse(sft.Config, ["--config", "out/config.yaml"])
assert again.warmup_steps == 4
assert sft.lr_at(1, 10, sft.Config(lr=1.0, warmup_ratio=0.2)) == 0.5  # without it, as before
with pytest.raises(UserError, match="--warmup_steps 0: it must be at least 1"):
    parse(sft.Config, ["--warmup_steps", "0"])
