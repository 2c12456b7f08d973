"""docs/fork.md, another model family: logits are transformers'. Starts in a copy that has the change."""

import json

import torch
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
