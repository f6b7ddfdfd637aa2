"""Defines the pytest options and fixtures of the GPU checks, and ends the process of a check."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
import torch

from megatron_tiedlora.base.child_process import end_with_parent
from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.runtime import launch_env, process_group
from megatron_tiedlora.selfcheck.parts import NO_TIME, OPTIONS, Tell, gpu_state, option, seconds_left, why_no_gpu
from megatron_tiedlora.training.throughput import use_private_cache

LEAST_LEFT = 0.2  # share of the part's time that must be left when a measurement starts


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that `tiedlora check-gpu` passes to pytest."""
    for name, default in OPTIONS.items():
        parser.getgroup("check-gpu").addoption(f"--check-{name}", default=default, type=type(default))


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker `gpu`, and make this process end when `tiedlora check-gpu` ends."""
    config.addinivalue_line("markers", "gpu: needs a GPU")
    config.addinivalue_line("markers", "long: only in the long form of a part")
    config.addinivalue_line("markers", "if_time(short, long): only if so many seconds are left, in each form")
    if option(config, "folder"):
        end_with_parent()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests of the long form in the short form, and measurements for which no time is left."""
    if item.get_closest_marker("long") and not option(item.config, "long"):
        pytest.skip("only the long form measures this: give --seconds 3000")
    if (marker := item.get_closest_marker("if_time")) is not None:
        least = marker.args[option(item.config, "long")] if marker.args else LEAST_LEFT * option(item.config, "seconds")
        if seconds_left(item.config) < least:
            pytest.skip(NO_TIME)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Write the file of results after each test, because the time of a part may end in the next one."""
    ended = yield
    for plugin in item.config.pluginmanager.get_plugins():
        if type(plugin).__name__ == "LogXML":
            plugin.pytest_sessionfinish()
    return ended


def pytest_unconfigure(config: pytest.Config) -> None:
    """End a process of `tiedlora check-gpu` without exit handlers, because a communicator or a profiler may hang."""
    if option(config, "folder"):
        sys.stdout.flush()
        os._exit(0)


@pytest.fixture(scope="session", autouse=True)
def variables(pytestconfig: pytest.Config, record_testsuite_property: Callable[[str, object], None]) -> Iterator[None]:
    """Set the environment variables of a training run before CUDA is initialised.

    All compiled kernels of all parts share a cache. In `tiedlora check-gpu`, record the GPU's state before and after.
    """
    launch_env.prepare_environment()
    with suppress(UserError):  # whoever compiles says why it is not possible
        use_private_cache()
    watches = option(pytestconfig, "folder") and option(pytestconfig, "device") == "cuda" and not why_no_gpu()
    if watches:
        record_testsuite_property("GPU before", gpu_state())
    yield
    if watches:
        record_testsuite_property("GPU after", gpu_state())


@pytest.fixture(scope="session")
def model(pytestconfig: pytest.Config) -> str:
    """Return the name of the model preset whose layer sizes are used."""
    return str(option(pytestconfig, "model"))


@pytest.fixture(scope="session")
def is_long(pytestconfig: pytest.Config) -> bool:
    """Return whether the long form of a part runs."""
    return bool(option(pytestconfig, "long"))


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    """Return the device to check. Skip the test if this is a GPU that cannot be used."""
    device = torch.device(option(pytestconfig, "device"))
    if device.type == "cuda" and (missing := why_no_gpu()):
        pytest.skip(missing)
    return device


@pytest.fixture(scope="session")
def gpu(device: torch.device) -> torch.device:
    """Return the device if it is a GPU, or else skip the test."""
    if device.type != "cuda":
        pytest.skip("there is no GPU to measure")
    return device


@pytest.fixture(scope="session")
def joined(device: torch.device) -> torch.device:
    """Set up this process as the only rank of a run, with PyTorch's matmul settings, and return its device."""
    launch_env.prepare_environment()
    return process_group.join_process_group(1.0, expected_ranks=1)


@pytest.fixture
def tell(record_property: Tell) -> Tell:
    """Return the function that records a result by its name and value."""
    return record_property
