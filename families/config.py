"""Read and check a model's config.json: sizes, biases, rotary positions and attention windows of each family.

Names are Hugging Face's. A value that would change what the model computes, and that model.py does not
implement, is refused.
"""

from dataclasses import dataclass

from settings.errors import UserError

# The largest sizes that an untrusted config.json may have, far beyond existing models. Each layer takes time
# to create even where it takes no memory, and numbers of elements must fit in 64 bits.
LARGEST = {"vocab_size": 2**24, "hidden_size": 2**17, "intermediate_size": 2**20, "num_hidden_layers": 2**10,
           "num_attention_heads": 2**12, "num_key_value_heads": 2**12, "head_dim": 2**13}

# What config.json does not say about a family: which linear layers have biases, whether queries and keys are
# normalised, and the defaults of Hugging Face's configuration classes for optional keys.
FAMILIES = {
    "qwen2": dict(qkv_bias=True, o_bias=False, qk_norm=False, head_dim=None, kv_heads=32, window=4096),
    "qwen3": dict(qkv_bias=None, o_bias=None, qk_norm=True, head_dim=128, kv_heads=32, window=4096),
    "llama": dict(qkv_bias=None, o_bias=None, qk_norm=False, head_dim=None, kv_heads=None, window=None),
    "mistral": dict(qkv_bias=False, o_bias=False, qk_norm=False, head_dim=None, kv_heads=8, window=4096),
}  # None: config.json decides (attention_bias; hidden_size / num_attention_heads; num_attention_heads)

# max_position_embeddings where config.json lacks it; a family that is not here gets no warning
POSITIONS = {"qwen2": 2**15, "qwen3": 2**15, "llama": 2**11, "mistral": 2**17}


@dataclass
class ModelConfig:
    """The values of a config.json that model.py needs, under Hugging Face's names, checked by from_dict."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict  # {} or {"rope_type": "linear" | "llama3", ...}
    tie_word_embeddings: bool
    sliding_windows: tuple  # per layer: tokens that a token attends to, itself included; None: no limit
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    max_positions: int  # tokens of the longest documents that it was made for

    @classmethod
    def from_dict(cls, config):
        """The ModelConfig of a parsed config.json.

        Raises UserError for a malformed value, and for a model_type, an activation, a rope scaling or any
        other value that is not implemented here: a model that loads and computes something slightly
        different would be worse.
        """
        if not isinstance(config, dict):
            raise UserError(f"config.json must be a JSON object, it is {config!r:.60}")
        model_type = config.get("model_type")
        if not isinstance(model_type, str) or model_type not in FAMILIES:
            raise UserError(f"config.json: model_type {model_type!r:.60} is not supported; "
                            f"supported are {', '.join(FAMILIES)}")
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for key in LARGEST:
            value = config.get(key)
            is_checked = key in sizes or value  # the other keys are optional
            if is_checked and (type(value) is not int or not 1 <= value <= LARGEST[key]):
                raise UserError(f"config.json: {key} is {value!r:.60}; it must be an integer from 1 to "
                                f"{LARGEST[key]:,}")
        supported = {
            "hidden_act": "silu",
            "attention_dropout": 0,
            "partial_rotary_factor": 1,
        }
        for key, value in supported.items():
            if config.get(key, value) not in (value, None):
                raise UserError(f"config.json: {key} is {config[key]!r:.60}; only {value!r} is supported")
        check_not_quantized(config)
        for key, low in (("rms_norm_eps", 0), ("rope_theta", 1), ("sliding_window", 1)):
            check_number(config, key, low)
        for key in ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"):
            if config.get(key) not in (None, True, False):
                raise UserError(f"config.json: {key} is {config[key]!r:.60}; it must be true or false")

        family = FAMILIES[model_type]
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or family["head_dim"] or config["hidden_size"] // heads
        kv_heads = config.get("num_key_value_heads", family["kv_heads"]) or heads
        if heads % kv_heads or head_dim % 2:
            raise UserError(f"config.json: num_attention_heads {heads} must be a multiple of "
                            f"num_key_value_heads {kv_heads}, and head_dim {head_dim} must be even")
        bias = bool(config.get("attention_bias", False))
        return cls(
            **{key: config[key] for key in sizes},
            model_type=model_type,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            sliding_windows=sliding_windows(config),
            qk_norm=family["qk_norm"],
            qkv_bias=bias if family["qkv_bias"] is None else family["qkv_bias"],
            o_bias=bias if family["o_bias"] is None else family["o_bias"],
            mlp_bias=bool(config.get("mlp_bias", False)) and model_type == "llama",
            **rope_fields(config),
            max_positions=max_positions(config),
        )


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
                        "same name without -bnb-4bit, -GPTQ, -AWQ or -FP8), with --use_lora --quantize nf4 "
                        "to store them in 4 bits here")


def check_number(config, key, low):
    """Raise UserError if config.json has the key and its value is not a finite number of at least `low`."""
    value = config.get(key)
    if value is not None and (type(value) not in (int, float) or not low <= value < 1e30):
        raise UserError(f"config.json: {key} is {value!r:.60}; it must be a number of at least {low}")


def rope_fields(config):
    """{"rope_theta", "rope_scaling"} of a config.json, from the new key (rope_parameters) or the old ones."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"config.json: rope scaling must be an object, it is {rope!r:.60}")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    required = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
    is_known = isinstance(rope_type, str) and rope_type in required
    if not is_known or rope.get("partial_rotary_factor", 1) != 1:
        raise UserError(f"config.json: rope scaling {rope!r:.200} is not supported; rope_type may be "
                        f"{', '.join(required)}, and partial_rotary_factor only 1")
    missing = [key for key in required[rope_type] if key not in rope]
    if missing:
        raise UserError(f"config.json: rope scaling {rope!r:.200} lacks {', '.join(missing)}")
    for key in ("rope_theta", *required[rope_type]):
        check_number(rope, key, 0)
    theta = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
    return dict(
        rope_theta=float(theta),
        rope_scaling={} if rope_type == "default" else {**rope, "rope_type": rope_type},
    )


def max_positions(config):
    """ModelConfig.max_positions: max_position_embeddings, times the factor of a linear rope scaling.

    The other scalings come with a max_position_embeddings that includes their factor.
    """
    check_number(config, "max_position_embeddings", 1)
    positions = config.get("max_position_embeddings") or POSITIONS.get(config["model_type"], 2**30)
    scaling = rope_fields(config)["rope_scaling"]
    return int(positions * scaling["factor"] if scaling.get("rope_type") == "linear" else positions)


def sliding_windows(config):
    """ModelConfig.sliding_windows, (num_hidden_layers,), as Hugging Face's configuration classes read it."""
    n_layers = config["num_hidden_layers"]
    window = config.get("sliding_window", FAMILIES[config["model_type"]]["window"])
    if config["model_type"] == "llama" or window is None:
        return (None,) * n_layers
    if config["model_type"] == "mistral":
        return (window,) * n_layers
    if not config.get("use_sliding_window", False):
        return (None,) * n_layers
    check_number(config, "max_window_layers", 0)
    n_full = config.get("max_window_layers", 28)  # the first layers have full attention, in spite of the name
    layer_types = config.get("layer_types") or [
        "full_attention" if i < n_full else "sliding_attention" for i in range(n_layers)]
    known = ("full_attention", "sliding_attention")
    if (not isinstance(layer_types, list) or len(layer_types) != n_layers
            or any(layer_type not in known for layer_type in layer_types)):
        raise UserError(f"config.json: layer_types {layer_types!r:.200} must have full_attention or "
                        f"sliding_attention for each of the {n_layers} layers")
    return tuple(window if layer_type == "sliding_attention" else None for layer_type in layer_types)
