"""Define frozen weights: the storage of a rank's shard, all matmuls with it, and the embedding.

The forward pass computes x W^T + c. The backward pass computes dy W, which does not need x. Layers do both through
`FrozenWeight`, so a new storage format needs only a subclass. Linears with an adapter are in `model/linears.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_tiedlora.parallel.groups import TensorParallel, leave_tensor_parallel_region, with_adjoint


def frozen_parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """Return an uninitialised parameter that requires no gradient, on the current default device."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


@dataclass(frozen=True)
class Columns:
    """This rank's columns of a tensor that is sharded by columns: `start` to `stop - 1` of `full` columns.

    Attributes:
        largest: a function that returns the elementwise maximum over the ranks that hold the columns; None if this rank
            holds all of them.
    """

    start: int
    stop: int
    full: int
    largest: Callable[[Tensor], Tensor] | None = None


class RoundedRows(NamedTuple):
    """Rows for FP8 matmuls: codes (tokens, n) float8_e4m3fn, and the scale of each row, (tokens,) fp32.

    Attributes:
        values: the rows that were rounded, if an update needs them.
    """

    values: Tensor | None
    codes: Tensor
    scales: Tensor

    @property
    def rows(self) -> Tensor:
        """Return the values, or a tensor of their shape if there are none."""
        return self.codes if self.values is None else self.values


MatmulInput = Tensor | RoundedRows


class FrozenWeight:
    """A frozen weight W (out, in) of a linear, or a vector, stored as one tensor in the dtype of the activations.

    This class is not an nn.Module. Layers register its `parameters`, so that engines move and partition them.

    It may have spare columns for the factor F of an adapter's update. Then one matmul computes both:

        [x | A x] [W | F]^T = x W^T + A x F^T        dy [W | F] = [dy W | dy F]

    Each sum is accumulated and rounded once. Otherwise x W^T is rounded before the update is added and rounded again.
    """

    def __init__(self, tensor: Tensor, spare: int = 0) -> None:
        """Create the weight from W, or from a tensor with `spare` more columns."""
        self.tensor, self.spare, self.dtype = tensor, spare, tensor.dtype

    @classmethod
    def empty(
        cls, *local_shape: int, dtype: torch.dtype, shards_rows: bool = False, after_norm: bool = False, spare: int = 0
    ) -> "FrozenWeight":
        """Return an uninitialised weight on the current default device.

        Args:
            dtype: the dtype of the activations.
            shards_rows: whether each row is sharded, so that the shard has only some columns of the full tensor.
            after_norm: whether a norm is before the linear, which can write x beside A x.
            spare: the number of spare columns, if `after_norm`.
        """
        *rows, width = local_shape
        spare *= after_norm
        return cls(frozen_parameter(*rows, width + spare, dtype=dtype), spare)

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Return the parameters that store the weight, by the names under which the layer registers them."""
        assert isinstance(self.tensor, nn.Parameter), "a view is never registered"
        return {"weight": self.tensor}

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Return the shape of this rank's shard."""
        return tuple(self._values.shape)

    @property
    def _values(self) -> Tensor:
        """Return W without spare columns."""
        return self.tensor.detach()[..., : self.tensor.shape[-1] - self.spare]

    @property
    def gradient_factors(self) -> Tensor | None:
        """Return the factors (1, out) fp32 of gradients that are rounded for `times`. None: no rows are rounded.

        With factors, both matmuls also take `RoundedRows`: `kernels.round_rows` of x, `round_scaled_rows` of dy.
        """
        return None

    def times_transposed(self, x: MatmulInput, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
        """Return x W^T + bias, (tokens, out), for x (tokens, in), written to `out` if given.

        If x has more columns, so has W (see the class). Autograd does not record this matmul.
        `functional.linear` is not used, because DeepSpeed's zero.Init replaces that function (seen in 0.19.8).
        """
        assert isinstance(x, Tensor)
        transposed = self.tensor.detach()[:, : x.shape[1]].t()
        return torch.mm(x, transposed, out=out) if bias is None else torch.addmm(bias, x, transposed, out=out)

    def times(self, grad_y: MatmulInput, *, out: Tensor | None = None) -> Tensor:
        """Return dy W, (tokens, in), for dy (tokens, out), written to `out` if given. Autograd does not record this.

        If `out` has more columns, so has W (see the class).
        """
        assert isinstance(grad_y, Tensor)
        return torch.mm(grad_y, self._values if out is None else self.tensor.detach()[:, : out.shape[1]], out=out)

    def empty_values(self) -> Tensor:
        """Return an uninitialised tensor for the values of this rank's shard, which is then passed to `load`."""
        return torch.empty(self.local_shape, dtype=self.dtype, device=self.tensor.device)

    def columns_to_read(self, columns: Columns) -> slice:
        """Return the columns of the full tensor that `load` needs for a shard with these columns."""
        return slice(columns.start, columns.stop)

    def load(self, values: Tensor, *, dim: int = 0, start: int = 0, columns: Columns | None = None) -> None:
        """Store `values`, of any float dtype and device, along dimension `dim`, beginning at index `start`.

        Spare columns become 0.

        Args:
            columns: the shard's columns of the full tensor. If given, `values` has the columns of `columns_to_read`.
        """
        self._values.narrow(dim, start, values.shape[dim]).copy_(values)
        if self.spare:
            self.tensor.data[:, -self.spare :] = 0

    def write_update(self, f: Tensor) -> None:
        """Write F, (out, r), to the spare columns."""
        self.tensor.data[:, -self.spare :][:, : f.shape[1]] = f


class WeightMaker(Protocol):
    """A function that creates an uninitialised weight; see `FrozenWeight.empty`."""

    def __call__(
        self, *local_shape: int, dtype: torch.dtype, shards_rows: bool = False, after_norm: bool = False
    ) -> FrozenWeight: ...


def register(module: nn.Module, weight: FrozenWeight) -> FrozenWeight:
    """Register the parameters of `weight` with the module that uses it, and return `weight`."""
    for name, parameter in weight.parameters.items():
        module.register_parameter(name, parameter)
    return weight


def frozen_weights(module: nn.Module) -> dict[str, FrozenWeight]:
    """Return every frozen weight and vector inside `module`, by its name in the name table (`model/weights.py`).

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


# Rows of matmuls are padded to a multiple of this. Fast kernels need rows of 16-bit values that start at multiples of
# 16 bytes, and a CPU takes a third longer for 511 rows than for 512.
SIZE_MULTIPLE = 8
# Columns sent in the same message as others are padded to a multiple of this. Compiled kernels read 16 bytes at a time
# only if the distance between rows is a multiple of 16 elements.
MESSAGE_MULTIPLE = 16
HALF = (torch.bfloat16, torch.float16)


def padded(size: int, multiple: int = SIZE_MULTIPLE) -> int:
    """Return `size` rounded up to a multiple of `multiple`."""
    return -(-size // multiple) * multiple


def wide_matmul(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Return left @ right in `dtype`. Both matrices have the same dtype, which is not wider than `dtype`.

    On CUDA, sums of 16-bit matrices are returned without rounding if `dtype` is fp32. In all other cases the sums are
    first rounded to the dtype of the matrices.
    """
    if left.is_cuda and left.dtype in HALF and dtype == torch.float32:
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)


def frozen_linear(x: Tensor, weight: FrozenWeight) -> Tensor:
    """Return x W^T, (..., out), for x (..., in) and W (out, in). The backward pass, dX = dY W, needs no saved data."""

    def of_rows(matmul: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
        return matmul(tensor.flatten(0, -2)).view(*tensor.shape[:-1], -1)

    return with_adjoint(partial(of_rows, weight.times_transposed), partial(of_rows, weight.times), x)


class VocabularyParallelEmbedding(nn.Module):
    """The embedding table (vocabulary, d), sharded by vocabulary. Ranks use zeros for rows that they do not hold."""

    weight: nn.Parameter

    def __init__(self, weight: FrozenWeight, *, multiplier: float = 1.0) -> None:
        """Create the embedding from `weight`, (local vocabulary, d), which must be stored as one tensor. Its rows are
        multiplied by `multiplier`."""
        super().__init__()
        self.frozen = register(self, weight)
        self.multiplier = multiplier

    def forward(self, tokens: Tensor, tensor_parallel: TensorParallel) -> Tensor:
        """Return activations between layers, (b, s, d) or (1, b s / p, d), from tokens (b, s) int64."""
        rows = self._rows(tokens, tensor_parallel)
        return rows if self.multiplier == 1 else rows * self.multiplier

    def _rows(self, tokens: Tensor, tensor_parallel: TensorParallel) -> Tensor:
        if tensor_parallel.group.size == 1:
            return functional.embedding(tokens, self.weight)
        local_vocabulary = self.weight.shape[0]
        local_tokens = tokens - tensor_parallel.group.rank * local_vocabulary
        foreign = (local_tokens < 0) | (local_tokens >= local_vocabulary)
        rows = functional.embedding(local_tokens.masked_fill(foreign, 0), self.weight)
        return leave_tensor_parallel_region(rows.masked_fill(foreign[..., None], 0.0), tensor_parallel)
