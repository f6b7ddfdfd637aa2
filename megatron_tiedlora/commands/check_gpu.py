"""Check this machine's GPUs: run the tests in `selfcheck/`, each part in its own process, and report the results."""

import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from xml.etree.ElementTree import Element, ElementTree

import torch

from megatron_tiedlora.base.installation import require_extra
from megatron_tiedlora.base.messages import UserError, show
from megatron_tiedlora.config.tool_settings import CHECK_PARTS, CheckGpuSettings
from megatron_tiedlora.selfcheck import parts
from megatron_tiedlora.selfcheck.parts import part_command, part_environment, part_lines, run_part, summary_lines

# Time limit of each part in seconds, 8 minutes in total. A part may also use the unused time of earlier parts.
SHARES = dict(zip(CHECK_PARTS, (50, 35, 85, 95, 50, 35, 30, 100), strict=True))
RANKS_OF_SEVERAL = 340  # time limit in seconds of the part `ranks` on several GPUs; all parts then take 12 minutes
NO_GPU_STATUS = 2


def main(settings: CheckGpuSettings) -> int:
    """Run the checks, write the reports and return the exit status. A signal also ends the running check process."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # for example under nohup
            # SystemExit also ends the running check process, before this process exits.
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    require_extra("check")
    chosen = [part for part in SHARES if settings.parts is None or part in settings.parts]
    missing, num_gpus = None, 0
    if settings.device == "cuda":
        missing, num_gpus = parts.why_no_gpu(), torch.cuda.device_count()
        chosen = chosen if missing is None else ["env"]
    limits = part_limits(chosen, settings.minutes, num_gpus=num_gpus)
    where = f"{num_gpus} GPUs of {socket.gethostname()}" if settings.device == "cuda" else settings.device
    minutes, now = sum(limits.values()) / 60, time.strftime("%Y-%m-%d %H:%M:%S %z")
    about = f"{settings.model} on {where}; {', '.join(chosen)} in at most {minutes:.1f} minutes from {now}"
    head = ["# check-gpu", "", about, ""]
    suites: list[Element] = []
    _write(settings.output, [*head, "No part has ended yet."], suites)
    folder, deadline = settings.output.absolute(), time.monotonic()
    for part, seconds in limits.items():
        deadline += seconds
        left = deadline - time.monotonic()
        given = {"device": settings.device, "model": settings.model, "folder": folder, "seconds": left}
        options = [f"--check-{name}={value}" for name, value in given.items()]
        command = part_command(part, *options, f"--junitxml={folder / f'{part}.xml'}")
        environment = part_environment(part, settings.device)
        suites.append(run_part(part, command, environment=environment, folder=folder, seconds=left))
        show(*part_lines(suites[-1]))
        lines = (line for suite in suites for line in part_lines(suite))
        _write(settings.output, [*head, *summary_lines(suites), *lines], suites)
    show("", *summary_lines(suites), f"{settings.output}/report.md and report.xml")
    if missing is not None:
        show(f"no GPU, so only env was run: {missing}", file=sys.stderr)
        return NO_GPU_STATUS
    return int(parts.verdicts(suites)["failed"] > 0)


def part_limits(chosen: Sequence[str], minutes: float | None, *, num_gpus: int) -> dict[str, float]:
    """Return the time limit of each part in seconds. The total time is divided in proportion to SHARES.

    The total time is `minutes` if given, otherwise the sum of SHARES."""
    shares = {**SHARES, "ranks": RANKS_OF_SEVERAL} if num_gpus > 1 else SHARES
    seconds = sum(shares.values()) if minutes is None else 60 * minutes
    given = sum(shares[part] for part in chosen)
    return {part: seconds * shares[part] / given for part in chosen}


def _write(folder: Path, page: Sequence[str], suites: Sequence[Element]) -> None:
    """Write report.md and report.xml. Raise UserError if the folder cannot be created or written."""
    root = Element("testsuites")
    root.extend(suites)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.md").write_text("\n".join(page) + "\n", encoding="utf-8")
        ElementTree(root).write(folder / "report.xml", encoding="utf-8", xml_declaration=True)
    except OSError as error:
        raise UserError(f"--output {folder}: {error.strerror or error}; give a writable folder") from None
