"""--freeze: what is frozen stays to the bit, has no gradient and no optimizer state; the rest is trained."""

import re

import pytest
import torch
from helpers import TINY, model_directory, run_all, small_model, tensors_of, two_layers

import sft
from disk import shards
from disk.run import ModelPaths
from ops import forecast, freezing
from ranks import processes
from settings.errors import UserError

SHORT = ("--batch_size", "4", "--max_length", "64", "--max_steps", "3", "--lr", "1e-2", "--cache_dir", "none")
NAMES = "embed_tokens,layers.0,mlp.down_proj"


def is_frozen(name):
    return "embed_tokens" in name or "layers.0." in name or "down_proj" in name


def check(directory, step):
    """Frozen tensors are equal, the others have changed; only these have optimizer state."""
    before, after = tensors_of(directory), tensors_of(step)
    assert before.keys() == after.keys() and any(map(is_frozen, before))
    for name, tensor in before.items():
        is_equal = tensor.dtype == after[name].dtype and torch.equal(tensor, after[name])
        assert is_equal == is_frozen(name), name
    state = {name.partition(".")[2] for name in tensors_of(step / "training_state")}
    assert state == {name for name in before if not is_frozen(name)}


@pytest.fixture
def base(tmp_path):
    """fp32 on the disk: a bf16 run would round what is frozen."""
    return two_layers(tmp_path / "m", tie_word_embeddings=False)


@pytest.mark.parametrize("flags", [(), ("--dtype", "bf16"), ("--dtype", "bf16", "--optimizer_offload"),
                                   ("--param_offload",)])
def test_frozen_parameters_stay_to_the_bit(train, tmp_path, base, flags):
    train(*SHORT, "--freeze", NAMES, "--save_steps", 1, *flags, model=base)
    check(base, tmp_path / "out" / "checkpoints" / "step_3")


def test_resume_is_bitwise_and_keeps_the_choice(train, tmp_path, base):
    train(*SHORT, "--freeze", NAMES, "--save_steps", 1, "--dtype", "bf16", model=base)
    train("--resume_from", "out/checkpoints/step_1", "--output_dir", "again", model=base, out="again")
    ends = [tmp_path / out / "checkpoints" / "step_3" for out in ("out", "again")]
    for folder in ("", "training_state"):
        first, second = (tensors_of(end / folder) for end in ends)
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(UserError, match="freeze embed_tokens,.* then, none now.*--freeze embed_tokens"):
        train("--resume_from", "out/checkpoints/step_1", "--freeze", "none", model=base, out="other")


@pytest.mark.parametrize("names, expected", [
    ("layers.1", r"model\.layers\.1\..*"), ("lm_head, self_attn.q_proj", r"lm_head\.weight|.*q_proj.*"), ("norm", r"model\.norm\.weight"),
    (r"model\.layers\.[01]\.mlp", r".*\.mlp\..*"),
    (r"lm_head, model\.layers\.\d{1,2}\.mlp,model.norm", r"lm_head.*|.*\.mlp\..*|model\.norm\.weight"),
    (r".*\.(q_proj|k_proj)\.[a-z,]+", r".*\.[qk]_proj\..*"),
    (r"(?!.*mlp\.).*(weight|bias|A_log)", r"(?!.*mlp\.).*"),
    (r"embed_tokens,lm_head,model.norm,model\.layers\.([1-9]|[12][0-9])", r"(?!.*layers\.0).*"),
    ("model.language_model.layers.1.mlp,language_model.lm_head", r"model\.layers\.1\.mlp\..*|lm_head\.weight"),
    (r"model\.language_model\.layers\.1,language_model.model.norm", r"model\.layers\.1\..*|model\.norm\.weight"),
    (r".*layernorm\.weight", ".*layernorm.weight")])
def test_names_and_expressions(names, expected):
    model = small_model(tie_word_embeddings=False)
    freezing.freeze(model, names)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if re.fullmatch(expected, name)} != set()


def test_tied_embeddings_are_one():
    for name in ("embed_tokens", "lm_head"):
        model = small_model()
        freezing.freeze(model, name)
        assert not model.lm_head.weight.requires_grad and not model.model.embed_tokens.weight.requires_grad


@pytest.mark.parametrize("names, message", [
    ("mlp,layers.7", "layers.7 matches nothing in the text model; use names and regular expressions with commas, such as embed_tokens"),
    ("proj", "proj matches nothing"), ("(", "not a regular expression"),
    (r"norm,model\.layer\.\d", r"model.*layer.* matches nothing"),
    ("model,lm_head", r"leaves nothing to train \(head and embedding are one tensor\)"), ("layers,norm,lm_head", "leaves nothing")])
def test_names_that_can_not_be_frozen(names, message):
    with pytest.raises(UserError, match=message):
        freezing.freeze(small_model(), names)


def test_with_lora_it_has_no_effect(train):
    with pytest.raises(UserError, match="--freeze .*--use_lora"):
        train("--use_lora", "--freeze", "mlp")


def test_new_rows_can_not_be_frozen(tmp_path, base):
    cfg = sft.Config(model=str(base), freeze="embed_tokens")
    ranks = processes.single_process(torch.device("cpu"))
    paths = ModelPaths.find(str(base))
    paths.config_json = {**paths.config_json, "vocab_size": 2052}
    built, _ = sft.build(cfg, paths, ranks)
    with pytest.raises(UserError, match="the new rows of model.embed_tokens.weight would not be trained"):
        shards.shard_map(built, str(base))


def test_the_forecast_counts_gradients_and_moments_of_trained_ones():
    """Against the parameters themselves, in bf16 on several GPUs: 2 bytes for a frozen one, 4 for a trained one."""
    cfg = sft.Config(model=TINY, freeze="embed_tokens,layers.0", dtype="bf16", param_offload=True)
    model, _ = sft.build(cfg, ModelPaths.find(TINY), processes.single_process(torch.device("meta")))
    assert {(p.requires_grad, p.dtype) for p in model.parameters()} == {(True, torch.float32), (False, torch.bfloat16)}
    run = forecast.PlannedRun.of(model, cfg, world_size=2, cuda=True)
    sizes = forecast.states(run)
    counts = {trained: sum(-(-p.shape[0] // 2) * p[0].numel() for p in model.parameters()
                           if p.requires_grad == trained) for trained in (True, False)}
    assert counts[False] > 0 and counts[True] > 0
    assert sizes == dict(weights=2 * counts[False] + 4 * counts[True], gradients=4 * counts[True],
                         moments=8 * counts[True], masters=0)


@pytest.mark.full
def test_frozen_on_two_ranks(tmp_path, base):
    """FSDP2 with frozen and trained parameters in one group, tensor parallel, offload of both kinds, a resume."""
    tied = model_directory(tmp_path / "tied")
    layouts = {"dp": (), "bf16": ("--dtype", "bf16"), "tp": ("--strategy", "megatron", "--tp", "2"),
               "params": ("--param_offload", "--dtype", "bf16"),
               "optimizer": ("--optimizer_offload", "--dtype", "bf16"), "compiled": ("--compile",)}
    common = ("--freeze", NAMES, *SHORT, "--timeout", "60", "--save_steps", "1")
    runs = [(2, ("--model", base, "--output_dir", name, *common, *flags)) for name, flags in layouts.items()]
    runs.append((1, ("--model", base, "--output_dir", "one", *common)))
    runs.append((2, ("--model", tied, "--output_dir", "tied", *common)))
    runs.append((2, ("--output_dir", "dp", "--resume_from", "dp/checkpoints/step_1", "--max_steps", "3")))
    run_all(runs, tmp_path)
    for name in (*layouts, "one"):
        check(base, tmp_path / name / "checkpoints" / "step_3")
    one = tensors_of(tmp_path / "one" / "checkpoints" / "step_3")
    for name in ("dp", "tp"):
        other = tensors_of(tmp_path / name / "checkpoints" / "step_3")
        assert all((one[key] - other[key]).abs().max() < 2e-3 for key in one)
