"""Reads a PEFT LoRA as the exactly equal native `lora`: nothing is rounded or fitted.

PEFT adds s B_p A_p to module p, with s = lora_alpha / r (/ sqrt(r) with use_rslora). If all modules that are fused in
one linear here have the same A, the native adapter has that A and the stacked rows of B. Otherwise it stacks the A_p,
B is block-diagonal, and the rank is the sum. The native rank is the largest one of a linear; others are padded with
zeros. Modules and layers without an adapter get zero rows.

Zero rows of A that meet zero columns of B have no gradient, so padding stays zero in training. But a zero row of B
beside a non-zero A is trained, and so are the zero blocks of a block-diagonal B: `trains_as_peft` tells.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from megatron_tiedlora.adapters.targets import targets_of
from megatron_tiedlora.adapters.tied_adapter import AdapterConfig, make_adapter_config
from megatron_tiedlora.base.errors import UserError, shown
from megatron_tiedlora.base.shapes import LinearShape
from megatron_tiedlora.checkpoint.native_adapter import CONFIG_FILE
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.config.settings import LARGEST_ALPHA, SMALLEST_ALPHA
from megatron_tiedlora.convert.peft_files import (
    Module,
    StoredTensors,
    adapted_linears,
    chosen_modules,
    read_factors,
    read_rank,
    reject_other_fields,
)

_HARMLESS = {
    *("lora_alpha", "use_rslora", "lora_dropout", "exclude_modules"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"),
    *("megatron_core", "qalora_group_size", "ensure_weight_tying"),
}
# With the others (pissa, olora, corda, loftq, lora_ga) PEFT changes the base weights when it loads the adapter.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


class Pair(NamedTuple):
    """The fp32 A (r, in) and B (rows, r) of one module."""

    a: torch.Tensor
    b: torch.Tensor


class Lora(NamedTuple):
    """A PEFT LoRA: scale B A is added to each module."""

    pairs: Mapping[Module, Pair]
    rank: int
    scale: float


def read_lora(folder: Path, content: Mapping[str, Any], source: ModelSource) -> Lora:
    """Read a PEFT LoRA of `source`.

    Raises:
        UserError: it has a feature beyond plain LoRA, adapts other modules, or its tensors do not fit.
    """
    file = folder / CONFIG_FILE
    _reject_features(file, content)
    rank = read_rank(file, content)
    scale = _alpha(file, content) / (math.sqrt(rank) if content.get("use_rslora") else rank)
    stored = StoredTensors(
        "LoRA",
        shared={},
        of_module={
            "lora_A.weight": lambda in_size, _: (rank, in_size),
            "lora_B.weight": lambda _, out_size: (out_size, rank),
        },
    )
    factors, _ = read_factors(folder, chosen_modules(file, content, source), stored, source)
    return Lora({module: Pair(*tensors) for module, tensors in factors.items()}, rank, scale)


def native_lora(lora: Lora, source: ModelSource) -> tuple[AdapterConfig, dict[str, torch.Tensor]]:
    """Config and full fp32 tensors of the native `lora` that is equal to a PEFT LoRA of `source`. Its targets are the
    linears of which a module is adapted in some layer."""
    layers = tuple(sorted({layer for layer, _ in lora.pairs}))
    adapted, joined = adapted_linears(lora.pairs, source), {}
    for target in targets_of(source.shape, tuple(adapted)):
        joined[target] = _joined(lora.pairs, layers, rank=lora.rank, linear=adapted[target.name])
    full_rank = max(a.shape[1] for a, _ in joined.values())
    config = make_adapter_config(
        "lora", rank=full_rank, alpha=lora.scale * full_rank, layers=layers, targets=tuple(joined), seed=0
    )
    state = {name: torch.ones(config.shape(name)) for name in config.tensors}
    for target, (a, b) in joined.items():
        state[f"{target.prefix}A"] = pad(a, (0, 0, 0, full_rank - a.shape[1]))
        state[f"{target.prefix}B"] = pad(b, (0, full_rank - a.shape[1]))
    return config, state


def trains_as_peft(lora: Lora, source: ModelSource) -> bool:
    """Whether training continues as PEFT's would with one A for all modules that are fused in a linear here: these have
    the same A now, and all of them are adapted where one is."""
    layers = {layer for layer, _ in lora.pairs}
    for linear in adapted_linears(lora.pairs, source).values():
        modules = {stored.module for stored in linear.sources}
        for layer in layers:
            here = [lora.pairs[key].a for module in modules if (key := Module(layer, module)) in lora.pairs]
            if here and not (len(here) == len(modules) and all(torch.equal(a, here[0]) for a in here)):
                return False
    return True


def _reject_features(file: Path, content: Mapping[str, Any]) -> None:
    start = content.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise UserError(
            f"{file}: init_lora_weights = {shown(start)} changes the base weights too; convert it to a plain LoRA with"
            " PEFT (path_initial_model_for_weight_conversion) first"
        )
    reject_other_fields(file, content, kind="LoRA", harmless=_HARMLESS)


def _alpha(file: Path, content: Mapping[str, Any]) -> float:
    alpha: Any = content.get("lora_alpha")
    if type(alpha) not in (int, float):
        raise UserError(f"{file}: lora_alpha = {shown(alpha)} is not a number")
    if not SMALLEST_ALPHA <= alpha <= LARGEST_ALPHA:
        bounds = f"{SMALLEST_ALPHA:g} and {LARGEST_ALPHA:g}"
        raise UserError(f"{file}: lora_alpha = {shown(alpha)} is not between {bounds}; scale lora_B instead")
    return float(alpha)


def _joined(
    pairs: Mapping[Module, Pair], layers: tuple[int, ...], *, rank: int, linear: LinearShape
) -> tuple[torch.Tensor, torch.Tensor]:
    """The native A (n, R, in) and B (n, out, R) of a fused linear. R is `rank` if each layer has one A, else `rank`
    times the number of different modules that are adapted."""
    modules = list(dict.fromkeys(stored.module for stored in linear.sources))
    by_layer = [{name: pairs[Module(layer, name)] for name in modules if (layer, name) in pairs} for layer in layers]
    used = [module for module in modules if any(module in here for here in by_layer)]
    shared = all(torch.equal(pair.a, next(iter(here.values())).a) for here in by_layer for pair in here.values())
    full_rank = rank if shared else rank * len(used)
    blocks = list(zip(linear.sources, linear.blocks, accumulate((0, *linear.blocks[:-1])), strict=True))
    a = torch.zeros(len(layers), full_rank, linear.in_size)
    b = torch.zeros(len(layers), linear.out_size, full_rank)
    for index, here in enumerate(by_layer):
        for module, pair in here.items():
            column = 0 if shared else rank * used.index(module)
            a[index, column : column + rank] = pair.a
            for stored, size, start in blocks:
                if stored.module == module:
                    rows = pair.b[stored.start : stored.start + size]
                    b[index, start : start + size, column : column + rank] = rows
    return a, b
