"""Add Tied-LoRA to axolotl as an adapter, with these keys of its YAML file:

    plugins: [megatron_tiedlora.integrations.axolotl.TiedLoraPlugin]
    adapter: tied_lora
    lora_r: 8
    lora_alpha: 8                     # default: lora_r
    tied_lora_method: tl6
    tied_lora_targets: [qkv, o_proj]  # default: qkv
    tied_lora_layers: [1, 3]          # default: all

The initial values follow axolotl's `seed`. The saved adapter is a native adapter folder.
"""

from collections.abc import Mapping
from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftModel, get_peft_model
from pydantic import BaseModel, Field, model_validator

from megatron_tiedlora.base.messages import UserError, naming, nearest_name
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.config.fields import TARGETS_HELP
from megatron_tiedlora.peft import TiedLoraConfig

NAME = "tied_lora"
_KEYS = {"lora_r": "r", "lora_alpha": "alpha", "seed": "seed"}
_KEYS |= {f"{NAME}_{name}": name for name in ("method", "layers", "targets")}
# What to do about keys of axolotl that this adapter cannot follow.
_FIXES = {
    "use tied_lora_targets": "lora_target_modules lora_target_linear lora_target_parameters",
    "use tied_lora_layers": "peft_layers_to_transform",
    "axolotl quantises the model for lora and qlora only; remove it": "load_in_4bit load_in_8bit gptq",
    "axolotl saves only the tensors of LoRA then; use DeepSpeed ZeRO-1 or ZeRO-2, or neither": "fsdp fsdp_config",
    "use a model that has the added tokens; their embeddings are not trained": "tokens peft_trainable_token_indices",
    "it is for LoRA only; remove it": "lora_dropout lora_modules_to_save lora_fan_in_fan_out lora_rank_pattern relora"
    " lora_alpha_pattern loraplus_lr_ratio peft peft_use_dora peft_use_rslora peft_init_lora_weights"
    " peft_layer_replication lora_qkv_kernel lora_o_kernel lora_mlp_kernel lora_embedding_kernel",
}


def axolotl_config(cfg: Mapping[str, Any]) -> TiedLoraConfig:
    """Return the PEFT config that axolotl's YAML keys describe. Raise UserError, with the key, on invalid values."""
    own = {name: cfg[key] for key, name in _KEYS.items() if cfg.get(key) is not None}
    with naming(f"adapter: {NAME} (r is lora_r, alpha is lora_alpha)"):
        config = TiedLoraConfig(**own)
    return config


class TiedLoraArgs(BaseModel):
    """The plugin's keys in axolotl's schema."""

    tied_lora_method: str | None = Field(default=None, description="lora, vera, or tl1 to tl6 (default)")
    tied_lora_layers: list[int] | None = Field(default=None, description="adapted layers, 1-based (default: all)")
    tied_lora_targets: str | list[str] | None = Field(default=None, description=TARGETS_HELP)

    @model_validator(mode="before")
    @classmethod
    def check_tied_lora(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Raise UserError for keys that this adapter does not know, and for those of other adapters."""
        own = [key for key in data if key.startswith(f"{NAME}_")]
        for key in own:
            if key not in _KEYS:
                raise UserError(f"{key} is unknown{nearest_name(key, _KEYS)}")
        if data.get("adapter") != NAME:
            if own:
                raise UserError(f"{own[0]} needs `adapter: {NAME}`, not {data.get('adapter')}")
            return data
        for fix, keys in _FIXES.items():
            for key in filter(data.get, keys.split()):
                raise UserError(f"{key}: {data[key]} does not work with adapter: {NAME}; {fix}")
        axolotl_config(data)
        return data


class TiedLoraPlugin(BasePlugin):
    """The plugin that axolotl loads by the name in `plugins`."""

    def get_input_args(self) -> str:
        """Return the name of the schema of the plugin's keys."""
        return f"{TiedLoraArgs.__module__}.{TiedLoraArgs.__name__}"

    def get_adapter_capabilities(self) -> list[Any]:
        """Return the adapter of this plugin."""
        return [AdapterCapabilities(name=NAME)]

    def load_adapter(self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False) -> Any:
        """Return the model with the adapter, and the adapter's config; None if the adapter is another plugin's."""
        if cfg.get("adapter") != NAME:
            return None
        config, folder = axolotl_config(cfg), cfg.get("lora_model_dir")
        base = None if config_only else find_model(model.name_or_path, weights=False)
        if base and base.shape.vocab_size != (rows := model.get_input_embeddings().num_embeddings):
            why = f"axolotl gave {base.name} {rows} embeddings for added tokens (special_tokens, or other keys)"
            raise UserError(f"{why}; use a model that has the added tokens; their embeddings are not trained")
        if config_only or not folder:
            return None if config_only else get_peft_model(model, config), config
        model = PeftModel.from_pretrained(model, folder, is_trainable=not inference)
        return model, model.peft_config["default"]
