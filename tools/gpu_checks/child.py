"""One part in this process:  python child.py PART OPTIONS FILE    (options of records.CheckOptions as JSON)"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tools/, in place of this folder

from gpu_checks.records import CheckOptions, PartOver, Report


def main(argv: Sequence[str]) -> int:
    """Check one part; returns the exit status, 0 whatever was found."""
    part, values, file = argv
    options = CheckOptions(**json.loads(values))
    if not options.on_gpu:
        os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    from megatron_tiedlora.pipeline.launch_env import prepare_environment

    prepare_environment()
    import torch

    report = Report(part, Path(file))
    if options.on_gpu and torch.cuda.is_available():
        report.is_alive = torch.cuda.synchronize
    try:
        importlib.import_module(f"gpu_checks.{part}").check(report, options)
    except PartOver as over:
        report.add("the rest of the part", "fail", why=str(over), fix="mend what failed before; it may be the reason")
    sys.stdout.flush()
    # Not through the libraries' own ends: a communicator or a profiler may wait there for what is gone.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
