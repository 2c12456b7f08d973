"""--resize_embeddings: a tokenizer with more ids than the embedding has rows; new rows are the mean of the old ones."""

import os
import re
import shutil

import peft
import pytest
import torch
from helpers import (
    EXAMPLES,
    LAYOUTS,
    TINY,
    chatml,
    make_directory,
    metrics,
    model_directory,
    run_all,
    tensors_of,
    two_layers,
    write,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import chat
import sft
from disk import files, pretrained
from disk.run import ModelPaths, tokenizer_size
from ops.attention import Documents
from settings.errors import UserError
from tools.merge import Config as MergeConfig
from tools.merge import merge

EMBEDDING, HEAD = pretrained.EMBEDDINGS
NEW = 700  # so many that on four ranks the last one has new rows only
OLD = 2048
KINDS = {"tied": {}, "untied": dict(model_type="llama", tie_word_embeddings=False)}
FLAGS = ("--resize_embeddings", "--max_length", 64, "--batch_size", 4)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Models, a tokenizer with NEW more tokens than they have rows, and data that uses some of them."""
    root = tmp_path_factory.mktemp("resize")
    special = [f"<new_{i}>" for i in range(NEW)]
    found = {kind: two_layers(root / kind, 0.1, **config) for kind, config in KINDS.items()}
    found["tokenizer"] = make_directory(root / "tokenizer", chatml("m.content"), special, eos_token="<|im_end|>")
    rows = [{"prompt": f"what is <new_{i}>", "response": f"it is <new_{NEW - 1 - i}>"} for i in range(8)]
    found["data"] = write(root / "rows.json", rows)
    return found


@pytest.fixture
def resize(inputs, train):
    """A function: kind of model, flags -> the lines of metrics.jsonl."""

    def run(kind, *flags, model=None, **options):
        return train("--tokenizer", inputs["tokenizer"], "--train_data", inputs["data"], *FLAGS, *flags,
                     model=model or inputs[kind], **options)

    return run


def test_the_size_is_that_of_the_tokenizer(inputs):
    """Added tokens count, and gaps between ids."""
    assert tokenizer_size(inputs["tokenizer"]) == OLD + NEW and tokenizer_size(TINY) == OLD


@pytest.mark.parametrize("kind", KINDS)
def test_new_rows_are_the_mean_of_the_old_ones(kind, inputs, resize, tmp_path):
    """Saved so, with the new vocab_size and all else of config.json as it was; old rows are untouched."""
    resize(kind, "--max_steps", 1, "--lr", 0, "--weight_decay", 0)
    before, after = tensors_of(inputs[kind]), tensors_of(tmp_path / "out/checkpoints/step_1")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if name in (EMBEDDING, HEAD):
            mean = tensor.double().mean(0).to(tensor.dtype)
            assert after[name].shape == (OLD + NEW, tensor.shape[1])
            assert torch.equal(after[name][OLD:], mean.expand(NEW, -1))
        assert torch.equal(after[name][: len(tensor)], tensor), name
    config, was = (files.read_json(os.path.join(d, "config.json"))
                   for d in (tmp_path / "out/checkpoints/step_1", inputs[kind]))
    assert config == {**was, "vocab_size": OLD + NEW}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resized_model_trains_resumes_and_loads(kind, resize, inputs, tmp_path):
    """The new rows are trained; a resumed run equals a straight one bitwise; transformers and chat.py read the result."""
    straight = resize(kind, "--max_steps", 4, "--lr", 1e-3, out="straight")
    resize(kind, "--max_steps", 4, "--save_steps", 2, "--lr", 1e-3, out="out")
    shutil.rmtree(tmp_path / "out/checkpoints/step_4")
    resumed = resize(kind, "--max_steps", 4, "--lr", 1e-3, "--resume_from", "out/checkpoints/step_2", out="out")
    assert [line["loss"] for line in resumed] == [line["loss"] for line in straight]
    directories = [tmp_path / run / "checkpoints/step_4" for run in ("straight", "out")]
    one, two = map(tensors_of, directories)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    old = tensors_of(inputs[kind])[EMBEDDING].float()
    assert (one[EMBEDDING][OLD].float() - old.mean(0)).abs().max() > 1e-4  # <new_0> is in the data
    model = AutoModelForCausalLM.from_pretrained(directories[0])
    ids = AutoTokenizer.from_pretrained(directories[0])("<new_699>")["input_ids"]
    assert ids == [OLD + NEW - 1] and model(torch.tensor([ids])).logits.shape == (1, 1, OLD + NEW)
    assert chat.load(str(directories[0]))[0].config.vocab_size == OLD + NEW
    # the flag may stay when a run resumes; without it, it resumes as well
    assert len(resize(kind, "--max_steps", 5, "--no-resize_embeddings", "--lr", 1e-3, "--resume_from", "auto")) == 5


@pytest.mark.full
def test_layouts_agree(inputs, tmp_path, pytestconfig):
    """Each rank reads its own rows and the mean: with lr 0 the saved model is bitwise that of one rank, and losses of
    trained steps are equal."""
    runs, layouts = [], ("dp4", "tp2") if pytestconfig.getoption("--full") else ("tp2",)
    for kind in KINDS:
        for layout in ("one", *layouts):
            ranks, flags = LAYOUTS[layout]
            for lr in "0", "1e-3":
                runs.append((ranks, (
                    "--model", inputs[kind], "--tokenizer", inputs["tokenizer"], "--train_data", inputs["data"],
                    "--max_steps", 2, "--lr", lr, "--weight_decay", 0, *FLAGS, *flags,
                    "--output_dir", tmp_path / f"{kind}_{layout}_{lr}")))
    run_all(runs, tmp_path)
    for kind in KINDS:
        one = tensors_of(tmp_path / f"{kind}_one_0/checkpoints/step_2")
        losses = [line["loss"] for line in metrics(tmp_path / f"{kind}_one_1e-3")]
        for layout in layouts:
            many = tensors_of(tmp_path / f"{kind}_{layout}_0/checkpoints/step_2")
            assert all(torch.equal(many[name], one[name]) for name in one)
            trained = [line["loss"] for line in metrics(tmp_path / f"{kind}_{layout}_1e-3")]
            assert trained == pytest.approx(losses, rel=1e-5)


def test_with_tp_the_rows_are_a_multiple_of_it(inputs):
    """An odd number of ids can't be split in two."""
    paths = ModelPaths.find(str(inputs["tied"]), tokenizer=inputs["tokenizer"])
    cfg = sft.Config(strategy="megatron", tp=3, resize_embeddings=True)
    assert paths.resized(cfg).config.vocab_size == 2748 == 3 * 916  # already a multiple
    cfg = sft.Config(strategy="megatron", tp=5, resize_embeddings=True)
    assert paths.resized(cfg).config.vocab_size == 2750


@pytest.mark.parametrize("kind, modules", [("tied", "embed_tokens"), ("untied", "embed_tokens,lm_head")])
def test_with_lora_the_adapter_has_the_new_rows(kind, modules, resize, inputs, tmp_path):
    """It is resumed, continued and read by chat.py, which find the size in it; PEFT loads it after a resize."""
    flags = ("--use_lora", "--lr", 1e-3)
    added = ("--lora_modules_to_save", modules)
    straight = resize(kind, *flags, *added, "--max_steps", 4, "--save_steps", 2)
    resumed = resize(kind, *flags, *added, "--max_steps", 4, "--resume_from", "out/checkpoints/step_2")
    assert [line["loss"] for line in resumed] == [line["loss"] for line in straight]
    step = tmp_path / "out/checkpoints/step_4"
    rows = {name: entry.shape[0] for name, entry in pretrained.weight_entries(str(step)).items() if "lora" not in name}
    assert rows == {EMBEDDING: OLD + NEW, HEAD: OLD + NEW}
    model = chat.load(str(step), str(inputs[kind]))[0]
    assert model.config.vocab_size == OLD + NEW
    saved = load_file(step / "adapter_model.safetensors")
    assert torch.equal(model.model.embed_tokens.weight, saved[f"base_model.model.{EMBEDDING}"])
    base = AutoModelForCausalLM.from_pretrained(inputs[kind], dtype=torch.float32)
    base.resize_token_embeddings(OLD + NEW)
    theirs = peft.PeftModel.from_pretrained(base, step).eval()
    tokens = torch.tensor([[1, OLD, OLD + NEW - 1, 5]])
    with torch.no_grad():
        ours = model(tokens[0], Documents.of([4]))
        torch.testing.assert_close(ours, theirs(tokens).logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind, modules", [("tied", "embed_tokens"), ("untied", "embed_tokens,lm_head")])
def test_an_adapter_with_new_rows_can_be_merged(kind, modules, resize, inputs, tmp_path):
    """The result is that of the adapter, here and in transformers; a part of the rows is refused."""
    resize(kind, "--use_lora", "--lora_modules_to_save", modules, "--lr", 1e-2, "--max_steps", 2)
    step, merged = tmp_path / "out/checkpoints/step_2", tmp_path / "merged"
    (step / "additional_chat_templates").mkdir()
    for name in ("chat_template.jinja", "additional_chat_templates/rag.jinja"):
        (step / name).write_text(chatml("m.content"), encoding="utf-8")
    merge(MergeConfig(str(step), str(merged)))
    assert (merged / "additional_chat_templates/rag.jinja").exists()
    assert files.read_json(merged / "config.json") == {
        **files.read_json(os.path.join(inputs[kind], "config.json")), "vocab_size": OLD + NEW, "torch_dtype": "float32"}
    rows = {name: tensor.shape[0] for name, tensor in tensors_of(merged).items() if name in (EMBEDDING, HEAD)}
    assert rows == {EMBEDDING: OLD + NEW, **({HEAD: OLD + NEW} if kind == "untied" else {})}
    tokens = torch.tensor([1, OLD, OLD + NEW - 1, 5])
    with torch.no_grad():
        expected = chat.load(str(step), str(inputs[kind]))[0](tokens, Documents.of([4]))
        ours = chat.load(str(merged))[0](tokens, Documents.of([4]))
        theirs = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)(tokens[None]).logits[0]
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(theirs, expected, atol=1e-4, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(merged)("<new_699>")["input_ids"] == [OLD + NEW - 1]

    tensors = load_file(step / "adapter_model.safetensors")
    del tensors[f"base_model.model.{HEAD}"]
    save_file(tensors, step / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="lm_head.weight would have 2048 rows, but another embedding, or config.json, has"):
        merge(MergeConfig(str(step), str(tmp_path / "half")))
    assert not (tmp_path / "half").exists()


@pytest.mark.parametrize("flags, message", [
    (("--use_lora",), "add --lora_modules_to_save embed_tokens,lm_head"),
    (("--use_lora", "--lora_modules_to_save", "embed_tokens"), "add --lora_modules_to_save embed_tokens,lm_head")])
def test_rows_that_an_adapter_would_lose_are_refused(flags, message, resize):
    with pytest.raises(UserError, match=re.escape(message)):
        resize("untied", "--max_steps", 1, *flags)


def test_without_new_tokens_it_has_no_effect(train):
    with pytest.raises(UserError, match="--resize_embeddings has no effect: the tokenizer of .* has 2048 ids, the mod"):
        train("--resize_embeddings", "--train_data", EXAMPLES)


def test_a_file_with_too_few_rows_is_still_refused(tmp_path):
    """The embedding must have the rows that its own config.json says."""
    path = model_directory(tmp_path / "m", {"vocab_size": 2049})
    with pytest.raises(UserError, match=r"embed_tokens.weight is \(2048, 128\), not \(2049, 128\)"):
        chat.load(str(path))
