"""Helpers for tests of checkpoints and optimizers: small model directories, and a run that trains and saves."""

import os

import helpers
import torch
from helpers import model_loss
from safetensors.torch import load_file, save_file

from disk import checkpoint, files, pretrained, shards
from families.config import ModelConfig
from model import CausalLM
from ops import optim

SIZES = dict(vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64)
TIED = dict(SIZES, model_type="qwen2", tie_word_embeddings=True)
UNTIED = dict(SIZES, model_type="llama", tie_word_embeddings=False)
QWEN3 = dict(SIZES, model_type="qwen3", head_dim=8)
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
FIRST, LAST = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"  # two tensors for the tests to change
TOKENIZER = {"tokenizer.json": b'{"model":   {"vocab": {"\xc3\xa9": 0}}}',
             "chat_template.jinja": b"{{ 'no newline' }}",
             "tokenizer_config.json": b'{"b": 1,\r\n "a": 1e-05}\n'}


def published(directory, config, dtype=torch.float32, **saving):
    """Write a model directory with transformers: random weights, and tokenizer files; return its path."""
    helpers.published(directory, config, dtype, **saving)
    for name, content in TOKENIZER.items():
        (directory / name).write_bytes(content)
    return directory


def created(directory):
    """The CausalLM of a directory's config.json, before its weights are read."""
    with torch.device("meta"):
        model = CausalLM(ModelConfig.from_dict(files.read_json(os.path.join(directory, "config.json"))))
    model.to_empty(device="cpu")
    model.tie_weights()
    return model


def loaded(directory):
    """(the CausalLM of a directory, its shard_map), as sft.py makes them."""
    model = created(directory)
    pretrained.load_weights(model, directory)
    return model, shards.shard_map(model, directory)


def adamw(model, optimizer_class=optim.AdamW, offload=False):
    groups = optim.parameter_groups(model, 0.01)
    return optim.build(optimizer_class, groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, offload=offload)


def train_step(model, optimizer, seed):
    tokens = torch.randint(SIZES["vocab_size"], (24,), generator=torch.Generator().manual_seed(seed))
    (model_loss(model, tokens, (10, 14), tokens.roll(-1)) / 24).backward()
    optimizer.step()
    optimizer.zero_grad()


class Run:
    """A run that starts from the model directory `source` and saves checkpoints in `root`."""

    def __init__(self, source, root):
        self.root = root
        self.model, self.shard_map = loaded(source)
        self.optimizer = adamw(self.model)
        self.files = files.read_bytes(source, ["config.json", *pretrained.TOKENIZER_FILES])
        root.mkdir()

    def save(self, step, in_background=False):
        """Train one step, so that all checkpoints differ, and save; return the step directory."""
        train_step(self.model, self.optimizer, step)
        contents = dict(model=self.model, optimizer=self.optimizer, shard_map=self.shard_map, exported=self.files,
                        state={"seed": 7})
        if not in_background:
            return checkpoint.save(self.root, step, **contents)
        steps = checkpoint.steps_in(self.root)
        save = checkpoint.start_save(self.root, step, in_background=True, **contents)
        assert checkpoint.steps_in(self.root) == steps  # only `finish` names it
        return save.finish()


def listing(directory):
    return sorted(os.path.relpath(os.path.join(where, name), directory)
                  for where, _, names in os.walk(directory) for name in names)


def change(directory, edit):
    """Rewrite the only weight file of a directory; `edit` gets {name: tensor} and changes it."""
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
