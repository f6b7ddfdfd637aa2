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

import warnings

from torch import nn
from transformers.pytorch_utils import Conv1D

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import (
    TRANSFORMERS_MODELS_TO_TIED_LORA_TARGET_MODULES_MAPPING,
    get_quantization_kwargs,
    resolve_quantization_backend,
)

from .config import TiedLoraConfig
from .layer import Linear, TiedLoraLayer


def _is_supported(layer: nn.Module) -> bool:
    if isinstance(layer, (nn.Linear, Conv1D)):
        return True
    backend = resolve_quantization_backend(layer)
    return backend is not None and backend.layer_type == "linear"


def _get_places(key: str, fused_modules: list[list[str]]) -> dict[str, str]:
    """
    Return, for each of A, B and u, a name that is the same for all modules that share this factor.

    Indices of layers are left out of the names for A and B, and a list of fused modules has one name. So for
    `model.layers.3.self_attn.k_proj`, the names are `model.layers.self_attn.q_proj/k_proj/v_proj` for A,
    `model.layers.self_attn.k_proj` for B and `model.layers.3.self_attn.q_proj/k_proj/v_proj` for u.
    """
    *parent, name = key.split(".")
    parent.append(next(("/".join(names) for names in fused_modules if name in names), name))
    all_layers, module = ([part for part in parts if not part.isdigit()] for parts in (parent, key.split(".")))
    return {"A": ".".join(all_layers), "B": ".".join(module), "u": ".".join(parent)}


class TiedLoraModel(BaseTuner):
    """
    Creates a Tied-LoRA model from a pretrained transformers model.

    The update of an adapted weight is `tied_lora_alpha / r * diag(v) B diag(u) A`. A and B are shared by the modules at
    the same place of all adapted layers; u and v are vectors of each layer. Which of the factors are trained depends on
    the `method` of the config. See https://huggingface.co/papers/2311.09578.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model to be adapted.
        config ([`TiedLoraConfig`]): The configuration of the Tied-LoRA model.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.
        low_cpu_mem_usage (`bool`, `optional`, defaults to `False`):
            Create empty adapter weights on meta device. Useful to speed up the loading process.

    Returns:
        `torch.nn.Module`: The Tied-LoRA model.

    Example:

        ```py
        >>> from transformers import AutoModelForCausalLM
        >>> from peft import TiedLoraConfig, get_peft_model

        >>> base_model = AutoModelForCausalLM.from_pretrained("facebook/opt-125m")
        >>> config = TiedLoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj"])
        >>> model = get_peft_model(base_model, config)
        ```

    **Attributes**:
        - **model** ([`~transformers.PreTrainedModel`]) -- The model to be adapted.
        - **peft_config** ([`TiedLoraConfig`]): The configuration of the Tied-LoRA model.
    """

    prefix: str = "tied_lora_"
    tuner_layer_cls = TiedLoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_TIED_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        # the owners of the shared factors of the adapter that is being added, see TiedLoraLayer
        self._tied_lora_owners = {}
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._tied_lora_owners = {}

    def _create_and_replace(
        self,
        tied_lora_config: TiedLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs,
    ) -> None:
        places = _get_places(current_key, tied_lora_config.fused_modules)
        if isinstance(target, Linear):
            target.update_layer(adapter_name, tied_lora_config, places, self._tied_lora_owners)
            return

        new_module = self._create_new_module(
            tied_lora_config,
            adapter_name,
            target,
            places=places,
            owners=self._tied_lora_owners,
            **get_quantization_kwargs(self),
        )
        if adapter_name not in self.active_adapter:
            # adding an additional adapter: it is not automatically trainable
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)

    @staticmethod
    def _create_new_module(tied_lora_config: TiedLoraConfig, adapter_name: str, target: nn.Module, **kwargs) -> Linear:
        target_base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not _is_supported(target_base_layer):
            raise TypeError(
                f"Target module {target} is not supported. Currently, only `torch.nn.Linear` (optionally quantized) "
                "and `transformers.pytorch_utils.Conv1D` are supported."
            )

        is_conv_1d = isinstance(target_base_layer, Conv1D)
        if tied_lora_config.fan_in_fan_out != is_conv_1d:
            warnings.warn(
                f"fan_in_fan_out is set to {not is_conv_1d} but the target module is `{type(target_base_layer).__name__}`."
                f" Setting fan_in_fan_out to {is_conv_1d}."
            )
            tied_lora_config.fan_in_fan_out = is_conv_1d
        return Linear(target, adapter_name, tied_lora_config, is_target_conv_1d_layer=is_conv_1d, **kwargs)
