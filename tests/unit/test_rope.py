"""Rotary frequencies of each scaling, compared with transformers' modeling_rope_utils; LongRoPE by document."""

import re

import pytest
import torch
from helpers import Operations, attempt, two_layers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import model
from families.config import FAMILIES, ModelConfig
from families.registry import causal_lm
from model import generate
from ops.attention import Documents
from settings.errors import UserError

SIZES = dict(vocab_size=97, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256, eos_token_id=None, pad_token_id=0)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
SHORT, LONG = [1.0 + 0.1 * i for i in range(8)], [2.0 + 0.7 * i for i in range(8)]
LONGROPE = dict(rope_type="longrope", short_factor=SHORT, long_factor=LONG)

# name -> (config.json, max_positions: the tokens that the scaled model is for)
SCALINGS = {
    "linear": (dict(rope_scaling=dict(rope_type="linear", factor=2.5)), 640),
    "yarn": (dict(rope_scaling=YARN), 256),
    "yarn of Qwen's model cards": (dict(model_type="qwen2", rope_theta=1e6, max_position_embeddings=64,
                                        rope_scaling={"type": "yarn", "factor": 4.0,
                                                      "original_max_position_embeddings": 64}), 256),
    "yarn, a window": (dict(model_type="mistral", sliding_window=8, rope_scaling=YARN), 256),
    "yarn, no original length": (dict(model_type="qwen3", head_dim=16, rope_scaling=dict(rope_type="yarn", factor=8)),
                                 2048),
    "yarn, no factor": (dict(rope_scaling={**YARN, "factor": None}), 256),
    "yarn, betas": (dict(rope_scaling={**YARN, "beta_fast": 4, "beta_slow": 0.25}), 256),
    "yarn, equal betas": (dict(rope_scaling={**YARN, "beta_fast": 3.0, "beta_slow": 3.0, "truncate": False}), 256),
    "yarn, no rounding": (dict(rope_scaling={**YARN, "truncate": False}), 256),
    "yarn, attention factor": (dict(rope_scaling={**YARN, "attention_factor": 1.3}), 256),
    "yarn, mscale": (dict(rope_scaling={**YARN, "mscale": 0.7, "mscale_all_dim": 1.2}), 256),
    "yarn, one mscale": (dict(rope_scaling={**YARN, "mscale": 0.7, "mscale_all_dim": 0}), 256),
    "yarn, factor below 1": (dict(rope_scaling={**YARN, "factor": 0.5}), 256),
    "yarn, null and outer values": (dict(original_max_position_embeddings=32, rope_parameters={
        **YARN, "rope_theta": 3e4, "attention_factor": None, "beta_fast": None}), 256),
    "llama3, outer original length": (dict(original_max_position_embeddings=32, rope_parameters=dict(
        rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)), 256),
    "longrope": (dict(rope_scaling={**LONGROPE, "original_max_position_embeddings": 32}), 256),
    "longrope, factor": (dict(rope_scaling={**LONGROPE, "original_max_position_embeddings": 32, "factor": 16}), 512),
    "longrope, attention factor": (dict(rope_scaling={**LONGROPE, "attention_factor": 1.4}), 256),
    "longrope of Phi-3": (dict(model_type="phi3", rope_scaling=dict(type="yarn", short_factor=SHORT, long_factor=LONG),
                               original_max_position_embeddings=64), 256),
    "longrope, partial": (dict(model_type="phi3", partial_rotary_factor=0.5, original_max_position_embeddings=64,
                               rope_scaling=dict(type="longrope", short_factor=SHORT[:4], long_factor=LONG[:4])), 256),
}


def small(**config):
    return {**SIZES, "model_type": "llama", **config}


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_and_attention_factor_equal_transformers(name):
    """For the config.json that people write, and for the one that transformers writes."""
    values, max_positions = SCALINGS[name]
    theirs = AutoConfig.for_model(**small(**values))
    compute = ROPE_INIT_FUNCTIONS[theirs.rope_parameters["rope_type"]]
    expected, factor = compute(theirs, "cpu")
    for config in (small(**values), theirs.to_dict()):
        config = ModelConfig.from_dict(config)
        rope = config.ropes[0]
        torch.testing.assert_close(torch.tensor(rope.frequencies), expected, rtol=2e-6, atol=0)
        assert rope.factor == pytest.approx(factor, rel=1e-12) and config.max_positions == max_positions
        assert bool(rope.long_frequencies) == ("longrope" in name)
        if rope.long_frequencies:
            long, _ = compute(theirs, "cpu", seq_len=rope.original_length + 1)
            torch.testing.assert_close(torch.tensor(rope.long_frequencies), long, rtol=2e-6, atol=0)
            assert compute(theirs, "cpu", seq_len=rope.original_length)[0].equal(expected)


@pytest.mark.parametrize("kind", FAMILIES)
def test_yarn_is_read_for_each_family(kind):
    """Each family with YaRN in transformers has it here, too: all but Phi-3 and Gemma 4, which have their own scaling."""
    config = {**SIZES, "model_type": kind, "num_hidden_layers": 4, "rope_scaling": YARN, "attention_dropout": 0,
              "residual_dropout": 0, "sliding_window_pattern": 2, "hidden_size_per_layer_input": 0,
              "num_local_experts": 0, "position_embedding_type": "rope",
              "layer_types": None if kind != "granitemoehybrid" else ["attention"] * 4}
    result, error = attempt(ModelConfig.from_dict, config)
    if "yarn" in FAMILIES[kind].rope_types:
        assert 1.13 < max(rope.factor for rope in result.ropes if rope) < 1.14
    else:
        assert re.search("rope_type may be|lacks short_factor|and rope_scaling", error)


def alone(net, tokens, lengths):
    with torch.no_grad():
        return torch.cat([net(part, Documents.of((len(part),))) for part in tokens.split(lengths)])


def test_the_first_name_of_longrope_is_read():
    """Phi-3's files of May 2024 call it su. transformers 5 fails to read that, so there is no oracle."""
    config = {**SIZES, "model_type": "phi3", "original_max_position_embeddings": 64}
    ropes = [ModelConfig.from_dict({**config, "rope_scaling": {**LONGROPE, "rope_type": name}}).ropes
             for name in ("su", "longrope")]
    assert ropes[0] == ropes[1] and ropes[0][0].long_frequencies


def phi3(**changes):
    """(transformers' Phi-3 with LongRoPE from 16 tokens on, ours with the same weights)."""
    config = {**SIZES, "model_type": "phi3", "num_attention_heads": 4, "partial_rotary_factor": 0.5,
              "original_max_position_embeddings": 16, "rope_theta": 1e4,
              "rope_scaling": dict(type="longrope", short_factor=SHORT[:4], long_factor=LONG[:4]), **changes}
    torch.manual_seed(0)
    oracle = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
    with torch.no_grad():
        for name, p in oracle.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.3)
    config = ModelConfig.from_dict(config)
    net = causal_lm(config)(config)
    net.load_state_dict(oracle.state_dict())
    return oracle, net


@torch.no_grad()
def test_longrope_is_chosen_by_the_length_of_each_document():
    """A short document beside a long one has the short frequencies, as alone; transformers agrees on each alone."""
    oracle, net = phi3()
    lengths = (16, 30, 3, 17)
    tokens = torch.randint(97, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    packed = net(tokens, Documents.of(lengths))
    theirs = torch.cat([oracle(part[None]).logits[0] for part in tokens.split(lengths)])
    torch.testing.assert_close(packed, theirs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(packed, alone(net, tokens, lengths), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [3, 16, 17])
def test_generation_beyond_the_original_length_equals_transformers(length):
    """At the 17th token the frequencies of all positions change, so the cache is computed again."""
    oracle, net = phi3()
    prompt = torch.randint(97, (length,), generator=torch.Generator().manual_seed(2))
    expected = oracle.generate(prompt[None], max_new_tokens=30, do_sample=False, pad_token_id=0,
                               attention_mask=torch.ones(1, length, dtype=torch.long))[0, length:].tolist()
    assert len(set(expected)) > 4
    assert list(generate(net, prompt.tolist(), 30, eos_ids=())) == expected


def test_longrope_waits_for_no_length():
    """The choice runs on the device: on meta, which has no values, and without a copy from the host."""
    config = ModelConfig.from_dict(small(rope_scaling={**LONGROPE, "original_max_position_embeddings": 32}))
    documents = Documents.of((40, 3), device="meta")
    model.rope_cos_sin(documents, config.ropes[0])  # copies the frequencies once
    with Operations() as operations:
        cos, _ = model.rope_cos_sin(documents, config.ropes[0])
    assert cos.shape == (43, 1, 8) and cos.device.type == "meta"
    assert not {"_local_scalar_dense", "_to_copy", "copy_", "nonzero"} & {
        name for name in operations.counts if name != "_to_copy"}


def test_dynamic_scaling_is_refused_with_the_reason():
    _, error = attempt(ModelConfig.from_dict, small(rope_scaling=dict(rope_type="dynamic", factor=2.0)))
    assert "change with each token" in error and "use yarn" in error


def test_dynamic_scaling_of_internlm3_up_to_its_limit():
    """The published config.json has it. Up to max_position_embeddings it scales nothing; more is refused."""
    sizes = {**SIZES, "model_type": "internlm3", "head_dim": 16, "max_position_embeddings": 20}
    config = ModelConfig.from_dict({**sizes, "rope_scaling": dict(rope_type="dynamic", factor=6.0)})
    assert config.ropes[0].frequencies == ModelConfig.from_dict(sizes).ropes[0].frequencies
    model.rope_cos_sin(Documents.of((20, 20)), config.ropes[0])
    for documents in (Documents.of((4, 21)), Documents.of((1,), first_position=20)):
        _, error = attempt(model.rope_cos_sin, documents, config.ropes[0])
        assert "--max_length 20" in error


def test_longer_conversations_than_dynamic_scaling_supports_are_refused_before_the_first_step(train, tmp_path):
    """Those of the example data have up to some hundred tokens; the error says which --max_length would do."""
    directory = two_layers(tmp_path / "model", model_type="internlm3", head_dim=32, max_position_embeddings=64,
                           rope_scaling=dict(rope_type="dynamic", factor=6.0), tie_word_embeddings=False)
    with pytest.raises(UserError, match="--max_length 64 cuts them"):
        train("--max_steps", 1, model=directory)
    assert len(train("--max_steps", 1, "--max_length", 64, model=directory, out="shorter")) == 1


# name -> (rope_scaling, what the error says)
MALFORMED = {
    "a text": ("yarn", "must be an object"),
    "a list": ([YARN], "must be an object"),
    "unknown": (dict(rope_type="ntk", factor=2.0), "rope_type may be"),
    "type is a number": (dict(rope_type=4, factor=2.0), "rope_type may be"),
    "no factor": (dict(rope_type="yarn"), "lacks factor"),
    "linear without factor": (dict(rope_type="linear"), "lacks factor"),
    "factor 0": ({**YARN, "factor": 0}, "factor is 0"),
    "linear factor 0": (dict(rope_type="linear", factor=0), "factor is 0"),
    "negative factor": ({**YARN, "factor": -4}, "factor is -4"),
    "factor is a text": ({**YARN, "factor": "4"}, "factor is '4'"),
    "factor is true": ({**YARN, "factor": True}, "factor is True"),
    "infinite factor": ({**YARN, "factor": float("inf")}, "factor is inf"),
    "linear factor null": (dict(rope_type="linear", factor=None), "factor is None"),
    "beta is a text": ({**YARN, "beta_fast": "32"}, "beta_fast is '32'"),
    "negative beta": ({**YARN, "beta_slow": -1}, "beta_slow is -1"),
    "attention factor 0": ({**YARN, "attention_factor": 0}, "attention_factor is 0"),
    "mscale is a list": ({**YARN, "mscale": [1]}, "mscale is [1]"),
    "truncate is a text": ({**YARN, "truncate": "no"}, "truncate is 'no'"),
    "original length 0": ({**YARN, "original_max_position_embeddings": 0}, "original_max_position_embeddings is 0"),
    "original length null": ({**YARN, "original_max_position_embeddings": None}, "original_max_position_embeddings"),
    "theta 0": ({**YARN, "rope_theta": 0}, "rope_theta is 0"),
    "short list": ({**LONGROPE, "long_factor": LONG[:5]}, "long_factor is"),
    "long list": ({**LONGROPE, "short_factor": SHORT + [1.0]}, "it has 9"),
    "one factor for all": ({**LONGROPE, "long_factor": 2.0}, "must be a list of 8 numbers"),
    "a text among the factors": ({**LONGROPE, "long_factor": LONG[:7] + ["3"]}, "must be a list of 8 numbers"),
    "a factor of 0": ({**LONGROPE, "short_factor": [0] + SHORT[1:]}, "must be a list of 8 numbers"),
    "no long factors": (dict(rope_type="longrope", short_factor=SHORT), "lacks long_factor"),
    "partial": ({**YARN, "partial_rotary_factor": 0.5}, "partial_rotary_factor may only be 1"),
    "both spellings": (YARN, "has rope_parameters"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_scalings_are_one_error(name):
    scaling, text = MALFORMED[name]
    other = dict(rope_parameters=dict(rope_type="default", rope_theta=1e6)) if name == "both spellings" else {}
    _, error = attempt(ModelConfig.from_dict, small(rope_scaling=scaling, **other), naming="config.json")
    assert text in (error or "") and "\n" not in error


@pytest.mark.parametrize("share", [0, -1, 1.5, "half", [1], True, 0.05])
def test_malformed_shares_of_rotated_values_are_one_error(share):
    _, error = attempt(ModelConfig.from_dict, {**SIZES, "model_type": "phi3", "partial_rotary_factor": share})
    assert "partial_rotary_factor is" in (error or "")


def test_extreme_values_give_numbers():
    """Values far outside what a model has are read or refused; they never raise another exception."""
    for theta in (1, 1.0 + 2e-16, 1e29):
        for original in (2, 1e29):
            for beta in (1e-30, 1e29):
                scaling = {**YARN, "rope_theta": theta, "original_max_position_embeddings": original, "beta_fast": beta}
                result, error = attempt(ModelConfig.from_dict, small(rope_scaling=scaling))
                assert error or all(0 < frequency <= 1 for frequency in result.ropes[0].frequencies)
