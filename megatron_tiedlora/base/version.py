"""The version of this package and of installed libraries, for output files that record them."""

from __future__ import annotations

import functools
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__version__ = "0.2.0.dev0"  # pyproject.toml reads it from here
PACKAGE_FOLDER = Path(__file__).parents[1]  # of megatron_tiedlora


def installed_versions(*libraries: str) -> dict[str, str]:
    """Versions of this package, of Python and of those `libraries` that are installed. Nothing is imported."""
    found = {"megatron_tiedlora": __version__, "python": platform.python_version()}
    for library in libraries:
        if number := _installed(library):  # the library of a metric that was not requested may be missing
            found[library] = number
    return found


@functools.cache
def _installed(library: str) -> str | None:
    """The version of an installed library; looking it up parses the library's whole metadata file."""
    try:
        return version(library)
    except PackageNotFoundError:
        return None
