r"""PEFT's `target_modules` and `exclude_modules`: a list of names or name endings, or a pattern for whole names.

PEFT matches a pattern with `re.fullmatch`, which can take exponential time. Here a pattern is a sequence of the few
kinds of pieces below, none of which repeats a group. The state of a match is one integer, whose bit i says whether the
pieces so far match the name's first i characters. Nothing is compiled or backtracks: a name takes a few operations for
each of at most 1,000 pieces. For one-line ASCII names the result is that of `re.fullmatch`.
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
        pieces = _split(modules, what)
        return lambda name: _fullmatch(pieces, name)
    if not isinstance(modules, list) or not all(isinstance(module, str) for module in modules):
        raise UserError(f"{what} = {shown(modules)} is neither a pattern nor a list of names. Write a list of names")
    names = frozenset(modules)
    return lambda name: any(end in names for end in _ends(name))


def _ends(name: str) -> list[str]:
    """The name, and its endings after each dot."""
    parts = name.split(".")
    return [".".join(parts[first:]) for first in range(len(parts))]


def _split(pattern: str, what: str) -> list[str]:
    r"""The pieces of a pattern, with `[0-9]` replaced by `\d`."""
    short = pattern.replace("[0-9]", r"\d") if len(pattern) <= _LONGEST_PATTERN else ""
    pieces = _PIECE.findall(short)
    depths = list(accumulate(piece.startswith("(") - (piece == ")") for piece in pieces))
    if not pieces or "".join(pieces) != short or min(depths) < 0 or depths[-1]:
        raise UserError(f"{what}: the pattern {shown(pattern)} is not read; {_ACCEPTED} are. Write a list of names")
    return pieces


def _fullmatch(pieces: list[str], name: str) -> bool:
    every = (1 << len(name)) - 1
    positions: dict[str, int] = {}  # the characters that a piece matches
    for position, letter in enumerate(name):
        for key in (r"\." if letter == "." else letter, ".", r"\d" if letter.isdigit() else "."):
            positions[key] = positions.get(key, 0) | 1 << position
    start = here = 1  # states at the start of the current group, and in its current alternative
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
            here &= every + 1
        else:
            taken = positions.get(piece.rstrip("*+"), 0)
            if not piece.endswith("*"):
                here = (here & taken) << 1
            if piece.endswith(("*", "+")):
                # Match any number more: the sum carries each bit to the end of its run of ones in `taken`, and changes
                # the bits on the way (MatchStar of Cameron et al. 2014, doi:10.1145/2628071.2628079).
                here |= ((here & taken) + taken) ^ taken
    return bool((here | ended) >> len(name) & 1)
