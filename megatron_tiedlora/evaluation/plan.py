"""Plans an evaluation of one model or of several adapters, and checks the plan before weights are read."""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from megatron_tiedlora.adapters.adapter_groups import ONLY
from megatron_tiedlora.base.files import read_yaml_mapping
from megatron_tiedlora.base.messages import UserError, as_given, count_text, naming, shown, user_path
from megatron_tiedlora.base.output_folder import LONGEST_NAME, last_name
from megatron_tiedlora.base.shapes import UNQUANTISED
from megatron_tiedlora.checkpoint.base_identity import identify_model
from megatron_tiedlora.checkpoint.load_model import resolve_dtype
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter
from megatron_tiedlora.checkpoint.sources import ModelSource, find_model
from megatron_tiedlora.checkpoint.tensor_files import DTYPES
from megatron_tiedlora.config.adapter_settings import EvaluateSettings
from megatron_tiedlora.config.batch import longest_prompt, resolve_max_new_tokens
from megatron_tiedlora.config.cli import TEMPLATE_HASH
from megatron_tiedlora.config.fields import marked, validate_settings
from megatron_tiedlora.config.settings import DEFAULT_MODEL
from megatron_tiedlora.convert.export_peft import adapter_name, find_adapters
from megatron_tiedlora.convert.inputs import Identify, check_base, is_merged
from megatron_tiedlora.convert.open_adapter import open_adapter
from megatron_tiedlora.data.chat import chat_template_sha256
from megatron_tiedlora.data.task import Task
from megatron_tiedlora.data.tasks import get_task
from megatron_tiedlora.evaluation.sampling import Sampling
from megatron_tiedlora.model.weights import Stages, check_layout, layer_costs, partition
from megatron_tiedlora.parallel.groups import Grid
from megatron_tiedlora.runtime.launch_env import uses_gpu

TABLE_FILE = "table.csv"  # the scores of several adapters

_READING = marked(EvaluateSettings, as_trained=True)


@dataclass(frozen=True)
class EvaluationPlan:
    """A checked evaluation: its settings, and the values that follow from them, the model and the number of ranks.

    Attributes:
        kind: the kind of model: base, merged (a folder with a merged adapter), native or peft.
        longest_prompt: the maximum number of tokens in a prompt. A longer prompt is shortened.
        limit: the maximum number of samples; None for all samples.
        notes: messages that a user should know before trusting the scores.
    """

    settings: EvaluateSettings
    task: Task
    dtype_name: str
    source: ModelSource
    adapter: NativeAdapter | None
    kind: str
    grid: Grid
    stages: Stages
    longest_prompt: int
    max_new_tokens: int
    limit: int | None
    notes: tuple[str, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the base."""
        return DTYPES[self.dtype_name]

    @property
    def base_format(self) -> str | None:
        """Return the storage format of the blocks' linear layers, or None if they are stored in `dtype`."""
        return _base_format(self.settings, self.source, self.adapter)

    @property
    def sampling(self) -> Sampling:
        """Return how the tokens of the answers are chosen."""
        own = self.settings
        return Sampling(own.temperature, own.top_p, own.seed, own.top_k)

    @property
    def adapter_name(self) -> str:
        """Return the adapter's name as METHOD-rRANK, or the kind of model if there is no adapter."""
        if self.adapter is None:
            return self.kind
        method = "peft" if self.kind == "peft" else self.adapter.config.method
        return f"{method}-r{self.adapter.config.rank}"

    def resolved_settings(self, output_dir: Path) -> dict[str, Any]:
        """Return every setting as a plain value, including those that depend on the model and the task."""
        return {
            **self.settings.model_dump(),
            "output_dir": str(output_dir),
            "model": self.source.name,
            "dtype": self.dtype_name,
            "base": self.base_format or UNQUANTISED,
            "max_length": self.settings.max_length or self.source.shape.limit.tokens,
            "max_new_tokens": self.max_new_tokens,
            "limit": self.limit,
        }


EvaluationPlans = Mapping[str, EvaluationPlan]  # by name of the adapter, the only input in which plans differ


def plan_evaluations(settings: EvaluateSettings, *, rank: int, world_size: int) -> dict[str, EvaluationPlan]:
    """Return the plan of each adapter in --adapters, by name. Without --adapters, return one plan with the name ONLY.
    Raises UserError if a setting, the model or the number of ranks is not valid. Also raises UserError, with the
    adapter's name, if an adapter is not valid or has a different base from the others."""
    own = {ONLY: settings}
    if settings.adapters is not None:
        found = named_adapters(settings.adapters).items()
        own = {name: settings.model_copy(update={"adapters": None, "adapter": str(path)}) for name, path in found}
    plans: dict[str, EvaluationPlan] = {}
    identify = cache(identify_model)
    for name, given in own.items():
        with naming(name and f"--adapters: {name}"):
            plans[name] = _plan(given, rank=rank, world_size=world_size, identify=identify)
            _check_same_base(next(iter(plans.items())), plans[name])
    return plans


def output_name(plans: EvaluationPlans) -> str:
    """Return the name of the output folder: MODEL-TASK-ADAPTER, or MODEL-TASK-N-adapters for --adapters."""
    plan = next(iter(plans.values()))
    model = last_name(plan.source.name)
    adapter = plan.adapter_name if ONLY in plans else count_text(len(plans), "adapter").replace(" ", "-")
    return "-".join([model, plan.task.name, *([] if model == adapter else [adapter])])


def named_adapters(given: Sequence[str]) -> dict[str, Path]:
    """Return the adapter folders in --adapters by adapter name, which is NAME in NAME=FOLDER or the run's name. Raises
    UserError if a value names no adapter, if two have the same name, or if a name cannot be used for a folder. A folder
    without an adapter causes an error when it is read."""
    found: dict[str, Path] = {}
    for value in given:
        name, is_named, path = value.partition("=")
        is_named = is_named if "/" not in name else ""
        folders = find_adapters([path if is_named else value], flag="--adapters", runs=True)
        if is_named and len(folders) > 1:
            why = f"{path} has {len(folders)} adapters"
            raise UserError(f"--adapters {as_given(value)}: {why}; give NAME=FOLDER for each")
        for folder in folders:
            own = name if is_named else adapter_name(folder)
            if not own or own.startswith(".") or own == TABLE_FILE or len(os.fsencode(own)) > LONGEST_NAME:
                why = f"{shown(own)} cannot be the name of a folder"
                raise UserError(f"--adapters {as_given(value)}: {why}; give NAME=FOLDER")
            if found.setdefault(own, folder) != folder:
                raise UserError(f"--adapters: {found[own]} and {folder} are both named {own}; rename with NAME=FOLDER")
    return found


def _check_same_base(first: tuple[str, EvaluationPlan], plan: EvaluationPlan) -> None:
    name, other = first
    folder, expected = (one.source.weights_folder().resolve() for one in (plan, other))
    if folder != expected:
        said = f"its base is {plan.source.name}, but the base of {name} is {other.source.name}"
        raise UserError(f"{said}; evaluate them separately, or give one base with --model")
    if plan.base_format != other.base_format:
        said = f"its base would be in {plan.base_format or plan.dtype_name}"
        raise UserError(f"{said}, but the base of {name} in {other.base_format or other.dtype_name}; give --base")


def _plan(settings: EvaluateSettings, *, rank: int, world_size: int, identify: Identify) -> EvaluationPlan:
    """Return the plan of one evaluation. Raises UserError if its settings, model and ranks do not fit together."""
    task, (settings, of_run) = get_task(settings.task), as_trained(settings)
    if settings.engine == "vllm":
        if world_size > 1:
            raise UserError(f"--engine vllm: {world_size} ranks were started; start one, as vLLM starts its own")
        world_size = settings.tensor_parallel
    try:
        grid = Grid(rank, world_size, tp_size=settings.tensor_parallel, pp_size=settings.pipeline_parallel)
    except UserError as error:
        raise UserError(f"{error}; `deepspeed --num_gpus N --no_python tiedlora evaluate ...` starts N ranks") from None
    source, adapter, kind, notes = _find_model(settings, identify)
    model_shape = source.shape
    check_layout(model_shape, grid)
    max_new_tokens = resolve_max_new_tokens(settings.max_new_tokens, model_shape.limit.tokens, task.max_new_tokens)
    prompt = longest_prompt(settings.max_length, model_shape.limit.tokens, max_new_tokens)
    if adapter is None:
        source = find_model(source.name)  # this downloads the weights of a hub model
        source.weights_folder()  # this rejects a preset, which has no weights
    return EvaluationPlan(
        settings=settings,
        task=task,
        dtype_name=resolve_dtype(settings.dtype, task, on_gpu=uses_gpu()),
        source=source,
        adapter=adapter,
        kind=kind,
        grid=grid,
        stages=partition(layer_costs(model_shape, length=prompt, first_adapted=None), grid.pp_size),
        longest_prompt=prompt,
        max_new_tokens=max_new_tokens,
        limit=settings.limit or task.scored_rows,
        notes=(*notes, *of_run),
    )


def _base_format(settings: EvaluateSettings, source: ModelSource, adapter: NativeAdapter | None) -> str | None:
    """Return the storage format of the base: the given format, the format of its folder, or the format in the adapter's
    run. Raises UserError if the adapter would be merged into quantised weights."""
    given = settings.base or source.stored_base or (adapter and adapter.base_identity.base_format) or UNQUANTISED
    if given == UNQUANTISED:
        return None
    if settings.engine == "vllm" and source.stored_base is None:
        raise UserError(f"--engine vllm does not quantise as the adapter's run ({given}); give --base {UNQUANTISED}")
    if settings.merge_adapter:
        said = f"--merge_adapter adds the adapter to weights in --dtype, but the base is in {given}"
        raise UserError(f"{said}; give --base none")
    return source.base_format(given)


def as_trained(settings: EvaluateSettings) -> tuple[EvaluateSettings, list[str]]:
    """Return the settings and notes. If the user did not give an option for reading rows, it is taken from the
    adapter's run. The notes list differences between the prompts of the run and of the evaluation. Raises UserError if
    the user's settings contradict the run's options, or if the run's chat template file has changed."""
    trained: dict[str, Any] = {}
    run_file = None if settings.adapter is None else user_path(settings.adapter).parent / "run.yaml"
    if run_file is not None and run_file.is_file():
        with suppress(UserError):  # a file of another kind cannot be compared
            trained = read_yaml_mapping(run_file)
    rules = {name: trained[name] for name in _READING if trained.get(name) is not None}
    if "chat_template" in rules and settings.chat_template is None:
        _check_trained_template(str(rules["chat_template"]), trained.get(TEMPLATE_HASH))
    found, notes = validate_settings({**rules, **settings.model_dump(exclude_none=True)}, EvaluateSettings), list[str]()
    for name in ("task", "prompt_template", "tokenizer", *_READING):
        if name == "chat_template" and found.chat_template is not None and TEMPLATE_HASH in trained:
            if chat_template_sha256(found.chat_template) != trained[TEMPLATE_HASH]:
                notes.append(f"--chat_template {found.chat_template} differs from the template of the adapter's run")
        elif name in trained and trained[name] != getattr(found, name):
            notes.append(f"the adapter's run had --{name} {trained[name]}, but here it is {getattr(found, name)}")
    if trained.get("products") is not None:
        notes.append(f"the adapter's run had --products {trained['products']}; an evaluation multiplies in --dtype")
    return found, notes


def _check_trained_template(file: str, trained: Any) -> None:
    """Raise UserError if the chat template file of the adapter's run is missing, or its hash is no longer `trained`."""
    said = f"--chat_template {file} of the adapter's run"
    if not user_path(file).is_file():
        raise UserError(f"{said} is not on this host; copy it here, or give its path with --chat_template")
    if trained is not None and (now := chat_template_sha256(file)) != trained:
        raise UserError(
            f"{said} has changed (its sha256 is {now[:12]}, and was {as_given(trained)[:12]}); give the old file with"
            " --chat_template, or give the changed file explicitly to use it"
        )


def _find_model(
    settings: EvaluateSettings, identify: Identify
) -> tuple[ModelSource, NativeAdapter | None, str, tuple[str, ...]]:
    """Return (base, adapter, kind of model, notes). Raises UserError if the base or the adapter is missing, if they do
    not belong together, or if they need a different tokenizer."""
    longest = settings.max_length or 0  # checked before a weight is read
    if settings.adapter is None:
        source = find_model(settings.model or DEFAULT_MODEL, weights=False)
        source.check_length("--max_length", longest)
        return source, None, "merged" if is_merged(source) else "base", ()
    opened = open_adapter(
        settings.adapter, settings.model, tokenizer=settings.tokenizer, longest=longest, differs=settings.base_differs
    )
    used, trained = _base_format(settings, opened.source, opened.adapter), opened.adapter.base_identity.base_format
    _, notes = check_base(
        opened.source,
        opened.adapter,
        tokenizer=settings.tokenizer,
        differs=settings.base_differs,
        base_format=trained if opened.trained_on is None else used,  # no base recorded: formats not compared
        identify=identify,
    )
    return opened.source, opened.adapter, opened.kind, (*opened.notes, *notes)
