"""Export a Tied-LoRA adapter as a LoRA adapter for PEFT, vLLM, SGLang and llama.cpp; only the tying is lost."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from megatron_tiedlora.base.errors import show
from megatron_tiedlora.base.wording import count_text
from megatron_tiedlora.config.cli import CommandParser, adapter_flags

if TYPE_CHECKING:
    from megatron_tiedlora.checkpoint.sources import ModelSource

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
EXAMPLE = """\
examples:
  tiedlora export --adapter runs/demo/adapter --output runs/demo/peft
  tiedlora export --adapter 'runs/*/adapter' --output exports --dtype bf16

Padding the rank with zeros does not change what the adapter computes; it is for programs that accept only certain
ranks. The adapter's own files travel along in DIR/native, where tiedlora import finds them. Several adapters, or
a pattern in quotes, are written to DIR/NAME each, named after their folders or runs. Each folder is written
atomically. PEFT's config names the base by its hub id, by --base_name, or else by the name of its folder. vLLM's
filesystem resolver takes an export only if that name is the --model of the server.
"""


def parser() -> CommandParser:
    """The command's flags."""
    described = CommandParser(prog="tiedlora export", description=__doc__, epilog=EXAMPLE)
    described.add_argument(
        "--adapter", required=True, nargs="+", metavar="DIR", help="native adapters: runs' adapter/ folders or patterns"
    )
    described.add_model()
    described.add_output()
    described.add_argument("--dtype", choices=tuple(_DTYPES), default="fp32", help="dtype of the tensors [fp32]")
    described.add_argument("--base_name", metavar="NAME", help="name of the base in PEFT's config, such as its hub id")
    described.add_argument("--pad_rank_to", type=int, metavar="N", help="write rank N, padded with zeros")
    return described


def main(argv: Sequence[str]) -> int:
    """Export the adapter; returns the exit status."""
    options = parser().parse_known_names(argv)
    # These import torch and transformers, which takes seconds: --help and a wrong flag do not wait for it.
    import torch

    from megatron_tiedlora.base.output_folder import new_output, reject_existing
    from megatron_tiedlora.base.paths import user_path
    from megatron_tiedlora.convert.export_many import export_all, find_adapters
    from megatron_tiedlora.convert.export_peft import base_location, base_name, export_peft
    from megatron_tiedlora.convert.open_adapter import open_adapter
    from megatron_tiedlora.convert.serving import Export, serve_hints

    def note(text: str) -> None:
        show(f"note: {text}")

    def show_serving(source: ModelSource, exports: Mapping[str, Export]) -> None:
        named = options.base_name or base_name(source)
        show(*serve_hints(exports, base_location(source), source.shape, named=named))

    output, adapters = options.output, find_adapters(options.adapter)
    chosen = {
        "pad_rank_to": options.pad_rank_to,
        "dtype": getattr(torch, _DTYPES[options.dtype]),
        "named": options.base_name,
        "base_differs": options.base_differs,
        "new": partial(new_output, take_over=options.take_over),
    }
    if len(options.adapter) > 1 or adapters != [user_path(options.adapter[0])]:
        of_bases = export_all(adapters, options.model, output, say=note, options=chosen)
        show(f"exported {count_text(len(adapters), 'adapter')}: {output}")
        for source, exports in of_bases:
            show_serving(source, exports)
        return 0
    reject_existing(output, flag=f"--output {output}")
    (options.adapter,) = options.adapter
    opened = open_adapter(options.adapter, options.model, kind="native")
    source, adapter = opened.source, opened.adapter
    rank = export_peft(source, adapter, output, native=user_path(options.adapter), say=note, **chosen)
    show(f"exported {options.adapter} as LoRA of rank {rank} on {base_location(source)}: {output}")
    show_serving(source, {"tied": Export(output, rank, [target.name for target in adapter.config.targets])})
    show(f"check it with: tiedlora verify {adapter_flags(options)} --peft {shlex.quote(str(output))}")
    return 0
