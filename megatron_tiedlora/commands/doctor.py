"""Examines the hosts of a job before it starts: a hostfile's, a Slurm allocation's, or this machine.

It starts what it needs on the hosts and leaves nothing there. With --measure FILE it then measures what tiedlora plan
needs of these hosts.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from megatron_tiedlora.base.atomic import write_json, write_text
from megatron_tiedlora.base.errors import UserError, show
from megatron_tiedlora.base.extras import require_extra
from megatron_tiedlora.base.output_folder import output_files
from megatron_tiedlora.base.paths import user_path
from megatron_tiedlora.cluster.doctor.compare import report_text
from megatron_tiedlora.cluster.doctor.records import DoctorReport
from megatron_tiedlora.cluster.doctor.trial import examine
from megatron_tiedlora.config.doctor_settings import DoctorSettings


def main(settings: DoctorSettings) -> int:
    """Examine and report; returns 0 if a job can start, else 1."""
    require_extra("train", only=["deepspeed"])
    to_file = settings.json_file not in (None, "-")
    file = user_path(str(settings.json_file), flag="--json")
    if to_file and not file.absolute().parent.is_dir():
        raise UserError(f"--json {settings.json_file}: its folder does not exist; make it or give another file")
    written = output_files({"--measure": settings.measure, "--json": settings.json_file if to_file else None})
    report = examine(settings, os.environ, lambda line: show(line, file=sys.stderr))
    text = json.dumps(report.model_dump(mode="json"), indent=2)
    if settings.json_file == "-":
        print(text)
    else:
        print(report_text(report))
    if to_file:
        write_text(file, f"{text}\n")
    if "--measure" in written:
        _write_constants(report, written["--measure"])
    return 0 if report.verdict == "ready" else 1


def _write_constants(report: DoctorReport, file: Path) -> None:
    """Write what was measured, and say so beside the lines of progress."""
    if report.verdict != "ready" or report.machine is None:
        show("nothing was measured, as the hosts are not ready", file=sys.stderr)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, report.machine)
    show(f"{file}: constants of {report.machine['title']}, for tiedlora plan --constants", file=sys.stderr)
