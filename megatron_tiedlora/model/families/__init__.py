"""Find the supported model families, by the `model_type` of their `config.json`.

Each module of this package except `decoder` defines a family: a function that returns a `ModelShape` for an `HfConfig`,
and raises UserError for features that are not implemented. A new family is a new module.
"""

import importlib
import pkgutil
from collections.abc import Collection, Mapping
from typing import Any

from megatron_tiedlora.base import shapes
from megatron_tiedlora.base.messages import UserError, shown
from megatron_tiedlora.model.families.decoder import FAMILIES, read_family

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
# The reasons why models of unsupported types cannot be trained, by a field that only such models have.
_REASONS = {
    **dict.fromkeys(("text_config", "vision_config"), "it is part of a multimodal model"),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), "it is a mixture of experts"),
    **dict.fromkeys(("linear_num_key_heads", "mamba_d_state", "state_size"), "it has layers without attention"),
    **dict.fromkeys(("parallel_attn", "use_parallel_residual"), "its attention and MLP have the same input"),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), "its keys and values are compressed"),
}
_OTHER_TYPES = {
    **dict.fromkeys(("gpt2", "gpt_bigcode", "nemotron", "opt", "starcoder2"), "its MLP has no gate"),
    "granitemoehybrid": "models of this type can have experts, and layers without attention",
}


def shape_from_hf(
    values: Mapping[str, Any], *, source: str = "config.json", names: Collection[str] = ()
) -> shapes.ModelShape:
    """Return the `ModelShape` that the fields of a Hugging Face config describe.

    Args:
        source: the name of the config in messages.
        names: the names of the model's tensors, in files or in memory. The text model inside a multimodal model has
            different names in files than in transformers' model. Without `names`, it has those in memory.

    Raises:
        UserError: a model type, feature or field is not implemented; the message names it.
    """
    kind = values.get("model_type")
    if str(kind) in FAMILIES:
        return read_family(str(kind), values, source, names)
    reason = _OTHER_TYPES.get(str(kind)) or next((why for field, why in _REASONS.items() if values.get(field)), None)
    because = "" if reason is None else f", because {reason}"
    known = ", ".join(sorted(FAMILIES))
    raise UserError(f"{source}: model_type {shown(kind)} is not implemented{because}. Use a model of type {known}")
