"""Pack tools/check_gpu.py and all that it needs besides Python, torch and numpy into one folder, for a bare machine.

    python tools/pack_gpu_check.py --output build/check_gpu     then, there:  python3 check_gpu/run.py

The folder has wheels (this project's, DeepSpeed's built without nvcc, and a few small packages), the tools and run.py.
run.py unpacks the wheels beside itself and starts the check; it installs nothing and uses no network.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import ClassVar, Literal

from megatron_tiedlora.base.files import new_folder
from megatron_tiedlora.base.messages import UserError, bytes_in_words, show
from megatron_tiedlora.base.output_folder import reject_existing
from megatron_tiedlora.config.cli import parse_settings, run_command
from megatron_tiedlora.config.fields import CommandSettings, FilePath, setting_field

ROOT = Path(__file__).resolve().parents[1]
LARGEST = 20_000_000  # bytes of the folder
# The packages that the check imports, by their names in pip; torch brings the rest. Versions are those installed here.
PACKAGES = (
    *("hjson", "pydantic", "pydantic-core", "annotated-types", "typing-inspection", "typing-extensions"),
    *("pytest", "pluggy", "iniconfig", "Pygments"),
    *("safetensors", "PyYAML", "psutil", "msgpack", "einops", "tqdm", "packaging", "filelock", "py-cpuinfo"),
)
PYTHONS = "3.11,3.12,3.13"
# Wheels name the oldest glibc that they run with.
GLIBCS = ("2_5", "2_12", "2_17", "2_24", "2_26", "2_27", "2_28", "2_31", "2_34")


class PackSettings(CommandSettings):
    """What is packed, and where to."""

    prog: ClassVar[str] = "pack_gpu_check.py"
    about: ClassVar[str] = __doc__ or ""
    examples: ClassVar[str] = ""

    output: FilePath = setting_field("", "a new folder", metavar="DIR")
    pythons: str = setting_field("", "of the machines", PYTHONS, metavar="V,V")
    machine: Literal["x86_64", "aarch64"] = setting_field("", "their processor", "x86_64")


def main(argv: Sequence[str]) -> int:
    """Pack the folder and print its size; returns the exit status."""
    options = parse_settings(argv, PackSettings)
    pythons = [python.strip() for python in options.pythons.split(",") if python.strip()]
    reject_existing(options.output, flag=f"--output {options.output}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(options.output) as folder:
        wheels = folder / "wheels"
        wheels.mkdir()
        _build_wheels(wheels)
        for python in pythons:
            _download(wheels, python, options)
        _copy_tools(folder)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        if size > LARGEST:
            raise UserError(f"--pythons {options.pythons}: {bytes_in_words(size)}, but at most 20 MB fit; give fewer")
    show(f"{options.output}: {bytes_in_words(size)}; on the machine: python3 {options.output.name}/run.py")
    return 0


def _build_wheels(wheels: Path) -> None:
    """Build the wheels of this project and of DeepSpeed, which is published only as source; build no operators."""
    environment = {**os.environ, "DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu"}
    for what in (str(ROOT), _pinned("deepspeed")):
        _pip("wheel", "--no-deps", "-w", str(wheels), what, environment=environment)


def _download(wheels: Path, python: str, options: PackSettings) -> None:
    """Download the small packages for one version of Python; wheels for all versions are downloaded once."""
    tags = (*(f"manylinux_{glibc}" for glibc in GLIBCS), "manylinux2014", "manylinux1")
    _pip(
        "download",
        "--no-deps",
        "--only-binary=:all:",
        f"--python-version={python}",
        "--implementation=cp",
        *(f"--platform={tag}_{options.machine}" for tag in tags),
        "-d",
        str(wheels),
        *map(_pinned, PACKAGES),
    )


def _pinned(name: str) -> str:
    """A requirement with the version that is installed here. Raises UserError if it is not installed."""
    try:
        return f"{name}=={version(name)}"
    except PackageNotFoundError:
        raise UserError(f"{name} is not installed here, so the version to pack is unknown; install it") from None


def _pip(*arguments: str, environment: dict[str, str] | None = None) -> None:
    """Run pip. Raises UserError with the last line of its stderr."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise UserError(f"pip {arguments[0]} failed: {lines[-1] if lines else 'it says nothing'}")


def _copy_tools(folder: Path) -> None:
    (folder / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "check_gpu.py", folder / "tools")
    shutil.copy(ROOT / "tools" / "run_offline.py", folder / "run.py")


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
