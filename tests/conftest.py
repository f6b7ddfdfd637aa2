"""Settings of the whole suite, and the hosts that tests of several of them share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from fake_hosts import FakeCluster

# Tensors here are tiny: threads that wait for each other cost more than they compute.
torch.set_num_threads(1)


@pytest.fixture(scope="session", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["part", "whole"])
def whole(request: pytest.FixtureRequest) -> bool:
    """Whether all cases of a test are run, which is slow, or a part in which every choice of theirs occurs."""
    return bool(request.param)


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeCluster]:
    """nodea and nodeb with sshd, which see every temporary folder of the tests; its users are marked `needs("ssh")`."""
    folders = [tmp_path_factory.getbasetemp()]
    with FakeCluster(tmp_path_factory.mktemp("hosts"), shared=folders) as cluster:
        cluster.start_sshd()
        yield cluster
