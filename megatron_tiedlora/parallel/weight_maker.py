"""Chooses the class of a rank's frozen weights, by the storage format of the base and by how products are computed."""

from __future__ import annotations

from functools import partial

from megatron_tiedlora.base.base_formats import BASE_FORMATS
from megatron_tiedlora.parallel.fp8_products import Fp8ProductWeight
from megatron_tiedlora.parallel.frozen_weight import FrozenWeight, WeightMaker
from megatron_tiedlora.parallel.quantised_weight import BlockScaledWeight, RowScaledWeight, Workspace


def weight_maker(name: str | None, *, products: str | None = None, keep_transposed: bool = False) -> WeightMaker:
    """A function that makes empty weights of a format of the table, or plain ones (None).

    The weights that it makes share a workspace, so a rank needs one function for its whole part of the model.

    Args:
        products: "fp8" if activations and gradients are rounded to fp8 too; with the format fp8 alone.
        keep_transposed: whether such weights keep a transposed copy of their codes.
    """
    if name is None:
        return FrozenWeight.empty
    storage = BASE_FORMATS[name]
    if products is not None:
        assert (name, products) == ("fp8", "fp8")
        return partial(
            Fp8ProductWeight.of_products, storage=storage, workspace=Workspace(), keep_transposed=keep_transposed
        )
    kind = RowScaledWeight if storage.block is None else BlockScaledWeight
    return partial(kind.of_format, storage=storage, workspace=Workspace())
