"""What differs between two native adapters."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_tiedlora.base.errors import shown
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter, load_adapter


def compare_adapters(one: Path, other: Path) -> list[str]:
    """A line for each field and each tensor that differs; empty if the adapters are the same.

    Raises:
        UserError: one of them cannot be read.
    """
    first, second = load_adapter(one), load_adapter(other)
    mine, yours = _facts(first), _facts(second)
    lines = [
        f"{name}: {shown(mine[name])} and {shown(yours[name])}" for name in mine if mine[name] != yours.get(name)
    ]
    for name in dict.fromkeys([*first.config.tensors, *second.config.tensors]):
        here, there = first.state.get(name), second.state.get(name)
        if here is None or there is None:
            lines.append(f"{name}: only in {one if there is None else other}")
        elif here.shape != there.shape:
            lines.append(f"{name}: shape {tuple(here.shape)} and {tuple(there.shape)}")
        elif (largest := float((here - there).abs().max())) > 0:
            lines.append(f"{name}: differs by up to {largest:.3g}, of {float(here.abs().max()):.3g}")
    return lines


def _facts(adapter: NativeAdapter) -> dict[str, Any]:
    config = adapter.config
    return {**config.facts, "seed": config.seed, **asdict(adapter.base)}
