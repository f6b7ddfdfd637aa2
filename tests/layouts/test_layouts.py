"""The same run at every layout and ZeRO stage: losses, norms and adapters of the dense oracle, and copies that are
bit-equal.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
from support.cases import part_of
from support.engine_runs import (
    LAYOUTS,
    OPTIMIZERS,
    SHORT,
    Layout,
    engine_json,
    five_layers,
    prepare,
    run_and_check,
    settings_of,
    with_optimizers,
)
from support.oracle_adapter import ALL_TARGETS
from support.tiny_models import write_tiny_model

from megatron_tiedlora.base.methods import METHOD_NAMES as METHODS
from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.planning.adapter_plans import prepare_data
from megatron_tiedlora.planning.run_plan import plan_run

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

KINDS = (("qkv",), ALL_TARGETS)
FEWER = 3  # steps where not all cases of a test are run
# As in LoRA+, with factors that some methods do not train.
RATES: dict[str, Any] = {"rate_factors": "B=4,u=0.5,v=2", "targets": list(ALL_TARGETS)}
Sized = tuple[dict[str, Any], Path]
"""Settings, and the folder of starts on their model, as `prepare` takes them."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return five_layers(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of starts on `base`, whose oracle's runs tests share."""
    return tmp_path_factory.mktemp("starts")


@pytest.fixture
def sized(base: dict[str, Any], starts: Path, whole: bool) -> Sized:
    """`base` with its number of steps."""
    return (base if whole else {**base, "max_steps": FEWER}), starts


def micro_batches(settings: dict[str, Any], layout: Layout, folder: Path) -> list[int]:
    """How many a rank has in each step."""
    plan = plan_run(make_settings({**settings, **layout.settings}), rank=0, world_size=layout.ranks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEGATRON_TIEDLORA_CACHE", str(folder / "cache"))
        data = prepare_data(plan).train
    size = plan.batches.global_batch_size
    steps = [plan.global_batch(data, consumed_samples=step * size) for step in range(settings["max_steps"])]
    return [len(step.micro_batches) // layout.dp for step in steps]


Choice = tuple[Layout, str, bool, str, tuple[str, ...]]
"""Layout, method, sequence parallelism, optimizer, targets."""


def choices(whole: bool) -> list[Choice]:
    """All; in part each layout has both methods, whole and cut sequences, both optimizers and both kinds of targets.

    All combinations of the rest occur with tensor parallelism and without, each choice with all targets too.
    """
    found = [
        choice
        for choice in product(LAYOUTS, ("tl6", "tl5"), (True, False), OPTIMIZERS, KINDS)
        if choice[0].tp > 1 or choice[2]
    ]
    if whole:
        return found
    return part_of(
        found,
        *(lambda choice, n=n: (choice[0], choice[n]) for n in (1, 2, 3, 4)),
        lambda choice: (choice[0].tp > 1, choice[1:4]),
        *(lambda choice, n=n: (choice[0].tp > 1, choice[n], choice[4]) for n in (1, 2, 3)),
    )


def test_a_part_of_the_choices_keeps_what_each_layout_meets() -> None:
    for n in range(1, 5):
        kept, found = ({(choice[0], choice[n]) for choice in choices(whole)} for whole in (False, True))
        assert kept == found, n


@pytest.mark.cpu_seconds(20, reason="every case beside the oracle, in one start for each number of ranks")
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_layouts(sized: Sized, tmp_path: Path, ranks: int, whole: bool) -> None:
    prepared = []
    for layout, method, sequence_parallel, optimizer, targets in choices(whole):
        if layout.ranks == ranks:
            # Each layout and optimizer sees both kinds of rows; of all combinations, each method too.
            packing = (method == "tl6") == (optimizer == "sgd" or not whole)
            changes = {"method": method, "sequence_parallel": sequence_parallel, "packing": packing}
            changes["targets"] = list(targets)
            prepared.append(prepare(*sized, layout, optimizer=optimizer, **changes))
    run_and_check(prepared, tmp_path)


@pytest.mark.cpu_seconds(20, reason="every case beside the oracle, in one start for each number of ranks")
def test_every_method_over_tensor_and_pipeline(sized: Sized, tmp_path: Path, whole: bool) -> None:
    """All eight methods, layers alone on the first and on the last stage, and rates of single factors, at (2, 2, 1).

    In part, two steps of two micro-batches: nothing of what these leave out depends on the method.
    """
    changes = {} if whole else SHORT
    cases: list[dict[str, Any]] = [
        {"method": method, "targets": list(targets)}
        for turn, method in enumerate(METHODS)
        for targets in (KINDS if whole else KINDS[turn // 2 % 2 :][:1])
    ]
    cases += [{"method": "lora", "layers": [layer]} for layer in (2, 5)]
    cases += [{"method": method, **RATES} for method in ("tl6", "lora")]
    alone = [("tl6", 5, ALL_TARGETS), ("lora", 5, ("down_proj",)), ("tl6", 1, ALL_TARGETS)]
    alone += [("tl6", 5, ("down_proj",)), ("lora", 1, ("o_proj",)), ("tl6", 5, ("gate_up",))]
    cases += [
        {"method": method, "layers": [layer], "targets": list(targets)}
        for method, layer, targets in (alone if whole else alone[:3])
    ]
    prepared = [
        prepare(*sized, Layout(2, 2, 1), optimizer=optimizer, **case, **changes)
        for case, optimizer in with_optimizers(cases, whole=whole)
    ]
    run_and_check(prepared, tmp_path)


@pytest.fixture(scope="module")
def large_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of starts of runs with 24 samples a step."""
    return tmp_path_factory.mktemp("large_steps")


PACKED = [Layout(2, 1, 1), Layout(1, 2, 1), Layout(2, 2, 1), Layout(1, 2, 2)]
PACKED_CASES = ({"method": "tl6"}, {"method": "tl6", "recompute": "full"}, {"method": "lora"})


def packed_cases(layout: Layout, whole: bool) -> list[tuple[dict[str, str], str]]:
    """(settings, optimizer) at a layout: all; in part both methods and both optimizers, and each pair somewhere."""
    found = list(product(PACKED, range(len(PACKED_CASES)), OPTIMIZERS))
    if not whole:
        by_layout = (lambda each: (each[0], each[2]), lambda each: (each[0], each[1] > 1))
        found = part_of(found, lambda each: each[1:], *by_layout)
    return [(PACKED_CASES[number], optimizer) for place, number, optimizer in found if place == layout]


@pytest.mark.parametrize("layout", PACKED, ids=str)
def test_packed_rows(base: dict[str, Any], tmp_path: Path, large_steps: Path, layout: Layout, whole: bool) -> None:
    """Several samples a row, whose number differs from step to step, give the run of one sample at a time."""
    changes = {"packing": True, "micro_batch_size": 1, "global_batch_size": 24}
    changes["max_steps"] = base["max_steps"] if whole else 2
    found = micro_batches({**base, **changes}, layout, tmp_path)
    assert max(found) * layout.dp < 24, found
    # Two pipelines of two stages are given 16 micro-batches, more than rows would do.
    assert found == [8] * changes["max_steps"] if layout.dp == 2 else len(set(found)) > 1, found
    prepared = [
        prepare(base, large_steps, layout, optimizer=optimizer, **case, **changes)
        for case, optimizer in packed_cases(layout, whole)
    ]
    run_and_check(prepared, tmp_path)


# One and two ranks ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Sized:
    """Settings for AdamW steps of a model of three layers."""
    folder = tmp_path_factory.mktemp("three")
    model = write_tiny_model(folder / "model", num_layers=3)
    changes = {"learning_rate": 5e-3, "ds_config": "zero2.json", "max_steps": FEWER}
    return {**settings_of(model, folder), **changes}, folder


def test_every_method_on_one_process(three: Sized, tmp_path: Path, whole: bool) -> None:
    """All methods and single-layer LoRA, AdamW steps in fp32 under ZeRO-2: 20, or in part 20 of tl6.

    What adds up over many steps does so in the optimizer, which knows no method. Two exact runs drift by 2e-7 in the
    loss over 20 such steps.
    """
    cases: list[dict[str, Any]] = [
        {"method": method, "max_steps": 20 if whole or method == "tl6" else FEWER} for method in METHODS
    ]
    cases.append({"method": "lora", "layers": [2]})
    prepared = [
        prepare(*three, Layout(1, 1, 1), optimizer="adamw", **{**case, "micro_batch_size": 2}) for case in cases
    ]
    run_and_check(prepared, tmp_path, loss=1e-6)


def test_two_ranks_at_every_zero_stage(three: Sized, tmp_path: Path, whole: bool) -> None:
    """DP = 2 under ZeRO 0 to 3 and offload, 1 or 4 samples a micro-batch, packed, and with rates of single factors.

    Tensors as small as these are partitioned under ZeRO-3 only if its threshold for keeping them is 0.
    """
    partitioned = str(engine_json(tmp_path, 3, stage3_param_persistence_threshold=0))
    files = ("zero0.json", "zero1.json", "zero2.json", "zero3.json", partitioned, "zero2_offload.json")
    cases = [
        {"ds_config": file, "micro_batch_size": micro, "packing": False}
        for file, micro in zip(files, (1, 4, 1, 4, 1, 2), strict=True)
    ]
    cases += [{"ds_config": file, "micro_batch_size": 1, "packing": True} for file in files if file != partitioned]
    if not whole:
        views = ("ds_config", "micro_batch_size", "packing")
        cases = part_of(cases, *(lambda case, view=view: (view, case[view]) for view in views))
    methods = dict(zip(files, ("tl6", "lora", "tl6", "vera"), strict=False))
    cases += [{"ds_config": file, "method": method, **RATES} for file, method in methods.items()]
    prepared = [prepare(*three, Layout(1, 1, 2), optimizer="adamw", **case) for case in cases]
    run_and_check(prepared, tmp_path)


def test_splits_of_the_global_batch(three: Sized, tmp_path: Path) -> None:
    """One rank: the whole batch at once, sample by sample, and with recompute give the same run."""
    cases = [
        {"micro_batch_size": 8, "ds_config": "zero0.json"},
        {"micro_batch_size": 1, "ds_config": "zero1.json"},
        {"micro_batch_size": 4, "ds_config": "zero3.json", "recompute": "full"},
        {"micro_batch_size": 2, "ds_config": "zero3.json", "recompute": "selective"},
    ]
    prepared = [prepare(*three, Layout(1, 1, 1), optimizer="adamw", packing=False, **case) for case in cases]
    run_and_check(prepared, tmp_path)


# ZeRO beside tensor and pipeline parallelism --------------------------------------------------------------------------


def test_zero_stages_beside_tensor_parallelism(sized: Sized, tmp_path: Path, whole: bool) -> None:
    """ZeRO 0, 2 and 3 at (2, 1, 2); under ZeRO-3 with nothing kept whole; rank 1, which TP does not divide."""
    prepared = []
    cases = [*product((0, 2, 3), KINDS if whole else KINDS[1:])]
    for (stage, targets), optimizer in with_optimizers(cases, whole=whole):
        file = engine_json(tmp_path, stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {}))
        changes = {"ds_config": str(file), "rank": 1, "alpha": 2.0}  # the same alpha / rank as elsewhere
        changes["targets"] = list(targets)
        prepared.append(prepare(*sized, Layout(2, 1, 2), optimizer=optimizer, **changes))
    run_and_check(prepared, tmp_path)


@pytest.mark.parametrize("layout", [Layout(2, 2, 1), Layout(1, 2, 2)], ids=str)
def test_the_norm_at_zero_0_over_stages(sized: Sized, tmp_path: Path, layout: Layout, whole: bool) -> None:
    """DeepSpeed leaves later stages' tensors out of it there, so it is ours: every tensor once, every shard once."""
    changes = {"ds_config": str(engine_json(tmp_path, 0)), "targets": list(ALL_TARGETS)}
    prepared = [
        prepare(*sized, layout, optimizer=optimizer, method=method, **changes)
        for method, optimizer in with_optimizers(("tl6", "lora"), whole=whole)
    ]
    run_and_check(prepared, tmp_path)
