"""Bytes that operations read and write, and those that a block keeps for its backward pass.

The first are counted as operations are dispatched; no kernel is run, so it needs no memory.

    with BytesTouched() as counter:
        ...
    counter.total

An operation touches what `counting.touched` says; a kernel (parallel/kernels.py) counts as the one operation that it is
when it is compiled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from megatron_tiedlora.adapters.tied_adapter import AdapterShard, Target, TiedAdapter, make_adapter_config
from megatron_tiedlora.base.shapes import HeadShape, NormShape, RopeShape
from megatron_tiedlora.model.linears import QkvLinear
from megatron_tiedlora.model.regions import run_steps
from megatron_tiedlora.parallel.frozen_weight import FrozenWeight
from megatron_tiedlora.parallel.groups import TensorParallel
from megatron_tiedlora.parallel.kernels import EAGER, Kernels
from megatron_tiedlora.planning.counting import num_bytes, touched
from megatron_tiedlora.selfcheck.timing import saved_by_autograd


class BytesTouched(TorchDispatchMode):
    """Sums bytes by operation while the block runs; of kernels that `watched` has made, by kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """All bytes."""
        return self.found.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count the operation, and let it through."""
        result = func(*args, **(kwargs or {}))
        self.found[func.overloadpacket.__name__] += touched(func, args, kwargs or {}, result)
        return result

    def watched(self, kernels: Kernels) -> Kernels:
        """The same kernels, each counted as one operation that reads what it is given and writes what it gives."""
        named = {field.name: self._as_one(field.name, getattr(kernels, field.name)) for field in fields(kernels)}
        return Kernels(**named)

    def _as_one(self, name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            with _disable_current_modes():
                result = kernel(*arguments)
            given = result if isinstance(result, tuple) else (result,)
            self.found[name] += sum(map(num_bytes, (*arguments, *given)))
            return result

        return counted


@dataclass(frozen=True)
class QkvShape:
    """One adapted QKV projection on one rank, in bf16: d, rows of Q, K and V, size of a head, tokens."""

    hidden_size: int
    rows: tuple[int, int, int]
    head_dim: int
    num_tokens: int

    @property
    def bare_bytes(self) -> int:
        """Of `x W^T` and `dy W` alone: x, W and dy read (W twice), y and dx written."""
        d, o, tokens = self.hidden_size, sum(self.rows), self.num_tokens
        return 2 * 2 * (tokens * d + o * d + tokens * o)


def layer_bytes(shape: QkvShape, method: str | None, rank: int = 1) -> Counter[str]:
    """What norm, projection, update and rotation of one layer touch, forward and backward, by operation.

    Counted as what a second layer adds to a first one, so that it holds the sum of tied gradients over the layers, and
    nothing that is done once for all of them.

    Args:
        method: of the adapter; None for the frozen layer alone.
    """
    one, two = (_bytes_of_layers(shape, method, rank, num_layers) for num_layers in (1, 2))
    two.subtract(one)
    return two


def _bytes_of_layers(shape: QkvShape, method: str | None, rank: int, num_layers: int) -> Counter[str]:
    counter = BytesTouched()
    with torch.device("meta"):
        kernels = counter.watched(EAGER)
        weight = FrozenWeight.empty(sum(shape.rows), shape.hidden_size, dtype=torch.bfloat16)
        heads = HeadShape(*(size // shape.head_dim for size in shape.rows[:2]), shape.head_dim, RopeShape())
        norm = NormShape("norm", shape.hidden_size, 1e-5, "norm")
        layer = QkvLinear(weight, heads, rope=heads.rope, norm=norm, dtype=torch.bfloat16, kernels=kernels)
        table = tuple(torch.empty(shape.num_tokens, 1, shape.head_dim // 2, dtype=torch.bfloat16) for _ in range(2))
        adapter = None
        if method is not None:
            layers, target = tuple(range(1, num_layers + 1)), Target("qkv", shape.hidden_size, shape.rows, "column")
            config = make_adapter_config(method, rank=rank, layers=layers, targets=(target,), seed=0)
            adapter = TiedAdapter(AdapterShard.whole(config))
        inputs = [
            torch.empty(1, shape.num_tokens, shape.hidden_size, dtype=torch.bfloat16, requires_grad=True)
            for _ in range(num_layers)
        ]
    found = [{}] * num_layers if adapter is None else adapter(dtype=torch.bfloat16)
    updates = [update.get("qkv") for update in found]
    trained = [] if adapter is None else [parameter for parameter in adapter.parameters() if parameter.requires_grad]
    with counter:
        outputs = [
            head
            for hidden, update in zip(inputs, updates, strict=True)
            for head in layer(hidden, TensorParallel(), update, num_rows=len(hidden), table=table)[1]
        ]
        # Attention gives gradients of their own storage for each of the three, on a GPU by tokens.
        gradients = [torch.empty_like(head.transpose(1, 2)).contiguous().transpose(1, 2) for head in outputs]
        torch.autograd.grad(outputs, [*inputs, *trained], gradients)
    return counter.found


# What is kept for the backward pass ---------------------------------------------------------------------------------


def saved_bytes_per_token(stage: Any, dtype: torch.dtype) -> float:
    """Bytes that the stage's last block keeps for each further token of a sequence, parameters left out.

    Norm weights of the form 1 + w are kept once, whatever the number of tokens.
    """
    few, more = (_saved_bytes(stage, dtype, length) for length in (256, 512))
    return (more - few) / 256


def _saved_bytes(stage: Any, dtype: torch.dtype, length: int) -> int:
    index = stage.blocks[-1]
    block = stage.layers[str(index)]
    updates = stage.read_adapter()
    hidden = stage.empty_hidden(1, length).normal_().requires_grad_()
    context = block.attention.context(torch.arange(length)[None], dtype)  # saved once for all layers
    found = (factor for update in updates.get(index, {}).values() for factor in update)
    factors = (factor for factor in found if isinstance(factor, torch.Tensor))
    held = {tensor.untyped_storage().data_ptr() for tensor in (*chain(*context.tables.values()), *factors)}
    with saved_by_autograd(stage) as saved:
        steps = block.steps(hidden, None, context, stage.tensor_parallel, update=updates.get(index))
        output = sum(run_steps(steps))
    assert output.shape == hidden.shape
    return sum(tensor.untyped_storage().nbytes() for key, tensor in saved.items() if key not in held)
