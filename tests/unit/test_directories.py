"""--model, --tokenizer, --resume_adapter and the other paths: what is downloaded, and one line for what can't be read."""

import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from helpers import EXAMPLES, ROOT, TINY, model_directory, two_layers, write
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file

import chat
import sft
from disk import files, inputs, peft, pretrained
from disk.run import ModelPaths
from families.config import ModelConfig
from settings import errors
from settings.errors import UserError

COMMIT = 40 * "a"
CONFIG = (b'{"model_type": "llama", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, '
          b'"num_attention_heads": 2}')
INDEX = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


# ---- what is downloaded -------------------------------------------------------------------------------------------


class Hub:
    """A hub with one repository, {path: bytes}; downloaded is {path: how often}, calls the names asked for."""

    def __init__(self, cache, repository):
        self.snapshot, self.repository = cache / COMMIT, repository
        self.downloaded, self.calls = {}, []

    def snapshot_download(self, name, *, allow_patterns=None, ignore_patterns=None, revision=None, repo_type=None):
        assert revision in (None, COMMIT)
        self.calls.append(name)
        self.snapshot.mkdir(parents=True, exist_ok=True)
        for path in filter_repo_objects(self.repository, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            if not (self.snapshot / path).exists():
                (self.snapshot / path).parent.mkdir(parents=True, exist_ok=True)
                (self.snapshot / path).write_bytes(self.repository[path])
                self.downloaded[path] = self.downloaded.get(path, 0) + 1
        return str(self.snapshot)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A function: {path: bytes} -> the Hub that huggingface_hub then asks."""

    def make(repository):
        it = Hub(tmp_path / "hub", repository)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", it.snapshot_download)
        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, name: list(it.repository))
        return it

    return make


OTHERS = ["pytorch_model.bin", "model-q4.gguf", "original/consolidated.00.pth", "original/params.json",
          "onnx/model.onnx", "consolidated.safetensors", "params.json", "README.md", "training_args.bin",
          "unet/config.json", "unet/model.safetensors", "model.fp16.safetensors", "optimizer.pt", "modeling_x.py"]


@pytest.mark.parametrize("weights", [["model.safetensors"], SHARDS])
def test_only_the_files_of_the_model_are_downloaded(hub, weights):
    """Of shards, what the index names. No second form of the weights, no folder of another program, no code."""
    wanted = ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", *weights]
    if len(weights) > 1:
        wanted.append(pretrained.INDEX_FILE)
    content = {"config.json": CONFIG, pretrained.INDEX_FILE: INDEX.encode()}
    it = hub({name: content.get(name, b"x") for name in [*wanted, *OTHERS, "model-00003-of-00003.safetensors"]})
    directory = pretrained.model_directory("owner/name")
    assert it.downloaded == dict.fromkeys(wanted, 1)  # each once
    assert directory == str(it.snapshot)


def test_an_adapter_of_the_hub_is_downloaded_without_checkpoints_inside(hub):
    it = hub(dict.fromkeys(["adapter_config.json", "adapter_model.safetensors", "tokenizer.json",
                            "checkpoint-5/adapter_model.safetensors", "adapter_model.bin"], b"{}"))
    pretrained.model_directory("owner/name")
    assert sorted(it.downloaded) == ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"]


@pytest.mark.parametrize("change, message", [
    ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is fp8: .* --quantize nf4"),
    ({"rope_scaling": {"type": "su"}}, "rope scaling")])
def test_what_config_json_rules_out_is_refused_before_the_weights_are_downloaded(hub, change, message):
    it = hub({"config.json": json.dumps({**json.loads(CONFIG), **change}).encode(), "model.safetensors": b""})
    with pytest.raises(UserError, match=f"--model owner/name: .*{message}"):
        pretrained.model_directory("owner/name")
    assert list(it.downloaded) == ["config.json"]


@pytest.mark.parametrize("names, message", [
    (["model-Q4_K_M.gguf"], "is a GGUF file"), (["config.json", "pytorch_model.bin"], "save_pretrained"),
    (["params.json", "consolidated.safetensors", "tekken.json"], "Mistral's or Meta's own form"),
    (["config.json", "pytorch_model-00001-of-00002.bin"], "save_pretrained"), (["README.md"], "has no model.safetensors")])
def test_a_hub_model_without_weights_that_can_be_read_is_one_line(hub, names, message):
    """Nothing of its weights is downloaded."""
    it = hub({name: CONFIG if name == "config.json" else b"x" for name in names})
    with pytest.raises(UserError, match=f"^--model owner/name has no model.safetensors; .*{re.escape(message)}"
                       if message != "has no model.safetensors" else message):
        pretrained.model_directory("owner/name")
    assert set(it.downloaded) <= {"config.json"}


def test_the_tokenizer_of_a_hub_model_comes_without_its_weights(hub, train):
    """--tokenizer ID: the tokenizer's files only."""
    content = {name: open(os.path.join(TINY, name), "rb").read() for name in os.listdir(TINY)}
    it = hub({**content, "tokenizer.model": b"x"})
    train("--max_steps", 1, "--tokenizer", "owner/name", "--max_length", 64)
    assert "model.safetensors" not in it.downloaded and "tokenizer.json" in it.downloaded


@pytest.mark.parametrize("flag", ["--model", "--tokenizer"])
def test_an_unreachable_hub_names_the_setting(flag, monkeypatch):
    def fail(*_, **__):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=f"^{flag} owner/name: .*use {flag} PATH"):
        pretrained.model_directory("owner/name", flag)


# ---- directories that can't be read -------------------------------------------------------------------------------


def directory_with(path, *names, config=CONFIG):
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(config if name.endswith("config.json") else b"{}")
    return path


@pytest.mark.parametrize("names, words", [
    (["config.json", "pytorch_model.bin"], ["AutoModelForCausalLM", "safe_serialization=True", "d-safetensors"]),
    (["config.json", "pytorch_model-00001-of-00003.bin", "pytorch_model.bin.index.json"], ["safe_serialization=True"]),
    (["config.json", *SHARDS], ["model.safetensors.index.json", "missing"]),
    (["config.json", "consolidated.safetensors", "params.json"], ["Mistral's", "Hugging Face's form"]),
    (["params.json", "consolidated.00.pth", "tokenizer.model"], ["no config.json", "Meta's own form"]),
    (["qwen-q4_k_m.gguf"], ["no config.json", "GGUF", "original model"]),
    (["config.json", "qwen-q4_k_m.gguf"], ["GGUF", "original model"]),
    (["config.json", "model.fp16.safetensors"], ["model.fp16.safetensors", "rename"]),
    (["config.json", "global_step10/mp_rank_00_model_states.pt", "zero_to_fp32.py"], ["zero_to_fp32.py", "DeepSpeed"]),
    (["config.json", "model_world_size_2_rank_0.pt"], ["verl.model_merger"]),
    (["pytorch_model_fsdp_0/__0_0.distcp", "pytorch_model_fsdp_0/.metadata"], ["merge-weights"]),
    (["config.json", "model.onnx"], ["model.onnx", "another program"]),
    (["config.json", "weights.npz"], ["weights.npz", "another program"]),
    (["config.json", "checkpoint.pth"], ["checkpoint.pth", "can run code"]),
    (["config.json"], ["no model.safetensors", "Hugging Face's form"]),
    (["readme.txt"], ["no config.json, so it is not a model directory", "outputs/checkpoints/latest"])])
def test_weights_in_another_form_are_named_with_the_way_to_convert_them(tmp_path, names, words):
    """One line each, before anything is read."""
    with pytest.raises(UserError) as info:
        ModelPaths.find(str(directory_with(tmp_path / "d", *names)))
    assert [word for word in words if word not in str(info.value)] == [] and str(info.value).isprintable()


@pytest.mark.parametrize("names, inside", [
    (["checkpoint-900/config.json", "checkpoint-1000/config.json"], "checkpoint-1000"),
    (["checkpoints/step_1/config.json", "checkpoints/latest/config.json"], "checkpoints/latest"),
    (["snapshots/abc/config.json", "refs/main"], "snapshots/abc"), (["hf/config.json"], "hf")])
def test_a_directory_around_a_model_names_the_one_inside(tmp_path, names, inside):
    """A run of this trainer, one of transformers' Trainer, an entry of the hub's cache."""
    path = directory_with(tmp_path / "d", *names)
    with pytest.raises(UserError, match=f"use {re.escape(str(path / inside))}$"):
        ModelPaths.find(str(path))


@pytest.mark.parametrize("name, words", [
    ("model.gguf", ["GGUF"]), ("model.safetensors", ["use its directory"]), ("pytorch_model.bin", ["safe_serialization"]),
    ("config.json", ["use its directory"]), ("notes.txt", ["a directory with config.json"])])
def test_a_file_as_model_is_one_line(tmp_path, name, words):
    path = tmp_path / name
    path.write_bytes(b"")
    with pytest.raises(UserError, match=f"--model {re.escape(str(path))} is a file") as info:
        pretrained.model_directory(str(path))
    assert [word for word in words if word not in str(info.value)] == []


@pytest.mark.parametrize("base", ["Qwen/Qwen2.5-7B", None])
def test_an_adapter_as_model_names_the_way(tmp_path, base):
    """Also where config.json is beside it, as some trainers write it."""
    for names in ([], ["config.json"]):
        path = directory_with(tmp_path / f"d{len(names)}", *names)
        path.mkdir(exist_ok=True)
        (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": base}))
        message = f"use --model {base or 'its base model'} --use_lora --resume_adapter {path}"
        with pytest.raises(UserError, match=re.escape(message)):
            ModelPaths.find(str(path))


QUANTIZED = [{"quant_method": "gptq", "bits": 4}, {"quant_method": "awq"}, {"quant_method": "fp8"}, {"bits": 4},
             {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False},
             {"quant_method": "bitsandbytes", "load_in_8bit": True}, {"quant_method": "compressed-tensors"},
             {"load_in_4bit": True}, {"quant_method": "mxfp4"}, "int8"]


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("value", QUANTIZED, ids=str)
def test_a_quantised_base_is_one_line(key, value):
    """Whichever program quantised it: the original weights and --quantize nf4."""
    with pytest.raises(UserError, match="original weights as --model .*--quantize nf4") as info:
        ModelConfig.from_dict({**json.loads(CONFIG), key: value})
    method = value if isinstance(value, str) else value.get("quant_method", "4")
    assert f"{key} is " in str(info.value) and method in str(info.value)


@pytest.mark.parametrize("value", [None, {}, {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False}])
def test_a_quantization_config_that_is_off_is_accepted(value):
    assert ModelConfig.from_dict({**json.loads(CONFIG), "quantization_config": value}).vocab_size == 8


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float8_e4m3fn, torch.uint8])
def test_quantised_tensors_without_a_word_in_config_json_are_one_line(tmp_path, dtype):
    """As AutoGPTQ's and AutoAWQ's older files: packed integers."""
    path = model_directory(tmp_path / "m", None, lambda tensors: tensors.update(
        {"model.norm.weight": torch.ones(8).to(dtype)}))
    with pytest.raises(UserError, match="model.norm.weight has dtype .*original weights as --model.*--quantize nf4"):
        chat.load(str(path))


def test_a_git_lfs_pointer_is_one_line(tmp_path):
    path = model_directory(tmp_path / "m")
    (path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match="is a pointer of git-lfs, .* run git lfs pull"):
        chat.load(str(path))


def test_missing_shards_are_counted(tmp_path):
    """A download that was interrupted."""
    path = directory_with(tmp_path / "d", "config.json", "tokenizer.json", SHARDS[0])
    (path / pretrained.INDEX_FILE).write_text(INDEX)
    with pytest.raises(UserError, match=f"lists 2 weight files, of which 1 are missing: {SHARDS[1]}; copy them, or"):
        pretrained.weight_entries(str(path))


@pytest.mark.parametrize("names, words", [
    (["tokenizer.model"], ["tokenizer.model", "AutoTokenizer", "sentencepiece"]),
    (["spiece.model", "tokenizer_config.json"], ["spiece.model", "AutoTokenizer"]),
    (["vocab.json", "merges.txt"], ["merges.txt", "AutoTokenizer"]), (["tekken.json"], ["convert_tekken_tokenizer"]),
    (["tokenization_qwen.py", "qwen.tiktoken"], ["is code", "--tokenizer DIR"]), ([], ["--tokenizer DIR"])])
def test_a_tokenizer_in_another_form_names_the_way_to_convert_it(tmp_path, names, words):
    path = directory_with(tmp_path / "d", "config.json", "model.safetensors", *names)
    with pytest.raises(UserError, match="has no tokenizer.json; ") as info:
        ModelPaths.find(str(path))
    assert [word for word in words if word not in str(info.value)] == []


@pytest.mark.full
def test_the_conversion_that_the_error_names_works(tmp_path, monkeypatch):
    """The command makes a directory of equal tensors."""
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "d"
    two_layers(source)
    tensors = load_file(source / "model.safetensors")
    torch.save(tensors, source / "pytorch_model.bin")
    os.remove(source / "model.safetensors")
    with pytest.raises(UserError) as info:
        ModelPaths.find("d")
    command = re.search(r'python (-c ".*?\)")', str(info.value))[1]
    result = subprocess.run(f"{sys.executable} {command}", shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    written = load_file(tmp_path / "d-safetensors" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())


# ---- an adapter and its base --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return two_layers(tmp_path_factory.mktemp("base") / "model-a")


def adapter_of(path, base_name, base, train):
    """A PEFT adapter of `base` whose adapter_config.json names base_name."""
    train("--use_lora", "--max_steps", 1, "--max_length", 64, model=base, out="first")
    shutil.copytree(path / "first" / "checkpoints" / "step_1", path / "adapter")
    config = files.read_json(path / "adapter" / "adapter_config.json")
    (path / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base_name}))
    return path / "adapter"


def test_an_adapter_continues_on_the_same_base_at_another_path(base, train, tmp_path):
    """Equal weights are the same base. With the state of our checkpoint, even if the first path is gone; without it,
    if the model that adapter_config.json names is there. Another model of the same shape is refused, both are named."""
    moved, other = tmp_path / "renamed", two_layers(tmp_path / "model-b", std=0.03)
    shutil.copytree(base, moved)
    flags = ("--use_lora", "--max_steps", 1, "--max_length", 64, "--resume_adapter")
    adapter = adapter_of(tmp_path, "/gone/model-a", base, train)
    assert len(train(*flags, adapter, model=moved)) == 1
    with pytest.raises(UserError, match=f"{adapter} was trained on /gone/model-a, not on --model {other}"):
        train(*flags, adapter, model=other, out="b")
    shutil.rmtree(adapter / "training_state")
    with pytest.raises(UserError, match=f"trained on /gone/model-a, not on --model {moved}, and the weights of .*"
                                        f"set base_model_name_or_path to {moved}"):
        train(*flags, adapter, model=moved, out="a")
    config = files.read_json(adapter / "adapter_config.json")
    for name, model, fits in (str(base), moved, True), (str(base), other, False), (None, moved, True):
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": name}))
        if fits:
            assert peft.check_base(str(adapter), str(model)) is None
        else:
            with pytest.raises(UserError, match=f"{adapter} was trained on {name}, not on --model {model}: their weig"):
                peft.check_base(str(adapter), str(model))


def test_a_model_of_the_same_name_with_other_weights_is_refused(base, train, tmp_path):
    """The path of the base now holds another model."""
    replaced = tmp_path / "model-a"
    adapter = adapter_of(tmp_path, str(base), base, train)
    two_layers(replaced, std=0.03)
    with pytest.raises(UserError, match=f"not on --model {replaced}: their weights differ"):
        train("--use_lora", "--max_steps", 1, "--max_length", 64, "--resume_adapter", adapter, model=replaced)


def test_an_adapter_whose_base_has_moved_names_the_setting(base, train, tmp_path):
    """chat.py and tools/merge.py: --base."""
    adapter = adapter_of(tmp_path, "/gone/model-a", base, train)
    with pytest.raises(UserError, match=f"{adapter} is an adapter of /gone/model-a, .* --base DIR .*--model DIR"):
        chat.load(str(adapter))
    assert chat.load(str(adapter), str(base))


# ---- cheap checks come first --------------------------------------------------------------------------------------


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """A function: flags of sft.py -> the line that it prints, with a model of the hub that must not be asked for."""

    def run(*flags):
        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("a download"))
        monkeypatch.chdir(tmp_path)
        words = ["sft.py", "--model", "owner/name", "--train_data", EXAMPLES, *map(str, flags)]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as stop:
            errors.run(sft.main)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1, error
        return error

    return run


@pytest.mark.parametrize("flags", [
    ("--train_data", "nope.json"), ("--train_data", f"{EXAMPLES},nope.json"), ("--train_data", "nope/"),
    ("--train_data", f"{EXAMPLES}:1,nope.json:2"), ("--train_data", "owner/data,nope.json"),
    ("--val_data", "nope.jsonl"), ("--sample_prompts", "nope.txt"), ("--sample_prompts", "nope.jsonl"),
    ("--tokenizer", "./nope"), ("--tokenizer", "empty"), ("--use_lora", "--resume_adapter", "nope"),
    ("--use_lora", "--resume_adapter", "empty"), ("--resume_from", "nope"), ("--resume_from", "empty"),
    ("--output_dir", "file/out"), ("--sample_prompts", "gbk.txt"), ("--sample_prompts", "gbk.jsonl"),
    ("--sample_prompts", "other.jsonl")],
    ids=lambda flags: " ".join(flags[-2:]).replace(ROOT, ""))
def test_a_wrong_path_is_found_before_a_model_is_downloaded(flags, refused, tmp_path):
    """One line that begins with the setting that was typed and its value."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "gbk.txt").write_bytes("问题".encode("gbk"))
    (tmp_path / "gbk.jsonl").write_bytes('{"prompt": "问题", "response": "答案"}\n'.encode("gbk"))
    (tmp_path / "other.jsonl").write_text('{"a": 1}\n')
    line = refused(*flags)
    value = flags[-1].replace("owner/data,", "").replace(f"{EXAMPLES},", "").replace(f"{EXAMPLES}:1,", "")
    assert line.startswith(f"sft.py: error: {flags[-2]} {value.removesuffix(':2')}"), line


def test_an_output_directory_that_cannot_be_written_is_found_first(refused, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(inputs.tempfile, "TemporaryFile", fail)
    assert "--output_dir out: Read-only file system; " in refused("--output_dir", "out")


def test_ids_of_the_hub_are_not_checked(hub, tmp_path):
    """A dataset would be downloaded for it, whatever its name is followed by."""
    for spec in ("owner/data", "owner/data:0.5,other/data:1"):
        inputs.check_data("--val_data", spec)


@pytest.mark.parametrize("change, message", [
    ({"model_type": "gpt2"}, "--model .*'gpt2' is not supported"), ({"quantization_config": {"bits": 4}}, "--model .*nf4")])
def test_a_local_model_is_checked_too(tmp_path, change, message):
    """By its config.json and the names of its files, before the data is tokenised."""
    cfg = sft.Config(model=str(model_directory(tmp_path / "m", change)), train_data=EXAMPLES, output_dir=str(tmp_path))
    with pytest.raises(UserError, match=message):
        inputs.check(cfg)


# ---- long conversations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions, scaling, limit", [
    (40, None, 40), (20, {"rope_type": "linear", "factor": 2.0}, 40), (10**6, None, None)])
def test_conversations_beyond_the_positions_are_a_warning(positions, scaling, limit, train, tmp_path, capsys):
    """One line with the numbers; none if all are shorter."""
    model = two_layers(tmp_path / "m", max_position_embeddings=positions, rope_scaling=scaling)
    rows = [{"prompt": "a", "response": 100 * "word "}, {"prompt": "b", "response": "c"}]
    train("--max_steps", 1, "--train_data", write(tmp_path / "x.json", rows), model=model)
    lines = [line for line in capsys.readouterr().err.splitlines() if "max_position_embeddings" in line]
    if limit is None:
        assert lines == []
    else:
        assert len(lines) == 1
        expected = rf"warning: 1 of 2 conversations have more than {limit} tokens, .* the longest has \d{{3}}\. .*"
        assert re.fullmatch(expected + rf"--max_length {limit} cuts them", lines[0])


@pytest.mark.parametrize("name, is_wrong", [("./nope.jinja", True), ("nope.jinja", True), ("tool_use", False)])
def test_a_chat_template_is_a_file_or_a_name(name, is_wrong, tmp_path):
    """A name can be checked only with the model's tokenizer."""
    cfg = SimpleNamespace(**{**vars(sft.Config(model="owner/name", train_data=EXAMPLES, output_dir=str(tmp_path))),
                             "chat_template": name})
    if is_wrong:
        with pytest.raises(UserError, match=f"--chat_template {name}: no such file"):
            inputs.check(cfg)
    else:
        inputs.check(cfg)
