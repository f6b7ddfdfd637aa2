"""Python files in the current folder, which another user may have put there, are not run by what our commands start."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.folders import ROOT
from support.launcher_jobs import hosts_here, make_job, start
from support.ranks import ENVIRONMENT

from megatron_tiedlora.base.ownership import take_folder
from megatron_tiedlora.cluster.launchers import plan_start
from megatron_tiedlora.cluster.start import make_job as make_sweep_job
from megatron_tiedlora.config.job_settings import parse_launcher
from megatron_tiedlora.runtime.launch_env import Host, free_port
from megatron_tiedlora.study.sweep import begin_job

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(180)]
NAMES = ("deepspeed", "json", "numpy", "psutil", "torch", "yaml")
# What a rank would import, without the seconds that the large ones take: where it would find them.
IMPORTS = f"""
import importlib.util, json, psutil, yaml
for name in {NAMES}:
    assert "/trap/" not in importlib.util.find_spec(name).origin, name
"""


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A folder with modules of names that everybody imports; `check` sees whether one was."""
    folder = tmp_path / "trap"
    folder.mkdir()
    for name in NAMES:
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'a').write('{name} ')\n")
    return folder


def check(trap: Path) -> None:
    """Fail where a module of the folder was imported."""
    sprung = trap.parent / "sprung"
    assert not sprung.exists(), sprung.read_text()


def command(trap: Path, script: str, *flags: object) -> subprocess.CompletedProcess[str]:
    """Run a command of launch/ in the folder."""
    words = [sys.executable, ROOT / "launch" / script, *map(str, flags)]
    environment = {**hosts_here(trap.parent), **ENVIRONMENT, "CUDA_VISIBLE_DEVICES": ""}
    environment = {name: value for name, value in environment.items() if not name.startswith("SLURM_")}
    return subprocess.run(words, env=environment, cwd=trap, capture_output=True, text=True, timeout=150)


def test_the_trap_works(trap: Path) -> None:
    subprocess.run([sys.executable, "-m", "psutil"], cwd=trap, check=False, timeout=30)
    assert (trap.parent / "sprung").exists()


@pytest.mark.parametrize(
    ("launcher", "by_ssh"), [("deepspeed", True), pytest.param("torchrun", False, marks=pytest.mark.slow)]
)
def test_by_what_run_py_starts(trap: Path, launcher: str, by_ssh: bool) -> None:
    """The ranks find no model, after they have imported all that they use."""
    hosts = trap.parent / "hosts"
    hosts.write_text("localhost slots=1\n")
    where = [f"--hostfile={hosts}"] if by_ssh else ["--num_gpus=1"]
    settings = ["--model=./none", "--task=gsm8k", "--global_batch_size=2"]
    done = command(trap, "run.py", f"--launcher={launcher}", *where, *settings)
    assert done.returncode != 0 and "--model ./none: no such folder" in done.stdout + done.stderr
    check(trap)


def test_openmpis_ranks_get_no_current_folder(trap: Path) -> None:
    """By DeepSpeed's own runner; a program plays mpirun, and the environment is what it would set on a host."""
    mpirun = f"""#!{sys.executable}
import os, sys
words = sys.argv[1:]
exported = [words[i + 1] for i, word in enumerate(words) if word == "-x"]
values = dict(word.split("=", 1) for word in exported if "=" in word)
values |= {{word: os.environ[word] for word in exported if "=" not in word}}
os.environ.update(values, OMPI_COMM_WORLD_RANK="0")
os.execvp(sys.executable, words[words.index("-u") - 1 :])
"""
    environment = hosts_here(trap.parent)
    for name in ("mpirun", "ompi_info"):
        (trap.parent / "programs" / name).write_text(mpirun)
        (trap.parent / "programs" / name).chmod(0o755)
    own = {"launcher_args": ("--launcher=openmpi",), "hosts": (Host("node1", 1),)}
    job = make_job(trap.parent / "job", folder=trap, **own)
    Path(job.program[-1]).write_text(f"import sys\nassert {str(trap)!r} not in sys.path, sys.path\n{IMPORTS}")
    start(plan_start(job, environment), trap)
    check(trap)


@pytest.mark.parametrize("hosts", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_by_what_a_sweep_starts(trap: Path, monkeypatch: pytest.MonkeyPatch, hosts: int) -> None:
    monkeypatch.chdir(trap)
    for name, value in hosts_here(trap.parent).items():
        monkeypatch.setenv(name, value)
    (trap.parent / "hosts").write_text("node1 slots=1\n")
    (trap.parent / ".deepspeed_env").write_text("# mine\nMINE=given\n")
    scripts, log = trap.parent / "scripts", trap.parent / "run.log"
    scripts.mkdir()
    mine = "import os, sys\nassert os.environ.get('MINE') == 'given'\n" if hosts else "import sys\n"
    nowhere = f"assert {str(trap)!r} not in sys.path, sys.path\n"
    (scripts / "train.py").write_text(f"{IMPORTS}{mine}{nowhere}print('all imported')\n")
    settings = parse_launcher(["--hostfile", str(trap.parent / "hosts")] if hosts else [])
    job = replace(make_sweep_job(settings, {}), program=(str(scripts / "train.py"),), private=trap.parent)
    with take_folder(trap.parent / "out", hint="") as lock:
        assert begin_job(job, log, lock.descriptor).process.wait(120) == 0, log.read_text()
    assert "all imported" in log.read_text(), log.read_text()
    check(trap)


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_by_the_doctor(trap: Path, launcher: str) -> None:
    flags = ["--tensor_parallel=2", "--allreduce_mb=1", f"--master_port={free_port()}"]
    done = command(trap, "doctor.py", f"--launcher={launcher}", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    check(trap)
