"""The installed versions, for output files that record them."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import megatron_tiedlora


def installed_versions(*libraries: str) -> dict[str, str]:
    """Versions of this package, of Python and of those `libraries` that are installed. Nothing is imported."""
    found = {"megatron_tiedlora": megatron_tiedlora.__version__, "python": platform.python_version()}
    for library in libraries:
        try:
            found[library] = version(library)
        except PackageNotFoundError:  # only a metric that was not requested needs it
            continue
    return found
