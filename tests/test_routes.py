"""Training over two hosts, by every route that users have, gives the numbers of one host with two processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cluster_routes import NEEDS, ROUTES, Task
from fake_hosts import FakeCluster
from host_needs import needs, why_not
from run_files import files_of, losses, status
from run_helpers import Base, run, write_base
from slurm_cluster import SlurmCluster

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(280), needs("ssh")]
LAYOUTS = {"tp2": {"tensor_parallel": 2}, "pp2": {"pipeline_parallel": 2}, "dp2": {}}
STEPS = 5


@dataclass(frozen=True)
class Site:
    """Two hosts with what jobs on them need; `whole` holds a run on one host for each layout."""

    base: Base
    cluster: FakeCluster
    slurm: SlurmCluster | None
    whole: Path

    def settings(self, layout: str) -> dict[str, Any]:
        """Of the runs that are compared."""
        return {"max_steps": STEPS, "warmup_steps": 1, "ds_config": "zero1.json", **LAYOUTS[layout]}

    def whole_run(self, layout: str) -> Path:
        """The run folder of the layout on one host."""
        folder = self.whole / layout
        if not folder.exists():
            run(self.base, folder, ranks=2, **self.settings(layout))
        return folder


@pytest.fixture(scope="module")
def site(two_hosts: FakeCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    base = write_base(tmp_path_factory.mktemp("base"))
    with nullcontext() if why_not("slurm") else SlurmCluster(two_hosts) as slurm:
        yield Site(base, two_hosts, slurm, tmp_path_factory.mktemp("whole"))


DEFAULT = {("pdsh", "tp2"), ("openmpi", "pp2"), ("mpirun", "tp2"), ("slurm", "pp2"), ("torchrun", "tp2")}
CASES = [
    pytest.param(
        route, layout, marks=[needs(NEEDS[route]), *([] if (route, layout) in DEFAULT else [pytest.mark.slow])]
    )
    for route in ROUTES
    for layout in LAYOUTS
]


@pytest.mark.parametrize(("route", "layout"), CASES)
def test_two_hosts_compute_what_one_does(site: Site, tmp_path: Path, route: str, layout: str) -> None:
    whole, folder = site.whole_run(layout), tmp_path / "run"
    arguments = site.base.arguments(output_dir=folder, **site.settings(layout))
    job = ROUTES[route](Task(site.cluster, arguments, tmp_path, site.base.cache, slurm=site.slurm))
    assert job.wait() == 0, job.output()
    assert status(folder)["state"] == "finished"
    assert [step for step, _ in losses(folder)] == list(range(1, STEPS + 1))
    for split in ("train", "validation"):
        assert losses(folder, split) == losses(whole, split)
    assert files_of(folder / "adapter") == files_of(whole / "adapter")
    assert site.cluster.jobs() == {}
