"""Counts messages and bytes by group as they enter torch.distributed: our own, DeepSpeed's, and point to point.

    with TrafficCounter(named_handles(groups)) as counter:
        ...
    counter.traffic

Collectives are dispatcher operations of the `c10d` namespace, so a dispatch mode sees all of them, also in the backward
pass. Counting takes time, so it is for tests and benchmarks. Calls in a group of one rank do not count as messages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import distributed
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_tiedlora.parallel.groups import ParallelGroups

TENSOR, PIPELINE, DATA, TIED, STAGE, MODEL, WORLD = GROUPS = (
    "tensor",
    "pipeline",
    "data",
    "tied",
    "stage",
    "model",
    "world",
)
# c10d operation -> (kind, index of the argument whose bytes are the whole message)
_KINDS = {
    "allreduce_": ("all-reduce", 0),
    "_allgather_base_": ("all-gather", 0),
    "allgather_": ("all-gather", 0),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "reduce_scatter_": ("reduce-scatter", 1),
    "broadcast_": ("broadcast", 0),
    "reduce_": ("reduce", 0),
    "send": ("send", 0),
    "barrier": ("barrier", 0),
}
_IGNORED = {"recv_", "recv_any_source_", "monitored_barrier_"}  # a message is counted by its sender


@dataclass
class Traffic:
    """Messages and bytes by (group, kind). Bytes are of the whole tensor: a gather's output, a reduction's input.

    Over a ring of n ranks, each rank sends B (n - 1) / n bytes for an all-gather or reduce-scatter of B bytes, and
    twice that for an all-reduce.
    """

    messages: Counter[tuple[str, str]] = field(default_factory=Counter)
    bytes: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, group: str, kind: str, size: int, *, count: int = 1) -> None:
        """Count `count` messages of `size` bytes each."""
        if count:
            self.messages[group, kind] += count
            self.bytes[group, kind] += count * size

    def include(self, other: Traffic, *, times: int = 1) -> None:
        """Count the messages of another, `times` times."""
        for key, count in other.messages.items():
            self.messages[key] += times * count
            self.bytes[key] += times * other.bytes[key]

    def of_group(self, group: str) -> tuple[int, int]:
        """(messages, bytes) of a group, summed over all kinds."""
        return (
            sum(count for (name, _), count in self.messages.items() if name == group),
            sum(size for (name, _), size in self.bytes.items() if name == group),
        )


def named_handles(groups: ParallelGroups) -> dict[str, ProcessGroup | None]:
    """The handles of a rank's groups by name; groups of the same ranks appear once.

    With one stage, `tied` is the data-parallel group and `stage` the world. Without data parallelism `stage` is the
    tensor group, without tensor parallelism the data-parallel group.
    """
    handles = {name: getattr(groups, name).handle for name in (TENSOR, PIPELINE, DATA, MODEL)}
    for name, handle in ((TIED, groups.tied.handle), (STAGE, groups.stage.handle)):
        if handle is not distributed.group.WORLD and handle not in (groups.tensor.handle, groups.data.handle):
            handles[name] = handle
    return handles


class TrafficCounter(TorchDispatchMode):
    """Counts what this rank sends inside the `with` block."""

    def __init__(self, groups: Mapping[str, ProcessGroup | None]) -> None:
        """`groups`: names of groups, by their handles; messages of any other group are counted as `world`."""
        super().__init__()
        self.traffic = Traffic()
        self._names = {handle.group_name: name for name, handle in groups.items() if handle is not None}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count a collective, and run every operation."""
        if func.namespace == "c10d":
            self._count(func.overloadpacket.__name__, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        if name in _IGNORED:
            return
        assert name in _KINDS, f"c10d.{name} is not counted yet"
        kind, position = _KINDS[name]
        group = next(
            ProcessGroup.unbox(argument)
            for argument in args
            if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in argument._type().qualified_name()
        )
        if group.size() == 1:  # DeepSpeed sums over groups of one rank too
            return
        label = self._names.get(group.group_name, WORLD) if kind != "send" else PIPELINE
        self.traffic.add(label, kind, _num_bytes(args[position]))


def _num_bytes(argument: Any) -> int:
    if isinstance(argument, torch.Tensor):
        return argument.numel() * argument.element_size()
    return sum(_num_bytes(item) for item in argument)
