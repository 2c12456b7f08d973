"""Values of verl's that a table can't translate: the functions that column `by` of verl.yaml names.

Each is called as (key, values, warnings): values is {key: text} of all keys that are given and not empty,
warnings a list to add to. It returns the text of our setting, or a text for each where the row sets several;
None leaves a setting as it is. Raises UserError for a value that can't be read.
"""

import importlib.util
import os

from settings.errors import UserError

EMPTY = ("", "null", "none", "~", "{}")  # nothing is asked for
EXAMPLE = "~/data/gsm8k/test.parquet"  # what verl's own file validates on
OFFLOADS = ("engine.param_offload", "engine.offload_policy", "engine.cpu_offload", "engine.offload_params")
USUAL = {"model.lora_alpha": "16", "model.target_modules": "all-linear"}  # in verl's file, wanted or not
TP = "engine.tensor_model_parallel_size"


def path(key, values, warnings):
    return ",".join(os.path.expanduser(part) for part in values[key].split(","))


def val_files(key, values, warnings):
    if values[key] == EXAMPLE and not os.path.exists(os.path.expanduser(EXAMPLE)):
        warnings.append(f"{EXAMPLE} is verl's example and not on this machine: nothing is validated")
        return "none"
    return path(key, values, warnings)


def whole(key, values):
    try:
        return int(values[key])
    except ValueError:
        raise UserError(f"{key} can't be {values[key]!r}; it must be a whole number") from None


def micro_batch(key, values, warnings):
    by_tokens = "data.max_token_len_per_gpu" in values
    if values.get("data.use_dynamic_bsz", str(by_tokens)).lower() != "true":
        return values.get("data.micro_batch_size_per_gpu")
    if not {"data.max_token_len_per_gpu", "data.max_length"} <= values.keys():
        raise UserError("a micro-batch by tokens needs data.max_token_len_per_gpu and data.max_length; or "
                        "type data.use_dynamic_bsz=false")
    tokens, length = whole("data.max_token_len_per_gpu", values), whole("data.max_length", values)
    return str(max(1, tokens // max(1, length)))  # a length of 0 is refused as our max_length


def column(key, values, warnings):
    """Of the prompt or the response: its column and the keys inside that, with points between them."""
    side = key.removeprefix("data.").partition("_")[0]
    parts = [values.get(f"data.{side}_key", side), *values.get(f"data.{side}_dict_keys", "").split(",")]
    return ".".join(part for part in parts if part.lower() not in EMPTY)


def lora_rank(key, values, warnings):
    rank = whole(key, values)
    if "model.lora_adapter_path" in values:
        return "true", None  # the adapter has its own
    return ("true", values[key]) if rank > 0 else ("false", None)


def lora_detail(key, values, warnings):
    """Of LoRA's alpha and targets: nothing where there is no LoRA, or an adapter that has its own."""
    if "model.lora_adapter_path" in values:
        reason = "the adapter has its own"
    elif "model.lora_rank" in values and whole("model.lora_rank", values) <= 0:
        reason = "model.lora_rank is 0"
    else:
        return values[key]
    if values[key] != USUAL[key]:
        warnings.append(f"{values[key]} is not applicable: {reason}")
    return None


def adapter(key, values, warnings):
    return "true", path(key, values, warnings)


def betas(key, values, warnings):
    if values[key].count(",") != 1:
        raise UserError(f"{values[key]} can't be read; betas are two numbers, [0.9,0.95]")
    return values[key].split(",")


def offload(key, values, warnings):
    return str(any(values.get(name, "").lower() == "true" for name in OFFLOADS)).lower()


def tensor_parallel(key, values, warnings):
    return values[key], "megatron" if whole(key, values) > 1 else None


def strategy(key, values, warnings):
    if values[key] == "megatron" and (TP not in values or whole(TP, values) == 1):
        warnings.append(f"megatron is not applicable: without {TP} above 1 it is what fsdp does")
        return "fsdp"
    return values[key]


def loggers(key, values, warnings):
    kept = []
    for name in filter(None, map(str.strip, values[key].split(","))):
        if name in ("mlflow", "swanlab", "clearml", "vemlp_wandb"):
            warnings.append(f"{name} is not applicable: metrics.jsonl has every number; console, wandb, "
                            "tensorboard and trackio show them")
        elif name in ("wandb", "tensorboard", "trackio") and importlib.util.find_spec(name) is None:
            warnings.append(f"{name} is not installed (pip install {name}); metrics.jsonl has every number")
        elif name != "file":  # metrics.jsonl is
            kept.append(name)
    return ",".join(kept) or "console"


def resume(key, values, warnings):
    mode = values.get("trainer.resume_mode", "")
    directory = values.get("trainer.resume_from_path") or values.get("trainer.resume_path")
    if not mode or (mode in ("auto", "resume_path") and directory):
        return directory
    if mode == "resume_path":
        raise UserError("resume_path needs trainer.resume_from_path=DIR")
    if mode not in ("auto", "disable"):
        raise UserError(f"trainer.resume_mode can't be {mode!r}; it must be auto, disable or resume_path")
    return "auto" if mode == "auto" else "none"
