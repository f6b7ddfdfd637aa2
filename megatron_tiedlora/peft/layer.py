"""A linear module of a transformers model with the updates of the Tied-LoRA adapters that change it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from megatron_tiedlora.adapters.tied_adapter import TiedAdapter
from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.checkpoint.model_in_memory import merge_, with_update
from megatron_tiedlora.checkpoint.native_adapter import AdaptedTensor


class TiedLoraLinear(nn.Module, BaseTunerLayer):
    """z = W x + sum over active adapters of B' A' x, see `model_in_memory`. The adapters belong to the `TiedLoraModel`.

    Attributes:
        places: this module's place in each adapter that changes it.
    """

    adapter_layer_names = ("tied_lora_adapters",)

    def __init__(self, base_layer: nn.Module, adapters: nn.ModuleDict) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.places: dict[str, AdaptedTensor] = {}
        self.merged_adapters: list[str] = []
        self._shared = (adapters,)  # in a tuple, so that they are not this module's own parameters

    @property
    def tied_lora_adapters(self) -> nn.ModuleDict:
        """All adapters of the model by name."""
        return self._shared[0]

    def forward(self, x: torch.Tensor, *args: Any, **keywords: Any) -> torch.Tensor:
        """The module's result with the updates of the active adapters, in the result's dtype."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        z: torch.Tensor = self.base_layer(x, *args, **keywords)
        if self.disable_adapters or self.merged:
            return z
        for name in self.active_adapters:
            if name in self.places:
                z = with_update(z, x, self._adapter(name), self.places[name])
        return z

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates of adapters (default: the active ones) to the weight.

        Args:
            safe_merge: raise UserError, and change nothing, if the sum is not finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.places:
                self._add(name, safe=safe_merge)
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Subtract what was merged; this may change the last bits of the weight."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            self._add(self.merged_adapters.pop(), sign=-1)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter."""
        self.places.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def _adapter(self, name: str) -> TiedAdapter:
        adapter = self.tied_lora_adapters[name]
        assert isinstance(adapter, TiedAdapter)
        return adapter

    def _add(self, name: str, *, sign: int = 1, safe: bool = False) -> None:
        base: Any = self.get_base_layer()
        weight: torch.Tensor = base.weight.data
        merged = weight.clone() if safe else weight
        merge_(merged, self._adapter(name), self.places[name], sign=sign)
        if safe and not merged.isfinite().all():
            raise UserError(f"adapter {name}: merged, {self.places[name].stored} holds numbers that are not finite")
        weight.copy_(merged)

    def _freeze_non_trainable_peft_weights(self, adapter_names: str | Sequence[str] | None = None) -> None:
        # PEFT has set requires_grad of whole adapters; the table of methods says which tensors are trained.
        for adapter in map(self._adapter, self.tied_lora_adapters):
            for name, parameter in adapter.named_parameters():
                if not adapter.config.factor(name).trained:
                    parameter.requires_grad_(False)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own would cast to the base's dtype too; adapters stay in fp32.
        adapter, base = self._adapter(adapter_name), self.get_base_layer()
        target = device or next(base.parameters()).device
        if not next(adapter.parameters()).is_meta and target.type != "meta":  # meta: an offloaded module
            adapter.to(target)
