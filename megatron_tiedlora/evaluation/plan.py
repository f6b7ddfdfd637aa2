"""The plan of an evaluation: decided and checked before weights are read and ranks meet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_tiedlora.base.base_formats import UNQUANTISED
from megatron_tiedlora.base.errors import UserError, as_given
from megatron_tiedlora.base.paths import last_name, user_path
from megatron_tiedlora.base.wording import count_text
from megatron_tiedlora.base.yaml_files import read_yaml_mapping
from megatron_tiedlora.checkpoint.base_identity import identify_model
from megatron_tiedlora.checkpoint.load_model import DTYPES, describe_dtype, resolve_dtype
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter
from megatron_tiedlora.checkpoint.sources import ModelSource, find_model
from megatron_tiedlora.config.data_fields import TEMPLATE_HASH
from megatron_tiedlora.config.decoding import longest_prompt, resolve_max_new_tokens
from megatron_tiedlora.config.evaluate_settings import EvaluateSettings
from megatron_tiedlora.config.fields import validate_settings
from megatron_tiedlora.config.tasks import DEFAULT_MODEL
from megatron_tiedlora.convert.inputs import Identify, check_base
from megatron_tiedlora.convert.open_adapter import is_merged, open_adapter
from megatron_tiedlora.data.chat import chat_template_sha256
from megatron_tiedlora.data.tasks import Task, get_task
from megatron_tiedlora.model.fused_attention import AttentionRoute
from megatron_tiedlora.parallel.grid import Grid
from megatron_tiedlora.planning.layout import check_layout
from megatron_tiedlora.planning.partition import Stages, layer_costs, partition
from megatron_tiedlora.runtime.launch_env import uses_gpu

_READING = ("chat_template", "add_bos", "special_tokens_in_text")


@dataclass(frozen=True)
class EvaluationPlan:
    """A checked evaluation: its settings, and what follows from them, the model and the number of ranks.

    Attributes:
        kind: kind of model: base, merged (a folder with a merged adapter), native or peft.
        longest_prompt: maximum prompt tokens; a longer prompt loses its middle.
        limit: maximum number of samples; None: all.
        notes: what a user should know before trusting the scores.
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
        """The dtype of the base."""
        return DTYPES[self.dtype_name]

    @property
    def base(self) -> str | None:
        """The storage format of the blocks' linears; None for `dtype`."""
        return _base_format(self.settings, self.source, self.adapter)

    @property
    def adapter_name(self) -> str:
        """METHOD-rRANK, or the kind of model if there is no adapter."""
        if self.adapter is None:
            return self.kind
        method = "peft" if self.kind == "peft" else self.adapter.config.method
        return f"{method}-r{self.adapter.config.rank}"

    @property
    def name(self) -> str:
        """MODEL-TASK-ADAPTER, for the output folder's name."""
        model = last_name(self.source.name)
        return "-".join([model, self.task.name, *([] if model == self.adapter_name else [self.adapter_name])])

    def headline(
        self,
        num_samples: int,
        num_truncated: int,
        attention: AttentionRoute,
        chat_note: str = "",
        *,
        adapters: int = 1,
    ) -> list[str]:
        """A few lines about the evaluation, to print before its progress bar.

        Args:
            num_samples: number of samples to answer.
            num_truncated: how many of their prompts lose their middle, or early turns.
            chat_note: what wrote the text of chats.
            attention: which kernels compute the attention of prompts.
            adapters: how many are scored together; more than one have their own lines.
        """
        settings, grid = self.settings, self.grid
        dtype = describe_dtype(settings.dtype, self.dtype_name)
        adapter = ""
        if adapters > 1:
            adapter = f" with {adapters} adapters"
        elif self.adapter is not None:
            targets = ", ".join(target.name for target in self.adapter.config.targets)
            adapter = f" with {self.adapter_name} on {targets}, from {settings.adapter}"
        quantised = "" if self.base is None else f" (the linears of its blocks in {self.base})"
        merged = ", merged" if settings.merge_adapter else ""
        cut = f", {num_truncated} of them without their middle or early turns to fit" if num_truncated else ""
        prompts = count_text(settings.batch_size, "prompt")
        return [
            f"model      {self.source.name} in {dtype}{quantised}{adapter}{merged}",
            f"data       task {self.task.name}, {count_text(num_samples, f'{settings.split} row')}{cut}",
            f"layout     tensor {grid.tp_size} x pipeline {grid.pp_size} x data {grid.dp_size}",
            f"decoding   greedy, at most {self.max_new_tokens} tokens, {prompts} at once per rank",
            f"attention  {attention}",
            *([f"chats      by {chat_note}"] if chat_note else []),
            *(f"note       {note}" for note in self.notes),
        ]

    def resolved_settings(self, output_dir: Path) -> dict[str, Any]:
        """Every setting as a plain value, including those that depend on the model, the task and the ranks."""
        return {
            **self.settings.model_dump(),
            "output_dir": str(output_dir),
            "model": self.source.name,
            "dtype": self.dtype_name,
            "base": self.base or UNQUANTISED,
            "max_length": self.settings.max_length or self.source.shape.limit.tokens,
            "max_new_tokens": self.max_new_tokens,
            "limit": self.limit,
        }

    def model_facts(self) -> dict[str, Any]:
        """Kind of model, adapter and parallel layout, for results.json."""
        adapter = None
        if self.adapter is not None:
            adapter = {
                **self.adapter.config.facts,
                "merged": self.settings.merge_adapter,
                **({"base_format": trained} if (trained := self.adapter.base.base_format) else {}),
                **({"base_differs": True} if self.settings.base_differs else {}),
            }
        layout = {
            "tensor_parallel": self.grid.tp_size,
            "pipeline_parallel": self.grid.pp_size,
            "data_parallel": self.grid.dp_size,
        }
        return {"model_kind": self.kind, "adapter": adapter, "layout": layout}


def plan_evaluation(
    settings: EvaluateSettings, *, rank: int, world_size: int, identify: Identify = identify_model
) -> EvaluationPlan:
    """Find the model and adapter, and check that settings, model and number of ranks fit together.

    Args:
        identify: for a caller that plans for many adapters of one base.

    Raises:
        UserError: names the first thing that does not fit, with the fix.
    """
    task, settings = get_task(settings.task), _as_trained(settings)
    grid = Grid(rank, world_size, tp_size=settings.tensor_parallel, pp_size=settings.pipeline_parallel)
    source, adapter, kind, notes = _find_model(settings, identify)
    model_shape = source.shape
    check_layout(model_shape, grid)
    max_new_tokens = resolve_max_new_tokens(settings.max_new_tokens, model_shape.limit.tokens, task.max_new_tokens)
    prompt = longest_prompt(settings.max_length, model_shape.limit.tokens, max_new_tokens)
    if adapter is None:
        source = find_model(source.name)  # so far a hub model's weights were not downloaded
        source.weights_folder()  # rejects a preset, which has no weights
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
        notes=(*notes, *_notes(settings)),
    )


def _base_format(settings: EvaluateSettings, source: ModelSource, adapter: NativeAdapter | None) -> str | None:
    """The storage format in which the base is used: as it was given, that of its folder, or of the adapter's run.

    Raises:
        UserError: the adapter is to be merged into quantised weights.
    """
    given = settings.base or source.stored_base or (adapter and adapter.base.base_format) or UNQUANTISED
    if given == UNQUANTISED:
        return None
    if settings.merge_adapter:
        raise UserError(
            f"--merge_adapter adds the adapter to weights in --dtype, and these are in {given}; give --base none"
        )
    return source.base_format(given)


def _trained_with(settings: EvaluateSettings) -> dict[str, Any]:
    """The settings of the adapter's run and its `TEMPLATE_HASH`, in a file beside it; none without file or adapter."""
    if settings.adapter is None:
        return {}
    run_file = user_path(settings.adapter).parent / "run.yaml"
    with suppress(UserError):  # a file of another kind cannot be compared
        if run_file.is_file():
            return read_yaml_mapping(run_file)
    return {}


def _as_trained(settings: EvaluateSettings) -> EvaluateSettings:
    """The settings, with the rules by which the adapter's run made tokens of rows where the user gives none.

    Raises:
        UserError: the user's contradict them, or the file of the run's chat template has changed.
    """
    trained = _trained_with(settings)
    rules = {name: trained[name] for name in _READING if trained.get(name) is not None}
    if "chat_template" in rules and settings.chat_template is None:
        _check_trained_template(str(rules["chat_template"]), trained.get(TEMPLATE_HASH))
    return validate_settings({**rules, **settings.model_dump(exclude_none=True)}, EvaluateSettings)


def _check_trained_template(file: str, trained: Any) -> None:
    """Raise UserError if the chat template of the adapter's run is missing, or its hash is no longer `trained`."""
    said = f"--chat_template {file}, of the adapter's run,"
    if not user_path(file).is_file():
        raise UserError(f"{said} is not on this host; give the file with which it was trained with --chat_template")
    if trained is not None and (now := chat_template_sha256(file)) != trained:
        raise UserError(
            f"{said} has changed since (sha256 {now[:12]}, then {as_given(trained)[:12]}); give the file with which it"
            " was trained with --chat_template, or this one to use it as it is"
        )


def _notes(settings: EvaluateSettings) -> Iterator[str]:
    """Notes if the files beside an adapter show that it was trained with other prompts."""
    trained = _trained_with(settings)
    for name in ("task", "prompt_template", "tokenizer", *_READING):
        if name == "chat_template" and settings.chat_template is not None and TEMPLATE_HASH in trained:
            if chat_template_sha256(settings.chat_template) != trained[TEMPLATE_HASH]:
                yield f"--chat_template {settings.chat_template} has other content than that of the adapter's run"
        elif name in trained and trained[name] != getattr(settings, name):
            yield f"the adapter's run had --{name} {trained[name]}, this has {getattr(settings, name)}"
    if trained.get("products") is not None:
        yield f"the adapter's run had --products {trained['products']}; an evaluation multiplies in --dtype"


def _find_model(
    settings: EvaluateSettings, identify: Identify
) -> tuple[ModelSource, NativeAdapter | None, str, tuple[str, ...]]:
    """(base, adapter, kind of model, notes).

    Raises:
        UserError: one is missing, they do not belong together, or they need another tokenizer.
    """
    longest = settings.max_length or 0  # checked before a weight is read
    if settings.adapter is None:
        source = find_model(settings.model or DEFAULT_MODEL, weights=False)
        source.check_length("--max_length", longest)
        return source, None, "merged" if is_merged(source) else "base", ()
    opened = open_adapter(
        settings.adapter,
        settings.model,
        tokenizer=settings.tokenizer,
        longest=longest,
        differs=settings.base_differs,
    )
    used, trained = _base_format(settings, opened.source, opened.adapter), opened.adapter.base.base_format
    base = check_base(
        opened.source,
        opened.adapter,
        tokenizer=settings.tokenizer,
        differs=settings.base_differs,
        base_format=used if opened.recorded else trained,  # nobody knows on what it was trained otherwise
        identify=identify,
    )
    return opened.source, opened.adapter, opened.kind, (*opened.notes, *base.notes)
