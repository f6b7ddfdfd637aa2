"""A table of the paper's methods: which tensors are tied, which are trained, and how each is initialised.

The update of an adapted linear is z = W x + (alpha / r) diag(v) B diag(u) A x (Tied-LoRA, section 3), A (r, d),
B (o, r), u (r), v (o). Tied tensors are shared by layers. The paper's tied methods have one A and one B for all
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
    """How a method uses one of the tensors A, B, u and v.

    Attributes:
        shared_by: the layers that share a tensor. "all": all adapted layers; "one": each layer has its own; a number n
            of two or more: n consecutive adapted layers; or lists of layers (1-based), where a layer in no list has its
            own.
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
        """Return the factor A, B, u or v by its name."""
        found: Factor = getattr(self, name)
        return found

    @property
    def starts_at_base(self) -> bool:
        """Return whether the update is zero before the first step (all methods but tl1)."""
        return "zero" in (self.B.start, self.v.start)


def _row(name: str, a: str, b: str, scale: str, b_start: InitialValue, *, shared_by: Sharing = "all") -> Method:
    """Build a Method from one table row. a and b are "trained" or "frozen"; scale says which of u and v are trained."""
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
    """Return the method `name`. Raise UserError with the most similar known name if there is none."""
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}{nearest_name(name, METHODS)}; known: {', '.join(METHODS)}")
    return METHODS[name]


def default_std_a(hidden_size: int) -> float:
    """Return the init std of A: 1 / sqrt(d), so that the entries of A x are as large as those of x."""
    return 1.0 / math.sqrt(hidden_size)


def default_std_b(method: Method, rank: int) -> float:
    """Return the init std of a B that does not start at zero: 1 / sqrt(r). The entries of B A x are then as large as
    x's.

    A method whose initial update is not zero (tl1) uses 0.3 times this value. At the full std the first loss of a real
    model was 3.5 instead of 1.43. At 0.3 it was 1.47, and training ended equally well (docs/start_widths.md).
    """
    return (1.0 if method.starts_at_base else 0.3) / math.sqrt(rank)
