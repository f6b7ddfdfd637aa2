"""The paper's methods as data: this table says which tensors are tied and trained, and how each is initialised.

The update of an adapted linear is z = W x + (alpha / r) diag(v) B diag(u) A x (Tied-LoRA, section 3), A (r, d),
B (o, r), u (r), v (o). Layers may share each of these ("tied"). The paper's tied methods have one A and one B for all
adapted layers; u and v are per layer.
"""

import math
from dataclasses import dataclass
from typing import Literal

from megatron_tiedlora.base.messages import UserError, nearest_name

InitialValue = Literal["normal", "zero", "one"]
Sharing = Literal["all", "one"] | int | tuple[tuple[int, ...], ...]
FACTORS = ("A", "B", "u", "v")


@dataclass(frozen=True)
class Factor:
    """The use that a method makes of one of A, B, u, v.

    Attributes:
        shared_by: the layers that share a tensor. "all": all adapted ones; "one": each has its own; a number n of two
            or more: n consecutive adapted ones; or groups of layers (1-based), where one in no group has its own.
    """

    shared_by: Sharing
    trained: bool
    start: InitialValue


@dataclass(frozen=True)
class Method:
    """A method: one row of the paper's table."""

    name: str
    A: Factor
    B: Factor
    u: Factor
    v: Factor

    def factor(self, name: str) -> Factor:
        """The factor called A, B, u or v."""
        found: Factor = getattr(self, name)
        return found

    @property
    def starts_at_base(self) -> bool:
        """Whether the update is zero before the first step (all methods but tl1)."""
        return "zero" in (self.B.start, self.v.start)


def _row(name: str, a: str, b: str, scale: str, b_start: InitialValue, *, shared_by: Sharing = "all") -> Method:
    """A Method from one table row. a and b: "trained" or "frozen"; scale: which of u, v are trained."""
    return Method(
        name,
        A=Factor(shared_by, a == "trained", "normal"),
        B=Factor(shared_by, b == "trained", b_start),
        u=Factor("one", "u" in scale, "one"),
        v=Factor("one", "v" in scale, "zero" if "v" in scale else "one"),
    )


METHODS: dict[str, Method] = {
    row.name: row
    for row in (
        _row("lora", "trained", "trained", "", "zero", shared_by="one"),
        _row("vera", "frozen", "frozen", "uv", "normal"),
        _row("tl1", "trained", "frozen", "", "normal"),
        _row("tl2", "trained", "frozen", "uv", "normal"),
        _row("tl3", "frozen", "trained", "", "zero"),
        _row("tl4", "frozen", "trained", "u", "zero"),
        _row("tl5", "trained", "trained", "", "zero"),
        _row("tl6", "trained", "trained", "uv", "normal"),
    )
}
METHOD_NAMES = tuple(METHODS)


def find_method(name: str) -> Method:
    """The method called `name`. Raises UserError with the nearest known name."""
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}{nearest_name(name, METHODS)}; known: {', '.join(METHODS)}")
    return METHODS[name]


def default_std_a(hidden_size: int) -> float:
    """Init std of A: 1 / sqrt(d), so that the entries of A x are as large as those of x."""
    return 1.0 / math.sqrt(hidden_size)


def default_std_b(method: Method, rank: int) -> float:
    """Init std of B if B is not initialised to zero: 1 / sqrt(r), so that the entries of B A x are as large as x's.

    A method whose initial update is not zero (tl1) uses 0.3 of that. At the full std the first loss of a real model
    was 3.5 instead of 1.43; at 0.3 it was 1.47, and training ended equally well (docs/start_widths.md).
    """
    return (1.0 if method.starts_at_base else 0.3) / math.sqrt(rank)
