"""families/qwen3_5.py against transformers: logits, losses, generation, adapters; ranks, resume, compile, memory."""

import gc
import json
import math
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
import helpers
import varlen_helpers
from helpers import EXAMPLES, chat as messages, loaded, metrics, model_loss, run_all, tensors_of
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM

import chat
import data
import fsdp
import lora
import sft
from disk import checkpoint, files, peft as peft_config
from disk.run import ModelPaths
from families.config import ModelConfig
from families.registry import causal_lm
from model import generate
from ops import activations, attention, forecast, memory, nf4, optim
from ops.attention import Documents
from ranks import processes, tp
from settings.errors import UserError
from settings.parser import parse
from text.template import ChatTokenizer
from tools import plan

SIZES = dict(model_type="qwen3_5_text", vocab_size=2048, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
             num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=2048, eos_token_id=None,
             linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=12,
             rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.25,
                                  mrope_section=[1, 1, 0], mrope_interleaved=True))
# name -> (changes of SIZES, a change to them that must change the logits)
CASES = {
    "as published": ({}, dict(full_attention_interval=2, layer_types=None)),
    "layer types": (dict(layer_types=["full_attention", "linear_attention", "linear_attention", "full_attention"],
                         attention_bias=True, tie_word_embeddings=True), dict(layer_types=None)),
    "sizes": (dict(linear_num_value_heads=6, linear_conv_kernel_dim=3, num_key_value_heads=4, rms_norm_eps=1e-2,
                   full_attention_interval=2), dict(rms_norm_eps=1e-6)),
    "rotary": (dict(rope_parameters=dict(rope_type="default", rope_theta=100.0, partial_rotary_factor=0.5)),
               dict(rope_parameters=dict(rope_type="default", rope_theta=100.0))),
}
LENGTHS = (1, 70, 64, 9, 6)
FAST = ("--lr", "1e-3", "--batch_size", 8, "--max_length", 256)


pytestmark = pytest.mark.usefixtures("one_thread")


def published(directory, **changes):
    """Let transformers write a directory with tiny's tokenizer, all weights random; return its model."""
    def normal(name, p):
        return 1.0 if "linear_attn.norm" in name else 0.0, 0.1 if p.ndim > 1 else 0.3

    return helpers.published(directory, {**SIZES, **changes}, normal=normal, tokenizer=True)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    directory = tmp_path_factory.mktemp("small")
    published(directory)
    return directory


def random_ids(n):
    return torch.randint(SIZES["vocab_size"], (n,), generator=torch.Generator().manual_seed(1))


# ---- transformers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits_and_generation_equal_transformers(name, tmp_path):
    """Packed and alone, for what transformers writes and for a text_config; greedy tokens with the cache."""
    changes, other = CASES[name]
    oracle, tokens = published(tmp_path, **changes), random_ids(sum(LENGTHS))
    written = files.read_json(tmp_path / "config.json")
    nested = {"model_type": "qwen3_5", "text_config": written, "vision_config": {},
              "tie_word_embeddings": written["tie_word_embeddings"]}
    alone = torch.cat([oracle(part[None]).logits[0] for part in tokens.split(LENGTHS)])
    for config in (written, {**SIZES, **changes}, nested):
        net = loaded(tmp_path, config)
        torch.testing.assert_close(net(tokens, Documents.of(LENGTHS)), alone, atol=1e-4, rtol=1e-4)
    expected = oracle(tokens[None]).logits[0]
    torch.testing.assert_close(net(tokens, Documents.of((150,))), expected, atol=1e-4, rtol=1e-4)
    config = ModelConfig.from_dict({**SIZES, **changes, **other})
    if "rope" in str(other) or "eps" in str(other):  # with other layers there are other parameters
        changed = loaded(tmp_path, {**SIZES, **changes, **other})
        assert (changed(tokens, Documents.of(LENGTHS)) - alone).abs().max() > 1e-2
    else:
        assert config.layer_types != net.config.layer_types
    for length in (12, 1):
        prompt = tokens[:length]
        expected = oracle.generate(prompt[None], max_new_tokens=30, do_sample=False, pad_token_id=0,
                                   attention_mask=torch.ones(1, length, dtype=torch.long))[0, length:].tolist()
        assert len(set(expected)) > 1
        assert list(generate(net, prompt.tolist(), 30, eos_ids=())) == expected


@torch.no_grad()
def test_a_prompt_in_pieces_has_the_logits_of_the_prompt(small):
    """As chat.py gives each turn: the cache of each layer continues over pieces of any length."""
    net, tokens = loaded(small), random_ids(90)
    expected, past, start = net(tokens, Documents.of((90,))), [{} for _ in net.model.layers], 0
    for n in (2, 1, 66, 1, 1, 19):
        documents = Documents.of((n,), first_position=start)
        logits = net(tokens[start : start + n], documents, past=past)
        start += n
        torch.testing.assert_close(logits[0], expected[start - 1], atol=1e-5, rtol=1e-4)


def reference_losses(directory, n_steps, rates, adapter=None):
    """Losses of transformers' model, or of peft's adapter on it, and torch's AdamW on the conversations of a run."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    if adapter:
        model = peft.PeftModel.from_pretrained(model, adapter, is_trainable=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([dict(params=[p for p in trained if p.ndim > 1], weight_decay=0.1),
                                   dict(params=[p for p in trained if p.ndim == 1], weight_decay=0.0)],
                                  betas=(0.9, 0.95), eps=1e-8)
    rows = data.load(EXAMPLES, ChatTokenizer(directory), 256)
    sampler = data.Sampler(rows.n_inputs, epochs=3, seed=42, batch_size=8, max_steps=n_steps)
    for step in range(1, n_steps + 1):
        _, ids = sampler.step(step)
        total, n = 0, int(rows.n_targets[ids].sum())
        for i in ids:
            span = slice(rows.starts[i], rows.starts[i + 1])
            tokens, mask = torch.from_numpy(rows.tokens[span]).long(), torch.from_numpy(rows.loss_mask[span])
            losses = F.cross_entropy(model(tokens[None]).logits[0, :-1], tokens[1:], reduction="none")
            loss = losses[mask[1:]].sum() / n
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, 0.5)
        for group in optimizer.param_groups:
            group["lr"] = rates[step - 1]
        optimizer.step()
        optimizer.zero_grad()
        yield total


@pytest.mark.full
@pytest.mark.parametrize("scheduler", ["cosine", "linear", "constant"])
def test_ten_steps_equal_a_loop_with_transformers(scheduler, small, train):
    """Losses to 1e-5, full training; the convolution's kernel decays as a matrix does, A_log and dt_bias do not."""
    lines = train(*FAST, "--scheduler", scheduler, "--warmup_ratio", 0.25, "--max_steps", 10, "--weight_decay", 0.1,
                  "--grad_clip", 0.5, model=small)
    rates = [line["lr"] for line in lines]
    for line, loss in zip(lines, reference_losses(small, 10, rates), strict=True):
        assert math.isclose(line["loss"], loss, rel_tol=1e-5), (line, loss)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1


# ---- adapters -----------------------------------------------------------------------------------------------------


def peft_model(directory, adapter):
    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), adapter)


@pytest.mark.full
def test_adapters_go_to_peft_and_come_from_it(small, train, tmp_path):
    """all-linear matches peft's layers; logits of a trained adapter in peft; losses from an adapter that peft made."""
    tokens = random_ids(80)
    train(*FAST, "--use_lora", "--max_steps", 2, "--lr", 1e-2, model=small)
    step = tmp_path / "out" / "checkpoints" / "step_2"
    net, _, _ = chat.load(str(step))
    with torch.no_grad():
        logits = net(tokens, Documents.of((80,)))
        expected = peft_model(small, step).eval()(tokens[None]).logits[0]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    made = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32), peft.LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False))
    made.save_pretrained(tmp_path / "adapter")
    ours, theirs = (set(load_file(d / "adapter_model.safetensors")) for d in (step, tmp_path / "adapter"))
    assert ours == theirs and any("in_proj_a" in name for name in ours)
    lines = train(*FAST, "--use_lora", "--resume_adapter", tmp_path / "adapter", "--max_steps", 3,
                  "--weight_decay", 0.1, "--grad_clip", 0.5, "--scheduler", "constant",
                  "--warmup_ratio", 0, out="again", model=small)
    for line, loss in zip(lines, reference_losses(small, 3, [1e-3] * 3, tmp_path / "adapter"), strict=True):
        assert math.isclose(line["loss"], loss, rel_tol=1e-5)


def test_lora_on_the_projections_of_linear_attention(small):
    """A name of a layer chooses it in all gated delta nets."""
    net = loaded(small)
    cfg = sft.Config(use_lora=True, model="base", lora_targets="in_proj_qkv,in_proj_z")
    lora.inject(net, *peft_config.new(net, cfg))
    adapted = {name.rpartition(".lora_A")[0] for name, _ in net.named_parameters() if ".lora_A." in name}
    assert adapted == {f"model.layers.{i}.linear_attn.in_proj_{name}" for i in (0, 1, 2) for name in ("qkv", "z")}


@pytest.mark.full
def test_nf4_stores_all_linear_layers(small):
    """A model in 4 bits computes what its dequantised weights compute; convolution and norms stay as they are."""
    net, plain, tokens = loaded(small), loaded(small), random_ids(80)
    nf4.quantize_linears(net)
    stored = {name: m for name, m in net.named_modules() if isinstance(m, nf4.NF4Weight)}
    linears = {name: m for name, m in plain.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"}
    assert set(stored) == set(linears) and len(stored) == 3 * 5 + 4 + 4 * 3
    for name, module in stored.items():
        weight = linears[name].weight.data
        module.quantize_rows(module.weight.data, weight.clone())
        storage = nf4.views(module.weight.data.view(torch.uint8), module.in_features)
        weight.copy_(nf4.dequantize(storage, torch.float32, 0, len(weight))[:, : module.in_features])
    with torch.no_grad():
        expected = plain(tokens, Documents.of((80,)))
        torch.testing.assert_close(net(tokens, Documents.of((80,))), expected, atol=1e-4, rtol=1e-4)


# ---- the trainer --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(small, tmp_path_factory):
    """Four runs of four steps, by one launcher: one rank, two ranks, and one rank stopped after two and resumed."""
    directory = tmp_path_factory.mktemp("runs")
    flags = ("--model", small, "--train_data", EXAMPLES, *FAST, "--max_steps", 4, "--save_steps", 2)
    run_all([(1, (*flags, "--output_dir", "one")), (2, (*flags, "--output_dir", "two")),
             (1, (*flags, "--output_dir", "again", "--resume_from", "one/checkpoints/step_2"))], directory)
    return directory


@pytest.mark.full
def test_a_resumed_run_is_bitwise_the_same(runs):
    lines, again = metrics(runs / "one"), metrics(runs / "again")
    assert [line["loss"] for line in again][-2:] == [line["loss"] for line in lines][-2:]
    one, other = (tensors_of(runs / name / "checkpoints" / "step_4") for name in ("one", "again"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.full
def test_two_ranks_have_the_losses_of_one(runs):
    for one, two in zip(metrics(runs / "one"), metrics(runs / "two"), strict=True):
        assert math.isclose(one["loss"], two["loss"], rel_tol=1e-5)
        assert math.isclose(one["grad_norm"], two["grad_norm"], rel_tol=1e-4)


@pytest.mark.full
def test_a_saved_step_loads_with_transformers(runs):
    """With the logits of our own model; A_log, dt_bias and the convolution have changed."""
    step, tokens = runs / "one" / "checkpoints" / "step_4", random_ids(70)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(step, dtype=torch.float32)(tokens[None]).logits[0]
        torch.testing.assert_close(loaded(step)(tokens, Documents.of((70,))), expected, atol=1e-4, rtol=1e-4)
    before, after = (tensors_of(runs / "one" / "checkpoints" / name) for name in ("step_2", "step_4"))
    for name in ("A_log", "dt_bias", "conv1d.weight", "in_proj_a.weight", "norm.weight"):
        name = f"model.layers.0.linear_attn.{name}"
        assert not torch.equal(before[name], after[name]), name


PACKINGS = ((30, 40), (20, 33, 50, 7), (9,) * 11, (100, 60, 3), (200, 17), (64,) * 5, (300,))


@pytest.mark.full
@pytest.mark.parametrize("use_lora", [False, True])
def test_compiled_blocks_are_one_graph_of_each_kind(use_lora, monkeypatch):
    """No graph break inside blocks and no compilation after the first step, and losses as in eager."""
    torch._dynamo.reset()
    counters.clear()
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: compile_(*a, **{**k, "backend": "aot_eager"}))
    varlen_helpers.use(monkeypatch, varlen_helpers.varlen_attn_2_13)
    config = ModelConfig.from_dict(SIZES)
    nets = []
    for compiled in (True, False):
        torch.manual_seed(0)
        net = causal_lm(config)(config, 1, compiled)
        if use_lora:
            lora.inject(net, *peft_config.new(net, sft.Config(use_lora=True, model="base")))
        with torch.no_grad():
            for p in net.parameters():
                p.normal_(0.0, 0.1)
        nets.append(net)
    for lengths in PACKINGS:
        tokens = random_ids(sum(lengths))
        losses = [model_loss(net, tokens, lengths, tokens.roll(-1)) for net in nets]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
        for loss in losses:
            loss.backward()
        grads = [net.model.layers[0].linear_attn.in_proj_qkv for net in nets]
        grads = [(m.lora_A.weight if use_lora else m.weight).grad for m in grads]
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5 * grads[1].abs().max().item())
        assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    torch._dynamo.reset()
    attention.varlen_attention.cache_clear()


@pytest.mark.full
@pytest.mark.parametrize("settings", [dict(dtype="bf16"), dict(dtype="bf16", use_lora=True, quantize="nf4")], ids=str)
def test_a_step_runs_on_meta(small, settings):
    """Forward, backward, norm and update: the host waits for no value of the device."""
    meta = torch.device("meta")
    cfg = sft.Config(model=str(small), batch_size=8, max_length=256, **settings)
    ranks = processes.single_process(meta)
    net, _ = sft.build(cfg, ModelPaths.find(str(small)), ranks)
    optimizer = optim.build(optim.AdamW, optim.parameter_groups(net, 0.1), lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    rows = data.load(EXAMPLES, ChatTokenizer(small), 256)
    batches = list(sft.micro_batches(rows, np.arange(8), cfg, ranks))
    loss = sft.backward(net, batches, 1000, ranks)
    optim.update(optimizer, ranks.all_reduce(loss), fsdp.grad_norm(net), lr=1e-3, grad_clip=1.0)
    assert all(p.grad is None for p in net.parameters())


# ---- memory, and what is refused ----------------------------------------------------------------------------------


def published_0_8b():
    """config.json of Qwen3.5-0.8B's text model, as derived models have it on the hub."""
    return dict(model_type="qwen3_5_text", vocab_size=248320, hidden_size=1024, intermediate_size=3584,
                num_hidden_layers=24, num_attention_heads=8, num_key_value_heads=2, head_dim=256, rms_norm_eps=1e-6,
                linear_num_key_heads=16, linear_num_value_heads=16, linear_key_head_dim=128, attn_output_gate=True,
                linear_value_head_dim=128, linear_conv_kernel_dim=4, tie_word_embeddings=True, mlp_only_layers=[],
                full_attention_interval=4, max_position_embeddings=262144, mamba_ssm_dtype="float32",
                rope_parameters=dict(mrope_interleaved=True, mrope_section=[11, 11, 10], rope_type="default",
                                     rope_theta=1e7, partial_rotary_factor=0.25))


@pytest.mark.parametrize("bf16", [False, True])
def test_a_gated_delta_net_keeps_at_most_twice_what_attention_keeps(bf16):
    """Of the shape of Qwen3.5-0.8B, and without the MLP, which both have."""
    config = ModelConfig.from_dict(published_0_8b())
    with torch.device("meta"):
        net = causal_lm(config)(config)
        mlp = net.model.layers[0].mlp
    assert sum(p.numel() for p in net.parameters()) == 752_393_024
    linear, *_, attention = activations.measure(net, bf16=bf16, fused_norms=True)[:4]
    width = 2 if bf16 else 4
    of_mlp = (config.hidden_size + 4 * config.intermediate_size) * width
    assert mlp.up_proj.weight.shape == (3584, 1024)
    assert linear - of_mlp < 2 * (attention - of_mlp)


@pytest.mark.full
@pytest.mark.parametrize("flags", [(), ("--no-gradient_checkpointing",), ("--use_lora",)])
def test_the_plan_is_within_10_percent_of_the_allocators_peak(flags, train, tmp_path, monkeypatch):
    """With the proportions of the published sizes. What backward of the rule allocates for itself is not planned."""
    published(tmp_path / "m", hidden_size=128, intermediate_size=448, num_hidden_layers=8, head_dim=32,
              linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=64, linear_value_head_dim=64)
    (tmp_path / "rows.json").write_text(json.dumps([{"messages": messages("q", "a", "Go on.", "the " * 512)}] * 6))
    arguments = ("--train_data", tmp_path / "rows.json", "--max_length", 512, "--batch_size", 1, *flags)
    for name in ("save", "prune"):
        monkeypatch.setattr(checkpoint, name, lambda *args, **kwargs: None)
    monkeypatch.setattr(memory, "tune_malloc", lambda **kwargs: None)
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        train(*arguments, "--max_steps", 3, model=tmp_path / "m")
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    events = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    sizes = [e["args"]["Total Allocated"] for e in events]
    runs = []
    monkeypatch.setattr(plan, "lines", lambda run, **options: runs.append(run) or ())
    plan.plan(parse(plan.Config, [str(f) for f in ("--model", tmp_path / "m", *arguments)])[0])
    planned = forecast.memory(runs[0])
    assert math.isclose(planned["device"] - planned["slack"], max(sizes) - sizes[0], rel_tol=0.1)


@pytest.mark.parametrize("change, message", [
    (dict(attn_output_gate=False), "attn_output_gate is False"),
    (dict(mlp_only_layers=[1]), "mlp_only_layers"),
    (dict(layer_types=["linear_attention", "sliding_attention"] * 2), "linear_attention or full_attention"),
    (dict(linear_num_value_heads=3), "linear_num_value_heads 3 must be a multiple of linear_num_key_heads 2"),
    (dict(linear_conv_kernel_dim=0), "linear_conv_kernel_dim is 0"),
    (dict(linear_key_head_dim="8"), "linear_key_head_dim is '8'"),
    (dict(full_attention_interval=0), "full_attention_interval is 0"),
    (dict(hidden_act="gelu"), "hidden_act is 'gelu'"),
    (dict(model_type="qwen3_5_moe_text"), "a mixture of experts"),
    (dict(model_type="qwen3_5_moe"), "a mixture of experts"),
    (dict(num_experts=8), "a mixture of experts")])
def test_what_is_not_supported_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        config = ModelConfig.from_dict({**SIZES, **change})
        with torch.device("meta"):
            causal_lm(config)(config)


def test_tensor_parallelism_is_refused_with_the_reason():
    config = ModelConfig.from_dict(SIZES)
    with torch.device("meta"):
        net = causal_lm(config)(config)
    with pytest.raises(UserError, match="gated delta nets"):
        tp.split(net, SimpleNamespace(size=lambda: 2))


def test_missing_keys_have_the_defaults_of_transformers(tmp_path):
    """The layers of a config.json with sizes only, and those that transformers writes for it."""
    least = {k: SIZES[k] for k in ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                   "num_attention_heads")}
    AutoConfig.for_model(**least).save_pretrained(tmp_path)
    configs = [ModelConfig.from_dict(c) for c in (least, json.loads((tmp_path / "config.json").read_text()))]
    with torch.device("meta"):
        ours, theirs = ({n: p.shape for n, p in causal_lm(c)(c).named_parameters()} for c in configs)
        oracle = AutoModelForCausalLM.from_config(AutoConfig.for_model(**least))
    assert ours == theirs == {n: p.shape for n, p in oracle.named_parameters()}
    assert configs[0].ropes == configs[1].ropes and len(configs[0].ropes[0].frequencies) == 32
