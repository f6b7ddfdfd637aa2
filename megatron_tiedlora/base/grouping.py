"""Which of many parts go together: rows of a batch, samples of a pass, tensors of a file."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

Part = TypeVar("Part")


def filled(parts: Iterable[tuple[Part, float, float]]) -> Iterator[list[Part]]:
    """Which parts go together, in their order: each joins the last ones if it fits.

    Args:
        parts: each with its size, and with the most that it may have together with those that join it; a larger one is
            alone. They are read as groups are asked for.
    """
    group: list[Part] = []
    left = 0.0
    for part, size, room in parts:
        if group and size > left:
            yield group
            group = []
        left = left - size if group else room - size
        group.append(part)
    if group:
        yield group
