"""Merge an adapter into its base model: python tools/merge.py ADAPTER OUT"""

if __name__ == "__main__":
    import os
    import sys

    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    from settings import venv

    venv.enter()  # where torch is missing, continue in the .venv that train.sh made

import dataclasses
import shlex
import sys
from dataclasses import dataclass

import torch

from disk import exporting, files, layout, peft, pretrained, shards, writer
from disk.run import ModelPaths
from families.config import ModelConfig
from settings import venv
from settings.errors import UserError, printable, run
from settings.parser import parse, setting
from text import template


@dataclass
class Config:
    """Merge an adapter into its base model: python tools/merge.py ADAPTER OUT [flags]"""

    adapter: str = setting("./outputs/checkpoints/latest", "adapter directory", group="merge")
    out: str = setting("./merged", "model directory to write; it must not exist")
    base: str | None = setting(None, "base model: directory or hub id; none: as adapter_config.json names it")
    dtype: str = setting("fp32", "precision of the merged weights; bf16 is half as large but rounds",
                         ("fp32", "bf16"))


def merge(cfg):
    """Write the merged model directory, tensor by tensor.

    Memory holds about three tensors.

    Raises UserError if the adapter does not fit the base, a merged tensor is not finite, or cfg.out exists.
    """
    exporting.check_new(cfg.out)
    cfg = dataclasses.replace(cfg, adapter=files.follow(cfg.adapter))  # a run may move `latest` meanwhile
    peft_config = peft.read_config(cfg.adapter)
    base = peft.base_directory(cfg.adapter, cfg.base)
    paths = ModelPaths.find(base, cfg.adapter)
    model_config = paths.config_json  # a run with --resize_embeddings had more rows than the base
    contents, adapter_entries = pretrained.Contents.of(base), pretrained.weight_entries(cfg.adapter)
    base_entries = contents.entries
    for entries in (base_entries, adapter_entries):
        pretrained.check_dtypes(entries)
    lora_ranks = peft.lora_ranks(adapter_entries)

    def read(entry):
        tensor = torch.empty(entry.shape)
        pretrained.read_into(entry, tensor)
        return tensor

    def merged(name):
        """The merged tensor in fp32."""
        weight = read(adapter_entries.get(name, base_entries[name]))
        module = name.removesuffix(".weight")
        if module in lora_ranks:
            A, B = (read(adapter_entries[f"{module}.lora_{side}.weight"]) for side in "AB")
            if (B.shape[0], A.shape[1]) != weight.shape:
                raise UserError(f"{cfg.adapter} does not fit {base}: for {module} it has {B.shape[0]} × "
                                f"{A.shape[1]}, the base has {tuple(weight.shape)}; pass another --base")
            weight.addmm_(B, A, alpha=peft.scaling_of(module, lora_ranks[module], peft_config))
            if peft_config.get("use_dora"):
                magnitude = read(adapter_entries[f"{module}.lora_magnitude_vector"])
                weight *= (magnitude / torch.linalg.vector_norm(weight, dim=1))[:, None]
        if not weight.isfinite().all():
            raise UserError(f"merged, {name} would not be finite; did the run of {cfg.adapter} diverge?")
        return weight

    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    if paths.config.tie_word_embeddings:
        base_entries.pop(head, None)
        # If the adapter trained one of the two, or both separately, they may differ now: then untie them.
        head_entry = adapter_entries.get(head, base_entries[embedding])
        is_trained = head in adapter_entries or embedding in adapter_entries
        if is_trained and not torch.equal(merged(embedding), read(head_entry)):
            model_config = layout.with_values(model_config, tie_word_embeddings=False)
            base_entries[head] = base_entries[embedding]
        else:
            adapter_entries.pop(head, None)
    check_names(cfg.adapter, base, adapter_entries, base_entries, lora_ranks)
    shapes = {name: adapter_entries.get(name, entry).shape for name, entry in base_entries.items()}
    check_rows(cfg.adapter, shapes, ModelConfig.from_dict(model_config).vocab_size)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[cfg.dtype]
    model_config = layout.with_dtype(model_config, dtype)
    tokenizer = template.ChatTokenizer(paths.tokenizer)
    exported = {**files.read_bytes(base, (*pretrained.TOKENIZER_FILES, *pretrained.PROCESSOR_FILES)),
                **files.read_bytes(cfg.adapter, pretrained.TOKENIZER_FILES), "config.json": model_config,
                "generation_config.json": pretrained.generation_config(
                    base, model_config, tokenizer.stop_token_id), **tokenizer.files}
    in_model = {contents.names.in_files(name): name for name in shapes}
    copied = shards.copied_tensors(contents.others)
    copied = {name: tensor for tensors in copied.values() for name, tensor in tensors.items()}
    stored = {name: (writer.CODES[dtype], shapes[ours]) for name, ours in in_model.items()}
    stored.update((name, writer.stored_as(tensor)) for name, tensor in copied.items())

    def tensor_of(name):
        return copied[name] if name in copied else merged(in_model[name]).to(dtype)

    with exporting.new_directory(cfg.out) as directory:
        exporting.write_files(directory, exported)
        exporting.write_weights(directory, stored, tensor_of, exporting.FILE_BYTES)
    print(printable(f"merged   {cfg.adapter} into {base}: {len(lora_ranks)} matrices, {cfg.dtype}\n"
                    f"saved    {cfg.out} (Hugging Face model directory)\n"
                    f"try it   {venv.command('chat.py')} {shlex.quote(cfg.out)}"))


def check_names(adapter, base, adapter_entries, base_entries, lora_ranks):
    """Raise UserError if the adapter has tensors for which the base has no counterpart."""
    expected = {f"{module}.{suffix}" for module in lora_ranks
                for suffix in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")}
    unexpected = set(adapter_entries) - set(base_entries) - expected
    unexpected |= {f"{module}.weight" for module in lora_ranks} - set(base_entries)
    if unexpected:
        raise UserError(f"{adapter} does not fit {base}, which has no {min(unexpected)}; pass another --base")


def check_rows(adapter, shapes, vocab_size):
    """Raise UserError if not all embeddings have the rows that config.json will say."""
    for name in pretrained.EMBEDDINGS:
        if name in shapes and shapes[name][0] != vocab_size:
            raise UserError(f"{adapter}: {name} would have {shapes[name][0]} rows, but another embedding, or "
                            f"config.json, has {vocab_size}; an adapter for a resized model must have both "
                            "embed_tokens and lm_head (--lora_modules_to_save)")


def main():
    cfg, _ = parse(Config, sys.argv[1:], positional=["adapter", "out"])
    merge(cfg)


if __name__ == "__main__":
    run(main)
