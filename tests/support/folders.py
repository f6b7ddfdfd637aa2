"""Where things are, so that a test can move without a change, and Python started in another folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of the repository
TESTS = ROOT / "tests"  # where Python finds the package `support`
SUPPORT = TESTS / "support"
SHARED_DATA = ROOT.parent / "shared" / "data"  # real data sets, where they are beside the repository


def python(*words: object, folder: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """What `python WORDS` comes to, which finds the package of this repository.

    Args:
        environment: more variables.
    """
    around = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, cwd=folder, env=around)
