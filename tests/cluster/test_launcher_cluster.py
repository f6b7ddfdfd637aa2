"""launch/run.py on two real hosts: a job that is told to stop saves, and goes on under another launcher."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_routes import MPI_ENVIRONMENT
from cluster_site import Site, opened_site
from fake_hosts import FakeCluster
from folders import ROOT
from host_commands import Started, wait_until
from host_needs import needs
from run_files import files_of, has_step, losses, status

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(700), needs("pdsh", "openmpi")]
STEPS = 40


@pytest.fixture(scope="module")
def site(two_hosts: FakeCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with opened_site(two_hosts, tmp_path_factory, max_steps=STEPS, eval_interval=STEPS) as site:
        yield site


def start(site: Site, folder: Path, launcher: str, *flags: str, work: Path) -> Started:
    """launch/run.py on the first host."""
    own = [f"--launcher={launcher}", "--hostfile", str(site.cluster.hostfile())]
    own += ["--launcher_args=-x MEGATRON_TIEDLORA_CACHE"] if launcher == "mpirun" else []
    settings = site.base.arguments(output_dir=folder, **site.settings("dp2"))
    environment = {**MPI_ENVIRONMENT, "HF_TOKEN": "s3cret", "MEGATRON_TIEDLORA_CACHE": str(site.base.cache)}
    (work / ".deepspeed_env").write_text(f"MEGATRON_TIEDLORA_CACHE={site.base.cache}\n")
    command = [sys.executable, ROOT / "launch" / "run.py", *own, *flags, *settings]
    return site.cluster.first.start(command, cwd=work, env=environment)


@pytest.mark.slow
def test_a_job_is_stopped_under_one_launcher_and_finished_under_another(site: Site, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    job = start(site, folder, "deepspeed", work=tmp_path)
    wait_until(lambda: has_step(folder, 3) or job.poll() is not None, job.output, limit=240)
    job.signal(signal.SIGTERM)
    assert job.wait(120) == 0, job.output()
    assert "tiedlora run: SIGTERM is passed on" in job.output() and "s3cret" not in job.output()
    stopped = status(folder)
    assert stopped["state"] == "stopped" and 3 <= stopped["step"] < STEPS
    wait_until(lambda: not site.cluster.jobs(), site.cluster.jobs, limit=100)  # after the run has ended

    job = start(site, folder, "mpirun", "--resume=auto", work=tmp_path)
    assert job.wait(300) == 0, job.output()
    assert status(folder) == {"state": "finished", "step": STEPS, "reason": "max_steps"}
    wait_until(lambda: not site.cluster.jobs(), site.cluster.jobs, limit=10)
    whole = site.whole_run("dp2")
    assert losses(folder) == losses(whole)
    assert files_of(folder / "adapter") == files_of(whole / "adapter")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "mpirun"])
def test_a_job_goes_on_by_itself_when_a_rank_on_one_host_is_killed(site: Site, tmp_path: Path, launcher: str) -> None:
    folder = tmp_path / "run"
    job = start(site, folder, launcher, "--max_restarts=2", "--save_interval=5", work=tmp_path)
    wait_until(lambda: has_step(folder, 7) or job.poll() is not None, job.output, limit=240)
    script = str(ROOT / "launch" / "train.py")
    for process in site.cluster.hosts["nodeb"].jobs():
        if process.cmdline()[1:3] == ["-u", script]:
            process.kill()
    assert job.wait(400) == 0, job.output()
    assert status(folder) == {"state": "finished", "step": STEPS, "reason": "max_steps"}
    wait_until(lambda: not site.cluster.jobs(), site.cluster.jobs, limit=10)
    assert losses(folder) == losses(site.whole_run("dp2"))
