"""What of the environment goes to other hosts: no secret, and the user's own file in DeepSpeed's form."""

from __future__ import annotations

from pathlib import Path

import pytest
from deepspeed.launcher.runner import EXPORT_ENVS
from launcher_jobs import make_job

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.cluster.launchers import EXPORTS, plan_start, read_user_file
from megatron_tiedlora.config.hosts import Host


@pytest.mark.parametrize("launcher", ["deepspeed", "mpirun", "torchrun"])
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


def test_a_users_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    file = tmp_path / "mine"
    file.write_bytes(b"A=\xff\n")
    with pytest.raises(UserError, match=r"mine: not valid text \(not UTF-8"):
        read_user_file({"DS_ENV_FILE": str(file)})


def test_the_users_own_file_goes_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's launcher crashes on its blank lines and comments, and would not see it beside ours."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    assert read_user_file({}) == {}
    (home / ".deepspeed_env").write_text("A=1\nB=home\n")
    (here / ".deepspeed_env").write_text("# mine\n\nB=here=now\n C = 3 \n")
    assert read_user_file({}) == {"A": "1", "B": "here=now", "C": "3"}
    (here / "other").write_text("D=4")
    assert read_user_file({"DS_ENV_FILE": str(here / "other")}) == {"D": "4"}
    (here / "other").write_text("fine=1\nPASSWORD s3cret\n")
    with pytest.raises(UserError, match="other:2: not of the form NAME=VALUE") as caught:
        read_user_file({"DS_ENV_FILE": "other"})
    assert "s3cret" not in str(caught.value)
