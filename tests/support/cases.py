"""Cases of tests: which of them the quick suite runs, and many of them in one start of ranks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from typing import Any, TypeVar

import pytest

T, K, V = TypeVar("T"), TypeVar("K", bound=Hashable), TypeVar("V")


def part_of(cases: Sequence[T], *views: Callable[[T], Hashable]) -> list[T]:
    """Few of the cases, chosen so that every value of every view occurs that occurs in all; in their order."""
    shown = [{(number, view(case)) for number, view in enumerate(views)} for case in cases]
    left, chosen = set().union(*shown), []
    while left:
        best = max(range(len(cases)), key=lambda index: len(shown[index] & left))
        chosen.append(best)
        left -= shown[best]
    return [cases[index] for index in sorted(chosen)]


def marked(cases: Iterable[Any], slow: Collection[Any]) -> list[Any]:
    """Cases as parameters of a test, called by what `str` makes of them; those in `slow` are run by hand."""
    return [pytest.param(case, marks=pytest.mark.slow if case in slow else (), id=str(case)) for case in cases]


def grouped(cases: Iterable[K], key: Callable[[K], Hashable]) -> list[list[K]]:
    """The cases by what `key` gives, in their order."""
    groups: dict[Hashable, list[K]] = {}
    for case in cases:
        groups.setdefault(key(case), []).append(case)
    return [*groups.values()]


class Starts(dict[K, V]):
    """What each case gave: those of a group run in one start when the first of them is asked for.

    A start that fails is not made again for the next test.
    """

    def __init__(self, groups: Sequence[Sequence[K]], run: Callable[[Sequence[K]], Iterable[V]]) -> None:
        """`run`: what the cases of a group give, in their order; a failure is an AssertionError."""
        super().__init__()
        self._groups, self._run = groups, run
        self._failed: dict[K, AssertionError] = {}

    def __missing__(self, wanted: K) -> V:
        if wanted in self._failed:
            raise self._failed[wanted]
        group = next(group for group in self._groups if wanted in group)
        try:
            self.update(zip(group, self._run(group), strict=True))
        except AssertionError as error:
            self._failed |= dict.fromkeys(group, error)
            raise
        return self[wanted]
