"""The wheel, built from what the Dockerfile copies and installed without a network, for tests of it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from support.folders import ROOT

LIMIT = 280  # seconds of a command
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def instructions(name: str) -> list[str]:
    """The arguments of every instruction of the Dockerfile called so, each as one line."""
    joined = re.sub(r"\\\n\s*", "", re.sub(r"(?m)^#.*\n", "", DOCKERFILE))
    return [line.partition(" ")[2] for line in joined.splitlines() if line.startswith(f"{name} ")]


@dataclass(frozen=True)
class Installed:
    """A wheel, and a folder in which it is installed alone; its dependencies are this environment's."""

    wheel: Path
    site: Path

    def run(self, *words: object, folder: Path, **changes: str) -> subprocess.CompletedProcess[str]:
        """A command of the installed package in `folder`: one that it brings, or a path."""
        environment = {**os.environ, "PYTHONPATH": str(self.site), "HF_HUB_OFFLINE": "1", **changes}
        first, *rest = map(str, words)
        command = [str(self.site / "bin" / first) if "/" not in first else first, *rest]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started = subprocess.Popen(command, cwd=folder, env=environment, text=True, start_new_session=True, **pipes)
        try:
            output, errors = started.communicate(timeout=LIMIT)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)  # ranks too
        return subprocess.CompletedProcess(command, started.returncode, output, errors)

    @property
    def path(self) -> str:
        """A PATH on which its command comes first, and the launchers of this environment next."""
        return os.pathsep.join([str(self.site / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])


def install_wheel(root: Path) -> Installed:
    """The wheel of a copy of the repository in `root` that has only what the Dockerfile copies."""
    source, site = root / "src", root / "site"
    for instruction in instructions("COPY"):
        *names, target = instruction.split()
        folder = root / target.strip("/")
        for name in names:
            place = folder / name if target.endswith("/") else folder
            place.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / name, place, symlinks=True, ignore=ignored)
            else:
                shutil.copy(ROOT / name, place)
    build = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(root)], cwd=source, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    wheel = root / done.stdout.split()[-1]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--no-compile", "--target", str(site), str(wheel)], check=True, timeout=100)
    return Installed(wheel, site)
