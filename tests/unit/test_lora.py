"""LoRA against peft: logits, files, gradients on any layout, exact resume, frozen bases, merging, errors."""

import json
import math
import os
import re
import shutil
import sys
import weakref

import peft
import pytest
import torch
import transformers
from helpers import EXAMPLES, LAYOUTS, TINY, metrics, model_loss, run_all, two_layers
from safetensors.torch import load_file, save_file

import chat
import data
import lora
import sft
from disk import checkpoint, files, pretrained
from disk import peft as peft_config
from families.config import ModelConfig
from ops import nf4, optim
from settings import errors
from text.template import ChatTokenizer
from tools import merge as merging

TOKENS = torch.arange(40) % 37 + 5


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """tied: qwen2 with biases, bf16 on the disk. untied: qwen3 with q/k norm, in fp32. biased: llama with a bias in each
    layer. Their weights are large enough for attention to matter: where queries and keys have gradients of 1e-8, Adam
    makes steps of rounding errors."""
    return {"tied": two_layers(tmp_path_factory.mktemp("tied"), 0.1), "untied": two_layers(
        tmp_path_factory.mktemp("untied"), 0.1, model_type="qwen3", num_key_value_heads=4, head_dim=32,
        tie_word_embeddings=False), "biased": two_layers(
        tmp_path_factory.mktemp("biased"), 0.1, model_type="llama", attention_bias=True, mlp_bias=True)}


def load_base(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def peft_logits(base, adapter):
    model = peft.PeftModel.from_pretrained(load_base(base), adapter).eval()
    with torch.no_grad():
        return model(TOKENS[None]).logits[0]


def our_logits(directory, base=None):
    model, _, _ = chat.load(str(directory), base and str(base))
    with torch.no_grad():
        return model(TOKENS, (len(TOKENS),))


def randomise(directory, scale=0.1):
    """Give every tensor of an adapter directory values that show in the logits."""
    path = os.path.join(directory, "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(7)
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if "magnitude" in name:
            tensor.mul_(torch.empty_like(tensor).uniform_(0.5, 1.5, generator=generator))
        elif ".lora_" in name:
            tensor.normal_(std=scale, generator=generator)
    save_file(tensors, path, {"format": "pt"})


def peft_adapter(base, directory, **settings):
    """An adapter that peft made for `base`, with random values."""
    torch.manual_seed(3)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM",
                                **settings})
    model = peft.get_peft_model(load_base(base), config)
    model.save_pretrained(directory)
    randomise(directory)
    return directory


SHAPES = {
    "plain": (), "wide": ("--lora_rank", 16, "--lora_alpha", 4), "rs": ("--lora_rs",), "dora": ("--lora_dora",),
    "names": ("--lora_targets", "q_proj,layers.1.mlp.up_proj"), "regex": ("--lora_targets", r".*\.1\..*(v|o)_proj"),
    "whole": ("--lora_modules_to_save", "embed_tokens"), "dora_rs": ("--lora_dora", "--lora_rs", "--lora_rank", 4),
}


@pytest.mark.parametrize("model", ["tied", "untied"])
@pytest.mark.parametrize("shape", SHAPES)
def test_peft_computes_what_we_do(shape, model, models, train, tmp_path):
    """A saved step is a PEFT adapter: PeftModel's logits equal ours to 1e-5, and are not the base's."""
    train("--use_lora", "--max_steps", 3, "--lr", 1e-2, *SHAPES[shape], model=models[model])
    step = tmp_path / "out" / "checkpoints" / "step_3"
    ours, theirs = our_logits(step), peft_logits(models[model], step)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert (ours - our_logits(models[model])).abs().max() > 1e-3
    config = files.read_json(step / "adapter_config.json")
    assert config["base_model_name_or_path"] == str(models[model]) and config["bias"] == "none"
    assert (config["peft_type"], config["task_type"]) == ("LORA", "CAUSAL_LM")
    whole = {"tied": ["embed_tokens", "lm_head"], "untied": ["embed_tokens"]}[model]
    assert config["modules_to_save"] == (whole if shape == "whole" else None)
    assert not (step / "model.safetensors").exists() and (step / "tokenizer.json").exists()


PEFT_MADE = {
    "plain": {}, "ranks": {"rank_pattern": {"q_proj": 2, "1.mlp.up_proj": 8}, "alpha_pattern": {"v_proj": 32}},
    "rs": {"use_rslora": True, "r": 9}, "dora": {"use_dora": True, "alpha_pattern": {"layers.0.mlp.*": 3}},
    "subset": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    "regex": {"target_modules": r".*mlp\.(up|gate)_proj"}, "excluded": {"exclude_modules": ["k_proj"]},
    "whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize("made", PEFT_MADE)
def test_adapters_that_peft_made(made, models, train, tmp_path):
    """They load in chat.py and with --resume_adapter, which trains on from them and keeps their settings."""
    base = models["untied"]
    adapter = peft_adapter(base, tmp_path / "theirs", **PEFT_MADE[made])
    theirs = peft_logits(base, adapter)
    assert (theirs - our_logits(base)).abs().max() > 1e-2
    torch.testing.assert_close(our_logits(adapter, base), theirs, atol=1e-5, rtol=1e-5)
    train("--use_lora", "--resume_adapter", adapter, "--max_steps", 1, "--lr", 0, "--weight_decay", 0, model=base)
    again = tmp_path / "out" / "checkpoints" / "step_1"
    before, after = (load_file(d / "adapter_model.safetensors") for d in (adapter, again))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    torch.testing.assert_close(peft_logits(base, again), theirs, atol=1e-6, rtol=1e-6)


def test_training_goes_the_way_of_peft(models, train, tmp_path):
    """Four steps from one adapter: losses equal those of peft's model under torch's AdamW, 1e-5, DoRA included."""
    for name, settings in {"plain": {}, "dora": {"use_dora": True}}.items():
        adapter = peft_adapter(models["untied"], tmp_path / name, **settings)
        lines = train("--use_lora", "--resume_adapter", adapter, "--max_steps", 4, "--lr", 1e-3, "--scheduler",
                      "constant", "--warmup_ratio", 0, "--grad_clip", 0, out=f"out_{name}", model=models["untied"])
        model = peft.PeftModel.from_pretrained(load_base(models["untied"]), adapter, is_trainable=True)
        matrices = [p for p in model.parameters() if p.requires_grad and p.ndim == 2]
        vectors = [p for p in model.parameters() if p.requires_grad and p.ndim == 1]
        optimizer = torch.optim.AdamW([dict(params=matrices, weight_decay=0.01), dict(params=vectors, weight_decay=0)],
                                      lr=1e-3, betas=(0.9, 0.95))
        rows = data.load(EXAMPLES, ChatTokenizer(models["untied"]), 2048)
        sampler = data.Sampler(rows.n_inputs, epochs=3, seed=42, batch_size=4, max_steps=4)
        for line in lines:
            _, ids = sampler.step(line["step"])
            total, n = 0, int(rows.n_targets[ids].sum())
            for i in ids:
                tokens = torch.from_numpy(rows.tokens[rows.starts[i] : rows.starts[i + 1]]).long()
                kept = torch.from_numpy(rows.loss_mask[rows.starts[i] : rows.starts[i + 1]])
                logits = model(tokens[None]).logits[0, :-1]
                nll = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")[kept[1:]].sum() / n
                nll.backward()
                total += nll.item()
            assert math.isclose(line["loss"], total, rel_tol=1e-5), (name, line["step"], line["loss"], total)
            optimizer.step()
            optimizer.zero_grad()


def test_frozen_is_bit_identical_and_only_adapters_are_kept(models, train, tmp_path, monkeypatch):
    """The base does not change by a bit; it has no gradient and no optimizer state, and is not in the checkpoint."""
    seen = {}
    save = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda root, step, **parts: (
        seen.update(parts), save(root, step, **parts)))
    train("--use_lora", "--max_steps", 3, "--lr", 1e-2, model=models["tied"])
    on_disk = load_file(models["tied"] / "model.safetensors")
    trained = set()
    for name, p in seen["model"].named_parameters():
        if ".lora_" in name:
            trained.add(p)
            assert p.dtype == torch.float32 and p.requires_grad
        else:
            assert torch.equal(p, on_disk[name].float()) and not p.requires_grad and p.grad is None, name
    assert {p for group in seen["optimizer"].param_groups for p in group["params"]} == trained
    assert set(seen["optimizer"].state) == trained
    step = tmp_path / "out" / "checkpoints" / "step_3"
    kept = set(load_file(step / "adapter_model.safetensors"))
    assert kept == {f"base_model.model.{n}" for n, p in seen["model"].named_parameters() if ".lora_" in n}
    moments = load_file(step / "training_state" / "tensors.safetensors")
    assert len(moments) == 2 * len(kept) and all(".lora_" in name for name in moments)


@pytest.mark.parametrize("flags", [(), ("--lora_dropout", 0.3), ("--lora_dora", "--lora_plus_ratio", 4),
                                   ("--lora_modules_to_save", "lm_head", "--optimizer_offload")])
def test_resume_is_exact(flags, models, train, tmp_path):
    """Six steps straight = three, resume, three: bitwise, dropout included."""
    common = ("--use_lora", "--max_steps", 6, "--save_steps", 3, "--lr", 1e-3, *flags)
    straight = train(*common, model=models["tied"])
    resumed = train(*common, "--resume_from", tmp_path / "out" / "checkpoints" / "step_3", out="again",
                    model=models["tied"])
    keys = "step", "loss", "grad_norm", "lr", "tokens"
    assert [[line[k] for k in keys] for line in straight[3:]] == [[line[k] for k in keys] for line in resumed]
    for file in ("adapter_model.safetensors", "training_state/tensors.safetensors"):
        first, second = (load_file(tmp_path / out / "checkpoints" / "step_6" / file) for out in ("out", "again"))
        assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def test_resume_refuses_what_differs(models, train, tmp_path):
    """Another base of the same shape, other settings, or a whole model's checkpoint: one line, nothing trained."""
    common = ("--use_lora", "--max_steps", 2, "--save_steps", 1)
    train(*common, model=models["tied"])
    resume = ("--resume_from", tmp_path / "out" / "checkpoints" / "step_1")
    with pytest.raises(ValueError, match="lora_rank 8 then, 4 now"):
        train(*common, *resume, "--lora_rank", 4, out="b", model=models["tied"])
    other = shutil.copytree(models["tied"], tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="was made with other data or settings .*base"):
        train(*common, *resume, out="b", model=other)
    with pytest.raises(ValueError, match="is a LoRA adapter, not a full model; add --use_lora"):
        train("--max_steps", 2, *resume, out="b", model=models["tied"])
    train("--max_steps", 1, out="full", model=models["tied"])
    with pytest.raises(ValueError, match="is a full model, not a LoRA adapter; drop --use_lora"):
        train(*common, "--resume_from", tmp_path / "full" / "checkpoints" / "step_1", out="b", model=models["tied"])


def test_dropout_and_lora_plus_do_something(models, train, monkeypatch):
    """Dropout changes the loss of a step (not of step 1, where B is zero) but not val_loss; the ratio is B's rate."""
    common = ("--use_lora", "--max_steps", 2, "--lr", 1e-2, "--warmup_ratio", 0)
    plain, dropped, plus = (train(*common, *flags, out=f"o{i}", model=models["tied"]) for i, flags in enumerate((
        (), ("--lora_dropout", 0.5), ("--lora_plus_ratio", 4))))
    assert plain[0]["loss"] == dropped[0]["loss"] == plus[0]["loss"]
    assert len({run[1]["loss"] for run in (plain, dropped, plus)}) == 3
    rates = []
    step = optim.AdamW.step
    monkeypatch.setattr(optim.AdamW, "step", lambda self, *scale: (rates.append([
        (g["lr"], len(g["params"])) for g in self.param_groups]), step(self, *scale))[1])
    train(*common, "--lora_plus_ratio", 4, "--lora_dora", out="rates", model=models["tied"])
    rate = rates[0][0][0]
    assert rates[0] == [(rate, 14), (rate, 14), (4 * rate, 14)]  # magnitudes, A, B of two blocks of seven layers


def test_validation_has_no_dropout(models, train, tmp_path):
    """val_loss of one set of weights is the same with and without dropout."""
    adapter = peft_adapter(models["tied"], tmp_path / "a")
    config = files.read_json(adapter / "adapter_config.json")
    losses = []
    for dropout in (0.0, 0.9):
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_dropout": dropout}))
        lines = train("--use_lora", "--resume_adapter", adapter, "--lr", 0, "--weight_decay", 0, "--max_steps", 1,
                      "--val_data", EXAMPLES, "--eval_steps", 1, out=f"o{dropout}", model=models["tied"])
        losses.append((lines[0]["loss"], lines[1]["val_loss"]))
    assert losses[0][1] == losses[1][1] and losses[0][0] != losses[1][0]


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the multiplications of all matrix products."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).split(".")[1]
        if name in ("mm", "addmm", "addmm_"):
            left, right = args[-2:]
            self.total += left.shape[0] * left.shape[1] * right.shape[1]
        assert name not in ("matmul", "linear", "bmm", "baddbmm", "addbmm"), name
        return function(*args, **(kwargs or {}))


def products(model, n):
    """Multiplications of a forward and backward pass over n tokens, all of them targets; attention's apart."""
    tokens = torch.arange(n) % 50
    with Products() as counter:
        model_loss(model, tokens, (n,), tokens).backward()
    return counter.total


def test_frozen_matrices_get_no_gradient_product(models):
    """Backward makes no weight gradient of a frozen matrix: the step has exactly the products that it needs."""
    config = ModelConfig.from_dict(files.read_json(models["tied"] / "config.json"))
    full, adapted = sft.CausalLM(config), sft.CausalLM(config)
    settings, ranks = peft_config.new(adapted, sft.Config(use_lora=True, model="base"))
    lora.inject(adapted, settings, ranks)
    layers = {name: adapted.get_submodule(name) for name in ranks}
    N = 64
    base = sum(N * m.weight.numel() for m in layers.values())  # one product with each matrix
    small = sum(N * (m.lora_A.weight.numel() + m.lora_B.weight.numel()) for m in layers.values())
    head = N * config.hidden_size * config.vocab_size
    assert products(full, N) == 3 * base + 3 * head  # forward, gradient of the input, gradient of the weight
    # Nothing below the first q, k and v is trained: neither they nor their A need the gradient of their input.
    first = [m for name, m in layers.items() if re.search(r"layers\.0\.self_attn\.[qkv]_proj$", name)]
    unneeded = sum(N * (m.weight.numel() + m.lora_A.weight.numel()) for m in first)
    assert products(adapted, N) == 2 * base + 2 * head + 3 * small - unneeded


def test_the_adapter_does_not_copy_the_base_output(models):
    """The small product is added into the base's output: no other operation makes a tensor of that size."""
    linear = torch.nn.Linear(64, 512).requires_grad_(False)
    layer = lora.LoRALinear(linear, 8, scaling=2.0)
    x = torch.randn(128, 64, requires_grad=True)
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.shape == (128, 512):
                made.append((str(function), result.untyped_storage().data_ptr()))
            return result

    with Watch():
        layer(x)
    assert len({pointer for _, pointer in made}) == 1, made


def test_a_dead_adapter_stops_the_run(models, train, monkeypatch, tmp_path):
    """An adapter whose B gets no gradient in the first step is named, and nothing is saved."""
    compute = lora.LoRALinear.compute
    monkeypatch.setattr(lora.LoRALinear, "compute", lambda self, x, weight, bias, A, B, m: compute(
        self, x, weight, bias, A, B.detach() if weight.shape[0] == weight.shape[1] else B, m))
    with pytest.raises(ValueError, match=r"4 of 14 adapters have no gradient .*layers.0.self_attn.[qo]_proj.lora_B"):
        train("--use_lora", "--max_steps", 2, model=models["tied"])
    assert checkpoint.steps_in(tmp_path / "out" / "checkpoints") == []


@pytest.mark.parametrize("words, message", [
    (("--lora_rank", 4), "--lora_rank 4 does nothing without --use_lora"),
    (("--resume_adapter", "x"), "--resume_adapter x does nothing without --use_lora"),
    (("--use_lora", "--lora_rank", 0), "--lora_rank 0: it must be at least 1"),
    (("--use_lora", "--lora_alpha", 0), "--lora_alpha 0: it must be at least 1"),
    (("--use_lora", "--lora_dropout", 1), "--lora_dropout 1.0: it must be at least 0"),
    (("--use_lora", "--lora_rank", 4000), "--lora_rank 4000 is larger than a side of model.layers.0"),
    (("--use_lora", "--lora_targets", "q_proj,query"), "'query' matches no layer; use one of down_proj, "),
    (("--use_lora", "--lora_targets", "lm_head"), "train it fully with --lora_modules_to_save"),
    (("--use_lora", "--lora_targets", ".*("), "not a regular expression"),
    (("--use_lora", "--lora_targets", ".*nothing.*"), "matches no layer"),
    (("--quantize", "nf4"), "--quantize nf4 does nothing without --use_lora"),
    (("--use_lora", "--quantize", "int8"), "must be one of nf4"),
    (("--use_lora", "--quantize", "nf4", "--lora_dora"), "--quantize nf4 does not work with --lora_dora"),
    (("--use_lora", "--quantize", "nf4", "--strategy", "megatron", "--tp", 2), "--quantize nf4 does not work with --tp"),
    (("--use_lora", "--lora_modules_to_save", "norm"), "'norm' can't be fully trained"),
    (("--use_lora", "--resume_adapter", "a", "--lora_rank", 4), "--lora_rank 4 does not work with --resume_adapter"),
])
def test_bad_settings_are_one_line(words, message, train):
    with pytest.raises(ValueError, match=re.escape(message)):
        train("--max_steps", 1, *words)


def test_adapters_that_do_not_fit_are_one_line(models, train, tmp_path):
    """Another shape, another base, another kind of adapter, a torn file: an error, never a model that is another."""
    adapter = peft_adapter(models["untied"], tmp_path / "a")
    config = files.read_json(adapter / "adapter_config.json")
    words = ("--use_lora", "--max_steps", 1, "--resume_adapter", adapter)
    with pytest.raises(ValueError, match="was trained on .*untied"):
        train(*words, model=models["tied"])
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="does not fit this model: .*k_proj.lora_B.weight is .128, 4., not .64, 4"):
        train(*words, model=models["tied"])
    for change, message in (({"peft_type": "IA3"}, "peft_type 'IA3'"), ({"bias": "all"}, "bias 'all'"),
                            ({"lora_bias": True}, "lora_bias True"),
                            ({"init_lora_weights": "pissa"}, "'pissa' changes"),
                            ({"use_dora": True}, "missing .*lora_magnitude_vector")):
        (adapter / "adapter_config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message):
            chat.load(str(adapter), str(models["untied"]))
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(adapter / "adapter_model.safetensors")
    one = next(iter(tensors))
    save_file({**tensors, one.replace("layers.0", "layers.7"): tensors[one].clone()},
              adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="layers.7.* no such linear layer"):
        chat.load(str(adapter), str(models["untied"]))
    with pytest.raises(ValueError, match="is a full model, not an adapter"):
        chat.load(str(models["untied"]), TINY)
    with open(adapter / "adapter_model.safetensors", "r+b") as f:
        f.truncate(1000)
    with pytest.raises(ValueError, match="is torn or not safetensors"):
        chat.load(str(adapter), str(models["untied"]))


@pytest.fixture
def merge(monkeypatch, capsys):
    """A function: words of tools/merge.py -> (exit code, what it said on standard error)."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["merge.py", *map(str, words)])
        capsys.readouterr()
        try:
            errors.run(merging.main)
        except SystemExit as stop:
            return stop.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    return run


@pytest.mark.parametrize("model, settings", [
    ("tied", {}), ("untied", {"use_dora": True}), ("tied", {"use_rslora": True, "rank_pattern": {"q_proj": 2}}),
    ("untied", {"modules_to_save": ["lm_head"]}), ("tied", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    ("tied", {"modules_to_save": ["lm_head"]}), ("tied", {"modules_to_save": ["embed_tokens"]})])
def test_merge_equals_the_adapter(model, settings, models, merge, tmp_path):
    """The merged directory's logits, ours and transformers', equal peft's with the adapter to 1e-5; a tied model stays
    tied unless the adapter trained head and embedding apart, and then both are written."""
    base = models[model]
    adapter = peft_adapter(base, tmp_path / "a", **settings)
    if saved := settings.get("modules_to_save"):
        tensors = load_file(adapter / "adapter_model.safetensors")
        for name in tensors:
            if ".lora_" not in name:
                tensors[name] = tensors[name] * 1.5
        save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    assert merge(adapter, tmp_path / "merged", "--base", base) == (0, "")
    theirs = peft_logits(base, adapter)
    torch.testing.assert_close(our_logits(tmp_path / "merged"), theirs, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        again = load_base(tmp_path / "merged")(TOKENS[None]).logits[0]
    torch.testing.assert_close(again, theirs, atol=1e-5, rtol=1e-5)
    config = files.read_json(tmp_path / "merged" / "config.json")
    stays = model == "tied" and (not saved or len(saved) == 2)
    assert config["tie_word_embeddings"] == stays
    assert ("lm_head.weight" in pretrained.weight_entries(tmp_path / "merged")) != stays


def test_merge_of_a_trained_adapter(models, train, merge, tmp_path):
    """Base from adapter_config.json; bf16 on request; errors."""
    train("--use_lora", "--max_steps", 2, "--lr", 1e-2, model=models["tied"])
    step = tmp_path / "out" / "checkpoints" / "step_2"
    assert merge(step, tmp_path / "merged") == (0, "")
    torch.testing.assert_close(our_logits(tmp_path / "merged"), our_logits(step), atol=1e-5, rtol=1e-5)
    generation = files.read_json(tmp_path / "merged" / "generation_config.json")
    assert ChatTokenizer(step).stop_token_id in generation["eos_token_id"]
    assert merge(step, tmp_path / "small", "--dtype", "bf16") == (0, "")
    small, whole = (pretrained.weight_entries(tmp_path / name) for name in ("small", "merged"))
    assert {e.dtype for e in small.values()} == {"BF16"} and {e.dtype for e in whole.values()} == {"F32"}
    code, said = merge(step, tmp_path / "merged")
    assert code == 2 and "exists already" in said and said.count("\n") == 1
    code, said = merge(step, tmp_path / "wrong", "--base", models["untied"])
    assert code == 2 and "does not fit" in said and not (tmp_path / "wrong").exists()
    config = files.read_json(step / "adapter_config.json")
    (step / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    code, said = merge(step, tmp_path / "nameless")
    assert code == 2 and "does not name the base model; pass --base" in said
    with pytest.raises(ValueError, match="does not name the base model"):
        chat.load(str(step))
    tensors = load_file(step / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, step / "adapter_model.safetensors", {"format": "pt"})
    code, said = merge(step, tmp_path / "broken", "--base", models["tied"])
    assert code == 2 and "would not be finite" in said and not (tmp_path / "broken").exists()
    code, said = merge(tmp_path / "none", tmp_path / "x")
    assert code == 2 and said.count("\n") == 1 and "none/adapter_config.json" in said


def test_quantised_training_is_that_of_the_rounded_base(models, train, tmp_path):
    """--quantize nf4: the losses are those of a plain base whose matrices are what 4 bits keep of them; the storage is
    a sixth of fp32's and below 0.6 bytes a weight; resume is exact; the adapter is a plain one for the plain base."""
    seen = {}
    words = ("--use_lora", "--lr", 1e-2, "--max_steps", 4, "--save_steps", 2)
    load = pretrained.load_weights
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained, "load_weights", lambda model, *rest: (seen.update(model=model),
                                                                    load(model, *rest))[1])
        four = train(*words, "--quantize", "nf4", model=models["untied"])
    rounded = shutil.copytree(models["untied"], tmp_path / "rounded")
    weights, stored, n = load_file(rounded / "model.safetensors"), 0, 0
    for name, module in seen["model"].named_modules():
        if isinstance(module, lora.LoRALinear):
            rows, columns = weights[f"{name}.weight"].shape
            storage = nf4.views(module.weight.view(torch.uint8), columns)
            assert (weights[f"{name}.weight"] != nf4.dequantize(storage, torch.float32, 0, rows)).any()
            weights[f"{name}.weight"] = nf4.dequantize(storage, torch.float32, 0, rows)
            stored, n = stored + module.weight.nbytes, n + rows * columns
    assert n > 300_000 and stored / n < 0.6
    save_file(weights, rounded / "model.safetensors", {"format": "pt"})
    for a, b in zip(four, train(*words, out="plain", model=rounded), strict=True):
        assert math.isclose(a["loss"], b["loss"], rel_tol=1e-5) and math.isclose(
            a["grad_norm"], b["grad_norm"], rel_tol=1e-4), (a, b)
    again = train(*words, "--quantize", "nf4", "--resume_from", tmp_path / "out" / "checkpoints" / "step_2",
                  out="again", model=models["untied"])
    assert [line["loss"] for line in again] == [line["loss"] for line in four[2:]]
    with pytest.raises(ValueError, match="quantize nf4 then, None now"):
        train(*words, "--resume_from", tmp_path / "out" / "checkpoints" / "step_2", out="b", model=models["untied"])
    step = tmp_path / "out" / "checkpoints" / "step_4"
    torch.testing.assert_close(our_logits(step), peft_logits(models["untied"], step), atol=1e-5, rtol=1e-5)


def test_all_frozen_matrices_are_quantised(models, train, monkeypatch):
    """Those without an adapter too; embedding, head and norms are not."""
    seen = {}
    save = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda root, step, **parts: (
        seen.update(parts), save(root, step, **parts)))
    train("--use_lora", "--quantize", "nf4", "--lora_targets", "q_proj", "--max_steps", 1, model=models["tied"])
    dtypes = {name: p.dtype for name, p in seen["model"].named_parameters()}
    packed = {name for name, dtype in dtypes.items() if dtype == torch.bfloat16}
    assert len(packed) == 14 and all("_proj.weight" in name for name in packed)
    assert {dtype for name, dtype in dtypes.items() if name not in packed} == {torch.float32}


def test_a_base_that_is_not_finite_can_not_be_quantised(models, train, tmp_path):
    broken = shutil.copytree(models["untied"], tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="up_proj.weight, counted from row 0: the weight is nan at row 3, column 5"):
        train("--use_lora", "--quantize", "nf4", "--max_steps", 1, model=broken)


def test_merge_holds_one_file_at_a_time(models, tmp_path, monkeypatch):
    """A model above the limit is written in files of about that size, each when the one before it is gone."""
    adapter = peft_adapter(models["untied"], tmp_path / "a")
    alive, sizes, write = [], [], pretrained.write_safetensors

    def watch(path, tensors):
        assert not [ref for ref in alive if ref() is not None], "tensors of an earlier file are still held"
        alive.extend(weakref.ref(t) for t in tensors.values())
        sizes.append(sum(t.nbytes for t in tensors.values()))
        write(path, tensors)

    monkeypatch.setattr(pretrained, "write_safetensors", watch)
    monkeypatch.setattr(merging, "FILE_BYTES", 300_000)
    words = ["merge.py", adapter, tmp_path / "m", "--base", models["untied"]]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    merging.main()
    entries = pretrained.weight_entries(tmp_path / "m")  # checks the index against the files
    largest = max(math.prod(e.shape) * 4 for e in entries.values())
    assert len(sizes) > 3 and max(sizes) <= largest + 300_000
    with torch.no_grad():
        logits = load_base(tmp_path / "m")(TOKENS[None]).logits[0]
    torch.testing.assert_close(logits, peft_logits(models["untied"], adapter), atol=1e-5, rtol=1e-5)


RUN = ("--use_lora", "--train_data", EXAMPLES, "--lr", "1e-3", "--batch_size", "4", "--max_length", "256",
       "--max_steps", "6", "--timeout", "60")


@pytest.fixture(scope="session")
def runs(tmp_path_factory, models, pytestconfig):
    """LoRA over layouts, offloads, packing and checkpointing; with --full, in pairs: name -> output directory."""
    root = tmp_path_factory.mktemp("lora_runs")
    kinds = {"plain": (), "dora": ("--lora_dora", "--lora_rs"), "whole": ("--lora_modules_to_save", "embed_tokens"),
             "some": ("--lora_targets", "o_proj,gate_proj,k_proj", "--lora_plus_ratio", "2"),
             "nf4": ("--quantize", "nf4")}
    offloads = {"": (), "param": ("--param_offload",), "opt": ("--optimizer_offload",)}
    shapes = {"": (), "unpacked": ("--no-packing", "--no-gradient_checkpointing")}
    plan = {}
    for i, layout in enumerate(LAYOUTS):
        ranks, flags = LAYOUTS[layout]
        for j, kind in enumerate(kinds):
            step = 2 if pytestconfig.getoption("--full") else 4  # in pairs, or each kind once, each layout but tp 4
            if (kind == "nf4" and "tp" in layout) or (i + j) % step or (step == 4 and layout == "tp4"):
                continue
            model = "untied" if (i + j) % 4 or layout == "tp4" else "tied"
            offload, shape = list(offloads)[(i + (i + j) // 2) % 3], list(shapes)[i // 2 % 2]
            plan[f"{model} {kind} one"] = 1, ("--model", models[model], *kinds[kind])
            plan[f"{model} {kind} {layout} {offload} {shape}"] = ranks, (
                "--model", models[model], *kinds[kind], *flags, *offloads[offload], *shapes[shape])
    # under tp 2 a bias of a layer that is split by columns is added once, with an adapter (o_proj) and without (down_proj)
    for layout in ("one", "tp2"):
        ranks, flags = LAYOUTS[layout]
        plan[f"biased some {layout}"] = ranks, ("--model", models["biased"], *kinds["some"], *flags)
    found = {name: root / name.replace(" ", "_") for name in plan}
    run_all([(ranks, (*RUN, *flags, "--output_dir", found[name])) for name, (ranks, flags) in plan.items()], root)
    return found


def apart(one, many, word):
    """Norm of the difference of all tensors whose name has `word`, relative to theirs."""
    names = [name for name in one if word in name]
    whole, other = (torch.cat([tensors[name].flatten() for name in names]) for tensors in (one, many))
    return ((whole - other).norm() / whole.norm()).item()


def test_losses_and_adapters_do_not_depend_on_the_layout(runs):
    """The gradient law with LoRA: losses to 1e-5, and the adapter that four ranks save is one rank's to 1e-5."""
    worst = {"loss": 0, "": 0, "lora_B": 0}
    for name, directory in runs.items():
        base = runs[" ".join(name.split()[:2]) + " one"]
        for a, b in zip(metrics(base), metrics(directory), strict=True):
            worst["loss"] = max(worst["loss"], abs(a["loss"] / b["loss"] - 1))
            assert math.isclose(a["loss"], b["loss"], rel_tol=1e-5), (name, a, b)
            assert math.isclose(a["grad_norm"], b["grad_norm"], rel_tol=1e-4), (name, a, b)
        one, many = (load_file(d / "checkpoints" / "step_6" / "adapter_model.safetensors") for d in (base, directory))
        assert one.keys() == many.keys()
        # B alone began at zero, so it is all steps of Adam's, which divides by what may be near zero
        for word, limit in (("", 1e-5), ("lora_B", 1e-4)):
            off = apart(one, many, word)
            worst[word] = max(worst[word], off)
            assert off < limit, (name, word, off)
    print(f"{len(runs)} runs, largest relative differences: {worst}")
