"""An adapter and its base -> a full model directory: python tools/merge.py ADAPTER OUT"""

if __name__ == "__main__":
    import os
    import sys

    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    from settings import venv

    venv.enter()  # where torch is missing, continue in the .venv that train.sh made

import math
import os
import shlex
import shutil
import sys
from dataclasses import dataclass

import torch

from disk import files, peft, pretrained
from settings import venv
from settings.errors import UserError, run
from settings.parser import parse, setting
from text import template

FILE_BYTES = 2**30  # of each file that is written, and so held in memory, unless one tensor is larger


@dataclass
class Config:
    """Merge an adapter into its base: python tools/merge.py ADAPTER OUT [flags]"""

    adapter: str = setting("./outputs/checkpoints/latest", "adapter directory", group="merge")
    out: str = setting("./merged", "directory to write, which does not exist yet")
    base: str | None = setting(None, "model directory or hub id, if not the one that adapter_config.json names")
    dtype: str = setting("fp32", "of the result: bf16 is half as large, and rounds", ("fp32", "bf16"))


def merge(cfg):
    """Write a full model directory, tensor by tensor.

    Memory holds one file of about FILE_BYTES, or one larger tensor.

    Raises UserError for an adapter that does not fit the base, and if cfg.out exists already.
    """
    if os.path.exists(cfg.out):
        raise UserError(f"{cfg.out} exists already; give a new directory")
    config = peft.read_config(cfg.adapter)
    if not (cfg.base or config.get("base_model_name_or_path")):
        raise UserError(f"{cfg.adapter}: its adapter_config.json names no base model; "
                        "give it with --base DIR")
    base = pretrained.model_directory(cfg.base or config["base_model_name_or_path"])
    model_config = files.read_json(os.path.join(base, "config.json"))
    entries, parts = pretrained.weight_entries(base), pretrained.weight_entries(cfg.adapter)

    def read(entry):
        tensor = torch.empty(entry.shape)
        pretrained.read_into(entry, tensor)
        return tensor

    def value(name):
        """The merged tensor, fp32."""
        weight, module = read(parts.get(name, entries[name])), name.removesuffix(".weight")
        if module in lora_ranks:
            A, B = (read(parts[f"{module}.lora_{side}.weight"]) for side in "AB")
            if (B.shape[0], A.shape[1]) != weight.shape:
                raise UserError(f"{cfg.adapter} does not fit {base}: its part for {module} is {B.shape[0]} × "
                                f"{A.shape[1]}, the base has {tuple(weight.shape)}")
            weight.addmm_(B, A, alpha=peft.scaling_of(module, lora_ranks[module], config))
            if config.get("use_dora"):
                magnitude = read(parts[f"{module}.lora_magnitude_vector"])
                weight *= (magnitude / torch.linalg.vector_norm(weight, dim=1))[:, None]
        if not weight.isfinite().all():
            raise UserError(f"{name} would not be finite; is {cfg.adapter} from a run that went wrong?")
        return weight

    lora_ranks, embedding, head = peft.lora_ranks(parts), "model.embed_tokens.weight", "lm_head.weight"
    if model_config.get("tie_word_embeddings"):
        entries.pop(head, None)
        # Where the adapter trained one of the two, or each by itself, tied they could not both be right.
        other = parts.get(head, entries[embedding])
        if {head, embedding} & set(parts) and not torch.equal(value(embedding), read(other)):
            model_config["tie_word_embeddings"], entries[head] = False, entries[embedding]
        else:
            parts.pop(head, None)
    known = {
        f"{m}.{part}" for m in lora_ranks
        for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")}
    strange = set(parts) - set(entries) - known | {f"{m}.weight" for m in lora_ranks} - set(entries)
    if strange:
        raise UserError(f"{cfg.adapter} does not fit {base}, which has no {min(strange)}; "
                        "--base names another")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[cfg.dtype]
    temporary = cfg.out.rstrip("/") + ".tmp"
    shutil.rmtree(temporary, ignore_errors=True)  # of a merge that was ended
    os.makedirs(temporary)
    for key in {"dtype", "torch_dtype"} & set(model_config):
        model_config[key] = str(dtype).removeprefix("torch.")
    has_tokenizer = os.path.exists(os.path.join(cfg.adapter, "tokenizer.json"))
    tokenizer = template.ChatTokenizer(cfg.adapter if has_tokenizer else base)
    exported = {**files.read_bytes(base, pretrained.TOKENIZER_FILES),
                **files.read_bytes(cfg.adapter, pretrained.TOKENIZER_FILES), "config.json": model_config,
                "generation_config.json": pretrained.generation_config(base, model_config, tokenizer.stop_token_id)}
    for name, content in exported.items():
        files.write_file(os.path.join(temporary, name), content)
    sizes = {name: torch.empty(entry.shape, dtype=dtype, device="meta") for name, entry in entries.items()}
    n_bytes = sum(t.nbytes for t in sizes.values())
    groups = pretrained.assign_to_files(sizes, "model", math.ceil(n_bytes / FILE_BYTES))
    for file, names in groups.items():
        tensors = {name: value(name).to(dtype) for name in names}
        pretrained.write_safetensors(os.path.join(temporary, file), tensors)
    if len(groups) > 1:
        pretrained.write_index(temporary, groups, n_bytes)
    os.replace(temporary, cfg.out)
    print(f"merged   {cfg.out}: {base} with {cfg.adapter}, {len(lora_ranks)} layers, {cfg.dtype}")
    print(f"talk     {venv.command('chat.py')} {shlex.quote(cfg.out)}")


def main():
    cfg, _ = parse(Config, sys.argv[1:], positional=["adapter", "out"])
    merge(cfg)


if __name__ == "__main__":
    run(main)
