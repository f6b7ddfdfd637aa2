"""Folders with an owner, for tests of who may write there."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from megatron_tiedlora.base.ownership import OWNER_FILE, FolderLock, take_folder

HINT = "wait for its end"


def take(folder: Path, **keywords: Any) -> FolderLock:
    return take_folder(folder, hint=HINT, **keywords)


def names(folder: Path) -> set[str]:
    return {item.name for item in folder.iterdir()}


def leave_dead(folder: Path) -> str:
    """A process takes the folder and is killed; returns its token."""
    code = (
        "import os, sys, pathlib; from megatron_tiedlora.base.ownership import take_folder;"
        "take_folder(pathlib.Path(sys.argv[1]), hint=''); os.kill(os.getpid(), 9)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(folder)], timeout=60, check=False)
    assert result.returncode == -9
    return (folder / OWNER_FILE).read_text()


def grow_old(folder: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(folder / OWNER_FILE, (then, then))
