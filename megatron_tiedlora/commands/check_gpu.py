"""Check what this machine's GPUs can do with this package: correct numbers, speed, memory, several ranks.

    tiedlora check-gpu                                       8 minutes on one H100; uses no network
    tiedlora check-gpu --parts env,attention,correct         the parts that check correctness, on one GPU

    env        versions, driver, the attention and kernels in use and why, important variables, and the peak rates
               of a matmul and a copy
    attention  every available attention kernel against fp64, its time, and its first call on a new shape
    correct    losses and gradients of the model against plain PyTorch in fp64, packed, compiled, recomputed; ZeRO 0-3
    speed      training steps at the width of --model: tokens/s, MFU, time by class of kernels
    memory     allocated and reserved memory compared with the plan of --dry_run; rows of varying lengths
    host       launches and waits per micro-batch, and up to how many tokens the GPU waits for Python
    decode     greedy decoding: the same tokens as without a cache, milliseconds per token
    ranks      several ranks: every layout that fits against one rank, the doctor's all-reduces, a killed rank

Each part runs in its own process with a time limit. --output gets report.json, report.md and the output of each part.
Exit status: 0 nothing failed, 1 something failed (the table says what to do), 2 no GPU (only env runs) or a wrong flag,
130 or 143 stopped by Ctrl-C or a signal, which also ends what the parts have started.
"""

from __future__ import annotations

import json
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

from megatron_tiedlora.base.errors import UserError, show
from megatron_tiedlora.base.extras import require_extra
from megatron_tiedlora.config.cli import CommandParser, path_value
from megatron_tiedlora.config.presets import PRESETS
from megatron_tiedlora.gpu_checks import children
from megatron_tiedlora.gpu_checks.children import run_part
from megatron_tiedlora.gpu_checks.output import check_lines, summary_line, to_json, to_markdown
from megatron_tiedlora.gpu_checks.records import Check, CheckOptions

# Seconds of 8 minutes for each part; what a part does not use goes to the next one.
SHARES = {
    "env": 50,
    "attention": 35,
    "correct": 85,
    "speed": 95,
    "memory": 50,
    "host": 35,
    "decode": 30,
    "ranks": 100,
}
RANKS_OF_SEVERAL = 340  # seconds for part ranks on several GPUs; all parts then take 12 minutes
NO_GPU_STATUS = 2
CHILD = Path(children.__file__).with_name("child.py")


def parser() -> CommandParser:
    """The command's flags."""
    described = CommandParser(prog="tiedlora check-gpu", description=__doc__)
    described.add_argument("--parts", default=",".join(SHARES), metavar="P,P", help="parts to run, in order [all]")
    described.add_argument(
        "--minutes", type=float, metavar="X", help="time for the given parts together [8; on several GPUs 12]"
    )
    described.add_argument(
        "--model",
        default="llama2-7b",
        choices=sorted(name for name in PRESETS if name.startswith("llama2")),  # the reference knows no other layers
        help="whose widths are used; as many layers as fit",
    )
    described.add_argument(
        "--output", default=Path("runs/check_gpu"), type=path_value, metavar="DIR", help="folder [runs/check_gpu]"
    )
    described.add_argument(
        "--device", default="cuda", choices=("cuda", "cpu"), help="cpu: test the checks' own logic without a GPU [cuda]"
    )
    return described


def main(argv: Sequence[str]) -> int:
    """Run the checks and report; returns the exit status. A signal ends what the parts have started."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, _leave)
    options = parser().parse_known_names(argv)
    require_extra("train", only=["deepspeed"])
    parts = _parts(options.parts)
    if options.minutes is not None and not options.minutes > 0:
        raise UserError(f"--minutes {options.minutes}: give more than 0")
    _make_folder(options.output)
    missing, num_gpus = None, 0
    if options.device == "cuda":
        from megatron_tiedlora.gpu_checks.env import count_gpus, why_no_gpu

        missing, num_gpus = why_no_gpu(), count_gpus()
        parts = parts if missing is None else ["env"]
    limits = part_limits(parts, options.minutes, num_gpus=num_gpus)
    about = {
        "model": options.model,
        "device": options.device,
        "GPUs": num_gpus,
        "host": socket.gethostname(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "minutes": round(sum(limits.values()) / 60, 1),
        "parts": ",".join(parts),
    }
    shared = CheckOptions(options.device, options.model, folder=str(options.output.absolute()))
    checks = _run(limits, shared, about)
    show("", f"{summary_line(checks)}; {options.output}/report.md and report.json")
    if missing is not None:
        show(f"no GPU, so only env was run: {missing}", file=sys.stderr)
        return NO_GPU_STATUS
    return int(any(check.status == "fail" for check in checks))


def part_limits(parts: Sequence[str], minutes: float | None, *, num_gpus: int) -> dict[str, float]:
    """Seconds for each part: shares of `minutes` for all of `parts`, or of the command's default time."""
    shares = {**SHARES, "ranks": RANKS_OF_SEVERAL} if num_gpus > 1 else SHARES
    seconds = sum(shares.values()) if minutes is None else 60 * minutes
    given = sum(shares[part] for part in parts)
    return {part: seconds * shares[part] / given for part in parts}


def _make_folder(folder: Path) -> None:
    """Make the folder. Raises UserError if it cannot be made or written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text("{}\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {folder}: {error.strerror or error}; give a writable folder") from None


def _leave(number: int, _frame: object) -> NoReturn:
    """Exit with an exception, so that the running part is ended first."""
    sys.exit(128 + number)


def _run(limits: Mapping[str, float], shared: CheckOptions, about: dict[str, Any]) -> list[Check]:
    """Run the parts and return all findings; the files are written after each part."""
    checks: list[Check] = []
    folder, deadline = Path(shared.folder), time.monotonic()
    for part, seconds in limits.items():
        show(part)
        deadline += seconds
        options = replace(shared, seconds=deadline - time.monotonic())
        command = [sys.executable, "-P", str(CHILD), part, json.dumps(asdict(options))]
        told: list[str] = []

        def hear(check: Check, told: list[str] = told) -> None:
            show(*check_lines(check, told))

        checks += run_part(part, options, command=command, hear=hear)
        (folder / "report.json").write_text(json.dumps(to_json(checks, about), indent=2) + "\n", encoding="utf-8")
        (folder / "report.md").write_text("\n".join(to_markdown(checks, about)) + "\n", encoding="utf-8")
    return checks


def _parts(given: str) -> list[str]:
    """The named parts in the command's order. Raises UserError if one is unknown or none is given."""
    names = [name.strip() for name in given.split(",") if name.strip()]
    unknown = [name for name in names if name not in SHARES]
    if unknown or not names:
        raise UserError(f"--parts {given}: give some of {','.join(SHARES)}")
    return [part for part in SHARES if part in names]
