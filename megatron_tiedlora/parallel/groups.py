"""Define groups of ranks, the collectives of tensor parallelism, and counters of the messages that ranks send.

Groups are created elsewhere and passed as arguments. They are never read from globals. Entering a tensor-parallel
region is the identity, and leaving it is an all-reduce. Their backward passes are an all-reduce and the identity. With
sequence parallelism, entering is an all-gather and leaving is a reduce-scatter. Their backward passes are a
reduce-scatter and an all-gather. The gradient of a gathered tensor is a partial sum on each rank, so it is
reduce-scattered, not merely sliced. No function changes its input. In a group of one rank nothing is sent.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_tiedlora.base.messages import UserError, count_text

SUM = distributed.ReduceOp.SUM
ReduceOp = distributed.ReduceOp.RedOpType
Sending = distributed.Work | None  # of a collective that was started; None if it is complete

Key = TypeVar("Key")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Grid:
    """The grid of pipeline, data and tensor-parallel ranks. The ranks of a tensor-parallel group are adjacent.

    rank = (pp_rank * dp_size + dp_rank) * tp_size + tp_rank
    """

    rank: int
    world_size: int
    tp_size: int = 1
    pp_size: int = 1

    def __post_init__(self) -> None:
        unit = self.tp_size * self.pp_size
        if self.world_size % unit:
            below = self.world_size // unit * unit
            raise UserError(
                f"{count_text(self.world_size, 'rank')} {'is' if self.world_size == 1 else 'are'} not a multiple of"
                f" --tensor_parallel {self.tp_size} x --pipeline_parallel {self.pp_size}."
                f" Start {f'{below} or ' if below else ''}{below + unit} ranks, or change these flags"
            )

    @property
    def dp_size(self) -> int:
        """Return the data-parallel size, which is world size / (tensor x pipeline)."""
        return self.world_size // (self.tp_size * self.pp_size)

    @property
    def tp_rank(self) -> int:
        """Return this rank's index in its tensor-parallel group, whose ranks hold shards of the same layers."""
        return self.rank % self.tp_size

    @property
    def dp_rank(self) -> int:
        """Return this rank's index in its data-parallel group, whose ranks get different samples."""
        return self.rank // self.tp_size % self.dp_size

    @property
    def pp_rank(self) -> int:
        """Return the index of this rank's pipeline stage."""
        return self.rank // (self.tp_size * self.dp_size)

    def rank_of(self, *, pp_rank: int = 0, dp_rank: int = 0, tp_rank: int = 0) -> int:
        """Return the rank with these coordinates."""
        return (pp_rank * self.dp_size + dp_rank) * self.tp_size + tp_rank

    def at(self, rank: int) -> "Grid":
        """Return the grid as seen from `rank`."""
        return replace(self, rank=rank)

    def groups(self, key: "Callable[[Grid], Key]") -> dict[Key, list[int]]:
        """Return a list of ranks for each value of `key`, which is called with the grid of each rank."""
        members: dict[Key, list[int]] = {}
        for rank in range(self.world_size):
            members.setdefault(key(self.at(rank)), []).append(rank)
        return members


# These functions have new names in torch 2.13, where the old names raise a warning.
_all_gather_into = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
_reduce_scatter_into = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor


@dataclass(frozen=True)
class RankGroup:
    """A group of ranks, and this rank's index in it. A single rank has no process group and sends nothing.

    Its methods are the collectives of tensor parallelism. Code that only counts messages defines its own group class.
    """

    handle: ProcessGroup | None = None
    rank: int = 0
    size: int = 1

    def all_reduce_(self, tensor: Tensor, op: ReduceOp = SUM, *, async_op: bool = False) -> Sending:
        """Reduce a contiguous tensor over the group in place. The reduction `op` is by default the sum.

        With `async_op`, this and the other methods return before the result is complete; `wait` of the returned work
        waits for it.
        """
        return cast(Sending, distributed.all_reduce(tensor, op, self.handle, async_op))

    def all_gather_into(self, gathered: Tensor, tensor: Tensor, *, async_op: bool = False) -> Sending:
        """Write the contiguous tensors of all ranks to `gathered`, concatenated along the first dimension."""
        return cast(Sending, _all_gather_into(gathered, tensor, self.handle, async_op))

    def reduce_scatter_into(self, mine: Tensor, parts: Tensor, *, async_op: bool = False) -> Sending:
        """Sum `parts` over the ranks, and write this rank's slice of the sum along dimension 0 to `mine`."""
        return cast(Sending, _reduce_scatter_into(mine, parts, SUM, self.handle, async_op))


ALONE = RankGroup()


@dataclass(frozen=True)
class TensorParallel:
    """The tensor-parallel group, and whether activations between layers are sharded along the sequence.

    With sequence parallelism, norms and residual sums have shape (1, b s / size, d). The b sequences are concatenated,
    and each rank has an equal, contiguous shard, so that messages need no copy. A layer gathers at its start and
    reduce-scatters at its end. Without sequence parallelism, these tensors have shape (b, s, d) on every rank, and a
    layer all-reduces at its end.

    With `overlap`, layers compute the two halves of a micro-batch alternately, so that the messages of one half are
    sent while the other half is computed.
    """

    group: RankGroup = ALONE
    sequence_parallel: bool = False
    overlap: bool = False

    @property
    def sequence_parts(self) -> int:
        """Return the number of shards of activations between layers along the sequence."""
        return self.group.size if self.sequence_parallel else 1

    def whole_sequences(self) -> "TensorParallel":
        """Return this group without sequence parallelism, for generation, where each step computes one token."""
        return replace(self, sequence_parallel=False, overlap=False)


@dataclass(frozen=True)
class ParallelGroups:
    """All process groups of this rank.

    Attributes:
        tensor: the ranks that hold shards of the same layers.
        pipeline: the ranks with the same samples and the same tensor-parallel index, one per stage.
        choices: a second group of the ranks of `pipeline`, for the generated tokens that the last stage sends to all
            stages. These messages need their own queue, since their order relative to messages between stages differs
            between ranks.
        data: the ranks that hold the same tensors and get different samples.
        tied: pipeline x data, the ranks that hold the same shard of a tied tensor.
        stage: tensor x data, the ranks that hold the same u.
        model: tensor x pipeline, the ranks that together hold one copy of the model.
    """

    tensor: RankGroup = ALONE
    pipeline: RankGroup = ALONE
    choices: RankGroup = ALONE
    data: RankGroup = ALONE
    tied: RankGroup = ALONE
    stage: RankGroup = ALONE
    model: RankGroup = ALONE


# Collectives of tensor parallelism, which autograd can differentiate --------------------------------------------------


SEQUENCE_DIM = 1  # the dimension of the tokens in activations (1, b s, d)


@dataclass
class Pending:
    """The result of a collective, which may not have arrived yet.

    `wait` returns it. On a GPU, the current stream waits and not the host. The result must not be used before.
    """

    tensor: Tensor
    work: Sending = None

    def wait(self) -> Tensor:
        """Return the tensor when it is complete."""
        if self.work is not None:
            self.work.wait()
            self.work = None
        return self.tensor


def all_reduce(tensor: Tensor, group: RankGroup, op: ReduceOp = SUM) -> Tensor:
    """Return `tensor` reduced over the group by `op`, bit-equal on every rank. The input is not modified."""
    return start_all_reduce(tensor, group, op).wait()


def start_all_reduce(tensor: Tensor, group: RankGroup, op: ReduceOp = SUM, *, async_op: bool = False) -> Pending:
    """Start `all_reduce`. Without `async_op`, the result is complete."""
    if group.size == 1:
        return Pending(tensor)
    total = tensor.clone(memory_format=torch.contiguous_format)
    return Pending(total, group.all_reduce_(total, op, async_op=async_op))


def all_gather(tensor: Tensor, group: RankGroup, dim: int) -> Tensor:
    """Return the tensors of all ranks, which have equal shapes, concatenated along `dim` in rank order."""
    if group.size == 1:
        return tensor
    dim %= tensor.ndim
    gathered = start_all_gather(tensor, group).wait()
    return gathered.view(group.size, *tensor.shape).movedim(0, dim).flatten(dim, dim + 1)


def start_all_gather(tensor: Tensor, group: RankGroup, *, async_op: bool = False) -> Pending:
    """Start an all-gather along dimension 0. Without `async_op`, the result is complete."""
    if group.size == 1:
        return Pending(tensor)
    gathered = tensor.new_empty((group.size * tensor.shape[0], *tensor.shape[1:]))
    return Pending(gathered, group.all_gather_into(gathered, tensor.contiguous(), async_op=async_op))


def reduce_scatter(tensor: Tensor, group: RankGroup, dim: int) -> Tensor:
    """Return this rank's slice along `dim` of the sum over the group. The group's size must divide this dimension."""
    if group.size == 1:
        return tensor
    dim %= tensor.ndim
    parts = tensor.unflatten(dim, (group.size, tensor.shape[dim] // group.size)).movedim(dim, 0).contiguous()
    return start_reduce_scatter(parts.flatten(0, 1), group).wait()


def start_reduce_scatter(tensor: Tensor, group: RankGroup, *, async_op: bool = False) -> Pending:
    """Start a reduce-scatter along dimension 0. Without `async_op`, the result is complete."""
    if group.size == 1:
        return Pending(tensor)
    tensor = tensor.contiguous()
    mine = tensor.new_empty((tensor.shape[0] // group.size, *tensor.shape[1:]))
    return Pending(mine, group.reduce_scatter_into(mine, tensor, async_op=async_op))


class _WithAdjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], adjoint: Callable[..., Any], *tensors: Tensor) -> Any:
        ctx.adjoint = adjoint
        return function(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        found = ctx.adjoint(*gradients)
        return None, None, *(found if isinstance(found, tuple) else (found,))


def with_adjoint(function: Callable[..., Result], adjoint: Callable[..., Any], *tensors: Tensor | None) -> Result:
    """Return `function(*tensors)`, a tensor or a tuple, with a handwritten backward pass.

    Args:
        adjoint: a function that returns a gradient or None for each tensor, from the gradients of the results. It must
            not refer to the tensors, because that would keep them in memory until the backward pass.
    """
    return cast(Result, _WithAdjoint.apply(function, adjoint, *tensors))


def unchanged(tensor: Tensor) -> Tensor:
    """Return the tensor itself."""
    return tensor


def concatenated(tensors: Sequence[Tensor]) -> Tensor:
    """Return all elements of the tensors, concatenated in one dimension."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def gather_from_tensor_parallel_region(tensor: Tensor, group: RankGroup, dim: int) -> Tensor:
    """Return the shards of all ranks, concatenated along `dim`. The backward pass is a reduce-scatter."""
    if group.size == 1:
        return tensor
    gathers, scatters = (partial(function, group=group, dim=dim) for function in (all_gather, reduce_scatter))
    return with_adjoint(gathers, scatters, tensor)


def gather_together(tensors: Sequence[Tensor], group: RankGroup, dims: Sequence[int]) -> tuple[Tensor, ...]:
    """Gather several tensors of one dtype, each along its own dimension, in one message.

    Their gradients are also summed in one message. A missing gradient counts as zeros.
    """
    if group.size == 1 or not tensors:
        return tuple(tensors)
    ranks, shapes = group.size, [tensor.shape for tensor in tensors]
    sizes = [shape.numel() for shape in shapes]

    def gathers(*tensors: Tensor) -> tuple[Tensor, ...]:
        parts = all_gather(concatenated(tensors)[None], group, dim=0).split(sizes, dim=1)
        return tuple(
            part.reshape(ranks, *shape).movedim(0, dim).flatten(dim, dim + 1)
            for part, shape, dim in zip(parts, shapes, dims, strict=True)
        )

    def scatters(*gradients: Tensor) -> tuple[Tensor, ...]:
        by_rank = [
            gradient.unflatten(dim, (ranks, -1)).movedim(dim, 0).reshape(ranks, -1)
            for gradient, dim in zip(gradients, dims, strict=True)
        ]
        mine = reduce_scatter(torch.cat(by_rank, dim=1), group, dim=0)[0]
        return tuple(part.view(shape) for part, shape in zip(mine.split(sizes), shapes, strict=True))

    return with_adjoint(gathers, scatters, *tensors)


def end_to_end(hidden: Tensor) -> Tensor:
    """Reshape (b, s, d) to (1, b s, d). The rows are concatenated, so that each rank's shard is contiguous."""
    return hidden.flatten(0, 1)[None]


def enter_tensor_parallel_region(hidden: Tensor, tensor_parallel: TensorParallel) -> Tensor:
    """Return the input of column-parallel layers, (b, s, d) or (1, b s, d), from activations between layers.

    The backward pass sums the gradient over the group, because each rank has only a partial sum of it.
    """
    group = tensor_parallel.group
    if group.size > 1 and not tensor_parallel.sequence_parallel:
        return with_adjoint(unchanged, partial(all_reduce, group=group), hidden)
    return gather_from_tensor_parallel_region(hidden, group, SEQUENCE_DIM)


def leave_tensor_parallel_region(hidden: Tensor, tensor_parallel: TensorParallel) -> Tensor:
    """Return the sum of the ranks' partial sums (b, s, d), in the shape of activations between layers.

    In the backward pass, every rank gets the gradient of the sum, gathered first if it is sharded along the sequence.
    """
    group = tensor_parallel.group
    if group.size == 1:
        return hidden
    if not tensor_parallel.sequence_parallel:
        return with_adjoint(partial(all_reduce, group=group), unchanged, hidden)
    gathers, scatters = (partial(function, group=group, dim=SEQUENCE_DIM) for function in (all_gather, reduce_scatter))
    return with_adjoint(scatters, gathers, end_to_end(hidden))


class StepSum:
    """Accumulates the gradients of a tensor. The last backward pass of the step returns their sum over the group.

    Earlier backward passes return zeros, so an engine that adds the gradients of all passes gets the sum once. Until
    `start` is called, each backward pass counts as a step.
    """

    def __init__(self, group: RankGroup = ALONE, *, keeps: bool = True) -> None:
        """Create an accumulator that sums over `group`.

        Args:
            keeps: whether this rank gets the sum; otherwise it gets zeros. If the gradients of several ranks are summed
                or averaged later, only one of these ranks may keep the sum. Adding zeros does not change its bits.
        """
        self.group = group
        self._keeps = keeps
        self.start(1)

    def start(self, num_passes: int) -> None:
        """Begin a step of `num_passes` backward passes. The gradients of an unfinished step are discarded."""
        self._left = num_passes
        self._parts: Tensor | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """Return `tensor`, whose gradient will be summed. All ranks must run the same number of backward passes."""
        return with_adjoint(unchanged, self.take, tensor)

    def take(self, gradient: Tensor) -> Tensor:
        """Return the gradient for one backward pass from this rank's partial sum, in the same shape and dtype."""
        self._parts = gradient if self._parts is None else self._parts + gradient
        self._left -= 1
        if self._left:
            return torch.zeros_like(gradient)
        total = all_reduce(self._parts, self.group)
        self.start(1)
        return total if self._keeps else torch.zeros_like(total)


# Messages and bytes by group ------------------------------------------------------------------------------------------


GROUPS = ("tensor", "pipeline", "data", "tied", "stage", "model", "world")
TENSOR, PIPELINE, DATA, TIED, STAGE, MODEL, WORLD = GROUPS
# c10d operation -> (kind, index of the argument whose bytes are the full message)
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
_IGNORED = {"recv_", "recv_any_source_", "monitored_barrier_"}  # only the sender counts a message


@dataclass
class Traffic:
    """The numbers of messages and bytes by (group, kind). Bytes are those of a gather's output or a reduction's input.

    On a ring of n ranks, each rank sends B (n - 1) / n bytes for an all-gather or reduce-scatter of B bytes. For an
    all-reduce it sends twice as many.
    """

    messages: Counter[tuple[str, str]] = field(default_factory=Counter)
    bytes: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, group: str, kind: str, size: int, *, count: int = 1) -> None:
        """Count `count` messages of `size` bytes each."""
        if count:
            self.messages[group, kind] += count
            self.bytes[group, kind] += count * size

    def include(self, other: "Traffic", *, times: int = 1) -> None:
        """Add the counts of `other`, multiplied by `times`."""
        for key, count in other.messages.items():
            self.messages[key] += times * count
            self.bytes[key] += times * other.bytes[key]

    def of_group(self, group: str) -> tuple[int, int]:
        """Return (messages, bytes) of a group, summed over all kinds."""
        return (
            sum(count for (name, _), count in self.messages.items() if name == group),
            sum(size for (name, _), size in self.bytes.items() if name == group),
        )


def named_handles(groups: ParallelGroups) -> dict[str, ProcessGroup | None]:
    """Return the handles of a rank's groups by name. Groups with the same ranks appear once.

    With one stage, `tied` is the data-parallel group, and `stage` is the group of all ranks. Without data parallelism,
    `stage` is the tensor-parallel group. Without tensor parallelism, it is the data-parallel group.
    """
    handles = {name: getattr(groups, name).handle for name in (TENSOR, PIPELINE, DATA, MODEL)}
    for name, handle in ((TIED, groups.tied.handle), (STAGE, groups.stage.handle)):
        if handle is not distributed.group.WORLD and handle not in (groups.tensor.handle, groups.data.handle):
            handles[name] = handle
    return handles


class TrafficCounter(TorchDispatchMode):
    """Counts the messages that this rank sends inside a `with` block, including those of DeepSpeed.

        with TrafficCounter(named_handles(groups)) as counter:
            ...
        counter.traffic

    Collectives are dispatcher operations of the `c10d` namespace, so a dispatch mode intercepts all of them, also in
    the backward pass. Counting takes time, so this class is for tests and benchmarks. Calls in a group of one rank are
    not counted as messages.
    """

    def __init__(self, groups: Mapping[str, ProcessGroup | None]) -> None:
        """Create a counter. `groups` maps names to handles; messages of other groups are counted as `world`."""
        super().__init__()
        self.traffic = Traffic()
        self._names = {handle.group_name: name for name, handle in groups.items() if handle is not None}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count the operation if it is a collective, and run it."""
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
        if group.size() == 1:  # DeepSpeed also sums over groups of one rank
            return
        stages = kind == "send" and args[-1] == 0  # sums over many ranks also send, with another tag
        label = PIPELINE if stages else self._names.get(group.group_name, WORLD)
        self.traffic.add(label, kind, _num_bytes(args[position]))


def _num_bytes(argument: Any) -> int:
    if isinstance(argument, Tensor):
        return argument.numel() * argument.element_size()
    return sum(_num_bytes(item) for item in argument)
