"""Plan a run: make and check all decisions before weights are read or ranks wait for each other."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from megatron_tiedlora.adapters.learning_rates import auto_rate
from megatron_tiedlora.adapters.tied_adapter import AdapterConfig, make_adapter_config, targets_of
from megatron_tiedlora.adapters.tying import AdapterLayout
from megatron_tiedlora.base.messages import UserError, count_text, user_path
from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.checkpoint import load_model, resume, tensor_files
from megatron_tiedlora.checkpoint.base_identity import BaseIdentity, check_same_base, identify_shape
from megatron_tiedlora.checkpoint.native_adapter import check_ranges
from megatron_tiedlora.checkpoint.sources import ModelSource, find_model
from megatron_tiedlora.config import batch
from megatron_tiedlora.config.fields import flag_value, marked
from megatron_tiedlora.config.settings import Settings, make_settings
from megatron_tiedlora.convert.open_adapter import open_adapter
from megatron_tiedlora.data.loader import GlobalBatch, TrainingStep, plan_global_batch, training_steps
from megatron_tiedlora.data.tasks import get_task
from megatron_tiedlora.data.token_dataset import TokenDataset
from megatron_tiedlora.engine.engine_json import EngineConfig, load_engine_config
from megatron_tiedlora.engine.runner import inputs_to_fill
from megatron_tiedlora.model.weights import check_layout
from megatron_tiedlora.parallel import agreement, frozen_weight, groups, quantised_weight
from megatron_tiedlora.parallel.kernels import Kernels
from megatron_tiedlora.planning.counted_steps import with_counted_steps
from megatron_tiedlora.planning.layout import Layout, StagePlan, Storage, check_adapters, plan_stages
from megatron_tiedlora.planning.machines import CPU, DEFAULT_GPU, GPUS, Machine, attending
from megatron_tiedlora.runtime.launch_env import uses_gpu
from megatron_tiedlora.runtime.run_folder import RunFolder, check_trackers, last_run_folder


@dataclass(frozen=True)
class RunPlan:
    """The plan of a run that has passed all checks: its settings, its model, and values that are computed from them.

    Attributes:
        on_gpu: whether the ranks run on GPUs. Rows then have more padding, and libraries also need memory.
        by_rule: whether the learning rate is that of --learning_rate auto.
    """

    settings: Settings
    source: ModelSource
    grid: groups.Grid
    batches: batch.BatchPlan
    engine: EngineConfig
    adapter: AdapterConfig
    on_gpu: bool
    by_rule: bool = False

    @cached_property
    def layout(self) -> Layout:
        """The layout of the run, from which the planners compute its costs."""
        settings, grid, engine = self.settings, self.grid, self.engine
        compiled = settings.compile == "true"
        if settings.compile == "auto":
            compiled = pays_to_compile(self.source.shape, grid, num_tokens=self.num_tokens)
        return Layout(
            adapters=(self.adapter,),
            length=settings.max_length,
            rows=self.batches.micro_batch_size,
            micro_batches=self.batches.accumulation_steps,
            tp_size=grid.tp_size,
            pp_size=grid.pp_size,
            dp_size=grid.dp_size,
            shards_sequences=settings.sequence_parallel,
            overlap=settings.overlap == "halves",
            zero_stage=engine.zero_stage,
            rate_factors=settings.rate_factors,
            live_parameters=engine.live_parameters,
            overlaps_gathers=engine.overlaps_gathers,
            dtype=tensor_files.DTYPES[self.dtype_name],
            storage=Storage(**{name: getattr(settings, name) for name in Storage._fields}),
            recompute=settings.recompute,
            on_gpu=self.on_gpu,
            compiled=compiled,
            deterministic=settings.deterministic,
        )

    @property
    def num_tokens(self) -> int:
        """The maximum number of tokens that the run trains on."""
        return self.settings.max_steps * self.settings.global_batch_size * self.settings.max_length

    @property
    def reads_data(self) -> bool:
        """Whether the run has data and a tokenizer. Without them, a dry run assumes rows of the maximum length."""
        return self.source.folder is not None and self.settings.names_data

    @cached_property
    def stages(self) -> tuple[StagePlan, ...]:
        """All pipeline stages in order."""
        return plan_stages(self.source.shape, self.layout)

    @property
    def stage(self) -> StagePlan:
        """The pipeline stage of this rank."""
        return self.stages[self.grid.pp_rank]

    @property
    def machine(self) -> Machine:
        """The machine whose constants are used for planning: the GPU of --gpu, or the default GPU or CPU."""
        return self.machine_for(packed=self.reads_data)

    def machine_for(self, *, packed: bool) -> Machine:
        """Return `machine` with the attention kernel of rows that hold several samples (`packed`) or one each."""
        gpu = GPUS[self.settings.gpu or DEFAULT_GPU]
        return self.with_attention(gpu, packed=packed) if self.on_gpu else CPU

    def with_attention(self, machine: Machine, *, packed: bool) -> Machine:
        """Return a machine with the attention kernels that this run uses on it; `packed` as in `machine_for`."""
        settings, shape = self.settings, self.source.shape
        length, options = None if packed else settings.max_length, {"deterministic": settings.deterministic}
        heads = shape.heads
        return attending(machine, head_dim=heads.dim, length=length, window=shape.window, cap=heads.cap, **options)

    def global_batch(self, dataset: TokenDataset, *, consumed_samples: int = 0) -> GlobalBatch:
        """Return the global batch of the step that follows `consumed_samples` samples."""
        seed = self.settings.seed
        return plan_global_batch(dataset, self.batches, seed=seed, consumed_samples=consumed_samples)

    def training_loader(
        self, dataset: TokenDataset, *, pad_id: int, consumed_samples: int = 0
    ) -> Iterator[TrainingStep]:
        """Yield the training steps of this rank on `dataset` after the first `consumed_samples` samples."""
        return training_steps(
            dataset,
            self.batches,
            seed=self.settings.seed,
            dp_rank=self.grid.dp_rank,
            pad_id=pad_id,
            pad_multiple=self.layout.pad_multiple,
            consumed_samples=consumed_samples,
            numbered=self.settings.dropout > 0,
        )

    @property
    def batches_in_words(self) -> str:
        """A text that describes how the samples of a step are divided into rows and micro-batches."""
        batches, ranks = self.batches, count_text(self.batches.data_parallel, "data-parallel rank")
        if not self.settings.packing:
            steps = count_text(batches.accumulation_steps, "step")
            return f"one per row: micro-batch {batches.micro_batch_size} x {steps} x {ranks}"
        rows = "one row" if batches.micro_batch_size == 1 else f"up to {batches.micro_batch_size} rows"
        packed = f"packed into rows of up to {self.settings.max_length:,} tokens: micro-batches of {rows}"
        if self.on_gpu and self.settings.micro_batch_size is None:
            why = "; --micro_batch_size changes it"
            if batches.micro_batch_size < batch.GPU_MICRO_BATCH_TOKENS // self.settings.max_length:
                share = batches.global_batch_size // batches.data_parallel
                why = f" more are needed, but a rank's share of {share} allows no more; see --global_batch_size"
            packed += f" (for {batch.GPU_MICRO_BATCH_TOKENS:,} tokens on a GPU{why})"
        return f"{packed}, {ranks}"

    @property
    def rank_excess(self) -> list[str]:
        """A list with a message if --rank is too large for all targets. It is empty otherwise or with --init_from."""
        widest = max(self.adapter.targets, key=lambda target: min(target.in_size, target.out_size))
        sizes, rank = (widest.in_size, widest.out_size), self.adapter.rank
        if rank <= min(sizes) or self.settings.init_from is not None:
            return []
        words = "{:,} inputs and {:,} outputs".format(*sizes)
        return [f"--rank {rank}: {widest.name} has {words}, so its update has at most rank {min(sizes):,}"]

    def layout_of(self, adapter: AdapterConfig) -> AdapterLayout:
        """Return how an adapter is sharded over the stages and ranks of this plan."""
        return AdapterLayout(adapter, self.grid, [stage.layers for stage in self.stages])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the frozen base."""
        return self.layout.dtype

    def weight_maker(self, device: torch.device, kernels: Kernels) -> frozen_weight.WeightMaker:
        """Return a function that creates the frozen weights of the blocks. They share a workspace and `kernels`.

        Raises:
            UserError: `device` does not support the matmuls of --products.
        """
        if self.layout.storage.products is not None:
            quantised_weight.check_fp8_device(device)
        return quantised_weight.weight_maker(**self.layout.storage._asdict(), kernels=kernels)

    @property
    def dtype_name(self) -> str:
        """The name of the dtype of the frozen base, as in --dtype."""
        return load_model.resolve_dtype(self.settings.dtype, get_task(self.settings.task), on_gpu=self.on_gpu)

    @property
    def max_new_tokens(self) -> int:
        """The maximum number of tokens in a generated answer."""
        given, of_task = self.settings.max_new_tokens, get_task(self.settings.task).max_new_tokens
        return batch.resolve_max_new_tokens(given, self.source.shape.limit.tokens, of_task)

    def counted(self, num_samples: int) -> "RunPlan":
        """Return the plan with --max_steps computed from --epochs, if given, for `num_samples` training samples."""
        return replace(self, settings=with_counted_steps(self.settings, num_samples)).with_rate()

    def with_rate(self) -> "RunPlan":
        """Return the plan with the learning rate of the rule if --learning_rate is auto, else the plan itself."""
        return replace(self, settings=self.settings.completed(learning_rate=self.auto_rate)) if self.by_rule else self

    @property
    def auto_rate(self) -> float:
        """The learning rate that --learning_rate auto has in this run."""
        own, width = self.adapter, self.source.shape.hidden_size
        sizes = {"num_layers": len(own.layers), "num_linears": len(own.targets), "steps": self.settings.max_steps}
        return auto_rate(own.method, rank=own.rank, scale=own.scale, width=width, **sizes)

    @property
    def rate_in_words(self) -> str:
        """A text with the learning rate. If it was not given, the text has the rate of --learning_rate auto too."""
        rate = f"{float(self.settings.learning_rate):g}"
        if self.by_rule:
            return f"{rate} (auto)"
        given = "learning_rate" in self.settings.model_fields_set
        return rate if given else f"{rate} by default (--learning_rate auto: {self.auto_rate:g})"

    def resolved_settings(self) -> dict[str, Any]:
        """Return all settings as plain values. Defaults that depend on the model or the ranks are computed."""
        return self.settings.model_dump() | {
            "dtype": self.dtype_name,
            "layers": list(self.adapter.layers),
            "targets": list(self.settings.targets),
            "report_to": list(self.settings.report_to),
            "init_std_a": self.adapter.init_std_a,
            "init_std_b": self.adapter.init_std_b,
            "micro_batch_size": self.batches.micro_batch_size,
            "max_new_tokens": self.max_new_tokens,
        }


def plan_run(
    settings: Settings, *, rank: int, world_size: int, weights: bool = True, source: ModelSource | None = None
) -> RunPlan:
    """Find the model, check that settings, model and number of ranks fit together, and return the plan.

    Args:
        weights: whether a hub model's weights are needed, or only its config and tokenizer.
        source: the model, if it is already known; else --model names it.

    Raises:
        UserError: a check has failed. The message states the problem and the fix.
    """
    task = get_task(settings.task)
    if settings.eval_metric not in ("loss", *task.metrics):
        raise UserError(
            f"--eval_metric {settings.eval_metric} is not a metric of task {settings.task}. Give loss or"
            f" {' or '.join(task.metrics)}"
        )
    if rank == 0 and weights:  # only rank 0 of a run uses trackers; a plan without weights may be for other hosts
        check_trackers(settings.report_to)
    try:
        grid = groups.Grid(rank, world_size, tp_size=settings.tensor_parallel, pp_size=settings.pipeline_parallel)
    except UserError as error:
        unit = settings.tensor_parallel * settings.pipeline_parallel
        ranks = unit * (world_size // unit + 1)
        plans, starts = f"`--dry_run --world_size {ranks}`", f"`tiedlora run --num_gpus {ranks} ...`"
        raise UserError(f"{error}. Plan without ranks by {plans}, or start the ranks by {starts}") from None
    on_gpu = settings.gpu is not None or (uses_gpu() if settings.plan_for is None else settings.plan_for == "gpu")
    # Errors are reported before weights are downloaded.
    found = source or find_model(settings.model, weights=False)
    shape, settings = found.shape, with_models_length(with_start(settings, found), found)
    if settings.base != (stored := found.base_format(settings.base, settings.products)):
        settings = settings.completed(base=stored)
    least = inputs_to_fill(grid.pp_size)
    batches = batch.plan_batches(
        settings.global_batch_size,
        settings.micro_batch_size,
        grid.dp_size,
        max_rows=batch.default_rows(
            max_length=settings.max_length, packing=settings.packing, on_gpu=on_gpu, otherwise=task.micro_batch_rows
        ),
        min_steps=least if on_gpu else 1,
        multiple=2 if settings.overlap == "halves" else 1,
    )
    packed_length = settings.max_length if settings.packing else None
    batches = replace(batches, packed_length=packed_length, min_micro_batches=least)
    engine = load_engine_config(settings.ds_config, batches=batches, gradient_clipping=settings.gradient_clipping)
    batch.resolve_max_new_tokens(settings.max_new_tokens, shape.limit.tokens, task.max_new_tokens)
    check_layout(shape, grid, zero_stage=engine.zero_stage, ds_config=settings.ds_config)
    if settings.overlap == "halves":
        _check_halves(grid, batches, zero_stage=engine.zero_stage)
    layers = settings.layers or tuple(range(1, shape.num_layers + 1))
    if layers[-1] > shape.num_layers:
        raise UserError(f"--layers {layers[-1]}: {settings.model} has layers 1 to {shape.num_layers}. Use only these")
    found.check_length("--max_length", settings.max_length)
    adapter = make_adapter_config(
        settings.method,
        rank=settings.rank,
        alpha=settings.alpha and settings.alpha * (settings.rank**0.5 if settings.rslora else 1.0),
        layers=layers,
        targets=targets_of(shape, settings.targets),
        seed=settings.seed,
        init_std_a=settings.init_std_a,
        init_std_b=settings.init_std_b,
    )
    check_ranges(adapter, source="--rslora true: " if settings.rslora else "")
    by_rule = settings.learning_rate == "auto"
    plan = RunPlan(settings, found, grid, batches, engine, adapter, on_gpu, by_rule).with_rate()
    method = adapter.method_spec
    if plan.rank_excess and (method.A.trained or method.B.trained):  # vera freezes both, so its rank may be larger
        raise UserError(f"{plan.rank_excess[0]}. Give at most this rank")
    if weights and source is None:
        plan = replace(plan, source=find_model(settings.model))
    check_adapters(shape, plan.layout, several=settings.adapters is not None)
    if settings.products is not None and on_gpu:
        quantised_weight.check_gpu_products(shape.block.linears, tp_size=grid.tp_size, dtype=plan.dtype)
    return plan


def _check_halves(grid: groups.Grid, sizes: batch.BatchPlan, *, zero_stage: int) -> None:
    """Raise UserError if micro-batches cannot be computed in halves, or if that would hide no messages."""
    if grid.tp_size == 1:
        raise UserError("--overlap halves hides the messages of --tensor_parallel, which is 1. Omit --overlap")
    if zero_stage == 3:
        raise UserError("--overlap halves cannot be combined with ZeRO-3. Give --ds_config zero1.json")
    if (rows := sizes.micro_batch_size) % 2:
        raise UserError(
            f"--overlap halves divides the rows of a micro-batch by 2, and there are {rows}. Give an even"
            " --micro_batch_size"
        )


# Lengths of samples and runs ------------------------------------------------------------------------------------------


# The number of elements that the layers of a rank process before compiling pays off. A CPU compiles for half a minute,
# and then saves about a quarter of each step.
LEAST_WORK = 5e9


def pays_to_compile(shape: ModelShape, grid: groups.Grid, *, num_tokens: int, least_work: float = LEAST_WORK) -> bool:
    """Return whether a run over `num_tokens` tokens on all ranks is long enough to benefit from compiled kernels."""
    widths = shape.num_layers * (shape.hidden_size + shape.intermediate_size) / (grid.tp_size * grid.pp_size)
    return num_tokens / grid.dp_size * widths >= least_work


def with_models_length(settings: Settings, source: ModelSource) -> Settings:
    """Return the settings with --max_length limited to the model's maximum, unless the user gave --max_length."""
    limit = source.shape.limit.tokens
    if "max_length" in settings.model_fields_set or settings.max_length <= limit:
        return settings
    return settings.completed(max_length=limit)


# --init_from ----------------------------------------------------------------------------------------------------------

# A run with --init_from starts with the values of an adapter, and takes over its method, rank, alpha, targets and
# layers. The adapter is read when the run is planned and when its model is built. A resumed run reads its checkpoint
# instead, and the settings recorded in it.

_TAKEN_OVER = marked(Settings, decides="adapter")
_NAMING = set(marked(Settings, decides="adapter", derived=False))  # the settings that are part of a run's name


@dataclass(frozen=True)
class InitialAdapter:
    """The adapter of --init_from, whose values are the initial values of a run.

    Attributes:
        state: the full fp32 tensors, by name.
        trained: the base on which the adapter was trained; None if its files do not record the base.
        kind: a text that describes the format of the adapter's folder.
        notes: messages for the user.
    """

    config: AdapterConfig
    state: Mapping[str, agreement.SentTensor]
    trained: BaseIdentity | None
    kind: str
    notes: tuple[str, ...] = ()


def with_start(settings: Settings, source: ModelSource) -> Settings:
    """Return the settings, completed with those of the --init_from adapter. A resumed run takes them from a checkpoint.

    Raises:
        UserError: the adapter cannot be read, is for a model of a different shape, or contradicts a given setting.
    """
    if settings.init_from is None:
        return settings
    recorded = recorded_run(settings)
    if recorded is not None:  # the given settings are compared with the whole record when the run is resumed
        taken = {name: value for name, value in recorded.items() if name in _TAKEN_OVER}
        return make_settings({**settings.model_dump(exclude_unset=True), **taken, **_given(settings, source)})
    given, folder = _given(settings, source), user_path(settings.init_from)
    if settings.resume != "none" and given.keys() >= {*_TAKEN_OVER} - {"rslora"} and not folder.exists():
        return settings  # this host does not see the resumed run, but the given settings, maybe of 0.2, are complete
    config = read_start(settings.init_from, source, differs=settings.base_differs).config
    decided = _decided(config)
    for name, value in given.items():
        if value != decided[name]:
            raise UserError(
                f"--{name} {flag_value(value)} contradicts --init_from {settings.init_from}, whose adapter has {name}"
                f" {flag_value(decided[name])}; omit --{name}, or give a different adapter"
            )
    return make_settings({**settings.model_dump(exclude_unset=True), **decided})


def load_start(
    settings: Settings, source: ModelSource, adapter: AdapterConfig, base: BaseIdentity
) -> tuple[Mapping[str, torch.Tensor] | None, tuple[str, ...]]:
    """Return the full tensors with which a new run starts (None without --init_from), and notes. Only rank 0 reads.

    Args:
        adapter: the run's adapter.
        base: the run's base.

    Raises:
        UserError: on every rank, if the adapter cannot be read, was replaced meanwhile, or is for a different base.
    """
    given = settings.init_from
    if given is None:
        return None, ()
    differs, failure = settings.base_differs, None
    start = agreement.decided_by_rank_0(lambda: read_start(given, source, differs=differs), kind=InitialAdapter)
    if _decided(start.config) != _decided(adapter):
        failure = UserError(f"--init_from {given}: the adapter was replaced while the run started. Start it again")
    agreement.raise_on_every_rank(failure)
    notes = start.notes
    if start.trained is not None:
        notes += check_same_base(start.trained, base, source=f"--init_from {given}", differs=differs)
    return start.state, notes


def start_lines(settings: Settings, source: ModelSource) -> list[str]:
    """Return lines about the adapter of --init_from for the report of a dry run."""
    if settings.init_from is None or recorded_run(settings) is not None:
        return []
    start = read_start(settings.init_from, source, differs=settings.base_differs)
    return [f"  starts with the values of {settings.init_from}, {start.kind}", *(f"  ({note})" for note in start.notes)]


def read_start(given: str, source: ModelSource, *, differs: bool) -> InitialAdapter:
    """Read the adapter of --init_from in the folder `given`, for a base with the shape of `source`.

    Raises:
        UserError: the folder has no adapter, or the adapter cannot be read or is for a model of a different shape; or
            `source` has a merged adapter and a PEFT adapter does not name this base, unless `differs` (--base_differs).
    """
    opened = open_adapter(given, source, flag="--init_from", differs=differs)
    kind = "a PEFT adapter"
    if opened.kind == "native":
        kind, base = "a native adapter", opened.adapter.base_identity
        same_weights = identify_shape(source, base.dtype, weights_hash=base.base_weights_hash)
        check_same_base(base, same_weights, source=f"--init_from {given}", differs=True)  # checks only the shape
    elif opened.native is not None:
        kind = "a PEFT folder with the native adapter that was exported"
    notes = opened.notes if opened.apart is None else (*opened.notes, opened.apart)
    return InitialAdapter(opened.config, opened.state, opened.trained_on, kind, notes)


def _decided(config: AdapterConfig) -> dict[str, Any]:
    """Return the settings that the config of an adapter determines."""
    stds = {"init_std_a": config.init_std_a, "init_std_b": config.init_std_b}
    found = {**config.facts, **stds, "rslora": False}  # config.alpha includes the factor of rsLoRA
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


def _given(settings: Settings, source: ModelSource) -> dict[str, Any]:
    """Return the settings in `_TAKEN_OVER` that the user gave."""
    every_layer = tuple(range(1, source.shape.num_layers + 1))
    given = {name: getattr(settings, name) for name in _TAKEN_OVER if name in settings.model_fields_set}
    return {name: every_layer if value is None else value for name, value in given.items()}


def recorded_run(settings: Settings) -> Mapping[str, Any] | None:
    """Return the settings in the checkpoint of --resume; None if it does not exist or is not visible on this host."""
    if settings.resume == "none":
        return None
    if settings.resume != "auto":
        return resume.recorded_settings([user_path(settings.resume)])
    if settings.output_dir is not None:
        folder = RunFolder(user_path(settings.output_dir))
    elif settings.init_from is None or settings.model_fields_set >= _NAMING:
        folder = last_run_folder(settings)
    else:  # the run folder is named by the settings of the adapter, which is read first
        return None
    return resume.recorded_settings(folder.checkpoints.glob("step_*"))
