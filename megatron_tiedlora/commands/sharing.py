"""The commands that collect and publish adapters: index and push."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_tiedlora.base.messages import aligned_lines, bytes_in_words, count_text, show
from megatron_tiedlora.base.output_folder import last_name, reject_existing
from megatron_tiedlora.config.adapter_settings import IndexSettings, PushSettings
from megatron_tiedlora.convert.index import INDEX_FILE, Entry, entry_folder, find_entries, find_entry

_HEADING = ("name", "base", "method", "rank", "targets", "parameters", "task", "date", "path")


def index(settings: IndexSettings) -> int:
    """Build, search or check the index; returns the exit status."""
    root = settings.folder
    if settings.action == "find":
        entries = find_entries(root, settings.wanted)
        for line in (json.dumps(asdict(entry)) for entry in entries) if settings.as_json else _table(entries):
            show(line)
        return 0
    # Only what reads adapters imports torch, which takes seconds.
    from megatron_tiedlora.convert.collection import build_index, compare_adapters, verify_entries

    match settings.action:
        case "build":
            count, problems = build_index(root, progress=True)
            indexed = f"indexed {count_text(count, 'adapter')}: {root / INDEX_FILE}"
            show(*(f"left out: {problem}" for problem in problems), indexed)
            return 1 if problems else 0
        case "verify":
            entries = find_entries(root, settings.wanted)
            problems = verify_entries(root, entries, progress=True)
            size = bytes_in_words(sum(entry.size for entry in entries))
            verified = f"verified {count_text(len(entries), 'adapter')} of {size}: {len(problems)} with problems"
            show(*(f"FAILED  {problem}" for problem in problems), verified)
            return 1 if problems else 0
    one, other = (entry_folder(root, find_entry(root, name)) for name in settings.adapters)
    differences = compare_adapters(one, other)
    show(*(differences or ["the same"]))
    return 1 if differences else 0


def _table(entries: Sequence[Entry]) -> list[str]:
    rows = [_HEADING]
    for one in entries:
        names = (one.name, last_name(one.base_model), one.method, str(one.rank), one.targets)
        rows.append((*names, f"{one.parameters:,}", one.task or "-", one.date, one.path))
    return [*aligned_lines(rows, align="<"), "", count_text(len(entries), "adapter")]


def push(settings: PushSettings) -> int:
    """Publish the adapter; returns the exit status."""
    from megatron_tiedlora.integrations.push import check_hub_id, upload, write_published

    check_hub_id(settings.repo, flag="--repo", owned=True)
    if settings.base_name is not None:
        check_hub_id(settings.base_name, flag="--base_name")
    if settings.output is not None:
        reject_existing(settings.output, flag=f"--output {settings.output}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = settings.output or Path(temporary) / "published"
        write_published(settings, folder, say=lambda note: show(f"note: {note}"))
        if settings.dry_run:
            show(f"wrote what {settings.repo} would hold: {folder}")
            return 0
        show(f"published: {upload(folder, settings.repo, private=settings.private)}")
    return 0
