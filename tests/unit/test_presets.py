"""Presets, the files of configs/, and settings that have no effect because of others."""

import dataclasses
import os
import subprocess
import sys

import pytest
from helpers import ROOT

import chat
import sft
from settings import parser
from settings.parser import check, setting
from tools import plan

DEFAULTS = dataclasses.asdict(sft.Config())
TINY = {"lr": 4e-3, "epochs": 60, "batch_size": 8, "gradient_checkpointing": False, "keep_checkpoints": 2}
FILES = sorted(name for name in os.listdir(os.path.join(ROOT, "configs")) if name.endswith(".yaml"))


def changed(*arguments):
    """What these arguments change: {name: value} and {name: origin} of all settings not at their default."""
    parsed, origins = parser.parse(sft.Config, list(arguments))
    values = {name: value for name, value in dataclasses.asdict(parsed).items() if value != DEFAULTS[name]}
    return values, {name: origins[name] for name in values}


# ------------------------------------------------------------------------------------------------------------
# presets


@pytest.mark.parametrize("arguments, variables, text", [
    (["--model", "tiny"], {}, ""), (["model=tiny"], {}, ""), (["++model.path=tiny"], {}, ""),
    (["--environment"], {"MODEL_PATH": "tiny"}, ""), ([], {}, "model: tiny\n"),
    ([], {}, "model: {partial_pretrain: tiny}\n")], ids=str)
def test_a_preset_is_applied_however_its_model_is_named(arguments, variables, text, monkeypatch, tmp_path):
    """By a flag, an override, the environment or a file, with the name here or verl's. The origin is the preset."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "run.yaml").write_text(text)
    values, origins = changed(*arguments, *(["--config", str(tmp_path / "run.yaml")] if text else []))
    assert values == {"model": "tiny", **TINY}
    assert {origins[name] for name in TINY} == {"preset configs/tiny.yaml"}


def test_only_the_name_of_a_preset_applies_it():
    """Another model has no preset; the path of the same model applies none either. chat.py has no presets."""
    assert changed("--model", "other")[0] == {"model": "other"}
    path = os.path.join(ROOT, "models", "tiny")
    assert changed("--model", path)[0] == {"model": path}
    assert changed("--model", "tiny", "--model", "other")[0] == {"model": "other"}
    assert parser.parse(chat.Config, ["--model", "tiny"])[0] == chat.Config(model="tiny")


def test_only_defaults_have_lower_precedence_than_a_preset(monkeypatch, tmp_path):
    """Flag, environment and file each set one setting; the others come from the preset."""
    monkeypatch.setenv("NUM_EPOCHS", "2")
    (tmp_path / "run.yaml").write_text("batch_size: 4\n")  # the default, but set
    values, origins = changed("--environment", "--model", "tiny", "--lr", "1", "--config",
                              str(tmp_path / "run.yaml"))
    expected = {**TINY, "model": "tiny", "lr": 1.0, "epochs": 2}
    del expected["batch_size"]
    assert values == expected
    assert origins["keep_checkpoints"] == "preset configs/tiny.yaml" and origins["lr"] == "flag --lr"


@pytest.mark.parametrize("arguments", [["--environment", "--epochs", "5"], ["--epochs", "5", "--environment"]])
def test_a_flag_beats_the_environment_wherever_it_stands(arguments, monkeypatch):
    monkeypatch.delenv("CONFIG", raising=False)
    monkeypatch.setenv("NUM_EPOCHS", "2")
    values, origins = changed(*arguments)
    assert values["epochs"] == 5 and origins["epochs"] == "flag --epochs"


def test_a_line_of_a_preset_that_has_no_effect_is_skipped():
    """lora_modules_to_save needs LoRA and does not work with --resume_adapter."""
    assert changed("--model=tiny", "--use_lora")[0]["lora_modules_to_save"] == "embed_tokens"
    for arguments in ["--no-use_lora"], ["--use_lora", "--resume_adapter", "a"]:
        assert "lora_modules_to_save" not in changed("--model=tiny", *arguments)[0]
    # --best of plan.py does not work with --gradient_checkpointing, which the preset switches off
    assert parser.parse(plan.Config, ["--model=tiny", "--ranks", "7"])[0].gradient_checkpointing is False
    assert parser.parse(plan.Config, ["--model=tiny", "--ranks", "7", "--best"])[0].gradient_checkpointing is True


def test_python_and_train_sh_are_the_same_run(tmp_path):
    """Both print the same values and origins."""
    outputs = []
    for start in [sys.executable, "sft.py"], ["./train.sh"]:
        env = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "PYTHON": sys.executable}
        done = subprocess.run([*start, "--model", "tiny", "--explain"], cwd=ROOT, env=env, text=True,
                              capture_output=True, check=True)
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1]
    assert outputs[0].count("preset configs/tiny.yaml") == len(TINY)


# ------------------------------------------------------------------------------------------------------------
# the files of configs/


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_configs_has_only_what_it_changes(name):
    """Each key is a setting with another value than its default."""
    path = os.path.join(ROOT, "configs", name)
    fields = {field.name: field for field in dataclasses.fields(sft.Config)}
    for line in parser.read_yaml(path, fields):
        assert line.name in fields
        value = parser.convert(fields[line.name], line.text, line.origin)
        assert value != DEFAULTS[line.name], line


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_configs_trains(name, train):
    """One step of the embedded model. A line of tiny.yaml needs LoRA; only as a preset is it skipped without."""
    flags = ["--use_lora"] if name == "tiny.yaml" else []
    lines = train("--config", os.path.join(ROOT, "configs", name), "--max_steps", 1, *flags)
    assert [line["step"] for line in lines] == [1]


# ------------------------------------------------------------------------------------------------------------
# settings without effect


@dataclasses.dataclass
class Toy:
    """A program."""

    adapter: bool = setting(False, "", env="ADAPTER")
    rank: int = setting(8, "", env="RANK_OF_IT", low=1, needs="adapter", unless="resume")
    scaled: bool = setting(False, "", needs="adapter", unless="resume")
    resume: str | None = setting(None, "")
    width: int = setting(1, "", needs="scaled or resume")

    def __post_init__(self):
        check(self)


@pytest.mark.parametrize("arguments, message", [
    ("--rank 9", "--rank 9 has no effect without --adapter; add --adapter, or remove it"),
    ("--rank 8", "--rank 8 has no effect without --adapter; add --adapter, or remove it"),  # the default, but set
    ("rank=8", "--rank 8 has no effect without --adapter; add --adapter, or remove it"),
    ("--adapter --no-adapter --rank 8", "--rank 8 has no effect without --adapter; add --adapter, or remove it"),
    ("--width 1", "--width 1 has no effect without --scaled or --resume; add --scaled or --resume, or remove it"),
    ("--adapter --resume a --rank 9", "--rank 9 does not work with --resume; remove one of them"),
    ("--adapter --resume a --rank 8", "--rank 8 does not work with --resume; remove one of them"),
    ("--environment", "RANK_OF_IT=8 has no effect without --adapter; unset it or add --adapter"),
    ("--environment --adapter --resume a", "RANK_OF_IT=8 does not work with --resume; remove one of them"),
], ids=str)
def test_a_setting_must_have_an_effect(arguments, message, monkeypatch):
    """An ignored flag would mislead, even at its default. A value of the environment is named by its
    variable."""
    monkeypatch.setenv("RANK_OF_IT", "8")
    with pytest.raises(ValueError) as caught:
        parser.parse(Toy, arguments.split())
    assert str(caught.value) == message


@pytest.mark.parametrize("arguments", [
    "--adapter --rank 8", "--no-adapter", "--resume none", "--adapter --resume a",
    "--adapter --scaled --width 1", "--adapter --resume a --resume none --rank 8"])
def test_a_setting_with_an_effect_is_accepted(arguments):
    parser.parse(Toy, arguments.split())


def test_a_file_may_have_every_setting(tmp_path):
    """A run's own config.yaml has all settings: at its default, a setting without effect is not an error."""
    path = str(tmp_path / "config.yaml")
    for config in Toy(), Toy(adapter=True, rank=9), Toy(adapter=True, resume="a"):
        parser.write_yaml(config, path)
        assert parser.parse(Toy, ["--config", path])[0] == config
    for wrong in dict(rank=9), dict(adapter=True, rank=9, resume="a"):
        with pytest.raises(ValueError, match="--rank 9 "):
            Toy(**wrong)
    (tmp_path / "config.yaml").write_text("rank: 9\n")
    with pytest.raises(ValueError, match="--rank 9 has no effect without --adapter; add --adapter, or remove it"):
        parser.parse(Toy, ["--config", path])


def test_a_flag_may_reset_a_value_of_a_file(tmp_path):
    """--rank 8, the default, replaces the file's 9, which would be an error with --no-adapter."""
    path = str(tmp_path / "run.yaml")
    (tmp_path / "run.yaml").write_text("adapter: true\nrank: 9\n")
    assert parser.parse(Toy, ["--config", path, "--no-adapter", "--rank", "8"])[0] == Toy()
    with pytest.raises(ValueError, match="--rank 9 has no effect without --adapter; add --adapter, or remove it"):
        parser.parse(Toy, ["--config", path, "--no-adapter"])


def test_switching_off_what_is_off_is_accepted():
    """A script may write out all flags, --no-scaled included."""
    assert parser.parse(Toy, ["--no-scaled"])[0] == Toy()
    assert not parser.parse(Toy, "--adapter --resume a --no-scaled".split())[0].scaled


@pytest.mark.parametrize("name, value", {
    "lora_rank": 8, "lora_alpha": 16, "lora_dropout": 0.1, "lora_targets": "all-linear", "lora_rs": True,
    "lora_dora": True, "lora_modules_to_save": "embed_tokens"}.items())
def test_settings_of_a_new_adapter_do_not_work_with_an_existing_one(name, value):
    """An existing adapter has its own settings, so the flag would be ignored."""
    arguments = ["--use_lora", "--resume_adapter", "a", f"--{name}={value}"]
    with pytest.raises(ValueError, match=f"{name}.* does not work with --resume_adapter"):
        parser.parse(sft.Config, arguments)
    with pytest.raises(ValueError, match=f"{name}.* has no effect without --use_lora"):
        parser.parse(sft.Config, arguments[-1:])
