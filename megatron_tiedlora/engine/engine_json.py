"""Find and check the DeepSpeed JSON, and complete it with the values that the settings define.

DeepSpeed ignores unknown keys at its top level and clips at 1.0 if `gradient_clipping` is absent. It casts the
adapters if there is a precision section. So every key is checked here before it reaches an engine.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from megatron_tiedlora.base.files import first_problem, read_json_object
from megatron_tiedlora.base.messages import UserError, as_given, nearest_name, shown, user_path
from megatron_tiedlora.config.batch import BatchPlan

# In a clone this is a link to the top-level ds_configs/; a wheel has copies of its files.
SHIPPED_CONFIGS = (Path(__file__).resolve().parents[1] / "ds_configs").resolve()

# Sections that would silently override the numerics of the settings, and what to do instead.
REJECTED_SECTIONS = {
    "bf16": "Use --dtype for the base. Adapters, gradients and optimizer are always fp32",
    "bfloat16": "Use --dtype",
    "fp16": "Use --dtype. fp16 is not supported; bf16 needs no loss scaling",
    "amp": "Use --dtype",
    "torch_autocast": "Use --dtype",
    "data_types": "Remove it: gradients are always accumulated in fp32",
    "communication_data_type": "Remove it: gradients are always summed in fp32",
    "prescale_gradients": "Remove it: the loss is divided by the supervised tokens of the global batch",
    "gradient_predivide_factor": "Remove it: the loss is divided by the supervised tokens of the global batch",
    "sparse_gradients": "Remove it: no trained tensor is sparse",
    "optimizer": "Use --learning_rate and --weight_decay",
    "scheduler": "Use --learning_rate, --schedule, --warmup_steps and --max_steps",
}

# The accepted keys of DeepSpeed's zero_optimization (0.19.8), with their types. Excluded are deprecated keys, aliases,
# `zenflow` (it changes how AdamW steps) and `leaf_module`. The table is here because a plan must not need DeepSpeed.
_Count, _Bucket = Annotated[int, Field(ge=0)], Annotated[int, Field(gt=0)]  # DeepSpeed divides by a bucket's size
_Fraction = Annotated[float, Field(ge=0, le=1)]
_OFFLOAD: dict[str, Any] = {
    "device": (Literal["none", "cpu"], "none"),
    "nvme_path": (None, None),
    "pin_memory": (bool, True),
    "buffer_count": (_Count, 4),
}


def _section(name: str, fields: Mapping[str, Any]) -> type[BaseModel]:
    """Return a pydantic model of a JSON section. `fields` maps space-separated keys to their type and default."""
    by_key: dict[str, Any] = {key: field for keys, field in fields.items() for key in keys.split()}
    return cast(type[BaseModel], create_model(name, __config__=ConfigDict(extra="forbid"), **by_key))


_OFFLOADS = {
    "offload_optimizer": {
        **_OFFLOAD,
        "pipeline_read pipeline_write fast_init super_offload": (bool, False),
        "ratio cpuadam_cores_perc": (_Fraction, 1.0),
    },
    "offload_param": {**_OFFLOAD, "buffer_size max_in_cpu": (_Count, 0)},
}
_ZERO_FLAGS = """
contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce allgather_partitions load_from_fp32_weights
elastic_checkpoint ignore_unused_parameters legacy_stage1 round_robin_gradients parameter_alignment
zero_quantized_weights zero_quantized_gradients zero_quantized_nontrainable_weights memory_efficient_linear
pipeline_loading_checkpoint override_module_apply log_trace_cache_warnings enable_sanity_checks
save_muon_momentum_buffer_in_memory stage3_gather_16bit_weights_on_model_save stage3_use_all_reduce_for_fetch_params
stage3_allgather_sequential
"""
_ZERO_COUNTS = """
sub_group_size zero_hpz_partition_size stage3_prefetch_bucket_size stage3_max_live_parameters
stage3_param_persistence_threshold stage3_model_persistence_threshold stage3_max_reuse_distance
stage3_module_granularity_threshold
"""
ZeroSection = _section(
    "zero_optimization",
    {
        "stage": (Annotated[int, Field(strict=True, ge=0, le=3)], 0),
        "compute_grad_norm": (Literal[True], True),
        _ZERO_FLAGS: (bool, False),
        "overlap_comm": (bool | None, None),
        _ZERO_COUNTS: (_Count, 0),
        "reduce_bucket_size allgather_bucket_size": (_Bucket, 1),
        **{name: (_section(name, fields) | None, None) for name, fields in _OFFLOADS.items()},
    },
)
_BATCH = "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps"
_FLAGS = """
zero_allow_untested_optimizer zero_force_ds_cpu_optimizer wall_clock_breakdown memory_breakdown dump_state
disable_allgather disable_python_gc
"""
# The accepted keys at the top level. The values of batch and clipping keys are compared with the settings.
_ENGINE = _section(
    "engine",
    {
        f"{_BATCH} gradient_clipping zero_optimization": (Any, None),
        _FLAGS: (Annotated[bool, Field(strict=True)], False),
        "comms_logger flops_profiler aio timers": (dict[str, Any], {}),
        "steps_per_print": (Annotated[int, Field(strict=True)] | None, None),
        "log_level": (str, ""),
    },
)


@dataclass(frozen=True)
class EngineConfig:
    """A checked DeepSpeed JSON.

    Attributes:
        path: the file that was read.
        values: the complete configuration for `deepspeed.initialize`.
    """

    path: Path
    values: Mapping[str, Any]

    @property
    def zero_stage(self) -> int:
        """Return the ZeRO stage, 0 to 3."""
        return int(self.values.get("zero_optimization", {}).get("stage", 0))

    @property
    def live_parameters(self) -> int:
        """Return the number of gathered elements at which ZeRO-3 gathers no more weights in advance."""
        return int(self.values.get("zero_optimization", {}).get("stage3_max_live_parameters", 1_000_000_000))

    @property
    def overlaps_gathers(self) -> bool:
        """Return whether ZeRO-3 gathers weights on a separate stream, as it does by default but not in zero3.json."""
        return self.zero_stage == 3 and bool(self.values["zero_optimization"].get("overlap_comm", True))


def find_engine_json(name: str) -> Path:
    """Return the path of the --ds_config file, as given or in ds_configs/. Raise UserError if neither exists."""
    for path in (user_path(name), SHIPPED_CONFIGS / name):
        if path.is_file():
            return path
    shipped = sorted(path.name for path in SHIPPED_CONFIGS.glob("*.json"))
    raise UserError(
        f"--ds_config {name}: no such file. Give a path or the name of a file in ds_configs/"
        f"{nearest_name(name, shipped)}"
    )


def load_engine_config(name: str, *, batches: BatchPlan, gradient_clipping: float) -> EngineConfig:
    """Read, check and complete a DeepSpeed JSON.

    Args:
        name: the value of --ds_config.
        batches: the batch sizes of the settings; the JSON may have "auto" or the same values.
        gradient_clipping: the value of the settings, which is always set because DeepSpeed's default is 1.0.

    Raises:
        UserError: the file is not JSON, has an unknown key, or has a section or value that contradicts the settings.
    """
    path = find_engine_json(name)
    content = read_json_object(path, kind="a DeepSpeed JSON")
    for key in content:
        if key in REJECTED_SECTIONS:
            raise UserError(f"{path}: section {key!r} is not supported. {REJECTED_SECTIONS[key]}")
    kept = _checked(path, content, _ENGINE)
    ours: dict[str, float] = {
        "train_batch_size": batches.global_batch_size,
        "train_micro_batch_size_per_gpu": batches.micro_batch_size,
        "gradient_accumulation_steps": batches.accumulation_steps,
        "gradient_clipping": gradient_clipping,
    }
    flags = {"gradient_clipping": "--gradient_clipping", "train_batch_size": "--global_batch_size"}
    for key, value in ours.items():
        if kept.get(key, value) != value:
            flag = flags.get(key, "--micro_batch_size")
            found = as_given(kept[key])
            raise UserError(f'{path}: {key} is {found}, but the settings make it {value:g}. Use "auto" or set {flag}')
    if (profile := kept.get("flops_profiler", {}).get("output_file")) is not None:  # DeepSpeed overwrites this file
        raise UserError(
            f"{path}: flops_profiler.output_file is {shown(profile)}; remove it, because the profile is printed, and"
            " the profile of rank 0 is also in the run's logs/"
        )
    zero = kept.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise UserError(f'{path}: zero_optimization must be an object such as {{"stage": 2}}')
    if zero.get("compute_grad_norm") is False:
        raise UserError(
            f"{path}: zero_optimization.compute_grad_norm is false, but each step logs the gradient norm; remove it"
        )
    for section in _OFFLOADS:
        offload = zero.get(section)
        if isinstance(offload, dict) and (offload.get("device") == "nvme" or offload.get("nvme_path") is not None):
            # DeepSpeed creates folders at that path and removes their contents.
            raise UserError(
                f'{path}: zero_optimization.{section} writes outside the run folder (device "nvme" or nvme_path). Use'
                ' "device": "cpu" without nvme_path'
            )
    zero = _checked(path, zero, ZeroSection, within="zero_optimization.")
    if zero.get("stage") != 3 and (zero.get("offload_optimizer") or {}).get("ratio", 1) != 1:
        raise UserError(f"{path}: zero_optimization.offload_optimizer.ratio is for stage 3 only. Remove it")
    # DeepSpeed's timer waits for the device twice per micro-batch (0.19.8); the run's log has the throughput.
    timers = {"throughput": {"enabled": False}, **kept.get("timers", {})}
    return EngineConfig(path, {**kept, "zero_optimization": zero, "timers": timers, **ours})


def _checked(path: Path, content: Mapping[str, Any], kind: type[BaseModel], *, within: str = "") -> dict[str, Any]:
    """Return the content of a section without "auto" values, for which DeepSpeed has defaults. Raise UserError for an
    unknown key, or for a value on which DeepSpeed would fail much later."""
    names = kind.model_fields
    for key in content:
        if key not in names:
            raise UserError(
                f"{path}: unknown key {shown(within + key)}{nearest_name(key, names)}. Correct or remove it"
            )
    kept = {key: value for key, value in content.items() if value != "auto"}
    try:
        kind(**kept)
    except ValidationError as error:
        raise UserError(f"{path}: {within}{first_problem(error)}") from None
    return kept
