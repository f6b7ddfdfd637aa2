"""The tiny base of the tests of runs, and undisturbed runs on it. None of the tests changes them."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_helpers import Base, run, write_base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return write_base(tmp_path_factory.mktemp("base"))


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
def own_cache(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is begun in this process finds the base's tokens where runs keep them."""
    monkeypatch.setenv("MEGATRON_TIEDLORA_CACHE", str(base.cache))
