"""Run one part in this process:  python child.py PART OPTIONS FILE    (options of records.CheckOptions as JSON)"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_tiedlora.base.child_process import end_with_parent
from megatron_tiedlora.gpu_checks.records import CheckOptions, PartOver, Report

# Variables of a surrounding job, of which these processes are not ranks; and one that rounds fp32 to TF32 (see env).
_LAUNCHERS = ("SLURM_", "TORCHELASTIC_", "GROUP_", "MEGATRON_TIEDLORA_EXPECTED_RANKS")
_TF32 = "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"


def main(argv: Sequence[str]) -> int:
    """Check one part; returns the exit status, which is 0 for any findings."""
    end_with_parent()
    part, values, file = argv
    options = CheckOptions(**json.loads(values))
    if not options.on_gpu:
        os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    if part != "env":
        os.environ.pop(_TF32, None)  # before torch reads it
    _be_alone()
    import torch

    report = Report(part, Path(file))
    if options.on_gpu and torch.cuda.is_available():
        report.is_alive = _look_at_device
        if part not in ("env", "ranks"):  # env reports more, and part ranks leaves the GPUs to its ranks
            report.tell("device", torch.cuda.get_device_name(), why=f"torch {torch.__version__}")
    try:
        importlib.import_module(f"megatron_tiedlora.gpu_checks.{part}").check(report, options)
    except PartOver as over:
        report.add("the rest of the part", "fail", why=str(over), fix="correct the failure before it first")
    sys.stdout.flush()
    # Skip the libraries' exit handlers: a communicator or a profiler may wait there forever.
    os._exit(0)


def _be_alone() -> None:
    """Make this process the only rank of its world, even in a pod, a Slurm step or under a launcher that sets variables
    for more ranks; and set what the package sets for its ranks."""
    from megatron_tiedlora.config.hosts import rank_variables
    from megatron_tiedlora.runtime.launch_env import free_port, prepare_environment

    for name in list(os.environ):
        if name.startswith(_LAUNCHERS):
            del os.environ[name]
    os.environ.update(rank_variables(0, 1, 0, "127.0.0.1", free_port("127.0.0.1")))
    prepare_environment()


def _look_at_device() -> None:
    """Raise the device's error, if this process uses the device and it has one."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
