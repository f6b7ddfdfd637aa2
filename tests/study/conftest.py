"""The model and the data of the studies here."""

from __future__ import annotations

import pytest
from support.sweep_runs import Given, write_study_base


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Given:
    """What no test changes."""
    return write_study_base(tmp_path_factory.mktemp("study"))
