"""--init_from: a run starts with the values of an adapter, and takes over its method, rank, alpha, targets and layers.

Owns what is read of the adapter, when the run is planned and when its model is built. A resumed run reads its
checkpoint, and the record in it, instead.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_tiedlora.adapters.tied_adapter import AdapterConfig
from megatron_tiedlora.base.messages import UserError, user_path
from megatron_tiedlora.checkpoint.base_identity import BaseIdentity, check_same_base, identify_shape
from megatron_tiedlora.checkpoint.resume import recorded_settings
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.config.fields import flag_value, marked
from megatron_tiedlora.config.settings import Settings, make_settings
from megatron_tiedlora.convert.open_adapter import open_adapter
from megatron_tiedlora.parallel.agreement import SentTensor, decided_by_rank_0, raise_on_every_rank
from megatron_tiedlora.runtime.run_folder import RunFolder, last_run_folder

_TAKEN_OVER = marked(Settings, decides="adapter")
_NAMING = set(marked(Settings, decides="adapter", derived=False))  # those of them that are in a run's name


@dataclass(frozen=True)
class StartAdapter:
    """The adapter with which a run starts.

    Attributes:
        state: full fp32 tensors.
        trained: the base that it was trained on; None if its files do not record it.
        kind: what its folder holds, in words.
        notes: what a user should know.
    """

    config: AdapterConfig
    state: Mapping[str, SentTensor]
    trained: BaseIdentity | None
    kind: str
    notes: tuple[str, ...] = ()


def with_start(settings: Settings, source: ModelSource) -> Settings:
    """The settings with those that the adapter of --init_from decides. Reads the adapter, or the resumed checkpoint.

    Raises:
        UserError: it cannot be read, is for a model of another shape, or contradicts a setting that was given.
    """
    if settings.init_from is None:
        return settings
    recorded = recorded_run(settings)
    if recorded is not None:  # what was given is compared with all of the record once it is resumed
        taken = {name: value for name, value in recorded.items() if name in _TAKEN_OVER}
        return make_settings({**settings.model_dump(exclude_unset=True), **taken, **_given(settings, source)})
    given, folder = _given(settings, source), user_path(settings.init_from)
    if settings.resume != "none" and given.keys() == set(_TAKEN_OVER) and not folder.exists():
        return settings  # this host does not see the run that is resumed, but a --config of it says everything
    config = read_start(settings.init_from, source, differs=settings.base_differs).config
    decided = _decided(config)
    for name, value in given.items():
        if value != decided[name]:
            raise UserError(
                f"--{name} {flag_value(value)} contradicts --init_from {settings.init_from}, whose adapter has {name}"
                f" {flag_value(decided[name])}; leave --{name} out, or give another adapter"
            )
    return make_settings({**settings.model_dump(exclude_unset=True), **decided})


def load_start(
    settings: Settings, source: ModelSource, adapter: AdapterConfig, base: BaseIdentity
) -> tuple[Mapping[str, torch.Tensor] | None, tuple[str, ...]]:
    """The full tensors with which a new run starts, None for the initial ones; and notes. Rank 0 reads them for all.

    Args:
        adapter: the run's adapter.
        base: the run's base.

    Raises:
        UserError: the adapter cannot be read, was replaced meanwhile, or is for another base; on every rank.
    """
    given = settings.init_from
    if given is None:
        return None, ()
    differs, failure = settings.base_differs, None
    start = decided_by_rank_0(lambda: read_start(given, source, differs=differs), kind=StartAdapter)
    if _decided(start.config) != _decided(adapter):
        failure = UserError(f"--init_from {given}: is another adapter than a rank has planned with; start again")
    raise_on_every_rank(failure)
    notes = start.notes
    if start.trained is not None:
        notes += check_same_base(start.trained, base, source=f"--init_from {given}", differs=differs)
    return start.state, notes


def start_lines(settings: Settings, source: ModelSource) -> list[str]:
    """What a dry run says of the start."""
    if settings.init_from is None or recorded_run(settings) is not None:
        return []
    start = read_start(settings.init_from, source, differs=settings.base_differs)
    return [f"  starts with the values of {settings.init_from}, {start.kind}", *(f"  ({note})" for note in start.notes)]


def read_start(given: str, source: ModelSource, *, differs: bool) -> StartAdapter:
    """The adapter in the folder `given` to --init_from, for a base of the shape of `source`.

    Raises:
        UserError: there is none, it cannot be read or is for a model of another shape; or `source` has a merged adapter
            that a PEFT adapter does not know of, without `differs` (--base_differs).
    """
    opened = open_adapter(given, source, flag="--init_from", differs=differs)
    kind = "a PEFT adapter"
    if opened.kind == "native":
        kind, base = "a native adapter", opened.adapter.base_identity
        same_weights = identify_shape(source, base.dtype, weights_hash=base.base_weights_hash)
        check_same_base(base, same_weights, source=f"--init_from {given}", differs=True)  # of its shape alone
    elif opened.native is not None:
        kind = "a PEFT folder with the native adapter that was exported"
    notes = opened.notes if opened.apart is None else (*opened.notes, opened.apart)
    return StartAdapter(opened.config, opened.state, opened.trained_on, kind, notes)


def _decided(config: AdapterConfig) -> dict[str, Any]:
    """The settings that an adapter decides."""
    stds = {"init_std_a": config.init_std_a, "init_std_b": config.init_std_b}
    found = {**config.facts, **stds}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


def _given(settings: Settings, source: ModelSource) -> dict[str, Any]:
    """Those of these settings that the user gave."""
    every_layer = tuple(range(1, source.shape.num_layers + 1))
    given = {name: getattr(settings, name) for name in _TAKEN_OVER if name in settings.model_fields_set}
    return {name: every_layer if value is None else value for name, value in given.items()}


def recorded_run(settings: Settings) -> Mapping[str, Any] | None:
    """The settings in the checkpoint that --resume finds; None if there is none, or this host does not see it."""
    if settings.resume == "none":
        return None
    if settings.resume != "auto":
        return recorded_settings([user_path(settings.resume)])
    if settings.output_dir is not None:
        folder = RunFolder(user_path(settings.output_dir))
    elif settings.init_from is None or settings.model_fields_set >= _NAMING:
        folder = last_run_folder(settings)
    else:  # the adapter decides how the folder is called, so it is read first
        return None
    return recorded_settings(folder.checkpoints.glob("step_*"))
