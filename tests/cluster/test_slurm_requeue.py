"""The batch scripts put themselves back into the queue before their time is over, and go on without a hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cluster_routes import start_slurm
from cluster_site import Site, opened_site
from fake_hosts import FakeCluster
from host_commands import wait_until
from host_needs import needs
from run_files import files_of, losses, status

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1500), needs("ssh"), needs("slurm")]
STEPS = 400  # at 0.3 s and more each, so that the signal comes in between


@pytest.fixture(scope="module")
def site(two_hosts: FakeCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with opened_site(two_hosts, tmp_path_factory, max_steps=STEPS, eval_interval=50, save_interval=5) as site:
        yield site


@pytest.mark.parametrize("script", ["slurm.sbatch", "slurm_torchrun.sbatch"])
def test_the_time_limit(site: Site, tmp_path: Path, script: str) -> None:
    """Three minutes, with a signal one minute before (Slurm looks every half a minute), until all steps are done."""
    slurm, folder = site.slurm, tmp_path / "run"
    assert slurm is not None
    task = site.task(folder, "tp2", work=tmp_path, prelude="watched_steps")
    job = start_slurm(replace(task, options=["--time=3", "--signal=USR1@60"]), script)
    file = folder / "run_status.json"
    wait_until(
        lambda: job.is_over() or (file.exists() and status(folder)["reason"] == "SIGUSR1"), job.output, limit=300
    )
    seconds = wait_until(lambda: slurm.restarts(job.number) > 0 or job.is_over(), job.output, limit=100)
    print(f"\n{script}: in the queue again {seconds:.1f} s after it was saved")
    assert slurm.restarts(job.number) > 0, job.output()
    assert job.wait(1000) == 0 and status(folder)["state"] == "finished", job.output()
    whole = site.whole_run("tp2")
    assert [step for step, _ in losses(folder)] == list(range(1, STEPS + 1))
    assert losses(folder) == losses(whole)
    assert files_of(folder / "adapter") == files_of(whole / "adapter")
    wait_until(lambda: not site.cluster.jobs(), site.cluster.jobs, limit=10)


@pytest.mark.parametrize("script", ["slurm.sbatch", "slurm_torchrun.sbatch"])
def test_a_start_without_a_step_is_an_end(site: Site, tmp_path: Path, script: str) -> None:
    """Slurm's signal comes in the first step, which is longer than a job's time: it would come back for ever."""
    slurm, folder = site.slurm, tmp_path / "run"
    assert slurm is not None
    long_step = {"micro_batch_size": 1, "global_batch_size": 20_000, "compile": "false"}
    job = start_slurm(site.task(folder, "tp2", work=tmp_path, **long_step), script)
    wait_until(lambda: f"run folder {folder}" in job.output() or job.is_over(), job.output, limit=100)
    site.cluster.first.run(["scancel", "--signal=USR1", job.number])  # to the ranks, as before a time limit
    assert job.wait(60) != 0, job.output()
    assert slurm.restarts(job.number) == 0
    assert status(folder) == {"state": "stopped", "step": 0, "reason": "SIGUSR1 before a step of this start"}
    wait_until(lambda: not site.cluster.jobs(), site.cluster.jobs, limit=10)
