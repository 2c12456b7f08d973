"""Merge an adapter into its base model: python tools/merge.py ADAPTER OUT"""

if __name__ == "__main__":
    import os
    import sys

    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    from settings import venv

    venv.enter()  # where torch is missing, continue in the .venv that train.sh made

import dataclasses
import math
import os
import shlex
import sys
from dataclasses import dataclass

import torch

from disk import files, layout, peft, pretrained, saving, shards, writer
from disk.run import ModelPaths
from families.config import ModelConfig
from settings import venv
from settings.errors import UserError, printable, run
from settings.parser import parse, setting
from text import template

FILE_BYTES = 2**30  # size of each output file, which is also the memory needed, unless one tensor is larger


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

    Memory holds one output file of about FILE_BYTES, or one larger tensor.

    Raises UserError if the adapter does not fit the base, a merged tensor is not finite, or cfg.out exists.
    """
    temporary = temporary_directory(cfg.out)
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
    os.makedirs(temporary)
    for part in (model_config, layout.text_part(model_config)):
        part.update({key: str(dtype).removeprefix("torch.") for key in {"dtype", "torch_dtype"} & set(part)})
    tokenizer = template.ChatTokenizer(paths.tokenizer)
    exported = {**files.read_bytes(base, (*pretrained.TOKENIZER_FILES, *pretrained.PROCESSOR_FILES)),
                **files.read_bytes(cfg.adapter, pretrained.TOKENIZER_FILES), "config.json": model_config,
                "generation_config.json": pretrained.generation_config(
                    base, model_config, tokenizer.stop_token_id), **tokenizer.files}
    for name, content in exported.items():
        os.makedirs(os.path.dirname(os.path.join(temporary, name)), exist_ok=True)
        files.write_file(os.path.join(temporary, name), content)
    write_weights(temporary, contents, shapes, merged, dtype)
    os.replace(temporary, cfg.out)
    print(printable(f"merged   {cfg.adapter} into {base}: {len(lora_ranks)} layers, {cfg.dtype}\n"
                    f"saved    {cfg.out} (Hugging Face model directory)\n"
                    f"try it   {venv.command('chat.py')} {shlex.quote(cfg.out)}"))


def write_weights(directory, contents, shapes, merged, dtype):
    """Write the weight files: tensors of {name: shape}, which merged(name) makes, and those that are copied.

    contents  pretrained.Contents of the base
    """
    stored = {contents.names.in_files(name): name for name in shapes}
    sizes = {name: math.prod(shapes[ours]) * dtype.itemsize for name, ours in stored.items()}
    sizes.update((name, entry.n_bytes) for name, entry in contents.others.items())
    copied = shards.copied_tensors(contents.others)
    copied = {name: tensor for tensors in copied.values() for name, tensor in tensors.items()}
    names_by_file = saving.assign_to_files(sizes, "model", math.ceil(sum(sizes.values()) / FILE_BYTES))
    for file, names in names_by_file.items():
        tensors = {name: merged(stored[name]).to(dtype) if name in stored else copied[name] for name in names}
        writer.write_safetensors(os.path.join(directory, file), tensors)
    if len(names_by_file) > 1:
        files.write_file(os.path.join(directory, pretrained.INDEX_FILE),
                         saving.index_content(names_by_file, sum(sizes.values())))


def temporary_directory(out):
    """Where files are written before `out` is complete. Raises UserError if one of the two exists."""
    if os.path.exists(out):
        raise UserError(f"{out} exists already; choose a new directory")
    temporary = out.rstrip("/") + ".tmp"
    if os.path.lexists(temporary):  # it may be somebody's
        raise UserError(f"{temporary} exists already, perhaps of a merge that was interrupted; remove it, or "
                        "choose another directory")
    return temporary


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
