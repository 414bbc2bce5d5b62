"""Names that users bring from transformers, peft, trl, Axolotl and LLaMA-Factory, answered with ours.

A value that starts with a setting's name is that setting; a value after `no: ` says why there is
none. Notes after a semicolon say what differs.
"""

from __future__ import annotations

_ROWS = (
    "train.batch_size; it is the number of rows in one optimizer step, over all devices: multiply the size "
    "for each device by the accumulation steps and the devices"
)
_ACCUMULATION = (
    "no: `train.batch_size` is already the rows of one optimizer step; how a step is split for memory is "
    "chosen by itself, or with `train.micro_batch_tokens`, and never changes the gradient"
)
_LENGTH = "data.max_tokens; `data.too_long` says what happens to a longer row"
_DTYPE = "train.dtype; auto takes bf16 where the machine computes it natively"
_QUANT = "quant.kind; write `quant: nf4`, int8 for 8 bits, or keep for a base that is quantised already"
_TRAIN_ON = "data.train_on; it is assistant, last_assistant or all"
_PACK = "data.pack; it is on from the start, and rows never see each other"
_MEMORY = "train.recompute; auto computes again only what memory asks for"
_WHERE = "train.device; it is auto, cpu, cuda, cuda:1 or mps"
_SAVING = "no: a checkpoint always holds what resuming needs, in safetensors"
_VALID = "data.valid_fraction; or `data.valid` for a file of its own"
_TOKENS = "data.add_tokens; or `data.add_special_tokens` for control tokens"
_TEMPLATE = "data.chat_template; it is the path of a Jinja file, the base's own template if not given"
_FORMAT = "data.format; auto looks at the keys of a row"
_TRUST = "no: code that comes with a base is never run"
_STEPS = "lines for each step are always in metrics.jsonl"
_BEST = "no: the adapter with the best validation loss is always the one that is kept"
_CLUSTER = "no: training on several devices is not offered yet"
_SECTION = "no: settings are grouped as base, data, lora, train, evaluate and output"
_HUB = "no: nothing is uploaded"
_PREFERENCE = "no: preference training is not offered; lorimer trains on answers"

OTHER_NAMES: dict[str, str] = {
    # the base
    **dict.fromkeys(
        ("model", "model_name", "model_name_or_path", "base_model", "base_model_name_or_path", "model_id"),
        "base; a kept name, a folder, a .gguf file or a hub id",
    ),
    **dict.fromkeys(("trust_remote_code", "model_type", "tokenizer_type", "model_init_kwargs"), _TRUST),
    "tokenizer": "no: the tokenizer of the base is used",
    "tokenizer_config": "no: the tokenizer of the base is used",
    "attn_implementation": "no: attention is lorimer's own",
    "flash_attention": "no: attention is lorimer's own",
    "flash_attn": "no: attention is lorimer's own",
    "unsloth": "no: the kernels are lorimer's own",
    "use_unsloth": "no: the kernels are lorimer's own",
    "liger_kernel": "no: the kernels are lorimer's own",
    "use_liger_kernel": "no: the kernels are lorimer's own",
    # data
    **dict.fromkeys(
        ("dataset", "datasets", "dataset_name", "train_file", "train_files", "train_dataset", "data_path"),
        "data.train; a file, a list of files, or a hub id",
    ),
    "dataset_dir": "data.train; paths are relative to the config file",
    "valid_file": "data.valid",
    "validation_file": "data.valid",
    "eval_file": "data.valid",
    "eval_dataset": "data.valid",
    "test_file": "data.test",
    "test_datasets": "data.test",
    **dict.fromkeys(("val_set_size", "val_size", "validation_split", "eval_split", "valid_size"), _VALID),
    **dict.fromkeys(
        ("sequence_len", "max_seq_length", "max_seq_len", "max_length", "cutoff_len", "model_max_length"),
        _LENGTH,
    ),
    **dict.fromkeys(("packing", "sample_packing", "neat_packing", "eval_sample_packing"), _PACK),
    "pad_to_sequence_len": "no: nothing is padded",
    "group_by_length": "no: nothing is padded, so rows need no grouping",
    "padding_free": "no: nothing is ever padded",
    **dict.fromkeys(
        (
            "train_on_inputs", "train_on_prompt", "assistant_only_loss", "completion_only_loss",
            "roles_to_train", "mask_history", "train_on_responses_only", "mask_prompt", "train_on_eos",
        ),
        _TRAIN_ON,
    ),
    **dict.fromkeys(("template", "chat_template_path", "chat_template_jinja"), _TEMPLATE),
    **dict.fromkeys(("dataset_type", "formatting", "dataset_text_field", "type"), _FORMAT),
    **dict.fromkeys(("tokens", "new_tokens", "additional_tokens"), _TOKENS),
    **dict.fromkeys(
        ("special_tokens", "new_special_tokens", "additional_special_tokens", "extra_special_tokens"),
        "data.add_special_tokens; control tokens that the chat template writes. bos, eos and pad are the "
        "base's own",
    ),
    **dict.fromkeys(
        ("resize_vocab", "resize_token_embeddings_to_32x", "resize_embedding_layer", "pad_to_multiple_of"),
        "no: tables grow by themselves, by as many rows as `data.add_tokens` needs",
    ),
    "default_system": "data.system",
    "system_prompt": "data.system",
    "max_samples": "no: give a file with fewer rows",
    "overwrite_cache": "no: nothing stale is kept",
    "dataset_prepared_path": "no: rows are prepared in seconds each time",
    "preprocessing_num_workers": "no: rows are prepared in seconds by one process",
    "dataloader_num_workers": "no: rows are prepared before the first step",
    "dataset_num_proc": "no: rows are prepared in seconds by one process",
    "remove_unused_columns": "no: only the keys that make the conversation are read",
    "shuffle_merged_datasets": "data.shuffle",
    # LoRA
    **dict.fromkeys(("lora_r", "lora_rank", "rank"), "lora.r"),
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    **dict.fromkeys(("lora_target_modules", "lora_target", "lora_modules"), "lora.target_modules"),
    "lora_target_linear": "lora.target_modules; `all-linear` is what it says from the start",
    "use_rslora": "lora.rslora",
    "peft_use_rslora": "lora.rslora",
    "lora_bias": "lora.bias",
    "lora_modules_to_save": "lora.modules_to_save",
    **dict.fromkeys(
        ("trainable_token_indices", "lora_trainable_token_indices"),
        "no: the embeddings of `data.add_tokens` are trained by themselves",
    ),
    **dict.fromkeys(
        ("ensure_weight_tying", "peft_ensure_weight_tying"),
        "no: an embedding and head that are one stay one while they are trained in full",
    ),
    "additional_target": "lora.modules_to_save",
    "layers_to_transform": "lora.layers",
    "peft_layers_to_transform": "lora.layers",
    "num_layers": "lora.layers; `last:4` adapts the last four",
    "lora_layers": "lora.layers; `last:4` adapts the last four",
    **dict.fromkeys(("lora_model_dir", "adapter_name_or_path"), "lora.adapter; a folder to start from"),
    "task_type": "no: it is always a causal language model",
    "finetuning_type": "no: lorimer trains LoRA adapters and nothing else",
    "peft_type": "no: lorimer trains LoRA adapters and nothing else",
    "stage": "no: lorimer trains on answers and nothing else",
    "use_dora": "no: DoRA is not offered",
    "peft_use_dora": "no: DoRA is not offered",
    "loftq_config": "no: LoftQ is not offered",
    "init_lora_weights": "no: A is drawn from the seed as PEFT draws it and B is zero",
    "fan_in_fan_out": "no: it follows from the base",
    "loraplus_lr_ratio": "train.loraplus_lr_ratio",
    # optimisation
    **dict.fromkeys(("num_train_epochs", "num_epochs", "n_epochs"), "train.epochs"),
    "iters": "train.max_steps",
    "total_steps": "train.max_steps",
    **dict.fromkeys(
        ("per_device_train_batch_size", "micro_batch_size", "train_batch_size", "global_batch_size"), _ROWS
    ),
    "gradient_accumulation_steps": _ACCUMULATION,
    "grad_accumulation_steps": _ACCUMULATION,
    "auto_find_batch_size": "no: how a step is split is chosen from the memory there is",
    "lr": "train.learning_rate",
    "lr_scheduler_type": "train.lr_scheduler",
    "lr_schedule": "train.lr_scheduler",
    "scheduler": "train.lr_scheduler",
    "lr_scheduler_kwargs": "no: the schedules have no settings but the warm-up",
    "cosine_min_lr_ratio": "no: the schedules end at zero",
    "min_lr": "no: the schedules end at zero",
    "warmup": "train.warmup_ratio; or `train.warmup_steps`",
    "optim": "train.optimizer; adamw, adamw_8bit, paged_adamw, lion, sgd or adafactor",
    "optim_args": "no: see `train.adam_beta1`, `train.adam_beta2` and `train.adam_epsilon`",
    "betas": "train.adam_beta1; and `train.adam_beta2`",
    "eps": "train.adam_epsilon",
    "gradient_clipping": "train.max_grad_norm",
    "grad_clip": "train.max_grad_norm",
    "label_smoothing_factor": "train.label_smoothing",
    "neftune_noise_alpha": "no: NEFTune is not offered",
    "random_seed": "train.seed",
    "data_seed": "train.seed; one seed rules order, initial adapter and dropout",
    # precision and memory
    **dict.fromkeys(("bf16", "bfloat16", "pure_bf16", "fp16", "float16"), _DTYPE),
    **dict.fromkeys(("torch_dtype", "precision"), _DTYPE),
    "tf32": "no: it is left as PyTorch has it",
    **dict.fromkeys(
        (
            "load_in_4bit", "load_in_8bit", "quantization", "quantization_bit", "quantization_method",
            "quantization_config", "qlora",
        ),
        _QUANT,
    ),
    "bnb_4bit_quant_type": "quant.kind; nf4 or fp4",
    "bnb_4bit_compute_dtype": _DTYPE,
    **dict.fromkeys(("bnb_4bit_use_double_quant", "double_quantization"), "quant.double; it is on already"),
    "gptq": "no: GPTQ checkpoints are not read; a GGUF file or a bitsandbytes checkpoint is",
    **dict.fromkeys(("gradient_checkpointing", "grad_checkpoint"), _MEMORY),
    "gradient_checkpointing_kwargs": _MEMORY,
    "activation_offloading": _MEMORY,
    "mixed_precision": _DTYPE,
    "torch_compile": "no: nothing is compiled while training; the kernels are ready",
    "use_cpu": _WHERE,
    "no_cuda": _WHERE,
    "device_map": _WHERE,
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "ddp", "ddp_timeout", "local_rank"), _CLUSTER),
    # evaluation
    "eval_steps": "train.eval_every",
    "evals_per_epoch": "train.eval_every; a number of steps, epoch or never",
    **dict.fromkeys(("eval_strategy", "evaluation_strategy"), "train.eval_every"),
    "do_eval": "train.eval_every; never turns it off",
    "do_train": "no: `lorimer train` trains",
    "per_device_eval_batch_size": "evaluate.batch_size",
    "eval_batch_size": "evaluate.batch_size",
    "max_new_tokens": "evaluate.max_new_tokens",
    "predict_with_generate": "no: answers are generated for `data.test` by themselves",
    "early_stopping": "train.early_stopping_patience",
    "patience": "train.early_stopping_patience",
    "load_best_model_at_end": _BEST,
    "metric_for_best_model": _BEST,
    "greater_is_better": _BEST,
    # output
    "output_dir": "output.dir; a folder of its own is made in it for each run",
    "run_name": "output.name",
    "experiment_name": "output.name",
    **dict.fromkeys(("save_steps", "save_strategy", "steps_per_save"), "output.save_every"),
    "saves_per_epoch": "output.save_every",
    "save_total_limit": "output.keep",
    "save_safetensors": _SAVING,
    "save_only_model": _SAVING,
    "overwrite_output_dir": "no: a run never overwrites another",
    "resume_from_checkpoint": "no: it is an option of the command: lorimer train --resume RUN",
    "auto_resume_from_checkpoints": "no: it is an option of the command: lorimer train --resume RUN",
    "logging_steps": "no: " + _STEPS,
    "logging_strategy": "no: " + _STEPS,
    "log_every": "no: " + _STEPS,
    "steps_per_report": "no: " + _STEPS,
    "logging_dir": "no: everything a run writes is in its folder under `output.dir`",
    "plot_loss": "no: the losses are in metrics.jsonl",
    "report_to": "output.trackers",
    "wandb": "output.trackers; add wandb to the list",
    "wandb_project": "output.trackers; wandb's own variables (WANDB_PROJECT) set the rest",
    "use_tensorboard": "output.trackers; add tensorboard to the list",
    "use_wandb": "output.trackers; add wandb to the list",
    "use_mlflow": "output.trackers; add mlflow to the list",
    **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_token", "hub_strategy"), _HUB),
    # other kinds of training
    **dict.fromkeys(("rl", "dpo", "rl_beta", "pref_beta", "pref_loss"), _PREFERENCE),
    # sections of other tools
    **dict.fromkeys(("method", "training", "logging", "method_config", "trainer", "peft"), _SECTION),
}  # fmt: skip
