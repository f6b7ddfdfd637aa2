"""A base model with an adapter in one process, without an engine: for merging checks, export checks and decoding."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from megatron_tiedlora.adapters.tied_adapter import AdapterPart, TiedAdapter
from megatron_tiedlora.checkpoint.base_weights import BaseWeights, load_base_weights
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter, identify_base
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.model.families.llama import weight_rules
from megatron_tiedlora.model.layer_specs import layer_specs
from megatron_tiedlora.pipeline.stage import Stage

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def load_model(
    source: ModelSource,
    adapter: NativeAdapter | None,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Stage:
    """The model in evaluation mode, base in `dtype` and adapter in fp32; `progress` shows a bar.

    Raises:
        UserError: weights that are missing or do not fit, or an adapter of another base.
    """
    with BaseWeights(source.weights_folder(), weight_rules(source.config)) as weights:
        bank = None
        if adapter is not None:
            adapter.check_base(identify_base(source, weights, adapter.base.dtype), source="adapter")
            bank = TiedAdapter(AdapterPart.whole(adapter.config)).to(device)
            bank.load_full(adapter.state)
        scale = adapter.config.scale if adapter is not None else 1.0
        with torch.device(device):
            model = Stage(layer_specs(source.config, update_scale=scale, dtype=dtype), bank)
        load_base_weights(
            weights,
            dict(model.named_parameters()),
            access=lambda parameter: nullcontext(parameter),
            progress=progress,
        )
    return model.eval()
