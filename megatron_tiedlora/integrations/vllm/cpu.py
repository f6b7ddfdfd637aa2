"""The update of tied adapters on a CPU. The tokens are sorted by slot once per step, for all layers."""

from typing import Any

import torch
from torch import Tensor

from megatron_tiedlora.convert.vera_files import TargetFactors

_SHORT = 4  # tokens; runs that are shorter on average are computed together, from copies of each token's factors


class CpuTokens:
    """Which rows of the batch use which slot, in tensors whose addresses stay the same.

    Attributes:
        order: the rows of the batch, sorted by slot, the base's first: (max tokens).
        counts: number of rows of the base and of each slot, (1 + max slots).
    """

    def __init__(self, wrapper: Any, max_tokens: int, num_slots: int) -> None:
        self.wrapper = wrapper
        self.order = torch.zeros(max_tokens, dtype=torch.long)
        self.counts = torch.zeros(1 + num_slots, dtype=torch.long)

    def prepare(self) -> None:
        """Sort the tokens of the next step. The wrapper has their slots, -1 for the base."""
        slots, order = self.wrapper.token_lora_indices.sort(stable=True)
        self.order[: len(order)] = order
        self.counts.copy_(torch.bincount(slots + 1, minlength=len(self.counts)))

    def add_update(self, y: Tensor, x: Tensor, slots: TargetFactors, slices: tuple[int, ...]) -> None:
        """Add v B u A x to y (tokens, out) in place, with the factors of each token's slot and x (tokens, in)."""
        torch.ops.tied_lora.add_update_cpu(y, x, *slots, self.order, self.counts, list(slices))


def add_update_cpu(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, u: Tensor, v: Tensor, order: Tensor, counts: Tensor, slices: list[int]
) -> None:
    """Add the update to y, see `CpuTokens.add_update`. A x and u are computed in fp32, the rest in B's dtype."""
    base, *of_slots = counts.tolist()
    rows = order[base : base + sum(of_slots)]
    runs = enumerate(rows.split(of_slots))
    batches: list[tuple[Tensor, Tensor | slice]] = [(run, slice(slot, slot + 1)) for slot, run in runs if len(run)]
    if len(rows) < _SHORT * len(batches):
        batches = [(rows, torch.repeat_interleave(counts[1:]))]
    for run, of in batches:
        inner = x[run].view(len(a[of]), -1, x.shape[1]).float() @ a[of, 0].float().mT  # (slots or tokens, rows, r)
        scaled = (inner[:, None] * u[of][:, :, None]).to(b.dtype)
        parts = zip(scaled.unbind(1), b[of, 0].split(slices, dim=1), strict=True)
        wide = torch.cat([part @ of_slice.mT for part, of_slice in parts], dim=2) * v[of][:, None]
        y.index_add_(0, run, wide.flatten(0, 1).to(y.dtype))


# torch.compile calls the operator and does not look into it.
_LIBRARY = torch.library.Library("tied_lora", "FRAGMENT")
_LIBRARY.define("add_update_cpu" + torch.library.infer_schema(add_update_cpu, mutates_args=("y",)))
_LIBRARY.impl("add_update_cpu", add_update_cpu, "CPU")
torch.library.register_fake("tied_lora::add_update_cpu", lambda *_: None, lib=_LIBRARY)
