"""Families of models, one per module. The module has the name of the family's `model_type` in `config.json`.

It has `DEFAULTS`, what an absent field means where that is not what it means to LLaMA, and `read`, which makes a
`ModelShape` of an `HfConfig`.
"""

import pkgutil
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from megatron_tiedlora.base.messages import UserError, shown
from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.model.hf_config import HfConfig

FAMILIES = tuple(sorted(found.name for found in pkgutil.iter_modules(__path__)))

# Why a model of another type is out of reach, by a field that only such models have.
_REASONS = {
    **dict.fromkeys(("text_config", "vision_config"), "its text model is part of a multimodal one"),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), "it is a mixture of experts"),
    **dict.fromkeys(("linear_num_key_heads", "mamba_d_state", "state_size"), "it has layers without attention"),
    **dict.fromkeys(("parallel_attn", "use_parallel_residual"), "its attention and MLP have the same input"),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), "it caps its scores"),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), "its keys and values are compressed"),
}
_FACTORS = "it multiplies what flows between its layers by factors"
_OTHER_TYPES = {
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "granite", "minicpm"), _FACTORS),
    **dict.fromkeys(("glm", "glm4"), "it rotates neighbouring elements of a head"),
    **dict.fromkeys(("gpt2", "gpt_bigcode", "nemotron", "opt", "starcoder2"), "its MLP has no gate"),
}


def shape_from_hf(values: Mapping[str, Any], *, source: str = "config.json") -> ModelShape:
    """The shape that the fields of a Hugging Face config describe.

    Raises:
        UserError: the name of a model type, feature or field that is not implemented.
    """
    kind = values.get("model_type")
    if kind not in FAMILIES:
        known, reason = ", ".join(FAMILIES), _reason(values)
        because = "" if reason is None else f", as {reason}"
        raise UserError(f"{source}: model_type {shown(kind)} is not implemented{because}. This version trains {known}")
    llama, family = (import_module(f"{__name__}.{name}") for name in ("llama", kind))
    config = HfConfig(values, source, {**llama.DEFAULTS, **family.DEFAULTS})
    shape: ModelShape = family.read(config)
    config.reject_unread()
    return shape


def _reason(values: Mapping[str, Any]) -> str | None:
    known = _OTHER_TYPES.get(str(values.get("model_type")))
    return known or next((why for field, why in _REASONS.items() if values.get(field)), None)
