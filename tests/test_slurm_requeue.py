"""launch/slurm.sbatch puts itself back into the queue before its time is over, and goes on without a hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cluster_faults import read_status
from cluster_routes import Job, start_slurm
from cluster_site import Site, opened_site
from fake_hosts import FakeCluster
from host_commands import wait_until
from host_needs import needs
from run_files import files_of, losses

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900), needs("ssh"), needs("slurm")]
STEPS = 200  # at 0.3 s and more each, so that the signal comes in between


@pytest.fixture(scope="module")
def site(two_hosts: FakeCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with opened_site(two_hosts, tmp_path_factory, max_steps=STEPS, eval_interval=50, save_interval=5) as site:
        yield site


def submit(site: Site, folder: Path, *options: str) -> Job:
    task = site.task(folder / "run", "tp2", work=folder, prelude="watched_steps")
    return start_slurm(replace(task, options=options))


def assert_went_on(site: Site, job: Job, folder: Path) -> None:
    """The job has been put back, and ended as if nothing had happened."""
    wait_until(lambda: site.slurm is not None and site.slurm.restarts(job.number) > 0, job.output, limit=300)
    wait_until(lambda: read_status(job).get("state") == "finished", job.output, limit=400)
    assert job.wait() == 0, job.output()
    whole = site.whole_run("tp2")
    assert [step for step, _ in losses(folder / "run")] == list(range(1, STEPS + 1))
    assert losses(folder / "run") == losses(whole)
    assert files_of(folder / "run" / "adapter") == files_of(whole / "adapter")
    wait_until(lambda: not site.cluster.jobs(), site.cluster.jobs, limit=10)


def test_the_time_limit(site: Site, tmp_path: Path) -> None:
    """Two minutes, with a signal one minute before (Slurm looks every half a minute)."""
    job = submit(site, tmp_path, "--time=2", "--signal=USR1@60")
    assert_went_on(site, job, tmp_path)
