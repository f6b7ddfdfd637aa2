"""One part in this process:  python child.py PART OPTIONS FILE    (options of records.CheckOptions as JSON)"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tools/, in place of this folder

from gpu_checks.children import end_with_parent
from gpu_checks.records import CheckOptions, PartOver, Report

# Of a job around this command, in which these processes are no ranks; and what rounds fp32 to TF32, which env tells of.
_LAUNCHERS = ("SLURM_", "TORCHELASTIC_", "GROUP_", "MEGATRON_TIEDLORA_EXPECTED_RANKS")
_TF32 = "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"


def main(argv: Sequence[str]) -> int:
    """Check one part; returns the exit status, 0 whatever was found."""
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
        if part not in ("env", "ranks"):  # env tells more, and part ranks leaves the GPUs to its ranks
            report.tell("device", torch.cuda.get_device_name(), why=f"torch {torch.__version__}")
    try:
        importlib.import_module(f"gpu_checks.{part}").check(report, options)
    except PartOver as over:
        report.add("the rest of the part", "fail", why=str(over), fix="mend what failed before; it may be the reason")
    sys.stdout.flush()
    # Not through the libraries' own ends: a communicator or a profiler may wait there for what is gone.
    os._exit(0)


def _be_alone() -> None:
    """Be the one rank of a world of its own, also in a pod, a Slurm step or under a launcher with variables for more;
    and set what the package sets for its ranks."""
    for name in list(os.environ):
        if name.startswith(_LAUNCHERS):
            del os.environ[name]
    from megatron_tiedlora.runtime.launch_env import free_port, prepare_environment

    port = str(free_port("127.0.0.1"))
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    prepare_environment()


def _look_at_device() -> None:
    """Raise what the device has to say, where this process uses it."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
