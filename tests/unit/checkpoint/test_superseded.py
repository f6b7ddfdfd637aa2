"""Which checkpoints are removed after a save, and by a run that resumes after a kill between a save and that."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_tiedlora.checkpoint.resume import Progress, remove_superseded


@pytest.mark.parametrize(
    ("keep", "later", "left"),
    [(1, False, {2, 8, 9, 10}), (2, False, {2, 7, 8, 9, 10}), (1, True, {2, 8}), (3, True, {2, 6, 7, 8})],
)
def test_earlier_checkpoints_are_removed(tmp_path: Path, keep: int, later: bool, left: set[int]) -> None:
    for step in range(1, 11):
        (tmp_path / f"step_{step}").mkdir()
    remove_superseded(tmp_path, Progress(step=8, best_step=2), keep=keep, later=later)
    assert {int(path.name.removeprefix("step_")) for path in tmp_path.iterdir()} == left
