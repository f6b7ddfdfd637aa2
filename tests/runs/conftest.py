"""Undisturbed runs on the tiny base, which none of the tests changes; and where a run and its tokens are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_helpers import Base, run


@pytest.fixture(scope="session")
def whole(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one rank that was alone."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(base, folder)
    return folder


@pytest.fixture(scope="session")
def whole_of_two(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of two ranks."""
    folder = tmp_path_factory.mktemp("whole_of_two") / "run"
    run(base, folder, ranks=2)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder, which is not there yet."""
    return tmp_path / "run"


@pytest.fixture
def own_cache(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is begun in this process finds the base's tokens where runs keep them."""
    monkeypatch.setenv("MEGATRON_TIEDLORA_CACHE", str(base.cache))
