"""The command of each launcher: what it says, and that words and variables get through real shells unharmed.

The hosts are played by a program called `ssh`, which runs what it is given in a shell here, as sshd does there.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from deepspeed.launcher.runner import EXPORT_ENVS
from support.launcher_jobs import given, hosts_here, make_job, start

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.cluster.launchers import EXPORTS, Job, plan_start
from megatron_tiedlora.runtime.launch_env import Host

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


@pytest.mark.distributed
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun is not installed")
@pytest.mark.parametrize("launcher", ["mpirun", "deepspeed"])
def test_words_and_variables_get_through_mpirun(tmp_path: Path, hosts: dict[str, str], launcher: str) -> None:
    """By itself, and where DeepSpeed's own --launcher names it."""
    variables = {"NCCL_A": "=mlx5_0:1,mlx5_1:1", "HF_HOME": "/data"}
    if launcher == "deepspeed":
        (tmp_path / ".deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
    else:  # by prefix, and by its own -x
        hosts |= variables
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    own = "--mca btl_tcp_if_include lo"
    by_deepspeed = ("--launcher=openmpi", f"--launcher_args={own}")
    given_to = {"mpirun": (*own.split(), "-x", "HF_HOME"), "deepspeed": by_deepspeed}
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


# The environment: no secret goes to other hosts, and the user's own file in the form of DeepSpeed ---------------------


@pytest.mark.parametrize("launcher", ["deepspeed", "mpirun"])
def test_a_secret_of_this_shell_stays(tmp_path: Path, launcher: str) -> None:
    """DeepSpeed would export what begins with MLFLOW, and all users of a host can read a command there."""
    names = ("HF_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_URI")
    plan = plan_start(make_job(tmp_path, launcher=launcher), {**dict.fromkeys(names, "s3cret"), "NCCL_DEBUG": "INFO"})
    assert "s3cret" not in "".join([*plan.files.values(), *plan.words])
    assert not any(name.startswith("MLFLOW") for name in plan.environment) and plan.environment["NCCL_DEBUG"] == "INFO"
    alone = make_job(tmp_path, route="local", hosts=(Host("localhost", 1),))
    assert plan_start(alone, {names[2]: "s3cret"}).environment[names[2]] == "s3cret"  # this machine is the user's own


def test_what_goes_to_other_hosts_is_what_deepspeed_exports() -> None:
    assert {*EXPORTS, "MLFLOW"} == {*EXPORT_ENVS, "NCCL"}  # that of NCCL is exported for CUDA


def test_the_users_own_file_goes_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's launcher crashes on its blank lines and comments, and would not see it beside ours."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))

    def lines(**environment: str) -> list[str]:
        """What stands in front of our own variables, without PYTHONPATH."""
        plan = plan_start(make_job(here), environment)
        found = plan.files[Path(plan.environment["DS_ENV_FILE"])].splitlines()
        assert found[0] == "PYTHONPATH=" and found[-1] == "MASTER_PORT=29400"
        return found[1:-4]

    assert lines() == []
    (home / ".deepspeed_env").write_text("A=1\nB=home\n")
    (here / ".deepspeed_env").write_text("# mine\n\nB=here=now\n")
    assert lines() == ["A=1", "B=home", "B=here=now"]  # of two the last one counts
    (here / "other").write_text("D=4")
    assert lines(DS_ENV_FILE=str(here / "other")) == ["D=4", "D=4"] and lines(DS_ENV_FILE="other") == ["D=4"]
    (here / "other").write_bytes(b"A=\xff\n")
    with pytest.raises(UserError, match=r"other: not valid text \(it is not UTF-8"):
        lines(DS_ENV_FILE="other")


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
    asked = make_job(tmp_path / "job", route="local", hosts=job.hosts, launcher_args=("--log_level=info",))
    levels = [word for word in plan_start(asked, {}).words if word.startswith("--log_level")]
    assert levels == ["--log_level=warning", "--log_level=info"] and levels[0] in command  # the last one counts
    some = plan_start(make_job(tmp_path / "job", route="local", hosts=(Host("localhost", 2),), gpus=("3", "5")), {})
    assert follows(list(some.words), "--include", "localhost:3,5")
    assert list(some.files.values()) == ["localhost slots=6\n"]


def test_a_module_is_started_as_one(tmp_path: Path) -> None:
    program = ("-m", "megatron_tiedlora.cluster.doctor_rank")
    for launcher in ("deepspeed", "mpirun", "torchrun"):
        words = plan_start(make_job(tmp_path / "job", launcher=launcher, program=program), {}).words
        named = ("--module", program[1]) if launcher == "deepspeed" else program
        assert follows(list(words), *named, "--max_steps", "3")


def test_deepspeed_on_hosts(tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", launcher_args=("--launcher_args=-t 5",))
    plan = plan_start(job, {"PYTHONPATH": "/src"})
    command = list(plan.words)
    assert "--launcher_args=-t 5" in command
    assert "--force_multi" in command  # also a single host of a hostfile is reached by ssh
    ssh = plan.environment["PDSH_SSH_ARGS_APPEND"]
    for option in ("ServerAliveInterval=", "ServerAliveCountMax=", "ConnectTimeout=", "BatchMode=yes", "ControlPath="):
        assert f"-o {option}" in ssh
    own = plan_start(job, {"PDSH_SSH_ARGS_APPEND": "-p 2222"}).environment
    assert own["PDSH_SSH_ARGS_APPEND"] == "-p 2222"
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
    job = make_job(tmp_path / "job", launcher="mpirun", hosts=(Host("a", 2), Host("b", 2)))
    plan = plan_start(job, {"NCCL_DEBUG": "INFO", "HF_TOKEN": "s3cret", "MLFLOW_TRACKING_TOKEN": "s3cret"})
    command = list(plan.words)
    assert command[:5] == ["mpirun", "-np", "4", "--hostfile", str(job.hostfile)]
    assert follows(command, *rank_of(job))
    assert follows(command, "--map-by", "slot") and follows(command, "--bind-to", "none")
    for name in ("NCCL_DEBUG", "MEGATRON_TIEDLORA_EXPECTED_RANKS", "MASTER_ADDR", "MASTER_PORT"):
        assert follows(command, "-x", name)
    assert not {"HF_TOKEN", "MLFLOW_TRACKING_TOKEN"} & set(command) and not any("s3cret" in word for word in command)
    for name in ("PRTE_MCA_plm_ssh_agent", "OMPI_MCA_plm_rsh_agent"):
        assert "-o ServerAliveInterval=" in plan.environment[name]
    own = plan_start(job, {"OMPI_MCA_plm_rsh_agent": "mine"}).environment
    assert own["OMPI_MCA_plm_rsh_agent"] == "mine"
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
    """On this machine only."""
    job = make_job(tmp_path / "job", launcher="torchrun", route="local", hosts=(Host("localhost", 4),))
    command = list(plan_start(job, {}).words)
    assert command[:4] == [job.python, "-P", "-m", "torch.distributed.run"]
    assert {"--nproc-per-node=4", "--rdzv-endpoint=10.0.0.1:29400", "--rdzv-backend=c10d"} <= set(command)
    assert command[-3:] == [*job.program, *job.arguments]
