"""Two kills and what they leave; tests/slow/test_slow_kills.py has the series of 72."""

from __future__ import annotations

from pathlib import Path

import pytest
from kill_series import Layout, kill_series
from run_helpers import write_base


@pytest.mark.distributed
def test_a_run_that_is_killed_twice_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    """Once within a save and once after the last step, two tensor-parallel ranks."""
    layout = Layout(2, {"tensor_parallel": 2, "ds_config": "zero1.json"})
    figures = kill_series(write_base(tmp_path / "base"), tmp_path, layout, kinds=["save", "end"], seed=7)
    assert figures.kills.total() == 2
