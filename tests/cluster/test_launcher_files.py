"""The files that users start from: the batch script, the example hostfile, the Kubernetes manifest."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from folders import ROOT
from launcher_jobs import write_program
from pydantic import BaseModel, ConfigDict, Field, model_validator

from megatron_tiedlora.config.cli import parse_settings
from megatron_tiedlora.config.hosts import Host, read_hostfile
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.runtime.run_folder import RunFolder

LAUNCH = ROOT / "launch"
SECRET = re.compile("TOKEN|SECRET|PASS|CREDENTIAL|KEY")


def test_the_example_hostfile_is_one() -> None:
    assert read_hostfile(LAUNCH / "hostfile.example") == (Host("node1", 8), Host("node2", 8))


# The batch script -----------------------------------------------------------------------------------------------------

# Played by programs on PATH that write down how they were called.
CALLED = """#!/bin/sh
exec 3>&1 >> "$CALLS"
printf "%s" "${0##*/}"
for word; do printf " <%s>" "$word"; done
echo
"""


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (138, True), (1, False), (137, False), (143, False)])
def test_the_batch_script_requeues_what_was_saved_in_time_and_passes_the_rest_on(
    tmp_path: Path, status: int, requeued: bool
) -> None:
    ended = f'echo "ranks $MEGATRON_TIEDLORA_EXPECTED_RANKS"\nexit {status}\n'
    words = ["--train_file", "my data.jsonl", "--resume", "none"]
    found, calls = run_batch_script(tmp_path, "slurm.sbatch", words, srun=ended, variables={"SLURM_NTASKS": "16"})
    assert found == status
    rank = "srun <--kill-on-bad-exit=1> <--wait=60> </venv/bin/python> <-u> <launch/train.py>"
    given = "<--output_dir> <runs/tiedlora-42> <--train_file> <my data.jsonl> <--resume> <none> <--resume> <auto>"
    assert calls == [f"{rank} {given}", "ranks 16", *(["scontrol <requeue> <42>"] if requeued else [])]
    assert parse_settings(["--resume", "none", "--resume", "auto"], Settings).resume == "auto"  # the last one counts


def run_batch_script(
    folder: Path, script: str, words: list[str], *, srun: str, variables: dict[str, str]
) -> tuple[int, list[str]]:
    """The exit status of a batch script in `folder`, and what it called; `srun` is what that program does."""
    write_program(folder / "bin", "srun", CALLED + srun)
    write_program(folder / "bin", "scontrol", f'{CALLED}exec >&3\n[ "$1" = requeue ] || printf "node1\\nnode2\\n"\n')
    environment = {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "HOME": str(folder),
        "CALLS": str(folder / "calls"),
        "SLURM_JOB_ID": "42",
        "SLURM_JOB_NAME": "tiedlora",
        "PYTHON": "/venv/bin/python",
        **variables,
    }
    command = ["bash", str(LAUNCH / script), *words]
    done = subprocess.run(command, env=environment, cwd=folder, timeout=30, capture_output=True, text=True)
    assert not done.stderr, done.stderr
    return done.returncode, (folder / "calls").read_text().splitlines()


TORCHRUN = (
    'srun <--kill-on-bad-exit=1> <--wait=60> <sh> <-c> <exec "$0" -u -P -m torch.distributed.run'
    ' --local-addr="$SLURMD_NODENAME" "$@"> </venv/bin/python> <--nnodes> <2>'
    " <--nproc-per-node> <8> <--max-restarts> <3> <--rdzv-backend> <c10d> <--rdzv-id> <42>"
    " <--rdzv-endpoint> <node1:29400> <--signals-to-handle> <SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1>"
    " <--shutdown-timeout> <150> <launch/train.py>"
)
STOPPED = {"state": "stopped", "step": 4, "reason": "SIGUSR1"}


@pytest.mark.parametrize(
    ("end", "requeued"),
    [
        (STOPPED, True),
        ({**STOPPED, "reason": "SIGUSR1 before a step of this start"}, False),
        ({**STOPPED, "reason": "signals"}, False),
        ({**STOPPED, "reason": "SIGTERM or the launcher's end"}, False),
        ({**STOPPED, "state": "failed", "reason": 'ValueError: "SIGUSR1"'}, False),
        ({**STOPPED, "state": "finished", "reason": ""}, False),
        (None, False),
    ],
)
def test_the_batch_script_of_torchrun_asks_the_run_folder(
    tmp_path: Path, end: dict[str, Any] | None, requeued: bool
) -> None:
    """Of this start: what an earlier one has left there does not count."""
    folder = RunFolder(tmp_path / "runs" / "tiedlora-42")
    folder.path.mkdir(parents=True)
    folder.write_status(**STOPPED)
    ended = 'echo "ranks $MEGATRON_TIEDLORA_EXPECTED_RANKS"\n'
    if end is not None:
        RunFolder(tmp_path / "end").path.mkdir()
        RunFolder(tmp_path / "end").write_status(**end)
        ended += f"cp '{tmp_path}/end/run_status.json' '{folder.path}'\n"
    variables = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8"}
    found, calls = run_batch_script(
        tmp_path, "slurm_torchrun.sbatch", ["--task", "my task"], srun=f"{ended}exit 1\n", variables=variables
    )
    given = "<--output_dir> <runs/tiedlora-42> <--task> <my task> <--resume> <auto>"
    requeue = ["scontrol <requeue> <42>"] if requeued else []
    assert found == 1
    assert calls == ["scontrol <show> <hostnames>", f"{TORCHRUN} {given}", "ranks 16", *requeue]


@pytest.mark.parametrize(
    "words", [["--output_dir", "my runs/a"], ["--output_dir=my runs/a"], ["--output_dir=~/my runs/a"]]
)
def test_the_batch_script_of_torchrun_asks_the_folder_that_it_was_given(tmp_path: Path, words: list[str]) -> None:
    folder = RunFolder(tmp_path / "my runs" / "a")
    folder.path.mkdir(parents=True)
    folder.write_status(**STOPPED)
    folder.status.rename(tmp_path / "end")
    variables = {"SLURM_NNODES": "2", "RANKS_PER_NODE": "1"}
    ended = f"mv '{tmp_path}/end' '{folder.status}'\nexit 1\n"
    _, calls = run_batch_script(tmp_path, "slurm_torchrun.sbatch", words, srun=ended, variables=variables)
    assert calls[-1] == "scontrol <requeue> <42>"


@pytest.mark.parametrize("script", ["slurm.sbatch", "slurm_torchrun.sbatch"])
def test_the_batch_scripts_ask_slurm_for_what_a_requeue_needs(script: str) -> None:
    lines = (LAUNCH / script).read_text().splitlines()
    options = [line.split()[1] for line in lines if line.startswith("#SBATCH")]
    assert {"--requeue", "--open-mode=append", "--signal=USR1@180"} <= set(options)
    # Slurm reads options up to the first command.
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(number < first_command for number, line in enumerate(lines) if line.startswith("#SBATCH"))


# The manifest: documented fields of PyTorchJob v1 (training operator) and of pods, and no others --------------------


class Fields(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SecretKeyRef(Fields):
    name: str
    key: str
    optional: bool = False


class ValueFrom(Fields):
    secretKeyRef: SecretKeyRef


class Variable(Fields):
    name: str
    value: str | None = None
    valueFrom: ValueFrom | None = None

    @model_validator(mode="after")
    def _one_source_and_no_secret_in_clear(self) -> Variable:
        assert (self.value is None) != (self.valueFrom is None), self.name
        assert self.value is None or not SECRET.search(self.name), f"{self.name} stands in clear"
        return self


class Resources(Fields):
    limits: dict[str, int | str]
    requests: dict[str, int | str] = {}


class Mount(Fields):
    name: str
    mountPath: str = Field(pattern="^/")


class Container(Fields):
    name: str
    image: str = Field(min_length=1)
    imagePullPolicy: Literal["Always", "IfNotPresent", "Never"]
    workingDir: str
    command: list[str]
    args: list[str]
    env: list[Variable]
    resources: Resources
    volumeMounts: list[Mount]


class Claim(Fields):
    claimName: str


class EmptyDir(Fields):
    medium: Literal["", "Memory"]
    sizeLimit: str = Field(pattern="^[0-9]+(Mi|Gi)$")


class Volume(Fields):
    name: str
    persistentVolumeClaim: Claim | None = None
    emptyDir: EmptyDir | None = None


class PodSpec(Fields):
    terminationGracePeriodSeconds: int = Field(ge=0)
    containers: list[Container] = Field(min_length=1)
    volumes: list[Volume]

    @model_validator(mode="after")
    def _as_the_operator_asks(self) -> PodSpec:
        assert any(container.name == "pytorch" for container in self.containers)
        volumes = {volume.name for volume in self.volumes}
        for container in self.containers:
            assert {mount.name for mount in container.volumeMounts} == volumes
        return self


class Template(Fields):
    spec: PodSpec


class Replica(Fields):
    replicas: int = Field(ge=1)
    restartPolicy: Literal["Always", "OnFailure", "Never", "ExitCode"]
    template: Template


class Replicas(Fields):
    Master: Replica
    Worker: Replica

    @model_validator(mode="after")
    def _one_master(self) -> Replicas:
        assert self.Master.replicas == 1
        return self


class RunPolicy(Fields):
    backoffLimit: int = Field(ge=0)
    cleanPodPolicy: Literal["All", "Running", "None"]
    ttlSecondsAfterFinished: int = Field(ge=0)


class Spec(Fields):
    nprocPerNode: str = Field(pattern="^(auto|cpu|gpu|[1-9][0-9]*)$")
    runPolicy: RunPolicy
    pytorchReplicaSpecs: Replicas


class Metadata(Fields):
    name: str = Field(pattern="^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=63)  # a DNS-1035 label


class PyTorchJob(Fields):
    apiVersion: Literal["kubeflow.org/v1"]
    kind: Literal["PyTorchJob"]
    metadata: Metadata
    spec: Spec


def manifest() -> Any:
    return yaml.safe_load((LAUNCH / "kubernetes" / "pytorchjob.yaml").read_text(encoding="utf-8"))


def test_the_manifest_holds_documented_fields_alone() -> None:
    job = PyTorchJob.model_validate(manifest(), strict=True)
    container = job.spec.pytorchReplicaSpecs.Master.template.spec.containers[0]
    assert container.command == ["torchrun", "--no-python", "tiedlora", "train"]
    settings = parse_settings(container.args, Settings)
    shared = next(mount.mountPath for mount in container.volumeMounts if mount.name == "data")
    assert settings.resume == "auto" and str(settings.output_dir).startswith(f"{shared}/")
    values = {variable.name: variable.value for variable in container.env}
    grace = job.spec.pytorchReplicaSpecs.Master.template.spec.terminationGracePeriodSeconds
    assert 30 < int(values["PET_SHUTDOWN_TIMEOUT"] or 0) < grace  # torchrun must not kill first, nor Kubernetes
    pods = job.spec.pytorchReplicaSpecs.Master.replicas + job.spec.pytorchReplicaSpecs.Worker.replicas
    assert int(values["MEGATRON_TIEDLORA_EXPECTED_RANKS"] or 0) == pods * int(job.spec.nprocPerNode)
    assert int(container.resources.limits["nvidia.com/gpu"]) == int(job.spec.nprocPerNode)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "elasticpolicy"), {}),
        (("spec", "nprocPerNode"), 8),
        (("spec", "pytorchReplicaSpecs", "Master", "replicas"), 2),
        (("spec", "pytorchReplicaSpecs", "Worker", "restartPolicy"), "onFailure"),
        (("spec", "runPolicy", "cleanPodPolicy"), None),
        (("metadata", "name"), "Tied_LoRA"),
    ],
)
def test_what_the_operator_would_refuse_is_refused_here(path: tuple[str, ...], value: Any) -> None:
    content = manifest()
    place = content
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    with pytest.raises(ValueError):
        PyTorchJob.model_validate(content, strict=True)


def test_a_secret_in_clear_is_noticed() -> None:
    with pytest.raises(ValueError, match="stands in clear"):
        Variable(name="HF_TOKEN", value="hf_abc")
