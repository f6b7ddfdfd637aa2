"""What of the environment goes to other hosts: no secret, and the user's own file in DeepSpeed's form."""

from __future__ import annotations

from pathlib import Path

import pytest
from deepspeed.launcher.runner import EXPORT_ENVS
from launcher_jobs import make_job

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.cluster.launchers import EXPORTS, plan_start
from megatron_tiedlora.config.hosts import Host


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
    with pytest.raises(UserError, match=r"other: not valid text \(not UTF-8"):
        lines(DS_ENV_FILE="other")
