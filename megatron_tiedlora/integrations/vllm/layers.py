"""vLLM's linears with LoRA, with tied slots in addition to vLLM's own slots or instead of them."""

from functools import cache
from typing import Any

import torch
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

from megatron_tiedlora.convert.vera_files import TargetFactors


class TiedLayer:
    """Adds v B u A x of the tokens' slots to the output of a linear. It is mixed into vLLM's classes.

    Attributes:
        keeps_plain: whether the layer also has vLLM's own slots.
        slots: this layer's views of the tied slots; None if the linear cannot be adapted.
        tokens: which slot each token uses.
    """

    keeps_plain = False
    slots: TargetFactors | None = None
    tokens: Any = None
    output_slices: tuple[int, ...]

    def create_lora_weights(self, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        """Create vLLM's own slots, if the layer keeps them. `LinearSlots` creates the tied ones."""
        if self.keeps_plain:
            super().create_lora_weights(max_loras, lora_config, model_config)  # type: ignore[misc]
            return
        self.lora_config, self.lora_a_stacked, self.lora_b_stacked = lora_config, (), ()
        if self.n_slices == 1:  # type: ignore[attr-defined]
            self.output_slices = (self.output_size,)  # type: ignore[attr-defined]

    def reset_lora(self, index: int) -> None:
        """Set vLLM's own slot to zero."""
        if self.keeps_plain:
            super().reset_lora(index)  # type: ignore[misc]

    def _apply_lora_to_output(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        if self.keeps_plain:
            output = super()._apply_lora_to_output(x, output)  # type: ignore[misc]
        if self.slots is None:
            return output
        shape = output.shape
        y = output.reshape(-1, shape[-1]).contiguous()  # the base's kernel may have padded it
        self.tokens.add_update(y, x.reshape(-1, x.shape[-1]), self.slots, self.output_slices)
        return y.reshape(shape)


@cache
def tied_class(kind: type, keeps_plain: bool) -> type:
    """Return vLLM's class of a layer with `TiedLayer` mixed in, or the class itself if it is not a linear with LoRA."""
    if not issubclass(kind, BaseLinearLayerWithLoRA):
        return kind
    return type(f"Tied{kind.__name__}", (TiedLayer, kind), {"keeps_plain": keeps_plain})
