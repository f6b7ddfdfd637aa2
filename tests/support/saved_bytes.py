"""What a block keeps for its backward pass, by storage."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch


def saved_bytes_per_token(stage: Any, dtype: torch.dtype) -> float:
    """Bytes that the stage's last block keeps of a sequence of 256 tokens, for each token, parameters left out."""
    length, index = 256, stage.blocks[-1]
    block = stage.layers[str(index)]
    updates = stage.read_adapter()
    hidden = stage.empty_hidden(1, length).normal_().requires_grad_()
    context = block.attention.context(torch.arange(length)[None], dtype)  # saved once for all layers
    found = (factor for update in updates.get(index, {}).values() for factor in update)
    factors = (factor for factor in found if isinstance(factor, torch.Tensor))
    held = [*stage.parameters(), *chain(*context.tables.values()), *factors]
    parameters = {tensor.untyped_storage().data_ptr() for tensor in held}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = block(hidden, context, stage.tensor_parallel, update=updates.get(index))
    assert output.shape == hidden.shape
    return sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in parameters) / length
