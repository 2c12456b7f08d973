"""tools/export.py: what leaves is what was trained, in another dtype, in shards, averaged; transformers and peft read it."""

import json
import os
import shutil
import sys

import peft
import pytest
import torch
from helpers import EXAMPLES, TINY, chatml, make_directory, model_directory, tensors_of, two_layers
from multimodal_helpers import multimodal, raw_tensors
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import sft
from disk import files, pretrained
from settings.errors import UserError
from tools import export

TOKENS = torch.arange(5, 40)[None]


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """Steps 1, 2 and 3 of a bf16 model whose tokenizer and template are another model's: so fp32 masters exist."""
    root = tmp_path_factory.mktemp("export")
    tokenizer = make_directory(root / "tokenizer", chatml("m.content"), eos_token="<|endoftext|>")
    sys.argv = ["sft.py", "--model", str(two_layers(root / "tied", 0.1)), "--tokenizer", tokenizer, "--train_data", EXAMPLES,
                "--output_dir", str(root / "out"), "--lr", "1e-3", "--batch_size", "4", "--max_length", "64",
                "--max_steps", "3", "--save_steps", "1"]
    sft.main()
    return [root / f"out/checkpoints/step_{step}" for step in (1, 2, 3)]


def masters(step):
    """{name: fp32 tensor} of the weights as the run has them."""
    state = load_file(step / "training_state/tensors.safetensors")
    return {name.removeprefix("master."): tensor for name, tensor in state.items() if name.startswith("master.")}


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
    export.main()


def test_an_export_is_the_step_without_its_training_state(steps, tmp_path, monkeypatch):
    """Weights to the byte; transformers computes the same; template and stop ids are those trained with."""
    run(monkeypatch, steps[2], tmp_path / "out")
    before, after = tensors_of(steps[2]), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and after[name].dtype == torch.bfloat16 for name in before)
    assert set(os.listdir(steps[2])) - {"training_state"} == set(os.listdir(tmp_path / "out")) - {"README.md", "loss.png"}
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(path)(TOKENS).logits for path in (steps[2], tmp_path / "out")]
    assert torch.equal(*logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == chatml("m.content")
    stop = files.read_json(tmp_path / "out/generation_config.json")["eos_token_id"]
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in (stop if isinstance(stop, list) else [stop])
    assert "step 3." in (tmp_path / "out/README.md").read_text()


def test_fp32_has_the_weights_before_they_were_rounded(steps, tmp_path, monkeypatch):
    """Not the bf16 of the step's files: training_state/ has more. config.json says the dtype."""
    run(monkeypatch, "--dtype", "fp32", steps[2], tmp_path / "fp32")
    exact, after = masters(steps[2]), tensors_of(tmp_path / "fp32")
    assert exact.keys() == after.keys() and all(torch.equal(exact[name], after[name]) for name in exact)
    assert any(not torch.equal(exact[name], tensor.float()) for name, tensor in tensors_of(steps[2]).items())
    config = files.read_json(tmp_path / "fp32/config.json")
    assert {config[key] for key in ("dtype", "torch_dtype") if key in config} == {"float32"}
    run(monkeypatch, steps[2], tmp_path / "fp16", "--dtype=fp16")
    assert all(torch.equal(tensor, exact[name].half()) for name, tensor in tensors_of(tmp_path / "fp16").items())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "fp16").dtype == torch.float16


def test_an_average_is_that_of_the_masters_rounded_once(steps, tmp_path, monkeypatch):
    """Three steps in fp64, then bf16. The average of one step with itself is that step."""
    run(monkeypatch, *steps, tmp_path / "out")
    exact = [masters(step) for step in steps]
    for name, tensor in tensors_of(tmp_path / "out").items():
        mean = torch.stack([of_step[name].double() for of_step in exact]).sum(0) / 3
        assert torch.equal(tensor, mean.to(torch.bfloat16)), name
    text = (tmp_path / "out/README.md").read_text()
    assert "steps 1, 2, 3, average of 3 checkpoints" in text
    run(monkeypatch, *[steps[0]] * 3, tmp_path / "same")
    assert all(torch.equal(tensor, tensors_of(steps[0])[name]) for name, tensor in tensors_of(tmp_path / "same").items())


def test_large_tensors_are_averaged_in_pieces(steps, tmp_path, monkeypatch):
    """Pieces of rows give what the whole gives."""
    export.export([str(step) for step in steps], str(tmp_path / "whole"))
    monkeypatch.setattr(pretrained, "CHUNK", 1000)
    export.export([str(step) for step in steps], str(tmp_path / "pieces"))
    whole, pieces = (tensors_of(tmp_path / name) for name in ("whole", "pieces"))
    assert whole.keys() == pieces.keys() and all(torch.equal(whole[name], pieces[name]) for name in whole)


def test_shards_are_at_most_as_large_as_asked(tmp_path, monkeypatch):
    """Or have one tensor; the index is right, as transformers loads them."""
    run(monkeypatch, TINY, tmp_path / "out", "--shard_gb", 0.0005)
    entries = pretrained.stored_entries(str(tmp_path / "out"))  # checks the index
    by_file = {}
    for entry in entries.values():
        by_file.setdefault(entry.file, []).append(entry.n_bytes)
    assert len(by_file) > 3 and all(len(sizes) == 1 or sum(sizes) <= 500_000 for sizes in by_file.values())
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(path)(TOKENS).logits for path in (TINY, tmp_path / "out")]
    assert torch.equal(*logits)


def changed(path, config=None, tensors=None, template=None):
    directory = model_directory(path, config, tensors)
    if template:
        (directory / "chat_template.jinja").write_text(template)
    return str(directory)


def renamed(tensors):
    tensors["model.layers.0.new.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")


DIFFERENT = {"config.json differ in rms_norm_eps": {"config": {"rms_norm_eps": 1e-3}},
             "the weights differ in model.layers.0.mlp.up_proj.weight": {"tensors": renamed},
             "chat_template.jinja differs": {"template": chatml("m.content", more="{{ '' }}")}}


@pytest.mark.parametrize("part", DIFFERENT)
def test_only_models_of_one_kind_are_averaged(part, tmp_path):
    """What differs is named, and nothing is written."""
    with pytest.raises(UserError, match=part):
        export.export([TINY, changed(tmp_path / "other", **DIFFERENT[part])], str(tmp_path / "out"))
    assert os.listdir(tmp_path) == ["other"]


@pytest.fixture
def adapter(train, tmp_path):
    train("--use_lora", "--max_steps", 1, "--batch_size", 2, "--max_length", 64)
    return tmp_path / "out/checkpoints/step_1"


def test_an_adapter_is_exported_for_peft_and_not_averaged(adapter, tmp_path, monkeypatch):
    """The average of A and of B is not the adapter of the averaged product."""
    run(monkeypatch, adapter, tmp_path / "bf16", "--dtype", "bf16")
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors_of(tmp_path / "bf16").values())
    run(monkeypatch, adapter, tmp_path / "same")
    before, after = tensors_of(adapter), tensors_of(tmp_path / "same")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(TINY), tmp_path / "same")
    of_peft = peft.get_peft_model_state_dict(loaded)
    assert all(torch.equal(of_peft[name], tensor) for name, tensor in before.items())
    for second in adapter, TINY:
        with pytest.raises(UserError, match="merge each one first"):
            export.export([str(adapter), str(second)], str(tmp_path / "average"))
    assert not (tmp_path / "average").exists()


def test_a_multimodal_model_keeps_its_other_tensors(tmp_path):
    """To the byte, whichever dtype the text model gets; of an average they must be the same."""
    directory = multimodal(tmp_path / "base", "gemma3")
    export.export([str(directory)], str(tmp_path / "out"), "fp16")
    before, after = raw_tensors(directory), raw_tensors(tmp_path / "out")
    others = pretrained.Contents.of(str(directory)).others
    assert before.keys() == after.keys() and others
    assert {name for name in before if before[name] == after[name]} >= others.keys()
    export.export([str(directory)] * 2, str(tmp_path / "average"))
    assert raw_tensors(tmp_path / "average") == before
    second = tmp_path / "second"
    shutil.copytree(directory, second)
    tensors = load_file(second / "model.safetensors")
    save_file({**tensors, "mtp.norm.weight": torch.ones(32)}, second / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="which is not trained, differs"):
        export.export([str(directory), str(second)], str(tmp_path / "refused"))
    assert not (tmp_path / "refused").exists()


def set_value(value):
    def change(tensors):
        tensors["model.norm.weight"][3] = value
    return change


@pytest.mark.parametrize("value, dtype, part", [(1e6, "fp16", "beyond fp16"), (float("nan"), None, "did the run diverge")])
def test_what_would_not_be_finite_is_refused(value, dtype, part, tmp_path):
    """And leaves nothing behind."""
    model = changed(tmp_path / "model", tensors=set_value(value))
    with pytest.raises(UserError, match=part):
        export.export([model], str(tmp_path / "out"), dtype)
    assert os.listdir(tmp_path) == ["model"]


def test_nothing_is_overwritten(tmp_path, monkeypatch):
    """Neither OUT nor OUT.tmp; too few paths are an error with the usage."""
    for name in "out", "out.tmp":
        (tmp_path / name).mkdir()
        with pytest.raises(UserError, match=f"{name} exists already"):
            export.export([TINY], str(tmp_path / "out"))
        (tmp_path / name).rmdir()
    (tmp_path / "step_3/training_state").mkdir(parents=True)
    os.symlink("step_3", tmp_path / "latest")
    with pytest.raises(UserError, match="inside the step directory .*step_3, which a run may delete"):
        export.export([TINY], str(tmp_path / "latest/out/"))
    with pytest.raises(UserError, match="STEP2"):
        run(monkeypatch, TINY, "--dtype", "bf16")
    with pytest.raises(UserError, match="no model directory"):
        run(monkeypatch, tmp_path, tmp_path / "out")
    directory = changed(tmp_path / "model")
    with open(os.path.join(directory, "README.md"), "w", encoding="utf-8") as f:
        f.write("My words")
    run(monkeypatch, directory, tmp_path / "out")
    assert (tmp_path / "out/README.md").read_text() == "My words"
    assert json.loads((tmp_path / "out/config.json").read_text())
