"""Pack tools/check_gpu.py and its dependencies into one folder for machines with only Python, torch and numpy.

    python tools/pack_gpu_check.py --output build/check_gpu     then, there:  python3 check_gpu/run.py

The folder has wheels of this project, DeepSpeed (built without nvcc) and a few small packages, and a script, run.py.
run.py unpacks the wheels next to itself and starts the check. It installs nothing and uses no network.
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
LARGEST = 20_000_000  # maximum size of the folder in bytes
# The pip names of the packages that the check imports and torch does not bring. The installed versions are packed.
PACKAGES = (
    *("hjson", "pydantic", "pydantic-core", "annotated-types", "typing-inspection", "typing-extensions"),
    *("pytest", "pluggy", "iniconfig", "Pygments"),
    *("safetensors", "PyYAML", "psutil", "msgpack", "einops", "tqdm", "packaging", "filelock", "py-cpuinfo"),
)
PYTHONS = "3.11,3.12,3.13"
# The platform tags of wheels contain the oldest glibc version that they support.
GLIBCS = ("2_5", "2_12", "2_17", "2_24", "2_26", "2_27", "2_28", "2_31", "2_34")


class PackSettings(CommandSettings):
    """The settings of this script: the output folder, and the Python versions and the processor of the machines."""

    prog: ClassVar[str] = "pack_gpu_check.py"
    about: ClassVar[str] = __doc__ or ""
    examples: ClassVar[str] = ""

    output: FilePath = setting_field("", "the new folder", metavar="DIR")
    pythons: str = setting_field("", "the Python versions of the machines", PYTHONS, metavar="V,V")
    machine: Literal["x86_64", "aarch64"] = setting_field("", "the processor of the machines", "x86_64")


def main(argv: Sequence[str]) -> int:
    """Pack the folder, print its size and return the exit status."""
    options = parse_settings(argv, PackSettings)
    pythons = [python.strip() for python in options.pythons.split(",") if python.strip()]
    reject_existing(options.output, flag=f"--output {options.output}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(options.output) as folder:
        wheels = folder / "wheels"
        wheels.mkdir()
        environment = {**os.environ, "DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu"}  # build no CUDA operators
        for what in (str(ROOT), _pinned("deepspeed")):  # DeepSpeed is published only as source
            _pip("wheel", "--no-deps", "-w", str(wheels), what, environment=environment)
        for python in pythons:
            _download(wheels, python, options)
        (folder / "tools").mkdir()
        shutil.copy(ROOT / "tools" / "check_gpu.py", folder / "tools")
        shutil.copy(ROOT / "tools" / "run_offline.py", folder / "run.py")
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        if size > LARGEST:
            raise UserError(f"--pythons {options.pythons}: {bytes_in_words(size)} is above 20 MB; give fewer versions")
    show(f"{options.output}: {bytes_in_words(size)}; on the machine: python3 {options.output.name}/run.py")
    return 0


def _download(wheels: Path, python: str, options: PackSettings) -> None:
    """Download the wheels of the small packages for one version of Python."""
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
    """Return the requirement `name==VERSION` with the installed version. Raise UserError if no version is installed."""
    try:
        return f"{name}=={version(name)}"
    except PackageNotFoundError:
        raise UserError(f"{name} is not installed, so the version to pack is unknown; run pip install {name}") from None


def _pip(*arguments: str, environment: dict[str, str] | None = None) -> None:
    """Run pip. If pip fails, raise UserError with the last line of its stderr."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        why = lines[-1] if lines else "no message"
        raise UserError(f"pip {arguments[0]} failed ({why}); correct this, or check the network")


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
