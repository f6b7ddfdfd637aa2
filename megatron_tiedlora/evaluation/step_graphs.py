"""Replays the steps of decoding as CUDA graphs. One launch per step replaces about 46 launches per layer, which take
Python longer than reading the weights takes a GPU.

A graph runs the same kernels at the same addresses. So it has its own tensors for tokens and positions, batches reuse
caches, and the number of keys that attention reads changes only once per `KEYS_READ_TOGETHER` tokens.
"""

import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import suppress
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from megatron_tiedlora.base.messages import first_line
from megatron_tiedlora.parallel.groups import ParallelGroups

_LOGGER = logging.getLogger(__name__)

# Attention on a GPU reads a multiple of this number of keys. Fewer would need more graphs; more would read more padding
# (128: at most 1 GB per token for 16 sequences of a 7B model, whose weights are 13 GB).
KEYS_READ_TOGETHER = 128
MOST_GRAPHS = 16  # of a decoder, or 2 per stage; each takes about 10 MB of the driver's memory for 32 layers
DecodeStep = Callable[..., Tensor]


class CapturedStep(NamedTuple):
    """A graph, the tensors that it reads and writes, and the step, which keeps caches and weights in memory."""

    graph: Any
    inputs: tuple[Tensor, ...]
    output: Tensor
    step: DecodeStep


class StepGraphs:
    """The CUDA graphs of a decoder. They share one memory pool, as they are never replayed at the same time.

    A step runs uncaptured until `capture` is called for its key. The first run loads its kernels.
    """

    def __init__(self, device: torch.device, *, most: int = MOST_GRAPHS) -> None:
        self._device, self._most = device, most
        self._seen: OrderedDict[Hashable, CapturedStep | None] = OrderedDict()  # the most recently used is the last

    def __bool__(self) -> bool:
        """Return whether there are graphs to replay."""
        return any(self._seen.values())

    @property
    def lacks_some(self) -> bool:
        """Return whether a step was run that is not captured."""
        return None in self._seen.values()

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self._device)

    def run(self, key: Hashable, step: DecodeStep, *inputs: Tensor) -> Tensor:
        """Return `step(*inputs)`, a new tensor.

        Args:
            key: differs for steps that differ in more than the values of `inputs`.
            step: a function whose kernels depend on `key` alone, and that neither waits for the GPU nor copies from the
                host. Its other tensors keep their addresses.
        """
        found = self._seen.pop(key, None)
        self._seen[key] = found
        if len(self._seen) > self._most:
            self._seen.popitem(last=False)
        if found is None:
            return self._warm_up(step, inputs)
        for mine, given in zip(found.inputs, inputs, strict=True):
            mine.copy_(given)
        found.graph.replay()
        return found.output.clone()  # the next replay overwrites the output, which may still be sent

    def capture(self, key: Hashable, step: DecodeStep, *inputs: Tensor) -> bool:
        """Capture a step that was run and is not captured. `run` then replays it. The values of `inputs` are not used.

        No message may be in flight: PyTorch first waits for all work of the GPU. If the capture fails, log the reason,
        free all graphs, and return False. Then no other step should be captured.
        """
        if self._seen.get(key, True) is None:
            try:
                self._seen[key] = self._capture(step, tuple(given.clone() for given in inputs))
            except Exception as error:  # whatever it is, the same step may run uncaptured
                _tell(f"a step cannot be captured ({first_line(error.__context__ or error)})")
                self.clear()
                return False
        return True

    def clear(self) -> None:
        """Free all graphs and their memory."""
        self._seen.clear()

    def _warm_up(self, step: DecodeStep, inputs: tuple[Tensor, ...]) -> Tensor:
        """Run a step uncaptured on the stream of captures, so that libraries load kernels and prepare workspaces."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            output = step(*inputs)
        current.wait_stream(self._stream)
        return output

    def _capture(self, step: DecodeStep, inputs: tuple[Tensor, ...]) -> CapturedStep:
        graph = torch.cuda.CUDAGraph()
        pool = next((found.graph.pool() for found in self._seen.values() if found is not None), None)
        pool = pool or torch.cuda.graph_pool_handle()
        # Other threads may call CUDA meanwhile. The outer context leaves the stream, which a failed capture does not.
        capture = torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local")
        try:
            with torch.cuda.stream(self._stream), capture:
                output = step(*inputs)
        except BaseException:
            # PyTorch (pull request 180395) would keep the pool in use, and never free memory again to make room.
            with suppress(AttributeError, RuntimeError):  # it is not in use
                torch._C._cuda_endAllocateToPool(self._stream.device_index, pool)
                torch._C._cuda_releasePool(self._stream.device_index, pool)
            raise
        return CapturedStep(graph, inputs, output, step)


def find_step_graphs(device: torch.device, groups: ParallelGroups, *, calls_together: bool) -> StepGraphs | None:
    """Return an object that replays steps on a GPU, or None where this is not possible, and log why. With
    `calls_together`, each call gathers weights."""
    if device.type != "cuda":
        return None
    tensor, reason = groups.tensor, ""
    if calls_together:
        reason = "ZeRO-3 gathers the weights in every step"
    elif tensor.size > 1 and "nccl" not in (backend := distributed.get_backend(tensor.handle)):
        reason = f"tensor-parallel messages go over {backend}, and only those of NCCL can be captured"
    elif tensor.size > 1 and os.environ.get("NCCL_GRAPH_REGISTER") != "0":
        reason = "NCCL_GRAPH_REGISTER is not 0, so NCCL may access memory illegally; export NCCL_GRAPH_REGISTER=0"
    if not reason:
        return StepGraphs(device, most=max(MOST_GRAPHS, 2 * groups.pipeline.size))
    if tensor.rank == groups.pipeline.rank == groups.data.rank == 0:
        _tell(reason)
    return None


@cache
def _tell(reason: str) -> None:
    _LOGGER.info("generating without CUDA graphs, which is several times slower for few sequences: %s", reason)
