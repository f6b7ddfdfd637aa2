"""A study as jobs of a real Slurm: tasks that are requeued or cancelled, and what is left is submitted again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from support.fake_hosts import FakeCluster, wait_until
from support.host_needs import needs
from support.ranks import ENVIRONMENT
from support.run_files import has_step, losses, status
from support.slurm_cluster import SlurmCluster
from support.sweep_runs import run_study, study_arguments, write_study_base

SETTINGS: dict[str, Any] = {
    "methods": "tl6", "ranks": "2", "together": 1, "max_steps": 150, "eval_interval": 50, "save_interval": 50,
}  # fmt: skip
RUNS = [f"tl6-r2-lr{rate}" for rate in ("2e-1", "5e-2")]


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs("slurm")
def test_a_study_in_the_queue(two_hosts: FakeCluster, tmp_path: Path) -> None:
    """One task is requeued as before its time limit, the other cancelled. The second command submits only that one."""
    study, folder = write_study_base(tmp_path), tmp_path / "study of 100%"
    first, environment = two_hosts.first, {**ENVIRONMENT, "MEGATRON_TIEDLORA_CACHE": str(study[0].cache)}
    with SlurmCluster(two_hosts, kill_wait=30) as slurm:

        def submit(*, check: bool = True) -> str:
            words = [*study_arguments(*study, folder, **SETTINGS), "--slurm=--nodes=1 --time=10"]
            command = [sys.executable, "-m", "megatron_tiedlora", "sweep", *words]
            return first.run(command, env=environment, cwd=tmp_path, limit=120, check=check)

        def logs() -> str:
            return "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in (folder / "logs").glob("*"))

        def wait_for_all() -> list[str]:
            jobs = json.loads((folder / "slurm.json").read_text())["jobs"]
            wait_until(lambda: not first.run(["squeue", "-h"]).strip(), logs, limit=300, pause=0.5)
            return [slurm.field(job, "JobState") for job in jobs]

        submit()
        _, array, _ = json.loads((folder / "slurm.json").read_text())["jobs"]
        said = submit(check=False)
        assert "error: " in said and "jobs of this study are queued or run (" in said and f" {array}_" in said
        for name, options in zip(RUNS, (["--signal=USR1", f"{array}_0"], [f"{array}_1"]), strict=True):
            wait_until(lambda: has_step(folder / "runs" / name, 5), logs, limit=200)  # noqa: B023  # called at once
            first.run(["scancel", *options])
        wait_until(lambda: slurm.field(f"{array}_0", "Restarts") == "1", logs, limit=100)
        states = wait_for_all()
        assert (states[0], states[2]) == ("COMPLETED", "FAILED"), logs()
        assert [status(folder / "runs" / name)["state"] for name in RUNS] == ["finished", "stopped"], logs()
        failed = json.loads((folder / "sweep_status.json").read_text())
        assert failed["state"] == "failed" and [run["name"] for run in failed["failed"]] == RUNS[1:]
        assert "not all learning rates are finished" in (folder / "table2.md").read_text()

        submit()
        new = json.loads((folder / "slurm.json").read_text())
        assert new["groups"] == {RUNS[1]: [RUNS[1]]} and len(new["jobs"]) == 2
        assert wait_for_all() == ["COMPLETED", "COMPLETED"], logs()
    whole = tmp_path / "whole"
    run_study(study, whole, **SETTINGS)
    for name in RUNS:
        assert losses(folder / "runs" / name) == losses(whole / "runs" / name)
        assert status(folder / "runs" / name) == status(whole / "runs" / name)
    for name in ("table2.csv", "table2.md"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert json.loads((folder / "sweep_status.json").read_text()) == {"state": "finished", "failed": []}
