"""A weight that is never trained: how a rank stores its shard, and every matmul with it; and the embedding.

The forward pass computes x W^T + c, the backward pass dy W, which does not need x. Layers do both through
`FrozenWeight`, so that another storage format is just a subclass. Linears with an adapter are in `model/linears.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_tiedlora.parallel.groups import TensorParallel, leave_tensor_parallel_region, with_adjoint


def frozen_parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """An uninitialised parameter without a gradient, on the current default device."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


@dataclass(frozen=True)
class Columns:
    """Columns `start` to `stop - 1` of the `full` ones of a tensor: a shard of its rows.

    Attributes:
        largest: returns the elementwise maximum over the ranks that have the other columns; None without such ranks.
    """

    start: int
    stop: int
    full: int
    largest: Callable[[Tensor], Tensor] | None = None


class FrozenWeight:
    """W (out, in) of a linear, or a vector, in one tensor of the activations' dtype.

    It is not a module: the layer that uses it registers its `parameters`, so that engines move and partition them.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @classmethod
    def empty(cls, *local_shape: int, dtype: torch.dtype, shards_rows: bool = False) -> "FrozenWeight":
        """Uninitialised memory on the current default device.

        Args:
            dtype: the dtype of the activations.
            shards_rows: whether the shard has only some of the full tensor's columns.
        """
        return cls(frozen_parameter(*local_shape, dtype=dtype))

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The parameters that store it, by the name under which the layer registers them."""
        assert isinstance(self.tensor, nn.Parameter), "a view is never registered"
        return {"weight": self.tensor}

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of this rank's shard."""
        return tuple(self.tensor.shape)

    def times_transposed(self, x: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
        """x W^T + bias, (tokens, out), from x (tokens, in); written to `out` if given. Autograd does not record it.

        It avoids `functional.linear`, which DeepSpeed's zero.Init replaces by its own function (seen in 0.19.8).
        """
        transposed = self.tensor.detach().t()
        return torch.mm(x, transposed, out=out) if bias is None else torch.addmm(bias, x, transposed, out=out)

    def times(self, grad_y: Tensor, *, out: Tensor | None = None) -> Tensor:
        """dy W, (tokens, in), from dy (tokens, out); written to `out` if given. Autograd does not record it."""
        return torch.mm(grad_y, self.tensor.detach(), out=out)

    def empty_values(self) -> Tensor:
        """Uninitialised memory for the values of this rank's shard, to be passed to `load`."""
        return torch.empty_like(self.tensor)

    def columns_to_read(self, columns: Columns) -> slice:
        """The columns of the full tensor that `load` needs for a shard with these columns."""
        return slice(columns.start, columns.stop)

    def load(self, values: Tensor, *, dim: int = 0, start: int = 0, columns: Columns | None = None) -> None:
        """Store `values`, of any float dtype and device, in dimension `dim` from index `start` on.

        Args:
            columns: the columns of a shard of rows in the full tensor. `values` has the columns `columns_to_read`.
        """
        self.tensor.data.narrow(dim, start, values.shape[dim]).copy_(values)


class WeightMaker(Protocol):
    """Makes an empty weight; see `FrozenWeight.empty`."""

    def __call__(self, *local_shape: int, dtype: torch.dtype, shards_rows: bool = False) -> FrozenWeight: ...


def register(module: nn.Module, weight: FrozenWeight) -> FrozenWeight:
    """Register the parameters of `weight` with the module that uses it, and return `weight`."""
    for name, parameter in weight.parameters.items():
        module.register_parameter(name, parameter)
    return weight


def frozen_weights(module: nn.Module) -> dict[str, FrozenWeight]:
    """Every frozen weight and vector inside `module`, by its name in the name table (`model/weights.py`).

    A layer stores the FrozenWeight of its matrix in the attribute `frozen`. Biases and norms are plain parameters.
    """
    found: dict[str, FrozenWeight] = {}
    for prefix, layer in module.named_modules():
        frozen = getattr(layer, "frozen", None)
        stored = {} if frozen is None else frozen.parameters
        if frozen is not None:
            found[f"{prefix}.weight"] = frozen
        for name, parameter in layer.named_parameters(recurse=False):
            if name not in stored and not parameter.requires_grad:
                found[f"{prefix}.{name}"] = FrozenWeight(parameter)
    return found


# Matmuls and the embedding --------------------------------------------------------------------------------------------


# Rows of matmuls, and columns sent beside others, are padded to multiples of this: fast kernels want rows of
# 16-bit numbers to start at multiples of 16 bytes, and a CPU takes a third longer for 511 rows than for 512.
SIZE_MULTIPLE = 8
_HALF = (torch.bfloat16, torch.float16)


def padded(size: int, multiple: int = SIZE_MULTIPLE) -> int:
    """`size`, rounded up to the next multiple."""
    return -(-size // multiple) * multiple


def wide_matmul(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right in `dtype`, from matrices of one dtype, which is not wider than `dtype`.

    From 16 bits to fp32, on CUDA, the sums are returned unrounded. With any other pair of dtypes
    they are first rounded to the dtype of the matrices.
    """
    if left.is_cuda and left.dtype in _HALF and dtype == torch.float32:
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)


def frozen_linear(x: Tensor, weight: FrozenWeight) -> Tensor:
    """x W^T, (..., out), from x (..., in) and W (out, in). It saves nothing for the backward pass, dX = dY W."""

    def of_rows(matmul: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
        return matmul(tensor.flatten(0, -2)).view(*tensor.shape[:-1], -1)

    return with_adjoint(partial(of_rows, weight.times_transposed), partial(of_rows, weight.times), x)


class VocabularyParallelEmbedding(nn.Module):
    """Looks token ids up in a (vocabulary, d) table. A rank adds zeros for tokens whose rows other ranks hold."""

    weight: nn.Parameter

    def __init__(self, weight: FrozenWeight) -> None:
        """`weight`: (local vocabulary, d), stored as one tensor."""
        super().__init__()
        self.frozen = register(self, weight)

    def forward(self, tokens: Tensor, tensor_parallel: TensorParallel) -> Tensor:
        """Tokens (b, s) int64 -> activations between layers, (b, s, d) or (1, b s / p, d)."""
        if tensor_parallel.group.size == 1:
            return functional.embedding(tokens, self.weight)
        local_vocabulary = self.weight.shape[0]
        local_tokens = tokens - tensor_parallel.group.rank * local_vocabulary
        foreign = (local_tokens < 0) | (local_tokens >= local_vocabulary)
        rows = functional.embedding(local_tokens.masked_fill(foreign, 0), self.weight)
        return leave_tensor_parallel_region(rows.masked_fill(foreign[..., None], 0.0), tensor_parallel)
