"""The slots of tied adapters on one rank of a server. A slot has A and B once for all layers, and u and v per layer."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.convert.vera_files import TargetFactors

Ints = Sequence[int]


class LinearSlots:
    """The slots of one linear, or of a part of it that the server does not fuse, in all layers of this rank's stage.

    Attributes:
        name: the name of vLLM's module within a layer.
        layers: vLLM's layers with LoRA by 0-based index. All have the same sizes.
        target: the name of the adapted linear.
        blocks: the sizes of the linear's fused blocks.
        covered: the indices of the blocks that vLLM's layer computes.
        slots: A (slots, 1, r, local in), B (slots, 1, local out, r), u in fp32 with alpha / r, (layers, slots, slices,
            r), and v (layers, slots, local out). Each of vLLM's layers has views of A, B and its own u and v.
    """

    def __init__(
        self, name: str, layers: Mapping[int, Any], tokens: Any, target: str, blocks: Ints, covered: Ints, config: Any
    ) -> None:
        self.name, self.target, self.blocks, self.covered = name, target, tuple(blocks), tuple(covered)
        self.layers = dict(sorted(layers.items()))
        self.first = next(iter(self.layers.values()))
        sizes = {(layer.input_size, tuple(layer.output_slices)) for layer in self.layers.values()}
        if len(sizes) > 1:
            raise UserError(f"{name} has different sizes in different layers, {sorted(sizes)}; serve without tied_lora")
        ((in_size, self.slices),) = sizes
        out_size, num_slots, rank = sum(self.slices), config.max_loras, config.max_lora_rank
        new = partial(torch.zeros, dtype=config.lora_dtype, device=self.first.device)
        self.slots = TargetFactors(
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

    def cut(self, factors: TargetFactors, pins: bool = False) -> TargetFactors:
        """Return one adapter's factors on this rank, in the slots' dtypes and without the dimension of slots, in pinned
        host memory if `pins` is true.

        vLLM's layer cuts A and B itself. v is cut like the rows of B, and u is not cut. Raise UserError if the sizes
        are not those of the served model."""
        out_size, in_size, index = sum(self.blocks), self.slots.a.shape[-1], list(self.layers)
        if len(factors.b) != out_size or index[-1] >= len(factors.u):
            raise UserError(f"{self.target}: B has {len(factors.b)} rows, but the served model has {out_size}")
        a = self.first.slice_lora_a(factors.a) if len(self.slices) == 1 else factors.a
        if a.shape[1] != in_size:
            raise UserError(f"{self.target}: A has {factors.a.shape[1]} columns, but the served model has {in_size}")
        u = factors.u[index] if factors.u.shape[1] == 1 else factors.u[index][:, list(self.covered)]
        u, v = u.expand(-1, len(self.slices), -1), self._local_rows(factors.v[index].T).T
        tensors = a, self._local_rows(factors.b), u, v
        cast = (value.to(slot.dtype).contiguous() for value, slot in zip(tensors, self.slots, strict=True))
        return TargetFactors(*(value.pin_memory() if pins else value for value in cast))

    def _local_rows(self, rows: Tensor) -> Tensor:
        """Return this rank's rows of (out, n)."""
        parts, is_fused = [rows.split(self.blocks)[block] for block in self.covered], len(self.slices) > 1
        local = self.first.slice_lora_b(parts if is_fused else torch.cat(parts))
        return torch.cat(local if is_fused else [local])

    def part(self, slot: int, rank: int | None = None) -> TargetFactors:
        """Return the part of a slot that an adapter uses, by default one of the highest rank (see `cut`)."""
        a, b, u, v = self.slots
        return TargetFactors(a[slot, 0, :rank], b[slot, 0, :, :rank], u[:, slot, :, :rank], v[:, slot])

    def set(self, slot: int, shard: TargetFactors | None) -> None:
        """Copy one adapter's factors (see `cut`) into a slot. None sets the slot to zero."""
        for whole in self.part(slot):  # the slot may hold an adapter of a higher rank
            whole.zero_()
        if shard is not None:
            for into, value in zip(self.part(slot, len(shard.a)), shard, strict=True):
                into.copy_(value, non_blocking=True)
