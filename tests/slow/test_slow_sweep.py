"""A sweep through the real launchers, two ranks a run: stopped, killed without its runs, and ended like a whole one."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import psutil
import pytest
from support.ranks import TIME_LIMIT, wait_for
from support.run_files import has_step, status
from support.run_helpers import Base, Command, start_command
from support.sweep_runs import LAUNCH, study_arguments, write_study_base

LIMIT = 600.0
RUNS = ("tl6-r2-lr2e-1", "tl6-r2-lr5e-2")


def start(base: Base, arguments: list[str], work: Path) -> Command:
    command = [sys.executable, str(LAUNCH / "sweep.py"), *arguments]
    return start_command(command, folder=work, cache=base.cache, limit=TIME_LIMIT + LIMIT)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1800)
def test_stopped_killed_and_ended_under_the_launcher(tmp_path: Path) -> None:
    base, test = write_study_base(tmp_path)
    # Longer than elsewhere, so that signals come while a run trains.
    changes = {"methods": "tl6", "ranks": "2", "max_steps": 60, "launcher_args": "--num_gpus 2", "together": 1}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    start(base, study_arguments(base, test, whole, **changes), tmp_path / "w").wait().expect(0)

    stopped = start(base, study_arguments(base, test, cut, **changes), tmp_path / "a")
    wait_for(lambda: has_step(cut / "runs" / RUNS[0], 2), "the first run", limit=LIMIT)
    os.kill(stopped.process.pid, signal.SIGTERM)
    stopped.wait().expect(143)
    assert status(cut / "runs" / RUNS[0])["state"] == "stopped"

    again = [f"--output_dir={cut}"]
    killed = start(base, again, tmp_path / "b")
    wait_for(lambda: has_step(cut / "runs" / RUNS[1], 2), "the second run", limit=LIMIT)
    left = [process for process in killed.descendants() if "launch" in " ".join(process.cmdline())]
    killed.kill()  # its own group alone: the run is in a session of its own, and lives on
    assert any(psutil.pid_exists(process.pid) for process in left)
    refused = start(base, again, tmp_path / "c").wait().expect(2)
    assert "is using this folder" in refused.error_line()
    for process in left:
        if process.is_running():
            process.kill()
    psutil.wait_procs(left, timeout=60)

    start(base, again, tmp_path / "d").wait().expect(0)
    log = (cut / "logs" / f"group {RUNS[0]}.log").read_text().splitlines()
    commands = [line for line in log if line.startswith("$ ")]
    ranks = [(cut / "runs" / name / "run.yaml").read_text() for name in RUNS]
    assert len(commands) == 2 and all("\nranks: 2\n" in settings for settings in ranks)  # as it was started with
    for name in ("table2.md", "table2.csv", "figure2.png", "figure3.png"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name
