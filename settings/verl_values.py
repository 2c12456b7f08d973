"""Translations that need more than a table: the functions that column `by` of verl.yaml names.

Each is called as (key, values, warnings). values is {key: text} of all keys that are set and not empty;
warnings is a list to append to. It returns the text of the setting, or one text for each setting if the entry
sets several; None does not change a setting. Raises UserError for a value that can't be read.
"""

import importlib.util
import os

from settings.errors import UserError

EMPTY = ("", "null", "none", "~", "{}")  # texts that set nothing
EXAMPLE = "~/data/gsm8k/test.parquet"  # the validation file in verl's own configuration
OFFLOADS = ("engine.param_offload", "engine.offload_policy", "engine.cpu_offload", "engine.offload_params")
VERL_DEFAULTS = {"model.lora_alpha": "16", "model.target_modules": "all-linear"}  # set even without LoRA
TP = "engine.tensor_model_parallel_size"


def path(key, values, warnings):
    return ",".join(os.path.expanduser(file) for file in values[key].split(","))


def val_files(key, values, warnings):
    if values[key] == EXAMPLE and not os.path.exists(os.path.expanduser(EXAMPLE)):
        warnings.append(f"{EXAMPLE} is verl's example and not on this machine: there is no validation")
        return "none"
    return path(key, values, warnings)


def integer(key, values):
    """The integer that a text is; it may be written 2048.0 or 1e3."""
    try:
        number = float(values[key])
    except ValueError:
        number = None
    if number is None or not number.is_integer():
        raise UserError(f"{key} can't be {values[key]!r}; it must be an integer")
    return int(number)


def micro_batch(key, values, warnings):
    by_tokens = "data.max_token_len_per_gpu" in values
    if values.get("data.use_dynamic_bsz", str(by_tokens)).lower() != "true":
        return values.get("data.micro_batch_size_per_gpu")
    if not {"data.max_token_len_per_gpu", "data.max_length"} <= values.keys():
        raise UserError("a micro-batch by tokens needs data.max_token_len_per_gpu and data.max_length; set "
                        "them, or data.use_dynamic_bsz=false")
    tokens, length = integer("data.max_token_len_per_gpu", values), integer("data.max_length", values)
    return str(max(1, tokens // max(1, length)))  # a length of 0 is an error later, as --max_length


def column(key, values, warnings):
    """The column of the prompt or the response, with the keys inside it appended: "extra_info.question"."""
    side = key.removeprefix("data.").partition("_")[0]
    names = [values.get(f"data.{side}_key", side), *values.get(f"data.{side}_dict_keys", "").split(",")]
    return ".".join(name for name in names if name.lower() not in EMPTY)


def lora_rank(key, values, warnings):
    rank = integer(key, values)
    if "model.lora_adapter_path" in values:
        return "true", None  # the adapter has its own rank
    return ("true", values[key]) if rank > 0 else ("false", None)


def lora_detail(key, values, warnings):
    """LoRA's alpha or targets: None without LoRA, and for an adapter, which has its own."""
    if "model.lora_adapter_path" in values:
        reason = "the adapter has its own"
    elif "model.lora_rank" in values and integer("model.lora_rank", values) <= 0:
        reason = "model.lora_rank is 0"
    else:
        return values[key]
    if values[key] != VERL_DEFAULTS[key]:
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
    return values[key], "megatron" if integer(key, values) > 1 else None


def strategy(key, values, warnings):
    if values[key] == "megatron" and (TP not in values or integer(TP, values) == 1):
        warnings.append(f"megatron is not applicable: it does the same as fsdp unless {TP} is above 1")
        return "fsdp"
    return values[key]


def loggers(key, values, warnings):
    supported = []
    for name in filter(None, map(str.strip, values[key].split(","))):
        if name in ("mlflow", "swanlab", "clearml", "vemlp_wandb"):
            warnings.append(f"{name} is not applicable: metrics.jsonl has every number; console, wandb, "
                            "tensorboard and trackio show them")
        elif name in ("wandb", "tensorboard", "trackio") and importlib.util.find_spec(name) is None:
            warnings.append(f"{name} is not installed (pip install {name}); metrics.jsonl has every number")
        elif name != "file":  # metrics.jsonl is always written
            supported.append(name)
    return ",".join(supported) or "console"


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
