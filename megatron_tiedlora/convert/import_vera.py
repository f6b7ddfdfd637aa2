"""Reads a PEFT VeRA as the exactly equal native adapter.

PEFT adds diag(v_p) B[:out_p] diag(u_p) A[:, :in_p] to module p. Its vectors lambda_b and lambda_d are v and u; all
modules share A and B. If each adapted linear is one module here, that is the native `vera`, tensor by tensor. If the
modules are parts of fused linears, it is a native `lora` of the same rank: its A is A[:, :in_p], and its B has the rows
diag(v_p) B[:out_p] diag(u_p) of each module, rounded to fp32 once. It is also a `lora` if a linear is adapted in some
of the layers only, since a `vera` would train the others too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_tiedlora.adapters.targets import targets_of
from megatron_tiedlora.adapters.tied_adapter import AdapterConfig, make_adapter_config
from megatron_tiedlora.base.errors import UserError, shown
from megatron_tiedlora.base.shapes import LinearShape
from megatron_tiedlora.checkpoint.native_adapter import CONFIG_FILE
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.convert.import_lora import Pair, native_lora
from megatron_tiedlora.convert.peft_files import (
    Module,
    StoredTensors,
    adapted_linears,
    chosen_modules,
    modules_of,
    read_factors,
    read_rank,
    reject_other_fields,
)

# They give initial values, which the file's tensors replace, or act in training alone.
_HARMLESS = {"projection_prng_key", "save_projection", "vera_dropout", "d_initial", "init_weights"}


def read_vera(
    folder: Path, content: Mapping[str, Any], source: ModelSource
) -> tuple[AdapterConfig, dict[str, torch.Tensor]]:
    """Config and full fp32 tensors of the native `vera` or `lora` that equals a PEFT VeRA of `source`.

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
    reject_other_fields(file, content, kind="VeRA", harmless=_HARMLESS)
    rank = read_rank(content.get("r"), f"{file}: r")
    chosen = chosen_modules(file, content, source)
    sizes = modules_of(source.shape.block)
    used = [sizes[module.name] for module in chosen.values()]
    stored = StoredTensors(
        "VeRA",
        shared={
            "base_model.vera_A": (rank, max(in_size for in_size, _ in used)),
            "base_model.vera_B": (max(out_size for _, out_size in used), rank),
        },
        of_module={
            "vera_lambda_b": lambda module: (sizes[module.name][1],),
            "vera_lambda_d": lambda _: (rank,),
        },
    )
    vectors, (a, b) = read_factors(folder, chosen, stored, source)
    layers, adapted = tuple(sorted({layer for layer, _ in vectors})), adapted_linears(vectors, source)
    if all(_is_one_module(linear, layers, vectors) for linear in adapted.values()):
        targets = targets_of(source.shape, tuple(adapted))
        config = make_adapter_config("vera", rank=rank, alpha=rank, layers=layers, targets=targets, seed=0)
        state: dict[str, torch.Tensor] = {}
        for target in targets:
            tensors = _native_tensors(adapted[target.name], layers, vectors, a, b)
            state |= {f"{target.prefix}{name}": tensor for name, tensor in tensors.items()}
        return config, state
    pairs = {}
    for module, (v, u) in vectors.items():
        in_size, out_size = sizes[module.name]
        pairs[module] = Pair(a[:, :in_size], (v.double()[:, None] * b[:out_size] * u.double()).float())
    return native_lora(pairs, source)


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
        "A": a[:, : linear.in_size].contiguous(),
        "B": rows_of(b),
        "u": torch.stack([u for _, u in of_layers]),
        "v": torch.stack([rows_of(v) for v, _ in of_layers]),
    }
