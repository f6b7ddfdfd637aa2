"""launch/doctor.py on this machine alone, what a rank sees of its host, and wrong usage."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from folders import ROOT
from launcher_jobs import make_job
from ranks import ENVIRONMENT
from tiny_models import write_tiny_model

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.cluster.doctor.compare import is_loopback
from megatron_tiedlora.cluster.doctor.rank import address_towards, output_folder, path_content
from megatron_tiedlora.cluster.doctor.trial import find_job, place_ranks
from megatron_tiedlora.commands.front import call
from megatron_tiedlora.config.doctor_settings import DoctorSettings
from megatron_tiedlora.config.hosts import Host
from megatron_tiedlora.planning.machines import read_machine
from megatron_tiedlora.runtime.launch_env import free_port
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
@pytest.mark.timeout(500)
@pytest.mark.cpu_seconds(60, reason="two jobs under deepspeed, which imports itself in each of their processes")
def test_this_machine_alone(tmp_path: Path) -> None:
    """Its ranks all-reduce, and then measure its constants, which a plan reads."""
    write_tiny_model(tmp_path / "model", num_layers=1, max_positions=1024)
    given = ("--model=model", "--output_dir=runs", "--pipeline_parallel=2", "--allreduce_mb=1", "--json=report.json")
    measured = ("--measure=new/constants.json", "--measure_seconds=0.1", "--timeout_seconds=200")
    done = doctor(*given, *measured, f"--master_port={free_port()}", folder=tmp_path, limit=490)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verdict: ready, 1 host, 2 ranks" in done.stdout and "pipeline" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    (host,), (group,) = report["hosts"], report["groups"]
    assert (report["route"], report["launcher"], host["slots"], host["name"]) == ("local", "deepspeed", 2, "localhost")
    assert (group["kind"], group["ranks"], group["correct"]) == ("pipeline", [0, 1], True)
    assert host["answer"]["machine"]["paths"]["python"] == sys.executable
    assert host["answer"]["machine"]["source_hash"] == source_hash(ROOT / "megatron_tiedlora")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "new", "report.json"]
    machine = read_machine(tmp_path / "new" / "constants.json")
    assert machine.record() == report["machine"] | {"capability": None} and report["seconds"]["measure"] > 0
    assert "2 ranks of a host" in machine.constants["message"].source
    assert f"matmuls of {tmp_path / 'model'} over 512 tokens" in machine.constants["matmul.fp32"].source
    assert f"new/constants.json: constants of {machine.title}, for tiedlora plan --constants" in done.stderr


@pytest.mark.distributed
@pytest.mark.timeout(250)
@pytest.mark.cpu_seconds(25, reason="three commands, each of which imports torch")
def test_a_rank_alone_that_cannot_measure(tmp_path: Path) -> None:
    """The reason is an error of the report, and no file is written; nor is anything measured after another error."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    given = ("--model=model", "--measure=constants.json", f"--master_port={free_port()}", "--json=-")
    done = doctor(*given, folder=tmp_path)
    report = json.loads(done.stdout)
    (finding,) = report["findings"]
    assert (done.returncode, finding["code"], report["machine"]) == (1, "not_measured", None)
    assert "did not finish measuring (" in finding["value"] and "config.json" in finding["value"]
    (tmp_path / "model" / "config.json").unlink()
    (tmp_path / "model").rmdir()
    done = doctor(*given, folder=tmp_path)
    assert done.returncode == 1 and [one["code"] for one in json.loads(done.stdout)["findings"]] == ["path_missing"]
    assert "measuring" not in done.stderr and done.stderr.endswith("nothing was measured, as the hosts are not ready\n")
    assert list(tmp_path.iterdir()) == []


def test_json_alone_on_stdout_and_a_model_that_is_missing(tmp_path: Path) -> None:
    done = doctor("--model=nowhere", "--json=-", folder=tmp_path)
    report = json.loads(done.stdout)
    assert done.returncode == 1 and report["skipped"].endswith("has no communication to test")
    (finding,) = report["findings"]
    assert (finding["code"], finding["status"]) == ("path_missing", "error")
    assert finding["value"] == f"--model {tmp_path / 'nowhere'} is missing on every host"


def test_what_is_on_the_hub_is_no_missing_path(tmp_path: Path) -> None:
    (tmp_path / "a.de").write_text("eins\n")
    (tmp_path / "a.en").write_text("one\n")
    given = ("--model=nobody/nothing-at-all", "--train_file=a.de,a.en", "--test_file=gsm8k", "--json=-")
    done = doctor(*given, folder=tmp_path)
    report = json.loads(done.stdout)
    assert (done.returncode, report["verdict"]) == (0, "ready"), done.stdout
    found = {finding["code"]: finding["value"] for finding in report["findings"]}
    not_cached = "--model nobody/nothing-at-all is not a folder, and is not in the Hugging"
    assert found["hub_not_cached"].startswith(not_cached)
    assert found["hub_not_checked"].startswith("--test_file gsm8k is not a file on every host; whether")
    paths = report["hosts"][0]["answer"]["paths"]
    assert [paths[f"train_file:{number}"]["kind"] for number in (1, 2)] == ["file", "file"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--hostfile=none"], "--hostfile none: cannot be read"),
        (["--hostfile=empty"], "--hostfile empty: names no host"),
        (["--hostfile=odd", "--tensor_parallel=2"], "3 ranks are not a multiple of --tensor_parallel 2"),
        (["--host_file=x"], "unknown argument --host_file (did you mean --hostfile?)"),
        (["--ssh_port=22"], "--ssh_port needs --hostfile"),
        (["--launcher=pdsh"], "--launcher pdsh: input should be 'auto', 'deepspeed'"),
        (["--launcher=srun", "--hostfile=odd"], "remove --hostfile"),
        (["--master_port=70000"], "--master_port 70000: input should be less than or equal to 65535"),
        (["--model=llama2-7b"], "is a shape without files"),
        (["--model=~nosuchuser/x"], "--model '~nosuchuser/x': is not a path"),
        (["--train_file=a.de,~nosuchuser/a.en"], "--train_file '~nosuchuser/a.en': is not a path"),
        (["--output_dir=~nosuchuser/runs"], "--output_dir '~nosuchuser/runs': is not a path"),
        (["--timeout_seconds=1e14"], "--timeout_seconds 1e14: input should be less than or equal to 86400"),
        (["--json=no/where.json"], "--json no/where.json: its folder does not exist"),
        (["--measure=c.json"], "--measure c.json needs --model: matmuls of its widths are measured"),
        (["--measure=c.json", "--model=llama2-7b"], "is a shape without files"),
        (["--measure=", "--model=x"], "--measure: the path is empty"),
        (["--measure_seconds=3", "--model=x"], "--measure_seconds needs --measure"),
        (["--measure=c.json", "--model=x", "--json=c.json"], "--measure and --json both write c.json; give two files"),
        (["--measure=c.json", "--model=x", "--json=./c.json"], "--measure and --json both write c.json; give two"),
        (["--measure=c.json", "--model=x", "--measure_seconds=0"], "--measure_seconds 0: input should be greater"),
        (["--measure=folder", "--model=x"], "--measure folder: is a folder; give a file"),
        (["--measure=odd/c.json", "--model=x"], "--measure odd/c.json: odd is a file; give a folder"),
        (["--measure=closed/c.json", "--model=x"], "--measure closed/c.json: closed is not writable; give another"),
    ],
)
def test_wrong_usage_is_one_line(flags: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("closed").mkdir()
    allowed = os.access  # the superuser may write anywhere
    monkeypatch.setattr(os, "access", lambda path, mode: path != Path("closed") and allowed(path, mode))
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
        job = find_job(DoctorSettings(**settings), environment, tmp_path)
        return job.launcher, job.route, job.hosts

    assert found(allocation, hostfile=str(hostfile)) == ("deepspeed", "ssh", (Host("a", 2), Host("b", 2)))
    assert found({}, hostfile=str(hostfile), launcher="mpirun")[:2] == ("mpirun", "ssh")
    assert found(allocation) == ("srun", "srun", (Host("n1", 4), Host("n2", 4)))
    assert found({}, tensor_parallel=2, pipeline_parallel=2) == ("deepspeed", "local", (Host("localhost", 4),))
    step = {"SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "n1", "SLURM_STEP_TASKS_PER_NODE": "1"}
    interactive = {**allocation, **step, "SLURM_STEP_NUM_TASKS": "1"}
    assert found(interactive) == ("srun", "srun", (Host("n1", 4), Host("n2", 4)))
    with pytest.raises(UserError, match="start it once, without srun"):
        found({**allocation, **step, "SLURM_STEP_NUM_TASKS": "8"})


def test_ranks_are_where_the_launcher_starts_them(tmp_path: Path) -> None:
    hosts = (Host("node9", 2), Host("node10", 2))
    for launcher, names in (("deepspeed", ["node9", "node10"]), ("torchrun", ["node10", "node9"])):
        placed = place_ranks(make_job(tmp_path, launcher=launcher, hosts=hosts))
        assert [(host.name, host.first_rank) for host in placed] == list(zip(names, (0, 2), strict=True))


# What a rank sees ----------------------------------------------------------------------------------------------------


def test_what_a_path_holds(tmp_path: Path) -> None:
    model, small = tmp_path / "model", b"{}"
    (model / "deep").mkdir(parents=True)
    (model / "config.json").write_bytes(small)
    (model / "deep" / "weights").write_bytes(bytes(2 << 20))
    (model / "linked").symlink_to(model / "config.json")
    (model / "dangling").symlink_to(model / "nothing")
    content = f"2 {hashlib.sha256(small).hexdigest()[:12]}"
    assert path_content(str(model)).model_dump() == {
        "path": str(model),
        "kind": "folder",
        "files": {
            "config.json": content,
            "linked": content,
            "dangling": "unreadable",
            os.path.join("deep", "weights"): f"{2 << 20}",
        },
    }
    assert path_content(str(model / "config.json")).files == {"config.json": content}
    assert path_content(str(tmp_path / "none")).kind == "missing"
    runs = output_folder(str(tmp_path / "runs" / "new"))
    assert (runs.existing, runs.writable) == (str(tmp_path), True) and runs.free_bytes > 0


def test_a_source_hash_sees_names_and_content(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    first = source_hash(tmp_path)
    (tmp_path / "notes.txt").write_text("not code")
    assert source_hash(tmp_path) == first
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    second = source_hash(tmp_path)
    (tmp_path / "b.py").write_text("x = 2\n")
    assert len({first, second, source_hash(tmp_path)}) == 3


def test_addresses() -> None:
    assert "127.0.0.1" in resolve("localhost") or "::1" in resolve("localhost")
    assert resolve("no-such-host.invalid") == [] and address_towards("no-such-host.invalid") is None
    assert address_towards("127.0.0.1") == "127.0.0.1"
    assert is_loopback("127.0.1.1") and is_loopback("::1") and not is_loopback("192.0.2.1")
