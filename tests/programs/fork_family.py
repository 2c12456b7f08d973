"""docs/fork.md, another model family: logits are transformers', before and after training with tensor
parallelism. Starts in a copy that has the change."""

import os
import shutil

import pytest
import torch
from helpers import TINY, tensors_of
from ranks_of import run
from transformers import AutoModelForCausalLM, HyperCLOVAXConfig

import sft
from disk import files
from families.config import ModelConfig
from families.registry import causal_lm
from ops.attention import Documents
from settings.errors import UserError


def compare(directory):
    """Our logits of a model directory with transformers'."""
    config = ModelConfig.from_dict(files.read_json(os.path.join(directory, "config.json")))
    ours = causal_lm(config)(config)
    ours.load_state_dict(tensors_of(directory))
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokens = torch.arange(40) % 7
    with torch.no_grad():
        expected = theirs(tokens[None]).logits[0]
        torch.testing.assert_close(ours(tokens, Documents.of([40])), expected, rtol=1e-4, atol=1e-4)


torch.manual_seed(0)
tiny = files.read_json(os.path.join(TINY, "config.json"))
config = HyperCLOVAXConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    embedding_multiplier=10.0, residual_multiplier=0.3, attention_multiplier=0.2, pad_token_id=0, bos_token_id=0,
    eos_token_id=tiny["eos_token_id"], vocab_size=tiny["vocab_size"])
model = AutoModelForCausalLM.from_config(config)
for name, p in model.named_parameters():
    torch.nn.init.normal_(p, mean=float("norm" in name), std=0.1)
model.save_pretrained("clova")
for file in os.listdir(TINY):
    if file.startswith("tokenizer"):
        shutil.copy(os.path.join(TINY, file), "clova")
run(2, [sft.__file__, "--model", "clova", "--strategy", "megatron", "--tp", "2", "--cache_dir", "none",
        "--lr", "1e-2", "--max_steps", "2", "--output_dir", "out"])
compare("clova")
compare("out/checkpoints/latest")

with pytest.raises(UserError, match="use_post_norm is False; only True is supported"):
    ModelConfig.from_dict({**config.to_dict(), "use_post_norm": False})
