"""Full tensors out of the ranks' parts, on rank 0: how every file becomes independent of the layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import distributed

from megatron_tiedlora.adapters.tied_adapter import AdapterConfig, AdapterPart
from megatron_tiedlora.parallel.grid import Grid


@dataclass(frozen=True)
class AdapterLayout:
    """Where an adapter lies: which rank holds which part of it.

    Attributes:
        stage_layers: adapted layers by pipeline stage.
    """

    config: AdapterConfig
    grid: Grid
    stage_layers: tuple[tuple[int, ...], ...]

    def parts(self) -> dict[int, AdapterPart]:
        """The part of each rank of data-parallel rank 0, by rank: together they hold all of it."""
        tp_size = self.grid.tp_size
        return {
            self.grid.rank_of(pp_rank=pp_rank, tp_rank=tp_rank): AdapterPart(self.config, layers, tp_rank, tp_size)
            for pp_rank, layers in enumerate(self.stage_layers)
            for tp_rank in range(tp_size)
        }


def gather_full(
    names: Sequence[str], local: Mapping[str, torch.Tensor], layout: AdapterLayout
) -> dict[str, torch.Tensor]:
    """Full fp32 CPU tensors on rank 0, nothing elsewhere, sent as CPU tensors. Every rank calls it.

    Args:
        names: tensors to gather, the same on every rank.
        local: this rank's parts of them (or of their moments) by name, where its part of the adapter has them.
    """
    config, grid, parts = layout.config, layout.grid, layout.parts()
    full: dict[str, torch.Tensor] = {}
    for name in names:
        tied, cut = config.factor(name).tied, config.spec(name).dim is not None
        owners = [
            rank
            for rank, part in parts.items()
            if part.exists(name) and (cut or part.tp_rank == 0) and (not tied or grid.at(rank).pp_rank == 0)
        ]
        if grid.rank in owners and grid.rank != 0:
            distributed.send(local[name].detach().to("cpu", torch.float32).contiguous(), dst=0)
        if grid.rank != 0:
            continue
        by_stage: dict[int, list[torch.Tensor]] = {}
        for rank in owners:
            if rank == 0:
                piece = local[name].detach().to("cpu", torch.float32, copy=True)
            else:
                piece = torch.empty(parts[rank].local_shape(name), dtype=torch.float32)
                distributed.recv(piece, src=rank)
            by_stage.setdefault(grid.at(rank).pp_rank, []).append(piece)
        joined = [config.spec(name).join(pieces) for pieces in by_stage.values()]
        full[name] = joined[0] if len(joined) == 1 else torch.cat(joined)
    return full


def gather_state(local: Mapping[str, torch.Tensor], layout: AdapterLayout) -> dict[str, torch.Tensor]:
    """Every tensor in full on rank 0, those frozen at one as ones; nothing elsewhere. Every rank calls it."""
    config = layout.config
    stored = [name for name in config.tensors if config.factor(name).trained or config.factor(name).start != "one"]
    full = gather_full(stored, local, layout)
    if layout.grid.rank != 0:
        return {}
    return {name: full[name] if name in full else torch.ones(config.shape(name)) for name in config.tensors}
