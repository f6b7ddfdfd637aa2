"""Ranks from whichever launcher's variables, the world that was meant, and which rank of a host says why it failed."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.task_files import refusal

from megatron_tiedlora.runtime import launch_env
from megatron_tiedlora.runtime.launch_env import (
    first_to_fail,
    prepare_environment,
    rank_and_world_size,
    rank_number,
    slurm_port,
)

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
PREFIXES = ("SLURM_", "OMPI_", "PMI_", "MPI_", "TORCHELASTIC_", "GROUP_", "MEGATRON_TIEDLORA_EXPECTED")
SLURM_STEP = {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu7,gpu8",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
}
MPI = {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No launcher's variable is set; the test sets what it wants."""
    for name in [*VARIABLES, *(name for name in os.environ if name.startswith(PREFIXES))]:
        monkeypatch.setenv(name, "")  # so that it is restored, whatever the code under test sets
        monkeypatch.delenv(name)
    return monkeypatch


def start(environment: pytest.MonkeyPatch, **variables: str) -> tuple[int, int]:
    for name, value in variables.items():
        environment.setenv(name, value)
    prepare_environment()
    return rank_and_world_size()


def test_srun_without_any_wrapper(bare: pytest.MonkeyPatch) -> None:
    assert start(bare, **SLURM_STEP) == (3, 4)
    assert [os.environ[name] for name in VARIABLES[2:4]] == ["1", "gpu7"] and rank_number(local=True) == 1
    assert 15_000 <= int(os.environ["MASTER_PORT"]) < 30_000
    assert slurm_port({**os.environ, "SLURM_STEP_ID": "1"}) != int(os.environ["MASTER_PORT"]), "steps beside each other"


# Variables of launchers, (rank, world size), and what is then set.
STARTS: dict[str, tuple[dict[str, str], tuple[int, int], dict[str, str | None]]] = {
    "srun with a master": (
        {**SLURM_STEP, "MASTER_ADDR": "10.0.0.9", "MASTER_PORT": "12345"},
        (3, 4),
        {"MASTER_ADDR": "10.0.0.9", "MASTER_PORT": "12345"},
    ),
    # In a batch script SLURM_PROCID is set as well: a plain python there is a world of one.
    "a batch script": (
        {"SLURM_PROCID": "0", "SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "a,b"}, (0, 1), {}
    ),
    # Its daemons are the step's tasks, so the ranks inherit Slurm's variables of a daemon; RANK is left for discovery.
    "mpirun within a Slurm step": ({**MPI, **SLURM_STEP}, (5, 8), {"RANK": None}),
    "mpirun with a master": (
        {**MPI, "MASTER_ADDR": "head"}, (5, 8), dict(zip(VARIABLES, ("5", "8", "1", "head", "29500"), strict=True))
    ),
    "a launcher's own": ({**SLURM_STEP, "RANK": "1", "WORLD_SIZE": "2"}, (1, 2), {}),
    "nothing": ({}, (0, 1), {}),
}  # fmt: skip


@pytest.mark.parametrize("case", STARTS)
def test_ranks_are_those_of_the_launcher(bare: pytest.MonkeyPatch, case: str) -> None:
    variables, ranks, expected = STARTS[case]
    assert start(bare, **variables) == ranks
    assert {name: os.environ.get(name) for name in expected} == expected
    assert not case.startswith("mpirun") or rank_number(local=True) == 1


@pytest.mark.parametrize("world", ["1", "4"])
def test_another_world_than_was_meant_is_refused(bare: pytest.MonkeyPatch, world: str) -> None:
    said = refusal(start, bare, RANK="0", WORLD_SIZE=world, MEGATRON_TIEDLORA_EXPECTED_RANKS="2")
    assert f"the world size of this rank is {world}, but 2 ranks should have started" in said
    assert start(bare, RANK="0", WORLD_SIZE="2") == (0, 2)


@pytest.mark.parametrize("said", ["2x8", "2.0", "-2", "²", "two", "9" * 5000])
def test_an_expected_world_that_is_no_number_is_refused(bare: pytest.MonkeyPatch, said: str) -> None:
    refused = refusal(start, bare, RANK="0", WORLD_SIZE="2", MEGATRON_TIEDLORA_EXPECTED_RANKS=said)
    assert refused.startswith("MEGATRON_TIEDLORA_EXPECTED_RANKS=") and "is not a number of ranks; correct it" in refused


def test_blanks_around_the_expected_world_are_passed_over(bare: pytest.MonkeyPatch) -> None:
    for said in ("2 ", " 2\n", "", " "):
        assert start(bare, RANK="0", WORLD_SIZE="2", MEGATRON_TIEDLORA_EXPECTED_RANKS=said) == (0, 2)
    message = refusal(start, bare, MEGATRON_TIEDLORA_EXPECTED_RANKS="4 ")
    assert "the world size of this rank is 2, but 4 ranks" in message


@dataclass(frozen=True)
class Runner:
    """The `deepspeed` command above a rank, as psutil tells of it."""

    words: str
    folder: Path

    def cmdline(self) -> list[str]:
        return self.words.split()

    def cwd(self) -> str:
        return str(self.folder)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("deepspeed --hostfile hosts train.py", "--hostfile hosts has 6 slots, but 2 ranks started"),
        ("deepspeed -H hosts train.py", "--hostfile hosts has 6 slots, but 2 ranks started"),
        ("deepspeed --hostfile=hosts train.py", "--hostfile hosts has 6 slots, but 2 ranks started"),
        ("deepspeed --hostfile two train.py", ""),
        ("deepspeed --hostfile hosts --num_gpus 1 train.py", ""),
        ("deepspeed --hostfile hosts --include=node1 train.py", ""),
        ("deepspeed train.py --hostfile hosts", ""),
        ("deepspeed --hostfile none train.py", "none: cannot be read"),
        ("deepspeed --hostfile ~nosuchuser/hosts train.py", "is not a path"),
    ],
)
def test_slots_of_deepspeeds_hostfile_are_the_world(
    bare: pytest.MonkeyPatch, tmp_path: Path, words: str, said: str
) -> None:
    (tmp_path / "hosts").write_text("node1 slots=2\nnode2 slots=4\n")
    (tmp_path / "two").write_text("node1 slots=1\nnode2 slots=1\n")
    bare.setattr(launch_env, "deepspeed_runner", lambda: Runner(f"python {words}", tmp_path))
    ranks = {"RANK": "0", "WORLD_SIZE": "2"}
    if said:
        assert said in refusal(start, bare, **ranks)
    else:
        assert start(bare, **ranks) == (0, 2)


def test_torchruns_of_one_step_that_do_not_know_of_each_other_are_refused(bare: pytest.MonkeyPatch) -> None:
    alone = {**SLURM_STEP, "RANK": "0", "WORLD_SIZE": "1", "GROUP_WORLD_SIZE": "1"}
    said = refusal(start, bare, **alone, TORCHELASTIC_RUN_ID="none")
    assert "4 tasks, but their torchruns are not connected" in said
    assert start(bare, **alone, TORCHELASTIC_RUN_ID="job1") == (0, 1), "what is left of an elastic job"


def test_torchrun_with_restarts_needs_a_new_store_for_each(bare: pytest.MonkeyPatch) -> None:
    elastic = {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "3"}
    said = refusal(start, bare, **elastic, TORCHELASTIC_USE_AGENT_STORE="True")
    assert "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in said
    assert start(bare, **elastic, TORCHELASTIC_USE_AGENT_STORE="False") == (0, 2)
    assert start(bare, TORCHELASTIC_MAX_RESTARTS="0", TORCHELASTIC_USE_AGENT_STORE="True") == (0, 2)


# Who speaks --------------------------------------------------------------------------------------------------------


@pytest.fixture
def marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This is rank 1 of 2; the folder of the marks."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    return tmp_path


def test_the_first_of_a_host_speaks_and_another_run_for_itself(marks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert first_to_fail()
    monkeypatch.setenv("RANK", "0")  # whichever it is
    assert not first_to_fail() and not first_to_fail()
    for name, value in (("MASTER_PORT", "29501"), ("TORCHELASTIC_RESTART_COUNT", "1")):
        monkeypatch.setenv(name, value)
        assert first_to_fail() and not first_to_fail()
    assert len(list(marks.iterdir())) == 3


def test_a_rank_that_is_alone_always_speaks(monkeypatch: pytest.MonkeyPatch, marks: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert first_to_fail() and first_to_fail()
    monkeypatch.delenv("WORLD_SIZE")  # before any launcher's variables are there
    assert first_to_fail() and first_to_fail()
    assert not list(marks.iterdir())


def test_what_earlier_runs_left_is_removed(marks: Path) -> None:
    assert first_to_fail()
    (mark,) = marks.iterdir()
    os.utime(mark, (0, 0))
    assert first_to_fail()
    assert len(list(marks.iterdir())) == 1


def test_a_folder_that_cannot_be_written_silences_nobody(monkeypatch: pytest.MonkeyPatch, marks: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(marks / "missing"))
    assert first_to_fail() and first_to_fail()


def test_a_mark_that_a_peer_removes_meanwhile_makes_nobody_speak_twice(marks: Path) -> None:
    (marks / f"megatron_tiedlora-failed-{os.getuid()}-1").symlink_to(marks / "gone")  # listed, and not there
    assert first_to_fail() and not first_to_fail()
