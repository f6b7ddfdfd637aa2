"""Finds and deletes the adapters in an indexed folder that no alias names, and from which no named adapter was started.

A folder is deleted only if everything in it has a name of the package's files and folders, and no other adapter of the
index is below it. Then also the folders in it, such as logs/, are deleted with all that they contain. A folder is first
renamed, so that a deletion that is killed leaves no incomplete adapter. The next deletion removes what it left.
"""

import stat
from collections.abc import Sequence
from pathlib import Path

from megatron_tiedlora.base.files import TEMPORARY_PREFIX, discard, read_json_or_none, remove
from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.base.ownership import is_of_owner, owner_in_words, take_folder
from megatron_tiedlora.checkpoint.native_adapter import CONFIG_FILE, WEIGHTS_FILE
from megatron_tiedlora.config.job_settings import SWEEP_BASE, SWEEP_FILE, SWEEP_STATUS
from megatron_tiedlora.convert import index
from megatron_tiedlora.convert.collection import read_adapters
from megatron_tiedlora.convert.inputs import EXPORT_RECORD, NATIVE_FOLDER
from megatron_tiedlora.runtime.run_folder import RunFolder

_OF_ADAPTER = {CONFIG_FILE, WEIGHTS_FILE}
_OF_EXPORT = {*_OF_ADAPTER, EXPORT_RECORD, NATIVE_FOLDER}
_RUN = RunFolder(Path())
_PATHS = (_RUN.adapter, _RUN.checkpoints, _RUN.logs, _RUN.tensorboard, _RUN.profile, _RUN.status, _RUN.metrics,
          _RUN.scores, _RUN.settings)  # fmt: skip
_OF_RUN = {*(path.name for path in _PATHS), "loss.png", "halving.json", "peft", "merged", "wandb"}


def collect_unused(root: Path, *, delete: bool) -> tuple[dict[Path, int], list[str]]:
    """Index `root` anew, and find the folders that are not needed. With `delete`, delete them.

    A run's folder is deleted as a whole. Kept are the adapters and runs with an alias, with the tag `keep`, and all
    from which one of these was started, or a copy of which is kept.

    Return the bytes of each folder that is not needed (with `delete`: that was deleted), and a sentence for each folder
    that is not needed but is kept. Raise UserError if there is no alias, if a label is of no adapter, or if an adapter
    cannot be read: what it was started from is then unknown."""
    found, kept, file = dict[Path, int](), list[str](), root / index.INDEX_FILE
    with index.changed_index(root) as content:
        if not content.aliases:
            raise UserError(f"{file}: has no alias, so gc would delete every adapter; name some with `alias` first")
        fix = "gc must know from what it was started; mend it, or move its folder away"
        problems = [f"{problem} ({fix})" for problem in read_adapters(root, content)] + content.problems(file)
        others = (other for other in root.rglob(index.INDEX_FILE) if other.parent != root)
        problems += [f"{other}: its aliases would not be kept; run gc in its folder, or remove it" for other in others]
        if problems:
            raise UserError(problems[0])
        for leftover in root.rglob(f"{TEMPORARY_PREFIX}gone-*") if delete else ():
            remove(leftover)
        needed = content.needed()
        for entry in list(content.entries):
            if not needed.isdisjoint(entry.held):
                continue
            try:
                folder, size = _whole_folder(root, entry, content.entries)
                if delete:
                    with take_folder(folder, hint="it is kept") as lock:
                        discard(folder, guard=lock.owner.check)
                    if folder.exists():
                        raise UserError(f"{folder}: cannot be deleted; check its permissions")
                    content.entries = [other for other in content.entries if other is not entry]
                    content.tags = {pair for pair in content.tags if pair[0] != entry.path}
                found[folder] = size
            except UserError as error:
                kept.append(str(error))
    return found, kept


def _whole_folder(root: Path, entry: index.Entry, entries: Sequence[index.Entry]) -> tuple[Path, int]:
    """Return the folder to delete with an adapter, and its bytes. Raise UserError if it must not be deleted."""

    def may_resume(status: Path) -> bool:
        return (read_json_or_none(status) or {}).get("state") not in ("finished", "failed")

    folder = index.entry_folder(root, entry)
    run, known = RunFolder(folder.parent), _OF_ADAPTER
    if entry.run is not None:
        folder, known = run.path, _OF_RUN
        if may_resume(run.status):
            raise UserError(f"{folder}: this run has not ended and may be resumed; delete it by hand")
    elif folder.name == NATIVE_FOLDER and (folder.parent / EXPORT_RECORD).is_file():
        folder, known = folder.parent, _OF_EXPORT
    for parent in (folder, *folder.resolve().parents):
        if (owner := owner_in_words(parent)) is not None:
            raise UserError(f"{parent}: {owner} is using this folder")
        if all((parent / name).is_file() for name in (SWEEP_FILE, SWEEP_BASE)) and may_resume(parent / SWEEP_STATUS):
            raise UserError(f"{folder}: its sweep in {parent} has not ended and may be resumed; delete it by hand")
    for other in entries:  # if the folder is `root` itself, one of them has an alias
        if other is not entry and (root / other.path).is_relative_to(folder):
            raise UserError(f"{folder}: the adapter {other.path} is in it; move it out, or delete it by hand")
    size = 0
    for item in sorted(folder.rglob("*")):
        inside, mode = item.relative_to(folder), item.lstat().st_mode
        names = _OF_ADAPTER if inside.parts[0] in (_RUN.adapter.name, NATIVE_FOLDER) else None
        foreign = inside.parts[0] not in known and not is_of_owner(inside.parts[0])
        foreign |= names is not None and len(inside.parts) > 1 and inside.parts[1] not in names
        if foreign or not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
            raise UserError(f"{item}: is not a file of the adapter or its run; move it away, or delete it by hand")
        size += item.lstat().st_size
    return folder, size
