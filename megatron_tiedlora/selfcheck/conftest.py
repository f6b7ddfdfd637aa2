"""Defines the options and fixtures of the checks, and ends the process of a part."""

import os
import sys

import pytest
import torch

from megatron_tiedlora.base.child_process import end_with_parent
from megatron_tiedlora.runtime import launch_env, process_group
from megatron_tiedlora.selfcheck.parts import OPTIONS, Tell, option, why_no_gpu


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that `tiedlora check-gpu` passes to a part."""
    for name, default in OPTIONS.items():
        parser.getgroup("check-gpu").addoption(f"--check-{name}", default=default, type=type(default))


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker, and make the process of a part end when the command ends."""
    config.addinivalue_line("markers", "gpu: needs a GPU")
    if option(config, "folder"):
        end_with_parent()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Skip the libraries' exit handlers in a part, because a communicator or a profiler may hang there."""
    if option(config, "folder"):
        sys.stdout.flush()
        os._exit(0)


@pytest.fixture(autouse=True)
def variables() -> None:
    """Set the environment variables of a run before CUDA is initialised."""
    launch_env.prepare_environment()


@pytest.fixture(scope="session")
def model(pytestconfig: pytest.Config) -> str:
    """Return the name of the preset whose widths are used."""
    return str(option(pytestconfig, "model"))


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    """Return the device that is checked."""
    device = torch.device(option(pytestconfig, "device"))
    if device.type == "cuda" and (missing := why_no_gpu()):
        pytest.skip(missing)
    return device


@pytest.fixture(scope="session")
def gpu(device: torch.device) -> torch.device:
    """Return the device if it is a GPU, else skip the test."""
    if device.type != "cuda":
        pytest.skip("there is no GPU to measure")
    return device


@pytest.fixture(scope="session")
def joined(device: torch.device) -> torch.device:
    """Return this rank's device after the setup of a run, which includes PyTorch's settings for matmuls."""
    launch_env.prepare_environment()
    return process_group.join_process_group(1.0, expected_ranks=1)


@pytest.fixture
def tell(record_property: Tell) -> Tell:
    """Return a function that records the name and value of a result."""
    return record_property
