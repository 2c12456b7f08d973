"""Read and check a model's config.json: sizes, biases, rotary positions and attention windows of each family.

Names are Hugging Face's. A value that would change what the model computes, and that is not implemented, is
refused.
"""

import re
from dataclasses import dataclass, field

from families import rope
from families.rows import DEFAULTS, FAMILIES, NESTED, REFUSED, SUPPORTED, check_number, rope_parts
from settings.errors import UserError

# The largest sizes that an untrusted config.json may have, far beyond existing models. Each layer takes time
# to create even where it takes no memory, and numbers of elements must fit in 64 bits.
LARGEST = {"vocab_size": 2**24, "hidden_size": 2**17, "intermediate_size": 2**20, "num_hidden_layers": 2**10,
           "num_attention_heads": 2**12, "num_key_value_heads": 2**12, "head_dim": 2**13,
           "global_head_dim": 2**13, "num_global_key_value_heads": 2**12}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
BOOLEANS = ("tie_word_embeddings", "attention_bias", "attention_out_bias", "mlp_bias", "qkv_bias", "bias",
            "use_sliding_window")
# A null has the meaning of a missing key here; elsewhere it may have its own (sliding_window: no window).
NOT_NULL = ("rms_norm_eps", "rope_theta", "rope_local_base_freq", "embedding_multiplier",
            "residual_multiplier", "attention_multiplier", "logits_scaling", "max_window_layers",
            "no_rope_layer_interval", "sliding_window_pattern")


@dataclass
class ModelConfig:
    """The values of a config.json that a model needs, under Hugging Face's names, checked by from_dict."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    head_dims: tuple  # per layer: head_dim, unless the layers with full attention have another one
    rms_norm_eps: float
    tie_word_embeddings: bool
    layer_types: tuple  # per layer: full_attention, sliding_attention, ...
    sliding_windows: tuple  # per layer: tokens that a token attends to, itself included; None: no limit
    ropes: tuple  # per layer: families.rope.Rope; None: no rotary positions
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    embedding_multiplier: float  # of the embedding's output
    residual_multiplier: float  # of what attention and MLP add to the hidden states
    attention_scale: float | None  # of queries times keys; None: 1 / sqrt(head_dim)
    logits_scaling: float  # what the logits are divided by
    max_positions: int  # tokens of the longest documents that it was made for
    values: dict = field(compare=False)  # the text model's config.json with defaults, for families/NAME.py

    @classmethod
    def from_dict(cls, config):
        """The ModelConfig of a parsed config.json, or of its text_config if it has one.

        Raises UserError for a malformed value, and for a model_type, an activation, a rope scaling or any
        other value that is not implemented here: a model that loads and computes something slightly
        different would be worse.
        """
        if not isinstance(config, dict):
            raise UserError(f"config.json must be a JSON object, it is {config!r:.60}")
        config = text_config(config)
        check_architecture(config)
        check_not_quantized(config)
        family = FAMILIES[config["model_type"]]
        given = {key: value for key, value in config.items() if value is not None or key not in NOT_NULL}
        values = {**DEFAULTS, **family.defaults, **given}
        values.update({key: values.get(key, config[other]) for other, key in family.aliases.items()
                       if other in config})
        check_values(values, family)
        check_windows(values, family)
        if family.complete:
            values = family.complete(values)
            check_values(values, family)
        check_windows(values, family)
        heads = values["num_attention_heads"]
        head_dim = values["head_dim"] or family.defaults.get("head_dim") or values["hidden_size"] // heads
        kv_heads = values["num_key_value_heads"] or heads
        if heads % kv_heads or head_dim % 2 or not head_dim:
            raise UserError(f"config.json: num_attention_heads {heads} must be a multiple of "
                            f"num_key_value_heads {kv_heads}, and head_dim {head_dim} must be even and not 0")
        biases = {name: getattr(family, name) for name in ("qkv_bias", "o_bias", "mlp_bias")}
        biases = {name: bool(values.get(bias)) if isinstance(bias, str) else bias
                  for name, bias in biases.items()}
        layer_types, windows = layers(values, family)
        scale = values.get("attention_multiplier")
        head_dims = layer_head_dims(values, family, head_dim, layer_types)
        return cls(
            **{key: values[key] for key in SIZES},
            model_type=values["model_type"],
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            head_dims=head_dims,
            rms_norm_eps=values["rms_norm_eps"],
            tie_word_embeddings=values.get("tie_word_embeddings", False),
            layer_types=layer_types,
            sliding_windows=windows,
            ropes=layer_ropes(values, family, head_dims, layer_types),
            **biases,
            qk_norm=family.qk_norm,
            embedding_multiplier=values.get("embedding_multiplier", 1.0),
            residual_multiplier=values.get("residual_multiplier", 1.0),
            attention_scale=scale if scale != head_dim**-0.5 else None,
            logits_scaling=values.get("logits_scaling", 1.0),
            max_positions=max_positions(values, family, layer_types),
            values=values,
        )

    def check_tp(self, size):
        """Raise UserError if the blocks of this family can't be split over `size` ranks (--tp)."""
        reason = FAMILIES[self.model_type].no_tp
        if size > 1 and reason:
            raise UserError(f"--tp {size}: tensor parallelism can't split a model of type {self.model_type}: "
                            f"{reason}; use --strategy fsdp --tp 1")

    def check_sp(self, size, n_ranks, tp=1):
        """Raise UserError if `size` ranks can't exchange tokens for the heads of this model (--sp).

        n_ranks  ranks that such groups divide: those of a replica, each tp group as one
        tp       ranks that share the heads already

        Key/value heads are no limit: their number divides that of the query heads, and they are repeated.
        """
        reason = FAMILIES[self.model_type].no_sp
        if size > 1 and reason:
            raise UserError(f"--sp {size}: sequence parallelism can't split a model of type "
                            f"{self.model_type}: {reason}; use --sp 1")
        heads = self.num_attention_heads // tp
        if heads % size:
            fits = [n for n in range(1, n_ranks + 1) if n_ranks % n == 0 and heads % n == 0]
            of_rank = f" that --tp {tp} leaves" if tp > 1 else ""
            raise UserError(f"--sp {size} must divide the {heads} query heads{of_rank}; with this model and "
                            f"this number of ranks, use --sp {' or '.join(map(str, fits))}")


def text_config(config):
    """The part of config.json about the text model: its text_config, or all of it.

    What the outer object says about tied embeddings and quantised weights counts: it is what Hugging Face's
    class of the whole model reads.
    """
    nested, model_type = config.get("text_config"), config.get("model_type")
    if not isinstance(nested, dict) or not isinstance(model_type, str) or model_type not in NESTED:
        return config
    outer = {key: config[key] for key in ("tie_word_embeddings", "quantization_config", "compression_config")
             if config.get(key) is not None}
    return {"model_type": NESTED[model_type], **nested, **outer}


def check_architecture(config):
    """Raise UserError for a model_type that is not supported, with the model's kind where it is known."""
    model_type = config.get("model_type")
    is_known = isinstance(model_type, str) and model_type in FAMILIES
    unused = FAMILIES[model_type].unused if is_known else ()
    for kind, (pattern, keys) in REFUSED.items():
        is_named = isinstance(model_type, str) and not is_known and re.search(pattern, model_type)
        shown = [key for key, value in config.items()
                 if key in keys and key not in unused and (value is True or value not in (None, False, 0, 1))]
        if is_named or shown:
            reason = f" ({shown[0]} is {config[shown[0]]!r:.20})" if shown else ""
            raise UserError(f"config.json: model_type {model_type!r:.60} is {kind}{reason}, which is not "
                            "supported; docs/models.md lists the models that are")
    if isinstance(model_type, str) and model_type in NESTED:
        raise UserError(f"config.json: text_config is {config.get('text_config')!r:.60}; a config.json of "
                        f"model_type {model_type} must have an object there")
    if not is_known:
        raise UserError(f"config.json: model_type {model_type!r:.60} is not supported; "
                        "docs/models.md lists the models that are")


def check_values(values, family):
    """Raise UserError for a malformed value, and for one that is not implemented."""
    for key in LARGEST:
        value = values.get(key)
        is_checked = key in SIZES or value  # the other keys are optional
        if is_checked and (type(value) is not int or not 1 <= value <= LARGEST[key]):
            raise UserError(f"config.json: {key} is {value!r:.60}; it must be an integer from 1 to "
                            f"{LARGEST[key]:,}")
    supported = {"partial_rotary_factor": 1} if not family.partial_rotary else {}
    for key, value in {**supported, **SUPPORTED, **family.supported}.items():
        allowed = value if isinstance(value, tuple) else (value,)
        if values.get(key) not in (*allowed, None):
            dropouts = [name for name in values if name.endswith(("_dropout", "_pdrop")) and values[name]]
            advice = (f"; to train without, set {' and '.join(dropouts)} to 0 there, for a model of the hub "
                      "in a local copy: hf download NAME --local-dir DIR, then --model DIR")
            raise UserError(f"config.json: {key} is {values[key]!r:.60}; only {allowed[0]!r} is supported"
                            f"{advice if key in dropouts else ''}")
    for key, low in (("rms_norm_eps", 0), ("rope_theta", 1), ("sliding_window", 1), ("logits_scaling", 1e-6),
                     ("embedding_multiplier", 0), ("residual_multiplier", 0), ("attention_multiplier", 0),
                     ("max_position_embeddings", 1), ("query_pre_attn_scalar", 1e-6),
                     ("final_logit_softcapping", 1e-6), ("attn_logit_softcapping", 1e-6),
                     ("rope_local_base_freq", 1)):
        check_number(values, key, low)
    for key in BOOLEANS:
        if values.get(key) not in (None, True, False):
            raise UserError(f"config.json: {key} is {values[key]!r:.60}; it must be true or false")


def check_windows(values, family):
    """Raise UserError for windows of a family that has none, as Hugging Face's class has none."""
    layer_types = values.get("layer_types")
    if family.windows == "none" and isinstance(layer_types, list) and "sliding_attention" in layer_types:
        raise UserError(f"config.json: layer_types has sliding_attention, and models of type "
                        f"{values['model_type']} have no windows; a new row of FAMILIES needs `windows`")


def check_not_quantized(config):
    """Raise UserError if config.json says that the weights are stored quantised, by whichever program."""
    for key in ("quantization_config", "compression_config"):
        quantization = config.get(key)
        if not quantization:
            continue
        method = quantization
        if isinstance(quantization, dict):
            method = quantization.get("quant_method", quantization)
            bits = [bit for bit in ("load_in_4bit", "load_in_8bit") if quantization.get(bit)]
            if method == "bitsandbytes" and not bits and "load_in_8bit" in quantization:
                continue  # both are off: the weights are the original ones
            method = " ".join([str(method), *bits])
        raise UserError(f"config.json: {key} is {method!s:.60}: the weights are stored quantised, and a "
                        "quantised model can't be trained; use the original weights as --model (mostly the "
                        "same name without -bnb-4bit, -GPTQ, -AWQ or -FP8; with -BF16 for Ministral 3), with "
                        "--use_lora --quantize nf4 to store them in 4 bits here")


def layers(values, family):
    """(layer_types, sliding_windows), (num_hidden_layers,) each, as Hugging Face's classes read them."""
    n_layers, window = values["num_hidden_layers"], values["sliding_window"]
    if family.windows == "none" or (family.has_switch and not values.get("use_sliding_window", False)):
        window = None
    layer_types = ["full_attention" if window is None else "sliding_attention"] * n_layers
    if family.windows == "layer_types" and (window is not None or not family.has_switch):
        default = family.layer_types(values) if family.layer_types else layer_types
        layer_types = values.get("layer_types") or default
    if (not isinstance(layer_types, list) or len(layer_types) != n_layers
            or any(layer_type not in family.layer_kinds for layer_type in layer_types)):
        raise UserError(f"config.json: layer_types {layer_types!r:.200} must have "
                        f"{' or '.join(family.layer_kinds)} for each of the {n_layers} layers")
    windows = tuple(window if layer_type == "sliding_attention" else None for layer_type in layer_types)
    return tuple(layer_types), windows


def rope_values(values, layer_type, family):
    """The rotary values of a kind of layers, with the lengths that a scaling needs."""
    parts = (family.rope_parts or rope_parts)(values, layer_type)
    for part in parts:
        if not isinstance(part, dict):
            raise UserError(f"config.json: rope scaling must be an object, it is {part!r:.60}")
    rotary = {key: value for part in parts for key, value in part.items()}
    rope_type = rotary.get("rope_type", rotary.get("type", "default"))
    if isinstance(rope_type, str):
        rope_type = family.rope_aliases.get(rope_type, rope_type)
    positions = values["max_position_embeddings"] or 2**30
    if values.get(rope.ORIGINAL):
        rotary[rope.ORIGINAL] = values[rope.ORIGINAL]
    elif rope_type in ("yarn", "longrope"):
        rotary.setdefault(rope.ORIGINAL, positions)
    return {**rotary, "rope_type": rope_type, "max_position_embeddings": positions}


def layer_head_dims(values, family, head_dim, layer_types):
    """ModelConfig.head_dims. Raises UserError for sizes of layers with full attention that do not fit."""
    if "global_head_dim" not in family.defaults:
        return (head_dim,) * len(layer_types)
    size, heads = values["global_head_dim"], values["num_attention_heads"]
    kv_heads = values["num_global_key_value_heads"]
    if size % 2 or heads % kv_heads:
        raise UserError(f"config.json: num_attention_heads {heads} must be a multiple of "
                        f"num_global_key_value_heads {kv_heads}, and global_head_dim {size} must be even")
    return tuple(size if kind == "full_attention" else head_dim for kind in layer_types)


def layer_ropes(values, family, head_dims, layer_types):
    """ModelConfig.ropes: the families.rope.Rope of each layer."""
    by_type = {}
    for layer_type, head_dim in zip(layer_types, head_dims):  # one head_dim for each type
        rotary = rope_values(values, layer_type, family)
        is_proportional = rotary["rope_type"] == "proportional"  # it has a share of its own
        share = rotary.get("partial_rotary_factor", values.get("partial_rotary_factor"))
        share = 1 if share is None or is_proportional else share
        if share != 1 and not family.partial_rotary:
            raise UserError(f"config.json: rope scaling {rotary!r:.200} is not supported; "
                            "partial_rotary_factor may only be 1")
        if type(share) not in (int, float) or not 2 / head_dim <= share <= 1:
            raise UserError(f"config.json: partial_rotary_factor is {share!r:.60}; it must be a number from "
                            f"{2 / head_dim:g} (two values of a head) to 1")
        by_type[layer_type] = rope.read(rotary, int(head_dim * share), family.rope_types)
    uses_rope = family.rope_layers(values) if family.rope_layers else [True] * len(layer_types)
    return tuple(by_type[kind] if uses else None for kind, uses in zip(layer_types, uses_rope))


def max_positions(values, family, layer_types):
    """ModelConfig.max_positions: max_position_embeddings, or what a rope scaling makes of it.

    A linear scaling comes with the length before the scaling, llama3 with the one after it. YaRN and LongRoPE
    come with either; they name the length before it.
    """
    kind = "full_attention" if "full_attention" in layer_types else layer_types[0]  # one that was checked
    scaling = rope_values(values, kind, family)
    positions, factor = scaling["max_position_embeddings"], scaling.get("factor") or 1
    if scaling["rope_type"] == "linear":
        return int(positions * factor)
    if scaling["rope_type"] in ("yarn", "longrope"):
        return max(positions, int(scaling[rope.ORIGINAL] * factor))
    return positions
