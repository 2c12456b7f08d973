"""FAMILIES: a row for each model_type, and the functions that read what only one family has in config.json.

They are not in families/NAME.py, because config.json is checked before the weights are downloaded, by modules
below model.py, which those files import.
"""

from dataclasses import dataclass, field, replace

from settings.errors import UserError


def check_number(config, key, low):
    """Raise UserError if config.json has the key and its value is not a finite number of at least `low`."""
    value = config.get(key)
    if value is not None and (type(value) not in (int, float) or not low <= value < 1e30):
        raise UserError(f"config.json: {key} is {value!r:.60}; it must be a number of at least {low}")


def rope_parts(values, layer_type):
    """The objects that make up the rotary values of a kind of layers; later ones come first.

    They are in the new key (rope_parameters) or the old one. Some families have an object for each kind. In
    their old form, layers with a window have a base of their own (rope_local_base_freq), and no scaling.
    """
    new, old = values.get("rope_parameters") or {}, values.get("rope_scaling") or {}
    if new and isinstance(new, dict) and isinstance(old, dict) and not old.items() <= new.items():
        raise UserError(f"config.json has rope_parameters {new!r:.200} and rope_scaling {old!r:.200}; write "
                        "what holds into rope_parameters, and remove rope_scaling")
    parameters = new or old
    if isinstance(parameters, dict) and isinstance(parameters.get(layer_type), dict):
        parameters = parameters[layer_type]
    return {"rope_theta": values["rope_theta"]}, parameters


def qwen_layers(values):
    """layer_types of Qwen2 and Qwen3: the first max_window_layers are full, in spite of the name."""
    check_number(values, "max_window_layers", 0)
    n_full = values.get("max_window_layers", 28)
    return ["full_attention" if i < n_full else "sliding_attention"
            for i in range(values["num_hidden_layers"])]


def smollm3_rope(values):
    """(num_hidden_layers,) bool: which layers of SmolLM3 have rotary positions. All but every fourth."""
    check_number(values, "no_rope_layer_interval", 1)
    n_layers, interval = values["num_hidden_layers"], values.get("no_rope_layer_interval", 4)
    uses = values.get("no_rope_layers")
    if uses is None:
        return [(i + 1) % interval != 0 for i in range(n_layers)]
    if not isinstance(uses, list) or len(uses) < n_layers or any(use not in (0, 1) for use in uses):
        raise UserError(f"config.json: no_rope_layers is {uses!r:.200}; it must have a 1 for each of the "
                        f"{n_layers} layers with rotary positions, and a 0 for the others")
    return [bool(use) for use in uses[:n_layers]]


def smollm3_layers(values):
    """layer_types of SmolLM3: the layers without rotary positions may have a window."""
    return ["full_attention" if uses_rope else "sliding_attention" for uses_rope in smollm3_rope(values)]


def olmo3_layers(values):
    """layer_types of OLMo 3: each fourth layer attends to all, the others have a window."""
    return ["sliding_attention" if (i + 1) % 4 else "full_attention"
            for i in range(values["num_hidden_layers"])]


def check_truncate(*parts):
    """Raise UserError if objects of the rotary values of one kind of layers have YaRN's truncate."""
    if any(isinstance(part, dict) and part.get("truncate", True) is not True for part in parts):
        raise UserError("config.json: truncate may only be true where each kind of layers has rotary values "
                        "of its own: transformers does not read another value there")


def olmo3_rope(values, layer_type):
    """The rotary values of a kind of OLMo 3's layers.

    In the new form (rope_parameters) each kind has an object. In the old form rope_theta and rope_scaling are
    of the full layers; those with a window have no scaling, and in transformers always the default base.
    """
    by_type, scaling = values.get("rope_parameters") or {}, values.get("rope_scaling") or {}
    if not isinstance(by_type, dict) or not {*by_type} <= {"full_attention", "sliding_attention"}:
        raise UserError(f"config.json: rope_parameters is {by_type!r:.200}; it must be an object with the "
                        "objects full_attention and sliding_attention")
    own = by_type.get(layer_type) or {}
    check_truncate(own, scaling)
    if layer_type == "sliding_attention":
        return {"rope_theta": FAMILIES["olmo3"].defaults["rope_theta"]}, own
    return {"rope_theta": values["rope_theta"]}, own, scaling


def ministral3_rope(values, layer_type):
    """The rotary values of Ministral 3, whose configuration class has them as a default."""
    default = dict(rope_type="yarn", rope_theta=1e6, factor=16.0, original_max_position_embeddings=2**14,
                   beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.1)
    has_own = values.get("rope_parameters") or values.get("rope_scaling")
    return rope_parts(values if has_own else {**values, "rope_parameters": default}, layer_type)


def every_nth_full(values, n):
    """layer_types in which every n-th layer attends to all tokens, the others to a window."""
    return ["sliding_attention" if i % n else "full_attention"
            for i in range(1, values["num_hidden_layers"] + 1)]


def gemma2_layers(values):
    """layer_types of Gemma 2."""
    return every_nth_full(values, 2)


def gemma3_layers(values):
    """layer_types of Gemma 3."""
    pattern = values.get("sliding_window_pattern", 6)
    if type(pattern) is not int or pattern < 1:
        raise UserError(f"config.json: sliding_window_pattern is {pattern!r:.60}; it must be an integer "
                        "of at least 1")
    return every_nth_full(values, pattern)


def gemma4_layers(values):
    """layer_types of Gemma 4: the last layer attends to all tokens, too."""
    return [*every_nth_full(values, 6)[:-1], "full_attention"]


def gemma3_rope(values, layer_type):
    """The rotary values of a kind of Gemma 3's layers.

    In the new form (rope_parameters) each kind has an object. In the old form layers with a window have a
    base of their own, and no scaling.
    """
    new, scaling, base = values.get("rope_parameters") or {}, values.get("rope_scaling") or {}, "rope_theta"
    if not isinstance(new, dict) or not all(isinstance(value, dict) for value in new.values()):
        raise UserError(f"config.json: rope_parameters {new!r:.200} must have an object each for "
                        "full_attention and sliding_attention")
    if layer_type == "sliding_attention":
        scaling, base = {}, "rope_local_base_freq"
    check_truncate(new.get(layer_type), scaling)
    return {"rope_theta": values[base]}, new.get(layer_type, {}), scaling


def gemma4_values(values):
    """Gemma 4's values, with the sizes of the layers with full attention under the names of config.json.

    These are global_head_dim and num_global_key_value_heads. transformers writes per_layer_config instead, an
    object with the changed sizes of each such layer.

    Raises UserError for E2B and E4B, and if the sizes of these layers differ.
    """
    for key in ("hidden_size_per_layer_input", "num_kv_shared_layers"):
        if values.get(key):
            raise UserError(f"config.json: {key} is {values[key]!r:.20}; Gemma 4 E2B and E4B are not "
                            "supported: they have embeddings for each layer, and layers that share keys and "
                            "values")
    kinds, changes = values.get("layer_types") or gemma4_layers(values), values.get("per_layer_config")
    if not isinstance(kinds, list) or kinds[-1] != "full_attention":
        raise UserError(f"config.json: layer_types {kinds!r:.200} must be a list that ends with "
                        "full_attention")
    own = {"head_dim": values.get("global_head_dim")}
    if values.get("attention_k_eq_v"):
        own["num_key_value_heads"] = values.get("num_global_key_value_heads")
    if changes == {}:  # all layers have the same sizes
        own = {}
    elif changes is not None:
        numbers = [str(i) for i, kind in enumerate(kinds) if kind == "full_attention"]
        by_number = {}
        if isinstance(changes, dict):  # transformers writes 05 if there are more than ten layers
            by_number = {number.lstrip("0") or "0": change for number, change in changes.items()}
        own = by_number.get(numbers[0])
        is_object = isinstance(own, dict) and own.keys() <= {"head_dim", "num_key_value_heads"}
        if not is_object or by_number != dict.fromkeys(numbers, own):
            raise UserError(f"config.json: per_layer_config is {changes!r:.200}; it must have the same "
                            "object, with head_dim and num_key_value_heads, for each full_attention layer, "
                            "and no other")
    kv_heads = values["num_key_value_heads"] or values["num_attention_heads"]
    return {**values, "global_head_dim": own.get("head_dim") or values["head_dim"] or 256,
            "num_global_key_value_heads": own.get("num_key_value_heads") or kv_heads,
            "rope_parameters": values.get("rope_parameters") or GEMMA4_ROPE}


def qwen3_5_layers(values):
    """layer_types of Qwen3.5: every full_attention_interval-th layer is attention, the others are linear."""
    check_number(values, "full_attention_interval", 1)
    interval = values.get("full_attention_interval") or 4
    return ["linear_attention" if (i + 1) % interval else "full_attention"
            for i in range(values["num_hidden_layers"])]


def granite_hybrid_values(values):
    """Granite 4's values, with the size of its MLP as intermediate_size.

    Raises UserError for a model with experts or Mamba layers.
    """
    if values.get("num_local_experts", 8):
        raise UserError("config.json: model_type 'granitemoehybrid' is a mixture of experts "
                        "(num_local_experts is not 0), which is not supported; docs/models.md lists the "
                        "models that are")
    kinds = values.get("layer_types", values.get("layers_block_type")) or ["mamba"]
    if not isinstance(kinds, list) or any(kind not in ("attention", "full_attention") for kind in kinds):
        raise UserError("config.json: model_type 'granitemoehybrid' is an architecture with Mamba layers "
                        f"(layer_types is {kinds!r:.60}), which is not supported; of Granite 4, those "
                        "without -h in their names are")
    return {**values, "intermediate_size": values.get("shared_intermediate_size", 1024)}


def granite_hybrid_rope(values):
    """(num_hidden_layers,) bool: all layers of Granite 4 have rotary positions, or none."""
    return [values.get("position_embedding_type") == "rope"] * values["num_hidden_layers"]


@dataclass(frozen=True)
class Family:
    """What config.json does not say about a model_type: what is fixed, and the defaults of optional keys.

    A bias is fixed, or the name of the key of config.json that decides.
    """

    defaults: dict  # those of Hugging Face's configuration class, where DEFAULTS has others
    qkv_bias: bool | str = "attention_bias"
    o_bias: bool | str = "attention_bias"
    mlp_bias: bool | str = False
    qk_norm: bool = False
    windows: str = "none"  # sliding_window is for no layer, for "all", or for those of "layer_types"
    has_switch: bool = False  # only use_sliding_window switches windows on
    layer_types: object = None  # function from the values to layer_types where config.json has none
    layer_kinds: tuple = ("full_attention", "sliding_attention")
    rope_layers: object = None  # function from the values to which layers have rotary positions; None: all
    rope_types: tuple = ("default", "linear", "llama3", "yarn", "longrope")
    rope_aliases: dict = field(default_factory=dict)  # other names of rope_type
    rope_parts: object = None  # function (values, layer_type) -> objects that make up the rotary values
    partial_rotary: bool = False  # partial_rotary_factor may be below 1
    supported: dict = field(default_factory=dict)  # key -> its only value, or a tuple, beside SUPPORTED
    complete: object = None  # function from the values to the values: checks and adds what one family has
    aliases: dict = field(default_factory=dict)  # other names of keys
    unused: tuple = ()  # keys of REFUSED that its config.json has without what they stand for
    no_tp: str = ""  # why tensor parallelism is refused
    no_sp: str = ""  # why sequence parallelism is refused


DEFAULTS = dict(hidden_act="silu", rms_norm_eps=1e-6, rope_theta=10_000.0, head_dim=None, sliding_window=None,
                num_key_value_heads=None, max_position_embeddings=2**30)
SUPPORTED = {"hidden_act": "silu", "attention_dropout": 0, "residual_dropout": 0}
MISTRAL = Family(dict(num_key_value_heads=8, sliding_window=4096, max_position_embeddings=2**17),
                 qkv_bias=False, o_bias=False, windows="all")
OLMO = Family(dict(rms_norm_eps=1e-5, max_position_embeddings=2**11), qk_norm=True,
              no_tp="its norms of queries and keys are over all heads, which tp splits")
GELU = "gelu_pytorch_tanh"
GEMMA = Family(
    dict(vocab_size=262_144, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
         num_attention_heads=8, num_key_value_heads=4, head_dim=256, hidden_act=GELU, sliding_window=4096,
         tie_word_embeddings=True, max_position_embeddings=2**17),
    windows="layer_types",
    supported=dict(hidden_act=GELU, hidden_activation=GELU, use_bidirectional_attention=False))
GEMMA4_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0}}
GEMMA4 = replace(
    GEMMA, qk_norm=True, layer_types=gemma4_layers, rope_types=("default", "proportional"),
    complete=gemma4_values,
    defaults=dict(GEMMA.defaults, num_hidden_layers=30, sliding_window=512, global_head_dim=512,
                  hidden_size_per_layer_input=256),
    # "vision" lets the tokens of an image see each other; there are none here
    supported=dict(GEMMA.supported, use_bidirectional_attention=(False, "vision")),
    no_tp="layers with full attention have few key/value heads, 1 in the 12B model")
FAMILIES = {
    "qwen2": Family(dict(num_key_value_heads=32, sliding_window=4096, max_position_embeddings=2**15),
                    qkv_bias=True, o_bias=False, windows="layer_types", has_switch=True,
                    layer_types=qwen_layers),
    "qwen3": Family(dict(num_key_value_heads=32, head_dim=128, sliding_window=4096,
                         max_position_embeddings=2**15),
                    qk_norm=True, windows="layer_types", has_switch=True, layer_types=qwen_layers),
    "llama": Family(dict(max_position_embeddings=2**11), mlp_bias="mlp_bias"),
    "mistral": MISTRAL,
    "ministral": replace(MISTRAL, windows="layer_types"),
    "ministral3": replace(MISTRAL, rope_parts=ministral3_rope,
                          defaults=dict(num_key_value_heads=8, head_dim=128, rms_norm_eps=1e-5,
                                        max_position_embeddings=2**18)),
    "smollm3": Family(dict(num_key_value_heads=4, rope_theta=2e6, tie_word_embeddings=True,
                           max_position_embeddings=2**15),
                      mlp_bias="mlp_bias", windows="layer_types", has_switch=True, layer_types=smollm3_layers,
                      rope_layers=smollm3_rope),
    "granite": Family(dict(max_position_embeddings=2**11, attention_multiplier=1.0), mlp_bias="mlp_bias"),
    "granitemoehybrid": Family(
        dict(max_position_embeddings=2**11, attention_multiplier=1.0), complete=granite_hybrid_values,
        rope_layers=granite_hybrid_rope, supported=dict(position_embedding_type=("rope",)),
        unused=("mamba_d_state",), no_tp="its matrix input_linear is fused"),
    "olmo2": OLMO,
    "olmo3": replace(OLMO, defaults={**OLMO.defaults, "rope_theta": 500_000.0, "sliding_window": 4096},
                     windows="layer_types", layer_types=olmo3_layers, rope_parts=olmo3_rope),
    "phi3": Family(dict(rms_norm_eps=1e-5, max_position_embeddings=2**12,
                        original_max_position_embeddings=2**12),
                   qkv_bias=False, o_bias=False, windows="all", partial_rotary=True,
                   rope_types=("default", "longrope"), rope_aliases={"su": "longrope", "yarn": "longrope"},
                   supported=dict(resid_pdrop=0, embd_pdrop=0),
                   no_tp="its matrices qkv_proj and gate_up_proj are fused"),
    "seed_oss": Family(dict(num_key_value_heads=8, head_dim=128, attention_bias=True, attention_dropout=0.1,
                            residual_dropout=0.1, max_position_embeddings=2**19),
                       o_bias="attention_out_bias", mlp_bias="mlp_bias"),
    "internlm3": Family(dict(num_key_value_heads=2, head_dim=128, rms_norm_eps=1e-5,
                             max_position_embeddings=2**15),
                        rope_types=("default", "linear", "llama3", "yarn", "longrope", "dynamic"),
                        mlp_bias="mlp_bias", aliases={"qkv_bias": "attention_bias", "bias": "mlp_bias"}),
    "iquestcoder": Family(dict(num_key_value_heads=8, head_dim=128, rms_norm_eps=1e-5,
                               max_position_embeddings=2**17),
                          mlp_bias="mlp_bias", supported=dict(clip_qkv=None, use_sliding_window=False)),
    "gemma2": replace(
        GEMMA, layer_types=gemma2_layers,
        defaults=dict(GEMMA.defaults, vocab_size=256_000, max_position_embeddings=2**13,
                      final_logit_softcapping=30.0, attn_logit_softcapping=50.0)),
    "gemma3_text": replace(
        GEMMA, qk_norm=True, layer_types=gemma3_layers, rope_parts=gemma3_rope,
        defaults=dict(GEMMA.defaults, vocab_size=262_208, rope_theta=1e6, rope_local_base_freq=1e4),
        supported=dict(GEMMA.supported, attn_logit_softcapping=None)),
    "gemma4_text": GEMMA4,
    "gemma4_unified_text": replace(
        GEMMA4, defaults=dict(GEMMA4.defaults, sliding_window=1024, max_position_embeddings=2**18,
                              hidden_size_per_layer_input=0)),
    "qwen3_5_text": Family(dict(num_key_value_heads=4, head_dim=256, partial_rotary_factor=0.25,
                                max_position_embeddings=2**15),
                           qk_norm=True, windows="layer_types", layer_types=qwen3_5_layers,
                           partial_rotary=True,
                           layer_kinds=("linear_attention", "full_attention"),
                           supported=dict(attn_output_gate=True, mlp_only_layers=[]),
                           no_tp="its gated delta nets aren't split over ranks",
                           no_sp="its gated delta nets carry a state from token to token"),
}
# model_type of a config.json with a nested text_config -> model_type of a text_config that has none
NESTED = {
    "qwen3_5": "qwen3_5_text",
    "mistral3": "mistral",  # Mistral Small 3.1; of Ministral 3 the text_config has its own model_type
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "gemma4_unified": "gemma4_unified_text",
}
# Those of them whose class in transformers ties head and embedding if config.json does not say
TIED_BY_DEFAULT = ("mistral3", "gemma3", "gemma4", "gemma4_unified")

# Architectures that are refused by name: a pattern of model_type, and keys of config.json that show them
REFUSED = {
    "a mixture of experts": (
        "moe(?!hybrid)|mixtral|gpt_oss|llama4|dbrx|minimax",
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "enable_moe_block")),
    "a model with multi-head latent attention (MLA)": (
        "deepseek_v[23]|kimi|minicpm3|longcat|mistral4|mistral_large4", ("kv_lora_rank",)),
    "an architecture with Mamba or other state space layers": (
        "mamba|jamba|bamba|zamba|nemotron_h|falcon_h1|granitemoehybrid|rwkv|recurrent_gemma",
        ("mamba_d_state", "ssm_state_size")),
    "an encoder-decoder model": (
        "t5|bart|pegasus|marian|whisper|prophetnet|m2m_100|fsmt", ("is_encoder_decoder",)),
}
