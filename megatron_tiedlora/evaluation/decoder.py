"""A model that continues token sequences: this rank's stage, its key-value caches, and what travels between stages.

A batch is cut into as many parts as there are stages. While one stage works on a part its neighbours work on others:
hidden states go from stage to stage, and the last stage tells the others of its pipeline which tokens it chose.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.model.attention import KeyValueCache, cache_dtype
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.parallel.groups import ParallelGroups


class Decoder:
    """Calls of one stage with caches; alike on every rank of a tensor-parallel group and of a pipeline.

    The adapter is read and folded once, when the decoder is made: make a new one when its values have changed. Until
    then F is a copy, but A may be the parameter's own memory (in fp32, where nothing is cast or gathered), so after an
    optimizer step the two would not belong together.
    """

    def __init__(
        self, stage: Stage, groups: ParallelGroups, shape: ModelShape, *, calls_together: bool = False
    ) -> None:
        """Take a stage in evaluation mode.

        Args:
            calls_together: whether all ranks must call the model equally often (ZeRO-3, which gathers weights in it).
        """
        self.stage = stage
        self.pipeline, self.choices = groups.pipeline, groups.choices
        self.shape = shape
        self.calls_together = calls_together
        weight = next(stage.layers.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        with torch.no_grad():
            self._updates = stage.read_adapter()
        self._in_flight: deque[tuple[Any, torch.Tensor]] = deque()

    @property
    def num_parts(self) -> int:
        """How many parts of a batch are under way at one time."""
        return self.pipeline.size

    @property
    def is_last(self) -> bool:
        """Whether this rank's stage has the head."""
        return self.pipeline.rank == self.pipeline.size - 1

    def new_caches(self, batch: int, capacity: int) -> list[KeyValueCache]:
        """Empty caches for the blocks of the stage, `capacity` tokens a sequence."""
        like = torch.empty(0, dtype=cache_dtype(self.dtype, self.device), device=self.device)
        local_kv_heads = self.shape.heads.num_kv // self.stage.tensor_parallel.group.size
        return [
            KeyValueCache.empty(batch, local_kv_heads, capacity, self.shape.heads.dim, like) for _ in self.stage.blocks
        ]

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        caches: Sequence[KeyValueCache],
        *,
        wanted: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """One call of the stage on a part of the batch: logits, or with labels each position's loss, (b, s).

        The last stage has the answer; the others pass hidden states on and return None. Arguments as in
        `Stage.predict`, tokens on every stage (which read their shape).
        """
        inputs = tokens
        if self.pipeline.rank > 0:
            inputs = torch.empty(*tokens.shape, self.shape.hidden_size, dtype=self.dtype, device=self.device)
            distributed.recv(inputs, group=self.pipeline.handle, group_src=self.pipeline.rank - 1)
        output = self.stage.predict(
            inputs, positions, labels, caches=caches, updates=self._updates, wanted=wanted
        )
        if self.is_last:
            return output
        work = distributed.isend(output, group=self.pipeline.handle, group_dst=self.pipeline.rank + 1)
        self._keep(work, output)
        return None

    def share(self, chosen: torch.Tensor | None, batch: int) -> Chosen:
        """Send the last stage's choice, (batch,) int64, to every stage of the pipeline; None on the others.

        Shares must be waited for in the order in which they were made.
        """
        if self.pipeline.size > 1 and chosen is not None:
            self._keep(distributed.broadcast(chosen, **self._from_last(), async_op=True), chosen)
        return Chosen(self, chosen, batch)

    def _from_last(self) -> dict[str, Any]:
        return {"group": self.choices.handle, "group_src": self.choices.size - 1}

    def _receive_choice(self, batch: int) -> torch.Tensor:
        chosen = torch.empty(batch, dtype=torch.int64, device=self.device)
        distributed.broadcast(chosen, **self._from_last())
        return chosen

    def _keep(self, work: Any, tensor: torch.Tensor) -> None:
        """Hold what is being sent; an entry two rounds old has long been taken, or nothing could have followed it."""
        self._in_flight.append((work, tensor))
        while len(self._in_flight) > 2 * self.num_parts:
            self._in_flight.popleft()[0].wait()

    def finish(self) -> None:
        """Wait until everything that was sent has been taken."""
        while self._in_flight:
            self._in_flight.popleft()[0].wait()


@dataclass
class Chosen:
    """The next tokens of a part of the batch, as they come from the last stage."""

    decoder: Decoder
    tokens: torch.Tensor | None
    batch: int

    def wait(self) -> torch.Tensor:
        """(batch,) int64, on every stage."""
        if self.tokens is None:
            self.tokens = self.decoder._receive_choice(self.batch)
        return self.tokens
