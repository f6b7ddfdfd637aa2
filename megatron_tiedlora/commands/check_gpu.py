"""Checks what this machine's GPUs can do: runs the parts of `gpu_checks/`, each in its own process, and reports."""

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
from megatron_tiedlora.config.tool_settings import CheckGpuSettings
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


def main(settings: CheckGpuSettings) -> int:
    """Run the checks and report; returns the exit status. A signal ends what the parts have started."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, _leave)
    require_extra("train", only=["deepspeed"])
    parts = list(SHARES) if settings.parts is None else _parts(settings.parts)
    _make_folder(settings.output)
    missing, num_gpus = None, 0
    if settings.device == "cuda":
        from megatron_tiedlora.gpu_checks.env import count_gpus, why_no_gpu

        missing, num_gpus = why_no_gpu(), count_gpus()
        parts = parts if missing is None else ["env"]
    limits = part_limits(parts, settings.minutes, num_gpus=num_gpus)
    about = {
        "model": settings.model,
        "device": settings.device,
        "GPUs": num_gpus,
        "host": socket.gethostname(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "minutes": round(sum(limits.values()) / 60, 1),
        "parts": ",".join(parts),
    }
    shared = CheckOptions(settings.device, settings.model, folder=str(settings.output.absolute()))
    checks = _run(limits, shared, about)
    show("", f"{summary_line(checks)}; {settings.output}/report.md and report.json")
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
