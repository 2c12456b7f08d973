"""LoRA: low-rank adapters beside frozen linear layers, in PEFT's own format.

    python lora.py merge outputs/checkpoints/latest OUT     # adapter and base -> a full model directory

Owns the adapted layer, which layers get one, PEFT's adapter_config.json, and first values. An adapter's
settings are that file's dict, by PEFT's names; its tensors have PEFT's names less the prefix `base_model.model.`,
which are the model's own. Sources: LoRA (arXiv 2106.09685), rsLoRA (2312.03732), DoRA (2402.09353), peft 0.21.
"""

import math
import os
import re

import torch
import torch.nn.functional as F
from torch import nn

# Keys of adapter_config.json that are read here, or that change nothing once the tensors are there. Any other that is
# set makes the adapter another function: refused.
KNOWN_KEYS = """peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode r
    target_modules exclude_modules lora_alpha lora_dropout bias use_rslora modules_to_save init_lora_weights eva_config
    layers_to_transform layers_pattern rank_pattern alpha_pattern megatron_core use_dora qalora_group_size
    runtime_config ensure_weight_tying""".split()


LARGEST_RANK = 2**14  # a header may claim any where the matrix has no columns


class LoRALinear(nn.Module):
    """y = x W' + b + scaling · dropout(x) A' B', with W and b frozen; with DoRA each output is also rescaled.

    weight (out, in) and bias keep the names that they have without an adapter. lora_A (rank, in) is random, lora_B
    (out, rank) zero at first, both fp32: training starts from the base model. lora_magnitude_vector (out,): DoRA's.
    """

    def __init__(self, linear, rank, scaling, dropout, dora):
        super().__init__()
        self.weight, self.bias, self.scaling, self.dropout = linear.weight, linear.bias, scaling, dropout
        self.in_features, self.out_features = columns, rows = linear.in_features, linear.out_features
        self.product = getattr(linear, "product", F.linear)  # of a 4-bit weight, or a plain one
        if hasattr(linear, "fill"):
            self.fill = linear.fill
        new = dict(bias=False, device=linear.weight.device, dtype=torch.float32)
        self.lora_A, self.lora_B = nn.Linear(columns, rank, **new), nn.Linear(rank, rows, **new)
        self.lora_magnitude_vector = nn.Parameter(torch.empty(rows, device=new["device"])) if dora else None
        self.combine = lambda tensor: tensor  # sums over processes that hold other columns of the weight

    def forward(self, x):
        return self.compute(x, self.weight, self.bias, self.lora_A.weight, self.lora_B.weight,
                            self.lora_magnitude_vector)

    def compute(self, x, weight, bias, A, B, magnitude):
        """x (N, in) -> (N, out). A frozen weight gets no gradient: autograd then makes neither that product nor a copy
        of x for it."""
        h = F.linear(F.dropout(x, self.dropout, self.training), A)  # (N, rank)
        # Added in place: the base's output, the largest tensor here, is never copied.
        y = self.product(x, weight, bias if magnitude is None else None).addmm_(h, B.T, alpha=self.scaling)
        if magnitude is None:
            return y
        y = y * (magnitude / self.row_norms(weight, A, B))
        return y if bias is None else y + bias

    @torch.no_grad()
    def row_norms(self, weight, A, B):
        """Norm of each row of W + scaling · B A, (out,): a constant in backward (DoRA, section 4.3).

        From ||w||² + 2 s b·(A w) + s² b·(A A')b, so that no second (out, in) matrix is made.
        """
        squares = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
        mixed = 2 * (weight @ A.T) + self.scaling * (B @ (A @ A.T))  # (out, rank)
        squares += self.scaling * (mixed * B).sum(1)
        return self.combine(squares).sqrt().to(weight.dtype)


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
            raise ValueError(f"--lora_targets {targets}: not a regular expression: {error}") from error
        if not hits:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
            hint = "; train it whole with --lora_modules_to_save" if entry in ("lm_head", "embed_tokens") else ""
            raise ValueError(f"--lora_targets {targets}: {entry!r} matches no layer{hint}. The last parts of their "
                             f"names are {known}; a whole one is {linears[0]}")
        found |= hits
    for name in sorted(found):
        module = model.get_submodule(name)
        if rank > (most := min(module.out_features, module.in_features)):
            raise ValueError(f"--lora_rank {rank} is above the smaller side of {name}, {module.out_features} × "
                             f"{module.in_features}: at most {most}, or choose others with --lora_targets")
    saved = [name.strip() for name in (modules_to_save or "").split(",") if name.strip()]
    if strange := [name for name in saved if name not in ("embed_tokens", "lm_head")]:
        raise ValueError(f"--lora_modules_to_save {modules_to_save}: {strange[0]!r} can't be trained whole beside an "
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
        raise ValueError(f"{path} must hold a JSON object, it is {config!r:.60}")
    strange = [key for key, value in config.items() if value and key not in KNOWN_KEYS]
    if config.get("peft_type") != "LORA" or strange or config.get("bias", "none") != "none":
        what = strange or [key for key in ("peft_type", "bias") if key in config]
        raise ValueError(f"{path}: only plain LoRA, rsLoRA and DoRA are supported, this one has "
                         + ", ".join(f"{key:.40} {config[key]!r:.40}" for key in what[:8]))
    patterns, saved = config.get("alpha_pattern") or {}, config.get("modules_to_save") or []
    if not isinstance(patterns, dict) or any(type(a) not in (int, float) for a in (
            config.get("lora_alpha"), config.get("lora_dropout", 0.0), *patterns.values())):
        raise ValueError(f"{path}: lora_alpha, lora_dropout and what alpha_pattern has by name must be numbers")
    for pattern in patterns:  # a stranger's regular expression: one of a few tries, not of billions
        if len(pattern) > 200 or len(re.findall(r"[*+{]", pattern)) > 2 or re.search(r"\)[*+{]", pattern):
            raise ValueError(f"{path}: alpha_pattern {pattern!r:.60} repeats too much; write out the layers' names")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{path}: alpha_pattern {pattern!r:.60} is no regular expression: {error}") from error
    if not isinstance(saved, list) or not isinstance(config.get("base_model_name_or_path") or "", str):
        raise ValueError(f"{path}: modules_to_save must be a list, and base_model_name_or_path a text")
    if config.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal", "eva"):
        raise ValueError(f"{path}: init_lora_weights {config['init_lora_weights']!r} changes the base model as well; "
                         "convert the adapter with peft's path_initial_model_for_weight_conversion")
    return config


def check_base(config, model):
    """Raise ValueError when the adapter says that it was trained on another model than the one named `model`: it would
    load wherever the shapes fit. A directory may have been moved, so its own name is enough."""
    base = config.get("base_model_name_or_path")
    if base and os.path.basename(base.rstrip("/")) != os.path.basename(os.path.realpath(model)):
        raise ValueError(f"the adapter was trained on {base}, not on --model {model}; give the former, or correct "
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


def inject(model, config, ranks):
    """Freeze the model, put an adapter on each module of `ranks` and thaw what modules_to_save names; in place.

    Raises ValueError for a module that the model does not have: the adapter is another model's.
    """
    model.requires_grad_(False)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules())
    for name, rank in ranks.items():
        if not isinstance(modules.get(name), nn.Linear) or name == "lm_head":
            raise ValueError(f"the adapter has a part for {name}, which is no layer of this model that can have one; "
                             f"is it for another? Its base is {config.get('base_model_name_or_path')}")
        if not 1 <= rank <= LARGEST_RANK:
            raise ValueError(f"the adapter's part for {name} has rank {rank}; it may be from 1 to {LARGEST_RANK:,}")
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, LoRALinear(modules[name], rank, scaling_of(name, rank, config), config.get(
            "lora_dropout", 0.0), config.get("use_dora", False)))
    for name, p in parameters.items():
        if any(f".{name.rpartition('.')[0]}".endswith(f".{saved}") for saved in config.get("modules_to_save") or ()):
            p.requires_grad_(True)
            p.data = p.data.float()


def first_values(model, seed):
    """Yield (name, whole tensor) of every A and B, as PEFT draws them: the same on any number of ranks."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if ".lora_A." in name:
            bound = 1 / math.sqrt(p.shape[1])  # Kaiming's for a = sqrt(5)
            yield name, torch.empty(p.shape).uniform_(-bound, bound, generator=generator)
        elif ".lora_B." in name:
            yield name, torch.zeros(p.shape)


if __name__ == "__main__":
    import merge  # here this file is an entry point; for sft.py and chat.py it is a leaf
    from config import run

    run(merge.main)
