"""launch/train.py --adapters --halving: every rank stops what is behind, and later starts leave it so."""

from __future__ import annotations

import json
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from run_helpers import Base, run, write_base
from run_preludes import kill_at_call
from test_adapters import builds_only, rows, state, table, times, written

_SLOW = {"learning_rate": 1e-7}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.mark.distributed
@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("layout", [{"pipeline_parallel": 2}, {"tensor_parallel": 2}, {}])
def test_two_ranks(base: Base, tmp_path: Path, layout: dict[str, Any], shares: bool) -> None:
    """The noise is that of one rank's batches or of pairs of them; of three adapters two are compared."""
    own = {"a": {}, "beside": {"rank": 3, "max_steps": 4}, "b": _SLOW}
    file = written(tmp_path / "adapters.yaml", own)
    layout = {"micro_batch_size": 1, "validation_file": base.train, "max_steps": 6, **layout}  # 24 batches
    run(base, tmp_path / "run", adapters=file, ranks=2, halving=True, share_micro_batches=shares, **layout)
    assert state(tmp_path / "run" / "a") == ("finished", 6, "max_steps")
    assert state(tmp_path / "run" / "b")[0] == "finished" and state(tmp_path / "run" / "b")[1] < 6
    record = json.loads((tmp_path / "run" / "b" / "halving.json").read_text())
    assert len(record["losses"]) == (24 if layout.keys() & {"pipeline_parallel", "tensor_parallel"} else 12)
    assert sum(record["losses"]) / sum(record["tokens"]) == pytest.approx(
        next(row["loss"] for row in rows(tmp_path / "run" / "b")[::-1] if row["split"] == "validation"), rel=1e-6
    )
    assert table(tmp_path / "run")["b"]["reason"] == record["stopped"] == state(tmp_path / "run" / "b")[2]


def test_what_was_stopped_stays_so(base: Base, tmp_path: Path) -> None:
    """Also if its rival has finished, and it has not: a kill between their exports. Without --halving it continues."""
    folder, file = tmp_path / "run", written(tmp_path / "adapters.yaml", {"a": {}, "b": _SLOW})
    settings = {"adapters": file, "micro_batch_size": 1, "validation_file": base.train, "max_steps": 6}
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
