"""Export a Tied-LoRA adapter as a LoRA adapter for PEFT, vLLM, SGLang and llama.cpp; only the tying is lost."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NoReturn

from megatron_tiedlora.base.errors import show
from megatron_tiedlora.config.cli import CommandParser, adapter_flags, run_command

EXAMPLE = """\
example:
  python tools/export_peft.py --adapter runs/demo/adapter --output runs/demo/peft

Padding the rank with zeros does not change what the adapter computes; it is for programs that accept only certain
ranks. The adapter's own files travel along in DIR/native, where tools/import_peft.py finds them. DIR is written
atomically.
"""


def parser() -> CommandParser:
    """The command's flags."""
    described = CommandParser(prog="export_peft.py", description=__doc__, epilog=EXAMPLE)
    described.add_adapter()
    described.add_output()
    described.add_argument("--pad_rank_to", type=int, metavar="N", help="write rank N, padded with zeros")
    return described


def main(argv: Sequence[str]) -> int:
    """Export the adapter; returns the exit status."""
    options = parser().parse_known_names(argv)
    # These import torch and transformers, which takes seconds: --help and a wrong flag do not wait for it.
    from megatron_tiedlora.base.output_folder import new_output, reject_existing
    from megatron_tiedlora.base.paths import user_path
    from megatron_tiedlora.convert.export_peft import export_peft, peft_base, serve_hint
    from megatron_tiedlora.convert.inputs import open_inputs

    output = options.output
    reject_existing(output, flag=f"--output {output}")
    source, adapter = open_inputs(options.adapter, options.model)
    rank = export_peft(
        source,
        adapter,
        output,
        native=user_path(options.adapter),
        pad_rank_to=options.pad_rank_to,
        base_differs=options.base_differs,
        say=lambda note: show(f"note: {note}"),
        new=partial(new_output, take_over=options.take_over),
    )
    named = peft_base(source)
    show(f"exported {options.adapter} as LoRA of rank {rank} on {named}: {output}")
    show(serve_hint(output, named, rank, source.shape))
    show(f"check it with: python tools/verify_export.py {adapter_flags(options)} --peft {output}")
    return 0


def run(argv: Sequence[str]) -> NoReturn:
    """Run the command and exit with its status."""
    run_command(main, argv)
