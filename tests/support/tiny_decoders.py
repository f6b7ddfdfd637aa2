"""Decoders of tiny models at any layout, and what of them depends on this machine's matmul."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron_tiedlora.base.shapes import TARGET_NAMES
from megatron_tiedlora.checkpoint.load_model import load_model
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.evaluation.decoder import Decoder
from megatron_tiedlora.model.weights import layer_costs, partition
from megatron_tiedlora.parallel.groups import Grid, ParallelGroups
from support.forked_ranks import groups_of
from support.native_files import native_adapter
from support.oracle import OracleAdapter, OracleConfig
from support.tiny_models import random_adapter


def decoded_adapter(folder: Path) -> OracleAdapter:
    """A tl6 adapter of the model in `folder`: of QKV if queries are grouped, else of all linears."""
    config = OracleConfig.from_folder(folder)
    if config.num_kv_heads < config.num_heads:
        return random_adapter("tl6", config, alpha=6)
    return random_adapter("tl6", config, alpha=6, targets=TARGET_NAMES, scale=0.3)


def build(
    folder: Path, *, grid: Grid, adapted: bool = True, merged: bool = False, dtype: Any = torch.float32, **options: Any
) -> Decoder:
    """A decoder of this rank's part of the model in `folder`, with `decoded_adapter` or without an adapter."""
    source = find_model(str(folder))
    adapter = native_adapter(source, decoded_adapter(folder)) if adapted else None
    groups = groups_of(grid) if grid.world_size > 1 else ParallelGroups()
    stages = partition(layer_costs(source.shape, length=32, first_adapted=1), grid.pp_size)
    stage = load_model(source, adapter, dtype=dtype, grid=grid, groups=groups, stages=stages, merged=merged)
    return Decoder(stage, groups, source.shape, **options)


@contextmanager
def calls_of(decoder: Decoder) -> Iterator[list[tuple[int, ...]]]:
    """The shape of the tokens of each call of the decoder's model in a block."""
    shapes: list[tuple[int, ...]] = []
    handle = decoder.stage.layers["0"].register_forward_hook(lambda _, inputs, __: shapes.append(inputs[0].shape))
    try:
        yield shapes
    finally:
        handle.remove()


def rows_keep_bits(stage: nn.Module, counts: Sequence[int], *, backward: bool = False) -> bool:
    """Whether products with the base's weights give rows the same bits alone and after and before others.

    Where a matmul takes another kernel for few rows, or cuts its sums by their number, they do not.

    Args:
        counts: the rows of each that comes alone, in the order in which all come together.
        backward: ask of the products for the gradients too.
    """
    draw = torch.Generator().manual_seed(0)
    weights = [weight.detach() for weight in stage.parameters() if weight.ndim == 2 and not weight.requires_grad]
    assert weights, "the base has no weights"
    for right in [weight.t() for weight in weights] + (weights if backward else []):
        rows = torch.randn(sum(counts), len(right), generator=draw).to(right.dtype)
        alone = [torch.mm(some, right) for some in rows.split(list(counts))]
        if not torch.equal(torch.cat(alone), torch.mm(rows, right)):
            return False
    return True
