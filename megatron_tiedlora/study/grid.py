"""The runs of a study: points (adapters that are scored) and, for each point, one run per learning rate.

Owns names and order. It starts and reads nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.config.sweep_settings import SweepSettings

SINGLE_LAYER_METHOD, SINGLE_LAYER_RIVAL = "lora", "tl5"
PAPER_LAYER_STEP = 4


@dataclass(frozen=True)
class Point:
    """An adapter of the study: a method and a rank, on all layers or on one (1-based)."""

    method: str
    rank: int
    layer: int | None = None

    @property
    def name(self) -> str:
        """METHOD-rRANK[-layerN]."""
        return f"{self.method}-r{self.rank}{self.layer_part}"

    @property
    def layer_part(self) -> str:
        """-layerN in names; '' if all layers are adapted."""
        return "" if self.layer is None else f"-layer{self.layer}"


@dataclass(frozen=True)
class Run:
    """One training run of a point."""

    point: Point
    learning_rate: float

    @property
    def name(self) -> str:
        """METHOD-rRANK-lrRATE[-layerN], the name of its folder."""
        point = self.point
        return f"{point.method}-r{point.rank}-lr{rate_text(self.learning_rate)}{point.layer_part}"

    @property
    def settings(self) -> dict[str, Any]:
        """The training settings that the grid decides."""
        point, layers = self.point, {} if self.point.layer is None else {"layers": self.point.layer}
        return {"method": point.method, "rank": point.rank, "learning_rate": self.learning_rate, **layers}


@dataclass(frozen=True)
class SweepGrid:
    """The points of a study: those of Table 2 and the figures, and those of Table 3, of which the last is no LoRA."""

    table: tuple[Point, ...]
    table3: tuple[Point, ...]
    learning_rates: tuple[float, ...]

    @property
    def points(self) -> tuple[Point, ...]:
        """All points, each once, in training order."""
        return tuple(dict.fromkeys((*self.table, *self.table3)))

    def runs(self, point: Point) -> tuple[Run, ...]:
        """The runs of a point, one per learning rate, in the order given."""
        return tuple(Run(point, rate) for rate in self.learning_rates)

    @property
    def all_runs(self) -> tuple[Run, ...]:
        """The runs of all points, in training order."""
        return tuple(run for point in self.points for run in self.runs(point))


def make_grid(settings: SweepSettings, num_layers: int) -> SweepGrid:
    """The grid of `settings` for a model with `num_layers` layers.

    Raises:
        UserError: the model does not have a layer.
    """
    rank, layers = settings.single_layer_rank, single_layers(settings.single_layers, num_layers)
    single = tuple(Point(SINGLE_LAYER_METHOD, rank, layer) for layer in layers)
    return SweepGrid(
        table=tuple(Point(method, r) for method in settings.methods for r in settings.ranks),
        table3=(*single, Point(SINGLE_LAYER_RIVAL, rank)) if layers else (),
        learning_rates=settings.learning_rates,
    )


def single_layers(wanted: Sequence[int] | str | None, num_layers: int) -> tuple[int, ...]:
    """The layers to adapt one at a time: none, those given, or for `paper` 1, 4, 8, ... and the last."""
    if wanted is None:
        return ()
    if isinstance(wanted, str):
        return tuple(sorted({1, num_layers, *range(PAPER_LAYER_STEP, num_layers + 1, PAPER_LAYER_STEP)}))
    if max(wanted) > num_layers:
        raise UserError(f"--single_layers {max(wanted)}: the model has layers 1 to {num_layers}")
    return tuple(wanted)


def rate_text(rate: float) -> str:
    """A learning rate as it is written in names: 1e-4, 2.5e-5, 3e-2. Different rates have different texts."""
    sign, digits, exponent = Decimal(repr(rate)).normalize().as_tuple()
    assert not sign and isinstance(exponent, int)
    text = "".join(map(str, digits))
    mantissa = text[0] + (f".{text[1:]}" if len(text) > 1 else "")
    return f"{mantissa}e{exponent + len(text) - 1}"
