"""The update of one linear module of a transformers model, unexpanded: A and B stay one pair for all adapted layers.

    z = W x + B' A' x    with    A' = diag(u) A,    B' = the module's rows of (alpha / r) diag(v) B

A module of a fused target (q, k and v; gate and up) uses its own rows of B and v. A' and B' are computed anew in each
forward pass, in the adapter's dtype, and so is the update: the numbers are those of the exported PEFT LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn.functional import linear

from megatron_tiedlora.adapters.targets import Target
from megatron_tiedlora.adapters.tied_adapter import AdapterConfig, TiedAdapter, lora_factors
from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.checkpoint.native_adapter import changed_weights
from megatron_tiedlora.convert.merged_rows import merged_rows, row_blocks
from megatron_tiedlora.model.weights import WeightRule, stored_shapes


@dataclass(frozen=True)
class AdaptedModule:
    """A module that an adapter changes.

    Attributes:
        rule: the weight that it stores, or a part of.
        stored: the name of its tensor.
    """

    target: Target
    rule: WeightRule
    stored: str

    def factors(self, adapter: TiedAdapter) -> tuple[torch.Tensor, torch.Tensor]:
        """A' (r, in) and B' (rows of the module, r)."""
        a, b = lora_factors(adapter.config, adapter.factors(), self.target, self.rule.layer)
        return a, self.rule.by_stored_tensor(b)[self.stored]


def find_places(shape: ModelShape, config: AdapterConfig) -> Mapping[str, AdaptedModule]:
    """The modules that an adapter changes, by their names in the causal model."""
    return {
        stored.removesuffix(".weight"): AdaptedModule(target, rule, stored)
        for rule, target in changed_weights(config, shape)
        for stored in rule.hf_names
    }


def with_update(z: torch.Tensor, x: torch.Tensor, adapter: TiedAdapter, place: AdaptedModule) -> torch.Tensor:
    """z + B' A' x in z's dtype, from z = W x, (..., out), and x (..., in)."""
    a, b = (factor.to(x.device) for factor in place.factors(adapter))
    return (z + linear(linear(x.to(a.dtype), a), b)).to(z.dtype)


def check_whole(weight: torch.Tensor, place: AdaptedModule) -> None:
    """Raise UserError if a weight that is to be changed in place is quantised, offloaded or sharded."""
    shape = stored_shapes([place.rule])[place.stored]
    plain = weight.is_floating_point() and weight.itemsize > 1 and not weight.is_meta
    if not plain or tuple(weight.shape) != tuple(shape):
        raise UserError(f"{place.stored} is quantised, offloaded or sharded; merge with tiedlora merge")


@torch.no_grad()
def merge_(weight: torch.Tensor, adapter: TiedAdapter, place: AdaptedModule, *, sign: int = 1) -> None:
    """W += sign B' A' in place, with the bits of a merged checkpoint.

    Raises:
        UserError: the weight is quantised, offloaded or sharded.
    """
    check_whole(weight, place)
    a, b = (factor.to(weight.device) for factor in place.factors(adapter))
    for rows in row_blocks(tuple(weight.shape)):
        weight[rows] = merged_rows(weight[rows], a, sign * b[rows], weight.dtype)
