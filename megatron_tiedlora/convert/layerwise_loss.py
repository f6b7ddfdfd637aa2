"""The loss of a base and an adapter on many rows, one layer at a time: it needs the memory of one layer.

A layer is built and filled once, and the activations of all rows go through it before the next one. They wait in the
host's memory; where there are many, rows are processed in groups, and weights are read once for each group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import psutil
import torch
from torch import nn
from torch.nn import functional

from megatron_tiedlora.adapters.tied_adapter import AdapterPart, TiedAdapter
from megatron_tiedlora.base.progress import progress_bar
from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter
from megatron_tiedlora.convert.layerwise import ReadRows, fill
from megatron_tiedlora.data.loader import MicroBatch
from megatron_tiedlora.model.layer_specs import LayerSpec, layer_specs
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.model.weights import WeightRule, stage_weight_rules
from megatron_tiedlora.parallel.frozen_weight import FrozenWeight
from megatron_tiedlora.parallel.groups import ALONE, TensorParallel

_SHARE = 0.25  # of the host's free memory, for activations that wait
_ROWS_AT_ONCE = 512  # of logits
_NO_LABEL = -100


@torch.no_grad()
def layerwise_loss(
    shape: ModelShape,
    read: ReadRows,
    adapter: NativeAdapter,
    batches: Iterable[MicroBatch],
    *,
    dtype: torch.dtype,
    device: torch.device,
    between: Callable[[], object] = lambda: None,
    progress: bool = False,
) -> float:
    """The summed loss over the supervised positions of `batches`, none of them packed.

    Args:
        read: reads rows of a stored tensor, in any float dtype.
        dtype: of the layers' computation.
        between: called before each layer; it may raise to end the computation.
        progress: show a bar.
    """
    total = 0.0
    for group in _groups(batches, shape.hidden_size * dtype.itemsize):
        total += _Pass(shape, read, adapter, dtype, device, between).loss(group, progress=progress)
    return total


def _groups(batches: Iterable[MicroBatch], bytes_per_token: int) -> Iterator[list[MicroBatch]]:
    """Batches whose activations fit into memory together; at least one."""
    group: list[MicroBatch] = []
    used, most = 0, _SHARE * psutil.virtual_memory().available
    for batch in batches:
        size = batch.input_ids.numel() * bytes_per_token
        if group and used + size > most:
            yield group
            group, used = [], 0
        group.append(batch)
        used += size
    if group:
        yield group


class _Pass:
    """One pass of some batches through all layers."""

    def __init__(
        self,
        shape: ModelShape,
        read: ReadRows,
        adapter: NativeAdapter,
        dtype: torch.dtype,
        device: torch.device,
        between: Callable[[], object],
    ) -> None:
        self.shape, self.read, self.adapter = shape, read, adapter
        self.dtype, self.device, self.between = dtype, device, between
        # Of a head with the embedding's weight too, by its own name.
        self._rules = stage_weight_rules(shape, has_embedding=False)

    def loss(self, batches: Sequence[MicroBatch], *, progress: bool) -> float:
        """The summed loss."""
        first, *blocks, last = layer_specs(self.shape, dtype=self.dtype)
        with progress_bar("loss", "layer", total=len(blocks) + 2, shows=progress) as bar:
            embedding: Any = self._built(first)
            hidden = [embedding(batch.input_ids.to(self.device), TensorParallel()).cpu() for batch in batches]
            del embedding
            bar.update()
            for spec in blocks:
                self.between()
                self._through_block(spec, batches, hidden)
                bar.update()
            return self._head_loss(last, batches, hidden)

    def _built(self, spec: LayerSpec) -> nn.Module:
        """A layer with its weights."""
        with self.device:
            layer = spec.build()
            if not hasattr(layer, "frozen") and spec.kind == "head":  # tied embeddings
                head: Any = layer
                head.take_weight(
                    FrozenWeight.empty(self.shape.vocab_size, self.shape.hidden_size, dtype=self.dtype)
                )
        fill(nn.ModuleDict({"layers": nn.ModuleDict({str(spec.index): layer})}), self._rules_of(spec), self.read)
        return layer

    def _rules_of(self, spec: LayerSpec) -> list[WeightRule]:
        return [rule for rule in self._rules if rule.layer == spec.index]

    def _through_block(self, spec: LayerSpec, batches: Sequence[MicroBatch], hidden: list[torch.Tensor]) -> None:
        """Replace every element of `hidden` by what the block makes of it."""
        with self.device:
            stage = Stage([spec], None)
        fill(stage, self._rules_of(spec), self.read)
        updates = {}
        if spec.index in self.adapter.config.layers:
            part = TiedAdapter(AdapterPart(self.adapter.config, (spec.index,))).to(self.device)
            part.load_full(self.adapter.state)
            (updates[spec.index],) = part(ALONE, dtype=self.dtype)
        for index, batch in enumerate(batches):
            positions = batch.position_ids.to(self.device)
            hidden[index] = stage.predict(hidden[index].to(self.device), positions, updates=updates).cpu()

    def _head_loss(self, spec: LayerSpec, batches: Sequence[MicroBatch], hidden: Sequence[torch.Tensor]) -> float:
        head: Any = self._built(spec)
        total = 0.0
        for batch, states in zip(batches, hidden, strict=True):
            found = batch.labels != _NO_LABEL
            rows, labels = states[found], batch.labels[found]
            for part, wanted in zip(rows.split(_ROWS_AT_ONCE), labels.split(_ROWS_AT_ONCE), strict=True):
                logits = head(part[None].to(self.device), TensorParallel())[0].float()
                total += functional.cross_entropy(logits, wanted.to(self.device), reduction="sum").item()
        return total
