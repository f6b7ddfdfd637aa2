"""Gathers full tensors from the shards of all ranks on rank 0, so that files do not depend on the layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import distributed

from megatron_tiedlora.adapters.tied_adapter import AdapterConfig, AdapterPart
from megatron_tiedlora.parallel.grid import Grid

# What AdamW keeps of each trained tensor beside it, by torch's names: means of its gradients and of their squares.
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class AdapterLayout:
    """Which rank holds which part of an adapter.

    Attributes:
        stage_layers: adapted layers by pipeline stage.
    """

    config: AdapterConfig
    grid: Grid
    stage_layers: tuple[tuple[int, ...], ...]

    def parts(self) -> dict[int, AdapterPart]:
        """The parts of the ranks with data-parallel rank 0, by rank. Together they are the whole adapter."""
        tp_size = self.grid.tp_size
        return {
            self.grid.rank_of(pp_rank=pp_rank, tp_rank=tp_rank): AdapterPart(self.config, layers, tp_rank, tp_size)
            for pp_rank, layers in enumerate(self.stage_layers)
            for tp_rank in range(tp_size)
        }


def gather_full(
    names: Sequence[str], local: Mapping[str, torch.Tensor], layout: AdapterLayout
) -> dict[str, torch.Tensor]:
    """Full fp32 CPU tensors on rank 0, nothing on the others. They are sent as CPU tensors. Every rank calls it.

    Args:
        names: the tensors to gather, the same on every rank.
        local: this rank's parts of them (or of their moments), by name; tensors that it does not have are absent.
    """
    config, grid, parts = layout.config, layout.grid, layout.parts()
    full: dict[str, torch.Tensor] = {}
    for name in names:
        tied, sharded = config.is_tied(name), config.spec(name).dim is not None
        owners = [
            rank
            for rank, part in parts.items()
            if part.exists(name) and (sharded or part.tp_rank == 0) and (not tied or grid.at(rank).pp_rank == 0)
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
    """All full tensors on rank 0, with ones for those frozen at one; nothing on the others. Every rank calls it."""
    config = layout.config
    stored = [name for name in config.tensors if config.factor(name).trained or config.factor(name).start != "one"]
    full = gather_full(stored, local, layout)
    if layout.grid.rank != 0:
        return {}
    return {name: full[name] if name in full else torch.ones(config.shape(name)) for name in config.tensors}
