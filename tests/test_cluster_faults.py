"""A fault in the middle of training on two hosts ends the job everywhere, and loses nothing that was saved.

With -s, and with `-m slow` for all of them, the figures are printed as a table.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_faults import TABLE_HEAD, read_status, seen_by_first, suffer, wait_for_step
from cluster_routes import NEEDS, ROUTES
from cluster_site import Site, opened_site
from fake_hosts import FakeCluster
from host_needs import needs
from run_files import checkpoint_names, files_of, losses
from run_helpers import run

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(290), needs("ssh")]
STEPS, SAVED = 8, 2  # the fault comes after step 3, with a checkpoint of step 2
STOPS = ("SIGTERM", "scancel")
LAYOUT = "tp2"


@pytest.fixture(scope="module")
def site(two_hosts: FakeCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with opened_site(two_hosts, tmp_path_factory, max_steps=STEPS, eval_interval=4, save_interval=SAVED) as site:
        yield site


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    rows: list[str] = []
    yield rows
    print("", TABLE_HEAD, *rows, sep="\n")


QUICK = [
    ("mpirun", "rank"),
    ("pdsh", "launcher"),
    ("pdsh", "pdsh"),
    ("torchrun", "host"),
    ("pdsh", "link"),
    ("mpirun", "disk full"),
    ("openmpi", "SIGTERM"),
    ("slurm", "scancel"),
]
EVERYWHERE = ("rank", "rank 0", "launcher", "launcher on a host", "host", "link", "disk full")
ALL = [
    *((route, fault) for route in ROUTES for fault in EVERYWHERE),
    ("pdsh", "pdsh"),
    *((route, "SIGTERM") for route in ROUTES if route != "slurm"),
    ("slurm", "scancel"),
]
CASES = [
    *(
        pytest.param(route, fault, "watched_steps", id=f"{route}-{fault}", marks=needs(NEEDS[route]))
        for route, fault in QUICK
    ),
    *(
        pytest.param(
            route, fault, "long_steps", id=f"{route}-{fault}-slow", marks=[needs(NEEDS[route]), pytest.mark.slow]
        )
        for route, fault in ALL
    ),
]


@pytest.mark.parametrize(("route", "fault", "prelude"), CASES)
def test_a_fault_ends_the_job_everywhere_and_it_can_go_on(
    site: Site, tmp_path: Path, table: list[str], route: str, fault: str, prelude: str
) -> None:
    whole, folder = site.whole_run(LAYOUT), tmp_path / "disk" / "run"
    folder.parent.mkdir()
    if fault == "disk full":
        site.cluster.first.mount_private(folder.parent, size="2m")
    job = ROUTES[route](site.task(folder, LAYOUT, work=tmp_path, prelude=prelude))
    wait_for_step(job, 3)
    outcome = suffer(job, fault)
    table.append(outcome.row(route, fault))
    said = f"{outcome}\n{job.output()[-6000:]}"
    assert outcome.over is not None and outcome.told is not None and not outcome.left, said
    assert outcome.state == ("stopped" if fault in STOPS else "failed"), said
    assert outcome.exit_status != 0, said

    seen = seen_by_first(job, folder)
    assert min(int(name.removeprefix("step_")) for name in checkpoint_names(seen)) >= SAVED
    run(site.base, seen, ranks=2, resume="auto", **site.settings(LAYOUT))
    assert read_status(job)["state"] == "finished"
    for split in ("train", "validation"):
        assert losses(seen, split) == losses(whole, split)
    assert files_of(seen / "adapter") == files_of(whole / "adapter")
