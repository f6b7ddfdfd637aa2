"""The hosts of a job: from a hostfile, from Slurm's variables, or this machine; and what is refused before a start."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from support.task_files import refusal

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.cluster.doctor import find_job
from megatron_tiedlora.cluster.launchers import plan_start
from megatron_tiedlora.cluster.start import check_num_ranks, choose_hosts, make_job
from megatron_tiedlora.config.job_settings import DoctorSettings, LaunchSettings, parse_launch
from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.runtime.launch_env import (
    Host,
    expand_nodelist,
    is_torchrun,
    read_hostfile,
    slurm_hosts,
)

ALLOCATION = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a1,b-2", "SLURM_TASKS_PER_NODE": "4(x2)"}


def refused(*argv: str) -> str:
    return refusal(lambda: parse_launch(argv))


# Hostfiles ---------------------------------------------------------------------------------------------------------


def hostfile(folder: Path, text: str) -> Path:
    file = folder / "hosts"
    file.write_text(text)
    return file


def test_a_hostfile_is_read_as_the_launchers_read_it(tmp_path: Path) -> None:
    file = hostfile(tmp_path, "# the cluster\nnode1 slots=4\n\n  10.0.0.2   slots=2  # small\n")
    hosts = read_hostfile(file)
    assert hosts == (Host("node1", 4), Host("10.0.0.2", 2))
    assert sum(host.slots for host in hosts) == 6
    from deepspeed.launcher.runner import fetch_hostfile

    assert dict(fetch_hostfile(str(file))) == {host.name: host.slots for host in hosts}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names no host"),
        ("# nothing\n\n", "names no host"),
        ("node1\n", ":1: 'node1' does not have the form"),
        ("node1 slots=2\nnode2 slots=0\n", ":2: 'node2 slots=0' does not have the form"),
        ("node1 slots=two\n", "does not have the form"),
        ("node1 slots=2 max_slots=4\n", "does not have the form"),
        ("-oProxyCommand=x slots=2\n", "does not have the form"),
        ("node1 slots=1000000\n", "with N from 1 to 999999"),
        ("node1 slots=" + "9" * 5000 + "\n", "with N from 1 to 999999"),  # Python's int() would take no such text
        ("node1 slots=٣\n", "does not have the form"),
        ("node\0 slots=2\n", "does not have the form"),
        ("node1 slots=2\nnode1 slots=2\n", ":2: 'node1' appears twice"),
    ],
)
def test_a_hostfile_that_does_not_say_what_it_means_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_hostfile(hostfile(tmp_path, text))


def test_a_missing_hostfile_is_an_error_and_not_a_local_run(tmp_path: Path) -> None:
    settings = parse_launch(["--hostfile", str(tmp_path / "none"), "--launcher", "deepspeed"]).settings
    with pytest.raises(UserError, match="cannot be read"):
        choose_hosts(settings, {})
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="binary: not valid text"):
        read_hostfile(tmp_path / "binary")


@pytest.mark.timeout(60)
def test_a_hostfile_that_may_never_end_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(UserError, match=f"--hostfile {path}: cannot be read \\(not a regular file"):
            read_hostfile(path)
    (tmp_path / "large").write_bytes(b"#" * (2**24 + 1))
    with pytest.raises(UserError, match="large: is larger than"):
        read_hostfile(tmp_path / "large")


def test_the_home_of_a_user_who_is_not_there_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--hostfile '~nosuchuser/hosts': is not a path"):
        read_hostfile("~nosuchuser/hosts")
    monkeypatch.setenv("HOME", str(hostfile(tmp_path, "node1 slots=4\n").parent))
    assert read_hostfile("~/hosts") == (Host("node1", 4),)


# Slurm -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "tasks", "expected"),
    [
        ("a", "3", [("a", 3)]),
        ("a,b,c", "2(x2),1", [("a", 2), ("b", 2), ("c", 1)]),
        ("n.x-1,n2", "1(x2)", [("n.x-1", 1), ("n2", 1)]),
    ],
)
def test_an_allocation_says_its_hosts_and_tasks(nodes: str, tasks: str, expected: list[tuple[str, int]]) -> None:
    found = slurm_hosts({"SLURM_JOB_NODELIST": nodes, "SLURM_TASKS_PER_NODE": tasks})
    assert [(host.name, host.slots) for host in found] == expected


def test_a_step_counts_before_its_allocation() -> None:
    step = {
        "SLURM_PROCID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "b-2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
    }
    assert slurm_hosts({**ALLOCATION, **step}) == (Host("b-2", 2),)
    assert slurm_hosts(ALLOCATION) == (Host("a1", 4), Host("b-2", 4))


@pytest.mark.parametrize("nodes", [",", "n1,", "-o", "n1,-o"])
def test_a_node_list_without_names_is_not_taken_for_hosts(nodes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="scontrol cannot expand"):
        slurm_hosts({**ALLOCATION, "SLURM_JOB_NODELIST": nodes})


def test_variables_of_slurm_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(UserError, match="not in a Slurm allocation"):
        slurm_hosts({})
    with pytest.raises(UserError, match=r": 2 nodes \(a1,b-2\), but numbers of tasks for 1"):
        slurm_hosts({**ALLOCATION, "SLURM_TASKS_PER_NODE": "4"})
    with pytest.raises(UserError, match="cannot be read"):
        slurm_hosts({**ALLOCATION, "SLURM_TASKS_PER_NODE": "4,0"})
    with pytest.raises(UserError, match="cannot be read"):
        slurm_hosts({**ALLOCATION, "SLURM_TASKS_PER_NODE": "many"})


def test_node_lists_in_brackets_are_expanded_by_scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"scontrol cannot expand the node list gpu\[01-02\]"):
        expand_nodelist("gpu[01-02]")
    program = tmp_path / "scontrol"
    program.write_text('#!/bin/sh\n[ "$*" = "show hostnames gpu[01-02]" ] && printf "gpu01\\ngpu02\\n"\n')
    program.chmod(0o755)
    assert expand_nodelist("gpu[01-02]") == ("gpu01", "gpu02")
    with pytest.raises(UserError, match="cannot expand"):
        expand_nodelist("gpu[03]")


# Which launcher, and where ------------------------------------------------------------------------------------------


def test_auto_takes_what_there_is(tmp_path: Path) -> None:
    file = str(hostfile(tmp_path, "a1 slots=2\nb-2 slots=3\n"))
    one = (Host("localhost", 2),)
    assert choose_hosts(LaunchSettings(num_gpus=2), {}) == ("deepspeed", "local", one)
    assert choose_hosts(LaunchSettings(), ALLOCATION) == ("srun", "srun", (Host("a1", 4), Host("b-2", 4)))
    both = (Host("a1", 2), Host("b-2", 3))
    assert choose_hosts(LaunchSettings(hostfile=file), {}) == ("deepspeed", "ssh", both)
    assert choose_hosts(LaunchSettings(hostfile=file), ALLOCATION) == ("deepspeed", "ssh", both)
    assert choose_hosts(LaunchSettings(hostfile=file, num_gpus=1), {})[2] == (Host("a1", 1), Host("b-2", 1))
    assert choose_hosts(LaunchSettings(launcher="torchrun", num_gpus=2), {}) == ("torchrun", "local", one)
    assert choose_hosts(LaunchSettings(launcher="mpirun"), ALLOCATION)[:2] == ("mpirun", "srun")
    assert choose_hosts(LaunchSettings(launcher="torchrun", num_gpus=2), ALLOCATION) == ("torchrun", "local", one)
    assert choose_hosts(LaunchSettings(launcher="deepspeed", num_gpus=2), ALLOCATION) == ("deepspeed", "local", one)
    assert choose_hosts(LaunchSettings(num_gpus=1), ALLOCATION)[2] == (Host("a1", 1), Host("b-2", 1))


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    file = str(hostfile(tmp_path, "a1 slots=2\nb-2 slots=3\n"))
    with pytest.raises(UserError, match="--num_gpus 3: a1 has 2 slots"):
        choose_hosts(LaunchSettings(hostfile=file, num_gpus=3), {})
    with pytest.raises(UserError, match="not in a Slurm allocation"):
        choose_hosts(LaunchSettings(launcher="srun"), {})
    with pytest.raises(UserError, match="Start it once, without srun"):
        choose_hosts(LaunchSettings(), {**ALLOCATION, "SLURM_STEP_NUM_TASKS": "2"})
    assert "remove --hostfile" in refused("--launcher", "srun", "--hostfile", "f")
    assert "starts ranks on this machine only" in refused("--launcher", "torchrun", "--hostfile", "f")
    assert "--launcher pdsh: input should be 'auto', 'deepspeed'" in refused("--launcher", "pdsh")


@pytest.mark.parametrize(
    ("ranks", "settings", "said"),
    [
        (4, {"tensor_parallel": 3}, "4 ranks are not a multiple of --tensor_parallel 3 x --pipeline_parallel 1"),
        (6, {"tensor_parallel": 2, "pipeline_parallel": 2}, "Start 4 or 8 ranks"),
        (5, {}, "--global_batch_size 24 is not a multiple of data parallel 5"),
    ],
)
def test_ranks_that_do_not_fit_the_layout_or_the_batch_start_nothing(
    ranks: int, settings: dict[str, int], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        check_num_ranks(make_settings(settings), ranks)
    check_num_ranks(make_settings(settings), 12)


@pytest.mark.parametrize("given", [[], ["--master_port=12345"], ["--master_port=12345", "--master_addr=10.0.0.9"]])
@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_in_an_allocation_the_ranks_meet_where_run_py_says(tmp_path: Path, launcher: str, given: list[str]) -> None:
    """Not where this shell, Slurm's numbers or the library's one port would have it, whichever launcher starts them."""
    shell = {**ALLOCATION, "MASTER_ADDR": "old", "MASTER_PORT": "29500"}
    command = parse_launch([f"--launcher={launcher}", *given])
    jobs = [replace(make_job(command.settings, shell), program=("train.py",), private=tmp_path) for _ in range(4)]
    ports = {job.master_port for job in jobs}
    assert ports == {12345} if given else len(ports) > 1 and ports <= set(range(20_000, 30_000))
    tried = find_job(DoctorSettings(), shell)
    address = "10.0.0.9" if len(given) == 2 else tried.master_addr
    plan = plan_start(jobs[0], shell)
    words = shlex.join(plan.words)
    assert plan.environment["MASTER_ADDR"] == address and plan.environment["MASTER_PORT"] == str(jobs[0].master_port)
    assert ("--export=ALL" if launcher == "srun" else "-x MASTER_ADDR -x MASTER_PORT") in words


# The command line ---------------------------------------------------------------------------------------------------


def test_own_flags_and_those_of_train_are_told_apart(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("rank: 4\n")
    for argv in (
        ["--num_gpus", "2", "--rank=3", "--config", str(config), "--show_command", "--max_steps", "7"],
        ["--num_gpus", "2", "--show_command", "--", "--rank=3", "--config", str(config), "--max_steps", "7"],
    ):
        command = parse_launch(argv)
        assert command.settings.num_gpus == 2 and command.settings.show_command
        assert (command.train.rank, command.train.max_steps) == (3, 7)
        assert "--num_gpus" not in command.arguments and "--show_command" not in command.arguments
        assert {"--rank=3", "--config", str(config), "--max_steps", "7"} == set(command.arguments)


def test_a_wrong_setting_of_either_costs_nothing() -> None:
    assert "unknown argument --hostfil (did you mean --hostfile?)" in refused("--hostfil", "x")
    assert "unknown argument --max_step (did you mean --max_steps?)" in refused("--max_step", "3")
    assert "--max_steps 0" in refused("--max_steps", "0")
    assert "--launcher" in refused("--launcher", "slurm")
    assert "--show_command" in refused("--dry_run")
    assert "no such file" in refused("--config", os.devnull + ".yaml")
    assert '--launcher_args "a: no closing quotation' in refused("--launcher_args", '"a')


@pytest.mark.parametrize("name", ["grace_seconds", "timeout_minutes"])
def test_a_wait_longer_than_the_clocks_hold_is_refused(name: str) -> None:
    assert f"--{name} 1e14: input should be less than or equal to" in refused(f"--{name}", "1e14")
    parse_launch([f"--{name}", "1440"])


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("python -u -m torch.distributed.run --nnodes 2 train.py", True),
        ("python -P -m torch.distributed.run --nnodes 2 train.py", True),
        ("/env/bin/python /env/bin/torchrun train.py", True),
        ("bash my_torchrun.sh", False),
        ("python train.py --note torchrun", False),
        ("python", False),
    ],
)
def test_which_command_is_torchruns(line: str, found: bool) -> None:
    assert is_torchrun(line.split()) == found
