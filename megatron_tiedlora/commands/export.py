"""Export a Tied-LoRA adapter as a LoRA adapter for PEFT, vLLM, SGLang and llama.cpp; only the tying is lost."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from functools import partial
from typing import Any

from megatron_tiedlora.base.errors import show
from megatron_tiedlora.base.output_folder import new_output, reject_existing
from megatron_tiedlora.base.paths import user_path
from megatron_tiedlora.base.wording import count_text
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.checkpoint.tensor_files import DTYPES
from megatron_tiedlora.config.adapter_settings import ExportSettings, adapter_flags
from megatron_tiedlora.convert.export_peft import (
    Export,
    base_location,
    base_name,
    export_all,
    export_peft,
    find_adapters,
    serve_hints,
)
from megatron_tiedlora.convert.open_adapter import open_adapter


def main(settings: ExportSettings) -> int:
    """Export the adapter; returns the exit status."""

    def note(text: str) -> None:
        show(f"note: {text}")

    def show_serving(source: ModelSource, exports: Mapping[str, Export]) -> None:
        named = settings.base_name or base_name(source)
        show(*serve_hints(exports, base_location(source), source.shape, named=named))

    output, adapters = settings.output, find_adapters(settings.adapter)
    chosen: dict[str, Any] = {
        "pad_rank_to": settings.pad_rank_to,
        "dtype": DTYPES[settings.dtype],
        "named": settings.base_name,
        "base_differs": settings.base_differs,
        "new": partial(new_output, take_over=settings.take_over),
    }
    if len(settings.adapter) > 1 or adapters != [user_path(settings.adapter[0])]:
        of_bases = export_all(adapters, settings.model, output, say=note, options=chosen)
        show(f"exported {count_text(len(adapters), 'adapter')}: {output}")
        for source, exports in of_bases:
            show_serving(source, exports)
        return 0
    reject_existing(output, flag=f"--output {output}")
    (given,) = settings.adapter
    opened = open_adapter(given, settings.model, kind="native")
    source = opened.source
    exported = export_peft(source, opened.adapter, output, native=user_path(given), say=note, **chosen)
    show(f"exported {given} as LoRA of rank {exported.rank} on {base_location(source)}: {output}")
    show_serving(source, {"tied": exported})
    show(f"check it with: tiedlora verify {adapter_flags(given, settings)} --peft {shlex.quote(str(output))}")
    return 0
