"""Messages and bytes at 1 to 8 ranks: what is predicted is counted, and more data-parallel ranks do not add to it.

    make test PYTEST_ARGS="-m slow -s" TESTS=tests/layouts/test_weak_scaling.py

counts every layout up to 8 ranks and prints the table of docs/performance_log.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from traffic_runs import Ran, run_cases, write_inputs
from traffic_worker import Case, Counted

from megatron_tiedlora.parallel.groups import GROUPS, MODEL, PIPELINE, STAGE, TENSOR, TIED, WORLD, Traffic

pytestmark = pytest.mark.distributed

Layout = tuple[int, int, int]  # tensor, pipeline, data
# The models have 8 heads on 4 key-value heads, and 5 layers.
LAYOUTS: list[Layout] = [
    (tp, pp, ranks // (tp * pp))
    for ranks in (1, 2, 4, 8)
    for tp in (1, 2, 4)
    for pp in (1, 2, 4)
    if ranks % (tp * pp) == 0
]
NOTHING = Counted(Traffic(), [], 0, 0.0)
EIGHT: dict[Layout, dict[str, Any]] = {
    (2, 2, 2): {"recompute": "full"},
    (2, 1, 4): {"ds_config": "zero2.json"},
    (1, 2, 4): {"method": "tl5", "packing": True, "micro_batch_size": 1},
    (4, 2, 1): {"sequence_parallel": False},
    (1, 4, 2): {"ds_config": "zero0.json"},
    (1, 1, 8): {"ds_config": "zero3.json", "method": "vera"},
}


def settings_of(layout: Layout, **changes: Any) -> dict[str, Any]:
    """The layout, with 8 samples a step for each data-parallel rank: 4 micro-batches of 2 rows."""
    tp, pp, dp = layout
    return {"tensor_parallel": tp, "pipeline_parallel": pp, "global_batch_size": 8 * dp, **changes}


def check_all_ranks(found: Ran) -> None:
    for rank, counted in enumerate(found.counted):
        plan = found.plan(rank)
        assert len(counted.shapes) > 1
        assert bool(counted.traffic.messages) == (plan.grid.world_size > 1)
        found.check(rank)


def test_prediction_is_what_8_ranks_send(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
    """Some layouts, in one start, on samples of different lengths."""
    monkeypatch.setenv("MEGATRON_TIEDLORA_CACHE", str(tmp_path / "cache"))
    chosen = list(EIGHT.items())[:: 1 if whole else 2]
    cases = {str(layout): settings_of(layout, **changes) for layout, changes in chosen}
    for found in run_cases(cases, write_inputs(tmp_path), tmp_path, ranks=8).values():
        check_all_ranks(found)


def weak_scaling(found: Mapping[Layout, Ran]) -> Iterator[tuple[Layout, int, tuple[Traffic, int]]]:
    """(layout, stage, what its first rank is predicted to send), and that all ranks of a stage send the same."""
    for (tp, pp, dp), run in found.items():
        for stage in range(pp):
            ranks = range(stage * dp * tp, (stage + 1) * dp * tp)
            predicted = [run.predicted(rank) for rank in ranks]
            assert all(other == predicted[0] for other in predicted)
            yield (tp, pp, dp), stage, predicted[0]


def check_growth(found: Mapping[Layout, Ran]) -> None:
    """With the work of a data-parallel rank fixed, what a rank sends does not depend on how many of them there are.

    Two things do: the first of them adds a group, and ZeRO-1's gather ends in padding for each rank.
    """
    rows = {(layout, stage): predicted for layout, stage, predicted in weak_scaling(found)}
    for ((tp, pp, dp), stage), (traffic, most) in rows.items():
        alone, none = rows[(tp, pp, 1), stage]
        for group in (PIPELINE, TIED, MODEL):
            assert traffic.of_group(group) == alone.of_group(group), (tp, pp, dp)
        # The sum of u, over the ranks of a stage: without data parallelism the tensor group, with one stage the world.
        u_sums = int(tp > 1)
        apart = {STAGE: u_sums * (dp > 1 and pp > 1), WORLD: u_sums * (dp > 1 and pp == 1)}
        assert traffic.of_group(TENSOR)[0] == alone.of_group(TENSOR)[0] - sum(apart.values()), (tp, pp, dp)
        if tp > 1:
            both = [sum(found.of_group(group)[1] for group in (TENSOR, STAGE, WORLD)) for found in (traffic, alone)]
            assert both[0] == both[1], (tp, pp, dp)
        assert none == 0
        if dp > 1:
            two = rows[(tp, pp, 2), stage][1]
            assert two <= most < two + 4 * 2 * dp
        assert traffic.of_group(WORLD)[0] == (tp * pp * dp > 1) + apart[WORLD]
        assert traffic.of_group(STAGE)[0] == apart[STAGE]
        assert traffic.of_group(TIED)[0] == (pp > 1)


def weak_settings(folder: Path) -> dict[Layout, dict[str, Any]]:
    """Every layout, on samples of the same lengths, so that ranks have the same work."""
    base = {**write_inputs(folder), "train_file": "even.jsonl"}
    return {layout: {**base, **settings_of(layout)} for layout in LAYOUTS}


def test_predicted_weak_scaling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arithmetic alone, for every layout."""
    monkeypatch.setenv("MEGATRON_TIEDLORA_CACHE", str(tmp_path / "cache"))
    found = {}
    for layout, settings in weak_settings(tmp_path).items():
        files = {name: str(tmp_path / settings[name]) for name in ("model", "train_file")}
        found[layout] = Ran(Case({**settings, **files}), [NOTHING] * math.prod(layout))
    check_growth(found)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_weak_scaling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layout, counted."""
    monkeypatch.setenv("MEGATRON_TIEDLORA_CACHE", str(tmp_path / "cache"))
    settings, found = weak_settings(tmp_path), {}
    for ranks in (1, 2, 4, 8):
        cases = {str(layout): settings[layout] for layout in LAYOUTS if math.prod(layout) == ranks}
        ran = run_cases(cases, {}, tmp_path, ranks=ranks)
        found.update({layout: ran[str(layout)] for layout in LAYOUTS if str(layout) in ran})
    for run in found.values():
        check_all_ranks(run)
        assert {shape[:2] for counted in run.counted for shape in counted.shapes} == {(2, 64)}
    check_growth(found)
    print_table(found)


def print_table(found: Mapping[Layout, Ran]) -> None:
    print("\n| ranks | tensor, pipeline, data | stage |", " | ".join(GROUPS), "|")
    for layout, stage, _ in weak_scaling(found):
        counted = found[layout].counted[stage * layout[0] * layout[2]]
        cells = [counted.traffic.of_group(group) for group in GROUPS]
        texts = [f"{count} / {size:,}" if count else "" for count, size in cells]
        print(f"| {math.prod(layout)} | {', '.join(map(str, layout))} | {stage} |", " | ".join(texts), "|")
