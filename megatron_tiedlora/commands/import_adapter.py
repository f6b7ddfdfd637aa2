"""Write a PEFT LoRA or VeRA as a native adapter, which computes the same and can be merged, scored or trained on."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from functools import partial

from megatron_tiedlora.base.errors import show
from megatron_tiedlora.config.cli import CommandParser, path_value

EXAMPLE = """\
example:
  tiedlora import --peft downloads/lora --model meta-llama/Llama-2-7b-hf --output adapters/lora

An export of this project gives back the tied adapter that it came from, byte for byte, unless its PEFT files were
changed. Any other LoRA or VeRA becomes an equal lora or vera. Only what has to be multiplied into B is rounded, once to
fp32: an alpha / r of some modules alone (rank_pattern, alpha_pattern), or VeRA's vectors. DIR is written atomically.
"""


def parser() -> CommandParser:
    """The command's flags."""
    described = CommandParser(prog="tiedlora import", description=__doc__, epilog=EXAMPLE)
    described.add_argument(
        "--peft", required=True, type=path_value, metavar="DIR", help="folder of a PEFT adapter, in safetensors"
    )
    described.add_model()
    described.add_new_folder()
    described.add_argument(
        "--base_differs", action="store_true", help="continue although M is not the base of the export in DIR"
    )
    return described


def main(argv: Sequence[str]) -> int:
    """Import the adapter; returns the exit status."""
    options = parser().parse_known_names(argv)
    # These import torch and transformers, which takes seconds: --help and a wrong flag do not wait for it.
    from megatron_tiedlora.base.output_folder import new_output, reject_existing
    from megatron_tiedlora.convert.open_adapter import find_peft_base, import_peft

    output = options.output
    reject_existing(output, flag=f"--output {output}")
    source = find_peft_base(options.peft, options.model)
    config = import_peft(
        source,
        options.peft,
        output,
        base_differs=options.base_differs,
        say=lambda note: show(f"note: {note}"),
        new=partial(new_output, take_over=options.take_over),
    )
    targets = ", ".join(target.name for target in config.targets)
    what = f"{config.method} of rank {config.rank} on {targets} of {len(config.layers)} layers"
    show(f"imported {options.peft} as {what} of {source.name}: {output}")
    show(f"train it further with: --init_from {shlex.quote(str(output))}")
    return 0
