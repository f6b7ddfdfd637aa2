"""Find the supported model families, by the `model_type` of their `config.json`.

Each module of this package except `decoder` defines a family: a function that returns a `ModelShape` for an `HfConfig`,
and raises UserError for features that are not implemented. A new family is a new module.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from megatron_tiedlora.base import shapes
from megatron_tiedlora.base.messages import UserError, shown
from megatron_tiedlora.model.families.decoder import FAMILIES
from megatron_tiedlora.model.hf_config import HfConfig

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
# The reasons why models of unsupported types cannot be trained, by a field that only such models have.
_REASONS = {
    **dict.fromkeys(("text_config", "vision_config"), "it is part of a multimodal model"),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), "it is a mixture of experts"),
    **dict.fromkeys(("linear_num_key_heads", "mamba_d_state", "state_size"), "it has layers without attention"),
    **dict.fromkeys(("parallel_attn", "use_parallel_residual"), "its attention and MLP have the same input"),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), "it caps scores or logits"),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), "its keys and values are compressed"),
}
_FACTORS = "it scales the activations between its layers"
_OTHER_TYPES = {
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "granite", "minicpm"), _FACTORS),
    **dict.fromkeys(("glm", "glm4"), "its rotary embedding rotates neighbouring elements"),
    **dict.fromkeys(("gpt2", "gpt_bigcode", "nemotron", "opt", "starcoder2"), "its MLP has no gate"),
}


def shape_from_hf(values: Mapping[str, Any], *, source: str = "config.json") -> shapes.ModelShape:
    """Return the `ModelShape` that the fields of a Hugging Face config describe.

    Raises:
        UserError: a model type, feature or field is not implemented; the message names it.
    """
    kind = values.get("model_type")
    family_of_kind = FAMILIES.get(str(kind))
    if family_of_kind is None:
        reason = _OTHER_TYPES.get(str(kind))
        reason = reason or next((why for field, why in _REASONS.items() if values.get(field)), None)
        because = "" if reason is None else f", because {reason}"
        known = ", ".join(sorted(FAMILIES))
        raise UserError(f"{source}: model_type {shown(kind)} is not implemented{because}. Use a model of type {known}")
    config = HfConfig(values, source, {**FAMILIES["llama"].defaults, **family_of_kind.defaults})
    shape = family_of_kind.read(config)
    config.reject_unread()
    return shape
