"""PEFT's adapter_config.json: made for a new adapter, read and checked, and what it says of each module."""

import math
import os
import re

from torch import nn

from settings.errors import UserError

# Keys of adapter_config.json that are read here, or that change nothing once the tensors are there. Any other that is
# set makes the adapter another function: refused.
KNOWN_KEYS = """peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode r
    target_modules exclude_modules lora_alpha lora_dropout bias use_rslora modules_to_save init_lora_weights eva_config
    layers_to_transform layers_pattern rank_pattern alpha_pattern megatron_core use_dora qalora_group_size
    runtime_config ensure_weight_tying""".split()



def settings(model, base, rank, alpha, dropout, targets, rslora, dora, modules_to_save):
    """PEFT's adapter_config.json for a new adapter, and {module name: rank} of the layers that get one.

    base     what the adapter is for: a hub id, or the whole name of a directory
    targets  all-linear, names with commas (of layers, or ends of their names), or a regular expression for whole names

    Raises ValueError for an entry that matches nothing, a rank above the matrix, a module that can't be saved.
    """
    linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
    entries = [t.strip() for t in targets.split(",")]
    if targets == "all-linear":
        entries = sorted({name.rpartition(".")[2] for name in linears})
    is_pattern = not all(re.fullmatch(r"[\w.]+", entry) for entry in entries)
    if is_pattern:
        entries = [targets]
    found = set()
    for entry in entries:
        try:
            hits = {n for n in linears if (re.fullmatch(entry, n) if is_pattern else f".{n}".endswith(f".{entry}"))}
        except re.error as error:
            raise UserError(f"--lora_targets {targets}: not a regular expression: {error}") from error
        if not hits:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
            hint = "; train it whole with --lora_modules_to_save" if entry in ("lm_head", "embed_tokens") else ""
            raise UserError(f"--lora_targets {targets}: {entry!r} matches no layer{hint}. The last parts of their "
                            f"names are {known}; a whole one is {linears[0]}")
        found |= hits
    for name in sorted(found):
        module = model.get_submodule(name)
        if rank > (most := min(module.out_features, module.in_features)):
            raise UserError(f"--lora_rank {rank} is above the smaller side of {name}, {module.out_features} × "
                            f"{module.in_features}: at most {most}, or choose others with --lora_targets")
    saved = [name.strip() for name in (modules_to_save or "").split(",") if name.strip()]
    if strange := [name for name in saved if name not in ("embed_tokens", "lm_head")]:
        raise UserError(f"--lora_modules_to_save {modules_to_save}: {strange[0]!r} can't be trained whole beside an "
                        "adapter; embed_tokens and lm_head can")
    if saved and model.config.tie_word_embeddings:
        saved = ["embed_tokens", "lm_head"]  # one tensor, which PEFT stores under both names
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "use_rslora": rslora, "use_dora": dora,
        "target_modules": targets if is_pattern else entries, "modules_to_save": saved or None, "bias": "none",
        "rank_pattern": {}, "alpha_pattern": {}, "init_lora_weights": True, "fan_in_fan_out": False,
    }, dict.fromkeys(sorted(found), rank)


def checked(config, path):
    """A parsed adapter_config.json, made here or by PEFT. Raises ValueError where it is another kind of adapter."""
    if not isinstance(config, dict):
        raise UserError(f"{path} must hold a JSON object, it is {config!r:.60}")
    strange = [key for key, value in config.items() if value and key not in KNOWN_KEYS]
    if config.get("peft_type") != "LORA" or strange or config.get("bias", "none") != "none":
        what = strange or [key for key in ("peft_type", "bias") if key in config]
        raise UserError(f"{path}: only plain LoRA, rsLoRA and DoRA are supported, this one has "
                        + ", ".join(f"{key:.40} {config[key]!r:.40}" for key in what[:8]))
    patterns, saved = config.get("alpha_pattern") or {}, config.get("modules_to_save") or []
    if not isinstance(patterns, dict) or any(type(a) not in (int, float) for a in (
            config.get("lora_alpha"), config.get("lora_dropout", 0.0), *patterns.values())):
        raise UserError(f"{path}: lora_alpha, lora_dropout and what alpha_pattern has by name must be numbers")
    for pattern in patterns:  # a stranger's regular expression: one of a few tries, not of billions
        if len(pattern) > 200 or len(re.findall(r"[*+{]", pattern)) > 2 or re.search(r"\)[*+{]", pattern):
            raise UserError(f"{path}: alpha_pattern {pattern!r:.60} repeats too much; write out the layers' names")
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{path}: alpha_pattern {pattern!r:.60} is no regular expression: {error}") from error
    if not isinstance(saved, list) or not isinstance(config.get("base_model_name_or_path") or "", str):
        raise UserError(f"{path}: modules_to_save must be a list, and base_model_name_or_path a text")
    if config.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal", "eva"):
        raise UserError(f"{path}: init_lora_weights {config['init_lora_weights']!r} changes the base model as well; "
                        "convert the adapter with peft's path_initial_model_for_weight_conversion")
    return config


def check_base(config, model):
    """Raise ValueError when the adapter says that it was trained on another model than the one named `model`: it would
    load wherever the shapes fit. A directory may have been moved, so its own name is enough."""
    base = config.get("base_model_name_or_path")
    if base and os.path.basename(base.rstrip("/")) != os.path.basename(os.path.realpath(model)):
        raise UserError(f"the adapter was trained on {base}, not on --model {model}; give the former, or correct "
                        "base_model_name_or_path in its adapter_config.json")


def ranks_of(entries):
    """{module name: rank} of an adapter's tensors (name -> anything with a shape)."""
    return {name.removesuffix(".lora_A.weight"): (e.shape or (0,))[0] for name, e in entries.items()
            if ".lora_A." in name}


def scaling_of(name, rank, config):
    """What a module's B A is multiplied with. alpha_pattern's keys are regular expressions for the ends of names."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next((a for key, a in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
