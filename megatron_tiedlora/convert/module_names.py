r"""PEFT's `target_modules` and `exclude_modules`: a list of names or of their ends, or a pattern for whole names.

PEFT matches a pattern with `re.fullmatch`, which can take for ever. Here a pattern is a row of pieces of the few kinds
below, none of which repeats a group. It is followed through a name with one whole number, whose bit i says that the
pieces so far match the name's first i characters. Nothing is compiled and nothing backtracks: a name takes a few
operations for each of at most 1,000 pieces. The result is that of `re.fullmatch` for names of ASCII on one line.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import accumulate
from typing import Any

from megatron_tiedlora.base.errors import UserError, shown

_LONGEST_PATTERN = 1000
_PIECE = re.compile(r"[A-Za-z0-9_|)^$]|\(\?:|\(|\\\.|(?:\.|\\d)[*+]?")
_ACCEPTED = (
    rf"letters, digits, _, \., ., .*, .+, \d+, [0-9]+, |, ^, $ and groups that are not repeated, at most"
    rf" {_LONGEST_PATTERN:,} characters"
)


def name_matcher(modules: Any, *, what: str) -> Callable[[str], bool]:
    """Whether a module's dotted name is one of `modules`, as PEFT decides it.

    Args:
        modules: a pattern for the whole name, or a list of names and of their ends behind a dot.
        what: the file and the field, for messages.

    Raises:
        UserError: a pattern with other pieces than the above or too long, or no list of texts.
    """
    if isinstance(modules, str):
        pieces = _split(modules, what)
        return lambda name: _fullmatch(pieces, name)
    if not isinstance(modules, list) or not all(isinstance(module, str) for module in modules):
        raise UserError(f"{what} = {shown(modules)} is neither a pattern nor a list of names. Write a list of names")
    names = frozenset(modules)
    return lambda name: any(end in names for end in _ends(name))


def _ends(name: str) -> list[str]:
    """The name, and all of it behind each of its dots."""
    parts = name.split(".")
    return [".".join(parts[first:]) for first in range(len(parts))]


def _split(pattern: str, what: str) -> list[str]:
    r"""The pieces of a pattern, `[0-9]` written as `\d`."""
    short = pattern.replace("[0-9]", r"\d") if len(pattern) <= _LONGEST_PATTERN else ""
    pieces = _PIECE.findall(short)
    depths = list(accumulate(piece.startswith("(") - (piece == ")") for piece in pieces))
    if not pieces or "".join(pieces) != short or min(depths) < 0 or depths[-1]:
        raise UserError(f"{what}: the pattern {shown(pattern)} is not read; {_ACCEPTED} are. Write a list of names")
    return pieces


def _fullmatch(pieces: list[str], name: str) -> bool:
    every = (1 << len(name)) - 1
    places: dict[str, int] = {}  # where a piece takes one character
    for place, letter in enumerate(name):
        for key in (r"\." if letter == "." else letter, ".", r"\d" if letter.isdigit() else "."):
            places[key] = places.get(key, 0) | 1 << place
    start = here = 1  # where the present group starts; what its present alternative has come to
    ended = 0  # where the group's alternatives before that have ended
    outer: list[tuple[int, int]] = []  # start and ended of the groups around it
    for piece in pieces:
        if piece in ("(", "(?:"):
            outer.append((start, ended))
            start, ended = here, 0
        elif piece == ")":
            here |= ended
            start, ended = outer.pop()
        elif piece == "|":
            here, ended = start, ended | here
        elif piece == "^":
            here &= 1
        elif piece == "$":
            here &= every + 1
        else:
            taken = places.get(piece.rstrip("*+"), 0)
            if not piece.endswith("*"):
                here = (here & taken) << 1
            if piece.endswith(("*", "+")):
                # Any number more: the sum carries each bit to the end of its run of ones in `taken`, and the bits that
                # it changed are the way there (MatchStar of Cameron et al. 2014, doi:10.1145/2628071.2628079).
                here |= ((here & taken) + taken) ^ taken
    return bool((here | ended) >> len(name) & 1)
