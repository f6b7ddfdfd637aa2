"""What of the environment goes to other hosts: no secret, and the user's own file in DeepSpeed's form."""

from __future__ import annotations

from pathlib import Path

import pytest
from launcher_jobs import make_job

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.cluster.launchers import DEEPSPEED_EXPORTS, is_secret, plan_start, read_user_file

SECRETS = ("HF_TOKEN", "HF_HUB_TOKEN", "NCCL_SECRET", "TORCH_PASSWORD", "DS_PASSWD", "HF_API_KEY", "OMP_APIKEY")
SECRETS += ("TORCH_CREDENTIALS", "MLFLOW_TRACKING_PASSWORD", "CUDA_PRIVATE", "HF_ACCESS_KEY_ID", "DS_AUTH", "UCX_KEY")
SECRETS += ("DS_PASS", "HF_DB_PWD", "HF_GITHUB_PAT", "TORCH_JWT", "NCCL_KEYS", "OMP_USERPASS")


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize("launcher", ["pdsh", "openmpi", "mpirun", "torchrun"])
def test_a_secret_of_this_shell_stays(tmp_path: Path, name: str, launcher: str) -> None:
    assert is_secret(name) and is_secret(name.lower())
    plan = plan_start(make_job(tmp_path, launcher=launcher), {name: "s3cret"})
    assert "s3cret" not in "".join([*plan.files.values(), *plan.words])
    would_be_sent = name.startswith(DEEPSPEED_EXPORTS)
    assert (name in plan.environment) is not would_be_sent and len(plan.notes) == int(would_be_sent)


@pytest.mark.parametrize("launcher", ["pdsh", "openmpi", "mpirun", "torchrun"])
def test_an_address_with_a_password_stays(tmp_path: Path, launcher: str) -> None:
    given = {"MLFLOW_TRACKING_URI": "https://me:s3cret@host", "MLFLOW_OTHER_URI": "https://host:80/a"}
    plan = plan_start(make_job(tmp_path, launcher=launcher), given)
    assert "s3cret" not in "".join([*plan.files.values(), *plan.words, *plan.environment.values()])
    assert plan.notes == (
        "MLFLOW_TRACKING_URI is not sent to the other hosts: its value holds an address with a password",
    )
    assert plan.environment["MLFLOW_OTHER_URI"] == given["MLFLOW_OTHER_URI"]


@pytest.mark.parametrize(
    "name", ["TOKENIZERS_PARALLELISM", "TRITON_CACHE_DIR", "PWD", "HF_BYPASS_CACHE", "CUDA_PASSTHROUGH", "PATH"]
)
def test_names_that_only_look_like_a_secret_travel(name: str) -> None:
    assert not is_secret(name)


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
