"""Evaluations of the adapters of one run: in shared batches and decoded together, with the numbers of single runs.

With --halving every rank stops what is behind by them, and later starts leave it so.
"""

from __future__ import annotations

import json
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.run_files import assert_close_run, metrics
from support.run_helpers import Base, run, write_rows
from support.run_preludes import before_call, kill_at_call
from test_adapters import builds_only, same_folders, state, table, times

Own = dict[str, dict[str, Any]]
_SHARES = "shares of an evaluation:"


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
        print(_SHARES, max(len(batch.segments) for batch in batches), flush=True)

    before_call("megatron_tiedlora.engine.runner", "Runner.evaluate", look)


@pytest.mark.parametrize("shares", [True, False])
def test_different_sets_share_batches(base: Base, own: Own, alone: Path, folder: Path, shares: bool) -> None:
    """How far their starts move the base they say as single runs do: its losses, to the digit."""
    ended = run(base, folder, adapters=own, share_micro_batches=shares, prelude=_tell_shares)
    same_folders(folder, alone, own)
    told = [int(line.split()[-1]) for line in ended.outputs[0].splitlines() if line.startswith(_SHARES)]
    assert max(told) == (3 if shares else 1)
    scores = [json.loads((folder / name / "scores.json").read_text()) for name in ("a", "c")]
    assert all(set(found) == {"before", "after"} for found in scores)
    expected = [line for name in own for line in _start_lines((alone / f"{name}.txt").read_text())]
    assert len(expected) == 2 and len(set(expected)) == 2
    assert _start_lines("".join([*ended.outputs, *ended.errors])) == expected


def _start_lines(text: str) -> list[str]:
    found = (line.partition(" starts with a non-zero update: ")[2] for line in text.splitlines())
    return [line for line in found if line]


def _spoil(name: str) -> None:
    """The adapter's values are lost before its evaluation after the second step."""

    def look(_: Any, members: Any) -> None:
        for member in members:
            if member.name == name and member.progress.step == 2:
                for parameter in member.adapter.parameters():
                    parameter.data.fill_(torch.nan)

    before_call("megatron_tiedlora.training.loop", "Evaluation.losses", look)


def test_one_that_fails_in_an_evaluation_fails_alone(base: Base, own: Own, alone: Path, folder: Path) -> None:
    adapters = {"sick": {"max_steps": 3, "eval_interval": 1}, **own}
    run(base, folder, adapters=adapters, prelude=partial(_spoil, "sick"), expect=1)
    assert "validation loss" in state(folder / "sick")[2]
    assert table(folder)["sick"]["state"] == "failed"
    same_folders(folder, alone, own)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "layout",
    [
        {"pipeline_parallel": 2},
        {"ds_config": "zero3.json"},
        *(pytest.param(layout, marks=pytest.mark.slow) for layout in ({"tensor_parallel": 2}, {})),
    ],
)
def test_two_ranks(base: Base, own: Own, alone: Path, folder: Path, layout: dict[str, Any]) -> None:
    run(base, folder, adapters=own, ranks=2, **layout)
    for name in own:
        assert_close_run(folder / name, alone / name, rel=1e-4)
        found, expected = (
            [row.get("exact_match") for row in metrics(some / name, "validation")] for some in (folder, alone)
        )
        assert found == expected
        if name != "b":  # which has no test set
            scores = [json.loads((some / name / "scores.json").read_text()) for some in (folder, alone)]
            assert scores[0] == scores[1]


# Halving -------------------------------------------------------------------------------------------------------------

_SLOW = {"learning_rate": 1e-7}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("layout", "shares"),
    [
        ({"pipeline_parallel": 2}, True),
        ({}, False),
        *(pytest.param(layout, True, marks=pytest.mark.slow) for layout in ({"tensor_parallel": 2}, {})),
    ],
)
def test_two_ranks_stop_what_is_behind(base: Base, folder: Path, layout: dict[str, Any], shares: bool) -> None:
    """The noise is that of one rank's batches or of pairs of them; of three adapters two are compared."""
    own = {"a": {}, "beside": {"rank": 3, "max_steps": 4}, "b": _SLOW}
    layout = {"micro_batch_size": 1, "validation_file": base.train, "max_steps": 6, **layout}  # 24 batches
    run(base, folder, adapters=own, ranks=2, halving=True, share_micro_batches=shares, **layout)
    assert state(folder / "a") == ("finished", 6, "max_steps")
    assert state(folder / "b")[0] == "finished" and state(folder / "b")[1] < 6
    record = json.loads((folder / "b" / "halving.json").read_text())
    assert len(record["losses"]) == (24 if layout.keys() & {"pipeline_parallel", "tensor_parallel"} else 12)
    mean = sum(record["losses"]) / sum(record["tokens"])
    assert mean == pytest.approx(metrics(folder / "b", "validation")[-1]["loss"], rel=1e-6)
    assert table(folder)["b"]["reason"] == record["stopped"] == state(folder / "b")[2]


def test_what_was_stopped_stays_so(base: Base, folder: Path) -> None:
    """Also if its rival has finished, and it has not: a kill between their exports. Without --halving it continues."""
    settings = {"adapters": {"a": {}, "b": _SLOW}, "micro_batch_size": 1, "validation_file": base.train, "max_steps": 6}
    kill = partial(kill_at_call, "megatron_tiedlora.training.finish", "export", call=2)
    run(base, folder, halving=True, prelude=kill, expect=-signal.SIGKILL, **settings)
    assert state(folder / "a") == ("finished", 6, "max_steps") and not (folder / "b" / "run_status.json").exists()
    stopped = json.loads((folder / "b" / "halving.json").read_text())["stopped"]
    assert stopped.startswith("halving: ")
    assert "\nhalving: true\n" in (folder / "adapters.yaml").read_text()
    run(base, folder, halving=True, resume="auto", prelude=partial(builds_only, "b"), **settings)
    ended = state(folder / "b")
    assert ended[0] == "finished" and ended[1] < 6 and ended[2] == stopped

    before = {name: times(folder / name) for name in ("a", "b")}
    run(base, folder, halving=True, resume="auto", prelude=builds_only, **settings)
    assert {name: times(folder / name) for name in ("a", "b")} == before
    assert table(folder)["b"]["reason"] == stopped
    run(base, folder, resume="auto", prelude=partial(builds_only, "b"), **settings)
    assert state(folder / "b") == ("finished", 6, "max_steps")
