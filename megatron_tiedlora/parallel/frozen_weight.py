"""A weight that is never trained: how one rank stores its part of it, and every matmul with it.

A forward pass computes x W^T + c, a backward pass dy W. Layers do both through this class, so that a weight in another
storage format is a subclass and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


def frozen_parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """An uninitialised parameter without a gradient, on the current default device."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


class FrozenWeight:
    """W (out, in) of a linear, or a vector, in one tensor of the activations' dtype.

    It is no module: the layer that uses it registers its `parameters`, so that engines move and partition them.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    @classmethod
    def empty(cls, *local_shape: int, dtype: torch.dtype) -> FrozenWeight:
        """Uninitialised memory on the current default device."""
        return cls(frozen_parameter(*local_shape, dtype=dtype))

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What it is stored in, by the name under which the layer registers it."""
        assert isinstance(self.tensor, nn.Parameter), "a view is registered by nobody"
        return {"weight": self.tensor}

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Of the part that this rank holds."""
        return tuple(self.tensor.shape)

    @staticmethod
    def num_bytes(num_elements: int, dtype: torch.dtype) -> int:
        """What a weight of so many elements takes, with activations of `dtype`."""
        return num_elements * dtype.itemsize

    def times_transposed(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x W^T + bias, (tokens, out), from x (tokens, in); in the memory `out` if given. Autograd does not see it.

        Not `functional.linear`, which DeepSpeed's zero.Init replaces by a function of its own (seen in 0.19.8).
        """
        transposed = self.tensor.detach().t()
        return torch.mm(x, transposed, out=out) if bias is None else torch.addmm(bias, x, transposed, out=out)

    def times(self, grad_y: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """dy W, (tokens, in), from dy (tokens, out); in the memory `out` if given. Autograd does not see it."""
        return torch.mm(grad_y, self.tensor.detach(), out=out)

    def first_rows(self, num_rows: int) -> FrozenWeight:
        """The first rows of W, in the same memory."""
        return FrozenWeight(self.tensor.detach()[:num_rows])

    def empty_values(self) -> torch.Tensor:
        """Uninitialised memory for the values of the local part, for `load`."""
        return torch.empty_like(self.tensor)

    def load(self, values: torch.Tensor, *, dim: int = 0, start: int = 0) -> None:
        """Store `values`, of any float dtype and device, from index `start` of dimension `dim` on."""
        self.tensor.data.narrow(dim, start, values.shape[dim]).copy_(values)


def register(module: nn.Module, weight: FrozenWeight) -> FrozenWeight:
    """Give `weight`'s parameters to the module that uses it; returns it."""
    for name, parameter in weight.parameters.items():
        module.register_parameter(name, parameter)
    return weight


def frozen_weights(module: nn.Module) -> dict[str, FrozenWeight]:
    """Every frozen weight and vector inside `module`, by the name of its rule (`model/weights.py`).

    A layer keeps the FrozenWeight of its matrix in the attribute `frozen`. Biases, norms and embeddings are parameters.
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
