"""Undisturbed runs on the tiny base, which none of the tests changes; and where a run and its tokens are kept."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from support.native_files import with_adapter
from support.run_helpers import Base, run
from support.run_preludes import kill_at_step

from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter


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


@pytest.fixture(scope="session")
def stopped(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped at step 3; its best checkpoint is step 2."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    run(base, folder, prelude=partial(kill_at_step, 3), expect=143)
    return folder


@pytest.fixture(scope="session")
def native(base: Base) -> NativeAdapter:
    """An adapter of two of the base's layers."""
    return with_adapter(base.model, "tl6", (1, 3))[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder, which is not there yet."""
    return tmp_path / "run"


@pytest.fixture
def own_cache(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is begun in this process finds the base's tokens where runs keep them."""
    monkeypatch.setenv("MEGATRON_TIEDLORA_CACHE", str(base.cache))
