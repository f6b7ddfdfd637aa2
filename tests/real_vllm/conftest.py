"""Models and engines of the tests with a real vLLM, which are run by `make test-vllm` in an environment of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.served_models import MODELS, ServedModel
from support.vllm_engine import Engine, apply_environment, forget_engines

Start = Callable[..., Engine]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ServedModel]:
    """By name; folders and answers are made when a test asks for them."""
    return {name: ServedModel(name, tmp_path_factory.mktemp(name), shape) for name, shape in MODELS.items()}


@pytest.fixture(scope="session")
def started() -> Iterator[Start]:
    """Starts an engine, of which one process has one at a time; it stays while tests ask for the same one."""
    apply_environment()
    running: dict[str, Engine] = {}

    def start(model: ServedModel, mode: str, **options: Any) -> Engine:
        key = f"{model.name} {mode} {options}"
        if key not in running:
            close()
            try:
                running[key] = Engine(model, mode, **options)
            except Exception:
                forget_engines()
                raise
        return running[key]

    def close() -> None:
        while running:
            running.popitem()[1].close()

    yield start
    close()
