"""The command of each launcher: what it says, and that words and variables get through real shells unharmed.

The hosts are played by a program called `ssh`, which runs what it is given in a shell here, as sshd does there.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launcher_jobs import given, hosts_here, make_job, start, write_program

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.cluster.forwarded_env import pdsh_word
from megatron_tiedlora.cluster.routes import Job, StartPlan, plan_start
from megatron_tiedlora.config.hosts import Host

NASTY = (
    "plain",
    "two words",
    "$HOME",
    "`id`",
    "$(id)",
    "it's",
    'say "hi"',
    'a "b" $c \\d `e`',
    "back\\slash",
    "ends\\",
    "semi;colon&and|or",
    "a>b<c",
    "*?[a]",
    "{a,b}",
    "~root",
    "#no comment",
    "!bang",
    "50%",
    "%h %n %u %%",
    "%n",
    "--x=y z",
    "",
    "Frage: {question}\\nAntwort:",
    "déjà vu",
)


def words(plan: StartPlan) -> list[str]:
    assert len(plan.commands) == 1
    return list(plan.commands[0].words)


def follows(command: list[str], *expected: str) -> bool:
    """Whether `expected` stands in the command, in one piece."""
    return any(tuple(command[index : index + len(expected)]) == expected for index in range(len(command)))


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment in which every host is this one."""
    environment = hosts_here(tmp_path)
    monkeypatch.setenv("HOME", environment["HOME"])
    return environment


# Through shells ----------------------------------------------------------------------------------------------------


@pytest.mark.distributed
def test_words_and_variables_get_through_pdsh_and_deepspeed(tmp_path: Path, hosts: dict[str, str]) -> None:
    """DeepSpeed's own runner and launcher, which parse our file and put the words into a shell's command."""
    variables = {"NCCL_A": "1", "TORCH_B": "two words; #3 & (4)", "HF_HOME": "/50%/%h", "OMP_C": "it's=x", "DS_D": ""}
    secret = {"HF_TOKEN": "s3cret", "MLFLOW_TRACKING_PASSWORD": "s3cret", "PYTHONBAD": "a$b"}
    job = make_job(tmp_path / "job", arguments=NASTY)
    plan = plan_start(job, {**hosts, **variables, **secret})
    assert "s3cret" not in "".join(plan.files.values()) and sorted(line.split()[0] for line in plan.notes) == [
        "HF_TOKEN",
        "MLFLOW_TRACKING_PASSWORD",
        "PYTHONBAD",
    ]
    printed = start(plan, job.folder)
    assert "s3cret" not in printed
    for rank in (0, 1):
        found = given(job, rank)
        assert found["argv"] == ["--local_rank=0", *NASTY]
        assert {name: found["environment"].get(name) for name in variables} == variables
        assert not secret.keys() & found["environment"].keys()
        assert found["environment"]["MEGATRON_TIEDLORA_RUN_ID"] == "abc123"
        assert found["environment"]["MEGATRON_TIEDLORA_EXPECTED_RANKS"] == "2" == found["environment"]["WORLD_SIZE"]
        assert (found["environment"]["MASTER_ADDR"], found["environment"]["MASTER_PORT"]) == ("10.0.0.1", "29400")
        assert found["folder"] == str(job.folder)


def test_words_and_variables_get_through_ssh_to_torchruns_agents(tmp_path: Path, hosts: dict[str, str]) -> None:
    agent = write_program(
        tmp_path / "programs",
        "agent",
        f'#!/bin/sh\nwhile [ "${{1##*dump.py}}" ]; do shift; done\nexec {sys.executable} "$@"\n',
    )
    variables = {"NCCL_A": "a\nb", "TORCH_B": "$x `y` \"z\" 'q' \\", "HF_HOME": "/50%/%h"}
    job = make_job(tmp_path / "job", launcher="torchrun", arguments=(*NASTY, "a\nb"), python=str(agent))
    plan = plan_start(job, {**hosts, **variables, "HF_TOKEN": "s3cret"})
    assert [command.name for command in plan.commands] == ["torchrun on node1", "torchrun on node2"]
    assert not any("s3cret" in word for command in plan.commands for word in command.words)
    start(plan, job.folder)
    found = given(job, 0)
    assert found["argv"] == [*NASTY, "a\nb"]
    assert {name: found["environment"].get(name) for name in variables} == variables
    assert found["environment"]["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert found["folder"] == str(job.folder)


@pytest.mark.distributed
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun is not installed")
@pytest.mark.parametrize("launcher", ["mpirun", "openmpi"])
def test_words_and_variables_get_through_mpirun(tmp_path: Path, hosts: dict[str, str], launcher: str) -> None:
    nccl = "two words" if launcher == "mpirun" else "=mlx5_0:1,mlx5_1:1"
    variables = {"NCCL_A": nccl, "TORCH_B": "$x `y` \"z\" 'q' \\ %h", "HF_HOME": "/data"}
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    job = make_job(
        tmp_path / "job", launcher=launcher, route="local", hosts=(Host("localhost", 2),), arguments=NASTY[:-3],
        launcher_args=("--mca", "btl_tcp_if_include", "lo"),
    )  # fmt: skip
    around = {"RANK": "5", "LOCAL_RANK": "5", "WORLD_SIZE": "6"}  # the shell may be a rank of something itself
    plan = plan_start(job, {**hosts, **variables, **allowed, **around, "HF_TOKEN": "s3cret", "HYDRA_X": "1"})
    start(plan, job.folder)
    for rank in (0, 1):
        found = given(job, rank)
        assert found["argv"] == list(NASTY[:-3]) and not around.keys() & found["environment"].keys()
        assert {name: found["environment"].get(name) for name in variables} == variables
        assert found["environment"]["MEGATRON_TIEDLORA_RUN_ID"] == "abc123"
        assert found["environment"]["MASTER_ADDR"] == "10.0.0.1"


@pytest.mark.parametrize("word", NASTY)
def test_a_word_for_pdsh_survives_deepspeed_pdsh_and_the_shell(word: str) -> None:
    quoted = pdsh_word(word)
    if " " in quoted:  # PDSHRunner.parse_user_args
        quoted = '"{}"'.format(quoted.replace('"', '\\"'))
    expanded = quoted.replace("%%", "\0")
    assert "%" not in expanded
    text = f"printf %s {expanded}".replace("\0", "%")
    done = subprocess.run(["sh", "-c", f"{text}; echo ."], capture_output=True, text=True, check=True, timeout=10)
    assert done.stdout == f"{word}.\n"


@pytest.mark.parametrize("word", ["a\nb", "a\rb", "\x00"])
def test_a_word_with_a_line_break_belongs_into_a_file(word: str) -> None:
    with pytest.raises(UserError, match="a YAML file for --config"):
        pdsh_word(word)


@pytest.mark.parametrize("name", ["a b", "a$b", "a'b", "a%n"])
def test_a_folder_that_deepspeed_does_not_quote_is_refused_for_pdsh(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=r"the current folder .* holds characters that DeepSpeed"):
        plan_start(make_job(tmp_path / "job", folder=tmp_path / name), {})
    for launcher in ("mpirun", "torchrun"):
        plan_start(make_job(tmp_path / "job", launcher=launcher, folder=tmp_path / name), {})


def test_a_folder_that_deepspeed_quotes_is_refused_for_openmpi(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^PYTHONPATH, with the current folder before it, .* use --launcher mpirun$"):
        plan_start(make_job(tmp_path / "job", launcher="openmpi", folder=tmp_path / "a b"), {})
    plan_start(make_job(tmp_path / "job", launcher="openmpi", folder=tmp_path / "a%n"), {})


@pytest.mark.parametrize("name", ["NCCL_IB_HCA", "PYTHONPATH", "UCX_NET_DEVICES", "MLFLOW_RUN"])
@pytest.mark.parametrize("value", ["^mlx5_3", "a b", "a;b"])
def test_a_variable_that_deepspeed_would_quote_for_mpirun_is_refused(tmp_path: Path, name: str, value: str) -> None:
    with pytest.raises(UserError, match=rf"^{name}.* quotes .*use --launcher mpirun$"):
        plan_start(make_job(tmp_path / "job", launcher="openmpi"), {name: value})
    plan_start(make_job(tmp_path / "job", launcher="mpirun"), {name: value})


# Commands ------------------------------------------------------------------------------------------------------------


def rank_of(job: Job) -> tuple[str, ...]:
    return (job.python, "-u", job.script, *job.arguments)


def test_local(tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", launcher="local", route="local", hosts=(Host("localhost", 2),))
    plan = plan_start(job, {"HF_TOKEN": "mine", "A": "1"})
    command = words(plan)
    assert Path(command[0]).name == "deepspeed" and command[-3:] == [job.script, *job.arguments]
    assert follows(command, "--hostfile", str(job.hostfile)) and plan.files == {job.hostfile: "localhost slots=2\n"}
    assert plan.environment["HF_TOKEN"] == "mine"  # this machine is the user's own
    assert "--include" not in command and "--no_ssh_check" in command
    some = plan_start(make_job(tmp_path / "job", launcher="local", hosts=(Host("localhost", 2),), gpus=("3", "5")), {})
    assert follows(words(some), "--include", "localhost:3,5") and list(some.files.values()) == ["localhost slots=6\n"]


def test_pdsh(tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", ssh_port=2222, launcher_args=("-t", "5"))
    plan = plan_start(job, {"PDSH_SSH_ARGS_APPEND": "-o ConnectTimeout=99 -i key"})
    command = words(plan)
    assert follows(command, "--ssh_port", "2222") and "--launcher_args=-t 5" in command
    assert "--force_multi" in command  # also a single host of a hostfile is reached by ssh
    ssh = plan.environment["PDSH_SSH_ARGS_APPEND"]
    assert ssh.startswith("-o ConnectTimeout=99 -i key -o ")  # ssh takes the first of two values
    for option in (
        "ServerAliveInterval=",
        "ServerAliveCountMax=",
        "ConnectTimeout=",
        "BatchMode=yes",
        "ControlPath=none",
    ):
        assert f"-o {option}" in ssh
    assert plan.files[Path(plan.environment["DS_ENV_FILE"])].splitlines() == [
        "PYTHONPATH=",
        "MEGATRON_TIEDLORA_RUN_ID=abc123",
        "MEGATRON_TIEDLORA_EXPECTED_RANKS=2",
        "PYTHONSAFEPATH=1",
    ]
    assert plan.files[job.hostfile] == "node1 slots=1\nnode2 slots=1\n"


def test_mpirun(tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", launcher="mpirun", hosts=(Host("a", 2), Host("b", 2)), ssh_port=22)
    plan = plan_start(job, {"OMP_NUM_THREADS": "2", "HF_TOKEN": "s3cret"})
    command = words(plan)
    assert command[:5] == ["mpirun", "-np", "4", "--hostfile", str(job.hostfile)]
    assert (
        follows(command, *rank_of(job))
        and follows(command, "--map-by", "slot")
        and follows(command, "--bind-to", "none")
    )
    for name in ("OMP_NUM_THREADS", "MEGATRON_TIEDLORA_RUN_ID", "MASTER_ADDR", "MASTER_PORT"):
        assert follows(command, "-x", name)
    assert "HF_TOKEN" not in command and not any("s3cret" in word for word in command)
    for name in ("PRTE_MCA_plm_ssh_agent", "OMPI_MCA_plm_rsh_agent"):
        assert "-o ServerAliveInterval=" in plan.environment[name] and plan.environment[name].endswith("-p 22")
    own = plan_start(job, {"OMPI_MCA_plm_rsh_agent": "mine"}).environment
    assert own["OMPI_MCA_plm_rsh_agent"] == "mine" and "PRTE_MCA_plm_ssh_agent" not in own


def test_mpirun_as_root_is_the_users_decision(tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", launcher="mpirun")
    for name in ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"):
        assert name not in plan_start(job, {}).environment
        assert follows(words(plan_start(job, {name: "1"})), "-x", name)


def test_openmpi(tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", launcher="openmpi")
    plan = plan_start(job, {"HF_HOME": "/a b", "PYTHONPATH": "/src", "NCCL_SOCKET_IFNAME": "ib0"})
    arguments = next(word for word in words(plan) if word.startswith("--launcher_args="))
    assert "-x HF_HOME" in arguments and "-x PYTHONPATH" not in arguments  # DeepSpeed passes the latter on itself
    assert "-x NCCL_SOCKET_IFNAME" in arguments  # which DeepSpeed does not pass on from a host without GPUs
    assert "--mca btl_tcp_if_include ib0" in arguments  # its own choice is eth0
    assert plan.files[Path(plan.environment["DS_ENV_FILE"])] == "PYTHONPATH=/src\n"
    chosen = make_job(tmp_path / "job", launcher="openmpi", launcher_args=("--mca", "btl_tcp_if_include", "eno1"))
    arguments = next(word for word in words(plan_start(chosen, {"NCCL_SOCKET_IFNAME": "ib0"})) if "btl_tcp" in word)
    assert "eno1" in arguments and "ib0" not in arguments
    assert "btl_tcp" not in " ".join(words(plan_start(job, {"GLOO_SOCKET_IFNAME": "^docker0"})))


def test_srun(tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", launcher="srun", route="srun", hosts=(Host("a", 4), Host("b", 4)), master_addr="")
    command = words(plan_start(job, {}))
    assert {"--kill-on-bad-exit=1", "--export=ALL", "--nodes=2", "--ntasks=8", "--ntasks-per-node=4"} <= set(command)
    assert "--nodelist=a,b" in command and follows(command, *rank_of(job))
    uneven = make_job(tmp_path / "job", launcher="srun", route="srun", hosts=(Host("a", 4), Host("b", 1)))
    command = words(plan_start(uneven, {}))
    assert "--ntasks=5" in command and not any(word.startswith("--ntasks-per-node") for word in command)
    assert plan_start(uneven, {}).environment["MASTER_PORT"] == "29400"


def test_torchrun_on_hosts(tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", launcher="torchrun", master_addr="", max_restarts=3, stop_seconds=90)
    plan = plan_start(job, {})
    for command, host in zip(plan.commands, ("node1", "node2"), strict=True):
        assert command.words[0] == "ssh" and command.words[-2] == host
        line = command.words[-1]
        for option in (
            "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-endpoint=node1:29400",
            "--rdzv-id=abc123", "--max-restarts=3", f"--local-addr={host}", "--shutdown-timeout=90", "SIGUSR1",
            f"{job.python} -P -m torch.distributed.run", "PYTHONSAFEPATH=1",
        ):  # fmt: skip
            assert option in line
    old = plan_start(make_job(tmp_path / "job", launcher="torchrun"), {}).commands[0].words[-1]
    assert "--shutdown-timeout" not in old and "--signals-to-handle" not in old


def test_torchrun_by_srun_and_here(tmp_path: Path) -> None:
    hosts = (Host("a", 4), Host("b", 4))
    job = make_job(tmp_path / "job", launcher="torchrun", route="srun", hosts=hosts, master_addr="")
    command = words(plan_start(job, {"SLURM_CPUS_PER_TASK": "3"}))
    assert {"--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=12", "--kill-on-bad-exit=1"} <= set(command)
    assert {"--nproc-per-node=4", "--rdzv-endpoint=a:29400"} <= set(command)
    with pytest.raises(UserError, match="the same number of ranks on every node"):
        plan_start(make_job(tmp_path / "job", launcher="torchrun", route="srun", hosts=(*hosts, Host("c", 1))), {})
    here = make_job(tmp_path / "job", launcher="torchrun", route="local", hosts=hosts[:1], master_addr="127.0.0.1")
    command = words(plan_start(here, {}))
    assert command[:4] == [job.python, "-P", "-m", "torch.distributed.run"]
    assert "--rdzv-endpoint=127.0.0.1:29400" in command
