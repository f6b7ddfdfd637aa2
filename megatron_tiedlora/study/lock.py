"""One sweep at a time in a study's folder: its lock, and a check for runs that outlived their sweep."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.ownership import FolderLock, take_folder
from megatron_tiedlora.study.record import GROUPS, RUNS, SCORES

_FOLDER_FLAG = "--output_dir"


def lock_study(folder: Path, *, take_over: bool = False) -> FolderLock:
    """Become the owner of a study's folder, which is created if it does not exist. Launchers inherit the descriptor.

    So a launcher that outlives a killed sweep holds the kernel's lock. Its ranks do not, because the launcher closes
    what they would inherit; `reject_left_behind` finds those.

    Raises:
        UserError: another sweep, or a launcher of a killed one, is writing here.
    """
    hint = (
        "it is another sweep, or a run of a killed sweep; wait until it ends, or end it (--take_over takes the folder"
        " anyway)"
    )
    return take_folder(folder, take_over=take_over, hint=hint)


def reject_left_behind(folder: Path) -> None:
    """Raise UserError if the command line of one of this user's processes names a run or score of the study.

    Ranks on other machines are not seen.
    """
    folders = [f"{os.path.realpath(folder / name)}{os.sep}" for name in (RUNS, GROUPS, SCORES)]
    here = psutil.Process()
    mine = {here.pid, *(parent.pid for parent in here.parents())}  # a parent shell's command line may name the folder
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid in mine or process.uids().real != os.getuid():
                continue
            for target in _targets(process):
                if any(target.startswith(path) for path in folders):
                    raise UserError(
                        f"--output_dir {folder}: process {process.pid} of an earlier sweep is still writing {target};"
                        " wait until it ends, or end it"
                    )


def _targets(process: psutil.Process) -> Iterator[str]:
    """Yield the folders that a process's command line names with --output_dir, absolute and without links.

    Raises:
        psutil.Error: the process has ended.
    """
    words = process.cmdline()
    for word, following in zip(words, [*words[1:], ""], strict=False):
        # A launcher for other hosts has the whole command of a rank in one argument.
        _, flag, value = word.partition(f"{_FOLDER_FLAG}=")
        value = value if flag else following if word == _FOLDER_FLAG else ""
        if value:
            expanded = os.path.expanduser(value)
            yield os.path.realpath(expanded if os.path.isabs(expanded) else os.path.join(process.cwd(), expanded))
