"""Reads PEFT's LoRA and VeRA as exactly equal native adapters: nothing is fitted.

PEFT's LoRA adds s_p B_p A_p to module p, with s_p = alpha_p / r_p (/ sqrt(r_p) with use_rslora). `rank_pattern` and
`alpha_pattern` give some modules another r or alpha. The native scale is the largest s_p. Where s_p is smaller, B is
multiplied by s_p / scale in fp64 and rounded to fp32 once, which is exact if that is a power of two.

If all modules of a layer that are fused in one linear here have the same A, the native adapter has that A and the
stacked rows of B. Otherwise it stacks the A_p, B is block-diagonal, and the rank is the sum. The native rank is the
largest one of a linear and layer; others are padded with zeros. Modules and layers without an adapter get zero rows.

Zero rows of A that meet zero columns of B have no gradient, so padding stays zero in training. But a zero row of B
beside a non-zero A is trained, and so are the zero blocks of a block-diagonal B; and a step of AdamW is larger relative
to a B that was made smaller. `Native.apart` tells.

PEFT's VeRA adds diag(v_p) B[:out_p] diag(u_p) A[:, :in_p] to module p. Its vectors lambda_b and lambda_d are v and u;
all modules share A and B. If each adapted linear is one module here, that is the native `vera`, tensor by tensor. If
the modules are parts of fused linears, it is a native `lora` of the same rank: its A is A[:, :in_p], and its B has the
rows diag(v_p) B[:out_p] diag(u_p) of each module, rounded to fp32 once. It is also a `lora` if a linear is adapted in
some of the layers only, since a `vera` would train the others too.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from megatron_tiedlora.adapters.tied_adapter import AdapterConfig, make_adapter_config, targets_of
from megatron_tiedlora.base.errors import UserError, shown
from megatron_tiedlora.base.shapes import LinearShape
from megatron_tiedlora.checkpoint.native_adapter import CONFIG_FILE
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.config.train_fields import LARGEST_ALPHA, SMALLEST_ALPHA
from megatron_tiedlora.convert.peft_files import (
    Module,
    Shapes,
    adapted_linears,
    chosen_modules,
    modules_of,
    read_by_pattern,
    read_factors,
    read_rank,
    reject_other_fields,
)

_HARMLESS_OF_LORA = {
    *("lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora", "lora_dropout", "exclude_modules"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"),
    *("megatron_core", "qalora_group_size", "ensure_weight_tying"),
}
# They give initial values, which the file's tensors replace, or act in training alone.
_HARMLESS_OF_VERA = {"projection_prng_key", "save_projection", "vera_dropout", "d_initial", "init_weights"}
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
    if (start := content.get("init_lora_weights")) not in _PLAIN_STARTS:
        raise UserError(
            f"{file}: init_lora_weights = {shown(start)} changes the base weights too; convert it to a plain LoRA with"
            " PEFT (path_initial_model_for_weight_conversion) first"
        )
    reject_other_fields(file, content, kind="LoRA", harmless=_HARMLESS_OF_LORA)
    chosen, sizes = chosen_modules(file, content, source), modules_of(source.shape.block)
    ranks, rank_notes = read_by_pattern(file, content, ("r", "rank_pattern"), chosen, read_rank)
    alphas, alpha_notes = read_by_pattern(file, content, ("lora_alpha", "alpha_pattern"), chosen, read_alpha)
    stored: Shapes = {
        "lora_A.weight": lambda module: (ranks[module], sizes[module.name][0]),
        "lora_B.weight": lambda module: (sizes[module.name][1], ranks[module]),
    }
    factors, _ = read_factors(folder, chosen, stored, source, kind="LoRA")
    divisor = math.sqrt if content.get("use_rslora") else float
    lora = {key: Pair(a, b, alphas[key] / divisor(ranks[key])) for key, (a, b) in factors.items()}
    return lora, (*rank_notes, *alpha_notes)


class Native(NamedTuple):
    """Config and full fp32 tensors of a native adapter that is equal to one of PEFT.

    Attributes:
        apart: why training continues differently from PEFT's; None if it does not.
    """

    config: AdapterConfig
    state: dict[str, torch.Tensor]
    apart: str | None = None


def native_lora(lora: Lora, source: ModelSource) -> Native:
    """The native `lora` that is equal to a PEFT LoRA of `source`, with one A for all modules that are fused in a linear
    here, and one scale. Its targets are the linears of which a module is adapted in some layer."""
    layers = tuple(sorted({layer for layer, _ in lora}))
    scale = max(pair.scale for pair in lora.values())
    adapted, joined = adapted_linears(lora, source), {}
    for target in targets_of(source.shape, tuple(adapted)):
        joined[target] = _joined(lora, layers, scale=scale, linear=adapted[target.name])
    full_rank = max(a.shape[1] for a, _, _ in joined.values())
    config = make_adapter_config(
        "lora", rank=full_rank, alpha=scale * full_rank, layers=layers, targets=tuple(joined), seed=0
    )
    state = {name: torch.ones(config.shape(name)) for name in config.tensors}
    for target, (a, b, _) in joined.items():
        state[f"{target.prefix}A"] = pad(a, (0, 0, 0, full_rank - a.shape[1]))
        state[f"{target.prefix}B"] = pad(b, (0, full_rank - a.shape[1]))
    if not all(together for _, _, together in joined.values()):
        apart = "modules that share one A here (q, k and v; gate and up) have an A each in it, or no adapter"
        return Native(config, state, apart)
    one_scale = len({pair.scale for pair in lora.values()}) == 1
    return Native(config, state, None if one_scale else "its modules have several scales alpha / r, and one here")


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
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """The native A (n, R, in) and B (n, out, R) of a fused linear, and whether in each layer either none of its modules
    has an adapter, or all have one with the same A. A layer needs the rank of its modules if they have one A, else the
    sum of their ranks; R is the largest of these."""
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
    together = all(one and len(here) in (0, len(modules)) for one, here in zip(shared, by_layer, strict=True))
    return a, b, together


def read_vera(folder: Path, content: Mapping[str, Any], source: ModelSource) -> Native:
    """The native `vera` or `lora` that equals a PEFT VeRA of `source`.

    Raises:
        UserError: its A and B are not saved, it has a feature beyond plain VeRA, adapts other modules, or its tensors
            do not fit.
    """
    file = folder / CONFIG_FILE
    if not content.get("save_projection", True):
        raise UserError(
            f"{file}: save_projection = {shown(content['save_projection'])} leaves vera_A and vera_B out of the file;"
            " save the adapter with PEFT and save_projection = True"
        )
    reject_other_fields(file, content, kind="VeRA", harmless=_HARMLESS_OF_VERA)
    rank = read_rank(content.get("r"), f"{file}: r")
    chosen = chosen_modules(file, content, source)
    sizes = modules_of(source.shape.block)
    used = [sizes[module.name] for module in chosen.values()]
    stored: Shapes = {"vera_lambda_b": lambda module: (sizes[module.name][1],), "vera_lambda_d": lambda _: (rank,)}
    shared = {
        "base_model.vera_A": (rank, max(in_size for in_size, _ in used)),
        "base_model.vera_B": (max(out_size for _, out_size in used), rank),
    }
    vectors, (a, b) = read_factors(folder, chosen, stored, source, kind="VeRA", shared=shared)
    layers, adapted = tuple(sorted({layer for layer, _ in vectors})), adapted_linears(vectors, source)
    if all(_is_one_module(linear, layers, vectors) for linear in adapted.values()):
        targets = targets_of(source.shape, tuple(adapted))
        config = make_adapter_config("vera", rank=rank, alpha=rank, layers=layers, targets=targets, seed=0)
        state: dict[str, torch.Tensor] = {}
        for target in targets:
            tensors = _native_tensors(adapted[target.name], layers, vectors, a, b)
            state |= {f"{target.prefix}{name}": tensor for name, tensor in tensors.items()}
        return Native(config, state)
    pairs = {}
    for module, (v, u) in vectors.items():
        in_size, out_size = sizes[module.name]
        pairs[module] = Pair(a[:, :in_size], (v.double()[:, None] * b[:out_size] * u.double()).float())
    return native_lora(pairs, source)._replace(apart="its vectors are a part of the A and B of a lora here")


def _is_one_module(linear: LinearShape, layers: tuple[int, ...], adapted: Collection[Module]) -> bool:
    """Whether a linear is stored as one module, which is adapted in all `layers`."""
    names = {rows.module for rows in linear.sources}
    return len(names) == 1 and all(Module(layer, *names) in adapted for layer in layers)


def _native_tensors(
    linear: LinearShape,
    layers: tuple[int, ...],
    vectors: Mapping[Module, tuple[torch.Tensor, ...]],
    a: torch.Tensor,
    b: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """A (r, in), B (out, r), u (n, r) and v (n, out) of a linear that is stored as one module."""

    blocks = [slice(rows.start, rows.start + size) for rows, size in zip(linear.sources, linear.blocks, strict=True)]

    def rows_of(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor[block] for block in blocks])

    of_layers = [vectors[Module(layer, linear.sources[0].module)] for layer in layers]
    return {
        "A": a[:, : linear.in_size].clone(),  # a file holds no tensor twice, and linears may be equally wide
        "B": rows_of(b),
        "u": torch.stack([u for _, u in of_layers]),
        "v": torch.stack([rows_of(v) for v, _ in of_layers]),
    }
