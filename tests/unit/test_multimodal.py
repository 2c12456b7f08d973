"""The text model of a multimodal directory is trained; all else in it is in each checkpoint as it was."""

import itertools
import json
import math
import os
import re
import shutil
import sys
import warnings

import peft
import pytest
import torch
import transformers
from checkpoint_helpers import Run
from helpers import EXAMPLES, first, make_directory, model_directory, run_all, tensors_of
from multimodal_helpers import IS_TEXT, KINDS, READ, SPELLINGS, check_kept, loading_info, multimodal, raw_tensors
from safetensors.torch import load_file, save_file

import chat
from disk import checkpoint, exporting, files, pretrained, saving, shards
from model import generate
from ops.attention import Documents
from settings.errors import UserError
from tools import merge as merging
from tools import plan, show

TOKENS = torch.arange(3, 40)
UNTIED = "mistral3"
SHORT = ("--batch_size", "2", "--max_length", "64", "--max_steps", "2", "--cache_dir", "none")


@pytest.mark.parametrize("kind", READ)
def test_a_checkpoint_has_all_tensors_and_files(train, tmp_path, kind, capsys):
    """The trained ones changed, the others to the byte; transformers loads it as it loads the original."""
    directory = multimodal(tmp_path / "m", kind)
    train(*SHORT, "--lr", "1e-2", model=directory)
    others = pretrained.Contents.of(directory).others.values()
    size = f"{sum(entry.n_bytes for entry in others) / 1e9:.2f}"
    assert f"; its {len(others)} other tensors ({size} GB) are kept\n" in capsys.readouterr().out
    step = tmp_path / "out" / "checkpoints" / "step_2"
    check_kept(directory, step)
    model, info = loading_info(step)
    assert info == loading_info(directory)[1] and not info["missing_keys"]
    with torch.no_grad():
        assert model(input_ids=torch.arange(9)[None]).logits.isfinite().all()


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_and_layout_round_trips_to_the_byte(train, tmp_path, spelling):
    directory = multimodal(tmp_path / "m", UNTIED, spelling, files=3)
    train(*SHORT, "--lr", "0", "--max_steps", "1", model=directory)
    step = tmp_path / "out" / "checkpoints" / "step_1"
    assert raw_tensors(step) == raw_tensors(directory)
    for path in directory.glob("model-*.safetensors"):
        assert path.read_bytes() == (step / path.name).read_bytes()


@pytest.mark.parametrize("in_background", [False, True])
def test_checkpoints_do_not_need_the_directory(tmp_path, in_background):
    """It is removed before the first save, and each checkpoint when the next one is there."""
    directory = multimodal(tmp_path / "m", UNTIED, files=2)
    run = Run(directory, tmp_path / "out")
    original = shutil.copytree(directory, tmp_path / "copy")
    run.files = files.read_bytes(directory, ["config.json", *pretrained.PROCESSOR_FILES])
    shutil.rmtree(directory)
    for step in (1, 2, 3):
        saved = run.save(step, in_background)
        check_kept(original, tmp_path / "out" / f"step_{step}")
        checkpoint.verify(saved)
        shutil.rmtree(tmp_path / "out" / f"step_{step - 1}", ignore_errors=True)


def test_a_source_that_was_overwritten_is_not_copied(tmp_path):
    """With other bytes in the same file, or fewer: no checkpoint, and the error says why."""
    directory = multimodal(tmp_path / "m", UNTIED)
    path = directory / "model.safetensors"
    content = bytearray(path.read_bytes())
    for new in (content[:-1] + bytes([content[-1] ^ 1]), content[:-1]):
        path.write_bytes(content)
        run = Run(directory, tmp_path / f"out{len(new)}")
        with open(path, "wb") as f:
            f.write(new)
        with pytest.raises(UserError, match="model.safetensors has changed|model.safetensors ended while"):
            run.save(1)
        assert checkpoint.steps_in(run.root) == []


def test_after_the_first_save_the_source_is_the_last_checkpoint(tmp_path):
    """So the directory may even be overwritten, and no removed checkpoint's space is held by an open file."""
    directory = multimodal(tmp_path / "m", UNTIED)
    original, run = shutil.copytree(directory, tmp_path / "copy"), Run(directory, tmp_path / "out")
    run.files = files.read_bytes(directory, ["config.json", *pretrained.PROCESSOR_FILES])
    run.save(1)
    with open(directory / "model.safetensors", "r+b") as f:
        f.write(bytes(os.path.getsize(directory / "model.safetensors")))
    run.save(2)
    check_kept(original, tmp_path / "out" / "step_2")
    sources = {os.readlink(f"/proc/self/fd/{tensor.source.fileno()}")
               for copied in run.shard_map.copied.values() for tensor in copied.values()}
    assert sources == {str(tmp_path / "out" / "step_2" / "model.safetensors")}


@pytest.mark.parametrize("spelling", [None, *SPELLINGS])
@pytest.mark.parametrize("kind", KINDS)
def test_the_text_model_is_found(tmp_path, kind, spelling):
    """All tensors of transformers' text-only class, and no others, in each spelling."""
    directory = multimodal(tmp_path / "m", kind, spelling)
    contents = pretrained.Contents.of(directory)
    whole = transformers.AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        text = transformers.AutoModelForCausalLM.from_config(whole.get_text_config())
    tied = {"lm_head.weight"} if whole.tie_word_embeddings else set()
    assert set(contents.entries) == set(text.state_dict()) - tied
    stored = pretrained.stored_entries(directory)
    assert {contents.names.in_files(name) for name in contents.entries} | set(contents.others) == set(stored)
    assert contents.strays == [] and any("vis" in name for name in contents.others)


def test_directories_that_do_not_fit_are_refused(tmp_path):
    """A text tensor is missing, or too much, or quantised; two text models, two heads: the directory's own names."""
    source = multimodal(tmp_path / "m", UNTIED, "language_model.model.")

    def error(name, change):
        directory = shutil.copytree(source, tmp_path / name)
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError) as info:
            chat.load(str(directory))
        return str(info.value)

    norm, head = "language_model.model.norm.weight", "language_model.lm_head.weight"
    assert f"missing ['{norm}'], unexpected nothing" in error("norm", lambda t: t.pop(norm))
    assert f"missing ['{head}'], unexpected nothing" in error("head", lambda t: t.pop(head))
    extra = "language_model.model.layers.2.mlp.up_proj.weight"
    assert f"missing nothing, unexpected ['{extra}']" in error("extra", lambda t: t.update({extra: torch.ones(2)}))
    assert f"{norm} has dtype F8_E4M3" in error("fp8", lambda t: t.update({norm: t[norm].to(torch.float8_e4m3fn)}))
    wide = torch.ones(33)
    assert f"{norm} is (33,), not (32,)" in error("shape", lambda t: t.update({norm: wide}))
    twice = error("twice", lambda t: t.update({name.replace("language_model.", ""): tensor.clone()
                                               for name, tensor in t.items() if "language_model.model" in name}))
    assert "several text models, under language_model.model., model." in twice
    heads = error("heads", lambda t: t.update({"lm_head.weight": t[head].clone()}))
    assert "several heads: language_model.lm_head.weight, lm_head.weight" in heads
    none = error("none", lambda t: [t.pop(name) for name in list(t) if name.startswith("language_model")])
    assert "missing ['lm_head.weight', 'model.language_model.embed_tokens.weight'" in none


def test_without_a_text_config_only_known_extras_are_kept(train, tmp_path):
    """mtp.* of a text model; any other tensor is an error, as it always was."""
    mtp = {"mtp.norm.weight": torch.arange(4).half()}
    directory = model_directory(tmp_path / "m", None, lambda tensors: tensors.update(mtp))
    train(*SHORT, "--max_steps", 1, model=directory)
    saved = tensors_of(tmp_path / "out" / "checkpoints" / "step_1")["mtp.norm.weight"]
    assert torch.equal(saved, mtp["mtp.norm.weight"]) and saved.dtype == torch.float16
    directory = model_directory(tmp_path / "v", None, lambda tensors: tensors.update(
        {"visual.norm.weight": torch.ones(4)}))
    with pytest.raises(UserError, match=r"missing nothing, unexpected \['visual.norm.weight'\]"):
        chat.load(str(directory))


@pytest.mark.full
def test_several_ranks_copy_and_resume(tmp_path):
    """Files as they were, or one for each rank; with --async_save, tensor parallel, offload; then a resume."""
    directory = multimodal(tmp_path / "m", UNTIED, files=2)
    one_file = multimodal(tmp_path / "one", UNTIED)
    flags = (*SHORT, "--lr", "1e-2", "--save_steps", "1", "--keep_checkpoints", "all", "--timeout", "60")
    runs = [(2, ("--model", directory, "--output_dir", "two", *flags, "--async_save")),
            (2, ("--model", one_file, "--output_dir", "split", *flags, "--strategy", "megatron", "--tp", "2")),
            (2, ("--output_dir", "two", "--resume_from", "two/checkpoints/step_1", "--max_steps", "4"))]
    run_all(runs, tmp_path)
    for step in (1, 2, 3, 4):
        check_kept(directory, tmp_path / "two" / "checkpoints" / f"step_{step}")
    saved = tmp_path / "split" / "checkpoints" / "step_2"
    assert len(list(saved.glob("model-*"))) == 2
    check_kept(one_file, saved, same_files=False)
    assert loading_info(saved)[1] == loading_info(one_file)[1]


def full_logits(directory, adapter=None):
    """The logits of transformers' whole model, with PEFT's reading of an adapter."""
    model = loading_info(directory)[0]
    if adapter:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")
            model = peft.PeftModel.from_pretrained(model, adapter)
        adapted = {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A." in name}
        assert adapted and all(".language_model.layers." in name for name in adapted)
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS[None]).logits[0], adapter and len(adapted)


def our_logits(directory, base=None):
    model, _, _ = chat.load(str(directory), base and str(base))
    with torch.no_grad():
        return model(TOKENS, Documents.of([len(TOKENS)]))


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.full] * (kind != "gemma3")) for kind in READ])
@pytest.mark.parametrize("flags, n_layers", first(1, [
    ((), None), (("--lora_targets", "q_proj,layers.1.mlp.down_proj", "--lora_modules_to_save", "embed_tokens,lm_head"), None),
    (("--lora_targets", r"model\.layers\.1\..*(q|v)_proj"), 2)]))
def test_peft_adapts_the_text_model_of_the_whole_one(train, tmp_path, monkeypatch, kind, flags, n_layers):
    """Not the vision tower, which has layers with the same names. And the merged directory has all tensors."""
    directory = multimodal(tmp_path / "m", kind)
    train(*SHORT, "--lr", "1e-2", "--use_lora", *flags, model=directory)
    adapter = tmp_path / "out" / "checkpoints" / "step_2"
    expected, n_adapted = full_logits(directory, adapter)
    assert n_layers in (None, n_adapted)
    base = full_logits(directory)[0]
    assert (expected - base).abs().max() > 1e-2
    torch.testing.assert_close(our_logits(adapter), expected, atol=1e-4, rtol=1e-4)
    train(*SHORT, "--use_lora", "--resume_from", "auto", "--max_steps", 3, model=directory)
    monkeypatch.setattr(exporting, "FILE_BYTES", 100_000)
    merging.merge(merging.Config(adapter=str(adapter), out=str(tmp_path / "merged")))
    before, after = raw_tensors(directory), raw_tensors(tmp_path / "merged")
    assert before.keys() == after.keys()
    assert all(before[name][1:] == after[name][1:] for name in before if not IS_TEXT.fullmatch(name))
    # transformers' own two ways, W x + B A x and (W + B A) x, differ by this rounding
    torch.testing.assert_close(full_logits(tmp_path / "merged")[0], expected, atol=5e-4, rtol=1e-4)
    assert loading_info(tmp_path / "merged")[1] == loading_info(directory)[1]


@pytest.mark.parametrize("kind", READ)
def test_an_adapter_of_peft_continues(train, tmp_path, kind):
    """One of the text model only; one that adapts the vision tower too is refused."""
    directory = multimodal(tmp_path / "m", kind)
    has_other = kind not in ("qwen3_5", "gemma4")  # a vision tower with other names, or with layers that PEFT refuses
    for name, targets in (("text", r".*language_model.*q_proj"), ("both", ["q_proj"]))[: 1 + has_other]:
        model = peft.get_peft_model(loading_info(directory)[0], peft.LoraConfig(
            r=4, target_modules=targets, init_lora_weights=False))
        model.save_pretrained(tmp_path / name)
        config = files.read_json(tmp_path / name / "adapter_config.json")
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(
            {**config, "base_model_name_or_path": str(directory)}))
    expected, _ = full_logits(directory, tmp_path / "text")
    torch.testing.assert_close(our_logits(tmp_path / "text", directory), expected, atol=1e-4, rtol=1e-4)
    if has_other:
        with pytest.raises(UserError, match="only layers of the text model are trained here"):
            train("--use_lora", "--resume_adapter", tmp_path / "both", model=directory)


def test_new_rows_are_in_the_text_config(train, tmp_path):
    """--resize_embeddings; the resumed run, chat.py and transformers find them."""
    directory = multimodal(tmp_path / "m", UNTIED)
    tokenizer = make_directory(tmp_path / "t", None, special=[f"<new_{i}>" for i in range(12)])
    flags = (*SHORT, "--tokenizer", tokenizer, "--resize_embeddings", "--lr", "0", "--weight_decay", "0")
    train(*flags, "--max_steps", 1, model=directory)
    train(*flags, "--max_steps", 2, "--resume_from", "auto", model=directory)
    step, before = tmp_path / "out" / "checkpoints" / "step_2", files.read_json(directory / "config.json")
    expected = {**before, "text_config": {**before["text_config"], "vocab_size": 2060}}
    assert files.read_json(step / "config.json") == expected
    model, info = loading_info(step)
    assert model.get_input_embeddings().weight.shape[0] == 2060 and not info["missing_keys"]
    assert chat.load(str(step))[0].config.vocab_size == 2060
    old, new = raw_tensors(directory), raw_tensors(step)
    assert all(old[name] == new[name] for name in old if not IS_TEXT.fullmatch(name))


def test_the_other_programs_read_such_a_directory(tmp_path, capsys, monkeypatch):
    """tools/plan.py counts the text model; tools/show.py and chat.py read tokenizer and model."""
    directory = str(multimodal(tmp_path / "m", UNTIED))
    plan.plan(plan.Config(model=directory, dtype="fp32"))
    assert re.search(r"^peak .* per rank", capsys.readouterr().out, re.M)
    monkeypatch.setattr(sys, "argv", ["show.py", "show", EXAMPLES, "--model", directory, "-n", "1"])
    show.main()
    assert "---" in capsys.readouterr().out
    model, _, _ = chat.load(directory)
    text = [shape for name, (_, _, shape, _) in raw_tensors(tmp_path / "m").items() if IS_TEXT.fullmatch(name)]
    assert model.n_parameters == sum(map(math.prod, text))
    assert len(list(generate(model, [5, 6, 7], 3, []))) == 3


def test_frozen_parts_of_the_text_model(train, tmp_path):
    """They are copied as the vision tower is, from a file in bf16 and fp32, by a run in bf16."""
    directory = multimodal(tmp_path / "m", UNTIED, files=2)
    train(*SHORT, "--lr", "1e-2", "--dtype", "bf16", "--freeze", "layers.0,embed_tokens", model=directory)
    check_kept(directory, tmp_path / "out" / "checkpoints" / "step_2", frozen=("layers.0.", "embed_tokens"))


def test_values_beyond_fp16_widen_the_dtype_of_both_configs():
    config = {"dtype": "float16", "text_config": {"dtype": "float16", "vocab_size": 1}}
    shard_map = shards.ShardMap({"f": {"w": "F16"}}, {"w": "w"}, {})
    exported = {"config.json": json.dumps(config).encode()}
    saving.widen(shard_map, exported, {"w": torch.tensor([1e6])})
    assert exported["config.json"] == {"dtype": "float32", "text_config": {"dtype": "float32", "vocab_size": 1}}
    assert shard_map.codes == {"f": {"w": "F32"}}


TIES = [pytest.param(kind, marks=() if kind == UNTIED else pytest.mark.full) for kind in READ]


@pytest.mark.parametrize("kind", TIES)
def test_head_and_embedding_are_one_tensor_where_they_are_in_transformers(tmp_path, kind):
    """Whatever config.json and its text_config say; of a head that is in the files, and of one that is not.

    transformers gives a head random values if it is neither in the files nor tied; here the model is refused, except
    for a Qwen3.5 whose text_config alone ties it: that holds for transformers' class of the text model.
    """
    directory, seen = multimodal(tmp_path / "m", kind), set()
    path, config = directory / "model.safetensors", files.read_json(directory / "config.json")
    names, tensors = pretrained.Contents.of(directory).names, load_file(path)
    tensors.pop(names.head, None)
    head = {names.head: torch.randn(2048, 32)}
    for outer, nested, own in itertools.product((None, True, False), (None, True, False), (head, {})):
        values = [dict(part, tie_word_embeddings=tied)
                  for part, tied in ((config, outer), (config["text_config"], nested))]
        for value in values:
            if value["tie_word_embeddings"] is None:
                del value["tie_word_embeddings"]
        (directory / "config.json").write_text(json.dumps(dict(values[0], text_config=values[1])))
        save_file({**tensors, **own}, path, {"format": "pt"})
        theirs, info = loading_info(directory)
        is_tied = theirs.lm_head.weight is theirs.get_input_embeddings().weight
        if info["missing_keys"] and nested and outer is None:
            assert kind == "qwen3_5"
        elif info["missing_keys"]:
            with pytest.raises(UserError, match=r"missing \['(language_model\.)?lm_head"):
                chat.load(str(directory))
        else:
            model, _, _ = chat.load(str(directory))
            assert (model.lm_head.weight is model.model.embed_tokens.weight) == is_tied, (outer, nested, len(own))
            assert torch.equal(model.lm_head.weight, theirs.lm_head.weight)
            seen.add(is_tied)
    assert seen == {True, False}
