"""The weights of a merge onto a folder that is quantised: D(W) + (alpha / r) diag(v) B diag(u) A in 16 or 32 bits.

D(W) are the folder's values, which training saw. All tensors are computed some rows at a time, and files and their
names are new: the folder's own do not fit, because its tensors have other sizes and names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from megatron_tiedlora.base.atomic import write_json
from megatron_tiedlora.base.json_files import read_json_object
from megatron_tiedlora.checkpoint.base_weights import BaseWeights
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.checkpoint.streamed_files import StreamedTensor
from megatron_tiedlora.convert.merged_rows import Changes, row_blocks
from megatron_tiedlora.model.weights import quantised_rules, weight_rules


def dequantised_tensors(
    weights: BaseWeights,
    source: ModelSource,
    changes: Changes,
    dtype: torch.dtype | None,
    between: Callable[[], object],
) -> list[StreamedTensor]:
    """Every tensor of the merged model.

    Args:
        changes: what the adapter changes.
        dtype: of all tensors; None: each as stored, and those that are quantised as the embedding is.
        between: called for each block of rows; it may raise to end the merge.
    """
    rules = weight_rules(source.shape)
    quantised = {name for rule in quantised_rules(source.shape) for name in rule.hf_names}
    shapes = {name: shape for rule in rules for name, shape in zip(rule.hf_names, rule.hf_shapes(), strict=True)}
    first, first_row = rules[0].hf_names[0], slice(0, 1)

    def tensor(name: str, shape: tuple[int, ...]) -> StreamedTensor:
        own = dtype or weights.read(first if name in quantised else name, first_row).dtype

        def blocks() -> Iterator[torch.Tensor]:
            made = changes[name]() if name in changes else None
            for rows in row_blocks(shape):
                between()
                values = weights.read(name, rows)
                yield values.to(own) if made is None else made.rows(values, rows, own)

        return StreamedTensor(name, own, shape, blocks)

    return [tensor(name, shape) for name, shape in shapes.items()]


def state_plain_weights(config_file: Path) -> None:
    """Take what says that the weights are quantised out of a config."""
    values = read_json_object(config_file, kind="a model's config")
    values.pop("quantization_config", None)
    write_json(config_file, values)
