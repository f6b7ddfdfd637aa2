"""Reads a PEFT LoRA as the exactly equal native `lora`: nothing is fitted.

PEFT adds s_p B_p A_p to module p, with s_p = alpha_p / r_p (/ sqrt(r_p) with use_rslora). `rank_pattern` and
`alpha_pattern` give some modules another r or alpha. The native scale is the largest s_p. Where s_p is smaller, B is
multiplied by s_p / scale in fp64 and rounded to fp32 once, which is exact if that is a power of two.

If all modules of a layer that are fused in one linear here have the same A, the native adapter has that A and the
stacked rows of B. Otherwise it stacks the A_p, B is block-diagonal, and the rank is the sum. The native rank is the
largest one of a linear and layer; others are padded with zeros. Modules and layers without an adapter get zero rows.

Zero rows of A that meet zero columns of B have no gradient, so padding stays zero in training. But a zero row of B
beside a non-zero A is trained, and so are the zero blocks of a block-diagonal B; and a step of AdamW is larger relative
to a B that was made smaller. `trains_apart` tells.
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
from megatron_tiedlora.config.train_fields import LARGEST_ALPHA, SMALLEST_ALPHA
from megatron_tiedlora.convert.peft_files import (
    Module,
    StoredTensors,
    adapted_linears,
    chosen_modules,
    modules_of,
    read_by_pattern,
    read_factors,
    read_rank,
    reject_other_fields,
)

_HARMLESS = {
    *("lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora", "lora_dropout", "exclude_modules"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"),
    *("megatron_core", "qalora_group_size", "ensure_weight_tying"),
}
# With the others (pissa, olora, corda, loftq, lora_ga) PEFT changes the base weights when it loads the adapter.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


class Pair(NamedTuple):
    """What PEFT adds to one module: scale B A, with the fp32 A (r, in) and B (rows, r)."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float = 1.0


Lora = Mapping[Module, Pair]


def read_lora(folder: Path, content: Mapping[str, Any], source: ModelSource) -> tuple[Lora, tuple[str, ...]]:
    """Read a PEFT LoRA of `source`; also returns notes for a user.

    Raises:
        UserError: it has a feature beyond plain LoRA, adapts other modules, or its tensors do not fit.
    """
    file = folder / CONFIG_FILE
    _reject_features(file, content)
    chosen, sizes = chosen_modules(file, content, source), modules_of(source.shape.block)
    ranks, rank_notes = read_by_pattern(file, content, ("r", "rank_pattern"), chosen, read_rank)
    alphas, alpha_notes = read_by_pattern(file, content, ("lora_alpha", "alpha_pattern"), chosen, read_alpha)
    stored = StoredTensors(
        "LoRA",
        shared={},
        of_module={
            "lora_A.weight": lambda module: (ranks[module], sizes[module.name][0]),
            "lora_B.weight": lambda module: (sizes[module.name][1], ranks[module]),
        },
    )
    factors, _ = read_factors(folder, chosen, stored, source)
    divisor = math.sqrt if content.get("use_rslora") else float
    lora = {key: Pair(a, b, alphas[key] / divisor(ranks[key])) for key, (a, b) in factors.items()}
    return lora, (*rank_notes, *alpha_notes)


def native_lora(lora: Lora, source: ModelSource) -> tuple[AdapterConfig, dict[str, torch.Tensor]]:
    """Config and full fp32 tensors of the native `lora` that is equal to a PEFT LoRA of `source`. Its targets are the
    linears of which a module is adapted in some layer."""
    layers = tuple(sorted({layer for layer, _ in lora}))
    scale = max(pair.scale for pair in lora.values())
    adapted, joined = adapted_linears(lora, source), {}
    for target in targets_of(source.shape, tuple(adapted)):
        joined[target] = _joined(lora, layers, scale=scale, linear=adapted[target.name])
    full_rank = max(a.shape[1] for a, _ in joined.values())
    config = make_adapter_config(
        "lora", rank=full_rank, alpha=scale * full_rank, layers=layers, targets=tuple(joined), seed=0
    )
    state = {name: torch.ones(config.shape(name)) for name in config.tensors}
    for target, (a, b) in joined.items():
        state[f"{target.prefix}A"] = pad(a, (0, 0, 0, full_rank - a.shape[1]))
        state[f"{target.prefix}B"] = pad(b, (0, full_rank - a.shape[1]))
    return config, state


def trains_apart(lora: Lora, source: ModelSource) -> str | None:
    """Why training continues differently from PEFT's with one A for all modules that are fused in a linear here, and
    one scale; None if it does not."""
    layers = {layer for layer, _ in lora}
    for linear in adapted_linears(lora, source).values():
        modules = {stored.module for stored in linear.sources}
        for layer in layers:
            here = [lora[key].a for module in modules if (key := Module(layer, module)) in lora]
            if here and not (len(here) == len(modules) and all(torch.equal(a, here[0]) for a in here)):
                return "modules that share one A here (q, k and v; gate and up) have an A each in it, or no adapter"
    same_scale = len({pair.scale for pair in lora.values()}) == 1
    return None if same_scale else "its modules have several scales alpha / r, and one here"


def _reject_features(file: Path, content: Mapping[str, Any]) -> None:
    start = content.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise UserError(
            f"{file}: init_lora_weights = {shown(start)} changes the base weights too; convert it to a plain LoRA with"
            " PEFT (path_initial_model_for_weight_conversion) first"
        )
    reject_other_fields(file, content, kind="LoRA", harmless=_HARMLESS)


def read_alpha(alpha: Any, what: str) -> float:
    """The alpha that is called `what` in messages. Raises UserError if a native adapter cannot have it."""
    if type(alpha) not in (int, float):
        raise UserError(f"{what} = {shown(alpha)} is not a number")
    if not SMALLEST_ALPHA <= alpha <= LARGEST_ALPHA:
        bounds = f"{SMALLEST_ALPHA:g} and {LARGEST_ALPHA:g}"
        raise UserError(f"{what} = {shown(alpha)} is not between {bounds}; scale lora_B instead")
    return float(alpha)


def _joined(
    lora: Lora, layers: tuple[int, ...], *, scale: float, linear: LinearShape
) -> tuple[torch.Tensor, torch.Tensor]:
    """The native A (n, R, in) and B (n, out, R) of a fused linear. A layer needs the rank of its modules if they have
    one A, else the sum of their ranks; R is the largest of these."""
    modules = list(dict.fromkeys(stored.module for stored in linear.sources))
    by_layer = [{name: lora[Module(layer, name)] for name in modules if (layer, name) in lora} for layer in layers]
    shared = [all(torch.equal(pair.a, next(iter(here.values())).a) for pair in here.values()) for here in by_layer]
    ranks = [[len(pair.a) for pair in here.values()] for here in by_layer]
    full_rank = max((max if one else sum)(of) for of, one in zip(ranks, shared, strict=True) if of)
    blocks = list(zip(linear.sources, linear.blocks, accumulate((0, *linear.blocks[:-1])), strict=True))
    a = torch.zeros(len(layers), full_rank, linear.in_size)
    b = torch.zeros(len(layers), linear.out_size, full_rank)
    for index, here in enumerate(by_layer):
        column = 0
        for module, pair in here.items():
            columns = slice(column, column + len(pair.a))
            a[index, columns] = pair.a
            scaled = (pair.b.double() * (pair.scale / scale)).float()
            for stored, size, start in blocks:
                if stored.module == module:
                    b[index, start : start + size, columns] = scaled[stored.start : stored.start + size]
            column = 0 if shared[index] else columns.stop
    return a, b
