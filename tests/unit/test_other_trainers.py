"""settings/other_trainers.py: each name of another trainer says what to type here, and that setting exists."""

import dataclasses
import os
import re

import pytest
from helpers import ROOT

import sft
from settings import other_trainers, parser
from settings.errors import UserError
from settings.other_trainers import EXPLAINED, RENAMED, suggestion

FIELDS = {field.name: field for field in dataclasses.fields(sft.Config)}
ELSEWHERE = {"revision", "local-dir", "n_gpus", "nproc_per_node"}  # of hf download, train.sh and torchrun
NAMES = [name for names in (*RENAMED.values(), *EXPLAINED) for name in names.split()]
KNOWN = """per_device_train_batch_size gradient_accumulation_steps num_train_epochs learning_rate cutoff_len
    max_seq_length dataset_text_field lora_r lora_target_modules lora_target load_in_4bit load_in_8bit flash_attn
    flash_attention attn_implementation deepspeed fsdp neftune_noise_alpha completion_only_loss assistant_only_loss
    template stage finetuning_type bf16 fp16 tf32 report_to warmup_steps sequence_len micro_batch_size train_file
    val_size max_samples model_name_or_path base_model dataset datasets dataset_name lr_scheduler_type optim optimizer
    max_grad_norm sample_packing train_on_inputs logging_steps save_strategy eval_strategy save_total_limit
    val_set_size num_epochs adapter trust_remote_code push_to_hub overwrite_output_dir resize_vocab do_train
    preprocessing_num_workers per_device_eval_batch_size group_by_length use_liger_kernel resume_from_checkpoint
    adapter_name_or_path ddp_timeout mask_history additional_target use_rslora use_dora enable_thinking torch_dtype
    gradient_checkpointing_kwargs load_best_model_at_end wandb_project dataset_dir overwrite_cache weight_decay
    special_tokens chat_template_jinja context_parallel_size streaming adam_beta1 adam_epsilon eval_dataset
    use_peft torch_compile label_smoothing_factor loss_type packed activation_offloading""".split()


@pytest.mark.parametrize("name", sorted({*KNOWN} - {*FIELDS} | {"micro_batch_size"}))
def test_names_that_people_type_are_known(name):
    """Also with other separators or none, in other capitals, and below another key."""
    text = suggestion(name)
    assert text and "\n" not in text
    for typed in ("--" + name.replace("_", "-"), name.replace("_", "."), name.title().replace("_", ""), name.upper()):
        assert suggestion(typed) == text
    assert suggestion(f"training_arguments.{name}") == text


def test_settings_that_suggestions_name_exist():
    """With the values that they name: --quantize nf4 must be a choice."""
    for text in [*RENAMED, *EXPLAINED.values()]:
        for name, value in re.findall(r"--([\w-]+)(?: ([\w,.-]+))?", text):
            field = FIELDS.get(name.removeprefix("no-"))
            assert field or name in ELSEWHERE, f"--{name} in {text!r}"
            choices = field.metadata["choices"] if field else ()
            if choices and value and value not in ("NAME", "lists"):
                assert value.strip(",") in choices, text
        for path in re.findall(r"\b(?:docs|tools)/[\w.]+", text):
            assert os.path.exists(os.path.join(ROOT, path.rstrip("."))), path


@pytest.mark.repo  # a fork may have a setting of such a name
def test_each_name_has_one_suggestion():
    """Lower case, with underscores, at least eighty; no setting of ours but those that mean something else here."""
    assert len(NAMES) == len(set(NAMES)) > 400
    assert [name for name in NAMES if name != name.lower() or "-" in name] == []
    assert set(NAMES) & set(FIELDS) == {"micro_batch_size"}


def test_a_misspelt_name_of_another_trainer_has_a_nearest_setting():
    """The setting is the last one that the suggestion names: --use_lora --quantize nf4 is about quantize."""
    settings = other_trainers.settings()
    assert len(settings) > 150 and "learning_rate" in settings and "optimizer.lr" not in settings
    assert set(settings.values()) <= FIELDS.keys()
    for typed, nearest in (("learing_rate", "lr"), ("load_in_4bits", "quantize"), ("resize_vocabs", "resize_embeddings"),
                           ("disable_gradient_checkpoint", "gradient_checkpointing"), ("ddp_timeouts", "timeout")):
        with pytest.raises(UserError, match=f"unknown setting {typed!r}; the nearest is {nearest!r}"):
            parser.field_name(typed, FIELDS)


@pytest.mark.parametrize("name", ["", "--", "lernrate", "model.path.to.nothing", "x" * 5000, "lora_rr"])
def test_other_names_have_none(name):
    assert suggestion(name) is None


@pytest.mark.parametrize("name, words", [
    ("--per-device-train-batch-size", ["--batch_size", "gradient_accumulation_steps", "number of GPUs"]),
    ("numTrainEpochs", ["--epochs"]), ("trainer.lora_r", ["--lora_rank"]), ("neftune_noise_alpha", ["no NEFTune"]),
    ("micro_batch_size", ["N × max_length tokens", "--batch_size"]),
    ("split_thinking", ["nothing to type", "--split_turns", "--train_reasoning false"]),
    ("dataset.mask_reasoning_content", ["type --train_reasoning false"]), ("train_on_what", ["--split_turns"]),
    ("loss_scale", ["--train_on last", "--train_on_prompt", "ignore_empty_think is --train_reasoning false", "weight"]),
    ("assistant_only_loss", ["happens anyway", "--train_on_prompt"]), ("load_in_4bit", ["--use_lora --quantize nf4"])])
def test_suggestions_say_what_differs(name, words):
    assert [word for word in words if word not in suggestion(name)] == []
