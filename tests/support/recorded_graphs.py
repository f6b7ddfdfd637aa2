"""CUDA graphs on a CPU: what a step computes is recorded, operation by operation, and replayed on the same tensors.

As on a GPU, a capture waits for this rank's messages and computes nothing that lasts, a replay knows nothing of Python,
and what waits for the device, or copies a number from the host, ends the capture with an error.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch.distributed import Work
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from megatron_tiedlora.evaluation.decoder import Decoder
from megatron_tiedlora.evaluation.step_graphs import MOST_GRAPHS, CapturedStep, DecodeStep, StepGraphs

_WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::lift_fresh", "aten::is_nonzero")


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class RecordedGraph(TorchDispatchMode):
    """The operations of a block, with the tensors that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Callable[..., Any], Any, Any, list[torch.Tensor], list[torch.Tensor]]] = []
        self._made: set[int] = set()  # memory of tensors that are made while recording
        self._before: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.num_replays = 0

    def __torch_dispatch__(self, function: Any, _types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        keywords = keywords or {}
        if function._schema.name in _WAITS:
            raise RuntimeError(f"{function._schema.name}: not permitted while a stream is captured")
        given = _tensors((arguments, keywords))
        described = zip(function._schema.arguments, arguments, strict=False)
        written = [value for one, value in described if one.alias_info is not None and one.alias_info.is_write]
        self._before += [(one, one.clone()) for one in _tensors(written) if _memory(one) not in self._made]
        found = function(*arguments, **keywords)
        held = {_memory(one) for one in given}
        new = [one for one in _tensors(found) if _memory(one) not in held]
        self._made |= {_memory(one) for one in new}
        self.operations.append((function, arguments, keywords, _tensors(found), new))
        return found

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for tensor, value in reversed(self._before):
            tensor.copy_(value)
        for *_, new in self.operations:
            for tensor in new:
                tensor.fill_(float("nan") if tensor.is_floating_point() else 1)

    def replay(self) -> None:
        """Compute everything again, into the same tensors."""
        self.num_replays += 1
        for function, arguments, keywords, found, new in self.operations:
            result = function(*arguments, **keywords)
            for message in tree_flatten(result)[0]:
                if isinstance(message, torch.ScriptObject):
                    Work.unbox(message).wait()  # as a stream does that a graph's messages are on
            again = _tensors(result)
            for mine, fresh in zip(found, again, strict=True):
                if any(mine is one for one in new):
                    mine.copy_(fresh)


class RecordedSteps(StepGraphs):
    """The graphs of a decoder on a CPU. `captured` has all that were ever made."""

    def __init__(self, messages: Collection[Any] = (), *, most: int = MOST_GRAPHS) -> None:
        super().__init__(torch.device("cpu"), most=most)
        self.captured: list[CapturedStep] = []
        self._messages = messages  # those of this rank that are in flight

    @property
    def num_kept(self) -> int:
        """Steps that are known: captured, or seen once."""
        return len(self._seen)

    @property
    def num_replays(self) -> int:
        """Of all graphs."""
        return sum(found.graph.num_replays for found in self.captured)

    def _warm_up(self, step: DecodeStep, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return step(*inputs)

    def _capture(self, step: DecodeStep, inputs: tuple[torch.Tensor, ...]) -> CapturedStep:
        assert not self._messages, "stages that capture at the same time would wait for each other"
        graph = RecordedGraph()
        with graph:
            output = step(*inputs)
        self.captured.append(CapturedStep(graph, inputs, output, step))
        return self.captured[-1]


def recorded(decoder: Decoder, *, granularity: int, most: int = MOST_GRAPHS) -> RecordedSteps:
    """Let a decoder replay its steps, and read a multiple of so many keys."""
    decoder.graphs, decoder.granularity = RecordedSteps(decoder._in_flight, most=most), granularity
    return decoder.graphs
