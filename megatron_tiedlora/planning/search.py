"""Enumerate the layouts of a run on a cluster. `plan_run` checks each layout as a run does, and may reject it.

No check depends on micro-batch size, sequence parallelism or recomputation. So `plan_run` is called only once per
adapter for each combination of the other settings. `variants` then varies these three settings.
"""

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import Any

from megatron_tiedlora.base.messages import UserError, nearest_name
from megatron_tiedlora.base.shapes import BASE_NAMES, UNQUANTISED
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.config.cli import PER_ADAPTER
from megatron_tiedlora.config.settings import Settings, make_settings
from megatron_tiedlora.engine.engine_json import SHIPPED_CONFIGS
from megatron_tiedlora.parallel.quantised_weight import check_fp8_capability
from megatron_tiedlora.planning import adapter_plans, machines
from megatron_tiedlora.planning.layout import PLAIN_STORAGE, Storage
from megatron_tiedlora.planning.planned import Planned, StepPlan, time_together

RECOMPUTES = ("none", "selective", "full")
# The file of each ZeRO stage, without zero2_offload.json, which moves only a few MB to the host.
ENGINE_FILES = tuple(sorted(path.name for path in SHIPPED_CONFIGS.glob("zero?.json")))


STORAGES = (PLAIN_STORAGE, *map(Storage, BASE_NAMES), Storage("fp8", "fp8"), Storage("fp8", "fp8", True))


@dataclass(eq=False, kw_only=True)
class Candidate(Planned):
    """A layout that a run accepts.

    Attributes:
        is_default: whether micro-batch size, sequence parallelism and recomputation have the defaults of a run.
        engine_file: the value of --ds_config.
    """

    is_default: bool
    engine_file: str
    storage: Storage

    @property
    def name(self) -> str:
        """The unique name of the layout, which the table shows and --why accepts."""
        layout, zero = self.layout, self.engine_file.removesuffix(".json")
        words = [f"t{layout.tp_size}p{layout.pp_size}d{layout.dp_size}-b{layout.rows}-{zero}"]
        words += ["wholeseq"] if layout.tp_size > 1 and not layout.shards_sequences else []
        words += ["halves"] if layout.overlap else []
        words += [layout.recompute] if layout.recompute != "none" else []
        words += [self.storage.name] if self.storage != PLAIN_STORAGE else []
        return "-".join(words)

    @property
    def flags(self) -> dict[str, Any]:
        """The settings of `tiedlora train` that select the layout."""
        layout = self.layout
        return {
            "tensor_parallel": layout.tp_size,
            "pipeline_parallel": layout.pp_size,
            "sequence_parallel": layout.shards_sequences,
            **({"overlap": "halves"} if layout.overlap else {}),
            "micro_batch_size": layout.rows,
            "recompute": layout.recompute,
            "ds_config": self.engine_file,
            **{name: value for name, value in self.storage._asdict().items() if value},
        }

    @property
    def alike(self) -> tuple[Hashable, ...]:
        """The parallel sizes and the storage format. Layouts with equal values differ only in other settings."""
        return self.layout.tp_size, self.layout.pp_size, self.layout.dp_size, self.storage


_TIE = 1.005  # layouts within this factor of the fastest time count as equally fast


@dataclass(eq=False)
class ClusterPlan:
    """All layouts of a run on a cluster, and the reasons why a run rejects some of them.

    Attributes:
        settings: the settings of `tiedlora train`, with the defaults of `tiedlora plan`.
        world_size, per_node: the number of ranks, and the number of ranks per node.
        machine: the machine of all ranks.
        data: the data of each adapter, once they are read; empty for a preset, or if no data file is given.
        candidates: the layouts that a run accepts.
        refused: the number of rejected layouts by error message.
        ranked: the storage formats to choose from. Candidates in other formats are only used for hints.
    """

    settings: Settings
    source: ModelSource
    world_size: int
    per_node: int
    machine: machines.Machine
    data: adapter_plans.Data = field(default_factory=dict)
    candidates: tuple[Candidate, ...] = ()
    refused: Counter[str] = field(default_factory=Counter)
    ranked: tuple[Storage, ...] = ()
    _steps: dict[Hashable, StepPlan] = field(default_factory=dict)

    # The layouts ------------------------------------------------------------------------------------------------------

    @property
    def enumerated(self) -> int:
        """The number of accepted and rejected layouts."""
        return len(self.candidates) + self.refused.total()

    @cached_property
    def _fitting(self) -> list[Candidate]:
        """The candidates that fit in memory, the fastest first. Equally fast layouts are sorted by memory use."""
        fitting = [one for one in self.candidates if one.fits]
        time_together(fitting)
        return sorted(fitting, key=lambda one: (one.seconds.total, one.needed))

    @cached_property
    def rows(self) -> list[Candidate]:
        """The candidates in `ranked` storage formats that fit in memory, the fastest first.

        Layouts within `_TIE` of the fastest time count as equally fast. Of these, the first one changes the base least.
        """
        rows = [one for one in self._fitting if one.storage in self.ranked]
        ties = sum(one.seconds.total <= _TIE * rows[0].seconds.total for one in rows)
        rows[:ties] = sorted(rows[:ties], key=lambda one: sum(map(bool, one.storage)))  # a stable sort
        return rows

    @cached_property
    def elsewhere(self) -> list[Candidate]:
        """The candidates outside the `ranked` storage formats that fit in memory, the fastest first."""
        return [one for one in self._fitting if one.storage not in self.ranked]

    @cached_property
    def others(self) -> list[Candidate]:
        """The candidates that do not fit in memory."""
        return [one for one in self.candidates if not one.fits]

    @property
    def all_rows(self) -> list[Candidate]:
        """All candidates. Those that fit in memory come first."""
        return [*self.rows, *self.elsewhere, *self.others]

    def best_of_each(self) -> list[Candidate]:
        """Return the fastest layout for each combination of parallel sizes and storage format."""
        found: dict[Hashable, Candidate] = {}
        for row in self.rows:
            found.setdefault(row.alike, row)
        return list(found.values())

    def row(self, name: str, *, flag: str) -> Candidate:
        """Return the layout with this name. Raises UserError if there is none; the message suggests a similar name."""
        rows = {row.name: row for row in self.all_rows}
        if name not in rows:
            raise UserError(f"--{flag} {name}: no such layout{nearest_name(name, rows)}. Give a name from the table")
        return rows[name]

    # The settings of candidate runs -----------------------------------------------------------------------------------

    @property
    def values(self) -> dict[str, Any]:
        """The user's settings, with the defaults of `tiedlora plan`."""
        return {
            **self.settings.model_dump(mode="json", exclude_unset=True),
            "max_length": self.settings.max_length,
            "global_batch_size": self.settings.global_batch_size,
            "dry_run": True,
            "plan_for": "gpu" if self.machine.on_gpu else "cpu",
        }

    @cached_property
    def adapters(self) -> dict[str, Settings]:
        """The settings of each adapter, without an assumed global batch size. Raises the same UserError as a run."""
        assumed = {"global_batch_size"} - self.settings.model_fields_set
        given = {name: value for name, value in self.values.items() if name not in assumed}
        return adapter_plans.adapter_settings(make_settings(given))

    def assumes(self, name: str) -> bool:
        """Return whether at least one adapter uses the default of a setting."""
        if self.given(name):
            return False
        return name not in PER_ADAPTER or any(name not in own.model_fields_set for own in self.adapters.values())

    def given(self, name: str) -> bool:
        """Return whether the user gave a value for this setting."""
        return name in self.settings.model_fields_set

    def choices(self, name: str, values: Sequence[Any]) -> Sequence[Any]:
        """Return the values to try for a setting: the user's value if there is one, else all `values`."""
        return [getattr(self.settings, name)] if self.given(name) else values

    def rows_per_rank(self, dp_size: int) -> list[int]:
        """Return the micro-batch sizes to try: the given one, or all that divide every adapter's samples per rank."""
        if self.settings.micro_batch_size is not None:
            return [self.settings.micro_batch_size]
        given = (own for own in self.adapters.values() if "global_batch_size" in own.model_fields_set)
        assumed = [self.settings.global_batch_size] if self.assumes("global_batch_size") else []
        share, rest = divmod(math.gcd(*(own.global_batch_size for own in given), *assumed), max(dp_size, 1))
        least = 2 if self.settings.overlap == "halves" else 1
        return [least] if rest or share % least else [least * size for size in divisors(share // least)]

    def plans(self, tp_size: int, pp_size: int, engine_file: str, storage: Storage) -> adapter_plans.Plans:
        """Return the plans of `plan_run` for a layout, by adapter name.

        Raises:
            UserError: a run rejects the layout, or the layout is not suitable for the cluster.
        """
        if self.per_node % tp_size and not self.given("tensor_parallel"):
            raise UserError(
                f"--tensor_parallel {tp_size}: a tensor-parallel group would span nodes of {self.per_node} ranks,"
                f" which is slow. Give --tensor_parallel {tp_size} to plan this layout anyway"
            )
        if storage.products is not None and self.machine.on_gpu:
            assert self.machine.capability is not None, "a GPU has a capability"
            check_fp8_capability(self.machine.title, self.machine.capability)
        ranks = self.world_size
        sizes = {"tensor_parallel": tp_size, "pipeline_parallel": pp_size, "world_size": ranks}
        settings = make_settings({**self.values, **sizes, "ds_config": engine_file, **storage._asdict()})
        return adapter_plans.plan_adapters(settings, rank=0, world_size=ranks, weights=False, source=self.source)

    def variants(
        self, plans: adapter_plans.Plans, rows: Sequence[int], sequences: Sequence[bool], recomputes: Sequence[str]
    ) -> Iterator[dict[str, Any]]:
        """Yield `step`, `layout` and `is_default` of a candidate for each combination of the last three arguments."""
        plans = adapter_plans.counted(plans, self.data) if self.data else plans
        shares = self.settings.share_micro_batches
        base = StepPlan(plans, shares).layout
        for size, shards in product(rows, sequences):
            key = (base.tp_size, base.pp_size, base.dp_size, size, shards)
            if key not in self._steps:
                varied = {
                    name: replace(
                        plan,
                        settings=plan.settings.completed(sequence_parallel=shards),
                        batches=replace(plan.batches, micro_batch_size=size),
                    )
                    for name, plan in plans.items()
                }
                self._steps[key] = StepPlan.first(varied, self.data, shares=shares)
            step = self._steps[key]
            shared = replace(base, rows=size, micro_batches=step.layout.micro_batches, shards_sequences=shards)
            for recompute in recomputes:
                is_default = (size, shards, recompute) == (base.rows, base.shards_sequences, base.recompute)
                yield {"step": step, "layout": replace(shared, recompute=recompute), "is_default": is_default}


def search(plan: ClusterPlan, formats: tuple[str, ...] | None) -> ClusterPlan:
    """Find all layouts of the run on the cluster, and return the plan with these layouts and the data.

    Args:
        formats: the names of the storage formats to choose from; None for the format that changes the base least.

    Raises:
        UserError: no layout is accepted, or the data cannot be read. The messages are the same as in a run.
    """
    settings, storages, accepted = plan.settings, _storages(plan, formats), []
    plan.ranked = storages if formats is not None else storages[:1]
    engine_files, recomputes = plan.choices("ds_config", ENGINE_FILES), plan.choices("recompute", RECOMPUTES)
    ranks, sizes = plan.world_size, divisors(plan.world_size)
    tensor, pipeline = (plan.choices(f"{name}_parallel", sizes) for name in ("tensor", "pipeline"))
    # If no sizes divide the number of ranks, one pair is tried, so that the user gets the error message of a run.
    grids = [(t, p) for t in tensor for p in pipeline if ranks % (t * p) == 0] or [(tensor[0], pipeline[0])]
    for (tp_size, pp_size), engine_file, storage in product(grids, engine_files, storages):
        # Without tensor parallelism, sequence parallelism has no effect.
        sequences = plan.choices("sequence_parallel", [settings.sequence_parallel] if tp_size == 1 else [True, False])
        variants = plan.rows_per_rank(ranks // (tp_size * pp_size)), sequences, recomputes
        try:
            accepted.append((plan.plans(tp_size, pp_size, engine_file, storage), variants, engine_file, storage))
        except UserError as error:
            plan.refused[str(error)] += math.prod(map(len, variants))
    if not accepted:
        raise UserError(plan.refused.most_common(1)[0][0])
    first, *_ = accepted[0]
    if any(own.reads_data for own in first.values()):
        plan.data = adapter_plans.prepare_all_data(first)  # the data are the same for all layouts
    plan.machine = next(iter(first.values())).with_attention(plan.machine, packed=bool(plan.data))
    same: dict[str, Any] = {"machine": plan.machine, "per_node": plan.per_node, "known": {}}
    plan.candidates = tuple(
        Candidate(**variant, **same, engine_file=engine_file, storage=storage)
        for plans, variants, engine_file, storage in accepted
        for variant in plan.variants(plans, *variants)
    )
    return plan


def _storages(plan: ClusterPlan, formats: tuple[str, ...] | None) -> tuple[Storage, ...]:
    """Return the storage formats to plan. If `formats` is given, only the formats that it names are returned.

    If the weights of the model are stored quantised, only their own format is allowed.

    Raises:
        UserError: no storage format remains.
    """
    settings, source = plan.settings, plan.source
    named = STORAGES if formats is None else tuple(s for s in STORAGES if s.name in formats)
    given = f"--formats {','.join(storage.name for storage in named)}"
    left = named if source.stored is None else tuple(s for s in named if s.base == source.stored.base_format)
    if source.stored is not None and not left:
        names = " or ".join(storage.name for storage in STORAGES if storage.base == source.stored.base_format)
        raise UserError(
            f"{given}: {source.name} already has its weights in {source.stored.in_words}. Give {names}, or omit"
            " --formats"
        )
    # The recorded settings of a run have an empty --base for a model that is stored quantised.
    base, given_base = settings.base or source.stored_base, plan.given("base")
    if given_base and base not in [storage.base for storage in named]:
        base = base or UNQUANTISED
        raise UserError(f"{given} and --base {base}: none of these formats stores the base in {base}. Omit one flag")
    wanted = {name: getattr(settings, name) for name in Storage._fields if plan.given(name)}
    wanted |= {"base": base} if given_base else {}
    fits = [storage for storage in left if all(getattr(storage, name) == value for name, value in wanted.items())]
    # If no format fits, `plan_run` gets the format in the settings and raises the error.
    return tuple(fits) or (Storage(**{name: getattr(settings, name) for name in Storage._fields}),)


def divisors(number: int) -> list[int]:
    """Return the divisors of a number, in ascending order."""
    return [size for size in range(1, number + 1) if number % size == 0]
