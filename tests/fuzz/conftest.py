"""What all fuzzers share: a folder to load from, no network, and the table of what came of their cases."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzzing import TALLIES, Tally
from support.native_files import with_adapter
from support.tiny_models import write_tiny_model

from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter

os.environ["HF_HUB_OFFLINE"] = "1"  # a broken name must not be looked for on the hub


@pytest.fixture
def area(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a neighbour; what loads may neither change it nor leave anything in the working directory."""
    (tmp_path / "work").mkdir()
    (tmp_path / "x").write_text("a neighbour")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model in several files, without a tokenizer."""
    return write_tiny_model(tmp_path_factory.mktemp("base"), tokenizer=False, max_shard_size="20KB")


@pytest.fixture(scope="session")
def natives(base: Path) -> dict[str, NativeAdapter]:
    """Adapters of layers 1 and 3 of `base`, by method."""
    return {method: with_adapter(base, method, (1, 3))[1] for method in ("tl6", "tl5", "tl4", "lora", "vera")}


@pytest.fixture(scope="session")
def native(natives: dict[str, NativeAdapter]) -> NativeAdapter:
    """The tl6 of `natives`."""
    return natives["tl6"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the hub's client was imported before the variable was set."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session", autouse=True)
def quiet_libraries() -> Iterator[None]:
    """Without the warnings and bars of libraries, thousands of times."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()
    logging.set_verbosity(before)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table for docs/security.md, of the targets that ran."""
    ran = {target: tally for target, tally in TALLIES.items() if tally.cases}
    if not ran:
        return
    total = Tally()
    for tally in ran.values():
        for name in ("cases", "refused", "accepted", "failed", "seconds"):
            setattr(total, name, getattr(total, name) + getattr(tally, name))
    terminalreporter.section("fuzzers")
    terminalreporter.line("| target | cases | refused in one line | accepted | failed | core seconds | note |")
    terminalreporter.line("|---|---|---|---|---|---|---|")
    for target, tally in {**ran, "sum": total}.items():
        notes = "; ".join(f"{count:,} {note}" for note, count in tally.notes.most_common())
        terminalreporter.line(
            f"| {target} | {tally.cases:,} | {tally.refused:,} | {tally.accepted:,} | {tally.failed:,} |"
            f" {tally.seconds:.0f} | {notes} |"
        )
