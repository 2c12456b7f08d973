"""disk/: files round-trip byte for byte, errors name the damaged file, and a kill never costs a checkpoint."""

import itertools
import json
import os
import queue
import re
import shutil
import stat
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoint_helpers import (
    EMBEDDING,
    FIRST,
    HEAD,
    LAST,
    QWEN3,
    Run,
    SIZES,
    TIED,
    TOKENIZER,
    UNTIED,
    adamw,
    change,
    created,
    listing,
    loaded,
    published,
    train_step,
)
from helpers import program, run_all, tensors_of, two_layers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import sft
from disk import checkpoint, files, pretrained, writer
from disk.run import ModelPaths
from families.config import ModelConfig
from model import CausalLM
from ops.attention import Documents
from settings.errors import UserError


@pytest.fixture
def run(tmp_path):
    """A run of the tied model, bf16 on the disk, before its first save."""
    return Run(published(tmp_path / "base", TIED, torch.bfloat16), tmp_path / "checkpoints")


# Round trip: what is saved equals what was read


DIRECTORIES = [(TIED, torch.bfloat16, {}), (QWEN3, torch.float16, {}),
               (UNTIED, torch.float32, {"max_shard_size": "8KB"})]


@pytest.mark.parametrize("config, dtype, saving", DIRECTORIES)
def test_an_untrained_model_is_saved_byte_for_byte(tmp_path, config, dtype, saving):
    """Weight files of transformers, config.json and tokenizer files are byte-identical; the index is equal."""
    source = published(tmp_path / "base", config, dtype, **saving)
    unusual = {**json.loads((source / "config.json").read_text()), "unknown_key": ["é", 1e-05]}
    (source / "config.json").write_text(json.dumps(unusual, indent=3), encoding="utf-8")
    model, shard_map = loaded(source)
    model.requires_grad_(False)  # nothing is trained, so there are no moments to save
    exported = files.read_bytes(source, ["config.json", *pretrained.TOKENIZER_FILES])
    saved = checkpoint.save(tmp_path / "out", 1, model=model, optimizer=adamw(model), shard_map=shard_map,
                            exported=exported, state={})
    weights = [path.name for path in source.glob("*.safetensors")]
    assert len(weights) > 3 if saving else weights == ["model.safetensors"]
    for name in [*weights, "config.json", *TOKENIZER]:
        with open(os.path.join(saved, name), "rb") as f:
            assert f.read() == (source / name).read_bytes(), name
    names = {n for n in os.listdir(saved) if "safetensors" in n}
    assert names == {p.name for p in source.glob("*.safetensors*")}
    if saving:
        index, expected = (files.read_json(f"{d}/model.safetensors.index.json") for d in (saved, source))
        assert index["weight_map"] == expected["weight_map"]
        assert index["metadata"]["total_size"] == expected["metadata"]["total_size"]


@pytest.mark.parametrize("config, dtype, saving", DIRECTORIES)
def test_a_trained_model_loads_with_transformers(tmp_path, config, dtype, saving):
    """latest is a model directory: transformers and CausalLM compute the same logits from it, and not those of
    the untrained model."""
    source = published(tmp_path / "base", config, dtype, **saving)
    Run(source, tmp_path / "out").save(1)
    tokens = torch.arange(40) % SIZES["vocab_size"]
    with torch.no_grad():
        logits = loaded(tmp_path / "out" / "latest")[0](tokens, Documents.of([40]))
        oracle = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "latest", dtype=torch.float32).eval()
        torch.testing.assert_close(logits, oracle(tokens[None]).logits[0], atol=1e-4, rtol=1e-4)
        assert (logits - loaded(source)[0](tokens, Documents.of([40]))).abs().max() > 1e-2


@pytest.mark.parametrize("saving", [{}, {"max_shard_size": "4KB"}])
def test_tied_weights_are_one_storage_and_one_key(tmp_path, saving):
    """After loading and in the saved files: a second copy would be trained separately."""
    source = published(tmp_path / "base", TIED, torch.bfloat16, **saving)
    run = Run(source, tmp_path / "out")
    assert run.model.lm_head.weight is run.model.model.embed_tokens.weight
    assert run.model.lm_head.weight.data_ptr() == run.model.model.embed_tokens.weight.data_ptr()
    keys = list(pretrained.weight_entries(run.save(1)))
    assert EMBEDDING in keys and HEAD not in keys and len(keys) == len(list(run.model.parameters()))


def test_a_head_that_equals_the_embedding_is_accepted_and_saved_once(tmp_path):
    """Some model directories store a tied weight twice."""
    source = published(tmp_path / "base", TIED, torch.bfloat16)
    change(source, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    run = Run(source, tmp_path / "out")
    assert torch.equal(run.model.lm_head.weight, load_file(source / "model.safetensors")[EMBEDDING].float())
    assert HEAD not in pretrained.weight_entries(run.save(1))


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"])
def test_rotary_frequencies_in_a_file_are_ignored(name, tmp_path):
    """Old files store inv_freq. The model computes it, so it is accepted and not saved."""
    source = published(tmp_path / "base", UNTIED)
    change(source, lambda tensors: tensors.update({name: torch.ones(2)}))
    keys = pretrained.weight_entries(Run(source, tmp_path / "out").save(1))
    assert name not in keys and FIRST in keys


# Resume is exact


def test_masters_and_moments_come_back_bitwise(run):
    """The weight files are bf16, but a resumed run gets the fp32 weights back, and its next step is bitwise the
    same."""
    saved = run.save(1)
    with torch.no_grad():
        copy, _ = loaded(saved)
    rounded = {name: p.clone() for name, p in copy.named_parameters()}
    optimizer = adamw(copy)
    checkpoint.load_training_tensors(saved, copy, optimizer)
    # bf16 did lose precision
    assert any(not torch.equal(p, rounded[name]) for name, p in copy.named_parameters())
    for straight, resumed in zip(run.model.parameters(), copy.parameters(), strict=True):
        assert torch.equal(straight, resumed)
        assert set(run.optimizer.state[straight]) == set(optimizer.state[resumed])
        for key, value in run.optimizer.state[straight].items():
            assert torch.equal(value, optimizer.state[resumed][key]), key
    assert optimizer.updates == run.optimizer.updates == 1
    assert copy.lm_head.weight.data_ptr() == copy.model.embed_tokens.weight.data_ptr()
    train_step(run.model, run.optimizer, 2)
    train_step(copy, optimizer, 2)
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), copy.parameters(), strict=True))


def test_state_comes_back_with_its_step_and_updates(run):
    """load_state returns what was passed to save, plus the step and the number of the optimizer's updates (1 here)."""
    assert checkpoint.load_state(run.save(3)) == {"step": 3, "updates": 1, "seed": 7}


def test_updates_equal_steps_in_a_checkpoint_that_does_not_store_them(run):
    """Checkpoints of an older version do not store the number of updates."""
    saved = run.save(3)
    with open(os.path.join(saved, checkpoint.STATE), "w", encoding="utf-8") as f:
        f.write('{"step": 3}')
    checkpoint.load_training_tensors(saved, run.model, run.optimizer)
    assert run.optimizer.updates == 3


def test_masters_are_saved_only_where_the_disk_is_narrower(tmp_path, run):
    """fp32 weight files are the masters already; then training_state/ has only the two moments."""
    other = Run(published(tmp_path / "fp32", UNTIED), tmp_path / "out")
    for any_run, keys in ((run, {"exp_avg", "exp_avg_sq", "master"}), (other, {"exp_avg", "exp_avg_sq"})):
        tensors = load_file(os.path.join(any_run.save(1), "training_state", "tensors.safetensors"))
        assert {name.split(".")[0] for name in tensors} == keys
        assert sum(name.startswith("exp_avg.") for name in tensors) == len(list(any_run.model.parameters()))


@pytest.mark.parametrize("change_of_config", [
    {"num_hidden_layers": 1}, {"num_hidden_layers": 3}, {"intermediate_size": 32}, {"model_type": "llama"}])
def test_training_tensors_of_another_model_are_refused(run, change_of_config):
    """More tensors, fewer, other shapes: the error names the directory, and nothing is restored partially."""
    saved = run.save(1)
    other = CausalLM(ModelConfig.from_dict({**TIED, **change_of_config}))
    before, optimizer = [p.clone() for p in other.parameters()], adamw(other)
    with pytest.raises(UserError, match=re.escape(saved)):
        checkpoint.load_training_tensors(saved, other, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters())) and not optimizer.state


# Errors name the file and the tensor


@pytest.fixture
def source(tmp_path):
    """A valid fp32 directory with one weight file, for a test to damage."""
    return published(tmp_path / "base", UNTIED)


def refusal(directory, error=UserError):
    """The message of the error that loading a directory raises."""
    model = created(directory)
    with pytest.raises(error) as info:
        pretrained.load_weights(model, directory)
    return str(info.value)


def test_missing_tensors_are_named(source):
    """All of them, and the directory. Without the error, random weights would be trained silently."""
    change(source, lambda tensors: [tensors.pop(name) for name in (FIRST, LAST, HEAD)])
    message = refusal(source)
    assert all(word in message for word in ("missing", FIRST, LAST, HEAD, str(source)))
    assert EMBEDDING not in message


def test_unexpected_tensors_are_named(source):
    """A bias that config.json does not mention changes what the model computes, so it must not be dropped."""
    names = ["model.layers.0.self_attn.q_proj.bias", "score.weight"]
    change(source, lambda tensors: tensors.update({name: torch.ones(16) for name in names}))
    message = refusal(source)
    assert all(word in message for word in ("unexpected", *names)) and FIRST not in message


def test_tensors_of_wrong_shape_are_named(source):
    """All of them, each with its shape and the shape that config.json implies."""
    change(source, lambda tensors: tensors.update({FIRST: torch.ones(24, 17), LAST: torch.ones(15)}))
    message = refusal(source)
    expected = (FIRST, "(24, 17)", "(24, 16)", LAST, "(15,)", "(16,)")
    assert [word for word in expected if word not in message] == []


def test_a_transposed_tensor_is_refused(source):
    """It has the right number of elements, so without this check it would be read wrongly, without an error."""
    change(source, lambda tensors: tensors.update({FIRST: tensors[FIRST].T.contiguous()}))
    assert FIRST in refusal(source)


@pytest.mark.parametrize("left", [-1, -1000, 200, 5, 0])
def test_a_truncated_file_is_named(source, left):
    """Truncated within the last tensor, the header, or the header's length; or empty."""
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    assert str(path) in refusal(source)


@pytest.mark.parametrize("content", [
    b"<html>404</html>" * 100, b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_file_that_is_not_safetensors_is_named(source, content):
    """An HTML error page or a git-lfs pointer instead of the weights."""
    (source / "model.safetensors").write_bytes(content)
    assert str(source / "model.safetensors") in refusal(source)


def test_a_file_longer_than_its_header_says_is_named(source):
    """Bytes that belong to no tensor mean that two processes wrote the file."""
    with open(source / "model.safetensors", "ab") as f:
        f.write(b"0" * 8)
    assert str(source / "model.safetensors") in refusal(source)


def test_a_directory_without_weights_is_named(source):
    """FileNotFoundError with the path of the weight file."""
    os.remove(source / "model.safetensors")
    assert str(source / "model.safetensors") in refusal(source, FileNotFoundError)


@pytest.mark.parametrize("dtype, code", [
    (torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.float64, "F64"), (torch.uint8, "U8")])
def test_weights_of_an_unsupported_dtype_are_named(source, dtype, code):
    """Quantised weights without their scales would load as meaningless numbers."""
    change(source, lambda tensors: tensors.update({FIRST: torch.ones(24, 16).to(dtype)}))
    message = refusal(source)
    assert FIRST in message and code in message and str(source) in message


@pytest.fixture
def sharded(tmp_path):
    """A valid directory with several weight files, for a test to damage."""
    return published(tmp_path / "sharded", UNTIED, max_shard_size="8KB")


def edit_index(directory, edit):
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("file", ["../x.safetensors", "/x.safetensors", "a/../x.safetensors"])
def test_an_index_that_leaves_its_directory_is_refused(sharded, file):
    """A downloaded index must not choose which files of the machine are read, not even existing ones."""
    outside = sharded.parent / "x.safetensors"
    shutil.copy(next(sharded.glob("model-*.safetensors")), outside)
    edit_index(sharded, lambda weight_map: weight_map.update({FIRST: file}))
    message = refusal(sharded)
    assert file in message and "index.json" in message


def test_an_index_that_names_tensors_its_files_lack_is_refused(sharded):
    """The error names the tensor."""
    edit_index(sharded, lambda weight_map: weight_map.update({"model.ghost.weight": weight_map[FIRST]}))
    assert "model.ghost.weight" in refusal(sharded)


def test_an_index_that_lacks_tensors_of_its_files_is_refused(sharded):
    """The error names the tensor: index and files are from two versions of the model."""
    edit_index(sharded, lambda weight_map: weight_map.pop(FIRST))
    assert FIRST in refusal(sharded)


def test_a_missing_weight_file_is_named(sharded):
    """As after a download that stopped between two files."""
    path = max(sharded.glob("model-*.safetensors"))
    os.remove(path)
    assert path.name in refusal(sharded)


@pytest.mark.parametrize("content", [b"{'model_type': 'llama'}", b"", b'{"a": 1', b"\xff\xfe{}"])
def test_a_config_that_is_not_json_is_named(source, content):
    """The error contains the path: for single quotes, an empty file, half a file and another encoding."""
    (source / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=re.escape(str(source / "config.json"))):
        files.read_json(source / "config.json")


def test_a_head_that_differs_from_the_embedding_is_a_tensor_of_its_own(tmp_path):
    """Whatever config.json says, as in transformers 5; even if one number differs, at the end. Both are saved."""
    source = published(tmp_path / "base", TIED, torch.bfloat16)
    change(source, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    assert pretrained.tied_in_files(str(source)) is None and ModelPaths.find(str(source)).config.tie_word_embeddings
    change(source, lambda tensors: tensors[HEAD][-1, -1].add_(1))
    theirs = AutoModelForCausalLM.from_pretrained(source)
    assert not torch.equal(theirs.lm_head.weight, theirs.model.embed_tokens.weight)
    model = CausalLM(ModelPaths.find(str(source)).config)
    pretrained.load_weights(model, str(source))
    for name in (HEAD, EMBEDDING):
        assert torch.equal(model.state_dict()[name], theirs.state_dict()[name])


# generation_config.json


@pytest.mark.parametrize("before, after", [
    (5, [5, 9]), ([5, 6], [5, 6, 9]), (None, 9), ([], 9), (9, 9), ([9, 5], [9, 5]), (0, [0, 9])])
def test_generation_config_gains_the_stop_id(tmp_path, before, after):
    """Once, after the existing ids; all other keys are kept."""
    rest = {"temperature": 0.7, "pad_token_id": 3, "transformers_version": "4.37.0"}
    written = rest if before is None else {**rest, "eos_token_id": before}
    (tmp_path / "generation_config.json").write_text(json.dumps(written))
    config = {"eos_token_id": 77}
    assert pretrained.generation_config(tmp_path, config, 9) == {**rest, "eos_token_id": after}
    assert config == {"eos_token_id": 77}


def test_a_missing_generation_config_is_made_from_config_json(tmp_path):
    """Without the file transformers takes the ids from config.json, so the new file must contain them."""
    config = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "hidden_size": 8}
    assert pretrained.generation_config(tmp_path, config, 9) == {"bos_token_id": 1, "eos_token_id": [2, 9]}
    assert pretrained.generation_config(tmp_path, {}, 9) == {"eos_token_id": 9}


# The other files of a model directory


def test_exported_files_of_a_model_and_of_an_adapter(tmp_path):
    """Both get the unchanged tokenizer files, and the chat template if it is the trainer's. A model also gets
    config.json and generation_config.json, an adapter adapter_config.json."""
    base, tokenizer_directory = published(tmp_path / "base", TIED), tmp_path / "tokenizer"
    tokenizer_directory.mkdir()
    (tokenizer_directory / "tokenizer.json").write_bytes(b"{}")
    config = files.read_json(base / "config.json")
    tokenizer = SimpleNamespace(stop_token_id=9, files={})
    assert pretrained.export_files(base, config, base, tokenizer) == {
        **TOKENIZER, "config.json": (base / "config.json").read_bytes(),
        "generation_config.json": pretrained.generation_config(base, config, 9)}
    tokenizer.files = {"chat_template.jinja": b"{{ own }}"}
    assert pretrained.export_files(base, config, tokenizer_directory, tokenizer, {"r": 8}) == {
        "tokenizer.json": b"{}", "adapter_config.json": {"r": 8}, "chat_template.jinja": b"{{ own }}"}


@pytest.mark.parametrize("eos, stop_token_id, expected", [
    (2, None, 2), ([2, 3], None, [2, 3]), (None, None, None), (2, 2, 2), (2, 9, [2, 9]), (None, 9, 9)])
def test_the_token_that_ends_a_turn_is_added_to_eos_token_id(eos, stop_token_id, expected, tmp_path):
    """A template without such a token adds nothing: a null in the list would be no token id."""
    config = {} if eos is None else {"eos_token_id": eos}
    assert pretrained.generation_config(tmp_path, config, stop_token_id)["eos_token_id"] == expected


def test_weight_files_have_the_mode_of_any_new_file(tmp_path):
    """safetensors creates files that only their owner can read. The umask stays as it is."""
    umask = os.umask(0o027)
    try:
        writer.write_safetensors(str(tmp_path / "a.safetensors"), {"a": torch.ones(1)})
    finally:
        umask_after = os.umask(umask)
    assert umask_after == 0o027
    assert stat.S_IMODE(os.stat(tmp_path / "a.safetensors").st_mode) == 0o640


# Saving is atomic: a step directory is complete, or it does not exist


class Killed(BaseException):
    """Stands for a kill: a BaseException, so no handler of Exception catches it."""


def break_at(monkeypatch, count):
    """Let a save's first `count` operations that change the disk succeed and all later ones raise; return their log.
    """
    log = []

    def breaking(operation, name):
        def wrapper(*args, **kwargs):
            if name == "write" and args[0].size:
                return operation(*args, **kwargs)  # only the first write of a file: there is one for each tensor
            log.append(name)
            if len(log) > count:
                raise Killed(name)
            return operation(*args, **kwargs)
        return wrapper

    for holder, name in ((writer.TensorFile, "write"), (files, "write_file"), (files, "sync"),
                         (os, "replace"), (os, "symlink"), (os, "makedirs"), (os, "remove"),
                         (shutil, "rmtree")):
        monkeypatch.setattr(holder, name, breaking(getattr(holder, name), name))
    return log


def test_a_kill_at_any_moment_of_saving_leaves_a_complete_checkpoint(run, monkeypatch):
    """latest moves from one complete step to the next. An incomplete one is never named step_N, and the next save
    removes it."""
    saved, root = run.save(1), run.root
    expected = listing(saved)
    with monkeypatch.context() as patch:
        log = break_at(patch, 10**6)
        run.save(2)
    assert {"write", "write_file", "sync", "replace", "symlink"} <= set(log)
    step, seen = 2, set()
    for moment in range(len(log)):
        previous, step = step, step + 1
        with monkeypatch.context() as patch:
            break_at(patch, moment)
            with pytest.raises(Killed):
                run.save(step)
        latest = os.readlink(root / "latest")
        seen.add((latest == f"step_{step}", step in checkpoint.steps_in(root)))
        assert latest in (f"step_{previous}", f"step_{step}")
        assert checkpoint.load_state(root / latest)["step"] == int(latest.removeprefix("step_"))
        for complete in checkpoint.steps_in(root):
            assert listing(root / f"step_{complete}") == expected, (moment, complete)
        resumed = checkpoint.resume_directory("auto", root)
        model, _ = loaded(resumed)
        checkpoint.load_training_tensors(resumed, model, adamw(model))
        run.save(step)
        assert not [name for name in os.listdir(root) if name.startswith("tmp")]
        assert os.readlink(root / "latest") == f"step_{step}" and checkpoint.steps_in(root)[-1] == step
    # before the first rename, before the second, after
    assert seen == {(False, False), (False, True), (True, True)}


def test_a_save_removes_what_kills_left_at_other_steps(run, monkeypatch):
    """A resumed run may save at other steps. An incomplete checkpoint takes as much disk as a complete one, so it
    must not stay."""
    run.save(1)
    with monkeypatch.context() as patch:
        break_at(patch, 4)
        with pytest.raises(Killed):
            run.save(2)
    (run.root / "tmp_old_step_0").mkdir()
    run.save(3)
    assert sorted(os.listdir(run.root)) == ["latest", "step_1", "step_3"]


def test_a_kill_while_a_step_is_replaced_leaves_no_incomplete_one(run, monkeypatch):
    """A run that resumed from an earlier step saves the same steps again: the old directory is renamed before its
    files are removed."""
    expected = listing(run.save(1))
    run.save(2)
    checkpoint.set_link(run.root, 1)

    def rmtree(path, *_, **__):
        os.remove(os.path.join(path, "model.safetensors"))
        raise Killed(path)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", rmtree)
        with pytest.raises(Killed):
            run.save(2)
    assert all(listing(run.root / f"step_{n}") == expected for n in checkpoint.steps_in(run.root))


def test_saving_a_step_again_replaces_it(run):
    """A run that resumed from an earlier step saves the same steps again; the new directory is complete."""
    stale = run.save(1)
    with open(os.path.join(stale, "stale.txt"), "w"):
        pass
    run.save(1)
    assert "stale.txt" not in listing(stale)
    copy, _ = loaded(stale)
    checkpoint.load_training_tensors(stale, copy, adamw(copy))
    assert all(torch.equal(a, b) for a, b in zip(copy.parameters(), run.model.parameters(), strict=True))


def test_everything_is_flushed_before_it_gets_its_name(run, monkeypatch):
    """Each file and directory of the step is flushed before the step is renamed, and root after latest moved."""
    flushed, renames, real_fsync, real_replace = set(), [], os.fsync, os.replace

    def fsync(handle):
        flushed.add(os.fstat(handle).st_ino)
        real_fsync(handle)

    def replace(old, new):
        renames.append((os.path.basename(new), set(flushed)))
        real_replace(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    saved = run.save(1)
    inside = {os.stat(os.path.join(where, name)).st_ino
              for where, directories, names in os.walk(saved) for name in [".", *directories, *names]}
    assert len(inside) == len(listing(saved)) + 2
    assert [name for name, _ in renames] == ["step_1", "latest"]
    assert inside <= renames[0][1]
    assert run.root.stat().st_ino in flushed - renames[1][1]


def test_latest_is_a_relative_link(run, tmp_path):
    """An output directory can be moved, or copied to another machine."""
    run.save(1)
    run.save(2)
    assert os.readlink(run.root / "latest") == "step_2"
    os.rename(run.root, tmp_path / "moved")
    assert checkpoint.load_state(tmp_path / "moved" / "latest")["step"] == 2


# Pruning, and which directory is resumed


def steps(root, numbers, latest=None):
    """Create directories that look like complete checkpoints."""
    for n in numbers:
        (root / f"step_{n}" / "training_state").mkdir(parents=True)
        (root / f"step_{n}" / "training_state" / "state.json").write_text(json.dumps({"step": n}))
    if latest is not None:
        checkpoint.set_link(root, latest)


def test_steps_are_complete_and_in_numerical_order(tmp_path):
    """9 comes before 10. Temporary names and the user's own files are not steps; a missing root has none."""
    assert checkpoint.steps_in(tmp_path / "absent") == []
    steps(tmp_path, [10, 9, 100], latest=9)
    for name in ("tmp_step_3", "step_4.bak", "step_x", "tmp_prune_1", "step_010", "step_0"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_5").write_text("my notes")
    assert checkpoint.steps_in(tmp_path) == [9, 10, 100]


@pytest.mark.parametrize("keep, left", [(1, [10, 20, 30]), (2, [9, 10, 20, 30]), (4, [2, 8, 9, 10, 20, 30]),
                                        (99, [1, 2, 8, 9, 10, 20, 30])])
def test_pruning_keeps_the_newest_up_to_the_step(tmp_path, keep, left):
    """Later steps stay: this run resumed from step 10, and they belong to the one before. So does latest."""
    steps(tmp_path, [1, 2, 8, 9, 10, 20, 30], latest=10)
    checkpoint.prune(tmp_path, keep, 10)
    assert checkpoint.steps_in(tmp_path) == left
    assert sorted(os.listdir(tmp_path)) == sorted(["latest", *(f"step_{n}" for n in left)])
    assert checkpoint.resume_directory("auto", tmp_path) == os.path.realpath(tmp_path / "step_10")


def test_pruning_keeps_the_best_step(tmp_path):
    """It is not among the newest `keep`."""
    steps(tmp_path, [1, 2, 3, 4], latest=4)
    checkpoint.prune(tmp_path, 1, 4, keep_best_step=2)
    assert checkpoint.steps_in(tmp_path) == [2, 4]


def test_pruning_renames_a_step_before_it_removes_files(tmp_path, monkeypatch):
    """A kill during the removal leaves no step that looks complete."""
    steps(tmp_path, [1, 2], latest=2)

    def rmtree(path):
        raise Killed(path)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    with pytest.raises(Killed):
        checkpoint.prune(tmp_path, 1, 2)
    assert checkpoint.steps_in(tmp_path) == [2]


def test_resume_from_auto_starts_a_new_run_only_without_checkpoints(tmp_path):
    """A missing root, an empty root, and a root with only an incomplete checkpoint."""
    assert checkpoint.resume_directory("auto", tmp_path / "absent") is None
    assert checkpoint.resume_directory("auto", tmp_path) is None
    (tmp_path / "tmp_step_1").mkdir()
    assert checkpoint.resume_directory("auto", tmp_path) is None


def test_resume_from_auto_follows_latest(tmp_path):
    """Even to an older step. Without latest (a kill before the first link) it takes the highest number."""
    steps(tmp_path, [2, 9, 10], latest=9)
    assert checkpoint.resume_directory("auto", tmp_path) == os.path.realpath(tmp_path / "step_9")
    os.remove(tmp_path / "latest")
    assert checkpoint.resume_directory("auto", tmp_path) == os.path.realpath(tmp_path / "step_10")


def test_resume_from_a_directory_takes_that_directory(tmp_path):
    """By its name or by a link to it; the result is the path of the step itself."""
    steps(tmp_path, [1, 2], latest=2)
    for given, step in ((tmp_path / "step_1", "step_1"), (tmp_path / "latest", "step_2")):
        assert checkpoint.resume_directory(str(given), tmp_path) == os.path.realpath(tmp_path / step)


def test_resume_from_a_missing_directory_is_an_error(tmp_path):
    """A dangling latest without a checkpoint and a wrong path must not start a new run."""
    steps(tmp_path, [1], latest=7)
    assert checkpoint.resume_directory("auto", tmp_path) == os.path.realpath(tmp_path / "step_1")
    os.rename(tmp_path / "step_1", tmp_path / "moved")
    with pytest.raises(UserError, match="latest means a checkpoint, but .* has none"):
        checkpoint.resume_directory("auto", tmp_path)
    with pytest.raises(UserError, match="step_5"):
        checkpoint.resume_directory(str(tmp_path / "step_5"), tmp_path)


def test_resume_from_a_model_without_training_state_is_an_error(source, tmp_path):
    """A model directory without training_state/ can only be passed to --model, and the error says so."""
    with pytest.raises(UserError, match=r"training_state.*--model"):
        checkpoint.resume_directory(str(source), tmp_path)


def test_model_directory_names_what_does_not_exist(tmp_path):
    """A path is returned as it is, tiny is in the repository. A mistyped path and an offline hub are one-line errors.
    """
    assert pretrained.model_directory(str(tmp_path)) == str(tmp_path)
    assert "model.safetensors" in os.listdir(pretrained.model_directory("tiny"))
    for name in (str(tmp_path / "absent"), "no-such-owner/no-such-model"):
        with pytest.raises(UserError, match=re.escape(name)):
            pretrained.model_directory(name)


# Memory


QWEN2_5_05B = dict(model_type="qwen2", vocab_size=151936, hidden_size=896, intermediate_size=4864,
                   num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
                   tie_word_embeddings=True)


@pytest.mark.full
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read from Linux's /proc")
def test_loading_half_a_billion_weights_takes_little_memory_beside_them(tmp_path):
    """Shapes of Qwen2.5-0.5B, bf16 on the disk, fp32 in memory: the peak is below 1.1 times the weights. For the
    embedding alone it is below 1.25 times, so no tensor is in memory in both dtypes."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN2_5_05B))
    with torch.device("meta"):
        model = CausalLM(ModelConfig.from_dict(QWEN2_5_05B))
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, p in reversed(list(model.named_parameters())):  # not the model's order
        header[name] = {"dtype": "BF16", "shape": list(p.shape), "data_offsets": [end, end + 2 * p.numel()]}
        end += 2 * p.numel()
    header = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as f:  # a sparse file: a gigabyte of zeros without disk space
        f.write(len(header).to_bytes(8, "little") + header)
        f.truncate(f.tell() + end)
    result = program("loading_memory", tmp_path)
    os.remove(tmp_path / "model.safetensors")
    assert result.returncode == 0, result.stderr
    n_parameters, alone, peak = map(int, result.stdout.split())
    assert n_parameters == 494_032_768
    for n_bytes, measured, limit in ((151936 * 896 * 4, alone, 1.25), (n_parameters * 4, peak, 1.1)):
        assert n_bytes < measured < limit * n_bytes


@pytest.mark.parametrize("text, message", [
    ("[" * 100_000, "is not JSON"), ("1" * 5000, "is not JSON"), ("[]", "weight_map must name files"),
    ("null", "weight_map must name files"), ('{"weight_map": []}', "must be an object"),
    ('{"weight_map": null}', "must be an object"), ('{"weight_map": {"a": []}}', "must be an object"),
    ('{"weight_map": {"a": "b", "c": 1}}', "must be an object")], ids=lambda text: text[:24])
def test_a_malformed_index_is_an_error(tmp_path, text, message):
    """Found by fuzzing: each of these ended in a traceback."""
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=message):
        pretrained.weight_entries(str(tmp_path))


# Writing tensor by tensor


def unusual_tensors():
    """All dtypes, in an order that is not that of a file; a name to be escaped, no dimension, no element, a column."""
    torch.manual_seed(0)
    return {"z": torch.randn(7, 3), 'b "é"\n\\': torch.randn(4).bfloat16(), "a": torch.randn(65, 9).half(),
            "scalar": torch.tensor(2.5), "none": torch.empty(0, 4), "y": torch.arange(9, dtype=torch.uint8),
            "column": torch.randn(6, 5).T}


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("buffer", [2**25, 16])
def test_files_have_the_bytes_of_save_file(tmp_path, monkeypatch, in_memory, buffer):
    """And the thread's sums are those of the files, which nobody has read: with many small buffers, and from memory."""
    monkeypatch.setattr(writer, "BUFFER", buffer)
    tensors = unusual_tensors()
    thread = writer.Writer(str(tmp_path), torch.device("cpu"), in_memory)
    file = thread.open("a.safetensors", {name: (writer.CODES[t.dtype], t.shape) for name, t in tensors.items()})
    for name in file.names:
        thread.submit(file.add, tensors[name], tensors[name].dtype)
    assert not thread.sums
    thread.finish()
    thread.wait()
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "b.safetensors", {"format": "pt"})
    content = (tmp_path / "a.safetensors").read_bytes()
    assert content == (tmp_path / "b.safetensors").read_bytes()
    assert thread.sums == {"a.safetensors": checkpoint.checksum(tmp_path / "a.safetensors")}


class LateStream:
    """A CopyStream whose copies are done when they are waited for, as late as a GPU may do them."""

    def __init__(self, device):
        self.pending, self.sizes = [], []

    def empty(self, size):
        self.sizes.append(4 * size)
        return torch.full((size,), torch.nan)

    def copy(self, target, source):
        self.pending.append((target, source))
        assert len(self.pending) <= 2
        return len(self.pending)

    def wait(self, event):
        target, source = self.pending.pop(0)
        target.copy_(source)


def test_a_buffer_is_filled_while_the_other_one_is_written(monkeypatch):
    """Two buffers for all tensors, whatever their size. A view has its bytes although the next copy has been queued."""
    monkeypatch.setattr(writer, "CopyStream", LateStream)
    monkeypatch.setattr(writer, "BUFFER", 64)
    buffers = writer.Buffers(torch.device("cpu"))
    for n in (1, 15, 16, 17, 1000):
        tensor = torch.randn(n)
        views = [bytes(view) for view in buffers.views(tensor, torch.bfloat16)]
        assert b"".join(views) == bytes(tensor.bfloat16().view(torch.uint8).numpy())
        assert max(map(len, views)) <= 64 and not buffers.stream.pending
    assert buffers.stream.sizes == [64, 64]


def test_the_main_thread_waits_and_gets_the_error_of_the_writing_one(tmp_path):
    """At most one job waits. After an error nothing more is written; `submit`, `wait` and `is_idle` raise it."""
    thread, log, may_go = writer.Writer(str(tmp_path), torch.device("cpu")), [], threading.Event()

    def fail():
        may_go.wait()
        raise OSError(28, "No space left on device", "a file")

    thread.submit(fail)
    thread.submit(log.append, 1)
    with pytest.raises(queue.Full):
        thread.jobs.put((log.append, 2), timeout=0.1)
    assert not thread.is_idle()
    may_go.set()
    with pytest.raises(OSError, match="a file"):
        thread.wait()
    for call in (thread.is_idle, thread.finish, lambda: thread.submit(log.append, 3)):
        with pytest.raises(OSError, match="a file"):
            call()
    assert not log


def test_a_disk_that_hangs_is_an_error(run, monkeypatch):
    """Not a silent hang: the line names the directory."""
    may_go = threading.Event()
    monkeypatch.setattr(writer.Writer, "do_last_jobs", lambda thread: may_go.wait())
    save = checkpoint.start_save(run.root, 1, model=run.model, optimizer=run.optimizer, shard_map=run.shard_map,
                                 exported=run.files, state={}, timeout=0.05)
    with pytest.raises(OSError, match="no rank has written anything for 0.05 s.*tmp_step_1"):
        save.finish()
    may_go.set()
    assert checkpoint.steps_in(run.root) == []


# Checkpoints that are saved can be read


def renamed(source, weight_map_of):
    """Let an index name the weight file of a directory otherwise."""
    name = weight_map_of
    os.rename(source / "model.safetensors", source / name)
    names = list(pretrained.read_header(str(source / name)))
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(
        names, name)}))


@pytest.mark.parametrize("name", ["model-00001-of-00001.safetensors", "adapter_model.safetensors", "x.safetensors",
                                  "model.safetensors", "tensors.safetensors"])
def test_weight_files_of_any_name_are_saved_such_that_they_can_be_read(tmp_path, name):
    """With an index unless the name is the one that needs none; a name of PEFT's does not make it an adapter."""
    source = published(tmp_path / "base", TIED, torch.bfloat16)
    renamed(source, name)
    run = Run(source, tmp_path / "out")
    saved = run.save(1)
    assert name in listing(saved)
    resumed, _ = loaded(saved)
    checkpoint.load_training_tensors(saved, resumed, adamw(resumed))
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), run.model.parameters(), strict=True))
    AutoModelForCausalLM.from_pretrained(saved)


@pytest.mark.parametrize("lost", [EMBEDDING, "exp_avg." + FIRST])
def test_latest_does_not_move_to_a_checkpoint_that_cannot_be_read(run, monkeypatch, lost):
    """A tensor that does not reach its file: the save ends with an error, and latest stays at the step before."""
    run.save(1)
    open_file = writer.Writer.open

    def open_without(thread, name, tensors, metadata=None):
        return open_file(thread, name, {key: value for key, value in tensors.items() if key != lost}, metadata)

    monkeypatch.setattr(writer.Writer, "open", open_without)
    with pytest.raises(AssertionError, match="other tensors than were saved"):
        run.save(2)
    assert os.readlink(run.root / "latest") == "step_1" and checkpoint.steps_in(run.root) == [1]


def test_values_beyond_fp16_are_saved_in_fp32(tmp_path, capsys):
    """They would be inf. Only the tensor that has them is widened, in later saves too, and config.json says float32;
    resume is exact, and transformers reads finite weights in the dtype of config.json."""
    source = published(tmp_path / "base", QWEN3, torch.float16)
    config = json.loads((source / "config.json").read_text())
    assert config["dtype"] == "float16"
    run = Run(source, tmp_path / "out")
    dtypes = {name: entry.dtype for name, entry in pretrained.weight_entries(run.save(1)).items()}
    assert set(dtypes.values()) == {"F16"} and "warning" not in capsys.readouterr().err
    parameter = dict(run.model.named_parameters())[FIRST]
    with torch.no_grad():
        parameter[3, 5] = -1e6
    saved = run.save(2)
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: 1 tensors have values beyond fp16") and FIRST in warning
    with torch.no_grad():
        parameter[3, 5] = 1
    again = run.save(3)
    assert not capsys.readouterr().err
    for directory in (saved, again):
        found = {name: entry.dtype for name, entry in pretrained.weight_entries(directory).items()}
        assert found == {**dtypes, FIRST: "F32"}
    assert files.read_json(os.path.join(saved, "config.json")) == {**config, "dtype": "float32"}
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert all(p.isfinite().all() for p in model.parameters())
    resumed, _ = loaded(again)
    checkpoint.load_training_tensors(again, resumed, adamw(resumed))
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), run.model.parameters(), strict=True))


# Training state in slices


def split_state(saved, edit=lambda metadata: None):
    """Rewrite the training state as two files that have the upper and lower rows of each matrix."""
    path = Path(saved, "training_state", "tensors.safetensors")
    tensors, halves, metadata = load_file(path), ({}, {}), ({}, {})
    for name, tensor in tensors.items():
        for i, part in enumerate(tensor.chunk(2)):
            halves[i][name] = part.contiguous()
            start = i * len(tensor.chunk(2)[0])
            metadata[i][name] = ", ".join([f"{start}:{start + len(part)} of {len(tensor)}",
                                           *(f"0:{size} of {size}" for size in tensor.shape[1:])])
    edit(metadata)
    for i in range(2):
        save_file(halves[i], path.with_name(f"tensors-{i}.safetensors"), metadata[i])
    path.unlink()


def test_slices_are_read_as_one_tensor(run):
    """As an independent writer makes them; whole tensors in several files, as older versions wrote them, too."""
    saved = run.save(1)
    expected = load_file(os.path.join(saved, "training_state", "tensors.safetensors"))
    split_state(saved)
    model, _ = loaded(saved)
    optimizer = adamw(model)
    checkpoint.load_training_tensors(saved, model, optimizer)
    assert torch.equal(model.model.norm.weight, expected[f"master.{LAST}"])
    assert all(torch.equal(optimizer.state[p]["exp_avg"], expected[f"exp_avg.{name}"])
               for name, p in model.named_parameters())
    again = run.save(2)
    path = Path(again, "training_state", "tensors.safetensors")
    tensors = list(load_file(path).items())
    for i in range(3):
        save_file(dict(tensors[i::3]), path.with_name(f"tensors-0000{i + 1}-of-00003.safetensors"), {"format": "pt"})
    path.unlink()
    checkpoint.load_training_tensors(again, model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), run.model.parameters(), strict=True))


@pytest.mark.parametrize("change, message", [
    (lambda text: text.replace("0:", "1:", 1), "shape"), (lambda text: "", "shape"), (lambda text: "9" * 5000, "shape"),
    (lambda text: text.replace("of 24", "of 25"), "do not make up"),
    (lambda text: "12:24 of 24, 0:16 of 16", "do not make up"),
    (lambda text: "12:24 of 12, 0:16 of 16", "shape"), (lambda text: text + ", 0:1 of 1", "shape")])
def test_slices_that_are_not_one_tensor_are_refused(run, change, message):
    """Gaps, parts that are twice, and metadata that does not fit its tensor; the error names the file or directory."""
    saved = run.save(1)
    name = f"exp_avg.{FIRST}"
    split_state(saved, lambda metadata: metadata[0].update({name: change(metadata[0][name])}))
    before = [p.clone() for p in run.model.parameters()]
    with pytest.raises(UserError, match=f"(?s)training_state.*{message}"):
        checkpoint.load_training_tensors(saved, run.model, run.optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters()))


# --async_save


def test_a_kill_at_any_moment_of_a_save_in_the_background_leaves_a_complete_checkpoint(run, monkeypatch):
    """The name and the link come after all writing, and only in `finish`; the next save removes what is left."""
    expected = listing(run.save(1))
    with monkeypatch.context() as patch:
        log = break_at(patch, 10**6)
        run.save(2, in_background=True)
    step = 2
    for moment in range(len(log)):
        previous, step = step, step + 1
        with monkeypatch.context() as patch:
            break_at(patch, moment)
            with pytest.raises(Killed):
                run.save(step, in_background=True)
        latest = os.readlink(run.root / "latest")
        assert latest in (f"step_{previous}", f"step_{step}")
        assert all(listing(run.root / f"step_{n}") == expected for n in checkpoint.steps_in(run.root))
        checkpoint.verify(str(run.root / latest))
        run.save(step, in_background=True)
        assert os.readlink(run.root / "latest") == f"step_{step}"


def test_training_continues_while_a_checkpoint_is_written(train, tmp_path, monkeypatch):
    """Step 3 begins while step 2's checkpoint is written, and latest moves when it is; the next save waits for the one
    before. Checkpoints and metrics are bitwise those of a run without --async_save, which keeps as many."""
    common = ("--lr", "1e-3", "--batch_size", 2, "--max_length", 64, "--max_steps", 8, "--save_steps", 2,
              "--keep_checkpoints", 2)
    straight = train(*common, out="straight")
    log, may_write, do_last_jobs = [], threading.Event(), writer.Writer.do_last_jobs

    def slow_jobs(thread):
        if thread.directory.endswith("step_2"):
            assert may_write.wait(30)
        do_last_jobs(thread)
        log.append(f"written {thread.directory[-1]}")

    def backward(*arguments, **keywords):
        log.append("step")
        if log.count("step") == 4:  # step 4 will save: it must wait for step 2's
            assert not os.path.exists(tmp_path / "out" / "checkpoints" / "latest")
            may_write.set()
        return real_backward(*arguments, **keywords)

    real_backward, move = sft.backward, checkpoint.move_into_place
    monkeypatch.setattr(writer.Writer, "do_last_jobs", slow_jobs)
    monkeypatch.setattr(sft, "backward", backward)
    monkeypatch.setattr(checkpoint, "move_into_place", lambda *arguments: log.append(
        f"moved {arguments[2]}") or move(*arguments))
    lines = train(*common, "--async_save")
    assert log.index("written 2") > [i for i, word in enumerate(log) if word == "step"][3]
    moved = [word for word in log if word.startswith("moved")]
    assert moved == [f"moved {n}" for n in (2, 4, 6, 8)]
    assert all(log.index(f"written {n}") < log.index(f"moved {n}") for n in (2, 4, 6, 8))
    assert [line["loss"] for line in lines] == [line["loss"] for line in straight]
    root = tmp_path / "out" / "checkpoints"
    assert sorted(os.listdir(root)) == ["latest", "step_6", "step_8"] and os.readlink(root / "latest") == "step_8"
    has_settings = {os.path.join(checkpoint.STATE_DIRECTORY, name) for name in ("settings.json", "manifest.json")}
    for step in ("step_6", "step_8"):
        for name in set(listing(root / step)) - has_settings:  # which differ in --async_save and --output_dir
            assert (root / step / name).read_bytes() == (
                tmp_path / "straight" / "checkpoints" / step / name).read_bytes(), name


# Many ranks


def test_checkpoints_of_any_layout_are_read_bitwise_on_any_other(tmp_path):
    """Weights, masters and moments, written by 1, 2, 3 and 4 ranks, with tp, offload, and in the background; each rank
    writes its slices of the training state and no other, all write at the same time, and memory is bounded."""
    two_layers(tmp_path / "model")
    one, two, three, split, both = (tmp_path / name for name in ("one", "two", "three", "split", "both"))
    tp = ("--strategy", "megatron", "--tp", 2)
    layouts = [(1, one, (), ("--optimizer_offload",)), (3, three, (one,), ("--param_offload",)),
               (2, split, (three, one), tp), (4, both, (split, three), tp), (2, two, (both, split), ()),
               (1, tmp_path / "last", (two, both, three, split), ())]
    run_all([(ranks, ("save_on_ranks", out, ",".join(f"{path}{end}/step_1" for path, end in
                                                     zip(reads, itertools.cycle(["", ".background"]))),
                      "--model", tmp_path / "model", *flags)) for ranks, out, reads, flags in layouts], tmp_path)
    expected = [tensors_of(one / "step_1" / folder) for folder in ("", "training_state")]
    for ranks, out, *_ in layouts:
        for directory in (out, Path(f"{out}.background")):
            for folder, tensors in zip(("", "training_state"), expected):
                found = tensors_of(directory / "step_1" / folder)
                assert found.keys() == tensors.keys()
                assert all(torch.equal(found[name], tensors[name]) for name in tensors)
            sizes = [path.stat().st_size for path in (directory / "step_1" / "training_state").glob("tensors*")]
            assert len(sizes) == ranks and max(sizes) < 1.3 * sum(sizes) / ranks  # no slice is written twice
