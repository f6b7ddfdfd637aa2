"""Compute batch sizes and answer lengths. Global batch = micro-batch x accumulation steps x data-parallel size.

No other module computes batch sizes. `filled` divides a sequence of items into lists of limited size, for example rows
into batches or tensors into files.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from megatron_tiedlora.base.messages import UserError

Part = TypeVar("Part")


def filled(parts: Iterable[tuple[Part, float, float]]) -> Iterator[list[Part]]:
    """Yield lists of consecutive items. An item that does not fit into the current list begins a new list.

    Args:
        parts: tuples (item, size, limit), which are read lazily. The limit of a list's first item applies to the total
            size of the list. An item that is larger than its own limit is the only item of its list.
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
    """The division of a global batch into micro-batches. With packing, `micro_batch_size` is a maximum.

    Attributes:
        packed_length: tokens of a packed row; None for one sample per row.
        min_micro_batches: minimum number of micro-batches per rank with packing, never more than without packing.
    """

    global_batch_size: int
    micro_batch_size: int
    data_parallel: int
    packed_length: int | None = None
    min_micro_batches: int = 1

    @property
    def accumulation_steps(self) -> int:
        """Return the number of micro-batches per rank and optimizer step; with packing it is a maximum."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel)


def default_rows(*, max_length: int, packing: bool, on_gpu: bool, otherwise: int) -> int:
    """Return the maximum number of rows in a micro-batch if --micro_batch_size is not given.

    With packing on a GPU, this is the number of full rows in `GPU_MICRO_BATCH_TOKENS`, at least 1; else `otherwise`.
    """
    return max(1, GPU_MICRO_BATCH_TOKENS // max_length) if on_gpu and packing else otherwise


def plan_batches(
    global_batch_size: int,
    micro_batch_size: int | None,
    data_parallel: int,
    *,
    max_rows: int = 1,
    min_steps: int = 1,
    multiple: int = 1,
) -> BatchPlan:
    """Return the division of `global_batch_size` samples into micro-batches on `data_parallel` ranks.

    Args:
        micro_batch_size: rows per forward pass. None means the largest divisor of the number of samples per rank that
            is at most `max_rows` and, if possible, allows `min_steps` accumulation steps.
        max_rows: maximum rows per forward pass if `micro_batch_size` is None; see `default_rows`.
        min_steps: minimum number of accumulation steps if `micro_batch_size` is None and a rank has enough samples.
        multiple: the rows are a multiple of this if `micro_batch_size` is None and the samples per rank allow it.

    Raises:
        UserError: the global batch is not a multiple of micro-batch x data-parallel size. The message has these values
            and the nearest valid ones.
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
        sizes = [rows for rows in range(1, max(largest, multiple) + 1) if share % rows == 0]
        micro_batch_size = max([rows for rows in sizes if rows % multiple == 0] or sizes)
    return BatchPlan(global_batch_size, micro_batch_size, data_parallel)


def resolve_max_new_tokens(value: int | None, longest: int, default: int) -> int:
    """Return the maximum number of tokens to generate for one answer.

    Args:
        value: the value of --max_new_tokens. None means `default`, but at most half of `longest`.
        longest: maximum number of tokens of a prompt and its answer together.
        default: the task's default.

    Raises:
        UserError: the value leaves no room for a prompt.
    """
    if value is None:
        return max(min(default, longest // 2), 1)
    if value >= longest:
        raise UserError(
            f"--max_new_tokens {value} leaves no room for a prompt: the two have at most {longest} tokens; give fewer"
        )
    return value


def longest_prompt(max_length: int | None, longest: int, max_new_tokens: int) -> int:
    """Return the maximum prompt length for generation, which leaves `max_new_tokens` positions for the answer.

    Args:
        max_length: the value of --max_length; None means `longest`.
    """
    return min(max_length or longest, longest - max_new_tokens)
