"""Prints what a bug report needs: the record of this machine (runtime/machine.py)."""

from __future__ import annotations

from megatron_tiedlora.base.atomic import write_text
from megatron_tiedlora.base.errors import show
from megatron_tiedlora.base.paths import user_path
from megatron_tiedlora.base.wording import aligned_lines
from megatron_tiedlora.config.tool_settings import EnvSettings
from megatron_tiedlora.runtime.machine import in_words, machine_record


def main(settings: EnvSettings) -> int:
    """Print the table or write JSON; returns the exit status."""
    given = settings.json_file
    file = None if given in (None, "-") else user_path(str(given), flag="--json")
    machine = machine_record()
    text = machine.model_dump_json(indent=2)
    if file is not None:
        write_text(file, f"{text}\n")
    if given == "-":
        show(*text.split("\n"))
        return 0
    sections = in_words(machine)
    rows = [(name, value) for section in sections.values() for name, value in section.items()]
    lines = iter(aligned_lines(rows, align="<", indent="  "))
    for number, (title, section) in enumerate(sections.items()):
        show(*([""] if number else []), title, *(next(lines) for _ in section))
    return 0
