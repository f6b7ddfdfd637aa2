"""The same run at every layout: losses, norms and adapters of the dense oracle, and copies that are bit-equal."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from layout_runs import Layout, engine_json, five_layers, prepare, run_and_check
from oracle_adapter import ALL_TARGETS
from oracle_training import OracleRun

from megatron_tiedlora.base.methods import METHOD_NAMES as METHODS
from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.planning.adapter_plans import prepare_data
from megatron_tiedlora.planning.run_plan import plan_run

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

KINDS = (("qkv",), ALL_TARGETS)
FEWER = 3  # steps where not all cases of a test are run
LAYOUTS = [
    Layout(*sizes)
    for sizes in (
        (1, 1, 1),
        (2, 1, 1),
        (1, 2, 1),
        (1, 1, 2),
        (2, 2, 1),
        (2, 1, 2),
        (1, 2, 2),
        (4, 1, 1),
        (1, 4, 1),
        (2, 2, 2),
    )
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return five_layers(tmp_path_factory.mktemp("base"))


@pytest.fixture
def sized(base: dict[str, Any], whole: bool) -> dict[str, Any]:
    """`base` with its number of steps."""
    return base if whole else {**base, "max_steps": FEWER}


def micro_batches(settings: dict[str, Any], layout: Layout, folder: Path) -> list[int]:
    """How many a rank has in each step."""
    sizes = {"tensor_parallel": layout.tp, "pipeline_parallel": layout.pp}
    plan = plan_run(make_settings({**settings, **sizes}), rank=0, world_size=layout.ranks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEGATRON_TIEDLORA_CACHE", str(folder / "cache"))
        data = prepare_data(plan).train
    size = plan.batches.global_batch_size
    steps = [plan.global_batch(data, consumed_samples=step * size) for step in range(settings["max_steps"])]
    return [len(step.micro_batches) // layout.dp for step in steps]


def combined(whole: bool, *choices: Iterable[Any]) -> list[tuple[Any, ...]]:
    """One of each of `choices` in all ways, or in every other, in which every value of theirs occurs."""
    numbered = [list(enumerate(choice)) for choice in choices]
    return [
        tuple(value for _, value in combination)
        for combination in product(*numbered)
        if whole or sum(index for index, _ in combination) % 2 == 0
    ]


def combinations(layout: Layout, whole: bool) -> list[tuple[str, bool, str, tuple[str, ...]]]:
    """(method, sequence parallelism, optimizer, targets): all, or two opposite ones, which are others at the next
    layout."""
    found = list(product(("tl6", "tl5"), (True, False) if layout.tp > 1 else (True,), ("sgd", "adamw")))
    if whole:
        return [(*choice, targets) for choice in found for targets in KINDS]
    alike = [other for other in LAYOUTS if (other.tp > 1) == (layout.tp > 1)]
    number = alike.index(layout)
    first, turn = number % (len(found) // 2), number * 2 // len(found) % 2
    return [(*found[first], KINDS[turn]), (*found[-1 - first], KINDS[1 - turn])]


def test_every_combination_occurs_in_part() -> None:
    for tp, count in ((1, 4), (2, 8)):
        layouts = [layout for layout in LAYOUTS if min(layout.tp, 2) == tp]
        found = [choice for layout in layouts for choice in combinations(layout, False)]
        assert len({choice[:3] for choice in found}) == count
        for layout in layouts:
            assert {targets for *_, targets in combinations(layout, False)} == {("qkv",), ALL_TARGETS}
        for position, choices in enumerate((("tl6", "tl5"), (True, False)[:tp], ("sgd", "adamw"))):
            assert {choice[position] for choice in found if choice[3] == ALL_TARGETS} == set(choices)


@pytest.mark.cpu_seconds(20, reason="every case beside the oracle, in one start for each number of ranks")
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_layouts(sized: dict[str, Any], tmp_path: Path, ranks: int, whole: bool) -> None:
    oracles: dict[Any, OracleRun] = {}
    prepared = []
    for layout in (layout for layout in LAYOUTS if layout.ranks == ranks):
        for method, sequence_parallel, optimizer, targets in combinations(layout, whole):
            # Each layout and optimizer sees both kinds of rows; of all combinations, each method too.
            packing = (method == "tl6") == (optimizer == "sgd" or not whole)
            changes = {"method": method, "sequence_parallel": sequence_parallel, "packing": packing}
            changes["targets"] = list(targets)
            prepared.append(prepare(sized, tmp_path, layout, optimizer=optimizer, oracles=oracles, **changes))
    run_and_check(prepared, tmp_path)


@pytest.mark.cpu_seconds(20, reason="every case beside the oracle, in one start for each number of ranks")
def test_every_method_over_tensor_and_pipeline(sized: dict[str, Any], tmp_path: Path, whole: bool) -> None:
    """All eight methods and layers alone, on the first and on the last stage, at (2, 2, 1), with QKV and all targets.

    In part, two steps of two micro-batches: whether buffers of the pipeline are used again and what a third step does,
    without the checks of the first two, depends on no method, and is seen where all layouts run.
    """
    oracles: dict[Any, OracleRun] = {}
    changes = {} if whole else {"max_steps": 2, "micro_batch_size": 4}
    cases: list[dict[str, Any]] = [
        {"method": method, "targets": list(targets)}
        for turn, method in enumerate(METHODS)
        for targets in (KINDS if whole else KINDS[turn // 2 % 2 :][:1])
    ]
    cases += [{"method": "lora", "layers": [layer]} for layer in (2, 5)]
    alone = [("tl6", 5, ALL_TARGETS), ("lora", 5, ("down_proj",)), ("tl6", 1, ALL_TARGETS)]
    alone += [("tl6", 5, ("down_proj",)), ("lora", 1, ("o_proj",)), ("tl6", 5, ("gate_up",))]
    cases += [
        {"method": method, "layers": [layer], "targets": list(targets)}
        for method, layer, targets in (alone if whole else alone[:3])
    ]
    prepared = [
        prepare(sized, tmp_path, Layout(2, 2, 1), optimizer=optimizer, oracles=oracles, **case, **changes)
        for case, optimizer in combined(whole, cases, ("sgd", "adamw"))
    ]
    run_and_check(prepared, tmp_path)


@pytest.fixture(scope="module")
def large_steps(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Any, OracleRun]]:
    """A folder of starts, and the oracle's runs of them with 24 samples a step, as far as they were asked for."""
    return tmp_path_factory.mktemp("large_steps"), {}


PACKED = [Layout(2, 1, 1), Layout(1, 2, 1), Layout(2, 2, 1), Layout(1, 2, 2)]
PACKED_CASES = ({"method": "tl6"}, {"method": "tl6", "recompute": "full"}, {"method": "lora"})


def packed_cases(layout: Layout, whole: bool) -> list[tuple[dict[str, str], str]]:
    """(settings, optimizer): all, or two with different methods and optimizers, which are others at the next layout."""
    if whole:
        return list(product(PACKED_CASES, ("sgd", "adamw")))
    number = PACKED.index(layout)
    optimizers = ("sgd", "adamw") if number % 2 else ("adamw", "sgd")
    return [(PACKED_CASES[number // 2], optimizers[0]), (PACKED_CASES[2], optimizers[1])]


def test_every_packed_case_occurs_in_part() -> None:
    """At one layout of two ranks and at one of four, or at both of these."""
    found = [(PACKED_CASES.index(case), optimizer) for one in PACKED for case, optimizer in packed_cases(one, False)]
    assert set(found) == set(product(range(len(PACKED_CASES)), ("sgd", "adamw")))


@pytest.mark.parametrize("layout", PACKED, ids=str)
def test_packed_rows(
    base: dict[str, Any],
    tmp_path: Path,
    large_steps: tuple[Path, dict[Any, OracleRun]],
    layout: Layout,
    whole: bool,
) -> None:
    """Several samples a row, whose number differs from step to step, give the run of one sample at a time."""
    folder, oracles = large_steps
    changes = {"packing": True, "micro_batch_size": 1, "global_batch_size": 24}
    changes["max_steps"] = base["max_steps"] if whole else 2
    found = micro_batches({**base, **changes}, layout, tmp_path)
    assert max(found) * layout.dp < 24, found
    # Two pipelines of two stages are given 16 micro-batches, more than rows would do.
    assert found == [8] * changes["max_steps"] if layout.dp == 2 else len(set(found)) > 1, found
    prepared = [
        prepare(base, folder, layout, optimizer=optimizer, oracles=oracles, **case, **changes)
        for case, optimizer in packed_cases(layout, whole)
    ]
    run_and_check(prepared, tmp_path)


def test_zero_stages_beside_tensor_parallelism(sized: dict[str, Any], tmp_path: Path, whole: bool) -> None:
    """ZeRO 0, 2 and 3 at (2, 1, 2); under ZeRO-3 with nothing kept whole; rank 1, which TP does not divide."""
    oracles: dict[Any, OracleRun] = {}
    prepared = []
    for stage, optimizer, targets in combined(whole, (0, 2, 3), ("sgd", "adamw"), KINDS if whole else KINDS[1:]):
        file = engine_json(tmp_path, stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {}))
        changes = {"ds_config": str(file), "rank": 1, "alpha": 2.0}  # the same alpha / rank as elsewhere
        changes["targets"] = list(targets)
        prepared.append(prepare(sized, tmp_path, Layout(2, 1, 2), optimizer=optimizer, oracles=oracles, **changes))
    run_and_check(prepared, tmp_path)


@pytest.mark.parametrize("layout", [Layout(2, 2, 1), Layout(1, 2, 2)], ids=str)
def test_the_norm_at_zero_0_over_stages(sized: dict[str, Any], tmp_path: Path, layout: Layout, whole: bool) -> None:
    """DeepSpeed leaves later stages' tensors out of it there, so it is ours: every tensor once, every shard once."""
    oracles: dict[Any, OracleRun] = {}
    changes = {"ds_config": str(engine_json(tmp_path, 0)), "targets": list(ALL_TARGETS)}
    prepared = [
        prepare(sized, tmp_path, layout, oracles=oracles, optimizer=optimizer, method=method, **changes)
        for method, optimizer in combined(whole, ("tl6", "lora"), ("sgd", "adamw"))
    ]
    run_and_check(prepared, tmp_path)
