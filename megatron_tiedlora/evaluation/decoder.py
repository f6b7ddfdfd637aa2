"""Calls the pipeline stage of this rank with key-value caches, for rows of one or several adapters.

A call may have rows of several adapters. Each adapter's rows have their own caches and attention calls, but the base's
matmuls run over the rows of all adapters. Hidden states go from stage to stage. On a GPU, the steps after the prompts
are replayed as CUDA graphs where possible (`step_graphs`).
"""

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import distributed

from megatron_tiedlora.adapters.adapter_groups import ONLY, AdapterSegment, AdapterSegments, spans_of
from megatron_tiedlora.adapters.low_rank import SomeTokens
from megatron_tiedlora.adapters.tied_adapter import LayerUpdate, update_at
from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.evaluation.step_graphs import KEYS_READ_TOGETHER, DecodeStep, find_step_graphs
from megatron_tiedlora.model.attention import AnyCache, KeyValueCache, cache_dtype
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.parallel.groups import ParallelGroups, concatenated

RowTensors = Sequence[torch.Tensor]


class AdapterRows(NamedTuple):
    """The input of a call for one adapter: tokens and positions, (b, s) int64, and one cache per block. `adapter` is
    the name of the adapter, or ONLY if the stage has at most one."""

    tokens: torch.Tensor
    positions: torch.Tensor
    caches: Sequence[KeyValueCache]
    adapter: str = ONLY


class Decoder:
    """Calls one stage with caches. All tensor-parallel and pipeline-parallel ranks of a model copy make the same calls.

    The factors A and F of adapters are computed again only when a call uses different adapters. Build a new decoder
    after an optimizer step, or its factors would be outdated. F is a copy, but A may share the parameter's memory
    (in fp32, where nothing is cast or gathered).
    """

    def __init__(
        self, stage: Stage, groups: ParallelGroups, shape: ModelShape, *, calls_together: bool = False
    ) -> None:
        """Prepare to call a stage in evaluation mode. With `calls_together`, all ranks must make the same number of
        calls, because ZeRO-3 gathers weights in each call."""
        self.stage, self.pipeline, self.choices = stage, groups.pipeline, groups.choices
        self.shape, self.calls_together = shape, calls_together
        weight = next(stage.layers.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.granularity = 1 if self.device.type == "cpu" else KEYS_READ_TOGETHER
        found = find_step_graphs(self.device, groups, calls_together=calls_together)
        self.graphs = found if stage.can_be_captured else None
        self.idle: list[list[KeyValueCache]] = []  # caches of finished batches, for the next batch
        self._updates: dict[int, LayerUpdate] = {}
        self._read: tuple[str, ...] = ()  # the adapters that these updates belong to
        self._in_flight: deque[tuple[Any, torch.Tensor]] = deque()

    @property
    def is_last(self) -> bool:
        """Return whether this rank's stage has the language-model head."""
        return self.pipeline.rank == self.pipeline.size - 1

    @property
    def bytes_per_token(self) -> int:
        """Return the bytes of a token in the caches of a stage, the same on every rank."""
        heads, dtype = self.shape.heads, cache_dtype(self.dtype, self.device)
        width = 2 * heads.num_kv // self.stage.tensor_parallel.group.size * heads.dim * dtype.itemsize
        return width * -(-self.shape.num_layers // self.pipeline.size)

    def new_caches(self, batch: int, capacity: int) -> list[KeyValueCache]:
        """Return empty caches for the blocks of the stage, each with room for `capacity` tokens per sequence. Idle
        caches are freed first, and all graphs."""
        self.close()
        like = torch.empty(0, dtype=cache_dtype(self.dtype, self.device), device=self.device)
        heads = self.shape.heads
        shape = batch, heads.num_kv // self.stage.tensor_parallel.group.size, capacity, heads.dim
        return [KeyValueCache.empty(*shape, like, self.granularity) for _ in self.stage.blocks]

    def take_caches(self, batch: int, capacity: int) -> list[KeyValueCache]:
        """Return caches as `new_caches` does, or `idle` ones that are large enough, whose graphs can be replayed."""
        for index, caches in enumerate(self.idle):
            if len(caches[0].keys) == batch and caches[0].keys.shape[2] >= capacity:
                for cache in caches:
                    cache.clear()
                return self.idle.pop(index)
        return self.new_caches(batch, capacity)

    def close(self) -> None:
        """Free all graphs and idle caches. NCCL does not end a communicator that a graph uses."""
        self.idle.clear()
        if self.graphs is not None:
            self.graphs.clear()

    @torch.no_grad()
    def forward(
        self,
        rows: Sequence[AdapterRows],
        *,
        wanted: RowTensors | None = None,
        labels: RowTensors | None = None,
        num_top: int | None = None,
        report: Callable[[torch.Tensor], None] | None = None,
    ) -> torch.Tensor | None:
        """Call the stage on some sequences of the batch, for one or several adapters.

        The last stage returns the result. The other stages send hidden states to the next stage and return None. Every
        stage gets the tokens, because it needs their shape.

        Args:
            rows: the input of each adapter.
            wanted: for each adapter, the position in each sequence whose logits are returned, (b,) int64.
            labels: for each adapter, the labels of its tokens, (b, s) int64.
            report: a function that gets the log-probabilities of the labels on the last stage, as in `Stage.predict`,
                instead of losses.

        Returns:
            for the rows of all adapters in order: logits, (tokens, V), or (sequences, V) with `wanted`. With `labels`
                and without `report`, the loss of each token, (tokens,).
        """
        call = _, predict, inputs, positions = self._call(rows, wanted, labels, num_top=num_top, report=report)
        if self.pipeline.rank > 0:
            distributed.recv(inputs, group=self.pipeline.handle, group_src=self.pipeline.rank - 1)
        if self.graphs is not None and rows[0].caches[0].filled and wanted is None and labels is None:
            output = self.graphs.run(*call)
        else:
            output = predict(inputs, positions)
        for some in rows:
            for cache in some.caches:
                cache.filled += some.tokens.shape[1]
        if self.is_last:
            return output.flatten(0, 1)
        work = distributed.isend(output, group=self.pipeline.handle, group_dst=self.pipeline.rank + 1)
        self._keep(work, output)
        return None

    @torch.no_grad()
    def capture(self, rows: Sequence[AdapterRows]) -> None:
        """Capture the step of these rows; see `StepGraphs.capture`."""
        if self.graphs is not None and not self.graphs.capture(*self._call(rows)):
            self.graphs, self.stage.can_be_captured = None, False

    def _call(
        self,
        rows: Sequence[AdapterRows],
        wanted: RowTensors | None = None,
        labels: RowTensors | None = None,
        **options: Any,
    ) -> tuple[Hashable, DecodeStep, torch.Tensor, torch.Tensor]:
        """Return what the kernels of a call depend on, its function, input (empty on later stages) and positions."""
        segments = tuple(AdapterSegment(some.adapter, *some.tokens.shape) for some in rows)
        tokens, positions, caches, _ = rows[0]
        all_caches = list[AnyCache](caches)
        of_tokens = None if labels is None else labels[0]
        if len(rows) > 1:
            tokens = concatenated([some.tokens for some in rows])[None]
            positions = concatenated([some.positions for some in rows])[None]
            all_caches = list(zip(*(some.caches for some in rows), strict=True))
            of_tokens = None if labels is None else concatenated(labels)[None]
        picked = None if wanted is None else torch.cat(list(_among_all(segments, wanted)))
        inputs = tokens
        if self.pipeline.rank > 0:
            inputs = torch.empty(*tokens.shape, self.shape.hidden_size, dtype=self.dtype, device=self.device)
        options |= {"labels": of_tokens, "segments": segments, "caches": all_caches, "wanted": picked}
        predict = partial(self.stage.predict, **options, updates=self._updates_of(segments))
        read = [(own[0].keys.data_ptr(), own[0].num_read(new.shape[1])) for new, _, own, _ in rows]
        return (segments, *read), predict, inputs, positions

    def _updates_of(self, segments: AdapterSegments) -> Mapping[int, LayerUpdate]:
        names = tuple(segment.adapter for segment in segments)
        if names != self._read:
            self._read, self._updates = names, self.stage.read_adapter(segments)
        spans, none = spans_of(segments), torch.empty(0)
        some = SomeTokens(none, none, spans, spans)
        return {layer: update_at(update, some) for layer, update in self._updates.items()}

    def share(self, chosen: torch.Tensor | None, shape: Sequence[int], dtype: Any) -> Callable[[], torch.Tensor]:
        """Send a tensor of the last stage, such as its generated tokens, to every stage; `chosen` is None on other
        stages. Return a function that waits for the tensor. Call these functions in the order of the `share` calls."""
        from_last: dict[str, Any] = {"group": self.choices.handle, "group_src": self.choices.size - 1}

        def receive() -> torch.Tensor:
            received = torch.empty(*shape, dtype=dtype, device=self.device)
            distributed.broadcast(received, **from_last)
            return received

        if chosen is None:
            return receive
        if self.pipeline.size > 1:
            self._keep(distributed.broadcast(chosen, **from_last, async_op=True), chosen)
        return lambda: chosen

    def _keep(self, work: Any, tensor: torch.Tensor) -> None:
        """Keep a tensor in memory while it is sent. If more than two per stage are kept, wait for the oldest."""
        self._in_flight.append((work, tensor))
        while len(self._in_flight) > 2 * self.pipeline.size:
            self._in_flight.popleft()[0].wait()

    def finish(self) -> None:
        """Wait until every message has been received."""
        while self._in_flight:
            self._in_flight.popleft()[0].wait()


def _among_all(segments: AdapterSegments, wanted: RowTensors) -> Iterator[torch.Tensor]:
    """Yield each adapter's `wanted` positions, (b,) int64, as indices into the concatenated tokens of all adapters."""
    start = 0
    for segment, positions in zip(segments, wanted, strict=True):
        yield start + torch.arange(segment.num_rows, device=positions.device) * segment.length + positions
        start += segment.num_tokens
