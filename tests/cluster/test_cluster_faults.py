"""A fault in the middle of training on two or three hosts ends the job everywhere, and loses nothing that was saved.

With -s, and with `-m slow` for all of them, the figures are printed as a table.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.cluster_faults import TABLE_HEAD, read_status, seen_by_first, suffer, wait_for_step
from support.cluster_routes import ROUTES, Site, needed, opened_site
from support.fake_hosts import FakeCluster
from support.host_needs import needs
from support.run_files import checkpoint_names, files_of, grow_old, losses
from support.run_helpers import run

from megatron_tiedlora.base.ownership import OWNER_FILE

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400), needs("ssh")]
STEPS, SAVED = 12, 2  # the fault comes after step 3, with a checkpoint of step 2
STOPS = ("SIGTERM", "scancel")
# Ranks that find their launcher dead save and stop, unless it took some of them along.
ENDS = {fault: ("failed", "stopped") for fault in ("launcher", "launcher on a host", "pdsh", "run.py")}
LAYOUTS = {2: "tp2", 3: "pp3"}  # by the number of hosts, with a rank on each
SETTINGS = {"max_steps": STEPS, "eval_interval": 4, "save_interval": SAVED}


@pytest.fixture(scope="module")
def site(two_hosts: FakeCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with opened_site(two_hosts, tmp_path_factory, **SETTINGS) as site:
        yield site


@pytest.fixture(scope="module")
def larger_site(three_hosts: FakeCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with opened_site(three_hosts, tmp_path_factory, **SETTINGS) as site:
        yield site


@pytest.fixture(scope="module", autouse=True)
def table() -> None:
    """Its head; each test prints its row when it has it."""
    print("", TABLE_HEAD, sep="\n")


# One of each launcher and of each class of faults; the others are slow.
QUICK = [
    ("mpirun", "rank"),
    ("run.py pdsh", "launcher"),
    ("torchrun", "host"),
    ("pdsh", "link"),
    ("slurm", "disk full"),
    ("run.py openmpi", "SIGTERM"),
]
EVERYWHERE = ("rank", "rank 0", "launcher", "launcher on a host", "host", "link", "disk full")
ALL = [
    *((route, fault) for route in ROUTES for fault in EVERYWHERE),
    *((route, "pdsh") for route in ROUTES if route.endswith("pdsh")),
    *((route, "scancel" if needed(route) == "slurm" else "SIGTERM") for route in ROUTES),
    *((route, "run.py") for route in ROUTES if route.startswith("run.py")),
    ("run.py srun", "SIGTERM"),
]
THREE = ["torchrun", *(route for route in ROUTES if route.startswith("run.py"))]
# Nothing tells the ranks of these that nobody looks after them: they train to their end.
RUNS_ON = {("pdsh", "launcher"), ("pdsh", "pdsh"), ("openmpi", "launcher"), ("openmpi", "SIGTERM")}
RUNS_ON |= {("run.py srun", "launcher")}  # or until Slurm ends the step with the job, after --grace_seconds
RUNS_ON |= {(f"run.py {launcher}", "run.py") for launcher in ("pdsh", "openmpi", "mpirun")}
CASES = [
    *(
        (route, fault, "unhurried_steps" if fault in ENDS else "watched_steps", [needs(needed(route))])
        for route, fault in QUICK
    ),
    *((route, fault, "long_steps", [needs(needed(route)), pytest.mark.slow]) for route, fault in ALL),
]
PARAMETERS = [
    pytest.param(route, fault, prelude, marks=marks, id=f"{route}-{fault}-{prelude}".replace(" ", "_"))
    for route, fault, prelude, marks in CASES
]


@pytest.mark.cpu_seconds(30, reason="two starts on two hosts, where each rank imports everything by itself")
@pytest.mark.parametrize(("route", "fault", "prelude"), PARAMETERS)
def test_a_fault_ends_the_job_everywhere_and_it_can_go_on(
    site: Site, tmp_path: Path, route: str, fault: str, prelude: str
) -> None:
    options = ["--no-requeue"] if route == "slurm" else []  # a job in the queue again is not over
    check_fault(site, tmp_path, route, fault, prelude, options)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["none", "rank", "launcher", "host", "link", "SIGTERM"])
@pytest.mark.parametrize("route", [pytest.param(route, marks=needs(needed(route))) for route in THREE])
def test_three_hosts(larger_site: Site, tmp_path: Path, route: str, fault: str) -> None:
    check_fault(larger_site, tmp_path, route, fault, "long_steps", [])


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["launcher", "launcher on a host", "SIGTERM"])
def test_a_run_that_was_stopped_is_not_restarted(site: Site, tmp_path: Path, fault: str) -> None:
    """With restarts left."""
    check_fault(site, tmp_path, "run.py pdsh", fault, "long_steps", ["--max_restarts=2"], resume="auto")


def check_fault(
    site: Site, tmp_path: Path, route: str, fault: str, prelude: str, options: list[str], **changes: Any
) -> None:
    """Start a job, let the fault happen, look at its end, and go on from its last checkpoint."""
    size = len(site.cluster.hosts)
    layout, folder = LAYOUTS[size], tmp_path / "disk" / "run"
    whole = site.whole_run(layout)
    folder.parent.mkdir()
    if fault == "disk full":
        site.cluster.first.mount_private(folder.parent, size="2m")
    job = ROUTES[route](replace(site.task(folder, layout, work=tmp_path, prelude=prelude, **changes), options=options))
    wait_for_step(job, 3)
    outcome = suffer(job, fault)
    print(outcome.row(route, fault))
    said = f"{outcome}\n{job.output()[-6000:]}"
    assert outcome.over is not None and outcome.told is not None and not outcome.left, said
    seen = seen_by_first(job, folder)
    if fault == "none" or (route, fault) in RUNS_ON:
        assert outcome.state == "finished", said
        check_same(seen, whole)
        return
    assert outcome.state in (("stopped",) if fault in STOPS else ENDS.get(fault, ("failed",))), said
    # Other launchers' statuses may say anything. Slurm signals a cancelled job: 0:15, or as tiedlora run has stopped 0.
    if route.startswith("run.py") or needed(route) == "slurm":
        assert (outcome.exit_status == 0) == (fault == "SIGTERM" or (route, fault) == ("run.py srun", "scancel")), said
    assert outcome.state == "stopped" or re.match(blamed(route, fault, size), outcome.reason), said
    saved = max(int(name.removeprefix("step_")) for name in checkpoint_names(seen))
    assert saved >= max(SAVED, losses(seen)[-1][0] - SAVED), said
    if (seen / OWNER_FILE).exists():  # of a killed rank 0 in another namespace of processes, which nobody can ask about
        grow_old(seen, 25)
    run(site.base, seen, ranks=size, resume="auto", **site.settings(layout))
    assert read_status(job)["state"] == "finished"
    check_same(seen, whole)


def blamed(route: str, fault: str, size: int) -> str:
    """What a failed run's reason begins with, as a regular expression: which rank it was, on which host, after what."""
    names = [f"rank {rank} on node{host}" for rank, host in zip(range(size), "abc", strict=False)]
    *others, last = (f"{name} stopped responding after step \\d" for name in names)
    if fault in ("host", "link") and needed(route) == "openmpi":  # mpirun ends those between before rank 0 has looked
        last = rf"(rank \d on nodeb, )?{last}"
    if fault == "rank" and needed(route) == "openmpi":  # mpirun ends the others before they have looked who it was
        return rf"{last}|rank \d on node., after step \d+: an exchange with a peer failed \(.*\[{names[-1]}\]"
    if fault == "link":  # each side has lost the other, and here all write the same file
        return rf"{last}|({'|'.join(others)}).*, as seen by {names[-1]}"
    return {"rank": last, "host": last, "rank 0": others[0]}.get(fault, r"rank \d on node[abc].* after step \d")


def check_same(seen: Path, whole: Path) -> None:
    """A run is an undisturbed one, bit for bit."""
    for split in ("train", "validation"):
        assert losses(seen, split) == losses(whole, split)
    assert files_of(seen / "adapter") == files_of(whole / "adapter")
