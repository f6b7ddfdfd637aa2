"""--halving: of adapters that differ only in the learning rate, what is behind on validation by more than noise stops.

Both have answered the same batches of the validation set at the same step. With losses a_j and b_j, summed over the t_j
supervised tokens of batch j of n, and N = sum t_j, one is behind by D = sum (a_j - b_j) / N. The noise is the half
width of D's 95 % interval, t(n - 1) S, with the standard error of a ratio of sums over batches,

    S^2 = n / (n - 1) sum (a_j - b_j - D t_j)^2 / N^2.
"""

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from megatron_tiedlora.base.files import Count, Guard, Real, Text, read_fields, read_json_object, write_json
from megatron_tiedlora.base.messages import UserError

REASON = "halving: "  # begins the reason for the end of what was stopped
RECORD_FILE = "halving.json"  # in the run folder: the last evaluation, and why training was stopped after it
# Student's t of a two-sided 95 % interval, for 1, 2, ... degrees of freedom; the last is for more as well.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


class Gap(NamedTuple):
    """By how much one adapter is behind another, in validation loss per token, and the noise of that."""

    behind: float
    noise: float


@dataclass(frozen=True)
class BatchLosses:
    """An evaluation: the loss and the supervised tokens of each batch of the validation set, over all ranks.

    Attributes:
        stopped: why training ended after it; "" if it did not.
    """

    step: Count
    losses: tuple[Real, ...]
    tokens: tuple[Count, ...]
    stopped: Text = ""

    @property
    def loss(self) -> float:
        """The mean over all supervised tokens."""
        return math.fsum(self.losses) / sum(self.tokens)

    def behind(self, other: "BatchLosses") -> Gap:
        """How far this is behind `other`, whose batches are the same. With one batch the noise is not known: inf."""
        assert self.tokens == other.tokens, "evaluations of different batches"
        used = [(a - b, t) for a, b, t in zip(self.losses, other.losses, self.tokens, strict=True) if t]
        count, total = len(used), sum(self.tokens)
        mean = math.fsum(difference for difference, _ in used) / total
        if count < 2:
            return Gap(mean, math.inf)
        squares = math.fsum((difference - mean * tokens) ** 2 for difference, tokens in used)
        error = math.sqrt(count / (count - 1) * squares) / total
        return Gap(mean, _STUDENT[min(count - 1, len(_STUDENT)) - 1] * error)

    def write(self, folder: Path, *, guard: Guard) -> None:
        """Write it to a run folder. Raises UserError."""
        write_json(folder / RECORD_FILE, asdict(self), guard=guard)


def read_record(folder: Path, *, step: int | None) -> BatchLosses | None:
    """The evaluation after `step` that a run folder records; None if it records another, or none that can be read."""
    file = folder / RECORD_FILE
    with suppress(OSError, UserError):
        found = read_fields(file, read_json_object(file, kind="an evaluation"), BatchLosses, optional=["stopped"])
        if found.step == step and len(found.losses) == len(found.tokens) and any(found.tokens):
            return found
    return None


def find_behind(evaluated: Mapping[str, BatchLosses], rivals: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """Which adapters are behind the best of their rivals of the same step by more than noise, each with the reason.

    Args:
        evaluated: the last evaluation of each. One from before a resume may have had other batches, as these follow
            from the micro-batch size and the parallel configuration; it is not compared.
    """
    found = {}
    for name, own in evaluated.items():
        same = [(other, evaluated[other]) for other in rivals[name] if other in evaluated]
        beside = [other for other, its in same if (its.step, its.tokens) == (own.step, own.tokens)]
        if not beside:
            continue
        best = min(beside, key=lambda other: evaluated[other].loss)
        gap = own.behind(evaluated[best])
        if gap.behind > gap.noise:
            found[name] = f"{REASON}at step {own.step} it was behind {best} by {gap.behind:.4f}, noise {gap.noise:.4f}"
    return found
