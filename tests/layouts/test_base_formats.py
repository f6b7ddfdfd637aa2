"""A quantised base at layouts: the same values to the last bit, the oracle's gradients, and the oracle's runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engine_runs import SHORT, Layout, engine_json, prepare, run_and_check, run_engine, save_start, settings_of
from support.forked_ranks import join_as_launched, run_on_ranks
from support.gradient_worker import Case
from support.oracle import OracleConfig, load_weights
from support.quantised_models import CROSSING, FORMATS, SHAPE, dequantised, quantised, quantised_folder, with_values
from support.tiny_models import random_adapter, write_tiny_model
from test_layouts import LAYOUTS
from test_parallel_gradients import Answers
from test_parallel_gradients import run_and_check as check_gradients
from torch import distributed

from megatron_tiedlora.adapters.adapter_groups import ONLY
from megatron_tiedlora.base.methods import METHOD_NAMES as METHODS
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.engine.engine import parameter_access
from megatron_tiedlora.model.weights import weight_rules
from megatron_tiedlora.parallel.frozen_weight import frozen_weights
from megatron_tiedlora.parallel.quantised_weight import QuantisedWeight
from megatron_tiedlora.planning.run_plan import plan_run
from megatron_tiedlora.training.build import build_model

# On a rank ------------------------------------------------------------------------------------------------------------


Values = dict[str, torch.Tensor]


def base_values(cases: Sequence[dict[str, Any]], folder: str) -> list[tuple[Values, int, int]]:
    """For each case of settings: this rank's shards by name as the engine has them, bytes stored and predicted."""
    device = join_as_launched(folder)
    found = []
    for settings in cases:
        plan = plan_run(make_settings(settings), rank=distributed.get_rank(), world_size=distributed.get_world_size())
        built = build_model({ONLY: plan}, device)
        runner = built.runner
        values = {}
        for name, weight in frozen_weights(runner.stage).items():
            with parameter_access(plan.engine)(list(weight.parameters.values())):
                if isinstance(weight, QuantisedWeight):
                    values[name] = dequantised(weight)
        parts = plan.grid.dp_size if plan.engine.zero_stage == 3 else 1
        found.append((values, built.bytes_kept[plan.grid.rank], plan.stage.base_bytes // parts))
        runner.engine.destroy()
    return found


pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of five layers, in bf16 as most are, and by format a copy of it with the format's values."""
    root = tmp_path_factory.mktemp("models")
    shape = {**CROSSING, "num_layers": 5, "attention_bias": True}
    folder = write_tiny_model(root / "model", dtype=torch.bfloat16, **shape)
    return {"": folder, **{name: with_values(folder, root / name, name) for name in FORMATS}}


@pytest.fixture(scope="module")
def quantised_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """By kind: a folder that is quantised already, and a folder of its values."""
    root = tmp_path_factory.mktemp("quantised")
    plain = write_tiny_model(root / "plain", dtype=torch.bfloat16, **{**SHAPE, "num_layers": 4})
    return {kind: quantised_folder(plain, root / kind, kind) for kind in ("nf4 nested", "fp8 by row", "fp8 by tensor")}


def gradient_cases(folder: Path, layout: tuple[int, int, int], base: str, *, whole: bool) -> list[Case]:
    """tl6 with each kind of recompute; at the last layout all methods. In part, both are divided by format."""
    cut, number = layout[0] > 1, (FORMATS.index(base) + sum(layout)) % len(FORMATS)
    turn = slice(None) if whole else slice(number, None, len(FORMATS))
    cases = [
        Case(folder, layout, base=base, recompute=recompute, sequence_parallel=cut and recompute != "selective")
        for recompute in ("none", "selective", "full")[turn]
    ]
    if layout == (2, 2, 1):
        methods = METHODS[turn]
        cases += [Case(folder, layout, method=method, base=base, sequence_parallel=True) for method in methods]
    return cases


@pytest.fixture(scope="module")
def answers() -> Answers:
    return Answers()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_gradients_are_the_oracles_on_the_dequantised_weights(
    folders: dict[str, Path], answers: Answers, tmp_path: Path, ranks: int, whole: bool
) -> None:
    layouts = [sizes for sizes in ((1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1)) if sizes[0] * sizes[1] == ranks]
    cases = [
        case
        for layout, base in product(layouts, FORMATS)
        for case in gradient_cases(folders[""], layout, base, whole=whole)
    ]
    check_gradients(cases, answers, tmp_path, ranks)


def joined(folder: Path, layout: Layout, by_rank: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Full tensors from the shards of all ranks; data-parallel copies are equal."""
    full = {}
    for rule in weight_rules(find_model(str(folder)).shape):
        groups = [by_rank[first : first + layout.tp] for first in range(0, layout.ranks, layout.tp)]
        copies = [rule.spec.join([shards[rule.name] for shards in some]) for some in groups if rule.name in some[0]]
        if copies:
            assert len(copies) == layout.dp and all(torch.equal(copies[0], other) for other in copies)
            full[rule.name] = copies[0]
    return full


def kinds_and_stages(layout: Layout, kinds: Sequence[str], whole: bool) -> list[tuple[str, int]]:
    """(kind of base, ZeRO stage) at a layout: all that go with it; in part each kind with one of them, in turn.

    That is ZeRO-3 for every kind where data-parallel ranks have parts of the base. In part, every kind is at some
    layouts, and at each other layout one of them.
    """
    stages = (0, 1) if layout.pp > 1 else range(4)
    if whole:
        return list(product(kinds, stages))
    turn = [other for other in LAYOUTS if (other.pp > 1) == (layout.pp > 1)].index(layout)
    if layout not in (Layout(1, 1, 1), Layout(2, 1, 1), Layout(1, 1, 2), Layout(2, 2, 1)):
        kinds = kinds[turn % len(kinds) :][:1]
    if stages[-1] == 3 and layout.dp > 1:
        return [(kind, 3) for kind in kinds]
    return [(kind, stages[-1 - (turn + number) % 2]) for number, kind in enumerate(kinds)]


def check_values(
    cases: dict[Any, dict[str, Any]], expected: dict[str, dict[str, torch.Tensor]], folder: Path, *, ranks: int
) -> None:
    """By (layout, kind of base, ZeRO stage), the settings: all linears have the kind's values, in the bytes planned."""
    by_rank = run_on_ranks(base_values, [*cases.values()], str(folder), ranks=ranks, folder=folder / "ranks")
    for key, found in zip(cases, zip(*by_rank, strict=True), strict=True):
        layout, kind, stage = key
        full = joined(Path(cases[key]["model"]), layout, [values for values, *_ in found])
        assert full.keys() == expected[kind].keys()
        for name, value in full.items():
            assert torch.equal(value, expected[kind][name].float()), (name, key)
        for _, stored, predicted in found:
            assert stored == predicted or (stage == 3 and predicted <= stored <= predicted + 4 * 80), key


def linears(folder: Path, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of all linears of blocks, by the package's names, out of those by transformers' names."""
    shape = find_model(str(folder)).shape
    rules = [rule for rule in weight_rules(shape) if rule.linear is not None and 0 < rule.layer <= shape.num_layers]
    found = {rule.name: torch.cat([weights[name] for name in rule.hf_names]) for rule in rules}
    assert len(found) == 4 * shape.num_layers, "four linears in each block"
    return found


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_values_are_the_same_at_every_layout(folders: dict[str, Path], tmp_path: Path, ranks: int, whole: bool) -> None:
    files = {**settings_of(folders[""], tmp_path), "dtype": "bf16"}  # which zero.Init would round fp32 parameters to
    engines = [str(engine_json(tmp_path, stage)) for stage in range(4)]
    cases = {
        (layout, base, stage): {**files, **layout.settings, "base": base, "ds_config": engines[stage]}
        for layout in LAYOUTS
        if layout.ranks == ranks
        for base, stage in kinds_and_stages(layout, FORMATS, whole)
    }
    expected = {base: linears(folders[""], quantised(load_weights(folders[""]), base)) for base in FORMATS}
    check_values(cases, expected, tmp_path, ranks=ranks)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_quantised_folder_has_its_values_at_every_layout(
    quantised_folders: dict[str, tuple[Path, Path]], tmp_path: Path, ranks: int, whole: bool
) -> None:
    """Also with kept transposed copies, which ZeRO-3 partitions too."""
    cases = {
        (layout, kind, stage): {
            **settings_of(quantised_folders[kind][0], tmp_path),
            **layout.settings,
            "dtype": "bf16",
            **({"products": "fp8", "keep_transposed": True} if kind == "fp8 by row" else {}),
            "ds_config": str(engine_json(tmp_path, stage)),
        }
        for layout in LAYOUTS
        if layout.ranks == ranks
        for kind, stage in kinds_and_stages(layout, [*quantised_folders], whole)
    }
    expected = {kind: linears(folder, load_weights(plain)) for kind, (folder, plain) in quantised_folders.items()}
    check_values(cases, expected, tmp_path, ranks=ranks)


@pytest.mark.parametrize(
    "ranks", [pytest.param(1, marks=pytest.mark.slow), 2, 4, pytest.param(8, marks=pytest.mark.slow)]
)
def test_runs_are_the_oracles(folders: dict[str, Path], tmp_path: Path, ranks: int, whole: bool) -> None:
    """At every layout; in part each format over tensor and pipeline ranks, and under ZeRO-3 over data ranks.

    One process takes the steps on the dequantised weights, as the next test shows.
    """
    base = {**settings_of(folders[""], tmp_path), **({} if whole else SHORT)}
    prepared = []
    for number, layout in enumerate(LAYOUTS):
        if layout.ranks == ranks and (whole or layout in (Layout(1, 1, 1), Layout(1, 1, 2), Layout(2, 2, 1))):
            for name, optimizer in product(FORMATS, ("sgd", "adamw") if whole else ("sgd",)):
                changes: dict[str, Any] = {"base": name, "method": ("tl6", "tl5")[number % 2]}
                if layout.pp == 1:
                    changes["ds_config"] = str(engine_json(tmp_path, number % 4))
                more: dict[str, Any] = {"optimizer": optimizer, "oracle_model": folders[name]}
                prepared.append(prepare(base, tmp_path, layout, **more, **changes))
    run_and_check(prepared, tmp_path)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_run_is_that_on_the_dequantised_weights(folders: dict[str, Path], tmp_path: Path, dtype: str) -> None:
    """On one process bit for bit: all losses, all norms and the adapter at the end."""
    start = random_adapter(
        "tl6", OracleConfig.from_folder(folders[""]), rank=3, alpha=6.0, layers=None, seed=3, scale=0.2
    )
    shared = {**settings_of(folders[""], tmp_path), "dtype": dtype, "max_steps": 3}
    cases = [
        {"settings": {**shared, **changes}, "start": str(save_start(start, tmp_path / "start.safetensors"))}
        for changes in ({}, *({"base": name} for name in FORMATS), *({"model": str(folders[name])} for name in FORMATS))
    ]
    original, *runs = run_engine(cases, tmp_path, ranks=1)
    for found, expected in zip(runs[: len(FORMATS)], runs[len(FORMATS) :], strict=True):
        assert found.losses == expected.losses != original.losses and len(found.losses) == 3
        assert found.grad_norms == expected.grad_norms
        assert all(torch.equal(value, expected.adapter[name]) for name, value in found.adapter.items())
