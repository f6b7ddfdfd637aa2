"""A job whose host dies goes on, without a hand, on the hosts that are left: torchrun with a range of nodes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cluster_faults import heal, wait_for_step
from cluster_routes import start_torchrun
from cluster_site import Site, opened_site
from fake_hosts import FakeCluster
from host_needs import needs
from run_files import losses, status

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600), needs("ssh")]


@pytest.fixture(scope="module")
def site(two_hosts: FakeCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with opened_site(two_hosts, tmp_path_factory, max_steps=12, eval_interval=4, save_interval=2) as site:
        yield site


def test_torchrun_goes_on_with_the_host_that_is_left(site: Site, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    task = site.task(folder, "dp2", work=tmp_path, prelude="watched_steps", resume="auto")
    elastic = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    job = start_torchrun(replace(task, options=["--nnodes=1:2", "--max-restarts=3"], environment=elastic))
    try:
        wait_for_step(job, 3)
        list(site.cluster.hosts.values())[-1].kill()
        assert job.launchers[0].wait(300) == 0, job.output()
    finally:
        heal(job)
    assert status(folder)["state"] == "finished", job.output()
    assert "resumed from step" in job.output()
    for split in ("train", "validation"):
        found, expected = (losses(run, split) for run in (folder, site.whole_run("dp2")))
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], rel=1e-5)
