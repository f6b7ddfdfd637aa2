"""Versions of this package and of libraries, for output files that record them; and the extras of this package: what a
command needs that loading, merging and exporting do not. Nothing is imported to find that out."""

import platform
import shlex
from collections.abc import Collection, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from megatron_tiedlora.base.messages import UserError, enumerate_names

__version__ = "0.2.0"  # pyproject.toml reads it from here
PACKAGE_FOLDER = Path(__file__).parents[1]  # of megatron_tiedlora
# By extra: the modules that it brings, which pyproject.toml lists under their names as packages.
EXTRAS: Mapping[str, tuple[str, ...]] = {
    "train": ("deepspeed", "datasets", "pyarrow", "accelerate", "tensorboard", "matplotlib"),
    "eval": ("deepspeed", "datasets", "pyarrow", "rouge_score", "sacrebleu"),
    "check": ("deepspeed", "pytest"),
    "peft": ("peft",),
    "quantised": ("bitsandbytes",),
    "demo": ("gguf", "accelerate", "reasoning_gym", "peft", "tokenizers"),
    "mpi": ("mpi4py",),
}
# A run does without these: they are asked for where they are used, by --report_to and for figures.
_WHERE_USED = ("accelerate", "tensorboard", "matplotlib")


def installed_versions(*libraries: str) -> dict[str, str]:
    """Versions of this package, of Python and of those `libraries` that are installed."""
    found = {"megatron_tiedlora": __version__, "python": platform.python_version()}
    for library in libraries:
        if number := _installed(library):  # the library of a metric that was not requested may be missing
            found[library] = number
    return found


@cache
def _installed(library: str) -> str | None:
    """The version of an installed library; looking it up parses the library's whole metadata file."""
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def missing_modules(*names: str) -> list[str]:
    """The modules of these extras that are not installed; nothing is imported."""
    modules = dict.fromkeys(module for name in names for module in EXTRAS[name])
    return [module for module in modules if find_spec(module) is None]


def require_extra(*names: str, only: Collection[str] | None = None) -> None:
    """Raise UserError if a module of these extras that every run needs, or one of `only`, is not installed."""
    absent = missing_modules(*names)
    missing = [name for name in absent if (name not in _WHERE_USED if only is None else name in only)]
    if missing:
        raise UserError(f"this needs {enumerate_names(missing)}; {install_hint(*names)}")


def missing_module(error: ModuleNotFoundError) -> UserError | None:
    """The error for a user who lacks an extra; None if the module belongs to none."""
    module = (error.name or "").partition(".")[0]
    names = [name for name, modules in EXTRAS.items() if module in modules]
    return UserError(f"this needs {module}; {install_hint(*names[:1])}") if names else None


def install_hint(*names: str) -> str:
    """How to install these extras.

    pip adds what they bring to the package that is installed. One that is not, but runs from a clone, is named by its
    folder, because a package of the same name in an index would be somebody else's.
    """
    what = "megatron_tiedlora" if _installed("megatron_tiedlora") else str(PACKAGE_FOLDER.parent)
    extras = ",".join(names)
    return f"install it with: pip install {shlex.quote(f'{what}[{extras}]')}"
