"""Every layout of a cluster, by the checks of a run: `plan_run` accepts a layout or says what is wrong with it.

Micro-batch, sequence parallelism and recompute are in no check, so `plan_run` is asked once for each value of the other
choices and each adapter. `runs` changes what it returns in these three.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_tiedlora.base.base_formats import BASE_NAMES, UNQUANTISED
from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.engine.engine_json import SHIPPED_CONFIGS
from megatron_tiedlora.parallel.fp8_products import check_fp8_capability
from megatron_tiedlora.planner.runs import PlannedRun
from megatron_tiedlora.planning.layout import Layout
from megatron_tiedlora.planning.machines import Machine

if TYPE_CHECKING:
    from megatron_tiedlora.training.plan import RunPlan
    from megatron_tiedlora.training.step_plan import StepPlan

RECOMPUTES = ("none", "selective", "full")
# The file of each ZeRO stage. zero2_offload.json is left out: it moves a few MB to the host.
ENGINE_FILES = tuple(sorted(path.name for path in SHIPPED_CONFIGS.glob("zero?.json")))


class Storage(NamedTuple):
    """How the base is stored and multiplied: --base, --products, --keep_transposed."""

    base: str | None = None
    products: str | None = None
    keep_transposed: bool = False

    @property
    def name(self) -> str:
        """A name of `FORMAT_NAMES`."""
        if self.products is None:
            return self.base or UNQUANTISED
        return "fp8-transposed" if self.keep_transposed else "fp8-products"

    @property
    def num_changes(self) -> int:
        """How many of the three flags differ from a run in 16 bits."""
        return sum(map(bool, self))


STORAGES = (Storage(), *map(Storage, BASE_NAMES), Storage("fp8", "fp8"), Storage("fp8", "fp8", True))


@dataclass(frozen=True)
class Cluster:
    """What is booked: so many ranks, `per_node` in each node, on such cards."""

    world_size: int
    per_node: int
    machine: Machine


@dataclass(frozen=True)
class Candidate:
    """A layout that a run accepts.

    Attributes:
        step: the first step of the run, which layouts share that have the same micro-batches.
        is_default: whether micro-batch, sequence parallelism and recompute are those of a run without their flags.
        engine_file: the value of --ds_config.
    """

    layout: Layout
    step: StepPlan
    is_default: bool
    engine_file: str
    storage: Storage

    @property
    def name(self) -> str:
        """A name that tells it from all others, for the table and --why."""
        layout, zero = self.layout, self.engine_file.removesuffix(".json")
        words = [f"t{layout.tp_size}p{layout.pp_size}d{layout.dp_size}-b{layout.rows}-{zero}"]
        words += ["wholeseq"] if layout.tp_size > 1 and not layout.shards_sequences else []
        words += [layout.recompute] if layout.recompute != "none" else []
        words += [self.storage.name] if self.storage != Storage() else []
        return "-".join(words)

    @property
    def flags(self) -> dict[str, Any]:
        """The settings of tiedlora train that choose it."""
        layout = self.layout
        chosen = {
            "tensor_parallel": layout.tp_size,
            "pipeline_parallel": layout.pp_size,
            "sequence_parallel": layout.shards_sequences,
            "micro_batch_size": layout.rows,
            "recompute": layout.recompute,
            "ds_config": self.engine_file,
            "base": self.storage.base,
            "products": self.storage.products,
            "keep_transposed": self.storage.keep_transposed or None,
        }
        return {name: value for name, value in chosen.items() if value is not None}


@dataclass(frozen=True)
class Search:
    """What was enumerated.

    Attributes:
        candidates: the layouts that a run accepts.
        refused: by what a run says of it, the number of the other layouts.
        ranked: the storage formats to choose from; candidates in others only show what these would gain.
    """

    run: PlannedRun
    candidates: tuple[Candidate, ...]
    refused: Counter[str]
    ranked: tuple[Storage, ...]

    @property
    def enumerated(self) -> int:
        """All layouts."""
        return len(self.candidates) + self.refused.total()


def search(
    settings: Settings, cluster: Cluster, *, source: ModelSource, formats: tuple[str, ...] | None = None
) -> Search:
    """Enumerate all layouts of the settings on a cluster.

    Args:
        formats: names of the storage formats to choose from; None for the first of all, which changes least.

    Raises:
        UserError: no layout is accepted, or the data cannot be read; the words are those of a run.
    """
    run, refused = PlannedRun(settings, source, cluster.machine.on_gpu), Counter[str]()
    storages, accepted = _storages(run, formats), []
    engine_files, recomputes = run.choices("ds_config", ENGINE_FILES), run.choices("recompute", RECOMPUTES)
    for (tp_size, pp_size), engine_file, storage in product(run.grids(cluster.world_size), engine_files, storages):
        variants = run.rows(cluster.world_size // (tp_size * pp_size)), run.sequences(tp_size), recomputes
        try:
            plans = _plans(run, cluster, tp_size, pp_size, engine_file, storage)
        except UserError as error:
            refused[str(error)] += math.prod(map(len, variants))
        else:
            accepted.append((plans, variants, engine_file, storage))
    if not accepted:
        raise UserError(refused.most_common(1)[0][0])
    run.read_data(accepted[0][0])
    found = (
        Candidate(*variant, engine_file, storage)
        for plans, variants, engine_file, storage in accepted
        for variant in run.variants(plans, *variants)
    )
    return Search(run, tuple(found), refused, storages if formats is not None else storages[:1])


def _storages(run: PlannedRun, formats: tuple[str, ...] | None) -> tuple[Storage, ...]:
    """Values of --base, --products and --keep_transposed together, of those with a name in `formats`.

    A model that is stored quantised has those of its own format.

    Raises:
        UserError: none is left.
    """
    settings, source = run.settings, run.source
    named = STORAGES if formats is None else tuple(s for s in STORAGES if s.name in formats)
    given = f"--formats {','.join(storage.name for storage in named)}"
    left = named if source.stored is None else tuple(s for s in named if s.base == source.stored.base_format)
    if source.stored is not None and not left:
        names = " or ".join(storage.name for storage in STORAGES if storage.base == source.stored.base_format)
        raise UserError(
            f"{given}: {source.name} has its weights in {source.stored.in_words} already; give {names}, or leave"
            " --formats out"
        )
    # A run's record has an empty --base for a model that is stored quantised.
    base, given_base = settings.base or source.stored_base, run.given("base")
    if given_base and base not in [storage.base for storage in named]:
        base = base or UNQUANTISED
        raise UserError(f"{given} and --base {base}: none of these formats stores the base in {base}; leave one out")
    wanted = {name: getattr(settings, name) for name in Storage._fields if run.given(name)}
    wanted |= {"base": base} if given_base else {}
    fits = [storage for storage in left if all(getattr(storage, name) == value for name, value in wanted.items())]
    # What fits none is asked of `plan_run` as it was given, for its words.
    return tuple(fits) or (Storage(settings.base, settings.products, settings.keep_transposed),)


def _plans(
    run: PlannedRun, cluster: Cluster, tp_size: int, pp_size: int, engine_file: str, storage: Storage
) -> Mapping[str, RunPlan]:
    """What `plan_run` says of a layout, by adapter."""
    machine = cluster.machine
    if cluster.per_node % tp_size and not run.given("tensor_parallel"):
        raise UserError(
            f"--tensor_parallel {tp_size}: a group would span nodes of {cluster.per_node}, whose network is too slow"
            f" for it; give --tensor_parallel {tp_size} to plan it"
        )
    if storage.products is not None and machine.on_gpu:
        assert machine.capability is not None, "a GPU has a capability"
        check_fp8_capability(machine.title, machine.capability)
    sizes = {"tensor_parallel": tp_size, "pipeline_parallel": pp_size}
    chosen = {**sizes, "ds_config": engine_file, **storage._asdict()}
    return run.plans(chosen, world_size=cluster.world_size)
