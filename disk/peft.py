"""PEFT's adapter_config.json: created for a new adapter, read and checked for an existing one.

Also the LoRA rank and the scaling of each adapted module.
"""

import functools
import math
import os
import re

from torch import nn

from disk import checkpoint, files, foreign, layout, pretrained
from ops.freezing import read_names
from settings.errors import UserError

# Keys of adapter_config.json that this file reads, or that do not matter once the tensors exist. Any other
# key that is set changes what the adapter computes, so it is refused.
KNOWN_KEYS = """peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode
    r target_modules exclude_modules lora_alpha lora_dropout bias use_rslora modules_to_save init_lora_weights
    eva_config layers_to_transform layers_pattern rank_pattern alpha_pattern megatron_core use_dora
    qalora_group_size runtime_config ensure_weight_tying""".split()
LARGEST_RANK = 2**14
PER_HEAD = "in_proj_a", "in_proj_b"  # layers with one output for each head: their rank may be above it
MOST_PATTERNS = 2**12  # of alpha_pattern; each is compared with the name of each module
compiled = functools.lru_cache(2 * MOST_PATTERNS)(re.compile)  # re's own cache has 512 places


def new(model, cfg, multimodal=False):
    """(adapter_config.json, {module name: LoRA rank}) for a new adapter.

    cfg         sft.Config: model, lora_rank, lora_alpha, ...
    multimodal  whether `model` is the text model of a multimodal one, which PEFT will adapt

    Raises UserError for a target that matches nothing, a rank larger than a side of a matrix (PER_HEAD layers
    of linear attention may be smaller: all-linear includes them), and a module that --lora_modules_to_save
    cannot name.
    """
    targets, names = matching_layers(model, cfg.lora_targets)
    if multimodal:
        targets = targets_in_full_model(targets, names)
    for name in names:
        if name.endswith(PER_HEAD):
            continue
        module = model.get_submodule(name)
        largest = min(module.out_features, module.in_features)
        if cfg.lora_rank > largest:
            raise UserError(f"--lora_rank {cfg.lora_rank} is larger than a side of {name}, "
                            f"{module.out_features} × {module.in_features}; use at most {largest}, or choose "
                            "other layers with --lora_targets")
    saved = [name.strip() for name in (cfg.lora_modules_to_save or "").split(",") if name.strip()]
    unsupported = [name for name in saved if name not in ("embed_tokens", "lm_head")]
    if unsupported:
        raise UserError(f"--lora_modules_to_save {cfg.lora_modules_to_save}: {unsupported[0]!r} can't be "
                        "fully trained beside an adapter; only embed_tokens and lm_head can")
    if saved and model.config.tie_word_embeddings:
        saved = ["embed_tokens", "lm_head"]  # one tensor, which PEFT stores under both names
    base = cfg.model
    if cfg.model == "tiny" or os.path.isdir(cfg.model):
        base = os.path.abspath(pretrained.model_directory(cfg.model))  # PEFT will open this path
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
    """(target_modules in PEFT's form, sorted names of the linear layers that they match).

    targets  "all-linear"; or comma-separated names of layers, or ends of such names; or a regular expression
             that matches full names

    Raises UserError for an entry that matches nothing and for a malformed regular expression.
    """
    linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
    last_parts = sorted({name.rpartition(".")[2] for name in linears})
    entries, pattern = read_names(targets, "--lora_targets")
    if targets == "all-linear":
        entries, pattern = last_parts, None
    matched = set()
    for entry in entries:
        if pattern:
            matches = {name for name in linears if pattern.fullmatch(name)}
        else:
            matches = {name for name in linears if f".{name}".endswith(f".{entry}")}
        if not matches:
            remedy = f"use one of {', '.join(last_parts)}, or a full name such as {linears[0]}"
            if entry in ("lm_head", "embed_tokens"):
                remedy = f"train it fully with --lora_modules_to_save, or {remedy}"
            raise UserError(f"--lora_targets {targets}: {entry!r} matches no layer; {remedy}")
        matched |= matches
    return targets if pattern else entries, sorted(matched)


def targets_in_full_model(targets, names):
    """target_modules, from those of the text model, that match no layer of a vision tower.

    PEFT compares names with the ends of all layers' names, and a vision tower has a q_proj, too.

    targets, names  of matching_layers
    """
    if isinstance(targets, str):  # a regular expression, for names of the text model
        return [layout.name_in_adapter(name, multimodal=True) for name in names]
    ends = "|".join(re.escape(target.removeprefix("model.")) for target in targets)
    return rf"{re.escape(layout.FULL_PREFIX)}(.*\.)?({ends})"


def read_config(directory):
    """The adapter_config.json of a directory, written by this trainer or by PEFT.

    Raises UserError for a kind of adapter that this trainer does not support, and for malformed values.
    """
    path = os.path.join(directory, "adapter_config.json")
    if not os.path.exists(path):
        raise UserError(f"{directory} has no adapter_config.json, so it is not a LoRA adapter; use an "
                        "adapter directory such as outputs/lora/checkpoints/latest")
    config = files.read_json(path)
    if not isinstance(config, dict):
        raise UserError(f"{path} must hold a JSON object, it is {config!r:.60}")
    unsupported = [key for key, value in config.items() if value and key not in KNOWN_KEYS]
    if config.get("peft_type") != "LORA" or unsupported or config.get("bias", "none") != "none":
        keys = unsupported or [key for key in ("peft_type", "bias") if key in config]
        raise UserError(f"{path}: only plain LoRA, rsLoRA and DoRA are supported; this adapter has "
                        + ", ".join(f"{key:.40} {config[key]!r:.40}" for key in keys[:8]))
    patterns, saved = config.get("alpha_pattern") or {}, config.get("modules_to_save") or []
    numbers = [config.get("lora_alpha"), config.get("lora_dropout", 0.0)]
    if isinstance(patterns, dict):
        numbers += patterns.values()
    if not isinstance(patterns, dict) or any(type(number) not in (int, float) or not abs(number) < 1e30
                                             for number in numbers):
        raise UserError(f"{path}: lora_alpha, lora_dropout and the values of alpha_pattern must be numbers")
    if len(patterns) > MOST_PATTERNS:
        raise UserError(f"{path}: alpha_pattern has {len(patterns):,} entries; at most {MOST_PATTERNS:,} are "
                        "allowed")
    for key in ("use_rslora", "use_dora", "inference_mode"):  # the text "false" would count as true
        if config.get(key) not in (None, True, False):
            raise UserError(f"{path}: {key} is {config[key]!r:.60}; it must be true or false")
    for pattern in patterns:
        check_pattern(pattern, path)
    if not isinstance(saved, list) or not isinstance(config.get("base_model_name_or_path") or "", str):
        raise UserError(f"{path}: modules_to_save must be a list, and base_model_name_or_path a string")
    if config.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal", "eva"):
        raise UserError(f"{path}: init_lora_weights {config['init_lora_weights']!r} changes the base model "
                        "too; convert the adapter with peft's path_initial_model_for_weight_conversion")
    return config


def check_pattern(pattern, path):
    """Raise UserError for a malformed regular expression, or one that could take exponential time."""
    if len(pattern) > 200 or len(re.findall(r"[*+{]", pattern)) > 2 or re.search(r"\)[*+{]", pattern):
        raise UserError(f"{path}: alpha_pattern {pattern!r:.60} repeats too much; list the names of the "
                        "layers instead")
    try:
        compiled(rf"(.*\.)?({pattern})$")
    except re.error as error:
        message = f"{path}: alpha_pattern {pattern!r:.60} is not a regular expression: {error}"
        raise UserError(message) from error


def read(directory):
    """(adapter_config.json, {module name: LoRA rank}) of an existing adapter.

    Raises UserError if it adapts layers that are not the text model's.
    """
    config, ranks = read_config(directory), lora_ranks(pretrained.weight_entries(directory))
    if others := [name for name in ranks if not name.startswith("model.layers.") and "layers." in name]:
        raise UserError(f"the adapter {directory} has tensors for {others[0]:.200} ({len(others)} such "
                        "layers): only layers of the text model are trained here; train the adapter with "
                        "PEFT, or start a new one")
    return config, ranks


def base_directory(directory, base=None):
    """The directory of an adapter's base model: `base`, or the one that its adapter_config.json names.

    Raises UserError if neither does, and if the directory holds other weights than those that the adapter was
    trained on, as far as the adapter's training_state/ tells.
    """
    flag, name = "--base", base or read_config(directory).get("base_model_name_or_path")
    if not name:
        raise UserError(f"{directory}: adapter_config.json does not name the base model; pass --base DIR")
    if not base:
        flag = "base_model_name_or_path"
        files.check_hub_endpoint()
    try:
        found = pretrained.model_directory(name, flag)
    except UserError as error:
        if base:
            raise
        raise UserError(f"{directory} is an adapter of {name}, which is not found; pass --base DIR with the "
                        f"directory of that model (sft.py: --model DIR). {error}") from error
    then = saved_base_fingerprint(directory)
    if then and not pretrained.is_same(then, pretrained.fingerprint(found)):
        raise UserError(f"{found} has other weights than the model that the adapter {directory} was trained "
                        "on; pass --base DIR with that model. To use these weights anyway, delete "
                        "training_state/ of the adapter")
    return found


def saved_base_fingerprint(directory):
    """The fingerprint of the base model in a checkpoint of this trainer; None for other adapters."""
    has_state = os.path.exists(os.path.join(directory, checkpoint.STATE))
    return checkpoint.load_state(directory).get("base") if has_state else None


def base_fingerprint(directory):
    """The fingerprint (see pretrained.fingerprint) of the model that an adapter was trained on, or None.

    A checkpoint of this trainer has it. For others it is computed, if that model is on this machine.
    """
    if saved := saved_base_fingerprint(directory):
        return saved
    base = read_config(directory).get("base_model_name_or_path")
    if not base:
        return None
    if not os.path.isdir(base) and re.fullmatch(pretrained.HUB_ID, base):
        from huggingface_hub import try_to_load_from_cache  # slow import

        config = try_to_load_from_cache(base, "config.json")  # may also be a mark that there is no such file
        base = os.path.dirname(config) if isinstance(config, str) else base
    try:
        return pretrained.fingerprint(base)
    except (OSError, UserError):  # it has moved, or was quantised or converted: then its name has to do
        return None


def has_same_name(base, model):
    """Whether two paths or hub ids of a model end in the same component: a directory may have been moved."""
    return os.path.basename(base.rstrip("/")) == os.path.basename(os.path.realpath(model))


def check_base(directory, model):
    """Raise UserError if an adapter was trained on other weights than those of --model.

    Such an adapter would load if the shapes are equal. Weights decide, not names. Where the adapter's own
    base can't be read, the last component of the names has to be equal.

    directory, model  of the adapter; what --model names
    """
    base, then = read_config(directory).get("base_model_name_or_path"), base_fingerprint(directory)
    if then is None and base and not has_same_name(base, model):
        raise UserError(f"the adapter {directory} was trained on {base}, not on --model {model}, and the "
                        f"weights of {base} are not on this machine to compare them; use --model {base}, or, "
                        f"if it is the same model, set base_model_name_or_path to {model} in its "
                        "adapter_config.json")
    if then is None:
        return
    model_directory = pretrained.model_directory(model)
    foreign.check_model(model_directory)
    if not pretrained.is_same(then, pretrained.fingerprint(model_directory, shares=True)):
        base = base or "another model"
        raise UserError(f"the adapter {directory} was trained on {base}, not on --model {model}: their "
                        f"weights differ; use --model with the model that it was trained on")


def lora_ranks(entries):
    """{module name: LoRA rank} from the tensors of an adapter, {name: anything with a shape}.

    Raises UserError for a rank outside 1..LARGEST_RANK: an untrusted file may claim any, as a tensor without
    columns takes no bytes.
    """
    ranks_by_module = {}
    for name, entry in entries.items():
        if ".lora_A." not in name:
            continue
        module = name.removesuffix(".lora_A.weight")
        rank = entry.shape[0] if entry.shape else 0
        if not 1 <= rank <= LARGEST_RANK:
            raise UserError(f"the adapter of {module} has rank {rank}; it may be from 1 to {LARGEST_RANK:,}")
        ranks_by_module[module] = rank
    return ranks_by_module


def scaling_of(name, rank, config):
    """The factor of a module's B A, from its name, its LoRA rank and adapter_config.json."""
    # PEFT's rule: keys of alpha_pattern are regular expressions for the end of a name; the first match wins.
    patterns = config.get("alpha_pattern") or {}
    alphas = [alpha for key, alpha in patterns.items() if compiled(rf"(.*\.)?({key})$").match(name)]
    alpha = alphas[0] if alphas else config["lora_alpha"]
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
