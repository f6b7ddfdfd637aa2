"""Training over two hosts, by every route that users have, gives the numbers of one host with two processes: also where
the job is stopped, requeued or loses a rank or a host, and goes on by itself.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.cluster_faults import heal, wait_for_step
from support.cluster_routes import (
    MPI_ENVIRONMENT,
    ROUTES,
    Job,
    Site,
    Task,
    needed,
    opened_site,
    start_slurm,
    start_torchrun,
)
from support.fake_hosts import FakeCluster, Started, wait_until
from support.folders import ROOT
from support.host_needs import needs
from support.run_files import files_of, has_step, losses, status

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(280), needs("ssh")]
STEPS = 5
OF_TWO = ("tp2", "pp2", "dp2")


@pytest.fixture(scope="module")
def site(two_hosts: FakeCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with opened_site(two_hosts, tmp_path_factory, max_steps=STEPS) as site:
        yield site


def longer(site: Site, max_steps: int, **changes: Any) -> Site:
    """The site with runs of more steps, some of which are between two saves."""
    return replace(site, whole=site.whole / str(max_steps), changes={"max_steps": max_steps, **changes})


def assert_finished(site: Site, folder: Path, layout: str) -> None:
    """The run has taken every step once and is one on one host, bit for bit; nothing of its job is left."""
    whole = site.whole_run(layout)
    assert status(folder)["state"] == "finished"
    assert [step for step, _ in losses(folder)] == list(range(1, site.changes["max_steps"] + 1))
    for split in ("train", "validation"):
        assert losses(folder, split) == losses(whole, split)
    assert files_of(folder / "adapter") == files_of(whole / "adapter")
    wait_until(lambda: not site.cluster.jobs(), site.cluster.jobs, limit=10)


# Undisturbed ----------------------------------------------------------------------------------------------------------


# One route starts launch/train.py itself, the others start it without what takes long and has no part in the numbers.
# mpirun and torchrun are in test_cluster_faults.py, whose runs have these numbers too.
DEFAULT = {("pdsh", "tp2"): "", ("openmpi", "pp2"): "bare_start", ("slurm", "pp2"): "bare_start"}
CASES = [
    *((route, layout, prelude, [needs(needed(route))]) for (route, layout), prelude in DEFAULT.items()),
    *((route, layout, "", [needs(needed(route)), pytest.mark.slow]) for route in ROUTES for layout in OF_TWO),
]
PARAMETERS = [
    pytest.param(route, layout, prelude, marks=marks, id=f"{route}-{layout}-{prelude or 'train.py'}".replace(" ", "_"))
    for route, layout, prelude, marks in CASES
    if pytest.mark.slow not in marks or DEFAULT.get((route, layout)) != prelude
]


@pytest.mark.cpu_seconds(25, reason="ranks of two hosts, which import everything")
@pytest.mark.parametrize(("route", "layout", "prelude"), PARAMETERS)
def test_two_hosts_compute_what_one_does(site: Site, tmp_path: Path, route: str, layout: str, prelude: str) -> None:
    assert_as_on_one_host(site, tmp_path, layout, ROUTES[route], prelude)


@pytest.mark.slow
@needs("slurm")
def test_torchrun_on_the_nodes_of_an_allocation(site: Site, tmp_path: Path) -> None:
    assert_as_on_one_host(site, tmp_path, "tp2", partial(start_slurm, name="slurm_torchrun.sbatch"))


def assert_as_on_one_host(site: Site, work: Path, layout: str, start: Callable[[Task], Job], prelude: str = "") -> None:
    job = start(site.task(work / "run", layout, work=work, prelude=prelude))
    assert job.wait() == 0, job.output()
    assert_finished(site, work / "run", layout)


# Under launch/run.py --------------------------------------------------------------------------------------------------


def start_run_py(site: Site, folder: Path, launcher: str, *flags: str, work: Path) -> Started:
    """launch/run.py on the first host."""
    own = [f"--launcher={launcher}", "--hostfile", str(site.cluster.hostfile())]
    own += ["--launcher_args=-x MEGATRON_TIEDLORA_CACHE"] if launcher == "mpirun" else []
    settings = site.base.arguments(output_dir=folder, **site.settings("dp2"))
    environment = {**MPI_ENVIRONMENT, "HF_TOKEN": "s3cret", "MEGATRON_TIEDLORA_CACHE": str(site.base.cache)}
    (work / ".deepspeed_env").write_text(f"MEGATRON_TIEDLORA_CACHE={site.base.cache}\n")
    command = [sys.executable, ROOT / "launch" / "run.py", *own, *flags, *settings]
    return site.cluster.first.start(command, cwd=work, env=environment)


@pytest.mark.slow
@pytest.mark.timeout(700)
@needs("pdsh", "openmpi")
def test_a_job_is_stopped_under_one_launcher_and_finished_under_another(site: Site, tmp_path: Path) -> None:
    site, folder = longer(site, 40, eval_interval=40), tmp_path / "run"
    job = start_run_py(site, folder, "deepspeed", work=tmp_path)
    wait_until(lambda: has_step(folder, 3) or job.poll() is not None, job.output, limit=240)
    job.signal(signal.SIGTERM)
    assert job.wait(120) == 0, job.output()
    assert "tiedlora run: SIGTERM is passed on" in job.output() and "s3cret" not in job.output()
    stopped = status(folder)
    assert stopped["state"] == "stopped" and 3 <= stopped["step"] < 40
    wait_until(lambda: not site.cluster.jobs(), site.cluster.jobs, limit=100)  # after the run has ended

    job = start_run_py(site, folder, "mpirun", "--resume=auto", work=tmp_path)
    assert job.wait(300) == 0, job.output()
    assert_finished(site, folder, "dp2")


@pytest.mark.slow
@pytest.mark.timeout(700)
@needs("pdsh", "openmpi")
@pytest.mark.parametrize("launcher", ["deepspeed", "mpirun"])
def test_a_job_goes_on_by_itself_when_a_rank_on_one_host_is_killed(site: Site, tmp_path: Path, launcher: str) -> None:
    site, folder = longer(site, 40, eval_interval=40), tmp_path / "run"
    job = start_run_py(site, folder, launcher, "--max_restarts=2", "--save_interval=5", work=tmp_path)
    wait_until(lambda: has_step(folder, 7) or job.poll() is not None, job.output, limit=240)
    script = str(ROOT / "launch" / "train.py")
    for process in site.cluster.hosts["nodeb"].jobs():
        if process.cmdline()[1:3] == ["-u", script]:
            process.kill()
    assert job.wait(400) == 0, job.output()
    assert_finished(site, folder, "dp2")


# Batch scripts put themselves back into the queue before their time is over -------------------------------------------

SCRIPTS = ["slurm.sbatch", "slurm_torchrun.sbatch"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
@needs("slurm")
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_time_limit(site: Site, tmp_path: Path, script: str) -> None:
    """Three minutes, with a signal one minute before (Slurm looks every half a minute), until all steps are done."""
    # Steps of 0.3 s and more each, so that the signal comes in between
    site, slurm, folder = longer(site, 400, eval_interval=50, save_interval=5), site.slurm, tmp_path / "run"
    assert slurm is not None
    task = site.task(folder, "tp2", work=tmp_path, prelude="watched_steps")
    job = start_slurm(replace(task, options=["--time=3", "--signal=USR1@60"]), script)
    file = folder / "run_status.json"
    wait_until(
        lambda: job.is_over() or (file.exists() and status(folder)["reason"] == "SIGUSR1"), job.output, limit=300
    )
    seconds = wait_until(lambda: slurm.field(job.number, "Restarts") != "0" or job.is_over(), job.output, limit=100)
    print(f"\n{script}: in the queue again {seconds:.1f} s after it was saved")
    assert slurm.field(job.number, "Restarts") != "0", job.output()
    assert job.wait(1000) == 0, job.output()
    assert_finished(site, folder, "tp2")


@pytest.mark.slow
@pytest.mark.timeout(1500)
@needs("slurm")
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_start_without_a_step_is_an_end(site: Site, tmp_path: Path, script: str) -> None:
    """Slurm's signal comes in the first step, which is longer than a job's time: it would come back for ever."""
    slurm, folder = site.slurm, tmp_path / "run"
    assert slurm is not None
    long_step = {"micro_batch_size": 1, "global_batch_size": 20_000, "compile": "false"}
    job = start_slurm(site.task(folder, "tp2", work=tmp_path, **long_step), script)
    wait_until(lambda: f"run folder  {folder}" in job.output() or job.is_over(), job.output, limit=100)
    site.cluster.first.run(["scancel", "--signal=USR1", job.number])  # to the ranks, as before a time limit
    assert job.wait(60) != 0, job.output()
    assert slurm.field(job.number, "Restarts") == "0"
    assert status(folder) == {"state": "stopped", "step": 0, "reason": "SIGUSR1 before a step of this start"}
    wait_until(lambda: not site.cluster.jobs(), site.cluster.jobs, limit=10)


# A host dies ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_torchrun_goes_on_with_the_host_that_is_left(site: Site, tmp_path: Path) -> None:
    """By itself: torchrun has a range of nodes."""
    site, folder = longer(site, 12, eval_interval=4, save_interval=2), tmp_path / "run"
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
