"""docs/fork.md, another model family: logits are transformers', before and after training with tensor
parallelism. Starts in a copy that has the change."""

import os
import shutil

import pytest
import torch
from helpers import TINY, tensors_of
from ranks_of import run
from transformers import AutoModelForCausalLM, SmolLM3Config

import sft
from disk import files
from families.config import ModelConfig
from model import CausalLM
from ops.attention import Documents
from settings.errors import UserError


def compare(directory):
    """Our logits of a model directory with transformers'."""
    ours = CausalLM(ModelConfig.from_dict(files.read_json(os.path.join(directory, "config.json"))))
    missing, unexpected = ours.load_state_dict(tensors_of(directory), strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # tied
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokens = torch.arange(40) % 7
    with torch.no_grad():
        expected = theirs(tokens[None]).logits[0]
        torch.testing.assert_close(ours(tokens, Documents.of([40])), expected, rtol=1e-4, atol=1e-4)


torch.manual_seed(0)
tiny = files.read_json(os.path.join(TINY, "config.json"))
config = SmolLM3Config(hidden_size=64, intermediate_size=96, num_hidden_layers=5, num_attention_heads=4,
                       num_key_value_heads=2, attention_bias=True, mlp_bias=True, pad_token_id=0,
                       bos_token_id=0, eos_token_id=tiny["eos_token_id"], vocab_size=tiny["vocab_size"])
assert config.no_rope_layers == [1, 1, 1, 0, 1]
AutoModelForCausalLM.from_config(config).save_pretrained("smol")
for file in os.listdir(TINY):
    if file.startswith("tokenizer"):
        shutil.copy(os.path.join(TINY, file), "smol")
run(2, [sft.__file__, "--model", "smol", "--strategy", "megatron", "--tp", "2", "--cache_dir", "none",
        "--lr", "1e-2", "--max_steps", "2", "--output_dir", "out"])
compare("smol")
compare("out/checkpoints/latest")

values = config.to_dict()
for key in ("no_rope_layers", "no_rope_layer_interval", "tie_word_embeddings", "num_key_value_heads"):
    values.pop(key)  # its default
ours, theirs = ModelConfig.from_dict(values), SmolLM3Config(**values)
assert ours.uses_rope == tuple(map(bool, theirs.no_rope_layers))
assert (ours.tie_word_embeddings, ours.num_key_value_heads) == (True, 4)
with pytest.raises(UserError, match="use_sliding_window is not supported"):
    ModelConfig.from_dict({**values, "use_sliding_window": True})
