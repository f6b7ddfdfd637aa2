"""Batch arithmetic: global batch = micro batch x accumulation steps x data-parallel width.

Nothing else sets batch sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_tiedlora.base.errors import UserError

GPU_MICRO_BATCH_TOKENS = 8192  # below about 4,000, launching the kernels of a layer takes longer than running them


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is cut."""

    global_batch_size: int
    micro_batch_size: int
    data_parallel: int

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches that each rank runs in one optimizer step: where several samples share a row, at most."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel)


def default_rows(*, max_length: int, packing: bool, on_gpu: bool, otherwise: int) -> int:
    """Rows of a micro-batch, at most, where --micro_batch_size is not given.

    Packed on a GPU as many as `GPU_MICRO_BATCH_TOKENS` hold, else `otherwise`.
    """
    return max(1, GPU_MICRO_BATCH_TOKENS // max_length) if on_gpu and packing else otherwise


def plan_batches(
    global_batch_size: int,
    micro_batch_size: int | None,
    data_parallel: int,
    *,
    most_rows: int = 1,
    least_steps: int = 1,
) -> BatchPlan:
    """Cut `global_batch_size` samples over `data_parallel` ranks.

    Args:
        micro_batch_size: rows per forward pass, or None for the largest divisor of a rank's share up to `most_rows`
            that leaves `least_steps` accumulation steps, if any does.
        most_rows: see `default_rows`.
        least_steps: accumulation steps that the default leaves where the share is large enough.

    Raises:
        UserError: the numbers do not divide; names all three and the nearest global batches that do.
    """
    unit = (micro_batch_size or 1) * data_parallel
    if global_batch_size % unit:
        below, above = global_batch_size // unit * unit, (global_batch_size // unit + 1) * unit
        nearest = f"{below} or {above}" if below else f"{above}"
        micro = f"--micro_batch_size {micro_batch_size} x " if micro_batch_size else ""
        raise UserError(
            f"--global_batch_size {global_batch_size} does not divide by {micro}data parallel {data_parallel};"
            f" the nearest that does is {nearest}"
        )
    if micro_batch_size is None:
        share = global_batch_size // data_parallel
        largest = max(1, min(most_rows, share // least_steps))
        micro_batch_size = max(rows for rows in range(1, largest + 1) if share % rows == 0)
    return BatchPlan(global_batch_size, micro_batch_size, data_parallel)
