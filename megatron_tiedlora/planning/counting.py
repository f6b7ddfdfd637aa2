"""Count the FLOPs, memory traffic, messages and allocations of code that runs on tensors without data.

`Counts` intercepts every operation. Three components of a model are replaced by versions that count their own work:
frozen weights, attention, and the tensor-parallel group, which sends nothing. A kernel (parallel/kernels.py) counts as
one operation, as if it were compiled.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from megatron_tiedlora.parallel import groups
from megatron_tiedlora.parallel.frozen_weight import FrozenWeight, MatmulInput, RoundedRows
from megatron_tiedlora.parallel.kernels import Kernels, has_rows

META = "meta"
_ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_READS_NOTHING = {"new_zeros"}  # uses only the dtype of its argument
_OVERWRITES = {"copy_", "fill_", "zero_"}  # do not read the old values
_PICKS = {"embedding", "index_select"}  # read as many bytes of their first argument as they write


class Kernel(NamedTuple):
    """A kernel that counts as one operation.

    Attributes:
        temporary: the bytes that the uncompiled kernel needs in addition to its results, per element of its largest
            argument.
        results: the bytes of its results, per element of its largest argument.
    """

    name: str
    temporary: float = 0.0
    results: float = 0.0


class Moment(NamedTuple):
    """The allocated bytes after an operation; for a kernel, also the number of elements of its largest argument."""

    alive: float
    kernel: Kernel | None = None
    numbers: float = 0


ATTENTION = Kernel("attention")


class Counts(TorchDispatchMode):
    """A context manager that counts the work and the allocations of all operations in its block.

    Attributes:
        found: the FLOPs of matmuls without frozen weights (`low_rank`), the bytes that operations read and write
            (`moved`), and the counts of the replaced components.
        moments: the allocated memory after each operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.restart()

    def restart(self) -> None:
        """Reset all counts."""
        self.found: Counter[Hashable] = Counter()
        self.moments: list[Moment] = []
        self.attended: list[weakref.ref[torch.UntypedStorage]] = []  # tensors that attention saves for backward
        # Allocated storages that are alive, by their address.
        self.storages = weakref.WeakValueDictionary[int, torch.UntypedStorage]()
        self._whole = False  # True inside a block that counts as one operation
        self._logits = 0  # the number of matmuls that have computed logits
        self._repeats = False  # True while logits of later rows exist, which need no more memory than the first

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count its work."""
        result = func(*args, **(kwargs or {}))
        if self._whole or func.is_view:
            return result
        self.found["moved"] += touched(func, args, kwargs or {}, result)
        if func.overloadpacket in flop_registry:
            self.found["low_rank"] += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
        self.allocated(_new_results(func, result))
        return result

    @contextmanager
    def as_one(self) -> Iterator[None]:
        """Disable counting inside the block. The caller counts the block as one operation."""
        self._whole, before = True, self._whole
        try:
            yield
        finally:
            self._whole = before

    def allocated(self, result: Any, kernel: Kernel | None = None, numbers: int = 0) -> None:
        """Record the tensors in a result, and the allocated memory after the operation."""
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        if not self._repeats:
            self.moments.append(Moment(self.alive, kernel, numbers))

    def logits(self, *, made: bool) -> None:
        """Record that the logits of some rows have been computed (if `made`), or else are no longer needed."""
        self._logits += made
        self._repeats = made and self._logits > 1

    @property
    def alive(self) -> int:
        """The bytes of all tensors that were allocated in the block and still exist."""
        return sum(storage.nbytes() for storage in self.storages.values())


def touched(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Return the bytes that an unfused operation reads from memory and writes to memory.

    An operation reads its tensor arguments and writes its results. A view reads and writes nothing. An in-place
    operation reads and writes the changed tensor, unless it only overwrites the tensor. Broadcast elements count once.
    """
    size, name = 0, func.overloadpacket.__name__
    if func.is_view or name in _ALLOCATES:
        return 0
    for index, argument in enumerate(func._schema.arguments):
        given = kwargs.get(argument.name) if argument.kwarg_only or index >= len(args) else args[index]
        changed = argument.alias_info is not None and argument.alias_info.is_write
        overwritten = changed and (name in _OVERWRITES or argument.is_out)
        read = num_bytes(result if name in _PICKS and index == 0 else given)
        size += read * ((not overwritten and name not in _READS_NOTHING) + changed)
    return size + sum(map(num_bytes, _new_results(func, result)))


def _new_results(func: Any, result: Any) -> list[Any]:
    """Return the results of an operation that have their own memory."""
    results = result if len(func._schema.returns) > 1 else (result,)
    return [one for one, declared in zip(results, func._schema.returns, strict=True) if declared.alias_info is None]


def num_bytes(value: Any) -> int:
    """Return the bytes of a tensor, or of the tensors in a list, without broadcast copies; 0 for any other value."""
    if isinstance(value, Tensor):
        sizes = (n for n, stride in zip(value.shape, value.stride(), strict=True) if stride)
        return value.element_size() * torch.Size(sizes).numel()
    return sum(map(num_bytes, value)) if isinstance(value, list | tuple) else 0


def _traced_kernel(
    name: str, kernel: Callable[..., Any], arguments: Sequence[Any]
) -> tuple[tuple[Tensor | None, ...], Kernel]:
    """Run a kernel with these arguments, and return its results and its memory use."""
    with Counts() as counts:
        found = kernel(*arguments)
    results = () if found is None else found if isinstance(found, tuple) else (found,)
    size = num_bytes(results)
    most = max((moment.alive for moment in counts.moments), default=0) - size
    numbers = max(a.numel() for a in arguments if isinstance(a, Tensor))
    return results, Kernel(name, max(most, 0) / numbers, size / numbers)


@dataclass(frozen=True)
class CountingGroup(groups.RankGroup):
    """A process group that counts its messages and sends none. It counts the bytes of full tensors."""

    counts: Counts = field(default_factory=Counts)

    def _sent(self, kind: str, tensor: Tensor) -> None:
        self.counts.found["messages", groups.TENSOR, kind] += 1
        self.counts.found["bytes", groups.TENSOR, kind] += tensor.nbytes

    def all_reduce_(self, tensor: Tensor, op: Any = None, *, async_op: bool = False) -> None:
        """Count an all-reduce of `tensor`."""
        self._sent("all-reduce", tensor)

    def all_gather_into(self, gathered: Tensor, tensor: Tensor, *, async_op: bool = False) -> None:
        """Count an all-gather into `gathered`."""
        self._sent("all-gather", gathered)

    def reduce_scatter_into(self, mine: Tensor, parts: Tensor, *, async_op: bool = False) -> None:
        """Count a reduce-scatter of `parts`."""
        self._sent("reduce-scatter", parts)


class CountedWeight(FrozenWeight):
    """A frozen weight that counts the FLOPs of its matmuls, and the elements of W and of the input that they read.

    The matmuls of the head are counted separately. Elements of inputs that kernels have rounded are not counted.
    """

    def __init__(self, tensor: Tensor, counts: Counts, *, is_head: bool, rounds: bool) -> None:
        super().__init__(tensor)
        self._counts, self._is_head, self._kind = counts, is_head, "head" if is_head else "linears"
        self._factors = tensor.new_empty(1, len(tensor), dtype=torch.float32) if rounds and not is_head else None

    @property
    def gradient_factors(self) -> Tensor | None:
        """Return factors without values if the matmul is in FP8."""
        return self._factors

    def times_transposed(self, x: MatmulInput, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
        """Return x W^T + bias as FrozenWeight does, and count the matmul."""
        return self._counted("weights", x, partial(super().times_transposed, bias=bias, out=out), out)

    def times(self, grad_y: MatmulInput, *, out: Tensor | None = None) -> Tensor:
        """Return grad_y W as FrozenWeight does, and count the matmul."""
        return self._counted("weights_back", grad_y, partial(super().times, out=out), out)

    def _counted(self, name: str, x: MatmulInput, multiply: Callable[[Tensor], Tensor], out: Tensor | None) -> Tensor:
        counts, rounded = self._counts, 0 if isinstance(x, RoundedRows) else x.numel()
        with counts.as_one():
            x = x.codes.to(self.tensor.dtype) if isinstance(x, RoundedRows) else x
            product = multiply(x)
        if self._is_head and name == "weights":
            counts.logits(made=True)
        counts.allocated(() if out is not None else product)
        if self._is_head and name == "weights_back":
            counts.logits(made=False)
        read: dict[Hashable, int] = {name: self.tensor.numel(), name.replace("weights", "rounded"): rounded}
        of_head: dict[Hashable, int] = {"head_weights": self.tensor.numel()}
        counts.found.update({self._kind: 2 * len(x) * self.tensor.numel(), **(of_head if self._is_head else read)})
        return product


class CountedAttention(torch.autograd.Function):
    """An attention function that returns empty tensors, and saves the same tensors as the real kernels."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, counts: Counts) -> Tensor:
        with counts.as_one():
            output, sums = query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=torch.float32)
        counts.found["attention"] += 1
        counts.found["queries"] += query.numel()
        counts.allocated((output, sums))
        counts.attended.append(weakref.ref(sums.untyped_storage()))
        ctx.counts = counts
        ctx.save_for_backward(query, key, value, output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, _gradient: Tensor) -> Any:
        counts, saved = ctx.counts, ctx.saved_tensors  # the saved tensors stay allocated until the kernel ends
        with counts.as_one():
            gradients = tuple(tensor.new_empty(tensor.shape) for tensor in saved[:3])
        counts.found["attention"] += 2  # the FLOPs of two forward passes
        counts.found["queries"] += 2 * gradients[0].numel()
        counts.allocated(gradients, ATTENTION)
        del saved
        return *gradients, None


def counted_kernels(counts: Counts) -> Kernels:
    """Return the kernels, each counted as one operation that reads its arguments and writes its results."""
    known: dict[Hashable, tuple[tuple[Tensor | None, ...], Kernel]] = {}

    def counted(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        by_rows = has_rows(kernel)

        def call(*arguments: Any) -> Any:
            with counts.as_one():
                # The results have as many rows as the arguments. Their other sizes do not depend on the number of rows.
                few = [a[:1] if rows and a is not None else a for a, rows in zip(arguments, by_rows, strict=True)]
                key = (name, *((a.shape, a.dtype) if isinstance(a, Tensor) else a for a in few))
                if key not in known:
                    known[key] = _traced_kernel(name, kernel, few)
                results, traced = known[key]
                rows = len(arguments[0])
                given = tuple(one if one is None else one.new_empty(rows, *one.shape[1:]) for one in results)
            counts.found["moved"] += sum(map(num_bytes, (*arguments, *given)))
            numbers = max(a.numel() for a in arguments if isinstance(a, Tensor))
            counts.allocated(given, traced, numbers)
            return given if len(given) > 1 else given[0] if given else None

        return call

    plain = Kernels()
    return Kernels(**{own.name: counted(own.name, getattr(plain, own.name)) for own in fields(Kernels)})
