"""Writes a checkpoint of random bf16 weights in the shape of a preset."""

from __future__ import annotations

from megatron_tiedlora.base.errors import show
from megatron_tiedlora.checkpoint.random_model import write_random_model
from megatron_tiedlora.config.presets import PRESETS
from megatron_tiedlora.config.tool_settings import RandomModelSettings


def main(settings: RandomModelSettings) -> int:
    """Write the folder; returns the exit status."""
    write_random_model(PRESETS[settings.model], settings.output, name=settings.model, seed=settings.seed)
    show(f"{settings.output}: random weights in the shape of {settings.model}")
    return 0
