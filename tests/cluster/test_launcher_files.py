"""The files that users start from: batch scripts, the example hostfile, the manifests of Kubernetes and SkyPilot."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.folders import ROOT
from support.launcher_jobs import write_program

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.commands.front import call
from megatron_tiedlora.config.cli import parse_settings
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.runtime.launch_env import Host, read_hostfile
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
    rank = "srun <--kill-on-bad-exit=1> <--wait=60> </venv/bin/python> <-u> <-m> <megatron_tiedlora> <train>"
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
    " <--shutdown-timeout> <150> <-m> <megatron_tiedlora> <train>"
)
STOPPED = {"state": "stopped", "step": 4, "reason": "SIGUSR1"}


@pytest.mark.parametrize(
    ("end", "requeued", "words"),
    [
        (STOPPED, True, ["--task", "my task"]),
        ({**STOPPED, "reason": "SIGUSR1 before a step of this start"}, False, []),
        ({**STOPPED, "reason": "signals"}, False, []),
        ({**STOPPED, "reason": "SIGTERM or the launcher's end"}, False, []),
        ({**STOPPED, "state": "failed", "reason": 'ValueError: "SIGUSR1"'}, False, []),
        ({**STOPPED, "state": "finished", "reason": ""}, False, []),
        (None, False, []),
        (STOPPED, True, ["--output_dir", "my runs/a"]),
        (STOPPED, True, ["--output_dir=my runs/a"]),
        (STOPPED, True, ["--output_dir=~/my runs/a"]),
    ],
)
def test_the_batch_script_of_torchrun_asks_the_run_folder(
    tmp_path: Path, end: dict[str, Any] | None, requeued: bool, words: list[str]
) -> None:
    """Of this start, and the one that it was given: what an earlier one has left there does not count."""
    is_given = "my runs" in str(words)
    place = "my runs/a" if is_given else "runs/tiedlora-42"
    folder = RunFolder(tmp_path / place)
    folder.path.mkdir(parents=True)
    if not is_given:
        folder.write_status(**STOPPED)
    ended = 'echo "ranks $MEGATRON_TIEDLORA_EXPECTED_RANKS"\n'
    if end is not None:
        RunFolder(tmp_path / "end").path.mkdir()
        RunFolder(tmp_path / "end").write_status(**end)
        ended += f"cp '{tmp_path}/end/run_status.json' '{folder.path}'\n"
    variables = {"SLURM_NNODES": "2", **({"RANKS_PER_NODE": "1"} if is_given else {"SLURM_GPUS_ON_NODE": "8"})}
    found, calls = run_batch_script(
        tmp_path, "slurm_torchrun.sbatch", words, srun=f"{ended}exit 1\n", variables=variables
    )
    shown = str(folder.path) if "~" in str(words) else place
    given = " ".join(f"<{word}>" for word in ("--output_dir", shown, *words, "--resume", "auto"))
    requeue = ["scontrol <requeue> <42>"] if requeued else []
    assert found == 1
    torchrun, ranks = (TORCHRUN.replace("<8>", "<1>"), 2) if is_given else (TORCHRUN, 16)
    assert calls == ["scontrol <show> <hostnames>", f"{torchrun} {given}", f"ranks {ranks}", *requeue]


@pytest.mark.parametrize("script", ["slurm.sbatch", "slurm_torchrun.sbatch"])
def test_the_batch_scripts_ask_slurm_for_what_a_requeue_needs(script: str) -> None:
    lines = (LAUNCH / script).read_text().splitlines()
    options = [line.split()[1] for line in lines if line.startswith("#SBATCH")]
    assert {"--requeue", "--open-mode=append", "--signal=USR1@180"} <= set(options)
    # Slurm reads options up to the first command.
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(number < first_command for number, line in enumerate(lines) if line.startswith("#SBATCH"))


# The manifest ---------------------------------------------------------------------------------------------------------

# Documented fields of PyTorchJob v1 (training operator) and of pods; each is there, and no others: the texts that
# one may have, as a regular expression, or its type. A number is not below 0.
JOB: dict[str, str | type] = {
    "apiVersion": r"kubeflow\.org/v1",
    "kind": "PyTorchJob",
    "metadata.name": "[a-z]([-a-z0-9]{0,61}[a-z0-9])?",  # a DNS-1035 label
    "spec.nprocPerNode": "auto|cpu|gpu|[1-9][0-9]*",
    "spec.runPolicy.backoffLimit": int,
    "spec.runPolicy.cleanPodPolicy": "All|Running|None",
    "spec.runPolicy.ttlSecondsAfterFinished": int,
}
REPLICA: dict[str, str | type] = {
    "replicas": int,
    "restartPolicy": "Always|OnFailure|Never|ExitCode",
    "template.spec.terminationGracePeriodSeconds": int,
    "template.spec.containers[].name": "pytorch",  # which the operator asks for
    "template.spec.containers[].image": ".+",
    "template.spec.containers[].imagePullPolicy": "Always|IfNotPresent|Never",
    **dict.fromkeys((f"template.spec.containers[].{name}" for name in ("workingDir", "command[]", "args[]")), ".+"),
    "template.spec.containers[].env[].name": "[A-Z_]+",
    "template.spec.containers[].env[].value": ".+",
    **{f"template.spec.containers[].env[].valueFrom.secretKeyRef.{name}": ".+" for name in ("name", "key")},
    "template.spec.containers[].env[].valueFrom.secretKeyRef.optional": bool,
    "template.spec.containers[].resources.limits.nvidia.com/gpu": int,
    "template.spec.containers[].volumeMounts[].name": ".+",
    "template.spec.containers[].volumeMounts[].mountPath": "/.+",
    "template.spec.volumes[].name": ".+",
    "template.spec.volumes[].persistentVolumeClaim.claimName": ".+",
    "template.spec.volumes[].emptyDir.medium": "|Memory",
    "template.spec.volumes[].emptyDir.sizeLimit": "[0-9]+(Mi|Gi)",
}


def manifest() -> Any:
    return yaml.safe_load((LAUNCH / "kubernetes" / "pytorchjob.yaml").read_text(encoding="utf-8"))


def values_of(content: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is no container, with its path: `a.b[].c`."""
    if isinstance(content, dict) and content:
        for name, inner in content.items():
            yield from values_of(inner, f"{path}.{name}".removeprefix("."))
    elif isinstance(content, list) and content:
        for inner in content:
            yield from values_of(inner, f"{path}[]")
    else:
        yield path, content


def check_manifest(content: Any) -> None:
    """Fail where the operator or Kubernetes would refuse the job, or where a secret stands in clear."""
    replicas = content["spec"].pop("pytorchReplicaSpecs")
    assert replicas.keys() == {"Master", "Worker"}
    assert replicas["Master"]["replicas"] == 1 <= replicas["Worker"]["replicas"]
    for fields, part in ((JOB, content), *((REPLICA, replica) for replica in replicas.values())):
        found = list(values_of(part))
        assert {path for path, _ in found} == fields.keys()
        for path, value in found:
            kind = fields[path]
            if isinstance(kind, str):
                assert isinstance(value, str) and re.fullmatch(kind, value), f"{path} is {value!r}"
            else:
                assert type(value) is kind and value >= 0, f"{path} is {value!r}"
    for replica in replicas.values():
        pod = replica["template"]["spec"]
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} == {one["name"] for one in pod["volumes"]}
            for variable in container["env"]:
                assert ("value" in variable) != ("valueFrom" in variable), variable
                assert "valueFrom" in variable or not SECRET.search(variable["name"]), "a secret stands in clear"


def test_the_manifest_holds_documented_fields_alone() -> None:
    check_manifest(manifest())
    spec = manifest()["spec"]
    master, worker = (spec["pytorchReplicaSpecs"][name] for name in ("Master", "Worker"))
    container = master["template"]["spec"]["containers"][0]
    assert container["command"] == ["torchrun", "--no-python", "tiedlora", "train"]
    settings = parse_settings(container["args"], Settings)
    shared = next(mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "data")
    assert settings.resume == "auto" and str(settings.output_dir).startswith(f"{shared}/")
    values = {variable["name"]: variable.get("value") for variable in container["env"]}
    grace = master["template"]["spec"]["terminationGracePeriodSeconds"]
    assert 30 < int(values["PET_SHUTDOWN_TIMEOUT"]) < grace  # torchrun must not kill first, nor Kubernetes
    ranks = int(spec["nprocPerNode"])
    assert int(values["MEGATRON_TIEDLORA_EXPECTED_RANKS"]) == (master["replicas"] + worker["replicas"]) * ranks
    assert int(container["resources"]["limits"]["nvidia.com/gpu"]) == ranks


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec elasticpolicy", {}),
        ("spec nprocPerNode", 8),
        ("spec pytorchReplicaSpecs Master replicas", 2),
        ("spec pytorchReplicaSpecs Worker restartPolicy", "onFailure"),
        ("spec runPolicy cleanPodPolicy", None),
        ("metadata name", "Tied_LoRA"),
        ("spec pytorchReplicaSpecs Worker template spec containers 0 env 3", {"name": "HF_TOKEN", "value": "hf_abc"}),
    ],
)
def test_what_the_operator_would_refuse_is_refused_here(path: str, value: Any) -> None:
    content = place = json.loads(json.dumps(manifest()))  # whose replicas share no object
    *way, last = (int(step) if step.isdigit() else step for step in path.split())
    for step in way:
        place = place[step]
    place[last] = value
    with pytest.raises(AssertionError):
        check_manifest(content)


def test_the_train_job_is_the_job_of_the_operator_for_kubeflow_trainer() -> None:
    """Documented fields of its API v1alpha1, and the pod and the settings of the manifest above."""
    text = (LAUNCH / "kubernetes" / "trainjob.yaml").read_text(encoding="utf-8")
    runtime, job = yaml.safe_load_all(text)
    pod = manifest()["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
    (container,) = pod["containers"]
    trainer = {name: container.pop(name) for name in ("command", "args", "image")}
    gpus, _ = container.pop("resources"), container.pop("imagePullPolicy")
    (ranks,) = (int(one["value"]) for one in container["env"] if one["name"] == "MEGATRON_TIEDLORA_EXPECTED_RANKS")
    (nodes, of_node), name = (2, ranks // 2), manifest()["metadata"]
    container["name"] = "node"  # which Trainer asks for
    template = {"spec": {**pod, "restartPolicy": "Never"}}
    labels = {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    replicated = {"metadata": {"labels": labels}, "spec": {"backoffLimit": 0, "template": template}}
    jobs = {"failurePolicy": {"maxRestarts": 10}, "replicatedJobs": [{"name": "node", "template": replicated}]}
    policy, version = {"numNodes": nodes, "torch": {}}, {"apiVersion": "trainer.kubeflow.org/v1alpha1"}
    assert runtime == {
        **{**version, "kind": "TrainingRuntime", "metadata": name},
        "spec": {"mlPolicy": policy, "template": {"spec": jobs}},
    }
    trainer |= {"numNodes": nodes, "numProcPerNode": of_node, "resourcesPerNode": gpus}
    spec = {"runtimeRef": {"kind": "TrainingRuntime", **name}, "trainer": trainer}
    assert job == {**version, "kind": "TrainJob", "metadata": name, "spec": spec}


def test_the_run_of_skypilot_starts_our_ranks(tmp_path: Path) -> None:
    """With the variables that SkyPilot sets on a node, and in a managed job that recovers."""
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text(encoding="utf-8"))
    assert task.keys() == {"name", "num_nodes", "resources", "file_mounts", "envs", "secrets", "run"}
    (tmp_path / "run").write_text(task["run"])
    write_program(tmp_path / "bin", "torchrun", f'{CALLED}echo "ranks $MEGATRON_TIEDLORA_EXPECTED_RANKS"\n')
    given = {"NUM_NODES": "2", "NODE_RANK": "1", "NUM_GPUS_PER_NODE": "8", "NODE_IPS": "10.0.0.1\n10.0.0.2"}
    variables = {f"SKYPILOT_{name}": value for name, value in given.items()}
    status, calls = run_batch_script(tmp_path, str(tmp_path / "run"), [], srun="", variables=variables | task["envs"])
    assert status == 0
    called, ranks = calls
    flags, _, words = called.partition(" <--no-python> <tiedlora> <train> ")
    rank = "torchrun <--nnodes> <2> <--node-rank> <1> <--nproc-per-node> <8>"
    assert flags == f"{rank} <--master-addr> <10.0.0.1> <--master-port> <29400>"
    settings = parse_settings(re.findall("<(.*?)>", words), Settings)
    assert settings.resume == "auto" and str(settings.output_dir).startswith("/data/") and ranks == "ranks 16"
    assert not any(task["secrets"].values()) and not any(SECRET.search(name) for name in task["envs"])


def test_recipes_are_written_and_what_was_edited_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [file for file in LAUNCH.rglob("*") if file.suffix in (".sbatch", ".yaml", ".example")]
    assert call("recipes", [str(tmp_path / "new")]) == 0
    written = {file.name: file.read_bytes() for file in (tmp_path / "new").iterdir()}
    assert written == {file.name: file.read_bytes() for file in files} and len(written) == 6
    (tmp_path / "new" / "skypilot.yaml").write_text("mine")
    (tmp_path / "new" / "slurm.sbatch").unlink()
    capsys.readouterr()
    assert call("recipes", [str(tmp_path / "new")]) == 1
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and "skypilot.yaml, which differs" in said[0] and said[1].endswith("slurm.sbatch")
    assert (tmp_path / "new" / "skypilot.yaml").read_text() == "mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: cannot be written"):
        call("recipes", [str(tmp_path / "file")])
