"""verl's configuration files run unchanged: each of their keys sets a setting, prints a warning, or is refused."""

import dataclasses
import os
import sys

import pytest
import yaml
from helpers import ROOT

import chat
import sft
from settings import parser, verl
from settings.errors import UserError

DEFAULTS = dataclasses.asdict(sft.Config())
MAPPED, WARNED, REFUSED = ({key: entry for key, entry in verl.entries().items() if entry["kind"] == kind}
                           for kind in ("mapped", "warned", "refused"))
PROJECT = '"checkpoints/${trainer.project_name}/${trainer.experiment_name}"'
# The keys of verl's five files for SFT (2026-01) and their values there, without comments.
LEGACY = f"""
defaults: [optim: fsdp, _self_]
data: {{train_batch_size: 256, micro_batch_size: null, micro_batch_size_per_gpu: 4,
  train_files: ~/data/gsm8k/train.parquet, val_files: ~/data/gsm8k/test.parquet, train_max_samples: -1,
  val_max_samples: -1, prompt_key: question, response_key: answer, prompt_dict_keys: null,
  response_dict_keys: null, multiturn: {{enable: false, messages_key: messages, tools_key: tools,
  enable_thinking_key: enable_thinking}}, max_length: 1024, truncation: error, balance_dp_token: False,
  chat_template: null, custom_cls: {{path: null, name: null}}, use_shm: False,
  apply_chat_template_kwargs: {{}}}}
model: {{partial_pretrain: google/gemma-1.1-7b-it, use_shm: False, fsdp_config: {{model_dtype: fp32,
  wrap_policy: {{min_num_params: 0}}, cpu_offload: False, offload_params: False}}, external_lib: null,
  enable_gradient_checkpointing: True, trust_remote_code: False, lora_rank: 0, lora_alpha: 16,
  target_modules: all-linear, use_liger: False, strategy: fsdp2}}
optim: {{lr: 1e-5, betas: [0.9, 0.95], weight_decay: 0.01, lr_warmup_steps_ratio: 0.1, clip_grad: 1.0,
  lr_scheduler: cosine}}
ulysses_sequence_parallel_size: 1
use_remove_padding: False
trainer: {{default_local_dir: {PROJECT}, default_hdfs_dir: null, project_name: gsm8k-sft,
  experiment_name: test, total_epochs: 4, total_training_steps: null, logger: ['console', 'wandb'], seed: 1,
  save_freq: -1, test_freq: -1, nnodes: 1, n_gpus_per_node: 8, max_ckpt_to_keep: null, resume_mode: auto,
  resume_from_path: null, checkpoint: {{save_contents: ["model", "optimizer", "extra"],
  load_contents: "${{trainer.checkpoint.save_contents}}"}}, device: cuda}}
"""
ENGINE_SFT = f"""
defaults: [model@model: hf_model, engine@engine: fsdp, optim@optim: fsdp, profiler@profiler: profiler, _self_]
data: {{train_batch_size: 256, micro_batch_size_per_gpu: 4, max_token_len_per_gpu: 8192,
  use_dynamic_bsz: True, train_files: ~/data/gsm8k/train.parquet, val_files: null, train_max_samples: -1,
  val_max_samples: -1, messages_key: messages, tools_key: tools, enable_thinking_key: enable_thinking,
  pad_mode: no_padding, max_length: 1024, truncation: error, balance_dp_token: False,
  custom_cls: {{path: null, name: null}}, use_shm: False, apply_chat_template_kwargs: {{}},
  ignore_input_ids_mismatch: False}}
checkpoint: {{_target_: verl.trainer.config.CheckpointConfig, save_contents: ["model", "optimizer", "extra"],
  load_contents: "${{checkpoint.save_contents}}"}}
trainer: {{default_local_dir: {PROJECT}, default_hdfs_dir: null, project_name: gsm8k-sft,
  experiment_name: test, total_epochs: 4, total_training_steps: null, logger: ['console', 'wandb'], seed: 1,
  save_freq: -1, test_freq: -1, max_ckpt_to_keep: null, resume_mode: auto, resume_from_path: null,
  device: cuda, nnodes: 1, n_gpus_per_node: 1, profile_interval: [-1, -1]}}
"""
MODEL = """
model: {_target_: verl.workers.config.HFModelConfig, path: ~/models/deepseek-llm-7b-chat,
  hf_config_path: null, tokenizer_path: null, use_shm: False, trust_remote_code: False,
  custom_chat_template: null, external_lib: null, override_config: {}, enable_gradient_checkpointing: True,
  enable_activation_offload: False, use_remove_padding: True, lora_rank: 0, lora_alpha: 16,
  target_modules: all-linear, exclude_modules: null, lora_adapter_path: null, use_liger: False,
  use_fused_kernels: False, fused_kernel_options: {impl_backend: torch}, tiled_mlp: {enabled: False,
  num_shards: 4}, mtp: {_target_: verl.workers.config.MtpConfig, enable: False, enable_train: False,
  enable_rollout: False, detach_encoder: False, mtp_loss_scaling_factor: 0.1, speculative_algorithm: EAGLE,
  speculative_num_steps: 3, speculative_eagle_topk: 1, speculative_num_draft_tokens: 4, method: mtp,
  num_speculative_tokens: 1}}
"""
ENGINE = """
engine: {_target_: verl.workers.config.FSDPEngineConfig, wrap_policy: {min_num_params: 0},
  param_offload: false, optimizer_offload: false, offload_policy: false, reshard_after_forward: true,
  fsdp_size: -1, forward_prefetch: False, model_dtype: fp32, use_orig_params: false, seed: 42,
  full_determinism: false, ulysses_sequence_parallel_size: 1, entropy_from_logits_with_chunking: false,
  use_torch_compile: true, entropy_checkpointing: false, forward_only: false, strategy: fsdp, dtype: bfloat16}
"""
OPTIM = """
optim: {_target_: verl.workers.config.FSDPOptimizerConfig, optimizer: AdamW, optimizer_impl: torch.optim,
  lr: 1e-3, lr_warmup_steps_ratio: 0.0, total_training_steps: -1, weight_decay: 0.01, lr_warmup_steps: -1,
  betas: [0.9, 0.999], clip_grad: 1.0, min_lr_ratio: 0.0, num_cycles: 0.5, lr_scheduler_type: constant,
  warmup_style: null, override_optimizer_config: null}
"""
# The keys that these files have since (2026-08); model.lora is in the model file of the Megatron engine.
ADDED = """
data: {enable_thinking_default: none}
model: {truncate_padding: false, lora: {type: lora, merge: False, rank: 0, alpha: 32, dropout: 0.0,
  target_modules: [linear_qkv, linear_proj, linear_fc1, linear_fc2], exclude_modules: [], dropout_position: pre,
  lora_A_init_method: xavier, lora_B_init_method: zero, a2a_experimental: False, dtype: null, adapter_path: null,
  freeze_vision_model: True, freeze_vision_projection: True, freeze_language_model: True}}
engine: {entropy_from_logits_chunk_size: 2048, use_no_sync_for_gradient_accumulation: true, pad_to_length: false,
  pad_to_length_bucket: 1024, qat: {_target_: verl.workers.config.QATEngineConfig, enable: false, mode: w4a16,
  group_size: 16, ignore_patterns: [lm_head, embed_tokens, "re:.*mlp.gate$"], activation_observer: static_minmax,
  quantization_config_path: null}, turbo_config: {distributed: {fully_shard_parallel_size: 16,
  tensor_parallel_size: 1, expert_parallel_size: 1, expert_fully_shard_parallel_size: 1, ulysses_parallel_size: 1,
  fsdp_plan: {param_dtype: bf16, reduce_dtype: fp32, output_dtype: bf16, fsdp_implementation: native,
  num_to_forward_prefetch: 1, num_to_backward_prefetch: 1}}}}
optim: {lr_wsd_stable_steps_ratio: 0.9, zero_indexed_step: true}
trainer: {balance_batch: True}
"""
FILES = {"sft_trainer": (LEGACY, 63), "sft_trainer_engine": (ENGINE_SFT, 39), "model/hf_model": (MODEL, 32),
         "engine/fsdp": (ENGINE, 18), "optim/fsdp": (OPTIM, 14)}


def leaves(text):
    """{a.b.c: value} of a YAML text, without keys that only Hydra reads."""
    values = {}

    def walk(node, name):
        if isinstance(node, dict) and node:
            for key, value in node.items():
                walk(value, f"{name}.{key}".lstrip("."))
        elif name != "defaults" and not name.endswith("_target_"):
            values[name] = node

    walk(yaml.safe_load(text), "")
    return values


KEYS = sorted(set().union(*(leaves(text) for text, _ in FILES.values())))


@pytest.fixture
def parse(tmp_path, monkeypatch, capsys):
    """A function: text of a YAML file, arguments -> (what differs from the defaults, warnings); in tmp_path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "trackio" else name)

    def run(text, *arguments):
        (tmp_path / "verl.yaml").write_text(text, encoding="utf-8")
        parsed, _ = parser.parse(sft.Config, ["--config", "verl.yaml", *arguments])
        values = {k: v for k, v in dataclasses.asdict(parsed).items() if v != DEFAULTS[k]}
        return values, capsys.readouterr().err.splitlines()

    return run


def test_each_of_the_124_keys_has_an_entry():
    """No key of verl's five files is unknown, and the page has all of them."""
    assert [len(leaves(text)) for text, _ in FILES.values()] == [n for _, n in FILES.values()]
    assert len(KEYS) == 124
    page = verl.page()
    for key in KEYS:
        name = verl.entry_name(verl.key_of(key))
        assert name == verl.key_of(key), key
        assert f"| `{name}` |" in page, key


@pytest.mark.repo
def test_the_page_is_printed_from_the_tables():
    """docs/verl.md is up to date, and has a line for each entry."""
    with open(os.path.join(ROOT, "docs", "verl.md"), encoding="utf-8") as f:
        assert f.read() == verl.page() + "\n", "type: python -m settings.verl > docs/verl.md"
    assert verl.page().count("\n| `") == len(verl.entries())


def test_no_key_is_twice_in_the_tables():
    """Of two entries for one key, one would be ignored. All settings that keys set exist."""
    with open(os.path.join(ROOT, "settings", "verl.yaml"), encoding="utf-8") as f:
        root = {key.value: node for key, node in yaml.compose(f).value}
    keys = [key.value for key, _ in root["mapped"].value]
    for kind in "warned", "refused":
        reasons = [key.value for key, _ in root[kind].value]
        assert len(reasons) == len(set(reasons))
        keys += [key.value for _, group in root[kind].value for key, _ in group.value]
    assert sorted(keys) == sorted(verl.entries()) and len(keys) > 200
    assert verl.fields_set() <= set(DEFAULTS)


def test_the_shipped_file_is_accepted_as_it_is(parse):
    """sft_trainer.yaml with verl's two overrides: its settings are set, and there is a warning for each key
    that has no effect."""
    values, warnings = parse(LEGACY, "data.train_files=my.json", "model.partial_pretrain=DIR")
    assert values == dict(
        model="DIR", train_data="my.json", max_length=1024, too_long="error", prompt_key="question",
        response_key="answer", batch_size=256, micro_batch_size=4, epochs=4, seed=1, lr=1e-5,
        strategy="fsdp2",
        output_dir="checkpoints/gsm8k-sft/test", resume_from="auto", save_steps=10**9, project="gsm8k-sft",
        run_name="test", logger="console,wandb", keep_checkpoints=None)
    keys = [line.removeprefix("warning: verl.yaml:").split(" ")[1].rstrip(":") for line in warnings]
    assert keys == ["defaults", "data.val_files", "data.balance_dp_token", "use_remove_padding",
                    "trainer.test_freq",
                    "trainer.n_gpus_per_node"]


def test_the_other_files_are_accepted_as_they_are(parse):
    """The engine trainer's file, joined with the files that Hydra composes into it."""
    values, warnings = parse(ENGINE_SFT + MODEL + ENGINE + OPTIM)
    assert values == dict(
        model=os.path.expanduser("~/models/deepseek-llm-7b-chat"), max_length=1024, too_long="error",
        batch_size=256,
        train_data=os.path.expanduser("~/data/gsm8k/train.parquet"), micro_batch_size=8, epochs=4, seed=1,
        lr=1e-3,
        scheduler="constant", warmup_ratio=0.0, beta2=0.999, dtype="bf16",
        output_dir="checkpoints/gsm8k-sft/test",
        resume_from="auto", save_steps=10**9, project="gsm8k-sft", run_name="test", logger="console,wandb",
        keep_checkpoints=None)
    assert [line.split(" ")[2].rstrip(":") for line in warnings] == [
        "defaults", "data.balance_dp_token", "trainer.test_freq", "engine.use_torch_compile"]


def test_the_keys_added_since_are_accepted_as_they_are(parse):
    """Only the first step of the warm-up differs. Another value of one that counts is refused or a warning."""
    values, warnings = parse(ADDED)
    assert values == {} and len(leaves(ADDED)) == 42
    assert warnings == ["warning: verl.yaml:14 optim.zero_indexed_step: true is not applicable: "
                        "the first of W warm-up steps has the rate lr / W, not 0"]
    for key in "model.lora.rank", "model.lora.adapter_path", "engine.qat.enable":
        with pytest.raises(UserError, match=f"{key}=8: 8 is refused"):
            parse("", f"{key}=8")
    assert parse("", "engine=fsdp", "optim=fsdp") == ({}, [])  # files that Hydra composes
    assert "there is no padding" in parse("", "engine.pad_to_length=true")[1][0]


@pytest.mark.full
def test_a_run_of_the_shipped_file(tmp_path, monkeypatch, capsys):
    """It trains on the example data, which does not have its columns, and on rows that do."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # no wandb: a warning, not an error
    (tmp_path / "sft_trainer.yaml").write_text(LEGACY, encoding="utf-8")
    (tmp_path / "gsm8k.json").write_text('[{"question": "1 + 1?", "answer": "2", "id": 7}]', encoding="utf-8")
    for files, rows in (os.path.join(ROOT, "data", "example_sft.json"), 72), ("gsm8k.json", 1):
        arguments = ["--config-path", ".", "--config-name", "sft_trainer", f"data.train_files={files}",
                 "model.partial_pretrain=tiny", "trainer.total_training_steps=1",
                 f"trainer.experiment_name={rows}"]
        monkeypatch.setattr(sys, "argv", ["sft.py", *arguments])
        sft.main()
        printed = capsys.readouterr()
        assert f"rows     {rows} in = {rows} trained" in printed.out
        assert "wandb is not installed" in printed.err
        assert os.path.isdir(f"checkpoints/gsm8k-sft/{rows}/checkpoints/step_1")
        saved = parser.parse(sft.Config, ["--config", f"checkpoints/gsm8k-sft/{rows}/config.yaml"])[0]
        assert saved == parser.parse(sft.Config, arguments)[0]  # the saved file starts the same run again


def nested(values):
    """{a.b: c} as the text of a YAML file."""
    return "".join(f"{key}: {value}\n" for key, value in values.items())


HOME = os.path.expanduser("~")
MEANINGS = [  # keys of verl in a file -> settings that differ from our defaults
    ({"data.train_files": "[~/a.parquet, b.json]"}, {"train_data": f"{HOME}/a.parquet,b.json"}),
    ({"data.val_files": "~/v.json"}, {"val_data": f"{HOME}/v.json"}),
    ({"data.train_batch_size": 8, "data.max_length": 64}, {"batch_size": 8, "max_length": 64}),
    ({"data.micro_batch_size_per_gpu": 4}, {"micro_batch_size": 4}),
    ({"data.micro_batch_size_per_gpu": 4, "data.use_dynamic_bsz": False, "data.max_token_len_per_gpu": 9000},
     {"micro_batch_size": 4}),
    ({"data.max_token_len_per_gpu": 9000, "data.max_length": 1000},
     {"micro_batch_size": 9, "max_length": 1000}),
    ({"data.use_dynamic_bsz": True, "data.max_token_len_per_gpu": 90, "data.max_length": 100},
     {"max_length": 100}),
    ({"data.max_token_len_per_gpu": "4096.0", "data.max_length": "2e3"}, {"micro_batch_size": 2, "max_length": 2000}),
    ({"engine.tensor_model_parallel_size": "2.0"}, {"tp": 2, "strategy": "megatron"}),
    ({"data.prompt_key": "question", "data.response_key": "answer"},
     {"prompt_key": "question", "response_key": "answer"}),
    ({"data.prompt_key": "extra_info", "data.prompt_dict_keys": "['question']",
      "data.response_key": "extra_info",
      "data.response_dict_keys": "[a, b]"},
      {"prompt_key": "extra_info.question", "response_key": "extra_info.a.b"}),
    ({"data.messages_key": "chat"}, {"messages_key": "chat"}),
    ({"data.multiturn.enable": True, "data.multiturn.messages_key": "chat"}, {"messages_key": "chat"}),
    ({"data.truncation": "error"}, {"too_long": "error"}), ({"data.truncation": "right"}, {}),
    ({"model.partial_pretrain": "~/m"}, {"model": f"{HOME}/m"}), ({"model.path": "m"}, {"model": "m"}),
    ({"model.tokenizer_path": "t"}, {"tokenizer": "t"}),
    ({"model.enable_gradient_checkpointing": False}, {"gradient_checkpointing": False}),
    ({"model.lora_rank": 0, "model.lora_alpha": 16, "model.target_modules": "all-linear"}, {}),
    ({"model.lora_rank": 32, "model.lora_alpha": 64, "model.target_modules": "[q_proj, v_proj]"},
     {"use_lora": True, "lora_rank": 32, "lora_alpha": 64, "lora_targets": "q_proj,v_proj"}),
    ({"model.lora_adapter_path": "~/a", "model.lora_rank": 32},
     {"use_lora": True, "resume_adapter": f"{HOME}/a"}),
    ({"model.strategy": "fsdp2"}, {"strategy": "fsdp2"}), ({"engine.strategy": "fsdp"}, {}),
    ({"actor_rollout_ref.actor.strategy": "fsdp2"}, {"strategy": "fsdp2"}),
    ({"engine.strategy": "megatron", "engine.tensor_model_parallel_size": 2},
     {"strategy": "megatron", "tp": 2}),
    ({"engine.tensor_model_parallel_size": 1}, {}),
    ({"engine.ulysses_sequence_parallel_size": 2}, {"sp": 2}), ({"ulysses_sequence_parallel_size": 4}, {"sp": 4}),
    ({"actor_rollout_ref.actor.megatron.tensor_model_parallel_size": 4}, {"strategy": "megatron", "tp": 4}),
    ({"actor_rollout_ref.actor.fsdp_config.param_offload": True}, {"param_offload": True}),
    ({"actor_rollout_ref.actor.fsdp_config.optimizer_offload": True}, {"optimizer_offload": True}),
    ({"engine.offload_policy": True, "engine.param_offload": False}, {"param_offload": True}),
    ({"model.fsdp_config.cpu_offload": True, "model.fsdp_config.offload_params": False},
     {"param_offload": True}),
    ({"model.fsdp_config.offload_params": "True"}, {"param_offload": True}),
    ({"engine.dtype": "bfloat16"}, {"dtype": "bf16"}), ({"engine.dtype": "float32"}, {"dtype": "fp32"}),
    ({"optim.lr": "1e-3", "optim.betas": "[0.8, 0.999]", "optim.weight_decay": 0, "optim.clip_grad": 2},
     {"lr": 1e-3, "beta1": 0.8, "beta2": 0.999, "weight_decay": 0.0, "grad_clip": 2.0}),
    ({"optim.grad_clip": 3}, {"grad_clip": 3.0}),
    ({"actor_rollout_ref.actor.grad_clip": 3}, {"grad_clip": 3.0}),
    ({"optim.lr_warmup_steps_ratio": 0, "optim.min_lr_ratio": 0.5},
     {"warmup_ratio": 0.0, "min_lr_ratio": 0.5}),
    ({"optim.warmup_steps_ratio": 0.2}, {"warmup_ratio": 0.2}),
    ({"optim.lr_scheduler": "linear"}, {"scheduler": "linear"}),
    ({"actor_rollout_ref.actor.optim.lr_scheduler_type": "constant", "optim.warmup_style": None},
     {"scheduler": "constant"}),
    ({"optim.warmup_style": "constant"}, {"scheduler": "constant"}),
    ({"optim.lr_decay_style": "linear"}, {"scheduler": "linear"}),
    ({"trainer.default_local_dir": "out/${trainer.project_name}-${trainer.experiment_name}",
      "trainer.project_name": "p${optim.lr}", "trainer.experiment_name": "e", "optim.lr": "1.0"},
     {"output_dir": "out/p1.0-e", "project": "p1.0", "run_name": "e", "lr": 1.0}),
    ({"trainer.total_epochs": 9, "trainer.seed": 1}, {"epochs": 9, "seed": 1}),
    ({"trainer.total_training_steps": 70}, {"max_steps": 70}), ({"trainer.total_training_steps": -1}, {}),
    ({"trainer.logger": "[console, file, wandb]"}, {"logger": "console,wandb"}),
    ({"trainer.logger": "file"}, {}),
    ({"trainer.save_freq": -1}, {"save_steps": 10**9}), ({"trainer.save_freq": 50}, {"save_steps": 50}),
    ({"trainer.save_freq": "after_each_epoch", "trainer.test_freq": "after_each_epoch"}, {}),
    ({"trainer.test_freq": 5, "data.val_files": "v"}, {"eval_steps": 5, "val_data": "v"}),
    ({"trainer.max_ckpt_to_keep": 2}, {"keep_checkpoints": 2}),
    ({"trainer.max_actor_ckpt_to_keep": 2}, {"keep_checkpoints": 2}),
    ({"trainer.resume_mode": "auto", "trainer.resume_from_path": None}, {"resume_from": "auto"}),
    ({"trainer.resume_mode": "disable", "trainer.resume_from_path": "d"}, {}),
    ({"trainer.resume_from_path": "d", "trainer.resume_mode": "resume_path"}, {"resume_from": "d"}),
    ({"trainer.resume_mode": "auto", "trainer.resume_path": "d"}, {"resume_from": "d"}),
    ({"actor_rollout_ref.nccl_timeout": 60}, {"timeout": 60}),
]


@pytest.mark.parametrize("given, expected", MEANINGS, ids=lambda case: ",".join(case))
def test_what_a_key_means(given, expected, parse, monkeypatch):
    """Each key sets its setting without a warning. Some keys are read together with others; their order in a
    file does not matter."""
    monkeypatch.setenv("WORLD_SIZE", "4")  # which tp and sp must divide
    assert parse(nested(given)) == (expected, [])
    assert parse(nested(dict(reversed(given.items())))) == (expected, [])


def test_every_mapped_key_has_a_case_above():
    assert {verl.key_of(key) for given, _ in MEANINGS for key in given} >= set(MAPPED)


def example(name):
    """A key that the entry of this name stands for."""
    return name.replace(".*", ".some.key").replace("*", "engine")


def passing(entry):
    """Values of an entry that ask for what happens anyway."""
    examples = {"everything": "extra,model,optimizer", "verl.*": "verl.some.Class", "*": "anything"}
    return [examples.get(word, "1" if word.startswith("$") else word) for word in entry["same"].split()]


@pytest.mark.parametrize("key, value", [("optim.lr_scheduler", "wsd"), ("optim.lr_scheduler_type", "wsd"),
                                        ("optim.warmup_style", "wsd"), ("optim.lr_decay_style", "WSD")])
def test_wsd_is_mapped_with_a_warning(key, value, parse):
    """It decays in other steps here. verl's own share of constant steps, which its files have, passes."""
    changed, [warning] = parse(nested({key: value, "optim.lr_wsd_stable_steps_ratio": 0.9}))
    assert changed == {"scheduler": "wsd"}
    assert f"{key}: {value} is not applicable: --scheduler wsd decays linearly in the last 20 % of the steps" in warning


@pytest.mark.parametrize("name", WARNED)
def test_a_key_that_changes_nothing_is_one_warning(name, parse):
    """No setting changes, and the warning has the place, the key and the reason. A value that asks for what
    happens anyway has no warning."""
    for value in ["null", "{}", *passing(WARNED[name])]:
        assert parse(nested({example(name): value})) == ({}, []), value
    reason = WARNED[name]["note"]
    expected = [f"warning: verl.yaml:1 {example(name)}: odd is not applicable: {reason}"]
    if WARNED[name]["same"] == "*":  # any value passes
        expected = []
    elif name == "defaults":
        return
    assert parse(nested({example(name): "odd"})) == ({}, expected)


@pytest.mark.parametrize("name", REFUSED)
def test_a_value_that_would_change_the_result_is_refused(name, parse):
    """The error has the place, the key and the reason. A value that asks for what happens anyway passes."""
    with pytest.raises(ValueError) as caught:
        parse(nested({example(name): "odd"}))
    assert str(caught.value) == f"verl.yaml:1 {example(name)}: odd is refused: {REFUSED[name]['note']}"
    same = passing(REFUSED[name])
    upper = [] if REFUSED[name]["same"] == "everything" else list(map(str.upper, same))
    for value in ["null", "{}", *same, *upper]:
        assert parse(nested({example(name): value})) == ({}, []), value


@pytest.mark.parametrize("given, say", [
    ({"data.truncation": "left"}, "too_long can't be 'left'; it must be one of truncate, drop, error"),
    ({"optim.lr_scheduler_type": "polynomial"}, "scheduler can't be 'polynomial'; it must be one of cosine"),
    ({"optim.betas": "[0.9]"}, "0.9 can't be read; betas are two numbers"),
    *[({"model.lora_rank": value}, f"model.lora_rank can't be {value!r}; it must be an integer")
      for value in ("big", "8.5", ".inf", "inf", "nan")],
    ({"data.max_token_len_per_gpu": 9}, "needs data.max_token_len_per_gpu and data.max_length; set"),
    ({"data.use_dynamic_bsz": True, "data.max_length": 9},
     "needs data.max_token_len_per_gpu and data.max_length"),
    ({"engine.dtype": "float16"}, "dtype can't be 'float16'; it must be one of bf16, fp32"),
    ({"engine.strategy": "veomni"}, "strategy can't be 'veomni'; it must be one of fsdp, fsdp2, megatron"),
    ({"trainer.resume_mode": "resume_path"}, "resume_path needs trainer.resume_from_path=DIR"),
    ({"trainer.resume_mode": "never"}, "'never'; it must be auto, disable or resume_path"),
    ({"trainer.total_epochs": "x"}, "epochs can't be 'x'; it must be a number"),
    ({"data.train_batch_size": 0}, "--batch_size 0: it must be at least 1"),
    ({"trainer.default_local_dir": "a/${optim.lr}"}, r"\$\{optim.lr\} has no value; write it out"),
    ({"trainer.default_local_dir": "${oc.env:HOME}/a"}, r"\$\{oc.env:HOME\} has no value"),
    ({"trainer.project_name": "${trainer.experiment_name}",
      "trainer.experiment_name": "${trainer.project_name}"},
     "has no value"),
    ({"optim.lr_scheduler": "cosine", "optim.lr_scheduler_type": "constant"},
     "verl.yaml:2 optim.lr_scheduler_type: scheduler is constant here, and cosine at verl.yaml:1 "
     "optim.lr_scheduler"),
    ({"engine.strategy": "fsdp", "engine.tensor_model_parallel_size": 2},
     "strategy is megatron here, and fsdp at"),
    ({"trainer.seed": 1, "seed": 2},
     "verl.yaml:2: seed is 2 here, and 1 at verl.yaml:1 trainer.seed; remove one of them"),
    ({"trainer.totl_epochs": 1}, "verl.yaml:1: unknown setting 'trainer.totl_epochs'; the nearest is "
                                 "'trainer.total_epochs'"),
    ({"engine.param_ofload": True}, "the nearest is 'engine.param_offload'"),
    ({"data.new_key": 1}, "unknown setting 'data.new_key'"),
], ids=str)
def test_a_value_that_can_not_be_read(given, say, parse):
    """An error of one line with the place in the file, the value, and the rule or what to type."""
    with pytest.raises(ValueError, match=say) as caught:
        parse(nested(given))
    assert "\n" not in str(caught.value)
    start = "--batch_size 0" if "data.train_batch_size" in given else "verl.yaml:"
    assert str(caught.value).startswith(start)


@pytest.mark.parametrize("given, warning", [
    ({"data.val_files": "~/data/gsm8k/test.parquet"},
     "~/data/gsm8k/test.parquet is verl's example and not on this"),
    ({"model.lora_rank": 0, "model.lora_alpha": 64},
     "model.lora_alpha: 64 is not applicable: model.lora_rank is 0"),
    ({"model.lora_rank": 0, "model.target_modules": "[q_proj]"},
     "q_proj is not applicable: model.lora_rank is 0"),
    ({"trainer.logger": "[console, mlflow]"}, "mlflow is not applicable: metrics.jsonl has every number"),
    ({"trainer.logger": "trackio"}, "trackio is not installed (pip install trackio)"),
    ({"engine.strategy": "megatron"},
     "it does the same as fsdp unless engine.tensor_model_parallel_size is above 1"),
    ({"trainer.test_freq": -1}, "-1 is not applicable: validation runs after each epoch"),
    ({"defaults": "[_self_, {optim: fsdp}]"}, "the files that it lists are not read"),
    ({"trainer.n_gpus_per_node": 8}, "8 is not applicable: the launcher decides: ./train.sh --n_gpus N"),
    ({"checkpoint.save_contents": "[hf_model]"}, "hf_model is not applicable: a checkpoint always has everything"),
], ids=str)
def test_a_request_that_is_not_met_is_one_warning(given, warning, parse):
    """Values that can't be applied but do not change the result."""
    values, warnings = parse(nested(given))
    assert values == {}
    assert len(warnings) == 1 and warning in warnings[0], warnings


def test_the_command_line_has_precedence_over_the_file(parse):
    """If a flag overrides a key of the file, the file's value causes neither a warning nor an error."""
    assert parse("model.lora_rank: 0\nmodel.lora_alpha: 64\n", "model.lora_rank=8") == (
        {"use_lora": True, "lora_alpha": 64}, [])
    assert parse("model: {lora_rank: 8, lora_alpha: 16}\n", "++model.lora_rank=0") == ({}, [])
    assert parse("data.truncation: left\n", "data.truncation=right") == ({}, [])
    assert parse("model.trust_remote_code: True\n", "--model.trust_remote_code", "False") == ({}, [])
    assert parse("use_remove_padding: False\n", "+use_remove_padding=True") == ({}, [])
    for file in "trainer.max_ckpt_to_keep: 2\n", "keep_checkpoints: 2\n":  # null keeps all
        assert parse(file, "trainer.max_ckpt_to_keep=null") == ({"keep_checkpoints": None}, [])
    assert parse("engine.offload_policy: True\n", "engine.offload_policy=False") == ({}, [])
    assert parse("trainer: {project_name: a, default_local_dir: 'o/${trainer.project_name}'}\n",
                 "trainer.project_name=b") == ({"project": "b", "output_dir": "o/b"}, [])
    for flag, key in ("--seed=3", "trainer.seed=4"), ("--use_lora", "model.lora_rank=8"):
        assert parse("", flag, key) != parse("", "--max_steps", "1")
    # of two flags the later counts
    assert parse("", "--seed=3", "trainer.seed=4")[0] == {"seed": 4} != parse("", "trainer.seed=4",
                                                                              "--seed=3")[0]


def test_lists_and_plus_signs_of_hydra(parse):
    """[a,b], ['a','b'] and +a.b on the command line are read like a list and a key of a file."""
    for word in ("trainer.logger=[console,wandb]", "++trainer.logger=['console', 'wandb']",
                 '--trainer.logger=["console","wandb"]', "logger=[console,wandb]", "--logger=console,wandb"):
        assert parse("", word) == ({"logger": "console,wandb"}, []), word
    assert parse("", "optim.betas=[0.8,0.9]", "+data.train_files=[a.json]") == (
        {"beta1": 0.8, "beta2": 0.9, "train_data": "a.json"}, [])
    assert parse("", "--lora_targets", "[qv]", "--use_lora")[0]["lora_targets"] == "[qv]"  # not a list


def test_numbers_of_ranks_that_are_true_have_no_warning(parse, monkeypatch):
    """n_gpus_per_node and nnodes pass if torchrun has started that many. Only rank 0 prints warnings."""
    text = nested({"trainer.n_gpus_per_node": 8, "trainer.nnodes": 2})
    assert len(parse(text)[1]) == 2
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert parse(text + "use_remove_padding: False\n") == ({}, [])
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    assert parse(text) == ({}, [])


def test_explain_names_the_key_of_the_file(parse, capsys):
    """The origin of a value that a key of verl sets is the line and the key."""
    with pytest.raises(SystemExit):
        parse("# mine\noptim:\n  lr: 1e-3\n  betas: [0.9, 0.999]\n", "trainer.seed=3", "--explain")
    lines = {line.split()[0]: line.split(maxsplit=3)[3] for line in capsys.readouterr().out.splitlines()}
    assert lines["lr"].strip() == "verl.yaml:3 optim.lr"
    assert lines["beta2"].strip() == "verl.yaml:4 optim.betas"
    assert lines["seed"].strip() == "flag trainer.seed=3" and lines["model"].strip() == "default"


def test_other_programs_do_not_accept_keys_of_verl():
    """chat.py has no training settings, so a key of verl is an unknown setting."""
    with pytest.raises(ValueError, match="unknown setting 'trainer.nnodes'"):
        parser.parse(chat.Config, ["trainer.nnodes=2"])


def test_the_tables_are_read_only_if_needed(parse):
    """verl.yaml is read when a name is not a setting, not at every start."""
    verl.tables.cache_clear()
    parse("seed: 3\n", "--lr", "1")
    assert verl.tables.cache_info().misses == 0
    parse("", "optim.lr=1")
    assert verl.tables.cache_info().misses == 1


def test_a_length_of_zero_is_refused_beside_micro_batches_by_tokens(parse):
    with pytest.raises(ValueError, match="--max_length 0: it must be at least 2"):
        parse("", "data.max_length=0", "data.max_token_len_per_gpu=9000")


@pytest.mark.parametrize("arguments", [
    ["model.lora_alpha=16"], ["model.target_modules=all-linear"], ["trainer.test_freq=after_each_epoch"],
    ["model.lora_adapter_path=a", "model.lora_rank=8", "model.lora_alpha=16"]], ids=" ".join)
def test_a_repeated_default_of_verl_is_accepted(arguments, parse):
    """verl's commands repeat defaults. A value without effect is an error only under the names of this trainer."""
    assert parse("", *arguments)[1] == []
