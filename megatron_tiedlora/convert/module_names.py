r"""PEFT's `target_modules` and `exclude_modules`: a list of names or name endings, or a pattern for whole names. The
patterns of `rank_pattern` and `alpha_pattern` match whole names or their endings after a dot.

PEFT matches a pattern with `re`, which can take exponential time. Here a pattern is a sequence of the few kinds of
pieces below, none of which repeats a group. The state of a match is one integer, whose bit i says whether the pieces so
far match the characters before the i-th. Nothing is compiled or backtracks: a name takes a few operations for each of
at most 1,000 pieces. For one-line ASCII names the result is that of `re`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from itertools import accumulate
from typing import Any

from megatron_tiedlora.base.errors import UserError, shown

_LONGEST_PATTERN = 1000
_LONGEST_PATTERNS = 50_000  # all patterns of a field together; 126 layers of 7 whole names have 30,000
_PIECE = re.compile(r"[A-Za-z0-9_|)^$]|\(\?:|\(|\\\.|(?:\.|\\d)[*+]?")
_ACCEPTED = (
    rf"letters, digits, _, \., ., .*, .+, \d+, [0-9]+, |, ^, $ and groups without repetition, at most"
    rf" {_LONGEST_PATTERN:,} characters"
)


def name_matcher(modules: Any, *, what: str) -> Callable[[str], bool]:
    """A function that tells whether a module's dotted name matches `modules`, by PEFT's rules.

    Args:
        modules: a pattern for the whole name, or a list of names or their endings after a dot.
        what: the file and the field, for messages.

    Raises:
        UserError: the pattern has other pieces or is too long, or it is not a list of strings.
    """
    if isinstance(modules, str):
        pieces = _split(modules, what, "Write a list of names")
        return lambda name: _matches(pieces, _positions(name), starts=1, end=len(name))
    if not isinstance(modules, list) or not all(isinstance(module, str) for module in modules):
        raise UserError(f"{what} = {shown(modules)} is neither a pattern nor a list of names. Write a list of names")
    names = frozenset(modules)
    return lambda name: any(end in names for end in _ends(name))


def pattern_finder(patterns: Collection[str], *, what: str) -> Callable[[str], str | None]:
    """A function that returns the first pattern that matches a module's dotted name, or an ending of it after a dot;
    None if none does.

    Args:
        what: the file and the field, for messages.

    Raises:
        UserError: a pattern has other pieces, or they are too long.
    """
    if (length := sum(map(len, patterns))) > _LONGEST_PATTERNS:
        too_long = f"its patterns have {length:,} characters; at most {_LONGEST_PATTERNS:,} are read"
        raise UserError(f"{what}: {too_long}. Write endings of names")
    split = {pattern: _split(pattern, what, "Write endings of names") for pattern in patterns}

    def find(name: str) -> str | None:
        positions = _positions(name)
        starts = 1 | positions.get(r"\.", 0) << 1
        found = (key for key, pieces in split.items() if _matches(pieces, positions, starts=starts, end=len(name)))
        return next(found, None)

    return find


def _ends(name: str) -> list[str]:
    """The name, and its endings after each dot."""
    parts = name.split(".")
    return [".".join(parts[first:]) for first in range(len(parts))]


def _split(pattern: str, what: str, instead: str) -> list[str]:
    r"""The pieces of a pattern, with `[0-9]` replaced by `\d`. `instead` says what to write if it is rejected."""
    short = pattern.replace("[0-9]", r"\d") if len(pattern) <= _LONGEST_PATTERN else ""
    pieces = _PIECE.findall(short)
    depths = list(accumulate(piece.startswith("(") - (piece == ")") for piece in pieces))
    if not pieces or "".join(pieces) != short or min(depths) < 0 or depths[-1]:
        raise UserError(f"{what}: the pattern {shown(pattern)} is not read; {_ACCEPTED} are. {instead}")
    return pieces


def _positions(name: str) -> dict[str, int]:
    """The characters of a name that a piece matches, as bits, by piece."""
    positions: dict[str, int] = {}
    for position, letter in enumerate(name):
        for key in (r"\." if letter == "." else letter, ".", r"\d" if letter.isdigit() else "."):
            positions[key] = positions.get(key, 0) | 1 << position
    return positions


def _matches(pieces: list[str], positions: dict[str, int], *, starts: int, end: int) -> bool:
    """Whether the pieces match all characters from one of the positions `starts` (bits) to `end`."""
    start = here = starts  # states at the start of the current group, and in its current alternative
    ended = 0  # states at the ends of the group's earlier alternatives
    outer: list[tuple[int, int]] = []  # start and ended of the enclosing groups
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
            here &= 1 << end
        else:
            taken = positions.get(piece.rstrip("*+"), 0)
            if not piece.endswith("*"):
                here = (here & taken) << 1
            if piece.endswith(("*", "+")):
                # Match any number more: the sum carries each bit to the end of its run of ones in `taken`, and changes
                # the bits on the way (MatchStar of Cameron et al. 2014, doi:10.1145/2628071.2628079).
                here |= ((here & taken) + taken) ^ taken
    return bool((here | ended) >> end & 1)
