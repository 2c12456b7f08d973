"""config.json of a model directory, checked: sizes, biases, rotary positions and windows of each family.

Names are Hugging Face's. A setting that would change the function and is not built here is refused.
"""

from dataclasses import dataclass

from settings.errors import UserError

# The largest sizes a config.json may have, beyond any existing model: each layer takes time to make even
# where it takes no memory, and numbers of elements must fit 64 bits.
LARGEST = {"vocab_size": 2**24, "hidden_size": 2**17, "intermediate_size": 2**20, "num_hidden_layers": 2**10,
           "num_attention_heads": 2**12, "num_key_value_heads": 2**12, "head_dim": 2**13}

# What config.json does not say about a family: where its linear layers have biases, whether queries and keys
# are normalised, and the defaults of Hugging Face's configuration classes for keys that a file may leave out.
FAMILIES = {
    "qwen2": dict(qkv_bias=True, o_bias=False, qk_norm=False, head_dim=None, kv_heads=32, window=4096),
    "qwen3": dict(qkv_bias=None, o_bias=None, qk_norm=True, head_dim=128, kv_heads=32, window=4096),
    "llama": dict(qkv_bias=None, o_bias=None, qk_norm=False, head_dim=None, kv_heads=None, window=None),
    "mistral": dict(qkv_bias=False, o_bias=False, qk_norm=False, head_dim=None, kv_heads=8, window=4096),
}  # None: config.json decides (attention_bias; hidden_size / num_attention_heads; num_attention_heads)


@dataclass
class ModelConfig:
    """The settings of a config.json, under Hugging Face's names, after the checks of from_dict."""

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
    sliding_windows: tuple  # one entry a layer: how many tokens back it sees, itself included; None is all
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool

    @classmethod
    def from_dict(cls, config):
        """Read a parsed config.json.

        Raises UserError for a model_type, an activation, a rope scaling or another setting that is not built
        here: a model that loads and computes something slightly different would be worse.
        """
        if not isinstance(config, dict):
            raise UserError(f"config.json must be a JSON object, it is {config!r:.60}")
        kind = config.get("model_type")
        if not isinstance(kind, str) or kind not in FAMILIES:
            raise UserError(f"config.json: model_type {kind!r:.60} is not supported; "
                            f"these are: {', '.join(FAMILIES)}")
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for key in LARGEST:
            value = config.get(key)
            if (key in sizes or value) and (type(value) is not int or not 1 <= value <= LARGEST[key]):
                raise UserError(f"config.json: {key} is {value!r:.60}; it must be a whole number from 1 to "
                                f"{LARGEST[key]:,}")
        only = {
            "hidden_act": "silu",
            "attention_dropout": 0,
            "partial_rotary_factor": 1,
            "quantization_config": None,
        }
        for key, value in only.items():
            if config.get(key, value) not in (value, None):
                raise UserError(f"config.json: {key} is {config[key]!r:.60}; only {value!r} is supported")
        for key, low in (("rms_norm_eps", 0), ("rope_theta", 1), ("sliding_window", 1)):
            check_number(config, key, low)
        for key in ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"):
            if config.get(key) not in (None, True, False):
                raise UserError(f"config.json: {key} is {config[key]!r:.60}; it must be true or false")

        family = FAMILIES[kind]
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or family["head_dim"] or config["hidden_size"] // heads
        kv_heads = config.get("num_key_value_heads", family["kv_heads"]) or heads
        if heads % kv_heads or head_dim % 2:
            raise UserError(f"config.json: {heads} attention heads, {kv_heads} key/value heads, "
                            f"head_dim {head_dim}: the first must be a multiple of the second, "
                            "and head_dim even")
        bias = bool(config.get("attention_bias", False))
        return cls(
            **{key: config[key] for key in sizes},
            model_type=kind,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            sliding_windows=sliding_windows(config),
            qk_norm=family["qk_norm"],
            qkv_bias=bias if family["qkv_bias"] is None else family["qkv_bias"],
            o_bias=bias if family["o_bias"] is None else family["o_bias"],
            mlp_bias=bool(config.get("mlp_bias", False)) and kind == "llama",
            **rope_settings(config),
        )


def check_number(config, key, low):
    """Raise UserError unless a key of config.json, if it is there, is a finite number of at least `low`."""
    value = config.get(key)
    if value is not None and (type(value) not in (int, float) or not low <= value < 1e30):
        raise UserError(f"config.json: {key} is {value!r:.60}; it must be a number of at least {low}")


def rope_settings(config):
    """rope_theta and rope_scaling of a config.json, in the new spelling (rope_parameters) or the old one."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"config.json: rope scaling must be an object, it is {rope!r:.60}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    needs = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor",
                                                              "original_max_position_embeddings")}
    if not isinstance(kind, str) or kind not in needs or rope.get("partial_rotary_factor", 1) != 1:
        raise UserError(f"config.json: rope scaling {rope!r:.200} is not supported; rope_type may be "
                        f"{', '.join(needs)}")
    missing = [key for key in needs[kind] if key not in rope]
    if missing:
        raise UserError(f"config.json: rope scaling {rope!r:.200} lacks {', '.join(missing)}")
    for key in ("rope_theta", *needs[kind]):
        check_number(rope, key, 0)
    theta = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
    return dict(
        rope_theta=float(theta),
        rope_scaling={} if kind == "default" else {**rope, "rope_type": kind},
    )


def sliding_windows(config):
    """How many tokens back each layer sees, as Hugging Face's configuration classes read it."""
    layers = config["num_hidden_layers"]
    window = config.get("sliding_window", FAMILIES[config["model_type"]]["window"])
    if config["model_type"] == "llama" or window is None:
        return (None,) * layers
    if config["model_type"] == "mistral":
        return (window,) * layers
    if not config.get("use_sliding_window", False):
        return (None,) * layers
    check_number(config, "max_window_layers", 0)
    first = config.get("max_window_layers", 28)
    kinds = config.get("layer_types") or [
        "full_attention" if i < first else "sliding_attention" for i in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or any(
            kind not in ("full_attention", "sliding_attention") for kind in kinds):
        raise UserError(f"config.json: layer_types {kinds!r:.200} must be full_attention or "
                        "sliding_attention, one a layer")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
