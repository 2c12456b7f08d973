"""Gemma 2, 3 and 4 compared with transformers: logits, training, generation, adapters; layouts, compiled, on meta."""

import functools
import json
import math

import pytest
import torch
import torch._dynamo
import helpers
import varlen_helpers
from helpers import EXAMPLES, LAYOUTS, metrics, model_loss, run_all, tensors_of
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM

import data
import sft
from disk import peft as peft_config
from disk import pretrained
from families.config import ModelConfig
from families.registry import causal_lm
from model import generate
from ops import attention, nf4
from ops.attention import Documents
from settings.errors import UserError
from text.template import ChatTokenizer

full = pytest.mark.full
SIZES = dict(vocab_size=2048, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, head_dim=16, max_position_embeddings=512, sliding_window=8, pad_token_id=None,
             bos_token_id=None, eos_token_id=None, rms_norm_eps=1e-3)
# name -> (config.json as people publish it, changes to it, each of which must change the logits)
CASES = {
    "gemma2": (
        dict(model_type="gemma2", query_pre_attn_scalar=24, attn_logit_softcapping=2.0, final_logit_softcapping=3.0,
             attention_bias=True),
        (dict(attn_logit_softcapping=None), dict(final_logit_softcapping=3.5), dict(query_pre_attn_scalar=16),
         dict(sliding_window=9))),
    "gemma3": (
        dict(model_type="gemma3_text", query_pre_attn_scalar=24, sliding_window_pattern=2, rope_theta=5e5,
             rope_local_base_freq=5e3, rope_scaling=dict(rope_type="linear", factor=8.0), final_logit_softcapping=3.0),
        (dict(rope_theta=1e6), dict(rope_local_base_freq=5e5), dict(rope_scaling=None),
         dict(sliding_window_pattern=3))),
    "gemma4": (
        dict(model_type="gemma4_text", global_head_dim=24, num_global_key_value_heads=1, attention_k_eq_v=True,
             hidden_size_per_layer_input=0, final_logit_softcapping=3.0, sliding_window=8,
             use_bidirectional_attention="vision",
             layer_types=["sliding_attention", "full_attention", "full_attention"]),
        (dict(sliding_window=9), dict(rope_parameters=dict(
            sliding_attention=dict(rope_type="default", rope_theta=1e4),
            full_attention=dict(rope_type="proportional", partial_rotary_factor=0.75, rope_theta=1e6))))),
    "gemma4, own values": (
        dict(model_type="gemma4_unified_text", global_head_dim=24, attention_bias=True, tie_word_embeddings=False), ()),
}
FAMILIES = ("gemma2", "gemma3", "gemma4")


pytestmark = pytest.mark.usefixtures("one_thread")


def published(directory, config):
    """Let transformers write a model directory with random values, with models/tiny's tokenizer; return its model."""
    def normal(name, _):
        return float("layer_scalar" in name or "norm" in name and "gemma4" in config["model_type"]), 0.2

    # eager: transformers' other attentions ignore the soft cap
    return helpers.published(directory, SIZES | config, normal=normal, attention="eager", tokenizer=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{name: (directory, transformers' model)}"""
    directories = {name: tmp_path_factory.mktemp("model") for name in CASES}
    return {name: (directory, published(directory, CASES[name][0])) for name, directory in directories.items()}


def read(directory):
    return json.loads((directory / "config.json").read_text())


def built(directory, config=None, **options):
    """The model of a directory, created and loaded as sft.build does it."""
    config = ModelConfig.from_dict(config or read(directory))
    with torch.device("meta"):
        net = causal_lm(config)(config, **options)
    net.to_empty(device="cpu")
    net.tie_weights()
    pretrained.load_weights(net, str(directory))
    return net


def ids(n, seed=1):
    return torch.randint(SIZES["vocab_size"], (n,), generator=torch.Generator().manual_seed(seed))


LENGTHS = (1, 9, 30, 2, 6)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits_equal_transformers(name, models):
    """Packed and alone, for the config.json that transformers writes and for the one that is published; nested, too."""
    (config, changes), (directory, oracle), tokens = CASES[name], models[name], ids(sum(LENGTHS))
    expected = torch.cat([oracle(part[None]).logits[0] for part in tokens.split(LENGTHS)])
    net = built(directory)
    torch.testing.assert_close(net(tokens, Documents.of(LENGTHS)), expected, atol=1e-4, rtol=1e-4)
    alone = torch.cat([net(part, Documents.of((len(part),))) for part in tokens.split(LENGTHS)])
    torch.testing.assert_close(alone, expected, atol=1e-4, rtol=1e-4)
    outer = dict(model_type=config["model_type"].removesuffix("_text"), vision_config={},
                 tie_word_embeddings=config.get("tie_word_embeddings", True),
                 text_config=SIZES | config | dict(tie_word_embeddings=False))
    published = [SIZES | config, *([outer] if "_text" in config["model_type"] else [])]
    assert all(ModelConfig.from_dict(spelling) == net.config for spelling in published)
    for change in changes:
        other = built(directory, SIZES | config | change)(tokens, Documents.of(LENGTHS))
        assert (other - expected).abs().max() > 1e-2, change


def test_the_published_config_of_gemma_3_4b_has_the_sizes_of_transformers():
    """Its text_config lacks the vocabulary and the numbers of heads."""
    text = dict(hidden_size=2560, intermediate_size=10240, model_type="gemma3_text", num_hidden_layers=34,
                rope_scaling=dict(factor=8.0, rope_type="linear"), sliding_window=1024)
    config = ModelConfig.from_dict(dict(model_type="gemma3", text_config=text, vision_config=dict(hidden_size=1152)))
    assert config == ModelConfig.from_dict(AutoConfig.for_model(**text).to_dict())
    assert (config.vocab_size, config.num_attention_heads, config.num_key_value_heads) == (262208, 8, 4)
    assert config.sliding_windows[4:6] == (1024, None) and config.tie_word_embeddings
    assert {len(rope.frequencies) for rope in config.ropes} == {128}


def test_gemma_4_of_more_than_ten_layers_is_read_as_transformers_writes_it():
    """Its per_layer_config then has the numbers 05, 11, ...; as published, it has global_head_dim."""
    sizes = SIZES | CASES["gemma4"][0] | dict(num_hidden_layers=12, layer_types=None)
    written = AutoConfig.for_model(**sizes).to_dict()
    assert {*written["per_layer_config"]} == {"05", "11"}
    config = ModelConfig.from_dict(written)
    assert config == ModelConfig.from_dict(sizes) and config.head_dims[4:6] == (16, 24)


@pytest.mark.parametrize("name, change, message", [
    ("gemma2", dict(use_bidirectional_attention=True), "use_bidirectional_attention is True"),
    ("gemma3", dict(attn_logit_softcapping=50.0), "attn_logit_softcapping is 50.0"),
    ("gemma3", dict(hidden_activation="relu"), "hidden_activation is 'relu'"),
    ("gemma3", dict(sliding_window_pattern=0), "sliding_window_pattern is 0"),
    ("gemma3", dict(rope_parameters=dict(rope_type="default", rope_theta=1e4)), "rope_parameters"),
    ("gemma3", dict(rope_scaling=dict(rope_type="proportional", factor=2.0)), "rope_type may be default, linear"),
    ("gemma3", dict(rope_scaling=dict(rope_type="yarn", factor=2.0, truncate=False)), "truncate may only be true"),
    ("gemma2", dict(final_logit_softcapping=0), "final_logit_softcapping is 0"),
    ("gemma4", dict(use_bidirectional_attention="all"), "use_bidirectional_attention is 'all'"),
    ("gemma4", dict(hidden_size_per_layer_input=256), "Gemma 4 E2B and E4B"),
    ("gemma4", dict(num_kv_shared_layers=2), "num_kv_shared_layers is 2; Gemma 4 E2B and E4B"),
    ("gemma4", dict(enable_moe_block=True, num_experts=128), "a mixture of experts"),
    ("gemma4", dict(layer_types=["full_attention", "full_attention", "sliding_attention"]), "ends with full_attention"),
    ("gemma4", dict(num_global_key_value_heads=3), "must be a multiple of num_global_key_value_heads 3"),
    ("gemma4", dict(global_head_dim="x"), "global_head_dim is 'x'"),
    ("gemma4", dict(per_layer_config={"1": {"head_dim": 24}}), "per_layer_config is"),
    ("gemma4", dict(per_layer_config={"1": {"head_dim": 24}, "2": {"head_dim": 32}}), "per_layer_config is"),
    ("gemma4", dict(rope_parameters=dict(full_attention=dict(rope_type="proportional", rope_theta=1e4))), "lacks"),
], ids=str)
def test_what_is_not_built_is_refused(name, change, message):
    with pytest.raises(UserError, match=message):
        ModelConfig.from_dict(SIZES | CASES[name][0] | change)


@pytest.mark.parametrize("name", FAMILIES)
def test_embeddings_are_scaled_as_in_bf16(name, models):
    """sqrt(32) is rounded to bf16 before the product."""
    directory, oracle = models[name]
    expected = oracle.model.embed_tokens.weight.detach().bfloat16() * torch.tensor(32**0.5).bfloat16()
    assert torch.equal(built(directory).bfloat16().model.embed(torch.arange(2048)), expected)


@full
@pytest.mark.parametrize("name", FAMILIES)
def test_generation_equals_transformers_greedy_one(name, tmp_path):
    """With the cache, from a prompt longer than the window and past it from a single token."""
    oracle = published(tmp_path, CASES[name][0] | dict(tie_word_embeddings=False))  # tied: it repeats one token
    net = built(tmp_path)
    for length in (12, 1):
        prompt = ids(length)
        expected = oracle.generate(prompt[None], max_new_tokens=20, do_sample=False, pad_token_id=0,
                                   attention_mask=torch.ones(1, length, dtype=torch.long))[0, length:].tolist()
        assert len(set(expected)) > 4
        assert list(generate(net, prompt.tolist(), 20, eos_ids=())) == expected


# ---- training -----------------------------------------------------------------------------------------------------

FLAGS = ("--max_steps", 10, "--lr", "1e-3", "--batch_size", 2, "--max_length", 256, "--no-gradient_checkpointing")


def oracle_losses(directory, scheduler):
    """The losses of ten steps of transformers' model with torch's AdamW; each conversation is computed alone."""
    net = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32)
    groups = [dict(params=[p for p in net.parameters() if (p.ndim > 1) == is_matrix], weight_decay=0.01 * is_matrix)
              for is_matrix in (True, False)]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    rows = data.load(EXAMPLES, ChatTokenizer(directory), 256)
    sampler = data.Sampler(rows.n_inputs, epochs=3, seed=42, batch_size=2, max_steps=10)
    losses = []
    for step in range(1, 11):
        _, conversations = sampler.step(step)
        n, total = int(rows.n_targets[conversations].sum()), 0.0
        for i in conversations:
            span = slice(rows.starts[i], rows.starts[i + 1])
            tokens, mask = (torch.tensor(x[span].tolist()) for x in (rows.tokens, rows.loss_mask))
            logits, mask = net(tokens[None]).logits[0, :-1], mask[1:]
            loss = torch.nn.functional.cross_entropy(logits[mask], tokens[1:][mask], reduction="sum") / n
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        share = (step - 2) / 9  # one step of warm-up
        factor = {"cosine": (1 + math.cos(math.pi * share)) / 2, "linear": 1 - share, "constant": 1.0}[scheduler]
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1.0 if step == 1 else factor)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


@full
@pytest.mark.parametrize("name, scheduler", [
    ("gemma2", "cosine"), ("gemma3", "cosine"), ("gemma4", "cosine"),
    pytest.param("gemma3", "linear", marks=full), pytest.param("gemma3", "constant", marks=full)])
def test_ten_steps_equal_transformers_and_torch(name, scheduler, models, train, tmp_path):
    """Losses to 1e-5. The saved directory is one of transformers; constants of the checkpoint stay as they are."""
    directory, oracle = models[name]
    lines = train(*FLAGS, "--scheduler", scheduler, model=directory)
    for line, expected in zip(lines, oracle_losses(directory, scheduler), strict=True):
        assert math.isclose(line["loss"], expected, rel_tol=1e-5), (line["step"], line["loss"], expected)
    step = tmp_path / "out" / "checkpoints" / "step_10"
    before, after = tensors_of(directory), tensors_of(step)
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before if "layer_scalar" not in key}
    saved = AutoModelForCausalLM.from_pretrained(step, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        tokens = ids(20)
        torch.testing.assert_close(built(step)(tokens, Documents.of((20,))), saved(tokens[None]).logits[0],
                                   atol=1e-4, rtol=1e-4)


@full
@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_are_those_of_peft(name, models, train, tmp_path):
    """all-linear chooses its layers. PEFT computes with a trained adapter what this trainer does; and the reverse."""
    import chat
    import peft

    directory, _ = models[name]
    tokens = ids(20)
    train(*FLAGS, "--use_lora", "--lr", "1e-2", "--max_steps", 2, model=directory)
    step = tmp_path / "out" / "checkpoints" / "step_2"

    def base():
        return AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32)

    with torch.no_grad():
        loaded, _, _ = chat.load(str(step), str(directory))
        theirs = peft.PeftModel.from_pretrained(base(), step).eval()
        logits = loaded(tokens, Documents.of((20,)))
        torch.testing.assert_close(logits, theirs(tokens[None]).logits[0], atol=1e-4, rtol=1e-4)
        assert (logits - built(directory)(tokens, Documents.of((20,)))).abs().max() > 1e-3
        theirs = peft.get_peft_model(base(), peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
        for key, p in theirs.named_parameters():
            if "lora_B" in key:
                p.normal_(std=0.1)
        theirs.save_pretrained(tmp_path / "adapter")
        assert tensors_of(tmp_path / "adapter").keys() == tensors_of(step).keys()
        loaded, _, _ = chat.load(str(tmp_path / "adapter"), str(directory))
        torch.testing.assert_close(loaded(tokens, Documents.of((20,))), theirs.eval()(tokens[None]).logits[0],
                                   atol=1e-4, rtol=1e-4)


@full
@pytest.mark.parametrize("name", FAMILIES)
def test_qlora_quantises_every_linear_layer(name, models, train):
    """The first loss is that of the model whose matrices were rounded to NF4; embedding and norms are not."""
    directory, _ = models[name]
    flags = (*FLAGS, "--use_lora", "--max_steps", 1)
    quantised, plain = (train(*flags, *more, model=directory, out=f"out{len(more)}")[0]["loss"]
                        for more in (("--quantize", "nf4"), ()))
    assert 0 < abs(quantised - plain) < 0.2
    net = built(directory)
    nf4.quantize_linears(net)
    linears = {key for key, module in net.named_modules() if isinstance(module, torch.nn.Linear)} - {"lm_head"}
    assert all(isinstance(net.get_submodule(key), nf4.NF4Linear) for key in linears)
    assert len(linears) == 19 if name == "gemma4" else 21
    assert peft_config.new(net, sft.Config(use_lora=True, model="base"))[1].keys() == linears


# ---- compiled, on meta, on ranks ----------------------------------------------------------------------------------


def varlen_scaled(query, *given, scale=None, window_size=(-1, -1), enable_gqa=False):
    """The reference of varlen_attn, which has no scale of its own."""
    factor = 1.0 if scale is None else scale * query.shape[-1] ** 0.5
    return varlen_helpers.varlen_attn_2_13(query * factor, *given, window_size=window_size, enable_gqa=enable_gqa)


@pytest.fixture
def fresh_compiler(monkeypatch):
    """Blocks are traced by a compiler that generates no code; varlen_attn is its reference, on the CPU too.

    It takes heads up to 16 here, as it takes those up to 256 on CUDA: Gemma 4's global layers have wider ones.
    """
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    varlen_helpers.use(monkeypatch, varlen_scaled)
    monkeypatch.setattr(attention, "fits_varlen", lambda x, head_dim: head_dim <= 16)
    torch._dynamo.reset()
    counters.clear()
    yield
    attention.varlen_attention.cache_clear()
    torch._dynamo.reset()


def loss_and_gradients(net, lengths):
    tokens = ids(sum(lengths))
    loss = model_loss(net, tokens, lengths, tokens.roll(-1))
    loss.backward()
    gradients = {name: p.grad for name, p in net.named_parameters() if p.requires_grad}
    net.zero_grad(set_to_none=True)
    return {"loss": loss.detach(), **gradients}


@full
@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_are_compiled_without_a_break(name, models, fresh_compiler):
    """One graph for each kind of layer serves all packings; with checkpoints. Loss and gradients stay."""
    directory, _ = models[name]
    expected = loss_and_gradients(built(directory), (30, 14))
    net = built(directory, compiled=True, checkpointed_blocks=1)
    for key, value in loss_and_gradients(net, (30, 14)).items():
        torch.testing.assert_close(value, expected[key], atol=1e-4, rtol=1e-3, msg=key)
    for lengths in ((20, 13, 5), (9,) * 6, (70, 3), (20, 33, 50, 7), (100, 60, 3), (300,)):
        loss_and_gradients(net, lengths)
        assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


@full
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_runs_on_meta(name, dtype):
    """It waits for no value, also with Gemma 4's global heads of 512 values, which varlen_attn does not have."""
    config = ModelConfig.from_dict(SIZES | CASES[name][0] | dict(head_dim=256, global_head_dim=512))
    with torch.device("meta"):
        net = causal_lm(config)(config, checkpointed_blocks=1).to(dtype)
        net.tie_weights()
        tokens = torch.zeros(50, dtype=torch.long)
    loss = net(tokens, Documents.of((20, 30), "meta"), tokens, tokens).total
    loss.backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)


def test_each_layer_has_the_attention_that_fits_its_heads():
    config = ModelConfig.from_dict(SIZES | CASES["gemma4"][0] | dict(head_dim=256, global_head_dim=512))
    with torch.device("meta"):
        net, x = causal_lm(config)(config), torch.zeros(2, 32, dtype=torch.bfloat16)
    functions = [net.model.attend_function(x, i, cached=False) for i in range(3)]
    assert functions == [attention.varlen_attention(), attention.attend_each, attention.attend_each]


@full
@pytest.mark.parametrize("name", FAMILIES)
def test_resume_is_bitwise(name, models, train, tmp_path):
    flags = (*FLAGS, "--max_steps", 6, "--save_steps", 3)
    lines = train(*flags, model=models[name][0])
    whole = tensors_of(tmp_path / "out" / "checkpoints" / "step_6")
    again = train(*flags, "--resume_from", "out/checkpoints/step_3", model=models[name][0])
    assert [line["loss"] for line in again] == [line["loss"] for line in lines]
    resumed = tensors_of(tmp_path / "out" / "checkpoints" / "step_6")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@full
def test_losses_do_not_depend_on_the_ranks(models, train, tmp_path):
    """Two ranks, and tensor parallel of two, full and LoRA: the losses and gradient norms of one rank."""
    runs = []
    for name in FAMILIES:
        flags = (*FLAGS, "--max_steps", 4, "--model", models[name][0], "--train_data", EXAMPLES)
        for layout in (("one", "dp2") if name == "gemma4" else ("one", "dp2", "tp2")):
            ranks, more = LAYOUTS[layout]
            runs += [(ranks, (*flags, *more, *lora, "--output_dir", f"{name}_{layout}_{len(lora)}"))
                     for lora in ((), ("--use_lora",))]
    run_all(runs, tmp_path)
    for _, arguments in runs:
        name, _, lora = arguments[-1].split("_")
        for line, one in zip(metrics(tmp_path / arguments[-1]), metrics(tmp_path / f"{name}_one_{lora}"), strict=True):
            for key in ("loss", "grad_norm"):
                assert math.isclose(line[key], one[key], rel_tol=1e-5), (arguments[-1], line["step"], key)
        if not lora:
            tensors, one = (tensors_of(tmp_path / run / "checkpoints" / "step_4")
                            for run in (arguments[-1], f"{name}_one_{lora}"))
            assert tensors.keys() == one.keys()


def test_tensor_parallelism_of_gemma_4_is_refused(models, train):
    """Before anything is loaded, with the reason."""
    with pytest.raises(UserError, match="can't split a model of type gemma4_text: .*few key/value heads"):
        train("--strategy", "megatron", "--tp", 2, model=models["gemma4"][0])
