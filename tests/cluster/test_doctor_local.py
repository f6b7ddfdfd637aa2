"""launch/doctor.py on this machine alone, what a rank sees of its host, and wrong usage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.folders import ROOT
from support.ranks import ENVIRONMENT

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.cluster import doctor_rank
from megatron_tiedlora.cluster.doctor import find_job
from megatron_tiedlora.commands.front import call
from megatron_tiedlora.config.job_settings import DoctorSettings
from megatron_tiedlora.runtime.launch_env import Host, free_port
from megatron_tiedlora.runtime.machine import resolve, source_hash

DOCTOR = ROOT / "launch" / "doctor.py"


def doctor(*flags: object, folder: Path, limit: float = 100.0) -> subprocess.CompletedProcess[str]:
    """Run the command on this machine, outside of any allocation."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return subprocess.run(
        [sys.executable, DOCTOR, *map(str, flags)],
        env={**environment, **ENVIRONMENT, "CUDA_VISIBLE_DEVICES": ""},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=limit,
    )


@pytest.mark.distributed
@pytest.mark.timeout(200)
@pytest.mark.cpu_seconds(30, reason="a job under deepspeed, which imports itself in each of its processes")
def test_this_machine_alone(tmp_path: Path) -> None:
    given = ("--output_dir=runs", "--pipeline_parallel=2", "--allreduce_mb=1", "--json=report.json")
    done = doctor(*given, "--timeout_seconds=90", f"--master_port={free_port()}", folder=tmp_path, limit=190)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verdict: ready, 1 host, 2 ranks" in done.stdout and "pipeline" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    (host,), (group,) = report["hosts"], report["groups"]
    assert (report["route"], report["launcher"], host["slots"], host["name"]) == ("local", "deepspeed", 2, "localhost")
    assert (group["kind"], group["ranks"], group["correct"]) == ("pipeline", [0, 1], True)
    assert host["answer"]["machine"]["paths"]["python"] == sys.executable
    assert host["answer"]["machine"]["source_hash"] == source_hash(ROOT / "megatron_tiedlora")
    assert host["answer"]["output_free_bytes"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_json_alone_on_stdout_and_an_output_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """By its one rank, which needs no launcher."""
    done = doctor("--output_dir=/proc/runs", "--json=-", folder=tmp_path)
    report = json.loads(done.stdout)
    assert done.returncode == 1 and report["skipped"].endswith("has no communication to test")
    found = {finding["code"]: finding for finding in report["findings"] if finding["status"] == "error"}
    assert list(found) == ["output_not_writable"]
    assert found["output_not_writable"]["value"].startswith("--output_dir /proc/runs: no file can be written there (")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--hostfile=none"], "--hostfile none: cannot be read"),
        (["--hostfile=empty"], "--hostfile empty: names no host"),
        (["--hostfile=odd", "--tensor_parallel=2"], "3 ranks are not a multiple of --tensor_parallel 2"),
        (["--host_file=x"], "unknown argument --host_file (did you mean --hostfile?)"),
        (["--launcher=pdsh"], "--launcher pdsh: input should be 'auto', 'deepspeed'"),
        (["--launcher=srun", "--hostfile=odd"], "remove --hostfile"),
        (["--master_port=70000"], "--master_port 70000: input should be less than or equal to 65535"),
        (["--output_dir=~nosuchuser/runs"], "--output_dir '~nosuchuser/runs': is not a path"),
        (["--timeout_seconds=1e14"], "--timeout_seconds 1e14: input should be less than or equal to 86400"),
        (["--json=no/where.json"], "--json no/where.json: its folder does not exist"),
    ],
)
def test_wrong_usage_is_one_line(flags: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").write_text("# nobody\n\n")
    Path("odd").write_text("a slots=1\nb slots=2\n")
    with pytest.raises(UserError) as raised:
        call("doctor", flags)
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_a_missing_hostfile_ends_with_status_2(tmp_path: Path) -> None:
    done = doctor("--hostfile=none", folder=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: --hostfile none: cannot be read") and done.stderr.count("\n") == 1


def test_whom_to_examine(tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("a slots=2\nb slots=2\n")
    allocation = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1,n2", "SLURM_TASKS_PER_NODE": "4(x2)"}

    def found(environment: dict[str, str], **settings: Any) -> tuple[str, str, tuple[Host, ...]]:
        job = find_job(DoctorSettings(**settings), environment)
        return job.launcher, job.route, job.hosts

    assert found(allocation, hostfile=str(hostfile)) == ("deepspeed", "ssh", (Host("a", 2), Host("b", 2)))
    assert found({}, hostfile=str(hostfile), launcher="mpirun")[:2] == ("mpirun", "ssh")
    assert found(allocation) == ("srun", "srun", (Host("n1", 4), Host("n2", 4)))
    assert found({}, tensor_parallel=2, pipeline_parallel=2) == ("deepspeed", "local", (Host("localhost", 4),))
    step = {"SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "n1", "SLURM_STEP_TASKS_PER_NODE": "1"}
    interactive = {**allocation, **step, "SLURM_STEP_NUM_TASKS": "1"}
    assert found(interactive) == ("srun", "srun", (Host("n1", 4), Host("n2", 4)))
    with pytest.raises(UserError, match="Start it once, without srun"):
        found({**allocation, **step, "SLURM_STEP_NUM_TASKS": "8"})


# What a rank sees ----------------------------------------------------------------------------------------------------


def test_a_source_hash_sees_names_and_content(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    first = source_hash(tmp_path)
    (tmp_path / "notes.txt").write_text("not code")
    assert source_hash(tmp_path) == first
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    second = source_hash(tmp_path)
    (tmp_path / "b.py").write_text("x = 2\n")
    assert len({first, second, source_hash(tmp_path)}) == 3


def test_a_file_that_is_written_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a folder is shared: a file that one host writes is looked for on the others."""
    path = tmp_path / ".doctor-x"
    assert doctor_rank._write(str(path)) == "" and doctor_rank._is_seen(str(path))
    assert path.stat().st_mode & 0o777 == 0o600
    assert doctor_rank._write(str(path)) == "File exists"
    monkeypatch.setattr(doctor_rank, "_SHARED_SECONDS", 0.3)
    begin = time.monotonic()
    assert not doctor_rank._is_seen(str(tmp_path / ".doctor-y")) and time.monotonic() - begin < 5


def test_a_full_disk_takes_no_file(tmp_path: Path) -> None:
    folder = tmp_path / "full"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, timeout=20).returncode != 0:
        pytest.skip("needs the right to mount a file system")
    try:
        (folder / "filler").write_bytes(bytes(4096))
        assert doctor_rank._write(str(folder / ".doctor-x")) == "No space left on device"
    finally:
        subprocess.run(["umount", str(folder)], check=True, timeout=20)


def test_addresses() -> None:
    assert "127.0.0.1" in resolve("localhost") or "::1" in resolve("localhost")
    assert resolve("no-such-host.invalid") == []
