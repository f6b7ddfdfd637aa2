"""Translate flags, YAML keys and values of other tools into the names that this package uses.

Most names from other tools are declared with their setting. This module has the names that need a longer hint. In a
hint, `{name}` is a setting of this package, which is shown as a flag or a key. A command shows a hint only if it has
all settings in the hint. For any other unknown name, the most similar known name is suggested.
"""

import string
from collections.abc import Collection, Iterable, Mapping, Sequence

from megatron_tiedlora.base.messages import nearest_name, shown

_MOST_NAMES = 8  # maximum number of unknown names in one message


def _same(answer: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), answer)


# Hints that say more than the setting's name. Names that need no explanation are declared with their setting.
SENTENCES: Mapping[str, str] = {
    **_same(
        "{micro_batch_size}, the rows of a forward pass; {global_batch_size} sets the samples of a step",
        "per_device_train_batch_size per_device_batch_size micro_batch train_micro_batch_size_per_gpu device_batch_size"
        " mbs",
    ),
    **_same("{global_batch_size}, the samples of a step over all ranks", "batch_size train_batch_size gbs batch bs"),
    **_same(
        "{global_batch_size}, from which the accumulation steps are computed",
        "gradient_accumulation_steps grad_accum gradient_accumulation accumulate_grad_batches grad_acc accum_steps",
    ),
    **_same("{warmup_steps}, a number of steps", "warmup_ratio warmup_proportion lr_warmup_fraction"),
    **_same("{beta1} and {beta2}", "betas adam_betas adamw_betas"),
    **_same(
        "{eval_interval}, a number of steps", "eval_steps eval_every evaluation_strategy eval_strategy val_interval"
    ),
    **_same("{save_interval}, a number of steps", "save_steps save_every save_strategy save_freq ckpt_interval"),
    **_same("{rate_factors} B=RATIO", "loraplus_lr_ratio loraplus_ratio lora_plus loraplus"),
    **_same(
        "{targets}: qkv (q_proj, k_proj and v_proj), o_proj, gate_up (gate_proj and up_proj), down_proj, or all",
        "target_modules lora_target_modules lora_target modules lora_modules lora_target_linear target",
    ),
    **_same("{dtype} bf16", "bf16 bfloat16 pure_bf16"),
    **_same("{dtype} fp32", "fp32 float32"),
    **_same("{dtype} bf16; fp16 is not supported", "fp16 float16 half"),
    **_same(
        "the number of started ranks divided by {tensor_parallel} x {pipeline_parallel}",
        "dp dp_size data_parallel data_parallel_size",
    ),
    **_same("{ds_config}, for example zero2.json", "deepspeed deepspeed_config ds zero_stage zero"),
    **_same("{ds_config} zero3.json, which shards the base as FSDP does", "fsdp fsdp_config"),
    **_same(
        "{recompute} full",
        "gradient_checkpointing activation_checkpointing checkpoint_activations recompute_granularity",
    ),
    **_same(
        "{report_to} wandb, where the variable WANDB_PROJECT names the project",
        "wandb wandb_project use_wandb wandb_run_name",
    ),
    **_same("{base} nf4", "load_in_4bit use_qlora qlora bnb_4bit_quant_type"),
    **_same("{base} int8", "load_in_8bit"),
    **_same("{base} fp8", "fp8 fp8_format"),
}

ADAPTER_NAMES = (  # for commands that read an adapter
    "adapters lora lora_path adapter_path adapter_name_or_path peft_model_id peft_path adapter_dir lora_dir"
)
OUTPUT_NAMES = "output_dir out out_dir save_dir save_path output_path export_dir output_folder"

NO_DORA = "DoRA is not supported: it rescales W x, which a step does not keep and vLLM does not serve"
# Features that no command has, and what to use instead.
NOT_OFFERED: Mapping[str, str] = {
    **_same(NO_DORA, "use_dora dora"),
    **_same("NEFTune is not supported", "neftune_noise_alpha neftune"),
    **_same("the optimizer is always AdamW", "optim optimizer optimizer_type optim_type"),
    **_same("context parallelism is not supported yet", "cp cp_size context_parallel context_parallel_size"),
    **_same("streaming is not supported; rows are tokenised once and cached", "streaming stream"),
    **_same("a run does not upload anything", "push_to_hub hub_model_id hub_token"),
    **_same("code in a model's repository is never run", "trust_remote_code"),
    **_same("every step is logged", "logging_steps log_interval log_every logging_strategy"),
    **_same(
        "the attention kernel is chosen by device and installed packages; a run prints it at its start",
        "attn_implementation flash_attn use_flash_attention use_flash_attn flash_attention attention_backend attn_impl",
    ),
    **_same(
        "the launcher starts one process for each GPU: tiedlora run --num_gpus N",
        "nproc_per_node nproc num_processes gpus devices num_gpus",
    ),
    **_same(
        "the groups of a sweep run one after another on all GPUs that --launcher_args selects; --together N limits the"
        " runs in a group",
        "gpus_per_run runs_at_once",
    ),
    **_same("a run always trains, and evaluates on its validation rows", "do_train do_eval"),
}

# {name of a value in another tool: the value that replaces this name here, or, if it is no valid value, a hint}.
OTHER_METHODS = {
    "qlora": "here it is lora with {base} nf4",
    "rslora": "here it is lora with {rslora}",
    **_same("here it is lora with {rate_factors} B=RATIO", "loraplus lora+"),
    **_same("here it is tl1 to tl6; tl6 is the default", "tied-lora tiedlora"),
    "dora": NO_DORA,
    **_same("only adapters are trained", "full full-finetune none"),
}
OTHER_FORMATS = {
    **_same("nf4", "4bit 4-bit qlora bnb-4bit load-in-4bit"),
    **_same("int8", "8bit 8-bit bnb-8bit load-in-8bit"),
    **_same("fp8", "float8 e4m3 fp8-e4m3"),
    **_same("nf4 has 4 bits", "int4 fp4 gptq awq"),
    **_same("here it is {dtype}, without {base}", "bf16 bfloat16 fp32 float32 none"),
}
OTHER_DTYPES = {
    **_same("bf16", "bfloat16 torch.bfloat16"),
    **_same("fp32", "float32 torch.float32 float"),
    **_same("fp16 is not supported", "fp16 float16 torch.float16 half"),
}
OTHER_SCHEDULES = {"constant-with-warmup": "constant"}
OTHER_GPUS = {
    **_same("a100-80", "a100-80gb"),
    **_same("a800", "a800-80 a800-80gb"),
    **_same("h100", "h100-80 h100-80gb"),
    **_same("h800", "h800-80 h800-80gb"),
    **_same("h200", "h200-141gb"),
}


def value_meant(given: str, choices: Sequence[str], others: Mapping[str, str]) -> str:
    """Return the choice that a value means. A value that means none of `choices` is returned unchanged.

    Case is ignored, and `_` is read as `-`. `others` maps names of values in other tools to choices or to hints.
    """
    named = {alias: value for alias, value in others.items() if value in choices}
    return {**named, **{_plain(choice): choice for choice in choices}}.get(_plain(given), given)


def value_hint(given: str, choices: Sequence[str], others: Mapping[str, str]) -> str:
    """Return a hint for an unknown value of a setting, in the form ' (...)', or '' if there is none."""
    answer = others.get(_plain(given))
    return nearest_name(given, choices) if answer is None else f" ({_written(answer, '--')})"


def _plain(text: str) -> str:
    return text.strip().lower().replace("_", "-")


def unknown_names(
    kind: str, given: Iterable[object], known: Collection[str], others: Mapping[str, Sequence[str]]
) -> str:
    """Return the text `unknown KINDs A, B` with hints for the given names that are not known; '' if all are known.

    Args:
        others: see `name_hint`.
    """
    names = list(dict.fromkeys(name for name in given if name not in known))
    said = [
        f"{name if name.startswith('-') else shown(name)}{name_hint(name, known, others)}"
        if isinstance(name, str)
        else shown(name)
        for name in names[:_MOST_NAMES]
    ]
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return f"unknown {kind}{'s' if len(said) > 1 else ''} {', '.join(said)}{more}" if said else ""


def name_hint(given: str, known: Iterable[str], others: Mapping[str, Sequence[str]]) -> str:
    """Return a hint for an unknown name in the form ' (...)', or '' if there is none.

    Args:
        given: a flag with its dashes, or a YAML key. The names in `known` have the same form.
        others: hints by the name in other tools (`names_elsewhere`). The hints of this command come first.
    """
    names = list(known)
    dashes = "--" if given.startswith("-") else ""
    bare = given.lstrip("-").replace("-", "_").lower()
    if f"{dashes}{bare}" in names:
        return f" (did you mean {dashes}{bare}?)"
    answers = [*others.get(bare, ()), *([SENTENCES[bare]] if bare in SENTENCES else [])]
    held = {name.lstrip("-") for name in names}
    for answer in answers:
        if _settings_in(answer) <= held:
            return f" (here it is {_written(answer, dashes)})"
    if bare in NOT_OFFERED:
        return f" ({NOT_OFFERED[bare]})"
    # If there are hints for the name but this command lacks the setting, a similar name would be misleading.
    return "" if answers else nearest_name(given, names)


def _written(answer: str, dashes: str) -> str:
    return answer.format(**{name: dashes + name for name in _settings_in(answer)})


def _settings_in(answer: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(answer) if name}
