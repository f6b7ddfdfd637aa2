"""Ways in which layers share the tensors of a method, which no row of the table of methods has: here tl6 gets them.

Each way is told twice: to the package as a row would, and by hand, as groups of layers of a model of five, to the
oracle.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from megatron_tiedlora.base.methods import METHODS, Method
from megatron_tiedlora.planning import passes
from support.oracle_adapter import Groups
from support.run_preludes import kill_at_step

# "pairs": one A and one B for two layers that follow each other. "mixed": each factor in another way.
DECLARED: dict[str, dict[str, Any]] = {
    "pairs": {"A": 2, "B": 2},
    "mixed": {"A": ((1, 4), (2, 5)), "B": 3, "u": "all", "v": 2},
}
_PAIRS: Groups = ((1, 2), (3, 4), (5,))
GROUPS: dict[str, Mapping[str, Groups]] = {
    "pairs": {"A": _PAIRS, "B": _PAIRS},
    "mixed": {"A": ((1, 4), (2, 5), (3,)), "B": ((1, 2, 3), (4, 5)), "u": ((1, 2, 3, 4, 5),), "v": _PAIRS},
}


@contextmanager
def tl6_shares(way: str | None) -> Iterator[None]:
    """Inside, layers share the tensors of tl6 in this way; None: as in the table."""
    row = METHODS["tl6"]
    if way is None:  # nothing that is known has to be forgotten
        yield
        return
    _replace(row, way)
    try:
        yield
    finally:
        _replace(row, None)


def share_tensors(way: str | None, stop_at: int | None = None) -> None:
    """The same for a rank, until it ends; with `stop_at`, it is stopped at that step. It runs before the script."""
    _replace(METHODS["tl6"], way)
    if stop_at is not None:
        kill_at_step(stop_at)


def _replace(row: Method, way: str | None) -> None:
    """Put the row into the table, changed in this way, and forget what is known of configs, which name their method."""
    own = {letter: replace(row.factor(letter), shared_by=of) for letter, of in DECLARED[way].items()} if way else {}
    METHODS["tl6"] = replace(row, **own)
    for known in vars(passes).values():
        if hasattr(known, "cache_clear"):
            known.cache_clear()
