"""Write a PEFT LoRA or VeRA as a native adapter, which computes the same and can be merged, scored or trained on."""

from __future__ import annotations

import shlex
from functools import partial

from megatron_tiedlora.base.errors import show
from megatron_tiedlora.base.output_folder import new_output
from megatron_tiedlora.config.adapter_settings import ImportSettings
from megatron_tiedlora.convert.open_adapter import import_peft


def main(settings: ImportSettings) -> int:
    """Import the adapter; returns the exit status."""
    output = settings.output
    opened = import_peft(
        settings.model,
        settings.peft,
        output,
        base_differs=settings.base_differs,
        say=lambda note: show(f"note: {note}"),
        new=partial(new_output, take_over=settings.take_over),
    )
    config = opened.config
    targets = ", ".join(target.name for target in config.targets)
    what = f"{config.method} of rank {config.rank} on {targets} of {len(config.layers)} layers"
    show(f"imported {settings.peft} as {what} of {opened.source.name}: {output}")
    show(f"train it further with: --init_from {shlex.quote(str(output))}")
    return 0
