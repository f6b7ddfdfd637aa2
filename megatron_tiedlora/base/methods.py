"""Define the paper's methods: which tensors are tied, which are trained, and how each tensor is initialised.

An adapted linear computes z = W x + (alpha / r) diag(v) B diag(u) A x (Tied-LoRA, section 3), with A (r, d), B (o, r),
u (r) and v (o). Layers share tied tensors. The paper's tied methods have one A and one B for all adapted layers, and
each layer has its own u and v.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_tiedlora.base.messages import UserError, nearest_name

InitialValue = Literal["normal", "zero", "one"]
Sharing = Literal["all", "one"] | int | tuple[tuple[int, ...], ...]
FACTORS = ("A", "B", "u", "v")


@dataclass(frozen=True)
class Factor:
    """The sharing, training and initial value of one of the tensors A, B, u and v in a method.

    Attributes:
        shared_by: the layers that share a tensor. "all": all adapted layers. "one": each layer has its own tensor. A
            number n of two or more: n consecutive adapted layers. Lists of layers (1-based): the layers in each list
            share a tensor; a layer in no list has its own tensor.
    """

    shared_by: Sharing
    trained: bool
    start: InitialValue


@dataclass(frozen=True)
class Method:
    """A method of the paper: how it uses A, B, u and v."""

    name: str
    A: Factor
    B: Factor
    u: Factor
    v: Factor

    def factor(self, name: str) -> Factor:
        """Return the factor with the name A, B, u or v."""
        found: Factor = getattr(self, name)
        return found

    @property
    def starts_at_base(self) -> bool:
        """Return whether the update is zero before the first step (all methods but tl1)."""
        return "zero" in (self.B.start, self.v.start)


def _row(name: str, a: str, b: str, scale: str, b_start: InitialValue, *, shared_by: Sharing = "all") -> Method:
    """Return the method of one table row. a and b are "trained" or "frozen", and scale names the trained vectors."""
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
    """Return the method `name`. If it is unknown, raise a UserError that suggests the most similar name."""
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}{nearest_name(name, METHODS)}; give one of: {', '.join(METHODS)}")
    return METHODS[name]
