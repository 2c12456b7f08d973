"""Settings of TRL, transformers, LLaMA-Factory, axolotl, torchtune, unsloth and ms-swift: what to type here.

    suggestion("per_device_train_batch_size")  ->  text, or None for a name that none of them has

The parser asks for names that are no settings here (verl's keys are translated by settings/verl.py). A name
that exists here with another meaning is in the table too, for those who look it up.
"""

import re

# Settings that differ in name only, or nearly: what to type here, and the names elsewhere
RENAMED = {
    "--model NAME":
        "model_name_or_path base_model model_name model_id model_path model_id_or_path "
        "pretrained_model_name_or_path",
    "--tokenizer DIR":
        "tokenizer_name tokenizer_name_or_path tokenizer_path tokenizer_config processing_class",
    "--train_data FILE":
        "dataset dataset_name datasets train_file train_files data_path dataset_path data_files "
        "train_dataset training_file train_data_path dataset_id",
    "--val_data FILE":
        "eval_dataset validation_file test_datasets valid_file val_file eval_file val_dataset dataset_val"
        " eval_data validation_data validation_dataset eval_data_path",
    "--max_length N":
        "max_seq_length max_seq_len cutoff_len sequence_len model_max_length block_size seq_length "
        "seq_len max_source_length max_target_length tokenizer.max_seq_len max_tokens",
    "--epochs N":
        "num_train_epochs num_epochs n_epochs max_epochs",
    "--max_steps N":
        "max_steps_per_epoch max_train_steps num_steps",
    "--lr X":
        "learning_rate optimizer.lr optim.lr",
    "--scheduler NAME":
        "lr_scheduler_type lr_scheduler lr_scheduler._component_ lr_decay_style",
    "--min_lr_ratio X":
        "cosine_min_lr_ratio",
    "--grad_clip X":
        "max_grad_norm clip_grad_norm gradient_clipping clip_grad gradient_clip_val",
    "--weight_decay X":
        "optimizer.weight_decay wd",
    "--beta1 X":
        "adam_beta1",
    "--beta2 X":
        "adam_beta2",
    "--lora_rank N":
        "lora_r r peft_lora_r lora_config.r rank model.lora_rank lora_dim",
    "--lora_alpha N":
        "peft_lora_alpha alpha model.lora_alpha",
    "--lora_dropout X":
        "peft_lora_dropout model.lora_dropout",
    "--lora_targets NAMES":
        "lora_target lora_target_modules target_modules lora_modules lora_layers model.lora_attn_modules "
        "lora_target_parameters",
    "--lora_modules_to_save embed_tokens,lm_head":
        "additional_target modules_to_save peft_lora_modules_to_save",
    "--lora_rs":
        "use_rslora rslora lora_use_rslora peft_use_rslora",
    "--lora_dora":
        "use_dora peft_use_dora lora_use_dora model.use_dora",
    "--lora_plus_ratio X":
        "loraplus_lr_ratio loraplus_ratio lorap_lr_ratio",
    "--resume_adapter DIR":
        "adapter_name_or_path lora_model_dir adapter_path adapters resume_adapter_path",
    "--use_lora":
        "use_peft peft lora enable_lora",
    "--use_lora --quantize nf4":
        "load_in_4bit qlora quantization_bit use_qlora quant_bits bnb_4bit load_in_nf4",
    "--train_on last":
        "mask_history train_on_last_turn train_on_last_turn_only last_round_loss",
    "--train_reasoning false":
        "mask_reasoning_content ignore_empty_think ignore_think_prefix",
    "--train_on_prompt":
        "train_on_inputs train_on_input train_on_source",
    "--prompt_key NAME":
        "field_instruction prompt_column input_column column_prompt instruction_field query_field",
    "--response_key NAME":
        "field_output response_column output_column column_response output_field response_field",
    "--messages_key NAME":
        "field_messages messages_column conversations_field conversation_column messages_field",
    "--packing":
        "sample_packing packed dataset.packed neat_packing use_packing",
    "--dtype bf16 (or fp32)":
        "torch_dtype model_dtype bnb_4bit_compute_dtype compute_dtype precision",
    "--compile":
        "torch_compile use_torch_compile jit_compile",
    "--gradient_checkpointing":
        "enable_activation_checkpointing activation_checkpointing use_gradient_checkpointing "
        "use_unsloth_gc recompute",
    "--no-gradient_checkpointing":
        "disable_gradient_checkpointing",
    "--param_offload":
        "fsdp_cpu_offload fsdp_offload_params cpu_offload offload_params",
    "--optimizer_offload":
        "optimizer_cpu_offload offload_optimizer",
    "--strategy megatron --tp N":
        "tensor_parallel_size tensor_parallel_dim tensor_model_parallel_size tensor_parallel tp_size",
    "--sp N":
        "context_parallel_size sequence_parallel_degree sequence_parallel_size ulysses_parallel_size cp_size",
    "--timeout SECONDS":
        "ddp_timeout",
    "--keep_checkpoints N":
        "save_total_limit max_checkpoints keep_last_n_checkpoints",
    "--keep_best":
        "load_best_model_at_end",
    "--early_stopping N":
        "early_stopping_patience early_stopping_steps",
    "--save_steps N":
        "save_interval checkpointing_steps save_every_n_steps",
    "--eval_steps N":
        "eval_interval run_val_every_n_steps",
    "--logger NAMES (console, wandb, tensorboard, trackio)":
        "report_to log_with use_tensorboard metric_logger use_wandb",
    "--logger wandb --project NAME":
        "wandb_project",
    "--run_name NAME":
        "wandb_name wandb_run_name wandb_run_id exp_name experiment_name",
    "--seed N":
        "data_seed random_seed",
    "--deterministic":
        "full_determinism use_deterministic_algorithms",
    "--resize_embeddings, with --tokenizer DIR that has the new tokens":
        "resize_vocab resize_token_embeddings resize_token_embeddings_to_32x new_special_tokens "
        "add_tokens added_tokens_overrides tokens add_special_tokens",
    "--chat_template FILE":
        "chat_template_path chat_template_jinja custom_chat_template default_template",
    "--template_kwargs '{\"enable_thinking\": false}'":
        "enable_thinking chat_template_kwargs chat_template_args reasoning_effort",
    "--profile N":
        "profiling profiler profiler_steps profile_steps",
    "--resume_from DIR (or auto)":
        "resume_from_checkpoint auto_resume_from_checkpoints auto_resume auto_resume_from_checkpoint",
}

# Settings for which there is more to say: the names elsewhere, and what to do here or why there is none
EXPLAINED = {
    "per_device_train_batch_size per_gpu_train_batch_size train_batch_size global_batch_size":
        "--batch_size N is the conversations of one optimizer step over all GPUs: the product of "
        "per_device_train_batch_size, gradient_accumulation_steps and the number of GPUs. Memory is set "
        "by --micro_batch_size or auto",
    "gradient_accumulation_steps gradient_accumulation grad_accum_steps accumulate_grad_batches":
        "it follows from --batch_size, the conversations of one optimizer step over all GPUs; multiply it"
        " into that number",
    "micro_batch_size":
        "--micro_batch_size N means that a micro-batch holds at most N × max_length tokens (with "
        "--no-packing: N conversations); it changes memory and speed, never the result. The batch is "
        "--batch_size, over all GPUs",
    "per_device_eval_batch_size eval_batch_size per_gpu_eval_batch_size micro_batch_size_eval":
        "validation uses --micro_batch_size; val_loss does not depend on it",
    "warmup_steps num_warmup_steps lr_warmup_steps lr_scheduler.num_warmup_steps":
        "--warmup_ratio X is the fraction of all steps: warm-up steps / steps. The start of a run prints "
        "the steps",
    "warmup_epochs":
        "--warmup_ratio X is the fraction of all steps: warm-up epochs / --epochs",
    "lr_scheduler_kwargs":
        "a cosine that does not end at 0 is --min_lr_ratio X; --scheduler wsd decays in the last 20 % of the "
        "steps",
    "optim optimizer optimizer_type optimizer._component_ adamw_8bit use_8bit_adam use_muon":
        "the optimizer is AdamW; to save memory use --optimizer_offload. Another one is a small change: "
        "docs/fork.md, which has Muon",
    "adam_epsilon adam_eps eps":
        "it is 1e-8, as everywhere; nothing to type",
    "galore use_galore use_apollo use_badam optim_target_modules use_adam_mini":
        "there is no such optimizer; --use_lora or --optimizer_offload save memory",
    "loss_scale":
        "default is what happens anyway: only what the assistant says is trained; last_round is "
        "--train_on last, all is --train_on_prompt, ignore_empty_think is --train_reasoning false. `weight` "
        "in a row or a message scales its losses",
    "split_thinking field_thinking template_thinking_key":
        "nothing to type: reasoning is read from `reasoning_content`, or from before </think>, and the chat "
        "template decides where it is written. --split_turns makes a sample of each assistant turn, as at "
        "inference; --train_reasoning false keeps reasoning from being trained",
    "drop_history_reasoning_content train_on_what":
        "all assistant turns are trained, and the chat template decides which earlier reasoning they see; "
        "--split_turns makes a sample of each turn, as at inference, and --train_on last trains the last one",
    "completion_only_loss assistant_only_loss train_on_responses_only response_template "
    "instruction_template only_train_response":
        "it is what happens anyway: only what the assistant says is trained. All tokens: "
        "--train_on_prompt; only the last answer: --train_on last",
    "train_on_eos train_on_eot roles_to_train":
        "the token that ends the assistant's turn is always trained; other roles only with "
        "--train_on_prompt. In a row, `weight` 0 or `train` false keeps a message from being trained",
    "train_on_prompt_and_completion":
        "use --train_on_prompt",
    "dataset_text_field text_column field text_field":
        "rows of plain text are {\"text\": ...}; rename the column to text",
    "dataset_dir":
        "--train_data DIR/dataset_info.json:NAME reads an entry of LLaMA-Factory's dataset_info.json",
    "template":
        "the model's own chat template is used, no name is needed; another one: --chat_template FILE",
    "chat_template_type prompt_template prompt_style conversation_template":
        "the model's own chat template is used, no name is needed; another one: --chat_template FILE",
    "val_size val_set_size test_size eval_split_ratio split_dataset_ratio validation_split_percentage":
        "--val_split 0.02 takes that share of the rows for validation; or pass --val_data FILE",
    "max_samples max_train_samples num_train_samples train_dataset_sample sample_size":
        "--train_data 'FILE[:N]' takes the first N rows; --max_steps N ends the run early",
    "max_eval_samples max_val_samples val_dataset_sample":
        "--val_data 'FILE[:N]' takes the first N rows",
    "dataset_config dataset_config_name subset dataset_train_split dataset_test_split split "
    "train_on_split dataset_train_name":
        "--train_data OWNER/NAME:CONFIG@SPLIT names both",
    "mix_strategy interleave_probs dataset_mixer dataset_mixture dataset_weights sampling_ratio":
        "--train_data a.json:0.7,b.json:0.3 mixes sources by weight",
    "streaming dataset_streaming buffer_size":
        "data is not streamed: the steps of an epoch are known before the schedule. Memory stays small, "
        "as tokens are kept on the disk (--cache_dir DIR)",
    "preprocessing_num_workers dataset_num_proc dataloader_num_workers dataset_processes "
    "dataset_num_workers preprocessing_batch_size dataloader_pin_memory dataloader_prefetch_factor "
    "tokenized_path dataset_prepared_path":
        "nothing to type: tokenisation uses all cores, its result is cached in --cache_dir, and batches "
        "are made ahead",
    "overwrite_cache load_from_cache_file":
        "the cache notices every change; --cache_dir none reads without it",
    "group_by_length length_grouped pad_to_sequence_len pad_to_multiple_of padding_free padding_side "
    "padding pad_to_max_length flattening eval_packing ignore_pad_token_for_loss eval_sample_packing "
    "packing_strategy":
        "there is no padding: conversations lie one after another, each attends to itself only. "
        "--no-packing limits micro-batches by conversations",
    "shuffle shuffle_merged_datasets disable_shuffling train_dataloader_shuffle":
        "each epoch is a permutation that --seed decides",
    "remove_unused_columns dataset_kwargs formatting_func dataset_columns":
        "nothing to type: columns that are not used are listed at the start",
    "truncation_side truncation_strategy truncation_mode excess_length_strategy":
        "--too_long truncate (from the right), drop or error",
    "bf16 tf32 pure_bf16 bf16_full_eval":
        "--dtype bf16, which is what happens anyway on CUDA, with fp32 master weights and fp32 sums; fp32"
        " matrices: --dtype fp32",
    "fp16 fp16_full_eval half_precision":
        "fp16 needs loss scaling and overflows; use --dtype bf16",
    "flash_attn flash_attention attn_implementation attn_impl sdp_attention xformers_attention "
    "use_flash_attention use_flash_attention_2 _attn_implementation":
        "nothing to type: attention without padding, by FlashAttention kernels on CUDA in bf16",
    "use_liger_kernel enable_liger_kernel use_liger liger_fused_linear_cross_entropy liger_kernel "
    "cut_cross_entropy use_unsloth unsloth":
        "nothing to type: logits exist for a chunk of targets at a time, and --compile fuses the blocks",
    "deepspeed fsdp fsdp_config zero_stage fsdp_version fsdp_transformer_layer_cls_to_wrap ddp_backend "
    "fsdp_sharding_strategy accelerator_config":
        "./train.sh --n_gpus N shards by FSDP2 (as ZeRO-3); with --param_offload or --optimizer_offload "
        "parts of it are in host memory. No further file",
    "num_gpus n_gpu gpus num_processes nproc_per_node devices":
        "./train.sh --n_gpus N starts the processes, or torchrun --nproc_per_node N sft.py",
    "nnodes node_rank num_machines":
        "the environment variables NNODES and NODE_RANK of train.sh; see docs/cluster.md",
    "local_rank ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers use_cpu no_cuda "
    "device_map low_cpu_mem_usage use_cache":
        "nothing to type: the device and the processes are found, and each rank reads only its own "
        "weights",
    "ring_attn_func":
        "--sp N splits conversations over GPUs and exchanges tokens for heads around attention; there is no "
        "ring",
    "pipeline_model_parallel_size pipeline_parallel_size expert_parallel_size dp_shard_size "
    "dp_replicate_size":
        "there is FSDP2 over all GPUs, and --strategy megatron --tp N",
    "activation_offloading enable_activation_offloading gradient_checkpointing_kwargs use_reentrant "
    "use_reentrant_gc":
        "--gradient_checkpointing recomputes blocks (not re-entrant); auto: as many as memory requires",
    "load_in_8bit bnb_4bit_use_double_quant bnb_4bit_quant_type quantization_method quantization_config "
    "double_quantization gptq awq":
        "the only quantisation is --use_lora --quantize nf4, of the original weights",
    "adapter finetuning_type train_type tuner_type":
        "full fine-tuning is the default; lora is --use_lora, qlora is --use_lora --quantize nf4; there "
        "is no other",
    "lora_target_linear":
        "--lora_targets all-linear, which is the default",
    "init_lora_weights pissa_init peft_init_lora_weights lora_init":
        "adapters begin as PEFT's default (B is zero); others change the base model too, so there are "
        "none",
    "lora_task_type lora_bias lora_fan_in_fan_out peft_layers_to_transform lora_on_cpu create_new_adapter":
        "there is no such setting; --lora_targets REGEX chooses layers",
    "merge_lora merge_adapter save_merged_lora lora_merge":
        "python tools/merge.py ADAPTER OUT merges after training",
    "freeze_trainable_layers unfrozen_parameters freeze_parameters trainable_parameters train_layers "
    "freeze_layers freeze_embeddings freeze_modules":
        "--freeze NAMES freezes parts of the model: names and regular expressions with commas, such as "
        "embed_tokens,layers.0",
    "freeze_vision_tower freeze_multi_modal_projector freeze_vit freeze_aligner":
        "only the text model of a multimodal one is trained; all else in its directory stays as it is",
    "neftune_noise_alpha neftune_alpha":
        "there is no NEFTune: noise drawn for each micro-batch would make the loss depend on how a step "
        "is split",
    "label_smoothing_factor label_smoothing":
        "there is no setting for it; docs/fork.md has the diff (\"Label smoothing\")",
    "loss_type use_dft_loss use_asft_loss loss._component_":
        "the loss is cross-entropy; docs/fork.md has the diff of DFT, and shows where another loss goes",
    "average_tokens_across_devices num_items_in_batch":
        "it is what happens anyway: the loss is the mean over the step's target tokens of all GPUs",
    "stage rlhf_type rl trainer_type task":
        "this program does supervised fine-tuning only; nothing to type",
    "do_train do_eval do_predict":
        "it always trains; with --val_data FILE it also validates, and tools/evaluate.py does only that",
    "pref_beta dpo_beta beta kl_coef reward_model ref_model num_generations":
        "this program does supervised fine-tuning only: no preference tuning, no reinforcement learning",
    "trust_remote_code":
        "code of a model is never run; the families that are supported need none",
    "revision model_revision":
        "hf download NAME --revision R --local-dir DIR, then --model DIR",
    "hf_hub_token use_auth_token hub_token token":
        "set the environment variable HF_TOKEN",
    "hub_model_id hub_strategy hub_private_repo push_dataset_to_hub":
        "--push_to_hub ORG/NAME pushes the result of a run; tools/push.py pushes any step, also to a new "
        "private repository",
    "logging_steps logging_strategy logging_first_step log_every_n_steps plot_loss logging_dir "
    "logging_nan_inf_filter include_tokens_per_second include_num_input_tokens_seen":
        "nothing to type: each step is a line of metrics.jsonl in --output_dir, and report.html draws "
        "them",
    "save_strategy save_only_model save_safetensors max_shard_size saves_per_epoch save_optimizer":
        "--save_steps N; without it, each epoch is saved, always safetensors and always what a resume "
        "needs",
    "eval_strategy evaluation_strategy evals_per_epoch eval_on_start do_eval_at_start":
        "--eval_steps N; without it, validation is before training and once per epoch, with --val_data FILE",
    "metric_for_best_model greater_is_better compute_metrics compute_accuracy":
        "--keep_best and --early_stopping compare val_loss",
    "predict_with_generate generation_max_length eval_table_size sample_generation":
        "--sample_prompts FILE answers prompts at each validation",
    "overwrite_output_dir":
        "a directory that has a run is never overwritten; use another --output_dir, or --resume_from auto",
    "wandb_entity wandb_mode wandb_watch swanlab_project use_mlflow use_swanlab use_comet":
        "--logger NAMES: console, wandb, tensorboard or trackio; wandb also reads WANDB_ENTITY and "
        "WANDB_MODE",
    "system system_prompt default_system":
        "write it as the first message of each row, or in a `system` column",
    "tool_format function_calling_prompt":
        "the model's chat template writes tools and calls, from the rows' `tools`",
    "rope_scaling rope_theta overrides_of_model_config model_kwargs overrides_of_model_kwargs":
        "the model is what its config.json says; change it there",
    "image_max_pixels video_max_pixels processor_type vision_tower":
        "this program trains on text only",
    "use_fast_tokenizer tokenizer_use_fast split_special_tokens tokenizer_type is_llama_derived_model "
    "model_type":
        "nothing to type: tokenizer.json and config.json decide",
    "eos_token pad_token bos_token special_tokens":
        "the token that ends a turn is read from the chat template, and there is no padding; other "
        "tokens: put a tokenizer that has them in a directory, --tokenizer DIR",
}

# Values of --scheduler elsewhere: the nearest one here
SCHEDULES = {"warmup_stable_decay": "wsd", "trapezoidal": "wsd", "WSD": "wsd", "cosine_with_min_lr": "cosine",
             "cosine_warmup_with_min_lr": "cosine", "constant_with_warmup": "constant"}


def settings():
    """{name elsewhere: the setting here} of those that differ in name only: a name may be misspelt.

    Names with a dot are missing: those are of verl, which has more of them.
    """
    return {name: re.findall(r"--(?:no-)?(\w+)", here.partition(",")[0])[-1]
            for here, names in RENAMED.items() for name in names.split() if "." not in name}


def suggestion(name):
    """What to type here for a setting of another trainer, as one line; None if no trainer has it.

    name  as it was typed: --lora-r, lora_r, loraR, trainer.lora_r
    """
    for typed in (name, name.rpartition(".")[2]):
        for here, names in RENAMED.items():
            if letters(typed) in map(letters, names.split()):
                return f"type {here}"
        for names, text in EXPLAINED.items():
            if letters(typed) in map(letters, names.split()):
                return text
    return None


def letters(name):
    """The letters and digits of a name, in lower case: batch_size, batch-size and batchSize are the same."""
    return re.sub(r"[\W_]", "", name).lower()
