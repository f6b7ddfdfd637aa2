"""The command of each launcher: what it says, and that words and variables get through real shells unharmed.

The hosts are played by a program called `ssh`, which runs what it is given in a shell here, as sshd does there.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from launcher_jobs import given, hosts_here, make_job, start, write_program

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.cluster.launchers import Job, plan_start
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


PLAIN = ("plain", "--x=y,z", "/a-b/c.d:e@f+g", "1e-4", "déjà")


@pytest.mark.distributed
def test_words_and_variables_get_through_pdsh_and_deepspeed(tmp_path: Path, hosts: dict[str, str]) -> None:
    """DeepSpeed's own runner and launcher, which parse our file and put the words into a shell's command."""
    variables = {"NCCL_A": "1", "TORCH_B": "two words; #3 & (4)", "HF_HOME": "/data", "OMP_C": "it's=x"}
    lines = "".join(f"{name}={value}\n" for name, value in variables.items())
    (tmp_path / ".deepspeed_env").write_text(f"# mine\n\n{lines}")
    secret = {"MLFLOW_TRACKING_PASSWORD": "s3cret", "HF_TOKEN": "s3cret"}
    job = make_job(tmp_path / "job", arguments=PLAIN)
    plan = plan_start(job, {**hosts, **secret})
    assert "s3cret" not in "".join(plan.files.values()) and "MLFLOW_TRACKING_PASSWORD" not in plan.environment
    printed = start(plan, job.folder)
    assert "s3cret" not in printed
    for rank in (0, 1):
        found = given(job, rank)
        assert found["argv"] == [*PLAIN]
        assert {name: found["environment"].get(name) for name in variables} == variables
        assert not secret.keys() & found["environment"].keys()
        assert found["environment"]["MEGATRON_TIEDLORA_EXPECTED_RANKS"] == "2" == found["environment"]["WORLD_SIZE"]
        assert found["environment"]["PYTHONSAFEPATH"] == "1"
        assert (found["environment"]["MASTER_ADDR"], found["environment"]["MASTER_PORT"]) == ("10.0.0.1", "29400")
        assert found["folder"] == str(job.folder)


def test_words_and_variables_get_through_pdsh_to_torchruns_agents(tmp_path: Path, hosts: dict[str, str]) -> None:
    agent = write_program(
        tmp_path / "programs",
        "agent",
        "#!/bin/sh\nwhile [ \"${1##*dump.py}\" ]; do"
        " case $1 in --local-addr=*) export LOCAL_ADDR=${1#*=};; esac; shift; done\n"
        f'RANK=${{LOCAL_ADDR#node}} exec {sys.executable} "$@"\n',
    )
    variables = {"NCCL_A": "a b", "TORCH_B": "$x `y` \"z\" 'q' \\", "HF_HOME": "/50%/%h"}
    (tmp_path / ".deepspeed_env").write_text("".join(f"{name}={variables[name]}\n" for name in ("TORCH_B", "HF_HOME")))
    job = make_job(tmp_path / "job", launcher="torchrun", arguments=NASTY, python=str(agent))
    plan = plan_start(job, {**hosts, "NCCL_A": "a b", "HF_TOKEN": "s3cret"})
    assert not any("s3cret" in word for word in plan.words)
    start(plan, job.folder)
    for rank in (1, 2):  # as their hosts are named
        found = given(job, rank)
        assert found["argv"] == [*NASTY]
        assert {name: found["environment"].get(name) for name in variables} == variables
        assert found["environment"]["MEGATRON_TIEDLORA_EXPECTED_RANKS"] == "2"
        assert found["folder"] == str(job.folder)


@pytest.mark.distributed
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun is not installed")
@pytest.mark.parametrize("launcher", ["mpirun", "deepspeed"])
def test_words_and_variables_get_through_mpirun(tmp_path: Path, hosts: dict[str, str], launcher: str) -> None:
    """By itself, and where DeepSpeed's own --launcher names it."""
    variables = {"NCCL_A": "=mlx5_0:1,mlx5_1:1", "HF_HOME": "/data"}
    (tmp_path / ".deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    own = "--mca btl_tcp_if_include lo"
    given_to = {"mpirun": tuple(own.split()), "deepspeed": ("--launcher=openmpi", f"--launcher_args={own}")}
    words = NASTY[:-3] if launcher == "mpirun" else PLAIN
    job = make_job(
        tmp_path / "job", launcher=launcher, hosts=(Host("localhost", 2),), arguments=words,
        launcher_args=given_to[launcher],
    )  # fmt: skip
    around = {"RANK": "5", "LOCAL_RANK": "5", "WORLD_SIZE": "6"}  # the shell may be a rank of something itself
    plan = plan_start(job, {**hosts, **allowed, **around})
    start(plan, job.folder)
    for rank in (0, 1):
        found = given(job, rank)
        assert found["argv"] == list(words) and not around.keys() & found["environment"].keys()
        assert {name: found["environment"].get(name) for name in variables} == variables
        assert found["environment"]["MEGATRON_TIEDLORA_EXPECTED_RANKS"] == "2"
        assert found["environment"]["MASTER_ADDR"] == "10.0.0.1"


@pytest.mark.parametrize("word", [*NASTY[1:-1], "a\nb", "\x00"])
def test_a_word_that_deepspeed_does_not_quote_belongs_into_a_file(tmp_path: Path, word: str) -> None:
    with pytest.raises(UserError, match="a YAML file for --config"):
        plan_start(make_job(tmp_path / "job", arguments=("--x=1", word)), {})
    alone = make_job(tmp_path / "job", arguments=(word,), route="local", hosts=(Host("localhost", 1),))
    assert plan_start(alone, {}).words[-1] == word  # no shell is between


@pytest.mark.parametrize("word", ["a\nb", "a\rb", "\x00"])
def test_a_word_with_a_line_break_belongs_into_a_file(tmp_path: Path, word: str) -> None:
    with pytest.raises(UserError, match="a YAML file for --config"):
        plan_start(make_job(tmp_path / "job", launcher="torchrun", arguments=(word,)), {})


# Commands ------------------------------------------------------------------------------------------------------------


def rank_of(job: Job) -> tuple[str, ...]:
    return (job.python, "-u", *job.program, *job.arguments)


def test_local(tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", route="local", hosts=(Host("localhost", 2),))
    plan = plan_start(job, {"HF_TOKEN": "mine", "A": "1"})
    command = list(plan.words)
    assert Path(command[0]).name == "deepspeed" and command[-3:] == [*job.program, *job.arguments]
    assert follows(command, "--hostfile", str(job.hostfile)) and plan.files == {job.hostfile: "localhost slots=2\n"}
    assert plan.environment["HF_TOKEN"] == "mine"  # this machine is the user's own
    assert "--include" not in command and "--no_ssh_check" in command
    some = plan_start(make_job(tmp_path / "job", route="local", hosts=(Host("localhost", 2),), gpus=("3", "5")), {})
    assert follows(list(some.words), "--include", "localhost:3,5")
    assert list(some.files.values()) == ["localhost slots=6\n"]


def test_a_module_is_started_as_one(tmp_path: Path) -> None:
    program = ("-m", "megatron_tiedlora.cluster.doctor.rank")
    for launcher in ("deepspeed", "mpirun", "torchrun"):
        words = plan_start(make_job(tmp_path / "job", launcher=launcher, program=program), {}).words
        named = ("--module", program[1]) if launcher == "deepspeed" else program
        line = words[-1].split() if launcher == "torchrun" else list(words)
        assert follows(line, *named, "--max_steps", "3")


def test_deepspeed_on_hosts(tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", ssh_port=2222, launcher_args=("--launcher_args=-t 5",))
    plan = plan_start(job, {"PDSH_SSH_ARGS_APPEND": "-o ConnectTimeout=99 -i key", "PYTHONPATH": "/src"})
    command = list(plan.words)
    assert "--launcher_args=-t 5" in command
    assert "--force_multi" in command  # also a single host of a hostfile is reached by ssh
    ssh = plan.environment["PDSH_SSH_ARGS_APPEND"]
    assert ssh.startswith("-o ConnectTimeout=99 -i key -o ") and ssh.endswith(" -p 2222")  # the first of two values
    for option in ("ServerAliveInterval=", "ServerAliveCountMax=", "ConnectTimeout=", "BatchMode=yes", "ControlPath="):
        assert f"-o {option}" in ssh
    assert plan.files[Path(plan.environment["DS_ENV_FILE"])].splitlines() == [
        "PYTHONPATH=/src",  # DeepSpeed would put the current folder before it
        "MEGATRON_TIEDLORA_EXPECTED_RANKS=2",
        "PYTHONSAFEPATH=1",
        "MASTER_ADDR=10.0.0.1",
        "MASTER_PORT=29400",
    ]
    assert plan.files[job.hostfile] == "node1 slots=1\nnode2 slots=1\n"
    # DeepSpeed would ask the host for its name and address, by an ssh without time limits.
    assert "--no_ssh_check" in command and follows(command, "--master_addr", "10.0.0.1")


def test_mpirun(tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", launcher="mpirun", hosts=(Host("a", 2), Host("b", 2)), ssh_port=22)
    plan = plan_start(job, {"NCCL_DEBUG": "INFO", "HF_TOKEN": "s3cret", "MLFLOW_TRACKING_TOKEN": "s3cret"})
    command = list(plan.words)
    assert command[:5] == ["mpirun", "-np", "4", "--hostfile", str(job.hostfile)]
    assert follows(command, *rank_of(job))
    assert follows(command, "--map-by", "slot") and follows(command, "--bind-to", "none")
    for name in ("NCCL_DEBUG", "MEGATRON_TIEDLORA_EXPECTED_RANKS", "MASTER_ADDR", "MASTER_PORT"):
        assert follows(command, "-x", name)
    assert not {"HF_TOKEN", "MLFLOW_TRACKING_TOKEN"} & set(command) and not any("s3cret" in word for word in command)
    for name in ("PRTE_MCA_plm_ssh_agent", "OMPI_MCA_plm_rsh_agent"):
        assert "-o ServerAliveInterval=" in plan.environment[name] and plan.environment[name].endswith("-p 22")
    own = plan_start(job, {"OMPI_MCA_plm_rsh_agent": "mine"}).environment
    assert own["OMPI_MCA_plm_rsh_agent"] == "mine" and "PRTE_MCA_plm_ssh_agent" not in own
    assert "OMPI_ALLOW_RUN_AS_ROOT" not in own  # the user's decision


def test_srun(tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", launcher="srun", route="srun", hosts=(Host("a", 4), Host("b", 4)))
    command = list(plan_start(job, {}).words)
    assert {"--kill-on-bad-exit=1", "--export=ALL", "--nodes=2", "--ntasks=8", "--ntasks-per-node=4"} <= set(command)
    assert "--nodelist=a,b" in command and follows(command, *rank_of(job))
    assert "--wait=60" in command  # it would wait for ever for a node whose slurmstepd has died
    uneven = make_job(tmp_path / "job", launcher="srun", route="srun", hosts=(Host("a", 4), Host("b", 1)))
    command = list(plan_start(uneven, {}).words)
    assert "--ntasks=5" in command and not any(word.startswith("--ntasks-per-node") for word in command)
    assert plan_start(uneven, {}).environment["MASTER_PORT"] == "29400"


def test_torchrun(tmp_path: Path) -> None:
    hosts = (Host("a", 4), Host("b", 4))
    stops = ("--shutdown-timeout=90", "--signals-to-handle=SIGTERM,SIGUSR1")
    job = make_job(tmp_path / "job", launcher="torchrun", hosts=hosts, master_addr="a", stop_options=stops)
    plan = plan_start(job, {})
    assert follows(list(plan.words), "-R", "ssh") and follows(list(plan.words), "-w", "a,b")
    options = {"--nnodes=2", "--nproc-per-node=4", "--rdzv-endpoint=a:29400", "--rdzv-backend=c10d", *stops}
    assert {*options, "--local-addr=%h", "PYTHONSAFEPATH=1"} <= set(plan.words[-1].split())
    assert f"{job.python} -P -m torch.distributed.run" in plan.words[-1]
    job = make_job(tmp_path / "job", launcher="torchrun", route="srun", hosts=hosts, master_addr="a")
    command = list(plan_start(job, {"SLURM_CPUS_PER_TASK": "3"}).words)
    assert {"--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=12", "--kill-on-bad-exit=1"} <= set(command)
    assert {"--nproc-per-node=4", "--rdzv-endpoint=a:29400"} <= set(command)
    for route in ("srun", "ssh"):
        with pytest.raises(UserError, match="the same number of ranks on every host"):
            plan_start(make_job(tmp_path / "job", launcher="torchrun", route=route, hosts=(*hosts, Host("c", 1))), {})
    here = make_job(tmp_path / "job", launcher="torchrun", route="local", hosts=hosts[:1], master_addr="127.0.0.1")
    command = list(plan_start(here, {}).words)
    assert command[:4] == [job.python, "-P", "-m", "torch.distributed.run"]
    assert "--rdzv-endpoint=127.0.0.1:29400" in command
