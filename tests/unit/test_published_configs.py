"""config.json of published models, written down from what they publish: each is read, and has transformers' parameters.

Only the keys that this trainer or transformers reads are kept; others have no effect on the model. docs/models.md has
the same table.

No hub could be reached. Of the models written down from memory, these values were then compared with copies of the
published config.json, or with code that names the model, in public repositories:
  Ministral-8B-2410, Mistral-Small-3.1, Qwen3-8B (copies), OLMo-2-1B (fairseq2's default): all
  Ministral-3-8B, IQuest-Coder: the sizes; they are the defaults of transformers' class, whose docstring names the model
  granite-3.3-2b: sizes and multipliers, of 3.1-2b; NOT its vocabulary and rope_theta, which are those of 3.3-8b
  granite-4.0-350m: sizes of a layer and multipliers; NOT layers, vocabulary, rope_theta and positions
Not compared: Qwen3-8B's 40,960 positions (the base model's copy has 32,768) and its YaRN.
"""

import pytest
import torch
from helpers import attempt
from transformers import AutoConfig, AutoModelForCausalLM

from families.config import ModelConfig
from families.registry import causal_lm

YARN_OLMO = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=8192, beta_fast=32.0, beta_slow=1.0,
                 attention_factor=1.2079441541679836)
OLMO3_LAYERS = (["sliding_attention"] * 3 + ["full_attention"]) * 8
MINISTRAL_3 = dict(
    model_type="ministral3", head_dim=128, num_attention_heads=32, num_key_value_heads=8, vocab_size=131072,
    max_position_embeddings=262144, rms_norm_eps=1e-5, hidden_act="silu", sliding_window=None, attention_dropout=0.0,
    rope_parameters=dict(rope_type="yarn", type="yarn", rope_theta=1e6, factor=16.0, beta_fast=32.0, beta_slow=1.0,
                         mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.1,
                         original_max_position_embeddings=16384))
GRANITE = dict(model_type="granite", attention_bias=False, mlp_bias=False, attention_dropout=0.0,
               embedding_multiplier=12.0, residual_multiplier=0.22, hidden_act="silu", max_position_embeddings=131072, num_attention_heads=32,
               num_hidden_layers=40, num_key_value_heads=8, rms_norm_eps=1e-5, rope_scaling=None, rope_theta=1e7,
               tie_word_embeddings=True, vocab_size=49159)
PHI = dict(model_type="phi3", attention_bias=False, attention_dropout=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
           hidden_act="silu", rms_norm_eps=1e-5)

# name -> (config.json, tokens that it is made for)
PUBLISHED = {
    "HuggingFaceTB/SmolLM3-3B": (dict(
        model_type="smollm3", attention_bias=False, attention_dropout=0.0, hidden_act="silu", hidden_size=2048,
        intermediate_size=11008, max_position_embeddings=65536, max_window_layers=28, mlp_bias=False,
        no_rope_layer_interval=4, no_rope_layers=[1, 1, 1, 0] * 9, layer_types=["full_attention"] * 36,
        num_attention_heads=16, num_hidden_layers=36, num_key_value_heads=4, pretraining_tp=2, rms_norm_eps=1e-6,
        rope_scaling=None, rope_theta=5e6, sliding_window=None, use_sliding_window=False, vocab_size=128256), 65536),
    "ibm-granite/granite-3.3-2b-instruct": (dict(
        GRANITE, hidden_size=2048, intermediate_size=8192, attention_multiplier=0.015625, logits_scaling=8.0), 131072),
    "ibm-granite/granite-3.3-8b-instruct": (dict(
        GRANITE, hidden_size=4096, intermediate_size=12800, attention_multiplier=0.0078125, logits_scaling=16.0),
        131072),
    "ibm-granite/granite-4.0-350m": (dict(
        model_type="granitemoehybrid", attention_bias=False, attention_dropout=0.0, hidden_act="silu", hidden_size=1024,
        intermediate_size=2048, shared_intermediate_size=2048, num_local_experts=0, num_experts_per_tok=0,
        layer_types=["attention"] * 28, position_embedding_type="rope", num_attention_heads=16, num_hidden_layers=28,
        num_key_value_heads=4, rms_norm_eps=1e-5, rope_theta=1e7, rope_scaling=None, max_position_embeddings=32768,
        embedding_multiplier=12.0, residual_multiplier=0.263, attention_multiplier=0.015625, logits_scaling=4.0,
        mamba_d_state=256, mamba_n_heads=128, tie_word_embeddings=True, vocab_size=100352), 32768),
    "ByteDance-Seed/Seed-OSS-36B-Instruct": (dict(
        model_type="seed_oss", attention_bias=True, attention_out_bias=False, attention_dropout=0.1,
        residual_dropout=0.1, mlp_bias=False, head_dim=128, hidden_act="silu", hidden_size=5120, intermediate_size=27648,
        max_position_embeddings=524288, num_attention_heads=80, num_hidden_layers=64, num_key_value_heads=8,
        rms_norm_eps=1e-6, rope_scaling=dict(rope_type="default"), rope_theta=1e7, tie_word_embeddings=False,
        vocab_size=155136), 524288),
    "internlm/internlm3-8b-instruct": (dict(
        model_type="internlm3", bias=False, qkv_bias=False, attention_dropout=0.0, head_dim=128, hidden_act="silu",
        hidden_size=4096, intermediate_size=10240, max_position_embeddings=32768, num_attention_heads=32,
        num_hidden_layers=48, num_key_value_heads=2, rms_norm_eps=1e-5, rope_theta=50000000, tie_word_embeddings=False,
        rope_scaling=dict(factor=6.0, rope_type="dynamic"), vocab_size=128512), 32768),
    "IQuestLab/IQuest-Coder-V1-40B-Instruct": (dict(
        model_type="iquestcoder", attention_bias=False, attention_dropout=0.0, clip_qkv=None, head_dim=128,
        hidden_act="silu", hidden_size=5120, intermediate_size=27648, max_position_embeddings=131072, mlp_bias=False,
        num_attention_heads=40, num_hidden_layers=80, num_key_value_heads=8, rms_norm_eps=1e-5, rope_scaling=None,
        rope_theta=500000.0, sliding_window=None, use_sliding_window=False, tie_word_embeddings=False,
        vocab_size=76800), 131072),
    "mistralai/Ministral-8B-Instruct-2410": (dict(
        model_type="mistral", attention_dropout=0.0, head_dim=128, hidden_act="silu", hidden_size=4096,
        intermediate_size=12288, max_position_embeddings=32768, num_attention_heads=32, num_hidden_layers=36,
        num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=1e8, sliding_window=32768, tie_word_embeddings=False,
        vocab_size=131072), 32768),
    "mistralai/Ministral-3-3B-Base-2512": (dict(model_type="mistral3", text_config=dict(
        MINISTRAL_3, hidden_size=3072, intermediate_size=9216, num_hidden_layers=26, tie_word_embeddings=True)),
        262144),
    "mistralai/Ministral-3-8B-Base-2512": (dict(model_type="mistral3", tie_word_embeddings=False, text_config=dict(
        MINISTRAL_3, hidden_size=4096, intermediate_size=14336, num_hidden_layers=34)), 262144),
    "mistralai/Mistral-Small-3.1-24B-Base-2503": (dict(model_type="mistral3", text_config=dict(
        model_type="mistral", attention_dropout=0.0, head_dim=128, hidden_act="silu", hidden_size=5120,
        intermediate_size=32768, max_position_embeddings=131072, num_attention_heads=32, num_hidden_layers=40,
        num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=1e9, sliding_window=None, vocab_size=131072)), 131072),
    "allenai/OLMo-2-0425-1B": (dict(
        model_type="olmo2", attention_bias=False, attention_dropout=0.0, hidden_act="silu", hidden_size=2048,
        intermediate_size=8192, max_position_embeddings=4096, num_attention_heads=16, num_hidden_layers=16,
        num_key_value_heads=16, rms_norm_eps=1e-6, rope_scaling=None, rope_theta=500000, tie_word_embeddings=False,
        vocab_size=100352), 4096),
    "allenai/Olmo-3-1025-7B": (dict(
        model_type="olmo3", attention_bias=False, attention_dropout=0.0, hidden_act="silu", hidden_size=4096,
        intermediate_size=11008, layer_types=OLMO3_LAYERS, max_position_embeddings=65536, num_attention_heads=32,
        num_hidden_layers=32, num_key_value_heads=32, rms_norm_eps=1e-6, rope_scaling=YARN_OLMO, rope_theta=500000,
        sliding_window=4096, tie_word_embeddings=False, vocab_size=100278), 65536),
    "microsoft/Phi-3-mini-4k-instruct": (dict(
        PHI, hidden_size=3072, intermediate_size=8192, max_position_embeddings=4096, num_attention_heads=32,
        num_hidden_layers=32, num_key_value_heads=32, original_max_position_embeddings=4096, rope_scaling=None,
        rope_theta=10000.0, sliding_window=2047, tie_word_embeddings=False, vocab_size=32064), 4096),
    "microsoft/phi-4": (dict(
        PHI, hidden_size=5120, intermediate_size=17920, max_position_embeddings=16384, num_attention_heads=40,
        num_hidden_layers=40, num_key_value_heads=10, original_max_position_embeddings=16384, rope_scaling=None,
        rope_theta=250000, sliding_window=None, tie_word_embeddings=False, vocab_size=100352), 16384),
    "microsoft/Phi-4-mini-instruct": (dict(
        PHI, hidden_size=3072, intermediate_size=8192, max_position_embeddings=131072, num_attention_heads=24,
        num_hidden_layers=32, num_key_value_heads=8, original_max_position_embeddings=4096, partial_rotary_factor=0.75,
        rope_scaling=dict(type="longrope", short_factor=[1.0] * 48, long_factor=[1 + i for i in range(48)]),
        rope_theta=10000.0, sliding_window=262144, tie_word_embeddings=True, vocab_size=200064), 131072),
    "Qwen/Qwen3-8B, with the YaRN of its model card": (dict(
        model_type="qwen3", attention_bias=False, attention_dropout=0.0, head_dim=128, hidden_act="silu",
        hidden_size=4096, intermediate_size=12288, max_position_embeddings=40960, max_window_layers=36, num_attention_heads=32,
        num_hidden_layers=36, num_key_value_heads=8, rms_norm_eps=1e-6, rope_theta=1000000, sliding_window=None,
        use_sliding_window=False, tie_word_embeddings=False, vocab_size=151936, rope_scaling=dict(
            rope_type="yarn", factor=4.0, original_max_position_embeddings=32768)), 131072),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_has_the_parameters_of_transformers(name):
    """Names and shapes on meta. Seed-OSS was trained with dropout: the error says how to train without."""
    published, positions = PUBLISHED[name]
    if published["model_type"] == "seed_oss":
        _, error = attempt(ModelConfig.from_dict, published)
        assert "attention_dropout is 0.1" in error and "to train without, set attention_dropout and residual_dropout to 0" in error
        published = {**published, "attention_dropout": 0.0, "residual_dropout": 0.0}
    text = published.get("text_config", published)
    few = {"num_hidden_layers": 4, "layer_types": text.get("layer_types", [])[:4] or None}
    if "tie_word_embeddings" in published:
        few["tie_word_embeddings"] = published["tie_word_embeddings"]
    config = ModelConfig.from_dict(published)
    assert config.max_positions == positions and len(config.ropes) == text["num_hidden_layers"]
    config = ModelConfig.from_dict({**text, **few})  # every layer has the same parameters
    theirs = AutoConfig.for_model(**{key: value for key, value in {**text, **few}.items() if value is not None})
    with torch.device("meta"):
        net, oracle = causal_lm(config)(config), AutoModelForCausalLM.from_config(theirs)
    assert {key: p.shape for key, p in net.named_parameters()} == {key: p.shape for key, p in oracle.named_parameters()}


def test_fp8_weights_name_the_bf16_variant():
    """Ministral 3's Instruct models are published in FP8, and in BF16 beside it."""
    config = {**PUBLISHED["mistralai/Ministral-3-3B-Base-2512"][0],
              "quantization_config": dict(quant_method="fp8", activation_scheme="static")}
    _, error = attempt(ModelConfig.from_dict, config)
    assert "quantization_config is fp8" in error and "BF16" in error
