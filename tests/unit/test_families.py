"""The matrix: each model family under the laws of one rank; with --full on two ranks, compiled, and killed.

A new family is one line in FAMILY_CASES. What is special in its config.json has its tests in test_model.py.
"""

import filecmp
import json
import math
import os
import random
import shutil

import numpy as np
import peft
import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
import varlen_helpers
from helpers import LAYOUTS, TINY, metrics, model_loss, published, run_all, tensors_of, write
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import chat
import data
import sft
from disk.run import ModelPaths
from families.config import FAMILIES, ModelConfig
from families.registry import causal_lm
from model import generate
from ops import attention, nf4
from ops.attention import Documents
from ranks import processes
from text.template import ChatTokenizer

full = pytest.mark.full
SIZES = dict(vocab_size=2048, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=512, rms_norm_eps=1e-5, eos_token_id=None, pad_token_id=0,
             bos_token_id=0)
YARN = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=16)
WINDOW = ["sliding_attention", "full_attention"]

# name -> what its config.json has beside SIZES: a small model in which everything that the family has is on
FAMILY_CASES = {
    "qwen2": dict(model_type="qwen2", rope_theta=1e6, tie_word_embeddings=True, rope_scaling=YARN),
    "qwen3": dict(model_type="qwen3", head_dim=16),
    "llama": dict(model_type="llama", attention_bias=True, mlp_bias=True),
    "mistral": dict(model_type="mistral", sliding_window=12),
    "ministral": dict(model_type="ministral", sliding_window=12, head_dim=16, layer_types=WINDOW),
    "smollm3": dict(model_type="smollm3", no_rope_layers=[0, 1], rope_theta=1e6, tie_word_embeddings=True),
    "granite": dict(model_type="granite", embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.3,
                    logits_scaling=8.0, tie_word_embeddings=True),
    "granite4": dict(model_type="granitemoehybrid", embedding_multiplier=12.0, residual_multiplier=0.22,
                     attention_multiplier=0.3, logits_scaling=8.0, tie_word_embeddings=True, num_local_experts=0,
                     shared_intermediate_size=48, position_embedding_type="rope", layer_types=["attention"] * 2,
                     mamba_n_heads=8, mamba_d_state=16),
    "seed_oss": dict(model_type="seed_oss", attention_dropout=0.0, residual_dropout=0.0, head_dim=16,
                     attention_out_bias=False),
    "internlm3": dict(model_type="internlm3", head_dim=16, qkv_bias=True, bias=True),
    "iquestcoder": dict(model_type="iquestcoder", head_dim=16),
    "olmo2": dict(model_type="olmo2", num_key_value_heads=4),
    "olmo3": dict(model_type="olmo3", sliding_window=12, layer_types=WINDOW, rope_theta=5e5, rope_scaling=YARN),
    "phi3": dict(model_type="phi3", sliding_window=12),
    "phi4-mini": dict(model_type="phi3", partial_rotary_factor=0.75, tie_word_embeddings=True,
                      original_max_position_embeddings=40, rope_scaling=dict(
                          rope_type="longrope", short_factor=[1.0, 1.1, 1.2], long_factor=[1.0, 2.0, 5.0])),
    "ministral3": dict(model_type="ministral3", head_dim=16, rope_parameters={
        **YARN, "rope_theta": 1e6, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}),
    "gemma2": dict(model_type="gemma2", head_dim=16, query_pre_attn_scalar=24, attn_logit_softcapping=2.0,
                   final_logit_softcapping=3.0, sliding_window=12),
    "gemma3": dict(model_type="gemma3_text", head_dim=16, query_pre_attn_scalar=24, layer_types=WINDOW, sliding_window=12,
                   rope_theta=5e5, rope_local_base_freq=5e3, rope_scaling=dict(rope_type="linear", factor=8.0)),
    "gemma4": dict(model_type="gemma4_text", head_dim=16, global_head_dim=24, num_global_key_value_heads=1,
                   attention_k_eq_v=True, layer_types=WINDOW, sliding_window=12, final_logit_softcapping=3.0,
                   hidden_size_per_layer_input=0, num_kv_shared_layers=0),
    "gemma4-unified": dict(model_type="gemma4_unified_text", head_dim=16, global_head_dim=24, layer_types=WINDOW,
                           sliding_window=12, tie_word_embeddings=False),
    "qwen3.5": dict(model_type="qwen3_5_text", head_dim=16, layer_types=["linear_attention", "full_attention"],
                    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
                    tie_word_embeddings=True),
}
SCHEDULES = {"cosine": 0.1, "linear": 0.0, "constant": 0.0}  # name -> --min_lr_ratio
ALL_SCHEDULES = ("olmo3",)  # with --full, these families run with each of them; the others with the first
# families whose blocks another one has too: they train with --full only
ALIKE = ("qwen3", "mistral", "ministral", "smollm3", "granite", "seed_oss", "internlm3", "iquestcoder", "olmo2", "phi3",
         "gemma2", "gemma4-unified")
TRAINING = ("--lr", 1e-3, "--batch_size", 4, "--max_length", 64, "--warmup_ratio", 0.2, "--weight_decay", 0.1,
            "--grad_clip", 0.5, "--micro_batch_size", 2)
LENGTHS = (20, 1, 45, 9, 41)  # some beyond the windows and original lengths, some not


@pytest.mark.repo
def test_each_family_is_in_the_matrix():
    """A family that is not has no proof."""
    assert {case["model_type"] for case in FAMILY_CASES.values()} == {*FAMILIES}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A file with conversations of about 20 to 60 tokens."""
    words, rng = "one two three four five six seven eight nine ten red green blue".split(), random.Random(0)
    made = [{"prompt": " ".join(rng.choices(words, k=rng.randint(1, 8))),
             "response": " ".join(rng.choices(words, k=rng.randint(1, 16)))} for _ in range(24)]
    return write(tmp_path_factory.mktemp("rows") / "rows.json", made)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A function: name of a family -> its model directory, written by transformers, with models/tiny's tokenizer."""
    root, made = tmp_path_factory.mktemp("families"), {}

    def directory(name):
        if name not in made:
            made[name] = root / name
            published(made[name], {**SIZES, **FAMILY_CASES[name]})
            tensors = load_file(made[name] / "model.safetensors")
            for key, tensor in tensors.items():  # smaller than published() makes them: ten steps are no chaos
                tensor.mul_(1 if "norm" in key else 0.4)
            save_file(tensors, made[name] / "model.safetensors", {"format": "pt"})
            for file in os.listdir(TINY):
                if file.startswith("tokenizer"):
                    shutil.copy(os.path.join(TINY, file), made[name])
        return made[name]

    return directory


@pytest.fixture(scope="module", params=FAMILY_CASES)
def family(request, directories):
    """(name, directory) of each family in turn: all tests of one, then those of the next."""
    return request.param, directories(request.param)


def oracle_of(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


def ours(directory):
    """The directory's model, loaded as chat.py does it."""
    return chat.load(str(directory), None)[0]


def built(directory, device="cpu", **settings):
    """The directory's model as train() builds it."""
    cfg = sft.Config(model=str(directory), **settings)
    return sft.build(cfg, ModelPaths.find(str(directory)), processes.single_process(torch.device(device)))[0]


def tokens_of(n, seed=1):
    return torch.randint(SIZES["vocab_size"], (n,), generator=torch.Generator().manual_seed(seed))


# ---- one rank -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_logits_and_generation_equal_transformers(family):
    """Packed, alone, and token by token with the cache, from a short prompt past each window and original length."""
    _, directory = family
    oracle, net = oracle_of(directory), ours(directory)
    tokens = tokens_of(sum(LENGTHS))
    expected = torch.cat([oracle(part[None]).logits[0] for part in tokens.split(LENGTHS)])
    alone = torch.cat([net(part, Documents.of((len(part),))) for part in tokens.split(LENGTHS)])
    torch.testing.assert_close(alone, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(net(tokens, Documents.of(LENGTHS)), expected, atol=1e-4, rtol=1e-4)
    prompt, logits = tokens[:30], []
    theirs = oracle.generate(prompt[None], max_new_tokens=16, do_sample=False, pad_token_id=0, output_logits=True,
                             attention_mask=torch.ones(1, 30, dtype=torch.long), return_dict_in_generate=True)

    def greedy(of_token):
        logits.append(of_token.clone())
        return int(of_token.argmax())

    assert list(generate(net, prompt.tolist(), 16, eos_ids=(), sample=greedy)) == theirs.sequences[0, 30:].tolist()
    torch.testing.assert_close(torch.stack(logits), torch.cat(theirs.logits), atol=1e-4, rtol=1e-4)


def reference_losses(directory, rows, schedule):
    """[(loss, norm of the gradient), ...] of ten steps with transformers' model and torch's AdamW, one conversation
    after another, each up to its last target."""
    dataset = data.load(rows, ChatTokenizer(str(directory)), 64)
    model = oracle_of(directory)
    groups = [{"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
              {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    sampler, found = data.Sampler(dataset.n_inputs, epochs=3, seed=42, batch_size=4), []
    for step in range(1, 11):
        total, n_targets = 0.0, 0
        for i in sampler.step(step).ids:
            part = slice(dataset.starts[i], dataset.starts[i] + dataset.n_inputs[i] + 1)
            tokens = torch.tensor(np.array(dataset.tokens[part], dtype=np.int64))
            is_target = torch.tensor(np.array(dataset.loss_mask[part], dtype=bool))[1:]
            logits = model(tokens[None, :-1]).logits[0][is_target]
            total = total + F.cross_entropy(logits, tokens[1:][is_target], reduction="sum")
            n_targets += int(is_target.sum())
        loss = total / n_targets
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        progress, low = (step - 3) / 8, 1e-3 * SCHEDULES[schedule]
        after = {"cosine": low + (1e-3 - low) * (1 + math.cos(math.pi * progress)) / 2,
                 "linear": 1e-3 + (low - 1e-3) * progress, "constant": 1e-3}[schedule]
        for group in optimizer.param_groups:
            group["lr"] = after if step > 2 else 1e-3 * step / 2
        optimizer.step()
        optimizer.zero_grad()
        found.append((loss.item(), norm.item()))
    return found


def test_ten_steps_equal_transformers_and_resume_to_the_bit(family, rows, train, tmp_path, pytestconfig):
    """Losses to 1e-5. Continued from its fifth step, the run writes the same bytes. The directory of the last step is
    one that transformers loads, with all tensors."""
    name, directory = family
    if name in ALIKE and not pytestconfig.getoption("--full"):
        pytest.skip("--full")
    for schedule in SCHEDULES if name in ALL_SCHEDULES and pytestconfig.getoption("--full") else ["cosine"]:
        flags = (*TRAINING, "--scheduler", schedule, "--max_steps", 10, "--save_steps", 5, "--train_data", rows)
        if schedule != "constant":
            flags = (*flags, "--min_lr_ratio", SCHEDULES[schedule])
        lines = train(*flags, model=directory, out=schedule)
        for line, (loss, norm) in zip(lines, reference_losses(directory, rows, schedule), strict=True):
            assert math.isclose(line["loss"], loss, rel_tol=1e-5), (schedule, line, loss)
            assert math.isclose(line["grad_norm"], norm, rel_tol=1e-4), (schedule, line, norm)
    assert lines[-1]["loss"] < lines[0]["loss"]
    train(*flags, "--resume_from", tmp_path / schedule / "checkpoints" / "step_5", model=directory, out="resumed")
    for file in ("model.safetensors", "training_state/tensors.safetensors"):
        assert filecmp.cmp(*(tmp_path / out / "checkpoints" / "step_10" / file for out in (schedule, "resumed")), False)
    step = tmp_path / schedule / "checkpoints" / "step_10"
    _, info = AutoModelForCausalLM.from_pretrained(step, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokens = tokens_of(30)
    with torch.no_grad():
        logits = ours(step)(tokens, Documents.of((30,)))
        torch.testing.assert_close(logits, oracle_of(step)(tokens[None]).logits[0], atol=1e-4, rtol=1e-4)


def test_adapters_go_to_peft_and_back(family, rows, train, tmp_path, pytestconfig):
    """all-linear adapts the layers that PEFT adapts. Our adapter in PEFT, and PEFT's here, have the same logits."""
    name, directory = family
    if name in ALIKE and not pytestconfig.getoption("--full"):
        pytest.skip("--full")
    torch.manual_seed(3)
    made = peft.get_peft_model(oracle_of(directory), peft.LoraConfig(
        r=2, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    made.save_pretrained(tmp_path / "theirs")
    fresh = {name for name, _ in built(directory, use_lora=True, lora_rank=2).named_parameters() if ".lora_" in name}
    train("--use_lora", "--resume_adapter", tmp_path / "theirs", "--max_steps", 2, *TRAINING, "--train_data", rows,
          model=directory)
    step = tmp_path / "out" / "checkpoints" / "step_2"
    names = [{*load_file(path / "adapter_model.safetensors")} for path in (tmp_path / "theirs", step)]
    assert names[0] == names[1] == {f"base_model.model.{name}" for name in fresh} and len(fresh) >= 2 * 4 * 2
    tokens = tokens_of(30)
    with torch.no_grad():
        before = chat.load(str(tmp_path / "theirs"), str(directory))[0](tokens, Documents.of((30,)))
        torch.testing.assert_close(before, made(tokens[None]).logits[0], atol=1e-4, rtol=1e-4)
        trained = chat.load(str(step), str(directory))[0](tokens, Documents.of((30,)))
        theirs = peft.PeftModel.from_pretrained(oracle_of(directory), step).eval()(tokens[None]).logits[0]
        torch.testing.assert_close(trained, theirs, atol=1e-4, rtol=1e-4)
        assert (trained - before).abs().max() > 1e-3


@torch.no_grad()
def test_nf4_stores_each_matrix_but_embedding_and_head(family):
    """The logits are those of the model whose matrices are rounded to NF4: all that all-linear adapts."""
    _, directory = family
    quantised = built(directory, use_lora=True, quantize="nf4")
    plain, tokens = ours(directory), tokens_of(30)
    exact = plain(tokens, Documents.of((30,)))
    for name, module in plain.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            storage = nf4.views(nf4.empty(module.out_features, module.in_features, "cpu"), module.in_features)
            nf4.quantize_(storage, module.weight)
            rounded = nf4.dequantize(storage, torch.float32, 0, module.out_features, module.in_features)
            module.weight.copy_(rounded)
    expected, found = (net(tokens, Documents.of((30,))) for net in (plain, quantised))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (exact - expected).abs().max() > 1e-3
    stored = {name for name, module in quantised.named_modules() if isinstance(module, nf4.NF4Weight)}
    assert stored == {name.rpartition(".lora_A")[0] for name, _ in quantised.named_parameters() if ".lora_A." in name}


@pytest.mark.parametrize("settings", [
    dict(dtype="bf16"), pytest.param(dict(dtype="bf16", use_lora=True, quantize="nf4"), marks=full)],
    ids=["full", "qlora"])
def test_a_step_runs_on_meta(family, rows, settings):
    """Where there are no values, so the host can wait for none: law 11 of the design."""
    _, directory = family
    nf4.pairs(torch.device("meta"))
    model, ranks = built(directory, "meta", **settings), processes.single_process(torch.device("meta"))
    cfg = sft.Config(model=str(directory), max_length=64, micro_batch_size=2)
    dataset = data.load(rows, ChatTokenizer(str(directory)), 64)
    batches = list(sft.micro_batches(dataset, np.arange(8), cfg, ranks))
    loss = sft.backward(model, batches, 100, ranks)
    assert len(batches) > 1 and loss.device.type == "meta"
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[full] * (name != "qwen3.5")) for name in FAMILY_CASES])
def test_selfcheck_passes(name, directories, rows, train, capsys):
    """Gradients do not depend on the layout; of Qwen3.5, those of A_log are so small that they are mostly rounding."""
    with pytest.raises(FileNotFoundError):  # it writes no metrics
        train("--selfcheck", *TRAINING, "--train_data", rows, model=directories(name))
    assert "selfcheck: ok" in capsys.readouterr().out


# ---- --full: compiled, many ranks, killed -------------------------------------------------------------------------


@full
@pytest.mark.parametrize("name", FAMILY_CASES)
def test_compiled_blocks_have_no_graph_break(name, monkeypatch, directories, request):
    """One graph for each kind of layer, for all packings; loss and gradients are those without the compiler."""
    from torch._dynamo.utils import counters

    varlen_helpers.use(monkeypatch, varlen_helpers.varlen_attn_2_13)  # elsewhere than on CUDA, attention is a break
    request.addfinalizer(attention.varlen_attention.cache_clear)
    monkeypatch.setattr(torch, "compile", lambda *args, **kw: compile_(*args, **{**kw, "backend": "aot_eager"}))
    torch._dynamo.reset()
    counters.clear()
    config = ModelConfig.from_dict(json.loads((directories(name) / "config.json").read_text()))
    nets = [causal_lm(config)(config, 1, compiled) for compiled in (True, False)]
    for net in nets:
        torch.manual_seed(0)
        for key, p in net.named_parameters():
            torch.nn.init.normal_(p, 1.0 if "norm" in key else 0.0, 0.1)
    graphs = []
    for lengths in ((30, 9, 9, 9, 9), (20, 33, 50, 7), (9,) * 11):
        tokens = tokens_of(sum(lengths))
        losses = [model_loss(net, tokens, lengths, tokens.roll(-1)) for net in nets]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(*losses)
        graphs.append(counters["stats"]["unique_graphs"])
    for one, other in zip(*([p for p in net.parameters() if p.requires_grad] for net in nets), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-4 * other.grad.abs().max().item(), rtol=1e-3)
    kinds = {(config.layer_types[i], config.ropes[i] is None) for i in range(config.num_hidden_layers)}
    assert not counters["graph_break"] and graphs[0] == graphs[2] <= 2 * len(kinds), graphs


compile_ = torch.compile


@full
@pytest.mark.parametrize("layout", ["dp2", "tp2"])
def test_two_ranks(layout, directories, rows, train, tmp_path):
    """One pair of ranks takes all families in turn: losses are those of one rank, to 1e-5. Families that refuse tp are
    not run with it."""
    ranks, flags = LAYOUTS[layout]
    common = (*TRAINING, "--max_steps", 4, "--train_data", rows, "--timeout", 60)
    names = [name for name in FAMILY_CASES if layout != "tp2" or not FAMILIES[FAMILY_CASES[name]["model_type"]].no_tp]
    run_all([(ranks, (*common, *flags, "--model", directories(name), "--output_dir", tmp_path / name))
             for name in names], tmp_path)
    for name in names:
        one = train(*common, model=directories(name), out=f"{name} alone")
        for a, b in zip(one, metrics(tmp_path / name), strict=True):
            assert math.isclose(a["loss"], b["loss"], rel_tol=1e-5), (name, a, b)
            assert math.isclose(a["grad_norm"], b["grad_norm"], rel_tol=1e-4), (name, a, b)
        steps = [tmp_path / out / "checkpoints" / "step_4" for out in (f"{name} alone", name)]
        a, b = map(tensors_of, steps)
        assert set(a) == set(b)


@full
@pytest.mark.parametrize("name", ["olmo3", "phi4-mini", "ministral3"])
def test_a_killed_run_of_two_ranks_resumes_to_the_bit(name, directories, rows, tmp_path):
    """Stopped after step 2 of 4, as after a kill: the run goes on from the last checkpoint."""
    common = (*TRAINING, "--max_steps", 4, "--save_steps", 2, "--train_data", rows, "--model", directories(name))
    run_all([(2, (*common, "--output_dir", tmp_path / "straight"))], tmp_path)
    shutil.copytree(tmp_path / "straight", tmp_path / "killed", symlinks=True)
    killed = tmp_path / "killed" / "checkpoints"
    shutil.rmtree(killed / "step_4")
    (killed / "latest").unlink()
    (killed / "latest").symlink_to("step_2")
    run_all([(2, (*common, "--output_dir", tmp_path / "killed", "--resume_from", "auto"))], tmp_path)
    for file in sorted(p.relative_to(killed) for p in (killed / "step_4").rglob("*.safetensors")):
        assert filecmp.cmp(killed / file, tmp_path / "straight" / "checkpoints" / file, False), file


def test_which_families_refuse_tp():
    """Where matrices are fused, or a norm is over all heads, a rank's slice would compute something else."""
    refused = {name for name, case in FAMILY_CASES.items() if FAMILIES[case["model_type"]].no_tp}
    assert {"olmo2", "olmo3", "phi3", "phi4-mini"} <= refused
    assert not refused & {"qwen2", "qwen3", "llama", "mistral", "ministral", "smollm3", "granite", "seed_oss", "internlm3",
                          "iquestcoder", "ministral3"}


# --plan within 10 % of what a step needs, for each family: tests/unit/test_forecast.py reads FAMILY_CASES.
