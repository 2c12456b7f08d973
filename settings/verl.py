"""verl's settings for SFT -> ours: what becomes of each key of its configuration files, none silently nothing.

    python verl.py > docs/verl.md      # the tables below as a page; a test keeps the two equal

config.py asks here for a name that is not ours. A key of TAKEN sets ours. One of WARNED changes no number here: it gets
one line, unless its value asks for what happens anyway. One of REFUSED would change what is trained: an error, unless
its value asks for what happens anyway. Facts are from verl's sft_trainer.yaml and sft_trainer_engine.yaml with the
model, engine and optim files that they compose; some keys of its RL files, which get pasted along, are here too.
ELSEWHERE has names of other trainers.
"""

import importlib.util
import os
import re

from settings.errors import UserError

EMPTY = ("", "null", "none", "~", "{}")  # nothing is asked for
NEVER = "1000000000"  # more steps than any run has
PREFIXES = {"actor_rollout_ref.": "", "actor.": "", "model.fsdp_config.": "engine.", "fsdp_config.": "engine.",
            "megatron.": "engine.", "trainer.checkpoint.": "checkpoint."}  # in this order


def key_of(name):
    """The name of a key in the tables below: verl has several places for the same one."""
    for prefix, instead in PREFIXES.items():
        if name.startswith(prefix):
            name = instead + name.removeprefix(prefix)
    return name


def row_of(key):
    """(table, name of the row) of a key, or None. A row may stand for all keys below one: rollout.*"""
    if key.endswith("._target_"):
        return WARNED, "*._target_"
    parents = [key[:i] + ".*" for i, char in enumerate(key + ".") if char == "."]
    for row in (key, *parents[::-1]):
        for table in (TAKEN, WARNED, REFUSED):
            if row in table:
                return table, row
    return None


def translate(given):
    """([(index, our field, text of its value), ...], [warning, ...]) of all that is given in verl's words.

    given  {key: (text of its value, where it was given, index)}

    Keys are read together: one may decide what another means, and ${a.b} is the value of another.
    Raises ValueError for a value that would change what is trained, or that can't be read.
    """
    values = {key: interpolated(key, given) for key in given}
    values = {key: value for key, value in values.items() if value.lower() not in EMPTY}
    settings, warnings = [], []
    for key, value in values.items():
        (_, origin, index), (table, row) = given[key], row_of(key)
        if table is TAKEN:
            fields, how, _ = TAKEN[row]
            try:
                texts = how(value, values, lambda reason: warnings.append(f"{origin}: {reason}"))
            except ValueError as error:
                raise UserError(f"{origin}: {error}") from error
            texts = (texts,) if isinstance(texts, str | None) else texts
            settings += [(index, f, text) for f, text in zip(fields.split(), texts, strict=True) if text is not None]
            continue
        same, reason = table[row]
        if same(value) if callable(same) else alike(value, same):
            continue
        if table is REFUSED:
            raise UserError(f"{origin}: {value} is refused: {reason}")
        warnings.append(f"{origin}: {value} is not applicable: {reason}")
    # null is what a field is without the key, unless another key says it
    said = {field for _, field, _ in settings}
    settings += [(index, field, "none") for key, (_, _, index) in given.items() if key in TAKEN and key not in values
                 for field in TAKEN[key][0].split() if field not in said]
    return settings, warnings


def interpolated(key, given, inside=()):
    """The text of a key's value, with ${a.b} replaced by the value of a.b."""
    text, origin, _ = given[key]

    def value_of(match):
        other = key_of(match[1])
        if other not in given or other in (key, *inside):
            raise UserError(f"{origin}: {match[0]} has no value; write it out")
        return interpolated(other, given, (key, *inside))

    return re.sub(r"\$\{([^${}]*)\}", value_of, text)


def alike(value, same):
    """Is it one of the values that `same` names, as text or as a number?"""
    def plain(text):
        try:
            return float(text)
        except ValueError:
            return text.lower()

    return plain(value) in [plain(word) for word in same.split()]


# ---------------------------------------------------------------------------------------------------------------------
# how a value becomes ours: (its text, {key: text of all that are given}, warn) -> the text, or one for each field;
# None leaves a field as it is


def as_it_is(value, values, warn):
    return value


def path(value, values, warn):
    return ",".join(os.path.expanduser(part) for part in value.split(","))


def val_files(value, values, warn):
    if value == "~/data/gsm8k/test.parquet" and not os.path.exists(os.path.expanduser(value)):
        warn(f"{value} is verl's example and not on this machine: nothing is validated")
        return "none"
    return path(value, values, warn)


def whole(name, values):
    try:
        return int(values[name])
    except ValueError:
        raise UserError(f"{name} can't be {values[name]!r}; it must be a whole number") from None


def micro_batch(value, values, warn):
    by_tokens = values.get("data.use_dynamic_bsz", str("data.max_token_len_per_gpu" in values)).lower() == "true"
    if not by_tokens:
        return values.get("data.micro_batch_size_per_gpu")
    if not {"data.max_token_len_per_gpu", "data.max_length"} <= values.keys():
        raise UserError("a micro-batch by tokens needs data.max_token_len_per_gpu and data.max_length; or type "
                        "data.use_dynamic_bsz=false")
    return str(max(1, whole("data.max_token_len_per_gpu", values) // whole("data.max_length", values)))


def row_key(side):
    """Of the prompt or the response: its column and the keys inside that, with points between them."""
    def how(value, values, warn):
        parts = [values.get(f"data.{side}_key", side), *values.get(f"data.{side}_dict_keys", "").split(",")]
        return ".".join(part for part in parts if part.lower() not in EMPTY)

    return how


def lora_rank(value, values, warn):
    rank = whole("model.lora_rank", values)
    if values.get("model.lora_adapter_path", "").lower() not in EMPTY:
        return "true", None  # the adapter has its own
    return ("true", value) if rank > 0 else ("false", None)


def lora_detail(usual):
    """Of LoRA's alpha and targets: nothing where there is no LoRA, or an adapter that has its own."""
    def how(value, values, warn):
        adapter = values.get("model.lora_adapter_path", "").lower() not in EMPTY
        if not adapter and ("model.lora_rank" not in values or whole("model.lora_rank", values) > 0):
            return value
        if value != usual:
            warn(f"{value} is not applicable: " + ("the adapter has its own" if adapter else "model.lora_rank is 0"))
        return None

    return how


def adapter_path(value, values, warn):
    return (None, None) if value.lower() in EMPTY else ("true", path(value, values, warn))


def betas(value, values, warn):
    if value.count(",") != 1:
        raise UserError(f"{value} can't be read; betas are two numbers, [0.9,0.95]")
    return value.split(",")


def scheduler(value, values, warn):
    if value.lower() == "wsd":
        raise UserError("wsd is refused: there are cosine, linear and constant, with min_lr_ratio")
    return value


def offload(value, values, warn):
    names = ("param_offload", "offload_policy", "cpu_offload", "offload_params")
    return str(any(values.get(f"engine.{name}", "").lower() == "true" for name in names)).lower()


def tensor_parallel(value, values, warn):
    return value, "megatron" if whole("engine.tensor_model_parallel_size", values) > 1 else None


def strategy(value, values, warn):
    name = "engine.tensor_model_parallel_size"
    if value == "megatron" and (name not in values or whole(name, values) == 1):
        warn(f"{value} is not applicable: without {name} above 1 it is what fsdp does")
        return "fsdp"
    return value


def dtype(value, values, warn):
    return {"bfloat16": "bf16", "float32": "fp32"}.get(value, value)


def total_steps(value, values, warn):
    return "none" if value == "-1" else value


def save_freq(value, values, warn):
    return "none" if value == "after_each_epoch" else NEVER if value in ("-1", "0") else value


def test_freq(value, values, warn):
    if value in ("-1", "0"):
        warn(f"{value} is not applicable: validation is after each epoch, the last one included")
    return "none" if value in ("after_each_epoch", "-1", "0") else value


def loggers(value, values, warn):
    kept = []
    for name in filter(None, map(str.strip, value.split(","))):
        if name in ("mlflow", "swanlab", "clearml", "vemlp_wandb"):
            warn(f"{name} is not applicable: metrics.jsonl has every number; console, wandb, tensorboard and trackio "
                 "show them")
        elif name in ("wandb", "tensorboard", "trackio") and importlib.util.find_spec(name) is None:
            warn(f"{name} is not installed (pip install {name}); metrics.jsonl has every number")
        elif name != "file":  # metrics.jsonl is
            kept.append(name)
    return ",".join(kept) or "console"


def resume(value, values, warn):
    mode, *paths = (values.get(f"trainer.{name}", "") for name in ("resume_mode", "resume_from_path", "resume_path"))
    path = next((path for path in paths if path.lower() not in EMPTY), None)
    if mode.lower() in EMPTY or mode in ("auto", "resume_path") and path:
        return path or "none"
    if mode == "resume_path":
        raise UserError("resume_path needs trainer.resume_from_path=DIR")
    if mode not in ("auto", "disable"):
        raise UserError(f"trainer.resume_mode can't be {mode!r}; it must be auto, disable or resume_path")
    return "auto" if mode == "auto" else "none"


def everything(value):
    return {"model", "optimizer", "extra"} <= set(value.split(","))


def launched(variable):
    """Is it what torchrun has started?"""
    return lambda value: value == os.environ.get(variable, "1")


# ---------------------------------------------------------------------------------------------------------------------
# the tables

# What a setting is called in TRL, torchtune and LLaMA-Factory: not accepted, but the error names ours.
ELSEWHERE = {theirs: ours for ours, names in {
    "model": "model_path model_name_or_path", "train_data": "dataset dataset_name", "val_data": "eval_dataset",
    "max_length": "max_seq_length max_seq_len cutoff_len", "train_on_prompt": "train_on_input", "packing": "packed",
    "batch_size": "per_device_train_batch_size gradient_accumulation_steps", "epochs": "num_train_epochs num_epochs",
    "lr": "learning_rate", "scheduler": "lr_scheduler_type", "grad_clip": "max_grad_norm clip_grad_norm",
    "beta1": "adam_beta1", "beta2": "adam_beta2", "use_lora": "use_peft", "lora_rank": "lora_r",
    "lora_targets": "lora_target lora_target_modules", "lora_rs": "use_rslora", "lora_dora": "use_dora",
    "quantize": "load_in_4bit quantization_bit", "resume_adapter": "adapter_name_or_path",
    "param_offload": "fsdp_cpu_offload", "gradient_checkpointing": "enable_activation_checkpointing",
    "keep_checkpoints": "save_total_limit", "resume_from": "resume_from_checkpoint", "logger": "report_to",
    "timeout": "ddp_timeout"}.items() for theirs in names.split()}

TAKEN = {  # key: (our fields, how its value becomes theirs, what to know)
    "data.train_files": ("train_data", path, "JSON and JSON Lines as well as parquet"),
    "data.val_files": ("val_data", val_files, "verl's example path is left out where it isn't there, with a warning"),
    "data.train_batch_size": ("batch_size", as_it_is, "conversations a step, over all ranks"),
    "data.micro_batch_size_per_gpu": ("micro_batch_size", micro_batch, "this many times max_length tokens, packed"),
    "data.max_token_len_per_gpu": ("micro_batch_size", micro_batch, "by tokens: divided by data.max_length"),
    "data.use_dynamic_bsz": ("micro_batch_size", micro_batch, "true: by data.max_token_len_per_gpu"),
    "data.prompt_key": ("prompt_key", row_key("prompt"), "rows of other shapes are still told by their keys"),
    "data.response_key": ("response_key", row_key("response"), ""),
    "data.prompt_dict_keys": ("prompt_key", row_key("prompt"), "appended: extra_info.question"),
    "data.response_dict_keys": ("response_key", row_key("response"), "appended: extra_info.answer"),
    "data.messages_key": ("messages_key", as_it_is, ""),
    "data.multiturn.messages_key": ("messages_key", as_it_is, ""),
    "data.max_length": ("max_length", as_it_is, ""),
    "data.truncation": ("too_long", lambda value, values, warn: "truncate" if value == "right" else value,
                        "error; right is truncate; left does not exist: answers would lose their questions"),
    "model.partial_pretrain": ("model", path, ""),
    "model.path": ("model", path, ""),
    "model.tokenizer_path": ("tokenizer", path, ""),
    "model.enable_gradient_checkpointing": ("gradient_checkpointing", as_it_is, ""),
    "model.lora_rank": ("use_lora lora_rank", lora_rank, "0: no LoRA"),
    "model.lora_alpha": ("lora_alpha", lora_detail("16"), "counts where there is LoRA"),
    "model.target_modules": ("lora_targets", lora_detail("all-linear"), "counts where there is LoRA"),
    "model.lora_adapter_path": ("use_lora resume_adapter", adapter_path, "its rank, alpha and targets are its own"),
    "model.strategy": ("strategy", strategy, "fsdp and fsdp2 are both FSDP2"),
    "engine.strategy": ("strategy", strategy, "megatron: with engine.tensor_model_parallel_size"),
    "strategy": ("strategy", strategy, "of RL's actor"),
    "engine.tensor_model_parallel_size": ("tp strategy", tensor_parallel, "above 1: strategy megatron"),
    "engine.param_offload": ("param_offload", offload, "for the whole step: it lowers the step's peak, unlike verl's"),
    "engine.offload_policy": ("param_offload", offload, ""),
    "engine.cpu_offload": ("param_offload", offload, ""),
    "engine.offload_params": ("param_offload", offload, ""),
    "engine.optimizer_offload": ("optimizer_offload", as_it_is, "for the whole run: the update is on the host"),
    "engine.dtype": ("dtype", dtype, "bfloat16 or float32, of the computation"),
    "optim.lr": ("lr", as_it_is, ""),
    "optim.betas": ("beta1 beta2", betas, ""),
    "optim.weight_decay": ("weight_decay", as_it_is, "of matrices only"),
    "optim.clip_grad": ("grad_clip", as_it_is, ""),
    "optim.grad_clip": ("grad_clip", as_it_is, ""),
    "grad_clip": ("grad_clip", as_it_is, "of RL's actor"),
    "optim.lr_warmup_steps_ratio": ("warmup_ratio", as_it_is, ""),
    "optim.warmup_steps_ratio": ("warmup_ratio", as_it_is, "the older name"),
    "optim.min_lr_ratio": ("min_lr_ratio", as_it_is, ""),
    "optim.lr_scheduler": ("scheduler", scheduler, "cosine, linear, constant; wsd is refused"),
    "optim.lr_scheduler_type": ("scheduler", scheduler, "also read where verl's older trainer does not read it"),
    "optim.warmup_style": ("scheduler", scheduler, "the older name"),
    "optim.lr_decay_style": ("scheduler", scheduler, "Megatron's name"),
    "trainer.default_local_dir": ("output_dir", path, "checkpoints/step_N in it"),
    "trainer.project_name": ("project", as_it_is, ""),
    "trainer.experiment_name": ("run_name", as_it_is, ""),
    "trainer.total_epochs": ("epochs", as_it_is, ""),
    "trainer.total_training_steps": ("max_steps", total_steps, "the schedule ends there too"),
    "trainer.logger": ("logger", loggers, "file is metrics.jsonl, always; one that isn't installed is warned of"),
    "trainer.seed": ("seed", as_it_is, ""),
    "trainer.save_freq": ("save_steps", save_freq, f"-1, at the end only, is {NEVER}: the last step is always saved"),
    "trainer.test_freq": ("eval_steps", test_freq, "-1, at the end only, is after each epoch, and warned of"),
    "trainer.max_ckpt_to_keep": ("keep_checkpoints", as_it_is, ""),
    "trainer.max_actor_ckpt_to_keep": ("keep_checkpoints", as_it_is, "of RL's trainer"),
    "trainer.resume_mode": ("resume_from", resume, "auto, disable, or resume_path with trainer.resume_from_path"),
    "trainer.resume_from_path": ("resume_from", resume, "a step directory of ours"),
    "trainer.resume_path": ("resume_from", resume, "the older name"),
    "nccl_timeout": ("timeout", as_it_is, "of actor_rollout_ref"),
}
FIELDS = {field for fields, _, _ in TAKEN.values() for field in fields.split()}

LAUNCH, NO_RL = "the launcher decides: ./train.sh --n_gpus N with NNODES, or torchrun", "this trains, it does no RL"
NO_MTP = "there is no multi-token prediction"
NOT_SPLIT = "ranks split the batch and, with tp, matrices: not sequences, layers or experts"
WARNED = {  # key: (values that ask for what happens anyway, why the others change nothing)
    "defaults": ("", "the files that it lists are not read: what they don't say here is as --explain shows"),
    "*._target_": (lambda value: value.startswith("verl."), "there are no classes to choose"),
    "hydra.*": ("", "Hydra is not used"),
    "data.micro_batch_size": ("", "verl has no use for it either; data.micro_batch_size_per_gpu counts"),
    "data.multiturn.enable": ("true false", "a row's shape is told by its keys"),
    "data.enable_thinking_key": ("enable_thinking", "no such column is read"),
    "data.multiturn.enable_thinking_key": ("enable_thinking", "no such column is read"),
    "data.pad_mode": ("no_padding", "nothing is ever padded"),
    "data.ignore_input_ids_mismatch": ("false", "a conversation is rendered once, whole: nothing can differ"),
    "data.balance_dp_token": ("true", "the loss is the mean over all target tokens of a step, on any number of ranks"),
    "data.use_shm": ("false", "files are read where they are"),
    "data.num_workers": ("", "data is tokenised before the first step"),
    "model.use_shm": ("false", "files are read where they are"),
    "model.use_remove_padding": ("true", "nothing is ever padded"),
    "model.truncate_padding": ("false", "nothing is ever padded"),
    "use_remove_padding": ("true", "nothing is ever padded"),
    "model.enable_activation_offload": ("false", "activations stay on the device; gradient_checkpointing leaves few"),
    "model.use_liger": ("false", "the loss is always computed in pieces; other kernels are PyTorch's"),
    "model.use_fused_kernels": ("false", "the loss is always computed in pieces; other kernels are PyTorch's"),
    "model.fused_kernel_options.impl_backend": ("torch", "kernels are PyTorch's"),
    "model.tiled_mlp.enabled": ("false", "an MLP is computed whole; gradient_checkpointing keeps nothing of it"),
    "model.tiled_mlp.num_shards": ("4", "an MLP is computed whole"),
    "model.override_config.attn_implementation": ("", "attention is PyTorch's own"),
    "model.mtp.enable_rollout": ("false", NO_RL),
    "model.mtp.detach_encoder": ("false", NO_MTP),
    "model.mtp.mtp_loss_scaling_factor": ("0.1", NO_MTP),
    "model.mtp.speculative_algorithm": ("EAGLE", NO_MTP),
    "model.mtp.speculative_num_steps": ("3", NO_MTP),
    "model.mtp.speculative_eagle_topk": ("1", NO_MTP),
    "model.mtp.speculative_num_draft_tokens": ("4", NO_MTP),
    "model.mtp.method": ("mtp", NO_MTP),
    "model.mtp.num_speculative_tokens": ("1", NO_MTP),
    "engine.wrap_policy.min_num_params": ("0", "each block of the model is sharded by itself"),
    "engine.wrap_policy.transformer_layer_cls_to_wrap": ("", "each block of the model is sharded by itself"),
    "engine.reshard_after_forward": ("true", "a block's weights are given back after its forward pass"),
    "engine.fsdp_size": ("-1", "weights are sharded over all data-parallel ranks"),
    "engine.forward_prefetch": ("false", "FSDP2 prefetches by itself"),
    "engine.use_orig_params": ("false", "of FSDP1"),
    "engine.seed": ("42", "trainer.seed counts"),
    "engine.full_determinism": ("false", "order of the data and dropout are all that is random: trainer.seed"),
    "engine.ulysses_sequence_parallel_size": ("1", NOT_SPLIT),
    "ulysses_sequence_parallel_size": ("1", NOT_SPLIT),
    "engine.pipeline_model_parallel_size": ("1", NOT_SPLIT),
    "engine.virtual_pipeline_model_parallel_size": ("1", NOT_SPLIT),
    "engine.context_parallel_size": ("1", NOT_SPLIT),
    "engine.expert_model_parallel_size": ("1", NOT_SPLIT),
    "engine.expert_tensor_parallel_size": ("1", NOT_SPLIT),
    "engine.sequence_parallel": ("false", NOT_SPLIT),
    "engine.use_distributed_optimizer": ("true", "the optimizer's state is always sharded"),
    "engine.grad_offload": ("false", "param_offload takes the gradients along"),
    "engine.use_dist_checkpointing": ("false", "checkpoints are Hugging Face directories"),
    "engine.dist_checkpointing_path": ("", "checkpoints are Hugging Face directories"),
    "engine.dist_checkpointing_prefix": ("''", "checkpoints are Hugging Face directories"),
    "engine.use_mbridge": ("false", "checkpoints are Hugging Face directories"),
    "engine.vanilla_mbridge": ("true", "checkpoints are Hugging Face directories"),
    "engine.override_ddp_config.*": ("", "of Megatron"),
    "engine.override_transformer_config.*": ("", "of Megatron; gradient_checkpointing recomputes"),
    "engine.override_mcore_model_config.*": ("", "of Megatron"),
    "engine.entropy_from_logits_with_chunking": ("false", NO_RL),
    "engine.entropy_checkpointing": ("false", NO_RL),
    "engine.use_torch_compile": ("false", "verl compiles its entropy only; --compile compiles the blocks here"),
    "optim.lr_wsd_decay_style": ("exponential", "of a schedule that is not used"),
    "optim.lr_wsd_decay_steps": ("", "of a schedule that is not used"),
    "optim.use_checkpoint_opt_param_scheduler": ("false", "a resume goes on with the same schedule"),
    "checkpoint.save_contents": (everything, "a checkpoint is always whole, its model a Hugging Face directory"),
    "checkpoint.async_save": ("false", "the loop waits until a checkpoint is on the disk"),
    "checkpoint.mbridge_config.*": (lambda value: True, "of Megatron"),
    "trainer.default_hdfs_dir": ("", "checkpoints stay in trainer.default_local_dir"),
    "trainer.nnodes": (launched("GROUP_WORLD_SIZE"), LAUNCH),
    "trainer.n_gpus_per_node": (launched("LOCAL_WORLD_SIZE"), LAUNCH),
    "trainer.profile_interval": ("-1,-1", "there is no profiler"),
    "trainer.balance_batch": ("true", "ranks are always balanced, by tokens and by squared length"),
    "profiler.*": ("", "there is no profiler"),
    "global_profiler.*": ("", "there is no profiler"),
    **{f"trainer.{name}": ("false -1", NO_RL) for name in (
        "val_before_train", "val_only", "log_val_generations", "rollout_data_dir", "validation_data_dir",
        "esi_redundant_time", "del_local_ckpt_after_load", "max_critic_ckpt_to_keep", "critic_warmup",
        "ray_wait_register_center_timeout", "use_legacy_worker_impl")},
    **{name: ("", NO_RL) for name in (
        "rollout.*", "ref.*", "critic.*", "algorithm.*", "reward_model.*", "reward.*", "custom_reward_function.*",
        "ray_kwargs.*", "ray_init.*", "transfer_queue.*", "hybrid_engine", "ppo_mini_batch_size",
        "ppo_micro_batch_size", "ppo_micro_batch_size_per_gpu", "ppo_max_token_len_per_gpu", "ppo_epochs",
        "use_dynamic_bsz", "use_kl_loss", "kl_loss_coef", "kl_loss_type", "entropy_coeff", "clip_ratio",
        "clip_ratio_low", "clip_ratio_high",
        "shuffle", "use_torch_compile")},
    "loss_agg_mode": ("token-mean", NO_RL),
}

ROWS = "all rows are used: cut the file"
TEMPLATE = "the chat template is that of the tokenizer's directory: put yours there, as chat_template.jinja"
OWN_CODE = "code of others is not run; formats.py and model.py are there to be changed"
REFUSED = {  # key: (values that ask for what happens anyway, why the others can't be)
    "data.train_max_samples": ("-1", ROWS),
    "data.val_max_samples": ("-1", ROWS),
    "data.shuffle": ("true", "the order of an epoch is always drawn anew, from trainer.seed"),
    "data.tools_key": ("tools", "tools are read from the column tools; rename yours"),
    "data.multiturn.tools_key": ("tools", "tools are read from the column tools; rename yours"),
    "data.image_key": ("", "there are no images"),
    "data.chat_template": ("", TEMPLATE),
    "data.apply_chat_template_kwargs": ("", TEMPLATE),
    "data.apply_chat_template_kwargs.*": ("", TEMPLATE),
    "data.enable_thinking_default": ("", TEMPLATE),
    "data.custom_cls.path": ("", OWN_CODE),
    "data.custom_cls.name": ("", OWN_CODE),
    "model.external_lib": ("", OWN_CODE),
    "model.trust_remote_code": ("false", OWN_CODE + "; the families of model.py need none"),
    "model.custom_chat_template": ("", TEMPLATE),
    "model.hf_config_path": ("", "config.json is the model's own"),
    "model.override_config": ("", "config.json is the model's own; edit it"),
    "model.override_config.*": ("", "config.json is the model's own; edit it"),
    "model.exclude_modules": ("", "model.target_modules may list what is left"),
    "model.mtp.enable": ("false", NO_MTP),
    "model.mtp.enable_train": ("false", NO_MTP),
    "engine.model_dtype": ("fp32 float32", "master weights are fp32: small updates are lost in fewer bits"),
    "engine.mixed_precision": ("", "engine.dtype is the computation's; sums and masters are fp32"),
    "engine.mixed_precision.*": ("", "engine.dtype is the computation's; sums and masters are fp32"),
    "engine.forward_only": ("false", "a run trains"),
    "optim.optimizer": ("adamw", "the optimizer is AdamW"),
    "optim.optimizer_impl": ("torch.optim", "the optimizer is PyTorch's AdamW"),
    "optim.override_optimizer_config": ("", "AdamW has lr, betas and weight_decay; eps is 1e-8"),
    "optim.override_optimizer_config.*": ("", "AdamW has lr, betas and weight_decay; eps is 1e-8"),
    "optim.lr_warmup_steps": ("-1 0", "give the share of the steps: optim.lr_warmup_steps_ratio"),
    "optim.total_training_steps": ("-1", "the schedule ends with the run: trainer.total_training_steps"),
    "optim.num_cycles": ("0.5", "cosine is half a period, from the peak to min_lr_ratio"),
    "optim.lr_warmup_init": ("0", "the warm-up rises from zero"),
    "optim.lr_decay_steps": ("", "the schedule ends with the run: trainer.total_training_steps"),
    "optim.min_lr": ("0", "give it as a share of the peak: optim.min_lr_ratio"),
    "optim.weight_decay_incr_style": ("constant", "weight decay is constant"),
    "checkpoint.load_contents": (everything, "a resume restores everything; to begin with weights alone, give the "
                                             "checkpoint as model.path"),
    "trainer.device": ("cuda", "CUDA is used where there is one, else the CPU; CUDA_VISIBLE_DEVICES= hides it"),
}


PAGE = """# verl's keys

A configuration file of verl's SFT trainers, or its words on the command line, is accepted as it is:

```
python sft.py --config sft_trainer.yaml data.train_files=my.json model.partial_pretrain=DIR
```

Each key sets a setting of ours; or it gets one line of warning, because it changes no number here; or it is refused,
because it would change what is trained. A value that asks for what happens anyway passes without a word, and so does
`null`. An unknown key is an error that names the nearest one. `--explain` shows what became of a file.

Some places are read as others: {places}.

Made by `python verl.py` from its tables.

| key | what happens | |
|---|---|---|
{rows}"""


def page():
    """The tables as Markdown."""
    rows = {key: (" ".join(f"`--{field}`" for field in fields.split()), note)
            for key, (fields, _, note) in TAKEN.items()}
    for table, word in (WARNED, "warned"), (REFUSED, "refused"):
        for key, (same, reason) in table.items():
            named = {everything: "`model,optimizer,extra`"}.get(same, "what holds" if callable(same) else ", ".join(
                f"`{value}`" for value in same.split()))
            rows[key] = f"{word}, but for {named}" if named else word, reason
    return PAGE.format(places=", ".join(f"`{a}…` as `{b}…`" for a, b in PREFIXES.items()),
                       rows="\n".join(f"| `{key}` | {what} | {note} |" for key, (what, note) in sorted(rows.items())))


if __name__ == "__main__":
    print(page())
