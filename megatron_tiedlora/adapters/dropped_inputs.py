"""Which inputs of an adapter's linears --dropout keeps, from the numbers of a micro-batch's tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from megatron_tiedlora.adapters.input_dropout import InputDropout, dropout_salt, token_keys
from megatron_tiedlora.adapters.tied_adapter import AdapterPart
from megatron_tiedlora.parallel.groups import TensorParallel


class Dropout(NamedTuple):
    """Of one adapter.

    Attributes:
        probability: that an input is dropped.
        seed: of its run.
    """

    probability: float
    seed: int

    def of_linears(
        self, part: AdapterPart, numbers: torch.Tensor, tensor_parallel: TensorParallel
    ) -> Callable[[int, str], InputDropout]:
        """The dropout of a layer's linear, by the layer and the name of the target.

        Args:
            part: of the adapter, on this rank.
            numbers: (b, s) int64, of the micro-batch's tokens.
        """
        parts = tensor_parallel.sequence_parts
        keys = token_keys(numbers.flatten(), seed=self.seed)
        local_keys = keys.chunk(parts)[tensor_parallel.group.rank] if parts > 1 else keys
        first = {
            target.name: part.tp_rank * target.local_sizes(part.tp_size)[0] if target.cut == "row" else 0
            for target in part.config.targets
        }

        def of_linear(layer: int, name: str) -> InputDropout:
            salt = dropout_salt(self.seed, layer=layer, target=name)
            return InputDropout(keys, local_keys, salt=salt, first=first[name], probability=self.probability)

        return of_linear
