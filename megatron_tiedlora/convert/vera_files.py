"""Reads PEFT's VeRA adapters, and returns exactly equal native adapters.

PEFT's VeRA adds diag(v_p) B[:out_p] diag(u_p) A[:, :in_p] to module p. Its vectors lambda_b and lambda_d are v and u,
and all modules share A and B. If each adapted linear is one module, the VeRA becomes a native `vera` with the same
values. If modules are fused, the VeRA becomes a native `lora` of the same rank. The A of this lora is A[:, :in_p], and
its B has the rows diag(v_p) B[:out_p] diag(u_p) of each module, rounded to fp32 once. A VeRA also becomes a `lora` if a
linear is adapted only in some of the layers, since a `vera` would train all of them.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_tiedlora.adapters.tied_adapter import make_adapter_config, targets_of
from megatron_tiedlora.base.messages import UserError, shown
from megatron_tiedlora.base.methods import FACTORS
from megatron_tiedlora.checkpoint.native_adapter import CONFIG_FILE, WEIGHTS_FILE, check_bound
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.convert import peft_files
from megatron_tiedlora.convert.peft_files import Module, Native, Pair, Shapes, read_factors

# These fields set initial values, which the file's tensors replace, or are read below, or are used only in training.
_HARMLESS = {"projection_prng_key", "save_projection", "vera_dropout", "d_initial", "init_weights"}


class Vera(NamedTuple):
    """A PEFT VeRA: module p adds diag(v_p) B[:out_p] diag(u_p) A[:, :in_p].

    Attributes:
        a, b: A (rank, largest in) and B (largest out, rank) in fp32.
        vectors: v (out) and u (rank), PEFT's lambda_b and lambda_d, of each adapted module, in fp32.
        notes: notes for the user.
    """

    rank: int
    a: Tensor
    b: Tensor
    vectors: Mapping[Module, tuple[Tensor, ...]]
    notes: tuple[str, ...] = ()


def read_vera(folder: Path, content: Mapping[str, Any], source: ModelSource) -> Vera:
    """Return a PEFT VeRA of `source`. If its files lack A and B, they are drawn from the key, as PEFT draws them.

    Raises:
        UserError: it is not a plain VeRA, adapts unsupported modules, has no valid key, or its tensors do not fit.
    """
    file, source = folder / CONFIG_FILE, peft_files.named_as_in(folder, source)
    peft_files.reject_other_fields(file, content, kind="VeRA", harmless=_HARMLESS)
    rank = peft_files.read_rank(content.get("r"), f"{file}: r")
    chosen = peft_files.chosen_modules(file, content, source)
    sizes = peft_files.modules_of(source.shape.block)
    in_size, out_size = (max(of) for of in zip(*(sizes[module.name] for module in chosen.values()), strict=True))
    stored: Shapes = {"vera_lambda_b": lambda module: (sizes[module.name][1],), "vera_lambda_d": lambda _: (rank,)}
    shared = {"base_model.vera_A": (rank, in_size), "base_model.vera_B": (out_size, rank)}
    saved, notes = content.get("save_projection", True), tuple[str, ...]()
    vectors, projections = read_factors(folder, chosen, stored, source, kind="VeRA", shared=shared if saved else {})
    if not saved:
        if rank > max(in_size, out_size):  # no use, and the file may be small
            raise UserError(f"{file}: r = {rank} is larger than the modules, {out_size} x {in_size}; correct it")
        key = content.get("projection_prng_key", 0)
        if type(key) is not int or not -(2**63) <= key < 2**64:
            raise UserError(f"{file}: projection_prng_key = {shown(key)} is not an integer of 64 bits; correct it")
        draw = torch.Generator().manual_seed(key)
        projections = [torch.empty(shape, dtype=torch.float32) for shape in shared.values()]
        for each in projections:  # as in PEFT, to the bit
            bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(each.shape[1]))
            each.uniform_(-bound, bound, generator=draw)
        notes = (f"{folder}: vera_A and vera_B are drawn from projection_prng_key = {key}, as PEFT draws them",)
    a, b = projections
    tensors = {"vera_A": [a], "vera_B": [b], **dict(zip(stored, zip(*vectors.values(), strict=True), strict=True))}
    largest = {name: max(float(each.abs().max()) for each in of) for name, of in tensors.items()}
    check_bound(rank, largest, source=folder / WEIGHTS_FILE)
    return Vera(rank, a, b, vectors, notes)


class TargetFactors(NamedTuple):
    """The update diag(v) B diag(u) A of one linear in all layers of a model, in fp32.

    Attributes:
        a, b: A (rank, in) and B (out, rank), which all layers share.
        u: (layers, slices, rank), with the scale alpha / r. There is one slice if all rows of B use the same u, and
            otherwise one slice for each fused block.
        v: (layers, out). u and v are zero where nothing is adapted.
    """

    a: Tensor
    b: Tensor
    u: Tensor
    v: Tensor


def vera_factors(vera: Vera, source: ModelSource) -> dict[str, TargetFactors]:
    """Return the factors of each linear that a PEFT VeRA of `source` adapts, by target name."""
    found, num_layers = {}, source.shape.num_layers
    for name, linear in peft_files.adapted_linears(vera.vectors, source).items():
        fused = len({stored.module for stored in linear.sources}) > 1
        u = torch.zeros(num_layers, len(linear.blocks) if fused else 1, vera.rank)
        b, v = torch.zeros(linear.out_size, vera.rank), torch.zeros(num_layers, linear.out_size)
        blocks = zip(linear.sources, b.split(linear.blocks), v.split(linear.blocks, dim=1), strict=True)
        for index, (stored, b_block, v_block) in enumerate(blocks):
            rows = slice(stored.start, stored.start + len(b_block))
            b_block[: len(vera.b[rows])] = vera.b[rows]  # which are all rows, unless the module is not adapted
            for layer in range(num_layers):
                if vectors := vera.vectors.get(Module(layer + 1, stored.module)):
                    v_block[layer], u[layer, index if fused else 0] = vectors[0][rows], vectors[1]
        found[name] = TargetFactors(vera.a[:, : linear.in_size].clone(), b, u, v)
    return found


def native_vera(vera: Vera, source: ModelSource) -> Native:
    """Return the native `vera` or `lora` that equals a PEFT VeRA of `source`."""
    factors, layers = vera_factors(vera, source), tuple(sorted({layer for layer, _ in vera.vectors}))
    if all(u.shape[1] == 1 for _, _, u, _ in factors.values()) and len(vera.vectors) == len(layers) * len(factors):
        targets, index = targets_of(source.shape, tuple(factors)), [layer - 1 for layer in layers]
        config = make_adapter_config("vera", rank=vera.rank, alpha=vera.rank, layers=layers, targets=targets, seed=0)
        state: dict[str, Tensor] = {}
        for target in targets:
            a, b, u, v = factors[target.name]
            state |= zip((target.prefix + name for name in FACTORS), (a, b, u[index, 0], v[index]), strict=True)
        return Native(config, state)
    sizes = peft_files.modules_of(source.shape.block)
    pairs = {
        module: Pair(vera.a[:, : sizes[module.name][0]], (v.double()[:, None] * vera.b[: len(v)] * u.double()).float())
        for module, (v, u) in vera.vectors.items()
    }
    return peft_files.native_lora(pairs, source)._replace(apart="its vectors are multiplied into the B of a lora here")
