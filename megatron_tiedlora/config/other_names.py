"""Names that people know from other tools, and what they are here: of flags, of YAML keys, and of their values.

`{name}` stands for one of our settings, and is written as a flag or as a key. An answer is only given by a command that
has all the settings that it names; one that lacks them looks in `ELSEWHERE`. For a name that is in no table the nearest
spelling is guessed.
"""

from __future__ import annotations

import string
from collections.abc import Collection, Iterable, Mapping, Sequence

from megatron_tiedlora.base.errors import shown
from megatron_tiedlora.base.wording import nearest_name

_MOST_NAMES = 8  # of those that are unknown, in one message


def _same(answer: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), answer)


OUR_NAMES: Mapping[str, str] = {
    # optimisation
    **_same("{learning_rate}", "lr learning_rates base_lr max_lr"),
    **_same("{epochs}", "num_train_epochs num_epochs n_epochs max_epochs epoch"),
    **_same("{max_steps}", "steps num_steps train_iters max_iters total_steps num_training_steps iterations"),
    **_same(
        "{micro_batch_size}, the rows of a forward pass; {global_batch_size} sets the samples of a step",
        "per_device_train_batch_size per_device_batch_size micro_batch train_micro_batch_size_per_gpu device_batch_size"
        " mbs",
    ),
    **_same("{global_batch_size}, the samples of a step over all ranks", "batch_size train_batch_size gbs batch bs"),
    **_same(
        "{global_batch_size}: it is micro batch x accumulation steps x data-parallel ranks, and the steps follow",
        "gradient_accumulation_steps grad_accum gradient_accumulation accumulate_grad_batches grad_acc accum_steps",
    ),
    **_same("{eval_batch_size}", "per_device_eval_batch_size"),
    **_same("{weight_decay}", "wd"),
    **_same("{warmup_steps}", "warmup num_warmup_steps lr_warmup_steps lr_warmup_iters warmup_iters"),
    **_same("{warmup_steps}, a number of steps", "warmup_ratio warmup_proportion lr_warmup_fraction"),
    **_same("{schedule}", "lr_scheduler_type lr_scheduler scheduler lr_schedule lr_decay_style scheduler_type"),
    **_same("{beta1}", "adam_beta1"),
    **_same("{beta2}", "adam_beta2"),
    **_same("{beta1} and {beta2}", "betas adam_betas adamw_betas"),
    **_same("{gradient_clipping}", "max_grad_norm grad_clip clip_grad gradient_clip_val max_norm grad_norm"),
    **_same(
        "{eval_interval}, a number of steps", "eval_steps eval_every evaluation_strategy eval_strategy val_interval"
    ),
    **_same("{save_interval}, a number of steps", "save_steps save_every save_strategy save_freq ckpt_interval"),
    **_same("{keep_checkpoints}", "save_total_limit keep_last save_top_k max_checkpoints"),
    **_same("{patience}", "early_stopping_patience early_stopping"),
    **_same("{eval_metric}", "metric_for_best_model load_best_model_at_end"),
    # the adapter
    **_same("{rank}", "lora_r r lora_rank lora_dim adapter_dim low_rank"),
    **_same("{alpha}", "lora_alpha lora_scale lora_scaling"),
    **_same(
        "{alpha}: the scale is alpha / rank, and that of rank-stabilised LoRA is lora_alpha / sqrt(rank), so give"
        " alpha = lora_alpha x sqrt(rank)",
        "use_rslora rslora",
    ),
    **_same("{dropout}", "lora_dropout adapter_dropout"),
    **_same(
        "{targets}: qkv (q_proj, k_proj and v_proj), o_proj, gate_up (gate_proj and up_proj), down_proj, or all",
        "target_modules lora_target_modules lora_target modules lora_modules lora_target_linear target",
    ),
    **_same("{layers}", "layers_to_transform lora_layers num_lora_layers"),
    **_same("{method}", "peft_type peft_method tuner_type train_type finetuning_type peft adapter_type lora"),
    **_same("{init_from}", "lora_path adapter_name_or_path peft_model_id warm_start pretrained_adapter adapter"),
    # the model
    **_same(
        "{model}", "model_name_or_path model_name model_id base_model base_model_name_or_path model_path checkpoint"
    ),
    **_same("{tokenizer}", "tokenizer_name_or_path tokenizer_name tokenizer_path tokenizer_model"),
    **_same("{dtype} bf16", "bf16 bfloat16 pure_bf16"),
    **_same("{dtype} fp32", "fp32 float32"),
    **_same("{dtype}", "torch_dtype precision mixed_precision"),
    **_same("{dtype} bf16; fp16 is not offered", "fp16 float16 half"),
    **_same(
        "{max_length}",
        "max_seq_length max_seq_len seq_length seq_len sequence_len cutoff_len block_size model_max_length max_len"
        " max_tokens context_length sequence_length max_sequence_length",
    ),
    # ranks
    **_same("{tensor_parallel}", "tp tp_size tensor_model_parallel_size tensor_parallel_size"),
    **_same("{pipeline_parallel}", "pp pp_size pipeline_model_parallel_size pipeline_parallel_size"),
    **_same("{sequence_parallel}", "sp"),
    **_same(
        "what {tensor_parallel} and {pipeline_parallel} leave of the ranks that the launcher starts",
        "dp dp_size data_parallel data_parallel_size",
    ),
    **_same("{ds_config}, for example zero2.json", "deepspeed deepspeed_config ds zero_stage zero"),
    **_same("{ds_config} zero3.json, which shards the base as FSDP does", "fsdp fsdp_config"),
    **_same(
        "{recompute} full",
        "gradient_checkpointing activation_checkpointing checkpoint_activations recompute_granularity",
    ),
    # data and the run
    **_same(
        "{train_file}", "dataset dataset_name data data_path train_data train_dataset dataset_path train_files datasets"
    ),
    **_same(
        "{validation_file}", "val_dataset eval_dataset validation_data val_data eval_file val_file validation_files"
    ),
    **_same("{chat_template}", "template chat_template_path"),
    **_same("{columns}", "column_mapping columns_mapping text_column dataset_text_field prompt_column"),
    **_same(
        "{train_on}", "assistant_only_loss train_on_inputs completion_only_loss loss_scale train_on_responses_only"
    ),
    **_same("{packing}", "sample_packing pack padding_free"),
    **_same("{output_dir}", "output out_dir save_dir run_name save_path save output_path logging_dir experiment_name"),
    **_same("{resume}", "resume_from_checkpoint resume_from load_checkpoint"),
    **_same("{report_to}", "logger log_with trackers tracker loggers"),
    **_same(
        "{report_to} wandb, where the variable WANDB_PROJECT names the project",
        "wandb wandb_project use_wandb wandb_run_name",
    ),
    **_same("{profile}", "profiler use_profiler torch_profiler"),
    **_same("{compile}", "torch_compile"),
    **_same("{seed}", "random_seed data_seed"),
    **_same("{base} nf4", "load_in_4bit use_qlora qlora bnb_4bit_quant_type"),
    **_same("{base} int8", "load_in_8bit"),
    **_same("{base} fp8", "fp8 fp8_format"),
    **_same("{base}", "quantization quantization_bit quantize quant quantization_config"),
    **_same("{dtype}", "bnb_4bit_compute_dtype"),
}

# What commands that do not train call it, where `OUR_NAMES` has a setting of training.
ELSEWHERE: Mapping[str, str] = {
    **_same(
        "{adapter}",
        "adapters lora lora_path adapter_path adapter_name_or_path peft_model_id peft_path adapter_dir lora_dir",
    ),
    **_same("{batch_size}", "batch bs eval_batch_size per_device_eval_batch_size"),
    **_same("{max_new_tokens}", "max_tokens max_generated_tokens max_gen_tokens"),
    **_same("{limit}", "max_samples num_samples eval_samples"),
    **_same("{learning_rates}", "lr"),
    **_same("{ranks}", "r lora_r lora_rank"),
    **_same("{repo}", "repo_id hub_model_id push_to_hub"),
    **_same("{output}", "output_dir out out_dir save_dir save_path output_path export_dir output_folder"),
}

# What no command offers, and what there is instead.
NOT_OFFERED: Mapping[str, str] = {
    **_same("DoRA is not offered", "use_dora dora"),
    **_same("NEFTune is not offered", "neftune_noise_alpha neftune"),
    **_same("the optimizer is always AdamW", "optim optimizer optimizer_type optim_type"),
    **_same("context parallelism is not offered yet", "cp cp_size context_parallel context_parallel_size"),
    **_same("streaming is not offered: rows are tokenised once and cached", "streaming stream"),
    **_same("a run does not upload anything", "push_to_hub hub_model_id hub_token"),
    **_same("code of a model's author is never run", "trust_remote_code"),
    **_same("every step is logged", "logging_steps log_interval log_every logging_strategy"),
    **_same(
        "attention is chosen by device and installed packages; a run says which at its start",
        "attn_implementation flash_attn use_flash_attention use_flash_attn flash_attention attention_backend attn_impl",
    ),
    **_same(
        "the launcher starts one process for each GPU: tiedlora run --num_gpus N",
        "nproc_per_node nproc num_processes gpus devices num_gpus",
    ),
    **_same("all rows are trained on, and validated on if they are a --validation_file", "do_train do_eval"),
}

_METHODS = {
    "qlora": "here it is lora with {base} nf4",
    "rslora": "here it is lora with {alpha} lora_alpha x sqrt(rank)",
    **_same("here it is tl1 to tl6; tl6 is the default", "tied-lora tiedlora"),
    **_same("DoRA is not offered", "dora"),
    **_same("only adapters are trained", "full full-finetune none"),
}
_FORMATS = {
    **_same("nf4", "4bit 4-bit qlora bnb-4bit load-in-4bit"),
    **_same("int8", "8bit 8-bit bnb-8bit load-in-8bit"),
    **_same("fp8", "float8 e4m3 fp8-e4m3"),
    **_same("nf4 has 4 bits", "int4 fp4 gptq awq"),
    **_same("here it is {dtype}, without {base}", "bf16 bfloat16 fp32 float32 none"),
}
# By setting: what people call its values. An answer that is one of its values is taken; any other is a hint.
OUR_VALUES: Mapping[str, Mapping[str, str]] = {
    "method": _METHODS,
    "methods": _METHODS,
    "base": _FORMATS,
    "formats": _FORMATS,
    "dtype": {
        **_same("bf16", "bfloat16 torch.bfloat16"),
        **_same("fp32", "float32 torch.float32 float"),
        **_same("fp16 is not offered", "fp16 float16 torch.float16 half"),
    },
    "schedule": {"constant-with-warmup": "constant"},
    "gpu": {**_same("a100-80", "a100-80gb"), **_same("h100", "h100-80 h100-80gb"), **_same("h200", "h200-141gb")},
}


def value_meant(setting: str, given: str, choices: Sequence[str]) -> str:
    """The one of `choices` that a value means: in other letters, or by the name that another tool has for it.

    Any other value is returned as it was given.
    """
    named = {alias: value for alias, value in OUR_VALUES.get(setting, {}).items() if value in choices}
    return {**named, **{_plain(choice): choice for choice in choices}}.get(_plain(given), given)


def value_hint(setting: str, given: str, choices: Sequence[str]) -> str:
    """What an unknown value of a setting means here: ' (...)' as of `name_hint`."""
    answer = OUR_VALUES.get(setting, {}).get(_plain(given))
    return nearest_name(given, choices) if answer is None else f" ({_written(answer, '--')})"


def _plain(text: str) -> str:
    return text.strip().lower().replace("_", "-")


def unknown_names(kind: str, given: Iterable[object], known: Collection[str]) -> str:
    """`unknown KINDs A, B`: the names that are not `known`, each once, with what it means here; '' if all are known."""
    names = list(dict.fromkeys(name for name in given if name not in known))
    said = [
        f"{name if name.startswith('-') else shown(name)}{name_hint(name, known)}"
        if isinstance(name, str)
        else shown(name)
        for name in names[:_MOST_NAMES]
    ]
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return f"unknown {kind}{'s' if len(said) > 1 else ''} {', '.join(said)}{more}" if said else ""


def name_hint(given: str, known: Iterable[str]) -> str:
    """What an unknown name means here: ' (...)' with the answer of the tables, else with the nearest name, else ''.

    Args:
        given: a flag with its dashes, or a key; `known` likewise.
    """
    names = list(known)
    dashes = "--" if given.startswith("-") else ""
    bare = given.lstrip("-").replace("-", "_").lower()
    if f"{dashes}{bare}" in names:
        return f" (did you mean {dashes}{bare}?)"
    answers = [table[bare] for table in (OUR_NAMES, ELSEWHERE) if bare in table]
    held = {name.lstrip("-") for name in names}
    for answer in answers:
        if _settings_in(answer) <= held:
            return f" (here it is {_written(answer, dashes)})"
    if bare in NOT_OFFERED:
        return f" ({NOT_OFFERED[bare]})"
    # If this command has nothing of a kind that is in the tables, a similar spelling would mislead.
    return "" if answers else nearest_name(given, names)


def _written(answer: str, dashes: str) -> str:
    return answer.format(**{name: dashes + name for name in _settings_in(answer)})


def _settings_in(answer: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(answer) if name}
