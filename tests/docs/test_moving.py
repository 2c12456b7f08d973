"""docs/moving.md: each command for this trainer is parsed, and each flag on the page exists."""

import dataclasses
import os
import re
import shlex

import pytest
from helpers import ROOT

from settings import parser
import sft

with open(os.path.join(ROOT, "docs", "moving.md"), encoding="utf-8") as f:
    PAGE = f.read()
BLOCKS = [block.replace("\\\n", " ").strip() for block in re.findall(r"```\n(.*?)```", PAGE, re.DOTALL)]
OURS = [block for block in BLOCKS if re.match(r"\./train\.sh |python sft\.py |torchrun .* sft\.py ", block)]
FIELDS = {field.name for field in dataclasses.fields(sft.Config)}


def arguments_of(command):
    """The arguments of sft.py in a command, without the launcher's."""
    start = r"^(\./train\.sh( --n_gpus \d+)?|python sft\.py|torchrun .* sft\.py) "
    return [argument.replace("$HOME", os.environ["HOME"]) for argument in shlex.split(re.sub(start, "", command))]


@pytest.mark.repo
@pytest.mark.parametrize("command", OURS, ids=range(len(OURS)))
def test_a_command_is_parsed(command, tmp_path, monkeypatch, capsys):
    """It becomes a configuration, each flag sets something, and no warning is printed."""
    monkeypatch.chdir(tmp_path)
    os.makedirs("verl/trainer/config")
    with open("verl/trainer/config/sft_trainer_engine.yaml", "w", encoding="utf-8") as file:
        file.write("trainer: {seed: 1}\n")
    arguments = arguments_of(command)
    _, origins = parser.parse(sft.Config, arguments)
    flags = {argument.lstrip("-").removeprefix("no-") for argument in arguments if re.match(r"--\w", argument)}
    assert all(origins[flag].startswith("flag") for flag in flags - {"config-path", "config-name"})
    assert origins["model"].startswith("flag") and capsys.readouterr().err == ""


@pytest.mark.repo
def test_all_commands_are_found():
    """Four trainers, and for each its own command before the one here."""
    assert re.findall(r"^## (.*)$", PAGE, re.M)[1:] == ["TRL", "torchtune", "verl", "LLaMA-Factory"]
    assert len(OURS) == 8 and len(BLOCKS) > 2 * 6
    assert not any("sft.py" in block for block in set(BLOCKS) - set(OURS))


@pytest.mark.repo
def test_the_command_of_verl_is_accepted_as_it_is():
    """Only the program changes, and the command with this project's own settings means the same."""
    theirs, = [block for block in BLOCKS if "-m verl.trainer" in block]
    as_it_is, in_ours = [block for block in OURS if "gsm8k" in block]
    assert theirs.replace("-m verl.trainer.sft_trainer", "sft.py") == as_it_is
    first, second = (dataclasses.asdict(parser.parse(sft.Config, arguments_of(block))[0])
                     for block in (as_it_is, in_ours))
    home = os.environ["HOME"] + "/"
    assert {name: (first[name], second[name]) for name in first if first[name] != second[name]} == {
        "train_data": (home + second["train_data"], second["train_data"]), "project": ("gsm8k-sft", None),
        "val_data": (home + second["val_data"], second["val_data"]), "run_name": ("qwen", None)}


@pytest.mark.repo
def test_every_flag_on_the_page_exists():
    """In the text and in the second column of each table."""
    inline = re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL)
    named = set()
    for line in inline.splitlines():
        text = line.split("|")[2] if line.startswith("|") else line
        named |= set(re.findall(r"(?<![\w-])--([a-z]\w*)", text))
    theirs = {"use_peft", "lora_r", "learning_rate", "nproc_per_node", "config"}  # quoted from commands of other trainers
    assert named - theirs - {"n_gpus"} <= FIELDS and len(named) > 40


@pytest.mark.parametrize("name, ours", [
    ("learning_rate", "lr"), ("num_train_epochs", "epochs"), ("model_name_or_path", "model"),
    ("dataset_name", "train_data"), ("max_grad_norm", "grad_clip"), ("lr_scheduler_type", "scheduler"),
    ("per_device_train_batch_size", "batch_size"), ("gradient_accumulation_steps", "batch_size"),
    ("save_total_limit", "keep_checkpoints"), ("cutoff_len", "max_length"), ("lora_target", "lora_targets"),
    ("lora_r", "lora_rank"), ("lora_target_modules", "lora_targets"), ("report_to", "logger"),
    ("resume_from_checkpoint", "resume_from"), ("use_peft", "use_lora"), ("use_rslora", "lora_rs"),
    ("use_dora", "lora_dora"), ("load_in_4bit", "quantize"), ("adam_beta2", "beta2"), ("clip_grad_norm", "grad_clip"),
    ("train_on_input", "train_on_prompt"), ("packed", "packing"), ("dataset", "train_data"),
    ("eval_dataset", "val_data"), ("ddp_timeout", "timeout"), ("quantization_bit", "quantize"),
    ("fsdp_cpu_offload", "param_offload"), ("enable_activation_checkpointing", "gradient_checkpointing")])
def test_a_name_of_another_trainer_is_answered_with_the_setting_here(name, ours):
    """If it is typed by habit, the error names the setting here."""
    with pytest.raises(ValueError, match=rf"unknown setting '{name}', which other trainers have: .*--{ours}\b"):
        parser.parse(sft.Config, [f"--{name}", "1"])
