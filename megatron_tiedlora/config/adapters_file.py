"""The file of --adapters: a YAML list with a name and the own settings of each adapter of a run.

    - name: support
      train_file: support.jsonl
      rank: 4
    - name: legal
      train_file: legal.jsonl
      learning_rate: 1e-4

What an entry leaves out is what the command line says. Settings that are not in `PER_ADAPTER` hold for all of them.
An entry's `output_dir` is its run folder, in place of RUN/NAME.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_tiedlora.base.files import read_yaml_list
from megatron_tiedlora.base.messages import UserError, count_text, naming, shown, user_path
from megatron_tiedlora.config.fields import TENSORBOARD, marked, names_elsewhere
from megatron_tiedlora.config.other_names import unknown_names
from megatron_tiedlora.config.settings import Settings, make_settings

PER_ADAPTER = frozenset(marked(Settings, per_adapter=True))
# It names a folder inside the run folder, on any file system.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
# Beside the folders of the adapters; a run of one adapter has `adapter`.
_FILES_OF_RUN = ("adapter", "logs", "profile", "adapters.yaml", "table.csv", "run_status.json")
RUN_OF_ALL = "the run of all"  # its name beside those of adapters, which have no blanks
# Settings of the run of all that none of them has itself.
OF_ALL = marked(Settings, of_group=True)


def read_adapters(path: str, given: Settings) -> dict[str, Settings]:
    """The settings of each adapter in a file, by name, in the file's order.

    Args:
        given: the command line's settings. Those that were given there hold unless an entry says otherwise.

    Raises:
        UserError: the file, the entry and the setting that is wrong.
    """
    check_together(given)
    shared = {name: getattr(given, name) for name in given.model_fields_set if name not in OF_ALL}
    found, taken = dict[str, Settings](), set[str]()
    for number, entry in enumerate(read_yaml_list(adapters_path(path)), start=1):
        name, own = _checked_entry(entry, f"{path}: entry {number}")
        if name.lower() in _FILES_OF_RUN:
            raise UserError(f"{path}: entry {number}: the run itself has a file {shown(name)}; give another name")
        if name.lower() in taken:
            raise UserError(f"{path}: entry {number}: the name {shown(name)} is taken by another; names are folders")
        taken.add(name.lower())
        with naming(f"{path}: {name}"):
            found[name] = make_settings(Settings.combined(shared, own))
    check_folders(path, {name: own.output_dir for name, own in found.items() if own.output_dir is not None})
    if not found:
        raise UserError(f"{path}: holds no adapter; write one entry for each, which begins with '- name: '")
    _check_shared(path, found)
    return found


def adapters_path(given: str) -> Path:
    """The file that --adapters names. Raises UserError if there is none."""
    file = user_path(given)
    if file.is_dir():
        raise UserError(f"--adapters {given}: is a folder; give a YAML list. --init_from starts from an adapter")
    if not file.is_file():
        raise UserError(f"--adapters {given}: no such file")
    return file


def check_together(given: Settings) -> None:
    """Raise UserError for settings of the command line that several adapters together cannot have."""
    if given.resume not in ("none", "auto"):
        raise UserError(f"--resume {given.resume}: each adapter has checkpoints of its own; give auto with --adapters")
    if others := [name for name in given.report_to if name != TENSORBOARD]:
        raise UserError(f"--report_to {others[0]} is not implemented for --adapters; give {TENSORBOARD} or none")


def _checked_entry(entry: Any, where: str) -> tuple[str, dict[str, Any]]:
    """(name, its own settings) of an entry."""
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected 'name: value' lines, found a {type(entry).__name__}")
    name = entry.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        problem = "has no name" if name is None else f"cannot be called {shown(name)}"
        raise UserError(f"{where}: {problem}; give a name of letters, digits, '.', '_' and '-', at most 80 of them")
    others = names_elsewhere(Settings)
    own = {key: value for key, value in entry.items() if key != "name"}
    if unknown := unknown_names("setting", own.keys() - Settings.model_fields.keys(), PER_ADAPTER, others):
        raise UserError(f"{where} ({name}): {unknown}")
    for key in own:
        if key not in PER_ADAPTER:
            raise UserError(
                f"{where} ({name}): {key} cannot differ between the adapters of a run; give it on the command line"
            )
    return name, own


def check_folders(path: str, output_dirs: Mapping[str, str]) -> None:
    """Raise UserError if one of the folders, by name, is another's or lies in it.

    In that of RUN_OF_ALL each adapter may have a folder, but not where the run has files.
    """
    given: dict[Path, str] = {}
    for name, output_dir in output_dirs.items():
        folder = Path(os.path.realpath(user_path(output_dir)))
        if folder in given:
            raise UserError(f"{path}: {name}: output_dir is that of {given[folder]}; give each a folder of its own")
        given[folder] = name
    for folder, name in given.items():
        holder = next((parent for parent in folder.parents if parent in given), folder)
        inside = folder.parts[len(holder.parts) :][:1]
        if inside and given[holder] != RUN_OF_ALL:
            where = f"that of {given[holder]}; give each a folder of its own"
            raise UserError(f"{path}: {name}: output_dir lies in {where}")
        if any(part.startswith(".") or part.lower() in _FILES_OF_RUN for part in inside):
            where = f"{shown(inside[0])}, where the run itself has files"
            raise UserError(f"{path}: {name}: output_dir lies in {where}; give another folder")


def _check_shared(path: str, found: Mapping[str, Settings]) -> None:
    """Raise UserError for a setting of all that differs by default, as the defaults of tasks do."""
    (first, expected), *others = found.items()
    for name, settings in others:
        for field in Settings.model_fields:
            if field not in PER_ADAPTER and getattr(settings, field) != getattr(expected, field):
                of_first, of_other = (shown(getattr(one, field)) for one in (expected, settings))
                raise UserError(
                    f"{path}: {field} would be {of_first} for {first} and {of_other} for {name} by the defaults of"
                    f" their tasks, but it holds for all {count_text(len(found), 'adapter')}; give --{field}"
                )


def rivals_of(settings: Mapping[str, Settings]) -> dict[str, tuple[str, ...]]:
    """By each adapter's name the others that differ from it only in the learning rate, and in the folder."""
    same = {name: own.model_dump_json(exclude={"learning_rate", "output_dir"}) for name, own in settings.items()}
    return {name: tuple(other for other in same if other != name and same[other] == same[name]) for name in same}


def check_halving(settings: Mapping[str, Settings]) -> None:
    """Raise UserError if --halving has nothing to compare, or the best checkpoint is not chosen by the loss."""
    rivals = rivals_of(settings)
    if not any(rivals.values()):
        raise UserError("--halving: no two adapters differ only in the learning rate; remove it")
    for name, own in settings.items():
        if rivals[name] and own.eval_metric != "loss":
            raise UserError(f"{name}: --halving compares validation losses; remove --eval_metric {own.eval_metric}")
