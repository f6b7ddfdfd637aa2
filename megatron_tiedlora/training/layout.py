"""What a layout must fulfil for training, checked before a weight is read: the model's terms, and the engine's."""

from __future__ import annotations

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.model.layout import check_model_layout
from megatron_tiedlora.parallel.grid import Grid


def check_layout(shape: ModelShape, grid: Grid, *, zero_stage: int, ds_config: str) -> None:
    """Check that the model can be cut over the grid and that the ZeRO stage goes with it.

    Raises:
        UserError: the first thing that does not fit.
    """
    check_model_layout(shape, grid)
    if grid.pp_size > 1 and zero_stage > 1:
        raise UserError(
            f"--ds_config {ds_config}: ZeRO-{zero_stage} does not go with --pipeline_parallel {grid.pp_size} (stages"
            " sum their gradients once a step, not per micro-batch); use zero1.json, which costs a rank no more than"
            " whole gradients of its part of the adapter"
        )
