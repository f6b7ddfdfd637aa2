"""The process group: one GPU a rank, what is set before CUDA starts, and the line that a GPU's failure ends a run with.

The GPUs are made up; groups of gloo alone are joined.
"""

from __future__ import annotations

import os
import signal
import socket
import tempfile
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.forked_ranks import run_on_ranks
from support.task_files import refusal
from torch import distributed

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.runtime import process_group
from megatron_tiedlora.runtime.ending import End
from megatron_tiedlora.runtime.heartbeat import gpu_failure_line
from megatron_tiedlora.runtime.launch_env import first_to_fail, prepare_environment
from megatron_tiedlora.runtime.process_group import (
    VARIABLES,
    choose_device,
    gpu_name,
    group_backend,
    make_deterministic,
)
from megatron_tiedlora.runtime.stopping import RunStopped, StopRequests

CUDA_VARIABLES = {
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "NCCL_GRAPH_REGISTER": "0",
    "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "2",
    "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",
}
GPU = torch.device("cuda", 1)
UUID = "57a1ec35-3ee1-4c1d-8c6e-3d6a1c7d6c11"


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with GPUs, on which the user has set nothing."""
    for name in (*CUDA_VARIABLES, "PYTORCH_ALLOC_CONF", "CUDA_VISIBLE_DEVICES", "NCCL_MULTI_RANK_GPU_ENABLE"):
        monkeypatch.setenv(name, "")  # so that it is restored, whatever the code under test sets
        monkeypatch.delenv(name)
    for name, value in {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "2", "DS_ACCELERATOR": "cuda"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return monkeypatch


# Before CUDA starts -------------------------------------------------------------------------------------------------


def test_defaults_of_cuda_are_set_before_it_starts(bare: pytest.MonkeyPatch) -> None:
    prepare_environment()
    assert {name: os.environ[name] for name in CUDA_VARIABLES} == CUDA_VARIABLES


@pytest.mark.parametrize("name", [*CUDA_VARIABLES, "PYTORCH_ALLOC_CONF"])
def test_what_a_user_has_set_stays(bare: pytest.MonkeyPatch, name: str) -> None:
    bare.setenv(name, "theirs")
    prepare_environment()
    assert os.environ[name] == "theirs"
    if name == "PYTORCH_ALLOC_CONF":
        assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ, "an older torch reads this one alone"


def test_a_cpu_gets_none_of_it(bare: pytest.MonkeyPatch) -> None:
    bare.setattr(torch.cuda, "is_available", lambda: False)
    prepare_environment()
    assert not set(CUDA_VARIABLES) & set(os.environ)


# Which GPU ----------------------------------------------------------------------------------------------------------


def test_more_ranks_than_gpus(bare: pytest.MonkeyPatch) -> None:
    for count, device in ((4, "cuda:2"), (1, "cuda:0")):
        bare.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert str(choose_device()) == device
    bare.setattr(torch.cuda, "device_count", lambda: 2)
    assert f"local rank 2 has no GPU on host {socket.gethostname()} (number of GPUs: 2)" in refusal(choose_device)


@pytest.mark.parametrize(
    ("visible", "uuid", "name"),
    [
        (None, UUID, f"GPU-{UUID}"),
        ("4,5", UUID, f"GPU-{UUID}"),
        ("4, 5", "00000000-0000-0000-0000-000000000000", "5"),
        ("4", "00000000-0000-0000-0000-000000000000", "1"),
        (None, "00000000-0000-0000-0000-000000000000", "1"),
        ("MIG-a,MIG-b", UUID, "MIG-b"),  # parts of one GPU
    ],
)
def test_a_gpu_is_called_as_no_other_is(bare: pytest.MonkeyPatch, visible: str | None, uuid: str, name: str) -> None:
    bare.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid=uuid))
    if visible is not None:
        bare.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_name(GPU) == name
    assert gpu_name(torch.device("cpu")) == ""


# The GPU of each of three ranks, the value of NCCL's own switch for sharing one, and how the answer begins.
MEETINGS = [
    (["", "", ""], "", "met"),
    (["GPU-a", "GPU-b", "GPU-c"], "", "met"),
    (["GPU-a", "GPU-b", "GPU-a"], "", "ranks 0, 2 on host gpu7 share one GPU, GPU-a; start one rank per GPU"),
    (["GPU-a", "GPU-b", "GPU-a"], "1", "met"),
    (["GPU-a", "", "GPU-b"], "", "rank 1 on host gpu7: torch sees no GPU, but other ranks have one; run `nvidia-smi`"),
]


def meet_with(cases: list[tuple[list[str], str, str]]) -> list[str]:
    """On a forked rank: the group is there; each rank says that its GPU is the one named here."""
    made_up: Any = process_group
    made_up.socket = SimpleNamespace(gethostname=lambda: "gpu7")
    found = []
    for names, shares, _ in cases:
        os.environ["NCCL_MULTI_RANK_GPU_ENABLE"] = shares
        made_up.gpu_name = lambda _, names=names: names[distributed.get_rank()]
        try:
            process_group.meet(torch.device("cpu"), timedelta(seconds=60))
            found.append("met")
        except UserError as error:
            found.append(str(error))
    return found


@pytest.mark.distributed
def test_two_ranks_on_one_gpu_are_told_on_every_rank(tmp_path: Path) -> None:
    answers = run_on_ranks(meet_with, MEETINGS, ranks=3, folder=tmp_path)
    assert answers[0] == answers[1] == answers[2]
    for answer, (_, _, said) in zip(answers[0], MEETINGS, strict=True):
        assert answer.startswith(said), answer


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ([("a", "0"), ("b", "0")], None),
        ([("a", "0"), ("a", "0")], "ranks 0, 1 on host a share"),
        # one GPU seen from two containers
        ([("a", "GPU-1"), ("b", "GPU-1"), ("b", "GPU-2")], "ranks 0, 1 on host a and b share one GPU, GPU-1"),
    ],
)
def test_which_ranks_share_a_gpu(places: list[tuple[str, str]], said: str | None) -> None:
    found = process_group._shared_gpus(places)
    assert found is None if said is None else said in str(found)


# The group ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 3])
def test_no_device_is_bound_and_both_kinds_of_tensors_travel(bare: pytest.MonkeyPatch, index: int) -> None:
    asked: dict[str, Any] = {}
    bare.setattr(torch.cuda, "set_device", lambda device: asked.update(device=device))
    bare.setattr(distributed, "init_process_group", lambda backend, **kw: asked.update(backend=backend, **kw))
    bare.setattr(process_group, "gpu_name", lambda _: "GPU-a")
    device = torch.device("cuda", index)
    process_group.meet(device, timedelta(minutes=3))
    assert asked == {"device": device, "backend": "cpu:gloo,cuda:nccl", "timeout": timedelta(minutes=3)}
    assert (group_backend(device), group_backend(torch.device("cpu"))) == ("nccl", "gloo")


# A GPU that fails ---------------------------------------------------------------------------------------------------

ILLEGAL = "CUDA error: an illegal memory access was encountered"
FAILURES = [
    (f"{ILLEGAL}\nCUDA kernel errors might be asynchronously reported at some other API call\nCompile with", ILLEGAL),
    (
        "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.cpp:77, unhandled cuda error, NCCL version 2.28.9\n"
        "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 700 'an illegal access'",
        "Cuda failure 700 'an illegal access'",
    ),
    (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 12.00 MiB is"
        " free. Including non-PyTorch memory, this process has 79.0 GiB memory in use. See documentation",
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 12.00 MiB is"
        " free.",
    ),
    ("CUDA out of memory.", "CUDA out of memory."),
    ("The size of tensor a (3) must match", ""),
]


@pytest.mark.parametrize(("text", "said"), FAILURES)
def test_what_cuda_says_is_one_line(text: str, said: str) -> None:
    assert gpu_failure_line(RuntimeError(text)) == said


def test_a_run_that_a_gpu_ends_names_rank_host_and_gpu(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("megatron_tiedlora.runtime.ending.socket", SimpleNamespace(gethostname=lambda: "gpu7"))
    monkeypatch.setattr("megatron_tiedlora.runtime.ending.first_to_fail", lambda: True)
    stop = StopRequests(launchers=[])
    monkeypatch.setattr(stop, "ignore", lambda: None)
    end = End(3, 4, stop, gpu=f"cuda:1 (GPU-{UUID})")
    assert end.failed(RuntimeError(FAILURES[0][0])) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert last == f"error: rank 3 on gpu7, after step 0: cuda:1 (GPU-{UUID}): {ILLEGAL}"


@pytest.mark.parametrize("has_failed", [True, False])
def test_a_rank_that_is_stopped_as_another_has_failed_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], has_failed: bool
) -> None:
    """The reason of the other one, which is on the screen, is the last thing that a user reads."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    if has_failed:
        assert first_to_fail()
    stop = StopRequests(launchers=[])
    end = End(0, 2, stop)
    end.stopped(RunStopped(signal.SIGTERM, "SIGTERM"))
    said = "" if has_failed else "stopped by SIGTERM, before the first step\n"
    assert (capfd.readouterr().err, end.status) == (said, 128 + signal.SIGTERM)
    end.finished_step = lambda: 3
    end.stopped(RunStopped(signal.SIGTERM, "SIGTERM"))
    assert capfd.readouterr().err == "stopped by SIGTERM, saved at step 3; continue with --resume auto\n"


# --deterministic ---------------------------------------------------------------------------------------------------


@pytest.fixture
def torch_as_before() -> Any:
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


def test_what_deterministic_sets(torch_as_before: Any) -> None:
    environment: dict[str, str] = {}
    make_deterministic(environment)
    assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert environment == {name: values[0] for name, values in VARIABLES.items()}
    make_deterministic({"CUBLAS_WORKSPACE_CONFIG": ":16:8"})  # a user's own that does as well


@pytest.mark.parametrize(
    ("name", "value"), [("CUBLAS_WORKSPACE_CONFIG", ":0:0"), ("NCCL_NVLS_ENABLE", "2"), ("NCCL_COLLNET_ENABLE", "1")]
)
def test_an_environment_that_says_otherwise(name: str, value: str) -> None:
    said = refusal(make_deterministic, {name: value})
    assert all(part in said for part in ("--deterministic", name, repr(value), VARIABLES[name][0]))
    assert not torch.are_deterministic_algorithms_enabled()
