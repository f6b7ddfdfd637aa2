"""The versions that computed something, for the files that say so."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import megatron_tiedlora


def installed_versions(*libraries: str) -> dict[str, str]:
    """Of this package, Python and those of `libraries` that are installed; nothing is imported for it."""
    found = {"megatron_tiedlora": megatron_tiedlora.__version__, "python": platform.python_version()}
    for library in libraries:
        try:
            found[library] = version(library)
        except PackageNotFoundError:  # a metric that was not asked for needs it
            continue
    return found
