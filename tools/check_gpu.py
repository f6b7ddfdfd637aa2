"""What this machine's GPUs can do with this package, measured here: right numbers, speed, memory, several ranks.

    python tools/check_gpu.py                                8 minutes on one H100; nothing is read from a network
    python tools/check_gpu.py --parts env,attention,correct  the parts that judge correctness, on one GPU

    env        versions, driver, what attention and kernels will use and why, variables that matter, two ceilings:
               a matmul and a copy
    attention  every attention kernel that is here against fp64, its time, and its first call on a new shape
    correct    losses and gradients of the model against plain PyTorch in fp64, packed, compiled, recomputed; ZeRO 0-3
    speed      training steps at the width of --model: tokens/s, MFU, time by class of kernels
    memory     allocated and reserved memory beside what --dry_run plans; rows of many lengths
    host       launches and waits of a micro-batch, and below how many tokens the GPU waits for Python
    decode     greedy decoding: the same tokens as without a cache, milliseconds a token
    ranks      several ranks: every layout that fits against one rank, the doctor's all-reduces, a killed rank

Each part runs in a process of its own with a time limit. --output gets report.json, report.md and the output of each
part. Exit status: 0 nothing failed, 1 something failed, and the table says what to do, 2 no GPU (env alone is told).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gpu_checks.children import python_command, run_part
from gpu_checks.output import check_lines, summary_line, to_json, to_markdown
from gpu_checks.records import Check, CheckOptions

from megatron_tiedlora.config.cli import CommandParser, path_value, run_command
from megatron_tiedlora.config.errors import UserError, show
from megatron_tiedlora.config.presets import PRESETS

# Parts with the seconds that each may take of 8 minutes; what one leaves is the next one's.
SHARES = {
    "env": 50,
    "attention": 45,
    "correct": 95,
    "speed": 95,
    "memory": 60,
    "host": 40,
    "decode": 35,
    "ranks": 60,
}
NO_GPU_STATUS = 2
CHILD = Path(__file__).resolve().parent / "gpu_checks" / "child.py"


def parser() -> CommandParser:
    """The command's flags."""
    described = CommandParser(prog="check_gpu.py", description=__doc__)
    described.add_argument("--parts", default=",".join(SHARES), metavar="P,P", help="what to check, in order [all]")
    described.add_argument("--minutes", default=8.0, type=float, metavar="X", help="for all parts together [8]")
    described.add_argument(
        "--model", default="llama2-7b", choices=sorted(PRESETS), help="whose widths are measured; as many layers as fit"
    )
    described.add_argument(
        "--output", default=Path("runs/check_gpu"), type=path_value, metavar="DIR", help="folder [runs/check_gpu]"
    )
    described.add_argument(
        "--device", default="cuda", choices=("cuda", "cpu"), help="cpu: try the checks' own logic without a GPU [cuda]"
    )
    return described


def main(argv: Sequence[str]) -> int:
    """Check and report; returns the exit status."""
    options = parser().parse_known_names(argv)
    parts = _parts(options.parts)
    if not options.minutes > 0:
        raise UserError(f"--minutes {options.minutes}: give more than 0")
    options.output.mkdir(parents=True, exist_ok=True)
    missing = None
    if options.device == "cuda":
        from gpu_checks.env import why_no_gpu

        missing = why_no_gpu()
        parts = parts if missing is None else ["env"]
    about = {"model": options.model, "device": options.device, "minutes": options.minutes, "parts": ",".join(parts)}
    shared = CheckOptions(options.device, options.model, folder=str(options.output.absolute()))
    checks = _run(parts, shared, options.minutes, about)
    show("", f"{summary_line(checks)}; {options.output}/report.md and report.json")
    if missing is not None:
        show(f"no GPU, so env alone: {missing}", file=sys.stderr)
        return NO_GPU_STATUS
    return int(any(check.status == "fail" for check in checks))


def _run(parts: Sequence[str], shared: CheckOptions, minutes: float, about: dict[str, Any]) -> list[Check]:
    """All findings; the files are written after each part."""
    checks: list[Check] = []
    folder = Path(shared.folder)
    scale, deadline = 60 * minutes / sum(SHARES.values()), time.monotonic()
    for part in parts:
        show(part)
        deadline += scale * SHARES[part]
        options = replace(shared, seconds=deadline - time.monotonic())
        command = python_command(CHILD, part, json.dumps(asdict(options)))
        told: list[str] = []

        def hear(check: Check, told: list[str] = told) -> None:
            show(*check_lines(check, told))

        checks += run_part(part, options, command=command, hear=hear)
        (folder / "report.json").write_text(json.dumps(to_json(checks, about), indent=2) + "\n", encoding="utf-8")
        (folder / "report.md").write_text("\n".join(to_markdown(checks, about)) + "\n", encoding="utf-8")
    return checks


def _parts(given: str) -> list[str]:
    """The named parts in the order of the command. Raises UserError for one that is not known, or for none."""
    names = [name.strip() for name in given.split(",") if name.strip()]
    unknown = [name for name in names if name not in SHARES]
    if unknown or not names:
        raise UserError(f"--parts {given}: give some of {','.join(SHARES)}")
    return [part for part in SHARES if part in names]


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
