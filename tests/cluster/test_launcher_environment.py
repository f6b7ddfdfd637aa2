"""What of the environment travels to other hosts: no secret, nothing that a shell would spoil, in DeepSpeed's form."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.cluster.forwarded_env import (
    forward_env,
    is_secret,
    read_user_file,
    why_left,
    without_bad_exports,
)

TRAVELS = {
    "NCCL_DEBUG": "INFO",
    "NCCL_IB_HCA": "=mlx5_0:1,mlx5_1:1",
    "GLOO_SOCKET_IFNAME": "eth0",
    "OMP_NUM_THREADS": "4",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "HF_HOME": "/data/hf home",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_CACHE": "/data/sets",
    "TORCH_EXTENSIONS_DIR": "/data/ext",
    "TORCHINDUCTOR_CACHE_DIR": "/data/50%full",
    "TRITON_CACHE_DIR": "/data/t;t&t|t<t>(t)",
    "DS_ACCELERATOR": "cpu",
    "MEGATRON_TIEDLORA_CACHE": "/data/cache",
    "TOKENIZERS_PARALLELISM": "false",
    "LD_LIBRARY_PATH": "/usr/lib:/opt/lib",
    "PATH": "/venv/bin:/usr/bin",
    "PYTHONPATH": "/src",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False",
    "XDG_CACHE_HOME": "/data/xdg",
}
STAYS = {"HOME": "/root", "SHELL": "/bin/zsh", "EDITOR": "vi", "MASTER_ADDR": "x", "CUDA_VISIBLE_DEVICES": "0"}
SECRETS = ("HF_TOKEN", "HF_HUB_TOKEN", "NCCL_SECRET", "TORCH_PASSWORD", "DS_PASSWD", "HF_API_KEY", "OMP_APIKEY")
SECRETS += ("TORCH_CREDENTIALS", "MLFLOW_TRACKING_PASSWORD", "CUDA_PRIVATE", "HF_ACCESS_KEY_ID", "DS_AUTH", "UCX_KEY")
SECRETS += ("DS_PASS", "HF_DB_PWD", "HF_GITHUB_PAT", "TORCH_JWT", "NCCL_KEYS", "OMP_USERPASS")
SPOILED = ("a\nb", 'say "x"', "$HOME", "`id`", "a\\b", " a", "a ", "a\tb", "\x1b[0m")


def test_what_training_reads_travels_and_the_rest_of_the_shell_stays() -> None:
    sent = forward_env({**TRAVELS, **STAYS})
    assert sent.variables == dict(sorted(TRAVELS.items())) and not sent.left


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_stays_whoever_named_it(name: str) -> None:
    assert is_secret(name) and is_secret(name.lower())
    for in_words in (True, False):
        for sent in (
            forward_env({name: "s3cret", "OMP_A": "1"}, in_words=in_words),
            forward_env({"OMP_A": "1"}, given={name: "s3cret"}, in_words=in_words),
        ):
            assert sent.variables == {"OMP_A": "1"}
            assert "s3cret" not in sent.file_text() + "".join(sent.left)
    assert without_bad_exports({name: "s3cret"})[0] == (
        {} if name.startswith(("NCCL", "MLFLOW", "UCX")) else {name: "s3cret"}
    )


@pytest.mark.parametrize(
    "name", ["TOKENIZERS_PARALLELISM", "TRITON_CACHE_DIR", "PWD", "HF_BYPASS_CACHE", "CUDA_PASSTHROUGH", "PATH"]
)
def test_names_that_only_look_like_a_secret_travel(name: str) -> None:
    assert not is_secret(name)


@pytest.mark.parametrize("value", SPOILED)
def test_a_value_that_a_shell_would_spoil_is_left_behind_by_name(value: str) -> None:
    sent = forward_env({"OMP_A": "1", "NCCL_B": value}, in_words=True)
    assert sent.variables == {"OMP_A": "1"}
    assert [line.split()[0] for line in sent.left] == ["NCCL_B"] and "\n" not in sent.left[0]
    assert forward_env({"NCCL_B": value}).variables == {"NCCL_B": value}  # mpirun and ssh take it as it is
    kept, lines = without_bad_exports({"PYTHONFOO": value, "OMP_A": value})
    assert kept == {"OMP_A": value} and lines[0].startswith("PYTHONFOO is not sent")


@pytest.mark.parametrize("in_words", [True, False])
def test_an_address_with_a_password_stays_whatever_its_name(in_words: bool) -> None:
    value = "https://me:s3cret@hub.example/x"
    sent = forward_env({"HF_ENDPOINT": value, "HF_HOME": "http://h:80/a@b"}, given={"proxy": value}, in_words=in_words)
    assert sent.variables == {"HF_HOME": "http://h:80/a@b"}
    assert [line.split()[0] for line in sent.left] == ["HF_ENDPOINT", "proxy"] and "s3cret" not in "".join(sent.left)
    assert without_bad_exports({"MLFLOW_TRACKING_URI": value})[0] == {}


def test_a_users_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    file = tmp_path / "mine"
    file.write_bytes(b"A=\xff\n")
    with pytest.raises(UserError, match=r"mine: not valid text \(not UTF-8"):
        read_user_file({"DS_ENV_FILE": str(file)})


def test_a_shell_takes_no_odd_name() -> None:
    assert why_left("BASH_FUNC_x%%", "1") is not None and why_left("1A", "1") is not None


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
