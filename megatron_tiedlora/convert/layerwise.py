"""Logits of whole models, computed one layer at a time by the package's own layers.

It needs the memory of one layer, whatever the model: a layer is built, filled for one model after another, run, and
freed. Of the embedding only the rows of the tokens are read, and the head is computed for some rows of it at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from megatron_tiedlora.adapters.tied_adapter import AdapterPart, LayerUpdate, TiedAdapter
from megatron_tiedlora.base.progress import progress_bar
from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter
from megatron_tiedlora.convert.merged_rows import row_blocks
from megatron_tiedlora.model.layer_specs import layer_specs
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.model.weights import WeightRule, weight_rules
from megatron_tiedlora.parallel.frozen_weight import FrozenWeight, frozen_weights
from megatron_tiedlora.parallel.groups import ALONE, TensorParallel

_HEAD_ELEMENTS = 2**24  # of the head at a time; 64 MiB in fp32

ReadRows = Callable[[str, slice], torch.Tensor]


@dataclass(frozen=True)
class Weights:
    """The weights of a model, and the adapters with which it is computed.

    Attributes:
        read: reads rows of a stored tensor, in any float dtype.
        adapters: by the names of the results; None for the weights alone.
    """

    read: ReadRows
    adapters: Mapping[str, NativeAdapter | None]


@torch.no_grad()
def layerwise_logits(
    shape: ModelShape,
    models: Sequence[Weights],
    tokens: torch.Tensor,
    *,
    dtype: torch.dtype,
    progress: bool = False,
) -> dict[str, torch.Tensor]:
    """fp32 logits (b, s, V) by the names in `models`, which are all of the same shape. Layers compute in `dtype`."""
    specs, rules = layer_specs(shape, dtype=dtype), weight_rules(shape)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    hidden: dict[str, torch.Tensor] = {}
    with progress_bar("logits", "layer", total=len(specs), shows=progress) as bar:
        for model in models:
            hidden |= dict.fromkeys(model.adapters, _embed(shape, model.read, tokens, dtype))
        bar.update()
        for spec in specs[1:-1]:
            stage = Stage([spec], None)
            for model in models:
                fill(stage, (rule for rule in rules if rule.layer == spec.index), model.read)
                for name, adapter in model.adapters.items():
                    updates = _updates(adapter, spec.index, dtype)
                    hidden[name] = stage.predict(hidden[name], positions, updates=updates)
            del stage  # before the next layer is built
            bar.update()
        logits: dict[str, torch.Tensor] = {}
        for model in models:
            logits |= _head(shape, model.read, {name: hidden[name] for name in model.adapters}, dtype)
        bar.update()
    return logits


def _embed(shape: ModelShape, read: ReadRows, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The input of the first block, (b, s, d), by an embedding of the rows that occur."""
    ids, renumbered = tokens.unique(return_inverse=True)
    embedding: Any = layer_specs(_with_vocabulary(shape, len(ids)), dtype=dtype)[0].build()
    for row, index in enumerate(ids.tolist()):
        embedding.frozen.load(read(_stored_name(shape, 0), slice(index, index + 1)), start=row)
    embedded: torch.Tensor = embedding(renumbered, TensorParallel())
    return embedded


def _head(
    shape: ModelShape, read: ReadRows, hidden: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """fp32 logits (b, s, V) from results (b, s, d) of the last block, by heads of some rows of the vocabulary each."""
    last = shape.num_layers + 1
    norms = [rule for rule in weight_rules(shape) if rule.layer == last and rule.linear is None]
    logits: dict[str, list[torch.Tensor]] = {name: [] for name in hidden}
    size = max(_HEAD_ELEMENTS // shape.hidden_size, 1)
    for start in range(0, shape.vocab_size, size):
        stop = min(start + size, shape.vocab_size)
        head: Any = layer_specs(_with_vocabulary(shape, stop - start), dtype=dtype)[-1].build()
        if shape.tied_embeddings:
            head.take_weight(FrozenWeight.empty(stop - start, shape.hidden_size, dtype=dtype))
        fill(nn.ModuleDict({"layers": nn.ModuleDict({str(last): head})}), norms, read)
        head.frozen.load(read(_stored_name(shape, last), slice(start, stop)))
        for name, states in hidden.items():
            logits[name].append(head(states, TensorParallel()).float())
    return {name: torch.cat(parts, dim=-1) for name, parts in logits.items()}


def _with_vocabulary(shape: ModelShape, size: int) -> ModelShape:
    """The same model with a vocabulary of `size` tokens."""
    return replace(shape, embedding=replace(shape.embedding, blocks=(size,)), head=replace(shape.head, blocks=(size,)))


def _stored_name(shape: ModelShape, layer: int) -> str:
    """The stored tensor of the embedding (layer 0), or of the head."""
    linear = shape.embedding if layer == 0 or shape.tied_embeddings else shape.head
    return f"{linear.sources[0].module}.weight"


def fill(module: nn.Module, rules: Iterable[WeightRule], read: ReadRows) -> None:
    """Read weights of the name table into the module, some rows at a time: a whole tensor in fp32 would be large."""
    targets = frozen_weights(module)
    for rule in rules:
        offset = 0
        for part in rule.parts:
            for rows in row_blocks((part.size, *part.shape[1:])):
                values = read(part.name, slice(part.start + rows.start, part.start + rows.stop))
                targets[rule.name].load(values, start=offset)
                offset += len(values)


def _updates(adapter: NativeAdapter | None, layer: int, dtype: torch.dtype) -> dict[int, LayerUpdate]:
    """The adapter's update of one layer, by the layer; empty if it has none there."""
    if adapter is None or layer not in adapter.config.layers:
        return {}
    part = TiedAdapter(AdapterPart(adapter.config, (layer,)))
    part.load_full(adapter.state)
    (update,) = part(ALONE, dtype=dtype)
    return {layer: update}
