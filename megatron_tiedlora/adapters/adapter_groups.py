"""Apply several adapters of one base in the same step. Each has its own tensors and is applied to its own tokens only.

The micro-batches of several adapters are concatenated into one row of tokens. The micro-batch of an adapter is the same
as when it is trained alone. So its tensors have the same shapes and memory, and no tokens are added as padding.
`AdapterGroup` is not an nn.Module, so an engine sees an adapter's tensors only if `Stage` registers the adapter.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megatron_tiedlora.adapters.low_rank import AllRows, InputDropout, SharedRows, dropout_salt, token_keys
from megatron_tiedlora.adapters.tied_adapter import AdapterShard, LayerUpdate, LinearUpdate, TiedAdapter, full_factors
from megatron_tiedlora.parallel.groups import TensorParallel, with_adjoint
from megatron_tiedlora.parallel.loss import RowSpan, RowSpans, spans_between

ONLY = ""  # the name of an adapter that is trained or evaluated alone


class AdapterSegment(NamedTuple):
    """The tokens of one adapter in a micro-batch: `num_rows` rows of `length` tokens, flattened.

    Attributes:
        adapter: the name of the adapter in the adapter group.
    """

    adapter: str
    num_rows: int
    length: int

    @property
    def num_tokens(self) -> int:
        """Return the adapter's number of tokens in the micro-batch, including padding."""
        return self.num_rows * self.length


AdapterSegments = Sequence[AdapterSegment]


def spans_of(segments: AdapterSegments) -> RowSpans:
    """Return the span of tokens of each segment, in order, or an empty tuple if there is only one segment."""
    if len(segments) == 1:
        return ()
    return tuple(RowSpan(number, segment.num_tokens) for number, segment in enumerate(segments))


class Dropout(NamedTuple):
    """The dropout of one adapter's inputs (--dropout). The index of a token determines which of its inputs are dropped.

    Attributes:
        probability: the probability that an input element is dropped.
        seed: the seed of the run.
    """

    probability: float
    seed: int

    def of_linears(
        self, part: AdapterShard, token_index: Tensor, tensor_parallel: TensorParallel
    ) -> Callable[[int, str], InputDropout]:
        """Return a function that takes a layer and a target's name and returns the dropout of that linear.

        Args:
            part: the shard of the adapter on this rank.
            token_index: the token indices, (b, s) int64, see `MicroBatch`.
        """
        parts = tensor_parallel.sequence_parts
        keys = token_keys(token_index.flatten(), seed=self.seed)
        local_keys = keys.chunk(parts)[tensor_parallel.group.rank] if parts > 1 else keys
        first = {
            target.name: part.tp_rank * (target.in_size // part.tp_size) if target.sharded_dim == "row" else 0
            for target in part.config.targets
        }

        def of_linear(layer: int, name: str) -> InputDropout:
            salt = dropout_salt(self.seed, layer=layer, target=name)
            return InputDropout(keys, local_keys, salt=salt, first=first[name], probability=self.probability)

        return of_linear


class AdapterGroup:
    """The shards of one or more adapters on a rank, by adapter name."""

    def __init__(self, adapters: Mapping[str, TiedAdapter], dropout: Mapping[str, Dropout] | None = None) -> None:
        """Create the group from its adapters and from their dropout in training steps, both by adapter name."""
        self.adapters, self.dropout = dict(adapters), dict(dropout or {})

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the name ADAPTER.TENSOR and the parameter for every adapter tensor on this rank."""
        for name, adapter in self.adapters.items():
            for tensor, parameter in adapter.named_parameters():
                yield f"{name}.{tensor}", parameter

    def updates(
        self, segments: AdapterSegments, tensor_parallel: TensorParallel, *, dtype: torch.dtype
    ) -> dict[int, LayerUpdate]:
        """Return the updates of the stage's adapted layers, by layer, for the adapters of the micro-batch.

        Factors that ranks need in full are gathered in one message for all adapters of the micro-batch. The gradients
        of these factors are summed in one message. Partial gradients of u are summed later, once per step.

        Args:
            segments: the tokens of each adapter in the micro-batch; may be empty if the group has only one adapter.
            dtype: the base's dtype.
        """
        adapters = [self.adapters[segment.adapter] for segment in segments] or list(self.adapters.values())
        assert segments or len(adapters) == 1, "the rows of several adapters need segments"
        assert len(set(map(id, adapters))) == len(adapters), "an adapter occurs twice in one micro-batch"
        if len(adapters) == 1:  # all tokens use the same factors; ZeRO-3 gathers those that it shards in this call
            updates = adapters[0](tensor_parallel.group, dtype=dtype)
            return dict(zip(adapters[0].part.layers, updates, strict=True))
        spans, group = spans_of(segments), tensor_parallel.group
        by_adapter = []
        for adapter, whole in zip(adapters, full_factors(adapters, group), strict=True):
            layers = adapter.part.layers
            by_adapter.append(dict(zip(layers, adapter.updates(whole, dtype=dtype), strict=True)) if layers else {})
        local_spans = spans
        if tensor_parallel.sequence_parts > 1:
            size = sum(span.size for span in spans) // group.size
            local_spans = spans_between(spans, group.rank * size, (group.rank + 1) * size)
        found: dict[int, LayerUpdate] = {}
        memory: dict[Hashable, Tensor] = {}

        def flat(factors: Sequence[Tensor]) -> Tensor:
            """Return the factors, flattened and concatenated. Layers with the same factors share the result."""
            # The key is not an address, because tensors without data have none.
            key = tuple((factor.untyped_storage()._cdata, factor.storage_offset()) for factor in factors)
            if key not in memory:
                parts = [factor.flatten() for factor in factors]
                memory[key] = parts[0] if len(parts) == 1 else torch.cat(parts)
            return memory[key]

        def joined(linears: Mapping[int, LinearUpdate]) -> LinearUpdate:
            """Return one update of a linear for all adapters. Its factors and gradient slots are flat tensors."""
            ranks = {number: adapters[number].config.rank for number in linears}
            a, f, grad_a, grad_f, _ = zip(*linears.values(), strict=True)
            rows = SharedRows(ranks=ranks, spans=spans, local_spans=local_spans)
            return LinearUpdate(flat(a), flat(f), _join_slots(a, grad_a), _join_slots(f, grad_f), rows)

        for layer in sorted({layer for updates in by_adapter for layer in updates}):
            of_layer = {number: updates[layer] for number, updates in enumerate(by_adapter) if layer in updates}
            found[layer] = {
                name: joined({number: update[name] for number, update in of_layer.items() if name in update})
                for name in dict.fromkeys(name for update in of_layer.values() for name in update)
            }
        return found

    def with_dropout(
        self,
        updates: Mapping[int, LayerUpdate],
        token_index: Tensor,
        segments: AdapterSegments,
        tensor_parallel: TensorParallel,
    ) -> dict[int, LayerUpdate]:
        """Return the updates with dropout for adapters that use it. For `token_index`, (b, s), see `MicroBatch`."""
        names = [segment.adapter for segment in segments] or list(self.adapters)
        dropped = {
            number: self.dropout[name].of_linears(self.adapters[name].part, token_index, tensor_parallel)
            for number, name in enumerate(names)
            if name in self.dropout
        }

        def with_own(linear: LinearUpdate, layer: int, target: str) -> LinearUpdate:
            if not isinstance(linear.rows, SharedRows):  # a micro-batch of one adapter
                return linear._replace(rows=AllRows(dropped[0](layer, target))) if dropped else linear
            own = {number: of(layer, target) for number, of in dropped.items() if number in linear.rows.ranks}
            return linear._replace(rows=replace(linear.rows, dropouts=own))

        return {
            layer: {name: with_own(linear, layer, name) for name, linear in update.items()}
            for layer, update in updates.items()
        }


def _join_slots(factors: Sequence[Tensor], slots: Sequence[Tensor | None]) -> Tensor | None:
    """Return one gradient slot for several factors, some of which may be frozen, or None if all are frozen."""
    trained = [slot is not None for slot in slots]
    if not any(trained):
        return None
    shapes = [factor.shape for factor in factors]
    sizes = [shape.numel() for shape in shapes]

    def join(*slots: Tensor | None) -> Tensor:
        like = next(slot for slot in slots if slot is not None)
        return like.new_empty(1).expand(sum(sizes))

    def split(gradient: Tensor) -> tuple[Tensor | None, ...]:
        parts = zip(gradient.split(sizes), shapes, trained, strict=True)
        return tuple(part.view(shape) if needed else None for part, shape, needed in parts)

    return with_adjoint(join, split, *slots)
