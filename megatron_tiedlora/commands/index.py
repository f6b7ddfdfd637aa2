"""Index a folder of native adapters, and find, verify or compare them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from megatron_tiedlora.base.errors import UserError, show
from megatron_tiedlora.base.paths import last_name
from megatron_tiedlora.base.table import aligned_lines
from megatron_tiedlora.base.wording import bytes_in_words, count_text
from megatron_tiedlora.config.cli import CommandParser, path_value
from megatron_tiedlora.config.fields import TARGETS_HELP, parse_targets

if TYPE_CHECKING:
    from megatron_tiedlora.sharing.index import Entry

EXAMPLE = """\
examples:
  tiedlora index runs                                  write runs/adapters.sqlite
  tiedlora index runs find --method tl6 --task 'squad*'
  tiedlora index runs verify --base_model '*7b*'
  tiedlora index runs diff one-run another-run

The index has a row for each native adapter below DIR: path, name, base and its hashes, method, rank, alpha, targets,
layers, trained parameters, task, scores, run, sha256, size and date. Checkpoints and exports of runs are left out, and
links are not followed. It exits with 1 if an adapter cannot be read, which is said and left out.
`verify` reads every adapter, checks its checksums, and exits with 1 if one is damaged or has changed since it was
indexed. `diff` exits with 1 if the two differ. Any program can read the SQLite file.
"""
_ACTIONS = ("build", "find", "verify", "diff")
_HEADING = ("name", "base", "method", "rank", "targets", "parameters", "task", "date", "path")


def parser() -> CommandParser:
    """The command's flags."""
    described = CommandParser(prog="tiedlora index", description=__doc__, epilog=EXAMPLE)
    described.add_argument("folder", type=path_value, metavar="DIR", help="folder with adapters, at any depth")
    described.add_argument(
        "action", nargs="?", choices=_ACTIONS, default="build", metavar="ACTION", help="build, find, verify or diff"
    )
    described.add_argument("adapters", nargs="*", metavar="ADAPTER", help="for diff: names or paths of two adapters")
    text = "for find and verify: pattern with * and ?"
    for name in ("name", "base_model", "method", "task"):
        described.add_argument(f"--{name}", metavar="TEXT", help=text)
    described.add_argument("--rank", type=int, metavar="N", help="for find and verify")
    described.add_argument("--targets", type=_targets, metavar="TEXT[,TEXT...]", help=f"for find: {TARGETS_HELP}")
    described.add_argument("--json", action="store_true", help="for find: one JSON object a line")
    return described


def _targets(given: str) -> str:
    try:
        return ",".join(parse_targets(given))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main(argv: Sequence[str]) -> int:
    """Build, search or check the index; returns the exit status."""
    options = parser().parse_known_names(argv)
    # Only what reads adapters imports torch, which takes seconds: `find` does not wait for it.
    from megatron_tiedlora.sharing.index import FILTERS, INDEX_FILE, entry_folder, find_entries, find_entry

    root = options.folder
    wanted = {name: value for name in FILTERS if (value := getattr(options, name)) is not None}
    _check(options, wanted)
    if options.action == "find":
        entries = find_entries(root, wanted)
        for line in (json.dumps(asdict(entry)) for entry in entries) if options.json else _table(entries):
            show(line)
        return 0
    from megatron_tiedlora.sharing.collection import build_index, compare_adapters, verify_entries

    match options.action:
        case "build":
            count, problems = build_index(root, progress=True)
            indexed = f"indexed {count_text(count, 'adapter')}: {root / INDEX_FILE}"
            show(*(f"left out: {problem}" for problem in problems), indexed)
            return 1 if problems else 0
        case "verify":
            entries = find_entries(root, wanted)
            problems = verify_entries(root, entries, progress=True)
            size = bytes_in_words(sum(entry.size for entry in entries))
            verified = f"verified {count_text(len(entries), 'adapter')} of {size}: {len(problems)} with problems"
            show(*(f"FAILED  {problem}" for problem in problems), verified)
            return 1 if problems else 0
    one, other = (entry_folder(root, find_entry(root, name)) for name in options.adapters)
    differences = compare_adapters(one, other)
    show(*(differences or ["the same"]))
    return 1 if differences else 0


def _check(options: argparse.Namespace, wanted: Collection[str]) -> None:
    """Raise UserError if flags or words do not belong to the action."""
    action = options.action
    if wanted and action not in ("find", "verify"):
        raise UserError(f"--{next(iter(wanted))} is for find and verify, not for {action}")
    if options.json and action != "find":
        raise UserError(f"--json is for find, not for {action}")
    if action == "diff" and len(options.adapters) != 2:
        raise UserError("diff: give the names or paths of two adapters")
    if action != "diff" and options.adapters:
        raise UserError(f"{action} takes no name of an adapter; give {options.adapters[0]} with --name")


def _table(entries: Sequence[Entry]) -> list[str]:
    rows = [_HEADING]
    for entry in entries:
        numbers = (str(entry.rank), entry.targets, f"{entry.parameters:,}")
        names = (entry.name, last_name(entry.base_model), entry.method)
        rows.append((*names, *numbers, entry.task or "-", entry.date, entry.path))
    return [*aligned_lines(rows, align="<"), "", count_text(len(entries), "adapter")]
