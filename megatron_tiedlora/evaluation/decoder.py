"""A model that continues token sequences: this rank's stage, its key-value caches, and messages between stages.

It takes the rows of one adapter, or with a bank those of several in one call. Each adapter's rows have the caches and
the attention of a batch of their own; the base's matmuls are over the rows of all.

A batch is divided into as many parts as there are stages, so that the stages work on different parts at the same time.
Hidden states go from stage to stage. The last stage sends the tokens it chose to the other stages of its pipeline.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import distributed

from megatron_tiedlora.adapters.adapter_bank import Share, Shares, pieces_of
from megatron_tiedlora.adapters.tied_adapter import LayerUpdate
from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.model.attention import AnyCache, KeyValueCache, cache_dtype
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.parallel.groups import ParallelGroups, concatenated


class AdapterRows(NamedTuple):
    """What one adapter's sequences bring to a call: tokens and their positions, (b, s) int64, and one cache per block.

    Attributes:
        adapter: its name in the stage's bank; "" if the stage has one adapter at most.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    caches: Sequence[KeyValueCache]
    adapter: str = ""


class Decoder:
    """Calls one stage with caches. All ranks of a tensor-parallel group and of a pipeline make the same calls.

    The adapters of a call are read and folded once, when they change. Build a new decoder after an optimizer step: F is
    a copy, but A may share the parameter's memory (in fp32, where nothing is cast or gathered), so the two would no
    longer match.
    """

    def __init__(
        self, stage: Stage, groups: ParallelGroups, shape: ModelShape, *, calls_together: bool = False
    ) -> None:
        """The stage must be in evaluation mode.

        Args:
            calls_together: whether all ranks must call the model equally often, as ZeRO-3 gathers weights in each call.
        """
        self.stage = stage
        self.pipeline, self.choices = groups.pipeline, groups.choices
        self.shape = shape
        self.calls_together = calls_together
        weight = next(stage.layers.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self._updates: dict[int, LayerUpdate] = {}
        self._read: tuple[str, ...] = ()  # whose updates these are
        self._in_flight: deque[tuple[Any, torch.Tensor]] = deque()

    @property
    def num_parts(self) -> int:
        """How many parts of a batch are in flight at the same time."""
        return self.pipeline.size

    @property
    def is_last(self) -> bool:
        """Whether this rank's stage has the head."""
        return self.pipeline.rank == self.pipeline.size - 1

    def new_caches(self, batch: int, capacity: int) -> list[KeyValueCache]:
        """Empty caches for the blocks of the stage, with `capacity` tokens per sequence."""
        like = torch.empty(0, dtype=cache_dtype(self.dtype, self.device), device=self.device)
        local_kv_heads = self.shape.heads.num_kv // self.stage.tensor_parallel.group.size
        return [
            KeyValueCache.empty(batch, local_kv_heads, capacity, self.shape.heads.dim, like) for _ in self.stage.blocks
        ]

    @torch.no_grad()
    def forward(
        self,
        rows: Sequence[AdapterRows],
        *,
        wanted: Sequence[torch.Tensor] | None = None,
        labels: Sequence[torch.Tensor] | None = None,
    ) -> torch.Tensor | None:
        """Call the stage on a part of the batch: some sequences of each of several adapters, or of one.

        Only the last stage returns something; the others send hidden states to the next stage and return None. Every
        stage gets tokens, for their shape.

        Args:
            rows: of each adapter, by its name in the stage's bank.
            wanted: for each of `rows` the position, (b,) int64, of each sequence whose logits are wanted.
            labels: for each of `rows` those of its tokens, (b, s) int64.

        Returns:
            for the rows of one adapter after the other: logits, (tokens, V) or with `wanted` (sequences, V); with
            `labels` the loss of each token, (tokens,).
        """
        shares = tuple(Share(some.adapter, *some.tokens.shape) for some in rows)
        tokens, positions, caches, _ = rows[0]
        all_caches = list[AnyCache](caches)
        picked, of_tokens = (None if given is None else given[0] for given in (wanted, labels))
        if len(rows) > 1:
            tokens = concatenated([some.tokens for some in rows])[None]
            positions = concatenated([some.positions for some in rows])[None]
            all_caches = list(zip(*(some.caches for some in rows), strict=True))
            of_tokens = None if labels is None else concatenated(labels)[None]
            picked = None if wanted is None else torch.cat(list(_among_all(shares, wanted)))
        inputs = tokens
        if self.pipeline.rank > 0:
            inputs = torch.empty(*tokens.shape, self.shape.hidden_size, dtype=self.dtype, device=self.device)
            distributed.recv(inputs, group=self.pipeline.handle, group_src=self.pipeline.rank - 1)
        updates = self._updates_of(shares)
        output = self.stage.predict(
            inputs, positions, of_tokens, shares=shares, caches=all_caches, updates=updates, wanted=picked
        )
        if self.is_last:
            return output.flatten(0, 1)
        work = distributed.isend(output, group=self.pipeline.handle, group_dst=self.pipeline.rank + 1)
        self._keep(work, output)
        return None

    def _updates_of(self, shares: Shares) -> Mapping[int, LayerUpdate]:
        names = tuple(share.adapter for share in shares)
        if names != self._read:
            self._read, self._updates = names, self.stage.read_adapter(shares)
        pieces, none = pieces_of(shares), torch.empty(0)
        return {
            layer: {
                name: linear._replace(rows=linear.rows.at(none, none, pieces, pieces))
                for name, linear in update.items()
            }
            for layer, update in self._updates.items()
        }

    def share(self, chosen: torch.Tensor | None, batch: int) -> Callable[[], torch.Tensor]:
        """Send the last stage's tokens, (batch,) int64, to every stage; `chosen` is None on the other stages.

        Returns:
            a function that waits for the tokens. These functions must be called in the order in which they were made.
        """
        from_last: dict[str, Any] = {"group": self.choices.handle, "group_src": self.choices.size - 1}

        def receive() -> torch.Tensor:
            tokens = torch.empty(batch, dtype=torch.int64, device=self.device)
            distributed.broadcast(tokens, **from_last)
            return tokens

        if chosen is None:
            return receive
        if self.pipeline.size > 1:
            self._keep(distributed.broadcast(chosen, **from_last, async_op=True), chosen)
        return lambda: chosen

    def _keep(self, work: Any, tensor: torch.Tensor) -> None:
        """Hold a tensor while it is sent. An entry two rounds old was received, or nothing could have followed it."""
        self._in_flight.append((work, tensor))
        while len(self._in_flight) > 2 * self.num_parts:
            self._in_flight.popleft()[0].wait()

    def finish(self) -> None:
        """Wait until everything that was sent has been received."""
        while self._in_flight:
            self._in_flight.popleft()[0].wait()


def _among_all(shares: Shares, wanted: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Positions of each share's sequences, as indices into the tokens of all shares."""
    start = 0
    for share, positions in zip(shares, wanted, strict=True):
        first = start + torch.arange(share.num_rows, device=positions.device) * share.length
        yield first + positions
        start += share.num_tokens
