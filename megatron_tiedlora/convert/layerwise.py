"""Computes logits and losses of complete models one layer at a time, with the package's own layers.

This needs the memory of one layer. A layer is built, loaded with the weights of each model in turn, run on all rows,
and freed. Only the embedding rows of the tokens are loaded. Logits are computed with some rows of the head at a time.
For a loss, batches are processed together if their activations fit in a fraction of the host's free memory. The weights
are then read only once for these batches.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from torch import nn

from megatron_tiedlora.adapters.adapter_groups import ONLY
from megatron_tiedlora.adapters.tied_adapter import LayerUpdate
from megatron_tiedlora.base.progress import progress_bar
from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.checkpoint.load_model import ReadRows, adapter_shard, row_blocks
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter
from megatron_tiedlora.config.batch import filled
from megatron_tiedlora.model.batch import MicroBatch
from megatron_tiedlora.model.layer_specs import layer_specs
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.model.weights import WeightRule, weight_rules
from megatron_tiedlora.parallel.frozen_weight import FrozenWeight, frozen_weights
from megatron_tiedlora.parallel.groups import ALONE, Grid, TensorParallel

_HEAD_ELEMENTS = 2**24  # elements of the head that are loaded at a time for logits; 64 MiB in fp32
_SHARE = 0.25  # the fraction of the host's free memory that stored activations may use
Inputs = tuple[torch.Tensor, torch.Tensor]  # tokens (b, s) and position ids (b, s)
# A function that reads rows of a model's stored tensors in any float dtype, and an adapter for each named result. A
# result with None is computed without an adapter.
Weights = tuple[ReadRows, Mapping[str, NativeAdapter | None]]


@torch.no_grad()
def layerwise_logits(
    shape: ModelShape, models: Sequence[Weights], tokens: torch.Tensor, *, dtype: torch.dtype, progress: bool = False
) -> dict[str, torch.Tensor]:
    """Return {name in `models`: fp32 logits (b, s, V)}. All models have this shape, and layers compute in `dtype`."""
    layers = _Layers(shape, dtype, torch.device("cpu"))
    size = max(_HEAD_ELEMENTS // shape.hidden_size, 1)
    logits: dict[str, list[torch.Tensor]] = {}
    with progress_bar("logits", "layer", total=shape.num_layers + 2, shows=progress) as bar:
        hidden = layers.hidden(models, [(tokens, torch.arange(tokens.shape[1]).expand_as(tokens))], bar)
        for read, adapters in models:
            for start in range(0, shape.vocab_size, size):
                head = layers.head(read, start, min(start + size, shape.vocab_size))
                for name in adapters:
                    logits.setdefault(name, []).append(head(hidden[name][0], TensorParallel()).float())
        bar.update()
    return {name: torch.cat(parts, dim=-1) for name, parts in logits.items()}


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
) -> float:
    """Return the summed loss over the supervised positions of `batches`, which must not be packed.

    Args:
        read: reads rows of a stored tensor, in any float dtype.
        dtype: the dtype in which layers compute.
        between: called before each block; it may raise an exception to end the computation.
    """
    layers, total = _Layers(shape, dtype, device, between), 0.0
    # Batches are processed together if their activations fit into memory, and otherwise one at a time.
    most, of_token = _SHARE * psutil.virtual_memory().available, shape.hidden_size * dtype.itemsize
    for group in filled((batch, batch.tokens.numel() * of_token, most) for batch in batches):
        with progress_bar("loss", "layer", total=shape.num_layers + 2) as bar:
            inputs = [(batch.tokens, batch.positions) for batch in group]
            hidden = layers.hidden([(read, {ONLY: adapter})], inputs, bar)[ONLY]
            head = layers.head(read, 0, shape.vocab_size)
            for batch, states in zip(group, hidden, strict=True):
                supervised = batch.supervised()
                rows = states.flatten(0, 1)[supervised.rows][None].to(device)
                total += head(rows, TensorParallel(), supervised.moved(lambda tensor: tensor.to(device))).item()
    return total


@dataclass(frozen=True)
class _Layers:
    """The layers of a model of this shape, which compute in `dtype` on `device`.

    Attributes:
        between: called before each block.
    """

    shape: ModelShape
    dtype: torch.dtype
    device: torch.device
    between: Callable[[], object] = lambda: None

    def hidden(self, models: Sequence[Weights], inputs: Sequence[Inputs], bar: Any) -> dict[str, list[torch.Tensor]]:
        """Return {name in `models`: the outputs (b, s, d) of the last block for each of `inputs`}, on the CPU."""
        hidden: dict[str, list[torch.Tensor]] = {}
        for read, adapters in models:
            embedded = self._embedded(read, inputs)
            hidden |= {name: list(embedded) for name in adapters}
        bar.update()
        rules = weight_rules(self.shape)
        for spec in layer_specs(self.shape, dtype=self.dtype)[1:-1]:
            self.between()
            with self.device:
                stage = Stage([spec], None)
            for read, adapters in models:
                _fill(stage, (rule for rule in rules if rule.layer == spec.index), read)
                for name, adapter in adapters.items():
                    updates: dict[int, LayerUpdate] = {}
                    if adapter is not None and spec.index in adapter.config.layers:
                        of_layer = range(spec.index, spec.index + 1)
                        (update,) = adapter_shard(adapter, of_layer, Grid(0, 1), self.device)(ALONE, dtype=self.dtype)
                        updates[spec.index] = update
                    for index, (_, positions) in enumerate(inputs):
                        states = hidden[name][index].to(self.device)
                        found = stage.predict(states, positions.to(self.device), updates=updates)
                        hidden[name][index] = found.cpu()
            del stage  # before the next layer is built
            bar.update()
        return hidden

    def head(self, read: ReadRows, start: int, stop: int) -> Any:
        """Return the last layer with rows `start` to `stop - 1` of the head's weight."""
        last = self.shape.num_layers + 1
        with self.device:
            head: Any = layer_specs(self._with_vocabulary(stop - start), dtype=self.dtype)[-1].build()
            if self.shape.tied_embeddings:
                head.take_weight(FrozenWeight.empty(stop - start, self.shape.hidden_size, dtype=self.dtype))
        norms = (rule for rule in weight_rules(self.shape) if rule.layer == last and rule.linear is None)
        _fill(nn.ModuleDict({"layers": nn.ModuleDict({str(last): head})}), norms, read)
        for rows in row_blocks((stop - start, self.shape.hidden_size)):
            values = read(self._stored_name(last), slice(start + rows.start, start + rows.stop))
            head.frozen.load(values, start=rows.start)
        return head

    def _embedded(self, read: ReadRows, inputs: Sequence[Inputs]) -> list[torch.Tensor]:
        """Return the embeddings (b, s, d) of each of `inputs`. Only the embedding rows of their tokens are loaded."""
        ids = torch.cat([tokens.flatten() for tokens, _ in inputs]).unique()
        with self.device:
            embedding: Any = layer_specs(self._with_vocabulary(len(ids)), dtype=self.dtype)[0].build()
        offset = 0
        for rows in row_blocks((self.shape.vocab_size, self.shape.hidden_size)):
            here = ids[(ids >= rows.start) & (ids < rows.stop)]
            if len(here):
                embedding.frozen.load(read(self._stored_name(0), rows)[here - rows.start], start=offset)
                offset += len(here)
        renumbered = (torch.searchsorted(ids, tokens).to(self.device) for tokens, _ in inputs)
        return [embedding(tokens, TensorParallel()).cpu() for tokens in renumbered]

    def _with_vocabulary(self, size: int) -> ModelShape:
        """Return the model's shape with a vocabulary of `size` tokens."""
        embedding, head = (replace(linear, blocks=(size,)) for linear in (self.shape.embedding, self.shape.head))
        return replace(self.shape, embedding=embedding, head=head)

    def _stored_name(self, layer: int) -> str:
        """Return the name of the stored tensor of the embedding (layer 0) or the head."""
        linear = self.shape.embedding if layer == 0 or self.shape.tied_embeddings else self.shape.head
        return f"{linear.sources[0].module}.weight"


def _fill(module: nn.Module, rules: Iterable[WeightRule], read: ReadRows) -> None:
    """Read the weights of `rules` into the module some rows at a time, since a full tensor in fp32 would be large."""
    targets = frozen_weights(module)
    for rule in rules:
        offset = 0
        for part in rule.parts:
            for rows in row_blocks((part.size, *part.shape[1:])):
                values = read(part.name, slice(part.start + rows.start, part.start + rows.stop))
                targets[rule.name].load(values, start=offset)
                offset += len(values)
