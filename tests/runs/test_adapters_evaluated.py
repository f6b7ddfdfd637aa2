"""Evaluations of the adapters of one run: in shared batches and decoded together, with the numbers of single runs."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import Base, run, write_base, write_rows
from run_preludes import before_call
from test_adapters import rows, same_folders, state, table, written

Own = dict[str, dict[str, Any]]
_SHARES = "shares of an evaluation:"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def own(base: Base) -> Own:
    """Three with validation sets, test sets, prompts and lengths of answers; two do not start at the base."""
    answered = {"eval_metric": "exact_match", "eval_samples": 5, "eval_interval": 1}
    more = write_rows(base.folder / "more.jsonl", 13, seed=7)
    return {
        "a": {"method": "tl6", "max_steps": 3, "max_new_tokens": 9, "test_file": str(base.validation), **answered},
        "b": {"method": "tl1", "init_std_b": 0.3, "validation_file": str(more), "max_steps": 2, "eval_interval": 1},
        "c": {
            "method": "tl1",
            "rank": 5,
            "init_std_b": 0.3,
            "max_steps": 3,
            "validation_file": str(more),
            "test_file": str(more),
            "prompt_template": "Say {prompt}",
            "max_new_tokens": 4,
            "seed": 9,
            **answered,
        },
    }


@pytest.fixture(scope="module")
def alone(base: Base, own: Own, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each in a run of its own, with what it prints in output.txt."""
    folder = tmp_path_factory.mktemp("alone")
    for name, settings in own.items():
        ended = run(base, folder / name, **{"ds_config": "zero0.json", **settings})
        (folder / f"{name}.txt").write_text("".join([*ended.outputs, *ended.errors]))
    return folder


def _tell_shares() -> None:
    def look(_: Any, batches: Any) -> None:
        print(_SHARES, max(len(batch.shares) for batch in batches), flush=True)

    before_call("megatron_tiedlora.engine.runner", "Runner.evaluate", look)


@pytest.mark.parametrize("shares", [True, False])
def test_different_sets_share_batches(base: Base, own: Own, alone: Path, tmp_path: Path, shares: bool) -> None:
    file = written(tmp_path / "adapters.yaml", own)
    ended = run(base, tmp_path / "run", adapters=file, share_micro_batches=shares, prelude=_tell_shares)
    for name in own:
        same_folders(tmp_path / "run" / name, alone / name)
    told = [int(line.split()[-1]) for line in ended.outputs[0].splitlines() if line.startswith(_SHARES)]
    assert max(told) == (3 if shares else 1)
    scores = [json.loads((tmp_path / "run" / name / "scores.json").read_text()) for name in ("a", "c")]
    assert all(set(found) == {"before", "after"} for found in scores)


def _start_lines(text: str) -> list[str]:
    found = (line.partition(" starts with a non-zero update: ")[2] for line in text.splitlines())
    return [line for line in found if line]


def test_how_far_a_start_moves_the_base(base: Base, own: Own, alone: Path, tmp_path: Path) -> None:
    """The losses of the base are those that single runs say, to the digit."""
    ended = run(base, tmp_path / "run", adapters=written(tmp_path / "adapters.yaml", own))
    expected = [line for name in own for line in _start_lines((alone / f"{name}.txt").read_text())]
    assert len(expected) == 2 and len(set(expected)) == 2
    assert _start_lines("".join([*ended.outputs, *ended.errors])) == expected


def _spoil(name: str) -> None:
    """The adapter's values are lost before its evaluation after the second step."""

    def look(_: Any, members: Any) -> None:
        for member in members:
            if member.name == name and member.progress.step == 2:
                for parameter in member.adapter.parameters():
                    parameter.data.fill_(torch.nan)

    before_call("megatron_tiedlora.training.loop", "Evaluation.losses", look)


def test_one_that_fails_in_an_evaluation_fails_alone(base: Base, own: Own, alone: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "adapters.yaml", {"sick": {"max_steps": 3, "eval_interval": 1}, **own})
    run(base, tmp_path / "run", adapters=file, prelude=partial(_spoil, "sick"), expect=1)
    assert "validation loss" in state(tmp_path / "run" / "sick")[2]
    assert table(tmp_path / "run")["sick"]["state"] == "failed"
    for name in own:
        same_folders(tmp_path / "run" / name, alone / name)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [{"pipeline_parallel": 2}, {"tensor_parallel": 2}, {}, {"ds_config": "zero3.json"}])
def test_two_ranks(base: Base, own: Own, alone: Path, tmp_path: Path, layout: dict[str, Any]) -> None:
    file = written(tmp_path / "adapters.yaml", own)
    run(base, tmp_path / "run", adapters=file, ranks=2, **layout)
    for name in own:
        found, expected = (
            [row for row in rows(folder / name) if row["split"] == "validation"] for folder in (tmp_path / "run", alone)
        )
        assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], rel=1e-4)
        assert [row.get("exact_match") for row in found] == [row.get("exact_match") for row in expected]
