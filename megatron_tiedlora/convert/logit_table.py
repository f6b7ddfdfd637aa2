"""How much two sets of logits differ, what is judged of it, and the table of such comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_tiedlora.base.errors import printable

TOLERANCE = 1e-4  # as a share of the largest logit

Wanted = Literal["equal", "different", "rounded"]


@dataclass(frozen=True)
class LogitComparison:
    """How much logits differ from the native adapter's.

    Attributes:
        largest, mean: maximum and mean of |difference|, as a share of the largest |logit|.
        divergence: mean KL(native || other), in nats per position.
        agreement: share of positions with the same most likely token.
        wanted: "equal" within TOLERANCE, "different" at all, or "rounded": only shown, as the next row is judged.
    """

    name: str
    largest: float
    mean: float
    divergence: float
    agreement: float
    wanted: Wanted

    @property
    def passed(self) -> bool:
        """Whether the difference is as wanted; NaN never is."""
        if self.wanted == "different":
            return self.largest > 0
        return self.largest <= (TOLERANCE if self.wanted == "equal" else float("inf"))

    @property
    def verdict(self) -> str:
        """The last column of the table."""
        if self.wanted == "different":
            if not self.passed:
                return "FAILED: the adapter changes nothing"
            return "differs, as it should" if self.largest > TOLERANCE else "differs by less than the tolerance"
        if not self.passed:
            return f"FAILED: above {TOLERANCE:.0e}"
        return "ok" if self.wanted == "equal" else "for information"


def compare_logits(name: str, native: torch.Tensor, other: torch.Tensor, wanted: Wanted) -> LogitComparison:
    """Compare two sets of logits (b, s, V)."""
    scale = native.abs().max().item()
    difference = (native - other).abs()
    log_p, log_q = native.log_softmax(-1), other.log_softmax(-1)
    return LogitComparison(
        name,
        largest=difference.max().item() / scale,
        mean=difference.mean().item() / scale,
        divergence=(log_p.exp() * (log_p - log_q)).sum(-1).mean().item(),
        agreement=(native.argmax(-1) == other.argmax(-1)).float().mean().item(),
        wanted=wanted,
    )


def format_comparisons(results: Sequence[LogitComparison]) -> str:
    """A table of comparisons, one per line under a heading."""
    heading = f"{'logits against base + adapter':<30}{'max diff':>10}{'mean diff':>11}{'KL':>10}{'top-1':>8}  verdict"
    lines = [
        f"{row.name:<30}{row.largest:>10.1e}{row.mean:>11.1e}{row.divergence:>10.1e}{row.agreement:>8.1%}  "
        for row in results
    ]
    return "\n".join([heading, *(printable(line + row.verdict) for line, row in zip(lines, results, strict=True))])
