"""The files that users start from: the batch script, the example hostfile, the Kubernetes manifest."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from launcher_jobs import write_program
from pydantic import BaseModel, ConfigDict, Field, model_validator

from megatron_tiedlora.cluster.travelling import is_secret
from megatron_tiedlora.config.cli import parse_settings
from megatron_tiedlora.config.hosts import Host, read_hostfile

LAUNCH = Path(__file__).resolve().parents[1] / "launch"


def test_the_example_hostfile_is_one() -> None:
    assert read_hostfile(LAUNCH / "hostfile.example") == (Host("node1", 8), Host("node2", 8))


# The batch script -----------------------------------------------------------------------------------------------------

# Played by programs on PATH that write down how they were called.
CALLED = """#!/bin/sh
exec >> "$CALLS"
printf "%s" "${0##*/}"
for word; do printf " <%s>" "$word"; done
echo
"""


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (138, True), (1, False), (137, False), (143, False)])
def test_the_batch_script_requeues_what_was_saved_in_time_and_passes_the_rest_on(
    tmp_path: Path, status: int, requeued: bool
) -> None:
    ended = f'echo "ranks $MEGATRON_TIEDLORA_EXPECTED_RANKS"\nexit {status}\n'
    write_program(tmp_path / "bin", "srun", CALLED + ended)
    write_program(tmp_path / "bin", "scontrol", CALLED)
    environment = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "SLURM_JOB_ID": "42",
        "SLURM_JOB_NAME": "tiedlora",
        "SLURM_NTASKS": "16",
        "PYTHON": "/venv/bin/python",
    }
    words = ["--train_file", "my data.jsonl", "--resume", "none"]
    done = subprocess.run(["bash", str(LAUNCH / "slurm.sbatch"), *words], env=environment, timeout=30)
    assert done.returncode == status
    rank = "srun <--kill-on-bad-exit=1> <--wait=60> </venv/bin/python> <-u> <launch/train.py>"
    given = "<--output_dir> <runs/tiedlora-42> <--train_file> <my data.jsonl> <--resume> <none> <--resume> <auto>"
    expected = [f"{rank} {given}", "ranks 16", *(["scontrol <requeue> <42>"] if requeued else [])]
    assert (tmp_path / "calls").read_text().splitlines() == expected
    assert parse_settings(["--resume", "none", "--resume", "auto"]).resume == "auto"  # the last one counts


def test_the_batch_script_asks_slurm_for_what_a_requeue_needs() -> None:
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
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
        assert self.value is None or not is_secret(self.name), f"{self.name} stands in clear"
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
    assert container.command == ["torchrun", "launch/train.py"]
    settings = parse_settings(container.args)
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
