"""Evaluations of several adapters: which is behind, and beyond noise, what a record may hold, and one for all at the
start, where adapters whose update is still zero have the numbers of the base."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_tiedlora.base.files import unguarded
from megatron_tiedlora.config.cli import competitors_of
from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.training.adapter_run import BatchLosses, find_halved, read_record
from megatron_tiedlora.training.loop import Trainer, of_start


def evaluations(*, gap: float, count: int = 200, seed: int = 1) -> tuple[BatchLosses, BatchLosses]:
    """Two evaluations of the same batches: hard batches are hard for both, and the first loses `gap` more a token."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(5, 60, count)
    common = tokens * draw.normal(2.0, 0.8, count)
    losses = [common + tokens * draw.normal(own, 0.05, count) for own in (gap, 0.0)]
    first, second = (BatchLosses(8, tuple(map(float, own)), tuple(map(int, tokens))) for own in losses)
    return first, second


def test_the_noise_is_that_of_resampled_batches() -> None:
    first, second = evaluations(gap=0.03)
    behind, noise = first.behind(second)
    draw = np.random.default_rng(2)
    differences, tokens = np.subtract(first.losses, second.losses), np.array(first.tokens)
    picked = draw.integers(len(tokens), size=(4000, len(tokens)))
    ratios = differences[picked].sum(1) / tokens[picked].sum(1)
    assert behind == pytest.approx(first.loss - second.loss)
    assert noise == pytest.approx(2.228 * ratios.std(), rel=0.05)
    assert second.behind(first) == (pytest.approx(-behind), pytest.approx(noise))
    # Batches are paired: against another order of the same losses, what is hard for both would be noise.
    assert noise < 0.2 * first.behind(BatchLosses(8, second.losses[::-1], second.tokens))[1]


@pytest.mark.parametrize("count", [2, 4, 8, 30])
def test_a_tie_is_rarely_behind(count: int) -> None:
    """Of equal adapters the first is behind in at most 2.5 % of all evaluations, however few batches there are."""
    found = [first.behind(second) for first, second in (evaluations(gap=0.0, count=count, seed=s) for s in range(2000))]
    assert sum(behind > noise for behind, noise in found) / len(found) < 0.04
    clear = [first.behind(second) for first, second in (evaluations(gap=1.0, count=count, seed=s) for s in range(100))]
    assert sum(behind > noise for behind, noise in clear) >= (95 if count > 2 else 50)


def test_one_batch_tells_nothing() -> None:
    first, second = BatchLosses(4, (9.0, 0.0), (3, 0)), BatchLosses(4, (1.0, 0.0), (3, 0))
    assert first.behind(second) == (pytest.approx(8 / 3), math.inf)


def test_only_competitors_at_the_same_step_are_compared() -> None:
    worse, better = evaluations(gap=0.5)
    same = {"a": {"learning_rate": 1.0}, "b": {"learning_rate": 2.0}, "c": {"learning_rate": 1.0, "rank": 2}}
    competitors = competitors_of({name: make_settings({"output_dir": name, **own}) for name, own in same.items()})
    assert competitors == {"a": ("b",), "b": ("a",), "c": ()}
    assert list(find_halved({"a": worse, "b": better, "c": worse}, competitors)) == ["a"]
    later = BatchLosses(12, better.losses, better.tokens)
    assert not find_halved({"a": worse, "b": later}, competitors) and not find_halved({"a": worse}, competitors)
    # From a resume at another parallel configuration, whose batches are others.
    pairs = ((*numbers[:-2], sum(numbers[-2:])) for numbers in (better.losses, better.tokens))
    apart = BatchLosses(8, *pairs)
    assert apart.loss == pytest.approx(better.loss) and not find_halved({"a": worse, "b": apart}, competitors)


def test_evaluations_during_the_warm_up_do_not_count() -> None:
    """What is clearly behind stops at an evaluation after the warm-up, and not before."""
    found = dict(zip("ab", evaluations(gap=1.0), strict=True))
    step = found["a"].step

    def stopped(warmup_steps: int) -> list[str]:
        names: list[str] = []
        plan = SimpleNamespace(settings=SimpleNamespace(warmup_steps=warmup_steps))
        runs = {
            name: SimpleNamespace(
                failure=None,
                evaluated=losses,
                plan=plan,
                failing_alone=nullcontext,
                end_behind=lambda _, name=name: names.append(name),
            )
            for name, losses in found.items()
        }
        trainer: Any = SimpleNamespace(competitors={"a": ("b",), "b": ("a",)}, adapters=runs, _running=lambda: runs)
        Trainer._end_halved(trainer, SimpleNamespace(write=lambda _: None))
        return names

    assert len(stopped(step)) == 1 and not stopped(step + 1)


def test_a_record_is_of_one_step(tmp_path: Path) -> None:
    kept = BatchLosses(8, (1.5, 0.1 + 0.2), (3, 4), "why")
    kept.write(tmp_path, guard=unguarded)
    assert read_record(tmp_path, step=8) == kept
    assert read_record(tmp_path, step=4) is None is read_record(tmp_path, step=None)
    content = json.loads((tmp_path / "halving.json").read_text())
    for broken in ({"losses": []}, {"losses": [1.0]}, {"tokens": [0, 0]}, {"tokens": [1, "x"]}, {"losses": "no"}):
        (tmp_path / "halving.json").write_text(json.dumps({**content, **broken}))
        assert read_record(tmp_path, step=8) is None
    (tmp_path / "halving.json").write_text("{")
    assert read_record(tmp_path, step=8) is None


# Adapters that are still the base -----------------------------------------------------------------------------------


def member(name: str, data: object, *, starts_at_base: bool = True, init_from: str | None = None, rows: int = 2) -> Any:
    plan = SimpleNamespace(
        settings=SimpleNamespace(init_from=init_from, eval_batch_size=16),
        adapter=SimpleNamespace(method_spec=SimpleNamespace(starts_at_base=starts_at_base)),
        batches=SimpleNamespace(micro_batch_size=rows),
        max_new_tokens=8,
    )
    return SimpleNamespace(name=name, data=data, plan=plan, failure=None)


def of_the_start(members: list[Any], failing: str = "", *, later: str = "") -> tuple[list[list[str]], dict[str, str]]:
    """The names of each evaluation, and what was found of each member: whose evaluation it was."""
    calls: list[list[str]] = []

    def evaluate(some: Any) -> dict[str, str]:
        calls.append([one.name for one in some])
        for one in some:
            one.failure = "bad answers" if one.name in (failing, later) else one.failure
        return {one.name: f"of {one.name}" for one in some if one.failure is None}

    return calls, of_start(members, evaluate)


def test_one_for_all_that_are_still_the_base() -> None:
    data, other = object(), object()
    members = [
        *(member("a", data), member("b", data), member("c", other)),
        *(member("d", data, starts_at_base=False), member("e", data, init_from="x"), member("f", data, rows=3)),
        member("g", other),
    ]
    calls, found = of_the_start(members)
    assert calls == [["a", "c", "d", "e", "f"], []]
    assert found == {"b": "of a", "g": "of c"} | {name: f"of {name}" for name in "acdef"}


def test_one_that_fails_does_not_speak_for_others() -> None:
    data = object()
    calls, found = of_the_start([member("a", data), member("b", data), member("c", data)], failing="a")
    assert calls == [["a"], ["b", "c"]] and found == {"b": "of b", "c": "of c"}
    _, found = of_the_start([member("a", data), member("b", data), member("c", data)], failing="a", later="b")
    assert found == {"c": "of c"}
