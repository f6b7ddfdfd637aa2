# Copyright 2026-present the HuggingFace Inc. team.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

import math
import warnings

import torch
import torch.nn.functional as F
from torch import nn

from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from peft.utils.other import transpose

from .config import TRAINED_FACTORS, TiedLoraConfig


class TiedLoraLayer(BaseTunerLayer):
    # A factor that several layers share is stored in the first of these layers, its owner, and only there. Each layer
    # knows the owners of its factors, so that a shared factor is one parameter with one entry in the state dict.
    adapter_layer_names = ("tied_lora_A", "tied_lora_B", "tied_lora_u", "tied_lora_v")
    other_param_names = (
        "tied_lora_frozen_A",
        "tied_lora_frozen_B",
        "tied_lora_dropout",
        "tied_lora_owners",
        "r",
        "scaling",
    )

    def __init__(self, base_layer: nn.Module, **kwargs):
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        self.r = {}
        self.scaling = {}
        self.tied_lora_dropout = nn.ModuleDict({})
        self.tied_lora_A = nn.ParameterDict({})
        self.tied_lora_B = nn.ParameterDict({})
        self.tied_lora_u = nn.ParameterDict({})
        self.tied_lora_v = nn.ParameterDict({})
        self.tied_lora_frozen_A = BufferDict({}, persistent=True)
        self.tied_lora_frozen_B = BufferDict({}, persistent=True)
        # The layers that own A, B and u of each adapter. In a plain dict, so that they are not submodules of this layer.
        self.tied_lora_owners: dict[str, dict[str, TiedLoraLayer]] = {}

        self._disable_adapters = False
        self.merged_adapters = []

        base_layer = self.get_base_layer()
        in_features, out_features = _get_in_out_features(base_layer)
        if (in_features is None) or (out_features is None):
            raise TypeError(f"Unsupported layer type {type(base_layer)}")
        self.in_features = in_features
        self.out_features = out_features
        self.kwargs = kwargs

    def update_layer(
        self,
        adapter_name: str,
        config: TiedLoraConfig,
        places: dict[str, str],
        owners: dict[tuple, "TiedLoraLayer"],
        inference_mode: bool = False,
    ):
        """
        Add an adapter to this layer.

        Args:
            places (`dict[str, str]`):
                For each of A, B and u, a name that is the same in all layers that share this factor.
            owners (`dict[tuple, TiedLoraLayer]`):
                The owners of all shared factors of this adapter so far. Layers of different sizes do not share A or B.
        """
        if config.r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {config.r}")
        r = self.r[adapter_name] = config.r
        self.scaling[adapter_name] = 1.0 if config.tied_lora_alpha is None else config.tied_lora_alpha / r
        dropout = nn.Dropout(p=config.tied_lora_dropout) if config.tied_lora_dropout > 0.0 else nn.Identity()
        self.tied_lora_dropout.update(nn.ModuleDict({adapter_name: dropout}))

        trained = TRAINED_FACTORS[config.method]
        shapes = {
            "A": (r, self.in_features),
            "B": (self.out_features, r),
            "u": (r,),
            "v": (self.out_features,),
        }
        sizes = {"A": (self.in_features,), "B": (self.in_features, self.out_features), "u": (self.in_features,)}
        self.tied_lora_owners[adapter_name] = {
            name: owners.setdefault((name, places[name], *sizes[name]), self) for name in sizes
        }
        for name, shape in shapes.items():
            if self.tied_lora_owners[adapter_name].get(name, self) is not self:
                continue
            if name in trained:
                getattr(self, f"tied_lora_{name}")[adapter_name] = nn.Parameter(torch.empty(shape))
            elif name in ("A", "B"):
                getattr(self, f"tied_lora_frozen_{name}")[adapter_name] = torch.empty(shape)
        self.reset_tied_lora_parameters(adapter_name, config)

        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    @torch.no_grad()
    def reset_tied_lora_parameters(self, adapter_name: str, config: TiedLoraConfig):
        """Initialize the factors that this layer owns."""
        A, B, u, v = (
            factor if owner is self else None for factor, owner in self._get_factors_and_owners(adapter_name)
        )
        trained = TRAINED_FACTORS[config.method]
        if A is not None:
            nn.init.normal_(A, std=1 / math.sqrt(self.in_features))
        if B is not None:
            if config.init_weights and "B" in trained and "v" not in trained:
                nn.init.zeros_(B)
            else:
                # tl1 does not start as the base model, and would be far from it with a B of the usual size
                nn.init.normal_(B, std=(0.3 if config.method == "tl1" else 1.0) / math.sqrt(config.r))
        if u is not None:
            nn.init.ones_(u)
        if v is not None:
            nn.init.constant_(v, 0.0 if config.init_weights else 1.0)

    def _get_factors_and_owners(self, adapter_name: str) -> list[tuple[torch.Tensor | None, "TiedLoraLayer"]]:
        """Return A, B, u and v of an adapter with the layers that own them. A factor that does not exist is None."""
        pairs = []
        for name in ("A", "B", "u", "v"):
            owner, factor = self.tied_lora_owners[adapter_name].get(name, self), None
            for kind in ("", "frozen_") if name in ("A", "B") else ("",):
                held = getattr(owner, f"tied_lora_{kind}{name}")
                if adapter_name in held:
                    factor = held[adapter_name]
            pairs.append((factor, owner))
        return pairs

    def _get_lora_factors(
        self, adapter_name: str, device: torch.device, dtype: torch.dtype | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return diag(u) A and (alpha / r) diag(v) B, whose product is the update of the weight."""
        A, B, u, v = (
            None if factor is None else factor.to(device=device, dtype=dtype)
            for factor, _ in self._get_factors_and_owners(adapter_name)
        )
        A = A if u is None else u.unsqueeze(-1) * A
        B = B if v is None else v.unsqueeze(-1) * B
        return A, B * self.scaling[adapter_name]

    def _get_available_adapters(self) -> set[str]:
        # a layer that shares all of its factors owns no parameters
        return set(self.r)


class Linear(nn.Module, TiedLoraLayer):
    # Tied-LoRA implemented in a dense layer
    def __init__(
        self,
        base_layer,
        adapter_name: str,
        config: TiedLoraConfig,
        places: dict[str, str],
        owners: dict[tuple, TiedLoraLayer],
        is_target_conv_1d_layer: bool = False,
        **kwargs,
    ) -> None:
        super().__init__()
        TiedLoraLayer.__init__(self, base_layer, **kwargs)
        self.fan_in_fan_out = config.fan_in_fan_out
        self.is_target_conv_1d_layer = is_target_conv_1d_layer
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, places, owners)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """
        Merge the adapter weights into the base weights

        Args:
            safe_merge (`bool`, *optional*):
                Whether to check that the merged weights are finite before the base weights are changed. Defaults to
                `False`.
            adapter_names (`List[str]`, *optional*):
                The names of the adapters to merge. Defaults to the active adapters.
        """
        for active_adapter in check_adapters_to_merge(self, adapter_names):
            if active_adapter not in self.r:
                continue
            weight = self.get_base_weight()
            if safe_merge:
                weight = weight.clone()
            weight += self.get_delta_weight(active_adapter)
            if safe_merge and not torch.isfinite(weight).all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {active_adapter} seems to be broken"
                )
            self.set_base_weight(weight)
            self.merged_adapters.append(active_adapter)

    def unmerge(self) -> None:
        """
        Subtract the weights of all merged adapters from the base weights.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.")
            return

        while len(self.merged_adapters) > 0:
            active_adapter = self.merged_adapters.pop()
            if active_adapter in self.r:
                weight = self.get_base_weight()
                weight -= self.get_delta_weight(active_adapter)
                self.set_base_weight(weight)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """
        Compute the delta weight for the given adapter.

        Args:
            adapter (str):
                The name of the adapter for which the delta weight should be computed.
        """
        factor, _ = self._get_factors_and_owners(adapter)[0]
        device, dtype = self.get_base_layer().weight.device, factor.dtype
        # some CPUs have slow bf16/fp16 matmuls
        cast_to_fp32 = device.type == "cpu" and dtype in (torch.float16, torch.bfloat16)
        A, B = self._get_lora_factors(adapter, device, torch.float32 if cast_to_fp32 else dtype)
        return transpose(B @ A, self.fan_in_fan_out).to(dtype)

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)

        result = self.base_layer(x, *args, **kwargs)
        result_dtype = result.dtype
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for active_adapter in self.active_adapters:
            if active_adapter not in self.r:
                continue
            A, B = self._get_lora_factors(active_adapter, x.device)
            x_cast = self.tied_lora_dropout[active_adapter](self._cast_input_dtype(x, A.dtype))
            result = result + F.linear(F.linear(x_cast, A), B)
        return result.to(result_dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def __repr__(self) -> str:
        return "tied_lora." + super().__repr__()

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)
