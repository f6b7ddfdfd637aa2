"""The slots of tied adapters on one rank of a server. A slot has A and B once for all layers, and u and v per layer."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.integrations.vllm.factors import TargetFactors


class FactorSlots(NamedTuple):
    """The factors of one linear. `set` and a layer's operations use the same layout.

    Attributes:
        a: A, (slots, 1, r, local in).
        b: B, (slots, 1, local out, r).
        u: u in fp32, with alpha / r multiplied in: (layers, slots, slices, r), or (slots, slices, r) of one layer.
        v: v, (layers, slots, local out), or (slots, local out) of one layer.
    """

    a: Tensor
    b: Tensor
    u: Tensor
    v: Tensor


class LinearSlots:
    """The slots of one linear, or of a part of it that the server does not fuse, in all layers of this rank's stage.

    Attributes:
        name: the name of vLLM's module within a layer.
        layers: vLLM's layers with LoRA by 0-based index. All have the same sizes.
        target: the name of the adapted linear.
        blocks: the sizes of the linear's fused blocks.
        covered: the indices of the blocks that vLLM's layer computes.
    """

    def __init__(
        self,
        name: str,
        layers: Mapping[int, Any],
        tokens: Any,
        target: str,
        blocks: Sequence[int],
        covered: Sequence[int],
        lora_config: Any,
    ) -> None:
        self.name, self.target, self.blocks, self.covered = name, target, tuple(blocks), tuple(covered)
        self.layers = dict(sorted(layers.items()))
        self.first = next(iter(self.layers.values()))
        sizes = {(layer.input_size, tuple(layer.output_slices)) for layer in self.layers.values()}
        if len(sizes) > 1:
            raise UserError(f"{name} has different sizes in different layers, {sorted(sizes)}; serve without tied_lora")
        ((in_size, self.slices),) = sizes
        out_size, num_slots, rank = sum(self.slices), lora_config.max_loras, lora_config.max_lora_rank
        new = partial(torch.zeros, dtype=lora_config.lora_dtype, device=self.first.device)
        self.slots = FactorSlots(
            new(num_slots, 1, rank, in_size),
            new(num_slots, 1, out_size, rank),
            new(len(layers), num_slots, len(self.slices), rank, dtype=torch.float32),
            new(len(layers), num_slots, out_size),
        )
        for position, layer in enumerate(self.layers.values()):
            # The addresses of these views never change, as CUDA graphs need.
            layer.tokens, layer.slots = tokens, self.slots._replace(u=self.slots.u[position], v=self.slots.v[position])

    @property
    def bytes_per_slot(self) -> int:
        """Return the bytes that one slot takes on this rank."""
        return sum(tensor.nbytes for tensor in self.slots) // len(self.slots.a)

    def cut(self, factors: TargetFactors) -> FactorSlots:
        """Return one adapter's factors on this rank, in the slots' dtypes and without the dimension of slots.

        vLLM's layer cuts A and B itself. v is cut like the rows of B, and u is not cut.

        Raises:
            UserError: the sizes are not those of the served model.
        """
        out_size, in_size, index = sum(self.blocks), self.slots.a.shape[-1], list(self.layers)
        if len(factors.b) != out_size or index[-1] >= len(factors.u):
            raise UserError(f"{self.target}: B has {len(factors.b)} rows, but the served model has {out_size}")
        a = self.first.slice_lora_a(factors.a) if len(self.slices) == 1 else factors.a
        if a.shape[1] != in_size:
            raise UserError(f"{self.target}: A has {factors.a.shape[1]} columns, but the served model has {in_size}")
        u = factors.u[index] if factors.u.shape[1] == 1 else factors.u[index][:, list(self.covered)]
        u, v = u.expand(-1, len(self.slices), -1), self._local_rows(factors.v[index].T).T
        tensors = a, self._local_rows(factors.b), u, v
        dtypes = (slot.dtype for slot in self.slots)
        return FactorSlots(*(value.to(dtype).contiguous() for value, dtype in zip(tensors, dtypes, strict=True)))

    def _local_rows(self, rows: Tensor) -> Tensor:
        """Return this rank's rows of (out, n)."""
        parts = [rows.split(self.blocks)[block] for block in self.covered]
        if len(self.slices) > 1:
            return torch.cat(self.first.slice_lora_b(parts))
        local: Tensor = self.first.slice_lora_b(torch.cat(parts))
        return local

    def part(self, slot: int, rank: int | None = None) -> FactorSlots:
        """Return the part of a slot that an adapter uses, by default one of the highest rank (see `cut`)."""
        a, b, u, v = self.slots
        return FactorSlots(a[slot, 0, :rank], b[slot, 0, :, :rank], u[:, slot, :, :rank], v[:, slot])

    def set(self, slot: int, shard: FactorSlots | None) -> None:
        """Copy one adapter's factors (see `cut`) into a slot. None sets the slot to zero."""
        for whole in self.part(slot):  # the slot may hold an adapter of a higher rank
            whole.zero_()
        if shard is not None:
            for into, value in zip(self.part(slot, len(shard.a)), shard, strict=True):
                into.copy_(value, non_blocking=True)
