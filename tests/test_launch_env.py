"""Who says why a run failed: the first rank of a host to fail, and every run anew."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from megatron_tiedlora.pipeline.launch_env import first_to_fail


@pytest.fixture(autouse=True)
def rank_1_of_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)


def test_the_first_of_a_host_speaks_and_the_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert first_to_fail()
    monkeypatch.setenv("RANK", "0")  # whichever it is
    assert not first_to_fail() and not first_to_fail()


def test_another_run_speaks_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    assert first_to_fail() and not first_to_fail()
    monkeypatch.setenv("MASTER_PORT", "29501")
    assert first_to_fail()


def test_a_rank_that_is_alone_always_speaks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert first_to_fail() and first_to_fail()
    monkeypatch.delenv("WORLD_SIZE")  # before any launcher's variables are there
    assert first_to_fail() and first_to_fail()
    assert not list(tmp_path.iterdir())


def test_what_earlier_runs_left_is_removed(tmp_path: Path) -> None:
    assert first_to_fail()
    (mark,) = tmp_path.iterdir()
    os.utime(mark, (0, 0))
    assert first_to_fail()
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_written_silences_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    assert first_to_fail() and first_to_fail()


def test_a_mark_that_a_peer_removes_meanwhile_makes_nobody_speak_twice(tmp_path: Path) -> None:
    (tmp_path / f"megatron_tiedlora-failed-{os.getuid()}-1").symlink_to(tmp_path / "gone")  # listed, and not there
    assert first_to_fail() and not first_to_fail()
