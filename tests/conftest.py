"""Settings of the whole suite, and the base and the hosts that tests of several folders share."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fake_hosts import FakeCluster
from support.ranks import LAUNCHER_VARIABLES
from support.run_helpers import Base, write_base
from support.tiny_models import write_tiny_model

gc.disable()  # until all tests are imported, which makes many objects and no garbage: a third of that time

# Tensors here are tiny: threads that wait for each other cost more than they compute.
torch.set_num_threads(1)

pytest_plugins = ["support.cpu_seconds"]

# Folders whose tests mostly wait: for a launcher, a silence, the end of a process.
WAITING = {"cluster", "runs", "study"}
# Folders with the files that compute longest, a minute each: the last files of a run should be short ones.
LONGEST = ("layouts", "selfcheck", "families", "parallel", "safety", "evaluation")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that wait and files that compute take turns, so that processes which run both leave no core idle.

    Of the waiting ones those of several hosts come first, and beside them those that compute longest.
    """
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    waits, computes = [], []
    for path, tests in files.items():
        (waits if path.parent.name in WAITING else computes).append(tests)
    order = {name: number for number, name in enumerate(LONGEST)}
    computes.sort(key=lambda tests: order.get(tests[0].path.parent.name, len(order)))
    items[:] = chain.from_iterable(chain.from_iterable(zip_longest(waits, computes, fillvalue=[])))


def pytest_collection_finish() -> None:
    """What was imported stays: the garbage collector need not look at it again, and seldom at the rest."""
    gc.freeze()
    gc.set_threshold(20_000)
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A test that runs as a rank in its own process leaves no rank to the tests after it."""
    own = {name: os.environ[name] for name in LAUNCHER_VARIABLES if name in os.environ}
    result = yield
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(own)
    return result


@pytest.fixture(scope="session", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["part", "whole"])
def whole(request: pytest.FixtureRequest) -> bool:
    """Whether all cases of a test are run, which is slow, or a part in which every choice of theirs occurs."""
    return bool(request.param)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A tiny model with data, which no test changes."""
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def service_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model for a training service, with four layers."""
    folder = tmp_path_factory.mktemp("service") / "base"
    return write_tiny_model(folder, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture
def services() -> Iterator[list[Any]]:
    """A list for training services of a test, which are killed at its end."""
    started = list[Any]()
    yield started
    for service in started:
        service.kill()


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeCluster]:
    """nodea and nodeb with sshd, which see every temporary folder of the tests; its users are marked `needs("ssh")`."""
    with _hosts(tmp_path_factory, "nodea", "nodeb") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def three_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeCluster]:
    """The same with nodec."""
    with _hosts(tmp_path_factory, "nodea", "nodeb", "nodec") as cluster:
        yield cluster


@contextmanager
def _hosts(folders: pytest.TempPathFactory, *names: str) -> Iterator[FakeCluster]:
    with FakeCluster(folders.mktemp("hosts"), names, shared=[folders.getbasetemp()]) as cluster:
        cluster.start_sshd()
        yield cluster
