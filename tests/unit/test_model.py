"""model.py compared with its oracles: logits with transformers, the loss with plain cross-entropy."""

import re

import pytest
import torch
import torch.nn.functional as F
from helpers import loaded, model_loss, published
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import model
import ops.loss
from disk import files
from families.config import FAMILIES, ModelConfig
from families.registry import causal_lm
from model import CausalLM, generate
from ops.attention import Documents
from ops.loss import Head, loss as loss_of_head

SIZES = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256, eos_token_id=None)  # so that generation does not stop
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)  # with theta 5e5: one wave kept, one blended, two slowed

TOKENS = dict(pad_token_id=0, bos_token_id=1)  # within the vocabulary

YARN = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=8, beta_fast=32.0, beta_slow=1.0)
LONGROPE = dict(type="longrope", short_factor=[1.0, 1.1, 1.3], long_factor=[1.0, 2.5, 6.0])
OLMO_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
OLMO_ROPES = dict(full_attention={**YARN, "rope_theta": 5e5},
                  sliding_attention=dict(rope_type="default", rope_theta=1e4))
MINISTRAL_ROPE = dict(rope_type="yarn", rope_theta=1e6, factor=16.0, original_max_position_embeddings=16,
                      beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.1)

# name -> (config.json as people publish it, a change to it that must change the logits: this shows that it is used)
CASES = {
    "qwen2": (dict(model_type="qwen2", rope_theta=1e6), dict(rope_theta=1e4)),
    "qwen2, tied": (dict(model_type="qwen2", tie_word_embeddings=True, rms_norm_eps=1e-2), dict(rms_norm_eps=1e-6)),
    "qwen2, as many key heads as heads": (dict(model_type="qwen2", num_key_value_heads=4), {}),
    "qwen2, window in the later layers": (
        dict(model_type="qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1),
        dict(use_sliding_window=False)),
    "qwen2, window switched off": (
        dict(model_type="qwen2", use_sliding_window=False, sliding_window=8, max_window_layers=1),
        dict(use_sliding_window=True, layer_types=None)),
    "qwen3": (dict(model_type="qwen3", head_dim=20), {}),
    "qwen3, biases": (dict(model_type="qwen3", head_dim=20, attention_bias=True, tie_word_embeddings=True), {}),
    "qwen3, window by layer": (
        dict(model_type="qwen3", head_dim=20, use_sliding_window=True, sliding_window=8,
             layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
        dict(layer_types=["sliding_attention", "full_attention", "full_attention"])),
    "llama": (dict(model_type="llama"), {}),
    "llama, one key head": (dict(model_type="llama", num_key_value_heads=1, head_dim=10), {}),
    "llama, biases": (dict(model_type="llama", attention_bias=True, mlp_bias=True), {}),
    "llama, llama3 rope": (
        dict(model_type="llama", rope_theta=5e5, rope_scaling=LLAMA3),
        dict(rope_theta=5e5, rope_scaling=None, rope_parameters=None)),
    "llama, linear rope": (
        dict(model_type="llama", rope_theta=1e4, rope_scaling=dict(type="linear", factor=4.0)),
        dict(rope_theta=1e4, rope_scaling=None, rope_parameters=None)),
    "smollm2": (
        dict(model_type="llama", tie_word_embeddings=True, rope_theta=1e5, rope_interleaved=False, head_dim=None), {}),
    "mistral, window": (dict(model_type="mistral", sliding_window=8), dict(sliding_window=9)),
    "mistral, no window": (dict(model_type="mistral", sliding_window=None, head_dim=24), dict(sliding_window=47)),
    "ministral": (dict(model_type="ministral", sliding_window=8, head_dim=24,
                       layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
                  dict(layer_types=["sliding_attention", "sliding_attention", "sliding_attention"])),
    "smollm3": (dict(model_type="smollm3", attention_bias=True, mlp_bias=True, no_rope_layer_interval=2, **TOKENS),
                dict(no_rope_layer_interval=3)),
    "smollm3, window": (
        dict(model_type="smollm3", no_rope_layers=[0, 1, 1], use_sliding_window=True, sliding_window=8, **TOKENS),
        dict(use_sliding_window=False)),
    "granite": (
        dict(model_type="granite", embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.3,
             logits_scaling=8.0, tie_word_embeddings=True), dict(residual_multiplier=0.25)),
    "granite, defaults": (dict(model_type="granite", attention_bias=True), dict(attention_multiplier=0.35)),
    "seed_oss": (dict(model_type="seed_oss", attention_dropout=0.0, residual_dropout=0.0, head_dim=20,
                      attention_out_bias=True, mlp_bias=True), {}),
    "internlm3": (dict(model_type="internlm3", head_dim=20, qkv_bias=True, bias=True, rope_theta=5e7), {}),
    "olmo2": (dict(model_type="olmo2", rope_theta=5e5, **TOKENS), {}),
    "olmo2, biases": (
        dict(model_type="olmo2", attention_bias=True, head_dim=12, tie_word_embeddings=True, **TOKENS), {}),
    "olmo3": (dict(model_type="olmo3", sliding_window=8, num_hidden_layers=4, rope_theta=1e4, max_position_embeddings=64,
                   rope_scaling={**YARN, "attention_factor": 1.2}, **TOKENS), dict(sliding_window=9)),
    "olmo3, layers": (dict(model_type="olmo3", sliding_window=8, layer_types=OLMO_LAYERS, num_key_value_heads=4,
                           rope_parameters=OLMO_ROPES, **TOKENS),
                      dict(rope_parameters={**OLMO_ROPES, "sliding_attention": OLMO_ROPES["full_attention"]})),
    "phi3": (dict(model_type="phi3", sliding_window=8, rope_theta=1e4, **TOKENS), dict(sliding_window=9)),
    "phi3, longrope, partial": (
        dict(model_type="phi3", partial_rotary_factor=0.75, rope_theta=1e4, tie_word_embeddings=True,
             sliding_window=262144, rope_scaling=LONGROPE, original_max_position_embeddings=47, **TOKENS),
        dict(original_max_position_embeddings=48)),
    "ministral3": (dict(model_type="ministral3", head_dim=20, rope_parameters=MINISTRAL_ROPE, **TOKENS),
                   dict(rope_parameters={**MINISTRAL_ROPE, "llama_4_scaling_beta": 0.0})),
    "ministral3, window": (dict(model_type="ministral3", head_dim=20, rope_parameters=MINISTRAL_ROPE, sliding_window=9,
                                tie_word_embeddings=True, **TOKENS), dict(sliding_window=None)),
    "iquestcoder": (dict(model_type="iquestcoder", rope_theta=5e5, head_dim=20), {}),
}


pytestmark = pytest.mark.usefixtures("one_thread")


def fresh(**config):
    """A CausalLM with random weights, without a directory."""
    torch.manual_seed(0)
    net = CausalLM(ModelConfig.from_dict({**SIZES, **config}))
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.3)
    return net


def random_ids(*shape, seed=1):
    return torch.randint(SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def gradients(net):
    """Return {name: gradient} of a model and reset its gradients."""
    result = {name: p.grad for name, p in net.named_parameters()}
    net.zero_grad(set_to_none=True)
    return result


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits_equal_transformers(tmp_path, name):
    """For the config.json that transformers writes, and for the older spelling that published models have."""
    config, other = CASES[name]
    oracle = published(tmp_path, {**SIZES, **config})
    tokens = random_ids(48)
    expected = oracle(tokens[None]).logits[0]
    written = files.read_json(tmp_path / "config.json")
    for spelling in (written, {**SIZES, **config}):
        torch.testing.assert_close(loaded(tmp_path, spelling)(tokens, Documents.of((48,))), expected, atol=1e-4, rtol=1e-4)
    if other:
        changed = loaded(tmp_path, {**SIZES, **config, **other})(tokens, Documents.of((48,)))
        assert (changed - expected).abs().max() > 1e-2


@torch.no_grad()
def test_logits_of_a_sharded_directory_equal_transformers(tmp_path):
    """Several weight files with an index load the same model as one file."""
    oracle = published(tmp_path, {**SIZES, **CASES["qwen3, biases"][0]}, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    tokens = random_ids(48)
    torch.testing.assert_close(loaded(tmp_path)(tokens, Documents.of((48,))), oracle(tokens[None]).logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", FAMILIES)
def test_missing_keys_have_the_defaults_of_transformers(kind):
    """A config.json with only the sizes equals the one in which transformers has written all defaults."""
    least = dict(model_type=kind, vocab_size=97, hidden_size=64, intermediate_size=48, num_hidden_layers=2,
                 num_attention_heads=32, attention_dropout=0.0, residual_dropout=0.0, hidden_size_per_layer_input=0)
    if kind == "granitemoehybrid":  # its defaults are a model with experts and Mamba layers
        least |= dict(num_local_experts=0, layer_types=["attention"] * 2)
    assert ModelConfig.from_dict(least) == ModelConfig.from_dict(AutoConfig.for_model(**least).to_dict())


def test_rotary_angles_of_llama_3_2_equal_transformers():
    """With Llama 3.2's values, at positions where each band of the scaling matters. fp32 errs by 1e-7 per position."""
    scaling = dict(rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=8192)
    config = {**SIZES, "model_type": "llama", "head_dim": 64, "rope_theta": 5e5, "rope_scaling": scaling}
    positions = torch.arange(0, 10_000, 7)
    documents = Documents((len(positions),), positions, torch.tensor((0, len(positions)), dtype=torch.int32))
    cos, sin = model.rope_cos_sin(documents, ModelConfig.from_dict(config).ropes[0])
    expected = LlamaRotaryEmbedding(AutoConfig.for_model(**config))(torch.zeros(()), positions[None])
    for result, oracle in zip((cos, sin), expected):
        torch.testing.assert_close(result[:, 0], oracle[0, :, :32], atol=2e-3, rtol=0)


PACKED = dict(
    full=dict(model_type="llama", rope_theta=1e4),
    window=dict(model_type="mistral", sliding_window=5),
    mixed=dict(model_type="qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1,
               tie_word_embeddings=True))
LENGTHS = (1, 9, 30, 1, 2, 5, 1)


@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_packed_logits_equal_those_of_each_document_alone(name):
    """A document sees only itself, from position 0, wherever it is in the micro-batch."""
    net, tokens = fresh(**PACKED[name]), random_ids(sum(LENGTHS))
    alone = torch.cat([net(document, Documents.of((len(document),))) for document in tokens.split(LENGTHS)])
    torch.testing.assert_close(net(tokens, Documents.of(LENGTHS)), alone, atol=1e-4, rtol=1e-4)


def test_positions_of_each_document_start_at_zero(monkeypatch):
    """Logits cannot show it: they depend on differences of positions only, as long as fp32 resolves the angles."""
    calls, rope_cos_sin = [], model.rope_cos_sin

    def recording(documents, config):
        calls.append(documents.positions)
        return rope_cos_sin(documents, config)

    monkeypatch.setattr(model, "rope_cos_sin", recording)
    fresh(**PACKED["full"])(random_ids(6), Documents.of((3, 1, 2)))
    assert calls[0].tolist() == [0, 1, 2, 0, 0, 1]


@pytest.mark.parametrize("name", PACKED)
def test_packed_gradients_are_the_sum_over_the_documents(name):
    """The loss is a sum, so it does not matter whether documents share a micro-batch."""
    net, tokens, targets = fresh(**PACKED[name]), random_ids(sum(LENGTHS)), random_ids(sum(LENGTHS), seed=2)
    targets[::4] = IGNORE
    packed = model_loss(net, tokens, LENGTHS, targets)
    packed.backward()
    together = gradients(net)
    losses = []
    for document, target in zip(tokens.split(LENGTHS), targets.split(LENGTHS)):
        losses.append(model_loss(net, document, (len(document),), target))
        losses[-1].backward()
    torch.testing.assert_close(packed, sum(losses))
    for key, gradient in gradients(net).items():
        scale = gradient.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(together[key], gradient, atol=1e-5 * scale, rtol=1e-4, msg=key)


@pytest.mark.parametrize("name", ["qwen2", "qwen3, window by layer", "llama, llama3 rope", "mistral, window"])
def test_generation_equals_transformers_greedy_one(tmp_path, name):
    """Token by token with the cache, from a prompt longer than the window and from a single token."""
    oracle = published(tmp_path, {**SIZES, **CASES[name][0]})
    net = loaded(tmp_path)
    for length in (12, 1):
        prompt = random_ids(length)
        expected = oracle.generate(prompt[None], max_new_tokens=40, do_sample=False, pad_token_id=0,
                                   attention_mask=torch.ones(1, length, dtype=torch.long))[0, length:].tolist()
        assert len(set(expected)) > 4  # not one token repeated
        assert list(generate(net, prompt.tolist(), 40, eos_ids=())) == expected


def test_the_sampling_function_gets_the_logits_and_chooses_the_token():
    """It gets the logits that the full text has without a cache, and generation continues with the token it returns."""
    net, prompt, calls = fresh(**PACKED["mixed"]), random_ids(7).tolist(), []

    def least_likely(logits):
        calls.append(logits.clone())
        return int(logits.argmin())

    new = list(generate(net, prompt, 20, eos_ids=(), sample=least_likely))
    with torch.no_grad():
        logits = net(torch.tensor(prompt + new[:-1]), Documents.of((26,)))[6:]
    torch.testing.assert_close(torch.stack(calls), logits, atol=1e-4, rtol=1e-4)
    assert new == logits.argmin(dim=1).tolist()


def test_generation_ends_with_an_eos_id_or_at_the_limit():
    """The eos id is the last token that is yielded; without one, max_new_tokens are."""
    net, prompt = fresh(**PACKED["full"]), random_ids(5).tolist()
    free = list(generate(net, prompt, 12, eos_ids=()))
    assert len(free) == 12
    last_new = max(free, key=free.index)  # the token whose first occurrence is latest
    never = next(i for i in range(97) if i not in free)
    n_tokens = free.index(last_new) + 1
    assert n_tokens > 3
    assert list(generate(net, prompt, 50, eos_ids=(never, last_new))) == free[:n_tokens]


IGNORE = -100  # F.cross_entropy's default mark of a position without a target


class WeightHead(Head):
    """A head with this tensor as its weight."""

    def __init__(self, weight):
        torch.nn.Module.__init__(self)
        self.given = weight

    def local_weight(self):
        return self.given


def chunked(hidden, weight, targets, chunk=256):
    """The LossOut of targets (N,), IGNORE where there is none; `chunk` targets have logits at a time."""
    target_positions = (targets != IGNORE).nonzero()[:, 0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops.loss, "CHUNK", chunk)
        return loss_of_head(hidden, WeightHead(weight), target_positions, targets[target_positions])


def loss_inputs(n=50, dtype=torch.float32, ignored=slice(3, None, 4)):
    """(hidden, weight, targets); the first two require gradients, some targets are IGNORE."""
    rng = torch.Generator().manual_seed(3)
    hidden = torch.randn(n, 24, generator=rng).to(dtype).requires_grad_()
    weight = torch.randn(97, 24, generator=rng).to(dtype).requires_grad_()
    targets = random_ids(n)
    targets[ignored] = IGNORE
    return hidden, weight, targets


def plain_loss(hidden, weight, targets):
    """The oracle, in fp32: (loss, gradients of hidden and weight for loss / 3)."""
    hidden, weight = (x.detach().float().requires_grad_() for x in (hidden, weight))
    loss = F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORE, reduction="sum")
    (loss / 3).backward()
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("chunk", [1, 7, 38, 64, None])
def test_chunked_loss_is_plain_cross_entropy(chunk):
    """Value and both gradients, for chunks that do not divide the 38 targets, that equal them, and larger ones."""
    hidden, weight, targets = loss_inputs()
    assert (targets != IGNORE).sum() == 38
    loss = chunked(hidden, weight, targets, *([chunk] if chunk else [])).total
    (loss / 3).backward()
    assert loss.dtype == torch.float32 and loss.shape == ()
    for result, expected in zip((loss.detach(), hidden.grad, weight.grad), plain_loss(hidden, weight, targets)):
        torch.testing.assert_close(result, expected)


def test_the_loss_of_each_target_is_returned():
    """They are those of plain cross-entropy, in order and without a gradient; their sum is the loss."""
    hidden, weight, targets = loss_inputs()
    out = chunked(hidden, weight, targets, 7)
    expected = F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORE, reduction="none")
    torch.testing.assert_close(out.each, expected.detach()[targets != IGNORE])
    torch.testing.assert_close(out.each.sum(), out.total.detach())
    assert out.total.requires_grad and not out.each.requires_grad
    assert out.correct.shape == out.each.shape and out.correct.dtype == torch.bool


def test_chunked_loss_is_finite_for_large_logits():
    """Logits far beyond the range of exp give the same finite loss as plain cross-entropy."""
    hidden, weight, targets = loss_inputs()
    hidden = (hidden.detach() * 100).requires_grad_()
    loss = chunked(hidden, weight, targets, 7).total
    (loss / 3).backward()
    for result, expected in zip((loss.detach(), hidden.grad, weight.grad), plain_loss(hidden, weight, targets)):
        assert expected.isfinite().all()
        torch.testing.assert_close(result, expected, atol=1e-3, rtol=1e-4)


def test_chunked_loss_without_a_target_is_zero():
    """A micro-batch without targets has loss 0 and zero gradients, not None and not NaN."""
    hidden, weight, targets = loss_inputs(ignored=slice(None))
    loss = chunked(hidden, weight, targets).total
    loss.backward()
    assert loss.item() == 0
    torch.testing.assert_close(hidden.grad, torch.zeros_like(hidden), atol=0, rtol=0)
    torch.testing.assert_close(weight.grad, torch.zeros_like(weight), atol=0, rtol=0)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_input_of_the_loss_gets_no_gradient(frozen):
    """The gradient of the other input stays right (a frozen head with LoRA; a probe on frozen hidden states)."""
    inputs = loss_inputs()
    inputs[frozen].requires_grad_(False)
    (chunked(*inputs, 7).total / 3).backward()
    assert inputs[frozen].grad is None
    torch.testing.assert_close(inputs[1 - frozen].grad, plain_loss(*inputs)[2 - frozen])


def count_flops():
    """A context that counts the FLOPs of matrix products, including the in-place one that torch does not list."""
    in_place = {torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1]}
    return FlopCounterMode(display=False, custom_mapping=in_place)


def test_a_second_backward_is_refused_with_a_message():
    """Gradients are scaled in place. The error of the second backward leaves those of the first unchanged."""
    hidden, weight, targets = loss_inputs()
    loss = chunked(hidden, weight, targets, 7).total
    loss.backward()
    first = weight.grad.clone()
    with pytest.raises(RuntimeError, match="backward was already called"):
        loss.backward()
    assert torch.equal(weight.grad, first)


def test_chunked_loss_costs_only_targets_and_only_the_gradients_required():
    """One product of targets x C x V for the value and one for each gradient; ignored positions cost nothing."""
    hidden, weight, targets = loss_inputs()
    one = 2 * 38 * 24 * 97
    costs = []
    for needs in ((True, True), (True, False), (False, False)):
        hidden.requires_grad_(needs[0])
        weight.requires_grad_(needs[1])
        with count_flops() as counter:
            chunked(hidden, weight, targets, 7).total
        costs.append(counter.get_total_flops())
    assert costs == [3 * one, 2 * one, one]


def test_chunked_loss_computes_no_gradient_under_no_grad():
    """Evaluation gets the same value at the cost of one product."""
    hidden, weight, targets = loss_inputs()
    with torch.no_grad(), count_flops() as counter:
        loss = chunked(hidden, weight, targets, 7).total
    assert not loss.requires_grad and counter.get_total_flops() == 2 * 38 * 24 * 97
    torch.testing.assert_close(loss, plain_loss(hidden, weight, targets)[0])


class Largest(TorchDispatchMode):
    """Records the element count of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_the_loss_never_creates_all_logits():
    """No tensor in forward and backward is larger than the hidden states; all logits would be four times larger."""
    hidden, weight, targets = loss_inputs(n=8 * 24)
    with Largest() as largest:
        chunked(hidden, weight, targets, 8).total.backward()
    assert largest.numel == hidden.numel() > weight.numel()


def test_a_second_backward_with_retain_graph_is_refused():
    """Gradients are scaled in place, so a second pass would scale them twice."""
    hidden, weight, targets = loss_inputs()
    loss = chunked(hidden, weight, targets).total
    loss.backward(retain_graph=True)
    before = hidden.grad.clone(), weight.grad.clone()
    with pytest.raises((RuntimeError, TypeError)):
        loss.backward()
    assert torch.equal(hidden.grad, before[0]) and torch.equal(weight.grad, before[1])


def assert_near(result, expected, limit):
    """The norm of the difference is below `limit` times the norm of `expected`."""
    assert (result.float() - expected).norm() < limit * expected.norm()


def test_loss_under_bf16_autocast_is_close_to_fp32():
    """The value is summed in fp32, and fp32 weights get fp32 gradients."""
    hidden, weight, targets = loss_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked(hidden, weight, targets, 7).total
    (loss / 3).backward()
    assert loss.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32
    expected = plain_loss(hidden, weight, targets)
    torch.testing.assert_close(loss.detach(), expected[0], rtol=5e-3, atol=0)
    for gradient, oracle in zip((hidden.grad, weight.grad), expected[1:]):
        assert_near(gradient, oracle, 0.02)


@pytest.mark.parametrize("chunk", [1, 64])
def test_loss_in_bf16_is_close_to_fp32_for_any_chunk(chunk):
    """Gradients are rounded to bf16 once, not after each of 900 chunks of one target."""
    hidden, weight, targets = loss_inputs(n=1200, dtype=torch.bfloat16)
    loss = chunked(hidden, weight, targets, chunk).total
    (loss / 3).backward()
    assert (loss.dtype, hidden.grad.dtype, weight.grad.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    expected = plain_loss(hidden, weight, targets)
    torch.testing.assert_close(loss.detach(), expected[0], rtol=5e-3, atol=0)
    for gradient, oracle in zip((hidden.grad, weight.grad), expected[1:]):
        assert_near(gradient, oracle, 0.007)


@pytest.mark.parametrize("how", ["autocast", "parameters"])
def test_model_in_bf16_is_close_to_fp32(how):
    """Loss and gradients of a packed micro-batch: fp32 parameters under autocast, and parameters cast to bf16."""
    net, tokens, targets = fresh(**PACKED["mixed"]), random_ids(sum(LENGTHS)), random_ids(sum(LENGTHS), seed=2)
    exact = model_loss(net, tokens, LENGTHS, targets)
    exact.backward()
    expected = gradients(net)
    if how == "parameters":
        net.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        loss = model_loss(net, tokens, LENGTHS, targets)
    loss.backward()
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)
    for name, gradient in gradients(net).items():
        assert gradient.dtype == (torch.float32 if how == "autocast" else torch.bfloat16)
        assert F.cosine_similarity(gradient.flatten().float(), expected[name].flatten(), dim=0) > 0.98, name


@pytest.mark.parametrize("frozen", [(), ("embed_tokens",), ("embed_tokens", "norm", "mlp")])
def test_gradient_checkpointing_is_bitwise_neutral(frozen):
    """For 0 to all blocks. No gradient is lost where the first block's input needs none, and only the checkpointed
    blocks run twice."""
    net, tokens, targets = fresh(**PACKED["window"]), random_ids(sum(LENGTHS)), random_ids(sum(LENGTHS), seed=2)
    for name, p in net.named_parameters():
        p.requires_grad_(not any(word in name for word in frozen))
    calls = []
    for i, block in enumerate(net.model.layers):
        block.self_attn.register_forward_hook(lambda *_, i=i: calls.append(i))
    results = []
    for net.model.checkpointed_blocks in range(4):
        loss = model_loss(net, tokens, LENGTHS, targets)
        loss.backward()
        results.append((loss.detach(), gradients(net)))
    assert calls == [0, 1, 2] + [0, 1, 2, 0] + [0, 1, 2, 1, 0] + [0, 1, 2, 2, 1, 0]
    loss, expected = results[0]
    for checkpointed_loss, checkpointed in results[1:]:
        assert torch.equal(loss, checkpointed_loss)
        for name, p in net.named_parameters():
            assert (expected[name] is None) == (checkpointed[name] is None) == (not p.requires_grad)
            assert expected[name] is None or torch.equal(expected[name], checkpointed[name]), name


REFUSED = [
    (dict(model_type="gpt2"), "model_type 'gpt2'"),
    (dict(model_type=None), "model_type None"),
    (dict(model_type="gemma3", text_config=None), "text_config is None"),
    (dict(model_type="granitemoehybrid", num_local_experts=64), "is a mixture of experts (num_local_experts is 64)"),
    (dict(model_type="granitemoehybrid"), "is a mixture of experts (num_local_experts is not 0)"),
    (dict(model_type="granitemoehybrid", num_local_experts=0), "is an architecture with Mamba layers"),
    (dict(model_type="granitemoehybrid", num_local_experts=0, layer_types=["attention", "mamba"], mamba_d_state=128),
     "is an architecture with Mamba layers"),
    (dict(model_type="granitemoehybrid", num_local_experts=0, layer_types=["attention"] * 2,
          position_embedding_type="nope"), "position_embedding_type is 'nope'"),
    (dict(hidden_act="gelu"), "hidden_act is 'gelu'"),
    (dict(model_type="llama", layer_types=["sliding_attention"] * 3, sliding_window=8), "models of type llama have no windows"),
    (dict(model_type="phi3", resid_pdrop=0.1), "resid_pdrop is 0.1"),
    (dict(model_type="phi3", embd_pdrop=0.1), "set embd_pdrop to 0 there"),
    (dict(model_type="olmo3", rope_parameters=YARN), "objects full_attention and sliding_attention"),
    (dict(model_type="olmo3", num_hidden_layers=4, rope_parameters={"full_attention": {**YARN, "truncate": False}}),
     "truncate may only be true"),
    (dict(model_type="olmo3", rope_scaling={**YARN, "truncate": False}), "truncate may only be true"),
    (dict(model_type="olmo3", rope_parameters={"sliding_attention": "yarn"}), "rope scaling must be an object"),
    (dict(rope_scaling=dict(rope_type="proportional", factor=4.0)), "'proportional'"),
    (dict(rope_scaling=dict(type="dynamic", factor=2.0)), "rope_type dynamic"),
    (dict(rope_parameters=dict(rope_type="longrope", rope_theta=1e4)), "'longrope'"),
    (dict(rope_scaling=dict(type="linear")), "lacks factor"),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
    (dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)),
     "'partial_rotary_factor': 0.5"),
    (dict(quantization_config=dict(quant_method="awq")), "quantization_config is awq: the weights are stored quantised"),
    (dict(attention_dropout=0.1), "attention_dropout is 0.1"),
    (dict(num_attention_heads=4, num_key_value_heads=3),
     "num_attention_heads 4 must be a multiple of num_key_value_heads 3"),
    (dict(head_dim=9), "head_dim 9"),
    (dict(hidden_size=2), "head_dim 0 must be even and not 0"),
    (dict(hidden_size=None), "hidden_size is None"),
    (dict(num_hidden_layers=0), "num_hidden_layers is 0"),
    (dict(vocab_size="97"), "vocab_size is '97'"),
    (dict(model_type="qwen2", use_sliding_window=True, sliding_window=8, layer_types=["full_attention"] * 2),
     "['full_attention', 'full_attention']"),
    (dict(model_type="qwen2", use_sliding_window=True, sliding_window=8, layer_types=["linear_attention"] * 3),
     "'linear_attention'"),
] + [(dict(rope_scaling={k: v for k, v in LLAMA3.items() if k != key}), f"lacks {key}")
     for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")]


@pytest.mark.parametrize("change, named", REFUSED)
def test_unsupported_values_in_config_json_are_refused(change, named):
    """A value that would change what the model computes and is not implemented: the error names it."""
    with pytest.raises(ValueError, match=re.escape(named)):
        ModelConfig.from_dict({**SIZES, "model_type": "llama", **change})


@pytest.mark.parametrize("model_type, keys", [
    ("granite", ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")),
    ("qwen2", ("max_window_layers",)), ("smollm3", ("no_rope_layer_interval",)),
    ("phi3", ("rms_norm_eps", "rope_theta")),
    ("gemma3_text", ("sliding_window_pattern", "rope_local_base_freq"))])
def test_null_is_the_default_where_it_has_no_meaning_of_its_own(model_type, keys):
    gelu = dict(hidden_act="gelu_pytorch_tanh") if "gemma" in model_type else {}
    config = {**SIZES, **gelu, "model_type": model_type, "use_sliding_window": True, "sliding_window": 8}
    without = {key: value for key, value in config.items() if key not in keys}
    assert ModelConfig.from_dict({**without, **dict.fromkeys(keys)}) == ModelConfig.from_dict(without)


@pytest.mark.parametrize("change", [dict(llama_4_scaling_beta=None), dict(llama_4_scaling_beta="0.1"),
                                    dict(llama_4_scaling_beta=-1), dict(rope_type="default")])
def test_ministral3_needs_the_scale_of_its_queries(change):
    """transformers fails without it. The file of the family reads it, when the model is built."""
    rotary = {key: value for key, value in {**MINISTRAL_ROPE, **change}.items() if value is not None}
    if "rope_type" in change:
        del rotary["llama_4_scaling_beta"]
    config = ModelConfig.from_dict({**SIZES, "model_type": "ministral3", "rope_parameters": rotary})
    with pytest.raises(ValueError, match="by which the queries are scaled"):
        causal_lm(config)(config)


def test_config_without_hidden_size_is_refused():
    """A missing size is an error that names it; there is no default."""
    config = {key: value for key, value in SIZES.items() if key != "hidden_size"}
    with pytest.raises(ValueError, match="hidden_size"):
        ModelConfig.from_dict({**config, "model_type": "llama"})


def test_values_that_equal_what_is_implemented_are_accepted():
    """null, 0.0 and 1.0 mean what the model computes without the keys."""
    config = {**SIZES, "model_type": "llama"}
    spelled = dict(hidden_act="silu", attention_dropout=0.0, partial_rotary_factor=1.0, quantization_config=None,
                   rope_scaling=None, head_dim=None)
    assert ModelConfig.from_dict({**config, **spelled}) == ModelConfig.from_dict(config)


@pytest.mark.repo
def test_model_has_no_distributed_code():
    """Only other files know that there may be several processes."""
    with open(model.__file__, encoding="utf-8") as f:
        assert re.search(r"mesh|dtensor|\brank\b|fsdp|torch\.distributed", f.read(), re.I) is None
