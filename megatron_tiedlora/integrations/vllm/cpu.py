"""The update of tied adapters on a CPU. The tokens are sorted by slot once per step, for all layers."""

from typing import Any

import torch
from torch import Tensor

from megatron_tiedlora.integrations.vllm.slots import FactorSlots

_SHORT = 4  # tokens; runs that are shorter on average are computed together, from copies of their factors


class CpuTokens:
    """The runs of tokens of one slot, in tensors whose addresses stay the same.

    Attributes:
        order: the rows of the batch with a slot, sorted by slot, (max tokens).
        runs: slot and number of rows, (max slots + 1, 2). The first run with no rows ends the list.
    """

    def __init__(self, wrapper: Any, max_tokens: int, num_slots: int) -> None:
        self.wrapper = wrapper
        self.order = torch.zeros(max_tokens, dtype=torch.long)
        self.runs = torch.zeros(num_slots + 1, 2, dtype=torch.long)

    def prepare(self) -> None:
        """Sort the tokens of the next step. The wrapper has their slots, -1 for the base."""
        slots, order = self.wrapper.token_lora_indices.sort(stable=True)
        base = int((slots < 0).sum())
        self.order[: len(order) - base] = order[base:]
        runs = torch.stack(slots[base:].unique_consecutive(return_counts=True), dim=1)
        self.runs.zero_()
        self.runs[: len(runs)] = runs

    def add_update(self, y: Tensor, x: Tensor, slots: FactorSlots, slices: tuple[int, ...]) -> None:
        """Add v B u A x to y (tokens, out) in place, with the factors of each token's slot and x (tokens, in)."""
        torch.ops.tied_lora.add_update_cpu(y, x, *slots, self.order, self.runs, list(slices))


def add_update_cpu(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, u: Tensor, v: Tensor, order: Tensor, runs: Tensor, slices: list[int]
) -> None:
    """Add the update to y, see `CpuTokens.add_update`. A x and u are computed in fp32, the rest in B's dtype."""
    table = [run for run in runs.tolist() if run[1]]
    total = sum(count for _, count in table)
    if total < _SHORT * len(table):
        rows = order[:total]
        of = torch.tensor([slot for slot, count in table for _ in range(count)])
        inner = torch.einsum("ti,tri->tr", x[rows].float(), a[of, 0].float())
        scaled = (inner[:, None] * u[of]).to(b.dtype)
        parts = zip(scaled.unbind(1), b[of, 0].split(slices, dim=1), strict=True)
        wide = torch.cat([torch.einsum("tr,tor->to", part, of_slice) for part, of_slice in parts], dim=1)
        y.index_add_(0, rows, (wide * v[of]).to(y.dtype))
        return
    start = 0
    for slot, count in table:
        rows = order[start : start + count]
        start += count
        inner = x[rows].float() @ a[slot, 0].float().T
        scaled = (inner * u[slot, :, None]).to(b.dtype)  # (slices, count, r)
        parts = zip(scaled, b[slot, 0].split(slices), strict=True)
        wide = torch.cat([part @ of_slice.T for part, of_slice in parts], dim=1) * v[slot]
        y.index_add_(0, rows, wide.to(y.dtype))


# torch.compile calls the operator and does not look into it.
_LIBRARY = torch.library.Library("tied_lora", "FRAGMENT")
_LIBRARY.define("add_update_cpu" + torch.library.infer_schema(add_update_cpu, mutates_args=("y",)))
_LIBRARY.impl("add_update_cpu", add_update_cpu, "CPU")
torch.library.register_fake("tied_lora::add_update_cpu", lambda *_: None, lib=_LIBRARY)
