"""PEFT's adapter_config.json: made for a new adapter, read and checked, and what it says of each module."""

import math
import os
import re

from torch import nn

from disk import files, pretrained
from settings.errors import UserError

# Keys of adapter_config.json that are read here, or that change nothing once the tensors are there. Any other
# key that is set changes the adapter's function, so it is refused.
KNOWN_KEYS = """peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode
    r target_modules exclude_modules lora_alpha lora_dropout bias use_rslora modules_to_save init_lora_weights
    eva_config layers_to_transform layers_pattern rank_pattern alpha_pattern megatron_core use_dora
    qalora_group_size runtime_config ensure_weight_tying""".split()
LARGEST_RANK = 2**14


def new(model, cfg):
    """(adapter_config.json for a new adapter, {module name: rank} of the layers that get one).

    cfg  settings of a run: model, lora_rank, lora_alpha, ...; see sft.Config

    Raises UserError for a target that matches nothing, a rank above the matrix, a module that can't be saved.
    """
    targets, names = matching_layers(model, cfg.lora_targets)
    for name in names:
        module = model.get_submodule(name)
        most = min(module.out_features, module.in_features)
        if cfg.lora_rank > most:
            raise UserError(f"--lora_rank {cfg.lora_rank} is above the smaller side of {name}, "
                            f"{module.out_features} × {module.in_features}: at most {most}, or choose others "
                            "with --lora_targets")
    saved = [name.strip() for name in (cfg.lora_modules_to_save or "").split(",") if name.strip()]
    unknown = [name for name in saved if name not in ("embed_tokens", "lm_head")]
    if unknown:
        raise UserError(f"--lora_modules_to_save {cfg.lora_modules_to_save}: {unknown[0]!r} can't be trained "
                        "whole beside an adapter; embed_tokens and lm_head can")
    if saved and model.config.tie_word_embeddings:
        saved = ["embed_tokens", "lm_head"]  # one tensor, which PEFT stores under both names
    is_local = cfg.model == "tiny" or os.path.isdir(cfg.model)
    # a path as PEFT looks it up
    base = os.path.abspath(pretrained.model_directory(cfg.model)) if is_local else cfg.model
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": cfg.lora_rank,
        "lora_alpha": cfg.lora_alpha,
        "lora_dropout": cfg.lora_dropout,
        "use_rslora": cfg.lora_rs,
        "use_dora": cfg.lora_dora,
        "target_modules": targets,
        "modules_to_save": saved or None,
        "bias": "none",
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
        "fan_in_fan_out": False,
    }
    return config, dict.fromkeys(names, cfg.lora_rank)


def matching_layers(model, targets):
    """(target_modules as PEFT writes them, sorted names of the linear layers that they match).

    targets  all-linear; or names with commas between them, of layers or ends of their names; or a regular
             expression that matches whole names

    Raises UserError for an entry that matches nothing.
    """
    linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
    last_parts = sorted({name.rpartition(".")[2] for name in linears})
    entries = last_parts if targets == "all-linear" else [entry.strip() for entry in targets.split(",")]
    is_pattern = not all(re.fullmatch(r"[\w.]+", entry) for entry in entries)
    if is_pattern:
        entries = [targets]
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise UserError(f"--lora_targets {targets}: not a regular expression: {error}") from error
    found = set()
    for entry in entries:
        if is_pattern:
            matches = {name for name in linears if pattern.fullmatch(name)}
        else:
            matches = {name for name in linears if f".{name}".endswith(f".{entry}")}
        if not matches:
            hint = ("; train it whole with --lora_modules_to_save"
                    if entry in ("lm_head", "embed_tokens") else "")
            raise UserError(f"--lora_targets {targets}: {entry!r} matches no layer{hint}. "
                            f"The last parts of their names are {', '.join(last_parts)}; "
                            f"a whole one is {linears[0]}")
        found |= matches
    return targets if is_pattern else entries, sorted(found)


def read_config(directory):
    """The adapter_config.json of a directory, made here or by PEFT.

    Raises UserError for a kind of adapter that this trainer does not compute, and for malformed values.
    """
    path = os.path.join(directory, "adapter_config.json")
    config = files.read_json(path)
    if not isinstance(config, dict):
        raise UserError(f"{path} must hold a JSON object, it is {config!r:.60}")
    unknown = [key for key, value in config.items() if value and key not in KNOWN_KEYS]
    if config.get("peft_type") != "LORA" or unknown or config.get("bias", "none") != "none":
        what = unknown or [key for key in ("peft_type", "bias") if key in config]
        raise UserError(f"{path}: only plain LoRA, rsLoRA and DoRA are supported, this one has "
                        + ", ".join(f"{key:.40} {config[key]!r:.40}" for key in what[:8]))
    patterns, saved = config.get("alpha_pattern") or {}, config.get("modules_to_save") or []
    numbers = [config.get("lora_alpha"), config.get("lora_dropout", 0.0)]
    if isinstance(patterns, dict):
        numbers += patterns.values()
    if not isinstance(patterns, dict) or any(type(number) not in (int, float) for number in numbers):
        raise UserError(f"{path}: lora_alpha, lora_dropout and what alpha_pattern has by name "
                        "must be numbers")
    for pattern in patterns:
        check_pattern(pattern, path)
    if not isinstance(saved, list) or not isinstance(config.get("base_model_name_or_path") or "", str):
        raise UserError(f"{path}: modules_to_save must be a list, and base_model_name_or_path a text")
    if config.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal", "eva"):
        raise UserError(f"{path}: init_lora_weights {config['init_lora_weights']!r} changes the base model "
                        "as well; convert the adapter with peft's path_initial_model_for_weight_conversion")
    return config


def check_pattern(pattern, path):
    """Raise UserError for an untrusted regular expression that could take for ever, or is none."""
    if len(pattern) > 200 or len(re.findall(r"[*+{]", pattern)) > 2 or re.search(r"\)[*+{]", pattern):
        raise UserError(f"{path}: alpha_pattern {pattern!r:.60} repeats too much; "
                        "write out the layers' names")
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"{path}: alpha_pattern {pattern!r:.60} is no regular expression: {error}") from error


def read(directory):
    """The same two of an adapter's directory: (adapter_config.json, {module name: rank})."""
    return read_config(directory), lora_ranks(pretrained.weight_entries(directory))


def check_base(config, model):
    """Raise UserError when the adapter names another base model than `model`.

    It would load wherever the shapes fit. A directory may have been moved, so only its own name is compared.
    """
    base = config.get("base_model_name_or_path")
    if base and os.path.basename(base.rstrip("/")) != os.path.basename(os.path.realpath(model)):
        raise UserError(f"the adapter was trained on {base}, not on --model {model}; give the former, "
                        "or correct base_model_name_or_path in its adapter_config.json")


def lora_ranks(entries):
    """{module name: rank} of an adapter's tensors (name -> anything with a shape).

    Raises UserError for a rank that no adapter has: a tensor without columns could claim any.
    """
    found = {}
    for name, entry in entries.items():
        if ".lora_A." not in name:
            continue
        rank = entry.shape[0] if entry.shape else 0
        if not 1 <= rank <= LARGEST_RANK:
            raise UserError(f"the adapter's part for {name.removesuffix('.lora_A.weight')} has rank {rank}; "
                            f"it may be from 1 to {LARGEST_RANK:,}")
        found[name.removesuffix(".lora_A.weight")] = rank
    return found


def scaling_of(name, rank, config):
    """The factor of a module's B A. Keys of alpha_pattern are regular expressions for the ends of names."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next((a for key, a in patterns.items() if re.match(rf"(.*\.)?({key})$", name)),
                 config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
