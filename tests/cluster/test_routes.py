"""Training over two hosts, by every route that users have, gives the numbers of one host with two processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster_routes import ROUTES, TORCHRUN_BY_SLURM, Job, Task, needed
from cluster_site import LAYOUTS, Site, opened_site
from fake_hosts import FakeCluster
from host_commands import wait_until
from host_needs import needs
from run_files import files_of, losses, status

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(280), needs("ssh")]
STEPS = 5


@pytest.fixture(scope="module")
def site(two_hosts: FakeCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with opened_site(two_hosts, tmp_path_factory, max_steps=STEPS) as site:
        yield site


# One route starts launch/train.py itself, the others start it without what takes long and has no part in the numbers.
DEFAULT = {
    ("pdsh", "tp2"): "",
    **dict.fromkeys([("openmpi", "pp2"), ("mpirun", "tp2"), ("slurm", "pp2"), ("torchrun", "tp2")], "bare_start"),
}
CASES = [
    *((route, layout, prelude, [needs(needed(route))]) for (route, layout), prelude in DEFAULT.items()),
    *((route, layout, "", [needs(needed(route)), pytest.mark.slow]) for route in ROUTES for layout in LAYOUTS),
]
PARAMETERS = [
    pytest.param(route, layout, prelude, marks=marks, id=f"{route}-{layout}-{prelude or 'train.py'}".replace(" ", "_"))
    for route, layout, prelude, marks in CASES
    if pytest.mark.slow not in marks or DEFAULT.get((route, layout)) != prelude
]


@pytest.mark.parametrize(("route", "layout", "prelude"), PARAMETERS)
def test_two_hosts_compute_what_one_does(site: Site, tmp_path: Path, route: str, layout: str, prelude: str) -> None:
    assert_as_on_one_host(site, tmp_path, layout, ROUTES[route], prelude)


@pytest.mark.slow
@pytest.mark.parametrize("route", [pytest.param(route, marks=needs("slurm")) for route in TORCHRUN_BY_SLURM])
def test_torchrun_on_the_nodes_of_an_allocation(site: Site, tmp_path: Path, route: str) -> None:
    assert_as_on_one_host(site, tmp_path, "tp2", TORCHRUN_BY_SLURM[route])


def assert_as_on_one_host(site: Site, work: Path, layout: str, start: Callable[[Task], Job], prelude: str = "") -> None:
    whole, folder = site.whole_run(layout), work / "run"
    job = start(site.task(folder, layout, work=work, prelude=prelude))
    assert job.wait() == 0, job.output()
    assert status(folder)["state"] == "finished"
    assert [step for step, _ in losses(folder)] == list(range(1, STEPS + 1))
    for split in ("train", "validation"):
        assert losses(folder, split) == losses(whole, split)
    assert files_of(folder / "adapter") == files_of(whole / "adapter")
    wait_until(lambda: not site.cluster.jobs(), site.cluster.jobs, limit=10)
