"""LoRA compared with peft: logits, files, gradients on any layout; exact resume, frozen bases, merging, errors."""

import json
import math
import os
import re
import shutil
import sys
import weakref
from collections import Counter

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
from disk import checkpoint, exporting, files, pretrained, writer
from disk import peft as peft_config
from families.config import ModelConfig
from model import CausalLM
from ops import nf4, optim
from ops.attention import Documents
from settings import errors
from text.template import ChatTokenizer
from tools import merge as merging

TOKENS = torch.arange(40) % 37 + 5


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """tied: qwen2 with biases, bf16 on the disk. untied: qwen3 with q/k norm, fp32. biased: llama with a bias in each
    layer. The weights are large enough for attention to matter: if queries and keys have gradients of 1e-8, Adam's
    updates are rounding errors."""
    configs = {
        "tied": {},
        "untied": dict(model_type="qwen3", num_key_value_heads=4, head_dim=32, tie_word_embeddings=False),
        "biased": dict(model_type="llama", attention_bias=True, mlp_bias=True),
    }
    return {name: two_layers(tmp_path_factory.mktemp(name), 0.1, **config) for name, config in configs.items()}


def load_base(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def peft_logits(base, adapter):
    model = peft.PeftModel.from_pretrained(load_base(base), adapter).eval()
    with torch.no_grad():
        return model(TOKENS[None]).logits[0]


def logits_of(directory, base=None):
    model, _, _ = chat.load(str(directory), base and str(base))
    with torch.no_grad():
        return model(TOKENS, Documents.of([len(TOKENS)]))


def randomise(directory, scale=0.1):
    """Set every tensor of an adapter directory to values that change the logits."""
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
    """Create an adapter of `base` with peft, with random values; return its directory."""
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
    "embedding": ("--lora_modules_to_save", "embed_tokens"), "dora_rs": ("--lora_dora", "--lora_rs", "--lora_rank", 4),
}


@pytest.mark.parametrize("model", ["tied", "untied"])
@pytest.mark.parametrize("shape", SHAPES)
def test_peft_loads_a_saved_step(shape, model, models, train, tmp_path):
    """A saved step is a PEFT adapter: PeftModel's logits equal CausalLM's to 1e-5, and differ from the base's."""
    train("--use_lora", "--max_steps", 3, "--lr", 1e-2, *SHAPES[shape], model=models[model])
    step = tmp_path / "out" / "checkpoints" / "step_3"
    logits = logits_of(step)
    torch.testing.assert_close(logits, peft_logits(models[model], step), atol=1e-5, rtol=1e-5)
    assert (logits - logits_of(models[model])).abs().max() > 1e-3
    config = files.read_json(step / "adapter_config.json")
    assert config["base_model_name_or_path"] == str(models[model]) and config["bias"] == "none"
    assert (config["peft_type"], config["task_type"]) == ("LORA", "CAUSAL_LM")
    saved = {"tied": ["embed_tokens", "lm_head"], "untied": ["embed_tokens"]}[model]
    assert config["modules_to_save"] == (saved if shape == "embedding" else None)
    assert not (step / "model.safetensors").exists() and (step / "tokenizer.json").exists()


PEFT_MADE = {
    "plain": {}, "ranks": {"rank_pattern": {"q_proj": 2, "1.mlp.up_proj": 8}, "alpha_pattern": {"v_proj": 32}},
    "rs": {"use_rslora": True, "r": 9}, "dora": {"use_dora": True, "alpha_pattern": {"layers.0.mlp.*": 3}},
    "subset": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    "regex": {"target_modules": r".*mlp\.(up|gate)_proj"}, "excluded": {"exclude_modules": ["k_proj"]},
    "embedding and head": {"modules_to_save": ["embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize("made", PEFT_MADE)
def test_adapters_that_peft_made(made, models, train, tmp_path):
    """chat.py loads them. --resume_adapter continues to train them, with their own adapter_config.json."""
    base = models["untied"]
    adapter = peft_adapter(base, tmp_path / "adapter", **PEFT_MADE[made])
    expected = peft_logits(base, adapter)
    assert (expected - logits_of(base)).abs().max() > 1e-2
    torch.testing.assert_close(logits_of(adapter, base), expected, atol=1e-5, rtol=1e-5)
    train("--use_lora", "--resume_adapter", adapter, "--max_steps", 1, "--lr", 0, "--weight_decay", 0, model=base)
    again = tmp_path / "out" / "checkpoints" / "step_1"
    before, after = (load_file(d / "adapter_model.safetensors") for d in (adapter, again))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    torch.testing.assert_close(peft_logits(base, again), expected, atol=1e-6, rtol=1e-6)


def test_training_equals_training_with_peft(models, train, tmp_path):
    """Four steps from the same adapter: losses equal those of peft with torch's AdamW to 1e-5, also for DoRA."""
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
                loss_mask = torch.from_numpy(rows.loss_mask[rows.starts[i] : rows.starts[i + 1]])
                logits = model(tokens[None]).logits[0, :-1]
                losses = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
                nll = losses[loss_mask[1:]].sum() / n
                nll.backward()
                total += nll.item()
            assert math.isclose(line["loss"], total, rel_tol=1e-5), (name, line["step"], line["loss"], total)
            optimizer.step()
            optimizer.zero_grad()


def recorded_save(monkeypatch):
    """The keyword arguments of the last call of checkpoint.save, in a dict that each call updates."""
    arguments, save = {}, checkpoint.save

    def recording(root, step, **kwargs):
        arguments.update(kwargs)
        return save(root, step, **kwargs)

    monkeypatch.setattr(checkpoint, "save", recording)
    return arguments


def test_the_frozen_base_is_bit_identical_and_only_adapters_are_saved(models, train, tmp_path, monkeypatch):
    """The base is bitwise unchanged, has no gradient and no optimizer state, and is not in the checkpoint."""
    saved = recorded_save(monkeypatch)
    train("--use_lora", "--max_steps", 3, "--lr", 1e-2, model=models["tied"])
    on_disk = load_file(models["tied"] / "model.safetensors")
    trained = set()
    for name, p in saved["model"].named_parameters():
        if ".lora_" in name:
            trained.add(p)
            assert p.dtype == torch.float32 and p.requires_grad
        else:
            assert torch.equal(p, on_disk[name].float()) and not p.requires_grad and p.grad is None, name
    assert {p for group in saved["optimizer"].param_groups for p in group["params"]} == trained
    assert set(saved["optimizer"].state) == trained
    step = tmp_path / "out" / "checkpoints" / "step_3"
    names = set(load_file(step / "adapter_model.safetensors"))
    assert names == {f"base_model.model.{n}" for n, p in saved["model"].named_parameters() if ".lora_" in n}
    moments = load_file(step / "training_state" / "tensors.safetensors")
    assert len(moments) == 2 * len(names) and all(".lora_" in name for name in moments)


@pytest.mark.parametrize("flags", [(), ("--lora_dropout", 0.3), ("--lora_dora", "--lora_plus_ratio", 4),
                                   ("--lora_modules_to_save", "lm_head", "--optimizer_offload")])
def test_resume_is_exact(flags, models, train, tmp_path):
    """Six steps equal three steps, a resume and three more, bitwise, also with dropout."""
    common = ("--use_lora", "--max_steps", 6, "--save_steps", 3, "--lr", 1e-3, *flags)
    straight = train(*common, model=models["tied"])
    resumed = train(*common, "--resume_from", tmp_path / "out" / "checkpoints" / "step_3", out="again",
                    model=models["tied"])
    keys = "step", "loss", "grad_norm", "lr", "tokens"
    assert [[line[k] for k in keys] for line in straight[3:]] == [[line[k] for k in keys] for line in resumed]
    for file in ("adapter_model.safetensors", "training_state/tensors.safetensors"):
        first, second = (load_file(tmp_path / out / "checkpoints" / "step_6" / file) for out in ("out", "again"))
        assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def test_resume_refuses_other_settings_and_other_bases(models, train, tmp_path):
    """Another base of the same shape, other settings, or the checkpoint of a full run: an error, before training."""
    common = ("--use_lora", "--max_steps", 2, "--save_steps", 1)
    train(*common, model=models["tied"])
    resume = ("--resume_from", tmp_path / "out" / "checkpoints" / "step_1")
    with pytest.raises(ValueError, match="lora_rank 8 then, 4 now"):
        train(*common, *resume, "--lora_rank", 4, out="b", model=models["tied"])
    other = shutil.copytree(models["tied"], tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="the run started from another base model than --model"):
        train(*common, *resume, out="b", model=other)
    with pytest.raises(ValueError, match="is a LoRA adapter, not a full model; add --use_lora"):
        train("--max_steps", 2, "--no-use_lora", *resume, out="b", model=models["tied"])
    train("--max_steps", 1, out="full", model=models["tied"])
    with pytest.raises(ValueError, match="is a full model, not a LoRA adapter; drop --use_lora"):
        train(*common, "--resume_from", tmp_path / "full" / "checkpoints" / "step_1", out="b", model=models["tied"])


def test_dropout_and_lora_plus_do_something(models, train, monkeypatch):
    """Dropout changes the loss (not in step 1, where B is zero). --lora_plus_ratio multiplies the rate of B."""
    common = ("--use_lora", "--max_steps", 2, "--lr", 1e-2, "--warmup_ratio", 0)
    plain, dropped, plus = (train(*common, *flags, out=f"o{i}", model=models["tied"]) for i, flags in enumerate((
        (), ("--lora_dropout", 0.5), ("--lora_plus_ratio", 4))))
    assert plain[0]["loss"] == dropped[0]["loss"] == plus[0]["loss"]
    assert len({run[1]["loss"] for run in (plain, dropped, plus)}) == 3
    rates, step = [], optim.AdamW.step

    def recording(self, *args, **options):
        rates.append([(group["lr"], len(group["params"])) for group in self.param_groups])
        step(self, *args, **options)

    monkeypatch.setattr(optim.AdamW, "step", recording)
    train(*common, "--lora_plus_ratio", 4, "--lora_dora", out="rates", model=models["tied"])
    rate = rates[0][0][0]
    assert rates[0] == [(rate, 14), (rate, 14), (4 * rate, 14)]  # magnitudes, A and B of two blocks with seven layers


def test_validation_has_no_dropout(models, train, tmp_path):
    """With the same weights, val_loss is the same with and without dropout."""
    adapter = peft_adapter(models["tied"], tmp_path / "a")
    config = files.read_json(adapter / "adapter_config.json")
    losses = []
    for dropout in (0.0, 0.9):
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_dropout": dropout}))
        lines = train("--use_lora", "--resume_adapter", adapter, "--lr", 0, "--weight_decay", 0, "--max_steps", 1,
                      "--val_data", EXAMPLES, "--eval_steps", 1, out=f"o{dropout}", model=models["tied"])
        losses.append((lines[1]["loss"], lines[0]["val_loss"], lines[2]["val_loss"]))
    assert losses[0][1:] == losses[1][1:] and losses[0][0] != losses[1][0]


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
    """Multiplications in matrix products of a forward and backward pass over n tokens, all of them targets; without
    those inside attention."""
    tokens = torch.arange(n) % 50
    with Products() as counter:
        model_loss(model, tokens, (n,), tokens).backward()
    return counter.total


def test_frozen_matrices_get_no_gradient_product(models):
    """Backward computes no weight gradient of a frozen matrix: a step has exactly the necessary products."""
    config = ModelConfig.from_dict(files.read_json(models["tied"] / "config.json"))
    full, adapted = CausalLM(config), CausalLM(config)
    adapter_config, lora_ranks = peft_config.new(adapted, sft.Config(use_lora=True, model="base"))
    lora.inject(adapted, adapter_config, lora_ranks)
    layers = {name: adapted.get_submodule(name) for name in lora_ranks}
    N = 64
    base = sum(N * m.weight.numel() for m in layers.values())  # one product with each matrix
    small = sum(N * (m.lora_A.weight.numel() + m.lora_B.weight.numel()) for m in layers.values())
    head = N * config.hidden_size * config.vocab_size
    assert products(full, N) == 3 * base + 3 * head  # forward, gradient of the input, gradient of the weight
    # Nothing before the first q, k and v is trained, so neither they nor their A need the gradient of their input.
    first = [m for name, m in layers.items() if re.search(r"layers\.0\.self_attn\.[qkv]_proj$", name)]
    unneeded = sum(N * (m.weight.numel() + m.lora_A.weight.numel()) for m in first)
    assert products(adapted, N) == 2 * base + 2 * head + 3 * small - unneeded


def test_the_adapter_does_not_copy_the_base_output(models):
    """The adapter's product is added to the base's output in place: no second tensor of that size is created."""
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
    """If the B of an adapter gets no gradient in the first step, the error names it, and nothing is saved."""
    compute = lora.LoRALinear.compute
    monkeypatch.setattr(lora.LoRALinear, "compute", lambda self, x, weight, bias, A, B, m: compute(
        self, x, weight, bias, A, B.detach() if weight.shape[0] == weight.shape[1] else B, m))
    with pytest.raises(ValueError, match=r"4 of 14 adapters have no gradient .*layers.0.self_attn.[qo]_proj.lora_B"):
        train("--use_lora", "--max_steps", 2, model=models["tied"])
    assert checkpoint.steps_in(tmp_path / "out" / "checkpoints") == []


@pytest.mark.parametrize("flags, message", [
    (("--lora_rank", 4), "--lora_rank 4 has no effect without --use_lora"),
    (("--resume_adapter", "x"), "--resume_adapter x has no effect without --use_lora"),
    (("--use_lora", "--lora_rank", 0), "--lora_rank 0: it must be at least 1"),
    (("--use_lora", "--lora_alpha", 0), "--lora_alpha 0: it must be at least 1"),
    (("--use_lora", "--lora_dropout", 1), "--lora_dropout 1.0: it must be at least 0"),
    (("--use_lora", "--lora_rank", 4000), "--lora_rank 4000 is larger than a side of model.layers.0"),
    (("--use_lora", "--lora_targets", "q_proj,query"), "'query' matches no layer; use one of down_proj, "),
    (("--use_lora", "--lora_targets", "lm_head"), "train it fully with --lora_modules_to_save"),
    (("--use_lora", "--lora_targets", ".*("), "not a regular expression"),
    (("--use_lora", "--lora_targets", ".*nothing.*"), "matches no layer"),
    (("--quantize", "nf4"), "--quantize nf4 has no effect without --use_lora"),
    (("--use_lora", "--quantize", "int8"), "must be one of nf4"),
    (("--use_lora", "--quantize", "nf4", "--lora_dora"), "--quantize nf4 does not work with --lora_dora"),
    (("--use_lora", "--quantize", "nf4", "--strategy", "megatron", "--tp", 2),
     "--quantize nf4 does not work with --tp"),
    (("--use_lora", "--lora_modules_to_save", "norm"), "'norm' can't be fully trained"),
    (("--use_lora", "--resume_adapter", "a", "--lora_rank", 4), "--lora_rank 4 does not work with --resume_adapter"),
])
def test_invalid_settings_are_errors(flags, message, train):
    """The message has the flag, its value and the remedy."""
    with pytest.raises(ValueError, match=re.escape(message)):
        train("--max_steps", 1, *flags)


def test_adapters_that_do_not_fit_are_errors(models, train, tmp_path):
    """Another shape, another base, another kind of adapter, a truncated file: an error, never another model."""
    adapter = peft_adapter(models["untied"], tmp_path / "a")
    config = files.read_json(adapter / "adapter_config.json")
    flags = ("--use_lora", "--max_steps", 1, "--resume_adapter", adapter)
    with pytest.raises(ValueError, match="was trained on .*untied"):
        train(*flags, model=models["tied"])
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="does not fit this model: .*k_proj.lora_B.weight is .128, 4., not .64, 4"):
        train(*flags, model=models["tied"])
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
    with pytest.raises(ValueError, match="is truncated or not safetensors"):
        chat.load(str(adapter), str(models["untied"]))


@pytest.fixture
def merge(monkeypatch, capsys):
    """A function that runs tools/merge.py with these arguments: returns (exit code, standard error)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["merge.py", *map(str, arguments)])
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
    """The logits of the merged directory, in CausalLM and in transformers, equal those of peft to 1e-5. A tied model
    stays tied, unless the adapter trained head and embedding separately; then both are written."""
    base = models[model]
    adapter = peft_adapter(base, tmp_path / "a", **settings)
    saved = settings.get("modules_to_save")
    if saved:
        tensors = load_file(adapter / "adapter_model.safetensors")
        for name in tensors:
            if ".lora_" not in name:
                tensors[name] = tensors[name] * 1.5
        save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    assert merge(adapter, tmp_path / "merged", "--base", base) == (0, "")
    expected = peft_logits(base, adapter)
    torch.testing.assert_close(logits_of(tmp_path / "merged"), expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        oracle = load_base(tmp_path / "merged")(TOKENS[None]).logits[0]
    torch.testing.assert_close(oracle, expected, atol=1e-5, rtol=1e-5)
    config = files.read_json(tmp_path / "merged" / "config.json")
    stays_tied = model == "tied" and (not saved or len(saved) == 2)
    assert config["tie_word_embeddings"] == stays_tied
    assert ("lm_head.weight" in pretrained.weight_entries(tmp_path / "merged")) != stays_tied


def test_merge_of_a_trained_adapter(models, train, merge, tmp_path, monkeypatch):
    """The base comes from adapter_config.json, --dtype bf16 works, and mistakes are one-line errors."""
    train("--use_lora", "--max_steps", 2, "--lr", 1e-2, model=models["tied"])
    step = tmp_path / "out" / "checkpoints" / "step_2"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(merging, "print", lambda text: printed.append(text), raising=False)
    printed = []
    assert merge(step, tmp_path / "merged") == (0, "")
    torch.testing.assert_close(logits_of(tmp_path / "merged"), logits_of(step), atol=1e-5, rtol=1e-5)
    generation = files.read_json(tmp_path / "merged" / "generation_config.json")
    assert ChatTokenizer(step).stop_token_id in generation["eos_token_id"]
    assert merge(step, "small\x1b[2J", "--dtype", "bf16") == (0, "")
    assert r"saved    small\x1b[2J (" in printed[-1] and "\x1b" not in printed[-1]
    for name, dtype in (("small\x1b[2J", "BF16"), ("merged", "F32")):
        assert {entry.dtype for entry in pretrained.weight_entries(tmp_path / name).values()} == {dtype}
    code, stderr = merge(step, tmp_path / "merged")
    assert code == 2 and "exists already" in stderr and stderr.count("\n") == 1
    code, stderr = merge(step, tmp_path / "wrong", "--base", models["untied"])
    assert code == 2 and "has other weights than the model" in stderr and not (tmp_path / "wrong").exists()
    shutil.rmtree(step / "training_state")  # with the base model's fingerprint
    code, stderr = merge(step, tmp_path / "wrong", "--base", models["untied"])
    assert code == 2 and "does not fit" in stderr and not (tmp_path / "wrong").exists()
    config = files.read_json(step / "adapter_config.json")
    (step / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    code, stderr = merge(step, tmp_path / "nameless")
    assert code == 2 and "does not name the base model; pass --base" in stderr
    with pytest.raises(ValueError, match="does not name the base model"):
        chat.load(str(step))
    tensors = load_file(step / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, step / "adapter_model.safetensors", {"format": "pt"})
    code, stderr = merge(step, tmp_path / "broken", "--base", models["tied"])
    assert code == 2 and "would not be finite" in stderr and not (tmp_path / "broken").exists()
    code, stderr = merge(tmp_path / "none", tmp_path / "x")
    assert code == 2 and stderr.count("\n") == 1 and "none has no adapter_config.json" in stderr


def test_quantised_training_equals_training_on_the_dequantised_base(models, train, tmp_path):
    """--quantize nf4: losses equal those with an fp32 base whose matrices were quantised and dequantised. The storage
    is below 0.6 bytes per weight, resume is exact, and the adapter is a plain one for the original base."""
    loaded_models, load = [], pretrained.load_weights
    flags = ("--use_lora", "--lr", 1e-2, "--max_steps", 4, "--save_steps", 2)

    def recording(model, *args):
        loaded_models.append(model)
        load(model, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained, "load_weights", recording)
        quantised = train(*flags, "--quantize", "nf4", model=models["untied"])
    rounded = shutil.copytree(models["untied"], tmp_path / "rounded")
    weights, stored, n = load_file(rounded / "model.safetensors"), 0, 0
    for name, module in loaded_models[0].named_modules():
        if isinstance(module, lora.LoRALinear):
            rows, columns = weights[f"{name}.weight"].shape
            storage = nf4.views(module.weight.view(torch.uint8), columns)
            assert (weights[f"{name}.weight"] != nf4.dequantize(storage, torch.float32, 0, rows)).any()
            weights[f"{name}.weight"] = nf4.dequantize(storage, torch.float32, 0, rows)
            stored += module.weight.nbytes
            n += rows * columns
    assert n > 300_000
    assert stored / n < 0.6
    save_file(weights, rounded / "model.safetensors", {"format": "pt"})
    for a, b in zip(quantised, train(*flags, out="plain", model=rounded), strict=True):
        assert math.isclose(a["loss"], b["loss"], rel_tol=1e-5), (a, b)
        assert math.isclose(a["grad_norm"], b["grad_norm"], rel_tol=1e-4), (a, b)
    again = train(*flags, "--quantize", "nf4", "--resume_from", tmp_path / "out" / "checkpoints" / "step_2",
                  out="again", model=models["untied"])
    assert [line["loss"] for line in again] == [line["loss"] for line in quantised[2:]]
    with pytest.raises(ValueError, match="quantize nf4 then, none now"):
        train(*flags, "--quantize", "none", "--resume_from", tmp_path / "out" / "checkpoints" / "step_2", out="b",
              model=models["untied"])
    step = tmp_path / "out" / "checkpoints" / "step_4"
    torch.testing.assert_close(logits_of(step), peft_logits(models["untied"], step), atol=1e-5, rtol=1e-5)


def test_all_frozen_matrices_are_quantised(models, train, monkeypatch):
    """Also those without an adapter; embedding, head and norms are not."""
    saved = recorded_save(monkeypatch)
    train("--use_lora", "--quantize", "nf4", "--lora_targets", "q_proj", "--max_steps", 1, model=models["tied"])
    dtypes = {name: p.dtype for name, p in saved["model"].named_parameters()}
    quantised = {name for name, dtype in dtypes.items() if dtype == torch.bfloat16}
    assert len(quantised) == 14 and all("_proj.weight" in name for name in quantised)
    assert {dtype for name, dtype in dtypes.items() if name not in quantised} == {torch.float32}


def test_a_base_that_is_not_finite_can_not_be_quantised(models, train, tmp_path):
    """The error names the tensor, the row, the column and the value."""
    broken = shutil.copytree(models["untied"], tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="up_proj.weight: the weight is nan at row 3, column 5"):
        train("--use_lora", "--quantize", "nf4", "--max_steps", 1, model=broken)


def test_merge_has_three_tensors_in_memory_at_a_time(models, tmp_path, monkeypatch):
    """A model larger than FILE_BYTES is written in files of at most that size, or of one tensor."""
    adapter = peft_adapter(models["untied"], tmp_path / "a")
    alive, write = [], writer.write_tensors

    def watch(path, stored, tensor_of):
        def watched(name):
            # one that is written, and one that waits
            assert sum(ref() is not None for ref in alive) <= 2, "more tensors are in memory"
            tensor = tensor_of(name)
            alive.append(weakref.ref(tensor))
            return tensor

        write(path, stored, watched)

    monkeypatch.setattr(writer, "write_tensors", watch)
    monkeypatch.setattr(exporting, "FILE_BYTES", 300_000)
    arguments = ["merge.py", adapter, tmp_path / "m", "--base", models["untied"]]
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    merging.main()
    entries = pretrained.weight_entries(tmp_path / "m")  # checks the index against the files
    files_of = Counter(e.file for e in entries.values())
    sizes = {file: sum(e.n_bytes for e in entries.values() if e.file == file) for file in files_of}
    assert len(sizes) > 3 and len(alive) == len(entries)
    assert all(size <= 300_000 or files_of[file] == 1 for file, size in sizes.items())
    with torch.no_grad():
        logits = load_base(tmp_path / "m")(TOKENS[None]).logits[0]
    torch.testing.assert_close(logits, peft_logits(models["untied"], adapter), atol=1e-5, rtol=1e-5)


RUN = ("--use_lora", "--train_data", EXAMPLES, "--lr", "1e-3", "--batch_size", "4", "--max_length", "256",
       "--max_steps", "3", "--timeout", "60")


@pytest.fixture(scope="session")
def runs(tmp_path_factory, models, pytestconfig):
    """Runs with LoRA over layouts, offloads, packing and gradient checkpointing, {name: output directory}.

    With --full half of all pairs of layout and kind; otherwise a quarter, without four layouts of four ranks.
    """
    root = tmp_path_factory.mktemp("lora_runs")
    kinds = {"plain": (), "dora": ("--lora_dora", "--lora_rs"), "embedding": ("--lora_modules_to_save", "embed_tokens"),
             "some": ("--lora_targets", "o_proj,gate_proj,k_proj", "--lora_plus_ratio", "2"),
             "nf4": ("--quantize", "nf4")}
    offloads = {"": (), "param": ("--param_offload",), "opt": ("--optimizer_offload",)}
    shapes = {"": (), "unpacked": ("--no-packing", "--no-gradient_checkpointing")}
    flags_of = {}
    for i, layout in enumerate(LAYOUTS):
        ranks, flags = LAYOUTS[layout]
        for j, kind in enumerate(kinds):
            step = 2 if pytestconfig.getoption("--full") else 4
            if (kind == "nf4" and "tp" in layout) or (i + j) % step or (
                    step == 4 and layout in ("dp4", "tp4", "sp4", "sp2tp2")):
                continue
            model = "untied" if (i + j) % 4 or layout == "tp4" else "tied"
            offload, shape = list(offloads)[(i + (i + j) // 2) % 3], list(shapes)[i // 2 % 2]
            flags_of[f"{model} {kind} one"] = 1, ("--model", models[model], *kinds[kind])
            flags_of[f"{model} {kind} {layout} {offload} {shape}"] = ranks, (
                "--model", models[model], *kinds[kind], *flags, *offloads[offload], *shapes[shape])
    # With tp 2, the bias of a layer that is split by columns must be added once: with an adapter (o_proj) and without
    # (down_proj).
    for layout in ("one", "tp2"):
        ranks, flags = LAYOUTS[layout]
        flags_of[f"biased some {layout}"] = ranks, ("--model", models["biased"], *kinds["some"], *flags)
    directories = {name: root / name.replace(" ", "_") for name in flags_of}
    run_all([(ranks, (*RUN, *flags, "--output_dir", directories[name]))
            for name, (ranks, flags) in flags_of.items()], root)
    return directories


def relative_difference(one, many, word):
    """The norm of the difference of all tensors whose name contains `word`, relative to their norm."""
    names = [name for name in one if word in name]
    expected, result = (torch.cat([tensors[name].flatten() for name in names]) for tensors in (one, many))
    return ((expected - result).norm() / expected.norm()).item()


def test_losses_and_adapters_do_not_depend_on_the_layout(runs):
    """With LoRA: losses equal those of one rank to 1e-5, and so do the adapters that are saved."""
    worst = {"loss": 0, "": 0, "lora_B": 0}
    for name, directory in runs.items():
        base = runs[" ".join(name.split()[:2]) + " one"]
        for a, b in zip(metrics(base), metrics(directory), strict=True):
            worst["loss"] = max(worst["loss"], abs(a["loss"] / b["loss"] - 1))
            assert math.isclose(a["loss"], b["loss"], rel_tol=1e-5), (name, a, b)
            assert math.isclose(a["grad_norm"], b["grad_norm"], rel_tol=1e-4), (name, a, b)
        one, many = (load_file(d / "checkpoints" / "step_3" / "adapter_model.safetensors") for d in (base, directory))
        assert one.keys() == many.keys()
        # B starts at zero, so it consists of Adam's updates only, which divide by values that may be near zero.
        for word, limit in (("", 1e-5), ("lora_B", 1e-4)):
            difference = relative_difference(one, many, word)
            worst[word] = max(worst[word], difference)
            assert difference < limit, (name, word, difference)
    print(f"{len(runs)} runs, largest relative differences: {worst}")


def test_merge_removes_nothing_that_it_did_not_make(merge, tmp_path):
    """A directory OUT.tmp may be somebody's."""
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "precious").write_text("data")
    code, error = merge(tmp_path, tmp_path / "out")
    assert code == 2 and f"{tmp_path / 'out.tmp'} exists already" in error
    assert (tmp_path / "out.tmp" / "precious").read_text() == "data"
