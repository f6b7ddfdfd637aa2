"""A quantised base at layouts: the same values to the last bit, the oracle's gradients, and the oracle's runs."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from base_worker import base_values
from engine_runs import run_engine, save_start
from forked_ranks import run_on_ranks
from gradient_worker import Case
from layout_runs import Layout, engine_json, prepare, run_and_check, settings_of
from oracle import OracleConfig, cast_weights, load_weights
from oracle_training import OracleRun
from quantised_folders import SHAPE, quantised_folder
from quantised_models import CROSSING, FORMATS, quantised, with_values
from test_layouts import LAYOUTS
from test_parallel_gradients import Answers
from test_parallel_gradients import run_and_check as check_gradients
from tiny_models import random_adapter, write_tiny_model

from megatron_tiedlora.base.methods import METHOD_NAMES as METHODS
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.model.weights import weight_rules
from megatron_tiedlora.parallel.groups import Grid

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


class QuantisedAnswers(Answers):
    """The oracle's, with the values of the case's format."""

    def weights(self, case: Case) -> tuple[Any, OracleConfig]:
        assert case.base is not None
        found = self._weights.get(Path(case.base))
        if found is None:
            config = OracleConfig.from_folder(case.folder)
            found = cast_weights(quantised(load_weights(case.folder), case.base), torch.float64), config
            self._weights[Path(case.base)] = found
        return found

    def gradients(self, case: Case) -> tuple[float, dict[str, torch.Tensor]]:
        self._gradients = self._by_base.setdefault(str(case.base), {})
        return super().gradients(case)

    def __init__(self) -> None:
        super().__init__()
        self._by_base: dict[str, Any] = {}


@pytest.fixture(scope="module")
def answers() -> QuantisedAnswers:
    return QuantisedAnswers()


def gradient_cases(folder: Path, layout: tuple[int, int, int], base: str, *, whole: bool) -> list[Case]:
    """tl6 with each kind of recompute; at the last layout all methods. In part, the methods are divided by format."""
    cut = layout[0] > 1
    cases = [
        Case(folder, layout, base=base, recompute=recompute, sequence_parallel=cut and recompute != "selective")
        for recompute in ("none", "selective", "full")
    ]
    if layout == (2, 2, 1):
        methods = METHODS if whole else METHODS[FORMATS.index(base) :: len(FORMATS)]
        cases += [Case(folder, layout, method=method, base=base, sequence_parallel=True) for method in methods]
    return cases


@pytest.mark.cpu_seconds(20, reason="every case beside the oracle, in one start for each number of ranks")
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_gradients_are_the_oracles_on_the_dequantised_weights(
    folders: dict[str, Path], answers: QuantisedAnswers, tmp_path: Path, ranks: int, whole: bool
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
    world = Grid(0, layout.ranks, tp_size=layout.tp, pp_size=layout.pp)
    full = {}
    for rule in weight_rules(find_model(str(folder)).shape):
        owners = [rank for rank in range(layout.ranks) if rule.name in by_rank[rank]]
        if not owners:
            continue
        copies: dict[int, list[torch.Tensor]] = {}
        for rank in owners:
            copies.setdefault(world.at(rank).tp_rank, []).append(by_rank[rank][rule.name])
        assert sorted(copies) == list(range(layout.tp)) and all(len(found) == layout.dp for found in copies.values())
        assert all(torch.equal(found[0], other) for found in copies.values() for other in found)
        full[rule.name] = rule.spec.join([copies[tp_rank][0] for tp_rank in range(layout.tp)])
    return full


def zero_stages(layout: Layout, whole: bool) -> list[int]:
    """Those that go with the layout; in part, 3 and another one."""
    if layout.pp > 1:
        return [0, 1] if whole else [1]
    return [0, 1, 2, 3] if whole else [layout.dp + layout.tp - 2, 3]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_values_are_the_same_at_every_layout(
    folders: dict[str, Path], tmp_path: Path, ranks: int, whole: bool
) -> None:
    files = settings_of(folders[""], tmp_path)
    layouts = [layout for layout in LAYOUTS if layout.ranks == ranks]
    keys = [(layout, base, stage) for layout in layouts for base in FORMATS for stage in zero_stages(layout, whole)]
    cases = [
        {
            **files,
            "tensor_parallel": layout.tp,
            "pipeline_parallel": layout.pp,
            "base": base,
            "dtype": "bf16",  # which zero.Init would round fp32 parameters to
            "ds_config": str(engine_json(tmp_path, stage)),
        }
        for layout, base, stage in keys
    ]
    by_rank = run_on_ranks(base_values, cases, str(tmp_path), ranks=ranks, folder=tmp_path / "ranks")
    expected = {
        base: {
            rule.name: torch.cat([weights[name] for name in rule.hf_names])
            for rule in weight_rules(find_model(str(folders[""])).shape)
        }
        for base in FORMATS
        for weights in [quantised(load_weights(folders[""]), base)]
    }
    for key, found in zip(keys, zip(*by_rank, strict=True), strict=True):
        layout, base, stage = key
        full = joined(folders[""], layout, [values for values, *_ in found])
        assert len(full) == 4 * 5, "four linears in each of five blocks"
        for name, value in full.items():
            assert torch.equal(value, expected[base][name].float()), (name, key)
        for _, stored, predicted in found:
            assert stored == predicted or (stage == 3 and predicted <= stored <= predicted + 4 * 80), key


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_quantised_folder_has_its_values_at_every_layout(
    quantised_folders: dict[str, tuple[Path, Path]], tmp_path: Path, ranks: int
) -> None:
    """Also with kept transposed copies, which ZeRO-3 partitions too."""
    layouts = [layout for layout in LAYOUTS if layout.ranks == ranks]
    keys = [
        (layout, kind, stage)
        for layout in layouts
        for kind in quantised_folders
        for stage in ([1] if layout.pp > 1 else [2, 3])
    ]
    any_folder = next(iter(quantised_folders.values()))[0]
    files = settings_of(any_folder, tmp_path)
    cases = [
        {
            **files,
            "model": str(quantised_folders[kind][0]),
            "tensor_parallel": layout.tp,
            "pipeline_parallel": layout.pp,
            "dtype": "bf16",
            **({"products": "fp8", "keep_transposed": True} if kind == "fp8 by row" else {}),
            "ds_config": str(engine_json(tmp_path, stage)),
        }
        for layout, kind, stage in keys
    ]
    by_rank = run_on_ranks(base_values, cases, str(tmp_path), ranks=ranks, folder=tmp_path / "ranks")
    for key, found in zip(keys, zip(*by_rank, strict=True), strict=True):
        layout, kind, stage = key
        plain = load_weights(quantised_folders[kind][1])
        full = joined(any_folder, layout, [values for values, *_ in found])
        assert len(full) == 4 * 4
        for rule in weight_rules(find_model(str(any_folder)).shape):
            if rule.name in full:
                expected = torch.cat([plain[name] for name in rule.hf_names])
                assert torch.equal(full[rule.name], expected.float()), (rule.name, key)
        for _, stored, predicted in found:
            assert stored == predicted or (stage == 3 and predicted <= stored <= predicted + 4 * 80), key


@pytest.mark.cpu_seconds(20, reason="every case beside the oracle, in one start for each number of ranks")
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_runs_are_the_oracles_at_every_layout(
    folders: dict[str, Path], tmp_path: Path, ranks: int, whole: bool
) -> None:
    base = {**settings_of(folders[""], tmp_path), "max_steps": 6 if whole else 3}
    oracles: dict[Any, OracleRun] = {}
    prepared = []
    for number, layout in enumerate(LAYOUTS):
        if layout.ranks != ranks:
            continue
        names = FORMATS if whole or layout in (Layout(1, 1, 1), Layout(2, 2, 1)) else [FORMATS[number % 3]]
        for name, optimizer in product(names, ("sgd", "adamw") if whole else ("sgd",)):
            changes: dict[str, Any] = {"base": name, "method": ("tl6", "tl5")[number % 2]}
            if layout.pp == 1:
                changes["ds_config"] = str(engine_json(tmp_path, number % 4))
            prepared.append(
                prepare(
                    *(base, tmp_path, layout),
                    optimizer=optimizer,
                    oracles=oracles,
                    oracle_model=folders[name],
                    **changes,
                )
            )
    run_and_check(prepared, tmp_path)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_run_is_that_on_the_dequantised_weights(folders: dict[str, Path], tmp_path: Path, dtype: str) -> None:
    """On one process bit for bit: all losses, all norms and the adapter at the end."""
    start = random_adapter(
        "tl6", OracleConfig.from_folder(folders[""]), rank=3, alpha=6.0, layers=None, seed=3, scale=0.2
    )
    shared = {**settings_of(folders[""], tmp_path), "dtype": dtype}
    cases = [
        {"settings": {**shared, **changes}, "start": str(save_start(start, tmp_path / "start.safetensors"))}
        for changes in ({}, *({"base": name} for name in FORMATS), *({"model": str(folders[name])} for name in FORMATS))
    ]
    original, *runs = run_engine(cases, tmp_path, ranks=1)
    for found, expected in zip(runs[: len(FORMATS)], runs[len(FORMATS) :], strict=True):
        assert found.losses == expected.losses != original.losses and len(found.losses) == 6
        assert found.grad_norms == expected.grad_norms
        assert all(torch.equal(value, expected.adapter[name]) for name, value in found.adapter.items())
