"""Cases of the engine at layouts, what the oracle makes of each, and the comparison of the two."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from engine_runs import (
    EngineRun,
    oracle_run,
    relative_distance,
    relative_errors,
    run_engine,
    save_start,
    write_uneven_data,
)
from oracle import OracleAdapter, OracleConfig
from oracle_training import OracleRun
from shared_tensors import GROUPS
from tiny_models import random_adapter, write_tiny_model

from megatron_tiedlora.adapters.tied_adapter import initial_values
from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.planning.run_plan import plan_run

T = TypeVar("T")

STEPS = 6
# Two steps of two micro-batches, or of one where data-parallel ranks share them: whether buffers of a pipeline are used
# again, and what a third step does without the checks of the first two, is seen in test_layouts.py at every layout.
SHORT: dict[str, Any] = {"max_steps": 2, "micro_batch_size": 4}
CASES_A_START = 24  # so that a start ends within the limit of `ranks`
LOSS_TOLERANCE = 1e-5
NORM_TOLERANCE = 1e-5
ADAPTER_TOLERANCE = {"adamw": 5e-5, "sgd": 1e-5}


OPTIMIZERS = ("sgd", "adamw")


def part_of(cases: Sequence[T], *views: Callable[[T], Hashable]) -> list[T]:
    """Few of the cases, chosen so that every value of every view occurs that occurs in all; in their order."""
    shown = [{(number, view(case)) for number, view in enumerate(views)} for case in cases]
    left, chosen = set().union(*shown), []
    while left:
        best = max(range(len(cases)), key=lambda index: len(shown[index] & left))
        chosen.append(best)
        left -= shown[best]
    return [cases[index] for index in sorted(chosen)]


def with_optimizers(cases: Sequence[T], *, whole: bool) -> list[tuple[T, str]]:
    """Each case with both optimizers, or in part with one of them in turn."""
    return [
        (case, optimizer)
        for index, case in enumerate(cases)
        for optimizer in (OPTIMIZERS if whole else OPTIMIZERS[index % 2 :][:1])
    ]


@dataclass(frozen=True)
class Layout:
    """Sizes of a grid."""

    tp: int
    pp: int
    dp: int

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def settings(self) -> dict[str, Any]:
        """The two sizes that a run is told."""
        return {"tensor_parallel": self.tp, "pipeline_parallel": self.pp}


def engine_json(folder: Path, stage: int, **zero: Any) -> Path:
    """An engine JSON of a ZeRO stage that takes SGD too."""
    zero = {"stage": stage, "reduce_bucket_size": 1000000, **zero}
    file = folder / f"zero{stage}.json"
    file.write_text(json.dumps({"zero_allow_untested_optimizer": True, "zero_optimization": zero}))
    return file


def settings_of(model: Path, folder: Path) -> dict[str, Any]:
    """Settings of a short run of `model` on uneven samples, with clipping active; the files are in `folder`."""
    return {
        "model": str(model),
        "train_file": str(write_uneven_data(folder / "train.jsonl")),
        "validation_file": str(write_uneven_data(folder / "validation.jsonl", rows=2, seed=1)),
        "ds_config": str(engine_json(folder, 1)),
        "dtype": "fp32",
        "rank": 3,
        "alpha": 6.0,
        "seed": 11,
        "max_length": 128,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "max_steps": STEPS,
        "warmup_steps": 2,
        "learning_rate": 5e-4,
        "weight_decay": 0.01,
        "gradient_clipping": 0.05,
        "eval_interval": 1000,
    }


def five_layers(folder: Path) -> dict[str, Any]:
    """Settings of a tiny model whose 5 layers divide by neither 2 nor 4 stages; 8 heads on 4 key-value heads."""
    model = write_tiny_model(folder / "model", num_layers=5, num_heads=8, num_kv_heads=4, head_dim=6)
    return settings_of(model, folder)


@dataclass(frozen=True)
class Prepared:
    """A case for the workers with the oracle's run of it."""

    case: dict[str, Any]
    oracle: OracleRun
    layout: Layout


_oracles: dict[Any, OracleRun] = {}
"""By the folder of `prepare` and what of its arguments the oracle's run depends on."""


def prepare(
    base: dict[str, Any],
    folder: Path,
    layout: Layout,
    /,
    *,
    optimizer: str = "sgd",
    own_start: bool = False,
    oracle_model: Path | None = None,
    shares: str | None = None,
    **changes: Any,
) -> Prepared:
    """A case at `layout` that starts from random non-zero factors.

    Args:
        folder: for files; cases with the same one differ in layout, optimizer and method alone, as the oracle sees it.
        own_start: it starts from the package's own values, and the oracle from those that one rank alone draws.
        oracle_model: what the oracle computes with; None for the run's own model.
        shares: in which way of `shared_tensors` layers share the tensors of tl6.
    """
    settings = {**base, **layout.settings, **changes}
    if layout.pp * layout.dp == 1 and "micro_batch_size" not in changes:
        settings["micro_batch_size"] *= 2  # two micro-batches are enough where no stage waits for another
    if optimizer == "sgd":
        settings["learning_rate"] = 0.3
    layers, targets = settings.get("layers"), settings.get("targets", ["qkv"])
    method, rank = settings.get("method", "tl6"), settings["rank"]
    key = (method, rank, optimizer, str(layers), settings["max_steps"], "+".join(targets), settings.get("base"), shares)
    file = folder / f"{'-'.join(map(str, key))}.safetensors"
    if (file, own_start) not in _oracles:
        if own_start:
            alone = {**settings, "tensor_parallel": 1, "pipeline_parallel": 1}
            config = plan_run(make_settings(alone), rank=0, world_size=1).adapter
            start = OracleAdapter(config.method, config.rank, config.alpha, config.layers, initial_values(config))
        else:
            start = random_adapter(
                method,
                OracleConfig.from_folder(Path(base["model"])),
                rank=rank,
                alpha=settings["alpha"],
                layers=tuple(layers) if layers else None,
                seed=3,
                scale=0.2,
                targets=targets,
                groups=GROUPS[shares] if shares else None,
            )
            save_start(start, file)
        of_oracle = settings if oracle_model is None else {**settings, "model": str(oracle_model)}
        _oracles[file, own_start] = oracle_run(of_oracle, start, optimizer=optimizer)
    case = {"settings": settings, "start": None if own_start else str(file), "optimizer": optimizer, "shares": shares}
    return Prepared(case, _oracles[file, own_start], layout)


def red_measures(run: EngineRun, prepared: Prepared, *, loss: float = LOSS_TOLERANCE) -> dict[str, Any]:
    """Which measures say that the run is not the oracle's, and how far it is: losses, rates, norms, the factors, and
    copies of tied tensors, which are equal to the last bit."""
    oracle, layout = prepared.oracle, prepared.layout
    assert min(oracle.grad_norms) > 0.05, "clipping must be active"
    found = {
        "losses": (max(relative_errors(run.losses, oracle.losses)), loss),
        "norms": (max(relative_errors(run.grad_norms, oracle.grad_norms)), NORM_TOLERANCE),
    }
    for factor in oracle.adapter.trained:
        distance = relative_distance(run.adapter[factor], oracle.adapter.tensors[factor])
        found[factor] = distance, ADAPTER_TOLERANCE[prepared.case["optimizer"]]
    red: dict[str, Any] = {name: error for name, (error, limit) in found.items() if not error <= limit}
    if run.learning_rates != pytest.approx(oracle.learning_rates, rel=1e-12):
        red["rates"] = run.learning_rates
    tied = "AB" if prepared.case["settings"].get("method", "tl6") != "lora" else ""
    for rank, local in enumerate(run.local):
        first = rank // (layout.tp * layout.dp) * layout.tp * layout.dp
        for factor, value in local.items():
            # u is whole on every rank of its stage.
            twin = rank % layout.tp if factor[-1] in tied else first if factor[-1] == "u" else rank
            if not torch.equal(value, run.local[twin][factor]):
                red["copies"] = rank, factor
    return red


def check(run: EngineRun, prepared: Prepared, *, loss: float = LOSS_TOLERANCE) -> None:
    """The run is the oracle's, with losses within `loss`."""
    red = red_measures(run, prepared, loss=loss)
    assert not red, (red, prepared.case)


def run_and_check(prepared: list[Prepared], folder: Path, *, loss: float = LOSS_TOLERANCE) -> None:
    """Run all cases, some in one start, and compare each with its oracle."""
    ranks = prepared[0].layout.ranks
    for first in range(0, len(prepared), CASES_A_START):
        started = prepared[first : first + CASES_A_START]
        place = folder / f"from{first}" if first else folder  # which has the oracle's tokenised samples
        runs = run_engine([item.case for item in started], place, ranks=ranks)
        for item, run in zip(started, runs, strict=True):
            check(run, item, loss=loss)
