"""Batch arithmetic: global batch = micro batch x accumulation steps x data-parallel size; and the lengths of answers.

Nothing else sets batch sizes. Here too are groups of parts by size: rows of a batch, samples of a pass, tensors of a
file.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from megatron_tiedlora.base.messages import UserError

Part = TypeVar("Part")


def filled(parts: Iterable[tuple[Part, float, float]]) -> Iterator[list[Part]]:
    """Group parts in their order: each joins the last ones if it fits.

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


GPU_MICRO_BATCH_TOKENS = 8192  # below about 4,000, launching a layer's kernels takes longer than running them


@dataclass(frozen=True)
class BatchPlan:
    """The division of a global batch into micro-batches; with packing, `micro_batch_size` is the maximum.

    Attributes:
        packed_length: tokens of a packed row; None: one sample per row.
        min_micro_batches: minimum micro-batches per rank with packing, capped at the unpacked number.
    """

    global_batch_size: int
    micro_batch_size: int
    data_parallel: int
    packed_length: int | None = None
    min_micro_batches: int = 1

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches per rank and optimizer step; with packing, the maximum."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel)


def default_rows(*, max_length: int, packing: bool, on_gpu: bool, otherwise: int) -> int:
    """The maximum number of rows of a micro-batch if --micro_batch_size is not given.

    With packing on a GPU it is as many as fit in `GPU_MICRO_BATCH_TOKENS`, else the value of `otherwise`.
    """
    return max(1, GPU_MICRO_BATCH_TOKENS // max_length) if on_gpu and packing else otherwise


def plan_batches(
    global_batch_size: int, micro_batch_size: int | None, data_parallel: int, *, max_rows: int = 1, min_steps: int = 1
) -> BatchPlan:
    """Divide `global_batch_size` samples over `data_parallel` ranks.

    Args:
        micro_batch_size: rows per forward pass. None: the largest divisor of a rank's samples that is at most
            `max_rows` and leaves `min_steps` accumulation steps, if there is one.
        max_rows: see `default_rows`.
        min_steps: minimum accumulation steps with the default, if a rank has enough samples.

    Raises:
        UserError: the batch is not a multiple of the other two multiplied; names all three and the nearest ones.
    """
    unit = (micro_batch_size or 1) * data_parallel
    if global_batch_size % unit:
        below, above = global_batch_size // unit * unit, (global_batch_size // unit + 1) * unit
        nearest = f"{below} or {above}" if below else f"{above}"
        micro = f"--micro_batch_size {micro_batch_size} x " if micro_batch_size else ""
        raise UserError(
            f"--global_batch_size {global_batch_size} is not a multiple of {micro}data parallel {data_parallel}."
            f" Use {nearest}"
        )
    if micro_batch_size is None:
        share = global_batch_size // data_parallel
        largest = max(1, min(max_rows, share // min_steps))
        micro_batch_size = max(rows for rows in range(1, largest + 1) if share % rows == 0)
    return BatchPlan(global_batch_size, micro_batch_size, data_parallel)


def resolve_max_new_tokens(value: int | None, longest: int, default: int) -> int:
    """The maximum number of tokens to generate for one answer.

    Args:
        value: of --max_new_tokens. None: `default`, but at most half of the longest row.
        longest: the most tokens of a row, prompt and answer together.
        default: the task's.

    Raises:
        UserError: the value leaves no room for a prompt.
    """
    if value is None:
        return max(min(default, longest // 2), 1)
    if value >= longest:
        raise UserError(
            f"--max_new_tokens {value} leaves no room for a prompt in rows of at most {longest} tokens; give fewer"
        )
    return value


def longest_prompt(max_length: int | None, longest: int, max_new_tokens: int) -> int:
    """The maximum prompt length for generation: as in training, but leaving `max_new_tokens` positions for the answer.

    Args:
        max_length: of --max_length; None: the longest row.
    """
    return min(max_length or longest, longest - max_new_tokens)
