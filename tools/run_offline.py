"""Start check_gpu.py from a folder that tools/pack_gpu_check.py has made:  python3 run.py [flags of check_gpu.py]

The script needs only Python, torch and numpy. It unpacks the wheels once, into a folder next to the wheels.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
TAG = f"cp{sys.version_info.major}{sys.version_info.minor}"
NEEDED = ("torch", "numpy")


def fits(wheel: Path) -> bool:
    """Return whether a wheel supports this version of Python, according to its file name."""
    python, abi = wheel.stem.split("-")[-3:-1]
    version = int(python.removeprefix("cp3")) if python.startswith("cp3") and python[3:].isdigit() else 0
    return "py3" in python.split(".") or python == TAG or (abi == "abi3" and version <= sys.version_info.minor)


def unpack(wheels: Path, site: Path) -> None:
    """Unpack all wheels for this version of Python into `site`. `site` appears only when all wheels are unpacked."""
    started = site.with_name(f"{site.name}-{os.getpid()}")
    for wheel in sorted(wheels.glob("*.whl")):
        if fits(wheel):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(started)
    started.rename(site)


def main() -> None:
    """Unpack the wheels if they are not yet unpacked, and replace this process by the check."""
    lacking = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if lacking:
        sys.exit(f"error: {sys.executable} has no {' and no '.join(lacking)}; run this with a Python that has both")
    if not any(TAG in wheel.name for wheel in (HERE / "wheels").glob("pydantic_core-*.whl")):
        sys.exit(f"error: packed without Python {TAG[2]}.{TAG[3:]}; pack again with --pythons {TAG[2]}.{TAG[3:]}")
    site = HERE / f"site-{TAG}"
    if not site.exists():
        unpack(HERE / "wheels", site)
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, str(HERE / "tools" / "check_gpu.py"), *sys.argv[1:]]
    os.execve(sys.executable, command, {**os.environ, "PYTHONPATH": path})


if __name__ == "__main__":
    main()
