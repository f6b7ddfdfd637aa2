"""One sweep at a time in a study's folder: its lock, and a look for runs that outlived their sweep."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.ownership import FolderLock, take_folder
from megatron_tiedlora.study.record import RUNS, SCORES

_FOLDER_FLAG = "--output_dir"


def lock_study(folder: Path, *, take_over: bool = False) -> FolderLock:
    """Become the owner of a study's folder, which is made where it is not there. Launchers inherit the descriptor.

    So a launcher that outlives a killed sweep holds the kernel's lock. Its ranks do not, because the launcher closes
    what they would inherit: `refuse_left_behind` looks for those.

    Raises:
        UserError: another sweep, or a launcher that one has left, is at work here.
    """
    hint = (
        "it is another sweep, or a run that a killed one has left; wait for its end, or end it (--take_over takes the"
        " folder all the same)"
    )
    return take_folder(folder, take_over=take_over, hint=hint)


def refuse_left_behind(folder: Path) -> None:
    """Raise UserError where a process of this user on this machine writes into a run or score of the study, by its
    command line. Ranks on other machines are not seen."""
    places = [f"{os.path.realpath(folder / name)}{os.sep}" for name in (RUNS, SCORES)]
    here = psutil.Process()
    mine = {here.pid, *(parent.pid for parent in here.parents())}  # a shell's own line may name more than this sweep
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid in mine or process.uids().real != os.getuid():
                continue
            for target in _targets(process):
                if any(target.startswith(place) for place in places):
                    raise UserError(
                        f"--output_dir {folder}: process {process.pid} that an earlier sweep has left is at work in"
                        f" {target}; wait for its end, or end it"
                    )


def _targets(process: psutil.Process) -> Iterator[str]:
    """The folders that a process's command line names by --output_dir, absolute and without links.

    Raises:
        psutil.Error: it has ended.
    """
    words = process.cmdline()
    for word, following in zip(words, [*words[1:], ""], strict=False):
        # A launcher of other hosts has the whole command of a rank in one word.
        _, flag, value = word.partition(f"{_FOLDER_FLAG}=")
        value = value if flag else following if word == _FOLDER_FLAG else ""
        if value:
            expanded = os.path.expanduser(value)
            yield os.path.realpath(expanded if os.path.isabs(expanded) else os.path.join(process.cwd(), expanded))
