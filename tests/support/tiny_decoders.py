"""Decoders of tiny models at any layout."""

from __future__ import annotations

from pathlib import Path

import torch
from forked_ranks import groups_of
from native_files import native_adapter
from oracle import OracleConfig
from tiny_models import random_adapter

from megatron_tiedlora.checkpoint.load_model import load_model
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.evaluation.decoder import Decoder
from megatron_tiedlora.parallel.grid import Grid
from megatron_tiedlora.parallel.groups import ParallelGroups
from megatron_tiedlora.planning.partition import layer_costs, partition


def build(folder: Path, *, grid: Grid, merged: bool = False, calls_together: bool = False) -> Decoder:
    """A decoder of this rank's part of the model in `folder`, with a tl6 adapter."""
    source = find_model(str(folder))
    adapter = native_adapter(source, random_adapter("tl6", OracleConfig.from_folder(folder), alpha=6))
    groups = groups_of(grid) if grid.world_size > 1 else ParallelGroups()
    stages = partition(layer_costs(source.shape, length=32, first_adapted=1), grid.pp_size)
    stage = load_model(
        source, adapter, dtype=torch.float32, grid=grid, groups=groups, stages=stages, merged=merged
    )
    return Decoder(stage, groups, source.shape, calls_together=calls_together)
